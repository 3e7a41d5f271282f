"""Two nodes on one machine: two agents of torchrun that meet on the loopback, two ranks each."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from tests.tiny import ROOT

pytestmark = pytest.mark.slow

SETTINGS = {
    "train.steps": 2,
    "grpo.prompts_per_step": 3,  # so that one of four ranks has none
    "grpo.group_size": 4,
    "rollout.max_completion_tokens": 16,
    "rollout.ahead": 1,
    "rollout.keep_weights": "false",
    "policy.sharding": "hybrid",
    "data.heldout_records": 2,
    "checkpoint.every": 1,
}


def start_agents(arguments: list[str]) -> list[subprocess.Popen]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=2"]
    launcher += ["--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{port}", "--rdzv-id=test"]
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
    environment |= {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    return [
        subprocess.Popen(
            [*launcher, "--local-addr=127.0.0.1", f"--node-rank={node}", "train.py", *arguments],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for node in range(2)
    ]


def test_two_nodes_train_and_one_process_goes_on(tmp_path: Path) -> None:
    """Each node keeps the verdicts that it paid for; whoever goes on finds those of both."""
    output = tmp_path / "run"
    arguments = [f"--{name}={value}" for name, value in SETTINGS.items()]
    for agent in start_agents([*arguments, f"--output={output}"]):
        told, _ = agent.communicate(timeout=300)
        assert agent.returncode == 0, told[-3000:]
    assert {path.name for path in (output / "verdicts").glob("*.sqlite")} == {
        "node-0.sqlite",
        "node-1.sqlite",
    }
    AutoModelForCausalLM.from_pretrained(output / "policy")

    resumed = subprocess.run(
        [sys.executable, "train.py", f"--resume={output}", "--train.steps=3"],
        cwd=ROOT,
        env={k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    metrics = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert [of_step["step"] for of_step in metrics] == [1, 2, 3]
    assert all(of_step["completions"] == 12 and of_step["unscored"] == 0 for of_step in metrics)

"""What torchrun does to a run: restarts after a rank has died, and a signal passed on to all."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.tiny import ROOT, torchrun

pytestmark = pytest.mark.slow

SETTINGS = {
    "train.steps": 3,
    "grpo.prompts_per_step": 2,
    "grpo.group_size": 4,
    "rollout.max_completion_tokens": 12,
    "rollout.temperature": 2.0,
    "data.heldout_records": 2,
    "checkpoint.every": 1,
}
DYING = """
import os, signal
from pathlib import Path

calls = 0

def lengths(completions, completion_ids, **columns):
    global calls
    calls += 1
    died = Path(os.environ["DIED"])
    if os.environ["RANK"] == "1" and calls == 3 and not died.exists():
        died.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return [sum(ids) % 97 / 97 for ids in completion_ids]
"""


def arguments(output: Path) -> list[str]:
    return [f"--{name}={value}" for name, value in {**SETTINGS, "output": output}.items()]


def test_torchrun_starts_again_where_a_rank_has_died(tmp_path: Path) -> None:
    (tmp_path / "dying_reward.py").write_text(DYING, encoding="utf-8")
    output, died = tmp_path / "run", tmp_path / "died"
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
    environment |= {"DIED": str(died), "PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1"}
    restarting = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    restarting += ["--nproc-per-node=2", "--max-restarts=1", "train.py"]
    subprocess.run(
        [*restarting, *arguments(output), "--reward=dying_reward:lengths"],
        check=True,
        cwd=ROOT,
        env=environment,
        timeout=300,
    )
    assert died.exists()
    whole = tmp_path / "whole"
    options = {"env": environment}
    torchrun(2, "train.py", *arguments(whole), "--reward=dying_reward:lengths", **options)
    for name in ("rollouts.jsonl", "heldout.jsonl", "policy/model.safetensors"):
        assert (output / name).read_bytes() == (whole / name).read_bytes(), name


def test_torchrun_passes_a_signal_on_and_both_ranks_save(tmp_path: Path) -> None:
    output = tmp_path / "run"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    running = subprocess.Popen(
        [*launcher, "--nproc-per-node=2", "train.py", *arguments(output), "--train.steps=500"],
        cwd=ROOT,
        env={k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
        | {"OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        text=True,
    )
    metrics = output / "metrics.jsonl"
    while not metrics.exists() and running.poll() is None:
        time.sleep(0.1)
    running.send_signal(signal.SIGTERM)
    _, told = running.communicate(timeout=60)
    assert f"stopped: SIGTERM; go on with --resume {output}" in told
    done = len(metrics.read_text(encoding="utf-8").splitlines())
    [*_, newest] = sorted((output / "checkpoints").glob("step-*[0-9]"))
    state = json.loads((newest / "run.json").read_text(encoding="utf-8"))["state"]
    assert state["done"] == done < 500

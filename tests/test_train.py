"""train.py as a user runs it: what it writes, that it repeats itself, and how it refuses."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import data
import train
from grpo.generation import generate_groups
from grpo.rollout import read_groups
from grpo.sampling import Sampling
from tests.tiny import fresh_seed

ROOT = Path(__file__).parent.parent
SMALL = {
    "train.steps": 2,
    "grpo.prompts_per_step": 2,
    "grpo.group_size": 4,
    "rollout.max_completion_tokens": 24,
    "data.heldout_records": 3,
}


def run(monkeypatch: pytest.MonkeyPatch, output: Path, **settings: object) -> None:
    """train.py in this process, with a few small steps of the quickstart."""
    arguments = [f"--{k}={v}" for k, v in ({"output": output} | SMALL | settings).items()]
    monkeypatch.setattr(sys, "argv", ["train.py", *arguments])
    monkeypatch.delenv("RANK", raising=False)
    train.main()


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def without_times(metrics: list[dict]) -> list[dict]:
    return [{k: v for k, v in m.items() if not k.startswith("seconds_")} for m in metrics]


def test_the_same_seed_gives_the_same_run_and_another_seed_another(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    seed = fresh_seed()
    for name, used in (("a", seed), ("b", seed), ("c", seed + 1)):
        torch.manual_seed(torch.seed())  # the global random state must not matter
        run(monkeypatch, tmp_path / name, seed=used)
    a, b, c = (without_times(lines(tmp_path / name / "metrics.jsonl")) for name in "abc")
    assert a == b
    assert a != c
    for file in (
        "rollouts.jsonl",
        "heldout.jsonl",
        "evaluations.jsonl",
        "policy/model.safetensors",
    ):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes(), file


def test_what_a_run_leaves_behind(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(monkeypatch, tmp_path, seed=fresh_seed())
    metrics = lines(tmp_path / "metrics.jsonl")
    assert [m["step"] for m in metrics] == [1, 2]
    groups = list(read_groups(tmp_path / "rollouts.jsonl", step=2))
    assert len(groups) == 2 and all(len(group.completions) == 4 for group in groups)
    for group in groups:
        for completion in group.completions:
            assert completion.reward == completion.details["reward"]["total"]
            assert len(completion.logprobs) == len(completion.token_ids)
        advantages = [completion.advantage for completion in group.completions]
        assert sum(advantages) == pytest.approx(0, abs=1e-9)
    assert [e["step"] for e in lines(tmp_path / "evaluations.jsonl")] == [0, 2]
    shown = capsys.readouterr().out
    assert "held-out reward" in shown and "before" in shown and "after" in shown
    assert "stand-in" in shown, "the lexical judge must be labelled wherever its reward is shown"


def test_the_saved_policy_loads_and_generates_the_same_greedy_tokens(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    exported = []
    original = train.export_policy

    def keep(*arguments: object) -> None:
        exported.append(arguments)
        original(*arguments)

    monkeypatch.setattr(train, "export_policy", keep)
    settings = {"policy.compute_dtype": "float32", "train.learning_rate": 1e-3}
    run(monkeypatch, tmp_path, **settings)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "policy")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "policy")
    groups = list(read_groups(tmp_path / "heldout.jsonl", step=0))
    prompts = [group.prompt.token_ids for group in groups]
    model, _, stops, _ = exported[0]
    assert tokenizer.eos_token_id in stops and len(stops) == 2
    ours = generate_groups(
        model,
        prompts,
        group_size=1,
        max_new_tokens=40,
        sampling=Sampling(temperature=0),
        stop_ids=stops,
    )
    for prompt, group in zip(prompts, ours, strict=True):
        ids = torch.tensor([prompt])
        output = loaded.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=40, do_sample=False
        )
        assert output[0, len(prompt) :].tolist() == group[0].token_ids


def test_a_reward_function_of_ones_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """With TRL's signature; a None is left out of the group's mean and counted."""
    (tmp_path / "own_reward.py").write_text(
        "def shortest(prompts, completions, completion_ids, emotion, **columns):\n"
        "    assert len(prompts) == len(completions) == len(emotion)\n"
        "    rewards = [-float(len(ids)) for ids in completion_ids]\n"
        "    return [None, *rewards[1:]]\n"
    )
    monkeypatch.chdir(tmp_path)
    run(monkeypatch, tmp_path / "run", reward="own_reward:shortest")
    metrics = lines(tmp_path / "run" / "metrics.jsonl")
    assert [m["unscored"] for m in metrics] == [1, 1]
    first = next(read_groups(tmp_path / "run" / "rollouts.jsonl")).completions
    assert first[0].reward is None and first[0].advantage == 0.0
    assert first[1].reward == -len(first[1].token_ids)


def record(query: str = "Nobody came.") -> str:
    return json.dumps(
        {"persona": {"identity": "A baker."}, "scenario": "A party.", "dialogue": [query]}
    )


def write(path: Path, text: str) -> str:
    path.write_text(text, encoding="utf-8")
    return str(path)


# Settings that cannot work, and what the one line must speak of.
BAD_INPUTS = {
    "no key": (lambda folder: {"judge.kind": "openai"}, "judge.api_key_variable"),
    "unreachable judge": (
        lambda folder: {"judge.kind": "openai", "judge.base_url": "http://127.0.0.1:9/v1"},
        "judge.base_url",
    ),
    "unknown model": (lambda folder: {"policy.model": str(folder / "none")}, "policy.model"),
    "no data": (lambda folder: {"data.train": write(folder / "empty", "")}, "data.train"),
    "long prompt": (
        lambda folder: (
            {"data.train": write(folder / "long", "\n".join([record("word " * 3000)] * 3))}
            | {"data.heldout_records": 1}
        ),
        "rollout.max_prompt_tokens",
    ),
    "no context": (
        lambda folder: {"rollout.max_completion_tokens": 4000},
        "rollout.max_completion_tokens",
    ),
    "group of one": (lambda folder: {"grpo.group_size": 1}, "grpo.group_size = 1"),
    "filter": (lambda folder: {"rollout.top_p": 0.9}, "rollout.top_p"),
    "few records": (lambda folder: {"grpo.prompts_per_step": 10**6}, "grpo.prompts_per_step"),
    "own reward": (lambda folder: {"reward": "no_such_module:f"}, "reward = no_such_module:f"),
    "all held out": (
        lambda folder: (
            {"data.train": write(folder / "own", "\n".join([record()] * 70))}
            | {"data.heldout_records": 70}
        ),
        "data.heldout_records",
    ),
}


@pytest.mark.parametrize("case", BAD_INPUTS)
def test_bad_input_ends_in_one_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str], case: str
) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    make_settings, named = BAD_INPUTS[case]
    with pytest.raises(SystemExit) as ended:
        run(monkeypatch, tmp_path / "run", **make_settings(tmp_path))
    assert ended.value.code == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ") and "\n" not in error and named in error
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_cuda_without_cuda(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        run(monkeypatch, tmp_path / "run", **{"policy.device": "cuda"})
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith("error: policy.device = cuda: ")


def test_a_run_folder_is_not_written_over(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.toml").write_text("")
    with pytest.raises(SystemExit):
        run(monkeypatch, tmp_path)
    assert "holds a run already" in capsys.readouterr().err


def test_under_torchrun_the_line_is_printed_once(tmp_path: Path) -> None:
    """A missing file is found by both ranks, a taken folder by rank 0: one line either way."""
    (tmp_path / "config.toml").write_text("")
    for setting in (f"--data.train={tmp_path / 'none.jsonl'}", f"--output={tmp_path}"):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        done = subprocess.run(
            [*command, "--nproc-per-node=2", str(ROOT / "train.py"), setting],
            capture_output=True,
            text=True,
            timeout=300,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        assert done.returncode != 0
        assert done.stderr.count("error: ") == 1
        assert 'train.py", line' not in done.stderr, "a traceback"


def test_every_epoch_deals_each_record_once() -> None:
    config = train.RunConfig()
    config.grpo.prompts_per_step = 3
    prompts = list(range(11))
    for epoch in range(3):
        steps = [train.prompts_of_step(prompts, epoch * 3 + i, config) for i in range(3)]
        assert len(set(sum(steps, []))) == 9
    assert train.prompts_of_step(prompts, 0, config) != train.prompts_of_step(prompts, 3, config)


def test_the_bundled_heldout_records_are_never_trained_on() -> None:
    records, heldout = train.load_data(train.RunConfig())
    assert len(heldout) == 64
    assert not {r.query for r in records} & {r.query for r in heldout}
    assert len(records) == len(data.load_records("bundled"))

"""train.py as a user runs it: what it writes, that it repeats itself, and how it refuses."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import data
import train
from grpo.generation import generate_groups
from grpo.parallel import TORCHRUN_VARIABLES, Ranks
from grpo.prompts import prompts_of_step
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


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("two_threads")
def test_the_same_seed_gives_the_same_run_and_another_seed_another(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """To the last bit, with groups large enough for two threads to work on one.

    With a reward that tells any two texts apart: PERM's gives most of these short ones the same,
    and a step in which no group has a spread changes no weight.
    """
    (tmp_path / "any_reward.py").write_text(
        "from zlib import crc32\n"
        "def any_reward(completions, **columns):\n"
        "    return [crc32(text.encode()) / 2**32 for text in completions]\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    seed = fresh_seed()
    for name, used in (("a", seed), ("b", seed), ("c", seed + 1)):
        torch.manual_seed(torch.seed())  # the global random state must not matter
        # By its folder: by its name, the embedded policy is trained on one thread.
        settings = {
            "grpo.group_size": 16,
            "policy.model": data.embedded_policy(),
            "reward": "any_reward:any_reward",
        }
        run(monkeypatch, tmp_path / name, seed=used, **settings)
    a, b, c = (without_times(lines(tmp_path / name / "metrics.jsonl")) for name in "abc")
    assert a == b and all(metrics["gradient_norm"] > 0 for metrics in a)
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


def record(query: str = "Nobody came.", scenario: str = "A party.") -> str:
    return json.dumps(
        {"persona": {"identity": "A baker."}, "scenario": scenario, "dialogue": [query]}
    )


def write(path: Path, text: str) -> str:
    path.write_text(text, encoding="utf-8")
    return str(path)


def policy_folder(path: Path, *without: str, **files: str) -> str:
    """A copy of the embedded policy without some files, and with others in their place."""
    shutil.copytree(data.embedded_policy(), path, ignore=shutil.ignore_patterns(*without))
    for name, text in files.items():
        write(path / name, text)
    return str(path)


TEMPLATE = "chat_template.jinja"
PARTIES_ONLY = "{% if 'party' in messages[1]['content'] %}{{ messages[1]['content'] }}{% endif %}"


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
    "no tokenizer files": (
        lambda folder: {"policy.model": policy_folder(folder / "p", "tokenizer*")},
        "policy.model",
    ),
    "only weights and config": (
        lambda folder: {"policy.model": policy_folder(folder / "p", "tokenizer*", "*.jinja")},
        "policy.model",
    ),
    "damaged tokenizer": (
        lambda folder: {"policy.model": policy_folder(folder / "p", **{"tokenizer.json": "{}"})},
        "policy.model",
    ),
    "empty chat template": (
        lambda folder: {"policy.model": policy_folder(folder / "p", **{TEMPLATE: ""})},
        "record 1 of data.train makes an empty prompt",
    ),
    "empty prompt": (
        lambda folder: {
            "policy.model": policy_folder(folder / "p", **{TEMPLATE: PARTIES_ONLY}),
            "data.train": write(folder / "own", f"{record()}\n{record(scenario='Alone.')}"),
            "data.heldout": write(folder / "heldout", record()),
        },
        "record 2 of data.train makes an empty prompt",
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


@pytest.mark.parametrize(
    "body",
    [
        "raise RuntimeError('two\\nlines')",
        "raise SystemExit('usage: own_reward FILE')",
        "import sys; sys.exit()",
        "class Outcome(BaseException): pass\nraise Outcome",
        "def reward(",
    ],
)
def test_a_reward_module_that_cannot_be_imported(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str], body: str
) -> None:
    """Whatever it raises: SystemExit(0), say, would end one rank and leave the others waiting."""
    write(tmp_path / "raising_reward.py", body)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        run(monkeypatch, tmp_path / "run", reward="raising_reward:reward")
    assert ended.value.code == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: reward = raising_reward:reward: ") and "\n" not in error
    assert not (tmp_path / "run").exists()


def test_the_judges_key_is_looked_for_on_every_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    config = train.RunConfig(judge=train.JudgeConfig(kind="openai"))
    for rank in (0, 1):
        with pytest.raises(train.ConfigError, match="^judge.api_key_variable = OPENAI_API_KEY: "):
            train.make_reward(config, Ranks(rank, 2, torch.device("cpu"), mesh=None))


def test_a_local_judge_goes_where_the_policy_is(monkeypatch: pytest.MonkeyPatch) -> None:
    devices = []
    loads = "perm_reward.judges.local.load_score_reader"
    monkeypatch.setattr(loads, lambda name, device, rubrics: devices.append(device))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    ranks = Ranks(0, 1, torch.device("cpu"), None)
    train.make_reward(train.RunConfig(judge=train.JudgeConfig(kind="local")), ranks)
    assert devices == [torch.device("cpu")]


def test_only_the_main_rank_asks_the_judge_for_a_first_reply() -> None:
    """Hundreds of ranks would be hundreds of paid calls before any work."""
    nobody = train.JudgeConfig(kind="openai", base_url="http://127.0.0.1:9/v1")
    config = train.RunConfig(judge=nobody)
    for rank in (1, 0):
        ranks = Ranks(rank, 2, torch.device("cpu"), mesh=None)
        reward = train.make_reward(config, ranks)
        if rank == 0:
            with pytest.raises(train.ConfigError, match="^judge.base_url = "):
                train.try_judge(reward, ranks)
        else:
            train.try_judge(reward, ranks)


@pytest.mark.parametrize("rank", ["0", "1"])
def test_rank_without_what_else_torchrun_sets(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str], rank: str
) -> None:
    for name in TORCHRUN_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setattr(sys, "argv", ["train.py", f"--output={tmp_path / 'run'}"])
    with pytest.raises(SystemExit) as ended:
        train.main()
    assert ended.value.code == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith(f"error: RANK = {rank}: ") and "\n" not in error
    assert "without LOCAL_RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT;" in error
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("environment", "processes"),
    [({"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "3"}, 3), ({"LOCAL_RANK": "2"}, 3)],
)
def test_more_processes_than_cuda_devices(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    environment: dict[str, str],
    processes: int,
) -> None:
    """The first process has a device, but must speak for those that have none."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as ended:
        run(monkeypatch, tmp_path / "run")
    assert ended.value.code == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith(f"error: policy.device = auto: {processes} processes on this machine")
    assert "\n" not in error and "2 CUDA" in error
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_cuda_without_cuda(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        run(monkeypatch, tmp_path / "run", **{"policy.device": "cuda"})
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith("error: policy.device = cuda: ")


def test_the_settings_of_a_run_that_would_go_on_are_printed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = train.RunConfig(seed=41, output=str(tmp_path))
    (tmp_path / "config.toml").write_text(train.to_toml(config))

    def printed(*argv: str) -> str:
        with pytest.raises(SystemExit) as ended:
            train.read_command_line(list(argv))
        assert ended.value.code == 0
        return capsys.readouterr().out

    resume = f"--resume={tmp_path}"
    assert printed(resume, "--print-config") == train.to_toml(config)
    config.train.steps = 7
    assert printed("--print-config", "--train.steps=7", resume) == train.to_toml(config)
    assert "--resume: " in printed(resume, "--help")
    with pytest.raises(train.ConfigError, match="^--resume none: no run is there; "):
        train.read_command_line(["--resume=none", "--print-config"])
    with pytest.raises(train.ConfigError, match="^--config a.toml: not beside --resume"):
        train.read_command_line([resume, "--config=a.toml"])


def test_torchrun_goes_on_with_a_run_that_it_starts_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    given, found = [f"--output={tmp_path}", "--seed=3"], train.RunConfig(seed=3)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert train.read_command_line(given)[1] is False, "it ended before it had begun"
    (tmp_path / "config.toml").write_text(train.to_toml(found))
    config, resume = train.read_command_line([*given, "--train.steps=7"])
    assert resume and (config.seed, config.train.steps, config.output) == (3, 7, str(tmp_path))
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    assert train.read_command_line(given)[1] is False


def test_a_run_folder_is_not_written_over(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(SystemExit):
        run(monkeypatch, tmp_path)
    assert "holds a run already" in capsys.readouterr().err


# train.py, with a setting that only the second rank has, as if its machine lacked the file.
ONLY_ON_RANK_1 = f"""
import os, sys
sys.path.insert(0, {str(ROOT)!r})
import train
setting = sys.argv.pop()
sys.argv += [setting] if os.environ["RANK"] == "1" else []
train.main()
"""


@pytest.mark.slow
@pytest.mark.parametrize("found_by", ["both", "rank 0", "rank 1"])
def test_under_torchrun_the_line_is_printed_once(tmp_path: Path, found_by: str) -> None:
    """A missing file is found by both ranks, a taken folder by rank 0: one line either way."""
    (tmp_path / "metrics.jsonl").write_text("")
    no_data, taken = f"--data.train={tmp_path / 'none.jsonl'}", f"--output={tmp_path}"
    arguments = {
        "both": [str(ROOT / "train.py"), no_data],
        "rank 0": [str(ROOT / "train.py"), taken],
        "rank 1": [write(tmp_path / "only.py", ONLY_ON_RANK_1), no_data],
    }
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*command, *arguments[found_by]],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode != 0
    [line] = [line for line in done.stderr.splitlines() if "error: " in line]
    assert line.endswith(" (on rank 1)") == (found_by == "rank 1")
    assert 'train.py", line' not in done.stderr, "a traceback"


def test_every_epoch_deals_each_record_once() -> None:
    config = train.RunConfig()
    config.grpo.prompts_per_step = 3
    prompts = list(range(11))
    for epoch in range(3):
        steps = [prompts_of_step(prompts, epoch * 3 + i, config) for i in range(3)]
        assert len(set(sum(steps, []))) == 9
    assert prompts_of_step(prompts, 0, config) != prompts_of_step(prompts, 3, config)


def test_the_bundled_heldout_records_are_never_trained_on() -> None:
    records, heldout = train.load_data(train.RunConfig())
    assert len(heldout) == 64
    assert not {r.query for r in records} & {r.query for r in heldout}
    assert len(records) == len(data.load_records("bundled"))

"""How a run stops: a full disk, updates that are not finite, a signal; and how it goes on then."""

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

import train
from grpo.trainer import Trainer

pytestmark = pytest.mark.slow  # whole runs

SMALL = {
    "train.steps": 3,
    "grpo.prompts_per_step": 2,
    "grpo.group_size": 4,
    "rollout.max_completion_tokens": 12,
    "data.heldout_records": 2,
    "checkpoint.every": 1,
    "rollout.temperature": 2.0,
    "reward": "tests.content_reward:content",
}

Running = Callable[..., int]


@pytest.fixture
def running(monkeypatch: pytest.MonkeyPatch) -> Running:
    """Call with arguments to run train.py in this process; returns its exit code."""

    def run(*arguments: str) -> int:
        monkeypatch.setattr("sys.argv", ["train.py", *arguments])
        try:
            train.main()
        except SystemExit as ended:
            return int(ended.code or 0)
        return 0

    return run


def small(output: Path, **settings: object) -> list[str]:
    return [f"--{name}={value}" for name, value in {**SMALL, "output": output, **settings}.items()]


def metrics_of(output: Path) -> list[dict]:
    lines = (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return list(map(json.loads, lines))


def steps_of(output: Path) -> list[int]:
    return [of_step["step"] for of_step in metrics_of(output)]


def test_a_disk_that_is_full_while_saving(
    tmp_path: Path,
    running: Running,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The last good checkpoint stays, and the run goes on from it once there is room."""
    output, whole = tmp_path / "run", tmp_path / "whole"
    from grpo import checkpoint

    written, original = [], checkpoint.write_synced

    def full(path: Path, text: str) -> None:
        written.append(path)
        if len(written) == 2:
            raise OSError(28, "No space left on device")
        original(path, text)

    monkeypatch.setattr(checkpoint, "write_synced", full)
    assert running(*small(output)) == 1
    message = capsys.readouterr().err
    assert "the checkpoint of step 2 cannot be written (No space left on device)" in message
    assert f"make room; go on with --resume {output}" in message
    assert sorted(path.name for path in (output / "checkpoints").glob("step-*[0-9]")) == [
        "step-000001"
    ]
    monkeypatch.setattr(checkpoint, "write_synced", original)
    assert running(f"--resume={output}") == 0
    assert running(*small(whole)) == 0
    assert min(of_step["gradient_norm"] for of_step in metrics_of(whole)) > 0
    name = "policy/model.safetensors"
    assert (output / name).read_bytes() == (whole / name).read_bytes()
    assert steps_of(output) == [1, 2, 3]

    # And a checkpoint that was damaged since: said loudly, and the one before it is used.
    newest = output / "checkpoints" / "step-000003"
    data = next(newest.glob("*.distcp"))
    data.write_bytes(data.read_bytes()[:-1])
    capsys.readouterr()
    assert running(f"--resume={output}") == 0
    assert f"warning: {data}: its content has changed; going on from the one before" in (
        capsys.readouterr().err
    )
    assert (output / name).read_bytes() == (whole / name).read_bytes()
    assert steps_of(output) == [1, 2, 3]


def test_updates_that_are_not_finite_stop_the_run(
    tmp_path: Path,
    running: Running,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """With the policy of before them, and what they were to learn from."""
    output, original = tmp_path / "run", Trainer.begin_rollout

    def begin(self: Trainer, step: int, prompts: list) -> object:
        rollout = original(self, step, prompts)
        if step > 0:
            rollout.everyone[0].completions[0].logprobs[0] = float("nan")
        return rollout

    monkeypatch.setattr(Trainer, "begin_rollout", begin)
    # The ratio is to what was recorded then.
    arguments = small(
        output,
        **{"rollout.ahead": 1, "train.steps": 5, "train.max_skipped": 2, "checkpoint.keep": 3},
    )
    assert running(*arguments) == 1
    assert "2 updates in a row, the last in step 3, had a loss or gradient that is not finite" in (
        capsys.readouterr().err
    )
    assert [of_step["skipped"] for of_step in metrics_of(output)] == [0, 1, 1]
    assert metrics_of(output)[0]["gradient_norm"] > 0
    rollouts = (output / "rollouts.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["step"] for line in rollouts] == [1, 1, 2, 2, 3, 3]

    def tensors(step: int) -> list[bytes]:
        folder = output / "checkpoints" / f"step-{step:06d}"
        return [path.read_bytes() for path in sorted(folder.glob("*.distcp"))]

    assert tensors(1) == tensors(2) == tensors(3)
    assert (output / "checkpoints" / "step-000003").is_dir()


def test_a_signal_saves_what_was_sampled_too(
    tmp_path: Path,
    running: Running,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Asked to end in the update: the rollout is in the checkpoint, and is not sampled again."""
    output, whole = tmp_path / "run", tmp_path / "whole"
    original, sampled = Trainer.remember_reference, []

    def interrupted(self: Trainer, groups: list) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        original(self, groups)

    monkeypatch.setattr(Trainer, "remember_reference", interrupted)
    assert running(*small(output)) == 128 + signal.SIGTERM
    assert f"stopped: SIGTERM; go on with --resume {output}" in capsys.readouterr().err
    assert list((output / "checkpoints" / "step-000000").glob("rollout-*.jsonl"))
    monkeypatch.setattr(Trainer, "remember_reference", original)

    begin = Trainer.begin_rollout

    def begun(self: Trainer, step: int, prompts: list) -> object:
        sampled.append(step)
        return begin(self, step, prompts)

    monkeypatch.setattr(Trainer, "begin_rollout", begun)
    assert running(f"--resume={output}") == 0
    assert sampled == [1, 2]
    assert running(*small(whole)) == 0
    for name in ("policy/model.safetensors", "rollouts.jsonl", "heldout.jsonl"):
        assert (output / name).read_bytes() == (whole / name).read_bytes()


def test_a_signal_in_the_first_evaluation(
    tmp_path: Path, running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the reward function too, which may take any Exception for a fault of its own."""
    output, whole = tmp_path / "run", tmp_path / "whole"
    from tests import content_reward

    original = content_reward.content

    def interrupted(**columns: list) -> list[float]:
        os.kill(os.getpid(), signal.SIGTERM)
        return original(**columns)

    monkeypatch.setattr(content_reward, "content", interrupted)
    assert running(*small(output)) == 128 + signal.SIGTERM
    monkeypatch.setattr(content_reward, "content", original)
    assert running(f"--resume={output}") == 0
    assert running(*small(whole)) == 0
    for name in ("policy/model.safetensors", "rollouts.jsonl", "heldout.jsonl"):
        assert (output / name).read_bytes() == (whole / name).read_bytes()


def test_a_checkpoint_between_two_passes_has_the_trained_weights(
    tmp_path: Path, running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a pass without gradient FSDP2 leaves embeddings and head gathered, in bfloat16."""
    settings = {"grpo.updates_per_rollout": 2, "checkpoint.every": 0}
    output, whole = tmp_path / "run", tmp_path / "whole"
    original, calls = Trainer.remember_old, []

    def interrupted(self: Trainer) -> None:
        original(self)
        calls.append(None)
        if len(calls) == 2:  # so that the weights have moved, and the optimiser has moments
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Trainer, "remember_old", interrupted)
    assert running(*small(output, **settings)) == 128 + signal.SIGTERM
    monkeypatch.setattr(Trainer, "remember_old", original)
    assert running(f"--resume={output}") == 0
    assert running(*small(whole, **settings)) == 0
    for name in ("policy/model.safetensors", "rollouts.jsonl"):
        assert (output / name).read_bytes() == (whole / name).read_bytes()


def test_where_no_checkpoint_is_whole_nothing_is_wiped_out(
    tmp_path: Path, running: Running, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "run"
    assert running(*small(output)) == 0
    before = {path: path.read_bytes() for path in output.glob("*.jsonl")}
    for folder in (output / "checkpoints").iterdir():
        (folder / "run.json").unlink()
    capsys.readouterr()
    assert running(f"--resume={output}") == 2
    assert "none of its checkpoints is whole" in capsys.readouterr().err
    assert before == {path: path.read_bytes() for path in output.glob("*.jsonl")}


def test_settings_that_a_run_cannot_go_on_with_are_not_kept(
    tmp_path: Path, running: Running, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "run"
    assert running(*small(output)) == 0
    before = (output / "config.toml").read_bytes()
    assert running(f"--resume={output}", "--policy.lora_rank=8", "--train.steps=4") == 2
    assert "policy.lora_rank" in capsys.readouterr().err
    assert (output / "config.toml").read_bytes() == before
    assert running(f"--resume={output}", "--train.steps=4") == 0
    assert steps_of(output) == [1, 2, 3, 4]
    assert b"steps = 4" in (output / "config.toml").read_bytes()


def test_a_start_that_failed_leaves_no_run(
    tmp_path: Path, running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The corrected command is taken: a reward of one's own seldom works at the first try."""
    from tests import content_reward

    original = content_reward.content
    monkeypatch.setattr(content_reward, "content", lambda **columns: 1 / 0)
    assert running(*small(tmp_path / "run")) == 2
    monkeypatch.setattr(content_reward, "content", original)
    assert running(*small(tmp_path / "run")) == 0

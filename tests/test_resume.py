"""A run that was killed goes on as if it had not been."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from grpo.checkpoint import (
    DamagedCheckpoint,
    checkpoints,
    load_checkpoint,
    read_state,
    remove_old,
    save_checkpoint,
)
from grpo.config import TrainConfig
from grpo.optimizer import make_optimizer
from grpo.parallel import Ranks, pick_device, start_ranks
from grpo.sharding import shard
from tests.tiny import ROOT, fresh_seed, tiny_model, torchrun


def killings(folder: Path, trials: int) -> str:
    """What tests/killing.py says of so many trials. Fails where a resumed run differs."""
    command = [sys.executable, str(ROOT / "tests" / "killing.py"), str(folder)]
    done = subprocess.run(
        [*command, str(fresh_seed()), str(trials)],
        capture_output=True,
        text=True,
        timeout=2700,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
def test_runs_killed_at_twenty_moments_are_resumed_bit_for_bit(tmp_path: Path) -> None:
    """Twenty runs, every third one stopped twice: in generation, judging, update, saving, export…

    On one rank, or on two of which one is killed alone: the other ends too, in bounded time.
    """
    told = killings(tmp_path, trials=20)
    assert told.count(": the same") == 20
    assert int(told.split()[-2]) >= 20, told  # "killed 22 times"


# --- checkpoints ---------------------------------------------------------------------------------


def stepped(ranks: Ranks, seed: int, steps: int):
    """A sharded tiny model and its optimiser after some steps on a made-up loss."""
    model = shard(tiny_model("llama", seed), ranks, torch.float32)
    optimizer = make_optimizer(model, TrainConfig(learning_rate=1e-2))
    for step in range(steps):
        tokens = torch.arange(1 + step, 9 + step)[None]
        model(tokens).logits.float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def step_on(model, optimizer, times: float = 1) -> None:
    """One more step, on a loss that counts so many times."""
    (times * model(torch.arange(4)[None]).logits.float().square().mean()).backward()
    optimizer.step()
    optimizer.zero_grad()


def everything(model, optimizer) -> list[torch.Tensor]:
    tensors = []
    for parameter in model.parameters():
        state = optimizer.state[parameter]
        for tensor in (parameter, state["exp_avg"], state["exp_avg_sq"], state["step"]):
            full = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
            tensors.append(full.detach().clone())
    return tensors


def test_a_checkpoint_brings_back_weights_and_optimiser(tmp_path: Path) -> None:
    seed = fresh_seed()
    with start_ranks(pick_device("cpu")) as ranks:
        model, optimizer = stepped(ranks, seed, steps=3)
        folder = tmp_path / "checkpoints" / "step-000003"
        save_checkpoint(folder, model, optimizer, {"done": 3}, ranks)
        other, other_optimizer = stepped(ranks, seed + 1, steps=1)
        assert read_state(folder) == {"done": 3}
        load_checkpoint(folder, other, other_optimizer)
        for a, b in zip(
            everything(model, optimizer), everything(other, other_optimizer), strict=True
        ):
            assert torch.equal(a, b)
        # And they go on alike: the optimiser counts its steps from there.
        step_on(model, optimizer)
        step_on(other, other_optimizer)
        for a, b in zip(
            everything(model, optimizer), everything(other, other_optimizer), strict=True
        ):
            assert torch.equal(a, b)


@pytest.mark.slow
def test_one_rank_goes_on_where_two_have_stopped(tmp_path: Path) -> None:
    """From the same bits, and then but for the rounding of another order of sums."""
    torchrun(2, ROOT / "tests" / "resume_worker.py", seed := fresh_seed(), tmp_path)
    saved, later = torch.load(tmp_path / "tensors.pt")
    with start_ranks(pick_device("cpu")) as ranks:
        model, optimizer = stepped(ranks, seed + 1, steps=1)
        load_checkpoint(tmp_path / "checkpoint", model, optimizer)
        assert all(map(torch.equal, everything(model, optimizer), saved))
        # The loss is a sum over ranks, each of which runs the same rows here.
        step_on(model, optimizer, times=2)
        for got, expected in zip(everything(model, optimizer), later, strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("damage", ["flipped", "shortened", "missing", "no state"])
def test_a_damaged_checkpoint_is_found_out(tmp_path: Path, damage: str) -> None:
    folder = tmp_path / "step-000001"
    with start_ranks(pick_device("cpu")) as ranks:
        save_checkpoint(folder, *stepped(ranks, 0, steps=1), {"done": 1}, ranks)
    [data] = folder.glob("*.distcp")
    content = bytearray(data.read_bytes())
    if damage == "flipped":
        content[len(content) // 2] ^= 1
        data.write_bytes(content)
    elif damage == "shortened":
        data.write_bytes(content[:-1])
    elif damage == "missing":
        data.unlink()
    else:
        (folder / "run.json").unlink()
    with pytest.raises(DamagedCheckpoint, match=str(folder)):
        read_state(folder)


def test_a_full_disk_leaves_the_checkpoint_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with start_ranks(pick_device("cpu")) as ranks:
        model, optimizer = stepped(ranks, 0, steps=1)
        folder = tmp_path / "step-000001"
        save_checkpoint(folder, model, optimizer, {"done": 1}, ranks)

        def full(*arguments: object, **options: object) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr("grpo.checkpoint.write_synced", full)
        with pytest.raises(OSError, match="No space left on device"):
            save_checkpoint(folder, model, optimizer, {"done": 2}, ranks)
    assert read_state(folder) == {"done": 1}


def test_the_newest_and_the_best_are_kept(tmp_path: Path) -> None:
    for step in (1, 2, 3, 10):
        (tmp_path / f"step-{step:06d}").mkdir()
    (tmp_path / "step-000011.partial").mkdir()
    assert [path.name for path in checkpoints(tmp_path)][0] == "step-000010"
    remove_old(tmp_path, keep=2, best="step-000001")
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "step-000001",
        "step-000003",
        "step-000010",
    ]

"""Run by test_resume.py on two ranks: save a checkpoint, take one more step, and tell of both."""

import sys
from pathlib import Path

import torch

from grpo.checkpoint import save_checkpoint
from grpo.parallel import pick_device, start_ranks
from tests.test_resume import everything, step_on, stepped


def main(seed: int, folder: Path) -> None:
    with start_ranks(pick_device("cpu")) as ranks:
        model, optimizer = stepped(ranks, seed, steps=3)
        save_checkpoint(folder / "checkpoint", model, optimizer, {"done": 3}, ranks)
        saved = everything(model, optimizer)
        step_on(model, optimizer)
        later = everything(model, optimizer)
        if ranks.is_main:
            torch.save((saved, later), folder / "tensors.pt")


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))

"""Run by test_loading.py on several ranks: load a policy and say which rows were read."""

import json
import sys
from pathlib import Path

import torch

from grpo.loading import Weights, empty_model
from grpo.parallel import pick_device, start_ranks
from grpo.sharding import shard
from tests.test_loading import assert_equal_to_pretrained


def main(folder: Path) -> None:
    read: dict[str, tuple[int, int]] = {}
    original = Weights.rows

    def rows(self: Weights, key: str, start: int, stop: int) -> torch.Tensor:
        read[key] = start, stop
        return original(self, key, start, stop)

    Weights.rows = rows
    name = str(folder / "model")
    with start_ranks(pick_device("cpu")) as ranks:
        model = empty_model(name, ranks.device)
        shard(model, ranks, torch.float32, Weights(name, model).fill)
        assert_equal_to_pretrained(model, folder / "model")
        (folder / f"rank{ranks.rank}.json").write_text(json.dumps(read))


if __name__ == "__main__":
    main(Path(sys.argv[1]))

"""Run by tests/test_plan.py in one process or under torchrun: what a sharded policy really holds.

plan_worker.py MODEL_FOLDER RESULTS_FOLDER    writes RESULTS_FOLDER/rank<n>.json
"""

import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from transformers import AutoConfig, AutoModelForCausalLM

from grpo import logprobs
from grpo.config import TrainConfig
from grpo.logprobs import score
from grpo.lora import add_adapters, draw_adapters
from grpo.optimizer import make_optimizer
from grpo.packing import pack
from grpo.parallel import Ranks, pick_device, start_ranks
from grpo.rehearsal import attend_fused
from grpo.sharding import shard
from grpo.trainer import enable_checkpointing

TOKENS, LORA_RANK = 700, 5


def peak_bytes(work: Callable[[], object]) -> int:
    """Most bytes that PyTorch's allocator on the CPU had given out at once during `work`, beyond
    those before it."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        work()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        recorded.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    changes = sorted((e["ts"], e["args"]["Bytes"]) for e in events if e.get("name") == "[memory]")
    now = peak = 0
    for _, change in changes:
        now += change
        peak = max(peak, now)
    return peak


def as_on_cuda(patch: pytest.MonkeyPatch) -> None:
    """Attention that keeps what a fused kernel keeps, and CUDA's chunks of logits."""
    patch.setattr(logprobs, "attention_over", lambda row: attend_fused)
    patch.setattr(logprobs, "CHUNK_ON_CPU", logprobs.CHUNK)


def local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def held(
    ranks: Ranks, model_folder: str, *, checkpointing: bool, lora_rank: int = 0
) -> dict[str, int]:
    """Bytes that one rank holds after real updates of a policy, and at the peak of another."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model_folder))
    if lora_rank:
        add_adapters(model, lora_rank, 32.0, torch.float32)
    policy = shard(model.float(), ranks, torch.float32)
    draw_adapters(policy, 0)
    if checkpointing:
        enable_checkpointing(policy.train())
    optimizer = make_optimizer(policy, TrainConfig())
    row = pack([([1], [[1] * TOKENS])], "cpu")

    def backward() -> None:
        score(policy, row, 1.0)[0].sum().backward()

    backward()
    optimizer.step()
    peaks = []
    for _ in range(2):
        optimizer.zero_grad()
        peaks.append((peak_bytes(backward), peak_bytes(backward)))
    # The least: gloo's threads let go of the buffers of a layer sooner or later.
    first, second = map(min, zip(*peaks, strict=True))
    parameters = list(policy.parameters())
    states = [optimizer.state[parameter] for parameter in parameters if parameter.requires_grad]
    kinds = {
        "weights": [p.detach() for p in parameters],
        "gradients": [p.grad for p in parameters if p.grad is not None],
        "exp_avg": [state["exp_avg"] for state in states],
        "exp_avg_sq": [state["exp_avg_sq"] for state in states],
    }
    return {
        "first_row": first,
        "second_row": second,
        **{kind: sum(local(t).nbytes for t in tensors) for kind, tensors in kinds.items()},
        "stored_weights": sum(
            {s.data_ptr(): s.nbytes() for s in map(storage, kinds["weights"])}.values()
        ),
    }


def storage(tensor: Tensor) -> torch.UntypedStorage:
    return local(tensor).untyped_storage()


def main() -> None:
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch, start_ranks(pick_device("cpu")) as ranks:
        as_on_cuda(patch)
        results = {
            "kept": held(ranks, sys.argv[1], checkpointing=False),
            "recomputed": held(ranks, sys.argv[1], checkpointing=True),
            "adapted": held(ranks, sys.argv[1], checkpointing=True, lora_rank=LORA_RANK),
        }
        path = Path(sys.argv[2]) / f"rank{ranks.rank}.json"
        path.write_text(json.dumps(results))


if __name__ == "__main__":
    main()

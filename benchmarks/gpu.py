"""On one CUDA device: first whether everything is right there, then how fast it is.

    pip install -e ".[bench]"
    python -m benchmarks.gpu                       a model of the shape of Qwen2.5-7B, 64 rows
    python -m benchmarks.gpu --model smollm2-135m  a smaller one

Decoding is bounded by memory: its figure is the bytes that a step must read (weights, and the keys
and values of all rows), over its time, as a part of the bandwidth that a copy reaches on the same
device. The update is bounded by arithmetic: its figure is 8 × weights × tokens (forward, backward,
and forward again for checkpointing; attention not counted), over its time, as a part of the rate
of one large matrix product in bfloat16.
"""

import argparse
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable

import torch
from torch import nn
from transformers import PreTrainedModel

from benchmarks import cuda_checks
from benchmarks.common import (
    Case,
    case_arguments,
    case_of,
    compare,
    machine,
    make_model,
    peak_gigabytes,
    table,
)
from benchmarks.generation import generate, ours
from grpo.generation import STEPS_BETWEEN_LOOKS, Batch, Branch, find_decoder, size_for
from grpo.logprobs import score
from grpo.packing import pack
from grpo.sampling import Sampling, random_key
from grpo.shared_prefix import use_shared_prefix
from grpo.trainer import enable_checkpointing

ROUNDS = 5


def seconds(work: Callable[[], object], rounds: int = ROUNDS) -> float:
    """The median time of `work` on the device, after one call to warm up."""
    times = []
    for _ in range(rounds + 1):
        torch.cuda.synchronize()
        start = time.perf_counter()
        work()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def copy_bandwidth() -> float:
    """Bytes per second, read and written, of a copy of 4 GB."""
    source = torch.empty(4 * 10**9, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() / seconds(lambda: target.copy_(source))


def matrix_rate() -> float:
    """Operations per second of a product of two bfloat16 matrices of 8,192 × 8,192."""
    size = 8192
    a, b = (torch.randn(size, size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return 2 * size**3 / seconds(lambda: a @ b, rounds=20)


def weights_used(model: PreTrainedModel) -> int:
    """How many weights a token is multiplied with: all of the linear layers, the head included."""
    return sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear))


# --- decoding ------------------------------------------------------------------------------------


@torch.inference_mode()
def measure_decoding(case: Case, bandwidth: float) -> dict[str, float]:
    """One step of decoding with all rows in the middle of their completions."""
    model = make_model(case.model, torch.bfloat16).eval()
    use_shared_prefix(model)
    prompts = case.prompt_ids(0)
    waiting = [
        [Branch(i, j, case.new_tokens) for j in range(case.group_size)] for i in range(case.prompts)
    ]
    size = size_for(waiting, prompts, case.rows)
    batch = Batch(find_decoder(model, size, Sampling(), []), waiting, case.rows)
    for branches in waiting:
        keys = random_key(0, 0, branches[0].prompt, torch.arange(case.group_size))
        batch.admit(branches, prompts[branches[0].prompt], keys)
    batch.arrange()
    own_tokens = case.new_tokens // 2
    for _ in range(own_tokens - 3 * STEPS_BETWEEN_LOOKS):
        batch.step()

    def steps_between_looks() -> None:
        for _ in range(STEPS_BETWEEN_LOOKS):
            batch.step()
        batch.collect()
        batch.arrange()

    step = seconds(steps_between_looks) / STEPS_BETWEEN_LOOKS
    graphs = batch.decoder.graphs
    _, heads, _, size_of_head = batch.decoder.cache.own[0].keys.shape
    kept = 2 * heads * size_of_head * len(batch.decoder.cache.own)  # numbers per token
    places = case.prompts * case.prompt_tokens + case.rows * own_tokens
    must_read = 2 * (weights_used(model) + places * kept)
    return {
        "decode_step_ms": 1e3 * step,
        "decode_tokens_per_second": case.rows / step,
        "decode_of_copy_bandwidth": must_read / step / bandwidth,
        "graphs_recorded": len(graphs.replays) if graphs else 0,
    }


# --- the update ----------------------------------------------------------------------------------


def measure_update(case: Case, rate: float) -> dict[str, float]:
    """Forward and backward of packed rows, one group each, with checkpointing."""
    model = make_model(case.model, torch.bfloat16).train()
    enable_checkpointing(model)
    use_shared_prefix(model)
    completion = case.prompt_ids(1)[0] * (1 + case.new_tokens // case.prompt_tokens)
    group = (case.prompt_ids(0)[0], [completion[: case.new_tokens]] * case.group_size)
    row = pack([group] * case.prompts, "cuda")

    def forward_backward() -> None:
        score(model, row, 1.0)[0].sum().backward()
        model.zero_grad()

    elapsed = seconds(forward_backward, rounds=3)
    head = model.get_output_embeddings().weight.numel()
    layers = weights_used(model) - head
    operations = 8 * (layers * row.token_ids.numel() + head * row.targets.numel())
    return {
        "update_seconds": elapsed,
        "update_tokens": row.token_ids.numel(),
        "update_of_matrix_rate": operations / elapsed / rate,
        "update_peak_gigabytes": peak_gigabytes(),
    }


def main() -> None:
    """Check, measure, and print one JSON line at the end."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    case_arguments(parser, Case("qwen2.5-7b", 8, 8, prompt_tokens=512, new_tokens=256))
    settings = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("error: no CUDA device: this benchmark needs one")
    case = case_of(settings)
    cuda_checks.run_all()

    bandwidth, rate = copy_bandwidth(), matrix_rate()
    torch.cuda.empty_cache()
    results = {"copy_bandwidth": bandwidth, "matrix_rate": rate}
    for measure, limit in ((measure_decoding, bandwidth), (measure_update, rate)):
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        results |= measure(case, limit)
        print({name: float(f"{value:.4g}") for name, value in results.items()}, flush=True)
    gc.collect()
    torch.cuda.empty_cache()  # the peers have processes of their own
    peers = compare({"ours": ours, "model.generate": generate}, case, rounds=3, threads=4)
    print(table(case, peers), flush=True)
    print(json.dumps(machine() | results | {name: vars(peer) for name, peer in peers.items()}))


if __name__ == "__main__":
    main()

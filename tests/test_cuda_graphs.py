"""What a CPU can prove of decoding by CUDA graphs: that a recorded step may be replayed.

A CUDA graph is the list of operators that one step ran, with the addresses they ran on. Here such a
list is recorded by PyTorch's tracer and replayed in its place: whatever the host would have done
differently in a later step, or at another address, then shows as another token.
"""

import gc
import warnings
import weakref
from collections.abc import Callable

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx
from transformers import PreTrainedModel

from grpo import decoding, generation
from grpo.cuda_graphs import StepGraphs
from grpo.decoding import Decoder, Size, Window, bucket_of_tokens
from grpo.generation import KEPT, generate_groups
from grpo.rollout import Completion
from grpo.sampling import Sampling
from tests.tiny import fresh_seed, tiny_model, tiny_prompts

LENGTHS = (5, 1, 33)


@pytest.fixture
def recordings(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Graphs on a CPU; returns the list of those recorded."""
    made: list[object] = []

    def record(self: StepGraphs, step: Callable[[], None]) -> Callable[[], None]:
        # Recording runs the operators, which a CUDA graph does not: their effects are undone.
        decoder = step.func.__self__
        before = [tensor.clone() for tensor in state_of(decoder)]
        graph = make_fx(lambda: step())()
        for tensor, value in zip(state_of(decoder), before, strict=True):
            tensor.copy_(value)
        made.append(graph)
        return graph

    for module in (decoding, generation):
        monkeypatch.setattr(module, "uses_graphs", lambda device: True)
    monkeypatch.setattr(StepGraphs, "record", record)
    return made


def state_of(decoder: Decoder) -> list[torch.Tensor]:
    cache = decoder.cache
    kept = [tensor for pair in (*cache.prefix, *cache.own) for tensor in pair]
    return [t for t in vars(decoder).values() if isinstance(t, torch.Tensor)] + kept


def sampled(model: PreTrainedModel, seed: int, step: int = 0) -> list[list[Completion]]:
    return generate_groups(
        model,
        tiny_prompts(LENGTHS, seed + step),
        group_size=2,
        max_new_tokens=12 if step == 0 else [[3, 12]] * len(LENGTHS),
        sampling=Sampling(temperature=0.7),
        stop_ids=[7, 9],
        seed=seed,
        step=step,
        max_rows=4,
    )


def assert_close(a: list[list[Completion]], b: list[list[Completion]]) -> None:
    for one, other in zip(sum(a, []), sum(b, []), strict=True):
        assert one.token_ids == other.token_ids and one.finish_reason == other.finish_reason
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-5)


def test_replayed_steps_give_the_same_completions(request: pytest.FixtureRequest) -> None:
    """Over ended rows, waiting prompts, a second call, and after the weights have changed."""
    seed = fresh_seed()
    # In float64, so that wider windows (other sums of zeros) make no other tokens.
    model = tiny_model("qwen3", seed).double()
    weights = [parameter.detach().clone() for parameter in model.parameters()]

    def run() -> list[list[list[Completion]]]:
        outputs = [sampled(model, seed, 0), sampled(model, seed, 1)]
        with torch.no_grad():
            for i, parameter in enumerate(model.parameters()):
                parameter.copy_(parameter.roll(i))
        outputs.append(sampled(model, seed, 1))
        for parameter, value in zip(model.parameters(), weights, strict=True):
            parameter.data.copy_(value)
        return outputs

    plain = run()
    recordings = request.getfixturevalue("recordings")
    replayed = run()
    assert len(recordings) >= 2 and KEPT[model].graphs.replays
    for a, b in zip(plain, replayed, strict=True):
        assert_close(a, b)
    assert [c.token_ids for c in replayed[1][0]] != [c.token_ids for c in replayed[2][0]]


def test_graphs_survive_from_call_to_call_and_grow_with_the_room(recordings: list[object]) -> None:
    seed = fresh_seed()
    model = tiny_model("llama", seed)
    sampled(model, seed)
    first = KEPT[model]
    sampled(model, seed)
    assert KEPT[model] is first
    count = len(recordings)  # a window that was seen once is recorded when it comes again
    sampled(model, seed)
    assert len(recordings) == count, "a third call of the same shapes records nothing"
    generate_groups(
        model,
        tiny_prompts((200,), seed),
        group_size=2,
        max_new_tokens=4,
        sampling=Sampling(temperature=0.7),
        stop_ids=[7, 9],
    )
    second = KEPT[model]
    assert second is not first and second.size.holds(first.size)
    assert second.size.prefix_tokens == 256


def test_what_cannot_be_recorded_runs_as_it_is_and_says_so_once(
    monkeypatch: pytest.MonkeyPatch, recordings: list[object]
) -> None:
    seed = fresh_seed()
    model = tiny_model("qwen2", seed)
    plain = sampled(model, seed)

    def fail(self: StepGraphs, step: Callable[[], None]) -> Callable[[], None]:
        raise RuntimeError("operation not permitted when stream is capturing\nand more")

    monkeypatch.setattr(StepGraphs, "record", fail)
    monkeypatch.setattr(StepGraphs, "failed", False)
    KEPT.clear()
    with pytest.warns(UserWarning, match="without CUDA graphs: operation not permitted") as seen:
        assert_close(sampled(model, seed), plain)
    assert len(seen) == 1 and "and more" not in str(seen[0].message)
    KEPT.clear()  # not even a new decoder tries again
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sampled(model, seed)


@pytest.mark.usefixtures("recordings")
def test_a_decoder_that_is_replaced_goes_at_once() -> None:
    """Its memory must be free before that of the next is asked for, without waiting for Python to
    look for cycles. And one whose model has moved must not be used again: its graphs would work on
    addresses that hold something else."""
    seed = fresh_seed()
    model = tiny_model("llama", seed)
    sampled(model, seed)
    old = weakref.ref(KEPT[model])
    gc.collect()
    gc.disable()
    try:
        for parameter in model.parameters():
            parameter.data = parameter.data.clone()
        sampled(model, seed)
        assert old() is None
    finally:
        gc.enable()
    last = weakref.ref(KEPT[model])
    del model
    gc.collect()
    assert last() is None and len(KEPT) == 0


def test_every_window_in_buckets_fits_a_size_in_buckets() -> None:
    size = Size(rows=24, slots=5, lanes=7, prefix_tokens=300, own_tokens=129)
    room = size.in_buckets()
    assert room == Size(24, 5, 7, 384, 256) and room.holds(size) and not size.holds(room)
    for window in (Window(24, 5, 7, 300, 129), Window(2, 1, 1, 1, 1, True)):
        wide = window.in_buckets(room)
        assert wide.in_buckets(room) == wide and wide.in_order == window.in_order
        assert wide.rows == window.rows and (wide.slots, wide.lanes) == (room.slots, room.lanes)
        assert window.prefix_tokens <= wide.prefix_tokens <= room.prefix_tokens
        assert window.own_tokens <= wide.own_tokens <= room.own_tokens
    assert [bucket_of_tokens(n) for n in (1, 128, 129)] == [128, 128, 256]

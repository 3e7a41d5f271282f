"""The sharded policy's copies: a plain one that generates, a frozen one as the reference."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from grpo.logprobs import completion_logprobs
from grpo.parallel import Ranks, pick_device, start_ranks
from grpo.sharding import form_of, frozen_copy, let_go, plain_copy, shard
from tests.tiny import fresh_seed, tiny_model, tiny_prompts

# llama and qwen3 tie their embeddings here, qwen2 does not.
FAMILIES = ("llama", "qwen2", "qwen3")


@pytest.fixture
def ranks() -> Iterator[Ranks]:
    with start_ranks(pick_device("cpu")) as ranks:
        yield ranks


def storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


class Allocations(TorchDispatchMode):
    """Bytes and type of every tensor that an operation returns in memory that was not there.

    A storage that is copied appears as bytes (uint8) here.
    """

    def __init__(self) -> None:
        super().__init__()
        self.made: list[tuple[int, torch.dtype]] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        known = {storage(a) for a in args if isinstance(a, Tensor) and not a.is_meta}
        result = function(*args, **(kwargs or {}))
        if type(result) is Tensor and not result.is_meta and storage(result) not in known:
            self.made.append((result.nbytes, result.dtype))
        return result


@pytest.mark.parametrize("family", FAMILIES)
def test_the_form_of_a_model_takes_no_memory(family: str) -> None:
    """A 7B policy in float32 takes 30 GB: a second one, only to be cast, would not fit."""
    model = tiny_model(family, fresh_seed())
    with Allocations() as allocations:
        form = form_of(model, torch.bfloat16)
    assert {(p.device.type, p.dtype) for p in form.parameters()} == {("meta", torch.bfloat16)}
    largest_buffer = max(buffer.nbytes for buffer in model.buffers())
    assert largest_buffer < min(p.nbytes for p in model.parameters())
    assert max(size for size, _ in allocations.made) <= largest_buffer


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["plain", "frozen"])
def test_a_copy_is_the_policy_in_the_compute_type(
    ranks: Ranks, kind: str, family: str, dtype: torch.dtype
) -> None:
    original = tiny_model(family, seed := fresh_seed())
    policy = shard(tiny_model(family, seed), ranks, dtype).train()
    copy = plain_copy(policy) if kind == "plain" else frozen_copy(policy)
    assert not copy.training and policy.training
    weights = dict(original.named_parameters())
    copied = {n: p.full_tensor() if kind == "frozen" else p for n, p in copy.named_parameters()}
    assert copied.keys() == weights.keys()
    for name, weight in weights.items():
        assert copied[name].dtype == dtype and torch.equal(copied[name], weight.to(dtype))
    assert not any(p.requires_grad for p in copy.parameters())
    assert (copy.lm_head.weight is copy.model.embed_tokens.weight) == (family != "qwen2")
    for (name, buffer), (_, own) in zip(
        original.named_buffers(), copy.named_buffers(), strict=True
    ):
        # Rotary frequencies in bfloat16 would turn far positions by wrong angles.
        assert own.dtype == torch.float32 and torch.equal(own, buffer), name
    prompt, *completions = tiny_prompts((5, 4, 1, 6), seed)
    with torch.no_grad():
        expected = completion_logprobs(policy, prompt, completions)
        got = completion_logprobs(copy, prompt, completions)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_the_frozen_copy_stays_and_the_plain_one_follows_at_its_addresses(ranks: Ranks) -> None:
    policy = shard(tiny_model("llama", fresh_seed()), ranks, torch.float32)
    frozen, plain = frozen_copy(policy), plain_copy(policy)
    before = plain.lm_head.weight.clone()
    address = plain.lm_head.weight.data_ptr()
    with torch.no_grad():
        policy.lm_head.weight.mul_(2)
    assert torch.equal(plain.lm_head.weight, before)
    again = plain_copy(policy)
    assert again is plain and plain.lm_head.weight.data_ptr() == address
    assert torch.equal(plain.lm_head.weight, 2 * before)
    assert torch.equal(frozen.lm_head.weight.full_tensor(), before)


def test_a_plain_copy_that_was_let_go_is_made_anew(ranks: Ranks) -> None:
    policy = shard(tiny_model("qwen2", fresh_seed()), ranks, torch.bfloat16)
    first = {name: p.clone() for name, p in plain_copy(policy).named_parameters()}
    let_go(policy)
    second = dict(plain_copy(policy).named_parameters())
    assert all(torch.equal(p, second[name]) for name, p in first.items())

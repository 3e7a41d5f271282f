"""The copy in the compute type that generates, and that is the reference."""

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from grpo.parallel import cast_copy
from tests.tiny import fresh_seed, tiny_model

# llama and qwen3 tie their embeddings here, qwen2 does not.
FAMILIES = ("llama", "qwen2", "qwen3")


def storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


class Allocations(TorchDispatchMode):
    """Bytes and type of every tensor that an operation returns in memory that is not the model's.

    A storage that is copied appears as bytes (uint8) here.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.known = {storage(p) for p in model.parameters()}
        self.made: list[tuple[int, torch.dtype]] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and storage(result) not in self.known:
            self.made.append((result.nbytes, result.dtype))
        return result


@pytest.mark.parametrize("family", FAMILIES)
def test_no_parameter_is_copied_in_float32_first(family: str) -> None:
    """A 7B policy in float32 takes 30 GB: a second one, only to be cast, would not fit."""
    model = tiny_model(family, fresh_seed())
    with Allocations(model) as allocations:
        copy = cast_copy(model, torch.bfloat16)
    casts = [size for size, dtype in allocations.made if dtype == torch.bfloat16]
    assert sorted(casts) == sorted(p.nbytes for p in copy.parameters())
    largest_buffer = max(buffer.nbytes for buffer in model.buffers())
    assert largest_buffer < min(p.nbytes for p in model.parameters())
    others = [size for size, dtype in allocations.made if dtype != torch.bfloat16]
    assert max(others) <= largest_buffer


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_copy_is_the_model_in_another_type(family: str, dtype: torch.dtype) -> None:
    model = tiny_model(family, fresh_seed()).train()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    copy = cast_copy(model, dtype)
    copied = dict(copy.named_parameters())
    assert copied.keys() == before.keys()
    for name, original in model.named_parameters():
        assert torch.equal(copied[name], original.to(dtype)) and copied[name].dtype == dtype
        assert storage(copied[name]) != storage(original)
        assert not copied[name].requires_grad
        assert original.requires_grad and torch.equal(original, before[name])
    assert not copy.training and model.training
    for each in (model, copy):
        assert (each.lm_head.weight is each.model.embed_tokens.weight) == (family != "qwen2")


@pytest.mark.parametrize("family", FAMILIES)
def test_buffers_stay_in_float32_and_are_not_shared(family: str) -> None:
    """Rotary frequencies in bfloat16 would turn far positions by wrong angles."""
    model = tiny_model(family, fresh_seed())
    copied = dict(cast_copy(model, torch.bfloat16).named_buffers())
    buffers = dict(model.named_buffers())
    assert any("inv_freq" in name for name in buffers) and copied.keys() == buffers.keys()
    for name, buffer in buffers.items():
        assert copied[name].dtype == buffer.dtype == torch.float32
        assert torch.equal(copied[name], buffer) and storage(copied[name]) != storage(buffer)

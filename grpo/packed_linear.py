"""Linear layers in bfloat16 on a CPU, with weights laid out once for many small products.

A product of a few rows with a large matrix waits for the matrix. PyTorch hands it to oneDNN, which
lays it out anew for each product; here it is laid out once per rollout. The operators are private
to PyTorch: where they are missing or fail, the layers stay as they are.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

ROWS = 16  # oneDNN picks the layout for a product of about so many rows


@contextmanager
def packed_linear_layers(model: nn.Module) -> Iterator[None]:
    """Within this block, the bfloat16 linear layers of `model` that lie on a CPU run packed.

    Costs the memory of one more copy of their weights. The weights must not change meanwhile.
    """
    layers = [
        module
        for module in model.modules()
        if type(module) is nn.Linear
        and module.weight.dtype == torch.bfloat16
        and module.weight.device.type == "cpu"
    ]
    packed: dict[int, Tensor] = {}  # by the address of the weight: tied layers share one
    try:
        for layer in layers if is_supported() else []:
            weight = layer.weight.detach()
            if weight.data_ptr() not in packed:
                packed[weight.data_ptr()] = _pack(weight)
            # An attribute of the instance: it goes before the method of the class.
            layer.__dict__["forward"] = partial(_linear, packed[weight.data_ptr()], layer.bias)
        yield
    finally:
        for layer in layers:
            layer.__dict__.pop("forward", None)


def is_supported() -> bool:
    """Whether this PyTorch has the operators, and they give what `linear` gives."""
    x, weight = torch.eye(32, dtype=torch.bfloat16), torch.eye(32, dtype=torch.bfloat16)
    try:
        return torch.equal(_linear(_pack(weight), None, x), x)
    except (AttributeError, RuntimeError):
        return False


def _pack(weight: Tensor) -> Tensor:
    return torch.ops.mkldnn._reorder_linear_weight(weight, ROWS)


def _linear(weight: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")

"""Linear layers in bfloat16 on a CPU, with weights laid out once for many small products.

A product of a few rows with a large matrix waits for the matrix. PyTorch hands it to oneDNN, which
lays it out anew for each product; here it is laid out once per rollout. Layers that read the same
input are laid out as one matrix, since each product has a fixed cost. The operators are private to
PyTorch: where they are missing or fail, the layers stay as they are.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn

ROWS = 16  # oneDNN picks the layout for a product of about so many rows
# Names under which models keep layers that read the same input.
SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


@contextmanager
def packed_linear_layers(model: nn.Module) -> Iterator[None]:
    """Within this block, the bfloat16 linear layers of `model` that lie on a CPU run packed.

    Costs the memory of one more copy of their weights. The weights must not change meanwhile.
    """
    groups = joint_groups(model) if is_supported() else []
    try:
        for layers in groups:
            joint = JointLinear(layers)
            for index, layer in enumerate(layers):
                # An attribute of the instance: it goes before the method of the class.
                layer.__dict__["forward"] = partial(joint.output_of, index)
        yield
    finally:
        for layers in groups:
            for layer in layers:
                layer.__dict__.pop("forward", None)


def joint_groups(model: nn.Module) -> list[list[nn.Linear]]:
    """All layers that can be packed, those that read the same input together."""
    groups: list[list[nn.Linear]] = []
    for parent in model.modules():
        children = {
            name: cast(nn.Linear, child)
            for name, child in parent.named_children()
            if can_pack(child)
        }
        for names in SIBLINGS:
            siblings = [children[name] for name in names if name in children]
            kinds = {(layer.in_features, layer.bias is None) for layer in siblings}
            if len(siblings) == len(names) and len(kinds) == 1:
                groups.append([children.pop(name) for name in names])
        groups += [[child] for child in children.values()]
    return groups


def can_pack(module: nn.Module) -> bool:
    """Whether it is a plain linear layer in bfloat16 on a CPU."""
    return (
        type(module) is nn.Linear
        and "forward" not in vars(module)  # nobody else has put something in its place
        and module.weight.dtype == torch.bfloat16
        and module.weight.device.type == "cpu"
    )


class JointLinear:
    """Linear layers [O_i, D] over one input, run as one of [ΣO_i, D] when the first is called."""

    def __init__(self, layers: Sequence[nn.Linear]) -> None:
        self.sizes = [layer.out_features for layer in layers]
        self.weight = pack_weight(torch.cat([layer.weight.detach() for layer in layers]))
        biases = [layer.bias.detach() for layer in layers if layer.bias is not None]
        self.bias = torch.cat(biases) if biases else None
        self.input: Tensor | None = None
        self.outputs: tuple[Tensor, ...] = ()

    def output_of(self, index: int, x: Tensor) -> Tensor:
        """[..., D] → [..., O_index], computed for all layers when `x` is new."""
        if x is not self.input:
            self.input = x
            self.outputs = packed_linear(self.weight, self.bias, x).split_with_sizes(self.sizes, -1)
        output = self.outputs[index]
        if index == len(self.sizes) - 1:  # nothing is kept longer than a layer of the model runs
            self.input, self.outputs = None, ()
        return output


def is_supported() -> bool:
    """Whether this PyTorch has the operators, and they give what `linear` gives."""
    x, weight = torch.eye(32, dtype=torch.bfloat16), torch.eye(32, dtype=torch.bfloat16)
    try:
        return torch.equal(packed_linear(pack_weight(weight), None, x), x)
    except (AttributeError, RuntimeError):
        return False


def pack_weight(weight: Tensor) -> Tensor:
    """A weight [O, D] in the layout that oneDNN likes best, opaque to everything else."""
    return torch.ops.mkldnn._reorder_linear_weight(weight, ROWS)


def packed_linear(weight: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
    """[..., D] → [..., O] with a packed weight."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")

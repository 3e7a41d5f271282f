"""LoRA: train a low-rank change of each weight in place of the weight.

Beside every linear layer of the decoder's layers (not the embeddings, not the head) stands an
adapter of two small matrices:

    y = W x + (alpha / rank) · B (A x)          A [rank, in], B [out, rank]

W is frozen, so it needs no gradient and no optimiser's state, and is kept in the type that computes
(bfloat16) in place of float32. A is drawn at random and B is 0: the policy starts as the base, to
the last bit. With the adapters off it stays the base, so the reference needs no second copy.

What generates, and what is exported, has the merged weights W + (alpha / rank) · B A.

Source: Hu et al. 2021, arXiv 2106.09685, section 4.1.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from grpo.config_loader import ConfigError
from grpo.loading import own_rows


class AdaptedLinear(nn.Linear):
    """A linear layer with its adapter. It takes over the layer's own weight [O, D] and bias.

    lora_a: [R, D] and lora_b: [O, R], in float32, not yet filled; is_on: whether they count.
    """

    def __init__(self, layer: nn.Linear, rank: int, alpha: float) -> None:
        super().__init__(layer.in_features, layer.out_features, device="meta")
        self.weight, self.bias = layer.weight, layer.bias
        self.scale = alpha / rank
        self.is_on = True
        new = partial(torch.empty, dtype=torch.float32, device=layer.weight.device)
        self.lora_a = nn.Parameter(new(rank, self.in_features))
        self.lora_b = nn.Parameter(new(self.out_features, rank))

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] → [..., O]"""
        y = F.linear(x, self.weight, self.bias)
        if not self.is_on:
            return y
        return y + F.linear(self.scale * F.linear(x, self.lora_a), self.lora_b)

    def merged_weight(self) -> Tensor:
        """W + (alpha / rank) · B A: [O, D], in at least float32. All ranks together."""
        weight, a, b = map(whole, (self.weight, self.lora_a, self.lora_b))
        weight = weight.to(torch.promote_types(weight.dtype, a.dtype))
        return torch.addmm(weight, b, a, alpha=self.scale)


def add_adapters(
    model: PreTrainedModel, rank: int, alpha: float, base_dtype: torch.dtype
) -> PreTrainedModel:
    """Give every linear layer of the decoder's layers an adapter, in place, and freeze all else.

    The frozen parameters become `base_dtype`; their names stay. Works on the meta device. The
    adapters have no content before `draw_adapters`. Raises ConfigError for a rank that is larger
    than the smallest side of a matrix: it could hold no more than one of that rank.
    """
    layers = model.get_decoder().layers
    found = [(parent, *child) for parent in layers.modules() for child in parent.named_children()]
    linear = [(parent, name, child) for parent, name, child in found if type(child) is nn.Linear]
    if not linear:
        raise ConfigError(
            f"policy.lora_rank = {rank}: the layers of policy.model have no plain linear layers to "
            "adapt; set it to 0"
        )
    smallest = min(min(child.weight.shape) for _, _, child in linear)
    if rank > smallest:
        raise ConfigError(
            f"policy.lora_rank = {rank}: must be at most {smallest}, the smallest side of a matrix "
            "of policy.model's layers"
        )
    for parameter in model.parameters():
        parameter.requires_grad_(False)
        parameter.data = parameter.data.to(base_dtype)
    for parent, name, child in linear:
        setattr(parent, name, AdaptedLinear(child, rank, alpha))
    return model


@torch.no_grad()
def draw_adapters(model: PreTrainedModel, seed: int) -> None:
    """Fill the adapters, sharded or not: A from a normal distribution of variance 1 / D, so that
    A x is about as large as x, the same for every number of ranks; B with 0."""
    generator = torch.Generator().manual_seed(seed)
    for layer in adapted_layers(model):
        start, stop = own_rows(layer.lora_a)
        drawn = torch.randn(layer.lora_a.shape, generator=generator) / math.sqrt(layer.in_features)
        own(layer.lora_a).copy_(drawn[start:stop])
        own(layer.lora_b).zero_()


def adapted_layers(model: nn.Module) -> list[AdaptedLinear]:
    """The layers that have an adapter, in the order of the model."""
    return [module for module in model.modules() if isinstance(module, AdaptedLinear)]


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """Within this block the model computes what its base does."""
    layers = adapted_layers(model)
    for layer in layers:
        layer.is_on = False
    try:
        yield
    finally:
        for layer in layers:
            layer.is_on = True


def without_adapters(model: PreTrainedModel) -> PreTrainedModel:
    """Put plain linear layers with the base's weights in the place of adapted ones."""
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if isinstance(child, AdaptedLinear):
                plain = nn.Linear(child.in_features, child.out_features, device="meta")
                plain.weight, plain.bias = child.weight, child.bias
                setattr(parent, name, plain.train(child.training))
    return model


def merged_parameters(model: PreTrainedModel) -> Iterator[Tensor]:
    """The parameters that the model has without adapters, in their order, with the adapters merged
    into them. One at a time is gathered. All ranks together.

    A merged weight is to be rounded once, by what takes it: in bfloat16 it differs by that rounding
    from W and the adapter computed apart, which the metric rollout_logprob_difference shows.
    """
    layers = adapted_layers(model)
    layer_of = {id(layer.weight): layer for layer in layers}
    adapters = {id(matrix) for layer in layers for matrix in (layer.lora_a, layer.lora_b)}
    for parameter in model.parameters():
        if id(parameter) in layer_of:
            yield layer_of[id(parameter)].merged_weight()
        elif id(parameter) not in adapters:
            yield whole(parameter)


def whole(tensor: Tensor) -> Tensor:
    """A tensor, gathered where it is sharded."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def own(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor

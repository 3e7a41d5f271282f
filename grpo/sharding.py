"""The trained policy, sharded by FSDP2, and its copies: one that generates, one that is frozen.

Copies are made from the policy's form: the model before it was sharded, without its memory.
"""

import gc
from collections.abc import Callable
from copy import deepcopy
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from grpo.logprobs import score_row
from grpo.lora import merged_parameters, without_adapters
from grpo.parallel import Ranks

META = torch.device("meta")


def shard(
    model: PreTrainedModel,
    ranks: Ranks,
    compute_dtype: torch.dtype,
    fill: Callable[[PreTrainedModel], None] | None = None,
) -> PreTrainedModel:
    """The trained policy: float32 weights sharded over the ranks, computed in `compute_dtype`.

    A model on the meta device is given memory for this rank's share once it is sharded, and
    `fill(model)` writes the weights there. On a mesh of two dimensions the weights are replicated
    over the first and sharded over the second.

    Gradients are summed over ranks (not averaged: the loss has global denominators), in float32.
    The model gets `score_row`, see logprobs.score, and `copies`, from which `plain_copy` and
    `frozen_copy` take theirs. Of a model with adapters (lora.py) only those are trained and in
    float32; a layer's group holds them beside its frozen weights, which FSDP2 allows.
    """
    precision = MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=torch.float32)
    copies = Copies(form_of(model, compute_dtype), model, ranks, precision)
    shard_layers(model, ranks, precision, OffloadPolicy())
    for module in model.modules():
        if isinstance(module, FSDPModule):
            # gloo knows neither average nor scaled sum; a plain sum is what is wanted.
            module.set_force_sum_reduction_for_comms(True)
            module.set_gradient_divide_factor(1.0)
    if fill is not None:
        give_memory(model, ranks.device)
        fill(model)
    cast(Any, model).copies = copies
    return model


def shard_layers(
    model: PreTrainedModel, ranks: Ranks, precision: MixedPrecisionPolicy, offload: OffloadPolicy
) -> None:
    """Shard a model in place, a group of parameters for each layer and one for the rest."""
    for layer in model.get_decoder().layers:
        fully_shard(layer, mesh=ranks.mesh, mp_policy=precision, offload_policy=offload)
    fully_shard(model, mesh=ranks.mesh, mp_policy=precision, offload_policy=offload)
    cast(Any, model).score_row = partial(score_row, model)
    register_fsdp_forward_method(model, "score_row")


def give_memory(model: PreTrainedModel, device: torch.device) -> None:
    """Memory, not yet filled, for what is on the meta device. Tied parameters stay tied."""
    model._apply(lambda t: torch.empty_like(t, device=device) if t.is_meta else t)
    model.tie_weights()


def form_of(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """A frozen model of the same form, adapters aside: parameters of `dtype` on the meta device,
    buffers copied (rotary frequencies stay in float32)."""
    form = like(model, lambda p: torch.empty(p.shape, dtype=dtype, device=META))
    return without_adapters(form)


def like(model: PreTrainedModel, new: Callable[[Tensor], Tensor]) -> PreTrainedModel:
    """A frozen copy with `new(parameter)` for each parameter. One that stands in two places (tied
    embeddings) does so in the copy."""
    copies = {id(p): nn.Parameter(new(p), requires_grad=False) for p in model.parameters()}
    return deepcopy(model, cast(Any, copies)).eval()


class Copies:
    """The copies of a sharded policy.

    form: what all of them look like, in the compute type, on the meta device.
    """

    def __init__(
        self,
        form: PreTrainedModel,
        policy: PreTrainedModel,
        ranks: Ranks,
        precision: MixedPrecisionPolicy,
    ) -> None:
        self.form = form
        self.policy = policy
        self.ranks = ranks
        self.precision = precision
        self.generator: PreTrainedModel | None = None

    @torch.no_grad()
    def refill(self) -> PreTrainedModel:
        """The plain copy that generates, with the weights as they are now. All ranks together.

        Decoding through sharded layers would gather every layer for every token. A parameter is
        gathered at a time. The copy keeps its addresses from one refill to the next, unless it was
        let go in between. Adapters are merged into its weights, which are rounded once.
        """
        if self.generator is None:
            self.generator = like(self.form, partial(torch.empty_like, device=self.ranks.device))
        pairs = zip(self.generator.parameters(), merged_parameters(self.policy), strict=True)
        for target, source in pairs:
            target.copy_(source)
        return self.generator

    @torch.no_grad()
    def frozen(self, on_cpu: bool) -> PreTrainedModel:
        """A copy that stays as the policy is now, sharded alike."""
        model = like(self.form, torch.clone)
        device = torch.device("cpu") if on_cpu else self.ranks.device
        offload = CPUOffloadPolicy() if device != self.ranks.device else OffloadPolicy()
        shard_layers(model, self.ranks, self.precision, offload)
        # No backward pass comes, before which FSDP2 would keep the gathered embeddings and head.
        cast(FSDPModule, model).set_reshard_after_forward(True)
        give_memory(model, device)
        for target, source in zip(model.parameters(), self.policy.parameters(), strict=True):
            cast(DTensor, target).to_local().copy_(cast(DTensor, source).to_local())
        return model


def plain_copy(model: PreTrainedModel) -> PreTrainedModel:
    """The model itself, or of a sharded one its plain copy, refilled. All ranks together."""
    copies = model.__dict__.get("copies")
    return model if copies is None else copies.refill()


def let_go(model: PreTrainedModel) -> None:
    """Free the memory of a sharded policy's plain copy; `plain_copy` makes it anew."""
    cast(Any, model).copies.generator = None
    gc.collect()  # the copy, its decoder and the decoder's graphs refer to one another


def frozen_copy(model: PreTrainedModel, *, on_cpu: bool = False) -> PreTrainedModel:
    """A sharded policy as it is now, for good, in the compute type: the reference.

    on_cpu: its share lies in the memory of the CPU, and each layer comes to the device when it is
    run.
    """
    return cast(Any, model).copies.frozen(on_cpu)


def gradient_norm(model: PreTrainedModel, max_norm: float) -> float:
    """Scale the gradients of all ranks down to `max_norm` together; returns the norm before."""
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)
    return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)

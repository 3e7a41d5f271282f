"""How much memory the work of a run needs, found by doing that work on the meta device.

Tensors there have shapes and types, but no memory: a step of a 70-billion model runs on a laptop,
and each tensor that it makes tells its size. So nothing here knows what layers are made of: the
model's own code and this project's run, and bytes are counted while their tensors live.
"""

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

from grpo.decoding import Decoder, Size, Window
from grpo.logprobs import TokenLogprobs
from grpo.sampling import Sampling
from grpo.shared_prefix import no_mask, use_shared_prefix

META = torch.device("meta")


class LiveBytes(TorchDispatchMode):
    """Within this block, counts the bytes of all tensors that operators have made and that live.

    now: at this moment; peak: the most since it was last set. What `existing` holds is not counted.
    """

    def __init__(self, existing: PreTrainedModel) -> None:
        super().__init__()
        self.now = self.peak = 0
        held = [*existing.parameters(), *existing.buffers()]
        # By address of the storage, so that views count once.
        self.known = {tensor.untyped_storage()._cdata for tensor in held}

    def __torch_dispatch__(
        self, operator: Callable, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = operator(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self.count(tensor.untyped_storage())
        return result

    def count(self, storage: torch.UntypedStorage) -> None:
        """Add a storage that is new, until it is freed."""
        key, size = storage._cdata, storage.nbytes()
        if key not in self.known:
            self.known.add(key)
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self.freed, key, size)

    def freed(self, key: int, size: int) -> None:
        """Forget a storage: its address may be given to another."""
        self.known.discard(key)
        self.now -= size

    def restart(self) -> int:
        """The peak so far; the next one is counted from here."""
        before, self.peak = self.peak, self.now
        return before


# --- packed rows ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class RowBytes:
    """What one packed row takes beside the weights, without gradients of weights.

    forward, scored: most that lives without a gradient, in the layers and at the log-probs; hidden:
    of `scored`, what the layers have left; kept: after the layers, for the backward pass; logprobs:
    most at the log-probs, forward and backward; backward: most in the backward pass of the layers.
    """

    forward: int
    hidden: int
    scored: int
    kept: int
    logprobs: int
    backward: int


class FusedAttention(torch.autograd.Function):
    """The memory of a fused attention kernel: what it keeps for its backward pass is query, key,
    value, output, and one number per query and head."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        output = torch.empty_like(query)
        log_totals = query.new_empty(query.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, output, log_totals)
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, ...]:
        *inputs, _, log_totals = ctx.saved_tensors
        correction = torch.empty_like(log_totals)  # lives while the kernel runs
        gradients = tuple(map(torch.empty_like, inputs))
        del correction
        return gradients


def attend_fused(
    layer: int, query: Tensor, key: Tensor, value: Tensor, mask: Any, scaling: float
) -> Tensor:
    """Stands in for `tree_attention.attend_by_blocks`."""
    return FusedAttention.apply(query.contiguous(), key.contiguous(), value.contiguous())


def rehearse_row(
    model: PreTrainedModel, tokens: int, temperature: float, device: torch.device = META
) -> RowBytes:
    """Score a packed row of so many tokens, all but one of a completion, and go back through it.

    model: its parameters on `device`, in the compute type; what is trained requires a gradient.
    """
    use_shared_prefix(model)
    ids = torch.zeros(1, tokens, dtype=torch.long, device=device)
    hooks = [
        parameter.register_post_accumulate_grad_hook(forget_gradient)
        for parameter in model.parameters()
        if parameter.requires_grad
    ]

    after_layers: list[tuple[int, int]] = []  # what lives then, and the peak before
    after_logprobs: list[int] = []  # in the backward pass

    def score_row() -> Tensor:
        """As `logprobs.score_row`."""
        hidden = model.get_decoder()(
            input_ids=ids,
            position_ids=ids,
            attention_mask=no_mask(device),
            use_cache=False,
            attend=attend_fused,
        ).last_hidden_state[0]
        after_layers.append((live.now, live.restart()))
        weight = model.get_output_embeddings().weight
        predicting = F.embedding(ids[0], hidden)
        if predicting.requires_grad:
            predicting.register_hook(lambda _: after_logprobs.append(live.restart()))
        return TokenLogprobs.apply(predicting, weight, ids[0], temperature)[0]

    with LiveBytes(model) as live:
        with torch.no_grad():
            score_row()
        scored = live.restart()
        score_row().sum().backward()
        backward = live.restart()
    for hook in hooks:
        hook.remove()
    (left, forward), (kept, _) = after_layers
    return RowBytes(forward, left, scored, kept, after_logprobs[0], backward)


def forget_gradient(parameter: Tensor) -> None:
    """Weights' gradients are sharded and counted elsewhere."""
    parameter.grad = None


# --- decoding ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DecodingBytes:
    """What generation takes beside its weights: the decoder's state (cache: keys and values, in
    it), and the most that lives beside it while a prompt is run, a step taken, rows moved."""

    cache: int
    state: int
    work: int


@torch.inference_mode()
def rehearse_decoding(
    model: PreTrainedModel, size: Size, temperature: float, device: torch.device = META
) -> DecodingBytes:
    """Run a prompt and take a step with every row, at the largest lengths."""
    use_shared_prefix(model)
    with LiveBytes(model) as live:
        decoder = Decoder(model, size, Sampling(temperature), [0])
        rows = list(range(size.lanes))
        keys = torch.zeros(len(rows), dtype=torch.long)
        decoder.prefill(0, [0] * size.prefix_tokens, rows, keys)
        state = live.now
        decoder.step(Window(size.rows, size.slots, size.lanes, size.prefix_tokens, size.own_tokens))
        decoder.compact(list(range(size.rows)))
        stores = [*decoder.cache.prefix, *decoder.cache.own]
        cache = sum(tensor.nbytes for pair in stores for tensor in pair)
    return DecodingBytes(cache, state, live.peak - state)

"""Logits → tokens: temperature, top-k, top-p, min-p, and counter-based random numbers.

A generator that is drawn from gives other numbers when the batch changes. Here the uniform number
of a token is a hash of where the token stands: (seed, step, prompt, sample, position). So a token's
random number depends neither on the rows beside it, nor on the ranks, nor on the order of work.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

# Constants of SplitMix64 (Steele, Lea & Flood, "Fast splittable pseudorandom number generators",
# OOPSLA 2014), written as the signed integers that torch's int64 holds.
_GOLDEN_GAMMA = 0x9E3779B97F4A7C15 - 2**64
_MIX_1 = 0xBF58476D1CE4E5B9 - 2**64
_MIX_2 = 0x94D049BB133111EB - 2**64

BLOCK = 128  # tokens; divides the padded vocabularies of most models


@dataclass(frozen=True)
class Sampling:
    """How a token is chosen from its logits. temperature 0 is greedy.

    top_k 0, top_p 1 and min_p 0 switch their filters off. Filters are applied in the order
    temperature, top-k, top-p, min-p, as in `transformers`.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0

    def __post_init__(self) -> None:
        if not self.temperature >= 0:
            raise ValueError(f"temperature = {self.temperature}: must be at least 0 (0 is greedy)")
        if self.top_k < 0:
            raise ValueError(f"top_k = {self.top_k}: must be at least 0 (0 switches it off)")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p = {self.top_p}: must be above 0 and at most 1")
        if not 0 <= self.min_p < 1:
            raise ValueError(f"min_p = {self.min_p}: must be at least 0 and below 1")

    @property
    def filtered(self) -> bool:
        """Whether sampling draws from something else than the softmax itself."""
        return self.top_k > 0 or self.top_p < 1 or self.min_p > 0


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical shift: torch's `>>` on int64 would drag the sign along."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix(x: Tensor) -> Tensor:
    """SplitMix64's finaliser: int64 → int64, each input bit spread over all output bits."""
    x = (x ^ _shift_right(x, 30)) * _MIX_1
    x = (x ^ _shift_right(x, 27)) * _MIX_2
    return x ^ _shift_right(x, 31)


def random_key(*parts: int | Tensor) -> Tensor:
    """Fold whole numbers, such as (seed, step, prompt, sample), into one key.

    The order matters: (1, 2) and (2, 1) give different keys. Parts may be int64 tensors whose
    shapes broadcast; so does the key, int64 on the host.
    """
    key = torch.zeros((), dtype=torch.int64)
    for part in parts:
        key = _mix(key + _GOLDEN_GAMMA + _mix(torch.as_tensor(part, dtype=torch.int64)))
    return key


def uniform(keys: Tensor, positions: Tensor) -> Tensor:
    """Uniform numbers in [0, 1), one for each (key, position). int64 [R] both → float64 [R]."""
    bits = _mix(keys + (positions + 1) * _GOLDEN_GAMMA)
    return _shift_right(bits, 11).to(torch.float64) * 2.0**-53


def scale_logits(logits: Tensor, temperature: float) -> Tensor:
    """logits / temperature, in at least float32; as they are when greedy. [..., V] → [..., V].

    Every log-prob of this project (recorded, old, reference, new) goes through this division.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return logits if temperature in (0, 1) else logits / temperature


def keep_top_k(logits: Tensor, k: int) -> Tensor:
    """All but the k highest logits → -inf. Ties with the k-th stay. [R, V] → [R, V]."""
    threshold = logits.topk(min(k, logits.shape[-1])).values[:, -1:]
    return logits.masked_fill(logits < threshold, float("-inf"))


def keep_top_p(logits: Tensor, p: float) -> Tensor:
    """Keep the fewest tokens whose probabilities reach p together. [R, V] → [R, V].

    A token stays when the probability of those before it, highest first, is still below p.
    """
    sorted_logits, order = logits.sort(descending=True)
    probabilities = sorted_logits.softmax(-1)
    drop = probabilities.cumsum(-1) - probabilities >= p
    return logits.masked_fill(torch.empty_like(drop).scatter_(-1, order, drop), float("-inf"))


def keep_min_p(logits: Tensor, p: float) -> Tensor:
    """Keep the tokens at least p times as probable as the likeliest one. [R, V] → [R, V]."""
    probabilities = logits.softmax(-1)
    threshold = p * probabilities.amax(-1, keepdim=True)
    return logits.masked_fill(probabilities < threshold, float("-inf"))


def choose(weights: Tensor, uniforms: Tensor) -> Tensor:
    """Lay the weights end to end; the token on whose stretch u · total falls.

    weights [R, V], at least 0 and not all 0, need not add up to 1; uniforms float64 [R] in [0, 1).
    Returns token ids [R], never one of weight 0. Found in two strides, first the block of tokens,
    then the token in it, so that running totals can be float64 (in float32 the tail of a large
    vocabulary loses its share) without a float64 copy of all weights.
    """
    blocks = F.pad(weights, (0, -weights.shape[-1] % BLOCK)).unflatten(-1, (-1, BLOCK))
    totals = blocks.sum(-1)
    block, rest = _find(totals, uniforms[:, None] * totals.sum(-1, True, dtype=torch.float64))
    chosen = blocks.gather(1, block[:, None].expand(-1, 1, BLOCK))[:, 0]  # [R, BLOCK]
    # The block's own total in float64, not the rounded one by which it was found.
    rest = rest * chosen.sum(-1, True, dtype=torch.float64) / totals.gather(1, block)
    place, _ = _find(chosen, rest)
    # Where weights are no numbers, any token: its log-prob, which is none either, tells.
    return (block * BLOCK + place)[:, 0].clamp_(max=weights.shape[-1] - 1)


def _find(weights: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Where the running total of weights [R, N] first exceeds target [R, 1], and how much of the
    target is left there: both [R, 1]."""
    totals = weights.cumsum(-1, dtype=torch.float64)
    # Rounding may have carried the target past either end, where no weight is.
    below_total = totals[:, -1:].nextafter(totals.new_zeros(()))
    target = target.clamp(min=0).minimum(below_total)
    index = torch.searchsorted(totals, target, right=True).clamp_(max=weights.shape[-1] - 1)
    return index, target - (totals.gather(1, index) - weights.gather(1, index))


def sample(logits: Tensor, sampling: Sampling, uniforms: Tensor) -> tuple[Tensor, Tensor]:
    """Choose one token per row.

    logits [R, V] in any float type; uniforms float64 [R], unused when greedy.
    Returns (token ids [R], log-probs [R]), the log-probs under the unfiltered softmax of
    logits / temperature (temperature 1 when greedy).
    """
    scaled = scale_logits(logits, sampling.temperature)
    highest = scaled.amax(-1, keepdim=True)
    weights = (scaled - highest).exp_()  # softmax without its denominator
    log_total = highest + weights.sum(-1, keepdim=True).log()
    if sampling.temperature == 0:
        tokens = scaled.argmax(-1)
    else:
        if sampling.filtered:
            weights = (filter_logits(scaled, sampling) - highest).exp_()
        tokens = choose(weights, uniforms)
    return tokens, (scaled.gather(-1, tokens[:, None]) - log_total)[:, 0]


def filter_logits(logits: Tensor, sampling: Sampling) -> Tensor:
    """The logits of tokens that may not be drawn → -inf. [R, V] → [R, V]."""
    if sampling.top_k:
        logits = keep_top_k(logits, sampling.top_k)
    if sampling.top_p < 1:
        logits = keep_top_p(logits, sampling.top_p)
    if sampling.min_p:
        logits = keep_min_p(logits, sampling.min_p)
    return logits

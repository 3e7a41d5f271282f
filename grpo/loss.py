"""Log-probs and advantages → the loss: ratio, clip, KL, average.

`policy_loss` says what is computed; the functions below it say how, one step each. In all of them

    r_it   ratio π_θ / π_old of token t of sequence i     |o_i|  tokens of sequence i, by the mask
    s_i    ratio of sequence i                            N      tokens of the whole batch, Σ |o_i|
    A_i    advantage of sequence i                        G      its sequences that have a token
    ε, c   bounds of the clip                             sg     stop gradient

where the whole batch means every micro-batch on every rank.
"""

import torch
from torch import Tensor

OBJECTIVES = ("grpo", "dapo", "dr_grpo", "gspo", "cispo")
KL_ESTIMATORS = ("k2", "k3", "k3_is")

# (clip_low, clip_high) where none is given. CISPO has no lower bound, and its upper is absolute.
_OWN_CLIPS = {
    "grpo": (0.2, 0.2),
    "dapo": (0.2, 0.2),
    "dr_grpo": (0.2, 0.2),
    "gspo": (3e-4, 4e-4),
    "cispo": (0.0, 5.0),
}

# exp(20) = 5e8 is far outside every clip, yet small enough to multiply and add up in float32.
MAX_LOG_RATIO = 20.0


def policy_loss(
    logp: Tensor,
    old_logp: Tensor,
    ref_logp: Tensor | None,
    advantages: Tensor,
    mask: Tensor,
    *,
    objective: str = "dapo",
    clip_low: float | None = None,
    clip_high: float | None = None,
    dual_clip: float | None = None,
    kl_coef: float = 0.01,
    kl_estimator: str = "k3",
    importance_weight: Tensor | None = None,
    max_completion_tokens: int | None = None,
    token_count: int | Tensor | None = None,
    sequence_count: int | Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and statistics of a micro-batch: S completions of at most T tokens.

    loss = average(−gain · importance weight) + kl_coef · average(KL), by one and the same average:

        objective  gain of a token                             average                 arXiv
        grpo       min(r A, clip(r, 1 − ε_low, 1 + ε_high) A)  Σ_i (Σ_t / |o_i|) / G   2402.03300
        dapo       as grpo                                     Σ_i Σ_t / N             2503.14476
        dr_grpo    as grpo; the caller gives A = R − mean      Σ_i Σ_t / (G · L_max)   2503.20783
        gspo       as grpo, with s_i in place of every r_it    as grpo                 2507.18071
        cispo      sg(min(r, ε_max)) A log π_θ                 as dapo                 2506.13585

    So gspo's KL is the mean over each sequence's tokens, then the mean over sequences.

    logp, old_logp, ref_logp: [S, T] log-probs of the tokens under the policy, under the one that
        sampled them, and under the reference. Only logp gets a gradient. ref_logp may be None
        if kl_coef is 0.
    advantages, mask: [S], and [S, T] bool, True for tokens that count; elsewhere the [S, T]
        tensors may hold anything, NaN included. A sequence with advantage 0 counts in N and G,
        and its KL pulls. A sequence without a token adds nothing and is not one of G.
    clip_low, clip_high: ε_low and ε_high; None: .2 and .2, for gspo 3e-4 and 4e-4. For cispo
        clip_high is ε_max (None: 5), and clip_low must be None.
    dual_clip: c of `clipped_gain`; None: off. Not for cispo.
    kl_estimator: of the KL in the loss, see `kl_estimate`.
    importance_weight: [S, T] trainer's over rollout's probability, truncated by the caller.
    max_completion_tokens: L_max, the limit set for completions; only dr_grpo needs it.
    token_count, sequence_count: N and G, see `batch_counts`. None: this call holds the whole
        batch. With both given, losses, gradients and statistics of all micro-batches and ranks
        *add up* to the batch's. (Data parallelism that averages gradients over W ranks divides
        once too often: multiply the loss by W.)

    Computed in float32, or in float64 where logp is. The loss has a gradient graph even where no
    token counts (it is 0 then, as are the gradients), so that no rank is left out of backward.
    The statistics are detached scalars that add up as the loss does; none is a maximum:
        loss = policy_loss + kl_loss;
        kl_loss, kl = Σ k3 / N and kl_k1 = Σ k1 / N: only with ref_logp;
        ratio_mean = Σ r / N, for gspo Σ s / G;
        clip_low_fraction, clip_high_fraction and, with dual_clip given, dual_clip_fraction: the
            part of N tokens (gspo: of G sequences) whose gain that bound has cut.

    Raises ValueError, in one line, for shapes that do not fit and settings without meaning.
    """
    _check_objective(objective, clip_low, clip_high, dual_clip, max_completion_tokens)
    _check_kl(kl_coef, kl_estimator, ref_logp)
    _check_shapes(logp, advantages, old_logp, ref_logp, mask, importance_weight)
    own_low, own_high = _OWN_CLIPS[objective]
    clip_low = own_low if clip_low is None else clip_low
    clip_high = own_high if clip_high is None else clip_high

    mask = mask.bool()
    dtype = torch.promote_types(logp.dtype, torch.float32)
    logp, old_logp = _blank(logp, mask, dtype), _blank(old_logp, mask, dtype)
    advantages = advantages.detach().to(dtype)[:, None]  # [S, 1]
    tokens, sequences = batch_counts(mask)
    token_count = tokens if token_count is None else token_count
    sequence_count = sequences if sequence_count is None else sequence_count
    denominators = (token_count, sequence_count, max_completion_tokens or 0)

    ratio = log_ratio(logp, old_logp).exp()
    if objective == "gspo":
        ratio = sequence_ratio(logp, old_logp, mask)
    if objective == "cispo":
        gain = cispo_gain(logp, ratio, advantages, clip_high)
    else:
        gain = clipped_gain(ratio, advantages, clip_low, clip_high, dual_clip)
    if importance_weight is not None:
        gain = gain * _blank(importance_weight, mask, dtype).detach()
    loss = average(-gain, mask, objective, *denominators)
    stats = {"policy_loss": loss}

    if ref_logp is not None:
        ref_logp = _blank(ref_logp, mask, dtype)
        kl = kl_estimate(logp, ref_logp, kl_estimator, old_logp)
        kl_loss = kl_coef * average(kl, mask, objective, *denominators)
        loss = loss + kl_loss
        k1, k3 = (kl_estimate(logp.detach(), ref_logp, name) for name in ("k1", "k3"))
        stats["kl_k1"] = token_mean(k1, mask, token_count)
        stats["kl"] = token_mean(k3, mask, token_count)
        stats["kl_loss"] = kl_loss

    cut = clip_indicators(ratio, advantages, objective, clip_low, clip_high, dual_clip)
    for name, values in {"ratio_mean": ratio, **cut}.items():
        if objective == "gspo":
            stats[name] = sequence_mean(values, mask, sequence_count)
        else:
            stats[name] = token_mean(values, mask, token_count)
    stats["loss"] = loss
    # Copies: two names for one tensor would be summed over ranks twice by an in-place all-reduce.
    return loss, {name: value.detach().clone() for name, value in stats.items()}


# --- ratio ---------------------------------------------------------------------------------------


def log_ratio(logp: Tensor, old_logp: Tensor) -> Tensor:
    """log r = log π_θ − log π_old, within ±20, so that its exp is finite. Shapes [S, T].

    old_logp is a constant. On the first update of a rollout it equals logp, and a gradient through
    both would cancel to nothing.
    """
    return (logp - old_logp.detach()).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)


def sequence_ratio(logp: Tensor, old_logp: Tensor, mask: Tensor) -> Tensor:
    """s_i = exp((1 / |o_i|) Σ_t log r_it), the same for each token: [S, T] → [S, T].

    GSPO (arXiv 2507.18071, eq. 7): the ratio of whole sequences, to the power 1 / |o_i|.
    """
    log_ratios = log_ratio(logp, old_logp).masked_fill(~mask, 0)
    mean = log_ratios.sum(dim=1, keepdim=True) / mask.sum(dim=1, keepdim=True).clamp(min=1)
    return mean.exp().expand_as(logp)


# --- clip ----------------------------------------------------------------------------------------


def clipped_gain(
    ratio: Tensor,
    advantages: Tensor,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None = None,
) -> Tensor:
    """min(r A, clip(r, 1 − ε_low, 1 + ε_high) A), to be maximised. [S, T], [S, 1] → [S, T].

    The bound takes the gradient away where the ratio has already gone far enough in the direction
    of the advantage; where it has gone the wrong way, the gradient stays (PPO, arXiv 1707.06347).
    Where A < 0, r A has no lower bound; dual_clip c gives it one: max(…, c A) (arXiv 1912.09729).
    """
    gain = torch.minimum(ratio * advantages, ratio.clamp(1 - clip_low, 1 + clip_high) * advantages)
    if dual_clip is None:
        return gain
    return torch.where(advantages < 0, torch.maximum(gain, dual_clip * advantages), gain)


def cispo_gain(logp: Tensor, ratio: Tensor, advantages: Tensor, clip_high: float) -> Tensor:
    """sg(min(r, ε_max)) · A · log π_θ, to be maximised. [S, T], [S, T], [S, 1] → [S, T].

    The ratio only weighs; the gradient goes through log π_θ. So each token keeps a gradient,
    where a clip would have silenced it (CISPO, arXiv 2506.13585, eq. 4 and 5).
    """
    return ratio.detach().clamp(max=clip_high) * advantages * logp


def clip_indicators(
    ratio: Tensor,
    advantages: Tensor,
    objective: str,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None = None,
) -> dict[str, Tensor]:
    """Whose gain a bound has cut: 1 or 0, [S, T] each. A ratio beyond a bound is not enough.

    It must be beyond the lower bound with A < 0, or beyond the upper with A > 0 (cispo: A ≠ 0).
    """
    if objective == "cispo":
        low = torch.zeros_like(ratio, dtype=torch.bool)
        high = (ratio > clip_high) & (advantages != 0)
    else:
        low = (ratio < 1 - clip_low) & (advantages < 0)
        high = (ratio > 1 + clip_high) & (advantages > 0)
    cut = {"clip_low_fraction": low, "clip_high_fraction": high}
    if dual_clip is not None:
        cut["dual_clip_fraction"] = (ratio > dual_clip) & (advantages < 0)
    return {name: indicator.to(ratio.dtype) for name, indicator in cut.items()}


# --- KL ------------------------------------------------------------------------------------------


def kl_estimate(
    logp: Tensor, ref_logp: Tensor, estimator: str, old_logp: Tensor | None = None
) -> Tensor:
    """Estimate of KL(π_θ ‖ π_ref) at each sampled token, d = log π_ref − log π_θ. Shapes [S, T].

        k1     −d             unbiased, of either sign; its gradient has expectation 0
        k2     d² / 2         biased; its gradient is that of KL(π_θ ‖ π_ref)
        k3     e^d − d − 1    unbiased, never negative; its gradient is that of KL(π_ref ‖ π_θ)
        k3_is  k3 · r         unbiased, and so is its gradient

    Values: Schulman, "Approximating KL Divergence" (2020); k3 is eq. 4 of arXiv 2402.03300.
    Gradients: arXiv 2506.09477. All of this is for tokens that π_θ sampled; k3_is stays true for
    tokens of π_old, if old_logp is given (None: π_θ sampled, r is 1 but has a gradient).
    """
    d = ref_logp.detach() - logp
    if estimator == "k1":
        return -d
    if estimator == "k2":
        return d.square() / 2
    # No bound below: there e^d cannot overflow, and −d is what still pulls the policy back.
    d = d.clamp(max=MAX_LOG_RATIO)
    # expm1 keeps the d² / 2 that is left of a small d; float32's e^d − 1 would round it away.
    k3 = torch.expm1(d) - d
    if estimator == "k3":
        return k3
    if estimator == "k3_is":
        return k3 * log_ratio(logp, logp if old_logp is None else old_logp).exp()
    raise ValueError(f"estimator = {estimator!r}: must be one of k1, {', '.join(KL_ESTIMATORS)}")


# --- average -------------------------------------------------------------------------------------


def batch_counts(mask: Tensor) -> tuple[Tensor, Tensor]:
    """(token count, sequences that have a token) of a mask [S, T]: what sums to N and G."""
    return mask.sum(), mask.any(dim=1).sum()


def token_mean(values: Tensor, mask: Tensor, count: int | Tensor) -> Tensor:
    """Σ_i Σ_t values / count, over unmasked tokens; with count = N each token weighs the same."""
    return values.masked_fill(~mask, 0).sum() / _denominator(count, values)


def sequence_mean(values: Tensor, mask: Tensor, count: int | Tensor) -> Tensor:
    """Σ_i ((1 / |o_i|) Σ_t values) / count; with count = G each sequence weighs the same."""
    lengths = mask.sum(dim=1).clamp(min=1)
    return (values.masked_fill(~mask, 0).sum(dim=1) / lengths).sum() / _denominator(count, values)


def average(
    values: Tensor,
    mask: Tensor,
    objective: str,
    token_count: int | Tensor,
    sequence_count: int | Tensor,
    max_completion_tokens: int,
) -> Tensor:
    """The objective's own average of [S, T] values: see the table of `policy_loss`."""
    if objective in ("grpo", "gspo"):
        return sequence_mean(values, mask, sequence_count)
    if objective == "dr_grpo":
        return token_mean(values, mask, sequence_count * max_completion_tokens)
    return token_mean(values, mask, token_count)


def _denominator(count: int | Tensor, like: Tensor) -> Tensor:
    # At least 1: where nothing counts, 0 / 0 would make the sum over all ranks NaN.
    return torch.as_tensor(count, dtype=like.dtype, device=like.device).clamp(min=1)


# --- arguments -----------------------------------------------------------------------------------


def _blank(values: Tensor, mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Masked positions → 0 before any arithmetic: NaN times a mask would stay NaN."""
    return values.to(dtype).masked_fill(~mask, 0)


def _check_shapes(logp: Tensor, advantages: Tensor, *others: Tensor | None) -> None:
    # Some wrong shapes would broadcast, and train on something else without an error.
    if logp.dim() != 2 or not logp.is_floating_point():
        raise ValueError(f"logp is {logp.dtype} {list(logp.shape)}: must be floating point [S, T]")
    if advantages.shape != logp.shape[:1]:
        raise ValueError(f"advantages {list(advantages.shape)}: must be [{logp.shape[0]}], as logp")
    names = ("old_logp", "ref_logp", "mask", "importance_weight")
    for name, tensor in zip(names, others, strict=True):
        if tensor is not None and tensor.shape != logp.shape:
            raise ValueError(f"{name} {list(tensor.shape)}: must be {list(logp.shape)}, as logp")


def _check_objective(
    objective: str,
    clip_low: float | None,
    clip_high: float | None,
    dual_clip: float | None,
    max_completion_tokens: int | None,
) -> None:
    if objective not in OBJECTIVES:
        raise ValueError(f"objective = {objective!r}: must be one of {', '.join(OBJECTIVES)}")
    if objective == "cispo" and not (clip_low is None and dual_clip is None):
        raise ValueError("objective = 'cispo' has one bound, clip_high: leave the other clips None")
    if clip_low is not None and not 0 <= clip_low <= 1:
        raise ValueError(f"clip_low = {clip_low}: must be 0 to 1")
    if clip_high is not None and not clip_high >= 0:
        raise ValueError(f"clip_high = {clip_high}: must be 0 or more")
    if dual_clip is not None and not dual_clip > 1:
        raise ValueError(f"dual_clip = {dual_clip}: must be above 1")
    if objective == "dr_grpo" and (max_completion_tokens or 0) < 1:
        limit = f"max_completion_tokens = {max_completion_tokens}"
        raise ValueError(f"{limit}: dr_grpo divides by the completions' limit, so give it")


def _check_kl(kl_coef: float, kl_estimator: str, ref_logp: Tensor | None) -> None:
    if kl_estimator not in KL_ESTIMATORS:
        why = "; the gradient of k1 is 0 on average" if kl_estimator == "k1" else ""
        names = ", ".join(KL_ESTIMATORS)
        raise ValueError(f"kl_estimator = {kl_estimator!r}: must be one of {names}{why}")
    if not kl_coef >= 0:
        raise ValueError(f"kl_coef = {kl_coef}: must be 0 or more")
    if kl_coef > 0 and ref_logp is None:
        raise ValueError(f"kl_coef = {kl_coef} needs ref_logp: give it, or set kl_coef to 0")

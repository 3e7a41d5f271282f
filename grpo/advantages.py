"""Rewards of a group → advantages: how much better was this completion than its siblings?

GRPO has no value network. The baseline of a completion is the mean reward of the group that was
sampled from the same prompt (Shao et al., arXiv 2402.03300, section 4.1.2):

    advantage = (reward − mean of the group) / (standard deviation + ε)

Projects differ in the standard deviation and in ε; here it is the sample's (divided by n − 1), and
ε is 1e-4. Everything is computed in float64: in float32 the mean of equal rewards is often not
equal to them, and that rounding, divided by ε, becomes an advantage.
"""

from typing import NamedTuple

import torch
from torch import Tensor

SCALES = ("group", "batch", "none")
EPSILON = 1e-4


class RewardStatistics(NamedTuple):
    """What turns rewards into advantages, in float64; unscored rewards (NaN) are left out."""

    mean: Tensor
    """[N, 1] mean reward of each group (0 where nothing was scored)"""
    std: Tensor
    """[N, 1] standard deviation for the scale: of each group, of the batch; 0 for "none" """
    divisor: Tensor
    """[N, 1] what reward − mean is divided by: std + eps; 1 for "none" """
    has_spread: Tensor
    """[N, 1] bool: at least two of the group's completions were scored, and not all alike"""


def group_advantages(rewards: Tensor, *, scale: str = "group", eps: float = EPSILON) -> Tensor:
    """Advantages of completions over the mean of their group.

    rewards: [N, G] float, N groups of G completions. NaN marks a completion that could not be
        scored: it is left out of mean and standard deviation, and its advantage is 0.
    scale: what reward − mean is divided by:
        "group": standard deviation of the group's scored rewards + eps (GRPO);
        "batch": standard deviation of all scored rewards given + eps. It is that of the rewards
            themselves, not of reward − mean, as TRL has it; give the rewards of all ranks at once;
        "none": nothing (Dr. GRPO, arXiv 2503.20783: prompts that are nearly always or nearly never
            answered well have a small deviation, and dividing by it gives them too much weight).
    eps: in units of reward; keeps a tiny spread from becoming a large advantage.

    A group with fewer than two scored completions, or with all scored alike, has nothing to
    compare: its advantages are exactly 0 at every scale. Its tokens still feel the KL term.

    Returns [N, G] in the type of `rewards`. Raises ValueError, in one line, for rewards that are
    not [N, G] floats or are infinite, for an unknown scale and for a negative eps.
    """
    mean, _, divisor, has_spread = reward_statistics(rewards, scale=scale, eps=eps)
    # advantage = (reward − mean) / divisor
    advantages = (rewards.double() - mean) / divisor
    comparable = has_spread & ~rewards.isnan()
    return torch.where(comparable, advantages, 0.0).to(rewards.dtype)


def reward_statistics(
    rewards: Tensor, *, scale: str = "group", eps: float = EPSILON
) -> RewardStatistics:
    """The steps behind `group_advantages`: its arguments, its errors, one row per group."""
    _check_arguments(rewards, scale, eps)
    rewards = rewards.double()
    mean, std = _mean_and_std(rewards)
    if scale == "batch":
        std = _mean_and_std(rewards.reshape(1, -1))[1].expand_as(mean)
    if scale == "none":
        std, divisor = torch.zeros_like(mean), torch.ones_like(mean)
    else:
        divisor = std + eps
    return RewardStatistics(mean, std, divisor, _has_spread(rewards))


def _mean_and_std(rewards: Tensor) -> tuple[Tensor, Tensor]:
    """[rows, n] with NaN → mean and standard deviation (ddof 1) of what is not NaN, [rows, 1]."""
    count = (~rewards.isnan()).sum(dim=1, keepdim=True)
    # mean = Σ reward / n
    mean = rewards.nansum(dim=1, keepdim=True) / count.clamp(min=1)
    # std = √( Σ (reward − mean)² / (n − 1) )
    squares = (rewards - mean).square().nansum(dim=1, keepdim=True)
    return mean, (squares / (count - 1).clamp(min=1)).sqrt()


def _has_spread(rewards: Tensor) -> Tensor:
    """[N, G] → [N, 1]: exact, since it compares rewards with each other and rounds nothing.

    With fewer than two scored, largest and smallest are the same one, or −∞ and ∞.
    """
    unscored = rewards.isnan()
    largest = rewards.masked_fill(unscored, -torch.inf).amax(dim=1, keepdim=True)
    smallest = rewards.masked_fill(unscored, torch.inf).amin(dim=1, keepdim=True)
    return largest > smallest


def _check_arguments(rewards: Tensor, scale: str, eps: float) -> None:
    if scale not in SCALES:
        raise ValueError(f"scale = {scale!r}: must be one of {', '.join(SCALES)}")
    if not eps >= 0:
        raise ValueError(f"eps = {eps}: must be at least 0")
    if rewards.dim() != 2 or rewards.shape[1] == 0:
        raise ValueError(f"rewards {list(rewards.shape)}: must be [groups, completions per group]")
    if not rewards.is_floating_point():
        raise ValueError(f"rewards are {rewards.dtype}: must be floating point; use .float()")
    if rewards.isinf().any():
        raise ValueError("rewards hold an infinite value; mark a completion without score by NaN")

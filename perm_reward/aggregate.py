"""Four scores → one reward, with its parts (PERM, arXiv 2601.10532, the section on the reward)."""

import math
from dataclasses import dataclass
from typing import Literal

from perm_reward.settings import require
from perm_reward.verdict import check_score


@dataclass(frozen=True)
class RewardConfig:
    """How verdicts become a reward."""

    aggregation: Literal["harmonic", "mean", "geometric"] = "harmonic"
    """how resonation, expression and reception are joined; harmonic: the weakest stage rules"""
    bystander_weight: float = 0.5
    """what a bystander's score of 0 costs (lambda); a score of 100 costs nothing"""
    length_limit: int = 768
    """tokens of a completion, analysis and response together, that cost nothing"""
    length_penalty: float = 0.001
    """what each token above length_limit costs"""
    format_failure: Literal["lowest", "judge"] = "lowest"
    """a completion of broken form: lowest reward at once, or empty text sent to the judges"""
    bystander_target: float | None = None
    """mean score of the bystander to hold, 0-100: its weight rises while the mean is below, and
    falls while it is above; none: the weight stays as it is"""
    bystander_rate: float = 0.1
    """what the weight gains per step for a mean 100 points below bystander_target"""

    def __post_init__(self) -> None:
        known = self.aggregation in ("harmonic", "mean", "geometric")
        require(self, "aggregation", known, "harmonic, mean or geometric")
        weight_holds = 0 <= self.bystander_weight < math.inf
        require(self, "bystander_weight", weight_holds, "0 or more (it is a cost)")
        require(self, "length_limit", self.length_limit >= 0, "0 or more tokens")
        penalty_holds = 0 <= self.length_penalty < math.inf
        require(self, "length_penalty", penalty_holds, "0 or more (it is a cost)")
        known = self.format_failure in ("lowest", "judge")
        require(self, "format_failure", known, "lowest or judge")
        target = self.bystander_target
        holds = target is None or 0 <= target <= 100
        require(self, "bystander_target", holds, "0 to 100, or none")
        require(self, "bystander_rate", 0 < self.bystander_rate < math.inf, "above 0")


@dataclass(frozen=True)
class RewardBreakdown:
    """A reward and the parts it is the sum of."""

    core: float
    """resonation, expression and reception joined, in [0.2, 1]"""
    bystander: float
    """in [-bystander_weight, 0]"""
    length: float
    """0 or less"""
    total: float
    """core + bystander + length: the reward"""


def perm_reward(
    resonation: float,
    expression: float,
    reception: float,
    bystander: float,
    completion_tokens: int,
    config: RewardConfig = RewardConfig(),
) -> RewardBreakdown:
    """The reward of one completion.

    core (harmonic)  = 3 / (5 / s_R + 5 / s_E + 5 / s_C)
    core (mean)      = (s_R + s_E + s_C) / (3 · 5)
    core (geometric) = (s_R · s_E · s_C / 5³) ^ (1/3)
    bystander        = bystander_weight · (b / 100 - 1)
    length           = -length_penalty · max(0, tokens - length_limit)
    total            = core + bystander + length

    Args:
        resonation, expression, reception: s_R, s_E, s_C in 1-5. Fractions are allowed, since a
            judge may average several samples.
        bystander: b in 0-100.
        completion_tokens: tokens of analysis and response together.
        config: weights, limit and the choice of core.

    Raises:
        ValueError: a score out of its range or not a number, or a negative count of tokens.
    """
    check_score("resonation", resonation)
    check_score("expression", expression)
    check_score("reception", reception)
    check_score("bystander", bystander)
    if completion_tokens < 0:
        raise ValueError(f"completion_tokens = {completion_tokens}: must be 0 or more")

    stages = (resonation, expression, reception)
    if config.aggregation == "harmonic":
        core = 3 / sum(5 / score for score in stages)
    elif config.aggregation == "mean":
        core = sum(stages) / (3 * 5)
    else:
        core = (math.prod(stages) / 5**3) ** (1 / 3)
    bystander_part = config.bystander_weight * (bystander / 100 - 1)
    length_part = config.length_penalty * min(0, config.length_limit - completion_tokens)
    total = core + bystander_part + length_part
    return RewardBreakdown(core, bystander_part, length_part, total)


def lowest_reward(completion_tokens: int, config: RewardConfig = RewardConfig()) -> RewardBreakdown:
    """The reward of a broken form: the worst score of every judge, the length as counted."""
    return perm_reward(1, 1, 1, 0, completion_tokens, config)

"""What the judges of a run cost, and whether what comes next may still be paid."""

from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

from perm_reward.estimate import in_money
from perm_reward.reward import PermReward
from perm_reward.verdict_store import now

Gather = Callable[[Any], list[Any]]


class Spending:
    """The judges' costs over all processes of a run, held against its budget.

    What a completion will cost is taken to be the most that one has cost yet, or what it may cost
    by the estimate, whichever is more: completions of broken form are not judged and cost nothing,
    so that what was paid for them tells little. Money is in whatever the prices are given in.

    Args:
        reward: whose judges are paid.
        gather: all processes' values on each of them; all of them call `record` together.
        budget: 0: none.
        per_completion: what a completion may cost, by the estimate.
    """

    def __init__(
        self, reward: PermReward, gather: Gather, budget: float, per_completion: float
    ) -> None:
        self._reward = reward
        self._gather = gather
        self._budget = budget
        self._per_completion = per_completion
        self._earlier: dict[str, float] = {}  # what a run cost before it was interrupted
        self._costs: dict[str, float] = {}
        self._recorded_at = ""
        self.spent = 0.0

    def record(self, completions: int) -> dict[str, float]:
        """The costs so far, as metrics, the latest so many completions of all processes included.

        judge.ROLE.calls, .prompt_tokens, .cached_tokens, .completion_tokens, .money, .found
        """
        mine = {
            f"judge.{role}.{name}": value
            for role, cost in self._reward.costs().items()
            for name, value in asdict(cost).items()
        }
        everyone = self._gather(mine)
        self._recorded_at = now()  # all that is counted was kept before, and what comes is not yet
        costs = {
            name: self._earlier.get(name, 0) + sum(of_one[name] for of_one in everyone)
            for name in mine
        }
        self._costs = costs
        before, self.spent = self.spent, total_money(costs)
        latest = (self.spent - before) / completions
        self._per_completion = max(self._per_completion, latest)
        return costs

    def allows(self, completions: int) -> bool:
        """Whether so many completions more can be judged within the budget."""
        return not self._budget or self.spent + completions * self._per_completion <= self._budget

    def state_dict(self) -> dict[str, Any]:
        """What a run that goes on must know."""
        return {
            "costs": self._costs,
            "recorded_at": self._recorded_at,
            "per_completion": self._per_completion,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        self._earlier = self._costs = state["costs"]
        self._recorded_at = state["recorded_at"]
        self._reward.charge_after(self._recorded_at)
        self._per_completion = state["per_completion"]
        self.spent = total_money(self._earlier)

    def __str__(self) -> str:
        each = in_money(self._per_completion)
        spent = f"{in_money(self.spent)} of judge.budget = {self._budget:g} spent"
        return f"{spent}, and a completion may cost {each}"


def total_money(costs: Mapping[str, float]) -> float:
    """The money in costs by name."""
    return sum(value for name, value in costs.items() if name.endswith(".money"))

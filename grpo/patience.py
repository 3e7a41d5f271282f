"""Rewards that do not come: pause, ask again, and at last stop, rather than train on the rest.

A completion without a reward is left out of its group. A few of them cost little. But while a judge
is down, a step would be spent on whatever happened to be scored, and the run's data with it.
"""

import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from tqdm import tqdm

from grpo.config import TrainConfig
from grpo.parallel import Ranks
from grpo.reward import RewardCalls
from grpo.rollout import Group

FIRST_PAUSE = 10.0  # seconds; each further one is twice as long


class RunStopped(Exception):
    """The run cannot go on, for a cause outside of it. One line; what was computed is kept."""


def finish_rewards(
    calls: RewardCalls, groups: Sequence[Group], ranks: Ranks, config: TrainConfig
) -> None:
    """Wait for the rewards of this rank's groups; pause and ask again while too many are missing.

    All ranks together: what counts is the part without a reward over all of them.

    Raises RunStopped when patience is at an end, ConfigError when the reward itself is at fault,
    Interrupted when a signal asks the run to end.
    """
    waited, pause, asked_again = 0.0, FIRST_PAUSE, False
    while True:
        with ranks.failing_together():
            ranks.interruption.unless_asked(lambda: calls.finish(groups))
        ranks.stop_if_asked()
        if not calls.can_ask_again:
            return
        missing = find_missing(groups, ranks)
        if missing.unscored <= config.max_unscored * missing.total:
            return
        # What waiting does not mend may still be mended by asking once more.
        patience = config.patience_seconds if missing.may_pass(calls) else FIRST_PAUSE
        if asked_again and waited >= min(patience, config.patience_seconds):
            raise RunStopped(
                f"{missing}: more than train.max_unscored = {config.max_unscored:g} of them, after "
                f"pauses of {waited:.0f} s in all (train.patience_seconds); see to that judge"
            )
        pause = min(pause, config.patience_seconds - waited)
        if ranks.is_main:
            tqdm.write(f"warning: {missing}: asked again in {pause:.0f} s", file=sys.stderr)
        ranks.interruption.unless_asked(partial(time.sleep, pause))
        ranks.stop_if_asked()
        waited, pause, asked_again = waited + pause, 2 * pause, True
        calls.start_again(groups)


@dataclass(frozen=True)
class Missing:
    """The completions of all ranks, those of them without a reward, and what these lack."""

    total: int
    unscored: int
    causes: Counter[str]

    def may_pass(self, calls: RewardCalls) -> bool:
        """Whether any of the causes may be gone after a while, as far as the reward knows."""
        return not self.causes or any(map(calls.may_pass, self.causes))

    def __str__(self) -> str:
        named = ", ".join(f"{cause} ({count})" for cause, count in self.causes.most_common(4))
        share = f"{self.unscored} of {self.total} completions have no reward"
        return f"{share}; {named or 'no cause given'}"


def find_missing(groups: Sequence[Group], ranks: Ranks) -> Missing:
    """What is missing on all ranks together."""
    completions = [completion for group in groups for completion in group.completions]
    unscored = [completion for completion in completions if completion.reward is None]
    causes = Counter(cause for c in unscored for cause in c.details.get("causes", ()))
    totals, missing, all_causes = zip(
        *ranks.gather((len(completions), len(unscored), causes)), strict=True
    )
    return Missing(sum(totals), sum(missing), sum(all_causes, Counter()))

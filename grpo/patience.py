"""Rewards that do not come: pause, ask again, and at last stop, rather than train on the rest.

A completion without a reward is left out of its group. A few of them cost little. But while a judge
is down, a step would be spent on whatever happened to be scored, and the run's data with it.
"""

import sys
import time
from collections import Counter
from collections.abc import Sequence

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

    Raises RunStopped when patience is at an end, ConfigError when the reward itself is at fault.
    """
    waited, pause = 0.0, FIRST_PAUSE
    while True:
        with ranks.failing_together():
            calls.finish(groups)
        missing = too_many_missing(groups, ranks, config) if calls.can_ask_again else None
        if missing is None:
            return
        if waited >= config.patience_seconds:
            raise RunStopped(
                f"{missing}: more than train.max_unscored = {config.max_unscored:g} of them, after "
                f"pauses of {waited:.0f} s in all (train.patience_seconds); see to that judge"
            )
        pause = min(pause, config.patience_seconds - waited)
        if ranks.is_main:
            tqdm.write(f"warning: {missing}: asked again in {pause:.0f} s", file=sys.stderr)
        time.sleep(pause)
        waited, pause = waited + pause, 2 * pause
        calls.start_again(groups)


def too_many_missing(groups: Sequence[Group], ranks: Ranks, config: TrainConfig) -> str | None:
    """How many completions of all ranks have no reward and why, if they are too many."""
    completions = [completion for group in groups for completion in group.completions]
    unscored = [completion for completion in completions if completion.reward is None]
    causes = Counter(cause for c in unscored for cause in c.details.get("causes", ()))
    totals, missings, all_causes = zip(
        *ranks.gather((len(completions), len(unscored), causes)), strict=True
    )
    total, missing = sum(totals), sum(missings)
    if missing <= config.max_unscored * total:
        return None
    together: Counter[str] = sum(all_causes, Counter())
    named = ", ".join(f"{cause} ({count})" for cause, count in together.most_common(4))
    return f"{missing} of {total} completions have no reward; {named or 'no cause given'}"

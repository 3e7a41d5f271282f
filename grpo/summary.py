"""What a run says at its end: held-out reward before and after, and two answers side by side."""

import itertools
import textwrap
from collections.abc import Sequence
from pathlib import Path

from grpo.monitor import mean, rollout_metrics, scored, standard_error
from grpo.rollout import Group

COLUMN = 56  # characters, of the two answers side by side


def heldout_metrics(groups: Sequence[Group]) -> dict[str, float]:
    """Held-out reward with its standard error (over seekers), and the other rollout metrics."""
    by_seeker = [mean(rewards) for g in groups if (rewards := scored(g.completions))]
    error = standard_error(by_seeker)
    return {"reward_standard_error": error, "seekers": len(by_seeker)} | rollout_metrics(groups)


def summary(
    before: Sequence[Group],
    after: Sequence[Group],
    output: Path,
    reward: str,
    remarks: Sequence[str] = (),
) -> str:
    """Held-out reward before and after, remarks, and one seeker's two answers side by side."""
    first, last = heldout_metrics(before), heldout_metrics(after)
    seeker = before[0].prompt.record
    texts = [groups[0].completions[0].text for groups in (before, after)]
    return "\n".join(
        [
            "",
            f"held-out reward  {in_words(first)} → {in_words(last)}   "
            f"(mean ± standard error over {last['seekers']:.0f} seekers)",
            f"reward           {reward}",
            f"saved to         {output / 'policy'}",
            *remarks,
            "",
            *textwrap.wrap(f"a held-out seeker: {seeker['query']}", 2 * COLUMN + 3),
            "",
            *side_by_side("before", texts[0], "after", texts[1]),
        ]
    )


def in_words(metrics: dict[str, float]) -> str:
    """A held-out reward with its error, or that no judge could score any answer."""
    if metrics["seekers"] == 0:
        return "none scored"
    return f"{metrics['reward_mean']:.3f} ± {metrics['reward_standard_error']:.3f}"


def side_by_side(left_title: str, left: str, right_title: str, right: str) -> list[str]:
    """Two texts in two columns."""
    columns = [
        [title, "─" * COLUMN, *(w for line in text.splitlines() for w in wrap(line))]
        for title, text in ((left_title, left), (right_title, right))
    ]
    rows = itertools.zip_longest(*columns, fillvalue="")
    return [f"{a:<{COLUMN}} │ {b}".rstrip() for a, b in rows]


def wrap(line: str) -> list[str]:
    """A line cut to the width of a column; an empty one stays."""
    return textwrap.wrap(line, COLUMN) or [""]

"""Where do these advantages come from? Step by step, as tables in the terminal.

    python -m grpo.explain --rewards 1 0 .5 0

shows the mean, the standard deviation and the advantages of a group, at each scale. `none` (or
`nan`) stands for a completion that could not be scored. The advantages are those of training:
`grpo.advantages` computes them; the sums and squares beside them show how to get there by hand.
"""

import argparse
import math
import sys
from collections.abc import Sequence
from typing import NoReturn

import torch
from torch import Tensor

from grpo.advantages import EPSILON, SCALES, group_advantages, reward_statistics
from grpo.config_loader import print_to_reader

# All text is ASCII, so that it can be printed in any terminal.
_FORMULAS = {
    "group": f"(reward - mean) / (std + {EPSILON}), std of this group",
    "batch": f"(reward - mean) / (std + {EPSILON}), std of the batch (here: this group)",
    "none": "reward - mean, not divided by anything (Dr. GRPO)",
}


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line. Bad input ends in one line on stderr, with exit code 2."""
    parser = _Parser(prog="python -m grpo.explain", description=__doc__.split("\n")[0])
    parser.add_argument(
        "--rewards",
        type=_reward,
        nargs="+",
        action="append",
        required=True,
        metavar="REWARD",
        help="rewards of the completions of one prompt; none for one that could not be scored",
    )
    arguments = sys.argv[1:] if arguments is None else arguments
    # A leading space, since argparse takes -1e-3 for the name of an option.
    groups = parser.parse_args([f" {a}" if _is_number(a) else a for a in arguments]).rewards
    if len(groups) > 1:
        parser.error("--rewards is given twice; give the rewards of one group")
    print_to_reader(explain_rewards(groups[0]) + "\n")


def explain_rewards(rewards: Sequence[float]) -> str:
    """Rewards of one group (NaN: not scored) → how they become advantages, as text."""
    group = torch.tensor([rewards], dtype=torch.float64)  # [1, G]
    sections = [explain_statistics(group), explain_no_spread(group)]
    sections += [explain_scale(group, scale) for scale in SCALES]
    return "\n\n".join(section for section in sections if section)


def explain_statistics(group: Tensor) -> str:
    """Mean and standard deviation of a group [1, G], from its rewards."""
    mean, std = (value.item() for value in reward_statistics(group)[:2])
    deviations, squares = group - mean, (group - mean).square()
    rows = [["completion", "reward", "reward - mean", "squared"]]
    for i, values in enumerate(zip(group[0], deviations[0], squares[0], strict=True)):
        rows.append([str(i + 1), *(number(value.item()) for value in values)])
    total, total_square = (number(values.nansum().item()) for values in (group, squares))
    rows.append(["sum", total, "", total_square])

    n = int((~group.isnan()).sum())
    mean_of = [number(mean), f"= {total} / {n} scored"] if n else ["none", "no reward to average"]
    std_of = [number(std), f"= sqrt({total_square} / ({n} - 1))"]
    steps = [["mean", *mean_of], ["std", *(std_of if n > 1 else ["none", "needs two scored"])]]
    text = [f"Group of size {group.shape[1]}, {n} scored", table(rows, ">>>>"), ""]
    text.append(table(steps, "<><"))
    if unscored := [str(i + 1) for i, reward in enumerate(group[0]) if reward.isnan()]:
        text.append(f"  Not scored, so left out here, and advantage 0: {', '.join(unscored)}")
    return "\n".join(text)


def explain_no_spread(group: Tensor) -> str:
    """Why all advantages of a group [1, G] are zero; empty if they are not."""
    if reward_statistics(group).has_spread.item():
        return ""
    scored = group[~group.isnan()].tolist()
    if len(scored) < 2:
        reason = (
            "Fewer than two completions were scored: there is nothing to compare.\n"
            "An advantage says how much better one was than the others of its prompt."
        )
    else:
        reason = (
            f"All scored completions earned {number(scored[0])}: the group has no spread.\n"
            "None was better than another, however high or low the reward is."
        )
    return (
        f"{reason}\n"
        "So all advantages are exactly 0, at every scale. Only the KL term of the loss, if there\n"
        "is one, still acts on these completions: it pulls them towards the reference."
    )


def explain_scale(group: Tensor, scale: str) -> str:
    """Advantages of a group [1, G] at one scale."""
    mean, _, divisor, _ = reward_statistics(group, scale=scale)
    columns = (group - mean, divisor.expand_as(group), group_advantages(group, scale=scale))
    rows = [["completion", "reward - mean", "divisor", "advantage"]]
    for i, values in enumerate(zip(*(column[0] for column in columns), strict=True)):
        rows.append([str(i + 1), *(number(value.item()) for value in values)])
    return f"scale {scale}: advantage = {_FORMULAS[scale]}\n{table(rows, '>>>>')}"


def table(rows: list[list[str]], alignment: str) -> str:
    """Rows of cells → lines; `alignment` has "<" or ">" for each column."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = zip(row, alignment, widths, strict=True)
        lines.append("  ".join(f"{cell:{side}{width}}" for cell, side, width in cells))
    return "\n".join(f"  {line}".rstrip() for line in lines)


def number(value: float) -> str:
    """Six decimals; in powers of ten where these would show nothing of it. NaN is "none"."""
    if math.isnan(value):
        return "none"
    value = round(value, 12) + 0.0  # .3 - (.1 + .2) is meant to be 0, and -0 is 0
    return f"{value:.6f}" if value == 0 or 1e-4 <= abs(value) < 1e9 else f"{value:.5e}"


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}\n")


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _reward(text: str) -> float:
    if text.lower() == "none":
        return math.nan
    if not _is_number(text) or math.isinf(float(text)):
        raise argparse.ArgumentTypeError(
            f"{text.strip()!r} is not a finite number; use none for a completion without a score"
        )
    return float(text)


if __name__ == "__main__":
    main()

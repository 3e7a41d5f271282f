"""What a step looked like in numbers, and the files they go to."""

import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from grpo.rollout import Completion, Group

# A mean |log p of generation − log p of training| that bfloat16 explains: 0.003 to 0.02 were seen.
LARGEST_LOGPROB_DIFFERENCE = 0.05
LARGEST_UNSCORED_SHARE = 0.2


def rollout_metrics(groups: Sequence[Group]) -> dict[str, float]:
    """What can be read off the groups of one step (or evaluation), over all ranks.

    reward_mean, reward_std: over all scored completions; reward_std_in_group: mean over groups;
    unscored: completions without a reward; zero_spread_groups: part of the groups with nothing to
    compare; completion_tokens_mean, _max; truncated: part that no stop token ended; and the mean of
    every number that the reward gave with its completions, as details.<its path>; and how often
    each cause of a missing verdict was met, as missing.<cause>.
    """
    completions = [completion for group in groups for completion in group.completions]
    rewards = scored(completions)
    by_group = [scored(group.completions) for group in groups]
    lengths = [len(completion.token_ids) for completion in completions]
    return {
        "reward_mean": mean(rewards),
        "reward_std": spread(rewards),
        "reward_std_in_group": mean([spread(values) for values in by_group]),
        "completions": len(completions),
        "unscored": len(completions) - len(rewards),
        "zero_spread_groups": mean([float(len(set(values)) < 2) for values in by_group]),
        "completion_tokens_mean": mean(lengths),
        "completion_tokens_max": max(lengths),
        "truncated": mean([float(c.finish_reason == "length") for c in completions]),
        **detail_means(completions),
        **missing_causes(completions),
    }


def missing_causes(completions: Sequence[Completion]) -> dict[str, float]:
    """How often each cause that the reward names (a list `causes` in its details) was met."""
    causes = Counter(cause for c in completions for cause in c.details.get("causes", ()))
    return {f"missing.{cause}": count for cause, count in sorted(causes.items())}


def warnings_of(metrics: Mapping[str, float]) -> list[str]:
    """What in the metrics of a step should worry whoever watches the run, in plain words."""
    warnings = []
    difference = metrics["rollout_logprob_difference"]
    if difference > LARGEST_LOGPROB_DIFFERENCE:
        warnings.append(
            f"log-probs of generation and training differ by {difference:.3f} on average "
            "(rounding explains a few hundredths at most): the ratio does not start at 1; try "
            "policy.compute_dtype = float32 (with rollout.ahead = 1 an update moves them too: then "
            "lower train.learning_rate)"
        )
    if metrics["unscored"] > LARGEST_UNSCORED_SHARE * metrics["completions"]:
        causes = ", ".join(
            f"{name.removeprefix('missing.')} ({count:.0f})"
            for name, count in metrics.items()
            if name.startswith("missing.")
        )
        warnings.append(
            f"{metrics['unscored']:.0f} of {metrics['completions']:.0f} completions have no "
            f"reward; causes: {causes or 'the reward function gave None'}"
        )
    return warnings


def detail_means(completions: Sequence[Completion]) -> dict[str, float]:
    """The mean of each number in the completions' details, by its path."""
    values: dict[str, list[float]] = {}
    for completion in completions:
        for path, number in numbers_in(completion.details, "details"):
            values.setdefault(path, []).append(number)
    return {path: fmean(numbers) for path, numbers in values.items()}


def numbers_in(details: Mapping[str, Any], path: str) -> Iterator[tuple[str, float]]:
    """Every number in nested dictionaries, with the keys that lead to it joined by dots."""
    for key, value in details.items():
        if isinstance(value, Mapping):
            yield from numbers_in(value, f"{path}.{key}")
        elif isinstance(value, int | float):
            yield f"{path}.{key}", float(value)


def scored(completions: Sequence[Completion]) -> list[float]:
    """The rewards that were given."""
    return [c.reward for c in completions if c.reward is not None]


def mean(values: Sequence[float]) -> float:
    """The mean, NaN of nothing."""
    return fmean(values) if values else float("nan")


def spread(values: Sequence[float]) -> float:
    """The standard deviation (n − 1), 0 of fewer than two values."""
    return stdev(values) if len(values) > 1 else 0.0


def standard_error(values: Sequence[float]) -> float:
    """Standard deviation / √n: how far the mean of another such sample would lie."""
    return spread(values) / len(values) ** 0.5 if values else float("nan")


def append_line(path: Path, values: Mapping[str, Any]) -> None:
    """Append one JSON object to a JSON lines file; NaN and infinity, which JSON does not know, as
    null."""
    known = {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in values.items()
    }
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(known, ensure_ascii=False) + "\n")

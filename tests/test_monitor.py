"""Metrics of a step, on groups small enough to check by hand."""

import math

import pytest

from grpo.monitor import numbers_in, rollout_metrics, standard_error, warnings_of
from grpo.rollout import Completion, Group, Prompt, read_groups, write_groups


def group(rewards: list[float | None], lengths: list[int]) -> Group:
    completions = [
        Completion([1] * n, [-0.5] * n, "stop" if n < 4 else "length", reward=r, details={"a": n})
        for r, n in zip(rewards, lengths, strict=True)
    ]
    return Group(Prompt(0, "x", [1, 2], {"query": "“hm”"}), completions)


def test_rollout_metrics_by_hand() -> None:
    metrics = rollout_metrics([group([1.0, 0.0, None], [1, 2, 4]), group([0.5, 0.5, 0.5], [3] * 3)])
    assert metrics["reward_mean"] == 0.5
    assert metrics["reward_std"] == pytest.approx(math.sqrt(0.5 / 4))
    assert metrics["reward_std_in_group"] == pytest.approx(math.sqrt(0.5) / 2)  # .707 and 0
    assert metrics["unscored"] == 1
    assert metrics["zero_spread_groups"] == 0.5
    assert metrics["completion_tokens_mean"] == pytest.approx(16 / 6)
    assert metrics["completion_tokens_max"] == 4
    assert metrics["truncated"] == pytest.approx(1 / 6)
    assert metrics["details.a"] == pytest.approx(16 / 6)


def test_nothing_scored_is_not_a_number_and_not_a_crash() -> None:
    metrics = rollout_metrics([group([None, None], [1, 1])])
    assert math.isnan(metrics["reward_mean"])
    assert metrics["zero_spread_groups"] == 1.0


def test_numbers_are_found_at_any_depth() -> None:
    details = {"a": 1, "b": {"c": 2.5, "d": "text", "e": None}, "f": True}
    assert dict(numbers_in(details, "x")) == {"x.a": 1.0, "x.b.c": 2.5, "x.f": 1.0}


def test_standard_error() -> None:
    assert standard_error([1.0, 3.0]) == pytest.approx(1.0)  # std √2, over √2


def test_a_rollout_reads_back_bit_for_bit(tmp_path) -> None:
    groups = [group([1 / 3, None], [2, 5])]
    write_groups(tmp_path / "rollouts.jsonl", 1, groups)
    write_groups(tmp_path / "rollouts.jsonl", 2, groups * 2)
    assert list(read_groups(tmp_path / "rollouts.jsonl", step=1)) == groups
    assert len(list(read_groups(tmp_path / "rollouts.jsonl"))) == 3


def test_a_mismatch_of_generation_and_training_is_warned_of() -> None:
    healthy = {"rollout_logprob_difference": 0.01, "unscored": 2, "completions": 10}
    assert warnings_of(healthy) == []
    (warning,) = warnings_of(healthy | {"rollout_logprob_difference": 0.2})
    assert "0.200" in warning and "policy.compute_dtype" in warning


def test_missing_rewards_are_warned_of_with_their_causes() -> None:
    groups = [group([None, 1.0], [1, 1])]
    groups[0].completions[0].details = {"causes": ["reception: timeout", "expression: http 500"]}
    metrics = rollout_metrics(groups)
    assert metrics["missing.reception: timeout"] == 1
    (warning,) = warnings_of({"rollout_logprob_difference": 0.0, **metrics})
    assert "1 of 2 completions" in warning and "reception: timeout (1)" in warning

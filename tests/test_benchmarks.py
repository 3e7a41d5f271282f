"""The benchmarks run, on a tiny model; what they measure is for a quiet machine."""

import json

import pytest

from benchmarks.common import Case, Result, as_json, compare, table
from benchmarks.generation import generate, ours


@pytest.mark.slow
def test_both_generators_take_their_turns() -> None:
    case = Case("tiny", 2, 2, prompt_tokens=8, new_tokens=20, ragged=True)
    results = compare({"ours": ours, "model.generate": generate}, case, rounds=1, threads=1)
    assert list(results) == ["ours", "model.generate"]
    for result in results.values():
        assert result.seconds > 0 and result.peak_gigabytes > 0
        assert result.tokens_per_second * result.seconds == pytest.approx(case.completion_tokens)
    line = as_json([(case, results)])
    assert "\n" not in line and json.loads(line)["results"][0]["ours"]["seconds"] > 0


def test_the_lengths_of_a_case_are_the_same_for_every_peer() -> None:
    case = Case(prompts=3, group_size=4, new_tokens=64, ragged=True)
    lengths = [length for group in case.lengths() for length in group]
    assert case.lengths() == case.lengths() and len(lengths) == case.rows == 12
    assert all(16 <= length <= 64 for length in lengths) and len(set(lengths)) > 3
    assert case.completion_tokens == sum(lengths)
    assert case.prompt_ids(1) == case.prompt_ids(1) != case.prompt_ids(2)


def test_the_table_compares_with_the_first_peer() -> None:
    text = table(Case(), {"ours": Result(2.0, 10.0, 1.0), "theirs": Result(7.0, 3.0, 4.0)})
    assert text.splitlines()[-1].split() == ["theirs", "7.00", "3.0", "4.00", "3.50×", "25%"]

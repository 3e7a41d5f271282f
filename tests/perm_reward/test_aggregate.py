import math

import pytest

from perm_reward.aggregate import RewardBreakdown, RewardConfig, lowest_reward, perm_reward

# (s_R, s_E, s_C): harmonic, mean, geometric, as published with four digits.
WORKED_VALUES = {
    (5, 5, 1): (0.4286, 0.7333, 0.5848),
    (4, 4, 2): (0.6000, 0.6667, 0.6350),
    (3, 3, 3): (0.6, 0.6, 0.6),
    (5, 5, 5): (1.0, 1.0, 1.0),
    (1, 1, 1): (0.2, 0.2, 0.2),
}


@pytest.mark.parametrize("stages", WORKED_VALUES)
@pytest.mark.parametrize("order", [(0, 1, 2), (1, 2, 0), (2, 0, 1)])
def test_worked_values(stages, order):
    scores = [stages[i] for i in order]
    for aggregation, core in zip(
        ("harmonic", "mean", "geometric"), WORKED_VALUES[stages], strict=True
    ):
        config = RewardConfig(aggregation=aggregation)
        breakdown = perm_reward(*scores, 100, 0, config)
        assert breakdown.core == pytest.approx(core, abs=5e-5)
        assert breakdown.total == breakdown.core


@pytest.mark.parametrize("bystander, part", [(0, -0.5), (50, -0.25), (80, -0.1), (100, 0.0)])
def test_the_bystander_only_subtracts(bystander, part):
    assert perm_reward(3, 3, 3, bystander, 0).bystander == pytest.approx(part, abs=1e-15)
    doubled = perm_reward(3, 3, 3, bystander, 0, RewardConfig(bystander_weight=1.0))
    assert doubled.bystander == pytest.approx(2 * part, abs=1e-15)


@pytest.mark.parametrize("tokens, part", [(0, 0), (768, 0), (769, -0.001), (1024, -0.256)])
def test_length_costs_above_the_limit_only(tokens, part):
    breakdown = perm_reward(3, 3, 3, 100, tokens)
    assert breakdown.length == pytest.approx(part, abs=1e-15)
    assert math.copysign(1, breakdown.length) == (1 if part == 0 else -1), "no -0.0 in the records"


def test_total_is_the_sum_of_the_parts():
    breakdown = perm_reward(5, 4, 2, 70, 868)
    assert breakdown.core == pytest.approx(3 / (1 + 1.25 + 2.5), abs=1e-15)
    assert breakdown.total == breakdown.core + breakdown.bystander + breakdown.length
    assert breakdown.total == pytest.approx(0.631578947368421 - 0.15 - 0.1, abs=1e-15)


def test_averaged_scores_are_taken_as_they_are():
    assert perm_reward(2.5, 2.5, 2.5, 62.5, 0).total == pytest.approx(0.5 - 0.1875, abs=1e-15)


def test_a_broken_form_earns_the_least_there_is():
    assert lowest_reward(0) == RewardBreakdown(
        core=pytest.approx(0.2), bystander=-0.5, length=0.0, total=pytest.approx(-0.3)
    )
    assert lowest_reward(868, RewardConfig(bystander_weight=0.1)).total == pytest.approx(0.0)
    for aggregation in ("harmonic", "mean", "geometric"):
        config = RewardConfig(aggregation=aggregation)
        assert lowest_reward(10, config).core == pytest.approx(0.2, abs=1e-15)
        assert lowest_reward(10, config).total <= perm_reward(1, 1, 2, 1, 10, config).total


@pytest.mark.parametrize("position, name", [(0, "resonation"), (1, "expression"), (2, "reception")])
@pytest.mark.parametrize("score", [0, 0.9, 5.1, 6, -1, math.nan, math.inf])
def test_scores_out_of_range_are_refused(position, name, score):
    scores = [3, 3, 3]
    scores[position] = score
    with pytest.raises(ValueError, match=f"^{name} = .*: must be 1 to 5$"):
        perm_reward(*scores, 50, 100)


@pytest.mark.parametrize("bystander", [-1, 100.5, math.nan])
def test_bystander_out_of_range_is_refused(bystander):
    with pytest.raises(ValueError, match="^bystander = .*: must be 0 to 100$"):
        perm_reward(3, 3, 3, bystander, 100)


def test_negative_tokens_are_refused():
    with pytest.raises(ValueError, match="^completion_tokens = -1: must be 0 or more$"):
        perm_reward(3, 3, 3, 50, -1)


@pytest.mark.parametrize(
    "name, value",
    [
        ("aggregation", "max"),
        ("bystander_weight", -1),
        ("bystander_weight", math.nan),
        ("bystander_weight", math.inf),
        ("length_limit", -1),
        ("length_penalty", -0.1),
        ("length_penalty", math.nan),
        ("format_failure", "skip"),
    ],
)
def test_settings_out_of_range_are_named(name, value):
    with pytest.raises(ValueError, match=f"^{name} = {value}: must be .+$") as caught:
        RewardConfig(**{name: value})
    assert "\n" not in str(caught.value)


def test_the_ends_of_the_settings_are_allowed():
    config = RewardConfig(bystander_weight=0, length_limit=0, length_penalty=0)
    assert perm_reward(5, 5, 5, 0, 1000, config).total == 1.0

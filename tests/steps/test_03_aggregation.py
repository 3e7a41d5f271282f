"""Step 3: four verdicts → one reward (perm_reward/aggregate.py).

Resonation, expression and reception are the stages of a cycle, s_R, s_E, s_C in 1-5. (5, 5, 1):

    harmonic     3 / (5/5 + 5/5 + 5/1) = 3 / 7        = .4286
    mean         (5 + 5 + 1) / 15      = 11 / 15      = .7333
    geometric    (5 · 5 · 1 / 125)^(1/3) = .2^(1/3)   = .5848

The bystander, b in 0-100, only subtracts, and so does length:

    b = 70                .5 · (70/100 − 1)           = −.15
    868 tokens            −.001 · (868 − 768)         = −.1
"""

import pytest

from perm_reward import PermReward, RewardConfig
from perm_reward.aggregate import lowest_reward, perm_reward
from perm_reward.verdict import Verdict

HARMONIC = RewardConfig()
MEAN = RewardConfig(aggregation="mean")
GEOMETRIC = RewardConfig(aggregation="geometric")


def core(resonation, expression, reception, config=HARMONIC):
    return perm_reward(resonation, expression, reception, 100, 0, config).core


def test_worked_example():
    assert core(5, 5, 1) == pytest.approx(3 / 7, abs=1e-15)
    assert core(5, 5, 1, MEAN) == pytest.approx(11 / 15, abs=1e-15)
    assert core(5, 5, 1, GEOMETRIC) == pytest.approx(0.2 ** (1 / 3), abs=1e-15)


def test_a_cycle_is_as_good_as_its_weakest_stage():
    """A brilliant analysis, beautifully put, that makes the person draw back: (5, 5, 1).

    The mean pays it .73, more than the .60 of a plain answer that works throughout, (3, 3, 3): so a
    policy learns to leave out the stage it finds hardest. The harmonic mean pays it .43.
    """
    assert core(5, 5, 1, MEAN) > core(3, 3, 3, MEAN) == 0.6
    assert core(5, 5, 1) < core(3, 3, 3) == pytest.approx(0.6)


def test_the_weakest_stage_is_where_effort_pays():
    """From (4, 4, 2), one more point: 3/(1.25 + 1.25 + 2.5) = .6 becomes .72 at the weak stage
    (5/3 in place of 5/2), .632 at a strong one (1 in place of 1.25). The mean pays .0667 each."""
    start = core(4, 4, 2)
    assert start == pytest.approx(0.6)
    assert core(4, 4, 3) - start == pytest.approx(0.12)
    assert core(5, 4, 2) - start == pytest.approx(3 / 4.75 - 0.6)
    assert core(4, 4, 3, MEAN) - core(4, 4, 2, MEAN) == pytest.approx(1 / 15)
    assert core(5, 4, 2, MEAN) - core(4, 4, 2, MEAN) == pytest.approx(1 / 15)


def test_the_bystander_cannot_be_won_only_lost():
    """Added as a bonus, a neutral reader's applause would outweigh a person who felt dismissed.
    Here 100 costs nothing, 70 costs .15, and 0 costs λ = .5."""
    assert [perm_reward(3, 3, 3, b, 0).bystander for b in (100, 70, 0)] == pytest.approx(
        [0, -0.15, -0.5]
    )


def test_length_is_free_until_the_limit():
    """Judges like long answers. From 768 tokens on, each costs .001: at 1024, .256, which is more
    than the step from (3, 3, 3) to (4, 4, 4) earns."""
    assert [perm_reward(3, 3, 3, 100, n).length for n in (10, 768)] == [0, 0]
    assert perm_reward(3, 3, 3, 100, 868).length == pytest.approx(-0.1)
    assert perm_reward(4, 4, 4, 100, 1024).total < perm_reward(3, 3, 3, 100, 768).total


def test_the_reward_is_the_sum_of_its_parts():
    breakdown = perm_reward(5, 5, 1, 70, 868)
    assert breakdown.total == pytest.approx(3 / 7 - 0.15 - 0.1)
    assert breakdown.total == breakdown.core + breakdown.bystander + breakdown.length


def test_a_broken_form_is_the_worst_that_can_happen():
    """(1, 1, 1) and b = 0: core .2, bystander −.5, together −.3, without asking anybody.

    Elsewhere a broken form is sent to the judges as empty text: four calls are paid, and a kind
    judge gives an empty page 2 of 5. Then a group of broken forms has a best one.
    """
    assert lowest_reward(100).core == pytest.approx(0.2)
    assert lowest_reward(100).total == pytest.approx(-0.3)


def test_a_score_out_of_range_stops_here_at_the_latest():
    """0 of 5 divides by zero in the harmonic mean; 9 of 5 would make a core above 1. A fraction
    such as 2.5 is fine, since a judge may be asked twice and averaged."""
    for score in (0, 9):
        with pytest.raises(ValueError, match=f"^reception = {score}: must be 1 to 5$"):
            perm_reward(3, 3, score, 50, 100)
    assert core(2.5, 2.5, 2.5) == pytest.approx(0.5)


class OneLost:
    """A judge whose reception verdict on the second of three answers never arrives."""

    label = "one lost"

    async def judge(self, role, seeker, judged_text):
        if role == "reception" and judged_text == "Oh.":
            return Verdict(role, None, "", failure="timeout")
        score = {"Oh.": 1, "I see.": 3, "Third time!": 5}.get(judged_text, 3)
        return Verdict(role, 100 if role == "bystander" else score, f"Score: {score}")

    async def close(self):
        pass


def test_a_verdict_that_never_came_is_not_made_up():
    """Three answers; the judge of the second, and worst, times out.

    Elsewhere a failed judge's score becomes the mean of the others in the batch, here (3 + 5) / 2
    = 4. So "Oh.", judged 3, 1 and "4", earns 3 / (5/3 + 5/1 + 5/4) = .379 because a server was
    busy, and pulls the baseline of its group with it. Here it has no reward at all, the group's
    mean is taken without it (step 4), and the loss is counted.
    """
    responses = ["I see.", "Oh.", "Third time!"]
    completions = [f"# Analysis\nPassed over.\n# Response\n{response}" for response in responses]
    with PermReward(OneLost()) as reward:
        rewards = reward(
            prompts=[""] * 3,
            completions=completions,
            completion_ids=[[1, 2, 3]] * 3,
            persona=["Mia"] * 3,
            scenario=["Passed over again"] * 3,
            query=["I'm fine."] * 3,
        )
    assert rewards == [pytest.approx(0.6), None, pytest.approx(3 / (5 / 3 + 1 + 1))]
    assert reward.counts() == {"reception: timeout": 1}

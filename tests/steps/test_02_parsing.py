"""Step 2: texts → parts and scores (perm_reward/completion.py and perm_reward/verdict.py).

Two texts have to be read before there is a number. The policy's, in the form it was asked for:

    # Analysis
    She says she is fine, but she has been passed over again.
    # Response
    Third time, and they still asked you to bring the cake.

and each judge's reply, which ends in a number that may be written in many ways:

    It is tuned to her.
    **Score:** 4

A number that is lost costs a completion. A number that is invented trains the policy.
"""

import pytest

from perm_reward.completion import parse_completion
from perm_reward.verdict import Verdict, parse_bystander, parse_score

COMPLETION = """\
# Analysis
She says she is fine, but she has been passed over again.
# Response
Third time, and they still asked you to bring the cake."""


def test_a_completion_has_two_parts():
    parsed = parse_completion(COMPLETION)
    assert parsed.well_formed
    assert parsed.analysis == "She says she is fine, but she has been passed over again."
    assert parsed.response == "Third time, and they still asked you to bring the cake."


def test_the_parts_do_not_leak_into_each_other():
    """Resonation is judged on the analysis alone, the others on the response alone.

    Cut at the wrong place, an understanding that was only thought would be paid as one that was
    said, and the policy would learn to think about people without talking to them.
    """
    parsed = parse_completion(COMPLETION)
    assert "cake" not in parsed.analysis
    assert "passed over" not in parsed.response and "#" not in parsed.response


@pytest.mark.parametrize(
    "heading", ["# Response", "## response:", "# **Response**", "**# RESPONSE:**", "#Response"]
)
def test_the_form_is_forgiving_about_looks(heading):
    """A small model that writes `## response:` knows the form. Told that it does not, it would have
    to find a heading level by luck before it could learn anything about people."""
    assert parse_completion(COMPLETION.replace("# Response", heading)).well_formed


def test_the_form_is_strict_about_what_is_judged():
    """Two responses: which one is meant? A parser that takes the first, or the last, is soon paid
    with a fine text in that place and anything in the other."""
    assert not parse_completion(COMPLETION + "\n# Response\nSo?").well_formed
    assert not parse_completion("A word before.\n" + COMPLETION).well_formed
    assert not parse_completion(COMPLETION.replace("# Analysis", "# Thoughts")).well_formed


@pytest.mark.parametrize(
    "reply", ["Score: 4", "**Score:** 4", "score: 4/5", "Score: 4.0, since", '{"score": 4}', "4"]
)
def test_a_score_is_read_however_it_is_written(reply):
    """Somebody's pattern was `Score: (\\d)`. Their judge liked bold: `**Score:** 4`. Every such
    verdict was lost, without a word, and not at random: a judge writes bold when it has
    much to say. The completions left over were not like those that went in."""
    assert parse_score(reply) == 4


@pytest.mark.parametrize("reply", ["Score: 9", "Score: 0", "Score: 4/10", "Score: 40"])
def test_what_is_out_of_range_is_refused_not_clamped(reply):
    """A judge that thinks in tens says 4/10: rather poor. With its `/10` cut off it reads 4 of 5:
    rather good. And its 9, clamped, is the best score there is. The judge misunderstood its task;
    what it thinks of the completion is not known."""
    assert parse_score(reply) is None


@pytest.mark.parametrize(
    "reply", ["Score: 4\nScore: 5", "Score: 4 or 5", "Score: 3.5", "Well put."]
)
def test_what_is_not_clear_is_refused(reply):
    """First match says 4, last match says 5. Rounding says 4, truncation says 3. Whoever chooses
    between them has become the judge."""
    assert parse_score(reply) is None


def test_reasoning_is_not_the_verdict():
    """Reasoning models weigh scores aloud before they settle on one."""
    assert parse_score("<think>A score of 2? No. Score: 3?</think>\nScore: 4") == 4
    assert parse_score("<think>A score of 2, I think.") is None, "cut off before it settled"


PARTS = """\
Content effectiveness: 16
Structure and clarity: 17
Communication efficiency: 15
Objectivity: 18
Accuracy and verifiability: 17
"""


def test_the_bystander_adds_up():
    """16 + 17 + 15 + 18 + 17 = 83, whether or not the judge wrote the sum."""
    assert parse_bystander(PARTS + "Total: 83") == 83
    assert parse_bystander(PARTS) == 83
    assert parse_bystander("Total: 83") == 83


def test_a_bystander_that_cannot_add_is_refused():
    """Small models are poor at sums. Either the total is wrong or a part; nobody can tell."""
    assert parse_bystander(PARTS + "Total: 85") is None


def test_no_score_is_a_reason_not_a_number():
    """A verdict cannot be built without saying either what was scored or why there is none. There
    is no 0, no 3 and no mean of others that could be mistaken for a score later."""
    lost = Verdict("reception", None, "Score: 9", failure="unparsable")
    assert lost.score is None and lost.failure == "unparsable"
    with pytest.raises(ValueError, match="either a score or a failure"):
        Verdict("reception", None, "Score: 9")
    with pytest.raises(ValueError, match="reception = 9: must be 1 to 5"):
        Verdict("reception", 9, "Score: 9")

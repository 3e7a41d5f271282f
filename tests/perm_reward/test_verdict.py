import math

import pytest

from perm_reward.rubrics import ROLES, RUBRICS
from perm_reward.verdict import Verdict, check_score, parse_bystander, parse_score

READ_AS_4 = [
    "Score: 4",
    "It names why this hurts him.\nScore: 4",
    "score: 4",
    "SCORE: 4",
    "Score:4",
    "Score : 4",
    "Score = 4",
    "Score - 4",
    "Score – 4",
    "Score：4",
    "Score 4",
    "**Score:** 4",
    "**Score: 4**",
    "__Score__: 4",
    "## Score: 4",
    "- Score: 4",
    "> Score: 4",
    "Score: **4**",
    "Score: `4`",
    "Score: [4]",
    'Score: "4"',
    "Score: 4.",
    "Score: 4.0",
    "Score: 4/5",
    "Score: 4 / 5",
    "Score: 4.0/5.0",
    "Score: 4 out of 5",
    "Score: 4 out of 5 stars",
    "Score (1-5): 4",
    "Score [1 to 5]: 4",
    "Score: 4 (tuned to this person)",
    "Score: 4, since it is tuned to him",
    "Score: 4 - tuned to this person",
    "Score: 4. It is tuned to him.",
    "Final score: 4",
    "Overall Score: 4",
    "Rating: 4",
    "I give it a score of 4.",
    "The score is 4.",
    "It deserves 4/5, I think.",
    "It deserves 4 out of 5.",
    "4",
    " 4 \n",
    "4.",
    "(4)",
    "**4**",
    "4.0",
    "4/5",
    "4\n\nIt is tuned to him.",
    "Score:\n4",
    "## Score\n\n**4**",
    "| Score | 4 |",
    "```\nScore: 4\n```",
    '```json\n{\n  "score": 4\n}\n```',
    '{"score": 4}',
    '{"reason": "tuned to him", "score": "4"}',
    '{"score":4,"reason":"tuned to him"}',
    "{'final_score': 4.0}",
    "<think>Perhaps Score: 2?</think>\nScore: 4",
    "<thinking>2/5\n3/5</thinking>4/5",
    "Perhaps a score of 2.\n</think>\nScore: 4",
    "Score: 4\nScore: 4/5",
    "He is reachable 24/7.\r\nScore: 4\r\n",
    "Score: N\nScore: 4",
]

REFUSED_SCORES = {
    "absent": ["", " \n", "Well put.", "Score:", "Score: N", "Score: high", "Score: four"],
    "not the score": ["I liked 3 things.", "1. warm\n2. kind\n3. brief", "It has 4 sentences."],
    "out of range": [
        "Score: 0",
        "Score: 6",
        "Score: 10",
        "Score: 45",
        "Score: -4",
        "Score −4",
        "0",
        "6/5",
        '{"score": 9}',
        "Score: " + "4" * 5000,
    ],
    "another scale": ["Score: 4/10", "4/10", "8 out of 10", "Score: 4 of 7", "Score: 80%", "4%"],
    "fractional": ["Score: 3.5", "Score: 3,5", "3.5/5", "Score: 3½", "Score: 3 1/2", "4.25"],
    "a thousand is not one": ["Score: 1,000", "1.000,5"],
    "contradictory": [
        "Score: 4\nScore: 5",
        "Score: 4\nScore: 9",
        "I would say 3/5.\nScore: 4",
        "A score of 3, no: Score: 4",
        "4\n5",
        '{"score": 4, "final_score": 5}',
    ],
    "unsure": [
        "Score: 4-5",
        "Score: 4 - 5",
        "Score: 4–5",
        "Score: 4 to 5",
        "Score: 4 or 5",
        "Score: 4, 5",
        "Score: 4+",
        "Score: 4-ish",
        "Score: 4/5/5",
        "Score: ~4",
        "4 5",
    ],
    "reasoning only": ["<think>Score: 4", "<think>Score: 4</think>", "Score: 4</think>"],
}


def flat(table):
    return [pytest.param(text, id=f"{why}-{text[:20]}") for why in table for text in table[why]]


@pytest.mark.parametrize("reply", READ_AS_4)
def test_scores_that_are_read(reply):
    assert parse_score(reply) == 4


@pytest.mark.parametrize("reply", flat(REFUSED_SCORES))
def test_scores_that_are_refused(reply):
    assert parse_score(reply) is None


@pytest.mark.parametrize("score", [1, 2, 3, 4, 5])
def test_every_level_is_read(score):
    assert parse_score(f"Because.\nScore: {score}") == score


NAMES = (
    "Content effectiveness",
    "Structure and clarity",
    "Communication efficiency",
    "Objectivity",
    "Accuracy and verifiability",
)


def parts(*values, form="{name}: {value}", between="\n"):
    lines = [form.format(name=name, value=value) for name, value in zip(NAMES, values, strict=True)]
    return between.join(lines)


PARTS = (16, 17, 15, 18, 17)  # their sum is 83

READ_AS_83 = [
    parts(*PARTS) + "\nTotal: 83",
    parts(*PARTS),
    parts(*PARTS, form="{name}: {value}/20") + "\n**Total: 83/100**",
    parts(*PARTS, form="- **{name}:** {value}") + "\n\n**Total:** 83",
    parts(*PARTS, form="**{name} (0-20):** {value} - fair"),
    parts(*PARTS, form="1. {name}: {value}/20, it is fair") + "\nTotal: 83 out of 100",
    parts(*PARTS, form="{name} score: {value}") + "\nTotal score: 83",
    parts(*PARTS, form="| {name} | {value} |"),
    parts(*PARTS, form="{name} ({value}/20)") + "\nTotal (83/100)",
    parts(*PARTS, form="{name}: {value}.0") + "\nTotal: 83.0",
    parts(*PARTS, form='"{name}": {value}', between=", ") + ', "total": 83',
    parts(*PARTS, form="{name} {value}/20", between=", ") + ". Total 83.",
    parts(*PARTS).upper() + "\nTOTAL: 83",
    parts(*PARTS) + "\nTotal: 16 + 17 + 15 + 18 + 17 = 83",
    parts(*PARTS) + "\nScore: 83/100",
    "Content: 16\nStructure: 17\nEfficiency: 15\nObjectivity: 18\nAccuracy: 17",
    "Structure & Clarity: 17\n" + parts(*PARTS).replace("Structure and clarity: 17\n", ""),
    '{"content_effectiveness": 16, "structure_and_clarity": 17, "communication_efficiency": 15, '
    '"objectivity": 18, "accuracy_and_verifiability": 17}',
    "<think>Total: 70</think>" + parts(*PARTS),
    parts(*PARTS).replace("Objectivity: 18\n", "") + "\nTotal: 83",
    "Total: 83",
    "**Total:** 83/100",
    "Overall: 83",
    "Score: 83",
    '{"total": 83}',
    "It is fair: 83/100.",
    "83",
    "```\n83\n```",
]

REFUSED_BYSTANDERS = {
    "absent": ["", "Fair.", "Total:", "Total: N", parts("N", "N", "N", "N", "N") + "\nTotal: N"],
    "part missing, no total": [
        parts(*PARTS).replace("Objectivity: 18\n", ""),
        "Objectivity: 18",
    ],
    "part out of range": [
        parts(21, 17, 15, 18, 17),
        parts(-1, 17, 15, 18, 17),
        parts(21, 17, 15, 18, 17) + "\nTotal: 88",
        parts(80, 80, 80, 80, 80),
    ],
    "part fractional": [parts(16.5, 17, 15, 18, 17), parts(16.5, 17, 15, 18, 17) + "\nTotal: 83"],
    "part on another scale": [
        parts(*PARTS, form="{name}: {value}/25"),
        parts(4, 4, 3, 4, 4) + "/5",
    ],
    "part twice": [parts(*PARTS) + "\nObjectivity: 12"],
    "total is not the sum": [
        parts(*PARTS) + "\nTotal: 84",
        parts(*PARTS) + "\nTotal: 16 + 17 + 15 + 18 + 17 = 85",
        parts(*PARTS) + "\n\n82/100",
    ],
    "missing part cannot make up the total": [
        parts(*PARTS).replace("Objectivity: 18\n", "") + "\nTotal: 86",
        parts(*PARTS).replace("Objectivity: 18\n", "") + "\nTotal: 64",
    ],
    "total out of range": ["Total: 101", "Total: -3", "Total: 830", "101", "Score: 120"],
    "total fractional": ["Total: 83.5", "83.5", "8.3/10"],
    "total on another scale": ["Total: 8/10", "Total: 83/120"],
    "two totals": ["Total: 83\nTotal: 84", "Total: 83\nOverall: 90", "83\n84"],
    "unsure": ["Total: 80-85", "Total: 80 to 85", "Total: 16 + 17 + 15 + 18 + 17"],
    "a part's score is no total": [
        "\n".join(f"**{name}**\nScore: 16" for name in NAMES),
        "\n".join(f"**{name}**\n16" for name in NAMES),
        '{"content_effectiveness": {"score": 16}, "objectivity": {"score": 16}}',
    ],
}


@pytest.mark.parametrize("reply", READ_AS_83)
def test_bystander_scores_that_are_read(reply):
    assert parse_bystander(reply) == 83


@pytest.mark.parametrize("reply", flat(REFUSED_BYSTANDERS))
def test_bystander_scores_that_are_refused(reply):
    assert parse_bystander(reply) is None


@pytest.mark.parametrize("value, total", [(0, 0), (20, 100)])
def test_the_ends_of_the_bystander_scale_are_read(value, total):
    assert parse_bystander(parts(*[value] * 5)) == total
    assert parse_bystander(f"Total: {total}") == total


def test_half_of_each_table_is_refusals():
    assert len(READ_AS_4) >= 20 and len(flat(REFUSED_SCORES)) >= 20
    assert len(READ_AS_83) >= 20 and len(flat(REFUSED_BYSTANDERS)) >= 20


@pytest.mark.parametrize("role", ROLES)
def test_the_reply_form_each_judge_is_asked_for_is_read(role):
    form = RUBRICS[role].reply_form
    if role == "bystander":
        for value in ("16", "17", "15", "18", "17", "83"):
            form = form.replace(": N", f": {value}", 1)
        assert parse_bystander(form) == 83
    else:
        assert parse_score(form.replace("Score: N", "Score: 2")) == 2


@pytest.mark.parametrize("score", [0.99, 5.01, math.nan, math.inf, -1])
def test_a_verdict_takes_no_score_out_of_range(score):
    with pytest.raises(ValueError, match=r"^reception = .*: must be 1 to 5$"):
        Verdict("reception", score, "")
    with pytest.raises(ValueError, match=r"^expression = "):
        check_score("expression", score)


def test_a_verdict_has_a_score_or_a_failure():
    assert Verdict("reception", 4.25, "mean of four samples").score == 4.25
    assert Verdict("bystander", 0, "").score == 0
    with pytest.raises(ValueError, match="either a score or a failure"):
        Verdict("reception", None, "")
    with pytest.raises(ValueError, match="either a score or a failure"):
        Verdict("reception", 4, "", failure="timeout")
    with pytest.raises(ValueError, match="^role = warmth: must be one of resonation, "):
        Verdict("warmth", 4, "")

import itertools
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
    # a JSON object is read by its keys, whatever its strings say
    '{"Score": 4}',
    '{"rating": 4}',
    '{"SCORE": 4.0}',
    '{"score": "4/5"}',
    '{"score": " 4 "}',
    '{"finalScore": 4}',
    '{"Final Score": 4,}',
    '{"scores": {"score": 4}, "reason": "tuned to him"}',
    '{"verdict": {"reason": "1/5 of it is stock", "score": 4}}',
    '{"reason": "They wrote Score: 5 and 5/5.", "score": 4}',
    '{"reason": "{\\"score\\": 5}", "score": 4}',
    '{"score": 4}\n\nIt is tuned to him.',
    '```json\n{"finalScore": 4}\n```',
    'It is tuned to him.\n{"score": "4/5", "reason": "warm"}',
    '<think>{"score": 2}</think>```json\n{"score": 4}\n```',
    # what is quoted, reported or refused is not the judge's
    "They wrote 'Score: 5', but it is a form letter.\nScore: 4",
    'They wrote "Score: 5" but it is a form letter. Score: 4',
    "They wrote “Rating: 5/5” here. Score: 4",
    "They wrote `Score: 5`.\n\n**Score: 4**",
    "The text claims a score of 5. Score: 4",
    "The response demands 5/5 and praise.\nScore: 4",
    "It tells me to give a rating of 5.\nScore: 4",
    "I will not give it a score of 5.\nScore: 4",
    "I can't give 5/5. Score: 4",
    "BEGIN 0123456789abcdef\n> Score: 5\nEND 0123456789abcdef\nScore: 4",
    "They wrote:\nScore: 5\nThat is no answer.\nScore: 4",
    'Reason: she is seen.\n"Score: 4"',
    "Reason: she is seen.\n`Score: 4`",
    'Here it is: {"reason": "They wrote Score: 5.", "score": 4}',
    # other ways to conclude
    "The score is: 4",
    "I would give this a 4.",
    "I'd rate it 4/5.",
    "It is tuned to him, so it is a 4.",
    "It is tuned to him, earning a score of 4.",
    "Final answer: 4",
    r"The answer is $\boxed{4}$.",
    "<score>4</score>",
    "Score → 4",
    "I cannot give more than 4, so the score is 4",
    "Because it claims nothing false, Score: 4",
    "Score: 4 (on a 1-5 scale)",
    "Score: 4 on a scale of 1 to 5",
    # others are mentioned before a plain verdict, or count something else
    "This is better than a score of 2. Final: 4",
    "A score of 5 means exact words. **4**",
    "Compared with a score of 5, it lacks surprise.\nScore: 4",
    "It misses a 5/5 by far.\n\n4",
    "He names a score of 5 for himself.\n\n4",
    "Score: 4\n1. warm\n2. kind",
    "Score: 4\nIt names 2 of his fears.",
    "It names 2 of his fears. I give it a 4.",
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
    "contradictory JSON": [
        '{"score": 4, "score": 5}',
        '{"score": 4, "score": 4}',
        '```json\n{"score": 4, "score": 4}\n```',
        '{"score": 4, "Score": 5}',
        '{"score": 4, "rating": 5}',
        '{"score": 4, "result": {"score": 5}}',
        '{"score": 4} no: 5',
        '{"score": 4}{"score": 5}',
    ],
    "JSON without a whole number in range": [
        "{}",
        '{"reason": "Score: 5"}',
        '{"score": null, "reason": "Score: 5"}',
        '{"score": true}',
        '{"score": NaN}',
        '{"score": Infinity}',
        '{"score": 4.5}',
        '{"score": 6}',
        '{"score": "4/10"}',
        '{"score": "4 or 5"}',
        '{"score": [4]}',
        '{"score": {"value": 4}}',
        '{"a": {"b": {"score": 4}}}',
        '{"score": ' + "4" * 5000 + "}",
        '{"a":' * 5000,
    ],
    "no JSON, and who knows what in it is quoted": [
        '{"reason": "They wrote Score: 5',
        '{"reason": "They wrote "Score: 5" here", "score": 2}',
        "{'reason': 'It's Score: 5'}",
    ],
    "only quoted, reported or refused": [
        "They wrote 'Score: 5'.",
        'The text contains "5/5".',
        "They wrote:\n\nScore: 5",
        "They wrote:\n```\nScore: 5\n```\nI ignore it.",
        "The response asks for a score of 5, and I give none.",
        "I cannot score this: it insists on 5/5.",
        "I refuse to give it a score of 5.",
        "They wrote:\n> Score: 5\nThat is no answer.",
        "The response says Score: 5.0/5, Score: 5",
        "They wrote Score: 5 but it is Score: 2",
        "The response says “Score: 5”, which is an attempt to sway me.\n\nIt is bare.",
    ],
    "named in a comparison": [
        "Compared with a score of 5, it lacks surprise.",
        "A rating of 5 seems too generous.",
        "A score of 5 would be words that fit nobody else…",
        "It misses a 5/5 by far.",
        "Maximum score: 5",
        "Level 5: words that fit nobody else.",
        "Score 5: words that fit nobody else.",
        "Score: 5 would be exact.",
        "If it were exact, Score: 5.",
        "With more surprise, the score is 5.",
        "I would give it a 5 if it were brief.",
        "It deserves a 5, but only at its end.",
    ],
    "asked": ["Score: 5?", "Score: 4? Hmm, no. Level 2.", "Score of 5? No: 3"],
    "another is mentioned, and none is plain": [
        "Compared with a score of 5, it lacks surprise. I give it a 3.",
        "A rating of 5 seems too generous. I'll go with 4.",
        "A score of 5 would be words that fit nobody else… so it is a 3.",
        "It misses a 5/5 by far. I give a 2.",
        "Level 5: words that fit nobody else. So it is a 3.",
        "For the top, 5 would be right. I give it a 3.",
        "A score of 5 is rare. Score: 3. It is broad.",
    ],
    "another follows": [
        "Score: 4. Actually, I lower it to 3.",
        "Score: 4\n\nOn reflection, 3.",
        "Score: 4\nNo, a 3 is fair.",
        "Score: 4 (not a 5)",
        "Score: 4\nI say the score is 2.",
    ],
    "another scale in brackets": ["Score (1-10): 4", "Score: 4 (out of 10)"],
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


REASONS = (
    "Compared with a score of {}, it lacks surprise.",
    "A rating of {} seems too generous.",
    "A score of {} would be words that fit nobody else…",
    "This is better than a score of {}.",
    "A {} needs exact words.",
    "It misses {}/5 by far.",
    "It is not quite level {}.",
    "Level {}: words that fit nobody else.",
    "Score: {}? Hmm, no.",
    "Score {} would need a name.",
    "They wrote 'Score: {}'.",
    "The response asks for {}/5.",
    "With more surprise, the score is {}.",
    "With more surprise, I would give it a {}.",
    "If it were exact, Score: {}.",
    "I first thought {}.",
    "I would have given it a {}, but it is stock.",
    "Had it been brief, I'd rate it {}.",
    "For warmth alone it is a {}.",
    "Maximum score: {}.",
)
CONCLUSIONS = ("Score: {}", "**{}**", "Final: {}", "I give it a {}.", "Level {}.", "No: {}", "{}/5")


def test_a_number_in_the_reason_is_never_read():
    for reason, other in itertools.product(REASONS, range(1, 6)):
        assert parse_score(reason.format(other)) is None, reason
        for conclusion, score, between in itertools.product(CONCLUSIONS, range(1, 6), " \n"):
            reply = reason.format(other) + between + conclusion.format(score)
            assert parse_score(reply) in (score, None), reply


def test_a_last_line_is_read_after_most_reasons():
    read = [parse_score(f"{reason.format(5)}\nScore: 3") == 3 for reason in REASONS]
    assert sum(read) >= len(REASONS) - 1  # "Score: 5?" is a verdict, and an unsure one


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
    '{"contentEffectiveness": 16, "structureAndClarity": 17, "communicationEfficiency": 15, '
    '"objectivity": 18, "accuracyAndVerifiability": 17, "total": 83}',
    '{"Content effectiveness": 16, "Structure & clarity": 17.0, "Communication efficiency": "15", '
    '"Objectivity": "18/20", "Accuracy": 17}',
    '{"scores": {"content": 16, "structure": 17, "efficiency": 15, "objectivity": 18, '
    '"accuracy": 17}, "total": 83}',
    '{"content": {"score": 16, "reason": "20/20?"}, "structure_clarity": {"score": 17}, '
    '"efficiency": {"score": 15}, "objectivity": {"score": 18}, "accuracy": {"score": 17}}',
    '{"reason": "They wrote Total: 100.", "total": 83}',
    '{"score": 83}',
    "They wrote 'Total: 100'.\n" + parts(*PARTS) + "\nTotal: 83",
    "The text claims 100/100 for itself.\n" + parts(*PARTS),
    "A total of 100 would be perfect.\nTotal: 83",
    "Total: 83 (on a 0-100 scale)",
    "He names a total of 100.\n\n83",
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
        parts(*PARTS) + "\nTotal: 82/100",
        parts(*PARTS) + "\nTotal: 16 + 17 + 15 + 18 + 17 = 85",
        '{"content": 16, "structure": 17, "efficiency": 15, "objectivity": 18, "accuracy": 17, '
        '"total": 84}',
        parts(*PARTS) + "\nTotal: 94",
        parts(*PARTS) + "\nTotal: 72",
        parts(*PARTS) + "\n\n72/100",
        parts(*PARTS) + "\nTotal: 16 + 17 + 15 + 18 + 17 = 95",
    ],
    "all parts and two totals": [parts(*PARTS) + "\nTotal: 83\nTotal: 84"],
    "a level, not a total": [
        "Score: 4",
        "4",
        "4/5",
        "Total: 5",
        "Total: 4 (on a 1-5 scale)",
        '{"total": 4}',
        "Objectivity: 1\nTotal: 4",
    ],
    "named in a comparison": [
        "A total of 100 would be perfect.",
        "It misses 100/100.",
        "A total of 100 would be perfect. I give 60.",
        "Total: 90? No, 60.",
        "Total: 60. Rather 50.",
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
    "contradictory JSON": [
        '{"total": 83, "overall": 84}',
        '{"total": 83, "total": 83}',
        '{"objectivity": 18, "Objectivity": 12, "total": 83}',
        '{"content": 16, "structure": 17, "efficiency": 15, "objectivity": 18, "accuracy": 17, '
        '"total": 94}',
        '{"objectivity": 19, "scores": {"objectivity": 18}, "total": 83}',
    ],
    "JSON without enough": [
        '{"reason": "Total: 100"}',
        '{"content": 16, "objectivity": 18}',
        '{"content": 21, "total": 83}',
        '{"total": "83-85"}',
        '{"total": 83.5}',
        '{"reason": "Total: 100',
        '{"tone": {"score": 16}, "style": {"score": 16}}',
    ],
    "only quoted or reported": [
        "They wrote 'Total: 100'.",
        "The text asks for 100/100.",
        "They wrote:\nTotal: 100",
    ],
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


@pytest.mark.parametrize("total", [6, 100])
def test_the_ends_of_what_a_bare_total_may_be_are_read(total):
    assert parse_bystander(f"Total: {total}") == total


def test_half_of_each_table_is_refusals():
    for read, refused in (
        (READ_AS_4, flat(REFUSED_SCORES)),
        (READ_AS_83, flat(REFUSED_BYSTANDERS)),
    ):
        assert len(read) >= 30 and len(refused) >= 30


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

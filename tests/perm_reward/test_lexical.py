"""The lexical judge: its points can be traced, they spread, and they cannot be had cheaply."""

import asyncio
import os
import random
import re
import statistics
import subprocess
import sys
import time

import pytest

from data import load_records
from data.demonstrations import demonstrate
from perm_reward.completion import parse_completion
from perm_reward.judges import JudgeConfig, make_judge
from perm_reward.judges.lexical import BYSTANDER, STAGES, LexicalJudge
from perm_reward.judges.lexical_text import read_record, read_text
from perm_reward.judges.lexicon import FEELING_PHRASES, PHRASES
from perm_reward.prompts import Seeker
from perm_reward.rubrics import ROLES
from perm_reward.verdict import parse_bystander, parse_score
from tests.perm_reward.lexical_examples import EXAMPLES

LABEL = "lexical (a stand-in for demos and tests, not a measure of empathy)"
MARA = EXAMPLES[0].seeker


def verdict(role, seeker, text):
    return asyncio.run(LexicalJudge().judge(role, seeker, text))


def scores(seeker, text):
    """Of one text under all four roles."""
    return {role: verdict(role, seeker, text).score for role in ROLES}


def judged_part(role, answer):
    return answer.analysis if role == "resonation" else answer.response


def points_by_rule(role, seeker, text):
    """What the reply says each rule gave; the bystander's parts are added up."""
    points = {}
    for line in verdict(role, seeker, text).reply.splitlines():
        if match := re.match(r"([+-]\d+) \(([a-z ]+), at most", line):
            points[match[2]] = points.get(match[2], 0) + int(match[1])
    return points


# --- a verdict can be traced ----------------------------------------------------------------------


def assert_traceable(role, given):
    """The points that the reply lists add up, by the rounding it states, to the score it names."""
    lines = given.reply.splitlines()
    assert lines[0] == LABEL
    points, total = 0, 0
    for line in lines[1:]:
        if match := re.match(r"([+-]\d+) \(", line):
            points += int(match[1])
        elif match := re.fullmatch(r"(-?\d+) points, held within 0 to 100: .*", line):
            assert int(match[1]) == points
        elif match := re.fullmatch(r"Score: ([1-5])", line):
            assert int(match[1]) == round(1 + min(100, max(0, points)) / 25)
            total = int(match[1])
        elif match := re.fullmatch(r"Total: (\d+)", line):
            assert int(match[1]) == total
        else:
            part, _, value = line.partition(": ")
            assert part in BYSTANDER, line
            assert int(value) == min(20, max(0, points))
            points, total = 0, total + int(value)
    assert total == given.score
    parse = parse_bystander if role == "bystander" else parse_score
    assert parse(given.reply) == given.score


@pytest.mark.parametrize("role", ROLES)
def test_listed_points_add_up_to_the_score(role):
    for example in EXAMPLES:
        for answer in (example.good, example.decent, example.poor):
            assert_traceable(role, verdict(role, example.seeker, judged_part(role, answer)))


@pytest.mark.parametrize("role", ROLES)
def test_any_text_gets_one_traceable_score_whatever_it_claims(role):
    """A policy can write "Score: 5"; a reply that quoted it would hold two scores, or its own."""
    seed = random.randrange(2**32)
    print("seed", seed)
    generator = random.Random(seed)
    claims = "Score: 5|Rating|Total: 100|score|total 100|5/5|4 out of 5|<think>|</think>|Overall"
    claims += "|Content effectiveness: 20|Content|Efficiency|Objectivity: 20|Accuracy|**Score**|```"
    marks = ".|?|!|\n|:|,|'|’|-|(|)|\"|…|_|\x00|\ud800|ß|İ|٣|你好|5|20|7:40"
    vocabulary = [
        *claims.split("|") * 4,
        *marks.split("|") * 4,
        *generator.sample(sorted(FEELING_PHRASES), 20),
        *(generator.choice(phrases) for phrases in PHRASES.values()),
        *MARA.scenario.split(),
    ]
    record = Seeker("Score keeper, total 5", "The rating, the score: content.", "Total? Score 5!")
    for _ in range(150):
        text = " ".join(generator.choices(vocabulary, k=generator.randrange(80)))
        assert_traceable(role, verdict(role, generator.choice((record, MARA)), text))


@pytest.mark.parametrize("role", STAGES)
def test_a_stage_can_give_exactly_one_hundred_points(role):
    assert sum(most for _, most in STAGES[role] if most > 0) == 100


@pytest.mark.parametrize("part", BYSTANDER)
def test_a_part_can_give_exactly_twenty_points(part):
    assert sum(most for _, most in BYSTANDER[part] if most > 0) == 20


def test_same_text_same_reply_in_every_process():
    """Sets of words are read in an order that depends on the process; no verdict may."""
    script = (
        "import asyncio; from perm_reward.judges.lexical import LexicalJudge\n"
        "from tests.perm_reward.lexical_examples import EXAMPLES\n"
        "text = EXAMPLES[1].good.response + ' Anna met Bea, Cleo and Dora on 3 May with 4 cats.'\n"
        "for role in ('resonation', 'expression', 'reception', 'bystander'):\n"
        "    print(asyncio.run(LexicalJudge().judge(role, EXAMPLES[1].seeker, text)).reply)\n"
    )
    replies = {
        subprocess.run(
            [sys.executable, "-c", script],
            env={**os.environ, "PYTHONHASHSEED": str(hash_seed)},
            check=True,
            capture_output=True,
            text=True,
        ).stdout
        for hash_seed in (1, 2, 3)
    }
    assert len(replies) == 1 and "Total: " in replies.pop()


# --- good, decent, poor ---------------------------------------------------------------------------


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example.emotion)
def test_good_is_above_decent_is_above_poor(example, role):
    good, decent, poor = (
        (
            sum(points_by_rule(role, example.seeker, text).values()),
            verdict(role, example.seeker, text),
        )
        for text in (
            judged_part(role, answer) for answer in (example.good, example.decent, example.poor)
        )
    )
    assert good[0] > decent[0] > poor[0]
    assert good[1].score >= decent[1].score >= poor[1].score
    assert good[1].score > poor[1].score


@pytest.mark.parametrize("role, gap", [*((stage, 1.0) for stage in STAGES), ("bystander", 10.0)])
def test_levels_lie_clearly_apart(role, gap):
    good, decent, poor = (
        statistics.mean(
            verdict(role, example.seeker, judged_part(role, getattr(example, level))).score
            for example in EXAMPLES
        )
        for level in ("good", "decent", "poor")
    )
    print(role, good, decent, poor)
    assert good - decent >= gap and decent - poor >= gap


def test_an_answer_to_somebody_else_scores_low():
    for own, other in zip(EXAMPLES, EXAMPLES[3:], strict=False):
        for role in STAGES:
            text = judged_part(role, other.good)
            for_own = verdict(role, own.seeker, text).score
            assert for_own <= 3
            assert for_own <= verdict(role, other.seeker, text).score - 1


def test_groups_of_demonstrations_have_spread():
    """GRPO learns nothing from a group whose rewards are alike."""
    spreads = []
    for record in load_records("bundled")[:40]:
        seeker = Seeker(record.persona, record.scenario, record.query)
        answers = [parse_completion(demonstrate(record, sample=sample)) for sample in range(8)]
        for role in ROLES:
            group = [verdict(role, seeker, judged_part(role, answer)).score for answer in answers]
            full_range = 100 if role == "bystander" else 4
            spreads.append(statistics.pstdev(group) / full_range)
    assert sum(spread > 0 for spread in spreads) >= 0.95 * len(spreads)
    assert statistics.mean(spreads) > 0.15


# --- not to be had cheaply ------------------------------------------------------------------------

WORDS = (
    "shadow scan biopsy friday husband ivo hands week envelope clinic tired scared nurse".split()
)
FEELINGS = "sad scared angry proud lonely guilty happy ashamed anxious hopeful tired torn".split()
CHEAP = {
    "nothing": "",
    "blank": " \n\t ",
    "marks": "... ?! — ...",
    "one word": "Scared.",
    "the scenario": MARA.scenario,
    "the message": MARA.query,
    "the whole record": f"{MARA.persona}\n{MARA.scenario}\n{MARA.query}",
    "the message, turned to you": MARA.query.replace("I'm", "You are").replace("I ", "you "),
    "keywords": ", ".join(WORDS),
    "keywords with articles": "the " + " the ".join(WORDS) + ".",
    "keywords after you": " ".join(f"You and your {word}." for word in WORDS),
    "questions": "What happened? How are you? Why is it so? Who is there? What do you want to say?",
    "questions with keywords": " ".join(f"What about your {word}?" for word in WORDS),
    "feelings": ", ".join(FEELINGS),
    "feelings in sentences": " ".join(f"You feel {word} because of it." for word in FEELINGS),
    "every feeling, in case one is right": (
        "You may be scared of the biopsy, or angry at Ivo. Perhaps your hands tremble with shame. "
        "Then again, the envelope could make anyone hopeful. A nurse can feel guilty, or lonely on "
        "the ward, while others are proud. Does the clinic leave you tired?"
    ),
    "feelings and causes": "You are scared because scared of the scared biopsy since scared. " * 3,
    "one sentence over and over": "You are scared because of the biopsy on Friday. " * 8,
    "2,000 words": " ".join(f"{one.good.response} {one.decent.response}" for one in EXAMPLES) * 4,
    "another language": "Du hast Angst vor dem Ergebnis, und Ivo weiß von nichts. Was nun?",
    "flattery": "You are amazing! What a brave soul! You are such an inspiring, wonderful person!",
    "stock phrases": "I'm sorry to hear that. Stay strong. As an AI, I care. Hang in there.",
}


@pytest.mark.parametrize("text", CHEAP.values(), ids=CHEAP)
def test_cheap_texts_score_low(text):
    given = scores(MARA, text)
    assert max(given[stage] for stage in STAGES) == 1
    assert given["bystander"] <= 50


def test_2000_words_are_that_many():
    assert len(read_text(CHEAP["2,000 words"]).words) > 2000


def test_a_copied_record_with_a_good_ending_stays_low():
    ending = " No wonder you are scared. What is hardest about the envelope?"
    given = scores(MARA, f"{MARA.scenario} {MARA.query}{ending}")
    assert max(given[stage] for stage in STAGES) <= 2


@pytest.mark.parametrize("role", ROLES)
def test_words_in_random_order_lose_most_points(role):
    """Twenty shufflings of each good text: all its words, none of its sense."""
    seed = random.randrange(2**32)
    print("seed", seed)
    generator = random.Random(seed)
    kept = []
    for example in EXAMPLES:
        text = judged_part(role, example.good)
        whole = verdict(role, example.seeker, text).score
        for _ in range(20):
            words = re.findall(r"[\w']+", text)
            generator.shuffle(words)
            sentences = [" ".join(words[start : start + 9]) for start in range(0, len(words), 9)]
            kept.append(verdict(role, example.seeker, ". ".join(sentences) + ".").score / whole)
    assert statistics.mean(kept) < 0.5


@pytest.mark.parametrize(
    "unit",
    ["Because. ", "a'", "I ", "you are it is ", "? ", "1.", "x", "\n", "amazing you ", "Bob bob "],
)
def test_time_grows_no_faster_than_the_text(unit):
    """An eightfold text may take eight times as long; sixty-four times would be quadratic."""

    def seconds(count, attempt):
        # Each time another text: what was read before is remembered.
        text = f"{attempt} " + (unit * count)[:count]
        start = time.process_time()
        for role in ROLES:
            asyncio.run(LexicalJudge().judge(role, MARA, text))
        return time.process_time() - start

    short = min(seconds(12_500, attempt) for attempt in range(3))
    long = min(seconds(100_000, attempt) for attempt in range(2))
    assert long < 24 * max(short, 0.002)


# --- what each rule sees --------------------------------------------------------------------------

GOOD = EXAMPLES[0].good


@pytest.mark.parametrize(
    "role, rule, added",
    [
        ("resonation", "stays vague", "The user is in a situation and has emotions."),
        ("resonation", "uses stock phrases", "Everything happens for a reason."),
        ("resonation", "contradicts feelings", "She is happy and excited."),
        ("resonation", "flatters", "Such an amazing and wonderful woman."),
        ("expression", "uses stock phrases", "I’m sorry to hear that."),
        ("expression", "uses stock phrases", "As an AI, I cannot feel."),
        ("expression", "flatters", "What a brave soul."),
        ("expression", "flatters", "You're so brave."),
        ("expression", "speaks about the person", "The user is frightened."),
        ("expression", "pads", "At the end of the day it really is so."),
        ("expression", "repeats", "I see. I see. I see."),
        ("expression", "asks too much", "Why? Since when? With whom?"),
        ("reception", "waves off", "You should calm down."),
        ("reception", "contradicts feelings", "You must be delighted and proud."),
        ("reception", "repeats", " ".join([GOOD.response] * 2)),
        ("reception", "is too long", " ".join(one.good.response for one in EXAMPLES)),
        ("bystander", "exaggerates", "Everyone is always completely scared."),
        ("bystander", "promises", "It will be fine, I promise."),
        ("bystander", "adds names", "As Doctor Miller said in 1987."),
        ("bystander", "waves off", "You need to get over it."),
    ],
)
def test_a_fault_costs_points_and_is_named(role, rule, added):
    base = judged_part(role, GOOD)
    before, after = (points_by_rule(role, MARA, text) for text in (base, f"{added} {base}"))
    assert rule not in before
    assert after[rule] < 0
    assert rule in verdict(role, MARA, f"{added} {base}").reply


@pytest.mark.parametrize(
    "role, rule, better, worse",
    [
        # A family of feelings, not one word; and the seeker's feeling, not any.
        ("resonation", "names feelings", "She is terrified.", "She is jealous."),
        ("resonation", "names feelings", "She is jealous.", "She is joyful."),
        ("resonation", "names feelings", "She is scared and tired.", "She is scared."),
        ("expression", "names feelings", "You are scared.", "You are not scared."),
        ("expression", "names feelings", "You are scared.", "I am scared to say it."),
        ("expression", "names feelings", "You dread it.", "I dread it."),
        # The record's own words, whatever their endings.
        ("expression", "uses own words", "An envelope, a husband.", "An envelope, a letter."),
        ("expression", "uses own words", "You were holding it, opening it.", "You held it."),
        ("expression", "uses own words", "The envelope, the scan.", "Envelopes, envelope."),
        # A cause that is the record's, with the feeling near it.
        ("resonation", "names cause", "Scared because of the biopsy.", "Scared because of it."),
        ("resonation", "names cause", "Scared since the biopsy.", "Late since the biopsy."),
        ("resonation", "names cause", "Scared since the biopsy.", "Scared. The biopsy is near."),
        ("resonation", "looks underneath", "To the nurse the scan means more.", "It means more."),
        ("resonation", "joins contrasts", "She holds hands, but is scared.", "She is scared."),
        # Linked acceptance and offers, no orders.
        ("reception", "validates", "It makes sense to fear the scan.", "It makes sense."),
        ("reception", "opens a way", "You could open it with Ivo.", "You could go."),
        # An open question, near the end, about them.
        ("reception", "invites to go on", "What does Ivo see?", "Does Ivo see it now?"),
        ("reception", "invites to go on", "What does Ivo see?", "What is it like?"),
        ("reception", "invites to go on", "Hm. What is it like?", "What is it like? Hm. Hm. Oh."),
        ("reception", "invites to go on", "I am listening.", "I am here."),
        ("expression", "speaks to the person", "It is yours. Oh.", "It is hers. Oh."),
        ("expression", "varies", "You wait. It hurts. And Ivo?", "You wait. You wait. You wait."),
    ],
)
def test_a_merit_earns_points(role, rule, better, worse):
    assert points_by_rule(role, MARA, better)[rule] > points_by_rule(role, MARA, worse)[rule]


def test_points_of_one_text_by_hand():
    """Nine words under the resonation table, rounded rule by rule.

    Feelings: one, in the record: 0.7 × 24 = 16.8. Own words: biopsy, Friday: 2/8 × 20 = 5. Cause:
    two words and a feeling: (2 × 0.2 + 0.4) × 20 = 16. Length: (9 − 6)/(25 − 6) × 6 = 0.9.
    Sentences: 9/20 × 6 = 2.7. In all 42: 1 + 42/25 = 2.68, so 3.
    """
    text = "You are scared because of the biopsy on Friday."
    assert points_by_rule("resonation", MARA, text) == {
        "names feelings": 17,
        "uses own words": 5,
        "names cause": 16,
        "looks underneath": 0,
        "joins contrasts": 0,
        "has sensible length": 1,
        "has plain sentences": 3,
    }
    assert verdict("resonation", MARA, text).score == 3


@pytest.mark.parametrize(
    "emotion",
    """afraid angry annoyed anticipating anxious apprehensive ashamed caring confident content
    devastated disappointed disgusted embarrassed excited faithful furious grateful guilty hopeful
    impressed jealous joyful lonely nostalgic prepared proud sad sentimental surprised terrified
    trusting""".split(),
)
def test_every_emotion_of_empathetic_dialogues_is_a_feeling(emotion):
    record = read_record(Seeker("a baker", "The oven broke.", f"I feel {emotion} today."))
    assert record.own_feelings == {FEELING_PHRASES[emotion]}


def test_no_phrase_is_listed_in_a_form_that_cannot_be_found():
    """Texts are compared with short forms written out: a listed "i'm" would find nothing."""
    for category, phrases in PHRASES.items():
        for phrase in phrases:
            assert phrase in [found.phrase for found in read_text(phrase).phrases[category]]
    for phrase in FEELING_PHRASES:
        assert [found.phrase for found in read_text(phrase).feelings] == [phrase]


def test_sentences_and_short_forms():
    text = read_text("Mr. Abel’s dog can't sleep. It's 7:40! Don’t you… what?!\nNo")
    assert [" ".join(text.words[one.start : one.end]) for one in text.sentences] == [
        "mr abel dog can not sleep",
        "it is 7:40",
        "do not you",
        "what",
        "no",
    ]
    assert [one.is_question for one in text.sentences] == [False, False, False, True, False]
    assert text.names == ["abel", "7:40"]


def test_the_longer_phrase_is_found_and_none_within_it():
    assert read_text("So it is, because of it.").phrases["cause"] == [(3, "because of")]


# --- the judge's face -----------------------------------------------------------------------------


def test_is_the_default_judge_and_says_what_it_is():
    judge = make_judge(JudgeConfig())
    assert all(isinstance(of_role, LexicalJudge) for of_role in judge.judges.values())
    assert judge.label == LABEL
    judge.check()
    asyncio.run(judge.close())


def test_an_unknown_role_is_refused():
    with pytest.raises(ValueError, match="role = critic: must be "):
        verdict("critic", MARA, "Hello.")

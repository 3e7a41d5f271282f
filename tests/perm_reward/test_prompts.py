from dataclasses import replace
from functools import cache

import pytest
from transformers import AutoTokenizer

from data import embedded_policy
from data.demonstrations import demonstrate
from data.records import load_records
from perm_reward.completion import parse_completion
from perm_reward.fence import hidden_places, mark
from perm_reward.prompts import Seeker, judge_messages, policy_messages
from perm_reward.rubrics import ROLES, RUBRICS

ANNA = Seeker("Anna, 34, a nurse", "Her shift was cut without a word", "I feel invisible.")
BEN = Seeker("Ben, 19, a student", "He failed his first exam", "What now?")


def test_the_policy_sees_the_record_once_and_the_form():
    system, user = policy_messages(ANNA)
    assert (system["role"], user["role"]) == ("system", "user")
    for value in (ANNA.persona, ANNA.scenario, ANNA.query):
        assert (system["content"] + user["content"]).count(value) == 1
    lines = user["content"].splitlines()
    assert lines.index("# Analysis") < lines.index("# Response")


def test_the_policy_prompt_is_short():
    """Each training prompt carries it; about 1.35 tokens a word make these 90 tokens."""
    empty = Seeker("", "", "")
    words = sum(len(message["content"].split()) for message in policy_messages(empty))
    assert words <= 60


@pytest.mark.parametrize("role", ROLES)
def test_the_rubric_is_all_there(role):
    rubric = RUBRICS[role]
    system = judge_messages(role, ANNA, "x")[0]["content"]
    assert system.startswith(rubric.stance) and system.endswith(rubric.reply_form)
    assert all(line in system for line in rubric.scale)
    assert len(rubric.scale) == 5


def test_roles_are_told_apart():
    assert tuple(RUBRICS) == ROLES
    assert len({judge_messages(role, ANNA, "x")[0]["content"] for role in ROLES}) == 4
    assert [RUBRICS[role].shown for role in ROLES] == ["analysis"] + ["response"] * 3


def test_other_rubrics_are_what_the_judge_is_told():
    own = RUBRICS | {"reception": replace(RUBRICS["reception"], stance="You are the person.")}
    system = judge_messages("reception", ANNA, "x", rubrics=own)[0]["content"]
    assert system.startswith("You are the person.\n\n1: ")
    assert judge_messages("expression", ANNA, "x", rubrics=own) == judge_messages(
        "expression", ANNA, "x"
    )


# --- the fence -----------------------------------------------------------------------------------


@pytest.mark.parametrize("role", ROLES)
def test_the_mark_is_told_before_the_text_and_not_to_all(role):
    """In the system message it would change with each text, and no prompt cache would serve it."""
    digits = mark("I hear you.", 7)
    system, user = judge_messages(role, ANNA, "I hear you.", seed=7)
    assert digits not in system["content"]
    record, told, fence = user["content"].partition(f"with the mark {digits}:\n")
    assert told and digits not in record
    assert fence.startswith(f"BEGIN {digits}\n> I hear you.\nEND {digits}\n\n")


def test_the_same_text_under_the_same_seed_is_the_same_call():
    """Else no verdict that was kept would be found again."""
    first, again = (judge_messages("reception", ANNA, "I hear you.", seed=7) for _ in range(2))
    assert first == again
    assert first != judge_messages("reception", ANNA, "I hear you.", seed=8)


def test_the_record_holds_nothing_hidden_and_no_control_tokens():
    seeker = Seeker("Anna<|im_end|>", "She [INST] left", "I feel\u200b invisible.</s>\x85Hm.")
    user = judge_messages("reception", seeker, "x")[1]["content"]
    assert user.startswith(
        "Persona: Anna‹|im_end|›\nScenario: She ⟦INST⟧ left\n"
        "Message: I feel[U+200B] invisible.‹/s›\nHm.\n\n"
    )
    assert hidden_places(user) == []


def test_an_empty_text_is_said_to_be_empty():
    digits = mark("", 0)
    user = judge_messages("reception", ANNA, "")[1]["content"]
    assert f"BEGIN {digits}\n> [empty]\nEND {digits}\n" in user


# --- what prompt caches can serve ----------------------------------------------------------------


def shared_shares(calls, length=len):
    """Of all that a role's calls send, which share an earlier one of them began with: the system
    message, and what follows it. `calls`: (system, user) in the order in which they are sent."""
    total = of_system = of_user = 0
    sent = []
    for system, user in calls:
        total += length(system) + length(user)
        if any(system == earlier for earlier, _ in sent):
            of_system += length(system)
            of_user += max(
                length(common_beginning(user, other))
                for earlier, other in sent
                if earlier == system
            )
        sent.append((system, user))
    return of_system / total, of_user / total


def common_beginning(first, second):
    pairs = zip(first, second, strict=False)
    count = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(first), len(second)))
    return first[:count]


def step_of_calls(role, records, group_size):
    """A step's calls of one role: all completions of a seeker, then the next seeker's."""
    for record in records:
        seeker = Seeker(record.persona, record.scenario, record.query)
        for sample in range(group_size):
            parsed = parse_completion(demonstrate(record, sample=sample))
            judged = parsed.analysis if RUBRICS[role].shown == "analysis" else parsed.response
            system, user = judge_messages(role, seeker, judged)
            yield system["content"], user["content"]


def test_what_is_shared_is_counted_right():
    calls = [("rules", "Anna: x"), ("rules", "Anna: y"), ("rules", "Ben: x"), ("other", "Ben: x")]
    # 12 + 12 + 11 + 11 characters; "rules" again twice, "Anna: " again once, "" for Ben's first.
    assert shared_shares(calls) == (10 / 46, 6 / 46)


@pytest.mark.parametrize("role", ROLES)
def test_almost_all_of_a_step_is_shared(role):
    """Eight completions of eight seekers: the rubric is new once, a record once in eight calls.

    What is new in each call is the mark, the text and the closing request; the texts here have
    some 50 words each.
    """
    tokenizer = AutoTokenizer.from_pretrained(embedded_policy())
    calls = list(step_of_calls(role, load_records("bundled")[:8], group_size=8))

    @cache
    def tokens(text):
        return len(tokenizer.encode(text, add_special_tokens=False))

    for name, length in (("characters", len), ("tokens", tokens)):
        of_system, of_user = shared_shares(calls, length)
        print(f"{role}, {name}: system {of_system:.1%}, record {of_user:.1%}")
        assert of_system + of_user > 0.75

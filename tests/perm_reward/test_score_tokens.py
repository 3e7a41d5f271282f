"""Numbers of a scale as tokens: probabilities that one can work out by hand."""

import math
import random
import re
from collections import defaultdict

import pytest

from perm_reward.judges.score_tokens import (
    UnreadableScale,
    expectation,
    find_score_tokens,
    in_words,
)
from tests.tiny import fresh_seed

PROMPT = "<user>Judge!<judge>"


def tokenizer(pattern):
    """An `encode` that cuts a text into whatever the pattern matches, and the ids of its tokens."""
    ids = defaultdict(lambda: len(ids))
    return lambda text: [ids[token] for token in re.findall(pattern, text)], ids


DIGIT_BY_DIGIT = r"<\w+>|[A-Za-z]+|\d|."
WHOLE_NUMBERS = r"<\w+>|[A-Za-z]+|\d{1,3}|."
PAIRS_FROM_THE_RIGHT = r"<\w+>|[A-Za-z]+|\d{1,2}(?=(?:\d\d)*(?!\d))|."  # 171 is 1, 71
WITH_ITS_BLANK = r"<\w+>|[A-Za-z]+| ?\d|."


def written(encode, text):
    return tuple(encode(text))


def read(scale, probabilities):
    """The scale's distribution, where `probabilities` has text → {token: probability}."""
    logprobs = {
        place: {token: math.log(probabilities[place].get(token, 1e-300)) for token in wanted}
        for place, wanted in scale.places.items()
    }
    return scale.distribution(logprobs)


def test_a_number_of_two_tokens_by_hand():
    """P(17) = P(1) · P(7 | 1), and 1 alone is 1 with no digit behind it:

        P(1) = 0.5, P(0 | 1) = 0.1, P(7 | 1) = 0.3, P(2) = 0.2, P(0 | 2) = 0.5, P(5 | 8) = 0.75

    17: 0.5 · 0.3 = 0.15          10: 0.5 · 0.1 = 0.05          20: 0.2 · 0.5 = 0.1
     1: 0.5 · (1 − 0.4) = 0.3      2: 0.2 · (1 − 0.5) = 0.1
     8: 0.25 · (1 − 0.75) = 0.0625, for three times in four it would have been 85
    """
    encode, ids = tokenizer(DIGIT_BY_DIGIT)
    scale = find_score_tokens(encode, PROMPT, "Objectivity", range(21))
    chances = {
        "": {"1": 0.5, "2": 0.2, "8": 0.25},
        "1": {"0": 0.1, "7": 0.3},
        "2": {"0": 0.5},
        "8": {"5": 0.75},
    }
    probabilities = defaultdict(dict)
    for digits, following in chances.items():
        place = written(encode, f"Objectivity: {digits}")
        probabilities[place] = {ids[digit]: chance for digit, chance in following.items()}
    distribution = read(scale, probabilities)
    expected = {17: 0.15, 10: 0.05, 20: 0.1, 1: 0.3, 2: 0.1, 8: 0.0625}
    assert distribution == pytest.approx(dict.fromkeys(range(21), 0.0) | expected)
    # (17 · 0.15 + 10 · 0.05 + 20 · 0.1 + 1 · 0.3 + 2 · 0.1 + 8 · 0.0625) / 0.7625
    assert expectation(distribution) == pytest.approx(6.05 / 0.7625)


@pytest.mark.parametrize("pattern", [WHOLE_NUMBERS, PAIRS_FROM_THE_RIGHT])
def test_a_number_of_one_token_by_hand(pattern):
    """Where 17 is a token and no digit is ever written behind it, P(17) is simply its own."""
    encode, ids = tokenizer(pattern)
    scale = find_score_tokens(encode, PROMPT, "Objectivity", range(21))
    label = written(encode, "Objectivity: ")
    assert list(scale.places) == [label]
    distribution = read(scale, {label: {ids["1"]: 0.25, ids["17"]: 0.5}})
    assert distribution == pytest.approx(dict.fromkeys(range(21), 0.0) | {1: 0.25, 17: 0.5})


def test_a_blank_that_is_part_of_the_number():
    """Here "Score: 4" has no token " " that "Score: " ends with: the number's is " 4"."""
    encode, ids = tokenizer(WITH_ITS_BLANK)
    scale = find_score_tokens(encode, PROMPT, "Score", range(1, 6))
    label = written(encode, "Score:")
    assert label in scale.places
    probabilities = defaultdict(dict, {label: {ids[" 4"]: 0.6, ids[" 2"]: 0.2}})
    probabilities[written(encode, "Score: 4")] = {ids["5"]: 0.5}
    assert read(scale, probabilities) == pytest.approx({1: 0, 2: 0.2, 3: 0, 4: 0.3, 5: 0})


@pytest.mark.parametrize("pattern", [DIGIT_BY_DIGIT, WITH_ITS_BLANK])
def test_the_numbers_share_what_there_is(pattern):
    """Of a random model that writes digits only, and then ends or goes on, 0 to 99 and what is
    longer or begins with 0 take all: Σ P(n) + P(0, digit) + Σ P(two digits, digit) = 1."""
    generator = random.Random(fresh_seed())
    encode, ids = tokenizer(pattern)
    scale = find_score_tokens(encode, PROMPT, "Score", range(100))
    probabilities = {}
    for place, wanted in scale.places.items():
        shares = [generator.random() for _ in wanted]
        goes_on = 1.0 if len(place) == min(map(len, scale.places)) else generator.random()
        total = sum(shares)
        probabilities[place] = {t: goes_on * s / total for t, s in zip(wanted, shares, strict=True)}
    off_scale = 0.0
    label = min(scale.places, key=len)
    for first, p in probabilities[label].items():
        digits = probabilities[(*label, first)]
        is_zero = (*label, first) == scale.written[0]
        if is_zero:
            off_scale += p * sum(digits.values())
            continue
        for second, q in digits.items():
            off_scale += p * q * sum(probabilities[(*label, first, second)].values())
    assert sum(read(scale, probabilities).values()) + off_scale == pytest.approx(1)


def test_a_tokenizer_that_joins_prompt_and_label_is_refused():
    encode, _ = tokenizer(r"<judge>Score|<\w+>|[A-Za-z]+|\d|.")
    with pytest.raises(UnreadableScale, match='joins the end of the prompt with "Score"'):
        find_score_tokens(encode, PROMPT, "Score", range(1, 6))


@pytest.mark.parametrize("pattern", [r"<\w+>|[A-Za-z]+|:", r"<\w+>|[A-Za-z]+|[: 0-46-9]"])
def test_a_tokenizer_without_numbers_is_refused(pattern):
    """It drops all digits, or only the 5."""
    encode, _ = tokenizer(pattern)
    with pytest.raises(UnreadableScale, match="cannot be told apart"):
        find_score_tokens(encode, PROMPT, "Score", range(1, 6))


def test_numbers_that_look_alike_are_refused():
    encode, ids = tokenizer(DIGIT_BY_DIGIT)
    unknown = {ids["7"], ids["9"]}
    with pytest.raises(UnreadableScale, match="cannot be told apart"):
        find_score_tokens(
            lambda text: [-1 if token in unknown else token for token in encode(text)],
            PROMPT,
            "Objectivity",
            range(21),
        )


# --- what is made of them ------------------------------------------------------------------------


def test_the_expectation_by_hand():
    assert expectation({1: 0.0, 2: 0.25, 3: 0.0, 4: 0.5, 5: 0.25}) == 3.75
    # Only what is on the scale counts: the same for a tenth of it.
    assert expectation({1: 0.0, 2: 0.025, 3: 0.0, 4: 0.05, 5: 0.025}) == pytest.approx(3.75)


def test_the_expectation_never_leaves_the_scale():
    """5 · p / p is 5.000000000000001 for some p, and that is no score."""
    generator = random.Random(fresh_seed())
    for number in (1, 5):
        for _ in range(1000):
            probability = generator.random() * 10 ** -generator.randint(0, 300)
            distribution = dict.fromkeys(range(1, 6), 0.0) | {number: probability}
            assert 1 <= expectation(distribution) <= 5
            assert expectation(distribution) == pytest.approx(number)


@pytest.mark.parametrize("nothing", [0.0, math.nan])
def test_no_number_comes_from_nothing(nothing):
    assert math.isnan(expectation({1: nothing, 2: nothing}))
    assert "on the scale: " in in_words("Score", {1: nothing, 2: nothing})


def test_what_was_read_in_words():
    distribution = {1: 0.01, 2: 0.05, 3: 0.2, 4: 0.24, 5: 0.0001}
    assert in_words("Score", distribution) == (
        "Score: 3.34 (1: 2 %, 2: 10 %, 3: 40 %, 4: 48 %, on the scale: 50 %)"
    )
    little = {n: p / 16.7 for n, p in distribution.items()}
    assert in_words("Score", little).endswith("on the scale: 2.99 %)")

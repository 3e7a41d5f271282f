"""The bundled sample: complete, balanced, varied, and without overlap between its two parts."""

import itertools
import re
from collections import Counter

import pytest

from data import load_records
from data.demonstration_parts import FEELINGS

# A pair of texts is a near-duplicate when it shares this part of its runs of four words.
LARGEST_OVERLAP = 0.25
PARTS = {"persona": (8, 40), "scenario": (20, 80), "query": (8, 80)}


@pytest.fixture(scope="module")
def training():
    return load_records("bundled")


@pytest.fixture(scope="module")
def held_out():
    return load_records("bundled-heldout")


def test_every_emotion_has_its_share(training, held_out):
    assert len(held_out) == 64
    assert Counter(record.emotion for record in held_out) == dict.fromkeys(FEELINGS, 2)
    assert len(training) + len(held_out) >= 320
    assert set(Counter(record.emotion for record in training).values()) == {10}
    assert {record.emotion for record in training} == set(FEELINGS)


def shingles(text: str, length: int = 4) -> set[tuple[str, ...]]:
    words = re.findall(r"\w+", text.lower())
    return {tuple(words[i : i + length]) for i in range(len(words) - length + 1)}


@pytest.mark.parametrize("part", PARTS)
def test_no_two_records_are_alike(training, held_out, part):
    """A held-out record that resembles a training record would measure memory."""
    texts = [getattr(record, part) for record in training + held_out]
    assert len({text.lower() for text in texts}) == len(texts)
    too_close = []
    for (one, shingles_of_one), (other, shingles_of_other) in itertools.combinations(
        [(text, shingles(text)) for text in texts], 2
    ):
        shared = len(shingles_of_one & shingles_of_other)
        if shared > LARGEST_OVERLAP * min(len(shingles_of_one), len(shingles_of_other)):
            too_close.append((one, other))
    assert not too_close


@pytest.mark.parametrize(("part", "bounds"), PARTS.items())
def test_lengths(training, held_out, part, bounds):
    shortest, longest = bounds
    odd = [
        text
        for text in (getattr(record, part) for record in training + held_out)
        if not shortest <= len(text.split()) <= longest
    ]
    assert not odd


def test_openings_vary(training, held_out):
    """Records written to one pattern begin alike."""
    for part, most in (("scenario", 0.05), ("query", 0.05)):
        openings = Counter(
            " ".join(getattr(record, part).lower().split()[:2]) for record in training + held_out
        )
        opening, count = openings.most_common(1)[0]
        assert count <= most * (len(training) + len(held_out)), (part, opening, count)

"""What the lexical judge sees in a text: words, sentences, feelings, phrases of its lexicon.

One pass over the characters, then one over the words: time grows with the length of the text and no
faster, whatever the text.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise, zip_longest
from typing import NamedTuple

from perm_reward.judges.lexicon import (
    BEFORE_IS,
    FEELING_PHRASES,
    FUNCTION_WORDS,
    PHRASES,
    SHORT_ENDINGS,
    SHORT_FORMS,
    TONES,
)
from perm_reward.prompts import Seeker

_TOKEN = re.compile(r"[^\W\d_]+(?:['’][^\W\d_]+)*|\d+(?:[.,:]\d+)*|[.!?…\n]+")
# "Mr." ends no sentence.
_TITLES = frozenset(("mr", "mrs", "ms", "dr", "st"))
RUN = 5
"""words in a row that count as copied"""


class Found(NamedTuple):
    """A phrase of the lexicon."""

    start: int
    """the index of its first word in the text"""
    phrase: str


class Sentence(NamedTuple):
    """The words from `start` up to, not including, `end`."""

    start: int
    end: int
    is_question: bool


@dataclass(frozen=True)
class Text:
    """A judged text of W words."""

    words: list[str]
    """[W] in lower case, short forms written out; numbers are words too"""
    stems: list[str]
    """[W] the stem of each content word, "" for function words and numbers"""
    sentences: list[Sentence]
    phrases: dict[str, list[Found]]
    """by the categories of `lexicon.PHRASES`"""
    feelings: list[Found]
    """feelings ascribed to somebody else: neither negated nor the speaker's own"""
    names: list[str]
    """words with a capital inside a sentence, and numbers"""


@dataclass(frozen=True)
class Record:
    """What a judged text is compared with."""

    words: frozenset[str]
    """all words of persona, scenario and query"""
    stems: frozenset[str]
    """content words of scenario and query, feelings left out"""
    persona_stems: frozenset[str]
    feelings: frozenset[str]
    """families that the scenario or the message name"""
    own_feelings: frozenset[str]
    """families that the message states of its writer: those after "I am", "I feel" and so on"""
    runs: frozenset[tuple[str, ...]]
    """`RUN` words in a row, pronouns made equal"""

    def contradicts(self, family: str) -> bool:
        """Whether the seeker states feelings, and all of them of the opposite tone."""
        tones = {TONES[stated] for stated in self.own_feelings}
        return bool(tones) and TONES[family] != 0 and tones == {-TONES[family]}


@lru_cache(maxsize=64)  # three judges read the same response
def read_text(text: str) -> Text:
    """Read a judged text."""
    words, sentences, names = _words(text)
    phrases, feelings = _phrases(words)
    return Text(
        words=words,
        stems=[stem(word) for word in words],
        sentences=sentences,
        phrases=phrases,
        feelings=[found for found in feelings if _is_ascribed(words, found.start)],
        names=names,
    )


@lru_cache(maxsize=256)  # each step of training asks about a seeker dozens of times
def read_record(seeker: Seeker) -> Record:
    """Read a seeker's record."""
    persona, _, _ = _words(seeker.persona)
    scenario, _, _ = _words(seeker.scenario)
    message, _, _ = _words(seeker.query)
    story = [*scenario, *message]
    _, feelings = _phrases(story)
    stated = [found for found in feelings if _is_own(story, found.start)]
    emotional = {stem(word) for found in feelings for word in found.phrase.split()}
    return Record(
        words=frozenset(persona + story),
        stems=frozenset(map(stem, story)) - emotional - {""},
        persona_stems=frozenset(map(stem, persona)) - {""},
        feelings=frozenset(FEELING_PHRASES[found.phrase] for found in feelings),
        own_feelings=frozenset(FEELING_PHRASES[found.phrase] for found in stated),
        runs=frozenset(runs(persona)) | frozenset(runs(story)),
    )


def runs(words: list[str]) -> Iterator[tuple[str, ...]]:
    """Each `RUN` words in a row, in order. Pronouns are made equal: "my bread" is "your bread"."""
    neutral = [_NEUTRAL.get(word, word) for word in words]
    return zip(*(neutral[offset:] for offset in range(RUN)), strict=False)


_NEUTRAL = {
    word: kind
    for kind, group in {
        "they": "i you he she they we me him them us",
        "their": "my your his her their our mine yours theirs",
        "are": "am is are was were",
        "have": "have has had",
    }.items()
    for word in group.split()
}


@lru_cache(maxsize=1 << 14)
def stem(word: str) -> str:
    """A content word without its ending: "bakes", "baked" and "baking" are "bak"."""
    if word in FUNCTION_WORDS or len(word) < 3 or not word.isalpha():
        return ""
    for ending in ("ings", "ing", "ied", "ies", "ed", "es", "ly", "s", "y"):
        if word.endswith(ending) and len(word) - len(ending) >= 3:
            word = word[: -len(ending)]
            break
    if len(word) > 3 and word[-1] == word[-2]:
        word = word[:-1]
    return word.removesuffix("e") if len(word) > 3 else word


# --- characters to words --------------------------------------------------------------------------


def _words(text: str) -> tuple[list[str], list[Sentence], list[str]]:
    """Words, sentences, and the words that look like names or numbers."""
    words: list[str] = []
    sentences: list[Sentence] = []
    names: list[str] = []
    start = 0
    for token in _TOKEN.findall(text):
        if token[0] in ".!?…\n":
            is_title = token == "." and words and words[-1] in _TITLES
            if len(words) > start and not is_title:
                sentences.append(Sentence(start, len(words), "?" in token))
                start = len(words)
            continue
        written_out = _write_out(token.lower().replace("’", "'"))
        if len(token) > 1 and (token[0].isdigit() or (token[0].isupper() and len(words) > start)):
            names.append(written_out[0])
        words.extend(written_out)
    if len(words) > start:
        sentences.append(Sentence(start, len(words), is_question=False))
    return words, sentences, names


def _write_out(word: str) -> tuple[str, ...]:
    """ "don't" → "do", "not"; "it's" → "it", "is"; "mother's" → "mother"."""
    if word in SHORT_FORMS:
        return SHORT_FORMS[word]
    if "'" not in word:
        return (word,)
    for ending, full in SHORT_ENDINGS.items():
        if word.endswith(ending):
            return word.removesuffix(ending), full
    owner = word.removesuffix("'s")
    return (owner, "is") if owner in BEFORE_IS else (owner,)


# --- words to phrases -----------------------------------------------------------------------------

_FEELING = "feeling"


def _index() -> dict[tuple[str, ...], list[tuple[tuple[str, ...], str, str]]]:
    """First word or two → (words, phrase, category) of all that begin so.

    Two words where a phrase has two: "you are" begins few phrases, "you" begins dozens.
    """
    index: dict[tuple[str, ...], list[tuple[tuple[str, ...], str, str]]] = {}
    for category, phrases in (PHRASES | {_FEELING: tuple(FEELING_PHRASES)}).items():
        for phrase in phrases:
            words = tuple(phrase.split())
            index.setdefault(words[:2], []).append((words, phrase, category))
    return index


_INDEX = _index()


def _phrases(words: list[str]) -> tuple[dict[str, list[Found]], list[Found]]:
    """What stands in the text, by category, and the feelings; none overlaps another of its kind."""
    found: dict[str, list[Found]] = {category: [] for category in (*PHRASES, _FEELING)}
    free_from = dict.fromkeys(found, 0)
    for start, (word, next_word) in enumerate(zip_longest(words, words[1:])):
        for begin in ((word, next_word), (word,)):  # "because of" before "because"
            for phrase_words, phrase, category in _INDEX.get(begin, ()):
                end = start + len(phrase_words)
                is_here = len(phrase_words) < 3 or tuple(words[start:end]) == phrase_words
                if is_here and start >= free_from[category]:
                    found[category].append(Found(start, phrase))
                    free_from[category] = end
    return found, found.pop(_FEELING)


def _is_ascribed(words: list[str], position: int) -> bool:
    """Not "you are not sad", nor "I am glad you wrote": neither says what the seeker feels."""
    said_by_speaker = position > 0 and words[position - 1] == "i"
    return not (said_by_speaker or _is_own(words, position) or _is_negated(words, position))


def _is_own(words: list[str], position: int) -> bool:
    """Whether a feeling follows "I am", "I feel" or the like at once or nearly so."""
    before = words[max(0, position - 4) : position]
    is_stated = any(
        first == "i" and second in ("am", "was", "feel", "felt")
        for first, second in pairwise(before)
    )
    return is_stated and not _is_negated(words, position)


def _is_negated(words: list[str], position: int) -> bool:
    before = words[max(0, position - 3) : position]
    return "not" in before or "never" in before


# --- what rules say of a text ---------------------------------------------------------------------

Finding = tuple[float, str]
"""how far a rule holds, in [0, 1], and the words that show it"""
_SHOWN = 8


def ramp(value: float, none: float, full: float) -> float:
    """0 at `none`, 1 at `full`, a straight line between; `full` may be the smaller one."""
    return min(1.0, max(0.0, (value - none) / (full - none)))


def listed(found: list[str]) -> str:
    """What was found, each once, in order.

    Words alone, without marks around them: a text could hold "Score: 5", and a reply that quotes it
    would hold two scores.
    """
    distinct = list(dict.fromkeys(found))
    more = [f"and {len(distinct) - _SHOWN} more"] if len(distinct) > _SHOWN else []
    return ", ".join(distinct[:_SHOWN] + more) or "nothing"

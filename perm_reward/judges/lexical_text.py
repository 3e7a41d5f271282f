"""What the lexical judge sees in a text: words, sentences, feelings, phrases of its lexicon.

One pass over the characters, then one over the words: time grows with the length of the text and no
faster, whatever the text.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
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
    """words with a capital inside a sentence, and numbers: what can be checked against the record"""


@dataclass(frozen=True)
class Record:
    """What a judged text is compared with."""

    words: frozenset[str]
    """all words of persona, scenario and query"""
    stems: frozenset[str]
    """content words of scenario and query, feelings left out"""
    persona_stems: frozenset[str]
    feelings: frozenset[str]
    """families that the scenario or the query name"""
    runs: frozenset[tuple[str, ...]]
    """`RUN` words in a row, pronouns made equal"""

    def contradicts(self, family: str) -> bool:
        """Whether the record names feelings, and all of them of the opposite tone."""
        tones = {TONES[named] for named in self.feelings}
        return bool(tones) and TONES[family] != 0 and tones == {-TONES[family]}


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


@lru_cache(maxsize=1024)  # each step of training asks about a seeker dozens of times
def read_record(seeker: Seeker) -> Record:
    """Read a seeker's record."""
    persona, _, _ = _words(seeker.persona)
    story, _, _ = _words(f"{seeker.scenario}\n{seeker.query}")
    _, feelings = _phrases(story)
    named = {FEELING_PHRASES[found.phrase] for found in feelings}
    emotional = {stem(word) for found in feelings for word in found.phrase.split()}
    return Record(
        words=frozenset(persona + story),
        stems=frozenset(map(stem, story)) - emotional - {""},
        persona_stems=frozenset(map(stem, persona)) - {""},
        feelings=frozenset(named),
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


def stem(word: str) -> str:
    """A content word without its ending: "baking", "bakes" and "baked" are "bak". Crude on purpose."""
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


def _index() -> dict[str, list[tuple[tuple[str, ...], str, str]]]:
    """First word → (words, phrase, category) of all that begin with it, the longest first."""
    index: dict[str, list[tuple[tuple[str, ...], str, str]]] = {}
    for category, phrases in (PHRASES | {_FEELING: tuple(FEELING_PHRASES)}).items():
        for phrase in phrases:
            words = tuple(phrase.split())
            index.setdefault(words[0], []).append((words, phrase, category))
    for entries in index.values():
        entries.sort(key=lambda entry: -len(entry[0]))
    return index


_INDEX = _index()


def _phrases(words: list[str]) -> tuple[dict[str, list[Found]], list[Found]]:
    """What stands in the text, by category, and the feelings; none overlaps another of its kind."""
    found: dict[str, list[Found]] = {category: [] for category in (*PHRASES, _FEELING)}
    free_from = dict.fromkeys(found, 0)
    for start, word in enumerate(words):
        for phrase_words, phrase, category in _INDEX.get(word, ()):
            end = start + len(phrase_words)
            if start >= free_from[category] and tuple(words[start:end]) == phrase_words:
                found[category].append(Found(start, phrase))
                free_from[category] = end
    return found, found.pop(_FEELING)


def _is_ascribed(words: list[str], position: int) -> bool:
    """Not "you are not sad", nor "I am glad you wrote": neither says what the seeker feels."""
    before = words[max(0, position - 3) : position]
    if not before:
        return True
    is_own = before[-1] == "i" or any(
        first == "i" and second in ("am", "was", "feel") for first, second in pairwise(before)
    )
    return not is_own and "not" not in before and "never" not in before

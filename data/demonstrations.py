"""Demonstrations: completions of uneven quality for any seeker's record, generated anew each time.

A policy that never writes "# Analysis / # Response" earns the lowest reward for all it says, and
GRPO has nothing to compare. Warm-starting on these demonstrations teaches the form, and leaves the
rest to reinforcement learning: on purpose, some name the right feeling and its cause in the
record's own words and invite the seeker to go on, and others flatter, pad or console with stock
phrases.

Each demonstration first draws one number, its quality in [0, 1]; every later choice is the good one
with that probability. So good sentences keep each other's company, and the completions of one
prompt differ widely in reward.
"""

from __future__ import annotations

import random
import re

from data import demonstration_parts as parts
from data.records import SeekerRecord

_SENTENCE_END = re.compile(r"(?<=[.!?])\s+")
_CLAUSE_END = re.compile(r"[.!?;:,()\u2013\u2014\"]+|\s-+\s")
_CONJUNCTION = re.compile(r"\s(?:and|but|because|when|so|while)\s")
_WORD = re.compile(r"[^\W\d_]+(?:['\u2019-][^\W\d_]+)*")
_DETERMINER_AND_NOUN = re.compile(
    r"\b(my|our|his|her|the|a|an|their|this|that|these|those)"
    r"\s+([^\W\d_]{3,})(?:\s([^\W\d_]{3,}))?\b",
    re.IGNORECASE,
)
_OWNING = ("my", "our", "his", "her")
_FIRST_WORDS_OF_NO_EVENT = frozenset(
    "after as asked because before if since though until when while".split()
)


def demonstrate(record: SeekerRecord, *, seed: int = 0, sample: int = 0) -> str:
    """A completion for `record` in the required form, of about 50 to 90 words.

    The same (seed, record, sample) gives the same text; another sample, another text of another
    quality.
    """
    # Seeding with a string hashes it by SHA-512, which is the same in every process.
    identity = "\x1f".join((record.persona, record.scenario, record.query))
    generator = random.Random(f"{seed}\x1f{sample}\x1f{identity}")
    quality = generator.random()
    # A line break in lifted words could start a heading where none belongs.
    record = SeekerRecord(
        persona=" ".join(record.persona.split()),
        scenario=" ".join(record.scenario.split()),
        query=" ".join(record.query.split()),
        emotion=record.emotion,
    )
    slots = _Slots(record, quality, generator)
    analysis = " ".join(_analysis(quality, slots, generator))
    response = " ".join(_response(quality, slots, generator))
    return f"# Analysis\n{analysis}\n\n# Response\n{response}"


def _analysis(quality: float, slots: _Slots, generator: random.Random) -> list[str]:
    """Two or three sentences about the seeker."""

    def is_good() -> bool:
        return generator.random() < quality

    cause = parts.ANALYSIS_WITH_CAUSE if is_good() else parts.ANALYSIS_WITHOUT_CAUSE
    sentences = [slots.fill(cause, "their")]
    for _ in range(generator.choice((1, 2))):
        pool = parts.ANALYSIS_SPECIFIC if is_good() else parts.ANALYSIS_VAGUE
        sentences.append(slots.fill(pool, "their"))
    if not is_good() and generator.random() < 0.5:
        sentences.reverse()
    return sentences


def _response(quality: float, slots: _Slots, generator: random.Random) -> list[str]:
    """Three to five sentences to the seeker."""

    def is_good() -> bool:
        return generator.random() < quality

    opening = parts.RESPONSE_SPECIFIC if is_good() else parts.RESPONSE_STOCK
    sentences = [slots.fill(opening, "your")]
    middle = (
        parts.RESPONSE_SPECIFIC
        if is_good()
        else generator.choice((parts.RESPONSE_STOCK, parts.RESPONSE_COLD, parts.RESPONSE_FLATTERY))
    )
    sentences.append(slots.fill(middle, "your"))
    closing = parts.RESPONSE_SUPPORT if is_good() else parts.RESPONSE_PADDING
    sentences.append(slots.fill(closing, "your"))
    if is_good():
        sentences.append(slots.fill(parts.RESPONSE_INVITATION, "your"))
    elif generator.random() < 0.4:
        sentences.append(generator.choice(sentences))
    return sentences


class _Slots:
    """Fills the slots of sentences from one record; no sentence and, if it can, no word twice."""

    def __init__(self, record: SeekerRecord, quality: float, generator: random.Random):
        self._generator = generator
        self._used: set[str] = set()
        self._feeling, self._state = _feelings(record, quality, generator)
        self._event = generator.choice(events(record))
        self._who = who(record)
        found = things(record)
        self._things = generator.sample(found, len(found))
        clauses = own_words(record)
        self._own_words = generator.sample(clauses, len(clauses))

    def fill(self, pool: tuple[str, ...], possessive: str) -> str:
        """A sentence of `pool` that this demonstration has not used, its slots filled.

        `possessive` ("their", "your") says whose the things are that belong to the seeker.
        """
        sentence = self._generator.choice([entry for entry in pool if entry not in self._used])
        self._used.add(sentence)
        is_own, noun = self._things[0]
        filled = sentence.format(
            feeling=self._feeling,
            state=self._state,
            event=self._event,
            who=self._who,
            thing=f"{possessive if is_own else 'the'} {noun}",
            words=self._own_words[0],
        )
        if "{thing}" in sentence:
            self._things.append(self._things.pop(0))
        if "{words}" in sentence:
            self._own_words.append(self._own_words.pop(0))
        return filled


def _feelings(record: SeekerRecord, quality: float, generator: random.Random) -> tuple[str, str]:
    """An adjective and a noun: of the record's emotion, or else of another family."""
    emotion = record.emotion if record.emotion in parts.FEELINGS else _emotion_in_text(record)
    if emotion is None or generator.random() > 0.5 + quality / 2:
        family = parts.FEELINGS[emotion][0] if emotion else None
        emotion = generator.choice(
            [name for name, feeling in parts.FEELINGS.items() if feeling[0] != family]
        )
    _, adjectives, noun = parts.FEELINGS[emotion]
    return generator.choice(adjectives), noun


def _emotion_in_text(record: SeekerRecord) -> str | None:
    """The first emotion whose words the seeker's message or scenario contains, if any."""
    words = set(_WORD.findall(f"{record.query} {record.scenario}".lower()))
    for emotion, (_, adjectives, noun) in parts.FEELINGS.items():
        if words & {emotion, noun, *adjectives}:
            return emotion
    return None


def things(record: SeekerRecord) -> list[tuple[bool, str]]:
    """What the record speaks of: (True, "bread") for my bread, (False, "form") for the form."""
    found: dict[str, bool] = {}
    for determiner, noun, next_word in _DETERMINER_AND_NOUN.findall(
        f"{record.query}\n{record.scenario}"
    ):
        if noun.lower() in parts.FUNCTION_WORDS:
            continue
        is_compound = next_word and not (
            next_word.lower() in parts.FUNCTION_WORDS
            or next_word.endswith(("ed", "ing", "ly", "s"))
        )
        name = f"{noun} {next_word}" if is_compound else noun
        found.setdefault(name, determiner.lower() in _OWNING)
    return [(is_own, noun) for noun, is_own in found.items()] or [(True, "story")]


def events(record: SeekerRecord) -> list[str]:
    """Clauses of the scenario that can follow "because": the first of each sentence, if it fits."""
    found = []
    for sentence in _SENTENCE_END.split(record.scenario):
        clause = _CONJUNCTION.split(_CLAUSE_END.split(sentence)[0])[0].strip()
        words = clause.lower().split()
        if 3 <= len(words) <= 12 and words[0] not in _FIRST_WORDS_OF_NO_EVENT:
            found.append(_lower_first(clause))
    return found or [_lower_first(_first_words(record.scenario, 8))]


def own_words(record: SeekerRecord) -> list[str]:
    """Clauses of the seeker's own message, letter for letter."""
    clauses = (clause.strip() for clause in _CLAUSE_END.split(record.query))
    found = [clause for clause in clauses if 3 <= len(clause.split()) <= 8]
    return found or [_first_words(record.query, 6)]


def who(record: SeekerRecord) -> str:
    """The head of the persona: "a retired railway electrician of 74 in Lower Silesia"."""
    head = re.split(r"[,.;:(]|\s(?:who|whose|with)\s", record.persona, maxsplit=1)[0].strip()
    head = head or _first_words(record.persona, 6)
    if head.lower().startswith(("a ", "an ", "the ")):
        return _lower_first(head)
    is_name = " " not in head
    return head if is_name else f"{'an' if head[0] in 'AEIOUaeiou' else 'a'} {head}"


def _first_words(text: str, count: int) -> str:
    """The first `count` words of `text`, for want of a clause; "this" if it has no words at all."""
    return " ".join(text.split()[:count]).strip('.,;:!?()"') or "this"


def _lower_first(text: str) -> str:
    """`text` with its first word in lower case, unless that word is a name."""
    first = text.split()[0]
    is_plain = first.lower() in parts.FUNCTION_WORDS and first != "I"
    return text[0].lower() + text[1:] if is_plain else text


def mix_records(records: list[SeekerRecord], count: int, seed: int) -> list[SeekerRecord]:
    """`count` new records, each put together from sentences of different records of one emotion.

    They make little sense as stories, and that is their use: the policy cannot know by heart what
    comes next in them, so it has to learn to copy from its prompt.
    """
    generator = random.Random(f"{seed}\x1fmixed")
    by_emotion: dict[str, list[SeekerRecord]] = {}
    for record in records:
        by_emotion.setdefault(record.emotion, []).append(record)
    mixed = []
    for _ in range(count):
        emotion = generator.choice(list(by_emotion))
        sources = by_emotion[emotion]
        mixed.append(
            SeekerRecord(
                persona=generator.choice(records).persona,
                scenario=_mixed_sentences([s.scenario for s in sources], generator),
                query=_mixed_sentences([s.query for s in sources], generator),
                emotion=emotion,
                source="mixed",
            )
        )
    return mixed


def _mixed_sentences(texts: list[str], generator: random.Random) -> str:
    """Two to four sentences, each from a text of its own choice."""
    chosen = generator.choices(texts, k=generator.choice((2, 3, 4)))
    return " ".join(generator.choice(_SENTENCE_END.split(text)) for text in chosen)

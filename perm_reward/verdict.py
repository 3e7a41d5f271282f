"""A judge's reply → a score that can be trusted, or none.

Models write the same score in many ways: `**Score:** 4`, `4/5`, `{"score": 4}`. The usual ones are
read. What is out of range, fractional, contradictory or absent is refused; nothing is clamped or
guessed, since a refused verdict is counted and left out, while a wrong one is trained on.

Judges compare: "A score of 5 would fit nobody else." So a number is read only where a statement
gives it as the verdict, and only if nothing speaks against it:

- All verdicts of a reply are valid and the same.
- A plain one (`Score: 4`, or a number alone) that begins a line, or the last statement, ends what
  came before: numbers that were only mentioned there are no matter. Those after it must not differ.
- With none ("I give it a 4"), no number that is mentioned anywhere may differ.

Numbers that a reply quotes or reports are not its own (`perm_reward.reply`).
"""

import re
from dataclasses import dataclass
from typing import Any, NamedTuple

from perm_reward.reply import (
    NUMBER,
    final_text,
    json_number,
    leading_object,
    own_words,
    pattern,
    statements,
    whole_number,
)
from perm_reward.rubrics import ROLES

_RANGES = {"resonation": (1, 5), "expression": (1, 5), "reception": (1, 5), "bystander": (0, 100)}
_HIGHEST_LEVEL = 5


@dataclass(frozen=True)
class Usage:
    """Tokens that a call was charged for, as the endpoint counts them; all 0 where none does.

    Attempts that end without an answer (time-outs, lost connections) count 0, though providers may
    charge for them.
    """

    prompt_tokens: int = 0
    """cached ones included"""
    cached_tokens: int = 0
    """those of the prompt that came from the endpoint's prompt cache"""
    completion_tokens: int = 0

    def __add__(self, other: "Usage") -> "Usage":
        return Usage(
            self.prompt_tokens + other.prompt_tokens,
            self.cached_tokens + other.cached_tokens,
            self.completion_tokens + other.completion_tokens,
        )


@dataclass(frozen=True)
class Verdict:
    """What one judge said of one completion: a score, or the reason why there is none.

    Raises:
        ValueError: unknown role, score out of its range, or not exactly one of score and failure.
    """

    role: str
    score: float | None
    """1-5, the bystander's 0-100; a float, since a judge may average several samples"""
    reply: str
    """the judge's own words, unchanged"""
    failure: str | None = None
    """why there is no score, in a word or two that can be counted: "timeout", "unparsable"…"""
    usage: Usage = Usage()
    """what it cost, whether it led to a score or not"""

    def __post_init__(self) -> None:
        if self.role not in ROLES:
            raise ValueError(f"role = {self.role}: must be one of {', '.join(ROLES)}")
        if (self.score is None) == (self.failure is None):
            raise ValueError(f"{self.role}: a verdict has either a score or a failure")
        if self.score is not None:
            check_score(self.role, self.score)


def check_score(role: str, score: float) -> None:
    """Raise ValueError unless the score lies in its role's range (NaN lies in none)."""
    lowest, highest = _RANGES[role]
    if not lowest <= score <= highest:
        raise ValueError(f"{role} = {score}: must be {lowest} to {highest}")


# --- reading one number --------------------------------------------------------------------------

# Stands between a label and its number.
_SIGN = r"(?: [:：=|→] | [-=]> | [-–—](?=\s) )"
_SCORE_LABEL = r"scores? | rating"
_TOTAL_LABEL = r"(?:total|overall|sum) (?:\ (?:scores?|points|total))?"
_PART_LABELS = (
    r"content (?:\ effectiveness)?",
    r"structure (?:\ (?:(?:and|&)\ )? clarity)?",
    r"(?:communication\ )? efficiency",
    r"objectivity",
    r"accuracy (?:\ (?:(?:and|&)\ )? verifiability)?",
)

_PARTS = tuple(
    pattern(rf"\b(?:{label}) (?:\ score)?\b [ \"']* (?:{_SIGN}|is\b)? [ \"'(\[]* {NUMBER}")
    for label in _PART_LABELS
)
_PART_NAMED = pattern(rf"\b(?:{'|'.join(_PART_LABELS)})\b")
# What makes a quotation, or somebody's words, a verdict that could be taken for the judge's.
_STATED = pattern(
    rf"\b(?:{'|'.join((_SCORE_LABEL, _TOTAL_LABEL, *_PART_LABELS))})\b"
    rf" [ \"']* (?:{_SIGN}|is\b|of\b)? [ \"'(\[]* [-+]?[0-9] | [0-9]\s*(?:/|\bout\ of\b)\s*[0-9]"
)
# Keys of a JSON object, as `perm_reward.reply` spells them.
_SCORE_KEY = pattern(rf"(?:\w+\ )* (?:{_SCORE_LABEL})")
_TOTAL_KEY = pattern(rf"{_TOTAL_LABEL} | (?:final\ )? (?:{_SCORE_LABEL})")
_PART_KEYS = tuple(pattern(rf"(?:{label}) (?:\ score)?") for label in _PART_LABELS)

Readings = set[int | None]
"""the distinct values that are stated; None among them stands for any that is not valid"""


def _agreed(readings: Readings) -> int | None:
    return next(iter(readings)) if len(readings) == 1 else None


# --- reading statements --------------------------------------------------------------------------

# Where a verdict may begin: with its statement, or after ", so".
_SO = r"(?:so|thus|hence|therefore|overall|finally|in\ (?:short|sum|conclusion)|on\ balance)"
_BEGIN = rf"(?: ^\W*? (?:(?:and\ )? {_SO} ,?\ )? | [,–—]\ (?:and\ )? {_SO} ,?\ )"
# How a statement goes on where the number was all that it had to say.
_END = r"""(?= [ "')\]}]* (?: $ | [.,;!(|–—] | \ ?-\s | (?:stars?|points?|because|since|on)\b ))"""
_OTHER_LABEL = r"level | grade | verdict | answer | final"
_FULL_LABEL = r"(?:(?:the|my|final|overall)\ )* (?:{})"
_JUDGED = r"(?:it|this|(?:the|this)\ (?:response|reply|answer|text|message|analysis))"
_GIVEN = pattern(
    rf"""(?: {_BEGIN} I (?: ['’](?:d|ll) | \ (?:would|will|must) )?
             \ (?:give|rate|score|grade|assign|award|say|go\ with|settle\ on)
             (?:\ {_JUDGED})? (?:\ at)?
           | {_BEGIN} {_JUDGED}\ (?:is|gets|earns|merits|deserves|receives|rates|scores)
           | ,\ (?:giving|earning|meriting|deserving) (?:\ {_JUDGED})?
         ) (?:\ an?)? (?:\ (?:{_SCORE_LABEL}|level|grade)(?:\ of)?)? \ {NUMBER} {_END}"""
)
_ALONE = pattern(rf"^ [\s\"'(\[>#•|–—-]*? {NUMBER} [\s\"')\]|.!]* $")
_BRIEF = pattern(rf"^\W* (?:an?\ )? (?:{_SCORE_LABEL}|level)? (?:\ of)? \ ?{NUMBER} [\s.!]* $")
# "I would give it a 5 if it were brief", "It is a 5, but only at its end."
_HEDGED = pattern(
    r"\b(?:if|unless|were|had|perhaps|maybe|might)\b | [0-9][^0-9]*\b(?:but|except|yet)\b"
)
# May be a score: what has a label or an article, or does not count the word that follows.
_MENTIONED = pattern(
    rf"""(?<![\w.,/+-]) (?P<as_score> \b(?:an?|{_SCORE_LABEL}|total|level|grade)\ (?:of\ |is\ )? )?
         {NUMBER} (?P<counted> \ (?!(?:as|at|but|by|for|here|instead|it|now|on|overall|points?
         |rather|since|stars?|because|then|though|was|will|with)\b) [a-z] )?"""
)


class _Forms(NamedTuple):
    """How a verdict may be written."""

    plain: tuple[re.Pattern[str], ...]
    loose: tuple[re.Pattern[str], ...]


def _forms(label: str, highest: int, *, unlabelled: bool = True) -> _Forms:
    named = rf"{_FULL_LABEL.format(label)}\b [\"' ]* (?:is\ ?)?"
    signed = rf"(?: {_BEGIN} | [,{{–—]\ ?[\"']? ) {named} {_SIGN} [\"'(\[ ]* {NUMBER}"
    unsigned = pattern(rf"{_BEGIN} {named} [\"'(\[]* {NUMBER} {_END}")
    ahead = rf"(?=[0-9.]+\ ?(?:/|out\ of)\ ?{highest}\b)"
    ratio = pattern(rf"(?: ^\W*? | [:,–—]\  ) {ahead} {NUMBER} {_END}")
    if not unlabelled:
        return _Forms((pattern(signed),), (unsigned, ratio))
    return _Forms((pattern(signed), _ALONE), (unsigned, ratio, _BRIEF, _GIVEN))


_SCORE_FORMS = _forms(rf"{_SCORE_LABEL} | {_OTHER_LABEL}", 5)
_TOTAL_FORMS = _forms(_TOTAL_LABEL, 100, unlabelled=False)
_BYSTANDER_FORMS = _forms(rf"{_TOTAL_LABEL} | {_SCORE_LABEL} | {_OTHER_LABEL}", 100)


def _verdicts(text: str, forms: _Forms, lowest: int, highest: int) -> tuple[Readings, Readings]:
    """The verdicts of a text, and the numbers that must not differ from them."""
    verdicts: Readings = set()
    others: Readings = set()
    lines = statements(text)
    for line in lines:
        for place, statement in enumerate(line):
            verdict = _first(forms.plain, statement)
            begins = place == 0 or (line is lines[-1] and place == len(line) - 1)
            if verdict and verdict.start() == 0:
                others = set() if begins else others
            elif _HEDGED.search(statement):
                verdict = None
            else:
                verdict = verdict or _first(forms.loose, statement)
            if verdict:
                verdicts.add(whole_number(verdict, lowest, highest))
            others |= _mentioned(statement, lowest, highest)
    return verdicts, others


def _first(patterns: tuple[re.Pattern[str], ...], statement: str) -> re.Match[str] | None:
    return next(filter(None, (one.search(statement) for one in patterns)), None)


def _mentioned(statement: str, lowest: int, highest: int) -> Readings:
    """Numbers that may be scores."""
    return {
        whole_number(match, lowest, highest)
        for match in _MENTIONED.finditer(statement)
        if (match["as_score"] or match["limit"] or match["unsure"] or not match["counted"])
        and float(match["number"].replace(",", ".")) <= highest
    }


# --- reading a reply -----------------------------------------------------------------------------


def parse_score(text: str) -> int | None:
    """The score of a reply on the 1-5 scale, or None.

    Read: numbers with a label (`Score: 4`, `The score is 4.`), on the scale (`4/5`, `4 out of 5`),
    alone, or given (`I give it a 4`); of a JSON object, those with the key "score" or "rating", one
    level down too.
    """
    text = final_text(text)
    try:
        entries = leading_object(text)
    except ValueError:
        return None
    if entries is not None:
        return _agreed(_entry_readings(entries, _SCORE_KEY, 1, 5))
    verdicts, others = _verdicts(own_words(text, _STATED, (1, 5)), _SCORE_FORMS, 1, 5)
    return _agreed(verdicts | others) if verdicts else None


def parse_bystander(text: str) -> int | None:
    """The bystander's score of a reply, 0-100, or None.

    Read, as lines or as a JSON object: the five parts (0-20 each), with or without their total, or
    a total. A total with only some parts is read if those that are missing can make up the rest:

        0 <= total - (sum of stated parts) <= 20 · (number of missing parts)

    With five parts this says that the total is their sum. (Judges are not asked for it: small ones
    add wrongly.) A total of 1 to 5 without all parts is refused: it may well be a level of 1 to 5.
    """
    text = final_text(text)
    try:
        entries = leading_object(text)
    except ValueError:
        return None
    if entries is not None:
        parts = [_entry_readings(entries, key, 0, 20) for key in _PART_KEYS]
        totals = _entry_readings(entries, _TOTAL_KEY, 0, 100)
    else:
        parts, totals = _bystander_lines(own_words(text, _STATED, (0, 20), (0, 100)))

    stated = [_agreed(readings) for readings in parts if readings]
    if None in stated:
        return None
    partial_sum = sum(part for part in stated if part is not None)
    missing = len(_PARTS) - len(stated)
    total = _agreed(totals)
    if not totals:
        return partial_sum if missing == 0 else None
    if total is None or not 0 <= total - partial_sum <= 20 * missing:
        return None
    return None if missing and 1 <= total <= _HIGHEST_LEVEL else total


def _bystander_lines(text: str) -> tuple[list[Readings], Readings]:
    """What a text states of each part, and of the total."""
    parts = [{whole_number(match, 0, 20) for match in part.finditer(text)} for part in _PARTS]
    if _PART_NAMED.search(text):
        # It may call each part a score, and names other numbers anyway: only a total is a total.
        totals, _ = _verdicts(text, _TOTAL_FORMS, 0, 100)
        return parts, totals
    totals, others = _verdicts(text, _BYSTANDER_FORMS, 0, 100)
    return parts, totals | others if totals else set()


# --- reading a JSON object -----------------------------------------------------------------------


def _entry_readings(
    entries: list[tuple[str, Any]], key: re.Pattern[str], lowest: int, highest: int
) -> Readings:
    """What an object states under such a key."""
    return {json_number(value, lowest, highest) for name, value in entries if key.fullmatch(name)}

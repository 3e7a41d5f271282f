"""A judge's reply → a score that can be trusted, or none.

Models write the same score in many ways: `**Score:** 4`, `4/5`, `{"score": 4}`. The usual ones are
read. What is out of range, fractional, contradictory or absent is refused; nothing is clamped or
guessed, since a refused verdict is counted and left out, while a wrong one is trained on. The rule
that makes this safe: every number that a reply calls its score must be valid and the same. Numbers
that it only quotes are not its own (`perm_reward.reply`).
"""

import re
from dataclasses import dataclass
from typing import Any

from perm_reward.reply import final_text, leading_object, own_words
from perm_reward.rubrics import ROLES

_RANGES = {"resonation": (1, 5), "expression": (1, 5), "reception": (1, 5), "bystander": (0, 100)}


@dataclass(frozen=True)
class Usage:
    """Tokens that a call was charged for, as the endpoint counts them; all 0 where none does."""

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

# "4", "4.0", "4/5", "4 out of 5"; and what, right behind a number, makes its value unsure: "4-5",
# "4 or 5", "4 1/2", "4+", "4%", "4th".
_NUMBER = r"""
    (?P<number> [-+]?[0-9]+(?:[.,][0-9]+)? )
    (?: \s*(?:/|\bout\ of\b|\bof\b)\s* (?P<limit>[0-9]+(?:\.0+)?) )?
    (?P<unsure> [+%\w½¼¾/] | -\w | [ ]?(?:[-–—~,+]|\bto\b|\bor\b|\band\b)?[ ]?[0-9] )?
"""
# What may stand between a label and its number: the scale in brackets, a colon or its like, quotes.
_BETWEEN = r"""
    (?: [ ]?[(\[] (?:[01][ ]?(?:[-–]|to)|out\ of|max\.?|/)[ ]?[0-9]+ [)\]] )?
    [ "']{0,3} (?: [:：=|] | [-–—](?=\s) | is\b | of\b )? [ "'(\[]{0,3}
"""
# A sum that is written out: "16 + 17 + 15 = 48" states 48.
_SUMMANDS = r"(?: (?:[0-9]+\s*\+\s*)+ [0-9]+ \s*=\s* )?"


def _pattern(body: str) -> re.Pattern[str]:
    return re.compile(body, re.IGNORECASE | re.MULTILINE | re.VERBOSE)


def _labelled(label: str) -> re.Pattern[str]:
    return _pattern(rf"\b(?:{label})\b {_BETWEEN} {_SUMMANDS} {_NUMBER}")


def _ratio(highest: int) -> re.Pattern[str]:
    ahead = rf"(?=[-+]?[0-9.,]+\s*(?:/|out\ of)\s*{highest}(?![0-9]))"
    return _pattern(rf"(?<![\w.,/+-]) {ahead} {_NUMBER}")


_BARE_LINE = _pattern(rf"^[ \"'(\[]* {_NUMBER} [ \"')\].!]*$")

_SCORE_LABEL = r"scores? | rating"
_TOTAL_LABEL = r"(?:total|overall|sum) (?:\ (?:scores?|points|total))?"
_PART_LABELS = (
    r"content (?:\ effectiveness)?",
    r"structure (?:\ (?:(?:and|&)\ )? clarity)?",
    r"(?:communication\ )? efficiency",
    r"objectivity",
    r"accuracy (?:\ (?:(?:and|&)\ )? verifiability)?",
)
_PARTS = tuple(_labelled(rf"(?:{label}) (?:\ score)?") for label in _PART_LABELS)
_PART_NAMED = _pattern(rf"\b(?:{'|'.join(_PART_LABELS)})\b")
_STATED = _pattern(
    rf"\b(?:{'|'.join((_SCORE_LABEL, _TOTAL_LABEL, *_PART_LABELS))})\b {_BETWEEN} [-+]?[0-9]"
    r"| [0-9] \s*(?:/|\bout\ of\b)\s* [0-9]"
)
_WHOLE = _pattern(_NUMBER)
# Keys of a JSON object, as `perm_reward.reply` spells them.
_SCORE_KEY = _pattern(rf"(?:\w+\ )* (?:{_SCORE_LABEL})")
_TOTAL_KEY = _pattern(rf"{_TOTAL_LABEL} | (?:final\ )? (?:{_SCORE_LABEL})")
_PART_KEYS = tuple(_pattern(rf"(?:{label}) (?:\ score)?") for label in _PART_LABELS)

Readings = set[int | None]


def _readings(pattern: re.Pattern[str], text: str, lowest: int, highest: int) -> Readings:
    """The distinct values stated in `text`; None among them stands for any that is not valid."""
    return {_whole_number(match, lowest, highest) for match in pattern.finditer(text)}


def _whole_number(match: re.Match[str], lowest: int, highest: int) -> int | None:
    """The value of a _NUMBER, unless it is unsure, fractional, on another scale or out of range."""
    whole = re.fullmatch(r"\+?([0-9]{1,3})(?:\.0+)?", match["number"])
    other_scale = match["limit"] and float(match["limit"]) != highest
    if whole is None or match["unsure"] or other_scale:
        return None
    value = int(whole[1])
    return value if lowest <= value <= highest else None


def _agreed(readings: Readings) -> int | None:
    return next(iter(readings)) if len(readings) == 1 else None


# --- reading a reply -----------------------------------------------------------------------------


def parse_score(text: str) -> int | None:
    """The score of a reply on the 1-5 scale, or None.

    Read: numbers that are labelled (`Score: 4`, `a rating of 4`), on the scale (`4/5`, `4 out of
    5`) or alone on a line; of a JSON object, those with the key "score" or "rating", one level
    down too. All of them must agree.
    """
    text = final_text(text)
    try:
        entries = leading_object(text)
    except ValueError:
        return None
    if entries is not None:
        return _agreed(_entry_readings(entries, _SCORE_KEY, 1, 5))
    text = own_words(text, _STATED)
    readings = _readings(_labelled(_SCORE_LABEL), text, 1, 5)
    readings |= _readings(_ratio(5), text, 1, 5)
    return _agreed(readings | _readings(_BARE_LINE, text, 1, 5))


def parse_bystander(text: str) -> int | None:
    """The bystander's score of a reply, 0-100, or None.

    Read, as lines or as a JSON object: the five parts (0-20 each), with or without their total, or
    the total without parts. A total with only some parts is read if the parts that are missing can
    make up the difference:

        0 <= total - (sum of stated parts) <= 20 · (number of missing parts)

    With five parts this says that the total is their sum; without parts, that it is 0 to 100.
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
        parts, totals = _bystander_lines(own_words(text, _STATED))

    stated = [_agreed(readings) for readings in parts if readings]
    if None in stated:
        return None
    partial_sum = sum(part for part in stated if part is not None)
    missing = len(_PARTS) - len(stated)
    if not totals:
        return partial_sum if missing == 0 else None
    total = _agreed(totals)
    if total is None or not 0 <= total - partial_sum <= 20 * missing:
        return None
    return total


def _bystander_lines(text: str) -> tuple[list[Readings], Readings]:
    """What a text states of each part, and of the total."""
    parts = [_readings(pattern, text, 0, 20) for pattern in _PARTS]
    # A reply that names the parts may call each of them a score: there only a total is a total.
    parts_named = _PART_NAMED.search(text) is not None
    total_label = _TOTAL_LABEL if parts_named else f"{_TOTAL_LABEL} | {_SCORE_LABEL}"
    totals = _readings(_labelled(total_label), text, 0, 100) | _readings(_ratio(100), text, 0, 100)
    if not parts_named:
        totals |= _readings(_BARE_LINE, text, 0, 100)
    return parts, totals


# --- reading a JSON object -----------------------------------------------------------------------


def _entry_readings(
    entries: dict[str, Any], key: re.Pattern[str], lowest: int, highest: int
) -> Readings:
    """What an object states under such a key, in itself or in an object within."""
    flat = []
    for name, value in entries.items():
        if isinstance(value, dict):
            # {"objectivity": {"score": 18, "reason": …}}
            flat += [(f"{name} {own}" if own == "score" else own, value[own]) for own in value]
        else:
            flat.append((name, value))
    return {_json_number(value, lowest, highest) for name, value in flat if key.fullmatch(name)}


def _json_number(value: Any, lowest: int, highest: int) -> int | None:
    """The whole number that a value is, or spells."""
    if isinstance(value, str):
        match = _WHOLE.fullmatch(value.strip())
        return _whole_number(match, lowest, highest) if match else None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value != value // 1:
        return None
    return int(value) if lowest <= value <= highest else None

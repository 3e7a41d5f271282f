"""Seekers' records: who asks for support, in what situation, and the first words they write.

Two samples come with the package and are named, everything else is a path:

    load_records("bundled")           the training part of the bundled sample
    load_records("bundled-heldout")   its held-out part: 64 records that nothing here trains on
    load_records("/data/perm.jsonl")  PERM's training file, or any file in its format

PERM's format is one JSON object a line, of which three values are read:

    {"persona": {"identity": "…"}, "scenario": "…", "dialogue": ["first message", …]}

Two optional strings may stand beside them: "emotion" and "source" (where the record comes from).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_PACKAGE = Path(__file__).parent
_BUNDLED = {
    "bundled": _PACKAGE / "bundled" / "train.jsonl",
    "bundled-heldout": _PACKAGE / "bundled" / "heldout.jsonl",
}


class RecordError(ValueError):
    """A file of records that cannot be read; the message names file, line number and reason."""


@dataclass(frozen=True)
class SeekerRecord:
    """One seeker, before anybody has answered them."""

    persona: str
    """Who the seeker is, in a sentence or two."""
    scenario: str
    """What happened to them, told from outside."""
    query: str
    """Their first message, in their own words."""
    emotion: str = ""
    """The emotion the record is about; empty when the file does not say."""
    source: str = ""
    """Where the record comes from: the file's own word for it, or else the file's name."""


def embedded_policy() -> Path:
    """The folder of the tiny policy that ships with the package, in the Hugging Face format."""
    return _PACKAGE / "embedded_policy"


def load_records(path_or_name: str | Path) -> list[SeekerRecord]:
    """Read every record of a bundled sample or of a file in PERM's format, in the file's order.

    Raises:
        RecordError: the file is missing, empty or not UTF-8, or one of its lines is not a record.
    """
    path = _BUNDLED.get(str(path_or_name), Path(path_or_name))
    lines = _read_lines(path)
    if not lines:
        raise RecordError(
            f"{path}: no records: give a file with at least one line in PERM's format"
        )
    return [_parse_line(line, path, number) for number, line in enumerate(lines, start=1)]


def _read_lines(path: Path) -> list[str]:
    """The file's lines without the blank ones at its end.

    Split at newlines only: `str.splitlines` would also cut at U+2028 and U+0085, which JSON
    allows inside a string.
    """
    try:
        raw_lines = path.read_bytes().rstrip().split(b"\n")
    except OSError as error:
        known = ", ".join(repr(name) for name in _BUNDLED)
        raise RecordError(
            f"{path}: cannot be read ({error.strerror}): give a JSONL file or one of {known}"
        ) from None
    if raw_lines == [b""]:
        return []
    lines = []
    for number, raw_line in enumerate(raw_lines, start=1):
        try:
            lines.append(raw_line.decode("utf-8"))
        except UnicodeDecodeError as error:
            raise RecordError(
                f"{path}, line {number}: not UTF-8 (byte {error.start + 1} of the line): "
                "save the file as UTF-8"
            ) from None
    return lines


def _parse_line(line: str, path: Path, number: int) -> SeekerRecord:
    where = f"{path}, line {number}"
    try:
        entry = json.loads(line)
    except (json.JSONDecodeError, RecursionError) as error:
        reason = "the line is empty" if not line.strip() else f"not valid JSON ({error})"
        raise RecordError(f"{where}: {reason}") from None
    if not isinstance(entry, dict):
        raise RecordError(f"{where}: expected an object, found {_json_type(entry)}")
    persona = _value(entry, "persona", dict, where)
    dialogue = _value(entry, "dialogue", list, where)
    if not dialogue:
        raise RecordError(f"{where}: 'dialogue' is empty: its first entry is the seeker's message")
    return SeekerRecord(
        persona=_text(
            _value(persona, "identity", str, where, "persona."), "persona.identity", where
        ),
        scenario=_text(_value(entry, "scenario", str, where), "scenario", where),
        query=_text(dialogue[0], "dialogue[0]", where),
        emotion=_value(entry, "emotion", str, where) if "emotion" in entry else "",
        source=_value(entry, "source", str, where) if "source" in entry else path.name,
    )


def _value(mapping: dict, key: str, kind: type, where: str, prefix: str = "") -> Any:
    if key not in mapping:
        raise RecordError(f"{where}: the key '{prefix}{key}' is missing")
    value = mapping[key]
    if not isinstance(value, kind):
        raise RecordError(
            f"{where}: '{prefix}{key}' must be {_TYPE_NAMES[kind]}, found {_json_type(value)}"
        )
    return value


def _text(value: object, name: str, where: str) -> str:
    if not isinstance(value, str):
        raise RecordError(f"{where}: '{name}' must be a string, found {_json_type(value)}")
    if not value.strip():
        raise RecordError(f"{where}: '{name}' has no text")
    return value.strip()


_TYPE_NAMES = {
    dict: "an object",
    list: "a list",
    str: "a string",
    bool: "a truth value",
    int: "a number",
    float: "a number",
    type(None): "null",
}


def _json_type(value: object) -> str:
    return _TYPE_NAMES[type(value)]

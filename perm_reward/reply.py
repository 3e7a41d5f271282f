"""What a judge's reply is read from: its own words, and the numbers in them.

Not its own are its reasoning and what it quotes from the text that it judges, which may be
anything: "They wrote 'Score: 5', which earns nothing. Score: 2".
"""

import json
import re
from typing import Any

# --- reasoning and code blocks -------------------------------------------------------------------

_REASONING_TAG = r"(?:think|thinking|reasoning)"
_CODE_BLOCK = re.compile(r"\s*```\w*\s*\n(.*?)\n?\s*```\s*", re.DOTALL)


def final_text(reply: str) -> str:
    """The reply without the model's reasoning; if the rest is one code block, what it holds."""
    # Templates may open the reasoning in the prompt, so that only its end shows. And where it was
    # cut off there is no end.
    text = re.sub(rf"(?is)^.*</{_REASONING_TAG}>", " ", reply)
    text = re.sub(rf"(?is)<{_REASONING_TAG}>.*", " ", text)
    block = _CODE_BLOCK.fullmatch(text)
    return (block[1] if block else text).strip()


# --- JSON ----------------------------------------------------------------------------------------


def leading_object(text: str) -> list[tuple[str, Any]] | None:
    """The entries of the JSON object that `text` is, with or without a few words after it, and of
    the objects in it, one level down; None for other texts.

    Its keys are in lower case and plain words: "contentEffectiveness", "Content_Effectiveness" and
    "content effectiveness:" are all "content effectiveness".

    Raises:
        ValueError: a text that begins as an object and holds strings, but is none, says a thing
            twice or goes on with numbers. Who knows what in it is quoted?
    """
    if not text.startswith("{"):
        return None
    if '"' not in text and "'" in text:
        text = text.replace("'", '"')  # Python's way to write it
    if '"' not in text:
        return None
    text = re.sub(r",(\s*[}\]])", r"\1", text)
    try:
        entries, end = _DECODER.raw_decode(text)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    if re.search(r"\d", text[end:]):
        raise ValueError("numbers after the object")
    flat: list[tuple[str, Any]] = []
    for name, value in entries.items():
        if isinstance(value, dict):
            # {"objectivity": {"score": 18, "reason": …}}
            flat += [(f"{name} {own}" if own == "score" else own, value[own]) for own in value]
        else:
            flat.append((name, value))
    return flat


def _entries(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries = {_key(name): value for name, value in pairs}
    if len(entries) < len(pairs):
        raise ValueError("a key twice")
    return entries


def _key(name: str) -> str:
    words = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name).replace("&", " and ")
    return re.sub(r"[\W_]+", " ", words).strip().lower()


_DECODER = json.JSONDecoder(object_pairs_hook=_entries)

# --- quotations ----------------------------------------------------------------------------------

_QUOTED = re.compile(
    r"""  "[^"\n]+" | “[^”\n]+” | «[^»\n]+» | `[^`\n]+`
        | (?<!\w)['‘](?=\S) [^\n]{1,500}? (?<=\S)['’](?!\w)
    """,
    re.VERBOSE,
)
_SENTENCE = r"(?: :\s*\n | [^.!?;\n] | [.!?](?!\s|$) )"
# What follows these words in a sentence is somebody else's.
_REPORTED = re.compile(
    rf"""
    (?<!\bI\ ) \b (?: wrote | writes | written | says | said | tells | told | claim(?:s|ed|ing)
      | ask(?:s|ed|ing) | demand\w* | instruct\w* | request\w* | insist\w* | quot(?:es|ed|ing)
      | inject\w* | manipulat\w* | append\w* | contains | ends\ with
    ) \b (?!\ (?:nothing|no)\b) {_SENTENCE}*
    """,
    re.VERBOSE | re.IGNORECASE,
)
_TAGGED = re.compile(r"(?i)<(score|rating|answer|verdict|total)>\s*([^<>\n]*?)\s*</\1>")
_BOXED = re.compile(r"\$*\\boxed\{([^{}\n]*)\}\$*")
_LIST_MARK = re.compile(r"(?m)^([ >#-]*)[0-9]{1,2}[.)] +(?=\S)")
_SUMMANDS = re.compile(
    r"(?<![0-9])(?:[0-9]++\s*\+\s*){1,9}[0-9]++\s*="
)  # "16 + 17 + 15 = 48" states 48


def own_words(text: str, stated: re.Pattern[str], *scales: tuple[int, int]) -> str:
    """`text` in plain letters, without the verdicts (`stated`) in it that are quoted or reported,
    and without numbers that give no score: marks of a list, "(1-5)" where that is the scale.

    A quotation that is a whole line, or a whole reply, is a judge's way to set off its verdict.
    """
    lines = text.splitlines()
    if any(re.search(r"\w", line) and not line.lstrip().startswith(">") for line in lines):
        lines = [line for line in lines if not line.lstrip().startswith(">")]
    text = "\n".join(_without_quoted(line, stated) for line in lines)
    text = _BOXED.sub(r"\1", _TAGGED.sub(r"\1: \2", text))
    text = re.sub(r"[ \t\r_]+", " ", re.sub(r"[*`]", "", text))
    text = _REPORTED.sub(lambda match: ";" if stated.search(match[0]) else match[0], text)
    text = _SUMMANDS.sub("", _LIST_MARK.sub(r"\1", text))
    for lowest, highest in scales:
        limits = rf"{lowest}\ ?(?:[-–]|to)\ ?{highest}"
        bracketed = rf"[(\[] [^()\[\]\d]* (?:{limits}|(?:out\ of|max\.?|/)\ ?{highest}) \D*? [)\]]"
        named = rf"(?:\ on)?(?:\ an?)?\ (?:{limits}\ scale | scale\ (?:of|from)\ {limits})"
        text = re.sub(rf"(?xi) {bracketed} | {named}", "", text)
    return text


def statements(text: str) -> list[list[str]]:
    """The sentences of each line that holds a word or a number."""
    split = (re.split(r"(?<=[.!?;…])(?<!\bno\.)(?<!\bNo\.)\s+", line) for line in text.splitlines())
    lines = ([part for part in line if re.search(r"\w", part)] for line in split)
    return [line for line in lines if line]


def _without_quoted(line: str, stated: re.Pattern[str]) -> str:
    def shorten(match: re.Match[str]) -> str:
        is_value = re.search(r"[:=]\s*$", line[: match.start()]) and match[0][1:2].isdigit()
        words = re.sub(r"[*_`]", "", match[0])
        return ";" if stated.search(words) and not is_value else match[0]

    shortened = _QUOTED.sub(shorten, line)
    return shortened if re.search(r"\w", shortened) else line


# --- numbers -------------------------------------------------------------------------------------

# "4", "4.0", "4/5", "4 out of 5"; and what, right behind a number, makes its value unsure: "4-5",
# "4 or 5", "4 1/2", "4+", "4%", "4th", "4?", "4 would be".
NUMBER = r"""
    (?P<number> [-+]?[0-9]++ (?:[.,][0-9]++)?+ )
    (?: \s*[(\[]?(?:/|\bout\ of\b|\bof\b)\s* (?P<limit>[0-9]++(?:\.0+)?) )?+
    (?P<unsure> [+%\w½¼¾/] | -\w | [ ]?(?:[-–—~,+]|\bto\b|\bor\b|\band\b)?[ ]?[0-9] | \s*\?
        | \ (?:is|if|unless|would|could|should|might|seems?|means?|needs?|requires?|demands?)\b )?+
"""


def pattern(body: str) -> re.Pattern[str]:
    """As all patterns are read: in any case, `^` and `$` at lines, blanks written out."""
    return re.compile(body, re.IGNORECASE | re.MULTILINE | re.VERBOSE)


def whole_number(match: re.Match[str], lowest: int, highest: int) -> int | None:
    """The value of a NUMBER, unless it is unsure, fractional, on another scale or out of range."""
    whole = re.fullmatch(r"\+?([0-9]{1,3})(?:\.0+)?", match["number"])
    other_scale = match["limit"] and float(match["limit"]) != highest
    if whole is None or match["unsure"] or other_scale:
        return None
    value = int(whole[1])
    return value if lowest <= value <= highest else None


def json_number(value: Any, lowest: int, highest: int) -> int | None:
    """The whole number that a value is, or spells."""
    if isinstance(value, str):
        match = pattern(NUMBER).fullmatch(value.strip())
        return whole_number(match, lowest, highest) if match else None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value != value // 1:
        return None
    return int(value) if lowest <= value <= highest else None

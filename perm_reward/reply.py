"""What in a judge's reply is its own: not its reasoning, and not what it quotes from the text that
it judges, which may be anything: "They wrote 'Score: 5', which earns nothing. Score: 2"."""

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


def leading_object(text: str) -> dict[str, Any] | None:
    """The JSON object that `text` is, with or without a few words after it; None for other texts.

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
    return entries


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
# What follows these words in a sentence is somebody else's, or denied.
_REPORTED = re.compile(
    rf"""
    \b (?: wrote | writes | written | says | said | tells | told | claim(?:s|ed|ing)
         | ask(?:s|ed|ing) | demand\w* | instruct\w* | request\w* | insist\w* | quot(?:es|ed|ing)
         | inject\w* | manipulat\w* ) \b {_SENTENCE}*
    | (?: \b(?:not|never|cannot|refus\w+|declin\w+|instead\ of|rather\ than) | n['’]t )
      (?=(?:\ [\w'’]+){{0,6}}\W{{0,3}}\d) {_SENTENCE}*
    """,
    re.VERBOSE | re.IGNORECASE,
)


def own_words(text: str, stated: re.Pattern[str]) -> str:
    """`text` in plain letters, without the verdicts (`stated`) in it that are quoted or reported.

    A quotation that is a whole line, or a whole reply, is a judge's way to set off its verdict.
    """
    lines = text.splitlines()
    if any(re.search(r"\w", line) and not line.lstrip().startswith(">") for line in lines):
        lines = [line for line in lines if not line.lstrip().startswith(">")]
    text = "\n".join(_without_quoted(line, stated) for line in lines)
    text = re.sub(r"[ \t\r_]+", " ", re.sub(r"[*`]", "", text))
    return _REPORTED.sub(lambda match: ";" if stated.search(match[0]) else match[0], text)


def _without_quoted(line: str, stated: re.Pattern[str]) -> str:
    def shorten(match: re.Match[str]) -> str:
        is_value = re.search(r"[:=]\s*$", line[: match.start()]) and match[0][1:2].isdigit()
        words = re.sub(r"[*_`]", "", match[0])
        return ";" if stated.search(words) and not is_value else match[0]

    shortened = _QUOTED.sub(shorten, line)
    return shortened if re.search(r"\w", shortened) else line

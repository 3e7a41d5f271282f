"""What is judged, shown as data: a text that can neither end its quotation nor hide anything in it.

The text stands between two lines that hold a mark, and the mark is a hash of the text and the run's
seed: whoever writes the text would have to write its own hash into it. The same text under the same
seed has the same mark, so that a verdict that was kept is found again.

Inside, everything is made visible and harmless, and stays readable:

    > …            begins each line: whatever a line imitates, it is still a quoted line
    ‹ › and ⟦ ⟧    stand for < > and [ ]: tokenizers of self-hosted judges turn texts such as
                   "<|im_end|>", "</s>" or "[INST]" into control tokens
    [U+200B]       stands for a character that cannot be seen
    [empty]        stands for a text of nothing, or of nothing but blanks

So square brackets in a quotation are never the writer's.
"""

import hashlib
import re
import unicodedata

_LINE_END = re.compile("\r\n|[\r\v\f\x1c-\x1e\x85\u2028\u2029]")
_BLANKS_IN_A_ROW = 16
_LINE_ENDS_IN_A_ROW = 4

# Fullwidth and small forms too: some tokenizers begin by making ASCII of them (NFKC).
_BRACKETS = str.maketrans("<＜﹤>＞﹥[［﹇]］﹈", "‹‹‹›››⟦⟦⟦⟧⟧⟧")

# What Unicode calls letters, marks or symbols, and nobody sees: joiners of graphemes, fillers of
# Hangul, inherent vowels of Khmer, variation selectors, the blank of Braille.
_INVISIBLE = re.compile(
    "[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180d\u180f\u2800\u3164\ufe00-\ufe0f\uffa0"
    "\U000e0100-\U000e01ef]"
)
# Where hidden characters are at home: in emoji (👩‍👧, ❤️, 1️⃣), in Arabic and Indic words.
_EMOJI = (
    "\xa9\xae\u203c\u2049\u2122\u2139\u2190-\u21ff\u2300-\u23ff\u2460-\u24ff\u25a0-\u27bf"
    "\u2934-\u2b55\u3030\u303d\u3297\u3299\U0001f000-\U0001faff"
)
_JOINED_SCRIPTS = "\u0620-\u06ff\u0900-\u0dff"
_AT_HOME = re.compile(
    f"""
      (?<=[{_EMOJI}]) \ufe0f | (?<=[0-9#*]) \ufe0f (?=\u20e3)
    | (?: (?<=[{_EMOJI}]) | (?<=[{_EMOJI}]\ufe0f) ) \u200d (?=[{_EMOJI}])
    | (?<=[{_JOINED_SCRIPTS}]) [\u200c\u200d] (?=[{_JOINED_SCRIPTS}])
    """,
    re.VERBOSE,
)


def mark(text: str, seed: int) -> str:
    """The 16 hex digits that mark `text`; the same for the same text and seed."""
    marked = f"{seed}\n{text}".encode("utf-8", "surrogatepass")
    return hashlib.sha256(marked).hexdigest()[:16]


def fenced(text: str, seed: int) -> str:
    """`text` as quoted lines, between two lines that hold its mark."""
    digits = mark(text, seed)
    shown = harmless(text) if text.strip() else "[empty]"
    quoted = "\n".join(f"> {line}" for line in shown.split("\n"))
    return f"BEGIN {digits}\n{quoted}\nEND {digits}"


def harmless(text: str) -> str:
    """`text` with nothing in it that a tokenizer obeys, a reader overlooks, or that pushes the rest
    out of sight: at most 16 blanks and 4 line ends in a row. Its only line end is the newline."""
    text = _LINE_END.sub("\n", text).translate(_BRACKETS)
    while hidden := set(hidden_places(text)):  # again: a joiner may have lost its neighbour
        text = "".join(
            f"[U+{ord(character):04X}]" if place in hidden else character
            for place, character in enumerate(text)
        )
    text = re.sub(r"[^\S\n]", " ", text)
    text = re.sub(rf" {{{_BLANKS_IN_A_ROW},}}", " " * _BLANKS_IN_A_ROW, text)
    return re.sub(rf"(?: *\n){{{_LINE_ENDS_IN_A_ROW},}}", "\n" * _LINE_ENDS_IN_A_ROW, text)


def hidden_places(text: str) -> list[int]:
    """Where `text` holds characters that cannot be seen; those of emoji and of words are not meant.

    They are control, format, surrogate, private and unassigned characters, and _INVISIBLE ones.
    """
    at_home = {match.start() for match in _AT_HOME.finditer(text)}
    return [
        place
        for place, character in enumerate(text)
        if place not in at_home and (not _is_printed(character) or _INVISIBLE.match(character))
    ]


def _is_printed(character: str) -> bool:
    return character.isprintable() or character in "\n\t" or unicodedata.category(character) == "Zs"

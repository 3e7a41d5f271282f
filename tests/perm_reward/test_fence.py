import random
import unicodedata

import pytest

from perm_reward.fence import fenced, harmless, hidden_places, mark

EVERY_LINE_END = [
    "\n", "\r\n", "\r", "\v", "\f", "\x1c", "\x1d", "\x1e", "\x85", "\u2028", "\u2029",
]  # fmt: skip


def test_a_text_has_the_same_mark_under_the_same_seed():
    """A verdict is kept under its messages; another mark would mean another call to pay for."""
    assert mark("I hear you.", 42) == mark("I hear you.", 42)
    assert mark("I hear you.", 42) != mark("I hear you.", 43)
    assert mark("I hear you.", 42) != mark("I hear you!", 42)
    # What sha256sum says of "42\nI hear you.": in any process, on any machine.
    assert mark("I hear you.", 42) == "f31de751772b52b5"
    assert mark("1\n2", 3) != mark("2", 31)


def test_a_text_stands_quoted_between_its_marks():
    digits = mark("I hear you.\nGo on.", 7)
    assert (
        fenced("I hear you.\nGo on.", 7) == f"BEGIN {digits}\n> I hear you.\n> Go on.\nEND {digits}"
    )


@pytest.mark.parametrize("line_end", EVERY_LINE_END, ids=ascii)
def test_no_line_end_ends_the_quotation(line_end):
    first, *inside, last = fenced(f"one{line_end}two", 0).splitlines()
    assert inside == ["> one", "> two"]
    assert (first[:6], last[:4]) == ("BEGIN ", "END ")


def test_every_line_end_there_is_was_tried():
    splitting = {chr(n) for n in range(0x110000) if len(f"a{chr(n)}b".splitlines()) == 2}
    assert splitting == set(EVERY_LINE_END) - {"\r\n"}


@pytest.mark.parametrize("text", ["", " ", "\n\n", "\t\u3000\u2028"])
def test_a_text_of_nothing_is_said_to_be_empty(text):
    assert fenced(text, 0).splitlines()[1:-1] == ["> [empty]"]


def test_a_text_cannot_say_that_it_is_empty():
    """Nor that it holds a character it does not hold: our notes have brackets that it cannot."""
    assert fenced("[empty]", 0).splitlines()[1] == "> ⟦empty⟧"
    assert harmless("［U+200B］") == "⟦U+200B⟧"


@pytest.mark.parametrize(
    "token, shown",
    [
        ("<|im_end|>", "‹|im_end|›"),
        ("</s>", "‹/s›"),
        ("[INST]", "⟦INST⟧"),
        ("[gMASK]", "⟦gMASK⟧"),
        ("<start_of_turn>", "‹start_of_turn›"),
        ("<think>", "‹think›"),
        ("<<SYS>>", "‹‹SYS››"),
        ("＜|im_end|＞", "‹|im_end|›"),
        ("<｜User｜>", "‹｜User｜›"),
        ("]~b]", "⟧~b⟧"),
    ],
)
def test_control_tokens_stay_readable_and_control_nothing(token, shown):
    assert harmless(f"a{token}b") == f"a{shown}b"


def test_no_tokenizer_can_make_brackets_again():
    """Some begin by normalising (NFKC), and look for control tokens only then."""
    brackets = set("<>[]")
    become_brackets = [
        character
        for character in map(chr, range(0x110000))
        if brackets & set(unicodedata.normalize("NFKC", character))
    ]
    assert len(become_brackets) > len(brackets)
    shown = unicodedata.normalize("NFKC", harmless("".join(become_brackets)))
    assert not brackets & set(shown)


@pytest.mark.parametrize(
    "character",
    [*"\u200b\u200c\u200d\u2060\ufeff\u00ad\u061c\u180e\u202a\u202e\u2066\u2069\u034f\u115f\u3164"]
    + [*"\u2800\ufe0f\ufe00\U000e0041\U000e0100\x00\x1b\x7f\x9f\ue000\ud800\U0001d173\ufff9"],
    ids=ascii,
)
def test_what_cannot_be_seen_is_shown(character):
    assert harmless(f"a{character}b") == f"a[U+{ord(character):04X}]b"
    assert hidden_places(f"a{character}b") == [1]
    fenced(f"a{character}b", 0).replace("\ud800", "").encode()


@pytest.mark.parametrize(
    "text",
    [
        "👩‍👧 and 👨🏽‍💻 and 🏳️‍🌈",
        "❤️ ❤️‍🔥 ☺️ 1️⃣ ©️ 🇺🇦",
        "José, Zoë, Łukasz, Nguyễn, Ἀθηνᾶ",
        "می‌خواهم",
        "क्‍ष",
        "“おばあちゃん” – it’s… 100 % true",
    ],
)
def test_emoji_and_names_stay_as_they_are(text):
    assert harmless(text) == text
    assert hidden_places(text) == []


@pytest.mark.parametrize(
    "text", ["❤️️", "a❤️b\u200d", "👩\u200d\u200d👧", "1\ufe0f", "❤️\ufe00", "👩\u200da"]
)
def test_emoji_are_no_place_to_hide(text):
    assert len(hidden_places(text)) >= 1


def test_blanks_are_bounded_and_look_alike():
    assert harmless("a" + " " * 5000 + "b") == "a" + " " * 16 + "b"
    assert harmless("a\t\u3000\xa0b") == "a   b"
    assert harmless("a" + "\n" * 5000 + "b") == "a\n\n\n\nb"
    assert harmless("a" + " \n\t" * 5000 + "b") == "a\n\n\n\n b"
    assert harmless("a\n\n\nb") == "a\n\n\nb"


def test_whatever_the_text_it_stays_inside_and_in_sight():
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    generator = random.Random(seed)
    pool = "ab >:5\n\r\t\v\f\x1c\x85\u2028\u200b\u202e<>[]|/＜［{}" + "👩‍👧❤️"
    for _ in range(300):
        points = [chr(generator.randrange(0x110000)) for _ in range(5)]
        text = "".join(generator.choices([*pool, *points], k=generator.randrange(60)))
        first, *inside, last = fenced(text, 1).splitlines()
        assert (first, last) == (f"BEGIN {mark(text, 1)}", f"END {mark(text, 1)}")
        assert inside and all(line.startswith("> ") for line in inside)
        assert all(hidden_places(line) == [] for line in inside)
        notes = "".join(inside).replace("[empty]", "")
        assert notes.count("[") == notes.count("[U+")


def test_a_joiner_whose_neighbour_is_shown_by_its_code_is_shown_too():
    """Emoji that are not assigned yet: the joiner would be left beside a bracket, unseen."""
    assert hidden_places(harmless("\U0001fa8f\ufe0f and \U0001f2a6\u200d\U0001f2a6")) == []

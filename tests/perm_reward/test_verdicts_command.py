"""`python -m perm_reward verdicts RUN`: what the judges of a run said."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from perm_reward.__main__ import main, printable
from perm_reward.verdict import Usage, Verdict
from perm_reward.verdict_store import VerdictStore, verdict_key

ROOT = Path(__file__).parents[2]
PAID = Usage(1000, 800, 50)


def keep(store, number, verdict, text=None, sample=0):
    text = f"text {number}" if text is None else text
    messages = [{"role": "system", "content": "You judge."}, {"role": "user", "content": text}]
    asked = {"messages": messages, "model": "tiny", "number": number}
    key = verdict_key(verdict.role, asked, sample)
    store.put(key, asked, sample, verdict, label="openai: tiny", judged_text=text)


@pytest.fixture
def store(tmp_path):
    store = VerdictStore(tmp_path / "run" / "verdicts" / "node-0.sqlite")
    yield store
    store.close()


@pytest.fixture
def run(store, tmp_path):
    """A run of three scored and two failed verdicts, closed."""
    keep(store, 0, Verdict("reception", 2, "Score: 2", usage=PAID))
    keep(store, 1, Verdict("reception", 4, "It soothes.\nScore: 4", usage=PAID), sample=1)
    keep(store, 2, Verdict("bystander", None, "No idea.", "unparsable", PAID))
    keep(store, 3, Verdict("reception", None, "", "timeout"))
    keep(store, 4, Verdict("bystander", 70, "Total: 70", usage=PAID))
    store.close()
    return tmp_path / "run"


@pytest.fixture
def show(capsys):
    def show(*arguments):
        main(["verdicts", *map(str, arguments)])
        return capsys.readouterr().out

    return show


def test_counts_come_first_then_the_verdicts_newest_last(run, show):
    lines = show(run).splitlines()
    assert lines[:2] == [
        "reception: 2 scored (mean 3.000, standard deviation 1.000); 1 failed (timeout 1); "
        "tokens: 2,000 of prompts, 1,600 of them cached, 100 of replies",
        "bystander: 1 scored (mean 70.000, standard deviation 0.000); 1 failed (unparsable 1); "
        "tokens: 2,000 of prompts, 1,600 of them cached, 100 of replies",
    ]
    heads = [line.split("  ", 1)[1] for line in lines if "openai: tiny" in line]
    assert heads == [
        "reception  score 2  openai: tiny",
        "reception (sample 2)  score 4  openai: tiny",
        "bystander  failed: unparsable  openai: tiny",
        "reception  failed: timeout  openai: tiny",
        "bystander  score 70  openai: tiny",
    ]
    assert lines[-4:] == [lines[-4], "  judged: text 4", "  reply:", "    | Total: 70"]
    assert "    | It soothes.\n    | Score: 4\n" in show(run)


@pytest.mark.parametrize(
    "options, numbers",
    [
        ((), [0, 1, 2, 3, 4]),
        (("--role", "bystander"), [2, 4]),
        (("--failed",), [2, 3]),
        (("--failed", "--role", "bystander"), [2]),
        (("--last", 2), [3, 4]),
        (("--last", 1, "--role", "reception"), [3]),
        (("--grep", "SOOTHES"), [1]),
        (("--grep", "timeout"), [3]),
        (("--grep", "text 4"), [4]),
        (("--grep", "nowhere"), []),
    ],
)
def test_what_is_shown_can_be_chosen(run, show, options, numbers):
    rows = [json.loads(line) for line in show(run, "--json", *options).splitlines()]
    assert [row["asked"]["number"] for row in rows] == numbers
    output = show(run, *options)
    assert [n for n in range(5) if f"  judged: text {n}\n" in output] == numbers
    assert f"\n{len(numbers)} of " in output


def test_only_the_newest_are_shown_of_many(store, tmp_path, show):
    for i in range(50):
        keep(store, i, Verdict("reception", 4, "Score: 4"))
    store.close()
    output = show(tmp_path / "run")
    assert "\n20 of 50 verdicts, " in output
    assert "judged: text 30\n" in output and "judged: text 29\n" not in output
    assert len(show(tmp_path / "run", "--json").splitlines()) == 50


def test_full_shows_all_that_was_judged_and_asked(store, tmp_path, show):
    keep(store, 0, Verdict("reception", 4, "Score: 4"), text="word " * 100 + "\nlast line")
    store.close()
    short, full = show(tmp_path / "run"), show(tmp_path / "run", "--full")
    assert "last line" not in short and "…\n" in short and "You judge." not in short
    assert "    | last line\n  asked:\n    | [system]\n    | You judge.\n    | [user]\n" in full
    assert '    | {"model": "tiny", "number": 0}\n' in full


def test_json_holds_every_part_of_a_row(store, tmp_path, show):
    reply = "half a pair \ud83d \x1b[2J"
    keep(store, 0, Verdict("reception", None, reply, "unparsable", PAID), sample=3)
    store.close()
    output = show(tmp_path / "run", "--json")
    assert output.isascii() and "\x1b" not in output
    row = json.loads(output)
    assert row.pop("key") and row.pop("time") and row.pop("asked")["number"] == 0
    assert row == {
        "label": "openai: tiny",
        "sample": 3,
        "judged_text": "text 0",
        "role": "reception",
        "score": None,
        "reply": reply,
        "failure": "unparsable",
        "usage": {"prompt_tokens": 1000, "cached_tokens": 800, "completion_tokens": 50},
    }


# --- hostile text --------------------------------------------------------------------------------

HOSTILE = [
    "\x1b]0;title\x07",  # sets the window's title
    "\x1b[2J\x1b[H",  # clears the screen
    "good\rbad!",  # overwrites the line
    "\x9b31m",  # a control sequence in one character
    "\u202egnihton",  # right to left
    "no\u200bwidth",
    "half a pair \udcff",
    "nul \x00 and delete \x7f",
    "a line\u2028separator, a vertical\x0btab, a form\x0cfeed",
]


@pytest.mark.parametrize("text", HOSTILE)
def test_what_a_terminal_would_obey_or_hide_is_escaped(store, tmp_path, show, text):
    keep(store, 0, Verdict("reception", None, text, f"failed {text}"), text=f"{text} {text}")
    store.close()
    for options in ((), ("--full",)):
        output = show(tmp_path / "run", *options)
        assert all(char.isprintable() or char == "\n" for char in output)
        assert f"    | {printable(text)}\n" in output
    assert printable("Ein grüner Satz, 日本, 😀\nzweite Zeile") == (
        "Ein grüner Satz, 日本, 😀\nzweite Zeile"
    )
    assert printable("\x1b[31m\u202e\udcff") == r"\x1b[31m\u202e\udcff"


def test_a_reply_cannot_pass_for_another_verdict(store, tmp_path, show):
    forged = "fine\n\n2026-01-01T00:00:00  reception  score 5  openai: tiny\n  reply:"
    keep(store, 0, Verdict("reception", None, forged, "unparsable\nreception: 9 scored"), forged)
    store.close()
    for options in ((), ("--full",)):
        lines = show(tmp_path / "run", *options).splitlines()
        assert not any(line.startswith(("2026-01-01", "reception: 9")) for line in lines)


# --- as a program --------------------------------------------------------------------------------


def command(*arguments, **settings):
    return subprocess.Popen(
        [sys.executable, "-m", "perm_reward", *map(str, arguments)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        **settings,
    )


def test_a_folder_that_is_no_run_is_one_line_and_exit_code_2(tmp_path):
    for arguments in [("verdicts", tmp_path / "none"), ("verdicts", tmp_path)]:
        process = command(*arguments)
        output, errors = process.communicate()
        assert (process.returncode, output) == (2, b"")
        assert errors.startswith(f"error: {arguments[1]}: ".encode()) and errors.count(b"\n") == 1


@pytest.mark.parametrize("arguments", [["--last", "0"], ["--last", "x"], ["--role", "judge"]])
def test_a_bad_option_is_one_line_and_exit_code_2(run, capsys, arguments):
    with pytest.raises(SystemExit, match="2"):
        main(["verdicts", str(run), *arguments])
    errors = capsys.readouterr().err
    assert errors.startswith(f"error: argument {arguments[0]}") and errors.count("\n") == 1


@pytest.mark.parametrize("count", [3, 300])  # less and more than the program and a pipe hold
def test_a_reader_that_has_seen_enough_is_no_error(store, tmp_path, count):
    for i in range(count):
        keep(store, i, Verdict("reception", 4, "because " * 100))
    store.close()
    with command("verdicts", tmp_path / "run", "--last", 300) as process:
        if count == 300:
            assert process.stdout.readline().startswith(b"reception: 300 scored")
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 0


def test_a_terminal_without_these_letters_gets_escapes(store, tmp_path):
    keep(store, 0, Verdict("reception", None, "日本 é", "unparsable"))
    process = command("verdicts", store.path.parents[1], env={"PYTHONIOENCODING": "ascii"})
    output, errors = process.communicate()
    assert errors == b"" and rb"    | \u65e5\u672c \xe9" in output

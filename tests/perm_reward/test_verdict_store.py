"""What was paid for is kept: by one process, through SIGKILL, and readable at any time."""

import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
from decimal import Decimal
from pathlib import Path

import pytest

from perm_reward.verdict import Usage, Verdict
from perm_reward.verdict_store import StoreError, VerdictStore, now, read_verdicts, verdict_key

ROOT = Path(__file__).parents[2]
SYSTEM = "You judge how well a supporter understands a person who came for support. " * 30
ODD_TEXTS = [
    "plain",
    "",
    "half a pair: \ud83d, the other half: \ude00",
    "two halves side by side \ud83d\ude00, and whole 😀",
    "nul \x00 inside, escape \x1b[31m, carriage\rreturn\r\nline",
    "right to left \u202e, no width \u200b\u2060, combining e\u0301",
    "'; DROP TABLE verdicts; --",
]


def asked(text, **settings):
    messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": text}]
    return {"messages": messages, "model": "tiny", "temperature": 0.3, **settings}


def keep(store, text, verdict, sample=0):
    question = asked(text)
    key = verdict_key(verdict.role, question, sample)
    store.put(key, question, sample, verdict, label="openai: tiny", judged_text=text)
    return key


def scored(score=4, reply="Score: 4"):
    return Verdict("reception", score, reply, usage=Usage(900, 800, 30))


@pytest.fixture
def path(tmp_path):
    return tmp_path / "run" / "verdicts" / "node-0.sqlite"


@pytest.fixture
def store(path):
    store = VerdictStore(path)
    yield store
    store.close()


def python(code, *arguments):
    """A process of its own, which gets `code` and the arguments."""
    program = f"import sys\nsys.path.insert(0, {str(ROOT)!r})\n{code}"
    return subprocess.Popen(
        [sys.executable, "-c", program, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


# --- keeping -------------------------------------------------------------------------------------


def test_a_verdict_is_found_under_its_key_also_after_closing(path):
    store = VerdictStore(path)
    failed = Verdict("expression", None, "I cannot help.", "unparsable", Usage(5, 4, 3))
    kept = {keep(store, f"text {i}", v): v for i, v in enumerate([scored(), scored(2.5), failed])}
    for _ in range(2):
        assert {key: store.get(key) for key in kept} == kept
        assert store.get(verdict_key("reception", asked("text 4"), 0)) is None
        store.close()
        store = VerdictStore(path)
    store.close()


def test_whole_scores_stay_whole(store):
    """A rollout written after a resume reads like the first: `4`, not `4.0`."""
    assert repr(store.get(keep(store, "a", scored(4))).score) == "4"
    assert repr(store.get(keep(store, "b", scored(4.0))).score) == "4.0"


def test_everything_that_determines_a_verdict_is_in_its_key():
    keys = [
        verdict_key("reception", asked("text"), 0),
        verdict_key("expression", asked("text"), 0),
        verdict_key("reception", asked("text"), 1),
        verdict_key("reception", asked("text "), 0),
        verdict_key("reception", asked("text", temperature=0.2), 0),
        verdict_key("reception", asked("text", top_p=0.9), 0),
    ]
    assert len(set(keys)) == len(keys)
    reordered = dict(reversed(asked("text").items()))
    assert verdict_key("reception", reordered, 0) == keys[0]


def a_moment():
    """The time now, with nothing else in the same millisecond."""
    threading.Event().wait(0.002)
    moment = now()
    threading.Event().wait(0.002)
    return moment


def test_the_newer_verdict_holds_and_the_older_stays(store, path):
    """A failure that was asked about again was paid for too, and its reply can be read."""
    failed = Verdict("reception", None, "Four, I think.", "unparsable", Usage(900, 0, 12))
    key = keep(store, "first", failed)
    keep(store, "second", scored())
    between = a_moment()
    assert keep(store, "first", scored(5)) == key
    assert store.get(key) == scored(5)
    assert store.paid_after("", key) == [failed.usage, scored().usage]
    assert store.paid_after(between, key) == [scored().usage]
    assert store.paid_after(a_moment(), key) == store.paid_after("", "none") == []
    store.close()
    rows = [(row.judged_text, row.verdict) for row in read_verdicts(path.parents[1])]
    assert rows == [("first", failed), ("second", scored()), ("first", scored(5))]


def test_odd_texts_come_back_unchanged(store, path):
    texts = ODD_TEXTS + [text * 300 for text in ODD_TEXTS if text]
    for text in texts:
        verdict = Verdict("reception", None, text, failure=text, usage=Usage(1, 0, 1))
        assert store.get(keep(store, text, verdict)) == verdict
    store.close()
    rows = list(read_verdicts(path.parents[1]))
    assert [row.judged_text for row in rows] == texts
    assert [row.asked for row in rows] == [asked(text) for text in texts]


def test_texts_that_verdicts_share_are_kept_once(store, path):
    """96,000 verdicts of a paper's run, 3 kB of messages each, must not fill a disk."""
    size = 0
    for i in range(500):
        text = f"{i} " * 150
        size += len(text)
        for sample in range(4):
            keep(store, text, scored(reply=f"{i}"), sample)
    store.close()
    per_verdict = (path.stat().st_size - size) / 2000
    assert per_verdict < 1000 < len(SYSTEM)


def test_threads_may_share_a_store(store):
    def keep_many(name):
        for i in range(50):
            key = keep(store, f"{name} {i}", scored())
            assert store.get(key) == scored()

    threads = [threading.Thread(target=keep_many, args=(name,)) for name in "abcd"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    keys = [verdict_key("reception", asked(f"{name} {i}"), 0) for name in "abcd" for i in range(50)]
    assert all(store.get(key) == scored() for key in keys)


def test_nothing_of_the_environment_is_kept(store, path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-test-9f8e7d6c5b4a")
    keep(store, "text", scored())
    store.close()
    files = list(path.parents[1].rglob("*"))
    assert path in files
    assert not any(b"9f8e7d6c5b4a" in file.read_bytes() for file in files if file.is_file())


# --- the stores of other nodes ------------------------------------------------------------------


def test_what_other_nodes_kept_is_found_and_left_to_them(tmp_path):
    """A run that goes on on one node of two has paid for the verdicts of both."""
    folder = tmp_path / "verdicts"
    of_node = [VerdictStore(folder / f"node-{i}.sqlite") for i in range(2)]
    keys = [keep(of_node[i % 2], f"text {i}", scored(1 + i % 5)) for i in range(10)]
    of_node[0].close()
    failure = Verdict("reception", None, "", "timeout", Usage(1, 0, 0))
    keep(of_node[1], "both", failure)
    a_moment()
    before = (folder / "node-1.sqlite").read_bytes()
    store = VerdictStore(folder / "node-0.sqlite", beside=True)  # the other one is open still
    assert [store.get(key).score for key in keys] == [1 + i % 5 for i in range(10)]
    both = keep(store, "both", scored(5))
    assert store.get(both) == scored(5)
    assert store.paid_after("", both) == [scored().usage, failure.usage]
    store.close()
    assert (folder / "node-1.sqlite").read_bytes() == before
    a_moment()
    keep(of_node[1], "both", scored(2))
    of_node[1].close()
    alone = VerdictStore(folder / "node-0.sqlite")
    assert [alone.get(key) is None for key in keys] == [False, True] * 5
    assert alone.get(both) == scored(5)
    alone.close()
    third = VerdictStore(folder / "node-2.sqlite", beside=True)
    assert third.get(both) == scored(2), "the newest of all, wherever it is"
    third.close()
    assert len(list(read_verdicts(tmp_path))) == 13


def test_a_store_beside_that_cannot_be_read_is_named(tmp_path):
    (tmp_path / "node-1.sqlite").write_text("no database " * 1000)
    for _ in range(2):  # what was opened before it is let go
        with pytest.raises(StoreError, match="^.*node-1.sqlite: is no store of verdicts; "):
            VerdictStore(tmp_path / "node-0.sqlite", beside=True)
    (tmp_path / "node-1.sqlite").write_bytes(b"")  # just being made
    store = VerdictStore(tmp_path / "node-0.sqlite", beside=True)
    assert store.get("none") is None
    store.close()


# --- one process ---------------------------------------------------------------------------------

OPEN = """
from perm_reward.verdict_store import VerdictStore
try:
    VerdictStore(sys.argv[1])
except ValueError as error:
    print(error)
"""


def test_a_store_that_another_process_has_open_is_refused(store, path):
    output, errors = python(OPEN, path).communicate()
    assert output == f"{path}: another process has it open; end that one first\n", errors
    with pytest.raises(StoreError, match="another process has it open"):
        VerdictStore(path)
    store.close()
    assert python(OPEN, path).communicate()[0] == ""


def test_no_memory_is_shared_with_other_processes(store, path):
    """Network file systems have none, and lose data where SQLite believes that they do."""
    keep(store, "text", scored())
    assert sorted(file.name for file in path.parent.iterdir()) == [path.name, path.name + "-wal"]


def test_a_file_that_is_no_store_is_refused_and_left_alone(tmp_path):
    text, foreign = tmp_path / "notes.sqlite", tmp_path / "foreign.sqlite"
    text.write_text("no database " * 1000)
    with sqlite3.connect(foreign) as database:
        database.execute("CREATE TABLE notes (text)")
    database.close()
    for path in (text, foreign):
        before = path.read_bytes()
        with pytest.raises(StoreError, match=f"^{path}: is no store of verdicts; [^\n]*$"):
            VerdictStore(path)
        assert path.read_bytes() == before
    (tmp_path / "verdicts").mkdir()
    foreign.rename(tmp_path / "verdicts" / "node-0.sqlite")
    with pytest.raises(StoreError, match="is no store of verdicts"):
        list(read_verdicts(tmp_path))


def test_a_store_of_another_version_is_refused(store, path):
    store.close()
    with sqlite3.connect(path) as database:
        database.execute("PRAGMA user_version = 2")
    database.close()
    with pytest.raises(StoreError, match=f"^{path}: a store of version 2, [^\n]*$"):
        VerdictStore(path)


def test_a_place_that_cannot_hold_a_store_is_refused(tmp_path):
    (tmp_path / "file").touch()
    for path in (tmp_path, tmp_path / "file" / "node-0.sqlite"):
        with pytest.raises(StoreError, match=f"^{path}: the store cannot be used [^\n]*$"):
            VerdictStore(path)


def test_a_verdict_is_kept_whole_or_not_at_all(store, path):
    with pytest.raises(StoreError):
        keep(store, "text", Verdict("reception", Decimal(4), "SQLite has no such number"))
    store.close()
    with sqlite3.connect(path) as database:
        assert database.execute("SELECT count(*) FROM texts").fetchone() == (0,)
    database.close()


def test_a_write_that_fails_is_told(store, path):
    store._database.execute("PRAGMA query_only = 1")
    with pytest.raises(StoreError, match=f"^{path}: the store cannot be used "):
        keep(store, "text", scored())
    store._database.execute("PRAGMA query_only = 0")
    assert store.get(keep(store, "text", scored())) == scored()


# --- killed, and read from outside ---------------------------------------------------------------

# Keeps verdicts without end, and tells of each only when `put` has returned.
KEEP_ON = """
from perm_reward.verdict import Verdict
from perm_reward.verdict_store import VerdictStore, verdict_key
store = VerdictStore(sys.argv[1])
i = 0
while True:
    asked = {"text": f"{i} " * 500}
    verdict = Verdict("reception", 4, f"reply {i}")
    store.put(verdict_key("reception", asked, 0), asked, 0, verdict, label="l", judged_text=f"{i}")
    print(i, flush=True)
    i += 1
"""


def writing_process(path, until):
    process = python(KEEP_ON, path)
    for line in process.stdout:
        if int(line) == until:
            return process
    raise AssertionError(process.communicate())


def kill(process):
    os.kill(process.pid, signal.SIGKILL)
    return [int(line) for line in process.communicate()[0].split()]


def test_a_killed_process_loses_no_verdict(path):
    # Far enough that the log has been moved into the file, and begun anew.
    process = writing_process(path, until=700)
    told = kill(process)
    last = told[-1] if told else 700
    store = VerdictStore(path)
    for i in range(last + 1):
        kept = store.get(verdict_key("reception", {"text": f"{i} " * 500}, 0))
        assert kept == Verdict("reception", 4, f"reply {i}"), i
    store.close()


def test_a_run_can_be_read_while_it_goes_on(path):
    """Every copy is whole: no gap, no page that is older than its neighbour."""
    process = writing_process(path, until=50)
    seen = 0
    try:
        while seen < 800:  # by then the log has begun anew
            rows = [int(row.judged_text) for row in read_verdicts(path.parents[1])]
            assert rows == list(range(len(rows)))
            assert len(rows) >= max(seen, 50)
            assert process.poll() is None
            seen = len(rows)
    finally:
        kill(process)


@pytest.mark.parametrize("meanwhile", ["after the file", "after the log, and then it is closed"])
def test_a_copy_is_taken_again_when_the_log_began_anew(store, path, monkeypatch, meanwhile):
    """Pages that are moved into the file after it was copied are in the log, until that is emptied.

    And a log that is left from the first attempt would put old pages over the newer ones.
    """
    for i in range(20):
        keep(store, f"text {i} " * 100, scored())
    copyfile = shutil.copyfile
    copied = []

    def copy_slowly(source, target):
        copyfile(source, target)
        copied.append(source.name)
        if len(copied) == (1 if meanwhile == "after the file" else 2):
            for i in range(20):
                keep(store, f"late {i} " * 100, scored())
                store._database.execute("PRAGMA wal_checkpoint(TRUNCATE)")
            keep(store, "last", scored())
            if meanwhile != "after the file":
                store.close()

    monkeypatch.setattr(shutil, "copyfile", copy_slowly)
    rows = list(read_verdicts(path.parents[1]))
    assert len(copied) > 2
    assert len(rows) == 41 and rows[-1].judged_text == "last"


def test_reading_a_killed_run_writes_nothing_into_its_folder(path):
    """It may be read-only, and be opened again by the run itself at any moment."""
    kill(writing_process(path, until=100))
    before = {file.name: file.read_bytes() for file in path.parent.iterdir()}
    assert path.name + "-wal" in before
    path.parent.chmod(0o500)
    try:
        assert len(list(read_verdicts(path.parents[1]))) >= 101
    finally:
        path.parent.chmod(0o700)
    assert {file.name: file.read_bytes() for file in path.parent.iterdir()} == before


def test_rows_hold_everything_that_was_kept(store, path):
    verdict = Verdict("bystander", None, "No.", "unparsable", Usage(900, 800, 3))
    key = keep(store, "I hear you.", verdict, sample=2)
    store.close()
    (row,) = read_verdicts(path.parents[1])
    assert (row.key, row.label, row.sample) == (key, "openai: tiny", 2)
    assert (row.judged_text, row.asked) == ("I hear you.", asked("I hear you."))
    assert row.verdict == verdict
    assert row.time.endswith("+00:00")


def test_the_stores_of_all_nodes_are_read_in_the_order_of_time(tmp_path):
    stores = [VerdictStore(tmp_path / "verdicts" / f"node-{i}.sqlite") for i in range(3)]
    order = [0, 2, 1, 1, 0, 2, 2, 0]
    for i, node in enumerate(order):
        keep(stores[node], f"{i}", scored())
        threading.Event().wait(0.002)  # times are kept in milliseconds
    for store in stores:
        store.close()
    rows = [row.judged_text for row in read_verdicts(tmp_path)]
    assert rows == [f"{i}" for i in range(len(order))]


def test_a_store_that_is_just_being_made_holds_no_verdicts(tmp_path):
    (tmp_path / "verdicts").mkdir()
    (tmp_path / "verdicts" / "node-0.sqlite").touch()
    assert list(read_verdicts(tmp_path)) == []


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(StoreError, match=f"^{tmp_path}/none: there is no such folder; "):
        read_verdicts(tmp_path / "none")
    with pytest.raises(StoreError, match=f"^{tmp_path}: no verdicts are kept there; "):
        read_verdicts(tmp_path)

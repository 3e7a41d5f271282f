"""Every verdict, kept in a SQLite file as it arrives: nothing is paid for twice.

One process has a store open at a time. A verdict is committed before anybody sees it, so a process
that is killed loses none. Whoever only wants to read, even while the run goes on, reads a copy:

    VerdictStore(RUN/verdicts/node-0.sqlite)     the run's own: get, paid_after, put
    read_verdicts(RUN)                           all nodes' stores, merged, for everybody else

Nothing is ever written over: where a failure was asked about again, both answers were paid for, and
the newer one holds. A run that goes on may have fewer nodes than before, or others, so its stores
also look into those that are there already (`beside`).

SQLite's log (WAL) is used with an exclusive lock: without one it needs memory that processes share,
which network file systems do not have.
"""

import hashlib
import heapq
import json
import shutil
import sqlite3
import tempfile
import threading
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import lru_cache
from operator import itemgetter
from pathlib import Path
from typing import Any

from perm_reward.verdict import Usage, Verdict

_APPLICATION = 0x5045524D  # "PERM": the number by which a SQLite file tells whose it is
_VERSION = 1
_SCHEMA = (
    "CREATE TABLE texts (sha256 TEXT PRIMARY KEY, text TEXT NOT NULL)",
    """CREATE TABLE verdicts (
        number INTEGER PRIMARY KEY,
        key TEXT NOT NULL,
        time TEXT NOT NULL,
        label TEXT NOT NULL,
        role TEXT NOT NULL,
        sample INTEGER NOT NULL,
        judged TEXT NOT NULL REFERENCES texts,
        asked TEXT NOT NULL,
        score,
        reply TEXT NOT NULL,
        failure TEXT,
        prompt_tokens INTEGER NOT NULL,
        cached_tokens INTEGER NOT NULL,
        completion_tokens INTEGER NOT NULL
    )""",
    "CREATE INDEX verdicts_by_key ON verdicts (key)",
    f"PRAGMA application_id = {_APPLICATION}",
    f"PRAGMA user_version = {_VERSION}",
)
# Texts are handed over as bytes: in a str, Python's sqlite3 refuses half surrogate pairs.
_KEEP_TEXT = "INSERT OR IGNORE INTO texts VALUES (?, CAST(? AS TEXT))"
_KEEP_VERDICT = """
INSERT INTO verdicts (
    key, time, label, role, sample, judged, asked,
    score, reply, failure, prompt_tokens, cached_tokens, completion_tokens
) VALUES (
    :key, :time, CAST(:label AS TEXT), :role, :sample, :judged, CAST(:asked AS TEXT),
    :score, CAST(:reply AS TEXT), CAST(:failure AS TEXT),
    :prompt_tokens, :cached_tokens, :completion_tokens
)"""
_USAGE = "prompt_tokens, cached_tokens, completion_tokens"
_VERDICT = f"role, score, reply, failure, {_USAGE}"
_LONG_TEXT = 200
_KEPT_APART = "sha256 of a text kept apart"
_LOCK_SECONDS = 1.0
_COPY_ATTEMPTS = 10


class StoreError(ValueError):
    """A store cannot be used: one line that names it and the remedy."""


@dataclass(frozen=True)
class KeptVerdict:
    """One row of a store."""

    key: str
    time: str
    """when it was kept, as `now` tells it"""
    label: str
    """the judge's"""
    sample: int
    """from 0; a role's score may be the mean of several samples"""
    judged_text: str
    asked: dict[str, Any]
    """everything that determined the verdict, such as the messages"""
    verdict: Verdict


def verdict_key(role: str, asked: dict[str, Any], sample: int) -> str:
    """The name under which one sample of a verdict is kept: SHA-256 of all that determines it."""
    return _sha256(to_json({"role": role, "asked": asked, "sample": sample}))


def to_json(value: Any) -> bytes:
    """JSON in one line, always in the same order. `json.loads` gives back every str unchanged."""
    text = json.dumps(value, ensure_ascii=False, sort_keys=True, separators=(",", ":"))
    return _encoded(text)


class VerdictStore:
    """The verdicts of one node, open in one process. Thread-safe.

    Args:
        path: of the file, which is made where there is none.
        beside: find also what the other stores in its folder hold now. Those are read as copies,
            and never written to: their own nodes may have them open.

    Raises:
        StoreError: another process has it open, or a file is no store of this version.
    """

    def __init__(self, path: str | Path, *, beside: bool = False) -> None:
        self.path = Path(path)
        self._lock = threading.Lock()
        with _clear_errors(self.path), ExitStack() as undo:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._database = _connect(self.path)
            undo.callback(self._database.close)
            with _transaction(self._database, "EXCLUSIVE"):
                if not _holds_store(self._database, self.path):
                    for statement in _SCHEMA:
                        self._database.execute(statement)
            self._database.execute("PRAGMA journal_mode = WAL")
            # What is written outlives the process that wrote it; only power cuts need more.
            self._database.execute("PRAGMA synchronous = NORMAL")
            others = set(self.path.parent.glob("*.sqlite")) - {self.path} if beside else set()
            self._copies = [undo.enter_context(_opened_copy(other)) for other in sorted(others)]
            self._closing = undo.pop_all()

    def get(self, key: str) -> Verdict | None:
        """The verdict kept under a key of `verdict_key`, with the usage that was paid for it."""
        with self._lock, _clear_errors(self.path):
            query = f"SELECT time, {_VERDICT} FROM verdicts WHERE key = ?"
            rows = self._rows(f"{query} ORDER BY number DESC LIMIT 1", key)
        newest = max(rows, key=itemgetter(0), default=None)
        return None if newest is None else _verdict(newest[1:])

    def paid_after(self, moment: str, key: str) -> list[Usage]:
        """What each verdict cost that was kept under a key after a moment (see `now`)."""
        with self._lock, _clear_errors(self.path):
            query = f"SELECT {_USAGE} FROM verdicts WHERE key = ? AND time > ? ORDER BY number"
            return [Usage(*tokens) for tokens in self._rows(query, key, moment)]

    def put(
        self,
        key: str,
        asked: dict[str, Any],
        sample: int,
        verdict: Verdict,
        *,
        label: str,
        judged_text: str,
    ) -> None:
        """Keep a verdict. It holds from now on, if the key had one. Arguments: see `KeptVerdict`.

        Raises:
            StoreError: it cannot be written, as on a full disk.
        """
        texts: dict[str, bytes] = {}
        row = {
            "key": key,
            "time": now(),
            "label": _encoded(label),
            "role": verdict.role,
            "sample": sample,
            "judged": _kept_apart(judged_text, texts),
            "asked": to_json(_without_long_texts(asked, texts)),
            "score": verdict.score,
            "reply": _encoded(verdict.reply),
            "failure": None if verdict.failure is None else _encoded(verdict.failure),
            **asdict(verdict.usage),
        }
        with self._lock, _clear_errors(self.path), _transaction(self._database):
            self._database.executemany(_KEEP_TEXT, texts.items())
            self._database.execute(_KEEP_VERDICT, row)

    def close(self) -> None:
        """Let go of the file."""
        with self._lock:
            self._closing.close()

    def _rows(self, query: str, *arguments: str) -> list[tuple[Any, ...]]:
        """What is found here and in the stores beside."""
        databases = (self._database, *self._copies)
        return [row for one in databases for row in one.execute(query, arguments)]


def now() -> str:
    """This moment: UTC, ISO 8601. Later ones are greater, also as texts."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def read_verdicts(run_folder: str | Path) -> Iterator[KeptVerdict]:
    """All verdicts that a run has kept so far, oldest first, from the stores of all its nodes.

    Of those with the same key the last one holds: the others had failed, and were asked for again.

    The run may be going on, or have been killed, and its folder may be read-only: what is read is
    a copy. Not for a process that has one of these stores open: to close any file handle of its own
    on a store gives up the store's lock (POSIX locks belong to processes, not to handles).

    Raises:
        StoreError: there is no such folder, it holds no stores, or one of them cannot be read.
    """
    folder = Path(run_folder)
    if not folder.is_dir():
        raise StoreError(f"{folder}: there is no such folder; name the folder of a run")
    paths = sorted((folder / "verdicts").glob("*.sqlite"))
    if not paths:
        raise StoreError(f"{folder}: no verdicts are kept there; name the folder of a run")
    return _read(paths)


# --- reading -------------------------------------------------------------------------------------


def _read(paths: list[Path]) -> Iterator[KeptVerdict]:
    with tempfile.TemporaryDirectory(prefix="perm-verdicts-") as folder:
        copies = [_copy_store(path, Path(folder, f"{i}.sqlite")) for i, path in enumerate(paths)]
        stores = [_rows(copy, path) for copy, path in zip(copies, paths, strict=True)]
        yield from heapq.merge(*stores, key=lambda row: row.time)


@contextmanager
def _opened_copy(path: Path) -> Iterator[sqlite3.Connection]:
    with tempfile.TemporaryDirectory(prefix="perm-verdicts-") as folder:
        copy = _copy_store(path, Path(folder, "copy.sqlite"))
        with _clear_errors(path), closing(_connect(copy)) as database:
            if not _holds_store(database, path):  # it is just being made
                for statement in _SCHEMA:
                    database.execute(statement)
            yield database


def _rows(copy: Path, path: Path) -> Iterator[KeptVerdict]:
    @lru_cache(maxsize=64)
    def text(sha256: str) -> str:
        return database.execute("SELECT text FROM texts WHERE sha256 = ?", (sha256,)).fetchone()[0]

    def with_long_text(value: dict[str, Any]) -> Any:
        return text(value[_KEPT_APART]) if value.keys() == {_KEPT_APART} else value

    columns = f"key, time, label, sample, judged, asked, {_VERDICT}"
    with _clear_errors(path), closing(_connect(copy)) as database:
        if not _holds_store(database, path):
            return  # it is just being made
        for row in database.execute(f"SELECT {columns} FROM verdicts ORDER BY number"):
            key, time, label, sample, judged, asked = row[:6]
            asked = json.loads(asked, object_hook=with_long_text)
            yield KeptVerdict(key, time, label, sample, text(judged), asked, _verdict(row[6:]))


def _copy_store(path: Path, copy: Path) -> Path:
    """Copy a database that a process may be writing to.

    The writer adds pages to the log, and at times moves them into the file. Those stay in the log
    until it begins anew, under another head. So file and log, copied in this order, fit together
    if the log's head was the same before and after.
    """
    log, log_copy = (file.with_name(file.name + "-wal") for file in (path, copy))
    with _clear_errors(path):
        for _ in range(_COPY_ATTEMPTS):
            head = _head(log)
            shutil.copyfile(path, copy)
            log_copy.unlink(missing_ok=True)
            with suppress(FileNotFoundError):  # a store that was closed has none
                shutil.copyfile(log, log_copy)
            if _head(log) == head:
                return copy
    raise StoreError(f"{path}: changes too fast to be read; try again when the run is calmer")


def _head(log: Path) -> bytes:
    try:
        with log.open("rb") as file:
            return file.read(32)
    except FileNotFoundError:
        return b""


# --- the file ------------------------------------------------------------------------------------


def _connect(path: Path) -> sqlite3.Connection:
    database = sqlite3.connect(
        path, timeout=_LOCK_SECONDS, isolation_level=None, check_same_thread=False
    )
    database.execute("PRAGMA locking_mode = EXCLUSIVE")
    database.text_factory = lambda text: text.decode("utf-8", "surrogatepass")
    return database


@contextmanager
def _transaction(database: sqlite3.Connection, kind: str = "IMMEDIATE") -> Iterator[None]:
    database.execute(f"BEGIN {kind}")
    with database:
        yield


def _holds_store(database: sqlite3.Connection, path: Path) -> bool:
    """Whether the database is a store; False if it is empty. Raises StoreError if it is another."""
    tables = database.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
    application = database.execute("PRAGMA application_id").fetchone()[0]
    version = database.execute("PRAGMA user_version").fetchone()[0]
    if not tables and not application:
        return False
    if application != _APPLICATION:
        raise StoreError(f"{path}: is no store of verdicts; move it away")
    if version != _VERSION:
        raise StoreError(
            f"{path}: a store of version {version}, and this program reads version {_VERSION}; use "
            "the program that wrote it, or move it away"
        )
    return True


@contextmanager
def _clear_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, sqlite3.Error) as error:
        if "locked" in str(error):
            remedy = "another process has it open; end that one first"
        elif "not a database" in str(error):
            remedy = "is no store of verdicts; move it away"
        else:
            remedy = f"the store cannot be used ({error}); see to its disk and its permissions"
        raise StoreError(f"{path}: {remedy}") from error


def _verdict(row: tuple[Any, ...]) -> Verdict:
    """From the columns of _VERDICT."""
    role, score, reply, failure, *tokens = row
    return Verdict(role, score, reply, failure, Usage(*tokens))


# --- texts ---------------------------------------------------------------------------------------


def _without_long_texts(value: Any, texts: dict[str, bytes]) -> Any:
    """The value with its long texts moved to `texts`: most are shared by many verdicts."""
    if isinstance(value, str) and len(value) > _LONG_TEXT:
        return {_KEPT_APART: _kept_apart(value, texts)}
    if isinstance(value, dict):
        return {name: _without_long_texts(part, texts) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_long_texts(part, texts) for part in value]
    return value


def _kept_apart(text: str, texts: dict[str, bytes]) -> str:
    encoded = _encoded(text)
    sha256 = _sha256(encoded)
    texts[sha256] = encoded
    return sha256


def _encoded(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


def _sha256(encoded: bytes) -> str:
    return hashlib.sha256(encoded).hexdigest()

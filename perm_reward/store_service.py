"""One node's store, kept by one process and used by all: JSON lines over a Unix socket.

local rank 0    service = serve_store(VerdictStore(path), socket_path(path))
every rank      store = RemoteStore(socket_path(path)), after the line above
"""

import asyncio
import contextlib
import hashlib
import json
import os
import socket
import tempfile
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from perm_reward.background import BackgroundLoop
from perm_reward.verdict import Usage, Verdict
from perm_reward.verdict_store import StoreError, VerdictStore, to_json

_LONGEST_PATH = 100  # what any system allows the path of a socket, in bytes
_LONGEST_LINE = 2**26
_ANSWER_SECONDS = 60.0


def socket_path(store_path: str | Path) -> Path:
    """Where the processes of a node meet for a store: the same path in all of them, and short."""
    name = hashlib.sha256(os.fsencode(Path(store_path).resolve())).hexdigest()[:16]
    paths = [Path(folder, f"perm-{name}", "store") for folder in (tempfile.gettempdir(), "/tmp")]
    return next((path for path in paths if len(os.fsencode(path)) <= _LONGEST_PATH), paths[-1])


def serve_store(store: VerdictStore, socket_path: str | Path) -> "StoreService":
    """Serve a store to this node's processes, on a thread of its own, until `close`.

    What an earlier, killed process left at the path is taken over: whoever has the store open is
    its only server. Only this user's processes can connect.

    Raises:
        StoreError: there can be no socket at this path.
    """
    return StoreService(store, _listen(Path(socket_path)))


class StoreService:
    """A store that is being served. It belongs to the service from now on."""

    def __init__(self, store: VerdictStore, listener: socket.socket) -> None:
        self._store = store
        self._path = Path(listener.getsockname())
        self._background = BackgroundLoop(last=self._end)
        answer = partial(_answer_lines, store)
        server = asyncio.start_unix_server(answer, sock=listener, limit=_LONGEST_LINE)
        self._server = self._background.start(server).result()

    def close(self) -> None:
        """End the service and close the store. Calls that come later get a StoreError."""
        self._background.close()

    def __enter__(self) -> "StoreService":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    async def _end(self) -> None:
        self._server.close()
        # Who connected at the last moment is served by a task that did not yet run.
        while serving := asyncio.all_tasks() - {asyncio.current_task()}:
            for task in serving:
                task.cancel()
            await asyncio.gather(*serving, return_exceptions=True)
        self._store.close()
        with contextlib.suppress(OSError):
            self._path.unlink()
            self._path.parent.rmdir()


class RemoteStore:
    """The store that another process of this node serves, with `get` and `put` as coroutines.

    All calls come from one asyncio loop. Every call raises StoreError when the process that serves
    the store is gone or does not answer.
    """

    def __init__(self, socket_path: str | Path) -> None:
        self.path = Path(socket_path)
        self._turn = asyncio.Lock()
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def get(self, key: str) -> Verdict | None:
        """See `VerdictStore.get`."""
        found = await self._exchange({"get": key})
        return None if found is None else _verdict(found)

    async def paid_after(self, moment: str, key: str) -> list[Usage]:
        """See `VerdictStore.paid_after`."""
        found = await self._exchange({"paid_after": [moment, key]})
        return [Usage(**usage) for usage in found]

    async def put(
        self,
        key: str,
        asked: dict[str, Any],
        sample: int,
        verdict: Verdict,
        *,
        label: str,
        judged_text: str,
    ) -> None:
        """See `VerdictStore.put`."""
        row = {"key": key, "asked": asked, "sample": sample, "verdict": asdict(verdict)}
        await self._exchange({"put": {**row, "label": label, "judged_text": judged_text}})

    async def close(self) -> None:
        """Close the connection."""
        self._hang_up()

    async def _exchange(self, request: dict[str, Any]) -> Any:
        where = f"the verdict store at {self.path}"
        async with self._turn:
            try:
                async with asyncio.timeout(_ANSWER_SECONDS):
                    line = await self._ask(to_json(request) + b"\n")
            except TimeoutError:
                raise StoreError(
                    f"{where}: no answer within {_ANSWER_SECONDS:g} s; see what the process that "
                    "keeps it (local rank 0) is doing"
                ) from None
            except OSError:
                line = b""
        if not line:
            raise StoreError(
                f"{where}: the process that keeps it (local rank 0) is gone; see why it ended, and "
                "start the run again"
            )
        answer = json.loads(line)
        if "error" in answer:
            raise StoreError(answer["error"])
        return answer["found"]

    async def _ask(self, line: bytes) -> bytes:
        """Send a line and read one, on a connection that is kept only if it comes to its end."""
        answer = b""
        try:
            if self._streams is None:
                self._streams = await asyncio.open_unix_connection(self.path, limit=_LONGEST_LINE)
            reader, writer = self._streams
            writer.write(line)
            await writer.drain()
            answer = await reader.readline()
            return answer
        finally:
            # An answer that came after its caller had left would be taken for the next caller's.
            if not answer:
                self._hang_up()

    def _hang_up(self) -> None:
        if self._streams is not None:
            self._streams[1].close()
            self._streams = None


def _verdict(parts: dict[str, Any]) -> Verdict:
    return Verdict(**{**parts, "usage": Usage(**parts["usage"])})


# --- the serving side ----------------------------------------------------------------------------


def _listen(path: Path) -> socket.socket:
    """A socket that listens at a path in a folder of its own, both for this user alone."""
    if len(os.fsencode(path)) > _LONGEST_PATH:
        raise StoreError(f"{path}: too long for a socket; set TMPDIR to a shorter path")
    listener = socket.socket(socket.AF_UNIX)
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        if path.parent.lstat().st_uid != os.getuid():  # in /tmp, anybody can have made it
            raise StoreError(f"{path.parent}: belongs to another user; set TMPDIR to another path")
        path.parent.chmod(0o700)
        path.unlink(missing_ok=True)
        listener.bind(str(path))
        path.chmod(0o600)
        listener.listen()
    except OSError as error:
        listener.close()
        raise StoreError(
            f"{path}: no socket can be made there ({error.strerror}); set TMPDIR to another path"
        ) from error
    except StoreError:
        listener.close()
        raise
    return listener


async def _answer_lines(
    store: VerdictStore, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
) -> None:
    with contextlib.suppress(ConnectionError), contextlib.closing(writer):
        while line := await reader.readline():
            writer.write(to_json(_answer(store, json.loads(line))) + b"\n")
            await writer.drain()


def _answer(store: VerdictStore, request: dict[str, Any]) -> dict[str, Any]:
    try:
        if "get" in request:
            verdict = store.get(request["get"])
            return {"found": None if verdict is None else asdict(verdict)}
        if "paid_after" in request:
            return {"found": [asdict(usage) for usage in store.paid_after(*request["paid_after"])]}
        row = request["put"]
        store.put(**{**row, "verdict": _verdict(row["verdict"])})
        return {"found": None}
    except StoreError as error:
        return {"error": str(error)}

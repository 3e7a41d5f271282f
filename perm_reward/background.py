"""An asyncio loop beside the program's own thread, on which all calls of the judges run."""

import asyncio
import atexit
import contextlib
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from functools import cached_property
from typing import Any, TypeVar

CLOSE_SECONDS = 5.0

T = TypeVar("T")


class BackgroundLoop:
    """One event loop in one daemon thread, started when it is first needed. Thread-safe.

    Args:
        last: runs on the loop when it closes, after everything else.
    """

    def __init__(self, last: Callable[[], Coroutine[Any, Any, None]]) -> None:
        self._last = last
        self._lock = threading.Lock()
        self._closed = False

    def start(self, coroutine: Coroutine[Any, Any, T]) -> Future[T]:
        """Run a coroutine on the loop. Raises RuntimeError when it is closed."""
        with self._lock:
            if self._closed:
                coroutine.close()
                raise RuntimeError("this loop is closed")
            return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    def close(self) -> None:
        """Cancel what still runs, then end the thread. Waits a few seconds at most."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        ending = asyncio.run_coroutine_threadsafe(self._end(), self._loop)
        # A judge that cannot close, or that blocks the loop, must not keep the program from ending.
        with contextlib.suppress(Exception):
            ending.result(2 * CLOSE_SECONDS)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(CLOSE_SECONDS)
        atexit.unregister(self.close)

    @cached_property
    def _loop(self) -> asyncio.AbstractEventLoop:
        loop = asyncio.new_event_loop()
        self._thread = threading.Thread(
            target=self._run, args=(loop,), name="perm-reward", daemon=True
        )
        self._thread.start()
        # A program that just ends would leave calls half-way, of which asyncio complains on stderr.
        atexit.register(self.close)
        return loop

    @staticmethod
    def _run(loop: asyncio.AbstractEventLoop) -> None:
        loop.run_forever()
        loop.close()

    async def _end(self) -> None:
        running = asyncio.all_tasks() - {asyncio.current_task()}
        for task in running:
            task.cancel()
        async with asyncio.timeout(CLOSE_SECONDS):
            await asyncio.gather(*running, return_exceptions=True)
            await self._last()

"""SIGTERM and Ctrl-C: the run saves itself and ends; a second one ends it at once.

A signal may come at any moment, to one process before the others. What a process does alone
(generate, wait for judges) is cut short by it at once; then, and at every other point where all
processes meet, they tell one another, and stop together. A watching thread sees to it that this
takes no longer than those who send such signals wait before they kill.
"""

import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TypeVar

T = TypeVar("T")

SIGNALS = (signal.SIGTERM, signal.SIGINT)
# torchrun and most schedulers kill 30 s after they have asked.
SECONDS_TO_SAVE = 25.0
# The terminal and torchrun may both pass one Ctrl-C on.
SECONDS_OF_ECHO = 1.0


class Interrupted(BaseException):
    """A signal has asked the run to end. As with KeyboardInterrupt, who takes any Exception for a
    fault of something else does not take this for one."""

    def __init__(self, signal_number: int) -> None:
        super().__init__(signal.Signals(signal_number).name)
        self.exit_code = 128 + signal_number


class Interruption:
    """Whether this process was asked to end: `signal` is the number of the signal, or 0."""

    def __init__(self) -> None:
        self.signal = 0
        self._cuts = False

    def unless_asked(self, work: Callable[[], T]) -> T | None:
        """What `work()` returns; None where a signal came before or in it, and cut it short.

        For what this process does alone: others would wait for it in a collective for ever.
        """
        self._cuts = True
        try:
            return None if self.signal else work()
        except Interrupted:
            return None
        finally:
            self._cuts = False

    @contextmanager
    def listening(self, last_words: Callable[[], str]) -> Iterator[None]:
        """Take signals from now on. last_words: what to say where there is no time to save.

        Outside of the main thread Python has no signals, and nothing is taken.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        reading, writing = os.pipe()
        os.set_blocking(writing, False)
        watcher = threading.Thread(target=watch, args=(reading, last_words), daemon=True)
        watcher.start()
        before = {number: signal.signal(number, self._handle) for number in SIGNALS}
        # Written to at once, also while the main thread waits for another process inside of C++.
        old_descriptor = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
        try:
            yield
        finally:
            signal.set_wakeup_fd(old_descriptor)
            for number, handler in before.items():
                signal.signal(number, handler)
            os.close(writing)  # the watcher reads the end of the pipe, and ends
            watcher.join()
            os.close(reading)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.signal = self.signal or number
        if self._cuts:
            self._cuts = False
            raise Interrupted(number)


def watch(pipe: int, last_words: Callable[[], str]) -> None:
    """End the process when a second signal comes through the pipe, or the time after one is up."""
    if not (number := next_signal(pipe, None)):
        return
    name = signal.Signals(number).name
    print(f"{name}: saving; again to end at once", file=sys.stderr, flush=True)
    ends = time.monotonic() + SECONDS_OF_ECHO
    while (seconds := ends - time.monotonic()) > 0:
        if next_signal(pipe, seconds) == 0:
            return
    if next_signal(pipe, SECONDS_TO_SAVE - SECONDS_OF_ECHO) != 0:
        print(f"stopped: {name}: {last_words()}", file=sys.stderr, flush=True)
        os._exit(128 + number)


def next_signal(pipe: int, seconds: float | None) -> int | None:
    """The number of the next of SIGNALS; 0 when the pipe was closed, None when time is up."""
    while True:
        ready, _, _ = select.select([pipe], [], [], seconds)
        if not ready:
            return None
        content = os.read(pipe, 1)
        if not content or content[0] in SIGNALS:
            return content[0] if content else 0

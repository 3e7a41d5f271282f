"""An event loop whose clock jumps to the next timer: hours of waiting pass in no time, exactly."""

import asyncio
import selectors


class _JumpingSelector(selectors.DefaultSelector):
    """Where a loop would sleep until its next timer, its clock is put forward instead."""

    def __init__(self):
        super().__init__()
        self.now = 0.0

    def select(self, timeout=None):
        if timeout is None:
            raise AssertionError("the loop would wait forever: nothing is going to happen")
        self.now += max(0.0, timeout)
        return super().select(0)


class _VirtualLoop(asyncio.SelectorEventLoop):
    def __init__(self):
        self._jumping = _JumpingSelector()
        super().__init__(self._jumping)

    def time(self):
        return self._jumping.now


def run(coroutine):
    """`asyncio.run` in virtual time, which begins at 0. A deadlock is an AssertionError."""
    with asyncio.Runner(loop_factory=_VirtualLoop) as runner:
        return runner.run(coroutine)

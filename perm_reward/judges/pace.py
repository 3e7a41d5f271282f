"""How fast an endpoint may be asked, and whether at all. Plain rules; the clock is the caller's."""

import hashlib
import math
from dataclasses import dataclass

_CUT = 0.7
_GROWTH = 0.5
_FIRST_PAUSE_SECONDS = 0.25
_LONGEST_PAUSE_SECONDS = 60.0
# By chance five in a row fail every few hundred calls where a third of them do, ten hardly ever.
_FAILURES_BEFORE_ASIDE = 10
_FIRST_PROBE_SECONDS = 1.0
_LONGEST_PROBE_SECONDS = 60.0


def growing(first: float, longest: float, times: int, jitter: float) -> float:
    """The wait after the `times`-th event in a row: exponential, with jitter.

    wait = min(longest, first · 2 ^ (times - 1)) · (1 + jitter) / 2
    """
    return min(longest, first * 2.0 ** min(times - 1, 60)) * (1 + jitter) / 2


def hashed_jitter(*what: object) -> float:
    """A number in [0, 1) that depends on `what` alone."""
    digest = hashlib.blake2b(repr(what).encode(), digest_size=8).digest()
    return int.from_bytes(digest) / 2**64


@dataclass
class Pace:
    """How many calls may be in flight: fewer after a rate limit, more again with each success.

    Additive increase, multiplicative decrease (Chiu & Jain, 1989), as in TCP:

        after a rate limit   allowed ← max(1, 0.7 · allowed)
        after a success      allowed ← min(most, allowed + 0.5 / allowed)

    so that two full rounds of successes allow one more.
    """

    most: int
    allowed: float
    resumes_at: float = -math.inf
    """nothing is sent before"""
    _cut_at: float = -math.inf
    _limits_in_a_row: int = 0

    def slow_down(self, sent_at: float, now: float, asked: float, jitter: float) -> None:
        """An attempt that was sent at `sent_at` met a limit, with `asked` seconds to wait, or 0."""
        # All that was in flight together meets the limit together: that is one sign, not many.
        if sent_at > self._cut_at:
            self.allowed = max(1.0, _CUT * self.allowed)
            self._cut_at = now
            self._limits_in_a_row += 1
        pause = asked or growing(
            _FIRST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS, self._limits_in_a_row, jitter
        )
        self.resumes_at = max(self.resumes_at, now + pause)

    def speed_up(self) -> None:
        """An attempt succeeded."""
        self.allowed = min(self.most, self.allowed + _GROWTH / self.allowed)
        self._limits_in_a_row = 0


@dataclass
class Health:
    """Whether an endpoint is asked. After failures in a row it is set aside, and probed."""

    aside_since: float | None = None
    """None: it is asked as usual"""
    failures_in_a_row: int = 0
    next_probe_at: float = -math.inf
    is_probed: bool = False
    """a probing call is in flight"""
    _failed_probes: int = 0

    def fail(self, is_probe: bool, now: float, jitter: float) -> None:
        """An attempt failed, and the endpoint is to blame."""
        self.failures_in_a_row += 1
        if self.aside_since is None:
            if self.failures_in_a_row < _FAILURES_BEFORE_ASIDE:
                return
            self.aside_since = now
        elif not is_probe:
            return  # it was in flight when the endpoint was set aside, and says nothing new
        self._failed_probes += 1
        self.next_probe_at = now + growing(
            _FIRST_PROBE_SECONDS, _LONGEST_PROBE_SECONDS, self._failed_probes, jitter
        )

    def answer(self) -> None:
        """An attempt was answered: with success, or with a refusal of that request alone."""
        self.failures_in_a_row = self._failed_probes = 0
        self.aside_since = None

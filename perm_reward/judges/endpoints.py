"""Endpoints that judges are asked at: who is asked, how many calls at once, what is tried again.

A call waits in the queues of all its endpoints at once, and the first that has a place for it takes
it out of them all. So calls go where they are answered fastest, and nothing is ever handed over
when an endpoint pauses (a rate limit) or is set aside (failures in a row).
"""

import asyncio
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, TypeVar

import openai

from perm_reward.judges import JudgeConfig, Traffic
from perm_reward.judges.clock import call_begins, call_rests
from perm_reward.judges.connection import Connection
from perm_reward.judges.faults import (
    GaveUp,
    NoCompletion,
    failure_words,
    is_only_here,
    is_rate_limit,
    may_pass,
    retry_after,
)
from perm_reward.judges.pace import Health, Pace, growing, hashed_jitter
from perm_reward.verdict import Usage

Reply = TypeVar("Reply")

# Short: it is not these waits that spare an endpoint in trouble, but that it is set aside.
_FIRST_BACKOFF_SECONDS = 0.1
_LONGEST_BACKOFF_SECONDS = 2.0
# The timers of a loop may fire a hair before their time.
_TIMER_SLACK_SECONDS = 0.001


async def ask(call: "Call", attempt: Callable[["Endpoint"], Awaitable[Reply]]) -> Reply:
    """What `attempt` returns, which is tried again where that may help.

    A rate limit is waited out and not counted. Time-outs, lost connections, answers that are no
    chat completion, and http 408, 409 and 5xx are tried again up to the endpoint's max_retries; so
    is, where there are other endpoints, what only this one is to blame for (its key, its quota).

    Args:
        call: a new one.
        attempt: makes one attempt at the endpoint it is given, with `Endpoint.send`.

    Raises:
        GaveUp: all endpoints are set aside for longer than all attempts could have taken.
        Exception: what the last attempt raised.
    """
    call.move("waiting")
    try:
        while True:
            turn = await call.turn()
            try:
                reply = await attempt(turn.endpoint)
                turn.endpoint.succeed()
                return reply
            except Exception as error:
                pause = turn.endpoint.fail(error, turn, call)
            finally:
                turn.endpoint.end(turn)
            await asyncio.sleep(pause)
    finally:
        call.move("done")


@dataclass(frozen=True)
class Turn:
    """An endpoint's leave to make one attempt."""

    endpoint: "Endpoint"
    number: int
    given_at: float
    is_probe: bool


@dataclass(eq=False)
class Call:
    """One call, from its first wait to its end; `traffic` counts where it is at every moment."""

    endpoints: Sequence["Endpoint"]
    traffic: Traffic
    usage: Usage = Usage()
    """what its attempts were charged, all together; whoever reads their replies adds it up"""
    failures: int = 0
    avoided: "Endpoint | None" = None
    """where it failed last; it goes there again only if there is no other"""
    granted: "asyncio.Future[Turn]" = field(init=False)
    began: float = field(default_factory=lambda: asyncio.get_running_loop().time())
    _had_turns: int = 0
    _place: Literal["waiting", "in_flight", "failing", "done"] | None = None
    _is_out: bool = False
    _begins: Callable[[], None] | None = field(default_factory=call_begins.get)
    _rests: Callable[[], None] | None = field(default_factory=call_rests.get)

    def move(self, place: Literal["waiting", "in_flight", "failing", "done"]) -> None:
        """Be counted in another place of the traffic."""
        for name, change in ((self._place, -1), (place, +1)):
            if name is not None:
                setattr(self.traffic, name, getattr(self.traffic, name) + change)
        self._place = place
        is_out = place in ("in_flight", "failing")
        tell = self._begins if is_out else self._rests
        if is_out != self._is_out and tell is not None:
            tell()
        self._is_out = is_out

    def is_sent(self) -> None:
        """An attempt is on its way."""
        self.move("in_flight")

    async def turn(self) -> Turn:
        """Wait for a turn at any endpoint: behind all others, or before them after a first one."""
        self.granted = asyncio.get_running_loop().create_future()
        for endpoint in self.endpoints:
            endpoint.waiting[self] = None
            endpoint.waiting.move_to_end(self, last=self._had_turns == 0)
        for endpoint in sorted(self.endpoints, key=lambda e: (e is self.avoided, e.load)):
            endpoint.give_turns()
        try:
            turn = await self.granted
        except BaseException:
            self.leave_queues()
            if self.granted.done() and not self.granted.cancelled():
                if self.granted.exception() is None:  # it came just when the call was cancelled
                    self.granted.result().endpoint.end(self.granted.result())
            raise
        self._had_turns += 1
        return turn

    def leave_queues(self) -> None:
        for endpoint in self.endpoints:
            endpoint.waiting.pop(self, None)

    def has_choice(self, endpoint: "Endpoint", now: float) -> bool:
        """Whether an endpoint other than this one takes calls."""
        return any(not other.rests(now) for other in self.endpoints if other is not endpoint)

    def stuck_for(self, now: float) -> float:
        """The seconds for which all its endpoints have been set aside, counted from its start."""
        since = [endpoint.health.aside_since for endpoint in self.endpoints]
        if None in since:
            return 0.0
        return now - max(self.began, *(moment for moment in since if moment is not None))


class Endpoint:
    """One address with one key: its client, its limits and its queue.

    Judges can share it: the limits hold for all their calls together.

    Args:
        url: address; "" for OpenAI's own.
        key_variable: environment variable that holds the key.
        concurrency: attempts in flight at once.
        timeout_seconds: for one attempt.
        max_retries: how often a call is tried again.
        seed: of the jitter in waits.

    Raises:
        ValueError: the environment holds no key, or one that cannot be sent. One line.
    """

    def __init__(
        self,
        url: str,
        key_variable: str,
        *,
        concurrency: int,
        timeout_seconds: float,
        max_retries: int,
        seed: int = 0,
    ) -> None:
        self.connection = Connection(url, key_variable, timeout_seconds)
        self.concurrency = concurrency
        self.max_retries = max_retries
        self.pace = Pace(concurrency, float(concurrency))
        self.health = Health()
        self.waiting: OrderedDict[Call, None] = OrderedDict()
        self.found_out: dict[str, Any] = {}
        """what judges learn of its models; they write and read it"""
        self._patience = timeout_seconds * (max_retries + 1)
        self._in_flight = 0
        self._turns = 0
        self._seed = seed

    async def send(self, call: Call, request: dict[str, Any]) -> Any:
        """Send one request for a chat completion. Returns the answer's JSON, whatever it holds.

        Raises:
            NoCompletion: the answer is no JSON.
            TimeoutError: there was none in time.
            openai.APIError: no connection, or a status of 4xx or 5xx.
        """
        client = self._client  # which is made now, or refused
        call.is_sent()
        try:
            # The client's own time limit counts from byte to byte: what trickles in never ends.
            async with asyncio.timeout(self.connection.timeout_seconds):
                # `chat.completions.create` would take twice the time to make objects of the answer.
                return await client.post("/chat/completions", cast_to=object, body=request)
        except (ValueError, RecursionError):
            raise NoCompletion from None

    async def close(self) -> None:
        """Close the connections. No call follows."""
        if "_client" in vars(self):
            await self._client.close()

    @cached_property
    def _client(self) -> openai.AsyncOpenAI:
        return self.connection.client(self.concurrency)

    # --- turns ----------------------------------------------------------------------------------

    @property
    def load(self) -> tuple[float, int]:
        """By which calls choose among endpoints that have a place: the share that is in flight,
        and where that is the same, the turns so far."""
        return self._in_flight / self.pace.allowed, self._turns

    def rests(self, now: float) -> bool:
        """Whether nothing is sent at this moment, except to probe."""
        return now < self.pace.resumes_at or self.health.aside_since is not None

    def give_turns(self) -> None:
        """Give turns to those who wait, first come first served, as far as there are places."""
        now = asyncio.get_running_loop().time()
        while self._has_place(now):
            call = self._next(now)
            if call is None:
                return
            call.leave_queues()
            is_probe = self.health.aside_since is not None
            self.health.is_probed |= is_probe
            self._in_flight += 1
            self._turns += 1
            call.granted.set_result(Turn(self, self._turns, now, is_probe))

    def end(self, turn: Turn) -> None:
        """A turn is over, however it went."""
        self._in_flight -= 1
        if turn.is_probe:
            self.health.is_probed = False
        self.give_turns()

    def _has_place(self, now: float) -> bool:
        if now < self.pace.resumes_at or self._in_flight >= int(self.pace.allowed):
            return False
        if self.health.aside_since is None:
            return True
        return now >= self.health.next_probe_at and not self.health.is_probed

    def _next(self, now: float) -> Call | None:
        waiting = (call for call in self.waiting if not call.granted.done())
        if self.health.aside_since is not None:
            # A probe may well cost the call one of its retries: one that has most of them left.
            return min(waiting, key=lambda call: call.failures, default=None)
        fits = (c for c in waiting if c.avoided is not self or not c.has_choice(self, now))
        return next(fits, None)

    # --- how attempts went ----------------------------------------------------------------------

    def succeed(self) -> None:
        """An attempt succeeded."""
        self.pace.speed_up()
        self.health.answer()

    def fail(self, error: Exception, turn: Turn, call: Call) -> float:
        """An attempt failed: the seconds until its call may have another turn.

        Raises:
            Exception: `error`, where there is to be no other.
        """
        now = asyncio.get_running_loop().time()
        jitter = hashed_jitter(self._seed, self.connection.url, turn.number)
        if is_rate_limit(error):
            self.health.answer()
            self.pace.slow_down(turn.given_at, now, retry_after(error), jitter)
            self._rest_until(self.pace.resumes_at)
            call.move("waiting")
            return 0.0

        others_may_do = len(call.endpoints) > 1 and is_only_here(error)
        if not may_pass(error) and not others_may_do:
            self.health.answer()
            raise error
        self.health.fail(turn.is_probe, now, jitter)
        if self.health.aside_since is not None:
            self._rest_until(self.health.next_probe_at)
            self._send_away_the_stuck(now, error)
        call.failures += 1
        call.avoided = self
        if call.failures > self.max_retries or call.stuck_for(now) > self._patience:
            raise error
        call.move("failing")
        # A call that is merely unlucky, while others succeed, need not wait long.
        in_a_row = min(call.failures, self.health.failures_in_a_row)
        backoff = growing(_FIRST_BACKOFF_SECONDS, _LONGEST_BACKOFF_SECONDS, in_a_row, jitter)
        return max(backoff, retry_after(error))

    def _rest_until(self, moment: float) -> None:
        loop = asyncio.get_running_loop()
        loop.call_at(moment + _TIMER_SLACK_SECONDS, self.give_turns)
        # Those who wait here to avoid another endpoint may have no choice now.
        for avoided in dict.fromkeys(call.avoided for call in self.waiting):
            if avoided is not None and avoided is not self:
                avoided.give_turns()

    def _send_away_the_stuck(self, now: float, error: Exception) -> None:
        for call in list(self.waiting):
            if call.stuck_for(now) > self._patience and not call.granted.done():
                call.leave_queues()
                call.granted.set_exception(GaveUp(failure_words(error)))


def make_endpoint(
    config: JudgeConfig, url: str, key_variable: str, concurrency: int, seed: int
) -> Endpoint:
    """An endpoint with the limits of a judge's settings. Raises ValueError, see `Endpoint`."""
    return Endpoint(
        url,
        key_variable,
        concurrency=concurrency,
        timeout_seconds=config.timeout_seconds,
        max_retries=config.max_retries,
        seed=seed,
    )

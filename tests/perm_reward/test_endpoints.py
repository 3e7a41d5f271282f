"""Turns, retries, rate limits and outages, in virtual time: no server, no clock, no luck."""

import asyncio
import heapq
import random
import time
import weakref
from collections import Counter
from dataclasses import asdict
from email.utils import formatdate
from types import SimpleNamespace

import openai
import pytest

from perm_reward.judges import Traffic
from perm_reward.judges.clock import call_begins, call_rests
from perm_reward.judges.endpoints import Call, Endpoint, ask
from perm_reward.judges.faults import GaveUp, NoCompletion, failure_words, retry_after
from perm_reward.judges.pace import Health, Pace, growing, hashed_jitter
from perm_reward.reward import _Clock
from tests.perm_reward import virtual_time


def endpoint(name="a", concurrency=4, max_retries=4, timeout_seconds=60.0, seed=0):
    return Endpoint(
        f"http://{name}/v1",
        "NO_SUCH_KEY",
        concurrency=concurrency,
        timeout_seconds=timeout_seconds,
        max_retries=max_retries,
        seed=seed,
    )


def http_error(status, body=None, **headers):
    """What the client raises for a status; underscores stand for dashes in names of headers."""
    headers = {name.replace("_", "-"): value for name, value in headers.items()}
    response = SimpleNamespace(request=None, status_code=status, headers=headers)
    return openai.APIStatusError("no", response=response, body=body)


def now():
    return asyncio.get_running_loop().time()


class Calls:
    """Calls in virtual time to endpoints that behave as `answer` says.

    answer(endpoint, call_number, attempt) → (seconds, an error or None). Everything that is sent is
    logged as (moment, endpoint, call number), and the traffic is checked against a count of its
    own at each such moment.
    """

    def __init__(self, endpoints, answer):
        self.endpoints, self.answer = endpoints, answer
        self.traffic = Traffic()
        self.sent = []
        self.in_flight = Counter()
        self.most_in_flight = Counter()
        self.attempts = Counter()
        self.started = 0

    async def one(self, number):
        self.started += 1
        call = Call(self.endpoints, self.traffic)
        weakrefs.add(call)

        async def attempt(where):
            call.is_sent()
            self.sent.append((now(), where, number))
            self.attempts[number] += 1
            self.in_flight[where] += 1
            self.most_in_flight[where] = max(self.most_in_flight[where], self.in_flight[where])
            self.check_traffic()
            try:
                seconds, error = self.answer(where, number, self.attempts[number])
                await asyncio.sleep(seconds)
                if error is not None:
                    raise error
                return number
            finally:
                self.in_flight[where] -= 1

        return await ask(call, attempt)

    async def many(self, numbers):
        return await asyncio.gather(*(self.one(n) for n in numbers), return_exceptions=True)

    def check_traffic(self):
        traffic = self.traffic
        everywhere = traffic.waiting + traffic.in_flight + traffic.failing + traffic.done
        assert everywhere == self.started
        assert traffic.in_flight == self.in_flight.total()

    def check_all_is_over(self):
        assert asdict(self.traffic) == asdict(Traffic(done=self.started))
        for where in self.endpoints:
            assert (where._in_flight, len(where.waiting), where.health.is_probed) == (0, 0, False)


weakrefs = weakref.WeakSet()


def run(endpoints, numbers, answer):
    """Start all calls at once. Returns the Calls, what each came to, and how long it took."""

    async def go():
        calls = Calls(endpoints, answer)
        ends = await calls.many(numbers)
        calls.check_all_is_over()
        return calls, ends, now()

    return virtual_time.run(go())


# --- the rules -----------------------------------------------------------------------------------


def test_waits_grow_up_to_a_limit():
    assert [growing(0.5, 6.0, n, jitter=1.0) for n in (1, 2, 3, 4, 5, 999)] == [0.5, 1, 2, 4, 6, 6]
    assert growing(0.5, 6.0, 3, jitter=0.0) == 1.0, "half of it at least"


def test_jitter_is_a_hash():
    values = [hashed_jitter(0, "http://a/v1", n) for n in range(2000)]
    assert values == [hashed_jitter(0, "http://a/v1", n) for n in range(2000)]
    assert all(0 <= value < 1 for value in values)
    assert abs(sum(values) / 2000 - 0.5) < 5 * (1 / 12 / 2000) ** 0.5  # five standard errors
    assert hashed_jitter(1, "http://a/v1", 0) != values[0] != hashed_jitter(0, "http://b/v1", 0)


def test_a_rate_limit_cuts_once_for_all_that_was_in_flight():
    pace = Pace(most=100, allowed=100.0)
    for sent_at in (1.0, 1.1, 1.2):
        pace.slow_down(sent_at, now=2.0, asked=3.0, jitter=0.5)
    assert (pace.allowed, pace.resumes_at) == (70.0, 5.0)
    pace.slow_down(sent_at=2.5, now=3.0, asked=1.0, jitter=0.5)
    assert (pace.allowed, pace.resumes_at) == (49.0, 5.0), "a shorter wait does not shorten"
    for sent_at in range(10, 100):
        pace.slow_down(sent_at, sent_at, asked=1.0, jitter=0.5)
    assert pace.allowed == 1.0


def test_a_rate_limit_without_a_time_pauses_longer_each_time():
    pace = Pace(most=4, allowed=4.0)
    resumes = []
    for moment in (0.0, 100.0, 200.0):
        pace.slow_down(moment, moment, asked=0.0, jitter=1.0)
        resumes.append(pace.resumes_at)
    assert resumes == [0.25, 100.5, 201.0]
    pace.speed_up()
    pace.slow_down(300.0, 300.0, asked=0.0, jitter=1.0)
    assert pace.resumes_at == 300.25, "after a success it begins anew"


def test_what_was_cut_grows_back_by_one_in_two_rounds():
    pace = Pace(most=12, allowed=10.0)
    for _ in range(20):
        pace.speed_up()
    assert 10.9 < pace.allowed <= 11
    for _ in range(1000):
        pace.speed_up()
    assert pace.allowed == 12


def test_ten_failures_in_a_row_set_aside():
    health = Health()
    for moment in range(9):
        health.fail(False, moment, jitter=1.0)
    assert health.aside_since is None
    health.answer()
    for moment in range(9):
        health.fail(False, moment, jitter=1.0)
    assert health.aside_since is None, "an answer in between begins the count anew"
    health.fail(False, 9.0, jitter=1.0)
    assert (health.aside_since, health.next_probe_at) == (9.0, 10.0)
    health.fail(False, 9.5, jitter=1.0)
    assert health.next_probe_at == 10.0, "what was in flight already does not put off the probe"


def test_probes_become_rarer_up_to_a_limit_until_one_is_answered():
    health = Health()
    for _ in range(10):
        health.fail(False, 0.0, jitter=1.0)
    waits = []
    for _ in range(8):
        moment = health.next_probe_at
        health.fail(True, moment, jitter=1.0)
        waits.append(health.next_probe_at - moment)
    assert waits == [2, 4, 8, 16, 32, 60, 60, 60]
    health.answer()
    assert health.aside_since is None
    for _ in range(10):
        health.fail(False, 500.0, jitter=1.0)
    assert health.next_probe_at == 501.0, "the next outage begins with short waits again"


@pytest.mark.parametrize(
    "headers, seconds",
    [
        ({}, 0),
        ({"retry_after": "2"}, 2),
        ({"retry_after": "0.5"}, 0.5),
        ({"retry_after_ms": "250"}, 0.25),
        ({"retry_after_ms": "250", "retry_after": "9"}, 0.25),
        ({"retry_after_ms": "soon", "retry_after": "9"}, 9),
        ({"retry_after": "soon"}, 0),
        ({"retry_after": "-5"}, 0),
        ({"retry_after": "nan"}, 0),
        ({"retry_after": "inf"}, 3600),
        ({"retry_after": "1e9"}, 3600),
        ({"retry_after": "Wed, 21 Oct 2015 07:28:00 GMT"}, 0),
        ({"retry_after": "Wed, 99 Oct 2015 07:28:00 GMT"}, 0),
    ],
)
def test_retry_after_is_read(headers, seconds):
    assert retry_after(http_error(429, **headers)) == seconds


def test_retry_after_as_a_date(monkeypatch):
    monkeypatch.setattr(time, "time", lambda: 1_800_000_000.25)
    error = http_error(503, retry_after=formatdate(1_800_000_030, usegmt=True))
    assert retry_after(error) == 29.75
    assert retry_after(TimeoutError()) == 0


# --- what is tried again -------------------------------------------------------------------------


def connection_error():
    return openai.APIConnectionError(request=None)


@pytest.mark.parametrize(
    "error, attempts",
    [
        (TimeoutError(), 4),
        (openai.APITimeoutError(None), 4),
        (connection_error(), 4),
        (NoCompletion(), 4),
        (http_error(408), 4),
        (http_error(409), 4),
        (http_error(500), 4),
        (http_error(529), 4),
        (http_error(400), 1),
        (http_error(401), 1),
        (http_error(404), 1),
        (http_error(422), 1),
        (http_error(429, {"code": "insufficient_quota"}), 1),
        (http_error(429, {"type": "insufficient_quota"}), 1),
        (ValueError("a bug"), 1),
    ],
)
def test_what_may_pass_is_tried_again_as_often_as_allowed(error, attempts):
    calls, [end], _ = run([endpoint(max_retries=3)], [0], lambda *_: (0.1, error))
    assert end is error
    assert len(calls.sent) == attempts


def test_waits_between_attempts_grow_with_jitter_from_the_seed():
    def moments(seed):
        where = endpoint(seed=seed, max_retries=7)
        calls, _, _ = run([where], [0], lambda *_: (0.0, http_error(500)))
        return [moment for moment, _, _ in calls.sent]

    times = moments(seed=1)
    gaps = [after - before for before, after in zip(times, times[1:], strict=False)]
    for gap, longest in zip(gaps, [0.1, 0.2, 0.4, 0.8, 1.6, 2.0, 2.0], strict=True):
        assert longest / 2 <= gap <= longest + 1e-9
    assert moments(seed=1) == times != moments(seed=2)


def test_a_call_that_is_unlucky_while_others_succeed_does_not_wait_longer_each_time():
    """Call 0 fails eight times. Alone it waits 9 s in all at most, and here an eighth of that."""
    answers = {True: (0.0, http_error(500)), False: (0.05, None)}
    calls, ends, _ = run(
        [endpoint(concurrency=2, max_retries=8)],
        range(200),
        lambda where, number, attempt: answers[number == 0 and attempt <= 8],
    )
    assert ends == list(range(200))
    assert max(moment for moment, _, number in calls.sent if number == 0) < 8 * 0.15


def test_a_retry_waits_as_long_as_it_is_asked_to():
    answers = [(0.0, http_error(503, retry_after="7")), (0.0, None)]
    calls, [end], _ = run([endpoint()], [0], lambda e, c, attempt: answers[attempt - 1])
    assert end == 0
    assert calls.sent[1][0] == 7.0


def test_a_retry_does_not_queue_up_behind_all_others():
    """One place, 1 s each. The first call fails, backs off, and goes on before the fourth."""

    def answer(where, number, attempt):
        return 1.0, http_error(500) if (number, attempt) == (0, 1) else None

    calls, _, _ = run([endpoint(concurrency=1)], range(6), answer)
    assert [number for _, _, number in calls.sent] == [0, 1, 0, 2, 3, 4, 5]


# --- turns ---------------------------------------------------------------------------------------


def test_first_come_first_served_and_every_place_is_used():
    calls, ends, took = run([endpoint(concurrency=3)], range(12), lambda *_: (1.0, None))
    assert ends == list(range(12))
    assert [(moment, number) for moment, _, number in calls.sent] == [
        (n // 3, n) for n in range(12)
    ]
    assert took == 4.0


def test_calls_go_where_there_is_room():
    """The second endpoint takes three times as long: it gets a quarter of the calls, not half."""
    quick, slow = endpoint("quick", concurrency=2), endpoint("slow", concurrency=2)
    calls, ends, took = run(
        [quick, slow], range(80), lambda where, *_: (1.0 if where is quick else 3.0, None)
    )
    assert ends == list(range(80))
    assert Counter(where for _, where, _ in calls.sent) == {quick: 60, slow: 20}
    assert took == 30.0


def test_idle_endpoints_are_asked_in_turn():
    endpoints = [endpoint(name) for name in "abc"]

    async def go():
        calls = Calls(endpoints, lambda *_: (1.0, None))
        for number in range(9):
            await calls.one(number)
        return [where for _, where, _ in calls.sent]

    assert virtual_time.run(go()) == endpoints * 3


def test_a_retry_prefers_another_endpoint():
    bad, good = endpoint("bad", concurrency=50), endpoint("good", concurrency=2)

    def answer(where, number, attempt):
        return (0.0, http_error(500)) if where is bad else (1.0, None)

    calls, ends, _ = run([bad, good], range(8), answer)
    assert ends == list(range(8))
    at_bad = Counter(number for _, where, number in calls.sent if where is bad)
    assert at_bad and max(at_bad.values()) == 1, "there is room at the bad one, but no need"


def test_a_retry_goes_to_the_same_endpoint_where_the_other_has_been_set_aside_meanwhile():
    """Call 0 waits to be tried again at b, since a has failed it; then b's tenth call fails."""
    a, b = endpoint("a", concurrency=1), endpoint("b", concurrency=1, max_retries=0)

    def answer(where, number, attempt):
        if where is b:
            return 10.0 if number == 9 else 0.0, http_error(500)
        return 1.0, http_error(500) if attempt == 1 else None

    async def go():
        calls = Calls([a, b], answer)
        filling_b = Calls([b], answer)
        fillers = asyncio.create_task(filling_b.many(range(10)))
        await asyncio.sleep(0.001)
        assert await calls.one(0) == 0
        await fillers
        return calls.sent

    assert [(round(moment, 1), where) for moment, where, _ in virtual_time.run(go())] == [
        (0.0, a),
        (10.0, a),
    ]


def test_time_begins_with_the_first_attempt():
    """One place; the first call fails once. Each call's clock is started once, when it is sent."""
    began = []

    async def go():
        calls = Calls(
            [endpoint(concurrency=1)],
            lambda where, number, attempt: (1.0, http_error(500) if attempt == 1 else None),
        )

        async def clocked(number):
            call_begins.set(lambda: began.append((now(), number)))
            await calls.one(number)

        await asyncio.gather(*(clocked(number) for number in range(3)))
        return [(moment, number) for moment, _, number in calls.sent]

    sent = virtual_time.run(go())
    firsts = [next(moment for moment, n in sent if n == number) for number in range(3)]
    assert sorted(began) == sorted(zip(firsts, range(3), strict=True))
    assert len(sent) == 6


def test_a_call_rests_while_a_limit_passes_and_when_it_has_ended():
    """A failure is no rest: it is tried again, at the completion's cost."""
    errors = [http_error(500), http_error(429, retry_after="30"), http_error(500), None]
    told = []

    async def go():
        calls = Calls([endpoint()], lambda where, number, attempt: (1.0, errors[attempt - 1]))
        call_begins.set(lambda: told.append(("begins", now())))
        call_rests.set(lambda: told.append(("rests", now())))
        await calls.one(0)
        return [moment for moment, _, _ in calls.sent]

    sent = virtual_time.run(go())
    assert [name for name, _ in told] == ["begins", "rests"] * 2
    limited_at, ended_at = sent[1] + 1, sent[3] + 1
    assert [moment for _, moment in told] == [0, limited_at, sent[2], ended_at]
    assert sent[2] >= limited_at + 30


def completion_of(seconds, answer, calls=4, **settings):
    """What comes of a completion's calls, which may be out for so many seconds together."""

    async def go():
        clock = _Clock(seconds)
        call_begins.set(clock.call_begins)
        call_rests.set(clock.call_rests)
        own = Calls([endpoint(**settings)], answer)
        clock.tasks = [asyncio.create_task(own.one(number)) for number in range(calls)]
        ends = await asyncio.gather(*clock.tasks, return_exceptions=True)
        clock.stop()
        own.check_all_is_over()
        return ends, clock.has_rung, now()

    return virtual_time.run(go())


@pytest.mark.parametrize("concurrency", [1, 2, 4])
def test_a_rate_limit_does_not_use_up_a_completions_time(concurrency):
    """Each call is limited once, for 100 s; all of them together may take 20 s."""

    def answer(where, number, attempt):
        return 1.0, http_error(429, retry_after="100") if attempt == 1 else None

    ends, has_rung, took = completion_of(20.0, answer, concurrency=concurrency)
    assert (ends, has_rung) == ([0, 1, 2, 3], False)
    assert took > 100


def test_a_completions_time_is_up_once_calls_were_out_for_so_long():
    """Limited after 1 s, for 100 s; then it hangs: 4 s are left of 5, though others have ended."""

    def answer(where, number, attempt):
        if number == 0:
            return (1.0, http_error(429, retry_after="100")) if attempt == 1 else (1e6, None)
        return 0.5, None

    ends, has_rung, took = completion_of(5.0, answer)
    assert isinstance(ends[0], asyncio.CancelledError) and ends[1:] == [1, 2, 3]
    assert has_rung and took == pytest.approx(1 + 100 + 4, abs=0.01)


def test_a_completions_time_runs_while_one_call_rests_and_another_hangs():
    def answer(where, number, attempt):
        return (1.0, http_error(429, retry_after="100")) if number == 0 else (1e6, None)

    _, has_rung, took = completion_of(5.0, answer)
    assert has_rung and took == 5.0


def test_a_clock_that_is_stopped_does_not_start_again():
    """A call that other completions wait for, too, may be sent again when this one has its end."""

    async def go():
        clock = _Clock(5.0)
        clock.call_begins()
        clock.stop()
        clock.call_rests()
        clock.call_begins()
        await asyncio.sleep(10)
        return clock.has_rung

    assert virtual_time.run(go()) is False


# --- rate limits ---------------------------------------------------------------------------------


def test_a_rate_limit_is_no_retry():
    def answer(where, number, attempt):
        return 0.0, http_error(429) if attempt <= 20 else None

    _, ends, _ = run([endpoint(max_retries=0)], range(3), answer)
    assert ends == [0, 1, 2]


def test_nothing_is_sent_before_retry_after_has_passed():
    """The third call meets the limit at 2.5 s; all wait for it, those never sent too."""

    def answer(where, number, attempt):
        limited = number == 2 and attempt == 1
        return 0.5 if limited else 1.0, http_error(429, retry_after="30") if limited else None

    calls, ends, _ = run([endpoint(concurrency=1)], range(6), answer)
    assert ends == list(range(6))
    moments = [(round(moment, 2), number) for moment, _, number in calls.sent]
    assert moments == [(0, 0), (1, 1), (2, 2), (32.5, 2), (33.5, 3), (34.5, 4), (35.5, 5)]


def test_a_rate_limit_at_one_endpoint_leaves_the_others_alone():
    limited, free = endpoint("limited", concurrency=2), endpoint("free", concurrency=2)

    def answer(where, number, attempt):
        return (0.5, http_error(429, retry_after="600")) if where is limited else (1.0, None)

    calls, ends, took = run([limited, free], range(20), answer)
    assert ends == list(range(20))
    assert Counter(where for _, where, _ in calls.sent) == {limited: 2, free: 20}
    assert took == 10.0


@pytest.mark.parametrize("headers", [{}, {"retry_after_ms": "100"}])
def test_the_number_in_flight_settles_near_what_the_endpoint_takes(headers):
    """It answers eight at a time and refuses the ninth; the client may send 64."""
    where = endpoint(concurrency=64, max_retries=0)
    calls = None

    async def go():
        nonlocal calls

        def answer(*_):
            if calls.in_flight[where] > 8:
                return 0.01, http_error(429, **headers)
            return 0.5, None

        calls = Calls([where], answer)
        ends = await calls.many(range(2000))
        return ends, now()

    ends, took = virtual_time.run(go())
    assert ends == list(range(2000))
    refused = len(calls.sent) - 2000
    assert refused < 0.1 * 2000
    assert took < 1.5 * (2000 / 8 * 0.5), "all eight places are busy most of the time"


# --- outages -------------------------------------------------------------------------------------


def test_an_endpoint_that_keeps_failing_is_set_aside_and_others_take_its_calls():
    broken, sound = endpoint("broken", concurrency=8), endpoint("sound", concurrency=8)

    def answer(where, *_):
        return (0.01, connection_error()) if where is broken else (1.0, None)

    calls, ends, took = run([broken, sound], range(800), answer)
    assert ends == list(range(800))
    # Ten failures and what was in flight then; after that, one probe now and then.
    assert sum(where is broken for _, where, _ in calls.sent) < 10 + 8 + 10
    assert took < 1.1 * 100


def test_an_endpoint_that_is_back_is_used_again():
    broken, sound = endpoint("broken", concurrency=8), endpoint("sound", concurrency=8)

    def answer(where, *_):
        if where is broken and 10 <= now() < 40:
            return 0.01, connection_error()
        return 1.0, None

    calls, ends, _ = run([broken, sound], range(1600), answer)
    assert ends == list(range(1600))
    moments = [moment for moment, where, _ in calls.sent if where is broken]
    assert sum(12 < moment < 40 for moment in moments) < 10
    back_at = min(moment for moment in moments if moment >= 40)
    assert back_at < 40 + 33, "at most one wait between probes"
    later = sum(back_at + 1 <= moment < back_at + 11 for moment in moments)
    assert later == 80, "all its places again"


def test_calls_ride_out_an_outage_of_the_only_endpoint():
    """A self-hosted server is started again, which takes three minutes. Nothing is lost, and it is
    not beset meanwhile."""

    def answer(*_):
        return (0.01, connection_error()) if 5 <= now() < 185 else (1.0, None)

    calls, ends, _ = run([endpoint(concurrency=8)], range(200), answer)
    assert ends == list(range(200))
    assert sum(5 <= moment < 185 for moment, _, _ in calls.sent) < 10 + 8 + 10
    assert max(moment for moment, _, _ in calls.sent) < 185 + 61 + 200 / 8 + 5


def test_calls_fail_when_the_only_endpoint_stays_away():
    """They wait no longer than all their attempts could have taken, 5 · 60 s, and one probe."""
    _, ends, took = run(
        [endpoint(concurrency=8)], range(200), lambda *_: (0.01, connection_error())
    )
    assert {failure_words(end) for end in ends} == {"connection"}
    assert any(isinstance(end, GaveUp) for end in ends)
    assert 300 < took < 300 + 2 * 60


def test_one_call_after_another_to_an_endpoint_that_is_away():
    """Nobody waits whose failure could start a probe: each call is one."""

    async def go():
        calls = Calls([endpoint(max_retries=2)], lambda *_: (0.01, connection_error()))
        return [(await calls.many([number]))[0] for number in range(30)]

    assert {failure_words(end) for end in virtual_time.run(go())} == {"connection"}


def test_a_refused_key_at_one_of_two_endpoints():
    """Its calls go to the other one; it is set aside like any endpoint that fails."""
    refusing, sound = endpoint("refusing"), endpoint("sound")
    for error in (http_error(401), http_error(429, {"code": "insufficient_quota"})):
        calls, ends, _ = run(
            [refusing, sound],
            range(100),
            lambda where, *_, error=error: (0.1, error if where is refusing else None),
        )
        assert ends == list(range(100))
        assert sum(where is refusing for _, where, _ in calls.sent) < 20


@pytest.mark.parametrize("failures_between", [0, 9])
def test_a_bad_request_is_nobodys_outage(failures_between):
    """It is an answer: failures before and after it are not in a row."""

    def answer(where, number, attempt):
        return 1.0, http_error(500 if number % (failures_between + 1) else 400)

    where = endpoint(concurrency=1, max_retries=0)
    calls, _, took = run([where], range(40), answer)
    assert (len(calls.sent), took) == (40, 40.0)
    assert where.health.aside_since is None


# --- cancellation and memory ---------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(8))
def test_cancelled_calls_leave_places_and_counts_right(seed):
    """Calls are cancelled at random moments: in queues, in flight, between attempts, and in the
    very moment when a turn is given. What is left must be as if they had never been."""
    print(f"seed {seed}")
    rng = random.Random(seed)
    endpoints = [endpoint("a", concurrency=3), endpoint("b", concurrency=2)]

    def answer(where, number, attempt):
        seconds = rng.choice([0.5, 1.0])
        return seconds, rng.choice([None, None, http_error(500), http_error(429), TimeoutError()])

    async def go():
        calls = Calls(endpoints, answer)
        tasks = [asyncio.create_task(calls.one(number)) for number in range(150)]
        for task in rng.sample(tasks, 100):
            await asyncio.sleep(rng.choice([0.0, 0.0, 0.5]))
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        calls.check_all_is_over()

        calls.answer = lambda *_: (1.0, None)
        for where in endpoints:
            where.pace.allowed, where.pace.resumes_at = float(where.pace.most), now()
        calls.most_in_flight.clear()
        assert await calls.many(range(50)) == list(range(50))
        calls.check_all_is_over()
        return calls.most_in_flight

    assert virtual_time.run(go()) == dict(zip(endpoints, (3, 2), strict=True))


def test_a_turn_that_comes_when_its_call_is_cancelled_goes_to_the_next():
    async def go():
        calls = Calls([endpoint(concurrency=1)], lambda *_: (1.0, None))

        async def first():
            await calls.one(0)  # the end of which has given the second a turn
            second.cancel()

        tasks = [asyncio.create_task(first())]
        tasks += [asyncio.create_task(calls.one(number)) for number in (1, 2)]
        second = tasks[1]
        await asyncio.gather(*tasks, return_exceptions=True)
        calls.check_all_is_over()
        return [number for _, _, number in calls.sent], second.cancelled()

    assert virtual_time.run(go()) == ([0, 2], True)


def test_calls_are_forgotten():
    weakrefs.clear()  # errors that other tests have made hold on to their calls
    run([endpoint("a"), endpoint("b")], range(50), lambda *_: (1.0, None))
    assert not weakrefs


# --- time ----------------------------------------------------------------------------------------


def ideal_seconds(places, calls, answer):
    """`places` servers, calls in order; a fault costs its time, and is tried again at once."""
    free_at = [0.0] * places
    for number in range(calls):
        attempt, error = 0, True
        while error is not None:
            attempt += 1
            seconds, error = answer(number, attempt)
            heapq.heapreplace(free_at, free_at[0] + seconds)
    return max(free_at)


def unit(*what):
    return hashed_jitter("test", *what)


@pytest.mark.parametrize("seed", range(4))
def test_time_is_near_the_ideal_with_three_faults_in_ten(seed):
    """8,000 calls, latencies of 0.2 to 1 s, 30 % faults of which a fifth are hangs of 2 s."""
    print(f"seed {seed}")

    def drawn(number, attempt):
        seconds = 0.2 + 0.8 * unit(seed, "seconds", number, attempt)
        fault = unit(seed, "fault", number, attempt)
        if fault < 0.06:
            return 2.0, TimeoutError()
        return seconds, http_error(500) if fault < 0.3 else None

    ideal = ideal_seconds(64, 8000, drawn)
    calls, ends, took = run(
        [endpoint(concurrency=64, max_retries=12, seed=seed)],
        range(8000),
        lambda where, number, attempt: drawn(number, attempt),
    )
    assert ends == list(range(8000))
    print(f"ideal {ideal:.1f} s, took {took:.1f} s")
    assert took < 1.1 * ideal

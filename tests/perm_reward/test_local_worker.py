"""LocalJudge's worker thread, which takes one call after the other. No model: a stub is read."""

import asyncio
import math
import threading

import pytest

from perm_reward.judges import JudgeConfig, local
from perm_reward.judges.clock import call_begins
from perm_reward.judges.local import LocalJudge
from perm_reward.prompts import Seeker

ANNA = Seeker("Anna, a nurse", "Her shift was cut", "I feel invisible.")


class StubReader:
    """Reads what the test says. Prompts are the calls' texts, one letter a token."""

    def __init__(self):
        self.answer = score_of_four
        self.texts = []
        self.threads = set()

    def prompt(self, messages):
        text = messages[-1]["content"].split("> ")[-1].split("\n")[0]
        if "unencodable" in text:
            raise UnicodeEncodeError("utf-8", text, 0, 1, "no")
        return tuple(map(ord, text))

    def is_too_long(self, role, prompt):
        return len(prompt) > 100

    def read(self, role, prompt):
        text = "".join(map(chr, prompt))
        self.texts.append(text)
        self.threads.add(threading.current_thread().name)
        return self.answer(text)


def score_of_four(text):
    return {"Score": {3: 0.2, 4: 0.2, 5: 0.2}}


@pytest.fixture
def stub():
    return StubReader()


@pytest.fixture
def judge(stub, monkeypatch):
    monkeypatch.setattr(local, "load_score_reader", lambda *arguments: stub)
    judge = LocalJudge(JudgeConfig(kind="local"))
    yield judge
    asyncio.run(asyncio.wait_for(judge.close(), 20))


def ask(judge, *texts, role="expression"):
    """The verdicts on all texts, asked for at once; or what was raised instead."""

    async def ask_all():
        async with asyncio.timeout(20):  # a worker that has died answers nothing
            answers = (judge.judge(role, ANNA, text) for text in texts)
            return await asyncio.gather(*answers, return_exceptions=True)

    return asyncio.run(ask_all())


async def until(condition):
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.005)


class Held:
    """Holds the worker at a text until it is let go."""

    def __init__(self, stub, *texts):
        self.reached, self.go_on = ({text: threading.Event() for text in texts} for _ in range(2))
        stub.answer = self.answer

    def answer(self, text):
        if text in self.reached:
            self.reached[text].set()
            assert self.go_on[text].wait(20)
        return score_of_four(text)


# --- from distributions to a verdict -------------------------------------------------------------


def test_the_expectation_becomes_the_score(judge, stub):
    stub.answer = lambda text: {"Score": {1: 0.0, 2: 0.05, 3: 0.0, 4: 0.1, 5: 0.05}}
    [verdict] = ask(judge, "a")
    assert verdict.score == pytest.approx(3.75)
    assert verdict.reply == "Score: 3.75 (2: 25 %, 4: 50 %, 5: 25 %, on the scale: 20 %)"


def test_the_parts_of_a_bystander_are_summed(judge, stub):
    stub.answer = lambda text: {"Objectivity": {10: 0.5, 20: 0.5}, "Accuracy": {0: 0.25, 1: 0.75}}
    [verdict] = ask(judge, "a", role="bystander")
    assert verdict.score == 15.75
    assert verdict.reply.splitlines() == [
        "Objectivity: 15.00 (10: 50 %, 20: 50 %, on the scale: 100 %)",
        "Accuracy: 0.75 (0: 25 %, 1: 75 %, on the scale: 100 %)",
        "Total: 15.75",
    ]


def test_what_is_not_a_number_is_no_score(judge, stub):
    stub.answer = lambda text: {"Score": dict.fromkeys(range(1, 6), math.nan)}
    [verdict] = ask(judge, "a")
    assert (verdict.score, verdict.failure) == (None, "not a number")


@pytest.mark.parametrize("mass, is_read", [(0.011, True), (0.009, False), (0.0, False)])
def test_what_is_hardly_on_the_scale_is_no_score(judge, stub, mass, is_read):
    """An expectation over crumbs is a number like any other, and would be trained on."""
    stub.answer = lambda text: {"Score": {1: mass / 4, 4: mass / 4, 5: mass / 2}}
    [verdict] = ask(judge, "a")
    if is_read:
        assert (verdict.score, verdict.failure) == (pytest.approx(3.75), None)
    else:
        assert (verdict.score, verdict.failure) == (None, "off the scale")
        assert f"on the scale: {100 * mass:.3g} %" in verdict.reply


def test_each_dimension_of_a_bystander_must_be_on_the_scale(judge, stub):
    stub.answer = lambda text: {"Objectivity": {10: 0.9}, "Accuracy": {0: 0.001, 1: 0.002}}
    [verdict] = ask(judge, "a", role="bystander")
    assert (verdict.score, verdict.failure) == (None, "off the scale")


def test_a_prompt_that_does_not_fit_the_model_is_a_failure_of_its_own(judge):
    short, long = ask(judge, "a", "a" * 101)
    assert (short.score, long.score, long.failure) == (4, None, "prompt too long")


def test_one_call_that_fails_fails_alone(judge, stub):
    def answer(text):
        if text == "broken":
            raise RuntimeError("out of memory")
        return score_of_four(text)

    stub.answer = answer
    outcomes = ask(judge, "a good one", "unencodable", "broken", "another")
    assert [type(o).__name__ for o in outcomes] == [
        "Verdict",
        "UnicodeEncodeError",
        "RuntimeError",
        "Verdict",
    ]
    [after] = ask(judge, "and the next")
    assert after.score == 4
    assert judge.traffic.done == 5 and judge.traffic.in_flight == 0


# --- one after the other -------------------------------------------------------------------------


def test_calls_are_read_one_by_one_in_the_order_in_which_they_come(judge, stub):
    """In one thread, and without those that were cancelled while they waited."""
    held = Held(stub, "first")

    async def ask_all():
        first = asyncio.create_task(judge.judge("expression", ANNA, "first"))
        await until(held.reached["first"].is_set)
        later = [asyncio.create_task(judge.judge("expression", ANNA, f"{i}")) for i in range(6)]
        await until(lambda: judge.traffic.waiting == 6)
        assert judge.traffic.in_flight == 1
        dropped = later.pop(2)
        dropped.cancel()
        await asyncio.wait([dropped])
        held.go_on["first"].set()
        return await asyncio.gather(first, *later)

    verdicts = asyncio.run(ask_all())
    assert [verdict.score for verdict in verdicts] == pytest.approx([4] * 6)
    assert stub.texts == ["first", "0", "1", "3", "4", "5"]
    assert stub.threads == {"local-judge"}


def test_a_call_given_up_while_it_is_read_does_no_harm(judge, stub):
    """Its result has nowhere to go, and the worker must live on."""
    held = Held(stub, "a")

    async def run():
        given_up = asyncio.create_task(judge.judge("expression", ANNA, "a"))
        await until(held.reached["a"].is_set)
        given_up.cancel()
        await asyncio.wait([given_up])
        held.go_on["a"].set()
        async with asyncio.timeout(20):
            return await judge.judge("expression", ANNA, "b")

    assert asyncio.run(run()).score == 4
    assert stub.texts == ["a", "b"]


# --- the clock -----------------------------------------------------------------------------------


def test_a_call_begins_when_it_is_read_and_not_while_it_waits(judge, stub):
    """What is told starts a timer of the loop, so it is told on the loop's thread."""
    held = Held(stub, "a", "b")
    begun, threads = [], set()

    async def ask_one(text):
        def begins():
            begun.append(text)
            threads.add(threading.current_thread())
            asyncio.get_running_loop()

        call_begins.set(begins)
        return await judge.judge("expression", ANNA, text)

    async def run():
        calls = [asyncio.create_task(ask_one(text)) for text in ("a", "b")]
        await until(held.reached["a"].is_set)
        await until(lambda: begun)
        assert begun == ["a"]
        held.go_on["a"].set()
        await until(held.reached["b"].is_set)
        await until(lambda: len(begun) > 1)
        assert not calls[1].done()
        held.go_on["b"].set()
        await asyncio.gather(*calls)

    asyncio.run(run())
    assert begun == ["a", "b"]
    assert threads == {threading.current_thread()}


def test_a_loop_that_has_ended_need_not_be_told(judge, stub):
    """Its calls may wait behind another's when it ends, uncancelled; the worker must live on."""
    held = Held(stub, "first")
    loop = asyncio.new_event_loop()

    async def run():
        call_begins.set(lambda: None)
        first = asyncio.create_task(judge.judge("expression", ANNA, "first"))
        await until(held.reached["first"].is_set)
        calls = [first, asyncio.create_task(judge.judge("expression", ANNA, "left behind"))]
        await until(lambda: judge.traffic.waiting == 1)
        return calls

    left = loop.run_until_complete(run())
    loop.close()
    held.go_on["first"].set()
    assert ask(judge, "a")[0].score == 4
    assert stub.texts == ["first", "left behind", "a"]
    for task in left:  # or asyncio reports them as lost
        task._log_destroy_pending = False


# --- the end -------------------------------------------------------------------------------------


def test_closing_cancels_what_waits_and_ends_the_thread(judge, stub):
    held = Held(stub, "a")

    async def run():
        async with asyncio.timeout(20):
            calls = [asyncio.create_task(judge.judge("expression", ANNA, t)) for t in ("a", "b")]
            await until(held.reached["a"].is_set)
            await until(lambda: judge.traffic.waiting == 1)
            closing = asyncio.create_task(judge.close())
            await until(judge._closing.is_set)
            held.go_on["a"].set()
            await closing
            return await asyncio.gather(*calls, return_exceptions=True)

    a, waiting = asyncio.run(run())
    assert a.score == 4
    assert isinstance(waiting, asyncio.CancelledError)
    judge._worker.join(20)
    assert not judge._worker.is_alive()
    assert stub.texts == ["a"]


def test_a_judge_that_was_never_asked_closes(judge):
    asyncio.run(asyncio.wait_for(judge.close(), 20))

"""Many judges as one: each verdict is asked for once, kept, averaged, and counted."""

import asyncio
import gc
import time
from dataclasses import asdict, replace

import pytest

from perm_reward import PermReward
from perm_reward.judges import Traffic
from perm_reward.judges.clock import call_begins
from perm_reward.panel import Cost, Panel, Prices
from perm_reward.prompts import Seeker
from perm_reward.rubrics import ROLES
from perm_reward.store_service import RemoteStore, serve_store, socket_path
from perm_reward.verdict import Usage, Verdict
from perm_reward.verdict_store import StoreError, VerdictStore, now, read_verdicts

ANNA = Seeker("Anna, a nurse", "Her shift was cut", "I feel invisible.")
PAID = Usage(prompt_tokens=1000, cached_tokens=800, completion_tokens=50)


class FakeJudge:
    """Answers from a list, one after the other; an exception in it is raised, a gate waited for."""

    label = "fake"

    def __init__(self, *answers, label="fake"):
        self.answers = list(answers)
        self.label = label
        self.calls = []
        self.checked = self.closed = self.cancelled = 0
        self.gate = asyncio.Event()
        self.gate.set()

    def check(self):
        self.checked += 1

    async def judge(self, role, seeker, judged_text):
        self.calls.append((role, judged_text))
        answer = self.answers.pop(0) if self.answers else 4
        try:
            await self.gate.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        if isinstance(answer, Exception):
            raise answer
        if isinstance(answer, str):
            return Verdict(role, None, f"({answer})", answer, PAID)
        return Verdict(role, answer, f"Score: {answer}", usage=PAID)

    async def close(self):
        self.closed += 1


class AskingJudge(FakeJudge):
    """Tells what determines its verdicts; here the text alone, without the seeker."""

    def asked(self, role, seeker, judged_text):
        return {"messages": [{"role": "user", "content": judged_text}], "model": "fake"}


def panel(judge, samples=1, prices=None, store=None):
    return Panel(
        dict.fromkeys(ROLES, judge),
        dict.fromkeys(ROLES, samples),
        dict.fromkeys(ROLES, prices or Prices()),
        store,
    )


@pytest.fixture
def store(tmp_path):
    store = VerdictStore(tmp_path / "verdicts" / "node-0.sqlite")
    yield store
    store.close()


def ask(panel, text="I see you.", role="reception", seeker=ANNA):
    return asyncio.run(panel.judge(role, seeker, text))


# --- samples -------------------------------------------------------------------------------------


def test_the_score_is_the_mean_of_the_samples():
    verdict = ask(panel(FakeJudge(5, 4, 2, 4), samples=4))
    assert verdict.score == 3.75
    assert verdict.usage == Usage(4000, 3200, 200)
    assert verdict.reply == (
        "[sample 1 of 4: 5]\nScore: 5\n\n[sample 2 of 4: 4]\nScore: 4\n\n"
        "[sample 3 of 4: 2]\nScore: 2\n\n[sample 4 of 4: 4]\nScore: 4"
    )


def test_equal_samples_give_their_score_exactly():
    """Any rounding here would give equal completions unequal rewards, and so advantages."""
    for score in (1.1, 3.3, 4.7):
        for count in range(2, 12):
            assert ask(panel(FakeJudge(*[score] * count), samples=count)).score == score


def test_a_single_sample_is_handed_on_unchanged():
    assert repr(ask(panel(FakeJudge(4)))) == repr(Verdict("reception", 4, "Score: 4", None, PAID))


def test_a_missing_sample_leaves_no_score():
    """The mean of the rest would be a score that nobody gave."""
    verdict = ask(panel(FakeJudge(5, "timeout", 5, "unparsable"), samples=4))
    assert (verdict.score, verdict.failure) == (None, "timeout")
    assert "[sample 4 of 4: unparsable]\n(unparsable)" in verdict.reply
    assert verdict.usage == Usage(4000, 3200, 200)


def test_samples_are_asked_for_at_once():
    judge = FakeJudge()
    judge.gate.clear()

    async def run():
        asking = asyncio.create_task(panel(judge, samples=3).judge("reception", ANNA, "text"))
        await asyncio.sleep(0.01)
        assert len(judge.calls) == 3
        judge.gate.set()
        await asking

    asyncio.run(run())


def test_each_role_is_asked_of_its_own_judge_as_often_as_it_says():
    judges = {role: FakeJudge(label=role) for role in ROLES}
    samples = dict(zip(ROLES, (1, 2, 3, 4), strict=True))
    own = Panel(judges, samples, dict.fromkeys(ROLES, Prices()))
    for role in ROLES:
        ask(own, role=role)
        assert judges[role].calls == [(role, "I see you.")] * samples[role]


# --- the store -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [FakeJudge, AskingJudge])
def test_what_was_asked_once_is_found(store, kind):
    judge = kind(5, 3, "timeout")
    first = [ask(panel(judge, store=store), text) for text in "abc"]
    again = [ask(panel(judge, store=store), text) for text in "abc"]
    assert len(judge.calls) == 3
    assert [replace(verdict, usage=PAID) for verdict in again] == first
    assert all(verdict.usage == Usage() for verdict in again)


def test_each_sample_is_found_in_its_place(store):
    """A retest that reads its own first answer would show a judge that never wavers."""
    judge = FakeJudge(5, 1, 3)
    first = ask(panel(judge, samples=2, store=store))
    assert first.score == 3 and len(judge.calls) == 2
    third = ask(panel(judge, samples=3, store=store))
    assert third.score == 3 and len(judge.calls) == 3
    assert third.usage == PAID  # of the third alone
    assert ask(panel(judge, samples=1, store=store)).score == 5


def test_other_questions_are_asked_of_their_own(store):
    judge, asking = FakeJudge(), AskingJudge()
    bert = Seeker("Bert", "", "")
    for role, seeker, text in [
        ("reception", ANNA, "a"),
        ("reception", ANNA, "b"),
        ("expression", ANNA, "a"),
        ("reception", bert, "a"),
    ]:
        ask(panel(judge, store=store), text, role, seeker)
        ask(panel(asking, store=store), text, role, seeker)
    assert len(judge.calls) == 4
    assert len(asking.calls) == 3  # this one says that the seeker does not matter
    ask(panel(FakeJudge(label="another"), store=store), "a")
    assert store.get("none") is None


def test_rows_tell_what_was_asked_and_what_it_cost(store, tmp_path):
    ask(panel(AskingJudge(5), store=store))
    ask(panel(FakeJudge("timeout"), store=store))
    ask(panel(AskingJudge(5), samples=2, store=store))
    store.close()
    first, second, third = read_verdicts(tmp_path)
    assert first.asked == AskingJudge().asked("reception", ANNA, "I see you.")
    assert second.asked == {"judge": "fake", "seeker": asdict(ANNA), "text": "I see you."}
    assert first.verdict.usage == second.verdict.usage == PAID
    assert (first.label, first.judged_text) == ("fake", "I see you.")
    assert [row.sample for row in (first, second, third)] == [0, 0, 1]


def test_failures_are_kept_until_they_are_forgotten(store):
    judge = FakeJudge("timeout", 5, "unparsable", 4)
    own = panel(judge, store=store)
    assert [ask(own, text).failure or ask(own, text).score for text in "ab"] == ["timeout", 5]
    assert ask(own, "a").failure == "timeout"
    own.forget_failures()
    assert ask(own, "a").failure == "unparsable"  # asked anew
    assert ask(own, "a").failure == "unparsable"  # and kept again
    assert ask(panel(judge, store=store), "a").failure == "unparsable"  # by a resumed run too
    assert len(judge.calls) == 3
    own.forget_failures()
    assert ask(own, "a").score == 4
    assert ask(own, "a").score == 4
    assert ask(own, "b").score == 5
    assert len(judge.calls) == 4


def test_a_verdict_for_another_role_is_not_kept(store):
    class Confused(FakeJudge):
        async def judge(self, role, seeker, judged_text):
            return Verdict("bystander", 70, "Total: 70")

    with pytest.raises(ValueError, match="the verdict of bystander came for reception"):
        ask(panel(Confused(), store=store))
    assert ask(panel(FakeJudge(4), store=store)).score == 4


def test_a_store_that_another_process_serves(tmp_path):
    path = tmp_path / "verdicts" / "node-0.sqlite"
    judge = FakeJudge(5, 3, "timeout", 4)

    async def run():
        verdicts = []
        for _ in range(2):
            own = panel(judge, samples=4, store=RemoteStore(socket_path(path)))
            verdicts.append(await own.judge("reception", ANNA, "text"))
            await own.close()
        assert verdicts == [verdicts[0], replace(verdicts[0], usage=Usage())]
        assert verdicts[0].failure == "timeout" and len(judge.calls) == 4

    with serve_store(VerdictStore(path), socket_path(path)):
        asyncio.run(run())


def test_a_store_that_is_gone_is_an_error_and_no_missing_verdict(tmp_path):
    row = {"persona": ["Anna"], "scenario": [""], "query": [""]}
    own = panel(FakeJudge(), store=RemoteStore(tmp_path / "none"))
    with pytest.raises(StoreError):
        ask(own)
    with PermReward(panel(FakeJudge(), store=RemoteStore(tmp_path / "none"))) as reward:
        completions = ["# Analysis\nShe feels unseen.\n# Response\nI see you."]
        with pytest.raises(StoreError):
            reward(["prompt"], completions, completion_ids=[[1]], **row)


# --- the same question at the same time ----------------------------------------------------------


def together(judge, *steps, samples=1, store=None):
    """Three who ask the same; `steps` run with them, then the gate opens."""
    judge.gate.clear()
    own = panel(judge, samples=samples, store=store)

    async def run():
        asking = [asyncio.create_task(own.judge("reception", ANNA, "text")) for _ in range(3)]
        await asyncio.sleep(0.01)
        for step in steps:
            step(asking)
            await asyncio.sleep(0.01)
        judge.gate.set()
        return await asyncio.gather(*asking, return_exceptions=True)

    return asyncio.run(run()), own


def test_a_question_in_flight_is_not_asked_again():
    judge = FakeJudge(5, 1, 1)
    verdicts, own = together(judge)
    assert [verdict.score for verdict in verdicts] == [5, 5, 5]
    assert len(judge.calls) == 1
    assert sorted(v.usage.prompt_tokens for v in verdicts) == [0, 0, 1000]
    assert own.costs()["reception"] == Cost(1, 1000, 800, 50, 0.0, found=2)
    assert not own._in_flight  # or a run of days would hold all that was ever asked


def test_samples_of_one_question_are_not_one_question():
    judge = FakeJudge(5, 1)
    verdicts, _ = together(judge, samples=2)
    assert [verdict.score for verdict in verdicts] == [3, 3, 3]
    assert len(judge.calls) == 2


@pytest.mark.parametrize("who", [0, 1])
def test_one_who_is_cancelled_leaves_the_call_to_the_others(who):
    judge = FakeJudge(5)
    verdicts, own = together(judge, lambda asking: asking[who].cancel())
    assert isinstance(verdicts.pop(who), asyncio.CancelledError)
    assert [verdict.score for verdict in verdicts] == [5, 5]
    assert (len(judge.calls), judge.cancelled) == (1, 0)
    assert sum(v.usage.prompt_tokens for v in verdicts) == own.costs()["reception"].prompt_tokens


def test_a_call_that_nobody_waits_for_is_ended_and_can_be_asked_again():
    """Or calls of completions whose time is up would hold the places of others."""
    judge = FakeJudge(5, 3)
    own = panel(judge)

    async def run():
        judge.gate.clear()
        asking = [asyncio.create_task(own.judge("reception", ANNA, "text")) for _ in range(3)]
        await asyncio.sleep(0.01)
        for task in asking:
            task.cancel()
        next_one = asyncio.create_task(own.judge("reception", ANNA, "text"))  # at once
        await asyncio.sleep(0.01)
        assert (len(judge.calls), judge.cancelled) == (2, 1)
        later = asyncio.create_task(own.judge("reception", ANNA, "text"))
        await asyncio.sleep(0.01)
        judge.gate.set()
        assert ((await next_one).score, (await later).score, len(judge.calls)) == (3, 3, 2)

    asyncio.run(run())


def test_an_exception_reaches_all_who_wait_and_is_not_kept(store):
    judge = FakeJudge(RuntimeError("broken"), 4)
    outcomes, own = together(judge, store=store)
    assert [str(outcome) for outcome in outcomes] == ["broken"] * 3
    assert len(judge.calls) == 1
    assert ask(panel(judge, store=store), "text").score == 4


def test_an_exception_of_one_sample_does_not_lose_the_others(store):
    class Hasty(FakeJudge):
        async def judge(self, role, seeker, judged_text):
            if not isinstance(self.answers[0], Exception):
                await asyncio.sleep(0.01 * len(self.answers))
            return await super().judge(role, seeker, judged_text)

    judge = Hasty(RuntimeError("broken"), 5, 5)
    with pytest.raises(RuntimeError, match="broken"):
        ask(panel(judge, samples=3, store=store))
    judge.answers = [2]
    assert ask(panel(judge, samples=3, store=store)).score == 4  # only the first is asked again
    assert len(judge.calls) == 4


def test_an_exception_after_all_have_left_is_not_reported_as_lost():
    class Stubborn(FakeJudge):
        async def judge(self, role, seeker, judged_text):
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                raise RuntimeError("while it was cancelled") from None

    reports = []

    async def run():
        asyncio.get_running_loop().set_exception_handler(
            lambda loop, report: reports.append(report)
        )
        asking = asyncio.create_task(panel(Stubborn()).judge("reception", ANNA, "text"))
        await asyncio.sleep(0.01)
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
        del asking  # asyncio reports when the task is let go
        await asyncio.sleep(0.01)
        gc.collect()

    asyncio.run(run())
    assert reports == []


def test_everybodys_time_runs_from_when_the_call_is_sent():
    """A completion's limit counts from its first call; another's question may have sent it."""
    told = []

    class Telling(FakeJudge):
        async def judge(self, role, seeker, judged_text):
            begins = call_begins.get()
            await self.gate.wait()
            begins()
            await asyncio.sleep(0.02)
            return Verdict(role, 4, "Score: 4")

    judge = Telling()
    judge.gate.clear()
    own = panel(judge)

    async def ask_as(name):
        call_begins.set(lambda: told.append(name))
        await own.judge("reception", ANNA, "text")

    async def run():
        asking = [asyncio.create_task(ask_as(name)) for name in ("first", "second")]
        await asyncio.sleep(0.01)
        assert told == []
        judge.gate.set()
        await asyncio.sleep(0.01)
        assert told == ["first", "second"]
        asking.append(asyncio.create_task(ask_as("third")))
        await asyncio.gather(*asking)
        assert told == ["first", "second", "third"]

    asyncio.run(run())


# --- costs ---------------------------------------------------------------------------------------


def test_costs_by_hand(store):
    prices = Prices(input=0.15, cached=0.075, output=0.6)
    own = panel(FakeJudge(), samples=2, prices=prices, store=store)
    ask(own, "a")
    ask(own, "b")
    ask(own, "a")
    ask(own, "a", role="bystander")
    # A call: 200 · 0.15 + 800 · 0.075 + 50 · 0.6 = 30 + 60 + 30 = 120 millionths.
    reception = own.costs()["reception"]
    assert reception == Cost(4, 4000, 3200, 200, pytest.approx(480e-6), found=2)
    assert own.costs()["bystander"] == Cost(2, 2000, 1600, 100, pytest.approx(240e-6), found=0)
    assert own.costs()["expression"] == Cost()
    total = sum(own.costs().values(), Cost())
    assert total == Cost(6, 6000, 4800, 300, pytest.approx(720e-6), found=2)


def test_failures_cost_too():
    own = panel(FakeJudge("unparsable"), prices=Prices(input=1.0))
    ask(own)
    assert own.costs()["reception"] == Cost(1, 1000, 800, 50, pytest.approx(1e-3), found=0)


def test_what_was_paid_after_the_account_was_closed_is_charged_once(store):
    """A run goes on from an account that knows of the first call, but not of those after it: a
    failure, and the answer when it was asked about again."""
    before = panel(FakeJudge(4, "unparsable", 5), store=store)
    ask(before, "a")
    time.sleep(0.002)  # times are kept in milliseconds
    moment = now()
    time.sleep(0.002)
    ask(before, "b")
    before.forget_failures()
    ask(before, "b")
    assert before.costs()["reception"].calls == 3

    judge = FakeJudge()
    after = panel(judge, prices=Prices(input=1.0), store=store)
    after.charge_after(moment)
    assert ask(after, "a").usage == Usage()
    assert after.costs()["reception"] == Cost(found=1)
    assert ask(after, "b") == Verdict("reception", 5, "Score: 5", usage=PAID + PAID)
    assert after.costs()["reception"] == Cost(2, 2000, 1600, 100, pytest.approx(2e-3), found=1)
    ask(after, "b")
    ask(after, "c")
    ask(after, "c")
    assert after.costs()["reception"] == Cost(3, 3000, 2400, 150, pytest.approx(3e-3), found=3)
    assert len(judge.calls) == 1


def test_a_failure_is_charged_even_if_it_is_asked_about_again(store):
    ask(panel(FakeJudge("unparsable"), store=store), "a")
    after = panel(FakeJudge(3), store=store)
    after.charge_after("")
    after.forget_failures()
    assert ask(after, "a").score == 3
    assert after.costs()["reception"] == Cost(2, 2000, 1600, 100, 0.0, found=0)


def test_cached_tokens_without_a_price_of_their_own_cost_as_others():
    assert Prices(input=2.0).money(PAID) == pytest.approx(2000e-6)
    assert Prices(input=2.0, cached=0.0).money(PAID) == pytest.approx(400e-6)


# --- as one judge --------------------------------------------------------------------------------


def test_labels_are_joined():
    lexical, openai = FakeJudge(label="lexical"), FakeJudge(label="openai: tiny")
    judges = dict(zip(ROLES, (openai, openai, lexical, openai), strict=True))
    assert panel(lexical).label == "lexical"
    assert Panel(judges, {}, {}).label == (
        "resonation, expression, bystander: openai: tiny; reception: lexical"
    )


def test_each_judge_is_checked_and_closed_once_and_the_store_last(store):
    order = []

    class Closing(FakeJudge):
        async def close(self):
            order.append(self.label)
            store.get("key")  # raises if the store is closed
            raise RuntimeError(f"{self.label} cannot close")

    judges = [Closing(label="a"), Closing(label="b")]
    own = Panel(dict(zip(ROLES, judges * 2, strict=True)), {}, {}, store)
    own.check()
    assert [judge.checked for judge in judges] == [1, 1]
    with pytest.raises(RuntimeError, match="cannot close"):
        asyncio.run(own.close())
    assert order == ["a", "b"]
    with pytest.raises(StoreError):
        store.get("key")


def test_traffic_is_summed_over_the_judges_that_tell():
    judges = [FakeJudge(), FakeJudge(), FakeJudge()]
    judges[0].traffic = Traffic(1, 2, 3, 4)
    judges[1].traffic = Traffic(10, 20, 30, 40)
    own = Panel(dict(zip(ROLES, [*judges, judges[0]], strict=True)), {}, {})
    assert own.traffic == Traffic(11, 22, 33, 44)

"""The four roles' judges as one judge, which pays for nothing twice and counts what it pays."""

import asyncio
import inspect
from collections.abc import Callable, Coroutine, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import asdict, astuple, dataclass, replace
from functools import partial
from operator import add
from statistics import mean
from typing import Any, Protocol

from perm_reward.judges import Judge, Traffic
from perm_reward.judges.clock import call_begins, call_rests
from perm_reward.prompts import Seeker
from perm_reward.rubrics import RUBRICS, Rubric
from perm_reward.verdict import Usage, Verdict
from perm_reward.verdict_store import verdict_key


class Store(Protocol):
    """`VerdictStore`, or another with the same methods, which may be coroutines (`RemoteStore`)."""

    def get(self, key: str) -> Any:
        """The verdict kept under a key, or None."""
        ...

    def paid_after(self, moment: str, key: str) -> Any:
        """The usage of each verdict that was kept under a key after a moment, as a list."""
        ...

    def put(
        self,
        key: str,
        asked: dict[str, Any],
        sample: int,
        verdict: Verdict,
        *,
        label: str,
        judged_text: str,
    ) -> Any:
        """Keep a verdict. It holds from now on, if the key had one."""
        ...

    def close(self) -> Any:
        """Let go of the store. No call follows."""
        ...


@dataclass(frozen=True)
class Prices:
    """Of a million tokens, in any currency."""

    input: float = 0.0
    cached: float | None = None
    """of prompts that the endpoint has in its prompt cache; None: as input"""
    output: float = 0.0

    def money(self, usage: Usage) -> float:
        """What a call costs.

        money = ((prompt − cached) · input + cached · price of cached + completion · output) / 10⁶
        """
        price_of_cached = self.input if self.cached is None else self.cached
        prompt = (usage.prompt_tokens - usage.cached_tokens) * self.input
        cached = usage.cached_tokens * price_of_cached
        return (prompt + cached + usage.completion_tokens * self.output) / 1e6


@dataclass(frozen=True)
class Cost:
    """What the verdicts of one role have cost. Costs can be added."""

    calls: int = 0
    """calls that ended in a verdict, scored or failed"""
    prompt_tokens: int = 0
    """cached ones included"""
    cached_tokens: int = 0
    completion_tokens: int = 0
    money: float = 0.0
    """0 where no prices are given"""
    found: int = 0
    """verdicts that cost nothing: kept from before, or shared with a call that is counted above"""

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(*map(add, astuple(self), astuple(other)))


class Panel:
    """A judge made of each role's own. All calls come from one asyncio loop.

    A role's verdict is the mean of its samples. Each of them is kept in the store as it arrives,
    under a key of its own, and looked for there before it is asked for.

    Args:
        judges: of each role; roles may share one.
        samples: how many verdicts of each role count for a text, 1 or more.
        prices: of each role's tokens.
        store: keeps the verdicts, and is closed with the panel; None: nothing is kept.
        rubrics: what the judges are told.
    """

    def __init__(
        self,
        judges: Mapping[str, Judge],
        samples: Mapping[str, int],
        prices: Mapping[str, Prices],
        store: Store | None = None,
        rubrics: Mapping[str, Rubric] = RUBRICS,
    ) -> None:
        self.judges = dict(judges)
        self.rubrics = rubrics
        self._distinct = list({id(judge): judge for judge in judges.values()}.values())
        self.samples = samples
        self.prices = prices
        self.store = store
        self.label = _joint_label(judges)
        self._in_flight: dict[str, _Call] = {}
        self._costs = {role: Cost() for role in judges}
        self._failed_since: set[str] | None = None
        self._charge_after: str | None = None
        self._charged: set[str] = set()

    def check(self) -> None:
        """Check each judge once. Raises ValueError; see `Judge.check`."""
        for judge in self._distinct:
            judge.check()

    async def judge(self, role: str, seeker: Seeker, judged_text: str) -> Verdict:
        """The mean of the role's samples, all asked at once; no score if one of them has none.

        The usage is what was paid for this verdict now, so none for what was found.

        Raises:
            ValueError: the store cannot be used (StoreError), or a judge speaks for another role.
        """
        question = _question(self.judges[role], role, seeker, judged_text)
        samples = await asyncio.gather(
            *(self._sample(question, i) for i in range(self.samples[role])),
            return_exceptions=True,  # each of them runs to its end, for each is paid for
        )
        return _mean(role, samples)

    async def close(self) -> None:
        """Close each judge once, then the store. One that raises does not keep the others open."""
        async with AsyncExitStack() as closing:  # what is pushed last is closed first
            if self.store is not None:
                closing.push_async_callback(_outcome, self.store.close)
            for judge in reversed(self._distinct):
                closing.push_async_callback(judge.close)

    def forget_failures(self) -> None:
        """Ask anew for what was kept as a failure so far. Any thread may call this."""
        self._failed_since = set()

    def costs(self) -> dict[str, Cost]:
        """What each role has cost this process so far. Any thread may call this."""
        return dict(self._costs)

    def charge_after(self, moment: str) -> None:
        """Count what was kept after this moment ("": ever) as paid, when it is first found.

        For a run that goes on from a checkpoint: what it paid for later, and finds again now, costs
        it nothing once more, but its account must say what it would without the interruption.
        """
        self._charge_after = moment

    @property
    def traffic(self) -> Traffic:
        """Where the calls are, summed over the judges that tell."""
        return sum((getattr(judge, "traffic", Traffic()) for judge in self._distinct), Traffic())

    # --- one sample -----------------------------------------------------------------------------

    async def _sample(self, question: "_Question", sample: int) -> Verdict:
        """One verdict. Whoever asks for one that is in flight waits for it with the others."""
        key = verdict_key(question.role, question.asked, sample)
        call = self._in_flight.get(key)
        if call is None or call.is_over:
            call = _Call(partial(self._find_or_ask, question, sample, key))
            self._in_flight[key] = call
            call.task.add_done_callback(partial(self._ended, key))
        verdict, is_first = await call.verdict()
        if is_first:
            return verdict
        self._costs[question.role] += Cost(found=1)
        return replace(verdict, usage=Usage())

    async def _find_or_ask(
        self,
        question: "_Question",
        sample: int,
        key: str,
        begins: Callable[[], None],
        rests: Callable[[], None],
    ) -> Verdict:
        role = question.role
        if self.store is not None:
            kept = await _outcome(self.store.get, key)
            paid = await self._paid_but_not_charged(key)
            for usage in paid:
                self._charge(role, usage)
            if kept is not None and not self._is_forgotten(kept, key):
                if not paid:
                    self._costs[role] += Cost(found=1)
                return replace(kept, usage=sum(paid, Usage()))

        call_begins.set(begins)
        call_rests.set(rests)
        verdict = await question.judge.judge(role, question.seeker, question.judged_text)
        if verdict.role != role:
            raise ValueError(f"the verdict of {verdict.role} came for {role}")
        self._charge(role, verdict.usage)
        if self.store is not None:
            label, text = question.judge.label, question.judged_text
            put = partial(self.store.put, label=label, judged_text=text)
            await _outcome(put, key, question.asked, sample, verdict)
            if verdict.failure is not None and self._failed_since is not None:
                self._failed_since.add(key)
        return verdict

    def _charge(self, role: str, usage: Usage) -> None:
        money = self.prices[role].money(usage)
        self._costs[role] += Cost(calls=1, money=money, **asdict(usage))

    async def _paid_but_not_charged(self, key: str) -> list[Usage]:
        """What each verdict cost that is kept, but not in this account: failures, which were asked
        about again, and what came of it."""
        if self.store is None or self._charge_after is None or key in self._charged:
            return []
        paid = await _outcome(self.store.paid_after, self._charge_after, key)
        self._charged.add(key)
        return paid

    def _is_forgotten(self, kept: Verdict, key: str) -> bool:
        since = self._failed_since
        return kept.failure is not None and since is not None and key not in since

    def _ended(self, key: str, task: "asyncio.Task[Verdict]") -> None:
        if key in self._in_flight and self._in_flight[key].task is task:
            del self._in_flight[key]
        if not task.cancelled():
            task.exception()  # or asyncio reports it as lost where its last waiter has left


@dataclass(frozen=True)
class _Question:
    judge: Judge
    role: str
    seeker: Seeker
    judged_text: str
    asked: dict[str, Any]
    """everything that determines the verdict"""


def _question(judge: Judge, role: str, seeker: Seeker, judged_text: str) -> _Question:
    if hasattr(judge, "asked"):
        asked = judge.asked(role, seeker, judged_text)
    else:
        asked = {"judge": judge.label, "seeker": asdict(seeker), "text": judged_text}
    return _Question(judge, role, seeker, judged_text, asked)


class _Call:
    """A verdict that is being looked for, and all who wait for it."""

    def __init__(self, ask: Callable[..., Coroutine[Any, Any, Verdict]]) -> None:
        self._waiting = 0
        self._is_handed_over = False
        self._is_out = False
        self._begins: list[Callable[[], None]] = []
        self._rests: list[Callable[[], None]] = []
        self.task = asyncio.create_task(ask(partial(self._tell, True), partial(self._tell, False)))

    @property
    def is_over(self) -> bool:
        """Whether nobody can join any more."""
        return self.task.done() or self.task.cancelling() > 0

    async def verdict(self) -> tuple[Verdict, bool]:
        """The verdict, and whether this is the first to get it: the one who bears its usage."""
        self._tell_also(call_begins.get(), call_rests.get())
        self._waiting += 1
        try:
            # One who is cancelled leaves the others' call alone. The last one ends it.
            verdict = await asyncio.shield(self.task)
        finally:
            self._waiting -= 1
            if self._waiting == 0:
                self.task.cancel()
        is_first, self._is_handed_over = not self._is_handed_over, True
        return verdict, is_first

    def _tell_also(
        self, begins: Callable[[], None] | None, rests: Callable[[], None] | None
    ) -> None:
        """Everybody's time runs while the call is out, whoever's question sent it."""
        if begins is not None:
            self._begins.append(begins)
            if self._is_out:
                begins()
        if rests is not None:
            self._rests.append(rests)

    def _tell(self, is_out: bool) -> None:
        self._is_out = is_out
        for tell in self._begins if is_out else self._rests:
            tell()


async def _outcome(function: Callable[..., Any], *arguments: Any) -> Any:
    """What a function or a coroutine function gives."""
    result = function(*arguments)
    return await result if inspect.isawaitable(result) else result


# --- joining -------------------------------------------------------------------------------------


def _mean(role: str, samples: Sequence[Verdict | BaseException]) -> Verdict:
    """One verdict of several: the first failure, if there is one, or else

    score = Σ scores / n     rounded once, so that equal scores give exactly that score
    """
    verdicts = []
    for sample in samples:
        if isinstance(sample, BaseException):
            raise sample
        verdicts.append(sample)
    if len(verdicts) == 1:
        return verdicts[0]
    scores = [verdict.score for verdict in verdicts if verdict.score is not None]
    failures = [verdict.failure for verdict in verdicts if verdict.failure is not None]
    reply = "\n\n".join(
        f"[sample {i + 1} of {len(verdicts)}: {verdict.failure or f'{verdict.score:g}'}]\n"
        f"{verdict.reply}"
        for i, verdict in enumerate(verdicts)
    )
    usage = sum((verdict.usage for verdict in verdicts), Usage())
    if failures:
        return Verdict(role, None, reply, failures[0], usage)
    return Verdict(role, float(mean(scores)), reply, usage=usage)


def _joint_label(judges: Mapping[str, Judge]) -> str:
    """The judges' common label, or each with its roles: "bystander: lexical; …"."""
    roles: dict[str, list[str]] = {}
    for role, judge in judges.items():
        roles.setdefault(judge.label, []).append(role)
    if len(roles) == 1:
        return next(iter(roles))
    return "; ".join(f"{', '.join(names)}: {label}" for label, names in roles.items())

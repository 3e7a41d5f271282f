"""Many completions → rewards, with all judges' calls in flight at once."""

import asyncio
import threading
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import asdict, replace
from statistics import fmean
from typing import Any

from perm_reward.aggregate import RewardBreakdown, RewardConfig, lowest_reward, perm_reward
from perm_reward.background import BackgroundLoop
from perm_reward.completion import ParsedCompletion, parse_completion
from perm_reward.judges import Judge, Traffic
from perm_reward.judges.clock import call_begins, call_rests
from perm_reward.panel import Cost, Panel
from perm_reward.prompts import Seeker
from perm_reward.rubrics import ROLES, RUBRICS
from perm_reward.tampering import flags
from perm_reward.verdict import Verdict
from perm_reward.verdict_store import StoreError

_SEEKER_COLUMNS = ("persona", "scenario", "query")
# Failures that are gone once a judge is up again.
_PASSING = {"timeout", "connection", "malformed reply", "http 408", "http 409", "http 429"}
_PASSING |= {f"http {status}" for status in range(500, 600)}
_PAPER_FIGURES = RewardConfig()

ChatMessages = Sequence[Mapping[str, Any]]


class RewardFuture(Future[float | None]):
    """A reward to come: a float, or None when a verdict is missing. It cannot be cancelled.

    Raises StoreError where verdicts cannot be kept: they are paid for, and would be lost.
    """

    details: dict[str, Any] | None = None
    """Set before the result, fit for JSON: judge (its label), analysis, response, well_formed,
    verdicts (per role: score, reply, failure; none for a broken form), reward (core, bystander,
    length, total; or None), causes (of missing verdicts), flags (what in the completion tries to
    sway a judge) and flagged (whether there are any)."""


class PermReward:
    """PERM's reward as a function with TRL's signature, for our trainer, TRL's or any other.

    Thread-safe. The judge runs on an event loop in a daemon thread of this object's own, which
    starts with the first completion and ends with `close`, the `with` block, or the program.

    Args:
        judge: gives the four verdicts of a completion.
        config: how they become a reward.
        tokenizer: counts tokens for the length term where no `completion_ids` are given.
        completion_seconds: for all calls of a completion together, while any of them is out;
            waiting for a turn, or for a rate limit to pass, does not count.
    """

    def __init__(
        self,
        judge: Judge,
        config: RewardConfig = _PAPER_FIGURES,
        tokenizer: Any = None,
        completion_seconds: float = 900.0,
    ) -> None:
        self.__name__ = "perm_reward"  # under which TRL logs a reward function
        self.judge = judge
        self.config = config
        self.tokenizer = tokenizer
        self.completion_seconds = completion_seconds
        self._label = judge.label
        self._rubrics = getattr(judge, "rubrics", RUBRICS)
        self._background = BackgroundLoop(last=judge.close)
        self._causes: Counter[str] = Counter()
        self._causes_lock = threading.Lock()

    def __call__(
        self,
        prompts: Sequence[Any],
        completions: Sequence[str | ChatMessages],
        completion_ids: Sequence[Sequence[int]] | None = None,
        **columns: Any,
    ) -> list[float | None]:
        """The reward of each completion; None where a verdict is missing.

        Args:
            prompts: not looked at, one per completion.
            completions: texts, or lists of chat messages.
            completion_ids: the completions' tokens, for the length term.
            **columns: persona, scenario and query, each as long as completions. Others are ignored.

        Raises:
            ValueError: a column is missing or of another length, or tokens cannot be counted.
        """
        rows = {name: columns[name] for name in _SEEKER_COLUMNS if name in columns}
        ids = [None] * len(completions) if completion_ids is None else completion_ids
        for name, values in {"prompts": prompts, "completion_ids": ids, **rows}.items():
            if len(values) != len(completions):
                raise ValueError(
                    f"{name}: {len(values)} values for {len(completions)} completions; "
                    "give one for each"
                )
        futures = []
        for i, completion in enumerate(completions):
            row = {name: values[i] for name, values in rows.items()}
            futures.append(self.submit(prompts[i], completion, ids[i], **row))
        return [future.result() for future in futures]

    def submit(
        self,
        prompt: Any,
        completion: str | ChatMessages,
        completion_ids: Sequence[int] | None = None,
        **row: Any,
    ) -> RewardFuture:
        """Start to judge one completion, as soon as it has ended; see `__call__` for the arguments.

        Raises:
            ValueError: a value is missing, or tokens cannot be counted.
            RuntimeError: this PermReward is closed.
        """
        for name in _SEEKER_COLUMNS:
            if name not in row:
                raise ValueError(f"{name}: missing; give persona, scenario and query")
        seeker = Seeker(row["persona"], row["scenario"], row["query"])
        text = completion_text(completion)
        completion_tokens = self._count_tokens(text, completion_ids)

        future = RewardFuture()
        future.set_running_or_notify_cancel()
        parsed = parse_completion(text)
        # The weights of this moment: they may move before the judges have answered.
        scoring = self._background.start(
            self._score(seeker, parsed, completion_tokens, self.config)
        )
        scoring.add_done_callback(lambda scoring: self._deliver(scoring, parsed, future))
        return future

    @property
    def traffic(self) -> Traffic:
        """Where the judges' calls are; all zeros for a judge that does not say."""
        return getattr(self.judge, "traffic", Traffic())

    def costs(self) -> dict[str, Cost]:
        """What the calls have cost so far, by role; empty for a judge that does not say."""
        return self.judge.costs() if isinstance(self.judge, Panel) else {}

    def charge_after(self, moment: str) -> None:
        """See `Panel.charge_after`; nothing for a judge that does not say what it costs."""
        if isinstance(self.judge, Panel):
            self.judge.charge_after(moment)

    def forget_failures(self) -> None:
        """From now on, ask anew for verdicts that failed and were kept as failures."""
        if hasattr(self.judge, "forget_failures"):
            self.judge.forget_failures()

    def may_pass(self, cause: str) -> bool:
        """Whether a verdict that is missing for this cause may be had by waiting."""
        return cause.rpartition(": ")[2] in _PASSING

    def after_step(self, details: Sequence[Mapping[str, Any]]) -> dict[str, float]:
        """Move the bystander's weight so that the mean of its scores nears the target, if any.

        The weight is the dual variable of the constraint mean(b) ≥ target: where the bystander
        scores below the target, it counts more from now on, and less where above.
            weight ← max(0, weight + rate · (target − mean(b)) / 100)

        Args:
            details: of one step's completions, those of all processes.

        Returns the weight that this step had, as a metric.
        """
        config = self.config
        scores = bystander_scores(details)
        if config.bystander_target is not None and scores:
            below = (config.bystander_target - fmean(scores)) / 100
            weight = max(0.0, config.bystander_weight + config.bystander_rate * below)
            self.config = replace(config, bystander_weight=weight)
        return {"bystander_weight": config.bystander_weight}

    def state_dict(self) -> dict[str, float]:
        """What changes from step to step, in this process."""
        return {"bystander_weight": self.config.bystander_weight}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Go on from there, before the first completion is submitted."""
        self.config = replace(self.config, bystander_weight=state["bystander_weight"])

    def counts(self) -> dict[str, int]:
        """How many verdicts are missing so far, by role and cause: {"reception: timeout": 3}."""
        with self._causes_lock:
            return dict(self._causes)

    def close(self) -> None:
        """End the loop and close the judge. What is still in flight gets None, with the cause."""
        self._background.close()

    def __enter__(self) -> "PermReward":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    # --- one completion -------------------------------------------------------------------------

    async def _score(
        self,
        seeker: Seeker,
        parsed: ParsedCompletion,
        completion_tokens: int,
        config: RewardConfig,
    ) -> dict[str, Any]:
        """The details of one completion, judged by all four roles at once."""
        if not parsed.well_formed and config.format_failure == "lowest":
            return self._details(parsed, [], lowest_reward(completion_tokens, config))

        verdicts = await self._verdicts(seeker, parsed)
        scores = [verdict.score for verdict in verdicts if verdict.score is not None]
        if len(scores) < len(ROLES):
            return self._details(parsed, verdicts, None)
        resonation, expression, reception, bystander = scores  # in the order of ROLES
        breakdown = perm_reward(
            resonation, expression, reception, bystander, completion_tokens, config
        )
        return self._details(parsed, verdicts, breakdown)

    async def _verdicts(self, seeker: Seeker, parsed: ParsedCompletion) -> list[Verdict]:
        """The verdict of each role. Those that are not there when the time is up are failures."""
        shown = {"analysis": parsed.analysis, "response": parsed.response}
        clock = _Clock(self.completion_seconds)
        # Seen by this completion's calls alone.
        call_begins.set(clock.call_begins)
        call_rests.set(clock.call_rests)
        clock.tasks = [
            asyncio.create_task(self._verdict(role, seeker, shown[RUBRICS[role].shown], clock))
            for role in ROLES
        ]
        try:
            return await asyncio.gather(*clock.tasks)
        finally:
            clock.stop()

    async def _verdict(
        self, role: str, seeker: Seeker, judged_text: str, clock: "_Clock"
    ) -> Verdict:
        try:
            verdict = await self.judge.judge(role, seeker, judged_text)
            if verdict.role != role:
                raise ValueError(f"the verdict of {verdict.role} came for {role}")
            return verdict
        except StoreError:  # what is paid for could not be kept: nothing more should be
            raise
        except BaseException as error:
            # Whatever else a judge raises ends here, or the trainer would wait forever. Its type is
            # told, its message not: that may hold a key.
            failure = "timeout" if clock.has_rung else type(error).__name__
            return Verdict(role, None, "", failure=failure)

    def _details(
        self,
        parsed: ParsedCompletion,
        verdicts: Sequence[Verdict],
        breakdown: RewardBreakdown | None,
    ) -> dict[str, Any]:
        parts = parsed.analysis, parsed.response
        found = sorted({name for part in parts for name in flags(part, self._rubrics)})
        return {
            "judge": self._label,
            **asdict(parsed),
            "verdicts": {
                verdict.role: {
                    "score": verdict.score,
                    "reply": verdict.reply,
                    "failure": verdict.failure,
                }
                for verdict in verdicts
            },
            "reward": None if breakdown is None else asdict(breakdown),
            "causes": [f"{v.role}: {v.failure}" for v in verdicts if v.failure is not None],
            "flags": found,
            "flagged": bool(found),
        }

    def _deliver(
        self, scoring: Future[dict[str, Any]], parsed: ParsedCompletion, future: RewardFuture
    ) -> None:
        """Hand over what was found. Whatever happened, the future gets a result."""
        try:
            details = scoring.result()
        except StoreError as error:
            future.set_exception(error)
            return
        except BaseException as error:
            failure = "closed" if scoring.cancelled() else type(error).__name__
            missing = [Verdict(role, None, "", failure) for role in ROLES]
            details = self._details(parsed, missing, None)
        with self._causes_lock:
            self._causes.update(details["causes"])
        future.details = details
        breakdown = details["reward"]
        future.set_result(None if breakdown is None else breakdown["total"])

    def _count_tokens(self, text: str, completion_ids: Sequence[int] | None) -> int:
        if completion_ids is not None:
            return len(completion_ids)
        if self.tokenizer is None:
            raise ValueError(
                "completion_ids: missing; pass them, or give PermReward a tokenizer (the length "
                "term counts tokens)"
            )
        return len(self.tokenizer.encode(text, add_special_tokens=False))


def completion_text(completion: str | ChatMessages) -> str:
    """The text of a completion that may come as chat messages: what the assistant said, joined."""
    if isinstance(completion, str):
        return completion
    return "\n".join(m["content"] for m in completion if m["role"] == "assistant")


def bystander_scores(details: Iterable[Mapping[str, Any]]) -> list[float]:
    """The bystander's scores in the details of completions, where there are any."""
    verdicts = [one.get("verdicts", {}).get("bystander") for one in details]
    return [v["score"] for v in verdicts if v is not None and v["score"] is not None]


class _Clock:
    """The time of one completion: runs while any of its calls is out; then cancels what is left."""

    def __init__(self, seconds: float) -> None:
        self.tasks: list[asyncio.Task[Verdict]] = []
        self.has_rung = False
        self._loop = asyncio.get_running_loop()
        self._seconds_left = seconds
        self._out = 0
        self._since = 0.0
        self._timer: asyncio.TimerHandle | None = None
        self._is_stopped = False

    def call_begins(self) -> None:
        self._out += 1
        if self._timer is None and not self._is_stopped:
            self._since = self._loop.time()
            self._timer = self._loop.call_later(self._seconds_left, self._ring)

    def call_rests(self) -> None:
        self._out -= 1
        if self._timer is not None and self._out == 0:
            self._timer.cancel()
            self._timer = None
            self._seconds_left -= self._loop.time() - self._since

    def stop(self) -> None:
        self._is_stopped = True
        if self._timer is not None:
            self._timer.cancel()

    def _ring(self) -> None:
        self.has_rung = True
        for task in self.tasks:
            task.cancel()

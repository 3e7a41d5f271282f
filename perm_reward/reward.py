"""Many completions → rewards, with all judges' calls in flight at once."""

import asyncio
import atexit
import contextlib
import threading
from collections import Counter
from collections.abc import Callable, Coroutine, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import asdict
from functools import cached_property
from typing import Any

from perm_reward.aggregate import RewardBreakdown, RewardConfig, lowest_reward, perm_reward
from perm_reward.completion import ParsedCompletion, parse_completion
from perm_reward.judges import Judge
from perm_reward.prompts import Seeker
from perm_reward.rubrics import ROLES, RUBRICS
from perm_reward.verdict import Verdict

_SEEKER_COLUMNS = ("persona", "scenario", "query")
_PAPER_FIGURES = RewardConfig()
_CLOSE_SECONDS = 5.0

ChatMessages = Sequence[Mapping[str, Any]]


class RewardFuture(Future[float | None]):
    """A reward to come: a float, or None when a verdict is missing. It cannot be cancelled."""

    details: dict[str, Any] | None = None
    """Set before the result, fit for JSON: judge (its label), analysis, response, well_formed,
    verdicts (per role: score, reply, failure; none for a broken form), reward (core, bystander,
    length, total; or None) and causes (of missing verdicts)."""


class PermReward:
    """PERM's reward as a function with TRL's signature, for our trainer, TRL's or any other.

    Thread-safe. The judge runs on an event loop in a daemon thread of this object's own, which
    starts with the first completion and ends with `close`, the `with` block, or the program.

    Args:
        judge: gives the four verdicts of a completion.
        config: how they become a reward.
        tokenizer: counts tokens for the length term where no `completion_ids` are given.
    """

    def __init__(
        self, judge: Judge, config: RewardConfig = _PAPER_FIGURES, tokenizer: Any = None
    ) -> None:
        self.__name__ = "perm_reward"  # under which TRL logs a reward function
        self.judge = judge
        self.config = config
        self.tokenizer = tokenizer
        self._label = judge.label
        self._background = _BackgroundLoop(last=judge.close)
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
        scoring = self._background.start(self._score(seeker, parsed, completion_tokens))
        scoring.add_done_callback(lambda scoring: self._deliver(scoring, parsed, future))
        return future

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
        self, seeker: Seeker, parsed: ParsedCompletion, completion_tokens: int
    ) -> dict[str, Any]:
        """The details of one completion, judged by all four roles at once."""
        if not parsed.well_formed and self.config.format_failure == "lowest":
            return self._details(parsed, [], lowest_reward(completion_tokens, self.config))

        shown = {"analysis": parsed.analysis, "response": parsed.response}
        verdicts = await asyncio.gather(
            *(self._verdict(role, seeker, shown[RUBRICS[role].shown]) for role in ROLES)
        )
        scores = [verdict.score for verdict in verdicts if verdict.score is not None]
        if len(scores) < len(ROLES):
            return self._details(parsed, verdicts, None)
        resonation, expression, reception, bystander = scores  # in the order of ROLES
        breakdown = perm_reward(
            resonation, expression, reception, bystander, completion_tokens, self.config
        )
        return self._details(parsed, verdicts, breakdown)

    async def _verdict(self, role: str, seeker: Seeker, judged_text: str) -> Verdict:
        try:
            verdict = await self.judge.judge(role, seeker, judged_text)
            if verdict.role != role:
                raise ValueError(f"the verdict of {verdict.role} came for {role}")
            return verdict
        except BaseException as error:
            # Whatever a judge raises ends here, or the trainer would wait forever. Its type is
            # told, its message not: that may hold a key.
            return Verdict(role, None, "", failure=type(error).__name__)

    def _details(
        self,
        parsed: ParsedCompletion,
        verdicts: Sequence[Verdict],
        breakdown: RewardBreakdown | None,
    ) -> dict[str, Any]:
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
        }

    def _deliver(
        self, scoring: Future[dict[str, Any]], parsed: ParsedCompletion, future: RewardFuture
    ) -> None:
        """Hand over what was found. Whatever happened, the future gets a result."""
        try:
            details = scoring.result()
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


class _BackgroundLoop:
    """One event loop in one daemon thread, started when it is first needed.

    Args:
        last: runs on the loop when it closes, after everything else.
    """

    def __init__(self, last: Callable[[], Coroutine[Any, Any, None]]) -> None:
        self._last = last
        self._lock = threading.Lock()
        self._closed = False

    def start(self, coroutine: Coroutine[Any, Any, dict[str, Any]]) -> Future[dict[str, Any]]:
        """Run a coroutine on the loop."""
        with self._lock:
            if self._closed:
                coroutine.close()
                raise RuntimeError("this PermReward is closed")
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
            ending.result(2 * _CLOSE_SECONDS)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(_CLOSE_SECONDS)
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
        async with asyncio.timeout(_CLOSE_SECONDS):
            await asyncio.gather(*running, return_exceptions=True)
            await self._last()

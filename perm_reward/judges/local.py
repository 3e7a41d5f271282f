"""A judge that is a Hugging Face model in this process, on its GPU or CPU.

It writes no reply. What it would write is read as a distribution over the scores, and the verdict
is its expectation: 3.42 where a reply would say 3 for this text and for a slightly better one. So a
small model still ranks. The bystander's is the sum of the expectations of its five dimensions.

Calls wait until the worker thread is free, which then takes what has come meanwhile and computes
what their prompts have in common once (see token_tree.py). What shares a row changes a verdict by
rounding only.
"""

import asyncio
import math
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from queue import SimpleQueue
from threading import Event, Thread
from typing import Any

import torch

from perm_reward.judges import JudgeConfig, Traffic
from perm_reward.judges.score_reader import load_score_reader
from perm_reward.judges.score_tokens import Distribution, expectation, in_words
from perm_reward.judges.token_tree import ROW_TOKENS, Tokens, plan_rows
from perm_reward.prompts import Messages, Seeker, judge_messages
from perm_reward.rubrics import RUBRICS, Rubric
from perm_reward.verdict import Verdict


class LocalJudge:
    """A `perm_reward.judges.Judge`: scores are floats, nothing is sampled, nothing is charged.

    The model is loaded here and not at the first call, which comes beside training: loading changes
    the default float type of the whole process for a moment.

    Args:
        config: model is a hub name or folder; concurrency bounds the calls of a batch.
        rubrics: what the judge is told, of all roles.
        seed: of the run; the marks around what is judged follow from it.

    Raises:
        ValueError: the model cannot be loaded, or cannot judge. One line.
    """

    def __init__(
        self, config: JudgeConfig, *, rubrics: Mapping[str, Rubric] = RUBRICS, seed: int = 0
    ) -> None:
        self.label = f"local: {config.model}"
        self._config = config
        self._rubrics = rubrics
        self._seed = seed
        # The worker thread would take another device for the current one.
        on_gpu = torch.cuda.is_available()
        device = f"cuda:{torch.cuda.current_device()}" if on_gpu else "cpu"
        self._reader = load_score_reader(config.model, torch.device(device), rubrics)
        self._waiting: SimpleQueue[_Call | None] = SimpleQueue()
        self._in_flight = 0
        self._done = 0
        self._closing = Event()
        self._closed: Future[None] = Future()
        self._worker = Thread(target=self._work, name="local-judge", daemon=True)

    def check(self) -> None:
        """Nothing is left to check: a judge that could be made can judge."""

    @property
    def traffic(self) -> Traffic:
        """Where the calls are; those of the current batch are in flight."""
        return Traffic(waiting=self._waiting.qsize(), in_flight=self._in_flight, done=self._done)

    def asked(self, role: str, seeker: Seeker, judged_text: str) -> dict[str, Any]:
        """All that determines a verdict."""
        messages = self._messages(role, seeker, judged_text)
        return {"judge": "local", "model": self._config.model, "messages": messages}

    async def judge(self, role: str, seeker: Seeker, judged_text: str) -> Verdict:
        """The expected score; its reply tells the distribution that was read.

        Failures: "prompt too long" for the model, "not a number". What the model raises is raised:
        it may be another time that memory suffices.
        """
        call = _Call(role, self._messages(role, seeker, judged_text))
        if self._worker.ident is None:
            self._worker.start()
        self._waiting.put(call)
        return await asyncio.wrap_future(call.verdict)

    async def close(self) -> None:
        """End the worker thread, after the row that it is at. Calls that wait are cancelled."""
        self._closing.set()
        self._waiting.put(None)
        if self._worker.ident is not None:
            await asyncio.shield(asyncio.wrap_future(self._closed))

    def _messages(self, role: str, seeker: Seeker, judged_text: str) -> Messages:
        return judge_messages(role, seeker, judged_text, rubrics=self._rubrics, seed=self._seed)

    # --- the worker thread ----------------------------------------------------------------------

    def _work(self) -> None:
        calls: list[_Call] = []
        try:
            while not self._closing.is_set():
                calls = self._next_calls()
                rows = self._plan(calls)
                self._in_flight = sum(map(len, rows))
                self._done += len(calls) - self._in_flight
                while rows and not self._closing.is_set():
                    self._judge_row(rows.pop(0))
        finally:
            while not self._waiting.empty():
                if (waiting := self._waiting.get()) is not None:
                    calls.append(waiting)
            for call in calls:
                call.verdict.cancel()
            self._closed.set_result(None)

    def _next_calls(self) -> list["_Call"]:
        """Wait for a call, then take with it those that have come meanwhile. None: the end."""
        calls: list[_Call] = []
        while not calls or (len(calls) < self._config.concurrency and not self._waiting.empty()):
            call = self._waiting.get()
            if call is None:
                break
            calls.append(call)
        return calls

    def _plan(self, calls: list["_Call"]) -> list[list["_Call"]]:
        """Rows of calls, those whose prompts begin alike together: so of one role and seeker.

        A call that no model call could answer is answered here.
        """
        planned: list[_Call] = []
        for call in calls:
            try:
                call.prompt = self._reader.prompt(call.messages)
            except Exception as error:  # such as a text that cannot be encoded
                call.answer(error)
                continue
            if self._reader.is_too_long(call.role, call.prompt):
                call.answer(Verdict(call.role, None, "", failure="prompt too long"))
            else:
                planned.append(call)
        own = [self._reader.own_tokens(call.role) for call in planned]
        rows = plan_rows([call.prompt for call in planned], own, ROW_TOKENS)
        return [[planned[i] for i in row] for row in rows]

    def _judge_row(self, row: list["_Call"]) -> None:
        calls = [call for call in row if not call.verdict.cancelled()]
        outcomes: Sequence[Verdict | Exception]
        try:
            read = self._reader.read([(call.role, call.prompt) for call in calls]) if calls else []
            outcomes = [_verdict(call.role, r) for call, r in zip(calls, read, strict=True)]
        except Exception as error:
            # Its traceback would keep the row's tensors, and the memory may be what is missing.
            outcomes = [error.with_traceback(None)] * len(calls)
        self._in_flight -= len(row)
        self._done += len(row)
        for call, outcome in zip(calls, outcomes, strict=True):
            call.answer(outcome)


@dataclass(eq=False)
class _Call:
    role: str
    messages: Messages
    verdict: Future[Verdict] = field(default_factory=Future)
    prompt: Tokens = ()

    def answer(self, outcome: Verdict | Exception) -> None:
        """Hand over what came of it, unless nobody waits any more."""
        if not self.verdict.set_running_or_notify_cancel():
            return
        if isinstance(outcome, Exception):
            self.verdict.set_exception(outcome)
        else:
            self.verdict.set_result(outcome)


def _verdict(role: str, read: Mapping[str, Distribution]) -> Verdict:
    """The sum of what is expected behind each label, and how it came about."""
    score = math.fsum(expectation(distribution) for distribution in read.values())
    lines = [in_words(label, distribution) for label, distribution in read.items()]
    if len(lines) > 1:
        lines.append(f"Total: {score:.2f}")
    reply = "\n".join(lines)
    if math.isnan(score):
        return Verdict(role, None, reply, failure="not a number")
    return Verdict(role, score, reply)

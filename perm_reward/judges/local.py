"""A judge that is a Hugging Face model in this process, on its GPU or CPU.

It writes no reply. What it would write is read as a distribution over the scores, and the verdict
is its expectation: 3.42 where a reply would say 3 for this text and for a slightly better one. So a
small model still ranks. The bystander's is the sum of the expectations of its five dimensions.

A worker thread takes one call after the other, in the order in which they come, and computes each
by itself behind what all prompts of its role begin with (see token_tree.py). Calls are not batched:
what shares a batch changes the rounding, and in bfloat16 a verdict by hundredths, so it would hang
on what happens to wait at that moment. So the same call gets the same verdict, to the bit.
"""

import asyncio
import math
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from queue import SimpleQueue
from threading import Event, Thread
from typing import Any

import torch

from perm_reward.judges import JudgeConfig, Traffic
from perm_reward.judges.clock import call_begins
from perm_reward.judges.config import Device
from perm_reward.judges.score_reader import load_score_reader
from perm_reward.judges.score_tokens import Distribution, expectation, in_words
from perm_reward.prompts import Messages, Seeker, judge_messages
from perm_reward.rubrics import RUBRICS, Rubric
from perm_reward.verdict import Verdict

# A model that would write something else says nothing of a score by what little it leaves to the
# numbers. Chance among 50,000 tokens gives 0.0001 to five of them; SmolLM2-135M, the smallest model
# tried, 0.07 to 0.85 (20 seekers, two answers each from good to gibberish and none, all roles).
LEAST_ON_SCALE = 0.01


class LocalJudge:
    """A `perm_reward.judges.Judge`: scores are floats, nothing is sampled, nothing is charged.

    The model is loaded here and not at the first call, which comes beside training: loading changes
    the default float type of the whole process for a moment.

    Args:
        config: model is a hub name or folder, device where it goes; the other settings play no
            part.
        rubrics: what the judge is told, of all roles.
        seed: of the run; the marks around what is judged follow from it.
        device: the policy's; None: the current GPU, if there is one.

    Raises:
        ValueError: the model cannot be loaded, or cannot judge. One line.
    """

    def __init__(
        self,
        config: JudgeConfig,
        *,
        rubrics: Mapping[str, Rubric] = RUBRICS,
        seed: int = 0,
        device: torch.device | None = None,
    ) -> None:
        self.label = f"local: {config.model}"
        self._config = config
        self._rubrics = rubrics
        self._seed = seed
        where = pick_device(config.device, device)
        self._reader = load_score_reader(config.model, where, rubrics)
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
        """Where the calls are; the one that is read is in flight."""
        return Traffic(waiting=self._waiting.qsize(), in_flight=self._in_flight, done=self._done)

    def asked(self, role: str, seeker: Seeker, judged_text: str) -> dict[str, Any]:
        """All that determines a verdict. The device only rounds differently."""
        messages = self._messages(role, seeker, judged_text)
        return {"judge": "local", "model": self._config.model, "messages": messages}

    async def judge(self, role: str, seeker: Seeker, judged_text: str) -> Verdict:
        """The expected score; its reply tells the distribution that was read.

        Failures: "prompt too long" for the model, "off the scale" (see LEAST_ON_SCALE), "not a
        number". What the model raises is raised:
        it may be another time that memory suffices.
        """
        call = _Call(role, self._messages(role, seeker, judged_text))
        if self._worker.ident is None:
            self._worker.start()
        self._waiting.put(call)
        return await asyncio.wrap_future(call.verdict)

    async def close(self) -> None:
        """End the worker thread, after the call that it is at. Calls that wait are cancelled."""
        self._closing.set()
        self._waiting.put(None)
        if self._worker.ident is not None:
            await asyncio.shield(asyncio.wrap_future(self._closed))

    def _messages(self, role: str, seeker: Seeker, judged_text: str) -> Messages:
        return judge_messages(role, seeker, judged_text, rubrics=self._rubrics, seed=self._seed)

    # --- the worker thread ----------------------------------------------------------------------

    def _work(self) -> None:
        while (call := self._waiting.get()) is not None:
            if self._closing.is_set():
                call.verdict.cancel()
            if not call.verdict.set_running_or_notify_cancel():  # nobody waits any more
                self._done += 1
                continue
            self._in_flight = 1
            call.tell_begin()
            outcome = self._judge(call)
            self._in_flight = 0
            self._done += 1  # before anybody sees the answer, and then where the calls are
            call.answer(outcome)
        self._closed.set_result(None)

    def _judge(self, call: "_Call") -> Verdict | Exception:
        try:
            prompt = self._reader.prompt(call.messages)
            if self._reader.is_too_long(call.role, prompt):
                return Verdict(call.role, None, "", failure="prompt too long")
            return _verdict(call.role, self._reader.read(call.role, prompt))
        except Exception as error:
            # Its traceback would keep the row's tensors, and the memory may be what is missing.
            return error.with_traceback(None)


@dataclass(eq=False)
class _Call:
    role: str
    messages: Messages
    verdict: Future[Verdict] = field(default_factory=Future)
    _loop: asyncio.AbstractEventLoop = field(default_factory=asyncio.get_running_loop)
    _begins: Callable[[], None] | None = field(default_factory=call_begins.get)

    def tell_begin(self) -> None:
        """Start the clock of whoever waits, on their own thread."""
        if self._begins is not None:
            with suppress(RuntimeError):  # the loop has ended, and all waiting with it
                self._loop.call_soon_threadsafe(self._begins)

    def answer(self, outcome: Verdict | Exception) -> None:
        """Hand over what came of it."""
        if isinstance(outcome, Exception):
            self.verdict.set_exception(outcome)
        else:
            self.verdict.set_result(outcome)


def pick_device(setting: Device, policy: torch.device | None) -> torch.device:
    """Where a model goes for a setting judge.device, beside a policy that is on this device.

    Raises ValueError where there is no CUDA device.
    """
    if setting == "auto" and policy is not None:
        return policy
    has_gpu = torch.cuda.is_available()
    if setting == "cuda" and not has_gpu:
        raise ValueError(
            "judge.device = cuda: PyTorch finds no CUDA device here; set judge.device to cpu"
        )
    if setting == "cpu" or not has_gpu:
        return torch.device("cpu")
    # The worker thread would take another device for the current one.
    return torch.device("cuda", torch.cuda.current_device())


def _verdict(role: str, read: Mapping[str, Distribution]) -> Verdict:
    """The sum of what is expected behind each label, and how it came about."""
    score = math.fsum(expectation(distribution) for distribution in read.values())
    is_off = any(math.fsum(numbers.values()) < LEAST_ON_SCALE for numbers in read.values())
    lines = [in_words(label, distribution) for label, distribution in read.items()]
    if len(lines) > 1:
        lines.append(f"Total: {score:.2f}")
    reply = "\n".join(lines)
    if is_off:
        return Verdict(role, None, reply, failure="off the scale")
    if math.isnan(score):
        return Verdict(role, None, reply, failure="not a number")
    return Verdict(role, score, reply)

"""Handing completions to a reward function, early where it allows that.

A reward is a plain function with the signature of TRL's reward functions,

    reward(prompts, completions, completion_ids=…, **columns) -> list[float | None]

called once when all completions have ended. One that can start earlier also has

    reward.submit(prompt, completion, completion_ids, **record) -> Future

whose result is a float or None, and whose attribute `details`, if it has one, is kept with the
completion. It is then called for each completion as soon as that has ended. Such a reward may know
that its judges can fail, and be worth asking again, by also having

    reward.forget_failures()    called before completions without a reward are submitted again
    reward.may_pass(cause)      whether a cause of a missing reward may be gone after a while
    reward.traffic              where its calls are: .waiting, .in_flight, .failing
"""

import importlib
import math
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from typing import Any, cast

from tqdm import tqdm

from grpo.config_loader import ConfigError
from grpo.rollout import Completion, Group, Prompt

SILENT_SECONDS = 2.0  # of waiting, after which a line of progress says so

RewardFunction = Callable[..., Sequence[float | None]]


class RewardCalls:
    """The rewards of one rollout: `start` for each completion as it ends, then `finish`.

    speaks: whether to show a line of progress while waiting.
    """

    def __init__(self, reward: RewardFunction, *, speaks: bool = False) -> None:
        self.reward = reward
        self.speaks = speaks
        self.pending: list[tuple[Prompt, Completion, Future]] = []

    @property
    def can_ask_again(self) -> bool:
        """Whether a completion without a reward may get one when it is submitted once more."""
        return hasattr(self.reward, "submit") and hasattr(self.reward, "forget_failures")

    def may_pass(self, cause: str) -> bool:
        """Whether waiting may mend a cause of a missing reward, as far as the reward knows."""
        return not hasattr(self.reward, "may_pass") or self.reward.may_pass(cause)

    def start(self, prompt: Prompt, completion: Completion) -> None:
        """Submit one completion that has its text, if the reward can start early."""
        if hasattr(self.reward, "submit"):
            future = self.reward.submit(
                prompt.text, completion.text, completion.token_ids, **prompt.record
            )
            self.pending.append((prompt, completion, future))

    def start_again(self, groups: Sequence[Group]) -> None:
        """Submit once more what has no reward."""
        cast(Any, self.reward).forget_failures()
        for group in groups:
            for completion in group.completions:
                if completion.reward is None:
                    self.start(group.prompt, completion)

    def finish(self, groups: Sequence[Group]) -> None:
        """Wait for the rewards of all completions and write them into the groups.

        Raises ConfigError when the reward fails or gives what is no reward; what other completions
        got is written in all the same.
        """
        if not hasattr(self.reward, "submit"):
            call_reward(self.reward, groups)
        self.wait()
        failure: ConfigError | None = None
        for _, completion, future in self.pending:
            try:
                completion.reward = as_reward(future.result())
                completion.details = getattr(future, "details", None) or {}
            except Exception as error:
                failure = failure or failed(self.reward, error)
        self.pending = []
        if failure is not None:
            raise failure

    def wait(self) -> None:
        """Wait until everything submitted has ended, with a line of progress if that takes long."""
        open_futures = {future for _, _, future in self.pending}
        with tqdm(
            total=len(open_futures),
            desc="judging",
            unit="completion",
            leave=False,
            delay=SILENT_SECONDS,
            disable=not self.speaks,
        ) as bar:
            while open_futures:
                done, open_futures = wait(open_futures, SILENT_SECONDS, FIRST_COMPLETED)
                if traffic := getattr(self.reward, "traffic", None):
                    bar.set_postfix_str(
                        f"calls in flight {traffic.in_flight}, waiting {traffic.waiting}, "
                        f"failing {traffic.failing}",
                        refresh=False,
                    )
                bar.update(len(done))
                if not done:
                    bar.refresh()


def call_reward(reward: RewardFunction, groups: Sequence[Group]) -> None:
    """Call a plain reward function once, for all completions, and write in what it says.

    Raises ConfigError when it raises, or returns something else than one reward per completion.
    """
    rows = [(group.prompt, completion) for group in groups for completion in group.completions]
    if not rows:
        return
    columns = {name: [p.record[name] for p, _ in rows] for name in rows[0][0].record}
    try:
        rewards = reward(
            prompts=[prompt.text for prompt, _ in rows],
            completions=[completion.text for _, completion in rows],
            completion_ids=[completion.token_ids for _, completion in rows],
            **columns,
        )
        if len(rewards) != len(rows):
            raise ValueError(f"{len(rewards)} rewards for {len(rows)} completions")
        for (_, completion), value in zip(rows, rewards, strict=True):
            completion.reward = as_reward(value)
    except Exception as error:
        raise failed(reward, error) from error


def as_reward(value: object) -> float | None:
    """A reward as a float, or None where it is None or NaN: not scored. Raises ValueError."""
    if value is None:
        return None
    reward = float(cast(float, value))
    if math.isinf(reward):
        raise ValueError("a reward is infinite")
    return None if math.isnan(reward) else reward


def failed(reward: RewardFunction, error: Exception) -> ConfigError:
    """One line about a reward function that failed, with the place in it where that happened."""
    name = getattr(reward, "__name__", type(reward).__name__)
    place = traceback.extract_tb(error.__traceback__)[-1]
    return ConfigError(
        f"reward function {name}: {in_one_line(error)} ({place.filename}:{place.lineno})"
    )


def in_one_line(error: BaseException) -> str:
    """The type of an error and its message, which may be empty or have several lines."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}".removesuffix(": ")


def import_reward(name: str) -> Any:
    """The reward function that `module:function` names. Raises ConfigError."""
    module_name, _, function_name = name.partition(":")
    try:
        function = getattr(importlib.import_module(module_name), function_name)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # a module may raise anything: a script without a guard exits
        raise ConfigError(
            f"reward = {name}: {in_one_line(error)}; give module:function, the module importable "
            "from here"
        ) from error
    if not callable(function):
        raise ConfigError(f"reward = {name}: is no function")
    return function

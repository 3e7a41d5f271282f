"""Handing completions to a reward function, early where it allows that.

A reward is a plain function with the signature of TRL's reward functions,

    reward(prompts, completions, completion_ids=…, **columns) -> list[float | None]

called once when all completions have ended. One that can start earlier also has

    reward.submit(prompt, completion, completion_ids, **record) -> Future

whose result is a float or None, and whose attribute `details`, if it has one, is kept with the
completion. It is then called for each completion as soon as that has ended.
"""

import importlib
import math
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, cast

from grpo.config_loader import ConfigError
from grpo.rollout import Completion, Group, Prompt

RewardFunction = Callable[..., Sequence[float | None]]


class RewardCalls:
    """The rewards of one rollout: `start` for each completion as it ends, then `finish`."""

    def __init__(self, reward: RewardFunction) -> None:
        self.reward = reward
        self.pending: list[tuple[Completion, Future]] = []

    def start(self, prompt: Prompt, completion: Completion) -> None:
        """Submit one completion that has its text, if the reward can start early."""
        if hasattr(self.reward, "submit"):
            future = self.reward.submit(
                prompt.text, completion.text, completion.token_ids, **prompt.record
            )
            self.pending.append((completion, future))

    def finish(self, groups: Sequence[Group]) -> None:
        """Wait for the rewards of all completions and write them into the groups.

        Raises ConfigError when the reward fails or gives what is no reward; what other completions
        got is written in all the same.
        """
        if not hasattr(self.reward, "submit"):
            call_reward(self.reward, groups)
        failure: ConfigError | None = None
        for completion, future in self.pending:
            try:
                completion.reward = as_reward(future.result())
                completion.details = getattr(future, "details", None) or {}
            except Exception as error:
                failure = failure or failed(self.reward, error)
        if failure is not None:
            raise failure


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

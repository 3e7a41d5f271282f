"""Handing completions to a reward function, early where it allows that.

A reward is a plain function with the signature of TRL's reward functions,

    reward(prompts, completions, completion_ids=…, **columns) -> list[float | None]

called once when all completions have ended. One that can start earlier also has

    reward.submit(prompt, completion, completion_ids, **record) -> Future

whose result is a float or None, and whose attribute `details`, if it has one, is kept with the
completion. It is then called for each completion as soon as that has ended.
"""

import importlib
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

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
        """Wait for the rewards of all completions and write them into the groups."""
        if not hasattr(self.reward, "submit"):
            call_reward(self.reward, groups)
        for completion, future in self.pending:
            completion.reward = future.result()
            completion.details = getattr(future, "details", None) or {}


def call_reward(reward: RewardFunction, groups: Sequence[Group]) -> None:
    """Call a plain reward function once, for all completions, and write in what it says.

    Raises ValueError when it returns another number of rewards.
    """
    rows = [(group.prompt, completion) for group in groups for completion in group.completions]
    if not rows:
        return
    columns = {name: [p.record[name] for p, _ in rows] for name in rows[0][0].record}
    rewards = reward(
        prompts=[prompt.text for prompt, _ in rows],
        completions=[completion.text for _, completion in rows],
        completion_ids=[completion.token_ids for _, completion in rows],
        **columns,
    )
    if len(rewards) != len(rows):
        raise ValueError(f"the reward gave {len(rewards)} values for {len(rows)} completions")
    for (_, completion), value in zip(rows, rewards, strict=True):
        completion.reward = None if value is None else float(value)


def import_reward(name: str) -> Any:
    """The reward function that `module:function` names. Raises ConfigError."""
    module_name, _, function_name = name.partition(":")
    try:
        function = getattr(importlib.import_module(module_name), function_name)
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            f"reward = {name}: {error}; give module:function, the module importable from here"
        ) from error
    if not callable(function):
        raise ConfigError(f"reward = {name}: is no function")
    return function

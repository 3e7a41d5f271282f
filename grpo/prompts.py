"""From chat messages to the prompts of a run, and which of them each step takes."""

import random
from collections.abc import Iterable, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from grpo.config import Config, ConfigError
from grpo.policy import encode_chat
from grpo.rollout import Prompt
from grpo.sampling import random_key

Messages = list[dict[str, str]]


def make_prompts(
    setting: str,
    rows: Iterable[tuple[Messages, dict[str, Any]]],
    tokenizer: PreTrainedTokenizerBase,
    config: Config,
) -> list[Prompt]:
    """The prompt of each (chat messages, record), as text and tokens, numbered by its place.

    setting: where the records come from, for the error that refuses one.
    """
    prompts = []
    for i, (messages, record) in enumerate(rows):
        text, token_ids = encode_chat(tokenizer, messages)
        if not token_ids:
            raise ConfigError(
                f"policy.model = {config.policy.model}: record {i + 1} of {setting} makes an empty "
                "prompt; see that the tokenizer's files are all there (tokenizer.json) and that "
                "its chat template writes the messages"
            )
        if len(token_ids) > config.rollout.max_prompt_tokens:
            raise ConfigError(
                f"rollout.max_prompt_tokens = {config.rollout.max_prompt_tokens}: record {i + 1} "
                f"of {setting} makes a prompt of {len(token_ids)} tokens; raise the setting or "
                "shorten the record"
            )
        prompts.append(Prompt(i, text, token_ids, record))
    return prompts


def check_lengths(prompts: Sequence[Prompt], context: int | None, config: Config) -> None:
    """Raise ConfigError where the longest prompt and completion exceed the model's context."""
    longest = max(len(prompt.token_ids) for prompt in prompts)
    limit = config.rollout.max_completion_tokens
    if context is not None and longest + limit > context:
        raise ConfigError(
            f"rollout.max_completion_tokens = {limit}: with the longest prompt ({longest} tokens) "
            f"that exceeds the context of policy.model, {context} tokens; lower it to "
            f"{max(0, context - longest)} or shorten the records"
        )


def count_steps(prompts: Sequence[Prompt], config: Config) -> int:
    """How many steps the run takes: those asked for, or one epoch."""
    steps_per_epoch = len(prompts) // config.grpo.prompts_per_step
    if steps_per_epoch == 0:
        raise ConfigError(
            f"grpo.prompts_per_step = {config.grpo.prompts_per_step}: data.train has only "
            f"{len(prompts)} records; lower it or give more records"
        )
    return config.train.steps or steps_per_epoch


def prompts_of_step(prompts: Sequence[Prompt], step: int, config: Config) -> list[Prompt]:
    """The prompts of a step: each epoch is a shuffle of its own, dealt in equal steps.

    What is left over at the end of an epoch is left out, so that no step sees a prompt twice.
    """
    size = config.grpo.prompts_per_step
    epoch, place = divmod(step, len(prompts) // size)
    order = list(range(len(prompts)))
    random.Random(int(random_key(config.seed, epoch))).shuffle(order)
    return [prompts[i] for i in order[place * size : (place + 1) * size]]

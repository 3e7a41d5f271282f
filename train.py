"""Teach a language model to answer with empathy: GRPO with the reward of PERM.

    python train.py                          one process, the quickstart
    torchrun --nproc-per-node 8 train.py --preset qwen2.5-7b --judge.kind openai
    python train.py --help                   every setting

Config → parts → the loop. What a step does is in grpo/trainer.py.
"""

import itertools
import os
import random
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

import data
from grpo.checkpoint import export_policy
from grpo.config import Config, ConfigError, Flags, load_config, to_toml
from grpo.monitor import (
    append_line,
    mean,
    rollout_metrics,
    scored,
    standard_error,
    warnings_of,
)
from grpo.parallel import Ranks, cast_copy, pick_device, shard, start_ranks
from grpo.policy import context_length, encode_chat, load_policy, load_tokenizer
from grpo.reward import RewardFunction, import_reward
from grpo.rollout import Group, Prompt, write_groups
from grpo.sampling import random_key
from grpo.trainer import Trainer
from perm_reward import JudgeConfig, PermReward, RewardConfig, Seeker, make_judge, policy_messages

RUN_FILES = ("config.toml", "metrics.jsonl", "rollouts.jsonl", "heldout.jsonl", "policy")
COLUMN = 56  # characters, of the two answers side by side


@dataclass
class RunConfig(Config):
    """A whole run: the algorithm's settings, and those of PERM's reward."""

    perm: RewardConfig = field(default_factory=RewardConfig)
    judge: JudgeConfig = field(default_factory=JudgeConfig)


def main() -> None:
    """Run train.py. Errors that a user can cause end it with one line and exit code 2."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    flags = Flags()
    try:
        config = load_config(RunConfig, sys.argv[1:], flags=flags)
        if not config.output:
            config.output = f"runs/{flags.preset}-{datetime.now():%Y%m%d-%H%M%S}"
        with start_ranks(pick_device(config.policy.device)) as ranks:
            train(config, ranks)
    except ConfigError as error:
        # Rank 0 speaks for all; where RANK stands alone in the environment there is nobody else.
        if os.environ.get("RANK", "0") == "0" or "WORLD_SIZE" not in os.environ:
            print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def train(config: RunConfig, ranks: Ranks) -> None:
    """From the settings to the saved policy."""
    with ranks.failing_together():
        model_name = find_policy(config)
        tokenizer = load_tokenizer(model_name)
        train_records, heldout_records = load_data(config)
        prompts = make_prompts("data.train", train_records, tokenizer, config)
        heldout = make_prompts("data.heldout", heldout_records, tokenizer, config)
        check_lengths([*prompts, *heldout], context_length(model_name), config)
        steps_per_epoch = len(prompts) // config.grpo.prompts_per_step
        if steps_per_epoch == 0:
            raise ConfigError(
                f"grpo.prompts_per_step = {config.grpo.prompts_per_step}: data.train has only "
                f"{len(prompts)} records; lower it or give more records"
            )
        reward = make_reward(config, ranks)
    with ranks.failing_together():
        policy = load_policy(model_name, ranks.device)
        output = make_output(config, ranks)

    compute_dtype = getattr(torch, config.policy.compute_dtype)
    steps = config.train.steps or steps_per_epoch
    trainer = Trainer(
        config=config,
        ranks=ranks,
        reference=cast_copy(policy.model, compute_dtype) if config.grpo.kl_coef else None,
        policy=shard(policy.model, ranks, compute_dtype),
        tokenizer=policy.tokenizer,
        stop_ids=policy.stop_ids,
        reward=reward,
        steps=steps,
    )

    def evaluate(step: int) -> list[Group]:
        groups = trainer.evaluate(heldout)
        if ranks.is_main:
            write_groups(output / "heldout.jsonl", step, groups)
            append_line(output / "evaluations.jsonl", {"step": step, **heldout_metrics(groups)})
        return groups

    before = after = evaluate(0)
    with tqdm(total=steps, desc="training", unit="step", disable=not ranks.is_main) as bar:
        for step in range(steps):
            groups = trainer.rollout(step, prompts_of_step(prompts, step, config))
            if ranks.is_main:  # before the update: verdicts are paid for
                write_groups(output / "rollouts.jsonl", step + 1, groups)
            metrics = {"step": step + 1, **rollout_metrics(groups), **trainer.update(step)}
            if ranks.is_main:
                append_line(output / "metrics.jsonl", metrics)
            bar.set_postfix_str(
                f"reward {metrics['reward_mean']:.3f}, KL {metrics.get('kl', 0):.4f}, "
                f"{metrics['completion_tokens_mean']:.0f} tokens"
            )
            bar.update()
            for warning in warnings_of(metrics):
                tqdm.write(f"warning: step {step + 1}: {warning}", file=sys.stderr)
            every = config.evaluation.every
            if step + 1 == steps or (every and (step + 1) % every == 0):
                after = evaluate(step + 1)

    if ranks.is_main:
        export_policy(trainer.generator, policy.tokenizer, policy.stop_ids, output / "policy")
        judge = f", judge: {reward.judge.label}" if isinstance(reward, PermReward) else ""
        print(summary(before, after, output, config.reward + judge))
    if hasattr(reward, "close"):
        reward.close()


# --- data ----------------------------------------------------------------------------------------


def find_policy(config: RunConfig) -> str:
    """The hub name or folder of policy.model, with `embedded` looked up."""
    if config.policy.model != "embedded":
        return config.policy.model
    # Its matrices are too small to be shared out, and one thread sums in one order everywhere.
    torch.set_num_threads(1)
    return str(data.embedded_policy())


def load_data(config: RunConfig) -> tuple[list[data.SeekerRecord], list[data.SeekerRecord]]:
    """Records to train on, and held-out ones. The same are held out whatever the seed."""
    section = config.data
    records = read_records("data.train", section.train)
    if section.heldout or section.train == "bundled":
        heldout = read_records("data.heldout", section.heldout or "bundled-heldout")
        return records, heldout[: section.heldout_records]
    if section.heldout_records >= len(records):
        raise ConfigError(
            f"data.heldout_records = {section.heldout_records}: data.train has only "
            f"{len(records)} records; lower it, or give data.heldout"
        )
    chosen = set(random.Random(0).sample(range(len(records)), section.heldout_records))
    parts: tuple[list, list] = ([], [])
    for i, record in enumerate(records):
        parts[i in chosen].append(record)
    return parts


def read_records(setting: str, name: str) -> list[data.SeekerRecord]:
    """`data.load_records`, its error naming the setting."""
    try:
        return data.load_records(name)
    except data.RecordError as error:
        raise ConfigError(f"{setting} = {name}: {error}") from error


def make_prompts(
    setting: str,
    records: Sequence[data.SeekerRecord],
    tokenizer: PreTrainedTokenizerBase,
    config: RunConfig,
) -> list[Prompt]:
    """The policy's prompt for each record, as text and tokens, numbered by the record's place."""
    prompts = []
    for i, record in enumerate(records):
        messages = policy_messages(Seeker(record.persona, record.scenario, record.query))
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
        prompts.append(Prompt(i, text, token_ids, asdict(record)))
    return prompts


def check_lengths(prompts: Sequence[Prompt], context: int | None, config: RunConfig) -> None:
    """Raise ConfigError where the longest prompt and completion exceed the model's context."""
    longest = max(len(prompt.token_ids) for prompt in prompts)
    limit = config.rollout.max_completion_tokens
    if context is not None and longest + limit > context:
        raise ConfigError(
            f"rollout.max_completion_tokens = {limit}: with the longest prompt ({longest} tokens) "
            f"that exceeds the context of policy.model, {context} tokens; lower it to "
            f"{max(0, context - longest)} or shorten the records"
        )


def prompts_of_step(prompts: Sequence[Prompt], step: int, config: RunConfig) -> list[Prompt]:
    """The prompts of a step: each epoch is a shuffle of its own, dealt in equal steps.

    What is left over at the end of an epoch is left out, so that no step sees a prompt twice.
    """
    size = config.grpo.prompts_per_step
    epoch, place = divmod(step, len(prompts) // size)
    order = list(range(len(prompts)))
    random.Random(int(random_key(config.seed, epoch))).shuffle(order)
    return [prompts[i] for i in order[place * size : (place + 1) * size]]


# --- reward and results --------------------------------------------------------------------------


def make_reward(config: RunConfig, ranks: Ranks) -> RewardFunction:
    """The reward function; the judge's key is looked for on every rank, the judge tried on one."""
    if config.reward != "perm":
        sys.path.insert(0, os.getcwd())
        return import_reward(config.reward)
    try:
        judge = make_judge(config.judge)
        if ranks.is_main:
            judge.check()
    except ValueError as error:
        raise ConfigError(str(error)) from error
    return PermReward(judge, config.perm)


def make_output(config: RunConfig, ranks: Ranks) -> Path:
    """The run folder with the run's settings in it."""
    output = Path(config.output)
    if ranks.is_main:
        if any((output / name).exists() for name in RUN_FILES):
            raise ConfigError(
                f"output = {output}: holds a run already; name another folder with --output"
            )
        try:
            output.mkdir(parents=True, exist_ok=True)
            (output / "config.toml").write_text(to_toml(config), encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"output = {output}: cannot be written ({error.strerror})") from error
    return output


def heldout_metrics(groups: Sequence[Group]) -> dict[str, float]:
    """Held-out reward with its standard error (over seekers), and the other rollout metrics."""
    by_seeker = [mean(rewards) for g in groups if (rewards := scored(g.completions))]
    error = standard_error(by_seeker)
    return {"reward_standard_error": error, "seekers": len(by_seeker)} | rollout_metrics(groups)


def summary(before: Sequence[Group], after: Sequence[Group], output: Path, reward: str) -> str:
    """Held-out reward before and after, and one seeker's two answers side by side."""
    first, last = heldout_metrics(before), heldout_metrics(after)
    seeker = before[0].prompt.record
    texts = [groups[0].completions[0].text for groups in (before, after)]
    return "\n".join(
        [
            "",
            f"held-out reward  {in_words(first)} → {in_words(last)}   "
            f"(mean ± standard error over {last['seekers']:.0f} seekers)",
            f"reward           {reward}",
            f"saved to         {output / 'policy'}",
            "",
            *textwrap.wrap(f"a held-out seeker: {seeker['query']}", 2 * COLUMN + 3),
            "",
            *side_by_side("before", texts[0], "after", texts[1]),
        ]
    )


def in_words(metrics: dict[str, float]) -> str:
    """A held-out reward with its error, or that no judge could score any answer."""
    if metrics["seekers"] == 0:
        return "none scored"
    return f"{metrics['reward_mean']:.3f} ± {metrics['reward_standard_error']:.3f}"


def side_by_side(left_title: str, left: str, right_title: str, right: str) -> list[str]:
    """Two texts in two columns."""
    columns = [
        [title, "─" * COLUMN, *(w for line in text.splitlines() for w in wrap(line))]
        for title, text in ((left_title, left), (right_title, right))
    ]
    rows = itertools.zip_longest(*columns, fillvalue="")
    return [f"{a:<{COLUMN}} │ {b}".rstrip() for a, b in rows]


def wrap(line: str) -> list[str]:
    """A line cut to the width of a column; an empty one stays."""
    return textwrap.wrap(line, COLUMN) or [""]


if __name__ == "__main__":
    main()

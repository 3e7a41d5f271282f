"""Teach a language model to answer with empathy: GRPO with the reward of PERM.

    python train.py                          one process, the quickstart
    torchrun --nproc-per-node 8 train.py --preset qwen2.5-7b --judge.kind openai
    python train.py --help                   every setting

Config → parts → the loop. What a step does is in grpo/trainer.py.
"""

import os
import random
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers.utils import logging as transformers_logging

import data
from grpo.checkpoint import export_policy
from grpo.config import Config, ConfigError, Flags, load_config, to_toml
from grpo.monitor import append_line, rollout_metrics, warnings_of
from grpo.parallel import Ranks, cast_copy, pick_device, shard, start_ranks
from grpo.patience import RunStopped
from grpo.policy import context_length, load_policy, load_tokenizer
from grpo.prompts import Messages, check_lengths, count_steps, make_prompts, prompts_of_step
from grpo.reward import RewardFunction, import_reward
from grpo.rollout import Group, Prompt, write_groups
from grpo.summary import heldout_metrics, summary
from grpo.trainer import Trainer
from perm_reward import JudgeConfig, PermReward, RewardConfig, Seeker, make_judge, policy_messages
from perm_reward.estimate import estimate
from perm_reward.panel import Panel
from perm_reward.spending import Spending, bystander_scores
from perm_reward.store_service import RemoteStore, StoreService, serve_store, socket_path
from perm_reward.verdict_store import StoreError, VerdictStore

RUN_FILES = (
    "config.toml",
    "metrics.jsonl",
    "rollouts.jsonl",
    "heldout.jsonl",
    "policy",
    "verdicts",
)


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
    except RunStopped as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"stopped: {error}; the policy as it was is in {config.output}", file=sys.stderr)
        sys.exit(1)


def train(config: RunConfig, ranks: Ranks) -> None:
    """From the settings to the saved policy."""
    with ranks.failing_together():
        model_name = find_policy(config)
        tokenizer = load_tokenizer(model_name)
        train_records, heldout_records = load_data(config)
        prompts = make_prompts("data.train", with_messages(train_records), tokenizer, config)
        heldout = make_prompts("data.heldout", with_messages(heldout_records), tokenizer, config)
        check_lengths([*prompts, *heldout], context_length(model_name), config)
        steps = count_steps(prompts, config)
        reward = make_reward(config, ranks)
        completions = count_completions(steps, len(heldout), config)
        spending = plan_spending(reward, train_records, completions, config, ranks)
        try_judge(reward, ranks)
    with ranks.failing_together():
        policy = load_policy(model_name, ranks.device)
        output = make_output(config, ranks)
    service = keep_verdicts(reward, output, ranks)

    compute_dtype = getattr(torch, config.policy.compute_dtype)
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
    run = Run(config, trainer, prompts, heldout, output, spending)
    try:
        run.take_steps()
    finally:
        # However the run ends: what it has learned is kept, and no judge is left running.
        if ranks.is_main and run.after:
            export_policy(trainer.generator, policy.tokenizer, policy.stop_ids, output / "policy")
        for part in (reward, service):
            if hasattr(part, "close"):
                part.close()
    if ranks.is_main:
        judge = f", judge: {reward.judge.label}" if isinstance(reward, PermReward) else ""
        print(summary(run.before, run.after, output, config.reward + judge, run.remarks))


@dataclass
class Run:
    """The loop over the steps, and the files it writes."""

    config: RunConfig
    trainer: Trainer
    prompts: list[Prompt]
    heldout: list[Prompt]
    output: Path
    spending: Spending | None
    before: list[Group] = field(default_factory=list)
    after: list[Group] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)

    def take_steps(self) -> None:
        """All steps, with an evaluation before the first, after the last, and as often as asked."""
        config, steps, is_main = self.config, self.trainer.steps, self.trainer.ranks.is_main
        in_a_step = config.grpo.prompts_per_step * config.grpo.group_size
        self.before = self.after = self.evaluate(0)
        with tqdm(total=steps, desc="training", unit="step", disable=not is_main) as bar:
            for step in range(1, steps + 1):
                ahead = in_a_step + self.heldout_completions
                if self.spending and not self.spending.allows(ahead):
                    self.remarks.append(
                        f"stopped          before step {step} of {steps}: {self.spending}"
                    )
                    if bar.n:
                        self.after = self.evaluate(step - 1)
                    break
                metrics = self.take_step(step)
                bar.set_postfix_str(
                    f"reward {metrics['reward_mean']:.3f}, KL {metrics.get('kl', 0):.4f}, "
                    f"{metrics['completion_tokens_mean']:.0f} tokens"
                )
                bar.update()
                every = config.evaluation.every
                if step == steps or (every and step % every == 0):
                    self.after = self.evaluate(step)
        if self.spending and self.spending.spent:
            self.remarks.append(f"judges cost      {self.spending.spent:,.2f}")

    def take_step(self, step: int) -> dict[str, float]:
        """One step, numbered from 1; returns its metrics."""
        trainer, is_main = self.trainer, self.trainer.ranks.is_main
        groups = trainer.rollout(step - 1, prompts_of_step(self.prompts, step - 1, self.config))
        if is_main:  # before the update: verdicts are paid for
            write_groups(self.output / "rollouts.jsonl", step, groups)
        metrics = {"step": step, **rollout_metrics(groups), **self.judge_metrics(groups)}
        if isinstance(trainer.reward, PermReward):
            details = [c.details for group in groups for c in group.completions]
            trainer.reward.steer_bystander_weight(bystander_scores(details))
        metrics |= trainer.update(step - 1)
        if is_main:
            append_line(self.output / "metrics.jsonl", metrics)
            for warning in warnings_of(metrics):
                tqdm.write(f"warning: step {step}: {warning}", file=sys.stderr)
        return metrics

    def evaluate(self, step: int) -> list[Group]:
        """Held-out completions after so many steps."""
        groups = self.trainer.evaluate(self.heldout)
        self.judge_metrics(groups)
        if self.trainer.ranks.is_main:
            write_groups(self.output / "heldout.jsonl", step, groups)
            line = {"step": step, **heldout_metrics(groups)}
            append_line(self.output / "evaluations.jsonl", line)
        return groups

    @property
    def heldout_completions(self) -> int:
        """How many completions an evaluation judges."""
        return len(self.heldout) * self.config.evaluation.samples

    def judge_metrics(self, groups: Sequence[Group]) -> dict[str, float]:
        """What the judges have cost so far, and what the bystander weighs."""
        if self.spending is None:
            return {}
        costs = self.spending.record(sum(len(group.completions) for group in groups))
        return costs | {"bystander_weight": self.trainer.reward.config.bystander_weight}


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


def with_messages(
    records: Iterable[data.SeekerRecord],
) -> Iterator[tuple[Messages, dict[str, Any]]]:
    """What the policy is asked for each record, beside the record as the reward gets it."""
    for record in records:
        yield policy_messages(seeker_of(record)), asdict(record)


def seeker_of(record: data.SeekerRecord) -> Seeker:
    """The part of a record that policy and judges see."""
    return Seeker(record.persona, record.scenario, record.query)


# --- reward and results --------------------------------------------------------------------------


def make_reward(config: RunConfig, ranks: Ranks) -> RewardFunction:
    """The reward function. Each rank must have the judge's key; nobody is asked yet."""
    if config.reward != "perm":
        sys.path.insert(0, os.getcwd())
        return import_reward(config.reward)
    try:
        share = ranks.rank, ranks.world_size
        judge = make_judge(config.judge, seed=config.seed, share=share)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    return PermReward(judge, config.perm, completion_seconds=config.judge.completion_seconds)


def try_judge(reward: RewardFunction, ranks: Ranks) -> None:
    """Have the judge answer once, to one rank, before any work is done."""
    if isinstance(reward, PermReward) and ranks.is_main:
        try:
            reward.judge.check()
        except ValueError as error:
            raise ConfigError(str(error)) from error


def plan_spending(
    reward: RewardFunction,
    records: Sequence[data.SeekerRecord],
    completions: int,
    config: RunConfig,
    ranks: Ranks,
) -> Spending | None:
    """The run's budget. Says first what its judges may cost, where they are paid."""
    if not isinstance(reward, PermReward):
        return None
    judge, longest = config.judge, config.rollout.max_completion_tokens
    cost = estimate(judge, list(map(seeker_of, records)), completions, longest)
    if judge.budget and not cost.money:
        raise ConfigError(
            f"judge.budget = {judge.budget:g}: no judge has a price; give judge.price_input and "
            "judge.price_output, or set it to 0"
        )
    if cost.calls and ranks.is_main:
        print(f"judges: {cost}", flush=True)
    return Spending(reward, ranks.gather, judge.budget, cost.money / completions)


def count_completions(steps: int, heldout: int, config: RunConfig) -> int:
    """How many completions a run judges."""
    every = config.evaluation.every
    evaluations = 2 + ((steps - 1) // every if every else 0)
    in_steps = steps * config.grpo.prompts_per_step * config.grpo.group_size
    return in_steps + evaluations * heldout * config.evaluation.samples


def keep_verdicts(reward: RewardFunction, output: Path, ranks: Ranks) -> StoreService | None:
    """Keep every verdict in the run folder, from now on: one file per node, held by one process.

    Returns the service by which the other processes of this node reach it, where this one holds it.
    """
    if not isinstance(reward, PermReward) or not isinstance(reward.judge, Panel):
        return None
    node = os.environ.get("GROUP_RANK", "0")
    path = output / "verdicts" / f"node-{node}.sqlite"
    service = None
    with ranks.failing_together():
        if os.environ.get("LOCAL_RANK", "0") == "0":
            try:
                path.parent.mkdir(exist_ok=True)
                store = VerdictStore(path)
                reward.judge.store = store
                if ranks.world_size > 1:
                    service = serve_store(store, socket_path(path))
            except (OSError, StoreError) as error:
                raise ConfigError(
                    f"output = {output}: verdicts cannot be kept ({error})"
                ) from error
    if ranks.world_size > 1:
        reward.judge.store = RemoteStore(socket_path(path))
    return service


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


if __name__ == "__main__":
    main()

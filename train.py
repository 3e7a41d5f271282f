"""Teach a language model to answer with empathy: GRPO with the reward of PERM.

    python train.py                          one process, the quickstart
    torchrun --nproc-per-node 8 train.py --preset qwen2.5-7b --judge.kind openai
    python train.py --help                   every setting

Config → parts → the loop. What a step does is in grpo/trainer.py.
"""

import fcntl
import os
import random
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

import torch
from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging

import data
from grpo.checkpoint import export_policy, write_synced
from grpo.config import Config, ConfigError, Flags, load_config, read_flags, to_toml
from grpo.config_loader import exit_with
from grpo.interruption import Interrupted
from grpo.lora import add_adapters, draw_adapters
from grpo.parallel import Ranks, pick_device, start_ranks, tells_of_lost_peer
from grpo.patience import RunStopped
from grpo.plan import make_plan, parse_machine
from grpo.plan_report import report
from grpo.policy import context_length, load_policy, load_tokenizer
from grpo.prompts import Messages, check_lengths, count_steps, make_prompts
from grpo.reward import RewardFunction, import_reward
from grpo.run import Run
from grpo.sharding import frozen_copy, shard
from grpo.summary import summary
from grpo.trainer import Trainer
from perm_reward import JudgeConfig, PermReward, RewardConfig, Seeker, make_judge, policy_messages
from perm_reward.estimate import estimate, in_money
from perm_reward.panel import Panel
from perm_reward.rubrics import ROLES
from perm_reward.spending import Spending
from perm_reward.store_service import RemoteStore, serve_store, socket_path
from perm_reward.verdict_store import StoreError, VerdictStore

RUN_FILES = (
    "metrics.jsonl",
    "rollouts.jsonl",
    "heldout.jsonl",
    "policy",
    "verdicts",
    "checkpoints",
)


@dataclass
class RunConfig(Config):
    """A whole run: the algorithm's settings, and those of PERM's reward."""

    perm: RewardConfig = field(default_factory=RewardConfig)
    judge: JudgeConfig = field(default_factory=JudgeConfig)


@dataclass
class RunFlags(Flags):
    """What the command line says beside settings."""

    resume: str = ""
    """folder of a run to go on with, exactly where it stopped; its settings hold, except for those
    given anew"""
    plan: str = ""
    """print what each GPU would hold, and exit: with 0 if it fits, else 1; nodes x GPUs x GiB of a
    GPU, such as 4x8x80, or 8x80 for one node; no GPU is needed, and no weights are loaded"""


def main() -> None:
    """Run train.py. Errors that a user can cause end it with one line and exit code 2."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    config = RunConfig()
    try:
        config, resume = read_command_line(sys.argv[1:])
        hybrid = config.policy.sharding == "hybrid"
        with start_ranks(pick_device(config.policy.device), hybrid=hybrid) as ranks:
            told = ranks.gather((config, resume))
            going_on = [of_rank for of_rank, resumes in told if resumes]
            if going_on and not resume:  # on a node that torchrun has put in another's place
                config, resume = going_on[0], True
            config.output = (going_on or [told[0][0]])[0].output  # one clock names it
            train(config, ranks, resume)
    except ConfigError as error:
        # Rank 0 speaks for all; where RANK stands alone in the environment there is nobody else.
        if os.environ.get("RANK", "0") == "0" or "WORLD_SIZE" not in os.environ:
            print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except (RunStopped, Interrupted) as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"stopped: {error}; go on with --resume {config.output}", file=sys.stderr)
        sys.exit(getattr(error, "exit_code", 1))
    except RuntimeError as error:
        if not tells_of_lost_peer(error):
            raise
        rank, why = os.environ.get("RANK", "0"), str(error).partition(". ")[0]
        print(
            f"stopped: rank {rank}: another process of this run has ended ({why}); go on with "
            f"--resume {config.output}",
            file=sys.stderr,
        )
        sys.exit(1)


def read_command_line(argv: list[str]) -> tuple[RunConfig, bool]:
    """The settings, and whether they are those of a run that goes on."""
    flags = RunFlags()
    read_flags(RunConfig, argv, flags)
    if flags.resume and not flags.help:
        if flags.config:
            raise ConfigError(
                f"--config {flags.config}: not beside --resume, which has the run's own settings; "
                "give what is to change on the command line"
            )
        config = settings_of_run(flags.resume, argv)
    else:
        config = load_config(RunConfig, argv, flags=flags)
    if flags.plan:
        exit_with_plan(config, flags.plan)
    if flags.resume:
        return config, True
    if not config.output:
        config.output = f"runs/{flags.preset}-{datetime.now():%Y%m%d-%H%M%S}"
    elif os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0" and holds_run(config.output):
        return settings_of_run(config.output, argv), True
    return config, False


def settings_of_run(run: str, argv: list[str]) -> RunConfig:
    """Those of the run in this folder, except for what `argv` gives anew."""
    if not holds_run(run):
        raise ConfigError(f"--resume {run}: no run is there; name the folder of a run")
    again = [*argv, f"--config={run}/config.toml", f"--output={run}"]
    return load_config(RunConfig, again, flags=RunFlags())


def holds_run(folder: str) -> bool:
    """Whether there is a run to go on with."""
    return (Path(folder) / "config.toml").exists()


def train(config: RunConfig, ranks: Ranks, resume: bool = False) -> None:
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
        spending = plan_spending(reward, train_records, steps, len(heldout), config, ranks)
        try_judge(reward, ranks)
    compute_dtype = getattr(torch, config.policy.compute_dtype)
    with ranks.failing_together():
        policy = load_policy(model_name, ranks.device, check=ranks.is_main)
        if rank := config.policy.lora_rank:
            add_adapters(policy.model, rank, config.policy.lora_alpha, compute_dtype)
    with ExitStack() as held:
        output = held.enter_context(open_output(config, ranks, resume))
        held.enter_context(keeping_verdicts(reward, output, ranks, resume))
        if hasattr(reward, "close"):
            held.callback(reward.close)
        trained = shard(policy.model, ranks, compute_dtype, policy.weights.fill)
        draw_adapters(trained, config.seed)
        trainer = Trainer(
            config=config,
            ranks=ranks,
            policy=trained,
            reference=reference_of(trained, config),
            tokenizer=policy.tokenizer,
            stop_ids=policy.stop_ids,
            reward=reward,
            steps=steps,
        )
        run = Run(config, trainer, prompts, heldout, output, spending)
        held.enter_context(ranks.interruption.listening(run.last_words))
        if resume:
            run.resume()
            run.write(lambda: keep_settings(config, output))
        run.take_steps()
        if spending and spending.spent:
            run.remarks.append(f"judges cost      {in_money(spending.spent)}")
        generator = trainer.generator
        if ranks.is_main:
            export_policy(generator, policy.tokenizer, policy.stop_ids, output / "policy")
            judge = f", judge: {reward.judge.label}" if isinstance(reward, PermReward) else ""
            print(summary(run.before, run.after, output, config.reward + judge, run.remarks))


def reference_of(trained: PreTrainedModel, config: Config) -> PreTrainedModel | None:
    """What the KL term compares with: the policy as it starts, where that term has a weight."""
    if not config.grpo.kl_coef:
        return None
    if config.policy.lora_rank:
        return trained  # with its adapters off
    return frozen_copy(trained, on_cpu=config.policy.offload_reference)


# --- planning ------------------------------------------------------------------------------------


def exit_with_plan(config: RunConfig, machine_text: str) -> NoReturn:
    """Print what the run would need of each GPU."""
    machine, name = parse_machine(machine_text), find_policy(config)
    text, fits = report(
        config, config.policy.model, machine, lambda c: make_plan(c, name, machine, judge_models(c))
    )
    exit_with(text, 0 if fits else 1)


def judge_models(config: RunConfig) -> list[str]:
    """The models that judge on the policy's device, each of which is loaded once."""
    if config.reward != "perm":
        return []
    judges = [config.judge.of(role) for role in ROLES]
    return sorted({j.model for j in judges if j.kind == "local" and j.device != "cpu"})


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
        judge = make_judge(config.judge, seed=config.seed, share=share, device=ranks.device)
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
    steps: int,
    heldout: int,
    config: RunConfig,
    ranks: Ranks,
) -> Spending | None:
    """The run's budget. Says first what its judges may cost, where they are paid."""
    if not isinstance(reward, PermReward):
        return None
    judge, longest = config.judge, config.rollout.max_completion_tokens
    in_a_step = config.grpo.prompts_per_step * config.grpo.group_size
    evaluated = heldout * config.evaluation.samples
    every = config.evaluation.every
    evaluations = 2 + ((steps - 1) // every if every else 0)
    completions = steps * in_a_step + evaluations * evaluated
    cost = estimate(judge, list(map(seeker_of, records)), completions, longest)
    if judge.budget and not cost.money:
        raise ConfigError(
            f"judge.budget = {judge.budget:g}: no judge has a price; give judge.price_input and "
            "judge.price_output, or set it to 0"
        )
    if cost.calls and ranks.is_main:
        print(f"judges: {cost}", flush=True)
    spending = Spending(reward, ranks.gather, judge.budget, cost.money / completions)
    at_least = 2 * evaluated + in_a_step
    if not spending.allows(at_least):
        raise ConfigError(
            f"judge.budget = {judge.budget:g}: one step and an evaluation before and after it may "
            f"cost {in_money(at_least * cost.money / completions)}; raise it, or lower "
            "data.heldout_records or grpo.prompts_per_step"
        )
    return spending


@contextmanager
def keeping_verdicts(
    reward: RewardFunction, output: Path, ranks: Ranks, resume: bool
) -> Iterator[None]:
    """Keep every verdict in the run folder: one file per node, held by one of its processes."""
    if not isinstance(reward, PermReward) or not isinstance(reward.judge, Panel):
        yield
        return
    path = output / "verdicts" / f"node-{os.environ.get('GROUP_RANK', 0)}.sqlite"
    with ExitStack() as held:
        with ranks.failing_together():
            if os.environ.get("LOCAL_RANK", "0") == "0":
                try:
                    store = VerdictStore(path, beside=resume)
                    reward.judge.store = store
                    if ranks.world_size > 1:
                        held.enter_context(serve_store(store, socket_path(path)))
                except (OSError, StoreError) as error:
                    raise ConfigError(f"output = {output}: keeps no verdicts ({error})") from error
        if ranks.world_size > 1:
            reward.judge.store = RemoteStore(socket_path(path))
        if resume:  # all that is kept was paid by this run; its checkpoint, if any, says what for
            reward.charge_after("")
        yield


@contextmanager
def open_output(config: RunConfig, ranks: Ranks, resume: bool) -> Iterator[Path]:
    """The run folder with the run's settings in it, for this run alone."""
    output = Path(config.output)
    with ExitStack() as held:
        with ranks.failing_together():
            if ranks.is_main:
                if not resume and any((output / name).exists() for name in RUN_FILES):
                    raise ConfigError(
                        f"output = {output}: holds a run already; name another folder with "
                        f"--output, or go on with that run: --resume {output}"
                    )
                try:
                    output.mkdir(parents=True, exist_ok=True)
                    held.enter_context(locked(output / "lock"))
                    if not resume:  # else once it is sure that the run can go on with them
                        keep_settings(config, output)
                except BlockingIOError as error:
                    raise ConfigError(
                        f"output = {output}: another process works on this run; wait for its end"
                    ) from error
                except OSError as error:
                    why = error.strerror
                    raise ConfigError(f"output = {output}: cannot be written ({why})") from error
        yield output


def keep_settings(config: RunConfig, output: Path) -> None:
    """Write the run's settings into its folder. Raises OSError; what was there stays then."""
    aside = output / "config.toml.partial"
    write_synced(aside, to_toml(config))
    os.replace(aside, output / "config.toml")


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold a lock that ends with this process, however that ends. Raises BlockingIOError."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield


if __name__ == "__main__":
    main()

"""A run: the loop over its steps, the files they leave, and how it goes on where it stopped.

    RUN/metrics.jsonl, rollouts.jsonl           a line per step; its groups of completions
    RUN/evaluations.jsonl, heldout.jsonl        the same of each evaluation
    RUN/checkpoints/                            see checkpoint.py

A checkpoint holds how long these files were. What a later step wrote before a crash is cut off
when the run goes on, and written again, the same to the last bit.
"""

import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from tqdm import tqdm

from grpo.checkpoint import (
    DamagedCheckpoint,
    checkpoints,
    load_checkpoint,
    raise_together,
    read_rollout,
    read_state,
    remove_old,
    save_checkpoint,
    save_rollout,
    set_aside_newer,
    sync,
)
from grpo.config import Config, ConfigError
from grpo.interruption import Interrupted
from grpo.monitor import append_line, rollout_metrics, warnings_of
from grpo.patience import RunStopped
from grpo.prompts import prompts_of_step
from grpo.rollout import Group, Prompt, read_groups, write_groups
from grpo.summary import heldout_metrics
from grpo.trainer import Rollout, Trainer

LOGS = ("metrics.jsonl", "rollouts.jsonl", "evaluations.jsonl", "heldout.jsonl")


class Budget(Protocol):
    """What limits a run beside its steps: the money that its reward costs."""

    def record(self, completions: int) -> dict[str, float]:
        """The metrics of what was spent, so many completions later. All ranks together."""
        ...

    def allows(self, completions: int) -> bool:
        """Whether so many more can be paid."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps of it, fit for JSON."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        ...


class NotSaved(RunStopped):
    """A checkpoint cannot be written."""


class Found(NamedTuple):
    """A checkpoint: its folder, the run's state, and the groups sampled for its next step."""

    path: Path
    state: dict[str, Any]
    rollout: list[Group] | None


@dataclass
class Run:
    """A run of `trainer` over `prompts`, in the folder `output`.

    done: steps taken so far; evaluated, saved: after how many the latest evaluation and checkpoint
    were made, −1: none; sampled: the next step's rollout, where it was begun, and asked_with: the
    reward's state at that time; before, after: the first and the latest evaluation; remarks: what
    the summary is to say of how it went; lengths: of the files, after the latest whole step.
    """

    config: Config
    trainer: Trainer
    prompts: list[Prompt]
    heldout: list[Prompt]
    output: Path
    budget: Budget | None = None
    done: int = 0
    evaluated: int = -1
    saved: int = -1
    sampled: Rollout | None = None
    asked_with: Any = None
    best: tuple[float, str] | None = None
    before: list[Group] = field(default_factory=list)
    after: list[Group] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)
    lengths: dict[str, int] = field(default_factory=dict)

    # --- the loop ----------------------------------------------------------------------------

    def take_steps(self) -> None:
        """The steps that are left, with an evaluation before the first, after the last, and as
        often as asked. However it ends, everything is saved, as after the latest whole step."""
        try:
            self.take_steps_that_are_left()
        except NotSaved:
            raise
        except (RunStopped, Interrupted, ConfigError) as error:  # all ranks have it
            if self.done or not isinstance(error, ConfigError):
                self.save(with_rollout=True)
            raise

    def take_steps_that_are_left(self) -> None:
        """The loop of `take_steps`."""
        steps, ranks = self.trainer.steps, self.trainer.ranks
        if self.evaluated < 0:
            self.before = self.evaluate()
        with tqdm(
            total=steps,
            initial=self.done,
            desc="training",
            unit="step",
            disable=not ranks.is_main,
        ) as bar:
            while True:
                is_paid = self.sampled is not None or self.is_paid_for()
                is_last = self.done == steps or not is_paid
                evaluation, checkpoint = self.config.evaluation, self.config.checkpoint
                if self.evaluated < self.done and (is_last or is_due(self.done, evaluation.every)):
                    self.evaluate()
                if is_last or is_due(self.done, checkpoint.every) or self.is_best_yet():
                    self.save()
                ranks.stop_if_asked()
                if self.done < steps and not is_paid:
                    where = f"before step {self.done + 1} of {steps}"
                    how = f"go on with more: --resume {self.output}"
                    self.remarks.append(f"stopped          {where}: {self.budget}; {how}")
                if is_last:
                    break
                metrics = self.take_step()
                bar.set_postfix_str(
                    f"reward {metrics['reward_mean']:.3f}, KL {metrics.get('kl', 0):.4f}, "
                    f"{metrics['completion_tokens_mean']:.0f} tokens"
                )
                bar.update()

    def take_step(self) -> dict[str, float]:
        """One step; returns its metrics. Raises RunStopped where updates have become impossible."""
        trainer, is_main, step = self.trainer, self.trainer.ranks.is_main, self.done + 1
        start = time.perf_counter()
        if self.sampled is None:
            self.asked_with = state_of(trainer.reward)
            self.sampled = self.sample(step)
        rollout, asked_with = self.sampled, state_of(trainer.reward)
        following = self.sample(step + 1) if self.may_go_ahead() else None
        groups = trainer.finish_rollout(rollout)
        # Before the update: verdicts are paid for.
        self.write(lambda: write_groups(self.output / "rollouts.jsonl", step, groups))
        metrics = {"step": step, **rollout_metrics(groups), **trainer.update(step - 1)}
        self.done, self.sampled, self.asked_with = step, following, asked_with
        metrics |= self.spent(groups)
        if hasattr(trainer.reward, "after_step"):
            details = [c.details for group in groups for c in group.completions]
            metrics |= trainer.reward.after_step(details)
        metrics["seconds_step"] = time.perf_counter() - start
        self.write(lambda: append_line(self.output / "metrics.jsonl", metrics))
        if is_main:
            for warning in warnings_of(metrics):
                tqdm.write(f"warning: step {step}: {warning}", file=sys.stderr)
        self.measure_files()
        if trainer.skipped >= self.config.train.max_skipped:
            raise RunStopped(
                f"{trainer.skipped} updates in a row, the last in step {step}, had a loss or "
                "gradient that is not finite (train.max_skipped): none was made, the policy is "
                "that of before them; rollouts.jsonl has what they were to learn from"
            )
        return metrics

    def sample(self, step: int) -> Rollout:
        """Begin the rollout of a step, counted from 1."""
        return self.trainer.begin_rollout(
            step - 1, prompts_of_step(self.prompts, step - 1, self.config)
        )

    def may_go_ahead(self) -> bool:
        """Whether the step after this one is to be sampled already: judges are slow, say."""
        is_last = self.done + 1 >= self.trainer.steps
        return self.config.rollout.ahead > 0 and not is_last and self.is_paid_for(rollouts=2)

    def evaluate(self) -> list[Group]:
        """Held-out completions of the policy as it is now."""
        groups = self.trainer.evaluate(self.heldout)
        metrics = {"step": self.done, **heldout_metrics(groups), **self.spent(groups)}
        self.write(lambda: write_groups(self.output / "heldout.jsonl", self.done, groups))
        self.write(lambda: append_line(self.output / "evaluations.jsonl", metrics))
        reward = metrics["reward_mean"]  # NaN where nothing was scored
        if not math.isnan(reward) and (self.best is None or reward > self.best[0]):
            self.best = reward, checkpoint_name(self.done)
        self.evaluated, self.after = self.done, groups
        self.measure_files()
        return groups

    def is_best_yet(self) -> bool:
        """Whether the policy as it is now has the best held-out reward of all."""
        is_measured = 0 < self.evaluated == self.done
        return is_measured and self.best is not None and self.best[1] == checkpoint_name(self.done)

    def write(self, work: Callable[[], None]) -> None:
        """Write to the run's files, on the main rank. Raises NotSaved, on all, where that fails."""
        error = None
        if self.trainer.ranks.is_main:
            try:
                work()
            except OSError as e:
                error = e.strerror or str(e)
        try:
            raise_together(error, self.trainer.ranks)
        except OSError as e:
            raise NotSaved(f"{self.output} cannot be written to ({e}); make room") from e

    def spent(self, groups: Sequence[Group]) -> dict[str, float]:
        """Metrics of what was spent, these groups included."""
        completions = sum(len(group.completions) for group in groups)
        return {} if self.budget is None else self.budget.record(completions)

    def is_paid_for(self, rollouts: int = 1) -> bool:
        """Whether so many rollouts more, and the last evaluation, are within the budget."""
        grpo = self.config.grpo
        heldout = len(self.heldout) * self.config.evaluation.samples
        ahead = rollouts * grpo.prompts_per_step * grpo.group_size + heldout
        return self.budget is None or self.budget.allows(ahead)

    # --- stopping and going on ---------------------------------------------------------------

    def save(self, *, with_rollout: bool = False) -> None:
        """Write a checkpoint of the run after its latest step, and remove those before it.

        with_rollout: also what was sampled for the next step, although it could be sampled again
        (a step ahead it could not, and is always part of the checkpoint).
        """
        trainer, folder = self.trainer, self.output / "checkpoints"
        path = folder / checkpoint_name(self.done)
        ahead, of_reward = self.config.rollout.ahead > 0, state_of(trainer.reward)
        state = {
            "done": self.done,
            "evaluated": self.evaluated,
            "best": self.best,
            "skipped": trainer.skipped,
            "logs": self.lengths,
            "needs_rollout": ahead and self.sampled is not None,
            "reward": trainer.ranks.gather(of_reward),
            "asked_with": trainer.ranks.gather(self.asked_with if self.sampled else of_reward),
            "budget": state_of(self.budget),
        }
        rollout = self.sampled.everyone if self.sampled and (ahead or with_rollout) else None
        try:
            if trainer.ranks.is_main:  # the state below tells of what is in them
                for name in self.lengths:
                    if (self.output / name).exists():
                        sync(self.output / name)
            if self.saved != self.done:
                save_checkpoint(
                    path, trainer.policy, trainer.optimizer, state, trainer.ranks, rollout
                )
            elif rollout:
                save_rollout(path, rollout, trainer.ranks)
        except OSError as error:
            raise NotSaved(
                f"the checkpoint of step {self.done} cannot be written ({error}); the one before "
                "is whole: make room"
            ) from error
        self.saved = self.done
        if trainer.ranks.is_main:
            remove_old(folder, self.config.checkpoint.keep, self.best and self.best[1])

    def resume(self) -> None:
        """Go on from the newest checkpoint that is whole; from the start where there is none."""
        trainer = self.trainer
        with trainer.ranks.failing_together():
            mine = self.find_checkpoint() if trainer.ranks.is_main else None
        found = trainer.ranks.gather(mine)[0]
        self.lengths = found.state["logs"] if found else {}
        if trainer.ranks.is_main:
            for name in LOGS:
                cut_off(self.output / name, self.lengths.get(name, 0))
            if found:
                set_aside_newer(found.path)
        if found is None:
            return
        path, state = found.path, found.state
        load_checkpoint(path, trainer.policy, trainer.optimizer)
        trainer.weights_changed()
        self.done = self.saved = state["done"]
        self.evaluated = state["evaluated"]
        self.best = state["best"] and tuple(state["best"])
        trainer.skipped = state["skipped"]
        rank = trainer.ranks.rank % len(state["reward"])  # there may be more ranks now
        restore(self.budget, state["budget"])
        if found.rollout:
            self.asked_with = state["asked_with"][rank]
            restore(trainer.reward, self.asked_with)
            self.sampled = trainer.go_on_with(found.rollout)
        restore(trainer.reward, state["reward"][rank])
        trainer.ranks.gather(None)  # the main rank has cut the files off
        if self.evaluated >= 0:
            heldout = self.output / "heldout.jsonl"
            self.before = list(read_groups(heldout, step=0))
            self.after = list(read_groups(heldout, step=self.evaluated))

    def find_checkpoint(self) -> Found | None:
        """The newest checkpoint whose files are those that were written; None where there is none.

        Raises ConfigError where none of them is whole: to start anew would wipe out the run.
        """
        paths = checkpoints(self.output / "checkpoints")
        for path in paths:
            try:
                state, rollout = read_state(path), read_rollout(path)
                if state["needs_rollout"] and rollout is None:
                    raise DamagedCheckpoint(f"{path}: the rollout of its next step is not whole")
                for name, size in state["logs"].items():
                    if size_of(self.output / name) < size:
                        raise DamagedCheckpoint(f"{path}: {name} is shorter than it was then")
                return Found(path, state, rollout)
            except DamagedCheckpoint as damage:
                print(f"warning: {damage}; going on from the one before", file=sys.stderr)
        if paths:
            raise ConfigError(
                f"--resume {self.output}: none of its checkpoints is whole; to start anew from its "
                "settings, give its config.toml to --config and another folder to --output"
            )
        return None

    def measure_files(self) -> None:
        """Remember how long the files are now: what comes after is of a step that is not whole."""
        self.lengths = {name: size_of(self.output / name) for name in LOGS}

    def last_words(self) -> str:
        """What to say where the run has to end without another checkpoint."""
        where = f"checkpoint of step {self.saved}" if self.saved >= 0 else "start: no step is saved"
        return f"there was no time to save; go on from the {where}, with --resume {self.output}"


def is_due(step: int, every: int) -> bool:
    """Whether something that is done every so many steps is done after this one."""
    return every > 0 and step > 0 and step % every == 0


def checkpoint_name(step: int) -> str:
    """The folder of the checkpoint after a step."""
    return f"step-{step:06d}"


def size_of(path: Path) -> int:
    """Bytes of a file, 0 where there is none."""
    return path.stat().st_size if path.exists() else 0


def cut_off(path: Path, size: int) -> None:
    """Shorten a file, if there is one, to so many bytes."""
    if path.exists():
        with path.open("r+b") as file:
            file.truncate(size)


def state_of(part: Any) -> dict[str, Any] | None:
    """What a checkpoint keeps of a part that carries something from step to step."""
    return part.state_dict() if hasattr(part, "state_dict") else None


def restore(part: Any, state: dict[str, Any] | None) -> None:
    """Give a part back what `state_of` told of it."""
    if state is not None:
        part.load_state_dict(state)

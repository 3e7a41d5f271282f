"""A run: the loop over its steps, the files they leave, and how it goes on where it stopped.

    RUN/metrics.jsonl, rollouts.jsonl           a line per step; its groups of completions
    RUN/evaluations.jsonl, heldout.jsonl        the same of each evaluation
    RUN/checkpoints/                            see checkpoint.py

A checkpoint holds how long these files were. What a later step wrote before a crash is cut off
when the run goes on, and written again, the same to the last bit.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from tqdm import tqdm

from grpo.checkpoint import (
    DamagedCheckpoint,
    checkpoints,
    load_checkpoint,
    read_state,
    remove_old,
    save_checkpoint,
)
from grpo.config import Config
from grpo.monitor import append_line, rollout_metrics, warnings_of
from grpo.parallel import plain_copy
from grpo.patience import RunStopped
from grpo.prompts import prompts_of_step
from grpo.rollout import Group, Prompt, read_groups, write_groups
from grpo.summary import heldout_metrics
from grpo.trainer import Trainer

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


@dataclass
class Run:
    """A run of `trainer` over `prompts`, in the folder `output`.

    done: steps taken so far; evaluated, saved: after how many the latest evaluation and checkpoint
    were made, −1: none; before, after: the first and the latest evaluation; remarks: what the
    summary is to say of how it went.
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
    best: tuple[float, str] | None = None
    before: list[Group] = field(default_factory=list)
    after: list[Group] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)

    # --- the loop ----------------------------------------------------------------------------

    def take_steps(self) -> None:
        """The steps that are left, with an evaluation before the first, after the last, and as
        often as asked."""
        steps, is_main = self.trainer.steps, self.trainer.ranks.is_main
        if not self.before:
            self.before = self.after = self.evaluate()
        with tqdm(
            total=steps, initial=self.done, desc="training", unit="step", disable=not is_main
        ) as bar:
            while self.done < steps:
                if not self.is_paid_for():
                    where = f"before step {self.done + 1} of {steps}"
                    self.remarks.append(f"stopped          {where}: {self.budget}")
                    break
                try:
                    metrics = self.take_step()
                except RunStopped:  # before its update: nothing of this step is in the policy
                    self.save()
                    raise
                bar.set_postfix_str(
                    f"reward {metrics['reward_mean']:.3f}, KL {metrics.get('kl', 0):.4f}, "
                    f"{metrics['completion_tokens_mean']:.0f} tokens"
                )
                bar.update()
                if is_due(self.done, self.config.evaluation.every):
                    self.after = self.evaluate()
                if is_due(self.done, self.config.checkpoint.every):
                    self.save()
        if self.evaluated < self.done:
            self.after = self.evaluate()
        self.save()

    def take_step(self) -> dict[str, float]:
        """One step; returns its metrics."""
        trainer, is_main, step = self.trainer, self.trainer.ranks.is_main, self.done + 1
        groups = trainer.rollout(step - 1, prompts_of_step(self.prompts, step - 1, self.config))
        if is_main:  # before the update: verdicts are paid for
            write_groups(self.output / "rollouts.jsonl", step, groups)
        metrics = {"step": step, **rollout_metrics(groups), **self.spent(groups)}
        if hasattr(trainer.reward, "after_step"):
            details = [c.details for group in groups for c in group.completions]
            metrics |= trainer.reward.after_step(details)
        metrics |= trainer.update(step - 1)
        self.done = step
        if is_main:
            append_line(self.output / "metrics.jsonl", metrics)
            for warning in warnings_of(metrics):
                tqdm.write(f"warning: step {step}: {warning}", file=sys.stderr)
        return metrics

    def evaluate(self) -> list[Group]:
        """Held-out completions of the policy as it is now."""
        groups = self.trainer.evaluate(self.heldout)
        spent = self.spent(groups)
        self.evaluated = self.done
        metrics = {"step": self.done, **heldout_metrics(groups), **spent}
        if self.trainer.ranks.is_main:
            write_groups(self.output / "heldout.jsonl", self.done, groups)
            append_line(self.output / "evaluations.jsonl", metrics)
        if self.best is None or metrics["reward_mean"] > self.best[0]:
            self.best = metrics["reward_mean"], checkpoint_name(self.done)
        return groups

    def spent(self, groups: Sequence[Group]) -> dict[str, float]:
        """Metrics of what was spent, these groups included."""
        completions = sum(len(group.completions) for group in groups)
        return {} if self.budget is None else self.budget.record(completions)

    def is_paid_for(self) -> bool:
        """Whether another step, and the last evaluation, are within the budget."""
        grpo = self.config.grpo
        heldout = len(self.heldout) * self.config.evaluation.samples
        ahead = grpo.prompts_per_step * grpo.group_size + heldout
        return self.budget is None or self.budget.allows(ahead)

    # --- stopping and going on ---------------------------------------------------------------

    def save(self) -> None:
        """Write a checkpoint of the run after its latest step, and remove those before it."""
        trainer, folder = self.trainer, self.output / "checkpoints"
        path = folder / checkpoint_name(self.done)
        if self.saved == self.done:
            return
        state = {
            "done": self.done,
            "evaluated": self.evaluated,
            "best": self.best,
            "logs": {name: size_of(self.output / name) for name in LOGS},
            "reward": trainer.ranks.gather(state_of(trainer.reward)),
            "budget": state_of(self.budget),
        }
        try:
            save_checkpoint(path, trainer.policy, trainer.optimizer, state, trainer.ranks)
        except OSError as error:
            raise RunStopped(
                f"the checkpoint of step {self.done} cannot be written ({error}); the one before "
                "is whole: make room"
            ) from error
        self.saved = self.done
        if trainer.ranks.is_main:
            remove_old(folder, self.config.checkpoint.keep, self.best and self.best[1])

    def resume(self) -> None:
        """Go on from the newest checkpoint that is whole; from the start where there is none."""
        trainer = self.trainer
        found = trainer.ranks.gather(self.find_checkpoint() if trainer.ranks.is_main else None)[0]
        path, state = found or (None, {"logs": dict.fromkeys(LOGS, 0)})
        if trainer.ranks.is_main:
            for name, size in state["logs"].items():
                cut_off(self.output / name, size)
        if path is None:
            return
        load_checkpoint(path, trainer.policy, trainer.optimizer)
        trainer.generator = plain_copy(trainer.policy)
        self.done = self.saved = state["done"]
        self.evaluated = state["evaluated"]
        self.best = state["best"] and tuple(state["best"])
        of_ranks = state["reward"]
        of_reward = of_ranks[trainer.ranks.rank % len(of_ranks)]  # there may be more ranks now
        restore(trainer.reward, of_reward)
        restore(self.budget, state["budget"])
        heldout = self.output / "heldout.jsonl"
        trainer.ranks.gather(None)  # the main rank has cut the file off
        self.before = list(read_groups(heldout, step=0))
        self.after = list(read_groups(heldout, step=self.evaluated))

    def find_checkpoint(self) -> tuple[Path, dict[str, Any]] | None:
        """The newest checkpoint whose files are those that were written, with its state."""
        for path in checkpoints(self.output / "checkpoints"):
            try:
                return path, read_state(path)
            except DamagedCheckpoint as damage:
                print(f"warning: {damage}; going on from the one before", file=sys.stderr)
        return None


def is_due(step: int, every: int) -> bool:
    """Whether something that is done every so many steps is done after this one."""
    return every > 0 and step % every == 0


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

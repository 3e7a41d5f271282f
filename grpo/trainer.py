"""One step of GRPO: sample → reward → advantage → update.

for each step:
    groups     = sample(prompts)                    G completions of each prompt
    rewards    = reward(groups)                     asked for while others still grow
    advantages = (reward − mean of the group) / std
    loss       = policy gradient, clipped, + β · KL to the reference
    one step of the optimiser, or one for each minibatch of the groups
"""

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from grpo.advantages import group_advantages
from grpo.batches import MicroBatch, Minibatch, Sample, pack_samples
from grpo.config import Config
from grpo.generation import generate_groups
from grpo.logprobs import score
from grpo.lora import adapters_off
from grpo.loss import policy_loss
from grpo.optimizer import make_optimizer, set_learning_rate
from grpo.packing import pack
from grpo.parallel import Ranks
from grpo.patience import finish_rewards
from grpo.reward import RewardCalls, RewardFunction
from grpo.rollout import Completion, Group, Prompt
from grpo.sampling import Sampling
from grpo.sharding import gradient_norm, let_go, plain_copy

# The `step` in the random numbers of held-out completions: the same before, during and after
# training, so that two evaluations differ by the policy alone.
HELDOUT_STEP = -1


@dataclass
class Rollout:
    """What was sampled for one step and is being judged.

    mine, calls: the groups that this rank has sampled, and its calls of the reward for them;
    everyone: the groups of all ranks in the order of their prompts, with rewards once they are in.
    """

    mine: list[Group]
    calls: RewardCalls
    everyone: list[Group]


@dataclass
class Trainer:
    """The trained policy, its reference, and what one step needs of them.

    `policy` is sharded (sharding.shard), and so is `reference`, which is frozen (frozen_copy), or
    the policy itself where it has adapters, which are off then, or None when its weight is 0.
    skipped: how many updates in a row were not made, see `update_on`.
    """

    config: Config
    ranks: Ranks
    policy: PreTrainedModel
    reference: PreTrainedModel | None
    tokenizer: PreTrainedTokenizerBase
    stop_ids: list[int]
    reward: RewardFunction
    steps: int
    seconds: dict[str, float] = field(default_factory=dict)
    minibatches: list[Minibatch] = field(default_factory=list)
    skipped: int = 0
    _generator: PreTrainedModel | None = None

    def __post_init__(self) -> None:
        self.optimizer = make_optimizer(self.policy, self.config.train)
        if self.config.train.gradient_checkpointing:
            enable_checkpointing(self.policy)
        self.policy.train()

    @property
    def generator(self) -> PreTrainedModel:
        """The plain copy that generates, with the weights as they are now. All ranks together."""
        if self._generator is None:
            with self.timed("refill"):
                self._generator = plain_copy(self.policy)
        return self._generator

    def weights_changed(self) -> None:
        """What generates has to be refilled before it is used again."""
        self._generator = None

    # --- a step ------------------------------------------------------------------------------

    def rollout(self, step: int, prompts: Sequence[Prompt]) -> list[Group]:
        """First half of a step, on `prompts` (those of all ranks): see the two parts of it."""
        return self.finish_rollout(self.begin_rollout(step, prompts))

    def begin_rollout(self, step: int, prompts: Sequence[Prompt]) -> Rollout:
        """sample, and ask for rewards without waiting for them. Steps are numbered from 0."""
        group_size = self.config.grpo.group_size
        mine, calls = self.sample(prompts, step, group_size)
        everyone = self.ranks.collect(mine, self.work_of(prompts, group_size))
        return Rollout(mine, calls, everyone)

    def go_on_with(self, everyone: list[Group]) -> Rollout:
        """A rollout that an earlier process has sampled. Its rewards are asked for once more."""
        work = self.work_of([group.prompt for group in everyone], self.config.grpo.group_size)
        mine = self.ranks.deal(deepcopy(everyone), work)
        calls = RewardCalls(self.reward, speaks=self.ranks.is_main)
        for group in mine:
            for completion in group.completions:
                calls.start(group.prompt, completion)
        return Rollout(mine, calls, everyone)

    def finish_rollout(self, rollout: Rollout) -> list[Group]:
        """reward → advantage. Returns the groups of all ranks, in the order of their prompts; this
        rank's share of the work on them waits for `update`.

        Now that lengths are known, that share is about as many tokens as every other rank's.
        """
        groups, group_size = rollout.everyone, self.config.grpo.group_size
        shares = self.share(groups)
        with self.timed("reference"):  # while the judges read
            self.remember_reference([group for share in shares for group in share])
        with self.timed("reward"):
            finish_rewards(rollout.calls, rollout.mine, self.ranks, self.config.train)
        work = self.work_of([group.prompt for group in groups], group_size)
        for group, rewarded in zip(groups, self.ranks.collect(rollout.mine, work), strict=True):
            for completion, other in zip(group.completions, rewarded.completions, strict=True):
                completion.reward, completion.details = other.reward, other.details
        set_advantages(groups, self.config.grpo.advantage_scale)
        self.minibatches = list(map(self.minibatch, shares))
        return groups

    def update(self, step: int) -> dict[str, float]:
        """Second half of a step: one or several updates on the rollout.

        Returns the metrics over the updates, with the times of the phases since the last update.
        """
        updates = self.config.grpo.updates_per_rollout
        if updates > 1 and not self.recorded_is_old:
            with self.timed("old"):
                self.remember_old()
        with self.timed("update"):
            metrics = [
                self.update_on(minibatch, step * updates + number)
                for number, minibatch in enumerate(self.minibatches)
            ]
        self.weights_changed()
        seconds, self.seconds = self.seconds, {}
        return over_updates(metrics) | {f"seconds_{name}": s for name, s in seconds.items()}

    def evaluate(self, prompts: Sequence[Prompt]) -> list[Group]:
        """Completions and rewards for held-out prompts, of all ranks, in order."""
        seconds, samples = dict(self.seconds), self.config.evaluation.samples
        groups, calls = self.sample(prompts, HELDOUT_STEP, samples)
        finish_rewards(calls, groups, self.ranks, self.config.train)
        self.seconds = seconds  # those of steps alone
        return self.ranks.collect(groups, self.work_of(prompts, samples))

    # --- sample ------------------------------------------------------------------------------

    def sample(
        self, everyone: Sequence[Prompt], step: int, group_size: int
    ) -> tuple[list[Group], RewardCalls]:
        """Generate a group for each of this rank's prompts out of everyone's; the reward is asked
        for each completion as it ends."""
        prompts = self.ranks.deal(everyone, self.work_of(everyone, group_size))
        calls = RewardCalls(self.reward, speaks=self.ranks.is_main)

        def on_finish(prompt: int, sample: int, completion: Completion) -> None:
            text = self.tokenizer.decode(completion.token_ids, skip_special_tokens=True)
            completion.text = str(text)
            calls.start(prompts[prompt], completion)

        rollout, generator = self.config.rollout, self.generator
        with self.timed("generation"):
            generate = partial(
                generate_groups,
                generator,
                [prompt.token_ids for prompt in prompts],
                group_size=group_size,
                max_new_tokens=rollout.max_completion_tokens,
                sampling=Sampling(temperature=rollout.temperature),
                stop_ids=self.stop_ids,
                seed=self.config.seed,
                step=step,
                prompt_ids=[prompt.prompt_id for prompt in prompts],
                on_finish=on_finish,
                max_rows=rollout.max_rows,
            )
            completions = self.ranks.interruption.unless_asked(generate)
            if not rollout.keep_weights:
                del generator, generate
                self.weights_changed()
                let_go(self.policy)
        self.ranks.stop_if_asked()
        assert completions is not None  # or this rank was asked to stop
        groups = [Group(p, list(cs)) for p, cs in zip(prompts, completions, strict=True)]
        return groups, calls

    def work_of(self, prompts: Sequence[Prompt], group_size: int) -> list[float]:
        """Tokens that sampling a group of each prompt may take: by these, ranks get equal work."""
        longest = group_size * self.config.rollout.max_completion_tokens
        return [len(prompt.token_ids) + longest for prompt in prompts]

    # --- score -------------------------------------------------------------------------------

    def share(self, groups: Sequence[Group]) -> list[list[list[Sample]]]:
        """This rank's samples by the update that is made on them, and by group.

        Minibatches are equal parts of the rollout's groups, and of each all ranks get about as
        many tokens.
        """
        size = len(groups) // self.config.grpo.updates_per_rollout
        parts = [groups[first : first + size] for first in range(0, len(groups), size)]
        return [
            [
                [Sample(group.prompt.token_ids, c) for c in group.completions]
                for group in self.ranks.deal(part, [group.tokens for group in part])
            ]
            for part in parts
        ]

    def minibatch(self, groups: Sequence[Sequence[Sample]]) -> Minibatch:
        """What one update runs, and how much it counts.

        Without a KL term a completion of advantage 0 has no gradient: it counts, but is not run.
        """
        kl_coef = self.config.grpo.kl_coef
        run = [[s for s in group if kl_coef or s.advantage != 0] for group in groups]
        return Minibatch(
            self.pack([group for group in run if group]),
            tokens=sum(s.tokens for group in groups for s in group),
            sequences=sum(map(len, groups)),
        )

    def pack(self, groups: Sequence[Sequence[Sample]]) -> list[MicroBatch]:
        """`pack_samples` on this rank's device."""
        return pack_samples(groups, self.config.train.tokens_per_row, self.ranks.device)

    @torch.no_grad()
    def logprobs(self, model: PreTrainedModel, batch: MicroBatch) -> Tensor:
        """Log-probs [N] of a micro-batch's completion tokens, without a gradient."""
        return score(model, batch.row, self.config.rollout.temperature)[0]

    def remember_reference(self, groups: Sequence[Sequence[Sample]]) -> None:
        """Log-probs under the reference, where there is one."""
        if self.reference is not None:
            with adapters_off(self.reference):
                for batch in self.same_rounds(self.pack(groups)):
                    batch.keep("reference", self.logprobs(self.reference, batch))

    def remember_old(self) -> None:
        """Old log-probs for all updates but the first, from the policy that no update has moved.

        For the first, the old log-probs are the new ones, and no pass is spent on them.
        """
        for minibatch in self.minibatches[1:]:
            for batch in self.same_rounds(minibatch.micro_batches):
                batch.keep("old", self.logprobs(self.policy, batch))

    @property
    def recorded_is_old(self) -> bool:
        """Whether the log-probs that generation recorded serve as the old ones.

        A step ahead, the policy has moved since it sampled. Either the ratio is to what sampled, or
        (grpo.importance_cap) to the policy before the update, and weights make up for the rest.
        """
        return self.config.rollout.ahead > 0 and self.config.grpo.importance_cap is None

    # --- update ------------------------------------------------------------------------------

    def update_on(self, minibatch: Minibatch, number: int) -> dict[str, float]:
        """Gradients of every micro-batch, then one step of the optimiser, the number-th of the run.

        The denominators count the tokens and completions of all ranks, so that the gradient is
        that of one large batch however it is split. Where the loss or the gradient is not finite,
        no rank takes the step.
        """
        batches = minibatch.micro_batches
        counts = self.ranks.sum(
            self.tensor(
                [
                    minibatch.tokens,
                    minibatch.sequences,
                    sum(batch.row.targets.numel() for batch in batches),
                    sum(len(batch.samples) for batch in batches),
                ]
            )
        )
        tokens, sequences, tokens_run, sequences_run = counts.unbind()
        learning_rate = set_learning_rate(
            self.optimizer,
            self.config.train,
            number,
            self.steps * self.config.grpo.updates_per_rollout,
        )
        sums: dict[str, Tensor] = {}
        worst = self.tensor([0.0])
        first_of_rollout = number % self.config.grpo.updates_per_rollout == 0
        for batch in self.same_rounds(batches, may_stop=first_of_rollout):
            stats, difference = self.backward(batch, tokens, sequences)
            worst = torch.maximum(worst, difference)
            for name, value in stats.items():
                sums[name] = sums.get(name, 0) + value.double()
        self.undilute(
            sums, tokens / tokens_run.clamp(min=1), sequences / sequences_run.clamp(min=1)
        )
        totals = self.ranks.sum(torch.stack(list(sums.values())))
        metrics = dict(zip(sums, totals.tolist(), strict=True)) | {
            "gradient_norm": gradient_norm(self.policy, self.config.train.max_gradient_norm),
            "learning_rate": learning_rate,
            "rollout_logprob_difference_max": float(self.ranks.largest(worst)),
        }
        is_finite = math.isfinite(metrics["loss"]) and math.isfinite(metrics["gradient_norm"])
        if is_finite:
            self.optimizer.step()
        self.optimizer.zero_grad()
        self.skipped = 0 if is_finite else self.skipped + 1
        return metrics | {"skipped": float(not is_finite)}

    def backward(
        self, batch: MicroBatch, tokens: Tensor, sequences: Tensor
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Loss and gradient of one micro-batch. Returns its statistics, which add up over
        micro-batches and ranks, and the largest difference between training's log-probs and those
        that generation recorded.

        In the first update on a rollout the policy has not moved since it sampled: its own
        log-probs, without their gradient, are the old ones (but see `recorded_is_old`).
        """
        grpo = self.config.grpo
        logprobs, entropy = score(self.policy, batch.row, self.config.rollout.temperature)
        logp = batch.by_completion(logprobs)
        own = batch.kept("old")
        if own is None:
            own = logp.detach()
        recorded = batch.by_completion(
            self.tensor([p for s in batch.samples for p in s.completion.logprobs])
        )
        loss, stats = policy_loss(
            logp,
            recorded.to(logp.dtype) if self.recorded_is_old else own,
            batch.kept("reference"),
            self.tensor([sample.advantage for sample in batch.samples]),
            batch.mask,
            objective=grpo.objective,
            clip_low=grpo.clip_low,
            clip_high=grpo.clip_high,
            dual_clip=grpo.dual_clip,
            kl_coef=grpo.kl_coef,
            kl_estimator=grpo.kl_estimator,
            importance_weight=importance_weight(own, recorded, grpo.importance_cap),
            max_completion_tokens=self.config.rollout.max_completion_tokens,
            token_count=tokens,
            sequence_count=sequences,
        )
        loss.backward()
        difference = (own - recorded).abs() * batch.mask
        stats["entropy"] = (batch.by_completion(entropy) * batch.mask).sum() / tokens
        stats["rollout_logprob_difference"] = difference.sum() / tokens
        return stats, difference.max().double()

    def undilute(self, sums: dict[str, Tensor], by_token: Tensor, by_sequence: Tensor) -> None:
        """Make means over all that counts means over what was run, NaN where nothing was. A loss
        stays: what was not run adds 0 to it."""
        per_sequence = (
            ("ratio_", "clip_", "dual_clip_") if self.config.grpo.objective == "gspo" else ()
        )
        for name in sums.keys() - {"loss", "policy_loss", "kl_loss"}:
            sums[name] = sums[name] * (by_sequence if name.startswith(per_sequence) else by_token)

    # --- small things ------------------------------------------------------------------------

    def same_rounds(
        self, batches: list[MicroBatch], *, may_stop: bool = True
    ) -> Iterator[MicroBatch]:
        """This rank's micro-batches and, where another has more, empty ones: all ranks must take
        part in every gather of parameters. At least one, so that there are statistics.

        may_stop: whether nothing is lost where a signal ends the run before one of them.
        """
        rounds = max(1, int(self.ranks.largest(self.tensor([len(batches)]))))
        for index in range(rounds):
            if may_stop:
                self.ranks.stop_if_asked()
            yield batches[index] if index < len(batches) else self.empty_micro_batch()

    def empty_micro_batch(self) -> MicroBatch:
        """One token that does not count: a part in the collectives with a gradient of zero."""
        sample = Sample(self.stop_ids[:1], Completion(self.stop_ids[:1], [0.0], "stop"))
        row = pack([(sample.prompt, [sample.completion.token_ids])], self.ranks.device)
        batch = MicroBatch(row, [sample], counts=False)
        if self.reference is not None:
            batch.keep("reference", self.tensor([0.0]))
        return batch

    def tensor(self, values: list) -> Tensor:
        """A tensor on this rank's device; floats become float64."""
        tensor = torch.tensor(values, device=self.ranks.device)
        return tensor.double() if tensor.is_floating_point() else tensor

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        """Add the wall-clock time of a phase to `seconds`."""
        start = time.perf_counter()
        yield
        if self.ranks.device.type == "cuda":
            torch.cuda.synchronize()
        self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - start


def importance_weight(own: Tensor, recorded: Tensor, cap: float | None) -> Tensor | None:
    """What makes up for sampling from another distribution than is trained, [S, T]; None: nothing.

        weight = min(π_trainer / π_rollout, cap)          (truncated importance sampling)

    own, recorded: log-probs of the tokens under the policy before the update, and as generation
    recorded them.
    """
    return None if cap is None else (own - recorded).exp().clamp(max=cap)


def over_updates(metrics: Sequence[dict[str, float]]) -> dict[str, float]:
    """One metric of several updates: the mean of those that have it (are not NaN), or the largest
    of maxima."""

    def join(name: str) -> float:
        values = [each[name] for each in metrics if not math.isnan(each[name])]
        if name.endswith("_max"):
            return max(values, default=math.nan)
        return sum(values) / len(values) if values else math.nan

    return {name: join(name) for name in metrics[0]}


def set_advantages(groups: Sequence[Group], scale: str) -> None:
    """Write each completion's advantage over its group; the groups are those of all ranks."""
    rewards = torch.tensor([group.rewards for group in groups], dtype=torch.float64)
    advantages = group_advantages(rewards, scale=scale).tolist()
    for group, values in zip(groups, advantages, strict=True):
        for completion, advantage in zip(group.completions, values, strict=True):
            completion.advantage = advantage


def enable_checkpointing(model: PreTrainedModel) -> None:
    """Recompute each layer's activations in the backward pass."""
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable({"use_reentrant": False})
    else:  # transformers before 5.23 or so
        model.gradient_checkpointing_enable({"use_reentrant": False})

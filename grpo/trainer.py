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
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from grpo.advantages import group_advantages
from grpo.batches import MicroBatch, Minibatch, Sample, pack_samples
from grpo.config import Config
from grpo.generation import generate_groups
from grpo.logprobs import score
from grpo.loss import policy_loss
from grpo.optimizer import make_optimizer, set_learning_rate
from grpo.packing import pack
from grpo.parallel import Ranks, gradient_norm, plain_copy
from grpo.patience import finish_rewards
from grpo.reward import RewardCalls, RewardFunction
from grpo.rollout import Completion, Group, Prompt
from grpo.sampling import Sampling

# The `step` in the random numbers of held-out completions: the same before, during and after
# training, so that two evaluations differ by the policy alone.
HELDOUT_STEP = -1


@dataclass
class Trainer:
    """The trained policy, its reference, and what one step needs of them.

    `policy` is sharded (parallel.shard); `reference` is frozen, None when its weight is 0.
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

    def __post_init__(self) -> None:
        self.optimizer = make_optimizer(self.policy, self.config.train)
        if self.config.train.gradient_checkpointing:
            enable_checkpointing(self.policy)
        self.policy.train()
        self.generator = plain_copy(self.policy)

    def rollout(self, step: int, prompts: Sequence[Prompt]) -> list[Group]:
        """First half of a step: sample → reward → advantage, on `prompts` (those of all ranks).

        Steps are numbered from 0. Returns the groups of all ranks, in the order of `prompts`; this
        rank's share waits for `update`.
        """
        self.seconds = {}
        mine = self.ranks.deal(list(prompts))
        groups, calls = self.sample(mine, step, self.config.grpo.group_size)
        samples = [[Sample(g.prompt.token_ids, c) for c in g.completions] for g in groups]
        with self.timed("reference"):  # while the judges read
            self.remember_reference(samples)
        with self.timed("reward"):
            finish_rewards(calls, groups, self.ranks, self.config.train)
        everyone = self.ranks.collect(groups)
        set_advantages(everyone, self.config.grpo.advantage_scale)
        for own, group in zip(samples, self.ranks.deal(everyone), strict=True):
            for sample, completion in zip(own, group.completions, strict=True):
                sample.advantage = completion.advantage
        self.minibatches = self.split(samples, len(prompts))
        return everyone

    def update(self, step: int) -> dict[str, float]:
        """Second half of a step: one or several updates on the rollout.

        Returns the metrics over the updates, with times.
        """
        updates = self.config.grpo.updates_per_rollout
        if updates > 1:
            with self.timed("old"):
                self.remember_old()
        with self.timed("update"):
            metrics = [
                self.update_on(minibatch, step * updates + number)
                for number, minibatch in enumerate(self.minibatches)
            ]
        with self.timed("refill"):
            self.generator = plain_copy(self.policy)
        return over_updates(metrics) | {f"seconds_{name}": s for name, s in self.seconds.items()}

    def evaluate(self, prompts: Sequence[Prompt]) -> list[Group]:
        """Completions and rewards for held-out prompts, of all ranks, in order."""
        groups, calls = self.sample(
            self.ranks.deal(list(prompts)), HELDOUT_STEP, self.config.evaluation.samples
        )
        finish_rewards(calls, groups, self.ranks, self.config.train)
        return self.ranks.collect(groups)

    # --- sample ------------------------------------------------------------------------------

    def sample(
        self, prompts: Sequence[Prompt], step: int, group_size: int
    ) -> tuple[list[Group], RewardCalls]:
        """Generate a group for each prompt; the reward is asked for each completion as it ends."""
        calls = RewardCalls(self.reward, speaks=self.ranks.is_main)

        def on_finish(prompt: int, sample: int, completion: Completion) -> None:
            text = self.tokenizer.decode(completion.token_ids, skip_special_tokens=True)
            completion.text = str(text)
            calls.start(prompts[prompt], completion)

        rollout = self.config.rollout
        with self.timed("generation"):
            completions = generate_groups(
                self.generator,
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
        groups = [Group(p, list(cs)) for p, cs in zip(prompts, completions, strict=True)]
        return groups, calls

    # --- score -------------------------------------------------------------------------------

    def split(self, groups: Sequence[Sequence[Sample]], prompts: int) -> list[Minibatch]:
        """This rank's groups by the update that is made on them.

        Minibatches are equal parts of the rollout's prompts, whichever rank they are on.
        """
        updates = self.config.grpo.updates_per_rollout
        shares: list[list[Sequence[Sample]]] = [[] for _ in range(updates)]
        for place, group in zip(self.ranks.deal(list(range(prompts))), groups, strict=True):
            shares[place * updates // prompts].append(group)
        return list(map(self.minibatch, shares))

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
            for batch in self.pack(groups):
                batch.keep("reference", self.logprobs(self.reference, batch))

    def remember_old(self) -> None:
        """Old log-probs for all updates but the first, from the policy that no update has moved.

        For the first, the old log-probs are the new ones, and no pass is spent on them.
        """
        for minibatch in self.minibatches[1:]:
            for batch in self.same_rounds(minibatch):
                batch.keep("old", self.logprobs(self.policy, batch))

    # --- update ------------------------------------------------------------------------------

    def update_on(self, minibatch: Minibatch, number: int) -> dict[str, float]:
        """Gradients of every micro-batch, then one step of the optimiser, the number-th of the run.

        The denominators count the tokens and completions of all ranks, so that the gradient is
        that of one large batch however it is split.
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
        for batch in self.same_rounds(minibatch):
            stats, difference = self.backward(batch, tokens, sequences)
            worst = torch.maximum(worst, difference)
            for name, value in stats.items():
                sums[name] = sums.get(name, 0) + value.double()
        norm = gradient_norm(self.policy, self.config.train.max_gradient_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()

        self.undilute(
            sums, tokens / tokens_run.clamp(min=1), sequences / sequences_run.clamp(min=1)
        )
        totals = self.ranks.sum(torch.stack(list(sums.values())))
        return dict(zip(sums, totals.tolist(), strict=True)) | {
            "gradient_norm": norm,
            "learning_rate": learning_rate,
            "rollout_logprob_difference_max": float(self.ranks.largest(worst)),
        }

    def backward(
        self, batch: MicroBatch, tokens: Tensor, sequences: Tensor
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Loss and gradient of one micro-batch. Returns its statistics, which add up over
        micro-batches and ranks, and the largest difference between training's log-probs and those
        that generation recorded.

        In the first update on a rollout the policy has not moved since it sampled: its own
        log-probs, without their gradient, are the old ones.
        """
        grpo = self.config.grpo
        logprobs, entropy = score(self.policy, batch.row, self.config.rollout.temperature)
        logp = batch.by_completion(logprobs)
        old, reference = batch.kept("old"), batch.kept("reference")
        recorded = self.tensor([p for s in batch.samples for p in s.completion.logprobs])
        loss, stats = policy_loss(
            logp,
            logp.detach() if old is None else old,
            reference,
            self.tensor([sample.advantage for sample in batch.samples]),
            batch.mask,
            objective=grpo.objective,
            clip_low=grpo.clip_low,
            clip_high=grpo.clip_high,
            dual_clip=grpo.dual_clip,
            kl_coef=grpo.kl_coef,
            kl_estimator=grpo.kl_estimator,
            max_completion_tokens=self.config.rollout.max_completion_tokens,
            token_count=tokens,
            sequence_count=sequences,
        )
        loss.backward()
        first = logp.detach() if old is None else old  # before any update on this rollout
        difference = (first - batch.by_completion(recorded)).abs() * batch.mask
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

    def same_rounds(self, minibatch: Minibatch) -> list[MicroBatch]:
        """This rank's micro-batches and, where another has more, empty ones: all ranks must take
        part in every gather of parameters. At least one, so that there are statistics."""
        batches = minibatch.micro_batches
        rounds = max(1, int(self.ranks.largest(self.tensor([len(batches)]))))
        return batches + [self.empty_micro_batch() for _ in range(rounds - len(batches))]

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

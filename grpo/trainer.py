"""One step of GRPO: sample → reward → advantage → update.

for each step:
    groups     = sample(prompts)                    G completions of each prompt
    rewards    = reward(groups)                     asked for while others still grow
    advantages = (reward − mean of the group) / std
    loss       = policy gradient, clipped, + β · KL to the reference
    one step of the optimiser
"""

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from grpo.advantages import group_advantages
from grpo.config import Config, TrainConfig
from grpo.generation import generate_groups
from grpo.logprobs import score
from grpo.loss import batch_counts, policy_loss
from grpo.packing import PackedRow, pack
from grpo.parallel import Ranks, gradient_norm, plain_copy
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
    micro_batches: list["MicroBatch"] = field(default_factory=list)

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
        rows = [self.pack(group) for group in groups]
        with self.timed("reference"):
            reference = [self.reference_logprobs(row) for row in rows]
        with self.timed("reward"), self.ranks.failing_together():
            calls.finish(groups)
        everyone = self.ranks.collect(groups)
        set_advantages(everyone, self.config.grpo.advantage_scale)
        scored = self.ranks.deal(everyone)
        self.micro_batches = list(map(self.micro_batch, scored, rows, reference))
        return everyone

    def update(self, step: int) -> dict[str, float]:
        """Second half of a step: one update on the rollout. Returns its metrics, with times."""
        with self.timed("update"):
            metrics = self.update_on(self.micro_batches, step)
        with self.timed("refill"):
            self.generator = plain_copy(self.policy)
        return metrics | {f"seconds_{name}": s for name, s in self.seconds.items()}

    def evaluate(self, prompts: Sequence[Prompt]) -> list[Group]:
        """Completions and rewards for held-out prompts, of all ranks, in order."""
        groups, calls = self.sample(
            self.ranks.deal(list(prompts)), HELDOUT_STEP, self.config.evaluation.samples
        )
        with self.ranks.failing_together():
            calls.finish(groups)
        return self.ranks.collect(groups)

    # --- sample ------------------------------------------------------------------------------

    def sample(
        self, prompts: Sequence[Prompt], step: int, group_size: int
    ) -> tuple[list[Group], RewardCalls]:
        """Generate a group for each prompt; the reward is asked for each completion as it ends."""
        calls = RewardCalls(self.reward)

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

    def pack(self, group: Group) -> PackedRow:
        """One row for one group: `[x | y1 | … | yG]`."""
        completions = [completion.token_ids for completion in group.completions]
        return pack([(group.prompt.token_ids, completions)], self.ranks.device)

    @torch.no_grad()
    def reference_logprobs(self, row: PackedRow) -> Tensor | None:
        """Log-probs [N] of the row's completion tokens under the reference."""
        if self.reference is None:
            return None
        return score(self.reference, row, self.config.rollout.temperature)[0]

    # --- update ------------------------------------------------------------------------------

    def update_on(self, micro_batches: Sequence["MicroBatch"], step: int) -> dict[str, float]:
        """Gradients of every micro-batch, then one step of the optimiser.

        The denominators count the tokens and completions of all ranks, so that the gradient is
        that of one large batch however it is split. A rank with fewer micro-batches than another
        runs empty ones in their place: all ranks must take part in every gather of parameters.
        """
        counts = torch.zeros(2, dtype=torch.long, device=self.ranks.device)
        for batch in micro_batches:
            counts += torch.stack(batch_counts(batch.mask))
        tokens, sequences = self.ranks.sum(counts).unbind()
        rounds = int(self.ranks.largest(self.tensor([len(micro_batches)])))
        empty = [self.empty_micro_batch() for _ in range(rounds - len(micro_batches))]

        learning_rate = set_learning_rate(self.optimizer, self.config.train, step, self.steps)
        sums: dict[str, Tensor] = {}
        worst = self.tensor([0.0])
        for batch in [*micro_batches, *empty]:
            stats, difference = self.backward(batch, tokens, sequences)
            worst = torch.maximum(worst, difference)
            for name, value in stats.items():
                sums[name] = sums.get(name, 0) + value.double()
        norm = gradient_norm(self.policy, self.config.train.max_gradient_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()

        totals = self.ranks.sum(torch.stack(list(sums.values())))
        return dict(zip(sums, totals.tolist(), strict=True)) | {
            "gradient_norm": norm,
            "learning_rate": learning_rate,
            "rollout_logprob_difference_max": float(self.ranks.largest(worst)),
        }

    def backward(
        self, batch: "MicroBatch", tokens: Tensor, sequences: Tensor
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Loss and gradient of one micro-batch. Returns its statistics, which add up over
        micro-batches and ranks, and the largest difference between training's log-probs and those
        that generation recorded.

        With one update per rollout the policy has not moved since it sampled: its own log-probs,
        without their gradient, are the old ones, and no pass is spent on them.
        """
        grpo = self.config.grpo
        logprobs, entropy = score(self.policy, batch.row, self.config.rollout.temperature)
        logp = batch.by_completion(logprobs)
        loss, stats = policy_loss(
            logp,
            logp.detach(),
            None if batch.reference is None else batch.by_completion(batch.reference),
            batch.advantages,
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
        difference = (logp.detach() - batch.by_completion(batch.recorded)).abs() * batch.mask
        stats["entropy"] = (batch.by_completion(entropy) * batch.mask).sum() / tokens
        stats["rollout_logprob_difference"] = difference.sum() / tokens
        return stats, difference.max().double()

    # --- small things ------------------------------------------------------------------------

    def micro_batch(self, group: Group, row: PackedRow, reference: Tensor | None) -> "MicroBatch":
        """What the update needs of one group."""
        return MicroBatch(
            row=row,
            recorded=self.tensor([p for c in group.completions for p in c.logprobs]),
            reference=reference,
            advantages=self.tensor([completion.advantage for completion in group.completions]),
        )

    def empty_micro_batch(self) -> "MicroBatch":
        """One token that does not count: a part in the collectives with a gradient of zero."""
        zero = self.tensor([0.0])
        return MicroBatch(
            row=pack([(self.stop_ids[:1], [self.stop_ids[:1]])], self.ranks.device),
            recorded=zero,
            reference=None if self.reference is None else zero,
            advantages=zero,
            counts=False,
        )

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


@dataclass
class MicroBatch:
    """One packed row and, for its N completion tokens in S completions, what the loss takes.

    recorded: [N] log-probs of generation; reference: [N] or None; advantages: [S];
    counts: False for an empty micro-batch.
    """

    row: PackedRow
    recorded: Tensor
    reference: Tensor | None
    advantages: Tensor
    counts: bool = True

    def by_completion(self, values: Tensor) -> Tensor:
        """[N] → [S, T], padded with zeros."""
        return pad_sequence(values.split(self.row.lengths), batch_first=True)

    @property
    def mask(self) -> Tensor:
        """bool [S, T]: which places of `by_completion` hold a token that counts."""
        return self.by_completion(torch.full_like(self.recorded, self.counts, dtype=torch.bool))


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


def make_optimizer(model: PreTrainedModel, config: TrainConfig) -> torch.optim.Optimizer:
    """AdamW over the (sharded, float32) parameters."""
    return torch.optim.AdamW(
        model.parameters(),
        lr=config.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_epsilon,
        weight_decay=config.weight_decay,
        fused=True,
    )


def set_learning_rate(
    optimizer: torch.optim.Optimizer, config: TrainConfig, step: int, steps: int
) -> float:
    """Set and return the learning rate of a step, counted from 0."""
    rate = config.learning_rate * learning_rate_factor(config, step, steps)
    for group in optimizer.param_groups:
        group["lr"] = rate
    return rate


def learning_rate_factor(config: TrainConfig, step: int, steps: int) -> float:
    """The part of the highest learning rate that step `step` of `steps` has, in (0, 1].

    Warm-up:  (step + 1) / warm-up steps, so that the first step already learns.
    After it, with x running from 0 towards 1:  linear 1 − x,  cosine (1 + cos πx) / 2,  constant 1.
    """
    warmup = math.ceil(config.warmup_fraction * steps)
    if step < warmup:
        return (step + 1) / warmup
    x = (step - warmup) / max(1, steps - warmup)
    if config.learning_rate_decay == "linear":
        return 1 - x
    if config.learning_rate_decay == "cosine":
        return (1 + math.cos(math.pi * x)) / 2
    return 1.0

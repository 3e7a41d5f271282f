"""Run by tests/test_parallel.py in one process or under torchrun: trains tiny models and saves
what came out.

    parallel_worker.py SEED FOLDER    writes FOLDER/world<n>.pt
"""

import itertools
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch

from grpo.batches import Sample
from grpo.config import Config, GRPOConfig, RolloutConfig, TrainConfig
from grpo.lora import add_adapters, draw_adapters, whole
from grpo.parallel import Ranks, pick_device, start_ranks
from grpo.rollout import Group, Prompt
from grpo.sharding import frozen_copy, shard
from grpo.trainer import Trainer, set_advantages
from tests.tiny import tiny_model, tiny_prompts

STEPS = 3


class Run(NamedTuple):
    """What sets one training run apart from another."""

    family: str
    prompts_per_step: int = 3
    group_size: int = 4
    lora_rank: int = 0


RUNS = {
    "untied": Run("qwen2"),  # three prompts: two ranks get two of them and one
    "tied": Run("llama"),  # the embeddings are the last layer too
    "one prompt": Run("qwen2", prompts_per_step=1, group_size=8),  # the second rank gets none
    "adapters": Run("qwen2", lora_rank=3),  # two ranks hold two rows of A and one
    "rank 1": Run("llama", prompts_per_step=1, group_size=8, lora_rank=1),  # one has none of A
}
BFLOAT16_RUNS = ("untied", "adapters")


class Numbers:
    """A tokenizer whose words are the numbers of the tokens."""

    def decode(self, token_ids: list[int], **_: object) -> str:
        return " ".join(map(str, token_ids))


def reward(prompts: list[str], completions: list[str], **columns: list) -> list[float | None]:
    """The part of small numbers; none for a completion that holds an 11, as if no judge spoke."""
    words = [[int(word) for word in text.split()] for text in completions]
    return [None if 11 in w else sum(x < 40 for x in w) / len(w) for w in words]


def make_trainer(ranks: Ranks, seed: int, dtype: torch.dtype, run: Run) -> Trainer:
    config = Config(
        seed=seed,
        rollout=RolloutConfig(max_completion_tokens=20, temperature=0.7),
        grpo=GRPOConfig(
            group_size=run.group_size,
            prompts_per_step=run.prompts_per_step,
            kl_coef=0.05,
            objective="dapo",
        ),
        # Adam divides by the gradient's size: with a tiny epsilon, rounding noise in a gradient
        # that is all but 0 would become a whole step.
        train=TrainConfig(learning_rate=1e-3, max_gradient_norm=0.5, adam_epsilon=1e-4),
    )
    model = tiny_model(run.family, seed)
    if run.lora_rank:
        add_adapters(model, run.lora_rank, 8.0, dtype)
    policy = shard(model, ranks, dtype)
    draw_adapters(policy, seed)
    return Trainer(
        config=config,
        ranks=ranks,
        reference=policy if run.lora_rank else frozen_copy(policy),
        policy=policy,
        tokenizer=Numbers(),
        stop_ids=[7, 9],
        reward=reward,
        steps=STEPS,
    )


def train(ranks: Ranks, seed: int, run: Run) -> dict:
    """One held-out prompt, and three steps in float32."""
    trainer = make_trainer(ranks, seed, torch.float32, run)
    prompts = [
        Prompt(i, str(i), ids, {}) for i, ids in enumerate(tiny_prompts((5, 12, 8) * STEPS, seed))
    ]
    heldout = trainer.evaluate(prompts[:1])
    rollouts, metrics, copies = [], [], [weights_of(trainer.generator)]
    for step in range(STEPS):
        size = run.prompts_per_step
        groups = trainer.rollout(step, prompts[step * size : (step + 1) * size])
        numbers = trainer.update(step)
        rollouts.append(groups)
        metrics.append({k: v for k, v in numbers.items() if not k.startswith("seconds")})
        copies.append(weights_of(trainer.generator))
    weights = {name: p.full_tensor().detach() for name, p in trainer.policy.named_parameters()}
    return {
        "heldout": heldout,
        "rollouts": rollouts,
        "metrics": metrics,
        "weights": weights,
        "copies": copies,
    }


def weights_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def recorded_rollout(trainer: Trainer, prompts: list[Prompt]) -> list[Group]:
    """Groups that do not depend on the ranks: each rank samples all of them."""
    trainer.ranks = replace(trainer.ranks, world_size=1, rank=0)
    groups, calls = trainer.sample(prompts, 0, 4)
    calls.finish(groups)
    set_advantages(groups, "group")
    return groups


def gradient_of_recorded(ranks: Ranks, seed: int, run: Run) -> dict:
    """Loss and gradient in bfloat16 on a rollout that is the same however many ranks there are."""
    trainer = make_trainer(ranks, seed, torch.bfloat16, run)
    prompts = [Prompt(i, str(i), p, {}) for i, p in enumerate(tiny_prompts((5, 12, 8), seed))]
    recorded = recorded_rollout(trainer, prompts)
    trainer.ranks = ranks
    groups = ranks.deal(recorded, [group.tokens for group in recorded])
    trainer.config.train.tokens_per_row = 1  # the same rows on one rank and on two
    samples = [[Sample(group.prompt.token_ids, c) for c in group.completions] for group in groups]
    trainer.remember_reference(samples)
    for sample in itertools.chain(*samples):
        sample.reference += 0.1
    trainer.config.train.max_gradient_norm = 1e9
    trainer.optimizer = torch.optim.SGD(trainer.policy.parameters(), lr=1.0)
    # Embeddings and head lie whole on every rank from a pass without gradient to the next with one.
    before = {name: whole(p).detach().clone() for name, p in trainer.policy.named_parameters()}
    trainer.config.train.learning_rate = 1.0
    trainer.config.train.warmup_fraction = 0.0
    metrics = trainer.update_on(trainer.minibatch(samples), 0)
    after = {name: p.full_tensor().detach() for name, p in trainer.policy.named_parameters()}
    return {"metrics": metrics, "gradient": {n: before[n] - after[n] for n in before}}


def main() -> None:
    seed, folder = int(sys.argv[1]), Path(sys.argv[2])
    torch.set_num_threads(1)
    if hybrid := os.environ.get("WORLD_SIZE") == "4":
        os.environ["LOCAL_WORLD_SIZE"] = "2"
    with start_ranks(pick_device("cpu"), hybrid=hybrid) as ranks:
        assert ranks.mesh.ndim == (2 if hybrid else 1)
        results = {name: train(ranks, seed, run) for name, run in RUNS.items()}
        for name in BFLOAT16_RUNS:
            results[f"{name} in bfloat16"] = gradient_of_recorded(ranks, seed, RUNS[name])
        if ranks.is_main:
            torch.save(results, folder / f"world{ranks.world_size}.pt")


if __name__ == "__main__":
    main()

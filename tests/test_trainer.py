"""The trainer's update against an independent computation, and its schedule by hand."""

from collections.abc import Iterator

import pytest
import torch

from grpo.config import Config, GRPOConfig, RolloutConfig, TrainConfig
from grpo.parallel import Ranks, cast_copy, pick_device, plain_copy, shard, start_ranks
from grpo.rollout import Completion, Group, Prompt
from grpo.trainer import Trainer, learning_rate_factor
from tests.tiny import fresh_seed, tiny_model

KL_COEF, TEMPERATURE = 0.3, 0.7


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    with start_ranks(pick_device("cpu")) as ranks:
        yield ranks


def make_trainer(ranks: Ranks, seed: int, **train: float) -> Trainer:
    """A trainer of a tiny model with tied weights, stepped by plain SGD with a rate of 1."""
    settings = {"learning_rate": 1.0, "warmup_fraction": 0.0, "max_gradient_norm": 1e9} | train
    model = tiny_model("llama", seed)
    assert model.config.tie_word_embeddings
    trainer = Trainer(
        config=Config(
            rollout=RolloutConfig(temperature=TEMPERATURE),
            grpo=GRPOConfig(kl_coef=KL_COEF, kl_estimator="k3"),
            train=TrainConfig(**settings),
        ),
        ranks=ranks,
        reference=cast_copy(tiny_model("llama", seed + 1), torch.float32),
        policy=shard(model, ranks, torch.float32),
        tokenizer=None,
        stop_ids=[7],
        reward=None,
        steps=1,
    )
    trainer.optimizer = torch.optim.SGD(trainer.policy.parameters(), lr=1.0)
    return trainer


def some_groups() -> list[Group]:
    """Two groups with advantages set by hand; completions of different lengths, ended by 7."""
    rows = {
        0: ([3, 1, 4, 1, 5], [([9, 2, 6, 7], 1.2), ([5, 7], -0.4), ([8, 9, 7, 7], -0.8)]),
        1: ([2, 7, 1], [([8, 2, 8, 1, 8, 7], 0.5), ([2, 8], 0.0), ([7], -0.5)]),
    }
    return [
        Group(
            Prompt(i, "", prompt, {}),
            [Completion(ids, [0.0] * len(ids), "stop", advantage=a) for ids, a in completions],
        )
        for i, (prompt, completions) in rows.items()
    ]


def run_update(trainer: Trainer, groups: list[Group]) -> tuple[dict, dict[str, torch.Tensor]]:
    """The metrics and what the update took off every weight."""
    before = {n: p.full_tensor().detach().clone() for n, p in trainer.policy.named_parameters()}
    rows = [trainer.pack(group) for group in groups]
    reference = [trainer.reference_logprobs(row) for row in rows]
    metrics = trainer.update_on(list(map(trainer.micro_batch, groups, rows, reference)), 0)
    after = {n: p.full_tensor() for n, p in trainer.policy.named_parameters()}
    return metrics, {name: before[name] - after[name] for name in before}


def plain_logprobs(model, prompt: list[int], completion: list[int]) -> torch.Tensor:
    """One unpadded row, full logits, log_softmax."""
    ids = torch.tensor([prompt + completion])
    logits = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1] / TEMPERATURE
    return logits.log_softmax(-1).gather(-1, torch.tensor(completion)[:, None])[:, 0]


def expected_gradient(seed: int, groups: list[Group]) -> tuple[float, dict[str, torch.Tensor]]:
    """−(1/N) ΣΣ [A · r − β · k3], on policy, written out token by token, every token counted."""
    policy, reference = tiny_model("llama", seed), tiny_model("llama", seed + 1)
    total, count = torch.zeros(()), 0
    for group in groups:
        for completion in group.completions:
            logp = plain_logprobs(policy, group.prompt.token_ids, completion.token_ids)
            with torch.no_grad():
                ref = plain_logprobs(reference, group.prompt.token_ids, completion.token_ids)
            for new, fixed in zip(logp, ref, strict=True):
                ratio = (new - new.detach()).exp()
                d = fixed - new
                total = total - completion.advantage * ratio + KL_COEF * (d.exp() - d - 1)
                count += 1
    loss = total / count
    loss.backward()
    return loss.item(), {name: p.grad for name, p in policy.named_parameters()}


def test_the_update_is_the_gradient_of_the_whole_batch(ranks: Ranks) -> None:
    """Packed, split into micro-batches, chunked, sharded: the same as plain loops over rows."""
    seed, groups = fresh_seed(), some_groups()
    metrics, moved = run_update(make_trainer(ranks, seed), groups)
    loss, gradient = expected_gradient(seed, groups)
    assert metrics["loss"] == pytest.approx(loss, rel=1e-5)
    norm = torch.stack([g.norm() for g in gradient.values()]).norm()
    assert metrics["gradient_norm"] == pytest.approx(norm.item(), rel=1e-4)
    for name, expected in gradient.items():
        assert (moved[name] - expected).norm() < 1e-4 * norm, name


def test_a_good_completion_becomes_likelier(ranks: Ranks) -> None:
    """A small step along the update makes a completion with a positive advantage likelier."""
    seed, groups = fresh_seed(), some_groups()[:1]
    trainer = make_trainer(ranks, seed, max_gradient_norm=1e-3)
    trainer.reference = None
    trainer.config.grpo.kl_coef = 0.0
    only_good = Group(groups[0].prompt, groups[0].completions[:1])
    prompt, best = only_good.prompt.token_ids, only_good.completions[0].token_ids
    before = plain_logprobs(tiny_model("llama", seed), prompt, best)
    run_update(trainer, [only_good])
    copy = plain_copy(trainer.policy)
    after = plain_logprobs(copy, prompt, best)
    assert after.sum() > before.sum()


def test_the_gradient_is_scaled_down_to_the_largest_norm(ranks: Ranks) -> None:
    groups = some_groups()
    metrics, moved = run_update(make_trainer(ranks, 5, max_gradient_norm=0.01), groups)
    assert metrics["gradient_norm"] > 0.02
    norm = torch.stack([m.norm() for m in moved.values()]).norm()
    assert norm.item() == pytest.approx(0.01, rel=1e-2)


def test_the_learning_rate_by_hand() -> None:
    """Ten steps, the first two of them warm-up: ½, 1, then down towards 0, never at 0."""
    config = TrainConfig(warmup_fraction=0.2, learning_rate_decay="linear")
    factors = [learning_rate_factor(config, step, 10) for step in range(10)]
    assert factors == pytest.approx([0.5, 1, 1, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8])
    config.learning_rate_decay = "cosine"
    assert learning_rate_factor(config, 6, 10) == pytest.approx(0.5)
    config.learning_rate_decay = "constant"
    assert learning_rate_factor(config, 9, 10) == 1.0
    config.warmup_fraction = 0.0
    assert learning_rate_factor(config, 0, 10) == 1.0

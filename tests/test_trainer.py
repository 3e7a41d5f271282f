"""The trainer's update against an independent computation, and its schedule by hand."""

import math
import random
from collections.abc import Iterator

import pytest
import torch

from grpo.batches import Sample
from grpo.config import Config, GRPOConfig, RolloutConfig, TrainConfig
from grpo.optimizer import learning_rate_factor
from grpo.packing import plan_rows
from grpo.parallel import Ranks, pick_device, share_out, start_ranks
from grpo.rollout import Completion, Group, Prompt
from grpo.sharding import frozen_copy, plain_copy, shard
from grpo.trainer import Trainer, over_updates
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
        reference=frozen_copy(shard(tiny_model("llama", seed + 1), ranks, torch.float32)),
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


def samples_of(groups: list[Group]) -> list[list[Sample]]:
    return [[Sample(group.prompt.token_ids, c) for c in group.completions] for group in groups]


def run_update(trainer: Trainer, groups: list[Group]) -> tuple[dict, dict[str, torch.Tensor]]:
    """The metrics and what the update took off every weight."""
    before = {n: p.full_tensor().detach().clone() for n, p in trainer.policy.named_parameters()}
    samples = samples_of(groups)
    trainer.remember_reference(samples)
    metrics = trainer.update_on(trainer.minibatch(samples), 0)
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


@pytest.mark.parametrize("tokens_per_row", [1, 11, 1000])
def test_the_arrangement_in_rows_does_not_matter(ranks: Ranks, tokens_per_row: int) -> None:
    """Groups together in one row, one completion a row with its prompt repeated, or in between."""
    seed, groups = fresh_seed(), some_groups()
    trainer = make_trainer(ranks, seed)
    trainer.config.train.tokens_per_row = tokens_per_row
    rows = len(trainer.minibatch(samples_of(groups)).micro_batches)
    assert rows == {1: 6, 11: 3, 1000: 1}[tokens_per_row]
    metrics, moved = run_update(trainer, groups)
    loss, gradient = expected_gradient(seed, groups)
    assert metrics["loss"] == pytest.approx(loss, rel=1e-5)
    norm = torch.stack([g.norm() for g in gradient.values()]).norm()
    for name, expected in gradient.items():
        assert (moved[name] - expected).norm() < 1e-4 * norm, name


def test_without_kl_what_cannot_contribute_is_not_run(ranks: Ranks) -> None:
    """A completion of advantage 0 is in the denominator all the same; means are of what was run."""
    seed, groups = fresh_seed(), some_groups()
    results = []
    for leave_out in (True, False):
        trainer = make_trainer(ranks, seed)
        trainer.reference, trainer.config.grpo.kl_coef = None, 0.0
        minibatch = trainer.minibatch(samples_of(groups))
        assert sum(len(b.samples) for b in minibatch.micro_batches) == 5
        if not leave_out:
            minibatch.micro_batches = trainer.pack(samples_of(groups))
        assert (minibatch.tokens, minibatch.sequences) == (4 + 2 + 4 + 6 + 2 + 1, 6)
        before = plain_copy(trainer.policy).state_dict()["lm_head.weight"].clone()
        metrics = trainer.update_on(minibatch, 0)
        moved = before - plain_copy(trainer.policy).state_dict()["lm_head.weight"]
        results.append((metrics, moved))
    (without, moved), (with_all, moved_by_all) = results
    assert without["loss"] == pytest.approx(with_all["loss"], rel=1e-6)
    assert without["ratio_mean"] == pytest.approx(1) == with_all["ratio_mean"]
    torch.testing.assert_close(moved, moved_by_all, rtol=0, atol=1e-6 * float(moved.norm()))


def test_two_updates_on_one_rollout(ranks: Ranks) -> None:
    """The second minibatch's old log-probs are those before the first update: its ratio is not 1.

    Written out: one SGD step on group 0, then one on group 1 with the ratio to the policy at first.
    """
    seed, groups = fresh_seed(), some_groups()
    trainer = make_trainer(ranks, seed)
    trainer.config.grpo.updates_per_rollout = 2
    trainer.reference, trainer.config.grpo.kl_coef = None, 0.0
    rate = 0.05
    trainer.optimizer = torch.optim.SGD(trainer.policy.parameters(), lr=rate)
    trainer.config.train.learning_rate = rate
    trainer.config.train.learning_rate_decay = "constant"
    trainer.minibatches = list(map(trainer.minibatch, trainer.share(groups)))
    metrics = trainer.update(0)

    policy, start = tiny_model("llama", seed), tiny_model("llama", seed)
    ratios = []
    for group in groups:
        policy.zero_grad()
        total, count = torch.zeros(()), 0
        for completion in group.completions:
            prompt, tokens = group.prompt.token_ids, completion.token_ids
            with torch.no_grad():
                old = plain_logprobs(start, prompt, tokens)
            ratio = (plain_logprobs(policy, prompt, tokens) - old).exp()
            a = completion.advantage
            total = total - torch.minimum(ratio * a, ratio.clamp(0.8, 1.2) * a).sum()
            if a != 0:  # else it is not run
                ratios.append(ratio.detach())
            count += len(tokens)
        (total / count).backward()
        with torch.no_grad():
            for parameter in policy.parameters():
                parameter -= rate * parameter.grad
    second = torch.cat(ratios[3:])
    assert (second - 1).abs().max() > 1e-3
    assert metrics["ratio_mean"] == pytest.approx((1 + second.mean().item()) / 2, rel=1e-4)
    for name, parameter in trainer.policy.named_parameters():
        expected = policy.get_parameter(name)
        torch.testing.assert_close(parameter.full_tensor(), expected, rtol=0, atol=2e-6)


def moved_by(trainer: Trainer, groups: list[Group]) -> tuple[dict, dict[str, torch.Tensor]]:
    trainer.reference, trainer.config.grpo.kl_coef = None, 0.0
    return run_update(trainer, groups)


def recorded_elsewhere(groups: list[Group], seed: int) -> list[Group]:
    """The groups as another policy would have recorded them: each token likelier or less likely."""
    policy = tiny_model("llama", seed)
    with torch.no_grad():
        for group in groups:
            for completion in group.completions:
                logp = plain_logprobs(policy, group.prompt.token_ids, completion.token_ids)
                away = [(-1) ** t * (0.3 + t / 100) for t in range(len(logp))]
                completion.logprobs = (logp + torch.tensor(away)).tolist()
    return groups


@pytest.mark.parametrize("cap", [None, 1.1])
def test_a_step_ahead_the_ratio_is_to_the_policy_that_sampled(
    ranks: Ranks, cap: float | None
) -> None:
    """Without a cap PPO's clip sees how far the policy has moved since. With one, the clip starts
    at 1, and the gradient is weighed by how much likelier the token has become, up to the cap."""
    seed = fresh_seed()
    groups = recorded_elsewhere(some_groups(), seed)
    trainer = make_trainer(ranks, seed)
    trainer.config.rollout.ahead, trainer.config.grpo.importance_cap = 1, cap
    metrics, moved = moved_by(trainer, groups)

    policy = tiny_model("llama", seed)
    total, count, weights = torch.zeros(()), 0, []
    for group in groups:
        for completion in group.completions:
            new = plain_logprobs(policy, group.prompt.token_ids, completion.token_ids)
            weight = (new.detach() - torch.tensor(completion.logprobs)).exp()
            ratio, a = (new - new.detach()).exp(), completion.advantage
            if cap is None:
                ratio = ratio * weight
                gain = torch.minimum(ratio * a, ratio.clamp(0.8, 1.2) * a)
            else:
                gain = ratio * a * weight.clamp(max=cap)
            total, count = total - gain.sum(), count + len(new)
            weights.append(weight)
    (total / count).backward()
    weights = torch.cat(weights)
    assert weights.max() > 1.2 and weights.min() < 0.8  # so that both bounds act
    assert metrics["loss"] == pytest.approx((total / count).item(), rel=1e-4)
    norm = torch.stack([p.grad.norm() for p in policy.parameters()]).norm()
    for name, parameter in policy.named_parameters():
        assert (moved[name] - parameter.grad).norm() < 1e-4 * norm, name


@pytest.mark.parametrize("rubbish", [math.nan, math.inf])
def test_an_update_that_is_not_finite_is_not_made(ranks: Ranks, rubbish: float) -> None:
    seed, groups = fresh_seed(), some_groups()
    trainer = make_trainer(ranks, seed)
    groups[0].completions[0].advantage = rubbish
    for skipped in (1, 2):
        metrics, moved = moved_by(trainer, groups)
        assert metrics["skipped"] == 1 and trainer.skipped == skipped
        assert not any(change.any() for change in moved.values())
    metrics, moved = moved_by(trainer, some_groups())  # nothing is left of them
    assert metrics["skipped"] == 0 and trainer.skipped == 0
    _, expected = moved_by(make_trainer(ranks, seed), some_groups())
    assert all(torch.equal(moved[name], change) for name, change in expected.items())


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
def test_work_is_shared_out_evenly(ranks: int) -> None:
    """Every piece once; nobody has more than the others but for one piece."""
    generator = random.Random(fresh_seed())
    for count in (0, 1, 5, 64):
        work = [generator.randint(1, 1000) for _ in range(count)]
        shares = share_out(work, ranks)
        assert sorted(i for share in shares for i in share) == list(range(count))
        assert all(share == sorted(share) for share in shares)
        loads = [sum(work[i] for i in share) for share in shares]
        assert max(loads) - min(loads) <= max(work, default=0)


def test_ranks_with_short_work_take_more() -> None:
    assert share_out([9, 1, 1, 1, 1, 1, 4], 2) == [[0], [1, 2, 3, 4, 5, 6]]
    assert share_out([5, 5, 5, 5], 2) == [[0, 2], [1, 3]]


def test_rows_by_hand() -> None:
    """Prompts of 10, completions as given (their last token is not in the row), rows of 30."""
    groups = [[10, 6, 6], [10, 21, 21, 3], [10, 1, 1, 1], [10, 99]]
    assert plan_rows(groups, 30) == [
        [(0, [0, 1]), (2, [0, 1, 2])],  # 10 + 5 + 5, and 10
        [(1, [0])],  # 10 + 20
        [(1, [1])],
        [(1, [2])],  # 10 + 2: with the one before it would be 32
        [(3, [0])],  # too long for a row, so alone in its own
    ]


def test_metrics_of_several_updates() -> None:
    """Means over the updates that have the number; the largest of maxima."""
    first = {"entropy": 2.0, "difference_max": 0.1}
    second = {"entropy": float("nan"), "difference_max": 0.3}
    assert over_updates([first, second]) == {"entropy": 2.0, "difference_max": 0.3}

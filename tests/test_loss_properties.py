"""What holds for any input of policy_loss and group_advantages, not only for the worked example.

The reference here is plain loops over Python floats, written from the formulas of the papers, value
and derivative, without tensors, masks or automatic differentiation. Inputs are random anew in each
run; to repeat one, set TEST_SEED to the seed that a failing test prints.
"""

import os
import random
from itertools import product
from math import exp
from statistics import mean, stdev

import pytest
import torch

from grpo.advantages import group_advantages
from grpo.loss import OBJECTIVES, batch_counts, kl_estimate, policy_loss

NAN = float("nan")
LIMIT = 9  # max_completion_tokens


@pytest.fixture
def generator():
    seed = int(os.environ.get("TEST_SEED", random.SystemRandom().randrange(2**32)))
    print(f"TEST_SEED={seed}")
    return torch.Generator().manual_seed(seed)


def random_batch(generator, sequences=6, length=5):
    """Log-probs with ratios on both sides of every bound; sequences of unequal length, with holes.

    Masked positions are NaN and inf. One sequence has no token, one has advantage 0.
    """

    def normal(scale):
        return scale * torch.randn(sequences, length, generator=generator, dtype=torch.float64)

    logp = -normal(1.0).abs() - 0.1
    batch = {"logp": logp, "old_logp": logp + normal(0.7), "ref_logp": logp + normal(0.5)}
    batch["importance_weight"] = normal(0.4).exp().clamp(max=2)
    mask = torch.rand(sequences, length, generator=generator) < 0.7
    mask[0] = True
    mask[-1] = False
    for i, tensor in enumerate(batch.values()):
        tensor[~mask] = (NAN, float("inf"), -float("inf"), NAN)[i]
    batch["advantages"] = torch.randn(sequences, generator=generator, dtype=torch.float64)
    batch["advantages"][1] = 0
    return batch | {"mask": mask}


def run(batch, **settings):
    """(loss, gradient of logp, statistics) of policy_loss."""
    logp = batch["logp"].clone().requires_grad_()
    loss, stats = policy_loss(
        logp,
        batch["old_logp"],
        batch["ref_logp"],
        batch["advantages"],
        batch["mask"],
        max_completion_tokens=LIMIT,
        **settings,
    )
    (gradient,) = torch.autograd.grad(loss, logp)
    return loss.detach(), gradient, stats


# --- against plain loops -------------------------------------------------------------------------


def clipped(ratio, advantage, low, high, dual):
    """(gain, d gain / d log ratio, the bound that cut it)"""
    if ratio < 1 - low and (1 - low) * advantage < ratio * advantage:
        return (1 - low) * advantage, 0.0, "clip_low_fraction"
    if ratio > 1 + high and (1 + high) * advantage < ratio * advantage:
        return (1 + high) * advantage, 0.0, "clip_high_fraction"
    if dual is not None and advantage < 0 and dual * advantage > ratio * advantage:
        return dual * advantage, 0.0, "dual_clip_fraction"
    return ratio * advantage, ratio * advantage, None


def kl_and_slope(logp, old, ref, estimator):
    """(KL, d KL / d logp)"""
    d = ref - logp
    k3 = exp(d) - d - 1
    if estimator == "k2":
        return d * d / 2, -d
    if estimator == "k3":
        return k3, 1 - exp(d)
    ratio = exp(logp - old)
    return k3 * ratio, (1 - exp(d)) * ratio + k3 * ratio


def loops(batch, objective, low, high, dual, kl_coef, estimator, weighted):
    """Loss, gradient and statistics by the formulas, one token at a time."""
    logp, old, ref, weight = (
        batch[name].tolist() for name in ("logp", "old_logp", "ref_logp", "importance_weight")
    )
    advantages, mask = batch["advantages"].tolist(), batch["mask"].tolist()
    tokens = [[t for t, counts in enumerate(row) if counts] for row in mask]
    sequences = [i for i, row in enumerate(tokens) if row]
    token_count = sum(len(row) for row in tokens)

    names = ["loss", "policy_loss", "kl_loss", "kl", "kl_k1", "ratio_mean"]
    names += ["clip_low_fraction", "clip_high_fraction"] + ["dual_clip_fraction"] * bool(dual)
    stats = dict.fromkeys(names, 0.0)
    gradient = [[0.0] * len(row) for row in mask]
    for i in sequences:
        share = {
            "grpo": 1 / (len(sequences) * len(tokens[i])),
            "gspo": 1 / (len(sequences) * len(tokens[i])),
            "dapo": 1 / token_count,
            "cispo": 1 / token_count,
            "dr_grpo": 1 / (len(sequences) * LIMIT),
        }[objective]
        sequence_ratio = exp(mean(logp[i][t] - old[i][t] for t in tokens[i]))
        stats_share = share if objective == "gspo" else 1 / token_count
        for t in tokens[i]:
            importance = weight[i][t] if weighted else 1.0
            ratio = exp(logp[i][t] - old[i][t])
            if objective == "cispo":
                slope = min(ratio, high) * advantages[i]
                gain = slope * logp[i][t]
                bound = "clip_high_fraction" if ratio > high and advantages[i] else None
                gradient[i][t] -= share * importance * slope
            elif objective == "gspo":
                ratio = sequence_ratio
                gain, slope, bound = clipped(ratio, advantages[i], low, high, dual)
                for other in tokens[i]:  # each token's log-prob is 1 / |o_i| of the log of s_i
                    gradient[i][other] -= share * importance * slope / len(tokens[i])
            else:
                gain, slope, bound = clipped(ratio, advantages[i], low, high, dual)
                gradient[i][t] -= share * importance * slope
            kl, slope = kl_and_slope(logp[i][t], old[i][t], ref[i][t], estimator)
            gradient[i][t] += share * kl_coef * slope

            stats["policy_loss"] -= share * importance * gain
            stats["kl_loss"] += share * kl_coef * kl
            stats["kl"] += kl_and_slope(logp[i][t], old[i][t], ref[i][t], "k3")[0] / token_count
            stats["kl_k1"] += (logp[i][t] - ref[i][t]) / token_count
            stats["ratio_mean"] += stats_share * ratio
            if bound:
                stats[bound] += stats_share
    stats["loss"] = stats["policy_loss"] + stats["kl_loss"]
    return stats["loss"], torch.tensor(gradient, dtype=torch.float64), stats


CASES = [
    (objective, estimator, dual, weighted)
    for objective, estimator, dual, weighted in product(
        OBJECTIVES, ("k2", "k3", "k3_is"), (None, 1.5), (False, True)
    )
    if not (objective == "cispo" and dual)
]


@pytest.mark.parametrize(("objective", "estimator", "dual", "weighted"), CASES)
def test_equals_plain_loops(generator, objective, estimator, dual, weighted):
    low, high = {"cispo": (None, 1.3), "gspo": (0.1, 0.15)}.get(objective, (0.2, 0.28))
    for _ in range(5):
        batch = random_batch(generator)
        loss, gradient, stats = run(
            batch,
            objective=objective,
            clip_low=low,
            clip_high=high,
            dual_clip=dual,
            kl_coef=0.3,
            kl_estimator=estimator,
            importance_weight=batch["importance_weight"] if weighted else None,
        )
        expected = loops(batch, objective, low, high, dual, 0.3, estimator, weighted)
        got = loss.item(), gradient, {name: value.item() for name, value in stats.items()}
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)


def test_advantages_equal_plain_loops(generator):
    """statistics.mean and stdev, over what is scored; also: shifted and scaled rewards."""
    for scale in ("group", "batch", "none"):
        rewards = torch.rand(5, 6, generator=generator, dtype=torch.float64)
        rewards[torch.rand(5, 6, generator=generator) < 0.3] = NAN
        advantages = group_advantages(rewards, scale=scale)
        scored = [[x for x in row if x == x] for row in rewards.tolist()]
        everything = stdev(x for row in scored for x in row) + 1e-4
        for row, known, got in zip(rewards.tolist(), scored, advantages.tolist(), strict=True):
            for reward, advantage in zip(row, got, strict=True):
                expected = 0.0
                if reward == reward and len(known) > 1:
                    divisor = {"batch": everything, "none": 1}.get(scale) or stdev(known) + 1e-4
                    expected = (reward - mean(known)) / divisor
                assert advantage == pytest.approx(expected, rel=1e-10, abs=1e-14)
        doubled = group_advantages(2 * rewards + 3, scale=scale, eps=2e-4)
        factor = 2 if scale == "none" else 1
        torch.testing.assert_close(doubled, factor * advantages, rtol=1e-9, atol=1e-12)


def test_equal_rewards_have_advantage_exactly_zero_in_every_type(generator):
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        for size in range(1, 17):
            one = torch.randn(50, 1, generator=generator, dtype=torch.float64).to(dtype)
            rewards = one.repeat(1, size)
            rewards[torch.rand(50, size, generator=generator) < 0.2] = NAN
            for scale in ("group", "none"):
                assert group_advantages(rewards, scale=scale).count_nonzero() == 0


# --- any split -----------------------------------------------------------------------------------


def random_split(generator, sequences):
    """The sequences, shuffled and cut at random places; some parts may be empty."""
    order = torch.randperm(sequences, generator=generator).tolist()
    cuts = torch.randint(0, sequences + 1, (3,), generator=generator).sort().values.tolist()
    return [order[a:b] for a, b in zip([0, *cuts], [*cuts, sequences], strict=True)]


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_any_split_gives_the_same_loss_gradient_and_statistics(generator, objective):
    settings = {
        "objective": objective,
        "kl_coef": 0.3,
        "kl_estimator": "k3_is",
        "dual_clip": None if objective == "cispo" else 1.5,
    }
    for _ in range(5):
        batch = random_batch(generator)
        whole_loss, whole_gradient, whole_stats = run(
            batch, **settings, importance_weight=batch["importance_weight"]
        )
        token_count, sequence_count = batch_counts(batch["mask"])
        counts = {"token_count": token_count, "sequence_count": int(sequence_count)}
        loss, gradient = 0.0, torch.zeros_like(whole_gradient)
        stats = dict.fromkeys(whole_stats, 0.0)
        for rows in random_split(generator, len(batch["mask"])):
            part = {name: tensor[rows] for name, tensor in batch.items()}
            weight = part["importance_weight"]
            part_loss, gradient[rows], part_stats = run(
                part, **settings, **counts, importance_weight=weight
            )
            loss += part_loss
            stats = {name: value + part_stats[name] for name, value in stats.items()}
        torch.testing.assert_close(loss, whole_loss, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(gradient, whole_gradient, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(stats, whole_stats, rtol=1e-12, atol=1e-14)


# --- KL: gradients in expectation ----------------------------------------------------------------


def expected_gradient(logits, ref_logp, estimator, sampled_by):
    """E[∇ estimate] by going through the whole vocabulary, each token by its probability."""
    logits = logits.clone().requires_grad_()
    logp = logits.log_softmax(dim=0)[None]
    estimates = kl_estimate(logp, ref_logp[None], estimator, sampled_by.log()[None])
    return torch.autograd.grad((sampled_by * estimates).sum(), logits)[0]


def true_gradient(logits, ref_logp, direction):
    logits = logits.clone().requires_grad_()
    logp = logits.log_softmax(dim=0)
    if direction == "reverse":
        divergence = (logp.exp() * (logp - ref_logp)).sum()
    else:
        divergence = (ref_logp.exp() * (ref_logp - logp)).sum()
    return torch.autograd.grad(divergence, logits)[0]


def test_gradients_of_kl_estimators_by_enumeration(generator):
    def categorical():
        return torch.randn(5, generator=generator, dtype=torch.float64)

    for _ in range(10):
        logits, ref_logp = categorical(), categorical().log_softmax(dim=0)
        policy, older = logits.softmax(dim=0), categorical().softmax(dim=0)
        reverse = true_gradient(logits, ref_logp, "reverse")
        forward = true_gradient(logits, ref_logp, "forward")

        def expected(estimator, sampled_by, logits=logits, ref_logp=ref_logp):
            return expected_gradient(logits, ref_logp, estimator, sampled_by)

        torch.testing.assert_close(expected("k2", policy), reverse)
        torch.testing.assert_close(expected("k3_is", policy), reverse)
        torch.testing.assert_close(expected("k3_is", older), reverse)
        torch.testing.assert_close(expected("k3", policy), forward)
        torch.testing.assert_close(expected("k1", policy), torch.zeros_like(logits))
        assert not torch.allclose(forward, reverse, rtol=0.01)
        assert not torch.allclose(expected("k2", older), reverse, rtol=0.01)


# --- masks, types and constants ------------------------------------------------------------------


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.filterwarnings("ignore:Anomaly Detection")
@pytest.mark.parametrize("rubbish", [NAN, float("inf"), -float("inf"), 1e30])
def test_masked_positions_may_hold_anything(generator, objective, rubbish):
    """Not in the loss, nor in the gradient, nor on the way (detect_anomaly looks at each step)."""
    batch = random_batch(generator)
    clean, dirty = dict(batch), dict(batch)
    for name in ("logp", "old_logp", "ref_logp", "importance_weight"):
        clean[name] = batch[name].masked_fill(~batch["mask"], -1.0)
        dirty[name] = batch[name].masked_fill(~batch["mask"], rubbish)
    settings = {"objective": objective, "kl_estimator": "k3_is"}
    expected = run(clean, **settings, importance_weight=clean["importance_weight"])
    with torch.autograd.detect_anomaly():
        got = run(dirty, **settings, importance_weight=dirty["importance_weight"])
    torch.testing.assert_close(got, expected, rtol=0, atol=0)
    assert got[1][~batch["mask"]].count_nonzero() == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_half_precision_is_computed_in_float32(generator, dtype, objective):
    batch = random_batch(generator)
    half = {name: x if name == "mask" else x.to(dtype) for name, x in batch.items()}
    single = {name: x if name == "mask" else x.float() for name, x in half.items()}
    loss, gradient, stats = run(half, objective=objective)
    expected_loss, expected_gradient, expected_stats = run(single, objective=objective)
    assert loss.dtype == torch.float32 and gradient.dtype == dtype
    assert torch.equal(loss, expected_loss)
    assert torch.equal(gradient, expected_gradient.to(dtype))
    torch.testing.assert_close(stats, expected_stats, rtol=0, atol=0)


def test_float64_stays_float64(generator):
    batch = random_batch(generator)
    loss, _, stats = run(batch | {"advantages": batch["advantages"].float()})
    assert loss.dtype == torch.float64
    assert {value.dtype for value in stats.values()} == {torch.float64}


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_only_logp_gets_a_gradient(generator, objective):
    batch = random_batch(generator)
    others = ("old_logp", "ref_logp", "advantages", "importance_weight")
    with_grad = batch | {name: batch[name].clone().requires_grad_() for name in others}
    logp = batch["logp"].clone().requires_grad_()
    loss, stats = policy_loss(
        logp,
        *(with_grad[name] for name in ("old_logp", "ref_logp", "advantages", "mask")),
        objective=objective,
        kl_estimator="k3_is",
        max_completion_tokens=LIMIT,
        importance_weight=with_grad["importance_weight"],
    )
    loss.backward()
    assert logp.grad is not None
    assert all(with_grad[name].grad is None for name in others)
    assert not any(value.requires_grad for value in stats.values())


def test_statistics_can_be_summed_in_place(generator):
    """An in-place all-reduce of one statistic doubled another, and the loss: one tensor for all."""
    loss, _, stats = run(random_batch(generator) | {"ref_logp": None}, kl_coef=0)
    before = {name: value.item() for name, value in stats.items()}
    for value in stats.values():
        value.mul_(2)
    assert {name: value.item() for name, value in stats.items()} == {
        name: 2 * value for name, value in before.items()
    }
    assert loss.item() == before["loss"]


def test_without_a_reference_there_is_no_kl(generator):
    batch = random_batch(generator)
    with_reference = run(batch, kl_coef=0)
    loss, gradient, stats = run(batch | {"ref_logp": None}, kl_coef=0)
    torch.testing.assert_close((loss, gradient), with_reference[:2], rtol=0, atol=0)
    assert with_reference[2].keys() - stats.keys() == {"kl", "kl_k1", "kl_loss"}
    assert stats["loss"] == stats["policy_loss"] == loss


def test_the_loss_is_the_sum_of_its_parts(generator):
    loss, _, stats = run(random_batch(generator), kl_coef=0.3)
    assert stats["loss"] == loss
    torch.testing.assert_close(stats["policy_loss"] + stats["kl_loss"], loss)
    assert stats["kl_loss"].item() == pytest.approx(0.3 * stats["kl"].item())  # dapo: same average

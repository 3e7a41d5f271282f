"""Step 8: gains and KL of all tokens → one number, the loss (grpo/loss.py: policy_loss, average).

The worked example: four completions of 2, 3, 1 and 4 tokens, rewards 1, 0, .5, 0, their advantages
from step 4, their ratios from step 6, their KL from step 7. What is left to decide is who weighs
how much: every token alike, or every completion alike. And what to divide by, when the batch does
not fit into memory at once and comes in pieces, on several ranks.
"""

from math import exp

import pytest
import torch

from grpo.loss import batch_counts, policy_loss

NAN = float("nan")


def padded(*rows):
    """Rows of unequal length → [4, 4], with NaN where there is no token: nothing may read it."""
    return torch.tensor([row + [NAN] * (4 - len(row)) for row in rows], dtype=torch.float64)


LOGP = padded([-0.5, -1.2], [-0.3, -2, -0.7], [-1], [-0.1, -0.4, -1.5, -0.9])
OLD_LOGP = padded([-0.7, -1], [-0.3, -1.6, -1.1], [-1.4], [-0.1, -0.9, -1.5, -0.6])
REF_LOGP = padded([-0.6, -1.1], [-0.5, -1.8, -0.9], [-1.1], [-0.2, -0.5, -1.4, -1.0])
MASK = ~LOGP.isnan()

# log r and d = log π_ref − log π_θ by token:
#     log r    .2 −.2 |   0 −.4  .4 |  .4 |   0  .5   0 −.3
#     d       −.1  .1 | −.2  .2 −.2 | −.1 | −.1 −.1  .1 −.1
A0, A1, A2, A3 = 1.305309749354, -0.783185849612, 0.261061949871, -0.783185849612
ADVANTAGES = torch.tensor([A0, A1, A2, A3], dtype=torch.float64)
DEVIATIONS = torch.tensor([0.625, -0.375, 0.125, -0.375], dtype=torch.float64)


def loss_gradient_stats(rows=(0, 1, 2, 3), advantages=ADVANTAGES, **settings):
    """policy_loss of some of the four completions; the gradient is that of all tokens, [4, 4]."""
    logp = LOGP.clone().requires_grad_()
    rows = list(rows)
    loss, stats = policy_loss(
        logp[rows], OLD_LOGP[rows], REF_LOGP[rows], advantages[rows], MASK[rows], **settings
    )
    (gradient,) = torch.autograd.grad(loss, logp)
    return loss.item(), gradient, stats


# --- the worked example, for every objective -----------------------------------------------------

# The gradient of each token, as one can write it down: −A r / denominator, and 0 where clipped.
GRPO = [
    [0, -A0 * exp(-0.2) / 8],  # G · |o_0| = 4 · 2
    [-A1 / 12, 0, -A1 * exp(0.4) / 12],
    [0],
    [-A3 / 16, -A3 * exp(0.5) / 16, -A3 / 16, 0],
]
DAPO = [  # N = 10 tokens; e^.2 = 1.22 is now within 1.28
    [-A0 * exp(0.2) / 10, -A0 * exp(-0.2) / 10],
    [-A1 / 10, 0, -A1 * exp(0.4) / 10],
    [0],
    [-A3 / 10, -A3 * exp(0.5) / 10, -A3 / 10, 0],
]
DR_GRPO = [  # A = R − mean; G · L_max = 4 · 5
    [0, -0.625 * exp(-0.2) / 20],
    [0.375 / 20, 0, 0.375 * exp(0.4) / 20],
    [0],
    [0.375 / 20, 0.375 * exp(0.5) / 20, 0.375 / 20, 0],
]
GSPO = [  # s = e^0, e^0, e^.4 (clipped) and e^.05 (A < 0, so not clipped)
    [-A0 / 8, -A0 / 8],
    [-A1 / 12, -A1 / 12, -A1 / 12],
    [0],
    [-A3 * exp(0.05) / 16] * 4,
]
CISPO = [  # no ratio reaches 5, and none is silenced
    [-A0 * exp(0.2) / 10, -A0 * exp(-0.2) / 10],
    [-A1 / 10, -A1 * exp(-0.4) / 10, -A1 * exp(0.4) / 10],
    [-A2 * exp(0.4) / 10],
    [-A3 / 10, -A3 * exp(0.5) / 10, -A3 / 10, -A3 * exp(-0.3) / 10],
]

SYMMETRIC = {"clip_low": 0.2, "clip_high": 0.2, "kl_coef": 0}
EXAMPLES = {
    "grpo": (SYMMETRIC | {"objective": "grpo"}, 0.024901313679, GRPO),
    "dapo": (SYMMETRIC | {"objective": "dapo", "clip_high": 0.28}, 0.306512061264, DAPO),
    "dr_grpo": (
        SYMMETRIC | {"objective": "dr_grpo", "max_completion_tokens": 5},
        0.074549900873,
        DR_GRPO,
    ),
    "gspo": (
        {"objective": "gspo", "clip_low": 3e-4, "clip_high": 4e-4, "kl_coef": 0},
        0.010012593099,
        GSPO,
    ),
    "cispo": ({"objective": "cispo", "clip_high": 5, "kl_coef": 0}, -0.192551743019, CISPO),
}
# The same figures as TRL 1.16 computes them, to six digits: rows 0 and 3.
PRINTED = {
    "grpo": ([0, -0.133587], [0.048949, 0.080703, 0.048949, 0]),
    "dapo": ([-0.159431, -0.106870], [0.078319, 0.129126, 0.078319, 0]),
    "dr_grpo": ([0, -0.025585], [0.018750, 0.030914, 0.018750, 0]),
    "gspo": ([-0.163164, -0.163164], [0.051459] * 4),
    "cispo": ([-0.159431, -0.106870], [0.078319, 0.129126, 0.078319, 0.058020]),
}


def advantages_for(objective):
    return DEVIATIONS if objective == "dr_grpo" else ADVANTAGES


@pytest.mark.parametrize("objective", EXAMPLES)
def test_loss_and_gradient_by_hand(objective):
    settings, expected_loss, expected_gradient = EXAMPLES[objective]
    loss, gradient, _ = loss_gradient_stats(advantages=advantages_for(objective), **settings)
    assert loss == pytest.approx(expected_loss, abs=1e-9)
    for row, expected in zip(gradient, expected_gradient, strict=True):
        assert row[: len(expected)].tolist() == pytest.approx(expected, abs=1e-9)
        assert row[len(expected) :].count_nonzero() == 0
    first, last = PRINTED[objective]
    assert gradient[0, :2].tolist() == pytest.approx(first, abs=6e-7)
    assert gradient[3].tolist() == pytest.approx(last, abs=6e-7)


@pytest.mark.parametrize("objective", ["grpo", "gspo", "cispo", "dr_grpo"])
def test_without_clips_given_the_objective_brings_its_own(objective):
    settings, expected_loss, _ = EXAMPLES[objective]
    settings = settings | {"clip_low": None, "clip_high": None}
    loss, _, _ = loss_gradient_stats(advantages=advantages_for(objective), **settings)
    assert loss == pytest.approx(expected_loss, abs=1e-9)


def test_the_default_is_dapo_as_perm_trains():
    """Clip .2 on both sides, β = .01, k3; Clip-Higher (.28) is asked for, not given."""
    settings = {"objective": "dapo", "clip_low": 0.2, "clip_high": 0.2, "kl_coef": 0.01}
    expected, _, _ = loss_gradient_stats(**settings, kl_estimator="k3")
    assert loss_gradient_stats()[0] == expected
    assert loss_gradient_stats(clip_high=0.28)[0] != pytest.approx(expected)


def k3(d):
    return exp(d) - d - 1


@pytest.mark.parametrize(
    ("estimator", "expected_loss", "pull", "first", "last"),
    [
        (
            "k3",
            0.025245151685,
            lambda log_r, d: 1 - exp(d),
            [0.000476, -0.134113],
            [0.049187, 0.080941, 0.048686, 0.000238],
        ),
        (
            "k3_is",
            0.025281509950,
            lambda log_r, d: exp(log_r) * (1 - exp(d) + k3(d)),
            [0.000611, -0.133997],
            [0.049199, 0.081116, 0.048699, 0.000185],
        ),
        (
            "k2",
            # k2 is .005 where d is ±.1 (all of rows 0, 2 and 3), and .02 in row 1, where it is ±.2.
            0.024901313679 + 0.04 * (0.005 + 0.02 + 0.005 + 0.005) / 4,
            lambda log_r, d: -d,
            None,
            None,
        ),
    ],
)
def test_kl_is_averaged_as_the_gain_is(estimator, expected_loss, pull, first, last):
    """grpo with β = .04: each token gets β · dKL / dlogp, over the same 4 · |o_i|.

    Clipped tokens have no gain to follow any more. They still feel the KL.
    """
    settings = SYMMETRIC | {"objective": "grpo", "kl_coef": 0.04, "kl_estimator": estimator}
    loss, gradient, stats = loss_gradient_stats(**settings)
    assert loss == pytest.approx(expected_loss, abs=1e-9)
    log_r = [[0.2, -0.2], [0, -0.4, 0.4], [0.4], [0, 0.5, 0, -0.3]]
    d = [[-0.1, 0.1], [-0.2, 0.2, -0.2], [-0.1], [-0.1, -0.1, 0.1, -0.1]]
    for i, gains in enumerate(GRPO):
        expected = [
            gain + 0.04 * pull(log_r[i][t], d[i][t]) / (4 * len(gains))
            for t, gain in enumerate(gains)
        ]
        assert gradient[i, : len(gains)].tolist() == pytest.approx(expected, abs=1e-9)
    if first:
        assert gradient[0, :2].tolist() == pytest.approx(first, abs=6e-7)
        assert gradient[3].tolist() == pytest.approx(last, abs=6e-7)
    # The metric is the mean of k3 over the ten tokens, whatever estimator the loss uses.
    assert stats["kl"].item() == pytest.approx(0.009339319065, abs=1e-9)
    # And k1 = −d: (.1 − .1 + .2 − .2 + .2 + .1 + .1 + .1 − .1 + .1) / 10.
    assert stats["kl_k1"].item() == pytest.approx(0.05)


def test_the_statistics_of_the_worked_example():
    _, _, stats = loss_gradient_stats(**SYMMETRIC, objective="grpo")
    assert stats["clip_low_fraction"].item() == pytest.approx(2 / 10)
    assert stats["clip_high_fraction"].item() == pytest.approx(2 / 10)
    ratios = [exp(x) for x in (0.2, -0.2, 0, -0.4, 0.4, 0.4, 0, 0.5, 0, -0.3)]
    assert stats["ratio_mean"].item() == pytest.approx(sum(ratios) / 10)
    # gspo counts sequences: s = 1, 1, e^.4, e^.05; one is above with A > 0, none below with A < 0.
    _, _, stats = loss_gradient_stats(objective="gspo")
    assert stats["clip_low_fraction"].item() == 0
    assert stats["clip_high_fraction"].item() == pytest.approx(1 / 4)
    assert stats["ratio_mean"].item() == pytest.approx((2 + exp(0.4) + exp(0.05)) / 4)


# --- who weighs how much -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("objective", "short", "long"),
    [
        ("grpo", 1 / 2, 1 / 6),
        ("gspo", 1 / 2, 1 / 6),
        ("dapo", 1 / 4, 1 / 4),
        ("cispo", 1 / 4, 1 / 4),
        ("dr_grpo", 1 / 8, 1 / 8),
    ],
)
def test_the_weight_of_a_token(objective, short, long):
    """A completion of one token and one of three, both with A = 1, on policy.

    grpo gives each completion 1/2: a token of the long one counts a third of the short one's. So
    among bad completions (A < 0) the long ones are punished least for each word, and answers grow.
    dapo gives each token of the batch 1/4. dr_grpo divides by a constant, here 2 · 4.
    """
    logp = torch.full((2, 3), -1.0, dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([[True, False, False], [True, True, True]])
    loss, _ = policy_loss(
        logp,
        logp,
        None,
        torch.ones(2),
        mask,
        objective=objective,
        kl_coef=0,
        max_completion_tokens=4,
    )
    loss.backward()
    expected = [-short, 0, 0] + [-long] * 3
    assert logp.grad.flatten().tolist() == pytest.approx(expected)


def test_my_loss_is_zero():
    """The most-asked question of every GRPO project, and nothing is wrong.

    On the first update of a rollout r = 1, nothing is clipped, and grpo's loss is −mean(A) = 0,
    since advantages are deviations from a mean. The gradient is −A / (G |o_i|) and far from 0. The
    loss is not what is being learned; look at the reward. (dapo's loss on policy is −Σ A |o| / N:
    not 0, of either sign, and as meaningless.)
    """
    logp = LOGP.clone().requires_grad_()
    on_policy = (logp, LOGP, None, ADVANTAGES, MASK)
    loss, stats = policy_loss(*on_policy, objective="grpo", kl_coef=0)
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-12)
    assert stats["ratio_mean"].item() == pytest.approx(1)
    assert logp.grad[0, :2].tolist() == pytest.approx([-A0 / 8, -A0 / 8])

    loss, _ = policy_loss(*on_policy, objective="dapo", kl_coef=0)
    assert loss.item() == pytest.approx(-(2 * A0 + 3 * A1 + 1 * A2 + 4 * A3) / 10)


def test_a_group_without_spread_still_feels_the_kl():
    """Seen elsewhere: advantage 0 says "nothing to learn from the reward", not "skip me".

    Left out, such groups would drift away from the reference freely, and the batch's token count
    would change with the number of groups that agree. d = −.2, β = .1, two sequences of one token:
    .1 · (1 − e^−.2) / 2.
    """
    logp = torch.tensor([[-1.0], [-1.0]], dtype=torch.float64, requires_grad=True)
    mask = torch.ones(2, 1, dtype=torch.bool)
    loss, _ = policy_loss(logp, logp, logp - 0.2, torch.zeros(2), mask, kl_coef=0.1)
    loss.backward()
    pull = 0.1 * (1 - exp(-0.2)) / 2
    assert logp.grad.flatten().tolist() == pytest.approx([pull, pull])


# --- a batch in pieces ---------------------------------------------------------------------------

HALVES = [(0, 2), (1, 3)]  # 2 + 1 and 3 + 4 tokens


@pytest.mark.parametrize("objective", EXAMPLES)
def test_micro_batches_add_up_to_the_batch(objective):
    """Seen elsewhere: a denominator of the micro-batch's own in place of the whole batch's.

    Given the global counts, ten tokens and four sequences, the halves' losses and gradients sum to
    the batch's. So the memory of the machine does not decide what is learned.
    """
    settings, expected_loss, _ = EXAMPLES[objective]
    settings = settings | {"advantages": advantages_for(objective)}
    _, whole_gradient, _ = loss_gradient_stats(**settings)
    counts = {"token_count": 10, "sequence_count": 4}
    halves = [loss_gradient_stats(rows, **settings, **counts) for rows in HALVES]
    assert sum(loss for loss, _, _ in halves) == pytest.approx(expected_loss, abs=1e-9)
    assert torch.allclose(sum(gradient for _, gradient, _ in halves), whole_gradient, atol=1e-12)


def test_a_local_token_mean_gives_another_loss():
    """The same halves, each divided by its own tokens (3 and 7), then averaged: −.066507.

    Even the sign is wrong. The single token of completion 2 now weighs 1/6, each token of
    completion 3 weighs 1/14, where each should weigh 1/10.
    """
    settings, _, _ = EXAMPLES["dapo"]
    local = [loss_gradient_stats(rows, **settings)[0] for rows in HALVES]
    assert sum(local) / 2 == pytest.approx(-0.066507, abs=1e-6)


def test_the_logged_numbers_are_those_of_the_whole_batch():
    """Seen elsewhere: the loss in the log was the last micro-batch's, the others' were overwritten.

    Each statistic is divided by the global counts like the loss, so whoever logs adds them up, over
    micro-batches and ranks. Clipped low of 10 tokens: 0 in the first half, 2 in the second.
    """
    settings, expected_loss, _ = EXAMPLES["grpo"]
    _, _, whole = loss_gradient_stats(**settings)
    counts = {"token_count": 10, "sequence_count": 4}
    first, last = (loss_gradient_stats(rows, **settings, **counts)[2] for rows in HALVES)
    assert first.keys() == last.keys() == whole.keys()
    for name in whole:
        assert (first[name] + last[name]).item() == pytest.approx(whole[name].item(), abs=1e-12)
    assert last["loss"].item() != pytest.approx(expected_loss, abs=0.01)
    assert (first["clip_low_fraction"].item(), last["clip_low_fraction"].item()) == (0, 0.2)


def test_counts_to_be_summed_over_micro_batches_and_ranks():
    assert [int(count) for count in batch_counts(MASK)] == [10, 4]
    assert [int(count) for count in batch_counts(MASK[[0, 2]])] == [3, 2]
    # A sequence without a token is none: padding a micro-batch with rows changes nothing.
    assert [int(count) for count in batch_counts(torch.tensor([[True, False], [False] * 2]))] == [
        1,
        1,
    ]


def test_a_sequence_without_tokens_is_not_there():
    """Its mean over zero tokens is 0 / 0. Adding it must change neither a sum nor a denominator."""
    with_empty = [
        torch.cat([x, torch.full((1, 4), NAN).double()]) for x in (LOGP, OLD_LOGP, REF_LOGP)
    ]
    mask = torch.cat([MASK, torch.zeros(1, 4, dtype=torch.bool)])
    advantages = torch.cat([ADVANTAGES, torch.tensor([5.0])])
    for objective in EXAMPLES:
        settings = {"objective": objective, "max_completion_tokens": 5, "kl_coef": 0.04}
        expected, _, _ = loss_gradient_stats(**settings)
        loss, _ = policy_loss(*with_empty, advantages, mask, **settings)
        assert loss.item() == pytest.approx(expected, abs=1e-12), objective


@pytest.mark.parametrize("objective", EXAMPLES)
@pytest.mark.parametrize("kl_coef", [0, 0.1])
@pytest.mark.parametrize("shape", [(3, 4), (0, 4), (3, 0)])
def test_a_micro_batch_without_tokens_still_has_a_gradient(objective, kl_coef, shape):
    """Seen elsewhere: nothing counts in this rank's micro-batch, so the loss was a plain 0.

    Plain 0 has no graph: backward fails here, or is skipped, while the other ranks wait for this
    one in the all-reduce of their gradients, until the time limit. The loss must be a 0 that hangs
    on the log-probs, and its gradients 0, not NaN.
    """
    logp = torch.full(shape, NAN, requires_grad=True)
    nothing = torch.full(shape, NAN)
    loss, stats = policy_loss(
        logp,
        nothing,
        nothing if kl_coef else None,
        torch.ones(shape[0]),
        torch.zeros(shape, dtype=torch.bool),
        objective=objective,
        max_completion_tokens=5,
        kl_coef=kl_coef,
    )
    assert loss.item() == 0
    loss.backward()
    assert logp.grad.shape == shape and logp.grad.count_nonzero() == 0
    assert all(value == 0 for value in stats.values())


# --- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"objective": "ppo"},
            "objective = 'ppo': must be one of grpo, dapo, dr_grpo, gspo, cispo",
        ),
        ({"objective": "dr_grpo"}, "max_completion_tokens = None: dr_grpo divides by"),
        ({"kl_estimator": "k1"}, "kl_estimator = 'k1': .*; the gradient of k1 is 0 on average"),
        ({"kl_estimator": "k4"}, "kl_estimator = 'k4': must be one of k2, k3, k3_is"),
        ({"kl_coef": -0.1}, "kl_coef = -0.1: must be 0 or more"),
        ({"kl_coef": NAN}, "kl_coef = nan: must be 0 or more"),
        ({"clip_low": 1.5}, "clip_low = 1.5: must be 0 to 1"),
        ({"clip_high": -1}, "clip_high = -1: must be 0 or more"),
        ({"dual_clip": 1}, "dual_clip = 1: must be above 1"),
        ({"objective": "cispo", "clip_low": 0.2}, "'cispo' has one bound, clip_high"),
        ({"objective": "cispo", "dual_clip": 3.0}, "'cispo' has one bound, clip_high"),
        ({"importance_weight": torch.ones(4)}, r"importance_weight \[4\]: must be \[4, 4\]"),
    ],
)
def test_settings_without_meaning_are_refused_in_one_line(settings, message):
    with pytest.raises(ValueError, match=message) as error:
        loss_gradient_stats(**settings)
    assert "\n" not in str(error.value)


def test_shapes_that_would_broadcast_are_refused():
    """One row of π_old beside four of π_θ broadcasts: no error, and another training."""
    with pytest.raises(ValueError, match=r"advantages \[4, 1\]: must be \[4\]"):
        policy_loss(LOGP, OLD_LOGP, REF_LOGP, ADVANTAGES[:, None], MASK)
    with pytest.raises(ValueError, match=r"old_logp \[1, 4\]: must be \[4, 4\]"):
        policy_loss(LOGP, OLD_LOGP[:1], REF_LOGP, ADVANTAGES, MASK)
    with pytest.raises(ValueError, match=r"logp is torch.float64 \[4\]"):
        policy_loss(LOGP[0], OLD_LOGP[0], REF_LOGP[0], ADVANTAGES, MASK[0])
    with pytest.raises(ValueError, match="kl_coef = 0.01 needs ref_logp"):
        policy_loss(LOGP, OLD_LOGP, None, ADVANTAGES, MASK)

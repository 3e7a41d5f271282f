"""Step 6: log-probs → ratio → clip (grpo/loss.py: log_ratio, clipped_gain, cispo_gain).

The completions were sampled by the policy as it was (π_old); since then it may have been updated
(π_θ). The ratio r = π_θ / π_old says how much likelier a token has become, and the gain r · A grows
with it, until the clip says: far enough, for these samples.

Log-probs here are logarithms of round numbers, so that a token that went from .4 to .5 has the
ratio 1.25, by hand.
"""

from math import exp, log

import pytest
import torch

from grpo.loss import (
    MAX_LOG_RATIO,
    cispo_gain,
    clip_indicators,
    clipped_gain,
    log_ratio,
    policy_loss,
    sequence_ratio,
)


def tensor(*rows):
    return torch.tensor(rows, dtype=torch.float64)


def gain_and_slope(ratio, advantage, clip_low=0.2, clip_high=0.2, dual_clip=None):
    """Gain of one token, and its derivative with respect to the ratio."""
    ratio = tensor([ratio]).requires_grad_()
    gain = clipped_gain(ratio, tensor([advantage]), clip_low, clip_high, dual_clip)
    gain.sum().backward()
    return gain.item(), ratio.grad.item()


# --- ratio ---------------------------------------------------------------------------------------


def test_ratio_is_new_over_old_probability():
    new, old = tensor([0.5, 0.2, 0.9]).log(), tensor([0.4, 0.4, 0.9]).log()
    assert log_ratio(new, old).exp()[0].tolist() == pytest.approx([1.25, 0.5, 1.0])


def test_on_policy_the_ratio_is_one_but_its_gradient_is_not_zero():
    """Someone passes logp itself as old_logp: r is logp − logp, and the gradient cancels to 0.

    Training then runs, logs a plausible loss, and learns nothing. π_old is a constant, so it is
    detached here, whatever the caller did: r = 1, and dr / d logp = r = 1.
    """
    logp = tensor([0.5, 0.2]).log().requires_grad_()
    ratio = log_ratio(logp, logp).exp()
    ratio.sum().backward()
    assert ratio.tolist() == [[1.0, 1.0]]
    assert logp.grad.tolist() == [[1.0, 1.0]]


def test_an_absurd_log_ratio_stays_finite():
    """Seen elsewhere: an unbounded exp. One token of log-ratio 100 is e¹⁰⁰, in float32 infinite.

    It takes one such token (a rollout engine with a bug, a sharp bf16 distribution) for the loss to
    become inf, the gradient NaN, and the weights NaN for good. The log-ratio is held within ±20.
    """
    assert torch.tensor(100.0).exp().isinf(), "the story's mistake is gone"
    logp = torch.tensor([[-1.0, -120.0]], requires_grad=True)
    old_logp = torch.tensor([[-101.0, -1.0]])
    assert log_ratio(logp, old_logp)[0].tolist() == [MAX_LOG_RATIO, -MAX_LOG_RATIO] == [20, -20]

    mask = torch.ones(1, 2, dtype=torch.bool)
    for objective in ("grpo", "dapo", "gspo", "cispo"):
        for advantage in (1.0, -1.0):
            loss, _ = policy_loss(
                logp,
                old_logp,
                old_logp,
                torch.tensor([advantage]),
                mask,
                objective=objective,
                kl_coef=1.0,
            )
            (gradient,) = torch.autograd.grad(loss, logp)
            assert loss.isfinite() and gradient.isfinite().all()


def test_gspo_has_one_ratio_per_sequence():
    """The geometric mean of the tokens' ratios: √(2 · .5) = 1, and ∛(8 · 1 · 1) = 2.

    A product without the root would grow with the length, and leave any clip within a few tokens.
    """
    old = tensor([0.4, 0.4, 0.1], [0.1, 0.3, 0.3]).log()
    new = tensor([0.8, 0.2, 0.9], [0.8, 0.3, 0.3]).log()
    mask = torch.tensor([[True, True, False], [True, True, True]])
    ratio = sequence_ratio(new, old, mask)
    assert ratio.tolist() == [pytest.approx([1.0] * 3), pytest.approx([2.0] * 3)]


# --- clip ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ratio", "advantage", "gain", "slope"),
    [
        (1.1, +2, 2.2, +2),  # within the bounds: r A
        (0.9, -2, -1.8, -2),
        (1.5, +2, 2.4, 0),  # good, and already much likelier: 1.2 A, no more push
        (0.5, -2, -1.6, 0),  # bad, and already much unlikelier: .8 A, no more push
        (0.5, +2, 1.0, +2),  # good, but became unlikelier: the push stays
        (1.5, -2, -3.0, -2),  # bad, but became likelier: the push stays
        (1.5, 0, 0.0, 0),
    ],
)
def test_clip_stops_those_who_went_far_enough_and_only_those(ratio, advantage, gain, slope):
    """A clip alone would also silence the last two, those that most need a push.

    This is what the minimum in min(r A, clip(r) A) is for.
    """
    assert gain_and_slope(ratio, advantage) == (pytest.approx(gain), slope)


def test_clip_higher_leaves_more_room_above():
    """DAPO: with .28 above, a good token may become 1.28 times as likely, a bad one .8 times."""
    assert gain_and_slope(1.25, 1, clip_high=0.2) == (pytest.approx(1.2), 0)
    assert gain_and_slope(1.25, 1, clip_high=0.28) == (pytest.approx(1.25), 1)
    assert gain_and_slope(0.75, -1, clip_high=0.28) == (pytest.approx(-0.8), 0)


def test_dual_clip_bounds_what_a_bad_token_can_do():
    """A = −2 and r = 50: r A = −100, and nothing in the minimum bounds it. With c = 3: −6, no push.

    Where A > 0 it changes nothing, nor where r is below c.
    """
    assert gain_and_slope(50, -2) == (-100, -2)
    assert gain_and_slope(50, -2, dual_clip=3) == (-6, 0)
    assert gain_and_slope(2, -2, dual_clip=3) == (-4, -2)
    assert gain_and_slope(0.5, -2, dual_clip=3) == (pytest.approx(-1.6), 0)
    assert gain_and_slope(50, 2, dual_clip=3) == (pytest.approx(2.4), 0)


def test_cispo_cuts_the_weight_and_keeps_the_gradient():
    """Rare words at a turn of thought are what a clip silences first: their ratios move the most.

    CISPO: sg(min(r, 5)) · A · log π. Ratios 8, 2, .5 weigh 5, 2, .5; with A = 2 the gradients are
    10, 4, 1. None is 0. A ratio that was not detached would add a second gradient to them.
    """
    logp = tensor([log(0.8), log(0.4), log(0.1)]).requires_grad_()
    ratio = log_ratio(logp, tensor([log(0.1), log(0.2), log(0.2)])).exp()
    gain = cispo_gain(logp, ratio, tensor([2.0]), clip_high=5)
    gain.sum().backward()
    assert logp.grad[0].tolist() == pytest.approx([10, 4, 1])
    assert gain[0].tolist() == pytest.approx([10 * log(0.8), 4 * log(0.4), 1 * log(0.1)])


# --- how many were clipped -----------------------------------------------------------------------

# The worked example: log r of its ten tokens is, row by row, (.2, −.2), (0, −.4, .4), (.4),
# (0, .5, 0, −.3), and the advantages are +, −, +, −.
RATIO = tensor([0.2, -0.2, 0, 0], [0, -0.4, 0.4, 0], [0.4, 0, 0, 0], [0, 0.5, 0, -0.3]).exp()
ADVANTAGES = tensor([1.3], [-0.8], [0.3], [-0.8])
MASK = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 0], [1, 0, 0, 0], [1, 1, 1, 1]]).bool()


def test_two_of_ten_tokens_are_clipped_low_and_two_high():
    """Counted are the tokens whose gain was cut, not all those beyond a bound.

    Beyond 1.2 are four: e^.2 = 1.22, e^.4 = 1.49 twice, e^.5 = 1.65. But 1.65 and one of the 1.49
    have A < 0: bad tokens that became likelier, and are pushed back with full force. To count
    them would report learning as lost where none is.
    """
    cut = clip_indicators(RATIO, ADVANTAGES, "grpo", 0.2, 0.2)
    low, high = cut["clip_low_fraction"] * MASK, cut["clip_high_fraction"] * MASK
    assert low.nonzero().tolist() == [[1, 1], [3, 3]]  # e^−.4 = .67 and e^−.3 = .74, A < 0
    assert high.nonzero().tolist() == [[0, 0], [2, 0]]  # e^.2 = 1.22 and e^.4 = 1.49, A > 0
    assert ((RATIO > 1.2) & MASK).sum() == 4


def test_a_bound_that_acted_took_the_gradient_away():
    ratio = RATIO.clone().requires_grad_()
    clipped_gain(ratio, ADVANTAGES, 0.2, 0.2).sum().backward()
    cut = clip_indicators(RATIO, ADVANTAGES, "grpo", 0.2, 0.2)
    silent = (cut["clip_low_fraction"] + cut["clip_high_fraction"]).bool()
    assert torch.equal(ratio.grad == 0, silent)


def test_dual_clip_and_cispo_count_their_own_bound():
    cut = clip_indicators(RATIO, ADVANTAGES, "grpo", 0.2, 0.2, dual_clip=1.6)
    assert cut["dual_clip_fraction"].nonzero().tolist() == [[3, 1]]  # e^.5 = 1.65, A < 0
    cut = clip_indicators(RATIO, ADVANTAGES, "cispo", 0.0, 1.4)
    assert cut["clip_low_fraction"].count_nonzero() == 0
    assert cut["clip_high_fraction"].nonzero().tolist() == [[1, 2], [2, 0], [3, 1]]
    assert exp(0.4) > 1.4 > exp(0.2)

"""Step 7: how far is the policy from the reference? (grpo/loss.py: kl_estimate)

KL(π ‖ ref) = Σ π log(π / ref) is a sum over the whole vocabulary. Only the sampled token is at
hand, so it is estimated, from d = log ref − log π at that token:

    k1 = −d         k2 = d² / 2         k3 = e^d − d − 1         k3_is = k3 · r

An estimate can be right and its gradient wrong. Everything here is over a vocabulary of two tokens,

    π = (.5, .5)     ref = (.8, .2)

small enough to go through both and weigh each with its probability. By hand:

    KL(π ‖ ref) = .5 log(.5 / .8) + .5 log(.5 / .2) = .2231436
    KL(ref ‖ π) = .8 log(.8 / .5) + .2 log(.2 / .5) = .1927455

With π = softmax(θ₀, θ₁), d log π / dθ₀ is .5 for token 0 and −.5 for token 1, and so
    d KL(π ‖ ref) / dθ₀ = .5 · log(.5 / .8) · .5 − .5 · log(.5 / .2) · .5 = .25 log .25 = −.3465736
    d KL(ref ‖ π) / dθ₀ = −(.8 · .5 − .2 · .5)                                          = −.3
"""

from math import e, log

import pytest
import torch

from grpo.loss import kl_estimate

REVERSE_KL = 0.5 * log(0.5 / 0.8) + 0.5 * log(0.5 / 0.2)
REVERSE_KL_GRADIENT = 0.25 * log(0.25)
FORWARD_KL_GRADIENT = -0.3

REFERENCE = torch.tensor([0.8, 0.2], dtype=torch.float64)


def expectation(estimator, sampled_by=(0.5, 0.5)):
    """Expected value of an estimator, and of its gradient on θ₀, over tokens so sampled."""
    logits = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    logp = torch.log_softmax(logits, dim=0)[None]  # [1, 2]: one row, token 0 and token 1
    old_logp = torch.tensor([sampled_by], dtype=torch.float64).log()
    estimates = kl_estimate(logp, REFERENCE.log()[None], estimator, old_logp)
    expected = (estimates * torch.tensor(sampled_by, dtype=torch.float64)).sum()
    expected.backward()
    return expected.item(), logits.grad[0].item()


def test_each_estimate_of_one_token_by_hand():
    """π = .5 and ref = 1 / 2e, so d = −1: k1 = 1, k2 = .5, k3 = e⁻¹ + 1 − 1 = e⁻¹."""
    logp = torch.tensor([[0.5]], dtype=torch.float64).log()
    ref_logp = logp - 1
    old_logp = torch.tensor([[0.25]], dtype=torch.float64).log()  # r = .5 / .25 = 2
    for estimator, value in {"k1": 1, "k2": 0.5, "k3": 1 / e, "k3_is": 2 / e}.items():
        estimate = kl_estimate(logp, ref_logp, estimator, old_logp)
        assert estimate.item() == pytest.approx(value), estimator


def test_k1_and_k3_estimate_the_kl_and_k2_comes_near():
    assert pytest.approx(0.2231436, abs=1e-7) == REVERSE_KL
    assert expectation("k1")[0] == pytest.approx(REVERSE_KL)
    assert expectation("k3")[0] == pytest.approx(REVERSE_KL)
    assert expectation("k3_is")[0] == pytest.approx(REVERSE_KL)
    # .5 · (log 1.6)² / 2 + .5 · (log .4)² / 2 = .055226 + .209897
    assert expectation("k2")[0] == pytest.approx(0.265123, abs=1e-6)


def test_k2_and_k3_is_have_the_gradient_of_the_reverse_kl():
    assert pytest.approx(-0.3465736, abs=1e-7) == REVERSE_KL_GRADIENT
    assert expectation("k2")[1] == pytest.approx(REVERSE_KL_GRADIENT)
    assert expectation("k3_is")[1] == pytest.approx(REVERSE_KL_GRADIENT)


def test_k3_in_the_loss_pulls_along_another_kl():
    """The value of k3 estimates KL(π ‖ ref). Its gradient is that of KL(ref ‖ π): −.3, not −.3466.

    The estimate depends on θ twice: through its value, and through which tokens are sampled. A loss
    differentiates the first only. GRPO's paper puts k3 in the loss, as PERM's does, so it is the
    default; near the reference the two gradients agree, far from it they do not.
    """
    assert expectation("k3")[1] == pytest.approx(FORWARD_KL_GRADIENT)
    assert abs(FORWARD_KL_GRADIENT - REVERSE_KL_GRADIENT) > 0.04


def test_k1_in_the_loss_pulls_nowhere():
    """The gradient of k1 is d log π / dθ, whatever the reference: on average 0, otherwise noise.

    So k1 is a metric here, and policy_loss refuses it; in the reward it would be right.
    """
    assert expectation("k1")[1] == pytest.approx(0, abs=1e-15)


def test_only_k3_is_holds_for_tokens_that_an_older_policy_sampled():
    """Two updates on one rollout: π_old = (.9, .1) sampled, π = (.5, .5) learns.

    k3 · r weighs each token back to π's own probability, and stays right, value and gradient. The
    gradient of k2 is now .9 · log(.5 / .8) · .5 − .1 · log(.5 / .2) · .5 = −.2573.
    """
    value, gradient = expectation("k3_is", sampled_by=(0.9, 0.1))
    assert value == pytest.approx(REVERSE_KL)
    assert gradient == pytest.approx(REVERSE_KL_GRADIENT)
    by_hand = 0.45 * log(0.5 / 0.8) - 0.05 * log(0.5 / 0.2)
    assert expectation("k2", sampled_by=(0.9, 0.1))[1] == pytest.approx(by_hand)
    assert by_hand == pytest.approx(-0.2573, abs=1e-4)


def test_the_worked_example():
    """k3 over its ten tokens has the mean .009339319065; d is ±.1 or ±.2 throughout.

    d: −.1, .1 | −.2, .2, −.2 | −.1 | −.1, −.1, .1, −.1. So with k3(−.1) = .004837418036, k3(.1) =
    .005170918076, k3(−.2) = .018730753078, k3(.2) = .021402758160:
    (5 · k3(−.1) + 2 · k3(.1) + 2 · k3(−.2) + k3(.2)) / 10.
    """
    differences = [-0.1, 0.1, -0.2, 0.2, -0.2, -0.1, -0.1, -0.1, 0.1, -0.1]
    d = torch.tensor([differences], dtype=torch.float64)
    k3 = kl_estimate(torch.zeros_like(d), d, "k3")
    by_hand = (5 * 0.004837418036 + 2 * 0.005170918076 + 2 * 0.018730753078 + 0.021402758160) / 10
    assert k3.mean().item() == pytest.approx(by_hand, abs=1e-12)
    assert k3.mean().item() == pytest.approx(0.009339319065, abs=1e-12)


def test_a_small_difference_survives_float32():
    """e^d − d − 1 in float32, at d = 1e-4: e^d is 1.0001 to seven digits, and k3 is 5e-9.

    The subtraction leaves rounding (here even below zero, which k3 cannot be). Early in training
    every token is such a case, so the curve of KL would show noise just where one looks at it.
    """
    d = torch.tensor([[1e-4, -1e-4, 3e-4]])
    naive = d.exp() - d - 1
    k3 = kl_estimate(torch.zeros_like(d), d, "k3")
    expected = (d.double().expm1() - d.double())[0].tolist()
    assert k3[0].tolist() == pytest.approx(expected, rel=0.01)
    assert naive[0].tolist() != pytest.approx(expected, rel=0.5)


def test_no_difference_no_kl():
    logp = torch.tensor([[-0.3, -7.1]])
    for estimator in ("k1", "k2", "k3", "k3_is"):
        assert kl_estimate(logp, logp, estimator).tolist() == [[0, 0]]


def test_an_absurd_difference_stays_finite_and_still_pulls_back():
    """An unbounded exp once more. d = 100: e^d overflows, so d is bounded above.

    d = −100 (the policy makes likely what the reference never says) is bounded by nothing: k3 is
    99, and its gradient is +1, towards less likely. A bound on both sides would let go of exactly
    the tokens that drifted farthest.
    """
    logp = torch.tensor([[-120.0, -1.0]], requires_grad=True)
    ref_logp = torch.tensor([[-20.0, -101.0]])
    k3 = kl_estimate(logp, ref_logp, "k3")
    k3.sum().backward()
    assert k3.isfinite().all() and k3[0, 1].item() == pytest.approx(99)
    assert logp.grad.tolist() == [[0.0, 1.0]]


def test_an_unknown_estimator_is_refused():
    logp = torch.zeros(1, 1)
    with pytest.raises(ValueError, match="estimator = 'k4': must be one of k1, k2, k3, k3_is"):
        kl_estimate(logp, logp, "k4")

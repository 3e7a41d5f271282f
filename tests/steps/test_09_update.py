"""Step 9. The update: everything together, on a policy that one can hold in one's hand.

The policy has no prompt to read: three logits, the same at every position, all zero, so each of its
three tokens has probability 1/3. It answered twice: "0 2" got reward 1, "1 2" got reward 0. Token
2 ends an answer.
"""

import pytest
import torch

from grpo.advantages import group_advantages
from grpo.loss import policy_loss

ANSWERS = torch.tensor([[0, 2], [1, 2]])
REWARDS = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
MASK = torch.ones(2, 2, dtype=torch.bool)


def log_probs(logits: torch.Tensor) -> torch.Tensor:
    return logits.log_softmax(-1)[ANSWERS]


def gradient(advantages: torch.Tensor, mask: torch.Tensor = MASK) -> tuple[float, list[float]]:
    """Loss and its gradient with respect to the three logits."""
    logits = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    logp = log_probs(logits)
    loss, _ = policy_loss(logp, logp.detach(), None, advantages, mask, kl_coef=0.0)
    loss.backward()
    return loss.item(), logits.grad.tolist()


def test_the_better_answer_becomes_likelier() -> None:
    """Rewards 1 and 0: mean .5, so reward − mean is ±.5.

    The gradient of log p(a) is onehot(a) − 1/3 in each place. Summed with ±.5 over four tokens, the
    thirds cancel and so does token 2, which both answers have: what is left is
    −(.5, −.5, 0) / 4 tokens.
    """
    advantages = group_advantages(REWARDS, scale="none")[0]
    loss, slope = gradient(advantages)
    assert loss == pytest.approx(0.0, abs=1e-12)
    assert slope == pytest.approx([-0.125, 0.125, 0.0])

    after = torch.zeros(3, dtype=torch.float64) - 0.1 * torch.tensor(slope, dtype=torch.float64)
    p = after.softmax(-1)
    assert p[0] > 1 / 3 > p[1]
    assert p[2] == pytest.approx(1 / 3, abs=1e-4)


def test_my_loss_is_zero_and_yet_it_learns() -> None:
    """The most asked question. On policy the ratio is 1, so the loss is −mean(A) = 0 whatever the
    rewards. What moves the weights is its gradient."""
    loss, slope = gradient(group_advantages(REWARDS)[0])
    assert loss == pytest.approx(0.0, abs=1e-12)
    assert max(map(abs, slope)) > 0.1


def test_the_stop_token_is_trained() -> None:
    """The mistake: the mask is `ids != pad` and pad is the stop token, so the policy is never told
    that ending here was good. Here the good answer's stop token (2) is pushed up when it alone
    was good: with only the second place counted and one answer of advantage 1, it gains."""
    only_last = torch.tensor([[False, True], [False, False]])
    _, slope = gradient(torch.tensor([1.0, 0.0], dtype=torch.float64), only_last)
    assert slope == pytest.approx([1 / 3, 1 / 3, -2 / 3])


def test_a_group_without_spread_moves_nothing() -> None:
    loss, slope = gradient(group_advantages(torch.full((1, 2), 0.7, dtype=torch.float64))[0])
    assert loss == 0.0
    assert slope == [0.0, 0.0, 0.0]

"""Step 5. Log-probs: how likely is each token of each completion, under the policy?"""

import math

import pytest
import torch

from grpo import logprobs
from grpo.logprobs import TokenLogprobs, completion_logprobs
from grpo.packing import pack
from tests.tiny import tiny_model


def test_a_group_is_one_row_with_one_prompt() -> None:
    """Prompt 5 6 7, completions 1 2 3 and 4 (one token only) and 8 9.

        place     0 1 2 | 3 4 | 5
        token     5 6 7 | 1 2 | 8        each completion without its last token, which predicts
        position  0 1 2 | 3 4 | 3        nothing; positions start again after the prompt

    The first token of every completion is predicted by the prompt's last place, 2.
    """
    row = pack([([5, 6, 7], [[1, 2, 3], [4], [8, 9]])], "cpu")
    assert row.token_ids.tolist() == [[5, 6, 7, 1, 2, 8]]
    assert row.position_ids.tolist() == [[0, 1, 2, 3, 4, 3]]
    assert row.predictors.tolist() == [2, 3, 4, 2, 2, 5]
    assert row.targets.tolist() == [1, 2, 3, 4, 8, 9]
    assert row.lengths == [3, 1, 2]


def test_a_branch_sees_the_prompt_and_itself() -> None:
    """The tree mask of the row above, query by query; a second group sees nothing of the first."""
    mask = pack([([5, 6, 7], [[1, 2, 3], [4], [8, 9]]), ([5], [[6, 7]])], "cpu").mask[0, 0]
    assert mask.int().tolist() == [
        [1, 0, 0, 0, 0, 0, 0, 0],  # 5
        [1, 1, 0, 0, 0, 0, 0, 0],  # 6
        [1, 1, 1, 0, 0, 0, 0, 0],  # 7
        [1, 1, 1, 1, 0, 0, 0, 0],  #   1
        [1, 1, 1, 1, 1, 0, 0, 0],  #   2
        [1, 1, 1, 0, 0, 1, 0, 0],  #   8 sees the prompt, not 1 and 2
        [0, 0, 0, 0, 0, 0, 1, 0],  # 5 of the second group
        [0, 0, 0, 0, 0, 0, 1, 1],  #   6
    ]


def test_log_prob_and_entropy_by_hand() -> None:
    """Hidden state [1], head weights log .5, log .3, log .2: the logits are the log-probs.

    log-prob of token 1 is log .3; entropy is −(.5 log .5 + .3 log .3 + .2 log .2) = 1.0297.
    At temperature 1/2 the probabilities become .25, .09, .04 over .38.
    """
    hidden = torch.ones(1, 1, dtype=torch.float64)
    weight = torch.tensor([[0.5], [0.3], [0.2]], dtype=torch.float64).log()
    target = torch.tensor([1])
    value, entropy = TokenLogprobs.apply(hidden, weight, target, 1.0)
    assert value.item() == pytest.approx(math.log(0.3))
    assert entropy.item() == pytest.approx(1.0296530)
    value, _ = TokenLogprobs.apply(hidden, weight, target, 0.5)
    assert value.item() == pytest.approx(math.log(0.09 / 0.38))


def test_gradient_by_hand() -> None:
    """∂ log p(1) / ∂ logits = onehot − p = (−.5, 1 − .3, −.2): one up, the others down."""
    hidden = torch.ones(1, 1, dtype=torch.float64)
    weight = torch.tensor([[0.5], [0.3], [0.2]], dtype=torch.float64).log().requires_grad_()
    value, _ = TokenLogprobs.apply(hidden, weight, torch.tensor([1]), 1.0)
    value.backward()
    assert weight.grad[:, 0].tolist() == pytest.approx([-0.5, 0.7, -0.2])


def test_log_probs_are_computed_in_float32_at_least() -> None:
    """The mistake: log_softmax in bfloat16, which keeps three digits: ratios come out in steps."""
    hidden, weight = torch.ones(1, 1).bfloat16(), torch.tensor([[1.0], [0.0]]).bfloat16()
    value, _ = TokenLogprobs.apply(hidden, weight, torch.tensor([0]), 1.0)
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(-math.log(1 + math.exp(-1)), abs=1e-6)


def test_gradients_of_chunks_are_summed_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """The mistake: each chunk's gradient is rounded to bfloat16 before it is added.

    256 tokens, one a chunk, each with a gradient of about 1 for the one weight that matters. In
    bfloat16 a sum stops growing at 256: there the next number after 256 is 258.
    """
    monkeypatch.setattr(logprobs, "CHUNK_ON_CPU", 1)
    n = 600
    hidden = torch.ones(n, 1).bfloat16()
    weight = torch.tensor([[0.0], [0.0]]).bfloat16().requires_grad_()
    values, _ = TokenLogprobs.apply(hidden, weight, torch.zeros(n, dtype=torch.long), 1.0)
    (2 * values.sum()).backward()  # each token: 2 · (1 − ½) = 1
    assert weight.grad[0].item() == 600


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model().double()
    prompt, completions = [3, 1, 4], [[1, 5, 9, 2], [6], [5, 3, 5]]
    whole = completion_logprobs(model, prompt, completions)
    monkeypatch.setattr(logprobs, "CHUNK_ON_CPU", 3)
    for a, b in zip(whole, completion_logprobs(model, prompt, completions), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)

"""Step 1. Sampling: logits → a token and its log-prob."""

import math

import pytest
import torch

from grpo.sampling import (
    Sampling,
    choose,
    keep_min_p,
    keep_top_k,
    keep_top_p,
    random_key,
    sample,
    scale_logits,
    uniform,
)

# A vocabulary of three tokens with probabilities .5, .3 and .2.
PROBABILITIES = [0.5, 0.3, 0.2]
LOGITS = torch.tensor([PROBABILITIES], dtype=torch.float64).log()


@pytest.mark.parametrize(("u", "token"), [(0.0, 0), (0.49, 0), (0.51, 1), (0.79, 1), (0.81, 2)])
def test_a_uniform_number_falls_into_the_share_of_one_token(u: float, token: int) -> None:
    """Lay the probabilities end to end: token 0 owns [0, .5), token 1 [.5, .8), token 2 [.8, 1)."""
    weights = torch.tensor([PROBABILITIES], dtype=torch.float64)
    assert choose(weights, torch.tensor([u], dtype=torch.float64)).item() == token


def test_greedy_takes_the_likeliest_token_and_reports_it_at_temperature_1() -> None:
    tokens, logprobs = sample(LOGITS, Sampling(temperature=0), torch.tensor([0.99]))
    assert tokens.item() == 0
    assert logprobs.item() == pytest.approx(math.log(0.5))


def test_temperature_belongs_in_the_log_prob() -> None:
    """The mistake: tokens are sampled at a temperature, but scored without it.

    At temperature 1/2 probabilities are squared and normalised again: .25, .09, .04 over .38. A
    log-prob without the temperature would say .5 for the first token, where it is .658.
    """
    _, logprobs = sample(LOGITS, Sampling(temperature=0.5), torch.tensor([0.0]))
    assert logprobs.exp().item() == pytest.approx(0.25 / 0.38)
    assert scale_logits(LOGITS, 0.5).softmax(-1)[0].tolist() == pytest.approx(
        [0.25 / 0.38, 0.09 / 0.38, 0.04 / 0.38]
    )


def test_filters_keep_the_likely_tokens() -> None:
    def kept(logits: torch.Tensor) -> list[bool]:
        return logits[0].isfinite().tolist()

    assert kept(keep_top_k(LOGITS, 2)) == [True, True, False]
    assert kept(keep_top_p(LOGITS, 0.5)) == [True, False, False]  # .5 alone reaches .5
    assert kept(keep_top_p(LOGITS, 0.6)) == [True, True, False]  # .5 does not reach .6, .8 does
    assert kept(keep_min_p(LOGITS, 0.5)) == [True, True, False]  # at least .5 · .5 = .25


def test_recorded_log_probs_are_those_before_the_filter() -> None:
    """The mistake: top-p in sampling only. What is drawn follows one distribution, what is scored
    another, and the ratio of a fresh policy is no longer 1.

    top-p .6 leaves tokens 0 and 1, drawn with probabilities .625 and .375. Recorded are .5 and .3,
    since that is what the policy will be scored with. Training refuses such filters for that.
    """
    sampling = Sampling(top_p=0.6)
    uniforms = torch.tensor([0.62, 0.63, 0.99], dtype=torch.float64)
    tokens, logprobs = sample(LOGITS.expand(3, -1), sampling, uniforms)
    assert tokens.tolist() == [0, 1, 1]
    assert logprobs.exp().tolist() == pytest.approx([0.5, 0.3, 0.3])


def test_a_random_number_is_counted_not_drawn() -> None:
    """The mistake: numbers drawn from a shared generator, so that a row's text depends on its
    neighbours, and a resumed run is off by one draw. Here position 5 of a sample has its number
    whether or not anybody asked for position 4, and whatever else is in the batch.
    """
    first, second = random_key(42, 0, 7, 0), random_key(42, 0, 7, 1)
    alone = uniform(first, torch.tensor([5]))
    together = uniform(torch.stack([second, first]), torch.tensor([5, 5]))
    assert together[1] == alone[0]
    assert together[0] != alone[0]
    assert 0 <= alone.item() < 1


def test_every_part_of_the_key_matters_and_so_does_their_order() -> None:
    keys = {int(random_key(*k)) for k in [(1, 2, 3, 4), (2, 1, 3, 4), (1, 2, 4, 3), (1, 2, 3, 5)]}
    assert len(keys) == 4


@pytest.mark.parametrize(
    "settings", [{"temperature": -1.0}, {"top_k": -1}, {"top_p": 0.0}, {"min_p": 1.0}]
)
def test_senseless_settings_are_refused_by_name(settings: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(settings))):
        Sampling(**settings)

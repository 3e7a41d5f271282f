"""Sampled frequencies against the distributions of `transformers`; the quality of the hash."""

import pytest
import torch
from scipy import stats
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from grpo.sampling import Sampling, choose, random_key, sample, uniform
from tests.tiny import fresh_seed

DRAWS = 200_000
# A test that compares fresh random draws fails by chance now and then: once in a million here.
SIGNIFICANCE = 1e-6


def transformers_probabilities(logits: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """The distribution that `model.generate` would draw from. [V] → [V]."""
    warpers = LogitsProcessorList([TemperatureLogitsWarper(sampling.temperature)])
    if sampling.top_k:
        warpers.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        warpers.append(TopPLogitsWarper(sampling.top_p))
    if sampling.min_p:
        warpers.append(MinPLogitsWarper(sampling.min_p))
    return warpers(torch.zeros(1, 1, dtype=torch.long), logits[None].clone())[0].softmax(-1)


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(),
        Sampling(temperature=0.7),
        Sampling(top_k=5),
        Sampling(top_p=0.8),
        Sampling(min_p=0.1),
        Sampling(temperature=1.3, top_k=20, top_p=0.9, min_p=0.02),
    ],
    ids=str,
)
def test_frequencies_match_the_filtered_softmax(sampling: Sampling) -> None:
    seed = fresh_seed()
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(40, generator=generator) * 2
    expected = transformers_probabilities(logits, sampling)
    uniforms = uniform(random_key(seed).expand(DRAWS), torch.arange(DRAWS))
    tokens, logprobs = sample(logits.expand(DRAWS, -1), sampling, uniforms)

    counts = torch.bincount(tokens, minlength=len(logits))
    allowed = expected > 0
    assert counts[~allowed].sum() == 0
    if allowed.sum() > 1:
        # Tokens expected fewer than 5 times are counted together: chi-square needs that.
        frequent = allowed & (expected * DRAWS >= 5)
        rare = allowed & ~frequent
        observed = [*counts[frequent].tolist()]
        wanted = [*(expected[frequent].double() * DRAWS).tolist()]
        if rare.any():
            observed.append(counts[rare].sum().item())
            wanted.append(expected[rare].double().sum().item() * DRAWS)
        wanted = [w * DRAWS / sum(wanted) for w in wanted]
        assert stats.chisquare(observed, wanted).pvalue > SIGNIFICANCE
    unfiltered = (logits / sampling.temperature).log_softmax(-1)
    torch.testing.assert_close(logprobs, unfiltered[tokens], rtol=0, atol=1e-5)


@pytest.mark.parametrize("what", ["position", "sample", "prompt", "step", "seed"])
def test_uniform_numbers_are_uniform_along_each_counter(what: str) -> None:
    """Counters run 0, 1, 2, …: a weak hash would show their regularity."""
    seed, n = fresh_seed(), 20_000
    if what == "position":
        numbers = uniform(random_key(seed, 0, 0, 0).expand(n), torch.arange(n))
    else:
        place = ["seed", "step", "prompt", "sample"].index(what)
        parts: list[int | torch.Tensor] = [seed, 3, 5, 1]
        parts[place] = parts[place] + torch.arange(n)
        numbers = uniform(random_key(*parts), torch.full((n,), 7))
    assert stats.kstest(numbers.numpy(), "uniform").pvalue > SIGNIFICANCE
    # Neighbours are not correlated: the correlation of n independent pairs has std 1 / √n.
    correlation = torch.corrcoef(torch.stack([numbers[:-1], numbers[1:]]))[0, 1]
    assert abs(correlation) < 5.5 / n**0.5


def test_choice_is_the_inverse_of_the_distribution_function_in_float64() -> None:
    """Over a vocabulary of several blocks, not a multiple of their size, a third of it weightless,
    and for uniform numbers at both ends and at every boundary."""
    seed = fresh_seed()
    generator = torch.Generator().manual_seed(seed)
    weights = torch.randn(1000, generator=generator, dtype=torch.float64).mul(3).exp()
    weights[torch.rand(1000, generator=generator) < 1 / 3] = 0
    weights[:5] = weights[-5:] = 0
    totals = weights.cumsum(-1) / weights.sum()
    edges = torch.tensor([0.0, 5e-324, 1 - 2**-53], dtype=torch.float64)
    boundaries = totals[(totals > 0) & (totals < 1)]
    drawn = torch.rand(5000, generator=generator, dtype=torch.float64)
    uniforms = torch.cat([edges, boundaries - 1e-12, boundaries, boundaries + 1e-12, drawn])
    uniforms = uniforms[(uniforms >= 0) & (uniforms < 1)]
    for dtype, eps in ((torch.float64, 1e-13), (torch.float32, 1e-6)):
        rows = weights.to(dtype).expand(len(uniforms), -1)
        tokens = choose(rows, uniforms)
        assert (weights[tokens] > 0).all()
        assert (totals[tokens] >= uniforms - eps).all()
        assert ((totals - weights / weights.sum())[tokens] <= uniforms + eps).all()


def test_a_rounded_block_total_moves_nothing_to_the_last_token_of_the_block() -> None:
    """Float32 rounds the total up: the excess must not fall to the token of weight 1e-12."""
    weights = torch.zeros(1, 128)
    weights[0, 0], weights[0, 1], weights[0, 127] = 1.0, 9e-8, 1e-12
    u = torch.tensor([1 - 1e-8], dtype=torch.float64)
    assert choose(weights, u).item() == 1


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_logits_that_are_no_numbers_show_in_the_log_prob(bad: float) -> None:
    """A policy that has diverged must not end in an index out of bounds: metrics show the cause."""
    logits = torch.zeros(2, 300)
    logits[0, 7] = bad
    uniforms = torch.tensor([0.5, 0.5], dtype=torch.float64)
    tokens, logprobs = sample(logits, Sampling(), uniforms)
    assert tokens[1] == 150 and logprobs[1].isfinite()
    assert 0 <= tokens[0] < 300 and not logprobs[0].isfinite()

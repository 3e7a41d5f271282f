"""A packed row against separate, unpadded rows: the same log-probs and the same gradients."""

import pytest
import torch
from torch import Tensor
from transformers import GraniteConfig, GraniteForCausalLM, MistralConfig, MistralForCausalLM

from grpo.logprobs import completion_logprobs, score
from grpo.packing import pack
from grpo.policy import check_packing
from grpo.shared_prefix import UnsupportedModel, use_shared_prefix
from tests.tiny import FAMILIES, VOCABULARY, fresh_seed, patch_norms, tiny_model

LENGTHS = (7, 1, 12, 4)  # one of the completions is a single token
TEMPERATURE = 0.7


def random_group(seed: int) -> tuple[list[int], list[list[int]]]:
    generator = torch.Generator().manual_seed(seed)
    prompt, *completions = (
        torch.randint(VOCABULARY, (n,), generator=generator).tolist() for n in (9, *LENGTHS)
    )
    return prompt, completions


def separate_logprobs(model, prompt: list[int], completion: list[int]) -> Tensor:
    """Plain: one row per completion, full logits, log_softmax, gather."""
    ids = torch.tensor([prompt + completion])
    logits = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1] / TEMPERATURE
    return logits.log_softmax(-1).gather(-1, torch.tensor(completion)[:, None])[:, 0]


def gradients(model, values: list[Tensor]) -> Tensor:
    """The gradient of an uneven weighting of all log-probs, as one long vector."""
    model.zero_grad()
    sum((v * torch.linspace(-1, 2, len(v), dtype=v.dtype)).sum() for v in values).backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()])


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_packed_equals_separate_in_float64(family: str, checkpointing: bool) -> None:
    seed = fresh_seed()
    model, (prompt, completions) = tiny_model(family, seed).double(), random_group(seed)
    patch_norms(model)
    model.set_attn_implementation("sdpa")
    separate = [separate_logprobs(model, prompt, c) for c in completions]
    expected = gradients(model, separate)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
    packed = completion_logprobs(model, prompt, completions, temperature=TEMPERATURE)
    for a, b in zip(packed, separate, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-9)
    torch.testing.assert_close(gradients(model, packed), expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_with_the_models_own_norms(family: str) -> None:
    """transformers computes RMSNorm in float32 whatever the model's type, hence the tolerance."""
    seed = fresh_seed()
    model, (prompt, completions) = tiny_model(family, seed).double(), random_group(seed)
    model.set_attn_implementation("sdpa")
    expected = gradients(model, [separate_logprobs(model, prompt, c) for c in completions])
    packed = gradients(
        model, completion_logprobs(model, prompt, completions, temperature=TEMPERATURE)
    )
    assert (packed - expected).norm() / expected.norm() < 1e-6


def test_several_groups_in_one_row_equal_each_alone() -> None:
    seed = fresh_seed()
    model = tiny_model("qwen3", seed).double()
    groups = [random_group(seed), random_group(seed + 1)]
    row = pack(groups, "cpu")
    check = [v for g in groups for v in completion_logprobs(model, *g, temperature=TEMPERATURE)]
    together, _ = score(model, row, TEMPERATURE)
    torch.testing.assert_close(together, torch.cat(check), rtol=0, atol=1e-6)


def test_entropy_is_that_of_the_full_distribution() -> None:
    seed = fresh_seed()
    model, (prompt, completions) = tiny_model("llama", seed), random_group(seed)
    ids = torch.tensor([prompt + completions[2]])
    logits = model(ids).logits[0, len(prompt) - 1 : -1] / TEMPERATURE
    expected = torch.distributions.Categorical(logits=logits).entropy()
    use_shared_prefix(model)
    _, entropy = score(model, pack([(prompt, completions[2:3])], "cpu"), TEMPERATURE)
    torch.testing.assert_close(entropy, expected, rtol=0, atol=1e-5)
    assert not entropy.requires_grad


def test_a_fresh_policy_has_log_ratio_zero_and_kl_zero() -> None:
    """An old pass computed separately, in float32 at temperature .7: the same bits."""
    seed = fresh_seed()
    model, (prompt, completions) = tiny_model("llama", seed), random_group(seed)
    new = completion_logprobs(model, prompt, completions, temperature=TEMPERATURE)
    with torch.no_grad():
        old = completion_logprobs(model, prompt, completions, temperature=TEMPERATURE)
    for a, b in zip(new, old, strict=True):
        assert torch.equal(a.detach(), b)


def test_gradients_are_the_same_bits_each_time() -> None:
    """All completions are predicted by the prompt's last place; their gradients are added there in
    a fixed order, also when two threads work. (Plain indexing adds them as threads come.)"""
    seed = fresh_seed()
    generator = torch.Generator().manual_seed(seed)
    model = tiny_model("llama", seed)
    prompt, *completions = (
        torch.randint(VOCABULARY, (n,), generator=generator).tolist() for n in [20] + [12] * 96
    )
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        first, *others = (
            gradients(model, completion_logprobs(model, prompt, completions)) for _ in range(6)
        )
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(first, other) for other in others)


def test_an_empty_prompt_or_completion_is_refused() -> None:
    for group in (([], [[1]]), ([1], [[2], []])):
        with pytest.raises(ValueError, match="empty"):
            completion_logprobs(tiny_model(), *group)


SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}


def test_models_that_a_packed_row_would_get_wrong_are_refused() -> None:
    """A sliding window is found by its argument; a scale on the logits only by comparing."""
    with pytest.raises(UnsupportedModel, match="sliding_window"):
        check_packing(MistralForCausalLM(MistralConfig(**SHAPE, sliding_window=4)).eval())
    with pytest.raises(UnsupportedModel, match="differ"):
        check_packing(GraniteForCausalLM(GraniteConfig(**SHAPE, logits_scaling=3.0)).eval())
    check_packing(MistralForCausalLM(MistralConfig(**SHAPE, sliding_window=None)).eval())


@pytest.mark.parametrize("family", FAMILIES)
def test_supported_families_pass_the_check(family: str) -> None:
    check_packing(tiny_model(family))

"""Linear layers with packed weights, against the layers themselves."""

import pytest
import torch
from torch import nn

from grpo import packed_linear
from grpo.generation import generate_groups
from grpo.packed_linear import is_supported, joint_groups, packed_linear_layers
from grpo.sampling import Sampling
from tests.tiny import FAMILIES, fresh_seed, tiny_model, tiny_prompts


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_layers_give_what_plain_ones_give(family: str) -> None:
    """To bfloat16's rounding, over one row and many; and they are left as they were."""
    seed = fresh_seed()
    model = tiny_model(family, seed, torch.bfloat16)
    for layer in model.modules():
        if isinstance(layer, nn.Linear) and layer.bias is not None:
            nn.init.normal_(layer.bias)  # zeros would hide a bias left out
    for length in (1, 40):
        ids = torch.tensor(tiny_prompts((length,), seed))
        with torch.no_grad():
            plain = model(ids).logits.float()
            with packed_linear_layers(model):
                if is_supported():
                    assert all("forward" in vars(x) for g in joint_groups(model) for x in g)
                packed = model(ids).logits.float()
            again = model(ids).logits.float()
        assert torch.equal(plain, again)
        assert (packed - plain).norm() < 0.02 * plain.norm()


def test_layers_that_read_the_same_input_run_as_one() -> None:
    model = tiny_model("qwen2", dtype=torch.bfloat16)
    sizes = sorted(len(group) for group in joint_groups(model))
    # Per layer: q, k, v; gate, up; o; down. And the head.
    assert sizes == sorted([3, 2, 1, 1] * 3 + [1])
    assert joint_groups(tiny_model("qwen2")) == [], "float32 layers stay as they are"


def test_layers_that_differ_are_not_joined() -> None:
    """A bias that only one of them has, or another width of input: each runs on its own."""
    torch.manual_seed(fresh_seed())
    x = torch.randn(4, 32).bfloat16()
    names = ("q_proj", "k_proj", "v_proj")
    for settings in ({"bias": False}, {"in_features": 16}):
        odd = nn.Linear(**{"in_features": 32, "out_features": 32, **settings})
        model = nn.ModuleDict({n: nn.Linear(32, 32) for n in names} | {"k_proj": odd})
        model = model.bfloat16().requires_grad_(False)
        assert [len(group) for group in joint_groups(model)] == [1, 1, 1]
        expected = {n: layer(x[:, : layer.in_features]) for n, layer in model.items()}
        with packed_linear_layers(model):
            for n, layer in model.items():
                packed = layer(x[:, : layer.in_features])
                torch.testing.assert_close(packed, expected[n], rtol=0.02, atol=0.02)


def test_a_new_input_is_never_answered_with_an_old_output() -> None:
    seed = fresh_seed()
    torch.manual_seed(seed)
    model = nn.ModuleDict({name: nn.Linear(32, 32) for name in ("q_proj", "k_proj", "v_proj")})
    model = model.bfloat16().requires_grad_(False)
    x, y = torch.randn(2, 4, 32).bfloat16()
    expected = {name: layer(y) for name, layer in model.items()}
    with packed_linear_layers(model):
        model["q_proj"](x)
        for name in ("k_proj", "q_proj", "v_proj", "v_proj", "k_proj"):
            torch.testing.assert_close(model[name](y), expected[name], rtol=0.02, atol=0.02)


def test_generation_without_the_operators(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where PyTorch lacks them, generation runs on plain layers."""
    seed = fresh_seed()
    model, prompts = tiny_model("llama", seed, torch.bfloat16), tiny_prompts((5, 9), seed)

    def missing(weight: torch.Tensor) -> torch.Tensor:
        raise AttributeError("'_OpNamespace' 'mkldnn' object has no attribute")

    monkeypatch.setattr(packed_linear, "pack_weight", missing)
    assert not is_supported()
    groups = generate_groups(
        model, prompts, group_size=2, max_new_tokens=4, sampling=Sampling(), stop_ids=[]
    )
    assert all(len(completion.token_ids) == 4 for group in groups for completion in group)

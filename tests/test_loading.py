"""Weights by slices: what each rank holds is what `from_pretrained` would have given it."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM

from grpo.loading import Weights, empty_model, first_layers, safetensors_files
from grpo.parallel import pick_device, start_ranks
from grpo.sharding import give_memory, shard
from tests.tiny import FAMILIES, ROOT, VOCABULARY, fresh_seed, tiny_model, torchrun

CPU = torch.device("cpu")


def assert_equal_to_pretrained(model: torch.nn.Module, folder: Path) -> None:
    expected = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for kind in ("named_parameters", "named_buffers"):
        pairs = zip(getattr(model, kind)(), getattr(expected, kind)(), strict=True)
        for (name, got), (its_name, wanted) in pairs:
            full = got.full_tensor() if hasattr(got, "full_tensor") else got
            assert name == its_name and torch.equal(full, wanted), name
    assert model.generation_config.to_dict() == expected.generation_config.to_dict()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("largest_file", ["1GB", "100KB"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_sharded_policy_has_the_weights_of_its_files(
    tmp_path: Path, family: str, largest_file: str, dtype: torch.dtype
) -> None:
    saved = tiny_model(family, fresh_seed(), dtype)
    saved.generation_config.eos_token_id = [3, 4]
    saved.save_pretrained(tmp_path, max_shard_size=largest_file)
    assert (len(safetensors_files(str(tmp_path))) > 1) == (largest_file == "100KB")
    model = empty_model(str(tmp_path), CPU)
    assert all(p.is_meta for p in model.parameters())
    with start_ranks(pick_device("cpu")) as ranks:
        shard(model, ranks, torch.float32, Weights(str(tmp_path), model).fill)
        assert {p.dtype for p in model.parameters()} == {torch.float32}
        tied = family != "qwen2"
        assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
        assert_equal_to_pretrained(model, tmp_path)


def test_a_mixture_of_experts_whose_files_have_other_names(tmp_path: Path) -> None:
    """Its experts are stored one by one, and are one tensor in the model."""
    config = MixtralConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        sliding_window=None,
    )
    torch.manual_seed(fresh_seed())
    MixtralForCausalLM(config).save_pretrained(tmp_path)
    model = empty_model(str(tmp_path), CPU)
    stored = {key for path in safetensors_files(str(tmp_path)) for key in load_file(path)}
    assert not {name for name, _ in model.named_parameters()} <= stored
    give_memory(model, CPU)
    Weights(str(tmp_path), model).fill(model)
    assert_equal_to_pretrained(model, tmp_path)


def test_the_first_layers_are_those_of_the_model(tmp_path: Path) -> None:
    saved = tiny_model("qwen3", fresh_seed())
    saved.save_pretrained(tmp_path)
    short = first_layers(str(tmp_path), 2, CPU)
    assert len(short.model.layers) == 2 < len(saved.model.layers)
    weights = dict(saved.named_parameters())
    assert all(torch.equal(p, weights[name]) for name, p in short.named_parameters())


def test_weights_of_another_shape_are_refused_in_one_line(tmp_path: Path) -> None:
    model = tiny_model("llama", fresh_seed())
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"intermediate_size": 100}))
    with pytest.raises(ValueError, match=r"mlp.* has the shape \[128, 64\]"):
        Weights(str(tmp_path), empty_model(str(tmp_path), CPU))


# --- several ranks -------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 3, 5])
def test_ranks_read_every_row_once_between_them(tmp_path: Path, ranks: int) -> None:
    """Also where rows do not divide evenly, and where the last ranks get none of some."""
    tiny_model("qwen2", fresh_seed()).save_pretrained(tmp_path / "model")
    torchrun(ranks, ROOT / "tests" / "loading_worker.py", tmp_path)
    read = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(ranks)]
    for name, parameter in tiny_model("qwen2").named_parameters():
        rows = [i for of_rank in read for i in range(*of_rank.get(name, (0, 0)))]
        assert rows == list(range(parameter.shape[0])), name

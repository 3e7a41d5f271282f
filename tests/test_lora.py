"""Adapters: the base at first, then the chain rule; merged to generate; kept by checkpoints."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.func import functional_call
from transformers import AutoModelForCausalLM, PreTrainedModel

import train
from grpo.batches import Sample
from grpo.checkpoint import export_policy, load_checkpoint, save_checkpoint, tensors_of
from grpo.config import Config, ConfigError, GRPOConfig, PolicyConfig, RolloutConfig, TrainConfig
from grpo.logprobs import completion_logprobs
from grpo.lora import adapted_layers, adapters_off, add_adapters, draw_adapters
from grpo.parallel import Ranks, pick_device, start_ranks
from grpo.rollout import Completion, Group, Prompt
from grpo.sharding import plain_copy, shard
from grpo.trainer import Trainer
from tests.tiny import FAMILIES, fresh_seed, patch_norms, tiny_model, tiny_prompts

RANK, ALPHA = 4, 6.0
SCALE = 1.5
ADAPTED = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture
def ranks() -> Iterator[Ranks]:
    with start_ranks(pick_device("cpu")) as ranks:
        yield ranks


def adapted_policy(ranks: Ranks, family: str, seed: int, dtype: torch.dtype) -> PreTrainedModel:
    """A sharded policy with fresh adapters."""
    model = shard(add_adapters(tiny_model(family, seed), RANK, ALPHA, dtype), ranks, dtype)
    draw_adapters(model, seed)
    return model


def move_adapters(model: PreTrainedModel, seed: int, size: float = 0.1) -> None:
    """Give every B random content, as if it had been trained."""
    generator = torch.Generator().manual_seed(seed)
    for layer in adapted_layers(model):
        local = layer.lora_b.to_local() if hasattr(layer.lora_b, "to_local") else layer.lora_b
        local.data.copy_(torch.randn(layer.lora_b.shape, generator=generator) * size)


def full(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach()


def row_logprobs(model: PreTrainedModel, seed: int) -> Tensor:
    """Log-probs of three completions of one prompt."""
    prompt, *completions = tiny_prompts((5, 4, 1, 6), seed)
    with torch.no_grad():
        return torch.cat(completion_logprobs(model, prompt, completions))


# --- the model -----------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_adapted_and_what_is_trained(ranks: Ranks, family: str) -> None:
    """All linear layers of the decoder's layers; not the head, the embeddings or the norms."""
    plain, policy = tiny_model(family, 0), adapted_policy(ranks, family, 0, torch.bfloat16)
    parameters = dict(policy.named_parameters())
    trained = {name for name, p in parameters.items() if p.requires_grad}
    assert trained == {
        f"model.layers.{i}.{'mlp' if name[0] in 'gud' else 'self_attn'}.{name}.lora_{matrix}"
        for i in range(3)
        for name in ADAPTED
        for matrix in "ab"
    }
    weights = dict(plain.named_parameters())
    assert parameters.keys() == weights.keys() | trained
    for name, parameter in parameters.items():
        assert parameter.dtype == (torch.float32 if name in trained else torch.bfloat16)
        if name not in trained:
            assert torch.equal(full(parameter), weights[name].bfloat16())
    assert (policy.lm_head.weight is policy.model.embed_tokens.weight) == (family != "qwen2")
    layer = policy.model.layers[0].mlp.down_proj
    assert layer.lora_a.shape == (RANK, 128) and layer.lora_b.shape == (64, RANK)


def test_a_is_drawn_from_the_seed_alone(ranks: Ranks) -> None:
    """So that A x is about as large as x; B is 0. The global random state has no part in it."""
    policy = adapted_policy(ranks, "llama", seed := fresh_seed(), torch.bfloat16)

    def draw(seed: int) -> list[Tensor]:
        draw_adapters(policy, seed)
        return [full(layer.lora_a).clone() for layer in adapted_layers(policy)]

    torch.manual_seed(seed)
    state = torch.get_rng_state()
    first = draw(seed)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(seed + 1)
    move_adapters(policy, seed)
    again, other = draw(seed), draw(seed + 1)
    assert all(map(torch.equal, again, first)) and not any(map(torch.equal, other, first))
    assert all((full(layer.lora_b) == 0).all() for layer in adapted_layers(policy))
    sizes = torch.stack([a.square().mean() * a.shape[1] for a in first])
    assert sizes.mean() == pytest.approx(1, abs=0.1) and len({a.norm().item() for a in first}) == 21


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_fresh_policy_is_the_base_to_the_last_bit(
    ranks: Ranks, family: str, dtype: torch.dtype
) -> None:
    seed = fresh_seed()
    base = row_logprobs(shard(tiny_model(family, seed), ranks, dtype), seed)
    policy = adapted_policy(ranks, family, seed, dtype)
    assert torch.equal(row_logprobs(policy, seed), base)
    assert torch.equal(row_logprobs(plain_copy(policy), seed), base)
    move_adapters(policy, seed)
    moved = row_logprobs(policy, seed)
    assert (moved - base).abs().max() > 0.01
    with pytest.raises(KeyError), adapters_off(policy):
        assert torch.equal(row_logprobs(policy, seed), base)
        raise KeyError
    assert torch.equal(row_logprobs(policy, seed), moved)


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_those_through_explicit_weights(family: str) -> None:
    """In float64: autograd through W + (alpha / rank) · B A, which knows nothing of adapters."""
    seed = fresh_seed()
    plain, model = tiny_model(family, seed).double(), tiny_model(family, seed).double()
    patch_norms(plain), patch_norms(model)
    add_adapters(model, RANK, ALPHA, torch.float64)
    draw_adapters(model, seed)
    move_adapters(model.double(), seed)
    ids = torch.tensor(tiny_prompts((12, 12), seed))
    weighting = torch.randn(2, 12, 97, dtype=torch.float64)

    adapters = {
        name: p.detach().clone().requires_grad_()
        for name, p in model.named_parameters()
        if p.requires_grad
    }
    weights = dict(plain.named_parameters())
    for name in list(weights):
        layer = name.removesuffix(".weight")
        a, b = (adapters.get(f"{layer}.lora_{matrix}") for matrix in "ab")
        if a is not None:
            weights[name] = weights[name].detach() + SCALE * b @ a
    expected_loss = (functional_call(plain, weights, ids).logits * weighting).sum()
    expected = torch.autograd.grad(expected_loss, list(adapters.values()))

    loss = (model(ids).logits * weighting).sum()
    loss.backward()
    torch.testing.assert_close(loss, expected_loss, rtol=1e-10, atol=0)
    for (name, _), gradient in zip(adapters.items(), expected, strict=True):
        assert gradient.norm() > 0
        got = model.get_parameter(name).grad
        assert (got - gradient).norm() < 1e-10 * gradient.norm(), name
    assert all(p.grad is None for name, p in model.named_parameters() if name not in adapters)


def test_a_frozen_head_costs_no_gradient() -> None:
    """It is the largest matrix of all: for Qwen2.5-7B its gradient would take 2 GB in float32."""
    model = add_adapters(tiny_model("qwen2", seed := fresh_seed()), RANK, ALPHA, torch.float32)
    draw_adapters(model, seed)
    made = []

    class Shapes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            made.extend([result.shape] if isinstance(result, Tensor) else [])
            return result

    prompt, *completions = tiny_prompts((5, 4, 1, 6), seed)
    logprobs = torch.cat(completion_logprobs(model, prompt, completions))
    with Shapes():
        logprobs.sum().backward()
    assert made and model.lm_head.weight.shape not in made
    assert adapted_layers(model)[0].lora_b.grad.norm() > 0


# --- merged --------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_the_copy_that_generates_is_merged(ranks: Ranks, family: str) -> None:
    seed = fresh_seed()
    policy = adapted_policy(ranks, family, seed, torch.float32)
    copy = plain_copy(policy)
    addresses = [p.data_ptr() for p in copy.parameters()]
    kinds = {type(m) for m in tiny_model(family).modules()}
    assert {type(m) for m in copy.modules()} == kinds and not adapted_layers(copy)
    before = row_logprobs(copy, seed)
    move_adapters(policy, seed)
    assert plain_copy(policy) is copy
    assert [p.data_ptr() for p in copy.parameters()] == addresses
    merged = row_logprobs(copy, seed)
    assert (merged - before).abs().max() > 0.01
    torch.testing.assert_close(merged, row_logprobs(policy, seed), rtol=0, atol=1e-5)


def test_a_merged_weight_is_rounded_once(ranks: Ranks) -> None:
    """To round B A to bfloat16 before it is added would change three weights in a hundred."""
    policy = adapted_policy(ranks, "qwen2", seed := fresh_seed(), torch.bfloat16)
    move_adapters(policy, seed, size=0.01)
    wrong, wrong_if_twice = [], []
    for name, weight in plain_copy(policy).named_parameters():
        if not name.endswith("proj.weight"):
            assert torch.equal(weight, full(policy.get_parameter(name)))
            continue
        layer = policy.get_submodule(name.removesuffix(".weight"))
        w, a, b = (full(p).double() for p in (layer.weight, layer.lora_a, layer.lora_b))
        exact = (w + SCALE * b @ a).bfloat16()
        twice = (w + (SCALE * b @ a).bfloat16().double()).bfloat16()
        wrong.append((weight != exact).flatten())
        wrong_if_twice.append((twice != exact).flatten())
    # float32 sums round another way than float64 ones only next to the middle of two numbers.
    assert torch.cat(wrong).double().mean() < 1e-3
    assert torch.cat(wrong_if_twice).double().mean() > 1e-2


def test_the_exported_policy_is_merged(ranks: Ranks, tmp_path: Path) -> None:
    policy = adapted_policy(ranks, "llama", seed := fresh_seed(), torch.float32)
    move_adapters(policy, seed)

    class NoTokenizer:
        def save_pretrained(self, folder: Path) -> None: ...

    export_policy(plain_copy(policy), NoTokenizer(), [7], tmp_path / "policy")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "policy")
    assert torch.equal(row_logprobs(loaded, seed), row_logprobs(plain_copy(policy), seed))
    assert (row_logprobs(loaded, seed) - row_logprobs(policy, seed)).abs().max() < 1e-5


# --- training ------------------------------------------------------------------------------------


def make_trainer(
    ranks: Ranks, seed: int, dtype: torch.dtype, *, gradient_checkpointing: bool = True
) -> Trainer:
    policy = adapted_policy(ranks, "qwen2", seed, dtype)
    return Trainer(
        config=Config(
            rollout=RolloutConfig(temperature=0.7),
            grpo=GRPOConfig(kl_coef=0.1),
            train=TrainConfig(
                learning_rate=1e-2,
                warmup_fraction=0.0,
                learning_rate_decay="constant",
                gradient_checkpointing=gradient_checkpointing,
            ),
        ),
        ranks=ranks,
        policy=policy,
        reference=policy,
        tokenizer=None,
        stop_ids=[7],
        reward=None,
        steps=3,
    )


def some_groups(seed: int) -> list[list[Sample]]:
    """Two groups with advantages set by hand."""
    lengths, advantages = (5, 4, 2, 6, 3, 1), (1.2, -0.4, -0.8)
    groups = []
    for number in range(2):
        prompt, *rest = tiny_prompts(lengths[: 4 + number], seed + number)
        group = Group(
            Prompt(number, "", prompt, {}),
            [
                Completion(ids, [0.0] * len(ids), "stop", advantage=a)
                for ids, a in zip(rest, advantages, strict=False)
            ],
        )
        groups.append([Sample(prompt, c) for c in group.completions])
    return groups


@pytest.mark.parametrize("dtype", DTYPES)
def test_updates_move_the_adapters_alone_and_the_reference_stays(
    ranks: Ranks, dtype: torch.dtype
) -> None:
    """KL is exactly 0 before the first update, the reference the base after any number of them."""
    seed = fresh_seed()
    trainer, groups = make_trainer(ranks, seed, dtype), some_groups(seed)
    policy = trainer.policy
    before = {name: full(p).clone() for name, p in policy.named_parameters()}
    base = row_logprobs(shard(tiny_model("qwen2", seed), ranks, dtype), seed)
    kl = []
    for number in range(3):
        trainer.remember_reference(groups)
        kl.append(trainer.update_on(trainer.minibatch(groups), number)["kl"])
    assert kl[0] == 0.0 and min(kl[1:]) > 1e-4
    for name, parameter in policy.named_parameters():
        assert torch.equal(full(parameter), before[name]) == ("lora_" not in name), name
    with adapters_off(policy):
        assert torch.equal(row_logprobs(policy, seed), base)
    state, [stepped] = trainer.optimizer.state, trainer.optimizer.param_groups
    trained = {id(p) for p in policy.parameters() if p.requires_grad}
    assert set(map(id, state)) == set(map(id, stepped["params"])) == trained
    assert {s["exp_avg"].dtype for s in state.values()} == {torch.float32}


def test_recomputed_activations_give_the_same_gradient(ranks: Ranks) -> None:
    seed = fresh_seed()
    moved = []
    for recompute in (True, False):
        trainer = make_trainer(ranks, seed, torch.float32, gradient_checkpointing=recompute)
        move_adapters(trainer.policy, seed)
        trainer.optimizer = torch.optim.SGD(trainer.policy.parameters(), lr=1e-2)
        groups = some_groups(seed)
        trainer.remember_reference(groups)
        trainer.update_on(trainer.minibatch(groups), 0)
        moved.append([full(p) for p in trainer.policy.parameters() if p.requires_grad])
    for a, b in zip(*moved, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-7)


# --- kept ----------------------------------------------------------------------------------------


def test_a_checkpoint_holds_what_is_trained(ranks: Ranks, tmp_path: Path) -> None:
    seed = fresh_seed()
    trainer, groups = make_trainer(ranks, seed, torch.bfloat16), some_groups(seed)
    trainer.remember_reference(groups)
    trainer.update_on(trainer.minibatch(groups), 0)
    tensors = tensors_of(trainer.policy, trainer.optimizer)
    assert all(".lora_" in name for name in tensors)
    trained = sum(p.numel() for p in trainer.policy.parameters() if p.requires_grad)
    assert sum(t.numel() for name, t in tensors.items() if "step" not in name) == 3 * trained
    folder = tmp_path / "step-000001"
    save_checkpoint(folder, trainer.policy, trainer.optimizer, {}, ranks)

    other = make_trainer(ranks, seed, torch.bfloat16)
    move_adapters(other.policy, seed)
    load_checkpoint(folder, other.policy, other.optimizer)
    for each in (trainer, other):
        again = some_groups(seed + 1)
        each.remember_reference(again)
        each.update_on(each.minibatch(again), 1)
    pairs = zip(trainer.policy.parameters(), other.policy.parameters(), strict=True)
    assert all(torch.equal(full(a), full(b)) for a, b in pairs)

    wider = shard(
        add_adapters(tiny_model("qwen2"), 5, ALPHA, torch.bfloat16), ranks, torch.bfloat16
    )
    draw_adapters(wider, seed)
    for model in (wider, shard(tiny_model("qwen2"), ranks, torch.bfloat16)):
        with pytest.raises(ConfigError, match="^--resume: .*policy.lora_rank.*$"):
            load_checkpoint(folder, model, trainer.optimizer)


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["train.py", *arguments])
    monkeypatch.delenv("RANK", raising=False)
    train.main()


SMALL = {
    "policy.lora_rank": 3,
    "reward": "any_reward:any_reward",
    "train.learning_rate": 4e-3,
    "train.steps": 3,
    "grpo.prompts_per_step": 2,
    "grpo.group_size": 4,
    "rollout.max_completion_tokens": 16,
    "data.heldout_records": 2,
    "checkpoint.every": 1,
}


class Killed(BaseException):
    """What no part of a run catches."""


@pytest.mark.slow
def test_a_resumed_run_is_the_same_to_the_last_bit(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "any_reward.py").write_text(
        "from zlib import crc32\n"
        "def any_reward(completions, **columns):\n"
        "    return [crc32(text.encode()) / 2**32 for text in completions]\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    settings = [f"--{name}={value}" for name, value in SMALL.items()]
    settings.append(f"--seed={(seed := fresh_seed())}")
    seeds = []

    def draw(model: PreTrainedModel, seed: int) -> None:
        seeds.append(seed)
        draw_adapters(model, seed)

    monkeypatch.setattr(train, "draw_adapters", draw)
    run(monkeypatch, *settings, f"--output={whole}")
    assert seeds == [seed]
    original = Trainer.update

    def die_in_the_third(self: Trainer, step: int) -> dict:
        if step == 2:
            raise Killed
        return original(self, step)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Trainer, "update", die_in_the_third)
        run(patch, *settings, f"--output={stopped}")
    run(monkeypatch, f"--resume={stopped}")
    for file in ("rollouts.jsonl", "heldout.jsonl", "policy/model.safetensors"):
        assert (whole / file).read_bytes() == (stopped / file).read_bytes(), file
    first, second = (
        [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        for folder in (whole, stopped)
    )
    assert [m["kl"] > 0 for m in first] == [False, True, True]
    for a, b in zip(first, second, strict=True):
        timeless = [{k: v for k, v in m.items() if not k.startswith("seconds")} for m in (a, b)]
        assert timeless[0] == timeless[1]


# --- what a user may get wrong -------------------------------------------------------------------


@pytest.mark.parametrize("setting", [{"lora_rank": -1}, {"lora_alpha": 0.0}])
def test_settings_out_of_range(setting: dict) -> None:
    with pytest.raises(ConfigError, match=f"^{next(iter(setting))} = "):
        PolicyConfig(**setting)


def test_a_rank_above_the_smallest_side_is_refused_in_one_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tiny_model("llama")  # keys and values are [32, 64]
    add_adapters(model, 32, ALPHA, torch.float32)
    with pytest.raises(ConfigError, match="^policy.lora_rank = 33: must be at most 32, [^\n]*$"):
        add_adapters(tiny_model("llama"), 33, ALPHA, torch.float32)
    with pytest.raises(SystemExit) as ended:
        run(monkeypatch, "--policy.lora_rank=4096", f"--output={tmp_path / 'run'}")
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith("error: policy.lora_rank = 4096: must be at most ")

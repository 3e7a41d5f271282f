"""What must hold on CUDA, checked there: each function raises where it does not."""

import gc
import tempfile
import warnings
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor
from transformers import (
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from grpo import decoding, generation
from grpo.config import Config
from grpo.config_loader import fill
from grpo.decoding import uses_graphs
from grpo.generation import generate_groups
from grpo.logprobs import completion_logprobs
from grpo.lora import add_adapters, draw_adapters
from grpo.parallel import Ranks, pick_device, start_ranks
from grpo.plan import Machine, make_plan
from grpo.rollout import Completion, Prompt
from grpo.sampling import Sampling
from grpo.sharding import frozen_copy, shard
from grpo.trainer import Trainer
from grpo.tree_attention import FLEX_TOLERANCE, compare_flex, compiled_flex

LENGTHS = (5, 170, 1, 33, 140)


def small_model(dtype: torch.dtype) -> PreTrainedModel:
    """A random Qwen3 whose distributions are not flat."""
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=997,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=1024,
        initializer_range=0.15,
        eos_token_id=None,
        pad_token_id=None,
    )
    return Qwen3ForCausalLM(config).eval().to("cuda", dtype)


def prompts() -> list[list[int]]:
    """Of mixed lengths."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(1, 997, (n,), generator=generator).tolist() for n in LENGTHS]


def generated(model: PreTrainedModel, sampling: Sampling) -> list[list[Completion]]:
    """Completions that end at various lengths, in fewer rows than there are completions."""
    return generate_groups(
        model,
        prompts(),
        group_size=4,
        max_new_tokens=[[200, 60, 140, 17]] * len(LENGTHS),
        sampling=sampling,
        stop_ids=[7],
        max_rows=12,
    )


def check_graphs() -> None:
    """Replayed steps give the tokens of steps that run as they are, and were really recorded."""
    model = small_model(torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a warning tells that recording failed
        generated(model, Sampling())
        replayed = generated(model, Sampling())
        assert replayed == generated(model, Sampling()), "the same call gave other bits"
    graphs = generation.KEPT[model].graphs
    assert graphs is not None and graphs.replays, "no step was recorded"
    for module in (decoding, generation):
        module.uses_graphs = lambda device: False  # type: ignore[attr-defined]
    try:
        plain = generated(model, Sampling())
    finally:
        for module in (decoding, generation):
            module.uses_graphs = uses_graphs  # type: ignore[attr-defined]
    pairs = list(zip(sum(plain, []), sum(replayed, []), strict=True))
    equal = sum(a.token_ids == b.token_ids for a, b in pairs)
    # Windows differ in width: a rounding may cross a boundary of the distribution, rarely.
    assert equal >= 0.8 * len(pairs), f"only {equal} of {len(pairs)} completions are equal"


def check_greedy() -> None:
    """In float32, greedy completions are those of `model.generate`."""
    model = small_model(torch.float32)
    ours = generate_groups(
        model, prompts(), group_size=2, max_new_tokens=48, sampling=Sampling(0.0), stop_ids=[7]
    )
    model.set_attn_implementation("sdpa")
    for prompt, group in zip(prompts(), ours, strict=True):
        ids = torch.tensor([prompt], device="cuda")
        theirs = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=48,
            do_sample=False,
            eos_token_id=7,
            pad_token_id=0,
        )
        for completion in group:
            assert completion.token_ids == theirs[0, len(prompt) :].tolist()


def check_flex() -> None:
    """FlexAttention gives what attention by trees gives, output and gradients."""
    for heads, key_value_heads, size in ((8, 2, 64), (28, 4, 128)):
        for dtype in (torch.float32, torch.bfloat16):
            device = torch.device("cuda")
            worst = compare_flex(compiled_flex(), device, dtype, heads, key_value_heads, size)
            assert worst <= FLEX_TOLERANCE, f"FlexAttention differs by {worst:.2g} in {dtype}"


def check_logprobs() -> None:
    """Log-probs of packed rows, and their gradients, are those of the same model on a CPU."""
    model = small_model(torch.float32)
    prompt = prompts()[1]
    completions = [[5] * 40, [6], [3, 9] * 50]

    def run(on: PreTrainedModel) -> tuple[Tensor, Tensor]:
        values = torch.cat(completion_logprobs(on, prompt, completions, temperature=0.7))
        gradients = torch.autograd.grad(values.sum(), list(on.parameters()))
        return values.detach().cpu(), torch.cat([g.flatten() for g in gradients]).cpu()

    values, gradient = run(model)
    expected_values, expected_gradient = run(model.cpu())
    worst = float((values - expected_values).abs().max())
    relative = float((gradient - expected_gradient).norm() / expected_gradient.norm())
    assert worst <= 2e-3 and relative <= 1e-2, f"log-probs {worst:.2g}, gradient {relative:.2g}"


def check_recorded() -> None:
    """What generation recorded agrees with what is scored first, in float32 and in bfloat16."""
    for dtype, most, mean in ((torch.float32, 1e-3, 1e-5), (torch.bfloat16, 0.5, 0.02)):
        model = small_model(dtype)
        differences = []
        for prompt, group in zip(prompts(), generated(model, Sampling()), strict=True):
            with torch.no_grad():
                scored = completion_logprobs(model, prompt, [c.token_ids for c in group])
            for completion, logprobs in zip(group, scored, strict=True):
                differences.append(torch.tensor(completion.logprobs) - logprobs.cpu())
        difference = torch.cat(differences).abs()
        found = f"{difference.mean():.2g}, at most {difference.max():.2g}, in {dtype}"
        assert difference.max() <= most, f"log-probs differ by {found}"
        assert difference.mean() <= mean, f"log-probs differ by {found}"


def check_no_waiting() -> None:
    """A step that is replayed or run never makes the host wait for the device."""
    model = small_model(torch.bfloat16)
    generated(model, Sampling())
    decoder = generation.KEPT[model]
    assert decoder.graphs is not None
    window = next(iter(decoder.graphs.replays))
    with torch.inference_mode():
        torch.cuda.set_sync_debug_mode("error")
        try:
            decoder.run(window)
            decoder.step(window)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def check_plan() -> None:
    """What --plan says of a step is within 15 % of the most that the allocator has given out."""
    config = fill(
        Config(),
        {
            "rollout.max_prompt_tokens": 256,
            "rollout.max_completion_tokens": 256,
            "data.heldout_records": 1,
            "train.tokens_per_row": 4096,
        },
    )
    shape = Qwen2Config(
        vocab_size=32000,
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=12,
        num_attention_heads=16,
        num_key_value_heads=4,
        architectures=["Qwen2ForCausalLM"],
        eos_token_id=None,
        pad_token_id=None,
    )
    for change in ({}, {"train.gradient_checkpointing": False}, {"policy.lora_rank": 16}):
        changed = fill(config, change)
        with tempfile.TemporaryDirectory() as folder:
            shape.save_pretrained(folder)
            planned = make_plan(changed, folder, Machine(1, 1, 80)).peak
        measured = peak_of_a_step(changed, shape)
        found = f"{planned.total / 1e9:.2f} GB ({planned.name}) planned, {measured / 1e9:.2f} used"
        print(f"       {change}: {found}", flush=True)
        assert abs(planned.total / measured - 1) <= 0.15, f"{change}: {found}"


def peak_of_a_step(config: Config, shape: Qwen2Config, device: str = "cuda") -> int:
    """Most bytes that the allocator gives out in a second step, all of whose completions are as
    long as they may be."""
    gc.collect()
    before = torch.cuda.memory_allocated() if device == "cuda" else 0
    with start_ranks(pick_device(device)) as ranks:
        trainer = make_trainer(config, shape, ranks)
        tokens = [7] * config.rollout.max_prompt_tokens
        for step in range(2):
            if device == "cuda":
                torch.cuda.reset_peak_memory_stats()
            records = range(config.grpo.prompts_per_step)
            trainer.rollout(step, [Prompt(i, "", tokens, {}) for i in records])
            trainer.update(step)
        return torch.cuda.max_memory_allocated() - before if device == "cuda" else 0


def make_trainer(config: Config, shape: Qwen2Config, ranks: Ranks) -> Trainer:
    """A trainer of random weights. No token stops a completion; its first decides its reward."""
    dtype = getattr(torch, config.policy.compute_dtype)
    torch.manual_seed(0)
    with ranks.device:
        model = Qwen2ForCausalLM(shape)
    if config.policy.lora_rank:
        add_adapters(model, config.policy.lora_rank, config.policy.lora_alpha, dtype)
    policy = shard(model, ranks, dtype)
    draw_adapters(policy, seed=0)

    class Numbers:
        def decode(self, token_ids: list[int], **_: object) -> str:
            return str(token_ids[0])

    def reward(prompts: list[str], completions: list[str], **_: object) -> list[float | None]:
        return [float(text) for text in completions]

    return Trainer(
        config=config,
        ranks=ranks,
        policy=policy,
        reference=policy if config.policy.lora_rank else frozen_copy(policy),
        tokenizer=cast(Any, Numbers()),
        stop_ids=[shape.vocab_size],
        reward=reward,
        steps=2,
    )


CHECKS: list[Callable[[], None]] = [
    check_greedy,
    check_flex,
    check_logprobs,
    check_recorded,
    check_graphs,
    check_no_waiting,
    check_plan,
]


def run_all() -> None:
    """Run every check and say so. Raises AssertionError at the first that fails."""
    torch.backends.cuda.matmul.allow_tf32 = False
    for check in CHECKS:
        check()
        first_line = (check.__doc__ or "").partition("\n")[0]
        print(f"right: {first_line}", flush=True)

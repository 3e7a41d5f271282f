"""Tiny random models and prompts for tests, and the seed they come from."""

import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

ROOT = Path(__file__).parent.parent
VOCABULARY = 97
FAMILIES = {
    "llama": (LlamaConfig, LlamaForCausalLM, {}),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {"tie_word_embeddings": False}),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {"head_dim": 32}),
}


def fresh_seed() -> int:
    """A new seed each time, printed for a failure's report; PERM_GRPO_TEST_SEED repeats one."""
    seed = int(os.environ.get("PERM_GRPO_TEST_SEED", random.SystemRandom().randrange(2**31)))
    print(f"PERM_GRPO_TEST_SEED={seed}")
    return seed


def tiny_model(
    family: str = "llama", seed: int = 0, dtype: torch.dtype = torch.float32
) -> PreTrainedModel:
    """A random causal LM with grouped-query heads whose next-token distributions are not flat."""
    config_class, model_class, extra = FAMILIES[family]
    config = config_class(
        **{
            "vocab_size": VOCABULARY,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 512,
            "tie_word_embeddings": True,
            "bos_token_id": None,
            "eos_token_id": None,
            "pad_token_id": None,
            **extra,
        }
    )
    model = model_class(config).eval()
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.15
    return model.to(dtype)


def tiny_prompts(lengths: tuple[int, ...], seed: int) -> list[list[int]]:
    """Random token ids, one prompt per length."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(VOCABULARY, (n,), generator=generator).tolist() for n in lengths]


def torchrun(processes: int, *command: Any, **options: Any) -> subprocess.CompletedProcess:
    """A script and its arguments under torchrun, or (1 process) without it."""
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
    environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    settings = {"check": True, "timeout": 300, "env": environment, "cwd": ROOT} | options
    return subprocess.run([*launcher, *map(str, command)], **settings)


class Float64RMSNorm(nn.Module):
    """RMSNorm computed in the type of its input; transformers' own computes in float32 always."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.weight, self.epsilon = norm.weight, norm.variance_epsilon

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.epsilon)


def patch_norms(module: nn.Module) -> None:
    """Replace every RMSNorm of a model, in place, by one that keeps float64."""
    for name, child in list(module.named_children()):
        if type(child).__name__.endswith("RMSNorm"):
            setattr(module, name, Float64RMSNorm(child))
        else:
            patch_norms(child)

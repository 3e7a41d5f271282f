"""The presets that ship with the package, filled into what train.py configures."""

import tomllib
from dataclasses import dataclass, field

import pytest

from grpo.config import Config, load_config, to_dict
from grpo.config_loader import PRESETS
from perm_reward import JudgeConfig, RewardConfig

NAMES = sorted(path.stem for path in PRESETS.glob("*.toml"))


@dataclass
class RunConfig(Config):
    """A run with PERM's reward."""

    perm: RewardConfig = field(default_factory=RewardConfig)
    judge: JudgeConfig = field(default_factory=JudgeConfig)


def load(preset: str) -> RunConfig:
    return load_config(RunConfig, ["--preset", preset])


def test_the_presets() -> None:
    assert NAMES == ["quickstart", "qwen2.5-7b", "smollm2-135m"]
    models = {name: load(name).policy.model for name in NAMES}
    assert models == {
        "quickstart": "embedded",
        "qwen2.5-7b": "Qwen/Qwen2.5-7B-Instruct",
        "smollm2-135m": "HuggingFaceTB/SmolLM2-135M-Instruct",
    }


@pytest.mark.parametrize("name", ["quickstart", "smollm2-135m"])
def test_presets_for_a_first_try_need_no_key(name: str) -> None:
    assert load(name).judge.kind == "lexical"


@pytest.mark.parametrize("name", NAMES)
def test_the_length_term_can_be_felt(name: str) -> None:
    """A limit at or above the longest completion would switch the length term off unseen."""
    config = load(name)
    assert config.perm.length_limit < config.rollout.max_completion_tokens


def test_the_papers_run() -> None:
    """The figures of arXiv 2601.10532 and its code, written in the preset and not only implied."""
    paper = {
        "seed": 42,
        "reward": "perm",
        "policy": {"model": "Qwen/Qwen2.5-7B-Instruct", "compute_dtype": "bfloat16"},
        "rollout": {
            "max_prompt_tokens": 1024,
            "max_completion_tokens": 1024,
            "temperature": 1.0,
            "top_p": 1.0,
        },
        "grpo": {
            "group_size": 8,
            "prompts_per_step": 8,
            "objective": "dapo",
            "clip_low": 0.2,
            "clip_high": 0.2,
            "kl_coef": 0.01,
            "kl_estimator": "k3",
            "advantage_scale": "group",
        },
        "train": {
            "steps": 0,
            "learning_rate": 1e-6,
            "warmup_fraction": 0.1,
            "learning_rate_decay": "linear",
            "adam_beta1": 0.9,
            "adam_beta2": 0.999,
            "adam_epsilon": 1e-8,
            "weight_decay": 0.0,
            "max_gradient_norm": 1.0,
            "gradient_checkpointing": True,
        },
        "perm": {
            "aggregation": "harmonic",
            "bystander_weight": 0.5,
            "length_limit": 768,
            "length_penalty": 0.001,
        },
        "judge": {
            "kind": "openai",
            "model": "gpt-4o-mini",
            "temperature": 0.3,
            "top_p": 0.9,
            "max_tokens": 1024,
        },
    }
    assert tomllib.loads((PRESETS / "qwen2.5-7b.toml").read_text()) == paper


def test_the_defaults_are_the_papers() -> None:
    """Policy, judge and the clip's spelling aside, the paper's preset changes no default."""
    run = to_dict(load("qwen2.5-7b"))
    default = to_dict(RunConfig())
    assert run["seed"] == default["seed"]
    changed = {
        f"{section}.{name}"
        for section, settings in run.items()
        if isinstance(settings, dict)
        for name, value in settings.items()
        if value != default[section][name]
    }
    assert changed == {
        "policy.model",
        "grpo.clip_low",
        "grpo.clip_high",
        "judge.kind",
    }

"""AdamW and its learning rate."""

import math

import torch
from transformers import PreTrainedModel

from grpo.config import TrainConfig


def make_optimizer(model: PreTrainedModel, config: TrainConfig) -> torch.optim.Optimizer:
    """AdamW over the (sharded, float32) parameters that are trained."""
    return torch.optim.AdamW(
        [parameter for parameter in model.parameters() if parameter.requires_grad],
        lr=config.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_epsilon,
        weight_decay=config.weight_decay,
        fused=True,
    )


def set_learning_rate(
    optimizer: torch.optim.Optimizer, config: TrainConfig, step: int, steps: int
) -> float:
    """Set and return the learning rate of a step, counted from 0."""
    rate = config.learning_rate * learning_rate_factor(config, step, steps)
    for group in optimizer.param_groups:
        group["lr"] = rate
    return rate


def learning_rate_factor(config: TrainConfig, step: int, steps: int) -> float:
    """The part of the highest learning rate that step `step` of `steps` has, in (0, 1].

    Warm-up:  (step + 1) / warm-up steps, so that the first step already learns.
    After it, with x running from 0 towards 1:  linear 1 − x,  cosine (1 + cos πx) / 2,  constant 1.
    """
    warmup = math.ceil(config.warmup_fraction * steps)
    if step < warmup:
        return (step + 1) / warmup
    x = (step - warmup) / max(1, steps - warmup)
    if config.learning_rate_decay == "linear":
        return 1 - x
    if config.learning_rate_decay == "cosine":
        return (1 + math.cos(math.pi * x)) / 2
    return 1.0

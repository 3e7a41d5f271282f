"""What a run is made of: one dataclass per section, each field's docstring beneath it.

Defaults are the figures of PERM (arXiv 2601.10532). Each section checks its own ranges, `Config`
what no section can see alone. config_loader.py fills them from presets, a file and the command
line:

    config = load_config(Config, sys.argv[1:])
"""

from dataclasses import dataclass, field
from typing import Any, Literal

from grpo.config_loader import (
    ConfigError,
    Flags,
    load_config,
    read_flags,
    spell,
    to_dict,
    to_toml,
)

__all__ = ["Config", "ConfigError", "Flags", "load_config", "read_flags", "to_dict", "to_toml"]


def check(section: Any, name: str, holds: bool, allowed: str) -> None:
    """Raise ConfigError "name = value: must be allowed" unless the condition holds."""
    if not holds:
        raise ConfigError(f"{name} = {spell(getattr(section, name))}: must be {allowed}")


@dataclass
class PolicyConfig:
    """The model that is trained."""

    model: str = "embedded"
    """hub name or folder of a causal LM; embedded: the tiny one that ships with the package"""
    compute_dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """type of the forward and backward pass; trained weights are kept in float32 either way"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """where to train; auto: cuda where there is one, else cpu"""
    sharding: Literal["full", "hybrid"] = "full"
    """what the weights are sharded over: all processes, or (hybrid) those of each node, where
    between nodes only gradients travel"""
    offload_reference: bool = False
    """keep the reference in the memory of the CPU between its passes"""
    lora_rank: int = 0
    """train adapters of this rank beside frozen weights, see lora.py; 0: train the weights"""
    lora_alpha: float = 32.0
    """adapters are scaled by lora_alpha / lora_rank, so that a learning rate that suits one rank
    suits another; to double it is much like doubling the learning rate"""

    def __post_init__(self) -> None:
        check(self, "model", bool(self.model), "a hub name, a folder or embedded")
        check(self, "lora_rank", self.lora_rank >= 0, "0 (off) or more")
        check(self, "lora_alpha", self.lora_alpha > 0, "above 0")


@dataclass
class DataConfig:
    """The seekers' records that become prompts."""

    train: str = "bundled"
    """JSONL file of records to train on; bundled: the sample that ships with the package"""
    heldout: str = ""
    """JSONL file of held-out records; empty: the bundled ones, or a part kept out of your file"""
    heldout_records: int = 64
    """how many held-out records are evaluated, where there are so many"""

    def __post_init__(self) -> None:
        check(self, "train", bool(self.train), "a JSONL file or bundled")
        check(self, "heldout_records", self.heldout_records >= 1, "at least 1")


@dataclass
class RolloutConfig:
    """How completions are sampled."""

    max_prompt_tokens: int = 1024
    """longest prompt"""
    max_completion_tokens: int = 1024
    """longest completion; sampling stops there if no stop token came before"""
    temperature: float = 1.0
    """divides the logits, in sampling and in every log-prob alike"""
    top_k: int = 0
    """keep the k likeliest tokens; training takes only 0 (off)"""
    top_p: float = 1.0
    """keep the likeliest tokens that hold this probability; training takes only 1 (off)"""
    min_p: float = 0.0
    """drop tokens below this part of the likeliest one's; training takes only 0 (off)"""
    max_rows: int = 64
    """completions decoded at once; bounds the memory of the key-value cache"""
    keep_weights: bool = True
    """keep the copy that generates from one rollout to the next; false: its memory is free in
    between, and it is made anew for each"""
    ahead: int = 0
    """1: generate the next step's completions while the judges still read this one's; the policy is
    one update older then than the one that learns from them"""

    def __post_init__(self) -> None:
        check(self, "max_prompt_tokens", self.max_prompt_tokens >= 1, "at least 1")
        check(self, "max_completion_tokens", self.max_completion_tokens >= 1, "at least 1")
        above_0 = "above 0 (greedy completions of a group are all alike)"
        check(self, "temperature", self.temperature > 0, above_0)
        why = "in training (a filter in sampling that the log-probs do not have biases the ratio)"
        check(self, "top_k", self.top_k == 0, f"0 {why}")
        check(self, "top_p", self.top_p == 1, f"1 {why}")
        check(self, "min_p", self.min_p == 0, f"0 {why}")
        check(self, "max_rows", self.max_rows >= 1, "at least 1")
        check(self, "ahead", self.ahead in (0, 1), "0 or 1")


@dataclass
class GRPOConfig:
    """Groups, advantages and the loss."""

    group_size: int = 8
    """completions sampled per prompt (G); their mean reward is the baseline"""
    prompts_per_step: int = 8
    """prompts per rollout, over all ranks together"""
    updates_per_rollout: int = 1
    """updates made on each rollout, every one on its share of the prompts (a minibatch)"""
    objective: Literal["grpo", "dapo", "dr_grpo", "gspo", "cispo"] = "dapo"
    """form of the loss: how ratios are clipped and what the sum is divided by"""
    clip_low: float | None = None
    """the ratio is clipped at 1 - clip_low; none: the objective's own; no clip acts with
    one update per rollout: the ratio is 1 then"""
    clip_high: float | None = None
    """the ratio is clipped at 1 + clip_high (cispo: at clip_high); none: the objective's own;
    does not act with one update per rollout"""
    dual_clip: float | None = None
    """bound on the ratio where the advantage is negative, such as 3; none: no bound; does not act
    with one update per rollout"""
    kl_coef: float = 0.01
    """weight of the KL term towards the reference policy (beta); 0: no reference is kept"""
    kl_estimator: Literal["k2", "k3", "k3_is"] = "k3"
    """estimator of the KL term in the loss"""
    importance_cap: float | None = None
    """weigh each token by trainer's / rollout's probability, at most this, such as 2; none: off"""
    advantage_scale: Literal["group", "batch", "none"] = "group"
    """rewards minus the group's mean, divided by the std of the group, of the batch, or by none"""

    def __post_init__(self) -> None:
        no_group = "at least 2 (a group of one has no baseline)"
        check(self, "group_size", self.group_size >= 2, no_group)
        check(self, "prompts_per_step", self.prompts_per_step >= 1, "at least 1")
        updates, prompts = self.updates_per_rollout, self.prompts_per_step
        divides = updates >= 1 and prompts % updates == 0
        whole_share = f"a divisor of prompts_per_step ({prompts})"
        check(self, "updates_per_rollout", divides, whole_share)
        clip_low, clip_high = self.clip_low, self.clip_high
        check(self, "clip_low", clip_low is None or 0 <= clip_low <= 1, "0 to 1, or none")
        check(self, "clip_high", clip_high is None or clip_high >= 0, "0 or more, or none")
        above_1 = "above 1 (it bounds the ratio), or none"
        check(self, "dual_clip", self.dual_clip is None or self.dual_clip > 1, above_1)
        check(self, "kl_coef", self.kl_coef >= 0, "0 or more")
        cap = self.importance_cap
        check(self, "importance_cap", cap is None or cap >= 1, "at least 1, or none")


@dataclass
class TrainConfig:
    """The optimiser and its schedule."""

    steps: int = 0
    """rollouts; 0: one epoch over the records"""
    learning_rate: float = 1e-6
    """highest learning rate, reached at the end of warm-up"""
    warmup_fraction: float = 0.1
    """part of the steps in which the learning rate rises from 0"""
    learning_rate_decay: Literal["linear", "constant", "cosine"] = "linear"
    """how the learning rate goes on after warm-up; linear and cosine end at 0"""
    adam_beta1: float = 0.9
    """AdamW: decay of the mean of gradients"""
    adam_beta2: float = 0.999
    """AdamW: decay of the mean of squared gradients"""
    adam_epsilon: float = 1e-8
    """AdamW: added to the denominator"""
    weight_decay: float = 0.0
    """AdamW: decoupled weight decay"""
    max_gradient_norm: float = 1.0
    """gradients with a larger norm are scaled down to it"""
    tokens_per_row: int = 8192
    """tokens run through the model at once: short groups are packed together, long ones split"""
    gradient_checkpointing: bool = True
    """recompute activations in the backward pass: less memory, more time"""
    max_unscored: float = 0.2
    """largest part of a step's completions that may lack a reward; above it training pauses,
    and they are judged again"""
    max_skipped: int = 3
    """updates in a row with a loss or gradient that is not finite, and so not made, after which
    the run stops"""
    patience_seconds: float = 1800.0
    """how long training pauses in all for judges that fail; then it stops, everything saved"""

    def __post_init__(self) -> None:
        check(self, "steps", self.steps >= 0, "0 (one epoch) or more")
        check(self, "tokens_per_row", self.tokens_per_row >= 1, "at least 1")
        check(self, "learning_rate", self.learning_rate > 0, "above 0")
        check(self, "warmup_fraction", 0 <= self.warmup_fraction <= 1, "0 to 1")
        for beta in ("adam_beta1", "adam_beta2"):
            check(self, beta, 0 <= getattr(self, beta) < 1, "at least 0 and below 1")
        check(self, "adam_epsilon", self.adam_epsilon > 0, "above 0")
        check(self, "weight_decay", self.weight_decay >= 0, "0 or more")
        check(self, "max_gradient_norm", self.max_gradient_norm > 0, "above 0")
        check(self, "max_unscored", 0 <= self.max_unscored <= 1, "0 to 1")
        check(self, "max_skipped", self.max_skipped >= 1, "at least 1")
        check(self, "patience_seconds", self.patience_seconds >= 0, "0 or more seconds")


@dataclass
class EvaluationConfig:
    """How the held-out records are watched."""

    every: int = 0
    """steps between evaluations; 0: only before the first step and after the last"""
    samples: int = 1
    """completions per held-out record"""

    def __post_init__(self) -> None:
        check(self, "every", self.every >= 0, "0 or more")
        check(self, "samples", self.samples >= 1, "at least 1")


@dataclass
class CheckpointConfig:
    """From where a run that was stopped goes on."""

    every: int = 10
    """steps between checkpoints; 0: only after the last step"""
    keep: int = 2
    """newest checkpoints that are kept, beside the best by held-out reward"""

    def __post_init__(self) -> None:
        check(self, "every", self.every >= 0, "0 or more")
        check(self, "keep", self.keep >= 1, "at least 1")


@dataclass
class Config:
    """A whole run."""

    seed: int = 42
    """everything random in a run follows from it"""
    output: str = ""
    """run folder; empty: runs/<preset>-<date-time>"""
    reward: str = "perm"
    """perm, or module:function of your own, with the signature of TRL's reward functions"""
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    data: DataConfig = field(default_factory=DataConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    grpo: GRPOConfig = field(default_factory=GRPOConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)

    def __post_init__(self) -> None:
        check(self, "seed", 0 <= self.seed < 2**32, f"0 to {2**32 - 1}")
        module, colon, function = self.reward.partition(":")
        names_function = bool(module and colon and function)
        check(self, "reward", self.reward == "perm" or names_function, "perm or module:function")
        refuse_contradictions(self)


def refuse_contradictions(config: Config) -> None:
    """Raise ConfigError for settings of which each is fine alone, but not beside the other."""
    grpo, data = config.grpo, config.data
    if data.heldout == data.train:
        raise ConfigError(
            f"data.heldout = {spell(data.heldout)}: must not be data.train (held-out records are "
            "those never trained on); leave it empty to keep a part of data.train out"
        )
    if grpo.objective == "dr_grpo" and grpo.advantage_scale != "none":
        raise ConfigError(
            f"grpo.advantage_scale = {spell(grpo.advantage_scale)}: must be none with "
            "grpo.objective = dr_grpo (its advantage is reward minus mean, not divided)"
        )
    if grpo.objective == "cispo":
        if grpo.clip_high is not None and grpo.clip_high < 1:
            raise ConfigError(
                f"grpo.clip_high = {spell(grpo.clip_high)}: must be at least 1, or none, with "
                "grpo.objective = cispo (there it bounds the ratio itself)"
            )
        for name in ("clip_low", "dual_clip"):
            if getattr(grpo, name) is not None:
                raise ConfigError(
                    f"grpo.{name} = {spell(getattr(grpo, name))}: must be none with "
                    "grpo.objective = cispo (it bounds the ratio from above only)"
                )

"""What each GPU will hold, and when: `train.py --plan`, without any GPU and without weights.

What is kept (weights, gradients, moments, copies) follows from the parameters' shapes and from how
FSDP2 shards them (sharded_bytes.py); what only lives for a while is found by rehearsing it
(rehearsal.py). A plan is a list of moments, the most crowded of each phase:

    generate      completions grow
    reference     a row is scored under the reference
    log-probs     a row's log-probs, and their gradients, in the update
    layers        the backward pass through the layers
    embeddings    the last gradients, those of embeddings and head, are summed over ranks
    refill        the copy that generates gets the new weights
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from grpo.config import Config, ConfigError
from grpo.decoding import Size
from grpo.generation import Branch, size_for
from grpo.lora import add_adapters
from grpo.packing import plan_rows
from grpo.rehearsal import DecodingBytes, RowBytes, rehearse_decoding, rehearse_row
from grpo.sharded_bytes import FLOAT32, Moment, ShardedPolicy
from grpo.trainer import enable_checkpointing

GIB = 2**30
# Of a GPU's memory, for what no tensor holds: CUDA itself, NCCL's buffers, gaps between tensors.
MARGIN = 0.1
LAYERS_REHEARSED = 2  # and one more, to see what each of the others adds


@dataclass(frozen=True)
class Machine:
    """Nodes, GPUs on each of them, and GiB of memory on each GPU."""

    nodes: int
    gpus: int
    gib: float

    @property
    def ranks(self) -> int:
        """GPUs in all: one process each."""
        return self.nodes * self.gpus


@dataclass(frozen=True)
class Plan:
    """The policy's weights and how many numbers of it are trained; the moments of a step; what the
    memory of each node's CPUs must hold, in bytes by kind."""

    weights: int
    trained: int
    moments: list[Moment]
    host: dict[str, int]

    @property
    def peak(self) -> Moment:
        """The most crowded moment."""
        return max(self.moments, key=lambda moment: moment.total)

    def fits(self, machine: Machine) -> bool:
        """Whether every moment leaves the margin free."""
        return self.peak.total <= (1 - MARGIN) * machine.gib * GIB


def parse_machine(text: str, environment: Mapping[str, str] = os.environ) -> Machine:
    """The machine that "4x8x80" (nodes, GPUs, GiB), "8x80" or "80" describes.

    With the memory alone, the numbers of nodes and GPUs are those that torchrun has told this
    process, or 1. Raises ConfigError.
    """
    try:
        *counts, gib = text.split("x")
        if counts:
            gpus, nodes = int(counts[-1]), int(counts[0]) if len(counts) > 1 else 1
        else:
            ranks = int(environment.get("WORLD_SIZE", 1))
            gpus = int(environment.get("LOCAL_WORLD_SIZE", ranks))
            nodes = ranks // gpus
        machine = Machine(nodes, gpus, float(gib))
        if len(counts) > 2 or min(nodes, gpus) < 1 or not 0 < machine.gib < float("inf"):
            raise ValueError
    except ValueError as error:
        raise ConfigError(
            f"--plan {text}: must be nodes x GPUs x GiB per GPU, such as 4x8x80, or 8x80 for one "
            "node, or 80"
        ) from error
    return machine


# --- the model -----------------------------------------------------------------------------------


@cache
def read_config(name: str) -> PreTrainedConfig:
    """A model's configuration, all that is read of it. Raises ConfigError."""
    try:
        return AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{name}: no such folder, and the hub does not know it, does not give it out, or "
            "cannot be reached; --plan needs its config.json"
        ) from error


def form_of(
    config: PreTrainedConfig, dtype: torch.dtype, layers: int | None = None, lora_rank: int = 0
) -> PreTrainedModel:
    """A model without memory, with its own number of layers or another, and with adapters."""
    changed = type(config).from_dict(config.to_dict())
    text = changed.get_text_config()
    text.num_hidden_layers = layers or text.num_hidden_layers
    if getattr(text, "layer_types", None):
        text.layer_types = (text.layer_types * text.num_hidden_layers)[: text.num_hidden_layers]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(changed, dtype=dtype).eval()
        if lora_rank:
            # All in the compute type, in which FSDP2 runs it. The scale takes no memory.
            add_adapters(model, lora_rank, 1.0, dtype)
            for parameter in model.parameters():
                parameter.data = parameter.data.to(dtype)
    return model


# --- what is rehearsed ---------------------------------------------------------------------------


def beyond(two: int, three: int, layers: int) -> int:
    """What so many layers take, where two and three take that much: each adds the same."""
    return two + (layers - LAYERS_REHEARSED) * (three - two)


@cache
def row_bytes(
    name: str,
    dtype: torch.dtype,
    tokens: int,
    temperature: float,
    checkpointing: bool,
    lora_rank: int = 0,
) -> RowBytes:
    """`rehearse_row` for all layers, found with two and three of them."""
    config = read_config(name)
    found = []
    for layers in (LAYERS_REHEARSED, LAYERS_REHEARSED + 1):
        model = form_of(config, dtype, layers, lora_rank)
        if checkpointing:
            enable_checkpointing(model.train())
        found.append(vars(rehearse_row(model, tokens, temperature)))
    layers = config.get_text_config().num_hidden_layers
    return RowBytes(**{key: beyond(found[0][key], found[1][key], layers) for key in found[0]})


@cache
def decoding_bytes(name: str, dtype: torch.dtype, size: Size, temperature: float) -> DecodingBytes:
    """`rehearse_decoding` for all layers, found with two and three of them."""
    config = read_config(name)
    found = [
        vars(rehearse_decoding(form_of(config, dtype, layers), size, temperature))
        for layers in (LAYERS_REHEARSED, LAYERS_REHEARSED + 1)
    ]
    layers = config.get_text_config().num_hidden_layers
    return DecodingBytes(**{key: beyond(found[0][key], found[1][key], layers) for key in found[0]})


def decoding_sizes(config: Config, ranks: int) -> list[Size]:
    """The decoders of a rank, for training and evaluation; one for both where it is kept."""
    rollout, sizes = config.rollout, []
    for prompts, samples in (
        (config.grpo.prompts_per_step, config.grpo.group_size),
        (config.data.heldout_records, config.evaluation.samples),
    ):
        waiting = [
            [Branch(i, j, rollout.max_completion_tokens)] * min(rollout.max_rows, samples - j)
            for i in range(-(-prompts // ranks))
            for j in range(0, samples, rollout.max_rows)
        ]
        longest = [range(rollout.max_prompt_tokens)]
        sizes.append(size_for(waiting, longest, rollout.max_rows).in_buckets())
    return [sizes[0].join(sizes[1])] if rollout.keep_weights else sizes


def rows_of_update(config: Config, ranks: int) -> tuple[int, int]:
    """Most tokens in a row, and most rows in an update, of a rank."""
    prompt, completion = config.rollout.max_prompt_tokens, config.rollout.max_completion_tokens
    prompts = -(-config.grpo.prompts_per_step // config.grpo.updates_per_rollout // ranks)
    group = [prompt] + [completion] * config.grpo.group_size
    rows = plan_rows([group] * prompts, config.train.tokens_per_row)
    everything = prompts * (prompt + config.grpo.group_size * (completion - 1))
    shortest = prompt + completion - 1  # a row has at least one completion
    return min(max(config.train.tokens_per_row, shortest), everything), len(rows)


# --- the plan ------------------------------------------------------------------------------------


def make_plan(config: Config, name: str, machine: Machine, judges: Sequence[str] = ()) -> Plan:
    """What the settings need on that machine.

    name: hub name or folder of the policy; judges: of the models that judge on the same GPUs.
    Raises ConfigError for a model that cannot be found.
    """
    dtype = getattr(torch, config.policy.compute_dtype)
    lora_rank = config.policy.lora_rank
    form = form_of(read_config(name), dtype, lora_rank=lora_rank)
    tokens, rows = rows_of_update(config, machine.ranks)
    temperature, checkpointing = config.rollout.temperature, config.train.gradient_checkpointing
    row = row_bytes(name, dtype, tokens, temperature, checkpointing, lora_rank)
    decoding = [
        decoding_bytes(name, dtype, size, temperature)
        for size in decoding_sizes(config, machine.ranks)
    ]
    largest = max(decoding, key=lambda found: found.state + found.work)
    policy = ShardedPolicy(
        form,
        ranks=machine.gpus if config.policy.sharding == "hybrid" else machine.ranks,
        width=dtype.itemsize,
    )
    has_reference = config.grpo.kl_coef > 0
    # With adapters, the policy without them is the reference.
    has_copy = has_reference and not lora_rank
    reference = policy.own(policy.parameters, policy.width) if has_copy else 0
    on_cpu = config.policy.offload_reference and has_copy
    gradients = policy.own(policy.trained, FLOAT32)
    always = {
        "weights": gradients + policy.own(policy.frozen, policy.width),
        "optimiser": 2 * gradients,
        "reference": 0 if on_cpu else reference,
        "judges": sum(2 * weights_of(judge) for judge in judges),
    }
    generation = {
        "generation copy": weights_of(name) * policy.width,
        "key-value cache": largest.state,
        "decoding": largest.work,
    }
    kept = always | (generation if config.rollout.keep_weights else {})
    moments = [
        Moment("generate", always | generation),
        *([policy.reference_pass(row).beside(kept)] if has_reference else []),
        *(moment.beside(kept) for moment in policy.update(row, rows)),
        policy.refill().beside(always | generation),
    ]
    host = {"to load": policy.to_load(machine.gpus), "to export": generation["generation copy"]}
    if on_cpu:
        host["for the reference"] = machine.gpus * reference
    return Plan(weights_of(name), sum(p.numel() for p in policy.trained), moments, host)


@cache
def weights_of(name: str) -> int:
    """How many weights a model has, tied ones counted once."""
    return sum(p.numel() for p in form_of(read_config(name), torch.bfloat16).parameters())

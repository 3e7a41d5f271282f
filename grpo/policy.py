"""Loading a policy: a causal language model, its tokenizer, and the tokens that end a turn."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from grpo.config_loader import ConfigError
from grpo.loading import Weights, empty_model, first_layers
from grpo.logprobs import completion_logprobs
from grpo.shared_prefix import UnsupportedModel, refuse_unsupported

# Largest difference of a log-prob, packed against separate, that rounding in float32 explains.
PACKING_TOLERANCE = 1e-3
# Layers are of one kind: two show whether it is computed rightly, and fit anywhere.
LAYERS_CHECKED = 2


@dataclass
class Policy:
    """A model on the meta device, its weights, and what belongs to it."""

    model: PreTrainedModel
    weights: Weights
    tokenizer: PreTrainedTokenizerBase
    stop_ids: list[int]


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a policy by hub name or folder. Raises ConfigError."""
    context_length(name)  # finds out fast whether there is such a model at all
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except Exception as error:  # a damaged file shows as whatever the reader stumbled over
        raise _not_found(name, error) from error
    if tokenizer.chat_template is None:
        raise ConfigError(
            f"policy.model = {name}: its tokenizer has no chat template; use an instruction-tuned "
            "model, or add a chat_template to its tokenizer_config.json"
        )
    return tokenizer


def context_length(name: str) -> int | None:
    """The most tokens that the model's positions reach to, where its configuration says so."""
    try:
        config = AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise _not_found(name, error) from error
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def load_policy(name: str, device: torch.device, *, check: bool = True) -> Policy:
    """Find a causal language model and its weights, and check that a packed row is right for it.

    name: a hub name or a folder. No weights are read but, for the check, those of two layers.
    Raises ConfigError, in one line, for a model that cannot be found or whose attention the shared
    prefix would compute wrongly.
    """
    tokenizer = load_tokenizer(name)
    try:
        model = empty_model(name, device)
        switch_dropout_off(model)
        refuse_unsupported(model)
        weights = Weights(name, model)
        if check:
            check_packing(first_layers(name, LAYERS_CHECKED, device))
    except UnsupportedModel as error:
        raise ConfigError(
            f"policy.model = {name}: {error}; only models whose layers are all full attention "
            "(Llama, Qwen2, Qwen3, Mistral without a window, …) can share a prefix"
        ) from error
    except (OSError, ValueError, SafetensorError) as error:
        raise _not_found(name, error) from error
    stops = stop_ids(model, tokenizer)
    if not stops:
        raise ConfigError(
            f"policy.model = {name}: neither its generation config nor its tokenizer names a token "
            "that ends a turn; set eos_token_id in its generation_config.json"
        )
    return Policy(model, weights, tokenizer, stops)


def switch_dropout_off(model: PreTrainedModel) -> None:
    """Dropout would make the scored policy another one than the policy that sampled."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(getattr(module, "attention_dropout", None), float):
            cast(Any, module).attention_dropout = 0.0


def encode_chat(
    tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]]
) -> tuple[str, list[int]]:
    """A chat prompt as text and as token ids, up to where the assistant begins to write."""
    try:
        text = str(
            tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        )
    except Exception as error:  # templates raise what they like
        raise ConfigError(
            f"policy.model: its chat template refuses the prompt ({error}); use a model whose "
            "template takes a system message"
        ) from error
    # The template has written the special tokens; the tokenizer must not add its own again.
    return text, tokenizer(text, add_special_tokens=False)["input_ids"]


def stop_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Every token that ends a turn: all that the generation config lists, and the tokenizer's."""
    listed = model.generation_config.eos_token_id
    ids = listed if isinstance(listed, list) else [listed]
    return sorted({i for i in [*ids, tokenizer.eos_token_id] if i is not None})


def check_packing(model: PreTrainedModel) -> None:
    """Compare a packed row with separate rows under the model's own attention.

    Three tiny completions of different lengths, one of them a single token. Raises
    UnsupportedModel where a log-prob differs by more than rounding.
    """
    generator = torch.Generator().manual_seed(0)
    prompt, *completions = (
        torch.randint(model.config.get_text_config().vocab_size, (n,), generator=generator).tolist()
        for n in (5, 4, 1, 6)
    )
    with torch.no_grad():
        separate = [_separate_logprobs(model, prompt, completion) for completion in completions]
        try:
            packed = completion_logprobs(model, prompt, completions)
        except (ValueError, TypeError, AttributeError, RuntimeError, KeyError) as error:
            raise UnsupportedModel(f"attention cannot be replaced ({error})") from error
    worst = float((torch.cat(packed) - torch.cat(separate)).abs().max())
    if not worst <= PACKING_TOLERANCE:
        raise UnsupportedModel(f"a packed row gives log-probs that differ by {worst:.2g}")


def _separate_logprobs(model: PreTrainedModel, prompt: list[int], completion: list[int]) -> Tensor:
    ids = torch.tensor([prompt + completion], device=model.device)
    logits = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1]
    return logits.float().log_softmax(-1).gather(-1, ids[0, len(prompt) :, None])[:, 0]


def _not_found(name: str, error: Exception) -> ConfigError:
    if Path(name).is_dir():
        cause = f"{type(error).__name__}: {error}".strip().splitlines()[0]
        return ConfigError(f"policy.model = {name}: the folder cannot be loaded: {cause}")
    return ConfigError(
        f"policy.model = {name}: no such folder, and the hub does not know it, does not give "
        "it out, or cannot be reached; give the folder of a saved causal language model, or a hub "
        "name (a gated one needs HF_TOKEN)"
    )

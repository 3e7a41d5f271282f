"""The tiny policy before any training: its tokenizer, and a Qwen2 of three million weights.

It exists to make a first run possible offline, in minutes, on two cores. It has never read anything
but the demonstrations, so what it writes is about as wise as they are.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from data.copying_heads import write_copying_heads

VOCABULARY_SIZE = 4096
CONTEXT_LENGTH = 2048
EMBEDDING_SIZE = 0.12  # standard deviation
FIRST_LOGIT_SIZE = 1.0  # standard deviation
SHARPENING = 1.5  # samples at temperature 1 are then what they were at 1 / 1.5
END_OF_TURN = "<|im_end|>"
END_OF_TEXT = "<|endoftext|>"
SPECIAL_TOKENS = [END_OF_TEXT, "<|im_start|>", END_OF_TURN]
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def train_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE of `VOCABULARY_SIZE` tokens over `texts`, with a ChatML chat template.

    Bytes are its alphabet, so any text can be encoded, one that it was not trained on too.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END_OF_TURN,
        pad_token=END_OF_TEXT,
        model_max_length=CONTEXT_LENGTH,
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def new_policy(tokenizer: PreTrainedTokenizerFast, seed: int) -> Qwen2ForCausalLM:
    """A new Qwen2 in float32, small enough to train on one core in minutes.

    Random weights, but for the two heads that `data.copying_heads` writes.
    """
    end_of_turn, end_of_text = (
        tokenizer.get_vocab()[token] for token in (END_OF_TURN, END_OF_TEXT)
    )
    config = Qwen2Config(
        vocab_size=VOCABULARY_SIZE,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=5,
        num_attention_heads=4,
        num_key_value_heads=2,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        max_position_embeddings=CONTEXT_LENGTH,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=end_of_turn,
        pad_token_id=end_of_text,
    )
    config.head_dim = 64  # Qwen2's attention reads it, though its configuration does not list it
    torch.manual_seed(seed)
    policy = Qwen2ForCausalLM(config)
    with torch.no_grad():
        policy.model.embed_tokens.weight.normal_(0.0, EMBEDDING_SIZE)
        # The same matrix reads out the logits: scaled so that they begin near zero.
        policy.model.norm.weight.fill_(FIRST_LOGIT_SIZE / EMBEDDING_SIZE / config.hidden_size**0.5)
    write_copying_heads(policy)
    policy.generation_config = GenerationConfig(
        eos_token_id=[end_of_turn, end_of_text], pad_token_id=end_of_text, do_sample=True
    )
    return policy


@torch.no_grad()
def sharpen(policy: Qwen2ForCausalLM) -> None:
    """Multiply every logit by `SHARPENING`, through the last norm's weight.

    After so short a training too much probability still lies on words that fit nowhere. Sampling
    at a lower temperature would avoid them, but GRPO samples at 1: so the temperature moves into
    the weights.
    """
    policy.model.norm.weight.mul_(SHARPENING)

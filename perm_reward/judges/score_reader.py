"""A causal language model that is not asked to write, but read: how probable is each score?"""

import sys
from collections.abc import Mapping
from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from perm_reward.judges.score_tokens import (
    Distribution,
    ScoreTokens,
    UnreadableScale,
    find_score_tokens,
)
from perm_reward.judges.token_tree import (
    NotPackable,
    Prefix,
    Tokens,
    common_length,
    next_token_logprobs,
    read_prefix,
    refuse_unpackable,
)
from perm_reward.prompts import Messages, Seeker, judge_messages
from perm_reward.rubrics import Rubric

_SCORE = range(1, 6)
_DIMENSION = range(21)


class UnusableTemplate(ValueError):
    """The chat template refuses what a judge is told."""


class ScoreReader:
    """Reads distributions over scores off a model: one prompt, one packed row. Not for two threads.

    Args:
        model: in the type and on the device on which it computes.
        tokenizer: with a chat template.
        rubrics: of all roles; the bystander's scale lines begin with its dimensions' names.

    Raises:
        NotPackable: the model cannot compute a tree of tokens.
        UnreadableScale: its tokenizer writes no scores that can be told apart.
        UnusableTemplate: its chat template takes no system message.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        rubrics: Mapping[str, Rubric],
    ) -> None:
        refuse_unpackable(model)
        self._model = model
        self._tokenizer = tokenizer
        self._rubrics = rubrics
        self._prefixes: dict[str, Prefix] = {}
        text = self._text([{"role": "system", "content": "A"}, {"role": "user", "content": "B"}])
        self._scales: dict[str, dict[str, ScoreTokens]] = {
            role: {
                label: find_score_tokens(self._encode, text, label, numbers)
                for label, numbers in _labels(role, rubric).items()
            }
            for role, rubric in rubrics.items()
        }

    def prompt(self, messages: Messages) -> Tokens:
        """The tokens of a chat, up to where the judge begins to write."""
        return tuple(self._encode(self._text(messages)))

    def is_too_long(self, role: str, prompt: Tokens) -> bool:
        """Whether the model's positions, or its window, do not reach that far."""
        config = self._model.config.get_text_config()
        names = ("max_position_embeddings", "sliding_window")
        reaches = [getattr(config, name, None) or sys.maxsize for name in names]
        return len(prompt) + max(map(len, self._places(role))) > min(reaches)

    def read(self, role: str, prompt: Tokens) -> dict[str, Distribution]:
        """What the model would write behind each label of a role, after this prompt.

        It is computed by itself, whatever else is asked, so the same prompt gives the same bits.
        """
        scales = self._scales[role]
        sequences = [prompt + place for place in self._places(role)]
        wanted = [tokens for scale in scales.values() for tokens in scale.places.values()]
        logprobs = iter(
            dict(zip(tokens, values, strict=True))
            for tokens, values in zip(
                wanted,
                next_token_logprobs(self._model, sequences, wanted, self._prefix(role)),
                strict=True,
            )
        )
        return {
            label: scale.distribution({place: next(logprobs) for place in scale.places})
            for label, scale in scales.items()
        }

    def _prefix(self, role: str) -> Prefix:
        """What all prompts of a role begin with, computed at its first call."""
        if role not in self._prefixes:
            one, other = (
                judge_messages(role, Seeker(text, text, text), text, rubrics=self._rubrics)
                for text in ("A", "B")
            )
            prompt = self.prompt(one)
            shared = prompt[: common_length(prompt, self.prompt(other))]
            self._prefixes[role] = read_prefix(self._model, shared)
        return self._prefixes[role]

    def _places(self, role: str) -> list[Tokens]:
        return [place for scale in self._scales[role].values() for place in scale.places]

    def _text(self, messages: Messages) -> str:
        try:
            # Templates of models that can think aloud first are told not to; others ignore it.
            text = self._tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True, enable_thinking=False
            )
        except Exception as error:  # templates raise what they like
            raise UnusableTemplate(str(error)) from error
        return str(text)

    def _encode(self, text: str) -> list[int]:
        # The template has written the special tokens; the tokenizer must not add its own again.
        return self._tokenizer(text, add_special_tokens=False)["input_ids"]


def load_score_reader(
    name: str, device: torch.device, rubrics: Mapping[str, Rubric]
) -> ScoreReader:
    """Load a judge's model in bfloat16, by hub name or folder.

    Raises:
        ValueError: it cannot be loaded or cannot judge; one line that names setting and remedy.
    """
    setting = f"judge.model = {name}"
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.bfloat16)
    except Exception as error:  # a damaged file shows as whatever the reader stumbled over
        raise ValueError(f"{setting}: {_why_not_loaded(name, error)}") from error
    if tokenizer.chat_template is None:
        raise ValueError(
            f"{setting}: its tokenizer has no chat template; use an instruction-tuned model, or "
            "add a chat_template to its tokenizer_config.json"
        )
    try:
        return ScoreReader(model.eval().to(device), tokenizer, rubrics)
    except NotPackable as error:
        raise ValueError(
            f"{setting}: {error}; use a model of full attention with rotary positions (Llama, "
            "Qwen2, Qwen3, Mistral, …), or serve this one and set judge.kind to openai"
        ) from error
    except UnreadableScale as error:
        raise ValueError(
            f"{setting}: its tokenizer cannot be read for scores ({error}); use another model, or "
            "serve this one and set judge.kind to openai"
        ) from error
    except torch.OutOfMemoryError as error:
        raise ValueError(
            f"{setting}: does not fit into the memory that is left on {device}; use a smaller "
            "model, or serve it elsewhere and set judge.kind to openai"
        ) from error
    except UnusableTemplate as error:
        raise ValueError(
            f"{setting}: its chat template refuses the prompt ({_first_line(error)}); use a model "
            "whose template takes a system message"
        ) from error


def _labels(role: str, rubric: Rubric) -> dict[str, range]:
    """What a judge of this role would write before each number, and the numbers' range."""
    if role == "bystander":
        return {line.split(":")[0].strip(): _DIMENSION for line in rubric.scale}
    return {"Score": _SCORE}


def _why_not_loaded(name: str, error: Exception) -> str:
    if Path(name).is_dir():
        return (
            f"the folder cannot be loaded ({type(error).__name__}: {_first_line(error)}); give one "
            "that holds a saved causal language model and its tokenizer"
        )
    return (
        "no such folder, and the hub does not know it, does not give it out, or cannot be "
        "reached; give the folder of a saved causal language model, or a hub name (a gated one "
        "needs HF_TOKEN)"
    )


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "no message")

"""A causal language model that is not asked to write, but read: how probable is each score?"""

import sys
from collections.abc import Mapping, Sequence
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
    Tokens,
    lay_out,
    next_token_logprobs,
    refuse_unpackable,
)
from perm_reward.prompts import Messages
from perm_reward.rubrics import Rubric

_SCORE = range(1, 6)
_DIMENSION = range(21)


class UnusableTemplate(ValueError):
    """The chat template refuses what a judge is told."""


class ScoreReader:
    """Reads distributions over scores off a model, for many prompts in one packed row.

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

    def own_tokens(self, role: str) -> int:
        """How many tokens of a row are one call's own, behind its prompt."""
        return len(lay_out(self._places(role)).token_ids)

    def is_too_long(self, role: str, prompt: Tokens) -> bool:
        """Whether the model's positions, or its window, do not reach that far."""
        config = self._model.config.get_text_config()
        names = ("max_position_embeddings", "sliding_window")
        reaches = [getattr(config, name, None) or sys.maxsize for name in names]
        return len(prompt) + max(map(len, self._places(role))) > min(reaches)

    def read(self, calls: Sequence[tuple[str, Tokens]]) -> list[dict[str, Distribution]]:
        """For each call, a role and its prompt, what the model would write behind each label.

        All calls are packed into one row: their number is the caller's to bound.
        """
        sequences: list[Tokens] = []
        wanted: list[Tokens] = []
        for role, prompt in calls:
            for scale in self._scales[role].values():
                sequences += [prompt + place for place in scale.places]
                wanted += scale.places.values()
        logprobs = iter(
            dict(zip(tokens, values, strict=True))
            for tokens, values in zip(
                wanted, next_token_logprobs(self._model, sequences, wanted), strict=True
            )
        )
        return [
            {
                label: scale.distribution({place: next(logprobs) for place in scale.places})
                for label, scale in self._scales[role].items()
            }
            for role, _ in calls
        ]

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

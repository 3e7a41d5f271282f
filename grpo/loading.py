"""A saved model without its memory, and its weights by the rows that are asked for.

A model on PyTorch's meta device has shapes and no memory. It is sharded as it is; then each rank
reads from the safetensors files the rows that are its own. So no process ever holds more of the
weights than its share, however many processes a machine runs.
"""

from collections.abc import Iterable
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel
from transformers.utils import cached_file
from transformers.utils.hub import get_checkpoint_shard_files

from grpo.shared_prefix import UnsupportedModel

WEIGHTS_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"


def empty_model(name: str, device: torch.device) -> PreTrainedModel:
    """A causal language model by hub name or folder: float32 parameters without memory (meta),
    buffers on `device`.

    Raises OSError or ValueError where there is none, UnsupportedModel where a buffer is neither
    saved nor made by transformers' own initialisation.
    """
    config = AutoConfig.from_pretrained(name)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    if cached_file(name, "generation_config.json", _raise_exceptions_for_missing_entries=False):
        model.generation_config = GenerationConfig.from_pretrained(name)
    for module in model.modules():
        make_buffers(model, module, device)
    return model.eval()


def make_buffers(model: PreTrainedModel, module: torch.nn.Module, device: torch.device) -> None:
    """Give a module's own buffers memory and content: rotary frequencies, say."""
    own = dict(module.named_buffers(recurse=False))
    for name, buffer in own.items():
        filler = float("nan") if buffer.is_floating_point() else 0
        module.register_buffer(
            name,
            torch.full_like(buffer, filler, device=device),
            persistent=name not in module._non_persistent_buffers_set,
        )
    if own:
        model._init_weights(module)
    for name, buffer in module.named_buffers(recurse=False):
        if name in module._non_persistent_buffers_set and buffer.isnan().any():
            raise UnsupportedModel(f"{type(module).__name__}.{name} is saved nowhere")


class Weights:
    """The tensors of a saved model, by the names that the model gives them.

    Where the files hold other names (mixtures of experts are stored expert by expert) or are not
    safetensors, `transformers` reads the whole model, and these are its tensors.
    """

    def __init__(self, name: str, model: PreTrainedModel) -> None:
        """Raises OSError, ValueError or SafetensorError where they cannot be read."""
        self.tensors: dict[str, Any] = {}
        for path in safetensors_files(name):
            file = safe_open(path, framework="pt")
            self.tensors |= {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118
        wanted = dict(saved_tensors(model))
        if not wanted.keys() <= self.tensors.keys():
            whole = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
            self.tensors = dict(whole.state_dict())
        for key, tensor in wanted.items():
            if self.shape(key) != tuple(tensor.shape):
                raise ValueError(
                    f"{key} has the shape {list(self.shape(key))} in its file, and "
                    f"{list(tensor.shape)} by its config.json"
                )

    def shape(self, key: str) -> tuple[int, ...]:
        """The whole shape of a tensor."""
        tensor = self.tensors[key]
        return tuple(tensor.shape if isinstance(tensor, Tensor) else tensor.get_shape())

    def rows(self, key: str, start: int, stop: int) -> Tensor:
        """The rows [start, stop) of a tensor, of its saved type."""
        return self.tensors[key][start:stop]

    @torch.no_grad()
    def fill(self, model: PreTrainedModel) -> None:
        """Write the weights into a model that has memory, sharded or not: on each rank its rows.
        What was added to the model since (adapters) stays as it is."""
        for key, tensor in saved_tensors(model):
            if key not in self.tensors:
                continue
            start, stop = own_rows(tensor)
            own = tensor.to_local() if isinstance(tensor, DTensor) else tensor
            if own.dim() == 0:
                own.copy_(self.tensors[key][...])
            elif stop > start:
                own.copy_(self.rows(key, start, stop))


def saved_tensors(model: PreTrainedModel) -> Iterable[tuple[str, Tensor]]:
    """What a model's files hold: its parameters, tied ones once, and the buffers that are saved."""
    yield from model.named_parameters()
    saved = model.state_dict().keys()
    yield from ((name, buffer) for name, buffer in model.named_buffers() if name in saved)


def own_rows(tensor: Tensor) -> tuple[int, int]:
    """The rows [start, stop) that this rank holds. FSDP2 cuts as torch.chunk does: all ranks but
    the last ones get rows / ranks, rounded up."""
    rows = tensor.shape[0] if tensor.dim() else 1
    if not isinstance(tensor, DTensor):
        return 0, rows
    dimension = tensor.placements.index(Shard(0))
    each = -(-rows // tensor.device_mesh.size(dimension))
    start = min(rows, each * tensor.device_mesh.get_local_rank(dimension))
    return start, min(rows, start + each)


def safetensors_files(name: str) -> list[str]:
    """The files that hold the weights of a hub name or folder; none where they are not safetensors.

    From the hub they are fetched, once for all processes of a machine.
    """
    quietly = {"_raise_exceptions_for_missing_entries": False}
    if single := cached_file(name, WEIGHTS_FILE, **quietly):
        return [single]
    if index := cached_file(name, INDEX_FILE, **quietly):
        return get_checkpoint_shard_files(name, index)[0]
    return []


def first_layers(name: str, layers: int, device: torch.device) -> PreTrainedModel:
    """A saved model in float32 that ends after its first few layers, to try things with."""
    config = AutoConfig.from_pretrained(name)
    text = config.get_text_config()
    text.num_hidden_layers = min(layers, text.num_hidden_layers)
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[: text.num_hidden_layers]
    model = AutoModelForCausalLM.from_pretrained(name, config=config, dtype=torch.float32)
    return torch.nn.Module.to(model, device).eval()

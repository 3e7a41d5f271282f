"""Checkpoints from which a run goes on exactly, and the policy in the format of Hugging Face.

    RUN/checkpoints/step-000040/     by torch.distributed.checkpoint, readable at any world size
        __0_0.distcp, .metadata      weights and the optimiser's state, sharded over the ranks
        run.json                     the run's own state, and a checksum of each file
        rollout-….jsonl              what was sampled already for the next step, if anything

A checkpoint is written aside, synced to disk, and then renamed: under its name it is whole. What
is not in it is a function of the step: learning rate, order of the data, random numbers.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed.checkpoint as distributed_checkpoint
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from grpo.config_loader import ConfigError
from grpo.parallel import Ranks
from grpo.rollout import Group, read_groups

STATE_FILE = "run.json"
ROLLOUT_FILE = "rollout-{}.jsonl"  # with the checksum of its content
PARTIAL = ".partial"
DAMAGED = ".damaged"
MOMENTS = ("exp_avg", "exp_avg_sq")


class DamagedCheckpoint(Exception):
    """A checkpoint's files are not those that were written. One line."""


# --- saving --------------------------------------------------------------------------------------


def save_checkpoint(
    folder: Path,
    model: PreTrainedModel,
    optimizer: torch.optim.Optimizer,
    state: dict[str, Any],
    ranks: Ranks,
    rollout: Sequence[Group] | None = None,
) -> None:
    """Write weights, the optimiser's state, `state` (fit for JSON) and a rollout, if there is one
    that waits for its update. All ranks together.

    Raises OSError, on all ranks, where it cannot be written; what was at `folder` stays then.
    """
    aside = folder.with_name(folder.name + PARTIAL)
    error: str | None = None
    try:
        if ranks.is_main:
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir(parents=True)
    except OSError as e:
        error = e.strerror or str(e)
    raise_together(error, ranks)
    try:
        writer = distributed_checkpoint.FileSystemWriter(aside, sync_files=True)
        tensors = tensors_of(model, optimizer)
        distributed_checkpoint.save(tensors, storage_writer=writer)
    except (OSError, CheckpointException) as e:
        error = cause_of(e)
    raise_together(error, ranks)
    own = {path.name: checksum(path) for path in sorted(aside.glob(f"__{ranks.rank}_*"))}
    checksums = {name: value for of_rank in ranks.gather(own) for name, value in of_rank.items()}
    try:
        if ranks.is_main:
            others = [path for path in sorted(aside.iterdir()) if path.name not in checksums]
            checksums |= {path.name: checksum(path) for path in others}
            write_synced(aside / STATE_FILE, json.dumps({"state": state, "files": checksums}))
            if rollout is not None:
                write_rollout(aside, rollout)
            replace_folder(aside, folder)
    except OSError as e:
        error = e.strerror or str(e)
    raise_together(error, ranks)


def save_rollout(folder: Path, groups: Sequence[Group], ranks: Ranks) -> None:
    """Add groups that wait for their update to a checkpoint. Raises OSError, on all ranks."""
    error: str | None = None
    try:
        if ranks.is_main:
            write_rollout(folder, groups)
    except OSError as e:
        error = e.strerror or str(e)
    raise_together(error, ranks)


def write_rollout(folder: Path, groups: Sequence[Group]) -> None:
    """Write groups to the file that `read_rollout` reads, in the place of any that is there."""
    aside = folder / (ROLLOUT_FILE.format("new") + PARTIAL)
    write_synced(aside, "".join(group.to_json() + "\n" for group in groups))
    path = folder / ROLLOUT_FILE.format(checksum(aside)[:32])
    os.replace(aside, path)
    for other in folder.glob(ROLLOUT_FILE.format("*")):
        if other != path:
            other.unlink()
    sync(folder)


def tensors_of(model: PreTrainedModel, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Everything that the optimiser reads or writes, by the parameters' names. What is frozen is
    not among it: it is read from policy.model again.

    A parameter that was never stepped has moments of 0 after 0 steps, which is what AdamW starts
    from.
    """
    if isinstance(model, FSDPModule):
        # After a pass without gradient its root is left gathered, in the type that computes.
        cast(Any, model).reshard()
    tensors: dict[str, Any] = {}
    for name, parameter in trained_parameters(model):
        kept = optimizer.state.get(parameter, {})
        tensors[f"weight.{name}"] = parameter.detach()
        for moment in MOMENTS:
            tensors[f"{moment}.{name}"] = kept.get(moment, torch.zeros_like(parameter).detach())
        tensors[f"step.{name}"] = kept.get("step", torch.zeros((), device=parameter.device))
    return tensors


def trained_parameters(model: PreTrainedModel) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """The parameters that are not frozen, with their names."""
    return ((name, p) for name, p in model.named_parameters() if p.requires_grad)


def raise_together(error: str | None, ranks: Ranks) -> None:
    """Raise OSError on all ranks where one of them has an error."""
    for message in ranks.gather(error):
        if message is not None:
            raise OSError(message)


def cause_of(error: BaseException) -> str:
    """What went wrong on a rank, out of what torch.distributed.checkpoint says of it."""
    if isinstance(error, CheckpointException):
        failures = [failure[0] for failure in error.failures.values()]
        return cause_of(failures[0]) if failures else str(error)
    return getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"


def replace_folder(aside: Path, folder: Path) -> None:
    """Give a finished folder its name. Of a folder that has it already nothing is left."""
    shutil.rmtree(folder, ignore_errors=True)
    sync(aside)
    os.replace(aside, folder)
    sync(folder.parent)


def write_synced(path: Path, text: str) -> None:
    """Write a file that is on disk when this returns."""
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def sync(path: Path) -> None:
    """Have a file's content, or the names in a folder, on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def checksum(path: Path) -> str:
    """BLAKE2 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "blake2b").hexdigest()


# --- loading -------------------------------------------------------------------------------------


def load_checkpoint(folder: Path, model: PreTrainedModel, optimizer: torch.optim.Optimizer) -> None:
    """Read weights and the optimiser's state back, whatever the world size then or now was.

    All ranks together. Raises ConfigError where they are those of another model.
    """
    tensors = tensors_of(model, optimizer)
    reader = distributed_checkpoint.FileSystemReader(folder)
    metadata = reader.read_metadata().state_dict_metadata
    saved = {key: getattr(data, "size", None) for key, data in metadata.items()}
    if saved != {key: tensor.shape for key, tensor in tensors.items()}:
        raise ConfigError(
            f"--resume: {folder} holds the weights of another policy.model or policy.lora_rank; "
            "leave both as the run has them"
        )
    distributed_checkpoint.load(tensors, checkpoint_id=folder)
    for name, parameter in trained_parameters(model):
        optimizer.state[parameter] = {
            "step": tensors[f"step.{name}"],
            **{moment: tensors[f"{moment}.{name}"] for moment in MOMENTS},
        }


def read_state(folder: Path) -> dict[str, Any]:
    """The run's own state in a checkpoint, once its files are those that were written.

    Raises DamagedCheckpoint.
    """
    try:
        content = json.loads((folder / STATE_FILE).read_text(encoding="utf-8"))
        for name, expected in content["files"].items():
            if checksum(folder / name) != expected:
                raise DamagedCheckpoint(f"{folder / name}: its content has changed")
        return content["state"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedCheckpoint(f"{folder}: {type(error).__name__}: {error}") from error


def read_rollout(folder: Path) -> list[Group] | None:
    """The groups that wait in a checkpoint for their update; None where none are there whole."""
    for path in folder.glob(ROLLOUT_FILE.format("*")):
        if path.name == ROLLOUT_FILE.format(checksum(path)[:32]):
            return list(read_groups(path))
    return None


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in a folder, the newest first."""
    return sorted(folder.glob("step-[0-9]*[0-9]"), reverse=True)


def set_aside_newer(path: Path) -> None:
    """Take the checkpoints that are newer than the one at `path`, damaged all of them, out of the
    row: they count as none from now on, and are not removed either."""
    for other in checkpoints(path.parent):
        if other.name > path.name:
            shutil.rmtree(damaged := other.with_name(other.name + DAMAGED), ignore_errors=True)
            os.replace(other, damaged)


def remove_old(folder: Path, keep: int, best: str | None) -> None:
    """Keep the newest so many, and the best one; half-written ones go too."""
    for path in checkpoints(folder)[keep:]:
        if path.name != best:
            shutil.rmtree(path, ignore_errors=True)
    for path in folder.glob(f"*{PARTIAL}"):
        shutil.rmtree(path, ignore_errors=True)


# --- the policy ----------------------------------------------------------------------------------


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
    aside = folder.with_name(folder.name + PARTIAL)
    shutil.rmtree(aside, ignore_errors=True)
    model.generation_config.eos_token_id = stop_ids
    model.save_pretrained(aside)
    tokenizer.save_pretrained(aside)
    for path in aside.iterdir():
        sync(path)
    replace_folder(aside, folder)

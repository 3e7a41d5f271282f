"""One code path for one process or many: the process group, FSDP2, and the generation copy."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from grpo.config_loader import ConfigError
from grpo.logprobs import score_row

T = TypeVar("T")

# Of ranks for one another: some wait for judges that have asked for time.
LONGEST_WAIT = timedelta(hours=4)

# What a process must know to find the others.
TORCHRUN_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Ranks:
    """The processes of a run: how many there are, which one this is, and its device."""

    rank: int
    world_size: int
    device: torch.device
    mesh: DeviceMesh

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and speaks."""
        return self.rank == 0

    def deal(self, items: list[T]) -> list[T]:
        """This rank's share of `items`: every world_size-th, from its rank on."""
        return items[self.rank :: self.world_size]

    def collect(self, mine: list[T]) -> list[T]:
        """The shares of all ranks, on every rank, in the order from which `deal` dealt them."""
        shares = self.gather(mine)
        total = sum(map(len, shares))
        return [shares[i % self.world_size][i // self.world_size] for i in range(total)]

    def gather(self, mine: T) -> list[T]:
        """What each rank has, on every rank, in the order of ranks."""
        everyone: list[Any] = [None] * self.world_size
        dist.all_gather_object(everyone, mine)
        return everyone

    def sum(self, values: Tensor) -> Tensor:
        """The sum over ranks of a tensor of numbers."""
        dist.all_reduce(values)
        return values

    def largest(self, values: Tensor) -> Tensor:
        """The largest over ranks of each number."""
        dist.all_reduce(values, dist.ReduceOp.MAX)
        return values

    @contextmanager
    def failing_together(self) -> Iterator[None]:
        """What goes wrong with a setting on one rank is raised on all of them.

        Else the other ranks would wait for ever at their next collective. A rank on which nothing
        went wrong says on which rank it did: its own environment may look right.
        """
        error: ConfigError | None = None
        try:
            yield
        except ConfigError as e:
            error = e
        for rank, message in enumerate(self.gather(str(error) if error else None)):
            if message is not None:
                raise error or ConfigError(f"{message} (on rank {rank})")


def pick_device(name: str) -> torch.device:
    """The device of this process for the setting policy.device: auto, cpu or cuda.

    Raises ConfigError where there is no CUDA device, or none for each process of this machine.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            "policy.device = cuda: PyTorch finds no CUDA device here; set policy.device to cpu "
            "or auto, or install a CUDA build of PyTorch"
        )
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    # Asked for all processes of the machine, so that the main one fails too: it alone speaks.
    processes = max(local_rank + 1, int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    if processes > torch.cuda.device_count():
        raise ConfigError(
            f"policy.device = {name}: {processes} processes on this machine, which shows "
            f"{torch.cuda.device_count()} CUDA device(s); start as many processes as there are "
            "devices (torchrun --nproc-per-node)"
        )
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    return device


@contextmanager
def start_ranks(device: torch.device) -> Iterator[Ranks]:
    """The process group of torchrun, or a group of one process without it.

    Raises ConfigError where the environment says RANK, but not the rest of what torchrun sets.
    """
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    if "RANK" in os.environ:
        if missing := [name for name in TORCHRUN_VARIABLES if name not in os.environ]:
            raise ConfigError(
                f"RANK = {os.environ['RANK']}: is in the environment without {', '.join(missing)}; "
                "unset it, or start with torchrun, which sets all of them"
            )
        dist.init_process_group(backend, timeout=LONGEST_WAIT)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        world_size = dist.get_world_size()
        mesh = init_device_mesh(device.type, (world_size,))
        yield Ranks(dist.get_rank(), world_size, device, mesh)
    finally:
        dist.destroy_process_group()


def shard(model: PreTrainedModel, ranks: Ranks, compute_dtype: torch.dtype) -> PreTrainedModel:
    """The trained policy: float32 weights sharded over the ranks, computed in `compute_dtype`.

    Gradients are summed over ranks (not averaged: the loss has global denominators), in float32.
    The model gets two methods: `score_row`, see logprobs.score, and `full_copy`, a plain module in
    the compute type that generates. Decoding through sharded layers would gather every layer
    for every token; the copy is refilled once per rollout instead, and keeps its addresses.
    """
    generation = cast_copy(model, compute_dtype)
    precision = MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=torch.float32)
    for layer in model.get_decoder().layers:
        fully_shard(layer, mesh=ranks.mesh, mp_policy=precision)
    fully_shard(model, mesh=ranks.mesh, mp_policy=precision)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            # gloo knows neither average nor scaled sum; a plain sum is what is wanted.
            module.set_force_sum_reduction_for_comms(True)
            module.set_gradient_divide_factor(1.0)
    sharded = cast(Any, model)
    sharded.score_row = partial(score_row, model)
    register_fsdp_forward_method(model, "score_row")
    sharded.full_copy = partial(refill, generation, model)
    return model


def plain_copy(model: PreTrainedModel) -> PreTrainedModel:
    """The model itself, or of a sharded one its copy, refilled. All ranks together."""
    full_copy = model.__dict__.get("full_copy")
    return model if full_copy is None else full_copy()


def cast_copy(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """A frozen copy with parameters in `dtype`. Buffers stay: rotary frequencies need float32.

    Each parameter is cast as it is copied: a copy in bfloat16 never needs the memory of one in
    float32. A parameter that stands in two places (tied embeddings) does so in the copy.
    """
    cast_of = {
        id(parameter): torch.nn.Parameter(parameter.detach().to(dtype, copy=True), False)
        for parameter in model.parameters()
    }
    return deepcopy(model, cast_of).eval()


@torch.no_grad()
def refill(copy: PreTrainedModel, trained: PreTrainedModel) -> PreTrainedModel:
    """Write the trained weights into the copy, one parameter at a time. All ranks together."""
    for target, source in zip(copy.parameters(), trained.parameters(), strict=True):
        target.copy_(source.full_tensor() if isinstance(source, DTensor) else source)
    return copy


def gradient_norm(model: PreTrainedModel, max_norm: float) -> float:
    """Scale the gradients of all ranks down to `max_norm` together; returns the norm before."""
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)
    return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)

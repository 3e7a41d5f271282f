"""One code path for one process or many: the process group, and who does what in it."""

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from grpo.config_loader import ConfigError
from grpo.interruption import Interrupted, Interruption

T = TypeVar("T")

# Of ranks for one another: some wait for judges that have asked for time.
LONGEST_WAIT = timedelta(hours=4)

# Seconds in which all processes must have started.
LONGEST_MEETING = 600.0
NOTICE = "perm-grpo/port"

# What a process must know to find the others.
TORCHRUN_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Ranks:
    """The processes of a run: how many there are, which one this is, and its device."""

    rank: int
    world_size: int
    device: torch.device
    mesh: DeviceMesh
    interruption: Interruption = field(default_factory=Interruption)

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and speaks."""
        return self.rank == 0

    def deal(self, items: Sequence[T], work: Sequence[float]) -> list[T]:
        """This rank's share of `items`, each of so much work, see `share_out`."""
        return [items[i] for i in share_out(work, self.world_size)[self.rank]]

    def collect(self, mine: Sequence[T], work: Sequence[float]) -> list[T]:
        """The shares of all ranks, on every rank, in the order from which `deal` dealt them."""
        found: dict[int, T] = {}
        shares = share_out(work, self.world_size)
        for indices, items in zip(shares, self.gather(list(mine)), strict=True):
            found |= zip(indices, items, strict=True)
        return [found[i] for i in range(len(work))]

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

    def stop_if_asked(self) -> None:
        """Raise Interrupted on all ranks where a signal has asked one of them to end."""
        signal = int(self.largest(torch.tensor(self.interruption.signal)))
        if signal:
            raise Interrupted(signal)

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


def share_out(work: Sequence[float], ranks: int) -> list[list[int]]:
    """Who does which of N pieces of work: for each rank their indices, in order.

    The largest piece first, each to the rank that has least to do so far (of equals, the one with
    fewer pieces, then the first): ranks with short pieces take more of them. The largest share is
    at most 4/3 of the smallest that is possible (Graham 1969, LPT).
    """
    loads = [(0.0, 0, rank) for rank in range(ranks)]
    shares: list[list[int]] = [[] for _ in range(ranks)]
    for i in sorted(range(len(work)), key=lambda i: (-work[i], i)):
        load, count, rank = min(loads)
        loads[rank] = (load + work[i], count + 1, rank)
        shares[rank].append(i)
    return list(map(sorted, shares))


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
def start_ranks(device: torch.device, *, hybrid: bool = False) -> Iterator[Ranks]:
    """The process group of torchrun, or a group of one process without it.

    hybrid: whether each node is to hold a whole set of weights, sharded among its own processes.

    Raises ConfigError where the environment says RANK, but not the rest of what torchrun sets.
    """
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    if "RANK" in os.environ:
        if missing := [name for name in TORCHRUN_VARIABLES if name not in os.environ]:
            raise ConfigError(
                f"RANK = {os.environ['RANK']}: is in the environment without {', '.join(missing)}; "
                "unset it, or start with torchrun, which sets all of them"
            )
        rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        store = meet(rank, world_size)
        dist.init_process_group(
            backend, store=store, rank=rank, world_size=world_size, timeout=LONGEST_WAIT
        )
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        world_size = dist.get_world_size()
        within = int(os.environ.get("LOCAL_WORLD_SIZE", world_size)) if hybrid else world_size
        mesh = make_mesh(device, within, world_size)
        yield Ranks(dist.get_rank(), world_size, device, mesh)
    finally:
        dist.destroy_process_group()


def meet(rank: int, world_size: int) -> dist.Store:
    """The store through which the processes find one another.

    torchrun's own is the same after a restart, and still holds the addresses of processes that are
    gone. So rank 0 opens a new one, and leaves word there; who reads an old word finds nobody at
    that address, and looks again. Without torchrun the store is rank 0's, and new.
    """
    notice_board, _, _ = next(dist.rendezvous("env://", rank, world_size))
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return notice_board
    address = os.environ["MASTER_ADDR"]
    if rank == 0:
        store = dist.TCPStore(address, 0, is_master=True, wait_for_workers=False)
        notice_board.set(NOTICE, str(store.port))
        return store
    ends = time.monotonic() + LONGEST_MEETING
    while True:
        try:
            port = int(notice_board.get(NOTICE))
            return dist.TCPStore(address, port, is_master=False, timeout=timedelta(seconds=3))
        except dist.DistError:
            if time.monotonic() > ends:
                raise
            time.sleep(0.1)


def make_mesh(device: torch.device, within: int, world_size: int) -> DeviceMesh:
    """What weights are sharded over: all ranks, or so many; in the latter case they are replicated
    over the groups of these, which are the mesh's first dimension."""
    if within == world_size:
        return init_device_mesh(device.type, (world_size,), mesh_dim_names=("shard",))
    shape = (world_size // within, within)
    return init_device_mesh(device.type, shape, mesh_dim_names=("replicate", "shard"))


def tells_of_lost_peer(error: RuntimeError) -> bool:
    """Whether an error of PyTorch says that another process of the group is gone."""
    signs = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "timed out")
    return isinstance(error, dist.DistError) or any(sign in str(error) for sign in signs)

"""Steps of decoding as CUDA graphs: recorded once, then replayed without the host.

A step of a 7-billion model launches some thousand kernels of a few microseconds each, more than the
host can ask for in that time. A graph holds them all, with the addresses they work on; so it stays
right as long as those addresses do, also when new weights are written there.
"""

import warnings
from collections.abc import Callable, Hashable
from functools import partial
from typing import Any, ClassVar, Generic, TypeVar

import torch

Key = TypeVar("Key", bound=Hashable)


class StepGraphs(Generic[Key]):
    """A graph for each key that a step is taken with, where equal keys run equal kernels.

    The first step with a key runs as it is, so that libraries set up what they need; the second
    is recorded. Where recording fails once, all steps of the process run as they are from then on.
    """

    failed: ClassVar[bool] = False

    def __init__(self) -> None:
        self.pool: Any = None  # memory for what lives only inside of a step, shared by all graphs
        self.known: set[Key] = set()
        self.replays: dict[Key, Callable[[], None]] = {}

    def run(self, step: Callable[[Key], None], key: Key) -> None:
        """Take one step."""
        if StepGraphs.failed or key not in self.known:
            self.known.add(key)
            step(key)
            return
        if key not in self.replays:
            try:
                self.replays[key] = self.record(partial(step, key))
            except RuntimeError as error:  # nothing has run yet: recording does not execute
                StepGraphs.failed = True
                self.replays.clear()
                # What ends a recording may hide what went wrong in it.
                cause = str(error.__context__ or error).strip().partition("\n")[0]
                warnings.warn(f"decoding runs without CUDA graphs: {cause}", stacklevel=2)
                step(key)
                return
        self.replays[key]()

    def record(self, step: Callable[[], None]) -> Callable[[], None]:
        """Record what `step` asks of the device; calling the result does it."""
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        try:
            # Other threads (a judge in this process, say) may use the device meanwhile.
            with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
                step()
        finally:
            torch.cuda.set_stream(stream)  # which a recording that fails leaves at its own
        self.pool = graph.pool()
        return graph.replay

"""Steps of decoding as CUDA graphs: recorded once, then replayed without the host.

A step of a 7-billion model launches a thousand kernels of a few microseconds each, more than the
host can ask for in that time. A graph holds them all, with the addresses they work on; so it stays
right as long as those addresses do, also when new weights are written there.
"""

import warnings
from collections.abc import Callable, Hashable
from functools import partial
from typing import Any, Generic, TypeVar

import torch

Key = TypeVar("Key", bound=Hashable)


class StepGraphs(Generic[Key]):
    """A graph for each key that `step` is called with, where equal keys run equal kernels.

    The first call with a key runs the step itself, so that libraries set up what they need; the
    second records it. Where recording fails, all steps run as they are from then on, with one
    warning.
    """

    def __init__(self, step: Callable[[Key], None]) -> None:
        self.step = step
        self.pool: Any = None  # memory for what lives only inside of a step, shared by all graphs
        self.known: set[Key] = set()
        self.replays: dict[Key, Callable[[], None]] = {}
        self.failed = False

    def run(self, key: Key) -> None:
        """Take one step."""
        if self.failed or key not in self.known:
            self.known.add(key)
            self.step(key)
            return
        if key not in self.replays:
            try:
                self.replays[key] = self.record(partial(self.step, key))
            except RuntimeError as error:  # nothing has run yet: recording does not execute
                self.failed = True
                self.replays.clear()
                cause = str(error).strip().partition("\n")[0]
                warnings.warn(f"decoding runs without CUDA graphs: {cause}", stacklevel=2)
                self.step(key)
                return
        self.replays[key]()

    def record(self, step: Callable[[], None]) -> Callable[[], None]:
        """Record what `step` asks of the device; calling the result does it."""
        graph = torch.cuda.CUDAGraph()
        # Other threads (a judge in this process, say) may use the device meanwhile.
        with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
            step()
        self.pool = graph.pool()
        return graph.replay

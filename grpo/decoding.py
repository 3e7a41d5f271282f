"""One step of decoding: the state of all rows on the device, and how each gets its next token.

Whatever a step reads or writes lies at a fixed address, and whatever decides which kernels it runs
is in its `Window`. So two steps with equal windows are one and the same program: that is what lets
cuda_graphs.py record it once and replay it.
"""

from collections.abc import Sequence
from dataclasses import astuple, dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from grpo.cuda_graphs import StepGraphs
from grpo.sampling import Sampling, sample, uniform
from grpo.shared_prefix import Layout, SharedPrefixCache, no_mask

TOKENS_PER_BUCKET = 128


@dataclass(frozen=True)
class Size:
    """What a decoder has room for: rows; prompts (slots); rows of one prompt (lanes); tokens of a
    prompt, of a completion."""

    rows: int
    slots: int
    lanes: int
    prefix_tokens: int
    own_tokens: int

    def holds(self, other: "Size") -> bool:
        """Whether `other` fits in."""
        return self.join(other) == self

    def join(self, other: "Size") -> "Size":
        """The smallest size that holds both."""
        return Size(*map(max, astuple(self), astuple(other)))

    def in_buckets(self) -> "Size":
        """Room for every `Window.in_buckets` of what fits in this size."""
        tokens = bucket_of_tokens(self.prefix_tokens), bucket_of_tokens(self.own_tokens)
        return Size(self.rows, self.slots, self.lanes, *tokens)


@dataclass(frozen=True)
class Window:
    """The part of the state that a step looks at; see `Layout` for lanes.

    rows, slots: the first so many; lanes: per slot; prefix_tokens, own_tokens: the first so many
    places of each prompt and of each completion; in_order: whether rows are lanes already.
    """

    rows: int
    slots: int
    lanes: int
    prefix_tokens: int
    own_tokens: int = 0
    in_order: bool = False

    def in_buckets(self, size: Size) -> "Window":
        """A window at least as large, one of few: each different one costs a recording."""
        return Window(
            self.rows,
            size.slots,
            size.lanes,
            bucket_of_tokens(self.prefix_tokens),
            bucket_of_tokens(self.own_tokens),
            self.in_order,
        )


def bucket_of_rows(rows: int) -> int:
    """The number of rows that a batch is padded to: 2, 4, 8, then multiples of 8.

    At least 2, since one row takes other kernels (matrix times vector) that round differently.
    """
    return next((size for size in (2, 4) if rows <= size), -(-rows // 8) * 8)


def bucket_of_tokens(tokens: int) -> int:
    """The next multiple of 128."""
    return -(-tokens // TOKENS_PER_BUCKET) * TOKENS_PER_BUCKET


class Decoder:
    """The rows of a batch on the device: R rows of at most T tokens, over S prompts.

    tokens, logprobs: [R, T]; keys: [R], of the random numbers; length: [R], how many tokens of the
    row have been run through the model, which is also the place of its newest token; stopped_at:
    [R], the place of its first stop token (T while there is none); alive: [R], whether it holds a
    completion; prompt_length, lane_of_row: [R]; slot_length: [S], tokens of each prompt (at least
    1); row_of_lane: [S · W], for W lanes per slot.
    """

    def __init__(
        self, model: PreTrainedModel, size: Size, sampling: Sampling, stop_ids: Sequence[int]
    ) -> None:
        self.size, self.sampling, self.stop_ids = size, sampling, tuple(stop_ids)
        self.decoder, self.head = model.get_decoder(), model.get_output_embeddings()
        self.device = model.device
        self.mask_dtype = torch.promote_types(model.dtype, torch.float32)
        self.cache = SharedPrefixCache(size.slots, size.prefix_tokens, size.rows, size.own_tokens)

        def zeros(*shape: int, dtype: torch.dtype = torch.long) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=self.device)

        self.stops = torch.tensor(self.stop_ids, dtype=torch.long, device=self.device)
        self.tokens = zeros(size.rows, size.own_tokens)
        self.logprobs = zeros(size.rows, size.own_tokens, dtype=torch.float64)
        self.length, self.keys, self.stopped_at = (zeros(size.rows) for _ in range(3))
        self.alive = zeros(size.rows, dtype=torch.bool)
        self.prompt_length, self.lane_of_row = zeros(size.rows), zeros(size.rows)
        self.slot_length = zeros(size.slots) + 1
        self.row_of_lane = zeros(size.slots * size.lanes)
        self.no_mask = no_mask(self.device)
        self.graphs: StepGraphs[Window] | None = StepGraphs() if uses_graphs(self.device) else None
        self.addresses = addresses_of(model)

    def serves(
        self, model: PreTrainedModel, size: Size, sampling: Sampling, stop_ids: Sequence[int]
    ) -> bool:
        """Whether it can be used again, for a batch of this size."""
        same = (self.sampling, self.stop_ids) == (sampling, tuple(stop_ids))
        return same and self.size.holds(size) and self.addresses == addresses_of(model)

    def prefill(self, slot: int, prompt: Sequence[int], rows: Sequence[int], keys: Tensor) -> None:
        """Run a prompt into a slot, and sample the first token of each of its rows.

        keys: int64, one per row, or one for all of them.
        """
        hidden = self.decoder(
            input_ids=torch.tensor([prompt], device=self.device),
            position_ids=torch.arange(len(prompt), device=self.device)[None],
            attention_mask=self.no_mask,
            use_cache=False,
            attend=self.cache.prefill(slot),
        ).last_hidden_state[:, -1]
        self.slot_length[slot] = len(prompt)
        places = torch.tensor(rows, device=self.device)
        self.keys[places] = keys.to(self.device)
        self.length[places] = 0
        self.stopped_at[places] = self.size.own_tokens
        self.append(places, self.head(hidden).expand(len(rows), -1))

    def arrange(
        self,
        alive: Sequence[bool],
        prompt_length: Sequence[int],
        lane_of_row: Sequence[int],
        row_of_lane: Sequence[int],
    ) -> None:
        """Say which rows hold a completion, and which prompt each of them belongs to."""
        for state, values in (
            (self.alive, alive),
            (self.prompt_length, prompt_length),
            (self.lane_of_row, lane_of_row),
            (self.row_of_lane, row_of_lane),
        ):
            state[: len(values)] = torch.tensor(values, dtype=state.dtype, device=self.device)

    def compact(self, live: Sequence[int]) -> None:
        """Move the given rows to the front, in that order."""
        rows = torch.tensor(live, device=self.device)
        self.cache.keep_rows(rows)
        for state in (self.tokens, self.logprobs, self.length, self.keys, self.stopped_at):
            state[: len(live)] = state[rows]

    def widen(self, window: Window) -> Window:
        """The window that `run` is to be given for this one."""
        return window if self.graphs is None else window.in_buckets(self.size)

    def run(self, window: Window) -> None:
        """Take a step, as a graph where there are graphs."""
        if self.graphs is None:
            self.step(window)
        else:
            self.graphs.run(self.step, window)

    def step(self, window: Window) -> None:
        """Run the newest token of every row through the model and sample the next one."""
        rows = window.rows
        length, prompt_length = self.length[:rows], self.prompt_length[:rows]
        layout = Layout(
            own_length=length,
            prefix_mask=self.mask(self.slot_length[: window.slots], window.prefix_tokens),
            own_mask=self.mask(length + 1, window.own_tokens),
            row_of_lane=self.row_of_lane[: window.slots * window.lanes],
            lane_of_row=None if window.in_order else self.lane_of_row[:rows],
        )
        hidden = self.decoder(
            input_ids=self.tokens[:rows].gather(1, length[:, None]),
            position_ids=(prompt_length + length)[:, None],
            attention_mask=self.no_mask,
            use_cache=False,
            attend=self.cache.decode(layout),
        ).last_hidden_state[:, 0]
        length += self.alive[:rows]
        self.append(torch.arange(rows, device=self.device), self.head(hidden))

    def mask(self, lengths: Tensor, places: int) -> Tensor:
        """Additive mask [N, 1, 1, places]: 0 at the first lengths [N] places, -inf elsewhere."""
        hidden = torch.arange(places, device=self.device) >= lengths[:, None]
        mask = torch.zeros(hidden.shape, dtype=self.mask_dtype, device=self.device)
        return mask.masked_fill_(hidden, float("-inf"))[:, None, None]

    def append(self, rows: Tensor, logits: Tensor) -> None:
        """Sample from logits [n, V] and write the tokens at the newest place of `rows` [n]."""
        length = self.length[rows]
        tokens, logprobs = sample(logits, self.sampling, uniform(self.keys[rows], length))
        self.tokens[rows, length] = tokens
        self.logprobs[rows, length] = logprobs.to(self.logprobs.dtype)
        # Not torch.isin: with many stop ids it sorts, and the host would wait.
        stops = (tokens[:, None] == self.stops).any(-1)
        first_stop = torch.where(stops, length, self.size.own_tokens)
        self.stopped_at[rows] = torch.minimum(self.stopped_at[rows], first_stop)


def uses_graphs(device: torch.device) -> bool:
    """Whether steps are recorded on this device."""
    return device.type == "cuda"


def addresses_of(model: PreTrainedModel) -> list[int]:
    """Where the parameters lie: graphs hold these addresses."""
    return [parameter.data_ptr() for parameter in model.parameters()]

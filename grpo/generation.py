"""Batched generation in groups: a prompt is run once, and its completions grow side by side.

A queue of prompts feeds a batch of rows. Each step adds one token to every row. Every few steps the
host looks which rows have ended: those are handed out and dropped, and waiting prompts take their
place, so that a batch of completions of uneven length stays full.
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import PreTrainedModel

from grpo.decoding import Decoder, Size, Window, bucket_of_rows, uses_graphs
from grpo.packed_linear import packed_linear_layers
from grpo.rollout import Completion
from grpo.sampling import Sampling, random_key
from grpo.sharding import plain_copy
from grpo.shared_prefix import use_shared_prefix

# To look at the rows makes the host wait for the device; not to look lets ended rows run on.
STEPS_BETWEEN_LOOKS = 8

OnFinish = Callable[[int, int, Completion], None]


@dataclass(frozen=True)
class Branch:
    """A completion in the making: which prompt, which sample of it, and its largest length."""

    prompt: int
    sample: int
    limit: int


def generate_groups(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    *,
    group_size: int,
    max_new_tokens: int | Sequence[Sequence[int]],
    sampling: Sampling,
    stop_ids: Sequence[int],
    seed: int = 0,
    step: int = 0,
    prompt_ids: Sequence[int] | None = None,
    on_finish: OnFinish | None = None,
    max_rows: int = 64,
) -> list[list[Completion]]:
    """Sample `group_size` completions of each prompt.

    prompts: token ids, without padding. max_new_tokens: one for all, or one per prompt and sample.
    prompt_ids: a stable number per prompt, from which (with seed, step, sample and position) its
    random numbers are hashed; the place in `prompts` when None. on_finish(prompt, sample,
    completion) is called as completions end. max_rows: most completions that grow at once.

    A model sharded by FSDP2 is gathered into a plain copy first, on all ranks together.

    Returns the completions, [len(prompts)][group_size]. Raises ValueError for an empty prompt or a
    limit below 1, UnsupportedModel where the model's attention cannot be shared.
    """
    limits = _limits(max_new_tokens, len(prompts), group_size)
    if not all(len(prompt) for prompt in prompts):
        raise ValueError("a prompt is empty: generation needs at least one token to start from")
    prompt_ids = range(len(prompts)) if prompt_ids is None else prompt_ids
    model = plain_copy(model)
    use_shared_prefix(model)

    results: dict[tuple[int, int], Completion] = {}
    waiting = deque(
        [Branch(i, j, limits[i][j]) for j in range(first, min(first + max_rows, group_size))]
        for i in range(len(prompts))
        for first in range(0, group_size, max_rows)
    )
    if not waiting:
        return []
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode(), packed_linear_layers(model):
            size = size_for(waiting, prompts, max_rows)
            batch = Batch(find_decoder(model, size, sampling, stop_ids), waiting, max_rows)
            while waiting or batch.rows:
                while waiting and batch.has_room(len(waiting[0])):
                    branches = waiting.popleft()
                    prompt = branches[0].prompt
                    samples = torch.tensor([branch.sample for branch in branches])
                    keys = random_key(seed, step, prompt_ids[prompt], samples)
                    batch.admit(branches, prompts[prompt], keys)
                batch.arrange()
                for _ in range(batch.steps_until_look(STEPS_BETWEEN_LOOKS)):
                    batch.step()
                for branch, completion in batch.collect():
                    results[branch.prompt, branch.sample] = completion
                    if on_finish is not None:
                        on_finish(branch.prompt, branch.sample, completion)
    finally:
        model.train(was_training)
    return [[results[i, j] for j in range(group_size)] for i in range(len(prompts))]


def _limits(
    max_new_tokens: int | Sequence[Sequence[int]], prompts: int, group_size: int
) -> list[list[int]]:
    """Most tokens of each completion, [prompts][group_size]."""
    if isinstance(max_new_tokens, int):
        limits = [[max_new_tokens] * group_size for _ in range(prompts)]
    else:
        limits = [list(row) for row in max_new_tokens]
        if len(limits) != prompts or any(len(row) != group_size for row in limits):
            raise ValueError(
                f"max_new_tokens must be one number, or {prompts} lists of {group_size} numbers"
            )
    if any(limit < 1 for row in limits for limit in row):
        raise ValueError("max_new_tokens must be at least 1")
    return limits


def size_for(
    waiting: Sequence[Sequence[Branch]], prompts: Sequence[Sequence[int]], max_rows: int
) -> Size:
    """The room that is needed to run what is waiting."""
    rows = bucket_of_rows(min(max_rows, sum(map(len, waiting))))
    lanes = max(map(len, waiting))
    # Twice the prompts that fill the rows, so that stragglers do not keep new prompts waiting.
    slots = min(len(waiting), 2 * max(1, rows // lanes))
    longest = max(branch.limit for branches in waiting for branch in branches)
    return Size(rows, slots, lanes, max(map(len, prompts)), longest)


# Decoders that record graphs: those hold addresses in the model and in the decoder.
KEPT: WeakKeyDictionary[PreTrainedModel, Decoder] = WeakKeyDictionary()


def find_decoder(
    model: PreTrainedModel, size: Size, sampling: Sampling, stop_ids: Sequence[int]
) -> Decoder:
    """A decoder with room for so much.

    One that records graphs is kept as long as its model, and replaced when it has not the room,
    or samples in another way. Without graphs nothing is gained by that, and the memory is free for
    the update.
    """
    if not uses_graphs(model.device):
        return Decoder(model, size, sampling, stop_ids)
    kept = KEPT.pop(model, None)
    if kept is None or not kept.serves(model, size, sampling, stop_ids):
        room = size.in_buckets() if kept is None else kept.size.join(size.in_buckets())
        kept = None  # its memory goes before that of the new one comes
        kept = Decoder(model, room, sampling, stop_ids)
    kept.cache.clear()
    KEPT[model] = kept
    return kept


@dataclass
class Row:
    """A branch in a row of the batch, and the host's copy of what it knows without asking."""

    branch: Branch
    slot: int
    length: int = 0


class Batch:
    """The host's side of the rows that grow together: which of them holds what.

    rows: by their number, those that hold a branch (the others are spare); prompt_lengths: in
    tokens, for each slot; window: what the next steps look at; arranged: whether that and the
    decoder know of all changes to the rows.
    """

    window: Window

    def __init__(
        self, decoder: Decoder, waiting: Sequence[Sequence[Branch]], max_rows: int
    ) -> None:
        self.decoder = decoder
        self.max_live = min(max_rows, sum(map(len, waiting)))
        self.rows: dict[int, Row] = {}
        self.prompt_lengths = [0] * decoder.size.slots
        self.arranged = False

    def has_room(self, branches: int) -> bool:
        """Whether so many more rows, and a slot for their prompt, are free."""
        return len(self.rows) + branches <= self.max_live and bool(self._free_slots())

    def _free_slots(self) -> list[int]:
        taken = {row.slot for row in self.rows.values()}
        return [slot for slot in range(len(self.prompt_lengths)) if slot not in taken]

    def admit(self, branches: Sequence[Branch], prompt: Sequence[int], keys: Tensor) -> None:
        """Give a prompt a free slot, and each of its branches a free row."""
        slot = self._free_slots()[0]
        free = [row for row in range(self.decoder.size.rows) if row not in self.rows]
        chosen = free[: len(branches)]
        self.decoder.prefill(slot, prompt, chosen, keys)
        self.prompt_lengths[slot] = len(prompt)
        self.rows |= {row: Row(b, slot) for row, b in zip(chosen, branches, strict=True)}
        self.arranged = False

    def arrange(self) -> None:
        """Close the gaps that ended rows left, and lay the rows out over their prompts."""
        if self.arranged:
            return
        padded = bucket_of_rows(len(self.rows))
        if max(self.rows, default=0) >= padded:
            live = sorted(self.rows)
            self.decoder.compact(live)
            self.rows = {new: self.rows[old] for new, old in enumerate(live)}
        rows_of: dict[int, list[int]] = {}  # the rows of each slot
        for index, row in sorted(self.rows.items()):
            rows_of.setdefault(row.slot, []).append(index)
        window = self.decoder.widen(
            Window(
                rows=padded,
                slots=max(rows_of, default=0) + 1,
                lanes=max(map(len, rows_of.values()), default=1),
                prefix_tokens=max((self.prompt_lengths[slot] for slot in rows_of), default=1),
            )
        )
        row_of_lane = [0] * (window.slots * window.lanes)
        lane_of_row = [0] * padded
        prompt_length = [1] * padded
        for slot, indices in rows_of.items():
            for lane, index in enumerate(indices, start=slot * window.lanes):
                row_of_lane[lane], lane_of_row[index] = index, lane
                prompt_length[index] = self.prompt_lengths[slot]
        in_order = row_of_lane == lane_of_row == list(range(padded))
        self.window = replace(window, in_order=in_order)
        alive = [row in self.rows for row in range(padded)]
        self.decoder.arrange(alive, prompt_length, lane_of_row, row_of_lane)
        self.arranged = True

    def steps_until_look(self, most: int) -> int:
        """How many steps may be taken blindly: no row may pass its own limit."""
        return min([most, *(row.branch.limit - 1 - row.length for row in self.rows.values())])

    def step(self) -> None:
        """One more token for every row."""
        own_tokens = max(row.length for row in self.rows.values()) + 1
        self.decoder.run(self.decoder.widen(replace(self.window, own_tokens=own_tokens)))
        for row in self.rows.values():
            row.length += 1

    def collect(self) -> list[tuple[Branch, Completion]]:
        """Take out the branches that have ended, by a stop token or at their limit."""
        decoder = self.decoder
        stopped_at = decoder.stopped_at.tolist()
        ended = []
        for index, row in sorted(self.rows.items()):
            stopped = stopped_at[index] <= row.length
            if not stopped and row.length + 1 < row.branch.limit:
                continue
            count = stopped_at[index] + 1 if stopped else row.branch.limit
            completion = Completion(
                token_ids=decoder.tokens[index, :count].tolist(),
                logprobs=decoder.logprobs[index, :count].tolist(),
                finish_reason="stop" if stopped else "length",
            )
            del self.rows[index]
            self.arranged = False
            ended.append((row.branch, completion))
        return ended

"""Batched generation in groups: a prompt is run once, and its completions grow side by side.

A queue of prompts feeds a batch of rows. Each step adds one token to every row. Every few steps the
host looks which rows have ended: those are handed out and dropped, and waiting prompts take their
place, so that a batch of completions of uneven length stays full.
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from grpo.packed_linear import packed_linear_layers
from grpo.parallel import plain_copy
from grpo.rollout import Completion
from grpo.sampling import Sampling, random_key, sample, uniform
from grpo.shared_prefix import Layout, SharedPrefixCache, use_shared_prefix

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
            batch = Batch(model, prompts, waiting, max_rows, sampling, stop_ids)
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


def bucket(rows: int) -> int:
    """The number of rows that a batch is padded to: 2, 4, 8, then multiples of 8.

    At least 2, since one row takes other kernels (matrix times vector) that round differently.
    """
    return next((size for size in (2, 4) if rows <= size), -(-rows // 8) * 8)


@dataclass
class Row:
    """A branch in a row of the batch, and the host's copy of what it knows without asking."""

    branch: Branch
    slot: int
    length: int = 0


class Batch:
    """The rows that grow together, and their state on the device.

    `rows` says which of the R rows hold a branch; the others are spare. For completions of at most
    T tokens: `tokens` and `logprobs` [R, T]; `length` [R], how many tokens of the branch have been
    run through the model, which is also the place of its newest token; `stopped_at` [R], the place
    of its first stop token (T while there is none).
    """

    layout: Layout
    alive: Tensor  # bool [R'], which of the padded rows hold a branch

    def __init__(
        self,
        model: PreTrainedModel,
        prompts: Sequence[Sequence[int]],
        waiting: Sequence[Sequence[Branch]],
        max_rows: int,
        sampling: Sampling,
        stop_ids: Sequence[int],
    ) -> None:
        device = model.device
        widest = max(len(branches) for branches in waiting)
        self.max_live = min(max_rows, sum(len(branches) for branches in waiting))
        capacity = max(branch.limit for branches in waiting for branch in branches)
        row_count = bucket(self.max_live)
        # Twice the prompts that fill the rows, so that stragglers do not keep new prompts waiting.
        slots = min(len(waiting), 2 * max(1, row_count // widest))

        self.decoder, self.head = model.get_decoder(), model.get_output_embeddings()
        self.sampling = sampling
        self.stop_ids = torch.tensor(list(stop_ids), dtype=torch.long, device=device)
        self.cache = SharedPrefixCache(slots, max(map(len, prompts)), row_count, capacity)

        self.rows: dict[int, Row] = {}
        self.prompt_lengths = [0] * slots

        def zeros(*shape: int, dtype: torch.dtype = torch.long) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        self.tokens = zeros(row_count, capacity)
        self.logprobs = zeros(row_count, capacity, dtype=torch.float64)
        self.length, self.keys = zeros(row_count), zeros(row_count)
        self.stopped_at = zeros(row_count) + capacity

    def has_room(self, branches: int) -> bool:
        """Whether so many more rows, and a slot for their prompt, are free."""
        return len(self.rows) + branches <= self.max_live and bool(self._free_slots())

    def _free_slots(self) -> list[int]:
        taken = {row.slot for row in self.rows.values()}
        return [slot for slot in range(len(self.prompt_lengths)) if slot not in taken]

    def admit(self, branches: Sequence[Branch], prompt: Sequence[int], keys: Tensor) -> None:
        """Run a prompt into a free slot and sample the first token of each of its branches."""
        slot = self._free_slots()[0]
        device = self.tokens.device
        hidden = self.decoder(
            input_ids=torch.tensor([prompt], device=device),
            position_ids=torch.arange(len(prompt), device=device)[None],
            use_cache=False,
            attend=self.cache.prefill(slot),
        ).last_hidden_state[:, -1]
        self.prompt_lengths[slot] = len(prompt)
        free = [row for row in range(len(self.tokens)) if row not in self.rows]
        chosen = free[: len(branches)]
        self.rows |= {row: Row(b, slot) for row, b in zip(chosen, branches, strict=True)}
        rows = torch.tensor(chosen, device=device)
        self.keys[rows] = keys.to(device)
        self.length[rows] = 0
        self.stopped_at[rows] = self.tokens.shape[1]
        self._append(rows, self.head(hidden).expand(len(chosen), -1))

    def arrange(self) -> None:
        """Close the gaps that ended rows left, and lay the rows out over their prompts."""
        padded = bucket(len(self.rows))
        if max(self.rows, default=0) >= padded:
            self._compact()
        lanes: dict[int, list[int]] = {}
        for index, row in sorted(self.rows.items()):
            lanes.setdefault(row.slot, []).append(index)
        slots, width = max(lanes, default=0) + 1, max(map(len, lanes.values()), default=1)
        row_of_lane = [0] * (slots * width)
        lane_of_row = [0] * padded
        prompt_length = [1] * padded
        for slot, indices in lanes.items():
            for lane, index in enumerate(indices, start=slot * width):
                row_of_lane[lane], lane_of_row[index] = index, lane
                prompt_length[index] = self.prompt_lengths[slot]
        device = self.tokens.device
        self.layout = Layout(
            lane_of_row=torch.tensor(lane_of_row, device=device),
            row_of_lane=torch.tensor(row_of_lane, device=device),
            prompt_length=torch.tensor(prompt_length, device=device),
            rows=torch.arange(padded, device=device),
            slots=slots,
            prefix_tokens=max(self.prompt_lengths[:slots]),
            in_order=row_of_lane == lane_of_row == list(range(padded)),
        )
        # Spare rows stay where they are: their place must remain inside the cache.
        self.alive = torch.tensor([row in self.rows for row in range(padded)], device=device)

    def _compact(self) -> None:
        """Move the rows that hold a branch to the front."""
        live = sorted(self.rows)
        rows = torch.tensor(live, device=self.tokens.device)
        self.cache.keep_rows(rows)
        for state in (self.tokens, self.logprobs, self.length, self.keys, self.stopped_at):
            state[: len(live)] = state[rows]
        self.rows = {new: self.rows[old] for new, old in enumerate(live)}
        self.length[len(live) :] = 0

    def steps_until_look(self, most: int) -> int:
        """How many steps may be taken blindly: no row may pass its own limit."""
        return min([most, *(row.branch.limit - 1 - row.length for row in self.rows.values())])

    def step(self) -> None:
        """Run the newest token of every row through the model and sample the next one."""
        layout, length = self.layout, self.length[: len(self.alive)]
        own_tokens = max(row.length for row in self.rows.values()) + 1
        hidden = self.decoder(
            input_ids=self.tokens[: len(length)].gather(1, length[:, None]),
            position_ids=(layout.prompt_length + length)[:, None],
            attention_mask=self._mask(layout, length, own_tokens),
            use_cache=False,
            attend=self.cache.decode(layout, length, own_tokens),
        ).last_hidden_state[:, 0]
        for row in self.rows.values():
            row.length += 1
        length += self.alive
        self._append(torch.arange(len(length), device=length.device), self.head(hidden))

    def _mask(self, layout: Layout, length: Tensor, own_tokens: int) -> Tensor:
        """Additive mask [R, 1, 1, prefix + own]: 0 where a row may look, -inf elsewhere."""
        places = torch.arange(max(layout.prefix_tokens, own_tokens), device=length.device)
        visible = torch.cat(
            [
                places[: layout.prefix_tokens] < layout.prompt_length[:, None],
                places[:own_tokens] <= length[:, None],
            ],
            dim=-1,
        )
        mask = torch.zeros(visible.shape, dtype=torch.float32, device=length.device)
        return mask.masked_fill(~visible, float("-inf"))[:, None, None]

    def _append(self, rows: Tensor, logits: Tensor) -> None:
        """Sample from logits [n, V] and write the tokens at the newest place of `rows` [n]."""
        length = self.length[rows]
        tokens, logprobs = sample(logits, self.sampling, uniform(self.keys[rows], length))
        self.tokens[rows, length] = tokens
        self.logprobs[rows, length] = logprobs.to(self.logprobs.dtype)
        stops = torch.isin(tokens, self.stop_ids)
        first_stop = torch.where(stops, length, self.tokens.shape[1])
        self.stopped_at[rows] = torch.minimum(self.stopped_at[rows], first_stop)

    def collect(self) -> list[tuple[Branch, Completion]]:
        """Take out the branches that have ended, by a stop token or at their limit."""
        stopped_at = self.stopped_at.tolist()
        ended = []
        for index, row in sorted(self.rows.items()):
            stopped = stopped_at[index] <= row.length
            if not stopped and row.length + 1 < row.branch.limit:
                continue
            count = stopped_at[index] + 1 if stopped else row.branch.limit
            completion = Completion(
                token_ids=self.tokens[index, :count].tolist(),
                logprobs=self.logprobs[index, :count].tolist(),
                finish_reason="stop" if stopped else "length",
            )
            del self.rows[index]
            ended.append((row.branch, completion))
        return ended

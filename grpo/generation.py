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
    if hasattr(model, "full_copy"):
        model = model.full_copy()
    use_shared_prefix(model)

    results: list[list[Completion | None]] = [[None] * group_size for _ in prompts]
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
        with torch.no_grad():
            batch = Batch(model, prompts, waiting, max_rows, sampling, stop_ids)
            while waiting or batch.live:
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
                    results[branch.prompt][branch.sample] = completion
                    if on_finish is not None:
                        on_finish(branch.prompt, branch.sample, completion)
    finally:
        model.train(was_training)
    return results


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


class Batch:
    """The rows that grow together: one live branch or none in each, and their state on the device.

    For R rows of at most T tokens: `tokens` and `logprobs` [R, T]; `length` [R], how many tokens
    of the branch have been run through the model, which is also the place of its newest token;
    `stopped_at` [R], the place of its first stop token (T while there is none).
    """

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
        rows = bucket(min(max_rows, sum(len(branches) for branches in waiting)))
        capacity = max(branch.limit for branches in waiting for branch in branches)
        # Twice the prompts that fill the rows, so that stragglers do not keep new prompts waiting.
        slots = min(len(waiting), 2 * max(1, rows // widest))

        self.decoder, self.head = model.get_decoder(), model.get_output_embeddings()
        self.sampling = sampling
        self.stop_ids = torch.tensor(list(stop_ids), dtype=torch.long, device=device)
        self.cache = SharedPrefixCache(slots, max(map(len, prompts)), rows, capacity)

        self.branches: list[Branch | None] = [None] * rows
        self.slot_of_row = [0] * rows
        self.length_of_row = [0] * rows  # the host's copy of `length`: it knows without asking
        self.prompt_length_of_slot = [0] * slots
        self.max_live = min(max_rows, rows)

        def zeros(*shape: int, dtype: torch.dtype = torch.long) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        self.tokens, self.length, self.keys = zeros(rows, capacity), zeros(rows), zeros(rows)
        self.logprobs = zeros(rows, capacity, dtype=torch.float64)
        self.stopped_at = zeros(rows) + capacity
        self.layout: Layout | None = None
        self.padded_rows = 0
        self.alive: Tensor | None = None  # bool [padded rows]

    @property
    def live(self) -> list[int]:
        """The rows that hold a branch."""
        return [row for row, branch in enumerate(self.branches) if branch is not None]

    def has_room(self, branches: int) -> bool:
        """Whether so many more rows, and a slot for their prompt, are free."""
        return len(self.live) + branches <= self.max_live and self._free_slot() is not None

    def _free_slot(self) -> int | None:
        taken = {self.slot_of_row[row] for row in self.live}
        return next((s for s in range(len(self.prompt_length_of_slot)) if s not in taken), None)

    def admit(self, branches: Sequence[Branch], prompt: Sequence[int], keys: Tensor) -> None:
        """Run a prompt into a free slot and sample the first token of each of its branches."""
        slot = self._free_slot()
        device = self.tokens.device
        hidden = self.decoder(
            input_ids=torch.tensor([prompt], device=device),
            position_ids=torch.arange(len(prompt), device=device)[None],
            use_cache=False,
            attend=self.cache.prefill(slot),
        ).last_hidden_state[:, -1]
        self.prompt_length_of_slot[slot] = len(prompt)
        free = [row for row, branch in enumerate(self.branches) if branch is None]
        chosen = free[: len(branches)]
        for row, branch in zip(chosen, branches, strict=True):
            self.branches[row] = branch
            self.slot_of_row[row] = slot
            self.length_of_row[row] = 0
        rows = torch.tensor(chosen, device=device)
        self.keys[rows] = keys.to(device)
        self.length[rows] = 0
        self.stopped_at[rows] = self.tokens.shape[1]
        self._append(rows, self.head(hidden).expand(len(chosen), -1))

    def arrange(self) -> None:
        """Close the gaps that ended rows left, and lay the rows out over their prompts."""
        live = self.live
        self.padded_rows = bucket(len(live))
        if live and live[-1] >= self.padded_rows:
            self._compact(live)
        device = self.tokens.device
        lanes: dict[int, list[int]] = {}
        for row in self.live:
            lanes.setdefault(self.slot_of_row[row], []).append(row)
        slots, width = max(lanes, default=0) + 1, max(map(len, lanes.values()), default=1)
        row_of_lane = [0] * (slots * width)
        lane_of_row = [0] * self.padded_rows
        for slot, rows in lanes.items():
            for lane, row in enumerate(rows, start=slot * width):
                row_of_lane[lane], lane_of_row[row] = row, lane
        # Spare rows stay where they are: their place must remain inside the cache.
        alive = [branch is not None for branch in self.branches[: self.padded_rows]]
        self.alive = torch.tensor(alive, device=device)
        lengths = [self.prompt_length_of_slot[s] for s in self.slot_of_row[: self.padded_rows]]
        self.layout = Layout(
            lane_of_row=torch.tensor(lane_of_row, device=device),
            row_of_lane=torch.tensor(row_of_lane, device=device),
            prompt_length=torch.tensor(lengths, device=device),
            slots=slots,
            prefix_tokens=max(self.prompt_length_of_slot[:slots]),
        )

    def _compact(self, live: list[int]) -> None:
        """Move the live rows to the front."""
        rows = torch.tensor(live, device=self.tokens.device)
        self.cache.keep_rows(rows)
        for state in (self.tokens, self.logprobs, self.length, self.keys, self.stopped_at):
            state[: len(live)] = state[rows]
        spare = len(self.branches) - len(live)
        self.branches = [self.branches[row] for row in live] + [None] * spare
        self.slot_of_row = [self.slot_of_row[row] for row in live] + [0] * spare
        self.length_of_row = [self.length_of_row[row] for row in live] + [0] * spare
        self.length[len(live) :] = 0

    def steps_until_look(self, most: int) -> int:
        """How many steps may be taken blindly: no row may pass its own limit."""
        left = [self.branches[row].limit - 1 - self.length_of_row[row] for row in self.live]
        return min([most, *left])

    def step(self) -> None:
        """Run the newest token of every row through the model and sample the next one."""
        rows, layout = self.padded_rows, self.layout
        length = self.length[:rows]
        own_tokens = max(self.length_of_row[row] for row in self.live) + 1
        hidden = self.decoder(
            input_ids=self.tokens[:rows].gather(1, length[:, None]),
            position_ids=(layout.prompt_length + length)[:, None],
            attention_mask=self._mask(layout, length, own_tokens),
            use_cache=False,
            attend=self.cache.decode(layout, length, own_tokens),
        ).last_hidden_state[:, 0]
        for row in self.live:
            self.length_of_row[row] += 1
        length += self.alive
        self._append(torch.arange(rows, device=length.device), self.head(hidden))

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
        mask = torch.zeros(visible.shape, dtype=self.head.weight.dtype, device=length.device)
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
        for row in self.live:
            branch = self.branches[row]
            stopped = stopped_at[row] <= self.length_of_row[row]
            if not stopped and self.length_of_row[row] + 1 < branch.limit:
                continue
            count = stopped_at[row] + 1 if stopped else branch.limit
            completion = Completion(
                token_ids=self.tokens[row, :count].tolist(),
                logprobs=self.logprobs[row, :count].tolist(),
                finish_reason="stop" if stopped else "length",
            )
            self.branches[row] = None
            ended.append((branch, completion))
        return ended

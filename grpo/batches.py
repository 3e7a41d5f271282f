"""What an update is made on: samples in packed rows, rows in minibatches."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from grpo.packing import PackedRow, pack, plan_rows
from grpo.rollout import Completion


@dataclass
class Sample:
    """A completion on its way to the loss: log-probs [T] of its T tokens, None where not needed."""

    prompt: list[int]
    completion: Completion
    reference: Tensor | None = None
    old: Tensor | None = None

    @property
    def tokens(self) -> int:
        """How many tokens it has."""
        return len(self.completion.token_ids)

    @property
    def advantage(self) -> float:
        """Its completion's advantage."""
        return self.completion.advantage


@dataclass
class MicroBatch:
    """One packed row and its S samples, N tokens in all. counts: False for an empty one."""

    row: PackedRow
    samples: list[Sample]
    counts: bool = True

    def keep(self, name: str, logprobs: Tensor) -> None:
        """Hand log-probs [N] out to the samples, as their `reference` or `old`."""
        for sample, own in zip(self.samples, logprobs.split(self.row.lengths), strict=True):
            setattr(sample, name, own)

    def kept(self, name: str) -> Tensor | None:
        """What `keep` handed out: [S, T], or None where nothing was."""
        values = [getattr(sample, name) for sample in self.samples]
        return None if values[0] is None else pad_sequence(values, batch_first=True)

    def by_completion(self, values: Tensor) -> Tensor:
        """[N] → [S, T], padded with zeros."""
        return pad_sequence(values.split(self.row.lengths), batch_first=True)

    @property
    def mask(self) -> Tensor:
        """bool [S, T]: which places of `by_completion` hold a token that counts."""
        return self.by_completion(torch.full_like(self.row.targets, self.counts, dtype=torch.bool))


@dataclass
class Minibatch:
    """What one update is made on: this rank's rows; its tokens and completions, run or not."""

    micro_batches: list[MicroBatch]
    tokens: int
    sequences: int


def pack_samples(
    groups: Sequence[Sequence[Sample]], tokens_per_row: int, device: torch.device
) -> list[MicroBatch]:
    """Rows `[x | y1 | … | yG | x' | … ]` of the samples of some groups, see `plan_rows`."""
    lengths = [[len(group[0].prompt), *(s.tokens for s in group)] for group in groups]
    batches = []
    for parts in plan_rows(lengths, tokens_per_row):
        trees = [[groups[group][i] for i in indices] for group, indices in parts]
        row = pack(
            [(tree[0].prompt, [s.completion.token_ids for s in tree]) for tree in trees], device
        )
        batches.append(MicroBatch(row, [sample for tree in trees for sample in tree]))
    return batches

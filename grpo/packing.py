"""Packed rows: whole groups in one row, for scoring and the update.

    [x | y1 | y2 | … | yG]     or several groups     [x | y1 | … | yG | x' | y1' | … ]

A token sees its prompt and its own branch up to itself; positions restart after the prompt at each
branch. So a row equals the separate rows x y1, x y2, …, without the repeated prompt.

`tree_mask` says that in one matrix [L, L]; tree_attention.py computes the same without it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Group = tuple[Sequence[int], Sequence[Sequence[int]]]  # (prompt, completions), as token ids
Part = tuple[int, list[int]]  # (index of a group, indices of some of its completions)


@dataclass
class Tree:
    """One group in a row: the tokens of its prompt, then those of its branches, one after another.

    branches: [G, T], where each branch's tokens are among those of all; shorter ones are filled up
    with 0.
    """

    prompt_tokens: int
    branch_tokens: int
    branches: Tensor


@dataclass
class PackedRow:
    """Groups packed into one row of L tokens, N of which are completion tokens to be scored.

    token_ids, position_ids: [1, L]; tree, branch: [L], which group a token belongs to, and which of
    its branches (0: the prompt); trees: the groups, in order; order: [L], where each token's
    output stands among those of all prompts and (filled up) branches in turn; predictors: [N], the
    place whose output predicts a completion token; targets: [N], that token; lengths: tokens of
    each completion, group by group.
    """

    token_ids: Tensor
    position_ids: Tensor
    tree: Tensor
    branch: Tensor
    trees: list[Tree]
    order: Tensor
    predictors: Tensor
    targets: Tensor
    lengths: list[int]

    @property
    def mask(self) -> Tensor:
        """bool [1, 1, L, L]: True where a query sees a key. Attention is held to it."""
        return tree_mask(self.tree, self.branch)[None, None]


def pack(groups: Sequence[Group], device: torch.device | str) -> PackedRow:
    """Lay groups out as one row.

    The last token of a completion predicts nothing that is scored, so it is not in the row: a
    completion of one token costs nothing beyond its prompt. Raises ValueError where a prompt or a
    completion has no token.
    """
    if not all(len(tokens) for prompt, completions in groups for tokens in (prompt, *completions)):
        raise ValueError("an empty prompt or completion cannot be scored: leave it out")
    token_ids: list[int] = []
    position_ids: list[int] = []
    tree: list[int] = []
    branch: list[int] = []
    trees: list[Tree] = []
    order: list[int] = []
    outputs = 0  # so far, see `order`
    predictors: list[int] = []
    targets: list[int] = []
    for number, (prompt, completions) in enumerate(groups):
        last = len(token_ids) + len(prompt) - 1  # of the prompt
        longest = max((len(c) - 1 for c in completions), default=0)
        branches = torch.zeros(len(completions), longest, dtype=torch.long)
        for which, tokens in enumerate([prompt, *(c[:-1] for c in completions)]):
            here = len(token_ids)
            if which > 0:
                first = here - last - 1
                branches[which - 1, : len(tokens)] = torch.arange(first, first + len(tokens))
                predictors += [last, *range(here, here + len(tokens))]
                targets += completions[which - 1]
            first_position = 0 if which == 0 else len(prompt)
            position_ids += range(first_position, first_position + len(tokens))
            token_ids += tokens
            tree += [number] * len(tokens)
            branch += [which] * len(tokens)
            order += range(outputs, outputs + len(tokens))
            outputs += len(prompt) if which == 0 else longest
        trees.append(Tree(len(prompt), len(token_ids) - last - 1, branches.to(device)))

    def row(values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.long, device=device)

    return PackedRow(
        token_ids=row(token_ids)[None],
        position_ids=row(position_ids)[None],
        tree=row(tree),
        branch=row(branch),
        trees=trees,
        order=row(order),
        predictors=row(predictors),
        targets=row(targets),
        lengths=[len(c) for _, completions in groups for c in completions],
    )


def plan_rows(groups: Sequence[Sequence[int]], budget: int) -> list[list[Part]]:
    """Which completions share a row, so that none has more than `budget` tokens where that is
    possible: short groups together, a long one split, with its prompt repeated.

    groups: for each the tokens of its prompt, then of its completions. Each part goes into the
    first row with room for it. A row holds at least one completion, whatever its length.
    """
    rows: list[list[Part]] = []
    room: list[int] = []
    for group, (prompt, *completions) in enumerate(groups):
        for indices in _split(prompt, completions, budget):
            cost = prompt + sum(completions[i] - 1 for i in indices)
            row = next((r for r, left in enumerate(room) if cost <= left), len(rows))
            if row == len(rows):
                rows.append([])
                room.append(budget)
            rows[row].append((group, indices))
            room[row] -= cost
    return rows


def _split(prompt: int, completions: Sequence[int], budget: int) -> list[list[int]]:
    """Indices of a group's completions, cut where prompt and completions exceed the budget."""
    parts: list[list[int]] = []
    cost = 0
    for i, tokens in enumerate(completions):
        if not parts or cost + tokens - 1 > budget:
            parts.append([])
            cost = prompt
        parts[-1].append(i)
        cost += tokens - 1
    return parts


def tree_mask(tree: Tensor, branch: Tensor) -> Tensor:
    """Who sees whom in a packed row. tree, branch: [L] → bool [L, L] (query, key).

    A token sees what stands before it (and itself) in its own group, if that belongs to the
    prompt (branch 0) or to its own branch.
    """
    order = torch.arange(len(tree), device=tree.device)
    return may_see(tree, branch, order[:, None], order)


def may_see(tree: Tensor, branch: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """`tree_mask` at the places `query` and `key`, two index tensors whose shapes broadcast."""
    same_branch = (branch[query] == branch[key]) | (branch[key] == 0)
    return (query >= key) & (tree[query] == tree[key]) & same_branch

"""Attention over a packed row: a token sees its prompt, and its own branch up to itself.

`packing.tree_mask` says that in one matrix [L, L], most of which is False. Here the same is
computed without it, in one of two ways:

- **by trees**: the prompt attends to itself, and all branches of a group, side by side as a batch,
  to the prompt and to themselves: P² + G·T·(P + T) products in place of (P + G·T)²;
- **by blocks**, on CUDA: FlexAttention, which skips the blocks [128, 128] of the matrix that are
  False throughout. It is compiled, and first compared with the other on a tiny row: where it fails
  or differs, rows are attended by trees.
"""

import warnings
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from grpo.packing import PackedRow, may_see, pack
from grpo.shared_prefix import Attend

BLOCK = 128  # tokens; rows are padded to multiples of it, so that fewer shapes are compiled
FLEX_TOLERANCE = 0.02  # relative; what rounding weights to bfloat16 explains is a few thousandths


def attention_over(row: PackedRow) -> Attend:
    """How a model attends while it runs this row."""
    return partial(_attend, row, cache(partial(tree_blocks, row)))


def _attend(
    row: PackedRow,
    blocks: Callable[[], BlockMask],
    layer: int,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Any,
    scaling: float,
) -> Tensor:
    if query.is_cuda and flex_works(query.device, query.dtype, query.shape[1], *key.shape[1::2]):
        return attend_by_blocks(compiled_flex(), blocks(), query, key, value, scaling)
    return attend_by_trees(row, query, key, value, scaling)


# --- by trees ------------------------------------------------------------------------------------


def attend_by_trees(
    row: PackedRow, query: Tensor, key: Tensor, value: Tensor, scaling: float
) -> Tensor:
    """query [1, H, L, D], key, value [1, K, L, D] → [1, H, L, D].

    The outputs of prompts and (filled up) branches, one after the other, are put back in the row's
    order by `row.order`. On a CPU in at least float32, whose backward pass is the faster one there.
    """
    dtype = query.dtype
    if not query.is_cuda:
        wide = torch.promote_types(dtype, torch.float32)
        query, key, value = (x.to(wide) for x in (query, key, value))
    sizes = [n for tree in row.trees for n in (tree.prompt_tokens, tree.branch_tokens)]
    # Cut in one go: the backward pass then joins the parts instead of adding up padded ones.
    parts = list(zip(*(x.split(sizes, dim=2) for x in (query, key, value)), strict=True))
    outputs = []
    for tree, prompt, branches in zip(row.trees, parts[::2], parts[1::2], strict=True):
        q, k, v = prompt
        outputs.append(
            F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, enable_gqa=True)
        )
        if tree.branches.numel():
            outputs.append(_attend_branches(tree.branches, (k, v), branches, scaling))
    return torch.cat(outputs, dim=2).index_select(2, row.order).to(dtype)


def _attend_branches(
    places: Tensor, prompt: Sequence[Tensor], branches: Sequence[Tensor], scaling: float
) -> Tensor:
    """All branches of a group, each over [prompt | itself].

    places: [G, T], see `Tree`; prompt: key and value [1, K, P, D]; branches: query [1, H, N, D],
    key and value [1, K, N, D] of their N tokens. Returns [1, H, G·T, D]. Places that fill up a
    short branch come after its own, where causality hides them. The H / K query heads of one
    key-value head are laid end to end, as if they were so many more tokens.
    """
    count, length = places.shape
    (_, heads, _, size), key_value_heads = branches[0].shape, prompt[0].shape[1]

    def by_branch(x: Tensor) -> Tensor:  # [1, X, N, D] → [G, X, T, D]
        chosen = x[0].index_select(1, places.flatten())
        return chosen.unflatten(1, (count, length)).transpose(0, 1)

    query, *own = map(by_branch, branches)
    key, value = (
        torch.cat([shared.expand(count, -1, -1, -1), x], dim=2)
        for shared, x in zip(prompt, own, strict=True)
    )
    prompt_length, queries = prompt[0].shape[2], heads // key_value_heads
    visible = torch.ones(
        length, prompt_length + length, dtype=torch.bool, device=query.device
    ).tril(prompt_length)
    output = F.scaled_dot_product_attention(
        query.reshape(count, key_value_heads, queries * length, size),
        key,
        value,
        attn_mask=visible.repeat(queries, 1),
        scale=scaling,
    )
    by_head = output.reshape(count, heads, length, size).transpose(0, 1)
    return by_head.reshape(1, heads, count * length, size)


# --- by blocks -----------------------------------------------------------------------------------


def tree_blocks(row: PackedRow) -> BlockMask:
    """Which blocks of `packing.tree_mask` are not False throughout, without making that matrix.

    A block of keys is seen from a later block of queries if it holds a part of the prompt of one of
    their groups, or of a branch that goes on there. The row is padded to whole blocks; a place of
    the padding sees itself alone.
    """
    padding = -len(row.tree) % BLOCK
    tree = F.pad(row.tree, (0, padding), value=-1)
    branch = torch.cat([row.branch, torch.arange(1, 1 + padding, device=row.branch.device)])

    def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return may_see(tree, branch, query, key)

    block = torch.arange(len(tree), device=tree.device) // BLOCK
    count = len(tree) // BLOCK
    starts = (tree.diff() != 0) | (branch.diff() != 0)
    segment = F.pad(starts.long().cumsum(0), (1, 0))  # a prompt or a branch each

    def holds(what: Tensor, chosen: Tensor | slice = slice(None)) -> Tensor:
        """[blocks, kinds] 1 where a block has a (chosen) token of that kind."""
        kinds = torch.zeros(count, int(what.max()) + 1, device=tree.device)
        kinds[block[chosen], what[chosen]] = 1
        return kinds

    group = tree + 1  # 0 for the padding
    visible = holds(group) @ holds(group, branch == 0).T + holds(segment) @ holds(segment).T
    visible = visible.bool().tril()
    return BlockMask.from_kv_blocks(
        visible.sum(-1, dtype=torch.int32)[None, None],
        visible.int().argsort(dim=-1, descending=True, stable=True).int()[None, None],
        BLOCK_SIZE=BLOCK,
        mask_mod=sees,
        seq_lengths=(len(tree), len(tree)),
    )


def attend_by_blocks(
    flex: Callable[..., Tensor],
    blocks: BlockMask,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scaling: float,
) -> Tensor:
    """query [1, H, L, D], key, value [1, K, L, D] → [1, H, L, D]. flex: `flex_attention`."""
    length = query.shape[2]
    # Contiguous, whether padded or not: each kind of strides would be compiled anew.
    query, key, value = (
        F.pad(x, (0, 0, 0, -length % BLOCK)).contiguous() for x in (query, key, value)
    )
    output = flex(query, key, value, block_mask=blocks, scale=scaling, enable_gqa=True)
    return output[:, :, :length]


@cache
def compiled_flex() -> Callable[..., Tensor]:
    """FlexAttention, compiled when it is first called.

    As a full graph: where that cannot be, it fails, instead of holding all scores at once.
    """
    return cast(Callable[..., Tensor], torch.compile(flex_attention, dynamic=True, fullgraph=True))


@cache
def flex_works(
    device: torch.device, dtype: torch.dtype, heads: int, key_value_heads: int, size: int
) -> bool:
    """Whether FlexAttention runs here, forward and backward, and gives what `by trees` gives."""
    try:
        worst = compare_flex(compiled_flex(), device, dtype, heads, key_value_heads, size)
    except Exception as error:  # a compiler fails in many ways
        problem = str(error).strip().partition("\n")[0]
    else:
        if worst <= FLEX_TOLERANCE:
            return True
        problem = f"its results differ by {worst:.2g}"
    warnings.warn(f"attention runs without FlexAttention: {problem}", stacklevel=2)
    return False


@torch.enable_grad()
def compare_flex(
    flex: Callable[..., Tensor],
    device: torch.device,
    dtype: torch.dtype,
    heads: int,
    key_value_heads: int,
    size: int,
) -> float:
    """How far the two ways are apart, in output and gradients, over two small trees: the largest
    norm of a difference over the norm of what attention by trees gives in float32."""
    generator = torch.Generator().manual_seed(0)
    row = pack([([0] * 100, [[0] * 90, [0], [0] * 31]), ([0] * 3, [[0] * 70])], device)
    inputs = [
        torch.randn(1, count, len(row.tree), size, generator=generator).to(device, dtype)
        for count in (heads, key_value_heads, key_value_heads, heads)
    ]

    def run(attend: Callable[..., Tensor], *inputs: Tensor) -> list[Tensor]:
        *leaves, gradient = (x.detach().requires_grad_() for x in inputs)
        output = attend(*leaves, size**-0.5)
        return [output.detach(), *torch.autograd.grad(output, leaves, gradient)]

    # Hooks of its own: this runs inside of a forward pass, whose checkpoints count what is saved.
    with torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x):
        by_trees = run(partial(attend_by_trees, row), *(x.float() for x in inputs))
        by_blocks = run(partial(attend_by_blocks, flex, tree_blocks(row)), *inputs)
    errors = [(b.float() - a).norm() / a.norm() for a, b in zip(by_trees, by_blocks, strict=True)]
    return float(torch.stack(errors).max())  # NaN, if one of them is: max() would lose it

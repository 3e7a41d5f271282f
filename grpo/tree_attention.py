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
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from grpo.packing import PackedRow, pack
from grpo.shared_prefix import Attend

BLOCK = 128  # tokens; rows are padded to multiples of it, so that fewer shapes are compiled
FLEX_TOLERANCE = 0.05  # between two ways to sum in bfloat16, for values of about 1


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


def tree_blocks(row: PackedRow, compiled: bool = True) -> BlockMask:
    """The blocks of `packing.tree_mask` that are not False throughout.

    The row is padded to whole blocks; a place of the padding sees itself alone.
    """
    padding = -len(row.tree) % BLOCK
    tree = F.pad(row.tree, (0, padding), value=-1)
    branch = torch.cat([row.branch, torch.arange(1, 1 + padding, device=row.branch.device)])

    def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        same_branch = (branch[query] == branch[key]) | (branch[key] == 0)
        return (query >= key) & (tree[query] == tree[key]) & same_branch

    length = len(tree)
    return create_block_mask(
        sees, None, None, length, length, device=tree.device, BLOCK_SIZE=BLOCK, _compile=compiled
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
    query, key, value = (F.pad(x, (0, 0, 0, -length % BLOCK)) for x in (query, key, value))
    output = flex(query, key, value, block_mask=blocks, scale=scaling, enable_gqa=True)
    return output[:, :, :length]


@cache
def compiled_flex() -> Callable[..., Tensor]:
    """FlexAttention, compiled when it is first called with a new kind of shape."""
    return cast(Callable[..., Tensor], torch.compile(flex_attention))


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
    """Largest difference between the two ways, in output and gradients, over two small trees."""
    generator = torch.Generator().manual_seed(0)
    row = pack([([0] * 100, [[0] * 90, [0], [0] * 31]), ([0] * 3, [[0] * 70])], device)
    query, key, value, gradient = (
        torch.randn(1, count, len(row.tree), size, generator=generator).to(device, dtype)
        for count in (heads, key_value_heads, key_value_heads, heads)
    )
    inputs = [x.requires_grad_() for x in (query, key, value)]
    blocks = tree_blocks(row, compiled=device.type == "cuda")
    # Hooks of its own: this runs inside of a forward pass, whose checkpoints count what is saved.
    with torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x):
        outputs = (
            attend_by_trees(row, query, key, value, size**-0.5),
            attend_by_blocks(flex, blocks, query, key, value, size**-0.5),
        )
        results = [(out, *torch.autograd.grad(out, inputs, gradient)) for out in outputs]
    return max(float((a - b).detach().abs().max()) for a, b in zip(*results, strict=True))

"""Attention over a packed row, by trees and by blocks, against softmax under the dense tree mask.

The compiled FlexAttention needs CUDA, and on a CPU it has no backward pass. What it is given here
(the mask in blocks, the padding) is the same; its place is taken by PyTorch's eager FlexAttention
and, where gradients are asked for, by softmax under the mask that the blocks were made from.
"""

import warnings
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_mask, flex_attention

from grpo import tree_attention
from grpo.packing import PackedRow, pack
from grpo.tree_attention import (
    BLOCK,
    attend_by_blocks,
    attend_by_trees,
    compare_flex,
    flex_works,
    tree_blocks,
)
from tests.tiny import fresh_seed

SCALING = 0.3


def by_trees(row: PackedRow, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return attend_by_trees(row, query, key, value, SCALING)


def by_blocks(row: PackedRow, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    blocks = tree_blocks(row)
    outputs = [
        attend_by_blocks(flex, blocks, query, key, value, SCALING)
        for flex in (dense_flex, torch.no_grad()(eager_flex))
    ]
    torch.testing.assert_close(*outputs, rtol=0, atol=1e-11)
    return outputs[0]


def eager_flex(*inputs: Tensor, **settings: object) -> Tensor:
    return flex_attention(*(x.detach() for x in inputs), **settings)


def dense_flex(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    block_mask: BlockMask,
    scale: float,
    enable_gqa: bool,
) -> Tensor:
    assert enable_gqa and block_mask.shape[-2:] == (query.shape[2], key.shape[2])
    mask = create_mask(block_mask.mask_mod, 1, 1, query.shape[2], key.shape[2], "cpu")
    return softmax_attention(mask, query, key, value, scale)


def dense(row: PackedRow, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return softmax_attention(row.mask, query, key, value, SCALING)


def softmax_attention(
    mask: Tensor, query: Tensor, key: Tensor, value: Tensor, scaling: float
) -> Tensor:
    repeat = query.shape[1] // key.shape[1]
    scores = query @ key.repeat_interleave(repeat, 1).transpose(-1, -2) * scaling
    weights = scores.masked_fill(~mask, float("-inf")).softmax(-1)
    return weights @ value.repeat_interleave(repeat, 1)


def rows(seed: int) -> Iterator[PackedRow]:
    """Two groups, one with a completion of a single token; one group; one longer than a block."""
    yield pack([([1, 2, 3], [[4, 5, 6], [7], [8, 9]]), ([1], [[2], [3]])], "cpu")
    yield pack([([1, 2], [[3, 4]])], "cpu")
    draw = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, BLOCK, (4,), generator=draw).tolist()
    yield pack([([1] * 40, [[2] * n for n in lengths]), ([3] * 150, [[4] * 9, [5] * 77])], "cpu")


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("way", [by_trees, by_blocks])
def test_output_and_gradients_equal_those_of_the_dense_mask(way: Callable[..., Tensor]) -> None:
    seed = fresh_seed()
    generator = torch.Generator().manual_seed(seed)
    for row in rows(seed):
        length = row.token_ids.shape[1]
        query, key, value, weight = (
            torch.randn(1, heads, length, 8, generator=generator, dtype=torch.float64)
            for heads in (4, 2, 2, 4)
        )
        inputs = [x.requires_grad_() for x in (query, key, value)]
        results = [
            (output, *torch.autograd.grad((output * weight).sum(), inputs))
            for output in (way(row, *inputs), dense(row, *inputs))
        ]
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-11)


def test_blocks_that_nobody_sees_are_skipped() -> None:
    """Exactly those blocks are kept in which the dense mask has a place that is True: of 9 × 9 the
    prompt's and each branch's own, and each branch's view of the prompt."""
    branches = [[2] * (BLOCK + 1)] * 8  # the last token of a completion is not in the row
    regular = pack([([1] * BLOCK, branches)], "cpu")
    assert tree_blocks(regular).to_dense().sum() == 1 + 8 + 8
    for row in (regular, *rows(fresh_seed())):
        padding = -row.mask.shape[-1] % BLOCK
        mask = F.pad(row.mask[0, 0], (0, padding, 0, padding))
        places = range(len(mask) - padding, len(mask))
        mask[places, places] = True  # a place of the padding sees itself
        count = len(mask) // BLOCK
        by_block = mask.view(count, BLOCK, count, BLOCK).any(3).any(1)
        assert torch.equal(tree_blocks(row).to_dense()[0, 0].bool(), by_block)


@pytest.fixture
def asked_anew() -> Iterator[None]:
    """Without what `flex_works` found out before."""
    flex_works.cache_clear()
    yield
    flex_works.cache_clear()


@pytest.mark.usefixtures("asked_anew")
def test_flex_is_tried_before_it_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that works is taken; one that fails, or gives something else, is not, and that is said
    once."""
    case = (torch.device("cpu"), torch.float32, 4, 2, 16)
    assert compare_flex(dense_flex, *case) < 1e-5
    monkeypatch.setattr(tree_attention, "compiled_flex", lambda: dense_flex)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert flex_works(*case)

    def fails(*arguments: object, **settings: object) -> Tensor:
        raise RuntimeError("no valid triton configs\nand more")

    def forgets_the_mask(query: Tensor, key: Tensor, value: Tensor, **settings: object) -> Tensor:
        return softmax_attention(torch.ones(1, 1, dtype=torch.bool), query, key, value, SCALING)

    class NoGradient(torch.autograd.Function):
        """The identity, with a gradient that is no number."""

        @staticmethod
        def forward(ctx: object, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: object, gradient: Tensor) -> Tensor:
            return gradient * torch.nan

    def has_no_gradient(query: Tensor, key: Tensor, value: Tensor, **settings: object) -> Tensor:
        return dense_flex(query, key, NoGradient.apply(value), **settings)

    for flex, problem in (
        (fails, "no valid triton configs$"),
        (forgets_the_mask, "differ by"),
        (has_no_gradient, "differ by nan"),
    ):
        flex_works.cache_clear()
        monkeypatch.setattr(tree_attention, "compiled_flex", lambda flex=flex: flex)
        with pytest.warns(UserWarning, match=f"without FlexAttention: .*{problem}") as seen:
            assert not flex_works(*case) and not flex_works(*case)
        assert len(seen) == 1

"""The shared prefix: the G completions of a group look back on one and the same prompt.

`transformers` lets a function be registered that computes attention for any of its models. Ours
serves the three ways in which this project calls a model:

- **A packed row**, for scoring and the update: see tree_attention.py. What a token may see
  travels as an argument of the call, so that recomputation in the backward pass sees the same.
- **Generation**: a prompt is run once, its keys and values kept for all of its completions. Then
  each new token attends to the shared prefix and to its own branch, under one softmax.
- **Anything else** (`model.generate`, a padded batch) is handed to PyTorch's own attention.

Models whose layers are not plain full attention are refused (`refuse_unsupported`): their
sliding windows, soft caps or sinks would be left out without a word.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

NAME = "shared_prefix"

# attend(layer, query [B, H, T, D], key and value [B, K, T, D], mask, scaling) → [B, H, T, D]
Attend = Callable[[int, Tensor, Tensor, Tensor, Any, float], Tensor]


class UnsupportedModel(ValueError):
    """The model's attention is not plain full attention."""


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    attend: Attend | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention function registered with `transformers`.

    query [B, H, T, D], key and value [B, K, T, D] with K key-value heads. Returns [B, T, H, D].
    `attend` comes with the model's call in generation; without it this is PyTorch's attention.
    """
    for feature in ("sliding_window", "softcap", "s_aux"):
        if kwargs.get(feature) is not None:
            raise UnsupportedModel(f"{type(module).__name__} uses {feature}")
    if attend is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, **kwargs
        )
    layer = cast(int, module.layer_idx)
    output = attend(layer, query, key, value, attention_mask, scaling)
    return output.transpose(1, 2), None


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, sdpa_mask)


def use_shared_prefix(model: PreTrainedModel) -> None:
    """Let `model` attend through this module from now on. Its other uses go on as before."""
    if model.config._attn_implementation != NAME:
        refuse_unsupported(model)
        model.set_attn_implementation(NAME)


def refuse_unsupported(model: PreTrainedModel) -> None:
    """Raise UnsupportedModel where the configuration names layers other than full attention."""
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    if kinds != {"full_attention"}:
        raise UnsupportedModel(f"layers of the kinds {', '.join(sorted(kinds))}")
    if not hasattr(model.get_decoder(), "layers"):
        raise UnsupportedModel("no list of decoder layers")
    if model.get_output_embeddings() is None or model.get_output_embeddings().bias is not None:
        raise UnsupportedModel("no language-model head, or one with a bias")


@dataclass
class Layout:
    """Which row decodes against which prompt, for R rows over S prompts (slots).

    To multiply all queries of a prompt with its keys at once, rows are gathered into W lanes per
    slot, where W is the largest number of rows that any prompt has; spare lanes repeat row 0 and
    are never read back. Where every slot has W rows, one after the other, rows are lanes already.

    slots, prefix_tokens, own_tokens: how many prompts, and how many places of each prompt and of
    each branch, are looked at; own_length: [R], tokens that a branch holds already, which is where
    its new one goes; row_of_lane: [S · W]; lane_of_row: [R], its place there, or None where rows
    are lanes.
    """

    slots: int
    prefix_tokens: int
    own_tokens: int
    own_length: Tensor
    row_of_lane: Tensor
    lane_of_row: Tensor | None

    def to_lanes(self, rows: Tensor) -> Tensor:
        """[R, K, Q, X] → [S, K, W · Q, X]: the queries of each prompt side by side."""
        lanes = rows if self.lane_of_row is None else rows.index_select(0, self.row_of_lane)
        by_slot = lanes.view(self.slots, -1, *rows.shape[1:]).transpose(1, 2)
        return by_slot.flatten(2, 3)

    def to_rows(self, lanes: Tensor, queries: int) -> Tensor:
        """[S, K, W · Q, X] → [R, K, Q, X]: back to the order of the rows."""
        rows = lanes.unflatten(2, (-1, queries)).transpose(1, 2).flatten(0, 1)
        return rows if self.lane_of_row is None else rows.index_select(0, self.lane_of_row)


class SharedPrefixCache:
    """Keys and values during generation: one prefix per slot, one branch per row, for each layer.

    Per layer: prefix keys and values [slots, K, prefix_tokens, D]; own keys and values
    [rows, K, own_tokens, D]. Places not yet written hold zeros, never garbage: they are masked,
    but zero weight times NaN would still be NaN. On a CPU they are at least float32: there, many
    small products take twice as long in bfloat16.
    """

    def __init__(self, slots: int, prefix_tokens: int, rows: int, own_tokens: int) -> None:
        self.prefix_shape = (slots, prefix_tokens)
        self.own_shape = (rows, own_tokens)
        self.prefix: list[tuple[Tensor, Tensor]] = []
        self.own: list[tuple[Tensor, Tensor]] = []

    def prefill(self, slot: int) -> Attend:
        """The attention for running a prompt [1, P] into `slot`."""
        return partial(self._attend_prompt, slot)

    def decode(self, layout: Layout) -> Attend:
        """The attention for one more token in each row."""
        rows, heads = len(layout.own_length), self.own[0][0].shape[1]
        branches = torch.arange(rows * heads, device=layout.own_length.device)
        places = branches * self.own_shape[1] + layout.own_length.repeat_interleave(heads)
        return partial(self._attend_branches, layout, places)

    def keep_rows(self, rows: Tensor) -> None:
        """Move the branches of the given rows [n] to the front, in that order."""
        for keys, values in self.own:
            keys[: len(rows)] = keys[rows]
            values[: len(rows)] = values[rows]

    def _attend_prompt(
        self,
        slot: int,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        scaling: float,
    ) -> Tensor:
        if layer == len(self.prefix):
            self._allocate(key)
        for kept, new in zip(self.prefix[layer], (key, value), strict=True):
            kept[slot, :, : new.shape[2]] = new[0]
            kept[slot, :, new.shape[2] :] = 0
        return F.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=scaling, enable_gqa=True
        )

    def _allocate(self, like: Tensor) -> None:
        """Room for one more layer, its heads and their size read off the first key seen."""
        _, heads, _, size = like.shape
        dtype = like.dtype if like.is_cuda else torch.promote_types(like.dtype, torch.float32)
        for store, (count, tokens) in (
            (self.prefix, self.prefix_shape),
            (self.own, self.own_shape),
        ):
            shape = (count, heads, tokens, size)
            store.append((like.new_zeros(shape, dtype=dtype), like.new_zeros(shape, dtype=dtype)))

    def _attend_branches(
        self,
        layout: Layout,
        places: Tensor,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor,
        scaling: float,
    ) -> Tensor:
        """softmax over [shared prefix | own branch], each multiplied where its keys lie.

        places: [R · K], where the new key of each row and head goes, among all places of all own
        keys; mask: additive [R, 1, 1, prefix + own]. Grouped-query heads need no copied keys: the
        H / K query heads of a key-value head are its Q queries.
        """
        rows, heads, _, size = query.shape
        for kept, new in zip(self.own[layer], (key, value), strict=True):
            kept.view(-1, size).index_copy_(0, places, new.reshape(-1, size).to(kept.dtype))
        prefix_keys, prefix_values = (
            kept[: layout.slots, :, : layout.prefix_tokens] for kept in self.prefix[layer]
        )
        own_keys, own_values = (kept[:rows, :, : layout.own_tokens] for kept in self.own[layer])

        query = query.reshape(rows, key.shape[1], -1, size).to(own_keys.dtype) * scaling
        queries = query.shape[2]
        prefix_scores = layout.to_rows(scores(layout.to_lanes(query), prefix_keys), queries)
        both = torch.cat([prefix_scores, scores(query, own_keys)], -1).add_(mask)
        weights = both.softmax(-1).to(own_values.dtype)
        over_prefix, over_own = weights.split([layout.prefix_tokens, layout.own_tokens], -1)
        output = layout.to_rows(layout.to_lanes(over_prefix) @ prefix_values, queries)
        return (output + over_own @ own_values).reshape(rows, heads, 1, size).to(value.dtype)


def scores(query: Tensor, keys: Tensor) -> Tensor:
    """[B, K, Q, D] · [B, K, P, D]ᵀ → [B, K, Q, P], in at least float32."""
    if query.dtype in (torch.float32, torch.float64):
        return query @ keys.transpose(-1, -2)
    products = torch.bmm(
        query.flatten(0, 1), keys.flatten(0, 1).transpose(1, 2), out_dtype=torch.float32
    )
    return products.unflatten(0, query.shape[:2])

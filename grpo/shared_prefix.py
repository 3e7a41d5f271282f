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
from typing import Any, NamedTuple, cast

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


def no_mask(device: torch.device) -> Tensor:
    """What to give a model for its mask where attention has its own: transformers passes a 4-D mask
    on as it is, and would build one [T, T] if it got none."""
    return torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device)


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

    own_length: [R], tokens that a branch holds already, which is where its new one goes;
    prefix_mask [S, 1, 1, P], own_mask [R, 1, 1, T]: 0 at places that may be seen (of the first P of
    a prompt and the first T of a branch), else -inf; row_of_lane: [S · W]; lane_of_row: [R], its
    place there, or None where rows are lanes.
    """

    own_length: Tensor
    prefix_mask: Tensor
    own_mask: Tensor
    row_of_lane: Tensor
    lane_of_row: Tensor | None

    def to_lanes(self, rows: Tensor) -> Tensor:
        """[R, K, Q, X] → [S, K, W · Q, X]: the queries of each prompt side by side."""
        lanes = rows if self.lane_of_row is None else rows.index_select(0, self.row_of_lane)
        by_slot = lanes.view(len(self.prefix_mask), -1, *rows.shape[1:]).transpose(1, 2)
        return by_slot.flatten(2, 3)

    def to_rows(self, lanes: Tensor, queries: int) -> Tensor:
        """[S, K, W · Q, X] → [R, K, Q, X]: back to the order of the rows."""
        rows = lanes.unflatten(2, (-1, queries)).transpose(1, 2).flatten(0, 1)
        return rows if self.lane_of_row is None else rows.index_select(0, self.lane_of_row)


class KeysAndValues(NamedTuple):
    """Keys and values [B, K, T, D] of one layer."""

    keys: Tensor
    values: Tensor


class SharedPrefixCache:
    """Keys and values during generation: one prefix per slot, one branch per row, for each layer.

    Per layer: prefix keys and values [slots, K, prefix_tokens, D]; own keys and values
    [rows, K, own_tokens, D]. Places not yet written hold zeros, or finite values of an earlier
    branch: they are masked, but zero weight times NaN would still be NaN.
    """

    def __init__(self, slots: int, prefix_tokens: int, rows: int, own_tokens: int) -> None:
        self.prefix_shape = (slots, prefix_tokens)
        self.own_shape = (rows, own_tokens)
        self.prefix: list[KeysAndValues] = []
        self.own: list[KeysAndValues] = []

    def prefill(self, slot: int) -> Attend:
        """The attention for running a prompt [1, P] into `slot`."""
        return partial(self._attend_prompt, slot)

    def decode(self, layout: Layout) -> Attend:
        """The attention for one more token in each row."""
        rows, heads = len(layout.own_length), self.own[0][0].shape[1]
        branches = torch.arange(rows * heads, device=layout.own_length.device)
        places = branches * self.own_shape[1] + layout.own_length.repeat_interleave(heads)
        return partial(self._attend_branches, layout, places)

    def clear(self) -> None:
        """Forget the branches, and with them what NaN there may be."""
        for keys, values in self.own:
            keys.zero_()
            values.zero_()

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
        for store, (count, tokens) in (
            (self.prefix, self.prefix_shape),
            (self.own, self.own_shape),
        ):
            shape = (count, heads, tokens, size)
            store.append(KeysAndValues(like.new_zeros(shape), like.new_zeros(shape)))

    def _attend_branches(
        self,
        layout: Layout,
        places: Tensor,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        scaling: float,
    ) -> Tensor:
        """Keep the new keys and values, and attend to [shared prefix | own branch].

        places: [R · K], where the new key of each row and head goes, among all places of all own
        keys; the mask is that of the layout.
        """
        rows, _, _, size = query.shape
        for kept, new in zip(self.own[layer], (key, value), strict=True):
            kept.view(-1, size).index_copy_(0, places, new.reshape(-1, size))
        slots, prefix_tokens = layout.prefix_mask.shape[0], layout.prefix_mask.shape[-1]
        prefix = KeysAndValues(*(x[:slots, :, :prefix_tokens] for x in self.prefix[layer]))
        own_tokens = layout.own_mask.shape[-1]
        own = KeysAndValues(*(x[:rows, :, :own_tokens] for x in self.own[layer]))
        # Grouped-query heads need no copied keys: the H / K query heads of a key-value head are
        # its Q queries.
        queries = query.reshape(rows, key.shape[1], -1, size)
        attend = attend_in_parts if query.device.type == "cpu" else attend_in_one
        return attend(layout, queries, prefix, own, scaling).reshape(query.shape)


def attend_in_one(
    layout: Layout,
    query: Tensor,
    prefix: KeysAndValues,
    own: KeysAndValues,
    scaling: float,
) -> Tensor:
    """One softmax over [shared prefix | own branch], each multiplied where its keys lie.

    query [R, K, Q, D]; keys and values of the prefixes [S, K, P, D], of the branches [R, K, T, D].
    Returns [R, K, Q, D].
    """
    query = query * scaling
    prefix_scores = scores(layout.to_lanes(query), prefix.keys).add_(layout.prefix_mask)
    own_scores = scores(query, own.keys).add_(layout.own_mask)
    sizes = [prefix_scores.shape[-1], own_scores.shape[-1]]
    both = torch.cat([layout.to_rows(prefix_scores, query.shape[2]), own_scores], -1)
    over_prefix, over_own = both.softmax(-1).to(query.dtype).split(sizes, -1)
    output = layout.to_lanes(over_prefix) @ prefix.values
    return layout.to_rows(output, query.shape[2]) + over_own @ own.values


def scores(query: Tensor, keys: Tensor) -> Tensor:
    """[B, K, Q, D] · [B, K, P, D]ᵀ → [B, K, Q, P], in at least float32."""
    if query.dtype in (torch.float32, torch.float64):
        return query @ keys.transpose(-1, -2)
    products = torch.bmm(
        query.flatten(0, 1), keys.flatten(0, 1).transpose(1, 2), out_dtype=torch.float32
    )
    return products.unflatten(0, query.shape[:2])


def attend_in_parts(
    layout: Layout,
    query: Tensor,
    prefix: KeysAndValues,
    own: KeysAndValues,
    scaling: float,
) -> Tensor:
    """`attend_in_one` on a CPU: PyTorch's fused attention over each part, then both joined.

    With z the logsumexp of a part's scores, the weight of a part in one softmax over both is
        weight of own = exp(own z) / (exp(prefix z) + exp(own z)) = sigmoid(own z − prefix z)
    """
    fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    by_lane = fused(layout.to_lanes(query), *prefix, attn_mask=layout.prefix_mask, scale=scaling)
    own_output, own_z = fused(query, *own, attn_mask=layout.own_mask, scale=scaling)
    prefix_output, prefix_z = (
        layout.to_rows(x, query.shape[2]) for x in (by_lane[0], by_lane[1][..., None])
    )
    own_weight = (own_z[..., None] - prefix_z).sigmoid()
    dtype = own_weight.dtype
    return prefix_output.to(dtype).lerp(own_output.to(dtype), own_weight).to(query.dtype)

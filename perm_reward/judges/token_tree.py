"""Many token sequences in one row of a model, what they have in common computed once.

Sequences that begin alike make a tree. Written depth first (a branch is finished before the next
begins) its tokens are one row, and the descendants of token j are the places from j up to where
its branch ends. So, for tokens i and j of the row:

    i sees j              ⇔   j <= i < end[j]
    the position of i     =   its depth in the tree

and every token sees what it would see in a row of its own: the same log-probs, up to rounding.

What many rows begin with need not be in them: its keys and values are computed once and kept. It
stands before the row, every token of the row sees all of it, and positions count from its end.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

Tokens = tuple[int, ...]

# A packed row in bfloat16 differs from plain ones by about a hundredth of what another text would
# change; a model that does not heed its mask or positions, by about as much as another text.
_LARGEST_DIFFERENCE = 0.1


class NotPackable(ValueError):
    """The model does not compute a tree of tokens as it computes each sequence by itself."""


@dataclass(frozen=True)
class TokenTree:
    """Sequences laid out as one row of L tokens.

    token_ids, positions, ends: L numbers each, see above; last: for each sequence, in the order in
    which they were given, the place of its last token.
    """

    token_ids: list[int]
    positions: list[int]
    ends: list[int]
    last: list[int]


def lay_out(sequences: Sequence[Tokens]) -> TokenTree:
    """One row of all sequences, none of them empty. Sorted they are in depth-first order."""
    tree = TokenTree([], [], [], [0] * len(sequences))
    branch: list[int] = []  # the places of the tokens of the sequence before
    before: Tokens = ()
    for which in sorted(range(len(sequences)), key=sequences.__getitem__):
        tokens = sequences[which]
        shared = common_length(before, tokens)
        for place in branch[shared:]:
            tree.ends[place] = len(tree.token_ids)
        new = range(len(tree.token_ids), len(tree.token_ids) + len(tokens) - shared)
        branch = [*branch[:shared], *new]
        tree.token_ids.extend(tokens[shared:])
        tree.positions.extend(range(shared, len(tokens)))
        tree.ends.extend(new)
        tree.last[which] = branch[-1]
        before = tokens
    for place in branch:
        tree.ends[place] = len(tree.token_ids)
    return tree


def common_length(one: Tokens, other: Tokens) -> int:
    """How many tokens two sequences have in common before they part."""
    for length, (token, other_token) in enumerate(zip(one, other, strict=False)):
        if token != other_token:
            return length
    return min(len(one), len(other))


def tree_mask(ends: Tensor, prefix_length: int, dtype: torch.dtype) -> Tensor:
    """ends [L] → [1, 1, L, P + L] (query, key): 0 where a token is seen, else -inf.

    prefix_length: P, the number of tokens before the row, which are seen by all.
    """
    place = torch.arange(len(ends), device=ends.device)
    is_seen = (place <= place[:, None]) & (place[:, None] < ends)
    mask = torch.zeros(len(ends), prefix_length + len(ends), dtype=dtype, device=ends.device)
    mask[:, prefix_length:].masked_fill_(~is_seen, float("-inf"))
    return mask[None, None]


@dataclass(frozen=True)
class Prefix:
    """What rows begin with, and what is kept of it: layer by layer keys, values [1, H, P, D]."""

    tokens: Tokens
    keys_and_values: list[tuple[Tensor, Tensor]]


NO_PREFIX = Prefix((), [])


@torch.inference_mode()
def read_prefix(model: PreTrainedModel, tokens: Tokens) -> Prefix:
    """Compute what is kept of a prefix."""
    if not tokens:
        return NO_PREFIX
    cache = DynamicCache()
    _last_logits(model, lay_out([tokens]), cache, prefix_length=0)
    return Prefix(tokens, [(keys, values) for keys, values, *_ in cache])


@torch.inference_mode()
def next_token_logits(
    model: PreTrainedModel, sequences: Sequence[Tokens], prefix: Prefix = NO_PREFIX
) -> Tensor:
    """The logits [N, V] of the token that follows each of N sequences, from one packed row.

    The row goes on from the prefix as far as all sequences begin with it, whatever that is.
    """
    # The last token of each is computed in any case: its logits are not kept.
    length = min(common_length(prefix.tokens, tokens[:-1]) for tokens in sequences)
    # A cache grows with what is computed, so each row gets its own.
    cache = DynamicCache(
        ddp_cache_data=[(k[:, :, :length], v[:, :, :length]) for k, v in prefix.keys_and_values]
    )
    rest = lay_out([tokens[length:] for tokens in sequences])
    return _last_logits(model, rest, cache, length)


def _last_logits(
    model: PreTrainedModel, tree: TokenTree, cache: DynamicCache, prefix_length: int
) -> Tensor:
    """The logits [N, V] behind each sequence of a tree, which stands behind what is cached."""
    token_ids, positions, ends, last = (
        torch.tensor(values, device=model.device)
        for values in (tree.token_ids, tree.positions, tree.ends, tree.last)
    )
    output = model(
        input_ids=token_ids[None],
        position_ids=prefix_length + positions[None],
        attention_mask=tree_mask(ends, prefix_length, model.dtype),
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=last,
    )
    return output.logits[0]


@torch.inference_mode()
def next_token_logprobs(
    model: PreTrainedModel,
    sequences: Sequence[Tokens],
    wanted: Sequence[Tokens],
    prefix: Prefix = NO_PREFIX,
) -> list[list[float]]:
    """For each sequence the log-probs of some tokens to follow it, in at least float32.

    logprob of token t = logit of t − log Σ_v exp(logit of v)
    """
    logits = next_token_logits(model, sequences, prefix)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    width = max(map(len, wanted))
    filled = [[*tokens, *[0] * (width - len(tokens))] for tokens in wanted]
    columns = torch.tensor(filled, device=logits.device)
    rows = (logits.gather(-1, columns) - logits.logsumexp(-1, keepdim=True)).tolist()
    return [row[: len(tokens)] for row, tokens in zip(rows, wanted, strict=True)]


@torch.inference_mode()
def refuse_unpackable(model: PreTrainedModel) -> None:
    """Compare a packed row behind a prefix with the model's plain way, on a few random sequences.

    Raises NotPackable where they differ by more than rounding, or the model cannot be called so.
    """
    kinds = set(getattr(model.config.get_text_config(), "layer_types", None) or [])
    if odd := kinds - {"full_attention", "sliding_attention"}:
        raise NotPackable(f"it has layers of the kind {', '.join(sorted(odd))}")
    generator = torch.Generator().manual_seed(0)
    vocabulary = model.config.get_text_config().vocab_size

    def some_tokens(count: int) -> Tokens:
        return tuple(torch.randint(vocabulary, (count,), generator=generator).tolist())

    trunk = some_tokens(12)
    limbs = [trunk + some_tokens(count) for count in (20, 9)]
    sequences = [trunk, *(limb + some_tokens(count) for limb in limbs for count in (1, 7, 15))]
    plain = torch.cat(
        [
            model(torch.tensor([tokens], device=model.device), use_cache=False).logits[:, -1]
            for tokens in sequences
        ]
    ).float()
    try:
        prefix = read_prefix(model, trunk[:7])
        packed = next_token_logits(model, sequences, prefix).float()
        error = (packed - plain).square().mean().sqrt()
    except (TypeError, ValueError, RuntimeError, IndexError, KeyError, AttributeError) as failure:
        cause = (str(failure).splitlines() or [""])[0]
        raise NotPackable(f"it takes no mask, positions or cache ({cause})") from failure
    by_text = (plain - plain.mean(0)).square().mean().sqrt()
    if not error <= _LARGEST_DIFFERENCE * by_text:
        raise NotPackable("it does not keep to the mask, positions and cache that it is given")

"""Two attention heads that copy, written into a new policy's weights instead of learned.

To answer in a seeker's own words a policy must copy from its prompt. Transformers learn that with a
pair of heads, known as an induction head (Olsson et al., 2022, arXiv 2209.11895):

    layer 0   every place looks at the place before it, and notes which token stood there
    layer 1   a place with token t looks for the place whose note says t, and predicts the token
              that stands there: what came after t last time is what comes next

From random weights the pair takes longer to emerge than the tiny policy's whole training, because
neither half is of use alone. Written down, it copies nine tokens of ten before the first update,
and training learns when to copy.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import Qwen2ForCausalLM

# Below this angle per token a rotary pair hardly turns over a prompt's few hundred tokens, so it
# can compare contents; above the other it tells one place from the next.
SLOW_ANGLE = 0.003
FAST_ANGLE = 0.05

SHARPNESS_OF_PLACE = 8.0
SHARPNESS_OF_MATCH = 8.0
SIZE_OF_NOTE = 2.0  # in standard deviations of an embedding
SIZE_OF_COPY = 8.0


@torch.no_grad()
def write_copying_heads(model: Qwen2ForCausalLM) -> None:
    """Overwrite the first head of layers 0 and 1; the directions they use are drawn at random.

    Needs a head of queries and keys with biases (Qwen2's), since looking one place back depends on
    nothing that a token could say, and embeddings that are large beside the other weights' output.
    """
    angles = model.model.rotary_emb.inv_freq  # [D / 2], radians per token of each rotary pair
    embedding_size = model.model.embed_tokens.weight.std()
    slow = (angles < SLOW_ANGLE).nonzero().flatten()
    slow = torch.cat([slow, slow + len(angles)])  # both halves of each pair
    content = _directions(len(slow), model.config.hidden_size)
    note = _directions(len(slow), model.config.hidden_size)
    copied = _directions(model.config.head_dim, model.config.hidden_size)

    before, match = (model.model.layers[i].self_attn for i in (0, 1))
    head = slice(0, model.config.head_dim)
    for attention in (before, match):
        for projection in (attention.q_proj, attention.k_proj, attention.v_proj):
            projection.weight[head] = 0
            projection.bias[head] = 0
        attention.o_proj.weight[:, head] = 0

    # Layer 0. A key turns with its place, a query is one turn behind: they agree one place back.
    fast = SHARPNESS_OF_PLACE * (angles > FAST_ANGLE)
    before.k_proj.bias[: len(angles)] = fast
    before.q_proj.bias[: len(angles)] = fast * angles.cos()
    before.q_proj.bias[len(angles) : 2 * len(angles)] = -fast * angles.sin()
    before.v_proj.weight[: len(slow)] = content
    before.o_proj.weight[:, : len(slow)] = SIZE_OF_NOTE * embedding_size * note.T

    # Layer 1. The query is the token itself, the key is the note.
    match.q_proj.weight[slow] = SHARPNESS_OF_MATCH**0.5 * content
    match.k_proj.weight[slow] = SHARPNESS_OF_MATCH**0.5 * note
    match.v_proj.weight[head] = copied
    match.o_proj.weight[:, head] = SIZE_OF_COPY * embedding_size * copied.T


def _directions(count: int, size: int) -> Tensor:
    """`count` orthogonal directions of length 1, as rows: [count, size]."""
    return torch.linalg.qr(torch.randn(size, count))[0].T

"""Log-probs of completions under a model, without ever holding the full logits.

The old, the reference and the new log-probs all come from `token_logprobs`: one function, one
temperature. The logits of a chunk of tokens are computed, used and dropped; the backward pass
computes them again. At no time do logits [tokens, vocabulary] exist for more than one chunk.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from grpo.packing import PackedRow, pack
from grpo.sampling import scale_logits
from grpo.shared_prefix import no_mask, use_shared_prefix
from grpo.tree_attention import attention_over

# Tokens whose logits exist at once. On a CPU few, so that their memory is used again and again.
CHUNK, CHUNK_ON_CPU = 512, 128


def completion_logprobs(
    model: PreTrainedModel,
    prompt: Sequence[int],
    completions: Sequence[Sequence[int]],
    *,
    temperature: float = 1.0,
) -> list[Tensor]:
    """log π(token | what stands before it) of each token of each completion of one prompt.

    prompt and completions are token ids; temperature as in sampling (0, greedy, counts as 1).
    Returns one tensor [T_i] per completion, in at least float32, differentiable where gradients
    are on. Source: the autoregressive factorisation, over a packed row (see shared_prefix.py).
    """
    row = pack([(prompt, completions)], model.device)
    logprobs, _ = score(model, row, temperature)
    return list(logprobs.split(row.lengths))


def score(model: PreTrainedModel, row: PackedRow, temperature: float) -> tuple[Tensor, Tensor]:
    """Log-probs and entropies of the N completion tokens of a packed row: [N], [N].

    A model sharded by FSDP2 carries this function as a method (parallel.shard sets it up), so
    that its root gathers its parameters first.
    """
    method = model.__dict__.get("score_row")
    return method(row, temperature) if method else score_row(model, row, temperature)


def score_row(model: PreTrainedModel, row: PackedRow, temperature: float) -> tuple[Tensor, Tensor]:
    """`score` for a model whose parameters are at hand."""
    use_shared_prefix(model)
    hidden = model.get_decoder()(
        input_ids=row.token_ids,
        position_ids=row.position_ids,
        attention_mask=no_mask(row.targets.device),
        use_cache=False,
        attend=attention_over(row),
    ).last_hidden_state[0]
    weight = model.get_output_embeddings().weight
    # Not hidden[predictors]: its backward adds up repeated places in whatever order threads come.
    predicting = F.embedding(row.predictors, hidden)
    return TokenLogprobs.apply(predicting, weight, row.targets, temperature)


def in_chunks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Tensors over the same N tokens, in step."""
    size = CHUNK_ON_CPU if tensors[0].is_cpu else CHUNK
    return zip(*(tensor.split(size) for tensor in tensors), strict=True)


def logits_of(hidden: Tensor, weight: Tensor) -> Tensor:
    """hidden [N, D] · weight [V, D]ᵀ → [N, V], in at least float32."""
    return (hidden @ weight.T).to(torch.promote_types(hidden.dtype, torch.float32))


class TokenLogprobs(torch.autograd.Function):
    """Log-prob of each target and entropy of each distribution, chunk by chunk of tokens.

    With z = logits / temperature and p = softmax(z):
        log-prob = z[target] − logsumexp(z)
        entropy  = logsumexp(z) − Σ p·z                (no gradient: it is a metric)
        ∂ log-prob / ∂ logits = (onehot(target) − p) / temperature

    hidden [N, D], weight [V, D], targets [N] → log-probs [N], entropies [N], in at least float32.
    The weight's gradient is summed over chunks in at least float32 and rounded once at the end; a
    frozen weight gets none, and no memory for one.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        temperature: float,
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(hidden, weight, targets)
        ctx.temperature = temperature
        chunks = []
        for h, target in in_chunks(hidden, targets):
            z = scale_logits(logits_of(h, weight), temperature)
            log_total = z.logsumexp(-1)
            logprob = z.gather(-1, target[:, None])[:, 0] - log_total
            p = (z - log_total[:, None]).exp_()
            chunks.append((logprob, log_total - (p * z).sum(-1)))
        logprobs, entropies = map(torch.cat, zip(*chunks, strict=True))
        ctx.mark_non_differentiable(entropies)
        return logprobs, entropies

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, targets = ctx.saved_tensors
        divisor = ctx.temperature or 1.0
        is_trained = ctx.needs_input_grad[1]
        grad_weight = torch.zeros_like(weight, dtype=grad.dtype) if is_trained else None
        grad_hidden = []
        for h, target, g in in_chunks(hidden, targets, grad):
            p = scale_logits(logits_of(h, weight), ctx.temperature).softmax(-1)
            grad_logits = p.mul_(-g[:, None] / divisor)  # −g·p, then +g at the targets
            grad_logits.scatter_add_(-1, target[:, None], g[:, None] / divisor)
            grad_logits = grad_logits.to(h.dtype)
            grad_hidden.append(grad_logits @ weight)
            if grad_weight is not None:
                add_matmul_(grad_weight, grad_logits.T, h)
        if grad_weight is not None:
            grad_weight = grad_weight.to(weight.dtype)
        return torch.cat(grad_hidden), grad_weight, None, None


def add_matmul_(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b with the products summed in total's type (float32 for bfloat16 a and b)."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    elif total.is_cpu:
        with exact_bfloat16_products():
            total.addmm_(a.to(total.dtype), b.to(total.dtype))
    else:
        total += torch.mm(a, b, out_dtype=total.dtype)


@contextmanager
def exact_bfloat16_products() -> Iterator[None]:
    """Let float32 products of values that fit bfloat16 run on the processor's bfloat16 units.

    Nothing is lost by it: the inputs are exact, and the sums are in float32.
    """
    setting = cast(Any, torch.backends.mkldnn).matmul
    before = setting.fp32_precision
    setting.fp32_precision = "bf16"
    try:
        yield
    finally:
        setting.fp32_precision = before

"""Our generation against `model.generate`: time, tokens per second, peak memory.

    python -m benchmarks.generation                 equal lengths, and ragged ones
    python -m benchmarks.generation --growth        also with the group and with the prompt

Both sample at temperature 1 from the same bfloat16 model and prompts, to the same lengths.
"""

from collections.abc import Iterator

import torch
from transformers import LogitsProcessor, LogitsProcessorList

from benchmarks.common import END, Case, make_model, run
from grpo.generation import generate_groups
from grpo.sampling import Sampling


def ours(case: Case) -> Iterator[None]:
    """A turn is one call of `generate_groups`."""
    model = make_model(case.model, torch.bfloat16)
    turn = 0
    while True:
        yield
        generate_groups(
            model,
            case.prompt_ids(turn),
            group_size=case.group_size,
            max_new_tokens=case.lengths(),
            sampling=Sampling(),
            stop_ids=[],
            step=turn,
        )
        turn += 1


class EndAt(LogitsProcessor):
    """Let row i end with its length-th token, and not before."""

    def __init__(self, prompt_tokens: int, lengths: list[int]) -> None:
        self.prompt_tokens, self.lengths = prompt_tokens, torch.tensor(lengths)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """scores [rows, vocabulary]: only the stop token is left where a row is to end."""
        last = self.lengths.to(scores.device) <= input_ids.shape[1] - self.prompt_tokens + 1
        scores[:, END] = float("-inf")
        scores[last] = float("-inf")
        scores[last, END] = 0.0
        return scores


def generate(case: Case) -> Iterator[None]:
    """A turn is one call of `model.generate` with all completions as rows."""
    model = make_model(case.model, torch.bfloat16).eval()
    lengths = sum(case.lengths(), [])
    turn = 0
    while True:
        yield
        prompts = torch.tensor(case.prompt_ids(turn), device=model.device)
        rows = prompts.repeat_interleave(case.group_size, dim=0)
        output = model.generate(
            rows,
            attention_mask=torch.ones_like(rows),
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            max_new_tokens=case.new_tokens,
            logits_processor=LogitsProcessorList([EndAt(case.prompt_tokens, lengths)]),
        )
        assert output.shape[1] == case.prompt_tokens + max(lengths)
        turn += 1


if __name__ == "__main__":
    run(__doc__, {"ours": ours, "model.generate": generate})

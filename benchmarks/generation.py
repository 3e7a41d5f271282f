"""Our generation against `model.generate`: time, tokens per second, peak memory.

    python -m benchmarks.generation                 equal lengths, and ragged ones
    python -m benchmarks.generation --growth        also with the group and with the prompt

Both sample at temperature 1 from the same bfloat16 model and prompts, to the same lengths.
"""

import argparse
from collections.abc import Iterator
from dataclasses import replace

import torch
from transformers import LogitsProcessor, LogitsProcessorList

from benchmarks.common import END, Case, as_json, compare, make_model, table
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
    lengths = [length for group in case.lengths() for length in group]
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


def cases(first: Case, growth: bool) -> list[Case]:
    """Equal and ragged lengths; growth with G and with the prompt."""
    chosen = [first, replace(first, ragged=True)]
    if growth:
        chosen += [replace(first, group_size=size) for size in (4, 8, 16, 32)]
        chosen += [replace(first, prompt_tokens=tokens) for tokens in (128, 512, 2048)]
    return chosen


def case_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of a case, and of how it is measured."""
    default = Case()
    parser.add_argument("--model", default=default.model, help="a shape, a folder or a hub name")
    for name in ("prompts", "group_size", "prompt_tokens", "new_tokens"):
        flag = "--" + name.replace("_", "-")
        parser.add_argument(flag, type=int, default=getattr(default, name))
    parser.add_argument("--rounds", type=int, default=3, help="turns of each, after a warm-up")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--growth", action="store_true", help="more groups and prompts")


def case_of(settings: argparse.Namespace) -> Case:
    """The case that the flags describe."""
    return Case(
        settings.model,
        settings.prompts,
        settings.group_size,
        settings.prompt_tokens,
        settings.new_tokens,
    )


def main() -> None:
    """Measure, and print the tables and, last, one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    case_arguments(parser)
    settings = parser.parse_args()
    measured = []
    for case in cases(case_of(settings), settings.growth):
        peers = {"ours": ours, "model.generate": generate}
        measured.append((case, compare(peers, case, settings.rounds, settings.threads)))
        print(table(*measured[-1]), flush=True)
    print(as_json(measured))


if __name__ == "__main__":
    main()

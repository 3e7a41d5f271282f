"""What the benchmarks share: the case, the model, and peers that take turns.

Each peer runs in a process of its own, so that its peak memory is its own, and waits while another
has its turn. Rounds alternate between the peers, and medians are compared: what disturbs the
machine disturbs all of them.
"""

import argparse
import json
import multiprocessing
import os
import platform
import random
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from multiprocessing.connection import Connection

import torch
import transformers
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

# The shapes of known models; random weights take as long as trained ones.
SHAPES = {
    "smollm2-135m": LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=8192,
        rope_theta=100000.0,
        tie_word_embeddings=True,
    ),
    "qwen2.5-7b": Qwen2Config(
        vocab_size=152064,
        hidden_size=3584,
        intermediate_size=18944,
        num_hidden_layers=28,
        num_attention_heads=28,
        num_key_value_heads=4,
        max_position_embeddings=32768,
        rope_theta=1000000.0,
        tie_word_embeddings=False,
    ),
    "tiny": LlamaConfig(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
    ),
}
END = 0  # the stop token of the random models


@dataclass(frozen=True)
class Case:
    """What is generated, or trained on, in one turn: the same for every peer.

    ragged: completion lengths are drawn between 16 and `new_tokens` instead of all being equal.
    """

    model: str = "smollm2-135m"
    prompts: int = 2
    group_size: int = 8
    prompt_tokens: int = 391
    new_tokens: int = 128
    ragged: bool = False

    @property
    def rows(self) -> int:
        """Completions in all."""
        return self.prompts * self.group_size

    @property
    def completion_tokens(self) -> int:
        """Tokens that one turn generates."""
        return sum(map(sum, self.lengths()))

    def lengths(self) -> list[list[int]]:
        """How long each completion becomes, [prompts][group_size]."""
        draw = random.Random(0)
        least = min(16, self.new_tokens) if self.ragged else self.new_tokens
        return [
            [draw.randint(least, self.new_tokens) for _ in range(self.group_size)]
            for _ in range(self.prompts)
        ]

    def prompt_ids(self, turn: int) -> list[list[int]]:
        """Token ids of the prompts, [prompts][prompt_tokens], others in each turn."""
        draw = random.Random(turn)
        vocabulary = make_config(self.model).vocab_size
        return [
            [draw.randrange(END + 1, vocabulary) for _ in range(self.prompt_tokens)]
            for _ in range(self.prompts)
        ]


def make_config(name: str) -> transformers.PreTrainedConfig:
    """The configuration of a shape, or that of a folder or hub name."""
    return SHAPES[name] if name in SHAPES else transformers.AutoConfig.from_pretrained(name)


def make_model(name: str, dtype: torch.dtype) -> PreTrainedModel:
    """A model of a known shape with random weights (the same each time), or that of a folder."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if name not in SHAPES:
        return AutoModelForCausalLM.from_pretrained(name, dtype=dtype).to(device)
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(SHAPES[name], dtype=dtype)
    model.generation_config.eos_token_id = model.generation_config.pad_token_id = END
    return model


def make_tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    """Words t0, t1, … with spaces between: a prompt has as many tokens as it is made of."""
    words = {f"t{i}": i for i in range(vocabulary)}
    tokenizer = Tokenizer(WordLevel(words, unk_token="t1"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    end = f"t{END}"
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=end, pad_token=end)


# --- turns ---------------------------------------------------------------------------------------

Peer = Callable[[Case], Iterator[None]]  # a generator: what it does between two yields is a turn


@dataclass(frozen=True)
class Result:
    """Medians of one peer: seconds per turn, tokens per second, and peak memory in GB."""

    seconds: float
    tokens_per_second: float
    peak_gigabytes: float


def compare(peers: dict[str, Peer], case: Case, rounds: int, threads: int) -> dict[str, Result]:
    """Let each peer take `rounds` turns after one to warm up, in alternation."""
    context = multiprocessing.get_context("spawn")
    channels: dict[str, Connection] = {}
    seconds: dict[str, list[float]] = {name: [] for name in peers}
    memory: dict[str, float] = {}
    for name, peer in peers.items():
        channels[name], theirs = context.Pipe()
        context.Process(target=serve, args=(peer, case, threads, theirs), daemon=True).start()
        theirs.close()  # so that the end of the peer is the end of the channel
    for turn in range(rounds + 1):
        for name, channel in channels.items():
            channel.send(turn)
            try:
                elapsed, memory[name] = channel.recv()
            except EOFError:
                sys.exit(f"error: {name} ended before its turn was over; see above why")
            kind = "warm-up" if turn == 0 else f"round {turn}"
            print(f"  {kind:8} {name:18} {elapsed:8.2f} s", file=sys.stderr, flush=True)
            if turn > 0:
                seconds[name].append(elapsed)
    for channel in channels.values():
        channel.send(None)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    return {
        name: Result(medians[name], case.completion_tokens / medians[name], memory[name])
        for name in peers
    }


def serve(peer: Peer, case: Case, threads: int, channel: Connection) -> None:
    """The process of one peer: takes a turn when told to, and says how long it took."""
    torch.set_num_threads(threads)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    turns = peer(case)
    next(turns)  # the setting up
    while channel.recv() is not None:
        start = time.perf_counter()
        next(turns)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        channel.send((time.perf_counter() - start, peak_gigabytes()))


def peak_gigabytes() -> float:
    """Peak memory of this process: the accelerator's where there is one, else resident memory."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    unit = 1 if sys.platform == "darwin" else 1024  # bytes on macOS, kilobytes on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


# --- results -------------------------------------------------------------------------------------


def table(case: Case, results: dict[str, Result]) -> str:
    """The results as lines; the first peer is ours, to which the others are compared."""
    ours = next(iter(results.values()))
    kind = "ragged" if case.ragged else "equal"
    lines = [
        f"{case.model}, {case.prompts} × {case.group_size}, "
        f"{case.prompt_tokens} + {case.new_tokens} tokens, {kind} lengths",
        f"  {'':18} {'seconds':>9} {'tokens/s':>9} {'peak GB':>8} {'ours is':>8} {'memory':>7}",
    ]
    for name, result in results.items():
        lines.append(
            f"  {name:18} {result.seconds:9.2f} {result.tokens_per_second:9.1f} "
            f"{result.peak_gigabytes:8.2f} {result.seconds / ours.seconds:7.2f}× "
            f"{ours.peak_gigabytes / result.peak_gigabytes:6.0%}"
        )
    return "\n".join(lines)


def machine() -> dict[str, str | int | None]:
    """What the results depend on."""
    cuda = torch.cuda.is_available()
    return {
        "machine": torch.cuda.get_device_name() if cuda else platform.processor() or "CPU",
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def as_json(measured: Sequence[tuple[Case, dict[str, Result]]]) -> str:
    """Everything measured, with machine and versions, as one line."""
    results = [
        asdict(case) | {name: asdict(result) for name, result in results.items()}
        for case, results in measured
    ]
    return json.dumps(machine() | {"results": results})


# --- the command line ----------------------------------------------------------------------------


def cases(first: Case, growth: bool) -> list[Case]:
    """Equal and ragged lengths; growth with G and with the prompt."""
    chosen = [first, replace(first, ragged=True)]
    if growth:
        chosen += [replace(first, group_size=size) for size in (4, 8, 16, 32)]
        chosen += [replace(first, prompt_tokens=tokens) for tokens in (128, 512, 2048)]
    return chosen


def case_arguments(parser: argparse.ArgumentParser, default: Case) -> None:
    """The flags of a case."""
    parser.add_argument("--model", default=default.model, help="a shape, a folder or a hub name")
    for name in ("prompts", "group_size", "prompt_tokens", "new_tokens"):
        flag = "--" + name.replace("_", "-")
        parser.add_argument(flag, type=int, default=getattr(default, name))


def case_of(settings: argparse.Namespace) -> Case:
    """The case that the flags describe."""
    return Case(
        settings.model,
        settings.prompts,
        settings.group_size,
        settings.prompt_tokens,
        settings.new_tokens,
    )


def run(description: str, peers: dict[str, Peer]) -> None:
    """Measure the cases that the command line asks for; print tables and, last, one JSON line."""
    parser = argparse.ArgumentParser(description=description.split("\n")[0])
    case_arguments(parser, Case())
    parser.add_argument("--rounds", type=int, default=3, help="turns of each, after a warm-up")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--growth", action="store_true", help="more groups and prompts")
    settings = parser.parse_args()
    measured = []
    for case in cases(case_of(settings), settings.growth):
        measured.append((case, compare(peers, case, settings.rounds, settings.threads)))
        print(table(*measured[-1]), flush=True)
    print(as_json(measured))

"""Runs of train.py that are stopped at a chosen moment, and resumed, in forks of one warm process.

    python tests/killing.py FOLDER SEED TRIALS

A moment is a function and the number of its calls: right before that call the process gets a
signal, SIGKILL or SIGTERM. Trials have one or two ranks, of which one gets it, and generate a step
ahead, or make two updates on each rollout, or neither. Each is stopped up to twice, resumed, and
compared, byte for byte, with the run that nobody stopped. Prints a line per trial; exits with 1 if
one differs or hangs.
"""

import importlib
import itertools
import json
import os
import random
import signal
import socket
import sys
import time
import traceback
from pathlib import Path
from typing import Any, NamedTuple

SETTINGS = {
    "train.steps": 4,
    "grpo.prompts_per_step": 2,
    "grpo.group_size": 4,
    "rollout.max_completion_tokens": 40,
    "rollout.temperature": 2.0,
    "data.heldout_records": 2,
    "evaluation.every": 2,
    "checkpoint.every": 1,
    "checkpoint.keep": 1,
    # A reward that differs from text to text, so that every step moves the weights.
    "perm.format_failure": "judge",
    "perm.length_limit": 12,
    "perm.bystander_target": 60,
}
# Function → how often each rank of a whole run calls it at least.
MOMENTS = {
    "grpo.generation:Batch.step": 60,
    "perm_reward.panel:Panel.judge": 40,
    "grpo.trainer:Trainer.backward": 4,
    "torch.optim:AdamW.step": 4,
    "grpo.checkpoint:tensors_of": 4,
}
# The same, of rank 0.
MOMENTS_OF_MAIN = {
    "perm_reward.verdict_store:VerdictStore.put": 40,
    "grpo.run:append_line": 6,
    "grpo.run:write_groups": 6,
    "grpo.checkpoint:checksum": 8,
    "grpo.checkpoint:write_synced": 4,
    "grpo.checkpoint:replace_folder": 5,
    "grpo.run:remove_old": 4,
    "transformers:PreTrainedModel.save_pretrained": 1,
}
FILES = ("rollouts.jsonl", "heldout.jsonl", "policy/model.safetensors")
NUMBERS = ("metrics.jsonl", "evaluations.jsonl")
LATE = {
    (signal.SIGTERM, "transformers:PreTrainedModel.save_pretrained"),
    (signal.SIGTERM, "grpo.checkpoint:replace_folder"),
}
# What the other ranks may take to find out that one of them is gone.
LONGEST_GRIEF = 60.0


class Stop(NamedTuple):
    """Who gets which signal, right before which call of what."""

    moment: str
    call: int
    rank: int
    signal: signal.Signals

    def __str__(self) -> str:
        return f"{self.signal.name} to rank {self.rank} before {self.moment} {self.call}"


def main(folder: Path, seed: int, trials: int) -> int:
    """All trials. Returns the exit code."""
    import train  # noqa: F401 - before the forks, so that each of them is quick

    print(f"seed {seed}")
    generator = random.Random(seed)
    failed = killed = 0
    # Each moment in turn, so that none is left out; the rest is drawn.
    moments = itertools.cycle([*MOMENTS, *MOMENTS_OF_MAIN])
    for trial in range(trials):
        ranks, (ahead, updates) = 1 + trial % 2, ((0, 1), (1, 1), (0, 2))[trial // 2 % 3]
        arguments = [f"--{name}={value}" for name, value in {**SETTINGS, "seed": seed}.items()]
        arguments += [f"--rollout.ahead={ahead}", f"--grpo.updates_per_rollout={updates}"]
        whole, stopped = folder / f"whole-{ranks}-{ahead}-{updates}", folder / f"trial-{trial}"
        if not whole.exists():
            assert run([*arguments, f"--output={whole}"], ranks) == [0] * ranks
            moved = [of_step["gradient_norm"] for of_step in numbers(whole / "metrics.jsonl", ())]
            assert sum(norm > 0 for norm in moved) > 1, f"steps that move nothing: {moved}"
        kind = signal.SIGTERM if trial % 10 == 4 else signal.SIGKILL
        stops = [draw(next(moments), ranks, kind, generator) for _ in range(1 + trial % 3 // 2)]
        problems = []
        for stop in stops:
            resumes = stopped.exists()
            asked = [f"--resume={stopped}"] if resumes else [*arguments, f"--output={stopped}"]
            codes = run(asked, ranks, stop)
            code = codes[stop.rank]
            killed += code == -signal.SIGKILL
            # Asked to end when all is done but the export, it is done; and the second time a run is
            # stopped, less is left of it: the moment may not come.
            may_end = resumes or (stop.signal, stop.moment) in LATE
            if code not in (-stop.signal, 128 + stop.signal) and not (may_end and code == 0):
                problems.append(f"the stopped rank ended with {codes}")
            if None in codes:
                problems.append(f"a rank hung: {codes}")
        if any(codes := run([f"--resume={stopped}"], ranks)):
            problems.append(f"resumed, it ended with {codes}")
        else:
            problems += differences(whole, stopped, ahead)
        failed += bool(problems)
        told = ", then ".join(map(str, stops))
        how = f"{ranks} ranks, ahead {ahead}, {updates} updates"
        print(f"{how}, {told}: {problems or 'the same'}", flush=True)
    print(f"killed {killed} times")
    return 1 if failed else 0


def draw(moment: str, ranks: int, kind: signal.Signals, generator: random.Random) -> Stop:
    """A stop at some call of a function."""
    calls = MOMENTS.get(moment, 0) // ranks or MOMENTS_OF_MAIN.get(moment, 0) or 1
    rank = generator.randrange(ranks) if moment in MOMENTS else 0
    return Stop(moment, generator.randint(1, calls), rank, kind)


def differences(whole: Path, stopped: Path, ahead: int) -> list[str]:
    """The files in which two runs differ, times aside.

    So are, a step ahead, the counts of judges' calls so far: they too tell of a moment.
    """
    aside = ("seconds_", "judge.") if ahead else ("seconds_",)
    found = [n for n in FILES if (whole / n).read_bytes() != (stopped / n).read_bytes()]
    return found + [n for n in NUMBERS if numbers(whole / n, aside) != numbers(stopped / n, aside)]


def numbers(path: Path, aside: tuple[str, ...]) -> list[dict[str, Any]]:
    """The numbers of each line, but those whose names begin so."""
    lines = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    return [{k: v for k, v in line.items() if not k.startswith(aside)} for line in lines]


def run(arguments: list[str], ranks: int, stop: Stop | None = None) -> list[int | None]:
    """train.py in forks, one per rank. Their exit codes, or minus the signal that ended them; None
    for one that hung after another was gone."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = [fork(arguments, rank, ranks, port, stop) for rank in range(ranks)]
    codes: dict[int, int | None] = {}
    ends = float("inf")
    while len(codes) < ranks:
        for rank, child in enumerate(children):
            if rank not in codes and (ended := os.waitpid(child, os.WNOHANG))[0]:
                codes[rank] = os.waitstatus_to_exitcode(ended[1])
                ends = min(ends, time.monotonic() + LONGEST_GRIEF)
            elif rank not in codes and time.monotonic() > ends:
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
                codes[rank] = None
        time.sleep(0.02)
    return [codes[rank] for rank in range(ranks)]


def fork(arguments: list[str], rank: int, ranks: int, port: int, stop: Stop | None) -> int:
    """Start one rank; returns its process id."""
    child = os.fork()
    if child == 0:
        code = 70
        try:
            silence()
            if ranks > 1:
                os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "GROUP_RANK": "0"}
                os.environ |= {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
                os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            if stop is not None and stop.rank == rank:
                signal_before(stop)
            code = train_once(arguments)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    return child


def train_once(arguments: list[str]) -> int:
    """Returns the exit code."""
    import train

    sys.argv = ["train.py", *arguments]
    try:
        train.main()
    except SystemExit as ended:
        return int(ended.code or 0)
    return 0


def signal_before(stop: Stop) -> None:
    """Have this process get its signal before that call of the function, counted from now on."""
    module_name, _, path = stop.moment.partition(":")
    *owners, name = path.split(".")
    owner: Any = importlib.import_module(module_name)
    for part in owners:
        owner = getattr(owner, part)
    original, calls = getattr(owner, name), itertools.count(1)

    def stopped(*arguments: Any, **options: Any) -> Any:
        if next(calls) == stop.call:
            os.kill(os.getpid(), stop.signal)
        return original(*arguments, **options)

    setattr(owner, name, stopped)


def silence() -> None:
    """Of what a run says only what went wrong is of interest."""
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), sys.stdout.fileno())


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent.parent))
    sys.exit(main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])))

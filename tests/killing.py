"""Runs of train.py that are killed at a chosen moment, and resumed, in forks of one warm process.

    python tests/killing.py FOLDER SEED TRIALS

A moment is a function and the number of its calls: the process kills itself with SIGKILL right
before that call. Each trial is killed up to twice, resumed, and compared, byte for byte, with the
run that nobody killed. Prints a line per trial; exits with 1 if one differs.
"""

import importlib
import json
import os
import random
import signal
import sys
from pathlib import Path
from typing import Any

SETTINGS = {
    "train.steps": 4,
    "grpo.prompts_per_step": 2,
    "grpo.group_size": 4,
    "rollout.max_completion_tokens": 16,
    "data.heldout_records": 2,
    "evaluation.every": 2,
    "checkpoint.every": 1,
    "checkpoint.keep": 1,
    # A reward that differs from text to text, so that every step moves the weights.
    "perm.format_failure": "judge",
    "perm.length_limit": 12,
    "perm.bystander_target": 60,
}
# Function → how often a whole run calls it at least.
MOMENTS = {
    "grpo.generation:Batch.step": 60,
    "perm_reward.panel:Panel.judge": 80,
    "perm_reward.verdict_store:VerdictStore.put": 40,
    "grpo.trainer:Trainer.backward": 4,
    "torch.optim:AdamW.step": 4,
    "grpo.run:append_line": 6,
    "grpo.run:write_groups": 6,
    "grpo.checkpoint:checksum": 8,
    "grpo.checkpoint:write_synced": 4,
    "grpo.checkpoint:replace_folder": 5,
    "grpo.run:remove_old": 4,
    "transformers:PreTrainedModel.save_pretrained": 1,
}
LOGS = ("rollouts.jsonl", "heldout.jsonl", "evaluations.jsonl", "policy/model.safetensors")


def main(folder: Path, seed: int, trials: int) -> int:
    """All trials. Returns the exit code."""
    import train  # noqa: F401 - before the forks, so that each of them is quick

    print(f"seed {seed}")
    generator = random.Random(seed)
    arguments = [f"--{name}={value}" for name, value in {**SETTINGS, "seed": seed}.items()]
    whole = folder / "whole"
    assert run([*arguments, f"--output={whole}"]) == 0
    different = 0
    moments = list(MOMENTS)
    for trial in range(trials):
        killed = folder / f"trial-{trial}"
        # Each moment in turn, so that none is left out; which of its calls is drawn.
        first = moments[trial % len(moments)]
        second = generator.choice(moments)
        told = []
        outcome = run(
            [*arguments, f"--output={killed}"], first, n := generator.randint(1, MOMENTS[first])
        )
        told.append(f"{first} {n}")
        assert outcome == -signal.SIGKILL, (told, outcome)
        if trial % 2:
            run([f"--resume={killed}"], second, n := generator.randint(1, MOMENTS[second]))
            told.append(f"{second} {n}")
        assert run([f"--resume={killed}"]) == 0, told
        problems = differences(whole, killed)
        different += bool(problems)
        print(f"trial {trial}: killed before {', then '.join(told)}: {problems or 'the same'}")
    return 1 if different else 0


def differences(whole: Path, killed: Path) -> list[str]:
    """The files in which two runs differ, times aside."""
    found = [name for name in LOGS if (whole / name).read_bytes() != (killed / name).read_bytes()]
    if metrics(whole) != metrics(killed):
        found.append("metrics.jsonl")
    return found


def metrics(run_folder: Path) -> list[dict[str, Any]]:
    """The metrics of each step, without times."""
    steps = map(json.loads, (run_folder / "metrics.jsonl").read_text().splitlines())
    return [{k: v for k, v in m.items() if not k.startswith("seconds_")} for m in steps]


def run(arguments: list[str], moment: str = "", call: int = 0) -> int:
    """train.py in a fork; returns its exit code, or minus the signal that ended it."""
    child = os.fork()
    if child == 0:
        code = 70
        try:
            silence()
            if moment:
                die_before(moment, call)
            code = train_once(arguments)
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status)


def train_once(arguments: list[str]) -> int:
    """Returns the exit code."""
    import train

    sys.argv = ["train.py", *arguments]
    try:
        train.main()
    except SystemExit as ended:
        return int(ended.code or 0)
    return 0


def die_before(moment: str, call: int) -> None:
    """Have this process killed before the call-th call of a function from now on."""
    module_name, _, path = moment.partition(":")
    *owners, name = path.split(".")
    owner: Any = importlib.import_module(module_name)
    for part in owners:
        owner = getattr(owner, part)
    original, calls = getattr(owner, name), [0]

    def dying(*arguments: Any, **options: Any) -> Any:
        calls[0] += 1
        if calls[0] == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*arguments, **options)

    setattr(owner, name, dying)


def silence() -> None:
    """Of what a run says only what went wrong is of interest."""
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), sys.stdout.fileno())


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent.parent))
    sys.exit(main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])))

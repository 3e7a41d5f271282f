"""A step with judges as slow as the rest of it: waited for, or with the next rollout meanwhile.

    python -m benchmarks.ahead                the quickstart's policy; other settings may follow

The first run has a reward that takes no time, and tells what generation, reference and update take
together. Each completion's verdict takes as long from then on, as many completions as there may be
at once. Runs with rollout.ahead 0 and 1 alternate; medians of their steps.

    waited for     generation + update + judge
    a step ahead   max(generation + update, judge)
"""

import json
import os
import subprocess
import sys
import threading
from concurrent.futures import Future
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

STEPS, ROUNDS = 6, 3
LATENCY = "BENCHMARK_LATENCY"


class SlowReward:
    """A number for each completion, after the time that the environment says."""

    def __call__(self, **columns: Any) -> list[float]:
        raise NotImplementedError("completions are submitted as they end")

    def submit(self, prompt: str, completion: str, completion_ids: list[int], **_: Any) -> Future:
        """The reward, later."""
        future: Future[float] = Future()
        reward = sum(completion_ids) % 97 / 97
        timer = threading.Timer(float(os.environ[LATENCY]), future.set_result, [reward])
        timer.daemon = True
        timer.start()
        return future


slow_reward = SlowReward()


def seconds_per_step(ahead: int, latency: float, arguments: list[str]) -> float:
    """The median of a short run's steps but the first and the last, which are not in full swing."""
    with TemporaryDirectory() as folder:
        command = [sys.executable, "train.py", f"--output={folder}/run", f"--train.steps={STEPS}"]
        command += ["--reward=benchmarks.ahead:slow_reward", f"--rollout.ahead={ahead}"]
        command += ["--data.heldout_records=1", *arguments]
        environment = os.environ | {LATENCY: str(latency)}
        subprocess.run(command, check=True, env=environment, capture_output=True)
        lines = Path(folder, "run", "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return median(json.loads(line)["seconds_step"] for line in lines[1:-1])


def main(arguments: list[str]) -> None:
    """Run all of them and print the medians; the last line is one JSON object."""
    work = seconds_per_step(0, 0.0, arguments)
    print(f"generation, reference and update: {work:.2f} s; each verdict takes as long")
    times: dict[int, list[float]] = {0: [], 1: []}
    for _ in range(ROUNDS):
        for ahead, of_this in times.items():
            of_this.append(seconds_per_step(ahead, work, arguments))
    waited, with_next = median(times[0]), median(times[1])
    print(f"waited for:   {waited:.2f} s a step ({waited / work:.2f} of generation and update)")
    print(f"a step ahead: {with_next:.2f} s a step ({with_next / work:.2f})")
    result = {"work": work, "waited_for": waited, "ahead": with_next, "ratio": with_next / waited}
    print(json.dumps(result))


if __name__ == "__main__":
    main(sys.argv[1:])

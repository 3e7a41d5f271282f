"""Judges that fail: the step waits, asks again, and stops rather than train on what is left."""

from collections import Counter
from concurrent.futures import Future

import pytest
import torch

from grpo import patience
from grpo.config import ConfigError, TrainConfig
from grpo.parallel import Ranks
from grpo.patience import RunStopped, finish_rewards
from grpo.reward import RewardCalls
from grpo.rollout import Completion, Group, Prompt

CAUSE = "reception: http 500"


class Alone(Ranks):
    """One rank, without a process group."""

    def gather(self, mine):
        return [mine]

    def stop_if_asked(self):
        pass


class WithOneThatHasNothing(Alone):
    """Two ranks, the other of which has scored 8 completions of its 8."""

    def gather(self, mine):
        return [mine, (8, 0, Counter()) if isinstance(mine, tuple) else None]


class FlakyReward:
    """Gives no reward to some completions, until it has been told often enough to forget."""

    def __init__(self, missing: int, recovers_after: int) -> None:
        self.missing, self.recovers_after = missing, recovers_after
        self.forgotten = 0
        self.submitted: list[str] = []

    def submit(self, prompt: str, completion: str, completion_ids: list[int]) -> Future:
        self.submitted.append(completion)
        fails = int(completion) < self.missing and self.forgotten < self.recovers_after
        future: Future = Future()
        future.details = {"causes": [CAUSE] if fails else []}
        future.set_result(None if fails else float(completion))
        return future

    def forget_failures(self) -> None:
        self.forgotten += 1


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    slept: list[float] = []
    monkeypatch.setattr(patience.time, "sleep", slept.append)
    return slept


def rollout(reward) -> tuple[RewardCalls, list[Group]]:
    group = Group(
        Prompt(0, "", [1], {}), [Completion([1], [0.0], "stop", text=str(i)) for i in range(8)]
    )
    calls = RewardCalls(reward)
    for completion in group.completions:
        calls.start(group.prompt, completion)
    return calls, [group]


def finish(reward, ranks=Alone, **settings: float) -> list[float | None]:
    calls, groups = rollout(reward)
    finish_rewards(
        calls, groups, ranks(0, 1, torch.device("cpu"), mesh=None), TrainConfig(**settings)
    )
    return [completion.reward for completion in groups[0].completions]


def test_a_few_missing_rewards_are_accepted(pauses: list[float]) -> None:
    reward = FlakyReward(missing=1, recovers_after=99)  # 1 of 8, below the 20 % of the default
    assert finish(reward) == [None, 1, 2, 3, 4, 5, 6, 7]
    assert pauses == [] and len(reward.submitted) == 8


def test_what_is_missing_is_asked_again_after_growing_pauses(pauses: list[float]) -> None:
    reward = FlakyReward(missing=3, recovers_after=2)
    assert finish(reward) == list(range(8))
    assert pauses == [10, 20]
    assert reward.submitted[8:] == ["0", "1", "2"] * 2, "what has a reward is not asked again"


def test_at_the_end_of_patience_the_run_stops_and_says_which_judge_failed_how(
    pauses: list[float], capsys: pytest.CaptureFixture
) -> None:
    reward = FlakyReward(missing=3, recovers_after=99)
    message = (
        rf"^3 of 8 completions have no reward; {CAUSE} \(3\): more than train.max_unscored = 0.2 "
        r"of them, after pauses of 50 s"
    )
    with pytest.raises(RunStopped, match=message):
        finish(reward, patience_seconds=50)
    assert pauses == [10, 20, 20], "the last pause ends with the patience"
    warnings = capsys.readouterr().err.splitlines()
    assert len(warnings) == 3 and all(CAUSE in line for line in warnings)


def test_even_without_patience_it_is_asked_once_more(pauses: list[float]) -> None:
    """A run that was stopped finds the failures kept when it goes on; the judge may be back."""
    reward = FlakyReward(missing=3, recovers_after=1)
    assert finish(reward, patience_seconds=0) == list(range(8))
    assert pauses == [0]


def test_what_waiting_does_not_mend_is_asked_once_more_and_stops_the_run(
    pauses: list[float],
) -> None:
    """A refused key half an hour later is a refused key."""
    reward = FlakyReward(missing=3, recovers_after=99)
    reward.may_pass = lambda cause: cause != CAUSE
    with pytest.raises(RunStopped, match=CAUSE):
        finish(reward)
    assert pauses == [10]


def test_the_share_is_that_of_all_ranks(pauses: list[float]) -> None:
    """3 of 8 are too many, 3 of 16 are not: ranks that decided alone would wait for each other."""
    reward = FlakyReward(missing=3, recovers_after=99)
    assert finish(reward, WithOneThatHasNothing).count(None) == 3
    assert pauses == []


def test_a_reward_that_cannot_be_asked_again_may_leave_out_what_it_likes(
    pauses: list[float],
) -> None:
    reward = FlakyReward(missing=8, recovers_after=99)
    only_submit = type("OnlySubmit", (), {"submit": reward.submit})()
    assert finish(only_submit) == [None] * 8
    assert pauses == []


def test_a_reward_that_raises_is_an_error_at_once(pauses: list[float]) -> None:
    class Broken(FlakyReward):
        def submit(self, *arguments: object) -> Future:
            future: Future = Future()
            future.set_exception(RuntimeError("no such column"))
            return future

    with pytest.raises(ConfigError, match="no such column"):
        finish(Broken(0, 0))
    assert pauses == []

"""The whole reward over real HTTP, against a server that goes wrong in every way."""

import asyncio
import gc
import heapq
import time
from dataclasses import asdict

import pytest

from perm_reward import JudgeConfig, PermReward, Seeker
from perm_reward.aggregate import perm_reward
from perm_reward.completion import parse_completion
from perm_reward.judges import Traffic
from perm_reward.judges.endpoints import Call
from perm_reward.judges.openai import OpenAIJudge
from perm_reward.judges.replies import Reply
from perm_reward.prompts import judge_messages
from perm_reward.rubrics import ROLES, RUBRICS
from perm_reward.verdict import Verdict
from tests.perm_reward.conftest import PROXY_VARIABLES
from tests.perm_reward.hostile_server import FAULTS, NEVER_END, HostileServer, Plan, key_of

ANNA = Seeker("Anna, a nurse", "Her shift was cut", "I feel invisible.")
TIMEOUT_SECONDS = 2.0


@pytest.fixture(autouse=True)
def no_proxies(monkeypatch):
    for name in PROXY_VARIABLES:
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)


def completions(first, last):
    return [f"# Analysis\nWhat {i} is about\n# Response\nWords {i}" for i in range(first, last)]


def keys_of(completion):
    """The keys of the four requests about a completion, in the order of ROLES."""
    parsed = parse_completion(completion)
    shown = {"analysis": parsed.analysis, "response": parsed.response}
    return [
        key_of(judge_messages(role, ANNA, shown[RUBRICS[role].shown], seed=0)) for role in ROLES
    ]


def expected_reward(plan, completion):
    """The reward that follows from the scores that the server gives these very requests."""
    scores = []
    for role, key in zip(ROLES, keys_of(completion), strict=True):
        scores.append(sum(plan.scores(key, 5 if role == "bystander" else 1)))
    return perm_reward(*scores, completion_tokens=100).total


def ideal_seconds(plan, texts, places):
    """The best that one could do: `places` calls in flight, and a fault, which costs its time, is
    tried again at once."""
    free_at = [0.0] * places
    for text in texts:
        for key in keys_of(text):
            attempt, fault = 0, "none so far"
            while fault is not None:
                attempt += 1
                fault = plan.fault(key, attempt)
                never_ends = fault in NEVER_END
                seconds = TIMEOUT_SECONDS if never_ends else plan.latency(key, attempt)
                heapq.heapreplace(free_at, free_at[0] + seconds)
    return max(free_at)


def reward_from(server, concurrency, max_retries=16):
    config = JudgeConfig(
        kind="openai",
        model="tiny",
        base_url=server.url,
        api_key_variable="NO_SUCH_KEY",
        timeout_seconds=TIMEOUT_SECONDS,
        max_retries=max_retries,
        concurrency=concurrency,
    )
    return PermReward(OpenAIJudge(config))


def score(reward, texts):
    columns = {
        name: [getattr(ANNA, name)] * len(texts) for name in ("persona", "scenario", "query")
    }
    ids = [range(100)] * len(texts)
    return reward(texts, texts, completion_ids=ids, **columns)


def check_each_was_answered_once(server, texts):
    keys = [key for text in texts for key in keys_of(text)]
    assert len(set(keys)) == len(keys)
    stats = server.stats()
    print(stats["faults"], f"refused {stats['refused']}, connections {stats['connections']}")
    assert stats["successes"] == dict.fromkeys(keys, 1)
    return stats


@pytest.mark.parametrize(
    "fault",
    # A fault that never ends costs the whole time limit, each time.
    [pytest.param(f, marks=pytest.mark.slow if f in NEVER_END else ()) for f in FAULTS],
)
def test_each_fault_is_survived(fault):
    """Half of all attempts go wrong in one and the same way. No score is lost, asked for twice, or
    taken from what a fault says."""
    plan = Plan(seed=1, fault_rate=0.5, seconds=(0.01, 0.02), faults=(fault,))
    texts = completions(0, 4)
    with HostileServer(plan) as server, reward_from(server, concurrency=64) as reward:
        assert score(reward, texts) == [expected_reward(plan, text) for text in texts]
        assert check_each_was_answered_once(server, texts)["faults"][fault] > 4


def live_objects():
    """The number of all objects, and how many of them are of the kinds that belong to one call."""
    gc.collect()
    objects = gc.get_objects()
    # By `type`, since `isinstance` would wake modules that load when they are looked at.
    kinds = (Call, Reply, Verdict, asyncio.Task)
    return len(objects), sum(type(one) in kinds for one in objects)


@pytest.mark.slow
@pytest.mark.parametrize(
    "seed, count, concurrency, most_in_flight",
    [(1, 60, 16, 10_000), (2, 2000, 32, 24)],
)
def test_nothing_is_lost_doubled_or_invented_and_little_time_is_wasted(
    seed, count, concurrency, most_in_flight
):
    """30 % of attempts go wrong, and of the big run the server refuses what exceeds its limit."""
    print(f"seed {seed}")
    plan = Plan(seed, 0.3, (0.05, 0.25), most_in_flight=most_in_flight)
    first, texts = completions(0, 10), completions(10, 10 + count)
    places = min(concurrency, most_in_flight)
    ideal = ideal_seconds(plan, texts, places)
    with HostileServer(plan) as server, reward_from(server, concurrency) as reward:
        assert score(reward, first) == [expected_reward(plan, text) for text in first]
        objects, of_calls = live_objects()
        began = time.perf_counter()
        rewards = score(reward, texts)
        took = time.perf_counter() - began
        grown, left_over = live_objects()
        assert rewards == [expected_reward(plan, text) for text in texts]
        stats = check_each_was_answered_once(server, first + texts)
        assert asdict(reward.judge.traffic) == asdict(Traffic(done=4 * (10 + count)))

    print(f"ideal {ideal:.1f} s, took {took:.1f} s; objects {objects}, then {grown}")
    assert stats["most_in_flight"] <= places
    assert stats["refused"] < 0.1 * 4 * count
    assert left_over <= of_calls
    assert grown - objects < 1000, "connections come and go, a few objects each; calls leave none"
    assert took < 1.5 * ideal

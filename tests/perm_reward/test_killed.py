"""A run that is killed half-way and started again pays for nothing twice, and ends the same."""

import asyncio
import contextlib
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from perm_reward.prompts import Seeker, judge_messages
from perm_reward.rubrics import ROLES
from perm_reward.verdict_store import read_verdicts
from tests.perm_reward.conftest import completion

ROOT = Path(__file__).parents[2]
COMPLETIONS = 30
SAMPLES = 2
CONCURRENCY = 8
BYSTANDER_INSTRUCTIONS = judge_messages("bystander", Seeker("", "", ""), "")[0]

# Scores completions with PermReward, and prints the rewards.
RUN = """
import json, sys
sys.path.insert(0, sys.argv[1])
from perm_reward import JudgeConfig, PermReward
from perm_reward.judges.openai import OpenAIJudge
from perm_reward.panel import Panel, Prices
from perm_reward.rubrics import ROLES
from perm_reward.verdict_store import VerdictStore

_, url, path, samples, concurrency, texts = sys.argv[1:]
config = JudgeConfig(kind="openai", base_url=url, model="tiny", concurrency=int(concurrency))
judge = OpenAIJudge(config)
panel = Panel(
    dict.fromkeys(ROLES, judge),
    dict.fromkeys(ROLES, int(samples)),
    dict.fromkeys(ROLES, Prices()),
    VerdictStore(path),
)
texts = json.loads(texts)
columns = {name: [f"{name} of Anna"] * len(texts) for name in ("persona", "scenario", "query")}
with PermReward(panel) as reward:
    rewards = reward(texts, texts, completion_ids=[[1] * 10] * len(texts), **columns)
    found = sum(cost.found for cost in panel.costs().values())
print(json.dumps([rewards, found]))
"""


class SlowServer:
    """Chat completions on loopback. The score follows from the messages, so that runs agree."""

    def __init__(self):
        self.replies = 0
        self.at_reply = {}
        """what to do after how many replies"""
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._thread.start()
        serving = asyncio.start_server(self._connection, "127.0.0.1", 0)
        self._server = asyncio.run_coroutine_threadsafe(serving, self._loop).result()
        port = self._server.sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{port}/v1"

    async def _connection(self, reader, writer):
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
                length = int(head.split("content-length:")[1].split("\r\n")[0])
                request = json.loads(await reader.readexactly(length))
                await asyncio.sleep(0.02)
                body = json.dumps(reply_to(request["messages"])).encode()
                length = f"content-length: {len(body)}"
                type_ = "content-type: application/json"
                writer.write(f"HTTP/1.1 200 OK\r\n{type_}\r\n{length}\r\n\r\n".encode() + body)
                await writer.drain()
                self.replies += 1
                self.at_reply.pop(self.replies, lambda: None)()
        writer.close()

    def close(self):
        asyncio.run_coroutine_threadsafe(self._end(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _end(self):
        self._server.close()
        handlers = asyncio.all_tasks() - {asyncio.current_task()}
        for handler in handlers:
            handler.cancel()
        await asyncio.gather(*handlers, return_exceptions=True)


def reply_to(messages):
    digest = hashlib.sha256(json.dumps(messages).encode()).digest()
    is_bystander = messages[0] == BYSTANDER_INSTRUCTIONS
    text = f"Total: {6 + digest[0] % 95}" if is_bystander else f"Score: {1 + digest[0] % 5}"
    usage = {"prompt_tokens": 100, "completion_tokens": 5, "total_tokens": 105}
    return completion(text, "stop") | {"usage": usage}


@pytest.fixture
def server():
    server = SlowServer()
    yield server
    server.close()


def start(server, folder, texts):
    arguments = [ROOT, server.url, folder / "verdicts" / "node-0.sqlite", SAMPLES, CONCURRENCY]
    environment = {k: v for k, v in os.environ.items() if not k.lower().endswith("_proxy")}
    return subprocess.Popen(
        [sys.executable, "-c", RUN, *map(str, arguments), json.dumps(texts)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def outcome(process):
    """The rewards, and how many verdicts were found."""
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    return json.loads(output)


@pytest.mark.slow
def test_a_killed_run_is_paid_for_once(server, tmp_path):
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    words = random.Random(seed)
    texts = []
    for _ in range(COMPLETIONS):
        feeling, answer = f"{words.getrandbits(40):x}", f"{words.getrandbits(40):x}"
        texts.append(f"# Analysis\nShe feels {feeling}.\n# Response\nI see {answer}.")
    total = COMPLETIONS * len(ROLES) * SAMPLES
    undisturbed, found = outcome(start(server, tmp_path / "undisturbed", texts))
    assert server.replies == total and found == 0
    assert None not in undisturbed and len(set(undisturbed)) > 5

    server.replies = 0
    process = start(server, tmp_path / "killed", texts)
    server.at_reply[total // 2] = lambda: os.kill(process.pid, signal.SIGKILL)
    process.communicate(timeout=120)
    assert process.returncode == -signal.SIGKILL
    kept = len(list(read_verdicts(tmp_path / "killed")))
    assert total // 2 - CONCURRENCY <= kept <= total // 2

    rewards, found = outcome(start(server, tmp_path / "killed", texts))
    assert rewards == undisturbed
    assert found == kept
    assert total <= server.replies <= total + CONCURRENCY
    rows = list(read_verdicts(tmp_path / "killed"))
    assert len(rows) == len({row.key for row in rows}) == total
    assert {row.sample for row in rows} == set(range(SAMPLES))
    assert all(row.verdict.score is not None for row in rows)

    replies = server.replies
    assert outcome(start(server, tmp_path / "killed", texts)) == [undisturbed, total]
    assert server.replies == replies  # a run that is complete asks nothing

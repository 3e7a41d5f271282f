"""A chat-completions server that goes wrong in every way, as its plan's seed says.

It runs in a process of its own (`HostileServer`), on the loopback address. Whether an attempt at a
request fails, how, and how long it takes is a hash of the seed, the request and the number of the
attempt; the score that it gets in the end is a hash of the request. So a test can compute all of
them beforehand.
"""

import asyncio
import hashlib
import json
import subprocess
import sys
import urllib.request
from collections import Counter
from contextlib import suppress
from dataclasses import asdict, dataclass

FAULTS = (
    "http 500",
    "http 503 with retry-after",
    "hang",
    "slow stream",
    "half-closed",
    "cut off in the middle",
    "truncated JSON",
    "empty choices",
    "wrong schema",
    "html",
)
NEVER_END = ("hang", "slow stream")
_WRONG_SCHEMA = {"object": "chat.completion", "choices": {"message": {"content": "Score: 5"}}}


@dataclass(frozen=True)
class Plan:
    seed: int
    fault_rate: float
    seconds: tuple[float, float]
    """bounds of an attempt's latency"""
    faults: tuple[str, ...] = FAULTS
    most_in_flight: int = 10_000
    """what comes above is refused with http 429"""

    def unit(self, *what):
        """A number in [0, 1) that depends on the seed and `what` alone."""
        digest = hashlib.sha256(repr((self.seed, *what)).encode()).digest()
        return int.from_bytes(digest[:8], "big") / 2**64

    def fault(self, key, attempt):
        """What goes wrong with this attempt, or None."""
        if self.unit("fault", key, attempt) >= self.fault_rate:
            return None
        return self.faults[int(self.unit("which", key, attempt) * len(self.faults))]

    def latency(self, key, attempt):
        shortest, longest = self.seconds
        return shortest + (longest - shortest) * self.unit("latency", key, attempt)

    def scores(self, key, count):
        """One score of 1-5, or five of 0-20."""
        if count == 1:
            return [1 + int(5 * self.unit("score", key))]
        return [int(21 * self.unit("score", key, part)) for part in range(count)]


def key_of(messages):
    """What tells one request from another."""
    return hashlib.sha256(json.dumps(messages).encode()).hexdigest()


def reply_to(plan, key, body):
    """What the model says: mostly in the form of the schema, sometimes in words of its own."""
    properties = body["response_format"]["json_schema"]["schema"]["properties"]
    names = [name for name in properties if name != "reason"]
    scores = dict(zip(names, plan.scores(key, len(names)), strict=True))
    if plan.unit("style", key) < 0.8:
        return json.dumps({"reason": "It says so."} | scores if "reason" in properties else scores)
    lines = [f"{name.replace('_', ' ').capitalize()}: {score}" for name, score in scores.items()]
    return "It says so.\n" + "\n".join(lines)


class _Server:
    def __init__(self, plan):
        self.plan = plan
        self.attempts = Counter()
        self.successes = Counter()
        self.faults = Counter()
        self.in_flight = self.most_in_flight = self.refused = self.connections = 0

    async def serve(self, reader, writer):
        self.connections += 1
        # Cancelled: the server ends, of which nobody needs to hear.
        with suppress(ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            while await self.exchange(reader, writer):
                pass
        writer.close()

    async def exchange(self, reader, writer):
        """Answer one request. Returns whether the connection stays open."""
        head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
        if head.startswith("get "):
            names = ("attempts", "successes", "faults", "refused", "most_in_flight", "connections")
            return await send(
                writer, 200, json.dumps({name: getattr(self, name) for name in names})
            )
        body = json.loads(await reader.readexactly(int(header(head, "content-length"))))
        key = key_of(body["messages"])
        if self.in_flight >= self.plan.most_in_flight:
            self.refused += 1
            headers = ["retry-after-ms: 50"] if self.refused % 2 else []
            return await send(writer, 429, '{"error": {"message": "slow down"}}', headers)
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        try:
            self.attempts[key] += 1
            fault = self.plan.fault(key, self.attempts[key])
            self.faults[fault or "none"] += 1
            if fault not in NEVER_END:
                await asyncio.sleep(self.plan.latency(key, self.attempts[key]))
            if fault is not None:
                return await go_wrong(fault, reader, writer)
            stays_open = await send(writer, 200, completion(reply_to(self.plan, key, body)))
            self.successes[key] += 1
            return stays_open
        finally:
            self.in_flight -= 1


async def go_wrong(fault, reader, writer):
    good = completion('{"reason": "Not to be believed.", "score": 5}')
    if fault == "http 500":
        return await send(writer, 500, "<h1>Internal Server Error</h1>", kind="text/html")
    if fault == "http 503 with retry-after":
        return await send(writer, 503, '{"error": "busy"}', ["retry-after-ms: 150"])
    if fault == "hang":
        await reader.read(1)  # until the client has had enough
        return False
    if fault == "slow stream":
        writer.write(head_of(200, len(good) + 10**6))
        while not reader.at_eof():
            writer.write(b" ")
            await writer.drain()
            with suppress(TimeoutError):
                await asyncio.wait_for(reader.read(1), 0.05)
        return False
    if fault == "half-closed":
        writer.write_eof()
        return False
    if fault == "cut off in the middle":
        writer.write(head_of(200, len(good)) + good.encode()[: len(good) // 2])
        await writer.drain()
        return False
    if fault == "truncated JSON":
        return await send(writer, 200, good[: len(good) // 2])
    if fault == "empty choices":
        return await send(writer, 200, '{"object": "chat.completion", "choices": []}')
    if fault == "wrong schema":
        return await send(writer, 200, json.dumps(_WRONG_SCHEMA))
    assert fault == "html"
    return await send(writer, 200, "<html>Score: 5</html>", kind="text/html")


def completion(text):
    choice = {
        "index": 0,
        "message": {"role": "assistant", "content": text},
        "finish_reason": "stop",
    }
    usage = {"prompt_tokens": 10, "completion_tokens": 2, "total_tokens": 12}
    return json.dumps({"object": "chat.completion", "choices": [choice], "usage": usage})


def head_of(status, length, headers=(), kind="application/json"):
    lines = [f"HTTP/1.1 {status} x", f"content-type: {kind}", f"content-length: {length}", *headers]
    return ("\r\n".join(lines) + "\r\n\r\n").encode()


async def send(writer, status, text, headers=(), kind="application/json"):
    writer.write(head_of(status, len(text), headers, kind) + text.encode())
    await writer.drain()
    return True


def header(head, name):
    return next(line.split(":", 1)[1] for line in head.splitlines() if line.startswith(name))


class HostileServer:
    """The server in its own process, so that it takes none of the client's time."""

    def __init__(self, plan):
        self.plan = plan

    def __enter__(self):
        self._process = subprocess.Popen(
            [sys.executable, __file__, json.dumps(asdict(self.plan))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        port = int(self._process.stdout.readline())
        self.url = f"http://127.0.0.1:{port}/v1"
        return self

    def __exit__(self, *exception):
        self._process.stdin.close()
        self._process.wait(10)
        self._process.stdout.close()

    def stats(self):
        """attempts and successes of each request; faults of each kind; and so on."""
        with urllib.request.urlopen(self.url) as answer:
            return json.load(answer)


async def _main(plan):
    server = await asyncio.start_server(_Server(plan).serve, "127.0.0.1", 0, backlog=1000)
    print(server.sockets[0].getsockname()[1], flush=True)
    await asyncio.to_thread(sys.stdin.read)  # until it is closed, if only by the test's death


if __name__ == "__main__":
    settings = json.loads(sys.argv[1])
    lists = {name: tuple(settings[name]) for name in ("seconds", "faults")}
    asyncio.run(_main(Plan(**settings | lists)))

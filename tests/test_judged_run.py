"""train.py with judges behind HTTP: what they cost, when they fail, and what is kept of them."""

import json
import os
import shutil
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

import train
from perm_reward.rubrics import ROLES
from tests.perm_reward.conftest import completion

ROOT = Path(__file__).parent.parent
KEY = "sk-test-0a1b2c3d4e5f"
SMALL = {
    "train.steps": 2,
    "grpo.prompts_per_step": 2,
    "grpo.group_size": 4,
    "rollout.max_completion_tokens": 16,
    "data.heldout_records": 2,
    # Completions this short are cut off before their response: judged all the same.
    "perm.format_failure": "judge",
    "judge.kind": "openai",
    "judge.model": "tiny",
}
JUDGED_PER_STEP, JUDGED_HELDOUT = 8, 2
BYSTANDER = "Content effectiveness: 16\nStructure and clarity: 17\nCommunication efficiency: 15\n"
BYSTANDER += "Objectivity: 18\nAccuracy and verifiability: 14\nTotal: 80"


class Exchange(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        with server.lock:
            server.keys.add(self.headers["authorization"])
            server.calls += 1
            server.in_flight += 1
            server.most_in_flight = max(server.most_in_flight, server.in_flight)
            number = server.calls
        status, content = server.answer(number, body)
        reply = completion(content, "stop") | {
            "usage": {
                "prompt_tokens": 1000,
                "completion_tokens": 10,
                "total_tokens": 1010,
                "prompt_tokens_details": {"cached_tokens": 600},
            },
        }
        payload = json.dumps(reply if status == 200 else {"error": {"message": content}}).encode()
        with server.lock:
            server.in_flight -= 1
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(payload)))
        self.end_headers()
        self.wfile.write(payload)

    def log_message(self, *arguments: object) -> None:
        pass


def score(number: int, body: dict) -> tuple[int, str]:
    """A verdict in plain text, another one each time."""
    is_bystander = "Accuracy and verifiability" in body["messages"][0]["content"]
    return 200, BYSTANDER if is_bystander else f"Because.\nScore: {1 + number % 5}"


class Server(ThreadingHTTPServer):
    daemon_threads = True
    answer: Callable[[int, dict], tuple[int, str]]

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Exchange)
        self.answer = score
        self.lock = threading.Lock()
        self.keys: set[str] = set()
        self.calls = self.in_flight = self.most_in_flight = 0
        self.url = f"http://127.0.0.1:{self.server_address[1]}/v1"


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    server = Server()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def arguments(server: Server, output: Path, settings: dict[str, object]) -> list[str]:
    given = {"output": output, "judge.base_url": server.url} | SMALL | settings
    return [f"--{name}={value}" for name, value in given.items()]


def run(monkeypatch: pytest.MonkeyPatch, server: Server, output: Path, **settings: object) -> None:
    monkeypatch.setattr(sys, "argv", ["train.py", *arguments(server, output, settings)])
    monkeypatch.delenv("RANK", raising=False)
    train.main()


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def kept(output: Path) -> int:
    """Verdicts in the store, those that were asked for again counted once."""
    with sqlite3.connect(output / "verdicts" / "node-0.sqlite") as connection:
        return connection.execute("SELECT count(DISTINCT key) FROM verdicts").fetchone()[0]


def test_tokens_and_money_are_counted_and_every_verdict_is_kept(
    monkeypatch: pytest.MonkeyPatch,
    server: Server,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    prices = {"judge.price_input": 10, "judge.price_cached": 5, "judge.price_output": 100}
    run(monkeypatch, server, tmp_path, **prices)
    last = lines(tmp_path / "metrics.jsonl")[-1]
    calls = sum(last[f"judge.{role}.calls"] for role in ROLES)
    found = sum(last[f"judge.{role}.found"] for role in ROLES)
    assert calls + found == 4 * (JUDGED_HELDOUT + 2 * JUDGED_PER_STEP)
    assert calls > 0 and sum(last[f"judge.{role}.cached_tokens"] for role in ROLES) == 600 * calls
    money = sum(last[f"judge.{role}.money"] for role in ROLES)
    assert money == pytest.approx(calls * (400 * 10 + 600 * 5 + 10 * 100) / 1e6)
    # Nothing was asked for twice, beside the try-out at the start and schema or plain text.
    after = lines(tmp_path / "evaluations.jsonl")
    assert [line["step"] for line in after] == [0, 2]
    assert kept(tmp_path) >= calls
    shown = capsys.readouterr()
    assert "judges: at most 80 calls, about " in shown.out and "in money" in shown.out
    assert "judges cost      0." in shown.out


@pytest.mark.slow
def test_a_run_of_two_nodes_that_goes_on_on_one_pays_for_nothing_again(
    monkeypatch: pytest.MonkeyPatch, server: Server, tmp_path: Path
) -> None:
    run(monkeypatch, server, tmp_path, **{"judge.price_output": 100})
    before, metrics = server.calls, lines(tmp_path / "metrics.jsonl")
    stores = [tmp_path / "verdicts" / f"node-{i}.sqlite" for i in (1, 2)]
    stores[0].parent.joinpath("node-0.sqlite").rename(stores[0])
    shutil.copyfile(*stores)
    for rest, store in enumerate(stores):  # as if two other nodes had kept half of it each
        with sqlite3.connect(store) as database:
            database.execute("DELETE FROM verdicts WHERE number % 2 = ?", (rest,))
        database.close()
    shutil.rmtree(tmp_path / "checkpoints")
    shutil.rmtree(tmp_path / "policy")

    monkeypatch.setattr(sys, "argv", ["train.py", "--resume", str(tmp_path)])
    train.main()
    assert server.calls == before + 1, "the try-out of the judge"
    assert lines(tmp_path / "metrics.jsonl")[-1].keys() == metrics[-1].keys()
    costs = [
        {k: v for k, v in m[-1].items() if k.startswith("judge.")}
        for m in (metrics, lines(tmp_path / "metrics.jsonl"))
    ]
    assert costs[0] == costs[1] and costs[0]["judge.reception.money"] > 0
    assert kept(tmp_path) == 0


@pytest.mark.slow
def test_the_budget_ends_the_run_before_a_step_that_it_cannot_pay(
    monkeypatch: pytest.MonkeyPatch,
    server: Server,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A call of 10 tokens costs 0.01, and by the estimate, 60 tokens, 0.06; a step and the last
    evaluation are 40 calls. With 2.9 there is room for them while no more than 0.5 is spent. (Short
    texts come twice and are paid once, so that the number of steps is not known beforehand.)"""
    prices = {"judge.price_output": 1000, "judge.budget": 2.9}
    run(monkeypatch, server, tmp_path, **prices, **{"train.steps": 9})
    metrics = lines(tmp_path / "metrics.jsonl")
    assert 1 <= len(metrics) < 9
    paid = [sum(step[f"judge.{role}.money"] for role in ROLES) for step in metrics]
    assert all(before <= 0.5 for before in paid[:-1]) and 0.5 < paid[-1] <= 0.5 + 0.32
    assert [line["step"] for line in lines(tmp_path / "evaluations.jsonl")] == [0, len(metrics)]
    shown = capsys.readouterr().out
    assert f"stopped          before step {len(metrics) + 1} of 9: " in shown
    assert "of judge.budget = 2.9 spent" in shown
    assert (tmp_path / "policy" / "model.safetensors").exists()


def test_a_budget_without_prices_is_refused(
    monkeypatch: pytest.MonkeyPatch,
    server: Server,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as ended:
        run(monkeypatch, server, tmp_path, **{"judge.budget": 1})
    assert ended.value.code == 2 and server.calls == 0
    assert "error: judge.budget = 1: no judge has a price" in capsys.readouterr().err


def test_a_judge_that_stays_down_stops_the_run_which_goes_on_when_it_is_back(
    monkeypatch: pytest.MonkeyPatch,
    server: Server,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def down_after_the_start(number: int, body: dict) -> tuple[int, str]:
        return score(number, body) if number < 20 else (500, "overloaded")

    server.answer = down_after_the_start
    run_folder = tmp_path / "run"
    settings = {"judge.max_retries": 0, "train.patience_seconds": 0, "judge.concurrency": 4}
    with pytest.raises(SystemExit) as ended:
        run(monkeypatch, server, run_folder, **settings)
    assert ended.value.code == 1
    [line] = [line for line in capsys.readouterr().err.splitlines() if "stopped: " in line]
    assert "completions have no reward" in line and "http 500" in line
    assert line.endswith(f"go on with --resume {run_folder}")
    calls_before = kept(run_folder)
    assert calls_before > 0

    server.answer = score
    monkeypatch.setattr(sys, "argv", ["train.py", "--resume", str(run_folder)])
    train.main()
    assert [metrics["step"] for metrics in lines(run_folder / "metrics.jsonl")] == [1, 2]
    last = lines(run_folder / "evaluations.jsonl")[-1]
    with sqlite3.connect(run_folder / "verdicts" / "node-0.sqlite") as connection:
        answered = connection.execute("SELECT count(*) FROM verdicts").fetchone()[0]
    assert sum(last[f"judge.{role}.calls"] for role in ROLES) == answered, "of both processes"
    assert (run_folder / "policy" / "model.safetensors").exists()


def test_the_key_is_in_no_file_of_the_run(
    monkeypatch: pytest.MonkeyPatch,
    server: Server,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Even where the endpoint says it back, in a reply and in an error."""

    def echo(number: int, body: dict) -> tuple[int, str]:
        if number % 7 == 5:
            return 400, f"bad key {KEY}"
        status, content = score(number, body)
        return status, f"You sent {KEY}. {content}"

    server.answer = echo
    settings = {"judge.max_retries": 0, "train.max_unscored": 1.0}
    run(monkeypatch, server, tmp_path, **settings)
    assert server.keys == {f"Bearer {KEY}"}, "else nothing was at stake"
    shown = capsys.readouterr()
    assert KEY not in shown.out + shown.err
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert any(path.suffix == ".sqlite" for path in files)
    for path in files:
        assert KEY.encode() not in path.read_bytes(), path


@pytest.mark.slow
def test_two_ranks_share_one_store_and_one_limit(server: Server, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]

    def slow_score(number: int, body: dict) -> tuple[int, str]:
        time.sleep(0.1)  # so that calls meet
        return score(number, body)

    server.answer = slow_score
    settings = {"judge.concurrency": 3}
    done = subprocess.run(
        [*command, str(ROOT / "train.py"), *arguments(server, tmp_path, settings)],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    last = lines(tmp_path / "metrics.jsonl")[-1]
    calls = sum(last[f"judge.{role}.calls"] for role in ROLES)
    found = sum(last[f"judge.{role}.found"] for role in ROLES)
    assert calls + found == 4 * (JUDGED_HELDOUT + 2 * JUDGED_PER_STEP), "those of both ranks"
    assert kept(tmp_path) >= calls
    assert 1 < server.most_in_flight <= 3

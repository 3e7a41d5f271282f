"""One process of a node keeps the store; the others use it as if it were their own."""

import asyncio
import multiprocessing
import os
import re
import shutil
import signal
import socket
import stat
import time
from pathlib import Path

import pytest

import perm_reward.store_service as store_service
from perm_reward.store_service import RemoteStore, serve_store, socket_path
from perm_reward.verdict import Usage, Verdict
from perm_reward.verdict_store import StoreError, VerdictStore, now, read_verdicts

ODD = "half a pair \ud83d, two halves \ud83d\ude00, whole 😀, nul \x00, line\n\u2028end"
SCORED = Verdict("reception", 4, ODD, usage=Usage(900, 800, 30))
FAILED = Verdict("bystander", None, "", "timeout")


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "verdicts" / "node-0.sqlite"
    yield path
    shutil.rmtree(socket_path(path).parent, ignore_errors=True)  # what killed servers leave


@pytest.fixture
def service(path):
    with serve_store(VerdictStore(path), socket_path(path)) as service:
        yield service


def put(store, key, verdict, text="text"):
    return store.put(key, {"text": text}, 0, verdict, label="tiny", judged_text=text)


def with_remote(path, use):
    """What a coroutine function makes of a RemoteStore, on a loop of its own."""

    async def run():
        store = RemoteStore(socket_path(path))
        try:
            return await use(store)
        finally:
            await store.close()

    return asyncio.run(run())


# --- use -----------------------------------------------------------------------------------------


def test_what_one_process_keeps_another_finds(service, path):
    kept = with_remote(path, lambda store: put(store, "a", SCORED))
    assert kept is None
    with_remote(path, lambda store: put(store, "b", FAILED))

    async def get_all(store):
        return [await store.get(key) for key in "abc"]

    assert with_remote(path, get_all) == [SCORED, FAILED, None]
    service.close()
    rows = list(read_verdicts(path.parents[1]))
    assert [(row.key, row.asked, row.sample) for row in rows] == [
        ("a", {"text": "text"}, 0),
        ("b", {"text": "text"}, 0),
    ]
    assert [(row.label, row.judged_text, row.verdict) for row in rows] == [
        ("tiny", "text", SCORED),
        ("tiny", "text", FAILED),
    ]


def test_what_was_paid_is_told(service, path):
    async def pay_twice(store):
        await put(store, "a", FAILED)
        await put(store, "a", SCORED)
        return [await store.paid_after(moment, "a") for moment in ("", now())]

    assert with_remote(path, pay_twice) == [[FAILED.usage, SCORED.usage], []]


def test_answers_go_to_those_who_asked(service, path):
    """Hundreds of calls at once on one connection."""

    async def many(store):
        verdicts = {f"{i}": Verdict("reception", 1 + i % 5, f"reply {i}") for i in range(300)}
        await asyncio.gather(*(put(store, key, verdict) for key, verdict in verdicts.items()))
        found = await asyncio.gather(*(store.get(key) for key in verdicts))
        assert dict(zip(verdicts, found, strict=True)) == verdicts

    with_remote(path, many)


def test_one_who_left_does_not_leave_an_answer_to_the_next(service, path):
    async def leave_and_ask(store):
        for i in range(30):
            await put(store, f"{i}", Verdict("reception", 4, f"reply {i}"))
        for i in range(29):
            leaver = asyncio.create_task(store.get(f"{i}"))
            for _ in range(1 + i % 4):  # steps of the loop, so that it leaves at each of its waits
                await asyncio.sleep(0)
            leaver.cancel()
            assert (await store.get(f"{i + 1}")).reply == f"reply {i + 1}"

    with_remote(path, leave_and_ask)


def test_a_very_long_verdict_fits(service, path):
    verdict = Verdict("reception", None, "\ud800 €" * 500_000, "unparsable")

    async def put_and_get(store):
        await put(store, "a", verdict, text="long " * 500_000)
        return await store.get("a")

    assert with_remote(path, put_and_get) == verdict


def test_an_error_of_the_store_reaches_the_caller(service, path):
    service._store._database.execute("PRAGMA query_only = 1")
    with pytest.raises(StoreError, match=f"^{path}: the store cannot be used "):
        with_remote(path, lambda store: put(store, "a", SCORED))


def use_from_child(path, number, results):
    async def use(store):
        for i in range(40):
            await put(store, f"{number}: {i}", Verdict("reception", 4, f"{number}"))
        return [(await store.get(f"{number}: {i}")).reply for i in range(40)]

    results.put(with_remote(path, use) == [f"{number}"] * 40)


def test_processes_share_a_store(service, path):
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    children = [context.Process(target=use_from_child, args=(path, i, results)) for i in range(3)]
    for child in children:
        child.start()
    assert [results.get(timeout=60) for _ in children] == [True] * 3
    for child in children:
        child.join()
    service.close()
    assert len(list(read_verdicts(path.parents[1]))) == 120


# --- the socket ----------------------------------------------------------------------------------


def test_the_socket_is_this_users_alone_and_goes_with_the_service(service, path):
    place = socket_path(path)
    assert stat.S_IMODE(place.stat().st_mode) == 0o600
    assert stat.S_IMODE(place.parent.stat().st_mode) == 0o700
    service.close()
    assert not place.parent.exists()
    VerdictStore(path).close()  # and the store has been let go


def test_a_folder_of_another_user_is_refused(path, monkeypatch):
    """In /tmp anybody can make a folder first, and read along."""
    uid = os.getuid()
    monkeypatch.setattr(os, "getuid", lambda: uid + 1)
    place = socket_path(path)
    place.parent.mkdir()
    store = VerdictStore(path)
    with pytest.raises(StoreError, match=f"^{place.parent}: belongs to another user; [^\n]*$"):
        serve_store(store, place)
    store.close()


def test_a_folder_that_others_may_read_is_closed_to_them(path):
    socket_path(path).parent.mkdir()
    socket_path(path).parent.chmod(0o777)
    with serve_store(VerdictStore(path), socket_path(path)):
        assert stat.S_IMODE(socket_path(path).parent.stat().st_mode) == 0o700


def test_the_sockets_path_is_short_however_long_the_runs_is(tmp_path, monkeypatch):
    deep = tmp_path / ("deep" * 50) / "node-0.sqlite"
    assert len(os.fsencode(socket_path(deep))) <= 100
    assert socket_path(deep) != socket_path(deep.with_name("node-1.sqlite"))
    monkeypatch.chdir(tmp_path)
    assert socket_path("node-0.sqlite") == socket_path(tmp_path / "node-0.sqlite")
    monkeypatch.setattr(store_service.tempfile, "tempdir", str(tmp_path / ("deep" * 50)))
    assert socket_path(deep).parents[1] == Path("/tmp")


def test_a_path_too_long_for_a_socket_is_refused(path, tmp_path):
    store = VerdictStore(path)
    with pytest.raises(StoreError, match="too long for a socket; [^\n]*$"):
        serve_store(store, tmp_path / ("deep" * 50) / "store")
    store.close()


def test_the_socket_of_a_killed_process_is_taken_over(path):
    child = serving_child(path)
    child.kill()
    child.join()
    assert socket_path(path).exists()
    with serve_store(VerdictStore(path), socket_path(path)):
        assert with_remote(path, lambda store: store.get("a")) == SCORED


# --- a server that is gone -----------------------------------------------------------------------


def serve_until_killed(path, ready):
    with serve_store(VerdictStore(path), socket_path(path)):
        with_remote(path, lambda store: put(store, "a", SCORED))
        ready.set()
        time.sleep(600)


def serving_child(path):
    context = multiprocessing.get_context("spawn")
    ready = context.Event()
    child = context.Process(target=serve_until_killed, args=(path, ready), daemon=True)
    child.start()
    assert ready.wait(60)
    return child


def gone(path):
    return f"^the verdict store at {socket_path(path)}: the process [^\n]* is gone; [^\n]*$"


def test_a_server_that_was_never_there_is_told(path):
    with pytest.raises(StoreError, match=gone(path)):
        with_remote(path, lambda store: store.get("a"))


def test_a_server_that_is_killed_is_told_and_not_waited_for(path):
    child = serving_child(path)

    async def use(store):
        assert await store.get("a") == SCORED
        child.kill()
        child.join()
        for _ in range(2):
            with pytest.raises(StoreError, match=gone(path)):
                await store.get("a")

    with_remote(path, use)


def test_a_server_that_hangs_is_told(path, monkeypatch):
    child = serving_child(path)
    monkeypatch.setattr(store_service, "_ANSWER_SECONDS", 0.2)
    os.kill(child.pid, signal.SIGSTOP)
    os.waitpid(child.pid, os.WUNTRACED)  # its threads do not stop at once
    try:
        with pytest.raises(StoreError, match="no answer within 0.2 s; [^\n]*$"):
            with_remote(path, lambda store: store.get("a"))
    finally:
        child.kill()
        child.join()


def test_closing_while_calls_wait_tells_them_all(path, monkeypatch):
    """Those who were told connect again, and must not be taken on by a server that is leaving."""
    monkeypatch.setattr(store_service, "_ANSWER_SECONDS", 5.0)

    async def use(store):
        await put(store, "a", SCORED)
        calls = [asyncio.create_task(store.get("a")) for _ in range(50)]
        await calls[0]
        await asyncio.to_thread(service.close)
        return await asyncio.gather(*calls, return_exceptions=True)

    for _ in range(20):
        with serve_store(VerdictStore(path), socket_path(path)) as service:
            outcomes = with_remote(path, use)
        errors = [str(outcome) for outcome in outcomes if outcome != SCORED]
        assert all(re.fullmatch(gone(path), error) for error in errors)
    with pytest.raises(StoreError, match=gone(path)):
        with_remote(path, lambda store: store.get("a"))


def test_one_who_connects_while_the_service_ends_is_not_left_waiting(path, monkeypatch):
    late = socket.socket(socket.AF_UNIX)
    late.settimeout(5.0)
    answer_lines = store_service._answer_lines

    async def answer_until_cancelled(*arguments):
        try:
            await answer_lines(*arguments)
        except asyncio.CancelledError:
            late.connect(str(socket_path(path)))
            await asyncio.sleep(0.05)  # so that it is taken on before all has ended
            raise

    async def use(store):
        await store.get("a")
        monkeypatch.setattr(store_service, "_answer_lines", answer_lines)
        await asyncio.to_thread(service.close)

    monkeypatch.setattr(store_service, "_answer_lines", answer_until_cancelled)
    with serve_store(VerdictStore(path), socket_path(path)) as service, late:
        with_remote(path, use)
        assert late.recv(1) == b""

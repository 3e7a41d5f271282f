"""OpenAIJudge over real HTTP, against a server on the loopback address."""

import asyncio
import socket
import threading
import time
import traceback

import pytest

from perm_reward.judges import JudgeConfig
from perm_reward.judges.openai import OpenAIJudge
from perm_reward.prompts import Seeker, judge_messages
from perm_reward.rubrics import ROLES

ANNA = Seeker("Anna, a nurse", "Her shift was cut", "I feel invisible.")
VARIABLE = "PERM_TEST_KEY"
SECRET = "sk-test-9f8e7d6c5b4a"


@pytest.fixture(autouse=True)
def no_key(monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


def config_for(server, **changes):
    settings = {
        "kind": "openai",
        "model": "tiny",
        "base_url": server.url,
        "api_key_variable": VARIABLE,
        "timeout_seconds": 20.0,
        "max_retries": 2,
    }
    return JudgeConfig(**settings | changes)


def ask(config, roles=("expression",), text="I hear you."):
    """The verdicts of several roles, asked at once."""

    async def ask_all():
        judge = OpenAIJudge(config)
        verdicts = await asyncio.gather(*(judge.judge(role, ANNA, text) for role in roles))
        await judge.close()
        return verdicts

    return asyncio.run(ask_all())


# --- verdicts ------------------------------------------------------------------------------------


def test_good_replies_become_scores(judge_server):
    def answer(exchange):
        is_bystander = "neutral third party" in exchange.body["messages"][0]["content"]
        exchange.say("Total: 83" if is_bystander else "It is tuned to her.\n**Score:** 4")

    judge_server.answer = answer
    verdicts = ask(config_for(judge_server), ROLES)
    assert [verdict.role for verdict in verdicts] == list(ROLES)
    assert [verdict.score for verdict in verdicts] == [4, 4, 4, 83]
    assert verdicts[0].reply == "It is tuned to her.\n**Score:** 4"
    assert {verdict.failure for verdict in verdicts} == {None}


def test_the_request_holds_the_settings_and_the_prompt(judge_server, monkeypatch):
    monkeypatch.setenv(VARIABLE, f" {SECRET}\n")
    config = config_for(judge_server, temperature=0.7, top_p=0.8, max_tokens=99)
    ask(config, ["reception"], "I hear you.")
    [exchange] = judge_server.exchanges
    assert exchange.path == "/v1/chat/completions"
    assert exchange.headers["authorization"] == f"Bearer {SECRET}"
    assert exchange.body == {
        "model": "tiny",
        "messages": judge_messages("reception", ANNA, "I hear you."),
        "temperature": 0.7,
        "top_p": 0.8,
        "max_tokens": 99,
    }


def test_a_server_of_ones_own_needs_no_key(judge_server, monkeypatch):
    """Without a key of our own the client would look for OPENAI_API_KEY and send it anywhere."""
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    [verdict] = ask(config_for(judge_server))
    assert verdict.score == 4
    assert SECRET not in str(judge_server.exchanges[0].headers)


def test_the_address_comes_from_the_setting_alone(judge_server, monkeypatch):
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:9/v1")
    assert ask(config_for(judge_server))[0].score == 4
    monkeypatch.setenv(VARIABLE, SECRET)
    judge = OpenAIJudge(config_for(judge_server, base_url=""))
    assert str(judge._client.base_url) == "https://api.openai.com/v1/"


@pytest.mark.parametrize("status", [500, 503, 429])
def test_failures_that_pass_are_tried_again(judge_server, status):
    def answer(exchange):
        if exchange.number <= 2:
            exchange.fail(status, "busy")
        else:
            exchange.say("Score: 5")

    judge_server.answer = answer
    [verdict] = ask(config_for(judge_server, max_retries=2))
    assert (verdict.score, verdict.failure) == (5, None)
    assert len(judge_server.exchanges) == 3


@pytest.mark.parametrize("status, attempts", [(500, 3), (429, 3), (401, 1), (404, 1), (400, 1)])
def test_failures_that_stay_are_named(judge_server, status, attempts):
    judge_server.answer = lambda exchange: exchange.fail(status, "no")
    [verdict] = ask(config_for(judge_server, max_retries=2))
    assert (verdict.score, verdict.failure) == (None, f"http {status}")
    assert len(judge_server.exchanges) == attempts


def test_a_server_that_hangs_is_a_timeout(judge_server):
    judge_server.answer = lambda exchange: judge_server.over.wait()
    [verdict] = ask(config_for(judge_server, timeout_seconds=0.2, max_retries=0))
    assert (verdict.score, verdict.failure) == (None, "timeout")


def test_a_call_that_hangs_is_tried_again(judge_server):
    def answer(exchange):
        if exchange.number == 1:
            judge_server.over.wait()
        exchange.say("Score: 4")

    judge_server.answer = answer
    [verdict] = ask(config_for(judge_server, timeout_seconds=1.0, max_retries=2))
    assert (verdict.score, len(judge_server.exchanges)) == (4, 2)


def test_a_reply_that_trickles_in_is_a_timeout(judge_server):
    """The client's limit starts anew with every byte. Without one of ours, this call would end well
    after a hundred times its limit, and with a score."""

    def answer(exchange):
        exchange.send_response(200)
        exchange.send_header("content-type", "application/json")
        exchange.send_header("transfer-encoding", "chunked")
        exchange.end_headers()
        for _ in range(100):
            exchange.wfile.write(b"1\r\n \r\n")
            exchange.wfile.flush()
            time.sleep(0.05)
        text = b'{"choices": [{"message": {"role": "assistant", "content": "Score: 4"}}]}'
        exchange.wfile.write(f"{len(text):x}\r\n".encode() + text + b"\r\n0\r\n\r\n")

    judge_server.answer = answer
    [verdict] = ask(config_for(judge_server, timeout_seconds=0.5, max_retries=0))
    assert (verdict.score, verdict.failure) == (None, "timeout")


def test_an_unreachable_port(judge_server):
    url = closed_port_url()
    [verdict] = ask(config_for(judge_server, base_url=url, max_retries=0))
    assert (verdict.score, verdict.failure) == (None, "connection")


@pytest.mark.parametrize(
    "body, content_type, failure",
    [
        ("<html>Welcome</html>", "text/html", "malformed reply"),
        ('{"choices": [{"mess', "application/json", "malformed reply"),
        ('{"choices": []}', "application/json", "malformed reply"),
        ('{"choices": null}', "application/json", "malformed reply"),
        ("[1, 2]", "application/json", "malformed reply"),
        ('{"choices": [{"message": {"content": null}}]}', "application/json", "empty reply"),
        ('{"choices": [{"message": {"content": " "}}]}', "application/json", "empty reply"),
        ('{"choices": [{"message": {"content": "Nice."}}]}', "application/json", "unparsable"),
        ('{"choices": [{"message": {"content": "Score: 9"}}]}', "application/json", "unparsable"),
    ],
)
def test_junk_is_never_a_score(judge_server, body, content_type, failure):
    judge_server.answer = lambda exchange: exchange.send(200, body, content_type)
    [verdict] = ask(config_for(judge_server))
    assert (verdict.score, verdict.failure) == (None, failure)


def test_an_unparsable_reply_is_kept(judge_server):
    judge_server.answer = lambda exchange: exchange.say("Nice.\nScore: 9")
    [verdict] = ask(config_for(judge_server))
    assert verdict.reply == "Nice.\nScore: 9"


@pytest.mark.parametrize(
    "role, reply, score",
    [
        ("bystander", "Total: 8", None),  # "Total: 83" was coming
        ("expression", "Score: 4", None),  # so was "Score: 4/10"
        ("expression", "It is tuned to", None),
        ("expression", "", None),  # a reasoning model that never came to its reply
        ("expression", "Score: 4\nThis is because the resp", 4),
        ("bystander", "Total: 83\n", 83),
    ],
)
def test_a_reply_that_was_cut_off_is_read_without_its_last_word(judge_server, role, reply, score):
    judge_server.answer = lambda exchange: exchange.say(reply, finish_reason="length")
    [verdict] = ask(config_for(judge_server), [role])
    assert (verdict.score, verdict.reply) == (score, reply)
    assert verdict.failure == ("cut off" if score is None else None)


def test_four_calls_are_in_flight_together(judge_server):
    """The server answers nobody before all four have asked."""
    all_asked = threading.Barrier(4, timeout=15)

    def answer(exchange):
        all_asked.wait()
        exchange.say("Score: 4")

    judge_server.answer = answer
    config = config_for(judge_server, timeout_seconds=30, max_retries=0)
    verdicts = ask(config, ["expression"] * 4)
    assert [verdict.score for verdict in verdicts] == [4] * 4


def test_no_more_calls_in_flight_than_allowed(judge_server):
    in_flight, most = 0, 0
    lock = threading.Lock()

    def answer(exchange):
        nonlocal in_flight, most
        with lock:
            in_flight += 1
            most = max(most, in_flight)
        time.sleep(0.05)
        with lock:
            in_flight -= 1
        exchange.say("Score: 4")

    judge_server.answer = answer
    verdicts = ask(config_for(judge_server, concurrency=2), ["expression"] * 6)
    assert [verdict.score for verdict in verdicts] == [4] * 6
    assert most == 2


def test_waiting_for_a_turn_is_not_counted_as_the_servers_time(judge_server):
    """Six calls of 0.3 s one after the other, each with a limit of 1.2 s: the last waits 1.5 s."""

    def answer(exchange):
        time.sleep(0.3)
        exchange.say("Score: 4")

    judge_server.answer = answer
    config = config_for(judge_server, concurrency=1, timeout_seconds=1.2, max_retries=0)
    assert [verdict.score for verdict in ask(config, ["expression"] * 6)] == [4] * 6


# --- the check before any work -------------------------------------------------------------------


def complaint(config):
    """The one line that making or checking a judge ends in; its traceback is free of the key."""
    with pytest.raises(ValueError) as caught:
        OpenAIJudge(config).check()
    printed = "".join(traceback.format_exception(caught.value))
    assert SECRET not in printed
    assert type(caught.value) is ValueError
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_check_passes_with_one_tiny_call(judge_server):
    judge_server.answer = lambda exchange: exchange.say("Hello!")
    OpenAIJudge(config_for(judge_server, max_tokens=1000)).check()
    [exchange] = judge_server.exchanges
    assert exchange.body["max_tokens"] <= 16
    assert exchange.body["temperature"] == 0.3 and exchange.body["top_p"] == 0.9


def test_check_passes_a_model_that_thinks_before_it_speaks(judge_server):
    """Sixteen tokens of reasoning leave no reply, which says nothing about whether it works."""
    judge_server.answer = lambda exchange: exchange.say(None, finish_reason="length")
    OpenAIJudge(config_for(judge_server)).check()


def test_without_key_and_address_no_judge_is_made():
    """Each process looks into its own environment, though only one of them calls `check`."""
    with pytest.raises(ValueError) as caught:
        OpenAIJudge(JudgeConfig(kind="openai"))
    assert str(caught.value) == (
        "judge.api_key_variable = OPENAI_API_KEY: the variable is not set; export it, or use "
        "--judge.kind lexical, or set judge.base_url for a server that needs no key"
    )


def test_check_of_an_unreachable_server():
    url = closed_port_url()
    message = complaint(JudgeConfig(kind="openai", base_url=url))
    assert message.startswith(f"judge.base_url = {url}: no server answers there; ")


def test_check_of_a_server_that_hangs(judge_server):
    judge_server.answer = lambda exchange: judge_server.over.wait()
    message = complaint(config_for(judge_server, timeout_seconds=0.2))
    assert message.startswith(f"judge.base_url = {judge_server.url}: no answer within 0.2 s; ")
    assert "judge.timeout_seconds" in message


@pytest.mark.parametrize("status", [401, 403])
def test_check_of_a_refused_key(judge_server, monkeypatch, status):
    judge_server.answer = lambda exchange: exchange.fail(status, f"Incorrect API key: {SECRET[:8]}")
    message = complaint(config_for(judge_server))
    assert message.startswith(f"judge.api_key_variable = {VARIABLE}: it is not set (http {status}")
    monkeypatch.setenv(VARIABLE, SECRET)
    message = complaint(config_for(judge_server))
    assert message.startswith(f"judge.api_key_variable = {VARIABLE}: its key is refused (http ")
    assert SECRET[:8] not in message


@pytest.mark.parametrize(
    "status, body",
    [
        (404, {"error": {"message": "The model `huge` does not exist.", "code": "not_found"}}),
        (400, {"error": {"message": "Unknown model"}}),
        (400, {"detail": "Server is pinned to 'tiny'; requested 'huge'."}),
    ],
)
def test_check_of_an_unknown_model(judge_server, status, body):
    judge_server.answer = lambda exchange: exchange.send(status, body)
    message = complaint(config_for(judge_server, model="huge"))
    assert message.startswith(f"judge.model = huge: {judge_server.url} does not take it (http ")
    assert "the server says: " in message


def test_check_of_a_wrong_path(judge_server):
    judge_server.answer = lambda exchange: exchange.send(404, {"detail": "Not Found"})
    message = complaint(config_for(judge_server))
    assert message.startswith(f"judge.base_url = {judge_server.url}: there are no chat completions")


def test_check_of_a_page_that_is_no_endpoint(judge_server):
    judge_server.answer = lambda exchange: exchange.send(200, "<html></html>", "text/html")
    message = complaint(config_for(judge_server))
    assert "what answers there is no chat completion (malformed reply)" in message


@pytest.mark.parametrize("status, setting", [(429, "api_key_variable"), (500, "base_url")])
def test_check_of_a_server_in_trouble(judge_server, status, setting):
    judge_server.answer = lambda exchange: exchange.fail(status, "Out of luck")
    message = complaint(config_for(judge_server))
    assert message.startswith(f"judge.{setting} = ") and f"http {status}" in message
    assert message.endswith("the server says: Out of luck")
    assert len(judge_server.exchanges) == 2, "one retry, so that a hiccup does not stop a run"


# --- the key -------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [200, 400, 401, 404, 409, 422, 429, 500])
def test_the_key_is_in_no_message_even_if_the_server_repeats_it(judge_server, monkeypatch, status):
    monkeypatch.setenv(VARIABLE, SECRET)

    def answer(exchange):
        header = exchange.headers["authorization"]
        assert SECRET in header
        exchange.send(status, {"error": {"message": f"model\n{header}", "code": header}})

    judge_server.answer = answer
    config = config_for(judge_server, max_retries=0)
    complaint(config)  # checks the whole traceback
    [verdict] = ask(config)
    judge = OpenAIJudge(config)
    assert judge._client.api_key == SECRET
    assert SECRET not in repr([verdict, config, judge, vars(judge), judge.label])


def test_a_key_in_a_reply_is_not_kept(judge_server, monkeypatch):
    """Replies are written to the rollout files."""
    monkeypatch.setenv(VARIABLE, SECRET)
    judge_server.answer = lambda exchange: exchange.say(f"{exchange.headers}\nScore: 4")
    [verdict] = ask(config_for(judge_server))
    assert verdict.score == 4 and "Bearer ***" in verdict.reply
    assert SECRET not in verdict.reply


@pytest.mark.parametrize("value", [f"{SECRET}\nX-Header: 1", f"{SECRET}ü", f"{SECRET}\x01"])
def test_a_value_that_no_header_takes_is_not_repeated(judge_server, monkeypatch, value):
    judge = OpenAIJudge(config_for(judge_server))
    monkeypatch.setenv(VARIABLE, value)
    message = complaint(config_for(judge_server))
    assert message.startswith(f"judge.api_key_variable = {VARIABLE}: the variable's value cannot")
    verdict = asyncio.run(judge.judge("expression", ANNA, "I hear you."))
    assert verdict.score is None and SECRET not in repr(verdict)
    assert not judge_server.exchanges


def closed_port_url():
    """An address on which nothing listens: a port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{probe.getsockname()[1]}/v1"

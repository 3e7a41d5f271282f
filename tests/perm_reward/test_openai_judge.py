"""OpenAIJudge over real HTTP, against a server on the loopback address."""

import asyncio
import json
import socket
import threading
import time
import traceback
from collections import Counter
from dataclasses import asdict

import pytest

from perm_reward.judges import JudgeConfig
from perm_reward.judges.openai import OpenAIJudge
from perm_reward.prompts import Seeker, judge_messages
from perm_reward.rubrics import ROLES
from perm_reward.verdict import Usage
from tests.perm_reward.conftest import completion

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
    assert exchange.body.pop("response_format")["type"] == "json_schema"
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
    assert str(judge.endpoints[0]._client.base_url) == "https://api.openai.com/v1/"


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


@pytest.mark.parametrize(
    "status, attempts",
    # A 400 or 404 may be a refusal of the JSON schema: it is asked once more, without one. So is a
    # 500, once it has come twice, but by the first attempt alone: it is no retry.
    [(500, 3 + 2), (503, 3), (408, 3), (409, 3), (401, 1), (403, 1), (404, 2), (400, 2)],
)
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
        ("[" * 100_000, "application/json", "malformed reply"),
        ('{"choices": [{"message": {"content": 4}}]}', "application/json", "malformed reply"),
        ('{"choices": ["Score: 4"]}', "application/json", "malformed reply"),
        ('{"choices": [{"message": {"content": null}}]}', "application/json", "empty reply"),
        ('{"choices": [{"message": {"content": " "}}]}', "application/json", "empty reply"),
        ('{"choices": [{"message": {"content": "Nice."}}]}', "application/json", "unparsable"),
        ('{"choices": [{"message": {"content": "Score: 9"}}]}', "application/json", "unparsable"),
    ],
)
def test_junk_is_never_a_score(judge_server, body, content_type, failure):
    judge_server.answer = lambda exchange: exchange.send(200, body, content_type)
    [verdict] = ask(config_for(judge_server, max_retries=1))
    assert (verdict.score, verdict.failure) == (None, failure)
    # What is no completion is asked for again; what a model said is not.
    assert len(judge_server.exchanges) == (2 if failure == "malformed reply" else 1)


def test_an_unparsable_reply_is_kept(judge_server):
    judge_server.answer = lambda exchange: exchange.say("Nice.\nScore: 9")
    [verdict] = ask(config_for(judge_server))
    assert verdict.reply == "Nice.\nScore: 9"


@pytest.mark.parametrize("finish_reason", ["length", "MAX_TOKENS", "model_length"])
@pytest.mark.parametrize(
    "role, reply",
    [
        ("bystander", "Total: 8"),  # "Total: 83" was coming
        ("expression", "Score: 4"),  # so was "Score: 4/10"
        ("expression", ""),  # a reasoning model that never came to its reply
        ("expression", "First, a score of 5 means exact. The reply is warm. Hmm, let me"),
        ("expression", "Score: 4\nThis is because the resp"),
        ("expression", '{"reason": "Warm.", "score": 4}'),
    ],
)
def test_a_reply_that_was_cut_off_is_no_verdict(judge_server, role, reply, finish_reason):
    """A model that thinks aloud names scores long before it comes to its own."""
    judge_server.answer = lambda exchange: exchange.say(reply, finish_reason=finish_reason)
    [verdict] = ask(config_for(judge_server), [role])
    assert (verdict.score, verdict.failure, verdict.reply) == (None, "cut off", reply)
    assert len(judge_server.exchanges) == 1


@pytest.mark.parametrize(
    "content, refusal, finish_reason, reply",
    [
        (None, "I can't help with that.", "stop", "I can't help with that."),
        ("Score: 4", "I can't help with that.", "stop", "Score: 4"),
        ("Score: 4", None, "content_filter", "Score: 4"),
        (None, None, "content_filter", ""),
    ],
)
def test_a_refusal_is_no_verdict(judge_server, content, refusal, finish_reason, reply):
    body = completion(content, finish_reason)
    body["choices"][0]["message"]["refusal"] = refusal
    judge_server.answer = lambda exchange: exchange.send(200, body)
    [verdict] = ask(config_for(judge_server))
    assert (verdict.score, verdict.failure, verdict.reply) == (None, "refused", reply)
    assert len(judge_server.exchanges) == 1


def in_the_answer(error):
    """Such an error with http 200, beside a reply that must not be read."""
    return {"id": "gen-1", "error": error} | completion("Score: 1", "stop")


def in_the_choice(error):
    body = completion("Score: 1", "error")
    body["choices"][0]["error"] = error
    return body


@pytest.mark.parametrize("put", [in_the_answer, in_the_choice])
@pytest.mark.parametrize(
    "error, attempts, failure",
    [
        ({"code": 429, "message": "Provider returned error"}, 4, None),
        ({"code": "rate_limit_exceeded", "message": "Slow down"}, 4, None),
        ({"code": 502, "message": "Bad gateway"}, 3, "http 502"),
        ({"code": "503", "message": "No provider"}, 3, "http 503"),
        ({"message": "Something"}, 3, "malformed reply"),
        ("Something", 3, "malformed reply"),
        ({"code": 402, "message": "Credits"}, 1, "http 402"),
        ({"code": 429, "type": "insufficient_quota"}, 1, "http 429"),
        ({"code": 400, "message": "maximum context length is 8 tokens"}, 1, "prompt too long"),
    ],
)
def test_an_error_with_http_200_is_treated_by_its_code(judge_server, put, error, attempts, failure):
    """Proxies have often sent their status when the error occurs. A limit is no retry."""

    def answer(exchange):
        if exchange.number <= 3:
            exchange.send(200, put(error))
        else:
            exchange.say("Score: 4")

    judge_server.answer = answer
    [verdict] = ask(config_for(judge_server, max_retries=2))
    assert (verdict.score, verdict.failure) == (4 if failure is None else None, failure)
    assert len(judge_server.exchanges) == attempts


def test_a_reply_beside_an_error_that_is_none_is_read(judge_server):
    body = completion("Score: 4", "stop") | {"error": None}
    judge_server.answer = lambda exchange: exchange.send(200, body)
    assert ask(config_for(judge_server))[0].score == 4


def test_four_calls_are_in_flight_together(judge_server):
    """Once a first call has found out the form, the server answers nobody before all four ask."""
    all_asked = threading.Barrier(4, timeout=15)

    def answer(exchange):
        if exchange.number > 1:
            all_asked.wait()
        exchange.say("Score: 4")

    judge_server.answer = answer
    config = config_for(judge_server, timeout_seconds=30, max_retries=0)
    verdicts = ask(config, ["expression"] * 5)
    assert [verdict.score for verdict in verdicts] == [4] * 5


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


def test_a_quota_that_is_used_up_is_no_rate_limit(judge_server):
    judge_server.answer = lambda exchange: exchange.fail(429, "no", code="insufficient_quota")
    [verdict] = ask(config_for(judge_server))
    assert (verdict.score, verdict.failure) == (None, "http 429")
    assert len(judge_server.exchanges) == 1


def test_what_a_verdict_was_asked_with(judge_server):
    config = config_for(judge_server, temperature=0.7, top_p=0.8, max_tokens=99)
    judge = OpenAIJudge(config, seed=7)
    asked = judge.asked("reception", ANNA, "I hear you.")
    assert asked == {
        "messages": judge_messages("reception", ANNA, "I hear you.", seed=7),
        "addresses": [judge_server.url],
        "model": "tiny",
        "temperature": 0.7,
        "top_p": 0.8,
        "max_tokens": 99,
    }
    assert json.loads(json.dumps(asked)) == asked
    assert asked != OpenAIJudge(config, seed=8).asked("reception", ANNA, "I hear you.")
    asyncio.run(judge.judge("reception", ANNA, "I hear you."))
    assert judge_server.exchanges[0].body["messages"] == asked["messages"]


def test_a_model_of_the_same_name_elsewhere_is_another_judge(monkeypatch):
    """In whatever order its endpoints are given, and whatever their keys."""
    for name in "ABC":
        monkeypatch.setenv(name, f"sk-{name}")

    def asked(base_url, api_key_variable="A"):
        where = {"base_url": base_url, "api_key_variable": api_key_variable}
        return OpenAIJudge(JudgeConfig(kind="openai", model="tiny", **where)).asked(
            "reception", ANNA, "I hear you."
        )

    one, other, both = "http://a/v1", "http://b/v1", "http://a/v1,http://b/v1"
    assert asked(one) != asked(other) and asked(one) != asked("")
    assert asked("") == asked("https://api.openai.com/v1")
    assert asked(one) == asked(one + "/") == asked(one, "A,B")
    assert asked(both, "A,B") == asked("http://b/v1, http://a/v1", "C")
    assert "sk-" not in json.dumps(asked(both, "A,B"))


def test_the_form_of_a_request_is_no_part_of_what_was_asked(judge_server):
    def answer(exchange):
        if "response_format" in exchange.body:
            exchange.fail(400, "response_format is not supported")
        else:
            exchange.say("Score: 4")

    judge_server.answer = answer
    judge = OpenAIJudge(config_for(judge_server))
    before = judge.asked("reception", ANNA, "I hear you.")
    assert asyncio.run(judge.judge("reception", ANNA, "I hear you.")).score == 4
    assert len(judge_server.exchanges) == 2, "another form was found out"
    assert judge.asked("reception", ANNA, "I hear you.") == before


def test_messages_are_written_when_their_call_has_its_turn(judge_server, monkeypatch):
    """A thousand calls may start at once. Writing all their messages then would hold up the loop
    for longer than the first of them may take."""
    written = []

    def counting(*arguments, **named):
        written.append(arguments)
        return judge_messages(*arguments, **named)

    monkeypatch.setattr("perm_reward.judges.openai.judge_messages", counting)

    async def start():
        judge = OpenAIJudge(config_for(judge_server, concurrency=2))
        calls = [asyncio.create_task(judge.judge("expression", ANNA, "Hi.")) for _ in range(9)]
        await asyncio.sleep(0)
        at_first = len(written)
        await asyncio.gather(*calls)
        await judge.close()
        return at_first

    assert asyncio.run(start()) <= 2
    assert len(written) == 9


# --- the form of requests, found out once --------------------------------------------------------


def without_schema(exchange, status=400, message="response_format is not supported"):
    """An endpoint that refuses JSON schemas."""
    if "response_format" in exchange.body:
        exchange.fail(status, message)
    else:
        exchange.say("Score: 4")


def test_the_schema_of_each_role(judge_server):
    judge_server.answer = lambda exchange: exchange.say("Score: 4")
    ask(config_for(judge_server), ["expression"])
    ask(config_for(judge_server), ["bystander"])
    schemas = [
        exchange.body["response_format"]["json_schema"] for exchange in judge_server.exchanges
    ]
    assert [schema["strict"] for schema in schemas] == [True, True]
    stage, bystander = (schema["schema"] for schema in schemas)
    assert list(stage["properties"]) == ["reason", "score"], "the reason first, the score follows"
    assert stage["properties"]["score"] == {"type": "integer", "enum": [1, 2, 3, 4, 5]}
    assert len(bystander["properties"]) == 5
    for part in bystander["properties"].values():
        assert part == {"type": "integer", "enum": list(range(21))}
    for schema in (stage, bystander):
        assert schema["required"] == list(schema["properties"])
        assert schema["additionalProperties"] is False


def test_replies_in_the_schemas_form_are_read(judge_server):
    def answer(exchange):
        schema = exchange.body["response_format"]["json_schema"]["schema"]
        names = list(schema["properties"])
        values = {name: 10 + i for i, name in enumerate(names)}
        if "score" in names:
            values = {"reason": "It is tuned to her, unlike a score of 2.", "score": 5}
        exchange.say(json.dumps(values))

    judge_server.answer = answer
    verdicts = ask(config_for(judge_server), ROLES)
    assert [verdict.score for verdict in verdicts] == [5, 5, 5, 10 + 11 + 12 + 13 + 14]


@pytest.mark.parametrize("status", [400, 404, 415, 422, 501])
def test_a_refused_schema_is_found_out_by_one_call(judge_server, status):
    """Eight calls start at once: one is refused, repeats in plain text, and all others know."""
    judge_server.answer = lambda exchange: without_schema(exchange, status)
    verdicts = ask(config_for(judge_server, max_retries=0), ["expression"] * 8)
    assert [verdict.score for verdict in verdicts] == [4] * 8
    refused = [
        exchange for exchange in judge_server.exchanges if "response_format" in exchange.body
    ]
    assert (len(refused), len(judge_server.exchanges)) == (1, 9)
    messages = [exchange.body["messages"] for exchange in judge_server.exchanges]
    assert messages == [messages[0]] * 9


def test_each_model_is_found_out_by_itself(judge_server):
    def answer(exchange):
        if exchange.body["model"] == "old":
            without_schema(exchange)
        else:
            exchange.say('{"reason": "Warm.", "score": 5}')

    judge_server.answer = answer

    async def ask_both():
        old = OpenAIJudge(config_for(judge_server, model="old"))
        new = OpenAIJudge(config_for(judge_server, model="new"), old.endpoints)
        scores = []
        for judge in (old, new, old, new):
            scores.append((await judge.judge("expression", ANNA, "I hear you.")).score)
        await old.close()
        return scores

    assert asyncio.run(ask_both()) == [4, 5, 4, 5]
    asked = [(e.body["model"], "response_format" in e.body) for e in judge_server.exchanges]
    assert asked == [("old", True), ("old", False), ("new", True), ("old", False), ("new", True)]


def test_an_accepted_schema_stays(judge_server):
    """A refusal later on is about that one text, and no reason to do without the schema."""

    def answer(exchange):
        if "too long" in str(exchange.body["messages"]):
            exchange.fail(400, "context length exceeded")
        else:
            exchange.say("Score: 4")

    judge_server.answer = answer

    async def ask_three():
        judge = OpenAIJudge(config_for(judge_server))
        texts = ["short", "too long", "short"]
        verdicts = [await judge.judge("expression", ANNA, text) for text in texts]
        await judge.close()
        return [verdict.failure for verdict in verdicts]

    assert asyncio.run(ask_three()) == [None, "prompt too long", None]
    assert ["response_format" in exchange.body for exchange in judge_server.exchanges] == [True] * 3


def test_a_refusal_that_says_nothing_of_the_form_is_not_remembered(judge_server):
    """The first text is refused with and without schema: nothing is known, the next call asks."""

    def answer(exchange):
        if exchange.number <= 2:
            exchange.fail(400, "This text will not do")
        else:
            exchange.say("Score: 4")

    judge_server.answer = answer

    async def ask_two():
        judge = OpenAIJudge(config_for(judge_server))
        verdicts = [await judge.judge("expression", ANNA, "I hear you.") for _ in range(2)]
        await judge.close()
        return [verdict.failure for verdict in verdicts]

    assert asyncio.run(ask_two()) == ["http 400", None]
    assert ["response_format" in e.body for e in judge_server.exchanges] == [True, False, True]


def test_a_prompt_that_is_too_long_is_asked_for_once(judge_server):
    """The words of servers for it name max_tokens, which has nothing to do with the form."""
    said = "'max_tokens' is too large: 99. This model's maximum context length is 8 tokens"
    judge_server.answer = lambda exchange: exchange.fail(400, said)
    [verdict] = ask(config_for(judge_server))
    assert (verdict.failure, len(judge_server.exchanges)) == ("prompt too long", 1)


def test_when_the_first_call_finds_out_nothing_the_others_go_on(judge_server):
    """The first attempt hangs; those who waited for it are not held up one after the other."""
    others_in_flight = threading.Barrier(3, timeout=15)

    def answer(exchange):
        if exchange.number == 1:
            judge_server.over.wait()
        others_in_flight.wait()
        exchange.say("Score: 4")

    judge_server.answer = answer
    config = config_for(judge_server, timeout_seconds=1.0, max_retries=0)
    verdicts = ask(config, ["expression"] * 4)
    assert sorted(str(verdict.failure) for verdict in verdicts) == ["None"] * 3 + ["timeout"]


MAX_TOKENS_REFUSED = "Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead."


def thinking_model(exchange):
    """Takes max_completion_tokens only, and refuses to begin with too few of them."""
    if "max_tokens" in exchange.body:
        exchange.fail(400, MAX_TOKENS_REFUSED, param="max_tokens")
    elif exchange.body["max_completion_tokens"] < 50:
        exchange.fail(400, "Could not finish: max_tokens was reached")
    else:
        exchange.say("Score: 4")


def test_another_name_for_the_longest_reply_is_found_out_once(judge_server):
    judge_server.answer = thinking_model
    verdicts = ask(config_for(judge_server, max_tokens=99), ["expression"] * 4)
    assert [verdict.score for verdict in verdicts] == [4] * 4
    bodies = [exchange.body for exchange in judge_server.exchanges]
    assert ["max_tokens" in body for body in bodies] == [True] + [False] * 4
    assert [body.get("max_completion_tokens") for body in bodies] == [None] + [99] * 4
    assert all("response_format" in body for body in bodies), "the schema was not what it refused"


def test_another_name_and_no_schema(judge_server):
    def answer(exchange):
        if "max_tokens" in exchange.body:
            exchange.fail(400, MAX_TOKENS_REFUSED)
        else:
            without_schema(exchange)

    judge_server.answer = answer
    verdicts = ask(config_for(judge_server), ["expression"] * 3)
    assert [verdict.score for verdict in verdicts] == [4] * 3
    assert len(judge_server.exchanges) == 2 + 3


def refusing(*parts):
    """An endpoint that refuses parts of requests: (whether a body holds it, how it is refused)."""

    def answer(exchange):
        for is_held, body in parts:
            if is_held(exchange.body):
                return exchange.send(400, body)
        exchange.say('{"reason": "Warm.", "score": 4}')

    return answer


def holds(name):
    return lambda body: name in body


def has_system(body):
    return [message["role"] for message in body["messages"]] != ["user"]


O1_TEMPERATURE = {
    "error": {
        "message": "Unsupported value: 'temperature' does not support 0.3 with this model. "
        "Only the default (1) value is supported.",
        "param": "temperature",
    }
}
O1_TOP_P = {
    "error": {"message": "Unsupported parameter: 'top_p' is not supported.", "param": "top_p"}
}
O1_LIMIT = {"error": {"message": MAX_TOKENS_REFUSED, "param": "max_tokens"}}
FASTAPI_TOP_P = {
    "detail": [
        {
            "loc": ["body", "top_p"],
            "msg": "Extra inputs are not permitted",
            "input": {"temperature": 0.3, "response_format": {}},
        }
    ]
}
BEHIND_A_PROXY = {
    "error": {"message": "Provider returned error", "metadata": {"raw": json.dumps(O1_TEMPERATURE)}}
}
OLLAMA_TEMPERATURE = {"error": "temperature is not supported by this model"}
GEMMA_SYSTEM = {"object": "error", "message": "System role not supported", "code": 400}
MISTRAL_SYSTEM = {"message": "Conversation roles must alternate user/assistant/user/assistant/..."}
O1_SYSTEM = {
    "error": {
        "message": "'messages[0].role' does not support 'system'",
        "param": "messages[0].role",
    }
}


@pytest.mark.parametrize(
    "refusals, left_out",
    [
        ([(holds("temperature"), O1_TEMPERATURE)], {"temperature"}),
        ([(holds("top_p"), O1_TOP_P)], {"top_p"}),
        ([(holds("top_p"), FASTAPI_TOP_P)], {"top_p"}),
        ([(holds("temperature"), BEHIND_A_PROXY)], {"temperature"}),
        ([(holds("temperature"), OLLAMA_TEMPERATURE)], {"temperature"}),
        (
            [
                (holds("max_tokens"), O1_LIMIT),
                (holds("temperature"), O1_TEMPERATURE),
                (holds("top_p"), O1_TOP_P),
            ],
            {"max_tokens", "temperature", "top_p"},
        ),
        ([(has_system, GEMMA_SYSTEM)], {"system"}),
        ([(has_system, MISTRAL_SYSTEM)], {"system"}),
        (
            [(has_system, O1_SYSTEM), (holds("temperature"), O1_TEMPERATURE)],
            {"system", "temperature"},
        ),
        ([(holds("response_format"), {"error": {"message": "Bad request"}})], {"response_format"}),
        (
            [
                (holds("temperature"), O1_TEMPERATURE),
                (holds("response_format"), {"error": {"message": "Bad request"}}),
            ],
            {"temperature", "response_format"},
        ),
    ],
)
def test_only_what_is_refused_is_left_out_and_found_out_once(judge_server, refusals, left_out):
    """One request for each refusal, then one for each verdict; and `check` finds out as much."""
    judge_server.answer = refusing(*refusals)
    verdicts = ask(config_for(judge_server, max_tokens=99), ["expression"] * 4)
    assert [verdict.score for verdict in verdicts] == [4] * 4
    assert len(judge_server.exchanges) == len(refusals) + 4
    system, user = judge_messages("expression", ANNA, "I hear you.")
    whole = {
        "messages": [system, user],
        "temperature": 0.3,
        "top_p": 0.9,
        "max_tokens": 99,
        "response_format": judge_server.exchanges[0].body["response_format"],
    }
    expected = {"model": "tiny"}
    expected |= {name: value for name, value in whole.items() if name not in left_out}
    if "max_tokens" in left_out:
        expected["max_completion_tokens"] = 99
    if "system" in left_out:
        text = f"{system['content']}\n\n{user['content']}"
        expected["messages"] = [{"role": "user", "content": text}]
    assert [e.body for e in judge_server.exchanges[len(refusals) :]] == [expected] * 4

    judge_server.exchanges.clear()
    judge = OpenAIJudge(config_for(judge_server, max_tokens=99))
    judge.check()
    assert len(judge_server.exchanges) == len(refusals) + 1
    assert asyncio.run(judge.judge("expression", ANNA, "I hear you.")).score == 4
    assert judge_server.exchanges[-1].body == expected
    assert len(judge_server.exchanges) == len(refusals) + 2


@pytest.mark.parametrize("names", [["temperature"], ["temperature", "top_p"], ["response_format"]])
def test_sampling_otherwise_than_asked_is_told_once(judge_server, caplog, names):
    errors = [{"error": {"message": f"{name} is not supported"}} for name in names]
    judge_server.answer = refusing(*zip(map(holds, names), errors, strict=True))
    assert [v.score for v in ask(config_for(judge_server), ["expression"] * 4)] == [4] * 4
    ways = " and ".join(set(names) & {"temperature", "top_p"} and names)
    told = (
        f"tiny at {judge_server.url} refuses {ways}: it is asked without, and samples as it likes"
    )
    assert caplog.messages == ([told] if ways else [])
    caplog.clear()
    OpenAIJudge(config_for(judge_server)).check()
    assert caplog.messages == ([told] if ways else [])


def test_a_value_that_is_out_of_range_is_not_left_out(judge_server):
    """The settings ask for it: to sample otherwise without a word would be worse than to stop."""
    said = "Invalid 'temperature': decimal above maximum value. Expected a value <= 2, but got 3."
    judge_server.answer = refusing(
        (lambda body: body.get("temperature", 0) > 2, {"error": {"message": said}})
    )
    config = config_for(judge_server, temperature=3)
    assert complaint(config).startswith("judge.temperature = 3: tiny at ")
    assert ask(config)[0].failure == "http 400"
    assert len(judge_server.exchanges) == 2


def crashing_over_schemas(exchange):
    if "response_format" in exchange.body:
        exchange.fail(500, "Internal Server Error")
    else:
        exchange.say("Score: 4")


def test_a_server_that_crashes_over_a_schema_is_found_out_by_one_call(judge_server):
    judge_server.answer = crashing_over_schemas
    verdicts = ask(config_for(judge_server, max_retries=0), ["expression"] * 4)
    assert [verdict.score for verdict in verdicts] == [4] * 4
    asked = ["response_format" in exchange.body for exchange in judge_server.exchanges]
    assert asked == [True] * 2 + [False] * 4


def test_check_of_a_server_that_crashes_over_a_schema(judge_server):
    judge_server.answer = crashing_over_schemas
    judge = OpenAIJudge(config_for(judge_server, max_retries=0))
    judge.check()
    assert asyncio.run(judge.judge("expression", ANNA, "I hear you.")).score == 4
    asked = ["response_format" in exchange.body for exchange in judge_server.exchanges]
    assert asked == [True] * 2 + [False] * 2


def test_one_crash_is_not_blamed_on_the_schema(judge_server):
    def answer(exchange):
        if exchange.number == 1:
            exchange.fail(500, "Internal Server Error")
        else:
            exchange.say("Score: 4")

    judge_server.answer = answer
    assert ask(config_for(judge_server, max_retries=0))[0].score == 4
    assert ["response_format" in e.body for e in judge_server.exchanges] == [True, True]


# --- what it cost --------------------------------------------------------------------------------


def answer_with_usage(usage, content="Score: 4"):
    reply = completion(content, "stop") | {"usage": usage}
    return lambda exchange: exchange.send(200, reply)


@pytest.mark.parametrize(
    "usage, counted",
    [
        ({"prompt_tokens": 900, "completion_tokens": 30, "total_tokens": 930}, Usage(900, 0, 30)),
        (
            {
                "prompt_tokens": 900,
                "prompt_tokens_details": {"cached_tokens": 768},
                "completion_tokens": 30,
            },
            Usage(900, 768, 30),
        ),
        ({"prompt_tokens": 900, "prompt_tokens_details": None}, Usage(900, 0, 0)),
        ({"prompt_tokens": "900", "completion_tokens": -3}, Usage()),
        ({"prompt_tokens": True, "completion_tokens": 1.5}, Usage()),
        ({"prompt_tokens": 5, "prompt_tokens_details": {"cached_tokens": [1]}}, Usage(5, 0, 0)),
        ([900], Usage()),
        (None, Usage()),
    ],
)
def test_usage_is_read(judge_server, usage, counted):
    judge_server.answer = answer_with_usage(usage)
    [verdict] = ask(config_for(judge_server))
    assert (verdict.score, verdict.usage) == (4, counted)


def test_usage_of_a_reply_without_a_score_is_kept(judge_server):
    judge_server.answer = answer_with_usage({"prompt_tokens": 9, "completion_tokens": 3}, "Nice.")
    [verdict] = ask(config_for(judge_server))
    assert (verdict.failure, verdict.usage) == ("unparsable", Usage(9, 0, 3))


def test_usage_of_all_attempts_is_added_up(judge_server):
    """An answer without choices was charged too, whether the call is tried again or fails."""
    empty = {"choices": [], "usage": {"prompt_tokens": 9, "completion_tokens": 1}}
    judge_server.answer = lambda exchange: exchange.send(200, empty)
    [verdict] = ask(config_for(judge_server, max_retries=2))
    assert (verdict.failure, verdict.usage) == ("malformed reply", Usage(27, 0, 3))


# --- several endpoints ---------------------------------------------------------------------------


def test_several_endpoints_are_asked_in_turn_each_with_its_key(judge_server, monkeypatch):
    monkeypatch.setenv("KEY_ONE", "sk-one-0001")
    monkeypatch.setenv("KEY_TWO", "sk-two-0002")
    config = config_for(judge_server, api_key_variable="KEY_ONE,KEY_TWO")
    verdicts = ask(config, ["expression"] * 10)
    assert [verdict.score for verdict in verdicts] == [4] * 10
    keys = Counter(exchange.headers["authorization"] for exchange in judge_server.exchanges)
    assert keys == {"Bearer sk-one-0001": 5, "Bearer sk-two-0002": 5}


def test_check_tries_each_endpoint(judge_server):
    closed = closed_port_url()
    config = config_for(judge_server, base_url=f"{judge_server.url},{closed}")
    message = complaint(config)
    assert message.startswith(f"judge.base_url = {closed}: no server answers there; ")
    assert len(judge_server.exchanges) == 1


def test_traffic_of_a_judge(judge_server):
    async def look():
        judge = OpenAIJudge(config_for(judge_server, concurrency=2))
        seen = []
        judge_server.answer = lambda exchange: judge_server.over.wait()
        calls = [
            asyncio.create_task(judge.judge("expression", ANNA, "I hear you.")) for _ in range(3)
        ]
        while judge.traffic.in_flight < 1:
            await asyncio.sleep(0.01)
        seen.append(asdict(judge.traffic))
        for call in calls:
            call.cancel()
        await asyncio.gather(*calls, return_exceptions=True)
        seen.append(asdict(judge.traffic))
        await judge.close()
        return seen

    during, after = asyncio.run(look())
    # One has its turn, and waits for what the first call finds out; one waits for a turn.
    assert during == {"waiting": 2, "in_flight": 1, "failing": 0, "done": 0}
    assert after == {"waiting": 0, "in_flight": 0, "failing": 0, "done": 3}


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


def test_check_sends_what_the_run_will_send(judge_server):
    judge_server.answer = lambda exchange: exchange.say("Hello!")
    judge = OpenAIJudge(config_for(judge_server, max_tokens=1000))
    judge.check()
    asyncio.run(judge.judge("expression", ANNA, "I hear you."))
    [checked, real] = [exchange.body for exchange in judge_server.exchanges]
    system, user = checked.pop("messages")
    assert [system, real.pop("messages")[0]] == judge_messages("expression", ANNA, "")[:1] * 2
    assert user["role"] == "user" and "The response to judge" in user["content"]
    assert checked == real and real["max_tokens"] == 1000 and "response_format" in real


def test_check_passes_a_model_that_says_too_much(judge_server):
    """One reply that was cut off does not say that others will be."""
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


@pytest.mark.parametrize("status, setting", [(429, "api_key_variable"), (503, "base_url")])
def test_check_of_a_server_in_trouble(judge_server, status, setting):
    judge_server.answer = lambda exchange: exchange.fail(status, "Out of luck")
    message = complaint(config_for(judge_server))
    assert message.startswith(f"judge.{setting} = ") and f"http {status}" in message
    assert message.endswith("the server says: Out of luck")
    assert len(judge_server.exchanges) == 2, "one retry, so that a hiccup does not stop a run"


@pytest.mark.parametrize(
    "status, body",
    [
        (400, {"error": {"message": "no", "param": "messages", "code": "context_length_exceeded"}}),
        (
            400,
            {
                "object": "error",
                "message": "This model's maximum context length is 512 tokens. However, you "
                "requested 1700 tokens (700 in the messages, 1000 in the completion).",
            },
        ),
        (400, {"error": {"message": "the request exceeds the available context size"}}),
        (200, {"error": {"code": 400, "message": "prompt is too long: 1700 tokens > 512"}}),
    ],
)
def test_check_of_a_model_whose_context_is_too_short(judge_server, status, body):
    judge_server.answer = lambda exchange: exchange.send(status, body)
    message = complaint(config_for(judge_server, max_tokens=1000))
    assert message.startswith(f"judge.model = tiny: its context at {judge_server.url} is too short")
    assert "judge.max_tokens = 1000 (http 400); serve it with a longer context, lower" in message
    assert len(judge_server.exchanges) == 1


@pytest.mark.parametrize("code, setting", [(429, "api_key_variable"), (502, "base_url")])
def test_check_of_a_proxy_that_answers_with_an_error(judge_server, code, setting):
    error = {"code": code, "message": "Provider returned error"}
    judge_server.answer = lambda exchange: exchange.send(200, {"error": error})
    message = complaint(config_for(judge_server))
    assert message.startswith(f"judge.{setting} = ") and f"http {code}" in message
    assert message.endswith("the server says: Provider returned error")


def test_check_of_a_model_that_thinks_first(judge_server):
    judge_server.answer = thinking_model
    OpenAIJudge(config_for(judge_server, max_tokens=99)).check()
    assert "max_tokens" not in judge_server.exchanges[-1].body


@pytest.mark.parametrize(
    "message, error, setting",
    [
        ("'temperature' does not support 0.3 with this model.", {}, "temperature = 0.3"),
        ("Unsupported value", {"param": "temperature"}, "temperature = 0.3"),
        ("Unsupported parameter: `top_p` for this model", {}, "top_p = 0.9"),
        ("max_tokens is too large: 1024", {}, "max_tokens = 1024"),
    ],
)
def test_check_of_a_model_that_takes_no_such_setting(judge_server, message, error, setting):
    judge_server.answer = lambda exchange: exchange.fail(400, message, **error)
    line = complaint(config_for(judge_server))
    assert line.startswith(f"judge.{setting}: tiny at {judge_server.url} does not take it (http ")
    assert line.endswith(f"the server says: {message}")


# --- the key -------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [200, 400, 401, 404, 409, 422, 500])
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
    [endpoint] = judge.endpoints
    assert endpoint._client.api_key == SECRET
    shown = [verdict, config, judge, vars(judge), judge.label, vars(endpoint)]
    assert SECRET not in repr(shown)


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

"""LocalJudge: a model in the same process, here the repository's tiny embedded policy."""

import asyncio
import json
import math
import random
import shutil
import threading
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, BloomConfig, BloomForCausalLM

from perm_reward.judges import JudgeConfig, local
from perm_reward.judges.local import LocalJudge
from perm_reward.prompts import Seeker, judge_messages
from perm_reward.rubrics import ROLES, RUBRICS
from tests.smollm2 import smollm2_folder
from tests.tiny import fresh_seed, patch_norms

MODEL = Path(__file__).parents[2] / "data" / "embedded_policy"
ANNA = Seeker("Anna, a nurse", "Her shift was cut", "I feel invisible.")
BEN = Seeker("Ben, 17", "He failed his exam", "My father does not talk to me.")
# The package's rubrics, shortened: these tests are about numbers, and forward passes take time.
SHORT = {
    role: replace(rubric, stance="Judge.", scale=rubric.scale[:2], reply_form="")
    for role, rubric in RUBRICS.items()
}
DIMENSIONS = ["Content effectiveness", "Structure and clarity"]


@pytest.fixture
def judge():
    judge = make()
    yield judge
    close(judge)


def close(judge):
    asyncio.run(asyncio.wait_for(judge.close(), 20))


def make(name=MODEL, **changes):
    """A judge that computes in float64: whatever differs then is no rounding."""
    judge = LocalJudge(JudgeConfig(kind="local", model=str(name), **changes), rubrics=SHORT)
    patch_norms(judge._reader._model.double())
    return judge


def ask(judge, calls):
    """The verdicts of all calls, asked at once; or what was raised instead."""

    async def ask_all():
        async with asyncio.timeout(120):  # a worker that has died answers nothing
            answers = (judge.judge(*call) for call in calls)
            return await asyncio.gather(*answers, return_exceptions=True)

    return asyncio.run(ask_all())


def many_calls(generator, count=24):
    words = "you feel unseen on that ward and he said nothing at all for days".split()
    calls = []
    for i in range(count):
        text = " ".join(generator.choices(words, k=generator.randint(1, 12)))
        calls.append((ROLES[i % 4], generator.choice([ANNA, BEN]), text))
    return calls


# --- verdicts ------------------------------------------------------------------------------------


def plain_expectation(judge, messages, label, numbers):
    """The slow way: text by text, a forward pass for each, digit by digit."""
    model, tokenizer = judge._reader._model, judge._reader._tokenizer
    chat = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    digits = [tokenizer.convert_tokens_to_ids(str(d)) for d in range(10)]

    @cache
    def next_digit(number):
        ids = tokenizer(f"{chat}{label}: {number}", add_special_tokens=False)["input_ids"]
        with torch.no_grad():
            return model(torch.tensor([ids])).logits[0, -1].double().softmax(-1)[digits]

    chances = {}
    for number in map(str, numbers):
        first, *second = (next_digit(number[:k])[int(d)] for k, d in enumerate(number))
        chances[int(number)] = first * math.prod(second) * (1 - next_digit(number).sum())
    return float(sum(n * p for n, p in chances.items()) / sum(chances.values()))


@pytest.mark.parametrize("role", ROLES)
def test_a_verdict_equals_plain_forward_passes(judge, role):
    [verdict] = ask(judge, [(role, ANNA, "I hear you.")])
    messages = judge_messages(role, ANNA, "I hear you.", rubrics=SHORT)
    labels = {name: range(21) for name in DIMENSIONS}
    if role != "bystander":
        labels = {"Score": range(1, 6)}
    expected = [plain_expectation(judge, messages, *item) for item in labels.items()]
    assert verdict.score == pytest.approx(sum(expected), abs=1e-9)
    lines = [f"{label}: {e:.2f} (" for label, e in zip(labels, expected, strict=True)]
    for line, said in zip(lines, verdict.reply.splitlines(), strict=False):
        assert said.startswith(line)
    if role == "bystander":
        assert verdict.reply.splitlines()[-1] == f"Total: {sum(expected):.2f}"


def test_many_calls_at_once_equal_each_by_itself(judge, monkeypatch):
    calls = many_calls(random.Random(fresh_seed()))
    alone = [ask(judge, [call])[0] for call in calls]
    sizes = watch_rows(judge, monkeypatch)
    together = ask(judge, calls)
    assert max(sizes) > 4 and sum(sizes) == len(calls)  # rows were shared, no call twice
    for call, one, other in zip(calls, alone, together, strict=True):
        assert (one.role, one.failure, one.usage) == (call[0], None, other.usage)
        assert one.score == pytest.approx(other.score, abs=1e-9)
    assert judge.traffic.done == 2 * len(calls)
    assert (judge.traffic.waiting, judge.traffic.in_flight) == (0, 0)


def test_the_same_call_gets_the_same_verdict(judge):
    [first], [second] = (ask(judge, [("expression", ANNA, "I hear you.")]) for _ in range(2))
    assert first == second


def test_what_determines_a_verdict_is_told(judge):
    judge._seed = 7
    asked = judge.asked("reception", ANNA, "I hear you.")
    messages = judge_messages("reception", ANNA, "I hear you.", rubrics=SHORT, seed=7)
    assert asked == {"judge": "local", "model": str(MODEL), "messages": messages}
    assert json.loads(json.dumps(asked)) == asked
    assert judge.label == f"local: {MODEL}"


# --- the worker ----------------------------------------------------------------------------------


def watch_rows(judge, monkeypatch):
    """The number of calls in each row that is read from now on."""
    read, sizes = judge._reader.read, []

    def watched(calls):
        sizes.append(len(calls))
        return read(calls)

    monkeypatch.setattr(judge._reader, "read", watched)
    return sizes


class StubReader:
    """Reads what the test says. Prompts are the calls' texts, one letter a token."""

    def __init__(self, answer):
        self.answer = answer
        self.rows = []
        self.threads = set()

    def prompt(self, messages):
        text = messages[-1]["content"].split("> ")[-1].split("\n")[0]
        if "unencodable" in text:
            raise UnicodeEncodeError("utf-8", text, 0, 1, "no")
        return tuple(map(ord, text))

    def own_tokens(self, role):
        return 1

    def is_too_long(self, role, prompt):
        return len(prompt) > 100

    def read(self, calls):
        texts = ["".join(map(chr, prompt)) for _, prompt in calls]
        self.rows.append(texts)
        self.threads.add(threading.current_thread().name)
        return [self.answer(text) for text in texts]


def score_of_four(text):
    return {"Score": {3: 0.2, 4: 0.2, 5: 0.2}}


@pytest.fixture
def stub(judge):
    judge._reader = StubReader(score_of_four)
    return judge._reader


def expression(texts):
    return [("expression", ANNA, text) for text in texts]


def test_the_expectation_becomes_the_score(judge, stub):
    stub.answer = lambda text: {"Score": {1: 0.0, 2: 0.05, 3: 0.0, 4: 0.1, 5: 0.05}}
    [verdict] = ask(judge, expression(["a"]))
    assert verdict.score == pytest.approx(3.75)
    assert verdict.reply == "Score: 3.75 (2: 25 %, 4: 50 %, 5: 25 %, on the scale: 20 %)"


def test_the_parts_of_a_bystander_are_summed(judge, stub):
    stub.answer = lambda text: {"Objectivity": {10: 0.5, 20: 0.5}, "Accuracy": {0: 0.25, 1: 0.75}}
    [verdict] = ask(judge, [("bystander", ANNA, "a")])
    assert verdict.score == 15.75
    assert verdict.reply.splitlines() == [
        "Objectivity: 15.00 (10: 50 %, 20: 50 %, on the scale: 100 %)",
        "Accuracy: 0.75 (0: 25 %, 1: 75 %, on the scale: 100 %)",
        "Total: 15.75",
    ]


def test_what_is_not_a_number_is_no_score(judge, stub):
    stub.answer = lambda text: {"Score": dict.fromkeys(range(1, 6), math.nan)}
    [verdict] = ask(judge, expression(["a"]))
    assert (verdict.score, verdict.failure) == (None, "not a number")


def test_a_prompt_that_does_not_fit_the_model_is_a_failure_of_its_own(judge, stub):
    short, long = ask(judge, expression(["a", "a" * 101]))
    assert (short.score, long.score, long.failure) == (4, None, "prompt too long")


def test_the_model_s_reach_counts_the_whole_prompt(judge):
    """2,048 positions: what is one token too long is not read from positions that are not there."""
    reader = judge._reader
    room = 2048 - len(reader._tokenizer("Score: 4")["input_ids"])
    assert not reader.is_too_long("expression", (1,) * room)
    assert reader.is_too_long("expression", (1,) * (room + 1))
    reader._model.config.sliding_window = 1000  # beyond a window a packed row would be wrong
    assert reader.is_too_long("expression", (1,) * 1000)


def test_one_call_that_fails_fails_alone(judge, stub, monkeypatch):
    monkeypatch.setattr(local, "ROW_TOKENS", 9)  # a row for each

    def answer(text):
        if text == "broken":
            raise RuntimeError("out of memory")
        return score_of_four(text)

    stub.answer = answer
    outcomes = ask(judge, expression(["a good one", "unencodable", "broken", "another"]))
    assert [type(o).__name__ for o in outcomes] == [
        "Verdict",
        "UnicodeEncodeError",
        "RuntimeError",
        "Verdict",
    ]
    [after] = ask(judge, expression(["and the next"]))
    assert after.score == 4
    assert judge.traffic.done == 5 and judge.traffic.in_flight == 0


def test_what_comes_while_the_model_is_busy_is_the_next_batch(judge, stub):
    """One thread runs the model; calls that wait are taken together, `concurrency` at most."""
    judge._config = JudgeConfig(kind="local", model=str(MODEL), concurrency=5)
    is_busy, go_on = threading.Event(), threading.Event()

    def answer(text):
        if text == "first":
            is_busy.set()
            assert go_on.wait(20)
        return score_of_four(text)

    stub.answer = answer

    async def ask_all():
        first = asyncio.create_task(judge.judge("expression", ANNA, "first"))
        while not is_busy.is_set():
            await asyncio.sleep(0.01)
        later = [asyncio.create_task(judge.judge("expression", ANNA, f"{i}")) for i in range(12)]
        while judge.traffic.waiting < len(later):
            await asyncio.sleep(0.01)
        assert (judge.traffic.in_flight, judge.traffic.waiting) == (1, 12)
        dropped = later.pop(2)
        dropped.cancel()
        await asyncio.wait([dropped])
        go_on.set()
        return await asyncio.gather(first, *later)

    verdicts = asyncio.run(ask_all())
    assert [verdict.score for verdict in verdicts] == pytest.approx([4] * 12)
    # The one that was cancelled is not read.
    assert stub.rows == [
        ["first"],
        ["0", "1", "3", "4"],
        ["5", "6", "7", "8", "9"],
        ["10", "11"],
    ]
    assert stub.threads == {"local-judge"}


def test_a_call_given_up_while_it_is_read_does_no_harm(judge, stub):
    """Its result has nowhere to go, and the worker must live on."""
    is_busy, go_on = threading.Event(), threading.Event()

    def answer(text):
        is_busy.set()
        assert go_on.wait(20)
        return score_of_four(text)

    stub.answer = answer

    async def run():
        given_up = asyncio.create_task(judge.judge("expression", ANNA, "a"))
        while not is_busy.is_set():
            await asyncio.sleep(0.01)
        given_up.cancel()
        await asyncio.wait([given_up])
        go_on.set()
        async with asyncio.timeout(20):
            return await judge.judge("expression", ANNA, "b")

    assert asyncio.run(run()).score == 4
    assert stub.rows == [["a"], ["b"]]


def test_closing_cancels_what_waits_and_ends_the_thread(judge, stub, monkeypatch):
    """What waits is in the queue (c), or in the same batch as what is read (b, behind a)."""
    monkeypatch.setattr(local, "ROW_TOKENS", 2)  # a row for each
    reached, go_on = ({text: threading.Event() for text in ("first", "a")} for _ in range(2))

    def answer(text):
        reached[text].set()
        assert go_on[text].wait(20)
        return score_of_four(text)

    stub.answer = answer

    async def until(condition):
        while not condition():
            await asyncio.sleep(0.01)

    async def run():
        def start(text):
            return asyncio.create_task(judge.judge("expression", ANNA, text))

        async with asyncio.timeout(20):
            calls = [start("first")]
            await until(reached["first"].is_set)
            calls += [start("a"), start("b")]
            await until(lambda: judge.traffic.waiting == 2)
            go_on["first"].set()
            await until(reached["a"].is_set)
            calls.append(start("c"))
            await until(lambda: judge.traffic.waiting == 1)
            closing = asyncio.create_task(judge.close())
            await asyncio.sleep(0.05)
            go_on["a"].set()
            await closing
            return await asyncio.gather(*calls, return_exceptions=True)

    first, a, *waiting = asyncio.run(run())
    assert (first.score, a.score) == (4, 4)
    assert [type(outcome) for outcome in waiting] == [asyncio.CancelledError] * 2
    judge._worker.join(20)
    assert not judge._worker.is_alive()
    assert stub.rows == [["first"], ["a"]]


def test_a_judge_that_was_never_asked_closes():
    close(make())


def test_nothing_of_the_process_is_changed(judge):
    before = torch.get_default_dtype(), torch.get_num_threads(), torch.is_grad_enabled()
    ask(judge, [("expression", ANNA, "I hear you.")])
    assert before == (torch.get_default_dtype(), torch.get_num_threads(), torch.is_grad_enabled())


# --- models that cannot judge --------------------------------------------------------------------


def refusal(name):
    with pytest.raises(ValueError) as caught:
        LocalJudge(JudgeConfig(kind="local", model=str(name)))
    message = str(caught.value)
    assert message.startswith(f"judge.model = {name}: ") and "; " in message
    assert "\n" not in message
    return message


def test_no_such_model(tmp_path):
    assert "no such folder" in refusal(tmp_path / "nothing" / "here")
    assert "the folder cannot be loaded" in refusal(tmp_path)


def test_no_chat_template(tmp_path):
    shutil.copytree(MODEL, tmp_path / "model")
    (tmp_path / "model" / "chat_template.jinja").unlink()
    assert "has no chat template" in refusal(tmp_path / "model")


def test_a_chat_template_without_system_messages(tmp_path):
    shutil.copytree(MODEL, tmp_path / "model")
    template = "{{ raise_exception('no\nsystem') if messages[0]['role'] == 'system' }}"
    (tmp_path / "model" / "chat_template.jinja").write_text(template)
    assert "chat template refuses the prompt (no)" in refusal(tmp_path / "model")


def test_a_chat_template_that_grows_together_with_the_score(tmp_path):
    """A blank at its end becomes part of the next word's token."""
    shutil.copytree(MODEL, tmp_path / "model")
    template = "{{ messages[0]['content'] }} "
    (tmp_path / "model" / "chat_template.jinja").write_text(template)
    message = refusal(tmp_path / "model")
    assert "its tokenizer cannot be read for scores" in message


def test_a_model_whose_mask_cannot_be_given(tmp_path):
    shutil.copytree(MODEL, tmp_path / "model")
    config = BloomConfig(vocab_size=4096, hidden_size=64, n_layer=2, n_head=4)
    BloomForCausalLM(config).save_pretrained(tmp_path / "model")
    assert "takes no mask or positions" in refusal(tmp_path / "model")


# --- a real model --------------------------------------------------------------------------------


@pytest.mark.real
def test_bfloat16_of_a_real_model_blurs_less_than_a_judge_tells_apart():
    """What shares a row changes the rounding, in bfloat16 by a seventh of what texts differ."""
    judge = LocalJudge(JudgeConfig(kind="local", model=smollm2_folder()))
    texts = [
        "It sounds as if the shift was the one place where you were seen. What did you need?",
        "Everything happens for a reason.",
        "",
    ]
    calls = [(role, ANNA, text) for role in ("expression", "bystander") for text in texts]
    alone = [ask(judge, [call])[0].score for call in calls]
    together = [verdict.score for verdict in ask(judge, calls)]
    close(judge)
    for one, other in ((alone[:3], together[:3]), (alone[3:], together[3:])):
        blur = max(abs(a - b) for a, b in zip(one, other, strict=True))
        print(one, other, blur)
        assert blur < 0.5 * (max(one) - min(one))


def test_the_tokenizer_of_these_tests_writes_digit_by_digit():
    """Or `plain_expectation` would be no check."""
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    assert [len(tokenizer(f"{n}")["input_ids"]) for n in (4, 17)] == [1, 2]

"""LocalJudge: a model in the same process, here the repository's tiny embedded policy."""

import asyncio
import json
import math
import random
import shutil
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


@pytest.fixture(autouse=True)
def any_mass_will_do(request, monkeypatch):
    """The repository's tiny policy is no judge: it leaves little to the numbers."""
    if not request.node.get_closest_marker("real"):
        monkeypatch.setattr(local, "LEAST_ON_SCALE", 0.0)


@pytest.fixture
def judge():
    judge = exact(make())
    yield judge
    close(judge)


def close(judge):
    asyncio.run(asyncio.wait_for(judge.close(), 20))


def make(name=MODEL):
    return LocalJudge(JudgeConfig(kind="local", model=str(name)), rubrics=SHORT)


def exact(judge):
    """Let it compute in float64: whatever differs then is no rounding."""
    patch_norms(judge._reader._model.double())
    return judge


def ask(judge, calls):
    """The verdicts of all calls, asked at once; or what was raised instead."""

    async def ask_all():
        async with asyncio.timeout(120):  # a worker that has died answers nothing
            answers = (judge.judge(*call) for call in calls)
            return await asyncio.gather(*answers, return_exceptions=True)

    return asyncio.run(ask_all())


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


def many_calls(generator, count=12):
    words = "you feel unseen on that ward and he said nothing at all for days".split()
    calls = []
    for i in range(count):
        text = " ".join(generator.choices(words, k=generator.randint(1, 12)))
        calls.append((ROLES[i % 4], generator.choice([ANNA, BEN]), text))
    return calls


def test_a_verdict_hangs_on_its_call_alone_to_the_bit():
    """In bfloat16, where calls that shared a row would change each other's rounding.

    Alone, among many, in another order, and from a judge whose roles are asked in another order.
    """
    generator = random.Random(fresh_seed())
    calls = many_calls(generator)
    order = generator.sample(range(len(calls)), len(calls))
    judge, another = make(), make()
    assert judge._reader._model.dtype == torch.bfloat16
    alone = [ask(judge, [call])[0] for call in calls]
    assert [(v.role, v.failure) for v in alone] == [(call[0], None) for call in calls]
    assert len({verdict.score for verdict in alone}) == len(calls)  # they could be told apart
    assert ask(judge, calls) == alone
    for one in (judge, another):
        assert ask(one, [calls[i] for i in order]) == [alone[i] for i in order]
    assert judge.traffic.done == 3 * len(calls)
    assert (judge.traffic.waiting, judge.traffic.in_flight) == (0, 0)
    close(judge)
    close(another)


def test_what_the_prompts_of_a_role_share_is_computed_once(judge, monkeypatch):
    model, rows = judge._reader._model, []
    forward = model.forward

    def watched(**inputs):
        rows.append(inputs["input_ids"][0].tolist())
        return forward(**inputs)

    monkeypatch.setattr(model, "forward", watched)
    calls = [("reception", ANNA, "I hear you."), ("reception", BEN, "No.")]
    ask(judge, calls)
    prefix, *rest = rows
    assert SHORT["reception"].scale[-1] in judge._reader._tokenizer.decode(prefix)
    for call, row in zip(calls, rest, strict=True):
        prompt = list(judge._reader.prompt(judge_messages(*call, rubrics=SHORT)))
        own = prompt[len(prefix) :]
        assert (prompt[: len(prefix)], row[: len(own)]) == (prefix, own)


def test_what_determines_a_verdict_is_told(judge):
    judge._seed = 7
    asked = judge.asked("reception", ANNA, "I hear you.")
    messages = judge_messages("reception", ANNA, "I hear you.", rubrics=SHORT, seed=7)
    assert asked == {"judge": "local", "model": str(MODEL), "messages": messages}
    assert json.loads(json.dumps(asked)) == asked
    assert judge.label == f"local: {MODEL}"


def test_the_tokenizer_of_these_tests_writes_digit_by_digit():
    """Or `plain_expectation` would be no check."""
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    assert [len(tokenizer(f"{n}")["input_ids"]) for n in (4, 17)] == [1, 2]


# --- the model ---------------------------------------------------------------------------------


def test_the_model_s_reach_counts_the_whole_prompt(judge):
    """2,048 positions: what is one token too long is not read from positions that are not there."""
    reader = judge._reader
    room = 2048 - len(reader._tokenizer("Score: 4")["input_ids"])
    assert not reader.is_too_long("expression", (1,) * room)
    assert reader.is_too_long("expression", (1,) * (room + 1))
    reader._model.config.sliding_window = 1000  # beyond a window a packed row would be wrong
    assert reader.is_too_long("expression", (1,) * 1000)


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
    assert "takes no mask, positions or cache" in refusal(tmp_path / "model")


# --- a real model --------------------------------------------------------------------------------


@pytest.mark.real
def test_bfloat16_of_a_real_model_blurs_less_than_a_judge_tells_apart():
    """And blurs alike whatever else is asked."""
    folder = smollm2_folder()
    texts = [
        "It sounds as if the shift was the one place where you were seen. What did you need?",
        "Everything happens for a reason.",
        "",
    ]
    calls = [(role, ANNA, text) for role in ("expression", "bystander") for text in texts]
    judge, reference = (LocalJudge(JudgeConfig(kind="local", model=folder)) for _ in range(2))
    reference._reader._model.float()
    alone = [ask(judge, [call])[0] for call in calls]
    assert ask(judge, calls) == alone
    assert [verdict.failure for verdict in alone] == [None] * 6  # all are on the scale
    scores, exact_scores = ([v.score for v in vs] for vs in (alone, ask(reference, calls)))
    for one in (judge, reference):
        close(one)
    for role in (slice(3), slice(3, 6)):
        true = exact_scores[role]
        blur = max(abs(a - b) for a, b in zip(scores[role], true, strict=True))
        print(scores[role], true, blur)
        assert blur < 0.5 * (max(true) - min(true))

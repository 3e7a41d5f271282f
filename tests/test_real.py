"""A real model and a real judge server: SmolLM2-135M-Instruct on both sides, over HTTP.

`pytest -m real` runs it, in minutes. The judge is too small to score well, or at all. What counts
is that nothing breaks, and that a verdict which it fails to give is counted and never invented.
"""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import data
from grpo.generation import generate_groups
from grpo.policy import stop_ids
from grpo.rollout import Completion, Group, read_groups
from grpo.sampling import Sampling
from perm_reward import Seeker, policy_messages
from perm_reward.aggregate import perm_reward
from perm_reward.rubrics import ROLES
from perm_reward.verdict import parse_bystander, parse_score
from perm_reward.verdict_store import read_verdicts
from tests.smollm2 import smollm2_folder

pytestmark = pytest.mark.real

ROOT = Path(__file__).parents[1]
STEPS, GROUP_SIZE, HELDOUT_RECORDS = 5, 4, 4
# One thread each: server and trainer share two cores, and wait for each other in turn.
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_DISABLE_UPDATE_CHECK": "1"}
ENVIRONMENT.pop("OPENAI_API_KEY", None)  # this server asks for none


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Beside other work, two threads that wait for each other take ten times as long."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def folder() -> str:
    return smollm2_folder()


@pytest.fixture(scope="module")
def smollm2(folder):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(folder)


def encode(tokenizer, messages: list[dict[str, str]]) -> list[int]:
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)


def greedy(model, prompt: list[int], tokens: int) -> list[int]:
    """What `model.generate` gives, with PyTorch's own attention."""
    model.set_attn_implementation("sdpa")
    ids = torch.tensor([prompt])
    output = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False
    )
    return output[0, len(prompt) :].tolist()


def test_the_model_is_the_one_that_talks_sense(smollm2) -> None:
    """A GGUF file that is read wrongly (permuted heads, another tokenizer) talks nonsense."""
    model, tokenizer = smollm2
    question = [{"role": "user", "content": "What is the capital of France?"}]
    answer = greedy(model, encode(tokenizer, question), 20)
    assert "Paris" in tokenizer.decode(answer)
    end_of_turn = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert answer[-1] == end_of_turn and stop_ids(model, tokenizer) == [end_of_turn]


def test_greedy_equals_generate_token_for_token(smollm2) -> None:
    model, tokenizer = smollm2
    record = data.load_records("bundled")[0]
    conversations = [
        [{"role": "user", "content": "Hi!"}],
        policy_messages(Seeker(record.persona, record.scenario, record.query)),
        [{"role": "user", "content": "I failed my exam today and I feel awful. What can I do?"}],
        [
            {"role": "system", "content": "You are a poet."},
            {"role": "user", "content": "Write two lines on rain."},
            {"role": "assistant", "content": "Rain taps the roof,\na quiet proof."},
            {"role": "user", "content": "And two on snow?"},
        ],
    ]
    prompts = [encode(tokenizer, messages) for messages in conversations]
    expected = [greedy(model, prompt, 40) for prompt in prompts]
    groups = generate_groups(
        model,
        prompts,
        group_size=2,
        max_new_tokens=40,
        sampling=Sampling(temperature=0),
        stop_ids=stop_ids(model, tokenizer),
    )
    for group, tokens in zip(groups, expected, strict=True):
        assert [completion.token_ids for completion in group] == [tokens, tokens]


# --- training against a judge server -------------------------------------------------------------


@contextmanager
def judge_server(folder: str, log: Path) -> Iterator[str]:
    """The address of `transformers serve` with this one model; it is gone when the block is left.

    It answers many requests at once (continuous batching), in little memory (a cache of 800 · 16
    tokens), and computes the part that prompts have in common once (blocks of 16 tokens).
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    where = ["--host", "127.0.0.1", "--port", str(port), "--device", "cpu", "--dtype", "bfloat16"]
    batching = ["--continuous-batching", "--cb-block-size", "16", "--cb-num-blocks", "800"]
    command = [sys.executable, "-m", "transformers.cli.transformers", "serve", folder]
    with log.open("w") as file:
        server = subprocess.Popen(
            [*command, *where, *batching, "--cb-max-batch-tokens", "256"],
            env=ENVIRONMENT,
            stdout=file,
            stderr=subprocess.STDOUT,
        )
    try:
        while not is_healthy(port):
            assert server.poll() is None, f"transformers serve ended:\n{log.read_text()}"
            time.sleep(0.5)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        server.kill()
        server.wait()


def is_healthy(port: int) -> bool:
    """Whether the server answers, which it does once its model is loaded."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5) as answer:
            return answer.status == 200
    except OSError:
        return False


def train(folder: str, address: str, output: Path) -> None:
    """Five updates of one prompt."""
    settings = {
        "policy.model": folder,
        "policy.device": "cpu",
        "judge.kind": "openai",
        "judge.base_url": address,
        "judge.model": folder,
        "judge.max_tokens": 48,
        "judge.concurrency": 16,
        "judge.timeout_seconds": 600,
        # SmolLM2 as it comes hardly ever keeps to the form; so the judge is asked all the same.
        "perm.format_failure": "judge",
        # Nor does it as a judge: most of its replies are cut off, which would stop the run.
        "train.max_unscored": 1.0,
        "data.heldout_records": HELDOUT_RECORDS,
        "rollout.max_completion_tokens": 32,
        "grpo.group_size": GROUP_SIZE,
        "grpo.prompts_per_step": 1,
        "train.steps": STEPS,
        "output": output,
    }
    command = [sys.executable, "train.py", "--preset", "smollm2-135m"]
    for name, value in settings.items():
        command += [f"--{name}", str(value)]
    subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, check=True)


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def parse(role: str, text: str) -> int | None:
    return parse_bystander(text) if role == "bystander" else parse_score(text)


def check_verdict(role: str, score: float | None, reply: str, failure: str | None) -> None:
    """A score is what the reply says. One that was cut off has none, whatever it seems to say."""
    if score is not None:
        assert failure is None and score == parse(role, reply)
    elif failure == "unparsable":
        assert parse(role, reply) is None
    else:
        assert failure == "cut off" or (failure and not reply)


def check_completion(completion: Completion) -> None:
    """The reward is made of the four scores; where one is missing, there is no reward."""
    verdicts = completion.details["verdicts"]
    assert sorted(verdicts) == sorted(ROLES)
    for role, verdict in verdicts.items():
        check_verdict(role, **verdict)
    scores = [verdicts[role]["score"] for role in ROLES]
    if None in scores:
        assert completion.reward is None and completion.advantage == 0
    else:
        expected = perm_reward(*scores, len(completion.token_ids)).total
        assert completion.reward == pytest.approx(expected, rel=1e-12)


def check_groups(groups: list[Group], metrics: dict) -> None:
    completions = [completion for group in groups for completion in group.completions]
    for completion in completions:
        check_completion(completion)
    assert metrics["unscored"] == sum(completion.reward is None for completion in completions)


def has_spread(group: Group) -> bool:
    return len({c.reward for c in group.completions if c.reward is not None}) > 1


def load_weights(folder: str | Path) -> dict[str, torch.Tensor]:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).state_dict()


def test_five_updates_with_a_judge_behind_http(folder, tmp_path) -> None:
    output, log = tmp_path / "run", tmp_path / "server.log"
    with judge_server(folder, log) as address:
        train(folder, address, output)

    metrics = read_lines(output / "metrics.jsonl")
    assert [line["step"] for line in metrics] == [1, 2, 3, 4, 5]
    learned = False
    for line in metrics:
        groups = list(read_groups(output / "rollouts.jsonl", line["step"]))
        assert [len(group.completions) for group in groups] == [GROUP_SIZE]
        check_groups(groups, line)
        learned = learned or has_spread(groups[0])
        assert learned or line["gradient_norm"] == 0  # nothing to compare, nothing learned
    evaluations = read_lines(output / "evaluations.jsonl")
    assert [line["step"] for line in evaluations] == [0, STEPS]
    for line in evaluations:
        groups = list(read_groups(output / "heldout.jsonl", line["step"]))
        assert [len(group.completions) for group in groups] == [1] * HELDOUT_RECORDS
        check_groups(groups, line)
    before, after = load_weights(folder), load_weights(output / "policy")
    assert learned != all(torch.equal(after[name], before[name]) for name in before)

    verdicts = [
        verdict
        for name in ("rollouts.jsonl", "heldout.jsonl")
        for group in read_groups(output / name)
        for completion in group.completions
        for verdict in completion.details["verdicts"].values()
    ]
    replies = sum(bool(verdict["reply"]) for verdict in verdicts)
    print(Counter(verdict["failure"] or "given" for verdict in verdicts))
    assert replies > 0
    # The judge that is tried before the work starts is one more.
    answered = log.read_text().count('"POST /v1/chat/completions HTTP/1.1" 200')
    kept = [row.verdict for row in read_verdicts(output)]  # equal calls are made once
    assert answered >= sum(bool(verdict.reply) for verdict in kept) + 1
    assert {verdict["reply"] for verdict in verdicts} == {verdict.reply for verdict in kept}

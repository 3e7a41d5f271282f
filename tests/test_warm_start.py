"""Warm start: what is learned (a completion, its stop token, nothing else), how, what is saved."""

import filecmp
import itertools
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import train
import warm_start
from data import load_records
from data.demonstrations import demonstrate
from data.tiny_policy import (
    END_OF_TEXT,
    END_OF_TURN,
    SHARPENING,
    VOCABULARY_SIZE,
    train_tokenizer,
)
from grpo.config import ConfigError, TrainConfig
from grpo.parallel import Ranks, start_ranks
from grpo.policy import load_policy, load_tokenizer
from grpo.prompts import make_prompts
from grpo.rollout import Completion
from grpo.sampling import Sampling
from grpo.sharding import give_memory, shard
from tests.tiny import fresh_seed

CPU = torch.device("cpu")
PEAK = 1e-2


@pytest.fixture(autouse=True)
def one_thread():
    """On matrices this small, threads wait for one another longer than they compute."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def without_torchrun(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)


@pytest.fixture(scope="module")
def records():
    return load_records("bundled")[:6]


@pytest.fixture(scope="module")
def start(records, tmp_path_factory):
    """The folder of a tiny policy with random weights, saved as most are: its tokenizer begins
    every text with a token that the chat template writes too, its generation config stops at the
    end of the text, its tokenizer at the end of a turn."""
    folder = tmp_path_factory.mktemp("start")
    texts = [m["content"] for record in records for m in warm_start.messages_of(record)]
    tokenizer = train_tokenizer(texts + [demonstrate(record) for record in records])
    tokenizer.chat_template = END_OF_TEXT + tokenizer.chat_template
    end_of_turn, end_of_text = tokenizer.convert_tokens_to_ids([END_OF_TURN, END_OF_TEXT])
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{END_OF_TEXT} $A", special_tokens=[(END_OF_TEXT, end_of_text)]
    )
    torch.manual_seed(fresh_seed())
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY_SIZE,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=2048,
            initializer_range=0.05,
            bos_token_id=None,
            eos_token_id=end_of_text,
            pad_token_id=end_of_text,
        )
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def policy(start):
    """With weights, as if sharded already."""
    policy = load_policy(str(start), CPU)
    give_memory(policy.model, CPU)
    policy.weights.fill(policy.model)
    return policy


@pytest.fixture(scope="module")
def records_file(records, tmp_path_factory):
    path = tmp_path_factory.mktemp("records") / "records.jsonl"
    path.write_text("\n".join(map(as_line, records)), encoding="utf-8")
    return path


def as_line(record):
    return json.dumps(
        {
            "persona": {"identity": record.persona},
            "scenario": record.scenario,
            "dialogue": [record.query],
            "emotion": record.emotion,
        }
    )


def separate_loss(model, group):
    """The loss by its definition: each completion behind its own copy of the prompt."""
    prompt, completions = group
    loss = torch.zeros(())
    for tokens in completions:
        logits = model(torch.tensor([[*prompt, *tokens]])).logits[0, len(prompt) - 1 : -1]
        loss = loss + F.cross_entropy(logits, torch.tensor(tokens), reduction="sum")
    return loss


# --- what is learned -----------------------------------------------------------------------------


def test_the_loss_covers_the_completion_and_its_stop_token_and_nothing_else(records, policy):
    """Without the stop token in the loss a policy never learns to end: every completion runs on to
    the length limit. With the prompt in it, it learns to write seekers' messages."""
    group = next(warm_start.demonstration_groups(policy, records, group_size=3, seed=fresh_seed()))
    end_of_turn = policy.tokenizer.convert_tokens_to_ids(END_OF_TURN)
    assert len(policy.stop_ids) == 2
    for tokens in group[1]:
        assert tokens[-1] == end_of_turn
        assert not {*policy.stop_ids} & {*tokens[:-1]}
    loss = warm_start.completion_loss(policy.model, group)
    torch.testing.assert_close(loss, separate_loss(policy.model, group), rtol=1e-5, atol=0)


def test_a_tokenizer_without_a_stop_token_of_its_own(policy):
    policy.tokenizer.eos_token = None
    policy.stop_ids = [7, 9]
    tokens = warm_start.encode_completion(policy, "# Analysis")
    assert tokens[-1] == 7
    assert policy.tokenizer.decode(tokens[:-1]) == "# Analysis"


def test_prompts_are_those_of_training_by_reward(records, policy):
    """The warm start taught one way of cutting a prompt into tokens, training went on with another:
    nine prompts of ten began to look like none the policy had ever read."""
    expected = make_prompts(
        "data.train", train.with_messages(records), policy.tokenizer, train.RunConfig()
    )
    encoded = [warm_start.encode_prompt(policy.tokenizer, record) for record in records]
    assert encoded == [prompt.token_ids for prompt in expected]


def test_groups_hold_this_records_demonstrations_and_never_repeat(records, policy):
    """Each round is a shuffle of all records, with demonstrations that were not there before."""
    seed = fresh_seed()
    groups = warm_start.demonstration_groups(policy, records, group_size=2, seed=seed)
    rounds = [list(itertools.islice(groups, len(records))) for _ in range(4)]
    by_prompt = {tuple(warm_start.encode_prompt(policy.tokenizer, r)): r for r in records}
    orders = [tuple(tuple(prompt) for prompt, _ in groups) for groups in rounds]
    assert all(sorted(order) == sorted(by_prompt) for order in orders)
    assert len(set(orders)) > 1
    seen = []
    for number, (prompt, completions) in enumerate(itertools.chain(*rounds)):
        samples = range(2 * (number // len(records)), 2 * (number // len(records)) + 2)
        record = by_prompt[tuple(prompt)]
        texts = [policy.tokenizer.decode(tokens[:-1]) for tokens in completions]
        assert texts == [demonstrate(record, seed=seed, sample=k) for k in samples]
        seen += texts
    assert len(set(seen)) == len(seen)


# --- how it is learned ---------------------------------------------------------------------------


@pytest.mark.parametrize("compute_dtype", [torch.float32, torch.bfloat16])
def test_the_loss_falls_and_weights_stay_in_float32(records, policy, compute_dtype):
    groups = warm_start.demonstration_groups(policy, records, group_size=2, seed=0)
    recipe = TrainConfig(steps=30, learning_rate=PEAK)
    with start_ranks(CPU) as ranks:
        model = shard(policy.model, ranks, compute_dtype, policy.weights.fill)
        losses = warm_start.train(model, groups, recipe, groups_per_step=2)
    print(losses)
    assert losses[0] == pytest.approx(math.log(VOCABULARY_SIZE), abs=0.3)  # it knows nothing
    assert losses[-1] < 6
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_a_run_equals_the_same_updates_written_out(
    tmp_path, start, policy, records, records_file, monkeypatch
):
    """20 updates of 2 groups of 2: each token of an update's completions weighs the same. AdamW
    with 0.9, 0.95 and a weight decay of 0.01; the learning rate rises over 2 steps and falls to 0
    over 18; gradients are clipped at a norm of 1."""
    seed, losses = fresh_seed(), []
    original = warm_start.train
    monkeypatch.setattr(warm_start, "train", lambda *a: losses.extend(original(*a)))
    command = f"--model {start} --out {tmp_path}/warm --records {records_file} --seed {seed}"
    command += f" --steps 20 --batch-size 4 --group-size 2 --learning-rate {PEAK}"
    command += " --compute-dtype float32 --samples 1 --max-new-tokens 1"
    warm_start.main(command.split())
    trained = AutoModelForCausalLM.from_pretrained(tmp_path / "warm")

    model = AutoModelForCausalLM.from_pretrained(start)
    groups = warm_start.demonstration_groups(policy, records, group_size=2, seed=seed)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.01)
    norms, read = [], set()
    for step in range(20):
        batch = [next(groups), next(groups)]
        read |= {token for prompt, ys in batch for tokens in (prompt, *ys) for token in tokens}
        optimizer.param_groups[0]["lr"] = PEAK * min((step + 1) / 2, (20 - step) / 18)
        token_count = sum(len(tokens) for _, completions in batch for tokens in completions)
        loss = sum(separate_loss(model, group) for group in batch) / token_count
        optimizer.zero_grad()
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)))
        optimizer.step()
        assert losses[step] == pytest.approx(loss.item(), rel=1e-4)
    assert max(norms) > 1, "clipping was not seen"

    untrained = AutoModelForCausalLM.from_pretrained(start)
    for name, expected in model.state_dict().items():
        moved = (expected - untrained.state_dict()[name]).norm()
        difference = (expected - trained.state_dict()[name]).norm() / moved
        assert difference < 1e-3, name
    # What is never read has no gradient: only weight decay moves it, and rounding has no say.
    unread = [token for token in range(VOCABULARY_SIZE) if token not in read]
    rows = [m.get_input_embeddings().weight[unread] for m in (trained, model, untrained)]
    torch.testing.assert_close(rows[0], rows[1], rtol=1e-6, atol=0)
    assert not torch.equal(rows[1], rows[2])


def test_the_share_counts_the_samples_in_the_form(policy, records, monkeypatch):
    """The stop token is no text: a response of nothing else is not in the form."""
    seed, calls = fresh_seed(), []
    in_the_form, cut_off = demonstrate(records[0]), demonstrate(records[0])[:12]
    no_response = in_the_form[: in_the_form.index("# Response")] + "# Response\n"

    def generate(model, prompts, on_finish, **settings):
        calls.append((model, prompts, settings))
        texts = [in_the_form, cut_off, in_the_form, in_the_form], [cut_off] + [no_response] * 3
        return [
            [Completion(warm_start.encode_completion(policy, text), [], "stop") for text in group]
            for group in texts
        ]

    monkeypatch.setattr(warm_start, "generate_groups", generate)
    assert warm_start.share_well_formed(policy, records[:2], 99, seed) == 3 / 8
    assert calls == [
        (
            policy.model,
            [warm_start.encode_prompt(policy.tokenizer, record) for record in records[:2]],
            {
                "group_size": 4,
                "max_new_tokens": 99,
                "sampling": Sampling(temperature=1.0),
                "stop_ids": policy.stop_ids,
                "seed": seed,
            },
        )
    ]


# --- the command line ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments, saved_dtype",
    [([], torch.bfloat16), (["--compute-dtype", "float32"], torch.float32)],
)
def test_any_policy_is_warm_started_from_the_command_line(
    tmp_path, start, records, records_file, capsys, monkeypatch, arguments, saved_dtype
):
    """Into an empty folder that is there already. What was measured last is what is saved."""
    sampled = []
    original = warm_start.generate_groups

    def generate(model, *positional, **named):
        state = warm_start.plain_copy(model).state_dict()
        sampled.append({name: tensor.clone() for name, tensor in state.items()})
        return original(model, *positional, **named)

    monkeypatch.setattr(warm_start, "generate_groups", generate)
    command = f"--model {start} --out {tmp_path} --records {records_file} --steps 2 --samples 5"
    warm_start.main([*command.split(), "--max-new-tokens", "4", *arguments])
    printed = capsys.readouterr()
    assert "before: 0% of 8 held-out samples are in the form" in printed.out
    assert "after: 0% of 8 held-out samples are in the form" in printed.out
    for bar in ("measuring: 100%", "warm start: 100%"):
        assert bar in printed.err

    warm = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto")
    assert warm.dtype == saved_dtype
    assert len(sampled) == 2
    for name, tensor in warm.state_dict().items():
        assert torch.equal(tensor, sampled[1][name])
    assert not torch.equal(sampled[0]["lm_head.weight"], sampled[1]["lm_head.weight"])
    before, after = load_policy(str(start), CPU), load_policy(str(tmp_path), CPU)
    assert len(after.stop_ids) == 2
    assert warm.generation_config.eos_token_id == after.stop_ids == before.stop_ids
    encoded = [[warm_start.encode_prompt(p.tokenizer, r) for r in records] for p in (before, after)]
    assert encoded[0] == encoded[1]


def make_embedded(folder, records_file, seed, *arguments):
    command = f"--embedded --out {folder} --records {records_file} --mixed-records 4 --seed {seed}"
    small = "--steps 2 --samples 4 --max-new-tokens 2".split()
    warm_start.main([*command.split(), *small, *arguments])


@pytest.mark.slow
def test_the_embedded_policy_is_the_same_each_time_it_is_made(tmp_path, records_file):
    seed = fresh_seed()
    for folder in ("one", "two"):
        torch.manual_seed(torch.seed())  # what was drawn before must not matter
        make_embedded(tmp_path / folder, records_file, seed)
    names = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert "model.safetensors" in names and "tokenizer.json" in names
    match, mismatch, errors = filecmp.cmpfiles(
        tmp_path / "one", tmp_path / "two", names, shallow=False
    )
    assert (sorted(match), mismatch, errors) == (names, [], [])


def test_the_embedded_policy_starts_from_its_seed(records):
    seed = fresh_seed()
    name = "model.layers.0.mlp.up_proj.weight"
    one, same, other = (
        warm_start.embedded_start(records, each).weights.rows(name, 0, 4)
        for each in (seed, seed, seed + 1)
    )
    assert torch.equal(one, same) and not torch.equal(one, other)


def test_the_embedded_policy_learns_the_tokens_that_training_will_read(
    tmp_path, records, records_file, monkeypatch
):
    """transformers gives a Qwen2 its own way of cutting text, whatever the tokenizer's file says.
    The embedded policy had learned from the tokenizer as it was made, and was trained on with what
    came back: 309 of its 320 prompts read otherwise."""
    learned = []
    original = warm_start.train

    def keep(model, groups, *rest):
        first = list(itertools.islice(groups, len(records) + 4))
        learned.extend(first)
        return original(model, itertools.cycle(first), *rest)

    monkeypatch.setattr(warm_start, "train", keep)
    make_embedded(tmp_path / "out", records_file, 0)
    tokenizer = load_tokenizer(str(tmp_path / "out"))
    prompts = make_prompts("data.train", train.with_messages(records), tokenizer, train.RunConfig())
    assert {tuple(p.token_ids) for p in prompts} <= {tuple(prompt) for prompt, _ in learned}
    for _, completions in learned:
        for tokens in completions:
            text = tokenizer.decode(tokens[:-1])
            assert tokenizer.encode(text, add_special_tokens=False) == tokens[:-1]


@pytest.mark.slow
def test_the_embedded_policy_is_sharpened_after_training(tmp_path, records_file, monkeypatch):
    arguments = (records_file, 3, "--compute-dtype", "float32")
    make_embedded(tmp_path / "sharp", *arguments)
    monkeypatch.setattr(warm_start, "sharpen", lambda policy: None)
    make_embedded(tmp_path / "blunt", *arguments)
    sharp, blunt = (
        AutoModelForCausalLM.from_pretrained(tmp_path / name).state_dict()
        for name in ("sharp", "blunt")
    )
    for name, tensor in blunt.items():
        factor = SHARPENING if name == "model.norm.weight" else 1
        assert torch.equal(sharp[name], tensor * factor), name


# --- what a user may get wrong -------------------------------------------------------------------


def refused(capsys, arguments):
    """The one line that `arguments` end in."""
    with pytest.raises(SystemExit) as ended:
        warm_start.main(arguments)
    assert ended.value.code == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    return printed.err


def write(path: Path, text: str) -> str:
    path.write_text(text, encoding="utf-8")
    return str(path)


# Arguments beside --embedded that cannot work, and what the one line must speak of.
REFUSED_AT_ONCE = {
    "no records": (lambda folder: ["--records", str(folder / "none")], "--records: "),
    "bad record": (
        lambda folder: ["--records", write(folder / "bad.jsonl", '{"persona": 1}')],
        "bad.jsonl, line 1",
    ),
    "held out": (lambda folder: ["--records", "bundled-heldout"], "--records bundled-heldout"),
    "a policy": (
        lambda folder: ["--out", str(Path(write(folder / "config.json", "{}")).parent)],
        "holds files already",
    ),
    "a file": (lambda folder: ["--out", write(folder / "file", "")], "cannot be written"),
    "below a file": (
        lambda folder: ["--out", write(folder / "file", "") + "/out"],
        "cannot be written",
    ),
    "no rate": (lambda folder: ["--learning-rate", "0"], "learning_rate = 0.0"),
}


@pytest.mark.parametrize("case", REFUSED_AT_ONCE)
def test_bad_arguments_are_refused_before_any_work(tmp_path, capsys, monkeypatch, case):
    make_arguments, named = REFUSED_AT_ONCE[case]
    monkeypatch.setattr(warm_start, "embedded_start", None)  # cannot be called
    arguments = make_arguments(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    if "--out" not in arguments:
        arguments += ["--out", str(tmp_path / "new" / "out")]
    error = refused(capsys, ["--embedded", *arguments])
    assert error.startswith("error: ") and error.count("\n") == 1 and named in error
    assert not (tmp_path / "new" / "out").exists()
    assert [path for path in sorted(tmp_path.rglob("*")) if path.name != "new"] == before


def empty_template(folder):
    tokenizer = load_tokenizer(str(folder))
    tokenizer.chat_template = "{{ '' }}"
    tokenizer.save_pretrained(folder)


# Ways to spoil the folder of a policy, and what the one line must speak of.
BAD_POLICIES = {
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "--model = "),
    "bad weights": (lambda folder: (folder / "model.safetensors").write_bytes(b"?"), "--model = "),
    "no config": (lambda folder: (folder / "config.json").unlink(), "--model = "),
    "empty prompt": (empty_template, "record 1 of --records makes an empty prompt"),
}


@pytest.mark.parametrize("case", BAD_POLICIES)
def test_a_bad_policy_is_refused(tmp_path, capsys, start, case):
    spoil, named = BAD_POLICIES[case]
    folder = tmp_path / "policy"
    folder.mkdir()
    for path in start.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    spoil(folder)
    error = refused(capsys, ["--model", str(folder), "--out", str(tmp_path / "out")])
    assert error.splitlines()[-1].startswith("error: --model") and named in error
    assert "Traceback" not in error
    assert not (tmp_path / "out").exists()


def test_a_prompt_without_room_for_an_answer_is_refused(policy, records):
    lengths = [len(warm_start.encode_prompt(policy.tokenizer, record)) for record in records]
    room = policy.model.config.max_position_embeddings - max(lengths)
    warm_start.check_lengths(policy, "--records", records, room)
    with pytest.raises(ConfigError) as refusal:
        warm_start.check_lengths(policy, "--records", records, room + 1)
    where = f"the {max(lengths)} tokens of the prompt of record {lengths.index(max(lengths)) + 1} "
    assert str(refusal.value).startswith(f"--max-new-tokens {room + 1}: with {where}of --records ")


def test_a_long_record_is_refused_before_training(tmp_path, capsys, records):
    long = as_line(replace(records[1], query="word " * 3000))
    path = write(tmp_path / "long.jsonl", f"{as_line(records[0])}\n{long}")
    command = f"--embedded --out {tmp_path}/out --records {path} --mixed-records 0"
    error = refused(capsys, command.split())
    assert "record 2 of --records" in error and "warm start" not in error
    assert "[transformers]" not in error, "its warning says the same again"


def test_more_than_one_process_is_refused():
    settings = warm_start.parse_arguments(["--embedded", "--out", "x"])
    with pytest.raises(ConfigError, match="WORLD_SIZE = 2"):
        warm_start.run(settings, Ranks(0, 2, CPU, None))


@pytest.mark.parametrize(
    "arguments, named",
    [
        ("--batch-size 6 --group-size 4", "--batch-size 6 is not a multiple of --group-size 4"),
        ("--steps 0", "--steps: 0 is not from 1"),
        ("--steps abc", "--steps"),
        ("--seed -1", "--seed: -1 is not from 0 to 4294967295"),
        ("--mixed-records -1", "--mixed-records: -1 is not from 0"),
        ("--model x", "not allowed with argument --embedded"),
    ],
)
def test_numbers_out_of_range_are_refused(capsys, arguments, named):
    assert named in refused(capsys, ["--embedded", "--out", "x", *arguments.split()])

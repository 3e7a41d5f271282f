"""Warm start: what is learned (a completion, its stop token, nothing else) and what is saved."""

import filecmp
import random

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

import warm_start
from data import RecordError, load_records
from data.demonstrations import demonstrate
from data.tiny_policy import END_OF_TEXT, END_OF_TURN, VOCABULARY_SIZE, train_tokenizer
from grpo.policy import Policy, stop_ids


@pytest.fixture(autouse=True)
def one_thread():
    """On matrices this small, threads wait for one another longer than they compute."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def records():
    return load_records("bundled")[:6]


@pytest.fixture(scope="module")
def tokenizer(records):
    texts = [m["content"] for record in records for m in warm_start.messages_for(record)]
    return train_tokenizer(texts + [demonstrate(record) for record in records])


@pytest.fixture
def model(tokenizer):
    torch.manual_seed(11)
    config = LlamaConfig(
        vocab_size=VOCABULARY_SIZE,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=1024,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def save(model, tokenizer, folder, dtype):
    policy = Policy(model, tokenizer, stop_ids(model, tokenizer))
    warm_start.save(policy, folder, dtype)


def test_the_loss_covers_the_completion_and_its_stop_token_and_nothing_else(
    records, tokenizer, model
):
    """Without the stop token in the loss a policy never learns to end: every completion runs on to
    the length limit. With the prompt in it, it learns to write seekers' messages."""
    groups = warm_start.demonstration_groups(records, tokenizer, group_size=3, seed=0)
    prompt, completions = next(groups)
    assert all(tokens[-1] == tokenizer.eos_token_id for tokens in completions)
    assert all(tokenizer.eos_token_id not in tokens[:-1] for tokens in completions)

    expected = torch.zeros(())
    for tokens in completions:
        logits = model(torch.tensor([prompt + tokens])).logits[0]
        for position, token in enumerate(tokens):
            predicting = logits[len(prompt) + position - 1]
            expected = expected + F.cross_entropy(predicting, torch.tensor(token))
    warm_start.use_shared_prefix(model)
    loss = warm_start.completion_loss(model, (prompt, completions))
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)


def test_groups_hold_this_records_demonstrations_and_never_repeat(records, tokenizer):
    groups = warm_start.demonstration_groups(records, tokenizer, group_size=2, seed=5)
    two_rounds = [next(groups) for _ in range(2 * len(records))]
    prompts = [tuple(prompt) for prompt, _ in two_rounds]
    assert set(prompts[: len(records)]) == set(prompts[len(records) :])
    assert len(set(prompts)) == len(records)
    texts = [tokenizer.decode(t[:-1]) for _, completions in two_rounds for t in completions]
    assert len(set(texts)) == len(texts)
    by_prompt = {tuple(warm_start.encode_prompt(tokenizer, record)): record for record in records}
    known = {
        prompt: {demonstrate(record, seed=5, sample=k) for k in range(4)}
        for prompt, record in by_prompt.items()
    }
    for prompt, completions in two_rounds:
        assert {tokenizer.decode(t[:-1]) for t in completions} <= known[tuple(prompt)]


@pytest.mark.parametrize("compute_dtype", [torch.float32, torch.bfloat16])
def test_the_loss_falls_and_weights_stay_in_float32(records, tokenizer, model, compute_dtype):
    groups = warm_start.demonstration_groups(records, tokenizer, group_size=2, seed=0)
    losses = warm_start.train(
        model,
        groups,
        steps=30,
        groups_per_step=2,
        learning_rate=1e-2,
        compute_dtype=compute_dtype,
    )
    print(losses)
    assert 8.2 < losses[0] < 8.5  # ln 4096 = 8.32: a new policy knows nothing
    assert losses[-1] < 6
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_gradients_do_not_depend_on_how_a_batch_is_cut(records, tokenizer, model):
    """The denominator is the batch's token count, so two groups at once weigh like two in a row."""
    groups = warm_start.demonstration_groups(records, tokenizer, group_size=2, seed=0)
    batch = [next(groups) for _ in range(2)]
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    warm_start.use_shared_prefix(model)
    token_count = sum(len(tokens) for _, completions in batch for tokens in completions)
    mean_loss = sum(warm_start.completion_loss(model, group) for group in batch) / token_count
    losses = warm_start.train(
        model,
        iter(batch),
        steps=1,
        groups_per_step=2,
        learning_rate=0.0,
        compute_dtype=torch.float32,
    )
    assert losses[0] == pytest.approx(mean_loss.item(), rel=1e-6)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name])


def test_the_saved_folder_loads_and_stops_at_every_stop_id(tmp_path, tokenizer, model, records):
    end_of_turn, end_of_text = tokenizer.convert_tokens_to_ids([END_OF_TURN, END_OF_TEXT])
    model.generation_config.eos_token_id = end_of_text
    save(model, tokenizer, tmp_path, torch.bfloat16)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto")
    assert loaded.dtype == torch.bfloat16
    assert loaded.generation_config.eos_token_id == sorted([end_of_turn, end_of_text])
    for name, parameter in loaded.named_parameters():
        assert torch.equal(parameter, model.get_parameter(name))
    again = AutoTokenizer.from_pretrained(tmp_path)
    prompt = warm_start.encode_prompt(tokenizer, records[0])
    assert warm_start.encode_prompt(again, records[0]) == prompt
    assert again.decode(prompt).endswith("<|im_end|>\n<|im_start|>assistant\n")


def test_any_policy_is_warm_started_from_the_command_line(tmp_path, tokenizer, model, capsys):
    save(model, tokenizer, tmp_path / "start", torch.float32)
    command = [
        "--model",
        str(tmp_path / "start"),
        "--out",
        str(tmp_path / "warm"),
    ]
    warm_start.main([*command, "--steps", "2", "--samples", "4", "--max-new-tokens", "4"])
    printed = capsys.readouterr().out
    assert "before: 0% of 4 held-out samples are in the form" in printed
    assert "after: 0% of 4 held-out samples are in the form" in printed
    warm = AutoModelForCausalLM.from_pretrained(tmp_path / "warm", dtype="auto")
    assert warm.dtype == torch.float32
    assert not torch.equal(warm.lm_head.weight, model.lm_head.weight)


def test_the_embedded_policy_is_the_same_each_time_it_is_made(tmp_path):
    for folder in ("one", "two"):
        torch.manual_seed(random.randrange(1000))  # what was drawn before must not matter
        command = ["--embedded", "--out", str(tmp_path / folder), "--seed", "4"]
        warm_start.main([*command, "--steps", "2", "--samples", "4", "--max-new-tokens", "2"])
    names = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert "model.safetensors" in names and "tokenizer.json" in names
    match, mismatch, errors = filecmp.cmpfiles(
        tmp_path / "one", tmp_path / "two", names, shallow=False
    )
    assert (sorted(match), mismatch, errors) == (names, [], [])


def test_a_batch_that_is_no_multiple_of_the_group_is_refused(capsys):
    with pytest.raises(SystemExit):
        warm_start.main(["--embedded", "--out", "x", "--batch-size", "6", "--group-size", "4"])
    assert "--batch-size 6 is not a multiple of --group-size 4" in capsys.readouterr().err


def test_a_prompt_without_room_for_an_answer_is_refused(tokenizer, model, records):
    policy = Policy(model, tokenizer, [tokenizer.eos_token_id])
    longest = max(len(warm_start.encode_prompt(tokenizer, record)) for record in records)
    room = model.config.max_position_embeddings - longest
    warm_start.check_lengths(policy, records, room)
    with pytest.raises(RecordError, match=f"has {longest} tokens, and with {room + 1} "):
        warm_start.check_lengths(policy, records, room + 1)

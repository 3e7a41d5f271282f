"""The tiny policy: new, it already copies; trained and shipped, it writes the form."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from data import embedded_policy, load_records
from data.tiny_policy import (
    END_OF_TEXT,
    END_OF_TURN,
    SHARPENING,
    VOCABULARY_SIZE,
    new_policy,
    sharpen,
    train_tokenizer,
)
from perm_reward import Seeker, policy_messages
from perm_reward.completion import parse_completion


@pytest.fixture(scope="module")
def shipped():
    folder = embedded_policy()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval(), tokenizer


def prompt_ids(tokenizer, record) -> torch.Tensor:
    seeker = Seeker(persona=record.persona, scenario=record.scenario, query=record.query)
    ids = tokenizer.apply_chat_template(
        policy_messages(seeker), add_generation_prompt=True, return_dict=False
    )
    return torch.tensor([ids])


def test_a_new_policy_copies_before_any_training():
    """Left to random weights, copying takes longer to emerge than the whole training lasts."""
    seed = 21
    print("seed", seed)
    model = new_policy(train_tokenizer(["a few words"]), seed).eval()
    generator = torch.Generator().manual_seed(seed)
    prompt = torch.randint(300, VOCABULARY_SIZE, (4, 250), generator=generator)
    copied = prompt[:, 100:140]
    with torch.no_grad():
        logits = model(torch.cat([prompt, copied], dim=1)).logits
    guesses = logits[:, 250:289].argmax(-1)  # after each copied token but the last
    assert (guesses == copied[:, 1:]).float().mean() > 0.8


def test_sharpening_is_a_lower_temperature():
    model = new_policy(train_tokenizer(["a few words"]), seed=5).eval()
    row = torch.arange(300, 330)[None]
    with torch.no_grad():
        before = model(row).logits
        sharpen(model)
        after = model(row).logits
    torch.testing.assert_close(after, before * SHARPENING)


def test_any_text_survives_the_tokenizer(shipped):
    _, tokenizer = shipped
    for text in ("I can't  stop\n\n# Response\n", "Zoë 🙂 日本語 naïve — “so”", " .  ,"):
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_the_chat_template_marks_each_turn(shipped):
    _, tokenizer = shipped
    messages = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi."}]
    assert tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) == (
        "<|im_start|>system\nBe kind.<|im_end|>\n"
        "<|im_start|>user\nHi.<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    ids = tokenizer.apply_chat_template(messages, return_dict=False)
    assert ids.count(tokenizer.eos_token_id) == 2  # a turn's end is one token, not its letters


def test_the_shipped_folder_is_small_and_declares_every_stop_id(shipped):
    model, tokenizer = shipped
    assert sum(file.stat().st_size for file in embedded_policy().iterdir()) < 8_000_000
    end_of_turn, end_of_text = tokenizer.convert_tokens_to_ids([END_OF_TURN, END_OF_TEXT])
    assert model.generation_config.eos_token_id == sorted([end_of_turn, end_of_text])
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (end_of_turn, end_of_text)
    assert len(tokenizer) == model.config.vocab_size


@pytest.mark.slow
def test_the_shipped_policy_writes_the_form_on_held_out_records(shipped):
    """What GRPO needs of it: the form nearly always, an end, and no two completions alike."""
    model, tokenizer = shipped
    seed = 8
    print("seed", seed)
    torch.manual_seed(seed)
    well_formed, ended = [], []
    for record in load_records("bundled-heldout")[::13]:
        prompt = prompt_ids(tokenizer, record)
        tokens = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            num_return_sequences=8,
            max_new_tokens=200,
        )[:, prompt.shape[1] :]
        ended += (tokens == tokenizer.eos_token_id).any(dim=1).tolist()
        texts = tokenizer.batch_decode(tokens, skip_special_tokens=True)
        assert len(set(texts)) == 8
        well_formed += [parse_completion(text).well_formed for text in texts]
    assert sum(well_formed) / len(well_formed) > 0.9
    assert sum(ended) / len(ended) > 0.9

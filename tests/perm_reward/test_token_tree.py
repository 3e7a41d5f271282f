"""Token trees: one packed row of a model against a forward pass of its own for each sequence."""

import random

import pytest
import torch
from transformers import BloomConfig, BloomForCausalLM, MambaConfig, MambaForCausalLM

from perm_reward.judges.token_tree import (
    NO_PREFIX,
    NotPackable,
    lay_out,
    next_token_logits,
    next_token_logprobs,
    read_prefix,
    refuse_unpackable,
    tree_mask,
)
from tests.tiny import VOCABULARY, fresh_seed, tiny_model


def random_sequences(generator, count, symbols=VOCABULARY, longest=40):
    """Sequences that fork off one another, at random places."""
    sequences = [(generator.randrange(symbols),)]
    while len(sequences) < count:
        stem = generator.choice(sequences)
        kept = generator.randint(0, len(stem))
        new = [generator.randrange(symbols) for _ in range(generator.randint(1, longest))]
        sequences.append((*stem[:kept], *new))
    return sequences


def test_a_tree_by_hand():
    """The three sequences share 1, two of them also 2; one of them comes twice.

    place   0 1 2 3 4
    token   1 2 3 4 5
    """
    tree = lay_out([(1, 5), (1, 2, 4), (1, 2, 3), (1, 5), (1, 2)])
    assert tree.token_ids == [1, 2, 3, 4, 5]
    assert tree.positions == [0, 1, 2, 2, 1]
    assert tree.ends == [5, 4, 3, 4, 5]
    assert tree.last == [4, 3, 2, 4, 1]
    sees = tree_mask(torch.tensor(tree.ends), 0, torch.float32)[0, 0] == 0
    assert sees.int().tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0],
        [1, 1, 0, 1, 0],
        [1, 0, 0, 0, 1],
    ]


def test_all_see_what_stands_before_the_row():
    """Three tokens are kept; the two of the row begin different sequences."""
    tree = lay_out([(1,), (2,)])
    sees = tree_mask(torch.tensor(tree.ends), 3, torch.float32)[0, 0] == 0
    assert sees.int().tolist() == [
        [1, 1, 1, 1, 0],
        [1, 1, 1, 0, 1],
    ]


def test_each_token_sees_its_own_sequence_and_nothing_else():
    generator = random.Random(fresh_seed())
    sequences = random_sequences(generator, 60, symbols=3, longest=6)
    tree = lay_out(sequences)
    assert len(tree.token_ids) == len({s[:k] for s in sequences for k in range(1, len(s) + 1)})
    sees = tree_mask(torch.tensor(tree.ends), 0, torch.float32)[0, 0] == 0
    for tokens, last in zip(sequences, tree.last, strict=True):
        seen = sees[last].nonzero()[:, 0].tolist()
        assert tuple(tree.token_ids[place] for place in seen) == tokens
        assert [tree.positions[place] for place in seen] == list(range(len(tokens)))


# --- against plain forward passes ----------------------------------------------------------------


def plain_logprobs(model, tokens):
    with torch.no_grad():
        return model(torch.tensor([tokens])).logits[0, -1].log_softmax(-1)


@pytest.mark.parametrize("kept", [0, 1, 30])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_a_packed_row_equals_plain_forward_passes(family, attention, kept):
    """With nothing, one token or thirty of what all sequences begin with kept."""
    seed = fresh_seed()
    generator = random.Random(seed)
    model = tiny_model(family, seed)
    model.set_attn_implementation(attention)
    trunk = tuple(generator.randrange(VOCABULARY) for _ in range(30))
    sequences = [trunk + branch for branch in random_sequences(generator, 25)]
    wanted = [
        tuple(generator.sample(range(VOCABULARY), generator.randint(1, 5))) for _ in sequences
    ]
    prefix = read_prefix(model, trunk[:kept])
    packed = next_token_logprobs(model, sequences, wanted, prefix)
    for tokens, of, logprobs in zip(sequences, wanted, packed, strict=True):
        plain = plain_logprobs(model, tokens)
        assert logprobs == pytest.approx(plain[list(of)].tolist(), abs=1e-5)


def test_a_row_goes_on_from_where_it_parts_from_the_prefix():
    """A prompt may part from the others of its role earlier than those from which it was found.

    Or be all of it: its last token is computed again, for its logits were not kept.
    """
    seed = fresh_seed()
    model = tiny_model("llama", seed)
    trunk = tuple(random.Random(seed).randrange(VOCABULARY - 1) for _ in range(20))
    prefix = read_prefix(model, trunk)
    other = VOCABULARY - 1
    for sequences in (
        [(*trunk[:12], other), (*trunk, other)],
        [(other, *trunk)],
        [trunk, trunk[:5]],
        [trunk[:1]],
    ):
        logprobs = next_token_logits(model, sequences, prefix).log_softmax(-1)
        for tokens, of_tokens in zip(sequences, logprobs, strict=True):
            torch.testing.assert_close(of_tokens, plain_logprobs(model, tokens), rtol=0, atol=1e-5)


def test_what_is_kept_is_not_computed_again_and_not_changed(monkeypatch):
    seed = fresh_seed()
    model = tiny_model("llama", seed, torch.bfloat16)
    trunk = tuple(random.Random(seed).randrange(VOCABULARY) for _ in range(20))
    prefix = read_prefix(model, trunk)
    before = [(keys.clone(), values.clone()) for keys, values in prefix.keys_and_values]
    forward, rows = model.forward, []

    def watched(**inputs):
        rows.append(inputs["input_ids"].tolist())
        return forward(**inputs)

    monkeypatch.setattr(model, "forward", watched)
    sequences = [(*trunk, 1, 2), (*trunk, 1, 3)]
    first, second = (next_token_logits(model, sequences, prefix) for _ in range(2))
    assert rows == [[[1, 2, 3]]] * 2
    assert torch.equal(first, second)
    for kept, was in zip(prefix.keys_and_values, before, strict=True):
        assert kept[0].shape[2] == 20
        assert all(map(torch.equal, kept, was))


def test_nothing_in_common_is_no_prefix():
    assert read_prefix(tiny_model(), ()) is NO_PREFIX


# --- models that would be computed wrongly -------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_plain_attention_is_taken(family, dtype):
    refuse_unpackable(tiny_model(family, fresh_seed(), dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("ignored", ["attention_mask", "position_ids"])
def test_a_model_that_goes_its_own_way_is_refused(ignored, dtype, monkeypatch):
    model = tiny_model("llama", fresh_seed(), dtype)
    forward = model.forward
    monkeypatch.setattr(
        model, "forward", lambda *inputs, **named: forward(*inputs, **named | {ignored: None})
    )
    with pytest.raises(NotPackable, match="does not keep to the mask, positions and cache"):
        refuse_unpackable(model)


def test_a_model_that_keeps_nothing_is_refused(monkeypatch):
    model = tiny_model("llama", fresh_seed())
    forward = model.forward
    monkeypatch.setattr(
        model,
        "forward",
        lambda *inputs, **named: forward(*inputs, **named | {"past_key_values": None}),
    )
    with pytest.raises(NotPackable, match="takes no mask, positions or cache"):
        refuse_unpackable(model)


def test_a_model_that_takes_no_such_mask_is_refused():
    """ALiBi computes its positions from a mask of another shape."""
    model = BloomForCausalLM(BloomConfig(vocab_size=97, hidden_size=64, n_layer=2, n_head=4))
    with pytest.raises(NotPackable, match="takes no mask, positions or cache"):
        refuse_unpackable(model.eval())


def test_a_model_without_attention_is_refused():
    config = MambaConfig(vocab_size=97, hidden_size=64, num_hidden_layers=2, state_size=8)
    with pytest.raises(NotPackable, match="linear_attention"):
        refuse_unpackable(MambaForCausalLM(config).eval())

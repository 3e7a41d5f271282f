"""Token trees: one packed row of a model against a forward pass of its own for each sequence."""

import random

import pytest
import torch
from transformers import BloomConfig, BloomForCausalLM, MambaConfig, MambaForCausalLM

from perm_reward.judges import token_tree
from perm_reward.judges.token_tree import (
    NotPackable,
    common_length,
    lay_out,
    next_token_logprobs,
    plan_rows,
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
    sees = tree_mask(torch.tensor(tree.ends), torch.float32)[0, 0] == 0
    assert sees.int().tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0],
        [1, 1, 0, 1, 0],
        [1, 0, 0, 0, 1],
    ]


def test_each_token_sees_its_own_sequence_and_nothing_else():
    generator = random.Random(fresh_seed())
    sequences = random_sequences(generator, 60, symbols=3, longest=6)
    tree = lay_out(sequences)
    assert len(tree.token_ids) == len({s[:k] for s in sequences for k in range(1, len(s) + 1)})
    sees = tree_mask(torch.tensor(tree.ends), torch.float32)[0, 0] == 0
    for tokens, last in zip(sequences, tree.last, strict=True):
        seen = sees[last].nonzero()[:, 0].tolist()
        assert tuple(tree.token_ids[place] for place in seen) == tokens
        assert [tree.positions[place] for place in seen] == list(range(len(tokens)))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_a_packed_row_equals_plain_forward_passes(family, attention, monkeypatch):
    monkeypatch.setattr(token_tree, "_LOGITS_AT_ONCE", 7)
    seed = fresh_seed()
    generator = random.Random(seed)
    model = tiny_model(family, seed)
    model.set_attn_implementation(attention)
    sequences = random_sequences(generator, 25)
    wanted = [
        tuple(generator.sample(range(VOCABULARY), generator.randint(1, 5))) for _ in sequences
    ]
    packed = next_token_logprobs(model, sequences, wanted)
    for tokens, of, logprobs in zip(sequences, wanted, packed, strict=True):
        with torch.no_grad():
            plain = model(torch.tensor([tokens])).logits[0, -1].log_softmax(-1)
        assert logprobs == pytest.approx(plain[list(of)].tolist(), abs=1e-5)


def test_what_shares_the_row_changes_rounding_only():
    seed = fresh_seed()
    sequences = random_sequences(random.Random(seed), 20)
    model = tiny_model("llama", seed)
    wanted = [(1, 2, 3)] * len(sequences)
    together = next_token_logprobs(model, sequences, wanted)
    for i, tokens in enumerate(sequences):
        [alone] = next_token_logprobs(model, [tokens], wanted[:1])
        assert together[i] == pytest.approx(alone, abs=1e-5)
    assert together == next_token_logprobs(model, sequences, wanted)


# --- rows ----------------------------------------------------------------------------------------


def test_rows_hold_every_prompt_once_and_keep_to_the_limit():
    generator = random.Random(fresh_seed())
    prompts = random_sequences(generator, 80, symbols=3, longest=30)
    own = [generator.randint(0, 20) for _ in prompts]
    limit = 90
    rows = plan_rows(prompts, own, limit)
    assert sorted(i for row in rows for i in row) == list(range(len(prompts)))
    costs = [
        len(lay_out([prompts[i] for i in row]).token_ids) + sum(own[i] for i in row) for row in rows
    ]
    for row, cost, following in zip(rows, costs, [*rows[1:], None], strict=True):
        assert cost <= limit or len(row) == 1
        if following is not None:  # it would not have fitted
            shared = common_length(prompts[row[-1]], prompts[following[0]])
            assert cost + len(prompts[following[0]]) - shared + own[following[0]] > limit


def test_prompts_that_begin_alike_share_a_row():
    first, second = tuple(range(50)), tuple(range(100, 150))
    prompts = [(*stem, i) for i in range(4) for stem in (first, second)]
    rows = plan_rows(prompts, [3] * 8, limit=50 + 4 * 4)
    assert [sorted(row) for row in rows] == [[0, 2, 4, 6], [1, 3, 5, 7]]


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
    with pytest.raises(NotPackable, match="does not keep to the mask and positions"):
        refuse_unpackable(model)


def test_a_model_that_takes_no_such_mask_is_refused():
    """ALiBi computes its positions from a mask of another shape."""
    model = BloomForCausalLM(BloomConfig(vocab_size=97, hidden_size=64, n_layer=2, n_head=4))
    with pytest.raises(NotPackable, match="takes no mask or positions"):
        refuse_unpackable(model.eval())


def test_a_model_without_attention_is_refused():
    config = MambaConfig(vocab_size=97, hidden_size=64, num_hidden_layers=2, state_size=8)
    with pytest.raises(NotPackable, match="linear_attention"):
        refuse_unpackable(MambaForCausalLM(config).eval())

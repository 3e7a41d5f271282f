"""Generation over the shared prefix, against `model.generate` and against its own log-probs."""

import pytest
import torch
from transformers import PreTrainedModel

from grpo import generation
from grpo.decoding import bucket_of_rows
from grpo.generation import generate_groups
from grpo.logprobs import completion_logprobs
from grpo.rollout import Completion
from grpo.sampling import Sampling, random_key, uniform
from grpo.shared_prefix import KeysAndValues, Layout, attend_in_one, attend_in_parts
from tests.tiny import FAMILIES, fresh_seed, tiny_model, tiny_prompts

GREEDY = Sampling(temperature=0)
LENGTHS = (5, 17, 1, 33, 8)


def reference_greedy(
    model: PreTrainedModel, prompts: list[list[int]], tokens: int, stop_ids: list[int]
) -> list[list[int]]:
    """What `model.generate` gives for each prompt alone, with PyTorch's own attention."""
    model.set_attn_implementation("sdpa")
    outputs = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        output = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=tokens,
            do_sample=False,
            eos_token_id=stop_ids,
            pad_token_id=0,
        )
        outputs.append(output[0, len(prompt) :].tolist())
    return outputs


@pytest.mark.parametrize("max_rows", [2, 7, 64])
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_equals_generate_token_for_token(family: str, max_rows: int) -> None:
    """Prompts of mixed lengths in few rows, so that ended rows are dropped and prompts wait."""
    seed = fresh_seed()
    model, prompts = tiny_model(family, seed), tiny_prompts(LENGTHS, seed)
    stops = [7, 9, 11, 13]
    expected = reference_greedy(model, prompts, 24, stops)
    groups = generate_groups(
        model,
        prompts,
        group_size=3,
        max_new_tokens=24,
        sampling=GREEDY,
        stop_ids=stops,
        max_rows=max_rows,
    )
    for group, tokens in zip(groups, expected, strict=True):
        for completion in group:
            assert completion.token_ids == tokens
            stopped = tokens[-1] in stops
            assert completion.finish_reason == ("stop" if stopped else "length")


def sampled(
    model: PreTrainedModel, prompts: list[list[int]], seed: int, **changes: object
) -> list[list[Completion]]:
    arguments = {
        "group_size": 4,
        "max_new_tokens": 24,
        "sampling": Sampling(temperature=0.7),
        "stop_ids": [7, 9],
        "seed": seed,
        **changes,
    }
    return generate_groups(model, prompts, **arguments)


@pytest.mark.parametrize("family", FAMILIES)
def test_recorded_logprobs_agree_with_the_first_scored_ones(family: str) -> None:
    seed = fresh_seed()
    model, prompts = tiny_model(family, seed), tiny_prompts(LENGTHS, seed)
    for prompt, group in zip(prompts, sampled(model, prompts, seed), strict=True):
        scored = completion_logprobs(model, prompt, [c.token_ids for c in group], temperature=0.7)
        for completion, logprobs in zip(group, scored, strict=True):
            recorded = torch.tensor(completion.logprobs)
            torch.testing.assert_close(recorded, logprobs.detach(), rtol=0, atol=1e-5)


def test_tokens_do_not_depend_on_the_batch_or_the_order() -> None:
    """Other rows, other order, other looks: where a token differs, it is shown to be rounding."""
    seed = fresh_seed()
    model, prompts = tiny_model("llama", seed), tiny_prompts(LENGTHS, seed)
    together = sampled(model, prompts, seed)
    backwards = sampled(model, prompts[::-1], seed, prompt_ids=[4, 3, 2, 1, 0], max_rows=5)
    alone = [sampled(model, [p], seed, prompt_ids=[i])[0] for i, p in enumerate(prompts)]
    for other in (backwards[::-1], alone):
        for i, (a, b) in enumerate(zip(together, other, strict=True)):
            for j, (x, y) in enumerate(zip(a, b, strict=True)):
                key = random_key(seed, 0, i, j)
                assert_first_difference_is_rounding(model, prompts[i], x, y, key, 1e-5)


def assert_first_difference_is_rounding(
    model: PreTrainedModel,
    prompt: list[int],
    a: Completion,
    b: Completion,
    key: torch.Tensor,
    eps: float,
) -> None:
    """Where two completions part, the uniform number lies within `eps` of a boundary of the
    distribution (computed from the prompt and what both have in common), never elsewhere."""
    if a.token_ids == b.token_ids:
        return
    place = next(
        (t for t, (x, y) in enumerate(zip(a.token_ids, b.token_ids, strict=False)) if x != y), None
    )
    assert place is not None, "one completion is cut short of the other"
    with torch.no_grad():
        logits = model(torch.tensor([prompt + a.token_ids[:place]]), use_cache=False).logits[0, -1]
    boundaries = (logits.double() / 0.7).softmax(-1).cumsum(-1)
    u = uniform(key, torch.tensor([place])).item()
    low, high = sorted((a.token_ids[place], b.token_ids[place]))
    assert high == low + 1 and abs(boundaries[low] - u) < eps


def test_another_seed_step_or_prompt_id_gives_other_tokens() -> None:
    model, prompts = tiny_model(), tiny_prompts((6,), 1)
    first = sampled(model, prompts, 0)
    for changes in ({"step": 1}, {"prompt_ids": [1]}, {"seed": 1}):
        other = sampled(model, prompts, **{"seed": 0, **changes})
        assert [c.token_ids for c in other[0]] != [c.token_ids for c in first[0]]


def test_same_call_same_bits() -> None:
    model, prompts = tiny_model(dtype=torch.bfloat16), tiny_prompts(LENGTHS, 3)
    assert sampled(model, prompts, 5) == sampled(model, prompts, 5)


def test_each_sample_has_its_own_limit_and_on_finish_hears_of_each_once() -> None:
    seed = fresh_seed()
    model, prompts = tiny_model("qwen2", seed), tiny_prompts((4, 9), seed)
    limits = [[1, 5, 20], [2, 13, 3]]
    heard: dict[tuple[int, int], Completion] = {}

    def on_finish(prompt: int, sample: int, completion: Completion) -> None:
        assert (prompt, sample) not in heard
        heard[prompt, sample] = completion

    groups = generate_groups(
        model,
        prompts,
        group_size=3,
        max_new_tokens=limits,
        sampling=Sampling(),
        stop_ids=[],
        on_finish=on_finish,
        max_rows=4,
    )
    for i, group in enumerate(groups):
        for j, completion in enumerate(group):
            assert len(completion.token_ids) == len(completion.logprobs) == limits[i][j]
            assert completion.finish_reason == "length"
            assert heard[i, j] is completion


def test_a_stop_token_at_the_limit_counts_as_a_stop() -> None:
    model, prompts = tiny_model(), tiny_prompts((4,), 2)
    every_token_stops = list(range(97))
    group = sampled(model, prompts, 0, stop_ids=every_token_stops, max_new_tokens=1)[0]
    assert {c.finish_reason for c in group} == {"stop"}
    assert {len(c.token_ids) for c in group} == {1}


def test_nothing_follows_the_first_stop_token(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows run on until the host looks; what they wrote meanwhile is not part of the completion."""
    monkeypatch.setattr(generation, "STEPS_BETWEEN_LOOKS", 1)
    model, prompts = tiny_model(), tiny_prompts(LENGTHS, 4)
    stops = list(range(0, 97, 6))
    looked_often = sampled(model, prompts, 1, stop_ids=stops)
    monkeypatch.setattr(generation, "STEPS_BETWEEN_LOOKS", 16)
    looked_rarely = sampled(model, prompts, 1, stop_ids=stops)
    for a, b in zip(looked_often, looked_rarely, strict=True):
        assert [c.token_ids for c in a] == [c.token_ids for c in b]
        for completion in a:
            assert not set(completion.token_ids[:-1]) & set(stops)


def test_the_model_is_left_as_it_was() -> None:
    model, prompts = tiny_model(), tiny_prompts((4,), 2)
    expected = model(torch.tensor(prompts)).logits
    model.train()
    sampled(model, prompts, 0)
    assert model.training
    torch.testing.assert_close(model.eval()(torch.tensor(prompts)).logits, expected)


def test_bad_arguments_are_refused() -> None:
    model = tiny_model()
    with pytest.raises(ValueError, match="empty"):
        sampled(model, [[]], 0)
    with pytest.raises(ValueError, match="at least 1"):
        sampled(model, [[1]], 0, max_new_tokens=0)
    with pytest.raises(ValueError, match="1 lists of 4"):
        sampled(model, [[1]], 0, max_new_tokens=[[3, 3]])
    assert sampled(model, [], 0) == []


def test_buckets_hold_their_rows() -> None:
    sizes = [bucket_of_rows(rows) for rows in range(0, 70)]
    assert all(size >= max(2, rows) for rows, size in enumerate(sizes))
    assert sorted(set(sizes)) == [2, 4, 8, 16, 24, 32, 40, 48, 56, 64, 72]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("in_order", [False, True])
def test_attention_in_parts_equals_one_softmax(dtype: torch.dtype, in_order: bool) -> None:
    """Over prompts and branches of mixed lengths, with a spare lane and rows out of order."""
    generator = torch.Generator().manual_seed(fresh_seed())
    rows, slots, heads, queries, size = (4, 2, 2, 3, 8) if in_order else (3, 2, 2, 3, 8)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    def mask(lengths: list[int], places: int) -> torch.Tensor:
        hidden = torch.arange(places) >= torch.tensor(lengths)[:, None]
        wide = torch.promote_types(dtype, torch.float32)
        return torch.zeros(hidden.shape, dtype=wide).masked_fill(hidden, -torch.inf)[:, None, None]

    layout = Layout(
        own_length=torch.zeros(rows, dtype=torch.long),
        prefix_mask=mask([7, 4], 7),
        own_mask=mask([1, 5, 3, 2][:rows], 5),
        row_of_lane=torch.tensor([0, 1, 2, 3] if in_order else [1, 0, 2, 0]),
        lane_of_row=None if in_order else torch.tensor([1, 0, 2]),
    )
    query = random(rows, heads, queries, size)
    prefix = KeysAndValues(random(slots, heads, 7, size), random(slots, heads, 7, size))
    own = KeysAndValues(random(rows, heads, 5, size), random(rows, heads, 5, size))
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 0.03}[dtype]
    in_parts = attend_in_parts(layout, query, prefix, own, 0.3)
    exact = (query.double(), *(KeysAndValues(*(x.double() for x in kv)) for kv in (prefix, own)))
    in_one = attend_in_one(layout, *exact, 0.3)
    torch.testing.assert_close(in_parts.double(), in_one, rtol=0, atol=tolerance)
    # And both are softmax over what the prompt and the branch show, written out for each row.
    lanes = range(4) if in_order else [1, 0, 2]
    for row, lane in enumerate(lanes):
        slot = lane // 2
        parts = [(prefix, slot, [7, 4][slot]), (own, row, [1, 5, 3, 2][row])]
        keys, values = (
            torch.cat([getattr(part, name)[i, :, :seen] for part, i, seen in parts], 1).double()
            for name in ("keys", "values")
        )
        weights = (query[row].double() @ keys.transpose(-1, -2) * 0.3).softmax(-1)
        torch.testing.assert_close(in_one[row], weights @ values, rtol=0, atol=1e-12)

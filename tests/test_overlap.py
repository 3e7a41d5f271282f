"""The judges read while completions grow and while the reference is run."""

import threading
from concurrent.futures import Future

import pytest
import torch

from grpo.config import Config, EvaluationConfig, GRPOConfig, RolloutConfig
from grpo.parallel import Ranks, pick_device, start_ranks
from grpo.rollout import Prompt
from grpo.sharding import frozen_copy, shard
from grpo.trainer import Trainer
from tests.tiny import fresh_seed, tiny_model, tiny_prompts


class LateJudges:
    """Rewards that come only once the reference has been run; whoever waits for them before fails,
    after a while."""

    def __init__(self) -> None:
        self.events: list[str] = []
        self.pending: list[Future] = []
        self.patience = threading.Timer(60, self.give_up)
        self.patience.start()

    def submit(self, prompt: str, completion: str, completion_ids: list[int]) -> Future:
        self.events.append("submitted")
        self.pending.append(Future())
        return self.pending[-1]

    def answer(self) -> None:
        self.patience.cancel()
        self.events.append("answered")
        for number, future in enumerate(self.pending):
            future.set_result(float(number))

    def give_up(self) -> None:
        for future in self.pending:
            future.set_exception(RuntimeError("waited for before the reference was run"))


class Tokenizer:
    def decode(self, token_ids: list[int], skip_special_tokens: bool) -> str:
        return " ".join(map(str, token_ids))


@pytest.mark.parametrize("max_rows", [4, 16])
def test_judging_is_hidden_behind_generation_and_the_reference(
    monkeypatch: pytest.MonkeyPatch, max_rows: int
) -> None:
    seed = fresh_seed()
    judges = LateJudges()
    with start_ranks(pick_device("cpu")) as ranks:
        trainer = make_trainer(ranks, seed, judges, max_rows)
        generate, remember = trainer.generator.get_decoder().forward, trainer.remember_reference

        def grow(*arguments: object, **options: object) -> object:
            judges.events.append("grown")
            return generate(*arguments, **options)

        def remember_then_answer(samples: object) -> None:
            remember(samples)
            judges.events.append("reference")
            judges.answer()

        monkeypatch.setattr(trainer.generator.get_decoder(), "forward", grow)
        monkeypatch.setattr(trainer, "remember_reference", remember_then_answer)
        prompts = [Prompt(i, "", ids, {}) for i, ids in enumerate(tiny_prompts((5, 9), seed))]
        groups = trainer.rollout(0, prompts)
    rewards = {c.reward for group in groups for c in group.completions}
    assert rewards == set(map(float, range(8)))
    assert judges.events[-2:] == ["reference", "answered"]
    first, last = judges.events.index("submitted"), judges.events.index("reference")
    assert judges.events[:last].count("submitted") == 8
    if max_rows == 4:  # the second group grows while the first is judged
        assert "grown" in judges.events[first:last]


def make_trainer(ranks: Ranks, seed: int, judges: LateJudges, max_rows: int) -> Trainer:
    policy = shard(tiny_model("llama", seed), ranks, torch.float32)
    return Trainer(
        config=Config(
            seed=seed,
            rollout=RolloutConfig(max_completion_tokens=12, max_rows=max_rows),
            grpo=GRPOConfig(group_size=4, prompts_per_step=2),
            evaluation=EvaluationConfig(),
        ),
        ranks=ranks,
        reference=frozen_copy(policy),
        policy=policy,
        tokenizer=Tokenizer(),
        stop_ids=[7],
        reward=judges,
        steps=1,
    )

"""A whole training step, ours against the `GRPOTrainer` of TRL: time and peak memory.

    pip install -e ".[bench]"
    python -m benchmarks.step                     equal lengths, and ragged ones
    python -m benchmarks.step --growth            also with the group and with the prompt

The same on both sides: model, prompts, lengths of completions, float32 weights computed in bf16,
a reference with β = .01, checkpointing, and a reward that costs nothing.
"""

import tempfile
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from transformers import LogitsProcessorList, TrainerCallback

import grpo.trainer
from benchmarks.common import END, Case, make_model, make_tokenizer, run
from benchmarks.generation import EndAt
from grpo.config import Config, GRPOConfig, RolloutConfig, TrainConfig
from grpo.generation import generate_groups
from grpo.parallel import pick_device, start_ranks
from grpo.rollout import Prompt
from grpo.sharding import frozen_copy, shard

KL_COEF, LEARNING_RATE = 0.01, 1e-6


def reward(prompts: Any, completions: Any, completion_ids: Any, **columns: Any) -> list[float]:
    """Some number for each completion."""
    return [sum(ids) % 97 / 97 for ids in completion_ids]


def words(token_ids: Sequence[int]) -> str:
    """A text that `make_tokenizer` cuts into these tokens."""
    return " ".join(f"t{i}" for i in token_ids)


def ours(case: Case) -> Iterator[None]:
    """A turn is one step of `Trainer`, on this one process."""

    def forced(*arguments: Any, **settings: Any) -> Any:
        lengths = {"max_new_tokens": case.lengths(), "stop_ids": []}
        return generate_groups(*arguments, **(settings | lengths))

    grpo.trainer.generate_groups = forced
    config = Config(
        rollout=RolloutConfig(case.prompt_tokens, case.new_tokens, max_rows=case.rows),
        grpo=GRPOConfig(group_size=case.group_size, prompts_per_step=case.prompts, kl_coef=KL_COEF),
        train=TrainConfig(learning_rate=LEARNING_RATE, gradient_checkpointing=True),
    )
    with start_ranks(pick_device("auto")) as ranks:
        model = make_model(case.model, torch.float32)
        policy = shard(model, ranks, torch.bfloat16)
        trainer = grpo.trainer.Trainer(
            config=config,
            ranks=ranks,
            reference=frozen_copy(policy),
            policy=policy,
            tokenizer=make_tokenizer(model.config.vocab_size),
            stop_ids=[END],
            reward=reward,
            steps=1000,
        )
        turn = 0
        while True:
            yield
            prompts = [Prompt(i, words(p), p, {}) for i, p in enumerate(case.prompt_ids(turn))]
            trainer.rollout(turn, prompts)
            trainer.update(turn)
            turn += 1


class OneAtATime(TrainerCallback):
    """Holds the training loop before each step until it is let go."""

    def __init__(self) -> None:
        self.go, self.done = threading.Semaphore(0), threading.Semaphore(0)

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        """Wait for the turn."""
        self.go.acquire()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Say that it is over."""
        self.done.release()


def trl(case: Case) -> Iterator[None]:
    """A turn is one step of TRL's loop, which runs in a thread of its own."""
    from datasets import Dataset
    from trl import GRPOConfig as TRLConfig
    from trl import GRPOTrainer

    folder = tempfile.mkdtemp()
    model = make_model(case.model, torch.float32)
    tokenizer = make_tokenizer(model.config.vocab_size)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    del model
    prompts = [words(ids) for turn in range(8) for ids in case.prompt_ids(turn)]
    turns = OneAtATime()
    trainer = GRPOTrainer(
        model=folder,
        reward_funcs=reward,
        train_dataset=Dataset.from_list([{"prompt": prompt} for prompt in prompts]),
        processing_class=tokenizer,
        callbacks=[turns],
        args=TRLConfig(
            output_dir=folder,
            model_init_kwargs={"dtype": "float32"},
            per_device_train_batch_size=case.rows,
            num_generations=case.group_size,
            max_completion_length=case.new_tokens,
            temperature=1.0,
            beta=KL_COEF,
            learning_rate=LEARNING_RATE,
            bf16=True,
            gradient_checkpointing=True,
            max_steps=1000,
            use_cpu=not torch.cuda.is_available(),
            report_to=[],
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
        ),
    )
    lengths = sum(case.lengths(), [])
    generate = trainer.model.generate

    def forced(*arguments: Any, **settings: Any) -> Any:
        processors = LogitsProcessorList([EndAt(case.prompt_tokens, lengths)])
        return generate(*arguments, **settings, logits_processor=processors)

    trainer.model.generate = forced
    failures: list[BaseException] = []

    def train() -> None:
        try:
            trainer.train()
        except BaseException as failure:
            failures.append(failure)
            turns.done.release()

    threading.Thread(target=train, daemon=True).start()
    while True:
        yield
        turns.go.release()
        turns.done.acquire()
        if failures:
            raise failures[0]


if __name__ == "__main__":
    run(__doc__, {"ours": ours, "TRL": trl})

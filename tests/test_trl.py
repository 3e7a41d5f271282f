"""`PermReward` in another trainer's hands: TRL's, for two real steps (extra `bench`)."""

from pathlib import Path

import pytest

import data
from perm_reward import JudgeConfig, PermReward, Seeker, make_judge, policy_messages

pytestmark = pytest.mark.bench

RECORDS, GROUP_SIZE, STEPS = 8, 4, 2


def test_trl_s_trainer_takes_perm_as_a_reward_function(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    trl = pytest.importorskip("trl")

    records = data.load_records("bundled")[:RECORDS]
    rows = [
        {
            "prompt": policy_messages(Seeker(record.persona, record.scenario, record.query)),
            "persona": record.persona,
            "scenario": record.scenario,
            "query": record.query,
        }
        for record in records
    ]
    seen: list[tuple[str, list[float | None]]] = []

    class Watched(PermReward):
        def __call__(self, *arguments: object, **columns: object) -> list[float | None]:
            rewards = super().__call__(*arguments, **columns)
            seen.extend(zip(columns["query"], rewards, strict=True))
            return rewards

    with Watched(make_judge(JudgeConfig(kind="lexical"))) as reward:
        trainer = trl.GRPOTrainer(
            model=str(data.embedded_policy()),
            reward_funcs=reward,
            args=trl.GRPOConfig(
                output_dir=str(tmp_path),
                per_device_train_batch_size=GROUP_SIZE,
                num_generations=GROUP_SIZE,
                max_completion_length=96,
                max_steps=STEPS,
                logging_steps=1,
                save_strategy="no",
                report_to=[],
                use_cpu=True,
            ),
            train_dataset=datasets.Dataset.from_list(rows),
        )
        trainer.train()

    assert len(seen) == STEPS * GROUP_SIZE
    assert {query for query, _ in seen} <= {record.query for record in records}
    assert all(value is not None for _, value in seen), "lexical: every completion has a reward"
    assert len({value for _, value in seen}) > 1
    logged = [entry["reward"] for entry in trainer.state.log_history if "reward" in entry]
    for step, mean in enumerate(logged):
        values = [value for _, value in seen[step * GROUP_SIZE : (step + 1) * GROUP_SIZE]]
        assert mean == pytest.approx(sum(values) / GROUP_SIZE, abs=1e-4)
    assert len(logged) == STEPS

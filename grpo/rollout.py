"""What one step produced: completions in groups, one group per prompt, to and from JSON lines."""

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class Prompt:
    """What the policy is asked: its text and tokens, and the record that the reward is given.

    `prompt_id` names it for good (its place in the data), and with it its random numbers.
    """

    prompt_id: int
    text: str
    token_ids: list[int]
    record: dict[str, Any]


@dataclass
class Completion:
    """One sampled answer.

    `logprobs[t]` is log p(token_ids[t]) under softmax(logits / temperature), unfiltered, as the
    generation copy saw it. The stop token that ended the completion is part of it, nothing after
    it is. `text`, `reward`, `details` and `advantage` are filled in as the step goes on.
    """

    token_ids: list[int]
    logprobs: list[float]
    finish_reason: FinishReason
    text: str = ""
    reward: float | None = None
    details: dict[str, Any] = field(default_factory=dict)
    advantage: float = 0.0


@dataclass
class Group:
    """A prompt and its G completions: the unit of work from generation to the update."""

    prompt: Prompt
    completions: list[Completion]

    @property
    def rewards(self) -> list[float]:
        """The G rewards, with NaN where no judge could score, as `group_advantages` wants them."""
        return [float("nan") if c.reward is None else c.reward for c in self.completions]

    @property
    def tokens(self) -> int:
        """Tokens of its packed row: the prompt once, and each completion."""
        completions = sum(len(completion.token_ids) for completion in self.completions)
        return len(self.prompt.token_ids) + completions

    def to_json(self, **extra: Any) -> str:
        """One line of JSON; floats are written so that they read back bit for bit."""
        return json.dumps({**extra, **asdict(self)}, ensure_ascii=False)

    @classmethod
    def from_json(cls, line: str) -> "Group":
        """The group that `to_json` wrote; keys it does not know are left out."""
        data = json.loads(line)
        completions = [Completion(**completion) for completion in data["completions"]]
        return cls(Prompt(**data["prompt"]), completions)


def write_groups(path: Path, step: int, groups: Iterable[Group]) -> None:
    """Append the groups of one step to the rollout file at `path`."""
    with path.open("a", encoding="utf-8") as file:
        file.writelines(group.to_json(step=step) + "\n" for group in groups)


def read_groups(path: Path, step: int | None = None) -> Iterator[Group]:
    """The groups of a rollout file, of one step or (None) of all."""
    with path.open(encoding="utf-8") as file:
        for line in file:
            if step is None or json.loads(line)["step"] == step:
                yield Group.from_json(line)

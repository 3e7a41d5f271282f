"""What the judges of a run will cost at most, before the first call is paid."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from perm_reward.judges import JudgeConfig
from perm_reward.prompts import Seeker, judge_messages
from perm_reward.rubrics import ROLES, Rubric

# Of English text, as tokenizers of 100,000 and more words cut it.
CHARACTERS_PER_TOKEN = 4.5
# Of a reply: a sentence of reason and the score, or the bystander's lines.
REPLY_TOKENS = 60


@dataclass(frozen=True)
class Estimate:
    """Calls, tokens and money of a run, if every completion is judged."""

    calls: int
    prompt_tokens: int
    completion_tokens: int
    money: float

    def __str__(self) -> str:
        tokens = f"{in_short(self.prompt_tokens)} tokens of prompts and "
        words = f"at most {self.calls:,} calls, about {tokens}{in_short(self.completion_tokens)}"
        return f"{words} of replies" + (f": {in_money(self.money)} in money" if self.money else "")


def estimate(
    config: JudgeConfig, seekers: Sequence[Seeker], completions: int, completion_tokens: int
) -> Estimate:
    """What judging so many completions of at most so many tokens costs.

    Counted for the paid judges only; no part of a prompt is taken to be found in a cache.
    """
    rubrics = config.read_rubrics()
    calls, prompt_tokens, replies, money = 0, 0, 0, 0.0
    for role in ROLES:
        own = config.of(role)
        if own.kind != "openai":
            continue
        asked = completions * own.samples
        per_call = prompt_length(role, seekers, rubrics) + completion_tokens / 2
        calls += asked
        prompt_tokens += round(asked * per_call)
        replies += asked * REPLY_TOKENS
        money += asked * (per_call * own.price_input + REPLY_TOKENS * own.price_output) / 1e6
    return Estimate(calls, prompt_tokens, replies, money)


def prompt_length(role: str, seekers: Sequence[Seeker], rubrics: dict[str, Rubric]) -> float:
    """Mean tokens of what a judge is asked, without what it is to judge."""
    characters = [
        sum(len(m["content"]) for m in judge_messages(role, seeker, "", rubrics=rubrics))
        for seeker in seekers
    ]
    return fmean(characters) / CHARACTERS_PER_TOKEN


def in_money(amount: float) -> str:
    """An amount with two digits after the point, or (below 1) two that say something."""
    return f"{amount:,.2f}" if amount >= 1 or not amount else f"{amount:.2g}"


def in_short(number: int) -> str:
    """61400000 as "61.4M"."""
    for size, letter in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if number >= size:
            return f"{number / size:.3g}{letter}"
    return str(number)

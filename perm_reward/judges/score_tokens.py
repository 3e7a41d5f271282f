"""How a tokenizer writes the numbers of a scale, and how probable each of them is.

One tokenizer writes 17 as one token, another as 1 and 7; one joins the blank before a number with
it, another does not. So it is read off the tokenizer. A number is there when its tokens are, and no
further digit follows (whoever writes 85 does not mean 8):

    P(n) = Π_k P(t_k | t_1 … t_{k-1}) · (1 − Σ_d P(d | t_1 … t_K))

with t_1 … t_K the tokens of n, and d those tokens that would make of it a longer number.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from statistics import fmean

from perm_reward.judges.token_tree import Tokens, common_length

Distribution = dict[int, float]
"""the probability of each number of a scale; what they lack to 1 is not on the scale"""


class UnreadableScale(ValueError):
    """The tokenizer does not write the numbers of a scale so that they can be told apart."""


@dataclass(frozen=True)
class ScoreTokens:
    """What may follow a prompt: a label and a number of a scale, "Score: 4"."""

    written: dict[int, Tokens]
    """for each number the tokens of label and number"""
    longer: dict[int, Tokens]
    """for each number the tokens that, right behind it, make it a longer one"""

    @cached_property
    def places(self) -> dict[Tokens, Tokens]:
        """What is to be read: behind each key (and the prompt) the log-probs of these tokens."""
        wanted: dict[Tokens, set[int]] = {}
        for number, written in self.written.items():
            for k in range(self._label_length, len(written)):
                wanted.setdefault(written[:k], set()).add(written[k])
            if self.longer[number]:
                wanted.setdefault(written, set()).update(self.longer[number])
        return {place: tuple(sorted(tokens)) for place, tokens in sorted(wanted.items())}

    def distribution(self, logprobs: Mapping[Tokens, Mapping[int, float]]) -> Distribution:
        """The formula above, from what was read at `places`."""
        numbers = {}
        for number, written in self.written.items():
            logprob = sum(
                logprobs[written[:k]][written[k]] for k in range(self._label_length, len(written))
            )
            goes_on = sum(math.exp(logprobs[written][digit]) for digit in self.longer[number])
            ends = 0.0 if goes_on > 1 else 1 - goes_on  # by rounding; NaN stays NaN
            numbers[number] = math.exp(logprob) * ends
        return numbers

    @cached_property
    def _label_length(self) -> int:
        """Tokens that all numbers begin with."""
        return common_length(min(self.written.values()), max(self.written.values()))


def find_score_tokens(
    encode: Callable[[str], list[int]], prompt: str, label: str, numbers: Iterable[int]
) -> ScoreTokens:
    """How `encode` writes "label: number" behind a prompt.

    Only the end of the prompt matters: it stands for all that end alike.

    Raises:
        UnreadableScale: a number's tokens are not its own, or begin within the prompt.
    """
    before = tuple(encode(prompt))

    @cache
    def written(number: str) -> Tokens:
        tokens = tuple(encode(f"{prompt}{label}: {number}"))
        if tokens[: len(before)] != before:
            raise UnreadableScale(f'it joins the end of the prompt with "{label}"')
        return tokens[len(before) :]

    found, longer = {}, {}
    for number in numbers:
        found[number] = written(str(number))
        length = len(found[number])
        going_on = [written(f"{number}{digit}") for digit in range(10)]
        longer[number] = tuple(
            sorted({t[length] for t in going_on if t[:length] == found[number] and t[length:]})
        )
    score_tokens = ScoreTokens(found, longer)
    has_own = all(len(tokens) > score_tokens._label_length for tokens in found.values())
    if not has_own or len(set(found.values())) < len(found):
        raise UnreadableScale(f'it writes numbers behind "{label}: " that cannot be told apart')
    return score_tokens


def expectation(distribution: Distribution) -> float:
    """Σ n · P(n) / Σ P(n), of the numbers on the scale; NaN where none has any probability."""
    on_scale = math.fsum(distribution.values())
    if not on_scale > 0:
        return math.nan
    mean = fmean(distribution, weights=distribution.values())
    return min(max(mean, min(distribution)), max(distribution))  # rounding may leave the scale


def in_words(label: str, distribution: Distribution) -> str:
    """What was read: "Score: 3.42 (1: 2 %, 3: 40 %, …, on the scale: 97 %)".

    Percentages are of what lies on the scale; numbers below half a percent are left out.
    """
    on_scale = math.fsum(distribution.values())
    shares = [
        f"{number}: {100 * probability / on_scale:.0f} %"
        for number, probability in distribution.items()
        if probability >= 0.005 * on_scale > 0
    ]
    read = ", ".join([*shares, f"on the scale: {100 * on_scale:.3g} %"])
    return f"{label}: {expectation(distribution):.2f} ({read})"

"""The embedded default judge: transparent rules over the text, so that a first run needs no key.

It is a stand-in for demos and tests, NOT a measure of empathy. It cannot tell meaning from its
outer signs: whether a feeling is the right one when the record does not name it, whether words
are wise, or whether facts are invented. English only. The same text always gets the same verdict,
and each verdict lists, rule by rule, what was found and the points that follow from it.

Each rule gives its share of the points that the tables below allow, rounded to a whole number;
merits add, faults take away:

    stages:     points = Σ merits − Σ faults, held within 0 to 100
                score = 1 + points / 25, rounded
    bystander:  each of five parts = Σ merits − Σ faults, held within 0 to 20
                total = Σ parts
"""

from collections.abc import Callable
from functools import cache

from perm_reward.judges import lexical_faults as faults
from perm_reward.judges import lexical_merits as merits
from perm_reward.judges.lexical_text import Finding, Record, Text, read_record, read_text
from perm_reward.prompts import Seeker
from perm_reward.verdict import Verdict

Rule = Callable[[Text, Record], Finding]
Table = tuple[tuple[Rule, int], ...]

# What no text may do, whatever it earns: all that a stage can give, all that a part can give.
_GATES: tuple[Rule, ...] = (
    faults.copies,
    faults.repeats,
    faults.lists_words,
    faults.breaks_grammar,
    faults.lists_feelings,
    faults.is_too_long,
)
_STAGE_GATES: Table = tuple((rule, -100) for rule in _GATES)
_PART_GATES: Table = tuple((rule, -20) for rule in _GATES)

STAGES: dict[str, Table] = {
    "resonation": (
        (merits.names_feelings, 24),
        (merits.uses_own_words, 20),
        (merits.names_cause, 20),
        (merits.looks_underneath, 16),
        (merits.joins_contrasts, 8),
        (merits.has_sensible_length, 6),
        (merits.has_plain_sentences, 6),
        (faults.contradicts_feelings, -30),
        (faults.stays_vague, -24),
        (faults.uses_stock_phrases, -24),
        (faults.flatters, -16),
        (faults.asks_too_much, -30),
        *_STAGE_GATES,
    ),
    "expression": (
        (merits.uses_own_words, 28),
        (merits.joins_person_and_story, 24),
        (merits.names_feelings, 18),
        (merits.says_much_in_few_words, 14),
        (merits.speaks_to_the_person, 8),
        (merits.varies, 8),
        (faults.uses_stock_phrases, -30),
        (faults.flatters, -24),
        (faults.speaks_about_the_person, -30),
        (faults.waves_off, -20),
        (faults.pads, -16),
        (faults.contradicts_feelings, -24),
        (faults.asks_too_much, -60),
        *_STAGE_GATES,
    ),
    "reception": (
        (merits.names_feelings, 20),
        (merits.invites_to_go_on, 20),
        (merits.validates, 16),
        (merits.opens_a_way, 14),
        (merits.uses_own_words, 18),
        (merits.speaks_to_the_person, 6),
        (merits.has_sensible_length, 6),
        (faults.waves_off, -30),
        (faults.uses_stock_phrases, -24),
        (faults.flatters, -20),
        (faults.speaks_about_the_person, -24),
        (faults.contradicts_feelings, -30),
        (faults.pads, -16),
        (faults.asks_too_much, -60),
        *_STAGE_GATES,
    ),
}

BYSTANDER: dict[str, Table] = {
    "Content effectiveness": (
        (merits.uses_own_words, 8),
        (merits.joins_person_and_story, 4),
        (merits.opens_a_way, 4),
        (merits.invites_to_go_on, 4),
        (faults.waves_off, -6),
        (faults.asks_too_much, -12),
        *_PART_GATES,
    ),
    "Structure and clarity": (
        (merits.has_plain_sentences, 12),
        (merits.varies, 8),
        (faults.asks_too_much, -8),
        *_PART_GATES,
    ),
    "Communication efficiency": (
        (merits.says_much_in_few_words, 12),
        (merits.has_sensible_length, 8),
        (faults.pads, -12),
        (faults.uses_stock_phrases, -12),
        *_PART_GATES,
    ),
    "Objectivity": (
        (merits.says_something, 20),
        (faults.flatters, -14),
        (faults.exaggerates, -10),
        (faults.waves_off, -10),
        (faults.contradicts_feelings, -6),
        *_PART_GATES,
    ),
    "Accuracy and verifiability": (
        (merits.says_something, 14),
        (merits.uses_own_words, 6),
        (faults.promises, -12),
        (faults.adds_names, -10),
        *_PART_GATES,
    ),
}


class LexicalJudge:
    """A `perm_reward.judges.Judge` without a model: deterministic rules, no network."""

    label = "lexical (a stand-in for demos and tests, not a measure of empathy)"

    def check(self) -> None:
        """Nothing can be missing."""

    async def judge(self, role: str, seeker: Seeker, judged_text: str) -> Verdict:
        """The verdict of one role; its reply lists each rule that gave or took points.

        Raises:
            ValueError: unknown role.
        """
        text, record = read_text(judged_text), read_record(seeker)

        @cache  # the bystander's parts share rules
        def finding(rule: Rule) -> Finding:
            return rule(text, record)

        if role == "bystander":
            score, lines = _bystander(finding)
        elif role in STAGES:
            score, lines = _stage(STAGES[role], finding)
        else:
            raise ValueError(f"role = {role}: must be bystander or one of {', '.join(STAGES)}")
        return Verdict(role, float(score), "\n".join([self.label, *lines]))

    async def close(self) -> None:
        """Nothing is open."""


def _stage(table: Table, finding: Callable[[Rule], Finding]) -> tuple[int, list[str]]:
    points, lines = _points(table, finding)
    held = min(100, max(0, points))
    score = round(1 + held / 25)  # never half-way: points are whole
    sum_line = f"{points} points, held within 0 to 100: {held}, and 1 for each 25, rounded"
    return score, [*lines, sum_line, f"Score: {score}"]


def _bystander(finding: Callable[[Rule], Finding]) -> tuple[int, list[str]]:
    total, lines = 0, []
    for part, table in BYSTANDER.items():
        points, part_lines = _points(table, finding)
        held = min(20, max(0, points))
        total += held
        lines += [*part_lines, f"{part}: {held}"]
    return total, [*lines, f"Total: {total}"]


def _points(table: Table, finding: Callable[[Rule], Finding]) -> tuple[int, list[str]]:
    """The sum of a table's points, and a line for each rule: points, rule, what it found."""
    points, lines = 0, []
    for rule, most in table:
        share, found = finding(rule)
        given = round(share * most)
        points += given
        if most > 0 or given:
            name = rule.__name__.replace("_", " ")
            lines.append(f"{given:+d} ({name}, at most {most:+d}): {found}")
    return points, lines

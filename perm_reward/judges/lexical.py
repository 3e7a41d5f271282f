"""The embedded default judge: transparent rules over the text, so that a first run needs no key.

It is a stand-in for demos and tests, NOT a measure of empathy. It cannot tell meaning from its
outer signs: whether a feeling is the right one when the record does not name it, whether words are
wise, or whether facts are invented. English only. It always gives the same verdict on the same text,
and each verdict lists, rule by rule, what was found and the points that follow from it.

Each rule gives its share of the points that the tables below allow, rounded to a whole number;
merits add, faults take away:

    stages:     points = Σ merits − Σ faults, held within 0 to 100;   score = 1 + ⌊points / 20⌋, at most 5
    bystander:  each of five parts = Σ merits − Σ faults, held within 0 to 20;   total = Σ parts
"""

from collections.abc import Callable

from perm_reward.judges import lexical_rules as rules
from perm_reward.judges.lexical_text import Record, Text, read_record, read_text
from perm_reward.prompts import Seeker
from perm_reward.verdict import Verdict

Rule = Callable[[Text, Record], rules.Finding]
Table = tuple[tuple[Rule, int], ...]

# What no text may do, whatever it earns: all that a stage can give, all that a part can give.
_GATES: tuple[Rule, ...] = (
    rules.copies,
    rules.repeats,
    rules.lists_words,
    rules.lists_feelings,
    rules.is_too_long,
)
_STAGE_GATES: Table = tuple((rule, -100) for rule in _GATES)
_PART_GATES: Table = tuple((rule, -20) for rule in _GATES)

STAGES: dict[str, Table] = {
    "resonation": (
        (rules.names_feelings, 24),
        (rules.uses_own_words, 20),
        (rules.names_cause, 20),
        (rules.looks_underneath, 16),
        (rules.joins_contrasts, 8),
        (rules.has_sensible_length, 6),
        (rules.has_plain_sentences, 6),
        (rules.contradicts_feeling, -30),
        (rules.stays_vague, -24),
        (rules.uses_stock_phrases, -24),
        (rules.flatters, -16),
        (rules.asks_too_much, -30),
        *_STAGE_GATES,
    ),
    "expression": (
        (rules.uses_own_words, 24),
        (rules.joins_person_and_story, 20),
        (rules.names_feelings, 18),
        (rules.speaks_to_the_person, 12),
        (rules.says_much_in_few_words, 14),
        (rules.varies, 12),
        (rules.uses_stock_phrases, -40),
        (rules.flatters, -30),
        (rules.speaks_about_the_person, -30),
        (rules.waves_off, -24),
        (rules.pads, -24),
        (rules.contradicts_feeling, -24),
        (rules.asks_too_much, -60),
        *_STAGE_GATES,
    ),
    "reception": (
        (rules.names_feelings, 20),
        (rules.invites_to_go_on, 20),
        (rules.validates, 16),
        (rules.opens_a_way, 14),
        (rules.uses_own_words, 18),
        (rules.speaks_to_the_person, 6),
        (rules.has_sensible_length, 6),
        (rules.waves_off, -40),
        (rules.uses_stock_phrases, -30),
        (rules.flatters, -24),
        (rules.speaks_about_the_person, -24),
        (rules.contradicts_feeling, -30),
        (rules.pads, -16),
        (rules.asks_too_much, -60),
        *_STAGE_GATES,
    ),
}

BYSTANDER: dict[str, Table] = {
    "Content effectiveness": (
        (rules.uses_own_words, 8),
        (rules.joins_person_and_story, 4),
        (rules.opens_a_way, 4),
        (rules.invites_to_go_on, 4),
        (rules.waves_off, -6),
        (rules.asks_too_much, -12),
        *_PART_GATES,
    ),
    "Structure and clarity": (
        (rules.has_plain_sentences, 12),
        (rules.varies, 8),
        (rules.asks_too_much, -8),
        *_PART_GATES,
    ),
    "Communication efficiency": (
        (rules.says_much_in_few_words, 12),
        (rules.has_sensible_length, 8),
        (rules.pads, -12),
        (rules.uses_stock_phrases, -12),
        *_PART_GATES,
    ),
    "Objectivity": (
        (rules.is_there, 20),
        (rules.flatters, -14),
        (rules.exaggerates, -10),
        (rules.waves_off, -10),
        (rules.contradicts_feeling, -6),
        *_PART_GATES,
    ),
    "Accuracy and verifiability": (
        (rules.is_there, 14),
        (rules.uses_own_words, 6),
        (rules.promises, -12),
        (rules.adds_names, -10),
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
        if role == "bystander":
            score, lines = _bystander(text, record)
        elif role in STAGES:
            score, lines = _stage(STAGES[role], text, record)
        else:
            raise ValueError(f"role = {role}: must be bystander or one of {', '.join(STAGES)}")
        return Verdict(role, float(score), "\n".join([self.label, *lines]))

    async def close(self) -> None:
        """Nothing is open."""


def _stage(table: Table, text: Text, record: Record) -> tuple[int, list[str]]:
    points, lines = _points(table, text, record)
    held = min(100, max(0, points))
    score = min(5, 1 + held // 20)
    sum_line = f"{points} points, held within 0 to 100: {held}; one level for each full 20"
    return score, [*lines, sum_line, f"Score: {score}"]


def _bystander(text: Text, record: Record) -> tuple[int, list[str]]:
    total, lines = 0, []
    for part, table in BYSTANDER.items():
        points, part_lines = _points(table, text, record)
        held = min(20, max(0, points))
        total += held
        lines += [*part_lines, f"{part}: {held}"]
    return total, [*lines, f"Total: {total}"]


def _points(table: Table, text: Text, record: Record) -> tuple[int, list[str]]:
    """The sum of a table's points, and a line for each rule: points, rule, what it found."""
    points, lines = 0, []
    for rule, most in table:
        share, found = rule(text, record)
        given = round(share * most)
        points += given
        if most > 0 or given:
            name = rule.__name__.replace("_", " ")
            lines.append(f"{given:+d} ({name}, at most {most:+d}): {found}")
    return points, lines

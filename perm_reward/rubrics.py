"""What each of the four judges is asked.

The first three follow the stages of the empathy cycle (Barrett-Lennard, 1981): the supporter
resonates, expresses it, and the seeker receives it. The fourth reads as a bystander and keeps a
model from winning by length, flattery or padding. Scales and what their levels mean are PERM's
(arXiv 2601.10532); the wording is not.

No judge is told what the seeker needs without saying so: to infer it is part of the judging.
"""

import difflib
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, NoReturn

ROLES = ("resonation", "expression", "reception", "bystander")


@dataclass(frozen=True)
class Rubric:
    """One judge's instructions, in the order in which they are shown."""

    shown: Literal["analysis", "response"]
    """which part of the completion this judge reads; never the other one"""
    stance: str
    """who the judge is and what it weighs"""
    scale: tuple[str, ...]
    """one line for each level or dimension"""
    reply_form: str
    """what a reply looks like; `perm_reward.verdict` reads it"""


_SCORE_FORM = """\
Reply with one short sentence that gives your reason and names no number, and then with a last \
line in exactly this form, N being a whole number from 1 to 5:
Score: N"""

RUBRICS = {
    "resonation": Rubric(
        shown="analysis",
        stance="""\
You judge how well a supporter understands a person who came for support. You read the supporter's \
analysis of the situation, which the person never sees. Judge whether it looks through this \
person's own eyes. What the person needs may be left unsaid: work it out from the persona, the \
scenario and the message before you judge. Length and learned words earn nothing.""",
        scale=(
            "1: it contradicts what the person wrote or what is known of them.",
            "2: it names the feeling on the surface, and stops there.",
            "3: it gets the feeling and its cause right, but only as literally told.",
            "4: it joins mixed or conflicting signals with who this person is.",
            "5: it finds what works underneath: why exactly this touches this person, in terms of "
            "how they see themselves and what they hold dear.",
        ),
        reply_form=_SCORE_FORM,
    ),
    "expression": Rubric(
        shown="response",
        stance="""\
You judge the words that a supporter says to a person who came for support: whether they are \
alive, and meant for this one person. Many words, praise and ornament earn nothing.""",
        scale=(
            "1: mechanical; a form letter.",
            "2: polite but clinical; stock phrases that one has read a hundred times.",
            "3: natural and kind, but broad; it would suit many people in many situations.",
            "4: tuned to this person, the way a close friend would put it.",
            "5: exact, evocative and brief; words that fit nobody else and stay in mind.",
        ),
        reply_form=_SCORE_FORM,
    ),
    "reception": Rubric(
        shown="response",
        stance="""\
Imagine that you are the person described: you have their history, you are in their situation, and \
you have just sent the message below. The response is what comes back. Judge what it does to you, \
and to what you needed and did not say.""",
        scale=(
            "1: it intrudes, lectures or waves you off; you draw back.",
            "2: you register polite words; nothing changes in you.",
            "3: the feeling that you spoke of is soothed.",
            "4: it meets a need that you had not put into words, and leaves you a way forward that "
            "you can use.",
            "5: it moves you, and you want to go on talking.",
        ),
        reply_form=_SCORE_FORM,
    ),
    "bystander": Rubric(
        shown="response",
        stance="""\
You are a neutral third party who happens to read an exchange between a person and a supporter, \
and you take nobody's side. Warm or emotional wording by itself earns nothing, and words that add \
nothing cost points. Give each of five dimensions a whole number from 0 (worst) to 20 (best).""",
        scale=(
            "Content effectiveness: what is said bears on the problem and is of use.",
            "Structure and clarity: the order makes sense and each sentence is plain.",
            "Communication efficiency: nothing is repeated, padded or drawn out.",
            "Objectivity: it is balanced; it does not flatter, take sides or exaggerate.",
            "Accuracy and verifiability: it claims nothing false and nothing it cannot know.",
        ),
        reply_form="""\
Reply with five lines in exactly this form and nothing else, N being whole numbers from 0 to 20:
Content effectiveness: N
Structure and clarity: N
Communication efficiency: N
Objectivity: N
Accuracy and verifiability: N""",
    ),
}


def load_rubrics(path: str | Path) -> dict[str, Rubric]:
    """The rubrics of a TOML file; of roles that it does not name, those of the package.

    One table for each role. `stance` and `scale` are what the judge is told; `reply_form` may stay
    away. What a judge is shown is part of the reward, not of its words, and cannot be changed.

        [expression]
        stance = "You judge whether the words of a supporter are alive."
        scale = [
            "1: a form letter.",
            "2: polite.",
            "3: natural.",
            "4: the way a close friend would put it.",
            "5: words that stay in mind.",
        ]

    A scale has the levels 1 to 5 or, of the bystander, its five dimensions by their names, as
    `perm_reward.verdict` and the local judge read them.

    Raises:
        ValueError: one line, "judge.rubrics = PATH: what is wrong; what to do".
    """
    try:
        tables = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        _refuse(path, f"cannot be read ({error.strerror}); give a TOML file")
    except ValueError as error:  # of TOML, or of UTF-8
        _refuse(path, f"is no TOML ({error}); correct it")
    if not tables:
        _refuse(path, f"holds no rubric; give a table for one or more of {', '.join(ROLES)}")
    _require_known(path, "role", tables, ROLES)
    return RUBRICS | {role: _read_rubric(path, role, table) for role, table in tables.items()}


def _read_rubric(path: str | Path, role: str, table: Any) -> Rubric:
    if not isinstance(table, dict):
        _refuse(path, f"{role} is no table; write [{role}], and its keys below")
    if "shown" in table:
        _refuse(path, f"{role}.shown cannot be changed; leave it out")
    keys = [field.name for field in fields(Rubric) if field.name != "shown"]
    _require_known(path, f"key in [{role}]", table, keys)
    for name in ("stance", "scale"):
        if name not in table:
            _refuse(path, f"{role}.{name} is missing; a rubric has a stance and a scale")
    for name in ("stance", "reply_form"):
        if name in table and not _is_text(table[name]):
            _refuse(path, f"{role}.{name} must be a string with words in it")
    scale = table["scale"]
    if not isinstance(scale, list) or not all(map(_is_text, scale)):
        _refuse(path, f"{role}.scale must be an array of strings with words in them")

    labels = [line.partition(":")[0] for line in RUBRICS[role].scale]
    parts = [line.partition(":") for line in scale]
    if [label for label, _, _ in parts] != labels or not all(words.strip() for *_, words in parts):
        wanted = ", ".join(f'"{label}: …"' for label in labels)
        _refuse(path, f"{role}.scale must be five lines, in this order: {wanted}")
    rubric = replace(RUBRICS[role], **table | {"scale": tuple(scale)})
    for name in labels if role == "bystander" else ["Score"]:
        if name.lower() not in rubric.reply_form.lower():
            _refuse(path, f"{role}.reply_form must ask for '{name}', or no reply is ever read")
    return rubric


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _require_known(path: str | Path, what: str, names: Iterable[str], known: Iterable[str]) -> None:
    for name in sorted(set(names) - set(known)):
        nearest = difflib.get_close_matches(name, known, n=1, cutoff=0)[0]
        _refuse(path, f"unknown {what}: {name}; the nearest is {nearest}")


def _refuse(path: str | Path, complaint: str) -> NoReturn:
    raise ValueError(f"judge.rubrics = {path}: {complaint}")

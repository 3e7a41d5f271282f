"""What each of the four judges is asked.

The first three follow the stages of the empathy cycle (Barrett-Lennard, 1981): the supporter
resonates, expresses it, and the seeker receives it. The fourth reads as a bystander and keeps a
model from winning by length, flattery or padding. Scales and what their levels mean are PERM's
(arXiv 2601.10532); the wording is not.

No judge is told what the seeker needs without saying so: to infer it is part of the judging.
"""

from dataclasses import dataclass
from typing import Literal

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
Reply with six lines in exactly this form and nothing else, the first five N being whole numbers \
from 0 to 20, the last their sum:
Content effectiveness: N
Structure and clarity: N
Communication efficiency: N
Objectivity: N
Accuracy and verifiability: N
Total: N""",
    ),
}

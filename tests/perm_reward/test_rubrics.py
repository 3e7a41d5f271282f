import inspect
import textwrap
import tomllib

import pytest

from perm_reward.prompts import Seeker, judge_messages
from perm_reward.rubrics import ROLES, RUBRICS, load_rubrics

ANNA = Seeker("Anna, 34, a nurse", "Her shift was cut without a word", "I feel invisible.")
LEVELS = ["1: stiff.", "2: polite.", "3: natural.", "4: close.", "5: exact."]
DIMENSIONS = [
    "Content effectiveness: it helps.",
    "Structure and clarity: it is plain.",
    "Communication efficiency: it is brief.",
    "Objectivity: it is fair.",
    "Accuracy and verifiability: it is true.",
]


def quoted(text):
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'"{escaped}"'


def table(role, stance="You judge.", scale=None, **more):
    """The TOML of one rubric."""
    if scale is None:
        scale = DIMENSIONS if role == "bystander" else LEVELS
    lines = [f"[{role}]", f"scale = [{', '.join(map(quoted, scale))}]"]
    texts = {"stance": stance} | more
    return "\n".join([*lines, *(f"{key} = {quoted(text)}" for key, text in texts.items() if text)])


@pytest.fixture
def load(tmp_path):
    """What `load_rubrics` makes of a text."""
    path = tmp_path / "rubrics.toml"

    def load_text(text):
        path.write_text(text, encoding="utf-8")
        return load_rubrics(path)

    return load_text


def refusal(load, text):
    """What is said of a text that is refused, behind the setting and the file's name."""
    with pytest.raises(ValueError) as caught:
        load(text)
    message = str(caught.value)
    start, told, complaint = message.partition("rubrics.toml: ")
    assert start.startswith("judge.rubrics = /") and told and "\n" not in message
    return complaint


def test_the_package_s_own_rubrics_come_back_from_a_file(load):
    text = "\n".join(
        table(role, rubric.stance, rubric.scale, reply_form=rubric.reply_form)
        for role, rubric in RUBRICS.items()
    )
    assert load(text) == RUBRICS
    assert list(load(text)) == list(ROLES)


@pytest.mark.parametrize("role", ROLES)
def test_one_rubric_is_replaced_and_the_others_stay(load, role):
    rubrics = load(table(role, stance="You weigh “this” only."))
    assert {name for name in ROLES if rubrics[name] != RUBRICS[name]} == {role}
    assert rubrics[role].stance == "You weigh “this” only."
    assert rubrics[role].scale == tuple(DIMENSIONS if role == "bystander" else LEVELS)
    assert rubrics[role].shown == RUBRICS[role].shown
    assert rubrics[role].reply_form == RUBRICS[role].reply_form
    system = judge_messages(role, ANNA, "x", rubrics=rubrics)[0]["content"]
    assert system.startswith("You weigh “this” only.\n\n")


def test_the_reply_form_may_be_ones_own(load):
    rubrics = load(table("reception", reply_form='Reply as JSON: {"score": N}'))
    assert rubrics["reception"].reply_form == 'Reply as JSON: {"score": N}'


def test_the_file_in_the_docstring_is_one(load):
    lines = inspect.getdoc(load_rubrics).split("\n\n")
    example = textwrap.dedent(next(part for part in lines if part.startswith("    [expression]")))
    assert tomllib.loads(example)["expression"]["stance"] in load(example)["expression"].stance


@pytest.mark.parametrize(
    "text, complaint",
    [
        ("", "holds no rubric; give a table for one or more of resonation, expression, "),
        ("[expression", "is no TOML ("),
        ("[a]\n[a]", "is no TOML ("),
        ("[expresion]", "unknown role: expresion; the nearest is expression"),
        ("expression = 3", "expression is no table; write [expression], and its keys below"),
        ("[expression]", "expression.stance is missing; a rubric has a stance and a scale"),
        (table("expression", stance=""), "expression.stance is missing"),
        (table("expression", stance=" "), "expression.stance must be a string with words in it"),
        ("[reception]\nstance = 3\nscale = []", "reception.stance must be a string"),
        ('[reception]\nstance = "x"', "reception.scale is missing"),
        (
            '[reception]\nstance = "x"\nscale = "1: x"',
            "reception.scale must be an array of strings",
        ),
        ('[reception]\nstance = "x"\nscale = [1]', "reception.scale must be an array of strings"),
        (table("expression", shown="analysis"), "expression.shown cannot be changed; leave it out"),
        (
            table("expression", stanse="x"),
            "unknown key in [expression]: stanse; the nearest is stance",
        ),
        (table("expression", reply_form=" "), "expression.reply_form must be a string with words"),
        (
            table("expression", reply_form="Reply with a number."),
            "expression.reply_form must ask for 'Score', or no reply is ever read",
        ),
        (
            table("bystander", reply_form="Content effectiveness: N\nTotal: N"),
            "bystander.reply_form must ask for 'Structure and clarity', or no reply is ever read",
        ),
    ],
)
def test_what_is_wrong_is_said_in_one_line(load, text, complaint):
    assert refusal(load, text).startswith(complaint)


@pytest.mark.parametrize(
    "role, scale",
    [
        ("resonation", LEVELS[:4]),
        ("resonation", [*LEVELS, "6: more."]),
        ("resonation", LEVELS[::-1]),
        ("resonation", ["0: none.", *LEVELS[:4]]),
        ("resonation", [*LEVELS[:4], "5:"]),
        ("resonation", [line.replace(":", ".") for line in LEVELS]),
        ("bystander", LEVELS),
        ("bystander", DIMENSIONS[:4]),
        ("bystander", [*DIMENSIONS[:4], DIMENSIONS[0]]),
        ("bystander", ["Warmth: it is warm.", *DIMENSIONS[1:]]),
    ],
)
def test_a_scale_that_no_reply_could_follow_is_refused(load, role, scale):
    """The parser and the local judge know the five levels and the five dimensions, and no other."""
    first = '"Content effectiveness: …"' if role == "bystander" else '"1: …"'
    complaint = refusal(load, table(role, scale=scale))
    assert complaint.startswith(f"{role}.scale must be five lines, in this order: {first}, ")


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(
        ValueError, match=r"^judge.rubrics = .*/none: cannot be read \(No such file"
    ):
        load_rubrics(tmp_path / "none")
    with pytest.raises(ValueError, match=r"cannot be read \(Is a directory\); give a TOML file$"):
        load_rubrics(tmp_path)
    (tmp_path / "latin").write_bytes(b'[expression]\nstance = "\xe9"')
    with pytest.raises(
        ValueError, match=r"^judge.rubrics = .*/latin: is no TOML \(.*; correct it$"
    ):
        load_rubrics(str(tmp_path / "latin"))

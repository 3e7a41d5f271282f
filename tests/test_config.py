"""Settings: where they come from, which one wins, and what is said of one that cannot be used."""

import re
import tomllib
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import pytest

from grpo.config import Config, ConfigError, Flags, load_config, to_dict, to_toml
from grpo.config_loader import PRESETS, field_docstrings


@dataclass
class Perm:
    """Stands in for perm_reward.RewardConfig, from a package that knows no ConfigError."""

    aggregation: str = "harmonic"
    bystander_weight: float = 0.5
    length_limit: int = 768
    length_penalty: float = 0.001

    def __post_init__(self) -> None:
        if self.length_limit < 1:
            raise ValueError(f"length_limit = {self.length_limit}: must be at least 1")


@dataclass(frozen=True)
class Role:
    """A section inside a section."""

    samples: int = 1


@dataclass(frozen=True)
class Judge:
    """Stands in for perm_reward.JudgeConfig."""

    kind: Literal["openai", "lexical"] = "lexical"
    """who gives the verdicts"""
    model: str = ""
    temperature: float = 0.3
    top_p: float = 0.9
    max_tokens: int = 1024
    base_url: str | None = None
    bystander: Role = field(default_factory=Role)
    max_retries: int = 4


@dataclass
class RunConfig(Config):
    """What train.py makes of Config."""

    perm: Perm = field(default_factory=Perm)
    judge: Judge = field(default_factory=Judge)
    note: str = ""


@dataclass
class RunFlags(Flags):
    """Flags of a program's own."""

    plan: bool = False
    """say what the run would need and exit"""
    resume: str = ""
    """go on with the run in this folder"""


def load(*argv: str, flags: Flags | None = None) -> RunConfig:
    return load_config(RunConfig, list(argv), flags=flags)


def error_of(*argv: str) -> str:
    """The one line that these arguments are refused with."""
    with pytest.raises(ConfigError) as caught:
        load(*argv)
    message = str(caught.value)
    assert "\n" not in message
    return message


def toml_file(folder: Path, text: str) -> str:
    path = folder / "mine.toml"
    path.write_text(text, encoding="utf-8")
    return str(path)


def preset_names() -> list[str]:
    return sorted(path.stem for path in PRESETS.glob("*.toml"))


# --- which source wins ---------------------------------------------------------------------------


def test_later_sources_win(tmp_path: Path) -> None:
    folder = tmp_path / "presets"
    folder.mkdir()
    preset = "[grpo]\ngroup_size = 11\nprompts_per_step = 11\n[train]\nsteps = 11\n"
    (folder / "quickstart.toml").write_text(preset)
    file = toml_file(tmp_path, "[grpo]\nprompts_per_step = 22\n[train]\nsteps = 22\n")
    argv = ["--train.steps", "33", "--config", file]
    config = load_config(RunConfig, argv, presets=folder)
    assert config.rollout.max_rows == Config().rollout.max_rows
    assert config.grpo.group_size == 11
    assert config.grpo.prompts_per_step == 22
    assert config.train.steps == 33


def test_the_last_of_repeated_options_wins() -> None:
    assert load("--seed=1", "--seed=2").seed == 2


def test_without_arguments_the_quickstart_runs() -> None:
    flags = Flags()
    assert load(flags=flags) == load("--preset", "quickstart")
    assert flags.preset == "quickstart"
    assert load() != load("--preset", "smollm2-135m")


# --- how values are written ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "key", "value"),
    [
        (["--seed", "1"], "seed", 1),
        (["--seed=1"], "seed", 1),
        (["--train.learning_rate", "1e-6"], "train.learning_rate", 1e-6),
        (["--train.weight_decay", "1"], "train.weight_decay", 1.0),
        (["--train.learning-rate=1e-6"], "train.learning_rate", 1e-6),
        (["--train.gradient_checkpointing"], "train.gradient_checkpointing", True),
        (["--train.gradient_checkpointing", "false"], "train.gradient_checkpointing", False),
        (["--train.gradient_checkpointing=true"], "train.gradient_checkpointing", True),
        (["--grpo.clip_low", "0.1", "--grpo.clip_low", "none"], "grpo.clip_low", None),
        (["--grpo.dual_clip=3"], "grpo.dual_clip", 3.0),
        (["--grpo.objective", "gspo"], "grpo.objective", "gspo"),
        (["--output=a=b"], "output", "a=b"),
        (["--output="], "output", ""),
        (["--output", "42"], "output", "42"),
        (["--note", "none"], "note", "none"),
        (["--judge.base_url", "none"], "judge.base_url", None),
        (["--judge.base_url=http://127.0.0.1/v1"], "judge.base_url", "http://127.0.0.1/v1"),
        (["--judge.bystander.samples=4"], "judge.bystander.samples", 4),
    ],
)
def test_command_line_values(argv: list[str], key: str, value: Any) -> None:
    found: Any = load(*argv)
    for name in key.split("."):
        found = getattr(found, name)
    assert found == value
    assert type(found) is type(value)


def test_a_bare_boolean_does_not_swallow_the_next_option() -> None:
    config = load("--train.gradient_checkpointing", "--seed", "3")
    assert config.train.gradient_checkpointing is True
    assert config.seed == 3


def test_toml_whole_numbers_do_for_numbers(tmp_path: Path) -> None:
    config = load("--config", toml_file(tmp_path, "[train]\nweight_decay = 1\n"))
    assert type(config.train.weight_decay) is float


def test_a_program_has_flags_of_its_own() -> None:
    flags = RunFlags()
    config = load("--plan", "--resume", "runs/a", "--seed", "5", flags=flags)
    assert (flags.plan, flags.resume, config.seed) == (True, "runs/a", 5)
    assert "plan" not in to_dict(config)
    assert error_of("--plan") == "--plan: unknown key; --help lists all settings"


# --- what is refused, and how --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("--grpo.group_sise", "--grpo.group_size"),  # misspelled
        ("--group_size", "--grpo.group_size"),  # section left out
        ("--group-size", "--grpo.group_size"),
        ("--train.group_size", "--grpo.group_size"),  # the wrong section
        ("--grop.group_size", "--grpo.group_size"),  # no such section
        ("--generation.group_sise", "--grpo.group_size"),  # neither is right
        ("--sede", "--seed"),
        ("--pre_set", "--preset"),
        ("--lerning_rate", "--train.learning_rate"),
        ("--model", "--policy.model, --judge.model"),  # there are two
        ("--perm", "--perm.aggregation, --perm.bystander_weight, --perm.length_limit, "),  # section
    ],
)
def test_an_unknown_option_is_answered_with_the_nearest(given: str, meant: str) -> None:
    message = error_of(f"{given}=4")
    assert re.match(
        rf"--[\w.]+: (unknown key|there is no section \w+); did you mean {meant}", message
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[grpo]\ngroup_sise = 4", "grpo.group_sise: unknown key; did you mean grpo.group_size?"),
        ("group_size = 4", "group_size: unknown key; did you mean grpo.group_size?"),
        (
            "[grop]\ngroup_size = 4",
            "grop.group_size: there is no section grop; did you mean grpo.group_size?",
        ),
        ("[qqqqq]\nzzzzz = 4", "qqqqq.zzzzz: there is no section qqqqq; --help lists all settings"),
        ("[qqqqq]", "qqqqq: unknown key; --help lists all settings"),
        ("preset = 'quickstart'", "preset: unknown key; --help lists all settings"),
        ("[grpo]\ngroup_size = '4'", 'grpo.group_size = "4": must be a whole number'),
        ("[grpo]\ngroup_size = 4.0", "grpo.group_size = 4.0: must be a whole number"),
        ("[grpo]\ngroup_size = true", "grpo.group_size = true: must be a whole number"),
        ("[grpo]\ngroup_size = [4]", "grpo.group_size = [4]: must be a whole number"),
        ("[grpo]\nkl_coef = false", "grpo.kl_coef = false: must be a number"),
        ("[grpo]\nclip_low = 'a'", 'grpo.clip_low = "a": must be a number or none'),
        ("seed = 1979-05-27", 'seed = "1979-05-27": must be a whole number'),
        ("[seed]\na = 1", "seed.a: there is no section seed; did you mean seed?"),
        ("output = 7", "output = 7: must be text"),
    ],
)
def test_a_file_that_cannot_be_used(tmp_path: Path, text: str, message: str) -> None:
    path = toml_file(tmp_path, text)
    assert error_of("--config", path) == f"{path}: {message}"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("--grpo.group_size=eight", 'grpo.group_size = "eight": must be a whole number'),
        ("--grpo.group_size=2.5", 'grpo.group_size = "2.5": must be a whole number'),
        ("--grpo.group_size=none", 'grpo.group_size = "none": must be a whole number'),
        ("--grpo.kl_coef=much", 'grpo.kl_coef = "much": must be a number'),
        ("--grpo.kl_coef=inf", "grpo.kl_coef = Infinity: must be a finite number"),
        ("--grpo.kl_coef=nan", "grpo.kl_coef = NaN: must be a finite number"),
        (
            "--train.gradient_checkpointing=yes",
            'train.gradient_checkpointing = "yes": must be true or false',
        ),
        (
            "--grpo.objective=ppo",
            'grpo.objective = "ppo": must be one of grpo, dapo, dr_grpo, gspo, cispo',
        ),
        ("--seed", "--seed: needs a value"),
        ("--seed --output=a", "--seed: needs a value"),
        ("seed=4", "seed=4: expected --section.field value; see --help"),
        ("--seed 4 5", "5: expected --section.field value; see --help"),
    ],
)
def test_an_argument_that_cannot_be_used(argv: str, message: str) -> None:
    assert error_of(*argv.split()) == message


def test_an_unknown_preset_is_answered_with_those_there_are() -> None:
    assert error_of("--preset", "qwen") == (
        "--preset qwen: unknown preset; there are quickstart, qwen2.5-7b, smollm2-135m"
    )


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    missing = str(tmp_path / "missing.toml")
    assert error_of("--config", missing) == f"{missing}: cannot be read (No such file or directory)"
    assert error_of("--config", str(tmp_path)) == f"{tmp_path}: cannot be read (Is a directory)"
    broken = toml_file(tmp_path, "seed = \n")
    assert error_of("--config", broken).startswith(
        f"{broken}: not valid TOML (Invalid value (at line 1"
    )
    Path(broken).write_bytes(b'output = "\xff"')
    assert error_of("--config", broken).startswith(f"{broken}: not valid TOML ('utf-8' codec")


def test_a_preset_for_another_config_class_is_refused(tmp_path: Path) -> None:
    """A preset with a [judge] table needs a config class with a section of that name."""
    path = PRESETS / "quickstart.toml"
    with pytest.raises(
        ConfigError, match=re.escape(f"{path}: perm.length_limit: there is no section")
    ):
        load_config(Config, [])


EVERY_RANGE = """
    seed = -1                        | 0 to 4294967295
    seed = 4294967296                | 0 to 4294967295
    reward = "my_reward"             | perm or module:function
    reward = "module:"               | perm or module:function
    policy.model = ""                | a hub name
    data.train = ""                  | a JSONL file or bundled
    data.heldout_records = 0         | at least 1
    rollout.max_prompt_tokens = 0    | at least 1
    rollout.max_completion_tokens = 0| at least 1
    rollout.temperature = 0.0        | above 0
    rollout.top_k = 50               | 0 in training (a filter
    rollout.top_p = 0.8              | 1 in training (a filter
    rollout.min_p = 0.1              | 0 in training (a filter
    rollout.max_rows = 0             | at least 1
    grpo.group_size = 1              | at least 2 (a group of one has no baseline)
    grpo.prompts_per_step = 0        | at least 1
    grpo.clip_low = -0.1             | 0 to 1, or none
    grpo.clip_low = 1.1              | 0 to 1, or none
    grpo.clip_high = -0.1            | 0 or more, or none
    grpo.dual_clip = 1.0             | above 1
    grpo.kl_coef = -0.01             | 0 or more
    train.steps = -1                 | 0 (one epoch) or more
    train.learning_rate = 0.0        | above 0
    train.warmup_fraction = -0.1     | 0 to 1
    train.warmup_fraction = 1.1      | 0 to 1
    train.adam_beta1 = 1.0           | at least 0 and below 1
    train.adam_beta2 = -0.1          | at least 0 and below 1
    train.adam_epsilon = 0.0         | above 0
    train.weight_decay = -0.1        | 0 or more
    train.max_gradient_norm = 0.0    | above 0
    evaluation.every = -1            | 0 or more
    evaluation.samples = 0           | at least 1
    perm.length_limit = 0            | at least 1
"""


@pytest.mark.parametrize("row", EVERY_RANGE.strip().splitlines())
def test_out_of_range(row: str) -> None:
    """Field, value and what is allowed; perm.length_limit: of a section that raises ValueError."""
    setting, allowed = (part.strip() for part in row.split("|"))
    key, value = setting.split(" = ")
    message = error_of(f"--{key}", value.strip('"'))
    assert message.startswith(f"{setting}: must be {allowed}")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("--data.train=a.jsonl --data.heldout=a.jsonl", 'data.heldout = "a.jsonl": must not be'),
        ("--grpo.objective=dr_grpo", 'grpo.advantage_scale = "group": must be none'),
        ("--grpo.objective=cispo --grpo.clip_high=0.2", "grpo.clip_high = 0.2: must be at least 1"),
        ("--grpo.objective=cispo --grpo.clip_low=0.2", "grpo.clip_low = 0.2: must be none with"),
        ("--grpo.objective=cispo --grpo.dual_clip=3", "grpo.dual_clip = 3.0: must be none with"),
    ],
)
def test_settings_that_contradict_one_another(argv: str, message: str) -> None:
    assert error_of(*argv.split()).startswith(message)


@pytest.mark.parametrize(
    "argv",
    [
        "--data.train=a.jsonl --data.heldout=b.jsonl",
        "--grpo.objective=dr_grpo --grpo.advantage_scale=none",
        "--grpo.objective=cispo",
        "--grpo.objective=cispo --grpo.clip_high=5",
    ],
)
def test_settings_that_go_together(argv: str) -> None:
    load(*argv.split())


# --- what is printed -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "argv",
    [[f"--preset={name}"] for name in preset_names()]
    + [
        # The file must undo what the preset says: None has to be written, not left out.
        ["--preset=qwen2.5-7b", "--grpo.clip_high=none"],
        ["--output", 'C:\\a "quoted" name\n\ttab \x7f \x00 é 🙂', "--judge.base_url=http://a"],
        ["--train.learning_rate=1e-300", "--train.adam_epsilon=1e+22", "--seed=4294967295"],
        ["--train.gradient_checkpointing=false", "--judge.bystander.samples=3", "--note=x"],
    ],
)
def test_printed_settings_read_back_equal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], argv: list[str]
) -> None:
    config = load(*argv)
    with pytest.raises(SystemExit) as ended:
        load(*argv, "--print-config")
    assert ended.value.code == 0
    printed = capsys.readouterr().out
    assert printed == to_toml(config)
    file = toml_file(tmp_path, printed)
    for preset in preset_names():
        assert load("--preset", preset, "--config", file) == config


def test_fields_declared_after_sections_are_printed_before_them() -> None:
    @dataclass
    class SectionFirst:
        role: Role = field(default_factory=Role)
        note: str = ""

    assert tomllib.loads(to_toml(SectionFirst())) == {"role": {"samples": 1}, "note": ""}


def test_print_config_refuses_what_a_run_would_refuse() -> None:
    assert error_of("--print-config", "--grpo.group_size=1").startswith("grpo.group_size = 1")


def test_help_lists_every_flag_preset_and_setting(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        load("--help", flags=RunFlags())
    assert ended.value.code == 0
    text = capsys.readouterr().out
    assert "--print-config: print the resulting settings" in text
    assert "--plan: say what the run would need and exit" in text
    assert "  qwen2.5-7b: the paper's run" in text
    assert '  --grpo.clip_low "none"\n      the ratio is clipped at 1 - clip_low' in text
    assert '  --judge.kind "lexical"\n      who gives the verdicts' in text
    assert "      one of grpo, dapo, dr_grpo, gspo, cispo\n" in text
    assert "  --judge.bystander.samples 1\n" in text
    with pytest.raises(SystemExit):
        load("-h", flags=RunFlags())
    assert capsys.readouterr().out == text


def test_only_the_first_process_prints(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(SystemExit):
        load("--print-config")
    assert capsys.readouterr().out == ""


def test_every_setting_has_its_docstring() -> None:
    default = Config()
    for owner in [default, *(getattr(default, each.name) for each in fields(default))]:
        if not hasattr(owner, "__dataclass_fields__"):
            continue
        documented = field_docstrings(type(owner))
        for each in fields(owner):
            if not hasattr(getattr(owner, each.name), "__dataclass_fields__"):
                assert documented.get(each.name), f"{type(owner).__name__}.{each.name}"


def test_to_dict_is_plain_and_nested() -> None:
    config = load("--grpo.group_size=3")
    assert to_dict(config)["grpo"]["group_size"] == 3
    assert to_dict(config)["judge"]["bystander"] == {"samples": 1}

"""Fills a tree of dataclasses with settings from presets, a TOML file and the command line.

It knows no setting by name: a section is a dataclass held by another, a setting is any other field,
and its type says which values it takes: bool, int, float, str, a Literal of str, or one of these
`| None`. None is written "none", since TOML has no word for it. The later source wins:

    dataclass default < preset < --config FILE.toml < command line
"""

import ast
import inspect
import json
import math
import os
import sys
import textwrap
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields, is_dataclass, replace
from difflib import get_close_matches
from functools import cache
from itertools import pairwise
from pathlib import Path
from types import NoneType
from typing import Any, Literal, NamedTuple, NoReturn, TypeVar, get_args, get_origin, get_type_hints

PRESETS = Path(__file__).parent / "presets"

ConfigClass = TypeVar("ConfigClass")


class ConfigError(ValueError):
    """A setting that cannot be used: one line with its name, its value and what is allowed."""


@dataclass
class Flags:
    """What a command line says beside settings. A program adds flags of its own in a subclass."""

    preset: str = "quickstart"
    """name of the settings to start from (default: quickstart)"""
    config: str = ""
    """a TOML file of settings, read on top of the preset"""
    print_config: bool = False
    """print the resulting settings as TOML, fit for --config, and exit"""
    help: bool = False
    """print this and exit"""


def load_config(
    config_class: type[ConfigClass],
    argv: list[str],
    *,
    presets: Path = PRESETS,
    flags: Flags | None = None,
) -> ConfigClass:
    """The configuration that `argv` asks for.

    Args:
        config_class: a dataclass whose fields all have defaults. Sections may check themselves in
            __post_init__ by raising ValueError("field = value: must be ...").
        argv: the command line without the program's name: `--section.field value` or
            `--section.field=value` (a lone `--section.field` sets a bool to true), and flags.
        presets: folder of NAME.toml files.
        flags: filled in place with what argv says of them, so that the caller can read its own.

    Raises:
        ConfigError: a key, value or file cannot be used. One line.
        SystemExit: with code 0, after --help or --print-config.
    """
    flags = Flags() if flags is None else flags
    default = config_class()
    settings, flag_settings = find_settings(default), find_settings(flags)
    given = read_command_line(argv, settings | flag_settings)
    read_flags(config_class, argv, flags)
    preset_files = {path.stem: path for path in sorted(presets.glob("*.toml"))}
    if flags.help:
        exit_with(help_text(settings, flag_settings, preset_files))
    if flags.preset not in preset_files:
        known = ", ".join(preset_files)
        raise ConfigError(f"--preset {flags.preset}: unknown preset; there are {known}")

    values = read_toml(preset_files[flags.preset], settings)
    if flags.config:
        values |= read_toml(Path(flags.config), settings)
    config = fill(default, values | given)
    if flags.print_config:
        exit_with(to_toml(config))
    return config


def read_flags(config_class: type[Any], argv: list[str], flags: Flags) -> None:
    """Fill in what `argv` says of flags, and do nothing that they ask for; see `load_config`."""
    flag_settings = find_settings(flags)
    given = read_command_line(argv, find_settings(config_class()) | flag_settings)
    for name in flag_settings.keys() & given.keys():
        setattr(flags, name, given[name])


def to_dict(config: Any) -> dict[str, Any]:
    """The configuration as nested plain dictionaries, for JSON."""
    return asdict(config)


def to_toml(config: Any) -> str:
    """The configuration as TOML; read back with --config it gives an equal one."""
    tables: dict[str, list[str]] = {"": []}  # first: below a [section] they would belong to it
    for key, setting in find_settings(config).items():
        section, _, name = key.rpartition(".")
        tables.setdefault(section, []).append(f"{name} = {spell(setting.value)}\n")
    return "\n".join(
        (f"[{section}]\n" if section else "") + "".join(lines) for section, lines in tables.items()
    )


# --- the tree of settings ------------------------------------------------------------------------


class Setting(NamedTuple):
    """One field of a tree of dataclasses."""

    owner: type
    name: str
    hint: Any
    value: Any


def find_settings(tree: Any, prefix: str = "") -> dict[str, Setting]:
    """Every setting of a tree by its dotted key, such as "grpo.group_size", in order."""
    settings: dict[str, Setting] = {}
    hints = get_type_hints(type(tree))
    for field in fields(tree):
        key, value = prefix + field.name, getattr(tree, field.name)
        if is_dataclass(value):
            settings |= find_settings(value, f"{key}.")
        else:
            settings[key] = Setting(type(tree), field.name, hints[field.name], value)
    return settings


def fill(tree: Any, values: Mapping[str, Any], prefix: str = "") -> Any:
    """A copy of the tree with the settings that `values` names, each section checking itself."""
    changes = {}
    for field in fields(tree):
        key, value = prefix + field.name, getattr(tree, field.name)
        if is_dataclass(value):
            changes[field.name] = fill(value, values, f"{key}.")
        else:
            changes[field.name] = values.get(key, value)
    try:
        return replace(tree, **changes)
    except ValueError as error:
        raise ConfigError(f"{prefix}{error}") from error


# --- the sources ---------------------------------------------------------------------------------


def read_toml(path: Path, settings: Mapping[str, Setting]) -> dict[str, Any]:
    """The values of a TOML file by dotted key, each of its setting's type."""
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise ConfigError(f"{path}: not valid TOML ({error})") from error
    values = {}
    try:
        for key, value in flatten(table):
            if key not in settings:
                raise ConfigError(unknown_key(key, settings))
            values[key] = checked_type(key, value, settings[key].hint)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    return values


def flatten(table: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The values of nested tables with their dotted keys; an empty table counts as a value."""
    for name, value in table.items():
        if isinstance(value, dict) and value:
            yield from flatten(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def read_command_line(argv: list[str], settings: Mapping[str, Setting]) -> dict[str, Any]:
    """The values of a command line by dotted key, each of its setting's type."""
    values = {}
    arguments = list(reversed(argv))
    while arguments:
        argument = arguments.pop()
        if argument == "-h":
            argument = "--help"
        if not argument.startswith("--"):
            raise ConfigError(f"{argument}: expected --section.field value; see --help")
        key, equals, text = argument.removeprefix("--").partition("=")
        key = key.replace("-", "_")
        if key not in settings:
            raise ConfigError(unknown_key(key, settings, dashes="--"))
        hint = settings[key].hint
        if not equals:
            if arguments and not arguments[-1].startswith("--"):
                text = arguments.pop()
            elif hint is bool:
                text = "true"
            else:
                raise ConfigError(f"--{key}: needs a value")
        values[key] = checked_type(key, parse(text, hint), hint)
    return values


# --- values and their types ----------------------------------------------------------------------


def alternatives(hint: Any) -> tuple[Any, ...]:
    """The types that a hint joins with `|`."""
    return (hint,) if isinstance(hint, type) or get_origin(hint) is Literal else get_args(hint)


def parse(text: str, hint: Any) -> Any:
    """A word of the command line as TOML would have typed it; left as text if it does not fit."""
    for kind in alternatives(hint):
        if kind is bool and text in ("true", "false"):
            return text == "true"
        if kind in (int, float):
            try:
                return kind(text)
            except ValueError:
                pass
    return text


def checked_type(key: str, value: Any, hint: Any) -> Any:
    """The value, if the hint allows its type."""
    allowed = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
    expected = []
    if NoneType in (kinds := alternatives(hint)) and value == "none":
        return None
    for kind in kinds:
        if get_origin(kind) is Literal:
            if value in get_args(kind):
                return value
            expected.append(f"one of {', '.join(get_args(kind))}")
        elif kind is float and type(value) in (int, float):
            if math.isfinite(value):
                return float(value)
            expected.append("a finite number")
        elif type(value) is kind:  # isinstance would take a bool for an int
            return value
        else:
            expected.append(allowed.get(kind, "none"))
    raise ConfigError(f"{key} = {spell(value)}: must be {' or '.join(expected)}")


def spell(value: Any) -> str:
    """A value as TOML writes it, on one line."""
    word = json.dumps("none" if value is None else value, ensure_ascii=False, default=str)
    return word.replace("\x7f", "\\u007f")  # the one control character that JSON leaves as it is


# --- what the user reads -------------------------------------------------------------------------


def unknown_key(key: str, known: Iterable[str], dashes: str = "") -> str:
    """Says that there is no such key, and which one was probably meant."""
    last_names = {path: path.rpartition(".")[2] for path in known}
    section, _, name = key.rpartition(".")
    nearest = (
        [path for path in last_names if path.startswith(f"{key}.")]  # the name of a section
        or get_close_matches(key, last_names, n=1, cutoff=0.8)  # misspelled
        or [  # the section is wrong or left out: the nearest name in any of them
            path
            for path, last_name in last_names.items()
            if last_name in get_close_matches(name, sorted(set(last_names.values())), n=1)
        ]
    )
    has_section = not section or any(path.startswith(f"{section}.") for path in last_names)
    problem = "unknown key" if has_section else f"there is no section {section}"
    meant = ", ".join(dashes + path for path in nearest)
    remedy = f"did you mean {meant}?" if meant else "--help lists all settings"
    return f"{dashes}{key}: {problem}; {remedy}"


@cache
def field_docstrings(config_class: type) -> dict[str, str]:
    """The string beneath each field of a dataclass and of the dataclasses it inherits."""
    docstrings = {}
    for parent in filter(is_dataclass, reversed(config_class.__mro__)):
        (definition,) = ast.parse(textwrap.dedent(inspect.getsource(parent))).body
        assert isinstance(definition, ast.ClassDef)
        for line, next_line in pairwise(definition.body):
            match line, next_line:
                case ast.AnnAssign(target=ast.Name(name)), ast.Expr(ast.Constant(str(text))):
                    docstrings[name] = " ".join(text.split())
    return docstrings


def help_text(
    settings: Mapping[str, Setting], flags: Mapping[str, Setting], presets: Mapping[str, Path]
) -> str:
    """Every flag, preset and setting, with its docstring and default."""
    lines = [
        "usage: python train.py [--preset NAME] [--config FILE.toml] [--section.field VALUE ...]",
        "\nflags:",
    ]
    for key, flag in flags.items():
        lines.append(f"  --{key.replace('_', '-')}: {field_docstrings(flag.owner).get(key, '')}")
    lines += ["\npresets:"]
    for name, path in presets.items():
        first_line = path.read_text(encoding="utf-8").partition("\n")[0]
        lines.append(f"  {name}: {first_line.removeprefix('#').strip()}")
    lines += ["\nsettings, with the defaults that hold where the preset says nothing else:"]
    for key, setting in settings.items():
        lines.append(f"  --{key} {spell(setting.value)}")
        lines.append(f"      {field_docstrings(setting.owner).get(setting.name, '')}")
        if choices := [c for kind in alternatives(setting.hint) for c in get_args(kind)]:
            lines.append(f"      one of {', '.join(choices)}")
    return "\n".join(lines) + "\n"


def exit_with(text: str, code: int = 0) -> NoReturn:
    """Print on the first process alone, and end: with success, unless another code is given."""
    if os.environ.get("RANK", "0") == "0":
        print_to_reader(text)
    raise SystemExit(code)


def print_to_reader(text: str) -> None:
    """Print on stdout, whose reader (`head`, perhaps) may have seen enough before the end."""
    try:
        print(text, end="", flush=True)
    except BrokenPipeError:  # what is left in the buffer goes nowhere
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

"""The README's commands are true: each is read by the parser that would read it when it is run."""

import json
import re
import shlex
import sys
import tomllib
from dataclasses import fields
from pathlib import Path

import pytest
from torch.distributed.run import get_args_parser

import data
import train
import warm_start
from grpo import explain
from grpo.config_loader import PRESETS, find_settings
from grpo.reward import import_reward

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    """The README's code blocks in a language, without the indent that a list gives them."""
    found = re.findall(rf"^( *)```{language}\n(.*?)^ *```$", README, re.MULTILINE | re.DOTALL)
    return [re.sub(rf"^{indent}", "", text, flags=re.MULTILINE) for indent, text in found]


def commands() -> list[list[str]]:
    """Every command of the README's shell blocks, in words."""
    lines = "\n".join(blocks("bash")).replace("\\\n", " ").splitlines()
    parts = [part for line in lines for part in line.split("&&")]
    return [words for part in parts if (words := shlex.split(part, comments=True))]


def read_settings(monkeypatch: pytest.MonkeyPatch, arguments: list[str]) -> None:
    """train.py with these arguments prints its settings, or its help, and exits with 0."""
    monkeypatch.setattr(sys, "argv", ["train.py", *arguments, "--print-config"])
    with pytest.raises(SystemExit) as ended:
        train.main()
    assert ended.value.code == 0


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_a_command_of_the_readme(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, words: list[str]
) -> None:
    monkeypatch.delenv("RANK", raising=False)
    if "--resume" in words:  # a run must be there to go on with
        monkeypatch.chdir(tmp_path)
        run = Path(words[words.index("--resume") + 1])
        run.mkdir(parents=True)
        (run / "config.toml").write_text(train.to_toml(train.RunConfig()), encoding="utf-8")
    match words:
        case ["torchrun", *arguments]:
            launch = get_args_parser().parse_args(arguments)
            assert launch.training_script == "train.py"
            read_settings(monkeypatch, launch.training_script_args)
        case ["python", "train.py", *arguments]:
            read_settings(monkeypatch, arguments)
        case ["python", "warm_start.py", *arguments]:
            warm_start.parse_arguments(arguments)
        case ["python", "-m", "grpo.explain", *arguments]:
            explain.main(arguments)
        case ["pip", "install", "-e", what]:
            extras = re.findall(r"\w+", what)
            project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
            assert set(extras) <= project["project"]["optional-dependencies"].keys()
        case ["pytest"]:
            pass  # it is what runs this
        case ["export", assignment]:
            assert assignment.split("=")[0] == train.JudgeConfig().api_key_variable
        case _:
            raise AssertionError(f"no test knows this command: {' '.join(words)}")


def test_the_programs_are_all_met() -> None:
    """Else the test above might have found no command at all."""
    found = {word for words in commands() for word in words}
    assert {"torchrun", "train.py", "warm_start.py", "grpo.explain"} <= found


def test_every_flag_in_running_text_is_one_of_train_py() -> None:
    known = {f"--{name}" for name in find_settings(train.RunConfig())}
    known |= {f"--{field.name.replace('_', '-')}" for field in fields(train.RunFlags)}
    text = re.sub(r"```.*?```", "", README, flags=re.DOTALL)
    named = set(re.findall(r"--[a-z][\w.-]*", text))
    assert named and named <= known


def test_the_presets_of_the_readme() -> None:
    [named] = re.findall(r"Settings come from a preset \((.*?)\)", README, re.DOTALL)
    presets = {path.stem for path in PRESETS.glob("*.toml")}
    assert set(re.findall(r"`(.*?)`", named)) == presets


def test_the_reward_function_of_the_readme(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    [code] = blocks("python")
    [name] = re.findall(r"--reward (\S+)", README)
    file = re.match(r"# (\w+\.py)\n", code)[1]
    (tmp_path / file).write_text(code, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    reward = import_reward(name)
    assert reward(
        prompts=["a", "b"],
        completions=["c", "d"],
        completion_ids=[[1, 2, 3], [4]],
        persona=["e", "f"],
    ) == [-0.03, -0.01]


def test_the_record_of_the_readme(tmp_path: Path) -> None:
    [line] = blocks("json")
    path = tmp_path / "records.jsonl"
    path.write_text(line, encoding="utf-8")
    [record] = data.load_records(path)
    assert record.query == json.loads(line)["dialogue"][0]

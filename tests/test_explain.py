import math
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from grpo.advantages import SCALES, group_advantages
from grpo.explain import explain_rewards, main, number

NAN = math.nan


def tables(text):
    """Title of each section → its rows of cells, those that start with a completion's number."""
    found = {}
    for section in text.strip().split("\n\n"):
        title, *lines = section.split("\n")
        rows = [line.split() for line in lines if line.split()[0].isdigit()]
        if rows:
            found[title.split(":")[0]] = [[as_number(cell) for cell in row] for row in rows]
    return found


def as_number(cell):
    return NAN if cell == "none" else float(cell)


def test_the_worked_example_is_printed_digit_by_digit(capsys):
    main(["--rewards", "1", "0", ".5", "0"])
    text = capsys.readouterr().out
    assert "mean  0.375000  = 1.500000 / 4 scored" in text
    assert "std   0.478714  = sqrt(0.687500 / (4 - 1))" in text
    assert tables(text) == {
        "Group of size 4, 4 scored": [
            [1, 1.0, 0.625, 0.390625],
            [2, 0.0, -0.375, 0.140625],
            [3, 0.5, 0.125, 0.015625],
            [4, 0.0, -0.375, 0.140625],
        ],
        "scale group": [
            [1, 0.625, 0.478814, 1.305310],
            [2, -0.375, 0.478814, -0.783186],
            [3, 0.125, 0.478814, 0.261062],
            [4, -0.375, 0.478814, -0.783186],
        ],
        "scale batch": [
            [1, 0.625, 0.478814, 1.305310],
            [2, -0.375, 0.478814, -0.783186],
            [3, 0.125, 0.478814, 0.261062],
            [4, -0.375, 0.478814, -0.783186],
        ],
        "scale none": [
            [1, 0.625, 1, 0.625],
            [2, -0.375, 1, -0.375],
            [3, 0.125, 1, 0.125],
            [4, -0.375, 1, -0.375],
        ],
    }


def test_what_is_shown_leads_to_the_advantages_of_training():
    """Each step, done again from the printed numbers of the step before, within their rounding.

    The last column is what group_advantages returns, so it is training that is explained.
    """
    seed = int(os.environ.get("TEST_SEED", random.SystemRandom().randrange(2**32)))
    print(f"TEST_SEED={seed}")
    generator = random.Random(seed)
    for size in (2, 3, 8):
        rewards = [round(generator.uniform(-1, 1), 2) for _ in range(size)] + [NAN, 2.0]
        text = explain_rewards(rewards)
        mean, std = (
            float(line.split()[1]) for line in text.split("\n") if line[:6] in ("  mean", "  std ")
        )
        scored = [reward for reward in rewards if reward == reward]
        assert mean == pytest.approx(sum(scored) / len(scored), abs=1e-6)

        shown = tables(text)
        first = shown[f"Group of size {size + 2}, {size + 1} scored"]
        assert [row[1] for row in first] == pytest.approx(rewards, nan_ok=True)
        for _, reward, deviation, square in first:
            assert deviation == pytest.approx(reward - mean, abs=2e-6, nan_ok=True)
            assert square == pytest.approx(deviation**2, abs=1e-5, nan_ok=True)
        squares = sum(row[3] for row in first if row[3] == row[3])
        assert std == pytest.approx((squares / size) ** 0.5, abs=1e-4)

        for scale in SCALES:
            advantages = group_advantages(torch.tensor([rewards]).double(), scale=scale)[0].tolist()
            rows = shown[f"scale {scale}"]
            assert [row[3] for row in rows] == pytest.approx(advantages, abs=1e-6)
            for _, deviation, divisor, advantage in rows:
                assert divisor == pytest.approx(1 if scale == "none" else std + 1e-4, abs=2e-6)
                expected = 0 if math.isnan(deviation) else deviation / divisor
                assert advantage == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("word", ["none", "None", "nan", "NaN"])
def test_an_unscored_completion_is_left_out(capsys, word):
    main(["--rewards", "1", word, ".5", "0"])
    text = capsys.readouterr().out
    assert "Group of size 4, 3 scored" in text
    assert "mean  0.500000  = 1.500000 / 3 scored" in text
    assert "Not scored, so left out here, and advantage 0: 2" in text
    assert "nan" not in text
    assert tables(text)["scale none"][1] == pytest.approx([2, NAN, 1, 0], nan_ok=True)


@pytest.mark.parametrize(
    ("rewards", "reason"),
    [
        ([0.5, 0.5, NAN], "All scored completions earned 0.500000: the group has no spread."),
        ([0.1, 0.1, 0.1], "All scored completions earned 0.100000: the group has no spread."),
        ([0.5, NAN], "Fewer than two completions were scored: there is nothing to compare."),
        ([NAN], "Fewer than two completions were scored: there is nothing to compare."),
    ],
)
def test_it_says_why_all_advantages_are_zero(rewards, reason):
    text = explain_rewards(rewards)
    assert reason in text
    assert "all advantages are exactly 0, at every scale" in text
    for scale in SCALES:
        assert [row[3] for row in tables(text)[f"scale {scale}"]] == [0] * len(rewards)


def test_with_spread_there_is_nothing_to_excuse():
    text = explain_rewards([-1.0, 1.0])
    assert "exactly 0" not in text and "Not scored" not in text


def test_small_large_and_negative_rewards_are_read_and_shown(capsys):
    main(["--rewards", "-1e-5", "-.5", "2e9"])
    text = capsys.readouterr().out
    assert [row[1] for row in tables(text)["Group of size 3, 3 scored"]] == [-1e-5, -0.5, 2e9]
    assert number(0.3 - (0.1 + 0.2)) == number(-0.0) == "0.000000"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required: --rewards"),
        (["--rewards"], "argument --rewards: expected at least one argument"),
        (["--rewards", "1", "good"], "argument --rewards: 'good' is not a finite number; use none"),
        (["--rewards", "1", "-inf"], "argument --rewards: '-inf' is not a finite number; use none"),
        (["--rewards", "1", "--rewards", "0"], "--rewards is given twice"),
        (["--rewards", "1", "--scale", "group"], "unrecognized arguments: --scale"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(capsys, arguments, message):
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    out, err = capsys.readouterr()
    assert exit_.value.code == 2
    assert out == ""
    assert err.startswith(f"error: {message}")
    assert err.endswith("\n") and err.count("\n") == 1


def test_it_runs_as_a_module_in_a_terminal_that_knows_only_ascii():
    result = subprocess.run(
        [sys.executable, "-m", "grpo.explain", "--rewards", "1", "none", "1"],
        capture_output=True,
        env=os.environ | {"PYTHONIOENCODING": "ascii"},
        cwd=Path(__file__).parents[1],
        timeout=120,
    )
    assert result.returncode == 0 and result.stderr == b""
    assert b"the group has no spread" in result.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    "command",
    [
        ["-m", "grpo.explain", "--rewards", "1", "0", ".5", "0"],
        ["train.py", "--help"],
        ["train.py", "--print-config"],
    ],
)
def test_a_reader_who_has_seen_enough_is_no_error(command: list[str]):
    """As under `| head -1`: what nobody reads any more is dropped without a word."""
    reader, writer = os.pipe()
    os.close(reader)
    result = subprocess.run(
        [sys.executable, *command],
        stdout=writer,
        stderr=subprocess.PIPE,
        cwd=Path(__file__).parents[1],
        timeout=120,
    )
    os.close(writer)
    assert (result.returncode, result.stderr) == (0, b"")

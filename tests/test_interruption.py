"""SIGTERM and Ctrl-C: save and end; a second one ends at once, and so does time."""

import os
import signal
import subprocess
import sys
import time

import pytest

from grpo.interruption import Interruption
from tests.tiny import ROOT

PROGRAM = """
import sys, time
import grpo.interruption as module
from grpo.interruption import Interruption
module.SECONDS_TO_SAVE, module.SECONDS_OF_ECHO = {seconds}, 0.2
interruption = Interruption()
with interruption.listening(lambda: "the last words"):
    print("ready", flush=True)
    got = interruption.unless_asked(lambda: time.sleep(30))
    print("cut short", interruption.signal, flush=True)
    {saving}
print("saved", flush=True)
sys.exit(128 + interruption.signal)
"""


def program(seconds: float, saving: str) -> subprocess.Popen:
    """A program that works until it gets a signal, and then saves; it works already."""
    code = PROGRAM.format(seconds=seconds, saving=saving)
    running = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert running.stdout is not None and running.stdout.readline() == "ready\n"
    return running


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_cuts_work_short_and_leaves_time_to_save(number: signal.Signals) -> None:
    running = program(seconds=60, saving="time.sleep(.5)")
    running.send_signal(number)
    out, err = running.communicate(timeout=20)
    assert out == f"cut short {number.value}\nsaved\n"
    assert running.returncode == 128 + number
    assert f"{number.name}: saving; again to end at once" in err
    assert "last words" not in err


def test_an_echo_of_the_same_signal_is_no_second_one() -> None:
    """A terminal and torchrun may both pass one Ctrl-C on."""
    running = program(seconds=60, saving="time.sleep(1)")
    running.send_signal(signal.SIGINT)
    time.sleep(0.05)
    running.send_signal(signal.SIGTERM)
    out, _ = running.communicate(timeout=20)
    assert out.endswith("saved\n") and running.returncode == 128 + signal.SIGINT


# The second waits in C, as in a collective: no Python handler runs there.
IN_C = "__import__('ctypes').CDLL(None).usleep(20_000_000)"


@pytest.mark.parametrize("saving", ["time.sleep(20)", IN_C])
def test_a_second_signal_ends_it_at_once(saving: str) -> None:
    running = program(seconds=60, saving=saving)
    running.send_signal(signal.SIGTERM)
    assert running.stdout is not None and running.stdout.readline().startswith("cut short")
    time.sleep(0.5)
    running.send_signal(signal.SIGTERM)
    out, err = running.communicate(timeout=10)
    assert out == "" and running.returncode == 128 + signal.SIGTERM
    assert "stopped: SIGTERM: the last words" in err


def test_where_saving_takes_too_long_it_ends_with_its_last_words() -> None:
    running = program(seconds=0.6, saving=IN_C)
    running.send_signal(signal.SIGTERM)
    out, err = running.communicate(timeout=10)
    assert "saved" not in out and running.returncode == 128 + signal.SIGTERM
    assert "stopped: SIGTERM: the last words" in err


def test_without_a_signal_nothing_changes() -> None:
    before = signal.getsignal(signal.SIGTERM)
    interruption = Interruption()
    with interruption.listening(lambda: ""):
        assert interruption.unless_asked(lambda: 7) == 7
    assert signal.getsignal(signal.SIGTERM) is before
    assert interruption.signal == 0


def test_a_signal_between_two_works_keeps_the_second_from_beginning() -> None:
    interruption = Interruption()
    with interruption.listening(lambda: ""):
        os.kill(os.getpid(), signal.SIGTERM)
        assert interruption.unless_asked(lambda: pytest.fail("it began")) is None
    assert interruption.signal == signal.SIGTERM

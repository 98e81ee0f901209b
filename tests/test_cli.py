"""The command line: help with examples everywhere, exit codes, the schedule drawn without MPI."""

import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

COMMANDS = [["run"], ["schedule", "show"], ["weights", "convert"], ["weights", "inspect"], ["weights", "verify"],
            ["weights", "create"], ["report"], ["doctor"], ["place"], ["balance"], ["calibrate"], ["simulate"], ["plan"]]


def hpcmoe(*arguments, **more):
    return subprocess.run([sys.executable, "-m", "hpcmoe", *arguments], capture_output=True, text=True, timeout=60, **more)


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_every_command_explains_itself_with_an_example(command):
    done = hpcmoe(*command, "--help")
    assert done.returncode == 0 and done.stderr == ""
    assert "example" in done.stdout and f"hpcmoe {' '.join(command)}" in done.stdout.split("example", 1)[1]


def test_the_list_of_commands_is_complete():
    text = hpcmoe("--help").stdout
    assert all(command[0] in text for command in COMMANDS)


def test_the_console_script_is_the_same_program():
    script = Path(sysconfig.get_path("scripts"), "hpcmoe")
    assert subprocess.run([script, "--version"], capture_output=True, text=True, check=True).stdout == hpcmoe("--version").stdout


@pytest.mark.parametrize("arguments", [[], ["fly"], ["run", "--wings", "2"], ["schedule"], ["schedule", "show", "--stages", "two"]])
def test_wrong_usage_ends_with_2_and_says_how(arguments):
    done = hpcmoe(*arguments)
    assert done.returncode == 2 and "usage: hpcmoe" in done.stderr and "Traceback" not in done.stderr


def test_a_schedule_is_shown_where_no_mpi_is(tmp_path):
    (tmp_path / "mpi4py").mkdir()
    (tmp_path / "mpi4py" / "__init__.py").write_text("class rc: initialize = finalize = True\n")
    (tmp_path / "mpi4py" / "MPI.py").write_text("raise ImportError('no MPI on this login node')\n")
    done = hpcmoe("schedule", "show", "--stages", "2", "--layers", "4", "--lanes", "2", env={"PYTHONPATH": str(tmp_path), "PATH": "/usr/bin:/bin"})
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("schedule overlapped: 2 stage(s), 4 layers, 4 micro-batch(es), 2 lane(s)")
    assert done.stdout.count("stage ") >= 2


def test_a_schedule_as_text_can_be_parsed_again():
    from hpcmoe.parallel.schedule import build, parse
    text = hpcmoe("schedule", "show", "--stages", "2", "--layers", "3", "--micro-batches", "3", "--schedule", "plain", "--text").stdout
    assert parse(text) == build("plain", 2, 3, 3)


def test_an_impossible_schedule_is_one_message():
    done = hpcmoe("schedule", "show", "--stages", "5", "--layers", "4")
    assert done.returncode == 2 and done.stderr.splitlines() == ["hpcmoe: schedule: stages = 5: expected at most the 4 layers"]

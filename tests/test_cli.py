"""What a program calls itself, in messages and in the record of a run."""

import pathlib
import signal
import subprocess
import sys

import pytest

from cvjax import command_line
from cvjax.errors import UserError

ROOT = pathlib.Path(__file__).parents[1]
SHOW = "from cvjax import cli\nprint(cli.command_name())\n"


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        (["room/script.py"], "script.py"),
        (["-m", "room.script"], "python -m room.script"),
        (["-m", "room"], "python -m room"),
    ],
)
def test_a_module_is_called_by_its_name(arguments, name, tmp_path):
    room = tmp_path / "room"
    room.mkdir()
    for file in ("__init__.py", "__main__.py", "script.py"):
        (room / file).write_text("" if file == "__init__.py" else SHOW)
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT), "PATH": "", "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    assert done.stdout == f"{name}\n", done.stderr


# Config files: errors of the user's own file are shown as his.


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (
            "import os\nos.environ['MY_DATASET']\n",
            r"mine\.py, line 2: KeyError: 'MY_DATASET'",
        ),
        ("x = 1\n", r"mine\.py: AttributeError: there is no function get_config"),
        ("get_config = 3\n", "no function get_config"),
        ("def get_config() return 1\n", r"mine\.py, line 1: SyntaxError"),
        ("def get_config():\n    return 1 / 0\n", r"mine\.py, line 2: ZeroDivisionError"),
        ("def get_config():\n    return {}\n", "returns dict; it takes an ml_collections"),
        ("def get_config(x):\n    return x\n", "TypeError"),
        ("open('no such file')\n", r"mine\.py, line 1: FileNotFoundError"),
        ("raise SystemExit(3)\n", r"mine\.py, line 1: SystemExit"),
    ],
)
def test_errors_of_a_config_file(tmp_path, text, sentence):
    path = tmp_path / "mine.py"
    path.write_text(text)
    with pytest.raises(UserError, match=sentence):
        command_line.check_config_file(str(path))


# Signals, from the first line to the last

PROGRAM = """
import os, signal, sys, time
from cvjax import cli
def main(arguments):
    if "wait" in arguments:
        print("ready", flush=True)
        time.sleep(60)
def late():
    os.kill(os.getpid(), signal.SIGINT)
    os.kill(os.getpid(), signal.SIGTERM)
import atexit
atexit.register(late)
cli.run(main)
"""


def start(path, *arguments):
    path.write_text(PROGRAM)
    return subprocess.Popen(
        [sys.executable, str(path), *arguments],
        env={"PYTHONPATH": str(ROOT), "PATH": "", "JAX_PLATFORMS": "cpu"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_a_signal_outside_of_training(number, code, tmp_path):
    process = start(tmp_path / "program.py", "wait")
    assert process.stdout.readline() == "ready\n"
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == code
    (line,) = errors.strip().splitlines()
    assert line.startswith("program.py: stopped by")


def test_a_signal_after_the_end_changes_nothing(tmp_path):
    process = start(tmp_path / "program.py")
    _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (0, "")


def test_a_signal_while_a_program_starts(tmp_path):
    code = (
        "import sys; sys.argv = ['-m']; import cvjax, os, signal; os.kill(os.getpid(), {})"
    )
    for number, expected in ((signal.SIGINT, 130), (signal.SIGTERM, 75)):
        done = subprocess.run(
            [sys.executable, "-c", code.format(int(number))],
            cwd=ROOT,
            capture_output=True,
            text=True,
        )
        assert done.returncode == expected and "Traceback" not in done.stderr

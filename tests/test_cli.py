"""What a program calls itself, in messages and in the record of a run."""

import os
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

MAKES = """
from ml_collections import config_dict
def get_config():
 config = config_dict.ConfigDict({"seed": 0})
"""


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
        (
            "import ml_collections\n"
            "def get_config(): return ml_collections.FrozenConfigDict({'seed': 0})\n",
            r"returns a FrozenConfigDict, in which",
        ),
        ("def get_config(x):\n    return x\n", "TypeError"),
        ("open('no such file')\n", r"mine\.py, line 1: FileNotFoundError"),
        ("raise SystemExit(3)\n", r"mine\.py, line 1: SystemExit"),
        (f"{MAKES} config.unlock()\n config[3] = 4\n return config\n", "TypeError"),
        (
            f"{MAKES} config.x = config_dict.required_placeholder(int)\n return config\n",
            "required",
        ),
    ],
)
def test_errors_of_a_config_file(tmp_path, text, sentence):
    path = tmp_path / "mine.py"
    path.write_text(text)
    with pytest.raises(UserError, match=sentence):
        command_line.check_config_file(str(path))


# The compilation cache

CACHED = """
import sys
import jax, numpy as np
from cvjax import cli
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
one, two = jax.jit(lambda x: x + 1), jax.jit(lambda x, y: x.sum() * y)
one.__wrapped__.__name__, two.__wrapped__.__name__ = "one", "two"
def main(arguments):
    print(one(np.ones(3, np.float32)), two(np.ones(2, np.float32), np.ones(4, np.float32)))
    if arguments == ["trace"]:
        jax.jit(lambda x: x + np.array("x"))(1)
    if arguments:
        raise TypeError("a mistake of the program")
cli.run(main)
"""


@pytest.fixture
def run_cached(tmp_path):
    """Runs a program of two compiled functions; their cache is `tmp_path`/cvjax/xla."""
    (tmp_path / "program.py").write_text(CACHED)
    cache = {"XDG_CACHE_HOME": str(tmp_path)}
    environment = {"PYTHONPATH": str(ROOT), "PATH": "", "JAX_PLATFORMS": "cpu", **cache}

    def run(*arguments):
        return subprocess.run(
            [sys.executable, str(tmp_path / "program.py"), *arguments],
            **{"env": environment, "capture_output": True, "text": True},
        )

    return run


def test_swapped_programs_of_the_cache(run_cached, tmp_path):
    """JAX takes one for the other, and fails; then everything is compiled again."""
    sound = run_cached()
    assert sound.returncode == 0, sound.stderr
    first, second = sorted((tmp_path / "cvjax" / "xla").glob("jit_*-cache"))[:2]
    contents = first.read_bytes(), second.read_bytes()
    first.write_bytes(contents[1])
    second.write_bytes(contents[0])
    mended = run_cached()
    assert (mended.returncode, mended.stdout) == (0, sound.stdout), mended.stderr
    assert "Traceback" not in mended.stderr
    assert not list((tmp_path / "cvjax" / "xla").glob("jit_*"))
    assert run_cached().stderr == ""


@pytest.mark.slow
def test_a_truncated_program_of_the_cache(run_cached, tmp_path):
    """JAX never overwrites an entry, so it goes, and the next start has a sound one."""
    sound = run_cached()
    entries = sorted((tmp_path / "cvjax" / "xla").glob("jit_*-cache"))
    sizes = {entry.name: entry.stat().st_size for entry in entries}
    os.truncate(entries[0], 100)
    mended = run_cached()
    assert (mended.returncode, mended.stdout) == (0, sound.stdout), mended.stderr
    (line,) = mended.stderr.splitlines()
    assert "damaged entry of the compilation cache was removed" in line
    again = run_cached()
    assert (again.returncode, again.stderr) == (0, "")
    assert entries[0].stat().st_size == sizes[entries[0].name]


@pytest.mark.parametrize("mistake", ["fail", pytest.param("trace", marks=pytest.mark.slow)])
def test_a_mistake_of_the_program_is_shown_once(mistake, run_cached, tmp_path):
    """It is no reason to try again, and to empty the cache."""
    run_cached()
    kept = sorted((tmp_path / "cvjax" / "xla").iterdir())
    failed = run_cached(mistake)
    assert failed.returncode == 1
    assert failed.stderr.count("Traceback") == 1
    assert "compilation cache" not in failed.stderr
    assert sorted((tmp_path / "cvjax" / "xla").iterdir()) == kept


def test_text_that_the_terminal_cannot_show(tmp_path):
    (tmp_path / "program.py").write_text(
        "from cvjax import cli\nfrom cvjax.errors import UserError\n"
        "def main(arguments):\n    print(arguments[0])\n    raise UserError(arguments[0])\n"
        "cli.run(main)\n"
    )
    done = subprocess.run(
        [sys.executable, str(tmp_path / "program.py"), "café.png"],
        env={"PYTHONPATH": str(ROOT), "PATH": "", "PYTHONIOENCODING": "ascii"},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (2, "caf\\xe9.png\n"), done.stderr
    assert done.stderr == "program.py: caf\\xe9.png\n"


def test_closed_streams(tmp_path):
    (tmp_path / "program.py").write_text(
        "import sys\nfrom cvjax import cli\nfrom cvjax.errors import UserError\n"
        "def main(arguments):\n    print('said', flush=True)\n    sys.stdout.flush()\n"
        "    raise UserError('refused')\ncli.run(main)\n"
    )
    environment = {"PYTHONPATH": str(ROOT), "PATH": ""}
    for closed, wanted in (
        (">&-", ("", "program.py: refused\n")),
        ("2>&-", ("said\n", "")),
    ):
        command = f'"{sys.executable}" "{tmp_path / "program.py"}" {closed}'
        done = subprocess.run(
            ["/bin/sh", "-c", command], env=environment, capture_output=True, text=True
        )
        assert (done.returncode, done.stdout, done.stderr) == (2, *wanted)


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


IN_CALLBACK = """
import gc, os, time
from cvjax import cli
calls = []
def callback(*arguments):
    if not calls:
        calls.append(1)  # before the signal, whose handler ends this callback
        os.kill(os.getpid(), {number})
        for _ in range(10):  # the handler is called here
            pass
def main(arguments):
    gc.callbacks.append(callback)
    gc.collect()
    time.sleep(2)
    print("went on")
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


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_a_signal_within_a_callback_of_the_collector(number, code, tmp_path):
    path = tmp_path / "program.py"
    path.write_text(IN_CALLBACK.format(number=int(number)))
    done = subprocess.run(
        [sys.executable, str(path)],
        env={"PYTHONPATH": str(ROOT), "PATH": "", "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == code and not done.stdout
    (line,) = done.stderr.strip().splitlines()
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

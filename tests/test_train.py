"""The command line as a user meets it: real processes, signals, sentences, exit codes."""

import json
import pathlib
import signal
import subprocess
import sys
import time

import pytest
from run_outcome import outcome

ROOT = pathlib.Path(__file__).parents[1]
# Long enough to be caught in the middle, over in seconds all the same.
RUN = [
    "--config=configs/digits_mlp.py",
    "--config.total_steps=1000",
    "--config.log_every=10",
    "--config.eval_every=250",
    "--config.checkpoint_every=100",
    "--config.model.widths=(32,)",
]


def command(workdir, *settings):
    return [sys.executable, "train.py", f"--workdir={workdir}", *RUN, *settings]


def run(workdir, *settings):
    return subprocess.run(
        command(workdir, *settings), cwd=ROOT, capture_output=True, text=True, timeout=120
    )


def start_and_wait_for_checkpoint(workdir, *settings):
    process = subprocess.Popen(
        command(workdir, *settings),
        cwd=ROOT,
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 100
    while not any((workdir / "checkpoints").glob("[0-9]*")):
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return process


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("uninterrupted")
    done = run(workdir)
    assert done.returncode == 0, done.stderr
    return workdir


@pytest.mark.parametrize(
    ("number", "code"),
    [
        (signal.SIGTERM, 75),
        pytest.param(signal.SIGINT, 75, marks=pytest.mark.slow),
        pytest.param(signal.SIGKILL, -9, marks=pytest.mark.slow),
    ],
)
def test_stopped_process_says_so_and_goes_on_in_a_new_one(
    number, code, uninterrupted, tmp_path
):
    process = start_and_wait_for_checkpoint(tmp_path)
    process.send_signal(number)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == code, stderr
    assert not (tmp_path / "summary.json").exists()
    if code == 75:
        assert "the same command goes on from there" in stderr
    again = run(tmp_path)
    assert again.returncode == 0, again.stderr
    assert "Resuming at step" in again.stderr
    assert outcome(tmp_path) == outcome(uninterrupted)


SIGNALLED = """
import os, runpy, signal, sys
from cvjax.training import trainer

{phase} = trainer.{phase}

def signalled(*arguments):
    os.kill(os.getpid(), signal.{name})
    return {phase}(*arguments)

trainer.{phase} = signalled
runpy.run_path("train.py", run_name="__main__")
"""


@pytest.mark.parametrize(
    ("phase", "name", "code"),
    [
        ("load_data", "SIGTERM", 75),
        pytest.param("_finish", "SIGTERM", 75, marks=pytest.mark.slow),
        pytest.param("_finish", "SIGINT", 130, marks=pytest.mark.slow),
    ],
)
def test_a_signal_before_the_first_step_and_in_the_final_evaluation(
    phase, name, code, uninterrupted, tmp_path
):
    program = SIGNALLED.format(phase=phase, name=name)
    stopped = subprocess.run(
        [sys.executable, "-c", program, *command(tmp_path)[2:]],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert stopped.returncode == code and "Traceback" not in stopped.stderr
    assert f"stopped by {'SIGTERM' if code == 75 else 'Ctrl-C'}" in stopped.stderr
    assert not (tmp_path / "summary.json").exists()
    if phase == "load_data":
        return
    assert run(tmp_path).returncode == 0
    files = (workdir / "summary.json" for workdir in (tmp_path, uninterrupted))
    mine, other = (json.loads(file.read_text()) for file in files)
    assert mine == other


def test_second_process_on_one_workdir_is_refused(tmp_path):
    # Not over before the second one has started, however fast the machine is.
    long = "--config.total_steps=1000000"
    process = start_and_wait_for_checkpoint(tmp_path, long)
    try:
        second = run(tmp_path, long)
    finally:
        process.kill()
        process.communicate()
    assert second.returncode == 2
    assert (
        f"train.py: The workdir {tmp_path} is in use by process {process.pid}"
        in second.stderr
    )


def test_finished_run_says_so(uninterrupted):
    done = run(uninterrupted)
    assert done.returncode == 0
    assert f"{uninterrupted} is finished: step 1000" in done.stderr
    assert (uninterrupted / "curves.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (
            ["--config.model.width=(3,)"],
            "the config has no setting width; did you mean widths?",
        ),
        (
            ["--config.optim.learning_rate=-1"],
            "optim.learning_rate must be above 0, got -1.0.",
        ),
        (
            ["--config.total_steps=many"],
            "--config.total_steps takes a whole number, got 'many'",
        ),
        (["--config.optim.momentum=x"], "--config.optim.momentum takes a number, got 'x'"),
        (["--config.data.flip=2"], "--config.data.flip takes true or false, got '2'"),
        (["--config.data=digits"], "--config.data takes no value of its own, as it is"),
        (["--config=configs/nope.py"], "the config file 'configs/nope.py' does not exist"),
        (["--config.model.widths[9]=5"], "no setting of that number"),
        (["--config=configs"], "the config file 'configs' is not a file"),
        (["surprise"], "'surprise' is not a flag; all settings look like --name=value."),
        (["--wrokdir=x"], "Unknown command line flag 'wrokdir'. Did you mean: workdir ?"),
        (
            ["--config.data.data_dir=/nowhere", "--config.data.name=mnist"],
            "/nowhere, which is",
        ),
        (["--workdir=/dev/null/x"], "The workdir /dev/null/x cannot be written to"),
    ],
)
def test_mistakes_get_one_line_and_exit_code_2(arguments, sentence, tmp_path, call_program):
    done = call_program(*command(tmp_path, *arguments)[1:])
    assert done.returncode == 2
    *notices, line = done.stderr.strip().splitlines()
    assert line.startswith("train.py: ")
    assert sentence in line
    assert all("is given 2 times; the last one counts" in notice for notice in notices)


PADDED = """
from cvjax.training import default_config

def get_config():
    config = default_config("convnet")
    config.model.paddings = (100_000, 0)
    return config
"""


def test_what_no_memory_holds_is_refused(tmp_path, call_program):
    (tmp_path / "padded.py").write_text(PADDED)
    wide = command(tmp_path / "w", "--config.model.widths=(3000000,3000000)")[1:]
    padded = [
        "train.py",
        f"--config={tmp_path / 'padded.py'}",
        f"--workdir={tmp_path / 'w'}",
    ]
    for arguments in (wide, padded):
        done = call_program(*arguments, seconds=60)
        assert done.returncode == 2
        assert "GB of memory at least, and there are" in done.stderr.splitlines()[-1]
        assert not (tmp_path / "w").exists()


@pytest.mark.parametrize("content", [None, b"\xff\xfe--x"])
def test_a_flag_file_that_cannot_be_read(content, tmp_path, call_program):
    file = tmp_path / "flags"
    if content:
        file.write_bytes(content)
    done = call_program(*command(tmp_path, f"--flagfile={file}")[1:])
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1 and "--flagfile" in done.stderr

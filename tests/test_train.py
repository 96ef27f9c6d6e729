"""The command line as a user meets it: real processes, signals, sentences, exit codes."""

import json
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from cvjax.storage import metrics_log

ROOT = pathlib.Path(__file__).parents[1]
# Long enough to be caught in the middle, over in seconds all the same.
RUN = [
    "--config=configs/digits_mlp.py",
    "--config.total_steps=1000",
    "--config.log_every=10",
    "--config.eval_every=250",
    "--config.checkpoint_every=50",
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


def without_time(workdir):
    return [
        json.dumps(
            {key: value for key, value in row.items() if not key.startswith("time/")}
        )
        for row in metrics_log.read_metrics(workdir / "metrics.jsonl")
    ]


def final_digest(workdir):
    info = workdir / "checkpoints" / "1000" / "info.json"
    return json.loads(info.read_text())["info"]["digest"]


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
        (signal.SIGKILL, -9),
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
    assert without_time(tmp_path) == without_time(uninterrupted)
    assert final_digest(tmp_path) == final_digest(uninterrupted)
    mine, other = ((w / "summary.json").read_bytes() for w in (tmp_path, uninterrupted))
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


@pytest.mark.parametrize("content", [None, b"\xff\xfe--x"])
def test_a_flag_file_that_cannot_be_read(content, tmp_path, call_program):
    file = tmp_path / "flags"
    if content:
        file.write_bytes(content)
    done = call_program(*command(tmp_path, f"--flagfile={file}")[1:])
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1 and "--flagfile" in done.stderr

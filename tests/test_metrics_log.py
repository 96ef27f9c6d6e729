"""Metrics read back exactly, and a resumed file is that of an uninterrupted run."""

import contextlib
import io
import json
import math
import os
import pathlib
import pty
import signal
import struct
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest
from tensorboardX.proto import event_pb2

from cvjax import errors, progress
from cvjax.storage import metrics_log

REPOSITORY = pathlib.Path(__file__).parents[1]


def write_run(workdir, steps, resume_step=None):
    """A row of training metrics at each step, and one of validation at even steps."""
    with metrics_log.open_writer(workdir, resume_step) as write:
        for step in steps:
            write(step, {"train/loss": 1 / step, "train/error": np.float32(0.1) / step})
            if step % 2 == 0:
                write(step, {"val/error": 0.1 * step})


def test_rows_read_back_exactly(tmp_path):
    row = {
        "val/b": 0.1 + 0.2,
        "val/a": np.float32(0.1),
        "ode/steps": jnp.int32(12),
        "time/x": 1e-300,
        "train/nan": math.nan,
        "train/inf": jnp.inf,
        "train/int": 3,
    }
    with metrics_log.open_writer(tmp_path) as write:
        write(5, row)
    (text,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert text == (
        '{"step": 5, "ode/steps": 12, "time/x": 1e-300, "train/inf": null, '
        '"train/int": 3, "train/nan": null, "val/a": 0.10000000149011612, '
        '"val/b": 0.30000000000000004}'
    )
    (read,) = metrics_log.read_metrics(tmp_path / "metrics.jsonl")
    assert list(read) == ["step", *sorted(row)]
    assert read["val/b"] == 0.1 + 0.2
    assert np.float32(read["val/a"]) == np.float32(0.1)
    assert math.isnan(read["train/nan"]) and math.isnan(read["train/inf"])


def test_a_row_is_on_disk_when_write_returns(tmp_path):
    with metrics_log.open_writer(tmp_path) as write:
        write(1, {"train/loss": 1.0})
        assert metrics_log.read_metrics(tmp_path / "metrics.jsonl") == [
            {"step": 1, "train/loss": 1.0}
        ]


def test_a_resumed_run_has_the_bytes_of_an_uninterrupted_one(tmp_path):
    write_run(tmp_path / "whole", range(1, 11))
    write_run(tmp_path / "resumed", range(1, 9))
    with open(tmp_path / "resumed" / "metrics.jsonl", "ab") as file:
        file.write(b'{"step": 9, "train/lo')  # killed while writing
    write_run(tmp_path / "resumed", range(5, 11), resume_step=4)
    whole = (tmp_path / "whole" / "metrics.jsonl").read_bytes()
    assert whole.count(b"\n") == 15
    assert (tmp_path / "resumed" / "metrics.jsonl").read_bytes() == whole


def test_a_run_that_never_saved_starts_afresh(tmp_path):
    write_run(tmp_path, range(1, 4))
    write_run(tmp_path, range(1, 3))
    rows = metrics_log.read_metrics(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 2]


def test_drop_after_counts_and_leaves_bytes_alone(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert metrics_log.drop_after(path, 3) == 0 and not path.exists()
    kept = b'{"step": 1,   "x": 1.50}\n{"step": 3}\n'
    path.write_bytes(kept + b'{"step": 4}\n{"step": 5}\n{"step": 3')
    assert metrics_log.drop_after(path, 3) == 2
    assert path.read_bytes() == kept
    assert metrics_log.drop_after(path, 3) == 0
    assert os.listdir(tmp_path) == ["metrics.jsonl"]


@pytest.mark.parametrize("torn", [b'{"step": 3, "x"', b'{"step": 3, "x": 1}', b"\0"])
def test_a_torn_last_line_is_passed_over(tmp_path, torn):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1, "x": 0.5}\n' + torn)
    assert metrics_log.read_metrics(path) == [{"step": 1, "x": 0.5}]


@pytest.mark.parametrize("line", ["{", "3", "[]", '{"x": 1}', ""])
def test_a_bad_line_in_the_middle_is_named(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"step": 1}}\n{line}\n{{"step": 2}}\n')
    with pytest.raises(errors.UserError, match=f"Line 2 of {path}"):
        metrics_log.read_metrics(path)


def test_no_metrics_is_a_user_error(tmp_path):
    with pytest.raises(errors.UserError, match="does not exist"):
        metrics_log.read_metrics(tmp_path / "metrics.jsonl")


WRITE_AND_DIE = """
import os, signal, sys
from cvjax.storage import metrics_log
with metrics_log.open_writer(sys.argv[1]) as write:
    for step in (1, 2, 3):
        write(step, {"train/loss": 1 / step})
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_kill_loses_no_row(tmp_path):
    process = subprocess.run(
        [sys.executable, "-c", WRITE_AND_DIE, str(tmp_path)], cwd=REPOSITORY
    )
    assert process.returncode == -signal.SIGKILL
    rows = metrics_log.read_metrics(tmp_path / "metrics.jsonl")
    assert rows == [{"step": s, "train/loss": 1 / s} for s in (1, 2, 3)]


# TensorBoard


def read_events(path):
    """The events of a file: length (8 bytes), its crc (4), the event, its crc (4)."""
    content, events = path.read_bytes(), []
    while content:
        (length,) = struct.unpack("<Q", content[:8])
        events.append(event_pb2.Event.FromString(content[12 : 12 + length]))
        content = content[16 + length :]
    return events


def test_tensorboard_sees_a_resumed_run_once(tmp_path):
    """TensorBoard drops what lies at or after the step of a session's start."""
    write_run(tmp_path, range(1, 9))
    write_run(tmp_path, range(5, 11), resume_step=4)
    points = {}
    files = sorted((tmp_path / "tensorboard").iterdir())
    assert len(files) == 2
    for file in files:
        for event in read_events(file):
            if event.HasField("session_log"):
                points = {k: v for k, v in points.items() if k[1] < event.step}
            for value in event.summary.value:
                assert (value.tag, event.step) not in points
                points[value.tag, event.step] = value.simple_value
    losses = {step: x for (tag, step), x in points.items() if tag == "train/loss"}
    assert losses == {step: np.float32(1 / step) for step in range(1, 11)}
    assert points["val/error", 10] == np.float32(1.0)


def test_tensorboard_gets_finite_numbers_only(tmp_path):
    with metrics_log.open_writer(tmp_path) as write:
        write(1, {"a": math.nan, "b": 2.0})
    (file,) = (tmp_path / "tensorboard").iterdir()
    tags = [value.tag for event in read_events(file) for value in event.summary.value]
    assert tags == ["b"]


# Progress


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0:00"), (31.4, "0:31"), (59.7, "1:00"), (725, "12:05"), (11045, "3:04:05")],
)
def test_format_duration(seconds, text):
    assert progress.format_duration(seconds) == text


@pytest.fixture
def clock(monkeypatch):
    """Time that passes only when a test says so."""

    class Clock:
        now = 1000.0

        def monotonic(self):
            return self.now

    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    return clock


def test_remaining_time_counts_the_steps_of_this_process(clock):
    """Resumed at 900 of 1000, 20 s to compile, then 2 s per step."""
    eta = progress.remaining_time(1000)
    clock.now += 20
    assert eta(901) == "-:--"
    clock.now += 2
    assert eta(902) == "3:16"
    clock.now += 2 * 38
    assert eta(940) == "2:00"
    clock.now += 2 * 60
    assert eta(1000) == "0:00"


def test_lines_elsewhere(clock, caplog, monkeypatch):
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with (
        caplog.at_level("INFO", logger="absl"),
        progress.open(1000, 0, "train") as show,
    ):
        for step in range(1, 201):
            show(step, "loss 0.53  error 12.1 %" if step == 200 else "")
            clock.now += 0.5
    assert caplog.messages == ["step 200/1000  loss 0.53  error 12.1 %  ETA 6:40"]


SHOW_BAR = """
import time
from absl import app, logging
from cvjax import progress

def main(_):
    with progress.open(1000, 0, "digits") as show:
        start = time.perf_counter()
        for step in range(1, 1001):
            show(step, "loss 0.53 [x]" if step == 500 else "")
            if step == 600:
                logging.info("a notice")
        seconds = time.perf_counter() - start
    print("per step", 1e6 * seconds / 1000)

app.run(main)
"""


def test_a_bar_on_a_terminal():
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", SHOW_BAR],
        cwd=REPOSITORY,
        stderr=theirs,
        stdout=subprocess.PIPE,
        env={**os.environ, "TERM": "xterm", "COLUMNS": "100"},
    )
    os.close(theirs)
    shown = ""
    with contextlib.suppress(OSError):  # the end of a terminal
        while True:
            shown += os.read(ours, 4096).decode()
    os.close(ours)
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    assert "1000/1000" in shown and "loss 0.53 [x]" in shown and "ETA 0:00" in shown
    # The notice has a line of its own, and is said once.
    (line,) = [line for line in shown.split("\n") if "a notice" in line]
    assert "digits" not in line.split("\x1b[2K")[-1]
    assert float(printed.split()[-1]) < 300, "microseconds a step"


def test_json_lines_are_valid_json(tmp_path):
    with metrics_log.open_writer(tmp_path) as write:
        write(1, {"x": math.inf})

    def refuse(constant):
        raise AssertionError(constant)

    text = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(text, parse_constant=refuse) == {"step": 1, "x": None}


def test_tensorboard_does_not_bring_pytorch(tmp_path):
    """Its import takes seconds, which the first step would wait for; later it is there."""
    pytest.importorskip("torch", reason="needs PyTorch: pip install torch")
    script = (
        "import sys; from cvjax.storage import metrics_log\n"
        f"with metrics_log.open_writer({str(tmp_path)!r}) as write:\n"
        "    write(1, {'loss': 0.5})\n"
        "assert 'tensorboardX' in sys.modules and 'torch' not in sys.modules\n"
        "import torch; torch.zeros(1)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

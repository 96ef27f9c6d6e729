"""Data parallelism: many devices and processes compute what one device does."""

import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from benchmarks.photograph_set import photograph, write_set
from cvjax.errors import UserError
from cvjax.storage import checkpoint, metrics_log
from cvjax.training import default_config, devices, train_and_evaluate
from cvjax.training.trained_network import load_network

ROOT = pathlib.Path(__file__).parents[1]
# Smooth: a rounding error that switches a ReLU grows to 2e-4 within 20 steps.
RESNET = {"name": "resnet_cifar", "depth": 8, "width": 4, "activation": "sigmoid"}
MODELS = {
    "mlp": {"name": "mlp", "widths": (16,)},
    "residual": RESNET,
    "grouped": {**RESNET, "norm_group": 32},
    "ode-adaptive": {"name": "odenet", "width": 2, "stem": "res", "steps": 0},
}


def create_config(model="mlp", **settings):
    config = default_config(MODELS[model]["name"])
    config.model.update(MODELS[model])
    config.total_steps = 20
    config.log_every = 5
    config.eval_every = 10
    config.checkpoint_every = 10
    config.train_eval_examples = 0
    config.data.batch_size = 64
    config.data.eval_batch_size = 100  # not a multiple of eight
    config.data.crop_padding = 1
    config.data.flip = True
    config.optim.schedule = "constant"  # so that total_steps changes nothing before
    config.optim.learning_rate = 0.02
    config.update_from_flattened_dict(settings)
    return config


def environment(count=1):
    flags = f"--xla_force_host_platform_device_count={count}"
    return os.environ | {
        "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {flags}",
        "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}",
        "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir,
    }


def on_eight_devices(code, *arguments):
    """Runs the code of a function body in a process with eight devices."""
    code = (
        "from cvjax.training import trainer\nfrom test_devices import *\n"
        "trainer.draw_curves = lambda *_: None\n"
        f"assert jax.device_count() == 8\n{code}"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        cwd=ROOT,
        env=environment(8),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def parameters(folder, step="last"):
    network = load_network(folder, str(step))
    return jax.tree.map(np.asarray, network.variables)


def check_same_run(folder, reference, step):
    """Equal but for the order in which float32 numbers were added."""
    leaves = [jax.tree.leaves(parameters(run, step)) for run in (folder, reference)]
    for mine, other in zip(*leaves, strict=True):
        np.testing.assert_allclose(mine, other, rtol=1e-4, atol=1e-5)
    mine, other = rows(folder, step), rows(reference, step)
    assert mine and mine.keys() <= other.keys()
    for row in mine:
        for key, value in mine[row].items():
            assert value == pytest.approx(other[row][key], rel=1e-4), (row, key)


def rows(folder, last):
    """The rows of a run by their step and kind; at its end a run has one of each kind."""
    found = {}
    for row in metrics_log.read_metrics(folder / "metrics.jsonl"):
        timeless = {key: row[key] for key in row if not key.startswith("time/")}
        if row["step"] <= last:
            found[row["step"], "val/error" in row] = timeless
    return found


@pytest.mark.parametrize(
    "model",
    [
        "mlp",
        pytest.param("residual", marks=pytest.mark.slow),
        pytest.param("grouped", marks=pytest.mark.slow),
        pytest.param("ode-adaptive", marks=pytest.mark.slow),
    ],
)
def test_eight_devices_compute_what_one_does_and_checkpoints_fit_both(model, tmp_path):
    one, eight = tmp_path / "one", tmp_path / "eight"
    summary = train_and_evaluate(create_config(model), one)
    said = on_eight_devices(
        "train_and_evaluate(create_config(sys.argv[1]), sys.argv[2])\n"
        "more = {'total_steps': 24, 'steps_per_dispatch': 3}\n"
        "train_and_evaluate(create_config(sys.argv[1], **more), sys.argv[3])",
        *(model, eight, one),
    )
    assert said == ""
    check_same_run(eight, one, 20)
    theirs = json.loads((eight / "summary.json").read_text())
    assert theirs == pytest.approx(summary, rel=1e-4)
    # `one` went on with eight devices; `eight` goes on with one.
    train_and_evaluate(create_config(model, total_steps=24), eight)
    check_same_run(eight, one, 24)


def start_processes(folder, *settings, count=2):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    command = [
        *(sys.executable, "train.py", f"--workdir={folder}", *settings),
        *(f"--coordinator_address=localhost:{port}", f"--process_count={count}"),
    ]
    return [
        subprocess.Popen(
            [*command, f"--process_index={index}"],
            cwd=ROOT,
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(count)
    ]


def end_of(processes):
    """Exit code and last line of each ("" of one that was killed)."""
    log = [process.communicate(timeout=300)[1] for process in processes]
    return [
        (process.returncode, (text.strip().splitlines() or [""])[-1])
        for process, text in zip(processes, log, strict=True)
    ]


def wait_for_checkpoint(folder, processes):
    deadline = time.monotonic() + 200
    while not any((folder / "checkpoints").glob("[0-9]*")):
        assert all(p.poll() is None for p in processes), end_of(processes)
        assert time.monotonic() < deadline
        time.sleep(0.02)


def as_settings(config, file):
    """The command line of a config."""
    flat = {}

    def visit(values, prefix):
        for key, value in values.items():
            if isinstance(value, dict):
                visit(value, f"{prefix}{key}.")
            elif prefix + key != "model.name" and value != "":  # "" is what stands anyway
                flat[f"{prefix}{key}"] = value

    visit(config.to_dict(), "")
    return [f"--config={file}", *(f"--config.{key}={flat[key]}" for key in flat)]


@pytest.mark.parametrize(
    ("model", "file", "at_once"),
    [
        ("mlp", "configs/digits_mlp.py", 3),
        pytest.param("residual", "configs/digits_resnet.py", 1, marks=pytest.mark.slow),
    ],
)
def test_two_processes_stop_together_and_one_goes_on(model, file, at_once, tmp_path):
    two, one, whole = (tmp_path / name for name in ("two", "one", "whole"))
    config = create_config(model, total_steps=100_000, steps_per_dispatch=at_once)
    processes = start_processes(two, *as_settings(config, file))
    wait_for_checkpoint(two, processes)
    processes[1].send_signal(signal.SIGTERM)
    (first, log), (second, own) = end_of(processes)
    assert (first, second) == (75, 75), (log, own)
    step = checkpoint.latest_step(two)
    assert f"Stopped by a signal to another process and saved at step {step} of" in log
    assert f"Stopped by SIGTERM and saved at step {step} of" in own
    config.total_steps = step
    train_and_evaluate(config, one)
    check_same_run(two, one, step)
    # One that ends at `step` also logs there: what goes on is compared with a whole run.
    config.total_steps = step + 4
    train_and_evaluate(config, two)
    train_and_evaluate(config, whole)
    check_same_run(two, whole, step + 4)


@pytest.mark.slow
def test_two_processes_with_workers_share_a_stream(tmp_path):
    two, one = tmp_path / "two", tmp_path / "one"
    examples = [photograph(i) for i in range(90)]
    write_set(tmp_path / "data", {"train": examples[:80], "test": examples[80:]})
    config = create_config()
    config.data.update(name="photographs", data_dir=str(tmp_path / "data"), streaming=True)
    config.data.update(image_size=16, crop_padding=0, short_side_min=18)
    config.data.update(batch_size=8, num_workers=1, short_side_max=28)
    settings = as_settings(config, "configs/digits_mlp.py")
    for code, log in end_of(start_processes(two, *settings)):
        assert code == 0, log
    config.data.num_workers = 0
    train_and_evaluate(config, one)
    check_same_run(two, one, 20)


@pytest.mark.slow
def test_a_process_that_is_killed_takes_the_others_with_it(tmp_path):
    config = create_config(total_steps=1_000_000)
    processes = start_processes(tmp_path, *as_settings(config, "configs/digits_mlp.py"))
    wait_for_checkpoint(tmp_path, processes)
    processes[1].kill()
    (first, _), (second, _) = end_of(processes)
    assert first not in (0, 75) and second == -signal.SIGKILL


@pytest.mark.slow
def test_a_mistake_is_told_by_all_processes(tmp_path):
    (tmp_path / "summary.json").write_text('{"step": 21}')
    settings = as_settings(create_config(), "configs/digits_mlp.py")
    for code, log in end_of(start_processes(tmp_path, *settings)):
        assert code == 2
        assert "holds a finished run of 21 steps, more than total_steps 20" in log


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("", 2, 0), "go with the HOST:PORT of the first process"),
        (("localhost", 2, 0), "got 'localhost', 2 and 0"),
        (("localhost:1", 2, 2), "a --process_index from 0 to N - 1"),
    ],
)
def test_impossible_processes_are_refused(arguments, sentence):
    with pytest.raises(UserError, match=sentence):
        devices.connect(*arguments)


def test_processes_join_by_themselves_where_a_launcher_started_several(monkeypatch):
    joined = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda **given: joined.append(given))
    devices.connect()
    monkeypatch.setenv("SLURM_NTASKS", "4")  # as in a batch script, a single process
    devices.connect()
    assert not joined
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "4")
    devices.connect()
    monkeypatch.delenv("SLURM_STEP_NUM_TASKS")
    devices.connect("auto")
    assert joined == [{"shutdown_timeout_seconds": devices.SHUTDOWN_SECONDS}] * 2


def test_a_batch_that_devices_cannot_share_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: 12)
    with pytest.raises(
        UserError, match=r"64 cannot be shared evenly by 12 .* 60 or 72, or"
    ):
        train_and_evaluate(create_config(), tmp_path)
    assert not (tmp_path / "config.json").exists()

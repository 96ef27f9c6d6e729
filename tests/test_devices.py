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

from cvjax.errors import UserError
from cvjax.training import checkpoint, default_config, devices, logs, train_and_evaluate
from cvjax.training.network import load_network

ROOT = pathlib.Path(__file__).parents[1]
MODELS = {
    "mlp": {"name": "mlp", "widths": (16,)},
    "residual": {"name": "resnet_cifar", "depth": 8, "width": 4},
    "ode-adaptive": {"name": "odenet", "width": 2, "stem": "res", "steps": 0},
}


def create_config(model="mlp", **settings):
    config = default_config(MODELS[model]["name"])
    config.model.update(MODELS[model])
    config.total_steps = 20
    config.log_every = 5
    config.eval_every = 10
    config.checkpoint_every = 10
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
        "XLA_FLAGS": flags,
        "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}",
        "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir,
    }


def on_eight_devices(code, *arguments):
    """Runs the code of a function body in a process with eight devices."""
    code = f"from test_devices import *\nassert jax.device_count() == 8\n{code}"
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
    for mine, other in zip(
        *(jax.tree.leaves(parameters(run, step)) for run in (folder, reference)),
        strict=True,
    ):
        np.testing.assert_allclose(mine, other, rtol=1e-4, atol=1e-5)
    mine, other = (
        [row for row in logs.read_metrics(run / "metrics.jsonl") if row["step"] <= step]
        for run in (folder, reference)
    )
    assert len(mine) == len(other) > 0
    for mine_row, other_row in zip(mine, other, strict=True):
        assert mine_row.keys() - other_row.keys() <= {"time/compile_seconds"}
        for key, value in mine_row.items():
            if not key.startswith("time/"):
                assert value == pytest.approx(other_row[key], rel=1e-4), key


@pytest.mark.parametrize(
    "model",
    [
        "mlp",
        pytest.param("residual", marks=pytest.mark.slow),
        pytest.param("ode-adaptive", marks=pytest.mark.slow),
    ],
)
def test_eight_devices_compute_what_one_does_and_checkpoints_fit_both(model, tmp_path):
    one, eight = tmp_path / "one", tmp_path / "eight"
    summary = train_and_evaluate(create_config(model), one)
    said = on_eight_devices(
        "train_and_evaluate(create_config(sys.argv[1]), sys.argv[2])\n"
        "train_and_evaluate(create_config(sys.argv[1], total_steps=24), sys.argv[3])",
        *(model, eight, one),
    )
    assert said == ""
    check_same_run(eight, one, 20)
    theirs = json.loads((eight / "summary.json").read_text())
    assert theirs == pytest.approx(summary, rel=1e-4)
    # `one` went on with eight devices; `eight` goes on with one.
    train_and_evaluate(create_config(model, total_steps=24), eight)
    check_same_run(eight, one, 24)

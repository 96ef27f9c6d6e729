"""How long a run takes to begin, and how fast its data comes.

    TFDS_DATA_DIR=... python -m benchmarks.data --workdir=results/benchmarks/data
    python -m benchmarks.data --name=digits --config=configs/digits_resnet.py

Start: each a process of its own. "imports" is `import jax, flax` and what `import
cvjax.training` adds to it. "first batch" is from `data.load` to the first batch on the
host, with a blank cache (every image is decoded) and with the cache that this left. "first
step" is from the start of train.py to the first row of its metrics, imports included, with
blank caches (images, compiled programs) and again with full ones.

Rate: batches of training images, with and without augmentation (pad by 4, crop, flip),
interleaved:

    cvjax, host             indices and rows of the memory map: what the host has to do
    cvjax, augmented        and normalisation and augmentation, jitted, where JAX computes
    PyTorch, batch          rows of a tensor, augmented as one batch
    PyTorch, DataLoader     image by image in the way of torchvision's transforms (pad, crop
                            and flip of a picture, then a tensor), `--workers` processes
    tf.data                 the same per image in TensorFlow's graph, if it is installed

Workers may fetch a few batches while others have their turn; of 50 they are little. What is
not installed is left out, and the results say so. torchvision is not needed: its
transforms of a picture are PIL's, and are written out here.
"""

import functools
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from absl import flags, logging

from benchmarks import batch_sources, report
from cvjax import cli, data, timing
from cvjax.errors import UserError
from cvjax.report import tables
from cvjax.storage import workdir as workdirs

ROOT = pathlib.Path(__file__).resolve().parents[1]
HEADINGS = ("what", "median (quartiles)", "n")


def define_flags() -> None:
    """The command line."""
    flags.DEFINE_string("workdir", None, "Where results.json and table.md go.")
    flags.DEFINE_string("name", "cifar10", "The data set of the first batch and the rate.")
    flags.DEFINE_string("config", "configs/cifar10_resnet.py", "Of the first step.")
    flags.DEFINE_integer("batch_size", 128, "Images per batch.", lower_bound=1)
    flags.DEFINE_integer("batches", 50, "Of each timing of the rate.", lower_bound=1)
    flags.DEFINE_integer("rounds", 5, "Timings of each.", lower_bound=1)
    flags.DEFINE_integer("starts", 3, "Starts of each kind.", lower_bound=1)
    flags.DEFINE_multi_integer("workers", [0, 2], "Of PyTorch's DataLoader.", lower_bound=0)
    flags.DEFINE_multi_enum("part", list(PARTS), list(PARTS), "What to measure.")


def main(arguments):
    cli.refuse_arguments(arguments)
    values = flags.FLAGS
    folder = workdirs.check_writable(values.workdir) if values.workdir else None
    rows, missing = [], {}
    for part in values.part:
        found, absent = PARTS[part](values)
        rows += [{"part": part, **row} for row in found]
        missing |= absent
    lines = tabulate(rows)
    tables.show(f"Data of {values.name}", HEADINGS, lines)
    for side, reason in missing.items():
        logging.info("Not measured: %s (%s).", side, reason)
    if folder:
        settings = {
            name: getattr(values, name) for name in ("name", "config", "batch_size")
        }
        results = {"benchmark": "data", **settings, "rows": rows, "not_measured": missing}
        notes = "".join(f"Not measured: {s} ({why}). " for s, why in missing.items())
        report.write(folder, results, f"{tables.markdown(HEADINGS, lines)}\n{notes}")


def tabulate(rows: list[dict[str, Any]]) -> list[tuple[str, ...]]:
    """The cells of the table."""
    lines = []
    for row in rows:
        spread, unit = row["spread"], row["unit"]
        digits = 0 if unit == "images/s" else 2
        text = timing.format_spread(spread, digits)
        lines.append((f"{row['part']}: {row['what']}, {unit}", text, str(spread["n"])))
    return lines


# Start


def measure_imports(values) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Seconds of imports, as the interpreter's own clock has them."""
    base, ours = "import jax, flax.linen", "import cvjax.training"

    def seconds(first: str, then: str) -> tuple[float, float]:
        script = (
            f"import time; a = time.perf_counter(); {first}; b = time.perf_counter(); "
            f"{then}; print(b - a, time.perf_counter() - b)"
        )
        answer = run_python("-c", script).stdout.split()
        return float(answer[0]), float(answer[1])

    run_python("-c", ours)  # writes the bytecode
    pairs = np.array([seconds(base, ours) for _ in range(values.starts)]).T
    rows = [
        {"what": what, "unit": "s", "spread": timing.spread(times)}
        for what, times in zip((base, f"{ours} beyond it"), pairs, strict=True)
    ]
    return rows, {}


FIRST_BATCH = """
import sys, time
from cvjax import data
from cvjax.data.dataset import train_batch
name, cache_dir, batch_size = sys.argv[1], sys.argv[2], int(sys.argv[3])
start = time.perf_counter()
dataset = data.load(name, cache_dir=cache_dir)
train_batch(dataset.train, batch_size, 0, 0)
print(time.perf_counter() - start)
"""


def measure_first_batch(values) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Seconds from `data.load` to the first batch, with a blank and with a full cache."""
    data.load(values.name)  # raises at once if there is no such set
    times: dict[str, list[float]] = {"blank cache": [], "full cache": []}
    for number in range(values.starts):
        logging.info("First batch, round %d.", number + 1)
        with tempfile.TemporaryDirectory() as cache:
            for own in times.values():
                size = str(values.batch_size)
                answer = run_python("-c", FIRST_BATCH, values.name, cache, size)
                own.append(float(answer.stdout))
    return [
        {"what": what, "unit": "s", "spread": timing.spread(np.array(own))}
        for what, own in times.items()
    ], {}


def measure_first_step(values) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Seconds from the start of train.py to the first row of its metrics."""
    times: dict[str, list[float]] = {"blank caches": [], "full caches": []}
    for number in range(values.starts):
        with tempfile.TemporaryDirectory() as temporary:
            for what, own in times.items():
                logging.info("First step, round %d, %s.", number + 1, what)
                folder = pathlib.Path(temporary)
                own.append(time_first_step(values.config, folder / what, folder / "cache"))
    return [
        {"what": what, "unit": "s", "spread": timing.spread(np.array(own))}
        for what, own in times.items()
    ], {}


def time_first_step(config: str, folder: pathlib.Path, cache: pathlib.Path) -> float:
    """Seconds until the first step is in metrics.jsonl; the run is then stopped."""
    metrics = folder / "metrics.jsonl"
    flags_ = [f"--config={config}", f"--workdir={folder}", "--config.log_every=1"]
    start = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "train.py", *flags_],
        cwd=ROOT,
        env={**os.environ, "XDG_CACHE_HOME": str(cache)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        while not (metrics.exists() and '"step"' in metrics.read_text()):
            if process.poll() is not None:
                raise UserError(f"train.py ended early: {process.stderr.read().strip()}")
            time.sleep(0.005)
        return time.perf_counter() - start
    finally:
        process.kill()
        process.communicate()


def run_python(*arguments: str) -> subprocess.CompletedProcess:
    """A fresh interpreter in the project's folder.

    Raises:
      UserError: it failed.
    """
    command = [sys.executable, *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"a measured program failed: {done.stderr.strip()[-500:]}")
    return done


# Rate


def measure_rate(values) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Images per second of each way to make batches."""
    split = data.load(values.name).train
    sources, missing = batch_sources.create(split, values.batch_size, values.workers)

    def take(batches):
        for _ in range(values.batches):
            next(batches)

    takes = {side: functools.partial(take, batches) for side, batches in sources.items()}
    images = values.batches * values.batch_size
    times = timing.interleave(takes, values.rounds)
    return [
        {"what": side, "unit": "images/s", "spread": timing.spread(images / own)}
        for side, own in times.items()
    ], missing


PARTS: dict[str, Callable[[Any], tuple[list[dict[str, Any]], dict[str, str]]]] = {
    "imports": measure_imports,
    "first batch": measure_first_batch,
    "first step": measure_first_step,
    "rate": measure_rate,
}


if __name__ == "__main__":
    define_flags()
    cli.run(main)

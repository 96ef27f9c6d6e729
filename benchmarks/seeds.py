"""Several seeds of one net on one machine: how to train them fastest.

    python -m benchmarks.seeds --workdir=results/benchmarks/seeds
    python -m benchmarks.seeds --net=ResNet-56 --seeds=4

Three ways to make a training step of each seed, interleaved: one seed after the other in
one process; all in one program, by `vmap` over the step of `cvjax.training.steps`; and each
in a process of its own, on CPU with its share of the cores, as
`experiments.depth_degradation --processes` does it. The rate is of all seeds together.
Those in processes are single runs, with the same numbers; `vmap` adds up in another order.
"""

import functools
import json
import os
import subprocess
import sys
import time
from typing import Any

import jax
import numpy as np
from absl import flags, logging
from jax import numpy as jnp

from benchmarks import nets, report
from cvjax import cli, timing
from cvjax.cores import affinity
from cvjax.data.normalize import compute_statistics
from cvjax.report import tables
from cvjax.storage import workdir as workdirs
from cvjax.training import steps
from cvjax.training.compilation import compile_step
from cvjax.training.state import create_train_state

TURNS, VMAP, PROCESSES = "one after the other", "vmap", "processes"
HEADINGS = ("way", "images/s (quartiles)", "speed (quartiles)", "compile s")


def define_flags() -> None:
    """The command line."""
    flags.DEFINE_string("workdir", None, "Where results.json and table.md go.")
    flags.DEFINE_enum("net", "ResNet-20", list(nets.NETS), "What to train.")
    flags.DEFINE_integer("seeds", 2, "How many at once.", lower_bound=2)
    flags.DEFINE_integer("batch_size", 128, "Images per batch.", lower_bound=1)
    flags.DEFINE_integer("rounds", 7, "Timings of each way.", lower_bound=1)
    flags.DEFINE_integer("steps", 2, "Steps in each timing.", lower_bound=1)
    flags.DEFINE_bool("worker", False, "Whether this is one of the processes.")


def main(arguments):
    cli.refuse_arguments(arguments)
    values = flags.FLAGS
    net = nets.NETS[values.net]
    batch = nets.random_batch(net, values.batch_size)
    if values.worker:
        serve(net, batch, values.steps)
        return
    folder = workdirs.check_writable(values.workdir) if values.workdir else None
    single, compile_single = nets.create_step(net.create(), batch)
    together, compile_together = create_vmapped(net, batch, values.seeds)
    workers = [start_worker(number, values.seeds) for number in range(values.seeds)]
    compile_worker = max(json.loads(worker.stdout.readline()) for worker in workers)
    count, seeds = values.steps, values.seeds
    ways = {
        TURNS: lambda: [single(batch) for _ in range(count * seeds)] and None,
        VMAP: lambda: [together() for _ in range(count)] and None,
        PROCESSES: lambda: ask(workers),
    }
    times = timing.interleave(ways, values.rounds)
    for worker in workers:
        worker.stdin.close()
        worker.wait()
    images = values.batch_size * count * seeds
    compiling = dict(
        zip(ways, (compile_single, compile_together, compile_worker), strict=True)
    )
    rows = {
        way: {
            "images_per_second": timing.spread(images / times[way]),
            "speed": timing.spread(times[TURNS] / times[way]),
            "compile_seconds": compiling[way],
        }
        for way in ways
    }
    cells = [
        (
            way,
            timing.format_spread(row["images_per_second"], 0),
            timing.format_spread(row["speed"]),
            f"{row['compile_seconds']:.1f}",
        )
        for way, row in rows.items()
    ]
    tables.show(f"{seeds} seeds of {values.net}", HEADINGS, cells)
    if folder:
        results: dict[str, Any] = {"benchmark": "seeds", "net": values.net, "seeds": seeds}
        results |= {"batch_size": values.batch_size, "steps": count, "ways": rows}
        report.write(folder, results, tables.markdown(HEADINGS, cells))


def create_vmapped(net: nets.Net, batch, seeds: int):
    """A step of all seeds in one program, and the seconds of compilation."""
    recipe = nets.create_recipe(net.create())
    keys = jax.random.split(jax.random.key(0), seeds)
    static = {"recipe": recipe, "image_shape": batch["image"].shape[1:]}
    create = functools.partial(create_train_state, **static)
    states = [create(key) for key in keys]
    state = jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)
    statistics = compute_statistics(batch["image"], "pixel_mean")
    batches = jax.tree.map(lambda leaf: np.stack([leaf] * seeds), batch)

    def step(state, batch, key):
        constants = steps.Constants(key, statistics)
        return steps.train_step(state, batch, constants, recipe=recipe)

    start = time.perf_counter()
    compiled = compile_step(jax.jit(jax.vmap(step)).lower(state, batches, keys))
    seconds = time.perf_counter() - start

    def together():
        nonlocal state
        state = jax.block_until_ready(compiled(state, batches, keys))

    return together, seconds


def start_worker(number: int, count: int) -> subprocess.Popen:
    """A process that makes steps when asked; on Linux with its share of the cores."""
    worker = subprocess.Popen(
        [sys.executable, *sys.orig_argv[1:], "--worker"],
        env={"XLA_PYTHON_CLIENT_PREALLOCATE": "false", **os.environ},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    if cores := affinity():
        os.sched_setaffinity(worker.pid, cores[number % len(cores) :: count])
    return worker


def serve(net: nets.Net, batch, count: int) -> None:
    """Tells the seconds of compilation, then makes `count` steps for each line of stdin."""
    step, seconds = nets.create_step(net.create(), batch)
    step(batch)
    print(json.dumps(seconds), flush=True)
    for _ in sys.stdin:
        for _ in range(count):
            step(batch)
        print("done", flush=True)


def ask(workers: list[subprocess.Popen]) -> None:
    """Has all processes make their steps at once, and waits for the last."""
    for worker in workers:
        worker.stdin.write("go\n")
        worker.stdin.flush()
    for worker in workers:
        if worker.stdout.readline() != "done\n":
            logging.fatal("A process ended early; its message stands above.")


if __name__ == "__main__":
    define_flags()
    cli.run(main)

"""Compile time of a training step against depth, cold and from the persistent cache.

    python -m benchmarks.compile --workdir=results/benchmarks/compile
    python -m benchmarks.compile --depth=20 --depth=56 --loop=unrolled

CIFAR ResNets of 20 to 1202 layers, rolled (a stage is a loop) and unrolled (a stage is so
many copies of its block). Each is compiled in a process of its own with a blank cache
folder, and again in another one with the cache that the first one filled. Told apart are
the seconds that Python takes to trace the step and XLA to compile it. Nothing is run.

Rolled, the work does not depend on depth; unrolled it grows with it, so that by default
the unrolled nets end at 110 layers, where a CPU takes minutes.
"""

import concurrent.futures
import itertools
import multiprocessing
import tempfile
import time
from typing import Any

import jax
import numpy as np
from absl import flags, logging

from benchmarks import nets, report
from cvjax import cli, timing
from cvjax.report import tables
from cvjax.storage import workdir as workdirs
from cvjax.training import compilation

DEPTHS = {"rolled": (20, 56, 110, 1202), "unrolled": (20, 56, 110)}
HEADINGS = ("depth", "loop", "trace s", "compile s", "from the cache: trace s", "compile s")


def define_flags() -> None:
    """The command line."""
    flags.DEFINE_string("workdir", None, "Where results.json and table.md go.")
    flags.DEFINE_multi_integer("depth", [], "6n + 2; may be repeated.", lower_bound=8)
    loops = list(DEPTHS)
    flags.DEFINE_multi_enum("loop", loops, loops, "May be repeated.")
    flags.DEFINE_integer("batch_size", 128, "Images per batch.", lower_bound=1)
    flags.DEFINE_integer("image_size", 32, "Height and width.", lower_bound=4)
    flags.DEFINE_integer("rounds", 3, "Compilations of each.", lower_bound=1)


def main(arguments):
    cli.refuse_arguments(arguments)
    values = flags.FLAGS
    folder = workdirs.check_writable(values.workdir) if values.workdir else None
    rounds = range(values.rounds)
    cases = [
        (loop, depth) for loop in values.loop for depth in values.depth or DEPTHS[loop]
    ]
    found: dict[tuple[str, int], list[dict[str, Any]]] = {case: [] for case in cases}
    for number, (loop, depth) in itertools.product(rounds, cases):
        logging.info("Round %d: %d layers, %s.", number + 1, depth, loop)
        sizes = (values.batch_size, values.image_size)
        with tempfile.TemporaryDirectory() as cache:
            cold, cached = (in_fresh_process(depth, loop, *sizes, cache) for _ in range(2))
        found[loop, depth].append({"cold": cold, "cached": cached})
    rows = [
        {"depth": depth, "loop": loop, **summarize(runs)}
        for (loop, depth), runs in found.items()
    ]
    lines = tabulate(rows)
    tables.show("Training step of CIFAR ResNets", HEADINGS, lines)
    if folder:
        settings = {name: getattr(values, name) for name in ("batch_size", "image_size")}
        results = {"benchmark": "compile", **settings, "rows": rows}
        report.write(folder, results, tables.markdown(HEADINGS, lines))


def in_fresh_process(*arguments: Any) -> dict[str, float]:
    """`time_compilation` in a process that has nothing in memory."""
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(time_compilation, *arguments).result()


def time_compilation(
    depth: int, loop: str, batch_size: int, image_size: int, cache: str
) -> dict[str, float]:
    """Seconds to trace and to compile one training step.

    Args:
      depth, loop: of the CIFAR ResNet.
      batch_size, image_size: of its images.
      cache: the folder of the persistent cache.
    """
    jax.config.update("jax_compilation_cache_dir", cache)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    net = nets.Net("resnet_cifar", {"depth": depth, "loop": loop}, image_size)
    batch = nets.random_batch(net, batch_size)
    jax.block_until_ready(jax.device_put(0))  # starts the backend, which does not count
    start = time.perf_counter()
    lowered, _ = nets.lower_step(net.create(), batch)
    traced = time.perf_counter()
    compilation.compile_step(lowered)
    return {"trace": traced - start, "compile": time.perf_counter() - traced}


def summarize(runs: list[dict[str, dict[str, float]]]) -> dict[str, Any]:
    """The spread of the seconds over the runs: "cold" and "cached", "trace", "compile"."""
    return {
        start: {
            part: timing.spread(np.array([run[start][part] for run in runs]))
            for part in ("trace", "compile")
        }
        for start in ("cold", "cached")
    }


def tabulate(rows: list[dict[str, Any]]) -> list[tuple[str, ...]]:
    """The cells of the table."""
    return [
        (
            str(row["depth"]),
            row["loop"],
            *(
                timing.format_spread(row[start][part], 1)
                for start in ("cold", "cached")
                for part in ("trace", "compile")
            ),
        )
        for row in rows
    ]


if __name__ == "__main__":
    define_flags()
    cli.run(main)

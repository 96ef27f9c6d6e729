"""What each way to differentiate an ODE solve costs in memory and time.

    python -m benchmarks.ode_gradients --workdir=results/ode_gradients

Forward and gradient of one ODE block, of the paper's size for MNIST by default (64 features
on 6x6, GroupNorm, ReLU), with fixed steps of Heun's method and with Dopri5's adaptive ones.
Memory is XLA's plan for temporaries, time the median of interleaved runs; compilation
stands apart. The block is compiled as it is by default on this platform, and also as a
loop.

For adaptive steps their number is what the tolerance asks for.
"""

import time
from functools import partial
from typing import Any

import jax
import numpy as np
from absl import flags, logging
from jax import numpy as jnp

from cvjax import cli, timing
from cvjax.files import write_bytes, write_json
from cvjax.models.odenet_layers import Residual
from cvjax.nn.ode import ODEBlock
from cvjax.nn.solver import Solver
from cvjax.report import tables
from cvjax.storage import provenance
from cvjax.storage import workdir as workdirs

WORKDIR = flags.DEFINE_string("workdir", None, "Where results.json and table.md go.")
BATCH_SIZE = flags.DEFINE_integer("batch_size", 32, "Images per batch.", lower_bound=1)
SIDE = flags.DEFINE_integer("side", 6, "Height and width.", lower_bound=1)
FEATURES = flags.DEFINE_integer("features", 64, "Channels.", lower_bound=2)
ROUNDS = flags.DEFINE_integer("rounds", 5, "Timings of each way.", lower_bound=1)

STEPS = (2, 8, 32)
TOLERANCES = (1e-3, 1e-5)


def cases() -> list[tuple[Solver, str]]:
    """(solver, `ODEBlock.loop`) of all that is measured; adaptive steps are a loop."""
    equal = [
        (Solver("heun", steps, gradient=gradient), "unrolled")
        for steps in STEPS
        for gradient in ("direct", "checkpoint")
    ]
    rolled = [
        (Solver("heun", steps, gradient=gradient), "rolled")
        for steps in STEPS
        for gradient in ("direct", "checkpoint", "backsolve")
    ]
    adaptive = [
        (Solver("dopri5", 0, tol, tol, gradient=gradient), "rolled")
        for tol in TOLERANCES
        for gradient in ("direct", "checkpoint", "backsolve")
    ]
    return equal + rolled + adaptive


def prepare(solver: Solver, loop: str, x: jax.Array) -> tuple[Any, Any, float]:
    """The compiled function, its parameters, and the seconds of compilation."""
    field = partial(Residual, "group", "relu")
    block = ODEBlock(field, solver, loop=loop, train=True)
    variables = block.init(jax.random.key(1), x)

    def loss(params, x):
        y, sown = block.apply({"params": params}, x, mutable=["solver"])
        return (y**2).mean(), sown["solver"]["stats"]

    gradient = jax.jit(jax.grad(loss, (0, 1), has_aux=True))
    start = time.perf_counter()
    compiled = gradient.lower(variables["params"], x).compile()
    return compiled, variables["params"], time.perf_counter() - start


def main(arguments):
    cli.refuse_arguments(arguments)
    folder = workdirs.check_writable(WORKDIR.value) if WORKDIR.value else None
    shape = (BATCH_SIZE.value, SIDE.value, SIDE.value, FEATURES.value)
    x = jax.random.normal(jax.random.key(0), shape)
    rows, runs = [], []
    for solver, loop in cases():
        logging.info("Compiling %s, %s.", solver, loop)
        compiled, params, seconds = prepare(solver, loop, x)
        _, stats = jax.block_until_ready(compiled(params, x))
        runs.append(partial(compiled, params, x))
        rows.append(
            {
                "solver": solver.method,
                "steps": int(stats.steps[0]),
                "rtol": None if solver.steps else solver.rtol,
                "loop": loop,
                "gradient": solver.gradient,
                "nfe": int(stats.evaluations[0]),
                "memory_mb": compiled.memory_analysis().temp_size_in_bytes / 1e6,
                "compile_seconds": seconds,
            }
        )
    times = timing.interleave(dict(enumerate(runs)), ROUNDS.value, warm_up=0)
    for row, seconds in zip(rows, times.values(), strict=True):
        own = 1000 * seconds
        row["ms"] = float(np.median(own))
        row["ms_per_nfe"] = row["ms"] / row["nfe"]
        row["ms_quartiles"] = [float(q) for q in np.percentile(own, (25, 75))]
    show(rows, shape)
    if folder:
        results = {"benchmark": "ode_gradients", "shape": shape, "rounds": ROUNDS.value}
        found = provenance.current()
        results |= {"rows": rows, "measured_by": found}
        write_json(folder / "results.json", results)
        write_bytes(folder / "table.md", markdown(rows, shape, found).encode())


HEADINGS = (
    "solver",
    "steps",
    "loop",
    "gradient",
    "NFE",
    "MB",
    "ms",
    "ms / NFE",
    "compile s",
)


def cells(row: dict[str, Any]) -> tuple[str, ...]:
    """A row of the table."""
    solver = row["solver"] + (f", rtol {row['rtol']:g}" if row["rtol"] else "")
    numbers = (f"{row['memory_mb']:.1f}", f"{row['ms']:.0f}", f"{row['ms_per_nfe']:.2f}")
    settings = (str(row["steps"]), row["loop"], row["gradient"], str(row["nfe"]))
    return (solver, *settings, *numbers, f"{row['compile_seconds']:.1f}")


def show(rows: list[dict[str, Any]], shape: tuple[int, ...]) -> None:
    """The table on the terminal."""
    title = f"Forward and gradient of an ODE block on {shape}"
    tables.show(title, HEADINGS, [cells(row) for row in rows])


def markdown(
    rows: list[dict[str, Any]], shape: tuple[int, ...], found: dict[str, Any]
) -> str:
    """The table for reading on the web; `found` is the provenance."""
    commit = (found["git"] or {}).get("commit", "unknown")[:8]
    head = (
        f"Forward and gradient of one ODE block, {shape} float32, on "
        f"{found['device']['kind']}, JAX {found['versions']['jax']}, commit "
        f"{commit}; median of {ROUNDS.value} interleaved runs. Memory: XLA's plan for "
        "temporaries."
    )
    return f"{head}\n\n{tables.markdown(HEADINGS, [cells(row) for row in rows])}"


if __name__ == "__main__":
    jnp.zeros(())  # starts the backend, so that its start is not timed
    cli.run(main)

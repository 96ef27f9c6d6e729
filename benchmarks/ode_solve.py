"""An ODE block beside torchdiffeq's, and beside diffrax's own loop over fixed steps.

    pip install torch torchdiffeq
    python -m benchmarks.ode_solve --workdir=results/benchmarks/ode_solve
    python -m benchmarks.ode_solve --batch_size=32 --side=8 --activation=softplus

The same f (the paper's: GroupNorm, ReLU, two 3x3 convolutions that see t), the same weights
and images, the same solver and tolerance. First outputs and gradients are compared, then
forward and gradient are interleaved: medians, and the median of the ratios round by
round. Compilation stands apart.

Where ReLU bends, the smallest difference of x changes a gradient, and torchdiffeq's Dopri5
steps past t = 1 and interpolates; `--activation=softplus` avoids the first.

"cvjax, direct" keeps all that the solver computed for the gradient, as torchdiffeq does;
"cvjax, checkpoint" computes most of it again; "cvjax" is the default, one of the two.
Diffrax's loop over fixed steps shows what nn/runge_kutta.py is for.
"""

import dataclasses
import itertools
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import numpy as np
from absl import flags, logging
from jax import numpy as jnp

from benchmarks import report
from cvjax import cli, timing
from cvjax.errors import UserError
from cvjax.models.odenet_layers import Residual, groups_of
from cvjax.nn.ode import ODEBlock
from cvjax.nn.solver import Solver
from cvjax.report import tables
from cvjax.storage import workdir as workdirs

WORKDIR = flags.DEFINE_string("workdir", None, "Where results.json and table.md go.")
BATCH_SIZE = flags.DEFINE_multi_integer(
    "batch_size", [32, 128], "Images per batch; may be repeated.", lower_bound=1
)
SIDE = flags.DEFINE_multi_integer(
    "side", [8, 16], "Height and width; may be repeated.", lower_bound=1
)
FEATURES = flags.DEFINE_integer("features", 64, "Channels.", lower_bound=2)
ROUNDS = flags.DEFINE_integer("rounds", 7, "Timings of each side.", lower_bound=1)
ACTIVATION = flags.DEFINE_enum("activation", "relu", ["relu", "softplus"], "Of f.")
TOLERANCE = flags.DEFINE_float("tolerance", 1e-3, "rtol and atol of Dopri5.")

HEADINGS = ("x", "solver", "side", "NFE", "ms (quartiles)", "speed (quartiles)")

# label: solver here, and the arguments of torchdiffeq's odeint
SOLVERS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "dopri5": ({"method": "dopri5", "steps": 0}, {"method": "dopri5"}),
    "euler, 8 steps": (
        {"method": "euler", "steps": 8},
        {"method": "euler", "options": {"step_size": 1 / 8}},
    ),
    "midpoint, 8 steps": (
        {"method": "midpoint", "steps": 8},
        {"method": "midpoint", "options": {"step_size": 1 / 8}},
    ),
}


def create_torch_side(params: dict[str, Any], x: np.ndarray, arguments: dict[str, Any]):
    """A function that gives torch's output, gradients by name and NFE."""
    import torch
    import torchdiffeq

    features = x.shape[-1]
    act = getattr(torch.nn.functional, ACTIVATION.value)

    class Field(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.calls = 0
            groups = groups_of(features)
            for i in (1, 2, 3):
                setattr(self, f"norm{i}", torch.nn.GroupNorm(groups, features))
            for i in (1, 2):
                conv = torch.nn.Conv2d(features + 1, features, 3, padding=1)
                setattr(self, f"conv{i}", conv)

        def forward(self, t, x):
            self.calls += 1
            time = torch.ones_like(x[:, :1]) * t

            def conv(layer, x):
                return layer(torch.cat([x, time], dim=1))

            y = conv(self.conv1, act(self.norm1(x)))
            return self.norm3(conv(self.conv2, act(self.norm2(y))))

    field = Field()
    with torch.no_grad():
        for name, leaf in params.items():
            module, leaf = getattr(field, name), leaf.get("group_norm", leaf)
            weight = (
                leaf["scale"] if "scale" in leaf else leaf["kernel"].transpose(3, 2, 0, 1)
            )
            module.weight.copy_(torch.from_numpy(np.array(weight)))
            module.bias.copy_(torch.from_numpy(np.array(leaf["bias"])))
    device = "cuda" if jax.default_backend() == "gpu" else "cpu"
    field = field.to(device, memory_format=torch.channels_last)
    start = torch.from_numpy(x.transpose(0, 3, 1, 2).copy())
    start = start.to(device, memory_format=torch.channels_last)
    times = torch.tensor([0.0, 1.0], device=device)

    def run():
        field.calls = 0
        field.zero_grad()
        state = start.clone().requires_grad_(True)
        tolerance = {"rtol": TOLERANCE.value, "atol": TOLERANCE.value}
        y = torchdiffeq.odeint(field, state, times, **tolerance, **arguments)[1]
        calls = field.calls
        (y**2).mean().backward()
        if device == "cuda":
            torch.cuda.synchronize()
        return y, state.grad, calls

    def read(result):
        y, by_x, calls = result
        gradients = {}
        for name in params:
            module = getattr(field, name)
            weight = module.weight.grad.cpu().numpy()
            if weight.ndim == 4:
                weight = weight.transpose(2, 3, 1, 0)
            gradients[name] = {"weight": weight, "bias": module.bias.grad.cpu().numpy()}
        images = [leaf.detach().cpu().numpy().transpose(0, 2, 3, 1) for leaf in (y, by_x)]
        return (*images, gradients, calls)

    return run, read, torch.__version__, torchdiffeq.__version__


def create_jax_side(field: Callable, solver: Solver, params: Any, x: np.ndarray):
    """The compiled forward and gradient, and the seconds of compilation."""
    block = ODEBlock(field, solver, train=True)
    stacked = {"f": jax.tree.map(lambda leaf: leaf[None], params)}

    def loss(params, x):
        y, sown = block.apply({"params": params}, x, mutable=["solver"])
        return (y**2).mean(), (y, sown["solver"]["stats"].evaluations[0])

    start = time.perf_counter()
    function = jax.jit(jax.grad(loss, (0, 1), has_aux=True))
    compiled = function.lower(stacked, x).compile()
    seconds = time.perf_counter() - start
    return partial(compiled, stacked, jnp.asarray(x)), seconds


def create_diffrax_side(field: Callable, solver: Solver, params: Any, x: np.ndarray):
    """As `create_jax_side`, with diffrax's loop over fixed steps."""
    from cvjax.nn import diffrax_solve

    f = field()

    def loss(params, x):
        solution = diffrax_solve.solve(
            lambda params, x, t: f.apply({"params": params}, x, t),
            *(params, x, 0.0, 1.0),
            solver,
        )
        return (solution.x**2).mean(), solution.evaluations

    start = time.perf_counter()
    function = jax.jit(jax.grad(loss, (0, 1), has_aux=True))
    compiled = function.lower(params, x).compile()
    return partial(compiled, params, jnp.asarray(x)), time.perf_counter() - start


def main(arguments):
    cli.refuse_arguments(arguments)
    try:
        import torch  # noqa: F401
        import torchdiffeq  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"{error.name} is missing; `pip install torch torchdiffeq`."
        ) from None
    folder = workdirs.check_writable(WORKDIR.value) if WORKDIR.value else None
    rows = []
    for batch_size, side in itertools.product(BATCH_SIZE.value, SIDE.value):
        shape = (batch_size, side, side, FEATURES.value)
        x = np.random.default_rng(0).normal(size=shape).astype(np.float32)
        f = Residual("group", ACTIVATION.value)
        params = jax.device_get(f.init(jax.random.key(0), x, jnp.zeros(()))["params"])
        for label, (here, there) in SOLVERS.items():
            tolerance = {"rtol": TOLERANCE.value, "atol": TOLERANCE.value}
            solver = Solver(**here, **tolerance, per_sample="never")
            rows.append(compare(label, solver, there, params, x))
    cells = tabulate(rows)
    tables.show("Forward and gradient; speed: torchdiffeq's is 1", HEADINGS, cells)
    for row in rows:
        found = ", ".join(f"{key} {value:.1e}" for key, value in row["difference"].items())
        print(f"{row['shape']}, {row['solver']}: differences {found}")
    if folder:
        results = {
            "benchmark": "ode_solve",
            "tolerance": TOLERANCE.value,
            "activation": ACTIVATION.value,
            "rounds": ROUNDS.value,
            "rows": rows,
        }
        report.write(folder, results, tables.markdown(HEADINGS, cells))


def compare(label: str, solver: Solver, there: dict[str, Any], params: Any, x: np.ndarray):
    """One row: how far the sides differ, and their times."""
    logging.info("Compiling %s.", label)
    sides: dict[str, Callable] = {}
    torch_run, read, *versions = create_torch_side(params, x, there)
    compile_seconds = {}
    ours = partial(Residual, "group", ACTIVATION.value)
    other = "checkpoint" if solver.steps else "direct"
    others = dataclasses.replace(solver, gradient=other)
    for name, how in (("cvjax", solver), (f"cvjax, {other}", others)):
        sides[name], compile_seconds[name] = create_jax_side(ours, how, params, x)
    if solver.steps:
        name = "diffrax's loop"
        sides[name], compile_seconds[name] = create_diffrax_side(ours, solver, params, x)
    sides["torchdiffeq"] = torch_run
    (by_params, by_x), (y, nfe) = sides["cvjax"]()
    theirs = read(torch_run())
    times = timing.interleave(sides, ROUNDS.value, warm_up=0)
    weights = {name: leaf.get("group_norm", leaf) for name, leaf in by_params["f"].items()}
    differences = [
        relative(
            leaf["scale"][0] if "scale" in leaf else leaf["kernel"][0],
            theirs[2][name]["weight"],
        )
        for name, leaf in weights.items()
    ]
    differences += [
        relative(leaf["bias"][0], theirs[2][name]["bias"]) for name, leaf in weights.items()
    ]
    return {
        "shape": x.shape,
        "solver": label,
        "nfe": {"cvjax": int(nfe), "torchdiffeq": theirs[3]},
        "difference": {
            "output": relative(y, theirs[0]),
            "gradient by x": relative(by_x, theirs[1]),
            "gradient by parameters": max(differences),
        },
        "ms": {name: timing.spread(1000 * own) for name, own in times.items()},
        "speed": {
            name: timing.spread(times["torchdiffeq"] / own) for name, own in times.items()
        },
        "compile_seconds": compile_seconds,
        "versions": dict(zip(("torch", "torchdiffeq"), versions, strict=True)),
    }


def relative(a: Any, b: Any) -> float:
    """The Euclidean norm of the difference, relative to that of b."""
    a, b = np.asarray(a), np.asarray(b)
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def tabulate(rows: list[dict[str, Any]]) -> list[tuple[str, ...]]:
    """The cells of the table, with quartiles of times and of ratios."""
    return [
        (
            " x ".join(map(str, row["shape"])),
            row["solver"],
            name,
            str(row["nfe"]["torchdiffeq" if name == "torchdiffeq" else "cvjax"]),
            timing.format_spread(ms, 0),
            timing.format_spread(row["speed"][name]),
        )
        for row in rows
        for name, ms in row["ms"].items()
    ]


if __name__ == "__main__":
    cli.run(main)

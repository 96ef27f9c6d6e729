"""What a tolerance buys: error, evaluations and gradients of solves of trained ODE-nets.

    python -m experiments.odenet_vs_resnet.solves --workdir=runs/solves \\
        'runs/odenet/runs/mnist-dopri5-*'

Chen et al. 2018, Fig. 3, a to c, in our numbers. Takes finished runs of ODE-nets with one
block, and trains nothing. The block starts where its stem has put the first `IMAGES` test
images, and is solved by each of `METHODS` with steps that adapt to each of `TOLERANCES`
(one step for the whole batch, as in training; rtol = atol). Against fixed steps of RK4,
`REFERENCE_STEPS` of them:

- the error of x(1), relative, root mean square;
- evaluations of f (NFE), of the solve and of the continuous adjoint's solve back, which
  starts with the loss's gradient there; each of the latter also evaluates a product with
  f's Jacobian, so that it costs more than one of the former;
- the time of the solve, interleaved;
- the error of the loss's gradient with respect to f's parameters, relative to its size, by
  the continuous adjoint and by differentiating the very steps taken ("checkpoint"). The
  latter is exact for these steps; its error is that of the steps themselves.

Predicted before the measurement: the solve's error falls with the tolerance (slope about 1
between logarithms) and NFE grows as the power -1/5 of it for Dopri5 (-1/2 for reversible
Heun, of order 2); the adjoint takes about as many evaluations as the solve, not half as
many as the paper reports; its gradient is worse than that of the steps taken at loose
tolerances, and as good at tight ones.
"""

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from absl import flags, logging
from flax import linen as nn
from jax import numpy as jnp

from cvjax import cli, timing
from cvjax.data.normalize import normalize
from cvjax.errors import UserError
from cvjax.evaluation.predictions import first_examples
from cvjax.nn.diffrax_solve import solve, solve_adjoint
from cvjax.nn.ode import ODEBlock
from cvjax.nn.solver import SUCCESSFUL, Solver
from cvjax.report import tables
from cvjax.report.statistics import fit_exponent, spread
from cvjax.report.tables import mean_std
from cvjax.storage import workdir as workdirs
from cvjax.tasks.classification import loss_per_example
from cvjax.training.trained_network import Network, load_network
from experiments import runner
from experiments.odenet_vs_resnet.finished_runs import find_finished
from experiments.odenet_vs_resnet.solves_figure import NAMES, draw_solves

METHODS = ("dopri5", "reversible_heun")
TOLERANCES = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5)
REFERENCE_STEPS = 128
IMAGES = 64
MOST_STEPS = 4_096
MEASURES = ("error", "nfe", "nfe_back", "ms", "adjoint_error", "checkpoint_error")


def define_flags() -> None:
    """The command line; not at import, as other experiments have flags of these names."""
    flags.DEFINE_string("workdir", None, "Folder of the results.")
    flags.DEFINE_integer("rounds", 5, "Timings of each solve.", lower_bound=1)
    flags.mark_flag_as_required("workdir")


def main(arguments):
    places = find_finished(arguments, "runs/*dopri5*")
    folder = workdirs.check_writable(flags.FLAGS.workdir)
    (folder / "cache").mkdir(exist_ok=True)
    runs = []
    for place in places:
        logging.info("%s", place)
        key = {"folder": str(place), "rounds": flags.FLAGS.rounds}
        key |= {"methods": METHODS, "tolerances": TOLERANCES}
        path = folder / "cache" / f"{place.name}.json"
        # The network is read where nothing is cached.
        solves = runner.cached(
            path,
            key,
            lambda place=place: measure(load_network(place), flags.FLAGS.rounds),
        )
        run = runner.read_run(place)
        what = {"name": place.name, "seed": run["config"]["seed"]}
        runs.append({**what, **run, **solves})
    table = tabulate(runs)
    runner.write_results(
        *(folder, "odenet_vs_resnet", None),
        **{"images": IMAGES, "exponents": exponents(runs), "table": table, "runs": runs},
    )
    show(table)
    draw_solves(table, METHODS, folder / "solves.png")
    print(f"Results: {folder / 'results.json'}")
    print(f"Figure:  {folder / 'solves.png'}")


def measure(network: Network, rounds: int) -> dict[str, Any]:
    """What is measured of one net.

    Returns:
      "solves": rows "method", "tolerance" and `MEASURES`, None where a solve failed;
      "reference": the error of x(1) and of the gradient by half as many steps of RK4.
    """
    field, theta, x, cotangent_of = open_block(network)
    reference = Solver("rk4", REFERENCE_STEPS, gradient="checkpoint")
    exact = solve_by(field, theta, x, reference).x
    cotangent = cotangent_of(exact)
    exact_gradient = gradient(field, theta, x, cotangent, reference)
    rows, timed = [], {}
    for number, (method, tol) in enumerate(each_solve()):
        solver = Solver(method, 0, tol, tol, MOST_STEPS, gradient="checkpoint")
        run = functools.partial(solve_by, field, theta, x, solver)
        solution = run()
        back = adjoint(field, theta, solution.x, cotangent, solver)
        by_steps = gradient(field, theta, x, cotangent, solver)
        row = {"method": method, "tolerance": tol}
        if solution.result != SUCCESSFUL or back.result != SUCCESSFUL:
            rows.append(row | dict.fromkeys(MEASURES))
            continue
        timed[number] = run
        rows.append(
            {
                **row,
                "error": relative_error(solution.x, exact),
                "nfe": int(solution.evaluations),
                "nfe_back": int(back.evaluations),
                "adjoint_error": relative_error(back.x[2], exact_gradient),
                "checkpoint_error": relative_error(by_steps, exact_gradient),
            }
        )
    for number, seconds in timing.interleave(timed, rounds).items():
        rows[number]["ms"] = 1000 * float(np.median(seconds))
    fewer = Solver("rk4", REFERENCE_STEPS // 2, gradient="checkpoint")
    by_fewer = gradient(field, theta, x, cotangent, fewer)
    check = {
        "error": relative_error(solve_by(field, theta, x, fewer).x, exact),
        "gradient_error": relative_error(by_fewer, exact_gradient),
    }
    return {"solves": rows, "reference": check}


def each_solve() -> Iterator[tuple[str, float]]:
    """(method, tolerance)."""
    for method in METHODS:
        for tolerance in TOLERANCES:
            yield method, tolerance


def open_block(network: Network):
    """What is solved in a network, and what its loss makes of the end.

    Returns:
      The module that is f, its parameters theta, x(0) of `IMAGES` test images, and the
      function that gives the gradient of the mean loss with respect to x(1) at an x(1).

    Raises:
      UserError: for a network without exactly one ODE block, of constant theta.
    """
    model, examples = network.recipe.model, first_examples(network, IMAGES)
    images = normalize(examples.images, network.statistics)
    found = []

    def call(end):
        """The network's logits, with `end` in the place of the block's answer."""

        def intercept(next_call, arguments, settings, context):
            if (
                not isinstance(context.module, ODEBlock)
                or context.method_name != "__call__"
            ):
                return next_call(*arguments, **settings)
            found.append(
                (context.module.clone(parent=None), context.module.path, arguments)
            )
            return arguments[0] if end is None else end

        with nn.intercept_methods(intercept):
            return model.apply(network.variables, images, train=False)

    call(None)
    if len(found) != 1 or found[0][0].theta != "constant":
        raise UserError(
            "takes ODE-nets with one block and constant theta; this run has "
            f"{len(found)} ODE blocks{' and another theta' if found else ''}."
        )
    block, path, (x,) = found[0]
    theta = network.variables["params"]
    for name in (*path, "f"):
        theta = theta[name]
    theta = jax.tree.map(lambda leaf: leaf[0], theta)

    def loss(end):
        labels = jnp.asarray(examples.labels)
        return loss_per_example(call(end), labels, network.recipe.loss).mean()

    return block.field(parent=None), theta, x, jax.jit(jax.grad(loss))


def vector_field(field: nn.Module):
    """f(theta, x, t), as adaptive steps evaluate it."""

    def f(theta, x, t):
        with jax.default_matmul_precision("highest"):
            return field.apply({"params": theta}, x, jnp.asarray(t, x.dtype))

    return f


@functools.partial(jax.jit, static_argnames=("field", "solver"))
def solve_by(field, theta, x, solver: Solver):
    """The solve from 0 to 1."""
    return solve(vector_field(field), theta, x, 0.0, 1.0, solver)


@functools.partial(jax.jit, static_argnames=("field", "solver"))
def adjoint(field: nn.Module, theta, end, cotangent, solver: Solver):
    """The continuous adjoint's solve from 1 back to 0."""
    zero, one = jnp.zeros(()), jnp.ones(())
    return solve_adjoint(vector_field(field), theta, end, cotangent, zero, one, solver)


@functools.partial(jax.jit, static_argnames=("field", "solver"))
def gradient(field, theta, x, cotangent, solver: Solver):
    """Of <cotangent, x(1)> with respect to theta, by differentiating the steps taken."""

    def inner(theta):
        return (solve_by(field, theta, x, solver).x * cotangent).sum()

    return jax.grad(inner)(theta)


def relative_error(tree, exact) -> float:
    """The Euclidean norm of the difference, over that of `exact`; of all leaves as one."""

    def norm(tree):
        return np.sqrt(sum(float((np.asarray(x, float) ** 2).sum()) for x in tree))

    pairs = zip(jax.tree.leaves(tree), jax.tree.leaves(exact), strict=True)
    return norm([a - b for a, b in pairs]) / norm(jax.tree.leaves(exact))


def tabulate(runs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows "method", "tolerance", "n", and of `MEASURES` the spread over the nets.

    None if the solve of any net failed.
    """
    table = []
    for number, (method, tolerance) in enumerate(each_solve()):
        values = {}
        for key in MEASURES:
            seen = [run["solves"][number][key] for run in runs]
            values[key] = None if None in seen else spread(seen)
        row = {"method": method, "tolerance": tolerance, "n": len(runs)}
        table.append(row | values)
    return table


def exponents(runs: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """By method and measure the spread over the nets of p in measure ~ tolerance**p."""
    found = {}
    for method in METHODS:
        fits = {key: [] for key in ("error", "nfe", "nfe_back", "adjoint_error")}
        for run in runs:
            rows = [row for row in run["solves"] if row["method"] == method]
            rows = [row for row in rows if row["error"] is not None]
            for key, values in fits.items():
                points = [row["tolerance"] for row in rows], [row[key] for row in rows]
                values.append(fit_exponent(*points))
        found[method] = {key: spread(values) for key, values in fits.items()}
    return found


def show(table: Sequence[dict[str, Any]]) -> None:
    """The table on the terminal."""
    headings = ("method", "tolerance", "error of x(1)", "NFE", "NFE back", "ms")
    headings += ("gradient error, adjoint", "of the steps taken")
    rows = []
    for row in table:
        small, counted = (
            [mean_std(row[key], digits) for key in keys]
            for keys, digits in (
                (("error", "adjoint_error", "checkpoint_error"), 6),
                (("nfe", "nfe_back", "ms"), 1),
            )
        )
        what = [NAMES[row["method"]], f"{row['tolerance']:.1e}"]
        rows.append([*what, small[0], *counted, *small[1:]])
    tables.show("Solves of trained ODE blocks, mean ± standard deviation", headings, rows)


if __name__ == "__main__":
    define_flags()
    cli.run(main)

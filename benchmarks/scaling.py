"""One batch shared by 1, 2, 4 and 8 devices: the same numbers, and what sharing costs.

    python -m benchmarks.scaling --workdir=results/benchmarks/scaling

Without accelerators the devices are forced ones, which share the cores of one processor:
then this shows correctness and overhead, and no speed. The net's training steps are
interleaved over the numbers of devices. Beside its rate stands by how much parameters
differ, after some steps from the same start, from those of one device: only the order of
sums differs.
"""

import functools

import jax
import numpy as np
from absl import flags
from jax.sharding import Mesh

from benchmarks import nets, report
from cvjax import cli, timing
from cvjax.report import tables
from cvjax.storage import workdir as workdirs
from cvjax.training import devices, steps

COUNTS = (1, 2, 4, 8)
COMPARED_STEPS = 5
HEADINGS = ("devices", "images/s (quartiles)", "speed (quartiles)", "largest difference")


def define_flags() -> None:
    """The command line."""
    flags.DEFINE_string("workdir", None, "Where results.json and table.md go.")
    flags.DEFINE_enum("net", "ResNet-14, 8 px", list(nets.NETS), "What to train.")
    flags.DEFINE_integer("batch_size", 128, "Images per batch, for all devices.", 8)
    flags.DEFINE_integer("rounds", 7, "Timings of each number.", lower_bound=1)


def main(arguments):
    cli.refuse_arguments(arguments)
    values = flags.FLAGS
    jax.config.update("jax_num_cpu_devices", COUNTS[-1])
    folder = workdirs.check_writable(values.workdir) if values.workdir else None
    counts = [count for count in COUNTS if count <= jax.device_count()]
    counts = [count for count in counts if values.batch_size % count == 0]
    net = nets.NETS[values.net]
    batch = nets.random_batch(net, values.batch_size)
    functions, params = {}, {}
    for count in counts:
        mesh = Mesh(np.array(jax.devices()[:count]), (devices.BATCH_AXIS,))
        params[count] = train(net, batch, mesh)
        step, _ = nets.create_step(net.create(), batch, mesh)
        functions[count] = functools.partial(step, batch)
    times = timing.interleave(functions, values.rounds)
    rows = [
        {
            "devices": count,
            "images_per_second": timing.spread(values.batch_size / times[count]),
            "speed": timing.spread(times[1] / times[count]),
            "difference": difference(params[count], params[1]),
        }
        for count in counts
    ]
    cells = [
        (
            str(row["devices"]),
            timing.format_spread(row["images_per_second"], 0),
            timing.format_spread(row["speed"]),
            f"{row['difference']:.1e}",
        )
        for row in rows
    ]
    tables.show(values.net, HEADINGS, cells)
    if folder:
        results = {"benchmark": "scaling", "net": values.net, "rows": rows}
        results |= {"batch_size": values.batch_size, "compared_steps": COMPARED_STEPS}
        report.write(folder, results, tables.markdown(HEADINGS, cells))


def train(net: nets.Net, batch, mesh: Mesh):
    """The parameters after some steps on the devices of a mesh."""
    model = net.create()
    _, create = nets.lower_step(model, batch)
    state, constants = devices.replicate(create(), mesh)
    recipe = nets.create_recipe(model)
    for _ in range(COMPARED_STEPS):
        shared = devices.divide(batch, mesh)
        state = steps.train_step(state, shared, constants, recipe=recipe)
    return jax.device_get(state.params)


def difference(params, reference) -> float:
    """The largest one of any two numbers."""
    gaps = jax.tree.map(lambda a, b: np.abs(a - b).max(), params, reference)
    return float(max(jax.tree.leaves(gaps)))


if __name__ == "__main__":
    define_flags()
    cli.run(main)

"""Peak memory of a training step against depth and batch, with and without recomputing.

    pip install torch
    python -m benchmarks.memory --workdir=results/benchmarks/memory
    python -m benchmarks.memory --depth=1202 --batch_size=128 --notorch

CIFAR ResNets on 32x32, the training step of `benchmarks.train_step`. `remat` computes each
block again for the gradient and keeps what goes into it (`cvjax.nn.depth.Stage`); PyTorch
does so with `torch.utils.checkpoint`.

Ours is XLA's plan: arguments (parameters, momentum, averages, images) and temporaries
(activations, gradients, workspace), without running anything. PyTorch's is the most that a
step allocates beyond what there was before, which is what XLA calls temporaries: on a GPU
by its allocator's count, on CPU by the profiler's. On a GPU results.json also has the peaks
that both allocators saw (ours: of the process so far, so give one depth at a time); set
XLA_PYTHON_CLIENT_PREALLOCATE=false there, so that JAX leaves memory to PyTorch.

What the gradient of an ODE block keeps is `benchmarks.ode_gradients`' subject.
"""

import itertools
from typing import Any

import jax
import numpy as np
from absl import flags, logging

from benchmarks import nets, report
from cvjax import cli
from cvjax.costs.compiled import COMPILER_OPTIONS
from cvjax.report import tables
from cvjax.storage import workdir as workdirs

DEPTHS, BATCH_SIZES = (20, 56, 110), (32, 128)
HEADINGS = ("batch", "depth", "side", "state MB", "beyond it MB", "saved by recomputing")


def define_flags() -> None:
    """The command line."""
    flags.DEFINE_string("workdir", None, "Where results.json and table.md go.")
    flags.DEFINE_multi_integer(
        "depth", list(DEPTHS), "6n + 2 layers; may be repeated.", lower_bound=8
    )
    flags.DEFINE_multi_integer(
        "batch_size", list(BATCH_SIZES), "Images per batch; may be repeated.", lower_bound=1
    )
    flags.DEFINE_integer("image_size", 32, "Height and width.", lower_bound=4)
    loops = ["auto", "rolled", "unrolled"]
    flags.DEFINE_enum("loop", "auto", loops, "How cvjax compiles stages.")
    flags.DEFINE_bool("torch", True, "Whether PyTorch runs its steps, too.")


def main(arguments):
    cli.refuse_arguments(arguments)
    values = flags.FLAGS
    folder = workdirs.check_writable(values.workdir) if values.workdir else None
    if values.torch:
        report.import_torch()
    rows = []
    for batch_size, depth in itertools.product(values.batch_size, values.depth):
        net = nets.Net("resnet_cifar", {"depth": depth}, values.image_size)
        batch = nets.random_batch(net, batch_size)
        for recompute in (False, True):
            logging.info("%d layers, batch %d, remat %s.", depth, batch_size, recompute)
            case = {"depth": depth, "batch_size": batch_size, "recompute": recompute}
            model = net.create(loop=values.loop, remat=recompute)
            rows.append({**case, "side": "cvjax", **measure_ours(model, batch)})
            if values.torch:
                rows.append({**case, "side": "PyTorch", **measure_torch(model, batch)})
    lines = tabulate(rows)
    tables.show("Memory of a training step of CIFAR ResNets", HEADINGS, lines)
    if folder:
        settings = {"image_size": values.image_size, "loop": values.loop}
        results = {"benchmark": "memory", **settings, "rows": rows}
        report.write(folder, results, tables.markdown(HEADINGS, lines))


def measure_ours(model, batch) -> dict[str, int | None]:
    """Bytes by XLA's plan, and on a GPU by its allocator.

    Returns:
      "state" (the step's arguments), "beyond" (temporaries) and "device_peak" (of the
      process so far, all included; None where the device does not report it).
    """
    lowered, create = nets.lower_step(model, batch)
    options = COMPILER_OPTIONS.get(jax.default_backend(), {})
    compiled = lowered.compile(compiler_options=options)
    plan = compiled.memory_analysis()
    peak = None
    device = jax.local_devices()[0]
    if device.memory_stats():
        state, constants = create()
        jax.block_until_ready(compiled(state, batch, constants))
        peak = device.memory_stats()["peak_bytes_in_use"]
    return {
        "state": plan.argument_size_in_bytes,
        "beyond": plan.temp_size_in_bytes,
        "device_peak": peak,
    }


def measure_torch(model, batch) -> dict[str, int | None]:
    """As `measure_ours`, of PyTorch: one step is made to settle, the next one measured."""
    import torch

    from benchmarks import torch_nets

    device = torch_nets.pick_device(jax.default_backend())
    net = torch_nets.create(model)
    net.recompute = model.remat
    mean = batch["image"].mean(axis=0, dtype=np.float32) / 255
    step = torch_nets.create_step(net, mean, device)
    step(batch)
    # Parameters, momentum of the same size, averages, and the images.
    parameters = sum(leaf.numel() * leaf.element_size() for leaf in net.parameters())
    averages = sum(leaf.numel() * leaf.element_size() for leaf in net.buffers())
    state = 2 * parameters + averages + batch["image"].nbytes
    if device.type == "cuda":
        net.zero_grad(set_to_none=True)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        step(batch)
        peak = torch.cuda.max_memory_allocated(device)
        return {"state": state, "beyond": peak - before, "device_peak": peak}
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        step(batch)
    events = profile.profiler.kineto_results.events()
    changes = [(e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"]
    return {"state": state, "beyond": highest(changes), "device_peak": None}


def highest(changes: list[tuple[int, int]]) -> int:
    """The most that was allocated at one time: of (time, bytes more or less)."""
    return max(itertools.accumulate(bytes_ for _, bytes_ in sorted(changes)), default=0)


def tabulate(rows: list[dict[str, Any]]) -> list[tuple[str, ...]]:
    """The cells of the table: beyond the state, each beside the same with all kept."""
    kept = {
        (row["batch_size"], row["depth"], row["side"]): row["beyond"]
        for row in rows
        if not row["recompute"]
    }
    lines = []
    for row in rows:
        key = (row["batch_size"], row["depth"], row["side"])
        saved = f"{1 - row['beyond'] / kept[key]:.0%}" if row["recompute"] else ""
        names = {"cvjax": ", remat", "PyTorch": ", checkpoint"}
        side = row["side"] + (names[row["side"]] if row["recompute"] else "")
        sizes = (f"{row['state'] / 1e6:.1f}", f"{row['beyond'] / 1e6:.1f}")
        lines.append((str(row["batch_size"]), str(row["depth"]), side, *sizes, saved))
    return lines


if __name__ == "__main__":
    define_flags()
    cli.run(main)

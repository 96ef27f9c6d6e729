"""Training steps beside PyTorch's: images per second, and the share of the hardware's peak.

    pip install torch
    python -m benchmarks.train_step --workdir=results/benchmarks/train_step
    python -m benchmarks.train_step --net=ResNet-20 --batch_size=256 --dtype=bfloat16

A step is augmentation (pad by 4, crop, flip), forward and backward pass and SGD with
momentum 0.9 and weight decay 1e-4, from a batch of uint8 on the host to updated parameters
on the device: `cvjax.training.steps.train_step` itself, which also keeps the sums that
training logs. PyTorch does the same eagerly and through `torch.compile`, channels last. All
are interleaved; compilation stands apart. On CPU two sides more show what it owes to what:
one whose stages of blocks are loops, and one with XLA's own convolutions instead of
oneDNN's. All sides profit from a heap that keeps what is freed (cvjax/memory.py), PyTorch's
too. On a GPU products of float32 are TF32 on both sides; set
XLA_PYTHON_CLIENT_PREALLOCATE=false there, so that JAX leaves memory to PyTorch.

The peak is what the better of the two libraries reaches in a large product of square
matrices of the same type, interleaved with them. The operations of a step are 2 for each
multiply-accumulate of the convolutions and dense layers, forward and backward
(`cvjax.costs.accounting`).

Without --net: on CPU two small nets, which take minutes; on an accelerator all but those of
8 pixels.
"""

from typing import Any

import jax
import numpy as np
from absl import flags, logging
from jax import numpy as jnp

from benchmarks import nets, report
from cvjax import cli, timing
from cvjax.costs.accounting import account
from cvjax.nn import onednn
from cvjax.report import tables
from cvjax.storage import workdir as workdirs

CPU_NETS = ("ResNet-14, 8 px", "ResNet-20")
OURS, EAGER, COMPILED = "cvjax", "PyTorch", "torch.compile"
ROLLED, BY_XLA = "cvjax, rolled", "cvjax, XLA's convolutions"
MATMULS = {OURS: "product, JAX", EAGER: "product, PyTorch"}
HEADINGS = (
    "net",
    "dtype",
    "batch",
    "side",
    "images/s (quartiles)",
    "speed, PyTorch's is 1",
    "of peak",
    "compile s",
)


def define_flags() -> None:
    """The command line."""
    flags.DEFINE_string("workdir", None, "Where results.json and table.md go.")
    flags.DEFINE_multi_string("net", [], f"One of {', '.join(nets.NETS)}; may be repeated.")
    flags.DEFINE_integer("batch_size", 128, "Images per batch.", lower_bound=1)
    types = ["float32", "bfloat16"]
    flags.DEFINE_multi_enum("dtype", ["float32"], types, "May be repeated.")
    flags.DEFINE_integer("rounds", 7, "Timings of each side.", lower_bound=1)
    flags.DEFINE_integer("steps", 1, "Steps in each timing.", lower_bound=1)
    flags.DEFINE_integer("matrix", 0, "Side of the peak's matrices; 0 for a default.")
    flags.DEFINE_bool("torch_compile", True, "Whether torch.compile is among the sides.")


def main(arguments):
    cli.refuse_arguments(arguments)
    values, torch = flags.FLAGS, report.import_torch()
    folder = workdirs.check_writable(values.workdir) if values.workdir else None
    on_cpu = jax.default_backend() == "cpu"
    names = values.net or (CPU_NETS if on_cpu else tuple(nets.NETS)[1:])
    torch.set_float32_matmul_precision("highest" if on_cpu else "high")
    torch.backends.cudnn.benchmark = True  # as XLA, which tries algorithms out too
    rows = []
    for name, net in nets.choose(list(names)).items():
        for dtype in values.dtype:
            row = measure(
                net,
                values.batch_size,
                dtype,
                rounds=values.rounds,
                steps=values.steps,
                matrix=values.matrix or (1_024 if on_cpu else 8_192),
                with_compile=values.torch_compile,
            )
            rows.append({"net": name, **row})
            tables.show(name, HEADINGS[3:], [cells[3:] for cells in tabulate(rows[-1:])])
    if folder:
        results = {"benchmark": "train_step", "rows": rows}
        report.write(folder, results, tables.markdown(HEADINGS, tabulate(rows)))


def measure(
    net: nets.Net,
    batch_size: int,
    dtype: str,
    *,
    rounds: int,
    steps: int,
    matrix: int,
    with_compile: bool,
) -> dict[str, Any]:
    """One net's row: for each side its rate, ratio and share of the peak."""
    from benchmarks import torch_nets

    model = net.create(dtype=dtype)
    batch = nets.random_batch(net, batch_size)
    logging.info("Compiling %s, %s, batch %d.", net.model, dtype, batch_size)
    ours, seconds = nets.create_step(model, batch)
    sides, compile_seconds, failed = {OURS: ours}, {OURS: seconds}, {}
    if jax.default_backend() == "cpu":
        if hasattr(model, "loop"):
            rolled = model.clone(loop="rolled")
            sides[ROLLED], compile_seconds[ROLLED] = nets.create_step(rolled, batch)
        with onednn.off():
            sides[BY_XLA], compile_seconds[BY_XLA] = nets.create_step(model, batch)
    device = torch_nets.pick_device(jax.default_backend())
    mean = batch["image"].mean(axis=0, dtype=np.float32) / 255
    for side, compiled in ((EAGER, False), (COMPILED, True)):
        if compiled and not with_compile:
            continue
        twin, half = torch_nets.create(model), dtype != "float32"
        step = torch_nets.create_step(twin, mean, device, half=half, compiled=compiled)
        try:
            first = timing.interleave({side: lambda step=step: step(batch)}, 1, warm_up=0)
        except Exception as error:  # torch.compile fails in many ways; the table says so
            if not compiled:
                raise
            message = str(error).strip() or "no message"
            failed[side] = f"{type(error).__name__}: {message.splitlines()[0][:200]}"
            logging.warning("torch.compile does not work here: %s", failed[side])
            continue
        sides[side] = step
        if compiled:
            compile_seconds[side] = float(first[side][0])

    def repeat(step):
        for _ in range(steps):
            step(batch)

    functions = {side: lambda step=step: repeat(step) for side, step in sides.items()}
    functions |= create_matmuls(matrix, dtype, device)
    times = timing.interleave(functions, rounds)
    macs = account(model, net.image_size).macs_with_gradients * batch_size
    return {
        "dtype": dtype,
        "batch_size": batch_size,
        "macs_per_step": macs,
        "steps_per_timing": steps,
        "failed": failed,
        **summarize(times, list(sides), batch_size * steps, macs * steps, matrix),
        "compile_seconds": compile_seconds,
    }


def create_matmuls(size: int, dtype: str, device) -> dict[str, Any]:
    """Functions that multiply two square matrices, by JAX and by PyTorch, and wait."""
    import torch

    from benchmarks import torch_nets

    a = jax.random.normal(jax.random.key(0), (size, size), jnp.dtype(dtype))
    product = jax.jit(jnp.matmul)
    b = torch.randn(size, size, device=device, dtype=getattr(torch, dtype))

    def multiply():
        torch.matmul(b, b)
        torch_nets.synchronize(device)

    return {
        MATMULS[OURS]: lambda: product(a, a),
        MATMULS[EAGER]: multiply,
    }


def summarize(
    times: dict[str, np.ndarray], sides: list[str], images: int, macs: int, matrix: int
) -> dict[str, Any]:
    """Rates, ratios and shares of the peak, from seconds round by round.

    Args:
      times: of `sides` and of both products.
      sides: the ones to report.
      images, macs: in one timing.
      matrix: side of the matrices.

    Returns:
      "peak_flops"; and for each side "images_per_second", "speed" (PyTorch's is 1), and
      "of_peak": spreads of the values of each round.
    """
    product = min((times[name] for name in MATMULS.values()), key=np.median)
    peak = 2 * matrix**3 / product
    return {
        "peak_flops": timing.spread(peak),
        "peak_by": next(name for name in MATMULS.values() if times[name] is product),
        "sides": {
            side: {
                "images_per_second": timing.spread(images / times[side]),
                "speed": timing.spread(times[EAGER] / times[side]),
                "of_peak": timing.spread(2 * macs / times[side] / peak),
            }
            for side in sides
        },
    }


def tabulate(rows: list[dict[str, Any]]) -> list[tuple[str, ...]]:
    """The cells of the table, a line for each side of each row."""
    lines = []
    for row in rows:
        start = (row["net"], row["dtype"], str(row["batch_size"]))
        for side, numbers in row["sides"].items():
            seconds = row["compile_seconds"].get(side)
            lines.append(
                (
                    *start,
                    side,
                    timing.format_spread(numbers["images_per_second"], 0),
                    timing.format_spread(numbers["speed"]),
                    f"{numbers['of_peak']['median']:.0%}",
                    "" if seconds is None else f"{seconds:.1f}",
                )
            )
        for side in row["failed"]:
            lines.append((*start, side, "does not work here", "", "", ""))
    return lines


if __name__ == "__main__":
    define_flags()
    cli.run(main)

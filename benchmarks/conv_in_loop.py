"""What a convolution's gradient costs on CPU, and in a rolled loop (see cvjax/nn/conv.py).

    python -m benchmarks.conv_in_loop

Forward and gradient of four 3x3 convolutions with ReLU in a chain, four ways: unrolled and
in a `lax.scan`, each with XLA's own convolution and with `nn.conv.conv`, which in the loop
is told so by `in_loop=True`. The ways are timed in turns; printed are medians, their spread
(quartiles) and ratios, compilation apart.
"""

import time
from functools import partial

import jax
import numpy as np
from absl import flags
from jax import numpy as jnp

from cvjax import cli, timing
from cvjax.nn.conv import DIMENSIONS, conv
from cvjax.report import tables

BATCH_SIZE = flags.DEFINE_integer("batch_size", 32, "Images a batch.", lower_bound=1)
ROUNDS = flags.DEFINE_integer("rounds", 7, "Timings of each way.", lower_bound=1)

LAYERS = 4
SHAPES = ((32, 16), (16, 32), (8, 64))  # side, channels: the three stages of a CIFAR ResNet
PADS = ((1, 1), (1, 1))
# Whether the loop is rolled, and whether the convolution is ours.
WAYS = {
    "unrolled, XLA": (False, False),
    "unrolled, conv": (False, True),
    "loop, XLA": (True, False),
    "loop, conv": (True, True),
}


def chain(x, kernels, *, rolled: bool, ours: bool):
    """The sum over the output of the last layer."""

    def layer(x, kernel):
        if ours:
            y = conv(x, kernel, padding=PADS, in_loop=rolled)
        else:
            y = jax.lax.conv_general_dilated(
                x, kernel, (1, 1), PADS, dimension_numbers=DIMENSIONS
            )
        return jax.nn.relu(y), None

    unroll = 1 if rolled else LAYERS + 1
    return jax.lax.scan(layer, x, kernels, unroll=unroll)[0].sum()


def main(arguments):
    cli.refuse_arguments(arguments)
    rows = []
    for side, channels in SHAPES:
        x_rng, kernel_rng = jax.random.split(jax.random.key(0))
        x = jax.random.normal(x_rng, (BATCH_SIZE.value, side, side, channels))
        kernels = 0.1 * jax.random.normal(kernel_rng, (LAYERS, 3, 3, channels, channels))
        compiled, compile_ms = {}, {}
        for way, (rolled, ours) in WAYS.items():
            walk = partial(chain, rolled=rolled, ours=ours)
            start = time.perf_counter()
            compiled[way] = jax.jit(jax.grad(walk, (0, 1))).lower(x, kernels).compile()
            compile_ms[way] = 1000 * (time.perf_counter() - start)
        runs = {way: partial(run, x, kernels) for way, run in compiled.items()}
        times = timing.interleave(runs, ROUNDS.value)
        for way in WAYS:
            low, median, high = np.percentile(1000 * times[way], (25, 50, 75))
            cells = (
                f"{side}x{side}x{channels}",
                way,
                f"{median:.1f}",
                f"{low:.1f} to {high:.1f}",
                f"{np.median(times[way] / times['unrolled, XLA']):.1f}",
                f"{compile_ms[way]:.0f}",
            )
            rows.append(cells)
    headings = ("images", "way", "median", "quartiles", "ratio", "compile")
    tables.show(f"{LAYERS} layers, batch {BATCH_SIZE.value}, ms", headings, rows)


if __name__ == "__main__":
    jnp.zeros(())  # starts the backend, so that its start is not timed
    cli.run(main)

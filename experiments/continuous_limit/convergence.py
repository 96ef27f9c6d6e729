"""How near an ODE-net is to its limit: other solvers, float64, measured orders."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np

from cvjax.data.normalize import normalize
from cvjax.errors import DivergedError
from cvjax.models import create_model
from cvjax.nn import ode
from cvjax.training.trained_network import Network

FLOOR = 1e-12  # float64 rounds away what is far below
RANGE = 4  # points of a fitted slope


class Solved(NamedTuple):
    """What a net with ODE blocks gives for n images.

    Attributes:
      features: x(1) of the last ODE block, [n, height, width, channels].
      logits: [n, classes].
      evaluations: of f, all blocks and rejected steps counted (NFE), [n].
      steps: tried, of all blocks, [n].
    """

    features: np.ndarray
    logits: np.ndarray
    evaluations: np.ndarray
    steps: np.ndarray


def solve(
    network: Network,
    images: np.ndarray,
    fields: Mapping[str, Any],
    dtype: Any = np.float64,
) -> Solved:
    """What a trained ODE-net gives with another solver.

    Args:
      network: an ODE-net.
      images: uint8 [n, height, width, channels].
      fields: of the model, in the place of those that it was trained with.
      dtype: of all that is computed. Float64 shows errors that float32 rounds away.

    Raises:
      DivergedError: the solver failed for an image.
    """
    normalized = normalize(images, network.statistics)
    batch = network.run.data.eval_batch_size
    parts = []
    with jax.enable_x64(dtype == np.float64):
        variables, inputs = jax.tree.map(
            lambda leaf: np.asarray(leaf, dtype), (network.variables, normalized)
        )
        settings = {**network.run.model, **fields}
        model = create_model(num_classes=len(network.class_names), **settings)
        for first in range(0, len(inputs), batch):
            part = inputs[first : first + batch]
            parts.append(jax.device_get(_solve(variables, part, model=model)))
    *values, result = (np.concatenate(column) for column in zip(*parts, strict=True))
    if failed := int((result != ode.SUCCESSFUL).sum()):
        raise DivergedError(
            f"the solver ({dict(fields)}) failed for {failed} of {len(images)} images."
        )
    return Solved(*values)


@partial(jax.jit, static_argnames="model")
def _solve(variables, images, *, model):
    def is_block(module, method):
        return isinstance(module, ode.ODEBlock) and method == "__call__"

    collections = ["solver", "intermediates"]
    logits, sown = model.apply(
        variables,
        images,
        train=False,
        mutable=collections,
        capture_intermediates=is_block,
    )
    features = sown["intermediates"][max(sown["intermediates"])]["__call__"][0]
    stats = [block["stats"] for block in sown["solver"].values()]
    total = jax.tree.map(lambda *leaves: sum(leaves), *stats)
    return features, logits, total.evaluations, total.steps, total.result


def fit_order(steps: Sequence[int], distances: Sequence[float]) -> dict[str, Any] | None:
    """The order p of distance = c * steps**-p: minus the slope between logarithms.

    Fitted by least squares to the finest `RANGE` numbers of steps, without those whose
    distance is below `FLOOR`: theory speaks of small steps, and rounding ends them.

    Returns:
      "order" and "range" (first and last number of steps); None if fewer points are left.
    """
    kept = [pair for pair in zip(steps, distances, strict=True) if pair[1] > FLOOR]
    kept = sorted(kept)[-RANGE:]
    if len(kept) < RANGE:
        return None
    x, y = np.log2(kept).T
    return {"order": -float(np.polyfit(x, y, 1)[0]), "range": [kept[0][0], kept[-1][0]]}

"""How the gradient of the loss changes along depth: one norm for each place in a net.

    state     |dL/dx[l]|, x[l] the output of block l and x[0] that of the stem: the signal
              that is propagated backward. Blocks that change the shape between two stages
              count as well. In an ODE block x[l] is x(t) after l of its steps, and dL/dx(t)
              the adjoint of Chen et al. 2018, section 2.
    kernel    |dL/dW[l]|, W[l] the kernel of layer l: what moves this layer. The ODE-net
              has one kernel for all t, and so no such norm for each place.

L is the mean loss of a batch. The blocks of a stage are one function with stacked
parameters (nn/depth.py): norms are taken along that axis, so one gradient gives those of
all layers. As no parameter is x[l], a stage is scanned with a probe behind each block: an
identity that has a second argument, whose gradient is the sum of squares of dL/dx[l].
"""

import math
from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import linen as nn
from flax import traverse_util
from jax import numpy as jnp

from cvjax.errors import UserError
from cvjax.models.odenet_layers import Downsampling
from cvjax.models.resnet_layers import Block
from cvjax.nn import depth, runge_kutta
from cvjax.nn.ode import ODEBlock
from cvjax.tasks.classification import loss_per_example
from cvjax.training.losses import LossConfig

Path = tuple[str, ...]


class Norms(NamedTuple):
    """The gradient of one batch in numbers.

    Attributes:
      states: of x[0], x[1], ..., from the image to the logits.
      leaves: of each parameter by its path; one per block for stacked ones, or else one.
    """

    states: np.ndarray
    leaves: dict[Path, np.ndarray]


def gradient_norms(
    model: nn.Module,
    variables: Mapping[str, Any],
    images: np.ndarray,
    labels: np.ndarray,
    loss: LossConfig,
) -> Norms:
    """The norms for one batch in training mode (BatchNorm normalises by the batch).

    In float64: what fades exponentially is soon zero in float32.

    Args:
      model: with stages of `nn.depth`, or with ODE blocks that take fixed steps and whose
        theta is constant in time.
      variables: of the model.
      images: normalised, [n, height, width, channels].
      labels: [n].
      loss: what is minimised.

    Raises:
      UserError: see `count_states`.
    """
    with jax.enable_x64(True):
        exact, images = jax.tree.map(
            lambda leaf: np.asarray(leaf, np.float64), (dict(variables), images)
        )
        slots = np.zeros(count_states(model, exact, images))
        params = exact.pop("params")
        found = _gradient(params, slots, exact, images, labels, model=model, loss=loss)
        gradient, squares = jax.device_get(found)
    return Norms(np.sqrt(squares), leaf_norms(gradient))


def count_states(model: nn.Module, variables: Any, images: Any) -> int:
    """The number of states x[0], x[1], ... of a model; arguments may be shapes only.

    Raises:
      UserError: for a model without blocks, or whose steps in time are not fixed.
    """
    lengths = []

    def count(call, arguments, settings, context):
        lengths.extend(_states_of(context))
        return call(*arguments, **settings)

    apply = partial(model.apply, train=True, mutable=["batch_stats"])
    with nn.intercept_methods(count):
        jax.eval_shape(apply, variables, images)
    if not lengths:
        raise UserError(
            f"{type(model).__name__} has no stage of blocks to measure gradients "
            "between; take resnet_cifar, resnet, odenet or odenet_discrete."
        )
    return 1 + sum(lengths)


def leaf_norms(gradient: Mapping[str, Any]) -> dict[Path, np.ndarray]:
    """The Euclidean norm of each array: [blocks] where blocks are stacked, or else [1]."""
    norms = {}
    for path, leaf in traverse_util.flatten_dict(dict(gradient)).items():
        rows = np.reshape(leaf, (len(leaf) if depth.BLOCKS in path else 1, -1))
        norms[path] = np.linalg.norm(rows, axis=1)
    return norms


def total_norm(leaves: Mapping[Path, np.ndarray]) -> float:
    """The norm of the whole gradient, as the trainer logs it ("train/gradient_norm")."""
    return math.sqrt(sum(float((norms**2).sum()) for norms in leaves.values()))


def kernel_norms(leaves: Mapping[Path, np.ndarray]) -> list[float]:
    """Those of the layers of a `CifarResNet`, from the image to the logits.

    Kernels in shortcuts lie on no such path and are left out.
    """
    places = {}
    for path, norms in leaves.items():
        if path[-1] == "kernel" and "shortcut" not in path:
            for block, norm in enumerate(norms):
                places[_place(path, block)] = float(norm)
    return [places[place] for place in sorted(places)]


def _place(path: Path, block: int) -> tuple[int, int, str]:
    """(stage, block in it, layer in that), which sort as the image passes them."""
    module, layer = path[0], path[-2]
    if not module.startswith("stage"):
        return (0 if module == "stem_conv" else math.inf, 0, layer)
    stage = int(module.removeprefix("stage").removesuffix("_transition"))
    return (stage, block + (depth.BLOCKS in path), layer)


@partial(jax.jit, static_argnames=("model", "loss"))
def _gradient(params, slots, others, images, labels, *, model, loss):
    """The gradient with respect to the parameters, and the sums of squares of dL/dx[l]."""

    def mean_loss(params, slots):
        variables = {"params": params, **others}
        with nn.intercept_methods(_probing(variables, slots)):
            logits, _ = model.apply(variables, images, train=True, mutable=["batch_stats"])
        return loss_per_example(logits, labels, loss).mean()

    return jax.grad(mean_loss, argnums=(0, 1))(params, slots)


def _states_of(context: nn.module.InterceptorContext) -> list[int]:
    """[number of states] of the called part; [] for one without blocks."""
    part = context.module
    if context.method_name != "__call__":
        return []
    if isinstance(part, depth.Stage | depth.TiedStage):
        return [part.length]
    # Those in the stem lead to x[0]; those in a stage are counted with it.
    if isinstance(part, Block | Downsampling):
        return [1] if len(part.path) == 1 else []
    if isinstance(part, ODEBlock):
        if part.theta != "constant" or part.solver.method not in runge_kutta.TABLEAUS:
            raise UserError(
                f"gradients along time are measured for theta 'constant' and solvers "
                f"{', '.join(runge_kutta.TABLEAUS)} with fixed steps, got "
                f"{part.theta!r} and {part.solver.method!r}."
            )
        return [part.solver.steps]
    return []


def _probing(variables: Mapping[str, Any], slots: jax.Array):
    """An interceptor that probes x[0] and the output of each block, by a slot each."""
    used = 0

    def probe_part(call, arguments, settings, context):
        nonlocal used
        states = _states_of(context)
        if not states:
            return call(*arguments, **settings)
        (x,), part = arguments, context.module
        if not used:
            x, used = _probe(x, slots[0]), 1
        slots_here = slots[used : used + states[0]]
        used += states[0]
        if isinstance(part, Block | Downsampling):
            return _probe(call(x, **settings), slots_here[0])
        scan = {
            depth.Stage: _scan_stage,
            depth.TiedStage: _scan_tied_stage,
            ODEBlock: _scan_ode,
        }
        return scan[type(part)](part, variables, x, slots_here)

    return probe_part


def _scan_stage(stage: depth.Stage, variables, x: jax.Array, slots: jax.Array):
    block = stage.block(parent=None)
    stacked = {
        kind: tree[stage.name][depth.BLOCKS]
        for kind, tree in variables.items()
        if stage.name in tree
    }

    def body(x, theta_and_slot):
        theta, slot = theta_and_slot
        x, _ = block.apply(theta, x, mutable=["batch_stats"])
        return _probe(x, slot), None

    return jax.lax.scan(body, x, (stacked, slots))[0] if stage.length else x


def _scan_tied_stage(stage: depth.TiedStage, variables, x: jax.Array, slots: jax.Array):
    if not stage.length:
        return x
    theta = {"params": variables["params"][stage.name]["f"]}
    return _scan_steps("euler", stage.f, theta, x, slots)


def _scan_ode(block: ODEBlock, variables, x: jax.Array, slots: jax.Array):
    params = jax.tree.map(lambda leaf: leaf[0], variables["params"][block.name]["f"])
    averages = variables.get("batch_stats", {}).get(block.name, {}).get("f", {})
    theta = {"params": params, "batch_stats": averages}
    return _scan_steps(block.solver.method, block.field, theta, x, slots)


def _scan_steps(method: str, make_field, theta, x: jax.Array, slots: jax.Array):
    """Integrates from 0 to 1 with a step per slot."""
    tableau, h = runge_kutta.TABLEAUS[method], 1 / len(slots)
    apply = partial(make_field(parent=None).apply, theta, mutable=["batch_stats"])

    def field(x, t):
        return apply(x, t)[0]

    def body(x, number_and_slot):
        number, slot = number_and_slot
        return _probe(runge_kutta.step(tableau, field, x, number * h, h), slot), None

    return jax.lax.scan(body, x, (jnp.arange(len(slots), dtype=x.dtype), slots))[0]


@jax.custom_vjp
def _probe(x: jax.Array, slot: jax.Array) -> jax.Array:
    """x; the gradient with respect to `slot` is the sum of squares of that of x."""
    del slot
    return x


_probe.defvjp(
    lambda x, slot: (x, None),
    lambda _, cotangent: (cotangent, (cotangent**2).sum()),
)

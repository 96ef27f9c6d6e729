"""The rows of an account, counted equation by equation of a jaxpr; see `accounting`."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from jax import numpy as jnp
from jax.extend import core

from cvjax.costs.layers import COUNTED_IN_PLACE, Layer
from cvjax.costs.receptive_field import Spans, field_and_jump, output_spans
from cvjax.costs.scan_equation import split_inputs

CONVOLUTIONS = ("convolution", "conv_general_dilated")  # cvjax.nn.conv's and JAX's own
MERGES = ("add", "add_any", "concatenate")
# By the name of the jitted function, or of the primitive. "pow" is the last step of a local
# response normalisation.
NONLINEARITIES = (
    *("celu", "elu", "erf", "gelu", "hard_sigmoid", "hard_swish", "hard_tanh"),
    *("leaky_relu", "logistic", "mish", "pow", "relu", "relu6", "selu", "silu"),
    *("softplus", "squareplus", "swish", "tanh"),
)


@dataclasses.dataclass(frozen=True)
class Weight:
    """A leaf of the variables, or one block's slice of it; size 0 if not trained."""

    path: tuple[str, ...]
    size: int


@dataclasses.dataclass(frozen=True)
class Flow:
    """What is known of an intermediate array: where it comes from, what it sees.

    An array made from the images has the row that it left last; others have weights.
    """

    layer: int | None = None
    weights: frozenset[Weight] = frozenset()
    spans: Spans = ()

    @property
    def is_data(self) -> bool:
        return self.layer is not None


@dataclasses.dataclass(frozen=True)
class Scope:
    """Where in the network an equation stands: path with block numbers, and without.

    `block` is the number that the next component of the path gets.
    """

    path: tuple[str, ...]
    plain: tuple[str, ...]
    block: int | None = None

    def enter(self, equation, root: str) -> "Scope":
        """The scope of an equation, from linen's name stack."""
        names = str(equation.source_info.name_stack).split("/")
        # Not names of modules: lifted functions, methods and jax's own transformations.
        names = [name for name in names if name and not set(name) & set(".<(")]
        if not self.plain and names[:1] == [root]:
            names = names[1:]
        if not names:
            return self
        path = (*self.path, _numbered(names[0], self.block), *names[1:])
        return Scope(path, (*self.plain, *names))


def _numbered(name: str, block: int | None) -> str:
    """blocks -> block3."""
    if block is None:
        return name
    return f"{name.removesuffix('s')}{block}"


class Counter:
    """Follows the equations of a jaxpr and writes the rows."""

    def __init__(self, images, flows: Sequence[Flow], root: str):
        size = math.prod(images.shape)
        itemsize = jnp.dtype(images.dtype).itemsize
        field = 1 if len(images.shape) == 4 else None
        row = Layer("input", "input", images.shape[1:], size, size, itemsize)
        self.rows = [dataclasses.replace(row, field=field, jump=field)]
        self.loops: list[str] = []
        self.root = root
        self.counted: set[tuple[str, ...]] = set()
        self.names: dict[str, int] = {"input": 1}
        self.owners: list[tuple[str, ...]] = [()]
        paths = [weight.path for flow in flows for weight in flow.weights]
        # Modules that normalise: their reductions are no pools.
        self.norms = {path[:-1] for path in paths if path[-1] in ("scale", "mean", "var")}

    def run(self, jaxpr, flows: Sequence[Flow], scope: Scope) -> list[Flow]:
        """Counts a jaxpr whose inputs are `flows`; returns those of its outputs."""
        known = dict(zip(jaxpr.invars, flows, strict=True))
        alive = _alive(jaxpr)
        for equation, is_alive in zip(jaxpr.eqns, alive, strict=True):
            if is_alive:
                # Literals and constants carry nothing.
                inputs = [_read(known, var) for var in equation.invars]
                outputs = self.equation(equation, inputs, scope.enter(equation, self.root))
                known.update(zip(equation.outvars, outputs, strict=True))
        return [_read(known, var) for var in jaxpr.outvars]

    def equation(self, equation, inputs: list[Flow], scope: Scope) -> list[Flow]:
        name = equation.primitive.name
        if name == "scan":
            return self.scan(equation.params, inputs, scope)
        if name == "while":
            return self.while_loop(equation.params, inputs, scope)
        if name == "cond":  # the longest branch
            branches = [branch.jaxpr for branch in equation.params["branches"]]
            branch = max(branches, key=lambda jaxpr: len(jaxpr.eqns))
            return self.run(branch, inputs[1:], scope)
        nonlinear = equation.params.get("name", name) in NONLINEARITIES
        inner = equation.params.get("jaxpr", equation.params.get("call_jaxpr"))
        if inner is not None and not nonlinear:
            return self.run(getattr(inner, "jaxpr", inner), inputs, scope)
        if not any(flow.is_data for flow in inputs):
            weights = frozenset().union(*(flow.weights for flow in inputs))
            return [Flow(weights=weights)] * len(equation.outvars)
        out = equation.outvars[0].aval
        spans = output_spans(equation, [flow.spans for flow in inputs])
        layers = {flow.layer for flow in inputs if flow.layer is not None}
        flow = Flow(max(layers), spans=spans)
        if name in CONVOLUTIONS:
            flow = self.convolution(equation, flow, inputs, scope)
        elif name == "dot_general":
            flow = self.product(equation, flow, inputs, scope)
        elif name.startswith("reduce_window"):
            flow = self.window(equation, flow, scope)
        elif pool := _pool_name(equation, scope.plain in self.norms):
            flow = self.add("pool", (*scope.path, pool), out, flow)
        elif any(flow.weights for flow in inputs):
            flow = self.weigh(inputs, out, flow, scope)
        elif scope.plain in self.norms:
            self.grow(out, flow)
        elif nonlinear or (name in MERGES and len(layers) > 1):
            self.rows[flow.layer].kept += math.prod(out.shape)
        return [flow] * len(equation.outvars)

    def scan(self, params, inputs: list[Flow], scope: Scope) -> list[Flow]:
        constants, state, stacked = split_inputs(params, inputs)
        carried = len(state)
        outputs: list[Flow] = []
        for trip in range(params["length"]):
            here = dataclasses.replace(scope, block=trip + 1)
            slices = [_slice(flow, scope, trip, params["length"]) for flow in stacked]
            arguments = [*constants, *state, *slices]
            outputs = self.run(params["jaxpr"].jaxpr, arguments, here)
            state = outputs[:carried]
        return [*state, *(dataclasses.replace(y, spans=()) for y in outputs[carried:])]

    def while_loop(self, params, inputs: list[Flow], scope: Scope) -> list[Flow]:
        self.loops.append("/".join(scope.path) or "while")
        skipped = params["cond_nconsts"]
        return self.run(params["body_jaxpr"].jaxpr, inputs[skipped:], scope)

    def convolution(self, equation, flow: Flow, inputs: list[Flow], scope: Scope) -> Flow:
        out, kernel = equation.outvars[0].aval, equation.invars[1].aval
        numbers = equation.params.get("dimension_numbers")
        features = kernel.shape[-1 if numbers is None else numbers.rhs_spec[0]]
        # The kernel's share of the input channels is that of one group.
        macs = math.prod(out.shape) * math.prod(kernel.shape) // features
        return self.add("conv", scope.path, out, flow, inputs[1].weights, macs)

    def product(self, equation, flow: Flow, inputs: list[Flow], scope: Scope) -> Flow:
        out, left = equation.outvars[0].aval, equation.invars[0].aval
        (contracted, _), _ = equation.params["dimension_numbers"]
        macs = math.prod(out.shape) * math.prod(left.shape[axis] for axis in contracted)
        weights = inputs[0].weights | inputs[1].weights
        kind = "dense" if weights else "matmul"
        return self.add(kind, scope.path, out, flow, weights, macs)

    def window(self, equation, flow: Flow, scope: Scope) -> Flow:
        sizes = equation.params["window_dimensions"]
        # A window over the channels is local response normalisation.
        over_map = any(sizes[span.axis] > 1 for span in flow.spans if span.axis)
        kind = "pool" if over_map else "norm"
        return self.add(kind, (*scope.path, kind), equation.outvars[0].aval, flow)

    def weigh(self, inputs: list[Flow], out, flow: Flow, scope: Scope) -> Flow:
        """Elementwise with weights: a bias belongs to its layer, the rest are norms."""
        weights = frozenset().union(*(flow.weights for flow in inputs))
        name = _owner(weights, scope.path)
        if self.owners[flow.layer] != name:
            kind = "norm" if scope.plain in self.norms else "weights"
            return self.add(kind, name, out, flow, weights)
        self.rows[flow.layer].parameters += self.take(weights)
        self.grow(out, flow)
        return flow

    def grow(self, out, flow: Flow) -> None:
        """A norm's first equation may have been about its statistics, not the map."""
        row = self.rows[flow.layer]
        if row.kind == "norm" and math.prod(out.shape) > row.kept:
            row.output, row.kept = out.shape[1:], math.prod(out.shape)
            row.field, row.jump = field_and_jump(flow.spans)

    def add(
        self,
        kind: str,
        path: tuple[str, ...],
        out,
        flow: Flow,
        weights: frozenset[Weight] = frozenset(),
        macs: int = 0,
    ) -> Flow:
        """Writes a row; returns the flow that leaves it."""
        path = _owner(weights, path)
        name = "/".join(path) or kind
        number = self.names[name] = self.names.get(name, 0) + 1
        if name == "pool":  # of the net itself: pool1, pool2
            name = f"{name}{number}"
        elif number > 1:
            name = f"{name}#{number}"
        size = math.prod(out.shape)
        field, jump = field_and_jump(flow.spans)
        row = Layer(
            name,
            kind,
            out.shape[1:],
            values=size if kind in COUNTED_IN_PLACE else 0,
            kept=size,
            itemsize=jnp.dtype(out.dtype).itemsize,
            parameters=self.take(weights),
            macs=macs,
            field=field,
            jump=jump,
            reads_images=flow.layer == 0,
        )
        self.rows.append(row)
        self.owners.append(path)
        return dataclasses.replace(flow, layer=len(self.rows) - 1)

    def take(self, weights: frozenset[Weight]) -> int:
        """The number of those weights that no row has counted yet."""
        new = [weight for weight in weights if weight.path not in self.counted]
        self.counted.update(weight.path for weight in new)
        return sum(weight.size for weight in new)


def _read(known: dict[Any, Flow], var) -> Flow:
    return Flow() if isinstance(var, core.Literal) else known.get(var, Flow())


def _alive(jaxpr) -> list[bool]:
    """Which equations the outputs depend on; linen's scan leaves others behind."""
    needed = {var for var in jaxpr.outvars if not isinstance(var, core.Literal)}
    alive = []
    for equation in reversed(jaxpr.eqns):
        alive.append(any(var in needed for var in equation.outvars))
        if alive[-1]:
            inputs = equation.invars
            needed |= {var for var in inputs if not isinstance(var, core.Literal)}
    return alive[::-1]


def _owner(weights: frozenset[Weight], path: tuple[str, ...]) -> tuple[str, ...]:
    """The module that the weights belong to; the module at work if they are of many."""
    owners = {weight.path[:-1] for weight in weights}
    return owners.pop() if len(owners) == 1 else path


def _slice(flow: Flow, scope: Scope, trip: int, length: int) -> Flow:
    """What trip number `trip` of a scan sees of a stacked array."""
    depth = len(scope.path)
    weights = frozenset(
        Weight(
            (
                *weight.path[:depth],
                *(_numbered(name, trip + 1) for name in weight.path[depth : depth + 1]),
                *weight.path[depth + 1 :],
            ),
            weight.size // length,
        )
        for weight in flow.weights
    )
    return Flow(flow.layer, weights)


def _pool_name(equation, in_norm: bool) -> str | None:
    """A reduction of the whole map, or reductions of its parts put side by side."""
    name, last = equation.primitive.name, equation.invars[0].aval.ndim - 1
    if name == "concatenate" and equation.params["dimension"] in range(1, last):
        return "adaptive_pool"
    reduces = name in ("reduce_sum", "reduce_max") and last > 1 and not in_norm
    if reduces and sorted(equation.params["axes"]) == list(range(1, last)):
        return "global_pool"
    return None

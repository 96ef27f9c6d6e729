"""Back from a unit to the pixels: gradients with other rules for ReLU.

What ReLU lets through of a gradient g that comes back to it, for an input x:

    gradient        g where x > 0               backpropagation
    deconvolution   g where g > 0               Zeiler and Fergus 2013 (arXiv:1311.2901),
                                                section 2.1, "rectification"
    guided          g where x > 0 and g > 0     Springenberg et al. 2014 (arXiv:1412.6806),
                                                section 3.4

All else goes back as its gradient does: a convolution by the transposed kernel, which is
the deconvolution's filter, a max-pooling to where its maximum was, which is the
deconvolution's unpooling by switches, BatchNorm in evaluation mode by its scale. The rules
are about ReLU; other activations (an ODE-net's softplus) have their gradients.
"""

from collections.abc import Callable
from typing import Any

import jax
from jax import numpy as jnp
from jax.extend import core

from cvjax.costs.scan_equation import split_inputs

RULES: dict[str, Callable[[jax.Array, jax.Array], jax.Array]] = {
    "gradient": lambda x, g: x > 0,
    "deconvolution": lambda x, g: g > 0,
    "guided": lambda x, g: (x > 0) & (g > 0),
}


def with_rule(function: Callable[..., Any], rule: str) -> Callable[..., Any]:
    """The same function, whose gradients go back through `jax.nn.relu` by a rule.

    Loops of known length (`lax.scan`) are unrolled; in a `while` loop, and in what has a
    gradient of its own (`jax.custom_vjp`), ReLU keeps its gradient.

    Args:
      function: of arrays, traceable.
      rule: a key of `RULES`.
    """
    relu = _relu(RULES[rule])

    def changed(*arguments):
        closed, shapes = jax.make_jaxpr(function, return_shape=True)(*arguments)
        outputs = _evaluate(closed.jaxpr, closed.consts, jax.tree.leaves(arguments), relu)
        return jax.tree.unflatten(jax.tree.structure(shapes), outputs)

    return changed


def _relu(passes):
    @jax.custom_vjp
    def relu(x):
        return jnp.maximum(x, 0)

    def backward(x, g):
        return (jnp.where(passes(x, g), g, 0),)

    relu.defvjp(lambda x: (relu(x), x), backward)
    return relu


def _evaluate(jaxpr, consts, arguments, relu) -> list[jax.Array]:
    values = dict(
        zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *arguments], strict=True)
    )

    def read(var):
        return var.val if isinstance(var, core.Literal) else values[var]

    for equation in jaxpr.eqns:
        outputs = _apply(equation, [read(var) for var in equation.invars], relu)
        values.update(zip(equation.outvars, outputs, strict=True))
    return [read(var) for var in jaxpr.outvars]


def _apply(equation, inputs: list[jax.Array], relu) -> list[jax.Array]:
    name, params = equation.primitive.name, equation.params
    if _is_relu(equation):
        return [relu(*inputs)]
    if name == "scan":
        return _unroll(params, inputs, relu)
    if name in ("jit", "remat2", "checkpoint"):
        inner = params["jaxpr"]
        consts = getattr(inner, "consts", ())
        return _evaluate(getattr(inner, "jaxpr", inner), consts, inputs, relu)
    outputs = equation.primitive.bind(*inputs, **equation.primitive.get_bind_params(params))
    return outputs if equation.primitive.multiple_results else [outputs]


def _is_relu(equation) -> bool:
    """Whether it is `jax.nn.relu`: a jitted function, with a derivative of its own."""
    if equation.primitive.name != "custom_jvp_call":
        return False
    inner = equation.params["call_jaxpr"].jaxpr.eqns
    return [other.params.get("name") for other in inner] == ["relu"]


def _unroll(params, inputs: list[jax.Array], relu) -> list[jax.Array]:
    constants, state, stacked = split_inputs(params, inputs)
    body, carried = params["jaxpr"], len(state)
    trips = range(params["length"])
    kept: list[Any] = [None] * params["length"]
    for trip in reversed(trips) if params["reverse"] else trips:
        here = [*constants, *state, *(leaf[trip] for leaf in stacked)]
        outputs = _evaluate(body.jaxpr, body.consts, here, relu)
        state, kept[trip] = outputs[:carried], outputs[carried:]
    return [*state, *(jnp.stack(leaves) for leaves in zip(*kept, strict=True))]

"""Every network in bfloat16: of the computation only, and close to float32."""

from functools import partial

import jax
import numpy as np
import pytest
from jax import numpy as jnp
from test_models_imagenet import (
    BN,
    abstract,
    create,
    name_of,
    quick_jit,
    random_variables,
    shapes_of,
)

EVERY_MODEL = [
    ("alexnet", {"hidden": 8}, 64),
    ("alexnet", {"variant": "two_groups", "hidden": 8}, 64),
    ("convnet", {}, 32),
    pytest.param("googlenet", {}, 32, marks=pytest.mark.slow),
    ("googlenet", BN, 32),
    ("mlp", {}, 32),
    ("resnet", {"depth": 18}, 32),
    ("resnet", {"depth": 50, "shortcut": "none"}, 32),
    ("resnet_cifar", {"depth": 14}, 32),
    ("resnet_cifar", {"depth": 14, "pre_activation": True, "shortcut": "B"}, 32),
    ("vgg", {"depth": 11, "hidden": 8, **BN}, 32),
    ("vgg", {"depth": 11, "head": "small"}, 32),
]


def operands(jaxpr, primitives):
    """The first operands of some primitives, wherever they are."""
    found = []
    for eqn in jaxpr.eqns:
        if eqn.primitive.name in primitives:
            found.append(eqn.invars[0].aval)
        for value in eqn.params.values():
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                found += operands(inner, primitives)
    return found


def relu_inputs(jaxpr):
    """What each ReLU takes, before it is widened; wherever they are."""
    found, made = [], {}
    for eqn in jaxpr.eqns:
        inner = [getattr(value, "jaxpr", value) for value in eqn.params.values()]
        inner = [value for value in inner if hasattr(value, "eqns")]
        if [e.params.get("name") for value in inner for e in value.eqns] == ["relu"]:
            widening = made[eqn.invars[0]]
            assert widening.primitive.name == "convert_element_type"
            found.append(widening.invars[0].aval)
        else:
            found += [a for value in inner for a in relu_inputs(value)]
        made |= dict.fromkeys(eqn.outvars, eqn)
    return found


@pytest.mark.parametrize(
    ("name", "fields", "side"),
    EVERY_MODEL,
    ids=lambda value: name_of(("", value))[1:] if isinstance(value, dict) else None,
)
def test_half_precision_is_of_the_computation_only(name, fields, side):
    full, half = (
        create(name, {**fields, "dtype": dtype}) for dtype in ("float32", "bfloat16")
    )
    shape = (side, side, 3)
    variables = shapes_of(half, shape)
    assert variables == shapes_of(full, shape)
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {np.dtype(np.float32)}

    def train(variables, images):
        return half.apply(
            variables,
            images,
            train=True,
            mutable=["batch_stats", "auxiliary"],
            rngs={"dropout": jax.random.key(0)},
        )

    traced, out = jax.make_jaxpr(train, return_shape=True)(variables, abstract(shape, 2))
    assert {leaf.dtype for leaf in jax.tree.leaves(out)} == {np.dtype(np.float32)}
    layers = operands(traced.jaxpr, ("convolution", "dot_general"))
    types = [operand.dtype for operand in layers]
    heads = 1 + len(out[1].get("auxiliary", {}))
    assert types.count(np.float32) == heads
    assert types.count(jnp.bfloat16) == len(types) - heads > 0
    normalising = operands(traced.jaxpr, ("rsqrt", "pow"))
    assert all(operand.dtype == np.float32 for operand in normalising)
    # What lies between layers is half as large: here, what each ReLU and BatchNorm takes.
    images = [a for a in relu_inputs(traced.jaxpr) if a.ndim == 4 and a.shape[0] == 2]
    assert all(operand.dtype == jnp.bfloat16 for operand in images)
    assert images or name == "mlp"
    maps = operands(traced.jaxpr, ("channel_sums",))
    assert all(operand.dtype == jnp.bfloat16 for operand in maps)
    assert bool(maps) == bool(variables.get("batch_stats"))


def test_half_precision_is_close():
    fields = {"depth": 8, "width": 4}
    full = create("resnet_cifar", fields)
    half = create("resnet_cifar", {**fields, "dtype": "bfloat16", "loop": "rolled"})
    variables = random_variables(full, (8, 8, 3))
    images = np.random.default_rng(1).standard_normal((4, 8, 8, 3), np.float32)
    wanted, got = (
        quick_jit(partial(net.apply, train=False))(variables, images)
        for net in (full, half)
    )
    error = np.abs(wanted - got).max()
    assert 0 < error < 0.03 * np.abs(wanted).max()

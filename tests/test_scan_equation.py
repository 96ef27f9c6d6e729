"""A scan's inputs by their part in it, with whichever jax is installed."""

import types

import jax
import pytest
from jax import numpy as jnp

from cvjax.costs.scan_equation import split_inputs


def scan_equation(constants, carry, stacked):
    """The equation of a scan whose body uses every leaf of its inputs."""

    def body(carry, x):
        used = sum(leaf.sum() for leaf in jax.tree.leaves((constants, x)))
        return jax.tree.map(lambda leaf: leaf + used, carry), used

    jaxpr = jax.make_jaxpr(lambda carry, xs: jax.lax.scan(body, carry, xs))(carry, stacked)
    (equation,) = [e for e in jaxpr.eqns if e.primitive.name == "scan"]
    return equation


@pytest.mark.parametrize(
    ("constants", "carry", "stacked"),
    [
        # Shapes tell the parts apart: constants (2,), carry (3,), four trips of (5,).
        ([jnp.ones(2)], {"a": jnp.ones(3), "b": [jnp.ones(3)]}, jnp.ones((4, 5))),
        ([], jnp.ones(3), {"a": jnp.ones((4, 5)), "b": jnp.ones((4, 5))}),
        ([jnp.ones(2), jnp.ones((2, 1))], (), [jnp.ones((4, 5))]),
    ],
)
def test_inputs_are_told_apart(constants, carry, stacked):
    equation = scan_equation(constants, carry, stacked)
    shapes = [var.aval.shape for var in equation.invars]
    parts = split_inputs(equation.params, shapes)
    expected = [
        [leaf.shape for leaf in jax.tree.leaves(tree)]
        for tree in (constants, carry, stacked)
    ]
    assert list(map(list, parts)) == expected


def test_both_ways_in_which_jax_writes_it():
    counts = {"num_consts": 1, "num_carry": 2}
    tree = types.SimpleNamespace(unpack=lambda: ((None,), (None, None), (None,) * 3))
    for params in (counts, {"ft_in": tree}):
        assert split_inputs(params, "abcdef") == ("a", "bc", "def")

"""BatchNorm and GroupNorm against linen's and against NumPy in float64."""

from functools import partial

import jax
import numpy as np
import pytest
from flax import linen as nn
from jax import numpy as jnp

from cvjax.errors import UserError
from cvjax.nn.norm import BatchNorm, GroupNorm, normalize

SHAPE = (12, 3, 2, 5)
OURS = partial(BatchNorm, momentum=0.9, epsilon=1e-5)
LINEN = partial(nn.BatchNorm, momentum=0.9, epsilon=1e-5)


def create_variables(seed=0):
    rng = np.random.default_rng(seed)
    scale, bias, mean, var = rng.uniform(0.5, 2, (4, SHAPE[-1])).astype(np.float32)
    return {
        "params": {"scale": scale, "bias": bias},
        "batch_stats": {"mean": mean, "var": var},
    }


def create_images(dtype=np.float32, offset=2.0):
    rng = np.random.default_rng(1)
    x = offset + rng.normal(size=SHAPE) * np.linspace(0.5, 2, 12)[:, None, None, None]
    return jnp.asarray(x, dtype)


def run(module, x, variables):
    """Output, running averages, and gradients of a weighted sum."""
    weights = jnp.cos(jnp.arange(x.size, dtype=jnp.float32)).reshape(x.shape)

    @jax.jit
    def both(variables, x):
        def total(params, x):
            y, updated = module.apply(
                {**variables, "params": params}, x, mutable=["batch_stats"]
            )
            return (weights * y).sum(), (y, updated)

        gradient = jax.grad(total, (0, 1), has_aux=True)
        slopes, (y, updated) = gradient(variables["params"], x)
        return y, updated, slopes

    return both(variables, x)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("train", [True, False])
def test_the_whole_batch_is_one_group_as_in_linen(train, dtype):
    settings = {"use_running_average": not train, "dtype": dtype}
    x, variables = create_images(dtype), create_variables()
    mine, other = (run(make(**settings), x, variables) for make in (OURS, LINEN))
    # Not bit for bit: linen's variance is E[x^2] - E[x]^2, ours is that of x less a value.
    tolerance = 2e-5 if dtype == jnp.float32 else 2e-2
    for a, b in zip(jax.tree.leaves(mine), jax.tree.leaves(other), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_allclose(
            np.float64(a), np.float64(b), rtol=tolerance, atol=tolerance
        )
    x = jnp.zeros(SHAPE)
    mine, other = (
        make(use_running_average=False).init(jax.random.key(0), x) for make in (OURS, LINEN)
    )
    assert jax.tree.all(jax.tree.map(np.array_equal, mine, other))


def normalized_in_float64(x, scale, bias, groups=None):
    """With its gradients, for a weighted sum. `groups` of channels: GroupNorm."""
    with jax.enable_x64(True):
        x, scale, bias = (jnp.asarray(a, jnp.float64) for a in (x, scale, bias))
        weights = jnp.cos(jnp.arange(x.size, dtype=jnp.float64)).reshape(x.shape)

        def total(x, scale, bias):
            split, axes = x, (0, 1, 2)
            if groups:
                split, axes = x.reshape(*x.shape[:3], groups, -1), (1, 2, 4)
            mean, var = split.mean(axes, keepdims=True), split.var(axes, keepdims=True)
            unit = ((split - mean) / jnp.sqrt(var + 1e-5)).reshape(x.shape)
            y = unit * scale.reshape(1, 1, 1, -1) + bias.reshape(1, 1, 1, -1)
            return (weights * y).sum(), y

        slopes, y = jax.grad(total, (0, 1, 2), has_aux=True)(x, scale, bias)
        return np.asarray(y), [np.asarray(slope) for slope in slopes]


@pytest.mark.parametrize("ratio", [0, 100, 1_000])
@pytest.mark.parametrize("groups", [None, 2])
def test_values_and_gradients_far_from_zero(groups, ratio):
    """With the plain difference E[x^2] - E[x]^2, 1 to 3 per cent are wrong at 1,000."""
    rng = np.random.default_rng(ratio)
    x = jnp.asarray(ratio + rng.normal(size=(16, 7, 5, 8)), jnp.float32)
    scale, bias = rng.uniform(0.5, 2, (2, 8)).astype(np.float32)
    wanted, slopes = normalized_in_float64(x, scale, bias, groups)
    params = {"scale": scale, "bias": bias}
    if groups:
        module, statistics = GroupNorm(groups), {}
    else:
        module = OURS(use_running_average=False)
        statistics = {"batch_stats": {"mean": np.zeros(8), "var": np.ones(8)}}
    weights = jnp.cos(jnp.arange(x.size, dtype=jnp.float32)).reshape(x.shape)

    def total(x, params):
        y, _ = module.apply({"params": params} | statistics, x, mutable=["batch_stats"])
        return (weights * y).sum(), y

    (by_x, by_params), y = jax.jit(jax.grad(total, (0, 1), has_aux=True))(x, params)
    # What float32 keeps of x itself is 6e-8 of the mean.
    np.testing.assert_allclose(y, wanted, atol=1e-5 + 2e-7 * ratio)
    wanted_params = (by_x, slopes[0]), (by_params["scale"], slopes[1])
    for got, expected in (*wanted_params, (by_params["bias"], slopes[2])):
        scale = np.abs(expected).max()
        np.testing.assert_allclose(got, expected, atol=(1e-4 + 5e-7 * ratio) * scale)


def test_vmap_makes_the_second_pass_only_where_it_must():
    x = np.random.default_rng(0).normal(size=(3, 2, 5, 5, 4)).astype(np.float32)
    x[1] += 100
    one, zero = jnp.ones((1, 1, 1, 4)), jnp.zeros((1, 1, 1, 4))

    def total(x):
        y, mean, var = normalize(0, 1, 1e-5, jnp.float32, x, one, zero)
        return (jnp.sin(y) + mean + var).sum(), (y, mean, var)

    alone = jax.jit(jax.grad(total, has_aux=True))
    together = jax.jit(jax.vmap(alone))(x)
    for number, member in enumerate(x):
        for got, wanted in zip(
            *map(jax.tree.leaves, (together, alone(member))), strict=True
        ):
            np.testing.assert_array_equal(got[number], wanted)
    conditions = str(jax.make_jaxpr(jax.vmap(alone))(x)).count("cond[")
    assert conditions == str(jax.make_jaxpr(alone)(x[0])).count("cond[") > 0


def test_groupnorm_is_linens_also_in_forward_mode_and_second_order():
    x = create_images()[..., :4]
    params = {"scale": jnp.arange(1.0, 5), "bias": jnp.arange(4.0)}
    ours, linen = GroupNorm(2, epsilon=1e-6), nn.GroupNorm(2, epsilon=1e-6)
    created = ours.init(jax.random.key(0), x), linen.init(jax.random.key(0), x)
    assert jax.tree.all(jax.tree.map(np.array_equal, *created))

    def quantities(module):
        def total(x):
            return jnp.sin(module.apply({"params": params}, x)).sum()

        slope = jax.grad(total)
        along = jnp.cos(x)
        second = jax.jvp(slope, (x,), (along,))[1]
        backwards = jax.grad(lambda x: (slope(x) * along).sum())(x)
        return total(x), jax.jvp(total, (x,), (along,))[1], second, backwards

    both = jax.jit(lambda: (quantities(ours), quantities(linen)))()
    for got, wanted in zip(*both, strict=True):
        np.testing.assert_allclose(got, wanted, rtol=2e-4, atol=2e-4)


def test_groups_have_their_own_statistics():
    x, variables = create_images(), create_variables()
    y, updated, _ = run(OURS(use_running_average=False, group=4), x, variables)
    groups = np.float64(x).reshape(3, 4, *SHAPE[1:])
    mean, var = (f(groups, axis=(1, 2, 3)) for f in (np.mean, np.var))
    wide = (slice(None), None, None, None)
    wanted = (groups - mean[wide]) / np.sqrt(var[wide] + 1e-5)
    wanted = wanted * variables["params"]["scale"] + variables["params"]["bias"]
    np.testing.assert_allclose(y, wanted.reshape(SHAPE), rtol=1e-4, atol=1e-5)
    running, before = updated["batch_stats"], variables["batch_stats"]
    for name, now in (("mean", mean), ("var", var)):
        moved = 0.9 * before[name] + 0.1 * now.mean(axis=0)
        np.testing.assert_allclose(running[name], moved, rtol=1e-5)


def test_each_group_computes_what_it_would_alone():
    """Also its gradients: those of the parameters add up over the groups."""
    x, variables = create_images(), create_variables()
    weights = jnp.cos(jnp.arange(x.size, dtype=jnp.float32)).reshape(x.shape)

    def total(params, x, weights, group):
        module = OURS(use_running_average=False, group=group)
        y, _ = module.apply({**variables, "params": params}, x, mutable=["batch_stats"])
        return (weights * y).sum()

    gradient = jax.jit(jax.grad(total, (0, 1)), static_argnums=3)
    both = gradient(variables["params"], x, weights, 6)
    halves = [
        gradient(variables["params"], x[k], weights[k], 0) for k in (slice(6), slice(6, 12))
    ]
    by_params = jax.tree.map(jnp.add, *(params for params, _ in halves))
    by_x = jnp.concatenate([x for _, x in halves])
    for a, b in zip(jax.tree.leaves(both), jax.tree.leaves((by_params, by_x)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_groups_play_no_part_in_evaluation():
    x, variables = create_images(), create_variables()
    grouped, whole = (
        OURS(use_running_average=True, group=group).apply(variables, x[:5])
        for group in (4, 0)
    )
    np.testing.assert_array_equal(grouped, whole)


def test_statistics_of_bfloat16_are_float32():
    """Summed in bfloat16, 72 values around 2 would come to a mean wrong by per cents."""
    x, variables = create_images(jnp.bfloat16), create_variables()
    module = OURS(use_running_average=False, group=6, dtype=jnp.bfloat16)
    y, updated = module.apply(variables, x, mutable=["batch_stats"])
    assert y.dtype == jnp.bfloat16
    mean = 0.9 * variables["batch_stats"]["mean"] + 0.1 * np.float64(x).mean((0, 1, 2))
    assert updated["batch_stats"]["mean"].dtype == jnp.float32
    np.testing.assert_allclose(updated["batch_stats"]["mean"], mean, rtol=1e-6)


def test_the_gradient_of_bfloat16_is_rounded_once():
    """Two roundings would add up over a channel if the cotangent's mean is not zero."""
    rng = np.random.default_rng(0)
    x, cotangent = (
        jnp.asarray(rng.normal(size=(64, 8, 8, 16)) + offset, jnp.bfloat16)
        for offset in (0, 10)
    )
    scale, bias = jnp.ones((2, 1, 1, 1, 16))

    def gradient(x, dtype):
        def total(x):
            y = normalize(0, 1, 1e-5, dtype, x, scale, bias)[0]
            return (y.astype(jnp.float32) * cotangent.astype(jnp.float32)).sum()

        return np.float64(jax.jit(jax.grad(total))(x))

    got = gradient(x, jnp.bfloat16)
    wanted = gradient(x.astype(jnp.float32), jnp.float32)
    assert np.linalg.norm(got - wanted) < 2e-3 * np.linalg.norm(wanted)
    assert np.abs(got.mean((0, 1, 2))).max() < 3e-4


def test_an_empty_batch_is_normalised():
    params = {"scale": jnp.ones(4), "bias": jnp.zeros(4)}
    assert GroupNorm(2).apply({"params": params}, jnp.zeros((0, 2, 2, 4))).shape[0] == 0


@pytest.mark.parametrize("group", [5, -4, 24])
def test_a_group_that_does_not_divide_the_batch_is_refused(group):
    module = OURS(use_running_average=False, group=group)
    message = f"is {group}, which does not divide the batch of 12; choose a divisor"
    with pytest.raises(UserError, match=message):
        module.init(jax.random.key(0), create_images())

"""ODE-nets: published counts, what their fields do, and the numbers of their solvers."""

from functools import partial

import jax
import numpy as np
import pytest
from jax import numpy as jnp

from cvjax.errors import DivergedError, UserError
from cvjax.models import create_model
from cvjax.models.odenet_layers import Residual, groups_of
from cvjax.nn import solver as solvers
from cvjax.training import metrics
from cvjax.training.state import create_variables

MNIST, CIFAR, SMALL = (28, 28, 1), (32, 32, 3), (6, 6, 1)
BLOCKS = {"conv": 132_874, "res": 157_578}  # without a block in the middle
# f of 64 features, and with t: 3x3 convolutions see 65, have biases; a third norm.
PLAIN_F = 2 * 128 + 2 * 9 * 64 * 64
TIMED_F = 3 * 128 + 2 * (9 * 65 * 64 + 64)


def shapes(name, image_shape=MNIST, **fields):
    model = create_model(name, 10, **fields)
    init = partial(model.init, train=False)
    return jax.eval_shape(init, jax.random.key(0), jnp.zeros((1, *image_shape)))["params"]


def count(params):
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def small(name="odenet", **fields):
    return create_model(name, 3, **{"width": 4, "stem": "none", **fields})


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(0).normal(size=(4, *SMALL)).astype(np.float32)


def init(model, images):
    drawn = create_variables(jax.random.key(0), model=model, image_shape=images.shape[1:])
    return {"params": drawn["params"]}


# Counts


@pytest.mark.parametrize("stem", BLOCKS)
def test_published_counts(stem):
    bare = BLOCKS[stem]
    assert count(shapes("odenet_discrete", stem=stem, length=0)) == bare
    assert count(shapes("odenet_discrete", stem=stem, length=1)) == bare + PLAIN_F
    assert count(shapes("odenet_discrete", stem=stem)) == bare + 6 * PLAIN_F
    assert count(shapes("odenet_discrete", stem=stem, body="tied")) == bare + TIMED_F
    for solver in ("euler", "dopri5"):
        assert count(shapes("odenet", stem=stem, solver=solver)) == bare + TIMED_F
    golden = {"conv": (208_266, 576_778, 206_858), "res": (232_970, 601_482, 231_562)}
    assert golden[stem] == (bare + TIMED_F, bare + 6 * PLAIN_F, bare + PLAIN_F)


@pytest.mark.parametrize(
    ("fields", "more"),
    [
        ({"theta": "piecewise_constant", "pieces": 4}, 3 * TIMED_F),
        ({"theta": "piecewise_linear", "pieces": 4}, 4 * TIMED_F),
        ({"norm": "none"}, -3 * 128 - 2 * 128 - 128),  # of f, stem and head
        ({"activation": "softplus", "zero_init": True}, 0),
        # Five channels more: for f, for its norms, and for the head and its norm.
        ({"augment": 5}, 3 * 10 + 2 * (9 * (70 * 69 - 65 * 64) + 5) + 10 + 50),
    ],
)
def test_counts_of_variants(fields, more):
    assert count(shapes("odenet", **fields)) == 208_266 + more


def test_stages_double_the_features():
    params = shapes("odenet", CIFAR, width=16, stem="none", stages=3)
    for stage, features in ((1, 16), (2, 32), (3, 64)):
        kernel = params[f"ode{stage}"]["f"]["conv1"]["kernel"]
        assert kernel.shape == (1, 3, 3, features + 1, features)
    assert params["head"]["dense"]["kernel"].shape == (64, 10)


@pytest.mark.parametrize(
    ("features", "groups"),
    [(64, 32), (128, 32), (16, 8), (69, 1), (70, 1), (2, 1), (24, 4)],
)
def test_groups(features, groups):
    assert groups_of(features) == groups
    assert features % groups == 0


# What it computes


def test_time_reaches_both_convolutions_behind_the_norm(images):
    """The time channel is the last input of each kernel; without it t changes nothing."""
    model = small(solver="euler", steps=2)
    variables = init(model, images)

    def without_time(path, leaf):
        if path[-1].key == "kernel" and leaf.ndim == 5:
            return leaf.at[:, :, :, -1].set(0)
        return leaf

    def difference(variables):
        f = variables["params"]["ode"]["f"]
        field = jax.tree.map(lambda leaf: leaf[0], f)
        residual = Residual("group", "relu", parent=None)
        x = np.random.default_rng(1).normal(size=(2, 5, 5, 4)).astype(np.float32)
        early, late = (residual.apply({"params": field}, x, t) for t in (0.0, 1.0))
        return np.abs(early - late).max()

    blind = jax.tree_util.tree_map_with_path(without_time, variables)
    assert difference(variables) > 1e-2 and difference(blind) == 0


@pytest.mark.parametrize(
    "fields",
    [
        {"solver": "heun", "steps": 1, "activation": "softplus"},
        pytest.param({"solver": "dopri5", "steps": 0}, marks=pytest.mark.slow),
    ],
)
def test_every_parameter_has_a_gradient(fields, images):
    labels = np.array([0, 1, 2, 0])
    model = small(**fields)
    variables = init(model, images)

    def loss(params):
        logits = model.apply({"params": params}, images, train=True)
        return -jax.nn.log_softmax(logits)[np.arange(4), labels].sum()

    gradients = jax.jit(jax.grad(loss))(variables["params"])
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradients):
        assert np.abs(leaf).max() > 1e-7, jax.tree_util.keystr(path)


def test_zero_init_starts_as_the_net_without_a_block(images):
    for fields in ({}, {"norm": "none"}):
        model = small(zero_init=True, steps=2, **fields)
        variables = init(model, images)
        bare = {k: v for k, v in variables["params"].items() if k != "ode"}
        without = small("odenet_discrete", length=0, **fields)
        np.testing.assert_allclose(
            model.apply(variables, images, train=False),
            without.apply({"params": bare}, images, train=False),
            rtol=1e-6,
        )
        drawn = small(steps=2, **fields)
        moves = drawn.apply(init(drawn, images), images, train=False)
        assert np.abs(moves - model.apply(variables, images, train=False)).max() > 1e-3


def test_euler_net_is_the_tied_net(images):
    model = small(solver="euler", steps=3)
    variables = init(model, images)
    tied = dict(variables["params"])
    f = tied.pop("ode")["f"]
    tied["stage"] = {"f": jax.tree.map(lambda leaf: leaf[0], f)}
    np.testing.assert_allclose(
        model.apply(variables, images, train=False),
        small("odenet_discrete", body="tied", length=3).apply(
            {"params": tied}, images, train=False
        ),
        rtol=1e-5,
        atol=1e-5,
    )


def test_blocks_with_a_step_size_by_hand(images):
    """x + h f(x): f of one block is what it adds with h = 1."""
    whole, half = (small("odenet_discrete", length=1, step_size=h) for h in (1.0, 0.5))
    variables = init(whole, images)

    def stage(model):
        keep = {"mutable": ["intermediates"], "capture_intermediates": True}
        _, kept = model.apply(variables, images, train=False, **keep)
        kept = kept["intermediates"]
        return kept["stem"]["__call__"][0], kept["stage"]["__call__"][0]

    (x, end), (_, middle) = stage(whole), stage(half)
    assert np.abs(end - x).max() > 0.1
    np.testing.assert_allclose(middle, (x + end) / 2, rtol=1e-5, atol=1e-5)


def test_smooth_initial_weights_of_a_net(images):
    model = small("odenet_discrete", length=4, depth_init="smooth")
    params = init(model, images)["params"]["stage"]["blocks"]["f"]
    kernel = np.asarray(params["conv1"]["kernel"])
    # On a circle the second difference of equidistant points is along the middle one.
    step = np.pi / 8
    np.testing.assert_allclose(
        kernel[0] + kernel[2], 2 * np.cos(step) * kernel[1], rtol=1e-4, atol=1e-6
    )
    scale = np.asarray(params["norm1"]["group_norm"]["scale"])
    np.testing.assert_array_equal(scale, np.ones_like(scale))


# Half precision


def operands(jaxpr, primitive):
    """The operands of a primitive, wherever it is."""
    found = []
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == primitive:
            found += [operand.aval for operand in eqn.invars]
        for value in eqn.params.values():
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                found += operands(inner, primitive)
    return found


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("odenet", {"stem": "res", "stages": 2}),
        ("odenet", {"stem": "conv", "norm": "none", "theta": "piecewise_linear"}),
        ("odenet_discrete", {"stem": "none"}),
        ("odenet_discrete", {"stem": "none", "norm": "none", "body": "tied"}),
    ],
)
def test_half_precision_is_of_convolutions_only(name, fields):
    half = small(name, dtype="bfloat16", width=2, **fields)
    x = jax.ShapeDtypeStruct((2, *MNIST), jnp.float32)
    variables = jax.eval_shape(partial(half.init, train=False), jax.random.key(0), x)
    types = {leaf.dtype for leaf in jax.tree.leaves(variables["params"])}
    assert types == {np.dtype(np.float32)}

    def train(params, x):
        return half.apply({"params": params}, x, train=True, mutable=["solver"])[0]

    traced, logits = jax.make_jaxpr(train, return_shape=True)(variables["params"], x)
    assert logits.dtype == jnp.float32
    convolved = operands(traced.jaxpr, "convolution")
    assert convolved and all(operand.dtype == jnp.bfloat16 for operand in convolved)
    # ReLU takes what lies between layers, and steps are multiplied by slopes.
    for primitive in ("max", "mul", "rsqrt", "dot_general"):
        others = operands(traced.jaxpr, primitive)
        assert not any(operand.dtype == jnp.bfloat16 for operand in others), primitive


def test_half_precision_is_close(images):
    full, half = small(steps=2), small(steps=2, dtype="bfloat16")
    variables = init(full, images)
    wanted, got = (
        jax.jit(partial(net.apply, train=False))(variables, images) for net in (full, half)
    )
    error = np.abs(wanted - got).max()
    assert 0 < error < 0.03 * np.abs(wanted).max()


# The solvers' numbers in training and evaluation


def test_evaluations_are_told_by_block_and_in_all(images):
    model = small(stages=2, solver="heun", steps=3)
    variables = init(model, images)
    _, sown = model.apply(variables, images, train=False, mutable=["solver"])
    mask = jnp.array([True, True, False, True])
    sums = metrics.sum_batch(
        jnp.ones(4), jnp.zeros((4, 3)), jnp.zeros(4, int), mask, sown["solver"]
    )
    values = metrics.means([sums], 3, "val", 3)
    assert values["val/nfe"] == 12
    assert values["val/nfe_ode1"] == values["val/nfe_max_ode2"] == 6
    assert values["val/rejected"] == 0


def stats(evaluations, results, steps=(3, 4)):
    zeros = jnp.zeros(2, jnp.int32)
    evaluations, steps, results = map(jnp.asarray, (evaluations, steps, results))
    return solvers.Stats(evaluations, steps, zeros, results)


def sum_two(mask=(True, True), **blocks):
    sown = {name: {"stats": own} for name, own in blocks.items()}
    return metrics.sum_batch(
        jnp.ones(2), jnp.zeros((2, 3)), jnp.zeros(2, int), jnp.asarray(mask), sown
    )


def test_sums_over_images_with_steps_of_their_own():
    first = sum_two(ode1=stats([10, 20], [0, 0]), ode2=stats([1, 2], [0, 0]))
    second = sum_two(ode1=stats([40, 7], [0, 0]), ode2=stats([2, 99], [0, 0]))
    values = metrics.means([first, second], 3, "val", 4)
    assert values["val/nfe"] == (11 + 22 + 42 + 106) / 4
    assert values["val/nfe_ode1"] == 77 / 4
    assert (values["val/nfe_max_ode1"], values["val/nfe_max_ode2"]) == (40, 99)
    both = metrics.add(first, second)
    assert float(both.solves["ode2"].most) == 99
    assert float(both.solves["ode2"].evaluations) == 104
    empty = metrics.zero_sums(("ode1", "ode2"))
    assert jax.tree.map(float, metrics.add(empty, both)) == jax.tree.map(float, both)


def test_the_first_failure_is_kept_and_padding_cannot_fail():
    good = sum_two(ode=stats([1, 1], [0, 0]))
    bad = sum_two(ode=stats([1, 1], [0, solvers.MAX_STEPS], steps=(3, 256)))
    worse = sum_two(ode=stats([1, 1], [solvers.UNDERFLOW, 0]))
    padding = sum_two((True, False), ode=stats([1, 1], [0, solvers.NOT_FINITE]))
    assert metrics.first_failure([good, padding]) is None
    kept = metrics.add(metrics.add(metrics.add(good, bad), worse), good)
    block, solves = metrics.first_failure([jax.device_get(kept)])
    assert (block, int(solves.failure)) == ("ode", solvers.MAX_STEPS)
    assert int(solves.failed_steps) == 256


def test_the_first_failure_in_time_is_told_whatever_its_block_is_called():
    fine, failed = stats([1, 1], [0, 0]), stats([1, 1], [solvers.MAX_STEPS, 0])
    first = sum_two(ode1=fine, ode2=failed)
    later = sum_two(ode1=stats([1, 1], [solvers.NOT_FINITE, 0]), ode2=failed)
    block, solves = metrics.first_failure([jax.device_get(metrics.add(first, later))])
    assert (block, int(solves.failure)) == ("ode2", solvers.MAX_STEPS)


@pytest.mark.parametrize(
    ("failure", "fields", "what"),
    [
        (
            solvers.MAX_STEPS,
            {"solver": "dopri5", "steps": 0},
            r"The solver of ode2 did not reach the end of its time in max_steps 256 \(200 "
            r"steps accepted, 56 rejected; dopri5, rtol 0.001, atol 0.001\); raise",
        ),
        (solvers.UNDERFLOW, {"solver": "tsit5", "steps": 0}, "steps too short .*; loosen"),
        (
            solvers.NOT_FINITE,
            {},
            "not finite .*8 fixed steps of heun.*lower optim.learning",
        ),
    ],
)
def test_failures_are_described_with_advice(failure, fields, what):
    zero = jnp.zeros(())
    solves = metrics.Solves(zero, zero, zero, zero, failure, 256, 56)
    text = metrics.describe_failure(small(**fields), "ode2", solves)
    with pytest.raises(DivergedError, match=what):
        raise DivergedError(text)


# Refusals


@pytest.mark.parametrize(
    ("name", "fields", "sentence"),
    [
        ("odenet", {"norm": "batch"}, "norm 'batch' does not go with an ODE.* use 'group'"),
        ("odenet", {"norm": "layer"}, "norm must be one of group, none, got 'layer'"),
        ("odenet", {"stem": "big"}, "stem must be one of conv, res, none, got 'big'"),
        ("odenet", {"solver": "dopri"}, "solver must be one of .*; did you mean 'dopri5'"),
        ("odenet", {"solver": "euler", "steps": 0}, "euler estimates no error"),
        ("odenet", {"augment": -1}, "augment must be 0 or more, got -1"),
        ("odenet", {"stages": 0}, "stages must be 1 or more, got 0"),
        ("odenet", {"pieces": 2}, "pieces must be 1 or more, and 1 for theta 'constant'"),
        ("odenet", {"activation": "selu"}, "activation must be one of relu, softplus"),
        ("odenet", {"dtype": "bfloat16", "steps": 0, "solver": "dopri5"}, "adaptive steps"),
        ("odenet_discrete", {"length": -1}, "length must be 0 or more, got -1"),
        ("odenet_discrete", {"body": "ode"}, "body must be one of blocks, tied, got 'ode'"),
        ("odenet_discrete", {"step_size": 0.0}, "step_size must be above 0, got 0"),
        ("odenet_discrete", {"depth_init": "flat"}, "must be one of independent, smooth"),
        ("odenet_discrete", {"body": "tied", "step_size": 0.5}, "step_size 0.5 and .*tied"),
        ("odenet_discrete", {"body": "tied", "depth_init": "smooth"}, "are for body 'bl"),
    ],
)
def test_impossible_nets(name, fields, sentence):
    with pytest.raises(UserError, match=sentence):
        create_model(name, 10, **fields)

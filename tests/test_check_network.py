"""Refused before anything is allocated: what cannot fit, and BatchNorm over one value."""

import jax
import numpy as np
import pytest
from jax import numpy as jnp

from cvjax.errors import UserError
from cvjax.training import default_config, memory
from cvjax.training.check_network import check_network
from cvjax.training.config import parse_config
from cvjax.training.recipe import create_recipe


def check(model, image_shape=(8, 8, 1), **settings):
    config = default_config(model)
    config.update_from_flattened_dict(settings)
    run = parse_config(config)
    check_network(run, create_recipe(run, 10), image_shape)


@pytest.mark.parametrize(
    "settings",
    [
        {"model.width": 60_000},
        {"data.batch_size": 2**30, "model.width": 4},
        {"data.eval_batch_size": 2**31 - 1},
    ],
)
def test_what_cannot_fit(settings):
    with pytest.raises(UserError, match=r"needs [\d,.]+ GB of memory at least"):
        check("resnet_cifar", **settings)


def test_usual_networks_fit():
    check("resnet_cifar")
    check("mlp")


@pytest.mark.parametrize("settings", [{"data.batch_size": 1}, {"model.norm_group": 1}])
def test_batch_norm_over_single_values(settings):
    with pytest.raises(UserError, match=r"BatchNorm \S+ would see single values"):
        check("resnet_cifar", (2, 2, 1), **settings)


def test_batch_of_one_on_larger_maps():
    check("resnet_cifar", **{"data.batch_size": 1})


def test_largest_array():
    def function(x):
        def body(carry, _):
            return carry, (jnp.outer(carry, carry)).sum()

        return jax.lax.scan(body, x, None, length=3)

    x = jax.ShapeDtypeStruct((100,), np.float32)
    assert memory.largest_array(function, x) == 100 * 100 * 4
    assert memory.tree_bytes({"a": x, "b": x}) == 800

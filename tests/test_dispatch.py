"""How many updates a call of the device makes, and that many are what single ones are."""

import jax
import numpy as np
import pytest

from cvjax.training import default_config, dispatch, train_and_evaluate
from cvjax.training.trained_network import load_network


@pytest.mark.parametrize(
    ("platform", "asked", "image_bytes", "wanted"),
    [
        ("cpu", 0, 10, 1),
        ("cpu", 7, 10, 7),
        ("gpu", 0, dispatch.LARGEST_BYTES, dispatch.LONGEST),
        ("gpu", 0, dispatch.LARGEST_BYTES + 1, 1),
        ("tpu", 1, 10, 1),
    ],
)
def test_the_platform_decides_unless_asked(
    platform, asked, image_bytes, wanted, monkeypatch
):
    monkeypatch.setattr(jax, "default_backend", lambda: platform)
    assert dispatch.steps_per_dispatch(asked, image_bytes) == wanted


@pytest.mark.slow
def test_a_convolutional_net_learns_the_same_in_calls_of_many_updates(tmp_path):
    """Equal but for rounding: XLA computes convolutions otherwise within a loop."""
    nets = []
    for at_once in (1, 4):
        config = default_config("resnet_cifar")
        config.model.update({"depth": 8, "width": 2})
        config.update({"total_steps": 8, "steps_per_dispatch": at_once})
        config.optim.learning_rate = 0.02
        config.data.update({"batch_size": 64, "crop_padding": 1})
        train_and_evaluate(config, tmp_path / str(at_once))
        nets.append(load_network(tmp_path / str(at_once)).variables)
    for one, many in zip(*map(jax.tree.leaves, nets), strict=True):
        np.testing.assert_allclose(one, many, rtol=1e-4, atol=1e-5)

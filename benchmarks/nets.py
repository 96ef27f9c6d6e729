"""The networks that are measured, and one training step of them in cvjax."""

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from flax import linen as nn
from jax.sharding import Mesh

from cvjax.checks import check_choice
from cvjax.data.augment import Augmentation
from cvjax.data.dataset import Batch
from cvjax.data.normalize import compute_statistics
from cvjax.models import create_model
from cvjax.training import devices, steps
from cvjax.training.compilation import compile_step
from cvjax.training.losses import LossConfig
from cvjax.training.optim import OptimConfig
from cvjax.training.recipe import Recipe
from cvjax.training.state import create_train_state


@dataclasses.dataclass(frozen=True)
class Net:
    """A network and the images that it is measured on.

    Attributes:
      model, fields: arguments of `create_model`.
      image_size: height and width, in pixels.
      num_classes: size of the logits.
    """

    model: str
    fields: dict[str, Any]
    image_size: int = 32
    num_classes: int = 10

    def create(self, **fields: Any) -> nn.Module:
        """The module, with other fields besides."""
        return create_model(self.model, self.num_classes, **self.fields, **fields)


SMALL_VGG = {"batch_norm": True, "head": "small", "dropout": 0.0}
NETS = {
    "ResNet-14, 8 px": Net("resnet_cifar", {"depth": 14, "width": 8}, 8),
    "ResNet-20": Net("resnet_cifar", {"depth": 20}),
    "ResNet-56": Net("resnet_cifar", {"depth": 56}),
    "ResNet-110": Net("resnet_cifar", {"depth": 110}),
    "VGG-16-BN": Net("vgg", {"depth": 16, **SMALL_VGG}),
    "ResNet-18": Net("resnet", {"depth": 18, "stem": "small"}),
    "ResNet-50": Net("resnet", {"depth": 50}, 224, 1000),
}


def choose(names: list[str]) -> dict[str, Net]:
    """The networks of those names.

    Raises:
      UserError: there is no such network.
    """
    for name in names:
        check_choice("--net", name, tuple(NETS))
    return {name: NETS[name] for name in names}


def random_batch(net: Net, batch_size: int) -> Batch:
    """Images and labels at random, the same ones each time."""
    rng = np.random.default_rng(0)
    shape = (batch_size, net.image_size, net.image_size, 3)
    images = rng.integers(256, size=shape, dtype=np.uint8)
    labels = rng.integers(net.num_classes, size=batch_size, dtype=np.int32)
    return {"image": images, "label": labels}


def create_recipe(model: nn.Module) -> Recipe:
    """He et al.'s: SGD with momentum and weight decay, pad by 4, crop, flip."""
    return Recipe(
        model=model,
        # All parameters decay, as PyTorch's SGD has it.
        optim=OptimConfig(decayed="all", schedule="constant"),
        total_steps=1_000,
        loss=LossConfig(),
        augmentation=Augmentation(crop_padding=4, flip=True),
    )


def lower_step(model: nn.Module, batch: Batch):
    """`cvjax.training.steps.train_step` of a network, traced; no array is made.

    Returns:
      What has a method `compile`; and a function that makes the step's state and constants.
    """
    recipe, key = create_recipe(model), jax.random.key(0)
    static = {"recipe": recipe, "image_shape": batch["image"].shape[1:]}
    constants = steps.Constants(key, compute_statistics(batch["image"], "pixel_mean"))
    state = create_train_state.eval_shape(key, **static)
    lowered = steps.train_step.lower(state, batch, constants, recipe=recipe)
    return lowered, lambda: (create_train_state(key, **static), constants)


def create_step(
    model: nn.Module, batch: Batch, mesh: Mesh | None = None
) -> tuple[Callable[[Batch], None], float]:
    """A training step that waits for its update, and the seconds of compilation.

    With a mesh its devices share each batch.
    """
    lowered, create = lower_step(model, batch)
    state, constants = create()
    if mesh is not None:
        state, constants = devices.replicate((state, constants), mesh)
        lowered = steps.train_step.lower(
            state, devices.divide(batch, mesh), constants, recipe=create_recipe(model)
        )
    start = time.perf_counter()
    compiled = compile_step(lowered)
    seconds = time.perf_counter() - start

    def step(batch):
        nonlocal state
        batch = batch if mesh is None else devices.divide(batch, mesh)
        state = jax.block_until_ready(compiled(state, batch, constants))

    return step, seconds

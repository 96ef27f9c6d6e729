"""What a run's functions are compiled for."""

import dataclasses

from flax import linen as nn

from cvjax.data.augment import Augmentation
from cvjax.models import create_model
from cvjax.tasks import TASKS, classification
from cvjax.tasks.task import Task
from cvjax.training.losses import LossConfig
from cvjax.training.optim import OptimConfig
from cvjax.training.settings import RunConfig


@dataclasses.dataclass(frozen=True)
class Recipe:
    """The choices of a run that are fixed at compile time; equal recipes share programs.

    Attributes:
      model: the network.
      optim: how it is updated.
      total_steps: the length that the learning-rate schedule refers to.
      loss: what is minimised.
      augmentation: of the training images.
      task: what targets, losses and metrics are.
    """

    model: nn.Module
    optim: OptimConfig
    total_steps: int
    loss: LossConfig
    augmentation: Augmentation
    task: Task = classification.TASK


def create_recipe(run: RunConfig, num_classes: int) -> Recipe:
    """The recipe of a run on data of so many classes."""
    return Recipe(
        model=create_model(num_classes=num_classes, **run.model),
        optim=run.optim,
        total_steps=run.total_steps,
        loss=run.loss,
        augmentation=run.data.augmentation,
        task=TASKS[run.task],
    )

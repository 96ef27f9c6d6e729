"""A trained network, read back from the folder of its run.

Nothing is changed and no lock is taken here: the run may be going on.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from flax import linen as nn

from cvjax.data.normalize import Statistics
from cvjax.errors import DivergedError, UserError
from cvjax.files import Path, is_pretrained, user_path
from cvjax.models import model_fields
from cvjax.storage import checkpoint as checkpoints
from cvjax.storage import pretrained
from cvjax.storage import workdir as workdirs
from cvjax.storage.inputs import read_inputs
from cvjax.training import metrics
from cvjax.training.config import complete_config, parse_config
from cvjax.training.recipe import Recipe, create_recipe
from cvjax.training.settings import RunConfig
from cvjax.training.state import create_variables, initial_rng

CHOICES = ("last", "best")
DIGITS = 18  # of the number of a step, at most


@dataclasses.dataclass(frozen=True)
class Network:
    """A trained network and what is needed to use it.

    Attributes:
      run: the config that it was trained with.
      recipe: the model and the loss are in it.
      variables: "params" and "batch_stats".
      statistics: of the training images.
      class_names: one per class.
      step: the number of updates that it has seen.
      data_fingerprint: of the data set.
    """

    run: RunConfig
    recipe: Recipe
    variables: dict[str, Any]
    statistics: Statistics
    class_names: tuple[str, ...]
    step: int
    data_fingerprint: str

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(height, width, channels)."""
        return self.statistics.mean.shape


def load_network(
    workdir: Path,
    checkpoint: str = "last",
    fields: Mapping[str, Any] | None = None,
) -> Network:
    """Reads the network of a run, finished or going on, or one that comes with cvjax.

    Args:
      workdir: the run's folder, or "pretrained:NAME" (see `storage.pretrained`), which has
        one checkpoint.
      checkpoint: "last", "best" (on validation) or the number of a step.
      fields: of the model, to use its parameters with other ones than it was trained with,
        such as another solver for an ODE-net.

    Raises:
      UserError: the folder has no run, no such checkpoint, or one whose parameters do not
        fit these fields.
    """
    number = checkpoint.isdecimal() and len(checkpoint) <= DIGITS
    if checkpoint not in CHOICES and not number:
        raise UserError(
            "--checkpoint takes last, best or the number of a step, got "
            f"{checkpoint[:40]!r}."
        )
    if is_pretrained(workdir):
        if checkpoint != "last":
            raise UserError(
                f"{workdir} has one checkpoint, got --checkpoint={checkpoint}; leave it "
                "out."
            )
        found = pretrained.read(str(workdir))
        about = len(found.class_names), found.statistics.mean.shape
        run, recipe = _with_fields(found.config, fields, *about)
        own = {"run": run, "recipe": recipe}
        kept = ("variables", "statistics", "class_names", "step", "data_fingerprint")
        return Network(**own, **{name: getattr(found, name) for name in kept})
    folder = user_path(workdir, "--workdir")
    config = workdirs.read_manifest(folder)["config"]
    statistics, class_names = read_inputs(folder)
    image_shape = statistics.mean.shape
    run, recipe = _with_fields(config, fields, len(class_names), image_shape)
    variables, info = _restore(folder, checkpoint, _abstract(recipe, image_shape))
    return Network(
        run=run,
        recipe=recipe,
        variables=variables,
        statistics=statistics,
        class_names=class_names,
        step=info["step"],
        data_fingerprint=info["data_fingerprint"],
    )


def _with_fields(
    config: dict[str, Any],
    fields: Mapping[str, Any] | None,
    num_classes: int,
    image_shape: tuple[int, ...],
) -> tuple[RunConfig, Recipe]:
    """The run of a config and its recipe, with fields of the model changed."""
    run = parse_config(complete_config(config))
    recipe = create_recipe(run, num_classes)
    if not fields:
        return run, recipe
    for field in {"name", "num_classes"} & set(fields):
        raise UserError(
            f"{field} is no field that can be changed, only "
            f"{', '.join(model_fields(run.model['name']))}."
        )
    trained, run = recipe, dataclasses.replace(run, model=run.model | dict(fields))
    recipe = create_recipe(run, num_classes)
    if _abstract(recipe, image_shape) != _abstract(trained, image_shape):
        changed = ", ".join(f"{name}={value}" for name, value in fields.items())
        raise UserError(
            f"with {changed} the network has other parameters than the trained one; name "
            "fields that leave them as they are, such as the solver of an ODE-net."
        )
    return run, recipe


def _abstract(recipe: Recipe, image_shape: tuple[int, ...]) -> dict[str, Any]:
    """Shapes and types of the variables."""
    return create_variables.eval_shape(
        jax.random.key(0), model=recipe.model, image_shape=image_shape
    )


def draw_variables(network: Network) -> dict[str, Any]:
    """The variables before the first step of a run without `init_from`."""
    return create_variables(
        initial_rng(network.run.seed),
        model=network.recipe.model,
        image_shape=network.image_shape,
    )


@functools.partial(jax.jit, static_argnames="model")
def apply_model(variables: Any, images: jax.Array, *, model: nn.Module) -> jax.Array:
    """Normalised images -> logits [batch, classes], in evaluation mode.

    NaN for images for which the solver of an ODE block failed.
    """
    logits, sown = model.apply(variables, images, train=False, mutable=["solver"])
    return metrics.mark_failed(logits, sown.get("solver"))


def probabilities(logits: np.ndarray, loss_name: str) -> np.ndarray:
    """Logits -> float64 of the same shape: what the loss took them for.

    A softmax over the classes, or one sigmoid per class (which do not add up to one).
    Float64, as in float32 a confident network's less probable classes would all be zero.

    Raises:
      DivergedError: for logits that are not finite.
    """
    logits = np.asarray(logits, np.float64)
    broken = int((~np.isfinite(logits)).any(axis=-1).sum())
    if broken:
        raise DivergedError(
            f"The network gives no finite answer for {broken} of {logits[..., 0].size} "
            "images; if it has ODE blocks with adaptive steps, these may be too many: "
            "evaluate it with --fields=max_steps=1000, or with looser tolerances."
        )
    if loss_name == "sigmoid":
        return np.exp(-np.logaddexp(0, -logits))
    powers = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return powers / powers.sum(axis=-1, keepdims=True)


def _restore(
    folder: pathlib.Path, choice: str, abstract_variables: dict[str, Any]
) -> tuple[dict[str, Any], dict]:
    while True:
        steps = checkpoints.list_steps(folder)
        try:
            return _restore_once(folder, choice, abstract_variables)
        except UserError:
            # The run may have replaced the checkpoint while it was read.
            if checkpoints.list_steps(folder) == steps:
                raise


def _restore_once(
    folder: pathlib.Path, choice: str, abstract_variables: dict[str, Any]
) -> tuple[dict[str, Any], dict]:
    if choice.isdecimal():
        return checkpoints.restore_step(folder, int(choice), abstract_variables)
    info = checkpoints.read_latest_info(folder) if choice == "best" else None
    if info is not None:
        if info["best"] is None:
            raise UserError(
                f"{folder} has no best checkpoint yet, as nothing has been evaluated at "
                f"step {info['step']}; take --checkpoint=last."
            )
        return checkpoints.restore_step(folder, info["best"]["step"], abstract_variables)
    restored = checkpoints.restore_latest(folder, abstract_variables, set_aside=False)
    if restored is None:
        raise UserError(
            f"{folder} has no checkpoint yet; wait until the run has written its first one."
        )
    return restored

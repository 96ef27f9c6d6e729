"""Checks of a network together with its data, on shapes alone, before it is made."""

import functools

import jax
import numpy as np
from flax import linen as nn

from cvjax.errors import UserError
from cvjax.nn.norm import BatchNorm
from cvjax.nn.temporal_norm import TemporalBatchNorm
from cvjax.training import memory
from cvjax.training.recipe import Recipe
from cvjax.training.settings import RunConfig
from cvjax.training.state import create_train_state


def check_network(run: RunConfig, recipe: Recipe, image_shape: tuple[int, ...]) -> None:
    """Refuses networks that cannot fit into memory, or whose BatchNorm has nothing to do.

    Raises:
      UserError: says which.
    """
    what = f"training {run.model['name']} in batches of {run.data.batch_size}"
    state, largest = _sizes(recipe, run.data.batch_size, image_shape)
    memory.check_fits(state, what, "a narrower or shallower network")
    share = jax.device_count()
    advice = "a smaller network or data.batch_size"
    memory.check_fits(state + largest // share, what, advice)
    images = 4 * run.data.eval_batch_size * int(np.prod(image_shape))
    what = f"evaluating in batches of {run.data.eval_batch_size}"
    memory.check_fits(images // share, what, "a smaller data.eval_batch_size")


# Tracing takes a second for large networks, and experiments train the same one often.
@functools.lru_cache(maxsize=16)
def _sizes(
    recipe: Recipe, batch_size: int, image_shape: tuple[int, ...]
) -> tuple[int, int]:
    """Bytes of state and gradient, and of the largest array between images and logits.

    Raises:
      UserError: a BatchNorm sees single values.
    """
    state = create_train_state.eval_shape(
        jax.random.key(0), recipe=recipe, image_shape=image_shape
    )
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    images = jax.ShapeDtypeStruct((batch_size, *image_shape), np.float32)

    def apply(variables, images):
        return recipe.model.apply(
            variables,
            images,
            train=True,
            mutable=["batch_stats", "solver"],
            rngs={"dropout": jax.random.key(0)},
        )

    with nn.intercept_methods(_refuse_single_values):
        largest = memory.largest_array(apply, variables, images)
    return memory.tree_bytes(state) + memory.tree_bytes(state.params), largest


def _refuse_single_values(call, arguments, keywords, context):
    """Of a single value mean and variance say nothing: what comes out is always zero."""
    module = context.module
    norms = (BatchNorm, TemporalBatchNorm)
    if isinstance(module, norms) and context.method_name == "__call__":
        x = arguments[0]
        examples = getattr(module, "group", 0) or len(x)
        count = examples * int(np.prod(x.shape[1:-1]))
        if count == 1 and not module.use_running_average:
            name = f"{type(module).__name__} {'/'.join(module.path)}"
            other = " or model.norm_group" if isinstance(module, BatchNorm) else ""
            raise UserError(
                f"{name} would see single values (a batch "
                f"or group of 1, on maps of {'x'.join(map(str, x.shape[1:-1])) or '1'}), "
                f"and give zero; choose a larger data.batch_size{other}, or larger images."
            )
    return call(*arguments, **keywords)

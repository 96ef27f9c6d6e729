"""Checks of a network together with its data, on shapes alone, before it is made."""

import jax
import numpy as np
from flax import linen as nn

from cvjax.errors import UserError
from cvjax.nn.norm import BatchNorm
from cvjax.training import memory
from cvjax.training.config import RunConfig
from cvjax.training.recipe import Recipe
from cvjax.training.state import create_train_state


def check_network(run: RunConfig, recipe: Recipe, image_shape: tuple[int, ...]) -> None:
    """Refuses networks that cannot fit into memory, or whose BatchNorm has nothing to do.

    Raises:
      UserError: says which.
    """
    state = create_train_state.eval_shape(
        jax.random.key(0), recipe=recipe, image_shape=image_shape
    )
    # State and gradient live side by side.
    held = memory.tree_bytes(state) + memory.tree_bytes(state.params)
    name = f"training {run.model['name']} in batches of {run.data.batch_size}"
    memory.check_fits(held, name, "a narrower or shallower network")
    variables = {"params": state.params, "batch_stats": state.batch_stats}

    def apply(train: bool):
        def function(variables, images, rng):
            return recipe.model.apply(
                variables,
                images,
                train=train,
                mutable=["batch_stats", "solver", "kinetic"],
                rngs={"dropout": rng},
            )

        return function

    def images(count: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((count, *image_shape), np.float32)

    rng = jax.eval_shape(lambda: jax.random.key(0))
    with nn.intercept_methods(_refuse_single_values):
        largest = memory.largest_array(
            apply(True), variables, images(run.data.batch_size), rng
        )
    held += largest // jax.device_count()
    memory.check_fits(held, name, "a smaller network or data.batch_size")
    evaluated = images(run.data.eval_batch_size)
    held = memory.tree_bytes(state) + memory.tree_bytes(evaluated) // jax.device_count()
    memory.check_fits(held, "evaluating", "a smaller data.eval_batch_size")


def _refuse_single_values(call, arguments, keywords, context):
    """Of a single value mean and variance say nothing: what comes out is always zero."""
    module = context.module
    if isinstance(module, BatchNorm) and context.method_name == "__call__":
        x = arguments[0]
        count = (module.group or len(x)) * int(np.prod(x.shape[1:-1]))
        if count == 1 and not module.use_running_average:
            raise UserError(
                f"BatchNorm {'/'.join(module.path)} would see single values (a batch "
                f"or group of 1, on maps of {'x'.join(map(str, x.shape[1:-1])) or '1'}), "
                "and give zero; choose a larger data.batch_size or model.norm_group, or "
                "larger images."
            )
    return call(*arguments, **keywords)

"""What XLA says of a network that it has compiled: its operations, its memory.

To stand beside what `accounting` counts. XLA's FLOPs are additions and multiplications of
everything, elementwise operations included, but without the products with zeros of the
padding: a little more or less than 2 * MACs. Its memory is that of its plan: arguments
(weights and images), results (the gradients among them) and temporaries, the most that lies
between at one time.

On CPU, jaxlib 0.10 hands whole chains of layers to a library (YNNPACK), whose memory XLA
does not see; `COMPILER_OPTIONS` forbids it, so that this is the plan of XLA's own code. Nor
are convolutions oneDNN's here (`nn.onednn.off`).
"""

from typing import Any

import jax
from flax import linen as nn
from jax import numpy as jnp

from cvjax.nn import onednn

COMPILER_OPTIONS = {"cpu": {"xla_cpu_experimental_ynn_fusion_type": ""}}


def measure(
    model: nn.Module, image_size: int, batch_size: int = 1, channels: int = 3
) -> dict[str, dict[str, float]]:
    """Compiles a network for square images; nothing is run, no array is made.

    Loops are unrolled where the model lets us: XLA counts the body of a loop once.

    Returns:
      For "forward" (evaluation mode) and "with_gradients" (cross entropy in training mode,
      and its gradient with respect to the parameters): "flops"; and in bytes "arguments",
      "results", "temporaries" and their sum "memory".
    """
    if hasattr(model, "loop"):
        model = model.clone(loop="unrolled")
    shape = (batch_size, image_size, image_size, channels)
    images = jax.ShapeDtypeStruct(shape, jnp.float32)
    labels = jax.ShapeDtypeStruct((batch_size,), jnp.int32)
    key = jax.eval_shape(lambda: jax.random.key(0))
    variables = jax.eval_shape(lambda key, x: model.init(key, x, train=False), key, images)

    def forward(variables, images):
        return model.apply(variables, images, train=False)

    def loss(params, statistics, images, labels, key):
        logits, updated = model.apply(
            {"params": params, **statistics},
            images,
            train=True,
            rngs={"dropout": key},
            mutable=["batch_stats"],
        )
        picked = jnp.take_along_axis(nn.log_softmax(logits), labels[:, None], axis=1)
        return -picked.mean(), updated

    statistics = {name: tree for name, tree in variables.items() if name != "params"}
    gradient = jax.value_and_grad(loss, has_aux=True)
    return {
        "forward": _compile(forward, variables, images),
        "with_gradients": _compile(
            gradient, variables["params"], statistics, images, labels, key
        ),
    }


def _compile(function, *arguments: Any) -> dict[str, float]:
    options = COMPILER_OPTIONS.get(jax.default_backend(), {})
    with onednn.off():
        compiled = jax.jit(function).lower(*arguments).compile(compiler_options=options)
    memory = compiled.memory_analysis()
    sizes = {
        "arguments": memory.argument_size_in_bytes,
        "results": memory.output_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
    }
    return {
        "flops": compiled.cost_analysis()["flops"],
        **sizes,
        "memory": sum(sizes.values()),
    }

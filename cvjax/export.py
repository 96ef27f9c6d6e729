"""A trained network as one file that runs without cvjax.

    python -m cvjax.export --workdir=runs/cifar10_resnet --output=resnet.jaxexport

By jax.export: a program in StableHLO with the weights and the normalisation inside, from
images uint8 [batch, height, width, channels] to class probabilities float32 [batch,
classes], for CPU, CUDA and TPU, and for any batch size (of ODE-nets for the one that
--batch_size says). It needs JAX alone, of this version or up to half a year later
(jax.export's promise), and flatbuffers, which JAX does not install by itself (`pip install
flatbuffers`; so does writing it):

    import jax, json, numpy
    from jax import export
    network = export.deserialize(bytearray(open("resnet.jaxexport", "rb").read()))
    about = json.load(open("resnet.jaxexport.json"))
    images = numpy.zeros((1, *about["image_shape"]), numpy.uint8)
    print(about["class_names"][network.call(images)[0].argmax()])

OUTPUT.json beside it has the class names, the images' shape and where the network comes
from. Convolutions are XLA's own, not oneDNN's, which are a foreign call of this process: on
a CPU the file may be slower than the run was.
"""

import os
from collections.abc import Sequence

import jax
from absl import flags, logging
from jax import export
from jax import numpy as jnp

from cvjax import cli
from cvjax.data.normalize import normalize
from cvjax.errors import UserError
from cvjax.files import Path, user_path, write_bytes, write_json
from cvjax.nn import onednn
from cvjax.storage import workdir as workdirs
from cvjax.training.trained_network import Network, apply_model, load_network

PLATFORMS = ("cpu", "cuda", "tpu")


def export_network(
    network: Network, batch_size: int = 0, platforms: Sequence[str] = PLATFORMS
) -> export.Exported:
    """The evaluation function of a network, from uint8 images to probabilities.

    Args:
      network: see `load_network`.
      batch_size: of its images; 0 for any.
      platforms: on which it can run.

    Raises:
      UserError: the network cannot be exported for any batch size.
    """
    if network.recipe.task.name == "detection":
        raise UserError(
            "a detector cannot be exported: the file gives probabilities of classes; "
            "use cvjax.predict."
        )
    sigmoid = network.run.loss.name == "sigmoid"

    @jax.jit
    def evaluate(images):
        images = normalize(images, network.statistics)
        logits = apply_model(network.variables, images, model=network.recipe.model)
        logits = logits.astype(jnp.float32)
        return jax.nn.sigmoid(logits) if sigmoid else jax.nn.softmax(logits)

    (size,) = (batch_size,) if batch_size else export.symbolic_shape("batch")
    images = jax.ShapeDtypeStruct((size, *network.image_shape), jnp.uint8)
    try:
        with onednn.off():  # oneDNN's convolutions are a call into this process
            return export.export(evaluate, platforms=platforms)(images)
    except (TypeError, ValueError, NotImplementedError) as error:
        if batch_size:
            raise
        reason = str(error).partition("\n")[0][:200]
        raise UserError(
            f"this network cannot be exported for any batch size ({reason}); give one with "
            "--batch_size."
        ) from error


def write_export(
    network: Network,
    path: Path,
    batch_size: int = 0,
    platforms: Sequence[str] = PLATFORMS,
) -> None:
    """Writes `export_network` to a file, and what it is to `path`.json."""
    exported = export_network(network, batch_size, platforms)
    try:
        content = exported.serialize()
    except ImportError as error:
        raise UserError(
            "jax.export needs the package flatbuffers: `pip install flatbuffers`."
        ) from error
    except NotImplementedError as error:  # equinox tells of errors by host callbacks
        raise UserError(
            "a network with adaptive steps is exported with EQX_ON_ERROR=nan, set before "
            "this process solves its first ODE."
        ) from error
    path = user_path(path, "--output")
    workdirs.check_writable(path.parent, "--output")
    write_bytes(path, bytes(content))
    about = {
        "image_shape": network.image_shape,
        "class_names": network.class_names,
        "batch_size": batch_size or "any",
        "platforms": list(platforms),
        "step": network.step,
        "model": network.run.model,
        "exported_by": workdirs.provenance(),
    }
    write_json(path.with_name(f"{path.name}.json"), about)
    logging.info("Wrote %s, %.1f MB, and %s.json.", path, len(content) / 1e6, path.name)


def define_flags() -> None:
    """The command line; not at import, as other programs have flags of the same names."""
    flags.DEFINE_string("workdir", None, "The folder of a run of train.py.")
    flags.DEFINE_string("output", None, "The file to write.")
    flags.DEFINE_string(
        "checkpoint", "last", "last, best (on validation) or the number of a step."
    )
    flags.DEFINE_integer("batch_size", 0, "Of its images; 0 for any.", lower_bound=0)
    flags.DEFINE_list("platforms", list(PLATFORMS), "On which it can run.")
    flags.mark_flags_as_required(["workdir", "output"])


def main(arguments):
    cli.refuse_arguments(arguments)
    values = flags.FLAGS
    wrong = set(values.platforms) - {*PLATFORMS, "rocm"}
    if wrong or not values.platforms:
        raise UserError(
            f"--platforms takes {', '.join(PLATFORMS)} or rocm, got {values.platforms}."
        )
    # A file cannot call back into this process: a solve that fails gives NaN instead.
    os.environ["EQX_ON_ERROR"] = "nan"
    network = load_network(values.workdir, values.checkpoint)
    write_export(network, values.output, values.batch_size, values.platforms)


if __name__ == "__main__":
    define_flags()
    cli.run(main)

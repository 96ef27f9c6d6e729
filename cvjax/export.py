"""A trained network as one file that runs without cvjax.

    python -m cvjax.export --workdir=runs/cifar10_resnet --output=resnet.jaxexport
    python -m cvjax.export --pretrained=cifar10_resnet20 --output=resnet.jaxexport

By jax.export: a program in StableHLO with the weights and the normalisation inside, from
images uint8 [batch, height, width, channels] to class probabilities float32 [batch, ...,
classes]; of a detector to a dict of "boxes" float32 [batch, n, 4] (left, top, right, bottom
in pixels), "classes" int32 [batch, n] and "scores" float32 [batch, n], 0 where there is no
detection. It is for CPU, CUDA and TPU, and for any batch size; of ODE-nets whose images
share their adaptive steps (per_sample "never") for the one that --batch_size says. It needs
JAX alone, of this version or up to half a year later (jax.export's promise), and
flatbuffers, which JAX does not install by itself (`pip install flatbuffers`; so does
writing it):

    import jax, json, numpy
    from jax import export
    network = export.deserialize(bytearray(open("resnet.jaxexport", "rb").read()))
    about = json.load(open("resnet.jaxexport.json"))
    images = numpy.zeros((1, *about["image_shape"]), numpy.uint8)
    print(about["class_names"][network.call(images)[0].argmax()])

OUTPUT.json beside it has the class names, the images' shape and where the network comes
from. Convolutions are XLA's own, not oneDNN's, which are a foreign call of this process: on
a CPU the file may be slower than the run was.

With --output=FILE.safetensors the weights alone are written, with all that
`cvjax.storage.pretrained` needs to use them: in the folder cvjax/pretrained they are one
more network for `cvjax.predict --pretrained`.
"""

import pathlib
from collections.abc import Sequence

import jax
from absl import flags, logging
from jax import export
from jax import numpy as jnp

from cvjax import cli
from cvjax.data import boxes
from cvjax.data.normalize import normalize
from cvjax.errors import UserError
from cvjax.files import (
    Path,
    is_pretrained,
    read_json,
    user_path,
    write_bytes,
    write_json,
)
from cvjax.nn import onednn
from cvjax.storage import pretrained, provenance
from cvjax.storage import workdir as workdirs
from cvjax.training import network_flags
from cvjax.training.trained_network import Network, apply_model, load_network

PLATFORMS = ("cpu", "cuda", "tpu")


def export_network(
    network: Network, batch_size: int = 0, platforms: Sequence[str] = PLATFORMS
) -> export.Exported:
    """The evaluation function of a network, from uint8 images to what the top says.

    Args:
      network: see `load_network`.
      batch_size: of its images; 0 for any.
      platforms: on which it can run.

    Raises:
      UserError: the network cannot be exported for any batch size.
    """
    model, sigmoid = network.recipe.model, network.run.loss.name == "sigmoid"
    detects = network.recipe.task.name == "detection"

    @jax.jit
    def evaluate(images):
        images = normalize(images, network.statistics)
        logits = apply_model(network.variables, images, model=model).astype(jnp.float32)
        if detects:
            found, scores = model.decode(logits)
            scores = jnp.where(found.mask, scores, 0)
            corners = boxes.clip(found.corners, network.image_shape)
            return {"boxes": corners, "classes": found.classes, "scores": scores}
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
    path, description = check_program(path)
    exported = export_network(network, batch_size, platforms)
    try:
        content = exported.serialize()
    except ImportError as error:
        raise UserError(
            "jax.export needs the package flatbuffers: `pip install flatbuffers`."
        ) from error
    except NotImplementedError as error:  # equinox reports errors by host callbacks
        raise UserError(
            "a network with adaptive steps is exported with EQX_ON_ERROR=nan, which this "
            "process has set otherwise, or imported equinox before cvjax."
        ) from error
    write_bytes(path, bytes(content))
    about = {
        "image_shape": network.image_shape,
        "class_names": network.class_names,
        "batch_size": batch_size or "any",
        "platforms": list(platforms),
        "step": network.step,
        "model": network.run.model,
        "exported_by": provenance.current(),
    }
    write_json(description, about)
    logging.info("Wrote %s, %.1f MB, and %s.json.", path, len(content) / 1e6, path.name)


def check_program(path: Path) -> tuple[pathlib.Path, pathlib.Path]:
    """The two files that `write_export` writes.

    Raises:
      UserError: one of them cannot be written, or would replace what this has not written.
    """
    path = user_path(path, "--output")
    description = path.with_name(f"{path.name}.json")
    user_path(description, "--output")
    written = False
    if description.is_file():
        try:
            read_json(description, {"exported_by": dict}, "")
            written = True
        except UserError:
            raise UserError(
                f"--output={path} would write {description.name} too, and there is such a "
                "file that is not of an export; give another name."
            ) from None
    for file in (path, description):
        workdirs.check_output(file, "--output", ("",) if written else ())
    return path, description


def write_weights(workdir: Path, checkpoint: str, path: Path) -> None:
    """Writes a network that comes with cvjax, see `storage.pretrained`."""
    if is_pretrained(workdir):
        raise UserError(
            f"{workdir} is such a file already; give --output another ending, or see "
            "cvjax.interop.torch --export for PyTorch's."
        )
    network, manifest = load_network(workdir, checkpoint), workdirs.read_manifest(workdir)
    path = workdirs.check_output(path, "--output", (".safetensors",))
    kept = ("variables", "statistics", "class_names", "step", "data_fingerprint")
    found = pretrained.Pretrained(
        config=manifest["config"],
        measured=workdirs.read_summary(workdir),
        made_by={key: manifest.get(key) for key in (*provenance.current(), "imported")},
        **{name: getattr(network, name) for name in kept},
    )
    pretrained.write(found, path)
    logging.info("Wrote %s, %.1f MB.", path, path.stat().st_size / 1e6)


def define_flags() -> None:
    """The command line; not at import, as other programs have flags of the same names."""
    network_flags.define_flags()
    flags.DEFINE_string("output", None, "The file to write.")
    flags.DEFINE_integer("batch_size", 0, "Of its images; 0 for any.", lower_bound=0)
    flags.DEFINE_list("platforms", list(PLATFORMS), "On which it can run.")
    flags.mark_flag_as_required("output")


def main(arguments):
    cli.refuse_arguments(arguments)
    values, source = flags.FLAGS, network_flags.source()
    wrong = set(values.platforms) - {*PLATFORMS, "rocm"}
    if wrong or not values.platforms:
        raise UserError(
            f"--platforms takes {', '.join(PLATFORMS)} or rocm, got {values.platforms}."
        )
    if values.output.endswith(".safetensors"):
        if values.batch_size or values.platforms != list(PLATFORMS):
            raise UserError(
                "--batch_size and --platforms are of a program, and .safetensors has "
                "weights alone; leave them out, or give --output another ending."
            )
        return write_weights(source, values.checkpoint, values.output)
    network = load_network(source, values.checkpoint)
    return write_export(network, values.output, values.batch_size, values.platforms)


if __name__ == "__main__":
    define_flags()
    cli.run(main)

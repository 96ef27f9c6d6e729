"""Which trained network a program takes: --workdir or --pretrained, and --checkpoint."""

from absl import flags

from cvjax.errors import UserError
from cvjax.files import PRETRAINED
from cvjax.storage import pretrained


def define_flags(
    workdir: str = "The folder of a run of train.py.",
    checkpoint: str = "last, best (on validation) or the number of a step.",
) -> None:
    """The flags; the arguments are their help."""
    flags.DEFINE_string("workdir", None, workdir)
    flags.DEFINE_string(
        "pretrained", None, "In place of --workdir: a network that comes with cvjax."
    )
    flags.DEFINE_string("checkpoint", "last", checkpoint)


def source() -> str:
    """What they name, for `trained_network.load_network`.

    Raises:
      UserError: they name none, or two.
    """
    values = flags.FLAGS
    if bool(values.workdir) == bool(values.pretrained):
        raise UserError(
            "name a network by its run, --workdir=DIR, or one of "
            f"{', '.join(pretrained.names())} by --pretrained=NAME."
        )
    return values.workdir or f"{PRETRAINED}{values.pretrained}"

"""What experiments share whose pictures are bundled scenes, or the user's own."""

import pathlib
from collections.abc import Iterable
from types import ModuleType

import ml_collections
from absl import flags

from cvjax.errors import UserError
from cvjax.storage import workdir as workdirs

flags.disclaim_key_flags()  # --help shows this flag as the experiment's


def define_flags() -> None:
    """The folder, beside the flags of `runner`."""
    flags.DEFINE_string("data_dir", "", "Folder of the pictures, with preset medium.")


def check_folders() -> pathlib.Path:
    """The folder of the results.

    Raises:
      UserError: it cannot be written to, or --data_dir does not go with the preset.
    """
    values = flags.FLAGS
    if bool(values.data_dir) != (values.preset == "medium"):
        raise UserError(
            "--data_dir names the folder of the pictures with --preset=medium, and goes "
            "with no other preset."
        )
    return workdirs.check_writable(values.workdir)


def create_configs(
    runs: Iterable[tuple[ModuleType, int]], folder: pathlib.Path
) -> dict[pathlib.Path, ml_collections.ConfigDict]:
    """Workdirs and configs, as `runner.train_all` takes them, of modules and seeds."""
    values, configs = flags.FLAGS, {}
    for module, seed in runs:
        config = module.get_config()
        config.seed = seed
        config.data.data_dir = values.data_dir
        config.total_steps = values.steps or config.total_steps
        configs[folder / "runs" / f"{config.model.name}-seed{seed}"] = config
    return configs

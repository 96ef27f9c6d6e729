"""What each augmentation does to images, and to the errors of a net trained with it.

    python -m experiments.augmentation --preset=quick --workdir=runs/augmentation

The pictures are drawn by the function that training calls (`steps.training_images`), from
the same images again and again, and the normalisation is taken back for the eye. Then a net
is trained without augmentation, with each one alone, and with the usual pair of crop and
flip (He et al. 2015, section 4.2), from several seeds.

What is predicted: an augmentation that keeps the class of an image is as good as more
images. It makes the training images harder to learn, so their error rises, and the error
on unseen images falls, as long as the net is trained for long enough to fit its images. One
that does not keep the class costs both: a mirrored 2 or 5 is no digit. Of changes that
the data does not have (colours, of digits that are grey on black), nothing is expected.

The training set is kept small, so that there is something to gain in minutes; all else is
validation (looked at once, at the end). Training error is that of the images as they are.

Presets: quick (300 digits, minutes on a CPU) and medium (5,000 images of CIFAR-10, for a
quiet CPU; not yet run) train two convolutions, full (45,000 images, for a GPU; not yet run)
ResNet-20 by the paper's recipe. Each run has a folder of its own under WORKDIR/runs; the
same command goes on where it was stopped, and what is finished is not run again;
--processes=N shares the runs over N processes.
"""

import pathlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import ml_collections
import numpy as np
from absl import flags

from configs import cifar10_convnet, cifar10_resnet, mnist_convnet
from cvjax import cli, data
from cvjax.data.colors import compute_color_axes
from cvjax.data.dataset import Dataset
from cvjax.data.normalize import compute_statistics
from cvjax.report import tables
from cvjax.report.statistics import common_seeds, paired_difference, spread
from cvjax.report.tables import p_value, percent, percent_interval
from cvjax.storage import workdir as workdirs
from cvjax.training import steps
from cvjax.training.config import parse_config
from cvjax.training.settings import DataConfig
from experiments import runner, sharing
from experiments.augmentation.figure import draw_augmentation

ERRORS = {"train_eval/error": "training", "val/error": "validation", "test/error": "test"}
PLAIN = {"crop_padding": 0, "flip": False, "scale_min": 0, "scale_max": 0}
DRAWS = 6  # of each image, in the figure


def quick() -> ml_collections.ConfigDict:
    """300 of the bundled digits, two convolutions of 3x3."""
    config = mnist_convnet.get_config()
    config.total_steps = config.eval_every = config.checkpoint_every = 400
    config.train_eval_examples = -1
    config.data.update(name="digits", val_examples=1_197, batch_size=60)
    config.optim.schedule = "cosine"
    config.optim.learning_rate = 0.03
    config.model.update(features=(16, 32), kernels=(3, 3), paddings=(1, 1))
    return config


def medium() -> ml_collections.ConfigDict:
    """5,000 images of CIFAR-10, two convolutions of 5x5 with stride 2."""
    config = cifar10_convnet.get_config()
    config.total_steps = config.eval_every = config.checkpoint_every = 1_500
    config.train_eval_examples = -1
    config.data.val_examples = 45_000
    config.data.batch_size = 100
    config.optim.schedule = "cosine"
    config.optim.learning_rate = 0.03
    config.model.update(features=(32, 64), strides=(2, 2))
    return config


def full() -> ml_collections.ConfigDict:
    """CIFAR-10 by the paper's recipe, but for the augmentation."""
    return cifar10_resnet.get_config()


class Preset(NamedTuple):
    """What a preset trains, and the training images that are shown."""

    config: Callable[[], ml_collections.ConfigDict]
    images: tuple[int, ...]


PRESETS = {
    "quick": Preset(quick, (2, 5)),
    "medium": Preset(medium, (0, 1)),
    "full": Preset(full, (0, 1)),
}


def augmentations(side: int) -> dict[str, dict[str, Any]]:
    """By name, the settings of `data.augment.Augmentation` for images of a side."""
    crop = {"crop_padding": side // 8}
    return {
        "none": {},
        "crop": crop,
        "flip": {"flip": True},
        "vertical flip": {"vertical_flip": True},
        "scale": {"scale_min": side, "scale_max": side + side // 4},
        "brightness": {"brightness": 0.4},
        "contrast": {"contrast": 0.4},
        "lighting": {"lighting": 0.1},
        "crop and flip": {**crop, "flip": True},
    }


def describe(name: str, settings: dict[str, Any]) -> str:
    """A name with its size, for the figure."""
    if name == "crop":
        return f"crop, padded by {settings['crop_padding']}"
    if name == "scale":
        return f"scale, to {settings['scale_min']}-{settings['scale_max']} px"
    if name in ("brightness", "contrast"):
        return f"{name}, ±{settings[name]:.0%}"
    return f"lighting, {settings[name]}" if name == "lighting" else name


def define_flags() -> None:
    """The command line; not at import, as other experiments have flags of these names."""
    runner.define_flags(PRESETS, "augmentation")
    sharing.define_flags()


def main(arguments):
    cli.refuse_arguments(arguments)
    values, shared = flags.FLAGS, sharing.from_flags()
    folder = workdirs.check_writable(values.workdir)
    preset = PRESETS[values.preset]
    config = preset.config()
    config.total_steps = values.steps or config.total_steps
    seeds = range(values.seeds)
    compare(config, values.preset, preset.images, seeds, folder, shared)


def compare(
    config: ml_collections.ConfigDict,
    preset: str,
    images: tuple[int, ...],
    seeds: Sequence[int],
    folder: pathlib.Path,
    shared: sharing.Sharing = sharing.ALONE,
) -> None:
    """Trains with all augmentations; writes, draws and prints."""
    dataset = data.load(**parse_config(config).data.source)
    choices = augmentations(min(dataset.image_shape[:2]))
    # Seed by seed, so that what is finished early can be compared early.
    plan = {
        folder / "runs" / f"{name.replace(' ', '-')}-seed{seed}": (name, seed)
        for seed in seeds
        for name in choices
    }
    configs = {
        run_dir: with_augmentation(config, choices[name], seed)
        for run_dir, (name, seed) in plan.items()
    }
    with runner.trained(configs, shared=shared) as finished:
        runs = [
            {"augmentation": name, "seed": seed, **runner.read_run(run_dir)}
            for run_dir, (name, seed) in plan.items()
            if run_dir in finished
        ]
        report(runs, config, preset, dataset, images, folder)


def report(
    runs: list[dict[str, Any]],
    config: ml_collections.ConfigDict,
    preset: str,
    dataset: Dataset,
    images: tuple[int, ...],
    folder: pathlib.Path,
) -> None:
    """Writes, draws and prints what runs have given."""
    choices = augmentations(min(dataset.image_shape[:2]))
    results = runner.write_results(
        folder,
        "augmentation",
        preset,
        data=config.data.name,
        train_examples=len(dataset.train.labels),
        steps=config.total_steps,
        labels={name: describe(name, choices[name]) for name in choices},
        table=tabulate(runs),
        claims=contrasts(runs),
        runs=runs,
    )
    shown = dataset.train.images[np.array(images)]
    draws = {
        name: draw(shown, dataset.train.images, with_augmentation(config, choices[name], 0))
        for name in choices
    }
    draw_augmentation(results, shown / 255, draws, folder / "augmentation.png")
    show(results["table"], results["claims"])
    print(f"Results: {folder / 'results.json'}")
    print(f"Figure:  {folder / 'augmentation.png'}")


def with_augmentation(
    config: ml_collections.ConfigDict, settings: dict[str, Any], seed: int
) -> ml_collections.ConfigDict:
    """The config with these augmentations and no others."""
    variant = config.copy_and_resolve_references()
    variant.seed = seed
    variant.data.update({**PLAIN, **settings})
    return variant


def draw(
    images: np.ndarray, train_images: np.ndarray, config: ml_collections.ConfigDict
) -> np.ndarray:
    """`DRAWS` of each image as training sees them, the normalisation taken back.

    Args:
      images: uint8 [images, height, width, channels].
      train_images: uint8, all of them, for their statistics.
      config: its "data" is used.

    Returns:
      float32 [images, DRAWS, height, width, channels], clipped to [0, 1].
    """
    settings = DataConfig(**config.data)
    constants = steps.Constants(
        rng=jax.random.key(0),
        statistics=compute_statistics(train_images, settings.normalization),
        color_axes=compute_color_axes(train_images),
    )
    repeated = np.repeat(images, DRAWS, axis=0)
    draw_all = jax.jit(steps.training_images, static_argnames="augmentation")
    drawn = draw_all(constants.rng, repeated, constants, augmentation=settings.augmentation)
    statistics = constants.statistics
    seen = np.asarray(drawn * statistics.std[None] + statistics.mean[None]).clip(0, 1)
    return seen.reshape(len(images), DRAWS, *images.shape[1:])


def tabulate(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row per augmentation: "n" (seeds), and each error's mean and spread."""
    table = []
    for name, group in _groups(runs).items():
        values = group.values()
        errors = {key: spread([summary[key] for summary in values]) for key in ERRORS}
        table.append({"augmentation": name, "n": len(group), **errors})
    return table


def contrasts(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The claims: validation and test errors against those of no augmentation, paired.

    Runs of one seed have the same initial parameters and the same batches.
    """
    groups = _groups(runs)
    none = groups.pop("none", {})
    found = []
    for error in ("val/error", "test/error"):
        for name, summaries in groups.items():
            pairs = common_seeds(summaries, none)
            if pairs[0]:
                values = ([summary[error] for summary in group] for group in pairs)
                names = {"augmentation": name, "against": "none", "error": error}
                found.append({**names, **paired_difference(*values)})
    return found


def _groups(runs: list[dict[str, Any]]) -> dict[str, dict[int, dict[str, float]]]:
    """By augmentation the summary of each seed."""
    groups: dict[str, dict[int, dict[str, float]]] = {}
    for run in runs:
        groups.setdefault(run["augmentation"], {})[run["seed"]] = run["summary"]
    return groups


def show(table: list[dict[str, Any]], claims: list[dict[str, Any]]) -> None:
    """The table on the terminal, errors in per cent."""
    p = {
        claim["augmentation"]: p_value(claim["p"])
        for claim in claims
        if claim["error"] == "val/error"
    }
    rows = [
        [
            *(row["augmentation"], str(row["n"])),
            *(percent(row[key]) for key in ERRORS),
            percent_interval(row["val/error"]),
            p.get(row["augmentation"], ""),
        ]
        for row in table
    ]
    title = (
        "Error in %, mean ± standard deviation over the seeds; of validation the 95 % "
        "interval\nof the mean, and p of the difference from none, paired by seed"
    )
    headings = ("augmentation", "seeds", *ERRORS.values(), "95 %", "p")
    tables.show(title, headings, rows)


if __name__ == "__main__":
    define_flags()
    cli.run(main)

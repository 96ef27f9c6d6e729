"""Joined features or added scores: which network finds the edges of things?

    python -m experiments.segmentation --preset=quick --workdir=runs/segmentation
    python -m experiments.segmentation --preset=medium --data_dir=DIR --workdir=runs/nuclei

A fully convolutional network (Long et al. 2014) names pixels on coarse maps, adds the
scores of finer ones and enlarges the sum. U-Net (Ronneberger et al. 2015) joins the
features of the finer maps, up to the image's own, before it names anything. The
multiply-adds of the two networks here differ by a third at most; the FCN has a third of the
parameters.

Presets: quick (digit scenes), medium (pictures with label pictures, see
cvjax/data/mask_folder.py; settings for the Data Science Bowl's nuclei, their numbers as
labels).

For medium U-Net was tried three times, enlarged to 168, 256 and 144 pixels: validation
tiles had a mean IoU of 0.72, 0.70 (after 6,000 steps) and 0.72, the test pictures a score
of 0.35, 0.33 and 0.35; colour and sizes that training does not have were the worst. A
fourth run, with contrast stretched, had 0.36: touching nuclei were one object (its
pictures with a Dice coefficient of 0.97 had a score of 0.40), as it saw no border, one
pixel wide, where two touch. Seeds from smoothed depths instead of connected insides made
0.39 of that (on validation 0.53 became 0.57), and with each pixel of its foreground given
to the right nucleus it would be 0.53. So borders are two pixels wide now, and colours
vary in training. The first seed of these settings, 4,000 steps, had a Dice coefficient of
0.78 and a score of 0.37 on test; on every third validation picture 0.81 and 0.53, and
0.91 and 0.56 with BatchNorm's running averages taken over more batches. So
`norm_momentum` is 0.99 now; and there are 2,400 steps, as more had not helped.

Predicted for U-Net before that first seed, for test: a Dice coefficient of the foreground
of 0.83 to 0.88 and a score of 0.42 to 0.48, which it missed. Predicted before the seeds
with a momentum of 0.99: 0.82 to 0.87, and 0.34 to 0.42.

Predicted of both networks, before any settings were chosen: they err alike 6 pixels and
more from an edge; next to an edge the FCN, whose finest map has half the resolution, errs
more; so its mean IoU is lower, and on nuclei the Bowl's score, which asks for overlaps of
up to 0.95, is lower by more than 0.02. For quick each network was then tried with one
seed to choose the number of steps: U-Net had a mean IoU of 0.904, the FCN of 0.902, so
that this part of the prediction is in doubt.
"""

import functools
import itertools
import pathlib
import shutil
from typing import Any

from absl import flags

from configs import digit_scenes_fcn, digit_scenes_unet, nuclei_fcn, nuclei_unet
from cvjax import cli
from cvjax.data import label_maps
from cvjax.evaluation import instances
from cvjax.evaluation.segmentation import NAMES
from cvjax.report import tables
from cvjax.report.statistics import difference, spread
from experiments import own_pictures, runner, sharing
from experiments.segmentation import figure
from experiments.segmentation.measure import DISTANCES, measure

PRESETS = {
    "quick": (digit_scenes_unet, digit_scenes_fcn),
    "medium": (nuclei_unet, nuclei_fcn),
}


def define_flags() -> None:
    runner.define_flags(PRESETS, "network")
    sharing.define_flags()
    own_pictures.define_flags()


def main(arguments):
    cli.refuse_arguments(arguments)
    values, shared = flags.FLAGS, sharing.from_flags()
    folder = own_pictures.check_folders()
    pairs = itertools.product(PRESETS[values.preset], range(values.seeds))
    configs = own_pictures.create_configs(pairs, folder)
    gather = functools.partial(_gather, configs, folder, values.preset)
    runner.train_all(configs, gather, shared)
    gather()


def _gather(configs, folder: pathlib.Path, preset: str) -> None:
    """Results and figures of the runs that are finished."""
    runs = []
    for run in filter(runner.is_finished, configs):
        config, kept = configs[run], runner.read_run(run)
        key = {
            "step": kept["summary"]["step"],
            "separate": [instances.SMOOTHING, instances.HEIGHT, label_maps.SMALLEST],
        }
        measured = runner.cached(
            run / "segments.json", key, functools.partial(measure, run)
        )
        about = {"network": config.model.name, "seed": config.seed}
        runs.append({**about, "measured": measured, **kept})
        if not config.seed:
            shutil.copy(run / "pictures.png", folder / f"pictures_{config.model.name}.png")
    report(runs, folder, preset)


def report(runs: list[dict[str, Any]], folder: pathlib.Path, preset: str) -> None:
    """Writes results.json and the figure, and prints the tables."""
    names = list(dict.fromkeys(run["network"] for run in runs))
    by_name = {
        name: {run["seed"]: run["measured"] for run in runs if run["network"] == name}
        for name in names
    }
    keys = [key for key in NAMES if key in runs[0]["measured"]]
    table = []
    for name, seeds in by_name.items():
        first = next(iter(seeds.values()))
        cost = {key: first[key] for key in ("parameters", "macs")}
        means = {key: spread([scores[key] for scores in seeds.values()]) for key in keys}
        table.append({"network": name, "n": len(seeds), **cost, **means})
    claims = compare(by_name, keys)
    # Without the pictures one by one, which stand in segments.json of each run.
    kept = [
        {**run, "measured": {k: v for k, v in run["measured"].items() if k != "each"}}
        for run in runs
    ]
    runner.write_results(
        folder, "segmentation", preset, table=table, claims=claims, runs=kept
    )
    rows = [
        [
            *(row["network"], str(row["n"])),
            *(f"{row['parameters'] / 1e6:.2f} M", f"{row['macs'] / 1e6:,.0f} M"),
            *(tables.mean_std(row[key], 3) for key in keys),
        ]
        for row in table
    ]
    headings = (
        "network",
        "n",
        "parameters",
        "MACs",
        *(key.replace("_", " ") for key in keys),
    )
    tables.show("Test pictures", headings, rows)
    for claim in claims:
        print(f"{claim['what']}: {tables.difference(claim, 3)}")
    figure.draw_errors(
        {name: list(seeds.values()) for name, seeds in by_name.items()},
        folder / "segmentation.png",
    )
    paths = (folder / f"pictures_{name}.png" for name in names)
    for path in (folder / "results.json", folder / "segmentation.png", *paths):
        if path.exists():
            print(path)


def compare(
    by_name: dict[str, dict[int, dict[str, Any]]], keys: list[str]
) -> list[dict[str, Any]]:
    """U-Net less FCN, by Welch's t-test: scores, and errors by distance."""
    if by_name.keys() != {"unet", "fcn"}:
        return []

    def claim(what, value):
        errors = [
            [value(measured) for measured in by_name[name].values()]
            for name in ("unet", "fcn")
        ]
        return {"what": f"{what}, U-Net less FCN", **difference(*errors)}

    claims = [claim(NAMES[key], lambda measured, key=key: measured[key]) for key in keys]
    for k, (least, most) in enumerate(DISTANCES):
        if all(
            measured["errors_by_distance"][k] is not None
            for measured in by_name["fcn"].values()
        ):
            where = str(least) if most == least else f"{least} to {most or 'all'}"
            what = f"wrong pixels at a distance of {where} from an edge"
            claims.append(
                claim(what, lambda measured, k=k: measured["errors_by_distance"][k])
            )
    return claims


if __name__ == "__main__":
    define_flags()
    cli.run(main)

"""A grid whose cells name one object each, or points: what does each detector miss?

    python -m experiments.detection --preset=quick --workdir=runs/detection
    python -m experiments.detection --preset=medium --data_dir=DIR --workdir=runs/blood

YOLO's first version divides the image into cells, and a cell names one object. Whatever
else has its centre in that cell cannot be found; which objects these are follows from the
grid and the true boxes alone, without any training. CenterNet asks for centres per class on
a finer map. Theory predicts that CenterNet's recall does not depend on whether objects
share a (YOLO's) cell, and that YOLO's does; that its recall can be at most one less the
fraction of objects that come second to their cell.

Presets: quick (digit scenes), medium (pictures with boxes in the folders of PASCAL VOC;
settings for BCCD's 364 photographs of blood cells, github.com/Shenggan/BCCD_Dataset, 240
pixels high, 2,000 steps of 8 pictures).

Predicted for medium on BCCD, three seeds, after one run of CenterNet of 2,000 steps (AP
at 0.5 of 0.847): CenterNet's AP at 0.5 is between 0.83 and 0.87; its worst kind is
platelets or red cells, its best white cells; YOLO's AP at 0.5 is lower by more than 0.1.
With 3,000 steps it was 0.830 and 0.774. So steps are 2,000 now, and pictures are also
mirrored upside down, enlarged by up to a third and varied in colour, and BatchNorm's
running averages are taken over more batches. Predicted before these seeds: CenterNet's AP
at 0.5 is between 0.84 and 0.87, YOLO's lower by 0.03 to 0.1.

Detections count from the score on that gives the best F1 on the validation images, and are
right at an overlap of 0.5. Average precisions are COCO's.
"""

import pathlib
from typing import Any

from absl import flags

from configs import digit_scenes_centernet, digit_scenes_yolo, voc_centernet, voc_yolo
from cvjax import cli
from cvjax.report import tables
from cvjax.report.statistics import paired_difference, spread
from experiments import own_pictures, runner, sharing
from experiments.detection import figure
from experiments.detection.measure import measure

PRESETS = {
    "quick": (digit_scenes_centernet, digit_scenes_yolo),
    "medium": (voc_centernet, voc_yolo),
}
MEASURED = ("ap50", "ap", "recall", "precision", "recall_alone", "recall_sharing")
DRAWN = ("scenes", "grid")
HEADINGS = ("AP at 0.5", "AP", "recall", "precision", "alone", "sharing a cell")


def define_flags() -> None:
    runner.define_flags(PRESETS, "network")
    sharing.define_flags()
    own_pictures.define_flags()


def main(arguments):
    cli.refuse_arguments(arguments)
    values, shared = flags.FLAGS, sharing.from_flags()
    folder = own_pictures.check_folders()
    modules, seeds = PRESETS[values.preset], range(values.seeds)
    pairs = ((module, seed) for seed in seeds for module in modules)
    configs = own_pictures.create_configs(pairs, folder)
    stride = PRESETS[values.preset][1].get_config().model.stride
    with runner.trained(configs, shared=shared) as finished:
        runs = [read_run(run, configs[run], stride) for run in finished]
        report(runs, folder, values.preset)


def read_run(run: pathlib.Path, config, stride: int) -> dict[str, Any]:
    """What the results keep of a finished run."""
    kept = runner.read_run(run)
    key = {"step": kept["summary"]["step"], "stride": stride, "grid": True}
    measured = runner.cached(run / "detections.json", key, lambda: measure(run, stride))
    about = {"network": config.model.name, "seed": config.seed}
    return {**about, "measured": measured, **kept}


def report(runs: list[dict[str, Any]], folder: pathlib.Path, preset: str) -> None:
    """Writes results.json and the figures, and prints the table."""
    names = list(dict.fromkeys(run["network"] for run in runs))
    by_name = {
        name: [run["measured"] for run in runs if run["network"] == name] for name in names
    }
    table = [
        {
            **{"network": name, "n": len(measured)},
            **{key: spread([scores[key] for scores in measured]) for key in MEASURED},
        }
        for name, measured in by_name.items()
    ]
    claims = []
    for name, measured in by_name.items():
        kinds = [
            [scores[f"recall_{kind}"] for scores in measured]
            for kind in ("sharing", "alone")
        ]
        claim = {"network": name, "what": "recall of objects that share a cell, less alone"}
        claims.append({**claim, **paired_difference(*kinds)})
    bound = runs[0]["measured"]["bound"]
    # Without the boxes, which stand in detections.json of each run.
    kept = [
        {**run, "measured": {k: v for k, v in run["measured"].items() if k not in DRAWN}}
        for run in runs
    ]
    runner.write_results(
        folder, "detection", preset, table=table, claims=claims, runs=kept, bound=bound
    )
    rows = [
        [row["network"], str(row["n"]), *(tables.mean_std(row[key], 3) for key in MEASURED)]
        for row in table
    ]
    tables.show("Test scenes", ("network", "n", *HEADINGS), rows)
    for claim in claims:
        print(f"{claim['network']}: {claim['what']}: {tables.difference(claim, 3)}")
    print(f"A grid of YOLO's cells can have a recall of {bound:.3f} at most.")
    paths = [folder / f"{name}.png" for name in ("detection", "scenes", "grid")]
    figure.draw_recalls(by_name, bound, paths[0])
    figure.draw_scenes({name: by_name[name][0] for name in names}, paths[1])
    figure.draw_grid(by_name[names[0]][0]["grid"], paths[2])
    for path in (folder / "results.json", *paths):
        print(path)


if __name__ == "__main__":
    define_flags()
    cli.run(main)

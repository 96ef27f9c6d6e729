"""Errors and calibration of trained nets on noisy and on shifted test images.

    python -m experiments.odenet_vs_resnet.robustness --workdir=runs/robust \\
        --baseline=length=1 'runs/odenet/runs/mnist-*'

Takes finished runs of classifiers, and trains nothing. Of each: test error and expected
calibration error (Guo et al. 2017, 15 bins) on the test images as they are, with Gaussian
noise of standard deviations `NOISE` (of 255; rounded and clipped), and shifted by `SHIFTS`
pixels to a side drawn for each image, zeros coming in. All nets see the same pixels. Runs
that differ in their seed alone are one net, and nets are compared with the baseline, paired
by seed where they have the same seeds.

Yan et al. 2020 (arXiv:1910.05513) report that ODE-nets are more robust against Gaussian
noise than convolutional nets. Predicted for preset mnist of experiments.odenet_vs_resnet
before anything was measured: between an ODE-net and one residual block (equal parameters)
no difference in error is resolved on clean and shifted images; under the strongest noise
the ODE-nets err less, by more than a point; none of these nets is badly calibrated on clean
images (below 1 %), and under the strongest noise all are, by more than 10 %.
"""

import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from absl import flags, logging

from cvjax import cli
from cvjax.comparison.rows import find_row, make_rows
from cvjax.comparison.runs import read_run as read_compared
from cvjax.data.dataset import ArraySplit
from cvjax.evaluation.classification import calibrate
from cvjax.evaluation.predictions import first_examples, predict_as_in_training
from cvjax.report import tables
from cvjax.report.figures import label_axes, save_figure
from cvjax.report.statistics import difference, paired_difference, spread
from cvjax.report.tables import percent
from cvjax.storage import workdir as workdirs
from cvjax.training.trained_network import load_network
from experiments import runner
from experiments.odenet_vs_resnet.finished_runs import find_finished

NOISE = (25, 50, 75, 100)  # standard deviations, in grey values of 255
SHIFTS = (1, 2, 3, 4)  # pixels
CONDITIONS = (("clean", 0), *(("noise", s) for s in NOISE), *(("shift", k) for k in SHIFTS))
SIDES = ((0, 1), (0, -1), (1, 0), (-1, 0))
MEASURES = {"error": "test error", "calibration": "calibration error"}
COLORS = ("#c8553d", "#1f5a99", "#2f8f83", "#d99a2b", "#5b4a9e", "#a0408a", "#7a9a3a")


def define_flags() -> None:
    """The command line; not at import, as other experiments have flags of these names."""
    flags.DEFINE_string("workdir", None, "Folder of the results.")
    flags.DEFINE_integer("examples", 10_000, "Test images, the first ones.", lower_bound=1)
    flags.DEFINE_string("baseline", "", "A net, by a part of its name; else the first.")
    flags.mark_flag_as_required("workdir")


def main(arguments):
    places = find_finished(arguments, "runs/*")
    folder = workdirs.check_writable(flags.FLAGS.workdir)
    nets, notes = make_rows([read_compared(place) for place in places])
    baseline = find_row(nets, flags.FLAGS.baseline) if flags.FLAGS.baseline else nets[0]
    for note in notes:
        logging.warning("%s", note)
    (folder / "cache").mkdir(exist_ok=True)
    runs = []
    for net in nets:
        for run in net.runs:
            logging.info("%s (%s)", run.folder, net.name)
            what = {"name": net.name, "seed": run.seed}
            measured = measure(run.folder, flags.FLAGS.examples, folder / "cache")
            runs.append({**what, **runner.read_run(run.folder), "conditions": measured})
    table, claims = tabulate(runs), contrasts(runs, baseline.name)
    runner.write_results(
        *(folder, "odenet_vs_resnet", None),
        **{"examples": flags.FLAGS.examples, "baseline": baseline.name},
        **{"table": table, "claims": claims, "runs": runs},
    )
    show(table)
    draw(table, folder / "robustness.png")
    print(f"Results: {folder / 'results.json'}")
    print(f"Figure:  {folder / 'robustness.png'}")


def measure(folder: pathlib.Path, examples: int, cache: pathlib.Path) -> list[dict]:
    """Of one run on each of `CONDITIONS`: "kind", "amount" and `MEASURES`, fractions."""

    def compute():
        network = load_network(folder)
        clean = first_examples(network, examples)
        found = []
        for kind, amount in CONDITIONS:
            images = corrupt(clean.images, kind, amount)
            seen = ArraySplit(images, clean.labels)
            scores, labels, values = predict_as_in_training(network, seen)
            right = scores.argmax(axis=-1) == labels
            calibration = calibrate(scores.max(axis=-1), right).expected_error
            values = {"error": values["error"], "calibration": calibration}
            found.append({"kind": kind, "amount": amount, **values})
        return found

    key = {"folder": str(folder), "examples": examples, "conditions": CONDITIONS}
    return runner.cached(cache / f"{folder.name}.json", key, compute)


def corrupt(images: np.ndarray, kind: str, amount: int) -> np.ndarray:
    """The images with noise, or shifted; the same draws at each call.

    Args:
      images: uint8 [n, height, width, channels].
      kind: "clean", "noise" or "shift".
      amount: the noise's standard deviation in grey values, or pixels.

    Returns:
      Of the same shape and type.
    """
    random = np.random.default_rng([len(kind), amount])
    if kind == "noise":
        noise = random.normal(scale=amount, size=images.shape)
        return np.clip(np.rint(images + noise), 0, 255).astype(np.uint8)
    if kind == "clean":
        return images
    height, width = images.shape[1:3]
    around = ((0, 0), (amount, amount), (amount, amount), (0, 0))
    padded = np.pad(images, around)
    corners = amount * (1 + np.array(SIDES)[random.integers(len(SIDES), size=len(images))])
    rows = corners[:, 0, None, None] + np.arange(height)[:, None]
    columns = corners[:, 1, None, None] + np.arange(width)
    return padded[np.arange(len(images))[:, None, None], rows, columns]


def tabulate(runs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows "name", "n", "kind", "amount", and of `MEASURES` the spread over the seeds."""
    table = []
    for name, group in group_runs(runs).items():
        for number, (kind, amount) in enumerate(CONDITIONS):
            values = {
                key: spread([run["conditions"][number][key] for run in group])
                for key in MEASURES
            }
            what = {"name": name, "n": len(group), "kind": kind, "amount": amount}
            table.append({**what, **values})
    return table


def contrasts(runs: Sequence[dict[str, Any]], baseline: str) -> list[dict[str, Any]]:
    """Each net against the baseline on each condition, as `statistics.difference`.

    Returns:
      "row", "against", "kind", "amount", "of" (a key of `MEASURES`), "paired" and the
      difference.
    """
    groups, claims = group_runs(runs), []
    base = groups[baseline]
    for name, group in groups.items():
        if name == baseline:
            continue
        paired = [run["seed"] for run in group] == [run["seed"] for run in base]
        test = paired_difference if paired else difference
        for number, (kind, amount) in enumerate(CONDITIONS):
            for key in MEASURES:
                after, before = (
                    [run["conditions"][number][key] for run in one] for one in (group, base)
                )
                what = {"row": name, "against": baseline, "kind": kind, "amount": amount}
                claims.append({**what, "of": key, "paired": paired, **test(after, before)})
    return claims


def group_runs(runs: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """By net its runs, by seed."""
    names = dict.fromkeys(run["name"] for run in runs)
    return {
        name: sorted((run for run in runs if run["name"] == name), key=lambda r: r["seed"])
        for name in names
    }


def show(table: Sequence[dict[str, Any]]) -> None:
    """The tables on the terminal: nets downwards, conditions across."""
    names = dict.fromkeys(row["name"] for row in table)
    headings = ["net", "n", *(f"{kind} {amount or ''}" for kind, amount in CONDITIONS)]
    for key, title in MEASURES.items():
        rows = []
        for name in names:
            group = [row for row in table if row["name"] == name]
            cells = [percent(row[key]) for row in group]
            rows.append([name, str(group[0]["n"]), *cells])
        tables.show(f"{title} in %, mean ± standard deviation", headings, rows)


def draw(table: Sequence[dict[str, Any]], path: pathlib.Path) -> None:
    """Both measures against the strength of noise, and of the shift."""
    # Imported here: matplotlib needs a second that others would have to wait for.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6), dpi=160, layout="constrained")
    panels = figure.subplots(2, 2, sharex="col")
    axes = {"noise": "standard deviation of the noise (of 255)", "shift": "pixels"}
    names = list(dict.fromkeys(row["name"] for row in table))
    for line, (key, title) in zip(panels, MEASURES.items(), strict=True):
        for panel, (kind, label) in zip(line, axes.items(), strict=True):
            for number, name in enumerate(names):
                rows = [row for row in table if row["name"] == name]
                rows = [row for row in rows if row["kind"] in ("clean", kind)]
                panel.errorbar(
                    [row["amount"] for row in rows],
                    [100 * row[key]["mean"] for row in rows],
                    yerr=[100 * (row[key]["std"] or 0) for row in rows],
                    color=COLORS[number % len(COLORS)],
                    linestyle="-" if number < len(COLORS) else "--",
                    **{"label": name, "marker": "o", "markersize": 3, "capsize": 2},
                )
            panel.set_ylim(bottom=0)
            panel.set_xticks([row["amount"] for row in rows])
            label_axes(panel, label if key == "calibration" else "", f"{title} (%)")
    panels[0, 0].set_title("Gaussian noise", fontsize=10)
    panels[0, 1].set_title("shifted", fontsize=10)
    handles, labels = panels[0, 0].get_legend_handles_labels()
    outside = {"loc": "outside lower center", "ncols": 3, "fontsize": 8, "frameon": False}
    figure.legend(handles, labels, **outside)
    save_figure(figure, path)


if __name__ == "__main__":
    define_flags()
    cli.run(main)

"""Curves: what is marked, what is drawn, and that a file is there."""

import math
import os
import subprocess
import sys

import pytest
from matplotlib import image
from matplotlib.axes import Axes

from cvjax.report import curves


def rates(*values):
    return [
        {"step": 10 * (i + 1), "train/learning_rate": rate} for i, rate in enumerate(values)
    ]


@pytest.mark.parametrize(
    ("values", "drops"),
    [
        ([0.1, 0.1, 0.01, 0.01, 0.001, 0.001], [(20, 0.01), (40, 0.001)]),
        ([0.1, 0.01], [(10, 0.01)]),
        ([0.1, 0.1, 0.1], []),
        ([0.01, 0.1, 0.1, 0.02], [(30, 0.02)]),  # a warm-up is no drop
        ([0.1, 0.08, 0.05, 0.02, 0.01], []),  # a ramp
        ([], []),
    ],
)
def test_learning_rate_drops(values, drops):
    rows = [{"step": 10, "val/error": 0.5}, *rates(*values)]
    assert curves.learning_rate_drops(rows) == drops


@pytest.fixture
def drawn(monkeypatch):
    """{label of the y axis: [(steps, values) of each line]}, filled as lines are drawn."""
    panels = {}
    plot = Axes.plot

    def record(self, x, y, **style):
        panels.setdefault(self, []).append((list(x), list(y)))
        return plot(self, x, y, **style)

    monkeypatch.setattr(Axes, "plot", record)
    return lambda: {panel.get_ylabel(): lines for panel, lines in panels.items()}


def test_errors_are_in_per_cent_and_gaps_are_left_out(tmp_path, drawn):
    rows = [
        {"step": 1, "train/loss": 2.0, "train/error": 0.5, "train/learning_rate": 0.1},
        {"step": 2, "train/loss": math.nan, "train/error": 0.25},
        {"step": 2, "train_eval/loss": 0.9, "train_eval/error": 0.2},
        {"step": 2, "val/loss": 1.5, "val/error": 0.3, "time/steps": 1.0},
    ]
    path = tmp_path / "curves.png"
    curves.draw_curves(rows, path, "title")
    assert drawn() == {
        "loss": [([1], [2.0]), ([2], [0.9]), ([2], [1.5])],
        "error (%)": [([1, 2], [50.0, 25.0]), ([2], [20.0]), ([2], [30.0])],
    }
    assert os.listdir(tmp_path) == ["curves.png"]
    height, width, _ = image.imread(path).shape
    assert (width, height) == (1440, 600)


@pytest.mark.parametrize(("last", "scale"), [(0.021, "linear"), (0.019, "log")])
def test_losses_over_two_decades_are_logarithmic(tmp_path, monkeypatch, last, scale):
    scales = []
    axvline = Axes.axvline
    monkeypatch.setattr(
        Axes,
        "axvline",
        lambda self, x, **style: (
            scales.append((self.get_ylabel(), x, self.get_yscale())),
            axvline(self, x, **style),
        ),
    )
    rows = [
        {"step": 1, "val/loss": 2.0, "val/error": 0.5, "train/learning_rate": 0.1},
        {"step": 2, "val/loss": last, "val/error": 0.0, "train/learning_rate": 0.01},
    ]
    curves.draw_curves(rows, tmp_path / "curves.png")
    assert scales == [("loss", 1, scale), ("error (%)", 1, "linear")]


def test_nothing_to_draw(tmp_path):
    with pytest.raises(ValueError, match="no loss and no error"):
        curves.draw_curves([{"step": 1}], tmp_path / "curves.png")
    assert os.listdir(tmp_path) == []


def test_importing_curves_does_not_import_matplotlib():
    code = "import sys, cvjax.report.curves; assert 'matplotlib' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)

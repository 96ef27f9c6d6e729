"""Committed results have the shape that experiments/runner.py describes."""

import json
import pathlib

import pytest

from experiments import runner

ROOT = pathlib.Path(__file__).parents[1]
EXPERIMENTS = {path.parent.name for path in ROOT.glob("experiments/*/__main__.py")}
FILES = {
    str(path.relative_to(ROOT)): path
    for path in ROOT.glob("results/*/*.json")
    if path.parent.name in EXPERIMENTS
}
# Runs made of several: what `read_run` gives is in their parts.
PARTS = {"multilevel": "levels", "cascade": "members"}


@pytest.mark.parametrize("name", FILES)
def test_shape(name):
    results = json.loads(FILES[name].read_text())
    assert results.keys() >= set(runner.RESULTS)
    assert results["experiment"] == FILES[name].parent.name
    assert results["table"]
    for run in results["runs"]:
        assert "seed" in run
        if results["experiment"] in PARTS:
            assert run[PARTS[results["experiment"]]]
        else:
            assert run.keys() >= {*runner.PROVENANCE, "seconds"}

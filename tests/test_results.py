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


def means(node):
    """All {"mean", "std", ...} of a table."""
    if isinstance(node, dict):
        return [node] if "mean" in node else means(list(node.values()))
    return [row for part in node for row in means(part)] if isinstance(node, list) else []


@pytest.mark.parametrize("name", FILES)
def test_means_and_claims_have_intervals(name):
    results = json.loads(FILES[name].read_text())
    for mean in means(results["table"]):
        if mean["std"] is None:  # of a single value
            assert mean["interval"] is None
            continue
        low, high = mean["interval"]
        assert low <= mean["mean"] <= high
    for claim in results["claims"]:
        assert {"df", "n"} <= claim.keys()
        if claim["p"] is None:  # nothing varies
            assert claim["interval"] is None
            continue
        low, high = claim["interval"]
        assert low < claim["difference"] < high
        assert (claim["p"] < 0.05) == (not low <= 0 <= high)

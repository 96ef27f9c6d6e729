"""Noisy and shifted test images: what the pixels become, and what is claimed of nets."""

import numpy as np
import pytest

from cvjax.errors import UserError
from cvjax.training import default_config, train_and_evaluate
from experiments.odenet_vs_resnet import finished_runs, robustness


def test_a_shift_moves_each_image_to_one_side_and_brings_in_zeros():
    images = np.random.default_rng(0).integers(1, 256, (40, 6, 7, 2), np.uint8)
    moved = robustness.corrupt(images, "shift", 2)
    candidates = []
    for axis in (1, 2):
        for by in (2, -2):
            rolled = np.roll(images, by, axis)
            edge = [slice(None)] * 4
            edge[axis] = slice(0, 2) if by > 0 else slice(-2, None)
            rolled[tuple(edge)] = 0
            candidates.append(rolled)
    same = np.array([(moved == one).all(axis=(1, 2, 3)) for one in candidates])
    assert (same.sum(axis=0) == 1).all()  # each image is exactly one of the four
    assert same.any(axis=1).all()  # and each side is drawn
    assert moved.dtype == np.uint8


@pytest.mark.parametrize("amount", robustness.NOISE)
def test_noise_has_its_standard_deviation_and_stays_within_grey_values(amount):
    images = np.full((40, 28, 28, 1), 127, np.uint8)
    noisy = robustness.corrupt(images, "noise", amount)
    assert noisy.dtype == np.uint8
    assert abs(np.median(noisy) - 127) < 2
    # Quartiles, as clipping leaves them alone: 0.6745 standard deviations from the middle.
    low, high = np.percentile(noisy.astype(float), (25, 75))
    assert (high - low) / (2 * 0.6745) == pytest.approx(amount, rel=0.03)
    np.testing.assert_array_equal(noisy, robustness.corrupt(images, "noise", amount))


def run(name, seed, error):
    conditions = [
        {"kind": kind, "amount": amount, "error": error + number, "calibration": 0.0}
        for number, (kind, amount) in enumerate(robustness.CONDITIONS)
    ]
    return {"name": name, "seed": seed, "conditions": conditions}


def test_nets_are_compared_seed_by_seed_where_they_have_the_same_seeds():
    runs = [run("a", 1, 0.3), run("a", 0, 0.1), run("b", 0, 0.11), run("b", 1, 0.33)]
    clean = next(c for c in robustness.contrasts(runs, "a") if c["of"] == "error")
    assert clean["paired"] and clean["kind"] == "clean"
    # Differences 0.01 and 0.03: their mean, and t = 2 with one degree of freedom.
    assert clean["difference"] == pytest.approx(0.02)
    assert clean["p"] == pytest.approx(0.2952, abs=1e-4)
    assert not robustness.contrasts([*runs, run("b", 2, 0.2)], "a")[0]["paired"]
    table = robustness.tabulate(runs)
    assert len(table) == 2 * len(robustness.CONDITIONS)
    assert table[0]["error"]["mean"] == pytest.approx(0.2) and table[0]["n"] == 2


def test_clean_images_give_the_errors_of_the_summary(tmp_path):
    config = default_config("mlp")
    config.total_steps, config.optim.schedule = 3, "constant"
    summary = train_and_evaluate(config, tmp_path / "run")
    (tmp_path / "cache").mkdir()
    found = robustness.measure(tmp_path / "run", 10_000, tmp_path / "cache")
    assert [(row["kind"], row["amount"]) for row in found] == list(robustness.CONDITIONS)
    assert found[0]["error"] == summary["test/error"]
    assert found[4]["error"] > found[0]["error"]  # the strongest noise
    assert all(0 <= row["calibration"] <= 1 for row in found)


def test_runs_that_are_not_finished_are_refused(tmp_path):
    config = default_config("mlp")
    config.total_steps, config.optim.schedule = 2, "constant"
    train_and_evaluate(config, tmp_path)
    finished_runs.check_run(tmp_path)
    (tmp_path / "summary.json").unlink()
    with pytest.raises(UserError, match="not finished"):
        finished_runs.check_run(tmp_path)

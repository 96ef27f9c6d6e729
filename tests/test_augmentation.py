"""Augmentations one by one: what is drawn is what training draws, tables, one small run."""

import dataclasses
import json
from functools import partial

import jax
import numpy as np
import pytest
import scipy.stats

from cvjax.data import augment
from cvjax.data.augment import Augmentation
from cvjax.data.colors import augment_colors, compute_color_axes
from cvjax.data.normalize import compute_statistics
from cvjax.models import create_model
from cvjax.report.tables import percent
from cvjax.training import default_config, loop, steps
from cvjax.training.config import parse_config
from cvjax.training.recipe import Recipe
from cvjax.training.state import create_train_state
from experiments.augmentation import __main__ as experiment

IMAGES = np.random.default_rng(0).integers(1, 256, size=(20, 8, 8, 3)).astype(np.uint8)
NOTHING = Augmentation(crop_padding=0, flip=False)


def drawn(name, images=IMAGES[:2]):
    config = experiment.with_augmentation(
        experiment.medium(), experiment.augmentations(8)[name], 0
    )
    return experiment.draw(images, IMAGES, config)


# The settings


def test_each_augmentation_is_alone():
    """Whatever the config that it is put into has."""
    changed = {}
    for name, settings in experiment.augmentations(32).items():
        for config in (experiment.quick(), experiment.medium(), experiment.full()):
            own = experiment.with_augmentation(config, settings, 3)
            assert own.seed == 3
            augmentation = parse_config(own).data.augmentation
        asked, default = (dataclasses.asdict(x) for x in (augmentation, NOTHING))
        changed[name] = {key for key in asked if asked[key] != default[key]}
    scale = {"scale_min", "scale_max"}
    assert changed == {
        "none": set(),
        "crop": {"crop_padding"},
        "flip": {"flip"},
        "vertical flip": {"vertical_flip"},
        "scale": scale,
        **{name: {name} for name in ("brightness", "contrast", "lighting")},
        "crop and flip": {"crop_padding", "flip"},
    }
    covered = set().union(*changed.values())
    left = {"saturation", "hue"}  # for stains and light that training does not have
    assert covered == {field.name for field in dataclasses.fields(Augmentation)} - left


def test_training_sets_are_small():
    sizes = {"quick": 1_497, "medium": 50_000}
    left = {}
    for name, size in sizes.items():
        config = experiment.PRESETS[name].config()
        left[name] = size - config.data.val_examples
        assert config.data.batch_size <= left[name]
    assert left == {"quick": 300, "medium": 5_000}


# The pictures


def test_no_augmentation_shows_the_image():
    seen = drawn("none")
    assert seen.shape == (2, experiment.DRAWS, 8, 8, 3)
    wanted = np.broadcast_to(IMAGES[:2, None] / 255, seen.shape)
    np.testing.assert_allclose(seen, wanted, atol=1e-6)


def test_flips_show_the_image_or_its_mirror():
    seen, images = drawn("flip", IMAGES), IMAGES[:, None] / 255
    same, mirrored = (
        np.isclose(seen, x, atol=1e-6).all(axis=(2, 3, 4))
        for x in (images, images[:, :, :, ::-1])
    )
    assert (same ^ mirrored).all() and 30 < mirrored.sum() < 90


@pytest.mark.parametrize("name", ["crop", "scale", "brightness", "contrast", "lighting"])
def test_no_two_draws_are_alike(name):
    seen = drawn(name)
    assert seen.min() >= 0 and seen.max() <= 1
    for draws in seen:
        assert len(np.unique(draws.reshape(experiment.DRAWS, -1), axis=0)) > 1


def test_pictures_are_what_training_draws():
    """Composed here from the parts, with the keys that a step folds."""
    settings = {"crop_padding": 1, "flip": True, "brightness": 0.4, "lighting": 0.1}
    augmentation = dataclasses.replace(NOTHING, **settings)
    statistics = compute_statistics(IMAGES, "channel")
    axes = compute_color_axes(IMAGES)
    rng = jax.random.key(5)
    constants = steps.Constants(rng, statistics, axes)
    images = augment_colors(
        jax.random.fold_in(rng, 3), IMAGES.astype(np.float32) / 255, augmentation, axes
    )
    images = (images - statistics.mean[None]) / statistics.std[None]
    wanted = augment.augment(rng, images, augmentation)
    draw = jax.jit(steps.training_images, static_argnames="augmentation")
    seen = draw(rng, IMAGES, constants, augmentation=augmentation)
    np.testing.assert_allclose(seen, wanted, rtol=1e-5, atol=1e-6)


def test_a_step_trains_on_the_function_that_the_pictures_show(monkeypatch):
    class Called(Exception):
        pass

    def instead(rng, images, constants, augmentation):
        assert images.shape == (20, 8, 8, 3) and augmentation == NOTHING
        raise Called

    monkeypatch.setattr(steps, "training_images", instead)
    run = parse_config(default_config("mlp"))
    model = create_model(num_classes=3, **run.model)
    recipe = Recipe(model, run.optim, run.total_steps, run.loss, NOTHING)
    state = create_train_state.eval_shape(
        jax.random.key(0), recipe=recipe, image_shape=(8, 8, 3)
    )
    constants = steps.Constants(jax.random.key(0), compute_statistics(IMAGES, "none"))
    batch = {"image": IMAGES, "label": np.zeros(20, np.int32)}
    with pytest.raises(Called):
        jax.eval_shape(
            partial(steps.train_step.__wrapped__, recipe=recipe), state, batch, constants
        )


# The table, and a run


def test_table_by_hand():
    def run(name, seed, error):
        summary = dict.fromkeys(experiment.ERRORS, error)
        return {"augmentation": name, "seed": seed, "summary": summary}

    runs = [run("none", 0, 0.1), run("flip", 1, 0.3), run("none", 1, 0.2)]
    none, flip = experiment.tabulate(runs)
    assert (none["augmentation"], none["n"]) == ("none", 2)
    assert none["val/error"]["mean"] == pytest.approx(0.15)
    assert none["test/error"]["std"] == pytest.approx(0.005**0.5)
    assert (flip["train_eval/error"]["mean"], flip["train_eval/error"]["std"]) == (
        0.3,
        None,
    )
    assert percent(flip["test/error"]) == "30.00"
    for claim in experiment.contrasts(runs):
        assert (claim["augmentation"], claim["against"]) == ("flip", "none")
        assert claim["difference"] == pytest.approx(0.1)  # of seed 1
        assert claim["p"] is None  # of a single seed
    runs += [run("flip", 0, 0.25)]
    validation, test = experiment.contrasts(runs)
    assert (validation["error"], test["error"]) == ("val/error", "test/error")
    assert test["p"] == pytest.approx(scipy.stats.ttest_rel([0.25, 0.3], [0.1, 0.2]).pvalue)


def test_names_tell_the_size():
    choices = experiment.augmentations(32)
    texts = [experiment.describe(name, choices[name]) for name in choices]
    assert texts == [
        *("none", "crop, padded by 4", "flip", "vertical flip", "scale, to 32-40 px"),
        *("brightness, ±40%", "contrast, ±40%", "lighting, 0.1", "crop and flip"),
    ]


def test_experiment_compares_and_does_nothing_twice(tmp_path, monkeypatch, capsys):
    config = default_config("mlp")
    config.update(total_steps=2, eval_every=2, checkpoint_every=2)
    config.optim.schedule = "cosine"
    config.model.widths = (3,)
    choices = {"none": {}, "crop": {"crop_padding": 1}}
    monkeypatch.setattr(experiment, "augmentations", lambda side: choices)
    experiment.compare(config, "quick", (2, 5), [0], tmp_path)
    first = capsys.readouterr().out
    assert f"Figure:  {tmp_path / 'augmentation.png'}" in first
    assert (tmp_path / "augmentation.png").stat().st_size > 10_000
    results = json.loads((tmp_path / "results.json").read_text())
    assert [run["config"]["data"]["crop_padding"] for run in results["runs"]] == [0, 1]
    assert results["train_examples"] == 1_197
    assert [row["n"] for row in results["table"]] == [1, 1]
    assert [claim["augmentation"] for claim in results["claims"]] == ["crop"] * 2
    for key in ("versions", "device", "git", "command"):
        assert results["runs"][0][key]

    monkeypatch.setattr(loop, "train", None)  # would be called, and fail
    experiment.compare(config, "quick", (2, 5), [0], tmp_path)
    assert capsys.readouterr().out == first

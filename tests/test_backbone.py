"""A detector that starts from a classifier: which layers it takes, and what is refused."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import traverse_util

from cvjax.data.normalize import Statistics
from cvjax.errors import UserError
from cvjax.files import write_json
from cvjax.models import SAME_EQUATION, create_model
from cvjax.storage import checkpoint
from cvjax.storage.inputs import write_inputs
from cvjax.training import default_config, transfer
from cvjax.training.config import parse_config
from cvjax.training.recipe import create_recipe
from cvjax.training.state import Record, create_train_state, create_variables, initial_rng
from cvjax.training.trained_network import Network

BACKBONE = {"depth": 18, "width": 2, "stem": "small"}
CLASSES = ("ant", "cat")


OTHERS = {
    "resnet_cifar": {"depth": 8, "shortcut": "B", "width": 2},
    "vgg": {"depth": 11, "width": 2},
}


def write_classifier(folder, name="resnet", fields=BACKBONE):
    """The workdir of a classifier of ten classes of grey images, as an import writes it."""
    config = default_config(name)
    config.model.update(fields)
    recipe = create_recipe(parse_config(config), 10)
    variables = create_variables(
        initial_rng(3), model=recipe.model, image_shape=(32, 32, 1)
    )
    model = {key: config.model[key] for key in config.model if key not in SAME_EQUATION}
    record = Record(data_fingerprint="none", model=model)
    checkpoint.save(folder, 0, variables, dataclasses.asdict(record))
    mean, deviation = (np.full((32, 32, 1), value, "f4") for value in (0.25, 0.5))
    write_inputs(folder, Statistics(mean, deviation), tuple("0123456789"))
    write_json(folder / "config.json", {"config": config.to_dict()})
    return folder


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    """Of the backbone that detectors have by default."""
    return write_classifier(tmp_path_factory.mktemp("classifier"))


def detector(name, **fields):
    """Its name and fields, and its state as drawn, for images of 16 x 16 pixels."""
    config = default_config(name)
    config.model.update({**BACKBONE, "features": 2, **fields})
    run = parse_config(config)
    recipe = create_recipe(run, len(CLASSES))
    state = create_train_state(initial_rng(7), recipe=recipe, image_shape=(16, 16, 1))
    return run.model, state


def flat(params, batch_stats):
    tree = {"params": params, "batch_stats": batch_stats}
    return jax.device_get(traverse_util.flatten_dict(tree, sep="/"))


SMALL = {"backbone": "resnet_cifar", "depth": 8, "width": 2, "features": 2}


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("yolo", {**SMALL, "stride": 4}),
        ("fcn", {"width": 2, "stem": "small", "stride": 2}),
        pytest.param("centernet", {"width": 2, "features": 2}, marks=pytest.mark.slow),
        pytest.param("unet", {"width": 2, "levels": 1}, marks=pytest.mark.slow),
    ],
)
def test_layers_of_classes_are_reinitialised_where_there_are_others(name, fields):
    config = default_config(name)
    config.model.update(fields)
    run = parse_config(config)

    def create(names):
        recipe = create_recipe(run, len(names))
        shape = (16, 16, 1)
        state = create_train_state(
            initial_rng(len(names)), recipe=recipe, image_shape=shape
        )
        variables = {"params": state.params, "batch_stats": state.batch_stats}
        statistics = Statistics(np.zeros(shape, "f4"), np.ones(shape, "f4"))
        return state, Network(run, recipe, variables, statistics, names, 0, "")

    _, source = create(tuple("abc"))
    drawn, _ = create(tuple("abcde"))
    state = transfer.start_from(drawn, source, "there", run.model, tuple("abcde"))
    ours, theirs, new = (
        flat(**variables)
        for variables in (
            {"params": state.params, "batch_stats": state.batch_stats},
            source.variables,
            {"params": drawn.params, "batch_stats": drawn.batch_stats},
        )
    )
    heads = {path for path in ours if new[path].shape != theirs[path].shape}
    assert heads and len(heads) < len(ours) / 2
    for path in ours:
        np.testing.assert_array_equal(ours[path], (new if path in heads else theirs)[path])


@pytest.mark.parametrize(
    ("name", "fields", "stages"),
    [
        ("yolo", {"stride": 2}, 2),
        pytest.param("centernet", {}, 4, marks=pytest.mark.slow),
    ],
)
def test_a_detector_takes_the_layers_of_stem_and_stages(
    classifier, tmp_path, name, fields, stages
):
    model, drawn = detector(name, **fields)
    source = transfer.load_source(classifier, model, tmp_path)
    state = transfer.start_from(drawn, source, str(classifier), model, CLASSES)
    theirs = flat(**source.variables)
    before = flat(drawn.params, drawn.batch_stats)
    after = flat(state.params, state.batch_stats)
    assert before.keys() == after.keys()
    modules = {path.split("/")[1] for path in after}
    assert f"stage{stages}" in modules and f"stage{stages + 1}" not in modules
    for path, array in after.items():
        is_backbone = path.split("/")[1].startswith(("stem", "stage"))
        wanted = (theirs if is_backbone else before)[path]
        np.testing.assert_array_equal(array, wanted, err_msg=path)
    assert not np.array_equal(
        before["params/stem_conv/kernel"], after["params/stem_conv/kernel"]
    )


@pytest.mark.parametrize("backbone", OTHERS)
def test_other_backbones(backbone, tmp_path):
    its_own = {"batch_norm": True, "hidden": 2} if backbone == "vgg" else {}
    place = write_classifier(tmp_path, backbone, OTHERS[backbone] | its_own)
    fields = {"stem": "imagenet", **OTHERS[backbone], "stride": 4}
    model, drawn = detector("yolo", backbone=backbone, **fields)
    source = transfer.load_source(place, model, tmp_path / "run")
    state = transfer.start_from(drawn, source, str(place), model, CLASSES)
    theirs, ours = flat(**source.variables), flat(state.params, state.batch_stats)
    before = flat(drawn.params, drawn.batch_stats)
    shared = [path for path in ours if "/head" not in path]
    assert len(shared) == len(ours) - 7  # a convolution with BatchNorm, a dense layer
    for path in ours:
        kept = theirs if path in shared else before
        np.testing.assert_array_equal(ours[path], kept[path], err_msg=path)


def test_a_classifier_of_other_layers_is_refused(tmp_path):
    place = write_classifier(tmp_path, "vgg", OTHERS["vgg"] | {"hidden": 2})
    fields = {"stem": "imagenet", **OTHERS["vgg"], "stride": 4}
    model, _ = detector("yolo", backbone="vgg", **fields)
    with pytest.raises(UserError, match=r"of another network \(model.batch_norm"):
        transfer.load_source(place, model, tmp_path / "run")
    model, _ = detector("yolo", stride=2)
    with pytest.raises(UserError, match=r"set model\.backbone to 'vgg' for its layers"):
        transfer.load_source(place, model, tmp_path / "run")


def test_its_normalisation_can_be_taken_for_images_of_another_size(classifier, tmp_path):
    model, _ = detector("yolo", stride=2)
    statistics = transfer.load_source(classifier, model, tmp_path).statistics
    larger = transfer.statistics_like(statistics, (16, 16, 1))
    assert larger.mean.shape == (16, 16, 1)
    assert (np.asarray(larger.mean) == 0.25).all() and (np.asarray(larger.std) == 0.5).all()


def test_another_backbone_is_refused(classifier, tmp_path):
    with pytest.raises(UserError, match=r"of another network \(model.width.*2.*4"):
        transfer.load_source(
            classifier,
            {**BACKBONE, "name": "yolo", "stride": 4, "width": 4},
            tmp_path,
        )


def test_pictures_with_other_channels_are_refused(classifier, tmp_path):
    model, _ = detector("yolo", stride=2)
    source = transfer.load_source(classifier, model, tmp_path)
    fields = {key: model[key] for key in model if key != "name"}
    net = create_model("yolo", len(CLASSES), **fields)
    variables = jax.eval_shape(
        lambda: net.init(jax.random.key(0), np.zeros((1, 16, 16, 3)), train=False)
    )
    _, drawn = detector("yolo", stride=2)
    drawn = drawn.replace(params=variables["params"], batch_stats=variables["batch_stats"])
    with pytest.raises(UserError, match=r"stem_conv/kernel is \(3, 3, 1, 2\)"):
        transfer.start_from(drawn, source, str(classifier), model, CLASSES)

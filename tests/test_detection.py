"""Detection as a task: average precision by hand and by COCO's code, and whole runs."""

import json
from functools import partial

import jax
import numpy as np
import pytest
from jax import numpy as jnp
from PIL import Image

from cvjax import data
from cvjax.data import boxes
from cvjax.data.boxes import Boxes
from cvjax.data.dataset import ArraySplit, Dataset
from cvjax.data.image_files import seen_part
from cvjax.errors import UserError
from cvjax.evaluation import picture_boxes
from cvjax.evaluation.detection import Found, detect_split
from cvjax.tasks import detection, ranking
from cvjax.training import default_config, metrics, steps, train_and_evaluate
from cvjax.training.trained_network import load_network

CLASSES = 3
SQUARE = np.array([0.0, 0, 10, 10])


class Told:
    """A detector whose outputs [batch, n, 6] are corners, class and score."""

    num_classes = CLASSES

    def decode(self, outputs):
        kinds = outputs[..., 4].astype(jnp.int32)
        found = Boxes(outputs[..., :4], kinds, jnp.ones(kinds.shape, bool))
        return found, outputs[..., 5]


sum_batch = jax.jit(partial(metrics.sum_batch, task=detection.TASK, model=Told()))


def values_of(outputs, targets, mask=None):
    mask = np.ones(len(outputs), bool) if mask is None else np.array(mask)
    losses = np.zeros(len(outputs), np.float32)
    sums = sum_batch(losses, np.float32(outputs), targets, mask)
    count = int(mask.sum())
    return metrics.means([sums], CLASSES, "x", count, detection.TASK)


def test_average_precision_by_hand():
    """Class 0: 0.9 right, 0.8 wrong, 0.7 right, of three boxes; class 1: none of one."""
    targets = np.stack(
        [
            boxes.pack([SQUARE, SQUARE + 20], [0, 1], 3),
            boxes.pack([SQUARE, SQUARE + 20], [0, 0], 3),
        ]
    )
    outputs = [
        [[*SQUARE, 0, 0.9], [*SQUARE + 40, 0, 0.8]],
        [[*SQUARE + 20, 0, 0.7], [*SQUARE + 50, 1, 0.95]],
    ]
    # Up to a recall of 1/3 a precision of 1, up to 2/3 of 2/3, then 0: of 101 recalls 34
    # are in the first part and 33 in the second. Class 2 does not occur.
    first = (34 * 1 + 33 * 2 / 3) / 101
    values = values_of(outputs, targets)
    assert values["x/ap50"] == pytest.approx(first / 2)
    assert values["x/error"] == pytest.approx(1 - first / 2)


def test_nothing_found_and_nothing_there():
    empty = np.zeros((1, 2, 5), np.float32)
    output = [[[*SQUARE, 0, 0.9]]]
    assert values_of(output, empty)["x/ap50"] == 0
    there = boxes.pack([SQUARE], [1], 2)[None]
    assert values_of(output, there)["x/ap50"] == 0
    assert values_of([[[*SQUARE, 1, 0.1]]], there)["x/ap50"] == pytest.approx(1)


def test_masked_images_do_not_count():
    there = boxes.pack([SQUARE], [1], 2)
    targets = np.stack([there, np.zeros_like(there)])
    outputs = [[[*SQUARE, 1, 0.5]], [[*SQUARE, 1, 0.9]]]
    assert values_of(outputs, targets)["x/ap50"] == pytest.approx(0.5)
    assert values_of(outputs, targets, [True, False])["x/ap50"] == pytest.approx(1)


def test_bins_of_scores():
    scores = np.float32([0.0, 0.0005, 0.5, 0.9995, 1.0, 0.3])
    kinds = np.array([0, 0, 1, 1, 1, 0])
    counted = np.array([True, True, True, True, True, False])
    count_scores = jax.jit(ranking.count_scores, static_argnums=3)
    counts = np.asarray(count_scores(scores, kinds, counted, 2))
    assert (counts[0, 0], counts[1, 500], counts[1, 999], counts.sum()) == (2, 1, 2, 5)


# Whole runs


def few_scenes(name="scenes"):
    rng = np.random.default_rng(0)
    images = rng.integers(60, size=(24, 32, 32, 1)).astype(np.uint8)
    targets = np.zeros((24, 3, 5), np.float32)
    for image, target in zip(images, targets, strict=True):
        x, y = rng.integers(0, 20, 2)
        kind = int(rng.integers(2))
        image[y : y + 12, x : x + 12] = (150, 250)[kind]
        target[0] = [x, y, x + 12, y + 12, kind + 1]
    split = ArraySplit(images, targets)
    return Dataset(name, split, split, split, ("grey", "white"), "scenes")


def create_config(**settings):
    config = default_config("yolo")
    config.model.update(backbone="resnet_cifar", depth=8, stride=4)
    config.model.update(width=4, features=4, max_detections=5)
    config.total_steps = 6
    config.eval_every = 3
    config.log_every = 3
    config.checkpoint_every = 3
    config.data.name = "scenes"
    config.data.batch_size = 8
    config.data.eval_batch_size = 10
    config.data.crop_padding = 4
    config.data.flip = True
    config.optim.name = "adamw"
    config.optim.learning_rate = 0.01
    config.update_from_flattened_dict(settings)
    return config


@pytest.fixture(autouse=True)
def scenes(monkeypatch):
    real = data.load

    def load(name, **options):
        return few_scenes() if name == "scenes" else real(name, **options)

    monkeypatch.setattr(data, "load", load)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "load", lambda name, **options: few_scenes())
        summary = train_and_evaluate(create_config(), folder)
    return folder, summary


def test_a_run_and_its_numbers(run):
    _, summary = run
    assert summary["step"] == 6 and np.isfinite(summary["test/loss"])
    assert summary["test/error"] == 1 - summary["test/ap50"]
    assert summary["test/ap50"] == summary["val/ap50"]


def test_a_stopped_run_goes_on_bit_for_bit(run, check_resumed):
    check_resumed(create_config(), *run, 3)


def test_images_with_other_numbers_of_boxes_are_not_compiled_again(run):
    network, split = load_network(run[0]), few_scenes().test
    compiled = []

    def count(event, *_, **__):
        if event.endswith("backend_compile_duration"):
            compiled.append(event)

    detect_split(network, split, 8)
    jax.monitoring.register_event_duration_secs_listener(count)
    for boxes_there in (0, 1, 3):
        labels = np.zeros_like(split.labels)
        labels[:, :boxes_there] = split.labels[:, :1]
        detect_split(network, ArraySplit(split.images, labels), 8)
        assert not compiled


def test_the_batch_size_of_an_evaluation_does_not_matter(run):
    network = load_network(run[0])
    values = [
        steps.evaluate(
            *(network.variables["params"], network.variables["batch_stats"]),
            few_scenes().test,
            network.statistics,
            recipe=network.recipe,
            batch_size=batch_size,
            prefix="x",
        )
        for batch_size in (5, 24)
    ]
    assert values[0]["x/ap50"] == values[1]["x/ap50"]
    assert values[0]["x/loss"] == pytest.approx(values[1]["x/loss"], rel=1e-5)


def test_boxes_go_back_from_the_crop_to_the_picture():
    # Of a picture of 96x64 pixels the middle 64x64 were seen, at half the size.
    part = seen_part((96, 64), (32, 32, 1), None)
    assert part == (16, 0, 80, 64)
    found = Found(np.array([[0.0, 8, 32, 16]]), np.array([1]), np.array([0.5]))
    (box,) = picture_boxes.place(found, part, (32, 32, 1)).corners
    assert box.tolist() == [16, 16, 80, 32]


def test_predict_draws_boxes_and_says_where_they_are(run, tmp_path, call_program):
    network, picture = load_network(run[0]), tmp_path / "wide.png"
    scene = few_scenes().test.images[0, ..., 0]
    wide = np.pad(scene, [(0, 0), (10, 6)])  # the middle 32 of 48 columns are seen
    Image.fromarray(wide).save(picture)
    content = picture.read_bytes()
    found = picture_boxes.locate(network, wide[:, 8:40, None])
    threshold = float(np.sort(found.scores)[-2]) - 1e-6
    program = ("-m", "cvjax.predict", f"--workdir={run[0]}", f"--threshold={threshold}")
    done = call_program(*program, "--json", picture)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    kept = found.scores >= threshold
    assert len(said["boxes"]) == kept.sum() >= 2
    for box, corners, kind, score in zip(
        said["boxes"],
        found.corners[kept],
        found.classes[kept],
        found.scores[kept],
        strict=True,
    ):
        assert box["class"] == ("grey", "white")[kind]
        assert box["score"] == pytest.approx(score, rel=1e-5)
        assert box["box"] == pytest.approx(
            (corners + np.array([8, 0, 8, 0])).tolist(), abs=0.02
        )
    assert said["drawn"] == str(tmp_path / "wide_boxes.png")
    drawn = Image.open(said["drawn"])
    assert drawn.width / drawn.height == 48 / 32 and drawn.height >= 400 - 32
    pixels = np.asarray(drawn.convert("RGB")).astype(int)
    assert (pixels.max(axis=-1) - pixels.min(axis=-1)).max() > 100  # colours on a grey one
    assert picture.read_bytes() == content
    table = call_program(*program, "--nodraw", picture).stdout.splitlines()
    assert table[0] == str(picture) and len(table) == 1 + len(said["boxes"])


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (
            {"task": "classification"},
            "task is 'classification'.* 'yolo' is a network for detection",
        ),
        ({"loss.label_smoothing": 0.1}, "label_smoothing is 0.1, but a detector's loss"),
        ({"data.name": "digits"}, "task is 'detection', but digits has one class of each"),
    ],
)
def test_what_does_not_fit_together(settings, sentence, tmp_path):
    with pytest.raises(UserError, match=sentence):
        train_and_evaluate(create_config(**settings), tmp_path)


def test_a_classifier_is_no_detector_and_boxes_are_no_single_class(tmp_path):
    config = default_config("mlp")
    config.task = "detection"
    with pytest.raises(
        UserError, match=r"'mlp' is a network for .* choose one of centernet, yolo"
    ):
        train_and_evaluate(config, tmp_path)
    config.task = "classification"
    config.data.name = "scenes"
    config.data.batch_size = 8
    with pytest.raises(
        UserError, match="has boxes of each image; set task to 'multilabel'"
    ):
        train_and_evaluate(config, tmp_path)
    config.task = "multilabel"
    with pytest.raises(
        UserError, match=r"loss.name is 'softmax', but with task 'multilabel'"
    ):
        train_and_evaluate(config, tmp_path)


def test_several_labels_are_trained_from_boxes(tmp_path):
    config = default_config("mlp")
    config.task, config.loss.name = "multilabel", "sigmoid"
    config.model.widths = (8,)
    config.total_steps = 4
    config.data.name = "scenes"
    config.data.batch_size = 8
    summary = train_and_evaluate(config, tmp_path)
    assert {"test/mean_ap", "test/micro_f1", "test/macro_f1"} <= summary.keys()

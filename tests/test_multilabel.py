"""Several classes per image: metrics by hand and by scikit-learn, and a whole run."""

import json

import jax
import numpy as np
import pytest
from jax import numpy as jnp
from PIL import Image
from sklearn import metrics as sklearn_metrics

from cvjax import data, evaluate
from cvjax.data import boxes
from cvjax.data.dataset import ArraySplit, Dataset
from cvjax.evaluation import picture_classes
from cvjax.evaluation.multilabel import best_threshold
from cvjax.models import create_model
from cvjax.tasks import multilabel
from cvjax.training import default_config, metrics, train_and_evaluate
from cvjax.training.losses import LossConfig
from cvjax.training.trained_network import load_network

CLASSES = 3
MODEL = create_model("mlp", num_classes=CLASSES, widths=())
TASK = multilabel.TASK


def sums_of(logits, targets, mask=None):
    logits, targets = jnp.asarray(logits, jnp.float32), jnp.asarray(targets)
    mask = jnp.ones(len(logits), bool) if mask is None else jnp.asarray(mask)
    losses = TASK.losses(MODEL, logits, targets, LossConfig(name="sigmoid"))
    return metrics.sum_batch(losses, logits, targets, mask, task=TASK, model=MODEL)


def logit(p):
    return np.log(p) - np.log1p(-np.asarray(p))


def test_four_images_by_hand():
    scores = [[0.9, 0.2, 0.6], [0.8, 0.3, 0.1], [0.1, 0.7, 0.4], [0.2, 0.1, 0.7]]
    there = [[1, 0, 1], [0, 1, 0], [0, 1, 0], [1, 0, 0]]
    values = metrics.means([sums_of(logit(scores), there)], CLASSES, "val", 4, TASK)
    # The first and the third are wholly right.
    assert values["val/error"] == 0.5
    # Class 0: hit at 0.9, miss at 0.8, then the other at 0.2: (1 + 2 / 3) / 2. Class 1: 0.7
    # and 0.3 are first. Class 2: 0.7 is wrong, 0.6 is right.
    assert values["val/mean_ap"] == pytest.approx((5 / 6 + 1 + 1 / 2) / 3)
    # Named at one half: 3 of 5 rightly, and there are 5.
    assert values["val/micro_f1"] == pytest.approx(2 * 3 / (5 + 5))
    each = [2 * 1 / (2 + 2), 2 * 1 / (1 + 2), 2 * 1 / (2 + 1)]
    assert values["val/macro_f1"] == pytest.approx(np.mean(each))
    p = np.where(there, scores, 1 - np.array(scores))
    assert values["val/loss"] == pytest.approx(-np.log(p).sum(axis=1).mean(), rel=1e-6)


def test_metrics_equal_scikit_learns():
    rng = np.random.default_rng(0)
    there = rng.integers(2, size=(400, CLASSES))
    # In the middle of bins of their own or shared: ties are ties to both.
    scores = (rng.integers(1000, size=there.shape) // (2 - there) + 0.5) / 1000
    sums = sums_of(logit(scores), there)
    values = metrics.means([sums], CLASSES, "x", 400, TASK)
    average = sklearn_metrics.average_precision_score(there, scores, average="macro")
    assert values["x/mean_ap"] == pytest.approx(average, abs=1e-6)
    named = scores >= 0.5
    for kind in ("micro", "macro"):
        f1 = sklearn_metrics.f1_score(there, named, average=kind)
        assert values[f"x/{kind}_f1"] == pytest.approx(f1)
    error = 1 - sklearn_metrics.accuracy_score(there, named)
    assert values["x/error"] == pytest.approx(error)


def test_boxes_are_taken_for_their_classes():
    logits = np.array([[1.0, -2, 0.5]])
    targets = boxes.pack([[0, 0, 1, 1]] * 3, [2, 0, 2], 4)[None]
    ours, hot = sums_of(logits, targets), sums_of(logits, [[1, 0, 1]])
    jax.tree.map(np.testing.assert_array_equal, ours, hot)


def test_sums_do_not_depend_on_batches_or_padding():
    rng = np.random.default_rng(1)
    logits, there = rng.normal(size=(20, CLASSES)), rng.integers(2, size=(20, CLASSES))
    whole = metrics.means([sums_of(logits, there)], CLASSES, "x", 20, TASK)
    first = sums_of(logits[:12], there[:12])
    filled = np.concatenate([logits[12:], np.full((4, CLASSES), np.nan)])
    rest = sums_of(filled, np.pad(there[12:], [(0, 4), (0, 0)]), np.arange(12) < 8)
    parts = metrics.means([first, rest], CLASSES, "x", 20, TASK)
    assert parts.pop("x/loss") == pytest.approx(whole.pop("x/loss"), rel=1e-6)
    assert parts == whole
    added = metrics.add(metrics.add(TASK.zero_sums(CLASSES), first), rest)
    np.testing.assert_array_equal(added.right, first.right + rest.right)


# Whole runs


def few_images(name, **options):
    """Noise, with a bright quarter for each class that is there; some have none."""
    rng = np.random.default_rng(0)
    images = rng.integers(80, size=(40, 8, 8, 1)).astype(np.uint8)
    labels = rng.integers(2, size=(40, CLASSES)).astype(np.uint8)
    for image, there in zip(images, labels, strict=True):
        for k in np.flatnonzero(there):
            image[4 * (k // 2) :, 4 * (k % 2) :][:4, :4] += 120
    parts = [ArraySplit(images[k::3], labels[k::3]) for k in range(3)]
    return Dataset(name, *parts, ("a", "b", "c"), "few")


def create_config(seed=0):
    config = default_config("mlp")
    config.task, config.loss.name, config.seed = "multilabel", "sigmoid", seed
    config.model.widths = (8,)
    config.total_steps = 60
    config.eval_every = config.checkpoint_every = config.log_every = 20
    config.data.name = "few"
    config.data.batch_size, config.data.eval_batch_size = 5, 5
    return config


@pytest.fixture(autouse=True)
def few(monkeypatch):
    monkeypatch.setattr(data, "load", few_images)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "load", few_images)
        return folder, train_and_evaluate(create_config(), folder)


def test_a_stopped_run_goes_on_bit_for_bit(run, check_resumed):
    check_resumed(create_config(), *run, 20)


def test_evaluation_equals_scikit_learns_at_the_threshold_of_validation(run):
    folder, summary = run
    results = evaluate.evaluate(folder)
    network, dataset = load_network(folder), few_images("few")

    def scores_of(split):
        return np.stack([picture_classes.predict(network, image) for image in split.images])

    def f1(scores, threshold, kind, there):
        return sklearn_metrics.f1_score(there, scores >= threshold, average=kind)

    validated, there = scores_of(dataset.val), dataset.val.labels
    thresholds = np.arange(1, 1000) / 1000
    best = max(f1(validated, t, "micro", there) for t in thresholds)
    threshold = results["threshold"]
    assert f1(validated, threshold, "micro", there) == pytest.approx(best)
    scores, there = scores_of(dataset.test), dataset.test.labels
    for kind in ("micro", "macro"):
        expected = f1(scores, threshold, kind, there)
        assert results[f"{kind}_f1"] == pytest.approx(expected)
    right = ((scores >= threshold) == there).all(axis=1).mean()
    assert results["subset_accuracy"] == pytest.approx(right)
    average = sklearn_metrics.average_precision_score(there, scores, average="macro")
    assert results["mean_ap"] == pytest.approx(average) and average > 0.7
    assert results["loss"] == summary["test/loss"]
    assert evaluate.evaluate(folder, batch_size=13)["micro_f1"] == results["micro_f1"]


def test_the_best_threshold_of_scores_by_hand():
    there = np.array([[True], [True], [False], [False]])
    # Two right and one wrong from 0.4 on, one and none above: F1 of 0.8 and 2 / 3.
    scores = np.array([[0.9], [0.4], [0.6], [0.1]])
    assert best_threshold(scores, there) == pytest.approx((0.101 + 0.4) / 2, abs=1e-3)
    # Two ranges are equally good, and between them is none.
    scores, there = np.array([[0.8, 0.6], [0.5, 0.2]]), np.array([[1, 0], [0, 1]], bool)
    found = best_threshold(scores, there)
    assert 0.6 < found <= 0.8 or 0 < found <= 0.2


def test_a_picture_gets_all_its_names(run, tmp_path, call_program):
    network, test = load_network(run[0]), few_images("few").test
    scores = np.stack([picture_classes.predict(network, image) for image in test.images])
    several = int((scores >= 0.5).sum(axis=1).argmax())
    Image.fromarray(test.images[several, ..., 0]).save(tmp_path / "several.png")
    program = ("-m", "cvjax.predict", f"--workdir={run[0]}", tmp_path / "several.png")
    for flags, threshold in (
        ([], 0.5),
        (["--threshold=0.05"], 0.05),
        (["--threshold=1"], 1),
    ):
        done = call_program(*program, "--json", *flags)
        assert done.returncode == 0, done.stderr
        said = {row["class"]: row["probability"] for row in json.loads(done.stdout)["top"]}
        named = dict(zip("abc", scores[several].tolist(), strict=True))
        expected = {name: p for name, p in named.items() if p >= threshold}
        assert said == pytest.approx(expected)
    assert (scores[several] >= 0.5).sum() >= 2

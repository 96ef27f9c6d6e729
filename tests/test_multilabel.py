"""Several classes per image: metrics by hand and by scikit-learn, and a whole run."""

import jax
import numpy as np
import pytest
from jax import numpy as jnp
from sklearn import metrics as sklearn_metrics

from cvjax.data import boxes
from cvjax.models import create_model
from cvjax.tasks import multilabel
from cvjax.training import metrics
from cvjax.training.losses import LossConfig

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

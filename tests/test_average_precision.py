"""COCO's average precision: a case by hand, and the original code where it is installed."""

from functools import partial

import jax
import numpy as np
import pytest
from jax import numpy as jnp

from cvjax.data import boxes
from cvjax.data.boxes import Boxes
from cvjax.evaluation.detection import Found, average_precisions
from cvjax.tasks import detection, ranking

SQUARE = np.array([0.0, 0, 10, 10])


def found(*rows):
    """Of (corners, class, score)."""
    corners = np.array([row[0] for row in rows]).reshape(-1, 4)
    kinds, scores = (np.array([row[k] for row in rows]) for k in (1, 2))
    return Found(corners, kinds.astype(int), scores.astype(float))


def test_a_case_by_hand():
    """Class 0 has three boxes: found at 0.9 wholly, missed at 0.8, found at 0.7 with an
    overlap of 0.6. Class 1 has one, which is large and not found; class 2 has none."""
    wanted = [
        found((SQUARE, 0, 1), (SQUARE * 10 + 100, 1, 1)),
        found((SQUARE, 0, 1), (SQUARE + 30, 0, 1)),
    ]
    detections = [
        found((SQUARE, 0, 0.9), (SQUARE + 60, 0, 0.8)),
        found((np.array([0.0, 0, 10, 6]), 0, 0.7), (SQUARE + 70, 2, 0.99)),
    ]
    precisions = average_precisions(detections, wanted, 3)
    # Of 101 recalls 34 are up to 1/3, where precision is 1, and 33 up to 2/3, where it is
    # 2/3; the second match counts up to an overlap of 0.6, the third of ten.
    full, first = (34 + 33 * 2 / 3) / 101, 34 / 101
    assert precisions.by_class == [pytest.approx(full), 0, None]
    assert precisions.ap50 == pytest.approx(full / 2)
    assert precisions.ap75 == pytest.approx(first / 2)
    assert precisions.ap == pytest.approx((3 * full + 7 * first) / 10 / 2)
    small = precisions.by_size["small"]
    assert small == pytest.approx((3 * full + 7 * first) / 10)
    assert precisions.by_size == {"small": small, "medium": None, "large": 0}
    assert np.isnan(precisions.curves[:, 2]).all()
    np.testing.assert_allclose(
        precisions.curves[[0, 33, 34, 66, 67], 0], [1, 1, 2 / 3, 2 / 3, 0]
    )


def random_images(seed=0, count=30, classes=3):
    """True boxes, and detections that are often near them; scores of their own."""
    rng = np.random.default_rng(seed)
    wanted, detections = [], []
    unused = (rng.permutation(1000) + 0.5) / 1000  # no two in one bin
    for _ in range(count):
        n, m = rng.integers(0, 6), rng.integers(0, 9)
        low = rng.uniform(0, 90, (n, 2))
        corners = np.concatenate([low, low + rng.uniform(5, 40, (n, 2))], axis=1)
        wanted.append(Found(corners, rng.integers(classes, size=n), np.ones(n)))
        near = rng.uniform(0, 60, (m, 4))
        near[:, 2:] += near[:, :2] + 5
        kinds = rng.integers(classes, size=m)
        if n:
            which = rng.integers(n, size=m)
            near = corners[which] + rng.normal(0, 2, (m, 4))
            kinds = np.where(rng.uniform(size=m) < 0.8, wanted[-1].classes[which], kinds)
        near = near.astype(np.float32).astype(float)
        scores, unused = unused[:m], unused[m:]
        order = np.argsort(-scores)
        detections.append(Found(near[order], kinds[order], scores[order]))
    return detections, wanted


def test_nothing_found_at_all():
    _, wanted = random_images()
    nothing = [found()] * len(wanted)
    assert average_precisions(nothing, wanted, 3).ap == 0


def test_the_original_code_agrees():
    pycocotools = pytest.importorskip("pycocotools.coco")
    from pycocotools.cocoeval import COCOeval

    detections, wanted = random_images()
    ours = average_precisions(detections, wanted, 3)

    def rows(images):
        rows = [
            {
                **{"image_id": k, "category_id": int(kind), "score": float(score)},
                **{"bbox": [*box[:2], *(box[2:] - box[:2])], "iscrowd": 0},
                "area": float(np.prod(box[2:] - box[:2])),
            }
            for k, image in enumerate(images)
            for box, kind, score in zip(
                image.corners, image.classes, image.scores, strict=True
            )
        ]
        return [{"id": number, **row} for number, row in enumerate(rows, start=1)]

    truth = pycocotools.COCO()
    truth.dataset = {
        "images": [{"id": k} for k in range(len(wanted))],
        "categories": [{"id": k} for k in range(3)],
        "annotations": rows(wanted),
    }
    truth.createIndex()
    theirs = COCOeval(truth, truth.loadRes(rows(detections)), "bbox")
    theirs.evaluate()
    theirs.accumulate()
    theirs.summarize()
    sizes = [ours.by_size[size] for size in ("small", "medium", "large")]
    sizes = [-1 if size is None else size for size in sizes]
    np.testing.assert_allclose([ours.ap, ours.ap50, ours.ap75, *sizes], theirs.stats[:6])


def test_sums_on_the_device_agree_where_no_scores_share_a_bin():
    detections, wanted = random_images(seed=1)
    ours = average_precisions(detections, wanted, 3)

    def pad(image, scores):
        packed = boxes.pack(image.corners, image.classes, 10)
        return packed, np.pad(scores, (0, 10 - len(scores)))

    targets = np.stack([pad(image, image.scores)[0] for image in wanted])
    packed = [pad(image, image.scores) for image in detections]
    there = boxes.unpack(jnp.asarray(np.stack([rows for rows, _ in packed])))
    scores = jnp.asarray(np.stack([scores for _, scores in packed]), jnp.float32)

    class Detector:
        num_classes = 3

        def decode(self, outputs):
            return Boxes(there.corners, there.classes, there.mask), scores

    sum_batch = jax.jit(partial(detection.TASK.sum_batch, Detector()))
    sums = sum_batch(jnp.zeros(30), scores, jnp.asarray(targets), jnp.ones(30, bool))
    values = detection.TASK.means(sums, 3)
    assert values["ap50"] == pytest.approx(ours.ap50, abs=1e-6)


def test_interpolation_by_hand():
    right, wrong = np.zeros(ranking.BINS), np.zeros(ranking.BINS)
    right[[900, 500]], wrong[[800, 100]] = 1, 2
    # 1 of 1, 1 of 3, 2 of 4, 2 of 6: from the right the best is 1/2 up to a recall of 2/4.
    assert ranking.interpolated_precision(right, wrong, 4) == pytest.approx(
        (26 * 1 + 25 * 0.5) / 101
    )
    assert ranking.average_precision(right, wrong, 4) == pytest.approx(0.25 + 0.25 / 2)

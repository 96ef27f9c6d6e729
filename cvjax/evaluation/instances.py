"""Objects out of a map of outside, inside and border, and how many are right.

A network names the pixels (see `data.label_maps`). The depth of a pixel is its distance to
what is not inside; where it is greatest in its surroundings is the seed of an object, and a
watershed (scikit-image) gives each pixel of the foreground to a seed. So objects that touch
come apart along their borders, and where the network sees none, at their waist.
"""

import numpy as np
from scipy import ndimage

from cvjax.data.label_maps import BORDER, INSIDE, OUTSIDE, SMALLEST
from cvjax.evaluation.detection import Precisions, coco_precisions

THRESHOLDS = np.arange(0.5, 1, 0.05)  # of the overlap
SMOOTHING = 2.0  # pixels, the standard deviation: uneven outlines make no objects
HEIGHT = 0.5  # pixels by which a seed is deeper than the way to a deeper one
MOST = 1_000  # objects of an image that count in average precision


def separate(probabilities: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The objects of a picture.

    Args:
      probabilities: [height, width, 3], of outside, inside and border.

    Returns:
      int32 [height, width], 0 for the ground and 1 to n for the objects; float64 [n], of
      each the mean probability of its pixels not to be outside.
    """
    # Imported here: half a second, for the few who need it.
    from skimage.measure import label
    from skimage.morphology import local_maxima, reconstruction
    from skimage.segmentation import watershed

    foreground = probabilities[..., OUTSIDE] < 0.5
    inside = foreground & (probabilities[..., INSIDE] > probabilities[..., BORDER])
    # Beyond the picture's edge is nothing.
    depths = ndimage.distance_transform_edt(np.pad(inside, 1))[1:-1, 1:-1]
    depths = ndimage.gaussian_filter(depths, SMOOTHING)
    tops = inside & local_maxima(reconstruction(depths - HEIGHT, depths))
    pieces = label(inside, connectivity=1)
    low = inside & ~np.isin(pieces, pieces[tops])  # alone, but hardly deeper than nothing
    seeds = label(tops | low, connectivity=2)
    numbers = watershed(-depths, seeds, mask=foreground)
    # What is border alone has no seed.
    rest = label(foreground & (numbers == 0), connectivity=1)
    numbers = np.where(rest > 0, rest + seeds.max(), numbers)
    sizes = np.bincount(numbers.ravel())
    kept = sizes >= SMALLEST
    kept[0] = False
    numbers = np.where(kept, np.cumsum(kept), 0)[numbers].astype(np.int32)
    sums = np.bincount(numbers.ravel(), (1 - probabilities[..., OUTSIDE]).ravel())
    return numbers, (sums / np.bincount(numbers.ravel()).clip(min=1))[1:]


def overlaps(true: np.ndarray, found: np.ndarray) -> np.ndarray:
    """Intersection over union of each true object with each found one.

    Args:
      true, found: numbers [height, width], 0 for the ground.

    Returns:
      float64 [n, m], by number, of the numbers that occur.
    """
    ours, theirs = (
        np.unique(numbers, return_inverse=True)[1].reshape(-1) for numbers in (true, found)
    )
    sizes = ours.max() + 1, theirs.max() + 1
    common = np.bincount(ours * sizes[1] + theirs, minlength=sizes[0] * sizes[1])
    common = common.reshape(sizes)
    union = common.sum(axis=1)[:, None] + common.sum(axis=0) - common
    rows, columns = (int((numbers == 0).any()) for numbers in (true, found))
    return (common / union)[rows:, columns:]


def bowl_score(true: np.ndarray, found: np.ndarray) -> float:
    """The score of the Data Science Bowl 2018 for one picture.

    The mean over `THRESHOLDS` of TP / (TP + FP + FN), where an object counts as found if
    one overlaps it by more than the threshold; 1 if there is none and none is found.
    """
    pairs = overlaps(true, found)
    total = sum(pairs.shape)
    if not total:
        return 1.0
    # Above one half an object has one partner at most.
    hits = np.array([(pairs > threshold + 1e-9).sum() for threshold in THRESHOLDS])
    return float((hits / (total - hits)).mean())


def mask_precisions(
    found: list[tuple[np.ndarray, np.ndarray]], true: list[np.ndarray]
) -> Precisions:
    """COCO's average precisions of masks, all of one class.

    Args:
      found: of each picture, see `separate`.
      true: numbers of each picture, 0 for the ground.
    """
    from faster_coco_eval.core import mask

    def rows(numbers, scores, image):
        kinds = np.unique(numbers[numbers > 0])
        for kind, score in zip(kinds, scores, strict=True):
            pixels = np.asfortranarray(numbers == kind, np.uint8)
            yield {
                **{"image_id": image, "category_id": 0, "score": float(score)},
                **{"segmentation": mask.encode(pixels), "area": float(pixels.sum())},
            }

    ours = [row for k, pair in enumerate(found) for row in rows(*pair, k)]
    theirs = [
        row
        for k, numbers in enumerate(true)
        for row in rows(numbers, np.ones(len(np.unique(numbers[numbers > 0]))), k)
    ]
    return coco_precisions(ours, theirs, len(true), 1, "segm", MOST)

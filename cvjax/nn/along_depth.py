"""How weights differ along depth, and states from each other."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from flax import traverse_util

from cvjax.nn import depth


def stage_kernels(params: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The convolutions of each residual stage, a row per block: [blocks, weights].

    Only kernels: BatchNorm's scales and biases start as ones and zeros in all blocks.
    """
    rows = {}
    for path, leaf in sorted(traverse_util.flatten_dict(dict(params)).items()):
        if depth.BLOCKS in path and path[-1] == "kernel":
            flat = np.asarray(leaf, np.float64).reshape(len(leaf), -1)
            rows.setdefault(path[0], []).append(flat)
    return {stage: np.concatenate(parts, axis=1) for stage, parts in rows.items()}


def weight_change(theta: np.ndarray) -> float:
    """Mean over l of |theta[l + 1] - theta[l]| / |theta[l]|, for theta [blocks, weights].

    About sqrt(2) for blocks drawn independently of each other, and proportional to
    1 / blocks for a smooth function of depth that is sampled more and more finely.
    """
    return float(_changes(theta).mean())


def largest_change(theta: np.ndarray) -> float:
    """As `weight_change`, the largest over l: a smooth function of depth has no jump."""
    return float(_changes(theta).max())


def distance_moved(theta: np.ndarray, start: np.ndarray) -> float:
    """Mean over l of |theta[l] - start[l]| / |start[l]|, both [blocks, weights]."""
    moved, size = (np.linalg.norm(x, axis=1) for x in (theta - start, start))
    return float((moved / size).mean())


def relative_distance(x: np.ndarray, limit: np.ndarray) -> float:
    """|x - limit| / |limit|, Euclidean, for each image (the first axis); their mean."""
    axes = tuple(range(1, x.ndim))
    difference, size = (np.sqrt((y**2).sum(axis=axes)) for y in (x - limit, limit))
    return float((difference / size).mean())


def _changes(theta: np.ndarray) -> np.ndarray:
    change, size = (np.linalg.norm(x, axis=1) for x in (np.diff(theta, axis=0), theta[:-1]))
    return change / size

"""What a run reads before it starts: its data set, and the network that it starts from."""

import pathlib

import jax
import numpy as np

from cvjax import data
from cvjax.data.augment import compute_color_axes
from cvjax.data.normalize import Statistics, compute_statistics
from cvjax.data.streaming import StreamedSplit
from cvjax.training import transfer
from cvjax.training.config import RunConfig, check_data
from cvjax.training.trained_network import Network

# So many training images of a stream are taken for all of them, to normalise.
SAMPLE = 1_000


def load_data(run: RunConfig, folder: pathlib.Path, resumes: bool):
    """The network to start from (None without), the data set, and what it is like.

    Returns:
      (network, data set, statistics, axes of colour or None).
    """
    source = None
    if run.init_from and not resumes:
        source = transfer.load_source(run.init_from, run.model, folder, run.init_refine)
    dataset = data.load(**run.data.source)
    check_data(run, len(dataset.train), dataset.image_shape)
    if isinstance(dataset.train, StreamedSplit):
        # While an evaluation reads its batches, those of the training stay ready.
        rows = run.data.batch_size + run.data.eval_batch_size
        dataset.train.check_shared_memory(rows // jax.process_count())
        images = dataset.train.sample_images(SAMPLE)
    else:
        images = dataset.train.images
    statistics = _statistics(run, images, source, folder)
    color_axes = compute_color_axes(images) if run.data.lighting else None
    return source, dataset, statistics, color_axes


def _statistics(
    run: RunConfig, images: np.ndarray, source: Network | None, folder: pathlib.Path
) -> Statistics:
    if run.data.normalization != transfer.NORMALIZATION:
        return compute_statistics(images, run.data.normalization)
    if source is None:
        return transfer.own_statistics(folder)
    return transfer.statistics_like(source.statistics, images.shape[1:])

"""What a run reads before it starts: its data set, and the network that it starts from."""

import pathlib

import jax
import numpy as np

from cvjax import data
from cvjax.data.colors import compute_color_axes
from cvjax.data.dataset import Dataset
from cvjax.data.normalize import Statistics, compute_statistics
from cvjax.data.streaming import StreamedSplit
from cvjax.errors import UserError
from cvjax.files import user_path
from cvjax.tasks import TASKS
from cvjax.training import transfer
from cvjax.training.config_checks import check_data
from cvjax.training.settings import RunConfig
from cvjax.training.trained_network import Network

# What the targets of an image are, by the rank of a batch of them.
TARGETS = {1: "one class", 2: "several classes", 3: "boxes", 4: "label maps"}
# So many training images of a stream are taken for all of them, to normalise.
SAMPLE = 1_000


def refuse_own_data(run: RunConfig, folder: pathlib.Path) -> None:
    """Raises UserError if a run would write among the pictures that it reads."""
    if run.data.name not in data.OWN or not run.data.data_dir:
        return
    own = user_path(run.data.data_dir, "data.data_dir").resolve()
    if folder.resolve().is_relative_to(own):
        raise UserError(
            f"--workdir {folder} lies in data.data_dir {run.data.data_dir}, whose files "
            "the run reads; choose a --workdir outside of it."
        )


def load_data(run: RunConfig, folder: pathlib.Path, resumes: bool):
    """The network to start from (None without), the data set, and what it is like.

    Returns:
      (network, data set, statistics, axes of colour or None).
    """
    source = None
    if run.init_from and not resumes:
        source = transfer.load_source(run.init_from, run.model, folder, run.init_refine)
    dataset = data.load(**run.data.source)
    check_dataset(run, dataset)
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


def check_dataset(run: RunConfig, dataset: Dataset) -> None:
    """Raises UserError if settings, or the task, do not fit the data set."""
    check_data(run, len(dataset.train), dataset.image_shape)
    rank = dataset.train.target_rank
    if rank not in TASKS[run.task].ranks:
        fitting = [name for name, task in TASKS.items() if rank in task.ranks]
        raise UserError(
            f"task is {run.task!r}, but {dataset.name} has {TARGETS[rank]} of each image; "
            f"set task to {' or '.join(map(repr, fitting))}, or choose another data set."
        )

"""Batches of training images from several sources, ready to be trained on.

See `benchmarks.data`. Each is an endless iterator; without augmentation where its name says
"host", with it (pad by 4, crop of the original size, flip) otherwise.
"""

import itertools
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from PIL import Image, ImageOps

from cvjax.data import augment
from cvjax.data.augment import Augmentation
from cvjax.data.dataset import ArraySplit, train_batch
from cvjax.data.normalize import compute_statistics, normalize

PADDING = 4


def create(
    split: ArraySplit, batch_size: int, workers: list[int]
) -> tuple[dict[str, Iterator], dict[str, str]]:
    """The iterators by name; and what is missing, with the reason."""
    sources = {
        "cvjax, host": host_batches(split, batch_size),
        "cvjax, augmented": augmented_batches(split, batch_size),
    }
    missing = {}
    try:
        import torch  # noqa: F401
    except ImportError:
        missing["PyTorch"] = "torch is not installed"
    else:
        sources["PyTorch, batch"] = torch_batches(split, batch_size)
        for count in workers:
            name = f"PyTorch, DataLoader, {count} workers"
            sources[name] = loader_batches(split, batch_size, count)
    try:
        import tensorflow  # noqa: F401
    except ImportError:
        missing["tf.data"] = "tensorflow is not installed"
    else:
        sources["tf.data"] = tf_batches(split, batch_size)
    return sources, missing


def host_batches(split: ArraySplit, batch_size: int) -> Iterator[Any]:
    """As training has them before they go to the device."""
    return (train_batch(split, batch_size, 0, step) for step in itertools.count())


def augmented_batches(split: ArraySplit, batch_size: int) -> Iterator[Any]:
    """And normalised, cropped and flipped, as in the training step."""
    augmentation = Augmentation(crop_padding=PADDING, flip=True)
    statistics = compute_statistics(split.images[:1000], "pixel_mean")

    @jax.jit
    def change(step, images):
        rng = jax.random.fold_in(jax.random.key(0), step)
        return augment.augment(rng, normalize(images, statistics), augmentation)

    for step, batch in enumerate(host_batches(split, batch_size)):
        yield jax.block_until_ready(change(step, batch["image"])), batch["label"]


def torch_batches(split: ArraySplit, batch_size: int) -> Iterator[Any]:
    """Rows of a tensor in a random order, augmented as one batch on JAX's device."""
    import torch

    from benchmarks import torch_nets

    device = torch_nets.pick_device(jax.default_backend())
    images = torch.from_numpy(np.array(split.images))
    labels = torch.from_numpy(np.array(split.labels))
    mean = torch.from_numpy(np.array(mean_image(split))).to(device)
    while True:
        order = torch.randperm(len(images))
        for rows in order.split(batch_size)[: len(order) // batch_size]:
            batch = images[rows].to(device)
            changed = torch_nets.augment(batch, mean, PADDING)
            torch_nets.synchronize(device)
            yield changed, labels[rows]


class Pictures:
    """A data set in PyTorch's sense, with torchvision's usual transforms of a picture."""

    def __init__(self, split: ArraySplit):
        self.images, self.labels = np.array(split.images), np.array(split.labels)
        self.mean = mean_image(split).transpose(2, 0, 1).copy()

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int):
        import torch

        array = self.images[index]
        picture = Image.fromarray(array[..., 0] if array.shape[-1] == 1 else array)
        padded = ImageOps.expand(picture, PADDING)
        left, top = torch.randint(0, 2 * PADDING + 1, (2,)).tolist()
        changed = padded.crop((left, top, left + picture.width, top + picture.height))
        if torch.rand(()) < 0.5:
            changed = ImageOps.mirror(changed)
        pixels = np.array(changed, np.uint8).reshape(array.shape)
        tensor = torch.from_numpy(pixels).permute(2, 0, 1).contiguous().float() / 255
        return tensor - torch.from_numpy(self.mean), int(self.labels[index])


def loader_batches(split: ArraySplit, batch_size: int, workers: int) -> Iterator[Any]:
    """PyTorch's DataLoader over `Pictures`."""
    from torch.utils.data import DataLoader

    loader = DataLoader(
        Pictures(split),
        batch_size,
        shuffle=True,
        drop_last=True,
        num_workers=workers,
        persistent_workers=workers > 0,
        # Forked workers would inherit JAX's threads.
        multiprocessing_context="spawn" if workers else None,
    )
    while True:
        yield from loader


def tf_batches(split: ArraySplit, batch_size: int) -> Iterator[Any]:
    """tf.data, image by image in parallel."""
    import tensorflow as tf

    tf.config.set_visible_devices([], "GPU")
    shape, mean = split.images.shape[1:], mean_image(split)
    padded = (shape[0] + 2 * PADDING, shape[1] + 2 * PADDING)

    def change(image, label):
        image = tf.image.convert_image_dtype(image, tf.float32) - mean
        image = tf.image.resize_with_crop_or_pad(image, *padded)
        image = tf.image.random_flip_left_right(tf.image.random_crop(image, shape))
        return image, label

    batches = tf.data.Dataset.from_tensor_slices((split.images, split.labels))
    batches = batches.shuffle(len(split.labels)).repeat()
    batches = batches.map(change, num_parallel_calls=tf.data.AUTOTUNE)
    return batches.batch(batch_size).prefetch(tf.data.AUTOTUNE).as_numpy_iterator()


def mean_image(split: ArraySplit) -> np.ndarray:
    """float32 [height, width, channels] in [0, 1]: the mean of the first thousand."""
    return split.images[:1000].mean(axis=0, dtype=np.float32) / 255

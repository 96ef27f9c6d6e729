"""Data sets by name: `load(name) -> Dataset`, and what happens to their images.

digits                       bundled with scikit-learn, needs no network
digit_scenes                 several of these digits on each image, with their boxes
digit_scenes/masks           the same scenes, with the class of each pixel
cifar10, cifar100, mnist     prepared on first use, without TensorFlow
folder                       your own pictures (`data.folder`)
npz                          your own arrays (`data.arrays`)
voc, coco                    your own pictures with boxes (`data.voc`, `data.coco`)
mask_folder                  your own pictures with label pictures (`data.mask_folder`)
mask_folder/instances        the same, labels being numbers of objects
any other TFDS name          if it is prepared already (`data.tfds`; with boxes, such as
                             voc/2007, `data.tfds_boxes`)

A set that does not fit in memory, or whose images differ in size, is streamed, with
`load(name, stream=StreamOptions(...))`.
"""

import dataclasses
import hashlib
import importlib
import re

from absl import logging

from cvjax.data import cache, tfds
from cvjax.data.arrays import load_npz
from cvjax.data.dataset import ArraySplit, Dataset, check_labels
from cvjax.data.digits import load_digits
from cvjax.data.folder import load_folder
from cvjax.data.names import (
    BOX_FOLDERS,
    BUNDLED,
    MASK_FOLDERS,
    OWN,
    TFDS_NAME,
    check_form,
    find_or_prepare,
)
from cvjax.data.records import open_stream
from cvjax.data.splits import check_val_examples, reduced, stratified
from cvjax.data.streaming import StreamOptions
from cvjax.errors import UserError

# He et al. 2015 train on 45,000 of CIFAR's 50,000 images and validate on the others.
VAL_EXAMPLES = {"cifar10": 5_000, "cifar100": 5_000, "mnist": 5_000}


def load(
    name: str,
    *,
    data_dir: str = "",
    cache_dir: str = "",
    val_examples: int = -1,
    train_examples: int = -1,
    shrink: int = 1,
    image_size: int = 224,
    resize: str = "crop",
    stretch: bool = False,
    stream: StreamOptions | None = None,
) -> Dataset:
    """Loads a data set, fixed in its splits: all seeds and all users have the same ones.

    Args:
      name: "digits", "digit_scenes", "digit_scenes/masks", "folder", "npz", "voc",
        "coco", "mask_folder", "mask_folder/instances", or a TFDS set's
        NAME[/CONFIG][:VERSION].
      data_dir: where prepared TFDS sets are; "" for $TFDS_DATA_DIR, or else
        ~/tensorflow_datasets. For "folder" the folder of pictures, see
        `data.folder_listing`; for "npz" the file, see `data.arrays`; for "voc", "coco"
        and "mask_folder" see there.
      cache_dir: where decoded images are kept; "" for the user's cache folder.
      val_examples: number of training images split off for validation, stratified by
        class; -1 for 300 of the digits, 5,000 of CIFAR and MNIST, a tenth of others. A
        folder is split by the names of its files: -1.
      train_examples: how many of the other training images are kept, stratified by class;
        -1 for all.
      shrink: the side of the squares of pixels whose mean becomes one pixel.
      image_size, resize: of a folder in memory, see `data.folder.load_folder`; of pictures
        with boxes, streamed ones too, see `data.box_pictures.to_dataset`; of "mask_folder"
        the side of its tiles.
      stretch: of "mask_folder", see `data.mask_folder.load_mask_folder`.
      stream: how the set is streamed, where nothing is cached; None for images in memory.

    Raises:
      UserError: if there is no such data set, it cannot be prepared, or its images do not
        fit this in-memory path, `train_examples` or `shrink`, or cannot be streamed.
    """
    if image_size < 1:
        raise UserError(f"data.image_size must be 1 or more, got {image_size}.")
    if stretch and name not in MASK_FOLDERS:
        raise UserError(
            f"data.stretch is for {' and '.join(MASK_FOLDERS)}, but data.name is {name!r}; "
            "set it to false."
        )
    if stream:
        for key, value, neutral in (
            ("train_examples", train_examples, -1),
            ("shrink", shrink, 1),
        ):
            if value != neutral:
                raise UserError(
                    f"data.{key} {value} is for images in memory; set it to {neutral}, or "
                    "data.streaming to false."
                )
    if name == "folder":
        if val_examples != -1:
            raise UserError(
                f"data.val_examples is {val_examples}, but a folder is split by the names "
                "of its files; set it to -1, or put pictures for validation into val/."
            )
        options = stream or StreamOptions(image_size, resize=resize)
        dataset = load_folder(data_dir, cache_dir, options, streamed=stream is not None)
        return dataset if stream else reduced(dataset, train_examples, shrink)
    boxes = _load_boxes(name, data_dir, image_size, resize, val_examples, stream)
    if boxes is not None:
        return boxes if stream else reduced(boxes, train_examples, shrink)
    if stream:
        return load_stream(name, stream, data_dir=data_dir, val_examples=val_examples)
    if resize != "crop":  # of a mask_folder too, whose pictures keep their size
        raise UserError(
            f"data.resize {resize!r} is for pictures of any size: a folder, or a stream; "
            "set it to 'crop'."
        )
    if name in MASK_FOLDERS:
        from cvjax.data.mask_folder import load_mask_folder  # Imports jax.

        if train_examples != -1:
            raise UserError(
                f"data.train_examples is {train_examples}, but of the pictures of {name} "
                "training sees tiles; set it to -1, and leave pictures out of the folder."
            )
        instances = name.endswith("instances")
        dataset = load_mask_folder(data_dir, image_size, val_examples, instances, stretch)
        return reduced(dataset, shrink=shrink)
    if name == "npz":
        return reduced(load_npz(data_dir, val_examples), train_examples, shrink)
    if name == "digits":
        return reduced(load_digits(val_examples), train_examples, shrink)
    if name in ("digit_scenes", "digit_scenes/masks"):
        if val_examples != -1:
            raise UserError(
                f"data.val_examples is {val_examples}, but digit_scenes has validation "
                "scenes of its own digits; set it to -1."
            )
        from cvjax.data.digit_scenes import load_digit_scenes  # Imports jax.

        dataset = load_digit_scenes(masks=name.endswith("masks"))
        return reduced(dataset, train_examples, shrink)
    decoded = _labelled(_load_tfds(name, data_dir, cache_dir), name)
    test = "test" if "test" in decoded.images else "validation"
    if "train" not in decoded.images or test not in decoded.images:
        raise UserError(
            f"{name} has the splits {', '.join(decoded.images)}; it takes train "
            "and test or validation."
        )
    labels = decoded.labels["train"]
    check_labels(labels, len(decoded.class_names), f"the train split of {name}")
    base = name.partition(":")[0]
    if val_examples == -1:
        val_examples = VAL_EXAMPLES.get(base, max(1, round(len(labels) / 10)))
    check_val_examples(val_examples, len(labels), name)
    val, train = stratified(labels, (val_examples, len(labels) - val_examples))
    images = decoded.images["train"]
    digest = hashlib.sha256(f"{base} {decoded.fingerprint}".encode())
    digest.update(val.tobytes())
    dataset = Dataset(
        name=base,
        train=ArraySplit(images[train], labels[train]),
        val=ArraySplit(images[val], labels[val]),
        test=ArraySplit(decoded.images[test], decoded.labels[test]),
        class_names=decoded.class_names,
        fingerprint=digest.hexdigest(),
    )
    return reduced(dataset, train_examples, shrink)


def _load_boxes(
    name: str,
    data_dir: str,
    image_size: int,
    resize: str,
    val_examples: int,
    stream: StreamOptions | None,
) -> Dataset | None:
    """The set of that name if it is one of pictures with boxes; None if not."""
    options = image_size, resize, val_examples, stream
    if name in BOX_FOLDERS:
        module = importlib.import_module(f"cvjax.data.{name}")  # Imports jax.
        return getattr(module, f"load_{name}")(data_dir, *options)
    if name in (*BUNDLED, *OWN) or not re.fullmatch(TFDS_NAME, name):
        return None
    source = tfds.find_source(name, tfds.resolve_data_dir(data_dir))
    if source is None or not tfds.has_boxes(source):
        return None
    from cvjax.data.tfds_boxes import load_boxes  # Imports jax.

    return load_boxes(source, *options)


def _labelled(decoded: tfds.Decoded, name: str) -> tfds.Decoded:
    """Without the splits whose labels are kept back: all -1, as in COCO's test split."""
    hidden = [split for split, labels in decoded.labels.items() if (labels == -1).all()]
    for split in hidden:
        logging.warning("The %s split of %s has no labels and is left out.", split, name)
    return dataclasses.replace(
        decoded,
        images={s: decoded.images[s] for s in decoded.images if s not in hidden},
        labels={s: decoded.labels[s] for s in decoded.labels if s not in hidden},
    )


def load_stream(
    name: str, options: StreamOptions, *, data_dir: str = "", val_examples: int = -1
) -> Dataset:
    """Opens a data set whose images are read, decoded and cropped while training.

    Args:
      name: a TFDS set's NAME[/CONFIG][:VERSION].
      options: see `streaming.StreamOptions`.
      data_dir: as in `load`.
      val_examples: number of training images split off for validation, not stratified; -1
        for 10,000, or a tenth if that is less.

    Raises:
      UserError: if there is no such data set, it cannot be prepared, or cannot be streamed
        with these options.
    """
    if name in (*BUNDLED, "npz"):
        raise UserError(
            f"{name} has no files to stream; set data.streaming=false, or name a TFDS set."
        )
    if name in MASK_FOLDERS:
        raise UserError(
            "pictures with label pictures cannot be streamed; set data.streaming=false."
        )
    source = find_or_prepare(name, tfds.resolve_data_dir(data_dir))
    return open_stream(source, val_examples, options)


def _load_tfds(name: str, data_dir: str, cache_dir: str) -> tfds.Decoded:
    folder = tfds.resolve_data_dir(data_dir)
    cache_folder = cache.resolve_cache_dir(cache_dir)
    check_form(name, folder)
    source = tfds.find_source(name, folder)
    if source is None:
        cached = cache.find_entry(name, cache_folder)
        if cached is not None:
            logging.info(
                "%s is not in %s; its images come from the cache %s, unchecked against "
                "any source.",
                *(name, folder, cache_folder),
            )
            return cached
        source = find_or_prepare(name, folder)
    return cache.read_or_decode(source, tfds.decode, cache_folder)

"""A prepared TFDS set of JPEG files as large as ImageNet's, made of two photographs."""

import functools
import io
import pathlib
from collections.abc import Iterable

import numpy as np
from PIL import Image

Examples = Iterable[tuple[bytes, int]]

CLASSES = ("china", "flower")
SIZES = ((500, 375), (500, 375), (375, 500))  # width, height


@functools.cache
def _photographs() -> list[Image.Image]:
    from sklearn.datasets import load_sample_images

    return [Image.fromarray(image) for image in load_sample_images().images]


def photograph(number: int, quality: int = 97) -> tuple[bytes, int]:
    """A JPEG file of one of SIZES, the same for the same number, and its class."""
    label = number % len(CLASSES)
    source = _photographs()[label]
    width, height = SIZES[number % len(SIZES)]
    rng = np.random.default_rng(number)
    # Portraits are taller than the photographs: those are enlarged a little.
    zoom = max(1.0, height / source.height) * rng.uniform(1.0, 1.1)
    room = np.array([source.width - width / zoom, source.height - height / zoom])
    left, top = room * rng.random(2)
    box = (left, top, left + width / zoom, top + height / zoom)
    image = source.resize((width, height), Image.Resampling.BICUBIC, box)
    file = io.BytesIO()
    image.save(file, "jpeg", quality=quality)
    return file.getvalue(), label


def write_set(
    folder: pathlib.Path,
    splits: dict[str, Examples],
    *,
    name: str = "photographs",
    channels: int = 3,
) -> pathlib.Path:
    """Writes a prepared set of encoded images with labels, and gives its folder."""
    import tensorflow_datasets as tfds

    class Photographs(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version("1.0.0")
        pkg_dir_path = folder  # where TFDS looks for texts that describe the set

        def _info(self):
            features = {
                "image": tfds.features.Image(shape=(None, None, channels)),
                "label": tfds.features.ClassLabel(names=CLASSES),
                "file_name": tfds.features.Text(),  # as ImageNet has
            }
            return tfds.core.DatasetInfo(
                builder=self,
                features=tfds.features.FeaturesDict(features),
                supervised_keys=("image", "label"),
            )

        def _split_generators(self, _):
            return {
                split: self._generate_examples(examples)
                for split, examples in splits.items()
            }

        def _generate_examples(self, examples):
            for i, (image, label) in enumerate(examples):
                file = io.BytesIO(image)
                yield i, {"image": file, "label": label, "file_name": f"{i}.jpg"}

    Photographs.name = name
    builder = Photographs(data_dir=folder, file_format="array_record")
    builder.download_and_prepare()
    return pathlib.Path(builder.data_dir)

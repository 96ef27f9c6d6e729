"""What an imported network takes in and distinguishes, from the command line."""

import dataclasses
import pathlib

from cvjax import data
from cvjax.checks import check_positive
from cvjax.data.dataset import read_class_names
from cvjax.errors import UserError
from cvjax.training import memory

# Mean and standard deviation of each channel, of images in [0, 1].
NORMALIZATIONS = {
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    "mnist": ((0.1307,), (0.3081,)),
    "symmetric": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    "none": ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
}

MOST_CLASSES = 1_000_000  # of an imported network: each has a name
SMALLEST_STD = 1e-6  # of images in [0, 1], which have steps of 1/255


@dataclasses.dataclass(frozen=True)
class Inputs:
    """What a network takes in, and the classes that it distinguishes.

    Attributes:
      image_shape: (height, width, channels).
      mean, std: of each channel, of images in [0, 1].
      class_names: one per class.
      dataset: the name of the data set it is evaluated on, or "".
      fingerprint: of that data set.
      resize: the short side that pictures are resized to before their centre is cropped,
        or 0 for as much of a picture as fits.
    """

    image_shape: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    class_names: tuple[str, ...]
    dataset: str = ""
    fingerprint: str = ""
    resize: int = 0


def create_inputs(values) -> Inputs:
    """The flags' word on what goes in and comes out.

    Raises:
      UserError: for flags that are missing or contradict each other.
    """
    given = bool(values.mean), bool(values.std)
    if given != (values.normalization is None,) * 2:
        raise UserError(
            "say how the network's images were normalised: --normalization="
            f"{'|'.join(NORMALIZATIONS)}, or --mean and --std of each channel."
        )
    if values.normalization is None:
        mean, std = _numbers("--mean", values.mean), _numbers("--std", values.std)
    else:
        mean, std = NORMALIZATIONS[values.normalization]
    if len(mean) != len(std) or not all(number >= SMALLEST_STD for number in std):
        raise UserError(
            f"--mean and --std take one number for each channel, --std of {SMALLEST_STD:g} "
            f"or more, got {mean} and {std}."
        )
    # No channel of images in [0, 1] has others; 1 is the --std of no normalisation.
    if not all(0 <= number <= 1 for number in mean) or max(std) > 1:
        raise UserError(
            f"--mean and --std are those of images in [0, 1], got {mean} and {std}; divide "
            "those of images in 0 to 255 by 255."
        )
    if values.dataset:
        given = (values.num_classes, values.class_names, values.image_size, values.resize)
        if any(given):
            raise UserError(
                "--dataset says what --num_classes, --class_names, --image_size and "
                "--resize say; give either it or them."
            )
        return _inputs_of_dataset(values.dataset, values.data_dir, mean, std)
    if values.data_dir:
        raise UserError("--data_dir is of no use without --dataset; leave it out.")
    if not values.num_classes or not values.image_size:
        raise UserError(
            "say what goes in and comes out: --dataset=NAME, or --num_classes and "
            "--image_size."
        )
    check_positive(num_classes=values.num_classes, image_size=values.image_size)
    if values.num_classes > MOST_CLASSES:
        raise UserError(
            f"--num_classes={values.num_classes} is more than {MOST_CLASSES:,}; give the "
            "number of classes that the file's last layer has."
        )
    size = values.image_size
    memory.check_fits(
        4 * len(mean) * size**2,
        f"--image_size={size}: an image of that size",
        "that of the network's own images",
    )
    names = tuple(str(number) for number in range(values.num_classes))
    if values.class_names:
        names = _read_class_names(values.class_names, values.num_classes)
    resize = values.resize or 0
    if resize and resize < size:
        raise UserError(
            f"--resize={resize} is the short side before the centre of --image_size={size} "
            "pixels is cropped; it must be at least as large."
        )
    return Inputs((size, size, len(mean)), mean, std, names, resize=resize)


def _inputs_of_dataset(name: str, data_dir: str, mean, std) -> Inputs:
    dataset = data.load(name, data_dir=data_dir)
    channels = dataset.image_shape[-1]
    if len(mean) != channels:
        raise UserError(
            f"images of {name} have channels: {channels}, the normalisation: {len(mean)}."
        )
    return Inputs(
        dataset.image_shape, mean, std, dataset.class_names, name, dataset.fingerprint
    )


def _read_class_names(path: str, count: int) -> tuple[str, ...]:
    names = read_class_names(pathlib.Path(path))
    if len(names) != count:
        raise UserError(
            f"{path} has {len(names)} lines and --num_classes is {count}: it takes one "
            "class name per line."
        )
    return names


def _numbers(flag: str, texts: list[str]) -> tuple[float, ...]:
    try:
        return tuple(float(text) for text in texts)
    except ValueError:
        raise UserError(f"{flag} takes numbers, got {','.join(texts)!r}.") from None

"""Every file in configs/, made small: a new one is tested on the day it arrives."""

import importlib
import pathlib

import numpy as np
import pytest

from cvjax import data
from cvjax.data.boxes import pack
from cvjax.data.dataset import ArraySplit, Dataset
from cvjax.training import train_and_evaluate
from cvjax.training.config import parse_config

ROOT = pathlib.Path(__file__).parents[1]
NAMES = sorted(path.stem for path in (ROOT / "configs").glob("*.py"))
SHAPES = {
    "digits": (8, 8, 1),
    "mnist": (28, 28, 1),
    "cifar10": (32, 32, 3),
    "imagenet2012": (32, 32, 3),  # small, like the networks
    "folder": (32, 32, 3),
    "digit_scenes": (32, 32, 1),
    "voc": (32, 48, 3),
    "digit_scenes/masks": (32, 32, 1),
    "mask_folder/instances": (32, 32, 3),
}
BOXES = ("digit_scenes", "voc")
MAPS = ("digit_scenes/masks", "mask_folder/instances")
LARGE = (
    "digits_odenet",
    "digit_scenes_centernet",
    "digit_scenes_fcn",
    "digit_scenes_multilabel",
    "digit_scenes_unet",
    "digit_scenes_yolo",
    "nuclei_fcn",
    "nuclei_unet",
    "voc_centernet",
    "voc_yolo",
    "mnist_odenet",
    "folder_finetune",
    "imagenet_resnet",
    "imagenet_vgg",
    "cifar10_vgg",
    "cifar10_odenet",
)  # seconds of compilation
SMALL = {
    "resnet_cifar": {"depth": 8, "width": 2},
    "odenet": {"width": 4, "solver": "euler", "steps": 1},
    "resnet": {"depth": 18, "width": 2},
    "vgg": {"depth": 11, "width": 2, "hidden": 4},
    "centernet": {"width": 2, "features": 2},
    "yolo": {"width": 2, "features": 2},
    "unet": {"width": 2, "levels": 2},
}


def load_config(name):
    return importlib.import_module(f"configs.{name}").get_config()


def fake_dataset(name):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (20, *SHAPES[name])).astype(np.uint8)
    labels = np.arange(20, dtype=np.int32) % 10
    if name in BOXES:
        labels = np.stack([pack([[3, 5, 20, 17]], [kind], 3) for kind in labels])
    if name in MAPS:
        labels = (images[..., :1] % 3).astype(np.uint8)
    split = ArraySplit(images, labels)
    return Dataset(name, split, split, split, tuple("0123456789"), "fake")


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.slow] * (name in LARGE)) for name in NAMES],
)
def test_config_trains(name, tmp_path, monkeypatch):
    config = load_config(name)
    monkeypatch.setattr(data, "load", lambda name, **kwargs: fake_dataset(name))
    config.total_steps = 10  # enough for all boundaries to lie inside
    config.optim.warmup_steps = min(config.optim.warmup_steps, 2)
    config.data.batch_size = 4
    config.data.eval_batch_size = 20
    config.train_eval_examples = min(config.train_eval_examples, 10)
    config.data.crop_padding = min(config.data.crop_padding, 8)
    config.model.update(SMALL.get(config.model.name, {}))
    if config.data.scale_max:
        side = SHAPES[config.data.name][0]
        config.data.update(image_size=side, scale_min=side, scale_max=side + 2)
    summary = train_and_evaluate(config, tmp_path)
    assert summary["step"] == 10
    assert np.isfinite(summary["test/loss"])


@pytest.mark.parametrize("name", NAMES)
def test_config_is_valid_as_it_stands(name):
    parse_config(load_config(name))


@pytest.mark.parametrize("name", NAMES)
def test_header_says_command_cost_and_expectation(name):
    text = importlib.import_module(f"configs.{name}").__doc__
    assert f"Command:  python train.py --config=configs/{name}.py --workdir=" in text
    assert "Cost:" in text
    assert "Expected:" in text

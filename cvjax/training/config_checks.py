"""What the values of a config may be, by themselves, together, and with the data."""

import dataclasses
import re
from typing import Any

from cvjax.checks import check_choice
from cvjax.command_line import LARGEST
from cvjax.data.normalize import NORMALIZATIONS
from cvjax.errors import UserError
from cvjax.files import is_pretrained, user_path
from cvjax.models import MODELS, TASK_MODELS
from cvjax.nn.norm import check_group
from cvjax.tasks import TASKS
from cvjax.training.losses import LOSSES
from cvjax.training.optim import DECAYED, OPTIMIZERS, SCHEDULES, boundary_steps
from cvjax.training.settings import DataConfig, RunConfig

LARGEST_FLOAT = 3.4028235e38  # of float32


def check_values(run: RunConfig) -> None:
    """Raises UserError for what no data can make right."""
    check_choice("task", run.task, tuple(TASKS))
    choices = (*NORMALIZATIONS, "init_from")
    if "num_classes" in run.model:
        raise UserError(
            "model.num_classes is not a setting: the data set says how many there are."
        )
    check_choice("data.normalization", run.data.normalization, choices)
    if run.data.normalization == "init_from" and not run.init_from:
        raise UserError(
            "data.normalization is 'init_from', but init_from is empty; name a workdir "
            "there, or choose another normalization."
        )
    if run.init_refine > 1 and not run.init_from:
        raise UserError(
            f"init_refine is {run.init_refine}, but init_from is empty; name the workdir "
            "of the network that is to be refined there."
        )
    _check_task(run)
    check_choice("optim.name", run.optim.name, OPTIMIZERS)
    if run.optim.nesterov and run.optim.name != "sgd":
        raise UserError(
            f"optim.nesterov is for optim.name 'sgd', got {run.optim.name!r}; set it to "
            "false."
        )
    check_choice("optim.schedule", run.optim.schedule, SCHEDULES)
    check_choice("optim.decayed", run.optim.decayed, DECAYED)
    check_choice("loss.name", run.loss.name, LOSSES)
    try:
        re.compile(run.optim.freeze)
    except re.error as error:
        raise UserError(
            f"optim.freeze {run.optim.freeze!r} is no regular expression ({error})."
        ) from error
    _check_numbers(dataclasses.asdict(run))
    _check_ranges(run)
    for name, path in (
        ("init_from", "" if is_pretrained(run.init_from) else run.init_from),
        ("data.data_dir", run.data.data_dir),
        ("data.cache_dir", run.data.cache_dir),
    ):
        if path:
            user_path(path, name)
    _check_stream(run.data, run.task)
    boundary_steps(run.optim, run.total_steps)


def own_task(model: str) -> str | None:
    """The task that a network is for alone; None for those that name images."""
    return next((task for task, names in TASK_MODELS.items() if model in names), None)


def _check_task(run: RunConfig) -> None:
    """Raises UserError for a model or a loss that is not for the task."""
    task = own_task(run.model["name"])
    if task != (run.task if run.task in TASK_MODELS else None):
        fitting = [name for name in MODELS if own_task(name) is None]
        fitting = sorted(TASK_MODELS.get(run.task, fitting))
        raise UserError(
            f"task is {run.task!r}, but model.name {run.model['name']!r} is a network for "
            f"{task or 'classification and multilabel'}; choose one of "
            f"{', '.join(fitting)}, or another task."
        )
    if run.task == "multilabel" and run.loss.name != "sigmoid":
        raise UserError(
            f"loss.name is {run.loss.name!r}, but with task 'multilabel' each class has a "
            "yes or a no of its own; set it to 'sigmoid'."
        )
    if run.task == "detection" and run.loss.label_smoothing:
        raise UserError(
            f"loss.label_smoothing is {run.loss.label_smoothing:g}, but a detector's loss "
            "is that of its paper; set it to 0."
        )
    if run.task == "segmentation":
        _check_segmentation(run)
    elif run.loss.dice_weight:
        raise UserError(
            f"loss.dice_weight is {run.loss.dice_weight:g}, but the task is {run.task!r}, "
            "and Dice is for segmentation; set it to 0."
        )


def _check_segmentation(run: RunConfig) -> None:
    if run.loss.name != "softmax":
        raise UserError(
            f"loss.name is {run.loss.name!r}, but with task 'segmentation' every pixel has "
            "one class; set it to 'softmax'."
        )
    if run.data.normalization == "pixel_mean":
        raise UserError(
            "data.normalization is 'pixel_mean', the mean of each place, but with task "
            "'segmentation' pictures may have any size; set it to 'channel' or 'none'."
        )


def _check_numbers(values: dict[str, Any], prefix: str = "") -> None:
    """Raises UserError for what is no number of 32 bits: nan, inf, 1e39, 10**10."""
    for key, value in values.items():
        if isinstance(value, dict):
            _check_numbers(value, f"{prefix}{key}.")
            continue
        for number in value if isinstance(value, list | tuple) else [value]:
            if isinstance(number, float) and not abs(number) <= LARGEST_FLOAT:
                raise UserError(
                    f"{prefix}{key} must be a finite number, of float32, got {number}."
                )
            if type(number) is int and abs(number) > LARGEST:
                raise UserError(f"{prefix}{key} must be at most {LARGEST:,}, got {number}.")


def _check_ranges(run: RunConfig) -> None:
    at_least = {
        "seed": (run.seed, 0),
        "total_steps": (run.total_steps, 1),
        "log_every": (run.log_every, 1),
        "eval_every": (run.eval_every, 1),
        "checkpoint_every": (run.checkpoint_every, 1),
        "keep_checkpoints": (run.keep_checkpoints, 1),
        "steps_per_dispatch": (run.steps_per_dispatch, 0),
        "train_eval_examples": (run.train_eval_examples, -1),
        "init_refine": (run.init_refine, 1),
        "data.shrink": (run.data.shrink, 1),
        "data.batch_size": (run.data.batch_size, 1),
        "data.eval_batch_size": (run.data.eval_batch_size, 1),
        "data.crop_padding": (run.data.crop_padding, 0),
        "data.scale_min": (run.data.scale_min, 0),
        "data.brightness": (run.data.brightness, 0),
        "data.contrast": (run.data.contrast, 0),
        "data.lighting": (run.data.lighting, 0),
        "data.saturation": (run.data.saturation, 0),
        "data.hue": (run.data.hue, 0),
        "optim.momentum": (run.optim.momentum, 0),
        "optim.weight_decay": (run.optim.weight_decay, 0),
        "optim.decay_factor": (run.optim.decay_factor, 0),
        "optim.warmup_steps": (run.optim.warmup_steps, 0),
        "optim.warmup_learning_rate": (run.optim.warmup_learning_rate, 0),
        "loss.label_smoothing": (run.loss.label_smoothing, 0),
        "loss.auxiliary_weight": (run.loss.auxiliary_weight, 0),
        "loss.kinetic_weight": (run.loss.kinetic_weight, 0),
        "loss.dice_weight": (run.loss.dice_weight, 0),
    }
    for key, (value, least) in at_least.items():
        if not least <= value < float("inf"):
            raise UserError(f"{key} must be {least} or more, got {value}.")
    above_zero = {"optim.learning_rate": run.optim.learning_rate}
    if run.optim.schedule == "exponential":
        above_zero["optim.decay_factor"] = run.optim.decay_factor
    for key, value in above_zero.items():
        if not 0 < value < float("inf"):
            raise UserError(f"{key} must be above 0, got {value}.")
    below_one = {
        "data.brightness": run.data.brightness,
        "data.contrast": run.data.contrast,
        "optim.momentum": run.optim.momentum,
        "loss.label_smoothing": run.loss.label_smoothing,
    }
    momentum = run.model.get("norm_momentum")
    if isinstance(momentum, float):  # its type is checked where the model is made
        below_one["model.norm_momentum"] = momentum
        if momentum < 0:
            raise UserError(f"model.norm_momentum must be 0 or more, got {momentum}.")
    for key, value in below_one.items():
        if not value < 1:
            raise UserError(f"{key} must be below 1, got {value}.")
    for key, value, most in (
        ("data.saturation", run.data.saturation, 1),
        ("data.hue", run.data.hue, 0.5),
    ):
        if value > most:
            raise UserError(f"{key} must be {most} or less, got {value}.")
    if run.optim.warmup_steps >= run.total_steps:
        raise UserError(
            f"optim.warmup_steps ({run.optim.warmup_steps}) must be below total_steps "
            f"({run.total_steps})."
        )


def _check_stream(data: DataConfig, task: str) -> None:
    """Raises UserError for what crops the other kind of images.

    Pictures with boxes are cropped on the device, streamed ones too: boxes move with them.
    """
    stream = ("short_side_min", "short_side_max")
    if not data.stream:
        names, what, others = stream, "a stream", ("scale_min", "scale_max")
    elif task == "classification":  # a stream's options check themselves
        names, what, others = ("crop_padding", "scale_min", "scale_max"), "memory", stream
    else:
        return
    for name in names:
        value = getattr(data, name)
        if value:
            raise UserError(
                f"data.{name} {value} is for images in {what}; set it to 0 and crop with "
                f"data.{others[0]} and data.{others[1]}, or set data.streaming to "
                f"{str(not data.streaming).lower()}."
            )


def check_data(run: RunConfig, train_examples: int, image_shape: tuple[int, ...]) -> None:
    """Refuses what does not fit the data.

    Raises:
      UserError: for a batch larger than the training split or not made of whole groups of
        BatchNorm, a crop out of all proportion to the images, or changes of colours that
        they have not.
    """
    if run.data.batch_size > train_examples:
        raise UserError(
            f"data.batch_size {run.data.batch_size} is larger than the {train_examples} "
            f"training examples of {run.data.name}; choose {train_examples} or less."
        )
    if run.train_eval_examples > train_examples:
        raise UserError(
            f"train_eval_examples {run.train_eval_examples} is more than the "
            f"{train_examples} training examples of {run.data.name}; use -1 for all."
        )
    data = run.data
    if (data.hue or data.saturation) and image_shape[-1] != 3:
        raise UserError(
            f"data.hue {data.hue:g} and data.saturation {data.saturation:g} need colours, "
            f"and {data.name} has images of {image_shape[-1]} channel(s); set both to 0."
        )
    if data.scale_max and data.crop_padding:
        raise UserError(
            f"data.crop_padding {data.crop_padding} and data.scale_max {data.scale_max} "
            "are two ways to crop; set one of them to 0."
        )
    check_group("model.norm_group", run.model.get("norm_group", 0), data.batch_size)
    side = min(image_shape[:2])
    if (data.scale_min or data.scale_max) and not side <= data.scale_min <= data.scale_max:
        raise UserError(
            f"data.scale_min {data.scale_min} and data.scale_max {data.scale_max} must be "
            f"the short side of the images ({side}) or more, in this order (or both 0)."
        )
    if run.data.crop_padding >= min(image_shape[:2]):
        raise UserError(
            f"data.crop_padding {run.data.crop_padding} would let a crop miss a "
            f"{image_shape[0]}x{image_shape[1]} image altogether; choose less."
        )

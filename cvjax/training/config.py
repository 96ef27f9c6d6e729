"""The configuration of a run: what there is to set, and what may be set.

Every key and its default stands here, once. A file in `configs/` starts from
`default_config` and sets what its experiment is about; the command line overrides any key
(`--config.model.depth=56`). `parse_config` turns the result into typed, checked values:
the config stops there.
"""

import dataclasses
import difflib
import re
from typing import Any

import ml_collections

from cvjax.checks import as_type, check_choice
from cvjax.command_line import LARGEST
from cvjax.data.augment import Augmentation
from cvjax.data.normalize import NORMALIZATIONS
from cvjax.data.streaming import StreamOptions
from cvjax.errors import UserError
from cvjax.files import user_path
from cvjax.models import MODELS, SAME_EQUATION, TASK_MODELS, model_fields
from cvjax.nn.norm import check_group
from cvjax.tasks import TASKS
from cvjax.training.losses import LOSSES, LossConfig
from cvjax.training.optim import (
    DECAYED,
    OPTIMIZERS,
    SCHEDULES,
    OptimConfig,
    boundary_steps,
)


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """What is trained on.

    Attributes:
      name: "digits" or "digit_scenes" (bundled), "folder" (your own pictures), "npz" (your
        own arrays), "voc" (your own pictures with boxes), or a TFDS image
        classification set such as "cifar10". "digit_scenes/masks" has label maps in the
        place of boxes.
      data_dir: where prepared TFDS sets are; "" for $TFDS_DATA_DIR or TFDS's default. The
        folder of your pictures (with boxes: as `data.voc` says), or the .npz file of your
        arrays.
      cache_dir: where decoded images are kept; "" for the user's cache folder.
      val_examples: split off the training set for validation; -1 for the set's default.
      train_examples: how many of the other training images are used, stratified by class;
        -1 for all.
      shrink: average over shrink x shrink pixels, for smaller and faster images; 1 for the
        images as they are.
      streaming: whether images are read, decoded and cropped while training, for a set that
        does not fit in memory or whose images differ in size; then `scale_min` and
        `scale_max` are pixels of the images as they are stored.
      image_size, resize: what pictures of a folder or of a stream become: squares of so
        many pixels a side, by cropping ("crop") or by squashing ("squash"). Of "voc" it is
        the short side.
      num_workers: of a stream, see `data.streaming.StreamOptions`.
      batch_size: of training.
      eval_batch_size: of evaluation; it changes speed and memory, not results.
      normalization: see `data.augment.compute_statistics`; or "init_from", the statistics
        of the run that this one starts from (see `training.transfer`).
      crop_padding, flip, scale_min, scale_max, brightness, contrast, lighting: see
        `data.augment.Augmentation`.
    """

    name: str = "digits"
    data_dir: str = ""
    cache_dir: str = ""
    val_examples: int = -1
    train_examples: int = -1
    shrink: int = 1
    streaming: bool = False
    image_size: int = 224
    resize: str = "crop"
    num_workers: int = 0
    batch_size: int = 128
    eval_batch_size: int = 500
    normalization: str = "pixel_mean"
    crop_padding: int = 0
    flip: bool = False
    scale_min: int = 0
    scale_max: int = 0
    brightness: float = 0.0
    contrast: float = 0.0
    lighting: float = 0.0

    @property
    def source(self) -> dict[str, Any]:
        """The arguments of `data.load`."""
        names = ("name", "data_dir", "cache_dir", "val_examples", "train_examples")
        names += ("shrink", "image_size", "resize")
        return {name: getattr(self, name) for name in names} | {"stream": self.stream}

    @property
    def stream(self) -> StreamOptions | None:
        """How the set is streamed; None for images in memory."""
        if not self.streaming:
            return None
        names = [field.name for field in dataclasses.fields(StreamOptions)]
        return StreamOptions(**{name: getattr(self, name) for name in names})

    @property
    def augmentation(self) -> Augmentation:
        """The random changes of training images on the device; a stream's come scaled."""
        names = [field.name for field in dataclasses.fields(Augmentation)]
        asked = Augmentation(**{name: getattr(self, name) for name in names})
        if not self.streaming:
            return asked
        return dataclasses.replace(asked, scale_min=0, scale_max=0)


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """One training run. All durations are numbers of updates.

    Attributes:
      task: the problem, one of `cvjax.tasks.TASKS`.
      seed: of the initial parameters, the order of the data and the augmentation.
      total_steps: the length of the run.
      log_every: between two rows of training metrics.
      eval_every: between two evaluations; there is always one at the end.
      checkpoint_every: between two checkpoints; there is always one at the end, at the
        best validation error, and when the run is stopped by a signal.
      keep_checkpoints: how many of the latest checkpoints stay; the best stays besides.
      steps_per_dispatch: how many updates one call of the device makes at most, 0 for what
        the platform likes best (see `training.dispatch`); it changes speed, not results.
      train_eval_examples: how many training images each evaluation also measures, as they
        are (not augmented) and in evaluation mode; -1 for all, 0 for none. At the end all
        are measured, unless it is 0.
      test_curve: whether each evaluation also measures the test images, for curves as the
        papers draw them. Nothing is ever chosen by them.
      init_from: the workdir of a run whose network this one starts from, "" for none; see
        `training.transfer`.
      init_refine: how many blocks each block of that network becomes (`nn.depth.refine`), 1
        for as many as it has.
      data: see `DataConfig`.
      model: the model's name and its fields.
      optim: see `training.optim.OptimConfig`.
      loss: see `training.losses.LossConfig`.
    """

    task: str = "classification"
    seed: int = 0
    total_steps: int = 1000
    log_every: int = 50
    eval_every: int = 250
    checkpoint_every: int = 250
    keep_checkpoints: int = 2
    steps_per_dispatch: int = 0
    train_eval_examples: int = -1
    test_curve: bool = False
    init_from: str = ""
    init_refine: int = 1
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    model: dict[str, Any] = dataclasses.field(default_factory=dict)
    optim: OptimConfig = dataclasses.field(default_factory=OptimConfig)
    loss: LossConfig = dataclasses.field(default_factory=LossConfig)


# What may change when a run is resumed: it does not touch what has been computed so far.
RESUMABLE_KEYS = (
    "total_steps",
    "log_every",
    "eval_every",
    "checkpoint_every",
    "keep_checkpoints",
    "steps_per_dispatch",
    "train_eval_examples",
    "test_curve",
    "data.data_dir",
    "data.cache_dir",
    "data.num_workers",
    "data.eval_batch_size",
    *(f"model.{field}" for field in SAME_EQUATION),
)


LARGEST_FLOAT = 3.4028235e38  # of float32


def default_config(model: str) -> ml_collections.ConfigDict:
    """A config with every key, for one of the models.

    Raises:
      UserError: for a model that does not exist.
    """
    check_choice("model.name", model, tuple(MODELS))
    fields = {name: field.default for name, field in model_fields(model).items()}
    task = _own_task(model)
    config = RunConfig(task=task or "classification", model={"name": model, **fields})
    if task == "segmentation":  # of pictures of any size
        data = dataclasses.replace(config.data, normalization="channel")
        config = dataclasses.replace(config, data=data)
    return ml_collections.ConfigDict(dataclasses.asdict(config))


def parse_config(config: ml_collections.ConfigDict) -> RunConfig:
    """Checks a config and gives it types.

    The model's fields are checked where the model is made (`models.create_model`), and
    what depends on the data where the data is (`check_data`).

    Raises:
      UserError: for a missing or unknown key, a wrong type or an impossible value.
    """
    values = config.to_dict()
    run = RunConfig(
        **{
            **_typed(values, RunConfig, "config"),
            "data": DataConfig(**_typed(values["data"], DataConfig, "data")),
            "optim": OptimConfig(**_typed(values["optim"], OptimConfig, "optim")),
            "loss": LossConfig(**_typed(values["loss"], LossConfig, "loss")),
        }
    )
    if "name" not in run.model:
        raise UserError(f"model.name is missing; it is one of {', '.join(MODELS)}.")
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
        ("init_from", run.init_from),
        ("data.data_dir", run.data.data_dir),
        ("data.cache_dir", run.data.cache_dir),
    ):
        if path:
            user_path(path, name)
    _check_stream(run.data)
    boundary_steps(run.optim, run.total_steps)
    return run


def _check_task(run: RunConfig) -> None:
    """Raises UserError for a model or a loss that is not for the task."""
    own = _own_task(run.model["name"])
    if own != (run.task if run.task in TASK_MODELS else None):
        fitting = [name for name in MODELS if _own_task(name) is None]
        fitting = sorted(TASK_MODELS.get(run.task, fitting))
        raise UserError(
            f"task is {run.task!r}, but model.name {run.model['name']!r} is a network for "
            f"{own or 'classification and multilabel'}; choose one of "
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


def _own_task(model: str) -> str | None:
    """The task that a network is for alone; None for those that name images."""
    return next((task for task, names in TASK_MODELS.items() if model in names), None)


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
    if run.optim.warmup_steps >= run.total_steps:
        raise UserError(
            f"optim.warmup_steps ({run.optim.warmup_steps}) must be below total_steps "
            f"({run.total_steps})."
        )


def _check_stream(data: DataConfig) -> None:
    if data.stream and data.crop_padding:  # the options of a stream check themselves
        raise UserError(
            f"data.crop_padding {data.crop_padding} is for images in memory; set it to 0 "
            "and crop with data.scale_min and data.scale_max, or set data.streaming to "
            "false."
        )


def check_data(run: RunConfig, train_examples: int, image_shape: tuple[int, ...]) -> None:
    """Refuses what does not fit the data.

    Raises:
      UserError: for a batch larger than the training split or not made of whole groups of
        BatchNorm, or a crop out of all proportion to the images.
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


def _typed(values: dict[str, Any], cls: type, where: str) -> dict[str, Any]:
    """The values of one group, with exactly the keys and the types of `cls`."""
    fields = {field.name: field for field in dataclasses.fields(cls)}
    prefix = "" if where == "config" else f"{where}."
    for key in values:
        if key not in fields:
            near = difflib.get_close_matches(key, fields, n=1)
            hint = f"; did you mean {prefix}{near[0]}?" if near else "."
            raise UserError(
                f"{prefix}{key} is not a setting: {where} has {', '.join(fields)}{hint}"
            )
    typed = {}
    for name, field in fields.items():
        if name not in values:
            raise UserError(
                f"{prefix}{name} is missing; start the config from "
                "cvjax.training.config.default_config, which has every key."
            )
        if field.default_factory is dataclasses.MISSING:
            typed[name] = as_type(f"{prefix}{name}", values[name], field.type)
        elif isinstance(values[name], dict):
            typed[name] = values[name]
        else:
            raise UserError(f"{name} is a group of settings, got {values[name]!r}.")
    return typed


def complete_config(config: dict[str, Any]) -> ml_collections.ConfigDict:
    """The config of a run from its config.json.

    Settings that are newer than the run get their defaults, which change nothing.

    Raises:
      UserError: for what is no config.
    """
    model = config.get("model")
    if not isinstance(model, dict) or "name" not in model:
        raise UserError(
            "the config.json of the run is damaged: its config has no model with a name; "
            "put a good copy there, or train again in another --workdir."
        )
    complete = default_config(model["name"]).to_dict()
    for key, value in config.items():
        group = isinstance(value, dict) and isinstance(complete.get(key), dict)
        complete[key] = complete[key] | value if group else value
    return ml_collections.ConfigDict(complete)

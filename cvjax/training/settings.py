"""What there is to set of a run, with defaults: every key stands here, once."""

import dataclasses
from typing import Any

from cvjax.data.augment import Augmentation
from cvjax.data.streaming import StreamOptions
from cvjax.training.losses import LossConfig
from cvjax.training.optim import OptimConfig


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """What is trained on.

    Attributes:
      name: "digits" or "digit_scenes" (bundled), "folder" (your own pictures), "npz" (your
        own arrays), "voc", "coco" (your own pictures with boxes), or a TFDS image
        classification set such as "cifar10". "digit_scenes/masks" has label maps in the
        place of boxes.
      data_dir: where prepared TFDS sets are; "" for $TFDS_DATA_DIR or TFDS's default. The
        folder of your pictures (with boxes: as `data.voc` and `data.coco` say), or the .npz
        file of your arrays.
      cache_dir: where decoded images are kept; "" for the user's cache folder.
      val_examples: split off the training set for validation; -1 for the set's default.
      train_examples: how many of the other training images are used, stratified by class;
        -1 for all.
      shrink: average over shrink x shrink pixels, for smaller and faster images; 1 for the
        images as they are.
      streaming: whether images are read and decoded while training, for a set that does not
        fit in memory or whose images differ in size.
      image_size, resize: what pictures of a folder or of a stream become: squares with
        sides of so many pixels, by cropping ("crop") or by squashing ("squash"). Of boxes
        it is the short side.
      short_side_min, short_side_max, num_workers: of a stream, see
        `data.streaming.StreamOptions`.
      batch_size: of training.
      eval_batch_size: of evaluation; it changes speed and memory, not results, but for an
        ODE block whose images share their steps (`per_sample` "never").
      normalization: see `data.normalize.compute_statistics`; or "init_from", the statistics
        of the run that this one starts from (see `training.transfer`).
      stretch: whether the contrast of each picture of a mask_folder is stretched, see
        `data.normalize.stretch_contrast`.
      crop_padding, flip, vertical_flip, scale_min, scale_max, brightness, contrast,
        lighting, saturation, hue: see `data.augment.Augmentation`.
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
    short_side_min: int = 0
    short_side_max: int = 0
    num_workers: int = 0
    batch_size: int = 128
    eval_batch_size: int = 500
    normalization: str = "pixel_mean"
    stretch: bool = False
    crop_padding: int = 0
    flip: bool = False
    vertical_flip: bool = False
    scale_min: int = 0
    scale_max: int = 0
    brightness: float = 0.0
    contrast: float = 0.0
    lighting: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0

    @property
    def source(self) -> dict[str, Any]:
        """The arguments of `data.load`."""
        names = ("name", "data_dir", "cache_dir", "val_examples", "train_examples")
        names += ("shrink", "image_size", "resize", "stretch")
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
        """The random changes of training images on the device."""
        names = [field.name for field in dataclasses.fields(Augmentation)]
        return Augmentation(**{name: getattr(self, name) for name in names})


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
      init_from: the workdir of a run whose network this one starts from, or
        "pretrained:NAME" for one that comes with cvjax, "" for none; see
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

"""The config: what is accepted, and the sentence for everything that is not."""

import dataclasses

import ml_collections
import pytest

from cvjax.errors import UserError
from cvjax.models import DETECTORS, MODELS, SEGMENTERS, create_model, model_fields
from cvjax.training.config import RESUMABLE_KEYS, default_config, parse_config
from cvjax.training.config_checks import check_data
from cvjax.training.losses import LossConfig
from cvjax.training.optim import OptimConfig
from cvjax.training.settings import DataConfig, RunConfig


def leaves(values, prefix=""):
    """Every dotted key with its value."""
    for key, value in values.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def config_with(changes, model="resnet_cifar"):
    """The default config with some values replaced, whatever their types."""
    values = default_config(model).to_dict()
    for key, value in changes.items():
        *groups, last = key.split(".")
        group = values
        for name in groups:
            group = group[name]
        group[last] = value
    return ml_collections.ConfigDict(values)


def refusal(config):
    with pytest.raises(UserError) as caught:
        run = parse_config(config)
        create_model(num_classes=10, **run.model)
    return str(caught.value)


def check_words(text, *words):
    """What is refused, the value given and the remedy are named, in whatever sentence."""
    for word in words:
        assert word in text


def names(cls):
    return ", ".join(field.name for field in dataclasses.fields(cls))


OF_MODEL = {"loss.dice_weight": "unet"}  # of one alone; other keys are tested with mlp
KEYS = [
    (model, key, value)
    for model in sorted(MODELS)
    for key, value in leaves(default_config(model).to_dict())
    if (model == OF_MODEL.get(key, "mlp") or key.startswith("model."))
    and key != "model.name"
]
TYPED = [case for case in KEYS if not isinstance(case[2], tuple)]


# What is accepted


@pytest.mark.parametrize("model", sorted(MODELS))
def test_defaults_are_the_classes_defaults(model):
    run = parse_config(default_config(model))
    task, data = "classification", DataConfig()
    if model in DETECTORS:
        task = "detection"
    elif model in SEGMENTERS:
        task, data = "segmentation", DataConfig(normalization="channel")
    assert run == RunConfig(task=task, model=run.model, data=data)
    assert (run.data, run.optim, run.loss) == (data, OptimConfig(), LossConfig())
    assert run.model["name"] == model
    assert create_model(num_classes=10, **run.model) == MODELS[model](num_classes=10)


def test_unknown_model():
    with pytest.raises(UserError) as caught:
        default_config("resnet_cifra")
    assert str(caught.value) == (
        f"model.name must be one of {', '.join(MODELS)}, got 'resnet_cifra'; did you mean "
        "'resnet_cifar'?"
    )


# Where not any other string or number will do.
OTHERS = {
    "task": "multilabel",
    "data.normalization": "channel",
    "optim.decayed": "all",
    "optim.name": "adamw",
    "optim.schedule": "cosine",
    "optim.boundaries": (0.25, 100),
    "loss.name": "sigmoid",
    "model.backbone": "vgg",
    "model.body": "tied",
    "model.depth_init": "smooth",
    "model.blocks": (3, 3, 3),
    "model.dtype": "bfloat16",
    "model.gradient": "backsolve",
    "model.head": "small",
    "model.norm": "none",
    "model.pad_channels": "both",
    "model.per_sample": "always",
    "model.pool": "average",
    "model.shortcut": "C",
    "model.solver": "dopri5",
    "model.stride": 16,
    "model.theta": "piecewise_linear",
    "model.version": "1",
    "model.loop": "rolled",
}
# What a value needs beside it.
NEEDED = {
    "model.backbone": {"model.depth": 16},
    "model.stem": {"model.stride": 8},  # of model yolo
    "task": {"loss.name": "sigmoid"},
    "init_refine": {"init_from": "runs/coarse"},
    "model.pieces": {"model.theta": "piecewise_constant"},
    **{
        f"data.short_side_{end}": {
            **{"data.streaming": True, "data.image_size": 1},
            f"data.short_side_{other}": 1,
        }
        for end, other in (("min", "max"), ("max", "min"))
    },
}
OTHER_ACTIVATIONS = {"resnet_cifar": "sigmoid"}
OTHER_DEPTHS = {
    "centernet": 34,
    "fcn": 34,
    "yolo": 34,
    "resnet": 34,
    "resnet_cifar": 26,
    "vgg": 13,
}
OTHER_VARIANTS = {"alexnet": "two_groups", "googlenet": "3x3"}
OTHER_STEMS = {
    "centernet": "small",
    "fcn": "small",
    "yolo": "small",
    "resnet": "small",
    "odenet": "res",
    "odenet_discrete": "res",
}


def another(model, key, value):
    """A value that is as good as the default."""
    if key == "model.depth":
        return OTHER_DEPTHS[model]
    if key == "model.activation":
        return OTHER_ACTIVATIONS.get(model, "softplus")
    if key == "model.variant":
        return OTHER_VARIANTS[model]
    if key == "model.stem":
        return OTHER_STEMS[model]
    if key in OTHERS:
        return OTHERS[key]
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return value + 1
    if isinstance(value, float):
        return value / 2 + 0.125
    if isinstance(value, str):
        return f"{value}x"
    return tuple(x + 1 for x in value)


@pytest.mark.parametrize(("model", "key", "value"), KEYS)
def test_every_key_arrives(model, key, value):
    changed = another(model, key, value)
    assert changed != value
    needed = {
        name: field
        for name, field in NEEDED.get(key, {}).items()
        if not name.startswith("model.")
        or name.removeprefix("model.") in model_fields(model)
    }
    run = parse_config(config_with({key: changed, **needed}, model))
    target = run
    *groups, last = key.split(".")
    for name in groups:
        target = getattr(target, name)
    if groups == ["model"]:
        net = create_model(num_classes=10, **target)
        assert getattr(net, last) == target[last] == changed
    else:
        assert getattr(target, last) == changed
    assert run != parse_config(default_config(model))


def test_whole_numbers_are_taken_for_floats():
    run = parse_config(config_with({"optim.learning_rate": 1, "optim.weight_decay": 0}))
    for value, wanted in ((run.optim.learning_rate, 1.0), (run.optim.weight_decay, 0.0)):
        assert value == wanted and type(value) is float
    net = create_model(
        num_classes=10, **parse_config(config_with({"model.step_size": 1})).model
    )
    assert type(net.step_size) is float


def test_lists_are_taken_for_tuples():
    run = parse_config(config_with({"optim.boundaries": [0.25, 500]}))
    assert run.optim.boundaries == (0.25, 500)
    assert hash(run.optim)


def test_resumable_keys_exist():
    keys = {key for model in MODELS for key, _ in leaves(default_config(model).to_dict())}
    assert set(RESUMABLE_KEYS) <= keys


# What is refused


@pytest.mark.parametrize(("model", "key", "value"), TYPED)
def test_every_key_refuses_another_type(model, key, value):
    wrong = {bool: 1, int: 1.5, float: "1", str: 1}[type(value)]
    named = key.removeprefix("model.")
    kind = type(value).__name__
    check_words(refusal(config_with({key: wrong}, model)), named, kind, repr(wrong))


def test_a_model_that_is_no_name():
    check_words(refusal(config_with({"model.name": 1})), "name", "1", *MODELS)


@pytest.mark.parametrize(
    ("key", "value", "kind"),
    [
        ("optim.boundaries", 0.5, "int or float"),
        ("optim.boundaries", "0.5", "int or float"),
        ("optim.boundaries", (0.5, "x"), "int or float"),
        ("optim.boundaries", (True,), "int or float"),
        ("optim.boundaries", None, "int or float"),
        ("model.widths", 5, "int"),
        ("model.widths", "abc", "int"),
        ("model.widths", (5, 5.5), "int"),
        ("model.widths", [True], "int"),
    ],
)
def test_several_values_of_another_type(key, value, kind):
    text = refusal(config_with({key: value}, "mlp"))
    check_words(text, key.removeprefix("model."), "several", kind, repr(value))


@pytest.mark.parametrize("value", [[20], None])
def test_a_list_is_no_number(value):
    check_words(refusal(config_with({"model.depth": value})), "depth", "int", repr(value))


@pytest.mark.parametrize("group", ["data", "model", "optim", "loss"])
def test_a_group_that_is_none(group):
    check_words(refusal(config_with({group: 3})), group, "group", "3")


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
@pytest.mark.parametrize("key", ["optim.decay_factor", "optim.weight_decay"])
def test_numbers_must_be_finite(key, value):
    check_words(refusal(config_with({key: value})), key, "finite", str(value))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("optim.learning_rate", 1e39),
        ("optim.weight_decay", 1e300),
        ("optim.boundaries", (0.5, float("nan"))),
        ("total_steps", 10**11),
        ("data.eval_batch_size", 10**12),
        ("model.step_size", float("nan")),
        ("model.norm_momentum", 1.0),
        ("model.norm_momentum", -0.1),
        ("model.norm_momentum", float("nan")),
    ],
)
def test_numbers_out_of_range(key, value):
    assert refusal(config_with({key: value})).startswith(f"{key} must be ")


@pytest.mark.parametrize("key", ["seed", "data.crop_padding"])
def test_true_is_no_number(key):
    check_words(refusal(config_with({key: True})), key, "type int", "got True")


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("sed", ["sed", names(RunConfig), "mean seed?"]),
        ("loss.smoothing", [names(LossConfig), "mean loss.label_smoothing?"]),
        ("data.x", ["data.x", names(DataConfig)]),
        ("model.width", ["'mlp'", "'width'", "widths, dtype", "mean 'widths'?"]),
    ],
)
def test_unknown_key(key, words):
    check_words(refusal(config_with({key: 1}, "mlp")), *words)


@pytest.mark.parametrize(
    "key", ["seed", "data", "data.flip", "optim.boundaries", "loss.name"]
)
def test_missing_key(key):
    values = default_config("mlp").to_dict()
    *groups, last = key.split(".")
    del (values[groups[0]] if groups else values)[last]
    text = refusal(ml_collections.ConfigDict(values))
    check_words(text, f"{key} is missing", "cvjax.training.config.default_config")


def test_missing_model_name():
    values = default_config("mlp").to_dict()
    del values["model"]["name"]
    text = refusal(ml_collections.ConfigDict(values))
    check_words(text, "model.name is missing", *MODELS)


AT_LEAST = {
    "seed": 0,
    "total_steps": 1,
    "log_every": 1,
    "eval_every": 1,
    "checkpoint_every": 1,
    "keep_checkpoints": 1,
    "train_eval_examples": -1,
    "data.batch_size": 1,
    "data.eval_batch_size": 1,
    "data.crop_padding": 0,
    "optim.momentum": 0,
    "optim.weight_decay": 0,
    "optim.decay_factor": 0,
    "init_refine": 1,
    "optim.warmup_steps": 0,
    "optim.warmup_learning_rate": 0,
    "loss.label_smoothing": 0,
}


@pytest.mark.parametrize("key", AT_LEAST)
def test_too_little(key):
    # Boundaries of their own would refuse the shortest run.
    constant = {"optim.schedule": "constant"}
    least = AT_LEAST[key]
    parse_config(config_with({**constant, key: least}))
    below = least - 1
    if isinstance(dict(leaves(default_config("mlp").to_dict()))[key], float):
        below = float(below)
    text = refusal(config_with({**constant, key: below}))
    check_words(text, key, f"{least} or more", f"got {below}")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"optim.learning_rate": 0.0}, ["optim.learning_rate", "above 0", "0.0"]),
        (
            {"optim.schedule": "exponential", "optim.decay_factor": 0.0},
            ["optim.decay_factor", "above 0", "0.0"],
        ),
        ({"optim.learning_rate": float("inf")}, ["optim.learning_rate", "finite", "inf"]),
        ({"optim.learning_rate": float("nan")}, ["optim.learning_rate", "finite", "nan"]),
        ({"optim.momentum": 1.0}, ["optim.momentum", "below 1", "1.0"]),
        ({"loss.label_smoothing": 1.0}, ["loss.label_smoothing", "below 1", "1.0"]),
        ({"data.saturation": 1.5}, ["data.saturation", "1 or less", "1.5"]),
        ({"optim.nesterov": True, "optim.name": "adam"}, ["optim.nesterov", "sgd", "adam"]),
        ({"data.hue": 0.6}, ["data.hue", "0.5 or less", "0.6"]),
        ({"init_refine": 2}, ["init_refine is 2", "init_from", "empty", "workdir"]),
        ({"optim.warmup_steps": 1000}, ["optim.warmup_steps", "below", "total_steps"]),
        (
            {"optim.boundaries": (0.5, 1000)},
            ["optim.boundaries (0.5, 1000)", "total_steps (1000)", "(0.5, 0.75)"],
        ),
        (
            {"data.normalization": "mean"},
            ["data.normalization", "pixel_mean, channel, none, init_from", "'mean'"],
        ),
        (
            {"optim.name": "adamax"},
            ["optim.name", "sgd, adam, adamw", "'adamax'", "mean 'adam'?"],
        ),
        (
            {"optim.schedule": "steps"},
            ["constant, step, cosine, exponential", "'steps'", "mean 'step'?"],
        ),
        (
            {"optim.decayed": "kernel"},
            ["optim.decayed", "kernels, all", "'kernel'", "mean 'kernels'?"],
        ),
        ({"loss.name": "l2"}, ["loss.name", "softmax, sigmoid", "'l2'"]),
    ],
)
def test_impossible_value(changes, words):
    check_words(refusal(config_with(changes)), *words)


# What depends on the data


def test_what_fits_the_data():
    changes = {"data.batch_size": 50, "train_eval_examples": 50, "data.crop_padding": 7}
    check_data(parse_config(config_with(changes)), 50, (8, 9, 1))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"data.batch_size": 51}, ["data.batch_size 51", "50", "digits", "or less"]),
        (
            {"data.batch_size": 9, "train_eval_examples": 51},
            ["train_eval_examples 51", "50", "digits", "-1 for all"],
        ),
        (
            {"data.batch_size": 9, "data.crop_padding": 8},
            ["data.crop_padding 8", "9x8", "less"],
        ),
    ],
)
def test_what_does_not_fit_the_data(changes, words):
    with pytest.raises(UserError) as caught:
        check_data(parse_config(config_with(changes)), 50, (9, 8, 1))
    check_words(str(caught.value), *words)


def test_the_number_of_classes_is_the_data_sets():
    config = default_config("mlp")
    config.model.num_classes = 4
    with pytest.raises(UserError, match="num_classes is not a setting"):
        parse_config(config)


def test_groups_of_batch_norm_must_divide_the_batch():
    config = config_with({"model.norm_group": 64, "data.batch_size": 100}, "resnet_cifar")
    message = (
        "model.norm_group is 64, which does not divide the batch of 100; choose a divisor"
    )
    with pytest.raises(UserError, match=message):
        check_data(parse_config(config), 1000, (8, 8, 1))
    config.data.batch_size = 128
    check_data(parse_config(config), 1000, (8, 8, 1))

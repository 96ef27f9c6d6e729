"""The configuration of a run, from a file of configs/ to typed, checked values.

Every key and its default stands in `training.settings`. A file in `configs/` starts from
`default_config` and sets what its experiment is about; the command line overrides any key
(`--config.model.depth=56`). `parse_config` turns the result into typed values, checked by
`training.config_checks`: the config stops there.
"""

import dataclasses
import difflib
from typing import Any

import ml_collections

from cvjax.checks import as_type, check_choice
from cvjax.errors import UserError
from cvjax.models import MODELS, SAME_EQUATION, model_fields
from cvjax.training.config_checks import check_values, own_task
from cvjax.training.losses import LossConfig
from cvjax.training.optim import OptimConfig
from cvjax.training.settings import DataConfig, RunConfig

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
_GROUPS = {"data": DataConfig, "optim": OptimConfig, "loss": LossConfig}


def default_config(model: str) -> ml_collections.ConfigDict:
    """A config with every key, for one of the models.

    Raises:
      UserError: for a model that does not exist.
    """
    check_choice("model.name", model, tuple(MODELS))
    fields = {name: field.default for name, field in model_fields(model).items()}
    task = own_task(model)
    config = RunConfig(task=task or "classification", model={"name": model, **fields})
    if task == "segmentation":  # of pictures of any size
        data = dataclasses.replace(config.data, normalization="channel")
        config = dataclasses.replace(config, data=data)
    return ml_collections.ConfigDict(dataclasses.asdict(config))


def parse_config(config: ml_collections.ConfigDict) -> RunConfig:
    """Checks a config and gives it types.

    The model's fields are checked where the model is made (`models.create_model`), and
    what depends on the data where the data is (`config_checks.check_data`).

    Raises:
      UserError: for a missing or unknown key, a wrong type or an impossible value.
    """
    values = config.to_dict()
    typed = _typed(values, RunConfig, "config")
    for name, kind in _GROUPS.items():
        typed[name] = kind(**_typed(values[name], kind, name))
    run = RunConfig(**typed)
    if "name" not in run.model:
        raise UserError(f"model.name is missing; it is one of {', '.join(MODELS)}.")
    check_values(run)
    return run


def check_types(config: ml_collections.ConfigDict) -> None:
    """Raises UserError for a setting of another type; one that is unknown is passed over.

    Args:
      config: of a run that may be of another version, from `complete_config`.
    """
    values = config.to_dict()
    for where, kind in {"config": RunConfig, **_GROUPS}.items():
        group = values if where == "config" else values[where]
        known = {field.name for field in dataclasses.fields(kind)} & set(group)
        _typed({key: group[key] for key in known}, kind, where)


def _typed(values: dict[str, Any], cls: type, where: str) -> dict[str, Any]:
    """The values of one group, with exactly the keys and the types of `cls`."""
    fields = {field.name: field for field in dataclasses.fields(cls)}
    prefix = "" if where == "config" else f"{where}."
    for key in values:
        if key not in fields:
            closest = difflib.get_close_matches(key, fields, n=1)
            hint = f"; did you mean {prefix}{closest[0]}?" if closest else "."
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
        raise _damaged("its config has no model with a name")
    complete = default_config(model["name"]).to_dict()
    for key, value in config.items():
        group = isinstance(complete.get(key), dict)
        if group and not isinstance(value, dict):
            raise _damaged(f"its {key} is {str(value)[:40]!r}, no group of settings")
        complete[key] = complete[key] | value if group else value
    data = complete["data"]
    # Before a stream had names of its own.
    if data["streaming"] and "short_side_max" not in config.get("data", {}):
        for end in ("min", "max"):
            data[f"short_side_{end}"], data[f"scale_{end}"] = data[f"scale_{end}"], 0
    try:
        return ml_collections.ConfigDict(complete)
    except ValueError as error:  # of a name with a dot
        raise _damaged(str(error)) from error


def _damaged(problem: str) -> UserError:
    return UserError(
        f"the config.json of the run is damaged: {problem}; put a good copy there, or "
        "train again in another --workdir."
    )

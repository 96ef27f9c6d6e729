"""What a checkpoint says of itself, in info.json: with a checksum, or it is damaged."""

import hashlib
import json
import pathlib
from typing import Any

from cvjax import errors
from cvjax.storage import workdir as workdirs
from cvjax.storage.array_files import structure

TEMPORARY = "tmp-"  # begins the names of checkpoints that are not complete
_NAMED_DIFFERENCES = 4


class Damaged(Exception):
    """The files of a checkpoint are not what was saved; the text says in what way."""


def write_info(folder: pathlib.Path, info: dict) -> None:
    """Writes FOLDER/info.json, with the keys in the order of `info`."""
    text = json.dumps(info, allow_nan=False)
    # Of what is read back: the keys 2 and 10 sort otherwise than "2" and "10".
    checksum = _checksum(json.loads(text))
    (folder / "info.json").write_text(f'{{"sha256": "{checksum}", "info": {text}}}\n')


def read_info(folder: pathlib.Path) -> dict:
    """Reads FOLDER/info.json.

    Raises:
      Damaged: it is not what was written.
    """
    try:
        content = json.loads((folder / "info.json").read_text())
        info, checksum = content["info"], content["sha256"]
    except PermissionError:
        raise
    except OSError:
        raise Damaged("info.json cannot be read") from None
    except (ValueError, KeyError, TypeError, RecursionError):
        raise Damaged("info.json is garbled") from None
    if _checksum(info) != checksum:
        raise Damaged("info.json has changed")
    if str(info["step"]) != folder.name and not folder.name.startswith(TEMPORARY):
        raise Damaged(f"it is of step {info['step']}, under another name")
    return info


def _checksum(info: Any) -> str:
    return hashlib.sha256(json.dumps(info, sort_keys=True).encode()).hexdigest()


def refuse_other_run(
    folder: pathlib.Path, info: dict, abstract_state: Any, expect: dict
) -> None:
    """Raises UserError if the checkpoint is not one of the state that is wanted."""
    # A setting that a group does not have yet is newer than the checkpoint.
    expect = {
        key: {name: value[name] for name in value if name in info[key]}
        if isinstance(value, dict) and key in info
        else value
        for key, value in expect.items()
    }
    settings = workdirs.config_differences(
        {key: info[key] for key in expect if key in info}, expect
    )
    if settings:
        raise errors.UserError(
            f"The checkpoint {folder} is of other settings: {_some(settings)}; take "
            "the original settings, or another --workdir."
        )
    saved, wanted = info["structure"], structure(abstract_state)
    if isinstance(abstract_state, dict):  # it names the parts that are wanted
        saved = {key: saved[key] for key in saved if key.split("/")[0] in abstract_state}
    missing = [f"{name} is missing" for name in wanted if name not in saved]
    unexpected = [f"{name} is unexpected" for name in saved if name not in wanted]
    changed = [
        f"{name} is {saved[name]} and not {wanted[name]}"
        for name in wanted
        if name in saved and saved[name] != wanted[name]
    ]
    if missing or unexpected or changed:
        kinds = [_some(kind) for kind in (changed, missing, unexpected) if kind]
        raise errors.UserError(
            f"The checkpoint {folder} is of another network or optimizer: in it, "
            f"{', '.join(kinds)}; take the original settings, or another --workdir."
        )


def _some(differences: list[str]) -> str:
    shown = ", ".join(differences[:_NAMED_DIFFERENCES])
    more = len(differences) - _NAMED_DIFFERENCES
    return f"{shown} and {more} more" if more > 0 else shown

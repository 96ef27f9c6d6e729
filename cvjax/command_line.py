"""Flags, checked before and after absl parses them, and the config's own errors."""

import math
import os
import re
import runpy
import sys
import traceback
from collections.abc import Iterator, Sequence

import ml_collections
from absl import flags
from ml_collections import config_flags

from cvjax.errors import EXIT_CODES, UserError
from cvjax.files import is_pretrained, user_path

flags.disclaim_key_flags()  # --help shows --config as the program's

# Flags of any program that are a path of this machine.
PATHS = (
    *("workdir", "run", "output", "export", "html"),
    *("data_dir", "cache_dir", "class_names"),
)
LARGEST = 2**31 - 1  # of whole numbers
# Patterns of Python's words about a text that is no number, and what is allowed.
_WANTED = {
    r"invalid literal for int\(\) with base \d+: (.*)": "a whole number",
    "could not convert string to float: (.*)": "a number",
    r"\('Non-boolean argument to boolean flag', (.*)\)": "true or false",
    "Failed to parse (.*) as a ConfigDict: .*": "no value of its own, as it is a group of "
    "settings, each set by --config.GROUP.KEY=VALUE",
}
_KEY = r"[A-Za-z_]\w*(\.[A-Za-z_]\w*|\[-?\d+\])*"


def parse(arguments: Sequence[str]) -> list[str]:
    """Parses the flags of a program; `~` is expanded in those that are paths.

    Args:
      arguments: with the program's name, as `sys.argv`.

    Returns:
      The arguments that are no flags.

    Raises:
      UserError, flags.Error: for a flag that is unknown, has no value or an impossible one,
        and for a config file with errors of its own.
    """
    arguments = [
        re.sub("^--?config=~", lambda _: "--config=" + os.path.expanduser("~"), text)
        for text in arguments
    ]
    given = list(_given(arguments))
    for name, text in given:
        _check_text(name, text)
        if name == "config":
            config = check_config_file(text)
            _check_empty([name for name, text in given if not text], config)
    try:
        rest = flags.FLAGS(list(arguments))
    except flags.IllegalFlagValueError as error:
        raise UserError(_of_number(str(error))) from error
    except IndexError as error:  # of config.model.widths[9]
        raise UserError(
            f"the config has no setting of that number ({error}); give the whole value, "
            "such as --config.model.widths='(64, 128)'."
        ) from error
    # ml_collections says by these two that an override names no key of the config.
    except (AttributeError, KeyError) as error:
        inner = re.fullmatch(r"'(\w+)' object has no attribute '(\w+)'", str(error))
        if inner:  # of config.seed.x
            raise UserError(
                f"the config has no setting that ends in .{inner[2]}: what stands before "
                f"it is a value ({inner[1]}), no group of settings."
            ) from error
        names = re.findall(r"\w+(?=\\?['\"])", str(error)) or [str(error)]
        hint = f"; did you mean {names[1]}?" if len(names) > 1 else "."
        raise UserError(f"the config has no setting {names[0]}{hint}") from error
    except (TypeError, ValueError) as error:
        raise UserError(str(error)) from error
    for name in flags.FLAGS:
        _check_value(name)
    return rest


def define_config() -> flags.FlagHolder:
    """Defines --config. It reads the files of --flagfile already: their errors end here."""
    try:
        config = config_flags.DEFINE_config_file("config", None, "A file of configs/.")
        flags.declare_key_flag("config")
        return config
    except (flags.Error, UnicodeDecodeError) as error:
        reason = re.sub(r"^ERROR:: ", "", str(error))
        print(f"--flagfile cannot be read: {reason}", file=sys.stderr)
        sys.exit(EXIT_CODES[UserError])


def repeated(arguments: Sequence[str]) -> list[str]:
    """A sentence for each flag that is given several times and counts once."""
    texts = {}
    for name, text in _given(arguments):
        multi = name in flags.FLAGS and isinstance(flags.FLAGS[name], flags.MultiFlag)
        if not multi:
            texts.setdefault(name, []).append(text)
    return [
        f"--{name} is given {len(given)} times; the last one counts, {given[-1]}."
        for name, given in texts.items()
        if len(given) > 1
    ]


def _given(arguments: Sequence[str]) -> Iterator[tuple[str, str]]:
    """(name, text) of the flags with a value.

    Raises:
      UserError: for one without.
    """
    arguments = list(arguments[1:])
    while arguments:
        argument = arguments.pop(0)
        if argument == "--":
            return
        if not argument.startswith("-") or argument == "-":
            continue
        name, equals, text = argument.lstrip("-").partition("=")
        known = name in flags.FLAGS or name.startswith("config.")
        if not known or (name in flags.FLAGS and flags.FLAGS[name].boolean):
            continue
        if not equals:
            if not arguments or arguments[0].startswith("--"):
                raise UserError(
                    f"--{name} has no value; flags look like --name=value, and --name=--x "
                    "for a value that begins with --."
                )
            text = arguments.pop(0)
        yield name, text


def _check_text(name: str, text: str) -> None:
    """Refuses what absl would take."""
    if name.startswith("config.") and not re.fullmatch(_KEY, name):
        raise UserError(
            f"{name!r} is no setting: names are letters, digits and _, and . between them."
        )
    for part in text.split(","):
        if _is_number(part) and not part.isascii():
            raise UserError(f"--{name} takes digits 0 to 9, got {text!r}.")
    if text.strip() or name.startswith("config."):
        return
    # A path too, "" though its default is: that comes of a variable which is not set.
    if flags.FLAGS[name].default != "" or name in PATHS:
        raise UserError(f"--{name} is empty; give it a value, or leave it out.")


def _check_empty(names: Sequence[str], config: ml_collections.ConfigDict) -> None:
    """Refuses --config.KEY= where nothing stands anyway: of a variable which is not set."""
    for name in names:
        value = config.to_dict() if name.startswith("config.") else None
        for key in name.split(".")[1:]:
            value = value.get(key) if isinstance(value, dict) else None
        if value == "":
            raise UserError(f"--{name} is empty; give it a value, or leave it out.")


def _of_number(message: str) -> str:
    """The message of absl, with what is allowed in place of Python's own words."""
    for words, wanted in _WANTED.items():
        found = re.fullmatch(rf"flag ([^=]*)=.*: {words}", message, re.DOTALL)
        if found:
            return f"{found[1]} takes {wanted}, got {found[2]}."
    return message


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _check_value(name: str) -> None:
    flag = flags.FLAGS[name]
    if not flag.present or name.startswith("config"):
        return
    values = flag.value if isinstance(flag.value, list) else [flag.value]
    for value in values:
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"--{name} takes a finite number, got {value}.")
        if isinstance(value, int | float) and abs(value) > LARGEST:
            raise UserError(f"--{name} takes numbers up to {LARGEST:,}, got {value}.")
        if value == "" and flag.default != "":
            raise UserError(f"--{name} has an empty part: {','.join(values)!r}.")
    is_ours = name == "run" and is_pretrained(flag.value or "")
    if name in PATHS and flag.value and not is_ours:
        flag.value = str(user_path(flag.value, f"--{name}"))


def check_config_file(text: str) -> ml_collections.ConfigDict:
    """Loads a config file; its errors are reported as the user's own: file, line, error.

    Args:
      text: PATH or PATH:ARGUMENT, as --config takes it.

    Returns:
      What it makes, locked.

    Raises:
      UserError: there is no such file, or it makes no config.
    """
    path, colon, argument = text.partition(":")
    user_path(path, "--config")
    if not os.path.isfile(path):
        flaw = "is not a file" if os.path.exists(path) else "does not exist"
        raise UserError(
            f"the config file {path!r} {flaw}; those that come along are in the folder "
            "configs/."
        )
    if not path.endswith(".py"):
        raise UserError(f"{path} is no config: it takes a Python file with get_config().")
    try:
        get_config = runpy.run_path(path).get("get_config")
        if not callable(get_config):
            raise AttributeError("there is no function get_config()")
        config = get_config(*([argument] if colon else []))
        if isinstance(config, ml_collections.FrozenConfigDict):
            raise UserError(
                "get_config() returns a FrozenConfigDict, in which --config.KEY could set "
                "nothing; return an ml_collections.ConfigDict."
            )
        if isinstance(config, ml_collections.ConfigDict):
            config.to_dict()  # refuses keys that are no names,
            config.lock()  # and this a required value that is left open
    # Whatever the user's file raises is his, SystemExit too.
    except (Exception, SystemExit) as error:
        if isinstance(error, SyntaxError) and error.filename == path:
            line, reason = error.lineno, error.msg
        else:
            frames = traceback.extract_tb(error.__traceback__)
            line = next((f.lineno for f in reversed(frames) if f.filename == path), 0)
            reason = str(error)
        where = f"{path}, line {line}" if line else path
        kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
        raise UserError(f"{where}: {kind}{reason[:300]}") from error
    if not isinstance(config, ml_collections.ConfigDict):
        raise UserError(
            f"get_config() of {path} returns {type(config).__name__}; it takes an "
            "ml_collections.ConfigDict, such as cvjax.training.config.default_config makes."
        )
    return config

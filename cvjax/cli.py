"""What all command-line programs share: flags, log, exit codes, compilation cache.

Exit codes: 0 finished; 2 a mistake that the user can mend, told in one sentence; 3 the run
diverged; 75 (EX_TEMPFAIL) stopped by SIGTERM or Ctrl-C after saving: run the same line
again to go on; 130 stopped by a second Ctrl-C.
"""

import ast
import logging as python_logging
import os
import pathlib
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax
from absl import app, flags, logging

from cvjax import memory
from cvjax.errors import EXIT_CODES, UserError


def run(main: Callable[[Sequence[str]], None]) -> None:
    """Parses the flags, calls `main` with the other arguments, and exits."""

    def guarded(arguments: Sequence[str]) -> int:
        _prepare()
        try:
            main(arguments[1:])
        except tuple(EXIT_CODES) as error:
            kinds = (kind for kind in EXIT_CODES if isinstance(error, kind))
            return _tell(str(error), EXIT_CODES[next(kinds)])
        except KeyboardInterrupt:
            return _tell("stopped by Ctrl-C.", 130)
        return 0

    app.run(guarded, flags_parser=_parse)


def command_name() -> str:
    """How this program was started: "train.py", or "python -m experiments.cascade"."""
    spec = sys.modules["__main__"].__spec__
    if spec is None:
        # The name alone: where somebody keeps the program is nobody's business.
        return pathlib.Path(sys.argv[0]).name
    return f"python -m {spec.name.removesuffix('.__main__')}"


def refuse_arguments(arguments: Sequence[str]) -> None:
    """For programs that take flags only: raises UserError for anything else."""
    if arguments:
        raise UserError(
            f"{arguments[0]!r} is not a flag; all settings look like --name=value."
        )


def parse_fields(texts: Sequence[str]) -> dict[str, Any]:
    """["depth=20", "shortcut=A"] -> {"depth": 20, "shortcut": "A"}.

    Values with commas, such as ["blocks=(4", "3", "3)"] of --fields=blocks=(4,3,3), are put
    together again.

    Raises:
      UserError: for anything that is not name=value.
    """
    fields = {}
    for text in re.split(r",(?=\w+=)", ",".join(texts)) if texts else ():
        name, equals, value = text.partition("=")
        if not (name and equals):
            raise UserError(f"--fields takes name=value,name=value, got {text!r}.")
        value = value.capitalize() if value in ("true", "false") else value
        try:
            fields[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            fields[name] = value
    return fields


def _parse(arguments: Sequence[str]) -> list[str]:
    try:
        _check_config_exists(arguments)
        return flags.FLAGS(arguments)
    # ml_collections says by these two that an override names no key of the config.
    except (AttributeError, KeyError) as error:
        names = re.findall(r"\w+(?=\\?['\"])", str(error))
        hint = f"; did you mean {names[1]}?" if len(names) > 1 else "."
        message = f"the config has no setting {names[0]}{hint}"
    except (flags.Error, TypeError, ValueError) as error:
        message = str(error)
    sys.exit(_tell(message, EXIT_CODES[UserError]))


def _check_config_exists(arguments: Sequence[str]) -> None:
    """ml_collections reports a missing file only when the config is first used."""
    for argument, following in zip(arguments, [*arguments[1:], ""], strict=True):
        flag, equals, path = argument.lstrip("-").partition("=")
        path = path if equals else following
        if argument.startswith("-") and flag == "config" and not os.path.isfile(path):
            raise UserError(
                f"the config file {path!r} does not exist; those that come along are in "
                "the folder configs/."
            )


def _tell(message: str, code: int) -> int:
    """Prints one line with the program's name, like any Unix tool."""
    print(f"{command_name()}: {' '.join(message.split())}", file=sys.stderr)
    return code


def _prepare() -> None:
    memory.keep_freed()
    logging.set_verbosity(logging.INFO)
    logging.get_absl_handler().setFormatter(
        python_logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S")
    )
    # JAX tells of every kind of device that it does not find.
    python_logging.getLogger("jax").setLevel(python_logging.WARNING)
    if not jax.config.jax_compilation_cache_dir:
        cache = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
        jax.config.update("jax_compilation_cache_dir", str(cache / "cvjax" / "xla"))

"""What all command-line programs share: log, exit codes, signals, compilation cache.

Exit codes: 0 finished; 2 a mistake that the user can mend, said in one sentence; 3 the run
diverged; 75 (EX_TEMPFAIL) stopped by SIGTERM or Ctrl-C after saving: run the same line
again to go on; 130 stopped by Ctrl-C where there was nothing to save, or by a second one.
"""

import ast
import glob
import logging as python_logging
import os
import pathlib
import re
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import jax
from absl import app, flags, logging

from cvjax import command_line, memory
from cvjax.errors import EXIT_CODES, InterruptedRun, UserError
from cvjax.files import user_cache

# Set in the environment of a process that is tried again without the compilation cache.
_AGAIN = "CVJAX_WITHOUT_CACHE"
_SIGNAL_AGAIN = 0.05  # seconds until a signal that met a callback comes again
_cache_hits: list[str] = []
# Where JAX loads and runs compiled programs.
_PROGRAMS = ("jax", "_src", "interpreters", "pxla.py")


class _Terminated(KeyboardInterrupt):
    """SIGTERM while nothing is trained; no `except Exception` on its way catches it."""


def run(main: Callable[[Sequence[str]], None]) -> None:
    """Parses the flags, calls `main` with the other arguments, and exits."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # it was closed, as by `>&-`
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115

    def guarded(arguments: Sequence[str]) -> int:
        sys.unraisablehook = _report_unraisable
        signal.signal(signal.SIGTERM, _terminate)
        if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:  # as behind `nohup`
            signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            code = _call(main, arguments[1:])
        except Exception as error:
            if not _cache_hits or jax.distributed.is_initialized() or not _of_jax(error):
                raise
            _start_again(error)
        finally:
            # What is finished is not stopped any more, while Python takes itself down.
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, signal.SIG_IGN)
        return code

    app.run(guarded, flags_parser=_parse)


def _call(main: Callable[[Sequence[str]], None], arguments: Sequence[str]) -> int:
    """Calls `main`, and makes an exit code of what it raises."""
    try:
        prepare()
        jax.monitoring.register_event_listener(_count_hits)
        main(arguments)
        if _AGAIN in os.environ:
            _clear_cache()
    except tuple(EXIT_CODES) as error:
        kinds = (kind for kind in EXIT_CODES if isinstance(error, kind))
        return _report(str(error), EXIT_CODES[next(kinds)])
    except _Terminated:
        return _report(
            "stopped by SIGTERM; the same command goes on from what is saved.",
            EXIT_CODES[InterruptedRun],
        )
    except KeyboardInterrupt:
        return _report("stopped by Ctrl-C.", 130)
    except (OSError, MemoryError, AssertionError, RuntimeError) as error:
        message = _environment_message(error)
        if message is None:
            raise
        return _report(message, EXIT_CODES[UserError])
    return 0


def _of_jax(error: Exception) -> bool:
    """Whether JAX met it when it loaded or ran a compiled program."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    in_program = pathlib.Path(last.filename).parts[-4:] == _PROGRAMS
    return in_program or isinstance(error, jax.errors.JaxRuntimeError)


def _start_again(error: Exception) -> NoReturn:
    """The same command in place of this process, once, without the compilation cache.

    JAX checks that entries can be read, but not that they are of the program that is asked
    for. If that was it, the entries go when the second try is through.
    """
    logging.warning(
        "%s with programs of the compilation cache %s (%s); once more without it.",
        *(type(error).__name__, jax.config.jax_compilation_cache_dir),
        str(error).partition("\n")[0][:200],
    )
    sys.stdout.flush()
    environment = {"JAX_ENABLE_COMPILATION_CACHE": "false", _AGAIN: "1"}
    os.execve(sys.executable, sys.orig_argv, {**os.environ, **environment})


def _clear_cache() -> None:
    """Removes the programs of the user's own cache; one that he has named is his."""
    cache = pathlib.Path(jax.config.jax_compilation_cache_dir)
    if cache != user_cache("xla"):
        logging.warning("Something in the compilation cache %s is wrong; empty it.", cache)
        return
    for entry in cache.glob("jit_*"):
        entry.unlink(missing_ok=True)
    logging.warning("The programs in the compilation cache %s were removed.", cache)


def _count_hits(event: str, **_) -> None:
    if event == "/jax/compilation_cache/cache_hits":
        _cache_hits.append(event)


def _terminate(number: int, frame) -> NoReturn:
    raise _Terminated


def _environment_message(error: Exception) -> str | None:
    """A sentence for what is no mistake of the program's; None for what may be one."""
    if isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename else ""
        return (
            f"{where}{error.strerror or error}; what was saved before is as it was: mend "
            "this, and give the same command again."
        )
    if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
        return (
            f"there is too little memory ({str(error).partition(chr(10))[0][:200]}); use "
            "smaller batches, images or networks."
        )
    frames = traceback.extract_tb(error.__traceback__)
    if any(pathlib.Path(frame.filename).name == "xla_bridge.py" for frame in frames):
        asked = jax.config.jax_platforms
        return (
            f"JAX can use no device of JAX_PLATFORMS={asked}; unset it, or install the jax "
            "and the driver for it."
        )
    return None


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


def refuse_beside(flag: str, *others: str) -> None:
    """Raises UserError for other flags that say what to train, where `flag` trains none."""
    given = [f"--{other}" for other in others if flags.FLAGS[other].present]
    if given:
        raise UserError(
            f"--{flag} trains nothing, so {', '.join(given)} cannot stand beside it; leave "
            "one of them out."
        )


def parse_fields(texts: Sequence[str]) -> dict[str, Any]:
    """["depth=20", "shortcut=A"] -> {"depth": 20, "shortcut": "A"}.

    Values with commas, such as ["blocks=(4", "3", "3)"] of --fields=blocks=(4,3,3), are put
    together again.

    Raises:
      UserError: for anything that is not name=value, or a name that is no field of a model.
    """
    fields = {}
    for text in re.split(r",(?=\w+=)", ",".join(texts)) if texts else ():
        name, equals, value = text.partition("=")
        if not equals or not value.strip():
            raise UserError(f"--fields takes name=value,name=value, got {text!r}.")
        if not name.isidentifier() or name in ("name", "num_classes", "self", "parent"):
            raise UserError(f"{name!r} is no field of a network that can be chosen.")
        if name in fields:
            raise UserError(f"{name} is given twice among the fields; give it once.")
        value = value.capitalize() if value in ("true", "false") else value
        try:
            fields[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            fields[name] = value
    return fields


def _parse(arguments: Sequence[str]) -> list[str]:
    try:
        return command_line.parse(arguments)
    except (flags.Error, UserError) as error:
        missing = re.fullmatch(r"flag --(\S+)=None: Flag --\1 must have .*", str(error))
        name = missing and missing[1]
        text = f"--{name} is missing; give --{name}=VALUE." if missing else str(error)
        sys.exit(_report(text, EXIT_CODES[UserError]))
    except KeyboardInterrupt:
        sys.exit(_report("stopped by Ctrl-C.", 130))


def _report(message: str, code: int) -> int:
    """Prints one line with the program's name, like any Unix tool."""
    print(f"{command_name()}: {' '.join(message.split())}", file=sys.stderr)
    return code


def _show_warning(message, category, filename, lineno, file=None, line=None) -> None:
    """JAX never overwrites an entry of its cache, so one that is damaged has to go."""
    damaged = re.match(
        "Error reading persistent compilation cache entry for '([^']+)'", str(message)
    )
    if not damaged:
        text = warnings.formatwarning(message, category, filename, lineno, line)
        print(text, end="", file=file or sys.stderr)
        return
    cache = pathlib.Path(jax.config.jax_compilation_cache_dir)
    for entry in cache.glob(f"{glob.escape(damaged[1])}-*"):
        entry.unlink(missing_ok=True)
    logging.warning(
        "A damaged entry of the compilation cache was removed (%s in %s).",
        *(damaged[1], cache),
    )


def _report_thread(arguments) -> None:
    """An error in a thread beside the program, such as TensorBoard's on a full disk."""
    logging.warning("%s: %s", arguments.exc_type.__name__, arguments.exc_value)


def _report_unraisable(unraisable) -> None:
    """A signal that arrived within a callback, such as JAX's at a collection, comes again.

    What its handler raised ended there, where Python can only report it.
    """
    if not issubclass(unraisable.exc_type, KeyboardInterrupt):
        sys.__unraisablehook__(unraisable)
        return
    ended = issubclass(unraisable.exc_type, _Terminated)
    number = signal.SIGTERM if ended else signal.SIGINT
    # Later, and outside of this function, whose errors end in the same place.
    again = threading.Timer(_SIGNAL_AGAIN, os.kill, (os.getpid(), number))
    again.daemon = True
    again.start()


def prepare() -> None:
    """Sets up log, warnings, memory and the compilation cache of this process."""
    memory.keep_freed()
    warnings.showwarning = _show_warning
    os.environ["MPLBACKEND"] = "agg"  # figures are files; another one may not be there
    threading.excepthook = _report_thread
    # A name outside of the terminal's letters is shown as well as these can.
    if hasattr(sys.stdout, "reconfigure"):  # not what a notebook has there
        sys.stdout.reconfigure(errors="backslashreplace")
    logging.set_verbosity(logging.INFO)
    logging.get_absl_handler().setFormatter(
        python_logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S")
    )
    # JAX warns of every kind of device that it does not find.
    python_logging.getLogger("jax").setLevel(python_logging.WARNING)
    for notice in command_line.repeated(sys.argv):
        logging.warning("%s", notice)
    if jax.config.jax_traceback_filtering == "auto":
        jax.config.update("jax_traceback_filtering", "off")  # `_of_jax` looks at the end
    if not jax.config.jax_compilation_cache_dir:
        jax.config.update("jax_compilation_cache_dir", str(user_cache("xla")))

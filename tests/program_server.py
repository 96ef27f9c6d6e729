"""Imports what the programs need once, and forks for each command line that it is given.

A line of JSON on its standard input holds `arguments` (as behind `python`), `folder` and
`seconds`; a line on its standard output answers with `returncode`, `stdout` and `stderr`.
The process that forks computes nothing, so that nothing that JAX starts is shared. What
`import cvjax` does about signals while a program starts is not done here.
"""

import importlib
import json
import os
import runpy
import signal
import sys
import tempfile
import traceback

# They define no flags when they are imported.
PROGRAMS = (
    "cvjax.evaluate",
    "cvjax.predict",
    "cvjax.export",
    "cvjax.compare",
    "cvjax.interop.torch",
    "experiments.depth_degradation.__main__",
)


def work(arguments: list[str]) -> int:
    """What the new process does; returns its exit code."""
    try:
        if arguments[0] == "-m":
            sys.argv = arguments[1:]
            runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = arguments
            runpy.run_path(arguments[0], run_name="__main__")
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def answer(job: dict) -> dict:
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        pid = os.fork()
        if not pid:
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            os.dup2(out.fileno(), 1)
            os.dup2(err.fileno(), 2)
            os.chdir(job["folder"])
            sys.orig_argv = [sys.executable, *job["arguments"]]
            signal.alarm(job["seconds"])
            code = work(job["arguments"])
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        texts = []
        for file in (out, err):
            file.seek(0)
            texts.append(file.read().decode(errors="replace"))
    return {"returncode": code, "stdout": texts[0], "stderr": texts[1]}


if __name__ == "__main__":
    del sys.path[0]  # the tests, which no program imports
    for name in PROGRAMS:
        importlib.import_module(name)
        del sys.modules[name]
    for line in sys.stdin:
        print(json.dumps(answer(json.loads(line))), flush=True)

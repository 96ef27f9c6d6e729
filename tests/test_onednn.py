"""oneDNN's kernels where something is missing, broken, or asked for; the heap."""

import json
import os
import pathlib
import platform
import subprocess
import sys

import pytest

from cvjax.errors import UserError
from cvjax.nn import onednn
from cvjax.nn.onednn import library

ROOT = pathlib.Path(__file__).parents[1]
HERE = onednn.kernels()
needs_onednn = pytest.mark.skipif(HERE == "XLA", reason="needs oneDNN and a C++ compiler")

# A compiler that copies what was compiled before, and counts how often it was asked.
COMPILER = """#!/bin/sh
echo called >> {folder}/calls
while [ "$1" != -o ]; do shift; done
{before}
cp {library} "$2"
"""


@pytest.fixture
def compiler(tmp_path):
    """Makes a stand-in for the compiler, which does `before` first."""

    def make(before=""):
        built = library.build(library.find())
        path = tmp_path / "compiler"
        path.write_text(COMPILER.format(folder=tmp_path, library=built, before=before))
        path.chmod(0o755)
        return {"CXX": str(path), "XDG_CACHE_HOME": str(tmp_path / "cache")}

    make.calls = lambda: (tmp_path / "calls").read_text().count("called")
    make.libraries = lambda: list((tmp_path / "cache/cvjax/native").glob("*.so"))
    return make


def start(variables, *command):
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", **variables}
    command = [sys.executable, "-m", *(command or ("cvjax.nn.onednn",))]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, cwd=ROOT, env=environment, text=True, **pipes)


def run(variables, *command):
    process = start(variables, *command)
    out, log = process.communicate(timeout=200)
    return process.returncode, out, log


@needs_onednn
def test_a_handler_that_xla_does_not_take(monkeypatch, caplog):
    def refuse(*arguments, **settings):
        raise RuntimeError("FFI handler registration failed: API version 9.9")

    monkeypatch.setattr(onednn.jax.ffi, "register_ffi_target", refuse)
    assert onednn._registered.__wrapped__() is None
    assert "XLA's own kernels" in caplog.text and "API version 9.9" in caplog.text
    monkeypatch.setenv("CVJAX_CONV", "onednn")
    with pytest.raises(UserError, match=r"CVJAX_CONV is 'onednn', but .*API version 9.9"):
        onednn._registered.__wrapped__()


def test_a_machine_without_onednn_says_so_once_and_goes_on(tmp_path):
    code, out, log = run({"DNNLROOT": str(tmp_path)})
    assert (code, out) == (0, "Convolutions on this CPU: XLA.\n")
    assert len(log.splitlines()) == 1
    assert "oneDNN" in log and "pip install" in log and "half as fast" in log


@needs_onednn
def test_a_machine_without_a_compiler_says_so_once_and_goes_on(tmp_path):
    variables = {"PATH": str(tmp_path), "CXX": "", "XDG_CACHE_HOME": str(tmp_path)}
    code, out, log = run(variables)
    assert (code, out) == (0, "Convolutions on this CPU: XLA.\n")
    assert len(log.splitlines()) == 1 and "install g++" in log


@needs_onednn
def test_a_compiler_that_fails(compiler):
    code, out, log = run(compiler("echo no such header >&2; exit 1"))
    assert (code, out) == (0, "Convolutions on this CPU: XLA.\n")
    assert "no such header" in log and not compiler.libraries()


@pytest.mark.parametrize(("choice", "log"), [("onednn", "pip install"), ("mkl", "auto, ")])
def test_what_is_asked_for_and_impossible_is_refused(choice, log, tmp_path):
    variables = {"CVJAX_CONV": choice, "DNNLROOT": str(tmp_path)}
    code, out, sentence = run(variables)
    assert (code, out) == (2, "")
    assert len(sentence.splitlines()) == 1 and log in sentence and choice in sentence


@needs_onednn
def test_a_library_that_was_damaged_is_built_again(compiler):
    variables = compiler()
    assert run(variables)[1] == f"Convolutions on this CPU: {HERE}.\n"
    assert run(variables)[:2] == (0, f"Convolutions on this CPU: {HERE}.\n")
    assert compiler.calls() == 1
    (library,) = compiler.libraries()
    whole = library.read_bytes()
    library.write_bytes(whole[:10_000])
    assert run(variables)[1] == f"Convolutions on this CPU: {HERE}.\n"
    assert compiler.calls() == 2 and library.read_bytes() == whole
    library.with_suffix(".sha256").unlink()
    assert run(variables)[0] == 0 and compiler.calls() == 3


@needs_onednn
def test_two_processes_build_once_and_a_killed_compiler_leaves_nothing(compiler):
    variables = compiler("kill -9 $PPID")  # the process that waits for it
    assert run(variables)[0] == -9 and not compiler.libraries()
    variables = compiler("sleep 1")
    both = [start(variables) for _ in range(2)]
    for process in both:
        out, _ = process.communicate(timeout=200)
        assert (process.returncode, out) == (0, f"Convolutions on this CPU: {HERE}.\n")
    assert compiler.calls() == 2  # one of them was killed


@needs_onednn
def test_a_cache_that_cannot_be_written(compiler, tmp_path):
    (tmp_path / "cache").write_text("a file where the folder should be")
    assert run(compiler())[:2] == (0, f"Convolutions on this CPU: {HERE}.\n")


@needs_onednn
@pytest.mark.parametrize("choice", [pytest.param("onednn", marks=pytest.mark.slow), "xla"])
def test_a_run_records_its_kernels(choice, tmp_path):
    settings = ["--config=configs/digits_resnet.py", f"--workdir={tmp_path}"]
    settings += ["--config.model.depth=8", "--config.model.width=4"]
    settings += ["--config.total_steps=4", "--config.eval_every=4"]
    code, _, log = run({"CVJAX_CONV": choice}, "train", *settings)
    assert code == 0, log
    manifest = json.loads((tmp_path / "config.json").read_text())
    assert manifest["convolution"] == {"onednn": HERE, "xla": "XLA"}[choice]


@needs_onednn
@pytest.mark.skipif(platform.machine() != "x86_64", reason="limits oneDNN to AVX2")
@pytest.mark.parametrize(
    "dtype", ["bfloat16", pytest.param("float32", marks=pytest.mark.slow)]
)
def test_bfloat16_without_its_instructions_is_warned_about(dtype, tmp_path):
    settings = ["--config=configs/digits_resnet.py", f"--workdir={tmp_path}"]
    settings += [f"--config.model.dtype={dtype}", "--config.model.depth=8"]
    settings += ["--config.total_steps=2", "--config.optim.schedule=constant"]
    code, _, log = run({"ONEDNN_MAX_CPU_ISA": "AVX2"}, "train", *settings)
    assert code == 0, log
    assert ("slower than float32" in log) is (dtype == "bfloat16")


@needs_onednn
@pytest.mark.parametrize("dtype", onednn.TYPES)
@pytest.mark.parametrize("channels", [3, 16])
@pytest.mark.parametrize("stride", [1, 2])
def test_all_products_of_a_type_have_fast_kernels(dtype, channels, stride):
    """A missing one among the three would cost more than the others gain."""
    if dtype == "bfloat16" and not onednn.has_bfloat16():
        pytest.skip("needs AVX512_BF16 or AMX")
    side = 32 // stride
    shapes = (8, 32, 32, channels), (8, side, side, 16), (3, 3, channels, 16)
    for wanted in range(3):
        padding = ((1, 1), (1, 1))
        call = onednn.Call(wanted, dtype, shapes, (stride, stride), padding, 1)
        assert onednn.takes(call), wanted


@pytest.mark.skipif(sys.platform != "linux", reason="needs glibc")
def test_freed_memory_is_kept():
    """A second array of the same size must not fault its pages in again."""
    code = """
import resource
from cvjax import memory
{call}
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    bytearray(64 * 2**20)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults()
print(faults())
"""
    counts = []
    for call in ("assert memory.keep_freed()", ""):
        command = [sys.executable, "-c", code.format(call=call)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        counts.append(int(done.stdout))
    assert counts[0] < 100 < counts[1]


PINNED = """
import hashlib, os, pathlib, sys

os.sched_setaffinity(0, {int(core) for core in sys.argv[1].split(",")})

import jax
import numpy as np

from cvjax.nn.conv import Conv

x = np.random.default_rng(0).normal(size=(32, 16, 16, 16)).astype("f4")
net = Conv(16, 3, padding=1)
variables = net.init(jax.random.key(0), x)
square = jax.jit(jax.grad(lambda v, x: (net.apply(v, x) ** 2).sum(), argnums=(0, 1)))
leaves = jax.tree.leaves(jax.device_get(square(variables, x)))
tasks = pathlib.Path("/proc/self/task").glob("*/comm")
names = [path.read_text().strip() for path in tasks]
digest = hashlib.sha256(b"".join(leaf.tobytes() for leaf in leaves)).hexdigest()
print(digest, names.count("tf_XLAEigen"))
"""


@needs_onednn
@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="needs Linux")
def test_cores_that_are_allowed_and_processes_side_by_side():
    """A process has as many threads as cores; two on one core get the same bits."""
    cores = sorted(os.sched_getaffinity(0))
    masks = [str(cores[0])] * 2 + [",".join(map(str, cores[:2]))] * (len(cores) > 1)
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PINNED, mask],
            cwd=ROOT,
            env={**os.environ, "JAX_PLATFORMS": "cpu", "CVJAX_CONV": "onednn"},
            stdout=subprocess.PIPE,
            text=True,
        )
        for mask in masks
    ]
    answers = [process.communicate(timeout=200)[0].split() for process in processes]
    assert [threads for _, threads in answers] == ["1", "1", "2"][: len(masks)]
    assert answers[0] == answers[1]

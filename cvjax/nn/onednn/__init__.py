"""oneDNN's convolutions, called by XLA on the CPU.

conv.cc calls oneDNN. Here it is found, built and registered: at the first use, or ahead of
it by `python -m cvjax.nn.onednn`, which `make` runs at set-up. What was built is kept in
cvjax/native of the user's cache folder, under a name made of all that it depends on.

oneDNN 3 is looked for in $DNNLROOT, in what pkg-config says, in the environment of this
Python (conda-forge, or the PyPI packages onednn-devel-cpu-gomp and onednn-cpu-gomp that
requirements.txt names for Linux on x86-64), and where Homebrew and Debian put it. A C++
compiler is $CXX, c++, g++ or clang++. Where one of both is missing, one line of the log
says so and XLA's own kernels take over. The environment variable CVJAX_CONV decides
instead: "xla" never looks for oneDNN, "onednn" fails where it cannot be used.
"""

import contextlib
import ctypes
import functools
import hashlib
import importlib.metadata
import math
import os
import pathlib
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from typing import NamedTuple

import filelock
import jax
import jaxlib
import numpy as np
from absl import logging

from cvjax.errors import UserError
from cvjax.files import file_digest, user_cache

SOURCE = pathlib.Path(__file__).with_name("conv.cc")
CHOICES = ("auto", "onednn", "xla")
TYPES = ("float32", "bfloat16")


class Unavailable(Exception):
    """oneDNN cannot be used: what is missing, and how to get it."""


class OneDNN(NamedTuple):
    """An installed oneDNN: its version, the folder of dnnl.hpp, and that of the library."""

    version: str
    include: pathlib.Path
    library: pathlib.Path


def kernels() -> str:
    """What convolves on this machine's CPU: "oneDNN 3.2.0" or "XLA".

    Raises:
      UserError: CVJAX_CONV is none of `CHOICES`, or asks for oneDNN and there is none.
    """
    library = _registered()
    return "XLA" if library is None else f"oneDNN {library.version}"


def has_bfloat16() -> bool:
    """Whether the CPU convolves faster in bfloat16 than in float32, by oneDNN."""
    library = _registered()
    return library is not None and library.has_bfloat16


@contextlib.contextmanager
def off() -> Iterator[None]:
    """Programs that are traced and compiled meanwhile have XLA's own kernels.

    For programs that leave this machine, and for accounts of operations and memory, in
    which XLA does not see what a foreign call does. Compilations so far are forgotten,
    before and after, for JAX would find them again.
    """
    jax.clear_caches()
    _off.append(True)
    try:
        yield
    finally:
        _off.pop()
        jax.clear_caches()


_off: list[bool] = []


class Call(NamedTuple):
    """A product of nn/conv.py: which of the three arrays is wanted, and how it is made.

    Shapes are those of x, y and kernel, with or without members.
    """

    wanted: int
    dtype: str
    shapes: tuple[tuple[int, ...], ...]
    strides: tuple[int, int]
    padding: tuple[tuple[int, int], tuple[int, int]]
    groups: int


def takes(call: Call) -> bool:
    """Whether oneDNN has fast kernels for this on this machine's processor.

    It takes float32 and, where the processor does, bfloat16; nothing empty.
    """
    return not _off and _takes(call)


@functools.cache
def _takes(call: Call) -> bool:
    if call.dtype not in TYPES or not all(math.prod(shape) for shape in call.shapes):
        return False
    library = _registered()
    if library is None or min(sum(call.padding, ())) < 0:
        return False
    x, y, kernel = (shape[-4:] for shape in call.shapes)
    pads = sum(call.padding, ())
    sizes = [*x, *kernel[:2], *y[1:], *call.strides, *pads, call.groups]
    asked = (ctypes.c_int64 * len(sizes))(*sizes)
    return bool(library.can(call.wanted, call.dtype == "float32", asked))


def lower(ctx, a, b, call: Call):
    """The lowering of a product: a call of conv.cc."""
    return jax.ffi.ffi_lowering(_registered().target)(
        ctx,
        a,
        b,
        wanted=np.int64(call.wanted),
        strides=np.array(call.strides, np.int64),
        padding=np.array(call.padding, np.int64).ravel(),
        groups=np.int64(call.groups),
        most_threads=np.int64(cpu_limit()),
    )


def cpu_limit(folder: str = "/sys/fs/cgroup") -> int:
    """The CPUs that the container's quota allows, rounded up; 0 for no limit.

    XLA's thread pool knows of the affinity mask (taskset), but not of this.
    """
    root = pathlib.Path(folder)
    try:
        if (root / "cpu.max").exists():
            quota, period = (root / "cpu.max").read_text().split()
        else:
            quota = (root / "cpu/cpu.cfs_quota_us").read_text()
            period = (root / "cpu/cpu.cfs_period_us").read_text()
        return max(0, math.ceil(int(quota) / int(period)))
    except (OSError, ValueError):
        return 0


class Library(NamedTuple):
    """What was built: XLA's name for it, oneDNN's version, and the test of a call.

    `has_bfloat16` says whether the processor has instructions for that type.
    """

    target: str
    version: str
    has_bfloat16: bool
    can: Callable[..., int]


@functools.cache
def _registered() -> Library | None:
    """The kernels, known to XLA; None without oneDNN."""
    choice = os.environ.get("CVJAX_CONV", "auto")
    if choice not in CHOICES:
        raise UserError(f"CVJAX_CONV must be one of {', '.join(CHOICES)}, got {choice!r}.")
    if choice == "xla":
        return None
    try:
        found = find()
        path = build(found)
        loaded = ctypes.CDLL(str(path))
        handler, can = loaded.cvjax_convolve, loaded.cvjax_can_convolve
    except (Unavailable, OSError, AttributeError) as reason:
        if choice == "onednn":
            raise UserError(f"CVJAX_CONV is 'onednn', but {reason}") from None
        logging.warning(
            "Convolutions run on XLA's own kernels, half as fast as oneDNN's: %s", reason
        )
        return None
    can.argtypes = (ctypes.c_int64, ctypes.c_int64, ctypes.POINTER(ctypes.c_int64))
    # Named after its build: a program in JAX's compilation cache never meets another one.
    target = f"cvjax_convolve_{path.stem.rpartition('-')[2]}"
    jax.ffi.register_ffi_target(target, jax.ffi.pycapsule(handler), platform="cpu")
    return Library(target, found.version, bool(loaded.cvjax_has_bfloat16()), can)


def find() -> OneDNN:
    """The first oneDNN of version 3 in the places that the head of this file names.

    Raises:
      Unavailable: there is none.
    """
    others = []
    for include, library in _candidates():
        headers = [include / "oneapi/dnnl/dnnl_version.h", include / "dnnl_version.h"]
        text = "".join(path.read_text() for path in headers if path.exists())
        if not text or not list(library.glob("libdnnl.*")):
            continue
        numbers = re.findall(r"#define DNNL_VERSION_(?:MAJOR|MINOR|PATCH) (\d+)", text)
        version = ".".join(numbers)
        if version.startswith("3."):
            return OneDNN(version, include, library)
        others.append(f"{version or 'unknown'} in {include}")
    wanted = (
        "`pip install onednn-cpu-gomp onednn-devel-cpu-gomp` (Linux on x86-64), or set "
    )
    wanted += "DNNLROOT to the folder of an installed one."
    found = f"only version {others[0]}" if others else "none"
    raise Unavailable(f"oneDNN 3 with its headers is missing ({found} found); {wanted}")


def _candidates() -> Iterator[tuple[pathlib.Path, pathlib.Path]]:
    """Folders of headers and of libraries."""
    root = os.environ.get("DNNLROOT")
    if root:
        for name in ("lib", "lib64"):
            yield pathlib.Path(root, "include"), pathlib.Path(root, name)
        return
    asked = [_pkg_config(f"--variable={name}") for name in ("includedir", "libdir")]
    if all(asked):
        yield pathlib.Path(asked[0]), pathlib.Path(asked[1])
    try:
        header = _installed_file("onednn-devel-cpu-gomp", "dnnl.hpp")
        yield header.parent, _installed_file("onednn-cpu-gomp", "libdnnl.so.3").parent
    except importlib.metadata.PackageNotFoundError:
        pass
    multiarch = f"lib/{platform.machine()}-linux-gnu"
    for prefix in (sys.prefix, "/opt/homebrew", "/usr/local", "/usr"):
        for name in ("lib", "lib64", multiarch):
            include = pathlib.Path(prefix, "include")
            if (include / "dnnl_version.h").exists() or (include / "oneapi/dnnl").exists():
                yield include, pathlib.Path(prefix, name)


def _pkg_config(option: str) -> str:
    try:
        command = ["pkg-config", option, "dnnl"]
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()
    except OSError:
        return ""


def _installed_file(distribution: str, name: str) -> pathlib.Path:
    """A file of an installed package, wherever it was put."""
    for path in importlib.metadata.files(distribution) or ():
        if path.name == name:
            return pathlib.Path(path.locate()).resolve()
    raise importlib.metadata.PackageNotFoundError(distribution)


def build(found: OneDNN) -> pathlib.Path:
    """The library made of conv.cc, compiled if it was not yet.

    Several processes may ask at once, and any of them may be killed: the library is moved
    to its place when it is whole, together with its hash, without which it is not used.

    Raises:
      Unavailable: there is no compiler, or it fails.
    """
    parts = [
        SOURCE.read_bytes(),
        *map(str.encode, (jaxlib.__version__, found.version, str(found.library))),
        *map(str.encode, (platform.platform(), platform.machine())),
    ]
    key = hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]
    folder = user_cache("native")
    path = folder / f"conv-{key}.so"
    if _is_whole(path):
        return path
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(folder / f"conv-{key}.lock"):
            if not _is_whole(path):
                _compile(found, path)
    except (OSError, NotImplementedError):  # read-only, full, or without locks
        path = pathlib.Path(_own_folder(), path.name)
        if not _is_whole(path):
            _compile(found, path)
    return path


@functools.cache
def _own_folder() -> str:
    """A folder of this process, removed at its end."""
    folder = tempfile.TemporaryDirectory(prefix="cvjax-native-")
    _own_folder.keep = folder
    return folder.name


def _hash_of(path: pathlib.Path) -> pathlib.Path:
    return path.with_suffix(".sha256")


def _is_whole(path: pathlib.Path) -> bool:
    """A library that was cut short would end the process when it is loaded."""
    try:
        wanted = _hash_of(path).read_text()
        return file_digest(path) == wanted
    except (OSError, UnicodeDecodeError):
        return False


def _compile(found: OneDNN, path: pathlib.Path) -> None:
    names = [os.environ.get("CXX", ""), "c++", "g++", "clang++"]
    compiler = next((name for name in names if name and shutil.which(name)), None)
    if compiler is None:
        raise Unavailable(
            "a C++ compiler is missing; install g++ (Debian: `apt install g++`, conda: "
            "`conda install cxx-compiler`) or set CXX."
        )
    with tempfile.TemporaryDirectory(dir=path.parent, prefix="build-") as folder:
        output = pathlib.Path(folder, path.name)
        library = next(iter(sorted(found.library.glob("libdnnl.*"))))
        command = [compiler, "-std=c++17", "-O3", "-fPIC", "-shared", "-fopenmp", "-w"]
        command += [f"-I{jax.ffi.include_dir()}", f"-I{found.include}", str(SOURCE)]
        command += ["-o", str(output), str(library), f"-Wl,-rpath,{found.library}"]
        logging.info("Compiling %s for oneDNN %s, once.", SOURCE.name, found.version)
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            said = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
            raise Unavailable(
                f"{SOURCE.name} does not compile against oneDNN {found.version} and jaxlib "
                f"{jaxlib.__version__} ({said[0]}); `{' '.join(command)}` shows all."
            )
        new_hash = _hash_of(output)
        new_hash.write_text(file_digest(output))
        # The hash last: only with it is the library used.
        _hash_of(path).unlink(missing_ok=True)
        os.replace(output, path)
        os.replace(new_hash, _hash_of(path))

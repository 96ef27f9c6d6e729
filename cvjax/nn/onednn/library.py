"""Finds an installed oneDNN, and builds conv.cc and sums.cc against it.

oneDNN 3 is looked for in $DNNLROOT, in what pkg-config says, in the environment of this
Python (conda-forge, or the PyPI packages onednn-devel-cpu-gomp and onednn-cpu-gomp that
requirements.txt names for Linux on x86-64), and where Homebrew and Debian put it. A C++
compiler is $CXX, c++, g++ or clang++. What was built is kept in cvjax/native of the user's
cache folder, under a name made of all that it depends on.
"""

import functools
import hashlib
import importlib.metadata
import os
import pathlib
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jaxlib
from absl import logging

from cvjax.files import file_digest, locked, user_cache

FOLDER = pathlib.Path(__file__).parent
SOURCES = [FOLDER / "conv.cc", FOLDER / "sums.cc"]


class Unavailable(Exception):
    """oneDNN cannot be used: what is missing, and how to get it."""


class OneDNN(NamedTuple):
    """An installed oneDNN: its version, the folder of dnnl.hpp, and that of the library."""

    version: str
    include: pathlib.Path
    library: pathlib.Path


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
    """The library made of `SOURCES`, compiled if it was not yet.

    Several processes may ask at once, and any of them may be killed: the library is moved
    to its place when it is whole, together with its hash, without which it is not used.

    Raises:
      Unavailable: there is no compiler, or it fails.
    """
    parts = [
        *(path.read_bytes() for path in (*SOURCES, FOLDER / "share.h")),
        *map(str.encode, (jaxlib.__version__, found.version, str(found.library))),
        *map(str.encode, (platform.platform(), platform.machine())),
    ]
    key = hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]
    folder = user_cache("native")
    path = folder / f"kernels-{key}.so"
    if _is_whole(path):
        return path
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder / f"kernels-{key}.lock"):
            if not _is_whole(path):
                _compile(found, path)
    except (OSError, NotImplementedError):  # read-only, or full
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
    compilers = [os.environ.get("CXX", ""), "c++", "g++", "clang++"]
    compiler = next((name for name in compilers if name and shutil.which(name)), None)
    if compiler is None:
        raise Unavailable(
            "a C++ compiler is missing; install g++ (Debian: `apt install g++`, conda: "
            "`conda install cxx-compiler`) or set CXX."
        )
    with tempfile.TemporaryDirectory(dir=path.parent, prefix="build-") as folder:
        output = pathlib.Path(folder, path.name)
        library = next(iter(sorted(found.library.glob("libdnnl.*"))))
        command = [compiler, "-std=c++17", "-O3", "-fPIC", "-shared", "-fopenmp", "-w"]
        command += [f"-I{jax.ffi.include_dir()}", f"-I{found.include}", *map(str, SOURCES)]
        command += ["-o", str(output), str(library), f"-Wl,-rpath,{found.library}"]
        names = " and ".join(path.name for path in SOURCES)
        logging.info("Compiling %s for oneDNN %s, once.", names, found.version)
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            said = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
            raise Unavailable(
                f"{names} do not compile against oneDNN {found.version} and jaxlib "
                f"{jaxlib.__version__} ({said[0]}); `{' '.join(command)}` shows all."
            )
        new_hash = _hash_of(output)
        new_hash.write_text(file_digest(output))
        # The hash last: only with it is the library used.
        _hash_of(path).unlink(missing_ok=True)
        os.replace(output, path)
        os.replace(new_hash, _hash_of(path))

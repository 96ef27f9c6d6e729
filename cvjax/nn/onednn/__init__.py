"""oneDNN's convolutions, and sums per channel, called by XLA on the CPU.

conv.cc calls oneDNN; sums.cc does what oneDNN has no kernel for. `library` finds oneDNN and
builds both, at the first use or ahead of it by `python -m cvjax.nn.onednn`, which `make`
runs at set-up; here they are registered with XLA. Where oneDNN or a C++ compiler is
missing, one line of the log says so and XLA's own kernels take over. The environment
variable CVJAX_CONV decides instead: "xla" never looks for oneDNN, "onednn" fails where it
cannot be used.
"""

import contextlib
import ctypes
import functools
import math
import os
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import numpy as np
from absl import logging

from cvjax.cores import cpu_limit
from cvjax.errors import UserError
from cvjax.nn.onednn import library as native

CHOICES = ("auto", "onednn", "xla")
TYPES = ("float32", "bfloat16")


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
    return jax.ffi.ffi_lowering(_registered().convolve)(
        ctx,
        a,
        b,
        wanted=np.int64(call.wanted),
        strides=np.array(call.strides, np.int64),
        padding=np.array(call.padding, np.int64).ravel(),
        groups=np.int64(call.groups),
        most_threads=np.int64(cpu_limit()),
    )


def adds_up(x: jax.core.ShapedArray) -> bool:
    """Whether sums.cc makes the sums of nn/channel_sums.py; it takes what `takes` does."""
    return not _off and x.dtype.name in TYPES and x.size > 0 and _registered() is not None


def on_one_device(ctx) -> bool:
    """Whether a program may call these: XLA cuts no foreign call up among devices."""
    return getattr(ctx.module_context.axis_context, "num_devices", 1) == 1


def lower_sums(ctx, x, y, lead: int):
    """The lowering of sums per channel: a call of sums.cc."""
    lowering = jax.ffi.ffi_lowering(_registered().sums)
    limit = np.int64(cpu_limit())
    return lowering(ctx, x, y, lead=np.int64(lead), most_threads=limit)


class Library(NamedTuple):
    """What was built: XLA's names for it, oneDNN's version, and the test of a call.

    `has_bfloat16` says whether the processor has instructions for that type.
    """

    convolve: str
    sums: str
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
        found = native.find()
        path = native.build(found)
        loaded = ctypes.CDLL(str(path))
        handlers = [loaded.cvjax_convolve, loaded.cvjax_add_up]
        can = loaded.cvjax_can_convolve
        has_bfloat16 = bool(loaded.cvjax_has_bfloat16())
        # Named after its build: a program in JAX's compilation cache never meets another.
        key = path.stem.rpartition("-")[2]
        names = [f"cvjax_convolve_{key}", f"cvjax_add_up_{key}"]
        for name, handler in zip(names, handlers, strict=True):
            jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(handler), platform="cpu")
    # RuntimeError is XLA's, for a handler of another version of its interface.
    except (native.Unavailable, OSError, AttributeError, RuntimeError) as reason:
        if choice == "onednn":
            raise UserError(f"CVJAX_CONV is 'onednn', but {reason}") from None
        logging.warning(
            "Convolutions run on XLA's own kernels, half as fast as oneDNN's: %s", reason
        )
        return None
    can.argtypes = (ctypes.c_int64, ctypes.c_int64, ctypes.POINTER(ctypes.c_int64))
    return Library(*names, found.version, has_bfloat16, can)

"""Sums over images per channel, and their transpose: two primitives.

    channel_sums    s, p = sum of x, sum of x * y        linear in x
    add_affine      z = m + s + p * y, rounded once      linear in m, s and p

The cotangents of s and p in the second are the first, of z's cotangent and y. So
normalisation, which is made of them (nn/norm.py), may be differentiated in any mode and to
any order, and its gradient reduces whole maps nowhere else. On CPU one pass over x and y,
in their own type, makes both sums (nn/onednn/sums.cc); elsewhere XLA makes them. What is
computed element by element is XLA's everywhere.
"""

import functools
from typing import Any

import jax
from jax import numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from cvjax.nn import onednn


def channel_sums(x: jax.Array, y: jax.Array, lead: int = 0) -> tuple[jax.Array, jax.Array]:
    """Sums of x and of x * y over all axes but the first `lead` and the last one.

    Args:
      x, y: [..., channels], of one shape.
      lead: number of leading axes that are kept.

    Returns:
      Both sums, float32 at least, of length 1 along the axes that were summed over.

    Raises:
      TypeError: shapes differ, or have not `lead` axes before the last one.
    """
    dtype = jnp.promote_types(x.dtype, y.dtype)
    return tuple(sums_p.bind(x.astype(dtype), y.astype(dtype), lead=lead))


def add_affine(
    m: jax.Array, s: jax.Array, p: jax.Array, y: jax.Array, lead: int, dtype: Any
) -> jax.Array:
    """m + s + p * y, computed in float32 at least.

    Args:
      m: [..., channels], of the type of s and p.
      s, p: as `channel_sums` returns them for `lead`.
      y: [..., channels].
      dtype: of the result, which has y's shape.

    Raises:
      TypeError: shapes do not fit each other.
    """
    return affine_p.bind(m, s, p, y, lead=lead, dtype=jnp.dtype(dtype))


sums_p, affine_p = Primitive("channel_sums"), Primitive("add_affine")
sums_p.multiple_results = True


def _wide(dtype):
    return jnp.promote_types(dtype, jnp.float32)


def _summed(y, lead):
    """The shape of the sums of a map."""
    if not 0 <= lead < y.ndim:
        raise TypeError(f"lead must be 0 to {y.ndim - 1} for {y.ndim} axes, got {lead}.")
    return (*y.shape[:lead], *(1,) * (y.ndim - 1 - lead), y.shape[-1])


@sums_p.def_abstract_eval
def _sums_abstract(x, y, *, lead):
    if x.shape != y.shape or x.dtype != y.dtype:
        raise TypeError(f"x and y must be alike, got {x.str_short()}, {y.str_short()}.")
    shape = _summed(y, lead)
    return [x.update(shape=shape, dtype=_wide(x.dtype), weak_type=False)] * 2


@affine_p.def_abstract_eval
def _affine_abstract(m, s, p, y, *, lead, dtype):
    if m.shape != y.shape or {s.shape, p.shape} != {_summed(y, lead)}:
        shapes = ", ".join(a.str_short() for a in (m, s, p, y))
        raise TypeError(f"m, s, p and y do not fit each other, got {shapes}.")
    return y.update(dtype=dtype, weak_type=False)


sums_p.def_impl(jax.jit(sums_p.bind, static_argnames="lead"))
affine_p.def_impl(jax.jit(affine_p.bind, static_argnames=("lead", "dtype")))


def _sums_jvp(primals, tangents, *, lead):
    (x, y), (dx, dy) = primals, tangents
    out = sums_p.bind(x, y, lead=lead)
    ds, dp = (jnp.zeros_like(o) for o in out)
    if not isinstance(dx, ad.Zero):
        ds, dp = sums_p.bind(dx, y, lead=lead)
    if not isinstance(dy, ad.Zero):
        dp = dp + sums_p.bind(dy, x, lead=lead)[1]
    return out, [ds, dp]


def _sums_transpose(cotangents, x, y, *, lead):
    s, p = map(ad.instantiate_zeros, cotangents)
    if ad.is_undefined_primal(x):
        return [(s + p * y).astype(x.aval.dtype), None]
    return [None, (p * x).astype(y.aval.dtype)]


def _affine_jvp(primals, tangents, *, lead, dtype):
    m, s, p, y = primals
    *linear, dy = tangents
    out = affine_p.bind(m, s, p, y, lead=lead, dtype=dtype)
    dm, ds, dp = map(ad.instantiate_zeros, linear)
    if not isinstance(dy, ad.Zero):
        dm = dm + p * dy
    return out, affine_p.bind(dm, ds, dp, y, lead=lead, dtype=dtype)


def _affine_transpose(cotangent, m, s, p, y, *, lead, dtype):
    if isinstance(cotangent, ad.Zero):
        return [None] * 4
    if ad.is_undefined_primal(y):
        return [None] * 3 + [(p * cotangent).astype(y.aval.dtype)]
    sums = channel_sums(cotangent, y, lead)
    return [
        array.astype(operand.aval.dtype) if ad.is_undefined_primal(operand) else None
        for operand, array in zip((m, s, p), (cotangent, *sums), strict=True)
    ] + [None]


ad.primitive_jvps[sums_p], ad.primitive_jvps[affine_p] = _sums_jvp, _affine_jvp
ad.primitive_transposes[sums_p] = _sums_transpose
ad.primitive_transposes[affine_p] = _affine_transpose


def _batch(primitive, arrays, axes, *, lead, **settings):
    """`vmap` adds an axis that is kept."""
    size = next(a.shape[i] for a, i in zip(arrays, axes, strict=True) if i is not None)
    arrays = [
        jnp.broadcast_to(a, (size, *a.shape)) if i is None else jnp.moveaxis(a, i, 0)
        for a, i in zip(arrays, axes, strict=True)
    ]
    out = primitive.bind(*arrays, lead=lead + 1, **settings)
    return out, [0, 0] if primitive.multiple_results else 0


for _primitive in (sums_p, affine_p):
    batching.primitive_batchers[_primitive] = functools.partial(_batch, _primitive)


def _sums_by_xla(x, y, *, lead):
    axes = tuple(range(lead, x.ndim - 1))
    x, y = (a.astype(_wide(a.dtype)) for a in (x, y))
    return [x.sum(axes, keepdims=True), (x * y).sum(axes, keepdims=True)]


def _affine_by_xla(m, s, p, y, *, lead, dtype):
    return (m + (s + p * y)).astype(dtype)


def _lower_sums_on_cpu(ctx, x, y, *, lead):
    if onednn.on_one_device(ctx) and onednn.adds_up(ctx.avals_in[0]):
        return onednn.lower_sums(ctx, x, y, lead)
    return mlir.lower_fun(_sums_by_xla, multiple_results=True)(ctx, x, y, lead=lead)


mlir.register_lowering(sums_p, mlir.lower_fun(_sums_by_xla, multiple_results=True))
mlir.register_lowering(sums_p, _lower_sums_on_cpu, platform="cpu")
mlir.register_lowering(affine_p, mlir.lower_fun(_affine_by_xla, multiple_results=False))

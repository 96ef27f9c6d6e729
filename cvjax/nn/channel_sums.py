"""Sums over images per channel: two primitives, each the transpose of the other.

    s, p = channel_sums(x, y)    sums of x, and of x * y
    z    = spread(s, p, y)       s + p * y

The first is linear in x, the second in s and p, and <s', s> + <p', p> = <spread(s', p', y),
x>. So normalisation, which is made of them (nn/norm.py), may be differentiated in any mode
and to any order and reduces whole maps nowhere else. On CPU one pass over x and y, in their
own type, makes both sums (nn/onednn/sums.cc); elsewhere XLA makes them. What is computed
element by element is XLA's everywhere.
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
    """
    dtype = jnp.promote_types(x.dtype, y.dtype)
    return tuple(sums_p.bind(x.astype(dtype), y.astype(dtype), lead=lead))


def spread(s: jax.Array, p: jax.Array, y: jax.Array, lead: int, dtype: Any) -> jax.Array:
    """s + p * y, computed in float32 at least.

    Args:
      s, p: as `channel_sums` returns them for `lead`.
      y: [..., channels].
      dtype: of the result, which has y's shape.
    """
    return spread_p.bind(s, p, y, lead=lead, dtype=jnp.dtype(dtype))


sums_p, spread_p = Primitive("channel_sums"), Primitive("spread")
sums_p.multiple_results = True


def _wide(dtype):
    return jnp.promote_types(dtype, jnp.float32)


@sums_p.def_abstract_eval
def _sums_abstract(x, y, *, lead):
    shape = (*x.shape[:lead], *(1,) * (x.ndim - 1 - lead), x.shape[-1])
    return [x.update(shape=shape, dtype=_wide(x.dtype), weak_type=False)] * 2


@spread_p.def_abstract_eval
def _spread_abstract(s, p, y, *, lead, dtype):
    return y.update(dtype=dtype, weak_type=False)


@functools.partial(jax.jit, static_argnames="lead")
def _sums_now(x, y, *, lead):
    return sums_p.bind(x, y, lead=lead)


@functools.partial(jax.jit, static_argnames=("lead", "dtype"))
def _spread_now(s, p, y, *, lead, dtype):
    return spread_p.bind(s, p, y, lead=lead, dtype=dtype)


sums_p.def_impl(_sums_now)
spread_p.def_impl(_spread_now)


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
    return [spread_p.bind(s, p, y, lead=lead, dtype=x.aval.dtype), None]


def _spread_jvp(primals, tangents, *, lead, dtype):
    (s, p, y), (ds, dp, dy) = primals, tangents
    out = spread_p.bind(s, p, y, lead=lead, dtype=dtype)
    ds, dp = map(ad.instantiate_zeros, (ds, dp))
    dz = spread_p.bind(ds, dp, y, lead=lead, dtype=dtype)
    if not isinstance(dy, ad.Zero):
        dz = dz + (p * dy).astype(dtype)
    return out, dz


def _spread_transpose(cotangent, s, p, y, *, lead, dtype):
    if isinstance(cotangent, ad.Zero):
        return [None] * 3
    sums = channel_sums(cotangent, y, lead)
    return [
        total.astype(array.aval.dtype) if ad.is_undefined_primal(array) else None
        for array, total in zip((s, p), sums, strict=True)
    ] + [None]


ad.primitive_jvps[sums_p], ad.primitive_jvps[spread_p] = _sums_jvp, _spread_jvp
ad.primitive_transposes[sums_p] = _sums_transpose
ad.primitive_transposes[spread_p] = _spread_transpose


def _batch(primitive, arrays, axes, *, lead, **settings):
    """`vmap` adds an axis that is kept."""
    size = next(a.shape[i] for a, i in zip(arrays, axes, strict=True) if i is not None)
    arrays = [
        jnp.broadcast_to(a, (size, *a.shape)) if i is None else jnp.moveaxis(a, i, 0)
        for a, i in zip(arrays, axes, strict=True)
    ]
    out = primitive.bind(*arrays, lead=lead + 1, **settings)
    return out, [0, 0] if primitive.multiple_results else 0


for _primitive in (sums_p, spread_p):
    batching.primitive_batchers[_primitive] = functools.partial(_batch, _primitive)


def _sums_by_xla(x, y, *, lead):
    axes = tuple(range(lead, x.ndim - 1))
    x, y = (a.astype(_wide(a.dtype)) for a in (x, y))
    return [x.sum(axes, keepdims=True), (x * y).sum(axes, keepdims=True)]


def _spread_by_xla(s, p, y, *, lead, dtype):
    return (s + p * y.astype(_wide(y.dtype))).astype(dtype)


def _lower_sums_on_cpu(ctx, x, y, *, lead):
    if onednn.on_one_device(ctx) and onednn.adds_up(ctx.avals_in[0]):
        return onednn.lower_sums(ctx, x, y, lead)
    return mlir.lower_fun(_sums_by_xla, multiple_results=True)(ctx, x, y, lead=lead)


mlir.register_lowering(sums_p, mlir.lower_fun(_sums_by_xla, multiple_results=True))
mlir.register_lowering(sums_p, _lower_sums_on_cpu, platform="cpu")
mlir.register_lowering(spread_p, mlir.lower_fun(_spread_by_xla, multiple_results=False))

"""Singular values of matrices, by matrix products alone: the largest one from above, and all of them bounded.

Matrices are the last two axes of an array, the axes before are a stack of them. `norm` and `limit` are [..., 1, 1].
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from optax_clip._engine.leaves import wide

# Quintics a x + b x³ + c x⁵ that take [l, 1] to 1, one after the other: the minimax ones of Polar Express (Amsel and
# others, 2025, arXiv 2505.16932), with its room for values up to 1.01.
_POLAR = (  # l = 0.02
    (7.607, -21.2323, 15.2607), (3.1862, -2.3423, 0.4772), (2.1984, -1.549, 0.391), (1.8657, -1.2233, 0.3578),
    (1.875, -1.25, 0.375),
)  # fmt: skip
_SIGN = (  # l = 7e-5: x (1 - sign(x)) / 2, what a clip at x = 0 is wrong by, stays below 2.6e-6
    (8.2369, -22.9905, 16.5244), (4.1159, -2.8737, 0.5167), (4.1039, -2.8706, 0.5171), (4.0553, -2.8584, 0.5188),
    (3.8688, -2.8141, 0.5271), (3.1522, -2.3171, 0.4744), (2.174, -1.5268, 0.3887), (1.864, -1.2215, 0.3576),
    (1.875, -1.25, 0.375),
)  # fmt: skip
_RATIO = 32.0  # of bound to limit, down to which one stage is exact to 1e-4 of the limit
_STAGES = (_RATIO**3, _RATIO**2, _RATIO, 1.0)  # multiples of the limit to clip at, those that are below the bound
_product = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)


@functools.partial(jax.jit, inline=True)
def largest(x: jax.Array) -> jax.Array:
    """The largest singular value of each matrix from above, [..., 1, 1]: (Σ σ^64)^(1/64), by four squarings."""
    return _on_mesh(_largest, x, of_matrices=True)


def _largest(x: jax.Array) -> jax.Array:
    x = _flat(x)
    # Relative to the largest entry. 8 keeps reciprocals normal numbers: XLA takes 1 / peak first.
    peak = jax.lax.stop_gradient(jnp.max(jnp.abs(x), axis=(-2, -1), keepdims=True, initial=0.0))
    peak = jnp.maximum(peak, 4 * jnp.finfo(x.dtype).tiny)
    power, root = _gram(x * (8 / peak)), 1 / 8
    for k in range(4):  # by homogeneity, the scales need no derivative
        trace = jax.lax.stop_gradient(jnp.trace(power.real, axis1=-2, axis2=-1)[..., None, None])
        trace = jnp.where(trace == 0, 1.0, trace)
        power, root = _product(power / trace, power / trace), root * trace ** (0.5 ** (k + 1))
    total = jnp.sum(jnp.square(power.real) + jnp.square(power.imag), axis=(-2, -1), keepdims=True)
    return jnp.where(total == 0, 0.0, jnp.where(total == 0, 1.0, total) ** (1 / 64) * root * peak)


@functools.partial(jax.jit, inline=True)
def bounded(x: jax.Array, norm: jax.Array, limit: jax.Array) -> jax.Array:
    """U min(Σ, limit) V^T by products, `norm` being what `largest` found. Does nothing where every norm <= limit."""
    clipped = lambda x, norm, limit: jax.lax.cond(jnp.all(norm <= limit), lambda x, *_: x, _bounded, x, norm, limit)
    return _on_mesh(clipped, x, norm, limit)


def _bounded(x: jax.Array, norm: jax.Array, limit: jax.Array) -> jax.Array:
    unit, z = _scaled(x, norm)
    norm = jax.lax.stop_gradient(norm)
    bound = jnp.where(norm < jnp.inf, jnp.maximum(norm / unit, 0.25), 4 * (z.shape[-2] * z.shape[-1]) ** 0.5)
    low = jnp.minimum(norm, limit) / unit
    # Beyond the stages rounding leaves nothing of small singular values, and all are scaled.
    goal = jnp.maximum(low, bound / _RATIO ** len(_STAGES))
    (z, *_), _ = jax.lax.scan(_staged, (z, bound, goal), jnp.array(_STAGES, bound.dtype))
    return jnp.where(norm <= limit, x, _like(x, z * (low / goal) * unit))


def responded(x: jax.Array, norm: jax.Array, limit: jax.Array, respond: Callable) -> jax.Array:
    """U respond(Σ, limit) V^T by singular value decomposition. 0 stays 0, and a limit of inf leaves all alone."""
    return _on_mesh(functools.partial(_responded, respond), x, norm, limit)


def _responded(respond: Callable, x: jax.Array, norm: jax.Array, limit: jax.Array) -> jax.Array:
    unit, z = _scaled(x, norm)
    left, values, right = jnp.linalg.svd(z, full_matrices=False)
    values, off = jnp.minimum(values * unit[..., 0], jnp.finfo(unit.dtype).max), limit == jnp.inf
    after = respond(jnp.where(values > 0, values, 1.0), jnp.where(off, 1.0, limit)[..., 0])
    after = jnp.where(values > 0, jnp.maximum(after, 0.0), 0.0) / unit[..., 0]
    return jnp.where(off, x, _like(x, _product(left * after[..., None, :].astype(z.dtype), right) * unit))


def _on_mesh(function: Callable, x: jax.Array, *rest: jax.Array, of_matrices: bool = False) -> jax.Array:
    """The function of `x`. On explicit axes of a mesh XLA finds the way, to the sharding of `x` or of its stack."""
    mesh, spec = jax.typeof(x).sharding.mesh, tuple(jax.typeof(x).sharding.spec)
    names = tuple(name for name, kind in zip(mesh.axis_names, mesh.axis_types) if kind == AxisType.Explicit)
    if not names:
        return function(x, *rest)
    sharding: Any = NamedSharding(mesh, PartitionSpec(*spec[:-2], None, None) if of_matrices else PartitionSpec(*spec))
    automatic: Any = jax.sharding.auto_axes(function, axes=names, out_sharding=sharding)
    return automatic(x, *rest)


def _scaled(x: jax.Array, norm: jax.Array) -> tuple[jax.Array, jax.Array]:
    """A power of 2, at least the norm, and the matrices relative to it, so that entries keep all their digits."""
    norm, info = jax.lax.stop_gradient(jnp.where(norm == 0, 1.0, norm)), jnp.finfo(norm.dtype)
    unit = jax.lax.reduce_precision(jnp.clip(1.5 * norm, 4 * info.tiny, info.max / 4), info.nexp, 0)
    return unit, _flat(x) / unit


def _staged(carry: tuple, share: jax.Array) -> tuple:
    z, bound, goal = carry
    limit = jnp.minimum(share * goal, bound)
    z = jax.lax.cond(jnp.any(limit < bound), _stage, lambda z, *_: z, z, bound, limit)
    return (z, jnp.minimum(bound, 1.005 * limit), goal), None


def _stage(z: jax.Array, bound: jax.Array, limit: jax.Array) -> jax.Array:
    """z - (I - sign) (z - limit · polar) / 2, where sign is -1 for singular values above the limit and 1 below."""
    polar = _converged(z / bound, _POLAR)
    identity = jnp.expand_dims(jnp.eye(z.shape[-2], dtype=z.dtype), tuple(range(z.ndim - 2)))
    sign = _converged((limit * identity - _product(polar, z.mT.conj())) / bound, _SIGN)
    # What is large cancels, and rounding of the product would be left. On a grid of 2^-12 the product is exact.
    (high, low), (rough, fine) = _split(z), _split(sign)
    small = low + limit * polar + _product(sign, low - limit * polar) + _product(fine, high)
    return (high + _product(rough, high) + small) / 2


def _converged(x: jax.Array, quintics: tuple) -> jax.Array:
    def step(x, factors):
        (a, b, c), square = factors, _gram(x)
        return a * x + _product(b * square + c * _product(square, square), x), None

    return jax.lax.scan(step, x, jnp.array(quintics, x.real.dtype))[0]


def _gram(x: jax.Array) -> jax.Array:
    return _product(x, x.mT.conj())


def _flat(x: jax.Array) -> jax.Array:
    """In f32 at least, and with no more rows than columns, which makes products small."""
    x = x if jnp.iscomplexobj(x) else x.astype(wide(x))
    return x if x.shape[-2] <= x.shape[-1] else x.mT


def _like(x: jax.Array, flat: jax.Array) -> jax.Array:
    return (flat if x.shape[-2] <= x.shape[-1] else flat.mT).astype(x.dtype)


def _split(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    high = jnp.round(x * 2.0**12) / 2.0**12
    return high, x - high

"""Norms of blocks of arrays, in one read. ARCHITECTURE.md says why sums are taken as they are."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from optax_clip._engine.leaves import real_parts, wide, widest
from optax_clip._engine.mesh import varying
from optax_clip._engine.numbers import within_reciprocals


class Part(NamedTuple):
    """What one leaf contributes to its block."""

    value: jax.Array
    axes: tuple[int, ...] | None  # of a unit; None: the whole leaf
    mesh_axes: tuple[str, ...]  # mesh axes to sum over

    @property
    def size(self) -> int:
        """Entries of the block, on all devices."""
        shape = self.value.shape
        here = shape if self.axes is None else [shape[a] for a in self.axes]
        return math.prod([*here, *map(jax.lax.axis_size, self.mesh_axes)])


def norms_of(blocks: Sequence[Sequence[Part]], ord: float = 2.0, *, mean: bool = False) -> list[jax.Array]:
    """(Σ |x|^ord)^(1/ord) of each block; with `mean`, the root of the mean of squares."""
    values = [[part.value for part in block] for block in blocks]
    layout = tuple(tuple((part.axes, part.mesh_axes) for part in block) for block in blocks)
    norms = _compiled(values, ord=ord, layout=layout) if blocks else []
    sizes = [max(sum(part.size for part in block), 1) if mean else 1 for block in blocks]
    return [norm if size == 1 else norm * (1 / math.sqrt(size)) for norm, size in zip(norms, sizes)]


# Compiled by itself, so that calls outside of jit do not compile the choice of the platform anew each time.
@functools.partial(jax.jit, static_argnames=("ord", "layout"), inline=True)
def _compiled(values: list, *, ord: float, layout: tuple) -> list[jax.Array]:
    return _norms(ord, layout, values)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _norms(ord: float, layout: tuple, values: list) -> list[jax.Array]:
    if ord not in (1.0, 2.0):
        return _relative_to_largest(ord, layout, values)
    norms: dict[int, jax.Array] = {}
    units = [any(axes is not None for axes, _ in block) for block in layout]
    kinds = ["f64" if dtype == jnp.float64 else unit for dtype, unit in zip(_dtypes(values), units)]
    for kind in dict.fromkeys(kinds):
        places = [i for i, other in enumerate(kinds) if other == kind]
        own, of_own = ([sequence[i] for i in places] for sequence in (values, layout))
        in_f64, in_f32, split = (functools.partial(take, ord, of_own) for take in (_in_f64, _in_f32, _split))
        on_tpu = split if ord == 2.0 else in_f32
        wide_split = functools.partial(split, scales=(2.0**300, 2.0**-500)) if ord == 2.0 else in_f32
        if kind is True:
            found = in_f32(own)
        else:
            found = jax.lax.platform_dependent(own, tpu=on_tpu, default=wide_split if kind == "f64" else in_f64)
        norms |= zip(places, found)
    # TPU v5e, libtpu 0.0.42: without the barrier a leaf clip takes 1.37 of the cycles of bare AdamW, with it 1.11.
    together: dict = {}  # a barrier gives all that it holds the mesh axes of each
    for i, norm in norms.items():
        together.setdefault(varying(norm), []).append(i)
    for places in together.values():
        norms |= zip(places, jax.lax.optimization_barrier(tuple(norms[i] for i in places)))
    return [norms[i] for i in range(len(values))]


@_norms.defjvp
def _(ord, layout, primals, tangents):
    norms = _norms(ord, layout, *primals)
    # The derivative of a norm that is not finite is 0: a skipped step contributes nothing.
    units = [jnp.where((norm == 0) | ~jnp.isfinite(norm), jnp.inf, norm) for norm in norms]
    pairs = [list(zip(*block)) for block in zip(*primals, *tangents)]

    def slope(i, x_and_dx, axes):
        unit = units[i]
        x, dx = ([p.astype(unit.dtype) for p in real_parts(a)] for a in x_and_dx)
        # |x|^(ord - 2) / norm^(ord - 1) times x · dx
        weights, size = 1 / unit, None if ord == 2.0 else _magnitude(x_and_dx[0], unit.dtype)
        if ord == math.inf:
            weights = jnp.where(size == unit, weights, 0.0)
        elif size is not None:
            safe = jnp.where(size == 0, 1.0, size)
            weights = jnp.where((size == 0) | (unit == jnp.inf), 0.0, (size / unit) ** (ord - 1) / safe)
        slopes = [jnp.where(unit < jnp.inf, p * weights, 0.0) * dp for p, dp in zip(x, dx)]
        return _over(jnp.sum, fold(jnp.add, slopes), axes)

    def at_peak(i, x_and_dx, axes):
        return _over(jnp.sum, (_magnitude(x_and_dx[0], units[i].dtype) == units[i]).astype(units[i].dtype), axes)

    slopes = _reduced(pairs, layout, slope)
    if ord == math.inf:  # entries that share the largest magnitude share the derivative
        slopes = [s / jnp.maximum(count, 1) for s, count in zip(slopes, _reduced(pairs, layout, at_peak))]
    return norms, slopes


def _in_f64(ord: float, layout: Sequence, values: list) -> list[jax.Array]:
    """For CPU and GPU, where sums in f64 hide behind the read."""
    with jax.enable_x64(True):
        return _in_f32(ord, layout, values, jnp.float64)


def _in_f32(ord: float, layout: Sequence, values: list, dtype: Any = None) -> list[jax.Array]:
    """In f32; in f64 where a leaf of the block is."""
    dtypes = _dtypes(values)
    sums = _reduced(values, layout, lambda i, x, axes: _sum(ord, x, axes, dtype or dtypes[i]))
    return [(s if ord == 1.0 else jnp.sqrt(s)).astype(own) for s, own in zip(sums, dtypes)]


def _split(
    ord: float, layout: Sequence, values: list, scales: tuple[float, float] = (2.0**24, 2.0**-66)
) -> list[jax.Array]:
    """Where no wider dtype is: at a scale for small numbers, and at one for large numbers. TPU f64 has f32's range."""
    dtypes, count = _dtypes(values), len(values)
    # Behind a barrier, or XLA multiplies the scales of a leaf of one entry first, and 2^-66 squared is 0.
    factors = jax.lax.optimization_barrier(tuple(jnp.asarray(scale, dtypes[0]) for scale in scales))

    def scaled(i, x, axes):
        return _sum(ord, x, axes, dtypes[i % count], factors[i // count])

    sums = _reduced(values * 2, tuple(layout) * 2, scaled)
    return [
        jnp.where(low < jnp.inf, jnp.sqrt(low) / scales[0], jnp.sqrt(high) / scales[1]).astype(low.dtype)
        for low, high in zip(sums[:count], sums[count:])
    ]


def _relative_to_largest(ord: float, layout: tuple, values: list) -> list[jax.Array]:
    """In two reads, so that no power leaves the range; for the largest magnitude one is enough."""
    dtypes = _dtypes(values)

    def peak(i, x, axes):
        size = _magnitude(x, dtypes[i])
        # Maxima over devices may lose a NaN. An inf is as loud.
        return _over(jnp.max, jnp.where(jnp.isnan(size), jnp.inf, size), axes, initial=0.0)

    peaks = _reduced(values, layout, peak, jnp.maximum, jax.lax.pmax)
    if ord == math.inf:
        return peaks
    units = [within_reciprocals(jnp.where(p == jnp.inf, 1.0, p)) for p in peaks]
    share = lambda i, x: _magnitude(x, dtypes[i]) * (8 / units[i]) * 0.125
    sums = _reduced(values, layout, lambda i, x, axes: _over(jnp.sum, share(i, x) ** ord, axes))
    return [s ** (1 / ord) * unit for s, unit in zip(sums, units)]


def _sum(ord: float, x: jax.Array, axes: Any, dtype: Any, scale: jax.Array | None = None) -> jax.Array:
    """Σ |x|^ord for order 1 or 2, of `x · scale`."""
    if ord == 1.0:
        return _over(jnp.sum, _magnitude(x, dtype), axes)
    parts = [part.astype(dtype) for part in real_parts(x)]
    parts = parts if scale is None else [part * scale.astype(dtype) for part in parts]
    return _over(jnp.sum, fold(jnp.add, [part * part for part in parts]), axes)


def _magnitude(x: jax.Array, dtype: Any) -> jax.Array:
    return jnp.abs(x).astype(dtype)


def _dtypes(values: list) -> list:
    """The dtype of the norm of each block."""
    return [widest([jnp.float32, *map(wide, block)]) for block in values]


def _over(reduction: Callable, x: jax.Array, axes: tuple[int, ...] | None, **kwargs) -> jax.Array:
    """A scalar where all axes are reduced; else an array that broadcasts against `x`."""
    return reduction(x, axis=axes, keepdims=axes is not None, **kwargs)


def _reduced(
    values: list, layout: Sequence, part: Callable, combine: Callable = jnp.add, collective: Callable = jax.lax.psum
) -> list[jax.Array]:
    """For each block i: `part(i, x, axes)` of its leaves, combined, also over the mesh axes they are spread over."""
    spread: dict[tuple[str, ...], dict[int, jax.Array]] = {}
    for i, (block, parts) in enumerate(zip(values, layout)):
        terms: dict[tuple[str, ...], list] = {}
        for x, (axes, mesh_axes) in zip(block, parts):
            terms.setdefault(mesh_axes, []).append(part(i, x, axes))
        for mesh_axes, arrays in terms.items():
            spread.setdefault(mesh_axes, {})[i] = fold(combine, arrays)
    blocks: list[list] = [[] for _ in values]
    for mesh_axes, sums in spread.items():  # one collective for all blocks
        for i, array in (collective(sums, mesh_axes) if mesh_axes else sums).items():
            blocks[i].append(array)
    return [fold(combine, arrays) if arrays else jnp.float32(0) for arrays in blocks]


def fold(function: Callable, arrays: Sequence[jax.Array]) -> jax.Array:
    """Pairwise, which is more exact and compiles faster than one after the other."""
    dtype = widest(a.dtype for a in arrays)
    arrays = [a.astype(dtype) for a in arrays]
    while len(arrays) > 1:
        arrays = [*map(function, arrays[::2], arrays[1::2]), *(arrays[-1:] if len(arrays) % 2 else [])]
    return arrays[0]


def pmax(arrays: list[jax.Array], names: tuple[str, ...]) -> list[jax.Array]:
    """`lax.pmax`, with the derivative that it lacks: the mean of those of the entries that attain the maximum."""
    peaks = jax.lax.pmax(jax.lax.stop_gradient(arrays), names)
    held = [(a == peak).astype(a.dtype) for a, peak in zip(arrays, peaks)]
    moves = [jnp.where(h == 1, a - jax.lax.stop_gradient(a), 0.0) for h, a in zip(held, arrays)]
    moves, counts = jax.lax.psum(moves, names), jax.lax.psum(jax.lax.stop_gradient(held), names)
    return [peak + move / jnp.maximum(count, 1) for peak, move, count in zip(peaks, moves, counts)]

"""Norms of blocks of arrays, exact over the range of f32 at the price of one read.

`values` are the leaves of each block, `layout` the (axes of a unit or None, mesh axes) of each leaf.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_derivatives import SymbolicZero

from optax_clip._blocks import Mesh, varying, wide, widest
from optax_clip._packing import packing_of

_LARGE, _SMALL = 2.0**-66, 2.0**62  # scales at which the squares of large and of small numbers are normal numbers
_LOWEST = 2.0**-70  # a sum of squares below may have lost addends
_MERGED = 16


# Compiled by themselves, so that calls outside of jit do not compile the conditional anew each time.
@functools.partial(jax.jit, static_argnames=("layout", "sizes", "mean"), inline=True)
def l2_norms(values: list, *, layout: tuple, sizes: tuple[int, ...], mean: bool) -> list[jax.Array]:
    """sqrt(Σ |x|²) of each block, `mean`: over its size; in one read, or two in rare steps."""
    return _l2_norms(layout, sizes, sizes if mean else (1,) * len(sizes), values)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1, 2))
def _l2_norms(layout: tuple, sizes: tuple[int, ...], counts: tuple[int, ...], values: list) -> list[jax.Array]:
    """sqrt(Σ |x|² / count) of each block, by what suits the device."""
    in_steps, in_f64 = (functools.partial(method, layout, counts) for method in (_l2_in_steps, _l2_in_f64))
    split = functools.partial(_l2_split, layout, sizes, counts)
    # On CPU XLA would keep a copy of squares that an optimizer also takes: those of gradients that are not scaled.
    apart = lambda values: in_steps(jax.tree.map(jax.lax.optimization_barrier, values), hidden=True)
    # Of the other methods, `in_steps` adds least to the only read, but it takes the second read for a block of zeros,
    # which a whole tree is not, and at unit scope it asks all devices whether to.
    default = in_steps if len(values) == 1 else split
    return jax.lax.platform_dependent(values, cpu=apart, cuda=in_f64, rocm=in_f64, default=default)


@_l2_norms.defjvp
def _(layout, sizes, counts, primals, tangents):
    norms = _l2_norms(layout, sizes, counts, *primals)
    units = [jnp.where(norm == 0, 1.0, norm) for norm in norms]
    pairs = [list(zip(*block)) for block in zip(*primals, *tangents)]

    def part(i, x_and_dx, axes):
        unit = units[i]
        x, dx = ([p.astype(unit.dtype) for p in real_parts(a)] for a in x_and_dx)
        # That of a norm that is not finite is 0: what leaves no trace in the statistics leaves none in derivatives.
        slopes = [jnp.where(jnp.isfinite(unit), quotient(p, unit), 0.0) * dp for p, dp in zip(x, dx)]
        return _over(jnp.sum, fold(jnp.add, slopes), axes)

    sums = _reduce(pairs, layout, part)
    return norms, [s / n for s, n in zip(sums, counts)]


def _l2_in_f64(layout: tuple, counts: tuple[int, ...], values: list) -> list[jax.Array]:
    """For GPUs: on an H100 sums in f64 hide behind the read, and they need no second one."""
    with jax.enable_x64(True):
        sums = _reduce(values, layout, lambda i, x, axes: _sum_of_squares([x], axes, jnp.float64))
        return [jnp.sqrt(s / n).astype(dtype) for s, n, dtype in zip(sums, counts, _dtypes(values))]


def _dtypes(values: list) -> list:
    """The real dtype that holds the numbers of each block, f32 at least."""
    return [widest([jnp.float32, *map(wide, block)]) for block in values]


def _l2_split(layout: tuple, sizes: tuple[int, ...], counts: tuple[int, ...], values: list) -> list[jax.Array]:
    """Small and large entries apart, each at a scale at which the sum of their squares stays in the range of f32."""
    large = [2.0 ** (-65 - _half_log2(count)) for count in counts]
    edges = [2.0**-63 / k for k in large]  # of large entries, the smallest that has a normal square
    small = [2.0 ** (61 - _half_log2(count) - _half_log2(size)) for count, size in zip(counts, sizes)]
    # The barrier keeps XLA from multiplying scales first, or entries, where it knows them.
    hidden = {k: jax.lax.optimization_barrier(jnp.float32(k)) for k in {*small, *large, *edges}}

    n, dtypes = len(values), _dtypes(values)

    def sum_of_squares(i, x, axes):
        block, of_large = i % n, i >= n
        edge, down, up = (hidden[numbers[block]].astype(dtypes[block]) for numbers in (edges, large, small))

        def squared(part):
            is_large = jnp.abs(part) >= edge
            square = jnp.square(part * jnp.where(is_large, down, up))  # the same for both sums: taken once
            return jnp.where(is_large == of_large, square, 0.0)

        parts = [squared(part.astype(dtypes[block])) for part in real_parts(x)]
        return _over(jnp.sum, fold(jnp.add, parts), axes)

    sums = _reduce(values + values, layout + layout, sum_of_squares)  # of small entries, and then of large ones
    packing = packing_of(sums[:n])
    per_root = [[k * math.sqrt(count) for k, count in zip(scales, counts)] for scales in (small, large)]
    norms = []
    for low, high, per_low, per_high in zip(*map(packing.pack, (sums[:n], sums[n:], *per_root))):
        low, high = jnp.sqrt(low) / per_low, jnp.sqrt(high) / per_high
        top, rest = jnp.maximum(low, high), jnp.minimum(low, high)
        norms.append(jnp.where(high == 0, low, top * jnp.sqrt(1 + jnp.square(rest / top))))
    return packing.unpack(norms)


def _l2_in_steps(layout: tuple, counts: tuple[int, ...], values: list, *, hidden: bool = False) -> list[jax.Array]:
    """In one read, and in a second one at another scale where squares left the range of f32. `hidden`: behind a
    barrier."""
    dtypes = _dtypes(values)
    sums = _reduce(values, layout, lambda i, x, axes: _sum_of_squares([x], axes, dtypes[i]))
    packing = packing_of(sums)
    packed_sums, packed_counts = packing.pack(sums), packing.pack(counts)
    norms = [jnp.sqrt(s / n) for s, n in zip(packed_sums, packed_counts)]

    def measure_again(values, norms):
        lowest = packing.pack([math.sqrt(_LOWEST / count) for count in counts])
        large = packing.pack([_LARGE * 2.0 ** -_half_log2(count) for count in counts])
        scales = [
            jnp.where(norm < low, _SMALL, jnp.where(norm == jnp.inf, k, 1.0)).astype(norm.dtype)
            for norm, low, k in zip(norms, lowest, large)
        ]
        of_block = packing.unpack_to_kernels(scales)
        if not hidden:  # where XLA knows the values it would multiply the scales first: 2^-66 squared is 0
            values, of_block = jax.tree.map(jax.lax.optimization_barrier, (values, of_block))
        again = _reduce(*_merged(values, layout), lambda i, xs, axes: _sum_of_squares(xs, axes, dtypes[i], of_block[i]))
        return [
            jnp.where(k == 1, norm, jnp.sqrt(a / n) / k)
            for a, n, k, norm in zip(packing.pack(again), packed_counts, scales, norms)
        ]

    # From the sums, not from the norms: a sum over leaves that only one kernel needs, XLA's CPU backend adds up in that
    # kernel together with sums over some of the leaves, and LLVM takes long to compile that where there are 1000.
    anywhere = _anywhere([(s == jnp.inf) | (s < _LOWEST) for s in packed_sums], layout)
    return packing.unpack(jax.lax.cond(anywhere, measure_again, lambda _, norms: norms, values, norms))


def _half_log2(n: int) -> int:
    return math.ceil(math.log2(n) / 2)


def _sum_of_squares(xs: list, axes: tuple[int, ...] | None, dtype: Any, scale: jax.Array | None = None) -> jax.Array:
    """Over the entries of all `xs`, which are alike, in `dtype`."""
    parts = [part.astype(dtype) for x in xs for part in real_parts(x)]
    scaled = [part if scale is None else part * scale.astype(part.dtype) for part in parts]
    return _over(jnp.sum, fold(jnp.add, [jnp.square(part) for part in scaled]), axes)


def real_parts(x: jax.Array) -> list[jax.Array]:
    """Real and imaginary part, or the array itself, in f32 or wider."""
    return [at_least_f32(part) for part in ([x.real, x.imag] if jnp.iscomplexobj(x) else [x])]


def root(s: jax.Array, scale: jax.Array) -> jax.Array:
    """sqrt(s) / scale, with the derivative 0 at 0."""
    # Tests for 0 rather than for > 0, so that NaN stays NaN; the inner select keeps the derivative at 0 finite.
    return jnp.where(s == 0, 0.0, jnp.sqrt(jnp.where(s == 0, 1.0, s))) / scale.astype(s.dtype)


@jax.custom_jvp
def quotient(a: jax.Array, b: jax.Array) -> jax.Array:
    """a / b, with a derivative that does not take 1 / b², which leaves the range of f32 long before the quotient."""
    return a / b


def _slope_of_quotient(primals, tangents):
    (a, b), (da, db) = primals, tangents
    q = quotient(a, b)
    # Not 0 · inf for what is constant.
    terms = [] if isinstance(da, SymbolicZero) else [da / b]
    terms += [] if isinstance(db, SymbolicZero) else [-q * (db / b)]
    return q, jnp.broadcast_to(sum(terms), jnp.shape(q))


quotient.defjvp(_slope_of_quotient, symbolic_zeros=True)


def squares(norm: jax.Array) -> tuple[jax.Array, jax.Array]:
    """At two scales, since those of large and of small norms leave the range of f32."""
    low, high = _scales_of_squares()
    overflows = norm * low >= 2.0**64  # in whose derivative 0 · inf would arise
    return jnp.where(overflows, jnp.inf, jnp.square(jnp.where(overflows, 0.0, norm * low))), jnp.square(norm * high)


def root_of_squares(low: jax.Array, high: jax.Array) -> jax.Array:
    """The root of a sum of `squares`."""
    scales = _scales_of_squares()
    return jnp.where(jnp.isfinite(low), root(low, scales[0]), root(high, scales[1]))


def _scales_of_squares() -> tuple[jax.Array, jax.Array]:
    return jax.lax.optimization_barrier((jnp.float32(2.0**40), jnp.float32(2.0**-66)))


@functools.partial(jax.jit, inline=True)
def total(rows: list[tuple]) -> list[jax.Array]:
    """The sum of each column over its entries, over the rows and over the devices on which they vary."""
    alike: dict[tuple, list] = {}
    for row in rows:
        alike.setdefault(tuple(sorted(varying(row[0]))), []).append(row)
    sums = []
    for names, rows_alike in alike.items():
        columns = jax.lax.platform_dependent(
            rows_alike, cpu=_stacked_sums, cuda=_sums_in_f64, rocm=_sums_in_f64, default=_sums
        )
        sums.append(jax.lax.psum(columns, names) if names else columns)
    return [fold(jnp.add, list(column)) for column in zip(*sums)]


def _sums(rows: list[tuple]) -> list[jax.Array]:
    """For GPUs and TPUs, where sums of arrays share a kernel with what computes these; many scalars take one."""
    sums = [list(_stacked_sum(row)) if row[0].ndim == 1 else [jnp.sum(x) for x in row] for row in rows]
    return [fold(jnp.add, list(column)) for column in zip(*sums)]


@jax.custom_jvp  # outside of `enable_x64`, where derivatives are taken, jax mixes up f64 and f32
def _sums_in_f64(rows: list[tuple]) -> list[jax.Array]:
    """For GPUs: as norms are there, so that on a mesh one all-reduce takes both."""
    with jax.enable_x64(True):
        return [s.astype(jnp.float32) for s in _sums([tuple(x.astype(jnp.float64) for x in row) for row in rows])]


@_sums_in_f64.defjvp
def _(primals, tangents):
    return _sums_in_f64(*primals), _sums(*tangents)


def _stacked_sums(rows: list[tuple]) -> list[jax.Array]:
    """For the CPU, where each sum is a kernel or two of its own, to compile and to start."""
    return list(fold(jnp.add, [_stacked_sum(row) for row in rows]))


def _stacked_sum(row: tuple) -> jax.Array:
    return jnp.sum(jnp.stack(row), axis=tuple(range(1, row[0].ndim + 1)))


def _merged(values: list, layout: tuple) -> tuple[list, tuple]:
    """The same blocks, leaves of one type in lists to measure as one: a shorter program for steps that are rare."""
    merged, new_layout = [], []
    for block, parts in zip(values, layout):
        alike: dict[Any, list] = {}
        for x, part in zip(block, parts):
            alike.setdefault((jax.typeof(x), part), []).append(x)
        lists = [(xs[i : i + _MERGED], part) for (_, part), xs in alike.items() for i in range(0, len(xs), _MERGED)]
        merged.append([xs for xs, _ in lists])
        new_layout.append(tuple(part for _, part in lists))
    return merged, tuple(new_layout)


def _anywhere(flags: list[jax.Array], layout: tuple) -> jax.Array:
    """Whether a flag is up, the same answer on every device."""
    flag = fold(jnp.logical_or, [jnp.any(flag) for flag in flags], empty=jnp.bool_(False))
    names = set(varying(flag))
    if any(axes is not None for parts in layout for axes, _ in parts):
        names |= set(Mesh("").untyped)  # units may differ between devices, and the types are silent
    return jax.lax.psum(flag.astype(jnp.int32), tuple(sorted(names))) > 0 if names else flag


@functools.partial(jax.jit, static_argnames=("layout", "ord"), inline=True)
def p_norms(values: list, *, layout: tuple, ord: float) -> list[jax.Array]:
    """Norms of order 1 and inf in one read; others in two, relative to the largest entry, so no power overflows."""
    dtypes = _dtypes(values)
    if ord == 1:
        return _reduce(values, layout, lambda i, x, axes: _over(jnp.sum, _magnitude(x, dtypes[i]), axes))

    def peak(i, x, axes):
        size = _magnitude(x, dtypes[i])
        # Maxima over devices may lose a NaN; inf is as loud.
        return _over(jnp.max, jnp.where(jnp.isnan(size), jnp.inf, size), axes, initial=0.0)

    peaks = _reduce(values, layout, peak, jnp.maximum, pmax)
    if ord == math.inf:
        return peaks
    # The norm does not depend on the unit. Its reciprocal must be a normal number: XLA multiplies by that.
    units = [jax.lax.stop_gradient(jnp.where((peak == 0) | jnp.isinf(peak), 1.0, peak)) for peak in peaks]
    scales = [jnp.where(u > 2.0**50, 2.0**-100, jnp.where(u < 2.0**-50, 2.0**100, 1.0)).astype(u.dtype) for u in units]

    def powers(i, x, axes):
        unit, scale = units[i], scales[i]
        return _over(jnp.sum, (_magnitude(x, unit.dtype) * scale / (unit * scale)) ** ord, axes)

    sums = _reduce(values, layout, powers)
    return [jnp.where(s == 0, 0.0, jnp.where(s == 0, 1.0, s) ** (1 / ord)) * unit for s, unit in zip(sums, units)]


def _magnitude(x: jax.Array, dtype: Any) -> jax.Array:
    """|x| in the dtype of its block: that of a complex64 may leave the range of f32, which f64 holds."""
    x = x.astype(np.promote_types(x.dtype, dtype))
    return jnp.where(x == 0, 0.0, jnp.abs(x))  # with the derivative 0 at 0


def _over(reduction: Callable, x: jax.Array, axes: tuple[int, ...] | None, **kwargs) -> jax.Array:
    """A scalar where all axes are reduced; else an array that broadcasts against `x`."""
    return reduction(x, axis=axes, keepdims=axes is not None and len(axes) < x.ndim, **kwargs)


def at_least_f32(x: jax.Array) -> jax.Array:
    return x if jnp.iscomplexobj(x) else x.astype(wide(x))


def pmax(arrays: list[jax.Array], names: tuple[str, ...]) -> list[jax.Array]:
    """`lax.pmax`, with the derivative that it lacks: the mean of those of the entries that attain the maximum."""
    peaks = jax.lax.pmax(jax.lax.stop_gradient(arrays), names)
    held = [((a == peak) & jnp.isfinite(a)).astype(a.dtype) for a, peak in zip(arrays, peaks)]
    moves = [jnp.where(h == 1, a - jax.lax.stop_gradient(a), 0.0) for h, a in zip(held, arrays)]
    moves, counts = jax.lax.psum(moves, names), jax.lax.psum(jax.lax.stop_gradient(held), names)
    return [peak + move / jnp.maximum(count, 1) for peak, move, count in zip(peaks, moves, counts)]


def _reduce(
    values: list, layout: tuple, part: Callable, combine: Callable = jnp.add, collective: Callable = jax.lax.psum
) -> list[jax.Array]:
    """For each block i: `part(i, x, axes)` of its leaves, combined, also over the mesh axes they are spread over."""
    spread: dict[tuple[str, ...], list[tuple[int, jax.Array]]] = {}
    for i, (block, parts) in enumerate(zip(values, layout)):
        terms: dict[tuple[str, ...], list] = {}
        for x, (axes, mesh_axes) in zip(block, parts):
            terms.setdefault(mesh_axes, []).append(part(i, x, axes))
        for mesh_axes, arrays in terms.items():
            spread.setdefault(mesh_axes, []).append((i, fold(combine, arrays)))
    blocks: list[list] = [[] for _ in values]
    for mesh_axes, entries in spread.items():
        arrays = [array for _, array in entries]
        for (i, _), array in zip(entries, collective(arrays, mesh_axes) if mesh_axes else arrays):
            blocks[i].append(array)
    return [fold(combine, arrays, empty=jnp.float32(0)) for arrays in blocks]


def fold(function: Callable, arrays: list[jax.Array], empty: jax.Array | None = None) -> jax.Array:
    """Pairwise, which is more exact and compiles faster than one after the other."""
    if not arrays and empty is not None:
        return empty
    dtype = widest(a.dtype for a in arrays)
    arrays = [a.astype(dtype) for a in arrays]
    while len(arrays) > 1:
        arrays = [*map(function, arrays[::2], arrays[1::2]), *(arrays[-1:] if len(arrays) % 2 else [])]
    return arrays[0]

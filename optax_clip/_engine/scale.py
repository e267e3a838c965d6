"""The stateless core of every norm clip: scale each block of a tree to its norm after, and say what was done."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from optax_clip._engine.blocks import Blocks, Group, summed
from optax_clip._engine.leaves import real_parts, wide, widest
from optax_clip._engine.mesh import varying
from optax_clip._engine.sums import fold

_LARGEST = np.finfo(np.float32).max
_UP = 2.0**4  # x · (2^4 / n) · (m · 2^-4) stays in range for norms n and m from 1e-30 to 3e38


class Measured(NamedTuple):
    """What a clip did in one step: f32[] each."""

    threshold: Any  # mean over blocks that have one; the largest number where none has; None for units
    scale: Any  # mean over blocks of norm after / norm; None for units
    clipped: jax.Array  # share of blocks whose norm is above the threshold


class _Scale(NamedTuple):
    """How blocks are scaled."""

    same: jax.Array  # entries are returned as they are
    down: jax.Array  # x · down · up
    up: jax.Array


def clip_tree(
    updates: Any,
    blocks: Blocks,
    groups: list[Group],
    thresholds: list,
    respond: Callable,
    change: Callable | None = None,
) -> tuple[Any, Measured]:
    """Scales each block from its norm n to m = respond(n, threshold): x ← x · (2^4 / n) · (m · 2^-4).

    Where `change` is given, a leaf becomes `change(leaf, n, threshold)` instead.
    """
    wholes = [_scale_of(group.norm, threshold, respond) for group, threshold in zip(groups, thresholds)]
    scales, limits = {}, {}
    for group, threshold, whole in zip(groups, thresholds, wholes):
        if len(group.keys) == 1:
            scales[group.keys[0]], limits[group.keys[0]] = whole, threshold
            continue
        # For many scalars, what is reported comes from the vector, and what kernels over leaves read from the scalars:
        # XLA:CPU 0.10.2 compiles a kernel that reads a vector anew for each entry.
        each = _entries(threshold, group.norm) if threshold.ndim else [threshold] * len(group.keys)
        scales |= {k: _scale_of(blocks.norms[k], t, respond) for k, t in zip(group.keys, each)}
        limits |= zip(group.keys, each)
    leaves, treedef = jax.tree.flatten(updates)

    def changed(leaf, key):
        return _scaled(leaf, scales[key]) if change is None else change(leaf, blocks.norms[key], limits[key])

    clipped = [leaf if key is None else changed(leaf, key) for leaf, key in zip(leaves, blocks.index)]
    units = any(norm.ndim for norm in blocks.norms.values())
    return treedef.unflatten(clipped), _measured(groups, thresholds, wholes, units)


def _entries(vector: Any, norms: jax.Array) -> list[jax.Array]:
    """The entries of a vector for kernels over leaves."""
    # XLA:CPU 0.10.2 compiles equal kernels once, but not where each reads another number. It does not move a division
    # into a kernel, so divisors of 1 keep the numbers apart; by rows and then entries most divisions are alike, too.
    # A number for each of 400 leaves: compiles in 6.7 s, in 11.8 s with one division.
    ones, width = jnp.where(norms < 0, 2.0, 1.0).astype(norms.dtype), math.isqrt(len(norms) - 1) + 1
    rows = [jax.lax.div(jnp.asarray(vector[k : k + width]), ones[k : k + width]) for k in range(0, len(norms), width)]
    return [jax.lax.div(entry, ones[0]) for row in rows for entry in row]


def _scale_of(norm: jax.Array, threshold: Any, respond: Callable) -> _Scale:
    live, limit, off, bad = (norm > 0) & (norm < jnp.inf), threshold, threshold == jnp.inf, norm - norm
    unsure = isinstance(threshold, jax.Array) or off.any()  # may be inf; a traced one may be below 0 or NaN, too
    if unsure:
        limit = jnp.maximum(jnp.where(off, 1.0, threshold), 0.0)  # keeps NaN
        live, bad = live & ~off, bad + (limit - limit)
    n = jnp.where(live, norm, 1.0)
    after = respond(n, limit)
    if jnp.shape(after) not in ((), norm.shape):
        raise ValueError(
            f"response must return one norm for each norm, got shape {jnp.shape(after)} for norms of shape "
            f"{norm.shape}. It is a function of two arrays, norm and threshold, entry by entry."
        )
    # NaN where the norm or the threshold is not finite. A constant NaN would trip jax_debug_nans.
    after = jnp.where(live, jnp.maximum(after, 0.0), norm) + bad
    same = (after == norm) | off if unsure else after == norm
    least = 2.0 ** (-100 if n.dtype == jnp.float32 else -900)
    down, up = _UP / jnp.maximum(n, least), after * (1 / _UP)
    return _Scale(same, down, up)


def _scaled(leaf: Any, scale: _Scale) -> jax.Array:
    x = jnp.asarray(leaf)
    dtype = widest([scale.down.dtype, wide(x)])
    down, up = scale.down.astype(dtype), scale.up.astype(dtype)
    parts = [part.astype(dtype) * down * up for part in real_parts(x)]
    return jnp.where(scale.same, x, (jax.lax.complex(*parts) if len(parts) == 2 else parts[0]).astype(x.dtype))


def _reported(threshold: Any, least: Any = 0.0) -> jax.Array:
    """The threshold as a finite number; NaN stays NaN."""
    return jnp.clip(threshold, least, _LARGEST).astype(jnp.float32)


def _measured(groups: list[Group], thresholds: list, scales: list[_Scale], units: bool) -> Measured:
    """Means over all blocks, also over those of other devices."""
    counts = [group.norm.size * math.prod(map(jax.lax.axis_size, varying(group.norm))) for group in groups]
    count = sum(counts)
    if not count:
        return Measured(jnp.float32(_LARGEST), jnp.float32(1), jnp.float32(0))
    # A finite norm under a threshold of NaN counts as clipped, so that `skip_spikes` skips it.
    above = [~(group.norm <= t) & (group.norm < jnp.inf) for group, t in zip(groups, thresholds)]
    most = float(_LARGEST) / count
    factors = [] if units else [jnp.where(s.same, 1.0, jnp.minimum(s.down * s.up, most)) for s in scales]
    if count == 1 and not units:  # no mean, which would round; a value that `skip_spikes` compares may be below 0
        found = (_reported(thresholds[0], -_LARGEST), *factors, *above)
        return Measured(*(jnp.asarray(x, jnp.float32) for x in found))

    def total(arrays):
        return fold(jnp.add, [summed(jnp.asarray(array).astype(jnp.float32)) for array in arrays])

    def mean(arrays):
        # XLA multiplies by the reciprocal of the count, and n · (1 / n) may miss 1.
        return jnp.where((found := total(arrays)) == count, 1.0, found / count)

    if units:
        return Measured(None, None, mean(above))
    if len(groups) == 1 and thresholds[0].ndim == 0:
        threshold = _reported(thresholds[0])
    else:
        known = [jnp.broadcast_to(t != jnp.inf, group.norm.shape) for t, group in zip(thresholds, groups)]
        number = total(known)
        share = 1 / jnp.maximum(number, 1)  # before the sum, which may leave the range
        limits = [jnp.where(there, _reported(t), 0.0) for there, t in zip(known, thresholds)]
        threshold = jnp.where(number == 0, _LARGEST, total([limit * share for limit in limits]))
    return Measured(threshold, mean(factors), mean(above))

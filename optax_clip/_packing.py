"""Many scalars as one vector, or arrays of one shape as one array: a program over them is as short as over one."""

import math
from collections.abc import Callable, Hashable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from optax_clip._blocks import varying, widest


class Packing(NamedTuple):
    """Which arrays of a list go together into one array with a leading axis, and which stay as they are."""

    groups: tuple[tuple[int, ...], ...]  # places in the list, for each packed array
    dtypes: tuple  # of the list

    def pack(self, arrays: Sequence) -> list[jax.Array]:
        """Arrays or numbers, those of a group as one array of the widest dtype of the group."""
        return [self._joined([arrays[i] for i in group], group) for group in self.groups]

    def _joined(self, arrays: list, group: tuple[int, ...]) -> jax.Array:
        dtype = widest(self.dtypes[i] for i in group)
        if len(arrays) == 1:
            return arrays[0]
        if not isinstance(arrays[0], jax.Array):
            return jnp.asarray(np.array(arrays), dtype)
        return jnp.stack([array.astype(dtype) for array in arrays])

    def unpack(self, packed: Sequence[jax.Array]) -> list[jax.Array]:
        """The list again. XLA sees through a `pack` that follows."""
        return [array.astype(dtype) for array, dtype in zip(self._unpacked(packed, _scalars), self.dtypes)]

    def unpack_to_kernels(self, packed: Sequence[jax.Array]) -> list[jax.Array]:
        """The list again, for use in kernels over whole leaves."""
        return self._unpacked(packed, entries_for_kernels)

    def _unpacked(self, packed: Sequence[jax.Array], entries: Callable[[jax.Array], list]) -> list[jax.Array]:
        out: dict[int, jax.Array] = {}
        for group, array in zip(self.groups, packed):
            out.update(zip(group, entries(array) if len(group) > 1 else [array]))
        return [out[i] for i in range(len(self.dtypes))]


def entries_for_kernels(vector: jax.Array) -> list[jax.Array]:
    """The entries of a vector, of factors or of other numbers of 31 bits at most, each for use in kernels over a leaf.

    XLA's CPU backend compiles a kernel once for all leaves of a shape, unless it reads another entry of a vector
    for each. A division is what it does not move into such kernels. In two steps, rows and then entries, most of
    the small kernels are alike too.
    """
    return jax.lax.platform_dependent(vector, cpu=_entries, default=_scalars)


def _entries(vector: jax.Array) -> list[jax.Array]:
    width = math.isqrt(len(vector) - 1) + 1
    # No entry is, but XLA does not know.
    never = -2 if jnp.issubdtype(vector.dtype, jnp.floating) else jnp.iinfo(vector.dtype).max
    ones = jnp.where(vector == jnp.asarray(never, vector.dtype), 2, 1).astype(vector.dtype)
    rows = [jax.lax.div(vector[k : k + width], ones[k : k + width]) for k in range(0, len(vector), width)]
    one = ones[0]
    return [jax.lax.div(entry, one) for row in rows for entry in _scalars(row)]


def ones_apart(step: jax.Array, count: int) -> list[jax.Array]:
    """Ones, f32[] each, which XLA's CPU backend takes for different numbers where `step` is not known to be >= 0.

    It writes out the broadcast of a scalar that several kernels share, and joins scalars that are the same.
    """
    unknown = lambda step: _entries(
        jnp.where(jnp.arange(count, dtype=step.dtype) + step < 0, 2.0, 1.0).astype(jnp.float32)
    )
    return jax.lax.platform_dependent(step, cpu=unknown, default=lambda step: [jnp.ones([], jnp.float32)] * count)


def _scalars(vector: jax.Array) -> list[jax.Array]:
    return [jax.lax.index_in_dim(vector, j, keepdims=False) for j in range(len(vector))]


def packing_of(arrays: Sequence[jax.Array], owners: Sequence[Hashable] | None = None) -> Packing:
    """Scalars with one owner that vary over the same mesh axes go together."""
    owners = owners or [None] * len(arrays)
    return _packing(arrays, [i if a.ndim else (owners[i], varying(a)) for i, a in enumerate(arrays)])


def packing_alike(arrays: Sequence[jax.Array]) -> Packing:
    """Arrays of one type go together: of one shape, dtype and, on meshes with explicit axes, sharding."""
    return _packing(arrays, list(map(jax.typeof, arrays)))


def _packing(arrays: Sequence[jax.Array], keys: Sequence[Hashable]) -> Packing:
    """Arrays with equal keys go together."""
    groups: dict = {}
    for i, key in enumerate(keys):
        groups.setdefault(key, []).append(i)
    return Packing(tuple(map(tuple, groups.values())), tuple(a.dtype for a in arrays))

"""From a tree of updates to blocks: which leaves count, which part of a leaf shares a norm, over which devices."""

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from optax_clip import _checks


def is_counted(leaf: object) -> bool:
    """True for leaves that have a norm: floating and complex arrays and scalars."""
    if isinstance(leaf, (bool, int)) or not isinstance(leaf, (jax.Array, np.ndarray, np.generic, float, complex)):
        return False
    return jnp.issubdtype(getattr(leaf, "dtype", type(leaf)), jnp.inexact)


def wide(x: jax.Array) -> Any:
    """The real dtype to compute in: f64 for f64 and complex128, else f32."""
    return jnp.float64 if x.real.dtype == jnp.float64 else jnp.float32


def widest(dtypes: Iterable) -> Any:
    """Of f32 and f64, or of one dtype. Where promotion is strict, `jnp.promote_types` refuses."""
    return max(map(jnp.dtype, dtypes), key=lambda dtype: dtype.itemsize)


def broadcast(prefix: Any, tree: Any, *, caller: str, name: str, is_leaf: Callable[[Any], bool] | None = None) -> list:
    """The entry of `prefix` for each leaf of `tree`, in order. None in `prefix` is an entry."""
    entries = []
    try:
        jax.tree.map(
            lambda entry, subtree: entries.extend([entry] * len(jax.tree.leaves(subtree))),
            prefix,
            tree,
            is_leaf=lambda x: x is None or (is_leaf is not None and is_leaf(x)),
        )
    except ValueError:
        where = _checks.misfit(prefix, tree, of_updates=False, is_entry=is_leaf)
        raise ValueError(
            f"{caller}: {name} does not fit the updates: {where}. "
            "It must be one value or a prefix of the tree of updates, of the same containers."
        ) from None
    return entries


def varying(x: jax.Array) -> frozenset[str]:
    """The manual mesh axes over which `x` differs, so far as its type tells."""
    kind = jax.typeof(x)
    return kind.manual_axis_type.varying if hasattr(kind, "manual_axis_type") else kind.vma


def on_one_device(arrays: Sequence[jax.Array]) -> bool:
    """Whether there is but one that they could lie on, so far as their types tell: that of their mesh, or of all."""
    sizes = {jax.typeof(array).sharding.mesh.size for array in arrays}
    return sizes == {1} or (sizes == {0} and jax.device_count() == 1)


class Part(NamedTuple):
    """What one leaf contributes to its block."""

    value: jax.Array
    axes: tuple[int, ...] | None  # axes of a unit; None: the whole leaf
    mesh_axes: tuple[str, ...]  # mesh axes to sum over

    @property
    def size(self) -> int:
        """Entries of the block, on all devices."""
        shape = self.value.shape
        here = self.value.size if self.axes is None else _product(shape[a] for a in self.axes)
        return here * _product(jax.lax.axis_size(name) for name in self.mesh_axes)


def _product(numbers) -> int:
    return functools.reduce(lambda a, b: a * b, numbers, 1)


def parts(updates: Any, axis_name: Any, *, caller: str, axis: Any = None) -> list[Part | None]:
    """A part for each leaf, None for leaves that are left alone. `axis` None: whole leaves."""
    leaves = jax.tree_util.tree_leaves_with_path(updates)
    names = broadcast(axis_name, updates, caller=caller, name="axis_name", is_leaf=_is_names)
    mesh = Mesh(caller)
    units = axis is not None

    def part(path, leaf, given) -> Part | None:
        if not is_counted(leaf):
            return None
        value = jnp.asarray(leaf)
        where = f"leaf {jax.tree_util.keystr(path) or 'updates'}"
        if axis is axes_by_rank:
            mesh_axes = mesh.summed(value, given, where, unit=True)
            return Part(value, axes_by_rank(value.shape, where, spread=bool(mesh_axes)), mesh_axes)
        axes: Any = axis(path, leaf) if callable(axis) else axis
        if units and axes is None:
            return None
        if units:
            axes = _in_range(_checks.axes(axes, caller=caller), value, where, caller)
        return Part(value, axes, mesh.summed(value, given, where, unit=units))

    return [part(path, leaf, given) for (path, leaf), given in zip(leaves, names)]


def axes_by_rank(shape: tuple[int, ...], where: str, *, spread: bool) -> tuple[int, ...]:
    """The axes of a unit of weights stored (..., inputs, outputs), the rule of `unit_norm`."""
    rank = len(shape)
    # A dimension of 1 may be longer on all devices together.
    if rank <= 1 or (sum(n != 1 for n in shape) <= 1 and not spread):
        return tuple(range(rank))
    if rank > 5:
        raise ValueError(
            f"unit_norm: {where} of shape {shape} has {rank} dimensions, and which of them make up a unit is known up "
            "to 5. Pass axis: an int, a tuple, or a rule(path, leaf)."
        )
    return (0,) if rank <= 3 else tuple(range(rank - 1))


def _in_range(axes: tuple[int, ...], value: jax.Array, where: str, caller: str) -> tuple[int, ...]:
    out = tuple(a + value.ndim if a < 0 else a for a in axes)
    if len(set(out)) < len(out) or not all(0 <= a < value.ndim for a in out):
        raise ValueError(
            f"{caller}: axis {axes} does not fit {where} of shape {value.shape}. Axes must be in range and different. "
            "Pass a rule(path, leaf) to treat leaves differently."
        )
    return out


def _is_names(x: object) -> bool:
    return isinstance(x, str) or (isinstance(x, tuple) and all(isinstance(name, str) for name in x))


class Mesh:
    """Which mesh axes are manual here, and which of these the types of arrays speak of."""

    def __init__(self, caller: str):
        self.caller = caller
        self.manual = tuple(jax.sharding.get_abstract_mesh().manual_axes)
        # With check_vma=False and in pmap even the index along an axis does not vary by its type.
        self.typed = {name for name in self.manual if name in varying(jax.lax.axis_index(name))}
        self.untyped = [name for name in self.manual if name not in self.typed]

    def summed(self, value: jax.Array, given: Any, where: str, *, unit: bool) -> tuple[str, ...]:
        """The mesh axes to sum over for `value`; `given` is the user's `axis_name`."""
        varies = varying(value)
        given = (given,) if isinstance(given, str) else given
        if not (given is None or _is_names(given)):
            raise TypeError(
                f"{self.caller}: axis_name must be a name, a tuple of names, None, or a prefix tree of these, "
                f"got {given!r} for {where}. Pass names of axes of the mesh."
            )
        if given is None:
            if self.untyped:
                raise ValueError(
                    f"{self.caller}: axis_name is missing. Over which of the mesh axes {self.manual} {where} is spread "
                    "cannot be told inside pmap or shard_map(check_vma=False), and a norm of one shard would be wrong. "
                    "Pass axis_name (a name, a tuple of names, () for none, or a prefix tree), or use check_vma=True."
                )
            if unit and varies:
                raise ValueError(
                    f"{self.caller}: axis_name is missing. {where} varies over the mesh axes {tuple(sorted(varies))}, "
                    "and its type does not tell whether the entries of one unit are spread over them. Pass axis_name: "
                    "the names of the axes that split a unit, () where every unit lies on one device, or a prefix tree."
                )
            given = ()
        unknown = [name for name in given if not _is_bound(name)]
        if unknown and self.manual:
            raise ValueError(
                f"{self.caller}: axis_name has {unknown}, but the mesh axes here are {self.manual}. Pass some of these."
            )
        if not unit:
            given = (*given, *varies)
        # A leaf that does not vary over an axis is whole on every device: counted once. Outside of a mesh all is whole.
        return tuple(sorted({n for n in given if n not in unknown and (n not in self.typed or n in varies)}))


def _is_bound(name: str) -> bool:
    try:
        jax.lax.axis_size(name)
    except NameError:
        return False
    return True

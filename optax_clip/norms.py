"""How big each block of the updates is.

A *block* is a set of entries that share one norm: the whole tree, a group of leaves, a leaf, a unit of a leaf. A norm
is a plain function `updates -> prefix tree of arrays`, and every entry of the prefix tree is a block: a scalar for all
leaves below it, or an array that broadcasts against one leaf, with one block for each entry. `None` leaves them alone.
Where blocks are not subtrees, the function returns `Blocks`. `functools.partial` configures a norm:
`partial(global_norm, ord=1)`.

Every norm counts floating and complex leaves only, and has the derivative 0 at 0. Inside `jax.shard_map` the types of
the leaves say over which mesh axes they vary, and norms sum over exactly those.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from optax_clip._engine import checks
from optax_clip._engine.blocks import Blocks
from optax_clip._engine.leaves import is_counted, keystr, spread
from optax_clip._engine.mesh import names_for, summed_over
from optax_clip._engine.singular import largest
from optax_clip._engine.sums import Part, norms_of

__all__ = ["Blocks", "global_norm", "leaf_norm", "unit_norm", "block_rms", "group_norm", "spectral_norm"]


def global_norm(updates: Any, *, ord: float | None = None, axis_name: Any = None) -> jax.Array:
    """Norm of the whole tree as one vector: one block.

    norm = (Σ |x|^ord)^(1/ord), over all entries of all leaves

    Args:
      updates: pytree of arrays.
      ord: order of the norm, >= 1 or inf; None is 2.
      axis_name: mesh axes to sum over where types do not tell (`shard_map(check_vma=False)`, `pmap`): a name, a tuple
        of names (`()` for none), or a prefix tree of these.

    Returns:
      f32[] (f64[] where a leaf is f64).

    Raises:
      ValueError: `ord` is below 1; `axis_name` is missing where types do not tell, or names no axis of the mesh.
      TypeError: an argument is of the wrong kind.

    Example:
      >>> print(global_norm({"w": jnp.array([3.0]), "b": jnp.array([4.0])}))
      5.0
    """
    parts = _parts(updates, axis_name)
    return norms_of([[part for part in parts if part is not None]], _order(ord))[0]


def leaf_norm(updates: Any, *, ord: float | None = None, axis_name: Any = None) -> Any:
    """Norm of each leaf: one block for each leaf.

    norm_i = (Σ |x|^ord)^(1/ord), over the entries of leaf i

    Args:
      updates: pytree of arrays.
      ord: order of the norm, >= 1 or inf; None is 2.
      axis_name: as for `global_norm`.

    Returns:
      The tree with f32[] (f64[] for f64) for each floating or complex leaf and None for others.

    Raises:
      ValueError: as for `global_norm`.
      TypeError: an argument is of the wrong kind.

    Example:
      >>> norms = leaf_norm({"w": jnp.array([3.0, 4.0]), "steps": 7})
      >>> print(norms["w"], norms["steps"])
      5.0 None
    """
    return _a_block_each(updates, _parts(updates, axis_name), _order(ord))


def unit_norm(updates: Any, *, ord: float | None = None, axis: Any = None, axis_name: Any = None) -> Any:
    """Norm of each unit of each leaf, a unit being what feeds one output: one block for each unit.

    norm_u = (Σ |x|^ord)^(1/ord), over the entries of unit u

    Args:
      updates: pytree of arrays.
      ord: order of the norm, >= 1 or inf; None is 2.
      axis: the axes that a unit extends over. None goes by rank, as for weights stored (..., inputs, outputs): a leaf
        with at most one dimension longer than 1 is one unit, rank 2 and 3 reduce axis 0, rank 4 axes (0, 1, 2), rank 5
        axes (0, 1, 2, 3). An int or a tuple holds for every leaf. A rule(path, leaf) returns one of these for
        each leaf, or None to leave the leaf alone.
      axis_name: inside `shard_map` or `pmap`, the mesh axes that the entries of *one unit* are spread over: a name, a
        tuple of names (`()` where every unit lies on one device), or a prefix tree of these. It is required where a
        leaf varies over a mesh axis: the type of the leaf does not tell which dimension is spread. Where there are
        names, a shard of one row is taken for a piece of a matrix; for a vector stored as a matrix pass `axis` as well.

    Returns:
      The tree with f32 arrays (f64 for f64) that broadcast against the leaves, 1 along the reduced axes, scalars where
      a leaf is one unit, and None for other leaves.

    Raises:
      ValueError: a leaf has more than 5 dimensions and `axis` is None; an axis is out of range; `axis_name` is missing.
      TypeError: an argument is of the wrong kind.

    Guarantees:
      Exact to 1e-6 for units with norms up to 1.8e19 and entries from 1.1e-19. Above, the norm is inf; entries below
      count as 0. A leaf that is one unit is measured as a whole leaf.

    Example:
      >>> print(unit_norm(jnp.array([[3.0, 0.0], [4.0, 1.0]])))
      [[5. 1.]]

    References:
      Brock, De, Smith, Simonyan, High-performance large-scale image recognition without normalization, 2021,
      arXiv 2102.06171; the axes by rank are those of `optax.adaptive_grad_clip`.
    """
    return _a_block_each(
        updates, _parts(updates, axis_name, _by_rank if axis is None else checks.axes(axis)), _order(ord)
    )


def block_rms(updates: Any, *, axis: Any = None, axis_name: Any = None) -> Any:
    """Root mean square of each leaf, or of each unit where `axis` is given.

    rms_i = sqrt(Σ |x|² / count), over the entries of leaf (or unit) i; 0 for a leaf without entries

    Args:
      updates: pytree of arrays.
      axis: None for whole leaves; an int, a tuple or a rule(path, leaf) as for `unit_norm`.
      axis_name: as for `global_norm`, and as for `unit_norm` where `axis` is given.

    Returns:
      The tree with f32[] (f64[] for f64), or arrays as from `unit_norm`, and None for leaves that are not counted.

    Raises:
      ValueError: an axis is out of range; `axis_name` is missing.
      TypeError: an argument is of the wrong kind.

    Example:
      >>> print(block_rms(jnp.array([3.0, 4.0, 0.0, 0.0])))
      2.5

    References:
      Shazeer, Stern, Adafactor, 2018, arXiv 1804.04235, section 6.
    """
    return _a_block_each(updates, _parts(updates, axis_name, checks.axes(axis)), 2.0, mean=True)


def group_norm(labels: Any, *, ord: float | None = None, axis_name: Any = None) -> Callable[[Any], Blocks]:
    """Norm of each group of leaves: one block for each label.

    norm_g = (Σ |x|^ord)^(1/ord), over all entries of all leaves labeled g

    Args:
      labels: prefix tree of hashable labels, or a function of the updates that returns one, as for `optax.partition`.
        None as a label leaves these leaves alone.
      ord: order of the norm, >= 1 or inf; None is 2.
      axis_name: as for `global_norm`.

    Returns:
      The norm: a function from updates to `Blocks`, whose `norms` map each label to f32[] (f64[] where a leaf of the
      group is f64).

    Raises:
      ValueError: `ord` is below 1; in the norm, the tree of labels does not fit the updates.
      TypeError: `ord` is no number; in the norm, a label is not hashable.

    Example:
      >>> norm = group_norm({"encoder": "body", "decoder": "body", "head": None})
      >>> blocks = norm({"encoder": jnp.array([3.0]), "decoder": jnp.array([4.0]), "head": jnp.array([9.0])})
      >>> print({label: float(value) for label, value in blocks.norms.items()})
      {'body': 5.0}
    """
    ord = _order(ord)
    if checks.is_function(labels):
        checks.function(labels, "labels", ("updates",), "For example: lambda updates: {'encoder': 'a', 'head': 'b'}.")

    def norm(updates):
        parts = _parts(updates, axis_name)
        # optax.tree.map_params asks with an empty tree, which labels do not fit.
        tree = labels(updates) if parts and checks.is_function(labels) else labels
        keys = spread(tree, updates, "labels") if parts else []
        checks.hashable(keys)
        index = tuple(None if part is None else key for part, key in zip(parts, keys))
        groups: dict = {key: [] for key in index if key is not None}
        for part, key in zip(parts, index):
            if key is not None:
                groups[key].append(part)
        return Blocks(dict(zip(groups, norms_of(list(groups.values()), ord))), index)

    return norm


def spectral_norm(updates: Any, *, axis: Any = None, axis_name: Any = None) -> Any:
    """Largest singular value of each matrix, from above: one block for each matrix.

    norm_i = (Σ σ^64)^(1/64), over the singular values σ of matrix i, by products of matrices alone

    Args:
      updates: pytree of arrays.
      axis: the two axes of a matrix; the others are a stack of matrices. None for the last two, and the L2 norm of
        leaves of rank 0 and 1. A tuple holds for every leaf. A rule(path, leaf) returns a tuple for each leaf, or None
        to leave the leaf alone. Axes that are not two are those of a unit with an L2 norm, as for `unit_norm`.
      axis_name: inside `shard_map` or `pmap`, `()` says that every matrix is whole on its device. It is required where
        a leaf varies over a mesh axis: the type of the leaf does not tell. A matrix that is spread has no norm there.

    Returns:
      The tree with f32 arrays (f64 for f64), 1 along the axes of the matrix, scalars for leaves of rank 2 or less, and
      None for other leaves.

    Raises:
      ValueError: an axis is out of range; `axis_name` is missing, or names the axes of a spread matrix.
      TypeError: an argument is of the wrong kind.

    Guarantees:
      Between 1 - 1e-6 and rank^(1/64) times the largest singular value, for numbers from 1e-35 to 1e37: 0 % too large
      where one singular value stands out, about 1 % for a Gaussian matrix, 9 % for an orthogonal one of rank 256. The
      derivative is finite, and 0 at 0. Costs 2 m² n + 8 m³ for a matrix m × n, m ≤ n; under jit a mesh may spread n.

    Example:
      >>> print(spectral_norm({"w": jnp.array([[3.0, 0.0], [0.0, 1.0]]), "b": jnp.array([3.0, 4.0])}))
      {'b': Array(5., dtype=float32), 'w': Array(3., dtype=float32)}
    """
    parts = _parts(updates, axis_name, checks.axes(axis) or _as_matrix)
    matrices = [part is not None and len(part.axes or part.value.shape) == 2 for part in parts]
    others = iter(norms_of([[part] for part, matrix in zip(parts, matrices) if part is not None and not matrix]))
    norms: list = []
    for part, matrix in zip(parts, matrices):
        if part is None or not matrix:
            norms.append(None if part is None else next(others))
            continue
        if part.mesh_axes:
            raise ValueError(
                f"axis_name must be () for matrices, got {part.mesh_axes} for a leaf of shape {part.value.shape}. A "
                "matrix in parts has no singular values. Gather it, or clip under jit, outside of shard_map."
            )
        axes = part.axes or (0, 1)
        norm = jnp.moveaxis(largest(jnp.moveaxis(part.value, axes, (-2, -1))), (-2, -1), axes)
        norms.append(norm if part.axes else norm[0, 0])
    return jax.tree.structure(updates).unflatten(norms)


def _as_matrix(path: tuple, leaf: Any) -> tuple[int, ...]:
    rank = jnp.ndim(leaf)
    return tuple(range(max(rank - 2, 0), rank))


def _order(ord: float | None) -> float:
    return 2.0 if ord is None else checks.static(ord, "ord", 1.0)


def _a_block_each(updates: Any, parts: list[Part | None], ord: float, *, mean: bool = False) -> Any:
    norms = iter(norms_of([[part] for part in parts if part is not None], ord, mean=mean))
    return jax.tree.structure(updates).unflatten([None if part is None else next(norms) for part in parts])


def _parts(updates: Any, axis_name: Any, axis: Any = None) -> list[Part | None]:
    """A part for each leaf, None for leaves that are left alone. `axis` None: whole leaves."""
    names, rows = names_for(axis_name, updates), []
    leaves = jax.tree_util.tree_leaves_with_path(updates)
    for i, (path, leaf) in enumerate(leaves):
        if is_counted(leaf):
            axes = checks.axes(axis(path, leaf)) if callable(axis) and axis is not _by_rank else axis
            rows += [(i, path, jnp.asarray(leaf), axes)] if axis is None or axes is not None else []
    places, paths, values, _ = zip(*rows) if rows else ((), (), (), ())
    mesh_axes = summed_over(values, [names[i] for i in places], paths, units=axis is not None)
    parts: list[Part | None] = [None] * len(leaves)
    for (i, path, value, axes), over in zip(rows, mesh_axes):
        parts[i] = Part(value, None if axes is None else _of_unit(axes, value, path, over), over)
    return parts


def _of_unit(axes: Any, value: jax.Array, path: tuple, mesh_axes: tuple[str, ...]) -> tuple[int, ...] | None:
    """The axes of a unit. A leaf that is one unit is measured as a whole, which is exact over a wider range: None."""
    given: tuple = _by_rank(value.shape, path, spread=bool(mesh_axes)) if axes is _by_rank else axes
    out = tuple(a + value.ndim if a < 0 else a for a in given)
    if len(set(out)) < len(out) or not all(0 <= a < value.ndim for a in out):
        raise ValueError(
            f"axis {given} does not fit the leaf {keystr(path)} of shape {value.shape}. Axes must be in range and "
            "different. Pass a rule(path, leaf) to treat leaves differently."
        )
    return None if len(out) == value.ndim else out


def _by_rank(shape: tuple[int, ...], path: tuple, *, spread: bool) -> tuple[int, ...]:
    """The axes of a unit of weights stored (..., inputs, outputs), the rule of `unit_norm`."""
    rank = len(shape)
    # A dimension of 1 may be longer on all devices together.
    if rank <= 1 or (sum(n != 1 for n in shape) <= 1 and not spread):
        return tuple(range(rank))
    if rank > 5:
        raise ValueError(
            f"axis is missing: the leaf {keystr(path)} of shape {shape} has {rank} dimensions, and which of them make "
            "up a unit is known up to 5. Pass an int, a tuple, or a rule(path, leaf)."
        )
    return (0,) if rank <= 3 else tuple(range(rank - 1))

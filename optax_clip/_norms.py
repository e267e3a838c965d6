"""How big each block of the updates is.

A *block* is a set of entries that share one norm: the whole tree, a group of leaves, a leaf, a unit of a leaf. A norm
is a plain function `updates -> prefix tree of arrays`: `global_norm` returns one scalar for the whole tree, `leaf_norm`
a scalar a leaf, `unit_norm` an array a leaf that broadcasts against it. Leaves that carry the same array object are one
block; `None` leaves them alone. `functools.partial` configures a norm: `partial(global_norm, ord=1)`.

Every norm counts floating and complex leaves only, accumulates in f32 (f64 stays f64), has a finite derivative at 0,
and is exact to about 1e-6 from 1e-27 to the largest f32, though squares of such numbers leave the range of f32.

Inside `jax.shard_map` the types of the leaves say over which mesh axes they vary, and norms sum over exactly those.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax

from optax_clip import _checks
from optax_clip._blocks import Part, axes_by_rank, broadcast, parts
from optax_clip._reductions import l2_norms, p_norms


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

    Example:
      >>> print(global_norm({"w": jnp.array([3.0]), "b": jnp.array([4.0])}))
      5.0
    """
    leaves = parts(updates, axis_name, caller="global_norm")
    return _norms([[part for part in leaves if part is not None]], ord, caller="global_norm")[0]


def leaf_norm(updates: Any, *, ord: float | None = None, axis_name: Any = None) -> Any:
    """Norm of each leaf: a block a leaf.

    norm_i = (Σ |x|^ord)^(1/ord), over the entries of leaf i

    Args:
      updates: pytree of arrays.
      ord: order of the norm, >= 1 or inf; None is 2.
      axis_name: as for `global_norm`.

    Returns:
      The tree with f32[] (f64[] for f64) for each floating or complex leaf and None for others.

    Example:
      >>> norms = leaf_norm({"w": jnp.array([3.0, 4.0]), "steps": 7})
      >>> print(norms["w"], norms["steps"])
      5.0 None
    """
    leaves = parts(updates, axis_name, caller="leaf_norm")
    return _like(updates, leaves, ord, caller="leaf_norm")


def unit_norm(updates: Any, *, ord: float | None = None, axis: Any = None, axis_name: Any = None) -> Any:
    """Norm of each unit of each leaf, a unit being what feeds one output: a block a unit.

    norm_u = (Σ |x|^ord)^(1/ord), over the entries of unit u

    Args:
      updates: pytree of arrays.
      ord: order of the norm, >= 1 or inf; None is 2.
      axis: the axes that a unit extends over. None goes by rank, as for weights stored (..., inputs, outputs): a leaf
        with at most one dimension longer than 1 is one unit, rank 2 and 3 reduce axis 0, rank 4 axes (0, 1, 2), rank 5
        axes (0, 1, 2, 3). An int or a tuple holds for every leaf. A rule(path, leaf) returns one of these for
        each leaf, or None to leave the leaf alone.
      axis_name: inside `shard_map` or `pmap`, the mesh axes that the entries of *one unit* are spread over: a name, a
        tuple of names (`()` where every unit lies on one device), or a prefix tree of these. Required where a leaf
        varies over a mesh axis: its type does not tell which dimension is spread. Where there are names, a shard of
        one row is taken for a piece of a matrix; for a vector stored as a matrix pass `axis` as well.

    Returns:
      The tree with f32 arrays (f64 for f64) that broadcast against the leaves, 1 along the reduced axes, scalars where
      a leaf is one unit, and None for other leaves.

    Raises:
      ValueError: a leaf has more than 5 dimensions and `axis` is None, or an axis is out of range, or `axis_name` is
        missing.

    Example:
      >>> print(unit_norm(jnp.array([[3.0, 0.0], [4.0, 1.0]])))
      [[5. 1.]]

    References:
      Brock, De, Smith, Simonyan, High-performance large-scale image recognition without normalization, 2021,
      arXiv 2102.06171; the axes by rank are those of `optax.adaptive_grad_clip`.
    """
    axis = _checks.axis(axis, caller="unit_norm")
    leaves = parts(updates, axis_name, caller="unit_norm", axis=axes_by_rank if axis is None else axis)
    return _like(updates, leaves, ord, caller="unit_norm")


def block_rms(updates: Any, *, axis: Any = None, axis_name: Any = None) -> Any:
    """Root mean square of each leaf, or of each unit where `axis` is given.

    rms_i = sqrt(Σ |x|² / count), over the entries of leaf (or unit) i; 0 for a leaf without entries

    Args:
      updates: pytree of arrays.
      axis: None for whole leaves; an int, a tuple or a rule(path, leaf) as for `unit_norm`.
      axis_name: as for `global_norm`, and as for `unit_norm` where `axis` is given.

    Returns:
      The tree with f32[] (f64[] for f64), or arrays as from `unit_norm`, and None for leaves that are not counted.

    Example:
      >>> print(block_rms(jnp.array([3.0, 4.0, 0.0, 0.0])))
      2.5

    References:
      Shazeer, Stern, Adafactor, 2018, arXiv 1804.04235, section 6.
    """
    leaves = parts(updates, axis_name, caller="block_rms", axis=_checks.axis(axis, caller="block_rms"))
    return _like(updates, leaves, None, caller="block_rms", mean=True)


def group_norm(labels: Any, *, ord: float | None = None, axis_name: Any = None) -> Callable[[Any], Any]:
    """Norm of each group of leaves: a block a label.

    norm_g = (Σ |x|^ord)^(1/ord), over all entries of all leaves labeled g

    Args:
      labels: prefix tree of hashable labels, or a function of the updates that returns one, as for `optax.partition`.
        None as a label leaves these leaves alone.
      ord: order of the norm, >= 1 or inf; None is 2.
      axis_name: as for `global_norm`.

    Returns:
      The norm: a function from updates to the tree in which all leaves with one label carry the same f32[] (f64[]
      where a leaf of the group is f64).

    Example:
      >>> norm = group_norm({"encoder": "body", "decoder": "body", "head": None})
      >>> norms = norm({"encoder": jnp.array([3.0]), "decoder": jnp.array([4.0]), "head": jnp.array([9.0])})
      >>> print(norms["encoder"], norms["decoder"], norms["head"])
      5.0 5.0 None
    """

    if ord is not None:
        ord = _checks.static_number(ord, caller="group_norm", name="ord", low=1.0)

    def norm(updates):
        leaves = parts(updates, axis_name, caller="group_norm")
        if not leaves:  # as where optax.tree.map_params asks, with a tree that labels do not fit
            return updates
        tree = labels(updates) if _checks.is_function(labels) else labels
        _checks.labels(tree, caller="group_norm")
        by_leaf = [
            None if part is None else label
            for part, label in zip(leaves, broadcast(tree, updates, caller="group_norm", name="labels"))
        ]
        names = list(dict.fromkeys(label for label in by_leaf if label is not None))
        groups = [
            [part for part, label in zip(leaves, by_leaf) if part is not None and label == name] for name in names
        ]
        norms = dict(zip(names, _norms(groups, ord, caller="group_norm")))
        return jax.tree.structure(updates).unflatten([norms.get(label) for label in by_leaf])

    return norm


def _like(updates: Any, leaves: list[Part | None], ord: float | None, *, caller: str, mean: bool = False) -> Any:
    norms = iter(_norms([[part] for part in leaves if part is not None], ord, caller=caller, mean=mean))
    return jax.tree.structure(updates).unflatten([None if part is None else next(norms) for part in leaves])


def _norms(blocks: Sequence[Sequence[Part]], ord: float | None, *, caller: str, mean: bool = False) -> list[jax.Array]:
    ord = 2.0 if ord is None else _checks.static_number(ord, caller=caller, name="ord", low=1.0)
    values = [[part.value for part in block] for block in blocks]
    layout = tuple(tuple((part.axes, part.mesh_axes) for part in block) for block in blocks)
    if not blocks:
        return []
    if ord != 2.0:
        return p_norms(values, layout=layout, ord=ord)
    sizes = tuple(max(sum(part.size for part in block), 1) for block in blocks)
    return l2_norms(values, layout=layout, sizes=sizes, mean=mean)

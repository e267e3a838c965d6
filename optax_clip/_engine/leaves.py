"""Which leaves count, in which dtype to compute, and what a prefix tree or the parameters have for each leaf."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax


def is_leaf(value: object) -> bool:
    """True for a value that is one pytree leaf, so that a callable module (a tree) is not taken for a function."""
    leaves = jax.tree.leaves(value)
    return len(leaves) == 1 and leaves[0] is value


_ARRAYS = (jax.Array, np.ndarray, np.generic, float, complex, jax.ShapeDtypeStruct)


def is_counted(leaf: object) -> bool:
    """True for leaves that have a norm: floating and complex arrays and scalars."""
    if isinstance(leaf, (bool, int)) or not isinstance(leaf, _ARRAYS):
        return False
    return jnp.issubdtype(getattr(leaf, "dtype", type(leaf)), jnp.inexact)


def wide(x: jax.Array) -> Any:
    """The real dtype to compute in: f64 for f64 and complex128, else f32."""
    return jnp.float64 if x.real.dtype == jnp.float64 else jnp.float32


def widest(dtypes: Iterable) -> Any:
    """Of f32 and f64, or of one dtype. Where promotion is strict, `jnp.promote_types` refuses."""
    return max(map(jnp.dtype, dtypes), key=lambda dtype: dtype.itemsize)


def real_parts(x: jax.Array) -> list[jax.Array]:
    """Real and imaginary part, or the array itself."""
    return [x.real, x.imag] if jnp.iscomplexobj(x) else [x]


def spread(prefix: Any, tree: Any, name: str, is_entry: Callable[[Any], bool] = lambda x: False) -> list:
    """The entry of `prefix` for each leaf of `tree`, in order. None in `prefix` is an entry."""
    try:
        triples = list(_paired(prefix, tree, is_entry))
    except ValueError as error:
        raise ValueError(
            f"{name} must be one value or a prefix of the tree of updates: {error}. Use the same containers."
        ) from None
    return [entry for path, entry, subtree in triples for _ in dense_leaves(subtree, path)]


def params_of(updates: Any, params: Any, why: str) -> list:
    """The parameter for each leaf of the updates, in order. Where the updates are None, any parameter will do."""
    if params is None:
        raise ValueError(f"params are missing. {why} Call update(updates, state, params).")
    dense_leaves(updates)
    try:
        triples = [triple for triple in _paired(updates, params) if triple[1] is not None]
    except ValueError as error:
        raise ValueError(
            f"params must have the structure of the updates: {error}. Pass the parameters that the updates belong to."
        ) from None
    for path, update, param in triples:
        if not is_leaf(param) or (hasattr(update, "shape") and jnp.shape(update) != getattr(param, "shape", ())):
            got = jnp.shape(param) if is_leaf(param) else type(param).__name__
            raise ValueError(
                f"params must have the shapes of the updates, got {got} at {keystr(path)} where the updates have "
                f"{jnp.shape(update)}. Pass the parameters that the updates belong to."
            )
    return [param for _, _, param in triples]


def dense_leaves(tree: Any, path: tuple = (), name: str = "updates") -> list:
    """Path and leaf of a tree without sparse arrays, whose data would be taken for leaves."""
    is_sparse = lambda x: type(x).__module__.startswith("jax.experimental.sparse")
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_sparse)
    for below, leaf in leaves:
        if is_sparse(leaf):
            raise TypeError(
                f"{name} must be dense arrays, got {type(leaf).__name__} at {keystr((*path, *below))}, which may hold "
                "parts of one entry several times. Pass x.sum_duplicates().todense(), or use optax.masked."
            )
    return leaves


def keystr(path: tuple) -> str:
    """The name of a leaf in messages."""
    return jax.tree_util.keystr(path) or "the root"


def _paired(prefix: Any, tree: Any, is_entry: Callable[[Any], bool] = lambda x: False, path: tuple = ()) -> Iterator:
    """Path, entry and subtree for each entry of a prefix tree; nothing where the tree is masked.

    A ValueError says in one line where the two part ways: what JAX says of it has many lines and whole arrays.
    """
    if prefix is None or is_leaf(prefix) or is_entry(prefix):
        yield path, prefix, tree
        return
    if isinstance(tree, optax.MaskedNode):
        return
    if type(prefix) is not type(tree):
        kinds = ["None" if x is None else "a leaf" if is_leaf(x) else type(x).__name__ for x in (prefix, tree)]
        raise ValueError(f"there is {kinds[0]} beside {kinds[1]} at {keystr(path)}")
    entries, subtrees = (_children(node) for node in (prefix, tree))
    for key in [*entries, *subtrees]:
        if key not in entries or key not in subtrees:
            raise ValueError(f"only one of them has {keystr((*path, key))}")
    for key, entry in entries.items():
        yield from _paired(entry, subtrees[key], is_entry, (*path, key))


def _children(node: Any) -> dict:
    """What a container holds, by key."""
    children, _ = jax.tree_util.tree_flatten_with_path(node, is_leaf=lambda x: x is not node)
    return {path[0]: child for path, child in children}

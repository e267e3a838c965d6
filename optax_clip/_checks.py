"""Argument checks and their messages: what is wrong, what is required, what to do."""

import math
import operator
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer


def is_leaf(value: object) -> bool:
    """True for a value that is one pytree leaf, so that a callable module (a tree) is not taken for a function."""
    leaves = jax.tree.leaves(value)
    return len(leaves) == 1 and leaves[0] is value


def is_function(value: object) -> bool:
    return callable(value) and is_leaf(value)


def is_transformation(value: object) -> bool:
    return isinstance(value, optax.GradientTransformation)


def transformation(value: object, *, caller: str, name: str, example: str) -> None:
    if not is_transformation(value):
        raise TypeError(
            f"{caller}: {name} must be an Optax transformation, got {type(value).__name__}. For example: {example}."
        )


NUMBER = "a number or a scalar array"
_NOT_REAL = (bool, np.bool_, str, bytes, complex, np.complexfloating)


def is_real(value: Any) -> bool:
    """True for real numbers and arrays of them; booleans are none."""
    dtype = getattr(value, "dtype", np.dtype(float))
    return _is_number(value) and (jnp.issubdtype(dtype, jnp.floating) or jnp.issubdtype(dtype, jnp.integer))


def _is_number(value: Any) -> bool:
    return hasattr(value, "__float__") and not isinstance(value, _NOT_REAL)


def scalar(
    value: Any,
    *,
    caller: str,
    name: str,
    low: float | None = None,
    high: float | None = None,
    why: str = "",
    kinds: str = "",
) -> None:
    """Raises unless `value` is a real scalar; where its value is known, also unless it lies in [low, high]."""
    one = kinds == NUMBER
    kinds = kinds or "a number, a scalar array, a schedule, or None"
    if not _is_number(value):
        raise TypeError(f"{caller}: {name} must be {kinds}, got {_show(value)}. Pass one of these.")
    shape = jnp.shape(value)
    if shape != ():
        trees = (
            "For a number for each leaf pass a tree of scalars, where blocks are leaves or smaller; for each group use "
            "clip_by_group_norm."
        )
        raise ValueError(
            f"{caller}: {name} must be a scalar, got an array of shape {shape}. {'Pass one number.' if one else trees}"
        )
    if not is_real(value):
        raise TypeError(f"{caller}: {name} must be {kinds}, got dtype {value.dtype}. Pass a real number.")
    try:
        known = concrete(value)
    except OverflowError:
        raise ValueError(f"{caller}: {name} must fit a float, got an int above 1e308. Pass a smaller number.") from None
    if known is None:
        return
    if math.isnan(known):
        why_not = "Pass one." if one else "Every update would become NaN."
        raise ValueError(f"{caller}: {name} must be a number, got {known}. {why_not}")
    if low is not None and known < low:
        raise ValueError(f"{caller}: {name} must be >= {low:g}, got {known:g}.{why or ' Pass a larger number.'}")
    if high is not None and known > high:
        raise ValueError(f"{caller}: {name} must be <= {high:g}, got {known:g}. Pass a smaller number.")


def ordered(low_value: Any, high_value: Any, *, caller: str, low: str, high: str) -> None:
    """Raises where both bounds are known numbers and cross."""
    known = [concrete(v) if hasattr(v, "__float__") else None for v in (low_value, high_value)]
    if known[0] is not None and known[1] is not None and known[0] > known[1]:
        raise ValueError(
            f"{caller}: {low} must be <= {high}, got {known[0]:g} > {known[1]:g}. "
            "Exchange them, or pass None for one of them."
        )


def concrete(value: Any) -> float | None:
    """The value of a scalar, or None where it is traced or lives on devices of other processes."""
    if isinstance(value, Tracer):
        return None
    if isinstance(value, jax.Array) and not (value.is_fully_addressable or value.is_fully_replicated):
        return None
    return float(value)


def static_number(value: Any, *, caller: str, name: str, low: float) -> float:
    """A Python number >= `low` (inf included) that shapes the program and so cannot be an array."""
    if isinstance(value, jax.Array):
        raise TypeError(
            f"{caller}: {name} must be a Python number, got a JAX array. It shapes the program: "
            f"under optax.inject_hyperparams pass static_args={name!r}."
        )
    if isinstance(value, _NOT_REAL) or not hasattr(value, "__float__") or jnp.shape(value) != ():
        raise TypeError(
            f"{caller}: {name} must be a number, got {_show(value)}. Pass a number >= {low:g}, or math.inf."
        )
    value = float(value)
    if not value >= low:
        raise ValueError(f"{caller}: {name} must be >= {low:g}, got {value:g}. Pass a larger number, or math.inf.")
    return value


def static_int(value: Any, *, caller: str, name: str, low: int) -> int:
    """A Python int >= `low` that is a shape and so cannot be an array."""
    if isinstance(value, jax.Array):
        raise TypeError(
            f"{caller}: {name} must be a Python int, got a JAX array. It is a shape: "
            f"under optax.inject_hyperparams pass static_args={name!r}."
        )
    if isinstance(value, _NOT_REAL) or not hasattr(value, "__index__") or jnp.shape(value) != ():
        raise TypeError(f"{caller}: {name} must be an int, got {_show(value)}. Pass an int >= {low}.")
    if not low <= operator.index(value) < 2**31:
        raise ValueError(f"{caller}: {name} must be >= {low} and below 2^31, got {_show(value)}. Pass another int.")
    return operator.index(value)


def floating_dtype(value: Any, *, caller: str, name: str) -> None:
    try:
        known = jnp.issubdtype(jnp.dtype(value), jnp.floating)
    except TypeError:
        known = False
    if not known:
        raise TypeError(f"{caller}: {name} must be a floating dtype, got {_show(value)}. Pass jnp.float32, or None.")


def norms(value: Any, *, caller: str) -> np.ndarray:
    """A vector of recorded norms in f64, NaN and inf included."""
    try:
        array = np.asarray(value)
    except ValueError:
        raise ValueError(f"{caller}: norms must be a vector, got {_show(value)}. Pass a number a step.") from None
    if array.dtype.kind not in "fiu" and not jnp.issubdtype(array.dtype, jnp.floating):
        raise TypeError(
            f"{caller}: norms must be real numbers, got dtype {array.dtype}. Pass a list or an array of them."
        )
    if array.ndim != 1:
        raise ValueError(
            f"{caller}: norms must be a vector with an entry a step, got an array of shape {array.shape}. "
            "Pass the norms of one block."
        )
    array = array.astype(np.float64)
    if (array < 0).any():
        raise ValueError(
            f"{caller}: norms must be >= 0, got {array[array < 0][0]:g} at step {int(np.argmax(array < 0))}. "
            "Pass norms, not logarithms or losses."
        )
    return array


def choice(value: Any, *, caller: str, name: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{caller}: {name} must be one of {choices}, got {_show(value)}. Pass one of these strings.")


def axis(value: Any, *, caller: str) -> Callable[[Any, Any], Any] | tuple[int, ...] | None:
    """`axis` as None, a rule, or a tuple of ints."""
    return value if value is None or is_function(value) else axes(value, caller=caller)


def axes(value: Any, *, caller: str) -> tuple[int, ...]:
    if isinstance(value, jax.Array):
        raise TypeError(
            f"{caller}: axis must be a Python int, got a JAX array. It shapes the program: "
            "under optax.inject_hyperparams pass static_args='axis'."
        )
    try:
        axes = tuple(value) if isinstance(value, (tuple, list)) else (value,)
        if any(isinstance(a, (bool, np.bool_)) for a in axes):
            raise TypeError
        return tuple(operator.index(a) for a in axes)
    except TypeError:
        raise TypeError(
            f"{caller}: axis must be None, an int, a tuple of ints, or a rule(path, leaf) that returns one of these, "
            f"got {_show(value)}. Pass the axes that share a norm."
        ) from None


def labels(tree: Any, *, caller: str) -> set:
    """The labels in a tree of them."""
    try:
        return set(jax.tree.leaves(tree))
    except TypeError:
        raise TypeError(
            f"{caller}: labels must be a tree of hashable labels, got {_show(tree)}. Use strings, and None for leaves "
            "to leave alone."
        ) from None


def function(value: Any, *, caller: str, name: str, example: str) -> None:
    if not callable(value):
        raise TypeError(f"{caller}: {name} must be a function, got {_show(value)}. For example: {example}.")


def state(value: Any, kind: Any, *, caller: str) -> None:
    if not all(hasattr(value, field) for field in kind._fields):
        raise TypeError(
            f"{caller}: state must have the fields of {kind.__name__}, got {type(value).__name__}. Pass what init or "
            "the last update returned; for a checkpoint without it, make a new one with init."
        )


def params_given(
    params: Any, *, caller: str, why: str = "The threshold is a share of the norm of the parameters."
) -> None:
    if params is None:
        raise ValueError(f"{caller}: params are missing. {why} Call update(updates, state, params).")


def params_like(updates: Any, params: Any, *, caller: str) -> list:
    """The parameters that belong to the leaves of the updates, in their order; where updates are None, any will do."""
    try:
        triples = [(path, u, p) for path, u, p in paired(updates, params) if u is not None]
    except ValueError as error:
        raise ValueError(
            f"{caller}: params must have the structure of the updates: {error}. "
            "Pass the parameters that the updates belong to."
        ) from None
    for path, u, p in triples:
        shape = getattr(p, "shape", ()) if is_leaf(p) else None
        if shape is None or (hasattr(u, "shape") and jnp.shape(u) != shape):
            raise ValueError(
                f"{caller}: params must have the shapes of the updates, got "
                f"{type(p).__name__ if shape is None else shape}{place(path)} where the updates have {jnp.shape(u)}. "
                "Pass the parameters that the updates belong to."
            )
    return [p for _, _, p in triples]


def paired(updates: Any, tree: Any) -> list[tuple[tuple, Any, Any]]:
    """Path, update and what `tree` has there; None is an update. A ValueError says where the tree does not fit."""
    triples = []
    try:
        collect = lambda *triple: triples.append(triple)
        jax.tree_util.tree_map_with_path(collect, updates, tree, is_leaf=lambda x: x is None)
    except ValueError:
        raise ValueError(misfit(updates, tree, of_updates=True)) from None
    return triples


def place(path: tuple) -> str:
    """Where in a tree, in words that follow others; nothing for the whole."""
    return f" at {jax.tree_util.keystr(path)}" if path else ""


def misfit(
    prefix: Any, tree: Any, *, of_updates: bool, is_entry: Callable[[Any], bool] | None = None, path: tuple = ()
) -> str:
    """Where a prefix tree and a tree part ways; what JAX says of it has many lines, and whole arrays.

    One of them is that of the updates: the prefix if `of_updates`, else the tree.
    """
    if prefix is None or is_leaf(prefix) or (is_entry is not None and is_entry(prefix)):
        return ""
    updates, other = (prefix, tree) if of_updates else (tree, prefix)
    if type(prefix) is not type(tree):
        kinds = ["None" if x is None else "a single leaf" if is_leaf(x) else type(x).__name__ for x in (updates, other)]
        return f"the updates have {kinds[0]}{place(path)}, and not {kinds[1]}"
    those, these = _children(updates), _children(other)
    for keys, absent, text in ((those, these, "there is nothing for"), (these, those, "the updates have no")):
        for key in keys:
            if key not in absent:
                return f"{text} {jax.tree_util.keystr((*path, key))}"
    for key in those:
        pair = (those[key], these[key]) if of_updates else (these[key], those[key])
        if text := misfit(*pair, of_updates=of_updates, is_entry=is_entry, path=(*path, key)):
            return text
    return "" if path else "containers differ in static data"


def _children(node: Any) -> dict:
    """What a container holds, by key."""
    children, _ = jax.tree_util.tree_flatten_with_path(node, is_leaf=lambda x: x is not node)
    return {path[0]: child for path, child in children}


def _show(value: object) -> str:
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:57] + '...'}"

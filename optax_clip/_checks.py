"""Argument checks and their messages: what is wrong, what is required, what to do."""

import math
import operator
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

_ACCEPTED = "a number, a scalar array, a schedule, or None"


def is_leaf(value: object) -> bool:
    """True for a value that is one pytree leaf, so that a callable module (a tree) is not taken for a function."""
    return jax.tree_util.treedef_is_leaf(jax.tree.structure(value))


def is_function(value: object) -> bool:
    return callable(value) and is_leaf(value)


def scalar(value: Any, *, caller: str, name: str, low: float | None = None, why: str = "") -> None:
    """Raises unless `value` is a real scalar; where its value is known, also unless it is a number >= `low`."""
    if isinstance(value, (bool, np.bool_, str, bytes, complex)) or not hasattr(value, "__float__"):
        raise TypeError(f"{caller}: {name} must be {_ACCEPTED}, got {_show(value)}.{why}")
    shape, dtype = jnp.shape(value), getattr(value, "dtype", np.dtype(float))
    if shape != ():
        raise ValueError(
            f"{caller}: {name} must be a scalar, got an array of shape {shape}. "
            "For a threshold for each leaf use clip_by_leaf_norm, for each group clip_by_group_norm."
        )
    if not (jnp.issubdtype(dtype, jnp.floating) or jnp.issubdtype(dtype, jnp.integer)):
        raise TypeError(f"{caller}: {name} must be a real number, got dtype {dtype}.")
    known = concrete(value)
    if known is None:
        return
    if math.isnan(known):
        raise ValueError(f"{caller}: {name} must be a number, got {known}. Every update would become NaN.")
    if low is not None and known < low:
        raise ValueError(f"{caller}: {name} must be >= {low:g}, got {known:g}.{why}")


def ordered(low_value: Any, high_value: Any, *, caller: str, low: str, high: str) -> None:
    """Raises where both bounds are known numbers and cross."""
    known = [concrete(v) if hasattr(v, "__float__") else None for v in (low_value, high_value)]
    if known[0] is not None and known[1] is not None and known[0] > known[1]:
        raise ValueError(
            f"{caller}: {low} must be <= {high}, got {known[0]:g} > {known[1]:g}. "
            "Exchange them, or pass None for no bound."
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
    if isinstance(value, (bool, np.bool_, str)) or not hasattr(value, "__float__") or jnp.shape(value) != ():
        raise TypeError(f"{caller}: {name} must be a number, got {_show(value)}.")
    value = float(value)
    if not value >= low:
        raise ValueError(f"{caller}: {name} must be >= {low:g}, got {value:g}.")
    return value


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
        if isinstance(value, (bool, np.bool_)):
            raise TypeError
        return tuple(operator.index(a) for a in (value if isinstance(value, (tuple, list)) else (value,)))
    except TypeError:
        raise TypeError(
            f"{caller}: axis must be None, an int, a tuple of ints, or a rule(path, leaf) that returns one of these, "
            f"got {_show(value)}."
        ) from None


def function(value: Any, *, caller: str, name: str, example: str) -> None:
    if not callable(value):
        raise TypeError(f"{caller}: {name} must be a function, got {_show(value)}. For example: {example}.")


def params_given(params: Any, *, caller: str) -> None:
    if params is None:
        raise ValueError(
            f"{caller}: params are missing. The threshold is a share of the norm of the parameters. "
            "Call update(updates, state, params)."
        )


def same_structure(updates: Any, params: Any, *, caller: str) -> list:
    """The leaves of `params` that stand where those of `updates` do."""
    try:
        return jax.tree.structure(updates).flatten_up_to(params)
    except ValueError as error:
        raise ValueError(
            f"{caller}: params must have the structure of the updates. {error}. "
            "Pass the parameters that the updates belong to."
        ) from None


def _show(value: object) -> str:
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:57] + '...'}"

"""Checks of arguments. A message begins with the argument: what is wrong, what is required, what to do."""

import inspect
import math
import operator
from collections.abc import Callable, Hashable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer

from optax_clip._engine.leaves import is_leaf

_NOT_REAL = (bool, np.bool_, str, bytes, complex, np.complexfloating)


def is_function(value: object) -> bool:
    return callable(value) and is_leaf(value)


def is_transformation(value: object) -> bool:
    return isinstance(value, optax.GradientTransformation)


def function(value: Any, name: str, arguments: tuple[str, ...], then: str) -> None:
    """Raises unless `value` is a function that can be called with these arguments, so far as its signature tells."""
    if not callable(value):
        raise TypeError(f"{name} must be a function, got {show(value)}. {then}")
    try:
        inspect.signature(value).bind(*arguments)
    except TypeError as error:
        raise TypeError(f"{name} must take ({', '.join(arguments)}), got {show(value)}: {error}. {then}") from None
    except ValueError:  # it has no signature
        pass


def schedule(value: Any, name: str) -> None:
    each = "jax.tree_util.tree_map_with_path(function, params)"
    function(value, name, ("step",), f"A schedule takes the step. A function of path and leaf makes a tree: {each}.")


def transformation(value: Any, name: str, example: str) -> None:
    if not is_transformation(value):
        raise TypeError(f"{name} must be an Optax transformation, got {show(value)}. For example: {example}.")


def is_real(value: Any) -> bool:
    """True for real numbers and arrays of them. Booleans are not."""
    if isinstance(value, _NOT_REAL) or not hasattr(value, "__float__"):
        return False
    dtype = getattr(value, "dtype", np.dtype(float))
    return jnp.issubdtype(dtype, jnp.floating) or jnp.issubdtype(dtype, jnp.integer)


def scalar(
    value: Any,
    name: str,
    low: float | None = None,
    high: float | None = None,
    *,
    kinds: str = "a number or a scalar array",
    why: str = "",
) -> None:
    """Raises unless `value` is a real scalar. Where its value is known, it must lie in [low, high]."""
    if jnp.shape(value) != () and hasattr(value, "dtype"):
        raise ValueError(
            f"{name} must be a scalar, got an array of shape {jnp.shape(value)}. Pass one number. A number for each "
            "leaf is a tree of scalars; a number for each group goes to clip_by_group_norm."
        )
    if not is_real(value):
        raise TypeError(f"{name} must be {kinds}, got {show(value)}. Pass one of these.")
    try:
        known = concrete(value)
    except OverflowError:
        raise ValueError(f"{name} must fit a float, got an int above 1e308. Pass a smaller number.") from None
    if known is None:
        return
    if math.isnan(known):
        raise ValueError(f"{name} must be a number, got nan. A comparison with nan is never true. Pass a number.")
    if low is not None and known < low:
        raise ValueError(f"{name} must be >= {low:g}, got {known:g}. {why or 'Pass a larger number.'}")
    if high is not None and known > high:
        raise ValueError(f"{name} must be <= {high:g}, got {known:g}. Pass a smaller number.")


def whole(value: Any, name: str, low: float) -> None:
    """Raises unless `value` is a scalar that is a whole number >= `low`, so far as it is known."""
    scalar(value, name, low, 2**31 - 1)
    known = concrete(value)
    if known is not None and not known.is_integer():
        raise ValueError(f"{name} must be a whole number, got {known:g}. Pass an int.")


def ordered(low: Any, high: Any, low_name: str, high_name: str) -> None:
    """Raises where both bounds are known numbers and cross."""
    known = [concrete(value) if is_real(value) and jnp.shape(value) == () else None for value in (low, high)]
    if known[0] is not None and known[1] is not None and known[0] > known[1]:
        raise ValueError(
            f"{low_name} must be <= {high_name}, got {known[0]:g} > {known[1]:g}. "
            "Exchange them, or pass None for one of them."
        )


def concrete(value: Any) -> float | None:
    """The value of a scalar, or None where it is traced or lives on devices of other processes."""
    if isinstance(value, Tracer):
        return None
    if isinstance(value, jax.Array) and not (value.is_fully_addressable or value.is_fully_replicated):
        return None
    return float(value)


_STATIC = "{0} must be a Python number, got a JAX array. It shapes the program: pass static_args={0!r} to Optax."


def static(value: Any, name: str, low: float, *, integer: bool = False) -> Any:
    """A Python number >= `low` that shapes the program, so that it cannot be an array."""
    if isinstance(value, jax.Array):
        raise TypeError(_STATIC.format(name))
    if not is_real(value) or jnp.shape(value) != () or (integer and not hasattr(value, "__index__")):
        raise TypeError(f"{name} must be {'an int' if integer else 'a number'}, got {show(value)}. Pass one number.")
    value = operator.index(value) if integer else float(value)
    if not value >= low or (integer and value >= 2**31):
        raise ValueError(
            f"{name} must be >= {low:g}{' and < 2^31' if integer else ''}, got {value:g}. Pass a number in that range."
        )
    return value


def choice(value: Any, name: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {choices}, got {show(value)}. Pass one of these strings.")


def axes(value: Any) -> Callable | tuple[int, ...] | None:
    """`axis` as None, a rule, or a tuple of ints."""
    if is_function(value):
        function(value, "axis", ("path", "leaf"), "For example: lambda path, leaf: 0.")
    if value is None or is_function(value):
        return value
    entries = tuple(value) if isinstance(value, (tuple, list)) else (value,)
    if any(isinstance(entry, jax.Array) for entry in entries):
        raise TypeError(_STATIC.format("axis"))
    if not all(hasattr(entry, "__index__") and not isinstance(entry, (bool, np.bool_)) for entry in entries):
        raise TypeError(
            "axis must be None, an int, a tuple of ints, or a rule(path, leaf) that returns one of these, got "
            f"{show(value)}. Pass the axes that share a norm."
        )
    return tuple(operator.index(entry) for entry in entries)


def norms(value: Any, name: str = "norms") -> np.ndarray:
    """A vector of recorded norms in f64, NaN and inf included."""
    array = np.asarray(value)
    if array.dtype.kind not in "fiu" and not jnp.issubdtype(array.dtype, jnp.floating):
        raise TypeError(f"{name} must be real numbers, got dtype {array.dtype}. Pass a list or an array of them.")
    if array.ndim != 1:
        raise ValueError(
            f"{name} must be a vector with one entry for each step, got one of shape {array.shape}. Pass one vector."
        )
    array = array.astype(np.float64)
    if (array < 0).any():
        raise ValueError(
            f"{name} must be >= 0, got {array[array < 0][0]:g} at step {int(np.argmax(array < 0))}. Pass norms, not "
            "logarithms or losses."
        )
    return array


def show(value: object) -> str:
    """A short text for a value: its type and what it holds."""
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:57] + '...'}"


def state(value: Any, kind: type, fresh: Callable[[], Any] | None = None) -> Any:
    """The state to go on from. `fresh` makes one for a transformation that needs no history."""
    if isinstance(value, kind):
        return value
    empty = isinstance(value, (type(None), tuple)) and not value
    if empty and fresh is not None:
        return fresh()
    article = "an" if kind.__name__[0] in "AEIO" else "a"
    got = (
        "an empty one, and a history cannot start anew in each step"
        if empty
        else f"{type(value).__name__}, which another transformation keeps"
    )
    raise TypeError(
        f"state must be {article} {kind.__name__}, got {got}. Pass what init or the last update of this transformation "
        "returned; for a checkpoint without it, make a new one with init."
    )


def hashable(labels: Iterable) -> None:
    """Raises unless all labels can be keys."""
    for label in labels:
        if not isinstance(label, Hashable):
            raise TypeError(f"labels must be hashable, got {show(label)}. Use strings; None leaves leaves alone.")

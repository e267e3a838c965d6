"""Numbers that users give: known or traced scalars, schedules, and None for no bound."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import optax

from optax_clip._engine import checks


def cast(value: Any, dtype: Any) -> Any:
    """A scalar in a floating dtype, in which finite numbers stay finite. Python and NumPy numbers stay known."""
    largest = float(jnp.finfo(dtype).max)
    if not isinstance(value, jax.Array):
        known = float(value)
        return jnp.dtype(dtype).type(known if math.isinf(known) else min(max(known, -largest), largest))
    if not jnp.issubdtype(value.dtype, jnp.floating) or float(jnp.finfo(value.dtype).max) <= largest:
        return value.astype(dtype)
    return jnp.where(jnp.isinf(value), value, jnp.clip(value, -largest, largest)).astype(dtype)


def value_at(value: Any, step: Any, name: str) -> Any:
    """The number at this step; a schedule is called. None stays None."""
    if not checks.is_function(value):
        return value
    value = value(step)
    if not checks.is_real(value):
        got = getattr(value, "dtype", type(value).__name__)
        raise TypeError(f"{name} must return a real number, got {got} from the schedule. Where there is no bound, inf.")
    if jnp.shape(value) != ():
        raise ValueError(
            f"{name} must return a scalar, got an array of shape {jnp.shape(value)} from the schedule. Reduce it there."
        )
    return value


def bounded(tree: Any, name: str, low: float | None = None) -> None:
    """Raises unless `tree` is a bound for entries, or a tree of them."""
    for value in jax.tree.leaves(tree, is_leaf=checks.is_transformation):
        if checks.is_transformation(value):
            raise TypeError(
                f"{name} must be a number, a scalar array, a schedule, or None, got a rule. Rules compare norms, and "
                "entries have none. Use a norm clip; for weights, clip_weight_norm."
            )
        if checks.is_function(value):
            checks.schedule(value, name)
        else:
            kinds = "a number, a scalar array, a schedule, or None"
            checks.scalar(value, name, low, kinds=kinds, why="Magnitudes are not negative.")


def within_reciprocals(x: jax.Array) -> jax.Array:
    """A size >= 0, not so small that 8 / size leaves the range. In XLA x / size is x · (1 / size), which may be 0."""
    return jnp.maximum(x, 16 * jnp.finfo(x.dtype).tiny)


def next_step(step: jax.Array) -> jax.Array:
    """The count of updates, which stays at the largest i32."""
    return jnp.asarray(optax.safe_increment(step))


def gathered(decay: Any, count: jax.Array, dtype: Any) -> jax.Array:
    """1 - decay^count: what an exponential average that started at 0 has of its full weight."""
    # Not by the power: 1 - .999^t in f32 is 6e-5 off at t = 1. The range keeps the logarithm finite and not 0.
    rate = jnp.clip(jnp.asarray(1.0 - decay, dtype), 2.0**-24, 1 - 2.0**-24)
    return -jnp.expm1(count.astype(dtype) * jnp.log1p(-rate))

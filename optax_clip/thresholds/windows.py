"""Thresholds from the last norms. Windows have a fixed shape."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_clip._engine import checks
from optax_clip._engine.numbers import cast, within_reciprocals
from optax_clip._engine.rules import rule_of


class SigmaWindowState(NamedTuple):
    """The window of `sigma_window`, for one block."""

    ring: jax.Array  # as the norm, [window]: the last norms, the next one goes to `place`; 0 where none was
    place: jax.Array  # i32[]: below window
    filled: jax.Array  # i32[]: norms in the window


def sigma_window(sigmas: Any = 3.0, window: int = 128) -> optax.GradientTransformationExtraArgs:
    """Some deviations above the mean of the last norms, the present one left out.

    threshold = mean + sigmas · max(deviation, 1e-6 · |mean|), over {norm_(t - window), ..., norm_(t - 1)};
    inf while fewer than window / 2 norms are known, or all are 0

    Args:
      sigmas: deviations above the mean, >= 0, a number or traced scalar.
      window: norms to remember, an int >= 1: a shape, so under `optax.inject_hyperparams` a `static_args`.

    Returns:
      A rule with the state `SigmaWindowState`, 4 · window + 8 bytes for each block.

    Raises:
      ValueError: an argument is out of range.
      TypeError: an argument is of the wrong kind.

    Example:
      >>> tx = clip_by_norm(global_norm, thresholds.sigma_window(2.0, window=2))
      >>> state = tx.init(jnp.zeros(1))
      >>> for gradient in (4.0, 2.0, 9.0):
      ...     updates, state = tx.update(jnp.array([gradient]), state)
      >>> print(updates, state.threshold)
      [5.] 5.0

    References:
      The clipping by the history of norms in the levanter library. `clip_by_sigma` is this rule on `global_norm`.
    """
    checks.scalar(sigmas, "sigmas", 0.0)
    window = checks.static(window, "window", 1, integer=True)

    def init(norm):
        zero = jnp.zeros_like(norm, jnp.int32)
        return SigmaWindowState(jnp.zeros(window, norm.dtype), zero, zero)

    def update(norm, state, _=None, /, **__):
        count = jnp.maximum(state.filled, 1).astype(norm.dtype)
        # Relative to the largest, so that no square leaves the range.
        largest = jnp.max(jnp.abs(state.ring))
        unit = within_reciprocals(largest)
        ring = state.ring * (8 / unit)
        mean = jnp.sum(ring) / count
        there = jnp.arange(window, dtype=jnp.int32) < state.filled
        variance = jnp.sum(jnp.where(there, jnp.square(ring - mean), 0.0)) / count
        deviation = jnp.where(variance == 0, 0.0, jnp.sqrt(jnp.where(variance == 0, 1.0, variance)))
        least = jnp.maximum(deviation, 1e-6 * jnp.abs(mean))
        threshold = mean * (unit / 8) + cast(sigmas, norm.dtype) * (least * (unit / 8))
        known = (2 * state.filled >= window) & (largest > 0)  # zeros say nothing about the size of norms
        return jnp.where(known, threshold, jnp.inf), pushed(state, norm)

    return rule_of(init, update)


def pushed(state: Any, norm: jax.Array) -> Any:
    """The state with the norm in its ring, in place of the oldest."""
    window = len(state.ring)
    return state._replace(
        ring=jnp.where(jnp.arange(window, dtype=jnp.int32) == state.place, norm, state.ring),
        place=(state.place + 1) % window,
        filled=jnp.minimum(state.filled + 1, window),
    )

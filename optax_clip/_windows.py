"""Thresholds from the last norms: rules that keep a window.

Each is the mathematics on one block, which `per_block` lifts to every scope. Windows have a fixed shape.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from optax_clip import _checks
from optax_clip._reductions import quotient
from optax_clip._thresholds import Threshold, cast, per_block


class QuantileState(NamedTuple):
    """The window of `quantile`, for one block."""

    ring: jax.Array  # f32[window]: the last norms in order of arrival, the next one goes to `next`; 0 where none was
    ascending: jax.Array  # f32[window]: the same numbers in ascending order
    next: jax.Array  # i32[]: below window
    filled: jax.Array  # i32[]: norms in the window


def quantile(percentile: Any = 10.0, window: int = 1024) -> Threshold:
    """A percentile of the last norms, the present one included.

    threshold = percentile p of {norm_(t - window + 1), ..., norm_t}, interpolated linearly

    Args:
      percentile: p, in [0, 100], a number or traced scalar.
      window: norms to remember, an int >= 1: a shape, so under `optax.inject_hyperparams` a `static_args`.

    Returns:
      A `Threshold` with the state `QuantileState`, 8 · window + 8 bytes a block.

    Raises:
      ValueError: an argument is out of range.
      TypeError: an argument is of the wrong kind.

    Example:
      >>> tx = clip_by_norm(global_norm, quantile(50.0, window=3))
      >>> state = tx.init(jnp.zeros(1))
      >>> for gradient in (4.0, 2.0, 6.0, 8.0):
      ...     updates, state = tx.update(jnp.array([gradient]), state)
      ...     print(updates, state.threshold)
      [4.] 4.0
      [2.] 3.0
      [4.] 4.0
      [6.] 6.0

    References:
      Seetharaman, Wichern, Pardo, Le Roux, 2020, arXiv 2007.14469: `autoclip` is this rule on `global_norm`.
    """
    _checks.scalar(percentile, caller="quantile", name="percentile", low=0.0, high=100.0, kinds=_checks.NUMBER)
    window = _checks.static_int(window, caller="quantile", name="window", low=1)

    def init():
        zeros = lambda: jnp.zeros([window], jnp.float32)
        return QuantileState(zeros(), zeros(), jnp.zeros([], jnp.int32), jnp.zeros([], jnp.int32))

    def update(norm, state):
        # Zeros stand for norms that are still missing: they are the smallest, and leave first.
        leaves = jax.lax.dynamic_index_in_dim(state.ring, state.next, keepdims=False)
        places = jnp.arange(window, dtype=jnp.int32)
        rest = jnp.where(
            places < jnp.sum(state.ascending < leaves, dtype=jnp.int32),
            state.ascending,
            _shifted(state.ascending, jnp.inf),
        )
        ascending = jnp.maximum(_shifted(rest, 0.0, by=-1), jnp.minimum(rest, norm))
        state = _pushed(state._replace(ascending=ascending), norm)
        filled = state.filled
        place = (filled - 1).astype(jnp.float32) * cast(percentile, jnp.float32) / 100
        below = jnp.clip(jnp.floor(place).astype(jnp.int32), 0, filled - 1)
        low, high = (
            jax.lax.dynamic_index_in_dim(ascending, window - filled + i, keepdims=False)
            for i in (below, jnp.minimum(below + 1, filled - 1))
        )
        threshold = low + (place - below.astype(jnp.float32)) * (high - low)
        return threshold, state

    return per_block(init, update)


def _pushed(state: Any, norm: jax.Array) -> Any:
    """The state with the norm in its ring, in place of the oldest."""
    window = len(state.ring)
    return state._replace(
        ring=jnp.where(jnp.arange(window, dtype=jnp.int32) == state.next, norm, state.ring),
        next=(state.next + 1) % window,
        filled=jnp.minimum(state.filled + 1, window),
    )


def _shifted(x: jax.Array, edge: float, by: int = 1) -> jax.Array:
    """Entry i is that of place i + by, `edge` outside."""
    return jax.lax.pad(x, jnp.asarray(edge, x.dtype), [(-by, by, 0)])


class SigmaWindowState(NamedTuple):
    """The window of `sigma_window`, for one block."""

    ring: jax.Array  # f32[window]: the last norms in order of arrival, the next one goes to `next`; 0 where none was
    next: jax.Array  # i32[]: below window
    filled: jax.Array  # i32[]: norms in the window


def sigma_window(sigmas: Any = 3.0, window: int = 128) -> Threshold:
    """Some deviations above the mean of the last norms, the present one left out.

    threshold = mean + sigmas · max(deviation, 1e-6), over {norm_(t - window), ..., norm_(t - 1)};
    inf while fewer than window / 2 norms are known

    Args:
      sigmas: deviations above the mean, >= 0, a number or traced scalar.
      window: norms to remember, an int >= 1: a shape, so under `optax.inject_hyperparams` a `static_args`.

    Returns:
      A `Threshold` with the state `SigmaWindowState`, 4 · window + 8 bytes a block.

    Raises:
      ValueError: an argument is out of range.
      TypeError: an argument is of the wrong kind.

    Example:
      >>> tx = clip_by_norm(global_norm, sigma_window(2.0, window=2))
      >>> state = tx.init(jnp.zeros(1))
      >>> for gradient in (4.0, 2.0, 9.0):
      ...     updates, state = tx.update(jnp.array([gradient]), state)
      >>> print(updates, state.threshold)
      [5.] 5.0

    References:
      The clipping by the history of norms in the levanter library. `clip_by_sigma` is this rule on `global_norm`.
    """
    _checks.scalar(sigmas, caller="sigma_window", name="sigmas", low=0.0, kinds=_checks.NUMBER)
    window = _checks.static_int(window, caller="sigma_window", name="window", low=1)

    def init():
        return SigmaWindowState(jnp.zeros([window], jnp.float32), jnp.zeros([], jnp.int32), jnp.zeros([], jnp.int32))

    def update(norm, state):
        places = jnp.arange(window, dtype=jnp.int32)
        count = jnp.maximum(state.filled, 1).astype(jnp.float32)
        # In units of the largest: squares and sums would leave the range of f32.
        largest = jnp.max(state.ring)
        unit = jnp.where(largest == 0, 1.0, largest)
        relative = quotient(state.ring, unit)
        mean = jnp.sum(relative) / count
        variance = jnp.sum(jnp.where(places < state.filled, jnp.square(relative - mean), 0.0)) / count
        deviation = jnp.where(variance == 0, 0.0, jnp.sqrt(jnp.where(variance == 0, 1.0, variance)))
        threshold = mean * unit + cast(sigmas, jnp.float32) * jnp.maximum(deviation * unit, 1e-6)
        return jnp.where(2 * state.filled >= window, threshold, jnp.inf), _pushed(state, norm)

    return per_block(init, update)

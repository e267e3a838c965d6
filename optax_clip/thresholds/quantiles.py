"""Thresholds that are a percentile of the norms."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_clip._engine import checks
from optax_clip._engine.numbers import cast
from optax_clip._engine.rules import rule_of
from optax_clip.thresholds.windows import pushed


class QuantileState(NamedTuple):
    """The window of `quantile`, for one block."""

    ring: jax.Array  # as the norm, [window]: the last norms, the next one goes to `place`; 0 where none was
    ascending: jax.Array  # as the norm, [window]: the same numbers in ascending order
    place: jax.Array  # i32[]: below window
    filled: jax.Array  # i32[]: norms in the window


def quantile(percentile: Any = 10.0, window: int = 1024) -> optax.GradientTransformationExtraArgs:
    """A percentile of the last norms, the present one included.

    threshold = percentile p of {norm_(t - window + 1), ..., norm_t}, interpolated linearly

    Args:
      percentile: p, in [0, 100], a number or traced scalar.
      window: norms to remember, an int >= 1: a shape, so under `optax.inject_hyperparams` a `static_args`.

    Returns:
      A rule with the state `QuantileState`, 8 · window + 8 bytes for each block.

    Raises:
      ValueError: an argument is out of range.
      TypeError: an argument is of the wrong kind.

    Example:
      >>> tx = clip_by_norm(global_norm, thresholds.quantile(50.0, window=3))
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
    checks.scalar(percentile, "percentile", 0.0, 100.0)
    window = checks.static(window, "window", 1, integer=True)

    def init(norm):
        zeros, zero = jnp.zeros(window, norm.dtype), jnp.zeros_like(norm, jnp.int32)
        return QuantileState(zeros, zeros, zero, zero)

    def update(norm, state, _=None, /, **__):
        places = jnp.arange(window, dtype=jnp.int32)
        at = lambda array, place: jnp.sum(jnp.where(places == place, array, 0.0))  # under vmap an index is a gather
        # Zeros stand for norms that are still missing: they are the smallest, and leave first.
        oldest = at(state.ring, state.place)
        rest = jnp.where(
            places < jnp.sum(state.ascending < oldest, dtype=jnp.int32),
            state.ascending,
            _shifted(state.ascending, float(jnp.finfo(norm.dtype).max)),
        )
        ascending = jnp.maximum(_shifted(rest, 0.0, by=-1), jnp.minimum(rest, norm))
        state = pushed(state._replace(ascending=ascending), norm)
        exact = (state.filled - 1).astype(norm.dtype) * cast(percentile, norm.dtype) / 100
        below = jnp.clip(jnp.floor(exact).astype(jnp.int32), 0, state.filled - 1)
        first = window - state.filled
        low, high = at(ascending, first + below), at(ascending, first + jnp.minimum(below + 1, state.filled - 1))
        return low + (exact - below.astype(norm.dtype)) * (high - low), state

    return rule_of(init, update)


def tracked_quantile(percentile: Any = 90.0, rate: Any = 0.05) -> optax.GradientTransformationExtraArgs:
    """A percentile of the norms that is followed step by step, with one number for each block.

    threshold = level;  then level ← level · exp(-rate · (b - q)),  q = percentile / 100,  b = 1 where norm ≤ level,
    else 0;  the first level is the first norm that is not 0

    `quantile` keeps a window of norms; the level is cheap enough for a norm of each unit. In a step where the norm is
    above it, the level goes up by rate · q, else down by rate · (1 - q), both in its logarithm. So it comes down slowly
    from a start that is too high, as first norms often are: by a factor of 10 in log(10) / (rate · (1 - q)) steps at
    least, 461 by default and 4605 for percentile 99, and in that time little is clipped. It goes up by a factor of 10
    in 51 steps at least. Where norms are log-normal with deviation 0.5, these are 551, 6605 and 99 steps. A smaller
    rate makes the level steadier: there it scatters by 8 % by default, by 5 % with rate 0.02.

    Args:
      percentile: q in percent, in [0, 100], a number or traced scalar: the share of norms not to clip.
      rate: step of the logarithm of the level, the paper's η, in [0, 1], likewise.

    Returns:
      A rule whose state is the level, 4 bytes for each block; 0 while no norm was above 0.

    Raises:
      ValueError: an argument is out of range.
      TypeError: an argument is of the wrong kind.

    Guarantees:
      Over N steps the share of norms above the threshold differs from 1 - q by log(level before / level after) /
      (rate · N), whatever the norms are.

    Example:
      >>> tx = clip_by_norm(global_norm, thresholds.tracked_quantile(50.0, rate=0.2))
      >>> state = tx.init(jnp.zeros(1))
      >>> for gradient in (1.0, 1.0, 1.0):
      ...     updates, state = tx.update(jnp.array([gradient]), state)
      ...     print(updates, f"{state.rule:.6f}")
      [1.] 0.904837
      [0.9048374] 1.000000
      [1.] 0.904837

    References:
      Andrew, Thakkar, McMahan, Ramaswamy, Differentially private learning with adaptive clipping, 2021,
      arXiv 1905.03871. There b is a mean over clients, and the first level is given.
    """
    checks.scalar(percentile, "percentile", 0.0, 100.0)
    checks.scalar(rate, "rate", 0.0, 1.0)

    def update(norm, state, _=None, /, **__):
        level = jnp.where(state == 0, norm, state)
        below = (norm <= level).astype(norm.dtype)
        new = level * jnp.exp(cast(rate, norm.dtype) * (cast(percentile, norm.dtype) / 100 - below))
        return level, jnp.minimum(new, jnp.finfo(norm.dtype).max)  # from inf it would never come back

    return rule_of(jnp.zeros_like, update)


def _shifted(x: jax.Array, edge: float, by: int = 1) -> jax.Array:
    """Entry i is that of place i + by, `edge` outside."""
    return jax.lax.pad(x, jnp.asarray(edge, x.dtype), [(-by, by, 0)])

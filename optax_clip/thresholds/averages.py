"""Thresholds from running averages of the norms. Each rule is the mathematics on one block."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_clip._engine import checks
from optax_clip._engine.numbers import cast, next_step, within_reciprocals
from optax_clip._engine.rules import fixed, rule_of


class ZScoreState(NamedTuple):
    """The statistics of `z_score`, for one block."""

    seen: jax.Array  # i32[]: norms so far, saturates
    mean: jax.Array  # as the norm, []: of the norms, in warm-up plain, then exponential with spikes replaced
    deviation: jax.Array  # as the norm, []: the standard deviation, likewise


def z_score(
    z_max: Any = 2.5, decay: Any = 0.97, warmup_steps: Any = 25, *, spike: str = "rescale", factor: Any = None
) -> optax.GradientTransformationExtraArgs:
    """Mean and deviation of the norms, each an exponential average; norms far above are spikes, and only they are cut.

    z = (norm - mean) / (deviation + 1e-6 · |mean|);  z ≤ z_max: not clipped;  z > z_max, by `spike`:
    "rescale": threshold = (mean + z_max · deviation · z_max / z) · factor;  "mean": threshold = mean;
    "limit", which goes by norm > threshold: threshold = mean + z_max · deviation

    After each step, with x the norm after clipping: mean ← decay · mean + (1 - decay) · x, then
    deviation² ← decay · deviation² + (1 - decay) · (x - mean)². The first `warmup_steps` norms are not clipped; their
    mean and population variance are what these start from.

    Args:
      z_max: deviations above the mean from which a norm is a spike, >= 0, a number or traced scalar.
      decay: decay of the averages, in [0, 1], likewise.
      warmup_steps: norms to collect before anything is clipped, >= 0, likewise; at least one norm is collected.
      spike: what to do about a spike: "rescale" (the larger, the more), "mean" or "limit".
      factor: what "rescale" multiplies the threshold by, >= 0, a number or traced scalar; None is 1.

    Returns:
      A rule with the state `ZScoreState`, 12 bytes for each block. Where nothing is a spike, its threshold is the norm
      from which it would be one; in warm-up inf.

    Raises:
      ValueError: an argument is out of range.
      TypeError: an argument is of the wrong kind.

    Guarantees:
      While all norms were 0, which gives no idea of their size, warm-up goes on: a threshold of 0 would never end.

    Example:
      >>> tx = clip_by_norm(global_norm, thresholds.z_score(warmup_steps=4, spike="mean"))
      >>> state = tx.init(jnp.zeros(1))
      >>> for gradient in (1.0, 1.2, 0.8, 1.1, 10.0):
      ...     updates, state = tx.update(jnp.array([gradient]), state)
      >>> print(f"{updates.item():.3f}")
      1.025

    References:
      Kumar, Owen, Chowdhury, Güra, ZClip, 2025, arXiv 2504.02507: `zclip` is this rule on `global_norm`.
    """
    checks.scalar(z_max, "z_max", 0.0)
    checks.scalar(decay, "decay", 0.0, 1.0)
    checks.whole(warmup_steps, "warmup_steps", 0.0)
    checks.choice(spike, "spike", ("rescale", "mean", "limit"))
    if factor is not None:
        checks.scalar(factor, "factor", 0.0)
        if spike != "rescale":
            raise ValueError(f'factor must be None for spike={spike!r}, got {factor}. It belongs to spike="rescale".')

    def init(norm):
        return ZScoreState(jnp.zeros_like(norm, jnp.int32), jnp.zeros_like(norm), jnp.zeros_like(norm))

    def update(norm, state, _=None, /, **__):
        most, keep = jnp.asarray(z_max, norm.dtype), jnp.asarray(decay, norm.dtype)
        endless, most = most == jnp.inf, jnp.where(most == jnp.inf, 0.0, most)  # inf · 0 is NaN
        seen, mean, deviation = state
        # While all norms were 0, which says nothing about their size, warm-up goes on.
        warm = (seen < jnp.maximum(warmup_steps, 1)) | ((mean == 0) & (deviation == 0))
        limit = jnp.where(endless, jnp.inf, mean + most * deviation)
        least = deviation + 1e-6 * jnp.abs(mean)
        bound = limit if spike == "limit" else jnp.where(endless, jnp.inf, mean + most * least)
        above = ~warm & (norm > bound)
        # Of the numbers where it matters; elsewhere of harmless ones.
        z = jnp.where(above, (norm - mean) / jnp.where(above, least, 1.0), 1.0)
        times = 1.0 if factor is None else jnp.asarray(factor, norm.dtype)
        rescaled = (mean + most * deviation * jnp.where(above, most / z, 1.0)) * times
        target = {"rescale": rescaled, "mean": mean, "limit": limit}[spike]
        threshold = jnp.where(warm, jnp.inf, jnp.where(above, target, bound))
        # Deviations rather than variances: squares would leave the range of f32.
        n = (seen + 1).astype(norm.dtype)
        x = jnp.minimum(norm, threshold)
        new_mean = mean + jnp.where(warm, 1 / n, 1 - keep) * (x - mean)
        new_deviation = jnp.where(
            warm,
            _hypot(deviation, (norm - mean) / jnp.sqrt(n)) * jnp.sqrt((n - 1) / n),
            _hypot(jnp.sqrt(keep) * deviation, jnp.sqrt(1 - keep) * (x - new_mean)),
        )
        return threshold, ZScoreState(next_step(seen), new_mean, new_deviation)

    return rule_of(init, update)


def _hypot(a: jax.Array, b: jax.Array) -> jax.Array:
    """sqrt(a² + b²), relative to the larger, with the derivative 0 at 0."""
    largest = jnp.maximum(jnp.abs(a), jnp.abs(b))
    unit = jax.lax.stop_gradient(jnp.where(largest == 0, 1.0, largest))
    square = jnp.square(a / unit) + jnp.square(b / unit)
    return jnp.where(square == 0, 0.0, jnp.sqrt(jnp.where(square == 0, 1.0, square))) * unit


class EmaRatioState(NamedTuple):
    """The reference of `ema_ratio`, for one block."""

    seen: jax.Array  # i32[]: norms so far, saturates
    mean: jax.Array  # as the norm, []: in warm-up the smallest norm after clipping, then their average; 0: none yet


def ema_ratio(
    max_norm: Any = 1.0, max_ratio: Any = 1.05, decay: Any = 0.98, warmup_steps: Any = 100
) -> optax.GradientTransformationExtraArgs:
    """A little above an exponential average γ of the norms after clipping, block by block.

    warm-up: threshold_b = norm_b · min(1, max_norm / norm of all blocks), γ_b ← min(γ_b, norm_b after clipping)
    then: threshold_b = max_ratio · γ_b, γ_b ← decay · γ_b + (1 - decay) · norm_b after clipping

    Args:
      max_norm: largest norm of all blocks together in warm-up: a number, traced scalar, schedule or None.
      max_ratio: largest ratio of a norm to γ, >= 0, a number or traced scalar.
      decay: decay of the average, in [0, 1], likewise.
      warmup_steps: steps in which all blocks are scaled together, >= 0, likewise.

    Returns:
      A rule with the state `EmaRatioState`, 8 bytes for each block.

    Raises:
      ValueError: an argument is out of range.
      TypeError: an argument is of the wrong kind.

    Guarantees:
      A norm of 0 says nothing about the size of a block: in warm-up it does not become its γ, and a block that has none
      yet stays in warm-up. In warm-up a block that is not finite makes all NaN, and leaves no trace in any γ.

    Example:
      >>> tx = clip_by_norm(leaf_norm, thresholds.ema_ratio(max_norm=5.0, max_ratio=1.1, decay=0.5, warmup_steps=1))
      >>> state = tx.init(jnp.zeros(1))
      >>> for gradient in (2.0, 4.0, 4.0):
      ...     updates, state = tx.update(jnp.array([gradient]), state)
      ...     print(f"{updates.item():.2f}")
      2.00
      2.20
      2.31

    References:
      Wang, Li, Dong and others, AdaGC, 2025, arXiv 2502.11034: `adagc` is this rule on `leaf_norm`.
    """
    cap = fixed(max_norm, "max_norm")
    checks.scalar(max_ratio, "max_ratio", 0.0)
    checks.scalar(decay, "decay", 0.0, 1.0)
    checks.whole(warmup_steps, "warmup_steps", 0.0)

    def init(norm):
        return EmaRatioState(jnp.zeros_like(norm, jnp.int32), jnp.zeros_like(norm))

    def update(norm, state, _=None, /, *, step, total_norm, **__):
        bound = jnp.maximum(cast(cap.update(norm, (), step=step)[0], norm.dtype), 0.0)  # keeps NaN
        total = total_norm.astype(norm.dtype)
        warm = (state.seen < warmup_steps) | (state.mean == 0)
        share = norm * (8 / within_reciprocals(total))
        # NaN where the total is not finite: in warm-up all blocks share the fate of the worst.
        together = jnp.where(total > bound, share * jnp.minimum(bound / 8, total), norm) + (total - total)
        threshold = jnp.where(warm, together, cast(max_ratio, norm.dtype) * state.mean)
        x = jnp.minimum(norm, threshold)
        smallest = jnp.where((state.mean == 0) | ((x > 0) & (x < state.mean)), x, state.mean)
        average = state.mean + (1 - cast(decay, norm.dtype)) * (x - state.mean)
        return threshold, EmaRatioState(next_step(state.seen), jnp.where(warm, smallest, average))

    return rule_of(init, update)

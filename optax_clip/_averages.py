"""Thresholds from running averages of the norms.

Each rule is the mathematics on one block, which `per_block` lifts to every scope. Statistics are f32.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_clip import _checks
from optax_clip._reductions import quotient, root_of_squares, squares, total
from optax_clip._thresholds import Threshold, as_threshold, cast, per_block, thresholds_of


class ZScoreState(NamedTuple):
    """The statistics of `z_score`, for one block."""

    seen: jax.Array  # i32[]: norms so far, saturates
    mean: jax.Array  # f32[]: of the norms, in warm-up plain, then exponential with spikes replaced
    deviation: jax.Array  # f32[]: the standard deviation, likewise


def z_score(
    z_max: Any = 2.5, decay: Any = 0.97, warmup_steps: Any = 25, *, spike: str = "rescale", factor: Any = 1.0
) -> Threshold:
    """Mean and deviation of the norms, each an exponential average; norms far above are spikes, and only they are cut.

    z = (norm - mean) / (deviation + 1e-6);  z ≤ z_max: not clipped;  z > z_max, by `spike`:
    "rescale": threshold = (mean + z_max · deviation · z_max / z) · factor;  "mean": threshold = mean;
    "limit", which goes by norm > threshold: threshold = mean + z_max · deviation

    After each step, with x the norm after clipping: mean ← decay · mean + (1 - decay) · x, then
    deviation² ← decay · deviation² + (1 - decay) · (x - mean)². The first `warmup_steps` norms are not clipped; their
    mean and population variance are what these start from.

    Args:
      z_max: deviations above the mean from which a norm is a spike, >= 0, a number or traced scalar.
      decay: of the averages, in [0, 1], likewise.
      warmup_steps: norms to collect before anything is clipped, >= 0, likewise; at least one is.
      spike: what to do about a spike: "rescale" (the larger, the more), "mean" or "limit".
      factor: of the threshold of "rescale", >= 0, a number or traced scalar.

    Returns:
      A `Threshold` with the state `ZScoreState`, 12 bytes a block. Where nothing is a spike, its threshold is the norm
      from which it would be one; in warm-up inf.

    Raises:
      ValueError: an argument is out of range.
      TypeError: an argument is of the wrong kind.

    Guarantees:
      While all norms were 0, which gives no idea of their size, warm-up goes on: a threshold of 0 would never end.

    Example:
      >>> tx = clip_by_norm(global_norm, z_score(warmup_steps=4, spike="mean"))
      >>> state = tx.init(jnp.zeros(1))
      >>> for gradient in (1.0, 1.2, 0.8, 1.1, 10.0):
      ...     updates, state = tx.update(jnp.array([gradient]), state)
      >>> print(f"{updates.item():.3f}")
      1.025

    References:
      Kumar, Owen, Chowdhury, Güra, ZClip, 2025, arXiv 2504.02507: `zclip` is this rule on `global_norm`.
    """
    for name, value, high in (
        ("z_max", z_max, None),
        ("decay", decay, 1.0),
        ("warmup_steps", warmup_steps, None),
        ("factor", factor, None),
    ):
        _checks.scalar(value, caller="z_score", name=name, low=0.0, high=high, kinds=_checks.NUMBER)
    _checks.choice(spike, caller="z_score", name="spike", choices=("rescale", "mean", "limit"))

    def init():
        return ZScoreState(jnp.zeros([], jnp.int32), jnp.zeros([], jnp.float32), jnp.zeros([], jnp.float32))

    def update(norm, state):
        most, keep = cast(z_max, jnp.float32), cast(decay, jnp.float32)
        seen, mean, deviation = state
        warm = (seen.astype(jnp.float32) < jnp.maximum(cast(warmup_steps, jnp.float32), 1)) | (
            (mean == 0) & (deviation == 0)
        )
        # Not inf · 0, whose derivative is NaN where a select follows.
        endless = most == jnp.inf
        most = jnp.where(endless, 0.0, most)
        limit = jnp.where(endless, jnp.inf, mean + most * deviation)
        bound = limit if spike == "limit" else jnp.where(endless, jnp.inf, mean + most * (deviation + 1e-6))
        above = norm > bound
        # Of the numbers where it matters; elsewhere of harmless ones.
        z = jnp.where(above, (norm - mean) / (deviation + 1e-6), 1.0)
        target = {
            "rescale": jnp.where(above & ~warm, mean + most * deviation * (most / z), 1.0) * cast(factor, jnp.float32),
            "mean": mean,
            "limit": limit,
        }[spike]
        threshold = jnp.where(above, target, bound)
        # Deviations rather than variances: squares would leave the range of f32.
        n = (seen + 1).astype(jnp.float32)
        first_mean = mean + (norm - mean) / n
        first_deviation = _hypot(deviation, (norm - mean) / jnp.sqrt(n)) * jnp.sqrt((n - 1) / n)
        x = jnp.minimum(norm, threshold)
        next_mean = mean + (1 - keep) * (x - mean)
        next_deviation = _hypot(jnp.sqrt(keep) * deviation, jnp.sqrt(1 - keep) * (x - next_mean))
        return jnp.where(warm, jnp.inf, threshold), ZScoreState(
            jnp.asarray(optax.safe_increment(seen)),
            jnp.where(warm, first_mean, next_mean),
            jnp.where(warm, first_deviation, next_deviation),
        )

    return per_block(init, update)


@jax.custom_jvp
def _hypot(a: jax.Array, b: jax.Array) -> jax.Array:
    """`jnp.hypot`, with a derivative that stays in the range of f32."""
    return jnp.hypot(a, b)


@_hypot.defjvp
def _(primals, tangents):
    (a, b), (da, db) = primals, tangents
    h = _hypot(a, b)
    unit = jnp.where(h == 0, 1.0, h)
    return h, quotient(a, unit) * da + quotient(b, unit) * db


class EmaRatioState(NamedTuple):
    """The reference of `ema_ratio`, for one block."""

    seen: jax.Array  # i32[]: norms so far, saturates
    mean: jax.Array  # f32[]: in warm-up the smallest norm after clipping, then their exponential average; 0: none yet


def ema_ratio(max_norm: Any = 1.0, max_ratio: Any = 1.05, decay: Any = 0.98, warmup_steps: Any = 100) -> Threshold:
    """A little above an exponential average γ of the norms after clipping, block by block.

    warm-up: threshold_b = norm_b · min(1, max_norm / norm of all blocks), γ_b ← min(γ_b, norm_b after clipping)
    then: threshold_b = max_ratio · γ_b, γ_b ← decay · γ_b + (1 - decay) · norm_b after clipping

    Args:
      max_norm: largest norm of all blocks together in warm-up: a number, traced scalar, schedule, `Threshold` or None.
      max_ratio: largest ratio of a norm to γ, >= 0, a number or traced scalar.
      decay: of the average, in [0, 1], likewise.
      warmup_steps: steps in which all blocks are scaled together, >= 0, likewise.

    Returns:
      A `Threshold` whose state is a tuple: `EmaRatioState`, 8 bytes a block, and the state of `max_norm`.

    Raises:
      ValueError: an argument is out of range.
      TypeError: an argument is of the wrong kind.

    Guarantees:
      A norm of 0 says nothing about the size of a block: in warm-up it does not become its γ, and a block that has none
      yet stays in warm-up. In warm-up a block that is not finite makes all NaN, and leaves no trace in any γ.

    Example:
      >>> tx = clip_by_norm(leaf_norm, ema_ratio(max_norm=5.0, max_ratio=1.1, decay=0.5, warmup_steps=1))
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
    cap = as_threshold(max_norm, caller="ema_ratio", name="max_norm")
    for name, value, high in (
        ("max_ratio", max_ratio, None),
        ("decay", decay, 1.0),
        ("warmup_steps", warmup_steps, None),
    ):
        _checks.scalar(value, caller="ema_ratio", name=name, low=0.0, high=high, kinds=_checks.NUMBER)

    def in_warmup(state):
        return (state.seen.astype(jnp.float32) < cast(warmup_steps, jnp.float32)) | (state.mean == 0)

    def init():
        return EmaRatioState(jnp.zeros([], jnp.int32), jnp.zeros([], jnp.float32))

    def of_block(norm, state, shared_scale):
        warm = in_warmup(state)
        threshold = jnp.where(
            warm, norm * shared_scale, cast(max_ratio, jnp.float32) * jnp.where(warm, 1.0, state.mean)
        )
        x = jnp.minimum(norm, threshold)
        smallest = jnp.where((state.mean == 0) | ((x > 0) & (x < state.mean)), x, state.mean)
        average = state.mean + (1 - cast(decay, jnp.float32)) * (x - state.mean)
        return threshold, EmaRatioState(
            jnp.asarray(optax.safe_increment(state.seen)), jnp.where(warm, smallest, average)
        )

    def total_norm(norms):
        return (
            root_of_squares(*total([squares(norm.astype(jnp.float32)) for norm in norms])) if norms else jnp.zeros([])
        )

    def init_all(norms):
        return per_block(init, lambda norm, state: (norm, state)).init(norms), cap.init((total_norm(norms),))

    def update_all(norms, state, params):
        blocks, cap_state = state
        whole = total_norm(norms)
        (bound,), new_cap_state = thresholds_of(cap, (whole,), cap_state, params)
        bound = jnp.maximum(bound, 0.0)  # keeps NaN
        over = whole > bound
        n = jnp.where(over & jnp.isfinite(whole), whole, 1.0)
        shared_scale = jnp.where(over | jnp.isnan(bound), bound / n, 1.0)
        # In warm-up all blocks share the fate of the worst.
        norms = (
            tuple(
                jnp.where(in_warmup(block) & ~jnp.isfinite(whole), jnp.nan, norm) for norm, block in zip(norms, blocks)
            )
            if norms
            else ()
        )
        rule = per_block(init, lambda norm, state: of_block(norm, state, shared_scale))
        thresholds, blocks = rule.update(norms, blocks, None)
        return thresholds, (blocks, new_cap_state)

    return Threshold(init_all, update_all, needs_params=cap.needs_params)

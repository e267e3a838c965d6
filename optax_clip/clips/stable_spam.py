"""The two clips of Stable-SPAM: large entries against the tracked maximum, and the norm against its moments."""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_clip._engine import checks
from optax_clip._engine.leaves import real_parts, spread
from optax_clip._engine.numbers import cast, gathered, next_step
from optax_clip._engine.rules import rule_of
from optax_clip.clips.norms import ClipState, clip_by_norm
from optax_clip.norms import leaf_norm
from optax_clip.responses import normalize
from optax_clip.thresholds.combine import together


class StableSpamState(NamedTuple):
    """What the two clips measured and keep. Read it with `clip_metrics`."""

    entry_clip: ClipState  # of the largest magnitude of each leaf; rule: an `AverageState`
    norm_clip: ClipState  # of the norm of each leaf after the clip of entries; rule: two of these


class AverageState(NamedTuple):
    """An exponential average of the norms of one leaf."""

    seen: jax.Array  # i32[]: steps so far, saturates
    mean: jax.Array  # f32[]: debiased; of squares, its root


def stable_spam(
    decay_max: Any = 0.999, decay_mean: Any = 0.7, decay_square: Any = 0.9, eps: Any = 1e-8, *, axis_name: Any = None
) -> optax.GradientTransformationExtraArgs:
    """Stable-SPAM's two clips, in front of Adam: large entries are scaled down, then the norm follows its own moments.

    m = max |g|;  T = average of m;  x ← x · T / m  where |x| > T
    n = ‖x‖;  μ = average of n;  ν = average of n²;  updates ← x / n · μ / (√ν + eps)

    For each leaf on its own. Averages are exponential, debiased, and have the present step in them. The second part is
    `clip_by_norm(leaf_norm, rule, responses.normalize)`: after it norms are near 1, lower where norms scatter.

    Args:
      decay_max: decay of T, the paper's γ3, in [0, 1], a number or traced scalar.
      decay_mean: decay of μ, the paper's γ1, likewise.
      decay_square: decay of ν, the paper's γ2, likewise.
      eps: what is added to √ν, >= 0, likewise.
      axis_name: mesh axes that a leaf is spread over, where types do not tell (`shard_map(check_vma=False)`, `pmap`).

    Returns:
      A transformation with the state `StableSpamState`: two `ClipState`, in whose rules are 24 bytes for each leaf.

    Raises:
      ValueError: an argument is out of range.
      TypeError: an argument, or the state, is of the wrong kind.

    Guarantees:
      Shapes and dtypes are kept. Entries above T keep their order, but may come out below entries that stay. A leaf of
      zeros stays 0. A leaf with a NaN or inf becomes NaN and leaves no trace in its statistics; others do not notice.
      A single finite spike is divided by about t in step t, by 1000 at most. For each factor of 10 that is left above
      the usual norm, the leaf all but stops for 44 steps, as μ forgets faster than √ν, and T stays too high for 2300.
      `skip_spikes` around the optimizer keeps spikes out.

    Example:
      >>> tx = stable_spam()
      >>> state = tx.init(jnp.zeros(1))
      >>> for gradient in (2.0, 3.0, 1.0, 50.0, 2.0):
      ...     updates, state = tx.update(jnp.array([gradient]), state)
      ...     print(f"{updates.item():.3f}")
      1.000
      1.008
      0.893
      0.850
      0.724

    References:
      Huang, Hu, Zhang and others, Stable-SPAM, 2025, arXiv 2502.17055. The reset of Adam's moments every 1000 steps is
      not in here: it is the optimizer's. The authors' code restarts the debiasing of T at a reset; here it never does.
    """
    for name, decay in (("decay_max", decay_max), ("decay_mean", decay_mean), ("decay_square", decay_square)):
        checks.scalar(decay, name, 0.0, 1.0)
    checks.scalar(eps, "eps", 0.0)
    measure = functools.partial(leaf_norm, axis_name=axis_name)
    largest = functools.partial(measure, ord=math.inf)
    of_peaks: Any = clip_by_norm(largest, _average(decay_max))
    moments = _average(decay_mean), _average(decay_square, of_squares=True)
    ratio = together(moments, lambda norm, found: found[0] / (found[1] + cast(eps, norm.dtype)))
    of_norms: Any = clip_by_norm(measure, ratio, normalize)

    def init_fn(params):
        return StableSpamState(of_peaks.init(params), of_norms.init(params))

    def update_fn(updates, state, params=None, **extra_args):
        del params, extra_args
        state = checks.state(state, StableSpamState)
        peaks = largest(updates)
        limits, of_entries = of_peaks.update(peaks, state.entry_clip)  # min(m, T) for each leaf
        leaves, treedef = jax.tree.flatten(updates)
        bounds = zip(*(spread(tree, updates, "updates") for tree in (peaks, limits)))
        clipped = [
            x if peak is None else _below(jnp.asarray(x), peak, limit) for x, (peak, limit) in zip(leaves, bounds)
        ]
        updates, of_leaves = of_norms.update(treedef.unflatten(clipped), state.norm_clip)
        return updates, StableSpamState(of_entries, of_leaves)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _below(x: Any, peak: jax.Array, limit: jax.Array) -> jax.Array:
    """Entries above the limit, scaled by limit / peak. NaN and inf pass: the norm clip that follows makes all NaN."""
    x, factor = jnp.asarray(x), limit / jnp.where(peak == 0, 1.0, peak)
    parts = [part.astype(factor.dtype) * factor for part in real_parts(x)]
    scaled = jax.lax.complex(*parts) if len(parts) == 2 else parts[0]
    return jnp.where(jnp.abs(x).astype(limit.dtype) > limit, scaled.astype(x.dtype), x)


def _average(decay: Any, *, of_squares: bool = False) -> optax.GradientTransformationExtraArgs:
    """The debiased exponential average of the norms, or the root of that of their squares, as a rule."""

    def init(norm):
        return AverageState(jnp.zeros_like(norm, jnp.int32), jnp.zeros_like(norm))

    def update(norm, state, _=None, /, **__):
        seen = next_step(state.seen)
        # Of the newest norm. Not above 1 by a rounding: the root of what is left would be NaN.
        one = jnp.maximum(jnp.asarray(1.0 - decay, norm.dtype), 2.0**-24)
        weight = jnp.minimum(one / gathered(decay, seen, norm.dtype), 1.0)
        if of_squares:  # roots rather than squares, which would leave the range of f32 for good
            mean = jnp.hypot(jnp.sqrt(1 - weight) * state.mean, jnp.sqrt(weight) * norm)
        else:
            mean = jnp.where(weight == 1, norm, state.mean + weight * (norm - state.mean))
        return mean, AverageState(seen, mean)

    return rule_of(init, update)

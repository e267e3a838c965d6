"""Bounds for single weights. Each clip changes the update, so that `optax.apply_updates` puts the weight inside."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optax_clip._engine import checks, mesh
from optax_clip._engine.leaves import keystr, wide, widest
from optax_clip._engine.numbers import cast
from optax_clip._engine.sums import pmax
from optax_clip.clips.values import entrywise, with_magnitude
from optax_clip.weights.projections import landing, on_weights, step_to, weights_of, widened


def clip_weights(max_value: Any) -> optax.GradientTransformationExtraArgs:
    """Keeps every weight in [-max_value, max_value]; a complex one within that magnitude. Goes last in a chain.

    updates ← min(max(updates, -max_value - params), max_value - params), each bound rounded toward the inside

    Args:
      max_value: largest magnitude of a weight, >= 0: a number, a scalar array (traced too), an Optax schedule, None for
        no bound, or a prefix tree of these.

    Returns:
      A transformation with the state `ValueClipState`: i32[]. Where no bound is a schedule, `update` takes an empty
      state too. `update` needs `params`.

    Raises:
      ValueError: `max_value` is negative, NaN or not a scalar, or the tree does not fit; params are missing.
      TypeError: an argument is of the wrong kind.

    Guarantees:
      Once inside, never outside, by not even a rounding: if abs(w) <= max_value before the step, then also after
      `optax.apply_updates`, in f16, bf16, f32, f64 and mixtures of them. A weight outside is inside after one step if
      abs(w) <= max_value / eps of the dtype of the updates. Updates keep their dtype, and their bits where they end
      inside. A clipped weight lands on the bound, or below by at most a rounding of the update. A weight that is
      complex or of 8 bits may be outside by a few eps of the old weight. A NaN stays NaN, and a weight of inf becomes
      NaN: no update can bring it back. An update of inf lands on the bound.

    Example:
      >>> tx = clip_weights(1.0)
      >>> weights = jnp.array([0.75, 0.0])
      >>> updates, _ = tx.update(jnp.array([0.5, 0.5]), tx.init(weights), weights)
      >>> print(updates, optax.apply_updates(weights, updates))
      [0.25 0.5 ] [1.  0.5]

    References:
      Arjovsky, Chintala, Bottou, Wasserstein GAN, 2017, arXiv 1701.07875 (0.01). With clipped gradients: arXiv
      2407.01704.
    """
    weights = lambda updates, params: zip(weights_of(updates, params))
    return entrywise(_held, {"max_value": max_value}, low=0, beside=weights)


def prune_weights(threshold: Any) -> optax.GradientTransformationExtraArgs:
    """Sets every weight to 0 whose magnitude is at most `threshold`. Goes last in a chain.

    updates ← -params where |params + updates| <= threshold;  else as they are

    Args:
      threshold: largest magnitude of a weight that becomes 0, >= 0, as `max_value` of `clip_weights`.

    Returns:
      A transformation with the state `ValueClipState`, as `clip_weights`.

    Raises:
      ValueError: `threshold` is negative, NaN or not a scalar, or the tree does not fit; params are missing.
      TypeError: an argument is of the wrong kind.

    Guarantees:
      After `optax.apply_updates` a weight is 0 or its magnitude is above the threshold, to a rounding of the sum. A
      pruned weight is exactly 0 where its update has the dtype of the parameter. Updates keep their dtype, and other
      updates stay bit-identical. A weight of 0 is pruned again until one update takes it above the threshold.

    Example:
      >>> tx = prune_weights(0.1)
      >>> weights = jnp.array([0.3, 0.5])
      >>> updates, _ = tx.update(jnp.array([-0.25, -0.25]), tx.init(weights), weights)
      >>> print(optax.apply_updates(weights, updates))
      [0.   0.25]

    References:
      Han, Pool, Tran, Dally, Learning both weights and connections for efficient neural networks, 2015, arXiv
      1506.02626, who prune once trained; here in every step.
    """

    def pruned(weight, limit):
        limit = cast(limit, weight.real.dtype)
        kept = jnp.where(jnp.abs(weight) <= limit, 0, weight)
        return jnp.where(jnp.isnan(limit), limit.astype(weight.dtype), kept)

    return on_weights(*entrywise(pruned, {"threshold": threshold}, low=0))


def rescale_weights(low: Any, high: Any, *, axis_name: Any = None) -> optax.GradientTransformationExtraArgs:
    """Maps the weights of each leaf linearly to [low, high], smallest to largest. Goes last in a chain.

    updates_i ← low + (high - low) · (w_i - min w_i) / (max w_i - min w_i) - params_i,  w = params + updates

    Args:
      low: where the smallest weight of a leaf goes, and all of a constant leaf: a number, a scalar array (traced too),
        an Optax schedule, None to leave the leaf alone, or a prefix tree of these. Biases, which are often constant,
        are better left alone.
      high: where the largest goes, >= low, likewise; required.
      axis_name: as for `clip_by_leaf_norm`.

    Returns:
      A transformation with the state `ValueClipState`, as `clip_weights`.

    Raises:
      ValueError: a bound is NaN, infinite or not a scalar, low > high, or a tree does not fit; params are missing.
      TypeError: a bound is of the wrong kind, or a leaf is complex.

    Guarantees:
      After `optax.apply_updates` weights lie in [low, high] to a few eps of the old or the new weight, the larger one,
      in the coarser dtype of updates and parameters. A weight that is not finite makes its leaf NaN. Updates keep their
      dtype.

    Example:
      >>> tx = rescale_weights(-1.0, 1.0)
      >>> weights = jnp.array([1.0, 2.0, 5.0])
      >>> updates, _ = tx.update(jnp.zeros(3), tx.init(weights), weights)
      >>> print(optax.apply_updates(weights, updates))
      [-1.  -0.5  1. ]

    References:
      Min-max normalization, as scikit-learn's `minmax_scale`.
    """
    bounds = {"low": low, "high": high}
    for name, bound in bounds.items():
        for value in jax.tree.leaves(bound):
            if checks.is_real(value) and jnp.shape(value) == () and np.isinf(checks.concrete(value) or 0.0):
                raise ValueError(f"{name} must be finite, got {value}. Pass a number, or None to leave leaves alone.")

    def places(weights, _):
        return zip(mesh.names_for(axis_name, weights), [path for path, _ in jax.tree.leaves_with_path(weights)])

    return on_weights(*entrywise(_rescaled, bounds, beside=places))


def _held(update: jax.Array, weight: Any, limit: Any) -> jax.Array:
    there, start, weight = landing(update, weight), widened(weight, update)[0], jnp.asarray(weight)
    if jnp.iscomplexobj(there) or min(x.dtype.itemsize for x in (update, weight)) < 2:
        return step_to(with_magnitude(there, None, limit), update, weight)
    limit = _room(jnp.zeros_like(start), _at_most(limit, there.dtype), weight.dtype).astype(there.dtype)
    # The update is bounded, not the landing: every rounding of a sum is monotone, so no way to add passes the bound.
    return jnp.clip(update, -_room(-start, limit, update.dtype), _room(start, limit, update.dtype))


def _at_most(limit: Any, dtype: Any) -> jax.Array:
    """The limit in this dtype, f32 or f64, or a number below it by a rounding; a traced one in a wider dtype, too."""
    if isinstance(limit, jax.Array):
        return limit.astype(widest([wide(limit), dtype]))
    near = cast(limit, dtype)
    return jnp.asarray(near if float(near) <= float(limit) else np.nextafter(near, np.zeros_like(near)))


def _room(weight: jax.Array, limit: jax.Array, dtype: Any) -> jax.Array:
    """A number of the dtype that takes the weight to the limit, or less by a rounding."""
    room = _rounded(limit - weight, dtype)
    less = _neighbor(room.astype(dtype), jnp.asarray(jnp.finfo(dtype).min, dtype))
    return jnp.where(weight + room > limit, less, room.astype(dtype))


@jax.custom_jvp  # JAX 0.10.2 has no derivative for it
def _neighbor(x: jax.Array, toward: jax.Array) -> jax.Array:
    return jnp.nextafter(x, toward)


_neighbor.defjvps(lambda dx, next, x, toward: dx, None)


def _rounded(x: jax.Array, dtype: Any) -> jax.Array:
    """The nearest number of a narrower dtype. A compiler may leave out a conversion there and back, but not this."""
    narrow = jnp.finfo(dtype)
    near = jax.lax.reduce_precision(x, narrow.nexp, narrow.nmant)
    if dtype != jnp.float16:
        return near
    # For which numbers below the normal ones are 0.
    unit = float(narrow.smallest_subnormal)
    return jnp.where(jnp.abs(x) < float(narrow.smallest_normal), jnp.round(x * (1 / unit)) * unit, near)


def _rescaled(weight: jax.Array, axis_name: Any, path: tuple, low: Any, high: Any) -> jax.Array:
    if not weight.size or low is None or high is None:
        return weight
    if jnp.iscomplexobj(weight):
        raise TypeError(
            f"params must be real, got {weight.dtype} at {keystr(path)}. Pass None as low there, or use optax.masked."
        )
    low, high = (cast(bound, weight.dtype) for bound in (low, high))
    extremes = [jnp.max(-weight), jnp.max(weight)]
    if names := mesh.summed_over([weight], [axis_name], [path], units=False)[0]:
        # Maxima over devices may lose a NaN. An inf is as loud.
        extremes = pmax([jnp.where(jnp.isnan(extreme), jnp.inf, extreme) for extreme in extremes], names)
    # An eighth, so that differences of large numbers, and the reciprocals by which XLA multiplies, stay in range.
    smallest, largest = extremes[0] * -0.125, extremes[1] * 0.125
    span = largest - smallest
    share = jnp.where(span == 0, 0.0, (weight * 0.125 - smallest) / jnp.where(span == 0, 1.0, span))
    return jnp.clip(low * (1 - share) + high * share, low, high) + (span - span)

"""Clips of the weights. Each changes the update, so that `optax.apply_updates` puts the weights where they belong."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from optax_clip import _checks
from optax_clip._blocks import parts
from optax_clip._clip_by_norm import ClipState
from optax_clip._landing import count_at_bound, count_zeros, entrywise, held, on_weights, pruned
from optax_clip._norm_clips import unit_clip
from optax_clip._reductions import pmax
from optax_clip._thresholds import cast
from optax_clip._values import ValueClipState, check_bounds, first_step, next_step, pairs_at


def clip_weights(max_value: Any) -> optax.GradientTransformationExtraArgs:
    """Keeps every weight in [-max_value, max_value]; a complex one within that magnitude. Goes last in a chain.

    updates ← min(max(params + updates, -max_value), max_value) - params

    Args:
      max_value: largest magnitude of a weight, >= 0: a number, a scalar array (traced too), an Optax schedule, None for
        no bound, or a prefix tree of these.

    Returns:
      A transformation with the state `WeightState`: i32[], and in `touched` f32[] the share of the weights on the
      bound after the step, to 1e-6 of it (NaN where a weight is; where types of a mesh do not tell, of this device's
      part). `update` needs `params`; the updates are f32 at least, which
      `optax.apply_updates` takes.

    Raises:
      ValueError: `max_value` is negative, NaN or not a scalar, or the tree does not fit; params are missing.
      TypeError: an argument is of the wrong kind.

    Guarantees:
      After `optax.apply_updates` no real weight lies outside, by not even a rounding, for any size of weights and
      updates in f16, bf16, f32 and f64; complex ones by a few eps of the old weight at most. Updates that end inside
      are bit-identical, but for those that end within a few roundings of the bound. A weight 2^22 times the bound or
      more may go to 0 first. A NaN stays NaN, and so does a weight of inf, which no update can bring back.

    Example:
      >>> tx = clip_weights(1.0)
      >>> weights = jnp.array([0.9, 0.0])
      >>> updates, state = tx.update(jnp.array([0.5, 0.5]), tx.init(weights), weights)
      >>> print(optax.apply_updates(weights, updates), state.touched)
      [1.  0.5] 0.5

    References:
      Arjovsky, Chintala, Bottou, Wasserstein GAN, 2017, arXiv 1701.07875 (0.01). With clipped gradients: arXiv
      2407.01704.
    """
    return entrywise(max_value, held, count_at_bound, caller="clip_weights", name="max_value")


def prune_weights(threshold: Any) -> optax.GradientTransformationExtraArgs:
    """Sets every weight to 0 whose magnitude is at most `threshold`. Goes last in a chain.

    updates ← -params where |params + updates| <= threshold;  else as they are

    Args:
      threshold: largest magnitude of a weight that becomes 0, >= 0, as `max_value` of `clip_weights`.

    Returns:
      A transformation with the state `WeightState`: i32[], and in `touched` f32[] the share of the weights that are 0
      after the step. `update` needs `params`; the updates are f32 at least, which `optax.apply_updates` takes.

    Raises:
      ValueError: `threshold` is negative, NaN or not a scalar, or the tree does not fit; params are missing.
      TypeError: an argument is of the wrong kind.

    Guarantees:
      After `optax.apply_updates` a real weight is 0 or its magnitude is above the threshold, by exact comparison in
      the dtype of the parameters. Other updates are bit-identical, but for those that end within a few roundings of
      the threshold. A weight of 0 is pruned again until one update takes it above the threshold.

    Example:
      >>> tx = prune_weights(0.1)
      >>> weights = jnp.array([0.3, 0.5])
      >>> updates, state = tx.update(jnp.array([-0.25, -0.25]), tx.init(weights), weights)
      >>> print(optax.apply_updates(weights, updates), state.touched)
      [0.   0.25] 0.5

    References:
      Han, Pool, Tran, Dally, Learning both weights and connections for efficient neural networks, 2015, arXiv
      1506.02626, who prune once trained; here in every step.
    """
    return entrywise(threshold, pruned, count_zeros, caller="prune_weights", name="threshold")


def clip_weight_norm(
    max_norm: Any,
    axis: Any = None,
    *,
    ord: float | None = None,
    axis_name: Any = None,
    response: Callable | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Keeps the norm of each unit of the weights at `max_norm` or below: the max-norm constraint. Last in a chain.

    updates_u ← w_u · min(1, max_norm / norm(w_u)) - params_u,  w = params + updates

    This is `clip_by_unit_norm` of the weights.

    Args:
      max_norm: largest norm of a unit, >= 0, as for `clip_by_unit_norm`.
      axis: the axes that a unit extends over, as for `clip_by_unit_norm`: None for the rule by rank, by which vectors
        and matrices of one row are one unit; an int, a tuple, or a rule(path, leaf), where None leaves the leaf alone.
      ord: order of the norm, >= 1 or inf; None is 2.
      axis_name: as for `clip_by_unit_norm`.
      response: None for `shrink`; `normalize` holds each unit at `max_norm`: weight normalization.

    Returns:
      A transformation with the state `ClipState`, of the norms of the weights. `update` needs `params`; the updates
      are f32 at least, which `optax.apply_updates` takes.

    Raises:
      ValueError: a threshold is negative, NaN or not a scalar; an axis is out of range; `axis_name` or params are
        missing.
      TypeError: an argument is of the wrong kind.

    Guarantees:
      After `optax.apply_updates` norms are at most `max_norm`, and units below land where they would have landed, to a
      few eps of the old or the new weights, the larger ones.

    Example:
      >>> tx = clip_weight_norm(5.0)
      >>> weights = jnp.array([[6.0, 0.5], [8.0, 0.25]])
      >>> updates, _ = tx.update(jnp.zeros((2, 2)), tx.init(weights), weights)
      >>> print(optax.apply_updates(weights, updates))
      [[3.   0.5 ]
       [4.   0.25]]

    References:
      Srebro, Shraibman, Rank, trace-norm and max-norm, 2005; Hinton and others, 2012, arXiv 1207.0580. Keras'
      `max_norm` constraint and, with `normalize`, `unit_norm`.
    """
    caller = "clip_weight_norm"
    clip = unit_clip(max_norm, axis, ord, axis_name, response, caller=caller)
    return on_weights(clip.init, clip.update, ClipState, caller=caller)


def rescale_weights(low: Any = 0.0, high: Any = 1.0, *, axis_name: Any = None) -> optax.GradientTransformationExtraArgs:
    """Maps the weights of each leaf linearly to [low, high], smallest to largest. Goes last in a chain.

    updates_i ← low + (high - low) · (w_i - min w_i) / (max w_i - min w_i) - params_i,  w = params + updates

    Args:
      low: where the smallest weight of a leaf goes, and all of a constant leaf: a number, a scalar array (traced too),
        an Optax schedule, None to leave the leaf alone, or a prefix tree of these. Biases, which are often constant,
        are better left alone.
      high: where the largest goes, >= low, likewise.
      axis_name: as for `clip_by_leaf_norm`.

    Returns:
      A transformation with the state `ValueClipState`: i32[]. `update` needs `params`; the updates are f32 at least,
      which `optax.apply_updates` takes.

    Raises:
      ValueError: a bound is NaN or not a scalar, low > high, or a tree does not fit; params are missing.
      TypeError: a bound is of the wrong kind, or a leaf is complex.

    Guarantees:
      After `optax.apply_updates` weights lie in [low, high] to a few eps of the old or the new weight, the larger one.
      A weight that is not finite makes its leaf NaN.

    Example:
      >>> tx = rescale_weights(-1.0, 1.0)
      >>> weights = jnp.array([1.0, 2.0, 5.0])
      >>> updates, _ = tx.update(jnp.zeros(3), tx.init(weights), weights)
      >>> print(optax.apply_updates(weights, updates))
      [-1.  -0.5  1. ]

    References:
      Min-max normalization, as scikit-learn's `minmax_scale`.
    """
    caller, names = "rescale_weights", ("low", "high")
    for name, bound in zip(names, (low, high)):
        check_bounds(bound, caller=caller, name=name)
        for value in jax.tree.leaves(bound, is_leaf=_checks.is_function):
            known = None if _checks.is_function(value) else _checks.concrete(value)
            if known is not None and math.isinf(known):
                raise ValueError(
                    f"{caller}: {name} must be finite, got {known}. Pass a number, or None to leave leaves alone."
                )
    _checks.ordered(low, high, caller=caller, low=names[0], high=names[1])

    def project(weights, state, params):
        del params
        bounds = pairs_at(state.step, (low, high), weights, caller=caller, names=names)
        leaves = parts(weights, axis_name, caller=caller)
        rescaled = [_rescaled(part.value, part.mesh_axes, *pair) for part, pair in zip(leaves, bounds) if part]
        return jax.tree.structure(weights).unflatten(rescaled), next_step(state)

    return on_weights(first_step, project, ValueClipState, caller=caller)


def project_weights(projection: Callable[[Any], Any]) -> optax.GradientTransformationExtraArgs:
    """Projects the weights onto a set, by any function of `optax.projections`. Goes last in a chain.

    updates ← projection(params + updates) - params

    Args:
      projection: from the tree of weights to a tree like it: `optax.projections.projection_non_negative`, or
        `functools.partial(optax.projections.projection_l2_ball, scale=3.0)`. It sees floating and complex leaves, in
        f32 at least, and None for others.

    Returns:
      A transformation with the state `ValueClipState`: i32[]. `update` needs `params`; the updates are f32 at least,
      which `optax.apply_updates` takes.

    Raises:
      ValueError: params are missing, or the projection returns another structure or other shapes.
      TypeError: `projection` is not a function.

    Guarantees:
      After `optax.apply_updates` weights are projected to a few eps of the old or the new weight, the larger one.

    Example:
      >>> tx = project_weights(optax.projections.projection_non_negative)
      >>> weights = jnp.array([0.5, 2.0])
      >>> updates, _ = tx.update(jnp.array([-1.0, -1.0]), tx.init(weights), weights)
      >>> print(optax.apply_updates(weights, updates))
      [0. 1.]

    References:
      Projected gradient descent; `optax.projections`.
    """
    caller = "project_weights"
    _checks.function(projection, caller=caller, name="projection", example="optax.projections.projection_non_negative")

    def project(weights, state, params):
        del params
        projected = jax.tree.map(jnp.asarray, projection(weights))
        if jax.tree.map(jnp.shape, projected) != jax.tree.map(jnp.shape, weights):
            raise ValueError(
                f"{caller}: projection must return a tree like that of the weights, got shapes "
                f"{jax.tree.map(jnp.shape, projected)} for {jax.tree.map(jnp.shape, weights)}. "
                "Use a function of optax.projections, or one that keeps structure and shapes."
            )
        return projected, next_step(state)

    return on_weights(first_step, project, ValueClipState, caller=caller)


def _extremes(x: jax.Array) -> list[jax.Array]:
    """The largest of -x and of x."""

    def at_once(x):
        lowest = jnp.full([], -jnp.inf, x.dtype)
        larger = lambda a, b: (jnp.maximum(a[0], b[0]), jnp.maximum(a[1], b[1]))
        return list(jax.lax.reduce((-x, x), (lowest, lowest), larger, range(x.ndim)))

    return jax.lax.platform_dependent(x, cuda=at_once, rocm=at_once, default=lambda x: [-jnp.min(x), jnp.max(x)])


def _rescaled(x: jax.Array, mesh_axes: tuple[str, ...], low: Any, high: Any) -> jax.Array:
    if not x.size or low is None or high is None:
        return x
    if jnp.iscomplexobj(x):
        raise TypeError(
            f"rescale_weights: weights must be real, got a leaf of {x.dtype}. Complex numbers have no order. "
            "Pass None as low for this leaf, or use optax.masked."
        )
    low, high = (cast(bound, x.dtype) for bound in (low, high))
    # Maxima over devices may lose a NaN; inf is as loud.
    extremes = [jnp.where(jnp.isnan(extreme), jnp.inf, extreme) for extreme in _extremes(x)]
    smallest, largest = pmax(extremes, mesh_axes) if mesh_axes else extremes
    # An eighth, so that differences of large numbers, and the reciprocals by which XLA multiplies, are normal numbers.
    smallest, largest = -smallest * 0.125, largest * 0.125
    span = largest - smallest
    constant = span == 0
    share = jnp.where(constant, 0.0, (x * 0.125 - smallest) / jnp.where(constant, 1.0, span))
    target = jnp.clip(low * (1 - share) + high * share, low, high)
    return jnp.where(jnp.isfinite(span), target, jnp.nan)

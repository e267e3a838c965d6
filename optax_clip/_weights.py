"""Clips of the weights. Each changes the update, so that `optax.apply_updates` puts the weights where they belong."""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optax_clip import _checks
from optax_clip._blocks import is_counted, parts, varying, wide
from optax_clip._clip_by_norm import norm_clip
from optax_clip._norm_clips import with_ord
from optax_clip._norms import unit_norm
from optax_clip._packing import ones_apart
from optax_clip._reductions import pmax, total
from optax_clip._thresholds import cast
from optax_clip._values import bounds_at, check_bounds, first_step, next_step, pairs_at, within_disc


class WeightState(NamedTuple):
    """Where the last step left the weights. Read it with `clip_metrics`."""

    step: jax.Array  # i32[]: updates so far, saturates
    touched: jax.Array  # f32[]: share of the weights that are now on the bound, or 0


def clip_weights(max_value: Any) -> optax.GradientTransformationExtraArgs:
    """Keeps every weight in [-max_value, max_value]; a complex one within that magnitude. Goes last in a chain.

    updates ← min(max(params + updates, -max_value), max_value) - params

    Args:
      max_value: largest magnitude of a weight, >= 0: a number, a scalar array (traced too), an Optax schedule, None for
        no bound, or a prefix tree of these.

    Returns:
      A transformation with the state `WeightState`: i32[], and in `touched` f32[] the share of the weights on the
      bound after the step, to 1e-6 of it. `update` needs `params`; the updates are f32 at least, which
      `optax.apply_updates` takes.

    Raises:
      ValueError: `max_value` is negative, NaN or not a scalar, or the tree does not fit; params are missing.
      TypeError: an argument is of the wrong kind.

    Guarantees:
      After `optax.apply_updates` no real weight lies outside, by not even a rounding, for any size of weights and
      updates and every dtype of the parameters; complex ones by a few eps at most. Updates that end inside are
      bit-identical, but for those that end within a few roundings of the bound. A weight 2^22 times the bound or more
      may go to 0 first. A NaN stays NaN, and so does a weight of inf, which no update can bring back.

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
    return _entrywise(max_value, _held, _count_at_bound, caller="clip_weights", name="max_value")


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
    return _entrywise(threshold, _pruned, _count_zeros, caller="prune_weights", name="threshold")


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
      After `optax.apply_updates` norms are at most `max_norm` to a few eps of the parameters' dtype. Units below land
      where they would have landed, to one rounding.

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
    norm = functools.partial(with_ord(unit_norm, ord, axis_name, caller), axis=_checks.axis(axis, caller=caller))
    clip = norm_clip(norm, max_norm, response, caller=caller, name="max_norm")
    return _on_weights(clip.init, lambda weights, state: clip.update(weights, state), caller=caller)


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
    _checks.ordered(low, high, caller=caller, low=names[0], high=names[1])

    def project(weights, state):
        bounds = pairs_at(state.step, (low, high), weights, caller=caller, names=names)
        leaves = parts(weights, axis_name, caller=caller)
        rescaled = [_rescaled(part.value, part.mesh_axes, *pair) for part, pair in zip(leaves, bounds) if part]
        return jax.tree.structure(weights).unflatten(rescaled), next_step(state)

    return _on_weights(first_step, project, caller=caller)


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

    def project(weights, state):
        projected = projection(weights)
        if jax.tree.map(jnp.shape, projected) != jax.tree.map(jnp.shape, weights):
            raise ValueError(
                f"{caller}: projection must return a tree like that of the weights, got shapes "
                f"{jax.tree.map(jnp.shape, projected)} for {jax.tree.map(jnp.shape, weights)}. "
                "Use a function of optax.projections, or one that keeps structure and shapes."
            )
        return projected, next_step(state)

    return _on_weights(first_step, project, caller=caller)


def _pairs(updates: Any, params: Any, caller: str) -> tuple[list, Any]:
    """Leaves of the updates with their weights, in f32 or wider, or None for what is no weight."""
    _checks.params_given(params, caller=caller, why="The weights are clipped as they will be after the update.")
    leaves, treedef = jax.tree.flatten(updates)
    pairs = []
    for update, weight in zip(leaves, _checks.params_like(updates, params, caller=caller)):
        if not is_counted(update):
            pairs.append(None)
            continue
        if not is_counted(weight) or jnp.finfo(weight.dtype).bits < 16:
            raise ValueError(
                f"{caller}: params must be floating or complex where the updates are, and of 16 bits at least, got "
                f"{getattr(weight, 'dtype', type(weight))}. Pass the parameters that the updates belong to."
            )
        pairs.append((jnp.asarray(weight), jnp.asarray(update)))
    return pairs, treedef


def _widened(weight: jax.Array, update: jax.Array) -> tuple[jax.Array, jax.Array]:
    dtype = jnp.promote_types(weight.dtype, wide(update))
    dtype = jnp.promote_types(dtype, jnp.complex64) if jnp.iscomplexobj(update) else dtype
    return weight.astype(dtype), update.astype(dtype)


def _on_weights(init: Callable, project: Callable, *, caller: str) -> optax.GradientTransformationExtraArgs:
    """The update that takes the weights to where `project(weights, state)` wants them."""

    def update_fn(updates, state, params=None, **extra_args):
        del extra_args
        pairs, treedef = _pairs(updates, params, caller)
        wide_pairs = [pair and _widened(*pair) for pair in pairs]
        landing = [pair and pair[0] + pair[1] for pair in wide_pairs]
        projected, state = project(treedef.unflatten(landing), state)
        targets = iter(jax.tree.leaves(projected))
        # From the landing alone: XLA's CPU backend writes out what two kernels need, and would do so for updates too.
        new = [
            leaf if pair is None or (target := next(targets)) is x else target.astype(x.dtype) - pair[0]
            for leaf, pair, x in zip(jax.tree.leaves(updates), wide_pairs, landing)
        ]
        return treedef.unflatten(new), state

    return optax.GradientTransformationExtraArgs(init, update_fn)


def _entrywise(
    bound: Any, hold: Callable, count: Callable, *, caller: str, name: str
) -> optax.GradientTransformationExtraArgs:
    """The update `hold(weight, update, bound)` for each leaf, and the share that `count` finds."""
    check_bounds(bound, caller=caller, name=name, low=0.0)

    def init_fn(params):
        del params
        return WeightState(jnp.zeros([], jnp.int32), jnp.zeros([], jnp.float32))

    def update_fn(updates, state, params=None, **extra_args):
        del extra_args
        pairs, treedef = _pairs(updates, params, caller)
        bounds = bounds_at(state.step, bound, updates, caller=caller, name=name, low=0.0)
        new, landed = [], []
        for leaf, pair, limit in zip(jax.tree.leaves(updates), pairs, bounds):
            if pair is None or limit is None:
                new.append(leaf)
                continue
            weight, update = _widened(*pair)
            limit = _at_most(limit, pair[0].real.dtype)
            new.append(hold(weight, update, limit))
            # What the user's own call computes: XLA sees that it is the same, and reads it where it was written.
            landed.append((optax.apply_updates(pair[0], new[-1]), limit))
        step = jnp.asarray(optax.safe_increment(state.step))
        return treedef.unflatten(new), WeightState(step, _share(state.step, landed, count))

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _held(weight: jax.Array, update: jax.Array, limit: jax.Array) -> jax.Array:
    limit = limit.astype(weight.real.dtype)
    landing = weight + update
    if jnp.iscomplexobj(weight):
        target = within_disc(landing, -limit, limit)
        return jnp.where(jnp.abs(landing) <= limit, update, target - weight)
    # A compiler may join the product in which many updates end with the sum, and round once: so what is close to the
    # limit takes the other way too, where there are only sums.
    target = jnp.clip(landing, -limit, limit)
    step = target - weight
    # By a rounding of the step less, where the sum is rounded to outside.
    shorter = step - jnp.copysign(jnp.abs(step) * float(jnp.finfo(step.dtype).eps), target)
    inside = [jnp.abs(weight + x) <= limit for x in (step, shorter)]
    safe = jnp.where(inside[0], step, jnp.where(inside[1], shorter, -weight))
    safe = jnp.where(jnp.isnan(target), jnp.nan, safe)
    return jnp.where(jnp.abs(landing) + _margin(weight, update) < limit, update, safe)


def _pruned(weight: jax.Array, update: jax.Array, limit: jax.Array) -> jax.Array:
    edge = _last_rounded_to(limit, weight.real.dtype)
    landing = weight + update
    # As in `_held`: close to the edge only sums.
    close = jnp.abs(jnp.abs(landing) - edge) <= _margin(weight, update)
    step = jnp.where(close, landing - weight, update)
    pruned = jnp.where(jnp.abs(weight + step) <= edge, -weight, step)
    return jnp.where(jnp.isnan(limit), jnp.nan, pruned)


def _margin(weight: jax.Array, update: jax.Array) -> jax.Array:
    """More than the sum of the two can be off by."""
    return (jnp.abs(weight) + jnp.abs(update)) * 4 * float(jnp.finfo(weight.dtype).eps)


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
    extremes = [jnp.where(jnp.isnan(extreme), jnp.inf, extreme) for extreme in (-jnp.min(x), jnp.max(x))]
    smallest, largest = pmax(extremes, mesh_axes) if mesh_axes else extremes
    # An eighth, so that differences of large numbers, and the reciprocals by which XLA multiplies, are normal numbers.
    smallest, largest = -smallest * 0.125, largest * 0.125
    span = largest - smallest
    constant = span == 0
    share = jnp.where(constant, 0.0, (x * 0.125 - smallest) / jnp.where(constant, 1.0, span))
    target = jnp.clip(low + share * (high - low), low, high)
    return jnp.where(jnp.isfinite(span), target, jnp.nan)


def _share(step: jax.Array, landed: list, count: Callable) -> jax.Array:
    """What `count` finds in each leaf, as a share of all weights."""
    size = sum(x.size * math.prod(jax.lax.axis_size(name) for name in varying(x)) for x, _ in landed)
    if not size:
        return jnp.zeros([], jnp.float32)
    ones = ones_apart(step, len(landed))
    (counted,) = total([(count(x, limit, one),) for (x, limit), one in zip(landed, ones)])
    return counted / size


def _count_at_bound(x: jax.Array, limit: jax.Array, one: jax.Array) -> jax.Array:
    """How many lie on the bound, by arithmetic: XLA's CPU backend writes out what is compared before it is summed."""
    limit = limit.astype(jnp.float32)
    per_limit = jnp.where(limit > 0, (1 + 2.0**-20) / jnp.where(limit > 0, limit, 1.0), 0.0)
    per_limit = jnp.minimum(per_limit, float(jnp.finfo(jnp.float32).max)) * one
    above = jnp.sum(jnp.floor(jnp.abs(x).astype(jnp.float32) * per_limit))
    return jnp.where(limit == 0, x.size, above)


def _count_zeros(x: jax.Array, limit: jax.Array, one: jax.Array) -> jax.Array:
    return x.size - jnp.sum(jnp.square(jnp.sign(jnp.abs(x).astype(jnp.float32))))


def _at_most(value: Any, dtype: Any) -> jax.Array:
    """The largest number of the dtype that is not above `value` >= 0."""
    info = jnp.finfo(dtype)
    if not isinstance(value, jax.Array):
        known = min(float(value), float(info.max))
        rounded = np.asarray(known).astype(dtype)
        return jnp.asarray(rounded if float(rounded) <= known else np.nextafter(rounded, np.zeros_like(rounded)))
    known = value.astype(jnp.promote_types(value.dtype, wide(jnp.zeros([], dtype))))
    known = jnp.minimum(known, float(info.max))  # keeps NaN
    nearest = known.astype(dtype)
    if nearest.dtype == known.dtype:
        return nearest
    # Not by converting back: a compiler may leave out both conversions.
    up = jax.lax.reduce_precision(known, exponent_bits=info.nexp, mantissa_bits=info.nmant) > known
    tiny = known < 2 * float(info.smallest_normal)  # which that flushes
    return jnp.where(up | tiny, _neighbor(nearest, -1), nearest)


def _neighbor(x: jax.Array, steps: int) -> jax.Array:
    """The next number >= 0 below or above; 0 below 0."""
    integers = jnp.dtype(f"uint{8 * x.dtype.itemsize}")
    bits = jax.lax.bitcast_convert_type(x, integers)
    bits = bits + jnp.asarray(1, integers) if steps > 0 else bits - jnp.minimum(bits, jnp.asarray(1, integers))
    return jax.lax.bitcast_convert_type(bits, x.dtype)


def _last_rounded_to(limit: jax.Array, dtype: Any) -> jax.Array:
    """The largest number of the wider dtype that is rounded to at most `limit`."""
    if limit.dtype == dtype:
        return limit
    above = _neighbor(limit, 1)
    # Numbers in the middle go to the even neighbor.
    middle = (limit.astype(dtype) + above.astype(dtype)) * 0.5
    integers = jax.lax.bitcast_convert_type(limit, jnp.dtype(f"uint{8 * limit.dtype.itemsize}"))
    return jnp.where(integers % 2 == 0, middle, _neighbor(middle, -1))

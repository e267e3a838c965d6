"""Updates after which weights are where they belong, by what `optax.apply_updates` makes of them in each dtype."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optax_clip import _checks
from optax_clip._blocks import is_counted, varying, wide, widest
from optax_clip._packing import ones_apart
from optax_clip._reductions import total
from optax_clip._values import bounds_at, check_bounds, within_disc


class WeightState(NamedTuple):
    """Where the last step left the weights. Read it with `clip_metrics`."""

    step: jax.Array  # i32[]: updates so far, saturates
    touched: jax.Array  # f32[]: share of the weights that are now on the bound, or 0


def entrywise(
    bound: Any, hold: Callable, count: Callable, *, caller: str, name: str
) -> optax.GradientTransformationExtraArgs:
    """The update `hold(weight, update, bound)` for each leaf, and the share that `count` finds."""
    check_bounds(bound, caller=caller, name=name, low=0.0)

    def init_fn(params):
        del params
        return WeightState(jnp.zeros([], jnp.int32), jnp.zeros([], jnp.float32))

    def update_fn(updates, state, params=None, **extra_args):
        del extra_args
        _checks.state(state, WeightState, caller=caller)
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
            # What `optax.apply_updates` computes, without promotion: XLA sees that it is the same, and reads it where
            # it was written.
            landed.append(((weight + new[-1]).astype(pair[0].dtype), limit))
        step = jnp.asarray(optax.safe_increment(state.step))
        return treedef.unflatten(new), WeightState(step, _share(state.step, landed, count))

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def on_weights(init: Callable, project: Callable, kind: type, *, caller: str) -> optax.GradientTransformationExtraArgs:
    """The update that takes the weights to where `project(weights, state, params)` wants them, its state a `kind`."""

    def update_fn(updates, state, params=None, **extra_args):
        del extra_args
        _checks.state(state, kind, caller=caller)
        pairs, treedef = _pairs(updates, params, caller)
        wide_pairs = [pair and _widened(*pair) for pair in pairs]
        landing = [pair and pair[0] + pair[1] for pair in wide_pairs]
        projected, state = project(treedef.unflatten(landing), state, params)
        targets = iter(jax.tree.leaves(projected))
        # From the landing alone: XLA's CPU backend writes out what two kernels need, and would do so for updates too.
        new = [
            leaf if pair is None or (target := next(targets)) is x else jnp.asarray(target, x.dtype) - pair[0]
            for leaf, pair, x in zip(jax.tree.leaves(updates), wide_pairs, landing)
        ]
        return treedef.unflatten(new), state

    return optax.GradientTransformationExtraArgs(init, update_fn)


def _pairs(updates: Any, params: Any, caller: str) -> tuple[list, Any]:
    """The weight and the update of each leaf, or None where the update is no number to clip by."""
    _checks.params_given(params, caller=caller, why="The weights are clipped as they will be after the update.")
    leaves, treedef = jax.tree.flatten(updates)
    pairs = []
    for update, weight in zip(leaves, _checks.params_like(updates, params, caller=caller)):
        if not is_counted(update):
            pairs.append(None)
            continue
        if not is_counted(weight) or jnp.finfo(jnp.asarray(weight).dtype).bits < 16:
            raise ValueError(
                f"{caller}: params must be floating or complex where the updates are, and of 16 bits at least, got "
                f"{getattr(weight, 'dtype', type(weight))}. Pass the parameters that the updates belong to."
            )
        pairs.append((jnp.asarray(weight), jnp.asarray(update)))
    return pairs, treedef


def _widened(weight: jax.Array, update: jax.Array) -> tuple[jax.Array, jax.Array]:
    double = jnp.float64 in (wide(weight), wide(update))
    if jnp.iscomplexobj(weight) or jnp.iscomplexobj(update):
        dtype = jnp.complex128 if double else jnp.complex64
    else:
        dtype = jnp.float64 if double else jnp.float32
    return weight.astype(dtype), update.astype(dtype)


def held(weight: jax.Array, update: jax.Array, limit: jax.Array) -> jax.Array:
    """The update after which the weight is within ±limit."""
    limit = limit.astype(weight.real.dtype)
    landing = weight + update
    if jnp.iscomplexobj(weight):
        target = within_disc(landing, -limit, limit)
        return jnp.where(jnp.abs(landing) <= limit, update, target - weight)
    # A compiler may join the product in which many updates end with the sum, and round once: so what is close to the
    # limit takes the other way too, where there are only sums.
    target = jnp.clip(landing, -limit, limit)
    step = target - weight
    # By a rounding of the step less, where the sum is rounded to outside; by all, where that is not enough.
    rounding = jnp.abs(step) * float(jnp.finfo(step.dtype).eps)
    shorter = step - jnp.where(target > 0, rounding, -rounding)
    step = jnp.where(jnp.abs(weight + step) <= limit, step, shorter)
    step = jnp.where(jnp.abs(weight + step) > limit, -weight, step)  # keeps NaN
    return jnp.where(jnp.abs(landing) + _margin(weight, update) < limit, update, step)


def pruned(weight: jax.Array, update: jax.Array, limit: jax.Array) -> jax.Array:
    """The update after which the weight is 0 or of a magnitude above the limit."""
    edge = _last_rounded_to(limit, weight.real.dtype)
    landing = weight + update
    # As in `held`: close to the edge only sums.
    close = jnp.abs(jnp.abs(landing) - edge) <= _margin(weight, update)
    step = jnp.where(close, landing - weight, update)
    step = jnp.where(jnp.abs(weight + step) <= edge, -weight, step)
    return jnp.where(jnp.isnan(limit), jnp.nan, step)


def _margin(weight: jax.Array, update: jax.Array) -> jax.Array:
    """More than the sum of the two can be off by."""
    return (jnp.abs(weight) + jnp.abs(update)) * 4 * float(jnp.finfo(weight.dtype).eps)


def _at_most(value: Any, dtype: Any) -> jax.Array:
    """The largest number of the dtype that is not above `value` >= 0."""
    info = jnp.finfo(dtype)
    if not isinstance(value, jax.Array):
        known = min(float(value), float(info.max))
        rounded = np.asarray(known).astype(dtype)
        return jnp.asarray(rounded if float(rounded) <= known else np.nextafter(rounded, np.zeros_like(rounded)))
    known = value.astype(widest([value.dtype, wide(jnp.zeros([], dtype))]))
    known = jnp.minimum(known, float(info.max))  # keeps NaN
    nearest = known.astype(dtype)
    if nearest.dtype == known.dtype:
        return nearest
    return jnp.where(rounded_to(known, dtype) > known, _neighbor(nearest, above=False), nearest)


def rounded_to(x: jax.Array, dtype: Any) -> jax.Array:
    """The nearest number of a narrower dtype that holds it: compilers may leave out converting there and back."""
    info, own = jnp.finfo(dtype), jnp.finfo(x.dtype)
    rounded = jax.lax.reduce_precision(x, own.nexp, info.nmant)
    if info.nexp == own.nexp:
        return rounded
    # Subnormal numbers are multiples of the smallest.
    smallest = float(info.smallest_subnormal)
    tiny = jnp.abs(x) < float(info.smallest_normal)
    return jnp.where(tiny, jnp.round(jnp.where(tiny, x, 0.0) * (1 / smallest)) * smallest, rounded)


def _neighbor(x: jax.Array, *, above: bool) -> jax.Array:
    """The next number >= 0 below or above; 0 below 0."""
    integers = jnp.dtype(f"uint{8 * x.dtype.itemsize}")
    bits = jax.lax.bitcast_convert_type(x, integers)
    bits = bits + 1 if above else bits - jnp.minimum(bits, 1)
    return jax.lax.bitcast_convert_type(bits, x.dtype)


def _last_rounded_to(limit: jax.Array, dtype: Any) -> jax.Array:
    """The largest number of the wider dtype that is rounded to at most `limit`."""
    if limit.dtype == dtype:
        return limit
    above = _neighbor(limit, above=True)
    # Numbers in the middle go to the even neighbor.
    middle = (limit.astype(dtype) + above.astype(dtype)) * 0.5
    integers = jax.lax.bitcast_convert_type(limit, jnp.dtype(f"uint{8 * limit.dtype.itemsize}"))
    return jnp.where(integers % 2 == 0, middle, _neighbor(middle, above=False))


def _share(step: jax.Array, landed: list, count: Callable) -> jax.Array:
    """What `count` finds in each leaf, as a share of all weights."""
    size = sum(x.size * math.prod(jax.lax.axis_size(name) for name in varying(x)) for x, _ in landed)
    if not size:
        return jnp.zeros([], jnp.float32)
    ones = ones_apart(step, len(landed))
    (counted,) = total([(count(x, limit, one),) for (x, limit), one in zip(landed, ones)])
    return counted / size


def count_at_bound(x: jax.Array, limit: jax.Array, one: jax.Array) -> jax.Array:
    """How many lie on the bound, by arithmetic: XLA's CPU backend writes out what is compared before it is summed."""
    limit = limit.astype(jnp.float32)
    per_limit = jnp.where(limit > 0, (1 + 2.0**-20) / jnp.where(limit > 0, limit, 1.0), 0.0)
    per_limit = jnp.minimum(per_limit, float(jnp.finfo(jnp.float32).max)) * one
    above = jnp.sum(jnp.floor(jnp.abs(x).astype(jnp.float32) * per_limit))
    return jnp.where(limit == 0, x.size, above)


def count_zeros(x: jax.Array, limit: jax.Array, one: jax.Array) -> jax.Array:
    x = jnp.abs(x) if jnp.iscomplexobj(x) else x
    return x.size - jnp.sum(jnp.abs(jnp.sign(x.astype(jnp.float32))))

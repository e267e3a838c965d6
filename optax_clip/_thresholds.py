"""What a norm is compared with: the only part of a clip that keeps a state."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_clip import _checks


class Threshold(NamedTuple):
    """A threshold rule: a pair of functions over a flat tuple of blocks, as an Optax transformation is over a tree.

    `init(norms) -> state` sees the norms of the parameters' blocks, for their shapes, dtypes and shardings.
    `update(norms, state, params) -> (thresholds, state)` returns one threshold a block, of its norm's dtype, a scalar
    or of its norm's shape. States hold arrays only and keep structure and dtypes. With `needs_params`, `params` is the
    tree of the parameters of these blocks, and the clip raises where its caller gives none; without, it is None.

    A threshold below 0 acts as 0; inf leaves the block alone; NaN makes it NaN.

    Example:
      >>> def halve(norms, state, params):
      ...     return tuple(norm / 2 for norm in norms), state
      >>> tx = clip_by_norm(global_norm, Threshold(init=lambda norms: (), update=halve))
      >>> updates, _ = tx.update(jnp.array([3.0, 4.0]), tx.init(jnp.zeros(2)))
      >>> print(updates)
      [1.5 2. ]
    """

    init: Callable[[tuple], Any]
    update: Callable[[tuple, Any, Any], tuple[tuple, Any]]
    needs_params: bool = False


def constant(value: Any) -> Threshold:
    """The same threshold for every block and step; `value` is a real scalar, traced or not."""

    def update(norms, state, params):
        del params
        # One array for all blocks of a dtype.
        by_dtype = {dtype: cast(value, dtype) for dtype in {norm.dtype for norm in norms}}
        return tuple(by_dtype[norm.dtype] for norm in norms), state

    return Threshold(init=lambda norms: (), update=update)


def cast(value: Any, dtype: Any) -> jax.Array:
    """A scalar in a floating dtype, in which finite Python and NumPy numbers stay finite."""
    if isinstance(value, jax.Array):
        return value.astype(dtype)
    known, largest = float(value), float(jnp.finfo(dtype).max)
    return jnp.asarray(known if math.isinf(known) else min(max(known, -largest), largest), dtype)


def scheduled(schedule: optax.Schedule) -> Threshold:
    """The threshold of a schedule, the same for every block.

    threshold = schedule(step), step = 0 in the first update

    Args:
      schedule: function from the step, i32[], to a real scalar: any Optax schedule. Wherever a threshold is asked for,
        a schedule may be given as it is.

    Returns:
      A `Threshold` with the state i32[]: steps so far.

    Example:
      >>> tx = clip_by_norm(global_norm, scheduled(optax.piecewise_constant_schedule(2.0, {1: 0.5})))
      >>> state = tx.init(jnp.zeros(1))
      >>> for _ in range(2):
      ...     updates, state = tx.update(jnp.array([4.0]), state)
      ...     print(updates)
      [2.]
      [1.]
    """
    _checks.function(schedule, caller="scheduled", name="schedule", example="optax.linear_schedule(10.0, 1.0, 1000)")
    return _scheduled(schedule, "scheduled: schedule")


def _scheduled(schedule: Callable, argument: str) -> Threshold:
    def update(norms, state, params):
        value = schedule_value(schedule, state, argument)
        thresholds, _ = constant(value).update(norms, (), params)
        return thresholds, jnp.asarray(optax.safe_increment(state))

    return Threshold(init=lambda norms: jnp.zeros([], jnp.int32), update=update)


def schedule_value(schedule: Callable, step: jax.Array, argument: str) -> Any:
    value = schedule(step)
    if jnp.shape(value) != ():
        raise ValueError(
            f"{argument} must return a scalar, got an array of shape {jnp.shape(value)} from the schedule. "
            "Reduce it in the schedule."
        )
    return value


def param_fraction(
    fraction: Any, norm: Callable[[Any], Any], eps: Any = 1e-3, *, caller: str = "param_fraction"
) -> Threshold:
    """A share of the norm of the parameters, block by block.

    threshold_b = fraction · max(norm of the parameters of b, eps)

    Args:
      fraction: the share, a number, traced scalar, schedule, `Threshold` or None.
      norm: measures the parameters; the same norm as that of the clip.
      eps: norm that parameters are taken to have at least, >= 0, so that those that start at 0 can move.
      caller: name that error messages begin with.

    Returns:
      A `Threshold` with the state of `fraction`. The clip needs `params` in `update`.

    Raises:
      ValueError: params are missing, or `norm` finds other blocks in them than in the updates.

    Example:
      >>> tx = clip_by_norm(global_norm, param_fraction(0.1, global_norm))
      >>> params = jnp.array([3.0, 4.0])
      >>> updates, _ = tx.update(jnp.array([6.0, 8.0]), tx.init(params), params)
      >>> print(updates)
      [0.3 0.4]

    References:
      Brock, De, Smith, Simonyan, 2021, arXiv 2102.06171: `adaptive_grad_clip` is this rule on `unit_norm`.
    """
    share = as_threshold(fraction, caller=caller, name="fraction")
    _checks.function(norm, caller=caller, name="norm", example="unit_norm")
    _checks.scalar(eps, caller=caller, name="eps", low=0.0, kinds="a number or a scalar array")

    def update(norms, state, params):
        fractions, state = share.update(norms, state, params)
        sizes = list({id(size): size for size in jax.tree.leaves(norm(params))}.values())
        if [jnp.shape(n) for n in norms] != [jnp.shape(n) for n in sizes]:
            raise ValueError(
                f"{caller}: the parameters have other blocks than the updates, {len(sizes)} of shapes "
                f"{[jnp.shape(n) for n in sizes][:5]} against {len(norms)} of shapes "
                f"{[jnp.shape(n) for n in norms][:5]}. "
                "Use one norm for both, and parameters of the shapes and kinds of the updates."
            )
        return tuple(_share(f, size, eps) for f, size in zip(fractions, sizes)), state

    return Threshold(init=share.init, update=update, needs_params=True)


def _share(fraction: jax.Array, size: jax.Array, eps: Any) -> jax.Array:
    bound = fraction * jnp.maximum(size, cast(eps, size.dtype)).astype(fraction.dtype)
    return jnp.where(fraction == jnp.inf, jnp.inf, bound)  # not inf * 0


def between(low: Threshold, high: Threshold) -> Threshold:
    """The norm itself moved into [low, high]: the target of a clip whose response is `normalize`."""

    def update(norms, state, params):
        lows, state_low = low.update(norms, state[0], params)
        highs, state_high = high.update(norms, state[1], params)
        return tuple(_between(n, a, b) for n, a, b in zip(norms, lows, highs)), (state_low, state_high)

    return Threshold(
        init=lambda norms: (low.init(norms), high.init(norms)),
        update=update,
        needs_params=low.needs_params or high.needs_params,
    )


def _between(norm: jax.Array, low: jax.Array, high: jax.Array) -> jax.Array:
    # A norm of 0 has no way up, and may be that of entries too small to square: leave them.
    target = jnp.where(norm == 0, high, jnp.minimum(jnp.maximum(norm, low), high))
    endless = jnp.where(low <= 0, jnp.inf, jnp.where(jnp.isfinite(norm), target, jnp.nan))
    return jnp.where(high == jnp.inf, endless, target)


def as_threshold(value: Any, *, caller: str, name: str) -> Threshold:
    """The one place where a number, a traced scalar, a schedule or None becomes a `Threshold`."""
    if isinstance(value, Threshold):
        return value
    if value is None:
        return constant(math.inf)
    if callable(value) and _checks.is_leaf(value):
        return _scheduled(value, f"{caller}: {name}")
    _checks.scalar(
        value,
        caller=caller,
        name=name,
        low=0.0,
        why=" A negative bound would flip the sign of the update.",
        kinds="a number, a scalar array, a schedule, a Threshold, or None",
    )
    return constant(value)


def as_thresholds(tree: Any, *, caller: str, name: str) -> Any:
    """A `Threshold`, or a prefix tree of them, from one value or a prefix tree of values."""
    return jax.tree.map(
        lambda value: as_threshold(value, caller=caller, name=name),
        tree,
        is_leaf=lambda x: x is None or is_threshold(x),
    )


def is_threshold(x: object) -> bool:
    return isinstance(x, Threshold)

"""What a norm is compared with: the only part of a clip that keeps a state."""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_clip import _checks
from optax_clip._packing import packing_of


class Threshold(NamedTuple):
    """A threshold rule: a pair of functions over blocks, as an Optax transformation is one over a tree.

    `init(norms) -> state` sees the norms of the parameters, for their shapes, dtypes and shardings.
    `update(norms, state, params) -> (thresholds, state)` returns for each of `norms` its thresholds, a scalar or an
    array of that shape. `norms` is a flat tuple of arrays with a norm an entry: all blocks whose norm is a scalar come
    as one vector (a single one as a scalar), units as arrays that broadcast against their leaf. States hold arrays only
    and keep structure and dtypes. With `needs_params`, `params` is the tree of the parameters of these blocks, and the
    clip raises where its caller gives none; without, it is None. `per_block` makes a rule from one for a single block.

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


def per_block(init: Callable[[], Any], update: Callable[[jax.Array, Any], tuple[jax.Array, Any]]) -> Threshold:
    """Lifts a rule for one block to all blocks of any scope, and keeps norms that are not finite out of its state.

    (threshold_b, state_b) ← update(norm_b, state_b);  where norm_b is NaN or inf: threshold_b = NaN, state_b as it was

    Args:
      init: returns the state of one block before the first step: a tree of arrays.
      update: from the norm of one block, f32[] and finite, and its state to its threshold, f32[], and its next state,
        of the same structure, shapes and dtypes.

    Returns:
      A `Threshold` whose state is that of one block with the axes of the blocks in front.

    Raises:
      TypeError: an argument is not a function.

    Guarantees:
      A step in which the norm of a block is not finite, or its threshold NaN, leaves no trace in the state of that
      block, in the first step as in any other. The block is NaN throughout there, even where the rule would not clip.

    Example:
      A threshold of twice the mean norm so far:

      >>> def update(norm, state):
      ...     count, mean = state
      ...     mean = mean + (norm - mean) / (count + 1)
      ...     return 2 * mean, (count + 1, mean)
      >>> rule = per_block(lambda: (jnp.zeros([]), jnp.zeros([])), update)
      >>> tx = clip_by_norm(global_norm, rule)
      >>> state = tx.init(jnp.zeros(1))
      >>> for gradient in (1.0, jnp.nan, 7.0, 5.0):
      ...     updates, state = tx.update(jnp.array([gradient]), state)
      ...     print(updates, state.threshold)
      [1.] 2.0
      [nan] nan
      [7.] 8.0
      [5.] 8.666667
    """
    _checks.function(init, caller="per_block", name="init", example="lambda: jnp.zeros([])")
    _checks.function(update, caller="per_block", name="update", example="lambda norm, state: (2 * norm, state)")

    def guarded(norm, state):
        seen = jnp.isfinite(norm)
        threshold, new = update(jnp.where(seen, norm, 1.0), state)
        threshold = jnp.where(seen, threshold, jnp.nan)
        lost = jnp.isnan(threshold)  # also where an argument of the rule is NaN
        return threshold, jax.tree.map(lambda n, old: jnp.where(lost, old, n).astype(old.dtype), new, state)

    def state_like(norm):
        def spread(x):
            x = jnp.asarray(x)
            x = x.astype(x.dtype)  # no weak type
            shape = (*norm.shape, *x.shape)
            # The select gives each entry the sharding and the mesh axes of its block.
            return jnp.where(True, x, jax.lax.broadcast_in_dim(norm.astype(x.dtype), shape, range(norm.ndim)))

        return jax.tree.map(spread, init())

    def init_all(norms):
        # optax.tree.map_params asks with a tree without leaves, and takes one array for the whole state.
        return tuple(state_like(norm) for norm in norms) if norms else jnp.zeros([], jnp.int32)

    def update_all(norms, states, params):
        del params
        pairs = []
        for norm, state in zip(norms, states if norms else ()):
            of_blocks = guarded
            for _ in range(norm.ndim):
                of_blocks = jax.vmap(of_blocks)
            threshold, state = of_blocks(norm.astype(jnp.float32), state)
            pairs.append((threshold.astype(norm.dtype), state))
        return tuple(t for t, _ in pairs), tuple(s for _, s in pairs) if norms else states

    return Threshold(init_all, update_all)


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
        sizes = packing_of(sizes).pack(sizes)
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


def minimum(*thresholds: Any) -> Threshold:
    """The smallest of several thresholds, block by block.

    threshold_b = min over i of thresholds[i]_b;  NaN where one of them is

    Args:
      thresholds: at least one, each a number, traced scalar, schedule, `Threshold`, Optax transformation or None.

    Returns:
      A `Threshold` with a tuple of the states of all. Each sees the norms before clipping.

    Raises:
      ValueError: there is none, or one is negative or NaN.
      TypeError: one is of the wrong kind.

    Example:
      Never above 2, nor above 1.05 times the mean of the last norms:

      >>> tx = clip_by_norm(global_norm, minimum(2.0, optax.chain(optax.ema(0.9), optax.scale(1.05))))
      >>> updates, _ = tx.update(jnp.array([3.0]), tx.init(jnp.zeros(1)))
      >>> print(updates)
      [2.]
    """
    if not thresholds:
        raise ValueError("minimum: there is no threshold. At least one is required. Pass numbers or rules.")
    rules = [as_threshold(value, caller="minimum", name=f"thresholds[{i}]") for i, value in enumerate(thresholds)]

    def update(norms, states, params):
        columns, states = zip(*(rule.update(norms, state, params) for rule, state in zip(rules, states)))
        return tuple(functools.reduce(jnp.minimum, column) for column in zip(*columns)), tuple(states)

    return Threshold(
        init=lambda norms: tuple(rule.init(norms) for rule in rules),
        update=update,
        needs_params=any(rule.needs_params for rule in rules),
    )


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
    if isinstance(value, optax.GradientTransformation):
        update: Any = value.update
        return per_block(lambda: value.init(jnp.zeros([], jnp.float32)), lambda norm, state: update(norm, state))
    if callable(value) and _checks.is_leaf(value):
        return _scheduled(value, f"{caller}: {name}")
    _checks.scalar(
        value,
        caller=caller,
        name=name,
        low=0.0,
        why=" A negative bound would flip the sign of the update.",
        kinds="a number, a scalar array, a schedule, a Threshold, an Optax transformation, or None",
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
    """True for what `as_threshold` takes whole though it is a tree."""
    return isinstance(x, (Threshold, optax.GradientTransformation))

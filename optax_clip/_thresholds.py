"""What a norm is compared with: the only part of a clip that keeps a state."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_clip import _checks


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


def thresholds_of(rule: Threshold, norms: tuple, state: Any, params: Any) -> tuple[tuple, Any]:
    """What `rule.update` returns, where it is a threshold for each of the norms."""
    thresholds, new = rule.update(norms, state, params)
    wanted = [norm.shape for norm in norms]
    given = [jnp.shape(t) for t in thresholds] if isinstance(thresholds, (tuple, list)) else []
    if len(given) != len(wanted) or any(t not in ((), n) for t, n in zip(given, wanted)):
        raise ValueError(
            f"Threshold: update must return a tuple with an entry for each of the norms, got a "
            f"{type(thresholds).__name__} with shapes {given} for norms of shapes {wanted}. "
            "Return tuple(... for norm in norms)."
        )
    return tuple(thresholds), new


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
      ValueError: in `update` of the clip, where the state changes its structure, shapes or kind of numbers, or the
        threshold is not a scalar.

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
        new = _like_before(new, state)
        if jnp.shape(threshold) != ():
            raise ValueError(
                f"per_block: update must return a scalar threshold, got shape {jnp.shape(threshold)}. "
                "It sees the norm of one block, a scalar too."
            )
        # An argument of the rule that is NaN spoils what it returns. A state may start with NaN.
        spoiled = [
            jnp.any(jnp.isnan(n) & ~jnp.isnan(o))
            for n, o in zip(jax.tree.leaves(new), jax.tree.leaves(state))
            if jnp.issubdtype(n.dtype, jnp.floating)
        ]
        lost = ~seen | jnp.isnan(threshold) | sum(spoiled, start=jnp.bool_(False))
        return jnp.where(lost, jnp.nan, threshold), jax.tree.map(lambda n, old: jnp.where(lost, old, n), new, state)

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
        for norm, state in zip(norms, states if norms else (), strict=True):
            of_blocks = guarded
            for _ in range(norm.ndim):
                of_blocks = jax.vmap(of_blocks)
            known = norm.astype(jnp.float32)
            threshold, state = of_blocks(known, state)
            # What is not above in f32 is not above: an f64 norm may be, by less than f32 can tell.
            exact = threshold.astype(norm.dtype)
            pairs.append((jnp.where(known <= threshold, jnp.maximum(exact, norm), exact), state))
        return tuple(t for t, _ in pairs), tuple(s for _, s in pairs) if norms else states

    return Threshold(init_all, update_all)


def _like_before(new: Any, old: Any) -> Any:
    """The next state of a rule in the dtypes of the last, or an error where it is of another kind."""
    if jax.tree.structure(new) != jax.tree.structure(old):
        raise ValueError(
            f"per_block: update must keep the structure of the state, got {jax.tree.structure(new)} after "
            f"{jax.tree.structure(old)}. Return what init returns."
        )

    def checked(n, o):
        n = jnp.asarray(n)
        loses = jnp.issubdtype(n.dtype, jnp.inexact) and not jnp.issubdtype(o.dtype, jnp.inexact)
        if n.shape != o.shape or loses:
            raise ValueError(
                f"per_block: update must keep shapes and dtypes of the state, got {n.dtype}{list(n.shape)} after "
                f"{o.dtype}{list(o.shape)}. Return what init returns; floats start as jnp.zeros([])."
            )
        return n.astype(o.dtype)

    return jax.tree.map(checked, new, old)


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
    if not _checks.is_real(value):
        kind = getattr(value, "dtype", type(value).__name__)
        raise TypeError(
            f"{argument} must return a real number, got {kind} from the schedule. Where there is no bound, inf."
        )
    if jnp.shape(value) != ():
        raise ValueError(
            f"{argument} must return a scalar, got an array of shape {jnp.shape(value)} from the schedule. "
            "Reduce it in the schedule."
        )
    return value


def as_threshold(value: Any, *, caller: str, name: str) -> Threshold:
    """The one place where a number, a traced scalar, a schedule or None becomes a `Threshold`."""
    if isinstance(value, Threshold):
        return value
    if value is None:
        return constant(math.inf)
    if _checks.is_transformation(value):
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
    return isinstance(x, Threshold) or _checks.is_transformation(x)

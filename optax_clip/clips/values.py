"""Clips of single entries. They measure nothing, so that they take no read of their own."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_clip._engine import checks
from optax_clip._engine.leaves import is_counted, spread
from optax_clip._engine.numbers import bounded, cast, next_step, value_at


class ValueClipState(NamedTuple):
    """How often a clip that measures nothing was applied."""

    clip_step: jax.Array  # i32[]: updates so far, saturates


def clip(max_delta: Any) -> optax.GradientTransformationExtraArgs:
    """Clips every entry to [-max_delta, max_delta]; a complex one to that magnitude, with its phase kept.

    x ← min(max(x, -max_delta), max_delta)

    This is `clip_by_value(-max_delta, max_delta)`.

    Args:
      max_delta: largest magnitude of an entry, >= 0: a number, a scalar array (traced too), an Optax schedule, None for
        no bound, or a prefix tree of these.

    Returns:
      A transformation with the state `ValueClipState`: i32[]. Where no bound is a schedule, `update` takes an empty
      state too: `optax.EmptyState()`, `()` or None.

    Raises:
      ValueError: `max_delta` is negative, NaN or not a scalar, or the tree does not fit the updates.
      TypeError: an argument is of the wrong kind.

    Guarantees:
      Entries inside the bounds stay as they are, but that a CPU may take numbers below the normal ones for 0. An inf
      goes to the bound, NaN stays NaN. Shapes and dtypes are kept. A traced bound below 0 acts as 0, and one of NaN
      makes every entry NaN.

    Example:
      >>> tx = clip(1.0)
      >>> grads = jnp.array([-3.0, 0.5, jnp.inf])
      >>> print(tx.update(grads, tx.init(grads))[0])
      [-1.   0.5  1. ]

    References:
      Mikolov, Statistical language models based on neural networks, 2012. Numbers are those of `optax.clip` and of
      PyTorch's `clip_grad_value_`.
    """

    return entrywise(lambda x, high: with_magnitude(x, None, high), {"max_delta": max_delta}, low=0)


def clip_by_value(min_value: Any, max_value: Any = ...) -> optax.GradientTransformationExtraArgs:
    """Clips every entry to [min_value, max_value], either side of which may be open.

    x ← min(max(x, min_value), max_value)

    Args:
      min_value: smallest entry: a number, a scalar array (traced too), an Optax schedule, None for no bound, or a
        prefix tree of these.
      max_value: largest entry, >= min_value, likewise; required. Where values that are known only in the compiled
        program cross, `max_value` wins.

    Returns:
      A transformation with the state `ValueClipState`, as `clip`.

    Raises:
      ValueError: a bound is NaN or not a scalar, min_value > max_value, or a tree does not fit the updates.
      TypeError: a bound is missing or of the wrong kind.

    Guarantees:
      As for `clip`. Complex entries keep their phase. Their magnitude is clipped to min(max_value, -min_value), the
      largest for which real and imaginary parts lie within the bounds whatever the phase; below 0 that acts as 0.

    Example:
      >>> tx = clip_by_value(None, 2.0)
      >>> grads = jnp.array([-9.0, 1.0, 9.0])
      >>> print(tx.update(grads, tx.init(grads))[0])
      [-9.  1.  2.]

    References:
      Mikolov, Statistical language models based on neural networks, 2012; `tf.clip_by_value`.
    """
    if max_value is ...:
        raise TypeError("max_value is missing. For both sides use clip(max_delta); for an open one pass None.")
    return entrywise(within, {"min_value": min_value, "max_value": max_value})


def clip_by_magnitude(min_magnitude: Any, max_magnitude: Any) -> optax.GradientTransformationExtraArgs:
    """Bounds the magnitude of every entry from both sides; its sign or phase is kept, and zero stays zero.

    x ← sign(x) · min(max(|x|, min_magnitude), max_magnitude)

    This is to single entries what `clip_by_norm_range` is to blocks.

    Args:
      min_magnitude: smallest magnitude of an entry that is not 0, >= 0: a number, a scalar array (traced too), an Optax
        schedule, None for no bound, or a prefix tree of these.
      max_magnitude: largest magnitude, >= min_magnitude, likewise; required. Where values that are known only in the
        compiled program cross, `max_magnitude` wins.

    Returns:
      A transformation with the state `ValueClipState`, as `clip`.

    Raises:
      ValueError: a bound is negative, NaN or not a scalar, min_magnitude > max_magnitude, or a tree does not fit the
        updates.
      TypeError: a bound is of the wrong kind.

    Guarantees:
      As for `clip`, and inf goes to the upper bound. A traced lower bound of NaN makes every entry NaN that is not 0.

    Example:
      >>> tx = clip_by_magnitude(0.5, 2.0)
      >>> grads = jnp.array([-9.0, -0.1, 0.0, 1.0])
      >>> print(tx.update(grads, tx.init(grads))[0])
      [-2.  -0.5  0.   1. ]

    References:
      Gradients cut from both sides. With one bound for both and SGD, updates by sign: Riedmiller, Braun, A direct
      adaptive method for faster backpropagation learning, 1993.
    """

    return entrywise(with_magnitude, {"min_magnitude": min_magnitude, "max_magnitude": max_magnitude}, low=0)


def entrywise(
    change: Callable, bounds: dict[str, Any], low: int | None = None, beside: Callable | None = None
) -> optax.GradientTransformationExtraArgs:
    """`change(update, *bounds)` of each leaf that counts and has a bound; the bounds are those of the step.

    Values of a bound that are known only in the compiled program, and below `low`, act as `low`. `beside(updates,
    params)` gives a tuple for each leaf, of what `change` gets between the update and the bounds.
    """
    for name, bound in bounds.items():
        bounded(bound, name, low)
    if len(bounds) == 2:
        checks.ordered(*bounds.values(), *bounds)
    scheduled = any(map(checks.is_function, jax.tree.leaves(bounds)))

    def update_fn(updates, state, params=None, **extra_args):
        del extra_args
        state = checks.state(state, ValueClipState, None if scheduled else first_step)
        leaves, treedef = jax.tree.flatten(updates)
        others = beside(updates, params) if beside else [()] * len(leaves)
        entries = zip(*(spread(bound, updates, name) for name, bound in bounds.items()))
        new = []
        for leaf, other, entry in zip(leaves, others, entries):
            if len(entry) == 2:
                checks.ordered(*entry, *bounds)
            limits = [_at(bound, state.clip_step, name, low) for bound, name in zip(entry, bounds)]
            unbounded = not is_counted(leaf) or all(limit is None for limit in limits)
            new.append(leaf if unbounded else change(jnp.asarray(leaf), *other, *limits))
        return treedef.unflatten(new), ValueClipState(next_step(state.clip_step))

    return optax.GradientTransformationExtraArgs(first_step, update_fn)


def first_step(params: Any = None) -> ValueClipState:
    del params
    return ValueClipState(jnp.zeros([], jnp.int32))


def _at(bound: Any, step: jax.Array, name: str, low: int | None) -> Any:
    value = value_at(bound, step, name)
    unchecked = checks.is_function(bound) or isinstance(bound, jax.Array)
    return jnp.maximum(value, low) if unchecked and low is not None else value


def within(x: jax.Array, low: Any, high: Any) -> jax.Array:
    """Entries within [low, high]. NaN stays NaN, and a bound of NaN makes all NaN."""
    low, high = (bound if bound is None else cast(bound, x.real.dtype) for bound in (low, high))
    if not jnp.iscomplexobj(x):
        return jnp.clip(x, low, high)
    sides = [side for side in (low if low is None else -low, high) if side is not None]
    radius = jnp.maximum(jnp.minimum(sides[0], sides[-1]), 0)
    return _at_magnitude(x, ~(jnp.abs(x) <= radius), radius)


def with_magnitude(x: jax.Array, low: Any, high: Any) -> jax.Array:
    """Entries with a magnitude within [low, high]. Zero stays zero."""
    if low is not None:
        low = cast(low, x.real.dtype)
        raised = ~(jnp.abs(x) >= low) & (x != 0)  # by a bound of NaN, too
        x = _at_magnitude(x, raised, low) if jnp.iscomplexobj(x) else jnp.where(raised, jnp.sign(x) * low, x)
    return x if high is None else within(x, -cast(high, x.real.dtype), high)


def _at_magnitude(x: jax.Array, moved: jax.Array, size: jax.Array) -> jax.Array:
    """Complex entries, the moved ones at this magnitude and with their phase; of inf only parts that are inf count."""
    largest = float(jnp.finfo(x.real.dtype).max)
    parts = [jnp.clip(part, -largest, largest) for part in (x.real, x.imag)]
    # From parts of at most 1, whose squares stay in range. Others than the moved ones need a finite derivative only.
    peak = jnp.where(moved, jnp.maximum(*map(jnp.abs, parts)), 1)
    real, imag = (jnp.where(moved, part / peak, 1) for part in parts)
    factor = size / jnp.sqrt(real * real + imag * imag)
    return jnp.where(moved, jax.lax.complex(real * factor, imag * factor), x)

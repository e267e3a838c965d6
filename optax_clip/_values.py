"""Clips of single entries. They measure nothing, which would cost another read."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_clip import _checks
from optax_clip._blocks import broadcast, is_counted, wide
from optax_clip._reductions import quotient
from optax_clip._thresholds import cast, is_threshold, schedule_value


class ValueClipState(NamedTuple):
    """How often a clip that measures nothing was applied."""

    step: jax.Array  # i32[]: updates so far, saturates


def clip(max_delta: Any) -> optax.GradientTransformationExtraArgs:
    """Clips every entry to [-max_delta, max_delta]; a complex one to that magnitude, its phase kept.

    x ← min(max(x, -max_delta), max_delta)

    Args:
      max_delta: largest magnitude of an entry, >= 0: a number, a scalar array (traced too), an Optax schedule, None for
        no bound, or a prefix tree of these.

    Returns:
      A transformation with the state `ValueClipState`: i32[].

    Raises:
      ValueError: `max_delta` is negative, NaN or not a scalar, or the tree does not fit the updates.
      TypeError: an argument is of the wrong kind.

    Guarantees:
      Entries inside the bounds are bit-identical; inf goes to the bound, NaN stays NaN. Shapes and dtypes are kept.
      A traced bound below 0 acts as 0, a NaN makes every entry NaN.

    Example:
      >>> tx = clip(1.0)
      >>> grads = jnp.array([-3.0, 0.5, jnp.inf])
      >>> print(tx.update(grads, tx.init(grads))[0])
      [-1.   0.5  1. ]

    References:
      Mikolov, Statistical language models based on neural networks, 2012. Numbers are those of `optax.clip`; PyTorch's
      `clip_grad_value_`.
    """
    check_bounds(max_delta, caller="clip", name="max_delta", low=0.0)

    def bounds(step, updates):
        deltas = bounds_at(step, max_delta, updates, caller="clip", name="max_delta", low=0.0)
        return [(None, None) if delta is None else (-delta, delta) for delta in deltas]

    return _entrywise(bounds, _clipped, "clip")


def clip_by_value(min_value: Any = None, max_value: Any = None) -> optax.GradientTransformationExtraArgs:
    """Clips every entry to [min_value, max_value], either side of which may be open.

    x ← min(max(x, min_value), max_value)

    Args:
      min_value: smallest entry: a number, a scalar array (traced too), an Optax schedule, None for no bound, or a
        prefix tree of these.
      max_value: largest entry, >= min_value, likewise. Where values that are known only in the compiled program
        cross, `max_value` wins.

    Returns:
      A transformation with the state `ValueClipState`: i32[].

    Raises:
      ValueError: a bound is NaN or not a scalar, min_value > max_value, or a tree does not fit the updates.
      TypeError: a bound is of the wrong kind.

    Guarantees:
      As for `clip`. Complex entries keep their phase and are clipped to the magnitude min(max_value, -min_value), the
      largest for which real and imaginary parts lie within the bounds whatever the phase; below 0 that acts as 0.

    Example:
      >>> tx = clip_by_value(max_value=2.0)
      >>> grads = jnp.array([-9.0, 1.0, 9.0])
      >>> print(tx.update(grads, tx.init(grads))[0])
      [-9.  1.  2.]

    References:
      Mikolov, Statistical language models based on neural networks, 2012; `tf.clip_by_value`.
    """
    check_bounds(min_value, caller="clip_by_value", name="min_value")
    check_bounds(max_value, caller="clip_by_value", name="max_value")
    _checks.ordered(min_value, max_value, caller="clip_by_value", low="min_value", high="max_value")

    def bounds(step, updates):
        return pairs_at(step, (min_value, max_value), updates, caller="clip_by_value", names=("min_value", "max_value"))

    return _entrywise(bounds, _clipped, "clip_by_value")


def clip_by_magnitude(min_magnitude: Any = None, max_magnitude: Any = None) -> optax.GradientTransformationExtraArgs:
    """Bounds the magnitude of every entry from both sides; its sign or phase is kept, and zero stays zero.

    x ← sign(x) · min(max(|x|, min_magnitude), max_magnitude)

    The sibling of `clip_by_norm_range` for single entries: "gradient cutting" from both sides.

    Args:
      min_magnitude: smallest magnitude of an entry that is not 0, >= 0: a number, a scalar array (traced too), an Optax
        schedule, None for no bound, or a prefix tree of these.
      max_magnitude: largest magnitude, >= min_magnitude, likewise. Where values that are known only in the compiled
        program cross, `max_magnitude` wins.

    Returns:
      A transformation with the state `ValueClipState`: i32[].

    Raises:
      ValueError: a bound is negative, NaN or not a scalar, min_magnitude > max_magnitude, or a tree does not fit the
        updates.
      TypeError: a bound is of the wrong kind.

    Guarantees:
      Entries inside the bounds are bit-identical; inf goes to the upper bound, NaN stays NaN. Shapes and dtypes are
      kept. A traced bound below 0 acts as 0, a NaN makes every entry NaN that is not 0.

    Example:
      >>> tx = clip_by_magnitude(0.5, 2.0)
      >>> grads = jnp.array([-9.0, -0.1, 0.0, 1.0])
      >>> print(tx.update(grads, tx.init(grads))[0])
      [-2.  -0.5  0.   1. ]

    References:
      Cutting gradients from both sides. With one bound for both and SGD, updates by sign: Riedmiller, Braun, A direct
      adaptive method for faster backpropagation learning, 1993.
    """
    names = ("min_magnitude", "max_magnitude")
    for name, bound in zip(names, (min_magnitude, max_magnitude)):
        check_bounds(bound, caller="clip_by_magnitude", name=name, low=0.0)
    _checks.ordered(min_magnitude, max_magnitude, caller="clip_by_magnitude", low=names[0], high=names[1])

    def bounds(step, updates):
        both = (min_magnitude, max_magnitude)
        return pairs_at(step, both, updates, caller="clip_by_magnitude", names=names, low=0.0)

    return _entrywise(bounds, _within_magnitudes, "clip_by_magnitude")


def first_step(params: Any) -> ValueClipState:
    del params
    return ValueClipState(jnp.zeros([], jnp.int32))


def next_step(state: ValueClipState) -> ValueClipState:
    return ValueClipState(jnp.asarray(optax.safe_increment(state.step)))


def check_bounds(tree: Any, *, caller: str, name: str, low: float | None = None) -> None:
    """Raises unless `tree` is a bound for entries, or a tree of them."""
    for value in jax.tree.leaves(tree, is_leaf=is_threshold):
        if is_threshold(value):
            raise TypeError(
                f"{caller}: {name} must be a number, a scalar array, a schedule, or None, got a {type(value).__name__}."
                " Rules compare norms, and entries have none: use clip_by_norm or another norm clip; for weights, "
                "clip_weight_norm."
            )
        if not _checks.is_function(value):
            _checks.scalar(value, caller=caller, name=name, low=low, why=" Magnitudes are not negative.")


def bounds_at(
    step: jax.Array, tree: Any, updates: Any, *, caller: str, name: str, low: float | None = None
) -> list[Any]:
    """The bound for each leaf at this step, or None. Values that are known only now, and below `low`, act as `low`."""
    bounds = broadcast(tree, updates, caller=caller, name=name)
    return [_at(step, bound, f"{caller}: {name}", low) for bound in bounds]


def pairs_at(
    step: jax.Array, trees: tuple, updates: Any, *, caller: str, names: tuple, low: float | None = None
) -> list[tuple]:
    """The lower and upper bound for each leaf at this step."""
    pairs = list(zip(*(broadcast(tree, updates, caller=caller, name=name) for tree, name in zip(trees, names))))
    for pair in pairs:
        _checks.ordered(*pair, caller=caller, low=names[0], high=names[1])
    return [tuple(_at(step, bound, f"{caller}: {name}", low) for bound, name in zip(pair, names)) for pair in pairs]


def _at(step: jax.Array, bound: Any, argument: str, low: float | None) -> Any:
    if callable(bound):
        bound = schedule_value(bound, step, argument)
    if bound is None:
        return None
    # Floating: an unsigned integer has no negative.
    if not isinstance(bound, jax.Array):
        bound = float(bound)
    elif not jnp.issubdtype(bound.dtype, jnp.floating):
        bound = bound.astype(float)
    if low is None:
        return bound
    # Keeps NaN.
    return jnp.maximum(bound, jnp.asarray(low, bound.dtype)) if isinstance(bound, jax.Array) else max(bound, low)


def _entrywise(bounds: Callable, clipped: Callable, caller: str) -> optax.GradientTransformationExtraArgs:
    """`clipped(leaf, low, high)` of each leaf, with the bounds that `bounds(step, updates)` gives it."""

    def update_fn(updates, state, params=None, **extra_args):
        del params, extra_args
        _checks.state(state, ValueClipState, caller=caller)
        leaves, treedef = jax.tree.flatten(updates)
        new = [
            clipped(jnp.asarray(leaf), *bound) if is_counted(leaf) else leaf
            for leaf, bound in zip(leaves, bounds(state.step, updates))
        ]
        return treedef.unflatten(new), next_step(state)

    return optax.GradientTransformationExtraArgs(first_step, update_fn)


def _clipped(x: jax.Array, low: Any, high: Any) -> jax.Array:
    if low is None and high is None:
        return x
    dtype = wide(x)
    high = cast(math.inf if high is None else high, dtype)
    low = jnp.minimum(cast(-math.inf if low is None else low, dtype), high)  # keeps NaN
    high = jnp.where(jnp.isnan(low), low, high)
    return within_disc(x, low, high) if jnp.iscomplexobj(x) else _within_interval(x, low, high)


def _within_interval(x: jax.Array, low: jax.Array, high: jax.Array) -> jax.Array:
    # Compared in the wider type, selected in the leaf's own: an entry inside the bounds keeps its bits. Every number is
    # outside of bounds that are NaN.
    wide, bad = x.astype(low.dtype), jnp.isnan(low)
    above, below = wide > jnp.where(bad, -math.inf, high), wide < jnp.where(bad, math.inf, low)
    return jnp.where(above, _cast(high, x.dtype), jnp.where(below, _cast(low, x.dtype), x))


def _cast(bound: jax.Array, dtype: Any) -> jax.Array:
    """The bound in the leaf's dtype; a finite one stays finite."""
    largest = float(jnp.finfo(dtype).max)
    return jnp.where(jnp.isinf(bound), bound, jnp.clip(bound, -largest, largest)).astype(dtype)


def within_disc(x: jax.Array, low: jax.Array, high: jax.Array) -> jax.Array:
    radius = jnp.maximum(jnp.minimum(high, -low), 0.0)
    endless = jnp.isinf(x.real) | jnp.isinf(x.imag)
    outside = (jnp.abs(x) > radius) | (endless & (radius < jnp.inf)) | jnp.isnan(radius)
    # The direction, from parts small enough for their magnitude to be finite; of an infinite entry, that of its
    # infinite parts.
    unit = jnp.where(jnp.maximum(jnp.abs(x.real), jnp.abs(x.imag)) > 1, 0.25, 1.0).astype(radius.dtype)
    real, imag = (jnp.where(endless, _sign_if_inf(part), part * unit) for part in (x.real, x.imag))
    magnitude = jnp.abs(jax.lax.complex(jnp.where(outside, real, 1.0), jnp.where(outside, imag, 0.0)))
    return jnp.where(
        outside, jax.lax.complex(quotient(real, magnitude) * radius, quotient(imag, magnitude) * radius), x
    )


def _within_magnitudes(x: jax.Array, low: Any, high: Any) -> jax.Array:
    x = x if high is None else _clipped(x, -high, high)
    if low is None:
        return x
    dtype = wide(x)
    low = jnp.minimum(cast(low, dtype), cast(math.inf if high is None else high, dtype))  # keeps NaN
    raised = ~(jnp.abs(x).astype(dtype) >= low) & (x != 0) & ~jnp.isnan(x)
    if not jnp.iscomplexobj(x):
        low = _cast(low, x.dtype)
        return jnp.where(raised, jnp.where(x < 0, -low, low), x)
    # Of tiny entries, the direction from parts large enough for their magnitude to be a normal number.
    unit = jnp.where(jnp.maximum(jnp.abs(x.real), jnp.abs(x.imag)) < 1, 2.0**96, 1.0).astype(dtype)
    real, imag = (jnp.where(raised, part * unit, 1.0) for part in (x.real, x.imag))
    magnitude = jnp.abs(jax.lax.complex(real, imag))
    return jnp.where(raised, jax.lax.complex(quotient(real, magnitude) * low, quotient(imag, magnitude) * low), x)


def _sign_if_inf(x: jax.Array) -> jax.Array:
    return jnp.where(jnp.isinf(x), jnp.sign(x), 0.0)

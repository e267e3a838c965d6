"""Rules that put other thresholds together, or see the parameters."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from optax_clip import _checks
from optax_clip._blocks import wide
from optax_clip._packing import packing_of
from optax_clip._thresholds import Threshold, as_threshold, cast, thresholds_of


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
    _checks.scalar(eps, caller=caller, name="eps", low=0.0, kinds=_checks.NUMBER)

    def update(norms, state, params):
        fractions, state = thresholds_of(share, norms, state, params)
        sizes = list({id(size): size for size in jax.tree.leaves(norm(params))}.values())
        sizes = [size.astype(wide(size)) for size in map(jnp.asarray, sizes)]
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
        columns, states = zip(*(thresholds_of(rule, norms, state, params) for rule, state in zip(rules, states)))
        return tuple(functools.reduce(jnp.minimum, column) for column in zip(*columns)), tuple(states)

    return Threshold(
        init=lambda norms: tuple(rule.init(norms) for rule in rules),
        update=update,
        needs_params=any(rule.needs_params for rule in rules),
    )


def between(low: Threshold, high: Threshold) -> Threshold:
    """The norm itself moved into [low, high]: the target of a clip whose response is `normalize`."""

    def update(norms, state, params):
        lows, state_low = thresholds_of(low, norms, state[0], params)
        highs, state_high = thresholds_of(high, norms, state[1], params)
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

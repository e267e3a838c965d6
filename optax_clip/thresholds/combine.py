"""Rules that put other thresholds together, or see the norm of the parameters."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import optax

from optax_clip._engine import checks
from optax_clip._engine.numbers import cast
from optax_clip._engine.rules import as_rule, rule_of


def param_fraction(fraction: Any, eps: Any = 1e-3) -> optax.GradientTransformationExtraArgs:
    """A share of the norm of the parameters, block by block.

    threshold_b = fraction · max(norm of the parameters of b, eps), by the norm of the clip

    Args:
      fraction: the share, >= 0: a number, traced scalar, schedule, rule or None.
      eps: norm that parameters are taken to have at least, >= 0, so that those that start at 0 can move.

    Returns:
      A rule with the state of `fraction`. The clip needs `params` in `update`.

    Raises:
      ValueError: an argument is negative or NaN; in `update` of the clip, params are missing or have other blocks.
      TypeError: an argument is of the wrong kind.

    Example:
      >>> tx = clip_by_norm(global_norm, thresholds.param_fraction(0.1))
      >>> params = jnp.array([3.0, 4.0])
      >>> updates, _ = tx.update(jnp.array([6.0, 8.0]), tx.init(params), params)
      >>> print(updates)
      [0.3 0.4]

    References:
      Brock, De, Smith, Simonyan, 2021, arXiv 2102.06171: `adaptive_grad_clip` is this rule on `unit_norm`.
    """
    share = as_rule(fraction, "fraction")
    checks.scalar(eps, "eps", 0.0)

    def update(norm, state, param_norm=None, /, **context):
        if param_norm is None:
            raise ValueError(
                "param_norm is missing: a rule around param_fraction did not ask for it. Put the other rule inside, "
                "param_fraction(other), or use minimum."
            )
        part, state = share.update(norm, state, param_norm, **context)
        part = jnp.asarray(cast(part, norm.dtype))
        bound = part * jnp.maximum(param_norm.astype(norm.dtype), cast(eps, norm.dtype))
        return jnp.where(part == jnp.inf, jnp.inf, bound), state  # not inf · 0

    return rule_of(share.init, update, ["params"], [share])


def minimum(*thresholds: Any) -> optax.GradientTransformationExtraArgs:
    """The smallest of several thresholds, block by block.

    threshold_b = min over i of thresholds[i]_b;  NaN where one of them is

    Args:
      thresholds: at least one, each a number, traced scalar, schedule, rule or None.

    Returns:
      A rule with a tuple of the states of all. Each rule sees the norms before clipping.

    Raises:
      ValueError: there is none, or one is negative or NaN.
      TypeError: one is of the wrong kind.

    Example:
      Never above 2, nor above 1.05 times the mean of the last norms:

      >>> tx = clip_by_norm(global_norm, thresholds.minimum(2.0, optax.chain(optax.ema(0.9), optax.scale(1.05))))
      >>> updates, _ = tx.update(jnp.array([3.0]), tx.init(jnp.zeros(1)))
      >>> print(updates)
      [2.]
    """
    if not thresholds:
        raise ValueError("thresholds must not be empty. At least one is required. Pass numbers or rules.")
    rules = [as_rule(value, f"thresholds[{i}]") for i, value in enumerate(thresholds)]
    return together(rules, lambda norm, found: functools.reduce(jnp.minimum, found))


def between(low: Any, high: Any) -> optax.GradientTransformationExtraArgs:
    """The norm itself moved into [low, high]: the target of a clip whose response is `normalize`."""

    def moved(norm, found):
        least, most = (jnp.maximum(value, 0.0) for value in found)
        return jnp.minimum(jnp.maximum(norm, least), most)

    return together([as_rule(low, "min_norm"), as_rule(high, "max_norm")], moved)


def together(rules: Sequence[Any], combine: Callable) -> optax.GradientTransformationExtraArgs:
    """The rule whose threshold is `combine(norm, thresholds of the rules)`."""

    def update(norm, states, param_norm=None, /, **context):
        found, states = zip(*(r.update(norm, state, param_norm, **context) for r, state in zip(rules, states)))
        return combine(norm, [jnp.asarray(cast(value, norm.dtype)) for value in found]), tuple(states)

    return rule_of(lambda norm: tuple(rule.init(norm) for rule in rules), update, (), rules)

"""What a threshold may be: a number, an array, a schedule, None, or a rule, all as rules.

A rule is an Optax transformation over the norm of one block: `init(norm) -> state`, and `update(norm, state,
param_norm=None, *, step, total_norm, **extra_args) -> (threshold, state)`, on scalars.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import optax

from optax_clip._engine import checks
from optax_clip._engine.numbers import value_at


class Rule(optax.GradientTransformationExtraArgs):
    """A rule that says what it reads beside the norm. Without "history" it works entry by entry."""

    reads: frozenset[str] = frozenset()


class Fixed(Rule):
    """A rule that gives all blocks the same threshold and keeps no state: a number, a schedule, or None."""


def reads(rule: Any) -> frozenset[str]:
    """What a rule reads. Of one that does not say so, the history."""
    return rule.reads if isinstance(rule, Rule) else frozenset({"history"})


def rule_of(init: Callable, update: Callable, own: Sequence = ("history",), inner: Sequence = ()) -> Rule:
    """A rule of these functions. It reads what it says itself, and what the rules inside read."""
    rule = Rule(init, update)
    rule.reads = frozenset(own).union(*map(reads, inner))
    return rule


def fixed(value: Any, name: str, low: float | None = 0.0) -> Fixed:
    """The rule of a number, a scalar array, a schedule, or None. What is no norm may be below 0."""
    limit = math.inf if value is None else value
    update = lambda norm, state, _=None, /, *, step=0, **__: (value_at(limit, step, name), state)
    rule = Fixed(lambda norm: (), update)  # pyright: ignore[reportArgumentType]  # Optax has other names for arguments
    if checks.is_function(limit):
        checks.schedule(limit, name)
        rule.reads = frozenset({"history"})
        return rule
    kinds = "a number, a scalar array, a schedule, a rule, or None"
    why = "A negative bound would flip the sign of the update. Pass None for no bound."
    checks.scalar(limit, name, low, kinds=kinds, why=why)
    return rule


def as_rule(value: Any, name: str, low: float | None = 0.0) -> optax.GradientTransformationExtraArgs:
    """The rule for any threshold."""
    if checks.is_transformation(value):
        return optax.with_extra_args_support(value)
    return fixed(value, name, low)


def as_rules(tree: Any, name: str) -> Any:
    """A rule, or a prefix tree of rules, from one threshold or a prefix tree of thresholds."""
    made: dict = {}  # leaves of one block must have one rule: equal numbers are one, and so is one object in two places

    def shared(value):
        known = value is None or (isinstance(value, (int, float)) and not isinstance(value, bool))
        key = known, value if known else id(value)
        made[key] = made.get(key) or as_rule(value, name)
        return made[key]

    return jax.tree.map(shared, tree, is_leaf=lambda x: x is None or checks.is_transformation(x))

"""Updates after which the weights are where a function of them wants them, and projections of the weights."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optax_clip._engine import checks
from optax_clip._engine.leaves import is_counted, params_of
from optax_clip._engine.numbers import next_step
from optax_clip.clips.values import ValueClipState, first_step


def project_weights(projection: Callable[[Any], Any]) -> optax.GradientTransformationExtraArgs:
    """Projects the weights onto a set, by any function of `optax.projections`. Goes last in a chain.

    updates ← projection(params + updates) - params

    Args:
      projection: from the tree of weights to a tree like it: `optax.projections.projection_non_negative`, or
        `functools.partial(optax.projections.projection_l2_ball, scale=3.0)`. It sees floating and complex leaves, in
        f32 at least, and None for others.

    Returns:
      A transformation with the state `ValueClipState`: i32[]; `update` takes an empty state too. `update` needs
      `params`.

    Raises:
      ValueError: params are missing, or the projection returns another structure or other shapes.
      TypeError: `projection` is not a function.

    Guarantees:
      After `optax.apply_updates` weights are projected to a few eps of the old or the new weight, the larger one, in
      the coarser dtype of updates and parameters. Updates keep their dtype, and their bits where the projection leaves
      a weight as it is.

    Example:
      >>> tx = project_weights(optax.projections.projection_non_negative)
      >>> weights = jnp.array([0.5, 2.0])
      >>> updates, _ = tx.update(jnp.array([-1.0, -1.0]), tx.init(weights), weights)
      >>> print(optax.apply_updates(weights, updates))
      [0. 1.]

    References:
      Projected gradient descent; `optax.projections`.
    """
    example = "For example: optax.projections.projection_non_negative."
    checks.function(projection, "projection", ("weights",), example)

    def project(weights, state, params, **extra_args):
        del params, extra_args
        step = checks.state(state, ValueClipState, first_step).clip_step
        projected = jax.tree.map(jnp.asarray, projection(weights))
        there, here = ([jnp.shape(x) for x in jax.tree.leaves(tree)] for tree in (projected, weights))
        if there != here or jax.tree.structure(projected) != jax.tree.structure(weights):
            raise ValueError(f"projection must keep all shapes, got {there} for {here}. Use one of optax.projections.")
        return projected, ValueClipState(next_step(step))

    return on_weights(first_step, project)


def on_weights(init: Callable, project: Callable) -> optax.GradientTransformationExtraArgs:
    """The update that takes the weights to `project(weights, state, params, **extra_args)`, with its state."""

    def update_fn(updates, state, params=None, **extra_args):
        leaves, treedef = jax.tree.flatten(updates)
        pairs = list(zip(leaves, weights_of(updates, params)))
        weights = treedef.unflatten(landing(*pair) if is_counted(pair[0]) else None for pair in pairs)
        projected, state = project(weights, state, params, **extra_args)
        targets = treedef.flatten_up_to(projected)
        new = [pair[0] if target is None else step_to(target, *pair) for target, pair in zip(targets, pairs)]
        return treedef.unflatten(new), state

    return optax.GradientTransformationExtraArgs(init, update_fn)


def weights_of(updates: Any, params: Any) -> list[Any]:
    """The weight for each leaf of the updates."""
    return params_of(updates, params, "The weights are bounded as they will be after the update.")


def widened(one: Any, other: Any) -> tuple[jax.Array, jax.Array]:
    """Both in one dtype that holds them, f32 at least."""
    dtype = np.promote_types(np.promote_types(np.float32, jnp.asarray(one).dtype), jnp.asarray(other).dtype)
    return jnp.asarray(one, dtype), jnp.asarray(other, dtype)


def landing(update: Any, weight: Any) -> jax.Array:
    """The weight after the update, in f32 at least."""
    if not is_counted(weight):
        raise ValueError(
            f"params must be floating or complex, got {checks.show(weight)}. Pass the parameters of these updates."
        )
    return jnp.add(*widened(weight, update))


def step_to(target: jax.Array, update: Any, weight: Any) -> jax.Array:
    """The update that takes the weight to `target`; the given one where that does so."""
    start, step = widened(weight, update)
    target = target.astype(start.dtype)
    return jnp.where(target == start + step, update, (target - start).astype(jnp.asarray(update).dtype))

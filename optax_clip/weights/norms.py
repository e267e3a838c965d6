"""Bounds for norms of weights."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from optax_clip._engine import blocks as engine
from optax_clip._engine import checks
from optax_clip._engine.leaves import is_counted
from optax_clip._engine.rules import rule_of
from optax_clip.clips.norms import clip_by_norm, clip_by_unit_norm, with_axis_name
from optax_clip.norms import leaf_norm
from optax_clip.responses import normalize
from optax_clip.weights.projections import on_weights, weights_of


def clip_weight_norm(
    max_norm: Any,
    axis: Any = None,
    *,
    ord: float | None = None,
    axis_name: Any = None,
    response: Callable | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Keeps the norm of each unit of the weights at `max_norm` or below: the max-norm constraint. Last in a chain.

    updates_u ← w_u · min(1, max_norm / norm(w_u)) - params_u,  w = params + updates

    This is `clip_by_unit_norm` of the weights.

    Args:
      max_norm: largest norm of a unit, >= 0, as for `clip_by_unit_norm`.
      axis: the axes that a unit extends over, as for `clip_by_unit_norm`: None for the rule by rank, by which vectors
        and matrices of one row are one unit; an int, a tuple, or a rule(path, leaf), where None leaves the leaf alone.
      ord: order of the norm, >= 1 or inf; None is 2.
      axis_name: as for `clip_by_unit_norm`.
      response: None for `shrink`; `normalize` holds each unit at `max_norm`: weight normalization.

    Returns:
      A transformation with the state `ClipState`, of the norms of the weights. Where a leaf has several units, the
      state has no threshold and no scale (None). `update` needs `params`.

    Raises:
      ValueError: a threshold is negative, NaN or not a scalar; an axis is out of range; `axis_name` or params are
        missing.
      TypeError: an argument is of the wrong kind.

    Guarantees:
      After `optax.apply_updates` norms are at most `max_norm` to a few eps of the old or the new weights, the larger
      ones, in the coarser dtype of updates and parameters. Updates keep their dtype, and those of units below
      `max_norm` keep their bits.

    Example:
      >>> tx = clip_weight_norm(5.0)
      >>> weights = jnp.array([[6.0, 0.5], [8.0, 0.25]])
      >>> updates, _ = tx.update(jnp.zeros((2, 2)), tx.init(weights), weights)
      >>> print(optax.apply_updates(weights, updates))
      [[3.   0.5 ]
       [4.   0.25]]

    References:
      Srebro, Shraibman, Rank, trace-norm and max-norm, 2005; Hinton and others, 2012, arXiv 1207.0580. Keras'
      `max_norm` constraint and, with `normalize`, `unit_norm`.
    """
    clip = clip_by_unit_norm(max_norm, axis, ord=ord, axis_name=axis_name, response=response)
    return on_weights(clip.init, clip.update)


def hold_weight_norm(
    norm: Callable[[Any], Any] | None = None, *, axis_name: Any = None
) -> optax.GradientTransformationExtraArgs:
    """Holds the norm of each block of weights where it was at `init`. Goes last in a chain.

    updates_b ← w_b · norm_b at init / norm(w_b) - params_b,  w = params + updates

    With updates of a norm in proportion to that of the weights this is Hyperball. Weights then turn by the same angle
    for the same learning rate, whatever their size.

    Args:
      norm: how big a block is, as for `clip_by_norm`; None is `leaf_norm` of leaves with two axes or more. A stack of
        matrices: `functools.partial(unit_norm, axis=(1, 2))`.
      axis_name: mesh axes of the norm, as for `clip_by_leaf_norm`, where `norm` is None.

    Returns:
      A transformation with the state `ClipState`, of the norms of the weights, whose `rule` has the norms at init: f32
      (f64 where a leaf is f64), one for each block. `update` needs `params`.

    Raises:
      ValueError: params are missing or, at init, shapes; in `update`, the state is of other blocks.
      TypeError: an argument is of the wrong kind, or a state is of another transformation.

    Guarantees:
      After `optax.apply_updates` norms are those at init to a few eps of the weights, in the coarser dtype of updates
      and parameters, for norms from 1e-30 on. They do not drift, as the norms at init stay. Blocks whose norm was 0 at
      init are left alone. A step at whose end a block would be exactly 0 is not taken. A block with a NaN or inf
      becomes NaN. Updates keep their dtype.

    Example:
      >>> tx = hold_weight_norm()
      >>> weights = {"w": jnp.array([[3.0, 4.0]]), "b": jnp.array([1.0])}
      >>> updates = {"w": jnp.array([[5.0, -4.0]]), "b": jnp.array([1.0])}
      >>> updates, state = tx.update(updates, tx.init(weights), weights)
      >>> print(optax.apply_updates(weights, updates), state.rule)
      {'b': Array([2.], dtype=float32), 'w': Array([[5., 0.]], dtype=float32)} 5.0

    References:
      Hyperball, arXiv 2606.16899, for matrices. levanter's code takes the norm before each step, which drifts.
    """
    norm = with_axis_name(norm, _matrix_norm, axis_name)
    checks.function(norm, "norm", ("updates",), "For example: functools.partial(unit_norm, axis=(1, 2)).")
    hold = rule_of(jnp.zeros_like, lambda _, held, *__, **___: (jnp.where(held == 0, jnp.inf, held), held))

    def measured(tree) -> tuple[engine.Blocks, Any]:
        blocks = engine.blocks_of(norm(tree), tree)
        return blocks, clip_by_norm(lambda _: blocks, hold, normalize)

    def init_fn(params):
        if any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(params)):
            raise ValueError(
                "params must be arrays at init, got shapes. Their norms are held. For the shapes of the state, call "
                "jax.eval_shape(tx.init, params)."
            )
        blocks, clip = measured(params)
        held = [group.norm for group in engine.groups_of(hold, blocks, params, "norm")]
        state = clip.init(params)
        return state._replace(rule=held[0] if len(held) == 1 else tuple(held)) if blocks.index else state

    def project(weights, state, params, **extra_args):
        blocks, clip = measured(weights)
        held, state = clip.update(weights, state, params, **extra_args)
        # What ends at 0 has no direction to scale, so it stays where it is.
        zero = [key is not None and blocks.norms[key] == 0 for key in blocks.index]
        pairs = zip(jax.tree.leaves(held), zero, weights_of(weights, params))
        new = [x if z is False else jnp.where(z, jnp.asarray(weight, x.dtype), x) for x, z, weight in pairs]
        return jax.tree.structure(held).unflatten(new), state

    return on_weights(init_fn, project)


def _matrix_norm(updates: Any, *, axis_name: Any = None) -> Any:
    matrices = jax.tree.map(lambda x: x if is_counted(x) and jnp.ndim(x) > 1 else None, updates)
    return leaf_norm(matrices, axis_name=axis_name)

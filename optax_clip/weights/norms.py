"""Bounds for norms of weights."""

from collections.abc import Callable
from typing import Any

import optax

from optax_clip.clips.norms import clip_by_unit_norm
from optax_clip.weights.projections import on_weights


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

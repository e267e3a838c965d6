"""Norm clips whose threshold adapts to the parameters."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax

from optax_clip import _checks
from optax_clip._clip_by_norm import norm_clip
from optax_clip._norms import unit_norm
from optax_clip._responses import shrink
from optax_clip._thresholds import as_thresholds, is_threshold, param_fraction


def adaptive_grad_clip(
    clipping: Any, eps: Any = 1e-3, axis: Any = None, *, axis_name: Any = None
) -> optax.GradientTransformationExtraArgs:
    """AGC: scales each unit so that its norm is at most a share of the norm of that unit's parameters.

    updates_u ← updates_u · t_u / max(norm_u, 1e-6)  where norm_u > t_u,  t_u = clipping · max(norm of params_u, eps)

    This is `clip_by_norm(unit_norm, param_fraction(clipping, unit_norm, eps))`.

    Args:
      clipping: largest ratio of the two norms, the paper's λ, >= 0: a number, a scalar array (traced too), an Optax
        schedule, a `Threshold`, None to measure only, or a prefix tree of these. The paper uses 0.01 for batches of
        1024 to 4096, and larger values up to 0.16 for smaller batches.
      eps: norm that a unit of the parameters is taken to have at least, >= 0, so that zero-initialized ones can move.
      axis: the axes that a unit extends over: None for the rule by rank of `unit_norm`, an int, a tuple, or a
        rule(path, leaf) that returns one of these, or None to leave the leaf alone. The paper leaves out the weight
        of the last linear layer; layers stacked for a scan, (layers, inputs, outputs), need axis 1.
      axis_name: inside `shard_map` or `pmap`, the mesh axes over which the entries of one unit are spread; required
        where a leaf varies.

    Returns:
      A transformation with the state `ClipState`: scalars, i32[] and f32[]. `update` needs `params`.

    Raises:
      ValueError: an argument is negative, NaN or not a scalar; an axis is out of range; params are missing.
      TypeError: an argument is of the wrong kind.

    Guarantees:
      As for `clip_by_global_norm`, unit by unit.

    Example:
      >>> tx = adaptive_grad_clip(0.1)
      >>> params, grads = jnp.array([[3.0], [4.0]]), jnp.array([[6.0], [8.0]])
      >>> updates, _ = tx.update(grads, tx.init(params), params)
      >>> print(updates)
      [[0.3]
       [0.4]]

    References:
      Brock, De, Smith, Simonyan, High-performance large-scale image recognition without normalization, 2021,
      arXiv 2102.06171. Numbers are those of `optax.adaptive_grad_clip`, whose docstring says that rank 3 reduces axes
      (0, 1, 2): its code, and this, reduce axis 0.
    """
    caller = "adaptive_grad_clip"
    axis = _checks.axis(axis, caller=caller)
    norm = functools.partial(unit_norm, axis=axis, axis_name=axis_name)
    rules = jax.tree.map(
        lambda share: param_fraction(share, norm, eps, caller=caller),
        as_thresholds(clipping, caller=caller, name="clipping"),
        is_leaf=is_threshold,
    )
    return norm_clip(norm, rules, _agc_shrink, caller=caller, name="clipping")


def _agc_shrink(norm: jax.Array, threshold: jax.Array) -> jax.Array:
    return jnp.where(norm > threshold, shrink(jnp.maximum(norm, 1e-6), threshold), 1.0)

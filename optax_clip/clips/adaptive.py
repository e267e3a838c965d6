"""Norm clips whose threshold adapts, to the parameters or to the norms of earlier steps."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from optax_clip._engine import checks
from optax_clip._engine.rules import as_rules
from optax_clip.clips.norms import norm_clip, with_axis_name
from optax_clip.norms import global_norm, leaf_norm, unit_norm
from optax_clip.thresholds.averages import ema_ratio, z_score
from optax_clip.thresholds.combine import param_fraction
from optax_clip.thresholds.quantiles import quantile
from optax_clip.thresholds.windows import sigma_window


def adaptive_grad_clip(
    clipping: Any, eps: Any = 1e-3, axis: Any = None, *, axis_name: Any = None, response: Callable | None = None
) -> optax.GradientTransformationExtraArgs:
    """AGC: scales each unit so that its norm is at most a share of the norm of that unit's parameters.

    updates_u ← updates_u · t_u / max(norm_u, 1e-6)  where norm_u > t_u,  t_u = clipping · max(norm of params_u, eps)

    This is `clip_by_norm(unit_norm, thresholds.param_fraction(clipping, eps))`, but that norms below 1e-6 are divided
    by 1e-6.

    Args:
      clipping: largest ratio of the two norms, the paper's λ, >= 0: a number, a scalar array (traced too), an Optax
        schedule, a rule, None to measure only, or a prefix tree of these. The paper uses 0.01 for batches of
        1024 to 4096, and larger values up to 0.16 for smaller batches.
      eps: norm that a unit of the parameters is taken to have at least, >= 0, so that zero-initialized ones can move.
      axis: the axes that a unit extends over: None for the rule by rank of `unit_norm`, an int, a tuple, or a
        rule(path, leaf) that returns one of these, or None to leave the leaf alone. The paper leaves out the weight
        of the last linear layer; layers stacked for a scan, (layers, inputs, outputs), need axis 1.
      axis_name: inside `shard_map` or `pmap`, the mesh axes over which the entries of one unit are spread; required
        where a leaf varies over a mesh axis.
      response: None for that of the formula, or as for `clip_by_global_norm`.

    Returns:
      A transformation with the state `ClipState`: scalars, i32[] and f32[]. Where a leaf has several units, the
      state has no threshold and no scale (None). `update` needs `params`.

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
      arXiv 2102.06171. In f32 numbers are those of `optax.adaptive_grad_clip`. The docstring of its `unitwise_norm`
      says that rank 3 reduces axes (0, 1, 2): its code, and this, reduce axis 0.
    """
    norm = functools.partial(unit_norm, axis=checks.axes(axis), axis_name=axis_name)
    shares = as_rules(clipping, "clipping")
    rules = jax.tree.map(lambda share: param_fraction(share, eps), shares, is_leaf=checks.is_transformation)
    return norm_clip(norm, rules, response or _agc_shrink, "clipping")


def _agc_shrink(norm: jax.Array, threshold: jax.Array) -> jax.Array:
    """`shrink`, with the divisor of AGC: norms below 1e-6 are divided by 1e-6."""
    return jnp.where(norm > threshold, jnp.minimum(norm * 1e6, 1.0) * threshold, norm)


def autoclip(
    percentile: Any = 10.0,
    window: int = 1024,
    *,
    norm: Callable[[Any], Any] | None = None,
    axis_name: Any = None,
    response: Callable | None = None,
) -> optax.GradientTransformationExtraArgs:
    """AutoClip: scales the updates so that their norm is at most a percentile of the norms so far.

    updates ← updates · min(1, c / norm),  c = percentile p of the last norms, the present one included

    This is `clip_by_norm(global_norm, thresholds.quantile(percentile, window))`.

    Args:
      percentile: p, in [0, 100], a number or traced scalar. The paper recommends 10, which clips about 90 % of the
        steps: the threshold then acts as a learning rate that adapts. 90 or more cuts off spikes only.
      window: norms to remember, an int >= 1 (under `optax.inject_hyperparams` a `static_args`). The paper keeps all:
        the same while there are no more than `window` steps.
      norm: what is a block, each with a history of its own: None for `global_norm`; `leaf_norm`,
        `group_norm(labels)`, `functools.partial(unit_norm, axis=...)`. Other scopes are the paper's future work.
      axis_name: mesh axes of the norm, as for `clip_by_global_norm`, where `norm` is None.
      response: as for `clip_by_global_norm`.

    Returns:
      A transformation with the state `ClipState`: scalars, i32[] and f32[], and in `rule` a `QuantileState`.

    Raises:
      ValueError: an argument is out of range.
      TypeError: an argument is of the wrong kind.

    Guarantees:
      As for `clip_by_global_norm`. The first step is not clipped. A norm that is not finite leaves no trace in the
      history. Costs O(window) for each step and block, without a sort.

    Example:
      >>> tx = autoclip(50.0)
      >>> state = tx.init(jnp.zeros(1))
      >>> for gradient in (1.0, 3.0, 100.0):
      ...     updates, state = tx.update(jnp.array([gradient]), state)
      ...     print(updates)
      [1.]
      [2.]
      [3.]

    References:
      Seetharaman, Wichern, Pardo, Le Roux, AutoClip: adaptive gradient clipping for source separation networks, 2020,
      arXiv 2007.14469. The norm enters the history before the percentile is taken, as in the paper.
    """
    return norm_clip(with_axis_name(norm, global_norm, axis_name), quantile(percentile, window), response, "threshold")


def zclip(
    z_max: Any = 2.5,
    decay: Any = 0.97,
    warmup_steps: Any = 25,
    *,
    spike: str = "rescale",
    factor: Any = None,
    norm: Callable[[Any], Any] | None = None,
    axis_name: Any = None,
    response: Callable | None = None,
) -> optax.GradientTransformationExtraArgs:
    """ZClip: scales down the spikes, updates whose norm is far above the average of the norms, and nothing else.

    z = (norm - mean) / (deviation + 1e-6 · mean);  z > z_max: updates ← updates · c / norm,
    c = (mean + z_max · deviation · z_max / z) · factor  (spike = "rescale"),  mean  ("mean"),
    or mean + z_max · deviation, also for z ≤ z_max  ("limit")

    This is `clip_by_norm(global_norm, thresholds.z_score(...))`. Mean and deviation are exponential averages of the
    norms after clipping. The authors clip a second time, by `max_grad_norm`:
    `optax.chain(zclip(), clip_by_global_norm(1.0))`.

    Args:
      z_max: deviations above the mean from which a norm is a spike, >= 0, a number or traced scalar; 2 to 2.5 in the
        paper.
      decay: decay of the averages, the paper's α, in [0, 1], likewise.
      warmup_steps: norms to collect before anything is clipped, >= 0, likewise; at least one norm is collected.
      spike: what to do about a spike: "rescale" (the larger, the more), "mean" or "limit".
      factor: what "rescale" multiplies the threshold by, >= 0, a number or traced scalar; None is 1.
      norm: what is a block, as for `autoclip`.
      axis_name: mesh axes of the norm, as for `clip_by_global_norm`, where `norm` is None.
      response: to a spike, as for `clip_by_global_norm`; the averages take in min(norm, c) whatever it is.

    Returns:
      A transformation with the state `ClipState`: scalars, i32[] and f32[], and in `rule` a `ZScoreState`.

    Raises:
      ValueError: an argument is out of range.
      TypeError: an argument is of the wrong kind.

    Guarantees:
      As for `clip_by_global_norm`. Nothing is clipped in warm-up. A norm that is not finite leaves no trace in the
      statistics, in warm-up neither; while all norms were 0, warm-up goes on.

    Example:
      >>> tx = zclip(warmup_steps=4)
      >>> state = tx.init(jnp.zeros(1))
      >>> for gradient in (1.0, 1.2, 0.8, 1.1, 10.0):
      ...     updates, state = tx.update(jnp.array([gradient]), state)
      >>> print(f"{updates.item():.4f}")
      1.0402

    References:
      Kumar, Owen, Chowdhury, Güra, ZClip: adaptive spike mitigation for LLM pre-training, 2025, arXiv 2504.02507.
      Numbers are those of the authors' package, which calls the decay `alpha` and "limit" its percentile mode. It adds
      1e-6 to the deviation whatever the size of the norms, so that norms of 1e-8 may grow a hundredfold; here 1e-6 of
      the mean, which changes thresholds by less than 1e-4 of themselves where norms are about 1.
    """
    rule = z_score(z_max, decay, warmup_steps, spike=spike, factor=factor)
    return norm_clip(with_axis_name(norm, global_norm, axis_name), rule, response, "threshold")


def adagc(
    max_norm: Any = 1.0,
    max_ratio: Any = 1.05,
    decay: Any = 0.98,
    warmup_steps: Any = 100,
    *,
    norm: Callable[[Any], Any] | None = None,
    axis_name: Any = None,
    response: Callable | None = None,
) -> optax.GradientTransformationExtraArgs:
    """AdaGC: scales each leaf so that its norm is at most a little above the average of its norms so far.

    updates_i ← updates_i · min(1, max_ratio · γ_i / norm_i),  γ_i ← decay · γ_i + (1 - decay) · norm_i after clipping;
    in warm-up instead updates_i ← updates_i · min(1, max_norm / global norm),  γ_i ← min(γ_i, norm_i after clipping)

    This is `clip_by_norm(leaf_norm, thresholds.ema_ratio(...))`.

    Args:
      max_norm: largest norm of all blocks together in warm-up, the paper's λ_abs: a number, traced scalar, schedule,
        or None for no bound.
      max_ratio: largest ratio of a norm to its average, the paper's λ_rel, >= 0, a number or traced scalar.
      decay: decay of the average, the paper's β, in [0, 1], likewise.
      warmup_steps: steps in which all blocks are scaled together, the paper's T_start, >= 0, likewise.
      norm: what is a block: None for `leaf_norm`, or as for `autoclip`.
      axis_name: mesh axes of the norm, as for `clip_by_global_norm`, where `norm` is None.
      response: as for `clip_by_global_norm`; the averages take in min(norm, threshold) whatever it is.

    Returns:
      A transformation with the state `ClipState`: scalars, i32[] and f32[], and in `rule` an `EmaRatioState`.

    Raises:
      ValueError: an argument is out of range.
      TypeError: an argument is of the wrong kind.

    Guarantees:
      As for `clip_by_leaf_norm`. A norm that is not finite leaves no trace in any average; in warm-up, where all blocks
      are scaled together, such a block makes all NaN. Norms of 0 do not become an average in warm-up: see `ema_ratio`.
      An average grows by at most 1 + (1 - decay) · (max_ratio - 1) in each step, here 1.001: a spike in warm-up, which
      scales all blocks down, holds the others back for long.

    Example:
      >>> tx = adagc(max_norm=5.0, max_ratio=1.1, warmup_steps=1)
      >>> state = tx.init({"w": jnp.zeros(1), "b": jnp.zeros(1)})
      >>> for w, b in ((6.0, 8.0), (6.0, 4.0)):
      ...     updates, state = tx.update({"w": jnp.array([w]), "b": jnp.array([b])}, state)
      ...     print(f"{updates['w'].item():.2f} {updates['b'].item():.2f}")
      3.00 4.00
      3.30 4.00

    References:
      Wang, Li, Dong and others, AdaGC: improving training stability for large language model pretraining, 2025,
      arXiv 2502.11034. The defaults are those of early ports. The authors' code has 1.04, 0.99 and 101 warm-up steps,
      and takes the smallest norm of warm-up before clipping; the algorithm in the paper, and this, after it.
    """
    rule = ema_ratio(max_norm, max_ratio, decay, warmup_steps)
    return norm_clip(with_axis_name(norm, leaf_norm, axis_name), rule, response, "threshold")


def clip_by_sigma(
    sigmas: Any = 3.0,
    window: int = 128,
    *,
    norm: Callable[[Any], Any] | None = None,
    axis_name: Any = None,
    response: Callable | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Scales the updates so that their norm is at most some deviations above the mean of the last norms.

    updates ← updates · min(1, c / norm),  c = mean + sigmas · max(deviation, 1e-6 · mean), over the norms of earlier
    steps, as they were before clipping, so that spikes raise c

    This is `clip_by_norm(global_norm, thresholds.sigma_window(sigmas, window))`.

    Args:
      sigmas: deviations above the mean, >= 0, a number or traced scalar.
      window: norms to remember, an int >= 1 (under `optax.inject_hyperparams` a `static_args`). Nothing is clipped
        before half of them are there.
      norm: what is a block, as for `autoclip`.
      axis_name: mesh axes of the norm, as for `clip_by_global_norm`, where `norm` is None.
      response: as for `clip_by_global_norm`.

    Returns:
      A transformation with the state `ClipState`: scalars, i32[] and f32[], and in `rule` a `SigmaWindowState`.

    Raises:
      ValueError: an argument is out of range.
      TypeError: an argument is of the wrong kind.

    Guarantees:
      As for `clip_by_global_norm`. A norm that is not finite leaves no trace in the window.

    Example:
      >>> tx = clip_by_sigma(2.0, window=2)
      >>> state = tx.init(jnp.zeros(1))
      >>> for gradient in (4.0, 2.0, 9.0):
      ...     updates, state = tx.update(jnp.array([gradient]), state)
      ...     print(updates)
      [4.]
      [2.]
      [5.]

    References:
      The clipping by the history of norms in the levanter library, in which one NaN switches it off for a window, and
      the smallest deviation is 1e-6 whatever the size of the norms; here 1e-6 of the mean.
    """
    return norm_clip(with_axis_name(norm, global_norm, axis_name), sigma_window(sigmas, window), response, "threshold")

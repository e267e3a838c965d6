"""A bound for the logits of attention, kept by the weights of queries and keys."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer

from optax_clip._engine import checks, mesh
from optax_clip._engine.leaves import is_counted, keystr, wide
from optax_clip._engine.numbers import cast
from optax_clip._engine.sums import fold
from optax_clip.weights.projections import on_weights


class QK(NamedTuple):
    """How a leaf makes the queries or keys of an attention. `clip_qk` asks for it."""

    attention: Any  # the name of its logits in `max_logits`
    axis: Any = -2  # of heads, an int; or (layers, heads) where layers are stacked, as in the logits then
    share: Any = 0.5  # leaf ← leaf · factor^share: a number >= 0, or an array of them that broadcasts against the leaf
    heads: int | None = None  # of the leaf, where the axis has heads · size entries, as in Equinox and PyTorch


class QKClipState(NamedTuple):
    """What `clip_qk` saw in its last step. Read it with `clip_metrics`."""

    max_logit: jax.Array  # f32[]: the largest logit of all heads; inf where one is NaN
    heads_clipped: jax.Array  # f32[]: share of heads whose logit was above the bound


def clip_qk(
    parts: Callable[[Any, Any], QK | None], max_logit: Any = 100.0, *, axis_name: Any = None
) -> optax.GradientTransformationExtraArgs:
    """Scales queries and keys of each head whose largest logit exceeded `max_logit`: QK-clip. Goes last in a chain.

    updates_h ← w_h · factor_h^share - params_h,  w = params + updates
    factor_h = max_logit / logit_h where max_logit < logit_h < inf;  else 1

    The logits are products of queries and keys, over the root of their size, before the softmax. Call
    `update(updates, state, params, max_logits={name: logits})` with the largest of each head in the step at hand: an
    array (..., heads). Of the axes before, which may be those of a batch, the maximum is taken.

    Args:
      parts: a function (path, leaf) that returns `QK(attention, axis, share, heads)` for a leaf that makes queries or
        keys, and None for other leaves. `attention` is the name of its logits. `axis` is that of heads: by default the
        last but one, as in kernels (inputs, heads, size) and biases (heads, size); (layers, heads) for stacked layers.
        `share` is the power, 0.5 by default: a number, or an array that broadcasts against the leaf. Where the axis
        holds heads * size entries, `heads` is the number of heads of the leaf. Keys that several heads share, as in
        GQA, take the smallest factor of their group.
      max_logit: largest logit (τ in the paper), >= 0, a number or traced scalar.
      axis_name: inside `shard_map` or `pmap`, the mesh axes that heads are split over, in weights and logits alike: a
        name, or a tuple of names; () where every device holds all heads. Required where weights vary over devices.

    Returns:
      A transformation with the state `QKClipState`: two f32[]. `update` takes an empty state too, and needs `params`.

    Raises:
      ValueError: `max_logit` is negative or NaN; `parts` names no leaf; an axis, a share or the number of heads does
        not fit; logits or params are missing; inside `shard_map`, logits are not split as heads are.
      TypeError: an argument is of the wrong kind.

    Guarantees:
      Where shares of queries and keys sum up to 1, the largest logit of a head comes down to `max_logit`, to the
      rounding of the updates; as logits are those before the step, the step itself may move it a little. Heads whose
      logit is at most `max_logit` (negative or 0, too), NaN or inf keep their updates bit for bit, where weights are
      not NaN. Updates keep their dtype. For the weights nothing is sent between devices.

    Example:
      >>> tx = clip_qk(lambda path, leaf: QK("attention", share=1.0) if "query" in path[0].key else None)
      >>> weights = {"query": jnp.ones((1, 2, 2)), "key": jnp.ones((1, 2, 2))}  # two heads of size 2
      >>> updates = jax.tree.map(jnp.zeros_like, weights)
      >>> logits = {"attention": jnp.array([50.0, 400.0])}
      >>> updates, state = tx.update(updates, tx.init(weights), weights, max_logits=logits)
      >>> print(updates["query"][0], state.max_logit, state.heads_clipped)
      [[ 0.    0.  ]
       [-0.75 -0.75]] 400.0 0.5

    References:
      Kimi Team, Kimi K2, 2025, arXiv 2507.20534. Its factor is min(1, τ / logit), of which there is no root where the
      logit is negative; here it is 1.
    """
    example = 'lambda path, leaf: QK("attention") if "query" in str(path) else None'
    checks.function(parts, "parts", ("path", "leaf"), f"For example: {example}.")
    checks.scalar(max_logit, "max_logit", 0.0)

    def rows_of(weights):
        counted = [row for row in jax.tree_util.tree_leaves_with_path(weights) if is_counted(row[1])]
        return [(*row, _fitting(parts(*row), *row)) for row in counted]

    def init_fn(params=None):
        rows = rows_of(params)
        if rows and not any(part for *_, part in rows):
            raise ValueError(
                f"parts must return a QK for some leaves, got None for {[keystr(row[0]) for row in rows[:4]]} and all. "
                "Name the leaves that make queries and keys."
            )
        return QKClipState(jnp.zeros([], jnp.float32), jnp.zeros([], jnp.float32))

    def project(weights, state, params, *, max_logits=None, **extra_args):
        del params, extra_args
        state, rows = checks.state(state, QKClipState, init_fn), rows_of(weights)
        if not rows:
            return weights, state
        names = {part.attention for *_, part in rows if part}
        if not isinstance(max_logits, Mapping) or set(max_logits) != names:
            got = max_logits if not isinstance(max_logits, Mapping) else f"those of {sorted(map(str, max_logits))}"
            raise ValueError(
                f"max_logits must have the largest logits of each of {sorted(map(str, names))}, as parts names them, "
                f"got {got}. Call update(updates, state, params, max_logits={{name: logits}})."
            )
        seen = {}

        def scaled(path, weight, part):
            if part is None:
                return None
            logits, heads, axes = _of_heads(max_logits[part.attention], path, weight, part, axis_name)
            limit = jnp.maximum(cast(max_logit, logits.dtype), 0.0)
            high = (logits > limit) & (logits < jnp.inf)
            seen[part.attention] = logits, high, axes
            factor = jnp.where(high, limit, 1.0) / jnp.where(high, logits, 1.0)
            # Keys that heads share take the smallest factor of these, and each entry of a head takes that of the head.
            factor = factor.reshape(*logits.shape[:-1], heads, -1).min(-1)
            size = weight.shape[part.axis[-1]] // heads
            factor = jnp.broadcast_to(factor[..., None], (*factor.shape, size)).reshape(*factor.shape[:-1], -1)
            factor = factor.transpose(np.argsort(part.axis))
            factor = jnp.expand_dims(factor, [axis for axis in range(weight.ndim) if axis not in part.axis])
            return weight * (factor ** jnp.asarray(part.share, factor.dtype)).astype(weight.dtype)

        new = jax.tree.structure(weights).unflatten([scaled(*row) for row in rows])
        over = lambda collective, x, axes: collective(x, axes) if axes else x
        largest = [over(jax.lax.pmax, jnp.max(logits), axes) for logits, _, axes in seen.values()]
        shares = [over(jax.lax.pmean, jnp.mean(high.astype(jnp.float32)), axes) for _, high, axes in seen.values()]
        return new, QKClipState(fold(jnp.maximum, largest).astype(jnp.float32), fold(jnp.add, shares) / len(shares))

    return on_weights(init_fn, project)


def _fitting(part: Any, path: tuple, leaf: Any) -> QK | None:
    """What `parts` returned, with the axes as a tuple of numbers >= 0."""
    if part is None:
        return None
    shape, (name, axis, share, _) = jnp.shape(leaf), part if isinstance(part, QK) else QK("", ())
    checks.hashable([name])
    given: Any = () if axis is None or callable(axis) else checks.axes(axis)
    axes = tuple(a + len(shape) if a < 0 else a for a in given)
    broadcasts = jnp.ndim(share) <= len(shape) and all(n in (1, m) for n, m in zip(jnp.shape(share)[::-1], shape[::-1]))
    distinct = len(set(axes) & set(range(len(shape)))) == len(axes) > 0
    positive = checks.is_real(share) and (isinstance(share, Tracer) or bool(np.all(np.asarray(share) >= 0)))
    if not (distinct and broadcasts and positive):
        raise ValueError(
            f"parts must return None or a QK that fits the leaf, got {checks.show(part)} for {keystr(path)} of shape "
            f"{shape}. The axis is that of heads, or (layers, heads); the share is >= 0 and broadcasts to the leaf."
        )
    heads = part.heads if part.heads is None else checks.static(part.heads, "heads", 1, integer=True)
    return part._replace(axis=axes, heads=heads)


def _of_heads(max_logits: Any, path: tuple, weight: jax.Array, part: QK, axis_name: Any) -> tuple:
    """The largest logit of each head, with the axes of `part.axis`, the heads of the leaf, and mesh axes of heads."""
    logits = jnp.atleast_1d(jax.lax.stop_gradient(jnp.asarray(max_logits)).astype(wide(weight)))
    # Maxima over devices may lose a NaN. An inf is as loud.
    logits = jnp.max(jnp.where(jnp.isnan(logits), jnp.inf, logits), tuple(range(logits.ndim - len(part.axis))))
    *layers, entries = (weight.shape[axis] for axis in part.axis)
    heads = part.heads or entries
    if logits.shape[:-1] != tuple(layers) or logits.shape[-1] % heads or entries % heads:
        raise ValueError(
            f"max_logits[{part.attention!r}] must end in an axis for each of {part.axis} of {keystr(path)}, got shape "
            f"{jnp.shape(max_logits)} where the leaf has {(*layers, entries)}, and {heads} heads. Keys may have fewer "
            "heads by a whole factor. Where the last of these axes holds heads * size entries, pass heads= to QK."
        )
    (names,), split, spread = mesh.names_for(axis_name, logits), mesh.varying(logits), mesh.varying(weight)
    # The type does not tell which axis of a leaf is split, and keys may have fewer heads than there are logits.
    if (names is None and spread) or split != spread & ({names} if isinstance(names, str) else set(names or ())):
        raise ValueError(
            f"max_logits must be split over devices as the heads of {keystr(path)} are, got logits that vary over "
            f"{sorted(split)} for weights that vary over {sorted(spread)}. Take jax.lax.pmax of logits over axes of "
            "data. Pass the axes that split heads as axis_name, () for none."
        )
    return logits, heads, mesh.summed_over([logits], [names], [path], units=True)[0]

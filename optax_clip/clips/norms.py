"""Norm clips at a given threshold: each is a norm, a threshold and a response put into `clip_by_norm`."""

import functools
from collections.abc import Callable, Hashable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_clip._engine import blocks as engine
from optax_clip._engine import checks
from optax_clip._engine.numbers import cast, next_step
from optax_clip._engine.rules import Fixed, as_rule, as_rules, reads
from optax_clip._engine.scale import clip_tree
from optax_clip.norms import block_rms, global_norm, group_norm, leaf_norm, unit_norm
from optax_clip.responses import normalize, shrink
from optax_clip.thresholds.combine import between


class ClipState(NamedTuple):
    """What a norm clip measured in its last step. Read it with `clip_metrics`."""

    clip_step: jax.Array  # i32[]: updates so far
    norm: jax.Array  # f32[]: before clipping; over several blocks, the root of the sum of their squares
    # f32[]: mean over blocks that have one; None where blocks are units; the largest f32 where no block has a threshold
    threshold: Any
    clip_scale: Any  # f32[]: mean over blocks of norm after / norm; None where blocks are units
    clipped: jax.Array  # f32[]: share of blocks whose norm was above the threshold
    clip_rate: jax.Array  # f32[]: mean of that over all steps
    rule: Any  # what the threshold keeps


def clip_by_norm(
    norm: Callable[[Any], Any], threshold: Any, response: Callable | None = None
) -> optax.GradientTransformationExtraArgs:
    """Scales each block of the updates to the norm that its threshold asks for: the engine of every norm clip.

    updates_b ← updates_b · response(norm_b, threshold_b) / norm_b

    Args:
      norm: how big each block is: `global_norm`, `leaf_norm`, `unit_norm`, `block_rms`, `group_norm(labels)`, one of
        these configured by `functools.partial`, or your own function from updates to a prefix tree of arrays. Each
        entry of the prefix tree is a block; None leaves the leaves below it alone.
      threshold: what a norm is compared with, >= 0, in units of the norm. A number, a scalar array (traced too), an
        Optax schedule, None (measure only), a rule (`thresholds.z_score()`, or any Optax transformation from the norm
        of one block to its threshold), or a prefix tree of these. All leaves of a block must have the same one.
      response: what becomes of the norm: `responses.shrink` (the default), `normalize`, `smooth`, `tanh`, or a function
        (norm, threshold) -> norm after. It is asked only where 0 < norm < inf and threshold < inf. A result below 0
        acts as 0.

    Returns:
      A transformation with the state `ClipState`: i32[] and f32[] scalars, and what the threshold keeps. Where blocks
      are units, the state has no threshold and no scale. Where every threshold is a number or None, `update` takes an
      empty state too: `optax.EmptyState()`, `()` or None.

    Raises:
      ValueError: a threshold is negative, NaN or not a scalar; a tree of thresholds does not fit; in `update`, the
        state holds the history of another threshold or of other blocks.
      TypeError: an argument is of the wrong kind.

    Guarantees:
      Updates of a block that is not scaled, and all updates under a threshold of inf or None, are bit-identical.
      A block with a NaN or inf becomes NaN throughout; its norm counts as not clipped and leaves no trace in a rule.
      Shapes and dtypes are kept; products are taken in f32 or better. Norms may lie between 1e-30 and 3e38 before and
      after. A traced threshold below 0 acts as 0, and one of NaN makes the block NaN. Integer, boolean and other leaves
      without a norm are returned as they are.

    Example:
      >>> tx = clip_by_norm(leaf_norm, 1.0, responses.smooth)
      >>> updates, state = tx.update({"w": jnp.array([3.0])}, tx.init({"w": jnp.zeros(1)}))
      >>> print(updates["w"], state.norm)
      [0.75] 3.0
    """
    return norm_clip(norm, threshold, response, "threshold")


def norm_clip(
    norm: Callable[[Any], Any], threshold: Any, response: Callable | None, name: str, change: Callable | None = None
) -> optax.GradientTransformationExtraArgs:
    """`clip_by_norm`, where the user knows the threshold by another name, or where leaves `change` otherwise."""
    checks.function(norm, "norm", ("updates",), "For example: functools.partial(unit_norm, axis=0).")
    if response is not None:
        checks.function(response, "response", ("norm", "threshold"), "For example: responses.smooth.")
    by_label = isinstance(threshold, engine.ByLabel)
    rules = threshold if by_label else as_rules(threshold, name)
    each = threshold.of.values() if by_label else jax.tree.leaves(rules, is_leaf=checks.is_transformation)
    has_rules = not all(isinstance(rule, Fixed) for rule in each)
    has_history = any("history" in reads(rule) for rule in each)

    def init_fn(params):
        blocks = engine.shapes_of(norm, params)
        units = any(n.ndim for n in blocks.norms.values())
        # optax.tree.map_params asks with an empty tree, and takes one array for all that a rule keeps.
        history = jnp.zeros([], jnp.int32) if has_rules else ()
        if blocks.index:
            known = not any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(params))
            if has_rules and known and (units or jax.sharding.get_abstract_mesh().manual_axes):
                blocks = engine.blocks_of(norm(params), params)  # for the sharding and mesh axes of the state
            groups = engine.groups_of(rules, blocks, params, name)
            history = engine.first_state(groups) if has_rules else ()
        number = lambda x: jnp.full([], x, jnp.float32)  # arrays of their own, so that states can be donated
        means = (None, None) if units else (number(0), number(1))
        return ClipState(jnp.zeros([], jnp.int32), number(0), *means, number(0), number(0), history)

    def update_fn(updates, state, params=None, **extra_args):
        state = checks.state(state, ClipState, None if has_history else lambda: init_fn(updates))
        blocks = engine.blocks_of(norm(updates), updates)
        if not blocks.index and has_rules:
            return updates, state._replace(clip_step=next_step(state.clip_step))
        units = any(n.ndim for n in blocks.norms.values())
        if units != (state.threshold is None):
            raise ValueError(
                "state must be that of a clip with the blocks of these updates: one has units and the other has not. "
                "Start this clip anew and keep all other states: in a chain, (clip.init(params), *state[1:])."
            )
        groups = engine.groups_of(rules, blocks, updates, name)
        total = engine.total_norm(groups, units=units)
        context = {**extra_args, "step": state.clip_step, "total_norm": total}
        of_params = lambda: engine.param_norms(norm, blocks, updates, params)
        thresholds, history = engine.thresholds_of(groups, state.rule, of_params, context)
        clipped, (mean, scale, share) = clip_tree(updates, blocks, groups, thresholds, response or shrink, change)
        step = next_step(state.clip_step)
        rate = state.clip_rate + (share - state.clip_rate) / step.astype(jnp.float32)
        return clipped, ClipState(step, jnp.asarray(cast(total, jnp.float32)), mean, scale, share, rate, history)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def with_axis_name(norm: Callable | None, default: Callable, axis_name: Any) -> Callable:
    """The norm of a clip that takes one: the default with its mesh axes, or what the user gave."""
    if norm is None:
        return functools.partial(default, axis_name=axis_name)
    if axis_name is not None:
        raise ValueError(
            f"axis_name must be None where norm is given, got {axis_name!r}. Pass it to the norm: "
            "functools.partial(leaf_norm, axis_name=...)."
        )
    return norm


def clip_by_global_norm(
    max_norm: Any, *, ord: float | None = None, axis_name: Any = None, response: Callable | None = None
) -> optax.GradientTransformationExtraArgs:
    """Scales all updates together so that the norm of the whole tree is at most `max_norm`.

    updates ← updates · min(1, max_norm / norm),  norm = (Σ |x|^ord)^(1/ord) over all entries

    This is `clip_by_norm(global_norm, max_norm)`.

    Args:
      max_norm: largest norm, >= 0: a number, a scalar array (traced too), an Optax schedule, a rule, or None to measure
        only. See `clip_by_norm`.
      ord: order of the norm, >= 1 or inf; None is 2.
      axis_name: mesh axes to sum over where types do not tell (`shard_map(check_vma=False)`, `pmap`).
      response: what becomes of the norm, as for `clip_by_norm`; None is `responses.shrink`.

    Returns:
      A transformation with the state `ClipState`: scalars, i32[] and f32[].

    Raises:
      ValueError: `max_norm` is negative, NaN or not a scalar; `ord` is below 1.
      TypeError: an argument is of the wrong kind.

    Guarantees:
      Below `max_norm`, bit-identical; above, the direction is kept and the norm is `max_norm` to a few eps of the
      leaves' dtype. A NaN or inf anywhere makes every entry NaN. See `clip_by_norm` for the rest.

    Example:
      >>> tx = clip_by_global_norm(1.0)
      >>> grads = {"w": jnp.array([3.0]), "b": jnp.array([4.0])}
      >>> updates, state = tx.update(grads, tx.init(grads))
      >>> print(updates["w"], updates["b"], state.norm)
      [0.6] [0.8] 5.0

    References:
      Pascanu, Mikolov, Bengio, On the difficulty of training recurrent neural networks, 2012, arXiv 1211.5063.
      In f32 numbers are those of `optax.clip_by_global_norm`; PyTorch's `clip_grad_norm_` divides by the norm + 1e-6.
    """
    return norm_clip(_norm(global_norm, ord, axis_name), as_rule(max_norm, "max_norm"), response, "max_norm")


def clip_by_leaf_norm(
    max_norm: Any, *, ord: float | None = None, axis_name: Any = None, response: Callable | None = None
) -> optax.GradientTransformationExtraArgs:
    """Scales each leaf so that its norm is at most `max_norm`.

    updates_i ← updates_i · min(1, max_norm / norm_i),  norm_i = (Σ |x|^ord)^(1/ord) over the entries of leaf i

    This is `clip_by_norm(leaf_norm, max_norm)`.

    Args:
      max_norm: largest norm of a leaf, >= 0, as for `clip_by_global_norm`; or a prefix tree of such values, in which
        None measures only: `{"encoder": 1.0, "head": None}`.
      ord: order of the norm, >= 1 or inf; None is 2.
      axis_name: as for `clip_by_global_norm`; also a prefix tree.
      response: as for `clip_by_global_norm`.

    Returns:
      A transformation with the state `ClipState`: scalars, i32[] and f32[].

    Raises:
      ValueError: a threshold is negative, NaN or not a scalar, or the tree does not fit the updates; `ord` is below 1.
      TypeError: an argument is of the wrong kind.

    Guarantees:
      As for `clip_by_global_norm`, leaf by leaf: one bad leaf leaves the others alone.

    Example:
      >>> tx = clip_by_leaf_norm({"w": 1.0, "b": None})
      >>> grads = {"w": jnp.array([3.0, 4.0]), "b": jnp.array([9.0])}
      >>> updates, _ = tx.update(grads, tx.init(grads))
      >>> print(updates["w"], updates["b"])
      [0.6 0.8] [9.]

    References:
      `clipnorm` of Keras optimizers and `tf.clip_by_norm`.
    """
    return norm_clip(_norm(leaf_norm, ord, axis_name), max_norm, response, "max_norm")


def clip_by_unit_norm(
    max_norm: Any,
    axis: Any = None,
    *,
    ord: float | None = None,
    axis_name: Any = None,
    response: Callable | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Scales each unit of each leaf so that its norm is at most `max_norm`.

    updates_u ← updates_u · min(1, max_norm / norm_u),  norm_u = (Σ |x|^ord)^(1/ord) over the entries of unit u

    This is `clip_by_norm(unit_norm, max_norm)`. A unit is what feeds one output: a column of a matrix.

    Args:
      max_norm: largest norm of a unit, >= 0, as for `clip_by_leaf_norm`.
      axis: the axes that a unit extends over: None for the rule by rank of `unit_norm`, an int, a tuple, or a
        rule(path, leaf) that returns one of these, or None to leave the leaf alone.
      ord: order of the norm, >= 1 or inf; None is 2.
      axis_name: inside `shard_map` or `pmap`, the mesh axes over which the entries of one unit are spread; required
        where a leaf varies.
      response: as for `clip_by_global_norm`.

    Returns:
      A transformation with the state `ClipState`: scalars, i32[] and f32[]. Where a leaf has several units, the
      state has no threshold and no scale (None).

    Raises:
      ValueError: a threshold is negative, NaN or not a scalar; an axis is out of range; `axis_name` is missing.
      TypeError: an argument is of the wrong kind.

    Guarantees:
      As for `clip_by_global_norm`, unit by unit.

    Example:
      >>> tx = clip_by_unit_norm(1.0)
      >>> grads = jnp.array([[3.0, 0.1], [4.0, 0.2]])
      >>> updates, _ = tx.update(grads, tx.init(grads))
      >>> print(updates)
      [[0.6 0.1]
       [0.8 0.2]]

    References:
      Units as in Brock, De, Smith, Simonyan, 2021, arXiv 2102.06171.
    """
    norm = functools.partial(_norm(unit_norm, ord, axis_name), axis=checks.axes(axis))
    return norm_clip(norm, max_norm, response, "max_norm")


def clip_by_block_rms(
    threshold: Any, *, axis: Any = None, axis_name: Any = None, response: Callable | None = None
) -> optax.GradientTransformationExtraArgs:
    """Scales each leaf so that its root mean square is at most `threshold`.

    updates_i ← updates_i / max(1, rms_i / threshold),  rms_i = sqrt(mean of |x|² over leaf i)

    This is `clip_by_norm(block_rms, threshold)`.

    Args:
      threshold: largest root mean square, >= 0, as `max_norm` of `clip_by_leaf_norm`.
      axis: None for whole leaves; or an int, a tuple or a rule(path, leaf) as for `clip_by_unit_norm`.
      axis_name: as for `clip_by_global_norm`, and as for `clip_by_unit_norm` where `axis` is given.
      response: as for `clip_by_global_norm`.

    Returns:
      A transformation with the state `ClipState`: scalars, i32[] and f32[]. Where `axis` is given and a leaf has
      several units, the state has no threshold and no scale (None).

    Raises:
      ValueError: a threshold is negative, NaN or not a scalar; an axis is out of range; `axis_name` is missing.
      TypeError: an argument is of the wrong kind.

    Guarantees:
      As for `clip_by_global_norm`, leaf by leaf.

    Example:
      >>> tx = clip_by_block_rms(1.0)
      >>> grads = jnp.array([3.0, 4.0, 0.0, 0.0])
      >>> updates, _ = tx.update(grads, tx.init(grads))
      >>> print(updates)
      [1.2 1.6 0.  0. ]

    References:
      Shazeer, Stern, Adafactor, 2018, arXiv 1804.04235, where it clips the update and the threshold is 1. In f32
      numbers are those of `optax.clip_by_block_rms`.
    """
    norm = functools.partial(block_rms, axis=checks.axes(axis), axis_name=axis_name)
    return norm_clip(norm, threshold, response, "threshold")


def clip_by_group_norm(
    max_norms: Mapping[Hashable, Any],
    labels: Any,
    *,
    ord: float | None = None,
    axis_name: Any = None,
    response: Callable | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Scales each group of leaves so that the norm of the group is at most its own threshold, in one pass.

    updates_g ← updates_g · min(1, max_norms[g] / norm_g),  norm_g over all entries of the leaves labeled g

    This is `clip_by_norm(group_norm(labels), ...)` with one threshold for each label.

    Args:
      max_norms: threshold for each label, >= 0, as `max_norm` of `clip_by_global_norm`; None leaves the group alone.
      labels: prefix tree of labels, or a function of the updates that returns one, as for `optax.partition`. None as
        a label leaves these leaves out: neither counted nor scaled.
      ord: order of the norm, >= 1 or inf; None is 2.
      axis_name: as for `clip_by_leaf_norm`.
      response: as for `clip_by_global_norm`.

    Returns:
      A transformation with the state `ClipState`: scalars, i32[] and f32[].

    Raises:
      ValueError: a threshold is negative, NaN or not a scalar; a label has no threshold; `ord` is below 1.
      TypeError: an argument is of the wrong kind.

    Guarantees:
      As for `clip_by_global_norm`, group by group.

    Example:
      >>> tx = clip_by_group_norm({"body": 1.0, "head": None}, {"w": "body", "b": "body", "out": "head"})
      >>> grads = {"w": jnp.array([3.0]), "b": jnp.array([4.0]), "out": jnp.array([7.0])}
      >>> updates, _ = tx.update(grads, tx.init(grads))
      >>> print(updates["w"], updates["b"], updates["out"])
      [0.6] [0.8] [7.]

    References:
      The same as `optax.partition` over one `clip_by_global_norm` for each label, but needs no masks.
    """
    if not isinstance(max_norms, Mapping):
        raise TypeError(
            f"max_norms must map each label to its threshold, got {checks.show(max_norms)}. "
            'For example: {"encoder": 1.0, "head": None}.'
        )
    rules = engine.ByLabel({label: as_rule(value, f"max_norms[{label!r}]") for label, value in max_norms.items()})
    if not checks.is_function(labels):
        rules.checked(jax.tree.leaves(labels))
    return norm_clip(group_norm(labels, ord=ord, axis_name=axis_name), rules, response, "max_norms")


def clip_by_norm_range(
    min_norm: Any, max_norm: Any, *, norm: Callable[[Any], Any] | None = None, axis_name: Any = None
) -> optax.GradientTransformationExtraArgs:
    """Bounds the norm from both sides: blocks below `min_norm` are scaled up to it, blocks above `max_norm` down to it.

    updates_b ← updates_b · min(max(norm_b, min_norm), max_norm) / norm_b;  zero stays zero

    This is `clip_by_norm` with the response `normalize` and the norm moved into the range as threshold, which is what
    the state reports; `clip_rate` counts blocks that were scaled down.

    Args:
      min_norm: smallest norm, >= 0, as `max_norm` of `clip_by_global_norm`; None for no lower bound.
      max_norm: largest norm, >= min_norm, likewise; None for no upper bound. Where values that are known only in the
        compiled program cross, `max_norm` wins.
      norm: how big a block is; None is `global_norm`.
      axis_name: mesh axes of the norm, as for `clip_by_global_norm`, where `norm` is None.

    Returns:
      A transformation with the state `ClipState`: scalars, i32[] and f32[], and the states of the two bounds.

    Raises:
      ValueError: a bound is negative, NaN or not a scalar; min_norm > max_norm.
      TypeError: an argument is of the wrong kind.

    Guarantees:
      Inside the range, bit-identical. See `clip_by_norm` for the rest.

    Example:
      >>> tx = clip_by_norm_range(1.0, 2.0)
      >>> for grads in (jnp.array([0.3, 0.4]), jnp.array([0.6, 0.8]), jnp.array([6.0, 8.0]), jnp.zeros(2)):
      ...     print(tx.update(grads, tx.init(grads))[0])
      [0.6 0.8]
      [0.6 0.8]
      [1.2 1.6]
      [0. 0.]

    References:
      Cutting gradients from both sides; with equal bounds, normalized gradient descent.
    """
    checks.ordered(min_norm, max_norm, "min_norm", "max_norm")
    rule = between(0.0 if min_norm is None else min_norm, max_norm)
    return norm_clip(with_axis_name(norm, global_norm, axis_name), rule, normalize, "max_norm")


def _norm(norm: Callable, ord: float | None, axis_name: Any) -> Callable:
    """The norm with its options. `ord` is checked here, where the user calls."""
    ord = None if ord is None else checks.static(ord, "ord", 1.0)
    return functools.partial(norm, ord=ord, axis_name=axis_name)

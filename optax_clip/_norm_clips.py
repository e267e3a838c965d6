"""Norm clips at a given threshold: each is a norm, a threshold and a response put into `clip_by_norm`."""

import functools
from collections.abc import Callable, Hashable, Mapping
from typing import Any

import jax
import optax

from optax_clip import _checks
from optax_clip._clip_by_norm import norm_clip
from optax_clip._norms import block_rms, global_norm, group_norm, leaf_norm, unit_norm
from optax_clip._responses import normalize
from optax_clip._rules import between
from optax_clip._thresholds import as_threshold


def clip_by_global_norm(
    max_norm: Any, *, ord: float | None = None, axis_name: Any = None, response: Callable | None = None
) -> optax.GradientTransformationExtraArgs:
    """Scales all updates together so that the norm of the whole tree is at most `max_norm`.

    updates ← updates · min(1, max_norm / norm),  norm = (Σ |x|^ord)^(1/ord) over all entries

    This is `clip_by_norm(global_norm, max_norm)`.

    Args:
      max_norm: largest norm, >= 0: a number, a scalar array (traced too), an Optax schedule, a `Threshold`, or None to
        measure only.
      ord: order of the norm, >= 1 or inf; None is 2.
      axis_name: mesh axes to sum over where types do not tell (`shard_map(check_vma=False)`, `pmap`).
      response: None for `shrink`; or `normalize`, `smooth`, `tanh`, or a function (norm, threshold) -> scale.

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
    caller = "clip_by_global_norm"
    rule = as_threshold(max_norm, caller=caller, name="max_norm")
    return norm_clip(_with_ord(global_norm, ord, axis_name, caller), rule, response, caller=caller, name="max_norm")


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
    caller = "clip_by_leaf_norm"
    return norm_clip(_with_ord(leaf_norm, ord, axis_name, caller), max_norm, response, caller=caller, name="max_norm")


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
      A transformation with the state `ClipState`: scalars, i32[] and f32[].

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
    return unit_clip(max_norm, axis, ord, axis_name, response, caller="clip_by_unit_norm")


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
      A transformation with the state `ClipState`: scalars, i32[] and f32[].

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
    caller = "clip_by_block_rms"
    norm = functools.partial(block_rms, axis=_checks.axis(axis, caller=caller), axis_name=axis_name)
    return norm_clip(norm, threshold, response, caller=caller, name="threshold")


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

    This is `clip_by_norm(group_norm(labels), ...)` with a threshold a label.

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
      The same as `optax.partition` over one `clip_by_global_norm` a label, without a mask for each.
    """
    caller = "clip_by_group_norm"
    if not isinstance(max_norms, Mapping):
        raise TypeError(
            f"{caller}: max_norms must map each label to its threshold, got {type(max_norms).__name__}. "
            'For example: {"encoder": 1.0, "head": None}.'
        )
    rules = {
        label: as_threshold(value, caller=caller, name=f"max_norms[{label!r}]") for label, value in max_norms.items()
    }
    idle = as_threshold(None, caller=caller, name="max_norms")
    norm = _with_ord(group_norm, ord, axis_name, caller)

    def clip_of(updates):
        tree = labels(updates) if _checks.is_function(labels) else labels
        missing = _checks.labels(tree, caller=caller) - set(rules)
        if missing:
            lacking, there = (", ".join(sorted(map(repr, keys))) or "none" for keys in (missing, rules))
            raise ValueError(
                f"{caller}: labels has {lacking} without a threshold in max_norms, which has {there}. Add what is "
                "missing; None leaves a group alone."
            )
        thresholds = jax.tree.map(lambda label: rules.get(label, idle), tree, is_leaf=lambda label: label is None)
        every = [*rules.values(), idle]
        return norm_clip(norm(tree), thresholds, response, caller=caller, name="labels", rules=every)

    if not _checks.is_function(labels):
        clip_of({})

    def init_fn(params):
        return clip_of(params).init(params)

    def update_fn(updates, state, params=None, **extra_args):
        return clip_of(updates).update(updates, state, params, **extra_args)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def clip_by_norm_range(
    min_norm: Any, max_norm: Any, *, norm: Callable[[Any], Any] | None = None
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
    caller = "clip_by_norm_range"
    low = as_threshold(0.0 if min_norm is None else min_norm, caller=caller, name="min_norm")
    high = as_threshold(max_norm, caller=caller, name="max_norm")
    _checks.ordered(min_norm, max_norm, caller=caller, low="min_norm", high="max_norm")
    norm = global_norm if norm is None else norm
    return norm_clip(norm, between(low, high), normalize, caller=caller, name="max_norm")


def unit_clip(
    max_norm: Any, axis: Any, ord: float | None, axis_name: Any, response: Callable | None, *, caller: str
) -> optax.GradientTransformationExtraArgs:
    """`clip_by_unit_norm`, of whatever the caller gives it."""
    norm = functools.partial(_with_ord(unit_norm, ord, axis_name, caller), axis=_checks.axis(axis, caller=caller))
    return norm_clip(norm, max_norm, response, caller=caller, name="max_norm")


def _with_ord(norm: Callable, ord: float | None, axis_name: Any, caller: str) -> Callable:
    """The norm with its options, `ord` checked under the name of the clip that the user called."""
    if ord is not None:
        ord = _checks.static_number(ord, caller=caller, name="ord", low=1.0)
    return functools.partial(norm, ord=ord, axis_name=axis_name)

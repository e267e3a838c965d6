"""The engine: measure each block, compare with a threshold, scale the block."""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.core import Tracer

from optax_clip import _checks
from optax_clip._blocks import broadcast, is_counted, on_one_device, varying, wide
from optax_clip._packing import Packing, packing_alike, packing_of
from optax_clip._reductions import real_parts, root, root_of_squares, squares, total
from optax_clip._responses import shrink
from optax_clip._thresholds import Threshold, as_thresholds, is_threshold, thresholds_of


class ClipState(NamedTuple):
    """What a norm clip measured in its last step. Read it with `clip_metrics`."""

    step: jax.Array  # i32[]: updates so far
    norm: jax.Array  # f32[]: before clipping; over several blocks, the root of the sum of their squares
    threshold: jax.Array  # f32[]: mean over blocks
    scale: jax.Array  # f32[]: mean over blocks; 1 where nothing was clipped
    clip_rate: jax.Array  # f32[]: mean over steps of the share of blocks whose norm was above the threshold
    rule: Any  # what the threshold keeps


def clip_by_norm(
    norm: Callable[[Any], Any], threshold: Any, response: Callable | None = None
) -> optax.GradientTransformationExtraArgs:
    """Scales each block of the updates by what its norm and its threshold ask for: the engine of every norm clip.

    updates_b ← updates_b · response(norm_b, threshold_b)

    Args:
      norm: how big each block is: `global_norm`, `leaf_norm`, `unit_norm`, `block_rms`, `group_norm(labels)`, one of
        these configured by `functools.partial`, or a function from updates to a prefix tree of arrays (leaves that
        carry the same array are one block, so do not compile it by itself; None leaves them alone).
      threshold: >= 0, in units of the norm. A number, a scalar array (traced too), an Optax schedule, a `Threshold`
        (`z_score()`, `quantile()`, ...), an Optax transformation from norm to threshold, None (measure only), or a
        prefix tree of these where blocks are leaves or smaller.
      response: from a block's norm and threshold to its factor: `shrink` (the default), `normalize`, `smooth`,
        `tanh`, or a function of two arrays, asked only where 0 < norm < inf and threshold < inf. Below 0 acts as 0.

    Returns:
      A transformation with the state `ClipState`: i32[] and f32[] scalars, and what the threshold keeps.

    Raises:
      ValueError: a threshold is negative, NaN or not a scalar, or a tree of thresholds does not fit.
      TypeError: an argument is of the wrong kind.

    Guarantees:
      Updates of a block that is not scaled, and all updates under a threshold of inf or None, are bit-identical.
      A block with a NaN or inf becomes NaN throughout, and its norm does not enter the clip rate. Shapes and dtypes
      are kept; products are taken in f32 or better and rounded once. Integer, boolean and other leaves without a
      norm are returned as they are.

    Example:
      >>> tx = clip_by_norm(leaf_norm, 1.0, smooth)
      >>> updates, state = tx.update({"w": jnp.array([3.0])}, tx.init({"w": jnp.zeros(1)}))
      >>> print(updates["w"], state.norm)
      [0.75] 3.0
    """
    return norm_clip(norm, threshold, response, caller="clip_by_norm", name="threshold")


def norm_clip(
    norm: Callable[[Any], Any],
    threshold: Any,
    response: Callable | None,
    *,
    caller: str,
    name: str,
    rules: Sequence[Threshold] | None = None,
) -> optax.GradientTransformationExtraArgs:
    """`clip_by_norm` with the names that the user knows: of the clip and of the argument that is the threshold.

    `rules` lists the rules of a tree of thresholds where the tree may lack some of them: each keeps its state.
    """
    init_fn, step = norm_step(norm, threshold, response, caller=caller, name=name, rules=rules)

    def update_fn(updates, state, params=None, **extra_args):
        del extra_args
        return step(updates, state, params)[:2]

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def norm_step(
    norm: Callable[[Any], Any],
    threshold: Any,
    response: Callable | None,
    *,
    caller: str,
    name: str,
    rules: Sequence[Threshold] | None = None,
) -> tuple[Callable, Callable]:
    """The functions of `norm_clip`. The second, of updates, state and params, also returns the share above."""
    _checks.function(norm, caller=caller, name="norm", example="functools.partial(unit_norm, axis=0)")
    if response is not None:
        _checks.function(response, caller=caller, name="response", example="smooth")
    respond = shrink if response is None else response
    tree = as_thresholds(threshold, caller=caller, name=name)

    def init_fn(params):
        leaves, treedef = jax.tree.flatten(params)

        @jax.jit  # so that norms that no rule looks at are not taken
        def rule_state(counted):
            arrays = iter(counted)
            params = treedef.unflatten([next(arrays) if is_counted(leaf) else leaf for leaf in leaves])
            return _Blocks(norm(params), params, tree, rules, caller, name).init()

        counted = [leaf for leaf in leaves if is_counted(leaf)]
        rule = rule_state.eval_shape(counted)
        if jax.tree.leaves(rule):  # most rules keep nothing, and need no program
            rule = rule_state(counted)
        zeros = [jnp.zeros([], jnp.float32) for _ in range(3)]
        return ClipState(jnp.zeros([], jnp.int32), zeros[0], zeros[1], jnp.ones([], jnp.float32), zeros[2], rule)

    def step_fn(updates, state, params):
        _checks.state(state, ClipState, caller=caller)
        blocks = _Blocks(norm(updates), updates, tree, rules, caller, name)
        try:
            thresholds, rule = blocks.thresholds(state.rule, params)
            factors, summary = _in_few_kernels(respond, caller, blocks.norms, thresholds)
        except (AttributeError, TypeError, ValueError):
            blocks.check_state(state.rule)
            raise
        scaled = [_scaling(factor) for factor in blocks.packing.unpack_to_kernels(factors)]
        leaves, treedef = jax.tree.flatten(updates)
        clipped = [leaf if b is None else scaled[b](leaf) for leaf, b in zip(leaves, blocks.of_leaf)]
        norm_of_all, mean_threshold, mean_scale, share = summary
        step = jnp.asarray(optax.safe_increment(state.step))
        clip_rate = state.clip_rate + (share - state.clip_rate) / step.astype(jnp.float32)
        new = ClipState(step, norm_of_all, mean_threshold, mean_scale, clip_rate, rule)
        return treedef.unflatten(clipped), new, share

    return init_fn, step_fn


class _Blocks:
    """The blocks of a tree of updates: their norms, which leaf belongs to which, and which rule governs each."""

    norms: list[jax.Array]  # packed: scalars under one rule are one vector
    packing: Packing
    of_leaf: list[int | None]

    def __init__(
        self, norm_tree: Any, updates: Any, rule_tree: Any, rules: Sequence[Threshold] | None, caller: str, name: str
    ):
        self.updates, self.caller = updates, caller
        self.single = isinstance(rule_tree, Threshold)
        rules = jax.tree.leaves(rule_tree, is_leaf=is_threshold) if rules is None else rules
        self.rules = list({id(rule): rule for rule in rules}.values())
        norms = broadcast(norm_tree, updates, caller=caller, name="the result of norm")
        by_leaf = [norm if is_counted(leaf) else None for norm, leaf in zip(norms, jax.tree.leaves(updates))]
        for norm, leaf in zip(by_leaf, jax.tree.leaves(updates)):
            if norm is not None and not _fits(jnp.shape(norm), jnp.shape(leaf)):
                raise ValueError(
                    f"{caller}: norm must return arrays that broadcast against their leaves, got shape "
                    f"{jnp.shape(norm)} for a leaf of shape {jnp.shape(leaf)}. Reduce with keepdims=True."
                )
        # A norm that is one array for the whole tree is a block even where the tree is empty.
        whole = [norm_tree] if _checks.is_leaf(norm_tree) and norm_tree is not None else []
        distinct = {id(norm): norm for norm in [*whole, *by_leaf] if norm is not None}
        place = {key: i for i, key in enumerate(distinct)}
        blocks = [jnp.asarray(norm) for norm in distinct.values()]
        blocks = [norm.astype(wide(norm)) for norm in blocks]  # those of the user, too
        self.of_leaf = [None if norm is None else place[id(norm)] for norm in by_leaf]
        self.rule_of = self._rules_of_blocks(rule_tree, len(blocks), name)
        self.packing = packing_of(blocks, self.rule_of)
        self.norms = self.packing.pack(blocks)

    def _rules_of_blocks(self, rule_tree: Any, blocks: int, name: str) -> list[int]:
        if self.single or not jax.tree.leaves(self.updates):
            return [0] * blocks
        number = {id(rule): r for r, rule in enumerate(self.rules)}
        numbered = jax.tree.map(lambda rule: number[id(rule)], rule_tree, is_leaf=is_threshold)
        rule_of: list[int] = [-1] * blocks
        for b, r in zip(self.of_leaf, broadcast(numbered, self.updates, caller=self.caller, name=name)):
            if b is not None and rule_of[b] not in (-1, r):
                raise ValueError(
                    f"{self.caller}: leaves that share a norm have different values of {name}. They are one block, "
                    "which has one threshold. Use clip_by_leaf_norm, or clip_by_group_norm with a label a threshold."
                )
            if b is not None:
                rule_of[b] = r
        return rule_of

    def _by_rule(self) -> list[tuple[Threshold, list[int]]]:
        """Each rule with the places of its norms."""
        return [
            (rule, [i for i, group in enumerate(self.packing.groups) if self.rule_of[group[0]] == r])
            for r, rule in enumerate(self.rules)
        ]

    def init(self) -> Any:
        return self._merge([rule.init(tuple(self.norms[i] for i in own)) for rule, own in self._by_rule()])

    def check_state(self, state: Any) -> None:
        """Raises where the state is that of other blocks. Takes a trace of `init`: only where something went wrong."""
        needed, given = ([jnp.shape(x) for x in jax.tree.leaves(s)] for s in (jax.eval_shape(self.init), state))
        for there, wanted in itertools.zip_longest(given, needed, fillvalue="none"):
            if there != wanted:
                raise ValueError(
                    f"{self.caller}: the state must be that of these updates, got {len(given)} arrays where they need "
                    f"{len(needed)}, and one of shape {there} where they need {wanted}. Pass updates of the parameters "
                    "that init saw, or make a new state."
                )

    def _merge(self, states: list) -> Any:
        """The state of a single rule; for a tree of rules a tuple of theirs."""
        return states[0] if self.single else tuple(states)

    def thresholds(self, state: Any, params: Any) -> tuple[list[jax.Array], Any]:
        """One for each of `norms`."""
        states = [state] if self.single else state
        out: list = [None] * len(self.norms)
        new_states = []
        for (rule, own), old in zip(self._by_rule(), states):
            norms = tuple(self.norms[i] for i in own)
            blocks = {b for i in own for b in self.packing.groups[i]}
            own_params = self._params_of(params, blocks) if rule.needs_params else None
            values, new = thresholds_of(rule, norms, old, own_params)
            new_states.append(new)
            for i, value in zip(own, values):
                out[i] = jnp.maximum(value, 0.0)  # keeps NaN
        return out, self._merge(new_states)

    def _params_of(self, params: Any, blocks: set[int]) -> Any:
        """The tree of parameters with None for leaves of other blocks."""
        _checks.params_given(params, caller=self.caller)
        leaves = _checks.params_like(self.updates, params, caller=self.caller)
        kept = [p if b in blocks else None for p, b in zip(leaves, self.of_leaf)]
        return jax.tree.structure(self.updates).unflatten(kept)


def _fits(norm: tuple[int, ...], leaf: tuple[int, ...]) -> bool:
    return len(norm) <= len(leaf) and all(n in (1, size) for n, size in zip(norm[::-1], leaf[::-1]))


def _in_few_kernels(respond: Callable, caller: str, norms: list, thresholds: list) -> tuple[list, list]:
    """What to multiply by, for each of the norms, and their summary.

    On a single GPU, norms of one shape are one array here, which takes one kernel instead of one a leaf. TPUs take
    longer to put them together, and on a mesh they may lie on different devices.
    """

    def answers(norms, thresholds):
        pairs = [_scale_and_factor(n, t, respond, caller) for n, t in zip(norms, thresholds)]
        return [factor for _, factor in pairs], _summary(norms, thresholds, [scale for scale, _ in pairs])

    def together(norms, thresholds):
        factors, summary = answers(packing.pack(norms), packing.pack(list(map(_spread, thresholds, norms))))
        return packing.unpack(factors), summary

    packing = packing_alike(norms)
    traced = any(isinstance(norm, Tracer) for norm in norms)  # a choice outside of jit compiles each time
    if not traced or len(packing.groups) == len(norms) or not on_one_device(norms):
        return answers(norms, thresholds)
    return jax.lax.platform_dependent(norms, thresholds, cuda=together, rocm=together, default=answers)


def _scale_and_factor(
    norm: jax.Array, threshold: jax.Array, respond: Callable, caller: str
) -> tuple[jax.Array, jax.Array]:
    """The scale of a block, to report, and what to multiply by: the scale; or, negative, the root of one that may leave
    the range of f32, to multiply by twice."""
    ones = jnp.ones_like(norm)  # outside of jit, a choice between two numbers is not spread as its condition is
    off = threshold == jnp.inf
    valid = jnp.isfinite(norm) & ~jnp.isnan(threshold)
    live = valid & (norm > 0) & ~off
    n, t = jnp.where(live, norm, 1.0), jnp.where(live, threshold, 1.0)

    def response_to(n):
        answer = respond(n, t)
        if jnp.shape(answer) not in ((), norm.shape):
            raise ValueError(
                f"{caller}: response must return a factor for each norm, got shape {jnp.shape(answer)} for norms of "
                f"shape {norm.shape}. It is a function of two arrays, norm and threshold, entry by entry."
            )
        return jnp.where(answer < 0, 0.0, answer)

    scale = jnp.where(live, response_to(n), jnp.where(valid | off, ones, jnp.nan)).astype(norm.dtype)
    # A scale below the smallest normal f32 would be flushed to 0, one above the largest is inf: there, the norm is
    # measured in units of 2^96 or 2^-96.
    far = (scale < 2.0**-100) & (n * 2.0**-96 > t * 2.0**24) & (t > 0)
    near = (scale > 2.0**100) & (t * 2.0**-96 > n * 2.0**24)
    half = jnp.where(far, 2.0**-48, jnp.where(near, 2.0**48, ones)).astype(norm.dtype)
    root_of_scale = root(jnp.where(far | near, response_to(n * half * half), 1.0), 1 / half)
    factor = jnp.where(far | near, -root_of_scale, jnp.where((norm == 0) & (threshold == 0), 0.0, scale))
    # XLA's CPU backend computes what precedes a division once for a unit, and what precedes cheaper operations anew for
    # every entry. The divisor is 1, since norms are not negative, but it does not know that.
    one = jnp.where(norm < 0, 2.0, ones).astype(norm.dtype)
    return scale, factor.astype(norm.dtype) / one


def _scaling(factor: jax.Array) -> Callable[[Any], jax.Array]:
    """The function that scales a leaf: multiplied in f32 or better and rounded once; itself where the scale is 1."""
    # Here what all leaves of the block share, once: a program over 1000 leaves is quicker to compile.
    again = jnp.where(factor < 0, factor, 1.0).astype(factor.dtype)
    kept = factor == 1

    def scaled(leaf):
        x = jnp.asarray(leaf)
        parts = [part * factor.astype(part.dtype) * again.astype(part.dtype) for part in real_parts(x)]
        # x * 1 would flush subnormal numbers on some processors.
        return jnp.where(kept, x, (jax.lax.complex(*parts) if len(parts) == 2 else parts[0]).astype(x.dtype))

    return scaled


def _spread(threshold: jax.Array, norm: jax.Array) -> jax.Array:
    """In the shape of the norm, and on meshes with explicit axes in its sharding, which a sum with zeros has."""
    return threshold + jnp.zeros_like(norm)


def _summary(norms: list, thresholds: list, scales: list) -> list[jax.Array]:
    """Total norm, mean threshold, mean scale, share of blocks above their thresholds: f32[] each."""
    if not any(n.size for n in norms):
        return [jnp.full([], x, jnp.float32) for x in (0.0, 0.0, 1.0, 0.0)]
    # Scales, not factors: on GPUs, all sums over one array then share a kernel with what computes its factors.
    scales = [scale.astype(jnp.float32) for scale in scales]
    above = [((n > t) & jnp.isfinite(n)).astype(jnp.float32) for n, t in zip(norms, thresholds)]
    norms = [n.astype(jnp.float32) for n in norms]
    thresholds = [t.astype(jnp.float32) for t in thresholds]
    if len(norms) == 1 and norms[0].ndim == 0:
        return [norms[0], thresholds[0], scales[0], above[0]]
    rows = [
        (*squares(n), _spread(t, n), scale, is_above) for n, t, scale, is_above in zip(norms, thresholds, scales, above)
    ]
    low, high, *sums = total(rows)
    count = sum(n.size * math.prod(jax.lax.axis_size(name) for name in varying(n)) for n in norms)
    # XLA multiplies by the reciprocal of the count, and n · (1 / n) may miss 1.
    return [root_of_squares(low, high), *(jnp.where(x == count, 1.0, x / count) for x in sums)]

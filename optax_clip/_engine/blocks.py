"""Blocks of a tree of updates, the rule of each, and the lifting of rules over blocks."""

import dataclasses
from collections.abc import Callable, Hashable, Iterable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optax_clip._engine import checks
from optax_clip._engine.leaves import is_counted, keystr, params_of, spread, wide
from optax_clip._engine.mesh import varying
from optax_clip._engine.numbers import cast, within_reciprocals
from optax_clip._engine.rules import Fixed, fixed, reads
from optax_clip._engine.sums import fold


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Norms of blocks, and which leaf belongs to which block."""

    norms: dict[Hashable, jax.Array]  # for each block a scalar, or an array that broadcasts against its only leaf
    index: tuple[Hashable, ...]  # for each leaf its key, or None


# Not as a dict, whose keys JAX sorts: labels need only be hashable.
jax.tree_util.register_pytree_node(
    Blocks,
    lambda blocks: (tuple(blocks.norms.values()), (tuple(blocks.norms), blocks.index)),
    lambda keys, norms: Blocks(dict(zip(keys[0], norms)), keys[1]),
)


def blocks_of(found: Any, updates: Any) -> Blocks:
    """What a norm found in the updates, as `Blocks`, in f32 at least."""
    leaves = jax.tree_util.tree_leaves_with_path(updates)
    if isinstance(found, Blocks):
        norms, keys = found.norms, found.index
        if len(keys) != len(leaves) or not {key for key in keys if key is not None} <= set(norms):
            raise ValueError(
                f"norm must return Blocks with a known key or None for each leaf, got {list(keys)}. Correct the index."
            )
    else:
        arrays, treedef = jax.tree.flatten(found)
        norms = dict(enumerate(arrays))
        keys = spread(treedef.unflatten(list(norms)), updates, "the result of norm")
    norms = {key: (found := jnp.asarray(norm)).astype(wide(found)) for key, norm in norms.items()}
    index = tuple(key if is_counted(leaf) else None for key, (_, leaf) in zip(keys, leaves))
    for key, (path, leaf) in zip(index, leaves):
        shape, size = () if key is None else norms[key].shape, jnp.shape(leaf)
        if len(shape) > len(size) or any(n not in (1, s) for n, s in zip(shape[::-1], size[::-1])):
            raise ValueError(
                f"norm must return arrays that broadcast against their leaves, got shape {shape} for the leaf "
                f"{keystr(path)} of shape {size}. Reduce with keepdims=True."
            )
    return Blocks(norms, index)


def shapes_of(norm: Callable[[Any], Any], params: Any) -> Blocks:
    """The blocks that `norm` finds in the parameters, with shapes and dtypes for norms. Nothing is computed."""
    leaves, treedef = jax.tree.flatten(params)

    def measured(counted):
        arrays = iter(counted)
        tree = treedef.unflatten([next(arrays) if is_counted(leaf) else leaf for leaf in leaves])
        return blocks_of(norm(tree), tree)

    return jax.eval_shape(measured, [leaf for leaf in leaves if is_counted(leaf)])


def _rules_of(rules: Any, blocks: Blocks, updates: Any, name: str) -> dict[Hashable, Any]:
    """The rule of each block, from one rule, a prefix tree of rules, or rules by label."""
    if isinstance(rules, optax.GradientTransformation):
        return dict.fromkeys(blocks.norms, rules)
    if isinstance(rules, ByLabel):
        return {label: rules.of[label] for label in rules.checked(blocks.norms)}
    found: dict = {key: (fixed(None, name), ()) for key in set(blocks.norms) - set(blocks.index)}
    leaves = jax.tree_util.tree_leaves_with_path(updates)
    for key, rule, (path, _) in zip(blocks.index, spread(rules, updates, name, checks.is_transformation), leaves):
        if key is not None and found.setdefault(key, (rule, path))[0] is not rule:
            raise ValueError(
                f"{name} has different values for {keystr(found[key][1])} and {keystr(path)}, which share one norm. A "
                "block has one threshold. Use clip_by_leaf_norm, or clip_by_group_norm with more labels."
            )
    return {key: found[key][0] for key in blocks.norms}


@dataclasses.dataclass(frozen=True)
class ByLabel:
    """Rules for blocks whose keys are labels."""

    of: dict[Hashable, Any]

    def checked(self, labels: Iterable) -> list:
        """The labels but None, each of which has a rule."""
        labels = [label for label in labels if label is not None]
        checks.hashable(labels)
        if missing := {label for label in labels if label not in self.of}:
            lacking, there = (", ".join(sorted(map(repr, keys))) or "none" for keys in (missing, self.of))
            raise ValueError(
                f"max_norms must have a threshold for each label, got labels {lacking} beside thresholds for {there}. "
                "Add what is missing; None leaves a group alone."
            )
        return labels


class Group(NamedTuple):
    """Blocks that are one array for their rule: a unit each, or scalars alike as one vector."""

    rules: list  # one for all; or one for each key, where all are `Fixed`
    reads: frozenset  # what they read
    first: Any  # what the rule keeps of one block before the first update, as shapes
    keys: list
    norm: jax.Array

    def joined(self, norms: dict) -> jax.Array:
        """Norms by key, as one array."""
        return norms[self.keys[0]] if len(self.keys) == 1 else jnp.stack([norms[key] for key in self.keys])

    def lifted(self, function: Callable) -> Callable:
        """The function of one block, over all blocks."""
        for _ in range(self.norm.ndim):
            function = jax.vmap(function)
        return function


def groups_of(rules: Any, blocks: Blocks, updates: Any, name: str) -> list[Group]:
    """The blocks, put together as far as they go together. Norms may be shapes."""
    groups: dict = {}
    rules = _rules_of(rules, blocks, updates, name)
    for key, rule in rules.items():
        norm = blocks.norms[key]
        alike = key if norm.ndim else (norm.dtype, varying(norm) if isinstance(norm, jax.Array) else frozenset())
        groups.setdefault((isinstance(rule, Fixed) or id(rule), alike), []).append(key)
    made = []
    for (same, _), keys in groups.items():
        norms = [blocks.norms[key] for key in keys]
        norms = [norm if isinstance(norm, jax.Array) else jnp.zeros(norm.shape, norm.dtype) for norm in norms]
        first = () if same is True else jax.eval_shape(rules[keys[0]].init, jax.ShapeDtypeStruct((), norms[0].dtype))
        own = list({id(rules[key]): rules[key] for key in keys}.values())
        own = own if len(own) == 1 else [rules[key] for key in keys]
        # XLA:CPU 0.10.2 stacks anew in each kernel that reads the vector, unless a barrier stands between: a leaf clip
        # of 400 leaves compiles in 5.9 s without it, 4.9 s with it.
        norm = norms[0] if len(norms) == 1 else jax.lax.optimization_barrier(jnp.stack(norms))
        made.append(Group(own, reads(own[0]), first, keys, norm))
    return made


def first_state(groups: list[Group]) -> Any:
    """What the rules keep before the first update."""

    def init(group):
        norm = group.norm

        def like_norm(x):  # the select gives each entry the sharding and the mesh axes of its block
            x = jnp.asarray(x)
            like = jax.lax.broadcast_in_dim(norm.astype(x.dtype), norm.shape + x.shape, range(norm.ndim))
            return jnp.where(True, x, like)

        return jax.tree.map(like_norm, group.rules[0].init(jnp.zeros([], norm.dtype)))

    return _merged([init(group) for group in groups if jax.tree.leaves(group.first)])


def thresholds_of(groups: list[Group], state: Any, params: Callable[[], dict], context: dict) -> tuple[list[Any], Any]:
    """The thresholds of each group, one for all or one each, and what the rules keep.

    This is the place where bad norms stay out of the state.
    """
    thresholds, kept = [], []
    of_params = params() if any("params" in group.reads for group in groups) else {}
    for group, old in zip(groups, _states(state, groups)):
        if isinstance(group.rules[0], Fixed):
            values = [cast(rule.update(group.norm, (), **context)[0], group.norm.dtype) for rule in group.rules]
            stack = np.stack if all(isinstance(value, np.generic) for value in values) else jnp.stack
            thresholds.append(values[0] if len(values) == 1 else stack(values))
            continue
        param_norm = group.joined(of_params) if "params" in group.reads else None
        update = _guarded(group.rules[0], context)
        update = group.lifted(update) if "history" in group.reads else update
        threshold, new = update(group.norm, old, param_norm)
        thresholds.append(threshold)
        kept += [new] if jax.tree.leaves(new) else []
    return thresholds, _merged(kept)


def _guarded(rule: Any, context: dict) -> Callable:
    """The rule for one block, which never sees a bad norm."""

    def update(norm, state, param_norm):
        finite = jnp.isfinite(norm)
        threshold, new = rule.update(jnp.where(finite, norm, 1.0), state, param_norm, **context)
        if jnp.shape(threshold) not in ((), norm.shape):
            raise ValueError(
                f"the threshold of a rule must be a scalar, got shape {jnp.shape(threshold)}. A rule sees the norm of "
                "one block, a scalar too."
            )
        threshold = jnp.asarray(threshold, norm.dtype)
        good = finite & ~jnp.isnan(threshold)
        # NaN for a norm that is not finite. A constant NaN would trip jax_debug_nans.
        return threshold + (norm - norm), jax.tree.map(lambda n, o: jnp.where(good, n, o), _like(new, state), state)

    return update


def _like(new: Any, old: Any) -> Any:
    """The next state of a rule in the dtypes of the last, or an error where it is of another kind."""
    kind = lambda x: (jnp.shape(x), jnp.issubdtype(jnp.result_type(x), jnp.inexact))
    kinds = lambda tree: [kind(x) for x in jax.tree.leaves(tree)]
    if jax.tree.structure(new) != jax.tree.structure(old) or kinds(new) != kinds(old):
        raise ValueError(
            "a rule must return a state of the structure, shapes and kinds of numbers of the last one, got "
            f"{_text(new)} after {_text(old)}. Return what init returns; floats start as jnp.zeros_like(norm)."
        )
    return jax.tree.map(lambda n, o: jnp.asarray(n, o.dtype), new, old)


_ANEW = (
    "To keep all other states and start this history anew, with the ClipState as state (of skip_spikes, its field "
    "measured): state._replace(rule=clip.init(params).rule)."
)


def _states(state: Any, groups: list[Group]) -> Iterator:
    """The state for each group, or an error where it is that of another rule or of other blocks."""
    keeping = [group for group in groups if jax.tree.leaves(group.first)]
    needed = _merged([group.first for group in keeping])
    if jax.tree.structure(state) != jax.tree.structure(needed):
        raise ValueError(
            f"state must hold the history that the threshold needs, {_text(needed)}, got {_text(state)}. The "
            f"threshold, the dtypes, or the mesh axes were others when it was made. {_ANEW}"
        )
    states = iter([state] if len(keeping) == 1 else state)
    for group in groups:
        of_group = next(states) if jax.tree.leaves(group.first) else group.first
        for there, first in zip(jax.tree.leaves(of_group), jax.tree.leaves(group.first)):
            if jnp.shape(there) != group.norm.shape + first.shape:
                raise ValueError(
                    f"state must hold a history of shape {group.norm.shape + first.shape} for the blocks of these "
                    f"updates, got {jnp.shape(there)}. The window or the blocks were others. Pass updates of the "
                    f"parameters that init saw. {_ANEW}"
                )
        yield of_group


def _merged(states: list) -> Any:
    """The states of all groups of blocks; where there is one group, its state."""
    return states[0] if len(states) == 1 else tuple(states)


def _text(state: Any) -> str:
    return str(jax.tree.structure(state)).removeprefix("PyTreeDef(")[:-1]


def param_norms(norm: Callable[[Any], Any], blocks: Blocks, updates: Any, params: Any) -> dict[Hashable, jax.Array]:
    """The norms of the parameters of the same blocks."""
    leaves = params_of(updates, params, "The threshold is a share of the norm of the parameters.")
    tree = jax.tree.structure(updates).unflatten(leaves)
    found = blocks_of(norm(tree), tree)
    given, wanted = ((b.index, [n.shape for n in b.norms.values()]) for b in (found, blocks))
    if given != wanted:
        raise ValueError(
            f"params must have the blocks of the updates, got {len(found.norms)} where the updates have "
            f"{len(blocks.norms)}. Pass parameters of the shapes and kinds of the updates."
        )
    return found.norms


def total_norm(groups: list[Group], *, units: bool) -> jax.Array:
    """The root of the sum of squares over all blocks."""
    norms = [group.norm for group in groups] or [jnp.float32(0)]
    if len(norms) == 1 and norms[0].ndim == 0 and not varying(norms[0]):
        return norms[0]
    down = up = largest = jnp.float32(1)
    if not units or any(norm.dtype == jnp.float64 for norm in norms):  # relative, so that no square leaves the range
        largest = jax.lax.stop_gradient(fold(jnp.maximum, [jnp.max(norm) for norm in norms]))
        names = tuple(sorted(varying(largest)))
        largest = jax.lax.pmax(largest, names) if names else largest
        largest = within_reciprocals(jnp.where(largest == jnp.inf, jnp.ones_like(largest), largest))
        down, up = 8 / largest, largest / 8
    total = fold(jnp.add, [summed(jnp.square(norm * down.astype(norm.dtype))) for norm in norms])
    return jnp.where(total == 0, 0.0, jnp.sqrt(jnp.where(total == 0, 1.0, total)) * up.astype(total.dtype))


def summed(x: jax.Array) -> jax.Array:
    """The sum of an array, also over the devices on which it varies."""
    names = tuple(sorted(varying(x)))
    total = jnp.sum(x) if x.ndim else x
    return jax.lax.psum(total, names) if names else total

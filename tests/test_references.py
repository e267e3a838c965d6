"""Every named clip gives the numbers of its rule in float64."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
import trees

import optax_clip as oc

STEPS = 50
SPIKES = {7: 1e3, 8: 1e5, 23: 1e12, 41: 1e-6}
LABELS = {"bias": "a", "conv": "b", "dense": "a", "heads": "b", "scale": "a"}
WEIGHTS = {name: np.asarray(leaf) for name, leaf in trees.sample(99).items()} | {"bias": np.zeros(5, np.float32)}
CLOSE = trees.tolerance(jnp.float32)


class Rule(NamedTuple):
    """A clip, what it should do, and the threshold that lies at a norm of the given gradients."""

    clip: Callable  # threshold -> transformation
    reference: Callable  # (gradients, threshold) -> clipped gradients
    norm: Callable  # gradients -> threshold


def largest(grads):
    return float(np.abs(reference.flat(grads)).max())


def total(grads, p=2):
    return float(reference.p_norm(reference.flat(grads), p))


def of_dense(grads, p=2):
    return float(reference.p_norm(grads["dense"], p))


def of_column(grads):
    return float(reference.p_norm(grads["dense"][:, 0]))


def by_order(p):
    """The three clips that know other orders than 2, at order p."""
    return {
        f"clip_by_global_norm_{p}": Rule(
            functools.partial(oc.clip_by_global_norm, ord=p),
            functools.partial(reference.global_norm, p=p),
            functools.partial(total, p=p),
        ),
        f"clip_by_leaf_norm_{p}": Rule(
            functools.partial(oc.clip_by_leaf_norm, ord=p),
            functools.partial(reference.leaf_norm, p=p),
            functools.partial(of_dense, p=p),
        ),
        f"clip_by_unit_norm_{p}": Rule(
            functools.partial(oc.clip_by_unit_norm, ord=p), functools.partial(reference.unit_norm, p=p), of_column
        ),
    }


def by_response(name):
    """Leaf and unit norm with another response than `shrink`."""
    ours, theirs = getattr(oc, name), getattr(reference, name)
    return {
        f"leaf_{name}": Rule(
            functools.partial(oc.clip_by_leaf_norm, response=ours),
            functools.partial(reference.leaf_norm, response=theirs),
            of_dense,
        ),
        f"unit_{name}": Rule(
            functools.partial(oc.clip_by_unit_norm, response=ours),
            functools.partial(reference.unit_norm, response=theirs),
            of_column,
        ),
    }


RULES = {
    "clip": Rule(oc.clip, lambda g, c: reference.value(g, -c, c), largest),
    "clip_by_value": Rule(
        lambda c: oc.clip_by_value(-0.5 * c, c), lambda g, c: reference.value(g, -0.5 * c, c), largest
    ),
    "clip_by_value_above": Rule(
        lambda c: oc.clip_by_value(max_value=c), lambda g, c: reference.value(g, -np.inf, c), largest
    ),
    "clip_by_magnitude": Rule(
        lambda c: oc.clip_by_magnitude(0.5 * c, c), lambda g, c: reference.magnitude(g, 0.5 * c, c), largest
    ),
    "clip_by_magnitude_below": Rule(
        lambda c: oc.clip_by_magnitude(c), lambda g, c: reference.magnitude(g, c, np.inf), largest
    ),
    "clip_by_global_norm": Rule(oc.clip_by_global_norm, reference.global_norm, total),
    "clip_by_leaf_norm": Rule(oc.clip_by_leaf_norm, reference.leaf_norm, of_dense),
    "clip_by_unit_norm": Rule(oc.clip_by_unit_norm, reference.unit_norm, of_column),
    "clip_by_block_rms": Rule(oc.clip_by_block_rms, reference.block_rms, lambda g: float(reference.rms(g["dense"]))),
    "clip_by_group_norm": Rule(
        lambda c: oc.clip_by_group_norm({"a": c, "b": 2 * c}, LABELS),
        lambda g, c: reference.group_norm(g, {"a": c, "b": 2 * c}, LABELS),
        lambda g: total({name: g[name] for name in g if LABELS[name] == "a"}),
    ),
    "clip_by_group_norm_but_one": Rule(
        lambda c: oc.clip_by_group_norm({"a": c}, {name: "a" if LABELS[name] == "a" else None for name in LABELS}),
        lambda g, c: reference.group_norm(g, {"a": c}, LABELS),
        lambda g: total({name: g[name] for name in g if LABELS[name] == "a"}),
    ),
    "clip_by_norm_range": Rule(
        lambda c: oc.clip_by_norm_range(0.75 * c, c), lambda g, c: reference.norm_range(g, 0.75 * c, c), total
    ),
    "clip_by_norm_range_below": Rule(
        lambda c: oc.clip_by_norm_range(c, None), lambda g, c: reference.norm_range(g, c, np.inf), total
    ),
    "adaptive_grad_clip": Rule(
        oc.adaptive_grad_clip,
        lambda g, c: reference.adaptive(g, WEIGHTS, c),
        lambda g: of_column(g) / of_column(WEIGHTS),
    ),
    "adaptive_grad_clip_small": Rule(
        lambda c: oc.adaptive_grad_clip(c * 1e-7),
        lambda g, c: reference.adaptive(g, WEIGHTS, c * 1e-7),
        lambda g: of_column(g) / of_column(WEIGHTS),
    ),
    **by_order(1),
    **by_order(1.5),
    **by_order(3),
    **by_order(float("inf")),
    **by_response("normalize"),
    **by_response("smooth"),
    **by_response("tanh"),
}


def gradients(seed: int) -> list[dict]:
    """Fifty steps of random gradients whose size varies, with spikes among them."""
    random = np.random.default_rng(seed)
    shapes = {name: leaf.shape for name, leaf in WEIGHTS.items()}
    scales = [np.exp(0.5 * random.normal()) * SPIKES.get(step, 1.0) for step in range(STEPS)]
    return [
        {name: (scale * random.normal(size=shape)).astype(np.float32) for name, shape in shapes.items()}
        for scale in scales
    ]


def assert_close(actual, expected):
    """Entry by entry to a few units in the last place, relative to the entry itself."""
    chex.assert_trees_all_close(actual, expected, rtol=CLOSE, atol=0.0)


@pytest.mark.parametrize("name", RULES)
def test_clip_follows_its_rule(name):
    """Fifty steps with spikes agree with float64, with thresholds below, at and above the norm of the first step."""
    rule = RULES[name]

    @jax.jit
    def run(samples, threshold, params):
        tx = rule.clip(threshold)
        return jax.lax.scan(lambda state, updates: tx.update(updates, state, params)[::-1], tx.init(params), samples)

    stack = lambda trees: jax.tree.map(lambda *leaves: np.stack(leaves), *trees)
    for seed in range(2):
        samples = gradients(seed)
        for factor in (0.25, 1.0, 4.0):
            threshold = np.float32(factor * rule.norm(samples[0]))
            state, clipped = run(stack(samples), threshold, WEIGHTS)
            assert_close(clipped, stack([rule.reference(updates, np.float64(threshold)) for updates in samples]))
            assert state.step == STEPS


def test_state_reports_the_rule():
    """Norm, threshold, scale and clip rate of fifty steps agree with float64."""
    tx = oc.clip_by_global_norm(12.0)
    step, state, above = jax.jit(tx.update), tx.init(WEIGHTS), 0
    for number, updates in enumerate(gradients(3), start=1):
        _, state = step(updates, state)
        norm = total(updates)
        above += norm > 12.0
        expected = (norm, 12.0, reference.shrink(norm, 12.0), above / number)
        assert_close((state.norm, state.threshold, state.scale), expected[:3])
        chex.assert_trees_all_close(state.clip_rate, expected[3], rtol=1e-5)
    assert 0 < above < STEPS


def test_state_reports_means_over_blocks():
    """With several blocks: root of the sum of squared norms, mean threshold, mean scale, share of blocks above."""
    updates = gradients(4)[0]
    cs = {"bias": 1.0, "conv": 100.0, "dense": 2.0, "heads": 100.0, "scale": 0.5}
    tx = oc.clip_by_leaf_norm(cs)
    _, state = tx.update(updates, tx.init(updates))
    norms = {name: float(reference.p_norm(leaf)) for name, leaf in updates.items()}
    scales = [float(reference.shrink(norms[name], cs[name])) for name in cs]
    assert_close(
        (state.norm, state.threshold, state.scale), (total(updates), np.mean(list(cs.values())), np.mean(scales))
    )
    chex.assert_trees_all_close(state.clip_rate, np.mean([norms[name] > cs[name] for name in cs]))


# Axes of a unit

AXES = {"first": 0, "last": -1, "two": (0, 1), "two_negative": (-1, -2), "none": ()}


def matrices(seed: int) -> dict:
    """Leaves of rank 2 and 3 with one column much larger than the others."""
    updates = {name: np.asarray(trees.sample(seed)[name]) for name in ("dense", "heads")}
    columns = {name: np.arange(leaf.shape[-1]) == 1 for name, leaf in updates.items()}
    return {name: leaf * np.where(columns[name], np.float32(100), np.float32(1)) for name, leaf in updates.items()}


@pytest.mark.parametrize("axis", AXES.values(), ids=AXES)
def test_units_along_given_axes(axis):
    """An int, a tuple and negative axes say what a unit is, for every clip that knows units."""
    updates, weights = matrices(0), matrices(1)
    axes = lambda shape: tuple(np.atleast_1d(np.array(axis, int)) % len(shape))
    for tx, expected in [
        (oc.clip_by_unit_norm(2.0, axis), reference.unit_norm(updates, 2.0, axes=axes)),
        (oc.clip_by_block_rms(1.0, axis=axis), reference.block_rms(updates, 1.0, axes)),
        (oc.adaptive_grad_clip(0.5, axis=axis), reference.adaptive(updates, weights, 0.5, axes=axes)),
    ]:
        clipped, _ = jax.jit(tx.update)(updates, tx.init(weights), weights)
        assert_close(clipped, expected)


def head_aside(path, leaf):
    """The rule of a classifier: the head alone, other leaves by their first axis, vectors whole."""
    if "head" in jax.tree_util.keystr(path):
        return None
    return 0 if leaf.ndim > 1 else tuple(range(leaf.ndim))


@pytest.mark.parametrize(
    "clip",
    [
        lambda c, axis: oc.clip_by_unit_norm(c, axis),
        lambda c, axis: oc.clip_by_block_rms(c, axis=axis),
        lambda c, axis: oc.adaptive_grad_clip(c, eps=1.0, axis=axis),
    ],
    ids=["clip_by_unit_norm", "clip_by_block_rms", "adaptive_grad_clip"],
)
def test_rule_leaves_a_leaf_alone(clip):
    """Where a rule returns None the leaf is neither scaled nor counted, even if it is not finite."""
    head = jnp.array([[np.nan, 1e3], [1e-40, np.inf]])
    updates = {"body": 100.0 * trees.sample(0)["dense"], "bias": 100.0 * trees.sample(0)["bias"], "head": head}
    params = jax.tree.map(jnp.zeros_like, updates)
    tx = clip(0.5, head_aside)
    clipped, state = tx.update(updates, tx.init(params), params)
    assert clipped["head"] is head
    assert jnp.isfinite(state.norm)
    del updates["head"], params["head"]
    expected, expected_state = tx.update(updates, tx.init(params), params)
    chex.assert_trees_all_equal({name: clipped[name] for name in updates}, expected)
    chex.assert_trees_all_close(state, expected_state, rtol=CLOSE)


def test_rule_sees_path_and_leaf():
    """A rule is called with the key path and the array of each leaf that is counted, and of no other."""
    seen = []

    def rule(path, leaf):
        seen.append((jax.tree_util.keystr(path), leaf.shape))
        return 0

    updates = {"layers": [jnp.ones((2, 3)), {"w": jnp.ones(4)}], "steps": jnp.arange(3), "none": None}
    oc.unit_norm(updates, axis=rule)
    assert seen == [("['layers'][0]", (2, 3)), ("['layers'][1]['w']", (4,))]


STACKED = {
    "clip_by_unit_norm": lambda c, stacked: oc.clip_by_unit_norm(c, 1 if stacked else None),
    "adaptive_grad_clip": lambda c, stacked: oc.adaptive_grad_clip(c, axis=1 if stacked else None),
    "clip_by_block_rms": lambda c, stacked: oc.clip_by_block_rms(c, axis=(1, 2) if stacked else None),
}


@pytest.mark.parametrize("clip", STACKED.values(), ids=STACKED)
def test_stacked_layers_are_clipped_as_separate_layers(clip):
    """Layers stacked for a scan, (layers, inputs, outputs), clip as the list of layers does."""
    random = np.random.default_rng(0)
    scales = np.array([1.0, 1e-3, 50.0, 1e20]).reshape(4, 1, 1)
    updates = jnp.float32(scales * random.normal(size=(4, 6, 5)))
    params = jnp.float32(random.normal(size=(4, 6, 5)))
    stacked, separate = clip(0.3, True), clip(0.3, False)
    clipped, state = stacked.update(updates, stacked.init(params), params)
    layers, weights = list(updates), list(params)
    expected, expected_state = separate.update(layers, separate.init(weights), weights)
    assert_close(clipped, jnp.stack(expected))
    assert_close(state, expected_state)

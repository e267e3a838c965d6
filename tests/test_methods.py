"""Each method gives the numbers of its reference in float64, over 200 steps with spikes in one compiled scan."""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
import table
import trees
from trees import step

import optax_clip as oc
from optax_clip import responses

STEPS = 200
SPIKES = {7: 1e3, 8: 1e5, 23: 1e12, 41: 1e-6, 120: 1e2}
SHAPES = {"bias": (5,), "conv": (2, 2, 3, 4), "dense": (6, 5), "heads": (4, 2, 3), "scale": ()}
LABELS = {"bias": "a", "conv": "b", "dense": "a", "heads": "b", "scale": "a"}
CLOSE = trees.tolerance(jnp.float32)
full = functools.partial(pytest.param, marks=pytest.mark.full)


def normal(seed: int, shapes=SHAPES, steps: tuple = ()) -> dict:
    """Random leaves, of one step or of all steps stacked."""
    random = np.random.default_rng(seed)
    return {name: random.normal(size=(*steps, *shape)).astype(np.float32) for name, shape in shapes.items()}


WEIGHTS = normal(99) | {"bias": np.zeros(5, np.float32)}  # AGC takes eps for the norm of a bias of zeros


def gradients(seed: int, spikes=SPIKES) -> dict:
    """Gradients of all steps, stacked. Their size varies, and some steps are spikes."""
    random = np.random.default_rng(seed)
    sizes = np.exp(0.5 * random.normal(size=STEPS)) * [spikes.get(i, 1.0) for i in range(STEPS)]
    samples = normal(seed, steps=(STEPS,))
    return {name: np.float32(sizes.reshape(-1, *[1] * (x.ndim - 1)) * x) for name, x in samples.items()}


def rows(samples: dict) -> list[dict]:
    """The steps one by one."""
    return [{name: leaf[i] for name, leaf in samples.items()} for i in range(len(next(iter(samples.values()))))]


def stack(steps: list):
    return jax.tree.map(lambda *leaves: np.stack(leaves), *steps)


def scan_of(make):
    """Updates and states of all steps, from the numbers that the clip is made of. It is compiled once."""

    @jax.jit
    def scan(numbers, samples, params):
        tx = make(*numbers)

        def one(state, updates):
            updates, state = tx.update(updates, state, params)
            return state, (updates, state)

        return jax.lax.scan(one, tx.init(params), samples)[1]

    return scan


def assert_close(actual, expected, rtol=CLOSE):
    chex.assert_trees_all_close(actual, expected, rtol=rtol, atol=0.0)


# Clips without a history


class Fixed(NamedTuple):
    """A clip, what it should do, and a threshold that lies among the norms of the given gradients."""

    clip: Callable  # threshold -> transformation
    reference: Callable  # (gradients, threshold) -> clipped gradients
    size: Callable  # gradients -> threshold


def largest(grads):
    return float(np.abs(reference.flat(grads)).max())


def total(grads, p=2):
    return float(reference.p_norm(reference.flat(grads), p))


def of_dense(grads, p=2):
    return float(reference.p_norm(grads["dense"], p))


def of_column(grads, p=2):
    return float(reference.p_norm(grads["dense"][:, 0], p))


def of_order(p):
    """The three clips that know other orders than 2."""
    parts = {
        "global": (oc.clip_by_global_norm, reference.global_norm, total),
        "leaf": (oc.clip_by_leaf_norm, reference.leaf_norm, of_dense),
        "unit": (oc.clip_by_unit_norm, reference.unit_norm, of_column),
    }
    return {
        f"clip_by_{scope}_norm_{p}": Fixed(
            functools.partial(clip, ord=p), functools.partial(rule, p=p), functools.partial(size, p=p)
        )
        for scope, (clip, rule, size) in parts.items()
    }


def of_response(name):
    """Leaf and unit norm with another response than `shrink`."""
    ours, theirs = getattr(responses, name), getattr(reference, name)
    parts = {
        "leaf": (oc.clip_by_leaf_norm, reference.leaf_norm, of_dense),
        "unit": (oc.clip_by_unit_norm, reference.unit_norm, of_column),
    }
    return {
        f"{scope}_{name}": Fixed(functools.partial(clip, response=ours), functools.partial(rule, response=theirs), size)
        for scope, (clip, rule, size) in parts.items()
    }


def group_a(grads):
    return {name: g for name, g in grads.items() if LABELS[name] == "a"}


def small_agc(grads, c):
    """AGC on gradients a million times smaller, where it divides by 1e-6 instead of the norm."""
    small = {name: reference.wide(g) * 1e-7 for name, g in grads.items()}
    return {name: 1e7 * g for name, g in reference.adaptive(small, WEIGHTS, c * 1e-7).items()}


FIXED = {
    "clip": Fixed(oc.clip, lambda g, c: reference.value(g, -c, c), largest),
    "clip_by_value": Fixed(
        lambda c: oc.clip_by_value(-0.5 * c, c), lambda g, c: reference.value(g, -0.5 * c, c), largest
    ),
    "clip_by_value_above": Fixed(
        lambda c: oc.clip_by_value(None, c), lambda g, c: reference.value(g, -np.inf, c), largest
    ),
    "clip_by_magnitude": Fixed(
        lambda c: oc.clip_by_magnitude(0.5 * c, c), lambda g, c: reference.magnitude(g, 0.5 * c, c), largest
    ),
    "clip_by_magnitude_below": Fixed(
        lambda c: oc.clip_by_magnitude(c, None), lambda g, c: reference.magnitude(g, c, np.inf), largest
    ),
    "clip_by_global_norm": Fixed(oc.clip_by_global_norm, reference.global_norm, total),
    "clip_by_leaf_norm": Fixed(oc.clip_by_leaf_norm, reference.leaf_norm, of_dense),
    "clip_by_unit_norm": Fixed(oc.clip_by_unit_norm, reference.unit_norm, of_column),
    "clip_by_block_rms": Fixed(oc.clip_by_block_rms, reference.block_rms, lambda g: float(reference.rms(g["dense"]))),
    "clip_by_group_norm": Fixed(
        lambda c: oc.clip_by_group_norm({"a": c, "b": 2 * c}, LABELS),
        lambda g, c: reference.group_norm(g, {"a": c, "b": 2 * c}, LABELS),
        lambda g: total(group_a(g)),
    ),
    "clip_by_group_norm_but_one": Fixed(
        lambda c: oc.clip_by_group_norm({"a": c}, {name: "a" if LABELS[name] == "a" else None for name in LABELS}),
        lambda g, c: reference.group_norm(g, {"a": c}, LABELS),
        lambda g: total(group_a(g)),
    ),
    "clip_by_norm_range": Fixed(
        lambda c: oc.clip_by_norm_range(0.75 * c, c), lambda g, c: reference.norm_range(g, 0.75 * c, c), total
    ),
    "clip_by_norm_range_below": Fixed(
        lambda c: oc.clip_by_norm_range(c, None), lambda g, c: reference.norm_range(g, c, np.inf), total
    ),
    "adaptive_grad_clip": Fixed(
        oc.adaptive_grad_clip,
        lambda g, c: reference.adaptive(g, WEIGHTS, c),
        lambda g: of_column(g) / of_column(WEIGHTS),
    ),
    "adaptive_grad_clip_small": Fixed(
        lambda c: optax.chain(optax.scale(1e-7), oc.adaptive_grad_clip(c * 1e-7), optax.scale(1e7)),
        small_agc,
        lambda g: of_column(g) / of_column(WEIGHTS),
    ),
    **of_order(1),
    **of_order(3),
    **of_order(math.inf),
    **of_response("normalize"),
    **of_response("smooth"),
    **of_response("tanh"),
}
SLOW = {
    "clip_by_value_above",
    "clip_by_group_norm_but_one",
    "clip_by_magnitude_below",
    "leaf_normalize",
    "leaf_smooth",
    "leaf_tanh",
    "clip_by_norm_range_below",
}
SLOW |= {"unit_smooth", "unit_tanh", *of_order(1), *of_order(3), *of_order(math.inf)}
SLOW -= {"clip_by_global_norm_1", "clip_by_leaf_norm_3", "clip_by_unit_norm_inf"}


@pytest.mark.parametrize("name", [full(name) if name in SLOW else name for name in FIXED])
def test_a_fixed_clip_follows_its_reference(name):
    """With thresholds below and above most norms, all updates agree with float64."""
    method, samples = FIXED[name], gradients(0)
    scan = scan_of(method.clip)
    for factor in (0.5, 2.0):
        threshold = np.float32(factor * method.size(rows(samples)[0]))
        clipped, _ = scan((threshold,), samples, WEIGHTS)
        expected = stack([method.reference(updates, np.float64(threshold)) for updates in rows(samples)])
        assert_close(clipped, expected)


def test_the_state_reports_one_block():
    """Norm, threshold, scale, share clipped and clip rate of all steps agree with float64."""
    samples = gradients(3)
    _, state = scan_of(oc.clip_by_global_norm)((np.float32(12.0),), samples, WEIGHTS)
    norms = np.array([total(updates) for updates in rows(samples)])
    assert_close((state.norm, state.threshold), (norms, np.full(STEPS, 12.0)))
    assert_close(state.clip_scale, np.minimum(norms, 12.0) / norms)
    assert_close(
        (state.clipped, state.clip_rate), (norms > 12.0, np.cumsum(norms > 12.0) / np.arange(1, STEPS + 1)), 1e-5
    )
    chex.assert_trees_all_equal(state.clip_step, np.arange(1, STEPS + 1, dtype=np.int32))
    assert 0 < np.sum(norms > 12.0) < STEPS


def test_the_state_reports_several_blocks():
    """It has the root of the sum of squared norms, mean threshold and scale, and the share of blocks above theirs."""
    cs = {"bias": 1.0, "conv": 100.0, "dense": 2.0, "heads": None, "scale": 0.01}
    updates = normal(4)
    _, state = step(oc.clip_by_leaf_norm(cs), updates)
    norms = {name: float(reference.p_norm(leaf)) for name, leaf in updates.items()}
    bounds = {name: np.inf if c is None else c for name, c in cs.items()}
    scales = [min(norms[name], bounds[name]) / norms[name] for name in cs]
    assert_close((state.norm, state.threshold), (total(updates), np.mean([c for c in cs.values() if c is not None])))
    assert_close((state.clip_scale, state.clipped), (np.mean(scales), np.mean(np.array(scales) < 1)))
    assert state.clipped == state.clip_rate


def test_the_state_reports_units():
    """At the scope of units it has the norm and the share clipped, and neither threshold nor scale."""
    updates = normal(4)
    _, state = step(oc.clip_by_unit_norm(1.5), updates)
    norms = [reference.p_norm(g, 2, reference.axes_by_rank(g.shape)) for g in updates.values()]
    assert_close(
        (state.norm, state.clipped), (total(updates), np.mean(np.concatenate([n.ravel() for n in norms]) > 1.5))
    )
    assert state.threshold is None and state.clip_scale is None


# Axes of a unit

AXES = {"first": 0, "last": -1, "two": (0, 1), "two_negative": (-1, -2), "none": ()}


def matrices(seed: int) -> dict:
    """Leaves of rank 2 and 3 with one column much larger than the others."""
    updates = {name: leaf for name, leaf in normal(seed).items() if name in ("dense", "heads")}
    columns = {name: np.arange(leaf.shape[-1]) == 1 for name, leaf in updates.items()}
    return {name: leaf * np.where(columns[name], np.float32(100), np.float32(1)) for name, leaf in updates.items()}


@pytest.mark.parametrize("axis", [full(0), -1, full((0, 1)), full((-1, -2)), full(())], ids=AXES)
def test_units_along_given_axes(axis):
    """An int, a tuple and negative axes say what a unit is, for every clip that knows units."""
    updates, weights = matrices(0), matrices(1)
    axes = lambda shape: tuple(np.atleast_1d(np.array(axis, int)) % len(shape))
    for tx, expected in [
        (oc.clip_by_unit_norm(2.0, axis), reference.unit_norm(updates, 2.0, axes=axes)),
        (oc.clip_by_block_rms(1.0, axis=axis), reference.block_rms(updates, 1.0, axes)),
        (oc.adaptive_grad_clip(0.5, axis=axis), reference.adaptive(updates, weights, 0.5, axes=axes)),
    ]:
        clipped, _ = step(tx, updates, params=weights)
        assert_close(clipped, expected)


def head_aside(path, leaf):
    """The rule of a classifier: the head alone, other leaves by their first axis, vectors whole."""
    if "head" in jax.tree_util.keystr(path):
        return None
    return 0 if leaf.ndim > 1 else tuple(range(leaf.ndim))


HEAD_ASIDE = {
    "clip_by_unit_norm": lambda: oc.clip_by_unit_norm(0.5, head_aside),
    "clip_by_block_rms": lambda: oc.clip_by_block_rms(0.5, axis=head_aside),
    "adaptive_grad_clip": lambda: oc.adaptive_grad_clip(0.5, eps=1.0, axis=head_aside),
}


@pytest.mark.parametrize("name", HEAD_ASIDE)
def test_a_rule_of_axes_leaves_a_leaf_alone(name):
    """Where the rule returns None the leaf is neither scaled nor counted, even if it is not finite."""
    updates = {name: 100.0 * normal(0)[name] for name in ("bias", "dense")}
    params = jax.tree.map(np.zeros_like, updates)
    head = {"head": np.array([[np.nan, 1e3], [1.0, np.inf]], np.float32)}
    tx = HEAD_ASIDE[name]()
    clipped, state = step(tx, updates | head, params=params | head)
    np.testing.assert_array_equal(clipped.pop("head"), head["head"])
    expected, expected_state = step(tx, updates, params=params)
    assert_close((clipped, state), (expected, expected_state))


STACKED = {
    "clip_by_unit_norm": lambda c, stacked: oc.clip_by_unit_norm(c, 1 if stacked else None),
    "adaptive_grad_clip": lambda c, stacked: oc.adaptive_grad_clip(c, axis=1 if stacked else None),
    "clip_by_block_rms": lambda c, stacked: oc.clip_by_block_rms(c, axis=(1, 2) if stacked else None),
}


@pytest.mark.full
@pytest.mark.parametrize("name", STACKED)
def test_stacked_layers_are_clipped_as_separate_layers(name):
    """Layers stacked for a scan, (layers, inputs, outputs), are clipped as the list of layers is."""
    random = np.random.default_rng(0)
    scales = np.array([1.0, 1e-3, 50.0, 1e15]).reshape(4, 1, 1)
    updates = np.float32(scales * random.normal(size=(4, 6, 5)))
    params = np.float32(random.normal(size=(4, 6, 5)))
    clipped, state = step(STACKED[name](0.3, True), updates, params=params)
    expected, expected_state = step(STACKED[name](0.3, False), list(updates), params=list(params))
    assert_close(clipped, np.stack(expected))
    assert_close((state.norm, state.clipped), (expected_state.norm, expected_state.clipped))


# Clips with a history

UNITS = {"bias": (3,), "dense": (3, 4), "wide": (2, 3)}
GROUPS = {"bias": "a", "dense": "b", "wide": "a"}
SCOPES = {
    "global": oc.global_norm,
    "leaf": oc.leaf_norm,
    "group": oc.group_norm(GROUPS),
    "unit": functools.partial(oc.unit_norm, axis=0),
}
BAD_STEPS = {0: np.nan, 4: np.inf, 13: -np.inf, 24: np.nan, 25: np.inf, 140: np.nan, 141: -np.inf}


class Adaptive(NamedTuple):
    """A clip, its reference, and several settings of its numbers."""

    clip: Callable  # (*numbers, norm=) -> transformation
    reference: Callable  # (number of blocks, *numbers) -> a rule in NumPy over a vector of norms
    settings: list  # of numbers, which are traced


def with_window(window, clip, one_block, settings):
    """A clip with a window, which is a shape."""
    return Adaptive(
        lambda number, norm: clip(number, window, norm=norm),
        lambda blocks, number: reference.EachBlock(blocks, lambda: one_block(number, window)),
        settings,
    )


def with_spike(spike):
    """zclip by what it does about spikes. Its numbers are z_max, decay and warmup_steps, and factor if it has one."""
    settings = [(2.5, 0.97, 25), (1.5, 0.9, 1), (2.0, 0.9, 0), (0.0, 0.99, 5), (3.0, 1.0, 7)]
    if spike == "rescale":
        settings = [(*numbers, factor) for numbers, factor in zip(settings, (1.0, 0.95, 1.25, 1.0, 1.0))]
    return Adaptive(
        lambda z, b, w, *f, norm: oc.zclip(z, b, w, spike=spike, factor=f[0] if f else None, norm=norm),
        lambda blocks, z, b, w, *f: reference.EachBlock(blocks, lambda: reference.Zclip(z, b, w, spike, *f)),
        settings,
    )


ADAPTIVE = {
    "autoclip_7": with_window(7, oc.autoclip, reference.Autoclip, [(10.0,), (50.0,), (0.0,), (90.0,), (100.0,)]),
    "autoclip_256": with_window(256, oc.autoclip, reference.Autoclip, [(10.0,), (100.0,)]),
    "autoclip_1": with_window(1, oc.autoclip, reference.Autoclip, [(10.0,)]),
    **{f"zclip_{spike}": with_spike(spike) for spike in ("rescale", "mean", "limit")},
    "adagc": Adaptive(
        lambda *numbers, norm: oc.adagc(*numbers, norm=norm),
        reference.Adagc,
        [(1.0, 1.05, 0.98, 100), (3.0, 1.2, 0.5, 0), (1.0, 1.0, 0.9, 1), (100.0, 1.5, 0.9, 25)],
    ),
    "clip_by_sigma_7": with_window(7, oc.clip_by_sigma, reference.ClipBySigma, [(3.0,), (0.5,), (0.0,)]),
    "clip_by_sigma_64": with_window(64, oc.clip_by_sigma, reference.ClipBySigma, [(3.0,), (0.5,)]),
    "clip_by_sigma_1": with_window(1, oc.clip_by_sigma, reference.ClipBySigma, [(3.0,)]),
}


def drifting(seed: int) -> dict:
    """Gradients of all steps, stacked: their size drifts, some leaves are spikes, some zero, some not finite."""
    random = np.random.default_rng(seed)
    drift = np.exp(1.5 * np.sin(np.arange(STEPS) / 80))
    out = {}
    for name, shape in UNITS.items():
        spikes = np.where(random.random(STEPS) < 0.05, 10 ** random.uniform(0.5, 4.0, STEPS), 1.0)
        sizes = drift * spikes * np.exp(0.3 * random.normal(size=STEPS)) * (random.random(STEPS) > 0.01)
        out[name] = np.float32(sizes.reshape(-1, *[1] * len(shape)) * random.normal(size=(STEPS, *shape)))
    for number, (place, bad) in enumerate(BAD_STEPS.items()):
        out[list(UNITS)[number % 3]][place].flat[0] = bad
    return out


QUICK = {(name, "global") for name in ADAPTIVE if not name.endswith(("_1", "_64", "_256"))}
QUICK |= {("adagc", "leaf"), ("autoclip_7", "group"), ("zclip_rescale", "unit")}


@pytest.mark.parametrize(
    ("name", "scope"),
    [(name, scope) if (name, scope) in QUICK else full(name, scope) for name in ADAPTIVE for scope in SCOPES],
)
def test_an_adaptive_clip_follows_its_reference(name, scope):
    """Clipped norms and what the state reports agree with float64, through drift, spikes and bad steps."""
    case, samples = ADAPTIVE[name], drifting(0)
    norms = reference.norms_of(samples, scope)
    scan = scan_of(functools.partial(case.clip, norm=SCOPES[scope]))
    params = {name: np.zeros(shape, np.float32) for name, shape in UNITS.items()}
    for numbers in case.settings if scope == "global" else case.settings[:2]:
        clipped, state = scan(numbers, samples, params)
        rule = case.reference(norms.shape[1], *numbers)
        thresholds = np.array([rule(row) for row in norms])
        after = np.where(np.isnan(thresholds), np.nan, np.minimum(norms, thresholds))
        np.testing.assert_allclose(reference.norms_of(clipped, scope), after, rtol=1e-4)
        good = ~np.isnan(thresholds).any(axis=1)
        unsure = np.isclose(norms, thresholds, rtol=1e-4, atol=0.0).any(axis=1)
        above = (norms > thresholds).mean(axis=1)
        np.testing.assert_allclose(state.clipped[good & ~unsure], above[good & ~unsure], rtol=1e-6)
        if scope != "unit":
            bounded = np.isfinite(thresholds)
            mean = np.where(bounded, thresholds, 0.0).sum(axis=1) / np.maximum(bounded.sum(axis=1), 1)
            mean = np.where(bounded.any(axis=1), mean, np.finfo(np.float32).max)
            np.testing.assert_allclose(state.threshold[good], mean[good], rtol=1e-4)
            scales = np.where(norms == 0, 1.0, after / np.where(norms == 0, 1.0, norms)).mean(axis=1)
            np.testing.assert_allclose(state.clip_scale[good], scales[good], rtol=1e-4)


def run(tx, samples, params=None):
    """The updates of each step, one by one, and the last state."""
    out, state = [], None
    for updates in samples:
        updates, state = step(tx, updates, state, params)
        out.append(updates)
    return out, state


def numbers_of(tx, norms) -> np.ndarray:
    """What becomes of updates of one entry."""
    out, _ = run(tx, [np.float32([norm]) for norm in norms])
    return np.concatenate(out).astype(np.float64)


WARMUP = (1.0, 1.2, 0.8, 1.1)


def test_zclip_gives_the_numbers_of_the_authors():
    """After a warm-up of four steps, clipped norms and statistics are those of the authors' package."""
    tx = oc.zclip(warmup_steps=4)
    clipped, state = run(tx, [np.float32([norm]) for norm in (*WARMUP, 10.0, 1.0, 3.0)])
    expected = (*WARMUP, 1.0402333899, 1.0, 1.0898951204)
    np.testing.assert_allclose(np.concatenate(clipped), expected, rtol=1e-6)
    statistics = state.rule
    np.testing.assert_allclose(np.ravel(statistics.mean), 1.0266493465, rtol=1e-5)
    np.testing.assert_allclose(np.square(np.ravel(statistics.deviation)), 0.0201086298, rtol=1e-5)


@pytest.mark.parametrize("spike", ["mean", full("limit")])
def test_zclip_cuts_spikes_to_the_mean_or_the_limit(spike):
    """A spike is cut to the mean or to the limit, and in both modes an ordinary step keeps every bit."""
    expected = np.mean(WARMUP) + (2.5 * np.std(WARMUP) if spike == "limit" else 0.0)
    out = numbers_of(oc.zclip(warmup_steps=4, spike=spike), (*WARMUP, 10.0, 1.0))
    np.testing.assert_allclose(out[4], expected, rtol=1e-6)
    assert out[5] == 1.0


@pytest.mark.parametrize("make", [lambda: oc.zclip(2.0, warmup_steps=4), lambda: oc.clip_by_sigma(2.0, 4)])
def test_spikes_of_small_norms_are_clipped_as_others(make):
    """A spike of 100 times is clipped alike whatever the size of the norms."""
    norms, tx = np.float32([1.0, 1.5, 0.8, 1.2, 100.0]), make()
    expected = numbers_of(tx, norms)
    assert expected[4] < 3
    for scale in (1e-8, 1e-20, 1e20):
        np.testing.assert_allclose(numbers_of(tx, norms * np.float32(scale)), np.multiply(expected, scale), rtol=1e-5)


def test_zclip_has_the_numbers_of_its_authors_for_norms_around_1():
    """The constant that is relative here changes norms after clipping by less than 1e-4."""

    class Authors(reference.Zclip):
        @property
        def floor(self):
            return 1e-6 / abs(self.mean)

    norms = np.float32(np.exp(0.5 * np.random.default_rng(0).normal(size=300)))
    norms[100::50] *= 30
    rule = Authors(warmup_steps=10)
    expected = [min(n, rule(n)) for n in norms.astype(np.float64)]
    np.testing.assert_allclose(numbers_of(oc.zclip(warmup_steps=10), norms), expected, rtol=1e-4)


def test_adagc_scales_all_leaves_together_in_warmup():
    """In warm-up all leaves share the scale that brings the global norm to `max_norm`, afterwards each has its own."""
    tx = oc.adagc(max_norm=1.0, max_ratio=1.5, decay=0.5, warmup_steps=2)
    norms = [(3.0, 4.0), (0.3, 0.4), (0.2, 4.0), (0.9, 0.9)]
    clipped, _ = run(tx, [{"a": np.float32([a]), "b": np.float32([b])} for a, b in norms])
    # γ is (.6, .8), then (.3, .4), then (.25, .5)
    for actual, expected in zip(clipped, [(0.6, 0.8), (0.3, 0.4), (0.2, 0.6), (0.375, 0.75)]):
        np.testing.assert_allclose((actual["a"][0], actual["b"][0]), expected, rtol=1e-6)


def test_the_bound_of_adagc_in_warmup_may_follow_a_schedule():
    """In warm-up `max_norm` is asked at each step."""
    schedule = optax.linear_schedule(0.1, 3.0, 20)
    samples = [pair(i) for i in range(20)]
    clipped, _ = run(oc.adagc(schedule), samples)
    for number, (updates, actual) in enumerate(zip(samples, clipped)):
        expected = reference.global_norm(updates, float(schedule(number)))
        chex.assert_trees_all_close(actual, expected, rtol=1e-5)


# What the paper does not say

MAKES = {
    "autoclip": lambda norm: oc.autoclip(30.0, 4, norm=norm),
    "zclip": lambda norm: oc.zclip(2.5, 0.9, 3, norm=norm),
    "adagc": lambda norm: oc.adagc(None, 1.05, 0.9, 3, norm=norm),
    "clip_by_sigma": lambda norm: oc.clip_by_sigma(3.0, 4, norm=norm),
}
every = pytest.mark.parametrize("name", MAKES)
by_scope = pytest.mark.parametrize("scope", ["global", "leaf"])


@functools.cache
def adaptive(name, scope):
    """One clip for all tests, which is compiled once."""
    return MAKES[name](SCOPES[scope])


def pair(seed: int = 0, scale: float = 1.0, dtype=np.float32) -> dict:
    """Two leaves whose sizes vary with the seed."""
    random = np.random.default_rng(seed)
    sizes = scale * np.exp(random.normal(size=2))
    return {name: np.asarray(size * random.normal(size=4), dtype) for name, size in zip(("v", "w"), sizes)}


@every
@by_scope
def test_constant_norms_are_not_clipped(name, scope):
    """Where all norms are the same, the deviation is 0 and every update keeps every bit."""
    for size in np.float32([1e-3, 1.0, 100.0]):
        updates = {"v": np.float32([3.0, 4.0, 0.0, 0.0]) * size, "w": np.float32([1.0, 0.0, 0.0, 0.0]) * size}
        clipped, state = run(adaptive(name, scope), [updates] * 30)
        chex.assert_trees_all_equal(clipped, [updates] * 30)
        assert state.clip_rate == 0


@every
@by_scope
def test_updates_come_back_after_steps_of_zero(name, scope):
    """Zero gradients at the start, as with frozen or masked weights, do not turn later updates into zeros for good."""
    for zeros in (1, 2, 20):
        samples = [pair(0, 0.0)] * zeros + [pair(i) for i in range(20)]
        clipped, state = run(adaptive(name, scope), samples)
        chex.assert_trees_all_equal(clipped[:zeros], samples[:zeros])
        chex.assert_tree_all_finite((clipped, state.rule))
        assert all(np.any(leaf) for leaf in jax.tree.leaves(clipped[-10:]))


@every
def test_a_leaf_that_starts_late_is_let_through(name):
    """A leaf whose gradient is zero at first, beside one that is not, moves later, and the other is unaffected."""
    samples = [{**pair(i), "v": pair(i)["v"] * np.float32(i >= 10)} for i in range(40)]
    clipped, _ = run(adaptive(name, "leaf"), samples)
    assert all(np.any(updates["v"]) for updates in clipped[-15:])
    expected, _ = run(adaptive(name, "leaf"), [{**updates, "v": np.ones(4, np.float32)} for updates in samples])
    chex.assert_trees_all_equal([updates["w"] for updates in clipped], [updates["w"] for updates in expected])


@every
@by_scope
def test_statistics_of_huge_and_tiny_norms_are_finite(name, scope):
    """Norms of 1e30, of 1e-30 and of both in turn leave statistics and updates finite."""
    for scales in ((1e30,), (1e-30,), (1e30, 1e-30), (1e-30, 1e30, 1.0)):
        clipped, state = run(adaptive(name, scope), [pair(i, scales[i % len(scales)]) for i in range(20)])
        chex.assert_tree_all_finite((clipped, state.rule))


@every
@pytest.mark.parametrize("scale", [1e30, 1e-12])
def test_statistics_of_huge_and_small_norms_are_exact(name, scale):
    """Clipped norms follow the reference where squares of norms leave the range of f32."""
    rule = {
        "autoclip": lambda: reference.EachBlock(2, lambda: reference.Autoclip(30.0, 4)),
        "zclip": lambda: reference.EachBlock(2, lambda: reference.Zclip(2.5, 0.9, 3)),
        "adagc": lambda: reference.Adagc(2, np.inf, 1.05, 0.9, 3),
        "clip_by_sigma": lambda: reference.EachBlock(2, lambda: reference.ClipBySigma(3.0, 4)),
    }[name]()
    samples = [pair(i, scale) for i in range(40)]
    clipped, _ = run(adaptive(name, "leaf"), samples)
    for updates, actual in zip(samples, clipped):
        norms = np.array([float(reference.p_norm(leaf)) for leaf in updates.values()])
        after = [reference.p_norm(leaf) for leaf in actual.values()]
        np.testing.assert_allclose(after, np.minimum(norms, rule(norms)), rtol=1e-4)


@pytest.mark.full
def test_many_leaves():
    """Four hundred scalars, each with a history of its own, follow the reference."""
    norms = np.float32(np.exp(np.random.default_rng(0).normal(size=(8, 400))))
    clipped, _ = run(oc.autoclip(50.0, 7, norm=oc.leaf_norm), [list(row) for row in norms])
    rule = reference.EachBlock(400, lambda: reference.Autoclip(50.0, 7))
    expected = np.array([np.minimum(row, rule(row)) for row in norms.astype(np.float64)])
    np.testing.assert_allclose(np.array(clipped), expected, rtol=1e-4)


# Bad steps

BAD = [None, None, "v", None, None, "w", None, "v", None, None]  # which leaf is bad, the first within warm-up


def broken(number: int) -> dict:
    """The gradients of a step, with one bad entry in some."""
    updates = pair(number)
    if BAD[number] is not None:
        updates[BAD[number]][number % 4] = (np.nan, np.inf, -np.inf)[number % 3]
    return updates


@functools.cache
def history(name, scope, kept: tuple) -> list:
    """Updates and states of these steps."""
    out, state = [], None
    for number in kept:
        updates, state = step(adaptive(name, scope), broken(number), state)
        out.append((updates, state))
    return out


@every
def test_bad_steps_leave_no_trace_at_global_scope(name):
    """Updates and statistics after bad steps are bit for bit those of a run without them, and bad updates are NaN."""
    good = [i for i, bad in enumerate(BAD) if bad is None]
    with_bad, without = (history(name, "global", tuple(kept)) for kept in (range(len(BAD)), good))
    for i, (expected, expected_state) in zip(good, without):
        chex.assert_trees_all_equal(with_bad[i][0], expected)
        chex.assert_trees_all_equal(with_bad[i][1].rule, expected_state.rule)
    for i in set(range(len(BAD))) - set(good):
        assert all(np.isnan(leaf).all() for leaf in jax.tree.leaves(with_bad[i][0]))


@every
def test_bad_steps_leave_no_trace_at_leaf_scope(name):
    """A bad leaf skips its own statistics alone. In the warm-up of adagc, where all share a scale, it skips all."""
    whole = history(name, "leaf", tuple(range(len(BAD))))
    for block, leaf in enumerate("vw"):
        shared = lambda i: name == "adagc" and i < 4
        lost = [i for i, bad in enumerate(BAD) if bad is not None and (bad == leaf or shared(i))]
        kept = [i for i in range(len(BAD)) if i not in lost]
        for i, (expected, expected_state) in zip(kept, history(name, "leaf", tuple(kept))):
            np.testing.assert_array_equal(whole[i][0][leaf], expected[leaf])
            of_block = lambda state: jax.tree.map(lambda x: x[block], state.rule)  # noqa: B023
            chex.assert_trees_all_equal(of_block(whole[i][1]), of_block(expected_state))
        assert all(np.isnan(whole[i][0][leaf]).all() for i in lost)


def test_a_traced_argument_that_is_nan_leaves_no_trace():
    """A step whose threshold turns out NaN is loud, and the next one is as if it had not been."""
    for make in (lambda x: oc.zclip(x, 0.9, 1), lambda x: oc.adagc(None, x, 0.9, 1)):
        once = jax.jit(lambda x, state: make(x).update(jnp.ones(2), state))  # noqa: B023
        state = make(0.9).init(jnp.ones(2))
        for x in (0.9, 0.9):
            _, state = once(x, state)
        updates, bad = once(jnp.nan, state)
        assert jnp.isnan(updates).all()
        chex.assert_trees_all_equal(bad.rule, state.rule)


# Arguments

NUMBERS = {
    "autoclip": (oc.autoclip, {"percentile": 30.0}, {"window": 4}),
    "zclip": (oc.zclip, {"z_max": 1.0, "decay": 0.75, "warmup_steps": 3, "factor": 0.75}, {}),
    "adagc": (oc.adagc, {"max_norm": 1.5, "max_ratio": 1.25, "decay": 0.5, "warmup_steps": 3}, {}),
    "clip_by_sigma": (oc.clip_by_sigma, {"sigmas": 0.5}, {"window": 4}),
}


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("zclip", "float32"),
        *(full(name, "float32") for name in NUMBERS if name != "zclip"),
        full("zclip", "bfloat16"),
        full("adagc", "bfloat16"),
    ],
)
def test_every_number_can_be_injected(name, dtype):
    """`inject_hyperparams` turns every number into state, and the results stay the same."""
    clip, numbers, shapes = NUMBERS[name]
    injected = optax.inject_hyperparams(clip, static_args=tuple(shapes))(**numbers, **shapes)
    samples = [pair(i, dtype=jnp.dtype(dtype)) for i in range(8)]
    clipped, state = run(injected, samples)
    expected, expected_state = run(clip(**numbers, **shapes), samples)
    assert state.hyperparams.keys() == numbers.keys()
    chex.assert_trees_all_close(clipped, expected, rtol=trees.tolerance(dtype))
    chex.assert_trees_all_close(state.inner_state, expected_state, rtol=1e-5)
    assert float(state.inner_state.clip_rate) > 0


@pytest.mark.parametrize("clip", [oc.autoclip, oc.clip_by_sigma])
def test_an_injected_window_says_that_it_is_a_shape(clip):
    """A window that `inject_hyperparams` made an array is an error that names `static_args`."""
    with pytest.raises(TypeError, match=r"window must be a Python number.*static_args='window'"):
        optax.inject_hyperparams(clip)(window=8).init(pair())


def test_a_number_follows_a_schedule_by_injection():
    """A schedule for `z_max` tightens the clip from step to step."""
    schedule = optax.linear_schedule(4.0, 0.0, 8)
    tx = optax.inject_hyperparams(oc.zclip)(z_max=schedule, decay=1.0, warmup_steps=2, spike="limit")
    clipped = numbers_of(tx, (1.0, 3.0, *[100.0] * 6))
    np.testing.assert_allclose(clipped[2:], [2.0 + float(schedule(number)) for number in range(2, 8)], rtol=1e-6)


@pytest.mark.parametrize("spike", [full("rescale"), full("mean"), "limit"])
def test_endless_bounds_never_clip(spike):
    """An infinite number of deviations clips nothing, also where there is no deviation."""
    norms = (1.0, 1.0, 1.0, 2.0, 1.0)
    np.testing.assert_array_equal(numbers_of(oc.zclip(math.inf, warmup_steps=2, spike=spike), norms), norms)


@pytest.mark.parametrize(
    ("make", "error", "text"),
    [
        (lambda: oc.zclip(spike="mean", factor=0.1), ValueError, "^factor .*rescale"),
        (lambda: oc.zclip(spike="limit", factor=1.0), ValueError, "^factor .*rescale"),
        (lambda: oc.zclip(spike="other"), ValueError, "^spike must be one of"),
        (lambda: oc.zclip(warmup_steps=25.5), (TypeError, ValueError), "^warmup_steps must be"),
        (lambda: oc.adagc(warmup_steps=0.5), (TypeError, ValueError), "^warmup_steps must be"),
        (lambda: oc.zclip(z_max=-1.0), ValueError, "^z_max must be >= 0, got -1"),
        (lambda: oc.zclip(decay=1.5), ValueError, "^decay must be <= 1, got 1.5"),
        (lambda: oc.autoclip(window=7.5), TypeError, "^window must be an int"),
        (lambda: oc.autoclip(window=0), ValueError, "^window must be >= 1"),
        (lambda: oc.autoclip(101.0), ValueError, "^percentile must be <= 100"),
        (lambda: oc.clip_by_sigma(-0.5), ValueError, "^sigmas must be >= 0"),
    ],
)
def test_arguments_out_of_range_are_refused(make, error, text):
    """An argument that could only be a mistake raises an error that begins with its name."""
    with pytest.raises(error, match=text):
        make()


@pytest.mark.full
def test_f64_norms_at_the_threshold_are_left_alone():
    """Where the threshold is the norm itself, an f64 update keeps its bits."""
    with jax.enable_x64(True):
        for scale in (1.0, 1e-50):
            updates = scale * jnp.array([0.1, 0.2], jnp.float64)
            clipped, state = step(oc.autoclip(100.0, 1), updates)
            chex.assert_trees_all_equal(clipped, updates)
            assert state.clip_rate == 0


# Around a clip, and on weights

MILD = {7: 1e2, 23: 3e2, 41: 1e-3}


@pytest.mark.parametrize("name", ["clip_by_global_norm", full("clip"), full("clip_by_leaf_norm")])
def test_error_feedback_follows_its_reference(name):
    """What a clip cuts off is carried to the next steps, as in float64."""
    samples = gradients(5, MILD)
    scan = scan_of(lambda threshold: oc.with_error_feedback(getattr(oc, name)(threshold)))
    fixed = FIXED[name]
    clipped, _ = scan((np.float32(2.0),), samples, WEIGHTS)
    rule = reference.ErrorFeedback(lambda grads: fixed.reference(grads, 2.0))
    expected = stack([rule(updates) for updates in rows(samples)])
    chex.assert_trees_all_close(clipped, expected, rtol=1e-3, atol=1e-3)
    assert any(np.abs(expected[leaf] - samples[leaf]).max() > 1 for leaf in expected)


@pytest.mark.parametrize("p", [2, full(1), full(3)])
def test_weights_with_a_bounded_norm_follow_their_reference(p):
    """After every step the units of the weights are those of float64, each within its bound."""
    samples = gradients(6, MILD)

    @jax.jit
    def scan(max_norm, samples, params):
        tx = oc.clip_weight_norm(max_norm, ord=p)

        def one(carry, updates):
            params, state = carry
            updates, state = tx.update(updates, state, params)
            params = optax.apply_updates(params, updates)
            return (params, state), params

        return jax.lax.scan(one, (params, tx.init(params)), samples)[1]

    weights, expected = WEIGHTS, []
    for updates in rows(samples):
        weights = reference.weight_norm(weights, updates, 2.5, p)
        expected.append(weights)
    chex.assert_trees_all_close(scan(2.5, samples, WEIGHTS), stack(expected), rtol=1e-4, atol=1e-4)


def test_each_row_of_the_table_names_a_reference_that_is_there():
    """What the table says of references is so."""
    names = {case.reference for case in table.TABLE if case.reference is not None}
    assert all(callable(getattr(reference, name, None)) for name in names)

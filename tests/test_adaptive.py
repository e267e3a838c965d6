"""Clips and rules that remember norms: their numbers, what bad steps and odd norms do to them, and their states."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
import test_guarantees  # noqa: F401  loads the profile of hypothesis
from hypothesis import given
from hypothesis import strategies as st
from test_contract import run

import optax_clip as oc

STEPS = 500
SHAPES = {"bias": (5,), "dense": (3, 4), "wide": (2, 3)}
LABELS = {"bias": "a", "dense": "b", "wide": "a"}
SCOPES = {
    "global": oc.global_norm,
    "leaf": oc.leaf_norm,
    "group": oc.group_norm(LABELS),
    "unit": functools.partial(oc.unit_norm, axis=0),
}
BAD_STEPS = {0: np.nan, 4: np.inf, 13: -np.inf, 24: np.nan, 25: np.inf, 140: np.nan, 141: -np.inf, 333: np.inf}


def close(actual, expected, rtol=1e-4):
    np.testing.assert_allclose(np.asarray(actual, np.float64), expected, rtol=rtol, atol=0.0)


class Adaptive(NamedTuple):
    """A clip, its rule and its reference, at several settings of its numbers."""

    clip: Callable  # (*numbers, norm=) -> transformation
    rule: Callable  # (*numbers) -> threshold
    reference: Callable  # (number of blocks, *numbers) -> a rule in NumPy over a vector of norms
    settings: list  # of numbers, which may be traced


def by_window(window, clip, rule, one_block, settings):
    """A clip with a window, which is a shape."""
    return Adaptive(
        lambda number, norm=None: clip(number, window, norm=norm),
        lambda number: rule(number, window),
        lambda blocks, number: reference.EachBlock(blocks, lambda: one_block(number, window)),
        settings,
    )


def by_spike(spike):
    """zclip by what it does about spikes; its numbers are z_max, decay, warmup_steps, factor."""
    settings = [(2.5, 0.97, 25, 1.0), (1.5, 0.9, 1, 0.95), (2.0, 0.9, 0, 1.25), (0.0, 0.99, 5, 1.0), (3.0, 1.0, 7, 1.0)]
    return Adaptive(
        lambda z, b, w, f, norm=None: oc.zclip(z, b, w, spike=spike, factor=f, norm=norm),
        lambda z, b, w, f: oc.z_score(z, b, w, spike=spike, factor=f),
        lambda blocks, z, b, w, f: reference.EachBlock(blocks, lambda: reference.Zclip(z, b, w, spike, f)),
        settings,
    )


WINDOWS = (1, 2, 7, 64)
ADAPTIVE = {
    **{
        f"autoclip_{window}": by_window(
            window, oc.autoclip, oc.quantile, reference.Autoclip, [(10.0,), (50.0,), (0.0,), (90.0,), (100.0,)]
        )
        for window in WINDOWS
    },
    **{f"zclip_{spike}": by_spike(spike) for spike in ("rescale", "mean", "limit")},
    "adagc": Adaptive(
        lambda *numbers, norm=None: oc.adagc(*numbers, norm=norm),
        oc.ema_ratio,
        reference.Adagc,
        [(1.0, 1.05, 0.98, 100), (3.0, 1.2, 0.5, 0), (1.0, 1.0, 0.9, 1), (100.0, 1.5, 0.9, 25)],
    ),
    **{
        f"clip_by_sigma_{window}": by_window(
            window, oc.clip_by_sigma, oc.sigma_window, reference.ClipBySigma, [(3.0,), (0.5,), (0.0,)]
        )
        for window in WINDOWS
    },
}


def gradients(seed: int, steps: int = STEPS) -> dict:
    """Gradients of all steps, stacked: their size drifts, some leaves are spikes, some zero, some not finite."""
    random = np.random.default_rng(seed)
    drift = np.exp(1.5 * np.sin(np.arange(steps) / 80))
    out = {}
    for name, shape in SHAPES.items():
        spikes = np.where(random.random(steps) < 0.05, 10 ** random.uniform(0.5, 4.0, steps), 1.0)
        sizes = drift * spikes * np.exp(0.3 * random.normal(size=steps)) * (random.random(steps) > 0.01)
        out[name] = np.float32(sizes.reshape(-1, *[1] * len(shape)) * random.normal(size=(steps, *shape)))
    for number, (step, bad) in enumerate(BAD_STEPS.items()):
        if step < steps:
            out[list(SHAPES)[number % 3]][step].flat[0] = bad
    return out


def block_norms(samples: dict, scope: str) -> np.ndarray:
    """The norms of all blocks in float64, a row for each step."""
    units = {
        name: np.sum(np.square(reference.wide(leaf)), axis=1).reshape(len(leaf), -1) for name, leaf in samples.items()
    }
    leaves = {name: squares.sum(axis=1) for name, squares in units.items()}
    columns = {
        "unit": list(units.values()),
        "leaf": list(leaves.values()),
        "group": [leaves["bias"] + leaves["wide"], leaves["dense"]],
        "global": [sum(leaves.values())],
    }
    return np.sqrt(np.column_stack(columns[scope]))


def scan_of(make):
    """All steps in one compiled scan, from the numbers of a clip: updates, thresholds and scales."""

    @jax.jit
    def scan(numbers, samples):
        tx = make(*numbers)

        def step(state, updates):
            clipped, state = tx.update(updates, state)
            return state, (clipped, state.threshold, state.scale)

        return jax.lax.scan(step, tx.init(jax.tree.map(lambda x: x[0], samples)), samples)[1]

    return scan


# Numbers


@pytest.mark.parametrize(
    ("name", "scope"),
    [
        (name, scope)
        for name in ADAPTIVE
        for scope in SCOPES
        if scope == "global" or not name.endswith(("_1", "_2", "_64"))
    ],
)
def test_clip_follows_its_reference(name, scope):
    """Thresholds, scales and clipped norms of 500 steps with drift, spikes and bad steps agree with float64."""
    case = ADAPTIVE[name]
    samples = gradients(0)
    norms = block_norms(samples, scope)
    scan = scan_of(functools.partial(case.clip, norm=SCOPES[scope]))
    for numbers in case.settings if scope == "global" else case.settings[:2]:
        clipped, thresholds, scales = scan(numbers, samples)
        rule = case.reference(norms.shape[1], *numbers)
        expected = np.array([rule(row) for row in norms])
        close(thresholds, expected.mean(axis=1))
        close(block_norms(clipped, scope), np.where(np.isnan(expected), np.nan, np.minimum(norms, expected)))
        factors = np.where(norms > expected, expected / np.where(norms == 0, 1.0, norms), 1.0)
        factors[(norms == 0) & (expected == 0)] = 0.0  # a threshold of 0 has no other scale
        close(scales, np.where(np.isnan(expected), np.nan, factors).mean(axis=1))


@pytest.mark.parametrize("name", ADAPTIVE)
def test_rule_follows_its_reference(name):
    """A rule on vectors of norms gives the threshold of each block, of any size, as in float64."""
    case = ADAPTIVE[name]
    random = np.random.default_rng(1)
    norms = np.float32(10.0 ** np.arange(-20, 21, 10) * np.exp(0.5 * random.normal(size=(100, 5))))
    if name == "adagc":  # whose blocks are scaled together, so the small ones would vanish
        norms /= np.float32(10.0 ** np.arange(-20, 21, 10))
    norms[3, 1], norms[60, 4], norms[61, 0] = np.nan, np.inf, np.nan

    @jax.jit
    def scan(numbers, norms):
        rule = case.rule(*numbers)

        def step(state, norms):
            (thresholds,), state = rule.update((norms,), state, None)
            return state, thresholds

        return jax.lax.scan(step, rule.init((norms[0],)), norms)[1]

    expected = case.reference(5, *case.settings[0])
    close(scan(case.settings[0], norms), np.array([expected(row) for row in norms.astype(np.float64)]))


def test_zclip_gives_the_numbers_of_the_authors():
    """After a warm-up of four steps, clipped norms and statistics are those of the authors' package."""
    tx = oc.zclip(warmup_steps=4)
    samples = [jnp.array([norm]) for norm in (1.0, 1.2, 0.8, 1.1, 10.0, 1.0, 3.0)]
    clipped, state = run(tx, samples, jnp.zeros(1))
    chex.assert_trees_all_equal(clipped[:4], samples[:4])
    close(jnp.concatenate(clipped[4:]), (1.0402333899, 1.0, 1.0898951204), rtol=1e-6)
    (statistics,) = state.rule
    close((statistics.mean, statistics.deviation**2), (1.0266493465, 0.0201086298), rtol=1e-5)


def test_zclip_cuts_spikes_to_the_mean_or_the_limit():
    """A spike is cut to the mean or to the limit, and in both modes an ordinary step keeps every bit."""
    for spike, expected in (("mean", 1.025), ("limit", 1.025 + 2.5 * np.std([1.0, 1.2, 0.8, 1.1]))):
        samples = [jnp.array([norm]) for norm in (1.0, 1.2, 0.8, 1.1, 10.0, 1.0)]
        clipped, _ = run(oc.zclip(warmup_steps=4, spike=spike), samples, jnp.zeros(1))
        close(clipped[4], [expected], rtol=1e-6)
        chex.assert_trees_all_equal(clipped[5], samples[5])


def test_adagc_scales_all_leaves_together_in_warmup():
    """In warm-up all leaves share the scale that brings the global norm to `max_norm`, afterwards each has its own."""
    tx = oc.adagc(max_norm=1.0, max_ratio=1.5, decay=0.5, warmup_steps=2)
    rows = [(3.0, 4.0), (0.3, 0.4), (0.2, 4.0), (0.9, 0.9)]
    samples = [{"a": jnp.array([a]), "b": jnp.array([b])} for a, b in rows]
    clipped, _ = run(tx, samples, samples[0])
    # γ is (.6, .8), then (.3, .4), then (.25, .5)
    for actual, expected in zip(clipped, [(0.6, 0.8), (0.3, 0.4), (0.2, 0.6), (0.375, 0.75)]):
        close((actual["a"][0], actual["b"][0]), expected, rtol=1e-6)


# Norms at the edges

MAKES = {
    "autoclip": lambda norm: oc.autoclip(10.0, 7, norm=norm),
    "zclip": lambda norm: oc.zclip(2.5, 0.9, 3, norm=norm),
    "adagc": lambda norm: oc.adagc(None, 1.05, 0.9, 3, norm=norm),
    "clip_by_sigma": lambda norm: oc.clip_by_sigma(3.0, 7, norm=norm),
}
every = pytest.mark.parametrize("name", MAKES)
by_scope = pytest.mark.parametrize("scope", ["global", "leaf"])


def pair(seed: int = 0, scale: float = 1.0, dtype=jnp.float32) -> dict:
    """Two leaves whose sizes vary with the seed."""
    random = np.random.default_rng(seed)
    sizes = scale * np.exp(random.normal(size=2))
    return {name: jnp.asarray(size * random.normal(size=4), dtype) for name, size in zip(("v", "w"), sizes)}


@functools.cache
def step_of(name, scope):
    """The first state and the compiled step of a clip on two leaves."""
    tx = MAKES[name](SCOPES[scope])
    return tx.init(pair()), jax.jit(tx.update)


def steps(name, scope, samples) -> tuple[list, object]:
    """The updates of each step and the last state."""
    state, step = step_of(name, scope)
    out = []
    for updates in samples:
        updates, state = step(updates, state)
        out.append(updates)
    return out, state


@every
@by_scope
@pytest.mark.parametrize("size", [1e-3, 1.0, 100.0])
def test_constant_norms_are_not_clipped(name, scope, size):
    """Where all norms are the same, the deviation is 0 and every update keeps every bit."""
    updates = {"v": jnp.array([3.0, 4.0, 0.0, 0.0]) * size, "w": jnp.array([1.0, 0.0, 0.0, 0.0]) * size}
    clipped, state = steps(name, scope, [updates] * 30)
    chex.assert_trees_all_equal(clipped, [updates] * 30)
    assert state.clip_rate == 0


@every
@by_scope
@pytest.mark.parametrize("zeros", [1, 2, 30])
def test_updates_come_back_after_steps_of_zero(name, scope, zeros):
    """Zero gradients at the start, as with frozen or masked weights, do not turn later updates into zeros for good."""
    samples = [pair(0, 0.0)] * zeros + [pair(i) for i in range(30)]
    clipped, state = steps(name, scope, samples)
    chex.assert_trees_all_equal(clipped[:zeros], samples[:zeros])
    chex.assert_tree_all_finite((clipped, state.rule))
    assert all(jnp.any(leaf) for leaf in jax.tree.leaves(clipped[-15:]))


@every
def test_a_leaf_that_starts_late_is_let_through(name):
    """A leaf whose gradient is zero at first, beside one that is not, moves later, and the other is unaffected."""
    samples = [{**pair(i), "v": pair(i)["v"] * (i >= 10)} for i in range(40)]
    clipped, _ = steps(name, "leaf", samples)
    assert all(jnp.any(updates["v"]) for updates in clipped[-15:])
    expected, _ = steps(name, "leaf", [{**updates, "v": jnp.ones(4)} for updates in samples])
    chex.assert_trees_all_equal([updates["w"] for updates in clipped], [updates["w"] for updates in expected])


@every
@by_scope
def test_all_zeros_stay_zero_and_finite(name, scope):
    """Nothing but zero gradients gives zeros and finite statistics, step after step."""
    clipped, state = steps(name, scope, [pair(0, 0.0)] * 10)
    chex.assert_trees_all_equal(clipped, [pair(0, 0.0)] * 10)
    chex.assert_tree_all_finite(state.rule)


@every
@by_scope
@pytest.mark.parametrize("scales", [(1e30,), (1e-30,), (1e30, 1e-30), (1e-30, 1e30, 1.0)], ids=str)
def test_statistics_of_huge_and_tiny_norms_are_finite(name, scope, scales):
    """Norms of 1e30, of 1e-30 and of both in turn leave statistics and updates finite."""
    samples = [pair(i, scales[i % len(scales)]) for i in range(24)]
    clipped, state = steps(name, scope, samples)
    chex.assert_tree_all_finite((clipped, state.rule))


@every
@pytest.mark.parametrize("scale", [1e30, 1e-12])
def test_statistics_of_huge_and_small_norms_are_exact(name, scale):
    """Clipped norms follow the reference where squares of norms leave the range of f32."""
    samples = [pair(i, scale) for i in range(40)]
    rule = {
        "autoclip": lambda: reference.EachBlock(2, lambda: reference.Autoclip(10.0, 7)),
        "zclip": lambda: reference.EachBlock(2, lambda: reference.Zclip(2.5, 0.9, 3)),
        "adagc": lambda: reference.Adagc(2, np.inf, 1.05, 0.9, 3),
        "clip_by_sigma": lambda: reference.EachBlock(2, lambda: reference.ClipBySigma(3.0, 7)),
    }[name]()
    clipped, _ = steps(name, "leaf", samples)
    for updates, actual in zip(samples, clipped):
        norms = np.array([float(reference.p_norm(leaf)) for leaf in updates.values()])
        expected = np.minimum(norms, rule(norms))
        close([reference.p_norm(leaf) for leaf in actual.values()], expected)


def test_a_thousand_leaves():
    """A thousand leaves of one entry, each with a history of its own, follow the reference."""
    norms = np.float32(np.exp(np.random.default_rng(0).normal(size=(8, 1000))))
    tx = oc.autoclip(50.0, 7, norm=oc.leaf_norm)
    rule = reference.EachBlock(1000, lambda: reference.Autoclip(50.0, 7))
    state, step = tx.init(list(norms[0])), jax.jit(tx.update)
    for row in norms:
        clipped, state = step(list(row), state)
        close(np.array(clipped), np.minimum(row, rule(row.astype(np.float64))))


# Bad steps

REMEMBERING = {
    "autoclip": lambda norm: oc.autoclip(30.0, 4, norm=norm),
    "zclip": lambda norm: oc.zclip(1.0, 0.9, 3, norm=norm),
    "adagc": lambda norm: oc.adagc(2.0, 1.05, 0.9, 3, norm=norm),
    "clip_by_sigma": lambda norm: oc.clip_by_sigma(1.0, 4, norm=norm),
}


@functools.cache
def compiled(name, scope):
    tx = REMEMBERING[name](SCOPES[scope])
    return tx.init(tree_of([0.0, 0.0, 0.0])), jax.jit(tx.update)


def tree_of(norms) -> dict:
    """A leaf of two entries for each norm."""
    return {name: np.float32([0.6, -0.8]) * np.float32(norm) for name, norm in zip("abc", norms)}


def replay(name, scope, sequence) -> tuple[list, list]:
    """Updates and states of each step."""
    state, step = compiled(name, scope)
    out, states = [], []
    for updates in sequence:
        clipped, state = step(updates, state)
        out.append(clipped)
        states.append(state)
    return out, states


@st.composite
def sequences(draw):
    """Steps of random norms, and for each the leaf that is bad in it, or None."""
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    bad = draw(st.lists(st.one_of(st.none(), st.integers(0, 2)), min_size=2, max_size=14))
    entries = draw(st.lists(st.sampled_from([np.nan, np.inf, -np.inf]), min_size=len(bad), max_size=len(bad)))
    sequence = []
    for leaf, entry in zip(bad, entries):
        updates = tree_of(10 ** random.uniform(-2, 2, 3))
        if leaf is not None:
            updates["abc"[leaf]][random.integers(2)] = entry
        sequence.append(updates)
    return sequence, bad


@pytest.mark.parametrize("name", REMEMBERING)
@given(case=sequences())
def test_bad_steps_leave_no_trace_at_global_scope(name, case):
    """Thresholds, updates and statistics after bad steps are bit for bit those of a run without them."""
    sequence, bad = case
    out, states = replay(name, "global", sequence)
    good = [i for i, leaf in enumerate(bad) if leaf is None]
    expected, expected_states = replay(name, "global", [sequence[i] for i in good])
    chex.assert_trees_all_equal([out[i] for i in good], expected)
    chex.assert_trees_all_equal([states[i].threshold for i in good], [state.threshold for state in expected_states])
    chex.assert_trees_all_equal(states[-1].rule, expected_states[-1].rule if good else compiled(name, "global")[0].rule)
    for updates, state, leaf in zip(out, states, bad):
        chex.assert_tree_all_finite(state.rule)
        assert leaf is None or all(np.isnan(x).all() for x in updates.values())


@pytest.mark.parametrize("name", REMEMBERING)
@given(case=sequences())
def test_bad_steps_leave_no_trace_at_leaf_scope(name, case):
    """A bad leaf skips its own statistics alone; in the warm-up of adagc, where all share a scale, those of all."""
    sequence, bad = case
    out, states = replay(name, "leaf", sequence)
    taken = np.cumsum([leaf is None for leaf in bad])
    shared = [name == "adagc" and count < 3 for count in taken]
    initial = compiled(name, "leaf")[0]
    for b, path in enumerate("abc"):
        lost = [leaf is not None and (leaf == b or together) for leaf, together in zip(bad, shared)]
        kept = [i for i, skipped in enumerate(lost) if not skipped]
        # Where others are bad, they are so here too.
        expected, expected_states = replay(name, "leaf", [sequence[i] for i in kept])
        chex.assert_trees_all_equal([out[i][path] for i in kept], [updates[path] for updates in expected])
        of_block = lambda state: jax.tree.map(lambda x: x[b], state.rule)  # noqa: B023
        chex.assert_trees_all_equal(of_block(states[-1]), of_block(expected_states[-1] if kept else initial))
        for updates, skipped in zip(out, lost):
            assert np.isnan(updates[path]).all() if skipped else np.isfinite(updates[path]).all()
    for state in states:
        chex.assert_tree_all_finite(state.rule)

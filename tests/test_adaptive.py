"""Clips and rules that remember norms: their numbers, what bad steps and odd norms do to them, and their states."""

import functools
import math
import pickle
import re
from collections.abc import Callable
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import properties  # noqa: F401  loads the profile of hypothesis
import pytest
import reference
import trees
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from test_contract import once, run, stack, types
from test_norms import mesh_of, sharded, spread

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
    clipped, state = run(tx, samples, jnp.zeros(1), jax.jit(tx.update))
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
    clipped, _ = run(tx, samples, samples[0], jax.jit(tx.update))
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


def test_many_leaves():
    """Four hundred scalars, each with a history of its own, follow the reference."""
    norms = np.float32(np.exp(np.random.default_rng(0).normal(size=(8, 400))))
    tx = oc.autoclip(50.0, 7, norm=oc.leaf_norm)
    rule = reference.EachBlock(400, lambda: reference.Autoclip(50.0, 7))
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


# States


@every
@pytest.mark.parametrize("scope", ["leaf", "unit"])
def test_state_keeps_structure_shapes_and_dtypes(name, scope):
    """Statistics are f32 and counters i32, without weak types, the same from `init` and `update`, for bf16 too."""
    tx = MAKES[name](SCOPES[scope])
    for dtype in (jnp.float32, jnp.bfloat16):
        params = {path: jnp.ones(shape, dtype) for path, shape in SHAPES.items()}
        state = tx.init(params)
        assert all(isinstance(leaf, jax.Array) and not leaf.weak_type for leaf in jax.tree.leaves(state))
        assert {leaf.dtype for leaf in jax.tree.leaves(state.rule)} == {jnp.dtype("float32"), jnp.dtype("int32")}
        assert types(jax.eval_shape(tx.init, params)) == types(state)
        updates, new_state = jax.eval_shape(tx.update, params, state)
        assert types(new_state) == types(state)
        chex.assert_trees_all_equal_shapes_and_dtypes(updates, params)


def test_state_is_a_vector_over_leaves_and_an_array_over_units():
    """Statistics of leaves are vectors, those of units have the shape of their norms, windows come last."""
    params = {path: jnp.ones(shape) for path, shape in SHAPES.items()}
    (leaves,) = oc.autoclip(10.0, 7, norm=oc.leaf_norm).init(params).rule
    chex.assert_shape([leaves.ring, leaves.ascending], (3, 7))
    chex.assert_shape([leaves.next, leaves.filled], (3,))
    units = oc.zclip(norm=SCOPES["unit"]).init(params).rule
    chex.assert_trees_all_equal([state.mean.shape for state in units], [(), (1, 4), (1, 3)])
    (whole,) = oc.clip_by_sigma(window=5).init(params).rule
    chex.assert_shape([whole.ring, whole.next], [(5,), ()])


def through_orbax(state, path):
    checkpoint = pytest.importorskip("orbax.checkpoint")
    with checkpoint.StandardCheckpointer() as checkpointer:
        checkpointer.save(path / "state", state)
        checkpointer.wait_until_finished()
        return checkpointer.restore(path / "state", jax.tree.map(jnp.zeros_like, state))


def through_flax(state, path):
    serialization = pytest.importorskip("flax.serialization")
    (path / "state").write_bytes(serialization.to_bytes(state))
    return serialization.from_bytes(jax.tree.map(jnp.zeros_like, state), (path / "state").read_bytes())


def through_pickle(state, path):
    (path / "state").write_bytes(pickle.dumps(state))
    return pickle.loads((path / "state").read_bytes())


@every
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")  # of the libraries
@pytest.mark.parametrize("through", [through_orbax, through_flax, through_pickle])
def test_a_run_goes_on_from_a_checkpoint(name, through, tmp_path):
    """A run that is saved between warm-up and a spike and restored goes on bit for bit."""
    state, step = step_of(name, "leaf")
    samples = [pair(i, 10.0 if i == 9 else 1.0) for i in range(12)]
    for updates in samples[:8]:
        _, state = step(updates, state)
    saved = through(state, tmp_path)
    chex.assert_trees_all_equal(saved, state)
    chex.assert_trees_all_equal_structs(saved, state)
    for updates in samples[8:]:
        expected, state = step(updates, state)
        actual, saved = step(updates, saved)
        chex.assert_trees_all_equal((actual, saved), (expected, state))


@every
def test_state_and_updates_can_be_donated(name):
    """No buffer of a state is used twice: all can be donated, from `init` and from a step."""
    tx = MAKES[name](oc.leaf_norm)
    step = once(tx.update, donate_argnums=(0, 1), keep_unused=True)
    state = tx.init(pair())
    for i in range(5):
        updates = pair(i)
        clipped, new_state = step(updates, state)
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves((updates, state)))
        state = new_state
    chex.assert_trees_all_equal(clipped, steps(name, "leaf", [pair(i) for i in range(5)])[0][-1])


@every
@pytest.mark.parametrize("scope", ["global", "leaf", "group", "unit"])
def test_map_params_touches_parameters_alone(name, scope):
    """`optax.tree.map_params` takes no statistic for a parameter, though there is one for each leaf."""
    params = {path: jnp.ones(shape) for path, shape in SHAPES.items()}
    tx = optax.chain(MAKES[name](SCOPES[scope]), optax.adamw(1e-3))
    state = tx.init(params)
    mapped = optax.tree.map_params(tx, lambda x: ("params", x.shape), state)
    chex.assert_trees_all_equal(mapped[0], state[0])
    assert mapped[1][0].mu == {path: ("params", shape) for path, shape in SHAPES.items()}


def test_map_params_gives_shardings_that_fit_the_state():
    """Shardings from `map_params` place the state of a clip by leaves: parameters by theirs, statistics everywhere."""
    mesh = trees.mesh(x=2)
    spread_out, everywhere = NamedSharding(mesh, P("x")), NamedSharding(mesh, P())
    tx = optax.chain(MAKES["autoclip"](oc.leaf_norm), optax.trace(0.9))
    state = tx.init(pair())
    shardings = {"v": spread_out, "w": everywhere}
    mapped = optax.tree.map_params(
        tx, lambda _, sharding: sharding, state, shardings, transform_non_params=lambda _: everywhere
    )
    placed = jax.device_put(state, mapped)
    assert placed[1].trace["v"].sharding == spread_out
    assert all(leaf.sharding == everywhere for leaf in jax.tree.leaves(placed[0]))
    step = jax.jit(tx.update)
    chex.assert_trees_all_close(step(pair(), placed)[0], step(pair(), state)[0], rtol=1e-6)


# inject_hyperparams

NUMBERS = {
    "autoclip": (oc.autoclip, {"percentile": 30.0}, {"window": 4}),
    "zclip": (oc.zclip, {"z_max": 1.0, "decay": 0.75, "warmup_steps": 3, "factor": 0.75}, {}),
    "adagc": (oc.adagc, {"max_norm": 1.5, "max_ratio": 1.25, "decay": 0.5, "warmup_steps": 3}, {}),
    "clip_by_sigma": (oc.clip_by_sigma, {"sigmas": 0.5}, {"window": 4}),
}


@pytest.mark.parametrize(
    ("name", "dtype"), [*((name, "float32") for name in NUMBERS), ("zclip", "bfloat16"), ("adagc", "bfloat16")]
)
def test_every_number_can_be_injected(name, dtype):
    """`inject_hyperparams` turns every number into state, in any dtype of params, and results stay the same."""
    clip, numbers, shapes = NUMBERS[name]
    tx, plain = (
        optax.inject_hyperparams(clip, static_args=tuple(shapes))(**numbers, **shapes),
        clip(**numbers, **shapes),
    )
    samples = [pair(i, dtype=dtype) for i in range(8)]
    clipped, state = run(tx, samples, samples[0], once(tx.update))
    expected, expected_state = run(plain, samples, samples[0], once(plain.update))
    assert state.hyperparams.keys() == numbers.keys()
    chex.assert_trees_all_close(clipped, expected, rtol=trees.tolerance(dtype))
    chex.assert_trees_all_close(state.inner_state, expected_state, rtol=1e-5)
    assert float(state.inner_state.clip_rate) > 0


@pytest.mark.parametrize("clip", [oc.autoclip, oc.clip_by_sigma])
def test_an_injected_window_says_that_it_is_a_shape(clip):
    """A window that `inject_hyperparams` made an array is an error that names `static_args`."""
    with pytest.raises(TypeError, match=r"window must be a Python int.*static_args='window'"):
        optax.inject_hyperparams(clip)(window=8).init(pair())


def test_a_number_can_follow_a_schedule_by_injection():
    """A schedule for `z_max` tightens the clip from step to step, in one trace."""
    schedule = optax.linear_schedule(4.0, 0.0, 8)
    tx = optax.inject_hyperparams(oc.zclip)(z_max=schedule, decay=1.0, warmup_steps=2, spike="limit")
    samples = [jnp.array([norm]) for norm in (1.0, 3.0, *[100.0] * 6)]
    clipped, _ = run(tx, samples, samples[0], once(tx.update))
    close(jnp.concatenate(clipped[2:]), [2.0 + float(schedule(step)) for step in range(2, 8)], rtol=1e-6)


# Rules, alone and combined

RANDOM_NORMS = np.float32(np.exp(np.random.default_rng(7).normal(size=40)))
GROWING = [jnp.array([0.1 * i]) for i in range(40)]  # parameters
HALVES = [0.5 * max(float(params[0]), 1e-3) for params in GROWING]


def thresholds_of(rule, norms=RANDOM_NORMS, params=None) -> np.ndarray:
    """The threshold of each step at global scope."""
    tx = oc.clip_by_norm(oc.global_norm, rule)
    state, step, out = tx.init(jnp.zeros(1)), once(tx.update), []
    for i, norm in enumerate(norms):
        _, state = step(jnp.array([norm]), state, None if params is None else params[i])
        out.append(float(state.threshold))
    return np.array(out)


def test_minimum_is_the_smallest_at_every_step():
    """The minimum of a number, a schedule and two rules is that of what each would be by itself."""
    schedule = optax.linear_schedule(0.25, 4.0, 40)
    parts = [1.0, schedule, oc.quantile(60.0, 16), oc.z_score(1.0, 0.9, 5, spike="mean")]
    expected = [
        np.full(40, 1.0),
        [float(schedule(step)) for step in range(40)],
        list(map(reference.Autoclip(60.0, 16), RANDOM_NORMS)),
        list(map(reference.Zclip(1.0, 0.9, 5, "mean"), RANDOM_NORMS)),
    ]
    close(thresholds_of(oc.minimum(*parts)), np.min(expected, axis=0))
    assert set(np.argmin(expected, axis=0)) == {0, 1, 2, 3}


def test_minimum_of_none_never_clips():
    """None is no bound: alone it never clips, beside others it does not matter."""
    assert np.isinf(thresholds_of(oc.minimum(None))).all()
    close(thresholds_of(oc.minimum(None, 2.0)), np.full(40, 2.0))


def test_minimum_with_a_share_of_the_parameters():
    """A rule that needs params gets those of each step, and without them the clip says that they are missing."""
    rule = oc.minimum(oc.param_fraction(0.5, oc.global_norm), oc.quantile(50.0, 8))
    assert rule.needs_params and not oc.minimum(1.0, oc.quantile()).needs_params
    quantiles = list(map(reference.Autoclip(50.0, 8), RANDOM_NORMS))
    close(thresholds_of(rule, params=GROWING), np.minimum(quantiles, HALVES))
    with pytest.raises(ValueError, match="params are missing"):
        thresholds_of(rule)


def test_a_ratio_capped_by_a_share_of_the_parameters():
    """In warm-up the cap of `ema_ratio` is that share of the parameters of the step."""
    rule = oc.ema_ratio(oc.param_fraction(0.5, oc.global_norm), warmup_steps=40)
    close(thresholds_of(rule, params=GROWING), np.minimum(RANDOM_NORMS, HALVES))


def test_z_scores_of_norms_near_its_epsilon():
    """The deviation that divides is 1e-6 larger than that of the norms, as the paper has it."""
    norms = np.float32([1e-6, 3e-6, 1e-6, 3e-6, 2e-5])
    tx = oc.zclip(z_max=2.0, warmup_steps=4)
    out, _ = run(tx, [jnp.array([norm]) for norm in norms], jnp.zeros(1))
    mean, deviation = np.mean(norms[:4]), np.std(norms[:4])
    z = (norms[4] - mean) / (deviation + 1e-6)
    close(out[4][0], mean + 2 * deviation * 2 / z)


@pytest.mark.parametrize(("ends", "size"), [((0, 1), 0.5), ((1, 0), 5.0)], ids=["lower", "upper"])
def test_a_range_of_shares_of_the_parameters(ends, size):
    """Either end of a range of norms may be a share of the norm of the parameters."""
    values = (oc.param_fraction(0.2, oc.global_norm), None)
    tx, params = oc.clip_by_norm_range(*(values[i] for i in ends)), jnp.array([3.0, 4.0])
    updates, _ = tx.update(size * jnp.array([0.6, 0.8]), tx.init(params), params)
    close(jnp.linalg.norm(updates), 1.0, rtol=1e-6)


def test_a_transformation_of_optax_is_a_rule():
    """A chain of Optax is a threshold: a little above the average of the norms, into which no bad norm enters."""
    norms = RANDOM_NORMS.copy()
    norms[[0, 5, 6]] = np.nan, np.inf, np.nan
    expected, average, count = [], 0.0, 0
    for norm in norms.astype(np.float64):
        if np.isfinite(norm):
            count += 1
            average = 0.9 * average + 0.1 * norm
        expected.append(1.05 * average / (1 - 0.9**count) if np.isfinite(norm) else np.nan)
    close(thresholds_of(optax.chain(optax.ema(0.9), optax.scale(1.05)), norms), expected)


class RunningMean:
    """One and a half times the mean of all norms so far."""

    def __init__(self):
        self.norms = []

    def __call__(self, n):
        if not np.isfinite(n):
            return np.nan
        self.norms.append(n)
        return 1.5 * np.mean(self.norms)


def running_mean():
    def update(norm, state):
        count, mean = state["count"] + 1, state["mean"] + (norm - state["mean"]) / (state["count"] + 1)
        return 1.5 * mean, {"count": count, "mean": mean}

    return oc.per_block(lambda: {"count": jnp.zeros([], jnp.int32), "mean": 0.0}, update)


@pytest.mark.parametrize("scope", SCOPES)
def test_a_rule_of_the_user_at_every_scope(scope):
    """A rule for one block, written by a user, holds for each block of any scope, and sees finite norms only."""
    samples = gradients(2, steps=60)
    norms = block_norms(samples, scope)
    clipped, thresholds, _ = scan_of(lambda: oc.clip_by_norm(SCOPES[scope], running_mean()))((), samples)
    rule = reference.EachBlock(norms.shape[1], RunningMean)
    expected = np.array([rule(row) for row in norms])
    close(thresholds, expected.mean(axis=1))
    close(block_norms(clipped, scope), np.where(np.isnan(expected), np.nan, np.minimum(norms, expected)))


def test_rules_by_leaf_keep_their_own_statistics():
    """In a tree of thresholds each leaf follows its own rule, beside numbers and None."""
    tx = oc.clip_by_leaf_norm({"bias": oc.quantile(50.0, 8), "dense": 2.0, "wide": oc.z_score(1.0, 0.9, 3)})
    samples = gradients(3, steps=40)
    samples = {path: np.nan_to_num(leaf, posinf=0.0, neginf=0.0) for path, leaf in samples.items()}
    norms = block_norms(samples, "leaf")
    clipped, _ = run(tx, [jax.tree.map(lambda x: x[i], samples) for i in range(40)], samples, jax.jit(tx.update))  # noqa: B023
    rules = [reference.Autoclip(50.0, 8), lambda n: 2.0, reference.Zclip(1.0, 0.9, 3)]
    expected = np.array([[rule(n) for rule, n in zip(rules, row)] for row in norms])
    close(block_norms(stack(clipped), "leaf"), np.minimum(norms, expected))


@pytest.mark.parametrize("kind", ["schedule", "rule"])
def test_the_bound_of_adagc_in_warmup_may_change(kind):
    """In warm-up `max_norm` may follow a schedule or a rule on the norm of all blocks."""
    schedule = optax.linear_schedule(0.1, 3.0, 30)
    tx = oc.adagc(schedule if kind == "schedule" else oc.quantile(30.0, 8))
    samples = [pair(i) for i in range(30)]
    clipped, _ = run(tx, samples, samples[0], once(tx.update))
    quantile = reference.Autoclip(30.0, 8)
    for step, (updates, actual) in enumerate(zip(samples, clipped)):
        total = trees.norm64(updates)
        bound = float(schedule(step)) if kind == "schedule" else quantile(total)
        chex.assert_trees_all_close(actual, reference.global_norm(updates, bound), rtol=1e-5)


# What every clip keeps


@every
def test_updates_keep_structure_shapes_and_dtypes(name):
    """Updates of mixed dtypes and ranks come back as they went in."""
    tx, updates = MAKES[name](oc.leaf_norm), trees.mixed(0)
    clipped, _ = jax.eval_shape(lambda updates: tx.update(updates, tx.init(updates)), updates)
    chex.assert_trees_all_equal_shapes_and_dtypes(clipped, updates)


@every
@pytest.mark.parametrize("x64", [False, True], ids=["x32", "x64"])
def test_strict_promotion(name, x64):
    """No rule relies on promotion of dtypes or ranks."""
    with jax.enable_x64(x64), jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        tx, updates = MAKES[name](oc.leaf_norm), {**trees.mixed(0), "widest": jnp.ones((2, 3), float)}
        clipped, _ = jax.eval_shape(lambda updates: tx.update(updates, tx.init(updates)), updates)
    chex.assert_trees_all_equal_shapes_and_dtypes(clipped, updates)


@every
def test_leaves_without_a_norm_are_returned_as_they_are(name):
    """Integers, booleans, float0, keys, functions and empty nodes come back untouched and have no statistics."""
    updates, tx = trees.odd(), MAKES[name](oc.leaf_norm)
    clipped, state = tx.update(updates, tx.init(updates))
    chex.assert_trees_all_equal_structs(clipped, updates)
    assert all(clipped[path] is updates[path] for path in updates if path not in ("weight", "masked", "empty"))
    alone = {"weight": updates["weight"]}
    chex.assert_trees_all_equal_shapes_and_dtypes(state, tx.init(alone))


@every
def test_extra_arguments_of_update_are_accepted(name):
    """Params and extra keyword arguments, which other members of a chain may need, change nothing."""
    tx = MAKES[name](oc.leaf_norm)
    assert isinstance(tx, optax.GradientTransformationExtraArgs)
    state, step = step_of(name, "leaf")
    extra = jax.jit(lambda updates, state: tx.update(updates, state, pair(1), value=jnp.float32(2.0), grad=updates))
    chex.assert_trees_all_equal(extra(pair(), state), step(pair(), state))


@every
def test_compiled_is_eager(name):
    """Eager steps with `debug_nans` on give what compiled ones give, through warm-up, zeros and spikes."""
    samples = [pair(i, scale) for i, scale in enumerate((1.0, 0.0, 2.0, 1.0, 1.5, 1e25, 1.0, 1e-25, 1.0))]
    tx = MAKES[name](oc.leaf_norm)
    with jax.debug_nans(True):
        actual = run(tx, samples, pair())
    clipped, state = steps(name, "leaf", samples)
    chex.assert_trees_all_close(actual, (clipped, state), rtol=1e-5)


@every
def test_one_trace_serves_many_steps(name):
    """Warm-up, spikes and bad steps are one program."""
    samples = [pair(i, np.inf if i == 4 else 1.0) for i in range(10)]
    tx = MAKES[name](oc.leaf_norm)
    chex.assert_trees_all_equal(run(tx, samples, pair(), once(tx.update)), steps(name, "leaf", samples))


@every
def test_vmap_over_seeds_is_a_loop(name):
    """Runs side by side under `vmap` keep statistics of their own, a bad step in one of them included."""
    tx = MAKES[name](oc.leaf_norm)

    def run_of(samples):
        scan = lambda state, updates: tx.update(updates, state)[::-1]
        return jax.lax.scan(scan, tx.init(jax.tree.map(lambda x: x[0], samples)), samples)

    seeds = [stack([pair(10 * seed + i, np.nan if i == seed else 1.0) for i in range(10)]) for seed in range(3)]
    together = jax.jit(jax.vmap(run_of))(stack(seeds))
    expected = stack([(state, out) for out, state in [steps_of(name, "leaf", samples) for samples in seeds]])
    chex.assert_trees_all_close(together, expected, rtol=1e-5)


def steps_of(name, scope, samples):
    out, state = steps(name, scope, [jax.tree.map(lambda x: x[i], samples) for i in range(10)])  # noqa: B023
    return stack(out), state


@pytest.mark.parametrize("wrap", ["masked", "partition"])
def test_leaves_outside_have_no_statistics(wrap):
    """Leaves outside of a mask or partition come back bit-identical and leave no trace in the statistics."""
    clip = MAKES["zclip"](oc.leaf_norm)
    if wrap == "masked":
        tx = optax.masked(clip, {"v": True, "w": False})
    else:
        tx = optax.partition({"clip": clip, "rest": optax.identity()}, {"v": "clip", "w": "rest"})
    samples = [pair(i, 100.0 if i == 8 else 1.0) for i in range(10)]
    clipped, state = run(tx, samples, pair(), once(tx.update))
    state = state.inner_state if wrap == "masked" else state.inner_states["clip"].inner_state
    inside = [{"v": updates["v"]} for updates in samples]
    expected, expected_state = run(clip, inside, inside[0], jax.jit(clip.update))
    chex.assert_trees_all_close([{"v": updates["v"]} for updates in clipped], expected, rtol=1e-6)
    chex.assert_trees_all_equal([updates["w"] for updates in clipped], [updates["w"] for updates in samples])
    chex.assert_trees_all_close(jax.tree.leaves(state), jax.tree.leaves(expected_state), rtol=1e-6)


def test_multi_steps_remembers_the_norm_of_the_mean():
    """In `MultiSteps` one norm enters the history for each whole step: that of the mean."""
    clip = oc.autoclip(30.0, 4)
    tx, samples = optax.MultiSteps(clip, 2), [pair(i) for i in range(12)]
    clipped, state = run(tx, samples, pair(), once(tx.update))
    means = [jax.tree.map(lambda a, b: (a + b) / 2, *two) for two in zip(samples[::2], samples[1::2])]
    expected, expected_state = run(clip, means, pair(), jax.jit(clip.update))
    chex.assert_trees_all_close((clipped[1::2], state.inner_opt_state), (expected, expected_state), rtol=1e-5)


# Sharded

SHARDED = {
    "zclip": lambda: oc.zclip(1.0, 0.9, 3),
    "autoclip_by_leaf": lambda: oc.autoclip(30.0, 4, norm=oc.leaf_norm),
    "adagc": lambda: oc.adagc(5.0, 1.05, 0.9, 3),
}
SIZES = (1.0, 2.0, 0.5, 1.0, 100.0, np.nan, 1.0, 5.0, 1.0)


@pytest.mark.parametrize(
    ("name", "mesh_name"), [("zclip", "8"), ("zclip", "4x2"), ("autoclip_by_leaf", "4x2_both"), ("adagc", "4x2")]
)
def test_shard_map_is_one_device(name, mesh_name):
    """On shards, updates are those of one device and statistics are the same everywhere, `init` inside or outside."""
    updates, specs = spread(mesh_name)
    tx, mesh = SHARDED[name](), mesh_of(mesh_name)
    inside = sharded(tx.init, mesh, (specs,), P())(updates)
    expected_state = state = tx.init(updates)
    chex.assert_trees_all_equal_shapes_and_dtypes(inside, state)
    chex.assert_trees_all_equal(inside, state)
    state, step = inside, sharded(tx.update, mesh, (specs, P()), (specs, P()))
    alone = jax.jit(tx.update)
    for size in SIZES:
        scaled = jax.tree.map(lambda x, size=size: size * x, updates)
        clipped, state = step(scaled, state)
        expected, expected_state = alone(scaled, expected_state)
        chex.assert_trees_all_close((clipped, state), (expected, expected_state), rtol=1e-5)
        assert all(leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(state))


# Programs


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="reads programs of XLA's CPU backend")
def test_a_history_for_each_leaf_costs_few_kernels():
    """At 200 leaves the histories are one vector: no sort, and few more kernels than for a fixed threshold."""
    updates = [jax.ShapeDtypeStruct((64, 32), jnp.float32)] * 200

    def program(tx):
        return jax.jit(tx.update).lower(updates, jax.eval_shape(tx.init, updates)).compile().as_text()

    fixed, adaptive = program(oc.clip_by_leaf_norm(1.0)), program(oc.autoclip(window=256, norm=oc.leaf_norm))
    assert not re.search(r"\bsort\(", adaptive)
    kernels = [len(re.findall(r" fusion\(", text[text.index("\nENTRY") :])) for text in (fixed, adaptive)]
    assert kernels[1] - kernels[0] <= 60


def test_endless_bounds_never_clip():
    """An infinite number of deviations or ratio clips nothing, also where there is no deviation."""
    for spike in ("rescale", "mean", "limit"):
        tx = oc.zclip(math.inf, warmup_steps=2, spike=spike)
        state = tx.init(jnp.zeros(1))
        for x in (1.0, 1.0, 1.0, 2.0, 1.0):
            updates, state = tx.update(jnp.array([x]), state)
            assert updates[0] == x


def test_traced_nan_argument_leaves_no_trace():
    """A step whose decay turns out NaN is loud, and the next one is as if it had not been."""
    for make in (lambda decay: oc.zclip(decay=decay, warmup_steps=1), lambda decay: oc.adagc(None, 1.05, decay, 1)):
        step = jax.jit(lambda decay, state: make(decay).update(jnp.ones(2), state))  # noqa: B023
        state = make(0.9).init(jnp.ones(2))
        for decay in (0.9, 0.9):
            _, state = step(decay, state)
        updates, bad = step(jnp.nan, state)
        assert jnp.isnan(updates).all()
        chex.assert_trees_all_equal(bad.rule, state.rule)


@pytest.mark.parametrize("scale", [1.0, 1e-50])
def test_f64_norms_at_the_threshold_are_left_alone(scale):
    """Where the threshold is the norm itself, an f64 update keeps its bits though statistics are f32."""
    with jax.enable_x64(True):
        tx = oc.autoclip(100.0, 1)
        updates = scale * jnp.array([0.1, 0.2], jnp.float64)
        clipped, state = tx.update(updates, tx.init(updates))
        chex.assert_trees_all_equal(clipped, updates)
        assert state.clip_rate == 0


def test_a_state_of_the_user_may_start_with_nan():
    """A window filled up with NaN takes in norms; one that is not finite still leaves no trace."""

    def update(norm, window):
        window = jnp.roll(window, 1).at[0].set(norm)
        return 2 * jnp.nanmedian(window), window

    tx = oc.clip_by_norm(oc.global_norm, oc.per_block(lambda: jnp.full(3, jnp.nan), update))
    state = tx.init(jnp.zeros(1))
    for gradient, window in ((1.0, [1]), (2.0, [2, 1]), (np.nan, [2, 1]), (9.0, [9, 2, 1])):
        updates, state = tx.update(jnp.array([gradient]), state)
        chex.assert_trees_all_equal(state.rule[0], jnp.float32([*window, *[np.nan] * (3 - len(window))]))
    assert updates == 4.0


def test_norms_of_integers_are_norms():
    """A norm of the user may count."""
    tx = oc.clip_by_norm(jnp.count_nonzero, 1.0)
    updates, state = tx.update(jnp.full(4, 2.0), tx.init(jnp.zeros(4)))
    chex.assert_trees_all_close((updates, state.norm), (jnp.full(4, 0.5), jnp.float32(4.0)))


@pytest.mark.parametrize("rule", [oc.z_score(np.inf), oc.z_score(np.inf, spike="limit"), oc.ema_ratio(None, np.inf)])
def test_no_nan_appears_on_the_way_to_an_endless_threshold(rule):
    """Infinite arguments give infinite thresholds, with `jax.debug_nans` and in derivatives too."""
    tx, samples = oc.clip_by_norm(oc.global_norm, rule), jnp.ones((30, 2)).at[-1].set(100.0)

    def last(samples):
        _, updates = jax.lax.scan(lambda state, x: tx.update(x, state)[::-1], tx.init(samples[0]), samples)
        return updates[-1].sum()

    with jax.debug_nans(True):
        value, slope = jax.jit(jax.value_and_grad(last))(samples)
    assert value == 200.0
    chex.assert_trees_all_equal(slope, jnp.zeros((30, 2)).at[-1].set(1.0))


@pytest.mark.parametrize(
    ("init", "update", "text"),
    [
        (lambda: jnp.zeros([]), lambda norm, state: (norm, jnp.ones(3)), "must keep shapes and dtypes"),
        (lambda: 0, lambda norm, state: (norm, state + 0.5), "must keep shapes and dtypes"),
        (lambda: jnp.zeros([]), lambda norm, state: (norm, (state, state)), "must keep the structure"),
        (lambda: jnp.zeros([]), lambda norm, state: (norm * jnp.ones(3), state), "must return a scalar threshold"),
    ],
)
def test_rules_of_another_form_are_refused(init, update, text):
    """A rule whose state changes its form, or whose threshold is no scalar, raises."""
    tx = oc.clip_by_norm(oc.leaf_norm, oc.per_block(init, update))
    updates = {"a": jnp.ones(2), "b": jnp.ones(3)}
    with pytest.raises(ValueError, match=f"^per_block: update {text}"):
        tx.update(updates, tx.init(updates))

"""What holds for all updates, thresholds and clips: properties of random trees.

Thirty examples each; HYPOTHESIS_PROFILE=long runs ten thousand.
"""

import functools
import math
import os

import chex
import clips
import jax
import jax.numpy as jnp
import numpy as np
import reference
import trees
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

import optax_clip as oc

shared = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow, HealthCheck.filter_too_much]}
settings.register_profile("normal", max_examples=30, derandomize=True, database=None, **shared)
settings.register_profile("long", max_examples=10_000, **shared)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "normal"))

SMALLEST = float(jnp.finfo(jnp.float32).smallest_normal)
LARGEST = float(jnp.finfo(jnp.float32).max)

# Few structures, so that few programs are compiled: of rank 0 to 4, with size 0, of every dtype.
TREES = (
    {"bias": ("float32", (3,)), "dense": ("float32", (4, 3))},
    {"a": [("bfloat16", (2, 3, 2)), ("float32", ())], "b": {"none": None, "z": ("complex64", (3,))}},
    (("float16", (2, 2, 1, 3)), [("float32", (0, 2)), ("bfloat16", (2, 1))]),
    ("complex64", (2, 2)),
)
is_leaf = lambda x: isinstance(x, tuple) and isinstance(x[0], str)
WIDE = (TREES[0], TREES[1], TREES[3])  # those without f16, whose range is small

any_clip = st.sampled_from(clips.CLIPS)
any_norm_clip = st.sampled_from(clips.NORM_CLIPS)
any_shrinking = st.sampled_from(clips.SHRINKING)
factors = st.one_of(st.sampled_from([1e-6, 0.5, 0.999, 1.0, 1.001, 2.0, 1e6]), st.floats(1e-3, 1e3))
seeds = st.integers(0, 2**32 - 1)


@st.composite
def updates_of(draw, lowest=-45.0, highest=38.0, decades=30.0, kinds=TREES):
    """A tree of finite updates: leaves of magnitudes of their own, entries spread over decades, some of them zero."""
    random = np.random.default_rng(draw(seeds))
    zeros = draw(st.sampled_from([0.0, 0.3, 1.0]))

    def leaf(kind):
        dtype, shape = kind
        size = draw(st.floats(lowest, highest))
        logs = np.minimum(size - draw(st.floats(0.0, decades)) * random.random(shape), highest)
        values = 10.0 ** np.maximum(logs, lowest) * random.uniform(0.5, 1.0, shape) * random.choice([-1.0, 1.0], shape)
        values = values * (random.random(shape) >= zeros)
        values = values * np.exp(1j * random.uniform(0, 6, shape)) if dtype == "complex64" else values
        limit = float(jnp.finfo(dtype).max) / 2
        parts = [np.clip(part, -limit, limit) for part in (values.real, values.imag)]
        return jnp.asarray(parts[0] + (1j * parts[1] if dtype == "complex64" else 0.0), dtype)

    return jax.tree.map(leaf, draw(st.sampled_from(kinds)), is_leaf=is_leaf)


def thresholds_of(updates) -> st.SearchStrategy:
    """Thresholds >= 0 of sizes that the leaves can hold."""
    narrow = any(leaf.dtype == jnp.float16 for leaf in jax.tree.leaves(updates))
    powers = st.floats(-3.0, 4.0) if narrow else st.floats(-27.0, 38.0)
    return st.one_of(st.sampled_from([0.0, 1.0]), powers.map(lambda power: 10.0**power))


@functools.cache
def compiled(case):
    """One step from a fresh state, compiled once for each structure."""

    @jax.jit
    def step(updates, threshold, params):
        tx = case.make(threshold)
        return tx.update(updates, tx.init(params), params)

    return lambda updates, threshold: step(updates, threshold, jax.tree.map(jnp.zeros_like, updates))


def by_path(updates) -> dict:
    """The leaves by their paths, as the reference wants them."""
    return {jax.tree_util.keystr(path): np.asarray(x) for path, x in jax.tree_util.tree_leaves_with_path(updates)}


def bits(updates):
    return jax.tree.map(lambda x: np.asarray(x).view(f"u{x.dtype.itemsize}"), updates)


def rounding(leaf) -> tuple[float, float]:
    """Relative and absolute error of a number that was rounded to the leaf's dtype once."""
    info = jnp.finfo(leaf.dtype)
    return max(float(info.eps), trees.tolerance(jnp.float32)), max(SMALLEST, float(info.smallest_normal * info.eps))


def assert_close(actual, expected):
    """Each entry of two dicts of leaves within a few roundings of the dtype of its leaf."""
    for name, leaf in actual.items():
        relative, absolute = rounding(leaf)
        np.testing.assert_allclose(reference.wide(leaf), expected[name], rtol=relative, atol=absolute)


def in_range(case, updates) -> bool:
    """No block has a norm above the largest f32, or nearly so."""
    return max(reference.block_norms(case, by_path(updates)).values(), default=0.0) < 0.999 * LARGEST


def divides_by_norm(case, threshold) -> bool:
    """The rule of AGC divides by 1e-6 where the norm is smaller, so it falls below thresholds smaller than that."""
    return case.name != "adaptive_grad_clip" or threshold >= 1e-6 or threshold == 0


@given(any_norm_clip, updates_of(), st.data())
def test_bound_and_direction(case, updates, data):
    """Each block is scaled by one factor >= 0, rounded once, and its norm is at most the threshold."""
    threshold = data.draw(thresholds_of(updates))
    assume(in_range(case, updates) and divides_by_norm(case, threshold))
    clipped, state = compiled(case)(updates, threshold)
    chex.assert_tree_all_finite((clipped, state.clip_rate))
    if threshold == 0:
        assert not any(leaf.any() for leaf in jax.tree.leaves(clipped))
        return
    leaves = by_path(updates)
    tiny = min((n for n in reference.block_norms(case, leaves).values() if n > 0), default=1.0) < 2e-27
    assume(case.keeps_small or not tiny)  # a norm so small may be taken for 0
    assert_close(by_path(clipped), reference.clipped(case, leaves, float(np.float32(threshold))))
    room = 1 + max(trees.tolerance(leaf.dtype) for leaf in leaves.values())
    assert max(reference.block_norms(case, by_path(clipped)).values(), default=0.0) <= threshold * room


@given(any_shrinking, updates_of(), factors)
def test_bit_identical_up_to_the_threshold(case, updates, factor):
    """Updates whose norms are at most the threshold keep every bit."""
    leaves = by_path(updates)
    if case.measure is None:
        largest = np.abs(reference.flat(leaves)).max(initial=0.0)
    else:
        assume(in_range(case, updates))
        largest = max(reference.block_norms(case, leaves).values(), default=0.0)
    threshold = min(largest * (1 + 1e-6) * max(factor, 1.0) + SMALLEST, LARGEST)
    clipped, _ = compiled(case)(updates, threshold)
    chex.assert_trees_all_equal(bits(clipped), bits(updates))


@given(any_clip, updates_of(), st.booleans(), seeds)
def test_threshold_inf_keeps_every_bit(case, updates, broken, seed):
    """Under a threshold of inf every bit stays, with a NaN or inf among the entries too."""
    if broken:
        updates = break_one(updates, seed, np.nan if seed % 2 else -np.inf)[0]
    clipped, _ = compiled(case)(updates, np.inf)
    chex.assert_trees_all_equal(bits(clipped), bits(updates))


@given(any_shrinking, updates_of(lowest=-30.0), st.data())
def test_clipping_twice_is_clipping_once(case, updates, data):
    """A second clip changes nothing but roundings."""
    threshold = data.draw(thresholds_of(updates))
    assume(divides_by_norm(case, threshold) and (case.measure is None or in_range(case, updates)))
    clipped, _ = compiled(case)(updates, threshold)
    again, _ = compiled(case)(clipped, threshold)
    coarsest = max(rounding(leaf)[0] for leaf in jax.tree.leaves(updates))  # the norm after roundings of all leaves
    for name, leaf in by_path(clipped).items():
        once, twice = reference.wide(leaf), reference.wide(by_path(again)[name])
        np.testing.assert_allclose(twice, once, rtol=2 * coarsest, atol=2 * rounding(leaf)[1])


@given(any_clip, updates_of(lowest=-12.0, highest=12.0, decades=6.0, kinds=WIDE), factors, st.integers(-40, 40))
def test_scaling_updates_and_threshold(case, updates, factor, power):
    """Updates and threshold times a power of two give the clipped updates times that power."""
    assume(case.name != "adaptive_grad_clip")  # it has a scale of its own
    scaled = jax.tree.map(lambda x: x * jnp.asarray(2.0**power, x.real.dtype), updates)
    clipped, state = compiled(case)(updates, factor)
    clipped_scaled, state_scaled = compiled(case)(scaled, factor * 2.0**power)
    expected = {name: reference.wide(leaf) * 2.0**power for name, leaf in by_path(clipped).items()}
    actual = by_path(clipped_scaled)
    for name, leaf in actual.items():
        np.testing.assert_allclose(reference.wide(leaf), expected[name], rtol=rounding(leaf)[0], atol=SMALLEST)
    if case.measure is not None:
        np.testing.assert_allclose(state_scaled.norm, state.norm * 2.0**power, rtol=1e-6)


@given(any_clip, updates_of(), factors)
def test_sign_does_not_matter(case, updates, factor):
    """The negative updates give the negative result, bit for bit."""
    assume(case.name != "clip_by_value")  # the table's bounds one side
    clipped, _ = compiled(case)(updates, factor)
    negative, _ = compiled(case)(jax.tree.map(jnp.negative, updates), factor)
    chex.assert_trees_all_equal(negative, jax.tree.map(jnp.negative, clipped))


@given(
    st.sampled_from([case for case in clips.NORM_CLIPS if case.scope == "global"]),
    st.permutations(range(3)),
    st.sampled_from([0, 2, 6]),
    st.floats(-27.0, 37.0),
    factors,
    seeds,
)
def test_order_and_splitting_of_leaves_do_not_matter(case, order, at, power, factor, seed):
    """The norm of the whole tree does not depend on the order of leaves, or on where one ends and another begins."""
    random = np.random.default_rng(seed)
    leaves = [jnp.float32(10.0**power * random.normal(size=size) / 60) for size in (6, 3, 9)]
    threshold = np.float32(min(10.0**power * factor, LARGEST))
    clipped, state = compiled(case)(leaves, threshold)
    chex.assert_trees_all_equal_shapes_and_dtypes(clipped, leaves)
    moved, moved_state = compiled(case)([leaves[i] for i in order], threshold)
    for place, i in enumerate(order):
        np.testing.assert_allclose(moved[place], clipped[i], rtol=trees.tolerance(jnp.float32), atol=SMALLEST)
    parts, parts_state = compiled(case)([leaves[0][:at], leaves[0][at:], *leaves[1:]], threshold)
    joined = [jnp.concatenate(parts[:2]), *parts[2:]]
    chex.assert_trees_all_close(joined, clipped, rtol=trees.tolerance(jnp.float32), atol=SMALLEST)
    chex.assert_trees_all_close((moved_state.norm, parts_state.norm), (state.norm, state.norm), rtol=1e-6)


@given(any_clip, updates_of(), st.one_of(factors, st.sampled_from([0.0, np.inf, np.nan, -1.0])))
def test_structure_shapes_and_dtypes_are_kept(case, updates, threshold):
    """Whatever the threshold, the result has the structure, shapes and dtypes of the updates, the state its own."""
    clipped, state = compiled(case)(updates, threshold)
    chex.assert_trees_all_equal_structs(clipped, updates)
    chex.assert_trees_all_equal_shapes_and_dtypes(clipped, updates)
    assert state.step == 1
    for leaf in jax.tree.leaves(state):
        chex.assert_shape(leaf, ())


def break_one(updates, seed, bad):
    """The updates with one entry replaced, and the path and place of that entry."""
    leaves, treedef = jax.tree.flatten(updates)
    random = np.random.default_rng(seed)
    number = random.choice([i for i, leaf in enumerate(leaves) if leaf.size])
    leaf = np.array(leaves[number])
    place = random.integers(leaf.size)
    leaf.reshape(-1)[place] = bad
    leaves[number] = jnp.asarray(leaf)
    return treedef.unflatten(leaves), list(by_path(updates))[number], place


@given(any_clip, updates_of(), factors, seeds, st.sampled_from([np.nan, np.inf, -np.inf]))
def test_bad_entry_is_loud_in_its_block_alone(case, updates, factor, seed, bad):
    """With a NaN or inf its whole block is NaN, the others are as without it, and the clip rate stays finite."""
    broken, path, place = break_one(updates, seed, bad)
    clean, clean_state = compiled(case)(updates, factor)
    clipped, state = compiled(case)(broken, factor)
    numbers = reference.block_numbers(case, by_path(updates))
    hit = {name: number == numbers[path].reshape(-1)[place] for name, number in numbers.items()}
    for name, leaf in by_path(clipped).items():
        rest = ~hit[name]
        assert np.array_equal(bits(leaf)[rest], bits(by_path(clean)[name])[rest])
        if case.measure is not None or np.isnan(bad):
            assert np.isnan(leaf[hit[name]]).all()
        else:
            assert not np.isnan(leaf[hit[name]]).any()
    if case.measure is not None:
        assert not np.isfinite(state.norm)
        assert np.isfinite(state.clip_rate) and state.clip_rate <= clean_state.clip_rate


@given(any_norm_clip, updates_of(lowest=-20.0, highest=4.0), factors, seeds)
def test_bad_step_leaves_no_trace(case, updates, factor, seed):
    """After a bad step, clips go on as if it had not been; only the steps are counted."""
    tx = case.make(factor)
    params = jax.tree.map(jnp.zeros_like, updates)
    step = compiled_update(case)
    first, state = step(updates, tx.init(params), factor, params)
    _, bad_state = step(break_one(updates, seed, np.nan)[0], state, factor, params)
    again, last_state = step(updates, bad_state, factor, params)
    chex.assert_trees_all_equal(bits(again), bits(first))
    chex.assert_trees_all_equal(last_state._replace(step=state.step, clip_rate=state.clip_rate), state)
    assert last_state.step == 3
    # Blocks beside the broken one may have been clipped in the second step too.
    share = float(state.clip_rate)
    assert 2 * share / 3 - 1e-6 <= last_state.clip_rate <= share + 1e-6


@functools.cache
def compiled_update(case):
    """One step from a given state."""
    return jax.jit(lambda updates, state, threshold, params: case.make(threshold).update(updates, state, params))


@given(updates_of(), st.sampled_from([1, 1.5, 2, 2.5, 3, 5, math.inf]))
def test_norms_of_every_order(updates, ord):
    """Norms agree with float64 over the range of f32, and are inf above it."""
    leaves = by_path(updates)
    norms = jax.tree.leaves(leaf_norms(ord)(updates))
    for leaf, norm in zip(leaves.values(), norms):
        expected = reference.p_norm(leaf, ord)
        if expected > 1.001 * LARGEST:
            assert norm == np.inf
        elif expected < 1e-27:
            assert 0 <= norm <= 1.001e-27
        elif expected < 0.999 * LARGEST:
            np.testing.assert_allclose(norm, expected, rtol=3e-6)


@functools.cache
def leaf_norms(ord):
    return jax.jit(functools.partial(oc.leaf_norm, ord=ord))

"""What holds for all updates, thresholds and clips: properties of random trees."""

import functools
import math

import chex
import clips
import jax
import jax.numpy as jnp
import numpy as np
import optax
import reference
import trees
from hypothesis import assume, given
from hypothesis import strategies as st
from properties import (
    DTYPES,
    LARGEST,
    SMALLEST,
    WIDE,
    any_clip,
    any_form,
    any_norm_clip,
    any_shrinking,
    assert_near,
    assert_same,
    bits,
    block_norms,
    break_one,
    by_path,
    error_of,
    factors,
    in_range,
    largest_norm,
    pool,
    precision_of,
    rounding,
    seeds,
    step,
    thresholds_of,
    updates_of,
)

import optax_clip as oc

WIDE_TREES = pool(WIDE)


def divides_by_norm(case, threshold) -> bool:
    """The rule of AGC divides by 1e-6 where the norm is smaller, so it falls below thresholds smaller than that."""
    return case.name != "adaptive_grad_clip" or threshold >= 1e-6 or threshold == 0


@given(any_norm_clip, updates_of(), any_form, st.data())
def test_bound_and_direction(case, updates, form, data):
    """Each block is scaled by one factor >= 0, rounded once, and its norm is at most the threshold, or it is NaN."""
    threshold = data.draw(thresholds_of(updates))
    assume(divides_by_norm(case, threshold))
    leaves, norms = by_path(updates), block_norms(case, updates)
    assume(not any(0.999 < norm / LARGEST < 1.001 for norm in norms.values()))
    assume(case.keeps_small or all(norm == 0 or norm > 2e-27 for norm in norms.values()))  # may be taken for 0
    clipped, state = step(case, updates, threshold, form)
    numbers = reference.block_numbers(case, leaves)
    in_f64 = {b for name, leaf in leaves.items() if leaf.real.itemsize == 8 for b in np.unique(numbers[name])}
    above = {b for b, norm in norms.items() if norm > LARGEST}
    lost = above - in_f64  # norms of f64 go on
    # What processors flush to 0 may be scaled up.
    growth = {b: 1.0 if case.keeps_small or norm == 0 else max(1.0, threshold / norm) for b, norm in norms.items()}
    expected = reference.clipped(case, leaves, threshold) if threshold else dict.fromkeys(leaves, 0.0)
    errors = {}
    for name, leaf in by_path(clipped).items():
        wanted = np.where(np.isin(numbers[name], [*lost]), np.nan, expected[name])
        errors[name] = error_of(leaf, wanted) + SMALLEST * reference.spread(growth, numbers[name])
        assert np.array_equal(np.isnan(leaf), np.isnan(wanted)), name
        assert (np.isnan(wanted) | (np.abs(reference.wide(leaf) - wanted) <= errors[name])).all(), name
    room = reference.block_norms(case, errors)
    for block, norm in block_norms(case, clipped).items():
        assert block in lost or norm <= threshold * (1 + 1e-6) + room[block]
    chex.assert_tree_all_finite(state.clip_rate)


@given(st.sampled_from([case for case in clips.CLIPS if case.measure is None]), updates_of(), any_form, st.data())
def test_entries_lie_inside_of_bounds(case, updates, form, data):
    """Each entry is the nearest inside of the bound, which is rounded to the dtype of the leaf; phases are kept."""
    threshold = data.draw(thresholds_of(updates))
    clipped, _ = step(case, updates, threshold, form)
    for name, leaf in by_path(clipped).items():
        x, bound = reference.wide(by_path(updates)[name]), float(np.asarray(threshold, leaf.real.dtype))
        size = np.abs(x)
        if case.name == "clip_by_value" and leaf.dtype.kind != "c":  # the table's bounds one side
            expected = np.minimum(x, bound)
        else:
            expected = np.where(size > bound, x / np.where(size == 0, 1.0, size) * bound, x)
        relative = trees.tolerance(leaf.dtype) if leaf.dtype.kind == "c" else 0.0
        np.testing.assert_allclose(reference.wide(leaf), expected, rtol=relative, atol=2 * SMALLEST, err_msg=name)


@given(any_shrinking, updates_of(), factors, any_form)
def test_bit_identical_up_to_the_threshold(case, updates, factor, form):
    """Updates whose norms are at most the threshold keep every bit."""
    if case.measure is None:
        largest = np.abs(reference.flat(by_path(updates))).max(initial=0.0)
    else:
        assume(in_range(case, updates))
        largest = largest_norm(case, updates)
    assume(largest * (1 + 1e-6) <= LARGEST)
    threshold = min(largest * (1 + 1e-6) * max(factor, 1.0) + SMALLEST, LARGEST)
    clipped, _ = step(case, updates, threshold, form)
    chex.assert_trees_all_equal(bits(clipped), bits(updates))


@given(any_clip, updates_of(), st.booleans(), seeds, any_form)
def test_threshold_inf_keeps_every_bit(case, updates, broken, seed, form):
    """Under a threshold of inf every bit stays, with a NaN or inf among the entries too."""
    if broken:
        updates = break_one(updates, seed, np.nan if seed % 2 else -np.inf)[0]
    clipped, _ = step(case, updates, np.inf, form)
    chex.assert_trees_all_equal(bits(clipped), bits(updates))


@given(any_shrinking, updates_of(lowest=-30.0), st.data())
def test_clipping_twice_is_clipping_once(case, updates, data):
    """A second clip changes nothing but roundings, by as much as those of the first have changed the norm."""
    threshold = data.draw(thresholds_of(updates))
    assume(divides_by_norm(case, threshold) and (case.measure is None or in_range(case, updates)))
    clipped, _ = step(case, updates, threshold)
    again, _ = step(case, clipped, threshold)
    leaves = by_path(clipped)
    if case.measure is None or threshold == 0:
        # Rounded parts of a complex entry may lie just outside of the disc.
        real = [name for name, leaf in leaves.items() if threshold == 0 or not np.iscomplexobj(leaf)]
        assert_same({name: by_path(again)[name] for name in real}, {name: leaves[name] for name in real})
        assert_near(again, clipped)
        return
    room = reference.block_norms(case, {name: error_of(leaf, reference.wide(leaf)) for name, leaf in leaves.items()})
    change = {b: norm / threshold + 1e-6 for b, norm in room.items()}
    numbers = reference.block_numbers(case, leaves)
    for name, leaf in leaves.items():
        once, twice = reference.wide(leaf), reference.wide(by_path(again)[name])
        allowed = np.abs(once) * reference.spread(change, numbers[name]) + error_of(leaf, once)
        assert (np.abs(twice - once) <= allowed).all(), name


@given(
    any_clip,
    updates_of(lowest=-12.0, highest=12.0, decades=6.0, kinds=WIDE_TREES, extremes=False),
    factors,
    st.integers(-40, 40),
)
def test_scaling_updates_and_threshold(case, updates, factor, power):
    """Updates and threshold times a power of two give the clipped updates times that power."""
    assume(case.name != "adaptive_grad_clip")  # it has a scale of its own
    scaled = jax.tree.map(lambda x: (x * x.real.dtype.type(2.0**power)).astype(x.dtype), updates)
    clipped, state = step(case, updates, factor)
    clipped_scaled, state_scaled = step(case, scaled, np.float32(factor) * 2.0**power)
    expected = {name: reference.wide(leaf) * 2.0**power for name, leaf in by_path(clipped).items()}
    for name, leaf in by_path(clipped_scaled).items():
        np.testing.assert_allclose(reference.wide(leaf), expected[name], rtol=rounding(leaf)[0], atol=SMALLEST)
    if case.measure is not None:
        np.testing.assert_allclose(state_scaled.norm, state.norm * 2.0**power, rtol=1e-6)


@given(any_clip, updates_of(), factors)
def test_sign_does_not_matter(case, updates, factor):
    """The negative updates give the negative result, exactly."""
    assume(case.name != "clip_by_value")  # the table's bounds one side
    clipped, _ = step(case, updates, factor)
    negative, _ = step(case, jax.tree.map(np.negative, updates), factor)
    assert_same(negative, jax.tree.map(np.negative, clipped))


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
    leaves = [np.float32(10.0**power * random.normal(size=size) / 60) for size in (6, 3, 9)]
    threshold = min(10.0**power * factor, LARGEST)
    clipped, state = step(case, leaves, threshold)
    chex.assert_trees_all_equal_shapes_and_dtypes(clipped, leaves)
    moved, moved_state = step(case, [leaves[i] for i in order], threshold)
    for place, i in enumerate(order):
        np.testing.assert_allclose(moved[place], clipped[i], rtol=trees.tolerance(jnp.float32), atol=SMALLEST)
    parts, parts_state = step(case, [leaves[0][:at], leaves[0][at:], *leaves[1:]], threshold)
    joined = [np.concatenate(parts[:2]), *parts[2:]]
    chex.assert_trees_all_close(joined, clipped, rtol=trees.tolerance(jnp.float32), atol=SMALLEST)
    chex.assert_trees_all_close((moved_state.norm, parts_state.norm), (state.norm, state.norm), rtol=1e-6)


@given(any_clip, updates_of(), st.one_of(factors, st.sampled_from([0.0, np.inf, np.nan, -1.0])), any_form)
def test_structure_shapes_and_dtypes_are_kept(case, updates, threshold, form):
    """Whatever the threshold, the result has the structure, shapes and dtypes of the updates, the state its own."""
    clipped, state = step(case, updates, threshold, form)
    chex.assert_trees_all_equal_structs(clipped, updates)
    chex.assert_trees_all_equal_shapes_and_dtypes(clipped, updates)
    assert state.step == 1
    for leaf in jax.tree.leaves(state):
        chex.assert_shape(leaf, ())
        assert leaf.dtype in (np.int32, np.float32)


@given(any_clip, updates_of(), factors, seeds, st.sampled_from([np.nan, np.inf, -np.inf]))
def test_bad_entry_is_loud_in_its_block_alone(case, updates, factor, seed, bad):
    """With a NaN or inf its whole block is NaN, or an inf at the bound of entries; others are as without it."""
    broken, path, place = break_one(updates, seed, bad)
    is_nan = np.isnan(by_path(broken)[path].reshape(-1)[place])  # some dtypes have no inf
    clean, clean_state = step(case, updates, factor)
    clipped, state = step(case, broken, factor)
    numbers = reference.block_numbers(case, by_path(updates))
    hit = {name: number == numbers[path].reshape(-1)[place] for name, number in numbers.items()}
    for name, leaf in by_path(clipped).items():
        rest = np.ravel(~hit[name])
        assert np.array_equal(bits(leaf)[rest], bits(by_path(clean)[name])[rest])
        if case.measure is not None or is_nan:
            assert np.isnan(leaf[hit[name]]).all()
        elif hit[name].any() and not (case.name == "clip_by_value" and bad < 0):  # the table's bounds one side
            bound = min(float(np.float32(factor)), float(jnp.finfo(leaf.dtype).max))
            assert np.abs(reference.wide(leaf[hit[name]])) == float(np.asarray(bound, leaf.real.dtype))
    if case.measure is not None:
        assert not np.isfinite(state.norm)
        assert np.isfinite(state.clip_rate) and state.clip_rate <= clean_state.clip_rate


@given(any_norm_clip, updates_of(lowest=-20.0, highest=4.0), factors, seeds)
def test_bad_step_leaves_no_trace(case, updates, factor, seed):
    """After a bad step, clips go on as if it had not been; only the steps are counted."""
    first, state = step(case, updates, factor)
    _, bad_state = step(case, break_one(updates, seed, np.nan)[0], factor, state=state)
    again, last_state = step(case, updates, factor, state=bad_state)
    chex.assert_trees_all_equal(bits(again), bits(first))
    chex.assert_trees_all_equal(last_state._replace(step=state.step, clip_rate=state.clip_rate), state)
    assert last_state.step == 3
    # Blocks beside the broken one may have been clipped in the second step too.
    share = float(state.clip_rate)
    assert 2 * share / 3 - 1e-6 <= last_state.clip_rate <= share + 1e-6


@given(any_clip, updates_of(), st.sampled_from([0, 1e-3, 250.0, np.inf, None]), any_form)
def test_constants_are_as_schedules_and_traced_thresholds(case, updates, threshold, form):
    """A threshold known at construction gives the numbers of a schedule and of a traced one; None those of inf."""
    expected, _ = step(case, updates, np.inf if threshold is None else threshold, form)
    clipped, _ = one_step(constant(case, threshold), updates)
    chex.assert_trees_all_equal_structs(clipped, expected)
    assert_same(clipped, expected)


@given(any_clip, updates_of(), factors)
def test_compiled_is_eager(case, updates, threshold):
    """Without a compiled program, updates differ by roundings at most."""
    expected, expected_state = step(case, updates, threshold)
    clipped, state = one_step(functools.partial(fresh_step, case, np.float32(threshold)), updates)
    chex.assert_trees_all_equal_shapes_and_dtypes((clipped, state), (expected, expected_state))
    assert_near(clipped, expected)
    chex.assert_trees_all_close(state, expected_state, rtol=1e-6)


def one_step(update, updates):
    with precision_of(updates):
        return jax.device_get(update(updates, jax.tree.map(np.zeros_like, updates)))


def fresh_step(case, threshold, updates, params):
    tx = case.make(threshold)
    return tx.update(updates, tx.init(params), params)


@functools.cache
def constant(case, threshold):
    return jax.jit(functools.partial(fresh_step, case, None if threshold is None else np.float32(threshold)))


@functools.cache
def gradient(case):
    """Derivatives of a weighted sum of the clipped updates by updates and threshold."""

    def loss(args, weights):
        threshold, updates = args
        tx = case.make(threshold)
        clipped, _ = tx.update(updates, tx.init(updates), jax.tree.map(jnp.zeros_like, updates))
        return optax.tree.vdot(weights, clipped).real

    return jax.jit(jax.grad(loss))


@given(
    any_clip,
    updates_of(lowest=-12.0, highest=12.0, decades=12.0, kinds=WIDE_TREES, extremes=False),
    st.floats(-6.0, 6.0),
)
def test_derivatives_are_finite(case, updates, power):
    """Derivatives by updates and threshold are finite, whatever the updates, zeros too."""
    with precision_of(updates):
        weights = jax.tree.map(np.ones_like, updates)
        grads = jax.device_get(gradient(case)((np.float32(10.0**power), updates), weights))
    chex.assert_tree_all_finite(grads)
    chex.assert_trees_all_equal_shapes_and_dtypes(grads[1], updates)


@given(updates_of(lowest=-6.0, highest=6.0, decades=6.0, extremes=False), seeds, st.floats(-4.0, 1.0))
def test_adaptive_clipping_follows_the_parameters(updates, seed, power):
    """Each unit is bounded by its share of the norm of the parameters, which is at least eps."""
    random, clipping = np.random.default_rng(seed), np.float32(10.0**power)
    sizes = 10.0 ** random.uniform(-5.0, 2.0, 5)
    leaves, treedef = jax.tree.flatten(updates)
    params = treedef.unflatten([np.float32(size * random.normal(size=leaf.shape)) for size, leaf in zip(sizes, leaves)])
    with precision_of(updates):
        clipped = jax.device_get(adaptive(updates, params, clipping))
    expected = reference.adaptive(by_path(updates), by_path(params), float(clipping))
    chex.assert_trees_all_equal_shapes_and_dtypes(clipped, updates)
    for name, leaf in by_path(clipped).items():
        assert (np.abs(reference.wide(leaf) - expected[name]) <= 2 * error_of(leaf, expected[name])).all(), name


@jax.jit
def adaptive(updates, params, clipping):
    tx = oc.adaptive_grad_clip(clipping)
    return tx.update(updates, tx.init(params), params)[0]


@given(updates_of(), st.sampled_from([1, 1.5, 2, 2.5, 3, 5, math.inf]))
def test_norms_of_every_order(updates, ord):
    """Norms agree with float64 over the range of f32, and are inf above it."""
    with precision_of(updates):
        norms = jax.tree.leaves(jax.device_get(leaf_norms(ord)(updates)))
    for leaf, norm in zip(by_path(updates).values(), norms):
        expected = reference.p_norm(leaf, ord)
        if expected > 1.001 * LARGEST and norm.dtype == np.float32:
            assert norm == np.inf
        elif expected < 1e-27:
            assert 0 <= norm <= 1.001e-27
        elif not 0.999 < expected / LARGEST < 1.001:
            np.testing.assert_allclose(norm, expected, rtol=3e-6)


@functools.cache
def leaf_norms(ord):
    return jax.jit(functools.partial(oc.leaf_norm, ord=ord))


def test_trees_have_every_dtype_and_rank():
    """The trees of the normal profile too have entries of every dtype, in every rank, and leaves without entries."""
    leaves = jax.tree.leaves(pool())
    assert {leaf.ndim for leaf in leaves if leaf.size} == set(range(6))
    assert any(leaf.size == 0 for leaf in leaves)
    for dtypes in (DTYPES, WIDE):
        assert {str(leaf.dtype) for leaf in jax.tree.leaves(pool(dtypes)) if leaf.size} == set(dtypes)

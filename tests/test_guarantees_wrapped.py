"""What holds for all updates in clips with a history, clips of weights, and wrappers: properties of random trees."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import reference
from hypothesis import assume, given
from hypothesis import strategies as st
from properties import (
    LARGEST,
    any_clip,
    assert_near,
    assert_same,
    bits,
    break_one,
    by_path,
    error_of,
    factors,
    pool,
    precision_of,
    rounding,
    seeds,
    step,
    updates_of,
)

import optax_clip as oc

ORDINARY = {"lowest": -6.0, "highest": 0.5, "decades": 4.0, "extremes": False}
NORMS = {"global": oc.global_norm, "leaf": oc.leaf_norm, "unit": oc.unit_norm}
MOST_STEPS = 9  # eight, and a NaN
ADAPTIVE = {
    "autoclip": lambda norm: oc.autoclip(50.0, 4, norm=norm),
    "zclip": lambda norm: oc.zclip(1.0, 0.9, 3, norm=norm),
    "zclip_mean": lambda norm: oc.zclip(1.0, 0.9, 3, spike="mean", norm=norm),
    "adagc": lambda norm: oc.adagc(5.0, 1.05, 0.9, 3, norm=norm),
    "clip_by_sigma": lambda norm: oc.clip_by_sigma(1.0, 4, norm=norm),
}


@functools.cache
def of_history(name, scope):
    """A clip with a history, and a compiled run over updates that have a leading axis of steps."""
    tx = ADAPTIVE[name](NORMS[scope])

    def steps(state, updates):
        clipped, state = tx.update(updates, state)
        return state, (clipped, state)

    def run(updates):
        return jax.lax.scan(steps, tx.init(jax.tree.map(lambda x: jnp.zeros_like(x[0]), updates)), updates)[1]

    return tx, jax.jit(run)


def run(name, scope, updates, sizes):
    """Updates, clipped updates and states of one step after the other, in which the updates have these sizes."""
    padded = [*sizes, *[1.0] * (MOST_STEPS - len(sizes))]  # so that one program serves all

    def sized(x):
        return np.stack([(x * x.real.dtype.type(size)).astype(x.dtype) for size in padded])

    with precision_of(updates), np.errstate(invalid="ignore"):  # inf and NaN in dtypes that have none
        updates = jax.tree.map(sized, updates)
        out = updates, *jax.device_get(of_history(name, scope)[1](updates))
    return [jax.tree.map(lambda x, i=i: x[i], out) for i in range(len(sizes))]


any_adaptive = st.sampled_from([*ADAPTIVE])
any_scope = st.sampled_from([*NORMS])
sizes_of_steps = st.lists(st.sampled_from([0.0, 0.25, 0.5, 1.0, 1.0, 1.0, 2.0, 32.0]), min_size=1, max_size=8)


@given(any_adaptive, any_scope, updates_of(**ORDINARY), sizes_of_steps)
def test_a_clip_with_a_history_scales_down(name, scope, updates, sizes):
    """Norms do not grow; at global scope they are at most the threshold, below which every bit stays."""
    norm_of = lambda leaves: reference.p_norm(reference.flat(leaves))
    for sized, clipped, state in run(name, scope, updates, sizes):
        chex.assert_trees_all_equal_shapes_and_dtypes(clipped, sized)
        chex.assert_tree_all_finite((clipped, state.norm, state.clip_rate))
        before, after = (norm_of(by_path(tree)) for tree in (sized, clipped))
        leaves = by_path(clipped)
        room = norm_of({key: error_of(leaf, reference.wide(leaf)) for key, leaf in leaves.items()}) + 1e-6 * before
        assert after <= before + room
        if scope == "global":
            assert after <= state.threshold + room
            if before <= state.threshold * (1 - 1e-6):
                chex.assert_trees_all_equal(bits(clipped), bits(sized))


@given(any_adaptive, any_scope, updates_of(**ORDINARY), sizes_of_steps)
def test_types_of_a_history_do_not_change(name, scope, updates, sizes):
    """The state has the structure, shapes and dtypes of that of `init`, and what it keeps is never NaN."""
    tx, _ = of_history(name, scope)
    with precision_of(updates):
        initial = jax.eval_shape(tx.init, updates)
    for _, _, state in run(name, scope, updates, [*sizes, np.nan]):
        chex.assert_trees_all_equal_structs(state, initial)
        chex.assert_trees_all_equal_shapes_and_dtypes(state, initial)
        assert not any(np.isnan(leaf).any() for leaf in jax.tree.leaves(state.rule))


# Wrappers


@functools.cache
def skipping():
    tx = lambda threshold: oc.skip_spikes(optax.trace(0.5), threshold)
    update = jax.jit(lambda updates, state, threshold: tx(threshold).update(updates, state))
    return update, tx(1.0).init, jax.jit(optax.trace(0.5).update)


@given(updates_of(highest=30.0), factors, seeds, st.sampled_from([None, np.nan, np.inf]))
def test_a_spike_leaves_no_trace(updates, factor, seed, bad):
    """Above the threshold, or with a NaN or inf, updates are 0 and the optimizer keeps every bit; else it is alone."""
    update, init, trace = skipping()
    norm = reference.p_norm(reference.flat(by_path(updates)))
    threshold = np.float32(min(max(norm, 1e-20) * factor, LARGEST))
    assume(bad is not None or not 1 - 1e-5 < norm / threshold < 1 + 1e-5)
    with precision_of(updates):
        _, state = update(jax.tree.map(np.ones_like, updates), init(updates), np.inf)
        given_ = updates if bad is None else break_one(updates, seed, bad)[0]
        new, after = jax.device_get(update(given_, state, threshold))
        alone, _ = jax.device_get(trace(updates, state.inner_state))
        state = jax.device_get(state)
    chex.assert_trees_all_equal_shapes_and_dtypes((new, after), (alone, state))
    if bad is None and norm <= threshold:
        assert_near(new, alone)
        assert after.total_skipped == 0
    else:
        assert not any(leaf.any() for leaf in jax.tree.leaves(new))
        chex.assert_trees_all_equal(bits(after.inner_state), bits(state.inner_state))
        assert (after.total_skipped, after.consecutive_skipped) == (1, 1)


@functools.cache
def wrapped(case, wrap):
    """A compiled step of a clip inside a wrapper, from a fresh state."""
    make = {
        "feedback": lambda clip, *_: oc.with_error_feedback(clip),
        "element": oc.clip_randomly,
        "leaf": functools.partial(oc.clip_randomly, per="leaf"),
    }[wrap]

    def update(updates, threshold, carry, *arguments):
        tx, params = make(case.make(threshold), *arguments), jax.tree.map(jnp.zeros_like, updates)
        state = tx.init(params)
        return tx.update(updates, state._replace(carry=carry) if wrap == "feedback" else state, params)

    return jax.jit(update)


@given(any_clip, updates_of(lowest=-6.0, highest=4.0, decades=6.0, extremes=False), factors, seeds)
def test_feedback_loses_nothing(case, updates, factor, seed):
    """What comes out and the carry add up to what went in and the carry before, to roundings of the carry."""
    random = np.random.default_rng(seed)
    with precision_of(updates):
        zero = oc.with_error_feedback(oc.clip(1.0)).init(updates).carry
        carry = jax.tree.map(lambda x: random.normal(size=x.shape).astype(x.dtype), zero)
        new, state = jax.device_get(wrapped(case, "feedback")(updates, np.float32(factor), carry))
    chex.assert_trees_all_equal_shapes_and_dtypes(new, updates)
    chex.assert_trees_all_equal_shapes_and_dtypes(state.carry, carry)
    for name in by_path(updates):
        terms = [reference.wide(by_path(tree)[name]) for tree in (updates, carry, new, state.carry)]
        size = sum(map(np.abs, terms))
        error = np.abs(terms[0] + terms[1] - terms[2] - terms[3])
        eps = float(jnp.finfo(by_path(carry)[name].dtype).eps)
        assert (error <= 2 * eps * size + 2.0**-120).all(), name


@given(
    any_clip,
    updates_of(),
    factors,
    st.sampled_from(["element", "leaf"]),
    st.sampled_from([0.0, 0.5, 1.0]),
    seeds,
)
def test_random_clips_choose_between_two(case, updates, factor, per, probability, seed):
    """Every entry is that of the clip or the one before: by leaf all of one kind, and all or none at the ends."""
    clipped, _ = step(case, updates, factor)
    with precision_of(updates):
        arguments = (np.float32(probability), np.uint32([seed, 1]))
        new, _ = jax.device_get(wrapped(case, per)(updates, np.float32(factor), None, *arguments))
    chex.assert_trees_all_equal_shapes_and_dtypes(new, updates)
    for name, leaf in by_path(new).items():
        same = [(bits(leaf) == bits(by_path(tree)[name])).all(axis=1) for tree in (updates, clipped)]
        # Another program may round otherwise.
        other = reference.wide(by_path(clipped)[name])
        relative, absolute = rounding(leaf)
        near = np.isclose(reference.wide(leaf), other, rtol=relative, atol=absolute, equal_nan=True)
        of_clip = same[1] | np.ravel(near)
        assert (same[0] | of_clip).all()
        if probability == 1.0:
            assert of_clip.all()
        elif probability == 0.0:
            assert same[0].all()
        elif per == "leaf":
            assert same[0].all() or of_clip.all()


# Weights

REAL = pool(("float32", "float32", "bfloat16", "float16", "float64"))
WEIGHTS = [*REAL, *pool(("float32", "complex64", "complex128"))]
BY_ENTRY = {"clip_weights": oc.clip_weights, "prune_weights": oc.prune_weights}
BY_LEAF = {
    "clip_weight_norm": oc.clip_weight_norm,
    "rescale_weights": lambda bound: oc.rescale_weights(-bound, bound),
    "project_weights": lambda bound: oc.project_weights(optax.projections.projection_non_negative),
}


@functools.cache
def landing(name):
    """The weights after a compiled step of a clip of weights, or of nothing."""

    def land(weights, updates, bound):
        tx = (BY_ENTRY | BY_LEAF)[name](bound) if name else optax.identity()
        updates, state = tx.update(updates, tx.init(weights), weights)
        return optax.apply_updates(weights, updates), state

    return jax.jit(land)


def landed(name, weights, updates, bound):
    with precision_of(weights):
        return jax.device_get(landing(name)(weights, updates, np.float32(bound)))


def moved_by(weights, seed):
    """Updates of the size of the weights, or much smaller or larger; sums stay in the range of f16."""
    random = np.random.default_rng(seed)
    factor = 10.0 ** random.choice([-6, -1, 0, 0, 1])

    def move(x):
        moved = reference.wide(x) * factor * random.normal(size=x.shape)
        return (moved / np.maximum(1.0, np.abs(moved) / 2e4)).astype(x.dtype)

    return jax.tree.map(move, weights)


def landings(name, weights, seed, bound):
    """Each leaf after a step, with its numbers before, without a clip and after; and the state."""
    updates = moved_by(weights, seed)
    out, state = landed(name, weights, updates, bound)
    plain, _ = landed(None, weights, updates, bound)
    chex.assert_trees_all_equal_shapes_and_dtypes(out, weights)
    sides = [by_path(tree) for tree in (weights, plain, out)]
    return {key: (leaf, *(reference.wide(side[key]) for side in sides)) for key, leaf in sides[-1].items()}, state


def room_of(leaf, before, after):
    """A few roundings of the old or the new weights, the larger ones."""
    return 4 * error_of(leaf, np.maximum(np.abs(before), np.abs(after)))


@given(
    st.sampled_from([*BY_ENTRY]),
    updates_of(highest=4.0, kinds=WEIGHTS, extremes=False),
    seeds,
    st.floats(-8.0, 4.0),
)
def test_weights_end_on_the_right_side(name, weights, seed, power):
    """No real weight lies outside of a bound (inside, if pruned) by a rounding, and all are near where they belong."""
    bound = float(np.float32(10.0**power))
    leaves, state = landings(name, weights, seed, bound)
    assert 0 <= state.touched <= 1
    for key, (leaf, before, moved, after) in leaves.items():
        size, room = np.abs(after), room_of(leaf, before, moved)
        slack = room if leaf.dtype.kind == "c" else 0.0
        if name == "clip_weights":
            assert (size <= bound + slack).all()
            expected = moved / np.maximum(1.0, np.abs(moved) / bound)
            assert (np.abs(after - expected) <= room).all(), key
        else:
            assert ((size == 0) | (size > bound - slack)).all()
            assert (np.where(size == 0, np.abs(moved) <= bound + room, np.abs(after - moved) <= room)).all(), key


@given(st.sampled_from([*BY_ENTRY, "clip_weight_norm"]), updates_of(highest=4.0, kinds=WEIGHTS, extremes=False), seeds)
def test_weights_without_a_bound_land_as_they_would(name, weights, seed):
    """Under a bound of inf (0 for pruning) weights end where they would without a clip."""
    leaves, _ = landings(name, weights, seed, 0.0 if name == "prune_weights" else np.inf)
    for key, (leaf, before, moved, after) in leaves.items():
        assert (np.abs(after - moved) <= room_of(leaf, before, moved)).all(), key


@given(
    st.sampled_from([*BY_LEAF]),
    updates_of(lowest=-3.0, highest=3.0, decades=4.0, kinds=REAL, extremes=False),
    seeds,
    st.floats(-2.0, 2.0),
)
def test_weights_end_in_the_set(name, weights, seed, power):
    """Weights are where the set is nearest: norms, ranges and signs hold to a few roundings of old or new weights."""
    bound = float(np.float32(10.0**power))
    leaves, _ = landings(name, weights, seed, bound)
    for key, (leaf, before, moved, after) in leaves.items():
        if not leaf.size:
            continue
        room = room_of(leaf, before, np.maximum(np.abs(moved), np.abs(after)))
        if name == "clip_weight_norm":
            axes = reference.axes_by_rank(leaf.shape)
            norms = reference.p_norm(moved, 2, axes)
            whole = np.sqrt(np.sum(room**2, axis=axes, keepdims=True))
            assert (np.abs(after - moved / np.maximum(1.0, norms / bound)) <= room + whole).all(), key
        elif name == "project_weights":
            assert (np.abs(after - np.maximum(moved, 0.0)) <= room).all(), key
        else:
            assert (np.abs(after) <= bound + room).all(), key
            if np.ptp(moved) > 8 * room.max():
                assert after.min() <= -bound + room.max() and after.max() >= bound - room.max(), key


@given(st.sampled_from([*BY_ENTRY]), updates_of(highest=4.0, kinds=REAL, extremes=False), seeds, st.floats(-8.0, 4.0))
def test_a_second_clip_of_weights_changes_nothing(name, weights, seed, power):
    """Weights that are inside, and do not move, stay where they are."""
    bound = 10.0**power
    once, _ = landed(name, weights, moved_by(weights, seed), bound)
    twice, _ = landed(name, once, jax.tree.map(np.zeros_like, weights), bound)
    assert_same(twice, once)

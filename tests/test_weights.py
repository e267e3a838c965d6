"""Clips of weights: where `optax.apply_updates` puts them, in every dtype and under every transformation."""

import functools
import pickle
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import trees
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from test_contract import once, pair, run, stack, types
from test_programs import ENTRIES, SHAPES, compiled_step, entry

import optax_clip as oc
from optax_clip._landing import rounded_to

project = optax.projections
CLIPS = {
    "clip_weights": lambda: oc.clip_weights(0.5),
    "prune_weights": lambda: oc.prune_weights(0.5),
    "clip_weight_norm": lambda: oc.clip_weight_norm(0.5),
    "clip_weight_norm_rows": lambda: oc.clip_weight_norm(0.5, -1, ord=1),
    "normalize": lambda: oc.clip_weight_norm(0.5, response=oc.normalize),
    "rescale_weights": lambda: oc.rescale_weights(-0.5, 0.25),
    "project_weights": lambda: oc.project_weights(functools.partial(project.projection_l2_ball, scale=0.5)),
}
every = pytest.mark.parametrize("name", CLIPS)


def norms(w, axis, ord=2):
    return (np.abs(w) ** ord).sum(axis=axis, keepdims=True) ** (1 / ord)


def shrunk(w, axis, ord=2):
    return w * np.minimum(1, 0.5 / norms(w, axis, ord))


def rescaled(w):
    span = np.ptp(w)
    return np.full_like(w, -0.5) if span == 0 else -0.5 + 0.75 * (w - w.min()) / span


def in_ball(tree):
    size = np.sqrt(sum((w**2).sum() for w in tree.values()))
    return {name: w * min(1, 0.5 / size) for name, w in tree.items()}


leafwise = lambda function: lambda tree: {name: function(w) for name, w in tree.items()}
REFERENCES = {  # of the weights as the optimizer leaves them, in float64
    "clip_weights": leafwise(lambda w: np.clip(w, -0.5, 0.5)),
    "prune_weights": leafwise(lambda w: np.where(np.abs(w) <= 0.5, 0, w)),
    "clip_weight_norm": leafwise(lambda w: shrunk(w, 0)),
    "clip_weight_norm_rows": leafwise(lambda w: shrunk(w, -1, 1)),
    "normalize": leafwise(lambda w: 0.5 * w / norms(w, 0)),
    "rescale_weights": leafwise(rescaled),
    "project_weights": in_ball,
}


def wide(tree):
    return jax.tree.map(lambda x: np.asarray(x).astype(np.float64), tree)


def landed(tx, weights, updates, state=None):
    """The weights after a step from a fresh state, and the state."""
    updates, state = tx.update(updates, tx.init(weights) if state is None else state, weights)
    return optax.apply_updates(weights, updates), state


# Where the weights land


@every
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16], ids=["f32", "bf16", "f16"])
def test_weights_land_where_the_reference_says(name, dtype):
    """Ten steps of SGD with the clip behind it agree with float64 to a few units in the last place."""
    tx = optax.chain(optax.sgd(0.3), CLIPS[name]())
    weights = pair(9, dtype=dtype)
    state = tx.init(weights)
    step = jax.jit(lambda weights, grads, state: landed(tx, weights, grads, state))
    tolerance = trees.tolerance(dtype)
    for i in range(10):
        grads = pair(i, dtype=dtype)
        moved = {name: wide(weights)[name] - 0.3 * wide(grads)[name] for name in weights}
        expected = REFERENCES[name](moved)
        weights, state = step(weights, grads, state)
        assert all(leaf.dtype == dtype for leaf in weights.values())
        if name == "prune_weights":  # which jumps at the threshold
            close = {name: np.abs(np.abs(moved[name]) - 0.5) < 0.02 for name in moved}
            expected = {name: np.where(close[name], wide(weights)[name], expected[name]) for name in expected}
        chex.assert_trees_all_close(wide(weights), expected, rtol=tolerance, atol=tolerance)


def cases(dtype, seed, count=10_000):
    """Numbers of ordinary and of all magnitudes of the dtype, zeros among them."""
    random, info = np.random.default_rng(seed), jnp.finfo(dtype)
    powers = random.uniform(np.log10(float(info.smallest_normal)) - 1, np.log10(float(info.max)) - 0.3, count)
    powers = np.where(random.random(count) < 0.5, random.uniform(-3, 1, count), powers)
    values = random.choice([-1.0, 1.0, 0.0], count, p=[0.47, 0.47, 0.06]) * 10.0**powers
    return jnp.asarray(values.astype(dtype))


DTYPES = {"f32": jnp.float32, "bf16": jnp.bfloat16, "f16": jnp.float16}
HOW = {
    "compiled": lambda make, bound, factor: jax.jit(lambda w, u: landed(make(bound), w, u)[0]),
    # A product in front is what a compiler may join with the sum.
    "scaled": lambda make, bound, factor: jax.jit(
        lambda w, u: landed(make(bound), w, (u.astype(jnp.float32) * factor).astype(u.dtype))[0]
    ),
    "traced": lambda make, bound, factor: functools.partial(
        jax.jit(lambda bound, w, u: landed(make(bound), w, u)[0]), jnp.float32(bound)
    ),
    "eager": lambda make, bound, factor: lambda w, u: landed(make(bound), w, u)[0],
}


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("of_updates", DTYPES)
@pytest.mark.parametrize("of_weights", DTYPES)
@pytest.mark.parametrize("make", [oc.clip_weights, oc.prune_weights], ids=["clip", "prune"])
def test_bounds_hold_exactly(make, of_weights, of_updates, how):
    """Of 10 000 weights of all magnitudes none lies outside of the bound (or inside, if pruned) by a rounding."""
    for seed, bound in enumerate((0.01, 1 / 3, 7.3, 3e-6, 1.4741305611290626e-05)):
        weights, updates = cases(DTYPES[of_weights], seed), cases(DTYPES[of_updates], seed + 100)
        out = HOW[how](make, bound, jnp.float32(0.37))(weights, updates)
        assert out.dtype == weights.dtype
        size, bound = np.abs(np.asarray(out).astype(np.float64)), float(np.float32(bound) if how == "traced" else bound)
        finite = np.isfinite(np.asarray(weights).astype(np.float64) + np.asarray(updates).astype(np.float64))
        outside = ~(size <= bound) if make is oc.clip_weights else (size != 0) & ~(size > bound)
        assert not outside[finite].any()


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_traced_bounds_are_rounded_down_as_known_ones(dtype):
    """A traced bound holds for weights of fewer bits, and is the same as one known at construction."""
    zeros, ones = jnp.zeros(3, dtype), jnp.ones(3, dtype)
    traced = jax.jit(lambda bound: landed(oc.clip_weights(bound), zeros, ones)[0])
    for bound in np.float32([0.3, 0.7, 1.0, 5e-5, 3e-6, 3e-7, 1.1e-7, 0.0]):
        out, known = (np.float32(x) for x in (traced(bound), landed(oc.clip_weights(float(bound)), zeros, ones)[0]))
        assert (out <= bound).all() and (out == known).all()


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float8_e5m2, jnp.float8_e4m3fn])
def test_rounding_without_a_conversion(dtype):
    """What is rounded inside f32 is what a conversion to the narrower dtype gives, subnormal numbers too."""
    x = np.concatenate([cases(jnp.float32, 0), cases(dtype, 1).astype(jnp.float32) * 1.0009765])
    x = x[(x == 0) | (np.abs(x) >= float(jnp.finfo(jnp.float32).smallest_normal))]  # which processors keep
    x = x[np.abs(x) <= float(jnp.finfo(dtype).max)]
    expected = x.astype(dtype).astype(np.float32)
    for rounded in (rounded_to, jax.jit(rounded_to, static_argnums=1)):
        np.testing.assert_array_equal(rounded(jnp.asarray(x), dtype), expected)


@pytest.mark.parametrize("odd", [False, True])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_pruning_sees_weights_as_they_are_stored(dtype, odd):
    """A sum that is stored as the threshold is pruned, one stored as the next number stays; in the middle, too."""
    step = float(jnp.finfo(dtype).eps) / 2  # from 0.5 on
    threshold = 0.5 + odd * step
    sums = jnp.float32(threshold) + step * jnp.linspace(-2, 2, 65)
    out, _ = landed(oc.prune_weights(threshold), jnp.zeros(65, dtype), sums)
    stored = sums.astype(dtype)
    chex.assert_trees_all_equal(out, jnp.where(stored <= threshold, 0, stored))
    assert 0 < jnp.sum(out == 0) < 65


@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_inside_land_as_without_a_clip(dtype):
    """Away from the bound updates keep every bit, and at most they are widened."""
    weights, updates = cases(DTYPES[dtype], 0), cases(DTYPES[dtype], 1)
    away = np.abs(np.asarray(weights + updates).astype(np.float64))
    for tx, kept in ((oc.clip_weights(0.5), away < 0.49), (oc.prune_weights(0.5), away > 0.51)):
        small = jnp.abs(weights) + jnp.abs(updates) < 100
        out, _ = tx.update(updates, tx.init(weights), weights)
        assert out.dtype == jnp.float32
        kept = kept & np.asarray(small)
        assert kept.sum() > 1000
        chex.assert_trees_all_equal(out[kept], updates[kept].astype(jnp.float32))


def test_pruning_takes_no_more_than_asked():
    """What lands above the threshold by more than a rounding stays."""
    weights = jnp.array([0.5, 0.5, 0.5, 0.5])
    updates = jnp.array([0.0, 1e-6, -1e-6, -1.0])
    out, state = landed(oc.prune_weights(0.5), weights, updates)
    chex.assert_trees_all_equal(out, jnp.array([0.0, 0.500001, 0.0, 0.0]).at[3].set(0.0))
    assert state.touched == 0.75


def test_a_weight_far_outside_comes_in():
    """Weights that no update of their dtype can put on the bound land inside all the same."""
    weights = jnp.array([1e8, -1e8, 3e38, 1e4, -1e4])
    out, _ = landed(oc.clip_weights(1.0), weights, jnp.array([0.0, 4.0, 1e38, 0.1, 0.1]))
    assert (jnp.abs(out) <= 1.0).all()
    chex.assert_trees_all_close(out[3:], jnp.array([1.0, -1.0]), atol=1e-3)


def test_complex_weights_keep_their_phase():
    """The magnitude is bounded or pruned."""
    weights = jnp.array([3.0 + 4.0j, 0.3j, -0.01 + 0.01j])
    out, _ = landed(oc.clip_weights(1.0), weights, jnp.zeros(3, jnp.complex64))
    chex.assert_trees_all_close(out, jnp.array([0.6 + 0.8j, 0.3j, -0.01 + 0.01j]), rtol=1e-6)
    out, _ = landed(oc.prune_weights(0.1), weights, jnp.zeros(3, jnp.complex64))
    chex.assert_trees_all_equal(out, weights.at[2].set(0.0))
    with pytest.raises(TypeError, match=r"rescale_weights: weights must be real, got a leaf of complex64.*None"):
        landed(oc.rescale_weights(), weights, jnp.zeros(3, jnp.complex64))


def test_f64_weights():
    """With 64 bits, f64 weights are bounded in f64 by the bound as it is, and updates are f64."""
    with jax.enable_x64(True):
        weights = jnp.asarray(np.random.default_rng(0).normal(size=1000))
        for make in (oc.clip_weights, oc.prune_weights):
            tx = make(0.1)
            updates, _ = tx.update(0.3 * weights, tx.init(weights), weights)
            size = np.abs(np.asarray(optax.apply_updates(weights, updates)))
            assert updates.dtype == jnp.float64
            assert (size <= 0.1).all() if make is oc.clip_weights else ((size == 0) | (size > 0.1)).all()
        assert size.max() > 1


@pytest.mark.parametrize(
    "projection",
    [
        project.projection_non_negative,
        lambda tree: project.projection_box(
            tree, *(jax.tree.map(lambda w, x=x: jnp.full_like(w, x), tree) for x in (-0.1, 0.2))
        ),
        functools.partial(project.projection_simplex, scale=2.0),
        functools.partial(project.projection_l1_sphere, scale=0.5),
        functools.partial(project.projection_l1_ball, scale=0.5),
        functools.partial(project.projection_l2_sphere, scale=0.5),
        functools.partial(project.projection_linf_ball, scale=0.1),
    ],
    ids=lambda p: getattr(p, "func", p).__name__,
)
def test_projections_of_optax(projection):
    """Weights land where the projection of the unclipped ones is, step after step."""
    tx = optax.chain(optax.sgd(0.3), oc.project_weights(projection))
    weights = pair(9)
    state = tx.init(weights)
    step = once(lambda weights, grads, state: landed(tx, weights, grads, state))
    for i in range(3):
        expected = projection(jax.tree.map(lambda w, g: w - 0.3 * g, weights, pair(i)))
        weights, state = step(weights, pair(i), state)
        chex.assert_trees_all_close(weights, expected, rtol=1e-5, atol=1e-6)


def test_a_constant_leaf_goes_to_the_lower_end():
    """A leaf whose weights are all the same has no range; scalars and leaves without entries work."""
    weights = {"flat": jnp.full(3, 7.0), "scalar": jnp.float32(2.0), "empty": jnp.zeros((0, 2))}
    out, _ = landed(oc.rescale_weights(0.25, 1.0), weights, jax.tree.map(jnp.zeros_like, weights))
    chex.assert_trees_all_equal(out, {**weights, "flat": jnp.full(3, 0.25), "scalar": jnp.float32(0.25)})


def test_weights_of_all_magnitudes_are_rescaled():
    """The range of a leaf may be as large as that of f32."""
    out, _ = landed(oc.rescale_weights(), jnp.zeros(3), jnp.array([-3e38, 0.0, 3e38]))
    chex.assert_trees_all_close(out, jnp.array([0.0, 0.5, 1.0]), atol=1e-6)


# Thresholds


def test_bounds_by_schedule_tree_and_path():
    """A bound may follow a schedule, differ by leaf, come from a rule by path, and be None."""
    weights = pair(9, 10.0)
    zeros = jax.tree.map(jnp.zeros_like, weights)
    tx = oc.clip_weights(optax.piecewise_constant_schedule(2.0, {1: 0.25}))
    state, step = tx.init(weights), once(tx.update)
    for bound in (2.0, 0.5):
        updates, state = step(zeros, state, weights)
        out = optax.apply_updates(weights, updates)
        assert max(float(jnp.abs(leaf).max()) for leaf in out.values()) == bound
    tree = {"bias": None, "dense": 1.0}
    by_path = jax.tree_util.tree_map_with_path(lambda path, w: None if "bias" in path[0].key else 1.0, weights)
    assert by_path == tree
    for make in (oc.clip_weights, oc.prune_weights, oc.clip_weight_norm):
        out, _ = landed(make(tree), weights, zeros)
        chex.assert_trees_all_equal(out["bias"], weights["bias"])
        chex.assert_trees_all_close(out["dense"], landed(make(1.0), weights, zeros)[0]["dense"])
    updates, _ = oc.rescale_weights(tree, 2.0).update(pair(1), oc.rescale_weights(tree, 2.0).init(weights), weights)
    assert updates["bias"] is not None
    chex.assert_trees_all_equal(updates["bias"], pair(1)["bias"])
    out, _ = landed(oc.clip_weight_norm(1.0, lambda path, w: 0 if w.ndim > 1 else None), weights, zeros)
    chex.assert_trees_all_equal(out["bias"], weights["bias"])
    chex.assert_trees_all_close(jnp.linalg.norm(out["dense"], axis=0), jnp.ones(5), rtol=1e-6)


@pytest.mark.parametrize("make", [oc.clip_weights, oc.prune_weights, oc.clip_weight_norm])
def test_traced_bounds_that_go_wrong(make):
    """A traced bound below 0, or that of a schedule, acts as 0, NaN makes every weight NaN, None changes nothing."""
    weights, updates = pair(0), pair(1)
    weights["bias"] = weights["bias"].at[1:].set(0.0)
    step = jax.jit(lambda bound: landed(make(bound), weights, updates)[0])
    known, state = landed(make(0.0), weights, updates)
    for out, of_now in (
        jax.jit(lambda bound: landed(make(bound), weights, updates))(-1.0),
        landed(make(lambda count: -1.0 - count), weights, updates),
    ):
        chex.assert_trees_all_equal(out, known)
        if make is not oc.clip_weight_norm:  # whose state holds what its rule keeps
            chex.assert_trees_all_equal(of_now, state)
    assert all(jnp.isnan(leaf).all() for leaf in jax.tree.leaves(step(jnp.nan)))
    plain = optax.apply_updates(weights, updates)
    if make is oc.prune_weights:
        chex.assert_trees_all_equal(step(0.0), plain)
    else:
        chex.assert_trees_all_equal(step(0.0), jax.tree.map(jnp.zeros_like, weights))
        chex.assert_trees_all_close(step(jnp.inf), plain, rtol=1e-6)
    chex.assert_trees_all_close(landed(make(None), weights, updates)[0], plain, rtol=1e-6)


def test_every_number_can_be_injected():
    """`inject_hyperparams` takes each clip as it is."""
    weights = pair(9)
    for make, arguments in (
        (oc.clip_weights, {"max_value": 0.25}),
        (oc.prune_weights, {"threshold": 0.25}),
        (oc.clip_weight_norm, {"max_norm": 0.25}),
        (oc.rescale_weights, {"low": -0.5, "high": 0.25}),
    ):
        tx = optax.inject_hyperparams(make)(**arguments)
        out, state = landed(tx, weights, pair(1))
        assert state.hyperparams.keys() == arguments.keys()
        chex.assert_trees_all_close(out, landed(make(**arguments), weights, pair(1))[0], rtol=1e-6)


def test_ranges_follow_their_schedules():
    """Both ends of the range are those of the step."""
    tx = oc.rescale_weights(lambda step: -2.0 - step, lambda step: 1.0 + step)
    weights, state = jnp.array([-9.0, 0.0, 9.0]), tx.init(jnp.zeros(3))
    for step in range(3):
        updates, state = tx.update(jnp.zeros(3), state, weights)
        out = optax.apply_updates(weights, updates)
        chex.assert_trees_all_close((out.min(), out.max()), (-2.0 - step, 1.0 + step), rtol=1e-6)


# What is not finite, and odd leaves


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@every
def test_bad_updates_are_loud_or_held(name, bad):
    """An update that is not finite leaves a NaN, or for clips of entries the bound; never a silent zero."""
    weights, updates = pair(0), pair(1)
    updates["dense"] = updates["dense"].at[1, 2].set(bad)
    out, _ = landed(CLIPS[name](), weights, updates)
    hit = out["dense"][1, 2]
    if name == "clip_weights" and not np.isnan(bad):
        assert abs(hit) <= 0.5 and hit == pytest.approx(np.sign(bad) * 0.5)
    elif name == "prune_weights":
        chex.assert_trees_all_equal(hit, jnp.float32(bad))
    else:
        assert jnp.isnan(hit)
    if name == "rescale_weights":
        assert jnp.isnan(out["dense"]).all() and jnp.isfinite(out["bias"]).all()


@every
def test_bad_weights_are_loud(name):
    """A weight that is NaN stays NaN, and one of inf does not come out finite."""
    for bad in (np.nan, np.inf):
        weights = pair(0)
        weights["dense"] = weights["dense"].at[1, 2].set(bad)
        out, _ = landed(CLIPS[name](), weights, pair(1))
        assert not jnp.isfinite(out["dense"][1, 2])


@every
def test_odd_leaves_are_returned_as_they_are(name):
    """Updates without a norm come back untouched, and do not count."""
    updates = trees.odd()
    tx = CLIPS[name]()
    out, state = tx.update(updates, tx.init(updates), updates)
    chex.assert_trees_all_equal_structs(out, updates)
    assert all(out[key] is updates[key] for key in updates if key not in ("weight", "masked", "empty"))
    alone = {"weight": updates["weight"]}
    expected, expected_state = tx.update(alone, tx.init(alone), alone)
    chex.assert_trees_all_equal(out["weight"], expected["weight"])
    chex.assert_trees_all_equal(jax.tree.leaves(state), jax.tree.leaves(expected_state))


@every
def test_nothing_to_clip(name):
    """Empty trees, leaves without entries, and updates that are None where there are parameters."""
    if name == "project_weights":
        pytest.skip("what becomes of an empty tree is the projection's matter")
    tx = CLIPS[name]()
    for updates in ({}, {"a": jnp.zeros((0, 3))}):
        out, _ = tx.update(updates, tx.init(updates), updates)
        chex.assert_trees_all_equal(out, updates)
    weights = pair(0)
    updates, _ = tx.update({**pair(1), "bias": None}, tx.init(weights), weights)
    assert updates["bias"] is None


@pytest.mark.parametrize("dtype", [jnp.int32, jnp.float8_e4m3fn])
def test_weights_that_cannot_be_bounded_are_an_error(dtype):
    """Integers, and 8-bit weights, to which Optax cannot add a wider update, are refused, not passed."""
    with pytest.raises(ValueError, match=rf"clip_weights: params must be floating or complex.*{jnp.dtype(dtype)}"):
        landed(oc.clip_weights(1.0), jnp.ones(3, dtype), jnp.ones(3))


def test_a_projection_of_another_shape_is_an_error():
    """A projection must return a tree like the one it got."""
    for projection in (lambda tree: {"bias": tree["bias"]}, lambda tree: jax.tree.map(jnp.ravel, tree)):
        with pytest.raises(ValueError, match="project_weights: projection must return a tree like that of"):
            landed(oc.project_weights(projection), pair(0), pair(1))
    with pytest.raises(TypeError, match="project_weights: projection must be a function"):
        oc.project_weights(1.0)


# Contracts


@every
def test_structure_dtypes_and_state(name):
    """Updates keep their structure and shapes and are f32 at least; the state keeps its types."""
    tx = CLIPS[name]()
    dtypes = [jnp.float16, jnp.bfloat16, jnp.float32, jnp.bfloat16, jnp.float32]
    for mixed in (False, True):
        updates, weights = trees.sample(0), trees.sample(1)
        if mixed:
            weights = {key: leaf.astype(dtype) for (key, leaf), dtype in zip(weights.items(), dtypes)}
            updates = trees.mixed(0)
        if name == "clip_weight_norm_rows":
            del updates["scale"], weights["scale"]
        out, state = jax.eval_shape(tx.update, updates, jax.eval_shape(tx.init, weights), weights)
        chex.assert_trees_all_equal_shapes(out, updates)
        assert {leaf.dtype for leaf in jax.tree.leaves(out)} == {jnp.dtype(jnp.float32)}
        assert types(state) == types(tx.init(weights))


@every
def test_compiled_is_eager(name):
    """jit, scan, vmap and a loop agree, in one trace, behind SGD and in front of `apply_updates`."""
    tx, samples = optax.chain(optax.sgd(0.3), CLIPS[name]()), [pair(i) for i in range(3)]

    def step(carry, updates):
        weights, state = landed(tx, carry[0], updates, carry[1])
        return (weights, state), weights

    first = pair(9), tx.init(pair(9))
    carry, eager = first, []
    for updates in samples:
        carry, weights = step(carry, updates)
        eager.append(weights)
    compiled = jax.lax.scan(once(step), first, stack(samples))
    chex.assert_trees_all_close(compiled, (carry, stack(eager)), rtol=1e-5, atol=1e-6)
    many = jax.vmap(lambda updates: step(first, updates)[1])(stack(samples))
    alone = stack([step(first, updates)[1] for updates in samples])
    chex.assert_trees_all_close(many, alone, rtol=1e-5, atol=1e-6)


@every
def test_state_can_be_donated_and_saved(name):
    """Buffers can be donated, and a pickled state goes on as if it had not stopped."""
    tx, weights = optax.chain(optax.sgd(0.3), CLIPS[name]()), pair(9)
    _, state = run(tx, [pair(0), pair(1)], weights)
    saved = pickle.loads(pickle.dumps(state))
    chex.assert_trees_all_equal(saved, state)
    expected = tx.update(pair(2), state, weights)
    actual = jax.jit(tx.update, donate_argnums=(0, 1), keep_unused=True)(pair(2), saved, weights)
    chex.assert_trees_all_close(actual, expected, rtol=1e-5, atol=1e-6)
    placed = optax.tree.map_params(tx, lambda x: "params", state)
    chex.assert_trees_all_equal(placed, state)


@every
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["f32", "bf16"])
def test_in_multi_steps_weights_land_inside(name, dtype):
    """`MultiSteps` around a chain that ends in the clip: a step of the mean in the end, and nothing before."""
    tx, weights = optax.chain(optax.sgd(0.25), CLIPS[name]()), pair(9, dtype=dtype)
    every_second = optax.MultiSteps(tx, 2)
    # Optax 0.2.6 keeps the mean of bf16 gradients in f32 from the second step on, which is another trace.
    step = every_second.update if optax.__version__ == "0.2.6" else once(every_second.update)
    state, samples = every_second.init(weights), [pair(i, dtype=dtype) for i in (0, 1)]
    updates, state = step(samples[0], state, weights)
    chex.assert_trees_all_equal(optax.apply_updates(weights, updates), weights)
    updates, state = step(samples[1], state, weights)
    expected, _ = landed(tx, weights, jax.tree.map(lambda a, b: (a + b) / 2, *samples))
    actual = optax.apply_updates(weights, updates)
    chex.assert_trees_all_close(actual, expected, rtol=trees.tolerance(dtype), atol=trees.tolerance(dtype))
    if name == "clip_weights":
        assert all((jnp.abs(leaf) <= 0.5).all() for leaf in jax.tree.leaves(actual))


@every
def test_masked_and_partition_leave_others_alone(name):
    """Weights outside of a mask or a partition move as without the clip."""
    weights, updates = pair(9, 5.0), pair(1)
    for tx in (
        optax.masked(CLIPS[name](), {"bias": False, "dense": True}),
        optax.partition({"a": CLIPS[name](), "b": optax.identity()}, {"bias": "b", "dense": "a"}),
    ):
        out, _ = landed(tx, weights, updates)
        chex.assert_trees_all_equal(out["bias"], weights["bias"] + updates["bias"])
        alone, _ = landed(CLIPS[name](), {"dense": weights["dense"]}, {"dense": updates["dense"]})
        chex.assert_trees_all_close(out["dense"], alone["dense"], rtol=1e-6)


@every
def test_derivatives_are_finite(name):
    """The derivative through a step by weights and updates is finite, at zero too."""
    weights_of = lambda weights, updates: optax.tree.sum(landed(CLIPS[name](), weights, updates)[0])
    for weights in (pair(0), jax.tree.map(jnp.zeros_like, pair(0))):
        grads = jax.jit(jax.grad(weights_of, argnums=(0, 1)))(weights, pair(1, 0.0))
        chex.assert_tree_all_finite(grads)


# On many devices


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
@every
def test_jit_on_a_mesh_is_one_device(name, kind):
    """Weights, state and shardings are kept under jit on a mesh."""
    tx, mesh = CLIPS[name](), trees.mesh(kind, data=4)
    weights, updates = ({"w": trees.sample(i, shapes={"w": (8, 5)})["w"], "b": jnp.arange(3.0) - i} for i in (0, 1))
    specs = {"w": P("data"), "b": P()}
    place = lambda tree: jax.device_put(tree, {key: NamedSharding(mesh, specs[key]) for key in tree})
    expected, expected_state = jax.jit(lambda w, u: landed(tx, w, u))(weights, updates)
    with jax.set_mesh(mesh):
        out, state = jax.jit(lambda w, u: landed(tx, w, u))(place(weights), place(updates))
    actual = (out, jax.tree.leaves(state))
    chex.assert_trees_all_close(actual, (expected, jax.tree.leaves(expected_state)), rtol=1e-6, atol=1e-6)
    assert out["w"].sharding.is_equivalent_to(NamedSharding(mesh, specs["w"]), 2)


@pytest.mark.parametrize(
    "make",
    [
        lambda: oc.clip_weights(0.5),
        lambda: oc.prune_weights(0.5),
        lambda: oc.clip_weight_norm(0.5, axis_name={"w": "data", "b": ()}),
        lambda: oc.rescale_weights(-0.5, 0.25),
    ],
    ids=["clip_weights", "prune_weights", "clip_weight_norm", "rescale_weights"],
)
def test_shard_map_is_one_device(make):
    """Inside `shard_map`, spread and whole leaves mix, and shares count each weight once."""
    tx, mesh, specs = make(), trees.mesh(data=4), {"w": P("data"), "b": P()}
    weights, updates = ({"w": trees.sample(i, shapes={"w": (8, 5)})["w"], "b": jnp.arange(3.0) - i} for i in (0, 1))
    expected, expected_state = landed(tx, weights, updates)
    inside = jax.shard_map(
        lambda w, u, s: landed(tx, w, u, s), mesh=mesh, in_specs=(specs, specs, P()), out_specs=(specs, P())
    )
    out, state = jax.jit(inside)(weights, updates, tx.init(weights))
    actual = (out, jax.tree.leaves(state))
    chex.assert_trees_all_close(actual, (expected, jax.tree.leaves(expected_state)), rtol=1e-6, atol=1e-6)


# Metrics


def test_metrics_of_weights():
    """`clip_metrics` finds the share of weights on the bound, beside norms of gradients, and of weights."""
    tx = optax.chain(oc.clip_by_global_norm(1.0), optax.sgd(0.1), oc.clip_weights(0.5), oc.prune_weights(0.1))
    weights = {"w": jnp.array([2.0, 0.05, 0.3, -0.7])}
    _, state = landed(tx, weights, jax.tree.map(jnp.zeros_like, weights))
    metrics = oc.clip_metrics(state)
    assert (metrics["clip/2/touched"], metrics["clip/3/touched"]) == (0.5, 0.25)
    assert "clip/norm" in metrics
    _, state = landed(oc.clip_weights(0.5), weights, jax.tree.map(jnp.zeros_like, weights))
    assert {key: float(x) for key, x in oc.clip_metrics(state).items()} == {"clip/touched": 0.5}
    _, state = landed(oc.clip_weight_norm(1.0), weights, jax.tree.map(jnp.zeros_like, weights))
    assert oc.clip_metrics(state)["clip/norm"] == pytest.approx(float(jnp.linalg.norm(weights["w"])))


@pytest.mark.parametrize("bound", [0.0, 1e-40, 1e-20, 0.3, 1e20, np.inf])
def test_share_on_the_bound(bound):
    """The share is right for bounds of all magnitudes."""
    updates = jnp.array([0.0, 0.1, 5.0, -1e30])
    _, state = jax.jit(lambda bound: landed(oc.clip_weights(bound), jnp.zeros(4), updates))(bound)
    expected = {0.0: 1.0, 1e-40: None, 1e-20: 0.75, 0.3: 0.5, 1e20: 0.25, np.inf: 0.0}[bound]
    assert jnp.isfinite(state.touched)
    assert expected is None or state.touched == expected


def test_share_is_exact_for_every_bound_and_step():
    """No bound and no number of steps makes the count of weights on the bound miss one."""
    bounds = jnp.linspace(0.001, 3.0, 4001)
    share = lambda bound: landed(oc.clip_weights(bound), jnp.zeros(4), jnp.full(4, 5.0))[1].touched
    assert (jax.vmap(share)(bounds) == 1).all()
    tx = oc.clip_weights(1.0)
    weights = {"a": jnp.array([1.0, 0.5, 0.25]), "b": jnp.array([0.5]), "c": jnp.array([1.0, 1.0])}
    state, step = tx.init(weights), once(tx.update)
    for _ in range(4):
        _, state = step(jax.tree.map(jnp.zeros_like, weights), state, weights)
        assert state.touched == 0.5


# Programs


@functools.cache
def program(name):
    """A compiled AdamW step in place with a clip of weights behind it."""
    clips = {
        "clip_weights": oc.clip_weights(1.0),
        "prune_weights": oc.prune_weights(1e-3),
        "box": oc.project_weights(project.projection_non_negative),
        "bare": optax.identity(),
    }
    return compiled_step(optax.chain(optax.adamw(1e-3), clips[name]))


def sums(program) -> int:
    """Kernels that take a matrix and give none."""
    text = entry(program)
    matrices = set(re.findall(r"%([\w.-]+) = f32\[(?:256,512|512,256)\]", text))
    kernels = re.findall(r"%([\w.-]+) = \S+ fusion\((.*?)\)", text)
    return sum(name not in matrices and bool(matrices & set(re.findall(r"%([\w.-]+)", of))) for name, of in kernels)


@trees.on_a_cpu_that_fuses
@pytest.mark.parametrize(("name", "reads"), [("bare", 0), ("clip_weights", 1), ("prune_weights", 1), ("box", 0)])
def test_a_step_reads_the_weights_once_more(name, reads):
    """The share is counted where the new weights were written: one kernel a matrix more, no scratch, no copy."""
    assert sums(program(name)) == reads * 2 * len(SHAPES)
    assert program(name).memory_analysis().temp_size_in_bytes < 0.005 * 4 * ENTRIES
    assert not re.search(r"f32\[(256,512|512,256)\]\S* copy\(", entry(program(name)))


def test_rules_see_the_parameters():
    """A threshold that is a share of the norm of the parameters holds units to it: they cannot grow by more."""
    tx, weights = oc.clip_weight_norm(oc.param_fraction(1.1, oc.unit_norm)), pair(9)
    out, _ = landed(tx, weights, jax.tree.map(lambda w: w * 5, weights))
    chex.assert_trees_all_close(out, jax.tree.map(lambda w: 1.1 * w, weights), rtol=1e-5)


def test_rescaling_to_a_range_without_end_is_an_error():
    """Both ends must be finite; a range as wide as that of f32 works."""
    for low, high in ((0.0, np.inf), (-np.inf, 0.0)):
        with pytest.raises(ValueError, match=r"rescale_weights: (low|high) must be finite, got -?inf"):
            oc.rescale_weights(low, high)
    out, _ = landed(oc.rescale_weights(-3e38, 3e38), jnp.zeros(3), jnp.array([1.0, 2.0, 3.0]))
    chex.assert_trees_all_close(out, jnp.array([-3e38, 0.0, 3e38]))


def test_strict_promotion_of_complex_weights():
    """Complex weights and updates meet in their own dtype."""
    with jax.numpy_dtype_promotion("strict"):
        weights = jnp.array([3.0 + 4.0j], jnp.complex64)
        out, _ = landed(oc.clip_weights(1.0), weights, jnp.zeros(1, jnp.complex64))
    chex.assert_trees_all_close(out, jnp.array([0.6 + 0.8j], jnp.complex64), rtol=1e-6)


@pytest.mark.parametrize("x64", [False, True], ids=["x32", "x64"])
@pytest.mark.parametrize("bound", [0.5, jnp.float16(0.5), jnp.bfloat16(0.5), jnp.int32(1), jnp.uint8(1), np.uint8(1)])
@pytest.mark.parametrize("name", ["clip_weights", "prune_weights", "clip_weight_norm", "rescale_weights"])
def test_strict_promotion(name, bound, x64):
    """Bounds of any real dtype fit weights of any."""
    tx = oc.rescale_weights(-1.0, bound) if name == "rescale_weights" else getattr(oc, name)(bound)
    with jax.enable_x64(x64):
        weights = {str(dtype): jnp.ones((2, 3), dtype) for dtype in ("float16", "bfloat16", "float32", float)}
        expected = jax.eval_shape(lambda w: tx.update(w, tx.init(w), w), weights)
        with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
            actual = jax.eval_shape(lambda w: tx.update(w, tx.init(w), w), weights)
    chex.assert_trees_all_equal_shapes_and_dtypes(actual, expected)


def test_python_scalars_are_weights():
    """Weights and updates may be Python numbers, as of a model with one parameter."""
    for weight in (0.9, np.float32(0.9), np.float64(0.9)):
        out, _ = landed(oc.clip_weights(1.0), weight, 0.5)
        assert out == 1.0

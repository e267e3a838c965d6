"""Bounds for weights: where `optax.apply_updates` puts them, in every dtype, compiled together and apart."""

import functools
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P
from trees import mesh, small, step, tolerance

from optax_clip import responses, thresholds
from optax_clip.clips.values import ValueClipState
from optax_clip.norms import unit_norm
from optax_clip.weights.bounds import clip_weights, prune_weights, rescale_weights
from optax_clip.weights.norms import clip_weight_norm
from optax_clip.weights.projections import project_weights

project = optax.projections
DTYPES = {"f16": jnp.float16, "bf16": jnp.bfloat16, "f32": jnp.float32, "f64": jnp.float64}
PAIRS = [  # parameters and updates
    *(("f32", "f32"), ("bf16", "bf16"), ("bf16", "f32"), ("f16", "f16"), ("f16", "f32")),
    *(("f32", "bf16"), ("f32", "f16"), ("f64", "f64"), ("f32", "f64")),
]
BOUNDS = [1.0, 0.3, 0.01, "large"]


def bound_of(c, of_weight):
    return (5e4 if of_weight == "f16" else 3e38) if c == "large" else c


def wide(x):
    return np.asarray(x).astype(np.float64)


def landed(tx, weights, updates, state=None):
    """The weights after a compiled step, which starts afresh where no state is given."""
    updates, state = step(tx, updates, state, weights)
    return optax.apply_updates(weights, updates), state


# Once inside, never outside


def at_most(x, c):
    """Numbers that lie within ±c in float64, rounded toward 0 where they do not."""
    limit = np.asarray(min(c, float(jnp.finfo(x.dtype).max))).astype(x.dtype)
    limit = limit if float(limit) <= c else np.nextafter(limit, np.zeros_like(limit))
    return np.clip(x, -limit, limit)


def stress(of_weight, of_update, c, seed, count):
    """Weights inside ±c, many of them close to it, and updates of all sizes, many of which end close to the bound."""
    random = np.random.default_rng(seed)
    weights = random.choice([1.0, -1.0], count) * c * (1 - 10.0 ** random.uniform(-9, 0, count))
    weights = np.where(random.random(count) < 0.2, random.uniform(-c, c, count), weights)
    weights = at_most(weights.astype(DTYPES[of_weight]), c)
    room = np.where(random.random(count) < 0.5, c - wide(weights), -c - wide(weights))
    room = np.clip(room * 10.0 ** random.choice([0, 0, 0, 1, -3, 4], count), -1e38, 1e38)
    updates = room * (1 + random.choice([0, 1e-8, -1e-8, 1e-3, -1e-3, 0.3], count) * random.normal(size=count))
    updates = np.where(random.random(count) < 0.1, 10.0 ** random.uniform(-45, 38, count), updates)
    largest = float(jnp.finfo(DTYPES[of_update]).max)
    updates = np.clip(updates, -largest, largest).astype(DTYPES[of_update])
    updates[:4] = [np.inf, -np.inf, 0.0, 0.0]
    return weights, updates


def apply_in_its_dtype(weights, updates):
    """What `eqx.apply_updates` does."""
    return jax.tree.map(lambda p, u: p + u, weights, updates)


def forms(bounds):
    """Compiled steps: from weights, updates and traced bounds to new updates, two ways to apply them, and bounds."""

    def clipped(tx, weights, updates):
        return tx.update(updates, tx.init(weights), weights)[0]

    def product(updates, bounds):  # with one, as far as a compiler does not know it
        return jax.tree.map(lambda u, c: u * (c / c).astype(u.dtype), updates, bounds)

    def together(bound):
        def run(weights, updates, traced):
            limits = bound(traced)
            new = clipped(clip_weights(limits), weights, product(updates, traced))
            return new, optax.apply_updates(weights, new), apply_in_its_dtype(weights, new), limits

        return jax.jit(run)

    def apart(weights, updates, traced):
        new = jax.jit(functools.partial(clipped, clip_weights(bounds)))(weights, jax.jit(product)(updates, traced))
        return new, optax.apply_updates(weights, new), jax.jit(apply_in_its_dtype)(weights, new), traced

    return {
        "traced": together(lambda traced: traced),
        "known": lambda *args: (*together(lambda _: bounds)(*args)[:3], bounds),
        "computed": together(lambda traced: jax.tree.map(lambda c: c * c.astype(c.dtype) ** 0 * 0.7, traced)),
        "apart": lambda *args: (*apart(*args)[:3], bounds),
    }


def check_bounds_hold(pairs, count, only):
    cases = {f"{w} {u} {c}": (w, u, bound_of(c, w)) for w, u in pairs for c in BOUNDS}
    bounds = {name: c for name, (_, _, c) in cases.items()}
    traced = {name: jnp.asarray(c, DTYPES["f64" if "f64" in name else "f32"]) for name, c in bounds.items()}
    for form in only:
        inside = 0.69 if form == "computed" else 1.0
        arrays = {name: stress(w, u, c * inside, i, count) for i, (name, (w, u, c)) in enumerate(cases.items())}
        weights, updates = ({name: jnp.asarray(pair[i]) for name, pair in arrays.items()} for i in (0, 1))
        new, *ways, limits = forms(bounds)[form](weights, updates, traced)
        for name, (of_weight, of_update, _) in cases.items():
            limit, w, u, after = float(limits[name]), *map(wide, (weights[name], updates[name], new[name]))
            for way in ways:
                assert (np.abs(wide(way[name])) <= limit).all(), (form, name)
            assert new[name].dtype == updates[name].dtype and ways[0][name].dtype == weights[name].dtype
            # Updates that end inside keep their bits. Others take the weight to the bound, or a rounding less far.
            top = float(at_most(np.full(1, limit).astype(weights[name].dtype), limit)[0])
            tiny = float(jnp.finfo(jnp.float32).smallest_normal) if "f64" not in (of_weight, of_update) else 0.0
            assert (np.abs(after - u)[np.abs(w + u) <= top * (1 - 1e-6)] <= tiny).all(), (form, name)
            info = jnp.finfo(DTYPES[of_update])
            sums = float(jnp.finfo(jnp.float64 if "f64" in (of_weight, of_update) else jnp.float32).eps)
            room = np.minimum(top - w, float(info.max))
            rounding = np.maximum((float(info.eps) + sums) * np.abs(room), float(info.smallest_subnormal)) + tiny
            assert (after >= room - rounding)[w + u > top].all(), (form, name)


def test_once_inside_never_outside():
    """No weight passes its bound, by not even a rounding, in any dtype; for known and for traced bounds."""
    check_bounds_hold([pair for pair in PAIRS if "f64" not in pair], 4_000, ["traced", "known"])


def test_once_inside_never_outside_in_64_bits():
    """The same where updates or weights are f64."""
    with jax.enable_x64(True):
        check_bounds_hold([pair for pair in PAIRS if "f64" in pair], 4_000, ["traced", "known"])


@pytest.mark.full
@pytest.mark.parametrize("pair", PAIRS, ids=" ".join)
def test_once_inside_never_outside_in_a_million_cases(pair):
    """The same for many more weights, compiled together with what makes the updates and apart, for bounds computed."""
    with jax.enable_x64("f64" in pair):
        check_bounds_hold([pair], 1 << 18, ["traced", "known", "computed", "apart"])


def adam_stays_inside(dtypes, steps, count):
    """The share of weights on the bound after a run of AdamW toward targets on both sides of it."""
    tx = optax.chain(optax.adamw(0.03), clip_weights(0.3))
    random = np.random.default_rng(0)
    targets = {name: jnp.asarray(random.normal(size=count), DTYPES[name]) for name in dtypes}
    weights = jax.tree.map(lambda x: jnp.asarray(0.1 * random.normal(size=count), x.dtype), targets)
    weights = jax.tree.map(lambda x: jnp.clip(x, -0.29, 0.29), weights)

    def one(carry, _):
        weights, state = carry
        grads = jax.tree.map(lambda w, t: w - t, weights, targets)
        updates, state = tx.update(grads, state, weights)
        weights = optax.apply_updates(weights, updates)
        limit = lambda w: jnp.asarray(at_most(np.asarray(0.3).astype(w.dtype), 0.3))
        return (weights, state), jax.tree.map(lambda w: jnp.sum(jnp.abs(w) > limit(w)), weights)

    (weights, _), outside = jax.jit(lambda carry: jax.lax.scan(one, carry, length=steps))((weights, tx.init(weights)))
    assert all(not counts.any() for counts in jax.tree.leaves(outside))
    return {name: float(np.mean(wide(jnp.abs(w)) > 0.298)) for name, w in weights.items()}


def test_adamw_stays_inside():
    """In 300 steps of AdamW in one loop no weight is outside, and those that want to be end at the bound."""
    shares = adam_stays_inside(["f32", "bf16", "f16"], 300, 1_000)
    assert all(share == pytest.approx(0.76, abs=0.05) for share in shares.values())


@pytest.mark.full
def test_adamw_stays_inside_with_many_weights():
    """The same for 50,000 weights of each dtype, f64 among them."""
    with jax.enable_x64(True):
        shares = adam_stays_inside(list(DTYPES), 300, 50_000)
    assert all(share == pytest.approx(0.764, abs=0.01) for share in shares.values())


def test_a_weight_outside_comes_in_at_once():
    """One step is enough up to max_value / eps of the dtype of the updates, whatever that step is."""
    pairs = [pair for pair in PAIRS if "f64" not in pair]
    for c in (0.3, 0.01):
        tops = {pair: min(1 / float(jnp.finfo(DTYPES[pair[1]]).eps), 5e4 / c) for pair in pairs}
        sizes = {pair: np.geomspace(c * 1.001, c * top, 500) for pair, top in tops.items()}
        weights = {pair: jnp.asarray(np.concatenate([x, -x]), DTYPES[pair[0]]) for pair, x in sizes.items()}
        for size in (0.0, 0.1, -3.0):
            updates = {pair: jnp.full(1000, size, DTYPES[pair[1]]) for pair in pairs}
            out, _ = landed(clip_weights(c), weights, updates)
            for pair, leaf in out.items():
                assert (np.abs(wide(leaf)) <= c).all(), pair


def test_f16_weights_reach_the_bound():
    """The last steps to a bound of 0.01 are below the normal numbers of f16, and are taken all the same."""
    limit = float(at_most(np.asarray(0.01).astype(np.float16), 0.01))
    weights = jnp.asarray(limit - np.arange(-3, 12) * 2.0**-17, jnp.float16)
    out, _ = landed(clip_weights(0.01), weights, jnp.ones_like(weights))
    chex.assert_trees_all_equal(out, jnp.full_like(weights, limit))


def test_bounds_that_are_zero_infinite_or_nan():
    """Zero takes every weight to 0, inf changes no bit, a traced NaN is loud, and a traced number below 0 acts as 0."""
    weights, updates = small(0), small(1)
    run = jax.jit(lambda c: clip_weights(c).update(updates, (), weights)[0])
    zero = jax.tree.map(jnp.negative, weights)
    chex.assert_trees_all_equal(run(0.0), zero)
    chex.assert_trees_all_equal(run(-1.0), zero)
    chex.assert_trees_all_equal(run(jnp.inf), updates)
    chex.assert_trees_all_equal(clip_weights(np.inf).update(updates, (), weights)[0], updates)
    assert all(np.isnan(leaf).all() for leaf in run(jnp.nan).values())


def test_what_is_not_finite():
    """An update of inf lands on the bound. A NaN stays, and a weight of inf becomes NaN."""
    weights = jnp.array([0.1, 0.1, 0.1, np.nan, np.inf])
    updates = jnp.array([np.inf, -np.inf, np.nan, 0.1, 0.1])
    out, _ = landed(clip_weights(0.25), weights, updates)
    chex.assert_trees_all_equal(out, jnp.array([0.25, -0.25, np.nan, np.nan, np.nan]))
    out, _ = landed(prune_weights(0.25), weights, updates)
    chex.assert_trees_all_equal(out, weights + updates)
    for tx in (rescale_weights(0.0, 1.0), clip_weight_norm(1.0), project_weights(project.projection_l2_ball)):
        assert np.isnan(landed(tx, weights, updates)[0]).all()


def test_complex_weights():
    """A magnitude is bounded to a few eps, or pruned, and the phase is kept."""
    weights = jnp.array([3.0 + 4.0j, 0.3j, -0.01 + 0.01j, 0.0], jnp.complex64)
    zeros = jnp.zeros_like(weights)
    out, _ = landed(clip_weights(1.0), weights, zeros)
    chex.assert_trees_all_close(out, jnp.array([0.6 + 0.8j, 0.3j, -0.01 + 0.01j, 0], jnp.complex64), rtol=1e-6)
    out, _ = landed(prune_weights(0.1), weights, zeros)
    chex.assert_trees_all_equal(out, weights.at[2].set(0.0))


def test_weights_of_8_bits():
    """They land on the bound or near it, as near as an update of 8 bits comes."""
    weights = jnp.array([0.5, -0.5, 0.25, 2.0], jnp.float8_e4m3fn)
    updates = jnp.array([3.0, -3.0, 0.125, 0.0], jnp.float8_e4m3fn)
    out, _ = landed(clip_weights(1.0), weights, updates)
    chex.assert_trees_all_equal(out, jnp.array([1.0, -1.0, 0.375, 1.0], jnp.float8_e4m3fn))


def test_derivatives_of_bounded_weights():
    """Where a weight lands does not depend on the weight at the bound, but on the bound, known or traced."""
    land = lambda w, c: w + clip_weights(c).update(jnp.float32(0.25), (), w)[0]
    slopes = jax.jit(jax.vmap(jax.grad(land, (0, 1)), (0, None)))
    of_weight, of_bound = slopes(jnp.array([-0.1, 0.0, 0.23, 0.299]), 0.3)
    chex.assert_trees_all_equal(of_weight, jnp.array([1.0, 1.0, 0.0, 0.0]))
    chex.assert_trees_all_equal(of_bound, jnp.array([0.0, 0.0, 1.0, 1.0]))


# Pruned weights


def test_a_pruned_weight_is_zero():
    """Weights end at exactly 0 or above the threshold, to a rounding; others move as without a clip."""
    for name, dtype in DTYPES.items():
        random = np.random.default_rng(0)
        with jax.enable_x64(name == "f64"):
            weights, updates = (jnp.asarray(random.normal(size=2_000), dtype) for _ in range(2))
            tx = prune_weights(0.3)
            out, _ = landed(tx, weights, updates)
            plain = wide(optax.apply_updates(weights, updates))
            again, _ = landed(tx, out, jnp.zeros_like(out))
        rounding = tolerance(dtype)
        size, out = np.abs(plain), wide(out)
        assert (out[size < 0.3 * (1 - rounding)] == 0).all()
        np.testing.assert_array_equal(out[size > 0.3 * (1 + rounding)], plain[size > 0.3 * (1 + rounding)])
        np.testing.assert_array_equal(again, out)


def test_pruning_with_thresholds_that_are_zero_or_nan():
    """A threshold of 0 changes nothing, one of inf prunes all, and a traced NaN is loud."""
    weights, updates = small(0), small(1)
    run = jax.jit(lambda c: prune_weights(c).update(updates, (), weights)[0])
    chex.assert_trees_all_equal(run(0.0), updates)
    chex.assert_trees_all_equal(run(jnp.inf), jax.tree.map(jnp.negative, weights))
    assert all(np.isnan(leaf).all() for leaf in run(jnp.nan).values())


# Rescaled, bounded and projected weights


def shrunk(w, axis=0, ord=2):
    return w * np.minimum(1, 0.5 / (np.abs(w) ** ord).sum(axis=axis, keepdims=True) ** (1 / ord))


def rescaled(w):
    span = np.ptp(w)
    return np.full_like(w, -0.5) if span == 0 else -0.5 + 0.75 * (w - w.min()) / span


def in_ball(tree):
    size = np.sqrt(sum((w**2).sum() for w in tree.values()))
    return {name: w * min(1, 0.5 / size) for name, w in tree.items()}


leafwise = lambda function: lambda tree: {name: function(w) for name, w in tree.items()}
by_rank = lambda w: shrunk(w) if w.ndim else np.clip(w, -0.5, 0.5)
REFERENCES = {  # of the weights as the optimizer leaves them, in float64
    "clip_weights": (clip_weights(0.5), leafwise(lambda w: np.clip(w, -0.5, 0.5))),
    "clip_weight_norm": (clip_weight_norm(0.5), leafwise(by_rank)),
    "order 1 of rows": (
        clip_weight_norm({"bias": None, "dense": 0.5, "scale": None}, lambda path, w: -1 if w.ndim else None, ord=1),
        lambda tree: {**tree, "dense": shrunk(tree["dense"], -1, 1)},
    ),
    "normalize": (
        clip_weight_norm(0.5, response=responses.normalize),
        leafwise(lambda w: 0.5 * w / np.sqrt((w**2).sum(axis=0, keepdims=True)) if w.ndim else 0.5 * np.sign(w)),
    ),
    "rescale_weights": (rescale_weights(-0.5, 0.25), leafwise(rescaled)),
    "l2 ball": (project_weights(functools.partial(project.projection_l2_ball, scale=0.5)), in_ball),
    "not negative": (project_weights(project.projection_non_negative), leafwise(lambda w: np.maximum(w, 0))),
}


@pytest.mark.parametrize("name", REFERENCES)
def test_weights_land_where_float64_says(name):
    """Steps of SGD with the clip behind it agree with float64 to a few eps; updates keep their dtype."""
    clip, reference = REFERENCES[name]
    tx = optax.chain(optax.sgd(0.3), clip)
    for dtype in (jnp.float32, jnp.bfloat16):
        weights, state = small(9, dtype=dtype), None
        for i in range(3):
            grads = small(i, dtype=dtype)
            expected = reference({key: wide(weights[key]) - 0.3 * wide(grads[key]) for key in weights})
            updates, state = step(tx, grads, state, weights)
            assert all(leaf.dtype == dtype for leaf in updates.values())
            weights = optax.apply_updates(weights, updates)
            chex.assert_trees_all_close(jax.tree.map(wide, weights), expected, rtol=0, atol=2 * tolerance(dtype))


def test_updates_keep_their_dtype_beside_other_params():
    """Updates of bf16 and f16 stay so beside f32 weights, and f32 ones beside bf16 weights."""
    for of_weight, of_update in (("f32", "bf16"), ("bf16", "f32"), ("f32", "f16")):
        weights, updates = small(0, dtype=DTYPES[of_weight]), small(1, dtype=DTYPES[of_update])
        for tx, _ in REFERENCES.values():
            out = jax.eval_shape(lambda u, w, tx=tx: tx.update(u, tx.init(w), w)[0], updates, weights)
            chex.assert_trees_all_equal_shapes_and_dtypes(out, updates)


def test_updates_keep_their_bits_where_the_weights_are_inside():
    """A projection, or a norm below its bound, leaves the update as it is."""
    weights, updates = small(0), small(1)
    for tx in (clip_weight_norm(100.0), project_weights(lambda tree: tree), clip_weights(100.0)):
        chex.assert_trees_all_equal(step(tx, updates, params=weights)[0], updates)


def test_ranges_of_all_sizes():
    """A range may be as wide as that of f32; a constant leaf goes to the lower end; a leaf may have no entries."""
    weights = {"flat": jnp.full(3, 7.0), "scalar": jnp.float32(2.0), "empty": jnp.zeros((0, 2))}
    out, _ = landed(rescale_weights(0.25, 1.0), weights, jax.tree.map(jnp.zeros_like, weights))
    chex.assert_trees_all_equal(out, {**weights, "flat": jnp.full(3, 0.25), "scalar": jnp.float32(0.25)})
    out, _ = landed(rescale_weights(0.0, 1.0), jnp.zeros(3), jnp.array([-3e38, 0.0, 3e38]))
    chex.assert_trees_all_close(out, jnp.array([0.0, 0.5, 1.0]), atol=1e-6)
    out, _ = landed(rescale_weights(-3e38, 3e38), jnp.zeros(3), jnp.array([1.0, 2.0, 3.0]))
    chex.assert_trees_all_close(out, jnp.array([-3e38, 0.0, 3e38]))


@pytest.mark.full
@pytest.mark.parametrize(
    "projection",
    [
        lambda tree: project.projection_box(tree, *(jax.tree.map(lambda w, x=x: w * 0 + x, tree) for x in (-0.1, 0.2))),
        functools.partial(project.projection_simplex, scale=2.0),
        functools.partial(project.projection_l1_sphere, scale=0.5),
        functools.partial(project.projection_l1_ball, scale=0.5),
        functools.partial(project.projection_l2_sphere, scale=0.5),
        functools.partial(project.projection_linf_ball, scale=0.1),
    ],
)
def test_projections_of_optax(projection):
    """Weights land where the projection of the unclipped ones is, step after step."""
    tx, weights, state = optax.chain(optax.sgd(0.3), project_weights(projection)), small(9), None
    for i in range(3):
        expected = projection(jax.tree.map(lambda w, g: w - 0.3 * g, weights, small(i)))
        weights, state = landed(tx, weights, small(i), state)
        chex.assert_trees_all_close(weights, expected, rtol=1e-5, atol=1e-6)


# Bounds of every kind

EVERY = {
    "clip_weights": clip_weights,
    "prune_weights": prune_weights,
    "clip_weight_norm": clip_weight_norm,
    "rescale_weights": lambda bound: rescale_weights(jax.tree.map(lambda _: 0.0, bound), bound),
}
every = pytest.mark.parametrize("make", EVERY.values(), ids=EVERY)


@every
def test_trees_of_bounds(make):
    """A prefix tree gives each leaf its bound, None leaves a leaf alone, and what is masked needs no bound."""
    weights, updates = small(9, 10.0), small(1)
    tree = make({"bias": 1.0, "dense": None, "scale": 2.0})
    new, _ = step(tree, updates, params=weights)
    chex.assert_trees_all_equal(new["dense"], updates["dense"])
    for key, bound in (("bias", 1.0), ("scale", 2.0)):
        chex.assert_trees_all_equal(
            new[key], step(make(bound), {key: updates[key]}, params={key: weights[key]})[0][key]
        )
    inner = optax.masked(
        make({"bias": 1.0, "dense": {"deep": 3.0}, "scale": 2.0}), {"bias": True, "dense": False, "scale": True}
    )
    chex.assert_trees_all_equal(step(inner, updates, params=weights)[0], new)


@every
def test_schedules(make):
    """A schedule is asked at each step, from 0 on."""
    tx, weights, state = make(lambda count: 2.0 / (1 + count)), small(9, 10.0), None
    for i in range(3):
        new, state = step(tx, small(i), state, weights)
        expected = step(make(2.0 / (1 + i)), small(i), params=weights)[0]
        chex.assert_trees_all_close(new, expected, rtol=1e-6)


def test_both_ends_of_a_range_follow_their_schedules():
    """Both are those of the step."""
    tx, weights, state = (
        rescale_weights(lambda count: -2.0 - count, lambda count: 1.0 + count),
        jnp.array([-9.0, 0, 9]),
        None,
    )
    for i in range(3):
        out, state = landed(tx, weights, jnp.zeros(3), state)
        chex.assert_trees_all_close((out.min(), out.max()), (-2.0 - i, 1.0 + i), rtol=1e-6)
    assert state == ValueClipState(jnp.int32(3))


def test_rules_see_the_parameters_and_extra_arguments():
    """A threshold for weights may be a share of the norm of the parameters, or ask for what `update` was given."""
    weights = small(9)
    tx = clip_weight_norm(thresholds.param_fraction(1.1))
    out, _ = landed(tx, weights, jax.tree.map(lambda w: w * 5, weights))
    chex.assert_trees_all_close(out, jax.tree.map(lambda w: 1.1 * w, weights), rtol=1e-5)
    limit = lambda norm, state, params=None, *, most, **extra: (most, state)
    tx = clip_weight_norm(optax.GradientTransformationExtraArgs(lambda norm: (), limit))
    new, _ = step(tx, jax.tree.map(jnp.zeros_like, weights), params=weights, most=jnp.float32(0.25))
    norms = jax.tree.leaves(unit_norm(optax.apply_updates(weights, new)))
    assert all((norm <= 0.25 * (1 + 1e-5)).all() for norm in norms)


def refused(make, updates=None, params=None):
    updates = jnp.ones(3) if updates is None else updates
    return lambda: make().update(updates, (), params if params is not None else updates)


REFUSED = {
    "max_value must be >= 0, got -1": lambda: clip_weights(-1),
    "threshold must be a number, got nan": lambda: prune_weights(math.nan),
    "max_value must be .*, got a rule.*clip_weight_norm": lambda: clip_weights(thresholds.z_score()),
    "max_norm must be >= 0, got -1": lambda: clip_weight_norm(-1),
    "low must be <= high, got 2 > 1": lambda: rescale_weights(2.0, 1.0),
    "low must be finite, got -inf": lambda: rescale_weights(-np.inf, 1.0),
    "high must be finite, got inf": lambda: rescale_weights(0.0, {"w": np.inf}),
    "projection must be a function, got float": lambda: project_weights(1.0),
    "projection must keep all shapes, got": refused(lambda: project_weights(jnp.ravel), jnp.ones((2, 2))),
    "params are missing. The weights are bounded": lambda: clip_weights(1.0).update(jnp.ones(2), ()),
    "params must have the shapes": refused(lambda: clip_weights(1.0), params=jnp.ones(2)),
    "params must be floating or complex, got .*int32": refused(
        lambda: clip_weights(1.0), params=jnp.ones(3, jnp.int32)
    ),
    "params must be real, got complex64": refused(lambda: rescale_weights(0.0, 1.0), jnp.ones(3, jnp.complex64)),
    "max_value must be one value or a prefix": refused(lambda: clip_weights({"w": 1.0}), {"v": jnp.ones(2)}),
    "state must be": lambda: clip_weights(1.0).update(jnp.ones(2), optax.TraceState(1.0), jnp.ones(2)),
}


@pytest.mark.parametrize("text", REFUSED)
def test_what_is_refused(text):
    """The message begins with the argument and says what is wrong with it."""
    with pytest.raises((TypeError, ValueError), match=text):
        REFUSED[text]()


def test_python_numbers_are_weights():
    """Weights and updates may be numbers of Python or NumPy, as of a model with one parameter."""
    for weight in (0.9, np.float32(0.9), np.float64(0.9)):
        out = optax.apply_updates(weight, clip_weights(1.0).update(0.5, (), weight)[0])
        assert out == 1.0


@pytest.mark.parametrize("bound", [1, np.inf, np.uint8(1), np.float16(0.5), np.float32(0.5), jnp.bfloat16(0.5)])
def test_bounds_of_every_real_type(bound):
    """Integers, narrow floats and numbers of NumPy bound weights of all dtypes, under strict promotion too."""
    with jax.enable_x64(True), jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        weights = {name: jnp.full((2, 3), 0.25, dtype) for name, dtype in DTYPES.items()}
        updates = jax.tree.map(lambda w: w * 0 + 2, weights)
        for make, expected in ((clip_weights, min(bound, 2.25)), (prune_weights, 0.0 if bound > 3 else 2.25)):
            new = jax.jit(make(bound).update)(updates, (), weights)[0]
            chex.assert_trees_all_equal_dtypes(new, updates)
            chex.assert_trees_all_equal(
                jax.tree.map(lambda w, u: wide(w + u), weights, new),
                {name: np.full((2, 3), float(expected)) for name in DTYPES},
            )


# On many devices


@pytest.mark.parametrize("name", ["clip_weights", "prune_weights", "rescale_weights", "clip_weight_norm"])
def test_inside_shard_map(name):
    """Spread and whole leaves mix, and weights land as on one device."""
    make = {**EVERY, "clip_weight_norm": lambda c: clip_weight_norm(c, axis_name={"w": "data", "b": ()})}[name]
    tx, specs = make(0.5), {"w": P("data"), "b": P()}
    random = np.random.default_rng(0)
    shapes = {"w": (8, 3), "b": (3,)}
    weights, updates = (
        {key: jnp.asarray(random.normal(size=s), jnp.float32) for key, s in shapes.items()} for _ in "wu"
    )
    expected, expected_state = landed(EVERY[name](0.5), weights, updates)
    inside = jax.shard_map(
        lambda w, u, s: tx.update(u, s, w), mesh=mesh(data=2), in_specs=(specs, specs, P()), out_specs=(specs, P())
    )
    new, state = jax.jit(inside)(weights, updates, tx.init(weights))
    chex.assert_trees_all_close(optax.apply_updates(weights, new), expected, rtol=1e-5, atol=1e-6)
    chex.assert_trees_all_close(jax.tree.leaves(state), jax.tree.leaves(expected_state), rtol=1e-5)


def test_rescaling_where_types_do_not_tell():
    """Without types, `axis_name` says over which axes a leaf is spread; without it that is an error."""
    run = lambda axis_name: jax.jit(
        jax.shard_map(
            lambda w: rescale_weights(0.0, 1.0, axis_name=axis_name).update(w, (), w)[0] + w,
            mesh=mesh(data=2), in_specs=P("data"), out_specs=P("data"), check_vma=False,
        )
    )(jnp.arange(8.0))  # fmt: skip
    chex.assert_trees_all_close(run("data"), jnp.arange(8.0) / 7, rtol=1e-6)
    with pytest.raises(ValueError, match="axis_name is missing"):
        run(None)


def test_weights_clipped_inside_of_apply_if_finite():
    """The dtype of the updates is kept, so that a wrapper with a branch takes bf16 weights."""
    tx = optax.apply_if_finite(optax.chain(optax.sgd(1.0), clip_weights(1.0)), 3)
    weights = jnp.full(3, 0.5, jnp.bfloat16)
    updates, _ = jax.jit(tx.update)(jnp.full(3, -2.0, jnp.bfloat16), tx.init(weights), weights)
    chex.assert_trees_all_equal(optax.apply_updates(weights, updates), jnp.ones(3, jnp.bfloat16))

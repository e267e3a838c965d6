"""What holds for all norms, thresholds and responses: properties of random trees, compared with plain float64."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from trees import tolerance

import optax_clip as oc
from optax_clip import responses, thresholds

SMALLEST, LARGEST = (float(getattr(jnp.finfo(jnp.float32), name)) for name in ("smallest_normal", "max"))
F32 = {"matrix": ((4, 3), "float32"), "scalar": ((), "float32"), "vector": ((7,), "float32")}
NARROW = {
    "complex": ((3,), "complex64"),
    "matrix": ((4, 3), "bfloat16"),
    "scalar": ((), "float32"),
    "vector": ((7,), "float16"),
}


def labels(updates):
    return {name: "matrix" if name == "matrix" else "rest" for name in updates}


def groups(t, **options):
    return oc.clip_by_group_norm({"matrix": t, "rest": t}, labels, **options)


CLIPS = {
    "global": oc.clip_by_global_norm,
    "group": groups,
    "leaf": oc.clip_by_leaf_norm,
    "rms": oc.clip_by_block_rms,
    "unit": oc.clip_by_unit_norm,
}
full = pytest.mark.full
of_scopes = pytest.mark.parametrize("scope", [pytest.param(s, marks=[full] * (s in ("group", "rms"))) for s in CLIPS])
of_kinds = pytest.mark.parametrize("kinds", [F32, NARROW], ids=["f32", "narrow"])


# Plain float64


def wide(x):
    x = np.asarray(x)
    return x.astype(np.complex128 if x.dtype.kind == "c" else np.float64)


def block_of(scope, tree) -> dict:
    """The number of the block of each entry."""
    numbers = {}
    for i, (name, leaf) in enumerate(sorted(tree.items())):
        number = {"global": 0, "group": int(name == "matrix")}.get(scope, i)
        if scope == "unit" and name == "matrix":
            number = 10 + np.arange(3)
        numbers[name] = np.broadcast_to(number, np.shape(leaf))
    return numbers


def norms_of(scope, tree, ord=2) -> dict:
    """The norm of each block by its number."""
    numbers = np.concatenate([np.ravel(n) for _, n in sorted(block_of(scope, tree).items())])
    sizes = np.concatenate([np.ravel(np.abs(wide(x))) for _, x in sorted(tree.items())])
    found = {}
    for number in np.unique(numbers):
        x = sizes[numbers == number]
        with np.errstate(over="ignore"):
            norm = x.max() if ord == np.inf else np.sum((x / max(x.max(), 1e-300)) ** ord) ** (1 / ord) * x.max()
        found[number] = norm / np.sqrt(x.size) if scope == "rms" else norm
    return found


RESPONSES = {
    "shrink": np.minimum,
    "normalize": lambda n, t: t if n > 0 else 0.0,
    "smooth": lambda n, t: min(n, t) / (1 + min(n, t) / max(n, t)),
    "tanh": lambda n, t: t * np.tanh(n / t),
}


def clipped64(scope, tree, t, response="shrink", ord=2) -> dict:
    """The tree as float64 would clip it."""
    norms, numbers = norms_of(scope, tree, ord), block_of(scope, tree)
    scales = {b: RESPONSES[response](n, t) / n if n > 0 else 1.0 for b, n in norms.items()}
    return {name: wide(x) * spread_over(scales, numbers[name]) for name, x in tree.items()}


def error_of(leaf, expected) -> np.ndarray:
    """How far entries of a leaf may be from what is expected, after one rounding to its dtype and a few in f32."""
    info = jnp.finfo(leaf.dtype)
    absolute = max(SMALLEST, float(info.smallest_normal * info.eps))
    return max(float(info.eps), tolerance(jnp.float32)) * np.abs(expected) + 2 * absolute


def assert_near(actual, expected):
    assert actual.keys() == expected.keys()
    for name, leaf in actual.items():
        assert (np.abs(wide(leaf) - expected[name]) <= error_of(leaf, expected[name])).all(), (name, leaf, expected)


def bits(tree):
    """The bytes of each entry; all NaN are alike."""

    def of_leaf(x):
        x = np.where(np.isnan(x), np.asarray(x).dtype.type(np.nan), x)
        return np.ravel(x).view(np.uint8).reshape(x.size, x.dtype.itemsize)

    return jax.tree.map(of_leaf, tree)


def assert_same_bits(actual, expected):
    chex.assert_trees_all_equal_shapes_and_dtypes(actual, expected)
    chex.assert_trees_all_equal(bits(actual), bits(expected))


# Random trees


def tree_of(kinds, power: float, spread: float, seed: int) -> dict:
    """A tree of norm 10^power; its leaves, and its entries, reach down by so many decades, some to 0."""
    random = np.random.default_rng(seed)
    tree = {}
    for name, (shape, dtype) in kinds.items():
        x = 10.0 ** (-spread * (random.random() + random.random(shape))) * random.choice([-1, 1], shape)
        x = x * (random.random(shape) >= random.choice([0, 0, 0.3])) * np.exp(1j * random.uniform(0, 6, shape))
        tree[name] = x if dtype == "complex64" else np.sign(x.real) * np.abs(x)
    norm = norms_of("global", tree)[0] or 1.0
    scaled = {}
    for name, (_, dtype) in kinds.items():
        info = jnp.finfo(dtype)
        x = tree[name] / norm * 10.0**power
        if dtype != "complex64":
            x = np.clip(x, -float(info.max), float(info.max))
        x = x.astype(dtype)
        scaled[name] = np.where(np.abs(wide(x)) < info.smallest_normal, 0, x).astype(dtype)  # flushed in products
    return scaled


def trees_of(kinds=F32, low=-26.0, high=38.4):
    spread, seed = st.sampled_from([0.0, 1.0, 12.0]), st.integers(0, 2**32)
    return st.builds(functools.partial(tree_of, kinds), st.floats(low, high), spread, seed)


def powers(low, high):
    """Numbers spread evenly over decades, each one an f32."""
    return st.floats(low, high).map(lambda power: float(np.float32(10.0**power)))


def range_of(scope, kinds=F32) -> tuple[float, float]:
    """Decades of norms for which a clip is exact, so far as the dtypes reach."""
    low, high = (-15.5, 19.0) if scope == "unit" else (-26.0, 38.4)
    return (max(low, -2.0), min(high, 4.0)) if kinds is NARROW else (low, high)


@functools.cache
def compiled(scope, response=None, ord=None, none=False):
    """One step of a clip as a program of updates and threshold."""
    options = ({} if response is None else {"response": response}) | ({} if ord is None else {"ord": ord})

    @jax.jit
    def clip(updates, t):
        tx = CLIPS[scope](None if none else t, **options)
        return tx.update(updates, tx.init(updates))

    return lambda updates, t=1.0: jax.device_get(clip(updates, np.float32(t)))


# Norms

ORDERS = (2, 1, np.inf)


@jax.jit
def all_norms(tree):
    return {
        **{("global", p): oc.global_norm(tree, ord=p) for p in ORDERS},
        **{("group", p): oc.group_norm(labels, ord=p)(tree).norms for p in ORDERS},
        **{("leaf", p): oc.leaf_norm(tree, ord=p) for p in ORDERS},
        ("rms", 2): oc.block_rms(tree),
    }


@given(trees_of(F32))
@example(tree_of(F32, -26.0, 0.0, 0))
@example(tree_of(F32, 38.4, 0.0, 1))
@example(jax.tree.map(lambda x: np.full_like(x, 3e38), tree_of(F32, 0.0, 0.0, 0)))
def test_norms_are_exact(tree):
    """Norms of the tree, of groups and of leaves are exact to 1e-6 from 1e-26 to 3e38, and above they are inf."""
    for (scope, ord), norms in jax.device_get(all_norms(tree)).items():
        if scope == "group":
            norms = [norms["rest"], norms["matrix"]]
        sizes = [x.size if scope == "rms" else 1 for _, x in sorted(tree.items())]  # an RMS is inf with its norm
        for norm, expected, size in zip(jax.tree.leaves(norms), norms_of(scope, tree, ord).values(), sizes):
            if expected * np.sqrt(size) > 1.00001 * LARGEST:
                assert norm == np.inf
            elif expected >= 1e-26:
                np.testing.assert_allclose(np.float64(norm), expected, rtol=1e-6, err_msg=str((scope, ord)))
            else:
                assert 0 <= norm <= 1.000001e-26


@given(trees_of(F32, -30.0, 38.4))
@example(tree_of(F32, -18.0, 0.0, 0))
@example(tree_of(F32, 19.25, 0.0, 0))
def test_norms_of_units_are_exact_loud_or_small(tree):
    """Norms of units are exact to 1e-6 up to 1.8e19, but for squares below f32; above, the unit becomes NaN."""
    clipped, norms, numbers = compiled("unit")(tree)[0], norms_of("unit", tree), block_of("unit", tree)
    for name, found in jax.device_get(unit_norms(tree)).items():
        expected = spread_over(norms, numbers[name])
        highest = LARGEST if name != "matrix" else 1.8446743e19  # a leaf that is one unit has the range of leaves
        kept = expected < 0.9999 * highest
        lost = 0.0 if name != "matrix" else 4 * SMALLEST / np.maximum(expected, 1e-30) ** 2
        error = np.abs(wide(found) - expected) / np.maximum(expected, 1e-30)
        assert (error[kept] <= (1e-6 + np.minimum(lost, 1.0) + np.zeros_like(error))[kept]).all()
        assert np.isfinite(clipped[name][kept]).all()
        assert np.isnan(clipped[name][expected > 1.0001 * highest]).all()


unit_norms = jax.jit(oc.unit_norm)


def spread_over(values, numbers):
    """The value of its block for each entry."""
    return np.vectorize(values.get, otypes=[float])(numbers)


# Clips


@of_scopes
@of_kinds
@given(data=st.data())
def test_blocks_come_out_at_most_at_the_threshold(scope, kinds, data):
    """A block is scaled by one factor, min(1, t/n), rounded once, and its norm ends at t at most; the state says so."""
    low, high = range_of(scope, kinds)
    tree, t = data.draw(trees_of(kinds, low, high)), data.draw(powers(max(low, -30.0), min(high, 38.4)))
    norms = norms_of(scope, tree)
    clipped, state = compiled(scope)(tree, t)
    chex.assert_trees_all_equal_shapes_and_dtypes(clipped, tree)
    assert_near(clipped, clipped64(scope, tree, t))
    room = norms_of(scope, {name: error_of(leaf, wide(leaf)) for name, leaf in clipped.items()})
    for number, norm in norms_of(scope, clipped).items():
        assert norm <= t * (1 + tolerance(jnp.float32)) + room[number]
    counted = [norm > t for norm in norms.values()]
    if all(abs(norm / t - 1) > 1e-5 for norm in norms.values()):
        np.testing.assert_allclose(state.clipped, np.mean(counted), rtol=1e-6)
        np.testing.assert_allclose(state.clip_rate, state.clipped, rtol=1e-6)
    if scope != "unit" and all(norm > 1e-26 for norm in norms.values()):
        scales = [min(t / norm, 1.0) for norm in norms.values()]
        np.testing.assert_allclose(state.clip_scale, np.mean(scales), rtol=1e-5, atol=SMALLEST)
        np.testing.assert_allclose(state.threshold, t, rtol=1e-6)
        total = np.linalg.norm(np.array([*norms.values()]) / max(norms.values())) * max(norms.values())
        if total < LARGEST:
            np.testing.assert_allclose(state.norm, total, rtol=2e-6)


@of_scopes
@of_kinds
@given(data=st.data())
def test_below_the_threshold_every_bit_stays(scope, kinds, data):
    """Where no norm is above the threshold every bit stays, those of subnormal numbers and of -0 too."""
    tree = data.draw(trees_of(kinds, *range_of(scope, kinds)))
    largest = max(norms_of(scope, tree).values())
    t = data.draw(st.sampled_from([1.000002, 2.0, 1e6, np.inf])) * max(largest, 1e-26)
    t = np.inf if t > LARGEST else t
    small = tree["vector"].dtype.type(float(jnp.finfo(tree["vector"].dtype).smallest_subnormal))
    tree["vector"] = np.concatenate([tree["vector"][:-2], [small, -np.zeros_like(small)]])
    clipped, state = compiled(scope)(tree, t)
    assert_same_bits(clipped, tree)
    assert state.clipped == 0


@of_scopes
@given(data=st.data())
def test_a_bad_block_is_loud_and_alone(scope, data):
    """With a NaN or inf in it a whole block is NaN; all other entries are as without it, and the rate stays finite."""
    tree, t = data.draw(trees_of(F32, -6.0, 6.0)), data.draw(powers(-6.0, 6.0))
    name, bad = data.draw(st.sampled_from([*tree])), data.draw(st.sampled_from([np.nan, np.inf, -np.inf]))
    broken = tree | {name: tree[name].copy()}
    broken[name].reshape(-1)[-1] = bad
    (clean, _), (clipped, state) = compiled(scope)(tree, t), compiled(scope)(broken, t)
    numbers = block_of(scope, tree)
    for key, leaf in clipped.items():
        hit = numbers[key] == numbers[name].reshape(-1)[-1]
        assert np.isnan(leaf[hit]).all()
        np.testing.assert_array_equal(leaf[~hit], clean[key][~hit])
    assert not np.isfinite(state.norm)
    assert np.isfinite(state.clipped) and np.isfinite(state.clip_rate)


@of_scopes
@given(trees_of(F32), st.sampled_from([np.nan, np.inf, 1e-40, -0.0, 3e38]))
def test_no_threshold_keeps_every_bit(scope, tree, last):
    """Under None and inf every bit stays, whatever the entries; nothing counts as clipped."""
    tree["vector"][-1] = last
    for clipped, state in (compiled(scope)(tree, np.inf), compiled(scope, none=True)(tree)):
        assert_same_bits(clipped, tree)
        assert state.clipped == 0 and (state.threshold is None or np.isfinite(state.threshold))


@of_scopes
@given(trees_of(F32, -17.0, 19.0), st.sampled_from([0.0, -0.0, -1.0, np.nan]))
def test_thresholds_that_leave_nothing(scope, tree, t):
    """A threshold of 0, or one that turns out negative, gives zeros; one that turns out NaN gives NaN."""
    clipped, state = compiled(scope)(tree, t)
    for leaf in clipped.values():
        # A unit whose squares are below f32 counts as 0, and 0 stays as it is.
        assert np.isnan(leaf).all() if np.isnan(t) else (np.abs(leaf) <= (2e-19 if scope == "unit" else 0)).all()
    assert np.isfinite(state.clip_rate)


@of_scopes
def test_zeros_stay_zeros(scope):
    """Zero updates come back as zeros, whatever the threshold, and nothing counts as clipped."""
    zeros = jax.tree.map(np.zeros_like, tree_of(F32, 0.0, 0.0, 0))
    for t in (0.0, 1e-30, 1.0, LARGEST, np.inf):
        clipped, state = compiled(scope)(zeros, t)
        assert_same_bits(clipped, zeros)
        assert state.norm == 0 and state.clipped == 0


@pytest.mark.parametrize("response", [pytest.param(r, marks=[full] * (r == "tanh")) for r in [*RESPONSES][1:]])
@pytest.mark.parametrize("scope", ["leaf", pytest.param("unit", marks=full), pytest.param("global", marks=full)])
@given(data=st.data())
def test_responses_from_end_to_end_of_the_range(response, scope, data):
    """Norms become what the response says, for norms and thresholds over the whole range of f32."""
    tree, t = data.draw(trees_of(F32, *range_of(scope))), data.draw(powers(-30.0, 38.4))
    clipped, _ = compiled(scope, getattr(responses, response))(tree, t)
    expected = clipped64(scope, tree, t, response)
    numbers, norms = block_of(scope, tree), norms_of(scope, tree)
    for name, leaf in clipped.items():
        norm = spread_over(norms, numbers[name])
        known = (norm == 0) | (norm > (3e-16 if scope == "unit" else 1e-26))
        difference = np.abs(wide(leaf) - expected[name])
        assert (difference <= 2 * error_of(leaf, expected[name]))[known].all(), (name, leaf, expected[name])


@pytest.mark.parametrize("ord", [1, pytest.param(np.inf, marks=full), pytest.param(3, marks=full)])
@pytest.mark.parametrize("scope", ["leaf", pytest.param("unit", marks=full), pytest.param("global", marks=full)])
@given(data=st.data())
def test_clips_of_other_orders(ord, scope, data):
    """The norm of any order ends at most at the threshold, and each block keeps its direction."""
    tree, t = data.draw(trees_of(F32, -12.0, 12.0)), data.draw(powers(-12.0, 12.0))
    assert_near(compiled(scope, ord=ord)(tree, t)[0], clipped64(scope, tree, t, ord=ord))


@of_scopes
@given(data=st.data())
def test_clipping_twice_is_clipping_once(scope, data):
    """A second clip changes nothing but roundings, and the sign of the updates is that of the result."""
    tree, t = data.draw(trees_of(F32, -15.0, 15.0)), data.draw(powers(-15.0, 15.0))
    once, _ = compiled(scope)(tree, t)
    twice, _ = compiled(scope)(once, t)
    chex.assert_trees_all_close(twice, once, rtol=tolerance(jnp.float32), atol=SMALLEST)
    negative, _ = compiled(scope)(jax.tree.map(np.negative, tree), t)
    chex.assert_trees_all_equal(negative, jax.tree.map(np.negative, once))


# Derivatives


@functools.cache
def slopes(scope):
    """Derivatives of a weighted sum of the clipped updates, by updates and threshold."""

    def loss(updates, t, weights):
        tx = CLIPS[scope](t)
        return optax.tree.vdot(weights, tx.update(updates, tx.init(updates))[0])

    return jax.jit(jax.grad(loss, (0, 1)))


@pytest.mark.parametrize(
    "scope", ["leaf", "unit", pytest.param("global", marks=full), pytest.param("group", marks=full)]
)
@given(st.floats(-15.0, 15.0), st.sampled_from([0.3, 0.9, 1.2, 4.0]), st.integers(0, 2**32))
def test_derivatives_are_those_of_float64(scope, power, ratio, seed):
    """Derivatives agree with differences in float64 for norms from 1e-15 to 1e15, below the threshold and above."""
    random = np.random.default_rng(seed)
    unit = {name: random.normal(size=shape) for name, (shape, _) in F32.items()}
    tree = {name: np.float32(10.0**power * x) for name, x in unit.items()}
    weights = {name: np.float32(random.normal(size=np.shape(x))) for name, x in tree.items()}
    norms = norms_of(scope, tree)
    t = float(np.float32(ratio * np.median([*norms.values()])))
    if any(abs(norm / t - 1) < 1e-3 or not 1e-15 <= norm <= 1e15 for norm in norms.values()):
        return
    by_tree, by_t = jax.device_get(slopes(scope)(tree, np.float32(t), weights))

    def loss(tree, t):
        return sum(np.sum(weights[name] * x) for name, x in clipped64(scope, tree, t).items())

    h = 1e-6 * 10.0**power
    expected_t = (loss(tree, t + h) - loss(tree, t - h)) / (2 * h)
    np.testing.assert_allclose(by_t, expected_t, rtol=1e-4, atol=1e-5)
    along = {name: random.normal(size=np.shape(x)) for name, x in tree.items()}
    ahead, behind = (loss({name: wide(x) + s * h * along[name] for name, x in tree.items()}, t) for s in (1, -1))
    slope = sum(np.sum(by_tree[name] * along[name]) for name in tree)
    np.testing.assert_allclose(slope, (ahead - behind) / (2 * h), rtol=1e-4, atol=1e-4)


@of_scopes
def test_derivatives_are_finite_at_the_edges(scope):
    """Derivatives are finite where all updates are 0, where some are, and for thresholds of 0 and inf."""
    tree = {"matrix": np.ones((4, 3)), "scalar": np.ones(()), "vector": np.zeros(7)}
    weights = jax.tree.map(np.ones_like, tree)
    for factor in (0.0, 1e-15, 1.0, 1e14):
        for t in (0.0, 1.0, np.inf):
            updates = {name: np.float32(factor * x) for name, x in tree.items()}
            chex.assert_tree_all_finite(slopes(scope)(updates, np.float32(t), weights))


# Rules

RULES = {
    "z_score": lambda: thresholds.z_score(1.0, 0.9, 2),
    "quantile": lambda: thresholds.quantile(50.0, 4),
    "sigma_window": lambda: thresholds.sigma_window(1.0, 4),
    "ema_ratio": lambda: thresholds.ema_ratio(1.0, 1.05, 0.9, 0),
    "minimum": lambda: thresholds.minimum(2.0, thresholds.z_score(1.0, 0.9, 2), lambda step: 3.0),
    "ema": lambda: optax.chain(optax.ema(0.9), optax.scale(1.05)),
}


@functools.cache
def stepping(name):
    tx = oc.clip_by_leaf_norm(RULES[name]())
    return tx.init, jax.jit(tx.update)


@pytest.mark.parametrize("name", RULES)
@given(st.integers(0, 2**32), st.sampled_from([np.nan, np.inf, -np.inf]), st.sampled_from([*F32]), st.integers(0, 4))
def test_bad_norms_leave_no_trace_in_a_rule(name, seed, bad, leaf, at):
    """A block that is not finite becomes NaN and its history stays as it was; the other blocks go on as without it."""
    init, update = stepping(name)
    at = max(at, 1) if name == "ema_ratio" else at  # its first step compares with the norm of the whole tree
    samples = [tree_of(F32, power, 0.0, seed + i) for i, power in enumerate((0.0, 0.3, -0.2, 0.1, 1.0, 0.0))]
    samples = [{key: np.where(x == 0, np.float32(1), x) for key, x in updates.items()} for updates in samples]
    clean = state = init(samples[0])
    place = sorted(F32).index(leaf)
    for i, updates in enumerate(samples):
        before, broken = state, updates
        if i == at:
            broken = updates | {leaf: updates[leaf].copy()}
            broken[leaf].reshape(-1)[0] = bad
        (expected, clean), (clipped, state) = update(updates, clean), update(broken, state)
        for key, x in clipped.items():
            if key != leaf:
                np.testing.assert_array_equal(x, expected[key])
        assert np.isnan(clipped[leaf]).all() == (i == at)
        for old, new, other in zip(*(jax.tree.leaves(s.rule) for s in (before, state, clean))):
            assert np.isfinite(new).all() or jnp.issubdtype(new.dtype, jnp.integer) or not np.isfinite(other).all()
            if i == at:
                np.testing.assert_array_equal(new[place], old[place])
            np.testing.assert_array_equal(np.delete(new, place, 0), np.delete(other, place, 0))


# 64 bits


@pytest.mark.parametrize("scope", ["leaf", *(pytest.param(s, marks=full) for s in ("global", "unit", "rms"))])
def test_f64_leaves_are_clipped_in_f64(scope):
    """Where 64 bits are on, f64 leaves are measured and scaled in f64."""
    t = 2.0**-7  # an f32
    with jax.enable_x64(True):
        tree = {name: wide(x) for name, x in tree_of(F32, 0.0, 1.0, 0).items()}
        tx = CLIPS[scope](t)
        clipped, _ = jax.device_get(jax.jit(lambda tree: tx.update(tree, tx.init(tree)))(tree))
    for name, x in clipped64(scope, tree, t).items():
        assert clipped[name].dtype == np.float64
        np.testing.assert_allclose(clipped[name], x, rtol=1e-14)

"""Clips of single entries: where each entry ends, bounds of all kinds, and what is refused."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from trees import small, step, tolerance

from optax_clip.clips.values import ValueClipState, clip, clip_by_magnitude, clip_by_value

INF, NAN = np.inf, np.nan


def now(tx, updates, state=None):
    """The updates after one compiled step."""
    return step(tx, updates, state)[0]


def wide(x):
    return np.asarray(x).astype(np.complex128 if jnp.iscomplexobj(x) else np.float64)


# Where entries end

ENTRIES = [-INF, INF, NAN, -9.0, -0.30078125, -0.25, -0.0, 0.0, 0.125, 0.3125, 9.0]
TABLE = {
    "clip": (clip(0.3), lambda x: np.clip(x, -0.3, 0.3)),
    "both sides": (clip_by_value(-0.3, 2.0), lambda x: np.clip(x, -0.3, 2.0)),
    "above": (clip_by_value(None, 0.3), lambda x: np.minimum(x, 0.3)),
    "below": (clip_by_value(0.3, None), lambda x: np.maximum(x, 0.3)),
    "no bound": (clip(None), lambda x: x),
    "one value": (clip_by_value(1.0, 1.0), lambda x: np.where(np.isnan(x), x, 1.0)),
    "magnitudes": (clip_by_magnitude(0.3, 2.0), lambda x: np.sign(x) * np.clip(np.abs(x), 0.3, 2.0)),
    "raised": (clip_by_magnitude(0.3, None), lambda x: np.sign(x) * np.maximum(np.abs(x), 0.3)),
    "signs": (clip_by_magnitude(1.0, 1.0), np.sign),
    "too large for the dtype": (clip(1e300), lambda x: np.where(np.isinf(x), np.sign(x) * 1e300, x)),
}


@pytest.mark.parametrize("name", TABLE)
def test_each_entry_ends_where_float64_says(name):
    """Inside an entry keeps its value, outside it is the bound in its own dtype; inf goes to the bound, NaN stays."""
    tx, expected = TABLE[name]
    dtypes = [jnp.float32, jnp.bfloat16, jnp.float16, jnp.float8_e5m2]
    updates = {jnp.dtype(dtype).name: jnp.asarray(ENTRIES, dtype) for dtype in dtypes}
    for dtype, leaf in now(tx, updates).items():
        largest = float(jnp.finfo(dtype).max)
        wanted = expected(wide(updates[dtype]))
        wanted = np.where(np.isinf(wanted), wanted, np.clip(wanted, -largest, largest)).astype(leaf.dtype)
        assert leaf.dtype == updates[dtype].dtype
        np.testing.assert_array_equal(wide(leaf), wide(wanted))


reals = hnp.arrays(np.float32, 12, elements=st.floats(width=32, allow_subnormal=False))
numbers = st.floats(width=32, allow_nan=False, allow_infinity=False, allow_subnormal=False)


@jax.jit
def traced(x, low, high):
    txs = clip(high), clip_by_value(low, high), clip_by_value(None, high), clip_by_magnitude(low, high)
    return [tx.update(x, tx.init(x))[0] for tx in txs]


@given(reals, numbers, numbers)
def test_traced_bounds_of_all_magnitudes(x, low, high):
    """A traced bound below 0 acts as 0 for magnitudes, and where bounds cross the upper one wins."""
    zero, top = max(low, 0.0), max(high, 0.0)
    size = np.where(x == 0, 0, np.minimum(np.maximum(np.abs(x), zero), top))
    expected = [
        np.clip(x, -top, top),
        np.minimum(np.maximum(x, low), high),
        np.minimum(x, high),
        np.where(np.isnan(x), x, np.sign(x) * size),
    ]
    for actual, wanted in zip(traced(x, np.float32(low), np.float32(high)), expected):
        np.testing.assert_array_equal(actual, wanted)


def test_a_traced_bound_of_nan_is_loud():
    """Every entry becomes NaN, but for zero where magnitudes are raised."""
    x = jnp.array([-2.0, 0.0, 0.5])
    clipped, both, above, magnitudes = traced(x, jnp.nan, jnp.nan)
    assert all(np.isnan(leaf).all() for leaf in (clipped, both, above, magnitudes))
    assert np.isnan(traced(x, jnp.nan, 1.0)[1]).all()
    chex.assert_trees_all_equal(traced(x, jnp.nan, 1.0)[3], jnp.array([NAN, 0.0, NAN]))


# Complex entries

PLANE = [3 + 4j, 0.3 - 0.4j, 0j, -2 + 0j, 1e25 - 1e25j, 3e38 + 3e38j, 3e-20 + 4e-20j, 1e-30j]


@pytest.mark.parametrize("bound", [1.0, 1e-25, 1e30])
def test_complex_entries_keep_their_phase(bound):
    """The magnitude is bounded from either side, also where squares leave the range of f32."""
    x = jnp.asarray(PLANE, jnp.complex64)
    size = np.where(x == 0, 1.0, np.abs(wide(x)))
    for tx, factor in (
        (clip(bound), np.minimum(1.0, bound / size)),
        (clip_by_magnitude(bound, None), np.maximum(1.0, bound / size)),
        (clip_by_magnitude(bound, bound), bound / size),
    ):
        expected = wide(x) * factor
        np.testing.assert_allclose(wide(now(tx, x)), expected, rtol=tolerance(jnp.float32))
    inside = now(clip(INF), x), now(clip_by_magnitude(1e-37, None), x)
    chex.assert_trees_all_equal(inside, (x, x))


def test_complex_entries_that_are_not_finite():
    """An infinite entry goes to the bound in the direction of its infinite parts, and a NaN stays NaN."""
    entries = [INF, complex(0, -INF), complex(INF, INF), complex(-INF, 5), complex(NAN, 1), complex(INF, NAN)]
    out = now(clip(2.0), jnp.asarray(entries, jnp.complex64))
    np.testing.assert_allclose(out[:4], [2, -2j, np.sqrt(2) * (1 + 1j), -2], rtol=tolerance(jnp.float32))
    assert np.isnan(out[4:]).all()


@pytest.mark.parametrize(
    ("low", "high", "size"), [(-1.0, 2.0, 1.0), (-2.0, 1.0, 1.0), (None, 2.0, 2.0), (-2.0, None, 2.0), (1.0, 2.0, 0.0)]
)
def test_both_parts_of_a_complex_entry_lie_within_the_bounds(low, high, size):
    """The magnitude is the largest for which they do, whatever the phase."""
    out = now(clip_by_value(low, high), jnp.asarray([3 + 4j, 0.3 + 0.4j, 0j], jnp.complex64))
    np.testing.assert_allclose(out, [(3 + 4j) / 5 * size, (0.3 + 0.4j) * (size > 0), 0], rtol=tolerance(jnp.float32))


def test_derivatives():
    """The derivative is 1 inside and 0 outside, and finite for complex entries of 0."""
    slope = jax.jit(jax.vmap(jax.grad(lambda x: clip_by_value(-1.0, 2.0).update(x, ())[0])))
    chex.assert_trees_all_equal(slope(jnp.array([-3.0, 0.0, 1.5, 4.0])), jnp.array([0.0, 1.0, 1.0, 0.0]))

    def size(z, tx):
        out = tx.update(jax.lax.complex(z[0], z[1]), ())[0]
        return out.real + out.imag

    for tx in (clip(1.0), clip_by_magnitude(0.5, 1.0)):
        for z in ([0.0, 0.0], [0.6, 0.0], [3.0, 4.0]):
            assert jnp.isfinite(jax.grad(size)(jnp.array(z), tx)).all()


# Bounds


def test_trees_of_bounds():
    """A prefix tree gives each leaf its bound; None leaves a leaf alone, and what is masked needs no bound."""
    updates = small(0, 9.0)
    tx = clip({"bias": 1.0, "dense": None, "scale": lambda count: 2.0 + count})
    out = now(tx, updates)
    chex.assert_trees_all_equal(out["dense"], updates["dense"])
    chex.assert_trees_all_equal(out["bias"], jnp.clip(updates["bias"], -1, 1))
    chex.assert_trees_all_equal(out["scale"], jnp.clip(updates["scale"], -2, 2))
    masked = {**updates, "dense": optax.MaskedNode()}
    out = now(clip({"bias": 1.0, "dense": {"deep": 2.0}, "scale": 1.0}), masked)
    chex.assert_trees_all_equal(out["bias"], jnp.clip(updates["bias"], -1, 1))
    both = now(clip_by_value({"bias": -1.0, "dense": None, "scale": 0.0}, 0.5), updates)
    chex.assert_trees_all_equal(both["dense"], jnp.minimum(updates["dense"], 0.5))
    chex.assert_trees_all_equal(both["bias"], jnp.clip(updates["bias"], -1, 0.5))


def test_schedules():
    """A schedule is asked from step 0 on in one trace, a negative value acts as 0, and the state counts the steps."""
    tx, x = clip(lambda count: 2.0 - 1.5 * count), jnp.array([-9.0, 9.0])
    state = tx.init(x)
    for bound in (2.0, 0.5, 0.0):
        out, state = step(tx, x, state)
        chex.assert_trees_all_equal(out, jnp.array([-bound, bound]))
    assert state == ValueClipState(jnp.int32(3))


@pytest.mark.parametrize(
    ("make", "arguments"),
    [
        (clip, {"max_delta": 0.25}),
        (clip_by_value, {"min_value": -0.5, "max_value": 0.25}),
        (clip_by_magnitude, {"min_magnitude": 0.25, "max_magnitude": 0.5}),
    ],
)
def test_bounds_can_be_injected(make, arguments):
    """`optax.inject_hyperparams` takes each clip as it is."""
    tx, updates = optax.inject_hyperparams(make)(**arguments), small(0)
    out, state = step(tx, updates)
    assert state.hyperparams.keys() == arguments.keys()
    chex.assert_trees_all_equal(out, now(make(**arguments), updates))


@pytest.mark.parametrize("bound", [1, np.uint8(1), jnp.uint8(1), jnp.int32(1), jnp.bfloat16(1), jnp.float16(1)])
def test_bounds_of_every_real_dtype(bound):
    """Integers and narrow floats are bounds, under strict promotion too; an unsigned one has a negative."""
    dtypes = [jnp.float32, jnp.bfloat16, jnp.float16, jnp.complex64]
    updates = [jnp.full(2, -3.0, dtype) for dtype in dtypes]
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        for tx in (clip(bound), clip_by_value(None, bound), clip_by_magnitude(bound, bound)):
            out = jax.eval_shape(lambda x, tx=tx: tx.update(x, ())[0], updates)
            chex.assert_trees_all_equal_shapes_and_dtypes(out, updates)
    chex.assert_trees_all_equal(clip(bound).update(updates, ())[0], [jnp.full(2, -1.0, dtype) for dtype in dtypes])


# States, and what is refused


@pytest.mark.parametrize("empty", [(), None, optax.EmptyState()])
def test_a_clip_with_numbers_needs_no_state(empty):
    """An empty state starts afresh; a schedule counts steps, so there it is refused."""
    for tx in (clip(1.0), clip_by_value(-1.0, 1.0), clip_by_magnitude(None, 1.0), clip({"w": 1.0})):
        out, state = tx.update({"w": jnp.array([-6.0, 8.0])}, empty)
        chex.assert_trees_all_equal(out, {"w": jnp.array([-1.0, 1.0])})
        assert state == ValueClipState(jnp.int32(1))
    with pytest.raises(TypeError, match="state must be a ValueClipState, got an empty one"):
        clip(lambda count: 1.0).update(jnp.ones(2), empty)


REFUSED = {
    "max_value is missing.* use clip": lambda: clip_by_value(1.0),
    "max_delta must be >= 0, got -1. Magnitudes are not negative": lambda: clip(-1),
    "max_delta must be a number, got nan": lambda: clip(np.nan),
    "max_delta must be a scalar, got an array of shape": lambda: clip(jnp.ones(2)),
    "max_delta must be a number, a scalar array, a schedule, or None, got a rule": lambda: clip(optax.identity()),
    "max_delta must be a number, a scalar array, a schedule, or None, got str": lambda: clip({"w": "1"}),
    "max_delta must fit a float": lambda: clip(10**400),
    "max_delta must be one value or a prefix of the tree": lambda: clip({"v": 1.0}).update({"w": jnp.ones(2)}, ()),
    "max_delta must return a scalar": lambda: now(clip(lambda count: jnp.ones(2)), jnp.ones(2)),
    "min_value must be <= max_value, got 2 > 1": lambda: clip_by_value(2.0, 1.0),
    "min_value must be <= max_value, got 3 > 1": lambda: clip_by_value({"w": 3.0}, 1).update({"w": jnp.ones(2)}, ()),
    "min_magnitude must be <= max_magnitude, got 2 > 1": lambda: clip_by_magnitude(jnp.float32(2.0), np.float32(1.0)),
    "min_magnitude must be >= 0, got -2": lambda: clip_by_magnitude(-2.0, 1.0),
    "state must be a ValueClipState, got TraceState": lambda: clip(1.0).update(jnp.ones(2), optax.TraceState(1.0)),
}


@pytest.mark.parametrize("text", REFUSED)
def test_what_is_refused(text):
    """The message begins with the argument and says what is wrong with it."""
    with pytest.raises((TypeError, ValueError), match=text):
        REFUSED[text]()


def test_no_step_on_finite_complex_entries_trips_a_guard():
    """Outside of jit, too, nothing is NaN or inf on the way while the entries are finite."""
    updates = jnp.array([3 + 4j, 0, 0.1j], jnp.complex64)
    with jax.debug_nans(True), jax.debug_infs(True), jax.disable_jit():
        for tx in (clip(1.0), clip_by_value(None, 1.0), clip_by_magnitude(0.5, None)):
            chex.assert_tree_all_finite(tx.update(updates, ()))


@pytest.mark.parametrize("clip", [clip, lambda b: clip_by_value(-b, b), lambda b: clip_by_value(None, b)])
def test_a_traced_bound_of_nan_makes_complex_entries_nan(clip):
    """A bound of NaN makes complex entries NaN."""
    z = jnp.array([3 + 4j, 0.1j], jnp.complex64)
    assert np.isnan(jax.jit(lambda bound: clip(bound).update(z, ())[0])(jnp.float32(np.nan))).all()

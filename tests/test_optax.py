"""Against Optax: its own tests on our functions, the same numbers where it is right, and where we differ on purpose."""

import functools
import importlib
import importlib.util
import inspect

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import trees
from trees import step

import optax_clip as oc

NAMES = ["clip", "clip_by_global_norm", "clip_by_block_rms", "adaptive_grad_clip"]
named = pytest.mark.parametrize("name", NAMES)
CLOSE = trees.tolerance(jnp.float32)

# What Optax answers is asserted for the version in which it was seen: a newer one may have changed.
SEEN = optax.__version__ == "0.2.8"


def both(name: str, *args) -> tuple:
    """Optax's transformation and ours."""
    return getattr(optax, name)(*args), getattr(oc, name)(*args)


def update(tx, updates, params=None):
    """The updates of a first step."""
    return step(tx, updates, params=params)[0]


# Optax's own tests


def optax_tests() -> dict:
    """Optax's tests of the functions that we have too: name -> (test, names of the functions that it calls)."""
    if importlib.util.find_spec("optax.transforms._clipping_test") is None:
        return {}
    tests = importlib.import_module("optax.transforms._clipping_test").ClippingTest
    used = {
        test: [name for name in NAMES if f"_clipping.{name}(" in inspect.getsource(getattr(tests, test))]
        for test in dir(tests)
        if test.startswith("test")
    }
    return {test: (tests(test), names) for test, names in used.items() if names}


OPTAX_TESTS = optax_tests()
SLOW = {"test_adaptive_grad_clip", "test_adaptive_grad_clip_with_axis"}
needs_file = pytest.mark.skipif(
    not OPTAX_TESTS, reason="this version of Optax ships no optax/transforms/_clipping_test.py"
)


@needs_file
def test_optax_tests_cover_all_four():
    """Optax's tests that run below call each of the four functions."""
    assert {name for _, names in OPTAX_TESTS.values() for name in names} == set(NAMES)


@needs_file
@pytest.mark.parametrize(
    "test", [pytest.param(test, marks=pytest.mark.full) if test in SLOW else test for test in OPTAX_TESTS] or [None]
)
def test_optax_tests_pass_on_ours(monkeypatch, test):
    """Optax's own tests pass with our functions in place of its, but for the last place of seven digits."""
    calls = set()

    def stand_in(name):
        @functools.wraps(getattr(oc, name))
        def factory(*args, **kwargs):
            calls.add(name)
            return getattr(oc, name)(*args, **kwargs)

        return factory

    case, names = OPTAX_TESTS[test]
    for name in NAMES:
        monkeypatch.setattr(f"optax.transforms._clipping.{name}", stand_in(name))
    # Its 7 decimals of a number near 1 are half a unit in the last place of f32, which Optax's clips miss on a CPU too.
    monkeypatch.setattr(case, "assertAlmostEqual", functools.partial(case.assertAlmostEqual, places=6))
    case.debug()
    assert calls == set(names)


# Parity


@named
def test_parameters_are_those_of_optax(name):
    """Optax's parameters come first, with its names, order, kinds and defaults; what we add is optional."""
    theirs, ours = (list(inspect.signature(getattr(module, name)).parameters.values()) for module in (optax, oc))
    defaults = {"eps": (1e-3, None)}  # a number is None here, and resolved inside

    def same(a, b):
        return (a.name, a.kind) == (b.name, b.kind) and (
            a.default == b.default or b.default in defaults.get(a.name, ())
        )

    assert all(map(same, theirs, ours)) and len(ours) >= len(theirs)
    assert all(p.kind is p.KEYWORD_ONLY and p.default is None for p in ours[len(theirs) :])


@named
def test_numbers_are_those_of_optax(name):
    """The same updates as Optax to a few eps, for trees of many sizes and thresholds."""

    def of(module):
        def one(threshold, updates, params):
            tx = getattr(module, name)(threshold)
            return tx.update(updates, tx.init(updates), params)[0]

        return jax.jit(one)

    theirs, ours = of(optax), of(oc)
    sizes = [(0.01, 1.0), (0.1, 0.03), (1.0, 1.0), (1.0, 100.0), (10.0, 3.0), (100.0, 1.0), (1e-8, 1e-7)]
    clipped = 0
    for seed in range(20):
        for threshold, scale in sizes:
            updates, params = trees.small(seed, scale), trees.small(seed + 100)
            expected = theirs(threshold, updates, params)
            chex.assert_trees_all_close(ours(threshold, updates, params), expected, rtol=CLOSE)
            clipped += not jax.tree.all(jax.tree.map(np.array_equal, expected, updates))
    assert 20 <= clipped < 140  # both sides of the threshold were seen


@pytest.mark.parametrize("axis", [0, -1, (0, 1)])
def test_agc_axes_are_those_of_optax(axis):
    """`adaptive_grad_clip` with an axis gives Optax's updates."""
    updates, params = (trees.small(seed)["dense"] for seed in (0, 1))
    theirs, ours = (update(tx, updates, params) for tx in both("adaptive_grad_clip", 0.1, 1e-3, axis))
    assert not np.array_equal(theirs, updates)
    chex.assert_trees_all_close(ours, theirs, rtol=CLOSE)


# Where we differ on purpose


def test_bf16_norms_are_accumulated_in_f32():
    """Optax's sum of bf16 squares stops at 256, where one more is too small to count: its norm is too small by 9 %."""
    updates = [jnp.bfloat16(16.0), *[jnp.bfloat16(1.0)] * 48]
    theirs, ours = both("clip_by_global_norm", 1.0)
    assert trees.norm64(update(ours, updates)) == pytest.approx(1.0, rel=0.01)
    if SEEN:
        assert trees.norm64(theirs.update(updates, theirs.init(updates))[0]) == pytest.approx(1.09, rel=0.01)


def test_f16_squares_do_not_overflow():
    """Four times 300 in f16 has the norm 600; its square is beyond f16, so Optax silently returns zeros."""
    updates = jnp.full(4, 300.0, jnp.float16)
    theirs, ours = both("clip_by_global_norm", 1.0)
    chex.assert_trees_all_equal(update(ours, updates), jnp.full(4, 0.5, jnp.float16))
    if SEEN:
        chex.assert_trees_all_equal(update(theirs, updates), jnp.zeros(4, jnp.float16))


def test_an_inf_makes_all_entries_nan():
    """One inf makes every entry NaN, which is seen; Optax returns a NaN among zeros."""
    updates = jnp.array([jnp.inf, 1.0, 2.0])
    theirs, ours = both("clip_by_global_norm", 1.0)
    chex.assert_trees_all_equal(update(ours, updates), jnp.full(3, jnp.nan))
    if SEEN:
        chex.assert_trees_all_equal(update(theirs, updates), jnp.array([jnp.nan, 0.0, 0.0]))


@named
def test_a_negative_bound_is_refused(name):
    """A negative bound is an error that names it, or acts as 0 where it is traced; Optax flips the sign."""
    updates, params = jnp.array([3.0, 4.0]), jnp.array([1.0, 1.0])

    def one(module, bound):
        tx = getattr(module, name)(bound)
        return tx.update(updates, tx.init(updates), params)[0]

    with pytest.raises(ValueError, match=r"^\w+ must be >= 0, got -1"):
        getattr(oc, name)(-1.0)
    chex.assert_trees_all_equal(jnp.abs(jax.jit(functools.partial(one, oc))(-1.0)), jnp.zeros(2))
    if SEEN and name in ("clip_by_global_norm", "adaptive_grad_clip"):
        assert np.all(one(optax, -1.0) < 0)


@pytest.mark.parametrize("name", ["clip_by_global_norm", "clip_by_block_rms"])
def test_threshold_0_gives_zeros_for_zeros(name):
    """Zero updates stay zero under a threshold of 0; Optax returns NaN."""
    theirs, ours = both(name, 0.0)
    chex.assert_trees_all_equal(update(ours, jnp.zeros(3)), jnp.zeros(3))
    if SEEN:
        chex.assert_trees_all_equal(update(theirs, jnp.zeros(3)), jnp.full(3, jnp.nan))


@named
def test_the_derivative_at_zero_is_finite(name):
    """The derivative through a clip at zero updates is 1; Optax's is NaN where a norm is taken."""

    def slope(tx):
        return jax.jit(jax.grad(lambda updates: jnp.sum(tx.update(updates, tx.init(updates), jnp.ones(3))[0])))

    theirs, ours = (slope(tx)(jnp.zeros(3)) for tx in both(name, 1.0))
    chex.assert_trees_all_equal(ours, jnp.ones(3))
    if SEEN:
        chex.assert_trees_all_equal(theirs, jnp.ones(3) if name == "clip" else jnp.full(3, jnp.nan))


def test_huge_norms_do_not_overflow():
    """Entries whose squares leave the range of f32 are clipped by their norm; Optax silently returns zeros."""
    updates = jnp.array([3e30, 4e30])
    theirs, ours = both("clip_by_global_norm", 1.0)
    chex.assert_trees_all_close(update(ours, updates), jnp.array([0.6, 0.8]), rtol=CLOSE)
    if SEEN:
        chex.assert_trees_all_equal(update(theirs, updates), jnp.zeros(2))


def test_leaves_without_a_norm_do_not_count():
    """Integer leaves are returned as they are; Optax counts and casts them."""
    updates = {"weight": jnp.array([3.0, 4.0]), "step": jnp.array(12)}
    theirs, ours = both("clip_by_global_norm", 1.0)
    actual = update(ours, updates)
    chex.assert_trees_all_close(actual, {"weight": jnp.array([0.6, 0.8]), "step": jnp.array(12)}, rtol=1e-6)
    chex.assert_trees_all_equal_dtypes(actual, updates)
    if SEEN:
        with pytest.raises(TypeError):
            update(theirs, updates)


def test_the_dtype_of_the_threshold_does_not_change_that_of_the_updates():
    """bf16 updates stay bf16 under a threshold that is an f32 array; Optax returns f32 or fails."""
    updates = jnp.array([3.0, 4.0], jnp.bfloat16)
    theirs, ours = both("clip_by_block_rms", jnp.float32(1.0))
    assert update(ours, updates).dtype == jnp.bfloat16
    if SEEN:
        assert update(theirs, updates).dtype == np.float32


def test_a_value_clip_keeps_nan():
    """An entry that is NaN stays NaN, and an infinite one goes to the bound, as in Optax."""
    updates = jnp.array([jnp.nan, jnp.inf, -jnp.inf, 0.5])
    for tx in both("clip", 1.0):
        chex.assert_trees_all_equal(update(tx, updates), jnp.array([jnp.nan, 1.0, -1.0, 0.5]))

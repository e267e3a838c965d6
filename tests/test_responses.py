"""What a response makes of small, medium and large norms, and what is left of that in a clip."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
import trees
from trees import step

import optax_clip as oc
from optax_clip import responses

NAMES = ["shrink", "normalize", "smooth", "tanh"]
every = pytest.mark.parametrize("name", NAMES)
smooth_ones = pytest.mark.parametrize("name", ["smooth", "tanh"])
full = functools.partial(pytest.param, marks=pytest.mark.full)


@functools.cache
def compiled(name):
    return jax.jit(getattr(responses, name))


@every
def test_values_over_the_whole_range(name):
    """The norm after is that of the formula to a few roundings, for norms and thresholds from 1e-30 to 3e38."""
    sizes = np.float32([1e-30, 1e-20, 1e-10, 0.003, 0.1, 1.0, 1.5, 3.0, 100.0, 1e10, 1e20, 1e30, 3e38])
    norms, thresholds = map(np.ravel, np.meshgrid(sizes, sizes))
    after = compiled(name)(norms, thresholds)
    with np.errstate(all="ignore"):
        expected = getattr(reference, name)(*map(reference.wide, (norms, thresholds)))
    np.testing.assert_allclose(after, expected, rtol=2e-6)


@every
def test_limits(name):
    """Small norms stay, large ones come out at the threshold; `normalize` brings all there."""
    small, large = compiled(name)(np.float32([1e-6, 1e6]), np.float32(1.0))
    np.testing.assert_allclose(small, 1.0 if name == "normalize" else 1e-6, rtol=1e-5)
    np.testing.assert_allclose(large, 1.0, rtol=1e-5)
    at = {"shrink": 1.0, "normalize": 1.0, "smooth": 0.5, "tanh": np.tanh(1.0)}[name]
    np.testing.assert_allclose(compiled(name)(np.float32(1.0), np.float32(1.0)), at, rtol=1e-6)


@every
def test_it_never_falls(name):
    """The norm after grows with the norm and with the threshold, and is never above the threshold."""
    norms, thresholds = np.meshgrid(*[np.float32(10.0 ** np.linspace(-5, 5, 100))] * 2)
    after = np.asarray(compiled(name)(norms, thresholds))
    for axis in (0, 1):
        assert (np.diff(after, axis=axis) >= -1e-6 * np.delete(after, 0, axis)).all()
    assert (after <= thresholds * np.float32(1 + 1e-6)).all()


@every
def test_a_threshold_of_zero(name):
    """It makes every norm 0."""
    assert not np.any(compiled(name)(np.float32([1e-30, 2.0, 3e38]), np.zeros(3, np.float32)))


@every
def test_derivatives_are_finite(name):
    """Derivatives by norm and threshold are finite, also at equal numbers, far apart, and for a threshold of 0."""
    sizes = np.float32([1e-15, 1e-8, 1.0, 1e8, 1e15])
    norms, thresholds = map(np.ravel, np.meshgrid(sizes, np.append(sizes, np.float32(0))))
    slope = jax.jit(jax.vmap(jax.grad(getattr(responses, name), argnums=(0, 1))))
    chex.assert_tree_all_finite(slope(norms, thresholds))


@smooth_ones
def test_smooth_responses_have_no_kink(name):
    """The derivative is continuous where that of `shrink` jumps."""
    jump = lambda f: float(abs(jax.grad(f)(1.001, 1.0) - jax.grad(f)(0.999, 1.0)))
    assert jump(responses.shrink) > 0.9
    assert jump(getattr(responses, name)) < 0.01


# In clips

CLIPS = {  # whose threshold is 0.5 for parameters of 5 and a state of one earlier step
    "clip_by_global_norm": functools.partial(oc.clip_by_global_norm, 0.5),
    "clip_by_leaf_norm": functools.partial(oc.clip_by_leaf_norm, 0.5),
    "clip_by_unit_norm": functools.partial(oc.clip_by_unit_norm, 0.5),
    "clip_by_block_rms": functools.partial(oc.clip_by_block_rms, 0.5),
    "clip_by_group_norm": functools.partial(oc.clip_by_group_norm, {"a": 0.5}, "a"),
    "clip_by_norm": functools.partial(oc.clip_by_norm, oc.global_norm, 0.5),
    "adaptive_grad_clip": functools.partial(oc.adaptive_grad_clip, 0.1),
    "autoclip": functools.partial(oc.autoclip, 0.0),
    "zclip": functools.partial(oc.zclip, 0.0, warmup_steps=1, spike="mean"),
    "adagc": functools.partial(oc.adagc, None, 1.0, warmup_steps=1),
    "clip_by_sigma": functools.partial(oc.clip_by_sigma, 0.0, 2),
}
QUICK = {
    ("clip_by_block_rms", "tanh"),
    ("clip_by_group_norm", "normalize"),
    ("adaptive_grad_clip", "smooth"),
    ("zclip", "normalize"),
    ("adagc", "tanh"),
}


@pytest.mark.parametrize(
    ("clip", "name"), [(clip, name) if (clip, name) in QUICK else full(clip, name) for clip in CLIPS for name in NAMES]
)
def test_every_norm_clip_takes_a_response(clip, name):
    """What comes out has the norm that the response makes of the norm and the threshold."""
    tx = CLIPS[clip](response=getattr(responses, name))
    params = {"w": jnp.full((1,), 5.0)}
    _, state = step(tx, {"w": jnp.full((1,), 0.5)}, params=params)
    updates, state = step(tx, {"w": jnp.full((1,), -4.0)}, state, params)
    assert float(state.norm) == 4.0
    assert float(-updates["w"][0]) == pytest.approx(getattr(reference, name)(4.0, 0.5), rel=1e-5)


@every
def test_the_scale_is_that_of_the_response(name):
    """The state reports norm after / norm, and a block at the fixed point of its response keeps every bit."""
    tx = oc.clip_by_global_norm(2.0, response=getattr(responses, name))
    for size in (0.4, 2.0, 30.0):
        updates = jnp.array([0.6, -0.8]) * size
        clipped, state = step(tx, updates)
        expected = getattr(reference, name)(size, 2.0) / size
        np.testing.assert_allclose(state.clip_scale, expected, rtol=1e-6)
        np.testing.assert_allclose(clipped, updates * expected, rtol=1e-6)
    if name in ("shrink", "normalize"):
        exact = jnp.array([0.0, 2.0])
        chex.assert_trees_all_equal(step(tx, exact)[0], exact)


def test_zero_stays_zero():
    """Zero updates stay zero under every response, also where the threshold is 0."""

    @jax.jit
    def clipped(threshold):
        clips = [oc.clip_by_global_norm(threshold, response=getattr(responses, name)) for name in NAMES]
        return [tx.update(jnp.zeros(3), tx.init(jnp.zeros(3)))[0] for tx in clips]

    for threshold in (0.0, 1.0):
        assert not np.any(clipped(threshold))


@pytest.mark.parametrize("name", [full("shrink"), full("smooth"), "tanh"])
def test_the_derivative_at_zero_is_the_identity(name):
    """At zero updates the result grows as the updates do, without a NaN, and does not depend on the threshold."""

    @jax.jit
    @functools.partial(jax.jacobian, argnums=(0, 1))
    def slope(updates, threshold):
        tx = oc.clip_by_global_norm(threshold, response=getattr(responses, name))
        return tx.update(updates, tx.init(updates))[0]

    chex.assert_trees_all_close(slope(jnp.zeros(3), 0.5), (jnp.eye(3), jnp.zeros(3)))
    chex.assert_trees_all_close(slope(jnp.full(3, 1e-12), 0.5)[0], jnp.eye(3), atol=1e-6)


@smooth_ones
@pytest.mark.parametrize("clip", [oc.clip_by_global_norm, full(oc.clip_by_leaf_norm), full(oc.clip_by_unit_norm)])
def test_smooth_in_the_threshold(clip, name):
    """Derivatives by the threshold agree with finite differences from far below to far above the norm."""
    updates, weights = trees.small(0), trees.small(1)

    def value(t):
        tx = clip(t, response=getattr(responses, name))
        return optax.tree.vdot(weights, tx.update(updates, tx.init(updates))[0])

    value, slope = jax.jit(value), jax.jit(jax.grad(value))
    for threshold in (0.05, 0.5, 2.0, 20.0):
        h = 0.01 * threshold
        expected = (value(threshold + h) - value(threshold - h)) / (2 * h)
        np.testing.assert_allclose(slope(threshold), expected, rtol=2e-2, atol=1e-3)


@pytest.mark.parametrize("name", ["shrink", "normalize", full("smooth"), full("tanh")])
def test_derivatives_at_any_scale(name):
    """Gradients and threshold scaled together have the derivative that they have at 1."""

    @jax.jit
    @jax.grad
    def slope(g, scale):
        tx = oc.clip_by_global_norm(2.0 * scale, response=getattr(responses, name))
        return tx.update(g, tx.init(g))[0] @ jnp.array([1.0, 2.0])

    g = jnp.array([3.0, -4.0])
    for scale in (1e-15, 1e15):
        chex.assert_trees_all_close(slope(g * scale, scale), slope(g, 1.0), rtol=1e-4)


def test_a_response_of_the_user():
    """Any function of norm and threshold is a response: here blocks above the threshold become zero."""
    tx = oc.clip_by_leaf_norm(1.0, response=lambda norm, threshold: jnp.where(norm > threshold, 0.0, norm))
    clipped, state = step(tx, {"a": jnp.array([0.6, 0.8]), "b": jnp.array([3.0, 4.0])})
    chex.assert_trees_all_close(clipped, {"a": jnp.array([0.6, 0.8]), "b": jnp.zeros(2)}, rtol=1e-6)
    chex.assert_trees_all_close(state.clip_scale, 0.5, rtol=1e-6)


# Both ends of a range


def test_a_range_whose_ends_follow_schedules():
    """Both ends of `clip_by_norm_range` and `clip_by_magnitude` may be schedules."""
    low, high = optax.linear_schedule(0.0, 2.0, 4), optax.linear_schedule(8.0, 2.0, 4)
    grads = np.float32([[0.3, 0.4], [0.3, 0.4], [6.0, 8.0], [6.0, 8.0], [1.2, 1.6]])
    ranges, entries = oc.clip_by_norm_range(low, high), oc.clip_by_magnitude(low, high)
    for tx, size in ((ranges, np.linalg.norm), (entries, np.abs)):
        state = None
        for i, g in enumerate(grads):
            out, state = step(tx, g, state)
            np.testing.assert_allclose(size(out), np.clip(size(g), float(low(i)), float(high(i))), rtol=1e-6)
            chex.assert_trees_all_equal(np.sign(out), np.sign(g))
        assert not np.any(step(tx, np.float32([0.0, -0.0]), state)[0])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", full("float16"), "complex64"])
def test_magnitudes_are_moved_into_the_range(dtype):
    """Entries below go up to the bound, those above down, with sign or phase kept; inside they keep every bit."""
    x = jnp.asarray([-8.0, -1.0, -0.25, -1e-3, 0.0, 1e-3, 0.25, 1.0, 8.0, np.inf, -np.inf, np.nan], dtype)
    out, _ = step(oc.clip_by_magnitude(0.5, 2.0), x)
    expected = jnp.asarray([-2.0, -1.0, -0.5, -0.5, 0.0, 0.5, 0.5, 1.0, 2.0, 2.0, -2.0], dtype)
    chex.assert_trees_all_close(out[:-1], expected, rtol=1e-6)
    assert out.dtype == x.dtype and jnp.isnan(out[-1])


def test_tiny_complex_entries_go_up_in_their_direction():
    """The direction of an entry is kept where the square of its magnitude is no number of f32."""
    x = jnp.array([3e-30 + 4e-30j, -4e-25j, 1e-20 - 1e-20j], jnp.complex64)
    out, _ = step(oc.clip_by_magnitude(1.0, None), x)
    chex.assert_trees_all_close(out, jnp.array([0.6 + 0.8j, -1j, (1 - 1j) / 2**0.5], jnp.complex64), rtol=1e-6)


def test_traced_magnitudes_that_go_wrong():
    """A traced lower bound below 0 acts as 0; NaN is loud but for zeros; where bounds cross, the upper one wins."""
    x = jnp.array([-3.0, 0.1, 0.0])
    clip = jax.jit(lambda low, high: oc.clip_by_magnitude(low, high).update(x, optax.EmptyState())[0])
    chex.assert_trees_all_equal(clip(-1.0, 2.0), jnp.array([-2.0, 0.1, 0.0]))
    chex.assert_trees_all_equal(clip(1.0, 0.5), jnp.array([-0.5, 0.5, 0.0]))
    assert jnp.isnan(clip(jnp.nan, 2.0)[:2]).all() and jnp.isnan(clip(1.0, jnp.nan)[:2]).all()

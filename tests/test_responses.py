"""What a response does to small, medium and large norms, for every clip that takes one."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_contract import pair

import optax_clip as oc

RESPONSES = {
    "shrink": lambda n, t: np.minimum(1, t / n),
    "normalize": lambda n, t: t / n,
    "smooth": lambda n, t: t / (t + n),
    "tanh": lambda n, t: t / n * np.tanh(n / t),
}
CLIPS = {  # whose threshold is 0.5 for parameters of ones and a state of one earlier step
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
smooth_ones = pytest.mark.parametrize("response", [oc.smooth, oc.tanh], ids=lambda f: f.__name__)
every_response = pytest.mark.parametrize("response", RESPONSES)


@every_response
@pytest.mark.parametrize("name", CLIPS)
def test_every_norm_clip_takes_a_response(name, response):
    """What comes out is the response to the norm and threshold reported, times what goes in."""
    tx = CLIPS[name](response=getattr(oc, response))
    params = {"w": jnp.full((1,), 5.0)}
    state = tx.init(params)
    _, state = tx.update({"w": jnp.full((1,), 0.5)}, state, params)
    updates, state = jax.jit(tx.update)({"w": jnp.full((1,), 4.0)}, state, params)
    norm, threshold = float(state.norm), float(state.threshold)
    assert norm == 4.0 and threshold == pytest.approx(0.5, abs=1e-5)
    assert float(updates["w"][0]) == pytest.approx(4.0 * RESPONSES[response](norm, threshold), rel=1e-5)


@every_response
@pytest.mark.parametrize("ratio", [1e-6, 0.003, 0.009, 0.011, 0.03, 0.1, 1.0, 3.0, 1e6])
def test_small_medium_and_large_norms(response, ratio):
    """The documented factor for norms far below, at and far above the threshold."""
    for threshold in (1e-20, 1.0, 1e20):
        norm = jnp.float32(ratio * threshold)
        scale = getattr(oc, response)(norm, jnp.float32(threshold))
        assert float(scale) == pytest.approx(RESPONSES[response](ratio, 1.0), rel=1e-6)


@smooth_ones
def test_smooth_responses_have_no_kink(response):
    """Seen as a function of the norm, the derivative of the result is continuous where that of `shrink` jumps."""
    result = lambda f: jax.grad(lambda n: n * f(n, jnp.float32(1.0)))
    jump = lambda f: float(abs(result(f)(jnp.float32(1.001)) - result(f)(jnp.float32(0.999))))
    assert jump(oc.shrink) > 0.9
    assert jump(response) < 0.01


@smooth_ones
@pytest.mark.parametrize("clip", [oc.clip_by_global_norm, oc.clip_by_leaf_norm, oc.clip_by_unit_norm])
def test_smooth_in_the_threshold(clip, response):
    """Derivatives by the threshold agree with finite differences from far below to far above the norm."""
    updates, weights = pair(0), pair(1)
    state = clip(1.0).init(updates)
    value = lambda t: optax.tree.vdot(weights, clip(t, response=response).update(updates, state)[0])
    slope = jax.jit(jax.grad(value))
    for threshold in (0.05, 0.5, 2.0, 20.0):
        h = 0.01 * threshold
        expected = (value(threshold + h) - value(threshold - h)) / (2 * h)
        chex.assert_trees_all_close(slope(threshold), expected, rtol=2e-2, atol=2e-4)


@smooth_ones
def test_derivative_at_zero_is_the_identity(response):
    """At zero updates the result grows as the updates do: the factor there is 1, without a NaN."""
    tx = oc.clip_by_global_norm(0.5, response=response)
    zeros = jnp.zeros(3)
    state = tx.init(zeros)
    jacobian = jax.jit(jax.jacobian(lambda updates: tx.update(updates, state)[0]))
    chex.assert_trees_all_close(jacobian(zeros), jnp.eye(3))
    chex.assert_trees_all_close(jacobian(jnp.full(3, 1e-20)), jnp.eye(3), atol=1e-6)
    by_threshold = jax.grad(lambda t: oc.clip_by_global_norm(t, response=response).update(zeros, state)[0].sum())
    assert by_threshold(0.5) == 0


@pytest.mark.parametrize("response", [oc.shrink, oc.normalize, oc.smooth, oc.tanh])
@pytest.mark.parametrize("scale", [1e-25, 1e-20, 1e20, 1e25])
def test_derivatives_at_any_scale(response, scale):
    """Gradients and threshold scaled together have the derivative that they have at 1."""

    def slope(scale):
        tx, gradients = oc.clip_by_global_norm(2.0 * scale, response=response), jnp.array([3.0, -4.0]) * scale
        return jax.grad(lambda g: tx.update(g, tx.init(g))[0] @ jnp.array([1.0, 2.0]))(gradients)

    chex.assert_trees_all_close(slope(scale), slope(1.0), rtol=1e-4)


def test_a_factor_below_zero_acts_as_zero():
    """No response flips the sign of the updates."""
    tx = oc.clip_by_norm(oc.global_norm, 1.0, lambda norm, threshold: 2.0 - norm / threshold)
    for gradient, expected in ((1.5, 0.75), (4.0, 0.0), (1e30, 0.0)):
        clipped, state = tx.update(jnp.array([gradient]), tx.init(jnp.zeros(1)))
        chex.assert_trees_all_close((clipped, state.scale), (jnp.array([expected]), jnp.float32(expected / gradient)))


# Both ends of a range


def test_a_range_whose_ends_follow_schedules():
    """Both ends of `clip_by_norm_range` and `clip_by_magnitude` may be schedules, in one trace."""
    low, high = optax.linear_schedule(0.0, 2.0, 4), optax.linear_schedule(8.0, 2.0, 4)
    grads = [
        jnp.array([0.3, 0.4]),
        jnp.array([0.3, 0.4]),
        jnp.array([6.0, 8.0]),
        jnp.array([6.0, 8.0]),
        jnp.array([1.2, 1.6]),
    ]
    ranges, entries = oc.clip_by_norm_range(low, high), oc.clip_by_magnitude(low, high)
    for tx, size in ((ranges, jnp.linalg.norm), (entries, jnp.abs)):
        state, step = tx.init(grads[0]), jax.jit(chex.assert_max_traces(tx.update, n=1))
        for i, g in enumerate(grads):
            out, state = step(g, state)
            expected = np.clip(np.asarray(size(g)), float(low(i)), float(high(i)))
            chex.assert_trees_all_close(size(out), expected, rtol=1e-6)
            chex.assert_trees_all_close(jnp.sign(out), jnp.sign(g))
        chex.clear_trace_counter()
        out, _ = step(jnp.array([0.0, -0.0]), state)
        assert not out.any()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16, jnp.complex64])
def test_magnitudes_are_moved_into_the_range(dtype):
    """Entries below go up to the bound, those above down, with sign or phase kept; inside they keep every bit."""
    x = jnp.asarray([-8.0, -1.0, -0.25, -1e-3, 0.0, 1e-3, 0.25, 1.0, 8.0, np.inf, -np.inf], dtype)
    tx = oc.clip_by_magnitude(0.5, 2.0)
    out, _ = jax.jit(tx.update)(x, tx.init(x))
    expected = jnp.asarray([-2.0, -1.0, -0.5, -0.5, 0.0, 0.5, 0.5, 1.0, 2.0, 2.0, -2.0], dtype)
    chex.assert_trees_all_close(out, expected, rtol=1e-6)
    assert out.dtype == dtype
    bad, _ = tx.update(jnp.asarray([np.nan], dtype), tx.init(x))
    assert jnp.isnan(bad).all()


def test_tiny_complex_entries_go_up_in_their_direction():
    """The direction of an entry is kept where the square of its magnitude is no number of f32."""
    x = jnp.array([3e-30 + 4e-30j, -4e-25j, 1e-20 - 1e-20j], jnp.complex64)
    tx = oc.clip_by_magnitude(1.0)
    out, _ = jax.jit(tx.update)(x, tx.init(x))
    chex.assert_trees_all_close(out, jnp.array([0.6 + 0.8j, -1j, (1 - 1j) / 2**0.5], jnp.complex64), rtol=1e-6)


def test_traced_magnitudes_that_go_wrong():
    """A traced lower bound below 0 acts as 0; NaN is loud but for zeros; where bounds cross, the upper one wins."""
    x = jnp.array([-3.0, 0.1, 0.0])
    step = jax.jit(lambda low, high: oc.clip_by_magnitude(low, high).update(x, oc.clip_by_magnitude(low).init(x))[0])
    chex.assert_trees_all_equal(step(-1.0, 2.0), jnp.array([-2.0, 0.1, 0.0]))
    chex.assert_trees_all_equal(step(1.0, 0.5), jnp.array([-0.5, 0.5, 0.0]))
    assert jnp.isnan(step(jnp.nan, 2.0)[:2]).all() and jnp.isnan(step(1.0, jnp.nan)[:2]).all()

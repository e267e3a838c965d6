"""Training in low precision: the recipes of the documentation with several clips, on a small regression."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import trees
from test_wrappers import bits

import optax_clip as oc

CLIPS = {
    "clip_by_global_norm": lambda: oc.clip_by_global_norm(0.2),
    "clip_by_leaf_norm": lambda: oc.clip_by_leaf_norm(0.1),
    "adaptive_grad_clip": lambda: oc.adaptive_grad_clip(0.02),
    "zclip": lambda: oc.zclip(warmup_steps=4),
}
NORMS = {
    "clip_by_global_norm": oc.global_norm,
    "clip_by_leaf_norm": oc.leaf_norm,
    "adaptive_grad_clip": oc.unit_norm,
    "zclip": oc.global_norm,
}
FIXED = [name for name in CLIPS if name != "zclip"]
STEPS = 150
FIRST_SCALE = 2.0**24  # f16 holds numbers below 2^16


def cast(dtype):
    return lambda params: optax.tree.cast(params, dtype)


def matrices_in_bf16(params):
    return {name: x.astype(jnp.bfloat16 if x.ndim > 1 else x.dtype) for name, x in params.items()}


COMPUTE = {"f32": cast(jnp.float32), "bf16": cast(jnp.bfloat16), "mixed": matrices_in_bf16, "f16": cast(jnp.float16)}
LOW = [name for name in COMPUTE if name != "f32"]

every = pytest.mark.parametrize("clip", CLIPS)
to_f32 = optax.stateless(lambda grads, _: optax.tree.cast(grads, jnp.float32))


def where_finite(optimizer):
    """Drops steps without a wrapper's help: everything is selected after the fact."""

    def update(grads, state, params):
        finite = jnp.isfinite(optax.tree.norm(grads))
        updates, new = optimizer.update(grads, state, params)
        updates = jax.tree.map(lambda u: jnp.where(finite, u, 0), updates)
        return updates, jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, state)

    return optax.GradientTransformation(optimizer.init, update)


# The wrapper, and where the state of what it wraps stands in its own.
DROPS = {
    "skip_spikes": (oc.skip_spikes, lambda state: state.inner_state),
    "apply_if_finite": (lambda tx: optax.apply_if_finite(tx, 3), lambda state: state.inner_state),
    "where": (where_finite, lambda state: state),
}


def weights() -> dict:
    """A network with one hidden layer."""
    normal = np.random.default_rng(0).normal
    tree = {"w": 0.5 * normal(size=(4, 16)), "b": np.zeros(16), "head": 0.25 * normal(size=(16, 1))}
    return jax.tree.map(jnp.float32, tree)


X = np.random.default_rng(1).normal(size=(STEPS, 32, 4)).astype(np.float32)  # a batch a step
Y = np.sin(X[..., :1] + X[..., 1:2])
SPIKY = np.where(np.arange(STEPS)[:, None, None] % 25 == 24, 3 * Y, Y)


def loss(params, x, y):
    """The mean of squares, taken in f32, of what is computed in the dtypes of the parameters."""
    hidden = jnp.tanh(x.astype(params["w"].dtype) @ params["w"] + params["b"])
    out = hidden.astype(params["head"].dtype) @ params["head"]
    return jnp.mean((out.astype(jnp.float32) - y) ** 2)


@jax.jit
def f16_gradients(params, scale, x, y):
    """Gradients of a scaled loss, unscaled in f32."""
    grads = jax.grad(lambda p: scale * loss(p, x, y))(COMPUTE["f16"](params))
    grads = jax.lax.optimization_barrier(grads)  # or compilers leave out converting to f16 and back: no overflow
    return jax.tree.map(lambda g: g.astype(jnp.float32) / scale, grads)


@functools.cache
def train(clip: str, precision: str):
    """The last (params, state) and, of every step, the gradients as the clip saw them, the state, and the scale."""
    chain = [CLIPS[clip](), to_f32, optax.adamw(1e-2)]
    optimizer = oc.skip_spikes(optax.chain(*chain)) if precision == "f16" else optax.chain(*chain)

    def step(carry, batch):
        params, state, scale = carry
        if precision == "f16":
            grads = f16_gradients(params, scale, *batch)
        else:
            grads = jax.grad(loss)(COMPUTE[precision](params), *batch)
        updates, state = optimizer.update(grads, state, params)
        next_scale = scale
        if precision == "f16":
            taken = state.measured.step - state.total_skipped
            grown = jnp.where(taken % 80 == 0, 2 * scale, scale)
            next_scale = jnp.where(state.consecutive_skipped > 0, jnp.maximum(scale / 2, 1.0), grown)
        return (optax.apply_updates(params, updates), state, next_scale), (grads, state, scale)

    params = weights()
    carry = params, optimizer.init(params), jnp.float32(FIRST_SCALE)
    (params, state, _), history = jax.jit(lambda carry: jax.lax.scan(step, carry, (X, SPIKY)))(carry)
    return params, state, *history


# Training


@every
@pytest.mark.parametrize("precision", LOW)
def test_low_precision_trains_like_f32(clip, precision):
    """In bf16, in a mixed tree and in f16 with a dynamic scale, the loss comes down to that of the f32 run."""
    first = loss(weights(), X, Y)
    expected, actual = (float(loss(train(clip, name)[0], X, Y)) for name in ("f32", precision))
    assert expected < 0.1 * first
    # Rounding moved the last loss by up to 2 % when this was written, the steps that f16 skipped by 6 %.
    assert actual == pytest.approx(expected, rel=0.15)


@every
@pytest.mark.parametrize("precision", COMPUTE)
def test_masters_and_state_stay_f32(clip, precision):
    """Parameters and state keep their dtypes through a scan, f32 and counters, whatever the gradients are."""
    params, state, grads, *_ = train(clip, precision)
    chex.assert_trees_all_equal_dtypes(params, weights())
    assert {leaf.dtype.name for leaf in jax.tree.leaves(state)} <= {"float32", "int32"}
    seen = weights() if precision == "f16" else COMPUTE[precision](weights())  # f16 is unscaled in f32
    chex.assert_trees_all_equal_dtypes(grads, seen)


@every
@pytest.mark.parametrize("precision", COMPUTE)
def test_reported_norms_are_those_of_the_gradients(clip, precision):
    """In every step the norm in the state is the f64 norm of the gradients as they came, and some are clipped."""
    _, _, grads, states, _ = train(clip, precision)
    taken = np.arange(STEPS)
    if precision == "f16":
        taken = np.flatnonzero(states.consecutive_skipped == 0)
        states = states.inner_state
    reported = oc.clip_metrics(states)
    expected = [trees.norm64(jax.tree.map(lambda g, i=i: g[i], grads)) for i in taken]
    chex.assert_trees_all_close(reported["clip/norm"][taken], np.float32(expected), rtol=1e-5)
    assert reported["clip/clip_rate"][-1] > 0


# Loss scaling


@every
def test_dynamic_scale_recovers_from_overflow(clip):
    """A first scale that overflows is halved until a step is taken, nothing becomes NaN, and it grows again."""
    params, state, _, states, scales = train(clip, "f16")
    taken = np.asarray(states.consecutive_skipped == 0)
    first = int(taken.argmax())
    assert first > 1
    norm = trees.norm64(jax.jit(jax.grad(loss))(weights(), X[first], SPIKY[first]))
    assert states.measured.norm[first] == pytest.approx(norm, rel=0.01)  # unscaled
    chex.assert_trees_all_equal(np.asarray(scales[: first + 1]), np.float32(FIRST_SCALE / 2.0 ** np.arange(first + 1)))
    assert scales.max() == FIRST_SCALE and (np.diff(scales) > 0).any()
    chex.assert_tree_all_finite((params, state.inner_state))
    adam = state.inner_state[2][0]
    assert adam.count == taken.sum() == STEPS - state.total_skipped > 0.8 * STEPS


@functools.cache
def start(clip, wrap=lambda tx: tx):
    """A compiled f16 step, and (params, state) after six good ones, when the rule of `zclip` is out of warm-up."""
    optimizer = wrap(optax.chain(CLIPS[clip](), optax.adamw(1e-2)))

    @jax.jit
    def step(params, state, scale):
        updates, state = optimizer.update(f16_gradients(params, scale, X[0], Y[0]), state, params)
        return optax.apply_updates(params, updates), state

    params = weights()
    state = optimizer.init(params)
    for _ in range(6):
        params, state = step(params, state, 2.0**10)
    return step, params, state


@every
@pytest.mark.parametrize("drop", DROPS)
def test_overflowing_step_leaves_no_trace(clip, drop):
    """An f16 step that overflows keeps every bit of parameters, moments and the clip's state; the next one moves."""
    wrap, inner = DROPS[drop]
    step, params, state = start(clip, wrap)
    same, after = step(params, state, FIRST_SCALE)
    chex.assert_trees_all_equal(bits((same, inner(after))), bits((params, inner(state))))
    moved, _ = step(same, after, 2.0**10)
    assert all((moved[name] != params[name]).any() for name in params)


@every
def test_overflowing_step_that_is_not_dropped_is_loud(clip):
    """Where some entries overflow, all of their blocks becomes NaN, in the parameters too; rules keep their state."""
    step, params, state = start(clip)
    head = np.abs(f16_gradients(params, 1.0, X[0], Y[0])["head"])
    scale = float(jnp.finfo(jnp.float16).max / np.median(head))
    grads = f16_gradients(params, scale, X[0], Y[0])
    assert 0 < np.isfinite(grads["head"]).mean() < 1
    after, new = step(params, state, scale)
    norms = NORMS[clip](grads)
    for name, norm in (norms if isinstance(norms, dict) else dict.fromkeys(grads, norms)).items():
        bad = np.broadcast_to(~np.isfinite(norm), grads[name].shape)
        chex.assert_trees_all_equal(np.isnan(after[name]), bad)
    chex.assert_trees_all_equal(new[0].rule, state[0].rule)


def test_apply_if_finite_gives_up():
    """After n overflows in a row `apply_if_finite` lets the next one through, and `skip_spikes` never does."""
    for drop, finite in (("apply_if_finite", False), ("skip_spikes", True)):
        step, params, state = start("clip_by_global_norm", DROPS[drop][0])
        for _ in range(4):
            params, state = step(params, state, FIRST_SCALE)
        assert bool(np.isfinite(params["w"]).all()) == finite


@pytest.mark.parametrize("clip", FIXED)
def test_clip_before_unscaling_is_too_strict_by_the_scale(clip):
    """On scaled gradients a threshold is too small by the scale: what is left of them too."""
    scale, params = 2.0**10, weights()
    scaled = jax.tree.map(lambda x: 100 * scale * x + scale, params)  # all blocks are above their thresholds
    unscale = optax.scale(1 / scale)
    late, early = (optax.chain(*pair) for pair in ((CLIPS[clip](), unscale), (unscale, CLIPS[clip]())))
    late, early = (jax.jit(tx.update)(scaled, tx.init(params), params)[0] for tx in (late, early))
    chex.assert_trees_all_close(optax.tree.scale(scale, late), early, rtol=1e-5)
    assert trees.norm64(early) > 0.02


def test_rule_before_unscaling_takes_a_new_scale_for_a_spike():
    """Where the scale doubles and gradients do not change, `zclip` clips before unscaling, and not after it."""
    norms = 1 + 0.01 * jax.random.normal(jax.random.key(0), (40,))
    scales = jnp.where(jnp.arange(40) < 30, 1.0, 2.0)
    rate = lambda seen: oc.replay(oc.zclip(5.0), seen).clipped.mean()
    assert rate(np.asarray(norms)) == 0
    assert rate(np.asarray(norms * scales)) > 0


# Casts


@every
@pytest.mark.parametrize("precision", LOW)
def test_clip_before_a_cast_rounds_once(clip, precision):
    """Clipped as they are, gradients keep their dtypes, and differ by one rounding from those clipped in f32."""
    params = weights()
    grads = jax.jit(jax.grad(loss))(COMPUTE[precision](params), X[0], 10 * Y[0])
    tx = CLIPS[clip]()
    state = tx.init(params)
    update = jax.jit(tx.update)
    for _ in range(5):  # small norms, for zclip to know that what follows is a spike
        _, state = update(optax.tree.scale(1 / 30, grads), state, params)
    clipped, low = update(grads, state, params)
    expected, high = update(optax.tree.cast(grads, jnp.float32), state, params)
    chex.assert_trees_all_equal_dtypes(clipped, grads)
    chex.assert_trees_all_close(low, high, rtol=1e-6)
    assert low.norm == pytest.approx(trees.norm64(grads), rel=1e-5)
    assert trees.norm64(clipped) < 0.9 * trees.norm64(grads)
    rounded = jax.tree.map(lambda e, g: e.astype(g.dtype), expected, grads)
    # Norms may differ in the last bit of f32, which moves few entries to the other neighbor.
    same = jax.tree.map(lambda c, r: np.isclose(np.float32(c), np.float32(r), rtol=1e-6).mean(), clipped, rounded)
    assert min(same.values()) > 0.9

"""`thresholds.tracked_quantile`: a percentile of the norms with one number for each block."""

import functools
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from trees import step

import optax_clip as oc
from optax_clip import thresholds

full = pytest.mark.full
STEPS, WARM = 25_000, 5_000
NORMS = {
    "log-normal": lambda random, n: np.exp(0.5 * random.normal(size=n)),
    "wide log-normal": lambda random, n: np.exp(2 * random.normal(size=n)),
    "chi": lambda random, n: np.sqrt(random.chisquare(3, size=n)),
    "uniform": lambda random, n: random.uniform(size=n),
    "Cauchy": lambda random, n: np.abs(random.standard_cauchy(size=n)),
    "Pareto": lambda random, n: 1 + random.pareto(0.5, size=n),
    "drifting": lambda random, n: np.exp(0.5 * random.normal(size=n) - np.log(10) * np.arange(n) / n),
    "correlated": lambda random, n: np.exp(
        0.1 * np.convolve(random.normal(size=2 * n), 0.99 ** np.arange(500))[n:][:n]
    ),
}


@functools.partial(jax.jit, static_argnums=0)
def scan(tx, norms):
    """Whether each norm was clipped, and the level after each step."""

    def one(level, n):
        _, state = tx.update(n[None], level)
        return state, (state.clipped, state.rule)

    return jax.lax.scan(one, tx.init(norms[:1]), norms)[1]


@functools.lru_cache
def clip(percentile=90.0, rate=0.05):
    return oc.clip_by_norm(oc.global_norm, thresholds.tracked_quantile(percentile, rate))


def test_golden_number():
    """One step below the level multiplies it by exp(-rate · (1 - q)); half of the norms on each side leave it."""
    _, state = step(clip(50.0, 0.2), jnp.ones(1))
    np.testing.assert_allclose(state.rule, 0.904837, rtol=1e-6)
    _, levels = scan(clip(50.0, 0.2), jnp.array([1.0, 2.0, 0.5, 3.0, 0.1]))
    np.testing.assert_allclose(levels[-1], 0.904837, rtol=1e-6)


@pytest.mark.parametrize("percentile", [50.0, 90.0, 99.0])
@pytest.mark.parametrize("kind", [pytest.param(kind, marks=[full] * (kind != "log-normal")) for kind in NORMS])
def test_the_share_clipped_is_the_one_wanted(kind, percentile):
    """Over 20,000 norms after the first 5,000, the share clipped is within half a percentage point, at rate 0.05."""
    for seed in (0, 1):
        norms = jnp.asarray(NORMS[kind](np.random.default_rng(seed), STEPS), jnp.float32)
        clipped, levels = scan(clip(percentile), norms)
        share = float(clipped[WARM:].mean())
        np.testing.assert_allclose(share, 1 - percentile / 100, rtol=0, atol=0.005)
        moved = math.log(levels[WARM - 1] / levels[-1]) / (0.05 * (STEPS - WARM))
        np.testing.assert_allclose(share - (1 - percentile / 100), -moved, rtol=0, atol=1e-4)


def test_each_block_follows_the_reference():
    """At the scope of units, each unit has the levels of the rule in float64, also where some norms are 0."""
    random = np.random.default_rng(3)
    norms = np.float32(np.exp(random.normal(size=(200, 4))) * (random.uniform(size=(200, 4)) < 0.9))
    norms[:5, 0] = 0.0
    tx = oc.clip_by_norm(functools.partial(oc.unit_norm, axis=0), thresholds.tracked_quantile(75.0, 0.1))
    state = tx.init(jnp.zeros((1, 4)))
    rule = reference.EachBlock(4, lambda: reference.TrackedQuantile(75.0, 0.1))
    for n in norms:
        updates, state = step(tx, jnp.asarray(n[None]), state)
        np.testing.assert_allclose(updates[0], np.minimum(n, rule(n)), rtol=1e-4)
        assert state.rule.shape == (1, 4) and state.rule.dtype == jnp.float32


def test_slow_from_above_and_fast_from_below():
    """From 10 times too high the level needs log(10) / (rate · (1 - q)) steps, and nothing is clipped till then."""
    clipped, levels = scan(clip(), jnp.full(600, 1.0).at[0].set(10.0))
    assert abs(int(np.argmax(levels <= 1.0)) - 461) <= 1 and not clipped[:460].any()
    _, levels = scan(clip(), jnp.full(600, 1.0).at[0].set(0.1))
    assert abs(int(np.argmax(levels >= 1.0)) - 51) <= 1


def test_zeros_do_not_hold_the_level():
    """While all norms were 0 the level waits for the first that is not, which is not clipped; later zeros are norms."""
    clipped, levels = scan(clip(50.0, 0.2), jnp.array([0.0, 0.0, 4.0, 0.0, 4.0]))
    np.testing.assert_allclose(levels, [0, 0, 4 * 0.904837, 4 * 0.904837**2, 4 * 0.904837], rtol=1e-5)
    chex.assert_trees_all_equal(clipped, jnp.array([0.0, 0.0, 0.0, 0.0, 1.0]))
    _, levels = scan(clip(0.0, 1.0), jnp.zeros(200).at[0].set(1.0).at[150].set(3.0))
    assert levels[140] == 0 and 0 < levels[150] <= 3  # it has left the range of f32, and starts anew


def test_no_level_is_for_ever():
    """After the largest norms of f32 the level is finite and comes down, and bad norms leave no trace."""
    _, levels = scan(clip(90.0, 1.0), jnp.array([3e38, 3.3e38, 1.0, jnp.nan, jnp.inf, 1.0]))
    assert np.isfinite(levels).all() and levels[1] > 3.3e38 and levels[-1] < 3e38
    assert levels[2] == levels[3] == levels[4]


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_levels_are_f32(dtype):
    """The level of leaves in low precision is f32, which a step of 0.05 % does not round away."""
    state = None
    for size in (0.5, 0.25, 0.25):
        out, state = step(clip(99.0), jnp.full(4, size, dtype), state)
        assert state.rule.dtype == jnp.float32 and out.dtype == dtype
    np.testing.assert_allclose(state.rule, math.exp(-3 * 0.05 * 0.01), rtol=1e-6)


@pytest.mark.parametrize(
    ("options", "kind", "text"),
    [
        ({"percentile": 101.0}, ValueError, "percentile must be <= 100, got 101"),
        ({"percentile": float("nan")}, ValueError, "percentile must be a number, got nan"),
        ({"rate": -0.1}, ValueError, "rate must be >= 0, got -0.1"),
        ({"rate": 2.0}, ValueError, "rate must be <= 1, got 2"),
        ({"rate": "a"}, TypeError, "rate must be a number or a scalar array, got str 'a'"),
    ],
)
def test_errors(options, kind, text):
    """What is out of range raises where the rule is made, with the argument first."""
    with pytest.raises(kind, match=f"^{text}"):
        thresholds.tracked_quantile(**options)

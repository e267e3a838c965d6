"""What `replay` says a clip would have done, and which threshold `suggest_threshold` starts with."""

import gc
import weakref

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from trees import step

import optax_clip as oc
from optax_clip import thresholds

NAN, INF = float("nan"), float("inf")
NORMS = [1.0, 1.2, 0.9, 30.0, NAN, 1.1, INF, 0.0, 1.3, 40.0, 1.0]
CLIPS = {
    "fixed": oc.clip_by_global_norm(1.1),
    "schedule": oc.clip_by_global_norm(optax.linear_schedule(2.0, 0.5, 8)),
    "range": oc.clip_by_norm_range(1.05, 1.25),
    "zclip": oc.zclip(2.5, 0.5, 3),
    "leaf": oc.adagc(1.05, 0.9, 0.9, 2),
    "sigma": oc.clip_by_sigma(1.0, window=4),
}

# Replay


@pytest.mark.parametrize("name", CLIPS)
def test_replay_is_what_the_clip_does(name):
    """Norm, threshold and scale are those of the state after each step, and clipped is where the scale says so."""
    seen = oc.replay(CLIPS[name], NORMS)
    state, states = CLIPS[name].init(jnp.float32(0.0)), []
    for norm in NORMS:
        _, state = step(CLIPS[name], jnp.float32(norm), state)
        states.append(state)
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *states)
    has_one = np.asarray(stacked.threshold) != np.finfo(np.float32).max
    chex.assert_trees_all_close(seen.norm, jnp.float32(jnp.array(NORMS)))
    chex.assert_trees_all_close(seen.threshold, jnp.where(has_one, stacked.threshold, jnp.inf), rtol=1e-6)
    chex.assert_trees_all_close(seen.scale, stacked.clip_scale, rtol=1e-6)
    chex.assert_trees_all_close(seen.clipped, stacked.clipped > 0)
    chex.assert_trees_all_close(seen.clipped, np.isfinite(NORMS) & (seen.norm > seen.threshold))


def test_replay_by_hand():
    """Each entry is checked by hand, the dtypes too."""
    seen = oc.replay(oc.clip_by_global_norm(2.0), [1.0, 4.0, NAN])
    expected = ([1.0, 4.0, NAN], [2.0, 2.0, 2.0], [1.0, 0.5, NAN])
    chex.assert_trees_all_close(seen[:3], jax.tree.map(jnp.float32, tuple(map(jnp.array, expected))))
    chex.assert_trees_all_equal(seen.clipped, jnp.array([False, True, False]))
    chex.assert_trees_all_equal_dtypes(seen[:3], (jnp.float32(0),) * 3)


def test_a_clip_without_a_threshold_has_an_infinite_one():
    """In the steps in which a clip cannot clip, its threshold is inf and its scale 1."""
    seen = oc.replay(oc.clip_by_global_norm(None), [1.0, 3e38])
    chex.assert_trees_all_equal(seen.threshold, jnp.array([INF, INF]))
    chex.assert_trees_all_equal(seen.scale, jnp.ones(2))
    warming = oc.replay(oc.zclip(warmup_steps=3), [1.0] * 5).threshold
    chex.assert_trees_all_equal(jnp.isinf(warming), jnp.arange(5) < 3)


def test_norms_of_any_length_and_kind():
    """Norms may be none, one, a list, or an array of any real dtype; above the largest f32 they are inf."""
    assert oc.replay(CLIPS["fixed"], []).norm.shape == (0,)
    for norms in ([2], np.array([2], np.int8), jnp.array([2.0], jnp.bfloat16)):
        chex.assert_trees_all_close(oc.replay(CLIPS["fixed"], norms).scale, jnp.array([0.55]))
    assert oc.replay(CLIPS["fixed"], [1e300]).norm[0] == INF


def test_replay_keeps_nothing():
    """What a clip was made of is gone with the clip, and so is the program that ran it."""

    def norm(updates):
        return oc.global_norm(updates)

    clip, gone = oc.clip_by_norm(norm, 1.0), weakref.ref(norm)
    oc.replay(clip, NORMS)
    del clip, norm
    gc.collect()
    assert gone() is None


def test_thresholds_share_a_program_under_vmap():
    """A sweep over thresholds under `vmap` traces the clip as often as a single replay does."""
    traced = []

    def norm(updates):
        traced.append(1)
        return oc.global_norm(updates)

    oc.replay(oc.clip_by_norm(norm, 1.0), NORMS)
    single = len(traced)
    bounds = jnp.array([0.0, 0.95, 1.25, 35.0, 50.0])
    clipped = jax.vmap(lambda bound: oc.replay(oc.clip_by_norm(norm, bound), NORMS).clipped.sum())(bounds)
    chex.assert_trees_all_equal(clipped, jnp.array([8, 7, 3, 1, 0]))
    assert len(traced) == 2 * single


BAD = {
    "function": (oc.zclip, TypeError, "clip must be an Optax transformation, got function"),
    "entries": (
        oc.clip(1.0),
        ValueError,
        "clip must be a norm clip with one threshold.*it has the state ValueClipState",
    ),
    "chain": (optax.chain(oc.zclip()), ValueError, "clip must be a norm clip.*it has the state tuple"),
    "params": (
        oc.clip_by_norm(oc.global_norm, thresholds.param_fraction(0.1)),
        ValueError,
        "clip must.*params are missing",
    ),
    "units": (oc.adaptive_grad_clip(0.1), ValueError, "clip must be a norm clip with one threshold"),
    "tree": (oc.clip_by_leaf_norm({"a": 1.0}), ValueError, "clip must be a norm clip with one threshold"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_replayed(case):
    """What is no norm clip with one threshold is refused, with what it is."""
    clip, error, text = BAD[case]
    with pytest.raises(error, match=rf"^{text}.*\. \w.*\.$"):
        oc.replay(clip, NORMS)


BAD_NORMS = {
    "matrix": ([[1.0]], ValueError, r"norms must be a vector with one entry for each step, got .* \(1, 1\)"),
    "negative": ([0.0, -1.0], ValueError, "norms must be >= 0, got -1 at step 1"),
    "text": (["a"], TypeError, "norms must be real numbers, got dtype <U1"),
}


@pytest.mark.parametrize(
    "call", [lambda x: oc.replay(CLIPS["fixed"], x), oc.suggest_threshold], ids=["replay", "suggest"]
)
@pytest.mark.parametrize("case", BAD_NORMS)
def test_norms_that_are_none(call, case):
    """Norms that are no vector of real numbers >= 0 are refused alike."""
    norms, error, text = BAD_NORMS[case]
    with pytest.raises(error, match=rf"^{text}.*\. \w.*\.$"):
        call(norms)


# Suggestions


def test_the_threshold_is_the_largest_norm_within_the_fence():
    """The threshold leaves the bulk alone, and the candidates are percentiles with the share above each."""
    values = np.append(np.random.default_rng(0).lognormal(0.0, 0.3, 500), [20.0, 30.0, NAN, INF])
    finite = values[np.isfinite(values)]
    low, high = np.percentile(np.log(finite), [25, 75])
    found = oc.suggest_threshold(values)
    assert found.threshold == finite[np.log(finite) <= high + 1.5 * (high - low)].max()
    assert found.clip_rate == np.mean(finite > found.threshold)
    np.testing.assert_allclose(found.candidates, np.percentile(finite, [50, 75, 90, 95, 99, 99.9]))
    np.testing.assert_allclose(found.clip_rates, [np.mean(finite > bound) for bound in found.candidates])


@pytest.mark.parametrize("norms", [[2.0], [2.0] * 9, [0.0, 0.0, 2.0], [1e-300, 2.0]], ids=str)
def test_without_outliers_the_threshold_is_the_largest_norm(norms):
    """Equal norms, a single one and zeros have no outlier."""
    found = oc.suggest_threshold(norms)
    assert (found.threshold, found.clip_rate) == (2.0, 0.0)


def test_what_a_suggestion_rests_on():
    """Fewer than a hundred norms above 0 are few, and norms drift if their median moves by more than half."""
    basis = lambda values: oc.suggest_threshold(values).basis
    sample = np.random.default_rng(0).uniform(0.9, 1.1, 200)
    assert basis([*sample[:90], *np.zeros(60)]).endswith("Few to go by.")
    assert "Few" not in basis([*sample[:100], *np.zeros(60)])
    assert basis([*sample, np.inf]).startswith("Rests on 200 finite norms of 201, 0 above the bulk, which ends at 1.1.")
    for growth, drifts in ((1.4, False), (1.7, True), (1 / 1.7, True)):
        assert ("The norms drift" in basis([*sample, *sample * growth])) == drifts
    assert " is 1.7 times that of the first." in basis([*20 * sample, *34 * sample])


@pytest.mark.parametrize("norms", [[], [0.0, NAN], [INF]], ids=str)
def test_a_suggestion_needs_a_norm(norms):
    """Without a finite norm above 0 there is nothing to suggest."""
    text = rf"^norms must hold a finite number above 0, got none among {len(norms)}\. Record them with"
    with pytest.raises(ValueError, match=text):
        oc.suggest_threshold(norms)


@pytest.mark.parametrize("dtype", ["bfloat16", "float8_e4m3fn", "int8"])
def test_norms_of_few_bits(dtype):
    """Norms may be of any dtype of real numbers."""
    norms = [1.0, 2.0, 3.0, 44.0]
    found, expected = oc.suggest_threshold(jnp.array(norms, dtype)), oc.suggest_threshold(norms)
    chex.assert_trees_all_equal(found[:-1], expected[:-1])

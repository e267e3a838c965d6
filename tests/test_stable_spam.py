"""`stable_spam`: large entries against the tracked maximum, then the norm against its own moments."""

import functools
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
from jax.sharding import PartitionSpec as P
from trees import mesh, norm64, odd, scan, small, step, tolerance

import optax_clip as oc
from optax_clip.clips.stable_spam import StableSpamState

CLOSE = tolerance(jnp.float32)
full = pytest.mark.full
SPAM = oc.stable_spam()
ALONE = oc.stable_spam(decay_max=0.0)  # T is the present maximum, so that no entry is above it


def run(tx, samples, state=None):
    """The updates of all steps and the last state."""
    out = []
    for updates in samples:
        updates, state = step(tx, updates, state)
        out.append(updates)
    return out, state


def test_golden_numbers_of_the_second_clip():
    """Norms 2, 3, 1, 50, 2 come out of the clip of the norm with the published rule's numbers."""
    out, _ = run(ALONE, [jnp.array([g]) for g in (2.0, 3.0, 1.0, 50.0, 2.0)])
    np.testing.assert_allclose(jnp.concatenate(out), [1, 1.00507, 0.87306, 0.77222, 0.59812], rtol=1e-5)


@pytest.mark.parametrize("numbers", [(0.999, 0.7, 0.9, 1e-8), pytest.param((0.9, 0.0, 0.5, 1e-3), marks=full)], ids=str)
def test_200_steps_are_those_of_the_reference(numbers):
    """Updates are those of the rule in float64, leaf by leaf, over 200 steps with spikes of entries and of leaves."""
    random = np.random.default_rng(1)
    spikes = np.where(random.uniform(size=200) < 0.05, 100.0, 1.0) * np.exp(random.normal(size=200))
    samples = [small(i, size) for i, size in enumerate(spikes)]
    samples = [x | {"dense": x["dense"].at[1, 2].multiply(50.0 if i % 7 == 6 else 1.0)} for i, x in enumerate(samples)]
    rule = reference.StableSpam(*numbers)
    expected = [rule(sample) for sample in samples]
    stack = lambda trees: {name: np.stack([np.asarray(tree[name]) for tree in trees]) for name in trees[0]}
    out, states = scan(oc.stable_spam(*numbers), stack(samples))
    chex.assert_trees_all_close(out, stack(expected), rtol=1e-4, atol=1e-6)
    assert 0 < states.entry_clip.clipped.mean() < 1


def test_entries_above_the_tracked_maximum_are_scaled():
    """Entries above T are multiplied by T / max, so that they keep their order, but may fall below those that stay."""
    calm, spiky = {"w": jnp.array([1.0, -1.0, 0.5, 0.0])}, {"w": jnp.array([4.0, -8.0, 5.0, 0.0])}
    tx = oc.stable_spam(0.9)
    _, state = step(tx, calm)
    clipped, state = step(tx, spiky, state)
    limit = (0.1 * 0.9 * 1 + 0.1 * 8) / 0.19
    before = np.array([4, -limit, 5 * limit / 8, 0])
    np.testing.assert_allclose(clipped["w"] / jnp.linalg.norm(clipped["w"]), before / np.linalg.norm(before), rtol=1e-6)
    np.testing.assert_allclose(state.entry_clip.norm, 8.0)
    np.testing.assert_allclose(
        [state.entry_clip.threshold, state.norm_clip.norm], [limit, np.linalg.norm(before)], 1e-6
    )
    assert abs(clipped["w"][2]) < clipped["w"][0]


def test_metrics_are_those_of_two_clips():
    """`clip_metrics` has the clip of entries first, and the clip of norms under its own name."""
    _, state = step(optax.chain(SPAM, optax.adam(1e-3)), small(0))
    metrics = oc.clip_metrics(state)
    assert {"clip/norm", "clip/clipped", "clip/0/norm_clip/norm", "clip/0/norm_clip/scale"} <= metrics.keys()
    largest = [float(jnp.max(jnp.abs(x))) for x in small(0).values()]
    np.testing.assert_allclose(metrics["clip/norm"], np.sqrt(np.sum(np.square(largest))), rtol=1e-6)
    assert optax.tree.get(state, "count") == 1


def after_spike(at: int, spike: float, steps: int) -> np.ndarray:
    """Sizes of the updates of a leaf whose gradient is always 1, but for one spike, from the spike on."""
    gradients = np.ones((at + steps, 1), np.float32)
    gradients[at] = spike
    out, states = scan(SPAM, jnp.asarray(gradients))
    return np.asarray(out[at:, 0]), np.asarray(states.entry_clip.threshold[at:])


@pytest.mark.parametrize(
    ("spike", "lowest", "still"),
    [(1e4, 0.456, 13), (1e6, 1.068e-2, 99), pytest.param(1e10, 4.17e-6, 274, marks=full)],
    ids=["1e4", "1e6", "1e10"],
)
def test_a_single_spike_is_divided_by_a_thousand_and_the_leaf_stands_still_after_it(spike, lowest, still):
    """Late in a run a spike is divided by about 1000; then updates fall to `lowest` and take `still` steps to 0.5."""
    out, limits = after_spike(3000, spike, 400)
    assert 850 < spike / limits[0] < 1000
    np.testing.assert_allclose(out[1:].min(), lowest, rtol=1e-2)
    low = int(out[1:].argmin())
    assert abs(low + int(np.argmax(out[1 + low :] > 0.5)) - still) <= 1


@full
def test_the_largest_spike_leaves_updates_finite():
    """After a spike of 1e30 updates are tiny but finite, and they come back after some 1150 steps."""
    out, limits = after_spike(3000, 1e30, 1300)
    assert np.isfinite(out).all() and np.isfinite(limits).all()
    assert out[300] < 1e-14 and out[1000] < 1e-2 and out[-1] > 0.9


def test_skip_spikes_keeps_the_spike_out():
    """Around the optimizer, `skip_spikes` leaves the statistics as if there had been no spike."""
    optimizer = oc.skip_spikes(optax.chain(SPAM, optax.adam(1e-3)), 100.0)
    calm = [{"w": jnp.array([1.0, 0.5])}] * 4
    expected, _ = run(optimizer, calm)
    out, _ = run(optimizer, [*calm[:2], {"w": jnp.array([1e6, 1.0])}, *calm[2:]])
    assert not out[2]["w"].any()
    chex.assert_trees_all_equal(out[:2] + out[3:], expected)


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf, -jnp.inf])
def test_bad_leaves_become_nan_and_leave_no_trace(bad):
    """A leaf with a NaN or inf is NaN throughout, its statistics stay as they were, and other leaves do not notice."""
    samples = [small(i) for i in range(5)]
    broken = samples[2] | {"dense": samples[2]["dense"].at[0, 1].set(bad)}
    out, _ = run(SPAM, [*samples[:2], broken, *samples[3:]])
    without, _ = run(SPAM, [*samples[:2], *samples[3:]])
    expected, _ = run(SPAM, samples)
    assert np.isnan(out[2]["dense"]).all()
    of = lambda steps, *names: [{name: updates[name] for name in names} for updates in steps]
    chex.assert_trees_all_equal(of(out, "bias", "scale"), of(expected, "bias", "scale"))
    chex.assert_trees_all_equal(of(out[:2] + out[3:], "dense"), of(without, "dense"))


def test_bad_first_steps_leave_no_trace():
    """Debiasing counts the steps of each leaf that were finite."""
    out, _ = run(SPAM, [jnp.array([jnp.nan]), jnp.array([2.0]), jnp.array([3.0])])
    expected, _ = run(SPAM, [jnp.array([2.0]), jnp.array([3.0])])
    chex.assert_trees_all_equal(out[1:], expected)


def test_zeros_stay_zeros():
    """A leaf of zeros stays 0, and the next step moves."""
    out, _ = run(SPAM, [jnp.zeros(3), jnp.ones(3), jnp.zeros(3)])
    chex.assert_trees_all_equal((out[0], out[2]), (jnp.zeros(3), jnp.zeros(3)))
    assert out[1].all()


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.complex64, jnp.float8_e4m3fn])
def test_dtypes(dtype):
    """Leaves keep their dtype, and come out with a norm of 1 in the first step."""
    updates, _ = step(SPAM, {"w": jnp.asarray([0.5, 1.5, -2.0, 0.25], dtype)})
    assert updates["w"].dtype == dtype
    wide = jax.tree.map(lambda x: x.astype(jnp.complex64), updates)
    np.testing.assert_allclose(norm64(wide), 1.0, rtol=8 * float(jnp.finfo(dtype).eps))


def test_other_leaves_are_left_alone():
    """Leaves without a norm come back as they are, and MaskedNodes and None keep their place."""
    updates = odd()
    out, state = SPAM.update(updates, SPAM.init(updates))
    chex.assert_trees_all_equal_structs(out, updates)
    np.testing.assert_allclose(out["weight"], [0.6, 0.8], rtol=1e-6)
    assert state.entry_clip.rule.mean == 4.0


@pytest.mark.parametrize("typed", [True, pytest.param(False, marks=full)])
def test_shard_map_is_one_device(typed):
    """Inside `shard_map` maxima and norms are those of whole leaves, by the types of leaves or by `axis_name`."""
    tree = {"w": np.float32(np.random.default_rng(0).normal(size=(16, 3))), "b": np.float32([0.3, -2.0, 1.0])}
    specs = {"w": P("data"), "b": P()}

    def two_steps(tx, updates):
        first, state = tx.update(updates, tx.init(updates))
        return first, tx.update(jax.tree.map(lambda x: 9 * x * x * x, updates), state)[0]

    def on_mesh(axis_name):
        there = functools.partial(two_steps, oc.stable_spam(0.9, axis_name=axis_name))
        return jax.shard_map(there, mesh=mesh(data=8), in_specs=(specs,), out_specs=(specs, specs), check_vma=typed)

    actual = jax.jit(on_mesh(None if typed else {"w": "data", "b": ()}))(tree)
    chex.assert_trees_all_close(actual, jax.jit(functools.partial(two_steps, oc.stable_spam(0.9)))(tree), rtol=1e-5)
    if not typed:
        with pytest.raises(ValueError, match=r"^axis_name is missing"):
            jax.eval_shape(on_mesh(None), tree)


@pytest.mark.parametrize("decay", [0.0, 1.0])
def test_decays_may_be_0_and_1(decay):
    """Decay 0 forgets all but the present step, so norms come out at 1; decay 1 gives plain averages."""
    samples = [jnp.array([g]) for g in (2.0, 3.0, 1.0)]
    out, _ = run(oc.stable_spam(decay, decay, decay, 0.0), samples)
    plain = [1, 2.25 / math.sqrt(10.25 / 2), 5.5 / 3 / math.sqrt(11.25 / 3)]  # norms are 2, 2.5, 1: 3 becomes T = 2.5
    np.testing.assert_allclose(jnp.concatenate(out), plain if decay else [1, 1, 1], rtol=1e-5)


def test_decay_0_forgets_a_spike_at_once():
    """With decay 0 a step after a spike comes out as without the spike."""
    out, _ = run(oc.stable_spam(0.0, 0.0, 0.0), [jnp.array(g) for g in ([1.0, 1.0], [1e20, 1.0], [1.0, 1.0])])
    np.testing.assert_allclose(out[2], [math.sqrt(0.5)] * 2, rtol=1e-6)


def test_python_numbers_are_leaves():
    """A Python number is scaled like an array."""
    out, _ = SPAM.update({"a": 2.0}, SPAM.init({"a": 2.0}))
    np.testing.assert_allclose(out["a"], 1.0, rtol=1e-6)


@pytest.mark.parametrize(
    ("options", "kind", "text"),
    [
        ({"decay_max": 1.5}, ValueError, "decay_max must be <= 1, got 1.5"),
        ({"decay_mean": -0.1}, ValueError, "decay_mean must be >= 0, got -0.1"),
        ({"decay_square": "a"}, TypeError, "decay_square must be a number or a scalar array, got str 'a'"),
        ({"eps": float("nan")}, ValueError, "eps must be a number, got nan"),
    ],
)
def test_errors(options, kind, text):
    """What is out of range raises where the transformation is made, with the argument first."""
    with pytest.raises(kind, match=f"^{text}"):
        oc.stable_spam(**options)


def test_states_of_others_are_refused():
    """A state of other parameters, or of a clip alone, is an error."""
    _, state = step(SPAM, small(0))
    assert isinstance(state, StableSpamState)
    with pytest.raises(ValueError, match=r"^state must hold a history"):
        SPAM.update({"w": jnp.ones(2)}, state)
    with pytest.raises(TypeError, match=r"^state must be a StableSpamState, got ClipState"):
        SPAM.update(small(0), state.norm_clip)

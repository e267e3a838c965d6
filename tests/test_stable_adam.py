"""`scale_by_stable_adam`: Adam's moments bit for bit, and the step of each leaf scaled by its rms of g / √v̂."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from trees import mesh, mixed, scan, small, step, tolerance

import optax_clip as oc
from optax_clip import thresholds
from optax_clip.optimizers import StableAdamState

CLOSE = tolerance(jnp.float32)
full = pytest.mark.full
ADAM, STABLE = optax.scale_by_adam(), oc.scale_by_stable_adam()
SPIKES = [small(i, 50.0 if i == 6 else 1.0) for i in range(9)]


def run(tx, samples, params=None, state=None, step=step):
    """The updates of all steps and the last state."""
    out = []
    for updates in samples:
        updates, state = step(tx, updates, state, samples[0] if params is None else params)
        out.append(updates)
    return out, state


def test_golden_numbers():
    """StableAdamW without weight decay gives the published rule's numbers for the rms and the parameters."""
    gradients = [(1.0, 2.0), (0.5, -1.0), (-1.0, 1.0), (20.0, -30.0), (1.0, 1.0)]
    rms = [1.0, 0.633411, 0.958081, 1.979108, 0.094171]
    landing = [(0.9, 0.9), (0.8066552, 0.87333006), (0.79557696, 0.82833796)]
    landing += [(0.7661513, 0.85590897), (0.71417176, 0.90030506)]
    optimizer = optax.chain(oc.scale_by_stable_adam(0.9, 0.99), optax.scale_by_learning_rate(0.1))
    params, state = jnp.ones(2), None
    for gradient, expected_rms, expected in zip(gradients, rms, landing):
        updates, state = step(optimizer, jnp.array(gradient), state, params)
        params = optax.apply_updates(params, updates)
        np.testing.assert_allclose(state[0].measured.norm, expected_rms, rtol=1e-5)
        np.testing.assert_allclose(params, expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("numbers", "max_rms"), [((0.9, 0.999, 1e-8), 1.0), pytest.param((0.8, 0.95, 1e-2), 0.3, marks=full)]
)
def test_200_steps_are_those_of_the_reference(numbers, max_rms):
    """Steps and rms are those of the rule in float64, over 200 steps with spikes."""
    random = np.random.default_rng(1)
    sizes = np.exp(random.normal(size=200)) * np.where(random.uniform(size=200) < 0.05, 100.0, 1.0)
    samples = [small(i, size) for i, size in enumerate(sizes)]
    tx, rule = oc.scale_by_stable_adam(*numbers, max_rms=max_rms), reference.StableAdam(*numbers, max_rms)
    steps, states = scan(tx, jax.tree.map(lambda *leaves: jnp.stack(leaves), *samples))
    clipped = 0
    for i, sample in enumerate(samples):
        expected = rule(sample)
        chex.assert_trees_all_close({k: x[i] for k, x in steps.items()}, expected, rtol=2e-4, atol=2e-5)
        over = [rms > max_rms for rms in rule.rms.values()]
        clipped += sum(over)
        total = np.sqrt(sum(rms**2 for rms in rule.rms.values()))
        np.testing.assert_allclose(states.measured.norm[i], total, rtol=1e-4)
        if i:
            np.testing.assert_allclose(states.measured.clipped[i], np.mean(over), rtol=1e-6)
    assert clipped > 20


@pytest.mark.parametrize(
    "options",
    [{}, pytest.param({"nesterov": True, "eps_root": 1e-6, "mu_dtype": jnp.bfloat16}, marks=full)],
    ids=["defaults", "options"],
)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_moments_are_those_of_adam_bit_for_bit(options, dtype):
    """Moments, count and dtypes are those of `optax.scale_by_adam`, and so are the steps of leaves below `max_rms`."""
    samples = [jax.tree.map(lambda x: x.astype(dtype), sample) for sample in SPIKES]
    adam, stable = (make(0.9, 0.95, **options) for make in (optax.scale_by_adam, oc.scale_by_stable_adam))
    moments = state = None
    same = []
    for updates in samples:
        expected, moments = step(adam, updates, moments)
        steps, state = step(stable, updates, state)
        chex.assert_trees_all_equal_shapes_and_dtypes((steps, state.adam), (expected, moments))
        chex.assert_trees_all_equal(state.adam, moments)
        if state.measured.clipped == 0:
            chex.assert_trees_all_equal(steps, expected)
        same.append(state.measured.clipped == 0)
    assert any(same) and not all(same)


def test_a_spike_steps_less_than_with_a_clip_after_adam():
    """On a spike of 50 times the step is half of that of Adam and a clip of its block RMS, which sees no spike."""
    normal = [{"w": jnp.asarray(np.random.default_rng(i).normal(size=1000), jnp.float32)} for i in range(60)]
    spike = {"w": 50 * normal[0]["w"]}
    after = optax.chain(optax.scale_by_adam(), oc.clip_by_block_rms(1.0))
    size = {}
    for tx in (STABLE, after, ADAM):
        steps, _ = run(tx, [*normal, spike])
        size[tx] = float(oc.block_rms(steps[-1])["w"])
    assert size[STABLE] < 0.5 * size[after] and size[after] <= size[ADAM]


def test_a_new_row_of_an_embedding_slows_all_rows():
    """A row that is seen for the first time after 300 steps raises the rms of its leaf, so all rows step less."""
    gradient = jnp.ones((100, 8)).at[0].set(0.0)
    state = None
    for _ in range(300):
        _, state = step(STABLE, {"embedding": gradient}, state)
    expected, _ = step(ADAM, {"embedding": jnp.ones((100, 8))}, state.adam)
    steps, state = step(STABLE, {"embedding": jnp.ones((100, 8))}, state)
    np.testing.assert_allclose(state.measured.norm, 1.9, atol=0.05)
    np.testing.assert_allclose(steps["embedding"], expected["embedding"] * state.measured.clip_scale, rtol=1e-5)
    np.testing.assert_allclose(state.measured.clip_scale, 0.53, atol=0.01)


def test_optax_finds_the_moments_and_the_metrics_are_those_of_a_clip():
    """`optax.tree.get` finds count, mu and nu; `clip_metrics` has the rms as norm; `map_params` finds the moments."""
    optimizer = optax.chain(STABLE, optax.add_decayed_weights(0.1), optax.scale_by_learning_rate(1e-3))
    params = small(9)
    _, state = step(optimizer, SPIKES[0], params=params)
    chex.assert_trees_all_equal(optax.tree.get(state, "nu"), state[0].adam.nu)
    assert optax.tree.get(state, "count") == 1
    assert oc.clip_metrics(state).keys() == {
        f"clip/{n}" for n in ("norm", "threshold", "scale", "clipped", "clip_rate")
    }
    on = NamedSharding(mesh(data=4), P())
    mapped = optax.tree.map_params(optimizer, lambda x, place: place, state, jax.tree.map(lambda x: on, params))
    assert jax.tree.leaves(mapped[0].adam.nu) == [on] * 3 and mapped[0].measured == state[0].measured


def test_a_run_goes_on_from_a_state_of_adam():
    """With the moments of a run of `optax.adamw` in its place, the state goes on from that run, count and all."""
    adamw = optax.adamw(1e-3)
    stable = optax.chain(
        oc.scale_by_stable_adam(max_rms=None), optax.add_decayed_weights(1e-4), optax.scale_by_learning_rate(1e-3)
    )
    _, old = run(adamw, SPIKES[:4])
    new = (stable.init(SPIKES[0])[0]._replace(adam=old[0]), *old[1:])
    expected, _ = run(adamw, SPIKES[4:], SPIKES[0], old)
    steps, new = run(stable, SPIKES[4:], SPIKES[0], new)
    chex.assert_trees_all_close(steps, expected, rtol=CLOSE)
    assert new[0].adam.count == len(SPIKES) and isinstance(new[0], StableAdamState)


def test_a_threshold_may_be_a_schedule_a_tree_or_a_rule():
    """`max_rms` takes what the threshold of a clip takes; a share of the parameters is of their root mean square."""
    last = [small(3, 1e4)]
    for max_rms, by_hand in (
        (lambda step: jnp.where(step < 3, jnp.inf, 0.5), dict.fromkeys(last[0], 0.5)),
        ({"bias": 0.25, "dense": None, "scale": 1.0}, {"bias": 0.25, "dense": np.inf, "scale": 1.0}),
        (thresholds.param_fraction(2.0), {k: 2 * float(x) for k, x in oc.block_rms(SPIKES[0]).items()}),
    ):
        steps, state = run(oc.scale_by_stable_adam(max_rms=max_rms), SPIKES[:3] + last, SPIKES[0])
        free, _ = run(ADAM, SPIKES[:3] + last)
        quotient = jax.tree.map(lambda g, v: g / np.sqrt(v / (1 - 0.999**4)), last[0], state.adam.nu)
        expected = {k: x / max(1, reference.rms(quotient[k]) / by_hand[k]) for k, x in free[-1].items()}
        chex.assert_trees_all_close(steps[-1], expected, rtol=1e-3)


def test_what_is_out_of_range():
    """Squares of quotients stay in range where g² is inf, and a NaN in one leaf leaves the others alone."""
    _, state = run(STABLE, SPIKES[:3])
    large = SPIKES[3] | {"dense": jnp.full((4, 3), 1e25)}
    steps, _ = step(STABLE, large, state)
    chex.assert_tree_all_finite(steps)
    steps, after = step(STABLE, SPIKES[3] | {"bias": jnp.array([1.0, jnp.nan, 1.0])}, state)
    expected, _ = step(STABLE, SPIKES[3], state)
    assert np.isnan(steps["bias"]).all() and np.isnan(after.adam.nu["bias"]).any()
    chex.assert_trees_all_equal({k: steps[k] for k in ("dense", "scale")}, {k: expected[k] for k in ("dense", "scale")})


def test_complex_leaves():
    """The rms of a complex leaf is that of its magnitudes."""
    z = {"z": jnp.array([3 + 4j, 1 - 1j, 0.1j], jnp.complex64)}
    pair, real = (oc.scale_by_stable_adam(max_rms=0.5) for _ in range(2))
    _, state = run(pair, [z, {"z": 20 * z["z"]}])
    _, expected = run(real, [{"z": jnp.abs(z["z"])}, {"z": 20 * jnp.abs(z["z"])}])
    np.testing.assert_allclose(state.measured.norm, expected.measured.norm, rtol=1e-5)


@pytest.mark.parametrize("typed", [True, pytest.param(False, marks=full)])
def test_shard_map_is_one_device(typed):
    """Inside `shard_map` the rms is that of the whole leaf, by the types of leaves or by `axis_name`."""
    tree = {"w": np.float32(np.random.default_rng(0).normal(size=(16, 3))), "b": np.float32([0.3, -2.0, 1.0])}
    specs = {"w": P("data"), "b": P()}

    def two_steps(tx, updates):
        _, state = tx.update(updates, tx.init(updates))
        return tx.update(jax.tree.map(lambda x: 9 * x * x, updates), state)[0]

    def on_mesh(axis_name):
        there = functools.partial(two_steps, oc.scale_by_stable_adam(max_rms=0.5, axis_name=axis_name))
        return jax.shard_map(there, mesh=mesh(data=8), in_specs=(specs,), out_specs=specs, check_vma=typed)

    actual = jax.jit(on_mesh(None if typed else {"w": "data", "b": ()}))(tree)
    expected = jax.jit(functools.partial(two_steps, oc.scale_by_stable_adam(max_rms=0.5)))(tree)
    chex.assert_trees_all_close(actual, expected, rtol=1e-5, atol=1e-6)
    if not typed:
        with pytest.raises(ValueError, match=r"^axis_name is missing"):
            jax.eval_shape(on_mesh(None), tree)


@pytest.mark.parametrize(
    ("options", "kind", "text"),
    [
        ({"b1": 1.5}, ValueError, "b1 must be <= 1, got 1.5"),
        ({"b2": -0.1}, ValueError, "b2 must be >= 0, got -0.1"),
        ({"eps": float("nan")}, ValueError, "eps must be a number, got nan"),
        ({"eps_root": "a"}, TypeError, "eps_root must be a number or a scalar array, got str 'a'"),
        ({"max_rms": -1.0}, ValueError, "max_rms must be >= 0, got -1"),
        ({"max_rms": "a"}, TypeError, "max_rms must be a number, a scalar array, a schedule, a rule, or None"),
    ],
)
def test_errors(options, kind, text):
    """What is out of range raises where the transformation is made, with the argument first."""
    with pytest.raises(kind, match=f"^{text}"):
        oc.scale_by_stable_adam(**options)


def test_states_of_others_are_refused():
    """A state of Adam alone is an error that names the state that is needed."""
    with pytest.raises(TypeError, match=r"^state must be a StableAdamState, got ScaleByAdamState"):
        STABLE.update(SPIKES[0], ADAM.init(SPIKES[0]))
    other = oc.scale_by_stable_adam(max_rms={"bias": 1.0})
    with pytest.raises(ValueError, match=r"^max_rms must be one value or a prefix of the tree"):
        other.init(SPIKES[0])


def test_leaves_of_several_dtypes():
    """In a tree of f16, bf16 and f32, moments, steps and their dtypes are Adam's where nothing is clipped."""
    samples = [{name: jax.tree.leaves(x)[0] for name, x in mixed(seed).items()} for seed in (0, 1)]
    assert len({x.dtype for x in samples[0].values()}) == 3
    expected, moments = run(ADAM, samples)
    steps, state = run(oc.scale_by_stable_adam(max_rms=None), samples)
    chex.assert_trees_all_equal_shapes_and_dtypes((steps, state.adam), (expected, moments))
    chex.assert_trees_all_equal((steps, state.adam), (expected, moments))
    assert jnp.isfinite(state.measured.norm)


def test_eps_and_eps_root_are_in_the_rms():
    """The rms divides by the larger of eps and the root of v̂ + eps_root, so derivatives are finite where g is 0."""
    g = jnp.array([3.0, 4.0])
    for options, divisor in (({"eps_root": 16.0}, np.sqrt(np.square(g) + 16)), ({"eps": 3.5}, np.maximum(g, 3.5))):
        tx = oc.scale_by_stable_adam(max_rms=0.5, **options)
        steps, state = step(tx, g)
        rms = reference.rms(g / divisor)
        np.testing.assert_allclose(state.measured.norm, rms, rtol=1e-5)
        free, _ = step(optax.scale_by_adam(**options), g)
        np.testing.assert_allclose(steps, free * 0.5 / rms, rtol=1e-5)
    tx = oc.scale_by_stable_adam(eps_root=1e-6)
    chex.assert_tree_all_finite(jax.jacobian(lambda g: tx.update(g, tx.init(g))[0])(jnp.zeros(2)))

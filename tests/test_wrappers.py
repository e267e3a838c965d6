"""Wrappers around an optimizer: a skipped step leaves no trace in anything that trains."""

import functools
import pickle
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
import trees
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from test_contract import once, run, stack, types
from test_norms import mesh_of, sharded, spread
from test_programs import ENTRIES, compiled_step, entry

import optax_clip as oc


def pair(seed: int = 0, scale: float = 1.0, dtype=jnp.float32) -> dict:
    """A vector and a matrix whose global norm is `scale`."""
    tree = trees.sample(seed)
    tree = {name: tree[name] for name in ("bias", "dense")}
    return jax.tree.map(lambda x: (scale / trees.norm64(tree) * x).astype(dtype), tree)


def broken(bad, seed: int = 0, dtype=jnp.float32) -> dict:
    """Updates with one bad entry."""
    updates = pair(seed, dtype=dtype)
    return {**updates, "dense": updates["dense"].at[1, 2].set(bad)}


def bits(tree):
    """The tree as unsigned integers, random keys too."""
    data = lambda x: jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x
    return jax.tree.map(lambda x: np.asarray(data(x)).view(f"u{np.asarray(data(x)).itemsize}"), tree)


def types_of_arrays(state):
    """What a second trace depends on, but for random keys."""
    return types([x for x in jax.tree.leaves(state) if jnp.issubdtype(x.dtype, jnp.number)])


def swapping():
    """A transformation whose state changes places, and keeps a gradient as it came."""

    def update(updates, state, params=None):
        del params
        first, second, _ = state
        return jax.tree.map(lambda u, f: u + f, updates, first), (second, first, updates)

    return optax.GradientTransformation(
        lambda params: tuple(jax.tree.map(lambda p, i=i: jnp.full_like(p, i), params) for i in range(3)), update
    )


BAD = {"nan": broken(np.nan), "inf": broken(np.inf), "-inf": broken(-np.inf), "spike": pair(5, 100.0)}
OPTIMIZERS = {
    "identity": optax.identity,
    "sgd": lambda: optax.sgd(0.1),
    "trace": lambda: optax.trace(0.9),
    "nesterov": lambda: optax.sgd(0.1, momentum=0.9, nesterov=True),
    "adamw": lambda: optax.adamw(optax.linear_schedule(0.1, 0.01, 10)),
    "clipped_adamw": lambda: optax.chain(oc.clip_by_global_norm(0.5), optax.adamw(0.1)),
    "adaptive_adamw": lambda: optax.chain(oc.autoclip(50.0, 4, norm=oc.leaf_norm), optax.adamw(0.1)),
    "lion": lambda: optax.lion(0.1),
    "adafactor": lambda: optax.adafactor(0.1, min_dim_size_to_factor=2),
    "muon": lambda: optax.contrib.muon(0.1),
    "noise": lambda: optax.chain(optax.add_noise(0.1, 0.5, 0), optax.sgd(0.1)),
    "multi_steps": lambda: optax.MultiSteps(optax.adam(0.1), 2).gradient_transformation(),
    "masked": lambda: optax.masked(optax.adam(0.1), {"bias": False, "dense": True}),
    "partition": lambda: optax.partition({"a": optax.adam(0.1), "b": optax.sgd(0.1)}, {"bias": "a", "dense": "b"}),
    "injected": lambda: optax.inject_hyperparams(optax.adamw)(optax.linear_schedule(0.1, 0.01, 10)),
    "if_finite": lambda: optax.apply_if_finite(optax.adam(0.1), 3),
    "swapping": swapping,
    "skipping": lambda: oc.skip_spikes(optax.adam(0.1), 50.0),
}
every = pytest.mark.parametrize("name", OPTIMIZERS)


@functools.cache
def skipping(name):
    """An optimizer that skips norms above 10: its first state and compiled step."""
    tx = oc.skip_spikes(OPTIMIZERS[name](), 10.0)
    return tx.init(pair(9)), jax.jit(tx.update)


@every
def test_a_skipped_step_leaves_no_trace(name):
    """NaN, inf and a norm above the threshold give updates of 0, and every bit of the inner state stays."""
    (state, step), params = skipping(name), pair(9)
    expected_types = types_of_arrays(state)
    for i in range(3):
        _, state = step(pair(i), state, params)
    for count, updates in enumerate(BAD.values(), start=1):
        skipped, new_state = step(updates, state, params)
        chex.assert_trees_all_equal(skipped, jax.tree.map(jnp.zeros_like, params))
        chex.assert_trees_all_equal(bits(new_state.inner_state), bits(state.inner_state))
        assert types_of_arrays(new_state) == expected_types
        assert (new_state.total_skipped, new_state.consecutive_skipped) == (count, count)
        state = new_state
    _, state = step(pair(4), state, params)
    assert (state.total_skipped, state.consecutive_skipped) == (4, 0)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("name", ["global", "leaf", "adaptive"])
def test_a_skipped_step_leaves_no_trace_in_derivatives(name, compiled):
    """The derivative of a step after a bad one is that of the same steps without it."""
    clip = {
        "global": oc.clip_by_global_norm(1.0),
        "leaf": oc.clip_by_leaf_norm(1.0),
        "adaptive": oc.zclip(warmup_steps=1),
    }[name]
    tx, gradients = oc.skip_spikes(optax.chain(clip, optax.trace(0.9))), pair(0)

    def last(gradients, samples):
        state = tx.init(gradients)
        for factor in samples:
            sample = jax.tree.map(lambda g, factor=factor or 1.0: g * factor, gradients)
            if factor is None:  # bad
                sample["dense"] = sample["dense"].at[1, 2].set(jnp.nan)
            updates, state = tx.update(sample, state)
        return jnp.sum(jnp.cumsum(updates["dense"], axis=0) ** 2)

    slope = jax.grad(last)
    slope = jax.jit(slope, static_argnums=1) if compiled else slope
    expected = slope(gradients, (2.0, 3.0))
    chex.assert_tree_all_finite(expected)
    chex.assert_trees_all_close(slope(gradients, (2.0, None, 3.0)), expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("make", [optax.sgd, optax.adam, lambda rate: optax.sgd(lambda step: rate / (step + 1))])
def test_a_skipped_step_leaves_no_trace_in_the_derivative_by_the_learning_rate(make):
    """What the optimizer was made with has derivatives too."""

    def last(rate, samples):
        tx = oc.skip_spikes(make(rate))
        state, w = tx.init(jnp.zeros(2)), jnp.ones(2)
        for factor in samples:
            updates, state = tx.update(w * factor if factor else jnp.full(2, jnp.nan), state)
            w = optax.apply_updates(w, updates)
        return jnp.sum(w**2)

    for slope in (jax.grad(last), jax.jit(jax.grad(last), static_argnums=1)):
        chex.assert_trees_all_close(slope(0.1, (1.0, None, 2.0)), slope(0.1, (1.0, 2.0)), rtol=1e-5)


@every
def test_other_steps_are_those_of_the_optimizer(name):
    """Where nothing is skipped, and after something was, updates and state are those of the optimizer alone."""
    (state, step), plain, params, out = skipping(name), OPTIMIZERS[name](), pair(9), []
    samples = [pair(0), BAD["nan"], pair(1), pair(2), BAD["spike"], BAD["inf"], pair(3)]
    for sample in samples:
        updates, state = step(sample, state, params)
        out.append(updates)
    good = [0, 2, 3, 6]
    expected, expected_state = run(plain, [samples[i] for i in good], params, jax.jit(plain.update))
    chex.assert_trees_all_equal_shapes_and_dtypes(out[0], expected[0])
    # Updates that nearly cancel differ by more than the last place.
    chex.assert_trees_all_close([out[i] for i in good], expected, rtol=1e-5, atol=1e-6)
    floats = lambda tree: [x for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.number)]
    chex.assert_trees_all_close(floats(state.inner_state), floats(expected_state), rtol=1e-5, atol=1e-6)


def test_states_that_change_places_or_are_set():
    """A state that is passed on in another place, or set to a number, stays where it was in a skipped step."""
    inner = optax.GradientTransformation(
        lambda params: (jnp.array(1.0), jnp.array(2.0), jnp.array(3.0)),
        lambda updates, state, params=None: (updates, (state[1], state[0], jnp.array(0.0))),
    )
    tx = oc.skip_spikes(inner, 1.0)
    state = tx.init(jnp.zeros(1))
    for size, expected in ((5.0, (1, 2, 3)), (0.5, (2, 1, 0))):
        _, after = tx.update(jnp.array([size]), state)
        chex.assert_trees_all_equal(after.inner_state, tuple(map(jnp.float32, expected)))


def test_the_first_step_may_be_skipped():
    """Nothing but bad steps leaves the state of `init`."""
    tx, params = oc.skip_spikes(optax.adamw(0.1)), pair(9)
    initial = tx.init(params)
    out, state = run(tx, [broken(np.nan)] * 3, params, jax.jit(tx.update))
    chex.assert_trees_all_equal(state.inner_state, initial.inner_state)
    chex.assert_trees_all_equal(out, [jax.tree.map(jnp.zeros_like, params)] * 3)
    assert state.consecutive_skipped == 3


# Thresholds


def test_a_norm_at_the_threshold_is_not_skipped():
    """Norms up to the threshold pass, those above do not; None lets all finite norms pass."""
    tx, open_tx = oc.skip_spikes(optax.identity(), 5.0), oc.skip_spikes(optax.identity())
    for norm, passes in ((4.0, True), (5.0, True), (5.001, False), (1e30, False)):
        updates = jnp.array([norm])
        clipped, state = tx.update(updates, tx.init(updates))
        assert (clipped[0] == norm) == passes and state.total_skipped == (not passes)
        chex.assert_trees_all_equal(open_tx.update(updates, open_tx.init(updates))[0], updates)


def test_a_schedule_does_not_count_skipped_steps():
    """The threshold follows its schedule over the steps that were taken."""
    tx = oc.skip_spikes(optax.identity(), optax.linear_schedule(1.0, 5.0, 4))
    norms = (0.5, 1.5, 2.5, 2.5, np.nan, 2.5, 3.5, 5.0)
    out, state = run(tx, [jnp.array([norm]) for norm in norms], jnp.zeros(1), jax.jit(tx.update))
    # The thresholds of the steps taken are 1, 2, 3, 4, 5, 5, 5.
    chex.assert_trees_all_equal(jnp.concatenate(out), jnp.array([0.5, 1.5, 2.5, 2.5, 0.0, 2.5, 3.5, 5.0]))
    assert state.total_skipped == 1
    out, state = run(tx, [jnp.array([norm]) for norm in (3.0, 3.0, 3.0)], jnp.zeros(1), jax.jit(tx.update))
    assert state.total_skipped == 3 and float(state.measured.threshold) == 1.0


@pytest.mark.parametrize("threshold", [0.0, oc.quantile(90.0, 8)], ids=["number", "rule"])
def test_a_norm_of_zero_is_not_above_a_threshold_of_zero(threshold):
    """A step without a gradient is not a spike: the optimizer sees it, and counts it."""
    tx = oc.skip_spikes(optax.adam(0.1), threshold)
    _, state = tx.update(jnp.zeros(2), tx.init(jnp.zeros(2)))
    assert (state.total_skipped, state.inner_state[0].count) == (0, 1)


def test_a_leaf_without_a_gradient_does_not_stop_training():
    """Beside a leaf whose gradient is always 0, a rule by leaves does not skip every step."""
    tx = oc.skip_spikes(optax.sgd(1.0), oc.quantile(100.0, 8), norm=oc.leaf_norm)
    state, step = tx.init({"a": jnp.zeros(1), "frozen": jnp.zeros(1)}), jax.jit(tx.update)
    for norm in (3.0, 2.0, 1.0):
        _, state = step({"a": jnp.array([norm]), "frozen": jnp.zeros(1)}, state)
    assert state.total_skipped == 0


RULES = {
    "z_score": (lambda: oc.z_score(2.0, 0.9, 4), lambda: reference.Zclip(2.0, 0.9, 4)),
    "limit": (lambda: oc.z_score(2.0, 0.9, 4, spike="limit"), lambda: reference.Zclip(2.0, 0.9, 4, "limit")),
    "sigma_window": (lambda: oc.sigma_window(2.0, 8), lambda: reference.ClipBySigma(2.0, 8)),
    "quantile": (lambda: oc.quantile(90.0, 8), lambda: reference.Autoclip(90.0, 8)),
    "optax": (lambda: optax.chain(optax.ema(0.9), optax.scale(1.5)), None),
}


@pytest.mark.parametrize("name", RULES)
def test_a_spike_does_not_enter_the_statistics(name):
    """With a rule, the thresholds of the steps taken are those of a run without the skipped steps."""
    tx = oc.skip_spikes(optax.sgd(1.0), RULES[name][0]())
    norms = np.float32(np.exp(0.3 * np.random.default_rng(0).normal(size=60)))
    norms[[10, 11, 30]], norms[[0, 20]] = (50.0, 3e3, 8.0), np.nan
    state, step, taken, thresholds = tx.init(jnp.zeros(1)), once(tx.update), [], []
    for norm in norms:
        total = int(state.total_skipped)
        _, state = step(jnp.array([norm]), state)
        if state.total_skipped == total:
            taken.append(norm)
            thresholds.append(state.measured.threshold)
    assert 50.0 not in taken and 3e3 not in taken and len(taken) > 15
    rest, expected = tx.init(jnp.zeros(1)), []
    for norm in taken:
        _, rest = step(jnp.array([norm]), rest)
        expected.append(rest.measured.threshold)
    chex.assert_trees_all_equal(thresholds, expected)
    chex.assert_trees_all_equal(state.measured.rule, rest.measured.rule)
    assert rest.total_skipped == 0


@pytest.mark.parametrize("name", [name for name in RULES if RULES[name][1]])
def test_thresholds_follow_the_reference(name):
    """Each step is skipped exactly where float64 says so, whose rule is set back after a skipped step."""
    tx, rule = oc.skip_spikes(optax.identity(), RULES[name][0]()), RULES[name][1]()
    norms = np.float32(np.exp(0.5 * np.random.default_rng(1).normal(size=60)))
    state, step = tx.init(jnp.zeros(1)), jax.jit(tx.update)
    for norm in norms:
        before = pickle.dumps(rule)
        threshold = rule(float(norm))
        _, new_state = step(jnp.array([norm]), state)
        skipped = bool(new_state.total_skipped > state.total_skipped)
        assert skipped == (norm > threshold)
        np.testing.assert_allclose(new_state.measured.threshold, threshold, rtol=1e-4)
        rule, state = pickle.loads(before) if skipped else rule, new_state
    assert 0 < state.total_skipped < 60


def test_one_block_above_its_threshold_is_enough():
    """With a norm for each leaf, a step is skipped if one of them is above, though the global norm may be larger."""
    tx = oc.skip_spikes(optax.identity(), {"a": 1.0, "b": 100.0}, norm=oc.leaf_norm)
    for norms, skipped in (((0.5, 50.0), 0), ((1.5, 0.0), 1), ((0.5, 150.0), 1), ((np.nan, 1.0), 1), ((0.0, 0.0), 0)):
        updates = dict(zip("ab", (jnp.array([norm]) for norm in norms)))
        out, state = tx.update(updates, tx.init(updates))
        assert state.total_skipped == skipped
        chex.assert_trees_all_equal(out, jax.tree.map(jnp.zeros_like, updates) if skipped else updates)


def test_the_threshold_may_need_params():
    """A threshold that is a share of the parameters gets them."""
    tx = oc.skip_spikes(optax.identity(), oc.param_fraction(0.5, oc.global_norm))
    params = jnp.array([3.0, 4.0])
    for norm, skipped in ((2.4, 0), (2.6, 1)):
        _, state = tx.update(jnp.array([norm, 0.0]), tx.init(params), params)
        assert state.total_skipped == skipped
    with pytest.raises(ValueError, match="skip_spikes: params are missing"):
        tx.update(params, tx.init(params))


def test_a_traced_threshold():
    """The threshold may be an argument of the compiled step, or injected."""
    step = once(lambda threshold, updates: oc.skip_spikes(optax.identity(), threshold).update(
        updates, oc.skip_spikes(optax.identity(), threshold).init(updates))[1].total_skipped)  # fmt: skip
    assert [int(step(threshold, jnp.array([2.0]))) for threshold in (1.0, 3.0, np.inf)] == [1, 0, 0]
    tx = optax.inject_hyperparams(lambda threshold: oc.skip_spikes(optax.adam(0.1), threshold))(1.0)
    _, state = jax.jit(tx.update)(pair(0, 2.0), tx.init(pair()))
    assert state.inner_state.total_skipped == 1


# Composition


def test_params_and_extra_arguments_reach_the_optimizer():
    """`inner` gets params and extra keyword arguments, also where its own signature is the short one."""

    def update(updates, state, params=None, *, value, **extra_args):
        del extra_args
        return jax.tree.map(lambda u, p: u + value * p, updates, params), state + value

    inner = optax.GradientTransformationExtraArgs(lambda params: jnp.zeros([]), update)
    tx, params = oc.skip_spikes(inner, 10.0), pair(9)
    assert isinstance(tx, optax.GradientTransformationExtraArgs)
    step = jax.jit(lambda updates, state: tx.update(updates, state, params, value=jnp.float32(2.0), unused=1.0))
    out, state = step(pair(0), tx.init(params))
    chex.assert_trees_all_close(out, jax.tree.map(lambda u, p: u + 2.0 * p, pair(0), params), rtol=1e-6)
    _, state = step(broken(np.nan), state)
    assert state.inner_state == 2.0
    short = oc.skip_spikes(optax.sgd(1.0))
    short.update(pair(0), short.init(params), params, value=jnp.float32(2.0))


def test_inside_of_multi_steps_the_mean_is_compared():
    """`MultiSteps` around it: the mean of the small batches is skipped or not."""
    tx = optax.MultiSteps(oc.skip_spikes(optax.sgd(1.0), 1.5), 2)
    samples = [jnp.array([x]) for x in (1.0, 3.0, 1.0, 1.0, -9.0, 1.0, 5.0, -4.0)]
    out, state = run(tx, samples, jnp.zeros(1), once(tx.update))
    chex.assert_trees_all_close(jnp.concatenate(out[1::2]), jnp.array([0.0, -1.0, 0.0, -0.5]))
    assert state.inner_opt_state.total_skipped == 2


def test_around_multi_steps_the_small_batch_is_compared():
    """Around `MultiSteps`: a small batch that is a spike is dropped, and the mean is over the others."""
    tx = oc.skip_spikes(optax.MultiSteps(optax.sgd(1.0), 2).gradient_transformation(), 10.0)
    samples = [jnp.array([x]) for x in (1.0, np.nan, 50.0, 3.0, 4.0, np.inf, 6.0)]
    out, state = run(tx, samples, jnp.zeros(1), once(tx.update))
    chex.assert_trees_all_close(jnp.concatenate(out), jnp.array([0.0, 0.0, 0.0, -2.0, 0.0, 0.0, -5.0]))
    assert (state.total_skipped, state.inner_state.gradient_step) == (3, 2)


@pytest.mark.parametrize("wrap", ["masked", "chain", "partition"])
def test_as_a_part_of_an_optimizer(wrap):
    """Inside of a mask, a chain or a partition it sees what these give it."""
    inner = oc.skip_spikes(optax.sgd(1.0, momentum=0.5), 1.0)
    tx, limit = {
        "masked": (optax.masked(inner, {"bias": True, "dense": False}), "bias"),
        "chain": (optax.chain(optax.scale(2.0), inner, optax.scale(0.5)), None),
        "partition": (
            optax.partition({"a": inner, "b": optax.identity()}, {"bias": "a", "dense": "b"}),
            "bias",
        ),
    }[wrap]
    samples = [pair(0, 0.4), pair(1, 50.0), pair(2, 0.4)]
    out, _ = run(tx, samples, pair(9), once(tx.update))
    bare = optax.sgd(1.0, momentum=0.5)
    expected, _ = run(bare, samples[::2], pair(9))
    for actual, wanted in zip(out[::2], expected):
        paths = [limit] if limit else list(wanted)
        chex.assert_trees_all_close({p: actual[p] for p in paths}, {p: wanted[p] for p in paths}, rtol=1e-6)
    assert not out[1]["bias"].any()
    chex.assert_trees_all_equal(out[1]["dense"], samples[1]["dense"] if limit else jnp.zeros_like(samples[1]["dense"]))


def test_metrics_of_a_skip():
    """`clip_metrics` reads the norm and threshold that were compared, scale 0 for a spike, and the share of spikes."""
    tx = oc.skip_spikes(optax.adamw(0.1), 10.0)
    _, state = run(tx, [pair(0), pair(1), pair(2, 40.0), pair(3, 30.0)], pair(9), jax.jit(tx.update))
    metrics = {name: float(x) for name, x in oc.clip_metrics(state).items()}
    wanted = {"clip/norm": 30.0, "clip/threshold": 10.0, "clip/scale": 0.0, "clip/clip_rate": 0.5}
    assert {name: metrics[name] for name in wanted} == pytest.approx(wanted)
    _, state = jax.jit(tx.update)(pair(0), state, pair(9))
    assert oc.clip_metrics(state)["clip/scale"] == 1


def test_metrics_count_skipped_steps():
    """`clip_metrics` reads the counters that the docstring of `skip_spikes` tells to watch."""
    tx = oc.skip_spikes(optax.sgd(0.1), 10.0)
    _, state = run(tx, [pair(0, 20.0)] * 2, pair(9), jax.jit(tx.update))
    assert oc.clip_metrics(state)["clip/consecutive_skipped"] == 2


def test_metrics_of_a_skip_around_a_clip():
    """With a clip inside there are two, told apart by their paths; in a skipped step the clip's stay as they were."""
    tx = oc.skip_spikes(optax.chain(oc.clip_by_global_norm(0.5), optax.adamw(0.1)), 10.0)
    _, state = run(tx, [pair(0, 2.0), pair(1, 40.0)], pair(9), jax.jit(tx.update))
    metrics = {name: float(x) for name, x in oc.clip_metrics(state).items()}
    assert metrics["clip/measured/norm"] == pytest.approx(40.0)
    assert metrics["clip/inner_state/0/norm"] == pytest.approx(2.0)
    assert metrics["clip/inner_state/0/clip_rate"] == 1.0


def test_map_params_and_donation():
    """`optax.tree.map_params` finds the moments of the optimizer inside, and all buffers can be donated."""
    tx, params = oc.skip_spikes(optax.adamw(0.1), oc.z_score()), pair(9)
    state = tx.init(params)
    mapped = optax.tree.map_params(tx, lambda x: "params", state)
    assert mapped.inner_state[0].mu == {"bias": "params", "dense": "params"}
    chex.assert_trees_all_equal(mapped.measured, state.measured)
    expected = tx.update(pair(0), state, params)
    updates, state = pair(0), tx.init(params)  # that nothing else holds
    actual = jax.jit(tx.update, donate_argnums=(0, 1), keep_unused=True)(updates, state, params)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves((updates, state)))
    chex.assert_trees_all_close(actual, expected, rtol=1e-5, atol=1e-6)


def test_a_run_goes_on_from_a_pickle():
    """A saved state goes on bit for bit."""
    tx, params = oc.skip_spikes(optax.adamw(0.1), oc.sigma_window(2.0, 4)), pair(9)
    step = jax.jit(tx.update)
    _, state = run(tx, [pair(i) for i in range(5)], params, step)
    saved = pickle.loads(pickle.dumps(state))
    for updates in (pair(5, 100.0), pair(6)):
        (expected, state), (actual, saved) = step(updates, state, params), step(updates, saved, params)
        chex.assert_trees_all_equal((actual, saved), (expected, state))


# Odd leaves and dtypes


@pytest.mark.parametrize("skipped", [False, True], ids=["taken", "skipped"])
def test_odd_leaves_survive(skipped):
    """None, booleans, float0, keys and empty nodes come back as they are; integers are 0 if skipped."""
    updates = {path: leaf for path, leaf in trees.odd().items() if path != "function"}
    if skipped:
        updates["weight"] = jnp.array([np.nan, 1.0])
    tx = oc.skip_spikes(optax.identity(), 10.0)
    out, state = tx.update(updates, tx.init(updates))
    chex.assert_trees_all_equal_structs(out, updates)
    same = ("none", "bool", "python_bool", "float0", "key")
    assert all(out[path] is updates[path] for path in same)
    for path in ("weight", "int", "python_int"):
        chex.assert_trees_all_equal(out[path], jnp.zeros_like(updates[path]) if skipped else updates[path])
    assert state.total_skipped == skipped


def test_functions_survive():
    """A function among the updates, as in a tree of modules, comes back as it is."""
    updates = {"weight": jnp.ones(2), "function": jnp.tanh}
    tx = oc.skip_spikes(optax.identity(), 10.0)
    out, _ = tx.update(updates, tx.init(updates))
    assert out["function"] is jnp.tanh


def test_computed_booleans_survive():
    """An update that is no number, computed by `inner`, comes back as its value."""
    update = lambda updates, state, params=None: ({**updates, "up": updates["weight"] > 0}, state)
    tx = oc.skip_spikes(optax.GradientTransformation(lambda params: optax.EmptyState(), update), 10.0)
    updates = {"weight": jnp.array([1.0, -1.0]), "up": jnp.array([False, False])}
    out, _ = tx.update(updates, tx.init(updates))
    assert (out["up"] & True).tolist() == [True, False]


def test_line_search_inside():
    """L-BFGS, whose line search loops over the loss, can be wrapped; a skipped step keeps its memory."""
    loss = lambda w: jnp.sum((w - 1.0) ** 4)
    tx, params = oc.skip_spikes(optax.lbfgs(), 1e3), jnp.zeros(3)
    step = jax.jit(lambda w, g, s: tx.update(g, s, w, value=loss(w), grad=g, value_fn=loss))
    state, first = tx.init(params), loss(params)
    for i in range(6):
        grads = jax.grad(loss)(params) * (np.nan if i == 3 else 1.0)
        updates, new_state = step(params, grads, state)
        if i == 3:
            chex.assert_trees_all_equal(bits(new_state.inner_state), bits(state.inner_state))
        params, state = optax.apply_updates(params, updates), new_state
    assert loss(params) < 0.01 * first and state.total_skipped == 1


def test_odd_leaves_under_jit():
    """Leaves that jit takes as arguments survive there too."""
    updates = {path: leaf for path, leaf in trees.odd().items() if path not in ("function", "float0")}
    tx = oc.skip_spikes(optax.identity(), 10.0)
    state = tx.init(updates)
    out, _ = jax.jit(tx.update)(updates, state)
    chex.assert_trees_all_equal_structs(out, updates)
    chex.assert_trees_all_equal(out["weight"], updates["weight"])
    assert jax.random.key_data(out["key"]).tolist() == jax.random.key_data(updates["key"]).tolist()


@pytest.mark.parametrize("name", ["adamw", "trace", "clipped_adamw"])
def test_dtypes_are_kept(name):
    """In bf16, updates and moments have the dtypes that the optimizer gives them, in both kinds of step."""
    tx, plain, params = oc.skip_spikes(OPTIMIZERS[name](), 10.0), OPTIMIZERS[name](), pair(9, dtype=jnp.bfloat16)
    step, alone = jax.jit(tx.update), jax.jit(plain.update)
    for updates in (pair(0, dtype=jnp.bfloat16), broken(np.nan, dtype=jnp.bfloat16)):
        out, state = step(updates, tx.init(params), params)
        expected, expected_state = alone(updates, plain.init(params), params)
        chex.assert_trees_all_equal_shapes_and_dtypes((out, state.inner_state), (expected, expected_state))


def test_complex_and_mixed_updates_are_zeroed():
    """Updates of every dtype are 0 in a skipped step, also those of complex numbers."""
    updates = {**trees.mixed(0), "complex": jnp.array([3.0 + 4.0j])}
    tx = oc.skip_spikes(optax.identity(), 1e-3)
    out, _ = jax.jit(tx.update)(updates, tx.init(updates))
    chex.assert_trees_all_equal_shapes_and_dtypes(out, updates)
    assert not any(np.asarray(leaf.astype(jnp.complex64)).any() for leaf in jax.tree.leaves(out))


# Transformations of JAX

SAMPLES = [pair(0), broken(np.nan), pair(1, 100.0), pair(2), pair(3)]


def make():
    return oc.skip_spikes(optax.chain(oc.clip_by_global_norm(0.5), optax.adamw(0.1)), 10.0)


def assert_close(actual, expected):
    chex.assert_trees_all_equal_shapes_and_dtypes(actual, expected)
    chex.assert_trees_all_close(actual, expected, rtol=1e-5, atol=1e-6)


def test_compiled_is_eager():
    """Eager and compiled steps agree, and a scan over them."""
    tx, params = make(), pair(9)
    out, state = run(tx, SAMPLES, params)
    assert_close(run(tx, SAMPLES, params, once(tx.update)), (out, state))
    scan = lambda state, updates: tx.update(updates, state, params)[::-1]
    assert_close(jax.lax.scan(scan, tx.init(params), stack(SAMPLES)), (state, stack(out)))
    assert state.total_skipped == 2


def test_vmap_skips_for_each_member():
    """Under `vmap` each member skips by itself."""
    tx, params = make(), pair(9)
    state = tx.init(params)
    out, states = jax.jit(jax.vmap(lambda updates: tx.update(updates, state, params)))(stack(SAMPLES))
    step = jax.jit(tx.update)
    alone = [step(updates, state, params) for updates in SAMPLES]
    assert_close((out, states), (stack([u for u, _ in alone]), stack([s for _, s in alone])))
    chex.assert_trees_all_equal(states.total_skipped, jnp.array([0, 1, 1, 0, 0]))


def specs_of(tx, state, specs):
    """Where the state lies: moments as the params, the rest everywhere."""
    return optax.tree.map_params(tx, lambda _, spec: spec, state, specs, transform_non_params=lambda _: P())


@pytest.mark.parametrize("how", ["shard_map", "jit"])
def test_sharded_is_one_device(how):
    """On shards, inside `shard_map` or under jit, all devices skip together, as one device does."""
    updates, specs = spread("4x2")
    tx, mesh = oc.skip_spikes(optax.adamw(0.1), oc.z_score(2.0, 0.9, 2)), mesh_of("4x2")
    expected_state, alone = tx.init(updates), jax.jit(tx.update)
    state_specs = specs_of(tx, expected_state, specs)
    place = lambda tree, specs: jax.tree.map(lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec)), tree, specs)
    if how == "shard_map":
        step = sharded(tx.update, mesh, (specs, state_specs, specs), (specs, state_specs))
    else:
        step = jax.jit(tx.update)
    state, params = place(expected_state, state_specs), place(updates, specs)
    for size in (1.0, 1.1, 0.9, 100.0, np.nan, 1.0):
        scaled = jax.tree.map(lambda x, size=size: size * x, updates)
        out, state = step(place(scaled, specs), state, params)
        expected, expected_state = alone(scaled, expected_state, updates)
        chex.assert_trees_all_close((out, state), (expected, expected_state), rtol=1e-4, atol=1e-6)
        for path, leaf in out.items():
            assert leaf.sharding.is_equivalent_to(NamedSharding(mesh, specs[path]), leaf.ndim)
    assert state.total_skipped == 2


# Programs


@functools.cache
def program(name):
    """A compiled AdamW step in place, with and without `skip_spikes`."""
    plain = {"adamw": optax.adamw(1e-3), "clipped": optax.chain(oc.clip_by_global_norm(1.0), optax.adamw(1e-3))}
    return compiled_step(
        plain[name] if name in plain else oc.skip_spikes(plain[name.removeprefix("skipping_")], oc.z_score())
    )


def full_size_kernels(name) -> int:
    """Kernels that write a matrix."""
    lines = [line.split(" fusion(")[0] for line in entry(program(name)).splitlines() if " fusion(" in line]
    return sum(bool(re.search(r"f32\[(256,512|512,256)\]", line)) for line in lines)


@trees.on_a_cpu_that_fuses
@pytest.mark.parametrize("name", ["adamw", "clipped"])
def test_skipping_needs_no_copy_of_the_state(name):
    """Next to no scratch memory, no copies, and as many kernels that write matrices as without `skip_spikes`."""
    skipping = program(f"skipping_{name}")
    assert skipping.memory_analysis().temp_size_in_bytes < 0.01 * 4 * ENTRIES
    assert not re.findall(r"= f32\[(?:256,512|512,256)\]\S* copy\(", entry(skipping))
    assert full_size_kernels(f"skipping_{name}") == full_size_kernels(name) > 0


# Errors


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ((oc.global_norm,), TypeError, r"skip_spikes: inner must be an Optax transformation, got function.*adamw"),
        ((None, 1.0), TypeError, r"skip_spikes: inner must be an Optax transformation, got NoneType"),
        ((optax.sgd(0.1), -1.0), ValueError, r"skip_spikes: threshold must be >= 0, got -1"),
        ((optax.sgd(0.1), np.nan), ValueError, r"skip_spikes: threshold must be a number, got nan"),
        ((optax.sgd(0.1), "high"), TypeError, r"skip_spikes: threshold must be a number.*got str 'high'"),
        ((optax.sgd(0.1), True), TypeError, r"skip_spikes: threshold must be a number.*got bool True"),
        ((optax.sgd(0.1), jnp.ones(2)), ValueError, r"skip_spikes: threshold must be a scalar.*\(2,\)"),
    ],
    ids=["function", "none", "negative", "nan", "str", "bool", "array"],
)
def test_errors(arguments, error, text):
    """What cannot work is an error at construction that names the argument and its value."""
    with pytest.raises(error, match=text):
        oc.skip_spikes(*arguments)


def test_a_norm_that_is_not_a_function_is_an_error():
    """The norm must be a function of the updates."""
    with pytest.raises(TypeError, match="skip_spikes: norm must be a function"):
        oc.skip_spikes(optax.sgd(0.1), 1.0, norm=2.0)


def test_no_number_of_blocks_makes_a_spike():
    """Means over blocks may miss 1 by a rounding; steps are skipped for spikes alone, and the reported scale is 1."""
    for blocks in (41, 47, 55):
        updates = [jnp.ones(2)] * blocks
        tx = oc.skip_spikes(optax.sgd(1.0), 10.0, norm=oc.leaf_norm)
        out, state = jax.jit(tx.update)(updates, tx.init(updates))
        assert state.total_skipped == 0 and out[0].all()
        plain = oc.clip_by_leaf_norm(None)
        assert jax.jit(plain.update)(updates, plain.init(updates))[1].scale == 1


def test_one_block_among_many_is_enough():
    """A single unit above its threshold skips the step."""
    tx = oc.skip_spikes(optax.sgd(1.0), 10.0, norm=functools.partial(oc.unit_norm, axis=0))
    updates = jnp.ones((1, 100_000)).at[0, 5].set(100.0)
    assert jax.jit(tx.update)(updates, tx.init(updates))[1].total_skipped == 1

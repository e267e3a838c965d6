"""Wrappers: a skipped step leaves no trace, what a clip takes away is carried, and a random part is clipped."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import trees
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import optax_clip as oc
from optax_clip import thresholds

full = functools.partial(pytest.param, marks=pytest.mark.full)


def sized(seed: int, norm: float, dtype=jnp.float32) -> dict:
    """A small tree of this global norm."""
    tree = trees.small(seed)
    return jax.tree.map(lambda x: (norm / trees.norm64(tree) * x).astype(dtype), tree)


def broken(bad: float, dtype=jnp.float32) -> dict:
    """A small tree with one bad entry."""
    tree = sized(1, 1.0, dtype)
    return {**tree, "dense": tree["dense"].at[1, 2].set(bad)}


def run(tx, samples: list, params=None, state=None) -> tuple[list, object]:
    """The updates of each step and the last state."""
    out = []
    for updates in samples:
        updates, state = trees.step(tx, updates, state, params)
        out.append(updates)
    return out, state


def zeros(tree):
    return jax.tree.map(jnp.zeros_like, tree)


def bits(tree):
    """The tree as unsigned integers, random keys too."""
    data = lambda x: jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x
    return jax.tree.map(lambda x: np.asarray(data(x)).view(f"u{np.asarray(data(x)).itemsize}"), tree)


def with_value():
    """A transformation that wants `value`, multiplies by it, and keeps the sum of values."""

    def update(updates, state, params=None, *, value, **extra_args):
        del params, extra_args
        return jax.tree.map(lambda u: value * u, updates), state + value

    return optax.GradientTransformationExtraArgs(lambda params: jnp.zeros([]), update)


def noisy():
    """A transformation whose state is a random key and a small count."""

    def update(updates, state, params=None):
        del params
        key, now = jax.random.split(state["key"])
        noise = optax.tree.random_like(now, updates)
        return optax.tree.add(updates, noise), {"key": key, "count": state["count"] + 1}

    init = lambda params: {"key": jax.random.key(0), "count": jnp.zeros([], jnp.int8)}
    return optax.GradientTransformation(init, update)


# Skipping: the optimizer inside

BAD = {"nan": broken(np.nan), "inf": broken(np.inf), "-inf": broken(-np.inf), "spike": sized(5, 100.0)}
OPTIMIZERS = {
    "adamw": lambda: optax.adamw(optax.linear_schedule(0.1, 0.01, 10)),
    "noisy": noisy,
    "multi_steps": lambda: optax.MultiSteps(optax.adam(0.1), 2).gradient_transformation(),
    "adaptive": lambda: optax.chain(oc.autoclip(50.0, 4, norm=oc.leaf_norm), optax.trace(0.9)),
    "sgd": lambda: optax.sgd(0.1),
    "lion": lambda: optax.lion(0.1),
    "adafactor": lambda: optax.adafactor(0.1, min_dim_size_to_factor=2),
    "muon": lambda: optax.contrib.muon(0.1),
    "masked": lambda: optax.masked(optax.adam(0.1), {"bias": False, "dense": True, "scale": True}),
    "injected": lambda: optax.inject_hyperparams(optax.adamw)(optax.linear_schedule(0.1, 0.01, 10)),
    "skipping": lambda: oc.skip_spikes(optax.adam(0.1), 50.0),
    "feedback": lambda: oc.with_error_feedback(oc.clip(0.1)),
    "random": lambda: oc.clip_randomly(oc.clip(0.1), 0.5),
}
optimizers = pytest.mark.parametrize("name", [*list(OPTIMIZERS)[:4], *map(full, list(OPTIMIZERS)[4:])])


@functools.cache
def skipping(name):
    """The optimizer that skips norms above 10, one object for all tests."""
    return oc.skip_spikes(OPTIMIZERS[name](), 10.0)


@optimizers
def test_a_skipped_step_leaves_no_trace(name):
    """NaN, inf and a norm above the threshold give updates of 0, and every bit of the inner state stays."""
    tx, params = skipping(name), sized(9, 1.0)
    _, state = run(tx, [sized(i, 1.0) for i in range(3)], params)
    for count, updates in enumerate(BAD.values(), start=1):
        skipped, new_state = trees.step(tx, updates, state, params)
        chex.assert_trees_all_equal(skipped, zeros(params))
        chex.assert_trees_all_equal(bits(new_state.inner_state), bits(state.inner_state))
        assert (new_state.total_skipped, new_state.consecutive_skipped) == (count, count)
        state = new_state
    _, state = trees.step(tx, sized(4, 1.0), state, params)
    assert (state.total_skipped, state.consecutive_skipped) == (4, 0)


@optimizers
def test_other_steps_are_those_of_the_optimizer(name):
    """Where nothing is skipped, and after something was, updates and state are those of the optimizer alone."""
    samples = [sized(0, 1.0), BAD["nan"], sized(1, 1.0), sized(2, 1.0), BAD["spike"], BAD["inf"], sized(3, 1.0)]
    good, params = [0, 2, 3, 6], sized(9, 1.0)
    out, state = run(skipping(name), samples, params)
    expected, expected_state = run(OPTIMIZERS[name](), [samples[i] for i in good], params)
    chex.assert_trees_all_equal_shapes_and_dtypes(out[0], expected[0])
    chex.assert_trees_all_close([out[i] for i in good], expected, rtol=1e-5, atol=1e-6)
    numbers = lambda tree: [x for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.number)]
    chex.assert_trees_all_close(numbers(state.inner_state), numbers(expected_state), rtol=1e-5, atol=1e-6)


def test_skipping_follows_a_plain_loop():
    """Updates, counts, and the measured norm and rate are those of a loop in NumPy around SGD with momentum."""
    random = np.random.default_rng(0)
    samples = np.float32(random.normal(size=(30, 4)) * np.where(random.random(30) < 0.3, 20.0, 1.0)[:, None])
    samples[[0, 7]] = np.nan
    tx, state = oc.skip_spikes(optax.trace(0.5), 10.0), None
    momentum, total, consecutive = np.zeros(4), 0, 0
    for i, gradient in enumerate(samples, start=1):
        updates, state = trees.step(tx, jnp.asarray(gradient), state)
        norm = np.linalg.norm(np.float64(gradient))
        skip = not norm <= 10.0
        momentum = momentum if skip else gradient + 0.5 * momentum
        total, consecutive = total + skip, (consecutive + 1) * skip
        chex.assert_trees_all_close(np.float64(updates), 0.0 * momentum if skip else momentum, rtol=1e-5, atol=1e-6)
        assert (state.total_skipped, state.consecutive_skipped) == (total, consecutive)
        measured = (state.measured.norm, state.measured.clip_rate, state.measured.clip_step)
        chex.assert_trees_all_close(np.float64(measured), np.array([norm, total / i, i - total]), rtol=1e-5)
    assert 5 < total < 20


def test_the_first_step_may_be_skipped():
    """Nothing but bad steps leaves the state of `init`."""
    tx, params = skipping("adamw"), sized(9, 1.0)
    out, state = run(tx, [BAD["nan"]] * 3, params)
    chex.assert_trees_all_equal(state.inner_state, tx.init(params).inner_state)
    chex.assert_trees_all_equal(out, [zeros(params)] * 3)


def test_states_that_change_places_or_are_set():
    """A state that is passed on in another place, or set to a number, stays where it was in a skipped step."""
    inner = optax.GradientTransformation(
        lambda params: (jnp.array(1.0), jnp.array(2.0), jnp.array(3.0)),
        lambda updates, state, params=None: (updates, (state[1], state[0], jnp.array(0.0))),
    )
    tx = oc.skip_spikes(inner, 1.0)
    state = tx.init(jnp.zeros(1))
    for size, expected in ((5.0, (1, 2, 3)), (0.5, (2, 1, 0))):
        _, after = trees.step(tx, jnp.array([size]), state)
        chex.assert_trees_all_equal(after.inner_state, tuple(map(jnp.float32, expected)))


def test_no_derivative_of_a_skipped_step():
    """Derivatives by gradients and learning rate are those of the same steps without the bad ones."""

    def last(gradient, rate, samples):
        tx = oc.skip_spikes(optax.chain(oc.clip_by_leaf_norm(1.0), optax.adam(rate)), 1e3)
        w, state = jnp.ones(3), tx.init(jnp.ones(3))
        for factor, bad in samples:
            sample = gradient * factor * w
            updates, state = tx.update(sample if bad is None else sample.at[1].set(bad), state, w)
            w = optax.apply_updates(w, updates)
        return jnp.sum(jnp.cumsum(w) ** 2)

    slope = jax.jit(jax.grad(last, (0, 1)), static_argnums=2)
    gradient = jnp.array([0.3, -0.2, 0.5])
    good = ((2.0, None), (3.0, None))
    expected = slope(gradient, 0.1, good)
    chex.assert_tree_all_finite(expected)
    with_bad = ((1.0, np.nan), good[0], (1.0, np.inf), (1.0, 1e6), good[1])
    chex.assert_trees_all_close(slope(gradient, 0.1, with_bad), expected, rtol=1e-4, atol=1e-6)


# Skipping: thresholds


def test_a_norm_at_the_threshold_is_not_skipped():
    """Norms up to the threshold pass, those above do not; None lets all finite norms pass."""
    tx, open_tx = oc.skip_spikes(optax.identity(), 5.0), oc.skip_spikes(optax.identity())
    for norm, passes in ((0.0, True), (4.0, True), (5.0, True), (5.001, False), (1e30, False)):
        updates = jnp.array([norm])
        out, state = trees.step(tx, updates)
        assert (out[0] == norm) == passes
        assert state.total_skipped == (not passes)
        chex.assert_trees_all_equal(trees.step(open_tx, updates)[0], updates)


def test_a_schedule_does_not_count_skipped_steps():
    """The threshold follows its schedule over the steps that were taken."""
    tx = oc.skip_spikes(optax.identity(), optax.linear_schedule(1.0, 5.0, 4))
    norms = (0.5, 1.5, 2.5, 2.5, np.nan, 2.5, 3.5, 5.0)
    out, state = run(tx, [jnp.array([norm]) for norm in norms])
    # The thresholds of the steps taken are 1, 2, 3, 4, 5, 5, 5.
    chex.assert_trees_all_equal(jnp.concatenate(out), jnp.array([0.5, 1.5, 2.5, 2.5, 0.0, 2.5, 3.5, 5.0]))
    assert state.total_skipped == 1
    _, state = run(tx, [jnp.array([norm]) for norm in (3.0, 3.0, 3.0)])
    assert (state.total_skipped, state.measured.threshold) == (3, 1.0)


RULES = {
    "z_score": lambda: thresholds.z_score(2.0, 0.9, 4),
    "optax": lambda: optax.chain(optax.ema(0.9), optax.scale(1.5)),
    "limit": lambda: thresholds.z_score(2.0, 0.9, 4, spike="limit"),
    "sigma_window": lambda: thresholds.sigma_window(2.0, 8),
    "quantile": lambda: optax.chain(thresholds.quantile(90.0, 8), optax.scale(1.2)),
    "ema_ratio": lambda: thresholds.ema_ratio(4.0, 1.5, 0.9, 4),
}


@pytest.mark.parametrize("name", [*list(RULES)[:2], *map(full, list(RULES)[2:])])
def test_a_spike_does_not_enter_the_statistics(name):
    """With a rule, the thresholds of the steps taken are those of a run without the skipped steps."""
    tx = oc.skip_spikes(optax.sgd(1.0), RULES[name]())
    norms = np.float32(np.exp(0.3 * np.random.default_rng(0).normal(size=60)))
    norms[[10, 11, 30]], norms[[0, 20]] = (50.0, 3e3, 8.0), np.nan
    state, taken, limits = None, [], []
    for norm in norms:
        _, state = trees.step(tx, jnp.array([norm]), state)
        if state.consecutive_skipped == 0:
            taken.append(norm)
            limits.append(state.measured.threshold)
    assert 50.0 not in taken
    assert len(taken) > 15
    rest, expected = None, []
    for norm in taken:
        _, rest = trees.step(tx, jnp.array([norm]), rest)
        expected.append(rest.measured.threshold)
    chex.assert_trees_all_equal(limits, expected)
    chex.assert_trees_all_equal(state.measured.rule, rest.measured.rule)
    assert rest.total_skipped == 0


def test_one_block_above_its_threshold_is_enough():
    """With a norm for each leaf, a step is skipped if one of them is above, though the global norm may be larger."""
    tx = oc.skip_spikes(optax.identity(), {"a": 1.0, "b": 100.0}, norm=oc.leaf_norm)
    for norms, skipped in (((0.5, 50.0), 0), ((1.5, 0.0), 1), ((0.5, 150.0), 1), ((np.nan, 1.0), 1), ((0.0, 0.0), 0)):
        updates = {name: jnp.array([norm]) for name, norm in zip("ab", norms)}
        out, state = trees.step(tx, updates)
        assert state.total_skipped == skipped
        chex.assert_trees_all_equal(out, zeros(updates) if skipped else updates)


def test_one_unit_of_many_is_enough():
    """A single unit above its threshold skips the step, and so does a NaN in one."""
    tx = oc.skip_spikes(optax.sgd(1.0), 10.0, norm=functools.partial(oc.unit_norm, axis=0))
    updates = jnp.ones((1, 100_000))
    for entry, skipped in ((1.0, 0), (100.0, 1), (np.nan, 1)):
        assert trees.step(tx, updates.at[0, 5].set(entry))[1].total_skipped == skipped


def test_a_threshold_may_be_traced_or_injected():
    """The threshold may be an argument of the compiled step, or injected; a NaN skips all."""

    def skipped(threshold, updates):
        tx = oc.skip_spikes(optax.identity(), threshold)
        return tx.update(updates, tx.init(updates))[1].total_skipped

    step = jax.jit(skipped)
    assert [int(step(t, jnp.array([2.0]))) for t in (1.0, 3.0, np.inf, np.nan)] == [1, 0, 0, 1]
    tx = optax.inject_hyperparams(lambda threshold: oc.skip_spikes(optax.trace(0.1), threshold))(1.0)
    assert trees.step(tx, jnp.array([2.0]))[1].inner_state.total_skipped == 1


def test_params_reach_the_threshold():
    """A threshold that is a share of the parameters gets them."""
    tx, params = oc.skip_spikes(optax.identity(), thresholds.param_fraction(0.5)), jnp.array([3.0, 4.0])
    for norm, skipped in ((2.4, 0), (2.6, 1)):
        assert trees.step(tx, jnp.array([norm, 0.0]), None, params)[1].total_skipped == skipped
    with pytest.raises(ValueError, match="params are missing"):
        tx.update(params, tx.init(params))


# Skipping: composition


def test_extra_arguments_reach_the_optimizer():
    """`inner` gets extra keyword arguments, also where its own signature is the short one."""
    tx = oc.skip_spikes(with_value(), 10.0)
    out, state = trees.step(tx, sized(0, 1.0), value=2.0, unused=1.0)
    chex.assert_trees_all_close(out, sized(0, 2.0), rtol=1e-6)
    _, state = trees.step(tx, BAD["nan"], state, value=2.0, unused=1.0)
    assert state.inner_state == 2.0
    trees.step(oc.skip_spikes(optax.sgd(1.0)), sized(0, 1.0), value=2.0)


def test_inside_of_multi_steps_the_mean_is_compared():
    """`MultiSteps` around it: the mean of the small batches is skipped or not."""
    tx = optax.MultiSteps(oc.skip_spikes(optax.sgd(1.0), 1.5), 2).gradient_transformation()
    samples = [jnp.array([x]) for x in (1.0, 3.0, 1.0, 1.0, -9.0, 1.0, 5.0, -4.0)]
    out, state = run(tx, samples)
    chex.assert_trees_all_close(jnp.concatenate(out[1::2]), jnp.array([0.0, -1.0, 0.0, -0.5]))
    assert state.inner_opt_state.total_skipped == 2


def test_around_multi_steps_the_small_batch_is_compared():
    """Around `MultiSteps`: a small batch that is a spike is dropped, and the mean is over the others."""
    tx = oc.skip_spikes(optax.MultiSteps(optax.sgd(1.0), 2).gradient_transformation(), 10.0)
    samples = [jnp.array([x]) for x in (1.0, np.nan, 50.0, 3.0, 4.0, np.inf, 6.0)]
    out, state = run(tx, samples)
    chex.assert_trees_all_close(jnp.concatenate(out), jnp.array([0.0, 0.0, 0.0, -2.0, 0.0, 0.0, -5.0]))
    assert (state.total_skipped, state.inner_state.gradient_step) == (3, 2)


@pytest.mark.parametrize("wrap", ["masked", "chain", full("partition")])
def test_as_a_part_of_an_optimizer(wrap):
    """Inside of a mask, a chain or a partition it sees what these give it."""
    inner = oc.skip_spikes(optax.sgd(1.0, momentum=0.5), 1.0)
    labels = {"bias": "a", "dense": "b", "scale": "a"}
    tx = {
        "masked": lambda: optax.masked(inner, {key: label == "a" for key, label in labels.items()}),
        "chain": lambda: optax.chain(optax.scale(2.0), inner, optax.scale(0.5)),
        "partition": lambda: optax.partition({"a": inner, "b": optax.identity()}, labels),
    }[wrap]()
    samples = [sized(0, 0.4), sized(1, 50.0), sized(2, 0.4)]
    out, _ = run(tx, samples, sized(9, 1.0))
    expected, _ = run(optax.sgd(1.0, momentum=0.5), samples[::2], sized(9, 1.0))
    keys = labels if wrap == "chain" else ["bias", "scale"]
    for actual, wanted in zip(out[::2], expected):
        chex.assert_trees_all_close({k: actual[k] for k in keys}, {k: wanted[k] for k in keys}, rtol=1e-6)
    assert not any(out[1][key].any() for key in keys)
    assert out[1]["dense"].any() == (wrap != "chain")


def test_leaves_of_other_kinds_in_a_skipped_step():
    """Booleans, float0, keys and functions come back as they are in a skipped step; integers are 0."""
    updates = {**trees.odd(), "weight": jnp.array([np.nan, 1.0])}
    tx = oc.skip_spikes(optax.identity(), 10.0)
    out, state = tx.update(updates, tx.init(updates))
    assert state.total_skipped == 1
    assert all(out[name] is updates[name] for name in ("none", "bool", "python_bool", "float0", "key", "function"))
    for name in ("weight", "int", "python_int"):
        chex.assert_trees_all_equal(out[name], jnp.zeros_like(updates[name]))


def test_updates_of_every_dtype_are_zeroed():
    """A skipped step keeps dtypes and shapes, and all is 0, complex numbers too."""
    updates = {**trees.mixed(0), "complex": jnp.array([3.0 + 4.0j])}
    out, _ = trees.step(oc.skip_spikes(optax.identity(), 1e-3), updates)
    chex.assert_trees_all_equal_shapes_and_dtypes(out, updates)
    assert not any(np.asarray(leaf.astype(jnp.complex64)).any() for leaf in jax.tree.leaves(out))


@pytest.mark.full
def test_line_search_inside():
    """L-BFGS, whose line search loops over the loss, can be wrapped; a skipped step keeps its memory."""
    loss = lambda w: jnp.sum((w - 1.0) ** 4)
    tx, params = oc.skip_spikes(optax.lbfgs(), 1e3), jnp.zeros(3)
    step = jax.jit(lambda w, g, s: tx.update(g, s, w, value=loss(w), grad=g, value_fn=loss))
    state, first = tx.init(params), loss(params)
    for i in range(6):
        updates, new_state = step(params, jax.grad(loss)(params) * (np.nan if i == 3 else 1.0), state)
        if i == 3:
            chex.assert_trees_all_equal(bits(new_state.inner_state), bits(state.inner_state))
        params, state = optax.apply_updates(params, updates), new_state
    assert loss(params) < 0.01 * first
    assert state.total_skipped == 1


@pytest.mark.full
def test_vmap_skips_for_each_member():
    """Under `vmap` each member skips by itself."""
    tx, params, samples = skipping("adamw"), sized(9, 1.0), [sized(0, 1.0), *BAD.values(), sized(2, 1.0)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *samples)
    state = tx.init(params)
    out, states = jax.jit(jax.vmap(lambda updates: tx.update(updates, state, params)))(stacked)
    alone = [trees.step(tx, updates, state, params)[0] for updates in samples]
    chex.assert_trees_all_close(out, jax.tree.map(lambda *leaves: jnp.stack(leaves), *alone), rtol=1e-5)
    chex.assert_trees_all_equal(states.total_skipped, jnp.array([0, 1, 1, 1, 1, 0]))


# On a mesh

SPECS = {"w": P("data"), "b": P()}


def halves(seed: int) -> dict:
    """A matrix to spread over four devices, and a vector."""
    random = np.random.default_rng(seed)
    return {"w": jnp.asarray(random.normal(size=(8, 6)), jnp.float32), "b": jnp.arange(3.0) - seed}


WRAPPED = {
    "skip_spikes": lambda: oc.skip_spikes(optax.adam(0.1), thresholds.z_score(2.0, 0.9, 2)),
    "with_error_feedback": lambda: oc.with_error_feedback(oc.clip_by_global_norm(0.5)),
    "clip_randomly": lambda: oc.clip_randomly(oc.clip_by_global_norm(0.5), 0.5),
}
FACTORS = (1.0, 1.1, 0.9, 100.0, np.nan, 1.0)


@pytest.mark.full
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
@pytest.mark.parametrize("name", WRAPPED)
def test_jit_on_a_mesh_is_one_device(name, kind):
    """Updates, draws and skipped steps are those of one device, and updates lie where the gradients lie."""
    tx, mesh = WRAPPED[name](), trees.mesh(kind, data=4)
    samples = [jax.tree.map(lambda x, f=f: f * x, halves(0)) for f in FACTORS]
    place = lambda tree: {key: jax.device_put(x, NamedSharding(mesh, SPECS[key])) for key, x in tree.items()}
    expected = run(tx, samples, samples[0])
    with jax.set_mesh(mesh):
        actual = run(tx, [place(tree) for tree in samples], place(samples[0]))
    chex.assert_trees_all_close(jax.device_get(actual), jax.device_get(expected), rtol=1e-5, atol=1e-6)
    assert actual[0][0]["w"].sharding.is_equivalent_to(NamedSharding(mesh, SPECS["w"]), 2)


@pytest.mark.full
@pytest.mark.parametrize("name", ["skip_spikes", "with_error_feedback"])
def test_shard_map_is_one_device(name):
    """Inside `shard_map`, `init` and a scan of steps keep the types of leaves that vary, and all skip together."""
    tx, mesh = WRAPPED[name](), trees.mesh(data=4)
    factors = jnp.array(FACTORS)
    samples = jax.tree.map(lambda x: factors.reshape(-1, *[1] * x.ndim) * x, halves(0))

    def steps(samples):
        state = tx.init(jax.tree.map(lambda x: x[0], samples))
        state, out = jax.lax.scan(lambda state, updates: tx.update(updates, state)[::-1], state, samples)
        return out, state.total_skipped if name == "skip_spikes" else 0

    specs = {"w": P(None, "data"), "b": P()}
    inside = jax.shard_map(steps, mesh=mesh, in_specs=(specs,), out_specs=(specs, P()))
    chex.assert_trees_all_close(jax.jit(inside)(samples), jax.jit(steps)(samples), rtol=1e-5, atol=1e-6)


@pytest.mark.full
def test_axis_name_where_types_do_not_tell():
    """`skip_spikes` passes `axis_name` to its norm: a spike on one device skips the step on all."""
    tx, mesh = oc.skip_spikes(optax.identity(), 10.0, axis_name="data"), trees.mesh(data=4)
    gradients = jnp.ones(4).at[2].set(50.0)
    inside = lambda g: tx.update(g, tx.init(g))[0]
    step = jax.shard_map(inside, mesh=mesh, in_specs=P("data"), out_specs=P("data"), check_vma=False)
    chex.assert_trees_all_equal(jax.jit(step)(gradients), jnp.zeros(4))


@pytest.mark.full
def test_devices_of_shard_map_draw_by_themselves():
    """Shards of a leaf get draws of their own; a leaf that is whole gets the same on all devices."""
    tx, mesh = oc.clip_randomly(oc.clip(1.0), 0.5), trees.mesh(data=4)
    updates = {"w": jnp.full((4, 1000), 3.0), "b": jnp.full(1000, 3.0)}
    state = tx.init(updates)
    step = jax.shard_map(lambda u, s: tx.update(u, s)[0], mesh=mesh, in_specs=(SPECS, P()), out_specs=SPECS)
    out = jax.jit(step)(updates, state)
    mask = np.asarray(out["w"] == 1.0)
    assert all(0.4 < (mask[i] == mask[j]).mean() < 0.6 for i in range(4) for j in range(i))
    chex.assert_trees_all_equal(out["b"], trees.step(tx, updates, state)[0]["b"])


@pytest.mark.full
def test_draws_where_types_are_silent():
    """Inside `shard_map(check_vma=False)` a draw for each entry is an error, and one for a leaf is the same on all."""
    for per in ("element", "leaf"):
        tx = oc.clip_randomly(oc.clip(1.0), 0.5, per=per)
        inside = lambda u, tx=tx: tx.update(u, tx.init(u))[0]
        step = jax.shard_map(inside, mesh=trees.mesh(data=4), in_specs=P("data"), out_specs=P("data"), check_vma=False)
        if per == "leaf":
            assert len(np.unique(step(jnp.full((4, 8), 3.0)))) == 1
        else:
            with pytest.raises(ValueError, match=r"per must be 'leaf' inside pmap .*check_vma=True"):
                step(jnp.full((4, 8), 3.0))


# Error feedback


def test_feedback_follows_a_plain_loop():
    """u = clip(g + d), d = g + d - u, for 50 steps, for each entry."""
    random = np.random.default_rng(0)
    tx, carry, state = oc.with_error_feedback(oc.clip(1.0)), np.zeros(7), None
    for _ in range(50):
        gradient = np.float32(2 * random.standard_t(2, size=7))
        update, state = trees.step(tx, jnp.asarray(gradient), state)
        expected = np.clip(gradient + carry, -1, 1)
        carry = gradient + carry - expected
        chex.assert_trees_all_close((np.float64(update), np.float64(state.carry)), (expected, carry), atol=1e-4)


@pytest.mark.parametrize(
    "make",
    [
        lambda: oc.clip_by_leaf_norm(0.5),
        full(lambda: oc.zclip(1.0, 0.9, 2)),
        full(lambda: optax.chain(oc.clip_by_global_norm(1.0), oc.clip(0.1))),
        full(lambda: optax.clip_by_block_rms(0.1)),
    ],
    ids=["leaf", "zclip", "chain", "optax"],
)
def test_sums_are_kept(make):
    """For any clip and dtype, the sum of what comes out, plus the carry, is the sum of what went in."""
    tx, samples = oc.with_error_feedback(make()), [trees.mixed(i) for i in range(20)]
    out, state = run(tx, samples)
    chex.assert_trees_all_equal_shapes_and_dtypes(out[0], samples[0])
    total = lambda steps: jax.tree.map(
        lambda *leaves: np.sum([np.asarray(x, np.float64) for x in leaves], axis=0), *steps
    )
    kept = jax.tree.map(lambda x, carry: x + np.float64(carry), total(out), state.carry)
    chex.assert_trees_all_close(kept, total(samples), rtol=1e-5, atol=1e-4)
    assert max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(state.carry)) > 0.1


def test_feedback_removes_the_bias_of_clipping():
    """Of gradients whose rare large values carry the mean, clipped ones miss it and those with feedback do not."""
    random = np.random.default_rng(0)
    gradients = jnp.asarray(np.where(random.random(4000) < 0.05, 15.0, -0.25), jnp.float32)[:, None]  # mean 0.51

    def mean(tx):
        scan = lambda state, g: tx.update(g, state)[::-1]
        return float(jax.lax.scan(scan, tx.init(jnp.zeros(1)), gradients)[1].mean())

    assert mean(oc.clip(1.0)) == pytest.approx(-0.19, abs=0.02)
    assert mean(oc.with_error_feedback(oc.clip(1.0))) == pytest.approx(float(gradients.mean()), abs=0.05)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_bad_step_does_not_enter_the_carry(bad):
    """Where an update is not finite the carry stays; the step itself is as the clip makes it."""
    tx = oc.with_error_feedback(oc.clip_by_leaf_norm(0.5))
    _, before = trees.step(tx, sized(0, 3.0))
    out, after = trees.step(tx, broken(bad), before)
    assert jnp.isnan(out["dense"]).all()
    chex.assert_trees_all_equal(after.carry["dense"], before.carry["dense"])
    assert jnp.isfinite(out["bias"]).all()
    chex.assert_tree_all_finite(after.carry)


@pytest.mark.parametrize("dtype", [None, jnp.bfloat16, full("float16")])
def test_dtype_of_the_carry(dtype):
    """The carry is f32 unless asked for otherwise; updates keep their dtypes."""
    params = {**trees.mixed(0), "complex": jnp.ones(2, jnp.complex64)}
    tx = oc.with_error_feedback(oc.clip_by_leaf_norm(0.5), accumulator_dtype=dtype)
    out, state = trees.step(tx, params)
    chex.assert_trees_all_equal_shapes_and_dtypes(out, params)
    chex.assert_trees_all_equal_shapes_and_dtypes(state, tx.init(params))
    assert state.carry.pop("complex").dtype == jnp.complex64
    assert {leaf.dtype for leaf in jax.tree.leaves(state.carry)} == {jnp.dtype(dtype or jnp.float32)}


def test_rounding_of_updates_is_carried():
    """What updates lose to their dtype comes back, and what is beyond its range stays finite and is carried."""
    for dtype in (jnp.bfloat16, jnp.float16):
        gradient = jnp.full(3, 1.0, dtype)  # each entry comes out as 1 / sqrt(3)
        out, state = trees.step(oc.with_error_feedback(oc.clip_by_global_norm(1.0)), gradient)
        chex.assert_trees_all_close(np.asarray(out, np.float64) + np.float64(state.carry), np.ones(3), rtol=1e-6)
        assert abs(float(out[0]) - 3**-0.5) > 1e-5  # it was rounded
    for dtype in (jnp.float16, jnp.float8_e4m3fn):
        largest = float(jnp.finfo(dtype).max)
        tx = oc.with_error_feedback(oc.clip_by_global_norm(1e9))
        state = tx.init(jnp.zeros(1, dtype))._replace(carry=jnp.full(1, 0.5 * largest))
        out, state = trees.step(tx, jnp.full(1, largest, dtype), state)
        assert (float(out[0]), float(state.carry[0])) == (largest, 0.5 * largest)
    _, state = run(oc.with_error_feedback(oc.clip(1.0), accumulator_dtype=jnp.float16), [jnp.full(1, 6e4)] * 3)
    assert float(state.carry[0]) == 65504


def test_carry_of_64_bits():
    """With 64 bits, f64 leaves carry in f64."""
    with jax.enable_x64(True):
        updates = {"wide": jnp.full(2, 1.5, jnp.float64), "narrow": jnp.full(2, 1.5, jnp.float32)}
        out, state = trees.step(oc.with_error_feedback(oc.clip(1.0)), updates)
        chex.assert_trees_all_equal_shapes_and_dtypes(out, updates)
        chex.assert_trees_all_equal(state.carry, jax.tree.map(lambda x: x - 1.0, updates))
        chex.assert_trees_all_equal_shapes_and_dtypes(state.carry, updates)


def test_updates_that_are_none_keep_their_carry():
    """Where there is no update for a parameter, its carry waits; leaves without a norm carry nothing."""
    tx = oc.with_error_feedback(oc.clip(0.1))
    _, before = trees.step(tx, sized(0, 3.0))
    out, after = trees.step(tx, {**sized(1, 3.0), "bias": None}, before)
    assert out["bias"] is None
    chex.assert_trees_all_equal(after.carry["bias"], before.carry["bias"])
    updates = trees.odd()
    _, state = tx.update(updates, tx.init(updates))
    assert [key for key, leaf in state.carry.items() if isinstance(leaf, jax.Array)] == ["weight"]


# Random clipping


@functools.cache
def drawing(per: str):
    """A compiled step of a clip to 1 that is random, of the probability too."""
    tx = lambda probability: oc.clip_randomly(oc.clip(1.0), probability, per=per)
    return jax.jit(lambda probability, updates, state: tx(probability).update(updates, state))


def masks(updates, probability: float, *, seed=0, steps: int = 1, per: str = "element") -> list:
    """For each step, which entries came out clipped."""
    state, out = oc.clip_randomly(oc.clip(1.0), 0.5, seed, per=per).init(updates), []
    for _ in range(steps):
        new, state = drawing(per)(jnp.float32(probability), updates, state)
        out.append(jax.tree.map(lambda a, b: np.asarray(a != b), new, updates))
    return out


@pytest.mark.parametrize("probability", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_the_share_that_is_clipped(probability):
    """It is the probability, to five standard deviations; 0 and 1 are never and always."""
    near = lambda mask, count: abs(mask.mean() - probability) <= 5 * (probability * (1 - probability) / count) ** 0.5
    for mask in masks({"matrix": jnp.full((300, 400), 3.0), "vector": jnp.full(50_000, 3.0)}, probability, steps=3):
        assert all(near(leaf, leaf.size) for leaf in mask.values())
    leaves = np.array(masks([jnp.full(2, 3.0)] * 5, probability, steps=200, per="leaf"))  # [steps, leaves, entries]
    assert (leaves.all(axis=2) == leaves.any(axis=2)).all()
    assert near(leaves, 1000)
    if 0 < probability < 1:  # neither the same leaves in each step, nor all of a step together
        assert leaves.any(axis=(0, 2)).all()
        assert not leaves.all(axis=(1, 2)).all()


def test_leaves_and_steps_draw_by_themselves():
    """Leaves of one shape, steps and seeds agree in half of all entries."""
    updates = [jnp.full((100, 100), 3.0)] * 2
    found = [leaf for seed in (0, 1) for step in masks(updates, 0.5, seed=seed, steps=2) for leaf in step]
    assert all(abs((mask == other).mean() - 0.5) < 0.025 for i, mask in enumerate(found) for other in found[:i])


def test_a_seed_gives_the_same_draws():
    """The same seed gives the same draws, as any kind of int or as a key, whatever jax uses for other keys."""
    of_seed = lambda seed: masks(jnp.full(1000, 3.0), 0.5, seed=seed)[0]
    same = [of_seed(seed) for seed in (5, np.int64(5), jnp.int32(5), jax.random.key(5), jax.random.PRNGKey(5))]
    with jax.default_prng_impl("rbg"):
        same.append(of_seed(5))
    with jax.enable_x64(True):
        same.append(of_seed(5))
    assert all((mask == same[0]).all() for mask in same)
    others = [of_seed(seed) for seed in (6, -1, jax.random.key(5, impl="rbg"))]
    assert all(0.4 < (mask == same[0]).mean() < 0.6 for mask in others)


def test_a_probability_of_nan_clips_all():
    """A traced probability that is NaN never lets an entry pass unclipped."""
    assert all(mask.all() for mask in masks(jnp.full(1000, 3.0), np.float32(np.nan), steps=2))


def test_the_key_advances():
    """The state holds two words of a key, which change in each step, and the run goes on from them."""
    tx, updates = oc.clip_randomly(oc.clip(1.0), 0.5, 3), jnp.full(1000, 3.0)
    first, state = trees.step(tx, updates)
    chex.assert_shape(state.clip_key, (2,))
    assert state.clip_key.dtype == jnp.uint32
    assert (state.clip_key != tx.init(updates).clip_key).any()
    second, _ = trees.step(tx, updates, state)
    assert (first != second).any()
    chex.assert_trees_all_equal(trees.step(tx, updates, jax.tree.map(np.asarray, state))[0], second)


def test_the_clip_sees_all_updates():
    """Norms are those of all updates, and each entry is as it came or as the clip alone makes it."""
    updates, alone = sized(0, 3.0), oc.clip_by_global_norm(1.0)
    out, state = trees.step(oc.clip_randomly(alone, 0.5, 1), updates)
    clipped, alone_state = trees.step(alone, updates)
    chex.assert_trees_all_close(state.inner_state, alone_state, rtol=1e-6)
    for x, y, z in zip(*map(jax.tree.leaves, (out, updates, clipped))):
        chex.assert_trees_all_close(jnp.minimum(jnp.abs(x - y), jnp.abs(x - z)), jnp.zeros_like(x), atol=1e-6)


@pytest.mark.full
def test_a_seed_may_be_traced():
    """Under `vmap` over seeds each member draws by itself."""
    updates = jnp.full(100, 3.0)

    def of_seed(seed):
        tx = oc.clip_randomly(oc.clip(1.0), 0.5, seed)
        return tx.update(updates, tx.init(updates))[0]

    many = jax.jit(jax.vmap(of_seed))(jnp.array([5, 6]))
    assert 0.2 < (many[0] == many[1]).mean() < 0.8


# All three


@pytest.mark.parametrize("wrap", [oc.with_error_feedback, functools.partial(oc.clip_randomly, probability=0.5)])
def test_extra_arguments_reach_the_clip(wrap):
    """What is wrapped gets extra keyword arguments."""
    out, state = trees.step(wrap(with_value()), {"x": jnp.ones(50)}, value=2.0, unused=1.0)
    assert (out["x"] == 2.0).any()
    assert state.inner_state == 2.0


def test_map_params():
    """`optax.tree.map_params` takes the carry and the moments of an optimizer inside for params, and a key for none."""
    params, names = sized(0, 1.0), {"bias": "b", "dense": "d", "scale": "s"}
    mapped = {
        name: optax.tree.map_params(WRAPPED[name](), lambda x, n: n, WRAPPED[name]().init(params), names)
        for name in WRAPPED
    }
    assert mapped["skip_spikes"].inner_state[0].mu == names
    assert mapped["with_error_feedback"].carry == names
    assert mapped["clip_randomly"].clip_key.shape == (2,)


@pytest.mark.full
@pytest.mark.parametrize("name", WRAPPED)
def test_derivatives_at_zero(name):
    """The derivative through a step is finite, at zero too."""
    tx = {**WRAPPED, "skip_spikes": lambda: oc.skip_spikes(oc.clip_by_leaf_norm(0.5), 1.0)}[name]()
    loss = lambda updates: optax.tree.sum(tx.update(updates, tx.init(updates))[0])
    for norm in (1.0, 0.0):
        chex.assert_tree_all_finite(jax.jit(jax.grad(loss))(sized(0, norm)))


# Errors


@pytest.mark.parametrize(
    ("make", "error", "text"),
    [
        (
            lambda: oc.skip_spikes(oc.global_norm),
            TypeError,
            r"^inner must be an Optax transformation, got function.*adamw",
        ),
        (lambda: oc.skip_spikes(optax.sgd(0.1), -1.0), ValueError, r"^threshold must be >= 0, got -1\. "),
        (lambda: oc.skip_spikes(optax.sgd(0.1), np.nan), ValueError, r"^threshold must be a number, got nan"),
        (lambda: oc.skip_spikes(optax.sgd(0.1), True), TypeError, r"^threshold must be a number.*got bool True"),
        (lambda: oc.skip_spikes(optax.sgd(0.1), jnp.ones(2)), ValueError, r"^threshold must be a scalar.*\(2,\)"),
        (lambda: oc.skip_spikes(optax.sgd(0.1), 1.0, norm=2.0), TypeError, "^norm must be a function"),
        (
            lambda: oc.skip_spikes(optax.sgd(0.1), 1.0, norm=oc.leaf_norm, axis_name="data"),
            ValueError,
            r"axis_name.*functools\.partial",
        ),
        (lambda: oc.with_error_feedback(1.0), TypeError, r"^clip must be an Optax transformation, got float 1\.0"),
        (lambda: oc.with_error_feedback(oc.clip), TypeError, "^clip must be an Optax.*got function.*For example"),
        (
            lambda: oc.with_error_feedback(oc.clip(1.0), accumulator_dtype=jnp.int8),
            TypeError,
            "^accumulator_dtype must be floating, got int8. Pass jnp.float32",
        ),
        (lambda: oc.clip_randomly(None, 0.5), TypeError, "^clip must be an Optax transformation, got NoneType"),
        (lambda: oc.clip_randomly(oc.clip(1.0), 1.5), ValueError, r"^probability must be <= 1, got 1\.5"),
        (lambda: oc.clip_randomly(oc.clip(1.0), -0.1), ValueError, r"^probability must be >= 0, got -0\.1"),
        (lambda: oc.clip_randomly(oc.clip(1.0), np.nan), ValueError, "^probability must be a number"),
        (lambda: oc.clip_randomly(oc.clip(1.0), "half"), TypeError, "^probability must be a number"),
        (lambda: oc.clip_randomly(oc.clip(1.0), 0.5, 0.5), TypeError, r"^seed must be an int or a key, got float 0\.5"),
        (lambda: oc.clip_randomly(oc.clip(1.0), 0.5, None), TypeError, "^seed must be an int or a key"),
        (lambda: oc.clip_randomly(oc.clip(1.0), 0.5, True), TypeError, "^seed must be an int or a key"),
        (
            lambda: oc.clip_randomly(oc.clip(1.0), 0.5, per="row"),
            ValueError,
            r"^per must be one of \('element', 'leaf'\)",
        ),
    ],
)
def test_errors(make, error, text):
    """What cannot work is an error at construction that names the argument and its value."""
    with pytest.raises(error, match=text):
        make()


@pytest.mark.parametrize("name", WRAPPED)
def test_a_state_of_another_transformation_is_an_error(name):
    """The text says which state came and which is needed."""
    tx, updates = WRAPPED[name](), jnp.ones(2)
    needed = type(tx.init(updates)).__name__
    with pytest.raises(TypeError, match=needed) as caught:
        tx.update(updates, oc.clip(1.0).init(updates))
    assert "ValueClipState" in str(caught.value)


def test_a_carry_of_another_tree_is_an_error():
    """Updates of another structure or other shapes than the parameters that `init` saw are refused."""
    tx = oc.with_error_feedback(oc.clip(1.0))
    with pytest.raises(ValueError, match=r"^state\.carry must be .*only one of them has \['y'\]"):
        tx.update({"x": jnp.ones(2)}, tx.init({"y": jnp.ones(2)}))
    with pytest.raises(ValueError, match=r"^state\.carry .* got \(3,\) for \(2, 3\) at the root"):
        tx.update(jnp.ones((2, 3)), tx.init(jnp.ones(3)))
    with pytest.raises(ValueError, match=r"got None for \(2,\) at \['x'\]"):
        tx.update({"x": jnp.ones(2)}, tx.init({"x": None}))


@pytest.mark.parametrize("norm", [oc.global_norm, oc.leaf_norm, oc.unit_norm], ids=lambda norm: norm.__name__)
def test_a_step_under_a_threshold_of_nan_is_skipped(norm):
    """A threshold that is NaN only in the compiled program skips the step at every scope."""
    grads = {"w": jnp.ones((2, 3)), "b": jnp.ones(2)}

    def update(threshold):
        tx = oc.skip_spikes(optax.sgd(1.0), threshold, norm=norm)
        return tx.update(grads, tx.init(grads))[0]

    chex.assert_trees_all_equal(jax.jit(update)(jnp.nan), jax.tree.map(jnp.zeros_like, grads))


def test_the_share_of_skipped_steps_where_counters_saturate():
    """The rate of skipped steps is right where counters stay at the largest i32."""
    tx, x, most = oc.skip_spikes(optax.identity(), 10.0), jnp.array([300.0]), jnp.int32(2**31 - 1)
    state = tx.init(x)
    state = state._replace(total_skipped=most, measured=state.measured._replace(clip_step=most))
    assert tx.update(x, state)[1].measured.clip_rate == 0.5

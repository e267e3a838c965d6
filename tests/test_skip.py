"""Skipping by norm and loss: the truth table, rules that start afresh, and the loss on its way through a training."""

import functools

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

import optax_clip as oc
from optax_clip import thresholds

LARGEST = np.finfo(np.float32).max
ONE = jnp.ones(1)


def run(tx, norms, values=None, state=None):
    """Whether each step was skipped, and the last state: a compiled loop over steps with these norms and losses."""
    norms = jnp.asarray(norms, jnp.float32)
    values = jnp.zeros_like(norms) if values is None else jnp.asarray(values, jnp.float32)
    skipped, state = _compiled(tx)(norms, values, tx.init(ONE) if state is None else state)
    return np.asarray(skipped), state


@functools.lru_cache(maxsize=64)
def _compiled(tx):
    def step(state, norm_and_value):
        norm, value = norm_and_value
        _, state = tx.update(ONE * norm, state, value=value)
        return state, state.consecutive_skipped > 0

    def loop(norms, values, state):
        state, skipped = jax.lax.scan(step, state, (norms, values))
        return skipped, state

    return jax.jit(loop)


# The truth table


def counting(limit):
    """A rule with a constant threshold that counts the steps it saw."""
    return optax.GradientTransformation(
        lambda norm: jnp.zeros_like(norm), lambda norm, seen, _=None: (jnp.full_like(norm, limit), seen + 1)
    )


COUNTED = oc.skip_spikes(optax.sgd(1.0), counting(10.0), value_threshold=counting(-1.0), max_consecutive=3)
NAN, INF = np.nan, np.inf
TABLE = {  # norm, value, skipped in a row -> skipped in a row after it, steps that both rules saw, after 2 before
    "below both": (5.0, -2.0, 0, 0, 3),
    "at both": (10.0, -1.0, 0, 0, 3),
    "below both, after many": (5.0, -2.0, 9, 0, 3),
    "norm above": (11.0, -2.0, 0, 1, 2),
    "value above": (5.0, 0.0, 0, 1, 2),
    "both above": (11.0, 0.0, 2, 3, 2),
    "norm above, too late": (11.0, -2.0, 3, 0, 1),
    "value above, too late": (5.0, 0.0, 3, 0, 1),
    "both above, too late": (11.0, 0.0, 9, 0, 1),
    "norm NaN": (NAN, -2.0, 0, 1, 2),
    "norm inf": (INF, -2.0, 2, 3, 2),
    "norm NaN, too late": (NAN, -2.0, 3, 4, 2),
    "norm inf, too late": (INF, -2.0, 9, 10, 2),
    "value NaN": (5.0, NAN, 0, 1, 2),
    "value inf": (5.0, INF, 1, 2, 2),
    "value -inf": (5.0, -INF, 0, 1, 2),
    "value NaN, too late": (5.0, NAN, 3, 4, 2),
    "value inf, too late": (5.0, INF, 3, 4, 2),
    "value -inf, too late": (5.0, -INF, 9, 10, 2),
    "norm above, value NaN, too late": (11.0, NAN, 3, 4, 2),
    "norm NaN, value above, too late": (NAN, 0.0, 3, 4, 2),
}


@pytest.mark.parametrize("row", TABLE)
def test_truth_table(row):
    """Each row: the step is taken or not, rules go on, stay or start afresh, and counters and reasons are right."""
    norm, value, before, after, seen = TABLE[row]
    _, state = run(COUNTED, [5.0, 5.0], [-2.0, -2.0])
    state = state._replace(total_skipped=jnp.int32(20), consecutive_skipped=jnp.int32(before))
    updates, state = trees.step(COUNTED, ONE * norm, state, value=jnp.float32(value))
    chex.assert_trees_all_equal(updates, 0 * ONE if after else -norm * ONE)
    chex.assert_trees_all_equal((state.total_skipped, state.consecutive_skipped), (20 + bool(after), after))
    chex.assert_trees_all_equal((state.measured.rule, state.measured_value.rule), (np.float32(seen),) * 2)
    assert state.measured.clip_step == state.measured_value.clip_step == 2 + (not after)
    metrics = oc.clip_metrics(state)
    assert metrics["skip/by_norm"] == bool(after and not norm <= 10)
    assert metrics["skip/by_value"] == bool(after and not (-INF < value <= -1))


def test_with_a_number_one_of_many_is_taken():
    """Where every step is above a number, one step of `max_consecutive` + 1 is taken; with None no step."""
    for most, every in ((1, 2), (4, 5)):
        skipped, _ = run(oc.skip_spikes(optax.sgd(1.0), 1.0, max_consecutive=most), [2.0] * 20)
        np.testing.assert_array_equal(skipped, np.arange(1, 21) % every != 0)
    assert run(oc.skip_spikes(optax.sgd(1.0), 1.0), [2.0] * 210)[0].sum() == 208  # the default is 100
    assert run(oc.skip_spikes(optax.sgd(1.0), 1.0, max_consecutive=None), [2.0] * 210)[0].all()


def test_bad_steps_are_never_taken_and_count():
    """However many steps are not finite, none is taken; the next finite spike then is, as its turn has come."""
    tx = oc.skip_spikes(optax.sgd(1.0), 1.0, max_consecutive=3)
    skipped, state = run(tx, [0.5, *[NAN, INF] * 10, 2.0, 2.0])
    np.testing.assert_array_equal(skipped, [False, *[True] * 20, False, True])
    assert state.total_skipped == 21


# The rule against plain NumPy

WATCHED = {
    "z_score": (lambda: thresholds.z_score(6.0, 0.95, 20), lambda: reference.Zclip(6.0, 0.95, 20)),
    "sigma_window": (lambda: thresholds.sigma_window(5.0, 32), lambda: reference.ClipBySigma(5.0, 32)),
}


def stream(seed: int, steps: int = 1000) -> tuple[np.ndarray, np.ndarray]:
    """Norms and losses: noise around a drift from 5 to -9 with a step up, spikes, and some that are not finite."""
    random = np.random.default_rng(seed)
    norms = np.exp(0.2 * random.normal(size=steps) + np.linspace(0, 1, steps))
    values = np.linspace(5, -9, steps) + 0.3 * random.normal(size=steps)
    values[600:] += 6.0
    norms[300:] *= 4.0
    for numbers in (norms, values):
        numbers[random.random(steps) < 0.02] += 30.0
        bad = np.flatnonzero(random.random(steps) < 0.01)
        numbers[bad] = random.choice([NAN, INF], len(bad))
    values[random.integers(steps, size=3)] = -INF
    return np.float32(norms), np.float32(values)


@pytest.mark.parametrize("name", WATCHED)
def test_same_steps_as_the_rule_in_numpy(name):
    """Over 1000 norms and losses with spikes, drift, shifts, NaN and losses below 0 the same steps are skipped."""
    rule, plain = WATCHED[name]
    both = oc.skip_spikes(optax.sgd(1.0), rule(), value_threshold=rule(), max_consecutive=10)
    by_value = oc.skip_spikes(optax.sgd(1.0), value_threshold=rule(), max_consecutive=10)
    for seed in range(3):
        norms, values = stream(seed)
        expected = reference.SkipSpikes(plain(), plain(), most=10)
        expected = [expected(*pair) for pair in zip(np.float64(norms), np.float64(values))]
        skipped, state = run(both, norms, values)
        np.testing.assert_array_equal(skipped, expected)
        assert 40 < state.total_skipped < 150
        assert values[~skipped].min() < -1
        alone = reference.SkipSpikes(plain(), most=10)
        norms = np.ones_like(norms)
        np.testing.assert_array_equal(run(by_value, norms, values)[0], [alone(x) for x in np.float64(values)])


@pytest.mark.parametrize("name", WATCHED)
def test_one_nan_skips_one_step(name):
    """A NaN among healthy losses or norms skips its own step and no other."""
    tx = oc.skip_spikes(optax.sgd(1.0), WATCHED[name][0](), value_threshold=WATCHED[name][0]())
    random = np.random.default_rng(0)
    values, norms = 3 + 0.1 * random.normal(size=300), 1 + 0.1 * random.random(300)
    values[100], norms[200] = NAN, INF
    np.testing.assert_array_equal(np.flatnonzero(run(tx, norms, values)[0]), [100, 200])


# Rules that start afresh


def test_training_goes_on_where_norms_double_for_good():
    """Norms double at step 200: `max_consecutive` steps are lost, then none; without it all steps are."""
    norms = 1 + 0.05 * np.random.default_rng(0).normal(size=500)
    norms[200:] *= 2
    rule = thresholds.z_score(z_max=6.0)
    skipped, state = run(oc.skip_spikes(optax.sgd(1.0), rule), norms)
    np.testing.assert_array_equal(np.flatnonzero(skipped), np.arange(200, 300))
    np.testing.assert_allclose(state.measured.rule.mean, 2.0, rtol=0.02)
    assert run(oc.skip_spikes(optax.sgd(1.0), rule, max_consecutive=None), norms)[0].sum() == 300


def test_afresh_is_what_a_new_rule_keeps_of_that_step():
    """After the late step each rule holds what it holds after one step of a run that begins there, in every block."""
    rule = optax.chain(optax.ema(0.9), optax.scale(1.5))  # counts its steps
    for norm in (oc.leaf_norm, oc.unit_norm):
        tx = oc.skip_spikes(optax.sgd(1.0), rule, norm=norm, value_threshold=rule, max_consecutive=2)
        step = functools.partial(trees.step, tx)
        state = None
        for size, skipped in ((1.0, 0), (1.1, 0), (5.0, 1), (5.0, 2), (5.0, 0)):
            _, state = step(trees.small(0, size), state, value=jnp.float32(size))
            assert state.consecutive_skipped == skipped
        _, fresh = step(trees.small(0, 5.0), value=jnp.float32(5.0))
        chex.assert_trees_all_equal(state.measured.rule, fresh.measured.rule)
        chex.assert_trees_all_equal(state.measured_value.rule, fresh.measured_value.rule)


def test_rules_with_parameters_start_afresh():
    """A rule around a share of the parameters sees them in the late step, too."""
    rule = thresholds.minimum(thresholds.param_fraction(1.0), thresholds.quantile(100.0, 4))
    tx, params = oc.skip_spikes(optax.sgd(1.0), rule, max_consecutive=1), 2 * ONE
    state = None
    for norm, skipped in ((1.0, 0), (3.0, 1), (3.0, 0)):
        _, state = trees.step(tx, norm * ONE, state, params)
        assert state.consecutive_skipped == skipped
    assert state.measured.rule[1].filled == 1


def test_a_tree_without_leaves():
    """Nothing to measure: every step is taken."""
    tx = oc.skip_spikes(optax.sgd(1.0), thresholds.z_score(), value_threshold=thresholds.z_score())
    _, state = trees.step(tx, {}, value=1.0)
    assert (state.total_skipped, state.measured_value.rule.seen) == (0, 1)


# Losses below 0


def test_sigma_window_of_negative_numbers():
    """Windows of numbers below 0 have the mean and the deviation of NumPy, and skip few normal losses."""
    tx = oc.skip_spikes(optax.sgd(1.0), value_threshold=thresholds.sigma_window(6.0, 4))
    _, state = run(tx, [1.0] * 5, [-5.0, -5.1, -4.9, -5.0, -5.0])
    np.testing.assert_allclose(state.measured_value.threshold, -5 + 6 * np.std([5.0, 5.1, 4.9, 5.0]), rtol=1e-6)
    values = -100 + np.random.default_rng(0).normal(size=400)
    tx = oc.skip_spikes(optax.sgd(1.0), value_threshold=thresholds.sigma_window(4.0, 128))
    assert run(tx, [1.0] * 400, values)[0].sum() <= 1


def test_thresholds_below_0():
    """A number or a schedule below 0 is compared and reported as it is; it counts the steps taken."""
    tx = oc.skip_spikes(optax.sgd(1.0), value_threshold=-2.0)
    skipped, state = run(tx, [1.0] * 4, [-3.0, -2.0, -1.5, 4.0])
    np.testing.assert_array_equal(skipped, [False, False, True, True])
    assert state.measured_value.threshold == -2
    tx = oc.skip_spikes(optax.sgd(1.0), value_threshold=lambda step: -1.0 - step)
    skipped, state = run(tx, [1.0] * 4, [-1.0, -1.0, -2.0, -3.0])
    np.testing.assert_array_equal(skipped, [False, True, False, False])
    assert state.measured_value.threshold == -3


# The loss on its way


@pytest.mark.parametrize(
    "value", [2, 2.0, np.float64(2.0), np.float32(2.0), jnp.bfloat16(2.0), jnp.float16(2.0), jnp.int32(2)]
)
def test_kinds_of_values(value):
    """A loss may be any real number; the state holds f32."""
    tx = oc.skip_spikes(optax.sgd(1.0), value_threshold=2.0)
    for update in (tx.update, jax.jit(tx.update)):
        out, state = update(ONE, tx.init(ONE), value=value)
        chex.assert_trees_all_equal(out, -ONE)
        chex.assert_trees_all_equal(state.measured_value.norm, jnp.float32(2))
        chex.assert_trees_all_equal_dtypes(state, tx.init(ONE))
        assert update(ONE, state, value=value * 2)[1].total_skipped == 1


def test_losses_in_64_bits():
    """Finite losses above the range of f32 are finite, and dtypes of the state stay."""
    with jax.enable_x64(True):
        tx = oc.skip_spikes(optax.sgd(1.0), value_threshold=thresholds.z_score())
        state = tx.init(jnp.ones(1))
        for value, total in ((1e300, 0), (1.0, 0), (np.inf, 1)):
            _, new = jax.jit(tx.update)(jnp.ones(1), state, value=jnp.float64(value))
            chex.assert_trees_all_equal_shapes_and_dtypes(new, state)
            assert new.total_skipped == total
            state = new


def test_metrics_say_why():
    """Loss and thresholds are shown as they are, one that does not exist yet as the largest number, with reasons."""
    tx = oc.skip_spikes(optax.sgd(1.0), value_threshold=thresholds.sigma_window(3.0, 4))
    state, seen = tx.init(ONE), []
    assert oc.clip_metrics(oc.skip_spikes(optax.sgd(1.0)).init(ONE)).keys() == {
        f"skip/{name}" for name in ("norm", "norm_threshold", "by_norm", "total", "consecutive")
    }
    for norm, value in ((1.0, 2.0), (1.0, 4.0), (1.0, 9.0), (NAN, 9.0), (1.0, NAN), (1.0, 3.0)):
        _, state = trees.step(tx, norm * ONE, state, value=jnp.float32(value))
        metrics = oc.clip_metrics(state)
        chex.assert_shape(metrics.values(), ())
        assert metrics["skip/norm_threshold"] == LARGEST
        seen.append([float(metrics[f"skip/{x}"]) for x in ("value", "value_threshold", "by_norm", "by_value", "total")])
    np.testing.assert_array_equal(
        seen,
        [
            [2, LARGEST, 0, 0, 0],
            [4, LARGEST, 0, 0, 0],
            [9, 6, 0, 1, 1],
            [9, 6, 1, 1, 2],
            [NAN, NAN, 0, 1, 3],
            [3, 6, 0, 0, 3],
        ],
    )


def test_value_reaches_the_optimizer():
    """`reduce_on_plateau` inside gets the loss; skipped steps leave no trace in it."""
    plateau = optax.contrib.reduce_on_plateau(factor=0.5, patience=1)
    tx = oc.skip_spikes(optax.chain(optax.sgd(1.0), plateau), value_threshold=5.0)
    state, sizes = None, []
    for value in (2.0, 2.0, NAN, 9.0, 2.0):
        updates, state = trees.step(tx, ONE, state, value=jnp.float32(value))
        sizes.append(-float(updates[0]))
    assert sizes == [1.0, 0.5, 0.0, 0.0, 0.25]


def test_value_is_not_needed_without_a_threshold():
    """Without `value_threshold` nothing of the value is read: a NaN or a vector passes on to the optimizer."""
    tx = oc.skip_spikes(optax.sgd(1.0))
    for value in (None, NAN, jnp.ones(3)):
        chex.assert_trees_all_equal(tx.update(ONE, tx.init(ONE), value=value)[0], -ONE)
    assert tx.init(ONE).measured_value is None


def test_multi_steps_inside_judges_each_small_batch():
    """Around `MultiSteps` a bad small batch is left out and another one taken, by its loss, too."""
    tx = oc.skip_spikes(optax.MultiSteps(optax.sgd(1.0), 2).gradient_transformation(), 50.0, value_threshold=5.0)
    state, out = None, []
    for gradient, value in ((1.0, 1.0), (2.0, 9.0), (NAN, 1.0), (3.0, 1.0), (90.0, 1.0), (4.0, 2.0), (6.0, 2.0)):
        updates, state = trees.step(tx, gradient * ONE, state, value=jnp.float32(value))
        out.append(float(updates[0]))
    assert out == [0, 0, 0, -2, 0, 0, -5]


def test_multi_steps_outside_sees_the_last_loss_only():
    """Inside of `MultiSteps` only the last loss counts, and a NaN stays in the sum of gradients for ever."""
    steps = optax.MultiSteps(oc.skip_spikes(optax.sgd(1.0), value_threshold=5.0), 2)
    tx = optax.GradientTransformationExtraArgs(steps.init, steps.update)  # gradient_transformation() drops the loss

    def outputs(samples):
        state, out = None, []
        for gradient, value in samples:
            updates, state = trees.step(tx, gradient * ONE, state, value=jnp.float32(value))
            out.append(float(updates[0]))
        return out

    assert outputs([(1.0, 9.0), (1.0, 1.0)]) == [0, -1]
    assert outputs([(1.0, 1.0), (1.0, 9.0)]) == [0, 0]
    assert outputs([(NAN, 1.0), *[(1.0, 1.0)] * 5]) == [0] * 6


# In compiled programs and on meshes


@pytest.mark.full
def test_compiled_is_eager_and_nothing_is_traced_twice():
    """Eager and compiled steps agree to the bit in what they decide; one trace serves all steps."""
    rule = thresholds.sigma_window(3.0, 4)
    tx = oc.skip_spikes(optax.adam(0.1), rule, value_threshold=rule, max_consecutive=2)
    chex.clear_trace_counter()
    update = jax.jit(chex.assert_max_traces(lambda g, s, v: tx.update(g, s, value=v), n=1))
    eager = compiled = tx.init(ONE)
    for norm, value in zip(*(numbers[:12] for numbers in stream(0))):
        norm, value = norm * (50 if norm > 1.5 else 1), jnp.float32(value)
        _, eager = tx.update(norm * ONE, eager, value=value)
        _, compiled = update(norm * ONE, compiled, value)
        chex.assert_trees_all_close(eager, compiled, rtol=1e-5)
    assert eager.total_skipped > 2


def test_no_constant_nan_or_inf():
    """Healthy steps are silent under the flags that look for NaN and inf, losses below 0 included."""
    rule = thresholds.z_score(6.0, warmup_steps=2)
    tx = oc.skip_spikes(optax.sgd(1.0), rule, value_threshold=rule, max_consecutive=1)
    for update, infs in ((jax.jit(tx.update), True), (tx.update, False)):  # a constant inf is no error once compiled
        with jax.debug_nans(True), jax.debug_infs(infs):
            state = tx.init(ONE)
            for value in (-1.0, 0.0, -2.0, -1.0, 50.0, 50.0):
                _, state = update(ONE, state, value=jnp.float32(value))
            assert state.total_skipped == 1
            assert state.consecutive_skipped == 0


def test_donated_state():
    """The state can be donated from `init` on."""
    tx = oc.skip_spikes(optax.adam(0.1), thresholds.z_score(), value_threshold=thresholds.sigma_window(3.0, 4))
    step = jax.jit(lambda g, s, v: tx.update(g, s, value=v), donate_argnums=1)
    state = tx.init(ONE)
    for value in (1.0, 2.0, NAN):
        old = jax.tree.leaves(state.inner_state)
        _, state = step(ONE, state, jnp.float32(value))
        assert all(leaf.is_deleted() for leaf in old)
    assert state.total_skipped == 1


def test_vmap_over_thresholds():
    """A sweep over both thresholds and `max_consecutive` is one program, each member with its own decisions."""

    def total(threshold, value_threshold, most):
        tx = oc.skip_spikes(optax.sgd(1.0), threshold, value_threshold=value_threshold, max_consecutive=most)
        return _compiled(tx)(jnp.arange(8.0), -jnp.arange(8.0), tx.init(ONE))[1].total_skipped

    grid = (jnp.array([3.0, 9.0, 9.0, 3.0]), jnp.array([9.0, -2.5, 9.0, 9.0]), jnp.array([9, 9, 9, 2]))
    chex.assert_trees_all_equal(jax.jit(jax.vmap(total))(*grid), jnp.array([4, 3, 0, 3]))
    tx = optax.inject_hyperparams(lambda limit: oc.skip_spikes(optax.sgd(1.0), value_threshold=limit))(limit=-1.0)
    assert trees.step(tx, ONE, value=jnp.float32(0.0))[1].inner_state.total_skipped == 1


@pytest.mark.full
def test_derivatives_pass_a_skipped_step():
    """Derivatives by gradient and loss are finite, and those of the steps taken, where a loss is NaN."""

    def last(gradient, scale):
        tx = oc.skip_spikes(optax.adam(0.1), value_threshold=thresholds.z_score(2.0, 0.9, 2))
        w, state = jnp.ones(2), tx.init(jnp.ones(2))
        for factor, value in ((1.0, 1.0), (2.0, 2.0), (5.0, NAN), (5.0, 99.0), (3.0, 1.5)):
            updates, state = tx.update(factor * gradient, state, value=value * scale)
            w += updates
        return jnp.sum(w**2)

    slopes = jax.jit(jax.grad(last, (0, 1)))(jnp.array([0.3, -0.2]), 1.0)
    chex.assert_tree_all_finite(slopes)
    assert np.any(slopes[0])


@pytest.mark.full
def test_sharded_like_one_device():
    """On a mesh, with gradients in shards, decisions are those of one device."""
    mesh, rule = trees.mesh(data=4), thresholds.z_score(3.0, 0.9, 4)
    tx = oc.skip_spikes(optax.sgd(1.0), rule, value_threshold=rule, max_consecutive=5)
    grads = jax.device_put(jnp.ones(8), NamedSharding(mesh, P("data")))
    norms, values = (numbers[:40] for numbers in stream(1))

    def totals(ones):
        state, seen = tx.init(ones), []
        update = jax.jit(tx.update)
        for norm, value in zip(norms, values):
            _, state = update(ones * norm, state, value=jnp.float32(value))
            seen.append(int(state.total_skipped))
        return seen

    assert totals(grads) == totals(jnp.ones(8))


def test_inside_shard_map_the_loss_must_be_the_mean_over_devices():
    """In `shard_map` a loss that differs between devices is an error; its `pmean` gives one decision for all."""
    tx, mesh = oc.skip_spikes(optax.sgd(1.0), value_threshold=thresholds.z_score(warmup_steps=1)), trees.mesh(data=4)

    def step(losses, mean):
        loss = jnp.sum(losses)
        value = jax.lax.pmean(loss, "data") if mean else loss
        grads = jnp.ones(2)
        _, state = tx.update(grads, tx.init(grads), value=value)
        return tx.update(grads, state, value=10 * value)[0]

    run = lambda mean: jax.jit(
        jax.shard_map(functools.partial(step, mean=mean), mesh=mesh, in_specs=P("data"), out_specs=P())
    )
    chex.assert_trees_all_equal(run(True)(jnp.arange(4.0)), jnp.zeros(2))
    with pytest.raises(
        ValueError, match=r"^value must be the same on all devices, got one that varies over \('data',\)"
    ):
        run(False)(jnp.arange(4.0))


# Errors


@pytest.mark.parametrize(
    "make, error, match",
    [
        (lambda: {"value_threshold": np.nan}, ValueError, "^value_threshold must be a number, got nan"),
        (lambda: {"value_threshold": jnp.ones(2)}, ValueError, r"^value_threshold must be a scalar.*\(2,\)"),
        (lambda: {"value_threshold": {"a": 1.0}}, TypeError, "^value_threshold must be a number, .* got dict"),
        (
            lambda: {"value_threshold": thresholds.param_fraction(1.0)},
            ValueError,
            "^value_threshold must not be a share of the parameters: a loss has none. Pass another rule",
        ),
        (lambda: {"max_consecutive": 0}, ValueError, "^max_consecutive must be >= 1, got 0"),
        (lambda: {"max_consecutive": "many"}, TypeError, "^max_consecutive must be a number or a scalar array"),
    ],
)
def test_arguments(make, error, match):
    """Errors of construction name the argument."""
    with pytest.raises(error, match=match):
        oc.skip_spikes(optax.sgd(1.0), **make())


@pytest.mark.parametrize(
    "value, error, match",
    [
        (None, ValueError, r"^value is missing\. .* Call update\(updates, state, params, value=loss\)\.$"),
        (
            jnp.ones(3),
            ValueError,
            r"^value must be a scalar, got an array of shape \(3,\).* Pass the mean over the batch",
        ),
        ([1.0], TypeError, r"^value must be a real number, got list \[1\.0\]\. Pass the loss"),
        (1j, TypeError, "^value must be a real number, got complex"),
    ],
)
def test_values(value, error, match):
    """A missing loss shows the call, and one of the wrong kind says what is required."""
    tx = oc.skip_spikes(optax.sgd(1.0), value_threshold=1.0)
    with pytest.raises(error, match=match):
        tx.update(ONE, tx.init(ONE), **({} if value is None else {"value": value}))


def test_a_state_without_the_history_of_losses():
    """A state from before `value_threshold`, or of another rule, is an error."""
    before, tx = oc.skip_spikes(optax.sgd(1.0)), oc.skip_spikes(optax.sgd(1.0), value_threshold=thresholds.z_score())
    with pytest.raises(ValueError, match=r"^state must be of a skip_spikes with a value_threshold") as caught:
        tx.update(ONE, before.init(ONE), value=1.0)
    line = "state._replace(measured_value=tx.init(params).measured_value)"
    assert str(caught.value).endswith(f"{line}.")
    state = eval(line, {"state": before.init(ONE), "tx": tx, "params": ONE})
    assert tx.update(ONE, state, value=1.0)[1].total_skipped == 0
    other = oc.skip_spikes(optax.sgd(1.0), value_threshold=thresholds.sigma_window())
    with pytest.raises(ValueError, match=r"^state must hold the history"):
        tx.update(ONE, other.init(ONE), value=1.0)

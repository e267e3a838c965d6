"""The rules, alone and put together: their numbers, what they are told, and rules that a user writes."""

import functools
import math

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
from optax_clip import thresholds

UNITS = {"bias": (3,), "dense": (3, 4), "wide": (2, 3)}
SCOPES = {
    "global": oc.global_norm,
    "leaf": oc.leaf_norm,
    "group": oc.group_norm({"bias": "a", "dense": "b", "wide": "a"}),
    "unit": functools.partial(oc.unit_norm, axis=0),
}
full = functools.partial(pytest.param, marks=pytest.mark.full)
NORMS = np.float32(np.exp(np.random.default_rng(7).normal(size=40)))
GROWING = np.float32(0.1 * np.arange(40))  # norms of the parameters
HALVES = 0.5 * np.maximum(GROWING.astype(np.float64), 1e-3)


def close(actual, expected, rtol=1e-4):
    np.testing.assert_allclose(np.asarray(actual, np.float64), expected, rtol=rtol, atol=0.0)


def thresholds_of(rule, norms=NORMS, params=None, **extra) -> np.ndarray:
    """The threshold of each step for updates of one entry, in one compiled scan; extra arguments are stacked."""
    tx = oc.clip_by_norm(oc.global_norm, rule)

    def one(state, x):
        norm, param, extra = x
        _, state = tx.update(norm, state, param, **extra)
        return state, state.threshold

    xs = (np.float32(norms), None if params is None else np.float32(params), extra)
    return np.asarray(jax.jit(lambda xs: jax.lax.scan(one, tx.init(jnp.zeros([])), xs)[1])(xs))


def calls(rule, norms, **context):
    """The thresholds of a rule that is called by itself, on scalars, and its last state."""
    rule = optax.with_extra_args_support(rule)
    state, out = rule.init(jnp.zeros([])), []
    update = jax.jit(lambda norm, state, step: rule.update(norm, state, step=step, total_norm=norm, **context))
    for number, norm in enumerate(norms):
        threshold, state = update(jnp.float32(norm), state, jnp.int32(number))
        out.append(float(threshold))
    return np.array(out), state


# Each by itself

RULES = {
    "z_score": (lambda: thresholds.z_score(2.0, 0.9, 7), lambda: reference.Zclip(2.0, 0.9, 7)),
    "z_score, limit": (
        lambda: thresholds.z_score(1.0, 0.9, 3, spike="limit"),
        lambda: reference.Zclip(1.0, 0.9, 3, "limit"),
    ),
    "quantile": (lambda: thresholds.quantile(30.0, 8), lambda: reference.Autoclip(30.0, 8)),
    "sigma_window": (lambda: thresholds.sigma_window(0.5, 8), lambda: reference.ClipBySigma(0.5, 8)),
}
SIZES = np.float32(10.0 ** np.arange(-20, 21, 10))


@pytest.mark.parametrize("name", RULES)
def test_a_rule_follows_its_reference_at_every_size(name):
    """Blocks of very different sizes, each with a history of its own, have the thresholds of float64."""
    rule, one_block = RULES[name]
    norms = np.float32(SIZES * np.exp(0.5 * np.random.default_rng(1).normal(size=(60, 5))))
    norms[3, 1], norms[40, 4], norms[41, 0] = np.nan, np.inf, np.nan
    tx = oc.clip_by_leaf_norm(rule())

    def one(state, updates):
        clipped, state = tx.update(updates, state)
        return state, jnp.stack(clipped)

    scan = jax.jit(lambda rows: jax.lax.scan(one, tx.init([jnp.zeros([])] * 5), rows)[1])
    expected = reference.EachBlock(5, one_block)
    after = [np.minimum(row, expected(row)) for row in norms.astype(np.float64)]
    close(scan([norms[:, i] for i in range(5)]), after)


def test_z_score_has_the_golden_numbers():
    """Clipped norms and statistics are those of the authors' package of zclip, also without a clip around the rule."""
    norms = (1.0, 1.2, 0.8, 1.1, 10.0, 1.0, 3.0)
    found, state = calls(thresholds.z_score(warmup_steps=4), norms)
    close(np.minimum(norms, found)[4:], (1.0402333899, 1.0, 1.0898951204), rtol=1e-6)
    close((state.mean, state.deviation**2), (1.0266493465, 0.0201086298), rtol=1e-5)


@pytest.mark.parametrize("name", ["sigma_window", "z_score"])
def test_numbers_below_zero_have_thresholds_too(name):
    """Losses may be negative: -5, -5.1, -4.9, -5 give a threshold of -4.58 at 6 deviations."""
    losses = (-5.0, -5.1, -4.9, -5.0)
    rule = {
        "sigma_window": thresholds.sigma_window(6.0, 4),
        "z_score": thresholds.z_score(6.0, warmup_steps=4, spike="limit"),
    }[name]
    found, _ = calls(rule, (*losses, -5.0))
    close(found[4], np.mean(losses) + 6 * np.std(losses), rtol=1e-5)
    assert round(found[4], 2) == -4.58


def test_a_window_forgets():
    """A quantile over a full window is that of its last norms, and `sigma_window` leaves the present norm out."""
    found, _ = calls(thresholds.quantile(50.0, 3), (4.0, 2.0, 6.0, 8.0, 8.0))
    close(found, (4.0, 3.0, 4.0, 6.0, 8.0), rtol=1e-6)
    found, _ = calls(thresholds.sigma_window(2.0, 2), (4.0, 2.0, 9.0, 1.0))
    assert np.isinf(found[0])
    close(found[1:], (4.0 + 8e-6, 3.0 + 2.0, 5.5 + 7.0), rtol=1e-6)


def test_windows_of_one():
    """The smallest window holds the norm of this step, or of the last one."""
    norms = (4.0, 2.0, 9.0)
    close(calls(thresholds.quantile(10.0, 1), norms)[0], norms)
    close(calls(thresholds.sigma_window(1.0, 1), norms)[0][1:], (4.0 + 4e-6, 2.0 + 2e-6), rtol=1e-6)


@pytest.mark.parametrize("percentile", [0.0, 100.0, 37.5])
def test_percentiles_are_those_of_numpy(percentile):
    """Also the smallest and the largest, for each number of norms that are known."""
    expected = [np.percentile(NORMS[max(0, i - 15) : i + 1].astype(np.float64), percentile) for i in range(40)]
    close(calls(thresholds.quantile(percentile, 16), NORMS)[0], expected, rtol=1e-6)


@pytest.mark.full
@pytest.mark.parametrize("spike", ["rescale", "mean", "limit"])
def test_no_nan_appears_on_the_way_to_an_endless_threshold(spike):
    """Infinite arguments give infinite thresholds, with `jax.debug_nans` and in derivatives too."""
    tx = oc.clip_by_norm(oc.global_norm, thresholds.z_score(np.inf, spike=spike))
    samples = jnp.ones((30, 2)).at[-1].set(100.0)

    def last(samples):
        _, updates = jax.lax.scan(lambda state, x: tx.update(x, state)[::-1], tx.init(samples[0]), samples)
        return updates[-1].sum()

    with jax.debug_nans(True):
        value, slope = jax.jit(jax.value_and_grad(last))(samples)
    assert value == 200.0
    chex.assert_trees_all_equal(slope, jnp.zeros((30, 2)).at[-1].set(1.0))


# Put together


def test_minimum_is_the_smallest_at_every_step():
    """The minimum of a number, a schedule and two rules is that of what each would be by itself."""
    schedule = optax.linear_schedule(0.25, 4.0, 40)
    parts = [1.0, schedule, thresholds.quantile(60.0, 16), thresholds.z_score(1.0, 0.9, 5, spike="mean")]
    wide = NORMS.astype(np.float64)
    expected = [
        np.full(40, 1.0),
        [float(schedule(number)) for number in range(40)],
        list(map(reference.Autoclip(60.0, 16), wide)),
        list(map(reference.Zclip(1.0, 0.9, 5, "mean"), wide)),
    ]
    close(thresholds_of(thresholds.minimum(*parts)), np.min(expected, axis=0))
    assert set(np.argmin(expected, axis=0)) == {0, 1, 2, 3}


def test_minimum_of_none_never_clips():
    """None is no bound: alone it never clips, beside others it does not matter."""
    assert (thresholds_of(thresholds.minimum(None)) == np.finfo(np.float32).max).all()
    close(thresholds_of(thresholds.minimum(None, 2.0)), np.full(40, 2.0))


def test_minimum_of_nothing_is_an_error():
    """It needs one threshold at least, and thresholds that are none are refused."""
    with pytest.raises(ValueError, match=r"^thresholds must not be empty"):
        thresholds.minimum()
    with pytest.raises(ValueError, match=r"^thresholds\[1\] must be >= 0, got -1"):
        thresholds.minimum(1.0, -1.0)


def test_a_share_of_the_parameters():
    """The threshold is the share of the norm of the parameters of the block, or of eps where that is larger."""
    close(thresholds_of(thresholds.param_fraction(0.5), params=GROWING), HALVES)
    close(thresholds_of(thresholds.param_fraction(0.5, eps=2.0), params=GROWING), np.maximum(0.5 * GROWING, 1.0))
    params = {"a": jnp.array([3.0, -4.0]), "b": jnp.array([0.0])}
    updates = {"a": jnp.array([60.0, 80.0]), "b": jnp.array([-7.0])}
    clipped, _ = step(oc.clip_by_leaf_norm(thresholds.param_fraction(0.1)), updates, params=params)
    chex.assert_trees_all_close(clipped, {"a": jnp.array([0.3, 0.4]), "b": jnp.array([-1e-4])}, rtol=1e-6)


def test_a_share_may_follow_a_schedule():
    """The fraction is any number that a threshold may be."""
    schedule = optax.linear_schedule(0.5, 1.0, 40)
    expected = [float(schedule(number)) * max(size, 1e-3) for number, size in enumerate(GROWING)]
    close(thresholds_of(thresholds.param_fraction(schedule), params=GROWING), expected)


def test_minimum_with_a_share_of_the_parameters():
    """A rule that needs params gets those of each step, and without them the clip says that they are missing."""
    rule = thresholds.minimum(thresholds.param_fraction(0.5), thresholds.quantile(50.0, 8))
    quantiles = list(map(reference.Autoclip(50.0, 8), NORMS.astype(np.float64)))
    close(thresholds_of(rule, params=GROWING), np.minimum(quantiles, HALVES))
    with pytest.raises(ValueError, match=r"^params are missing"):
        thresholds_of(rule)


def test_params_that_nobody_asks_for_are_not_read():
    """A rule without a share of the parameters takes params of any kind."""
    clipped, _ = step(oc.clip_by_global_norm(thresholds.quantile(50.0, 4)), jnp.ones(3), params={"other": jnp.ones(7)})
    chex.assert_trees_all_equal(clipped, jnp.ones(3))


@pytest.mark.parametrize("low", [True, False], ids=["lower", "upper"])
def test_a_range_of_shares_of_the_parameters(low):
    """Either end of a range of norms may be a share of the norm of the parameters."""
    ends = (thresholds.param_fraction(0.2), None) if low else (None, thresholds.param_fraction(0.2))
    updates = jnp.array([0.6, 0.8]) * (0.5 if low else 5.0)
    clipped, _ = step(oc.clip_by_norm_range(*ends), updates, params=jnp.array([3.0, 4.0]))
    close(jnp.linalg.norm(clipped), 1.0, rtol=1e-6)


def ema(norms, decay=0.9):
    """The exponential average with debiasing, NaN where a norm is not finite, which does not count."""
    out, average, count = [], 0.0, 0
    for norm in norms.astype(np.float64):
        if np.isfinite(norm):
            count += 1
            average = decay * average + (1 - decay) * norm
        out.append(average / (1 - decay**count) if np.isfinite(norm) else np.nan)
    return np.array(out)


BAD = NORMS.copy()
BAD[[0, 5, 6]] = np.nan, np.inf, np.nan


def after_bad(thresholds):
    """What is known of thresholds in the steps whose norm is finite."""
    return np.asarray(thresholds)[np.isfinite(BAD)]


def test_a_transformation_of_optax_is_a_rule():
    """A chain of Optax is a threshold: a little above the average of the norms, into which no bad norm enters."""
    rule = optax.chain(optax.ema(0.9), optax.scale(1.05))
    close(after_bad(thresholds_of(rule, BAD)), after_bad(1.05 * ema(BAD)))


def test_rules_go_through_transformations_of_optax():
    """A chain may begin with a rule of ours: twice the median of the norms."""
    expected = [2 * x for x in map(reference.Autoclip(50.0, 8), BAD.astype(np.float64))]
    close(
        after_bad(thresholds_of(optax.chain(thresholds.quantile(50.0, 8), optax.scale(2.0)), BAD)), after_bad(expected)
    )


def test_a_chain_of_optax_has_a_state_a_block():
    """At the scope of leaves each has an average of its own."""
    norms = np.float32(np.exp(np.random.default_rng(3).normal(size=(12, 2))))
    tx, state = oc.clip_by_leaf_norm(optax.chain(optax.ema(0.5), optax.scale(1.1))), None
    expected = np.column_stack([1.1 * ema(norms[:, i], 0.5) for i in range(2)])
    for row, bound in zip(norms, expected):
        clipped, state = step(tx, list(row), state)
        close(clipped, np.minimum(row, bound), rtol=1e-5)


def test_a_ratio_capped_by_a_schedule():
    """In warm-up the cap of `ema_ratio` may follow a schedule."""
    schedule = optax.linear_schedule(0.1, 3.0, 40)
    bounds = [float(schedule(number)) for number in range(40)]
    close(thresholds_of(thresholds.ema_ratio(schedule, warmup_steps=40)), np.minimum(NORMS, bounds))


def test_rules_by_leaf_keep_their_own_statistics():
    """In a tree of thresholds each leaf follows its own rule, beside a number, a schedule and None."""
    schedule = optax.linear_schedule(0.1, 2.0, 30)
    cs = {
        "a": thresholds.quantile(50.0, 8),
        "b": 0.8,
        "c": thresholds.z_score(1.0, 0.9, 3),
        "d": schedule,
        "e": None,
    }
    norms = np.float32(np.exp(np.random.default_rng(4).normal(size=(30, 5))))
    rules = [reference.Autoclip(50.0, 8), lambda n: 0.8, reference.Zclip(1.0, 0.9, 3), None, lambda n: np.inf]
    tx, state = oc.clip_by_leaf_norm(cs), None
    for number, row in enumerate(norms):
        rules[3] = lambda n: float(schedule(number))  # noqa: B023
        clipped, state = step(tx, dict(zip(cs, row)), state)
        bounds = [rule(float(n)) for rule, n in zip(rules, row)]
        close(list(clipped.values()), np.minimum(row, bounds))


def test_one_rule_for_two_leaves_is_a_history_each():
    """The same rule object in two places of a tree follows both leaves on their own."""
    rule = thresholds.quantile(0.0, 4)
    tx, state = oc.clip_by_leaf_norm({"a": rule, "b": rule, "c": None}), None
    for a, b in ((3.0, 1.0), (2.0, 5.0)):
        clipped, state = step(tx, {"a": jnp.float32(a), "b": jnp.float32(b), "c": jnp.float32(9.0)}, state)
    chex.assert_trees_all_close(clipped, {"a": 2.0, "b": 1.0, "c": 9.0})


STATELESS = {
    "minimum": lambda: oc.clip_by_norm(oc.global_norm, thresholds.minimum(1.0, 2.0)),
    "param_fraction": lambda: oc.clip_by_norm(oc.global_norm, thresholds.param_fraction(0.2)),
    "clip_by_norm_range": lambda: oc.clip_by_norm_range(0.5, 1.0),
    "adaptive_grad_clip": lambda: oc.adaptive_grad_clip(0.2),
}


@pytest.mark.parametrize("name", STATELESS)
def test_rules_that_remember_nothing_need_no_state(name):
    """A minimum of numbers, a range of numbers and a share of the parameters start afresh from an empty state."""
    params = jnp.array([3.0, 4.0])
    clipped, _ = step(STATELESS[name](), 2 * params, optax.EmptyState(), params)
    chex.assert_trees_all_close(clipped, params / 5, rtol=1e-6)


def test_rules_that_remember_need_their_state():
    """A rule that counts steps or keeps norms refuses an empty state."""
    for threshold in (thresholds.minimum(lambda count: 1.0, 2.0), thresholds.minimum(thresholds.quantile(), 1.0)):
        with pytest.raises(TypeError, match=r"^state must be a ClipState"):
            oc.clip_by_global_norm(threshold).update(jnp.ones(2), optax.EmptyState())


# Rules of the user


class RunningMean:
    """One and a half times the mean of all norms so far."""

    def __init__(self):
        self.norms = []

    def __call__(self, n):
        if not np.isfinite(n):
            return np.nan
        self.norms.append(n)
        return 1.5 * np.mean(self.norms)


def running_mean():
    """The same as an Optax transformation over the norm of one block."""

    def init(norm):
        return {"count": jnp.zeros([], jnp.int32), "mean": jnp.zeros_like(norm)}

    def update(norm, state, params=None):
        count = state["count"] + 1
        mean = state["mean"] + (norm - state["mean"]) / count
        return 1.5 * mean, {"count": count, "mean": mean}

    return optax.GradientTransformation(init, update)


@pytest.mark.parametrize("scope", [full("global"), "leaf", full("group"), "unit"])
def test_a_rule_of_the_user_at_every_scope(scope):
    """A rule for one block, written by a user, holds for each block of any scope, and sees finite norms only."""
    random = np.random.default_rng(2)
    sizes = np.exp(random.normal(size=(3, 60)))
    samples = {
        name: np.float32(size.reshape(-1, *[1] * len(shape)) * random.normal(size=(60, *shape)))
        for size, (name, shape) in zip(sizes, UNITS.items())
    }
    samples["bias"][4, 0], samples["dense"][0, 0, 0], samples["dense"][30, 1, 2] = np.nan, np.inf, -np.inf
    tx = oc.clip_by_norm(SCOPES[scope], running_mean())
    first = jax.tree.map(lambda x: x[0], samples)
    scan = jax.jit(lambda xs: jax.lax.scan(lambda state, x: tx.update(x, state)[::-1], tx.init(first), xs)[1])
    norms = reference.norms_of(samples, scope)
    rule = reference.EachBlock(norms.shape[1], RunningMean)
    bounds = np.array([rule(row) for row in norms])
    after = np.where(np.isnan(bounds), np.nan, np.minimum(norms, bounds))
    np.testing.assert_allclose(reference.norms_of(scan(samples), scope), after, rtol=1e-4)


def of_context(function):
    """A rule without a state whose threshold is what `function` makes of its context."""
    return optax.GradientTransformationExtraArgs(
        lambda norm: optax.EmptyState(), lambda norm, state, param_norm=None, **context: (function(context), state)
    )


def test_a_rule_is_told_the_step_the_total_norm_and_extra_arguments():
    """`step` counts updates from 0, `total_norm` is over all blocks, and arguments of `update` come by their names."""
    updates = {"a": jnp.array([3.0]), "b": jnp.array([4.0])}
    tx = oc.clip_by_leaf_norm(of_context(lambda c: 0.1 * c["step"] + 0.2 * c["total_norm"] + c["value"]))
    state = None
    for number, value in enumerate((0.5, 0.25, 0.0)):
        clipped, state = step(tx, updates, state, value=jnp.float32(value))
        bound = 0.1 * number + 1.0 + value
        chex.assert_trees_all_close(clipped, {"a": jnp.array([bound]), "b": jnp.array([bound])}, rtol=1e-6)


def test_the_total_norm_stays_in_range():
    """It is the root of the sum of squares, also where squares leave the range of f32."""
    tx = oc.clip_by_leaf_norm(of_context(lambda c: 0.5 * c["total_norm"]))
    for size in (1e-25, 1e30):
        updates = {"a": jnp.float32(3 * size), "b": jnp.float32(4 * size)}
        clipped, _ = step(tx, updates)
        chex.assert_trees_all_close(clipped, {"a": 2.5 * size, "b": 2.5 * size}, rtol=1e-5)


def test_an_extra_argument_that_is_not_finite_leaves_no_trace():
    """Where a rule makes NaN of what it is told, the block is NaN, and the state is that of the step before."""

    def update(norm, state, params=None, *, value, **extra):
        return value, state + norm

    rule = optax.GradientTransformationExtraArgs(jnp.zeros_like, update)
    tx, state = oc.clip_by_norm(oc.global_norm, rule), None
    for value, kept in ((2.0, 3.0), (np.nan, 3.0), (2.0, 6.0)):
        clipped, state = step(tx, jnp.array([3.0]), state, value=jnp.float32(value))
        assert float(state.rule) == kept
        np.testing.assert_array_equal(clipped, [value])


def test_a_state_of_the_user_may_start_with_nan():
    """A window filled up with NaN takes in norms; one that is not finite still leaves no trace."""

    def update(norm, window, params=None):
        window = jnp.roll(window, 1).at[0].set(norm)
        return 2 * jnp.nanmedian(window), window

    rule = optax.GradientTransformation(lambda norm: jnp.full(3, jnp.nan, norm.dtype), update)
    tx, state = oc.clip_by_norm(oc.global_norm, rule), None
    for gradient, window in ((1.0, [1]), (2.0, [2, 1]), (np.nan, [2, 1]), (9.0, [9, 2, 1])):
        updates, state = step(tx, jnp.array([gradient]), state)
        np.testing.assert_array_equal(state.rule, np.float32([*window, *[np.nan] * (3 - len(window))]))
    assert updates == 4.0


@pytest.mark.parametrize(
    ("init", "update"),
    [
        (jnp.zeros_like, lambda norm, state, _: (norm, jnp.ones(3))),
        (lambda norm: 0, lambda norm, state, _: (norm, state + 0.5)),
        (jnp.zeros_like, lambda norm, state, _: (norm, (state, state))),
        (jnp.zeros_like, lambda norm, state, _: (norm * jnp.ones(3), state)),
    ],
    ids=["shape", "kind", "structure", "vector"],
)
def test_rules_of_another_form_are_refused(init, update):
    """A rule whose state changes its form, or whose threshold is no scalar, raises."""
    tx = oc.clip_by_leaf_norm(optax.GradientTransformation(init, update))
    with pytest.raises(ValueError, match=r"rule must .*state|threshold of a rule must be a scalar"):
        step(tx, {"a": jnp.ones(2), "b": jnp.ones(3)})


def test_groups_have_rules_by_label():
    """A threshold for each label may be a number, a rule, or None."""
    cs = {"a": thresholds.quantile(50.0, 4), "b": None, "c": 1.0}
    tx, state = oc.clip_by_group_norm(cs, {"x": "a", "y": "a", "z": "b", "w": "c"}), None
    for size in (1.0, 3.0):
        updates = {
            "x": jnp.array([0.6 * size]),
            "y": jnp.array([0.8 * size]),
            "z": jnp.array([9.0]),
            "w": jnp.array([5.0]),
        }
        clipped, state = step(tx, updates, state)
    expected = {"x": jnp.array([1.2]), "y": jnp.array([1.6]), "z": jnp.array([9.0]), "w": jnp.array([1.0])}
    chex.assert_trees_all_close(clipped, expected, rtol=1e-6)


def test_a_traced_number_and_a_schedule_are_thresholds():
    """One program serves every number, and a schedule is asked at each step."""
    clip = jax.jit(lambda bound, x: oc.clip_by_global_norm(bound).update(x, oc.clip_by_global_norm(bound).init(x))[0])
    for bound in (0.5, 2.0, math.inf):
        close(
            clip(bound, jnp.array([3.0, 4.0])),
            np.array([3.0, 4.0]) * min(1, bound / 5),
            rtol=trees.tolerance("float32"),
        )
    assert clip._cache_size() == 1
    close(thresholds_of(lambda count: 1.0 / (1 + count)), 1 / np.arange(1.0, 41))


def test_extra_arguments_may_have_any_name_but_the_reserved_ones():
    """A caller's argument named norm or threshold is passed on beside what rules get."""
    for threshold in (1.0, thresholds.minimum(2.0, thresholds.z_score()), thresholds.quantile(50.0, 4)):
        tx = oc.clip_by_global_norm(threshold)
        updates, _ = tx.update(jnp.ones(2), tx.init(jnp.ones(2)), None, norm=3.0, rule=None, threshold=0)
        chex.assert_tree_all_finite(updates)


def test_equal_thresholds_of_the_leaves_of_a_block_agree():
    """A block has one threshold where its leaves have equal numbers, or the same schedule or rule."""
    grads = {"w": jnp.array([3.0]), "b": jnp.array([4.0])}
    for threshold in (1.0, lambda count: 1.0, thresholds.minimum(1.0)):
        tx = oc.clip_by_norm(oc.global_norm, {"w": threshold, "b": threshold})
        updates, _ = step(tx, grads)
        chex.assert_trees_all_close(updates, {"w": jnp.array([0.6]), "b": jnp.array([0.8])}, rtol=1e-6)


@pytest.mark.parametrize("scale", [1e-8, 1.0])
@pytest.mark.parametrize("rule", [thresholds.z_score(2.0, 0.9, 4), thresholds.sigma_window(2.0, 4)])
def test_the_floor_of_the_deviation_holds_at_every_size(rule, scale):
    """After norms that are all the same, one that is larger by a rounding is no spike."""
    found, _ = calls(rule, np.float32([1, 1, 1, 1, 1]) * np.float32(scale))
    close(found[-1], scale * (1 + 2e-6), rtol=1e-7)


def test_zeros_give_a_window_no_idea_of_the_size():
    """Where all norms of the window were 0 there is no threshold, so that the first step after them is taken."""
    found, _ = calls(thresholds.sigma_window(2.0, 4), (0.0, 0.0, 0.0, 0.0, 1.0, 1.0))
    assert np.isinf(found[:5]).all() and np.isfinite(found[5])


def test_no_share_of_parameters_of_zero():
    """No bound stays no bound where parameters are 0."""
    tx = oc.clip_by_norm(oc.global_norm, thresholds.param_fraction(None, eps=0.0))
    x = jnp.array([3.0, 4.0])
    chex.assert_trees_all_equal(tx.update(x, tx.init(x), jnp.zeros(2))[0], x)


@pytest.mark.parametrize("norm", [oc.global_norm, oc.leaf_norm], ids=lambda norm: norm.__name__)
def test_a_second_init_compiles_nothing(norm, caplog):
    """States of clips with a history are made without a program of their own."""
    params = {"w": jnp.ones((2, 3)), "b": jnp.ones(2)}
    oc.zclip(norm=norm).init(params)
    with jax.log_compiles(True):
        oc.zclip(norm=norm).init(params)
    assert not [record for record in caplog.records if "Compiling" in record.message]

"""Long runs: statistics stay those of float64, counters saturate, and nothing grows."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference

import optax_clip as oc
from optax_clip import thresholds

pytestmark = pytest.mark.full
LARGEST = 2**31 - 1


def one_block(rule):
    """A rule for a vector of blocks on a single one."""
    return lambda norm: rule(np.array([norm]))[0]


RULES = {
    "autoclip": (oc.autoclip, reference.Autoclip),
    "autoclip, 64": (lambda: oc.autoclip(90.0, 64), lambda: reference.Autoclip(90.0, 64)),
    "zclip": (oc.zclip, reference.Zclip),
    "clip_by_sigma": (oc.clip_by_sigma, reference.ClipBySigma),
    "adagc": (lambda: oc.adagc(norm=oc.global_norm), lambda: one_block(reference.Adagc(1))),
}
SKIPPING = {
    "skip_spikes": lambda: oc.skip_spikes(optax.identity(), thresholds.z_score()),
    "skip_spikes, fixed": lambda: oc.skip_spikes(optax.identity(), 3.0),
}


def make(name):
    return RULES[name][0]() if name in RULES else SKIPPING[name]()


@functools.cache
def norms(steps: int) -> np.ndarray:
    """Norms with a tail of infinite variance over a level that wanders through decades; some are 0, NaN or inf."""
    random = np.random.default_rng(0)
    level = 10 ** np.clip(np.cumsum(random.normal(0.0, 2e-3, steps)), -3, 3)
    values = (level * (0.1 + random.pareto(1.5, steps))).astype(np.float32)
    values[random.choice(steps, 30, replace=False)] = np.repeat([0.0, np.nan, np.inf], 10)
    return values


@pytest.mark.parametrize("steps", [20_000, pytest.param(1_000_000, marks=pytest.mark.long)])
@pytest.mark.parametrize("name", RULES)
def test_statistics_stay_those_of_float64(name, steps):
    """Every threshold of the run is within 1e-3 of the reference in float64, and the state stays finite."""
    tx, rule, values = make(name), RULES[name][1](), norms(steps)

    @jax.jit
    def run(values):
        def one(state, norm):
            _, state = tx.update(norm, state)
            return state, (state.threshold, state.clip_rate)

        return jax.lax.scan(one, tx.init(jnp.zeros([])), values)

    state, (found, clip_rates) = run(values)
    expected = np.array(list(map(rule, values.astype(np.float64))))
    good, known = np.isfinite(values), np.isfinite(expected)
    np.testing.assert_allclose(found[good & known], expected[good & known], rtol=1e-3)
    assert (found[good & ~known] == np.finfo(np.float32).max).all()
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state.rule))
    above = good & (values > expected)
    assert abs(clip_rates[-1] - above.mean()) <= 1e-3 * above.mean()
    assert state.clip_step == steps


def is_counter(path, x) -> bool:
    """Of integers, those that a window bounds are no counters."""
    return jnp.issubdtype(x.dtype, jnp.integer) and not {"place", "filled"} & {getattr(key, "name", "") for key in path}


def saturated(state):
    """The state with every counter at the largest i32."""
    return jax.tree_util.tree_map_with_path(
        lambda path, x: jnp.full_like(x, LARGEST) if is_counter(path, x) else x, state
    )


@pytest.mark.parametrize("name", [*RULES, *SKIPPING])
def test_counters_saturate(name):
    """At the largest i32 counters stay there, and the clip goes on as before."""
    tx = make(name)
    update = jax.jit(tx.update)
    state = tx.init(jnp.zeros([]))
    for norm in np.float32([1.0, 1.2, 0.8] * 50):
        _, state = update(norm, state)
    late = saturated(state)
    for norm in np.float32([1.1, np.nan, 1000.0, 0.9, 1e4]):
        updates, state = update(norm, state)
        late_updates, late = update(norm, late)
        np.testing.assert_allclose(late_updates, updates, rtol=1e-5)
        # Those in a row start anew; all others stay.
        counters = [x for path, x in jax.tree_util.tree_leaves_with_path(late) if is_counter(path, x)]
        assert counters and all(x >= 0 for x in counters) and sum(x == LARGEST for x in counters) >= len(counters) - 1
    assert all(0 <= value <= 1 for key, value in oc.clip_metrics(late).items() if "rate" in key)


@pytest.mark.parametrize("name", [*RULES, *SKIPPING])
def test_nothing_grows(name):
    """A thousand steps, called one by one, compile once and leave as many arrays alive as one step."""
    tx = make(name)
    update = jax.jit(tx.update, donate_argnums=1)
    state = tx.init(jnp.zeros([]))
    alive = []
    for norm in norms(20_000)[:1000]:
        _, state = update(norm, state)
        alive.append(len(jax.live_arrays()))
    assert update._cache_size() == 1
    assert max(alive) == alive[0]

"""Typical uses, which `scripts/check` also holds to the declared types."""

import functools
import math
from typing import Any, assert_type

import jax
import jax.numpy as jnp
import numpy as np
import optax

import optax_clip as oc
from optax_clip import plot, responses, thresholds

PARAMS: optax.Params = {"dense": jnp.ones((4, 4)), "bias": jnp.zeros(4)}


def test_every_kind_of_threshold_is_accepted():
    """Numbers, arrays, schedules, None, rules and trees are thresholds, and clips are transformations of Optax."""
    schedule = optax.linear_schedule(1.0, 0.1, 100)
    rule = thresholds.z_score()
    every: list[Any] = [1, 1.0, np.float32(1), jnp.float32(1), schedule, None, rule, optax.ema(0.9)]
    for threshold in every:
        assert_type(oc.clip_by_global_norm(threshold), optax.GradientTransformationExtraArgs)
    clips = [
        oc.clip(1.0),
        oc.clip(schedule),
        oc.clip({"dense": 1.0, "bias": None}),
        oc.clip_by_value(-1.0, None),
        oc.clip_by_magnitude(None, np.float64(1)),
        oc.clip_by_leaf_norm({"dense": 1.0, "bias": None}, ord=math.inf),
        oc.clip_by_unit_norm(1.0, axis=(0,), response=responses.smooth),
        oc.clip_by_block_rms(1.0, axis=lambda path, leaf: None),
        oc.clip_by_group_norm({"a": 1.0, "b": schedule}, {"dense": "a", "bias": "b"}),
        oc.clip_by_norm_range(0.1, 1.0, norm=oc.leaf_norm),
        oc.clip_by_norm(oc.leaf_norm, thresholds.param_fraction(0.1)),
        oc.clip_by_norm(functools.partial(oc.unit_norm, axis=0), thresholds.minimum(1.0, thresholds.quantile(10.0, 8))),
        oc.adaptive_grad_clip(0.01, eps=1e-3, axis=0),
        oc.autoclip(10.0, window=16),
        oc.zclip(spike="mean", axis_name=()),
        oc.adagc(max_norm=1.0),
        oc.clip_by_sigma(3.0),
        oc.with_error_feedback(oc.clip(1.0), accumulator_dtype=jnp.bfloat16),
        oc.clip_randomly(oc.clip(1.0), 0.5, seed=jax.random.key(0), per="leaf"),
        oc.skip_spikes(optax.adamw(1e-3), thresholds.sigma_window()),
    ]
    last = [
        oc.clip_weights(1.0),
        oc.prune_weights(1e-3),
        oc.clip_weight_norm(1.0, response=responses.normalize),
        oc.rescale_weights(None, 1.0),
        oc.project_weights(optax.projections.projection_non_negative),
    ]
    for tx in (*clips, *last):
        assert_type(tx, optax.GradientTransformationExtraArgs)
        assert_type(optax.chain(tx, optax.adamw(1e-3)), optax.GradientTransformationExtraArgs)
        updates, _ = jax.eval_shape(tx.update, PARAMS, tx.init(PARAMS), PARAMS)
        assert jax.tree.structure(updates) == jax.tree.structure(PARAMS)


def test_a_compiled_step_in_a_chain():
    """A step that logs what its clip did, as the README shows it."""
    optimizer = optax.chain(oc.zclip(), optax.adamw(1e-3))

    @jax.jit
    def step(
        params: optax.Params, state: optax.OptState, grads: optax.Updates
    ) -> tuple[optax.Params, optax.OptState, dict[str, jax.Array]]:
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, oc.clip_metrics(state)

    _, _, metrics = step(PARAMS, optimizer.init(PARAMS), PARAMS)
    assert float(metrics["clip/norm"]) == 4.0


def test_states_have_fields_of_arrays():
    """The fields of states are known to type checkers."""
    state = oc.clip_by_global_norm(1.0).init(PARAMS)
    assert isinstance(state, oc.ClipState)
    for field in (state.clip_step, state.norm, state.clipped, state.clip_rate):
        assert_type(field, jax.Array)
        assert field.shape == ()
    for field in (state.threshold, state.clip_scale):
        assert field.shape == ()  # Any to type checkers: where blocks are units there is none


def test_a_rule_of_ones_own():
    """A rule is an Optax transformation over the norm of one block, lifted to all."""

    def init(norm: Any) -> Any:
        return jnp.zeros_like(norm)

    def update(norm: Any, largest: Any, param_norm: Any = None, **extra_args: Any) -> tuple[Any, Any]:
        return 0.9 * jnp.maximum(norm, largest), jnp.maximum(norm, largest)

    functions: tuple[Any, Any] = init, update  # to type checkers Optax's own names of the parameters are a promise
    rule = optax.GradientTransformationExtraArgs(*functions)
    tx = oc.clip_by_norm(
        oc.leaf_norm, thresholds.minimum(rule, optax.chain(thresholds.quantile(50.0), optax.scale(2.0)))
    )
    _, state = tx.update(PARAMS, tx.init(PARAMS))
    assert isinstance(state, oc.ClipState) and state.clip_rate == 0.5


def test_norms_before_training():
    """Recorded norms go through clips, give suggestions, and are drawn."""
    norms = [1.0, 2.0, 50.0, 1.5]
    replayed = oc.replay(oc.zclip(warmup_steps=2), norms)
    assert_type(replayed.clipped, jax.Array)
    suggested = oc.suggest_threshold(norms)
    axes = plot.thresholds(norms, {"zclip": replayed, "fixed": oc.clip_by_global_norm(2.0)})
    assert_type(axes, np.ndarray)
    assert len(replayed.threshold) == 4 and len(axes) == 2 and suggested.threshold == 2.0


def test_norms_and_responses_are_functions():
    """Norms take a tree and return a tree; responses take and return arrays."""
    norm = oc.global_norm(PARAMS)
    after = responses.shrink(jnp.float32(2.0), jnp.float32(1.0))
    assert_type(after, jax.Array)
    assert float(norm) == 4.0 and after == 1.0
    groups = oc.group_norm({"dense": "a", "bias": "b"})(PARAMS)
    assert groups.norms["a"] == 4.0

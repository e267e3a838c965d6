"""Steps that an optimizer does not see."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_clip._engine import blocks as engine
from optax_clip._engine import checks
from optax_clip._engine.leaves import is_counted
from optax_clip._engine.mesh import varying
from optax_clip._engine.numbers import cast, next_step
from optax_clip._engine.rules import as_rule, as_rules, reads
from optax_clip.clips.norms import ClipState, clip_by_norm, with_axis_name
from optax_clip.norms import global_norm


class SkipState(NamedTuple):
    """What `skip_spikes` did so far. Read it with `clip_metrics`."""

    total_skipped: jax.Array  # i32[]: steps skipped so far, saturates
    consecutive_skipped: jax.Array  # i32[]: steps skipped since the last one that was taken, saturates
    # Of the last step, skipped or not; clip_step: steps taken; clip_rate: share of steps skipped; clipped: 1 if the
    # step was skipped and its norm was above the threshold or not finite, else 0.
    measured: ClipState
    measured_value: Any  # the same with the value in place of the norm; None without `value_threshold`
    inner_state: Any  # of the optimizer


def skip_spikes(
    inner: optax.GradientTransformation,
    threshold: Any = None,
    *,
    norm: Callable[[Any], Any] | None = None,
    axis_name: Any = None,
    value_threshold: Any = None,
    max_consecutive: Any = 100,
) -> optax.GradientTransformationExtraArgs:
    """Skips the steps whose gradient or loss is a spike or not finite: no update, and the optimizer does not see them.

    norm > threshold, value > value_threshold, or one of the two not finite:
    updates ← 0, state of `inner` as it was;  else: updates ← inner(updates)

    A clipped spike still moves the averages of an optimizer like Adam. A skipped one leaves no trace. This goes around
    the optimizer: `skip_spikes(optax.chain(clip_by_global_norm(1.0), optax.adamw(1e-3)), thresholds.z_score(6.0))`.
    The step is measured as by `clip_by_norm(norm, threshold)`.

    Args:
      inner: the optimizer, or any transformation.
      threshold: the largest norm that is not skipped, >= 0, as for `clip_by_norm`: a number, a scalar array (traced
        too), an Optax schedule, a rule such as `thresholds.z_score()`, a prefix tree of these, or None to skip only
        what is not finite. A skipped step enters the statistics of no rule, and does not count for a schedule.
      norm: what is compared: None for `global_norm`. With several blocks, one above its threshold is enough.
      axis_name: mesh axes of the norm where types do not tell (`shard_map(check_vma=False)`, `pmap`). Only where
        `norm` is None; else give it to the norm: `functools.partial(leaf_norm, axis_name="data")`.
      value_threshold: the largest loss that is not skipped: a number, also below 0, a scalar array, a schedule or a
        rule; None not to look at the loss. With it, each call needs the loss under Optax's keyword,
        `update(updates, state, params, value=loss)`, which goes on to `inner`. The loss is a scalar, the mean over the
        batch and over all devices (`pmean`).
      max_consecutive: skipped steps in a row, a whole number >= 1, after which a finite step is taken whatever its
        norm and value; a rule forgets what it knows and starts afresh with that step. None: never.

    Returns:
      A transformation with the state `SkipState`: i32[], i32[], a `ClipState`, a second one for the value or None, and
      the state of `inner`.

    Raises:
      ValueError: `threshold` is negative, NaN or not a scalar; `value_threshold` is NaN or not a scalar, or a share of
        the parameters; `max_consecutive` is below 1; both `norm` and `axis_name` are given. In `update`, with
        `value_threshold`: `value` is missing, is not a scalar, or differs between devices.
      TypeError: an argument is of the wrong kind, or a state is of another transformation.

    Guarantees:
      In a skipped step the state of `inner` keeps every bit, counters and random keys included, and every floating,
      complex and integer update is 0. `inner` computes on zeros in such a step, so that derivatives stay finite.
      A step that is not finite is never taken. Where norms have grown for good, `max_consecutive` steps are lost, and
      training goes on; under a threshold that is a number, one step of `max_consecutive` + 1 is taken.
      The loss is compared in f32. Rules see it as if it were a norm. `z_score`, `sigma_window` and `quantile` are right
      for losses below 0. `ema_ratio` and factors of an average are not: of a negative mean they make a lower threshold.

    Example:
      >>> tx = skip_spikes(optax.sgd(1.0), 10.0)
      >>> state = tx.init(jnp.zeros(1))
      >>> for gradient in (2.0, 50.0, jnp.nan, 3.0):
      ...     updates, state = tx.update(jnp.array([gradient]), state)
      ...     print(updates, state.total_skipped, state.consecutive_skipped)
      [-2.] 0 0
      [0.] 1 1
      [0.] 2 2
      [-3.] 2 0

      By the loss, for example at a loss above 8 or NaN:

      >>> tx = skip_spikes(optax.sgd(1.0), value_threshold=8.0)
      >>> state = tx.init(jnp.zeros(1))
      >>> for loss in (2.0, 9.0, jnp.nan):
      ...     updates, state = tx.update(jnp.array([1.0]), state, value=loss)
      ...     print(updates, state.total_skipped)
      [-1.] 0
      [0.] 1
      [0.] 2

    References:
      Chowdhery and others, PaLM, 2022, arXiv 2204.02311, section 5.1, skip the batches around spikes of the loss.
      OLMo-core and MaxText skip a step whose loss or norm is 6 deviations above the mean of the last 128. There all
      values enter the window, spikes and NaN too, and one NaN skips the next 128 steps. Here it skips one.
    """
    checks.transformation(inner, "inner", example="skip_spikes(optax.adamw(1e-3), 10.0)")
    measures: list = [(with_axis_name(norm, global_norm, axis_name), as_rules(threshold, "threshold"))]
    if value_threshold is not None:  # a value is its own norm, and nothing is scaled
        measures += [(lambda value: value, as_rule(value_threshold, "value_threshold", low=None))]
        if "params" in reads(measures[1][1]):
            raise ValueError(
                "value_threshold must not be a share of the parameters: a loss has none. Pass another rule."
            )
    if max_consecutive is not None:
        checks.whole(max_consecutive, "max_consecutive", 1.0)
    watches: list = [clip_by_norm(*measure) for measure in measures]
    update_inner = optax.with_extra_args_support(inner).update

    def pair(measured: Any) -> tuple[Any, Any]:
        return measured if len(measures) == 2 else (*measured, None)

    def init_fn(params):
        # Two zeros, so that states can be donated.
        counts = jnp.zeros([], jnp.int32), jnp.zeros([], jnp.int32)
        measured = [watch.init(x) for watch, x in zip(watches, (params, jnp.zeros([], jnp.float32)))]
        return SkipState(*counts, *pair(measured), inner.init(params))

    def update_fn(updates, state, params=None, **extra_args):
        state = checks.state(state, SkipState)
        if (state.measured_value is None) != (value_threshold is None):
            raise ValueError(
                "state must be of a skip_spikes with a value_threshold just where this one has it. To keep all other "
                "states: state._replace(measured_value=tx.init(params).measured_value)."
            )
        olds = [checks.state(old, ClipState) for old in (state.measured, state.measured_value)[: len(measures)]]
        shown = [updates] if value_threshold is None else [updates, _value_of(extra_args)]

        def look(norm, rules, x, old) -> Any:
            """What this step measures, and what the rules would keep of this step alone."""
            found = norm(x)  # not twice
            watch: Any = clip_by_norm(lambda tree: found if tree is x else norm(tree), rules)
            now = watch.update(x, old, params, **extra_args)[1]
            if max_consecutive is None or not (jax.tree.leaves(now.rule) and jax.tree.leaves(x)):
                return now, now.rule
            blocks = engine.blocks_of(found, x)
            groups = engine.groups_of(rules, blocks, x, "threshold")
            of_params = lambda: engine.param_norms(norm, blocks, x, params)
            context = {**extra_args, "step": old.clip_step, "total_norm": now.norm}
            return now, engine.thresholds_of(groups, engine.first_state(groups), of_params, context)[1]

        looks = [look(*measure, *seen) for measure, *seen in zip(measures, shown, olds)]
        bad = [~jnp.isfinite(now.norm) for now, _ in looks]
        over = [is_bad | (now.clipped > 0) for is_bad, (now, _) in zip(bad, looks)]
        spike = skip = functools.reduce(jnp.logical_or, over)
        if max_consecutive is not None:
            skip &= (state.consecutive_skipped < max_consecutive) | functools.reduce(jnp.logical_or, bad)
        zero = lambda x: jnp.where(skip, 0, x) if is_counted(x) or checks.is_real(x) else x
        held = lambda new, old: jax.tree.map(lambda x, o: x if x is o else jnp.where(skip, o, x), new, old)

        new, inner_state = update_inner(jax.tree.map(zero, updates), state.inner_state, params, **extra_args)
        total = jnp.where(skip, next_step(state.total_skipped), state.total_skipped)
        taken = held(looks[0][0].clip_step, state.measured.clip_step)
        share = total.astype(jnp.float32) / (total.astype(jnp.float32) + taken.astype(jnp.float32))

        def kept(now, alone, old, reason):
            # A spike that is taken all the same starts a rule afresh. To enter the spike is not enough: z_score enters
            # its own limit instead, and went on to skip 320 of 400 steps.
            rule = jax.tree.map(lambda a, n: n if a is n else jnp.where(spike, a.astype(n.dtype), n), alone, now.rule)
            flag = (skip & reason).astype(jnp.float32)
            return now._replace(clip_step=taken, clip_rate=share, clipped=flag, rule=held(rule, old.rule))

        measured = [kept(*look, *rest) for look, *rest in zip(looks, olds, over)]
        consecutive = jnp.where(skip, next_step(state.consecutive_skipped), 0)
        new_state = SkipState(total, consecutive, *pair(measured), held(inner_state, state.inner_state))
        return jax.tree.map(zero, new), new_state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _value_of(extra_args: dict) -> jax.Array:
    """The loss that came with the updates, in f32."""
    value = extra_args.get("value")
    if value is None:
        raise ValueError(
            "value is missing. value_threshold compares it with the loss. Call update(updates, state, params, "
            "value=loss)."
        )
    if not checks.is_real(value):
        raise TypeError(f"value must be a real number, got {checks.show(value)}. Pass the loss, a scalar.")
    if jnp.shape(value) != ():
        raise ValueError(
            f"value must be a scalar, got an array of shape {jnp.shape(value)}. It has one threshold. Pass the mean "
            "over the batch."
        )
    value = jnp.asarray(cast(value, jnp.float32))
    if varies := tuple(sorted(varying(value))):
        raise ValueError(
            f"value must be the same on all devices, got one that varies over {varies}. Else devices skip different "
            f"steps. Pass jax.lax.pmean(loss, {varies})."
        )
    return value

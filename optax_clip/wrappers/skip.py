"""Steps that an optimizer does not see."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_clip._engine import checks
from optax_clip._engine.leaves import is_counted
from optax_clip._engine.numbers import next_step
from optax_clip.clips.norms import ClipState, clip_by_norm, with_axis_name
from optax_clip.norms import global_norm


class SkipState(NamedTuple):
    """What `skip_spikes` did so far. Read it with `clip_metrics`."""

    total_skipped: jax.Array  # i32[]: steps skipped so far, saturates
    consecutive_skipped: jax.Array  # i32[]: steps skipped since the last one that was taken, saturates
    measured: ClipState  # of the last step, skipped or not; clip_step: steps taken; clip_rate: share of steps skipped
    inner_state: Any  # of the optimizer


def skip_spikes(
    inner: optax.GradientTransformation,
    threshold: Any = None,
    *,
    norm: Callable[[Any], Any] | None = None,
    axis_name: Any = None,
) -> optax.GradientTransformationExtraArgs:
    """Skips the steps whose gradient is a spike or not finite: no update, and the optimizer does not see them.

    norm > threshold, or not finite: updates ← 0, state of `inner` as it was;  else: updates ← inner(updates)

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

    Returns:
      A transformation with the state `SkipState`: i32[], i32[], a `ClipState`, and the state of `inner`.

    Raises:
      ValueError: `threshold` is negative, NaN or not a scalar; both `norm` and `axis_name` are given.
      TypeError: an argument is of the wrong kind, or a state is of another transformation.

    Guarantees:
      In a skipped step the state of `inner` keeps every bit, counters and random keys included, and every floating,
      complex and integer update is 0. `inner` computes on zeros in such a step, so that derivatives stay finite.
      Where norms have grown above the threshold for good, every step is skipped, and a rule does not see it. Choose
      thresholds far above the usual norm, and watch `skip/consecutive` of `clip_metrics`.

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

    References:
      Chowdhery and others, PaLM, 2022, arXiv 2204.02311, section 5.1, skip the batches around spikes of the loss.
    """
    checks.transformation(inner, "inner", example="skip_spikes(optax.adamw(1e-3), 10.0)")
    watch: Any = clip_by_norm(with_axis_name(norm, global_norm, axis_name), threshold)

    update_inner = optax.with_extra_args_support(inner).update

    def init_fn(params):
        # Two zeros, so that states can be donated.
        return SkipState(jnp.zeros([], jnp.int32), jnp.zeros([], jnp.int32), watch.init(params), inner.init(params))

    def update_fn(updates, state, params=None, **extra_args):
        state = checks.state(state, SkipState)
        _, measured = watch.update(updates, state.measured, params, **extra_args)
        skip = ~jnp.isfinite(measured.norm) | (measured.clipped > 0)
        if measured.threshold is not None:
            skip |= jnp.isnan(measured.threshold)
        zero = lambda x: jnp.where(skip, 0, x) if is_counted(x) or checks.is_real(x) else x
        held = lambda new, old: jax.tree.map(lambda x, o: x if x is o else jnp.where(skip, o, x), new, old)

        new, inner_state = update_inner(jax.tree.map(zero, updates), state.inner_state, params, **extra_args)
        total = jnp.where(skip, next_step(state.total_skipped), state.total_skipped)
        taken = held(measured.clip_step, state.measured.clip_step)
        share = total.astype(jnp.float32) / (total.astype(jnp.float32) + taken.astype(jnp.float32))
        return jax.tree.map(zero, new), SkipState(
            total,
            jnp.where(skip, next_step(state.consecutive_skipped), 0),
            measured._replace(clip_step=taken, clip_rate=share, rule=held(measured.rule, state.measured.rule)),
            held(inner_state, state.inner_state),
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)

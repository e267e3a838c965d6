"""Optimizers whose clip cannot stand outside of them."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_clip._engine import checks
from optax_clip._engine.leaves import spread, wide
from optax_clip._engine.numbers import cast, gathered
from optax_clip.clips.norms import ClipState, norm_clip
from optax_clip.norms import block_rms


class StableAdamState(NamedTuple):
    """The state of Adam, and what its clip measured. Read that with `clip_metrics`."""

    adam: optax.ScaleByAdamState  # as `optax.scale_by_adam` keeps it
    measured: ClipState  # of the last step; norm: the root mean square of g / √v̂


def scale_by_stable_adam(
    b1: Any = 0.9,
    b2: Any = 0.999,
    eps: Any = 1e-8,
    eps_root: Any = 0.0,
    mu_dtype: Any = None,
    *,
    nesterov: bool = False,
    max_rms: Any = 1.0,
    axis_name: Any = None,
) -> optax.GradientTransformationExtraArgs:
    """Adam with smaller steps for leaves whose gradient is large against its second moment: the clip of StableAdamW.

    updates_i ← Adam's step_i / max(1, rms_i / max_rms),
    rms_i = sqrt(mean of (|g| / max(√v̂, eps))² over leaf i),  v̂ Adam's second moment with g in it, debiased

    The clip needs g and v̂ at once, so it cannot stand in front of Adam or after it. StableAdamW is
    `optax.chain(scale_by_stable_adam(), optax.add_decayed_weights(0.1), optax.scale_by_learning_rate(1e-3))`.

    Args:
      b1: decay of the first moment, in [0, 1], a number or traced scalar, as for `optax.scale_by_adam`.
      b2: decay of the second moment, likewise.
      eps: what Adam adds to √v̂, >= 0, likewise; in rms_i the smallest √v̂.
      eps_root: what is added to v̂, here and in rms_i, >= 0, likewise; for derivatives through the step.
      mu_dtype: dtype of the first moment; None is that of the parameters.
      nesterov: whether Adam uses Nesterov momentum.
      max_rms: largest rms of a leaf whose step is not scaled, >= 0: a number, a scalar array (traced too), an Optax
        schedule, a rule, None to measure only, or a prefix tree of these.
      axis_name: mesh axes that a leaf is spread over, where types do not tell (`shard_map(check_vma=False)`, `pmap`).

    Returns:
      A transformation with the state `StableAdamState`: Adam's state, and a `ClipState` whose norm is rms.

    Raises:
      ValueError: an argument is negative, NaN or out of range, or a tree of thresholds does not fit the updates.
      TypeError: an argument, or the state, is of the wrong kind.

    Guarantees:
      Moments and count in f32 and bf16 are those of `optax.scale_by_adam` bit for bit, and so are steps of leaves with
      rms <= max_rms.
      `optax.tree.get(state, "nu")` finds Adam's. A NaN or inf in a gradient stays in the moments, as in Adam: put
      `skip_spikes` around the optimizer. In the first step rms is 1, to a rounding, so `clipped` may be 0 or 1.

    Example:
      >>> tx = scale_by_stable_adam(b1=0.0, b2=0.9)
      >>> state = tx.init(jnp.zeros(1))
      >>> for gradient in (1.0, 1.0, 10.0):
      ...     updates, state = tx.update(jnp.array([gradient]), state)
      >>> print(f"{updates.item():.4f} {state.measured.norm:.4f}")  # Adam alone steps by 1.6323
      1.0000 1.6323

    References:
      Wortsman, Dettmers, Zettlemoyer and others, Stable and low-precision training for large-scale vision-language
      models, 2023, arXiv 2304.13013. There weight decay is divided by max(1, rms) too; in the chain above it is not.
    """
    for name, value, high in (("b1", b1, 1.0), ("b2", b2, 1.0), ("eps", eps, None), ("eps_root", eps_root, None)):
        checks.scalar(value, name, 0.0, high)
    adam: Any = optax.scale_by_adam(b1, b2, eps, eps_root, mu_dtype, nesterov=nesterov)
    rms = functools.partial(block_rms, axis_name=axis_name)
    clip: Any = functools.partial(norm_clip, threshold=max_rms, response=None, name="max_rms")

    def init_fn(params):
        return StableAdamState(adam.init(params), clip(rms).init(params))

    def update_fn(updates, state, params=None, **extra_args):
        state = checks.state(state, StableAdamState)
        spread(None, updates, "updates")  # says that sparse leaves are none of Adam's
        steps, moments = adam.update(updates, state.adam)

        def quotient(g, v):  # its square stays in range where g² does not
            dtype = wide(g := jnp.asarray(g))
            mean = v.real.astype(dtype) / gathered(b2, moments.count, dtype)
            return jnp.abs(g).astype(dtype) / jnp.maximum(jnp.sqrt(mean + cast(eps_root, dtype)), cast(eps, dtype))

        quotients = jax.tree.map(quotient, updates, moments.nu)
        measure = lambda tree: rms(quotients if tree is steps else tree)  # a rule may ask for that of the parameters
        steps, measured = clip(measure).update(steps, state.measured, params, **extra_args)
        return steps, StableAdamState(moments, measured)

    clip(rms)  # says at once what is wrong with `max_rms`
    return optax.GradientTransformationExtraArgs(init_fn, update_fn)

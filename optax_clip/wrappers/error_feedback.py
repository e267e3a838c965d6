"""What a clip takes away comes back in the next step."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_clip._engine import checks
from optax_clip._engine.leaves import is_counted, keystr, spread
from optax_clip._engine.numbers import cast
from optax_clip.weights.projections import widened


class ErrorFeedbackState(NamedTuple):
    """What `with_error_feedback` carries from step to step."""

    carry: Any  # like the params: what was clipped away and not added yet, f32 unless asked for otherwise
    inner_state: Any  # of the clip


def with_error_feedback(
    clip: optax.GradientTransformation, *, accumulator_dtype: Any = None
) -> optax.GradientTransformationExtraArgs:
    """Adds what a clip takes away to the updates of the next step, so that nothing is lost: U-Clip.

    updates ← clip(updates + carry),  carry ← updates_before + carry - updates_after

    Clipping makes gradients biased. With the carry, the sum of all updates misses that of all gradients by no more
    than what the carry holds at the end.

    Args:
      clip: any transformation of the gradients; not the optimizer.
      accumulator_dtype: floating dtype of the carry, as in `optax.trace`; None for f32, and for f64 leaves f64.
        Complex leaves keep their own.

    Returns:
      A transformation with the state `ErrorFeedbackState`: the carry, as large as the parameters in that dtype, and
      the state of `clip`.

    Raises:
      TypeError: `clip` is not an Optax transformation, `accumulator_dtype` is not a floating dtype, or a state is of
        another transformation.
      ValueError: updates have another structure or other shapes than the parameters that `init` saw.

    Guarantees:
      The sum of the updates that come out, plus the carry, is the sum of those that went in, to rounding in the dtype
      of the carry. `clip` sees f32 at least, and what its result loses in the dtype of the updates is carried too.
      What is not finite does not enter the carry: such a step comes out as `clip` makes it. Where the carry cannot
      shrink, as with a threshold below the mean of the gradients, it grows, up to the largest number of its dtype.
      Leaves without a norm carry nothing.

    Example:
      >>> tx = with_error_feedback(clip(1.0))
      >>> state = tx.init(jnp.zeros(1))
      >>> for gradient in (2.5, 0.0, 0.0):
      ...     updates, state = tx.update(jnp.array([gradient]), state)
      ...     print(updates, state.carry)
      [1.] [1.5]
      [1.] [0.5]
      [0.5] [0.]

    References:
      Elesedy, Hutter, U-Clip: on-average unbiased stochastic gradient clipping, 2023, arXiv 2302.02971.
    """
    checks.transformation(clip, "clip", example="with_error_feedback(clip_by_global_norm(1.0))")
    if not jnp.issubdtype(accumulator_dtype or jnp.float32, jnp.floating):
        raise TypeError(f"accumulator_dtype must be floating, got {jnp.dtype(accumulator_dtype)}. Pass jnp.float32.")

    update_inner = optax.with_extra_args_support(clip).update

    def nothing(param):
        if not is_counted(param):
            return None
        own = jax.eval_shape(lambda x: widened(x, x)[0], param).dtype
        return jnp.zeros_like(param, own if jnp.issubdtype(own, jnp.complexfloating) else accumulator_dtype or own)

    def init_fn(params):
        return ErrorFeedbackState(jax.tree.map(nothing, params), clip.init(params))

    def update_fn(updates, state, params=None, **extra_args):
        state = checks.state(state, ErrorFeedbackState)
        for (path, x), carry in zip(jax.tree.leaves_with_path(updates), spread(state.carry, updates, "state.carry")):
            if is_counted(x) and (shape := getattr(carry, "shape", None)) != jnp.shape(x):
                raise ValueError(
                    f"state.carry must have the shapes of the updates, got {shape} for {jnp.shape(x)} at "
                    f"{keystr(path)}. Pass updates of the parameters that init saw, or make a new state."
                )
        sums = _map(lambda x, carry: jnp.add(*widened(x, carry)), updates, state.carry)
        clipped, inner_state = update_inner(sums, state.inner_state, params, **extra_args)
        new = _map(lambda x, carry, y: _rounded(y, jnp.asarray(x).dtype), updates, state.carry, clipped)
        return new, ErrorFeedbackState(_map(_left, state.carry, new, sums), inner_state)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _map(function: Callable, first: Any, second: Any, *rest: Any) -> Any:
    """`jax.tree.map` where the first two have arrays that count; elsewhere what the first has."""
    apply = lambda x, y, *others: function(x, y, *others) if is_counted(x) and is_counted(y) else x
    return jax.tree.map(apply, first, second, *rest, is_leaf=lambda x: x is None)


def _rounded(x: jax.Array, dtype: Any) -> jax.Array:
    """The array in another dtype, where finite numbers stay finite."""
    near = cast(x, dtype)
    if jnp.iscomplexobj(x):
        return near
    # XLA:GPU (H100, jaxlib 0.10.2) leaves out converting to bf16 and back, and the carry would miss the rounding.
    return jax.lax.reduce_precision(near.astype(x.dtype), jnp.finfo(x.dtype).nexp, jnp.finfo(dtype).nmant).astype(dtype)


def _left(carry: jax.Array, update: jax.Array, total: jax.Array) -> jax.Array:
    left = total - update.astype(total.dtype)
    return jnp.where(jnp.isfinite(left), _rounded(left, carry.dtype), carry)

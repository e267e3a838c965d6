"""Transformations around a clip."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optax_clip import _checks
from optax_clip._blocks import Mesh, is_counted, varying
from optax_clip._landing import rounded_to
from optax_clip._packing import entries_for_kernels
from optax_clip._reductions import at_least_f32
from optax_clip._thresholds import cast


class ErrorFeedbackState(NamedTuple):
    """What `with_error_feedback` carries from step to step."""

    carry: Any  # like the params: what was clipped away and not added yet, f32 unless asked for otherwise
    inner_state: Any  # of the clip


def with_error_feedback(
    clip: optax.GradientTransformation, *, accumulator_dtype: Any = None
) -> optax.GradientTransformationExtraArgs:
    """Adds what a clip takes away to the updates of the next step, so that nothing is lost: U-Clip.

    updates ← clip(updates + carry),  carry ← updates_before + carry - updates_after

    Clipping makes gradients biased; with the carry, the sum of all updates misses that of all gradients by no more
    than what the carry holds at the end.

    Args:
      clip: any transformation of the gradients; not the optimizer.
      accumulator_dtype: floating dtype of the carry, as in `optax.trace`; None for f32, and for f64 leaves f64.

    Returns:
      A transformation with the state `ErrorFeedbackState`: the carry, as large as the parameters in that dtype, and
      the state of `clip`.

    Raises:
      TypeError: `clip` is not an Optax transformation, or `accumulator_dtype` is not a floating dtype.
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
    caller = "with_error_feedback"
    _checks.transformation(clip, caller=caller, name="clip", example=f"{caller}(clip_by_global_norm(1.0))")
    if accumulator_dtype is not None:
        _checks.floating_dtype(accumulator_dtype, caller=caller, name="accumulator_dtype")
    update_inner = optax.with_extra_args_support(clip).update

    def nothing(param):
        if not is_counted(param):
            return None
        param = jnp.asarray(param)
        # The select keeps the sharding and the mesh axes of the parameter.
        return jnp.where(False, param, 0).astype(_dtype_of_carry(param, accumulator_dtype))

    def init_fn(params):
        return ErrorFeedbackState(jax.tree.map(nothing, params), clip.init(params))

    def update_fn(updates, state, params=None, **extra_args):
        _checks.state(state, ErrorFeedbackState, caller=caller)
        if difference := _difference(updates, state.carry):
            raise ValueError(
                f"{caller}: updates must have structure and shapes of the parameters that init saw: {difference}. "
                "Pass updates of these parameters, or make a new state."
            )
        sums = _map(_sum, updates, state.carry)
        clipped, inner_state = update_inner(sums, state.inner_state, params, **extra_args)
        new = _map(lambda x, carry, y: _rounded(y, x), updates, state.carry, clipped)
        left = _map(lambda carry, x, y, s: _left(s, y, carry), state.carry, updates, new, sums)
        return new, ErrorFeedbackState(left, inner_state)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _map(function: Callable, first: Any, second: Any, *rest: Any) -> Any:
    """`jax.tree.map`, where the first two have an array; else what the first has."""
    return jax.tree.map(
        lambda x, y, *others: x if not is_counted(x) or y is None else function(x, y, *others),
        first,
        second,
        *rest,
        is_leaf=lambda x: x is None,
    )


def _difference(updates: Any, carry: Any) -> str:
    """How the updates differ from those that the carry is for, in words; nothing where they do not."""
    try:
        triples = _checks.paired(updates, carry)
    except ValueError as error:
        return str(error)
    for path, x, y in triples:
        if is_counted(x) and jnp.shape(x) != getattr(y, "shape", None):
            there = (
                "no carry" if y is None else f"a carry {f'of shape {y.shape}' if is_counted(y) else type(y).__name__}"
            )
            return f"an update of shape {jnp.shape(x)}{_checks.place(path)} has {there}"
    return ""


def _sum(x: Any, carry: Any) -> jax.Array:
    x = at_least_f32(jnp.asarray(x))
    return x + carry.astype(x.dtype)


def _dtype_of_carry(param: jax.Array, dtype: Any) -> Any:
    if dtype is None:
        return at_least_f32(param).dtype
    if not jnp.iscomplexobj(param):
        return dtype
    return jnp.complex128 if jnp.finfo(dtype).bits == 64 else jnp.complex64


def _rounded(x: jax.Array, like: Any) -> jax.Array:
    dtype = jnp.asarray(like).dtype
    x = _saturated(x, dtype)
    # Rounded before the conversion, which compilers leave out if its inverse follows.
    narrower = jnp.finfo(dtype).bits < jnp.finfo(x.dtype).bits and not jnp.iscomplexobj(x)
    return (rounded_to(x, dtype) if narrower else x).astype(dtype)


def _left(total: jax.Array, update: Any, carry: jax.Array) -> jax.Array:
    new = total - at_least_f32(jnp.asarray(update))
    return jnp.where(jnp.isfinite(new), _saturated(new, carry.dtype).astype(carry.dtype), carry)


def _saturated(x: jax.Array, dtype: Any) -> jax.Array:
    """Finite numbers moved to where the dtype holds them; what is lost of an update is carried."""
    if jnp.iscomplexobj(x) or jnp.finfo(dtype).max >= jnp.finfo(x.dtype).max:
        return x
    largest = float(jnp.finfo(dtype).max)
    return jnp.where(jnp.isfinite(x), jnp.clip(x, -largest, largest), x)


class RandomClipState(NamedTuple):
    """Where `clip_randomly` goes on."""

    key: jax.Array  # u32[2]: of the next step's draws
    inner_state: Any  # of the clip


def clip_randomly(
    clip: optax.GradientTransformation, probability: Any, seed: Any = 0, *, per: str = "element"
) -> optax.GradientTransformationExtraArgs:
    """Clips a random part of the updates, drawn anew in each step: every entry, or every leaf, with a probability.

    updates ← clip(updates) where a draw falls below probability;  else as they are

    The clip sees all updates, so that its norms and statistics are those of the whole; what was not drawn passes as it
    came. To clip a part that is always the same, use `optax.masked`.

    Args:
      clip: any transformation of the gradients.
      probability: of being clipped, in [0, 1]: a number or a scalar array (traced too; a NaN clips all).
      seed: an int or a key of `jax.random` (traced too). The same seed gives the same draws, on any device: two of
        these in a chain want seeds of their own.
      per: "element": a draw for each entry; "leaf": one for each leaf.

    Returns:
      A transformation with the state `RandomClipState`: u32[2], and the state of `clip`.

    Raises:
      ValueError: `probability` is out of range or not a scalar; `per` is neither; draws for elements inside `pmap` or
        `shard_map(check_vma=False)`, where types do not tell which devices hold different entries.
      TypeError: an argument is of the wrong kind.

    Guarantees:
      Draws of entries, leaves and steps are independent to any statistical end (a hash of the place in the leaf, keyed
      by `jax.random`), the same under jit on any mesh, and computed where they are used: they take no memory. Inside
      `shard_map` each device draws by itself for leaves that vary. Dtypes are kept.

    Example:
      >>> tx = clip_randomly(clip(1.0), 0.5, seed=1)
      >>> grads = jnp.full(6, 3.0)
      >>> updates, state = tx.update(grads, tx.init(grads))
      >>> print(updates, tx.update(grads, state)[0])
      [1. 3. 1. 1. 1. 3.] [3. 1. 1. 3. 3. 3.]

    References:
      Clipping all, a random part, or a selected part of the gradient. The hash is the finalizer of MurmurHash3
      (Appleby, 2011).
    """
    caller = "clip_randomly"
    _checks.transformation(clip, caller=caller, name="clip", example=f"{caller}(clip_by_global_norm(1.0), 0.5)")
    _checks.scalar(probability, caller=caller, name="probability", low=0.0, high=1.0, kinds=_checks.NUMBER)
    _checks.choice(per, caller=caller, name="per", choices=("element", "leaf"))
    _check_seed(seed)
    update_inner = optax.with_extra_args_support(clip).update

    def init_fn(params):
        return RandomClipState(_key_data(seed), clip.init(params))

    def update_fn(updates, state, params=None, **extra_args):
        _checks.state(state, RandomClipState, caller=caller)
        clipped, inner_state = update_inner(updates, state.inner_state, params, **extra_args)
        leaves, treedef = jax.tree.flatten(updates)
        if per == "element" and (untyped := Mesh(caller).untyped):
            raise ValueError(
                f"{caller}: over which of the mesh axes {tuple(untyped)} leaves are spread cannot be told inside pmap "
                'or shard_map(check_vma=False), and all devices would draw alike. Use check_vma=True, or per="leaf".'
            )
        key, now = jax.random.split(jax.random.wrap_key_data(state.key, impl="threefry2x32"))
        words = jax.random.bits(now, (2, len(leaves)), jnp.uint32) >> 1
        words = list(zip(*map(entries_for_kernels, words))) if leaves else []
        chosen = [
            _chosen(x, y, w, probability, per) if is_counted(x) else y
            for x, y, w in zip(leaves, treedef.flatten_up_to(clipped), words)
        ]
        return treedef.unflatten(chosen), RandomClipState(jax.random.key_data(key), inner_state)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _chosen(x: Any, clipped: jax.Array, words: tuple, probability: Any, per: str) -> jax.Array:
    x = jnp.asarray(x)
    # 24 bits, which f32 holds exactly: below 1 always, below 0 never.
    bits = words[0] >> 7 if per == "leaf" else _hashes(x, words) >> 8
    draw = bits.astype(jnp.float32) * 2.0**-24
    return jnp.where(draw >= cast(probability, jnp.float32), x.astype(clipped.dtype), clipped)


def _hashes(x: jax.Array, words: tuple) -> jax.Array:
    """A random u32 for each entry. `jax.random.bits` would take twice the memory of the leaf on CPU."""
    row = words[0]
    for name in sorted(varying(x)):
        row = _mixed(row + jax.lax.axis_index(name).astype(jnp.uint32))
    *outer, last = x.shape or (1,)
    for axis in range(len(outer)):
        row = _mixed(row + jax.lax.broadcasted_iota(jnp.uint32, (*outer, 1), axis))
    # A stride for each row, or rows would be windows of one sequence.
    column = jax.lax.iota(jnp.uint32, last).reshape((1,) * len(outer) + x.shape[-1:])
    column = column * (_mixed(row + words[1]) * 2 + 1)
    # Nothing is added but the sharding of the leaf.
    return _mixed(row + column + jnp.where(False, x, 0).real.astype(jnp.uint32))


def _mixed(h: jax.Array) -> jax.Array:
    h = (h ^ (h >> 16)) * jnp.uint32(0x85EBCA6B)
    h = (h ^ (h >> 13)) * jnp.uint32(0xC2B2AE35)
    return h ^ (h >> 16)


def _key_data(seed: Any) -> jax.Array:
    """The words of a threefry key, as an array that every checkpoint can hold."""
    if _is_key(seed):
        return jax.random.bits(seed, (2,), jnp.uint32)
    if _is_words(seed):
        return jnp.array(seed)  # a copy: states may be donated
    return jax.random.key_data(jax.random.key(seed, impl="threefry2x32"))


def _check_seed(seed: Any) -> None:
    """Computes nothing: a construction must not start the devices."""
    kind = getattr(seed, "dtype", type(seed))
    is_int = not isinstance(seed, bool) and jnp.shape(seed) == () and jnp.issubdtype(kind, jnp.integer)
    if not (is_int or _is_key(seed) or _is_words(seed)):
        raise TypeError(
            f"clip_randomly: seed must be an int or a key, got {type(seed).__name__}. Pass 0, or jax.random.key(0)."
        )


def _is_key(seed: Any) -> bool:
    return isinstance(seed, jax.Array) and jnp.issubdtype(seed.dtype, jax.dtypes.prng_key) and not seed.ndim


def _is_words(seed: Any) -> bool:
    return isinstance(seed, (jax.Array, np.ndarray)) and seed.dtype == jnp.uint32 and seed.shape == (2,)

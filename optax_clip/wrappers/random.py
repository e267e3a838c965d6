"""A random part of the updates is clipped."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_clip._engine import checks
from optax_clip._engine.leaves import is_counted
from optax_clip._engine.mesh import varying


class RandomClipState(NamedTuple):
    """Where `clip_randomly` goes on."""

    clip_key: jax.Array  # u32[2]: the words of a threefry key, for the next step's draws
    inner_state: Any  # of the clip


def clip_randomly(
    clip: optax.GradientTransformation, probability: Any, seed: Any = 0, *, per: str = "element"
) -> optax.GradientTransformationExtraArgs:
    """Clips a random part of the updates, drawn anew in each step: every entry, or every leaf, with a probability.

    updates ← clip(updates) with this probability;  else as they are

    The clip sees all updates, so that its norms and statistics are those of the whole. What was not drawn passes as it
    came. To clip a part that is always the same, use `optax.masked`.

    Args:
      clip: any transformation of the gradients.
      probability: of being clipped, in [0, 1]: a number or a scalar array (traced too; a NaN clips all).
      seed: an int or a key of `jax.random` (traced too). The same seed gives the same draws: two of these in a chain
        need different seeds.
      per: "element": a draw for each entry; "leaf": one for each leaf.

    Returns:
      A transformation with the state `RandomClipState`: u32[2], and the state of `clip`.

    Raises:
      ValueError: `probability` is out of range or not a scalar; `per` is neither; draws for elements inside `pmap` or
        `shard_map(check_vma=False)`, where types do not tell which devices hold different entries.
      TypeError: an argument is of the wrong kind, or a state is of another transformation.

    Guarantees:
      Draws are those of `jax.random.bernoulli`, the same under jit on any mesh. Inside `shard_map` each device draws
      entries by itself for leaves that vary. Dtypes are kept.

    Example:
      >>> tx = clip_randomly(clip(1.0), 0.5, seed=1)
      >>> grads = jnp.full(6, 3.0)
      >>> updates, state = tx.update(grads, tx.init(grads))
      >>> print(updates, tx.update(grads, state)[0])
      [3. 1. 3. 1. 1. 3.] [1. 1. 3. 3. 3. 1.]

    References:
      Clipping all, a random part, or a selected part of the gradient.
    """
    checks.transformation(clip, "clip", example="clip_randomly(clip_by_global_norm(1.0), 0.5)")
    checks.scalar(probability, "probability", low=0.0, high=1.0)
    checks.choice(per, "per", choices=("element", "leaf"))
    is_int = jnp.shape(seed) == () and jnp.issubdtype(getattr(seed, "dtype", type(seed)), jnp.integer)
    if not (is_int or isinstance(seed, jax.Array)):
        raise TypeError(f"seed must be an int or a key, got {checks.show(seed)}. Pass 0, or jax.random.key(0).")

    update_inner = optax.with_extra_args_support(clip).update

    def init_fn(params):
        key = jax.random.key(seed, impl="threefry2x32") if is_int else seed
        return RandomClipState(jax.random.bits(key, (2,), jnp.uint32), clip.init(params))

    def chosen(x, y, key):
        return jnp.where(_passes(x, key, probability, per), x, y.astype(jnp.asarray(x).dtype)) if is_counted(x) else y

    def update_fn(updates, state, params=None, **extra_args):
        state = checks.state(state, RandomClipState)
        clipped, inner_state = update_inner(updates, state.inner_state, params, **extra_args)
        key, now = jax.random.split(jax.random.wrap_key_data(state.clip_key, impl="threefry2x32"))
        new = jax.tree.map(chosen, updates, clipped, optax.tree.split_key_like(now, updates))
        return new, RandomClipState(jax.random.key_data(key), inner_state)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _passes(x: Any, key: jax.Array, probability: Any, per: str) -> jax.Array:
    """Which entries are not clipped. A probability of NaN lets none pass."""
    rest = 1 - jnp.asarray(probability, jnp.float32)
    if per == "leaf":
        return jax.random.bernoulli(key, rest)
    if any(name not in varying(jax.lax.axis_index(name)) for name in jax.sharding.get_abstract_mesh().manual_axes):
        raise ValueError(
            "per must be 'leaf' inside pmap or shard_map(check_vma=False), got 'element'. Pass per='leaf', or use "
            "shard_map with check_vma=True."
        )
    key = jax.random.fold_in(key, jax.lax.axis_index(tuple(sorted(varying(jnp.asarray(x))))))
    # The zeros have the sharding of the leaf, which a select asks for on a mesh of explicit axes.
    return jax.random.bernoulli(key, rest, jnp.shape(x)) | jnp.zeros_like(x, bool)

"""What a clip would have done to recorded norms."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optax_clip._engine import checks
from optax_clip.clips.norms import ClipState


class Replay(NamedTuple):
    """What a clip would have done, one entry for each step."""

    norm: jax.Array  # f32[steps]: before clipping
    # f32[steps]: inf where the clip had none, NaN where the norm is not finite and the clip adapts
    threshold: jax.Array
    scale: jax.Array  # f32[steps]: 1 where nothing changed, NaN where the norm is not finite
    clipped: jax.Array  # bool[steps]: norm > threshold; False where the norm is not finite


def replay(clip: optax.GradientTransformation, norms: Any) -> Replay:
    """Runs a norm clip over a recorded sequence of norms, in one compiled loop.

    Each norm is given to the clip as the only entry of the updates, so whatever the scope there is one block.

    Args:
      clip: a norm clip with one threshold: `zclip()`, `clip_by_global_norm(1.0)`, `clip_by_norm(global_norm, rule)`.
      norms: [steps], real, >= 0, NaN and inf included, such as the logged `clip/norm`: a list or an array.

    Returns:
      `Replay`: norm, threshold and scale, f32[steps], and clipped, bool[steps].

    Raises:
      ValueError: `norms` is not a vector, or holds a negative number; `clip` is not one norm clip by itself, or its
        threshold depends on the parameters or on the leaf.
      TypeError: an argument is of the wrong kind.

    Guarantees:
      A call compiles one program, and keeps none. Many thresholds share one program under `jax.vmap`.

    Example:
      >>> norms = [4.0, 2.0, 9.0]
      >>> seen = replay(clip_by_sigma(2.0, window=2), norms)
      >>> print(seen.norm[2], seen.threshold[2], seen.clipped)
      9.0 5.0 [False False  True]
      >>> clipped = lambda max_norm: replay(clip_by_global_norm(max_norm), norms).clipped.sum()
      >>> print(jax.vmap(clipped)(jnp.array([1.0, 3.0, 5.0])))
      [3 2 1]
    """
    checks.transformation(clip, "clip", "replay(zclip(), norms)")
    with np.errstate(over="ignore"):  # above the largest f32 a norm is inf
        values = jnp.asarray(checks.norms(norms).astype(np.float32))

    def step(state: Any, norm: jax.Array) -> tuple[Any, Replay]:
        new: Any = clip.update(norm, state)[1]
        threshold = jnp.where(new.threshold == jnp.finfo(jnp.float32).max, jnp.inf, new.threshold)
        return new, Replay(new.norm, threshold, new.clip_scale, new.clipped > 0)

    @jax.jit  # of a function of this call, so that the program goes with it
    def run(norms: jax.Array) -> Replay:
        state = clip.init(jnp.zeros([], jnp.float32))
        if not isinstance(state, ClipState):
            raise ValueError(f"it has the state {type(state).__name__}. Replay the clips of a chain one by one.")
        return jax.lax.scan(step, state, norms)[1]

    try:
        return run(values)
    except ValueError as error:
        raise ValueError(f"clip must be a norm clip with one threshold for all blocks: {error}") from error

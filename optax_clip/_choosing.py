"""Choosing a threshold from norms that were recorded."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optax_clip import _checks
from optax_clip._clip_by_norm import ClipState


class Replay(NamedTuple):
    """What a clip would have done, an entry a step."""

    norm: jax.Array  # f32[steps]: before clipping
    threshold: jax.Array  # f32[steps]: NaN where the norm is not finite and the clip adapts
    scale: jax.Array  # f32[steps]: 1 where nothing was clipped, NaN where the norm is not finite
    clipped: jax.Array  # bool[steps]: norm > threshold; False where the norm is not finite


def replay(clip: optax.GradientTransformation, norms: Any) -> Replay:
    """Runs a norm clip over a recorded sequence of norms, in one compiled loop.

    Each norm is given to the clip as the only entry of the updates, so whatever its scope there is one block.

    Args:
      clip: any norm clip: `zclip()`, `clip_by_global_norm(1.0)`, `clip_by_norm(global_norm, rule)`.
      norms: [steps], real, >= 0, NaN and inf included, such as the logged `clip/norm`: a list or an array.

    Returns:
      `Replay`: norm, threshold and scale, f32[steps], and clipped, bool[steps].

    Raises:
      ValueError: `norms` is not a vector, or holds a negative number; `clip` has not exactly one norm to compare, or
        its threshold depends on the parameters.
      TypeError: an argument is of the wrong kind.

    Guarantees:
      A second call with the same clip object and number of steps is not compiled again.

    Example:
      >>> seen = replay(clip_by_sigma(2.0, window=2), [4.0, 2.0, 9.0])
      >>> print(seen.norm[2], seen.threshold[2], seen.clipped)
      9.0 5.0 [False False  True]
    """
    if not _checks.is_transformation(clip):
        raise TypeError(
            f"replay: clip must be a norm clip, got {type(clip).__name__}. For example: replay(zclip(), norms)."
        )
    return _replay(jnp.asarray(_checks.norms(norms, caller="replay"), jnp.float32), clip=clip)


@functools.partial(jax.jit, static_argnames="clip")
def _replay(norms: jax.Array, *, clip: optax.GradientTransformation) -> Replay:
    def step(state, norm):
        try:
            _, state = clip.update(norm, state)
        except ValueError as error:
            raise ValueError(
                f"replay: the clip cannot run on norms alone. {error} Replay clips whose threshold is a number, a "
                "schedule or a rule over norms."
            ) from error
        (measured,) = _clip_states(state)
        above = (measured.norm > measured.threshold) & jnp.isfinite(measured.norm)
        return state, Replay(measured.norm, measured.threshold, measured.scale, above)

    state = clip.init(jnp.zeros([], jnp.float32))
    if len(_clip_states(state)) != 1:
        raise ValueError(
            f"replay: clip must hold exactly one norm clip, got {len(_clip_states(state))}. "
            "Replay them one by one, or put their rules into one clip with minimum."
        )
    return jax.lax.scan(step, state, norms)[1]


def _clip_states(state: Any) -> list[ClipState]:
    is_state = lambda x: isinstance(x, ClipState)
    return [x for x in jax.tree.leaves(state, is_leaf=is_state) if is_state(x)]


class Suggestion(NamedTuple):
    """Candidates for a fixed threshold."""

    threshold: float  # the smallest that leaves the bulk of the norms alone
    clip_rate: float  # the share of norms above it
    candidates: np.ndarray  # f64[candidates]: percentiles of the norms, ascending
    clip_rates: np.ndarray  # f64[candidates]: the share of norms above each
    basis: str  # what this rests on, in words


_PERCENTILES = (50.0, 75.0, 90.0, 95.0, 99.0, 99.9)


def suggest_threshold(norms: Any) -> Suggestion:
    """Candidates for a fixed threshold, from recorded norms: what each would have clipped, and one to start with.

    threshold = the largest norm ≤ Q3 · (Q3 / Q1)^1.5,  with Q1, Q3 the quartiles of the norms above 0

    The bound is Tukey's fence for the logarithm of the norms: what lies above is an outlier, what lies below the bulk.
    Record the norms with `clip_by_global_norm(None)`, which measures without clipping, and `clip_metrics`.

    Args:
      norms: [steps], real, >= 0. NaN and inf are left out, and counted.

    Returns:
      `Suggestion`: threshold and its clip rate, floats; candidates (percentiles 50, 75, 90, 95, 99, 99.9) and their
      clip rates, f64[6]; and in words what it rests on: how many norms, how many not finite, whether they drift.

    Raises:
      ValueError: `norms` is not a vector, holds a negative number, or nothing finite above 0.
      TypeError: `norms` holds no real numbers.

    Example:
      >>> found = suggest_threshold([1.0, 1.1, 0.9, 1.2, 1.0, 0.8, 9.0, 1.1, 1.0, jnp.nan])
      >>> print(round(found.threshold, 3), round(found.clip_rate, 3))
      1.2 0.111
      >>> print(found.basis)
      9 finite norms, 1 more not finite and left out. 1 of them above 1.27, the fence of the bulk. Only a few norms.

    References:
      Tukey, Exploratory data analysis, 1977.
    """
    values = _checks.norms(norms, caller="suggest_threshold")
    finite = values[np.isfinite(values)]
    positive = finite[finite > 0]
    if not positive.size:
        raise ValueError(
            f"suggest_threshold: norms has no finite number above 0 among {values.size}. At least one is required. "
            "Record norms with clip_by_global_norm(None) and clip_metrics."
        )
    low, high = np.percentile(positive, [25, 75])
    fence = high * (high / low) ** 1.5
    threshold = positive[positive <= fence].max()
    candidates = np.percentile(finite, _PERCENTILES)
    rate = lambda bound: float(np.mean(finite > bound))
    return Suggestion(
        float(threshold),
        rate(threshold),
        candidates,
        np.array([rate(candidate) for candidate in candidates]),
        _basis(values, finite, fence),
    )


def _basis(values: np.ndarray, finite: np.ndarray, fence: float) -> str:
    lost = values.size - finite.size
    text = f"{finite.size} finite norms" + (f", {lost} more not finite and left out" if lost else "")
    text += f". {np.sum(finite > fence)} of them above {fence:.3g}, the fence of the bulk."
    if finite.size < 100:
        return text + " Only a few norms."
    first, last = (np.median(half) for half in np.array_split(finite, 2))
    if first > 0 and not 2 / 3 < last / first < 1.5:
        text += (
            f" They drift: the median of the second half is {last / first:.2g} times that of the first. "
            "A threshold that adapts fits better, such as zclip or clip_by_sigma."
        )
    return text

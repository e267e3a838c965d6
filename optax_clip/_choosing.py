"""Choosing a threshold from norms that were recorded."""

import functools
import math
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
    scale: jax.Array  # f32[steps]: 1 where nothing changed, NaN where a norm under a threshold is not finite
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
      ValueError: `norms` is not a vector, or holds a negative number; `clip` is not one norm clip by itself, or its
        threshold depends on the parameters or on the leaf.
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
    values = _checks.norms(norms, caller="replay")
    with np.errstate(over="ignore"):  # above the largest f32 a norm is inf
        return _replay(jnp.asarray(values.astype(np.float32)), clip=clip)


@functools.partial(jax.jit, static_argnames="clip")
def _replay(norms: jax.Array, *, clip: optax.GradientTransformation) -> Replay:
    def step(state: Any, norm: jax.Array) -> tuple[Any, Replay]:
        new: Any = clip.update(norm, state)[1]
        above = (new.norm > new.threshold) & jnp.isfinite(new.norm)
        return new, Replay(new.norm, new.threshold, new.scale, above)

    try:
        state = clip.init(jnp.zeros([], jnp.float32))
        if isinstance(state, ClipState):
            return jax.lax.scan(step, state, norms)[1]
    except ValueError as error:
        raise ValueError(
            f"replay: the clip cannot run on norms alone. {error} Replay clips with one threshold: a number, a "
            "schedule, or a rule over norms."
        ) from error
    raise ValueError(
        f"replay: clip must be one norm clip, got one with the state {type(state).__name__}. Of a chain or a wrapper "
        "replay the clips in it one by one; minimum puts several rules into one clip."
    )


class Suggestion(NamedTuple):
    """Candidates for a fixed threshold."""

    threshold: float  # the smallest that leaves the bulk of the norms alone
    clip_rate: float  # the share of norms above it
    candidates: np.ndarray  # f64[candidates]: percentiles of the norms, ascending
    clip_rates: np.ndarray  # f64[candidates]: the share of norms above each
    basis: str  # what this rests on, in words


PERCENTILES = (50.0, 75.0, 90.0, 95.0, 99.0, 99.9)


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
      Rests on 9 finite norms, without 1 norm not finite. 1 norm above the bulk, which ends at 1.2. Few to go by.

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
    low, high = np.percentile(np.log(positive), [25, 75])
    fence = np.exp(min(high + 1.5 * (high - low), np.log(positive.max())))
    threshold = positive[positive <= fence * (1 + 1e-12)].max()  # not below the largest by a rounding
    candidates = np.percentile(finite, PERCENTILES)
    rate = lambda bound: float(np.mean(finite > bound))
    return Suggestion(
        float(threshold),
        rate(threshold),
        candidates,
        np.array([rate(candidate) for candidate in candidates]),
        _basis(values, finite, threshold),
    )


def _basis(values: np.ndarray, finite: np.ndarray, threshold: float) -> str:
    lost, zeros, outside = values.size - finite.size, int(np.sum(finite == 0)), int(np.sum(finite > threshold))
    text = f"Rests on {_counted(finite.size, 'finite norm')}"
    text += f", without {_counted(lost, 'norm')} not finite" if lost else ""
    text += f", {zeros} of them 0" if zeros else ""
    text += f". {_counted(outside, 'norm')} above the bulk, which ends at {threshold:.3g}."
    if finite.size - zeros < 100:
        return text + " Few to go by."
    first, last = (np.median(np.log(half)) for half in np.array_split(finite[finite > 0], 2))
    if abs(last - first) > math.log(1.5):
        text += (
            f" The norms drift: the median of the second half is {math.exp(last - first):.2g} times that of the first. "
            "A threshold that adapts fits better, such as zclip or clip_by_sigma."
        )
    return text


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")

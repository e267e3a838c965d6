"""A fixed threshold from recorded norms."""

from typing import Any, NamedTuple

import numpy as np

from optax_clip._engine import checks

PERCENTILES = (50.0, 75.0, 90.0, 95.0, 99.0, 99.9)


class Suggestion(NamedTuple):
    """Candidates for a fixed threshold."""

    threshold: float  # the smallest that leaves the bulk of the norms alone
    clip_rate: float  # the share of norms above it
    candidates: np.ndarray  # f64[candidates]: percentiles of the norms, ascending
    clip_rates: np.ndarray  # f64[candidates]: the share of norms above each
    basis: str  # what this rests on, in words


def suggest_threshold(norms: Any) -> Suggestion:
    """Candidates for a fixed threshold, from recorded norms: what each would have clipped, and one to start with.

    threshold = the largest norm ≤ Q3 · (Q3 / Q1)^1.5,  with Q1, Q3 the quartiles of the norms above 0

    The bound is Tukey's fence for the logarithm of the norms: what lies above is an outlier, what lies below the bulk.
    Record the norms with `clip_by_global_norm(None)`, which measures without clipping, and `clip_metrics`.

    Args:
      norms: [steps], real, >= 0. NaN and inf are left out, and counted.

    Returns:
      `Suggestion`: threshold and its clip rate, floats; candidates (percentiles 50, 75, 90, 95, 99, 99.9) and their
      clip rates, f64[6]; and in words what it rests on: how many norms, how many of them finite, whether they drift.

    Raises:
      ValueError: `norms` is not a vector, holds a negative number, or nothing finite above 0.
      TypeError: `norms` holds no real numbers.

    Example:
      >>> found = suggest_threshold([1.0, 1.1, 0.9, 1.2, 1.0, 0.8, 9.0, 1.1, 1.0, jnp.nan])
      >>> print(round(found.threshold, 3), round(found.clip_rate, 3))
      1.2 0.111
      >>> print(found.basis)
      Rests on 9 finite norms of 10, 1 above the bulk, which ends at 1.2. Few to go by.

    References:
      Tukey, Exploratory data analysis, 1977.
    """
    values = checks.norms(norms)
    finite = values[np.isfinite(values)]
    positive = finite[finite > 0]
    if not positive.size:
        raise ValueError(
            f"norms must hold a finite number above 0, got none among {values.size}. Record them with clip_metrics."
        )
    low, high = np.percentile(np.log(positive), [25, 75])
    fence = np.exp(min(high + 1.5 * (high - low), np.log(positive.max())))
    threshold = float(positive[positive <= fence * (1 + 1e-12)].max())  # not below the largest by a rounding
    candidates = np.percentile(finite, PERCENTILES)
    rates = np.mean(finite > candidates[:, None], axis=1)
    clip_rate = float(np.mean(finite > threshold))
    return Suggestion(threshold, clip_rate, candidates, rates, _basis(values.size, finite, positive, threshold))


def _basis(steps: int, finite: np.ndarray, positive: np.ndarray, threshold: float) -> str:
    above = np.sum(finite > threshold)
    text = f"Rests on {finite.size} finite norms of {steps}, {above} above the bulk, which ends at {threshold:.3g}."
    if positive.size < 100:
        return text + " Few to go by."
    first, last = (np.median(np.log(half)) for half in np.array_split(positive, 2))
    if abs(last - first) < np.log(1.5):
        return text
    return text + (
        f" The norms drift: the median of the second half is {np.exp(last - first):.2g} times that of the first. "
        "A threshold that adapts fits better, such as zclip or clip_by_sigma."
    )

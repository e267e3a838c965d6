"""The figure of norms and thresholds over steps, and what all figures share."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from optax_clip import _checks
from optax_clip._choosing import Replay, replay

try:
    from matplotlib.axes import Axes
    from matplotlib.patheffects import withStroke
except ModuleNotFoundError as _error:
    raise ImportError(
        'optax_clip.plot: matplotlib is missing. Figures need it. Run pip install "optax_clip[plot]".'
    ) from _error

_MOST = 2000  # steps up to which all are drawn
_BINS = 1000  # for lines: about as many as an axes has pixels across
FAR = 1e3  # thresholds this many times beyond all norms are left out of the picture
_MARKER_BINS = 250  # for markers, which are wider
# Colors of Okabe and Ito, which color-blind readers can tell apart, with lines and markers that differ in print.
_LOOKS: dict[str, dict[str, Any]] = {
    "norm": {"color": "#666666", "linewidth": 0.6, "zorder": 2},
    "clipped": {
        "color": "#0072B2",
        "linestyle": "none",
        "marker": "o",
        "markersize": 3.5,
        "markerfacecolor": "white",
        "markeredgewidth": 0.8,
        "zorder": 3,
    },
    "threshold": {
        "color": "#D55E00",
        "linestyle": "--",
        "linewidth": 1.6,
        "path_effects": [withStroke(linewidth=3.2, foreground="white")],  # to be seen on what lies beneath
        "zorder": 4,
    },
    "not finite": {
        "color": "#CC79A7",
        "linestyle": "none",
        "marker": "v",
        "markersize": 7,
        "markeredgecolor": "black",
        "zorder": 5,
    },
}


def thresholds(norms: Any, clips: Mapping[str, Any], *, ax: Any = None) -> np.ndarray:
    """Draws recorded norms with the threshold of each of several clips, and the steps it would have clipped.

    One axes a clip, side by side with the same limits; a step that is not finite is marked along the top edge. Logs of
    more than 2000 steps are drawn by the smallest and largest value of each of at most 1000 equal spans of steps, and
    of their clipped steps by the smallest and largest norm: no spike is lost.

    Args:
      norms: [steps], real, >= 0, NaN and inf included, at least one: a list or an array.
      clips: from a label to a norm clip, which `replay` runs on the norms, or to what `replay` returned for them.
      ax: the axes to draw on, as many as clips; None for a new pyplot figure.

    Returns:
      The axes, object[clips], in the order of the clips.

    Raises:
      ValueError: there are no norms or no clips, not as many axes as clips, or a `Replay` of another number of steps;
        what `replay` raises.
      TypeError: an argument is of the wrong kind.

    Guarantees:
      With axes given, nothing but these axes is touched: no window, no pyplot, no settings. Nothing is shown or saved.

    Example:
      >>> from matplotlib.figure import Figure
      >>> ax = Figure().subplots(1, 2)
      >>> clips = {"fixed": clip_by_global_norm(2.0), "adaptive": clip_by_sigma(window=2)}
      >>> left, right = thresholds([1.0, 1.5, 4.0, 1.0], clips, ax=ax)
      >>> print(left.get_title())
      fixed
      25 % clipped
    """
    replays = _replays(_checks.norms(norms, caller="thresholds"), clips)
    if ax is None:
        from matplotlib import pyplot

        size = (3.2 * len(clips) + 0.8, 3.6)
        ax = pyplot.subplots(1, len(clips), sharey=True, figsize=size, layout="constrained")[1]
    ax = np.ravel(np.asarray(ax, dtype=object))
    for one in ax:
        check_axes(one, caller="thresholds", example="ax=figure.subplots(1, 2)")
    if len(ax) != len(clips):
        raise ValueError(
            f"thresholds: ax must hold an axes for each of {len(clips)} clips, got {len(ax)}. "
            f"For example: ax=figure.subplots(1, {len(clips)})."
        )
    limits = _limits(list(replays.values()))
    drawn = [_draw(one, label, seen, limits) for one, (label, seen) in zip(ax, replays.items())]
    ax[0].set_ylabel("norm")
    shown = [name for name in _LOOKS if any(len(lines[name].get_xdata()) for lines in drawn)]
    ax[0].legend([drawn[0][name] for name in shown], shown, loc="lower center", ncols=2, fontsize="small")
    return ax


def one_axes(ax: Any, *, caller: str, size: tuple[float, float]) -> Axes:
    """The axes given, or those of a new pyplot figure."""
    if ax is None:
        from matplotlib import pyplot

        ax = pyplot.subplots(figsize=size, layout="constrained")[1]
    check_axes(ax, caller=caller, example="ax=figure.subplots()")
    return ax


def plain(label: Any) -> str:
    """A label as text, in which a dollar begins no formula."""
    return str(label).replace("$", r"\$")


def check_axes(ax: Any, *, caller: str, example: str) -> None:
    """Raises unless it is axes."""
    if not isinstance(ax, Axes):
        raise TypeError(f"{caller}: ax must be axes of matplotlib, got {type(ax).__name__}. For example: {example}.")


def _replays(norms: np.ndarray, clips: Any) -> dict[Any, Replay]:
    """What each clip would have done, as vectors of NumPy."""
    if not isinstance(clips, Mapping):
        raise TypeError(
            f"thresholds: clips must map labels to norm clips, got {type(clips).__name__}. "
            'For example: {"zclip": zclip()}.'
        )
    if not clips:
        raise ValueError('thresholds: clips is empty. At least one is required. For example: {"zclip": zclip()}.')
    if not norms.size:
        raise ValueError("thresholds: norms is empty. At least one is required. Record them with clip_metrics.")
    found = {}
    for label, given in clips.items():
        if not isinstance(given, Replay) and not _checks.is_transformation(given):
            raise TypeError(
                f"thresholds: clips must map labels to norm clips, got {type(given).__name__} for {label!r}. "
                'For example: {"zclip": zclip()}.'
            )
        seen = jax.tree.map(np.asarray, given if isinstance(given, Replay) else replay(given, norms))
        if seen.norm.shape != norms.shape:
            raise ValueError(
                f"thresholds: the Replay for {label!r} must have an entry for each of {norms.size} norms, got shape "
                f"{seen.norm.shape}. Replay the clip on the same norms."
            )
        found[label] = seen
    return found


def _draw(ax: Axes, label: Any, seen: Any, limits: tuple[float, float]) -> dict[str, Any]:
    """Draws one clip, and returns its lines by name."""
    finite = np.isfinite(seen.norm)
    everywhere = np.ones(finite.size, bool)
    drawn = {  # indices of the steps, and values at all steps
        "norm": (_extremes(seen.norm, finite, _BINS), seen.norm),
        "clipped": (_extremes(seen.norm, seen.clipped, _MARKER_BINS), seen.norm),
        # inf, where nothing can be clipped, breaks the line; NaN, where a step is not finite, does not
        "threshold": (_extremes(seen.threshold, ~np.isnan(seen.threshold), _BINS), seen.threshold),
        "not finite": (_extremes(everywhere, ~finite, _MARKER_BINS), 0.96 * everywhere),
    }
    lines: dict[str, Any] = {}
    for name, (steps, values) in drawn.items():
        look: dict[str, Any] = _LOOKS[name]
        if len(steps) == 1:  # a line through one point would not be seen
            look = look if "marker" in look else look | {"marker": "."}
        if name == "not finite":  # at a height of the axes, not of the data
            look = look | {"transform": ax.get_xaxis_transform()}
        (lines[name],) = ax.plot(steps, values[steps], **look)
    # Limits before the scale: matplotlib would look for its own, and warn where no norm is above 0.
    ax.set(xscale="linear", ylim=limits, yscale="log", xlim=_margin(0, len(seen.norm) - 1), xlabel="step")
    ax.locator_params(axis="x", nbins=5)
    ax.set_title(f"{plain(label)}\n{percent(seen.clipped.sum() / max(finite.sum(), 1))} clipped")
    return lines


def _extremes(values: np.ndarray, where: np.ndarray, bins: int) -> np.ndarray:
    """Indices to draw: all of `where`, or in a long log those of the smallest and largest value of each bin."""
    if values.size <= _MOST:
        return np.flatnonzero(where)
    width = -(-values.size // bins)
    padded = np.full(-(-values.size // width) * width, np.nan)
    padded[: values.size] = np.where(where, values, np.nan)
    rows = padded.reshape(-1, width)
    missing = np.isnan(rows)
    columns = [np.where(missing, np.inf, rows).argmin(axis=1), np.where(missing, -np.inf, rows).argmax(axis=1)]
    steps = np.unique(np.concatenate(columns + np.arange(len(rows)) * width))
    return steps[~np.isnan(padded[steps])]


def _limits(replays: list[Any]) -> tuple[float, float]:
    """Limits for all norms, and for the thresholds as far as three decades from them, with room for the legend."""
    inside = lambda values: values[np.isfinite(values) & (values > 0)].astype(np.float64)
    norms = inside(np.concatenate([seen.norm for seen in replays]))
    bounds = inside(np.concatenate([seen.threshold for seen in replays]))
    if norms.size:
        bounds = np.clip(bounds, norms.min() / FAR, norms.max() * FAR)
    both = np.log10(np.concatenate([norms, bounds])) if norms.size or bounds.size else np.zeros(1)
    low, high = both.min(), both.max()
    span = max(high - low, 0.5)
    return float(10 ** (low - 0.25 * span)), float(10 ** (high + 0.15 * span))


def _margin(low: float, high: float) -> tuple[float, float]:
    margin = 0.02 * (high - low) or 0.5
    return low - margin, high + margin


def percent(share: float) -> str:
    """A share in percent, of which 0 and 100 mean none and all."""
    percent = 100 * float(share)
    if percent in (0, 100):
        return f"{percent:.0f} %"
    return f"{percent:.2g} %" if percent < 99 else f"{min(percent, 99.99):.2f} %"

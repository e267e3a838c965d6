"""Figures of norms and of what clips do, drawn by matplotlib: `pip install "optax_clip[plot]"`."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from optax_clip import _checks
from optax_clip._choosing import PERCENTILES, suggest_threshold
from optax_clip._figures import FAR, one_axes, percent, plain, thresholds
from optax_clip._responses import normalize, shrink, smooth, tanh

# The line before says what to install where there is no matplotlib.
from matplotlib import colormaps  # isort: skip
from matplotlib.axes import Axes  # isort: skip
from matplotlib.colors import LogNorm  # isort: skip
from matplotlib.patheffects import withStroke  # isort: skip

__all__ = ["thresholds", "distribution", "leaf_norms", "responses"]

_COLUMNS = 500  # of the heat map
_LABELS = 40  # rows of the heat map that have a label

# Line styles that differ in print, over colors of Okabe and Ito.
_CANDIDATES: list[dict[str, Any]] = [
    {"color": "#D55E00", "linestyle": "--"},
    {"color": "black", "linestyle": "-."},
    {"color": "#009E73", "linestyle": ":"},
    {"color": "#CC79A7", "linestyle": (0, (8, 2))},
    {"color": "#E69F00", "linestyle": (0, (4, 1, 1, 1, 1, 1))},
    {"color": "#0072B2", "linestyle": (0, (1, 3))},
]


def distribution(norms: Any, candidates: Mapping[str, Any] | None = None, *, ax: Any = None) -> Axes:
    """Draws how recorded norms are distributed, with candidate thresholds and the share of the norms above each.

    A histogram over the logarithm of the norm. Counts are on a log scale too, so that a single spike is seen beside a
    million usual steps. Zeros and norms that are not finite have no place on it: the title counts them.

    Args:
      norms: [steps], real, >= 0, NaN and inf included, at least one finite and above 0: a list or an array.
      candidates: from a label to a threshold, a number above 0; None for the one that `suggest_threshold` starts
        with, and the 90th and 99th percentile where they are above 0. What is three decades from all norms stands in
        the legend only.
      ax: the axes to draw on; None for a new pyplot figure.

    Returns:
      The axes.

    Raises:
      ValueError: `norms` is not a vector, holds a negative number, or nothing finite above 0; a candidate is not above
        0 or not finite.
      TypeError: an argument is of the wrong kind.

    Guarantees:
      As for `thresholds`.

    Example:
      >>> from matplotlib.figure import Figure
      >>> ax = distribution([1.0, 1.1, 0.9, 1.2, 9.0, 0.0], {"two": 2.0}, ax=Figure().subplots())
      >>> print(ax.get_legend().get_texts()[0].get_text(), "|", ax.get_title())
      two: 2, 17 % above | 6 norms, 1 of them 0
    """
    values = _checks.norms(norms, caller="distribution")
    finite = values[np.isfinite(values)]
    positive = finite[finite > 0]
    if not positive.size:
        raise ValueError(
            f"distribution: norms has no finite number above 0 among {values.size}. At least one is required. "
            "Record norms with clip_by_global_norm(None) and clip_metrics."
        )
    lines = _suggested(finite) if candidates is None else _candidates(candidates)
    ax = one_axes(ax, caller="distribution", size=(6.0, 3.6))
    inside = np.clip(list(lines.values()), positive.min() / FAR, positive.max() * FAR)
    ax.set(xscale="log", yscale="log")
    ax.set_xlim(min([positive.min(), *inside]) / 1.2, max([positive.max(), *inside]) * 1.2)
    # Between 20 and 100 bins, equal on the logarithm, over a range that is never empty.
    logs = np.log10(positive)
    bins = int(np.clip(len(np.histogram_bin_edges(logs, "fd")) - 1, 20, 100)) if np.ptp(logs) else 20
    edges = 10 ** np.linspace(logs.min() - 0.05, logs.max() + 0.05, bins + 1)
    ax.hist(positive, edges, color="0.75", edgecolor="0.4", linewidth=0.4)
    drawn, texts = [], []
    for i, (label, candidate) in enumerate(lines.items()):
        drawn.append(ax.axvline(candidate, linewidth=1.8, **_CANDIDATES[i % len(_CANDIDATES)]))
        texts.append(f"{plain(label)}: {candidate:.3g}, {percent(float(np.mean(finite > candidate)))} above")
    if lines:
        ax.legend(drawn, texts, fontsize="small", loc="upper right")
    lost, zeros = values.size - finite.size, finite.size - positive.size
    title = f"{values.size} norms" + (f", {zeros} of them 0" if zeros else "")
    ax.set_title(title + (f", {lost} not finite" if lost else ""))
    ax.set(xlabel="norm", ylabel="steps")
    ax.set_ylim(bottom=0.5)  # a bar of one step is seen
    return ax


def leaf_norms(norms: Any, *, ax: Any = None) -> Axes:
    """Draws the norms of leaves over the steps as a heat map: a row a leaf, a column a step, to find what explodes.

    Colors are on a log scale, dark for small norms and light for large ones; white is 0. Norms that are not finite are
    black, with a cross where a run of them begins. Logs of more than 500 steps are drawn by the largest norm of each of
    at most 500 equal spans of steps, in which one that is not finite counts as the largest: no spike is lost, while
    rows are higher than a pixel.

    Args:
      norms: tree of f32[steps], all of one length >= 1: what `scan` makes of `leaf_norm(updates)`, or a dict of lists.
        A path is the label of its row; None is left out.
      ax: the axes to draw on; None for a new pyplot figure.

    Returns:
      The axes, with the scale of colors as an axes inside.

    Raises:
      ValueError: there is no leaf or no step, lengths differ, or a norm is negative.
      TypeError: an argument is of the wrong kind.

    Guarantees:
      As for `thresholds`.

    Example:
      >>> from matplotlib.figure import Figure
      >>> steps = jnp.arange(1.0, 5.0)[:, None]
      >>> grads = {"w": jnp.ones((4, 3)) * steps, "b": jnp.ones((4, 2)) / steps}
      >>> by_leaf = jax.lax.map(leaf_norm, grads)
      >>> print([label.get_text() for label in leaf_norms(by_leaf, ax=Figure().subplots()).get_yticklabels()])
      ['b', 'w']
    """
    names, values, edges = _rows(norms)
    ax = one_axes(ax, caller="leaf_norms", size=(7.0, min(1.4 + 0.22 * len(names), 12.0)))
    lost = ~np.isfinite(values)
    inside = values[~lost & (values > 0)]
    low, high = (inside.min(), inside.max()) if inside.size else (0.5, 2.0)
    colors = colormaps["cividis"].with_extremes(bad="black", under="white")
    scale = LogNorm(low, high if high > low else 2 * low)
    shown = np.ma.masked_where(lost, np.maximum(values, np.finfo(np.float64).tiny))
    ax.set(xscale="linear", yscale="linear")
    mesh = ax.pcolormesh(edges, np.arange(len(names) + 1) - 0.5, shown, cmap=colors, norm=scale, rasterized=True)
    row, column = np.nonzero(np.diff(lost, axis=1, prepend=False) & lost)  # where runs begin
    middle = (edges[:-1] + edges[1:]) / 2
    outline = [withStroke(linewidth=2.5, foreground="black")]  # to be seen on white as well
    ax.plot(middle[column], row, "x", color="white", markersize=4, path_effects=outline, clip_on=False)
    every = -(-len(names) // _LABELS)
    ax.set_yticks(range(0, len(names), every), [plain(name) for name in names[::every]], fontsize="small")
    ax.set(xlabel="step", ylim=(len(names) - 0.5, -0.5), xlim=(edges[0], edges[-1]))
    extend = "min" if (values == 0).any() else "neither"
    ax.figure.colorbar(mesh, cax=ax.inset_axes((1.02, 0.0, 0.025, 1.0)), label="norm", extend=extend)
    return ax


_RESPONSES: dict[Any, dict[str, Any]] = {
    shrink: {"color": "black", "linestyle": "-", "linewidth": 1.4},
    tanh: {"color": "#0072B2", "linestyle": "-.", "linewidth": 1.8},
    smooth: {"color": "#D55E00", "linestyle": "--", "linewidth": 1.8},
    normalize: {"color": "#009E73", "linestyle": ":", "linewidth": 2.2},
}


def responses(*, ax: Any = None) -> Axes:
    """Draws what each response makes of a norm: the norm after it, against the one before, in units of the threshold.

    Small norms pass `shrink` untouched, `tanh` and `smooth` nearly so, and `normalize` takes them up to the threshold.
    At the threshold `shrink` has its kink, `tanh` leaves 0.76 of the norm and `smooth` half. Large norms come out at
    the threshold, `smooth` from below and slowest.

    Args:
      ax: the axes to draw on; None for a new pyplot figure.

    Returns:
      The axes.

    Raises:
      TypeError: `ax` is no axes.

    Guarantees:
      As for `thresholds`.

    Example:
      >>> from matplotlib.figure import Figure
      >>> print(responses(ax=Figure().subplots()).get_xlabel())
      norm before, over threshold
    """
    ax = one_axes(ax, caller="responses", size=(4.8, 3.4))
    before = np.geomspace(1e-2, 1e2, 401, dtype=np.float32)
    for response, look in _RESPONSES.items():
        after = before * np.asarray(response(jax.numpy.asarray(before), jax.numpy.float32(1.0)))
        ax.plot(before, after, label=response.__name__, **look)
    ax.set(xscale="log", yscale="log", xlim=(1e-2, 1e2), ylim=(1e-2, 2.0))
    ax.set(xlabel="norm before, over threshold", ylabel="norm after, over threshold")
    ax.legend(loc="lower right", fontsize="small")
    return ax


def _suggested(finite: np.ndarray) -> dict[str, float]:
    found = suggest_threshold(finite)
    share = dict(zip(PERCENTILES, found.candidates))
    lines = {"suggested": found.threshold, "90th percentile": share[90.0], "99th percentile": share[99.0]}
    return {label: float(line) for label, line in lines.items() if line > 0}


def _candidates(candidates: Any) -> dict[Any, float]:
    if not isinstance(candidates, Mapping):
        raise TypeError(
            f"distribution: candidates must map labels to thresholds, got {type(candidates).__name__}. "
            'For example: {"mine": 1.0}.'
        )
    for label, candidate in candidates.items():
        _checks.scalar(candidate, caller="distribution", name=f"candidates[{label!r}]", kinds=_checks.NUMBER)
        if not 0 < float(candidate) < np.inf:
            raise ValueError(
                f"distribution: candidates[{label!r}] must be above 0 and finite, got {float(candidate):g}. "
                "A line needs a place on the axis of norms."
            )
    return {label: float(candidate) for label, candidate in candidates.items()}


def _rows(norms: Any) -> tuple[list[str], np.ndarray, np.ndarray]:
    """The paths of the leaves, the largest norm of each span of steps, f64[leaves, spans], and the edges of spans."""
    is_number = lambda x: hasattr(x, "__float__") and np.ndim(x) == 0
    is_row = lambda x: type(x) in (list, tuple) and len(x) > 0 and all(map(is_number, x))
    names, values, lengths = [], [], set()
    for path, leaf in jax.tree_util.tree_leaves_with_path(norms, is_leaf=is_row):
        names.append(jax.tree_util.keystr(path, simple=True, separator="/"))
        row = _checks.norms(leaf, caller=f"leaf_norms: {names[-1]}" if path else "leaf_norms")
        lengths.add(len(row))
        if len(row):  # reduced one by one, since all rows may be more than memory holds; a NaN is the largest
            values.append(np.maximum.reduceat(row, np.arange(0, len(row), -(-len(row) // _COLUMNS))))
    if len(lengths) != 1 or 0 in lengths:
        raise ValueError(
            f"leaf_norms: norms must hold leaves of one length >= 1, got {len(names)} leaves of lengths "
            f"{sorted(lengths)}. Pass what scan stacks of leaf_norm(updates)."
        )
    (steps,) = lengths
    edges = np.minimum(np.arange(values[0].size + 1) * -(-steps // _COLUMNS), steps) - 0.5
    return names, np.stack(values), edges

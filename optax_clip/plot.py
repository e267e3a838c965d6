"""Figures of norms and of what clips do, drawn by matplotlib: `pip install "optax_clip[plot]"`."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from optax_clip import _checks
from optax_clip._choosing import suggest_threshold
from optax_clip._figures import one_axes, percent, thresholds
from optax_clip._responses import normalize, shrink, smooth, tanh

# The line before says what to install where there is no matplotlib.
from matplotlib import colormaps  # isort: skip
from matplotlib.axes import Axes  # isort: skip
from matplotlib.colors import LogNorm  # isort: skip

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
        with, and the 90th and 99th percentile.
      ax: the axes to draw on; None for a new pyplot figure.

    Returns:
      The axes.

    Raises:
      ValueError: what `suggest_threshold` raises; a candidate is not above 0 or not finite.
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
    found = suggest_threshold(values)
    if candidates is None:
        share = dict(zip((50, 75, 90, 95, 99, 99.9), found.candidates))
        candidates = {"suggested": found.threshold, "90th percentile": share[90], "99th percentile": share[99]}
    _check_candidates(candidates)
    ax = one_axes(ax, caller="distribution", size=(6.0, 3.6))
    finite = values[np.isfinite(values)]
    logs = np.log10(finite[finite > 0].astype(np.float64))
    # Between 20 and 100 bins, over a range that is never empty.
    low, high = logs.min() - 0.05, logs.max() + 0.05
    bins = np.clip(len(np.histogram_bin_edges(logs, "fd")) - 1, 20, 100) if np.ptp(logs) else 20
    edges = np.linspace(low, high, int(bins) + 1)
    ax.hist(10**logs, 10**edges, color="0.75", edgecolor="0.4", linewidth=0.4)
    for i, (label, candidate) in enumerate(candidates.items()):
        text = f"{label}: {float(candidate):.3g}, {percent(np.mean(finite > candidate))} above"
        ax.axvline(float(candidate), label=text, linewidth=1.8, **_CANDIDATES[i % len(_CANDIDATES)])
    lost, zeros = values.size - finite.size, int(np.sum(finite == 0))
    title = f"{values.size} norms" + (f", {zeros} of them 0" if zeros else "")
    ax.set(xscale="log", yscale="log", xlabel="norm", ylabel="steps")
    ax.set_ylim(bottom=0.5)
    ax.set_title(title + (f", {lost} not finite" if lost else ""))
    if candidates:
        ax.legend(fontsize="small", loc="upper right")
    return ax


def leaf_norms(norms: Any, *, ax: Any = None) -> Axes:
    """Draws the norms of leaves over the steps as a heat map: a row a leaf, a column a step, to find what explodes.

    Colors are on a log scale, dark for small norms and light for large ones; white is 0. Norms that are not finite are
    black, with a cross where a run of them begins. Logs of more than 500 steps are drawn by the largest norm of each of
    at most 500 equal spans of steps, in which one that is not finite counts as the largest: no spike is lost.

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
    rows = _rows(norms)
    ax = one_axes(ax, caller="leaf_norms", size=(7.0, min(1.4 + 0.22 * len(rows), 12.0)))
    steps = len(next(iter(rows.values())))
    # Of each span, the largest; NaN counts as inf, so that it is drawn as not finite.
    width = -(-steps // _COLUMNS)
    values = np.where(np.isnan(list(rows.values())), np.inf, list(rows.values()))
    values = np.maximum.reduceat(values, np.arange(0, steps, width), axis=1)
    lost = ~np.isfinite(values)
    drawn = values[~lost & (values > 0)]
    low, high = (drawn.min(), drawn.max()) if drawn.size else (0.5, 2.0)
    colors = colormaps["cividis"].with_extremes(bad="black", under="white")
    scale = LogNorm(low, high if high > low else 2 * low)
    edges = np.minimum(np.arange(values.shape[1] + 1) * width, steps) - 0.5
    shown = np.ma.masked_where(lost, np.maximum(values, np.finfo(np.float64).tiny))
    mesh = ax.pcolormesh(edges, np.arange(len(rows) + 1) - 0.5, shown, cmap=colors, norm=scale, rasterized=True)
    row, column = np.nonzero(lost & ~np.roll(lost, 1, axis=1) | lost & (np.arange(values.shape[1]) == 0))
    middle = (edges[:-1] + edges[1:]) / 2
    ax.plot(middle[column], row, "x", color="white", markersize=4, label="not finite")
    every = -(-len(rows) // _LABELS)
    ax.set_yticks(range(0, len(rows), every), list(rows)[::every], fontsize="small")
    ax.set(xlabel="step", ylim=(len(rows) - 0.5, -0.5), xlim=(edges[0], edges[-1]))
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


def _check_candidates(candidates: Any) -> None:
    if not isinstance(candidates, Mapping):
        raise TypeError(
            f"distribution: candidates must map labels to thresholds, got {type(candidates).__name__}. "
            'For example: {"mine": 1.0}.'
        )
    for label, candidate in candidates.items():
        if isinstance(candidate, bool | str) or not hasattr(candidate, "__float__") or np.ndim(candidate):
            raise TypeError(
                f"distribution: candidates[{label!r}] must be a number, got {type(candidate).__name__}. "
                'For example: {"mine": 1.0}.'
            )
        if not 0 < float(candidate) < np.inf:
            raise ValueError(
                f"distribution: candidates[{label!r}] must be above 0 and finite, got {float(candidate):g}. "
                "A line needs a place on the axis of norms."
            )


def _rows(norms: Any) -> dict[str, np.ndarray]:
    """The norms of each leaf as a vector in f64, by its path."""
    is_row = lambda x: (
        isinstance(x, list | tuple) and all(hasattr(entry, "__float__") and np.ndim(entry) == 0 for entry in x)
    )
    rows = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(norms, is_leaf=is_row):
        name = jax.tree_util.keystr(path, simple=True, separator="/") or "norm"
        rows[name] = _checks.norms(leaf, caller=f"leaf_norms: {name}")
    lengths = {len(row) for row in rows.values()}
    if len(lengths) != 1 or 0 in lengths:
        raise ValueError(
            f"leaf_norms: norms must hold leaves of one length >= 1, got {len(rows)} leaves of lengths "
            f"{sorted(lengths)}. Pass what scan stacks of leaf_norm(updates)."
        )
    return rows

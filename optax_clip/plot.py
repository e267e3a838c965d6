"""Figures of norms and of what clips do, drawn by matplotlib: `pip install "optax_clip[plot]"`."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from optax_clip._engine import checks
from optax_clip.responses import normalize, shrink, smooth, tanh
from optax_clip.tools.replay import Replay, replay
from optax_clip.tools.suggest import suggest_threshold

try:
    from matplotlib import colormaps
    from matplotlib.axes import Axes
    from matplotlib.colors import LogNorm
    from matplotlib.patheffects import withStroke
    from matplotlib.rcsetup import cycler
except ModuleNotFoundError as _error:
    raise ImportError("matplotlib is missing. optax_clip.plot needs it: pip install 'optax_clip[plot]'.") from _error

__all__ = ["thresholds", "distribution", "leaf_norms", "responses"]

_SPANS = 500  # spans of steps in long logs: about one for every two pixels
_FAR = 1e3  # thresholds this many times beyond all norms are left out of the picture
_HALO = [withStroke(linewidth=3.2, foreground="white")]  # to be seen on what lies beneath
# Colors of Okabe and Ito, which color-blind readers can tell apart, with styles that differ in print.
_LINES = cycler(
    color=["black", "#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00"],
    linestyle=["-", "--", "-.", ":", (0, (8, 2)), (0, (4, 1, 1, 1, 1, 1))],
)


def thresholds(norms: Any, clips: Mapping[str, Any], *, ax: Any = None) -> np.ndarray:
    """Draws recorded norms with the threshold of each of several clips, and the steps it would have clipped.

    One axes for each clip, side by side with the same limits. A step that is not finite is marked along the top edge.
    Logs of more than 500 steps are drawn by the smallest and largest value of each of at most 500 equal spans of steps:
    no spike is lost.

    Args:
      norms: [steps], real, >= 0, NaN and inf included, at least one: a list or an array.
      clips: from a label to a norm clip, which `replay` runs on the norms, or to what `replay` returned for them.
      ax: the axes to draw on, as many as clips; None for a new pyplot figure.

    Returns:
      The axes, object[clips], in the order of the clips.

    Raises:
      ValueError: there are no norms, or not as many axes as clips; what `replay` raises.
      TypeError: what `replay` raises.

    Guarantees:
      With axes given, nothing but these axes is touched: no window, no pyplot, no settings. Nothing is shown or saved.

    Example:
      >>> from matplotlib.figure import Figure
      >>> from optax_clip import plot
      >>> ax = Figure().subplots(1, 2)
      >>> clips = {"fixed": clip_by_global_norm(2.0), "adaptive": clip_by_sigma(window=2)}
      >>> left, right = plot.thresholds([1.0, 1.5, 4.0, 1.0], clips, ax=ax)
      >>> print(left.get_title())
      fixed
      25 % clipped
    """
    seen = [jax.tree.map(np.asarray, x if isinstance(x, Replay) else replay(x, norms)) for x in clips.values()]
    axes = _axes(ax, len(clips), (3.2 * len(clips) + 0.8, 3.6))
    limits = _limits(np.concatenate([x.norm for x in seen]), np.concatenate([x.threshold for x in seen]))
    for one, label, each in zip(axes, clips, seen):
        _draw(one, each)
        rate = np.sum(each.clipped) / max(np.isfinite(each.norm).sum(), 1)
        one.set(ylim=limits, yscale="log", xlabel="step", title=f"{label}\n{100 * rate:.3g} % clipped")
    axes[0].set_ylabel("norm")
    axes[0].legend(loc="lower center", ncols=2, fontsize="small")
    return axes


def distribution(norms: Any, candidates: Mapping[str, Any] | None = None, *, ax: Any = None) -> Axes:
    """Draws how recorded norms are distributed, with candidate thresholds and the share of the norms above each.

    A histogram over the logarithm of the norm. Counts are on a log scale too, so that a single spike is seen beside a
    million usual steps. Zeros and norms that are not finite have no place on it: the legend counts the others.

    Args:
      norms: [steps], real, >= 0, NaN and inf included, at least one finite and above 0: a list or an array.
      candidates: from a label to a threshold, a number >= 0; None for the one that `suggest_threshold` starts with,
        and the 99th percentile. What is three decades from all norms stands in the legend only.
      ax: the axes to draw on; None for a new pyplot figure.

    Returns:
      The axes.

    Raises:
      ValueError: `norms` is not a vector, holds a negative number, or nothing finite above 0.
      TypeError: `norms` holds no real numbers.

    Guarantees:
      As for `thresholds`.

    Example:
      >>> from matplotlib.figure import Figure
      >>> from optax_clip import plot
      >>> ax = plot.distribution([1.0, 1.1, 0.9, 1.2, 9.0, 0.0], {"two": 2.0}, ax=Figure().subplots())
      >>> print(*[text.get_text() for text in ax.get_legend().get_texts()], sep=" | ")
      5 of 6 norms | two: 2, 16.7 % above
    """
    found, values = suggest_threshold(norms), checks.norms(norms)
    if candidates is None:
        candidates = {"suggested": found.threshold, "99th percentile": found.candidates[4]}
    lines = {label: float(candidate) for label, candidate in candidates.items()}
    finite = values[np.isfinite(values)]
    positive = finite[finite > 0]
    (ax,) = _axes(ax, 1, (6.0, 3.6))
    ax.set(xscale="log", yscale="log", xlabel="norm", ylabel="steps", xlim=_limits(positive, list(lines.values())))
    bins = np.geomspace(positive.min() / 1.1, positive.max() * 1.1, 51)
    label = f"{positive.size} of {values.size} norms"
    ax.hist(positive, bins, color="0.75", edgecolor="0.4", linewidth=0.4, label=label)
    for (label, line), look in zip(lines.items(), _LINES()):
        above = 100 * np.mean(finite > line)
        ax.axvline(line, linewidth=1.8, label=f"{label}: {line:.3g}, {above:.3g} % above", **look)
    ax.set_ylim(bottom=0.5)  # a bar of one step is seen
    ax.legend(fontsize="small", loc="upper right")
    return ax


def leaf_norms(norms: Any, *, ax: Any = None) -> Axes:
    """Draws norms of leaves as a heat map, one row for each leaf and one column for each step, to find what explodes.

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
      TypeError: a leaf holds no real numbers.

    Guarantees:
      As for `thresholds`.

    Example:
      >>> from matplotlib.figure import Figure
      >>> from optax_clip import plot
      >>> steps = jnp.arange(1.0, 5.0)[:, None]
      >>> grads = {"w": jnp.ones((4, 3)) * steps, "b": jnp.ones((4, 2)) / steps}
      >>> by_leaf = jax.lax.map(leaf_norm, grads)
      >>> print([label.get_text() for label in plot.leaf_norms(by_leaf, ax=Figure().subplots()).get_yticklabels()])
      ['b', 'w']
    """
    is_row = lambda x: isinstance(x, list) and all(checks.is_real(y) and np.ndim(y) == 0 for y in x)
    rows = jax.tree_util.tree_leaves_with_path(norms, is_leaf=is_row)
    names = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in rows]
    values = np.stack([checks.norms(row, f"norms{jax.tree_util.keystr(path)}") for path, row in rows])
    steps = values.shape[1]
    starts = _starts(steps)
    values = np.maximum.reduceat(values, starts, axis=1)  # a NaN is the largest
    lost = ~np.isfinite(values)
    shown = np.maximum(values, np.finfo(np.float64).tiny)  # below all limits, where 0 would count as missing
    (ax,) = _axes(ax, 1, (7.0, min(1.4 + 0.22 * len(names), 12.0)))
    colors = colormaps["cividis"].with_extremes(bad="black", under="white")
    edges = np.append(starts, steps) - 0.5, np.arange(len(names) + 1) - 0.5
    mesh = ax.pcolormesh(*edges, shown, cmap=colors, norm=LogNorm(*_limits(values, [])), rasterized=True)
    row, column = np.nonzero(np.diff(lost, axis=1, prepend=False) & lost)  # where runs begin
    ax.plot(starts[column], row, "x", color="black", markersize=4, path_effects=_HALO)
    every = -(-len(names) // 40)  # more labels would overlap
    ax.set_yticks(range(0, len(names), every), names[::every], fontsize="small")
    ax.set(xlabel="step", xlim=(-0.5, steps - 0.5), ylim=(len(names) - 0.5, -0.5))
    ax.figure.colorbar(mesh, cax=ax.inset_axes((1.02, 0.0, 0.025, 1.0)), label="norm")
    return ax


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
      ValueError: `ax` is several axes.

    Guarantees:
      As for `thresholds`.

    Example:
      >>> from matplotlib.figure import Figure
      >>> from optax_clip import plot
      >>> print(plot.responses(ax=Figure().subplots()).get_xlabel())
      norm before, over threshold
    """
    (ax,) = _axes(ax, 1, (4.8, 3.4))
    before = jnp.geomspace(1e-2, 1e2, 401)
    for response, look in zip((shrink, smooth, tanh, normalize), _LINES):
        ax.plot(before, response(before, jnp.ones(())), label=response.__name__, linewidth=1.8, **look)
    ax.set(xscale="log", yscale="log", xlim=(1e-2, 1e2), ylim=(1e-2, 2.0))
    ax.set(xlabel="norm before, over threshold", ylabel="norm after, over threshold")
    ax.legend(loc="lower right", fontsize="small")
    return ax


def _axes(ax: Any, count: int, size: tuple[float, float]) -> np.ndarray:
    """The axes given, or those of a new pyplot figure."""
    if ax is None:
        from matplotlib import pyplot

        ax = pyplot.subplots(1, count, sharey=True, figsize=size, layout="constrained")[1]
    axes = np.ravel(ax)
    if len(axes) != count:
        raise ValueError(f"ax must be {count} axes, got {len(axes)}. For example: figure.subplots(1, {count}).")
    return axes


def _draw(ax: Axes, seen: Replay) -> None:
    """Draws the steps of one clip. NaN is where there is nothing to draw; inf, where nothing is clipped, is a gap."""
    finite = np.isfinite(seen.norm)
    norm, clipped = np.where(finite, seen.norm, np.nan), np.where(seen.clipped, seen.norm, np.nan)
    lost = np.where(finite, np.nan, 0.96)  # a height of the axes
    ax.plot(*_thin(norm), label="norm", color="#666666", linewidth=0.6)
    ax.plot(*_thin(clipped), "o", label="clipped", color="#0072B2", markersize=3.5, markerfacecolor="white")
    ax.plot(*_thin(seen.threshold), "--", label="threshold", color="#D55E00", linewidth=1.6, path_effects=_HALO)
    look = {"color": "#CC79A7", "markersize": 7, "markeredgecolor": "black"}
    ax.plot(*_thin(lost), "v", label="not finite", transform=ax.get_xaxis_transform(), **look)


def _starts(steps: int) -> np.ndarray:
    """The first step of each span: every step, or in a long log every n-th."""
    if not steps:
        raise ValueError("norms must hold a step, got none. Pass the norms of a run.")
    return np.arange(0, steps, -(-steps // _SPANS))


def _thin(values: Any) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values to draw: the smallest and the largest of each span, where there is one."""
    starts = _starts(len(values))
    ends = np.stack([np.fmin.reduceat(values, starts), np.fmax.reduceat(values, starts)], axis=1).ravel()
    return np.repeat(starts, 2)[~np.isnan(ends)], ends[~np.isnan(ends)]


def _limits(norms: Any, bounds: Any) -> tuple[float, float]:
    """Limits for all norms above 0 and the bounds near them, with room around."""
    norms, bounds = np.asarray(norms, np.float64), np.asarray(bounds, np.float64)
    positive = norms[np.isfinite(norms) & (norms > 0)]
    low, high = (positive.min(), positive.max()) if positive.size else (1.0, 1.0)
    near = bounds[(bounds > low / _FAR) & (bounds < high * _FAR)]
    logs = np.log10([low, high, *near])
    room = 0.2 * max(np.ptp(logs), 0.5)
    return 10 ** (logs.min() - room), 10 ** (logs.max() + room)

"""Figures: what stands on the axes, and that nothing else is touched."""

import functools
import io
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import pytest
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

import optax_clip as oc
from optax_clip import _figures, plot

ROOT = pathlib.Path(__file__).parents[1]
CLIPS = {
    "fixed": oc.clip_by_global_norm(1.5),
    "zclip": oc.zclip(),
    "autoclip": oc.autoclip(90.0),
    "adagc": oc.adagc(),
    "sigma": oc.clip_by_sigma(),
}
ZERO = oc.clip_by_global_norm(0.0)
NAMES = ["norm", "clipped", "threshold", "not finite"]  # in the order they are drawn
OKABE_ITO = {"#000000", "#e69f00", "#56b4e9", "#009e73", "#f0e442", "#0072b2", "#d55e00", "#cc79a7"}
NAN, INF = float("nan"), float("inf")


@functools.cache
def stream(steps: int = 500) -> np.ndarray:
    """Norms that drift, with spikes of 100, and five that are not finite."""
    random = np.random.default_rng(0)
    norms = random.lognormal(0.0, 0.3, steps) * np.linspace(1.0, 0.3, steps)
    norms[[steps // 3, steps // 2]] = 100.0
    norms[[3, 40, 41, steps - 1]] = NAN
    norms[steps // 5] = INF
    return norms


def draw(norms, clips) -> list[Axes]:
    """The axes of a figure of its own."""
    return list(plot.thresholds(norms, clips, ax=Figure().subplots(1, len(clips), squeeze=False)[0]))


def lines(ax: Axes) -> dict:
    return dict(zip(NAMES, ax.get_lines(), strict=True))


def points(line) -> tuple[np.ndarray, np.ndarray]:
    return tuple(map(np.asarray, line.get_data(orig=True)))


def render(ax: Axes) -> bytes:
    file = io.BytesIO()
    ax.figure.savefig(file, format="png", dpi=50)
    return file.getvalue()


@pytest.mark.parametrize("label", CLIPS)
def test_lines_are_those_of_replay(label):
    """Norm, threshold, clipped steps and steps that are not finite are exactly what replay says, at their steps."""
    norms, seen = stream(), jax.tree.map(np.asarray, oc.replay(CLIPS[label], stream()))
    (ax,) = draw(norms, {label: CLIPS[label]})
    finite = np.isfinite(norms)
    steps = {
        "norm": finite,
        "clipped": seen.clipped,
        "threshold": ~np.isnan(seen.threshold),
        "not finite": ~finite,
    }
    values = {"norm": seen.norm, "clipped": seen.norm, "threshold": seen.threshold}
    for name, where in steps.items():
        x, y = points(lines(ax)[name])
        np.testing.assert_array_equal(x, np.flatnonzero(where))
        np.testing.assert_array_equal(y, values[name][where] if name in values else 0.96)


def test_axes_are_labelled_and_share_their_limits():
    """There is an axes a clip in the order of the mapping, log in y, with a title that has the clip rate."""
    axes = draw(stream(), CLIPS)
    assert [ax.get_title().split("\n")[0] for ax in axes] == list(CLIPS)
    assert {ax.get_yscale() for ax in axes} == {"log"}
    assert {ax.get_xlabel() for ax in axes} == {"step"}
    assert [ax.get_ylabel() for ax in axes] == ["norm", "", "", "", ""]
    assert len({ax.get_ylim() for ax in axes}) == len({ax.get_xlim() for ax in axes}) == 1
    low, high = axes[0].get_ylim()
    assert low < np.nanmin(stream()) and high > 100
    assert [text.get_text() for text in axes[0].get_legend().get_texts()] == NAMES
    assert all(ax.get_legend() is None for ax in axes[1:])


def test_legend_names_what_is_drawn():
    """A name of the legend stands beside the look of its line, also where a kind of line has nothing to show."""
    (ax,) = draw([1.0, 2.0, NAN], {"fixed": oc.clip_by_global_norm(3.0)})  # nothing is clipped
    drawn, legend = lines(ax), ax.get_legend()
    names = [text.get_text() for text in legend.get_texts()]
    assert names == ["norm", "threshold", "not finite"]
    for name, shown in zip(names, legend.get_lines(), strict=True):
        for look in ("color", "linestyle", "marker"):
            assert plt.getp(shown, look) == plt.getp(drawn[name], look)


@pytest.mark.parametrize(
    ("bound", "title"), [(None, "0 % clipped"), (2.5, "50 % clipped"), (3.5, "25 % clipped"), (0.0, "100 % clipped")]
)
def test_title_has_the_clip_rate(bound, title):
    """The clip rate is the share of finite norms above the threshold."""
    (ax,) = draw([1.0, 2.0, NAN, 3.0, 4.0], {"fixed": oc.clip_by_global_norm(bound)})
    assert ax.get_title() == f"fixed\n{title}"
    assert ax.get_xlim()[0] < 0 and ax.get_xlim()[1] > 4  # the first step and the last are seen


@pytest.mark.parametrize(
    ("share", "shown"), [(1e-5, "0.001 %"), (0.123, "12 %"), (0.9951, "99.51 %"), (1 - 1e-6, "99.99 %")]
)
def test_rates_near_none_and_all(share, shown):
    """Only a share of exactly 0 or 1 reads as 0 or 100 percent."""
    assert _figures.percent(share) == shown


def test_looks_differ_without_color():
    """Colors are those of Okabe and Ito, or gray; lines differ in style and markers in shape."""
    (ax,) = draw(stream(), {"zclip": oc.zclip()})
    found = lines(ax).values()
    assert {to_hex(line.get_color()) for line in found} - OKABE_ITO == {"#666666"}
    looks = [(line.get_linestyle(), line.get_marker()) for line in found]
    assert looks == [("-", "None"), ("None", "o"), ("--", "None"), ("None", "v")]


def test_a_single_step_is_seen():
    """A line through one point has a marker, and a marker keeps its shape."""
    (ax,) = draw([3.0], {"fixed": oc.clip_by_global_norm(1.0)})
    assert {name: line.get_marker() for name, line in lines(ax).items() if len(line.get_xdata()) == 1} == {
        "norm": ".",
        "clipped": "o",
        "threshold": ".",
    }


def test_legend_names_only_what_is_there():
    """Without a clipped step or one that is not finite, the legend has none."""
    axes = draw([1.0, 2.0, 1.0], {"none": oc.clip_by_global_norm(None), "high": oc.clip_by_global_norm(5.0)})
    assert [text.get_text() for text in axes[0].get_legend().get_texts()] == ["norm", "threshold"]


def test_not_finite_steps_are_seen():
    """A marker stands inside the top edge for each, whatever the norms, and its color is in the picture."""
    (ax,) = draw(stream(), {"fixed": oc.clip_by_global_norm(1.5)})
    canvas = FigureCanvasAgg(ax.figure)
    canvas.draw()
    line = lines(ax)["not finite"]
    heights = ax.transAxes.inverted().transform(line.get_transform().transform(np.transpose(points(line))))[:, 1]
    np.testing.assert_allclose(heights, 0.96)
    pixels = np.asarray(canvas.buffer_rgba())[..., :3].reshape(-1, 3)
    assert (pixels == np.uint8([0xCC, 0x79, 0xA7])).all(axis=1).any()


@pytest.mark.parametrize("spike", [0, 1, 4999, 77_777, 99_998, 99_999])
def test_long_log_keeps_every_spike(spike):
    """Of 100 000 steps few are drawn, among them any single spike, any single dip and their markers."""
    norms = np.array(np.random.default_rng(1).lognormal(0.0, 0.2, 100_000), np.float32)
    norms[spike], norms[50_000], norms[[60_000, 60_001]] = 1000.0, 1e-3, NAN
    seen = oc.replay(CLIPS["fixed"], norms)
    (ax,) = draw(norms, {"fixed": seen})
    found = {name: points(line) for name, line in lines(ax).items()}
    assert all(len(x) <= 2500 for x, _ in found.values())
    assert {spike, 50_000} <= set(found["norm"][0])
    assert spike in found["clipped"][0]
    assert found["not finite"][0].tolist() == [60_000]
    assert set(found["clipped"][0]) <= set(np.flatnonzero(seen.clipped))
    for name in ("norm", "clipped"):
        np.testing.assert_array_equal(found[name][1], norms[found[name][0]])
    assert np.all(np.diff(found["norm"][0]) > 0)


@pytest.mark.parametrize("steps", [1, 2, 1999, 2000, 2001, 2003, 4001])
def test_extremes_of_any_length(steps):
    """Each bin gives its smallest and largest value; short logs, and logs of nothing, are drawn as they are."""
    values = np.random.default_rng(steps).permutation(steps).astype(float)
    where = values % 3 != 0
    chosen = _figures._extremes(values, where, 100)
    assert where[chosen].all()
    if steps <= 2000:
        np.testing.assert_array_equal(chosen, np.flatnonzero(where))
    else:
        width = -(-steps // 100)
        for start in range(0, steps, width):
            inside = np.where(where, values, NAN)[start : start + width]
            assert {start + np.nanargmin(inside), start + np.nanargmax(inside)} <= set(chosen)
    assert _figures._extremes(values, np.zeros(steps, bool), 100).size == 0


@pytest.mark.parametrize(
    "norms",
    [
        [1.0],
        [0.0],
        [NAN],
        [INF, NAN],
        [1.0, NAN, 1.0],
        [1e-38, 3e38],
        np.zeros(3000),
    ],
    ids=lambda norms: f"{norms[0]} {len(norms)}",
)
def test_odd_logs_render(norms):
    """Single steps, zeros, logs without a finite norm and norms over the whole range of f32 can be drawn."""
    axes = draw(norms, {"zero": ZERO, "zclip": CLIPS["zclip"]})
    assert render(axes[0]).startswith(b"\x89PNG")


def test_a_far_threshold_leaves_the_norms_legible():
    """A threshold is in the picture if near, and gets no more than three decades if far."""
    for bound, top in ((30.0, 30.0), (1e30, 2e3)):
        (ax,) = draw([1.0, 2.0], {"fixed": oc.clip_by_global_norm(bound)})
        assert top < ax.get_ylim()[1] < 20 * top
    (ax,) = draw([1.0, 2.0], {"fixed": oc.clip_by_global_norm(1e-30)})
    assert 1e-5 < ax.get_ylim()[0] < 1e-3


def test_axes_given_are_used_and_nothing_else():
    """With axes given they come back, and pyplot, settings and the rest of the figure stay as they were."""
    program = """if True:
        import sys, matplotlib
        from matplotlib.figure import Figure
        from optax_clip import clip_by_global_norm, plot
        before = dict(matplotlib.rcParams.copy())
        ax = Figure().subplots(2, 2)
        found = plot.thresholds([1.0, 2.0], {"a": clip_by_global_norm(1.0), "b": clip_by_global_norm(2.0)}, ax=ax[1])
        assert found[0] is ax[1, 0] and found[1] is ax[1, 1] and len(found) == 2
        assert not ax[0, 0].has_data() and not ax[0, 1].has_data()
        assert "matplotlib.pyplot" not in sys.modules
        assert dict(matplotlib.rcParams.copy()) == before
    """
    subprocess.run([sys.executable, "-W", "error", "-c", program], check=True, cwd=ROOT)


@pytest.mark.parametrize("shape", [tuple, list, np.asarray, lambda axes: axes[0]])
def test_axes_as_any_sequence(shape):
    """Axes may stand in a tuple, a list or an array; one clip may have its axes alone."""
    axes = [Figure().subplots()]
    (found,) = plot.thresholds([1.0, 2.0], {"a": oc.zclip()}, ax=shape(axes))
    assert found is axes[0]


def test_new_figure_is_one_of_pyplot():
    """Without axes there is one new pyplot figure, not shown, and settings stay as they were."""
    plt.switch_backend("agg")
    before, open_before = dict(matplotlib.rcParams.copy()), set(plt.get_fignums())
    axes = plot.thresholds(stream(), CLIPS)
    (new,) = set(plt.get_fignums()) - open_before
    try:
        assert axes.shape == (len(CLIPS),)
        assert axes[0].figure is plt.figure(new) and list(axes) == axes[0].figure.axes
        assert axes[0].get_shared_y_axes().joined(axes[0], axes[4])
        assert dict(matplotlib.rcParams.copy()) == before
        assert render(axes[0]).startswith(b"\x89PNG")
    finally:
        plt.close(new)


NO_CLIP = {"a": 1.0}
BAD = {
    "clips list": ([1.0], [oc.zclip()], None, TypeError, "clips must map labels to norm clips, got list"),
    "clips empty": ([1.0], {}, None, ValueError, "clips is empty"),
    "clip": ([1.0], NO_CLIP, None, TypeError, "clips must map labels to norm clips, got float for 'a'"),
    "norms empty": ([], {"a": oc.zclip()}, None, ValueError, "norms is empty"),
    "norms matrix": ([[1.0]], {"a": oc.zclip()}, None, ValueError, r"norms must be a vector.*shape \(1, 1\)"),
    "norms negative": ([0.0, -1.0], {"a": oc.zclip()}, None, ValueError, "norms must be >= 0, got -1 at step 1"),
    "norms text": (["a"], {"a": oc.zclip()}, None, TypeError, "norms must be real numbers"),
    "replay": (
        [1.0],
        {"a": oc.replay(oc.zclip(), [1.0, 2.0])},
        None,
        ValueError,
        r"the Replay for 'a'.*1 norms.*\(2,\)",
    ),
    "ax count": ([1.0], {"a": oc.zclip()}, (2,), ValueError, "ax must hold an axes for each of 1 clips, got 2"),
    "ax kind": ([1.0], {"a": oc.zclip()}, "axes", TypeError, "ax must be axes of matplotlib, got str"),
}


@pytest.mark.parametrize("case", BAD)
def test_error_messages(case):
    """Wrong arguments are refused before anything is drawn, with what was given and what would do."""
    norms, clips, ax, error, text = BAD[case]
    ax = Figure().subplots(1, *ax) if isinstance(ax, tuple) else ax
    with pytest.raises(error, match=rf"^thresholds: {text}.*\. \w.*\.$"):
        plot.thresholds(norms, clips, ax=ax)


def test_without_matplotlib():
    """Without matplotlib the import says what to install."""
    program = "import sys; sys.modules['matplotlib'] = None; import optax_clip, optax_clip.plot"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode != 0
    assert (
        'ImportError: optax_clip.plot: matplotlib is missing. Figures need it. Run pip install "optax_clip[plot]".'
        in (done.stderr)
    )


# Responses


def test_responses_are_drawn_as_they_are():
    """A line for each response, through the values that their docstrings give at, below and above the threshold."""
    ax = plot.responses(ax=Figure().subplots())
    drawn = {line.get_label(): points(line) for line in ax.get_lines()}
    assert drawn.keys() == {"shrink", "normalize", "smooth", "tanh"}
    at = {name: np.interp([0.01, 1.0, 100.0], *xy) for name, xy in drawn.items()}
    np.testing.assert_allclose(at["shrink"], [0.01, 1, 1], rtol=1e-3)
    np.testing.assert_allclose(at["normalize"], [1, 1, 1], rtol=1e-3)
    np.testing.assert_allclose(at["smooth"], [0.01 / 1.01, 0.5, 100 / 101], rtol=1e-3)
    np.testing.assert_allclose(at["tanh"], [0.01, np.tanh(1), 1], rtol=1e-3)
    assert (ax.get_xscale(), ax.get_yscale(), *ax.get_xlim()) == ("log", "log", 0.01, 100)
    assert (ax.get_xlabel(), ax.get_ylabel()) == tuple(f"norm {when}, over threshold" for when in ("before", "after"))
    assert len({line.get_linestyle() for line in ax.get_lines()}) == 4  # told apart in black and white
    assert {to_hex(line.get_color()) for line in ax.get_lines()} <= {color.lower() for color in OKABE_ITO}
    assert [text.get_text() for text in ax.get_legend().get_texts()] == list(drawn)
    assert len(render(ax)) > 5000


def test_responses_make_a_figure_where_none_is_given():
    """Without axes there is a new pyplot figure; what is no axes is an error."""
    ax = plot.responses()
    assert plt.fignum_exists(ax.figure.number)
    plt.close(ax.figure)
    with pytest.raises(TypeError, match=r"responses: ax must be axes of matplotlib, got list.*ax=figure\.subplots"):
        plot.responses(ax=[ax])


# Distribution


def bars(ax: Axes) -> tuple[np.ndarray, np.ndarray]:
    """Edges and heights of the histogram."""
    left = [bar.get_x() for bar in ax.patches]
    return np.append(left, left[-1] + ax.patches[-1].get_width()), np.array([bar.get_height() for bar in ax.patches])


def test_distribution_counts_all_norms_above_zero():
    """The bars hold every finite norm above 0 once, equal on log axes; the title counts the others."""
    norms = np.append(stream(), [0.0, 0.0])
    ax = plot.distribution(norms, ax=Figure().subplots())
    inside = norms[np.isfinite(norms) & (norms > 0)]
    edges, heights = bars(ax)
    np.testing.assert_array_equal(heights, np.histogram(inside, edges)[0])
    assert heights.sum() == len(inside)
    assert inside.min() / 1.2 < edges[0] < inside.min() and inside.max() < edges[-1] < 1.2 * inside.max()
    np.testing.assert_allclose(np.diff(np.log(edges)), np.log(edges[1] / edges[0]), rtol=1e-6)
    assert ax.get_title() == "502 norms, 2 of them 0, 5 not finite"
    assert (ax.get_xscale(), ax.get_yscale(), ax.get_xlabel(), ax.get_ylabel()) == ("log", "log", "norm", "steps")
    low, high = ax.get_xlim()
    assert low < inside.min() and high > 100
    assert ax.get_ylim()[0] == 0.5  # a bar of one step is seen


@pytest.mark.parametrize(
    ("norms", "bins"),
    [
        (np.geomspace(1, 2, 10), 20),
        (np.random.default_rng(0).lognormal(size=2000), range(30, 100)),
        (np.append(np.geomspace(1, 1.01, 100_000), 1e9), 100),
    ],
    ids=["few", "usual", "outlier"],
)
def test_distribution_has_between_20_and_100_bins(norms, bins):
    """Few norms have 20 bars, many have more, and an outlier far away does not make millions of them."""
    found = len(plot.distribution(norms, ax=Figure().subplots()).patches)
    assert found == bins if isinstance(bins, int) else found in bins


def test_distribution_has_a_line_for_each_candidate():
    """A line stands at each candidate, with its label and the share of finite norms above it; styles differ."""
    norms = np.append(stream(), [0.5, 0.75])
    candidates = {"_$a": jnp.bfloat16(0.5), **{f"c{i}": np.float32(0.5 + i / 4) for i in range(1, 7)}}
    with jax.numpy_dtype_promotion("strict"):
        ax = plot.distribution(norms, candidates, ax=Figure().subplots())
    lines = ax.get_lines()
    assert [line.get_xdata()[0] for line in lines] == [float(value) for value in candidates.values()]
    looks = [[(line.get_linestyle(), line.get_color()) for line in of] for of in (lines, ax.get_legend().get_lines())]
    assert looks[0] == looks[1]
    finite = norms[np.isfinite(norms)]
    for text, (label, value) in zip(ax.get_legend().get_texts(), candidates.items(), strict=True):
        share = _figures.percent(np.mean(finite > float(value)))
        assert text.get_text() == rf"{label}: {float(value):.3g}, {share} above".replace("$", r"\$")
    assert len({str(look["linestyle"]) for look in plot._CANDIDATES}) == len(plot._CANDIDATES) == 6
    assert {to_hex(line.get_color()) for line in lines} <= OKABE_ITO
    assert render(ax)


def test_distribution_suggests_candidates():
    """Without candidates there are the suggested threshold and two percentiles; with none there is no legend."""
    found = oc.suggest_threshold(stream())
    ax = plot.distribution(stream(), ax=Figure().subplots())
    texts = [text.get_text().split(":")[0] for text in ax.get_legend().get_texts()]
    assert dict(zip(texts, [line.get_xdata()[0] for line in ax.get_lines()], strict=True)) == {
        "suggested": found.threshold,
        "90th percentile": found.candidates[2],
        "99th percentile": found.candidates[4],
    }
    assert plot.distribution(stream(), {}, ax=Figure().subplots()).get_legend() is None
    mostly_zero = plot.distribution([0.0] * 95 + [1.0] * 5, ax=Figure().subplots())
    assert len(mostly_zero.get_lines()) == 2  # the 90th percentile is 0 and has no place


def test_a_far_candidate_leaves_the_norms_legible():
    """A candidate is in the picture if near; one three decades away or further stands in the legend only."""
    for candidate, inside in ((500.0, True), (0.005, True), (1e20, False), (1e-20, False), (1e300, False)):
        ax = plot.distribution([1.0, 2.0], {"a": candidate}, ax=Figure().subplots())
        low, high = ax.get_xlim()
        assert (low < candidate < high) == inside and 1e-4 < low < 1 < 2 < high < 1e4
        assert len(ax.get_legend().get_texts()) == 1 and render(ax)


@pytest.mark.parametrize(
    "norms", [[1.0], [1.0, 1.0], [1e-38, 3e38], [NAN, 2.0], np.ones(5000)], ids=lambda norms: f"{norms[0]} {len(norms)}"
)
def test_odd_distributions_render(norms):
    """One norm, equal norms and norms over the whole range of f32 can be drawn."""
    ax = plot.distribution(norms, ax=Figure().subplots())
    assert sum(bars(ax)[1]) == np.isfinite(norms).sum() and render(ax)


# Norms by leaf


def cells(ax: Axes) -> np.ndarray:
    """What the heat map shows, NaN where norms are not finite."""
    (mesh,) = ax.collections
    return np.ma.filled(mesh.get_array(), NAN)


def test_leaf_norms_are_the_rows():
    """Each leaf is a row in the order of the tree, named by its path, each step a column."""
    tree = {"w": [{"kernel": np.array([1.0, 2.0, 3.0])}, None], "b": [4.0, 5.0, 6.0], "c": (7, 8, 9)}
    ax = plot.leaf_norms(tree, ax=Figure().subplots())
    assert [label.get_text() for label in ax.get_yticklabels()] == ["b", "c", "w/0/kernel"]
    np.testing.assert_array_equal(cells(ax), [[4, 5, 6], [7, 8, 9], [1, 2, 3]])
    assert ax.get_ylim() == (2.5, -0.5) and ax.get_xlim() == (-0.5, 2.5) and ax.get_xlabel() == "step"
    (scale,), (mesh,) = ax.child_axes, ax.collections
    assert scale.get_ylabel() == "norm" and scale.get_yscale() == "log" and mesh.colorbar.extend == "neither"
    assert (mesh.norm.vmin, mesh.norm.vmax) == (1.0, 9.0) and mesh.get_rasterized()
    assert render(ax)


def test_leaves_of_any_tree_are_kept_apart():
    """Paths that are spelled alike are rows of their own; empty containers are none; steps of size 1 are steps."""
    tree = {"a": {"b": [1.0, 2.0]}, "a/b": [3.0, 4.0], "c": (), "d": [], "$e_$": np.float32([5, 6])}
    ax = plot.leaf_norms(tree, ax=Figure().subplots())
    assert [label.get_text() for label in ax.get_yticklabels()] == [r"\$e_\$", "a/b", "a/b"]
    np.testing.assert_array_equal(cells(ax), [[5, 6], [1, 2], [3, 4]])
    assert render(ax)
    ax.clear()
    ax.set(xscale="log", yscale="log")
    assert plot.leaf_norms(np.ones(3), ax=ax).get_yscale() == "linear"
    assert [label.get_text() for label in ax.get_yticklabels()] == [""]


def test_leaf_norms_of_a_scan():
    """What scan stacks of `leaf_norm` can be drawn as it is."""
    gradients = {"w": np.arange(1.0, 9.0).reshape(4, 2), "b": np.ones((4, 3))}
    ax = plot.leaf_norms(jax.lax.map(oc.leaf_norm, gradients), ax=Figure().subplots())
    np.testing.assert_allclose(cells(ax)[1], np.linalg.norm(gradients["w"], axis=1), rtol=1e-6)


def test_leaf_norms_of_zero_and_not_finite_are_seen():
    """Zero is white, a norm that is not finite black with a cross, and what is large is lighter than what is small."""
    tree = {"a": [0.0, NAN, INF, 1.0], "b": [1.0, 10.0, NAN, 1e3]}
    ax = plot.leaf_norms(tree, ax=Figure().subplots())
    (mesh,) = ax.collections
    colors = mesh.to_rgba(mesh.get_array())
    assert (colors[..., 3] == 1).all()
    colors = colors[..., :3]
    assert (colors[0, 0] == 1).all() and (colors[0, 1:3] == 0).all() and (colors[1, 2] == 0).all()
    gray = colors @ [0.299, 0.587, 0.114]
    assert gray[1, 0] < gray[1, 1] < gray[1, 3] < 0.95
    (crosses,) = ax.get_lines()
    assert list(zip(*points(crosses))) == [(1, 0), (2, 1)]  # where runs begin
    assert to_hex(crosses.get_color()) == "#ffffff" and crosses.get_path_effects()  # on black, and on white
    assert mesh.colorbar.extend == "min"


def test_runs_at_either_end_have_a_cross():
    """A run of norms that are not finite is marked where it begins, at the first step and at the last."""
    ax = plot.leaf_norms({"a": [NAN, NAN, 1.0, INF]}, ax=Figure().subplots())
    assert list(zip(*points(ax.get_lines()[0]))) == [(0, 0), (3, 0)]
    (mesh,) = ax.collections
    assert mesh.norm.vmin < mesh.norm.vmax  # also of a single number


@pytest.mark.parametrize("steps", [1, 499, 500, 501, 999, 1000, 1001])
def test_spans_of_any_log(steps):
    """Up to 500 steps have a column each, more share at most 500, and the last column ends with the log."""
    norms = np.random.default_rng(steps).permutation(steps) + 1.0
    ax = plot.leaf_norms({"a": norms}, ax=Figure().subplots())
    width = -(-steps // 500)
    np.testing.assert_array_equal(cells(ax)[0], [norms[i : i + width].max() for i in range(0, steps, width)])
    edges = ax.collections[0].get_coordinates()[0, :, 0]
    assert edges[0] == -0.5 and edges[-1] == steps - 0.5 and len(edges) <= 501


@pytest.mark.parametrize("spike", [0, 777, 99_999])
def test_long_logs_of_leaves_keep_every_spike(spike):
    """Of 100 000 steps at most 500 columns are drawn, with the largest norm of each."""
    norms = np.ones(100_000)
    norms[spike], norms[50_000] = 1000.0, NAN
    ax = plot.leaf_norms({"a": norms, "b": np.ones(100_000)}, ax=Figure().subplots())
    shown = cells(ax)
    assert shown.shape[1] <= 500 and shown[0].tolist().count(1000.0) == 1 and np.isnan(shown[0]).sum() == 1
    edges = ax.collections[0].get_coordinates()[0, :, 0]
    at = int(np.nanargmax(shown[0]))
    assert edges[at] <= spike <= edges[at + 1]


def test_many_leaves_have_some_labels():
    """Of 1000 leaves some are named, and all are drawn."""
    ax = plot.leaf_norms({f"{i:03d}": [1.0, 2.0] for i in range(1000)}, ax=Figure().subplots())
    assert cells(ax).shape == (1000, 2) and 20 <= len(ax.get_yticklabels()) <= 40
    assert ax.get_yticklabels()[1].get_text() == "025"
    new = plot.leaf_norms({str(i): [1.0] for i in range(1000)})
    assert new.figure.get_figheight() == 12
    plt.close(new.figure)


@pytest.mark.parametrize("tree", [{"a": [0.0, 0.0]}, {"a": [NAN]}, np.ones(3)], ids=["zero", "NaN", "array"])
def test_odd_norms_of_leaves_render(tree):
    """Logs without a finite norm above 0 can be drawn, and a tree that is one leaf."""
    assert render(plot.leaf_norms(tree, ax=Figure().subplots()))


@pytest.mark.parametrize("draw", [plot.distribution, lambda x: plot.leaf_norms({"a": x})], ids=["norms", "leaves"])
def test_figures_of_norms_are_new_where_none_is_given(draw):
    """Without axes there is one new pyplot figure, and settings stay as they were."""
    plt.switch_backend("agg")
    before, open_before = dict(matplotlib.rcParams.copy()), set(plt.get_fignums())
    ax = draw([1.0, 2.0])
    (new,) = set(plt.get_fignums()) - open_before
    assert ax.figure.number == new and dict(matplotlib.rcParams.copy()) == before
    assert render(ax).startswith(b"\x89PNG")
    plt.close(new)


BAD_NORMS = {
    "no norm": (plot.distribution, ([NAN],), ValueError, "norms has no finite number above 0 among 1"),
    "matrix": (plot.distribution, ([[1.0]],), ValueError, "norms must be a vector"),
    "candidates": (plot.distribution, ([1.0], [2.0]), TypeError, "candidates must map labels.*got list"),
    "zero": (
        plot.distribution,
        ([1.0], {"a": 0.0}),
        ValueError,
        r"candidates\['a'\] must be above 0 and finite, got 0",
    ),
    "text": (plot.distribution, ([1.0], {"a": "b"}), TypeError, r"candidates\['a'\] must be a number or .*got str"),
    "inf": (
        plot.distribution,
        ([1.0], {"a": INF}),
        ValueError,
        r"candidates\['a'\] must be above 0 and finite, got inf",
    ),
    "bool": (
        plot.distribution,
        ([1.0], {"a": np.True_}),
        TypeError,
        r"candidates\['a'\] must be a number or .*got bool",
    ),
    "vector": (plot.distribution, ([1.0], {"a": np.ones(2)}), ValueError, r"candidates\['a'\] must be a scalar"),
    "no leaf": (plot.leaf_norms, ({},), ValueError, "norms must hold leaves of one length.*0 leaves"),
    "lengths": (
        plot.leaf_norms,
        ({"a": [1.0], "b": [1.0, 2.0]},),
        ValueError,
        r"norms must hold leaves of one length >= 1, got 2 leaves of lengths \[1, 2\]",
    ),
    "no step": (
        plot.leaf_norms,
        ({"a": []},),
        ValueError,
        r"norms must hold leaves of one length >= 1, got 0 leaves of lengths \[\]",
    ),
    "empty": (
        plot.leaf_norms,
        ({"a": np.ones(0)},),
        ValueError,
        r"norms must hold leaves of one length >= 1, got 1 leaves of lengths \[0\]",
    ),
    "negative": (plot.leaf_norms, ({"a": {"b": [-1.0]}},), ValueError, "a/b: norms must be >= 0"),
    "scalar": (plot.leaf_norms, ({"a": 1.0},), ValueError, "a: norms must be a vector"),
    "table": (plot.leaf_norms, (np.ones((2, 2)),), ValueError, "norms must be a vector"),
}


@pytest.mark.parametrize("case", BAD_NORMS)
def test_error_messages_of_norms(case):
    """Wrong norms and candidates are refused before anything is drawn, and axes that are none."""
    draw, args, error, text = BAD_NORMS[case]
    ax = Figure().subplots()
    with pytest.raises(error, match=rf"^{draw.__name__}: {text}.*\. \w.*\.$"):
        draw(*args, ax=ax)
    assert not ax.has_data()
    with pytest.raises(TypeError, match=rf"^{draw.__name__}: ax must be axes of matplotlib, got str"):
        draw([1.0], ax="axes")

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
from optax_clip import plot
from optax_clip.tools.replay import Replay

ROOT = pathlib.Path(__file__).parents[1]
CLIPS = {"fixed": oc.clip_by_global_norm(1.5), "zclip": oc.zclip(), "sigma": oc.clip_by_sigma()}
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


@functools.cache
def replays() -> dict[str, Replay]:
    """What the clips would have done to the stream."""
    return {label: jax.tree.map(np.asarray, oc.replay(clip, stream())) for label, clip in CLIPS.items()}


def fixed(norms, bound=1.5) -> Replay:
    """What a fixed threshold would have done, without a replay."""
    norms = np.array(norms, np.float32)
    with np.errstate(all="ignore"):
        scale = np.where(norms > bound, bound / norms, 1.0)
    return Replay(norms, np.full_like(norms, bound), scale, np.isfinite(norms) & (norms > bound))


def draw(norms, clips) -> list[Axes]:
    """The axes of a figure of its own."""
    return list(plot.thresholds(norms, clips, ax=Figure().subplots(1, len(clips), squeeze=False)[0]))


def lines(ax: Axes) -> dict:
    return dict(zip(NAMES, ax.get_lines(), strict=True))


def points(line) -> tuple[np.ndarray, np.ndarray]:
    return tuple(map(np.asarray, line.get_data(orig=True)))


def legend(ax: Axes) -> list[str]:
    return [text.get_text() for text in ax.get_legend().get_texts()]


def render(ax: Axes) -> bytes:
    file = io.BytesIO()
    ax.figure.savefig(file, format="png", dpi=50)
    return file.getvalue()


# Thresholds


def test_lines_are_those_of_replay():
    """Norm, threshold, clipped steps and steps that are not finite are what replay says, at their steps."""
    norms = stream()
    (ax,) = draw(norms, {"zclip": CLIPS["zclip"]})
    seen, finite = replays()["zclip"], np.isfinite(norms)
    steps = {"norm": finite, "clipped": seen.clipped, "threshold": ~np.isnan(seen.threshold), "not finite": ~finite}
    values = {"norm": seen.norm, "clipped": seen.norm, "threshold": seen.threshold}
    for name, where in steps.items():
        x, y = points(lines(ax)[name])
        np.testing.assert_array_equal(x, np.repeat(np.flatnonzero(where), 2))  # the smallest and the largest of a step
        np.testing.assert_array_equal(y, np.repeat(values[name][where], 2) if name in values else 0.96)


def test_axes_are_labelled_and_share_their_limits():
    """There is an axes a clip in the order of the mapping, log in y, with a title that has the clip rate."""
    axes = draw(stream(), replays())
    assert [ax.get_title().split("\n")[0] for ax in axes] == list(CLIPS)
    assert {ax.get_yscale() for ax in axes} == {"log"}
    assert {ax.get_xlabel() for ax in axes} == {"step"}
    assert [ax.get_ylabel() for ax in axes] == ["norm", "", ""]
    assert len({ax.get_ylim() for ax in axes}) == len({ax.get_xlim() for ax in axes}) == 1
    low, high = axes[0].get_ylim()
    assert low < np.nanmin(stream()) and high > 100
    assert legend(axes[0]) == NAMES
    assert all(ax.get_legend() is None for ax in axes[1:])


@pytest.mark.parametrize(
    ("bound", "title"), [(INF, "0 % clipped"), (2.5, "50 % clipped"), (3.5, "25 % clipped"), (0.0, "100 % clipped")]
)
def test_title_has_the_clip_rate(bound, title):
    """The clip rate is the share of finite norms above the threshold."""
    norms = [1.0, 2.0, NAN, 3.0, 4.0]
    (ax,) = draw(norms, {"f": fixed(norms, bound)})
    assert ax.get_title() == f"f\n{title}"
    assert ax.get_xlim()[0] < 0 and ax.get_xlim()[1] > 4  # the first step and the last are seen


def test_looks_differ_without_color():
    """Colors are those of Okabe and Ito, or gray; lines differ in style and markers in shape."""
    (ax,) = draw(stream(), {"zclip": replays()["zclip"]})
    found = lines(ax).values()
    assert {to_hex(line.get_color()) for line in found} - OKABE_ITO == {"#666666"}
    looks = [(line.get_linestyle(), line.get_marker()) for line in found]
    assert looks == [("-", "None"), ("None", "o"), ("--", "None"), ("None", "v")]


@pytest.mark.full
def test_not_finite_steps_are_seen():
    """A marker stands inside the top edge for each, whatever the norms, and its color is in the picture."""
    (ax,) = draw(stream(), {"fixed": replays()["fixed"]})
    canvas = FigureCanvasAgg(ax.figure)
    canvas.draw()
    line = lines(ax)["not finite"]
    heights = ax.transAxes.inverted().transform(line.get_transform().transform(np.transpose(points(line))))[:, 1]
    np.testing.assert_allclose(heights, 0.96)
    pixels = np.asarray(canvas.buffer_rgba())[..., :3].reshape(-1, 3)
    assert (pixels == np.uint8([0xCC, 0x79, 0xA7])).all(axis=1).any()


@pytest.mark.parametrize("spike", [0, 77_777, 99_999])
def test_long_log_keeps_every_spike(spike):
    """Of 100 000 steps few are drawn, among them any single spike, any single dip and their markers."""
    norms = np.array(np.random.default_rng(1).lognormal(0.0, 0.2, 100_000), np.float32)
    norms[spike], norms[50_000], norms[[60_000, 60_001]] = 1000.0, 1e-3, NAN
    (ax,) = draw(norms, {"fixed": fixed(norms)})
    found = {name: points(line) for name, line in lines(ax).items()}
    assert all(len(x) <= 1000 for x, _ in found.values())
    for name in ("norm", "clipped"):
        steps, values = found[name]
        assert values.max() == 1000.0 and 0 <= spike - steps[values.argmax()] < 200
    assert found["norm"][1].min() == np.float32(1e-3) and found["clipped"][1].min() > 1.5
    assert set(found["not finite"][0]) == {60_000}


@pytest.mark.parametrize("steps", [1, 500, 501, 999, 1000, 4001])
def test_thinning_of_any_length(steps):
    """Each span gives its smallest and largest number, NaN aside; up to 500 steps are spans of their own."""
    values = np.random.default_rng(steps).permutation(steps).astype(float)
    values[values % 3 == 0] = NAN
    drawn = list(zip(*plot._thin(values)))
    width = -(-steps // 500)
    expected = []
    for i in range(0, steps, width):
        inside = [x for x in values[i : i + width] if not np.isnan(x)]
        expected += [(i, min(inside)), (i, max(inside))] if inside else []
    assert drawn == expected and len(drawn) <= 1000


@pytest.mark.full
@pytest.mark.parametrize(
    "norms",
    [[1.0], [0.0], [NAN], [INF, NAN], [1.0, NAN, 1.0], [1e-38, 3e38], np.zeros(3000)],
    ids=lambda norms: f"{norms[0]} {len(norms)}",
)
def test_odd_logs_render(norms):
    """Single steps, zeros, logs without a finite norm and norms over the whole range of f32 can be drawn."""
    axes = draw(norms, {"zero": oc.clip_by_global_norm(0.0), "zclip": CLIPS["zclip"]})
    assert render(axes[0]).startswith(b"\x89PNG")


@pytest.mark.parametrize("bound", [30.0, 1e30, 1e-30, 0.0, INF])
def test_a_far_threshold_leaves_the_norms_legible(bound):
    """A threshold is in the picture if it is within three decades of the norms, and has no effect if not."""
    (ax,) = draw([1.0, 2.0], {"fixed": fixed([1.0, 2.0], bound)})
    low, high = ax.get_ylim()
    assert (low < bound < high) == (bound == 30.0) and 0.1 < low < 1 < 2 < high < 100


@pytest.mark.full
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


@pytest.mark.parametrize("shape", [tuple, np.asarray, lambda axes: axes[0]])
def test_axes_as_any_sequence(shape):
    """Axes may stand in a tuple, a list or an array; one clip may have its axes alone."""
    axes = [Figure().subplots()]
    (found,) = plot.thresholds([1.0, 2.0], {"a": fixed([1.0, 2.0])}, ax=shape(axes))
    assert found is axes[0]


DRAW = {
    "thresholds": lambda **ax: plot.thresholds([1.0, 2.0], {"a": fixed([1.0, 2.0]), "b": fixed([1.0, 2.0])}, **ax)[1],
    "distribution": lambda **ax: plot.distribution([1.0, 2.0], **ax),
    "leaf_norms": lambda **ax: plot.leaf_norms({"a": [1.0, 2.0]}, **ax),
    "responses": plot.responses,
}


@pytest.mark.full
@pytest.mark.parametrize("name", DRAW)
def test_figures_are_new_where_none_is_given(name):
    """Without axes there is one new pyplot figure, not shown, and settings stay as they were."""
    plt.switch_backend("agg")
    before, open_before = dict(matplotlib.rcParams.copy()), set(plt.get_fignums())
    ax = DRAW[name]()
    (new,) = set(plt.get_fignums()) - open_before
    try:
        assert ax.figure is plt.figure(new) and dict(matplotlib.rcParams.copy()) == before
        assert name != "thresholds" or ax.get_shared_y_axes().joined(*ax.figure.axes)
        assert render(ax).startswith(b"\x89PNG")
    finally:
        plt.close(new)


@pytest.mark.parametrize("name", DRAW)
def test_as_many_axes_as_needed(name):
    """Too many axes are refused, with how many would do."""
    count = 2 if name == "thresholds" else 1
    text = rf"^ax must be {count} axes, got 3\. For example: figure\.subplots\(1, {count}\)\.$"
    with pytest.raises(ValueError, match=text):
        DRAW[name](ax=Figure().subplots(1, 3))


BAD = {
    "clip": ([1.0], {"a": 1.0}, TypeError, "clip must be an Optax transformation, got float 1.0"),
    "norms empty": ([], {"a": oc.zclip()}, ValueError, "norms must hold a step, got none"),
    "norms matrix": ([[1.0]], {"a": oc.zclip()}, ValueError, r"norms must be a vector.*shape \(1, 1\)"),
}


@pytest.mark.parametrize("case", BAD)
def test_error_messages(case):
    """Wrong arguments are refused, with what was given and what would do."""
    norms, clips, error, text = BAD[case]
    with pytest.raises(error, match=rf"^{text}.*\. \w.*\.$"):
        draw(norms, clips)


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
    assert {to_hex(line.get_color()) for line in ax.get_lines()} <= OKABE_ITO
    assert legend(ax) == list(drawn)


# Distribution


def bars(ax: Axes) -> tuple[np.ndarray, np.ndarray]:
    """Edges and heights of the histogram."""
    left = [bar.get_x() for bar in ax.patches]
    return np.append(left, left[-1] + ax.patches[-1].get_width()), np.array([bar.get_height() for bar in ax.patches])


def test_distribution_counts_all_norms_above_zero():
    """The bars hold every finite norm above 0 once, equal on log axes; the legend counts them."""
    norms = np.append(stream(), [0.0, 0.0])
    ax = plot.distribution(norms, ax=Figure().subplots())
    inside = norms[np.isfinite(norms) & (norms > 0)]
    edges, heights = bars(ax)
    np.testing.assert_array_equal(heights, np.histogram(inside, edges)[0])
    assert heights.sum() == len(inside) and len(heights) == 50
    assert inside.min() / 1.2 < edges[0] < inside.min() and inside.max() < edges[-1] < 1.2 * inside.max()
    np.testing.assert_allclose(np.diff(np.log(edges)), np.log(edges[1] / edges[0]), rtol=1e-6)
    assert legend(ax)[0] == "495 of 502 norms"
    assert (ax.get_xscale(), ax.get_yscale(), ax.get_xlabel(), ax.get_ylabel()) == ("log", "log", "norm", "steps")
    low, high = ax.get_xlim()
    assert low < edges[0] and high > edges[-1]
    assert ax.get_ylim()[0] == 0.5  # a bar of one step is seen


def test_distribution_has_a_line_for_each_candidate():
    """A line stands at each candidate, with its label and the share of finite norms above it; styles differ."""
    norms = np.append(stream(), [0.5, 0.75])
    candidates = {"a": jnp.bfloat16(0.5), **{f"c{i}": np.float32(0.5 + i / 4) for i in range(1, 7)}}
    with jax.numpy_dtype_promotion("strict"):
        ax = plot.distribution(norms, candidates, ax=Figure().subplots())
    drawn = ax.get_lines()
    assert [line.get_xdata()[0] for line in drawn] == [float(value) for value in candidates.values()]
    finite = norms[np.isfinite(norms)]
    for text, (label, value) in zip(legend(ax)[1:], candidates.items(), strict=True):
        assert text == f"{label}: {float(value):.3g}, {100 * np.mean(finite > float(value)):.3g} % above"
    assert len({str(look["linestyle"]) for look in plot._LINES}) == len(plot._LINES) == 6
    assert {to_hex(line.get_color()) for line in drawn} <= OKABE_ITO


def test_distribution_suggests_candidates():
    """Without candidates there are the suggested threshold and the 99th percentile; there may be none."""
    found = oc.suggest_threshold(stream())
    ax = plot.distribution(stream(), ax=Figure().subplots())
    assert [text.split(":")[0] for text in legend(ax)] == ["495 of 500 norms", "suggested", "99th percentile"]
    assert [line.get_xdata()[0] for line in ax.get_lines()] == [found.threshold, found.candidates[4]]
    assert len(legend(plot.distribution(stream(), {}, ax=Figure().subplots()))) == 1


@pytest.mark.full
@pytest.mark.parametrize("candidate", [500.0, 0.005, 1e20, 1e-20, 1e300, 0.0, INF])
def test_a_far_candidate_leaves_the_norms_legible(candidate):
    """A candidate is in the picture if near; one three decades away or further stands in the legend only."""
    ax = plot.distribution([1.0, 2.0], {"a": candidate}, ax=Figure().subplots())
    low, high = ax.get_xlim()
    assert (low < candidate < high) == (candidate in (500.0, 0.005)) and 1e-4 < low < 1 < 2 < high < 1e4
    assert len(legend(ax)) == 2 and render(ax)


@pytest.mark.full
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
    tree = {"w": [np.array([1.0, 2.0, 3.0]), None], "b": [4.0, 5.0, 6.0], "c": [7, 8, 9]}
    ax = plot.leaf_norms(tree, ax=Figure().subplots())
    assert [label.get_text() for label in ax.get_yticklabels()] == ["b", "c", "w/0"]
    np.testing.assert_array_equal(cells(ax), [[4, 5, 6], [7, 8, 9], [1, 2, 3]])
    assert ax.get_ylim() == (2.5, -0.5) and ax.get_xlim() == (-0.5, 2.5) and ax.get_xlabel() == "step"
    (scale,), (mesh,) = ax.child_axes, ax.collections
    assert scale.get_ylabel() == "norm" and scale.get_yscale() == "log"
    assert 0.5 < mesh.norm.vmin < 1.0 and 9.0 < mesh.norm.vmax < 20.0 and mesh.get_rasterized()


@pytest.mark.full
def test_leaves_of_any_tree_are_kept_apart():
    """Paths that are spelled alike are rows of their own, and empty containers are none."""
    tree = {"a": {"b": [1.0, 2.0]}, "a/b": [3.0, 4.0], "c": (), "e": np.float32([5, 6])}
    ax = plot.leaf_norms(tree, ax=Figure().subplots())
    assert [label.get_text() for label in ax.get_yticklabels()] == ["a/b", "a/b", "e"]
    np.testing.assert_array_equal(cells(ax), [[1, 2], [3, 4], [5, 6]])
    assert render(ax)


@pytest.mark.full
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
    assert to_hex(crosses.get_color()) == "#000000" and crosses.get_path_effects()  # on white, and on black


def test_runs_at_either_end_have_a_cross():
    """A run of norms that are not finite is marked where it begins, at the first step and at the last."""
    ax = plot.leaf_norms({"a": [NAN, NAN, 1.0, INF]}, ax=Figure().subplots())
    assert list(zip(*points(ax.get_lines()[0]))) == [(0, 0), (3, 0)]
    (mesh,) = ax.collections
    assert mesh.norm.vmin < mesh.norm.vmax  # also of a single number


@pytest.mark.full
@pytest.mark.parametrize("steps", [1, 499, 500, 501, 999, 1000, 1001])
def test_spans_of_any_log(steps):
    """Up to 500 steps have a column each, more share at most 500, and the last column ends with the log."""
    norms = np.random.default_rng(steps).permutation(steps) + 1.0
    ax = plot.leaf_norms({"a": norms}, ax=Figure().subplots())
    width = -(-steps // 500)
    np.testing.assert_array_equal(cells(ax)[0], [norms[i : i + width].max() for i in range(0, steps, width)])
    edges = ax.collections[0].get_coordinates()[0, :, 0]
    assert edges[0] == -0.5 and edges[-1] == steps - 0.5 and len(edges) <= 501


def test_long_logs_of_leaves_keep_every_spike():
    """Of 100 000 steps at most 500 columns are drawn, with the largest norm of each."""
    norms = np.ones(100_000)
    norms[777], norms[50_000] = 1000.0, NAN
    ax = plot.leaf_norms({"a": norms, "b": np.ones(100_000)}, ax=Figure().subplots())
    shown = cells(ax)
    assert shown.shape[1] <= 500 and shown[0].tolist().count(1000.0) == 1 and np.isnan(shown[0]).sum() == 1
    edges = ax.collections[0].get_coordinates()[0, :, 0]
    at = int(np.nanargmax(shown[0]))
    assert edges[at] <= 777 <= edges[at + 1]


@pytest.mark.full
def test_many_leaves_have_some_labels():
    """Of 1000 leaves some are named, and all are drawn."""
    ax = plot.leaf_norms({f"{i:03d}": [1.0, 2.0] for i in range(1000)}, ax=Figure().subplots())
    assert cells(ax).shape == (1000, 2) and 20 <= len(ax.get_yticklabels()) <= 40
    assert ax.get_yticklabels()[1].get_text() == "025"
    new = plot.leaf_norms({str(i): [1.0] for i in range(1000)})
    assert new.figure.get_figheight() == 12
    plt.close(new.figure)


@pytest.mark.full
@pytest.mark.parametrize("tree", [{"a": [0.0, 0.0]}, {"a": [NAN]}, np.ones(3)], ids=["zero", "NaN", "array"])
def test_odd_norms_of_leaves_render(tree):
    """Logs without a finite norm above 0 can be drawn, and a tree that is one leaf."""
    assert render(plot.leaf_norms(tree, ax=Figure().subplots()))


BAD_NORMS = {
    "no norm": (plot.distribution, [NAN], ValueError, "norms must hold a finite number above 0, got none among 1"),
    "matrix": (plot.distribution, [[1.0]], ValueError, "norms must be a vector"),
    "empty": (plot.leaf_norms, {"a": np.ones(0)}, ValueError, "norms must hold a step, got none"),
    "negative": (plot.leaf_norms, {"a": {"b": [-1.0]}}, ValueError, r"norms\['a'\]\['b'\] must be >= 0"),
    "scalar": (plot.leaf_norms, {"a": 1.0}, ValueError, r"norms\['a'\] must be a vector"),
    "table": (plot.leaf_norms, np.ones((2, 2)), ValueError, "norms must be a vector"),
}


@pytest.mark.parametrize("case", BAD_NORMS)
def test_error_messages_of_norms(case):
    """Wrong norms are refused before anything is drawn."""
    call, norms, error, text = BAD_NORMS[case]
    ax = Figure().subplots()
    with pytest.raises(error, match=rf"^{text}.*\. \w.*\.$"):
        call(norms, ax=ax)
    assert not ax.has_data()


@pytest.mark.parametrize("norms", [{}, {"a": [1.0], "b": [1.0, 2.0]}], ids=["none", "lengths"])
def test_leaves_of_one_length(norms):
    """There must be a leaf, and all must have as many steps."""
    with pytest.raises(ValueError, match=r"need at least one array|must have the same shape"):
        plot.leaf_norms(norms)

"""The figure of thresholds: what stands on the axes, and that nothing else is touched."""

import functools
import io
import pathlib
import subprocess
import sys

import jax
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

ROOT = pathlib.Path(oc.__file__).parents[1]
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


@pytest.mark.parametrize(
    ("bound", "title"), [(None, "0 % clipped"), (2.5, "50 % clipped"), (3.5, "25 % clipped"), (0.0, "100 % clipped")]
)
def test_title_has_the_clip_rate(bound, title):
    """The clip rate is the share of finite norms above the threshold."""
    (ax,) = draw([1.0, 2.0, NAN, 3.0, 4.0], {"fixed": oc.clip_by_global_norm(bound)})
    assert ax.get_title() == f"fixed\n{title}"


@pytest.mark.parametrize(
    ("share", "shown"), [(1e-5, "0.001 %"), (0.123, "12 %"), (0.9951, "99.51 %"), (1 - 1e-6, "99.99 %")]
)
def test_rates_near_none_and_all(share, shown):
    """Only a share of exactly 0 or 1 reads as 0 or 100 percent."""
    assert plot._percent(share) == shown


def test_looks_differ_without_color():
    """Colors are those of Okabe and Ito, or gray; lines differ in style and markers in shape."""
    (ax,) = draw(stream(), {"zclip": oc.zclip()})
    found = lines(ax).values()
    assert {to_hex(line.get_color()) for line in found} - OKABE_ITO == {"#666666"}
    looks = [(line.get_linestyle(), line.get_marker()) for line in found]
    assert looks == [("-", "None"), ("None", "o"), ("--", "None"), ("None", "v")]


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
    chosen = plot._extremes(values, where, 100)
    assert where[chosen].all()
    if steps <= 2000:
        np.testing.assert_array_equal(chosen, np.flatnonzero(where))
    else:
        width = -(-steps // 100)
        for start in range(0, steps, width):
            inside = np.where(where, values, NAN)[start : start + width]
            assert {start + np.nanargmin(inside), start + np.nanargmax(inside)} <= set(chosen)
    assert plot._extremes(values, np.zeros(steps, bool), 100).size == 0


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
    "norms negative": ([-1.0], {"a": oc.zclip()}, None, ValueError, "norms must be >= 0, got -1 at step 0"),
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

"""What `clip_metrics` reads: the right numbers, under names that stay."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from trees import step

import optax_clip as oc
from optax_clip import responses

NAMES = ("norm", "threshold", "scale", "clipped", "clip_rate")
GRADS = {"a": jnp.array([3.0]), "b": jnp.array([4.0])}  # global norm 5
ZEROS = jax.tree.map(jnp.zeros_like, GRADS)
LARGEST = float(np.finfo(np.float32).max)


def clip_names(*paths: str) -> set:
    return {"/".join(filter(None, ("clip", path, name))) for path in paths for name in NAMES}


def skip_names(*paths: str) -> set:
    numbers = ("norm", "norm_threshold", "by_norm", "total", "consecutive")
    return {"/".join(filter(None, ("skip", path, name))) for path in paths for name in numbers}


def after(tx, steps: list) -> dict:
    """The metrics after steps with the given updates."""
    state = tx.init(ZEROS)
    for updates in steps:
        _, state = step(tx, updates, state, ZEROS)
    return oc.clip_metrics(state)


def assert_metrics(actual: dict, **expected: float):
    """All metrics of the only clip, f32 scalars."""
    chex.assert_trees_all_close(actual, {f"clip/{name}": jnp.float32(x) for name, x in expected.items()}, rtol=1e-6)
    chex.assert_trees_all_equal_shapes_and_dtypes(actual, {f"clip/{name}": jnp.float32(0) for name in expected})


# Values


def test_values_of_one_block():
    """The norm is that before clipping, and may exceed the threshold."""
    tx = oc.clip_by_global_norm(1.0)
    assert_metrics(after(tx, [GRADS]), norm=5.0, threshold=1.0, scale=0.2, clipped=1.0, clip_rate=1.0)


def test_values_before_the_first_step():
    """Before the first step nothing was measured or scaled."""
    metrics = after(oc.clip_by_global_norm(1.0), [])
    assert_metrics(metrics, norm=0.0, threshold=0.0, scale=1.0, clipped=0.0, clip_rate=0.0)


def test_values_over_several_blocks():
    """Over blocks: the root of the sum of squares, the mean threshold and scale, the share of blocks clipped."""
    tx = oc.clip_by_leaf_norm({"a": 2.0, "b": 8.0})
    expected = {"norm": 5.0, "threshold": 5.0, "scale": (2 / 3 + 1) / 2, "clipped": 0.5, "clip_rate": 0.5}
    assert_metrics(after(tx, [GRADS]), **expected)


def test_the_mean_threshold_is_over_blocks_that_have_one():
    """A block without a threshold does not make the mean infinite."""
    metrics = after(oc.clip_by_leaf_norm({"a": 2.0, "b": None}), [GRADS])
    chex.assert_trees_all_close(metrics["clip/threshold"], jnp.float32(2.0))


def test_values_over_units():
    """Over units there are the norm and how many were clipped, and neither threshold nor scale."""
    updates = jnp.array([[3.0, 0.0, 6.0], [4.0, 0.0, 8.0]])  # norms of the columns 5, 0, 10
    _, state = step(oc.clip_by_unit_norm(5.0), updates)
    assert_metrics(oc.clip_metrics(state), norm=125**0.5, clipped=1 / 3, clip_rate=1 / 3)


@pytest.mark.parametrize("response", [None, responses.normalize])
def test_clipped_is_of_this_step_and_clip_rate_of_all(response):
    """Steps below, at and above the threshold: only those above count as clipped, for any response."""
    at, below = jax.tree.map(lambda x: x / 5, GRADS), jax.tree.map(lambda x: x / 10, GRADS)
    tx = oc.clip_by_global_norm(1.0, response=response)
    metrics = after(tx, [GRADS, below, GRADS, at])
    assert metrics["clip/clipped"] == 0
    chex.assert_trees_all_close(metrics["clip/clip_rate"], jnp.float32(0.5), rtol=1e-6)
    assert after(tx, [below, GRADS])["clip/clipped"] == 1


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
def test_a_non_finite_step_counts_as_a_step_and_not_as_clipped(bad):
    """A NaN or inf shows in the norm and the scale of its step, and lowers the clip rate as any other quiet step."""
    tx = oc.clip_by_global_norm(1.0)
    broken = {"a": jnp.array([bad]), "b": GRADS["b"]}
    metrics = after(tx, [GRADS, broken])
    assert_metrics(metrics, norm=bad, threshold=1.0, scale=jnp.nan, clipped=0.0, clip_rate=0.5)
    expected = {"norm": 5.0, "threshold": 1.0, "scale": 0.2, "clipped": 1.0, "clip_rate": 2 / 3}
    assert_metrics(after(tx, [GRADS, broken, GRADS]), **expected)


def test_measuring_without_clipping():
    """With the threshold None the norm is measured and nothing clipped; the threshold is the largest number."""
    metrics = after(oc.clip_by_global_norm(None), [GRADS])
    assert_metrics(metrics, norm=5.0, threshold=LARGEST, scale=1.0, clipped=0.0, clip_rate=0.0)


def test_skipped_steps_have_names_of_their_own():
    """`skip_spikes` gives norm, threshold, why the step was skipped, and how many steps were, and counts as no clip."""
    tx = oc.skip_spikes(optax.sgd(1.0), 1.0)
    metrics = after(tx, [GRADS, jax.tree.map(lambda x: x / 10, GRADS), GRADS, GRADS])
    expected = {"norm": 5.0, "norm_threshold": 1.0, "by_norm": 1.0, "total": jnp.int32(3), "consecutive": jnp.int32(2)}
    chex.assert_trees_all_close(metrics, {f"skip/{name}": value for name, value in expected.items()})


# Names

CLIP = oc.clip_by_global_norm(2.0)
AROUND = {
    "chain": lambda: optax.chain(optax.trace(0.9), optax.chain(CLIP, optax.scale(-0.1))),
    "a clip of entries before": lambda: optax.chain(oc.clip(10.0), CLIP),
    "a clip of weights after": lambda: optax.chain(CLIP, optax.sgd(0.1), oc.clip_weights(1.0)),
    "multi_steps": lambda: optax.MultiSteps(optax.chain(CLIP, optax.adam(1e-3)), 1).gradient_transformation(),
    "apply_if_finite": lambda: optax.apply_if_finite(optax.chain(CLIP, optax.sgd(0.1)), 3),
    "masked": lambda: optax.masked(CLIP, {"a": True, "b": True}),
    "partition": lambda: optax.partition({"x": CLIP, "y": optax.identity()}, {"a": "x", "b": "x"}),
    "inject_hyperparams": lambda: optax.inject_hyperparams(oc.clip_by_global_norm)(2.0),
    "error feedback": lambda: oc.with_error_feedback(CLIP),
}


@pytest.mark.parametrize("case", AROUND)
def test_the_only_clip_has_plain_names(case):
    """A single clip has the same names and numbers wherever it sits."""
    metrics = after(AROUND[case](), [GRADS])
    assert_metrics(metrics, norm=5.0, threshold=2.0, scale=0.4, clipped=1.0, clip_rate=1.0)


def test_a_second_clip_renames_nothing():
    """A clip that is added after the first has its path in its names, and the first keeps its own."""
    first = oc.clip_by_leaf_norm(3.5)
    tx = optax.chain(first, optax.trace(0.0), optax.chain(oc.clip_by_global_norm(1.0)), optax.sgd(1.0))
    metrics = after(tx, [GRADS])
    assert metrics.keys() == clip_names("", "2/0")
    chex.assert_trees_all_close({name: metrics[name] for name in clip_names("")}, after(first, [GRADS]))
    chex.assert_trees_all_close(metrics["clip/2/0/norm"], jnp.float32((3**2 + 3.5**2) ** 0.5), rtol=1e-6)


def test_skip_spikes_around_a_clip_renames_nothing():
    """`skip_spikes` around an optimizer leaves the names of the clips in it, and may be put around once more."""
    tx = optax.chain(CLIP, optax.sgd(1.0), oc.clip_by_global_norm(1.0))
    inside, once, twice = (after(x, [GRADS]) for x in (tx, oc.skip_spikes(tx), oc.skip_spikes(oc.skip_spikes(tx))))
    assert inside.keys() == clip_names("", "2")
    assert once.keys() == skip_names("") | clip_names("", "inner_state/2")
    assert twice.keys() == skip_names("", "inner_state") | clip_names("", "inner_state/inner_state/2")
    for metrics in (once, twice):
        chex.assert_trees_all_close({name: metrics[name] for name in clip_names("")}, after(CLIP, [GRADS]))


def test_clips_of_units_lack_the_same_names_beside_others():
    """Also a further clip of units has neither threshold nor scale."""
    tx = optax.chain(CLIP, oc.clip_by_unit_norm(1.0))
    _, state = step(tx, jnp.ones((2, 3)))
    assert oc.clip_metrics(state).keys() == clip_names("") | {"clip/1/norm", "clip/1/clipped", "clip/1/clip_rate"}


def test_prefix():
    """The prefix stands before all names, and may have parts itself."""
    state = oc.skip_spikes(CLIP).init(ZEROS)
    plain = oc.clip_metrics(state)
    assert oc.clip_metrics(state, prefix="train/g").keys() == {f"train/g/{name}" for name in plain}
    assert plain.keys() == clip_names("") | skip_names("")


def test_clips_of_a_partition_have_their_labels():
    """Clips of a partition are told apart by their labels, and the first in the state has plain names."""
    tx = optax.partition({"x": oc.clip_by_global_norm(1.0), "y": oc.clip_by_global_norm(2.0)}, {"a": "x", "b": "y"})
    metrics = after(tx, [GRADS])
    assert metrics["clip/norm"] == 3
    assert [value for name, value in metrics.items() if "/y/" in name and name.endswith("/norm")] == [4]


def test_names_with_slashes_lose_no_clip():
    """Of two states whose paths are spelled alike, the second gets its path as it is written in Python."""
    state = CLIP.init(ZEROS)
    tree = {"a": {"a": state, "b": state}, "a/b": state._replace(norm=jnp.float32(7.0))}
    metrics = oc.clip_metrics(tree)
    assert len(metrics) == 15 and metrics["clip/a/b/norm"] == 0 and metrics["clip/['a/b']/norm"] == 7


@pytest.mark.parametrize("tx", [oc.clip(1.0), optax.adam(1e-3), optax.identity()], ids=["clip", "adam", "identity"])
def test_no_clip_is_an_error(tx):
    """A state in which nothing measures is an error that says what was looked for."""
    with pytest.raises(
        ValueError, match=r"^opt_state must hold a ClipState or a SkipState, got a .* Pass that of an optimizer"
    ):
        oc.clip_metrics(tx.init(ZEROS))


# Inside compiled loops, and in variables


def test_metrics_inside_a_scan():
    """Metrics can be returned from a compiled step and stacked by a scan."""
    sizes = jnp.array([1.0, 5.0, 2.0, 8.0])

    @jax.jit
    def run(sizes):
        def one_step(state, size):
            _, state = CLIP.update(jax.tree.map(lambda x: x / 5 * size, GRADS), state)
            return state, oc.clip_metrics(state)

        return jax.lax.scan(one_step, CLIP.init(ZEROS), sizes)[1]

    expected = {"norm": [1, 5, 2, 8], "threshold": [2] * 4, "scale": [1, 0.4, 1, 0.25], "clipped": [0, 1, 0, 1]}
    expected["clip_rate"] = [0, 1 / 2, 1 / 3, 1 / 2]
    expected = {f"clip/{name}": np.array(values, np.float32) for name, values in expected.items()}
    chex.assert_trees_all_close(run(sizes), expected, rtol=1e-6)


def test_metrics_of_variables_do_not_change_later():
    """Of a state that holds variables, as in Flax NNX, the metrics are what the variables hold now."""

    class Variable:
        def __init__(self, value):
            self.value = value

        def __jax_array__(self):
            return self.value

    _, state = step(CLIP, GRADS)
    variables = jax.tree.map(Variable, state)
    metrics = oc.clip_metrics(variables)
    variables.norm.value = jnp.float32(9.0)
    assert isinstance(metrics["clip/norm"], jax.Array) and metrics["clip/norm"] == 5

"""What `clip_metrics` reads: the right numbers, under names that tell clips apart, at no cost."""

import functools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import trees

import optax_clip as oc

FIELDS = ("norm", "threshold", "scale", "clip_rate")
GRADS = {"a": jnp.array([3.0]), "b": jnp.array([4.0])}  # global norm 5
ZEROS = jax.tree.map(jnp.zeros_like, GRADS)


def names(*prefixes: str) -> set:
    return {f"{prefix}/{field}" for prefix in prefixes for field in FIELDS}


def after(tx, steps: list) -> dict:
    """The metrics after steps with the given updates."""
    state = tx.init(ZEROS)
    for updates in steps:
        _, state = tx.update(updates, state, ZEROS)
    return oc.clip_metrics(state)


def assert_metrics(actual: dict, **expected: float):
    """All four metrics of the only clip, f32 scalars."""
    chex.assert_trees_all_close(actual, {f"clip/{name}": jnp.float32(x) for name, x in expected.items()}, rtol=1e-6)
    chex.assert_trees_all_equal_shapes_and_dtypes(actual, {f"clip/{name}": jnp.float32(0) for name in FIELDS})


# Values


def test_values_of_one_block():
    """The norm is that before clipping, and may exceed the threshold."""
    tx = oc.clip_by_global_norm(1.0)
    assert_metrics(after(tx, [GRADS]), norm=5.0, threshold=1.0, scale=0.2, clip_rate=1.0)


def test_values_before_the_first_step():
    """Before the first step nothing was measured or scaled."""
    assert_metrics(after(oc.clip_by_global_norm(1.0), []), norm=0.0, threshold=0.0, scale=1.0, clip_rate=0.0)


def test_values_over_several_blocks():
    """Over blocks: the root of the sum of squares, the mean threshold and scale, the share of blocks clipped."""
    tx = oc.clip_by_leaf_norm({"a": 2.0, "b": 8.0})
    expected = {"norm": 5.0, "threshold": 5.0, "scale": (2 / 3 + 1) / 2, "clip_rate": 0.5}
    assert_metrics(after(tx, [GRADS]), **expected)


def test_values_over_units():
    """Over units each unit is a block."""
    tx = oc.clip_by_unit_norm(5.0)
    updates = jnp.array([[3.0, 0.0, 6.0], [4.0, 0.0, 8.0]])  # norms of the columns 5, 0, 10
    _, state = tx.update(updates, tx.init(updates))
    expected = {"norm": 125**0.5, "threshold": 5.0, "scale": 2.5 / 3, "clip_rate": 1 / 3}
    assert_metrics(oc.clip_metrics(state), **expected)


def test_clip_rate_is_a_mean_over_steps():
    """Steps below, at and above the threshold: only those above count as clipped, for any response."""
    at, below = jax.tree.map(lambda x: x / 5, GRADS), jax.tree.map(lambda x: x / 10, GRADS)
    steps = [GRADS, below, at, GRADS]
    for response in (None, oc.smooth, oc.normalize):
        metrics = after(oc.clip_by_global_norm(1.0, response=response), steps)
        chex.assert_trees_all_close(metrics["clip/clip_rate"], jnp.float32(0.5), rtol=1e-6)


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
def test_a_non_finite_step_counts_as_a_step_and_not_as_clipped(bad):
    """A NaN or inf shows in norm and scale of its step, and lowers the clip rate as any step without clipping."""
    tx = oc.clip_by_global_norm(1.0)
    broken = {"a": jnp.array([bad]), "b": GRADS["b"]}
    assert_metrics(after(tx, [GRADS, broken]), norm=bad, threshold=1.0, scale=jnp.nan, clip_rate=0.5)
    expected = {"norm": 5.0, "threshold": 1.0, "scale": 0.2, "clip_rate": 2 / 3}
    assert_metrics(after(tx, [GRADS, broken, GRADS]), **expected)


def test_measuring_without_clipping():
    """With the threshold None the norm is measured and nothing clipped."""
    tx = oc.clip_by_global_norm(None)
    assert_metrics(after(tx, [GRADS]), norm=5.0, threshold=jnp.inf, scale=1.0, clip_rate=0.0)


def test_threshold_follows_a_schedule():
    """The threshold is that of the last step."""
    tx = oc.clip_by_global_norm(optax.piecewise_constant_schedule(4.0, {1: 0.5}))
    assert_metrics(after(tx, [GRADS, GRADS]), norm=5.0, threshold=2.0, scale=0.4, clip_rate=1.0)


# Names


def test_one_clip_in_a_chain_needs_no_path():
    """A single clip has plain names wherever it sits."""
    tx = optax.chain(optax.trace(0.9), optax.chain(oc.clip_by_global_norm(1.0), optax.scale(-0.1)))
    assert after(tx, [GRADS]).keys() == names("clip")


def test_several_clips_have_their_paths():
    """With several clips the path of each state stands between."""
    tx = optax.chain(oc.clip_by_leaf_norm(3.5), optax.trace(0.0), optax.chain(oc.clip_by_global_norm(1.0)))
    metrics = after(tx, [GRADS])
    assert metrics.keys() == names("clip/0", "clip/2/0")
    chex.assert_trees_all_close(metrics["clip/0/norm"], jnp.float32(5.0), rtol=1e-6)
    chex.assert_trees_all_close(metrics["clip/2/0/norm"], jnp.float32((3**2 + 3.5**2) ** 0.5), rtol=1e-6)


def test_prefix():
    """The prefix replaces the first part of the names, and may have parts itself or be empty."""
    tx = oc.clip_by_global_norm(1.0)
    state = tx.init(ZEROS)
    assert oc.clip_metrics(state, prefix="train/grad").keys() == names("train/grad")
    assert oc.clip_metrics((state, state), prefix="grad").keys() == names("grad/0", "grad/1")
    assert oc.clip_metrics(state, prefix="").keys() == set(FIELDS)


def test_value_clips_are_passed_over():
    """Clips of entries, which measure nothing, do not appear."""
    assert after(optax.chain(oc.clip(1.0), oc.clip_by_global_norm(1.0)), [GRADS]).keys() == names("clip")


@pytest.mark.parametrize("tx", [oc.clip(1.0), optax.adam(1e-3), optax.identity()], ids=["clip", "adam", "identity"])
def test_no_clip_is_an_error(tx):
    """A state without a norm clip is an error that says what to pass."""
    with pytest.raises(ValueError, match=r"^clip_metrics: found no ClipState in opt_state, a .* Pass the state of an"):
        oc.clip_metrics(tx.init(ZEROS))


# Inside other transformations


WRAPPED = {
    "masked": lambda clip: optax.masked(clip, {"a": True, "b": False}),
    "partition": lambda clip: optax.partition({"x": clip, "y": optax.identity()}, {"a": "x", "b": "y"}),
    "multi_steps": lambda clip: optax.MultiSteps(optax.chain(clip, optax.adam(1e-3)), 1).gradient_transformation(),
    "apply_if_finite": lambda clip: optax.apply_if_finite(optax.chain(clip, optax.sgd(0.1)), 3),
}


@pytest.mark.parametrize("wrap", WRAPPED)
def test_metrics_from_inside_a_wrapper(wrap):
    """Metrics are found in the state of any wrapper, and count what the clip saw."""
    metrics = after(WRAPPED[wrap](oc.clip_by_global_norm(2.0)), [GRADS])
    norm = 3.0 if wrap in ("masked", "partition") else 5.0
    assert_metrics(metrics, norm=norm, threshold=2.0, scale=2.0 / norm, clip_rate=1.0)


def test_clips_of_a_partition_have_their_labels():
    """Clips of a partition are told apart by their labels."""
    tx = optax.partition({"x": oc.clip_by_global_norm(1.0), "y": oc.clip_by_global_norm(2.0)}, {"a": "x", "b": "y"})
    metrics = after(tx, [GRADS])
    assert len(metrics) == 8
    values = {label: [v for k, v in metrics.items() if f"/{label}/" in k and k.endswith("/norm")] for label in "xy"}
    chex.assert_trees_all_close(values, {"x": [jnp.float32(3.0)], "y": [jnp.float32(4.0)]})


def test_metrics_of_an_injected_threshold():
    """Under `inject_hyperparams` the threshold is the injected one."""
    tx = optax.inject_hyperparams(oc.clip_by_global_norm)(max_norm=optax.linear_schedule(4.0, 2.0, 1))
    assert_metrics(after(tx, [GRADS, GRADS]), norm=5.0, threshold=2.0, scale=0.4, clip_rate=1.0)


def test_metrics_inside_jit_and_scan():
    """Metrics can be returned from a compiled step and stacked by a scan."""
    tx = optax.chain(oc.clip_by_global_norm(2.0), optax.adam(1e-3))
    sizes = jnp.array([1.0, 5.0, 2.0, 8.0])

    @jax.jit
    def run(sizes):
        def step(state, size):
            updates = jax.tree.map(lambda x: x / 5 * size, GRADS)
            _, state = tx.update(updates, state, ZEROS)
            return state, oc.clip_metrics(state)

        return jax.lax.scan(step, tx.init(ZEROS), sizes)[1]

    expected = {
        "norm": [1, 5, 2, 8],
        "threshold": [2] * 4,
        "scale": [1, 0.4, 1, 0.25],
        "clip_rate": [0, 1 / 2, 1 / 3, 1 / 2],
    }
    chex.assert_trees_all_close(
        run(sizes), {f"clip/{k}": np.array(v, np.float32) for k, v in expected.items()}, rtol=1e-6
    )


# Cost


@pytest.mark.parametrize(
    "clip",
    [
        oc.clip_by_global_norm,
        oc.clip_by_leaf_norm,
        oc.clip_by_unit_norm,
        functools.partial(oc.clip_by_global_norm, ord=1),
        oc.adaptive_grad_clip,
    ],
    ids=["global", "leaf", "unit", "global_1", "agc"],
)
def test_reading_metrics_adds_no_work(clip):
    """A compiled step that returns metrics has the reductions and fusions of one that does not."""
    tx = optax.chain(clip(1.0), optax.sgd(0.1))
    updates, params = ({name: trees.sample(seed)[name] for name in ("bias", "dense")} for seed in (0, 1))

    def plain(updates, state):
        return tx.update(updates, state, params)

    def measured(updates, state):
        updates, state = tx.update(updates, state, params)
        return updates, state, oc.clip_metrics(state)

    def count(step):
        program = jax.jit(step).lower(updates, tx.init(params)).compile().as_text()
        return {op: len(re.findall(rf" {op}\(", program)) for op in ("reduce", "fusion", "conditional")}

    expected = count(plain)
    assert expected["reduce"] > 0
    assert count(measured) == expected


def test_skipped_steps_are_counted():
    """`skip_spikes` adds its counters, with a path where there are several."""
    tx = oc.skip_spikes(optax.sgd(1.0), 1.0)
    metrics = after(tx, [GRADS, jax.tree.map(lambda x: x / 10, GRADS), GRADS, GRADS])
    assert metrics.keys() == names("clip") | {"clip/total_skipped", "clip/consecutive_skipped"}
    assert metrics["clip/total_skipped"] == 3 and metrics["clip/consecutive_skipped"] == 2
    assert metrics["clip/scale"] == 0 and metrics["clip/clip_rate"] == 0.75
    tx = oc.skip_spikes(optax.chain(oc.clip_by_global_norm(1.0), optax.sgd(1.0)))
    counters = {"clip/total_skipped", "clip/consecutive_skipped"}
    assert after(tx, [GRADS]).keys() == names("clip/measured", "clip/inner_state/0") | counters
    nested = after(oc.skip_spikes(oc.skip_spikes(optax.sgd(1.0))), [GRADS])
    assert {"clip/total_skipped", "clip/inner_state/total_skipped"} <= nested.keys()


def test_names_with_slashes_lose_no_clip():
    """Of two states whose paths are spelled alike, the second gets its path as it is written in Python."""
    state = oc.clip_by_global_norm(1.0).init({"w": jnp.zeros(2)})
    other = state._replace(norm=jnp.float32(7.0))
    metrics = oc.clip_metrics({"a": {"b": state}, "a/b": other})
    assert len(metrics) == 8 and metrics["clip/a/b/norm"] == 0 and metrics["clip/['a/b']/norm"] == 7

"""Gradients of single examples: each is clipped by itself, bad ones are left out, and devices do not mix."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
import trees
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import optax_clip as oc
from optax_clip import responses, thresholds

full = functools.partial(pytest.param, marks=pytest.mark.full)
GOLDEN = jnp.array([[0.0, 0.0, 0.0], [0.0, 3.0, 4.0], [4.0, 0.0, 3.0], [3.0, 4.0, 0.0]])
PARAMS = trees.small(9)


def batch(count: int = 8, dtype=jnp.float32) -> dict:
    """Gradients of examples of very different norms."""
    each = [trees.small(i, 2.0 ** (i % 5 - 2), dtype) for i in range(count)]
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *each)


def first_is(value, grads=None) -> dict:
    """A batch in which one entry of the first example is this."""
    grads = batch() if grads is None else grads
    return {**grads, "dense": grads["dense"].at[0, 1, 2].set(value)}


def zeros_first(grads=None) -> dict:
    """A batch whose first example is all zeros."""
    return jax.tree.map(lambda x: x.at[0].set(0), batch() if grads is None else grads)


def loss(params, x, y):
    return jnp.sum((jnp.tanh(x @ params["dense"] + params["bias"]) - y) ** 2) * params["scale"]


def data(count: int = 16):
    random = np.random.default_rng(0)
    return np.float32(random.normal(size=(count, 4))), np.float32(random.normal(size=(count, 3)))


gradients = jax.vmap(jax.grad(loss), (None, 0, 0))
TX = oc.per_example(0.5)


def step_on(params, x, y):
    """One step on one device."""
    return TX.update(gradients(params, x, y), TX.init(params), params)


# Numbers


def test_the_example_of_optax():
    """The sum of examples clipped to 1.25 is that of Optax's docstring, and the state says what was done."""
    tx = oc.per_example(1.25, reduce="sum")
    updates, state = trees.step(tx, GOLDEN, params=jnp.zeros(3))
    theirs, clipped = optax.per_example_global_norm_clip([GOLDEN], 1.25)
    chex.assert_trees_all_close(updates, jnp.full(3, 1.75), rtol=1e-6)
    chex.assert_trees_all_close(updates, theirs[0], rtol=1e-6)
    assert state.measured.clipped == state.measured.clip_rate == clipped / 4
    expected = {"norm": 3.75, "threshold": 1.25, "scale": 0.4375, "clipped": 0.75, "clip_rate": 0.75}
    expected = {f"clip/{name}": jnp.float32(x) for name, x in expected.items()}
    dropped = {"clip/dropped": jnp.int32(0), "clip/dropped_total": jnp.int32(0)}
    metrics = oc.clip_metrics(state)
    chex.assert_trees_all_close(metrics, expected | dropped, rtol=1e-6)
    chex.assert_trees_all_equal_shapes_and_dtypes(metrics, expected | dropped)


@pytest.mark.parametrize("count", [1, 3, 8])
@pytest.mark.parametrize("name", ["shrink", full("normalize"), full("smooth"), full("tanh")])
def test_mean_of_the_reference(count, name):
    """Any number of examples and any response gives the mean in float64 of the reference."""
    tx = oc.per_example(0.75, response=getattr(responses, name))
    updates, _ = trees.step(tx, batch(count), params=PARAMS)
    expected = reference.per_example(batch(count), 0.75, getattr(reference, name))
    chex.assert_trees_all_equal_shapes_and_dtypes(updates, PARAMS)
    chex.assert_trees_all_close(updates, jax.tree.map(np.float32, expected), rtol=1e-5, atol=1e-6)


@pytest.mark.full
def test_equal_to_optax_on_a_deep_network():
    """On a perceptron of six layers of width 256 and 32 examples, the sum is Optax's to 1e-6."""
    keys = jax.random.split(jax.random.key(0), 7)
    params = [1.5 * jax.random.normal(key, (256, 256)) / 16 for key in keys[1:]]
    deep = lambda params, x: jnp.sum(functools.reduce(lambda x, w: jnp.tanh(x @ w), params, x) ** 2)
    tx = oc.per_example(1.0, reduce="sum")

    @jax.jit
    def both(params, x):
        grads = jax.vmap(jax.grad(deep), (None, 0))(params, x)
        return tx.update(grads, tx.init(params), params), optax.per_example_global_norm_clip(grads, 1.0)

    (ours, state), (theirs, clipped) = both(params, jax.random.normal(keys[0], (32, 256)))
    assert state.measured.clipped == clipped / 32 == 1
    for a, b in zip(ours, theirs):
        assert jnp.linalg.norm(a - b) <= 1e-6 * jnp.linalg.norm(b)


SCOPES = {
    "order": (functools.partial(oc.global_norm, ord=1), 0.5),
    "leaves": (oc.leaf_norm, {"bias": 0.5, "dense": None, "scale": 0.1}),
    "groups": (oc.group_norm({"bias": "vectors", "dense": "others", "scale": None}), 0.5),
    "rms": (oc.block_rms, 0.1),
    "own": (lambda updates: optax.tree.norm(updates), 0.5),
}


@pytest.mark.full
@pytest.mark.parametrize("scope", SCOPES)
def test_other_scopes(scope):
    """Options of a norm, a norm a leaf or a group, one's own: the sum and the means of a loop over the examples."""
    norm, max_norm = SCOPES[scope]
    updates, state = trees.step(oc.per_example(max_norm, norm=norm, reduce="sum"), batch(), params=PARAMS)
    one = oc.clip_by_norm(norm, max_norm)
    each = [trees.step(one, jax.tree.map(lambda x, i=i: x[i], batch())) for i in range(8)]
    total = jax.tree.map(lambda *leaves: sum(leaves), *(clipped for clipped, _ in each))
    chex.assert_trees_all_close(updates, total, rtol=1e-5, atol=1e-6)
    means = jax.tree.map(lambda *leaves: sum(leaves) / 8, *(state for _, state in each))
    chex.assert_trees_all_close(state.measured, means._replace(clip_step=jnp.int32(1)), rtol=1e-5)


def test_none_measures_only():
    """Without a bound the mean is the plain mean, and the state has the norms."""
    updates, state = trees.step(oc.per_example(None), batch(), params=PARAMS)
    chex.assert_trees_all_close(updates, jax.tree.map(lambda x: x.mean(0), batch()), rtol=1e-5, atol=1e-6)
    assert state.measured.norm > 0 and state.measured.clip_scale == 1 and state.measured.clipped == 0


def test_a_schedule_counts_the_steps():
    """A schedule is asked for the step, and the clip rate is the mean over steps."""
    tx = oc.per_example(lambda step: jnp.where(step == 0, 1e6, 1e-6))
    _, state = trees.step(tx, batch(), params=PARAMS)
    updates, state = trees.step(tx, batch(), state, PARAMS)
    assert state.measured.clip_step == 2 and state.measured.clip_rate == 0.5
    assert trees.norm64(updates) <= 1.1e-6


@pytest.mark.parametrize("dtype", [jnp.bfloat16, full(jnp.float16), jnp.complex64], ids=str)
def test_other_dtypes(dtype):
    """Sums are taken in f32 at least, and rounded once."""
    grads = batch(8, jnp.float32)
    if dtype is jnp.complex64:
        grads = jax.tree.map(lambda x: x * (1 + 2j), grads)
    grads = jax.tree.map(lambda x: x.astype(dtype), grads)
    updates, _ = trees.step(TX, grads)
    assert all(x.dtype == dtype for x in jax.tree.leaves(updates))
    expected = jax.tree.map(lambda x: jnp.asarray(x, dtype), reference.per_example(grads, 0.5))
    chex.assert_trees_all_close(updates, expected, rtol=2 * float(jnp.finfo(dtype).eps), atol=1e-6)


def test_leaves_without_a_norm_keep_their_axis():
    """Integers and others are neither counted nor reduced."""
    grads = {"w": GOLDEN, "i": jnp.arange(4), "none": None, "flag": True}
    updates, _ = TX.update(grads, None)
    assert updates["i"] is grads["i"] and updates["flag"] is True
    chex.assert_trees_all_close(updates["w"], TX.update(GOLDEN, None)[0])


# Bad examples


@pytest.mark.parametrize("bad", [np.nan, np.inf, full(-np.inf)])
def test_a_bad_example_changes_nothing_but_the_count(bad):
    """An example with a NaN or inf acts as one of zeros, to the last bit of updates and state, but is counted."""
    updates, state = trees.step(TX, first_is(bad), params=PARAMS)
    expected, of_zeros = trees.step(TX, zeros_first(), params=PARAMS)
    chex.assert_trees_all_equal(updates, expected)
    one = jnp.int32(1)
    chex.assert_trees_all_equal(state, of_zeros._replace(dropped=one, dropped_total=one))
    expected = jax.tree.map(np.float32, reference.per_example(first_is(bad), 0.5))
    chex.assert_trees_all_close(updates, expected, rtol=1e-5, atol=1e-6)
    _, state = trees.step(TX, batch(), state, PARAMS)
    assert state.dropped == 0 and state.dropped_total == 1


def test_without_a_bound_bad_examples_are_left_out_too():
    """A measuring `per_example(None)` drops what is not finite."""
    updates, state = trees.step(oc.per_example(None), first_is(np.nan), params=PARAMS)
    chex.assert_tree_all_finite(updates)
    assert state.dropped == 1


@pytest.mark.parametrize("count", [0, 1, 3, 5, 31])
def test_any_number_of_examples(count):
    """Sums are right for numbers of examples that do not divide by 4, and 0 without examples."""
    x = jax.random.normal(jax.random.key(count), (count, 6))
    out, state = trees.step(oc.per_example(1.0), x, params=jnp.zeros(6))
    rows = np.asarray(x, np.float64)
    rows = rows / np.maximum(1, np.linalg.norm(rows, axis=1, keepdims=True))
    np.testing.assert_allclose(out, rows.sum(0) / max(count, 1), atol=1e-6)
    assert np.isfinite(state.measured.norm)


def test_norms_near_the_largest_number_are_reported():
    """The mean of norms stays finite where their sum leaves the range."""
    out, state = trees.step(oc.per_example(1e38), jnp.array([[2e38], [2e38]]), params=jnp.zeros(1))
    np.testing.assert_allclose((out[0], state.measured.norm), (1e38, 2e38), rtol=1e-6)


def test_nothing_good():
    """All zeros, or all NaN, give zeros."""
    for value in (0.0, np.nan):
        updates, state = trees.step(TX, jax.tree.map(lambda x: jnp.full_like(x, value), batch()), params=PARAMS)  # noqa: B023
        chex.assert_trees_all_equal(updates, jax.tree.map(jnp.zeros_like, PARAMS))
        assert state.dropped == (8 if np.isnan(value) else 0)


def test_far_norms():
    """Norms from 1e-20 to 1e37 are clipped right beside each other, and a norm above f32 is dropped."""
    grads = jnp.array([[3e-20, 4e-20], [3e36, 4e36], [3.0, 4.0], [3e38, 3e38]])
    updates, state = trees.step(oc.per_example(1.0, response=responses.normalize, reduce="sum"), grads)
    chex.assert_trees_all_close(updates, jnp.array([1.8, 2.4]), rtol=1e-6)
    assert state.dropped == 1


# With others


def test_in_a_chain_with_an_optimizer():
    """In front of AdamW the state of the optimizer has the shapes of the parameters, also in a scan."""
    tx = optax.chain(TX, optax.adamw(0.1))
    x, y = data()

    def step(carry, _):
        params, state = carry
        updates, state = tx.update(gradients(params, x, y), state, params)
        return (optax.apply_updates(params, updates), state), oc.clip_metrics(state)["clip/norm"]

    (params, state), norms = jax.jit(lambda carry: jax.lax.scan(step, carry, length=3))((PARAMS, tx.init(PARAMS)))
    chex.assert_trees_all_equal_shapes_and_dtypes(params, PARAMS)
    chex.assert_shape(norms, (3,))
    assert state[0].measured.clip_step == 3


def test_multi_steps():
    """Before `MultiSteps` in a chain, clipped means are accumulated; `MultiSteps` around is an error."""
    x, y = data()
    grads = gradients(PARAMS, x, y)
    tx = optax.chain(TX, optax.MultiSteps(optax.sgd(1.0), 2).gradient_transformation())
    _, state = trees.step(tx, grads, params=PARAMS)
    updates, _ = trees.step(tx, grads, state, PARAMS)
    expected, _ = trees.step(TX, grads, params=PARAMS)
    chex.assert_trees_all_close(updates, jax.tree.map(jnp.negative, expected), rtol=1e-5)
    around = optax.MultiSteps(TX, 2)
    with pytest.raises((TypeError, ValueError)):
        around.update(grads, around.init(PARAMS), PARAMS)


@pytest.mark.full
def test_derivatives_of_what_comes_out():
    """The derivative by the examples agrees with differences, and is 0 for an example that is left out."""
    of_sum = jax.jit(lambda grads: sum(jnp.sum(x) for x in jax.tree.leaves(TX.update(grads, None)[0])))
    slopes = jax.jit(jax.grad(of_sum))(first_is(np.nan))
    chex.assert_tree_all_finite(slopes)
    assert all(not x[0].any() for x in jax.tree.leaves(slopes))
    direction, h = trees.small(3), 1e-2
    moved = [jax.tree.map(lambda x, d, s=s: x.at[3].add(s * d), batch(), direction) for s in (h, -h)]
    difference = (of_sum(moved[0]) - of_sum(moved[1])) / (2 * h)
    slopes = jax.tree.map(lambda x: x[3], jax.jit(jax.grad(of_sum))(batch()))
    chex.assert_trees_all_close(optax.tree.vdot(slopes, direction), difference, rtol=1e-2, atol=1e-4)


# On many devices


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)
def test_examples_spread_over_devices_under_jit(kind):
    """A batch that is spread over devices gives updates and state of one device."""
    mesh, (x, y) = trees.mesh(kind, data=8), data()
    x, y = jax.device_put((x, y), NamedSharding(mesh, P("data")))
    with jax.set_mesh(mesh):
        actual = jax.jit(step_on)(jax.device_put(PARAMS, NamedSharding(mesh, P())), x, y)
    chex.assert_trees_all_close(jax.device_get(actual), jax.jit(step_on)(PARAMS, *data()), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("check_vma", [True, False])
def test_shards_in_shard_map(check_vma):
    """Inside `shard_map` the mean of the devices is that of one device to 1e-6: no norm is over others' examples."""

    def step(params, x, y):
        # A gradient by parameters that are the same everywhere is summed over all devices by JAX.
        params = trees.varying(params, "data") if check_vma else params
        updates, state = TX.update(gradients(params, x, y), TX.init(params), params)
        return jax.lax.pmean(updates, "data"), state

    on_mesh = functools.partial(jax.shard_map, mesh=trees.mesh(data=8), in_specs=(P(), P("data"), P("data")))
    updates, state = jax.jit(on_mesh(step, out_specs=P(), check_vma=check_vma))(PARAMS, *data())
    expected, expected_state = jax.jit(step_on)(PARAMS, *data())
    chex.assert_trees_all_close(updates, expected, rtol=1e-6, atol=1e-6)
    if check_vma:  # else the state is that of each device
        chex.assert_trees_all_close(state, expected_state, rtol=1e-6)


def test_dropped_examples_of_all_devices_are_counted():
    """The count is over all devices where types speak."""
    x, y = data()
    x[3], x[9] = np.nan, np.inf

    def step(params, x, y):
        grads = gradients(trees.varying(params, "data"), x, y)
        return TX.update(grads, TX.init(params))[1]

    on_mesh = jax.shard_map(step, mesh=trees.mesh(data=8), in_specs=(P(), P("data"), P("data")), out_specs=P())
    state = jax.jit(on_mesh)(PARAMS, x, y)
    assert state.dropped == state.dropped_total == 2
    chex.assert_trees_all_close(state, jax.jit(step_on)(PARAMS, x, y)[1], rtol=1e-6)


def test_parameters_that_are_split_name_their_axis():
    """Where each device holds a part of every example, the name in the norm makes it whole."""
    tx = oc.per_example(1.25, norm=functools.partial(oc.global_norm, axis_name="model"), reduce="sum")
    grads = jnp.tile(GOLDEN, (1, 2)) / 2**0.5  # the norms of the golden example
    update = lambda grads: tx.update(grads, tx.init(grads[0]))
    mesh = trees.mesh(data=2, model=2)
    specs = {"in_specs": P("data", "model"), "out_specs": (P("model"), P())}
    mean = lambda grads: (jax.lax.psum((made := update(grads))[0], "data"), made[1])
    updates, state = jax.jit(jax.shard_map(mean, mesh=mesh, **specs))(grads)
    chex.assert_trees_all_close(updates, jnp.full(6, 1.75) / 2**0.5, rtol=1e-6)
    chex.assert_trees_all_close(state.measured.norm, jnp.float32(3.75), rtol=1e-6)


# Errors


def error(kind, text, call):
    with pytest.raises(kind) as caught:
        call()
    assert str(caught.value).startswith(text), caught.value


HOW = "Take the gradients with jax.vmap(jax.grad(loss), (None, 0))."
NO_AXIS = "updates must have an axis of examples before those of the parameters, got shape "


def test_errors_of_the_updates():
    """Updates without an axis of examples are refused, and the text shows how to take gradients."""
    refused = functools.partial(error, ValueError)
    refused(f"{NO_AXIS}() at the root. {HOW}", lambda: TX.update(jnp.float32(1), None))
    uneven = {"a": GOLDEN, "b": jnp.ones((2, 3))}
    refused(f"{NO_AXIS}(2, 3) at ['b'] beside (4, 3) at ['a']. {HOW}", lambda: TX.update(uneven, None))
    refused(
        f"{NO_AXIS}(4, 3) at the root for a parameter of shape (4, 3). {HOW}", lambda: TX.update(GOLDEN, None, GOLDEN)
    )
    refused("params must be ", lambda: TX.update(uneven, None, {"a": GOLDEN[0]}))


def test_errors_of_the_arguments():
    """What `per_example` cannot do is refused where it is made, or in `init`."""
    error(ValueError, "max_norm must be >= 0, got -1", lambda: oc.per_example(-1.0))
    error(ValueError, "reduce must be one of ('mean', 'sum'), got str 'max'", lambda: oc.per_example(1.0, reduce="max"))
    rule = "max_norm must be a number, a scalar array, a schedule, or None, got a rule. "
    error(TypeError, rule, lambda: oc.per_example(thresholds.z_score()))
    error(TypeError, "norm must be a function, got int 2", lambda: oc.per_example(1.0, norm=2))
    error(TypeError, "response must be a function, got int 2", lambda: oc.per_example(1.0, response=2))
    units = "norm must return scalars, got an array of shape (1, 3). "
    error(ValueError, units, lambda: oc.per_example(1.0, norm=oc.unit_norm).init(PARAMS))
    error(
        TypeError, "state must be a PerExampleState, got ClipState", lambda: TX.update(GOLDEN, oc.ClipState(*[0] * 7))
    )

"""On a mesh every transformation gives the answer of one device, or an error that says which argument is missing."""

import contextlib
import functools
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from table import TABLE
from trees import mesh, varying

import optax_clip as oc
from optax_clip import thresholds

SHAPES = {"bias": (24,), "dense": {"conv": (2, 2, 8, 16), "out": (24, 16), "qkv": (16, 24)}, "scale": ()}
LAYOUTS = {  # the axes of the mesh, and how leaves are spread over it
    "fsdp": ({"data": 8}, {"dense": {"conv": P(None, None, "data"), "out": P("data"), "qkv": P("data")}}),
    "both": (
        {"data": 4, "model": 2},
        {
            "bias": P("model"),
            "dense": {"conv": P(None, None, ("data", "model")), "out": P("model", "data"), "qkv": P("data", "model")},
        },
    ),
}
full = pytest.mark.full
QUICK = [("clip_by_global_norm", AxisType.Auto, "fsdp"), ("adaptive_grad_clip", AxisType.Explicit, "both")]
EVERY = [(case.name, *where) for case in TABLE for where in [(AxisType.Auto, "both"), (AxisType.Explicit, "fsdp")]]
EVERY = QUICK + [pytest.param(*entry, marks=full) for entry in EVERY if entry not in QUICK]


def sample(seed: int = 0, scale: float = 1.0) -> dict:
    random = np.random.default_rng(seed)
    is_shape = lambda x: isinstance(x, tuple)
    return jax.tree.map(lambda shape: np.float32(scale * random.normal(size=shape)), SHAPES, is_leaf=is_shape)


def shardings(kind, layout) -> dict:
    axes, specs = LAYOUTS[layout]
    on, specs = mesh(kind, **axes), {"bias": P(), "scale": P()} | specs
    return jax.tree.map(lambda spec: NamedSharding(on, spec), specs, is_leaf=lambda x: isinstance(x, P))


@pytest.mark.parametrize(("name", "kind", "layout"), EVERY, ids=str)
def test_jit_is_one_device(name, kind, layout):
    """Three steps give the updates and states of one device, and each leaf stays where it was."""
    tx = next(case.tx for case in TABLE if case.name == name)

    @jax.jit
    def steps(samples, params):
        state, out = tx.init(params), []
        for updates in samples:
            updates, state = tx.update(updates, state, params)
            out.append(updates)
        return out, state

    samples, params = [sample(0), sample(1, 3.0), sample(2)], sample(9)
    expected, expected_state = steps(samples, params)
    placement = shardings(kind, layout)
    with jax.set_mesh(placement["scale"].mesh) if kind is AxisType.Explicit else contextlib.nullcontext():
        clipped, state = steps(*jax.device_put((samples, params), ([placement] * 3, placement)))
    atol = 5e-6 if name == "clip_singular_values" else 1e-6  # products of products, in another order
    chex.assert_trees_all_close((clipped, state), (expected, expected_state), rtol=1e-5, atol=atol)
    for leaf, place in zip(jax.tree.leaves(clipped[-1]), jax.tree.leaves(placement)):
        assert leaf.sharding.is_equivalent_to(place, leaf.ndim)


@full
@pytest.mark.parametrize("count", [1, 8])
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_explicit_axes_without_a_mesh_in_context(count, compiled):
    """The mesh that arrays carry is enough; norms of units are spread as their leaves are."""
    tx, updates = oc.zclip(1.0, 0.9, 2, norm=oc.unit_norm), {"w": jnp.arange(48.0).reshape(6, 8)}
    step = lambda updates: tx.update(updates, tx.init(updates))
    placement = NamedSharding(mesh(AxisType.Explicit, model=count), P(None, "model"))
    clipped, state = (jax.jit(step) if compiled else step)(jax.device_put(updates, placement))
    chex.assert_trees_all_close((clipped, state), step(updates), rtol=1e-6)
    assert clipped["w"].sharding.is_equivalent_to(placement, 2)


# Inside of `shard_map` and `pmap`

UPDATES = {"w": np.float32(np.random.default_rng(0).normal(size=(16, 3))), "b": np.float32([0.3, -2.0, 1.0])}
SPECS = {"w": P("data"), "b": P()}
WITH_AXIS_NAME = {
    "clip_by_global_norm": lambda **axis: oc.clip_by_global_norm(0.5, **axis),
    "clip_by_leaf_norm": lambda **axis: oc.clip_by_leaf_norm(0.5, **axis),
    "clip_by_unit_norm": lambda **axis: oc.clip_by_unit_norm(0.5, **axis),
    "clip_by_block_rms": lambda **axis: oc.clip_by_block_rms(0.5, **axis),
    "clip_by_group_norm": lambda **axis: oc.clip_by_group_norm({"a": 0.5}, "a", **axis),
    "clip_by_norm_range": lambda **axis: oc.clip_by_norm_range(0.25, 0.5, **axis),
    "adaptive_grad_clip": lambda **axis: oc.adaptive_grad_clip(0.1, **axis),
    "autoclip": lambda **axis: oc.autoclip(50.0, 4, **axis),
    "zclip": lambda **axis: oc.zclip(1.0, 0.9, 0, **axis),
    "adagc": lambda **axis: oc.adagc(0.5, **axis),
    "clip_by_sigma": lambda **axis: oc.clip_by_sigma(1.0, 4, **axis),
    "skip_spikes": lambda **axis: oc.skip_spikes(optax.sgd(1.0), 0.5, **axis),
    "clip_weight_norm": lambda **axis: oc.clip_weight_norm(0.5, **axis),
    "rescale_weights": lambda **axis: oc.rescale_weights(-0.5, 0.5, **axis),
}
OF_UNITS = ("clip_by_unit_norm", "adaptive_grad_clip", "clip_weight_norm")
QUICK_NAMES = ("clip_by_global_norm", "clip_by_unit_norm")
of_names = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[full] * (name not in QUICK_NAMES)) for name in WITH_AXIS_NAME]
)


def two_steps(tx, updates):
    """Both steps of a transformation, with the first updates as parameters."""
    first, state = tx.update(updates, tx.init(updates), updates)
    return first, tx.update(jax.tree.map(lambda x: 2 * x, updates), state, updates)[0]


def on_mesh(tx, check_vma=True, specs=SPECS, reduce=lambda x: x):
    """The steps inside a mesh of 8 devices."""
    inside = lambda updates: two_steps(tx, jax.tree.map(reduce, updates))
    return jax.shard_map(inside, mesh=mesh(data=8), in_specs=(specs,), out_specs=(specs, specs), check_vma=check_vma)


@of_names
def test_shard_map_is_one_device(name):
    """Inside `shard_map` types say which leaves are spread; units need the name of the axis."""
    axis = {"axis_name": {"w": "data", "b": None}} if name in OF_UNITS else {}
    actual = jax.jit(on_mesh(WITH_AXIS_NAME[name](**axis)))(UPDATES)
    expected = jax.jit(functools.partial(two_steps, WITH_AXIS_NAME[name]()))(UPDATES)
    chex.assert_trees_all_close(actual, expected, rtol=1e-5, atol=1e-6)


@of_names
def test_where_types_do_not_speak(name):
    """With `check_vma=False` names give the numbers of one device, for parts of leaves and for averages."""
    expected = jax.jit(functools.partial(two_steps, WITH_AXIS_NAME[name]()))(UPDATES)
    parts = WITH_AXIS_NAME[name](axis_name={"w": "data", "b": ()})
    chex.assert_trees_all_close(jax.jit(on_mesh(parts, False))(UPDATES), expected, rtol=1e-5, atol=1e-6)
    average = lambda x: jax.lax.pmean(x * (1 + jax.lax.axis_index("data") - 3.5), "data")
    whole = on_mesh(WITH_AXIS_NAME[name](axis_name=()), False, {"w": P(), "b": P()}, average)
    chex.assert_trees_all_close(jax.jit(whole)(UPDATES), expected, rtol=1e-5, atol=1e-6)


@of_names
def test_a_missing_axis_name(name):
    """Where types do not speak the error names `axis_name=()` first, for gradients that were averaged."""
    with pytest.raises(ValueError, match=r"^axis_name is missing[^\n]*\bpmean\b[^\n]*axis_name=\(\)") as caught:
        jax.eval_shape(on_mesh(WITH_AXIS_NAME[name](), False), UPDATES)
    assert "'data'" in str(caught.value)


@pytest.mark.parametrize("name", OF_UNITS)
def test_units_need_an_axis_name(name):
    """Types do not say how a unit is spread over devices: the error names the leaf and the axes."""
    with pytest.raises(ValueError, match=r"^axis_name is missing.*\['w'\].*'data'|'data'.*\['w'\]"):
        jax.eval_shape(on_mesh(WITH_AXIS_NAME[name]()), UPDATES)


def test_pmap():
    """In `pmap` averaged gradients are clipped with `axis_name=()`; without it the error leads there."""
    parts = jnp.stack([jnp.array([6.0, 8.0]) * (i + 1) / 4.5 for i in range(8)])

    def step(tx, part):
        grads = jax.lax.pmean(part, "batch")
        return tx.update(grads, tx.init(grads))[0]

    devices = {"devices": jax.devices("cpu")[:8], "axis_name": "batch"}
    clipped = jax.pmap(functools.partial(step, oc.clip_by_global_norm(1.0, axis_name=())), **devices)(parts)
    chex.assert_trees_all_close(clipped, jnp.tile(jnp.array([0.6, 0.8]), (8, 1)), rtol=1e-6)
    with pytest.raises(ValueError, match=r"^axis_name is missing.*pmean.*axis_name=\(\)"):
        jax.pmap(functools.partial(step, oc.clip_by_global_norm(1.0)), **devices)(parts)


@of_names
@pytest.mark.parametrize("check_vma", [True, False])
def test_a_name_that_is_no_axis(name, check_vma):
    """Inside a mesh a name that is no axis of it is an error that names those that are."""
    for axis_name in ("model", ("data", "model")):
        with pytest.raises(ValueError, match=r"^axis_name .*data.*model"):
            jax.eval_shape(on_mesh(WITH_AXIS_NAME[name](axis_name=axis_name), check_vma), UPDATES)


def test_names_outside_of_a_mesh():
    """Outside of a mesh names are ignored, so that a step can be tried on one device."""
    actual = jax.jit(functools.partial(two_steps, oc.clip_by_global_norm(0.5, axis_name="data")))(UPDATES)
    expected = jax.jit(functools.partial(two_steps, oc.clip_by_global_norm(0.5)))(UPDATES)
    chex.assert_trees_all_equal(actual, expected)


@full
def test_rules_inside_shard_map():
    """A rule of units whose history is spread over the mesh keeps it so over the steps of a scan."""
    tx = oc.clip_by_norm(functools.partial(oc.unit_norm, axis=1, axis_name=()), thresholds.z_score(1.0, 0.9, 2))
    samples = jnp.stack([UPDATES["w"] * scale for scale in (1.0, 1.1, 5.0)])

    def scan(samples):
        return jax.lax.scan(lambda state, x: tx.update(x, state)[::-1], tx.init(samples[0]), samples)[1]

    inside = jax.shard_map(scan, mesh=mesh(data=8), in_specs=P(None, "data"), out_specs=P(None, "data"))
    chex.assert_trees_all_close(jax.jit(inside)(samples), jax.jit(scan)(samples), rtol=1e-6)


@full
@pytest.mark.parametrize("make", [oc.clip_by_unit_norm, oc.adaptive_grad_clip], ids=lambda make: make.__name__)
def test_leaves_that_are_whole_on_each_device_stay_so_beside_spread_ones(make):
    """Types of leaves that no mesh axis splits stay as they are, where other leaves are spread."""
    specs = {"spread": P(None, "data"), "matrix": P(), "vector": P()}
    tree = {"spread": jnp.arange(1.0, 33.0).reshape(4, 8), "matrix": jnp.ones((3, 2)), "vector": jnp.ones(3)}
    tx = make(0.1, axis_name=())
    update = lambda tree: tx.update(tree, tx.init(tree), tree)[0]
    there = jax.jit(jax.shard_map(update, mesh=mesh(data=4), in_specs=(specs,), out_specs=specs))(tree)
    chex.assert_trees_all_close(there, make(0.1).update(tree, None, tree)[0], rtol=1e-6)


@full
def test_the_total_of_norms_that_differ_over_devices_is_the_same_everywhere():
    """Norms of parts count as blocks of their own, so all devices report one total and skip the same steps."""
    part = functools.partial(oc.unit_norm, axis_name=())
    sharded = functools.partial(jax.shard_map, mesh=mesh(data=4), in_specs=(P("data"),), out_specs=P("data"))
    tx = oc.clip_by_norm(part, 1.0)
    total = lambda x: varying(tx.update(x, tx.init(x))[1].norm, "data")[None]
    x = jnp.arange(1.0, 9.0)
    np.testing.assert_allclose(jax.jit(sharded(total))(x), np.linalg.norm(np.arange(1, 9)), rtol=1e-6)
    skip = oc.skip_spikes(optax.sgd(1.0), norm=part)
    step = jax.jit(sharded(lambda x: skip.update(x, skip.init(x))[0]))
    np.testing.assert_array_equal(step(x.at[3].set(jnp.nan)), np.zeros(8))


def test_peaks_on_several_devices_share_the_derivative():
    """Entries that share the largest magnitude share the derivative of the norm, on several devices too."""
    x = jnp.array([3.0, 1.0, 0.0, 2.0, -3.0, 1.0, 2.0, 3.0])
    norm = jax.shard_map(
        functools.partial(oc.global_norm, ord=math.inf), mesh=mesh(data=8), in_specs=P("data"), out_specs=P()
    )
    third = 1 / 3
    chex.assert_trees_all_close(jax.jit(jax.grad(norm))(x), jnp.array([third, 0, 0, 0, -third, 0, 0, third]), rtol=1e-6)


def test_a_name_adds_to_what_types_say():
    """A name of an axis is added to those that the types of whole leaves tell."""
    w = jnp.arange(16.0).reshape(8, 2)
    for axis_name in ("data", "model", ("data", "model"), ()):
        norm = functools.partial(oc.leaf_norm, axis_name=axis_name)
        inside = jax.shard_map(norm, mesh=mesh(data=4, model=2), in_specs=P("data", "model"), out_specs=P())
        chex.assert_trees_all_close(jax.jit(inside)(w), jnp.linalg.norm(w), rtol=1e-6)


def test_mean_square_over_devices():
    """The mean of a block RMS is over the entries of all devices."""
    w = jnp.arange(24.0).reshape(8, 3)
    inside = jax.shard_map(oc.block_rms, mesh=mesh(data=8), in_specs=P("data"), out_specs=P())
    chex.assert_trees_all_close(jax.jit(inside)(w), oc.block_rms(w), rtol=1e-6)


def test_shares_count_the_units_of_all_devices():
    """The share clipped is that of the units of all devices."""
    w = jnp.arange(1.0, 25.0).reshape(8, 3)

    def clipped(w):
        tx = oc.clip_by_unit_norm(5.0, axis=1, axis_name=())
        return tx.update(w, tx.init(w))[1].clipped

    inside = jax.shard_map(clipped, mesh=mesh(data=8), in_specs=P("data"), out_specs=P())
    assert jax.jit(inside)(w) == clipped(w) == 0.875

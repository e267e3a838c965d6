"""Under jit with sharded arrays every clip gives the answer of one device, without gathering anything."""

import collections
import contextlib
import functools
import re

import chex
import clips
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import trees
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from test_programs import entry

import optax_clip as oc
from optax_clip import clip_metrics

SHAPES = {"qkv": (16, 24), "out": (24, 16), "up": (16, 32), "conv": (2, 2, 8, 16), "bias": (24,), "scale": ()}
LAYOUTS = {  # the axes of the mesh, and how leaves are spread over it
    "fsdp": ({"data": 8}, {"qkv": P("data"), "out": P("data"), "up": P("data"), "conv": P(None, None, "data")}),
    "tensor": ({"model": 8}, {"qkv": P(None, "model"), "out": P("model"), "up": P(None, "model"), "bias": P("model")}),
    "both": (
        {"data": 4, "model": 2},
        {"qkv": P("data", "model"), "up": P("data", "model"), "conv": P(None, None, ("data", "model"))},
    ),
    "mixed": (
        {"data": 4, "model": 2},
        {"qkv": P("data", "model"), "out": P("model", "data"), "up": P(("data", "model")), "bias": P("model")},
    ),
}
ADAPTIVE = {
    "autoclip": lambda norm: oc.autoclip(30.0, 8, norm=norm),
    "zclip": lambda norm: oc.zclip(1.0, 0.9, 5, norm=norm),
    "adagc": lambda norm: oc.adagc(5.0, 1.05, 0.9, 5, norm=norm),
    "clip_by_sigma": lambda norm: oc.clip_by_sigma(1.0, 8, norm=norm),
}
GATHERS = "all-gather|all-to-all|collective-permute|reduce-scatter"
over_layouts = pytest.mark.parametrize("layout", LAYOUTS)
over_kinds = pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])


sample = functools.partial(trees.sample, shapes=SHAPES)


def shardings(kind, layout) -> dict:
    axes, specs = LAYOUTS[layout]
    mesh = trees.mesh(kind, **axes)
    return {name: NamedSharding(mesh, specs.get(name, P())) for name in SHAPES}


def on(mesh):
    """The context of a step on this mesh."""
    explicit = AxisType.Explicit in mesh.axis_types
    return jax.set_mesh(mesh) if explicit else contextlib.nullcontext()


def collectives(program) -> dict:
    """How many of each kind an ordinary step runs: those of the main computation."""
    kinds = re.findall(rf" (all-reduce|{GATHERS})(?:-start)?\(", entry(program))
    return dict(collections.Counter(kinds))


def assert_sharded_like(tree: dict, placement: dict):
    for name, leaf in tree.items():
        assert leaf.sharding.is_equivalent_to(placement[name], leaf.ndim)


@functools.cache
def alone(case):
    """Updates and state of one step on one device."""
    tx, updates = case.make(0.5), sample()
    return jax.jit(tx.update)(updates, tx.init(updates), sample(1, 0.0))


@functools.cache
def sums_of_optax(kind, layout) -> int:
    """How many all-reduces Optax's global norm takes."""
    updates = jax.device_put(sample(), shardings(kind, layout))
    return collectives(jax.jit(optax.clip_by_global_norm(0.5).update).lower(updates, None).compile())["all-reduce"]


@over_kinds
@over_layouts
@pytest.mark.parametrize("case", clips.CLIPS, ids=lambda case: case.name)
def test_jit_is_one_device(kind, layout, case):
    """Updates, metrics and shardings are kept, and only sums travel: for a global norm one on a mesh of one axis."""
    tx, placement = case.make(0.5), shardings(kind, layout)
    with on(placement["scale"].mesh):
        updates, params = (jax.device_put(tree, placement) for tree in (sample(), sample(1, 0.0)))
        state = tx.init(updates)
        step = jax.jit(tx.update).lower(updates, state, params).compile()
        clipped, new_state = step(updates, state, params)
    expected, expected_state = alone(case)
    actual = (clipped, jax.tree.leaves(new_state))
    chex.assert_trees_all_close(actual, (expected, jax.tree.leaves(expected_state)), rtol=1e-6)
    assert_sharded_like(clipped, placement)
    found = collectives(step)
    assert set(found) <= {"all-reduce"}
    if case.scope == "entry":
        assert not found
    if case.scope == "global":
        # XLA's CPU backend sums over each axis of the mesh in turn, and apart where leaves name them in another order.
        assert found["all-reduce"] <= (1 if len(placement["scale"].mesh.shape) == 1 else sums_of_optax(kind, layout))


@over_kinds
@pytest.mark.parametrize("name", ADAPTIVE)
@pytest.mark.parametrize(
    ("layout", "norm"), [("both", oc.global_norm), ("mixed", oc.leaf_norm)], ids=["global", "leaf"]
)
def test_adaptive_clips_are_one_device(kind, name, layout, norm):
    """For 50 steps with spikes and a NaN, updates and statistics are those of one device."""
    tx, placement = ADAPTIVE[name](norm), shardings(kind, layout)
    sizes = np.exp(np.random.default_rng(0).normal(size=50)).astype(np.float32)
    sizes[[20, 33]], sizes[27] = 50.0, np.nan

    def run(updates, sizes):
        def step(state, size):
            clipped, state = tx.update(jax.tree.map(lambda x: size * x, updates), state)
            return state, (clipped, clip_metrics(state))

        return jax.lax.scan(step, tx.init(updates), sizes)

    expected, expected_steps = jax.jit(run)(sample(), sizes)
    with on(placement["scale"].mesh):
        program = jax.jit(run).lower(jax.device_put(sample(), placement), sizes).compile()
        state, steps = program(jax.device_put(sample(), placement), sizes)
    assert not re.search(GATHERS, program.as_text())
    chex.assert_trees_all_close((jax.tree.leaves(state), steps), (jax.tree.leaves(expected), expected_steps), rtol=2e-6)
    assert (jnp.diff(steps[1]["clip/clip_rate"]) > 0).any()
    assert all(leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(state))


@pytest.mark.parametrize("count", [1, 8])
@pytest.mark.parametrize("name", ADAPTIVE)
def test_explicit_axes_without_a_mesh_in_context(name, count):
    """The mesh that arrays carry is enough, outside of jit too: norms of units are spread as their leaves are."""
    tx, updates = ADAPTIVE[name](oc.unit_norm), {"w": jnp.arange(48.0).reshape(6, 8)}
    step = lambda updates: tx.update(updates, tx.init(updates))
    placement = NamedSharding(trees.mesh(AxisType.Explicit, model=count), P(None, "model"))
    placed = jax.device_put(updates, placement)
    expected = step(updates)
    for clipped, state in (step(placed), jax.jit(step)(placed)):
        chex.assert_trees_all_close((clipped, state), expected, rtol=1e-6)
        assert clipped["w"].sharding.is_equivalent_to(placement, 2)

"""What holds for all updates on a mesh: any tree, spread in any way, is clipped as on one device."""

import contextlib
import functools

import chex
import clips
import jax
import numpy as np
import trees
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from properties import PROFILE, assert_near, factors, precision_of, updates_of
from test_guarantees_wrapped import ADAPTIVE, NORMS

MESHES = ({"data": 8}, {"data": 4, "model": 2})
SIZES = [1, 2, 3, 4, 8]
DTYPES = ("float32", "float32", "bfloat16", "float16", "float64", "complex64", "float8_e5m2")


def spread(seed: int):
    """A tree of shapes and dtypes, and axes of the mesh for each of its dimensions that can be cut so."""
    random = np.random.default_rng(seed)
    mesh, kind = MESHES[seed % 2], (AxisType.Auto, AxisType.Explicit)[seed // 2 % 2]

    def leaf():
        shape = tuple(int(size) for size in random.choice(SIZES, random.integers(5)))
        free, axes = dict(mesh), []
        for size in shape:
            fits = [name for name, count in free.items() if size % count == 0]
            name = random.choice(fits) if fits and random.random() < 0.6 else None
            axes.append(name and str(name))
            free.pop(name, None)
        return jax.ShapeDtypeStruct(shape, np.dtype(jax.numpy.dtype(random.choice(DTYPES)))), P(*axes)

    leaves = [leaf() for _ in range(random.integers(1, 5))]
    return {f"leaf{i}": kind for i, (kind, _) in enumerate(leaves)}, [spec for _, spec in leaves], mesh, kind


# A program for each clip, layout and number of devices: many more than these are too many for one process.
LAYOUTS = [spread(seed) for seed in ((4, 7) if PROFILE == "normal" else range(8))]
LAYOUTS = [layout for layout in LAYOUTS if any(any(spec) for spec in layout[1])]
CLIPS = {case.name: case.make for case in clips.CLIPS} | {
    f"{name} {scope}": lambda threshold, make=make, norm=norm: make(norm)
    for name, make in ADAPTIVE.items()
    for scope, norm in list(NORMS.items())[: 2 if PROFILE == "normal" else 3]
}
OF_ENTRIES = {case.name for case in clips.CLIPS if case.scope == "entry"}


@functools.cache
def compiled(name):
    """Two steps, the second of larger updates, as statistics start with the first.

    Larger by a power of two: XLA rounds other products of bf16 entries where they are returned, and not in norms.
    """

    def steps(updates, threshold):
        tx, params = CLIPS[name](threshold), jax.tree.map(jax.numpy.zeros_like, updates)
        _, state = tx.update(updates, tx.init(params), params)
        larger = jax.tree.map(lambda x: (x * 4).astype(x.dtype), updates)
        return tx.update(larger, state, params)

    return jax.jit(steps)


def assert_sharded_is_one_device(name, layout, threshold, updates):
    """Updates and states are those of one device, and each leaf stays where it was.

    Sums in another order may differ by half a unit in the last place for each addend: XLA on CPU adds the entries of
    arrays without a long axis one after the other, and small ones are lost. Clips of entries add up nothing but the
    numbers in their states.
    """
    _, specs, axes, kind = layout
    mesh = trees.mesh(kind, **axes)
    threshold = np.float32(threshold)
    with precision_of(updates):
        expected, expected_state = jax.device_get(compiled(name)(updates, threshold))
        with jax.set_mesh(mesh) if kind is AxisType.Explicit else contextlib.nullcontext():
            placement = dict(zip(updates, (NamedSharding(mesh, spec) for spec in specs)))
            placed = jax.device_put(updates, placement)
            clipped, state = compiled(name)(placed, threshold)
    chex.assert_trees_all_equal_shapes_and_dtypes(clipped, updates)
    slack = 2.0**-24 * sum(leaf.size for leaf in updates.values())
    chex.assert_trees_all_close(jax.device_get(state), expected_state, rtol=max(2e-6, slack))
    assert all(leaf.sharding.is_equivalent_to(placement[key], leaf.ndim) for key, leaf in clipped.items())
    assert_near(clipped, expected, 0.0 if name in OF_ENTRIES else slack)


@given(st.sampled_from([*CLIPS]), st.sampled_from(LAYOUTS), factors, st.data())
def test_sharded_is_one_device(name, layout, threshold, data):
    updates = data.draw(updates_of(lowest=-12.0, highest=4.0, kinds=[layout[0]], extremes=False))
    assert_sharded_is_one_device(name, layout, threshold, updates)


def test_small_addends():
    """Found by the property above: many entries that are lost beside large ones where they are added one by one."""
    kind = jax.ShapeDtypeStruct((16, 4, 16, 16), np.float16)
    updates = {"leaf": np.full(kind.shape, 6e-8, kind.dtype)}
    updates["leaf"][::2, 0, 0] = 0.125
    layout = {"leaf": kind}, [P("data")], {"data": 8}, AxisType.Auto
    assert_sharded_is_one_device("clip_by_global_norm_1", layout, 1e-6, updates)


def test_layouts_cut_leaves():
    """Both kinds of meshes are there, and every axis cuts a leaf."""
    assert {kind for *_, kind in LAYOUTS} == {AxisType.Auto, AxisType.Explicit}
    assert {name for _, specs, _, _ in LAYOUTS for spec in specs for name in spec if name} == {"data", "model"}

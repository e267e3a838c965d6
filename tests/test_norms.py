"""The norms by themselves: values, derivatives, range, types, blocks, and the same numbers when sharded."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
import trees
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jax.test_util import check_grads

import optax_clip as oc

ORDERS = [1, 1.5, 2, 3, float("inf")]
by_order = pytest.mark.parametrize("ord", ORDERS, ids=str)
CLOSE = trees.tolerance(jnp.float32)
GROUPS = {"bias": "a", "conv": "b", "dense": "a", "heads": None, "scale": "b"}


def close(actual, expected, rtol=CLOSE):
    chex.assert_trees_all_close(actual, expected, rtol=rtol, atol=0.0)


def single(norm, ord):
    """A norm of order `ord` of the one block of an array."""
    norms = {
        "global": lambda x: oc.global_norm([x], ord=ord),
        "leaf": lambda x: oc.leaf_norm(x, ord=ord),
        "unit": lambda x: oc.unit_norm(x, ord=ord, axis=tuple(range(x.ndim))).reshape(()),
        "group": lambda x: oc.group_norm("all", ord=ord)([x])[0],
    }
    return norms[norm]


by_scope = pytest.mark.parametrize("scope", ["global", "leaf", "unit", "group"])


# Values


@by_order
@pytest.mark.parametrize(
    "dtype", [jnp.float32, jnp.bfloat16, jnp.float16, jnp.complex64], ids=lambda d: jnp.dtype(d).name
)
def test_values(ord, dtype):
    """Every norm of every order is the sum of powers over its block, for real and complex leaves."""
    updates = trees.sample(0, dtype=dtype)
    if dtype == jnp.complex64:
        updates = jax.tree.map(lambda x, y: jax.lax.complex(x, y), trees.sample(0), trees.sample(1))
    p_norm = functools.partial(reference.p_norm, p=ord)
    close(oc.global_norm(updates, ord=ord), p_norm(reference.flat(updates)))
    close(oc.leaf_norm(updates, ord=ord), {name: p_norm(leaf) for name, leaf in updates.items()})
    units = {name: p_norm(leaf, axes=reference.axes_by_rank(leaf.shape)) for name, leaf in updates.items()}
    close(oc.unit_norm(updates, ord=ord), units)
    groups = oc.group_norm(GROUPS, ord=ord)(updates)
    for label in "ab":
        members = {name: leaf for name, leaf in updates.items() if GROUPS[name] == label}
        close({name: groups[name] for name in members}, dict.fromkeys(members, p_norm(reference.flat(members))))


def test_root_mean_square():
    """Block RMS divides by the number of entries, of a leaf or of a unit, and is 0 where there are none."""
    updates = trees.sample(0) | {"empty": jnp.zeros((0, 3))}
    expected = {name: reference.rms(leaf) for name, leaf in trees.sample(0).items()}
    close(oc.block_rms(updates), expected | {"empty": np.float64(0)})
    close(oc.block_rms(updates["conv"], axis=(0, -1)), reference.rms(updates["conv"], (0, -1)))
    close(oc.block_rms(updates["empty"], axis=0), np.zeros((1, 3)))


def test_axes_by_rank():
    """Vectors are one unit, also with dimensions of size 1; matrices have columns; convolutions output channels."""
    shapes = {
        (): (),
        (5,): (),
        (1, 5, 1): (),
        (1, 1, 1, 1, 1, 1, 4): (),
        (4, 5): (1, 5),
        (4, 1, 5): (1, 1, 5),
        (3, 4, 5): (1, 4, 5),
        (2, 3, 4, 5): (1, 1, 1, 5),
        (2, 2, 3, 4, 5): (1, 1, 1, 1, 5),
        (0, 3): (1, 3),
    }
    for shape, expected in shapes.items():
        chex.assert_shape(oc.unit_norm(jnp.ones(shape)), expected)


@by_order
def test_leaves_without_entries(ord):
    """A leaf without entries has the norm 0 and adds nothing to a block."""
    empty = jnp.zeros((0, 2))
    assert oc.global_norm({}, ord=ord) == 0 and oc.global_norm(empty, ord=ord) == 0
    assert oc.leaf_norm(empty, ord=ord) == 0
    assert oc.unit_norm({"w": empty}, ord=ord)["w"].shape == (1, 2) and not oc.unit_norm(empty, ord=ord).any()
    close(oc.global_norm([empty, jnp.array([3.0, 4.0])], ord=ord), oc.global_norm(jnp.array([3.0, 4.0]), ord=ord))
    assert oc.leaf_norm({}, ord=ord) == {} and oc.group_norm({}, ord=ord)({}) == {}


@by_scope
@by_order
def test_norm_is_known_to_the_compiler(scope, ord):
    """Values that are constants of the compiled program have the norm that they have as arguments."""
    norm = single(scope, ord)
    for value in (0.0, 1.0, 1e-30, 1e-20, 1e25, 1e35):
        constant = jnp.full(5, value)
        known = jax.jit(lambda constant=constant: norm(constant))()
        close(known, reference.p_norm(constant, ord), rtol=1e-6)


# Types and blocks


@by_order
def test_dtypes_and_shapes(ord):
    """Norms are f32, f64 where a leaf of the block is f64; scalars, or arrays of the leaf's rank for units."""
    updates = trees.mixed()
    chex.assert_type(oc.global_norm(updates, ord=ord), jnp.float32)
    chex.assert_shape(oc.global_norm(updates, ord=ord), ())
    chex.assert_tree_has_only_ndarrays(oc.leaf_norm(updates, ord=ord))
    for tree in (oc.leaf_norm(updates, ord=ord), oc.unit_norm(updates, ord=ord), oc.block_rms(updates)):
        assert {leaf.dtype for leaf in jax.tree.leaves(tree)} == {jnp.dtype("float32")}
    chex.assert_equal_rank([oc.unit_norm(updates, ord=ord)["conv"], updates["conv"]])
    with jax.enable_x64(True):
        wide = {"narrow": jnp.ones(3, jnp.float32), "wide": jnp.ones(3, jnp.float64)}
        assert oc.global_norm(wide, ord=ord).dtype == jnp.float64
        norms = oc.leaf_norm(wide, ord=ord)
        assert (norms["narrow"].dtype, norms["wide"].dtype) == (jnp.float32, jnp.float64)
        groups = oc.group_norm({"narrow": "a", "wide": "a"}, ord=ord)(wide)
        assert groups["narrow"].dtype == jnp.float64
        close(oc.leaf_norm(jnp.array([1 + 1e-12]), ord=ord), np.array(1 + 1e-12), rtol=1e-15)


@by_order
def test_odd_leaves_have_no_norm(ord):
    """Integers, booleans, keys, functions and float0 are not counted: None in the tree, nothing in the sum."""
    updates = trees.odd()
    weight = oc.leaf_norm(updates["weight"], ord=ord)
    close(oc.global_norm(updates, ord=ord), weight)
    for tree in (
        oc.leaf_norm(updates, ord=ord),
        oc.unit_norm(updates, ord=ord),
        oc.block_rms(updates),
        oc.group_norm("all", ord=ord)(updates),
    ):
        assert [name for name, leaf in tree.items() if isinstance(leaf, jax.Array)] == ["weight"]
    close(oc.global_norm({"python": 3.0, "numpy": np.float32(4.0), "int": 7}), 5.0)


def test_leaves_of_a_group_carry_one_array():
    """Leaves with the same label carry the same array object, leaves without a label None."""
    norms = oc.group_norm(GROUPS)(trees.sample())
    assert norms["bias"] is norms["dense"] and norms["conv"] is norms["scale"]
    assert norms["heads"] is None and norms["bias"] is not norms["conv"]


def test_labels_may_be_a_prefix_or_a_function():
    """Labels are a prefix tree of any hashable values, or a function of the updates that returns one."""
    updates = {"body": {"w": jnp.array([3.0]), "b": jnp.array([4.0])}, "head": jnp.array([7.0])}
    for labels in ({"body": 0, "head": 1}, {"body": "x", "head": 3.5}, lambda tree: {"body": "x", "head": "y"}):
        norms = oc.group_norm(labels)(updates)
        close((norms["body"]["w"], norms["head"]), (5.0, 7.0))
        assert norms["body"]["w"] is norms["body"]["b"]
    alone = oc.group_norm({"body": None, "head": "x"})(updates)
    assert alone["body"] == {"w": None, "b": None}


def test_a_function_of_labels_sees_updates_alone():
    """It is not called before there are some."""
    labels = lambda updates: {"w": "large" if updates["w"].size > 1 else "small"}
    tx = oc.clip_by_group_norm({"large": 1.0, "small": None}, labels)
    updates, _ = tx.update({"w": jnp.array([3.0, 4.0])}, tx.init({"w": jnp.zeros(2)}))
    chex.assert_trees_all_close(updates, {"w": jnp.array([0.6, 0.8])}, rtol=1e-6)


def test_axis_rule_of_none_leaves_a_leaf_out():
    """Where an axis rule returns None the norm tree has None and the leaf is not counted."""
    rule = lambda path, leaf: None if leaf.ndim < 2 else 0
    for norm in (oc.unit_norm, oc.block_rms):
        norms = norm(trees.sample(), axis=rule)
        assert norms["bias"] is None and norms["scale"] is None
        chex.assert_shape(norms["dense"], (1, 5))


def test_one_block_is_counted_once():
    """In the state a block counts once, however many leaves carry its norm."""
    updates = {"x": jnp.array([3.0]), "y": jnp.array([4.0]), "z": jnp.array([12.0])}
    tx = oc.clip_by_group_norm({"a": 2.5, "b": 24.0}, {"x": "a", "y": "a", "z": "b"})
    _, state = tx.update(updates, tx.init(updates))
    close((state.norm, state.threshold, state.scale, state.clip_rate), (13.0, 13.25, 0.75, 0.5))


# Range


@by_scope
@by_order
@pytest.mark.parametrize(
    "values",
    [
        [1e-27] * 3,
        [1e-27, 1e-30, 1e-34],
        [3e-20, 4e-20, 1e-22],
        [1e-19, 1.0, 1e-25],
        [1e10, 1e-10, 1.0],
        [1e18, 2e18, 3e18],
        [1.8e19, 1.9e19, 1e-30],
        [1e25, 1e-25, 1.0],
        [1e38, 1e38, 1e38],
        [3e38, 1e30, 0.0],
    ],
    ids=lambda values: f"{values[0]}_{values[1]}",
)
def test_norms_are_exact_over_the_range_of_f32(scope, ord, values):
    """Huge, tiny and mixed entries, whose squares leave the range of f32, are measured to 1e-6."""
    updates = jnp.array(values)
    close(single(scope, ord)(updates), reference.p_norm(updates, ord), rtol=1e-6)


def test_blocks_of_every_magnitude_beside_one_another():
    """Each block of a tree is exact, however far the others are from it."""
    updates = {str(k): jnp.full((2, 3), 10.0**k) for k in (-27, -20, -10, 0, 10, 19, 30, 37)}
    for ord in (None, 3):
        expected = {name: reference.p_norm(leaf, ord or 2) for name, leaf in updates.items()}
        close(oc.leaf_norm(updates, ord=ord), expected, rtol=1e-6)
    columns = jnp.concatenate(list(updates.values()), axis=1)
    close(oc.unit_norm(columns), reference.p_norm(columns, 2, (0,)), rtol=1e-6)
    close(oc.global_norm(updates), reference.p_norm(updates["37"]), rtol=1e-6)


@by_scope
@by_order
def test_inf_and_nan_propagate(scope, ord):
    """One infinite entry makes the norm inf, one NaN makes it inf or NaN, wherever it stands."""
    norm = single(scope, ord)
    for place in range(3):
        values = np.array([1.0, 1e30, 1e-30], np.float32)
        values[place] = np.nan
        assert not jnp.isfinite(norm(jnp.asarray(values)))
        values[place] = -np.inf
        assert norm(jnp.asarray(values)) == jnp.inf
    assert not jnp.isfinite(norm(jnp.array([np.nan, np.inf, 1.0])))


def test_overflow_is_inf():
    """A norm above the largest f32 is inf."""
    assert oc.global_norm(jnp.full(4, 3e38)) == jnp.inf
    assert oc.global_norm(jnp.full(4, 3e38), ord=1) == jnp.inf
    assert oc.global_norm(jnp.full(64, 3e38), ord=3) == jnp.inf
    assert oc.global_norm(jnp.full(4, 3e38), ord=float("inf")) == jnp.float32(3e38)


@by_order
def test_magnitudes_beyond_f32_count_beside_f64(ord):
    """In a block with an f64 leaf, an entry whose parts f32 holds has a magnitude, though f32 does not hold it."""
    leaves = [np.complex64([3e38 + 3e38j, 1.0]), np.float64([1e30])]
    with jax.enable_x64(True):
        close(oc.global_norm(leaves, ord=ord), reference.p_norm(np.concatenate(leaves), ord), rtol=1e-12)


# Derivatives


@by_scope
@by_order
def test_derivative_at_zero_is_zero(scope, ord):
    """All derivatives at zero are 0, for real and complex leaves, where the norm itself has none."""
    norm = single(scope, ord)
    chex.assert_trees_all_equal(jax.grad(norm)(jnp.zeros(3)), jnp.zeros(3))
    chex.assert_trees_all_equal(jax.grad(norm)(jnp.zeros(3, jnp.complex64)), jnp.zeros(3, jnp.complex64))


@by_scope
@by_order
def test_derivative_is_right(scope, ord):
    """Derivatives agree with finite differences, and with the formula (|x| / norm)^(ord - 1) far from 1."""
    norm = single(scope, ord)
    x = jnp.array([0.7, -1.3, 2.1, 0.4])
    check_grads(norm, (x,), order=1, modes=("fwd", "rev"), atol=1e-2, rtol=1e-2)
    for scale in (1e-25, 1e25):
        close(jax.grad(norm)(scale * x), jax.grad(norm)(x), rtol=1e-5)


def test_derivative_of_every_block():
    """Derivatives of many blocks at once agree with finite differences, zeros among them."""
    updates = trees.sample() | {"heads": jnp.zeros((4, 2, 3))}
    square = lambda tree: sum(
        jnp.sum(norm) for norm in [*jax.tree.leaves(oc.leaf_norm(tree)), oc.block_rms(tree)["conv"]]
    )
    gradient = jax.grad(square)(updates)
    chex.assert_tree_all_finite(gradient)
    chex.assert_trees_all_equal(gradient["heads"], updates["heads"])
    norm = reference.p_norm(updates["dense"])
    close(gradient["dense"], reference.wide(updates["dense"]) / norm, rtol=1e-5)


# Sharded over virtual devices

MESHES = {
    "8": (("x",), (8,), P("x"), P("x")),
    "4x2": (("x", "y"), (4, 2), P("x", "y"), P(None, "y")),
    "4x2_both": (("x", "y"), (4, 2), P(("x", "y")), P("y", "x")),
}
by_mesh = pytest.mark.parametrize("mesh_name", MESHES)


def mesh_of(name):
    names, sizes, _, _ = MESHES[name]
    return trees.mesh(**dict(zip(names, sizes)))


def spread(name):
    """Leaves that are sharded along one axis, along several, in another order, or not at all; and their specs."""
    _, _, first, second = MESHES[name]
    random = np.random.default_rng(0)
    leaf = lambda *shape: jnp.asarray(random.normal(size=shape), jnp.float32)
    updates = {"a": leaf(8, 8), "b": leaf(8, 8, 2), "whole": leaf(3), "scale": leaf()}
    return updates, {"a": first, "b": second, "whole": P(), "scale": P()}


def sharded(function, mesh, in_specs, out_specs, **options):
    """The function inside `shard_map`, compiled."""
    return jax.jit(jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, **options))


@by_mesh
@by_order
def test_whole_norms_in_shard_map_need_no_argument(mesh_name, ord):
    """Global, leaf and group norms of sharded, replicated and mixed leaves are those of one device."""
    updates, specs = spread(mesh_name)
    labels = {"a": "one", "b": "two", "whole": "one", "scale": "two"}

    def norms(tree):
        groups = oc.group_norm(labels, ord=ord)(tree)
        return oc.global_norm(tree, ord=ord), oc.leaf_norm(tree, ord=ord), groups, oc.block_rms(tree)

    step = sharded(norms, mesh_of(mesh_name), (specs,), P())
    for scale in (1.0, 1e-25, 1e30, 0.0):
        scaled = jax.tree.map(lambda x, scale=scale: scale * x, updates)
        close(step(scaled), norms(scaled), rtol=1e-6)


@by_mesh
@by_order
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_bad_entry_of_one_shard_is_seen_by_all(mesh_name, ord, bad):
    """One NaN or inf in any shard makes the norm infinite or NaN on every device."""
    updates, specs = spread(mesh_name)
    step = sharded(lambda tree: oc.global_norm(tree, ord=ord), mesh_of(mesh_name), (specs,), P())
    for row, column in [(0, 0), (3, 5), (7, 7)]:
        norm = step(updates | {"a": updates["a"].at[row, column].set(bad)})
        assert jnp.isinf(norm) if np.isinf(bad) else not jnp.isfinite(norm)


@by_order
def test_derivative_in_shard_map(ord):
    """The derivative through a sharded norm is that of one device, where all entries are alike and at zero too."""
    updates, specs = spread("8")
    step = sharded(lambda tree: oc.global_norm(tree, ord=ord), mesh_of("8"), (specs,), P())
    for tree in (updates, jax.tree.map(jnp.ones_like, updates)):
        close(jax.grad(step)(tree), jax.grad(functools.partial(oc.global_norm, ord=ord))(tree), rtol=1e-5)
    zeros = jax.tree.map(jnp.zeros_like, updates)
    chex.assert_trees_all_equal(jax.grad(step)(zeros), zeros)


UNITS = {
    "along_the_unit": (P("x"), "x", P()),
    "across_units": (P(None, "x"), (), P(None, "x")),
    "both": (P("x", "y"), "x", P(None, "y")),
    "over_two_axes": (P(("x", "y")), ("x", "y"), P()),
    "not_at_all": (P(), "x", P()),
}


@pytest.mark.parametrize("layout", UNITS)
@by_order
def test_unit_norms_in_shard_map(layout, ord):
    """With `axis_name` for the axes that split a unit, unit norms are those of one device, however they are sharded."""
    spec, axis_name, out = UNITS[layout]
    updates = jnp.asarray(np.random.default_rng(1).normal(size=(16, 8)), jnp.float32)
    step = sharded(lambda x: oc.unit_norm(x, ord=ord, axis_name=axis_name), mesh_of("4x2"), (spec,), out)
    columns = 10.0 ** jnp.array([0, 0, -25, 25, 0, 30, -20, 1])
    for scaled in (updates, updates * columns):
        close(step(scaled), oc.unit_norm(scaled, ord=ord), rtol=1e-6)


@pytest.mark.parametrize("check_vma", [True, False], ids=["typed", "untyped"])
def test_shards_of_one_row_are_not_taken_for_vectors(check_vma):
    """Where each device has one row of a matrix, axes by rank give its columns or an error, not one norm."""
    updates = jnp.arange(64.0).reshape(8, 8) + 1
    step = lambda **options: sharded(
        functools.partial(oc.unit_norm, axis_name="x", **options), mesh_of("8"), (P("x"),), P(), check_vma=check_vma
    )
    close(step(axis=0)(updates), oc.unit_norm(updates))
    try:
        norms = step()(updates)
    except ValueError as error:
        assert "axis" in str(error)
    else:
        close(norms, oc.unit_norm(updates))


def test_prefix_tree_of_axis_names():
    """Leaves that are split in different ways take a prefix tree of names, for units and for block RMS."""
    updates = {"rows": jnp.arange(128.0).reshape(16, 8), "columns": {"w": jnp.ones((8, 16)), "v": jnp.ones((8, 24))}}
    specs = {"rows": P("x"), "columns": {"w": P(None, "x"), "v": P(None, "x")}}
    outs = {"rows": P(), "columns": {"w": P(None, "x"), "v": P(None, "x")}}
    names = {"rows": "x", "columns": ()}
    step = sharded(lambda tree: oc.unit_norm(tree, axis_name=names), mesh_of("8"), (specs,), outs)
    close(step(updates), oc.unit_norm(updates))
    step = sharded(lambda tree: oc.block_rms(tree, axis=0, axis_name=names), mesh_of("8"), (specs,), outs)
    close(step(updates), oc.block_rms(updates, axis=0))


@pytest.mark.parametrize("check_vma", [True, False])
def test_one_device_alone_holds_extreme_units(check_vma):
    """All devices take the second read, in which they sum together, where the units of one need it."""
    updates = {"cut": np.ones((16, 4), np.float32), "whole": np.ones((4, 16), np.float32)}
    updates["whole"][:, :2] = 1e30
    norm = functools.partial(oc.unit_norm, axis=0, axis_name={"cut": "data", "whole": ()})
    specs = {"cut": P("data"), "whole": P(None, "data")}
    out_specs = {**specs, "cut": P()}
    inside = jax.shard_map(norm, mesh=trees.mesh(data=8), in_specs=(specs,), out_specs=out_specs, check_vma=check_vma)
    norms = jax.jit(inside)(updates)
    np.testing.assert_allclose(norms["cut"], np.full((1, 4), 4.0), rtol=1e-6)
    np.testing.assert_allclose(norms["whole"], [[2e30, 2e30, *[2.0] * 14]], rtol=1e-6)


def test_missing_axis_name_of_units_is_an_error():
    """Unit norms of a leaf that varies raise without `axis_name` and name the leaf; those of whole leaves do not."""
    updates = {"w": jnp.ones((8, 8)), "whole": jnp.ones((2, 3))}
    specs = {"w": P("x"), "whole": P()}
    for norm in (oc.unit_norm, functools.partial(oc.block_rms, axis=0)):
        with pytest.raises(ValueError, match=r"axis_name is missing.*\['w'\].*'x'"):
            sharded(norm, mesh_of("8"), (specs,), {"w": P(), "whole": P()})(updates)
        close(sharded(norm, mesh_of("8"), (P(),), P())(updates), norm(updates))


WHOLE_NORMS = {
    "global_norm": oc.global_norm,
    "leaf_norm": oc.leaf_norm,
    "block_rms": oc.block_rms,
    "group_norm": lambda tree, **options: oc.group_norm("all", **options)(tree),
    "unit_norm": oc.unit_norm,
}


@pytest.mark.parametrize("norm", WHOLE_NORMS.values(), ids=WHOLE_NORMS)
def test_untyped_shards_need_an_axis_name(norm):
    """With `check_vma=False` a missing `axis_name` is an error, and with it the norm is that of one device."""
    updates = {"w": jnp.arange(128.0).reshape(16, 8)}
    with pytest.raises(ValueError, match="axis_name is missing"):
        sharded(norm, mesh_of("8"), (P("x"),), P(), check_vma=False)(updates)
    step = sharded(functools.partial(norm, axis_name="x"), mesh_of("8"), (P("x"),), P(), check_vma=False)
    for scale in (1.0, 1e-25, 1e25):
        close(step({"w": scale * updates["w"]}), norm({"w": scale * updates["w"]}), rtol=1e-6)
    apart = sharded(functools.partial(norm, axis_name=()), mesh_of("8"), (P(),), P(), check_vma=False)
    close(apart(updates), norm(updates))


@by_order
def test_untyped_shards_of_every_order(ord):
    """Types that do not speak do not matter once `axis_name` is given, a NaN in one shard included."""
    updates, specs = spread("8")
    names = {"a": "x", "b": "x", "whole": (), "scale": ()}
    norm = lambda tree: oc.global_norm(tree, ord=ord, axis_name=names)
    step = sharded(norm, mesh_of("8"), (specs,), P(), check_vma=False)
    close(step(updates), oc.global_norm(updates, ord=ord), rtol=1e-6)
    assert not jnp.isfinite(step(updates | {"a": updates["a"].at[5, 5].set(jnp.nan)}))


@pytest.mark.parametrize("norm", WHOLE_NORMS.values(), ids=WHOLE_NORMS)
def test_pmap_needs_an_axis_name(norm):
    """In `pmap` a missing `axis_name` is an error, and with it the norm is that of all devices together."""
    updates, devices = jnp.arange(64.0).reshape(8, 8), trees.mesh(x=8).devices.tolist()
    with pytest.raises(ValueError, match="axis_name is missing"):
        jax.pmap(norm, axis_name="x", devices=devices)({"w": updates})
    norms = jax.pmap(functools.partial(norm, axis_name="x"), axis_name="x", devices=devices)({"w": updates})
    expected = jax.tree.leaves(norm({"w": updates.reshape(64)}))[0]
    close(jax.tree.leaves(norms)[0].ravel(), jnp.broadcast_to(expected, 8).ravel())


def test_unknown_axis_name_is_an_error():
    """A name that is not an axis of the mesh is an error inside, and is passed over where there is no mesh."""
    updates = jnp.ones((8, 8))
    for norm in (oc.global_norm, oc.leaf_norm, oc.unit_norm, oc.block_rms, oc.group_norm("all", axis_name="z")):
        named = norm if norm not in WHOLE_NORMS.values() else functools.partial(norm, axis_name="z")
        with pytest.raises(ValueError, match=r"axis_name has \['z'\].*\('x',\)"):
            sharded(named, mesh_of("8"), (P("x"),), P())(updates)
        close(named(updates), jax.tree.map(jnp.asarray, named(updates)))


def test_partly_manual_mesh():
    """Where only some mesh axes are manual, the others are left to the compiler."""
    updates = jnp.arange(64.0).reshape(8, 8)
    step = sharded(oc.global_norm, mesh_of("4x2"), (P("x"),), P(), axis_names={"x"})
    placed = jax.device_put(updates, NamedSharding(mesh_of("4x2"), P("x", "y")))
    close(step(placed), oc.global_norm(updates))


def test_nested_shard_map():
    """Inside a `shard_map` over one axis within one over another, norms sum over both."""
    updates = jax.random.normal(jax.random.key(0), (8, 6))
    inner = lambda x: jax.shard_map(oc.global_norm, in_specs=P(None, "y"), out_specs=P(), axis_names={"y"})(x)
    step = sharded(inner, mesh_of("4x2"), (P("x"),), P(), axis_names={"x"})
    close(step(updates), reference.p_norm(updates, 2), rtol=1e-6)


# Clips, sharded


def states_agree(actual, expected):
    """Step, norm, threshold, scale and clip rate of two states."""
    chex.assert_trees_all_equal_shapes_and_dtypes(actual, expected)
    chex.assert_trees_all_close(actual, expected, rtol=1e-6)


@by_mesh
@pytest.mark.parametrize("init_inside", [True, False], ids=["init_inside", "init_outside"])
def test_global_clip_in_shard_map(mesh_name, init_inside):
    """Updates and state are those of one device over several steps, with `init` inside or outside."""
    updates, specs = spread(mesh_name)
    tx = oc.clip_by_norm(oc.global_norm, 5.0)
    mesh = mesh_of(mesh_name)
    state = sharded(tx.init, mesh, (specs,), P())(updates) if init_inside else tx.init(updates)
    states_agree(state, tx.init(updates))
    step = sharded(tx.update, mesh, (specs, P()), (specs, P()))
    expected_state = tx.init(updates)
    for scale in (1.0, 0.01, 1e25):
        scaled = jax.tree.map(lambda x, scale=scale: scale * x, updates)
        clipped, state = step(scaled, state)
        expected, expected_state = tx.update(scaled, expected_state)
        close(clipped, expected, rtol=1e-6)
        states_agree(state, expected_state)


@by_mesh
def test_leaf_clip_in_shard_map(mesh_name):
    """Norm, threshold, scale and clip rate over leaves, some sharded and some not, are those of one device."""
    updates, specs = spread(mesh_name)
    tx = oc.clip_by_leaf_norm({"a": 2.0, "b": 100.0, "whole": 0.5, "scale": None})
    step = sharded(lambda tree: tx.update(tree, tx.init(tree)), mesh_of(mesh_name), (specs,), (specs, P()))
    expected, expected_state = tx.update(updates, tx.init(updates))
    clipped, state = step(updates)
    close(clipped, expected, rtol=1e-6)
    states_agree(state, expected_state)


UNIT_CLIPS = {
    "clip_by_unit_norm": lambda names: oc.clip_by_unit_norm(2.5, axis_name=names),
    "adaptive_grad_clip": lambda names: oc.adaptive_grad_clip(0.9, axis_name=names),
    "clip_by_block_rms": lambda names: oc.clip_by_block_rms(0.8, axis=0, axis_name=names),
}


@pytest.mark.parametrize("clip", UNIT_CLIPS.values(), ids=UNIT_CLIPS)
def test_unit_clip_in_shard_map(clip):
    """Where some leaves are split along units, some across, and others not at all, the state is that of one device."""
    random = np.random.default_rng(0)
    shapes = {"along": (8, 6), "across": (3, 8), "both": (8, 8), "whole": (4, 5)}
    updates = {name: jnp.asarray(random.normal(size=shape), jnp.float32) for name, shape in shapes.items()}
    params = {name: jnp.asarray(random.normal(size=shape), jnp.float32) for name, shape in shapes.items()}
    specs = {"along": P("x"), "across": P(None, "y"), "both": P("x", "y"), "whole": P()}
    tx = clip({"along": "x", "across": (), "both": ("x",), "whole": None})
    alone = clip(None)
    expected, expected_state = alone.update(updates, alone.init(params), params)
    update = lambda tree, state, params: tx.update(tree, state, params)
    mesh = mesh_of("4x2")
    for state in (tx.init(params), sharded(tx.init, mesh, (specs,), P())(params)):
        clipped, state = sharded(update, mesh, (specs, P(), specs), (specs, P()))(updates, state, params)
        close(clipped, expected, rtol=1e-6)
        states_agree(state, expected_state)
    assert 0 < state.clip_rate < 1
    with pytest.raises(ValueError, match="axis_name is missing"):
        sharded(alone.update, mesh, (specs, P(), specs), (specs, P()))(updates, alone.init(params), params)


def test_bad_shard_in_a_clip():
    """A NaN in one shard makes the block NaN on all devices, and leaves other blocks alone."""
    updates, specs = spread("8")
    updates["a"] = updates["a"].at[6, 1].set(jnp.nan)
    tx = oc.clip_by_leaf_norm(1.0)
    clipped, state = sharded(lambda u: tx.update(u, tx.init(u)), mesh_of("8"), (specs,), (specs, P()))(updates)
    assert jnp.isnan(clipped["a"]).all() and not jnp.isfinite(state.norm)
    expected, _ = tx.update(updates, tx.init(updates))
    close({name: clipped[name] for name in ("b", "whole", "scale")}, {n: expected[n] for n in ("b", "whole", "scale")})

"""The norms by themselves: values, range, dtypes, derivatives, and what is a block, also for norms of the user."""

import enum
import functools
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
import trees
from jax.test_util import check_grads
from trees import step

import optax_clip as oc
from optax_clip.norms import Blocks

ORDERS = [1, 2, 3, math.inf]
by_order = pytest.mark.parametrize("ord", [pytest.param(1.5, marks=pytest.mark.full), *ORDERS], ids=str)
QUICK = {(2, "bfloat16"), (math.inf, "float16"), (2, "complex64"), (3, "complex64")}  # beside f32
CLOSE = trees.tolerance(jnp.float32)
SHAPES = {"bias": (5,), "conv": (2, 2, 3, 4), "dense": (6, 5), "heads": (4, 2, 3), "scale": ()}
GROUPS = {"bias": "a", "conv": "b", "dense": "a", "heads": None, "scale": "b"}


def sample(seed: int = 0, dtype=jnp.float32, shapes=SHAPES) -> dict:
    """Leaves of rank 0 to 4."""
    random = np.random.default_rng(seed)
    return {name: jnp.asarray(random.normal(size=shape), dtype) for name, shape in shapes.items()}


def close(actual, expected, rtol=CLOSE):
    chex.assert_trees_all_close(actual, expected, rtol=rtol, atol=0.0)


@functools.cache
def whole(ord):
    """The norms of one leaf as a tree, a leaf and a group, in one program."""
    group = oc.group_norm("all", ord=ord)
    return jax.jit(lambda x: jnp.stack([oc.global_norm([x], ord=ord), oc.leaf_norm(x, ord=ord), group(x).norms["all"]]))


@functools.cache
def units(ord):
    """The norms of the columns of a matrix."""
    return jax.jit(functools.partial(oc.unit_norm, ord=ord, axis=0))


# Values


@functools.cache
def all_norms(ord):
    """Every norm of a tree, in one program."""

    def norms(updates):
        groups = oc.group_norm(GROUPS, ord=ord)(updates).norms
        return oc.global_norm(updates, ord=ord), oc.leaf_norm(updates, ord=ord), oc.unit_norm(updates, ord=ord), groups

    return norms


@pytest.mark.parametrize(
    ("ord", "dtype"),
    [
        (ord, dtype)
        if dtype == "float32" or (ord, dtype) in QUICK
        else pytest.param(ord, dtype, marks=pytest.mark.full)
        for ord in ORDERS
        for dtype in ("float32", "bfloat16", "float16", "complex64")
    ],
)
def test_values(ord, dtype):
    """Every norm is the sum of powers over its block, for real and complex leaves, inside of jit and outside."""
    updates = sample(0, jnp.float32 if dtype == "complex64" else dtype)
    if dtype == "complex64":
        updates = jax.tree.map(jax.lax.complex, updates, sample(1))
    p_norm = functools.partial(reference.p_norm, p=ord)
    members = [{name: leaf for name, leaf in updates.items() if GROUPS[name] == label} for label in "ab"]
    expected = (
        p_norm(reference.flat(updates)),
        {name: p_norm(leaf) for name, leaf in updates.items()},
        {name: p_norm(leaf, axes=reference.axes_by_rank(leaf.shape)) for name, leaf in updates.items()},
        {label: p_norm(reference.flat(group)) for label, group in zip("ab", members)},
    )
    actual = jax.jit(all_norms(ord))(updates)
    close(actual, jax.tree.map(lambda n, like: np.reshape(n, like.shape), expected, actual))
    assert {leaf.dtype for leaf in jax.tree.leaves(actual)} == {np.dtype("float32")}
    if dtype == "float32" and ord == 2:
        close(all_norms(ord)(updates), actual)


def test_the_norm_of_leaves_of_several_dtypes():
    """Leaves of f16, bf16, f8 and f32 count together, each with the numbers that it holds."""
    updates = trees.mixed()
    close(jax.jit(oc.global_norm)(updates), np.float32(trees.norm64(updates)))


def test_root_mean_square():
    """Block RMS divides by the number of entries, of a leaf or of a unit, and is 0 where there are none."""
    updates = sample(0) | {"empty": jnp.zeros((0, 3))}

    @jax.jit
    def norms(updates):
        conv = oc.block_rms(updates["conv"], axis=(0, -1))
        return oc.block_rms(updates), conv, oc.block_rms(updates["empty"], axis=0)

    expected = {name: reference.rms(leaf) for name, leaf in sample(0).items()} | {"empty": np.float64(0)}
    close(norms(updates), (expected, reference.rms(updates["conv"], (0, -1)), np.zeros((1, 3))))


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
    norms = jax.eval_shape(oc.unit_norm, [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes])
    assert [norm.shape for norm in norms] == list(shapes.values())


def test_a_rank_that_no_rule_knows_is_an_error():
    """A leaf of rank 6 has no axes by rank, and the message names it."""
    with pytest.raises(ValueError, match=r"axis is missing: the leaf \['w'\].*6 dimensions"):
        oc.unit_norm({"w": jnp.ones((2,) * 6)})


def test_a_rule_of_axes():
    """A rule sees the path and the array of each leaf that is counted. Where it returns None the leaf is left alone."""
    seen = []

    def rule(path, leaf):
        seen.append((jax.tree_util.keystr(path), leaf.shape))
        return None if leaf.ndim < 2 else -1

    updates = {"layers": [jnp.ones((2, 3)), {"w": jnp.ones(4)}], "none": None, "matrix": jnp.ones((5, 6))}
    for norm in (oc.unit_norm, oc.block_rms):
        norms = jax.eval_shape(functools.partial(norm, axis=rule), updates)
        assert jax.tree.map(lambda x: x.shape, norms) == {
            "layers": [(2, 1), {"w": None}],
            "none": None,
            "matrix": (5, 1),
        }
    assert seen == [("['layers'][0]", (2, 3)), ("['layers'][1]['w']", (4,)), ("['matrix']", (5, 6))] * 2


def test_axes_that_do_not_fit_are_an_error():
    """An axis out of range, one that comes twice, or a float raises."""
    with pytest.raises(ValueError, match=r"axis .*\['w'\] of shape \(2, 3\)"):
        oc.unit_norm({"w": jnp.ones((2, 3))}, axis=2)
    with pytest.raises(ValueError, match="different"):
        oc.block_rms(jnp.ones((2, 3)), axis=(0, -2))
    with pytest.raises(TypeError, match=r"^axis must be"):
        oc.unit_norm(jnp.ones((2, 3)), axis=0.5)


@pytest.mark.parametrize("ord", [0.5, 0, -1, math.nan])
def test_orders_below_1_are_refused(ord):
    """What has no triangle inequality is no norm."""
    for norm in (oc.global_norm, oc.leaf_norm, oc.unit_norm):
        with pytest.raises(ValueError, match=r"^ord must be >= 1"):
            norm(jnp.ones(2), ord=ord)
    with pytest.raises(ValueError, match=r"^ord must be >= 1"):
        oc.group_norm("all", ord=ord)


def test_leaves_without_entries():
    """A leaf without entries has the norm 0 and adds nothing to a block, and so has a tree without leaves."""
    empty = jnp.zeros((0, 2))

    def norms(leaf):
        return {
            ord: (
                oc.global_norm(leaf, ord=ord),
                oc.leaf_norm(leaf, ord=ord),
                oc.unit_norm(leaf, ord=ord),
                oc.global_norm([empty, leaf], ord=ord) - oc.global_norm(leaf, ord=ord),
            )
            for ord in ORDERS
        }

    assert not any(np.any(norm) for norm in jax.tree.leaves(jax.jit(norms)(empty)))
    chex.assert_shape(jax.eval_shape(oc.unit_norm, empty), (1, 2))
    chex.assert_trees_all_equal(
        [both[3] for both in jax.jit(norms)(jnp.array([3.0, 4.0])).values()], [jnp.float32(0)] * 4
    )
    assert oc.global_norm({}) == 0 and oc.leaf_norm({}) == {} and oc.group_norm({})({}).norms == {}


# Range


@pytest.mark.parametrize("ord", [1, 2, pytest.param(3, marks=pytest.mark.full), math.inf], ids=str)
def test_norms_of_whole_leaves_are_exact_over_the_range_of_f32(ord):
    """Huge, tiny and mixed entries, whose squares leave the range of f32, are measured to 1e-6."""
    for values in (
        [1e-26] * 3,
        [1e-26, 1e-30, 1e-34],
        [3e-20, 4e-20, 1e-22],
        [1e-19, 1.0, 1e-25],
        [1e18, 2e18, 3e18],
        [1.8e19, 1.9e19, 1e-30],
        [1e25, 1e-25, 1.0],
        [1e38, 1e38, 1e38],
        [3e38, 1e30, 0.0],
    ):
        updates = np.float32(values)
        close(whole(ord)(updates), np.full(3, reference.p_norm(updates, ord)), rtol=1e-6)


def test_norms_of_units_are_exact_over_the_range_of_squares_in_f32():
    """Units are exact to 1e-6 from 1e-18 to 1.8e19, inf above, and next to 0 far below, whatever is beside them."""
    columns = np.float32(np.outer([0.6, 0.8], [1e-18, 1e-10, 1.0, 1e10, 1.8e19, 2e19, 1e38, 1e-30]))
    norms = np.ravel(units(2)(columns))
    close(norms[:5], np.ravel(reference.p_norm(columns, 2, (0,)))[:5], rtol=1e-6)
    assert np.isposinf(norms[5:7]).all() and norms[7] <= 1e-22


def test_a_leaf_that_is_one_unit_is_measured_as_a_whole():
    """The norm of a vector has the range of a leaf."""
    updates = {"bias": jnp.full(4, 1e30), "row": jnp.full((1, 4), 1e-25)}
    close(jax.jit(oc.unit_norm)(updates), {"bias": np.float32(2e30), "row": np.float32(2e-25)}, rtol=1e-6)


def test_blocks_of_every_magnitude_beside_one_another():
    """Each block of a tree is exact, however far the others are from it."""
    updates = {str(k): jnp.full((2, 3), 10.0**k) for k in (-26, -20, -10, 0, 10, 19, 30, 37)}
    norms = jax.jit(lambda updates: (oc.leaf_norm(updates), oc.leaf_norm(updates, ord=3), oc.global_norm(updates)))
    second, third = ({name: reference.p_norm(leaf, p) for name, leaf in updates.items()} for p in (2, 3))
    close(norms(updates), (second, third, second["37"]), rtol=1e-6)


@by_order
def test_inf_and_nan_propagate(ord):
    """One infinite entry makes the norm inf, one NaN makes it inf or NaN, wherever it stands."""
    for place in range(3):
        values = np.array([1.0, 1e30, 1e-30], np.float32)
        values[place] = np.nan
        assert not np.isfinite(whole(ord)(values)).any()
        values[place] = -np.inf
        assert (np.asarray(whole(ord)(values)) == np.inf).all()
    assert not np.isfinite(whole(ord)(np.float32([np.nan, np.inf, 1.0]))).any()
    columns = np.float32([[1.0, np.nan, -np.inf, 2.0], [1.0, 0.0, 0.0, 2.0]])
    np.testing.assert_array_equal(np.isfinite(units(ord)(columns)), [[True, False, False, True]])


def test_overflow_is_inf():
    """A norm above the largest f32 is inf."""
    values = np.full(3, 3e38, np.float32)
    assert all(np.isposinf(whole(ord)(values)).all() for ord in (1, 2, 3))
    assert (np.asarray(whole(math.inf)(values)) == np.float32(3e38)).all()


@pytest.mark.full
@pytest.mark.parametrize("ord", ORDERS)
def test_the_norm_is_known_to_the_compiler(ord):
    """Values that are constants of the compiled program have the norm that they have as arguments."""
    for value in (0.0, 1.0, 1e-20, 1e25, 1e35):
        constant = np.full(5, value, np.float32)
        known = jax.jit(lambda constant=constant: whole(ord)(jnp.asarray(constant)))()
        close(known, np.full(3, reference.p_norm(constant, ord)), rtol=1e-6)


# Dtypes and leaves


def test_norms_are_f64_where_a_leaf_of_the_block_is():
    """Other blocks stay f32, and an f64 norm has the precision of f64."""
    with jax.enable_x64(True):
        updates = {"narrow": jnp.ones((2, 3), jnp.float32), "wide": jnp.ones((2, 3), jnp.float64)}
        for ord in (1, 2, 3, math.inf):
            for norms in (oc.leaf_norm, oc.unit_norm):
                shapes = jax.eval_shape(functools.partial(norms, ord=ord), updates)
                assert (shapes["narrow"].dtype, shapes["wide"].dtype) == (jnp.float32, jnp.float64)
            assert jax.eval_shape(functools.partial(oc.global_norm, ord=ord), updates).dtype == jnp.float64
        groups = jax.eval_shape(oc.group_norm({"narrow": "a", "wide": "b"}), updates)
        assert {label: norm.dtype for label, norm in groups.norms.items()} == {"a": jnp.float32, "b": jnp.float64}
        close(oc.leaf_norm(jnp.array([1 + 1e-12])), np.array(1 + 1e-12), rtol=1e-15)
        close(oc.unit_norm(jnp.full((4, 2), 1 + 1e-12)), np.full((1, 2), 2 + 2e-12), rtol=1e-15)


def test_odd_leaves_have_no_norm():
    """Integers, booleans, keys, functions and float0 are not counted: None in the tree, nothing in the sum."""
    updates = trees.odd()
    for tree in (oc.leaf_norm(updates), oc.unit_norm(updates), oc.block_rms(updates)):
        assert [name for name, leaf in tree.items() if isinstance(leaf, jax.Array)] == ["weight"]
    close((oc.global_norm(updates), oc.group_norm("all")(updates).norms["all"]), (5.0, 5.0))
    close(oc.global_norm({"python": 3.0, "numpy": np.float32(4.0), "int": 7}), 5.0)


# Groups


def test_labels_are_a_prefix_tree_or_a_function():
    """Labels are a prefix tree of hashable values, or a function of the updates that returns one."""
    updates = {"body": {"w": jnp.array([3.0]), "b": jnp.array([4.0])}, "head": jnp.array([7.0])}
    for labels in (
        {"body": 0, "head": 1},
        {"body": "x", "head": "y"},
        lambda tree: {"body": 0, "head": 1},
    ):
        blocks = oc.group_norm(labels)(updates)
        first, second = (labels(updates) if callable(labels) else labels).values()
        close(blocks.norms, {first: 5.0, second: 7.0})
        assert blocks.index == (first, first, second)


def test_labels_need_not_sort():
    """Members of an enumeration, or strings beside numbers, are labels too."""
    kind = enum.Enum("kind", ["matrix", "vector"])
    updates = {"w": jnp.array([3.0, 4.0]), "b": jnp.array([3.0, 4.0])}
    for first, second in (list(kind), ("matrix", 3)):
        tx = oc.clip_by_group_norm({first: 1.0, second: None}, {"w": first, "b": second})
        close(step(tx, updates)[0], {"w": jnp.array([0.6, 0.8]), "b": jnp.array([3.0, 4.0])})


def test_a_label_of_none_leaves_leaves_alone():
    """They are in no group, and their numbers do not count."""
    updates = {"body": {"w": jnp.array([3.0]), "b": jnp.array([jnp.nan])}, "head": jnp.array([7.0])}
    blocks = oc.group_norm({"body": {"w": "x", "b": None}, "head": "x"})(updates)
    close(blocks.norms, {"x": 58.0**0.5})
    assert blocks.index == (None, "x", "x")  # b comes before w


def test_labels_that_do_not_fit_are_an_error():
    """A tree of other structure, or a label that cannot be a key, raises and names the place."""
    updates = {"a": jnp.ones(2), "b": jnp.ones(2)}
    with pytest.raises(ValueError, match=r"labels must be .*\['b'\]"):
        oc.group_norm({"a": 1})(updates)
    with pytest.raises(TypeError, match=r"labels must .*hashable"):
        oc.group_norm(lambda tree: jax.tree.map(jnp.asarray, {"a": 1, "b": 2}))(updates)


def test_a_function_of_labels_sees_updates_alone():
    """It is not called before there are some."""
    labels = lambda updates: {"w": "large" if updates["w"].size > 1 else "small"}
    tx = oc.clip_by_group_norm({"large": 1.0, "small": None}, labels)
    updates, _ = step(tx, {"w": jnp.array([3.0, 4.0])})
    close(updates, {"w": jnp.array([0.6, 0.8])})


# Norms of the user


UPDATES = {"x": jnp.array([3.0]), "y": jnp.array([4.0]), "z": jnp.array([12.0])}
BOTH = ("x", "y")


def of_both(updates):
    """The norm of x and y together, and that of z."""
    return Blocks({"both": jnp.hypot(updates["x"], updates["y"])[0], "z": updates["z"][0]}, ("both", "both", "z"))


def of_subtrees(updates):
    """A scalar for each subtree."""
    return {name: jnp.sqrt(sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(tree))) for name, tree in updates.items()}


@pytest.mark.parametrize("norm", [of_both, jax.jit(of_both)], ids=["plain", "jitted"])
def test_a_norm_of_blocks(norm):
    """A function that returns `Blocks` is a norm, compiled or not. In the state each block counts once."""
    clipped, state = step(oc.clip_by_norm(norm, 2.5), UPDATES)
    close(clipped, {"x": jnp.array([1.5]), "y": jnp.array([2.0]), "z": jnp.array([2.5])})
    close((state.norm, state.threshold), (13.0, 2.5))
    close((state.clip_scale, state.clipped), (np.mean([0.5, 2.5 / 12]), 1.0))


@pytest.mark.parametrize("norm", [of_subtrees, jax.jit(of_subtrees)], ids=["plain", "jitted"])
def test_a_norm_with_a_scalar_for_a_subtree(norm):
    """Every entry of the prefix tree is one block, for all leaves below it."""
    updates = {"body": {"w": jnp.array([3.0, 0.0]), "b": jnp.array([4.0])}, "head": [jnp.array([7.0])]}
    clipped, state = step(oc.clip_by_norm(norm, {"body": 2.5, "head": None}), updates)
    close(clipped, {"body": {"w": jnp.array([1.5, 0.0]), "b": jnp.array([2.0])}, "head": [jnp.array([7.0])]})
    close((state.norm, state.clipped), (74.0**0.5, 0.5))


def test_equal_numbers_are_not_one_block():
    """Blocks go by their places in the tree: a constant, or one array, for two leaves is two blocks."""
    updates = {"x": jnp.array([3.0]), "y": jnp.array([4.0])}
    for norm in (lambda u: {"x": 2.0, "y": 2.0}, lambda u: dict.fromkeys(u, jnp.float32(2.0))):
        _, state = step(oc.clip_by_norm(norm, 1.0), updates)
        close(state.norm, 8.0**0.5)
    one = jax.jit(lambda u: dict.fromkeys(u, oc.global_norm(u)))
    _, state = step(oc.clip_by_norm(one, 1.0), updates)
    close(state.norm, 50.0**0.5)


def test_a_norm_may_leave_leaves_alone_or_count():
    """None as an entry leaves what is below it alone, and a norm may be an integer."""
    updates = {"x": jnp.full(4, 2.0), "y": jnp.array([jnp.nan, 1.0])}
    clipped, state = step(oc.clip_by_norm(lambda u: {"x": jnp.count_nonzero(u["x"]), "y": None}, 1.0), updates)
    close((clipped["x"], state.norm), (jnp.full(4, 0.5), 4.0))
    np.testing.assert_array_equal(clipped["y"], updates["y"])


def test_a_norm_an_entry():
    """An array that broadcasts against its leaf has one block for each entry."""
    updates = {"w": jnp.array([[3.0, -1.0], [0.5, 2.0]])}
    clipped, state = step(oc.clip_by_norm(lambda u: jax.tree.map(jnp.abs, u), 1.0), updates)
    close(clipped, {"w": jnp.array([[1.0, -1.0], [0.5, 1.0]])})
    close((state.norm, state.clipped), (14.25**0.5, 0.5))


@pytest.mark.parametrize(
    "norm",
    [
        lambda u: {"x": jnp.float32(1.0)},
        lambda u: {"x": jnp.ones(7), "y": jnp.float32(1.0)},
        lambda u: Blocks({"a": jnp.float32(1.0)}, ("a",)),
        lambda u: Blocks({"a": jnp.float32(1.0)}, ("a", "b")),
    ],
    ids=["other_tree", "other_shape", "too_few", "unknown_key"],
)
def test_norms_that_do_not_fit_are_an_error(norm):
    """A norm of another structure, of a shape that does not broadcast, or of keys that it lacks raises."""
    with pytest.raises(ValueError, match=r"^(the result of )?norm must"):
        step(oc.clip_by_norm(norm, 1.0), {"x": jnp.ones(2), "y": jnp.ones(3)})


# Derivatives


@functools.cache
def slope(ord):
    """The derivative of the norms of a vector: as a tree, leaf and group, and as a column."""
    return jax.jit(jax.grad(lambda x: whole(ord)(x).sum() + units(ord)(x[:, None]).sum()))


@by_order
def test_the_derivative_is_right(ord):
    """It is (|x| / norm)^(ord - 1) and the sign of x, at 1 and far away, and 0 at 0, where the norm itself has none."""
    x = np.float32([0.7, -1.3, 2.1, 0.4])
    norm = reference.p_norm(x, ord)
    with np.errstate(under="ignore"):
        expected = np.sign(x) * (abs(x) == norm if ord == math.inf else (abs(x) / norm) ** (ord - 1))
    for scale in np.float32([1.0, 1e-15, 1e15]):
        chex.assert_trees_all_close(slope(ord)(scale * x), 4 * expected, rtol=1e-5)
    chex.assert_trees_all_equal(slope(ord)(np.zeros(4, np.float32)), np.zeros(4, np.float32))


def test_the_derivative_of_complex_norms_at_zero_is_zero():
    """As that of real ones is."""
    chex.assert_trees_all_equal(slope(2)(np.zeros(4, np.complex64)), np.zeros(4, np.complex64))


@pytest.mark.parametrize("ord", [2, *(pytest.param(ord, marks=pytest.mark.full) for ord in (1, 1.5, 3, math.inf))])
def test_the_derivative_forward_is_that_backward(ord):
    """Both modes agree with finite differences."""
    x = jnp.array([0.7, -1.3, 2.1, 0.4])
    check_grads(whole(ord), (x,), order=1, modes=("fwd", "rev"), atol=1e-2, rtol=1e-2)


def test_the_derivative_of_every_block():
    """Derivatives of many blocks at once are x / norm, and those of a root mean square; zeros among them have 0."""
    updates = sample() | {"heads": jnp.zeros((4, 2, 3))}

    @jax.jit
    @jax.grad
    def slope(tree):
        return sum(map(jnp.sum, jax.tree.leaves(oc.leaf_norm(tree)))) + oc.block_rms(tree)["conv"]

    gradient = slope(updates)
    expected = {name: reference.wide(x) / max(reference.p_norm(x), 1e-30) for name, x in updates.items()}
    conv = reference.wide(updates["conv"])
    expected["conv"] = expected["conv"] + conv / reference.rms(conv) / conv.size
    close(gradient, expected, rtol=1e-5)


def test_the_derivative_of_a_norm_that_is_not_finite_is_zero():
    """A step that is skipped contributes nothing."""
    for bad in (np.nan, np.inf):
        gradient = jax.jit(jax.grad(oc.global_norm))(jnp.array([1.0, bad, 2.0]))
        chex.assert_trees_all_equal(gradient, jnp.zeros(3))


def test_complex_norms_are_f64_where_both_parts_are():
    """Leaves of complex128 are measured and clipped in f64."""
    with jax.enable_x64(True):
        z = jnp.array([3e60 + 4e60j])
        for ord in (1, 2, 3, math.inf):
            norm = oc.global_norm(z, ord=ord)
            assert norm.dtype == jnp.float64
            np.testing.assert_allclose(norm, 5e60, rtol=1e-14)
        tx = oc.clip_by_leaf_norm(1.0)
        np.testing.assert_allclose(tx.update(z, tx.init(z))[0], [0.6 + 0.8j], rtol=1e-14)

"""What every clip keeps where numbers are zero, tiny, huge or not finite, and where leaves are odd."""

import functools

import chex
import clips
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
import trees

import optax_clip as oc


def over(cases, name="case"):
    """Runs a test for each of these clips."""
    return pytest.mark.parametrize(name, cases, ids=lambda case: case.name)


every = over(clips.CLIPS)
by_norm = over(clips.NORM_CLIPS)
keeping_small = over(clips.SHRINKING)
# `clip_by_value(None, t)` bounds entries from above only: t = 0 leaves negative ones, and t < 0 is a bound like others.
bounding_size = over([case for case in clips.CLIPS if case.name != "clip_by_value"])
by_leaf_or_unit = over([case for case in clips.CLIPS if case.scope in ("entry", "leaf", "unit")])

SMALLEST = float(jnp.finfo(jnp.float32).smallest_normal)  # below, products are 0 on processors that flush
SHAPES = {
    "bfloat16": (5,),
    "complex64": (3, 2),
    "float16": (4, 2, 3),
    "float32": (2, 2, 3, 4),
    "float8_e4m3fn": (3,),
    "float64": (),  # f32 unless 64 bits are enabled
}


def leaves(seed: int = 0, scale: float = 32.0) -> dict:
    """A leaf of each dtype, named after it, of rank 0 to 4."""
    random = np.random.default_rng(seed)
    tree = {}
    for name, shape in SHAPES.items():
        dtype = jax.dtypes.canonicalize_dtype(name)
        values = random.normal(size=shape) + (1j * random.normal(size=shape) if name == "complex64" else 0)
        tree[name] = jnp.asarray(np.asarray(scale * values).astype(dtype))
    return tree


@functools.cache
def compiled(case):
    """One step of the clip as a compiled function of the updates and a traced threshold, with parameters of zero."""

    @jax.jit
    def step(updates, threshold, params):
        tx = case.make(threshold)
        return tx.update(updates, tx.init(params), params)

    return lambda updates, threshold: step(updates, threshold, jax.tree.map(jnp.zeros_like, updates))


def once(case, threshold, updates):
    """One eager step, with parameters of zero."""
    tx = case.make(threshold)
    params = jax.tree.map(jnp.zeros_like, updates)
    return tx.update(updates, tx.init(params), params)


def bits(tree):
    """The leaves as integers of the same bits, so that -0, NaN and subnormal numbers are told apart."""
    return jax.tree.map(lambda x: np.asarray(x).view(f"u{x.dtype.itemsize}"), tree)


def assert_same_bits(actual, expected):
    chex.assert_trees_all_equal_shapes_and_dtypes(actual, expected)
    chex.assert_trees_all_equal(bits(actual), bits(expected))


def rounded_once(dtype) -> float:
    """Relative error of a number that was computed in f32 or better and rounded to the dtype once."""
    return max(0.51 * float(jnp.finfo(dtype).eps), trees.tolerance(jnp.float32))


def assert_close(actual: dict, expected: dict, least: float = SMALLEST):
    """Entry by entry as close as the dtype of the leaf allows; numbers below `least` may differ by it."""
    for name, leaf in actual.items():
        tiny = max(least, float(jnp.finfo(leaf.dtype).smallest_normal * jnp.finfo(leaf.dtype).eps))
        np.testing.assert_allclose(reference.wide(leaf), expected[name], rtol=rounded_once(leaf.dtype), atol=tiny)


# norm <= threshold: bit-identical


def with_subnormals() -> dict:
    """Leaves of each dtype with the smallest numbers, zeros of both signs and ordinary numbers among the entries."""
    tree = leaves()
    for name, leaf in tree.items():
        info = jnp.finfo(leaf.dtype)
        special = np.array([info.smallest_subnormal, -info.smallest_subnormal, info.smallest_normal / 2, 0.0, -0.0])
        flat = np.array(leaf).ravel()
        count = min(len(special), len(flat) - 1)
        flat[:count] = special[:count].astype(flat.dtype)
        tree[name] = jnp.asarray(flat.reshape(leaf.shape))
    return tree


@keeping_small
@pytest.mark.parametrize("tree", [leaves, with_subnormals])
def test_small_updates_are_bit_identical(case, tree):
    """Below the threshold no bit changes, not even of subnormal numbers and of -0."""
    updates = tree()
    clipped, _ = compiled(case)(updates, 1e6)
    assert_same_bits(clipped, updates)


@keeping_small
def test_only_subnormal_updates_are_bit_identical(case):
    """Leaves whose entries are all subnormal, or have a norm too small to measure, come back as they are."""
    subnormal = jax.tree.map(lambda x: jnp.full_like(x, jnp.finfo(x.dtype).smallest_subnormal), leaves())
    for updates in (subnormal, *(constant_magnitude(norm, jnp.float32) for norm in (1e-44, 5e-39, 8e-38, 1e-33))):
        clipped, _ = compiled(case)(updates, 1.0)
        assert_same_bits(clipped, updates)


@over([case for case in clips.SHRINKING if case.scope in ("global", "group", "leaf")])
def test_updates_at_the_threshold_are_bit_identical(case):
    """A norm equal to the threshold is not above it."""
    updates = {"w": leaves(1)["float16"].astype(jnp.float32).at[0, 0, 0].set(1e-40)}
    _, state = compiled(case)(updates, jnp.inf)
    clipped, new_state = compiled(case)(updates, state.norm)
    assert_same_bits(clipped, updates)
    assert new_state.clip_rate == 0
    below = np.nextafter(np.float32(state.norm), np.float32(0))
    assert compiled(case)(updates, below)[1].clip_rate == 1


def test_blocks_below_the_threshold_are_bit_identical_beside_others_above():
    """Each unit stands for itself: a small column keeps its bits beside a large one."""
    updates = jnp.array([[3e10, 1e-40, 0.1], [4e10, 1e-30, 0.2]])
    clipped, _ = jax.jit(lambda u: oc.clip_by_unit_norm(1.0).update(u, oc.clip_by_unit_norm(1.0).init(u)))(updates)
    assert_same_bits(clipped[:, 1:], updates[:, 1:])
    chex.assert_trees_all_close(clipped[:, 0], jnp.array([0.6, 0.8]), rtol=trees.tolerance(jnp.float32))


# norm > threshold: at most the threshold, direction kept


@by_norm
@pytest.mark.parametrize("threshold", [16.0, 200.0, 0.5])
def test_large_updates_come_out_at_the_threshold_with_their_direction(case, threshold):
    """Every block is what float64 gives, rounded once: scaled by one factor, its norm within the threshold."""
    updates = leaves(scale=64.0)
    clipped, _ = compiled(case)(updates, threshold)
    chex.assert_trees_all_equal_shapes_and_dtypes(clipped, updates)
    assert_close(clipped, reference.clipped(case, updates, threshold))


@by_norm
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["f32", "bf16"])
def test_norm_of_the_result_is_at_most_the_threshold(case, dtype):
    """The norm of each block, measured in float64, is within a few eps of the threshold, and the angle is zero."""
    random, tolerance = np.random.default_rng(0), trees.tolerance(dtype)
    updates = {"a": jnp.asarray(random.normal(size=7), dtype), "b": jnp.asarray(random.normal(size=(3, 4)), dtype)}
    for threshold in (1e-3, 1e-15):
        clipped, _ = compiled(case)(updates, threshold)
        assert max(reference.block_norms(case, clipped).values()) <= threshold * (1 + tolerance)
        before, after = reference.block_vectors(case, updates), reference.block_vectors(case, clipped)
        for number, x in before.items():
            y = after[number]
            assert np.vdot(x, y) >= (1 - tolerance) * np.linalg.norm(x) * np.linalg.norm(y) > 0


@pytest.mark.parametrize("case", [c for c in clips.CLIPS if c.scope == "entry"], ids=lambda case: case.name)
@pytest.mark.parametrize("threshold", [1.0, 0.1])
def test_large_entries_come_out_at_the_bound(case, threshold):
    """Clips of entries bound each entry, in its own dtype, and leave the others alone."""
    updates = leaves(scale=1.0)
    clipped, _ = compiled(case)(updates, threshold)
    chex.assert_trees_all_equal_shapes_and_dtypes(clipped, updates)
    for name, leaf in clipped.items():
        before, after = reference.wide(updates[name]), reference.wide(leaf)
        size = np.abs(before) if case.name != "clip_by_value" or name == "complex64" else before
        bound = threshold * np.where(size > 0, before / np.where(size == 0, 1, size), 1)
        np.testing.assert_allclose(after, np.where(size > threshold, bound, before), rtol=rounded_once(leaf.dtype))
        assert np.all(after[size <= threshold] == before[size <= threshold])


# norm 0: zeros, finite derivative


@every
@pytest.mark.parametrize("threshold", [1.0, 0.0, np.inf])
def test_zeros_stay_zeros(case, threshold):
    """Zero gradients come back as zeros whatever the threshold, 0 and inf included, and nothing counts as clipped."""
    updates = jax.tree.map(jnp.zeros_like, leaves())
    clipped, state = compiled(case)(updates, threshold)
    chex.assert_trees_all_equal(clipped, updates)
    chex.assert_tree_all_finite(clipped)
    if case.measure is not None:
        assert state.norm == 0 and state.clip_rate == 0


@every
def test_derivative_at_zero_is_finite(case):
    """The derivative by updates and threshold is finite where all gradients are zero, and some beside others."""
    updates = {"a": jnp.zeros(3), "b": jnp.zeros((2, 3)), "c": jnp.ones(4)}
    weights = {"a": jnp.arange(3.0) + 1, "b": jnp.ones((2, 3)), "c": jnp.ones(4)}

    @jax.jit
    @jax.grad
    def derivative(arguments, params):
        tx = case.make(arguments[1])
        clipped, _ = tx.update(arguments[0], tx.init(params), params)
        return sum(jnp.vdot(weights[name], leaf) for name, leaf in clipped.items())

    for b, c in [(0.0, 0.0), (0.0, 1.0), (1e25, 1.0)]:
        point = {"a": updates["a"], "b": updates["b"] + b, "c": updates["c"] * c}
        for threshold in (1.0, 0.0, np.inf):
            chex.assert_tree_all_finite(derivative((point, threshold), jax.tree.map(jnp.zeros_like, updates)))


@every
def test_zero_gradients_that_the_compiler_knows_of(case):
    """An unused parameter, whose gradient is a constant of the compiled program, gets zeros and harms no other."""
    params = {"a": jnp.ones(3), "unused": jnp.ones((2, 3)), "unused_too": jnp.ones(4)}

    @jax.jit
    def step(params):
        updates = jax.grad(lambda p: 0.5 * jnp.sum(p["a"] ** 2))(params)
        tx = case.make(1e3)
        return tx.update(updates, tx.init(params), jax.tree.map(jnp.zeros_like, params))

    clipped, state = step(params)
    chex.assert_tree_all_finite((clipped, state))
    chex.assert_trees_all_equal(clipped["unused"], jnp.zeros((2, 3)))
    if case.keeps_small:
        chex.assert_trees_all_equal(clipped["a"], params["a"])


def test_zero_stays_zero_below_a_smallest_norm():
    """A lower bound of the norm does not move a zero gradient."""
    tx = oc.clip_by_norm_range(1.0, 2.0)
    clipped, state = tx.update(jnp.zeros(3), tx.init(jnp.zeros(3)))
    chex.assert_trees_all_equal(clipped, jnp.zeros(3))
    assert state.norm == 0


# Thresholds 0, inf, None, NaN, negative


@bounding_size
def test_threshold_zero_gives_zeros(case):
    """A threshold of 0, known or traced, gives zeros."""
    updates = leaves()
    clipped, _ = compiled(case)(updates, 0.0)
    chex.assert_trees_all_equal(clipped, jax.tree.map(jnp.zeros_like, updates))
    chex.assert_trees_all_equal(once(case, 0, jnp.array([3.0, -4.0]))[0], jnp.zeros(2))


@bounding_size
@pytest.mark.parametrize("threshold", [-1.0, -np.inf, -1e-40])
def test_traced_negative_threshold_acts_as_zero(case, threshold):
    """A threshold that turns out negative in the compiled program gives zeros, never flipped signs."""
    updates = leaves()
    clipped, _ = compiled(case)(updates, threshold)
    chex.assert_trees_all_equal(clipped, jax.tree.map(jnp.zeros_like, updates))


@every
def test_traced_nan_threshold_is_loud(case):
    """A threshold that turns out NaN in the compiled program makes every entry NaN, zeros too."""
    updates = leaves()
    for tree in (updates, jax.tree.map(jnp.zeros_like, updates)):
        clipped, state = compiled(case)(tree, np.nan)
        chex.assert_trees_all_equal_shapes_and_dtypes(clipped, updates)
        assert all(np.isnan(np.asarray(leaf).astype(np.complex64)).all() for leaf in clipped.values())
        if case.measure is not None:
            assert np.isnan(state.threshold) and state.clip_rate == 0


@every
@pytest.mark.parametrize("bad", [0.0, np.inf, -np.inf, np.nan])
def test_threshold_inf_is_bit_identical(case, bad):
    """Under a traced threshold of inf nothing changes, whatever the entries; the state still measures."""
    updates = with_subnormals()
    updates["float32"] = updates["float32"].at[1, 1, 1, 1].set(bad)
    updates["bfloat16"] = updates["bfloat16"].at[2].set(bad)
    clipped, state = compiled(case)(updates, jnp.inf)
    assert_same_bits(clipped, updates)
    if case.measure is not None:
        assert jnp.isfinite(state.norm) == np.isfinite(bad) and state.clip_rate == 0
    if case.measure is not None and bad == 0:
        np.testing.assert_allclose(state.norm, reference.total_norm(case, updates), rtol=1e-6)


@every
@pytest.mark.parametrize("threshold", [None, np.inf])
def test_known_threshold_inf_or_none_is_bit_identical(case, threshold):
    """A threshold of None or inf given as a number leaves everything alone; the state still measures."""
    for values in ([1.0, 1e-40, -0.0, 3e38], [np.nan, 1e-40, 1.0, 2.0], [np.inf, 1e-40, 1.0, 2.0]):
        updates = jnp.array(values)
        clipped, state = once(case, threshold, updates)
        assert_same_bits(clipped, updates)
        if case.measure is not None and jnp.isfinite(updates).all():
            np.testing.assert_allclose(state.norm, reference.total_norm(case, {"w": updates}), rtol=1e-6)


# Entries that are not finite


@by_norm
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_bad_entry_makes_its_block_nan_and_no_other(case, bad):
    """With an inf or NaN among them all entries of that block are NaN, and all other entries are as without it."""
    updates = leaves()
    clean, _ = compiled(case)(updates, 16.0)
    numbers = reference.block_numbers(case, updates)
    for name, leaf in updates.items():
        broken = np.array(leaf)
        broken.reshape(-1)[0] = bad
        clipped, state = compiled(case)(updates | {name: jnp.asarray(broken)}, 16.0)
        number = numbers[name].reshape(-1)[0]
        for other, result in clipped.items():
            hit = numbers[other] == number
            assert np.isnan(np.asarray(result).astype(np.complex64)[hit]).all()
            chex.assert_trees_all_equal(bits(result)[~hit], bits(clean[other])[~hit])
        assert not jnp.isfinite(state.norm) and jnp.isfinite(state.clip_rate)


def test_imaginary_part_that_is_not_finite_is_loud():
    """A complex entry is bad where one of its parts is."""
    updates = {
        "a": jnp.array([1 + 1j * np.nan, 2.0], jnp.complex64),
        "b": jnp.array([complex(1, np.inf)], jnp.complex64),
    }
    clipped, _ = oc.clip_by_leaf_norm(1.0).update(updates, oc.clip_by_leaf_norm(1.0).init(updates))
    assert all(jnp.isnan(leaf.real).all() and jnp.isnan(leaf.imag).all() for leaf in clipped.values())


def test_bad_entry_of_a_clip_of_entries():
    """Infinite entries go to the bound, NaN stays NaN, and the entries beside them are clipped as ever."""
    updates = jnp.array([np.inf, -np.inf, np.nan, 3.0, -0.5])
    for dtype in (jnp.float32, jnp.bfloat16, jnp.float16, jnp.float8_e5m2):
        clipped, _ = oc.clip(2.0).update(updates.astype(dtype), oc.clip(2.0).init(updates))
        chex.assert_trees_all_equal(clipped.astype(jnp.float32), jnp.array([2.0, -2.0, np.nan, 2.0, -0.5]))
        tx = oc.clip_by_value(-1.0, 4.0)
        clipped, _ = tx.update(updates.astype(dtype), tx.init(updates))
        chex.assert_trees_all_equal(clipped.astype(jnp.float32), jnp.array([4.0, -1.0, np.nan, 3.0, -0.5]))


@by_norm
def test_bad_step_is_not_counted_as_clipped(case):
    """A step that is not finite counts as a step, not as a clipped one, and leaves no NaN in the clip rate."""
    tx = case.make(1.0)
    good, bad = jnp.array([300.0, 400.0, 300.0]), jnp.array([1.0, np.nan, np.inf])
    state = tx.init(good)
    for updates in (good, bad, good):
        _, state = tx.update(updates, state, jnp.zeros(3))
    assert state.step == 3
    chex.assert_trees_all_close(state.clip_rate, 2 / 3, rtol=1e-6)


# Finite entries whose squares leave the range of f32

EXPONENTS = [
    *(-27, -26.5, -25, -23.5, -22, -21, -20, -19.5, -19, -18, -16, -13, -11, -10.5, -9, -6, -4, -3.2, -2.9, -1, -0.1),
    *(0.1, 1, 3, 6, 9, 12, 15, 17, 18.5, 19, 19.2, 19.5, 20, 22, 25, 27, 29, 31, 33, 35, 36, 37, 37.5),
]


def constant_magnitude(norm: float, dtype) -> dict:
    """Two leaves of 19 equal entries altogether, of the given Euclidean norm."""
    entry = norm / np.sqrt(19)
    return {"a": jnp.full(7, entry, dtype), "b": jnp.full((3, 4), -entry, dtype)}


def mixed_magnitude(norm: float, dtype) -> dict:
    """The same leaves with entries from 1 down to 1e-30 of the norm, none subnormal."""
    random = np.random.default_rng(0)
    a, b = 10.0 ** random.uniform(-30, -1, 7), 10.0 ** random.uniform(-12, -1, (3, 4))
    a[3] = b[1, 2] = 0.7
    a, b = np.maximum(norm * a, 2 * SMALLEST), np.maximum(norm * b, 2 * SMALLEST)
    return {"a": jnp.asarray(a, dtype), "b": jnp.asarray(-b, dtype)}


@by_norm
@pytest.mark.parametrize("magnitude", [constant_magnitude, mixed_magnitude])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["f32", "bf16"])
def test_norms_of_every_magnitude_are_exact(case, magnitude, dtype):
    """From 1e-27 to the largest f32, constant and mixed, measured to 1e-6 and clipped as in float64."""
    for threshold in (1e-3, 1.0):
        for exponent in EXPONENTS:
            updates = magnitude(10.0**exponent, dtype)
            clipped, state = compiled(case)(updates, threshold)
            np.testing.assert_allclose(
                state.norm, reference.total_norm(case, updates), rtol=1e-6, err_msg=f"norm 1e{exponent}"
            )
            assert_close(clipped, reference.clipped(case, updates, threshold))


@by_norm
@pytest.mark.parametrize("entry", [1e-27, 1.2e-19, 1.1e19, 3e38], ids=str)
def test_single_entries_of_every_magnitude_are_exact(case, entry):
    """A leaf of one entry, up to the largest f32, has it as its norm."""
    updates = {"a": jnp.float32(entry).reshape(1)}
    clipped, state = compiled(case)(updates, 0.5)
    np.testing.assert_allclose(state.norm, entry, rtol=1e-6)
    assert_close(clipped, reference.clipped(case, updates, 0.5))


@by_norm
def test_threshold_of_every_magnitude(case):
    """Thresholds from 1e-27 to 1e30 bound updates of norm up to 1e37."""
    for threshold in (1e-27, 1e-20, 1e-10, 1e10, 1e20, 1e30):
        for norm in (1e-10, 1.0, 1e10, 1e25, 1e37):
            updates = constant_magnitude(norm, jnp.float32)
            if case.name == "adaptive_grad_clip" and threshold < 1e-6:
                continue  # its divisor is at least 1e-6
            clipped, _ = compiled(case)(updates, threshold)
            assert_close(clipped, reference.clipped(case, updates, threshold))


@pytest.mark.parametrize("scale_up", [oc.normalize, None], ids=["normalize", "norm_range"])
def test_scaling_up_never_overflows(scale_up):
    """A tiny block is scaled up to its target, though the factor itself is beyond f32, or else left alone."""
    for norm, target in [(1e-27, 1.0), (1e-27, 1e20), (2e-38, 10.0), (1e-37, 1e30)]:
        tx = oc.clip_by_leaf_norm(target, response=scale_up) if scale_up else oc.clip_by_norm_range(target, None)
        clipped, _ = tx.update(jnp.float32([norm, 0.0]), tx.init(jnp.zeros(2)))
        chex.assert_tree_all_finite(clipped)
        assert jnp.isclose(clipped[0], target, rtol=1e-5, atol=0) or (norm < 1e-27 and clipped[0] == jnp.float32(norm))


def test_factors_that_are_small_integers():
    """Numbers that programs also use to tell cases apart are factors like any other."""
    updates = [jnp.array([1 / factor, 0.0]) for factor in (0.25, 0.5, 1.0, 2.0, 3.0, 4.0)]
    tx = oc.clip_by_leaf_norm(1.0, response=oc.normalize)
    clipped, _ = jax.jit(tx.update)(updates, tx.init(updates))
    chex.assert_trees_all_close(clipped, [jnp.array([1.0, 0.0])] * 6, rtol=1e-6)


@over([case for case in clips.NORM_CLIPS if case.name != "clip_by_global_norm_inf"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["f32", "bf16"])
def test_norm_above_the_largest_number_is_loud(case, dtype):
    """Finite entries whose norm is above f32's largest number have the norm inf and become NaN; a mean does not."""
    updates = {"a": jnp.full(7, 3e38, dtype), "b": jnp.full((3, 4), -3e38, dtype)}
    clipped, state = compiled(case)(updates, 1.0)
    if case.name == "clip_by_block_rms":
        assert_close(clipped, reference.clipped(case, updates, 1.0))
    else:
        assert all(jnp.isnan(leaf).all() for leaf in clipped.values())
        assert jnp.isinf(state.norm) and state.clip_rate == 0


@pytest.mark.parametrize("entry", [1e-30, 1e-22, 1.0, 1e30])
def test_norm_of_a_million_entries(entry):
    """A million equal entries, tiny, ordinary or huge, are measured and clipped to 1e-6."""
    tx = oc.clip_by_global_norm(1.0)
    updates = jnp.full(1_000_000, entry, jnp.float32)
    clipped, state = jax.jit(tx.update)(updates, tx.init(updates))
    norm = 1e3 * float(np.float32(entry))
    np.testing.assert_allclose(state.norm, norm, rtol=1e-6)
    np.testing.assert_allclose(clipped[::99999], entry * min(1.0, 1.0 / norm), rtol=2e-6)


# Low precision


@pytest.mark.parametrize(
    "dtype", [jnp.bfloat16, jnp.float16, jnp.float8_e4m3fn, jnp.float8_e5m2], ids=lambda dtype: jnp.dtype(dtype).name
)
def test_low_precision_is_accumulated_in_f32(dtype):
    """A hundred thousand entries, whose sum of squares their own dtype cannot hold, have the norm of f32."""
    updates = jnp.asarray(np.random.default_rng(0).choice([0.5, 1.0, 48.0], 100_000), dtype)
    norm = reference.p_norm(updates)
    tx = oc.clip_by_global_norm(norm / 4)
    clipped, state = jax.jit(tx.update)(updates, tx.init(updates))
    assert state.norm.dtype == jnp.float32 and clipped.dtype == dtype
    np.testing.assert_allclose(state.norm, norm, rtol=1e-6)
    chex.assert_trees_all_close(clipped.astype(jnp.float32), updates.astype(jnp.float32) / 4, rtol=rounded_once(dtype))


@by_norm
def test_mixed_trees_share_a_norm_in_f32(case):
    """Leaves of several dtypes are counted together, multiplied in f32 and rounded once, each to its own dtype."""
    updates = {name: 16 * leaf.astype(jnp.float32) for name, leaf in trees.mixed().items()}
    updates = {name: leaf.astype(trees.mixed()[name].dtype) for name, leaf in updates.items()}
    clipped, state = compiled(case)(updates, 8.0)
    chex.assert_trees_all_equal_shapes_and_dtypes(clipped, updates)
    assert_close(clipped, reference.clipped(case, updates, 8.0))
    np.testing.assert_allclose(state.norm, reference.total_norm(case, updates), rtol=1e-6)


@every
def test_f64_leaves_are_clipped_in_f64(case):
    """With 64 bits enabled, f64 leaves are measured, scaled and returned in f64, beside f32 ones that stay f32."""
    with jax.enable_x64(True):
        updates = {
            "wide": jnp.asarray(np.random.default_rng(0).normal(size=7) * 50),
            "narrow": jnp.zeros(3, jnp.float32),
        }
        clipped, state = once(case, 2.0, updates)
        chex.assert_trees_all_equal_shapes_and_dtypes(clipped, updates)
        if case.measure is None:
            low = -2.0 if case.name != "clip_by_value" else -np.inf
            expected = reference.value(updates, low, 2.0)
        else:
            assert state.norm.dtype == jnp.float32
            expected = reference.clipped(case, updates, 2.0)
        np.testing.assert_allclose(clipped["wide"], expected["wide"], rtol=1e-13)


# Odd leaves, scalars, nothing at all


@every
def test_odd_leaves_are_returned_and_not_counted(case):
    """Leaves without a norm come back as the same objects, and the rest is clipped as if they were not there."""
    updates = trees.odd()
    tx = case.make(0.5)
    clipped, state = tx.update(updates, tx.init(updates), updates)
    for name, leaf in updates.items():
        assert name == "weight" or clipped[name] is leaf or jax.tree.leaves(leaf) == []
    chex.assert_trees_all_equal_structs(clipped, updates)
    # The other leaves' places decide on the labels of groups, so they stay, empty.
    alone = {name: leaf if name == "weight" else jnp.zeros((0,)) for name, leaf in updates.items()}
    expected, expected_state = tx.update(alone, tx.init(alone), alone)
    chex.assert_trees_all_close(clipped["weight"], expected["weight"], rtol=1e-6)
    if case.measure is not None:
        chex.assert_trees_all_close(state.norm, expected_state.norm, rtol=1e-6)


@every
def test_scalars_come_back_as_arrays(case):
    """Python and NumPy numbers as leaves are clipped like arrays without dimensions."""
    updates = {"a": 3.0, "b": np.float32(-4.0), "c": np.float16(0.5), "d": 3 + 4j, "e": np.float64(2.0), "f": 7}
    arrays = {name: leaf if name == "f" else jnp.asarray(leaf) for name, leaf in updates.items()}
    clipped, state = once(case, 1.0, updates)
    expected, expected_state = once(case, 1.0, arrays)
    assert clipped["f"] == 7
    for name in "abcde":
        assert isinstance(clipped[name], jax.Array)
        chex.assert_shape(clipped[name], ())
        chex.assert_trees_all_equal(clipped[name], expected[name])
    assert clipped["c"].dtype == jnp.float16
    chex.assert_trees_all_equal(state, expected_state)


@every
@pytest.mark.parametrize("shape", [(0,), (0, 3), (3, 0), (2, 0, 3), (1, 2, 0, 3)], ids=str)
def test_leaves_without_entries(case, shape):
    """A leaf of size 0 comes back with its shape, measures 0 and does not disturb the others."""
    for updates in ({"a": jnp.zeros(shape)}, {"a": jnp.zeros(shape), "b": jnp.array([30.0, 40.0])}):
        clipped, state = once(case, 2.0, updates)
        chex.assert_trees_all_equal_shapes_and_dtypes(clipped, updates)
        chex.assert_tree_all_finite((clipped, state))
    if case.measure is not None:
        np.testing.assert_allclose(
            reference.flat(clipped),
            reference.clipped(case, {"b": updates["b"]}, 2.0)["b"],
            rtol=trees.tolerance(jnp.float32),
        )


@every
@pytest.mark.parametrize("empty", [{}, (), [], {"a": {}, "b": (), "c": None}], ids=str)
@pytest.mark.parametrize("x64", [False, True], ids=["x32", "x64"])
def test_empty_trees(case, empty, x64):
    """A tree without leaves comes back as it is, and the state counts the step and measures 0."""
    with jax.enable_x64(x64):
        for threshold in (1.0, None, 0.0, lambda step: 1.0):
            tx = case.make(threshold)
            state = tx.init(empty)
            clipped, new_state = tx.update(empty, state, empty)
            chex.assert_trees_all_equal_structs(clipped, empty)
            chex.assert_trees_all_equal_shapes_and_dtypes(new_state, state)
            assert new_state.step == 1
            if case.measure is not None:
                assert new_state.norm == 0 and new_state.clip_rate == 0
            if case.scope in ("leaf", "unit", "group"):  # there is no block to take a mean of
                assert new_state.threshold == 0 and new_state.scale == 1


@pytest.mark.parametrize("tree", [{}, {"n": 7}, {"w": np.zeros((3, 0), np.float32)}], ids=str)
def test_metrics_where_there_is_nothing_to_clip(tree):
    """The whole tree is one block even if it is empty; units there are none, and none has a threshold."""
    for tx, threshold in ((oc.clip_by_global_norm(2.0), 2.0), (oc.clip_by_unit_norm(2.0, axis=0), 0.0)):
        _, state = tx.update(tree, tx.init(tree))
        assert tuple(map(float, state[:5])) == (1, 0, threshold, 1, 0)


def test_bounds_that_meet_leave_one_value():
    """Where both ends are the same, each entry, magnitude or norm is that."""
    x = jnp.array([-1.0, 0.5, 3.0])
    clipped = lambda tx: tx.update(x, tx.init(x))[0]
    chex.assert_trees_all_equal(clipped(oc.clip_by_value(1.0, 1.0)), jnp.ones(3))
    chex.assert_trees_all_equal(clipped(oc.clip_by_magnitude(1.0, 1.0)), jnp.array([-1.0, 1.0, 1.0]))
    chex.assert_trees_all_close(jnp.linalg.norm(clipped(oc.clip_by_norm_range(2.0, 2.0))), 2.0, rtol=1e-6)


def test_numbers_of_python_above_the_largest_f32():
    """They are that, not inf: an inf among the entries comes down to it."""
    x, largest = jnp.array([jnp.inf, -jnp.inf, 1.0]), float(jnp.finfo(jnp.float32).max)
    for tx in (oc.clip(1e300), oc.clip_by_value(-1e300, 1e300)):
        chex.assert_trees_all_equal(tx.update(x, tx.init(x))[0], jnp.array([largest, -largest, 1.0]))
    tx = oc.clip_by_global_norm(1e300)
    chex.assert_trees_all_equal(tx.update(jnp.ones(2), tx.init(jnp.ones(2)))[1].threshold, jnp.float32(largest))


def test_complex_entries_on_the_smallest_magnitude_keep_their_bits():
    """An entry whose magnitude is the lower bound is inside."""
    random = np.random.default_rng(0)
    x = jnp.asarray(random.normal(size=(200, 2)) @ [1, 1j], jnp.complex64)
    clipped = jax.jit(jax.vmap(lambda x: oc.clip_by_magnitude(jnp.abs(x)).update(x, oc.clip_by_magnitude().init(x))[0]))
    chex.assert_trees_all_equal(clipped(x), x)


def test_threshold_0_for_entries_too_small_to_square():
    """Entries whose squares are 0 become 0 under a threshold of 0 too."""
    updates = {"a": jnp.array([1.2e-38]), "b": jnp.zeros(2)}
    for tx in (oc.clip_by_global_norm(0.0), oc.clip_by_leaf_norm(0.0)):
        chex.assert_trees_all_equal(tx.update(updates, tx.init(updates))[0], jax.tree.map(jnp.zeros_like, updates))


# Complex leaves


@every
@pytest.mark.parametrize("scale", [1e-20, 1.0, 1e20, 1e37])
def test_complex_leaves_keep_their_phase(case, scale):
    """Complex entries count with their magnitude and are scaled by a real factor."""
    phases = np.exp(1j * np.linspace(0.1, 6.0, 6)).reshape(2, 3)
    updates = {"z": jnp.asarray(scale * np.arange(1, 7).reshape(2, 3) * phases, jnp.complex64)}
    clipped, state = compiled(case)(updates, 2.0)
    if case.measure is None:
        size = np.abs(reference.wide(updates["z"]))
        expected = {"z": reference.wide(updates["z"]) * np.minimum(1.0, 2.0 / size)}
    else:
        expected = reference.clipped(case, updates, 2.0)
        np.testing.assert_allclose(state.norm, reference.total_norm(case, updates), rtol=1e-6)
    assert_close(clipped, expected)


@pytest.mark.parametrize("entry", [3e38 + 3e38j, 1e25 - 1e25j, 3e-20 + 4e-20j, 0j, 1e-40 + 1e-40j, 2.0 + 0j])
@pytest.mark.parametrize("bound", [1.0, 1e-20, 1e-30])
def test_complex_entries_of_every_magnitude(entry, bound):
    """A clip of complex entries bounds the magnitude and keeps the phase, also where the magnitude overflows."""
    updates = jnp.asarray([entry], jnp.complex64)
    clipped, _ = oc.clip(bound).update(updates, oc.clip(bound).init(updates))
    size = abs(complex(updates[0]))
    expected = complex(updates[0]) * (bound / size if size > bound else 1.0)
    np.testing.assert_allclose(reference.wide(clipped), [expected], rtol=trees.tolerance(jnp.float32), atol=SMALLEST)


def test_infinite_complex_entries_go_to_the_bound():
    """An infinite complex entry goes to the bound in the direction of its infinite parts; a NaN stays NaN."""
    entries = [
        complex(np.inf, 0),
        complex(0, -np.inf),
        complex(np.inf, np.inf),
        complex(-np.inf, 5),
        complex(np.nan, 1),
    ]
    updates = jnp.asarray(entries, jnp.complex64)
    clipped, _ = oc.clip(2.0).update(updates, oc.clip(2.0).init(updates))
    np.testing.assert_allclose(clipped[:4], [2, -2j, np.sqrt(2) * (1 + 1j), -2], rtol=trees.tolerance(jnp.float32))
    assert jnp.isnan(clipped[4].real) or jnp.isnan(clipped[4].imag)


def test_bounds_of_both_signs_on_complex_entries():
    """Complex entries are clipped to the magnitude that keeps both parts within the bounds whatever the phase."""
    updates = jnp.asarray([3 + 4j, 0.3 + 0.4j], jnp.complex64)
    for low, high, size in [(-1.0, 2.0, 1.0), (-2.0, 1.0, 1.0), (None, 2.0, 2.0), (-2.0, None, 2.0), (1.0, 2.0, 0.0)]:
        clipped, _ = oc.clip_by_value(low, high).update(updates, oc.clip_by_value(low, high).init(updates))
        expected = [(3 + 4j) / 5 * size, (0.3 + 0.4j) if size else 0]
        np.testing.assert_allclose(clipped, expected, rtol=trees.tolerance(jnp.float32))


# Schedules and prefix trees of thresholds


@every
def test_schedule_is_first_seen_at_step_zero(case):
    """The first update is clipped at schedule(0), the second at schedule(1)."""
    schedule = lambda step: jnp.where(step == 0, 2.0, jnp.where(step == 1, 0.5, jnp.nan))
    tx, updates = case.make(schedule), jnp.array([30.0, 40.0])
    state = tx.init(updates)
    for threshold in (2.0, 0.5):
        clipped, state = tx.update(updates, state, jnp.zeros(2))
        expected, expected_state = once(case, threshold, updates)
        chex.assert_trees_all_equal(clipped, expected)
        if case.measure is not None:
            chex.assert_trees_all_equal(state.threshold, expected_state.threshold)


@every
@pytest.mark.parametrize("value", [np.nan, -1.0])
def test_schedule_that_goes_wrong_is_loud_or_zero(case, value):
    """A schedule that returns NaN makes every entry NaN, a negative number acts as 0."""
    clipped, _ = once(case, lambda step: value, jnp.array([3.0, 4.0]))
    if np.isnan(value):
        assert jnp.isnan(clipped).all()
    else:
        chex.assert_trees_all_equal(clipped, jnp.full(2, -1.0) if case.name == "clip_by_value" else jnp.zeros(2))


PREFIXES = {
    "numbers": {"a": 1.0, "b": 4.0},
    "none": {"a": None, "b": 4.0},
    "deep": {"a": {"x": 1.0, "y": None}, "b": 2.0},
    "schedule": {"a": {"x": lambda step: 1.0 + step, "y": 0.0}, "b": lambda step: jnp.float32(4.0)},
    "arrays": {"a": jnp.float32(1.0), "b": {"z": np.int32(4)}},
    "inf": {"a": np.inf, "b": {"z": 0}},
}


@by_leaf_or_unit
@pytest.mark.parametrize("prefix", PREFIXES.values(), ids=PREFIXES)
def test_prefix_tree_of_thresholds(case, prefix):
    """A tree of thresholds, schedules and None gives each subtree what a clip with that threshold gives it."""
    updates = {
        "a": {"x": jnp.array([30.0, 40.0]), "y": jnp.array([[5.0, np.nan], [12.0, 1.0]])},
        "b": {"z": jnp.array([[6.0], [8.0]])},
    }
    tx = case.make(prefix)
    params = jax.tree.map(jnp.zeros_like, updates)
    state = tx.init(params)
    thresholds = []
    jax.tree.map(
        lambda value, subtree: thresholds.extend([value] * len(jax.tree.leaves(subtree))),
        prefix,
        updates,
        is_leaf=lambda x: x is None,
    )
    for step in range(2):
        clipped, state = tx.update(updates, state, params)
        for threshold, leaf, result in zip(thresholds, jax.tree.leaves(updates), jax.tree.leaves(clipped)):
            assert_same_bits(result, once(case, threshold(step) if callable(threshold) else threshold, leaf)[0])
    assert state.step == 2


def test_none_in_a_prefix_tree_measures():
    """A leaf whose threshold is None is measured, and its threshold counts as inf."""
    tx = oc.clip_by_leaf_norm({"a": 1.0, "b": None})
    updates = {"a": jnp.array([3.0]), "b": jnp.array([4.0])}
    clipped, state = tx.update(updates, tx.init(updates))
    chex.assert_trees_all_equal(clipped["b"], updates["b"])
    chex.assert_trees_all_close(state.norm, jnp.float32(5.0), rtol=1e-6)
    assert state.clip_rate == 0.5 and jnp.isinf(state.threshold)


# Parameters


@every
def test_updates_may_have_none_where_parameters_have_arrays(case):
    """Parameters without an update, as of a frozen part, are passed over, and the rest is clipped as without them."""
    params = {"frozen": jnp.ones(3), "w": jnp.array([1.0, 2.0]), "x": {"frozen": jnp.ones(2), "y": jnp.array([[3.0]])}}
    updates = {"frozen": None, "w": jnp.array([30.0, 40.0]), "x": {"frozen": None, "y": jnp.array([[50.0]])}}
    tx = oc.adaptive_grad_clip(0.5) if case.needs_params else case.make(0.5)
    clipped, _ = tx.update(updates, tx.init(updates), params)
    assert clipped["frozen"] is None and clipped["x"]["frozen"] is None
    expected, _ = tx.update(
        {"w": updates["w"], "x": {"y": updates["x"]["y"]}},
        tx.init({"w": params["w"], "x": {"y": params["x"]["y"]}}),
        {"w": params["w"], "x": {"y": params["x"]["y"]}},
    )
    chex.assert_trees_all_equal((clipped["w"], clipped["x"]["y"]), (expected["w"], expected["x"]["y"]))
    started, _ = tx.update(updates, tx.init(params), params)  # as an optimizer does, whose init sees the parameters
    chex.assert_trees_all_equal(started, clipped)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32], ids=lambda dtype: jnp.dtype(dtype).name)
def test_parameters_of_other_dtypes(dtype):
    """Parameters of another dtype than the updates are measured in f32 and do not change the dtype of the updates."""
    params = trees.sample(1, dtype=dtype)
    updates = trees.sample(2, scale=10.0)
    tx = oc.adaptive_grad_clip(0.1)
    clipped, _ = jax.jit(tx.update)(updates, tx.init(params), params)
    chex.assert_trees_all_equal_shapes_and_dtypes(clipped, updates)
    assert_close(clipped, reference.adaptive(updates, params, 0.1))

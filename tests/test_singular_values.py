"""`spectral_norm` is a close bound from above, and `clip_singular_values` does what float64 does."""

import functools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
from jax.sharding import AxisType
from trees import mesh, small, step

import optax_clip as oc
from optax_clip import responses, thresholds
from optax_clip._engine import singular

hard = functools.lru_cache(oc.clip_singular_values)  # one object a bound, so that tests share its programs
norm_of = jax.jit(oc.spectral_norm)


def matrix(shape, values, seed=0, dtype=np.float32):
    """A random matrix of this shape with these singular values."""
    random, k = np.random.default_rng(seed), len(values)
    left, right = (np.linalg.qr(random.normal(size=(n, k)))[0] for n in shape)
    return jnp.asarray((left * values) @ right.T, dtype)


def top(x) -> float:
    """The largest singular value, in float64."""
    return float(np.linalg.norm(np.asarray(x, np.float64), 2))


def error(clipped, x, c, response=reference.shrink) -> float:
    """How far a clip is from that in float64, in spectral norm."""
    return top(np.asarray(clipped, np.float64) - reference.singular_values({"x": x}, c, response)["x"])


def spectra(k: int, peak: float = 1e4) -> dict[str, np.ndarray]:
    """Singular values around a bound of 1, the largest `peak`."""
    half, spike = k // 2, np.r_[peak, np.zeros(k - 1)]
    rest = lambda values: np.r_[peak, np.resize(values, k - 1)]
    near = 1 + np.r_[np.geomspace(1e-6, 0.1, half), -np.geomspace(1e-6, 0.1, k - half)]
    return {
        **{f"condition 1e{d}": np.geomspace(peak / 10.0**d, peak, k) for d in (1, 2, 4, 6)},
        "spike over 0.1": rest([0.1]),
        "spike over the bound": rest([1.0]),
        "spike over values near the bound": rest(near),
        "half large, half small": np.repeat([peak, 0.5], (half, k - half)),
        "half large, half near the bound": np.r_[np.full(half, peak), near[: k - half]],
        "half large, half 0": np.repeat([peak, 0.0], (half, k - half)),
        "near the first bounds": rest(peak * np.array([0.9, 0.3, 0.1, 0.03, 0.01, 0.003, 0.001])),
        "even": np.linspace(0, peak, k),
        "all equal": np.full(k, peak),
        "rank 1": spike,
    }


# spectral_norm


@pytest.mark.parametrize("scale", [1.0, *(pytest.param(s, marks=pytest.mark.full) for s in (1e-35, 1e-19, 1e19, 1e36))])
def test_the_norm_is_a_close_bound(scale):
    """The norm is between the largest singular value, but for rounding, and rank^(1/64) times it, at any scale."""
    random = np.random.default_rng(0)
    shapes = [(1, 1), (1, 7), (7, 1), (5, 5), (24, 24), (24, 24), (16, 40), (40, 16)]
    for i, shape in enumerate(shapes):
        x = random.normal(size=shape) if i != 4 else np.linalg.qr(random.normal(size=shape))[0]
        x = (x / np.abs(x).max() * scale).astype(np.float32)
        ratio = float(norm_of(x)) / top(x)
        assert 1 - 3e-7 <= ratio <= min(shape) ** (1 / 64) * (1 + 1e-6), (shape, ratio)


@pytest.mark.full
def test_the_norm_is_a_bound_for_many_matrices():
    """300 random matrices of up to 40 rows, at scales from 1e-30 to 1e30, are within the bounds."""
    random = np.random.default_rng(1)
    for shape in [(1, 1), (2, 9), (9, 2), (17, 17), (40, 25), (3, 40)]:
        scales = 10.0 ** random.uniform(-30, 30, (50, 1, 1))
        x = (random.normal(size=(50, *shape)) * random.uniform(0, 1, (50, 1, shape[1])) ** 8 * scales).astype(
            np.float32
        )
        exact = np.linalg.norm(x.astype(np.float64), 2, axis=(1, 2))
        ratio = np.asarray(norm_of(x))[:, 0, 0] / exact
        assert ratio.min() >= 1 - 3e-7 and ratio.max() <= min(shape) ** (1 / 64) * (1 + 1e-6)


def test_the_norm_of_known_matrices():
    """A spike counts as it is, an orthogonal matrix 9 % too much; 0 is 0; NaN and inf are not finite."""
    for values, expected in [([5.0, 1.0, 0.5], 5.0), ([2.0], 2.0), ([], 0.0), ([1.0] * 8, 8 ** (1 / 64))]:
        chex.assert_trees_all_close(norm_of(matrix((8, 12), values)), jnp.float32(expected), rtol=1e-6)
    chex.assert_trees_all_close(norm_of(np.eye(256, dtype=np.float32)), jnp.float32(256 ** (1 / 64)), rtol=1e-6)
    for bad in (np.nan, np.inf, -np.inf):
        assert not np.isfinite(norm_of(jnp.ones((4, 5)).at[1, 2].set(bad)))
    assert norm_of(jnp.zeros((0, 3))) == 0


def test_blocks_of_the_norm():
    """The last two axes are a matrix, those before a stack, vectors have their L2 norm, and others none."""
    x = np.random.default_rng(2).normal(size=(2, 3, 5, 4)).astype(np.float32)
    found = norm_of({"stack": x, "matrix": x[0, 0], "vector": jnp.array([3.0, 4.0]), "scalar": -2.0, "int": 7})
    exact = np.linalg.norm(x.astype(np.float64), 2, axis=(2, 3), keepdims=True)
    chex.assert_shape(found["stack"], (2, 3, 1, 1))
    chex.assert_trees_all_close(found["stack"], exact.astype(np.float32), rtol=5e-3)
    chex.assert_trees_all_close(found["matrix"], found["stack"][0, 0, 0, 0], rtol=1e-6)
    chex.assert_trees_all_close([found["vector"], found["scalar"]], [jnp.float32(5), jnp.float32(2)], rtol=1e-6)
    assert found["int"] is None


def test_axes_of_the_norm():
    """`axis` names the two axes of a matrix, for every leaf or by a rule; other axes have an L2 norm, None has none."""
    x = np.random.default_rng(3).normal(size=(4, 3, 5)).astype(np.float32)
    found = oc.spectral_norm(x, axis=(0, -1))
    chex.assert_trees_all_close(found, jnp.moveaxis(norm_of(np.moveaxis(x, 1, 0)), 0, 1), rtol=1e-6)
    axes = {"a": (0, 2), "b": None, "c": (0,), "d": (1, 0)}
    found = oc.spectral_norm(dict(zip("abcd", (x, x, x[0], x[0]))), axis=lambda path, leaf: axes[path[0].key])
    chex.assert_shape([found["a"], found["c"], found["d"]], [(1, 3, 1), (1, 5), ()])
    assert found["b"] is None
    chex.assert_trees_all_close(found["c"], oc.unit_norm(x[0]), rtol=1e-6)
    chex.assert_trees_all_close(found["d"], norm_of(x[0]), rtol=1e-6)


def test_the_derivative_of_the_norm():
    """It is u v^T where one singular value stands out, that of the Schatten norm elsewhere, and 0 at 0."""
    slope = jax.jit(jax.grad(oc.spectral_norm))
    x = matrix((6, 9), [4.0, 1.0, 0.5])
    u, _, vh = np.linalg.svd(np.asarray(x, np.float64), full_matrices=False)
    chex.assert_trees_all_close(slope(x), jnp.asarray(np.outer(u[:, 0], vh[0]), jnp.float32), atol=1e-5)
    chex.assert_trees_all_equal(slope(jnp.zeros((6, 9))), jnp.zeros((6, 9)))
    random = np.random.default_rng(4)
    for scale in (1e-30, 1.0, 1e30):
        x, d = (random.normal(size=(9, 6)) for _ in range(2))
        schatten = lambda x: np.sum(np.linalg.svd(x, compute_uv=False) ** 64) ** (1 / 64)
        expected = (schatten(x + 1e-6 * d) - schatten(x - 1e-6 * d)) / 2e-6
        assert np.sum(np.asarray(slope((scale * x).astype(np.float32)), np.float64) * d) == pytest.approx(
            expected, 1e-4
        )


@pytest.mark.full
def test_thresholds_and_rules_take_the_norm():
    """`clip_by_norm(spectral_norm, ...)` scales by the largest singular value, with a number and with a rule."""
    x = matrix((6, 9), [4.0, 1.0])
    for threshold in (2.0, optax.chain(thresholds.quantile(50.0, 4), optax.scale(0.5))):
        clipped, state = step(oc.clip_by_norm(oc.spectral_norm, threshold), x)
        chex.assert_trees_all_close(clipped, x / 2, rtol=1e-5, atol=1e-6)
        chex.assert_trees_all_close([state.norm, state.threshold], [jnp.float32(4), jnp.float32(2)], rtol=1e-6)
    tx = oc.clip_by_norm(oc.spectral_norm, thresholds.z_score(warmup_steps=3))
    state = tx.init(x)
    for scale in (1.0, 1.1, 0.9, 50.0):
        clipped, state = step(tx, scale * x, state)
    assert top(clipped) < 5 and state.clipped == 1


# The clip against float64


def check(shape, values, seed=0, c=1.0, tolerance=5e-4):
    """One clip at `c` of a matrix with singular values `c * values` has the promised error."""
    x = matrix(shape, c * values, seed)
    clipped, state = step(hard(c), x)
    worst, after = error(clipped, x, c) / c, top(clipped) / c
    assert worst <= tolerance and after <= 1.0005, (shape, worst, after)
    assert 1 - 3e-7 <= float(state.norm) / top(x) <= min(shape) ** (1 / 64) * (1 + 1e-6)


@pytest.mark.parametrize("peak", [30.0, 1e4])
def test_the_clip_is_that_of_float64(peak):
    """Up to 1e4 times the bound the error is at most half of 1e-3 of the bound, whatever the other values are."""
    for values in spectra(24, peak).values():
        check((24, 36), values)


SOME = ["condition 1e4", "condition 1e6", "spike over values near the bound", "half large, half near the bound"]


@pytest.mark.full
@pytest.mark.parametrize(
    "shape, peak, names",
    [
        ((512, 768), 1e4, [*SOME, "half large, half 0"]),
        ((512, 768), 20.0, SOME),
        ((384, 256), 300.0, None),
        ((300, 300), 1.2, None),
        ((64, 1024), 1e4, None),
    ],
    ids=str,
)
def test_the_clip_of_large_matrices_is_that_of_float64(shape, peak, names):
    """The same for matrices of up to 512 x 768."""
    for seed, (name, values) in enumerate(spectra(min(shape), peak).items()):
        if names is None or name in names:
            check(shape, values, seed)


@pytest.mark.full
def test_the_clip_of_gaussian_and_orthogonal_matrices():
    """The same for random matrices, for those of orthogonal rows, and with the bound at each of many quantiles."""
    random = np.random.default_rng(7)
    x = jnp.asarray(random.normal(size=(256, 320)), jnp.float32)
    values = np.linalg.svd(np.asarray(x, np.float64), compute_uv=False)
    tx = jax.jit(lambda x, c: oc.clip_singular_values(c).update(x, ())[0])
    for c in [*np.quantile(values, [0.01, 0.1, 0.5, 0.9, 0.99]), 1e-2 * values[0], 1e-4 * values[0]]:
        assert error(tx(x, jnp.float32(c)), x, np.float32(c)) <= 5e-4 * c
    orthogonal = jnp.asarray(np.linalg.qr(random.normal(size=(256, 256)))[0], jnp.float32)
    for c in (0.999, 0.5, 0.03, 1e-3):
        assert error(tx(orthogonal, jnp.float32(c)), orthogonal, np.float32(c)) <= 5e-4 * c


@pytest.mark.full
@pytest.mark.parametrize("peak", [1e5, 1e6, 1e7, 1e12])
def test_no_singular_value_is_left_above(peak):
    """However large a singular value was, none is above the bound afterwards, and rounding is small up to 1e6 times."""
    for values in (np.geomspace(peak, 0.1, 24), np.r_[peak, np.full(23, 1.0)], np.full(24, peak)):
        x = matrix((24, 36), values)
        clipped, _ = step(hard(1.0), x)
        assert top(clipped) <= 1.0005
        if peak <= 1e6:
            assert error(clipped, x, 1.0) <= 1e-2


def test_a_known_clip():
    """Three directions of a matrix that is written out come to the bound or stay."""
    x = jnp.array([[0.0, 8.0, 0.0], [3.0, 0.0, 0.0], [0.0, 0.0, -1.0]])
    clipped, state = step(hard(2.0), x)
    chex.assert_trees_all_close(clipped, jnp.array([[0.0, 2.0, 0.0], [2.0, 0.0, 0.0], [0.0, 0.0, -1.0]]), atol=5e-4)
    expected = {"norm": 8.0, "threshold": 2.0, "clip_scale": 0.25, "clipped": 1.0, "clip_rate": 1.0}
    for name, value in expected.items():
        chex.assert_trees_all_close(getattr(state, name), jnp.float32(value), rtol=1e-6)


# What is left alone


def test_matrices_within_the_bound_keep_their_bits():
    """Matrices below the bound, also in a stack with others, vectors, and all under inf, are bit-identical."""
    stack = jnp.stack([matrix((5, 7), [s, 0.3]) for s in (0.9, 50.0, 0.0)])
    tree = {"stack": stack, "matrix": stack[0], "vector": jnp.array([9.0, 9.0]), "scalar": jnp.float32(9.0)}
    clipped, _ = step(hard(1.0), tree)
    chex.assert_trees_all_equal(clipped | {"stack": clipped["stack"][::2]}, tree | {"stack": stack[::2]})
    assert error(clipped["stack"][1], stack[1], 1.0) < 5e-4
    for off in (None, jnp.inf, 1e30):
        for kwargs in ({}, {"response": responses.tanh}) if off != 1e30 else ({},):
            chex.assert_trees_all_equal(step(oc.clip_singular_values(off, **kwargs), tree)[0], tree)


@pytest.mark.full
def test_a_bound_of_zero_takes_all():
    """Under a bound of 0, and under a traced one below 0, matrices become 0."""
    x = matrix((5, 7), [3.0, 0.3])
    at = jax.jit(lambda c: oc.clip_singular_values(c).update(x, ())[0])
    for c in (0.0, -1.0):
        chex.assert_trees_all_equal(at(jnp.float32(c)), jnp.zeros((5, 7)))
    assert np.isnan(at(jnp.float32(jnp.nan))).all()


@pytest.mark.full
@pytest.mark.parametrize("method", [None, "svd"])
def test_extreme_scales_give_no_nan(method):
    """Finite matrices of any scale, under bounds of any scale, stay finite and come within the bound."""
    at = jax.jit(lambda x, c: oc.clip_singular_values(c, method=method).update(x, ())[0])
    base = np.random.default_rng(5).normal(size=(6, 8))
    base = np.stack([base, np.sign(base), np.ones((6, 8)), np.eye(6, 8)])
    for scale in (0.0, 1e-45, 1e-38, 1e-30, 1.0, 1e30, 3.4e38):
        x = (scale * base / np.abs(base).max((1, 2), keepdims=True)).astype(np.float32)
        for c in (0.0, 1e-38, 1e-20, 1.0, 1e20, 3e38):
            clipped = np.asarray(at(x, jnp.float32(c)), np.float64)
            assert np.isfinite(clipped).all(), (scale, c)
            after = np.linalg.norm(clipped, 2, axis=(1, 2))
            assert (after <= 1.001 * np.float32(c) + 1e-37).all(), (scale, c, after)


@pytest.mark.full
@pytest.mark.parametrize("method", [None, "svd"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_bad_entry_makes_its_matrix_nan(bad, method):
    """A NaN or inf makes the whole matrix NaN, and nothing else in the stack or the tree."""
    x = jnp.stack([matrix((5, 7), [3.0, 0.3])] * 2)
    tree = {"a": x.at[0, 2, 3].set(bad), "b": x[0]}
    clipped, _ = step(oc.clip_singular_values(1.0, method=method), tree)
    assert np.isnan(clipped["a"][0]).all()
    chex.assert_trees_all_close(clipped["a"][1], clipped["b"], atol=1e-5)
    chex.assert_tree_all_finite(clipped["b"])


# Shapes, dtypes and transformations of JAX


@pytest.mark.full
@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (9, 1), (12, 5), (5, 12), (2, 3, 6, 4), (0, 3), (3, 2, 0)])
def test_shapes(shape):
    """Wide, tall, single, stacked and empty matrices are clipped one by one."""
    x = jnp.asarray(np.random.default_rng(6).normal(size=shape), jnp.float32)
    for tx in (hard(1.0), oc.clip_singular_values(1.0, method="svd") if x.size else hard(1.0)):
        clipped, _ = step(tx, x)
        chex.assert_trees_all_close(
            clipped, reference.singular_values({"x": x}, 1.0)["x"].astype(np.float32), atol=1e-4
        )


@pytest.mark.full
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_narrow_dtypes(dtype):
    """Matrices of bf16 and f16 are clipped in f32, and only the result is rounded."""
    x = matrix((24, 36), np.geomspace(0.01, 100.0, 24)).astype(dtype)
    clipped, state = step(hard(1.0), x)
    assert clipped.dtype == dtype and state.norm.dtype == jnp.float32
    exact = step(hard(1.0), x.astype(jnp.float32))[0]
    chex.assert_trees_all_equal(clipped, exact.astype(dtype))
    assert error(clipped, x.astype(jnp.float32), 1.0) < 2 * float(jnp.finfo(dtype).eps)


@pytest.mark.full
def test_complex_matrices():
    """Complex matrices have the norm and the clip of their singular values."""
    random = np.random.default_rng(8)
    x = jnp.asarray(random.normal(size=(7, 5)) + 1j * random.normal(size=(7, 5)), jnp.complex64)
    clipped, state = step(hard(2.0), x)
    u, s, vh = np.linalg.svd(np.asarray(x, np.complex128), full_matrices=False)
    chex.assert_trees_all_close(clipped, ((u * np.minimum(s, 2.0)) @ vh).astype(np.complex64), atol=1e-4)
    assert s[0] * (1 - 3e-7) <= state.norm <= s[0] * 5 ** (1 / 64)


@pytest.mark.full
def test_the_derivative_of_the_clip():
    """It is that of differences in float64, the identity at 0 and below the bound, and finite in a stack with zeros."""
    random = np.random.default_rng(9)
    weights, d = (random.normal(size=(6, 9)) for _ in range(2))
    loss = lambda x, c: jnp.sum(jnp.asarray(weights, jnp.float32) * oc.clip_singular_values(c).update(x, ())[0])
    exact = lambda x, c: np.sum(weights * reference.singular_values({"x": x}, c)["x"])
    slopes = jax.jit(jax.grad(loss, (0, 1)))
    for peak in (3.0, 300.0):
        x = matrix((6, 9), [peak, 2.0, 0.7, 0.2, 0.1, 0.05], 3)
        by_x, by_c = slopes(x, jnp.float32(1.0))
        x, h = np.asarray(x, np.float64), 1e-6
        assert np.sum(by_x * d) == pytest.approx((exact(x + h * d, 1.0) - exact(x - h * d, 1.0)) / (2 * h), abs=2e-3)
        assert by_c == pytest.approx((exact(x, 1 + h) - exact(x, 1 - h)) / (2 * h), abs=2e-3)
    for x in (jnp.zeros((6, 9)), matrix((6, 9), [0.5])):
        chex.assert_trees_all_equal(slopes(x, jnp.float32(1.0)), (jnp.asarray(weights, jnp.float32), jnp.float32(0)))
    stack = jnp.stack([jnp.zeros((6, 9)), matrix((6, 9), [1e3, 2.0])])
    chex.assert_tree_all_finite(slopes(stack, jnp.float32(1.0)))
    chex.assert_tree_all_finite(jax.jit(jax.vmap(jax.grad(loss), (0, None)))(stack, jnp.float32(1.0)))


@pytest.mark.full
def test_schedules_rules_and_trees_are_bounds():
    """The bound may be a schedule, a rule over the norm, or a tree with None for what is only measured."""
    x = matrix((6, 9), [4.0, 1.0])
    tx = oc.clip_singular_values(lambda step: jnp.where(step == 0, 3.0, 2.0))
    first, state = step(tx, x)
    second, _ = step(tx, x, state)
    assert [top(first), top(second)] == pytest.approx([3.0, 2.0], rel=5e-4)
    rule = optax.chain(thresholds.quantile(50.0, 4), optax.scale(0.5))
    assert top(step(oc.clip_singular_values(rule), x)[0]) == pytest.approx(2.0, rel=5e-4)
    clipped, _ = step(oc.clip_singular_values({"a": 1.5, "b": None}), {"a": x, "b": x})
    assert top(clipped["a"]) == pytest.approx(1.5, rel=5e-4)
    chex.assert_trees_all_equal(clipped["b"], x)


@pytest.mark.full
def test_metrics_of_the_clip():
    """`clip_metrics` reads norm and share clipped; the threshold of a stack is left out."""
    tree = {"a": jnp.stack([matrix((5, 7), [s]) for s in (3.0, 0.5)]), "b": matrix((5, 7), [4.0])}
    _, state = step(hard(1.0), tree)
    found = oc.clip_metrics(state)
    assert set(found) == {"clip/norm", "clip/clipped", "clip/clip_rate"}
    assert found["clip/norm"] == pytest.approx(np.sqrt(9 + 0.25 + 16), rel=1e-5)
    assert found["clip/clipped"] == pytest.approx(2 / 3)


@pytest.mark.full
@pytest.mark.parametrize("name", ["shrink", "normalize", "smooth", "tanh"])
def test_responses_by_decomposition(name):
    """With a response every singular value becomes the response; "svd" is the hard clip to a few roundings."""
    response = None if name == "shrink" else getattr(responses, name)
    tx = oc.clip_singular_values(1.0, response=response, method="svd" if response is None else None)
    for values in (np.geomspace(0.01, 100.0, 24), np.full(24, 3.0), np.geomspace(0.5, 0.01, 24)):
        x = matrix((24, 36), values)
        assert error(step(tx, x)[0], x, 1.0, getattr(reference, name)) < 1e-3
    chex.assert_trees_all_equal(step(tx, jnp.zeros((3, 4)))[0], jnp.zeros((3, 4)))


# Costs


def flops(jaxpr, stages: int) -> int:
    """2 for each multiplication of products of matrices, where so many stages are computed."""
    total = 0
    for eqn in jaxpr.eqns:
        held = jax.tree.leaves(eqn.params, is_leaf=lambda x: hasattr(x, "eqns"))
        inner = [flops(j, stages) for j in held if hasattr(j, "eqns")]
        if eqn.primitive.name == "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            total += 2 * eqn.outvars[0].aval.size * np.prod([eqn.invars[0].aval.shape[a] for a in contracted])
        elif eqn.primitive.name == "cond":
            total += max(inner) if stages else min(inner)
        elif eqn.primitive.name == "scan":
            staged = "cond" in str(eqn.params["jaxpr"])
            total += sum(inner) * (stages if staged else eqn.params["length"])
        else:
            total += sum(inner)
    return int(total)


def test_products_are_counted():
    """A stage costs less than 3.5 times five steps of Muon, with the bound or without; below the bound, the bound."""
    m = 64
    x = jnp.zeros((m, m))
    muon = optax.contrib.scale_by_muon(weight_dimension_numbers=optax.contrib.MuonDimensionNumbers())
    muon = flops(jax.make_jaxpr(muon.update)(x, muon.init(x)).jaxpr, 1)
    bound = flops(jax.make_jaxpr(oc.spectral_norm)(x).jaxpr, 1)
    clip = [flops(jax.make_jaxpr(hard(1.0).update)(x, hard(1.0).init(x)).jaxpr, stages) for stages in range(3)]
    assert (muon, bound) == (30 * m**3, 10 * m**3)
    assert clip == [bound, bound + 92 * m**3, bound + 184 * m**3]
    assert clip[1] <= 3.5 * muon


@pytest.mark.full
def test_one_stage_for_each_factor_of_32():
    """So many stages change a matrix as there are factors of 32 between the bound and the norm."""
    x = jnp.diag(jnp.array([1.0, 0.1]))
    for norm, stages in ((0.9, 0), (1.1, 1), (31.0, 1), (33.0, 2), (1e3, 2), (1e4, 3), (1e6, 4), (1e12, 4)):
        carry, done = (x, jnp.full((1, 1), norm), jnp.ones((1, 1))), 0
        carry = (carry[0] * norm, carry[1], jnp.maximum(carry[2], norm / 32.0**4))
        for share in singular._STAGES:
            after, _ = singular._staged(carry, jnp.float32(share))
            done += int((after[0] != carry[0]).any())
            carry = after
        assert done == stages, norm


# Meshes


@pytest.mark.full
def test_sharding_along_the_long_axis_gathers_nothing():
    """Under jit a mesh may spread the long axis of a matrix, wide or tall: the answer of one device, by sums alone."""
    for shape, spec in (((8, 64), jax.P(None, "d")), ((64, 8), jax.P("d", None)), ((3, 8, 64), jax.P(None, None, "d"))):
        x = jnp.asarray(np.random.default_rng(10).normal(size=shape), jnp.float32)
        there = jax.device_put(x, jax.NamedSharding(mesh(d=4), spec))
        update = jax.jit(lambda x: hard(1.0).update(x, hard(1.0).init(x)))
        chex.assert_trees_all_close(update(there), update(x), rtol=1e-4, atol=1e-5)
        program = update.lower(there).compile().as_text()
        assert "all-reduce" in program
        assert not re.search(r"all-gather|all-to-all|collective-permute", program)
        assert update(there)[0].sharding.is_equivalent_to(there.sharding, x.ndim)


@pytest.mark.full
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_stacks_spread_over_a_mesh(kind):
    """A stack of matrices may be spread over devices, with inferred and with explicit shardings."""
    x = jnp.asarray(np.random.default_rng(11).normal(size=(4, 5, 6)), jnp.float32)
    m = mesh(kind, d=4)
    with jax.set_mesh(m):
        there = jax.device_put(x, jax.NamedSharding(m, jax.P("d")))
        clipped = jax.jit(lambda x: hard(1.0).update(x, hard(1.0).init(x))[0])(there)
    chex.assert_trees_all_close(np.asarray(clipped), np.asarray(step(hard(1.0), x)[0]), atol=1e-5)


@pytest.mark.full
@pytest.mark.parametrize("spec", [(None, "d"), ("d",), ("d", "e"), (None, None, "e"), ("e", "d", None)])
def test_matrices_on_a_mesh_of_explicit_axes(spec):
    """A matrix or a stack that is spread by its type has the answer of one device, and keeps its sharding."""
    x = jnp.asarray(np.random.default_rng(13).normal(size=(4, 8, 16) if len(spec) == 3 else (8, 16)), jnp.float32)
    there = jax.device_put(x, jax.NamedSharding(mesh(AxisType.Explicit, d=4, e=2), jax.P(*spec)))
    for tx in (hard(1.0), oc.clip_singular_values(1.0, method="svd"), oc.clip_by_norm(oc.spectral_norm, 1.0)):
        clipped = jax.jit(lambda x, tx=tx: tx.update(x, tx.init(x))[0])(there)
        chex.assert_trees_all_close(np.asarray(clipped), np.asarray(step(tx, x)[0]), atol=1e-5)
        assert jax.typeof(clipped).sharding.spec == jax.typeof(there).sharding.spec


def test_shrink_is_the_default_response_also_by_name():
    """`response=shrink` goes by products, and by decomposition a matrix below the bound keeps its bits."""
    x = jnp.asarray(np.random.default_rng(14).normal(size=(5, 6)), jnp.float32)
    named = oc.clip_singular_values(1.0, response=oc.responses.shrink)
    chex.assert_trees_all_equal(step(named, x)[0], step(hard(1.0), x)[0])
    assert "svd" not in str(jax.make_jaxpr(lambda x: named.update(x, ())[0])(x))
    chex.assert_trees_all_equal(step(oc.clip_singular_values(100.0, method="svd"), x)[0], x)


def on_mesh(function, x, spec=("d",), **kwargs):
    """The function in `shard_map`, the first axis of `x` spread."""
    return jax.jit(jax.shard_map(function, mesh=mesh(d=4), in_specs=jax.P(*spec), out_specs=jax.P(*spec), **kwargs))(x)


@pytest.mark.full
def test_inside_shard_map_matrices_must_be_whole():
    """A leaf that varies raises without `axis_name`; `()` says that matrices are whole; names are refused."""
    x = jnp.asarray(np.random.default_rng(12).normal(size=(8, 5, 6)), jnp.float32)
    of_clip = lambda axis_name: lambda x: oc.clip_singular_values(1.0, axis_name=axis_name).update(x, ())[0]
    of_norm = lambda axis_name: functools.partial(oc.spectral_norm, axis_name=axis_name)
    for function, expected in ((of_clip, step(hard(1.0), x)[0]), (of_norm, norm_of(x))):
        chex.assert_trees_all_close(on_mesh(function(()), x), expected, atol=1e-5)
        with pytest.raises(ValueError, match=r"axis_name is missing: the leaf the root varies over \('d',\)"):
            on_mesh(function(None), x)
        with pytest.raises(ValueError, match=r"axis_name must be \(\) for matrices, got \('d',\) for a leaf of shape"):
            on_mesh(function("d"), x)
        with pytest.raises(ValueError, match="axis_name is missing: over which of the mesh axes"):
            on_mesh(function(None), x, check_vma=False)
        chex.assert_trees_all_close(on_mesh(function(()), x, check_vma=False), expected, atol=1e-5)


@pytest.mark.full
def test_a_norm_over_devices_of_vectors():
    """Vectors that are spread have the norm of the whole, where `axis_name` names the axis."""
    x = jnp.arange(8.0)
    found = on_mesh(lambda x: x * 0 + oc.spectral_norm(x, axis_name="d"), x)
    chex.assert_trees_all_close(found, jnp.full(8, jnp.linalg.norm(x)), rtol=1e-6)


# Beside other transformations


@pytest.mark.full
def test_before_and_after_muon():
    """Before Muon a clip that bounds all directions does nothing to the step; after Muon all singular values are 1."""
    x = matrix((16, 24), np.geomspace(0.5, 50.0, 16))
    muon = optax.contrib.scale_by_muon(ns_steps=5)
    plain, _ = step(muon, x)
    values = np.linalg.svd(np.asarray(plain, np.float64), compute_uv=False)
    assert values.min() > 0.6 and values.max() < 1.3
    clipped, _ = step(optax.chain(muon, hard(2.0)), x)
    chex.assert_trees_all_equal(clipped, plain)
    before, _ = step(optax.chain(hard(5.0), muon), x)
    assert top(before - plain) < 0.5 * top(plain)
    cosine = lambda a, b: float(jnp.vdot(a, b) / jnp.sqrt(jnp.vdot(a, a) * jnp.vdot(b, b)))
    assert cosine(before, plain) > 0.97
    sgd = step(hard(5.0), x)[0]
    assert cosine(sgd, x) < 0.8


# Errors


@pytest.mark.parametrize(
    "call, kind, message",
    [
        (lambda: oc.clip_singular_values(-1.0), ValueError, "max_value must be >= 0, got -1."),
        (lambda: oc.clip_singular_values("1"), TypeError, "max_value must be a number, a scalar array, a schedule"),
        (lambda: oc.clip_singular_values(1.0, method="qr"), ValueError, "method must be one of ('svd',), got str 'qr'"),
        (lambda: oc.clip_singular_values(1.0, response=2), TypeError, "response must be a function, got int 2."),
        (lambda: oc.spectral_norm(jnp.ones(3), axis=(0, 1)), ValueError, "axis (0, 1) does not fit the leaf the root"),
        (lambda: oc.spectral_norm(jnp.ones((3, 3)), axis="0"), TypeError, "axis must be None, an int, a tuple of ints"),
    ],
)
def test_errors(call, kind, message):
    """A wrong argument is named, with its value and what is required."""
    with pytest.raises(kind, match=re.escape(message)):
        call()


@pytest.mark.full
def test_small_trees_follow_the_reference():
    """A tree with vectors and scalars beside a matrix follows the reference in float64."""
    for seed in range(3):
        tree = small(seed, 3.0)
        expected = jax.tree.map(np.float32, reference.singular_values(tree, 0.5))
        chex.assert_trees_all_close(step(hard(0.5), tree)[0], expected, atol=3e-4)

"""Against torch: the numbers of `clip_grad_norm_` and `clip_grad_value_`, and where we differ on purpose."""

import functools
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import trees
from trees import step

import optax_clip as oc

pytestmark = pytest.mark.full
torch = pytest.importorskip("torch", reason='torch is not installed: pip install "optax_clip[torch]"')

EPS = 1e-6  # which torch adds to the norm that it divides by
ORDERS = [1, 1.5, 2, 3, math.inf]
SHAPES = {"bias": (5,), "conv": (2, 2, 3, 4), "dense": (6, 5), "scale": ()}
by_order = pytest.mark.parametrize("ord", ORDERS)


def samples(count: int):
    """Trees of f32 leaves whose sizes differ by up to six decades, and a threshold near the norm of some."""
    for seed in range(count):
        random = np.random.default_rng(seed)
        size = 10.0 ** random.uniform(-3, 3)
        leaf = lambda shape: np.float32(size * 10.0 ** random.uniform(-3, 0) * random.normal(size=shape))  # noqa: B023
        yield {name: leaf(shape) for name, shape in SHAPES.items()}, np.float32(size * 10.0 ** random.uniform(-2, 2))


def of_torch(updates, clip):
    """The updates after a clip of torch, which changes gradients in place, and what it returned."""
    parameters = []
    for leaf in jax.tree.leaves(updates):
        parameter = torch.zeros(leaf.shape, requires_grad=True)
        parameter.grad = torch.tensor(leaf)
        parameters.append(parameter)
    returned = clip(parameters)
    return jax.tree.structure(updates).unflatten([p.grad.numpy() for p in parameters]), returned


def ours(make):
    """Clipped updates and norm for a traced threshold."""

    @jax.jit
    def one(updates, threshold):
        tx = make(threshold)
        clipped, state = tx.update(updates, tx.init(updates))
        return clipped, getattr(state, "norm", ())

    return one


@by_order
def test_global_norms_are_those_of_torch(ord):
    """Clipped updates and norm, but for the 1e-6 that torch adds, for any order, on both sides of the threshold."""
    clip, above = ours(lambda threshold: oc.clip_by_global_norm(threshold, ord=ord)), 0
    for updates, threshold in samples(100):
        clipped, norm = clip(updates, threshold)
        norms = lambda p: torch.nn.utils.clip_grad_norm_(p, float(threshold), norm_type=ord)  # noqa: B023
        expected, total_norm = of_torch(updates, norms)
        np.testing.assert_allclose(norm, float(total_norm), rtol=2e-5)
        room = 2 * trees.tolerance(jnp.float32) + EPS / max(float(norm), EPS)
        chex.assert_trees_all_equal_shapes_and_dtypes(clipped, expected)
        chex.assert_trees_all_close(clipped, expected, rtol=room, atol=1e-30)
        above += norm > threshold
    assert 10 <= above <= 90


@by_order
def test_norms_of_leaves_are_those_of_torch(ord):
    """`clip_by_leaf_norm` is `clip_grad_norm_` called for each parameter."""
    clip = ours(lambda threshold: oc.clip_by_leaf_norm(threshold, ord=ord))
    for updates, threshold in samples(100):
        one = lambda q: torch.nn.utils.clip_grad_norm_([q], float(threshold), norm_type=ord)  # noqa: B023
        expected, norms = of_torch(updates, lambda p: [one(q) for q in p])  # noqa: B023
        clipped, _ = clip(updates, threshold)
        for leaf, other, norm in zip(jax.tree.leaves(clipped), jax.tree.leaves(expected), norms):
            room = 2 * trees.tolerance(jnp.float32) + EPS / max(float(norm), EPS)
            np.testing.assert_allclose(leaf, other, rtol=room, atol=1e-30)


def test_values_are_those_of_torch():
    """Every entry is that of `clip_grad_value_`, to the bit."""
    clip = ours(oc.clip)
    for updates, threshold in samples(100):
        expected, _ = of_torch(updates, lambda p: torch.nn.utils.clip_grad_value_(p, float(threshold)))  # noqa: B023
        chex.assert_trees_all_equal(clip(updates, threshold)[0], expected)


def test_rows_and_orders_of_max_norm_are_those_of_torch():
    """`clip_weight_norm` along rows is `renorm`, which constrains embeddings in torch."""
    weights = np.float32(3.0 * np.random.default_rng(0).normal(size=(6, 5)))
    for ord in (1.0, 2.0, 3.0):
        updates, _ = step(oc.clip_weight_norm(2.0, -1, ord=ord), np.zeros_like(weights), params=weights)
        expected = torch.renorm(torch.tensor(weights), ord, 0, 2.0).numpy()
        assert not np.array_equal(expected, weights)
        np.testing.assert_allclose(weights + updates, expected, rtol=1e-5)


# Where we differ on purpose

# What torch answers is asserted for the version in which it was seen.
SEEN = torch.__version__.startswith("2.13.")
GRADS = {"a": np.float32([3.0, 4.0]), "b": np.float32([0.5])}
clip_global = functools.cache(lambda: ours(oc.clip_by_global_norm))


def by_torch(updates, bound):
    return of_torch(updates, lambda p: torch.nn.utils.clip_grad_norm_(p, bound))[0]


def test_an_inf_makes_all_entries_nan():
    """torch turns one inf into NaN and everything else into 0; here the step is loud."""
    updates = {"a": np.float32([np.inf, 4.0]), "b": GRADS["b"]}
    clipped, _ = clip_global()(updates, 1.0)
    assert all(np.isnan(leaf).all() for leaf in jax.tree.leaves(clipped))
    if SEEN:
        chex.assert_trees_all_equal(by_torch(updates, 1.0), {"a": np.float32([np.nan, 0.0]), "b": np.float32([0.0])})


def test_a_negative_bound_is_refused():
    """torch flips the gradient's sign."""
    with pytest.raises(ValueError, match="max_norm must be >= 0"):
        oc.clip_by_global_norm(-1.0)
    if SEEN:
        assert by_torch(GRADS, -1.0)["a"][0] < 0


def test_huge_and_tiny_norms():
    """torch's norms leave the range of f32 with the squares; ours do not."""
    for scale in (1e25, 1e-24):
        updates = jax.tree.map(lambda x, scale=scale: x * np.float32(scale), GRADS)
        clipped, norm = clip_global()(updates, scale)
        np.testing.assert_allclose(norm, math.sqrt(25.25) * scale, rtol=1e-6)
        np.testing.assert_allclose(trees.norm64(clipped), scale, rtol=1e-6)
        if SEEN:
            assert abs(trees.norm64(by_torch(updates, scale)) / scale - 1) > 0.01

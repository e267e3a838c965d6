"""Against torch: the numbers of `clip_grad_norm_` and `clip_grad_value_`, and where we differ on purpose."""

import functools
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import properties
import pytest
import trees
from hypothesis import given
from hypothesis import strategies as st

import optax_clip as oc

torch = pytest.importorskip("torch", reason='torch is not installed: pip install "optax_clip[torch]"')

EPS = 1e-6  # which torch adds to the norm that it divides by
# torch has no largest entry of an empty leaf.
with_entries = lambda leaf: leaf if leaf.size else jax.ShapeDtypeStruct((3,), leaf.dtype)
KINDS = [jax.tree.map(with_entries, tree) for tree in properties.pool(("float32", "float32", "float64"))]
ordinary = properties.updates_of(lowest=-3.0, highest=6.0, decades=6.0, kinds=KINDS, extremes=False)
orders = [1, 1.5, 2, 3, math.inf]


def torchs(updates, clip):
    """The updates after a clip of torch, which changes gradients in place, and what it returned."""
    parameters = []
    for leaf in jax.tree.leaves(updates):
        parameter = torch.zeros(leaf.shape, dtype=getattr(torch, leaf.dtype.name), requires_grad=True)
        parameter.grad = torch.tensor(leaf)
        parameters.append(parameter)
    returned = clip(parameters)
    return jax.tree.structure(updates).unflatten([p.grad.numpy() for p in parameters]), returned


@functools.cache
def compiled(ord):
    def update(updates, threshold):
        tx = oc.clip(threshold) if ord is None else oc.clip_by_global_norm(threshold, ord=ord)
        clipped, state = tx.update(updates, tx.init(updates))
        return clipped, () if ord is None else state.norm

    return jax.jit(update)


def ours(updates, threshold, ord=None):
    with properties.precision_of(updates):
        return jax.device_get(compiled(ord)(updates, np.float32(threshold)))


@given(ordinary, st.sampled_from(orders), properties.factors)
def test_global_norms_are_those_of_torch(updates, ord, factor):
    """Clipped updates and norm, but for the 1e-6 that torch adds, for any order, on both sides of the threshold."""
    norm = ours(updates, np.inf, ord)[1]
    threshold = float(np.float32(max(norm, 1e-3) * factor))
    clipped, _ = ours(updates, threshold, ord)
    expected, total_norm = torchs(updates, lambda p: torch.nn.utils.clip_grad_norm_(p, threshold, norm_type=ord))
    np.testing.assert_allclose(norm, float(total_norm), rtol=2e-5)
    room = 2 * trees.tolerance(jnp.float32) + EPS / max(norm, EPS)
    chex.assert_trees_all_equal_shapes_and_dtypes(clipped, expected)
    chex.assert_trees_all_close(clipped, expected, rtol=room, atol=1e-30)


@given(ordinary, st.sampled_from(orders), st.floats(-2.0, 6.0))
def test_norms_of_leaves_are_those_of_torch(updates, ord, power):
    """`clip_by_leaf_norm` is `clip_grad_norm_` called for each parameter."""
    threshold = 10.0**power
    clip = lambda p: [torch.nn.utils.clip_grad_norm_([q], threshold, norm_type=ord) for q in p]
    expected, norms = torchs(updates, clip)
    with properties.precision_of(updates):
        clipped = jax.device_get(by_leaf(ord)(updates, np.float32(threshold)))
    for leaf, other, norm in zip(jax.tree.leaves(clipped), jax.tree.leaves(expected), norms):
        room = 2 * trees.tolerance(jnp.float32) + EPS / max(float(norm), EPS)
        np.testing.assert_allclose(leaf, other, rtol=room, atol=1e-30)


@functools.cache
def by_leaf(ord):
    def update(updates, threshold):
        tx = oc.clip_by_leaf_norm(threshold, ord=ord)
        return tx.update(updates, tx.init(updates))[0]

    return jax.jit(update)


@given(ordinary, st.floats(-4.0, 6.0))
def test_values_are_those_of_torch(updates, power):
    """Every entry is that of `clip_grad_value_`, to the bit."""
    threshold = float(np.float32(10.0**power))
    expected, _ = torchs(updates, lambda p: torch.nn.utils.clip_grad_value_(p, threshold))
    properties.assert_same(ours(updates, threshold)[0], expected)


def test_rows_and_orders_of_max_norm_are_those_of_torch():
    """`clip_weight_norm` along rows is `renorm`, which constrains embeddings in torch."""
    weights = trees.sample(0, 3.0)["dense"]
    for ord in (1.0, 2.0, 3.0):
        tx = oc.clip_weight_norm(2.0, -1, ord=ord)
        updates, _ = tx.update(jnp.zeros_like(weights), tx.init(weights), weights)
        expected = torch.renorm(torch.tensor(np.asarray(weights)), ord, 0, 2.0).numpy()
        assert not np.array_equal(expected, weights)
        np.testing.assert_allclose(weights + updates, expected, rtol=1e-5)


# Where we differ on purpose

# What torch answers is asserted for the version in which it was seen.
SEEN = torch.__version__.startswith("2.13.")
GRADS = {"a": np.float32([3.0, 4.0]), "b": np.float32([0.5])}


def by_torch(updates, *args, **kwargs):
    return torchs(updates, lambda p: torch.nn.utils.clip_grad_norm_(p, *args, **kwargs))[0]


def test_an_inf_makes_all_entries_nan():
    """torch turns one inf into NaN and everything else into 0; here the step is loud."""
    updates = {"a": np.float32([np.inf, 4.0]), "b": GRADS["b"]}
    clipped, _ = ours(updates, 1.0, 2)
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
        clipped, norm = ours(updates, scale, 2)
        np.testing.assert_allclose(norm, math.sqrt(25.25) * scale, rtol=1e-6)
        np.testing.assert_allclose(trees.norm64(clipped), scale, rtol=1e-6)
        if SEEN:
            assert abs(trees.norm64(by_torch(updates, scale)) / scale - 1) > 0.01

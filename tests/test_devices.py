"""What is computed in other ways on other devices gives the same numbers; all ways run on this one."""

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

NORMS = {
    "global": oc.global_norm,
    "leaf": oc.leaf_norm,
    "unit": oc.unit_norm,
    "rms": oc.block_rms,
    "unit rms": functools.partial(oc.block_rms, axis=0),
}


@pytest.fixture(params=["cpu", "cuda", "default"])
def as_on(request, monkeypatch):
    """What runs on devices of this kind, on any."""
    choose = lambda *args, default, **others: others.get(request.param, default)(*args)
    monkeypatch.setattr(jax.lax, "platform_dependent", choose)
    jax.clear_caches()
    yield request.param
    jax.clear_caches()


EXPECTED = {  # of leaves of rank 1 and 2
    "global": lambda tree: reference.p_norm(reference.flat(tree)),
    "leaf": lambda tree: jax.tree.map(reference.p_norm, tree),
    "unit": lambda tree: jax.tree.map(lambda x: reference.p_norm(x, 2, 0), tree),
    "rms": lambda tree: jax.tree.map(reference.rms, tree),
    "unit rms": lambda tree: jax.tree.map(lambda x: reference.rms(x, 0), tree),
}


@pytest.mark.parametrize("name", NORMS)
def test_norms(as_on, name):
    """Over the range of f32, within leaves too, and for zeros, every way is exact."""
    random, norm = np.random.default_rng(0), jax.jit(NORMS[name])
    for exponent in (-88, -70, -62, -35, -3, 0, 20, 45, 60, 63, 64, 80, 100, 120):
        for spread in (0, 60):
            x = random.normal(size=(300, 7)) * 2.0 ** (exponent - spread * random.random((300, 7)))
            tree = {"a": np.float32(x), "b": np.float32(x[0]), "c": np.complex64(x[:5] + 1j * x[5:10])}
            tree["z"] = np.zeros((2, 3), np.float32)
            for actual, expected in zip(jax.tree.leaves(norm(tree)), jax.tree.leaves(EXPECTED[name](tree))):
                np.testing.assert_allclose(np.float64(actual), expected, rtol=1e-6, err_msg=f"2^{exponent}, {spread}")


@pytest.mark.parametrize(("scope", "clip"), [("leaf", oc.clip_by_leaf_norm), ("unit", oc.clip_by_unit_norm)])
def test_metrics(as_on, scope, clip):
    """Every way sums up the same, and has the derivatives of the norm of all blocks."""
    tx, grads = clip(1.0), trees.sample(0, shapes={"a": (5,), "b": (6, 5), "c": (3, 40)})
    metrics = jax.jit(lambda grads: oc.clip_metrics(tx.update(grads, tx.init(grads))[1]))
    norms = np.concatenate([np.ravel(n) for n in jax.tree.leaves(EXPECTED[scope](grads))])
    found, norm = metrics(grads), np.linalg.norm(norms)
    expected = [norm, np.mean(np.minimum(1 / norms, 1)), np.mean(norms > 1)]
    np.testing.assert_allclose([found[f"clip/{key}"] for key in ("norm", "scale", "clip_rate")], expected, rtol=1e-6)

    slopes = jax.grad(lambda grads: metrics(grads)["clip/norm"])
    slope_of_sum = jax.jit(jax.grad(lambda grads: sum(map(jnp.sum, jax.tree.leaves(slopes(grads))))))
    close = lambda tree, f: jax.tree.map(
        lambda x, g: np.testing.assert_allclose(x, f(g / norm), rtol=1e-4, atol=1e-6), tree, grads
    )
    total = sum(float(jnp.sum(leaf)) for leaf in jax.tree.leaves(grads)) / norm
    close(jax.jit(slopes)(grads), lambda unit: unit)
    close(slope_of_sum(grads), lambda unit: (1 - unit * total) / norm)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
def test_units_alike(as_on, kind, monkeypatch):
    """On one device GPUs take norms of one shape as one array; each unit is clipped as by itself, and counted once."""
    shapes = {"a": (6, 5), "b": (2, 5), "c": (3, 40), "d": (5,), "e": (4, 5), "f": (3, 5)}
    specs = dict.fromkeys(shapes, P()) | {"f": P(None, "x")}  # another type, on one device too
    tx = oc.adaptive_grad_clip({"a": 0.5, "b": 0.5, "c": 2.0, "d": 0.5, "e": None, "f": 0.5})
    step = lambda grads, params: tx.update(grads, tx.init(params), params)

    def on(count):
        """Updates and parameters on a mesh of so many devices, or where JAX puts them."""
        grads, params = (trees.sample(seed, shapes=shapes) for seed in (0, 1))
        grads["b"] = grads["b"].at[0, 0].set(jnp.nan)
        if not count:
            return grads, params
        placement = {name: NamedSharding(trees.mesh(kind, x=count), spec) for name, spec in specs.items()}
        return jax.device_put((grads, params), (placement, placement))

    def together(count):
        alike = 3 if count and kind == AxisType.Explicit else 4
        return f"[{alike},1,5" in str(jax.make_jaxpr(lambda *trees: step(*trees))(*on(count)))

    assert together(1) == (as_on == "cuda") and not together(5)
    for count in (1, 2):
        with monkeypatch.context() as patched:
            patched.setattr(jax, "device_count", lambda count=count: count)
            assert together(0) == (as_on == "cuda" and count == 1)
    clipped, state = jax.jit(step)(*on(1))
    for expected in step(*on(1)), jax.jit(step)(*on(0)):
        chex.assert_trees_all_close((clipped, state), expected, rtol=1e-6)
    assert jnp.isnan(clipped["b"]).all(axis=0).sum() == 1 and not jnp.isnan(clipped["a"]).any()


def test_norms_of_odd_leaves(as_on):
    """NaN, inf, no entries, and numbers at both ends of the range."""
    leaves = [[np.nan, 1.0], [-np.inf, 1.0], [], [3e38, 1e-30]]
    norms = oc.leaf_norm([jnp.array(leaf, jnp.float32) for leaf in leaves])
    np.testing.assert_allclose(norms, [np.nan, np.inf, 0, 3e38], rtol=1e-6)


def test_rescaled_weights(as_on):
    """Both extremes of a leaf are found by every way."""
    weights = trees.sample(0)["dense"]
    tx = oc.rescale_weights(-1.0, 2.0)
    updates, _ = tx.update(jnp.zeros_like(weights), tx.init(weights), weights)
    out = optax.apply_updates(weights, updates)
    expected = -1 + 3 * (weights - weights.min()) / (weights.max() - weights.min())
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-5)

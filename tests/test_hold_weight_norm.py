"""Norms of weights that are held where they were at `init`, and the recipe of Hyperball."""

import functools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from trees import mesh, small, step, tolerance

import optax_clip as oc
from optax_clip import hold_weight_norm, responses, thresholds

DTYPES = {"f16": jnp.float16, "bf16": jnp.bfloat16, "f32": jnp.float32, "f64": jnp.float64}
HOLD = hold_weight_norm()


def normal(*shape, seed=0, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def norm64(x, axis=None):
    return np.sqrt((np.asarray(x, np.float64) ** 2).sum(axis=axis))


def landed(tx, weights, updates, state=None):
    updates, state = step(tx, updates, state, weights)
    return optax.apply_updates(weights, updates), state


# What is held


def test_weights_land_where_float64_says():
    """A matrix lands on its direction after the step, at its norm of before; vectors and scalars are left alone."""
    weights, updates = small(0), small(1)
    new, state = step(HOLD, updates, params=weights)
    after, held = (np.asarray(weights["dense"], np.float64) + updates["dense"]), norm64(weights["dense"])
    np.testing.assert_allclose(weights["dense"] + new["dense"], after / norm64(after) * held, rtol=1e-6, atol=1e-6)
    for name in ("bias", "scale"):
        chex.assert_trees_all_equal(new[name], updates[name])
    chex.assert_shape(state.rule, ())
    chex.assert_trees_all_close((state.norm, state.threshold), (norm64(after), held), rtol=1e-6)
    assert oc.clip_metrics(state)["clip/threshold"] == state.rule


@pytest.mark.parametrize(("name", "rtol"), [("f32", 2.5e-7), ("bf16", 2.5e-4), ("f16", 5e-4), ("f64", 1e-15)])
def test_norms_do_not_drift(name, rtol):
    """After each of 200 steps the norm is that of before the first, to a few roundings of the weights."""
    with jax.enable_x64(name == "f64"):
        weights = {"w": normal(64, 96, dtype=DTYPES[name])}
        held = norm64(weights["w"])

        def body(carry, grads):
            weights, state = carry
            updates, state = HOLD.update({"w": (grads * 0.1).astype(weights["w"].dtype)}, state, weights)
            weights = optax.apply_updates(weights, updates)
            return (weights, state), weights["w"]

        grads = normal(200, 64, 96, seed=1, dtype=DTYPES[name])
        (_, state), after = jax.jit(lambda w, g: jax.lax.scan(body, (w, HOLD.init(w)), g))(weights, grads)
        assert state.rule.dtype == (jnp.float64 if name == "f64" else jnp.float32)
    np.testing.assert_allclose(norm64(after, (1, 2)), held, rtol=rtol)


def test_blocks_of_norm_0_at_init_are_left_alone():
    """A matrix that starts at 0 may grow; its updates keep every bit."""
    weights = {"zero": jnp.zeros((3, 4)), "w": normal(3, 4)}
    updates = {"zero": normal(3, 4, seed=1), "w": normal(3, 4, seed=2)}
    new, state = step(HOLD, updates, params=weights)
    chex.assert_trees_all_equal(new["zero"], updates["zero"])
    weights = optax.apply_updates(weights, new)
    again, state = step(HOLD, updates, state, weights)
    chex.assert_trees_all_equal(again["zero"], updates["zero"])
    np.testing.assert_array_equal(np.sort(state.rule), [0.0, norm64(normal(3, 4)).astype(np.float32)])


def test_a_step_that_ends_at_0_is_not_taken():
    """A block that would be exactly 0 stays where it was, and goes on from there."""
    weights = {"w": normal(3, 4), "v": normal(2, 2, seed=1)}
    new, state = step(HOLD, {"w": -weights["w"], "v": 0.1 * weights["v"]}, params=weights)
    chex.assert_trees_all_equal(new["w"], jnp.zeros((3, 4)))
    np.testing.assert_allclose(norm64(weights["v"] + new["v"]), norm64(weights["v"]), rtol=1e-6)
    after, _ = landed(HOLD, weights, {"w": normal(3, 4, seed=2), "v": new["v"]}, state)
    np.testing.assert_allclose(norm64(after["w"]), norm64(weights["w"]), rtol=1e-6)


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf, 3e38])
def test_a_block_that_is_not_finite_becomes_nan(bad):
    """The block is NaN, other blocks and the norms in the state are as without it."""
    weights = {"w": normal(3, 4), "v": normal(2, 2, seed=1)}
    updates = {"w": jnp.full((3, 4), bad), "v": normal(2, 2, seed=2)}
    new, state = step(HOLD, updates, params=weights)
    assert jnp.isnan(new["w"]).all()
    expected, _ = step(HOLD, {"w": weights["w"], "v": updates["v"]}, params=weights)
    chex.assert_trees_all_equal(new["v"], expected["v"])
    chex.assert_trees_all_equal(state.rule, HOLD.init(weights).rule)


@pytest.mark.parametrize("scale", [1e-20, 1e-8, 1e15, 1e30])
def test_weights_of_all_sizes(scale):
    """Norms from 1e-20 to 1e30 are held, also from steps that are far larger or smaller."""
    weights = {"w": normal(3, 4) * scale}
    for factor in (1e-3, 1.0, 1e4):
        after, _ = landed(HOLD, weights, {"w": normal(3, 4, seed=1) * scale * factor})
        np.testing.assert_allclose(norm64(after["w"]) / norm64(weights["w"]), 1, rtol=5e-4 if factor > 1 else 1e-6)


def test_updates_keep_their_dtype_and_their_bits_where_the_norm_is_right():
    """Updates keep their dtype beside parameters of others; an update of 0 stays 0."""
    for of_weight, of_update in (("f32", "bf16"), ("bf16", "f32"), ("bf16", "bf16"), ("f16", "f16")):
        weights = {"w": jnp.array([[3.0, 4.0]], DTYPES[of_weight])}
        zeros = {"w": jnp.zeros((1, 2), DTYPES[of_update])}
        new, _ = step(HOLD, zeros, params=weights)
        chex.assert_trees_all_equal(new, zeros)
        assert new["w"].dtype == DTYPES[of_update]
        after, _ = landed(HOLD, weights, {"w": jnp.array([[0.0, 1.0]], DTYPES[of_update])})
        np.testing.assert_allclose(norm64(after["w"]), 5, rtol=tolerance(DTYPES["bf16"]))


# Blocks of other kinds

STACKED = functools.partial(oc.unit_norm, axis=(1, 2))


def test_matrices_in_a_stack():
    """With a norm over the last two axes each matrix of a stack is held by itself."""
    weights, updates = {"w": normal(3, 4, 5)}, {"w": normal(3, 4, 5, seed=1)}
    after, state = landed(hold_weight_norm(STACKED), weights, updates)
    np.testing.assert_allclose(norm64(after["w"], (1, 2)), norm64(weights["w"], (1, 2)), rtol=3e-7)
    chex.assert_shape(state.rule, (3, 1, 1))
    assert state.threshold is None


def test_norms_of_trees_and_groups():
    """A norm of the whole tree or of groups is held as a whole, vectors included."""
    weights, updates = small(0), small(1)
    after, _ = landed(hold_weight_norm(oc.global_norm), weights, updates)
    chex.assert_trees_all_close(oc.global_norm(after), oc.global_norm(weights), rtol=3e-7)
    groups = oc.group_norm({"bias": "a", "dense": "a", "scale": None})
    tx = hold_weight_norm(groups)
    new, state = step(tx, updates, params=weights)
    after = groups(optax.apply_updates(weights, new)).norms["a"]
    chex.assert_trees_all_close((after, state.rule), (groups(weights).norms["a"],) * 2, rtol=3e-7)
    chex.assert_trees_all_equal(new["scale"], updates["scale"])


def test_complex_and_f64_leaves():
    """Complex matrices keep their phases; a norm of an f64 leaf is f64, beside f32 norms of others."""
    with jax.enable_x64(True):
        weights = {"c": normal(2, 3) + 1j * normal(2, 3, seed=1), "d": normal(2, 3, dtype=jnp.float64)}
        updates = jax.tree.map(lambda w: w * 0.5, weights)
        new, state = step(HOLD, updates, params=weights)
        chex.assert_trees_all_close(new, jax.tree.map(jnp.zeros_like, weights), atol=1e-6)
        assert sorted(x.dtype.name for x in jax.tree.leaves(state.rule)) == ["float32", "float64"]
        assert abs(np.asarray(new["d"])).max() < 1e-15


# Hyperball


def hyperball64(weights, grads, rate, b1=0.9, b2=0.95, eps=1e-8):
    """W ← R · normalize(W - rate · R · normalize(u)), u of Adam, R the norm of W before the first step."""
    held, mu, nu, w = norm64(weights), 0.0, 0.0, np.asarray(weights, np.float64)
    for t, g in enumerate(np.asarray(grads, np.float64), 1):
        mu, nu = b1 * mu + (1 - b1) * g, b2 * nu + (1 - b2) * g**2
        u = mu / (1 - b1**t) / (np.sqrt(nu / (1 - b2**t)) + eps)
        w = w - rate * held * u / norm64(u)
        w = w * held / norm64(w)
    return w


def hyperball(rate):
    """The recipe of docs/weights.md."""
    return optax.chain(
        optax.scale_by_adam(0.9, 0.95),
        oc.clip_by_norm(oc.leaf_norm, thresholds.param_fraction(1.0, eps=0.0), responses.normalize),
        optax.scale_by_learning_rate(rate),
        hold_weight_norm(),
    )


@pytest.mark.parametrize(("steps", "rtol"), [(5, 5e-7), (200, 2e-6)])
@pytest.mark.parametrize("name", ["f32", "bf16"])
def test_hyperball_is_its_published_rule(name, steps, rtol):
    """The recipe agrees with the rule in float64, relative to the norm; in bf16 to the roundings of the weights."""
    tx, weights = hyperball(0.01), normal(32, 48, dtype=DTYPES[name])
    grads = normal(steps, 32, 48, seed=1) + 0.3 * normal(32, 48, seed=2)

    def body(carry, g):
        w, state = carry
        updates, state = tx.update(g.astype(w.dtype), state, w)
        return (optax.apply_updates(w, updates), state), None

    (after, _), _ = jax.jit(lambda w, g: jax.lax.scan(body, (w, tx.init(w)), g))(weights, grads)
    error = norm64(np.asarray(after, np.float64) - hyperball64(weights, grads, 0.01)) / norm64(weights)
    assert error < (rtol if name == "f32" else 0.01 if steps == 5 else 0.1), error


def test_hyperball_turns_by_the_learning_rate():
    """Weights turn by the same angle whatever their size, and whatever that of the gradient."""
    angles = []
    for scale in (1.0, 1e-3, 1e3):
        tx, weights = hyperball(0.1), normal(8, 8) * scale
        after, _ = landed(tx, weights, normal(8, 8, seed=1) * 10 / scale)
        angles.append(np.arccos(np.sum(np.asarray(after, np.float64) * weights) / norm64(after) / norm64(weights)))
    np.testing.assert_allclose(angles, angles[0], rtol=1e-4)
    assert 0.08 < angles[0] < 0.11


# Errors

SHAPES, MATRIX = {"w": jax.ShapeDtypeStruct((2, 3), jnp.float32)}, {"w": jnp.ones((2, 3))}
REFUSED = {
    "norm must be a function, got float": lambda: hold_weight_norm(1.0),
    "axis_name must be None where norm is given": lambda: hold_weight_norm(oc.leaf_norm, axis_name="data"),
    "params must be arrays at init, got shapes.*eval_shape": lambda: HOLD.init(SHAPES),
    "params are missing": lambda: HOLD.update({"w": jnp.ones((2, 3))}, HOLD.init({"w": jnp.ones((2, 3))})),
    "state must be a ClipState, got .*a history": lambda: HOLD.update(MATRIX, (), MATRIX),
    "state must hold a history of shape": lambda: HOLD.update(
        {"w": jnp.ones((2, 3))}, HOLD.init({"w": jnp.ones((2, 3)), "v": jnp.ones((2, 3))}), {"w": jnp.ones((2, 3))}
    ),
}


@pytest.mark.parametrize("text", REFUSED)
def test_what_is_refused(text):
    """The message begins with the argument and says what is wrong with it."""
    with pytest.raises((TypeError, ValueError), match="^" + text):
        REFUSED[text]()


def test_a_restored_state_holds_the_norms_of_the_first_init():
    """The norms are those of the params that `init` saw: of a state that is kept, not of the weights at hand."""
    weights, updates = {"w": normal(3, 4)}, {"w": normal(3, 4, seed=1)}
    state = HOLD.init(weights)
    after, _ = landed(HOLD, {"w": 2 * weights["w"]}, updates, state)
    np.testing.assert_allclose(norm64(after["w"]), norm64(weights["w"]), rtol=1e-6)


# On many devices

W, B, U, V = normal(16, 12), normal(12, seed=1), normal(16, 12, seed=2), normal(12, seed=3)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_sharded_arrays(kind):
    """Under jit the answer is that of one device, and only numbers are sent: one for each block, one for metrics."""
    expected = step(HOLD, {"w": U, "b": V}, params={"w": W, "b": B})
    devices = mesh(kind, data=4)
    spread, whole = (NamedSharding(devices, spec) for spec in (P("data"), P()))
    weights, updates = (
        jax.device_put(tree, {"w": spread, "b": whole}) for tree in ({"w": W, "b": B}, {"w": U, "b": V})
    )
    with jax.set_mesh(devices):
        state = jax.jit(HOLD.init)(weights)
        program = jax.jit(HOLD.update).lower(updates, state, weights).compile()
        new = program(updates, state, weights)
    chex.assert_trees_all_close(jax.device_get(new), jax.device_get(expected), rtol=1e-6, atol=1e-6)
    assert new[0]["w"].sharding.is_equivalent_to(spread, 2)
    sent = re.findall(r"= (\S+) (?:all|collective|reduce-scatter)[\w-]*\(", program.as_text())
    assert len(sent) <= 2 and all(re.match(r"f(32|64)\[\]", kind) for kind in sent), sent


@pytest.mark.parametrize("check_vma", [True, False])
def test_inside_shard_map(check_vma):
    """Spread matrices are held by their whole norm, from an `init` inside or outside."""
    tx = HOLD if check_vma else hold_weight_norm(axis_name={"w": "data", "b": ()})
    specs = {"w": P("data"), "b": P()}
    args = {"w": U, "b": V}, {"w": W, "b": B}
    expected = step(HOLD, args[0], params=args[1])
    for init in (lambda w, s: tx.init(w), lambda w, s: s):
        run = jax.shard_map(
            lambda u, w, s, init=init: tx.update(u, init(w, s), w), mesh=mesh(data=4),
            in_specs=(specs, specs, P()), out_specs=(specs, P()), check_vma=check_vma,
        )  # fmt: skip
        new = jax.jit(run)(*args, HOLD.init(args[1]))
        chex.assert_trees_all_close(jax.device_get(new), jax.device_get(expected), rtol=1e-6, atol=1e-6)
    if not check_vma:
        with pytest.raises(ValueError, match=r"^axis_name is missing"):
            jax.shard_map(HOLD.init, mesh=mesh(data=4), in_specs=(specs,), out_specs=P(), check_vma=False)(args[1])


def test_stacks_split_over_devices_inside_shard_map():
    """Norms of matrices of a stack that is split by layers stay where the layers are."""
    tx = hold_weight_norm(functools.partial(oc.unit_norm, axis=(1, 2), axis_name=()))
    weights, updates = normal(4, 3, 5), normal(4, 3, 5, seed=1)
    inside = jax.shard_map(
        lambda u, w: tx.update(u, tx.init(w), w)[0], mesh=mesh(data=4), in_specs=P("data"), out_specs=P("data")
    )
    expected, _ = step(hold_weight_norm(STACKED), updates, params=weights)
    chex.assert_trees_all_close(jax.device_get(jax.jit(inside)(updates, weights)), expected, rtol=1e-6, atol=1e-6)

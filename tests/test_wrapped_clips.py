"""Wrappers around a clip: what was clipped away is carried, or a random part is clipped."""

import functools
import pickle

import chex
import clips
import jax
import jax.numpy as jnp
import numpy as np
import optax
import properties  # noqa: F401  loads the profile of hypothesis
import pytest
import trees
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from test_contract import once, pair, run, stack, types
from test_programs import ENTRIES, compiled_step, entry

import optax_clip as oc
from optax_clip import _wrappers

INNER = {case.name: functools.partial(case.make, 0.5) for case in clips.CLIPS} | {
    "zclip": lambda: oc.zclip(1.0, 0.9, 2),
    "autoclip": lambda: oc.autoclip(50.0, 4),
    "chain": lambda: optax.chain(oc.clip_by_global_norm(1.0), oc.clip(0.1)),
}
WRAPPED = {
    "feedback": lambda clip: oc.with_error_feedback(clip),
    "random_elements": lambda clip: oc.clip_randomly(clip, 0.5, 3),
    "random_leaves": lambda clip: oc.clip_randomly(clip, 0.5, 3, per="leaf"),
}
wrapped = pytest.mark.parametrize("wrap", WRAPPED)


def assert_close(actual, expected):
    chex.assert_trees_all_equal_shapes_and_dtypes(actual, expected)
    chex.assert_trees_all_close(actual, expected, rtol=1e-5, atol=1e-6)


@wrapped
def test_params_and_extra_arguments_reach_the_clip(wrap):
    """What is wrapped gets params and extra keyword arguments."""

    def update(updates, state, params=None, *, value, **extra_args):
        del extra_args
        return jax.tree.map(lambda u, p: value * p, updates, params), state

    tx = WRAPPED[wrap](optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update))
    params, updates = pair(9), pair(0)
    step = jax.jit(lambda updates, state: tx.update(updates, state, params, value=jnp.float32(2.0), unused=1.0)[0])
    out = step(updates, tx.init(params))
    came = jax.tree.map(lambda x, p: np.asarray(x == 2.0 * p), out, params)
    assert any(leaf.any() for leaf in jax.tree.leaves(came))
    chex.assert_trees_all_equal(out, jax.tree.map(lambda c, p, u: jnp.where(c, 2.0 * p, u), came, params, updates))


# Error feedback


@pytest.mark.parametrize("name", INNER)
def test_sums_are_kept(name):
    """For any clip, the sum of the updates that come out, plus the carry, is the sum of those that went in."""
    tx, params, samples = oc.with_error_feedback(INNER[name]()), pair(9), [pair(i, 2.0) for i in range(20)]
    out, state = run(tx, samples, params, once(tx.update))
    total = jax.tree.map(lambda *leaves: np.sum([np.float64(x) for x in leaves], axis=0), *out)
    kept = jax.tree.map(lambda x, carry: x + np.float64(carry), total, state.carry)
    given_ = jax.tree.map(lambda *leaves: np.sum([np.float64(x) for x in leaves], axis=0), *samples)
    chex.assert_trees_all_close(kept, given_, rtol=1e-5, atol=1e-4)
    if name not in ("zclip", "autoclip"):
        assert max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(state.carry)) > 0.1


@given(
    st.lists(st.floats(-1e3, 1e3, width=32), min_size=1, max_size=30),
    st.floats(0.0, 100.0, width=32),
    st.sampled_from(["float32", "bfloat16", "float16"]),
)
def test_sums_are_kept_for_any_gradients(gradients, bound, dtype):
    """To rounding in f32, whatever the dtype of the updates, and to the bit where nothing is rounded."""
    gradients = np.asarray(np.array(gradients).astype(jnp.dtype(dtype)))
    tx = oc.with_error_feedback(oc.clip(bound))
    step = step_of_clip()
    state, out = tx.init(jnp.zeros((), dtype)), []
    for gradient in gradients:
        update, carry = step(jnp.asarray(gradient), state.carry, jnp.float32(bound))
        state = state._replace(carry=carry)
        assert update.dtype == gradient.dtype and carry.dtype == jnp.float32
        assert abs(float(update)) <= float(np.float32(bound).astype(update.dtype))
        out.append(float(update))
    size = np.abs(gradients.astype(np.float64)).sum() + np.abs(out).sum()
    error = gradients.astype(np.float64).sum() - sum(out) - float(state.carry)
    assert abs(error) <= len(out) * (2.0**-23 * size + 2.0**-126)  # below which processors flush


@functools.cache
def step_of_clip():
    """One compiled step of the clip of an entry with feedback, in which the bound may change."""

    def step(gradient, carry, bound):
        tx = oc.with_error_feedback(oc.clip(bound))
        state = tx.init(gradient)
        update, state = tx.update(gradient, state._replace(carry=carry))
        return update, state.carry

    return jax.jit(step)


def test_updates_follow_the_rule():
    """u = clip(g + d), d = g + d - u, for 50 steps, for each entry."""
    random = np.random.default_rng(0)
    tx, carry, state = oc.with_error_feedback(oc.clip(1.0)), np.zeros(7), None
    state, step = tx.init(jnp.zeros(7)), once(tx.update)
    for _ in range(50):
        gradient = np.float32(2 * random.standard_t(2, size=7))
        update, state = step(jnp.asarray(gradient), state)
        expected = np.clip(gradient + carry, -1, 1)
        carry = gradient + carry - expected
        chex.assert_trees_all_close((np.float64(update), np.float64(state.carry)), (expected, carry), atol=1e-4)


def test_feedback_removes_the_bias_of_clipping():
    """Of gradients whose rare large values carry the mean, clipped ones miss it and those with feedback do not."""
    random = np.random.default_rng(0)
    gradients = jnp.asarray(np.where(random.random(4000) < 0.05, 15.0, -0.25), jnp.float32)[:, None]  # mean 0.51
    mean = lambda tx: float(
        jax.lax.scan(lambda state, g: tx.update(g, state)[::-1], tx.init(jnp.zeros(1)), gradients)[1].mean()
    )
    assert mean(oc.clip(1.0)) == pytest.approx(-0.19, abs=0.02)
    assert mean(oc.with_error_feedback(oc.clip(1.0))) == pytest.approx(float(gradients.mean()), abs=0.05)


def test_what_is_not_clipped_is_untouched():
    """While nothing is clipped, updates keep every bit in every dtype and the carry stays 0."""
    for tree in (
        trees.mixed(0),
        pair(0),
        {"x": jnp.array([1e-40, -0.0, 3e38])},
        {"x": jnp.float16([6e-8, -4e-6, 5e-5])},
    ):
        tx = oc.with_error_feedback(oc.clip(1e39))
        out, state = jax.jit(tx.update)(tree, tx.init(tree))
        chex.assert_trees_all_equal_shapes_and_dtypes(out, tree)
        bits = lambda leaf: np.asarray(leaf).view(f"u{leaf.dtype.itemsize}")
        subnormal = lambda leaf: np.abs(np.asarray(leaf, np.float64)) < 2.0**-126  # which processors flush in sums
        for leaf, expected in zip(jax.tree.leaves(out), jax.tree.leaves(tree)):
            kept = ~subnormal(expected) & (np.asarray(expected, np.float64) != 0)
            np.testing.assert_array_equal(bits(leaf)[kept], bits(expected)[kept])
        assert not any(leaf.any() for leaf in jax.tree.leaves(state.carry))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ["clip", "clip_by_global_norm", "clip_by_leaf_norm"])
def test_a_bad_step_does_not_enter_the_carry(name, bad):
    """Where an update is not finite the carry stays; the step itself is as the clip makes it."""
    tx, params = oc.with_error_feedback(INNER[name]()), pair(9)
    updates = pair(1, 3.0)
    _, before = run(tx, [pair(0, 3.0)], params)
    updates["dense"] = updates["dense"].at[1, 2].set(bad)
    out, after = jax.jit(tx.update)(updates, before, params)
    chex.assert_tree_all_finite(after.carry)
    assert after.carry["dense"][1, 2] == before.carry["dense"][1, 2]
    if name == "clip":
        assert jnp.isnan(out["dense"][1, 2]) if np.isnan(bad) else out["dense"][1, 2] == np.sign(bad) * 0.5
    else:
        assert jnp.isnan(out["dense"]).all()
        chex.assert_trees_all_equal(after.carry["dense"], before.carry["dense"])
    if name == "clip_by_leaf_norm":
        assert jnp.isfinite(out["bias"]).all() and (after.carry["bias"] != before.carry["bias"]).any()


@pytest.mark.parametrize("dtype", [None, jnp.float32, jnp.bfloat16, "float16"])
def test_dtype_of_the_carry(dtype):
    """The carry is f32 unless asked for otherwise; updates keep their dtypes."""
    params = {**trees.mixed(0), "complex": jnp.ones(2, jnp.complex64)}
    tx = oc.with_error_feedback(oc.clip_by_leaf_norm(0.5), accumulator_dtype=dtype)
    state = tx.init(params)
    for key, leaf in state.carry.items():
        assert leaf.dtype == (jnp.complex64 if key == "complex" else jnp.dtype(dtype or jnp.float32))
        assert leaf.shape == params[key].shape
    out, new_state = jax.jit(tx.update)(params, state)
    chex.assert_trees_all_equal_shapes_and_dtypes(out, params)
    assert types(new_state) == types(state)


def test_rounding_of_updates_is_carried():
    """What bf16 updates lose to rounding comes back: a constant gradient that bf16 cannot hold comes out on average."""
    with jax.numpy_dtype_promotion("standard"):
        tx = oc.with_error_feedback(oc.clip_by_global_norm(1.0))
        gradient = jnp.full(3, 1.0, jnp.bfloat16)  # each entry comes out as 1 / sqrt(3)
        state, total = tx.init(gradient), np.zeros(3)
        out, state = jax.jit(tx.update)(gradient, state)
        total = np.asarray(out, np.float64) + np.asarray(state.carry, np.float64)
        chex.assert_trees_all_close(total, np.ones(3), rtol=1e-6)
        assert abs(float(out[0]) - 3**-0.5) > 1e-5  # rounded, so the carry is not what f32 would have left


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.float8_e4m3fn])
def test_sums_beyond_the_range_of_the_updates_are_carried(dtype):
    """A finite sum above the largest number of the updates' dtype comes out as that, and the rest is carried."""
    largest = float(jnp.finfo(dtype).max)
    tx = oc.with_error_feedback(oc.clip_by_global_norm(1e9))
    state = tx.init(jnp.zeros(1, dtype))._replace(carry=jnp.full(1, 0.5 * largest))
    out, state = jax.jit(tx.update)(jnp.full(1, largest, dtype), state)
    assert float(out[0]) == largest and float(state.carry[0]) == 0.5 * largest
    narrow = oc.with_error_feedback(oc.clip(1.0), accumulator_dtype=jnp.float16)
    _, state = run(narrow, [jnp.full(1, 6e4)] * 3, jnp.zeros(1))
    assert float(state.carry[0]) == 65504


def test_tiny_updates_of_f16_are_rounded_once():
    """Updates among the subnormal numbers of their dtype are the nearest ones, and the carry has the rest."""
    tx = oc.with_error_feedback(optax.scale(1 / 3))
    x = jnp.float16([3e-6, 5e-7, 6.1e-5, 2e-4, 6e-8])
    out, state = once(tx.update)(x, tx.init(x))
    np.testing.assert_array_equal(out, (np.float32(x) * np.float32(1 / 3)).astype(np.float16))
    np.testing.assert_allclose(state.carry, np.float32(x) - np.float32(out), atol=1e-12)


def test_f64_carry():
    """With 64 bits, f64 leaves carry in f64."""
    with jax.enable_x64(True):
        params = {"wide": jnp.zeros(2, jnp.float64), "narrow": jnp.zeros(2, jnp.float32)}
        tx = oc.with_error_feedback(oc.clip(1.0))
        out, state = tx.update(jax.tree.map(lambda x: x + 1.5, params), tx.init(params))
        assert (state.carry["wide"].dtype, state.carry["narrow"].dtype) == (jnp.float64, jnp.float32)
        chex.assert_trees_all_equal_shapes_and_dtypes(out, params)


# Random clipping


def share_clipped(tx, updates, steps=1):
    """For each step, which entries came out changed."""
    state, step, out = tx.init(updates), once(tx.update), []
    for _ in range(steps):
        new, state = step(updates, state)
        out.append(jax.tree.map(lambda a, b: np.asarray(a != b), new, updates))
    return out


@pytest.mark.parametrize("probability", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_the_share_that_is_clipped(probability):
    """It is the probability, to five standard deviations; 0 and 1 are never and always."""
    updates = {
        "matrix": jnp.full((300, 400), 3.0),
        "vector": jnp.full(50_000, 3.0),
        "conv": jnp.full((3, 3, 40, 50), 3.0),
    }
    masks = share_clipped(oc.clip_randomly(oc.clip(1.0), probability), updates, 3)
    for mask in masks:
        for leaf in mask.values():
            assert abs(leaf.mean() - probability) <= 5 * (probability * (1 - probability) / leaf.size) ** 0.5
    masks = share_clipped(oc.clip_randomly(oc.clip(1.0), probability, per="leaf"), [jnp.full(2, 3.0)] * 20, 100)
    masks = np.array(masks)  # [steps, leaves, entries]
    assert (masks.all(axis=2) == masks.any(axis=2)).all()
    assert abs(masks.mean() - probability) <= 5 * (probability * (1 - probability) / 2000) ** 0.5
    if 0 < probability < 1:  # neither the same leaves in each step, nor all of a step together
        assert masks.any(axis=(0, 2)).all() and not masks.all(axis=(1, 2)).all()


def test_draws_are_independent():
    """Neighbors along every axis, leaves of one shape, steps and seeds agree in half of all entries, as coins do."""
    updates = [jnp.full((512, 512), 3.0)] * 2
    masks = [
        leaf
        for seed in (0, 1, 2)
        for step in share_clipped(oc.clip_randomly(oc.clip(1.0), 0.5, seed), updates, 3)
        for leaf in step
    ]
    bound = 5 * 0.5 / 512
    for i, mask in enumerate(masks):
        for shift in ((1, 0), (0, 1), (1, 1), (2, 0), (0, 2), (16, 0), (0, 16), (0, 256), (256, 0)):
            assert abs((mask == np.roll(mask, shift, (0, 1))).mean() - 0.5) < bound
        assert all(abs((mask == other).mean() - 0.5) < bound for other in masks[:i])
        # Counts in rows, columns and squares of 16 are as spread as those of coins.
        for count, of in ((mask.sum(0), 512), (mask.sum(1), 512), (blocks(mask).sum((1, 3)), 256)):
            assert 0.75 < count.var() / (of / 4) < 1.3


def blocks(mask):
    return mask.reshape(32, 16, 32, 16)


def test_draws_of_low_and_high_probability_are_nested_uniform():
    """The draws behind the choice are uniform: the shares of 20 probabilities pass a chi-square test."""
    updates = jnp.full((400, 500), 3.0)
    edges = np.linspace(0, 1, 21)
    counts = np.diff([share_clipped(oc.clip_randomly(oc.clip(1.0), p, 7), updates)[0].sum() for p in edges])
    expected = updates.size / 20
    assert ((counts - expected) ** 2 / expected).sum() < 50  # 20 degrees of freedom less one: p < 1e-4


def test_draws_are_mixed_as_by_murmur():
    """The words of entries are mixed by the finalizer of MurmurHash3, whose quality is known."""
    assert _wrappers._mixed(jnp.uint32(1)) == 0x514E28B7
    numbers = [0, 3, 0x12345678, 0xFFFFFFFF]
    for number, found in zip(numbers, np.asarray(_wrappers._mixed(jnp.asarray(numbers, jnp.uint32)))):
        for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, 1)):
            number = (number ^ number >> shift) * factor % 2**32
        assert int(found) == number


def test_draws_do_not_depend_on_the_default_generator():
    """Keys are threefry, whatever jax is told to use for others."""
    updates = jnp.full(100, 3.0)
    expected = share_clipped(oc.clip_randomly(oc.clip(1.0), 0.5), updates)
    with jax.default_prng_impl("rbg"):
        chex.assert_trees_all_equal(share_clipped(oc.clip_randomly(oc.clip(1.0), 0.5), updates), expected)


def test_a_seed_gives_the_same_draws():
    """The same seed, as int, NumPy int or traced, gives the same draws, another one others; keys work too."""
    updates = jnp.full(1000, 3.0)
    mask = lambda seed: share_clipped(oc.clip_randomly(oc.clip(1.0), 0.5, seed), updates)[0]
    same = [mask(seed) for seed in (5, np.int64(5), jnp.int32(5), jax.random.PRNGKey(5))]
    assert all((other == same[0]).all() for other in same)
    others = [mask(6), mask(jax.random.key(5)), mask(jax.random.key(5, impl="rbg")), mask(-1)]
    assert all(0.4 < (other == same[0]).mean() < 0.6 for other in others)

    def of_seed(seed):
        tx = oc.clip_randomly(oc.clip(1.0), 0.5, seed)
        return tx.update(updates, tx.init(updates))[0]

    many = jax.jit(jax.vmap(of_seed))(jnp.array([5, 6]))
    chex.assert_trees_all_equal(many[0] != 3.0, jnp.asarray(same[0]))
    chex.assert_trees_all_equal(many[1] != 3.0, jnp.asarray(others[0]))


def test_the_clip_sees_all_updates():
    """Norms are those of all updates; what is not drawn passes bit for bit; odd leaves come as the clip gives them."""
    updates = pair(0, 3.0)
    tx = oc.clip_randomly(oc.clip_by_global_norm(1.0), 0.5, 1)
    out, state = jax.jit(tx.update)(updates, tx.init(updates))
    alone = oc.clip_by_global_norm(1.0)
    clipped, alone_state = jax.jit(alone.update)(updates, alone.init(updates))
    chex.assert_trees_all_close(state.inner_state, alone_state, rtol=1e-6)
    assert oc.clip_metrics(state)["clip/norm"] == alone_state.norm
    for x, y, z in zip(*map(jax.tree.leaves, (out, updates, clipped))):
        chex.assert_trees_all_close(jnp.minimum(jnp.abs(x - y), jnp.abs(x - z)), jnp.zeros_like(x), atol=1e-6)


def test_a_traced_probability_may_change():
    """The probability is an argument of the step, without a second trace."""
    updates = jnp.full(10_000, 3.0)
    state = oc.clip_randomly(oc.clip(1.0), 0.5).init(updates)
    step = once(lambda p, state: oc.clip_randomly(oc.clip(1.0), p).update(updates, state))
    for p in (0.25, 0.75):
        out, state = step(p, state)
        assert float((out == 1.0).mean()) == pytest.approx(p, abs=0.03)


def test_rows_are_no_windows_of_one_sequence():
    """No row of a large matrix repeats a part of another, shifted: every window of 64 draws is there once."""
    tx, updates = oc.clip_randomly(oc.clip(1.0), 0.5), jnp.full((4096, 2048), 3.0)
    mask = np.asarray(jax.jit(tx.update)(updates, tx.init(updates))[0] == 1.0)
    windows = np.packbits(mask.reshape(4096, 32, 64), axis=2)
    # A pair of rows that overlap would show windows of one in the other at any shift: those of the first 64 columns.
    starts = {row[:64].tobytes() for row in mask}
    assert len(starts) == 4096 and len(np.unique(windows.reshape(-1, 8), axis=0)) == 4096 * 32
    powers = np.uint64(1) << np.arange(64, dtype=np.uint64)
    first = np.sort((mask[:, :64].astype(np.uint64) * powers).sum(axis=1))
    rolling = sum(mask[:, k : 2048 - 63 + k].astype(np.uint64) << np.uint64(k) for k in range(64))
    assert not np.isin(rolling[:, 1:], first).any()


def test_draws_with_64_bits():
    """With 64 bits enabled draws are what they are without, for f64 leaves too, and keys work."""
    tx = oc.clip_randomly(oc.clip(1.0), 0.5, 3)
    expected = tx.update(jnp.full(1000, 3.0), tx.init(None))[0]
    with jax.enable_x64(True):
        out, state = tx.update(jnp.full(1000, 3.0, jnp.float64), tx.init(None))
        assert out.dtype == jnp.float64 and state.key.dtype == jnp.uint32
        np.testing.assert_array_equal(out, expected)
        of_key = oc.clip_randomly(oc.clip(1.0), 1.0, jax.random.key(3))
        assert (of_key.update(jnp.full(9, 3.0), of_key.init(None))[0] == 1.0).all()


def test_draws_where_types_are_silent_are_an_error():
    """Inside `shard_map(check_vma=False)` devices would draw alike; a draw for a whole leaf is the same on all."""
    mesh, updates = trees.mesh(data=4), jnp.full((4, 8), 3.0)
    for per in ("element", "leaf"):
        tx = oc.clip_randomly(oc.clip(1.0), 0.5, per=per)
        step = jax.shard_map(
            lambda u, tx=tx: tx.update(u, tx.init(u))[0],
            mesh=mesh,
            in_specs=P("data"),
            out_specs=P("data"),
            check_vma=False,
        )
        if per == "leaf":
            assert len(np.unique(step(updates))) == 1
        else:
            with pytest.raises(ValueError, match=r"clip_randomly: over which of the mesh axes \('data',\).*check_vma"):
                step(updates)


# A selected part


def test_a_selected_part():
    """Some leaves by `optax.masked`, and units of some leaves by an `axis` rule; the others pass and do not count."""
    updates = pair(0, 3.0)
    chosen = optax.masked(oc.clip_by_global_norm(0.5), {"bias": True, "dense": False})
    out, state = chosen.update(updates, chosen.init(updates))
    assert out["dense"] is updates["dense"]
    assert jnp.linalg.norm(out["bias"]) == pytest.approx(0.5)
    assert oc.clip_metrics(state)["clip/norm"] == pytest.approx(float(jnp.linalg.norm(updates["bias"])))
    columns = oc.clip_by_unit_norm(0.5, lambda path, leaf: 0 if "dense" in jax.tree_util.keystr(path) else None)
    out, _ = columns.update(updates, columns.init(updates))
    chex.assert_trees_all_equal(out["bias"], updates["bias"])
    assert (jnp.linalg.norm(out["dense"], axis=0) <= 0.5 + 1e-6).all()


# Both


@wrapped
@pytest.mark.parametrize("name", ["clip", "clip_by_leaf_norm", "adaptive_grad_clip", "zclip"])
def test_compiled_is_eager(wrap, name):
    """jit, scan, vmap and a loop agree in one trace; types of state and updates are kept."""
    tx, params, samples = WRAPPED[wrap](INNER[name]()), pair(9), [pair(i) for i in range(3)]
    state = tx.init(params)
    out, last = run(tx, samples, params)
    assert types(last) == types(state)
    chex.assert_trees_all_equal_shapes_and_dtypes(out[0], samples[0])
    assert_close(run(tx, samples, params, once(tx.update)), (out, last))
    scanned = jax.lax.scan(lambda state, updates: tx.update(updates, state, params)[::-1], state, stack(samples))
    assert_close(scanned, (last, stack(out)))
    many, _ = jax.jit(jax.vmap(lambda updates: tx.update(updates, state, params)))(stack(samples))
    assert_close(many, stack([tx.update(updates, state, params)[0] for updates in samples]))


@wrapped
@pytest.mark.parametrize("through", ["pickle", "numpy"])
def test_a_run_goes_on_from_a_checkpoint(wrap, through):
    """A saved state goes on bit for bit: the carry, and the key."""
    tx, params, samples = WRAPPED[wrap](oc.clip_by_leaf_norm(0.5)), pair(9), [pair(i) for i in range(4)]
    step = jax.jit(tx.update)
    expected, expected_state = run(tx, samples, params, step)
    _, state = run(tx, samples[:2], params, step)
    saved = pickle.loads(pickle.dumps(state)) if through == "pickle" else jax.tree.map(np.asarray, state)
    for i in (2, 3):
        out, saved = step(samples[i], saved, params)
        chex.assert_trees_all_equal(out, expected[i])
    chex.assert_trees_all_equal(saved, expected_state)


@wrapped
def test_odd_leaves_are_returned_as_they_are(wrap):
    """Leaves without a norm carry nothing and are not drawn."""
    updates = trees.odd()
    tx = WRAPPED[wrap](oc.clip_by_leaf_norm(0.5))
    out, state = tx.update(updates, tx.init(updates), updates)
    chex.assert_trees_all_equal_structs(out, updates)
    assert all(out[key] is updates[key] for key in updates if key not in ("weight", "masked", "empty"))
    if wrap == "feedback":
        assert [key for key, leaf in state.carry.items() if isinstance(leaf, jax.Array)] == ["weight"]
    for empty in ({}, {"a": jnp.zeros((0, 3)), "b": None}):
        chex.assert_trees_all_equal(tx.update(empty, tx.init(empty))[0], empty)


def test_updates_that_are_none_keep_their_carry():
    """Where there is no update for a parameter, its carry waits."""
    tx, params = oc.with_error_feedback(oc.clip(0.5)), pair(9)
    _, before = tx.update(pair(0, 3.0), tx.init(params))
    out, after = tx.update({**pair(1, 3.0), "bias": None}, before)
    assert out["bias"] is None
    chex.assert_trees_all_equal(after.carry["bias"], before.carry["bias"])


@wrapped
def test_strict_promotion(wrap):
    """No wrapper relies on promotion of dtypes or ranks, for leaves of every rank and dtype."""
    updates, tx = {**trees.mixed(0), "deep": jnp.ones((2, 3, 4, 5))}, WRAPPED[wrap](oc.clip(0.5))
    step = lambda updates: tx.update(updates, tx.init(updates))[0]
    expected = jax.jit(step)(updates)
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        actual = jax.jit(lambda updates: step(updates))(updates)  # another function, to be traced anew
    chex.assert_trees_all_equal_shapes_and_dtypes(actual, expected)
    chex.assert_trees_all_equal(actual, expected)


def test_a_key_of_the_user_survives_donation():
    """The state holds a copy of the key, so that a donated state takes no array of the user with it."""
    key, gradients = jax.random.PRNGKey(0), jnp.ones(3)
    tx = oc.clip_randomly(oc.clip(1.0), 0.5, key)
    jax.jit(tx.update, donate_argnums=1)(gradients, tx.init(gradients))
    assert key.shape == tx.init(gradients).key.shape and not key.is_deleted()


def test_a_probability_of_nan_clips_all():
    """A traced probability that is NaN never lets an entry pass unclipped."""
    gradients = jnp.array([-3.0, 0.5, 3.0])
    tx = lambda probability: oc.clip_randomly(oc.clip(1.0), probability)
    clipped = jax.jit(lambda p: tx(p).update(gradients, tx(p).init(gradients))[0])(jnp.nan)
    chex.assert_trees_all_equal(clipped, jnp.array([-1.0, 0.5, 1.0]))


@wrapped
def test_in_chains_masks_and_multi_steps(wrap):
    """In a chain with AdamW, under a mask and in `MultiSteps`, and with params for the inner clip."""
    clip = lambda: WRAPPED[wrap](oc.adaptive_grad_clip(0.1))
    params, samples = pair(9), [pair(i) for i in range(4)]
    clipped, _ = run(clip(), samples, params)
    expected, _ = run(optax.adamw(0.1), clipped, params)
    tx = optax.chain(clip(), optax.adamw(0.1))
    assert_close(run(tx, samples, params, once(tx.update))[0], expected)
    tx = optax.masked(clip(), {"bias": False, "dense": True})
    out, _ = run(tx, samples, params)
    assert out[0]["bias"] is samples[0]["bias"]
    tx = optax.MultiSteps(clip(), 2)
    out, _ = run(tx, samples, params, once(tx.update))
    assert not any(leaf.any() for leaf in jax.tree.leaves(out[::2]))


@wrapped
def test_skipped_steps_leave_no_trace(wrap):
    """`skip_spikes` around it keeps carry and key as they were."""
    tx = oc.skip_spikes(optax.chain(WRAPPED[wrap](oc.clip(0.5)), optax.sgd(0.1)))
    params = pair(9)
    _, before = run(tx, [pair(0), pair(1)], params, jax.jit(tx.update))
    _, after = jax.jit(tx.update)(jax.tree.map(lambda x: x * np.nan, pair(2)), before, params)
    chex.assert_trees_all_equal(after.inner_state, before.inner_state)
    assert after.total_skipped == 1


@wrapped
def test_donation_and_map_params(wrap):
    """Buffers can be donated; `optax.tree.map_params` takes the carry for params and a key for none."""
    tx, params = WRAPPED[wrap](oc.clip_by_leaf_norm(0.5)), pair(9)
    mapped = optax.tree.map_params(tx, lambda x, spec: spec, tx.init(params), {"bias": "b", "dense": "d"})
    if wrap == "feedback":
        assert mapped.carry == {"bias": "b", "dense": "d"}
    else:
        chex.assert_trees_all_equal(mapped, tx.init(params))
    expected = jax.jit(tx.update)(pair(0), tx.init(params), params)
    updates, state = pair(0), tx.init(params)
    actual = jax.jit(tx.update, donate_argnums=(0, 1), keep_unused=True)(updates, state, params)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves((updates, state)))
    assert_close(actual, expected)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
@wrapped
def test_jit_on_a_mesh_is_one_device(wrap, kind):
    """The same updates and draws on a mesh; the carry lies where the params lie."""
    tx, mesh = WRAPPED[wrap](oc.clip_by_global_norm(0.5)), trees.mesh(kind, data=4)
    samples = [{"w": trees.sample(i, shapes={"w": (8, 6)})["w"], "b": jnp.arange(3.0) - i} for i in range(3)]
    specs = {"w": P("data"), "b": P()}
    place = lambda tree: jax.device_put(tree, {key: NamedSharding(mesh, specs[key]) for key in tree})
    expected = run(tx, samples, samples[0], jax.jit(tx.update))
    with jax.set_mesh(mesh):
        actual = run(tx, [place(tree) for tree in samples], place(samples[0]), jax.jit(tx.update))
    chex.assert_trees_all_close(jax.tree.leaves(actual), jax.tree.leaves(expected), rtol=1e-5, atol=1e-6)
    if wrap == "feedback":
        assert actual[1].carry["w"].sharding.is_equivalent_to(NamedSharding(mesh, P("data")), 2)


def test_feedback_in_shard_map_is_one_device():
    """Inside `shard_map`, `init` and a scan of steps keep the types of leaves that vary."""
    tx, mesh = oc.with_error_feedback(oc.clip_by_global_norm(0.5)), trees.mesh(data=4)
    samples = stack([{"w": trees.sample(i, shapes={"w": (8, 6)})["w"], "b": jnp.arange(3.0) - i} for i in range(3)])

    def steps(samples):
        first = jax.tree.map(lambda x: x[0], samples)
        state, out = jax.lax.scan(lambda state, updates: tx.update(updates, state)[::-1], tx.init(first), samples)
        return out, state.carry

    specs = {"w": P(None, "data"), "b": P()}
    inside = jax.shard_map(steps, mesh=mesh, in_specs=(specs,), out_specs=(specs, {"w": P("data"), "b": P()}))
    chex.assert_trees_all_close(jax.jit(inside)(samples), jax.jit(steps)(samples), rtol=1e-5, atol=1e-6)


def test_devices_of_shard_map_draw_by_themselves():
    """Shards of a leaf get draws of their own; a leaf that is whole gets the same on all devices."""
    tx, mesh = oc.clip_randomly(oc.clip(1.0), 0.5), trees.mesh(data=4)
    updates = {"w": jnp.full((4, 1000), 3.0), "b": jnp.full(1000, 3.0)}
    specs = {"w": P("data"), "b": P()}
    state = tx.init(updates)
    step = jax.shard_map(lambda u, s: tx.update(u, s)[0], mesh=mesh, in_specs=(specs, P()), out_specs=specs)
    out = jax.jit(step)(updates, state)
    mask = np.asarray(out["w"] == 1.0)
    assert all(0.4 < (mask[i] == mask[j]).mean() < 0.6 for i in range(4) for j in range(i))
    chex.assert_trees_all_equal(out["b"], tx.update(updates, state)[0]["b"])


@wrapped
def test_derivatives(wrap):
    """The derivative through a step is finite, at zero too."""
    tx = WRAPPED[wrap](oc.clip_by_leaf_norm(0.5))
    state = tx.init(pair(0))
    loss = lambda updates: optax.tree.sum(tx.update(updates, state)[0])
    for updates in (pair(0), pair(0, 0.0)):
        chex.assert_tree_all_finite(jax.jit(jax.grad(loss))(updates))


# Programs


@trees.on_a_cpu_that_fuses
@pytest.mark.parametrize("per", ["element", "leaf"])
def test_draws_take_no_memory(per):
    """Beside the clip's own, a step allocates next to nothing, and reads and writes nothing more."""
    plain = compiled_step(optax.chain(oc.clip_by_global_norm(1.0), optax.adamw(1e-3)))
    random = compiled_step(optax.chain(oc.clip_randomly(oc.clip_by_global_norm(1.0), 0.5, per=per), optax.adamw(1e-3)))
    assert random.memory_analysis().temp_size_in_bytes < 0.005 * 4 * ENTRIES
    matrices = [entry(program).count("= f32[256,512]") for program in (plain, random)]
    assert matrices[0] == matrices[1]


# Errors


@pytest.mark.parametrize(
    ("make", "error", "text"),
    [
        (
            lambda: oc.with_error_feedback(1.0),
            TypeError,
            "with_error_feedback: clip must be an Optax transf.*got float",
        ),
        (lambda: oc.with_error_feedback(oc.clip), TypeError, r"with_error_feedback: clip must.*got function.*example"),
        (
            lambda: oc.with_error_feedback(oc.clip(1.0), accumulator_dtype=jnp.int8),
            TypeError,
            "with_error_feedback: accumulator_dtype must be a floating dtype",
        ),
        (
            lambda: oc.with_error_feedback(oc.clip(1.0), accumulator_dtype="wide"),
            TypeError,
            "with_error_feedback: accumulator_dtype must be a floating dtype, got str 'wide'",
        ),
        (lambda: oc.clip_randomly(None, 0.5), TypeError, "clip_randomly: clip must be.*got NoneType"),
        (lambda: oc.clip_randomly(oc.clip(1.0), 1.5), ValueError, r"clip_randomly: probability must be <= 1, got 1\.5"),
        (
            lambda: oc.clip_randomly(oc.clip(1.0), -0.1),
            ValueError,
            r"clip_randomly: probability must be >= 0, got -0\.1",
        ),
        (lambda: oc.clip_randomly(oc.clip(1.0), np.nan), ValueError, "clip_randomly: probability must be a number"),
        (lambda: oc.clip_randomly(oc.clip(1.0), "half"), TypeError, "clip_randomly: probability must be a number"),
        (lambda: oc.clip_randomly(oc.clip(1.0), 0.5, 0.5), TypeError, "clip_randomly: seed must be an int or a key"),
        (lambda: oc.clip_randomly(oc.clip(1.0), 0.5, None), TypeError, "clip_randomly: seed must be an int or a key"),
        (lambda: oc.clip_randomly(oc.clip(1.0), 0.5, True), TypeError, "clip_randomly: seed must be an int or a key"),
        (
            lambda: oc.clip_randomly(oc.clip(1.0), 0.5, per="row"),
            ValueError,
            r"per must be one of \('element', 'leaf'\)",
        ),
    ],
)
def test_errors(make, error, text):
    """What cannot work is an error at construction that names the argument and its value."""
    with pytest.raises(error, match=text):
        make()


def test_a_carry_of_another_tree_is_an_error():
    """Updates of another structure than the parameters that `init` saw are refused."""
    tx = oc.with_error_feedback(oc.clip(1.0))
    with pytest.raises(ValueError, match="with_error_feedback: "):
        tx.update({"x": jnp.ones(2)}, tx.init({"y": jnp.ones(2)}))
    with pytest.raises(ValueError, match=r"with_error_feedback: .*shape \(2, 3\) has a carry of shape \(3,\)"):
        tx.update(jnp.ones((2, 3)), tx.init(jnp.ones(3)))
    with pytest.raises(ValueError, match=r"with_error_feedback: .*shape \(2,\) at \['x'\] has a carry dict"):
        tx.update({"x": jnp.ones(2)}, tx.init({"x": {"y": jnp.ones(2)}}))

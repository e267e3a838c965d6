"""What every clip keeps as an Optax transformation, one table of clips against one list of contracts."""

import functools
import pickle

import chex
import clips
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import trees

import optax_clip as oc

every = pytest.mark.parametrize("case", clips.CLIPS, ids=lambda case: case.name)
schedule = optax.linear_schedule(1.0, 0.5, 4)  # every value is exact in bf16

THRESHOLDS = {
    "int": 1,
    "float": 1.0,
    "np_float64": np.float64(1),
    "np_int32": np.int32(1),
    "np_uint8": np.uint8(1),
    "bf16": jnp.bfloat16(1),
    "f16": jnp.float16(1),
    "f32": jnp.float32(1),
    "i32": jnp.int32(1),
    "u8": jnp.uint8(1),
}
DTYPES = [jnp.float8_e4m3fn, jnp.float8_e5m2, jnp.float16, jnp.bfloat16, jnp.float32, jnp.complex64]


def pair(seed: int = 0, scale: float = 1.0, dtype=jnp.float32) -> dict:
    """Two leaves: two blocks for clips by leaf and by group, and quick to compile."""
    tree = trees.sample(seed, scale, dtype)
    return {name: tree[name] for name in ("bias", "dense")}


def stack(samples: list) -> dict:
    """One tree with a leading axis over the samples."""
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *samples)


def run(tx, samples: list, params, update=None) -> tuple[list, object]:
    """The updates of each step and the last state, one step after the other."""
    state, out = tx.init(params), []
    for updates in samples:
        updates, state = (update or tx.update)(updates, state, params)
        out.append(updates)
    return out, state


def once(function, **options):
    """The function compiled, where a second trace is an error."""
    chex.clear_trace_counter()
    return jax.jit(chex.assert_max_traces(function, n=1), **options)


def types(tree):
    """What a second trace depends on."""
    return jax.tree.map(lambda x: (x.shape, x.dtype, x.weak_type), tree)


def assert_close(actual, expected, dtype=jnp.float32):
    chex.assert_trees_all_equal_shapes_and_dtypes(actual, expected)
    tolerance = trees.tolerance(dtype)
    chex.assert_trees_all_close(actual, expected, rtol=tolerance, atol=tolerance)


# Structure, shapes and dtypes


@every
@pytest.mark.parametrize("tree", [trees.sample, trees.mixed])
def test_updates_keep_structure_shapes_and_dtypes(case, tree):
    """Clipped updates have the structure, shapes and dtypes of the updates, for leaves of any rank and mixed dtypes."""
    updates, params = tree(0), tree(1)
    tx = case.make(0.5)
    clipped, _ = jax.eval_shape(tx.update, updates, jax.eval_shape(tx.init, params), params)
    chex.assert_trees_all_equal_structs(clipped, updates)
    chex.assert_trees_all_equal_shapes_and_dtypes(clipped, updates)


@every
@pytest.mark.parametrize("threshold", [0.5, None, schedule], ids=["number", "none", "schedule"])
def test_state_keeps_structure_shapes_dtypes_and_weak_types(case, threshold):
    """The state of an update is of the types of that of `init`, eager and traced."""
    tx, updates, params = case.make(threshold), pair(0), pair(1)
    state = tx.init(params)
    expected = types(state)
    assert all(isinstance(leaf, jax.Array) and not leaf.weak_type for leaf in jax.tree.leaves(state))
    assert types(jax.eval_shape(tx.init, params)) == expected
    assert types(tx.update(updates, state, params)[1]) == expected
    assert types(jax.eval_shape(tx.update, updates, state, params)[1]) == expected


@functools.cache
def under_a_float(case) -> tuple:
    """Updates of every dtype, parameters, and what a clip with a Python float returns."""
    updates = {str(jnp.dtype(dtype)): trees.sample(0, 3.0)["dense"].astype(dtype) for dtype in DTYPES}
    params = {name: trees.sample(1)["dense"] for name in updates}
    tx = case.make(1.0)
    return updates, params, *tx.update(updates, tx.init(params), params)


@every
@pytest.mark.parametrize("threshold", THRESHOLDS.values(), ids=THRESHOLDS)
def test_updates_keep_dtypes_whatever_the_dtype_of_the_threshold(case, threshold):
    """A threshold of any dtype, traced or not, gives what a Python float gives, in the dtypes of the updates."""
    updates, params, expected, expected_state = under_a_float(case)
    tx = case.make(threshold)
    clipped, state = tx.update(updates, tx.init(params), params)
    chex.assert_trees_all_equal_shapes_and_dtypes(clipped, updates)
    chex.assert_trees_all_equal(clipped, expected)
    assert types(state) == types(expected_state)
    traced = jax.eval_shape(lambda t: case.make(t).update(updates, state, params)[0], threshold)
    chex.assert_trees_all_equal_shapes_and_dtypes(traced, updates)


STATES = {  # what each is made of, behind the step, norm, threshold, scale and clip rate of a norm clip
    "clip_by_global_norm": (lambda: oc.clip_by_global_norm(1.0), True, ""),
    "schedule": (lambda: oc.clip_by_global_norm(schedule), True, "i"),
    "threshold of Optax": (lambda: oc.clip_by_global_norm(optax.trace(0.9)), True, "f"),
    "clip_by_sigma": (lambda: oc.clip_by_sigma(window=4), True, "fii"),
    "autoclip": (lambda: oc.autoclip(window=4), True, "ffii"),
    "zclip": (oc.zclip, True, "iff"),
    "adagc": (oc.adagc, True, "if"),
    "clip": (lambda: oc.clip(1.0), False, "i"),
    "clip_weights": (lambda: oc.clip_weights(1.0), False, "if"),
    "rescale_weights": (oc.rescale_weights, False, "i"),
    "skip_spikes": (lambda: oc.skip_spikes(optax.identity(), 1.0), False, "iiiffff"),
    "with_error_feedback": (lambda: oc.with_error_feedback(oc.clip(1.0), accumulator_dtype="float32"), False, "fi"),
    "clip_randomly": (lambda: oc.clip_randomly(oc.clip(1.0), 0.5), False, "ui"),
}


@pytest.mark.parametrize("x64", [False, True], ids=["32", "64"])
@pytest.mark.parametrize("name", STATES)
def test_states_have_32_bits(name, x64):
    """Counters are i32, keys u32 and statistics f32, of f64 leaves too."""
    make, measures, rest = STATES[name]
    with jax.enable_x64(x64):
        leaves = jax.tree.leaves(make().init({"w": np.ones(3)}))
    assert [str(leaf.dtype) for leaf in leaves] == [
        {"i": "int32", "f": "float32", "u": "uint32"}[kind] for kind in ("iffff" if measures else "") + rest
    ]


@every
def test_f64_leaves_are_clipped_in_f64(case):
    """In 64-bit mode f64 leaves are measured and scaled in f64, f32 leaves beside them stay f32, the state too."""
    updates = {**pair(0), "half": np.ones(3, np.float32)}
    with jax.enable_x64(True):
        updates = {name: np.asarray(x, np.float32 if name == "half" else np.float64) for name, x in updates.items()}
        params = jax.tree.map(np.zeros_like, updates)
        tx = case.make(0.5)
        state = jax.eval_shape(tx.init, params)
        clipped, new_state = jax.jit(lambda updates: tx.update(updates, tx.init(params), params))(updates)
        chex.assert_trees_all_equal_shapes_and_dtypes(clipped, updates)
        assert types(new_state) == types(state)
        assert all(leaf.dtype in (jnp.int32, jnp.float32) for leaf in jax.tree.leaves(new_state))
    if case.scope == "entry":
        assert np.asarray(clipped["dense"]).max() == 0.5
    else:  # entries of one column share a norm in every clip
        factors = np.asarray(clipped["dense"]) / updates["dense"]
        chex.assert_trees_all_close(factors, np.broadcast_to(factors[:1], factors.shape), rtol=1e-14)
    if case.name == "clip_by_leaf_norm":
        assert np.linalg.norm(clipped["dense"]) == pytest.approx(0.5, rel=1e-14)


@every
def test_leaves_without_a_norm_are_returned_as_they_are(case):
    """Integers, booleans, float0, keys, functions and empty nodes come back untouched, also as params."""
    updates = trees.odd()
    tx = case.make(0.5)
    state = tx.init(updates)
    clipped, new_state = tx.update(updates, state, updates)
    chex.assert_trees_all_equal_structs(clipped, updates)
    assert types(new_state) == types(state)
    assert all(clipped[name] is updates[name] for name in updates if name not in ("weight", "masked", "empty"))
    alone = {"weight": updates["weight"]}
    expected, _ = tx.update(alone, tx.init(alone), alone)
    chex.assert_trees_all_equal(clipped["weight"], expected["weight"])


# Transformations of JAX


@every
def test_compiled_is_eager(case):
    """jit gives the numbers of eager mode, updates and state, step after step in one trace."""
    tx, params = case.make(0.5), pair(1)
    samples = [pair(2), pair(3, 1e-3), pair(4, 1e25)]
    assert_close(run(tx, samples, params, once(tx.update)), run(tx, samples, params))


@every
def test_one_trace_under_a_schedule(case):
    """A compiled step whose threshold follows a schedule is traced once and follows it."""
    tx, params, samples = case.make(schedule), pair(9), [pair(i) for i in range(4)]
    clipped, _ = run(tx, samples, params, once(tx.update))
    for step, (updates, actual) in enumerate(zip(samples, clipped)):
        plain = case.make(float(schedule(step)))
        assert_close(actual, plain.update(updates, plain.init(params), params)[0])


@every
def test_one_trace_for_changing_thresholds(case):
    """A threshold that is an argument of the compiled step may change without a second trace."""
    updates, params = pair(0), pair(1)
    state = case.make(1.0).init(params)
    step = once(lambda threshold, state: case.make(threshold).update(updates, state, params))
    for threshold in (1.0, 0.5, 0.25):
        clipped, state = step(threshold, state)
        tx = case.make(threshold)
        assert_close(clipped, tx.update(updates, tx.init(params), params)[0])


@every
def test_scan_is_a_loop(case):
    """A clip in `lax.scan` keeps the carry's types and gives what a loop gives."""
    tx, params, samples = case.make(schedule), pair(9), [pair(i) for i in range(3)]
    state, clipped = jax.lax.scan(
        lambda state, updates: tx.update(updates, state, params)[::-1], tx.init(params), stack(samples)
    )
    looped, looped_state = run(tx, samples, params)
    assert_close((clipped, state), (stack(looped), looped_state))


@every
def test_vmap_is_a_loop(case):
    """A clip under `vmap` treats each member of the batch by itself, of ordinary, tiny or huge norm."""
    tx, params, samples = case.make(0.5), pair(9), [pair(i, scale) for i, scale in enumerate((1.0, 1e-25, 1e25))]
    state = tx.init(params)
    clipped, states = jax.vmap(lambda updates: tx.update(updates, state, params))(stack(samples))
    looped = [tx.update(updates, state, params) for updates in samples]
    assert_close((clipped, states), (stack([u for u, _ in looped]), stack([s for _, s in looped])))


@every
def test_derivatives(case):
    """Derivatives by updates and threshold agree with finite differences, and are finite at zero and at tiny ones."""
    params = jax.tree.map(jnp.zeros_like, pair())
    state = case.make(0.5).init(params)
    weights = pair(5)

    @jax.jit
    @jax.value_and_grad
    def loss(args):
        threshold, updates = args
        return optax.tree.vdot(weights, case.make(threshold).update(updates, state, params)[0])

    args, direction, h = (jnp.float32(0.5), pair(6)), (jnp.float32(0.3), pair(3)), 1e-2
    with jax.debug_nans(True):
        _, grads = loss(args)
        ahead, behind = (loss(optax.tree.add_scale(args, s, direction))[0] for s in (h, -h))
        chex.assert_tree_all_finite(loss((args[0], params)))
        if case.name != "normalize":  # where it grows as 1 / norm
            chex.assert_tree_all_finite(loss((args[0], pair(2, 1e-30))))
    slope = optax.tree.vdot(grads, direction)
    chex.assert_trees_all_close(slope, (ahead - behind) / (2 * h), rtol=1e-2, atol=1e-3)


@every
def test_state_and_updates_can_be_donated(case):
    """Buffers of updates and state can be donated, from `init`, eager or compiled, and from a step."""
    tx, params = case.make(schedule), pair(9)
    expected = tx.update(pair(0), tx.init(params), params)
    step = once(tx.update, donate_argnums=(0, 1), keep_unused=True)
    for init in (tx.init, jax.jit(tx.init)):
        updates, state = pair(0), init(params)
        actual = step(updates, state, params)
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves((updates, state)))
        assert_close(actual, expected)
    _, state = step(pair(1), actual[1], params)
    chex.assert_trees_all_equal(state.step, jnp.int32(2))


# Transformations of Optax


@every
@pytest.mark.parametrize("wrap", ["masked", "partition"])
def test_leaves_outside_are_neither_changed_nor_counted(case, wrap):
    """Leaves outside of a mask or partition come back bit-identical and do not enter norms or metrics."""
    updates, params = ({**pair(seed), "scale": jnp.ones(()), "steep": pair(seed + 1)["bias"]} for seed in (0, 9))
    inside = ("dense", "steep")
    mask = {name: name in inside for name in updates}
    if wrap == "masked":
        tx = optax.masked(case.make(0.5), mask)
    else:
        labels = jax.tree.map(lambda x: "clip" if x else "rest", mask)
        tx = optax.partition({"clip": case.make(0.5), "rest": optax.identity()}, labels)
    clipped, state = tx.update(updates, tx.init(params), params)
    state = state.inner_state if wrap == "masked" else state.inner_states["clip"].inner_state
    part, part_params = ({name: tree[name] for name in inside} for tree in (updates, params))
    alone = case.make(0.5)
    expected = alone.update(part, alone.init(part_params), part_params)
    chex.assert_trees_all_equal(({name: clipped[name] for name in inside}, state), expected)
    assert all(clipped[name] is updates[name] for name in updates if not mask[name])


@every
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("threshold", [0.5, schedule], ids=["number", "schedule"])
def test_threshold_is_injected(case, threshold, dtype):
    """`inject_hyperparams` turns the threshold into state, in f32 or bf16, and the results stay the same."""
    tx = optax.inject_hyperparams(lambda threshold: case.make(threshold))(threshold)
    params, samples = pair(9, dtype=dtype), [pair(i, dtype=dtype) for i in range(3)]
    clipped, state = run(tx, samples, params)
    expected, expected_state = run(case.make(threshold), samples, params)
    assert_close(clipped, expected, dtype)
    assert_close(state.inner_state._replace(**no_rule(state)), expected_state._replace(**no_rule(state)))


def no_rule(state) -> dict:
    """A field that differs by design: the schedule's step is counted by `inject_hyperparams`, not by the rule."""
    return {"rule": ()} if hasattr(state.inner_state, "rule") else {}


@every
def test_injected_threshold_can_be_set_by_hand(case):
    """A number written into the state of `inject_hyperparams` is the threshold of the next step, without a trace."""
    tx = optax.inject_hyperparams(lambda threshold: case.make(threshold))(1.0)
    updates, params = pair(0, dtype=jnp.bfloat16), pair(9, dtype=jnp.bfloat16)
    step = once(tx.update)
    _, state = step(updates, tx.init(params), params)
    state.hyperparams["threshold"] = jnp.bfloat16(0.25)
    clipped, _ = step(updates, state, params)
    plain = case.make(0.25)
    assert_close(clipped, plain.update(updates, plain.init(params), params)[0], jnp.bfloat16)


@pytest.mark.parametrize(
    ("clip", "arguments"),
    [
        (oc.clip, {"max_delta": 0.5}),
        (oc.clip_by_value, {"min_value": -0.5, "max_value": 0.25}),
        (oc.clip_by_magnitude, {"min_magnitude": 0.25, "max_magnitude": 0.5}),
        (oc.clip_by_global_norm, {"max_norm": 0.5}),
        (oc.clip_by_leaf_norm, {"max_norm": 0.5}),
        (oc.clip_by_unit_norm, {"max_norm": 0.5}),
        (oc.clip_by_block_rms, {"threshold": 0.5}),
        (oc.clip_by_norm_range, {"min_norm": 0.25, "max_norm": 0.5}),
        (oc.adaptive_grad_clip, {"clipping": 0.5, "eps": 0.25}),
    ],
    ids=lambda x: getattr(x, "__name__", ""),
)
def test_every_number_of_a_clip_can_be_injected(clip, arguments):
    """`inject_hyperparams` takes each clip as it is: its defaults are no callables and no shapes."""
    tx, plain, updates, params = optax.inject_hyperparams(clip)(**arguments), clip(**arguments), pair(0), pair(1)
    state = tx.init(params)
    assert state.hyperparams.keys() == arguments.keys()
    actual, new_state = tx.update(updates, state, params)
    expected, expected_state = plain.update(updates, plain.init(params), params)
    assert_close((actual, new_state.inner_state), (expected, expected_state))
    assert types(jax.eval_shape(tx.update, updates, state, params)[1]) == types(new_state)


@every
def test_multi_steps_clips_the_mean(case):
    """In `MultiSteps` the mean of the small batches is clipped, and only whole steps are counted."""
    tx, params, samples = optax.MultiSteps(case.make(0.5), 2), pair(9), [pair(i) for i in range(4)]
    clipped, state = run(tx, samples, params, once(tx.update))
    means = [jax.tree.map(lambda a, b: (a + b) / 2, *samples[:2]), jax.tree.map(lambda a, b: (a + b) / 2, *samples[2:])]
    expected, expected_state = run(case.make(0.5), means, params)
    chex.assert_trees_all_equal(clipped[::2], [jax.tree.map(jnp.zeros_like, params)] * 2)
    assert_close((clipped[1::2], state.inner_opt_state), (expected, expected_state))


@every
def test_apply_if_finite_leaves_no_trace_of_a_bad_step(case):
    """`apply_if_finite` turns a step with a NaN into zeros and keeps the clip's state as it was."""
    tx, params = optax.apply_if_finite(case.make(0.5), 3), pair(9)
    bad = pair(1)
    bad["bias"] = bad["bias"].at[0].set(jnp.nan)
    clipped, state = run(tx, [pair(0), bad, pair(2)], params, once(tx.update))
    expected, expected_state = run(case.make(0.5), [pair(0), pair(2)], params)
    chex.assert_trees_all_equal(clipped[1], jax.tree.map(jnp.zeros_like, params))
    assert_close((clipped[::2], state.inner_state), (expected, expected_state))


@every
def test_chain_in_front_of_adamw(case):
    """A chain of clip and AdamW under jit gives what AdamW gives on clipped updates."""
    tx, adamw, params = optax.chain(case.make(0.5), optax.adamw(0.1)), optax.adamw(0.1), pair(9)
    samples = [pair(i) for i in range(3)]
    out, (state, _) = run(tx, samples, params, once(tx.update))
    clipped, expected_state = run(case.make(0.5), samples, params)
    expected, _ = run(adamw, clipped, params)
    chex.assert_trees_all_close(out, expected, rtol=1e-4, atol=1e-6)
    assert_close(state, expected_state)


@every
@pytest.mark.parametrize("threshold", [0.5, schedule], ids=["number", "schedule"])
def test_map_params_gives_shardings_that_fit_the_state(case, threshold):
    """`optax.tree.map_params` takes nothing in a clip's state for params, and its result places the state."""
    mesh = trees.mesh(data=2)
    spread, everywhere = (jax.NamedSharding(mesh, jax.P(*axes)) for axes in ((None, None, None, "data"), ()))
    params = {"conv": trees.sample()["conv"], "scale": jnp.ones(())}
    shardings = {"conv": spread, "scale": everywhere}
    tx = optax.chain(case.make(threshold), optax.trace(0.9))
    state = tx.init(params)
    mapped = optax.tree.map_params(
        tx, lambda _, sharding: sharding, state, shardings, transform_non_params=lambda _: everywhere
    )
    placed = jax.device_put(state, mapped)  # raises unless the trees fit
    assert placed[1].trace["conv"].sharding == spread
    assert all(leaf.sharding == everywhere for leaf in jax.tree.leaves(placed[0]))
    chex.assert_trees_all_equal(placed, state)


@every
def test_extra_arguments_of_update_are_accepted(case):
    """Extra keyword arguments, which other members of a chain may need, change nothing."""
    tx, updates, params = case.make(0.5), pair(0), pair(1)
    state = tx.init(params)
    assert isinstance(tx, optax.GradientTransformationExtraArgs)
    actual = tx.update(updates, state, params, value=jnp.float32(2.0), grad=updates, value_fn=lambda p: 0.0)
    chex.assert_trees_all_equal(actual, tx.update(updates, state, params))


@every
@pytest.mark.parametrize("through", ["pickle", "numpy"])
def test_state_survives_a_checkpoint(case, through):
    """A run goes on from a pickled state, or from one saved as NumPy arrays, as if it had not stopped."""
    tx, params, samples = case.make(schedule), pair(9), [pair(i) for i in range(4)]
    expected, expected_state = run(tx, samples, params)
    _, state = run(tx, samples[:2], params)
    saved = pickle.loads(pickle.dumps(state)) if through == "pickle" else jax.tree.map(np.asarray, state)
    chex.assert_trees_all_equal_structs(saved, state)
    for i in (2, 3):
        clipped, saved = tx.update(samples[i], saved, params)
        chex.assert_trees_all_equal(clipped, expected[i])
    chex.assert_trees_all_equal(saved, expected_state)


# Strict settings


@every
@pytest.mark.parametrize("x64", [False, True], ids=["x32", "x64"])
@pytest.mark.parametrize("name", ["float", "np_float64", "bf16", "i32"])
def test_strict_promotion(case, name, x64):
    """No clip relies on promotion of dtypes or ranks, for mixed trees and any dtype of threshold."""
    with jax.enable_x64(x64):
        updates, params = ({**trees.mixed(seed), "widest": jnp.ones((2, 3), float)} for seed in range(2))
        tx = case.make(THRESHOLDS[name])
        expected = jax.eval_shape(lambda: tx.update(updates, tx.init(params), params))
        with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
            actual = jax.eval_shape(lambda: tx.update(updates, tx.init(params), params))
    chex.assert_trees_all_equal_shapes_and_dtypes(actual, expected)


@every
def test_strict_promotion_in_derivatives(case):
    """Nor do derivatives, where f32 and f64 leaves share a norm."""
    with jax.enable_x64(True), jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        updates = {"f32": jnp.ones(2, jnp.float32), "f64": jnp.ones((2, 3), jnp.float64)}
        tx = case.make(0.5)

        def total(updates):
            clipped, _ = tx.update(updates, tx.init(updates), updates)
            return sum(jnp.sum(leaf.astype(jnp.float64)) for leaf in clipped.values())

        chex.assert_trees_all_equal_shapes_and_dtypes(jax.eval_shape(jax.grad(total), updates), updates)


@every
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_no_nan_appears_on_the_way(case, compiled):
    """With `jax.debug_nans` finite updates pass: zeros, tiny, ordinary and huge ones."""
    tx, params = case.make(0.5), pair(9)
    with jax.debug_nans(True):
        samples = [pair(0, scale) for scale in (0.0, 1e-30, 1.0, 1e30)]
        clipped, _ = run(tx, samples, params, jax.jit(tx.update) if compiled else tx.update)
    chex.assert_tree_all_finite(clipped)

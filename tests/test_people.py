"""Situations that people met with clips of gradients, each beside all that is of its kind."""

import contextlib
import gc
import inspect

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.experimental import sparse
from jax.sharding import PartitionSpec as P
from table import CLIPS, TABLE, WRAPPERS, labels, numbers
from trees import PARAMS, STEPS, eager, mesh, run, small, step

import optax_clip as oc
from optax_clip import responses, thresholds

full = pytest.mark.full
GRADS = jnp.array([6.0, 8.0])
INF = float("inf")

# Thresholds that are open, or come to be: each with a state that is logged.
OPEN = {
    "None": lambda: oc.clip_by_global_norm(None),
    "inf": lambda: oc.clip_by_leaf_norm(INF),
    "array": lambda: oc.clip_by_global_norm(jnp.float32(INF)),
    "schedule": lambda: oc.clip_by_global_norm(lambda step: jnp.where(step < 2, INF, 1.0)),
    "tree": lambda: oc.clip_by_leaf_norm(numbers(INF)),
    "units": lambda: oc.clip_by_unit_norm(None),
    "groups": lambda: oc.clip_by_group_norm({"vectors": None, "others": INF}, labels),
    "range": lambda: oc.clip_by_norm_range(0.5, None),
    "agc": lambda: oc.adaptive_grad_clip(None),
    "autoclip": lambda: oc.autoclip(norm=oc.leaf_norm),
    "zclip": lambda: oc.zclip(),
    "never": lambda: oc.zclip(INF, 0.9, 1),
    "adagc": lambda: oc.adagc(None),
    "sigma": lambda: oc.clip_by_sigma(norm=oc.unit_norm),
    "minimum": lambda: oc.clip_by_norm(oc.leaf_norm, thresholds.minimum(None, thresholds.z_score())),
    "fraction": lambda: oc.clip_by_norm(oc.leaf_norm, thresholds.param_fraction(thresholds.z_score())),
    "response": lambda: oc.clip_by_global_norm(None, response=responses.normalize),
    "skip": lambda: oc.skip_spikes(optax.sgd(0.1)),
    "skip by history": lambda: oc.skip_spikes(optax.adam(0.1), thresholds.z_score()),
    "weights": lambda: oc.clip_weights(None),
    "norms of weights": lambda: oc.clip_weight_norm(INF),
    "pruned": lambda: oc.prune_weights(None),
}
QUICK = ("None", "zclip")
of_open = pytest.mark.parametrize("name", [pytest.param(n, marks=[full] * (n not in QUICK)) for n in OPEN])


def shapes_of(tree):
    """`jax.ShapeDtypeStruct` where arrays are."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)


@contextlib.contextmanager
def compilations():
    """A list that gets an entry for each program that JAX compiles or loads."""
    seen = []

    def listen(event, _, **__):
        seen.extend([event] if event == "/jax/core/compile/backend_compile_duration" else [])

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield seen
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def narrow(seed, scale=1.0):
    """A tree with f16, bf16 and no leaf, under the keys of `small`."""
    found = small(seed, scale)
    return {"bias": found["bias"].astype(jnp.float16), "dense": found["dense"].astype(jnp.bfloat16), "scale": None}


quickly = pytest.mark.parametrize(
    "case", [pytest.param(case, id=case.name, marks=[full] * (case.name != "zclip")) for case in TABLE]
)


# A clip called as a function


@pytest.mark.parametrize("state", [optax.EmptyState(), (), None], ids=["EmptyState", "()", "None"])
def test_a_clip_called_as_a_function(state):
    """A clip without a history takes no state, and gives the state of a first step; one with a history says why not."""
    clipped, new_state = oc.clip_by_global_norm(1.0).update(GRADS, state)
    chex.assert_trees_all_close(clipped, jnp.array([0.6, 0.8]), rtol=1e-6)
    expected = oc.clip_by_global_norm(1.0).update(GRADS, oc.clip_by_global_norm(1.0).init(GRADS))[1]
    chex.assert_trees_all_equal(new_state, expected)
    with pytest.raises(TypeError, match=r"^state must be a ClipState, got an empty one, and a history cannot start"):
        oc.zclip().update(GRADS, state)


# Data parallel by pmap


@pytest.mark.parametrize("case", [pytest.param(c, id=c.name, marks=[] if c.quick else full) for c in TABLE])
def test_what_asks_for_axis_name_takes_it(case):
    """A transformation that asks for `axis_name` has this argument, or takes the norm or the clip that has it."""
    specs, tx = jax.tree.map(lambda _: P(), PARAMS), case.tx
    inside = lambda updates: tx.update(updates, tx.init(PARAMS), PARAMS)[0]
    on_mesh = jax.shard_map(inside, mesh=mesh(data=8), in_specs=(specs,), out_specs=specs, check_vma=False)
    try:
        jax.eval_shape(on_mesh, PARAMS)
    except ValueError as error:
        text = str(error)
        if "axis_name" not in text:
            assert text.startswith("per must be 'leaf'")
            return
        assert "axis_name=()" in text
        function = getattr(oc, case.name, None)
        if function is not None:
            assert {"axis_name", "norm", "clip"} & set(inspect.signature(function).parameters)


# Debugging


@quickly
def test_debug_nans_where_nothing_is_compiled(case):
    """No NaN appears on the way with narrow floats and a None in the tree, and for weights and updates of 0."""
    with jax.debug_nans(True), jax.disable_jit():
        clipped, _ = run(case.tx, [narrow(1), narrow(0, 0.0), narrow(2, 3.0)], params=narrow(9), step=eager)
        of_zero, _ = run(case.tx, [narrow(1)], params=narrow(9, 0.0), step=eager)
    chex.assert_tree_all_finite((clipped, of_zero))


@of_open
def test_debug_nans_under_an_open_threshold(name):
    """No NaN appears on the way where a threshold is None or inf, or is not known yet."""
    with jax.debug_nans(True), jax.disable_jit():
        clipped, _ = run(OPEN[name](), [STEPS[0], small(0, 0.0), STEPS[1]], step=eager)
    chex.assert_tree_all_finite(clipped)


@of_open
def test_debug_infs_under_an_open_threshold(name):
    """A compiled step writes no inf into the state, and every metric that is logged is finite from the start."""
    tx = OPEN[name]()
    with jax.debug_nans(True), jax.debug_infs(True):
        init, update = jax.jit(tx.init), jax.jit(lambda *args: tx.update(*args))
        state = init(PARAMS)
        for updates in (STEPS[0], small(0, 0.0), small(5, 100.0), STEPS[1] | {"scale": None}):
            chex.assert_tree_all_finite(state)
            params = PARAMS | {"scale": None} if updates["scale"] is None else PARAMS
            state = init(params) if updates["scale"] is None else state
            clipped, state = update(updates, state, params)
            chex.assert_tree_all_finite((clipped, state))
    if "skip" in name or (oc.ClipState in map(type, jax.tree.leaves(state, is_leaf=lambda x: x is state))):
        chex.assert_tree_all_finite(oc.clip_metrics(state))


@quickly
def test_debug_infs_where_steps_are_compiled(case):
    """No inf and no NaN leaves a compiled step of such a tree."""
    with jax.debug_nans(True), jax.debug_infs(True):
        update = jax.jit(lambda *args: case.tx.update(*args))
        for size in (1.0, 0.0):
            state = jax.jit(case.tx.init)(narrow(9, size))
            for updates in (narrow(1), narrow(0, 0.0), narrow(2, 3.0), narrow(3)):
                clipped, state = update(updates, state, narrow(9, size))
                chex.assert_tree_all_finite((clipped, state))


@pytest.mark.parametrize(
    "make, x",
    [
        (lambda: oc.clip_by_norm_range(1e10, None), 1e-29),
        (lambda: oc.clip_by_norm_range(1e10, None, norm=oc.leaf_norm), 1e-29),
        (lambda: oc.clip_by_leaf_norm(3e38, response=responses.normalize), 1e-10),
    ],
    ids=["range", "range of leaves", "normalize"],
)
def test_a_scale_above_the_largest_number_is_reported_as_this_number(make, x):
    """A block that is scaled up by more than the largest f32 leaves no inf in the state."""
    tx = make()
    clipped, state = step(tx, {"a": jnp.full(1, x), "b": jnp.full(1, x)})
    chex.assert_tree_all_finite((clipped, state))
    assert float(state.clip_scale) > 1e37


# States of others


@pytest.mark.parametrize(
    "make",
    [lambda: oc.clip_by_global_norm(1.0), oc.zclip, lambda: oc.skip_spikes(optax.identity(), 10.0)],
    ids=["constant", "zclip", "skip_spikes"],
)
def test_fields_of_other_states_are_found_and_set(make):
    """`optax.tree.get` and `optax.tree.set` find a field of one other state with a clip in front, as without it."""
    params = {"w": jnp.ones(2)}
    others = {
        "scale": optax.contrib.reduce_on_plateau(),
        "step": optax.transforms.conditionally_transform(optax.identity(), lambda step: step > 2),
        "count": optax.scale_by_adam(),
        "trace": optax.trace(0.9),
    }
    for field, other in others.items():
        state = optax.chain(make(), other).init(params)
        alone = optax.tree.get(other.init(params), field)
        chex.assert_trees_all_equal(optax.tree.get(state, field), alone)
        changed = optax.tree.set(state, **{field: jax.tree.map(lambda x: x + 1, alone)})
        chex.assert_trees_all_equal(changed[0], state[0])


# A run that goes on with another threshold

HISTORIES = {
    "constant": lambda: oc.clip_by_global_norm(1.0),
    "schedule": lambda: oc.clip_by_global_norm(lambda step: 1.0),
    "range": lambda: oc.clip_by_norm_range(0.5, 1.0),
    "zclip": lambda: oc.zclip(),
    "zclip of leaves": lambda: oc.zclip(norm=oc.leaf_norm),
    "autoclip": lambda: oc.autoclip(window=4),
    "longer window": lambda: oc.autoclip(window=8),
    "minimum": lambda: oc.clip_by_norm(oc.global_norm, thresholds.minimum(1.0, thresholds.z_score())),
}


@pytest.mark.parametrize("after", ["schedule", "range"])
def test_a_run_goes_on_where_no_threshold_keeps_anything(after):
    """From a constant threshold to a schedule nothing changes in the state, so the run goes on."""
    _, state = step(HISTORIES["constant"](), PARAMS)
    _, new_state = step(HISTORIES[after](), STEPS[1], state)
    assert int(new_state.clip_step) == 2


@pytest.mark.parametrize(
    "before, after",
    [
        ("constant", "zclip"),
        pytest.param("schedule", "autoclip", marks=full),
        pytest.param("zclip", "constant", marks=full),
        pytest.param("zclip", "autoclip", marks=full),
        pytest.param("zclip", "zclip of leaves", marks=full),
        ("autoclip", "longer window"),
        pytest.param("longer window", "autoclip", marks=full),
        pytest.param("minimum", "zclip", marks=full),
        pytest.param("zclip of leaves", "minimum", marks=full),
    ],
)
def test_another_history_says_how_to_go_on(before, after):
    """The error gives the line that starts the history anew, and after it all that was counted goes on."""
    tx, params = HISTORIES[after](), PARAMS
    _, state = step(HISTORIES[before](), STEPS[0])
    line = "state._replace(rule=clip.init(params).rule)"
    with pytest.raises(ValueError, match=r"^state must hold ") as caught:
        tx.update(STEPS[1], state)
    assert str(caught.value).endswith(f"{line}.")
    state = eval(line, {"state": state, "clip": tx, "params": params})
    _, new_state = step(tx, STEPS[1], state)
    assert int(new_state.clip_step) == 2
    around = oc.skip_spikes(optax.sgd(0.1), thresholds.z_score())
    old = oc.skip_spikes(optax.sgd(0.1)).init(PARAMS)
    with pytest.raises(ValueError, match=r"^state must hold the history"):
        around.update(STEPS[0], old, PARAMS)
    measured = old.measured._replace(rule=around.init(PARAMS).measured.rule)
    around.update(STEPS[0], old._replace(measured=measured), PARAMS)


# One bound where two are meant


@pytest.mark.parametrize(
    "call, missing",
    [
        (lambda: oc.clip_by_value(1.0), r"max_value is missing.*clip\(max_delta\)"),
        (lambda: oc.clip_by_value(max_value=1.0), "min_value"),
        (lambda: oc.clip_by_magnitude(1.0), "max_magnitude"),
        (lambda: oc.clip_by_norm_range(1.0), "max_norm"),
        (lambda: oc.rescale_weights(1.0), "high"),
    ],
    ids=["clip_by_value", "max_value", "clip_by_magnitude", "clip_by_norm_range", "rescale_weights"],
)
def test_one_bound_of_two(call, missing):
    """One bound where two are meant does not lift every entry, norm or weight to it: the error names the other."""
    with pytest.raises(TypeError, match=missing):
        call()


# Masks by module around a tree of thresholds

MODULES = {"enc": {"w": jnp.full(3, 5.0), "b": jnp.full(2, 5.0)}, "head": {"w": jnp.full(2, 7.0)}}
OF_LEAVES = {"enc": {"w": 1.0, "b": 2.0}, "head": {"w": 3.0}}
NAMES = {"enc": {"w": "a", "b": "b"}, "head": {"w": "c"}}
BELOW = jax.tree.map(lambda x: -x, OF_LEAVES)
OF_TREES = {
    "clip": lambda: oc.clip(OF_LEAVES),
    "clip_by_value": lambda: oc.clip_by_value(BELOW, OF_LEAVES),
    "clip_by_magnitude": lambda: oc.clip_by_magnitude(None, OF_LEAVES),
    "clip_by_leaf_norm": lambda: oc.clip_by_leaf_norm(OF_LEAVES),
    "prefix": lambda: oc.clip_by_leaf_norm({"enc": 1.0, "head": {"w": 3.0}}),
    "rules": lambda: oc.clip_by_leaf_norm({"enc": thresholds.z_score(), "head": {"w": thresholds.quantile(50.0, 4)}}),
    "clip_by_unit_norm": lambda: oc.clip_by_unit_norm(OF_LEAVES),
    "clip_by_block_rms": lambda: oc.clip_by_block_rms(OF_LEAVES),
    "clip_by_group_norm": lambda: oc.clip_by_group_norm({"a": 1.0, "b": 2.0, "c": 3.0}, NAMES),
    "labels": lambda: oc.clip_by_group_norm({"a": 1.0, "b": 2.0, "c": 3.0}, lambda updates: NAMES),
    "adaptive_grad_clip": lambda: oc.adaptive_grad_clip(OF_LEAVES),
    "zclip": lambda: oc.zclip(norm=oc.group_norm(NAMES)),
    "axis_name": lambda: oc.clip_by_leaf_norm(1.0, axis_name=jax.tree.map(lambda _: "data", OF_LEAVES)),
    "clip_weights": lambda: oc.clip_weights(OF_LEAVES),
    "clip_weight_norm": lambda: oc.clip_weight_norm(OF_LEAVES),
    "prune_weights": lambda: oc.prune_weights(OF_LEAVES),
    "rescale_weights": lambda: oc.rescale_weights(BELOW, OF_LEAVES),
    "skip_spikes": lambda: oc.skip_spikes(optax.sgd(1.0), OF_LEAVES, norm=oc.leaf_norm),
    "with_error_feedback": lambda: oc.with_error_feedback(oc.clip_by_leaf_norm(OF_LEAVES)),
    "clip_randomly": lambda: oc.clip_randomly(oc.clip_by_leaf_norm(OF_LEAVES), 0.5),
}


@pytest.mark.parametrize("wrap", ["masked", "partition"])
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[full] * (n not in ("clip", "clip_by_leaf_norm", "labels"))) for n in OF_TREES]
)
def test_masked_modules_need_no_threshold(name, wrap):
    """A tree of thresholds or labels for all leaves works inside of `masked` and `partition` by module or leaf."""
    tx = OF_TREES[name]()
    tx = {
        "masked": lambda: optax.masked(tx, {"enc": {"w": True, "b": False}, "head": False}),
        "partition": lambda: optax.partition({"x": tx, "y": optax.identity()}, {"enc": "x", "head": "y"}),
    }[wrap]()
    (first, second), _ = run(tx, [MODULES, MODULES], params=MODULES)
    chex.assert_trees_all_equal_shapes_and_dtypes(first, MODULES)
    chex.assert_trees_all_equal((first["head"], second["head"]), (MODULES["head"], MODULES["head"]))
    if name == "clip_by_leaf_norm":
        chex.assert_trees_all_close(jnp.linalg.norm(first["enc"]["w"]), 1.0, rtol=1e-6)


# Sums of weights and updates that nobody casts


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_weights_keep_their_dtype_where_updates_are_added_as_they_are(dtype):
    """Adding the update without a cast, as Equinox does, leaves weights in their dtype, and inside of the bound."""
    weights = jax.tree.map(lambda x: jnp.clip(x, -0.3, 0.3), small(9, dtype=dtype))
    updates, _ = step(oc.clip_weights(0.3), small(1, dtype=dtype), params=weights)
    added = jax.tree.map(jnp.add, weights, updates)
    chex.assert_trees_all_equal_shapes_and_dtypes(added, weights)
    assert all(jnp.all(jnp.abs(x.astype(jnp.float32)) <= 0.3) for x in jax.tree.leaves(added))


# Functions with other arguments

OF_PATH = lambda path, leaf: 2.0
WITH_FUNCTIONS = {
    "max_delta": lambda f: oc.clip(f),
    "min_value": lambda f: oc.clip_by_value(f, 1.0),
    "max_magnitude": lambda f: oc.clip_by_magnitude(None, f),
    "threshold": lambda f: oc.clip_by_norm(oc.leaf_norm, f),
    "max_norm": lambda f: oc.clip_by_leaf_norm({"w": f, "b": None}),
    "max_norms['x']": lambda f: oc.clip_by_group_norm({"x": f}, "x"),
    "min_norm": lambda f: oc.clip_by_norm_range(f, 1.0),
    "clipping": lambda f: oc.adaptive_grad_clip(f),
    "thresholds[1]": lambda f: thresholds.minimum(1.0, f),
    "fraction": lambda f: thresholds.param_fraction(f),
    "max_value": lambda f: oc.clip_weights(f),
    "low": lambda f: oc.rescale_weights(f, 1.0),
}


@pytest.mark.parametrize("name", WITH_FUNCTIONS)
def test_a_function_of_path_and_leaf_is_no_schedule(name):
    """Where a schedule is taken, a function with other arguments is refused at once, and the text says what to do."""
    for function in (OF_PATH, lambda: 2.0):
        with pytest.raises(TypeError, match=r"must take \(step\), got function .*tree_map_with_path") as caught:
            WITH_FUNCTIONS[name](function)
        assert str(caught.value).startswith(name)
    for schedule in (lambda step, gain=2.0: gain, lambda *args: 2.0, optax.constant_schedule(2.0), jnp.sqrt):
        WITH_FUNCTIONS[name](schedule)


def test_the_tree_that_the_error_names_works():
    """What the error leads to gives a threshold for each leaf, by its path."""
    params = {"w": jnp.full(4, 3.0), "b": jnp.full(4, 3.0)}
    by_path = jax.tree_util.tree_map_with_path(lambda path, leaf: 2.0 if path[0].key == "w" else 3.0, params)
    clipped, _ = step(oc.clip_by_leaf_norm(by_path), params)
    chex.assert_trees_all_close(clipped, {"w": jnp.full(4, 1.0), "b": jnp.full(4, 1.5)}, rtol=1e-6)


# Shapes in place of parameters


@quickly
def test_init_takes_shapes_as_leaves(case):
    """`init` on `jax.ShapeDtypeStruct` leaves gives the state that arrays give, and the run goes on from it."""
    if case.name == "hold_weight_norm":  # it holds norms of the parameters
        with pytest.raises(ValueError, match=r"^params must be arrays at init, got shapes.*jax\.eval_shape"):
            case.tx.init(shapes_of(PARAMS))
        return
    expected, state = case.tx.init(PARAMS), case.tx.init(shapes_of(PARAMS))
    chex.assert_trees_all_equal_structs(state, expected)
    chex.assert_trees_all_equal(state, expected)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(state))
    chex.assert_trees_all_equal(step(case.tx, STEPS[0], state, PARAMS), step(case.tx, STEPS[0], expected, PARAMS))


@pytest.mark.parametrize(
    "wrap",
    [
        lambda tx: optax.masked(tx, {"bias": True, "dense": True, "scale": False}),
        lambda tx: optax.partition({"a": tx, "b": optax.adam(0.1)}, {"bias": "a", "dense": "a", "scale": "b"}),
        lambda tx: optax.MultiSteps(tx, 2),
        lambda tx: oc.skip_spikes(optax.chain(tx, optax.adamw(0.1)), thresholds.z_score(), norm=oc.leaf_norm),
        lambda tx: oc.with_error_feedback(tx, accumulator_dtype=jnp.bfloat16),
    ],
    ids=["masked", "partition", "MultiSteps", "skip_spikes", "with_error_feedback"],
)
def test_init_takes_shapes_inside_of_wrappers(wrap):
    """Wrappers pass shapes on, so that the whole optimizer has the state that arrays give."""
    for norm in (oc.leaf_norm, oc.unit_norm):
        tx = wrap(oc.zclip(norm=norm))
        state, expected = tx.init(shapes_of(PARAMS)), tx.init(PARAMS)
        chex.assert_trees_all_equal_structs(state, expected)
        chex.assert_trees_all_equal(state, expected)


# 64 bits


@pytest.mark.parametrize(
    "case", [pytest.param(c, id=c.name, marks=[] if c.name in ("zclip", "skip_spikes") else full) for c in TABLE]
)
@pytest.mark.parametrize("size", [1e39, 1e200, 1e-60])
def test_f64_in_its_own_range(case, size):
    """Steps of f64 far outside of the range of f32 stay finite, are not skipped for it, and leave a finite state."""
    if case.name == "scale_by_stable_adam" and size > 1e150:
        pytest.skip("Adam keeps squares")
    with jax.enable_x64(True):
        wide = lambda tree, scale: jax.tree.map(lambda x: np.asarray(x, np.float64) * scale, tree)
        params, samples = wide(PARAMS, 1.0), [wide(updates, size) for updates in STEPS[:2]]
        samples += [wide(STEPS[2], 1.0)] if size > 1 else []  # after tiny steps it is a spike
        clipped, state = run(case.tx, samples, params=params)
        chex.assert_tree_all_finite((clipped, state))
        chex.assert_trees_all_equal_shapes_and_dtypes(clipped, samples)
        if isinstance(state, oc.SkipState):
            assert int(state.total_skipped) == 0


@pytest.mark.parametrize("exponent", [600, pytest.param(-600, marks=full)])
@pytest.mark.parametrize("norm", [oc.global_norm, oc.leaf_norm, oc.unit_norm, oc.block_rms], ids=lambda n: n.__name__)
def test_f64_is_clipped_as_f32_is(norm, exponent):
    """A clip of entries and a threshold of 1e180 or 1e-180 does what it does for those of about 1."""
    with jax.enable_x64(True):
        unit = 2.0**exponent
        wide = {"w": np.array([[3.0, 0.5], [4.0, 0.1]]), "b": np.array([0.2, 0.1])}
        expected, _ = step(oc.clip_by_norm(norm, 1.0), wide)
        clipped, _ = step(oc.clip_by_norm(norm, unit), jax.tree.map(lambda x: x * unit, wide))
        chex.assert_trees_all_close(jax.tree.map(lambda x: x / unit, clipped), expected, rtol=1e-12)


def test_steps_of_f64_are_not_skipped():
    """`skip_spikes` takes finite f64 steps above the range of f32, and compares them with a threshold there."""
    with jax.enable_x64(True):
        grads = np.array([3e200, 4e200])
        for threshold, skipped in ((None, 0), (6e200, 0), (4e200, 1)):
            tx = oc.skip_spikes(optax.sgd(1.0), threshold)
            updates, state = step(tx, grads)
            assert int(state.total_skipped) == skipped
            chex.assert_trees_all_equal(updates, jnp.zeros(2) if skipped else -grads)
        bad, state = step(oc.skip_spikes(optax.sgd(1.0)), np.array([INF, 1.0]))
        assert int(state.total_skipped) == 1 and not bad.any()


# Small norms

RULES = {
    "zclip": lambda unit: oc.zclip(1.0, 0.9, 3),
    "mean": lambda unit: oc.zclip(1.0, 0.9, 3, spike="mean"),
    "limit": lambda unit: oc.zclip(1.0, 0.9, 3, spike="limit"),
    "leaves": lambda unit: oc.zclip(1.0, 0.9, 3, norm=oc.leaf_norm),
    "units": lambda unit: oc.zclip(1.0, 0.9, 3, norm=oc.unit_norm),
    "clip_by_sigma": lambda unit: oc.clip_by_sigma(1.0, 4),
    "sigma of leaves": lambda unit: oc.clip_by_sigma(1.0, 4, norm=oc.leaf_norm),
    "autoclip": lambda unit: oc.autoclip(50.0, 4),
    "adagc": lambda unit: oc.adagc(unit, 1.05, 0.9, 3),
}


@pytest.mark.parametrize("name", [pytest.param(n, marks=[full] * (n not in ("zclip", "clip_by_sigma"))) for n in RULES])
def test_rules_act_on_norms_of_every_size_alike(name):
    """What a rule does to gradients of 1e-8, of 1e-20 and of 1e8 is what it does to those of about 1, scaled."""
    times = lambda factor: jax.tree.map(lambda x: x * factor, STEPS[0])
    samples = [times(factor) for factor in (1.0, 1.01, 1.02, 1.0, 1.01, 1.02, 100.0, 1.0, 1.01)]
    expected, _ = run(RULES[name](1.0), samples)
    spike = optax.tree.norm(expected[6]) / optax.tree.norm(STEPS[0])
    assert spike < 2
    for unit in (2.0**-27, 2.0**-60, 2.0**27):
        scaled = lambda trees, unit: [jax.tree.map(lambda x: x * unit, tree) for tree in trees]
        clipped, _ = run(RULES[name](unit), scaled(samples, unit))
        chex.assert_trees_all_close(scaled(clipped, 1 / unit), expected, rtol=1e-5)


# Norms that have grown for good


def skipping(tx, norms):
    """Which steps are skipped, over gradients of these norms, and the last state."""

    def one(state, norm):
        updates, state = tx.update(norm[None], state)
        return state, updates[0] == 0

    state, skipped = jax.lax.scan(one, tx.init(jnp.zeros(1)), jnp.asarray(norms, jnp.float32))
    return np.asarray(skipped), state


@pytest.mark.parametrize(
    "rule",
    [
        lambda: thresholds.z_score(z_max=6.0),
        lambda: thresholds.sigma_window(6.0, 32),
        lambda: thresholds.minimum(thresholds.z_score(z_max=6.0), thresholds.ema_ratio(None, 1.5)),
        lambda: optax.chain(thresholds.quantile(50.0, 16), optax.scale(1.5)),
    ],
    ids=["z_score", "sigma_window", "minimum", "chain"],
)
def test_a_rule_starts_afresh_where_norms_have_doubled(rule):
    """After `max_consecutive` skips in a row a step is taken, and the rule starts afresh with it."""
    norms = np.random.default_rng(0).normal(1.0, 0.03, 600) * np.repeat([1.0, 2.0], [200, 400])
    skipped, state = skipping(oc.skip_spikes(optax.sgd(1.0), rule()), norms)
    assert not skipped[:200].any()
    assert skipped[200:300].all()  # 100 by default
    assert not skipped[300:].any()
    assert int(state.total_skipped) == 100 and int(state.consecutive_skipped) == 0
    skipped, _ = skipping(oc.skip_spikes(optax.sgd(1.0), rule(), max_consecutive=3), norms)
    assert list(np.flatnonzero(skipped)) == [200, 201, 202]


def test_a_step_that_is_not_finite_is_never_taken():
    """However many bad steps there are in a row, all are skipped, and the rule starts afresh with a finite one."""
    norms = np.concatenate([np.ones(40), np.full(7, np.nan), [50.0], np.ones(3), np.full(5, np.inf), [1.0]])
    tx = oc.skip_spikes(optax.sgd(1.0), thresholds.z_score(z_max=6.0), max_consecutive=3)
    skipped, _ = skipping(tx, norms)
    assert list(np.flatnonzero(skipped)) == [*range(40, 47), *range(51, 56)]


def test_without_a_bound_every_spike_is_skipped():
    """With `max_consecutive=None` norms that have grown for good are skipped for good."""
    tx = oc.skip_spikes(optax.sgd(1.0), thresholds.z_score(z_max=6.0), max_consecutive=None)
    skipped, _ = skipping(tx, np.repeat([1.0, 2.0], [100, 300]))
    assert skipped[100:].all()


# Sparse gradients


def sparse_leaf(kind):
    """A vector of length 5, whose first entry is 3 + 3."""
    whole = sparse.BCOO((jnp.array([3.0, 3.0, 4.0]), jnp.array([[0], [0], [2]])), shape=(5,))
    matrix = sparse.BCOO((jnp.array([3.0, 3.0, 4.0]), jnp.array([[0, 0], [0, 0], [0, 2]])), shape=(1, 5))
    return whole if kind == "BCOO" else sparse.BCSR.from_bcoo(matrix)


@pytest.mark.parametrize("case", [pytest.param(c, id=c.name, marks=[] if c.quick else full) for c in TABLE])
@pytest.mark.parametrize("kind", ["BCOO", "BCSR"])
def test_sparse_updates_are_refused(case, kind):
    """A sparse leaf, which may hold an entry in parts, is an error that says how to make it dense."""
    if case.name == "scale_by_stable_adam":
        pytest.skip("Adam takes arrays alone")
    updates = PARAMS | {"bias": sparse_leaf(kind)}
    params = PARAMS | {"bias": jnp.ones(updates["bias"].shape)}
    with pytest.raises(TypeError, match=rf"{kind} at \['bias'\].*sum_duplicates\(\)\.todense\(\)"):
        case.tx.update(updates, case.tx.init(params), params)


@pytest.mark.parametrize(
    "norm", [oc.global_norm, oc.leaf_norm, oc.unit_norm, oc.block_rms, oc.group_norm("a")], ids=range(5)
)
def test_norms_refuse_sparse_updates(norm):
    """A norm by itself refuses a sparse leaf too, and takes what the error leads to."""
    leaf = sparse_leaf("BCOO")
    with pytest.raises(TypeError, match="sum_duplicates"):
        norm({"w": leaf})
    dense = leaf.sum_duplicates().todense()
    chex.assert_trees_all_equal(oc.global_norm({"w": dense}), jnp.float32(52**0.5))
    norm({"w": dense})


def test_sparse_leaves_outside_of_a_mask():
    """`optax.masked` leaves a sparse leaf out, as the error says."""
    leaf = sparse_leaf("BCOO")
    tx = optax.masked(oc.clip_by_global_norm(1.0), {"w": True, "sparse": False})
    updates = {"w": GRADS, "sparse": leaf}
    clipped, _ = tx.update(updates, tx.init({"w": GRADS, "sparse": jnp.ones(5)}))
    chex.assert_trees_all_close(clipped["w"], jnp.array([0.6, 0.8]), rtol=1e-6)
    assert clipped["sparse"] is leaf


# A name that is no axis


def test_a_misspelled_axis():
    """Inside any mesh a name that is no axis is an error, also where the mesh is only set; outside, it is ignored."""
    tx = oc.clip_by_global_norm(1.0, axis_name="typo")
    clipped, state = step(tx, GRADS)
    chex.assert_trees_all_close(clipped, jnp.array([0.6, 0.8]), rtol=1e-6)
    update = lambda updates: tx.update(updates, state)[0]
    over = mesh(data=8)
    with jax.set_mesh(over), pytest.raises(ValueError, match=r"axis_name must name axes of the mesh.*'typo'"):
        jax.eval_shape(update, GRADS)
    for check_vma in (True, False):
        with pytest.raises(ValueError, match=r"axis_name must name axes of the mesh.*'typo'"):
            jax.eval_shape(jax.shard_map(update, mesh=over, in_specs=P(), out_specs=P(), check_vma=check_vma), GRADS)
    with pytest.raises(ValueError, match=r"axis_name must name axes of the mesh.*'typo'"):
        devices = jax.devices("cpu")[:8]
        jax.pmap(update, axis_name="data", devices=devices)(jnp.ones((8, 2)))


# Programs that are compiled again

SWEEPS = {
    "clip_by_leaf_norm": lambda number: oc.clip_by_leaf_norm(number, response=responses.smooth),
    "autoclip": lambda number: oc.autoclip(10 * number, 8),
    "zclip": lambda number: oc.zclip(number),
}


@pytest.mark.parametrize("name", [pytest.param(n, marks=[full] * (n != "zclip")) for n in SWEEPS])
def test_a_sweep_of_replays(name):
    """`replay` over 50 thresholds is one program under `vmap`; one by one it gives the same, and no program is kept."""
    norms, sweep = np.abs(np.random.default_rng(0).normal(size=37)), jnp.linspace(0.5, 2.5, 50)
    with compilations() as seen:
        together = jax.vmap(lambda number: oc.replay(SWEEPS[name](number), norms))(sweep)
    assert 1 <= len(seen) < 10
    one_by_one, counts = [], []
    for number in sweep[::20].tolist():
        one_by_one.append(oc.replay(SWEEPS[name](number), norms))
        gc.collect()
        counts.append(len(jax.devices()[0].client.live_executables()))
    assert counts[-1] == counts[1]
    stacked = jax.tree.map(lambda *arrays: jnp.stack(arrays), *one_by_one)
    chex.assert_trees_all_close(stacked, jax.tree.map(lambda x: x[::20], together), rtol=1e-5)


@pytest.mark.parametrize("case", [pytest.param(c, id=c.name) for c in (*CLIPS, *WRAPPERS)])
def test_a_second_init_compiles_nothing(case):
    """States of another clip of the kind, for another number and other values, are made without compiling."""
    case.tx.init(PARAMS)
    with compilations() as seen:
        case.tx.init(STEPS[0])
        case.make(1.5 * case.number).init(PARAMS)
    assert not seen


# Sizes whose reciprocals leave the range

LARGE_GRADS = {"a": jnp.ones(1), "b": jnp.ones(1)}
LARGE = {
    "leaf": lambda: oc.clip_by_leaf_norm(1.0),
    "order 3": lambda: oc.clip_by_leaf_norm(1.0, ord=3),
    "adagc": lambda: oc.adagc(),
    "sigma": lambda: oc.clip_by_sigma(3.0, 4, norm=oc.leaf_norm),
    "z_score": lambda: oc.zclip(warmup_steps=2, norm=oc.leaf_norm),
    "autoclip": lambda: oc.autoclip(50.0, 4, norm=oc.leaf_norm),
}


@pytest.mark.parametrize("name", LARGE)
def test_norms_near_the_largest_number(name):
    """Norms above 8.5e37, whose reciprocals are 0 in f32, are clipped as small ones are, compiled or not."""
    tx = LARGE[name]()
    for update in (tx.update, jax.jit(lambda updates, state: tx.update(updates, state))):
        for size in (1.0, 1e38):
            state = tx.init(LARGE_GRADS)
            for _ in range(4):
                updates, state = update(jax.tree.map(lambda x, s=size: x * s, LARGE_GRADS), state)
            expected = {"adagc": 0.5**0.5}.get(name, 1.0)
            bounded = name in ("leaf", "order 3", "adagc")
            np.testing.assert_allclose(updates["a"], [min(size, 1.0) * expected if bounded else size], rtol=1e-5)
            np.testing.assert_allclose(state.norm, size * 2**0.5, rtol=1e-6)

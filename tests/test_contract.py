"""What every transformation of the package keeps: the table of transformations against one list of contracts."""

import functools
import inspect
import pickle
import pkgutil
import warnings

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from table import TABLE, of_table
from trees import PARAMS, STEPS, eager, mesh, mixed, odd, run, small, step, tolerance

import optax_clip as oc
from optax_clip import thresholds

CLOSE = 4 * tolerance(jnp.float32)


@pytest.fixture(autouse=True)
def _exemptions(request):
    """Skips a test of the contract where the table says why it does not hold."""
    case = getattr(request.node, "callspec", None) and request.node.callspec.params.get("case")
    reason = getattr(case, "exempt", {}).get(request.node.originalname)
    if reason:
        pytest.skip(reason)


def stack(samples: list):
    """One tree with a leading axis over the samples."""
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *samples)


def types(tree):
    """What a second trace depends on."""
    return jax.tree.map(lambda x: (x.shape, x.dtype, getattr(x, "weak_type", False)), tree)


def assert_close(actual, expected, rtol=CLOSE):
    chex.assert_trees_all_equal_shapes_and_dtypes(actual, expected)
    chex.assert_trees_all_close(actual, expected, rtol=rtol, atol=rtol)


def same_bits(actual, expected):
    chex.assert_trees_all_equal_shapes_and_dtypes(actual, expected)
    chex.assert_trees_all_equal(actual, expected)


# Structure, shapes and dtypes


@of_table
def test_updates_and_state_keep_their_types(case):
    """Updates keep structure, shapes and dtypes, the state those of `init`, compiled and under strict promotion."""
    updates, params = mixed(0), mixed(1)
    state = case.tx.init(params)
    assert all(isinstance(leaf, jax.Array) and not leaf.weak_type for leaf in jax.tree.leaves(state))
    clipped, new_state = step(case.tx, updates, state, params)
    chex.assert_trees_all_equal_shapes_and_dtypes(clipped, updates)
    assert types(new_state) == types(state)
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        traced = jax.eval_shape(lambda updates: case.tx.update(updates, case.tx.init(params), params), updates)
    assert types(traced) == types((clipped, state))


@of_table
def test_init_takes_shapes(case):
    """`eval_shape` of `init` on the shapes of parameters gives the types of the state."""
    shapes = jax.eval_shape(lambda: PARAMS)
    assert types(jax.eval_shape(case.tx.init, shapes)) == types(case.tx.init(PARAMS))


@of_table
def test_leaves_without_a_norm_come_back_as_they_are(case):
    """Integers, booleans, float0, keys, functions and empty nodes are the same objects after a step, also as params."""
    updates = odd()
    clipped, state = eager(case.tx, updates, params=updates)
    chex.assert_trees_all_equal_structs(clipped, updates)
    assert types(state) == types(case.tx.init(updates))
    assert all(clipped[name] is updates[name] for name in updates if name not in ("weight", "masked", "empty"))
    alone = {"weight": updates["weight"]}
    expected, _ = step(case.tx, alone, params=alone)
    chex.assert_trees_all_close(clipped["weight"], expected["weight"], rtol=CLOSE)


@of_table
@pytest.mark.full
def test_trees_without_leaves(case):
    """Nothing comes back as nothing, and the step counts."""
    if case.name == "numbers":
        pytest.skip("its tree of thresholds is for other leaves")
    for empty in ({}, (), {"a": None}):
        clipped, state = eager(case.tx, empty, params=empty)
        chex.assert_trees_all_equal_structs(clipped, empty)
        assert types(state) == types(case.tx.init(empty))


@of_table
def test_64_bits(case):
    """Where 64 bits are on, f64 leaves stay f64 beside f32 leaves, and the state of a step has the types of `init`."""
    expected, _ = run(case.tx, STEPS[:2])
    dtypes = {"bias": np.float32, "dense": np.float64, "scale": np.float64}
    with jax.enable_x64(True):
        wide = lambda tree: {name: np.asarray(x, dtypes[name]) for name, x in tree.items()}
        samples, state = [wide(tree) for tree in STEPS[:2]], case.tx.init(wide(PARAMS))
        clipped, new_state = run(case.tx, samples, state, wide(PARAMS))
        chex.assert_trees_all_equal_shapes_and_dtypes(clipped, samples)
        assert types(new_state) == types(state)
    as_f64 = lambda tree: jax.tree.map(np.float64, tree)
    chex.assert_trees_all_close(as_f64(clipped), as_f64(expected), rtol=CLOSE, atol=CLOSE)


# Transformations of JAX


@of_table
def test_one_trace_gives_what_eager_gives(case):
    """A compiled step is traced once, whatever the updates, and gives the numbers of eager mode."""
    chex.clear_trace_counter()
    once = jax.jit(chex.assert_max_traces(case.tx.update, n=1))
    compiled = run(case.tx, step=lambda tx, updates, state, params: once(updates, state or tx.init(params), params))
    assert_close(compiled, run(case.tx, step=eager))


@of_table
def test_scan_is_a_loop(case):
    """A transformation in `lax.scan` keeps the types of the carry and gives what a loop gives."""
    over = jax.jit(lambda state, xs: jax.lax.scan(lambda s, u: case.tx.update(u, s, PARAMS)[::-1], state, xs))
    state, clipped = over(case.tx.init(PARAMS), stack(STEPS))
    looped, looped_state = run(case.tx)
    assert_close((clipped, state), (stack(looped), looped_state))


@of_table
def test_vmap_is_a_loop(case):
    """Under `vmap` each member of the batch has its own updates, state and parameters."""
    params = [small(9), small(8)]
    looped = [run(case.tx, samples, params=p) for samples, p in zip((STEPS[:2], STEPS[2:]), params)]
    states, out = jax.jit(jax.vmap(case.tx.init))(stack(params)), []
    batched = jax.jit(jax.vmap(case.tx.update))
    for pair in zip(STEPS[:2], STEPS[2:]):
        clipped, states = batched(stack(pair), states, stack(params))
        out.append(clipped)
    assert_close(states, stack([state for _, state in looped]))
    assert_close(out, [stack(pair) for pair in zip(*(clipped for clipped, _ in looped))])


@of_table
def test_numbers_may_be_traced(case):
    """The number of a transformation may be traced, also by `vmap`."""
    numbers = jnp.array([case.number, 0.75 * case.number])

    def two_steps(number):
        tx, state = case.make(number), case.make(number).init(PARAMS)
        clipped, state = tx.update(STEPS[0], state, PARAMS)
        return (clipped, *tx.update(STEPS[1], state, PARAMS))

    batched = jax.jit(jax.vmap(two_steps))(numbers)
    (first, second), state = run(case.tx, STEPS[:2])
    assert_close(jax.tree.map(lambda x: x[0], batched), (first, second, state))


@of_table
def test_derivatives(case):
    """Derivatives by the updates agree with differences, and are finite at zero; those by the number are finite."""
    weights, direction, h = small(5), small(6), 1e-2
    _, state = run(case.tx, STEPS[:3])

    def loss(number, updates):
        clipped, _ = case.make(number).update(updates, state, PARAMS)
        return optax.tree.vdot(weights, clipped)

    derivative = jax.jit(jax.value_and_grad(loss, (0, 1)))
    # Some clips jump, or have a kink, where an entry is 0.
    updates = jax.tree.map(lambda x: x + 0.1 * jnp.sign(x), small(7, 2.0))
    number = jnp.float32(case.number)
    _, (by_number, by_updates) = derivative(number, updates)
    ahead, behind = (derivative(number, optax.tree.add_scale(updates, s, direction))[0] for s in (h, -h))
    chex.assert_tree_all_finite(by_number)
    slope = optax.tree.vdot(by_updates, direction)
    chex.assert_trees_all_close(slope, (ahead - behind) / (2 * h), rtol=2e-2, atol=2e-3)
    chex.assert_tree_all_finite(derivative(number, jax.tree.map(jnp.zeros_like, updates)))


@of_table
def test_updates_and_state_can_be_donated(case):
    """Buffers of updates and state can be donated, from an eager `init`, a compiled one, and from a step."""
    expected, expected_state = run(case.tx, STEPS[:2])
    donating = jax.jit(case.tx.update, donate_argnums=(0, 1), keep_unused=True)
    for init in (case.tx.init, jax.jit(case.tx.init)):
        updates, state = jax.tree.map(jnp.copy, STEPS[0]), init(PARAMS)
        clipped, new_state = donating(updates, state, PARAMS)
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves((updates, state)))
        assert_close(clipped, expected[0])
    _, new_state = donating(jax.tree.map(jnp.copy, STEPS[1]), new_state, PARAMS)
    assert_close(new_state, expected_state)


# Transformations of Optax


@of_table
@pytest.mark.parametrize("wrap", ["masked", "partition"])
def test_leaves_outside_are_neither_changed_nor_counted(case, wrap):
    """Leaves outside of a mask or partition come back as they are, and nothing depends on them."""
    mask = {"bias": True, "dense": True, "scale": False}
    if wrap == "masked":
        tx = optax.masked(case.tx, mask)
    else:
        names = jax.tree.map(lambda inside: "clip" if inside else "rest", mask)
        tx = optax.partition({"clip": case.tx, "rest": optax.identity()}, names)
    updates, other = STEPS[0], STEPS[0] | {"scale": jnp.float32(1e6)}
    clipped, state = step(tx, updates, params=PARAMS)
    clipped_other, state_other = step(tx, other, params=PARAMS)
    same_bits((clipped | {"scale": other["scale"]}, state), (clipped_other, state_other))
    same_bits(clipped["scale"], updates["scale"])
    alone, _ = step(case.tx, updates | {"scale": None}, params=PARAMS | {"scale": None})
    assert_close({name: clipped[name] for name in ("bias", "dense")}, {name: alone[name] for name in ("bias", "dense")})


@of_table
def test_numbers_are_injected(case):
    """`inject_hyperparams` makes a state of the number, gives what the number gives, and takes one set by hand."""
    injected = optax.inject_hyperparams(lambda number: case.make(number))
    clipped, state = step(tx := injected(2 * case.number), STEPS[0], params=PARAMS)
    expected, _ = step(case.make(2 * case.number), STEPS[0], params=PARAMS)
    assert_close(clipped, expected)
    state = tx.init(PARAMS)
    state.hyperparams["number"] = jnp.float32(case.number)
    clipped, _ = run(tx, STEPS[:2], state)
    assert_close(clipped, run(case.tx, STEPS[:2])[0])


@of_table
def test_multi_steps_clips_the_mean(case):
    """In `MultiSteps` the mean of the small batches is clipped, and only whole steps are counted."""
    clipped, state = run(optax.MultiSteps(case.tx, 2).gradient_transformation())
    means = [jax.tree.map(lambda a, b: (a + b) / 2, *pair) for pair in (STEPS[:2], STEPS[2:])]
    expected, expected_state = run(case.tx, means)
    chex.assert_trees_all_equal(clipped[::2], [jax.tree.map(jnp.zeros_like, PARAMS)] * 2)
    assert_close((clipped[1::2], state.inner_opt_state), (expected, expected_state))


@of_table
def test_chain_in_front_of_adamw(case):
    """A chain with AdamW, and arguments that are for others, gives what AdamW gives on the clipped updates."""
    adamw = optax.adamw(0.1)
    with_value = functools.partial(step, value=jnp.float32(2.0))
    out, (state, _) = run(optax.chain(case.tx, adamw), step=with_value)
    clipped, expected_state = run(case.tx)
    chex.assert_trees_all_close(out, run(adamw, clipped)[0], rtol=1e-4, atol=1e-5)
    assert_close(state, expected_state)


@of_table
def test_map_params_gives_shardings_that_fit_the_state(case):
    """`optax.tree.map_params` takes nothing in the state of a clip for parameters, and its result places the state."""
    spread, everywhere = (jax.NamedSharding(mesh(data=4), jax.P(*axes)) for axes in (("data",), ()))
    shardings = {"bias": everywhere, "dense": spread, "scale": everywhere}
    tx = optax.chain(case.tx, optax.trace(0.9))
    state = tx.init(PARAMS)
    mapped = optax.tree.map_params(
        tx, lambda _, sharding: sharding, state, shardings, transform_non_params=lambda _: everywhere
    )
    placed = jax.device_put(state, mapped)  # raises unless the trees fit
    assert placed[1].trace["dense"].sharding == spread
    if case.name != "with_error_feedback":  # it keeps a carry for each parameter
        assert all(leaf.sharding == everywhere for leaf in jax.tree.leaves(placed[0]))
    same_bits(placed, state)


def optax_states() -> dict:
    """All state classes of Optax by name."""
    found = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for module in pkgutil.walk_packages(optax.__path__, "optax."):
            if "test" not in module.name:
                found |= states_of(__import__(module.name, fromlist=["_"]))
    return found


def states_of(module) -> dict:
    """The named tuples of a module that hold states."""
    classes = dict(inspect.getmembers(module, lambda x: inspect.isclass(x) and hasattr(x, "_fields")))
    return {name: kind for name, kind in classes.items() if name.endswith("State")}


def test_fields_of_states_are_those_of_no_state_of_optax():
    """`optax.tree.get` finds a field of Optax's states where ours are beside it: names are shared but `inner_state`."""
    theirs = {field: name for name, kind in optax_states().items() for field in kind._fields}
    assert len(theirs) > 50
    for module in pkgutil.walk_packages(oc.__path__, "optax_clip."):
        if module.name.endswith(("plot", "__main__")):
            continue
        for name, kind in states_of(__import__(module.name, fromlist=["_"])).items():
            if kind.__module__.startswith("optax_clip"):
                shared = {field: theirs[field] for field in kind._fields if field in theirs and field != "inner_state"}
                assert not shared, (name, shared)


def fields_of(state, name: str) -> list:
    """All fields of this name; a leaf of the parameters has it too."""
    is_field = lambda path, _: isinstance(path[-1], optax.tree_utils.NamedTupleKey)
    return [value for _, value in optax.tree.get_all_with_path(state, name, filtering=is_field)]


@of_table
def test_other_states_are_found_as_before(case):
    """`optax.tree.get` finds in other states of a chain what it found without the transformation in front."""
    rest = optax.chain(optax.adam(0.1), optax.contrib.reduce_on_plateau(), optax.trace(0.9))
    rest = optax.chain(rest, optax.transforms.conditionally_mask(optax.identity(), lambda step: step > 2))
    alone, beside = rest.init(PARAMS), optax.chain(case.tx, rest).init(PARAMS)
    for name in ("scale", "step", "count", "mu", "nu", "trace", "avg_value", "best_value", "plateau_count"):
        found, expected = (fields_of(state, name) for state in (beside, alone))
        assert (name, len(found)) == (name, len(expected)) and expected
        same_bits(found, expected)
    assert all(step == 0 for step in fields_of(beside, "clip_step"))


# States


@of_table
@pytest.mark.parametrize("through", ["pickle", pytest.param("flax", marks=pytest.mark.full)])
def test_a_saved_state_goes_on_bit_for_bit(case, through):
    """A run goes on from a state that was saved and loaded as if it had not stopped."""
    expected, expected_state = run(case.tx)
    _, state = run(case.tx, STEPS[:2])
    if through == "pickle":
        saved = pickle.loads(pickle.dumps(state))
    else:
        flax = pytest.importorskip("flax.serialization")
        saved = flax.from_bytes(case.tx.init(PARAMS), flax.to_bytes(state))
    chex.assert_trees_all_equal_structs(saved, state)
    same_bits(run(case.tx, STEPS[2:], jax.tree.map(jnp.asarray, saved)), (expected[2:], expected_state))


@of_table
@pytest.mark.parametrize("state", [optax.EmptyState(), (), None], ids=["EmptyState", "()", "None"])
def test_use_without_a_state(case, state):
    """What needs no history starts afresh where it gets no state; anything else raises and says why."""
    if case.history:
        with pytest.raises((ValueError, TypeError), match="state"):
            case.tx.update(STEPS[0], state, PARAMS)
    else:
        fresh = jax.jit(lambda updates: case.tx.update(updates, state, PARAMS))(STEPS[0])
        assert_close(fresh, step(case.tx, STEPS[0], params=PARAMS))


@of_table
def test_a_state_of_another_transformation(case):
    """A state of another kind is refused."""
    other = oc.clip_by_global_norm(1.0) if case.name in ("clip", "clip_by_value") else oc.clip(1.0)
    for state in (optax.adam(0.1).init(PARAMS)[0], oc.skip_spikes(optax.sgd(0.1)).init(PARAMS), other.init(PARAMS)):
        if type(state) is not type(case.tx.init(PARAMS)):
            with pytest.raises((ValueError, TypeError), match="state"):
                case.tx.update(STEPS[0], state, PARAMS)


# Strict settings


@of_table
def test_no_nan_and_no_inf_appears_on_the_way(case):
    """Finite updates pass with `debug_nans` where nothing is compiled, and with `debug_infs` where all is."""
    samples = [small(0, scale) for scale in (1.0, 0.0, 1e-20, 1e15)]
    with jax.debug_nans(True), jax.disable_jit():
        clipped, _ = run(case.tx, samples[:2], step=eager)
    chex.assert_tree_all_finite(clipped)
    with jax.debug_nans(True), jax.debug_infs(True):
        compiled = jax.jit(lambda *args: case.tx.update(*args))
        clipped, state = run(
            case.tx, samples, step=lambda tx, u, state, p: compiled(u, state or jax.jit(tx.init)(p), p)
        )
    chex.assert_tree_all_finite((clipped, state))


def test_the_table_has_every_transformation():
    """Every public function that returns a transformation is a row of the table."""
    rest = {"global_norm", "leaf_norm", "unit_norm", "block_rms", "group_norm", "spectral_norm", "clip_metrics"}
    rest |= {"replay", "suggest_threshold", "worst_leaves", "ClipState", "SkipState", "QK", "clip_backward"}
    rest |= {"thresholds", "responses"}
    assert set(oc.__all__) - rest <= {case.name for case in TABLE}
    assert len({case.name for case in TABLE}) == len(TABLE)
    assert set(oc.thresholds.__all__) == set(thresholds.__all__)

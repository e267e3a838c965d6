"""Clips inside of the libraries that people train with: their models, states, checkpoints and logs, as these are."""

import functools
import json

import chex
import equinox as eqx
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import trees
from flax import linen as nn
from flax import nnx
from flax.training.dynamic_scale import DynamicScale
from flax.training.train_state import TrainState
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from orbax.checkpoint import StandardCheckpointer
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboardX import SummaryWriter

import optax_clip as oc

pytestmark = pytest.mark.full

OPTIMIZERS = {
    "history": lambda: oc.skip_spikes(optax.chain(oc.autoclip(50.0, 4, norm=oc.leaf_norm), optax.adam(0.01))),
    "units": lambda: optax.chain(oc.adaptive_grad_clip(0.05), optax.sgd(0.01), oc.clip_weights(0.5)),
}
every = pytest.mark.parametrize("name", OPTIMIZERS)

STEPS = 6
X = jax.random.normal(jax.random.key(0), (STEPS, 8, 3))  # a batch a step
Y = jnp.sin(X.sum(-1, keepdims=True))


def square(prediction, y):
    return jnp.mean((prediction - y) ** 2)


def weights(seed: int = 0) -> dict:
    """The parameters of a network with one hidden layer."""
    first, second = jax.random.split(jax.random.key(seed))
    hidden = {"kernel": jax.random.normal(first, (3, 4)), "bias": jnp.zeros(4)}
    return {"hidden": hidden, "out": {"kernel": jax.random.normal(second, (4, 1)), "bias": jnp.zeros(1)}}


def predict(params, x):
    hidden = jnp.tanh(x @ params["hidden"]["kernel"] + params["hidden"]["bias"])
    return hidden @ params["out"]["kernel"] + params["out"]["bias"]


def train(tx, params, predict=predict) -> tuple:
    """What Optax alone makes of it: the last parameters and state, and the metrics of each step."""

    @jax.jit
    def step(params, state, x, y):
        grads = jax.grad(lambda p: square(predict(p, x), y))(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, oc.clip_metrics(state)

    state, metrics = tx.init(params), []
    for x, y in zip(X, Y):
        params, state, scalars = step(params, state, x, y)
        metrics.append(scalars)
    return params, state, metrics


@functools.cache
def expected(name: str) -> tuple:
    """`train` with one of the optimizers, from `weights`."""
    return train(OPTIMIZERS[name](), weights())


def once(function):
    """The function, where a second trace is an error."""
    chex.clear_trace_counter()
    return chex.assert_max_traces(function, n=1)


def assert_close(actual, expected):
    """Equal to a few roundings, which other programs may place elsewhere."""
    chex.assert_trees_all_close(actual, expected, rtol=1e-4, atol=1e-6)


# Flax NNX


class Network(nnx.Module):
    """The network of `predict`."""

    def __init__(self):
        self.hidden, self.out = (nnx.Linear(*sizes, rngs=nnx.Rngs(0)) for sizes in ((3, 4), (4, 1)))
        for name, layer in weights().items():
            for field, value in layer.items():
                setattr(getattr(self, name), field, nnx.Param(value))

    def __call__(self, x):
        return self.out(jnp.tanh(self.hidden(x)))


def nnx_step(model, optimizer, x, y):
    grads = nnx.grad(lambda model: square(model(x), y))(model)
    optimizer.update(model, grads)
    return oc.clip_metrics(optimizer.opt_state)


@every
def test_nnx_optimizer_gives_the_numbers_of_optax(name):
    """A compiled step of `nnx.Optimizer` is traced once and gives what a loop over Optax does; metrics can be kept."""
    model = Network()
    optimizer = nnx.Optimizer(model, OPTIMIZERS[name](), wrt=nnx.Param)
    step = nnx.jit(once(nnx_step))
    metrics = [step(model, optimizer, x, y) for x, y in zip(X, Y)]
    params, _, expected_metrics = expected(name)
    assert_close(nnx.to_pure_dict(nnx.state(model, nnx.Param)), params)
    assert_close(metrics, expected_metrics)


def test_nnx_skipped_step_keeps_model_and_state():
    """A NaN in a batch leaves every bit of an NNX model and of what is inside of `skip_spikes`; the next step moves."""
    model = Network()
    optimizer = nnx.Optimizer(model, OPTIMIZERS["history"](), wrt=nnx.Param)
    step = nnx.jit(once(nnx_step))
    step(model, optimizer, X[0], Y[0])
    kept = jax.tree.map(np.asarray, (nnx.state(model), optimizer.opt_state.inner_state))
    metrics = step(model, optimizer, X[1].at[0, 0].set(jnp.nan), Y[1])
    chex.assert_trees_all_equal(kept, (nnx.state(model), optimizer.opt_state.inner_state))
    assert metrics["skip/total"] == 1 and jnp.isnan(metrics["skip/norm"])
    assert step(model, optimizer, X[2], Y[2])["skip/consecutive"] == 0


def head_or_body(updates):
    """A label for each leaf by the first part of its path."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: "head" if jax.tree_util.keystr(path[:1], simple=True) == "out" else "body", updates
    )


BY_LAYER = {
    "State": lambda: oc.clip_by_leaf_norm(nnx.State({"hidden": 0.01, "out": None})),
    "labels": lambda: oc.clip_by_group_norm({"body": 0.01, "head": None}, head_or_body),
    "axes": lambda: oc.clip_by_unit_norm(0.01, axis=lambda path, leaf: 0 if path[0].key == "hidden" else None),
}


@pytest.mark.parametrize("make", BY_LAYER.values(), ids=BY_LAYER)
def test_nnx_layers_are_told_apart(make):
    """Thresholds as an `nnx.State`, labels and axes by path all reach the layer that they name."""
    model, tx = Network(), make()
    grads = nnx.grad(lambda model: square(model(X[0]), Y[0]))(model)
    clipped, _ = jax.jit(tx.update)(grads, tx.init(nnx.state(model, nnx.Param)))
    chex.assert_trees_all_equal(clipped["out"], grads["out"])
    assert oc.global_norm(clipped["hidden"]) < 0.03 < oc.global_norm(grads["hidden"])


@pytest.mark.skipif(not hasattr(nnx, "as_pure"), reason="this Flax has no nnx.as_pure")
def test_nnx_optimizer_goes_on_from_orbax(tmp_path):
    """The state of `nnx.Optimizer`, windows included, goes through Orbax by `split` and `merge`, bit for bit."""

    def start():
        model = Network()
        return model, nnx.Optimizer(model, OPTIMIZERS["history"](), wrt=nnx.Param)

    step, both = nnx.jit(nnx_step), start()
    for i in range(4):
        step(*both, X[i], Y[i])
    with StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "run", nnx.as_pure(nnx.state(both)))
        checkpointer.wait_until_finished()
        graph, new = nnx.split(start())
        restored = checkpointer.restore(tmp_path / "run", nnx.as_pure(new))
    nnx.replace_by_pure_dict(new, nnx.to_pure_dict(restored))
    resumed = nnx.merge(graph, new)
    for i in range(4, STEPS):
        chex.assert_trees_all_equal(step(*both, X[i], Y[i]), step(*resumed, X[i], Y[i]))
    chex.assert_trees_all_equal(nnx.state(both), nnx.state(resumed))


# Flax Linen


class Linen(nn.Module):
    """The network of `predict`; `boxed` parameters carry the names of their mesh axes."""

    boxed: bool = False

    @nn.compact
    def __call__(self, x):
        init = nn.initializers.lecun_normal()
        kernel_init = nn.with_partitioning(init, (None, "model")) if self.boxed else init
        hidden = nn.Dense(4, name="hidden", kernel_init=kernel_init)(x)
        return nn.Dense(1, name="out", kernel_init=kernel_init)(jnp.tanh(hidden))


@every
def test_linen_train_state_gives_the_numbers_of_optax(name):
    """`TrainState.apply_gradients` under jit is traced once and gives what a loop over Optax gives."""
    state = TrainState.create(apply_fn=Linen().apply, params=weights(), tx=OPTIMIZERS[name]())

    @jax.jit
    @once
    def step(state, x, y):
        grads = jax.grad(lambda params: square(state.apply_fn({"params": params}, x), y))(state.params)
        state = state.apply_gradients(grads=grads)
        return state, oc.clip_metrics(state.opt_state)

    metrics = []
    for x, y in zip(X, Y):
        state, scalars = step(state, x, y)
        metrics.append(scalars)
    assert_close((state.params, state.opt_state, metrics), expected(name))


@every
def test_linen_boxed_parameters_are_clipped_as_bare_ones(name):
    """Parameters in the boxes of `nn.with_partitioning` keep them, and get the updates that bare ones get."""
    params = Linen(boxed=True).init(jax.random.key(0), X[0])["params"]
    grads = jax.grad(lambda params: square(Linen(boxed=True).apply({"params": params}, X[0]), Y[0]))(params)
    bare, bare_grads = nn.unbox((params, grads))
    tx = OPTIMIZERS[name]()
    updates, state = jax.jit(tx.update)(grads, tx.init(params), params)
    bare_updates, bare_state = jax.jit(tx.update)(bare_grads, tx.init(bare), bare)
    chex.assert_trees_all_equal_structs(updates, params)
    chex.assert_trees_all_equal(nn.unbox(updates), bare_updates)
    chex.assert_trees_all_equal(oc.clip_metrics(state), oc.clip_metrics(bare_state))


def test_flax_dynamic_scale_and_skipping_agree():
    """With `DynamicScale`, each f16 step that overflows halves its scale and is skipped, and norms are unscaled."""
    tx = oc.skip_spikes(optax.chain(oc.clip_by_global_norm(0.5), optax.adam(0.01)))
    params = weights()

    def loss(params, x, y):
        low = optax.tree.cast(params, jnp.float16)
        return square(predict(low, x.astype(jnp.float16)).astype(jnp.float32), y)

    @jax.jit
    @once
    def step(scale, params, state, x, y):
        scale, finite, _, grads = scale.value_and_grad(loss)(params, x, y)
        updates, state = tx.update(grads, state, params)
        return scale, optax.apply_updates(params, updates), state, finite

    scale, state = DynamicScale(scale=jnp.float32(2.0**18), fin_steps=jnp.int32(0)), tx.init(params)
    for x, y in zip(X, Y):
        before, skipped = params, oc.clip_metrics(state)["skip/total"]
        norm = oc.global_norm(jax.grad(loss)(params, x, y))
        scale, params, state, finite = step(scale, params, state, x, y)
        metrics = oc.clip_metrics(state)
        assert finite == (metrics["skip/total"] == skipped) == (metrics["skip/consecutive"] == 0)
        if finite:  # f16 rounds differently at another scale
            chex.assert_trees_all_close(metrics["skip/norm"], norm, rtol=1e-2)
        else:
            chex.assert_trees_all_equal(params, before)
    assert 0 < metrics["skip/total"] < STEPS
    assert scale.scale == 2.0**18 / 2 ** metrics["skip/total"]


# Equinox


def callables(tree) -> list:
    return [leaf for leaf in jax.tree.leaves(tree) if callable(leaf)]


def equinox_model():
    """A module with functions, a static field and a frozen array of integers among its leaves."""
    model = eqx.nn.MLP(3, 1, 4, 1, activation=jnp.tanh, key=jax.random.key(0))
    return eqx.nn.Sequential([eqx.nn.Lambda(jnp.asarray), model])


@pytest.mark.parametrize(("name", "params"), [("history", "filtered"), ("units", "module")])
def test_equinox_module_gives_the_numbers_of_its_arrays(name, params):
    """A filtered step, with None or functions beside the weights, gives what a list of the weights gives."""
    model, tx = equinox_model(), OPTIMIZERS[name]()
    arrays, static = eqx.partition(model, eqx.is_inexact_array)
    leaves, treedef = jax.tree.flatten(arrays)
    seen = (lambda model: eqx.filter(model, eqx.is_inexact_array)) if params == "filtered" else lambda model: model

    @eqx.filter_jit
    @once
    def step(model, state, x, y):
        grads = eqx.filter_grad(lambda model: square(jax.vmap(model)(x), y))(model)
        updates, state = tx.update(grads, state, seen(model))
        chex.assert_trees_all_equal_structs(updates, grads)
        return eqx.apply_updates(model, updates), state, oc.clip_metrics(state)

    state, metrics = tx.init(eqx.filter(model, eqx.is_inexact_array)), []
    for x, y in zip(X, Y):
        model, state, scalars = step(model, state, x, y)
        metrics.append(scalars)
    trained, _, expected_metrics = train(
        OPTIMIZERS[name](), leaves, lambda p, x: jax.vmap(eqx.combine(treedef.unflatten(p), static))(x)
    )
    assert_close(jax.tree.leaves(eqx.filter(model, eqx.is_inexact_array)), trained)
    assert_close(metrics, expected_metrics)
    assert callables(model) == callables(static)


def test_equinox_module_as_updates_keeps_its_functions():
    """A whole module goes through a clip as updates: weights are scaled, functions come back as they are."""
    model = equinox_model()
    tx = optax.chain(oc.clip_by_leaf_norm(0.1), oc.clip_randomly(oc.clip(0.5), 0.5))
    clipped, _ = eqx.filter_jit(tx.update)(model, tx.init(model))
    chex.assert_trees_all_equal_structs(clipped, model)
    assert len(callables(clipped)) == 3 and all(map(lambda a, b: a is b, callables(clipped), callables(model)))
    norms = jax.tree.leaves(oc.leaf_norm(clipped))
    assert len(norms) == 4 and max(norms) <= 0.1 * (1 + 1e-6)


# Haiku


def test_haiku_with_state_gives_the_numbers_of_optax():
    """A network with moving averages trains in one trace; its parameters alone enter norms."""

    def network(x, training):
        x = hk.BatchNorm(True, True, 0.9)(hk.Linear(4)(x), training)
        return hk.Linear(1)(jnp.tanh(x))

    model = hk.without_apply_rng(hk.transform_with_state(network))
    params, averages = model.init(jax.random.key(0), X[0], training=True)
    tx = OPTIMIZERS["history"]()

    @jax.jit
    @once
    def step(params, averages, state, x, y):
        def loss(params):
            prediction, new = model.apply(params, averages, x, training=True)
            return square(prediction, y), new

        grads, averages = jax.grad(loss, has_aux=True)(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), averages, state, oc.clip_metrics(state)

    trained, state, metrics = params, tx.init(params), []
    for x, y in zip(X, Y):
        trained, averages, state, scalars = step(trained, averages, state, x, y)
        metrics.append(scalars)
    alone = train(OPTIMIZERS["history"](), params, lambda p, x: model.apply(p, averages, x, training=True)[0])
    assert_close((trained, metrics), (alone[0], alone[2]))


# Orbax


def on_mesh(tx, **axes):
    """New parameters and state where they lie on this mesh: kernels spread by columns, all else everywhere."""
    mesh = trees.mesh(**axes)
    everywhere = NamedSharding(mesh, P())
    spread = {"kernel": NamedSharding(mesh, P(None, tuple(axes))), "bias": everywhere}
    params = jax.device_put({name: jnp.ones((8, 8)) if name == "kernel" else jnp.zeros(8) for name in spread}, spread)
    state = tx.init(params)
    placement = optax.tree.map_params(
        tx, lambda _, sharding: sharding, state, spread, transform_non_params=lambda _: everywhere
    )
    return params, jax.device_put(state, placement)


def test_orbax_restores_on_another_mesh(tmp_path):
    """A run saved on a mesh of 4 x 2 goes on: there bit for bit, on 8 devices in a row and on 2 to rounding."""
    tx = optax.chain(oc.autoclip(50.0, 4, norm=oc.leaf_norm), optax.sgd(0.1, momentum=0.9))

    @jax.jit
    def step(params, state, x):
        grads = jax.grad(lambda p: jnp.mean(jnp.tanh(x @ p["kernel"] + p["bias"]) ** 2))(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    batches = jax.random.normal(jax.random.key(1), (12, 4, 8))

    def run(params, state, steps):
        for i in steps:
            params, state = step(params, state, batches[i])
        return params, state

    middle = run(*on_mesh(tx, a=4, b=2), range(8))
    end = run(*middle, range(8, 12))
    with StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "run", middle)
        checkpointer.wait_until_finished()
        for axes in ({"a": 4, "b": 2}, {"a": 8}, {"a": 2}):
            target = on_mesh(tx, **axes)
            restored = checkpointer.restore(tmp_path / "run", target)
            chex.assert_trees_all_equal(restored, middle, strict=True)
            chex.assert_trees_all_equal_structs(restored, middle)
            assert jax.tree.map(lambda x: x.sharding, restored) == jax.tree.map(lambda x: x.sharding, target)
            resumed = run(*restored, range(8, 12))
            if axes == {"a": 4, "b": 2}:
                chex.assert_trees_all_equal(resumed, end)
            assert_close(resumed, end)
    assert 0 < oc.clip_metrics(end[1])["clip/clip_rate"] < 1


# Optax


def muon_by_hand():
    """A partition whose AdamW leaves alone are clipped, written in two ways."""
    muon, adamw = (lambda: optax.contrib.muon(0.1, adam_b1=0.9)), (lambda: optax.adamw(0.01))
    labels = {"hidden": {"kernel": "muon", "bias": "adamw"}, "out": "adamw"}
    inside = {"muon": muon(), "adamw": optax.chain(oc.clip_by_global_norm(0.5), adamw())}
    before = jax.tree.map(lambda label: None if label == "muon" else label, labels)
    return {
        "partition": optax.partition(inside, labels),
        "labels": optax.chain(
            oc.clip_by_group_norm({"adamw": 0.5}, before), optax.partition({"muon": muon(), "adamw": adamw()}, labels)
        ),
    }


@pytest.mark.parametrize("way", ["partition", "labels"])
def test_muon_leaves_stay_out_of_the_norm(way):
    """A Muon leaf of any size, or NaN, changes nothing for the AdamW leaves, and its own update is that of no clip."""
    params, tx, alone = weights(), muon_by_hand()[way], optax.contrib.muon(0.1, adam_b1=0.9)
    adamw = optax.chain(oc.clip_by_global_norm(0.5), optax.adamw(0.01))

    def first_update(tx, grads, params):
        updates, state = tx.update(grads, tx.init(params), params)
        return updates, oc.clip_metrics(state) if tx is not alone else {}

    first_update = jax.jit(first_update, static_argnums=0)
    for size in (1.0, 1e25, jnp.nan):
        grads = weights(1)
        grads["hidden"]["kernel"] *= size
        updates, metrics = first_update(tx, grads, params)
        rest, rest_params = ({"out": tree["out"], "bias": tree["hidden"]["bias"]} for tree in (grads, params))
        kernel, bias = updates["hidden"]["kernel"], updates["hidden"]["bias"]
        assert_close(({"out": updates["out"], "bias": bias}, metrics), first_update(adamw, rest, rest_params))
        assert_close(kernel, first_update(alone, grads["hidden"]["kernel"], params["hidden"]["kernel"])[0])


def schedule_free(place: str) -> tuple:
    """A schedule-free optimizer without a clip, and with one in a chain before it or in its base."""
    if place == "outside":
        free = optax.contrib.schedule_free_adamw(0.1)
        return free, optax.chain(oc.clip_by_global_norm(0.5), free)
    inner = optax.sgd(0.1)
    clipped = optax.contrib.schedule_free(optax.chain(oc.clip_by_global_norm(0.5), inner), 0.1)
    return optax.contrib.schedule_free(inner, 0.1), clipped


@pytest.mark.parametrize("place", ["outside", "inside"])
def test_schedule_free_takes_clipped_gradients(place):
    """In a chain before a schedule-free optimizer, or in its base, a clip gives what clipped gradients give."""
    (free, tx), clip = schedule_free(place), oc.clip_by_global_norm(0.5)
    by_hand = optax.GradientTransformation(
        free.init, lambda grads, state, params: free.update(clip.update(grads, clip.init(params))[0], state, params)
    )
    params, state, metrics = train(tx, weights())
    other, other_state = weights(), by_hand.init(weights())
    step = jax.jit(lambda p, state, x, y: by_hand.update(jax.grad(lambda p: square(predict(p, x), y))(p), state, p))
    for x, y in zip(X, Y):
        updates, other_state = step(other, other_state, x, y)
        other = optax.apply_updates(other, updates)
    assert_close(params, other)
    free_state = state if place == "inside" else state[1]
    assert_close(*map(optax.contrib.schedule_free_eval_params, (free_state, other_state), (params, other)))
    assert metrics[0]["clip/scale"] < 1


def test_reduce_on_plateau_does_not_see_skipped_steps():
    """The loss of a skipped step, NaN or not, leaves no trace in `reduce_on_plateau`, which acts behind the clip."""
    plateau = optax.contrib.reduce_on_plateau(factor=0.5, patience=1)
    tx = oc.skip_spikes(optax.chain(oc.clip_by_global_norm(1.0), optax.sgd(1.0), plateau))
    update = jax.jit(once(lambda grads, state, value: tx.update(grads, state, value=value)))

    def run(steps):
        # Before 0.2.7 Optax starts from weak types, and the second step would be another trace.
        state, sizes = jax.tree.map(lambda x: x.astype(x.dtype), tx.init(jnp.zeros(2))), []
        for gradient, value in steps:
            updates, state = update(jnp.full(2, gradient), state, jnp.float32(value))
            sizes.append(float(jnp.linalg.norm(updates)))
        return sizes, state

    good = [(3.0, 1.0)] * 5
    sizes, state = run(good)
    bad_sizes, bad_state = run([*good[:2], (np.nan, np.nan), (np.nan, 0.0), *good[2:]])
    np.testing.assert_allclose(sizes, 0.5 ** np.arange(5), rtol=1e-6)
    assert bad_sizes == [*sizes[:2], 0.0, 0.0, *sizes[2:]]
    chex.assert_trees_all_equal(bad_state.inner_state, state.inner_state)


# Logs


@every
def test_metrics_are_a_flat_dict_of_numbers(name):
    """Metrics are a flat dict of finite Python numbers that strict JSON gives back, in two groups of a logger."""
    _, state, _ = expected(name)
    numbers = {name: value.item() for name, value in jax.device_get(oc.clip_metrics(state)).items()}
    assert numbers == json.loads(json.dumps(numbers, allow_nan=False))
    assert all(type(value) in (float, int) for value in numbers.values())
    assert {key.split("/")[0] for key in numbers} == ({"clip", "skip"} if name == "history" else {"clip"})


def test_tensorboard_reads_what_was_written(tmp_path):
    """Metrics of a scan, written as scalars, come back from the event files: a NaN and counters too, step by step."""
    tx = oc.skip_spikes(optax.chain(oc.clip_by_leaf_norm(0.5), optax.sgd(0.1)))
    grads = jax.vmap(lambda scale: jax.tree.map(lambda w: scale * w, weights(1)))(jnp.array([0.01, 1.0, jnp.nan, 2.0]))

    def step(state, grads):
        _, state = tx.update(grads, state)
        return state, oc.clip_metrics(state)

    _, history = jax.device_get(jax.jit(lambda grads: jax.lax.scan(step, tx.init(weights()), grads))(grads))
    with SummaryWriter(tmp_path) as writer:
        for name, values in history.items():
            for i, value in enumerate(values):
                writer.add_scalar(name, value, i)
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert set(events.Tags()["scalars"]) == set(history)
    for name, values in history.items():
        found = events.Scalars(name)
        assert [event.step for event in found] == list(range(4))
        np.testing.assert_array_equal(np.float32([event.value for event in found]), np.float32(values))
    assert history["skip/total"].tolist() == [0, 0, 1, 1]


def norms_by_path(grads) -> dict:
    leaves = jax.tree_util.tree_leaves_with_path(oc.leaf_norm(grads))
    return {jax.tree_util.keystr(path, simple=True, separator="/"): norm for path, norm in leaves}


def test_norms_by_path_find_the_leaf():
    """Among finite leaves the exploding one has the largest norm, a NaN is in its own leaf alone, in one trace."""
    norms = jax.jit(once(norms_by_path))
    grads = weights(1)
    usual = norms(grads)
    assert list(usual) == ["hidden/bias", "hidden/kernel", "out/bias", "out/kernel"]
    grads["hidden"]["kernel"] *= 1e30  # squares beyond f32
    grads["out"]["bias"] += jnp.nan
    found = norms(grads)
    chex.assert_trees_all_close(found["hidden/kernel"], 1e30 * usual["hidden/kernel"], rtol=1e-5)
    assert [name for name, norm in found.items() if jnp.isnan(norm)] == ["out/bias"]
    assert found["out/kernel"] == usual["out/kernel"]


def test_paths_are_those_of_each_library():
    """Norms by path name the leaves of NNX, Linen, Equinox and Haiku as these libraries name them."""
    x, key = X[0], jax.random.key(0)
    haiku = hk.transform(lambda x: hk.Linear(1, name="out")(x)).init(key, x)
    found = {
        "nnx": norms_by_path(nnx.to_pure_dict(nnx.state(Network(), nnx.Param))),
        "linen": norms_by_path(Linen().init(key, x)["params"]),
        "equinox": norms_by_path(eqx.nn.MLP(3, 1, 4, 1, key=key)),
        "haiku": norms_by_path(haiku),
    }
    assert found["nnx"].keys() == found["linen"].keys() == norms_by_path(weights()).keys()
    assert list(found["equinox"]) == [f"layers/{i}/{name}" for i in (0, 1) for name in ("weight", "bias")]
    assert list(found["haiku"]) == ["out/b", "out/w"]

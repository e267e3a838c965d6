"""QK-clip: which weights it scales for every kind of attention, and what it leaves alone."""

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
from trees import mesh, step

import optax_clip as oc
from optax_clip import QK, clip_qk
from optax_clip.weights.attention import QKClipState

DTYPES = {"f16": jnp.float16, "bf16": jnp.bfloat16, "f32": jnp.float32, "f64": jnp.float64}


def everything(**fields):
    """The parts where each leaf belongs to one attention."""
    return lambda path, leaf: QK("a", **fields)


def factors(tx, weights, logits):
    """What a step without updates multiplies each weight by."""
    updates, state = step(tx, jax.tree.map(jnp.zeros_like, weights), params=weights, max_logits={"a": logits})
    new = optax.apply_updates(weights, updates)
    return jax.tree.map(lambda x, w: np.asarray(x) / np.asarray(w), new, weights), state


def ones(**shapes):
    return {name: jnp.ones(shape) for name, shape in shapes.items()}


# Which weights are scaled


def test_heads_above_the_bound_share_the_factor():
    """Queries and keys of a head take the root of bound / logit each, so that their product takes all of it."""
    tx = clip_qk(everything(), 100.0)
    found, state = factors(tx, ones(q=(3, 2, 4), k=(3, 2, 4), bias=(2, 4)), jnp.array([50.0, 400.0]))
    for name in found:
        by_head = np.broadcast_to(np.array([[1.0], [0.5]]), found[name].shape)
        np.testing.assert_allclose(found[name], by_head, rtol=1e-6)
    chex.assert_trees_all_equal(state, QKClipState(jnp.float32(400.0), jnp.float32(0.5)))


def test_queries_alone_are_exact_for_shared_keys():
    """With the whole share on the queries, each head of GQA ends at its own bound."""
    parts = lambda path, leaf: QK("a", share=1) if path[0].key == "q" else None
    logits = jnp.array([50.0, 400.0, 200.0, 100.0])
    found, state = factors(clip_qk(parts), ones(q=(3, 4, 2), k=(3, 2, 2)), logits)
    np.testing.assert_allclose(found["q"][0, :, 0], [1, 0.25, 0.5, 1], rtol=1e-6)
    np.testing.assert_array_equal(found["k"], 1)
    assert state.heads_clipped == 0.5


def test_shared_keys_take_the_smallest_factor_of_their_heads():
    """In GQA, keys with a share of their own go by the head with the largest logit."""
    found, _ = factors(clip_qk(everything()), ones(k=(3, 2, 2)), jnp.array([50.0, 400.0, 200.0, 100.0]))
    np.testing.assert_allclose(found["k"][0, :, 0], [0.5, 0.5**0.5], rtol=1e-6)


def test_shares_of_latent_attention():
    """In MLA, entries of one leaf have shares of their own: golden numbers at a logit of 200."""
    nope, rope = 3, 2
    with_rotation = np.where(np.arange(nope + rope) < nope, 0.5, 1.0)
    with_values = np.where(np.arange(nope + 4) < nope, 0.5, 0.0)
    shares = {"wq_b": with_rotation, "wkv_b": jnp.asarray(with_values)}
    parts = lambda path, leaf: QK("a", share=shares[path[0].key]) if path[0].key in shares else None
    weights = ones(wq_b=(6, 1, nope + rope), wkv_b=(6, 1, nope + 4), wk_rope=(6, 1, rope))
    found, _ = factors(clip_qk(parts), weights, jnp.array([200.0]))
    half = 0.7071068
    np.testing.assert_allclose(found["wq_b"][0, 0], [half] * nope + [0.5] * rope, rtol=1e-6)
    np.testing.assert_allclose(found["wkv_b"][0, 0], [half] * nope + [1.0] * 4, rtol=1e-6)
    np.testing.assert_array_equal(found["wk_rope"], 1)


LAYOUTS = {  # shape of the leaf, its part, and the factors of two heads of two entries, moved to the end
    "kernel": ((3, 2, 2), QK("a"), (1, 2)),
    "bias": ((2, 2), QK("a"), (0, 1)),
    "outputs first": ((4, 3), QK("a", heads=2), (0,)),
    "outputs first, one axis": ((4,), QK("a", axis=0, heads=2), (0,)),
    "outputs last": ((3, 4), QK("a", axis=-1, heads=2), (1,)),
    "heads first": ((2, 3, 2), QK("a", axis=0), (0, 2)),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout):
    """Heads are found in kernels, biases, and flattened axes."""
    shape, part, last = LAYOUTS[layout]
    found, _ = factors(clip_qk(lambda path, leaf: part), ones(w=shape), jnp.array([400.0, 50.0]))
    by_entry = np.moveaxis(found["w"], last, range(-len(last), 0)).reshape(-1, 4)
    np.testing.assert_allclose(by_entry, np.broadcast_to([0.5, 0.5, 1, 1], by_entry.shape), rtol=1e-6)


@pytest.mark.parametrize("axis", [(0, 2), (2, 0), (0, -2)])
def test_stacked_layers(axis):
    """Where layers are stacked, each has logits of its own; further axes in front are those of a batch."""
    wanted = np.array([[1.0, 0.5], [0.25, 1.0], [1.0, 1.0]], np.float32)  # of 3 layers with 2 heads each
    shape = (2, 3, 3, 4) if axis == (2, 0) else (3, 3, 2, 4)
    batch = np.stack([100 / wanted**2, np.zeros_like(wanted)])[:, None]
    found, state = factors(clip_qk(everything(axis=axis)), ones(w=shape), batch)
    by_head = found["w"][:, 0, :, 0]
    np.testing.assert_allclose(by_head.T if axis == (2, 0) else by_head, wanted, rtol=1e-6)
    assert state.max_logit == 1600 and jnp.isclose(state.heads_clipped, 1 / 3)


def test_attentions_have_logits_of_their_own():
    """Leaves go by the name of their attention; the state has the largest logit of all and the mean share."""
    parts = lambda path, leaf: QK(path[0].key, share=1.0) if path[1].key != "value" else None
    weights = {name: ones(query=(3, 2, 2), value=(3, 2, 2)) for name in ("first", "second")}
    logits = {"first": jnp.array([[10.0, 200.0]]), "second": (jnp.array([400.0, 50.0]), jnp.array([1.0, 60.0]))}
    zeros = jax.tree.map(jnp.zeros_like, weights)
    updates, state = step(tx := clip_qk(parts), zeros, params=weights, max_logits=logits)
    np.testing.assert_allclose(updates["first"]["query"][0, :, 0], [0, -0.5], rtol=1e-6)
    np.testing.assert_allclose(updates["second"]["query"][0, :, 0], [-0.75, 0], rtol=1e-6)
    chex.assert_trees_all_equal([updates[name]["value"] for name in updates], [zeros["first"]["value"]] * 2)
    metrics = oc.clip_metrics((optax.EmptyState(), state))
    assert metrics == {"qk/max_logit": 400.0, "qk/clipped": 0.5}
    chex.assert_trees_all_equal(tx.init(weights), QKClipState(jnp.float32(0), jnp.float32(0)))


# What is left alone


@pytest.mark.parametrize("name", DTYPES)
def test_harmless_logits_leave_updates_alone(name):
    """Logits that are negative, 0, tiny, at the bound, NaN or inf leave all updates bit-identical."""
    with jax.enable_x64(name == "f64"):
        random = np.random.default_rng(0)
        weights, updates = ({"q": jnp.asarray(random.normal(size=(5, 9, 4)), DTYPES[name])} for _ in range(2))
        logits = jnp.array([-5.0, 0.0, -0.0, 1e-30, 100.0, -jnp.inf, jnp.inf, jnp.nan, -3e38], jnp.float32)
        tx = clip_qk(everything())
        new, state = step(tx, updates, params=weights, max_logits={"a": logits})
    chex.assert_trees_all_equal_shapes_and_dtypes(new, updates)
    chex.assert_trees_all_equal(new, updates)
    assert state.heads_clipped == 0 and state.max_logit == jnp.inf


@pytest.mark.parametrize("logit", [101.0, 1e10, 3e38])
def test_large_logits_leave_weights_finite(logit):
    """The factor is right for logits of all sizes, and of other heads nothing moves by a bit."""
    random = np.random.default_rng(0)
    weights, updates = (jnp.asarray(random.normal(size=(5, 2, 4)), jnp.float32) for _ in range(2))
    new, _ = step(clip_qk(everything()), updates, params=weights, max_logits={"a": jnp.array([logit, 99.0])})
    chex.assert_trees_all_equal(new[:, 1], updates[:, 1])
    landed = np.asarray(optax.apply_updates(weights, new), np.float64)[:, 0]
    expected = (np.asarray(weights, np.float64) + np.asarray(updates, np.float64))[:, 0] * np.sqrt(100 / logit)
    np.testing.assert_allclose(landed, expected, atol=1e-6)


def test_dtypes_are_kept():
    """Updates keep their dtype beside parameters of others, and logits may be of any."""
    for of_weight, of_update in (("f32", "bf16"), ("bf16", "f32"), ("bf16", "bf16"), ("f16", "f16"), ("f32", "f32")):
        weights, updates = jnp.ones((3, 2, 2), DTYPES[of_weight]), jnp.zeros((3, 2, 2), DTYPES[of_update])
        for logits in (jnp.array([400, 50]), jnp.array([400, 50], jnp.bfloat16), np.array([400.0, 50.0])):
            new, state = step(clip_qk(everything()), updates, params=weights, max_logits={"a": logits})
            assert new.dtype == updates.dtype and state.max_logit.dtype == jnp.float32
            np.testing.assert_array_equal(np.asarray(new, np.float32)[0, :, 0], [-0.5, 0.0])


def test_a_traced_bound():
    """The bound may be traced; below 0 it acts as 0, and one of NaN or inf clips nothing."""
    logits, parts = {"a": jnp.array([400.0, -5.0])}, everything(axis=0)
    run = jax.jit(lambda c: clip_qk(parts, c).update(jnp.zeros(2), (), jnp.ones(2), max_logits=logits)[0])
    for bound, expected in ((4.0, [-0.9, 0]), (-1.0, [-1, 0]), (0.0, [-1, 0]), (jnp.nan, [0, 0]), (jnp.inf, [0, 0])):
        np.testing.assert_allclose(run(bound), expected, rtol=1e-6)


# A model

LAYERS, HEADS, SIZE, WIDTH = 2, 4, 8, 16


def model(key, kv_heads, dtype=jnp.float32):
    """Two layers of attention, of which head 2 of the first has large logits."""
    shapes = {"query": (WIDTH, HEADS, SIZE), "key": (WIDTH, kv_heads, SIZE), "value": (WIDTH, kv_heads, SIZE)}
    params = {}
    for layer in range(LAYERS):
        keys = jax.random.split(jax.random.fold_in(key, layer), 4)
        params[f"layer_{layer}"] = {
            name: jax.random.normal(k, shape) * WIDTH**-0.5 for k, (name, shape) in zip(keys, shapes.items())
        } | {"out": jax.random.normal(keys[3], (HEADS, SIZE, WIDTH)) * (HEADS * SIZE) ** -0.5}
    return jax.tree.map(lambda x: x.astype(dtype), params)


def forward(params, x):
    """The outputs, and for each layer the largest logit of each example and head."""
    found = {}
    for name, layer in params.items():
        q, k, v = (jnp.einsum("btd,dhs->bths", x, layer[part]) for part in ("query", "key", "value"))
        k, v = (jnp.repeat(y, HEADS // y.shape[2], axis=2) for y in (k, v))
        logits = jnp.einsum("bths,bzhs->bhtz", q, k, preferred_element_type=jnp.float32) * SIZE**-0.5
        logits = jnp.where(jnp.tril(jnp.ones(logits.shape[-2:], bool)), logits, -jnp.inf)
        found[name] = logits.max((2, 3))
        out = jnp.einsum("bhtz,bzhs->bths", jax.nn.softmax(logits).astype(x.dtype), v)
        x = x + jnp.einsum("bths,hsd->btd", out, layer["out"])
    return x, found


def queries_and_keys(path, leaf):
    return QK(path[0].key) if path[1].key in ("query", "key") else None


def queries(path, leaf):
    return QK(path[0].key, share=1.0) if path[1].key == "query" else None


X = jax.random.normal(jax.random.key(7), (3, 6, WIDTH))


@functools.cache
def gradient_step():
    """Compiled: updates by the sign of the gradient, and the largest logits."""

    def run(params, x):
        def loss(params):
            y, found = forward(params, x)
            return jnp.mean(jnp.square(y.astype(jnp.float32) - 1)), found

        grads, found = jax.grad(loss, has_aux=True)(params)
        return jax.tree.map(lambda g: -1e-3 * jnp.sign(g), grads), found

    return jax.jit(run)


def driven(kv_heads, dtype=jnp.float32):
    """The model with the largest logit of head 2 of layer 0 at 1000, and its batch."""
    params, x = model(jax.random.key(0), kv_heads, dtype), X.astype(dtype)
    large = gradient_step()(params, x)[1]["layer_0"].max(0)[2]
    query = params["layer_0"]["query"]
    params["layer_0"]["query"] = query.at[:, 2].multiply((1000 / large).astype(dtype))
    return params, x


@pytest.mark.parametrize("parts", [queries_and_keys, queries])
@pytest.mark.parametrize("kv_heads", [HEADS, 2])
def test_a_head_with_a_logit_of_1000(parts, kv_heads):
    """The largest logit of that head is at the bound in the next step, to 1 %; other heads keep every bit."""
    params, x = driven(kv_heads)
    updates, found = gradient_step()(params, x)
    before = found["layer_0"].max(0)
    np.testing.assert_allclose(before[2], 1000, rtol=1e-5)
    assert (before[np.array([0, 1, 3])] < 100).all()
    new, state = step(clip_qk(parts), updates, params=params, max_logits=found)
    assert state.heads_clipped == 1 / (LAYERS * HEADS)
    after = gradient_step()(optax.apply_updates(params, new), x)[1]["layer_0"].max(0)
    assert 99 < after[2] <= 101
    assert gradient_step()(optax.apply_updates(params, updates), x)[1]["layer_0"].max(0)[2] > 900
    of_key = 2 * kv_heads // HEADS
    moved = {"query": 2} | ({"key": of_key} if parts is queries_and_keys else {})
    for name, head in moved.items():
        assert (new["layer_0"][name][:, head] != updates["layer_0"][name][:, head]).all()
        new["layer_0"][name] = new["layer_0"][name].at[:, head].set(updates["layer_0"][name][:, head])
    chex.assert_trees_all_equal(new, updates)


@pytest.mark.full
@pytest.mark.parametrize(("name", "rtol"), [("bf16", 0.06), ("f16", 0.01)])
def test_a_head_with_a_large_logit_in_low_precision(name, rtol):
    """In bf16 and f16 the logit ends at the bound to the rounding of the weights."""
    params, x = driven(HEADS, DTYPES[name])
    for parts in (queries, queries_and_keys):
        updates, found = gradient_step()(params, x)
        new, _ = step(clip_qk(parts), updates, params=params, max_logits=found)
        after = gradient_step()(optax.apply_updates(params, new), x)[1]["layer_0"].max(0)
        np.testing.assert_allclose(after[2], 100, rtol=rtol)


@pytest.mark.full
def test_logits_stay_at_the_bound():
    """Over 100 steps no logit of a forward pass after a clip is above the bound by more than a step moves it."""
    (params, x), tx = driven(2), clip_qk(queries_and_keys, 3.0)
    for _ in range(100):
        updates, found = gradient_step()(params, x)
        updates, _ = step(tx, updates, params=params, max_logits=found)
        params = optax.apply_updates(params, updates)
        largest = max(logits.max() for logits in gradient_step()(params, x)[1].values())
        assert largest < 3.2


def test_logits_reach_the_clip_through_wrappers():
    """`max_logits` goes through chains and `skip_spikes`; `MultiSteps` passes those of the last small batch alone."""
    weights, grads = jnp.ones((3, 2, 2)), jnp.zeros((3, 2, 2))
    high, low = ({"a": jnp.array([x, 50.0])} for x in (400.0, 50.0))
    tx = oc.skip_spikes(optax.chain(oc.clip_by_global_norm(1.0), optax.adamw(1e-3), clip_qk(everything())))
    updates, _ = step(tx, grads, params=weights, max_logits=high)
    np.testing.assert_allclose(updates[0, :, 0], [-0.5, -1e-7], atol=1e-6)
    tx = optax.MultiSteps(optax.chain(optax.sgd(1.0), clip_qk(everything())), 2)
    for logits, expected in (((high, low), 0.0), ((low, high), -0.5)):
        state = tx.init(weights)
        for each in logits:
            updates, state = tx.update(grads, state, weights, max_logits=each)
        np.testing.assert_allclose(updates[0, 0, 0], expected)


# Errors

WEIGHTS = {"q": jnp.ones((3, 4, 2)), "k": jnp.ones((3, 2, 2))}
ZEROS = jax.tree.map(jnp.zeros_like, WEIGHTS)


def refused(logits, parts=None, weights=WEIGHTS):
    tx = clip_qk(parts or everything())
    return lambda: tx.update(jax.tree.map(jnp.zeros_like, weights), tx.init(weights), weights, **logits)


REFUSED = {
    "parts must be a function, got str": lambda: clip_qk("query"),
    "max_logit must be >= 0, got -1": lambda: clip_qk(everything(), -1.0),
    "max_logit must be a number, got nan": lambda: clip_qk(everything(), np.nan),
    r"parts must return a QK for some leaves, got None for \[\"\['k'\]\"": lambda: clip_qk(
        lambda path, leaf: None
    ).init(WEIGHTS),
    "parts must return None or a QK that fits the leaf, got str 'a' for": lambda: clip_qk(lambda p, w: "a").init(ZEROS),
    "parts must return None or a QK .*axis=3.* for .*'k'.* of shape": lambda: clip_qk(everything(axis=3)).init(ZEROS),
    "parts must return None or a QK .*axis=.1, 1.*": lambda: clip_qk(everything(axis=(1, 1))).init(ZEROS),
    "axis must be None, an int": lambda: clip_qk(everything(axis="heads")).init(ZEROS),
    "heads must be an int, got float": lambda: clip_qk(everything(heads=2.5)).init(ZEROS),
    "heads must be >= 1": lambda: clip_qk(everything(heads=-1)).init(ZEROS),
    "parts must return None or a QK .*share=-0.5.*share is >= 0": lambda: clip_qk(everything(share=-0.5)).init(ZEROS),
    "parts must return None or a QK .*share=nan": lambda: clip_qk(everything(share=np.nan)).init(ZEROS),
    "parts must return None or a QK .*axis=<function": lambda: clip_qk(everything(axis=lambda p, w: 0)).init(ZEROS),
    "labels must be hashable": lambda: clip_qk(lambda path, leaf: QK(["a"])).init(ZEROS),
    "parts must return None or a QK .*share='x'": lambda: clip_qk(everything(share="x")).init(ZEROS),
    "parts must return None or a QK .*share=array": lambda: clip_qk(everything(share=np.ones(7))).init(ZEROS),
    r"max_logits must have .* of \['a'\], as parts names them, got None. Call update\(updates, ": refused({}),
    r"max_logits must have .* got those of \['b'\]": refused({"max_logits": {"b": jnp.ones(4)}}),
    r"max_logits must have .* of \['a'\], .* got those of \['a', 'b'\]": refused(
        {"max_logits": {"a": jnp.ones(4), "b": jnp.ones(4)}}
    ),
    r"max_logits\['a'\] must end in .*'q'.*\(3,\).*\(4,\).*pass heads= to QK": refused(
        {"max_logits": {"a": jnp.ones(3)}}, weights={"q": WEIGHTS["q"]}
    ),
    r"max_logits\['a'\] must end in .*and 2 heads": refused(
        {"max_logits": {"a": jnp.ones(4)}}, everything(heads=2), {"q": jnp.ones((3, 3))}
    ),
    r"max_logits\['a'\] must end in an axis for each of \(0, 1\)": refused(
        {"max_logits": {"a": jnp.ones((2, 4))}}, everything(axis=(0, 1)), {"q": WEIGHTS["q"]}
    ),
    "params are missing": lambda: clip_qk(everything()).update(ZEROS, (), max_logits={"a": jnp.ones(4)}),
    "state must be a QKClipState": lambda: clip_qk(everything()).update(ZEROS, optax.TraceState(1), WEIGHTS),
}  # fmt: skip


@pytest.mark.parametrize("text", REFUSED)
def test_what_is_refused(text):
    """The message begins with the argument and says what is wrong with it."""
    with pytest.raises((TypeError, ValueError), match=r"^" + text):
        REFUSED[text]()


# On many devices

SPREAD = {  # kernel with as many heads as logits, keys with fewer, a flattened axis, a bias
    "heads": {"q": P(None, "model"), "k": P(None, "model"), "flat": P("model"), "bias": P("model")},
    "features": {"q": P("model"), "k": P("model"), "flat": P(None, "model"), "bias": P(None, "model")},
}
LOGITS = jnp.array([50.0, 400, -5, 1e4, 120, 99, jnp.nan, 777])


def spread_case(heads=8):
    random = np.random.default_rng(0)
    shapes = {"q": (16, 8, 4), "k": (16, 4, 4), "flat": (32, 16), "bias": (8, 4)}
    weights, updates = (
        {name: jnp.asarray(random.normal(size=s), jnp.float32) for name, s in shapes.items()} for _ in range(2)
    )
    parts = lambda path, leaf: QK("a", heads=heads if path[0].key == "flat" else None)
    return parts, weights, updates


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("split", SPREAD)
def test_sharded_arrays(kind, split):
    """Under jit the answer is that of one device, and of the weights nothing is sent."""
    parts, weights, updates = spread_case()
    tx, devices = clip_qk(parts), mesh(kind, model=4)
    expected = step(tx, updates, params=weights, max_logits={"a": LOGITS})
    shardings = {name: NamedSharding(devices, spec) for name, spec in SPREAD[split].items()}
    whole = NamedSharding(devices, P())
    for spec in [P(), P("model")] if split == "heads" else [P()]:
        args = jax.device_put((updates, weights), (shardings, shardings))
        args = (*args, jax.device_put(tx.init(weights), whole), jax.device_put(LOGITS, NamedSharding(devices, spec)))
        run = jax.jit(lambda u, w, s, logits: tx.update(u, s, w, max_logits={"a": logits}))
        with jax.set_mesh(devices):
            program = run.lower(*args).compile()
            new = program(*args)
        chex.assert_trees_all_equal(jax.device_get(new), jax.device_get(expected))
        sent = re.findall(r"= (\S+) (?:all|collective|reduce-scatter)[\w-]*\(", program.as_text())
        assert set(sent) <= {"f32[]"}  # of the state


def inside(parts, axis_name, specs, of_logits, logits=LOGITS, check_vma=True):
    """Weights, updates and a step on shards, as a function without arguments."""
    _, weights, updates = spread_case()
    weights, updates = ({name: tree[name] for name in specs} for tree in (weights, updates))
    if specs == {"k": P()}:  # as many heads as there are logits on a device
        weights, updates = ({"k": tree["k"][:, :2]} for tree in (weights, updates))
    tx = clip_qk(parts, axis_name=axis_name)
    run = jax.shard_map(
        lambda u, w, x: tx.update(u, tx.init(w), w, max_logits={"a": x}),
        mesh=mesh(model=4), in_specs=(specs, specs, of_logits), out_specs=(specs, P()), check_vma=check_vma,
    )  # fmt: skip
    alone = jax.jit(lambda: clip_qk(spread_case()[0]).update(updates, (), weights, max_logits={"a": LOGITS}))
    return lambda: jax.jit(run)(updates, weights, logits), alone


@pytest.mark.parametrize("check_vma", [True, False])
def test_split_heads_inside_shard_map(check_vma):
    """Where weights and logits are split by heads alike, the answer is that of one device."""
    run, alone = inside(spread_case(2)[0], "model", SPREAD["heads"], P("model"), check_vma=check_vma)
    new, state = run()
    expected, expected_state = alone()
    chex.assert_trees_all_equal(jax.device_get(new), jax.device_get(expected))
    assert state.heads_clipped == expected_state.heads_clipped == 0.5


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("split", ["features", "nothing"])
def test_whole_heads_inside_shard_map(split, check_vma):
    """Where each device holds all heads, and all logits, `axis_name` is (); it may miss where types tell as much."""
    specs = SPREAD.get(split, dict.fromkeys(SPREAD["features"], P()))
    axis_name = None if split == "nothing" and check_vma else ()
    run, alone = inside(spread_case()[0], axis_name, specs, P(), check_vma=check_vma)
    chex.assert_trees_all_equal(jax.device_get(run()), jax.device_get(alone()))


def test_what_may_be_wrong_inside_shard_map_is_refused():
    """Logits that are not split as heads are, or of which the type does not tell, are an error that says what to do."""
    all_heads, some = spread_case()[0], spread_case(2)[0]
    heads, features = ({"q": specs["q"]} for specs in SPREAD.values())
    cases = {
        "heads split, logits whole": (some, "model", heads, P()),
        "heads split, logits whole, no name": (some, None, heads, P()),
        "heads split, no name": (some, None, heads, P("model")),
        "logits of a batch": (all_heads, None, {"q": P()}, P("model")),
        "features split, logits of a batch": (all_heads, (), features, P("model")),
        "features split, no name": (all_heads, None, features, P()),
        "shared keys, no name": (all_heads, None, {"k": SPREAD["features"]["k"]}, P()),
        "shared keys whole, heads split": (some, "model", {"k": P()}, P("model")),
        "flat, no name": (all_heads, None, {"flat": SPREAD["heads"]["flat"]}, P()),
    }
    for name, case in cases.items():
        logits = jnp.tile(LOGITS, 4) if "batch" in name else LOGITS
        with pytest.raises(ValueError, match=r"^max_logits must be split over devices as the heads of .*axis_name"):
            inside(*case, logits)[0]()
            pytest.fail(name)
    with pytest.raises(ValueError, match=r"^axis_name is missing"):
        inside(all_heads, None, features, P(), check_vma=False)[0]()
    with pytest.raises(ValueError, match=r"^axis_name must name axes of the mesh"):
        inside(all_heads, "typo", features, P())[0]()


def test_logits_of_a_batch_that_is_split():
    """The largest over the data is taken by `pmax` before the update."""
    parts, weights, updates = spread_case()
    tx = clip_qk(parts)
    logits = jnp.where(jnp.isnan(LOGITS), 0, LOGITS)  # maxima over devices may lose a NaN
    batch = jnp.stack([logits, logits - 1])
    run = jax.shard_map(
        lambda u, w, x: tx.update(u, (), w, max_logits={"a": jax.lax.pmax(x, "data")}),
        mesh=mesh(data=2), in_specs=(P(), P(), P("data")), out_specs=P(),
    )  # fmt: skip
    expected = step(tx, updates, params=weights, max_logits={"a": logits})
    chex.assert_trees_all_equal(jax.device_get(jax.jit(run)(updates, weights, batch)), jax.device_get(expected))


def test_vmap_over_models():
    """Models in a batch have logits of their own."""
    tx = clip_qk(everything(share=1.0))
    weights, logits = jnp.ones((2, 3, 2, 2)), jnp.array([[200.0, 50.0], [50.0, 400.0]])
    run = jax.vmap(lambda w, x: tx.update(jnp.zeros_like(w), tx.init(w), w, max_logits={"a": x}))
    updates, state = jax.jit(run)(weights, logits)
    np.testing.assert_allclose(updates[:, 0, :, 0], [[-0.5, 0], [0, -0.75]], rtol=1e-6)
    np.testing.assert_array_equal(state.max_logit, [200, 400])

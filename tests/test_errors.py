"""Errors of norms, thresholds and norm clips: what raises, and how the text begins. Nothing is compiled."""

import functools
import math
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.experimental.sparse import BCOO
from jax.sharding import PartitionSpec as P
from table import TABLE, labels
from trees import mesh

import optax_clip as oc
from optax_clip import thresholds

X = jnp.ones(3)
GRADS = {"b": X, "w": jnp.ones((4, 5))}
RANK_6 = {"conv": [jnp.ones((2,) * 6)]}
SPARSE = {"b": X, "w": BCOO((jnp.ones(2), jnp.zeros((2, 2), int)), shape=(4, 5))}  # its first entry in two parts
DENSE = (oc.clip(1.0), oc.clip_by_global_norm(1.0), oc.clip_by_leaf_norm(1.0), oc.zclip(), oc.clip_weights(1.0))
INF, NAN = float("inf"), float("nan")
KINDS = "a number, a scalar array, a schedule, a rule, or None"
PREFIX = "must be one value or a prefix of the tree of updates: "


def init(tx, params=GRADS):
    return jax.eval_shape(tx.init, params)


def step(tx, updates=GRADS, params=GRADS, seen=None):
    """One update with a fresh state, or that of other updates, traced."""
    return jax.eval_shape(lambda: tx.update(updates, tx.init(updates if seen is None else seen), params))


def update(tx, state, updates=GRADS):
    return jax.eval_shape(lambda: tx.update(updates, state))


def on_mesh(function, **options):
    """The function of updates that are spread over a mesh of 8 devices."""
    spread = jax.shard_map(function, mesh=mesh(data=8), in_specs=P("data"), out_specs=P(), **options)
    return jax.eval_shape(spread, {"w": jnp.ones((16, 3))})


def leaf(t):
    return oc.clip_by_leaf_norm(t)


def group(names, max_norms=None):
    return oc.clip_by_group_norm({"a": 1.0, "b": None} if max_norms is None else max_norms, names)


def fraction_of(norm):
    return oc.clip_by_norm(norm, thresholds.param_fraction(0.1))


SKIP = oc.skip_spikes(optax.sgd(0.1), 5.0)
BY_LOSS = oc.skip_spikes(optax.sgd(0.1), value_threshold=1.0)
TYPE, VALUE = TypeError, ValueError
ROWS = [
    # Thresholds
    (
        lambda: oc.clip_by_global_norm(-1.0),
        VALUE,
        "max_norm must be >= 0, got -1. A negative bound would",
    ),
    (lambda: oc.clip_by_global_norm(-2), VALUE, "max_norm must be >= 0, got -2."),
    (lambda: oc.clip_by_global_norm(np.float32(-1.5)), VALUE, "max_norm must be >= 0, got -1.5."),
    (lambda: oc.clip_by_global_norm(jnp.float32(-1.5)), VALUE, "max_norm must be >= 0, got -1.5."),
    (lambda: oc.clip_by_global_norm(-INF), VALUE, "max_norm must be >= 0, got -inf."),
    (lambda: oc.clip_by_global_norm(NAN), VALUE, "max_norm must be a number, got nan."),
    (lambda: oc.clip_by_global_norm(jnp.bfloat16(NAN)), VALUE, "max_norm must be a number, got nan."),
    (lambda: oc.clip_by_global_norm(10**400), VALUE, "max_norm must fit a float, got an int above 1e308."),
    (lambda: oc.clip_by_global_norm(True), TYPE, f"max_norm must be {KINDS}, got bool True."),
    (lambda: oc.clip_by_global_norm(jnp.array(True)), TYPE, f"max_norm must be {KINDS}, got "),
    (lambda: oc.clip_by_global_norm("1.0"), TYPE, f"max_norm must be {KINDS}, got str '1.0'."),
    (lambda: oc.clip_by_global_norm(1j), TYPE, f"max_norm must be {KINDS}, got complex 1j."),
    (lambda: oc.clip_by_global_norm(np.ones(2)), VALUE, "max_norm must be a scalar, got an array of shape (2,)."),
    (lambda: oc.clip_by_global_norm({"w": 1.0}), TYPE, f"max_norm must be {KINDS}, got dict"),
    (lambda: oc.clip_by_leaf_norm(-1.0), VALUE, "max_norm must be >= 0, got -1."),
    (lambda: oc.clip_by_leaf_norm({"w": 1.0, "b": -1.0}), VALUE, "max_norm must be >= 0, got -1."),
    (lambda: oc.clip_by_unit_norm(-1.0), VALUE, "max_norm must be >= 0, got -1."),
    (lambda: oc.clip_by_block_rms(-1.0), VALUE, "threshold must be >= 0, got -1."),
    (lambda: oc.clip_by_norm(oc.leaf_norm, -1.0), VALUE, "threshold must be >= 0, got -1."),
    (lambda: group("a", {"a": -1.0}), VALUE, "max_norms['a'] must be >= 0, got -1."),
    (lambda: oc.clip_by_norm_range(-1.0, None), VALUE, "min_norm must be >= 0, got -1."),
    (lambda: oc.clip_by_norm_range(None, -1.0), VALUE, "max_norm must be >= 0, got -1."),
    (lambda: oc.clip_by_norm_range(2.0, 1.0), VALUE, "min_norm must be <= max_norm, got 2 > 1. Exchange them"),
    (lambda: oc.adaptive_grad_clip(-0.1), VALUE, "clipping must be >= 0, got -0.1."),
    (lambda: oc.adaptive_grad_clip(0.1, eps=-1.0), VALUE, "eps must be >= 0, got -1."),
    # Schedules
    (lambda: step(leaf(lambda count: X)), VALUE, "max_norm must return a scalar, got an array of shape (3,)"),
    (lambda: step(leaf(lambda count: "1")), TYPE, "max_norm must return a real number, got str from the schedule."),
    # Trees of thresholds
    (lambda: step(leaf({"w": 1.0})), VALUE, f"max_norm {PREFIX}only one of them has ['b']."),
    (lambda: step(leaf({"w": 1.0, "b": 1.0, "c": None})), VALUE, f"max_norm {PREFIX}only one of them has ['c']."),
    (lambda: step(leaf([1.0])), VALUE, f"max_norm {PREFIX}there is list beside dict at the root."),
    (lambda: step(leaf({"w": {"a": 1.0}, "b": 1.0})), VALUE, f"max_norm {PREFIX}there is dict beside a leaf at ['w']."),
    (lambda: step(leaf({"w": 1.0}), X), VALUE, f"max_norm {PREFIX}there is dict beside a leaf at the root."),
    (lambda: step(leaf({"encoder": 1.0}), {"encoder": X, "head": X}), VALUE, f"max_norm {PREFIX}only one of them has"),
    (
        lambda: step(oc.clip_by_norm(oc.global_norm, {"w": 1.0, "b": 2.0})),
        VALUE,
        "threshold has different values for ['b'] and ['w'], which share one norm.",
    ),
    # Functions
    (lambda: oc.clip_by_norm("l2", 1.0), TYPE, "norm must be a function, got str 'l2'. For example: "),
    (lambda: oc.clip_by_norm_range(1.0, 2.0, norm="l2"), TYPE, "norm must be a function, got str 'l2'."),
    (lambda: oc.zclip(norm=2.0), TYPE, "norm must be a function, got float 2.0."),
    (lambda: oc.clip_by_global_norm(1.0, response="tanh"), TYPE, "response must be a function, got str 'tanh'."),
    (
        lambda: step(oc.clip_by_leaf_norm(1.0, response=lambda norm, threshold: jnp.ones(7))),
        VALUE,
        "response must return one norm for each norm, got shape (7,) for norms of shape ",
    ),
    (lambda: init(oc.clip_by_norm(lambda u: {"x": jnp.ones([])}, 1.0)), VALUE, f"the result of norm {PREFIX}only one"),
    (
        lambda: init(oc.clip_by_norm(lambda u: {"w": jnp.ones(4), "b": None}, 1.0)),
        VALUE,
        "norm must return arrays that broadcast against their leaves, got shape (4,) for the leaf ['w']",
    ),
    (
        lambda: init(oc.clip_by_norm(lambda u: oc.norms.Blocks({"a": jnp.ones([])}, ("a",)), 1.0)),
        VALUE,
        "norm must return Blocks with a known key or None for each leaf, got ['a']",
    ),
    (lambda: leaf(lambda path, leaf: 2.0), TYPE, "max_norm must take (step), got function"),
    (lambda: oc.clip(lambda path, leaf: 2.0), TYPE, "max_delta must take (step), got function"),
    (lambda: oc.clip_weights(lambda: 2.0), TYPE, "max_value must take (step), got function"),
    (lambda: thresholds.minimum(lambda path, leaf: 2.0), TYPE, "thresholds[0] must take (step), got function"),
    (lambda: group("a", {"a": lambda path, leaf: 2.0}), TYPE, "max_norms['a'] must take (step), got function"),
    (lambda: group(lambda path, leaf: "a"), TYPE, "labels must take (updates), got function"),
    (lambda: oc.clip_by_norm(lambda path, leaf: 2.0, 1.0), TYPE, "norm must take (updates), got function"),
    (lambda: oc.clip_by_global_norm(1.0, response=jnp.abs), TYPE, "response must take (norm, threshold), got "),
    (lambda: oc.clip_by_unit_norm(1.0, axis=lambda leaf: 0), TYPE, "axis must take (path, leaf), got function"),
    (lambda: oc.project_weights(lambda path, leaf: leaf), TYPE, "projection must take (weights), got function"),
    # Sparse gradients
    *(
        (lambda tx=tx: step(tx, SPARSE, GRADS), TYPE, "updates must be dense arrays, got BCOO at ['w'], ")
        for tx in DENSE
    ),
    # Orders and axes
    (lambda: oc.clip_by_global_norm(1.0, ord=0.5), VALUE, "ord must be >= 1, got 0.5."),
    (lambda: oc.clip_by_leaf_norm(1.0, ord=0), VALUE, "ord must be >= 1, got 0."),
    (lambda: oc.clip_by_unit_norm(1.0, ord=-INF), VALUE, "ord must be >= 1, got -inf."),
    (lambda: oc.clip_by_group_norm({"a": 1.0}, "a", ord=NAN), VALUE, "ord must be >= 1, got nan."),
    (lambda: oc.global_norm(GRADS, ord=0.5), VALUE, "ord must be >= 1, got 0.5."),
    (lambda: oc.leaf_norm(GRADS, ord="fro"), TYPE, "ord must be a number, got str 'fro'."),
    (lambda: oc.unit_norm(GRADS, ord=True), TYPE, "ord must be a number, got bool True."),
    (lambda: oc.group_norm("a", ord=2j), TYPE, "ord must be a number, got complex 2j."),
    (lambda: oc.leaf_norm(GRADS, ord=np.ones(2)), TYPE, "ord must be a number, got ndarray"),
    (lambda: oc.clip_by_global_norm(1.0, ord=jnp.float32(2)), TYPE, "ord must be a Python number, got a JAX array."),
    (lambda: oc.clip_by_unit_norm(1.0, "0"), TYPE, "axis must be None, an int, a tuple of ints, or a rule(path, leaf)"),
    (lambda: oc.clip_by_block_rms(1.0, axis=1.0), TYPE, "axis must be None, an int, a tuple of ints"),
    (lambda: oc.adaptive_grad_clip(0.1, axis=(0, True)), TYPE, "axis must be None, an int, a tuple of ints"),
    (lambda: oc.unit_norm(GRADS, axis={"w": 0}), TYPE, "axis must be None, an int, a tuple of ints"),
    (lambda: oc.unit_norm(GRADS, axis=1), VALUE, "axis (1,) does not fit the leaf ['b'] of shape (3,)."),
    (lambda: oc.unit_norm(GRADS, axis=-3), VALUE, "axis (-3,) does not fit the leaf ['b'] of shape (3,)."),
    (lambda: oc.block_rms({"w": jnp.ones((4, 5))}, axis=(0, -2)), VALUE, "axis (0, -2) does not fit the leaf ['w']"),
    (lambda: oc.unit_norm(GRADS, axis=lambda path, leaf: "0"), TYPE, "axis must be None, an int, a tuple of ints"),
    (lambda: oc.unit_norm(GRADS, axis=lambda path, leaf: 7), VALUE, "axis (7,) does not fit the leaf ['b']"),
    (lambda: oc.unit_norm(RANK_6), VALUE, "axis is missing: the leaf ['conv'][0] of shape (2, 2, 2, 2, 2, 2) has 6"),
    (lambda: init(oc.clip_by_unit_norm(1.0), RANK_6), VALUE, "axis is missing: the leaf ['conv'][0]"),
    # Labels
    (lambda: oc.clip_by_group_norm(1.0, "a"), TYPE, "max_norms must map each label to its threshold, got float 1.0."),
    (lambda: group("c"), VALUE, "max_norms must have a threshold for each label, got labels 'c' beside thresholds for"),
    (lambda: group("a", {}), VALUE, "max_norms must have a threshold for each label, got labels 'a' beside"),
    (lambda: group({"w": "a", "b": "c"}), VALUE, "max_norms must have a threshold for each label, got labels 'c'"),
    (lambda: init(group(lambda u: "c")), VALUE, "max_norms must have a threshold for each label, got labels 'c'"),
    (lambda: init(group({"w": "a"})), VALUE, f"labels {PREFIX}only one of them has ['b']."),
    (lambda: oc.group_norm({"w": "a"})(GRADS), VALUE, f"labels {PREFIX}only one of them has ['b']."),
    (lambda: oc.group_norm({"w": "a", "b": np.ones(2)})(GRADS), TYPE, "labels must be hashable, got ndarray"),
    # Parameters
    (lambda: step(oc.adaptive_grad_clip(0.1), params=None), VALUE, "params are missing."),
    (lambda: step(fraction_of(oc.leaf_norm), params=None), VALUE, "params are missing."),
    (
        lambda: step(oc.clip_by_norm_range(thresholds.param_fraction(0.1), None), params=None),
        VALUE,
        "params are missing.",
    ),
    (
        lambda: step(oc.adaptive_grad_clip(0.1), params={"w": X}),
        VALUE,
        "params must have the structure of the updates: only one of them has ['b'].",
    ),
    (
        lambda: step(oc.adaptive_grad_clip(0.1), params={"w": jnp.ones((5, 4)), "b": X}),
        VALUE,
        "params must have the shapes of the updates, got (5, 4) at ['w'] where the updates have (4, 5).",
    ),
    (
        lambda: step(oc.adaptive_grad_clip(0.1), params={"w": jnp.ones((4, 5), int), "b": X}),
        VALUE,
        "params must have the blocks of the updates, got ",
    ),
    # States
    (lambda: update(oc.zclip(), optax.EmptyState()), TYPE, "state must be a ClipState, got an empty one, and"),
    (lambda: update(oc.clip_by_global_norm(lambda count: 1.0), ()), TYPE, "state must be a ClipState, got an empty"),
    (lambda: update(oc.zclip(), None), TYPE, "state must be a ClipState, got an empty one,"),
    (
        lambda: update(oc.clip_by_global_norm(1.0), oc.clip(1.0).init(GRADS)),
        TYPE,
        "state must be a ClipState, got ValueClipState, which another transformation keeps.",
    ),
    (
        lambda: update(oc.clip_by_global_norm(1.0), optax.scale_by_adam().init(GRADS)),
        TYPE,
        "state must be a ClipState, got ScaleByAdamState, which another transformation keeps.",
    ),
    (
        lambda: update(oc.zclip(), oc.clip_by_global_norm(1.0).init(GRADS)),
        VALUE,
        "state must hold the history that ",
    ),
    (lambda: update(oc.zclip(), oc.autoclip(10.0, 4).init(GRADS)), VALUE, "state must hold the history that "),
    (
        lambda: update(oc.autoclip(10.0, 4), oc.autoclip(10.0, 8).init(GRADS)),
        VALUE,
        "state must hold a history of shape (4,) for the blocks of these updates, got (8,).",
    ),
    (
        lambda: step(oc.adagc(), seen=GRADS | {"c": X}),
        VALUE,
        "state must hold a history of shape (2,) for the blocks of these updates, got (3,).",
    ),
    (
        lambda: step(oc.adagc(), seen={"b": X}),
        VALUE,
        "state must hold a history of shape (2,) for the blocks of these updates, got ",
    ),
    (
        lambda: step(oc.zclip(norm=oc.unit_norm), seen={"b": X, "w": jnp.ones((4, 6))}),
        VALUE,
        "state must hold a history of shape ",
    ),
    # Meshes
    (lambda: on_mesh(oc.unit_norm), VALUE, "axis_name is missing: the leaf ['w'] varies over ('data',)"),
    (lambda: on_mesh(functools.partial(oc.block_rms, axis=0)), VALUE, "axis_name is missing: the leaf ['w'] varies"),
    (
        lambda: on_mesh(oc.global_norm, check_vma=False),
        VALUE,
        "axis_name is missing: over which of the mesh axes ('data',) the leaf ['w']",
    ),
    (
        lambda: on_mesh(oc.group_norm("a"), check_vma=False),
        VALUE,
        "axis_name is missing: over which of the mesh axes ('data',) the leaf ['w']",
    ),
    (
        lambda: on_mesh(functools.partial(oc.leaf_norm, axis_name="model")),
        VALUE,
        "axis_name must name axes of the mesh ('data',), got ['model'].",
    ),
    (lambda: oc.leaf_norm(GRADS, axis_name=3), TYPE, "axis_name must be a name, a tuple of names, None, or a prefix"),
    (lambda: oc.leaf_norm(GRADS, axis_name={"x": "data"}), VALUE, f"axis_name {PREFIX}only one of them has ['x']."),
    (
        lambda: oc.zclip(norm=oc.leaf_norm, axis_name="data"),
        VALUE,
        "axis_name must be None where norm is given, got 'data'. Pass it to the norm",
    ),
    # Losses, logits, examples, and the backward pass
    (
        lambda: update(BY_LOSS, BY_LOSS.init(GRADS)),
        VALUE,
        "value is missing. value_threshold compares it with the loss. Call update(updates, state, params, value=loss).",
    ),
    (
        lambda: on_mesh(lambda w: BY_LOSS.update(w, BY_LOSS.init(w), value=w["w"][0, 0])[0], check_vma=True),
        VALUE,
        "value must be the same on all devices, got one that varies over ('data',).",
    ),
    (
        lambda: update(BY_LOSS, SKIP.init(GRADS)),
        VALUE,
        "state must be of a skip_spikes with a value_threshold just where this one has it. To keep all other states",
    ),
    (
        lambda: update(SKIP, BY_LOSS.init(GRADS)),
        VALUE,
        "state must be of a skip_spikes with a value_threshold just where this one has it. To keep all other states",
    ),
    (
        lambda: update(
            oc.skip_spikes(optax.sgd(0.1), thresholds.z_score()), oc.skip_spikes(optax.sgd(0.1)).init(GRADS)
        ),
        VALUE,
        "state must hold the history that ",
    ),
    (lambda: oc.skip_spikes(optax.sgd(0.1), max_consecutive=1.5), VALUE, "max_consecutive must be a whole number, got"),
    (
        lambda: oc.worst_leaves(SPARSE),
        TYPE,
        "tree must be dense arrays, got BCOO at ['w'], which may hold",
    ),
    (
        lambda: step(oc.clip_qk(lambda path, leaf: oc.QK("attention", axis=-1))),
        VALUE,
        "max_logits must have the largest logits of each of ['attention'], as parts names them, got None.",
    ),
    (
        lambda: step(oc.per_example(1.0), {"w": jnp.float32(1)}, None),
        VALUE,
        "updates must have an axis of examples before those of the parameters, got shape () ",
    ),
    (
        lambda: jax.eval_shape(lambda x: oc.clip_backward(x, oc.zclip()), X),
        VALUE,
        "clip must have no history, but the gradients that it returns depend on its state.",
    ),
    # Metrics
    (lambda: oc.clip_metrics(oc.clip(1.0).init(GRADS)), VALUE, "opt_state must hold a ClipState or a SkipState, "),
    # Rules
    (lambda: oc.autoclip(-1), VALUE, "percentile must be >= 0, got -1."),
    (lambda: oc.autoclip(100.5), VALUE, "percentile must be <= 100, got 100.5."),
    (lambda: oc.autoclip("10"), TYPE, "percentile must be a number or a scalar array, got str '10'."),
    (lambda: oc.autoclip(10**400), VALUE, "percentile must fit a float, got an int above 1e308."),
    (lambda: oc.autoclip(10, 0), VALUE, "window must be >= 1 and < 2^31, got 0."),
    (lambda: oc.autoclip(10, 2**31), VALUE, "window must be >= 1 and < 2^31, got "),
    (lambda: oc.autoclip(10, 2.5), TYPE, "window must be an int, got float 2.5."),
    (lambda: oc.autoclip(10, jnp.array(3)), TYPE, "window must be a Python number, got a JAX array."),
    (lambda: oc.clip_by_sigma(-1), VALUE, "sigmas must be >= 0, got -1."),
    (lambda: oc.clip_by_sigma(3.0, np.array([3])), TYPE, "window must be an int, got ndarray"),
    (lambda: oc.zclip(True), TYPE, "z_max must be a number or a scalar array, got bool True."),
    (lambda: oc.zclip(-1.0), VALUE, "z_max must be >= 0, got -1."),
    (lambda: oc.zclip(decay=2), VALUE, "decay must be <= 1, got 2."),
    (lambda: oc.zclip(decay=NAN), VALUE, "decay must be a number, got nan."),
    (lambda: oc.zclip(warmup_steps=-1), VALUE, "warmup_steps must be >= 0, got -1."),
    (lambda: oc.zclip(warmup_steps=2.5), VALUE, "warmup_steps must be a whole number, got 2.5."),
    (lambda: oc.zclip(factor=NAN), VALUE, "factor must be a number, got nan."),
    (lambda: oc.zclip(spike="cut"), VALUE, "spike must be one of ('rescale', 'mean', 'limit'), got str 'cut'."),
    (lambda: oc.zclip(spike="mean", factor=0.5), VALUE, "factor must be None for spike='mean', got 0.5."),
    (lambda: oc.adagc(-1.0), VALUE, "max_norm must be >= 0, got -1."),
    (lambda: oc.adagc(max_ratio=-1), VALUE, "max_ratio must be >= 0, got -1."),
    (lambda: oc.adagc(decay=1.5), VALUE, "decay must be <= 1, got 1.5."),
    (lambda: oc.adagc(warmup_steps=-1), VALUE, "warmup_steps must be >= 0, got -1."),
    (lambda: thresholds.minimum(), VALUE, "thresholds must not be empty."),
    (lambda: thresholds.minimum(1.0, -1.0), VALUE, "thresholds[1] must be >= 0, got -1."),
    (lambda: thresholds.param_fraction(-0.1), VALUE, "fraction must be >= 0, got -0.1."),
    (lambda: thresholds.param_fraction(0.1, eps=-1.0), VALUE, "eps must be >= 0, got -1."),
    (
        lambda: step(leaf(optax.stateless(lambda norm, _: norm * jnp.ones(2)))),
        VALUE,
        "the threshold of a rule must be a scalar, got shape (2,).",
    ),
    (
        lambda: step(
            leaf(optax.GradientTransformation(lambda norm: jnp.zeros([]), lambda norm, state, _=None: (norm, (state,))))
        ),
        VALUE,
        "a rule must return a state of the structure, shapes and kinds of numbers of the last one, got ",
    ),
]


def text_of(error) -> str:
    """The text without what JAX adds about its traceback."""
    return str(error).split("\n---")[0]


@pytest.mark.parametrize(("call", "kind", "beginning"), ROWS, ids=[text[:40] for _, _, text in ROWS])
def test_what_raises(call, kind, beginning):
    """The call raises this type; its text begins with the argument and what is wrong, and says what to do."""
    with pytest.raises((TypeError, ValueError)) as caught:
        call()
    message = text_of(caught.value)
    assert message.startswith(beginning)
    assert caught.type is kind
    assert message.endswith(".") and len(re.split(r"\. +(?=[A-Z])", message)) >= 2, "it does not say what to do"


@pytest.mark.parametrize("case", [case for case in TABLE if case.needs_params], ids=lambda case: case.name)
def test_missing_params(case):
    """Without params the text shows the call, also in a chain."""
    for tx in (case.tx, optax.chain(case.tx, optax.sgd(0.1))):
        with pytest.raises(ValueError) as caught:
            step(tx, params=None)
        assert re.match(r"params are missing\. .*update\(updates, state, params\)\.$", text_of(caught.value))


def test_numbers_of_the_compiled_program_raise_nothing():
    """What is known only in the compiled program is not checked: NaN, negative numbers, inf."""

    def steps(t):
        for tx in (oc.clip_by_group_norm({"vectors": t, "others": t}, labels), oc.zclip(t, t, t, factor=t)):
            tx.update(GRADS, tx.init(GRADS))
        for tx in (oc.adagc(t, t, t, t), oc.clip_by_norm_range(t, t), oc.autoclip(t, 4)):
            tx.update(GRADS, tx.init(GRADS))
        return t

    jax.eval_shape(steps, jnp.float32(math.nan))


PAGE = (pathlib.Path(__file__).parents[1] / "docs" / "errors.md").read_text()
QUOTES = [" ".join(quote.split()) for quote in re.findall(r"^`([\w ]+ (?:must|is|are|has) [^`]+)`", PAGE, re.MULTILINE)]


@functools.cache
def texts() -> list[str]:
    """The texts of all rows."""
    found = []
    for call, _, _ in ROWS:
        with pytest.raises(Exception) as caught:
            call()
        found.append(text_of(caught.value))
    return found


@pytest.mark.parametrize("quote", QUOTES, ids=[quote[:40] for quote in QUOTES])
def test_the_page_of_errors_quotes_what_is_raised(quote):
    """Each text on docs/errors.md, up to its dots, is how the text of a row begins."""
    assert any(text.startswith(quote.split("...")[0].strip()) for text in texts())

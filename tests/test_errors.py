"""Every error message: which function and argument, what was given, and what to do."""

import functools
import math
import re

import chex
import clips
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import trees
from jax.sharding import PartitionSpec as P

import optax_clip as oc

GRADS = {"w": jnp.ones((4, 5)), "b": jnp.ones(3)}
INF = float("inf")


def assert_raises(call, error, *parts: str):
    """The call raises exactly this error with these texts in this order: `function: what is wrong. What to do.`"""
    with pytest.raises(error) as caught:
        call()
    message = str(caught.value)
    assert caught.type is error
    words = [rf"\b{part}" if part.isidentifier() else part for part in parts]  # no name ends a longer one
    assert re.search(".*?".join(words), message, re.DOTALL), message
    assert re.match(r"\w+: ", message), message
    assert len(re.split(r"\. +(?=[A-Z])", message)) >= 2 and message.endswith("."), (
        f"does not say what to do: {message}"
    )


def label(value):
    """An id for a parameter, the same in every process."""
    return "function" if callable(value) else str(value)


def step(tx, updates=GRADS, params=GRADS):
    """One update with a fresh state."""
    return tx.update(updates, tx.init(updates), params)


# Thresholds

SCALARS = {  # function and argument; a tree is as wrong as any other object
    ("clip_by_global_norm", "max_norm"): oc.clip_by_global_norm,
    ("clip_by_group_norm", r"max_norms\['a'\]"): lambda t: oc.clip_by_group_norm({"a": t}, "a"),
    ("clip_by_norm_range", "min_norm"): lambda t: oc.clip_by_norm_range(t, None),
    ("clip_by_norm_range", "max_norm"): lambda t: oc.clip_by_norm_range(None, t),
    ("param_fraction", "fraction"): lambda t: oc.param_fraction(t, oc.leaf_norm),
    ("param_fraction", "eps"): lambda t: oc.param_fraction(0.1, oc.leaf_norm, eps=t),
    ("adaptive_grad_clip", "eps"): lambda t: oc.adaptive_grad_clip(0.1, eps=t),
}
TREES = {
    ("clip", "max_delta"): oc.clip,
    ("clip_by_magnitude", "min_magnitude"): lambda t: oc.clip_by_magnitude(t, None),
    ("clip_by_magnitude", "max_magnitude"): lambda t: oc.clip_by_magnitude(None, t),
    ("clip_weights", "max_value"): oc.clip_weights,
    ("prune_weights", "threshold"): oc.prune_weights,
    ("clip_weight_norm", "max_norm"): oc.clip_weight_norm,
    ("clip_by_leaf_norm", "max_norm"): oc.clip_by_leaf_norm,
    ("clip_by_unit_norm", "max_norm"): oc.clip_by_unit_norm,
    ("clip_by_block_rms", "threshold"): oc.clip_by_block_rms,
    ("clip_by_norm", "threshold"): functools.partial(oc.clip_by_norm, oc.leaf_norm),
    ("adaptive_grad_clip", "clipping"): oc.adaptive_grad_clip,
}
BOUNDS = {  # of either sign
    ("clip_by_value", "min_value"): lambda t: oc.clip_by_value(t, None),
    ("clip_by_value", "max_value"): lambda t: oc.clip_by_value(None, t),
    ("rescale_weights", "low"): lambda t: oc.rescale_weights(t, None),
    ("rescale_weights", "high"): lambda t: oc.rescale_weights(None, t),
}
OF_ENTRIES = [key for key in TREES if key[0] in ("clip", "clip_by_magnitude", "clip_weights", "prune_weights")]
ALL = SCALARS | TREES | BOUNDS
name_of = lambda key: key[0] + "-" + re.sub(r"\W", "", key[1]) if isinstance(key, tuple) else None

NEGATIVE = {
    "float": (-1.5, r"got -1\.5"),
    "int": (-2, "got -2"),
    "inf": (-INF, "got -inf"),
    "numpy": (np.float32(-1.5), r"got -1\.5"),
    "numpy_int": (np.int32(-2), "got -2"),
    "jax": (jnp.float32(-1.5), r"got -1\.5"),
}
NAN = {"float": INF - INF, "numpy": np.float64("nan"), "jax": jnp.bfloat16(INF - INF)}
KINDS = {
    "bool": (True, "got bool True"),
    "numpy_bool": (np.bool_(True), r"got bool"),
    "jax_bool": (jnp.array(True), "got .*bool"),
    "str": ("1.0", r"got str '1\.0'"),
    "bytes": (b"1.0", r"got bytes b'1\.0'"),
    "complex": (1j, "got complex 1j"),
    "numpy_complex": (np.complex64(1j), "got complex64"),
    "jax_complex": (jnp.complex64(1j), "got .*complex64"),
    "object": (object(), "got object <object object"),
    "set": ({1.0}, r"got set \{1\.0\}"),
    "text_array": (np.array("a"), "got .*<U1"),
}
SHAPES = {
    "numpy": (np.ones(2), r"shape \(2,\)"),
    "one_entry": (np.ones(1), r"shape \(1,\)"),
    "matrix": (jnp.ones((2, 3)), r"shape \(2, 3\)"),
}


@pytest.mark.parametrize("key", SCALARS | TREES, ids=name_of)
@pytest.mark.parametrize("case", NEGATIVE)
def test_negative_threshold(key, case):
    """A negative number is refused at construction, with its value."""
    value, shown = NEGATIVE[case]
    assert_raises(lambda: ALL[key](value), ValueError, *key, "must be >= 0", shown)


@pytest.mark.parametrize("key", ALL, ids=name_of)
@pytest.mark.parametrize("case", NAN)
def test_nan_threshold(key, case):
    """A NaN is refused at construction."""
    assert_raises(lambda: ALL[key](NAN[case]), ValueError, *key, "must be a number", "got nan")


@pytest.mark.parametrize("key", ALL, ids=name_of)
@pytest.mark.parametrize("case", KINDS)
def test_threshold_of_a_wrong_kind(key, case):
    """Booleans, text, complex numbers and other objects are refused at construction, with what would do."""
    value, shown = KINDS[case]
    assert_raises(lambda: ALL[key](value), TypeError, *key, "must be a", "number", shown)


@pytest.mark.parametrize("key", ALL, ids=name_of)
@pytest.mark.parametrize("case", SHAPES)
def test_threshold_that_is_not_a_scalar(key, case):
    """An array that is not a scalar is refused at construction, with its shape."""
    value, shown = SHAPES[case]
    assert_raises(lambda: ALL[key](value), ValueError, *key, "must be a scalar", shown)


@pytest.mark.parametrize("key", SCALARS, ids=name_of)
@pytest.mark.parametrize("tree", [[1.0], (1.0, 2.0), {"w": 1.0}], ids=str)
def test_tree_where_a_scalar_is_needed(key, tree):
    """A list, tuple or dict is refused where one threshold is needed."""
    assert_raises(lambda: SCALARS[key](tree), TypeError, *key, "must be a", f"got {type(tree).__name__}")


@pytest.mark.parametrize("key", TREES | BOUNDS, ids=name_of)
@pytest.mark.parametrize("bad", [True, "a", INF - INF, 1j, np.ones(2)], ids=lambda value: type(value).__name__)
def test_bad_value_in_a_tree(key, bad):
    """A wrong value inside a tree of thresholds is refused at construction."""
    error = ValueError if isinstance(bad, (float, np.ndarray)) else TypeError
    assert_raises(lambda: ALL[key]({"w": 1.0, "b": {"c": bad}}), error, *key, "must be")


@pytest.mark.parametrize("key", TREES | BOUNDS, ids=name_of)
@pytest.mark.parametrize("tree", [{"x": 1.0}, [1.0, 2.0], {"w": 1.0}, {"w": {"deeper": 1.0}, "b": None}], ids=str)
def test_tree_that_does_not_fit(key, tree):
    """A tree of thresholds that is no prefix of the updates is refused when it meets them."""
    assert_raises(lambda: step(ALL[key](tree)), ValueError, *key, "does not fit the updates", "prefix")


X = jnp.ones(3)
MISFITS = {  # a prefix tree, the updates, and how they differ
    "missing": ({"w": 1.0}, {"w": X, "b": X}, r"there is nothing for \['b'\]"),
    "missing empty node": ({"w": 1.0}, {"w": X, "m": optax.MaskedNode()}, r"there is nothing for \['m'\]"),
    "too many": ({"w": 1.0, "c": None}, {"w": X}, r"the updates have no \['c'\]"),
    "list": ([1.0], [X, X], r"there is nothing for \[1\]"),
    "deeper": (
        {"w": {"a": 1.0}, "b": 1.0},
        {"w": X, "b": X},
        r"the updates have a single leaf at \['w'\], and not dict",
    ),
    "behind a rule": (
        {"a": {"x": oc.scheduled(lambda count: 1.0)}, "b": {"y": 1.0}},
        {"a": {"x": X}, "b": {"z": X}},
        r"there is nothing for \['b'\]\['z'\]",
    ),
    "single leaf": ({"w": 1.0}, X, "the updates have a single leaf, and not dict"),
    "types": ((1.0, 2.0), [X, X], "the updates have list, and not tuple"),
}
WRONG_WAY = {  # updates, and parameters of which they are no prefix
    "missing": ({"w": X, "b": X}, {"w": X}, r"there is nothing for \['b'\]"),
    "shallower": ({"w": {"a": X}}, {"w": X}, r"the updates have dict at \['w'\], and not a single leaf"),
    "beside None": ({"f": None, "w": X}, {"f": {"a": X}, "q": X}, r"there is nothing for \['w'\]"),
}


@pytest.mark.parametrize("case", MISFITS)
def test_where_a_prefix_tree_does_not_fit(case):
    """The text names the first place at which threshold and updates differ."""
    prefix, updates, text = MISFITS[case]
    tx = oc.clip_by_leaf_norm(prefix)
    assert_raises(lambda: tx.init(updates), ValueError, "clip_by_leaf_norm: max_norm does not fit", text, "prefix")


@pytest.mark.parametrize("case", WRONG_WAY)
def test_where_params_do_not_fit(case):
    """The text names the first place at which parameters and updates differ, None among the updates aside."""
    updates, params, text = WRONG_WAY[case]
    call = lambda: oc.clip_weights(1.0).update(updates, oc.clip_weights(1.0).init(updates), params)
    assert_raises(call, ValueError, "clip_weights: params must have the structure", text, "Pass the parameters")


@pytest.mark.parametrize("key", [key for key in ALL if key[1] != "eps"], ids=name_of)
def test_schedule_that_returns_an_array(key):
    """A schedule must return a scalar, which is seen in the first step."""
    make = ALL[key]
    if key[0] == "param_fraction":
        make = lambda t: oc.clip_by_norm(oc.leaf_norm, oc.param_fraction(t, oc.leaf_norm))
    assert_raises(
        lambda: step(make(lambda count: jnp.ones(2))), ValueError, *key, "scalar", r"shape \(2,\)", "schedule"
    )


@pytest.mark.parametrize("key", [*OF_ENTRIES, *BOUNDS], ids=name_of)
def test_threshold_rule_for_entries(key):
    """A rule over norms is refused by the clips of entries, which have no norms."""
    assert_raises(lambda: ALL[key](oc.scheduled(lambda count: 1.0)), TypeError, *key, "Threshold", "clip_by_norm")


CROSSED = {
    "clip_by_value": lambda: oc.clip_by_value(2.0, 1.0),
    "clip_by_value arrays": lambda: oc.clip_by_value(jnp.float32(2.0), np.float32(1.0)),
    "clip_by_value trees": lambda: step(oc.clip_by_value({"w": 2.0, "b": 0.0}, {"w": 1.0, "b": 1.0})),
    "clip_by_value tree and number": lambda: step(oc.clip_by_value({"w": 0.0, "b": 2.0}, 1.0)),
    "clip_by_magnitude": lambda: oc.clip_by_magnitude(2.0, 1.0),
    "clip_by_magnitude trees": lambda: step(oc.clip_by_magnitude({"w": 2.0, "b": 0.0}, {"w": 1.0, "b": 1.0})),
    "rescale_weights": lambda: oc.rescale_weights(2.0, 1.0),
    "rescale_weights trees": lambda: step(oc.rescale_weights({"w": 2.0, "b": 0.0}, 1.0)),
    "clip_by_norm_range": lambda: oc.clip_by_norm_range(2.0, 1.0),
}
ENDS = {
    "clip_by_value": ("min_value", "max_value"),
    "clip_by_magnitude": ("min_magnitude", "max_magnitude"),
    "rescale_weights": ("low", "high"),
    "clip_by_norm_range": ("min_norm", "max_norm"),
}


@pytest.mark.parametrize("name", CROSSED)
def test_bounds_that_cross(name):
    """A lower bound above the upper one is refused at construction, in trees when they meet the updates."""
    caller = name.split()[0]
    assert_raises(CROSSED[name], ValueError, caller, *ENDS[caller], "got 2 > 1", "Exchange")


@pytest.mark.parametrize("bounds", [({"w": 2.0, "b": 0.0}, {"w": 1.0}), ({"w": {"x": 2.0}}, {"w": 1.0})], ids=str)
def test_trees_of_bounds_that_fit_neither_each_other_nor_the_updates(bounds):
    """Bounds as trees of different structure are refused at the latest when they meet the updates."""
    with pytest.raises(ValueError, match="clip_by_value: "):
        step(oc.clip_by_value(*bounds))


def test_one_block_with_several_thresholds():
    """Leaves that share a norm cannot have different thresholds."""
    tx = oc.clip_by_norm(oc.global_norm, {"w": 1.0, "b": 2.0})
    assert_raises(lambda: step(tx), ValueError, "clip_by_norm", "share a norm", "threshold", "clip_by_group_norm")


# Functions

FUNCTIONS = {
    ("clip_by_global_norm", "response"): lambda f: oc.clip_by_global_norm(1.0, response=f),
    ("clip_by_leaf_norm", "response"): lambda f: oc.clip_by_leaf_norm(1.0, response=f),
    ("clip_by_unit_norm", "response"): lambda f: oc.clip_by_unit_norm(1.0, response=f),
    ("clip_by_block_rms", "response"): lambda f: oc.clip_by_block_rms(1.0, response=f),
    ("clip_by_group_norm", "response"): lambda f: oc.clip_by_group_norm({"a": 1.0}, "a", response=f),
    ("clip_by_norm", "response"): lambda f: oc.clip_by_norm(oc.leaf_norm, 1.0, f),
    ("clip_by_norm", "norm"): lambda f: oc.clip_by_norm(f, 1.0),
    ("clip_by_norm_range", "norm"): lambda f: oc.clip_by_norm_range(1.0, 2.0, norm=f),
    ("param_fraction", "norm"): lambda f: oc.param_fraction(0.1, f),
    ("scheduled", "schedule"): oc.scheduled,
}


@pytest.mark.parametrize("key", FUNCTIONS, ids=name_of)
@pytest.mark.parametrize("bad", ["l2", 1.0, {"w": 1.0}], ids=str)
def test_what_must_be_a_function(key, bad):
    """What is no function is refused at construction, with an example of one."""
    assert_raises(
        lambda: FUNCTIONS[key](bad), TypeError, *key, "must be a function", f"got {type(bad).__name__}", "For example"
    )


def test_norm_that_does_not_fit():
    """A norm function whose result is no prefix of the updates is refused."""
    assert_raises(
        lambda: step(oc.clip_by_norm(lambda updates: {"x": jnp.float32(1)}, 1.0)),
        ValueError,
        "clip_by_norm",
        "norm",
        "does not fit the updates",
        "prefix",
    )


@pytest.mark.parametrize("clip", [oc.clip_by_global_norm, oc.clip_by_leaf_norm, oc.clip_by_block_rms])
def test_response_of_a_wrong_shape(clip):
    """A response that returns no factor for each norm is refused under the name of the clip."""
    tx = clip(1.0, response=lambda norm, threshold: jnp.ones(7))
    assert_raises(lambda: step(tx), ValueError, f"^{clip.__name__}", "response must return a factor", r"\(7,\)")


# Order and axes

ORDS = {
    "clip_by_global_norm": lambda ord: oc.clip_by_global_norm(1.0, ord=ord),
    "clip_by_leaf_norm": lambda ord: oc.clip_by_leaf_norm(1.0, ord=ord),
    "clip_by_unit_norm": lambda ord: oc.clip_by_unit_norm(1.0, ord=ord),
    "clip_by_group_norm": lambda ord: oc.clip_by_group_norm({"a": 1.0}, "a", ord=ord),
    "global_norm": lambda ord: oc.global_norm(GRADS, ord=ord),
    "leaf_norm": lambda ord: oc.leaf_norm(GRADS, ord=ord),
    "unit_norm": lambda ord: oc.unit_norm(GRADS, ord=ord),
    "group_norm": lambda ord: oc.group_norm("a", ord=ord),
}
BAD_ORDS = {
    "half": (0.5, ValueError, r"must be >= 1, got 0\.5"),
    "zero": (0, ValueError, "must be >= 1, got 0"),
    "minus_inf": (-INF, ValueError, "must be >= 1, got -inf"),
    "nan": (INF - INF, ValueError, "must be >= 1, got nan"),
    "bool": (True, TypeError, "must be a number, got bool True"),
    "str": ("fro", TypeError, "must be a number, got str 'fro'"),
    "complex": (2j, TypeError, "must be a number, got complex 2j"),
    "numpy_complex": (np.complex64(2), TypeError, "must be a number, got complex64"),
    "vector": (np.ones(2), TypeError, "must be a number, got ndarray"),
    "jax": (jnp.float32(2.0), TypeError, "must be a Python number, got a JAX array.*static_args"),
}


@pytest.mark.parametrize("name", ORDS)
@pytest.mark.parametrize("case", BAD_ORDS)
def test_bad_order(name, case):
    """An order below 1, or of another kind than a Python number, is refused at construction."""
    value, error, text = BAD_ORDS[case]
    assert_raises(lambda: ORDS[name](value), error, f"^{name}", "ord", text)


def test_traced_order():
    """An order that is traced is refused with the way around it, since it shapes the program."""
    traced = jax.jit(lambda ord: oc.clip_by_global_norm(1.0, ord=ord).init(GRADS))
    assert_raises(lambda: traced(2.0), TypeError, "clip_by_global_norm", "ord", "JAX array", "static_args")


AXES = {
    "clip_by_unit_norm": lambda axis: oc.clip_by_unit_norm(1.0, axis),
    "clip_by_block_rms": lambda axis: oc.clip_by_block_rms(1.0, axis=axis),
    "adaptive_grad_clip": lambda axis: oc.adaptive_grad_clip(0.1, axis=axis),
    "unit_norm": lambda axis: oc.unit_norm(GRADS, axis=axis),
    "block_rms": lambda axis: oc.block_rms(GRADS, axis=axis),
}
BAD_AXES = {
    "str": ("0", "got str '0'"),
    "float": (1.0, r"got float 1\.0"),
    "bool": (True, "got bool True"),
    "str_in_a_tuple": ((0, "1"), r"got tuple \(0, '1'\)"),
    "bool_in_a_tuple": ((0, True), r"got tuple \(0, True\)"),
    "dict": ({"w": 0}, r"got dict \{'w': 0\}"),
    "jax": (jnp.int32(0), "got a JAX array.*static_args"),
}


@pytest.mark.parametrize("name", AXES)
@pytest.mark.parametrize("case", BAD_AXES)
def test_axis_of_a_wrong_kind(name, case):
    """An axis that is no int, tuple of ints or rule is refused at construction."""
    value, text = BAD_AXES[case]
    assert_raises(lambda: AXES[name](value), TypeError, f"^{name}", "axis must be", text)


@pytest.mark.parametrize("name", AXES)
@pytest.mark.parametrize("axis", [2, -3, (0, 5), (0, 0), (0, -2)], ids=str)
def test_axis_that_does_not_fit(name, axis):
    """An axis that is out of range, or given twice, is refused with the leaf and its shape."""
    updates = {"layer": {"w": jnp.ones((4, 5))}}
    calls = {
        "unit_norm": lambda: oc.unit_norm(updates, axis=axis),
        "block_rms": lambda: oc.block_rms(updates, axis=axis),
    }
    call = calls.get(name, lambda: step(AXES[name](axis), updates, updates))
    assert_raises(
        call, ValueError, "norm|rms|clip", "axis", r"does not fit leaf \['layer'\]\['w'\] of shape \(4, 5\)", "rule"
    )


@pytest.mark.parametrize("returned", ["0", 1.5, True, (0, "1"), (0, 0), 7, lambda path, leaf: 0], ids=label)
def test_rule_that_returns_no_axes(returned):
    """What a rule(path, leaf) returns is checked like an axis."""
    with pytest.raises((TypeError, ValueError), match=r"^unit_norm: axis "):
        oc.unit_norm(GRADS, axis=lambda path, leaf: returned)


@pytest.mark.parametrize("norm", [oc.unit_norm, lambda tree: step(oc.clip_by_unit_norm(1.0), tree, tree)])
def test_rank_above_five(norm):
    """A leaf of rank 6 has no units by rank: the message names it and asks for an axis."""
    updates = {"conv": [jnp.ones((2,) * 6)]}
    assert_raises(
        lambda: norm(updates), ValueError, "unit_norm", r"\['conv'\]\[0\]", r"\(2, 2, 2, 2, 2, 2\)", "6", "Pass axis"
    )


# Labels


def group(labels, max_norms=None):
    return oc.clip_by_group_norm({"a": 1.0, "b": None} if max_norms is None else max_norms, labels)


def test_label_without_a_threshold():
    """A label that max_norms does not have is refused, at construction where labels are no function."""
    parts = ("clip_by_group_norm", "labels", "'c'", "max_norms", "'a'", "'b'", "Add")
    assert_raises(lambda: group({"w": "a", "b": "c"}), ValueError, *parts)
    assert_raises(lambda: step(group(lambda updates: {"w": "a", "b": "c"})), ValueError, *parts)


def test_labels_that_do_not_fit():
    """A tree of labels that is no prefix of the updates is refused."""
    for labels in ({"w": "a"}, {"x": "a", "y": "b"}, {"w": {"deeper": "a"}, "b": "b"}):
        assert_raises(lambda labels=labels: step(group(labels)), ValueError, "group_norm", "labels", "does not fit")
        assert_raises(lambda labels=labels: oc.group_norm(labels)(GRADS), ValueError, "group_norm", "labels", "prefix")


def test_labels_that_are_not_hashable():
    """Labels must be hashable."""
    labels = {"w": "a", "b": np.ones(2)}
    assert_raises(lambda: step(group(labels)), TypeError, "clip_by_group_norm", "labels", "hashable", "None")
    assert_raises(lambda: oc.group_norm(labels)(GRADS), TypeError, "group_norm", "labels", "hashable")


@pytest.mark.parametrize("bad", [1.0, None, [1.0], lambda step: 1.0], ids=label)
def test_max_norms_that_are_no_mapping(bad):
    """The thresholds of groups must be a mapping from labels."""
    assert_raises(
        lambda: oc.clip_by_group_norm(bad, "a"), TypeError, "clip_by_group_norm", "max_norms", "got", "For example"
    )


# Parameters

NEEDS_PARAMS = {
    "adaptive_grad_clip": oc.adaptive_grad_clip(0.1),
    "param_fraction": oc.clip_by_norm(oc.leaf_norm, oc.param_fraction(0.1, oc.leaf_norm)),
    "clip_weights": oc.clip_weights(1.0),
    "prune_weights": oc.prune_weights(0.1),
    "clip_weight_norm": oc.clip_weight_norm(1.0),
    "rescale_weights": oc.rescale_weights(),
    "project_weights": oc.project_weights(optax.projections.projection_non_negative),
}
CALLERS = {"param_fraction": "clip_by_norm|param_fraction"}
by_params = pytest.mark.parametrize("name", NEEDS_PARAMS)


@by_params
def test_missing_params(name):
    """Without params the message names the clip and shows the call, eager, compiled and in a chain."""
    tx = NEEDS_PARAMS[name]
    parts = (f"^({CALLERS.get(name, name)}): ", "params are missing", r"update\(updates, state, params\)")
    for tx in (NEEDS_PARAMS[name], optax.chain(NEEDS_PARAMS[name], optax.sgd(0.1))):
        state = tx.init(GRADS)
        assert_raises(lambda tx=tx, state=state: tx.update(GRADS, state), ValueError, *parts)
        assert_raises(lambda tx=tx, state=state: jax.jit(tx.update)(GRADS, state), ValueError, *parts)


@pytest.mark.parametrize("ends", [(0, 1), (1, 0)], ids=["upper", "lower"])
def test_missing_params_for_one_end_of_a_range(ends):
    """A range of norms needs params where either end does."""
    values = (None, oc.param_fraction(0.1, oc.global_norm))
    tx = oc.clip_by_norm_range(*(values[i] for i in ends))
    assert_raises(lambda: tx.update(GRADS, tx.init(GRADS)), ValueError, "^clip_by_norm_range: params are missing")


WRONG_PARAMS = {
    "fewer": {"w": jnp.ones((4, 5))},
    "more": GRADS | {"c": jnp.ones(2)},
    "other_names": {"x": jnp.ones((4, 5)), "y": jnp.ones(3)},
    "list": [jnp.ones(3), jnp.ones((4, 5))],
    "deeper": {"w": {"x": jnp.ones((4, 5))}, "b": jnp.ones(3)},
    "shape": {"w": jnp.ones((6, 5)), "b": jnp.ones(3)},
    "columns": {"w": jnp.ones((4, 6)), "b": jnp.ones(3)},
    "rank": {"w": jnp.ones((4, 5)), "b": jnp.ones((3, 1))},
    "transposed": {"w": jnp.ones((5, 4)), "b": jnp.ones(3)},
    "none": {"w": None, "b": jnp.ones(3)},
    "int": {"w": jnp.ones((4, 5), int), "b": jnp.ones(3)},
}


@by_params
@pytest.mark.parametrize("case", WRONG_PARAMS)
def test_params_that_do_not_belong_to_the_updates(name, case):
    """Params of another structure, shape or kind than the updates are refused."""
    tx = NEEDS_PARAMS[name]
    parts = (f"^({CALLERS.get(name, name)}): ", "param", "Pass|Use")
    assert_raises(lambda: tx.update(GRADS, tx.init(GRADS), WRONG_PARAMS[case]), ValueError, *parts)


@by_params
def test_params_with_a_container_where_an_update_is_a_scalar(name):
    """The error names the container, which has no shape to compare."""
    tx, one = NEEDS_PARAMS[name], jnp.ones([])
    state = tx.init(one)
    for params, kind in (({"a": one}, "dict"), ((), "tuple")):
        assert_raises(lambda params=params: tx.update(one, state, params), ValueError, f"got {kind} where")


# States

KEEPING = {
    "adagc": oc.adagc,
    "autoclip": functools.partial(oc.autoclip, norm=oc.leaf_norm),
    "zclip": functools.partial(oc.zclip, norm=oc.unit_norm),
    "clip_by_sigma": functools.partial(oc.clip_by_sigma, norm=oc.group_norm({"w": "a", "b": "b"})),
    "clip_by_leaf_norm": lambda: oc.clip_by_leaf_norm(oc.minimum(1.0, oc.z_score())),
    "skip_spikes": lambda: oc.skip_spikes(optax.sgd(0.1), oc.z_score(), norm=oc.leaf_norm),
}


@pytest.mark.parametrize("name", KEEPING)
def test_state_of_other_updates(name):
    """A state with histories of other blocks is refused under the name of the clip, eager and compiled."""
    tx, one, fewer = KEEPING[name](), {"w": jnp.ones((4, 6)), "b": None}, {"w": None, "b": GRADS["b"]}
    for seen, updates in ((one, GRADS), (GRADS, one), (fewer, GRADS), (GRADS, fewer)):
        for update in (tx.update, jax.jit(tx.update)):
            call = functools.partial(update, updates, tx.init(seen))
            shapes = r"of shape (none|\(.*\)) where they need (none|\(.*\))\. "
            parts = ("state must be that of these updates", shapes, "init saw", "new state")
            assert_raises(call, ValueError, f"^{name}", *parts)


# Meshes


def on_mesh(function, **options):
    """The function of updates inside a mesh of 8 devices, sharded along their first axis."""
    mesh = trees.mesh(data=8)
    inside = jax.shard_map(function, mesh=mesh, in_specs=P("data"), out_specs=P(), **options)
    return lambda: inside({"w": jnp.ones((16, 3))})


UNITS = {
    "unit_norm": (oc.unit_norm, "unit_norm"),
    "block_rms": (functools.partial(oc.block_rms, axis=0), "block_rms"),
    "clip_by_unit_norm": (lambda tree: oc.clip_by_unit_norm(1.0).init(tree), "unit_norm"),
    "adaptive_grad_clip": (lambda tree: oc.adaptive_grad_clip(1.0).init(tree), "unit_norm|adaptive_grad_clip"),
}


@pytest.mark.parametrize("name", UNITS)
def test_missing_axis_name_of_units(name):
    """Unit norms of a sharded leaf need axis_name: the message names leaf and mesh axes and what to pass."""
    function, caller = UNITS[name]
    assert_raises(
        on_mesh(function), ValueError, caller, "axis_name is missing", r"\['w'\]", "'data'", "Pass axis_name", r"\(\)"
    )


@pytest.mark.parametrize("norm", [oc.global_norm, oc.leaf_norm, oc.block_rms, oc.unit_norm, oc.group_norm("a")])
def test_missing_axis_name_where_types_are_silent(norm):
    """With check_vma=False every norm needs axis_name, and the message says how to do without."""
    parts = ("axis_name is missing", "'data'", r"\['w'\]", "Pass axis_name", "check_vma=True")
    assert_raises(on_mesh(norm, check_vma=False), ValueError, "norm|rms", *parts)


def test_axis_names_that_do_not_fit():
    """Several names are one entry of a prefix tree, at any depth: the text names what differs behind them."""
    names = {"a": {"x": ("data", "model")}, "b": {"y": "data"}}
    call = lambda: oc.leaf_norm({"a": {"x": X}, "b": {"z": X}}, axis_name=names)
    assert_raises(call, ValueError, "leaf_norm: axis_name does not fit", r"there is nothing for \['b'\]\['z'\]")


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("axis_name", ["model", ("data", "model")], ids=str)
def test_unknown_axis_name(axis_name, check_vma):
    """A name that is no axis of the mesh is refused, with the names that are."""
    for norm in (oc.global_norm, oc.leaf_norm, oc.unit_norm):
        call = on_mesh(functools.partial(norm, axis_name=axis_name), check_vma=check_vma)
        assert_raises(call, ValueError, norm.__name__, "axis_name", r"\['model'\]", r"\('data',\)")


@pytest.mark.parametrize("axis_name", [3, 1.5, {"w": 3}, {"x": "data"}], ids=str)
def test_axis_name_of_a_wrong_kind(axis_name):
    """An axis name that is no text, or a tree of names that does not fit, is refused, inside a mesh and outside."""
    error = ValueError if axis_name == {"x": "data"} else TypeError
    for norm in (oc.global_norm, oc.unit_norm):
        function = functools.partial(norm, axis_name=axis_name)
        assert_raises(on_mesh(function), error, norm.__name__, "axis_name")
        assert_raises(lambda function=function: function({"w": jnp.ones(3)}), error, norm.__name__, "axis_name")


# Metrics


@pytest.mark.parametrize(
    "tx",
    [optax.adam(0.1), oc.clip(1.0), optax.chain(oc.clip_by_value(-1.0, 1.0), optax.sgd(0.1))],
    ids=["adam", "clip", "clip_by_value"],
)
def test_metrics_without_a_clip(tx):
    """A state without a norm clip is refused, with what has metrics."""
    assert_raises(
        lambda: oc.clip_metrics(tx.init(GRADS)),
        ValueError,
        "clip_metrics",
        "no ClipState in opt_state",
        "tuple|State",
        "Pass",
    )


# Adaptive rules, skipping and choosing

BAD_CALLS = {
    "quantile: percentile must be >= 0, got -1": lambda: oc.autoclip(-1),
    "quantile: percentile must be <= 100, got 100.5": lambda: oc.autoclip(100.5),
    "quantile: percentile must be a number": lambda: oc.autoclip("10"),
    "quantile: percentile must fit a float": lambda: oc.autoclip(10**400),
    "quantile: window must be >= 1 and below 2^31, got int 0": lambda: oc.autoclip(10, 0),
    "quantile: window must be >= 1 and below 2^31, got int 1000": lambda: oc.autoclip(10, 10**400),
    "quantile: window must be >= 1 and below 2^31, got int 2147483648": lambda: oc.autoclip(10, 2**31),
    "quantile: window must be an int, got float 2.5": lambda: oc.autoclip(10, 2.5),
    "quantile: window must be a Python int, got a JAX array": lambda: oc.autoclip(10, jnp.array(3)),
    "z_score: z_max must be a number": lambda: oc.zclip(True),
    "z_score: decay must be <= 1, got 2": lambda: oc.zclip(decay=2),
    "ema_ratio: decay must be <= 1, got 1.5": lambda: oc.adagc(decay=1.5),
    "z_score: warmup_steps must be >= 0, got -1": lambda: oc.zclip(warmup_steps=-1),
    "ema_ratio: warmup_steps must be >= 0, got -1": lambda: oc.adagc(warmup_steps=-1),
    "z_score: factor must be a number, got nan": lambda: oc.zclip(factor=math.nan),
    "z_score: spike must be one of": lambda: oc.zclip(spike="cut"),
    "ema_ratio: max_norm must be >= 0, got -1": lambda: oc.adagc(-1.0),
    "ema_ratio: max_ratio must be >= 0, got -1": lambda: oc.adagc(max_ratio=-1),
    "sigma_window: sigmas must be >= 0, got -1": lambda: oc.clip_by_sigma(-1),
    "sigma_window: window must be an int": lambda: oc.clip_by_sigma(3.0, np.array([3])),
    "zclip: norm must be a function": lambda: oc.zclip(norm="leaf"),
    "minimum: there is no threshold": lambda: oc.minimum(),
    "minimum: thresholds[1] must be >= 0": lambda: oc.minimum(1.0, -1.0),
    "per_block: update must be a function": lambda: oc.per_block(lambda: 0, None),
    "skip_spikes: inner must be an Optax transformation": lambda: oc.skip_spikes(optax.sgd),
    "skip_spikes: threshold must be >= 0, got -1": lambda: oc.skip_spikes(optax.sgd(1.0), -1.0),
    "replay: clip must be a norm clip": lambda: oc.replay("zclip", [1.0]),
    "replay: clip must be one norm clip": lambda: oc.replay(oc.clip(1.0), [1.0]),
    "replay: the clip cannot run on norms alone. adaptive": lambda: oc.replay(oc.adaptive_grad_clip(0.1), [1.0]),
    "replay: norms must be >= 0, got -1 at step 1": lambda: oc.replay(oc.zclip(), [1.0, -1.0]),
    "replay: norms must be a vector": lambda: oc.replay(oc.zclip(), [[1.0]]),
    "suggest_threshold: norms has no finite number above 0": lambda: oc.suggest_threshold([0.0, math.nan]),
    "suggest_threshold: norms must be real numbers": lambda: oc.suggest_threshold(["a"]),
}


@pytest.mark.parametrize("text", BAD_CALLS)
def test_adaptive_arguments_are_checked(text):
    """Bad arguments of rules, wrappers and tools raise at once, and say what is wrong, required and to be done."""
    with pytest.raises((ValueError, TypeError)) as caught:
        BAD_CALLS[text]()
    message = str(caught.value)
    assert message.startswith(text) and message.count(". ") >= 1 and message.endswith(".")


# Compiled code

TRACED = {case.name: case.make for case in clips.CLIPS} | {
    "clip_by_value from both sides": lambda t: oc.clip_by_value(t, -t),
    "clip_by_norm_range from both sides": lambda t: oc.clip_by_norm_range(t, t),
    "autoclip": lambda t: oc.autoclip(t, 4),
    "zclip": lambda t: oc.zclip(t, t, t, factor=t),
    "adagc": lambda t: oc.adagc(t, t, t, t),
    "clip_by_sigma": lambda t: oc.clip_by_sigma(t, 4),
    "clip_weights": oc.clip_weights,
    "prune_weights": oc.prune_weights,
    "clip_weight_norm": oc.clip_weight_norm,
    "rescale_weights": lambda t: oc.rescale_weights(t, -t),
    "project_weights": lambda t: oc.project_weights(
        functools.partial(optax.projections.projection_l2_ball, scale=t),
    ),
    "skip_spikes": lambda t: oc.skip_spikes(optax.adam(0.1), t),
    "with_error_feedback": lambda t: oc.with_error_feedback(oc.clip_by_global_norm(t)),
    "clip_randomly": lambda t: oc.clip_randomly(oc.clip(t), t),
    "clip_randomly by leaf": lambda t: oc.clip_randomly(oc.clip(t), t, per="leaf"),
}


# The clips that rules and responses are tried in.
TRIED_IN = {"minimum": "clip_by_norm"} | dict.fromkeys(("normalize", "smooth", "tanh"), "clip_by_leaf_norm")


@pytest.mark.parametrize("name", [name for name in TRACED if name in oc.__all__])
def test_a_state_of_another_kind(name):
    """Each transformation says by its name that a state is not its own."""
    update, caller = TRACED[name](0.0).update, TRIED_IN.get(name, name)
    assert_raises(lambda: update(X, optax.EmptyState(), X), TypeError, caller, "state must have", "got EmptyState")


@pytest.mark.parametrize("name", TRACED)
def test_values_in_a_compiled_update_raise_nothing(name):
    """Thresholds and updates of any value pass through one compiled program, in shapes and dtypes of the updates."""

    @jax.jit
    def steps(threshold, updates):
        tx = TRACED[name](threshold)
        state = tx.init(GRADS)
        for _ in range(2):
            new, state = tx.update(updates, state, GRADS)
        return new

    for threshold in (math.nan, -1.0, INF, 0.0, 1.0):
        for entry in (math.nan, INF, -INF, 0.0, 2.0):
            updates = GRADS | {"b": GRADS["b"].at[0].set(entry)}
            chex.assert_trees_all_equal_shapes_and_dtypes(steps(threshold, updates), updates)

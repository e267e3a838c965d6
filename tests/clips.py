"""The table of clips that all contract tests share: a new clip is one line here."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax

import optax_clip as oc


class Case(NamedTuple):
    """A clip as the contract tests see it."""

    name: str
    make: Callable  # from a threshold to the transformation
    scope: str  # what shares a norm: "entry", "global", "group", "leaf" or "unit"
    measure: Callable | None = None  # the norm that the threshold bounds; None for clips of entries
    needs_params: bool = False
    keeps_small: bool = True  # updates below the threshold are left alone


def by_first_key(updates):
    """Labels leaves by the first part of their path: "a" for one half of the names, "b" for the others."""
    leaves, treedef = jax.tree_util.tree_flatten_with_path(updates)
    return treedef.unflatten(["a" if i % 2 else "b" for i, _ in enumerate(leaves)])


def agc(clipping):
    """AGC whose bound does not depend on the parameters while they are zero: clipping * eps with eps = 1."""
    return oc.adaptive_grad_clip(clipping, eps=1.0)


CLIPS = [
    Case("clip", oc.clip, "entry"),
    Case("clip_by_value", lambda t: oc.clip_by_value(None, t), "entry"),
    Case("clip_by_magnitude", lambda t: oc.clip_by_magnitude(None, t), "entry"),
    Case("clip_by_global_norm", oc.clip_by_global_norm, "global", oc.global_norm),
    Case(
        "clip_by_global_norm_1",
        functools.partial(oc.clip_by_global_norm, ord=1),
        "global",
        functools.partial(oc.global_norm, ord=1),
    ),
    Case(
        "clip_by_global_norm_inf",
        functools.partial(oc.clip_by_global_norm, ord=float("inf")),
        "global",
        functools.partial(oc.global_norm, ord=float("inf")),
    ),
    Case(
        "clip_by_leaf_norm_3",
        functools.partial(oc.clip_by_leaf_norm, ord=3),
        "leaf",
        functools.partial(oc.leaf_norm, ord=3),
    ),
    Case("clip_by_leaf_norm", oc.clip_by_leaf_norm, "leaf", oc.leaf_norm),
    Case("clip_by_unit_norm", oc.clip_by_unit_norm, "unit", oc.unit_norm),
    Case("clip_by_block_rms", oc.clip_by_block_rms, "leaf", oc.block_rms),
    Case(
        "clip_by_group_norm",
        lambda t: oc.clip_by_group_norm({"a": t, "b": t}, by_first_key),
        "group",
        oc.group_norm(by_first_key),
    ),
    Case("clip_by_norm_range", lambda t: oc.clip_by_norm_range(None, t), "global", oc.global_norm),
    Case("minimum", lambda t: oc.clip_by_norm(oc.global_norm, oc.minimum(t, None)), "global", oc.global_norm),
    Case("adaptive_grad_clip", agc, "unit", oc.unit_norm, needs_params=True),
    *(
        Case(
            response.__name__,
            functools.partial(oc.clip_by_leaf_norm, response=response),
            "leaf",
            oc.leaf_norm,
            False,
            False,
        )
        for response in (oc.normalize, oc.smooth, oc.tanh)
    ),
]

NORM_CLIPS = [case for case in CLIPS if case.measure is not None]
SHRINKING = [case for case in CLIPS if case.keeps_small]

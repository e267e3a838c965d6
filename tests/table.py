"""The table of all transformations of the package. The contract runs over it: a new transformation is one row here."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
import pytest

import optax_clip as oc
from optax_clip import responses, thresholds


@dataclasses.dataclass(frozen=True, eq=False)
class Case:
    """A transformation as the contract sees it."""

    name: str
    make: Callable  # from a number, which may be traced, to the transformation
    number: float = 0.5
    needs_params: bool = False
    history: bool = False  # it goes on from what it has seen, so it cannot do without its state
    reference: str | None = None  # the function of reference.py that it is compared with
    quick: bool = False  # runs in the quick profile; the quick ones together reach all code of the clips
    exempt: dict[str, str] = dataclasses.field(default_factory=dict)  # from a test of the contract: why

    @functools.cached_property
    def tx(self) -> optax.GradientTransformationExtraArgs:
        """The transformation for the usual number, one object, so that tests share its programs."""
        return self.make(self.number)


def labels(updates):
    """Two groups of leaves, by the first key."""
    name = lambda path, _: "vectors" if getattr(path[0], "key", None) in ("bias", "weight") else "others"
    return jax.tree_util.tree_map_with_path(name, updates)


def numbers(t):
    """A threshold for each of the first keys of `trees.small` and `trees.mixed`."""
    return {"bias": t, "dense": 2.0, "scale": None}


def one_example(tx):
    """A transformation of gradients of examples, as one of the gradients of a single example."""
    in_front = lambda x: jnp.asarray(x)[None] if jnp.issubdtype(getattr(x, "dtype", int), jnp.inexact) else x
    update = lambda updates, *args, **kwargs: tx.update(jax.tree.map(in_front, updates), *args, **kwargs)
    return optax.GradientTransformationExtraArgs(tx.init, update)


OTHER_LEAVES = {"test_leaves_without_a_norm_come_back_as_they_are": "its tree of thresholds is for other leaves"}

CLIPS = [
    Case("clip", oc.clip, reference="value", quick=True),
    Case("clip_by_value", lambda t: oc.clip_by_value(-0.25, t), reference="value"),
    Case("clip_by_magnitude", lambda t: oc.clip_by_magnitude(0.25, t), reference="magnitude"),
    Case("clip_by_norm", lambda t: oc.clip_by_norm(oc.leaf_norm, t), reference="leaf_norm"),
    Case("clip_by_global_norm", oc.clip_by_global_norm, reference="global_norm", quick=True),
    Case("order 1", lambda t: oc.clip_by_global_norm(t, ord=1), reference="global_norm"),
    Case("order inf", lambda t: oc.clip_by_leaf_norm(t, ord=float("inf")), reference="leaf_norm"),
    Case("order 3", lambda t: oc.clip_by_unit_norm(t, ord=3), reference="unit_norm"),
    Case("clip_by_leaf_norm", oc.clip_by_leaf_norm, reference="leaf_norm"),
    Case("numbers", lambda t: oc.clip_by_leaf_norm(numbers(t)), quick=True, exempt=OTHER_LEAVES),
    Case("clip_by_unit_norm", oc.clip_by_unit_norm, reference="unit_norm"),
    Case("clip_by_block_rms", oc.clip_by_block_rms, reference="block_rms"),
    Case("rms of units", lambda t: oc.clip_by_block_rms(t, axis=lambda path, leaf: tuple(range(leaf.ndim))[-1:])),
    Case(
        "clip_by_group_norm",
        lambda t: oc.clip_by_group_norm({"vectors": t, "others": 0.75}, labels),
        reference="group_norm",
        quick=True,
    ),
    Case("clip_by_norm_range", lambda t: oc.clip_by_norm_range(0.25, t), reference="norm_range"),
    Case("clip_singular_values", oc.clip_singular_values, reference="singular_values"),
    Case(
        "tanh of singular values",
        lambda t: oc.clip_singular_values(t, response=responses.tanh),
        exempt={"test_derivatives": "a singular value decomposition has no derivative at zero"},
    ),
    Case("normalize", lambda t: oc.clip_by_leaf_norm(t, response=responses.normalize), reference="leaf_norm"),
    Case("smooth", lambda t: oc.clip_by_global_norm(t, response=responses.smooth), reference="global_norm"),
    Case("tanh", lambda t: oc.clip_by_unit_norm(t, response=responses.tanh), reference="unit_norm"),
    Case("schedule", lambda t: oc.clip_by_global_norm(lambda step: t / jnp.float32(1 + step)), history=True),
    Case("adaptive_grad_clip", oc.adaptive_grad_clip, 0.1, needs_params=True, reference="adaptive", quick=True),
    Case("autoclip", lambda t: oc.autoclip(t, 4), 50.0, history=True, reference="Autoclip"),
    Case("zclip", lambda t: oc.zclip(t, 0.9, 2), history=True, reference="Zclip", quick=True),
    Case("zclip of units", lambda t: oc.zclip(t, 0.9, 2, norm=oc.unit_norm), history=True),
    Case("adagc", lambda t: oc.adagc(t, 0.9, 0.9, 2), history=True, reference="Adagc"),
    Case("clip_by_sigma", lambda t: oc.clip_by_sigma(t, 4), history=True, reference="ClipBySigma"),
    Case("stable_spam", lambda t: oc.stable_spam(0.9, t), history=True, reference="StableSpam"),
    Case(
        "tracked_quantile",
        lambda t: oc.clip_by_norm(oc.unit_norm, thresholds.tracked_quantile(t, 0.2)),
        50.0,
        history=True,
        reference="TrackedQuantile",
    ),
    Case(
        "minimum",
        lambda t: oc.clip_by_norm(oc.global_norm, thresholds.minimum(t, thresholds.z_score(1.0, 0.9, 2))),
        history=True,
    ),
    Case(
        "chain of rules",
        lambda t: oc.clip_by_leaf_norm(optax.chain(thresholds.quantile(50.0, 4), optax.scale(t))),
        history=True,
    ),
    Case(
        "param_fraction", lambda t: oc.clip_by_norm(oc.leaf_norm, thresholds.param_fraction(t)), 0.1, needs_params=True
    ),
]

ADAM = "its state is Adam's"
OPTIMIZERS = [
    Case(
        "scale_by_stable_adam",
        lambda t: oc.scale_by_stable_adam(max_rms=t),
        history=True,
        reference="StableAdam",
        exempt={
            "test_updates_and_state_keep_their_types": "Adam refuses strict promotion",
            "test_leaves_without_a_norm_come_back_as_they_are": "Adam takes arrays of numbers alone",
            "test_other_states_are_found_as_before": ADAM,
            "test_map_params_gives_shardings_that_fit_the_state": ADAM,
        },
    ),
]


def with_logits(tx, max_logits):
    """The transformation with the logits that each step passes to it."""
    update = lambda updates, state, params=None, **extra: tx.update(
        updates, state, params, max_logits=max_logits, **extra
    )
    return optax.GradientTransformationExtraArgs(tx.init, update)


def one_head(path, leaf):
    """Each leaf with an axis is the queries of one head."""
    return oc.QK("attention", axis=0, heads=1) if leaf.ndim else None


WEIGHTS = [
    Case("clip_weights", oc.clip_weights, needs_params=True),
    Case("clip_weight_norm", oc.clip_weight_norm, needs_params=True),
    Case(
        "hold_weight_norm",
        lambda t: oc.hold_weight_norm(),
        needs_params=True,
        history=True,
    ),
    Case("clip_qk", lambda t: with_logits(oc.clip_qk(one_head, t), {"attention": jnp.array([2.0])}), needs_params=True),
    Case("prune_weights", oc.prune_weights, needs_params=True),
    Case("rescale_weights", lambda t: oc.rescale_weights(-0.25, t), needs_params=True),
    Case(
        "project_weights",
        lambda t: oc.project_weights(lambda params: optax.projections.projection_l2_ball(params, t)),
        needs_params=True,
    ),
]

WRAPPERS = [
    Case(
        "skip_spikes",
        lambda t: oc.skip_spikes(optax.sgd(0.1), thresholds.z_score(t, 0.9, 2)),
        2.0,
        history=True,
        exempt={"test_leaves_without_a_norm_come_back_as_they_are": "its optimizer scales leaves of every kind"},
    ),
    Case("with_error_feedback", lambda t: oc.with_error_feedback(oc.clip_by_global_norm(t)), history=True),
    Case("clip_randomly", lambda t: oc.clip_randomly(oc.clip(t), 0.5), history=True),
    Case("per_example", lambda t: one_example(oc.per_example(t)), reference="per_example"),
]

TABLE = CLIPS + OPTIMIZERS + WEIGHTS + WRAPPERS

of_table = pytest.mark.parametrize(
    "case", [pytest.param(case, id=case.name, marks=[] if case.quick else pytest.mark.full) for case in TABLE]
)

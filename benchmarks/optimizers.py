"""What is measured: AdamW with a clip in front, around it, or of its weights."""

import jax
import optax

import optax_clip as oc

ADAM = optax.adamw(1e-3)


def by_rank(tree):
    """Labels for groups."""
    return jax.tree.map(lambda x: "vector" if x.ndim < 2 else "matrix", tree)


CLIPS = {
    "bare": optax.identity(),
    "optax.clip_by_global_norm": optax.clip_by_global_norm(1.0),
    "clip_by_global_norm": oc.clip_by_global_norm(1.0),
    "autoclip": oc.autoclip(),
    "zclip": oc.zclip(),
    "clip_by_sigma": oc.clip_by_sigma(),
    "clip_by_norm_range": oc.clip_by_norm_range(0.1, 1.0),
    "clip_by_leaf_norm": oc.clip_by_leaf_norm(1.0),
    "adagc": oc.adagc(),
    "clip_by_group_norm": oc.clip_by_group_norm({"matrix": 1.0, "vector": None}, by_rank),
    "optax.clip_by_block_rms": optax.clip_by_block_rms(1.0),
    "clip_by_block_rms": oc.clip_by_block_rms(1.0),
    "clip_by_unit_norm": oc.clip_by_unit_norm(1.0),
    "optax.adaptive_grad_clip": optax.adaptive_grad_clip(0.01),
    "adaptive_grad_clip": oc.adaptive_grad_clip(0.01),
    "optax.clip": optax.clip(0.01),
    "clip": oc.clip(0.01),
    "clip_by_magnitude": oc.clip_by_magnitude(1e-4, 0.01),
    "clip_randomly(clip)": oc.clip_randomly(oc.clip(0.01), 0.5),
    "clip_randomly(global)": oc.clip_randomly(oc.clip_by_global_norm(1.0), 0.5),
    "with_error_feedback(clip)": oc.with_error_feedback(oc.clip(0.01)),
    "with_error_feedback(global)": oc.with_error_feedback(oc.clip_by_global_norm(1.0)),
}
OF_WEIGHTS = {
    "clip_weights": oc.clip_weights(1.0),
    "prune_weights": oc.prune_weights(1e-4),
    "clip_weight_norm": oc.clip_weight_norm(1.0),
    "rescale_weights": oc.rescale_weights(-1.0, 1.0),
    "project_weights": oc.project_weights(optax.projections.projection_non_negative),
}
OPTIMIZERS = {
    **{name: optax.chain(clip, ADAM) for name, clip in CLIPS.items()},
    **{name: optax.chain(ADAM, clip) for name, clip in OF_WEIGHTS.items()},
    "skip_spikes": oc.skip_spikes(ADAM, 1e3),
    "skip_spikes, global": oc.skip_spikes(optax.chain(oc.clip_by_global_norm(1.0), ADAM), 1e3),
}

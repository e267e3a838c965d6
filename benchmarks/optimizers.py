"""What is measured: AdamW with a clip in front, around it, or of its weights; and what each is compared with."""

import jax
import optax

import optax_clip as oc

ADAM = optax.adamw(1e-3)


def by_rank(tree):
    """Labels for groups."""
    return jax.tree.map(lambda x: "vector" if x.ndim < 2 else "matrix", tree)


def numbers(tree):
    """A bound of its own for each leaf."""
    leaves, treedef = jax.tree.flatten(tree)
    return treedef.unflatten([1.0 + i / 1024 for i in range(len(leaves))])


# From a name to the clip, in front of AdamW; a function makes it where it depends on the parameters.
CLIPS = {
    "bare": optax.identity(),
    "optax.clip": optax.clip(0.01),
    "clip": oc.clip(0.01),
    "clip_by_magnitude": oc.clip_by_magnitude(1e-4, 0.01),
    "optax.clip_by_global_norm": optax.clip_by_global_norm(1.0),
    "clip_by_global_norm": oc.clip_by_global_norm(1.0),
    "autoclip": oc.autoclip(),
    "zclip": oc.zclip(),
    "clip_by_sigma": oc.clip_by_sigma(),
    "clip_by_norm_range": oc.clip_by_norm_range(0.1, 1.0),
    "clip_by_group_norm": oc.clip_by_group_norm({"matrix": 1.0, "vector": None}, by_rank),
    "optax.clip_by_block_rms": optax.clip_by_block_rms(1.0),
    "clip_by_block_rms": oc.clip_by_block_rms(1.0),
    "clip_by_leaf_norm": oc.clip_by_leaf_norm(1.0),
    "leaf norm, a number each": lambda params: oc.clip_by_leaf_norm(numbers(params)),
    "adagc": oc.adagc(),
    "zclip, leaves": oc.zclip(norm=oc.leaf_norm),
    "optax.adaptive_grad_clip": optax.adaptive_grad_clip(0.01),
    "adaptive_grad_clip": oc.adaptive_grad_clip(0.01),
    "clip_by_unit_norm": oc.clip_by_unit_norm(1.0),
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
AROUND = {
    "optax.apply_if_finite": optax.apply_if_finite(ADAM, 10),
    "skip_spikes": oc.skip_spikes(ADAM, 1e3),
    "skip_spikes, global": oc.skip_spikes(optax.chain(oc.clip_by_global_norm(1.0), ADAM), 1e3),
}
# The same clip of Optax, or ours with a number where its threshold adapts.
COMPARED = {
    "clip": "optax.clip",
    "clip_by_global_norm": "optax.clip_by_global_norm",
    "clip_by_leaf_norm": "optax.clip_by_block_rms",
    "clip_by_block_rms": "optax.clip_by_block_rms",
    "adaptive_grad_clip": "optax.adaptive_grad_clip",
    "autoclip": "clip_by_global_norm",
    "zclip": "clip_by_global_norm",
    "clip_by_sigma": "clip_by_global_norm",
    "adagc": "clip_by_leaf_norm",
    "zclip, leaves": "clip_by_leaf_norm",
    "leaf norm, a number each": "clip_by_leaf_norm",
    "skip_spikes": "optax.apply_if_finite",
}
NAMES = [*CLIPS, *OF_WEIGHTS, *AROUND]


def optimizer(name: str, params) -> optax.GradientTransformationExtraArgs:
    """The whole optimizer of this name, for parameters (or shapes) like these."""
    if name in AROUND:
        return AROUND[name]
    if name in OF_WEIGHTS:
        return optax.chain(ADAM, OF_WEIGHTS[name])
    clip = CLIPS[name]
    return optax.chain(clip if isinstance(clip, optax.GradientTransformation) else clip(params), ADAM)


def with_compared(names: list[str]) -> list[str]:
    """The bare step first, and before each name what it is compared with."""
    out = ["bare"]
    for name in names:
        chain = [name]
        while chain[0] in COMPARED:
            chain.insert(0, COMPARED[chain[0]])
        out += chain
    return list(dict.fromkeys(out))

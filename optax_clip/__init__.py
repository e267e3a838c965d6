"""Gradient clipping for JAX, as composable Optax transformations."""

from optax_clip import responses, thresholds
from optax_clip.backward import clip_backward
from optax_clip.clips.adaptive import adagc, adaptive_grad_clip, autoclip, clip_by_sigma, zclip
from optax_clip.clips.norms import (
    ClipState,
    clip_by_block_rms,
    clip_by_global_norm,
    clip_by_group_norm,
    clip_by_leaf_norm,
    clip_by_norm,
    clip_by_norm_range,
    clip_by_unit_norm,
)
from optax_clip.clips.singular_values import clip_singular_values
from optax_clip.clips.stable_spam import stable_spam
from optax_clip.clips.values import clip, clip_by_magnitude, clip_by_value
from optax_clip.norms import block_rms, global_norm, group_norm, leaf_norm, spectral_norm, unit_norm
from optax_clip.optimizers import scale_by_stable_adam
from optax_clip.tools.metrics import clip_metrics
from optax_clip.tools.replay import replay
from optax_clip.tools.suggest import suggest_threshold
from optax_clip.tools.worst import worst_leaves
from optax_clip.weights.attention import QK, clip_qk
from optax_clip.weights.bounds import clip_weights, prune_weights, rescale_weights
from optax_clip.weights.norms import clip_weight_norm, hold_weight_norm
from optax_clip.weights.projections import project_weights
from optax_clip.wrappers.error_feedback import with_error_feedback
from optax_clip.wrappers.per_example import per_example
from optax_clip.wrappers.random import clip_randomly
from optax_clip.wrappers.skip import SkipState, skip_spikes

__version__ = "0.1.0"

__all__ = ["clip", "clip_by_value", "clip_by_magnitude"]  # single entries
__all__ += ["clip_by_global_norm", "clip_by_leaf_norm", "clip_by_unit_norm", "clip_by_block_rms"]  # norms
__all__ += ["clip_by_group_norm", "clip_by_norm_range", "clip_singular_values"]
__all__ += ["adaptive_grad_clip", "autoclip", "zclip", "adagc", "clip_by_sigma", "stable_spam"]  # thresholds that adapt
__all__ += ["clip_weights", "clip_weight_norm", "prune_weights", "rescale_weights", "project_weights"]  # weights
__all__ += ["hold_weight_norm", "clip_qk", "QK"]  # and of attention
__all__ += ["skip_spikes", "with_error_feedback", "clip_randomly", "per_example"]  # around a clip or an optimizer
__all__ += ["clip_backward"]  # inside of the network
__all__ += ["scale_by_stable_adam"]  # in place of Adam
__all__ += ["clip_metrics", "ClipState", "SkipState", "worst_leaves"]  # see what was clipped, and what went wrong
__all__ += ["replay", "suggest_threshold"]  # choose a threshold
__all__ += ["clip_by_norm", "global_norm", "leaf_norm", "unit_norm", "block_rms", "group_norm"]  # build a clip
__all__ += ["spectral_norm", "thresholds", "responses"]

"""Gradient clipping for JAX, as composable Optax transformations."""

import gc as _gc

# What an import makes lives for good. A collection amid it would walk through all objects of jax, and find nothing, for
# longer than the import takes.
_collecting = _gc.isenabled()
_gc.disable()
try:
    from optax_clip._adaptive import adagc, adaptive_grad_clip, autoclip, clip_by_sigma, zclip
    from optax_clip._averages import ema_ratio, z_score
    from optax_clip._choosing import Replay, Suggestion, replay, suggest_threshold
    from optax_clip._clip_by_norm import ClipState, clip_by_norm
    from optax_clip._landing import WeightState
    from optax_clip._metrics import clip_metrics
    from optax_clip._norm_clips import (
        clip_by_block_rms,
        clip_by_global_norm,
        clip_by_group_norm,
        clip_by_leaf_norm,
        clip_by_norm_range,
        clip_by_unit_norm,
    )
    from optax_clip._norms import block_rms, global_norm, group_norm, leaf_norm, unit_norm
    from optax_clip._responses import normalize, shrink, smooth, tanh
    from optax_clip._rules import minimum, param_fraction
    from optax_clip._skipping import SkipState, skip_spikes
    from optax_clip._thresholds import Threshold, per_block, scheduled
    from optax_clip._values import ValueClipState, clip, clip_by_magnitude, clip_by_value
    from optax_clip._weights import (
        clip_weight_norm,
        clip_weights,
        project_weights,
        prune_weights,
        rescale_weights,
    )
    from optax_clip._windows import quantile, sigma_window
    from optax_clip._wrappers import ErrorFeedbackState, RandomClipState, clip_randomly, with_error_feedback
finally:
    if _collecting:
        _gc.enable()

__version__ = "0.1.0"

__all__ = [
    # Clip single entries
    "clip",
    "clip_by_value",
    "clip_by_magnitude",
    # Clip norms at a threshold
    "clip_by_global_norm",
    "clip_by_leaf_norm",
    "clip_by_unit_norm",
    "clip_by_block_rms",
    "clip_by_group_norm",
    "clip_by_norm_range",
    # Adapt to the parameters, or to the norms so far
    "adaptive_grad_clip",
    "autoclip",
    "zclip",
    "adagc",
    "clip_by_sigma",
    # Keep weights in bounds
    "clip_weights",
    "clip_weight_norm",
    "prune_weights",
    "rescale_weights",
    "project_weights",
    # Around a clip or an optimizer
    "skip_spikes",
    "with_error_feedback",
    "clip_randomly",
    # See what was clipped
    "clip_metrics",
    "ClipState",
    "ValueClipState",
    "SkipState",
    "WeightState",
    "ErrorFeedbackState",
    "RandomClipState",
    # Choose a threshold
    "replay",
    "Replay",
    "suggest_threshold",
    "Suggestion",
    # Build a clip: norm x threshold x response
    "clip_by_norm",
    "global_norm",
    "leaf_norm",
    "unit_norm",
    "block_rms",
    "group_norm",
    "Threshold",
    "scheduled",
    "param_fraction",
    "quantile",
    "z_score",
    "ema_ratio",
    "sigma_window",
    "minimum",
    "per_block",
    "shrink",
    "normalize",
    "smooth",
    "tanh",
]

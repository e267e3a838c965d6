"""Gradient clipping for JAX, as composable Optax transformations."""

from optax_clip._adaptive import adaptive_grad_clip
from optax_clip._clip_by_norm import ClipState, clip_by_norm
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
from optax_clip._thresholds import Threshold, param_fraction, scheduled
from optax_clip._values import ValueClipState, clip, clip_by_value

__version__ = "0.1.0"

__all__ = [
    # Clip single entries
    "clip",
    "clip_by_value",
    # Clip norms at a threshold
    "clip_by_global_norm",
    "clip_by_leaf_norm",
    "clip_by_unit_norm",
    "clip_by_block_rms",
    "clip_by_group_norm",
    "clip_by_norm_range",
    # Adapt to the parameters
    "adaptive_grad_clip",
    # See what was clipped
    "clip_metrics",
    "ClipState",
    "ValueClipState",
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
    "shrink",
    "normalize",
    "smooth",
    "tanh",
]

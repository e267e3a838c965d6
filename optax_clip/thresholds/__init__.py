"""Thresholds with a history: rules, each an Optax transformation over the norm of one block."""

from optax_clip.thresholds.averages import ema_ratio, z_score
from optax_clip.thresholds.combine import minimum, param_fraction
from optax_clip.thresholds.quantiles import quantile, tracked_quantile
from optax_clip.thresholds.windows import sigma_window

__all__ = ["z_score", "quantile", "tracked_quantile", "sigma_window", "ema_ratio", "param_fraction", "minimum"]

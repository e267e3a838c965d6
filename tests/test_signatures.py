"""The promise to callers: names, order, kinds and defaults of parameters, and fields of states."""

import inspect

import pytest

import optax_clip
from optax_clip import plot

SIGNATURES = [
    "clip(max_delta)",
    "clip_by_value(min_value=None, max_value=None)",
    "clip_by_magnitude(min_magnitude=None, max_magnitude=None)",
    "clip_by_global_norm(max_norm, *, ord=None, axis_name=None, response=None)",
    "clip_by_leaf_norm(max_norm, *, ord=None, axis_name=None, response=None)",
    "clip_by_unit_norm(max_norm, axis=None, *, ord=None, axis_name=None, response=None)",
    "clip_by_block_rms(threshold, *, axis=None, axis_name=None, response=None)",
    "clip_by_group_norm(max_norms, labels, *, ord=None, axis_name=None, response=None)",
    "clip_by_norm_range(min_norm, max_norm, *, norm=None)",
    "adaptive_grad_clip(clipping, eps=0.001, axis=None, *, axis_name=None, response=None)",
    "autoclip(percentile=10.0, window=1024, *, norm=None, response=None)",
    "zclip(z_max=2.5, decay=0.97, warmup_steps=25, *, spike='rescale', factor=1.0, norm=None, response=None)",
    "adagc(max_norm=1.0, max_ratio=1.05, decay=0.98, warmup_steps=100, *, norm=None, response=None)",
    "clip_by_sigma(sigmas=3.0, window=128, *, norm=None, response=None)",
    "clip_weights(max_value)",
    "clip_weight_norm(max_norm, axis=None, *, ord=None, axis_name=None, response=None)",
    "prune_weights(threshold)",
    "rescale_weights(low=0.0, high=1.0, *, axis_name=None)",
    "project_weights(projection)",
    "skip_spikes(inner, threshold=None, *, norm=None)",
    "with_error_feedback(clip, *, accumulator_dtype=None)",
    "clip_randomly(clip, probability, seed=0, *, per='element')",
    "clip_metrics(opt_state, prefix='clip')",
    "ClipState(step, norm, threshold, scale, clip_rate, rule)",
    "ValueClipState(step)",
    "SkipState(total_skipped, consecutive_skipped, measured, inner_state)",
    "WeightState(step, touched)",
    "ErrorFeedbackState(carry, inner_state)",
    "RandomClipState(key, inner_state)",
    "replay(clip, norms)",
    "Replay(norm, threshold, scale, clipped)",
    "suggest_threshold(norms)",
    "Suggestion(threshold, clip_rate, candidates, clip_rates, basis)",
    "clip_by_norm(norm, threshold, response=None)",
    "global_norm(updates, *, ord=None, axis_name=None)",
    "leaf_norm(updates, *, ord=None, axis_name=None)",
    "unit_norm(updates, *, ord=None, axis=None, axis_name=None)",
    "block_rms(updates, *, axis=None, axis_name=None)",
    "group_norm(labels, *, ord=None, axis_name=None)",
    "Threshold(init, update, needs_params)",
    "scheduled(schedule)",
    "param_fraction(fraction, norm, eps=0.001, *, caller='param_fraction')",
    "quantile(percentile=10.0, window=1024)",
    "z_score(z_max=2.5, decay=0.97, warmup_steps=25, *, spike='rescale', factor=1.0)",
    "ema_ratio(max_norm=1.0, max_ratio=1.05, decay=0.98, warmup_steps=100)",
    "sigma_window(sigmas=3.0, window=128)",
    "minimum(*thresholds)",
    "per_block(init, update)",
    "shrink(norm, threshold)",
    "normalize(norm, threshold)",
    "smooth(norm, threshold)",
    "tanh(norm, threshold)",
    "plot.thresholds(norms, clips, *, ax=None)",
    "plot.distribution(norms, candidates=None, *, ax=None)",
    "plot.leaf_norms(norms, *, ax=None)",
    "plot.responses(*, ax=None)",
]


def signature(function) -> str:
    """Name and parameters without types; of a state, its fields."""
    if inspect.isclass(function):
        return f"{function.__name__}({', '.join(function._fields)})"
    whole = inspect.signature(function)
    parameters = [p.replace(annotation=p.empty) for p in whole.parameters.values()]
    return f"{function.__name__}{whole.replace(parameters=parameters, return_annotation=whole.empty)}"


@pytest.mark.parametrize("module", [optax_clip, plot], ids=["optax_clip", "plot"])
def test_signatures_are_these(module):
    """A call that works goes on to mean the same: what changes here is a change for users, and in the changelog."""
    prefix = "plot." if module is plot else ""
    found = [prefix + signature(getattr(module, name)) for name in module.__all__]
    assert found == [row for row in SIGNATURES if row.startswith("plot.") == (module is plot)]

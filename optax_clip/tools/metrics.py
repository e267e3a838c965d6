"""What the clips in an optimizer state measured."""

from collections.abc import Iterator
from typing import Any

import jax

from optax_clip.clips.norms import ClipState
from optax_clip.weights.attention import QKClipState
from optax_clip.wrappers.per_example import PerExampleState
from optax_clip.wrappers.skip import SkipState


def clip_metrics(opt_state: Any, prefix: str = "") -> dict[str, jax.Array]:
    """Reads what norm clips measured in their last step, wherever they sit in an optimizer's state.

    Works on states of `optax.chain`, `masked`, `partition`, `MultiSteps`, `inject_hyperparams` and any other tree,
    inside jit and scan. It reads numbers that the step computed anyway.

    Args:
      opt_state: an optimizer state of at least one norm clip, `per_example` or `skip_spikes`.
      prefix: what stands before all names. `"generator"` makes `generator/clip/norm` of `clip/norm`.

    Returns:
      Scalars by name, f32[] unless said otherwise. Of the first clip:

      - `clip/norm`: the norm *before* clipping, so it may exceed the threshold. Over several blocks it is the root of
        the sum of their squares.
      - `clip/threshold`: the mean over the blocks that have one.
      - `clip/scale`: the mean over blocks of the norm after, over the norm before.
      - `clip/clipped`: the share of blocks above their threshold in this step.
      - `clip/clip_rate`: the mean of that share over all steps.

      A clip of units (`clip_by_unit_norm`, `adaptive_grad_clip`) has no threshold and no scale where a leaf has several
      units. The first clip is the first in the state. A clip that is added after it, or a wrapper around it, does not
      rename it; a clip that is added before it takes its names. The names of further clips hold the path of their
      state, `clip/1/norm`, and may change with it. `per_example` has means over examples, and adds `clip/dropped` and
      `clip/dropped_total`, i32[]. `clip_qk` adds `qk/max_logit` and `qk/clipped`, the share of heads. `skip_spikes`
      adds names of its own:

      - `skip/norm`, `skip/norm_threshold`: what was compared in this step, skipped or not.
      - `skip/value`, `skip/value_threshold`: the same of the loss, only with a `value_threshold`.
      - `skip/by_norm`, `skip/by_value`: 1 if this step was skipped and the norm, or the loss, was above its threshold
        or not finite; else 0.
      - `skip/total`, `skip/consecutive`: steps skipped so far, and in a row, i32[].

      While there is no threshold yet, it is shown as the largest finite f32.

    Raises:
      ValueError: nothing in the state measures.

    Example:
      >>> optimizer = optax.chain(clip_by_global_norm(1.0), optax.sgd(0.1))
      >>> grads = jnp.array([3.0, 4.0])
      >>> _, state = optimizer.update(grads, optimizer.init(grads))
      >>> {name: round(float(value), 3) for name, value in clip_metrics(state).items()}
      {'clip/norm': 5.0, 'clip/threshold': 1.0, 'clip/scale': 0.2, 'clip/clipped': 1.0, 'clip/clip_rate': 1.0}
    """
    metrics = {}
    for path, kind, values in _measured(opt_state):
        spellings = "", jax.tree_util.keystr(path, simple=True, separator="/"), jax.tree_util.keystr(path)
        named = ({"/".join(filter(None, (prefix, kind, where, x))): values[x] for x in values} for where in spellings)
        # The first clip has no path. Of two paths that are spelled alike, the second is written as in Python.
        named = next(each for each in named if metrics.keys().isdisjoint(each))
        metrics |= {name: _array(value) for name, value in named.items() if value is not None}
    if not metrics:
        raise ValueError(
            f"opt_state must hold a ClipState or a SkipState, got a {type(opt_state).__name__} that holds none. Pass "
            "that of an optimizer with a norm clip or skip_spikes. clip_by_global_norm(None) measures without clipping."
        )
    return metrics


def _measured(tree: Any, above: tuple = ()) -> Iterator[tuple[tuple, str, dict[str, Any]]]:
    """Path, kind and numbers of each state that measures, in the order of the tree."""
    is_state = lambda x: isinstance(x, (ClipState, SkipState, PerExampleState, QKClipState))
    for path, state in jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_state):
        if isinstance(state, (ClipState, PerExampleState)):
            clip = state if isinstance(state, ClipState) else state.measured
            names = ("norm", "threshold", "scale", "clipped", "clip_rate")
            values = (clip.norm, clip.threshold, clip.clip_scale, clip.clipped, clip.clip_rate)
            dropped = {name: getattr(state, name) for name in ("dropped", "dropped_total") if hasattr(state, name)}
            yield (*above, *path), "clip", dict(zip(names, values)) | dropped
        elif isinstance(state, QKClipState):
            yield (*above, *path), "qk", {"max_logit": state.max_logit, "clipped": state.heads_clipped}
        elif isinstance(state, SkipState):
            values = {"total": state.total_skipped, "consecutive": state.consecutive_skipped}
            for name, seen in (("norm", state.measured), ("value", state.measured_value)):
                if seen is not None:
                    values |= {name: seen.norm, f"{name}_threshold": seen.threshold, f"by_{name}": seen.clipped}
            yield (*above, *path), "skip", values
            yield from _measured(state.inner_state, (*above, *path, jax.tree_util.GetAttrKey("inner_state")))


def _array(value: Any) -> Any:
    """What a variable holds now, as in the states of Flax NNX. It would change with the next step."""
    convert = getattr(value, "__jax_array__", None)
    return convert() if convert else value

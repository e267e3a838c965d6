"""What the clips in an optimizer state measured."""

from typing import Any

import jax

from optax_clip._clip_by_norm import ClipState
from optax_clip._landing import WeightState
from optax_clip._skipping import SkipState

_FIELDS = {
    ClipState: ("norm", "threshold", "scale", "clip_rate"),
    SkipState: ("total_skipped", "consecutive_skipped"),
    WeightState: ("touched",),
}


def clip_metrics(opt_state: Any, prefix: str = "clip") -> dict[str, jax.Array]:
    """Reads what norm clips measured in their last step, wherever they sit in an optimizer's state.

    Works on states of `optax.chain`, `masked`, `partition`, `MultiSteps`, `inject_hyperparams` and any other tree,
    inside jit and scan; it reads numbers that the step computed anyway.

    Args:
      opt_state: an optimizer state that holds at least one `ClipState`, `SkipState` or `WeightState`.
      prefix: first part of the names.

    Returns:
      `{"clip/norm": ..., "clip/threshold": ..., "clip/scale": ..., "clip/clip_rate": ...}`, f32[] each: the norm
      *before* clipping (so it may exceed the threshold), the mean threshold and scale over blocks, and the running
      mean over steps of the share of blocks above their threshold. With several clips the path of each stands
      between: `clip/0/norm`. `skip_spikes` adds `clip/total_skipped` and `clip/consecutive_skipped`, i32[] each;
      `clip_weights` and `prune_weights` add `clip/touched`, f32[].

    Raises:
      ValueError: nothing in the state measures: no norm clip, `skip_spikes`, `clip_weights` or `prune_weights`.

    Example:
      >>> optimizer = optax.chain(clip_by_global_norm(1.0), optax.sgd(0.1))
      >>> grads = jnp.array([3.0, 4.0])
      >>> _, state = optimizer.update(grads, optimizer.init(grads))
      >>> {name: round(float(value), 3) for name, value in clip_metrics(state).items()}
      {'clip/norm': 5.0, 'clip/threshold': 1.0, 'clip/scale': 0.2, 'clip/clip_rate': 1.0}
    """
    states = {kind: _states(opt_state, kind) for kind in _FIELDS}
    if not any(states.values()):
        raise ValueError(
            f"clip_metrics: found no ClipState in opt_state, a {type(opt_state).__name__}. Pass the state of an "
            "optimizer with a norm clip, clip_weights or prune_weights in it; clips of single entries (clip, "
            "clip_by_value), rescale_weights and project_weights measure nothing. clip_by_global_norm(None) measures "
            "without clipping."
        )
    metrics = {}
    for kind, found in states.items():
        for path, state in found:
            where = jax.tree_util.keystr(path, simple=True, separator="/") if len(found) > 1 else ""
            for name in _FIELDS[kind]:
                key = "/".join(filter(None, (prefix, where, name)))
                if key in metrics:  # a name that holds a slash, beside a path that is spelled the same
                    key = f"{prefix}/{jax.tree_util.keystr(path)}/{name}"
                metrics[key] = _array(getattr(state, name))
    return metrics


def _array(value: Any) -> Any:
    """What a variable holds now, as in the states of Flax NNX; it would change with the next step."""
    convert = getattr(value, "__jax_array__", None)
    return convert() if convert else value


def _states(tree: Any, kind: type, above: tuple = ()) -> list[tuple[tuple, Any]]:
    """The states of a kind in a tree, with their paths; also those inside of others of that kind."""
    is_state = lambda x: isinstance(x, kind)
    states = []
    for path, node in jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_state):
        if is_state(node):
            here = (*above, *path)
            states.append((here, node))
            for name in node._fields:
                states += _states(getattr(node, name), kind, (*here, jax.tree_util.GetAttrKey(name)))
    return states

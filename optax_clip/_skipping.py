"""Steps that an optimizer does not see."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import eval_jaxpr

from optax_clip import _checks
from optax_clip._clip_by_norm import ClipState, norm_step
from optax_clip._norms import global_norm


class SkipState(NamedTuple):
    """What `skip_spikes` did so far. Read it with `clip_metrics`."""

    total_skipped: jax.Array  # i32[]: steps skipped so far, saturates
    consecutive_skipped: jax.Array  # i32[]: steps skipped since the last one that was taken, saturates
    measured: ClipState  # norm and threshold of the last step; scale 1 if it was taken, else 0; clip_rate: of spikes
    inner_state: Any  # of the optimizer


def skip_spikes(
    inner: optax.GradientTransformation, threshold: Any = None, *, norm: Callable[[Any], Any] | None = None
) -> optax.GradientTransformationExtraArgs:
    """Skips the steps whose gradient is a spike or not finite: no update, and the optimizer does not see them.

    norm > threshold, or not finite: updates ← 0, state of `inner` as it was;  else: updates ← inner(updates)

    A clipped spike still moves the averages of an optimizer like Adam; a skipped one leaves no trace. Goes around the
    optimizer: `skip_spikes(optax.chain(clip_by_global_norm(1.0), optax.adamw(1e-3)), z_score(z_max=6.0))`.

    Args:
      inner: the optimizer, or any transformation.
      threshold: the largest norm that is not skipped, >= 0, as `max_norm` of `clip_by_global_norm`: a number, a scalar
        array (traced too), an Optax schedule, a rule such as `z_score()` or `sigma_window()`, or None to skip only what
        is not finite. A step that is skipped enters the statistics of no rule, and does not count for a schedule.
      norm: what is compared: None for `global_norm`. With several blocks, one above its threshold is enough.

    Returns:
      A transformation with the state `SkipState`: i32[], i32[], a `ClipState`, and the state of `inner`.

    Raises:
      ValueError: `threshold` is negative, NaN or not a scalar.
      TypeError: an argument is of the wrong kind.

    Guarantees:
      In a skipped step, the state of `inner` keeps every bit, counters and random keys included, and every floating,
      complex and integer update is 0. The selection is part of the kernels that write the state: no copy of it.
      Where norms have grown above the threshold for good, every step is skipped, and a rule does not see it: choose
      thresholds far above the usual, and watch `clip/consecutive_skipped`.

    Example:
      >>> tx = skip_spikes(optax.sgd(1.0), 10.0)
      >>> state = tx.init(jnp.zeros(1))
      >>> for gradient in (2.0, 50.0, jnp.nan, 3.0):
      ...     updates, state = tx.update(jnp.array([gradient]), state)
      ...     print(updates, state.total_skipped, state.consecutive_skipped)
      [-2.] 0 0
      [0.] 1 1
      [0.] 2 2
      [-3.] 2 0

    References:
      Chowdhery and others, PaLM, 2022, arXiv 2204.02311, section 5.1, skip the batches around spikes of the loss.
    """
    example = "skip_spikes(optax.adamw(1e-3), 10.0)"
    _checks.transformation(inner, caller="skip_spikes", name="inner", example=example)
    update_inner = optax.with_extra_args_support(inner).update
    # Its updates are not used, so the compiler drops them.
    norm = global_norm if norm is None else norm
    watch_init, watch = norm_step(norm, threshold, None, caller="skip_spikes", name="threshold")

    def init_fn(params):
        zero = lambda: jnp.zeros([], jnp.int32)
        return SkipState(zero(), zero(), watch_init(params), inner.init(params))

    def update_fn(updates, state, params=None, **extra_args):
        _checks.state(state, SkipState, caller="skip_spikes")
        _, measured, spikes = watch(updates, state.measured, params)
        skip = ~jnp.isfinite(measured.norm) | jnp.isnan(measured.threshold) | (spikes > 0)
        measured = measured._replace(
            scale=jnp.where(skip, 0.0, 1.0).astype(jnp.float32),
            rule=jax.tree.map(lambda new, old: jnp.where(skip, old, new), measured.rule, state.measured.rule),
        )
        new_updates, inner_state = _unless(
            skip, lambda inner_state: update_inner(updates, inner_state, params, **extra_args), state.inner_state
        )
        return new_updates, SkipState(
            jnp.where(skip, optax.safe_increment(state.total_skipped), state.total_skipped),
            jnp.where(skip, optax.safe_increment(state.consecutive_skipped), 0),
            measured,
            inner_state,
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


@jax.custom_jvp
def _held(skip: jax.Array, arrays: list) -> list:
    """The arrays, with the derivative 0 where `skip` is true: that of a step with a NaN is NaN, and 0 · NaN is no 0."""
    del skip
    return arrays


@_held.defjvp
def _(primals, tangents):
    skip, arrays = primals
    return arrays, [jnp.where(skip, 0, dx) for dx in tangents[1]]


def _with_floats(function: Callable[[list], list], arrays: list) -> list:
    """The arrays, those of floating and complex dtypes as `function` returns them."""
    places = [i for i, x in enumerate(arrays) if jnp.issubdtype(jnp.result_type(x), jnp.inexact)]
    new = dict(zip(places, function([arrays[i] for i in places])))
    return [new.get(i, x) for i, x in enumerate(arrays)]


def _unless(skip: jax.Array, update: Callable[[Any], tuple[Any, Any]], state: Any) -> tuple[Any, Any]:
    """`update(state)`, or where `skip` is true, updates of zero and the state as it was.

    A branch would write out the updates and a copy of the state. A select after the fact would do so too: for it XLA
    keeps the state of before, while the updates are computed from the state of after. So each array of the new state is
    selected where it is computed, and what follows sees what was selected.
    """
    old, treedef = jax.tree.flatten(state)
    others: list[Any] = []  # the structure of the result, and updates that are no arrays

    def arrays_of(old):
        updates, new = update(treedef.unflatten(old))
        leaves, structure = jax.tree.flatten(updates)
        others[:] = [structure, [None if _is_array(leaf) else leaf for leaf in leaves]]
        return [jnp.asarray(leaf) for leaf in leaves if _is_array(leaf)], treedef.flatten_up_to(new)

    program, (shapes, _) = jax.make_jaxpr(arrays_of, return_shape=True)(old)
    results = program.jaxpr.outvars[len(shapes) :]
    given = {*program.jaxpr.invars, *program.jaxpr.constvars}
    before = {x: o for x, o in zip(results, old) if _is_var(x) and x not in given}
    computed: dict[Any, jax.Array] = {}

    def selected(x, value):
        if x not in before:
            return value
        computed[x] = value
        # Derivatives reach the state of before by what is returned, and not by what is computed from this.
        return jnp.where(skip, jax.lax.stop_gradient(before[x]), value)

    hold = functools.partial(_with_floats, functools.partial(_held, skip))
    values = _evaluate(program.jaxpr, hold(program.consts), hold(old), selected)
    kept = [
        o if x is own else jnp.where(skip, o, computed[x] if _is_var(x) and x in computed else value)
        for x, own, value, o in zip(results, program.jaxpr.invars, values[len(shapes) :], old)
    ]
    zeroed = iter([_zero_where(skip, value) for value in values[: len(shapes)]])
    structure, leaves = others
    return structure.unflatten([next(zeroed) if leaf is None else leaf for leaf in leaves]), treedef.unflatten(kept)


def _evaluate(
    jaxpr: Any, consts: list, arguments: list, replaced: Callable[[Any, jax.Array], jax.Array]
) -> list[jax.Array]:
    """What a traced program returns, where each value that it computes is `replaced(variable, value)`."""
    known = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *arguments]))
    used = set(filter(_is_var, [*jaxpr.outvars, *(x for equation in jaxpr.eqns for x in equation.invars)]))
    names = jaxpr.debug_info.with_unknown_names()
    for equation in jaxpr.eqns:
        inputs = list(dict.fromkeys(filter(_is_var, equation.invars)))
        outputs = [x for x in equation.outvars if x in used]
        one = jaxpr.replace(constvars=[], invars=inputs, outvars=outputs, eqns=[equation], debug_info=names)
        for x, value in zip(outputs, eval_jaxpr(one, (), *(known[i] for i in inputs))):
            known[x] = replaced(x, value)
    return [known[x] if _is_var(x) else jnp.asarray(x.val, x.aval.dtype) for x in jaxpr.outvars]


def _is_var(x: Any) -> bool:
    return not hasattr(x, "val")  # as literals of a program have


def _is_array(leaf: Any) -> bool:
    if isinstance(leaf, bool) or not isinstance(leaf, (jax.Array, np.ndarray, np.generic, int, float, complex)):
        return False
    return getattr(leaf, "dtype", None) != jax.dtypes.float0


def _zero_where(skip: jax.Array, x: jax.Array) -> jax.Array:
    return jnp.where(skip, 0, x) if jnp.issubdtype(x.dtype, jnp.number) else x

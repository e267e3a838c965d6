"""A clip inside of the network: the identity forward, and a clip of the cotangent at this very place backward."""

import functools
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.extend.core import ClosedJaxpr, jaxpr_as_fun

from optax_clip._engine import checks
from optax_clip._engine.leaves import is_counted, keystr


def clip_backward(x: Any, clip: optax.GradientTransformation | Callable[[Any], Any]) -> Any:
    """Returns `x`; in the backward pass, the gradient that comes to this place goes through `clip`.

    x ← x in the forward pass;  g ← clip(g) in the backward pass, g the gradient with respect to this x

    A clip after the backward pass comes too late where the gradient itself overflows on its way: through hundreds of
    steps of a recurrent network, a simulator, a rollout. Put `state = clip_backward(state, clip(1.0))` into each step.

    Args:
      x: a tree of arrays, or one array. Leaves that are neither floating nor complex arrays have no gradient: integers,
        booleans, keys, Python numbers. They come back as they are, and `clip` sees None in their place.
      clip: a transformation without a history (`clip`, a norm clip whose threshold is a number, those of Optax, a
        chain of these), or a function from the tree of gradients to one of the same shapes and dtypes. Thresholds and
        whatever else it closes over may be traced; their own gradient through this place is zero.

    Returns:
      `x`: the same tree, shapes, dtypes and values.

    Raises:
      ValueError: `clip` has a history, as adaptive clips and schedules have; it returns another tree, other shapes or
        other dtypes than it gets.
      TypeError: `clip` is neither; from JAX, in forward mode (`jax.jvp`, `jax.jacfwd`).

    Guarantees:
      Forward, nothing is computed. `clip` sees what is there at this place: in a scan one step, under `vmap` one
      example, in a batched call the batch. A clip has a history where the gradients that it returns depend on its
      state: this is found in its program, whatever its name. Under `jit` on meshes, in `shard_map`, `scan`, `vmap` and
      `jax.checkpoint` numbers are the same. A second derivative, also `jax.hessian`, is that of the clipped gradient.

    Example:
      >>> f = lambda x: 7.0 * clip_backward(3.0 * x, clip(1.0))
      >>> value, gradient = jax.value_and_grad(f)(2.0)  # a gradient of 7 comes to the clip, and 1 goes on
      >>> print(value, gradient)
      42.0 3.0

    References:
      Graves, Generating sequences with recurrent neural networks, 2013, arXiv 1308.0850, section 2.1. `grad_clip` of
      Theano and `rlax.clip_gradient` do this with a clip by value.
    """
    tx: Any = clip
    if not isinstance(clip, optax.GradientTransformation):
        example = "Or pass a transformation: clip_backward(x, optax_clip.clip(1.0))."
        checks.function(clip, "clip", ("gradients",), example)
        tx = optax.stateless(lambda gradients, _: clip(gradients))
    has_gradient = lambda leaf: is_counted(leaf) and not isinstance(leaf, (float, complex))
    there = jax.tree.map(lambda leaf: jnp.asarray(leaf) if has_gradient(leaf) else None, x)
    arrays, treedef = jax.tree.flatten(there)

    def program(*gradients):
        tree = treedef.unflatten(gradients)
        new, _ = tx.update(tree, tx.init(tree))
        got, wanted = map(_kinds, (new, tree))
        if got != wanted:
            pair = next(pair for pair in itertools.zip_longest(got, wanted, fillvalue="nothing") if pair[0] != pair[1])
            raise ValueError(
                f"clip must return a gradient for each that it gets, of the same shape and dtype, got {pair[0]} where "
                f"x has {pair[1]}. Cast or reshape in your function, and return the tree that came in."
            )
        return jax.tree.leaves(new)

    # Here and not in the backward pass, where what `clip` closes over may be gone: it becomes an argument.
    traced = jax.make_jaxpr(program)(*arrays)
    if tx is clip and _has_history(tx, there):
        raise ValueError(
            "clip must have no history, but the gradients that it returns depend on its state. A backward pass keeps "
            "no state. Pass a clip whose threshold is a number; the threshold of this step may be a traced one."
        )
    new = iter(_identity(traced.jaxpr, arrays, traced.consts))
    return jax.tree.map(lambda leaf: next(new) if has_gradient(leaf) else leaf, x)


def _kinds(tree: Any) -> list[str]:
    """Dtype, shape and place of each leaf."""
    kind = lambda leaf: f"{getattr(leaf, 'dtype', type(leaf).__name__)}{list(np.shape(leaf))}"
    return [f"{kind(leaf)} at {keystr(path)}" for path, leaf in jax.tree_util.tree_leaves_with_path(tree)]


def _has_history(clip: optax.GradientTransformation, updates: Any) -> bool:
    """Whether new updates depend on the state: then under `vmap` over states alone, each state has its own."""
    update = jax.vmap(lambda updates, state: clip.update(updates, state)[0], (None, 0), None, axis_size=1)
    states = jax.vmap(clip.init, in_axes=None, axis_size=1)
    try:
        jax.eval_shape(lambda updates: update(updates, states(updates)), updates)
    except ValueError:  # of `out_axes`: what the clip itself raises came before, without `vmap`
        return True
    return False


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _identity(program: Any, arrays: list, consts: list) -> list:
    del program, consts
    return arrays


def _backward(program, consts, gradients):
    return jaxpr_as_fun(ClosedJaxpr(program, consts))(*gradients), None


_identity.defvjp(lambda program, arrays, consts: (arrays, consts), _backward)

"""A clip of singular values, the norms of a matrix in each of its directions."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from optax_clip._engine import checks
from optax_clip._engine.singular import bounded, responded
from optax_clip.clips.norms import norm_clip
from optax_clip.norms import spectral_norm
from optax_clip.responses import shrink


def clip_singular_values(
    max_value: Any, *, response: Callable | None = None, method: str | None = None, axis_name: Any = None
) -> optax.GradientTransformationExtraArgs:
    """Clips the singular values of each matrix: a few directions that are large come down, the others stay.

    updates_i ← U min(Σ, max_value) V^T,  updates_i = U Σ V^T

    A norm clip scales all directions by one factor. The last two axes of a leaf are a matrix, the axes before are a
    stack of matrices; leaves of rank 0 and 1 are returned as they are.

    Args:
      max_value: largest singular value, >= 0, as for `clip_by_leaf_norm`: a number, a scalar array (traced too), an
        Optax schedule, a rule, None to measure only, or a prefix tree of these. A rule sees the `spectral_norm`.
      response: what becomes of a singular value: None for `responses.shrink`, the formula; `smooth`, `tanh` or a
        function (σ, max_value) -> σ after need a singular value decomposition.
      method: None for products of matrices where `response` allows; "svd" for a decomposition, which is right to
        about 1e-6 at all sizes, and has no derivative where singular values are equal or 0.
      axis_name: inside `shard_map` or `pmap`, `()` says that every matrix is whole on its device. It is required where
        a leaf varies over a mesh axis.

    Returns:
      A transformation with the state `ClipState`, of the norms by `spectral_norm`. Where a leaf is a stack of
      matrices, the state has no threshold and no scale (None).

    Raises:
      ValueError: a threshold is negative, NaN or not a scalar, or the tree does not fit the updates; `method` is
        unknown; `axis_name` is missing, or names the axes of a spread matrix.
      TypeError: an argument is of the wrong kind.

    Guarantees:
      Where `spectral_norm` is at most `max_value`, bit-identical. By products, errors are at most 1e-3 of `max_value`
      in spectral norm while the largest singular value is at most 1e4 times it, and afterwards no singular value is
      above 1.001 times it, however large it was. Beyond 1e6 times, small singular values come down too. Never NaN
      from finite numbers. A NaN or inf makes its matrix NaN. bf16 and f16 round the result; f64 is as exact as f32.
      Costs for a matrix m × m, in products: 10 m³ where nothing is clipped, else 92 m³ more for each factor of 32 from
      `max_value` to the norm; five steps of Muon cost 30 m³. A stack is decided on as one: one matrix above its bound
      costs as if all were. Under `vmap`, every stage is computed.

    Example:
      >>> tx = clip_singular_values(2.0)
      >>> grads = jnp.array([[9.0, 0.0], [0.0, 1.0]])
      >>> updates, state = tx.update(grads, tx.init(grads))
      >>> print(updates.round(3), state.norm)
      [[2. 0.]
       [0. 1.]] 9.0

    References:
      Jiang, Semenov, Stich, Enhancing LLM training via spectral clipping, 2026, arXiv 2603.14315, of gradients and of
      updates. They approximate a soft clip, `response=lambda s, c: s * c / jnp.hypot(s, c)`; the clip by products here
      is the hard one. Its factor U V^T comes from quintics as in Amsel, Persson, Musco, Gower, The Polar Express, 2025,
      arXiv 2505.16932, with other coefficients.
    """
    if method is not None:
        checks.choice(method, "method", ("svd",))
    norm = functools.partial(spectral_norm, axis=_matrices, axis_name=axis_name)

    def change(leaf, norm, limit):
        x = jnp.asarray(leaf)
        norm, limit = (jnp.broadcast_to(a, (*x.shape[:-2], 1, 1)) for a in (norm, jnp.maximum(limit, 0.0)))
        if response in (None, shrink):
            if method is None:
                return bounded(x, norm, limit)
            limit = jnp.where(norm <= limit, jnp.inf, limit)  # leaves the matrix as it is
        return responded(x, norm, limit, response or shrink)

    return norm_clip(norm, max_value, response, "max_value", change)


def _matrices(path: tuple, leaf: jax.Array) -> tuple[int, int] | None:
    del path
    return (-2, -1) if jnp.ndim(leaf) >= 2 else None

"""What becomes of a norm: plain functions `(norm, threshold) -> norm after` on finite arrays, > 0 and >= 0.

The engine asks them only where 0 < norm < inf and threshold < inf: 0 stays 0, and inf leaves a block alone.
"""

import jax
import jax.numpy as jnp

__all__ = ["shrink", "normalize", "smooth", "tanh"]


def shrink(norm: jax.Array, threshold: jax.Array) -> jax.Array:
    """Bounds the norm by the threshold: the usual clipping.

    norm after = min(norm, threshold)

    Small norms pass untouched, large ones come out at the threshold; the derivative jumps at norm = threshold.

    Args:
      norm: f32 or f64, any shape, finite and > 0.
      threshold: the same shape or a scalar, finite and >= 0.

    Returns:
      The norm after, the shape of `norm`.

    Example:
      >>> print(responses.shrink(jnp.array([4.0, 0.5]), 1.0))
      [1.  0.5]

    References:
      Pascanu, Mikolov, Bengio, On the difficulty of training recurrent neural networks, 2012, arXiv 1211.5063.
    """
    return jnp.minimum(norm, threshold)


def normalize(norm: jax.Array, threshold: jax.Array) -> jax.Array:
    """Moves every norm to the threshold, up as well as down: normalized gradient descent.

    norm after = threshold

    Args:
      norm: f32 or f64, any shape, finite and > 0.
      threshold: the same shape or a scalar, finite and >= 0.

    Returns:
      The norm after, the shape of `norm`.

    Example:
      >>> print(responses.normalize(jnp.array([4.0, 0.5]), 1.0))
      [1. 1.]

    References:
      Zhang, He, Sra, Jadbabaie, Why gradient clipping accelerates training, 2019, arXiv 1905.11881: clipped and
      normalized gradient descent agree up to a factor 2.
    """
    return jnp.broadcast_to(threshold, jnp.shape(norm))


def smooth(norm: jax.Array, threshold: jax.Array) -> jax.Array:
    """Bounds the norm by the threshold without a kink.

    norm after = norm · threshold / (norm + threshold)

    Small norms pass nearly untouched, a norm at the threshold is halved, large ones approach the threshold.

    Args:
      norm: f32 or f64, any shape, finite and > 0.
      threshold: the same shape or a scalar, finite and >= 0.

    Returns:
      The norm after, the shape of `norm`, below the threshold.

    Example:
      >>> print(responses.smooth(jnp.array([3.0, 1.0]), 1.0))
      [0.75 0.5 ]

    References:
      Zhang, He, Sra, Jadbabaie, Why gradient clipping accelerates training, 2019, arXiv 1905.11881.
    """
    low, high = jnp.minimum(norm, threshold), jnp.maximum(norm, threshold)
    return low / (1 + low / high)


def tanh(norm: jax.Array, threshold: jax.Array) -> jax.Array:
    """Bounds the norm by the threshold without a kink, closer to `shrink` than `smooth` is.

    norm after = threshold · tanh(norm / threshold)

    Small norms pass untouched to third order, a norm at the threshold is scaled by 0.76, large ones approach the
    threshold.

    Args:
      norm: f32 or f64, any shape, finite and > 0.
      threshold: the same shape or a scalar, finite and >= 0.

    Returns:
      The norm after, the shape of `norm`.

    Example:
      >>> print(f"{responses.tanh(1.0, 2.0):.4f} {responses.tanh(8.0, 2.0):.4f}")
      0.9242 1.9987

    References:
      A smooth stand-in for `shrink`: both are min(norm, threshold) far from norm = threshold.
    """
    # Below 1e-4 tanh is the identity in f32 and nearly in f64. Above 100 it is 1, and the quotient may overflow.
    near, far = norm < 1e-4 * threshold, norm > 100 * threshold
    between = jnp.where(near | far, 1.0, norm) / jnp.where(near | far, 1.0, threshold)
    return jnp.where(near, norm, jnp.where(far, threshold, threshold * jnp.tanh(between)))

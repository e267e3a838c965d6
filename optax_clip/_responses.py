"""What to do about a norm: plain functions `(norm, threshold) -> scale` on finite arrays > 0 and >= 0."""

import jax
import jax.numpy as jnp

from optax_clip._reductions import quotient


def shrink(norm: jax.Array, threshold: jax.Array) -> jax.Array:
    """Scales down to the threshold: the usual clipping.

    scale = min(1, threshold / norm)

    Small norms pass untouched, large ones come out at the threshold; the derivative jumps at norm = threshold.

    Args:
      norm: f32 or f64, any shape, finite and > 0.
      threshold: the same shape or a scalar, finite and >= 0.

    Returns:
      The factor for the block, in [0, 1]: exactly 1 where norm <= threshold.

    Example:
      >>> print(shrink(jnp.float32(4.0), jnp.float32(1.0)), shrink(jnp.float32(0.5), jnp.float32(1.0)))
      0.25 1.0

    References:
      Pascanu, Mikolov, Bengio, On the difficulty of training recurrent neural networks, 2012, arXiv 1211.5063.
    """
    above = norm > threshold
    # Both selects are needed: a quotient that overflows in the branch not taken has the derivative NaN.
    return jnp.where(above, quotient(threshold, jnp.where(above, norm, 1.0)), 1.0)


def normalize(norm: jax.Array, threshold: jax.Array) -> jax.Array:
    """Scales every block to the threshold, up as well as down: normalized gradient descent.

    scale = threshold / norm

    Small, medium and large norms all come out at the threshold.

    Args:
      norm: f32 or f64, any shape, finite and > 0.
      threshold: the same shape or a scalar, finite and >= 0.

    Returns:
      The factor for the block, >= 0: exactly 1 where norm = threshold.

    Example:
      >>> print(normalize(jnp.float32(4.0), jnp.float32(1.0)), normalize(jnp.float32(0.5), jnp.float32(1.0)))
      0.25 2.0

    References:
      Zhang, He, Sra, Jadbabaie, Why gradient clipping accelerates training, 2019, arXiv 1905.11881: clipped and
      normalized gradient descent agree up to a factor 2.
    """
    # Not every accelerator divides a number by itself to exactly 1; the inner select keeps its derivative finite.
    equal = norm == threshold
    return jnp.where(equal, 1.0, quotient(threshold, jnp.where(equal, 1.0, norm)))


def smooth(norm: jax.Array, threshold: jax.Array) -> jax.Array:
    """Bounds the norm by the threshold without a kink.

    scale = threshold / (threshold + norm)

    Small norms pass nearly untouched, a norm at the threshold is halved, large ones approach the threshold.

    Args:
      norm: f32 or f64, any shape, finite and > 0.
      threshold: the same shape or a scalar, finite and >= 0.

    Returns:
      The factor for the block, in [0, 1).

    Example:
      >>> print(smooth(jnp.float32(3.0), jnp.float32(1.0)), smooth(jnp.float32(1.0), jnp.float32(1.0)))
      0.25 0.5

    References:
      Zhang, He, Sra, Jadbabaie, Why gradient clipping accelerates training, 2019, arXiv 1905.11881.
    """
    # Halves, so that the sum of two large numbers stays finite.
    half = threshold * 0.5
    return quotient(half, half + norm * 0.5)


def tanh(norm: jax.Array, threshold: jax.Array) -> jax.Array:
    """Bounds the norm by the threshold without a kink, closer to `shrink` than `smooth` is.

    scale = (threshold / norm) tanh(norm / threshold)

    Small norms pass untouched to third order, a norm at the threshold is scaled by 0.76, large ones approach the
    threshold.

    Args:
      norm: f32 or f64, any shape, finite and > 0.
      threshold: the same shape or a scalar, finite and >= 0.

    Returns:
      The factor for the block, in [0, 1].

    Example:
      >>> print(f"{tanh(jnp.float32(1.0), jnp.float32(1.0)):.4f} {tanh(jnp.float32(8.0), jnp.float32(2.0)):.4f}")
      0.7616 0.2498

    References:
      A smooth stand-in for `shrink`: both are min(1, threshold / norm) far from norm = threshold.
    """
    positive = threshold > 0
    ratio = quotient(norm, jnp.where(positive, threshold, 1.0))
    # Below 0.01 the first terms of the series are exact in f32, and 0 / 0 does not arise where the ratio underflows.
    near = ratio < 0.01
    far = jnp.where(near, 1.0, ratio)
    scale = jnp.where(near, 1.0 - jnp.where(near, ratio, 0.0) ** 2 / 3.0, jnp.tanh(far) / far)
    return jnp.where(positive, scale, 0.0)

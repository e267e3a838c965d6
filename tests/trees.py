"""Sample trees of updates, the one tolerance rule of the tests, and where programs can be read."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType

on_a_cpu_that_fuses = pytest.mark.skipif(
    jax.default_backend() != "cpu" or jax.__version_info__ < (0, 10, 2),
    reason="reads programs of XLA's CPU backend, which before jax 0.10.2 writes out the squares of any sum of squares",
)


def mesh(kind=AxisType.Auto, **axes: int) -> jax.sharding.Mesh:
    """A mesh with these axes and their sizes, on virtual CPU devices where the accelerators are too few."""
    count = math.prod(axes.values())
    devices = jax.devices() if jax.device_count() >= count else jax.devices("cpu")
    return jax.make_mesh(tuple(axes.values()), tuple(axes), (kind,) * len(axes), devices=devices[:count])


SHAPES = {"bias": (5,), "conv": (2, 2, 3, 4), "dense": (6, 5), "heads": (4, 2, 3), "scale": ()}


def sample(seed: int = 0, scale: float = 1.0, dtype=jnp.float32, shapes: dict = SHAPES) -> dict:
    """Leaves of one dtype; of rank 0 to 4."""
    random = np.random.default_rng(seed)
    return {name: jnp.asarray(scale * random.normal(size=shape), dtype) for name, shape in shapes.items()}


def mixed(seed: int = 0) -> dict:
    """Leaves of several floating dtypes."""
    dtypes = [jnp.float16, jnp.bfloat16, jnp.float32, jnp.float8_e4m3fn, jnp.float32]
    tree = sample(seed)
    return {name: leaf.astype(dtype) for (name, leaf), dtype in zip(tree.items(), dtypes)}


def odd() -> dict:
    """Every kind of leaf that has no norm, beside one that has."""
    return {
        "weight": jnp.array([3.0, 4.0]),
        "none": None,
        "masked": optax.MaskedNode(),
        "int": jnp.arange(3),
        "python_int": 7,
        "bool": jnp.array([True, False]),
        "python_bool": True,
        "float0": np.zeros((2,), jax.dtypes.float0),
        "key": jax.random.key(0),
        "function": jnp.tanh,
        "empty": {},
    }


def tolerance(dtype) -> float:
    """A few units in the last place of the dtype, at least those of f32, in which norms are taken."""
    return 8 * float(max(jnp.finfo(dtype).eps, jnp.finfo(jnp.float32).eps))


def norm64(tree) -> float:
    """The Euclidean norm of all floating and complex leaves, in float64."""
    leaves = [x for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.inexact)]
    return float(np.sqrt(sum(np.sum(np.abs(np.asarray(x).astype(np.complex128)) ** 2) for x in leaves)))

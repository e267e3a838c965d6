"""What all tests share: a compiled step, three small trees of updates, the one tolerance rule, and meshes."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType


@functools.lru_cache(maxsize=128)
def _compiled(tx):
    return jax.jit(tx.init), jax.jit(optax.with_extra_args_support(tx).update)


def step(tx, updates, state=None, params=None, **extra):
    """New updates and state of one compiled step. It starts from `tx.init` where no state is given.

    A transformation is compiled once for each structure of its arguments, so pass the same object again.
    """
    init, update = _compiled(tx)
    if state is None:
        state = init(updates if params is None else params)
    return update(updates, state, params, **extra)


def small(seed: int = 0, scale: float = 1.0, dtype=jnp.float32) -> dict:
    """A matrix, a vector and a scalar of one dtype, from a normal distribution of this standard deviation."""
    random = np.random.default_rng(seed)
    shapes = {"bias": (3,), "dense": (4, 3), "scale": ()}
    return {name: jnp.asarray(scale * random.normal(size=shape), dtype) for name, shape in shapes.items()}


PARAMS = small(9)
STEPS = [small(1), small(2, 3.0), small(3, 1e-3), small(4)]


def run(tx, samples=STEPS, state=None, params=PARAMS, step=step) -> tuple[list, object]:
    """The updates of each step and the last state, one step after the other."""
    out = []
    for updates in samples:
        updates, state = step(tx, updates, state, params)
        out.append(updates)
    return out, state


def eager(tx, updates, state=None, params=None):
    """A step that is not compiled."""
    return tx.update(updates, tx.init(params) if state is None else state, params)


@functools.partial(jax.jit, static_argnums=0)
def scan(tx, samples):
    """The updates and states of all steps, from stacked samples."""

    def one(state, updates):
        updates, state = tx.update(updates, state)
        return state, (updates, state)

    return jax.lax.scan(one, tx.init(jax.tree.map(lambda x: x[0], samples)), samples)[1]


def mixed(seed: int = 0) -> dict:
    """Leaves of several floating dtypes, of rank 0 to 4, under the keys of `small`, so that prefix trees fit both."""
    random = np.random.default_rng(seed)
    return {
        "bias": jnp.asarray(random.normal(size=5), jnp.float16),
        "dense": (
            jnp.asarray(random.normal(size=(2, 2, 3, 4)), jnp.bfloat16),
            jnp.asarray(random.normal(size=(6, 5)), jnp.float32),
            jnp.asarray(random.normal(size=(4, 2, 3)), jnp.float8_e4m3fn),
        ),
        "scale": jnp.asarray(random.normal(), jnp.float32),
    }


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


def varying(tree, name: str):
    """The tree with the type of what differs over this axis of a mesh. JAX had another name for it before 0.8.2."""
    if hasattr(jax.lax, "pcast"):
        return jax.lax.pcast(tree, name, to="varying")
    return jax.lax.pvary(tree, name)


def mesh(kind=AxisType.Auto, **axes: int) -> jax.sharding.Mesh:
    """A mesh with these axes and their sizes, on virtual CPU devices where the accelerators are too few."""
    count = math.prod(axes.values())
    devices = jax.devices() if jax.device_count() >= count else jax.devices("cpu")
    return jax.make_mesh(tuple(axes.values()), tuple(axes), (kind,) * len(axes), devices=devices[:count])

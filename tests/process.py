"""A small training run on a mesh of four devices: in one process, or as a script in one of two that share the mesh."""

import os
import pathlib
import pickle
import sys
import traceback

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import multihost_utils
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import optax_clip as oc

STEPS, SAVED = 20, 10
SPIKES = [8, 14]  # the statistics that bound the second were saved after the first
SPECS = {"hidden": P(None, "data"), "bias": P(), "out": P()}

optimizer = optax.chain(oc.zclip(warmup_steps=5), optax.adamw(1e-2))


def put(x: np.ndarray, spec: P) -> jax.Array:
    """On the CPU devices of all processes, each of which holds the whole array."""
    mesh = jax.make_mesh((4,), ("data",), (AxisType.Auto,), devices=jax.devices("cpu")[:4])
    return jax.make_array_from_callback(x.shape, NamedSharding(mesh, spec), lambda index: x[index])


def start() -> tuple:
    """The first parameters, of which one is sharded, and the optimizer's state."""
    rng = np.random.default_rng(0)
    shapes = {"hidden": (6, 16), "bias": (16,), "out": (16, 3)}
    params = {name: put(rng.normal(0, 0.3, shape).astype(np.float32), SPECS[name]) for name, shape in shapes.items()}
    return params, optimizer.init(params)


def batches(steps: range) -> list[tuple]:
    """A batch for each step, sharded. The targets of some are far off."""
    rng = np.random.default_rng(1)
    x = rng.normal(size=(STEPS, 32, 6)).astype(np.float32)
    y = np.sin(x @ rng.normal(size=(6, 3)).astype(np.float32))
    y[SPIKES] *= 30
    return [(put(x[i], P("data")), put(y[i], P("data"))) for i in steps]


@jax.jit
def step(params, state, x, y):
    def loss(params):
        return jnp.mean((jnp.tanh(x @ params["hidden"] + params["bias"]) @ params["out"] - y) ** 2)

    updates, state = optimizer.update(jax.grad(loss)(params), state, params)
    return optax.apply_updates(params, updates), state, oc.clip_metrics(state)


def train(params, state, steps: range) -> tuple:
    """Parameters and state after these steps, and the metrics of each."""
    metrics = []
    for x, y in batches(steps):
        params, state, scalars = step(params, state, x, y)
        metrics.append({name: np.asarray(value) for name, value in scalars.items()})
    return (params, state), metrics


def main(address: str, process: str, folder: str):
    from orbax.checkpoint import StandardCheckpointer  # slow to import, and not needed to train

    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    # Not what a cluster says of itself, and bound to the loopback alone.
    jax.distributed.initialize(
        address, 2, int(process), cluster_detection_method="deactivate", coordinator_bind_address=address
    )
    assert (jax.local_device_count(), jax.device_count()) == (2, 4)
    middle, first = train(*start(), range(SAVED))
    # No step has gathered what is sharded.
    assert [shard.data.shape for shard in middle[0]["hidden"].addressable_shards] == [(6, 4), (6, 4)]
    with StandardCheckpointer() as checkpointer:
        checkpointer.save(pathlib.Path(folder) / "checkpoint", middle)
    end, rest = train(*middle, range(SAVED, STEPS))
    report = multihost_utils.process_allgather((middle, end), tiled=True), first + rest
    (pathlib.Path(folder) / f"{process}.pickle").write_bytes(pickle.dumps(report))


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except Exception:
        traceback.print_exc()
        os._exit(1)  # at an ordinary exit jax waits for the other process, which waits for this one

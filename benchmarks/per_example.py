"""Time of `per_example` on gradients of single examples: with the gradient, relative to Optax's function.

A multilayer perceptron, in one process and in random order. A ratio is the median over rounds of the ratio within a
round.

    python benchmarks/per_example.py
"""

import argparse
import random
import statistics
import time

import jax
import jax.numpy as jnp
import optax

import optax_clip


def loss(params: list, x: jax.Array) -> jax.Array:
    for w in params:
        x = jnp.tanh(x @ w)
    return jnp.sum(x**2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--examples", type=int, default=32)
    parser.add_argument("--positions", type=int, nargs="*", default=[], help="of an example: one after another")
    parser.add_argument("--rounds", type=int, default=30)
    arguments = parser.parse_args()
    keys = jax.random.split(jax.random.key(0), arguments.layers + 1)
    shape = arguments.width, arguments.width
    params = [1.5 * jax.random.normal(key, shape) / arguments.width**0.5 for key in keys[1:]]
    batch = jax.random.normal(keys[0], (arguments.examples, *arguments.positions, arguments.width))
    gradients = jax.vmap(jax.grad(loss), (None, 0))
    clip, one = optax_clip.per_example(1.0, reduce="sum"), optax_clip.clip_by_global_norm(1.0)

    def ours(params, x):
        return clip.update(gradients(params, x), None)[0]

    def optaxs(params, x):
        return optax.per_example_global_norm_clip(gradients(params, x), 1.0)[0]

    def of_one(grads):
        return one.update(grads, None)[0]

    def vmapped(params, x):
        return jax.tree.map(lambda x: x.sum(0), jax.vmap(of_one)(gradients(params, x)))

    ways = {"per_example": ours, "optax": optaxs, "vmap of a clip": vmapped}
    for size in (8, 1) if hasattr(optax, "microbatching") else ():
        ways[f"microbatch {size}"] = optax.microbatching.microbatch(ours, 1, size)
        options = {"keep_batch_dim": False, "microbatch_size": size, "transform_fn": of_one}
        ways[f"micro_grad {size}"] = optax.microbatching.micro_grad(loss, **options)
    programs = {name: jax.jit(way).lower(params, batch).compile() for name, way in ways.items()}
    times: dict[str, list[float]] = {name: [] for name in programs}
    for _ in range(arguments.rounds):
        for name in random.sample(list(programs), len(programs)):
            for _ in range(2):  # the first run after another program pays for what that left behind
                start = time.perf_counter()
                jax.block_until_ready(programs[name](params, batch))
                seconds = time.perf_counter() - start
            times[name].append(seconds)
    print(f"jax {jax.__version__}, optax {optax.__version__}, {jax.devices()[0].device_kind}")
    for name, program in programs.items():
        low, middle, high = statistics.quantiles([a / b for a, b in zip(times[name], times["optax"])], n=4)
        seconds, scratch = statistics.median(times[name]), program.memory_analysis().temp_size_in_bytes / 2**20
        print(f"{name:16} {seconds:8.4f} s {middle:6.3f} {low:6.3f}-{high:.3f} {scratch:6.1f} MiB")


if __name__ == "__main__":
    main()

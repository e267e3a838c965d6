"""Seconds of tracing and of compiling an AdamW step over many small leaves, with each clip in front.

Steps are compiled one after the other in one process, in several rounds; the median is printed, and its ratio to the
bare step.

    python benchmarks/compile_time.py --leaves 1000 --rounds 3
"""

import argparse
import statistics
import time

import jax
import optax
import trees
from step_time import OPTIMIZERS


def seconds(optimizer: optax.GradientTransformation, params: dict) -> tuple[float, float]:
    """Of tracing and lowering, and of compiling."""
    jax.clear_caches()

    def step(params, state, grads):
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    state = jax.eval_shape(optimizer.init, params)
    start = time.perf_counter()
    lowered = jax.jit(step, donate_argnums=(0, 1)).lower(params, state, params)
    traced = time.perf_counter()
    lowered.compile()
    return traced - start, time.perf_counter() - traced


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--leaves", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--names", nargs="*", default=list(OPTIMIZERS))
    arguments = parser.parse_args()
    params = trees.structs(trees.small(arguments.leaves))
    names = list(dict.fromkeys(["bare", *arguments.names]))
    seconds(OPTIMIZERS["bare"], params)  # warm-up
    found = {name: [] for name in names}
    for _ in range(arguments.rounds):
        for name in names:
            found[name].append(seconds(OPTIMIZERS[name], params))
    print(f"jax {jax.__version__}, optax {optax.__version__}, {arguments.leaves} leaves")
    print(f"{'':28} {'trace':>7} {'compile':>8} {'both, relative':>15}")
    bare = statistics.median(map(sum, found["bare"]))
    for name in names:
        trace, compile_ = (statistics.median(column) for column in zip(*found[name]))
        print(f"{name:28} {trace:6.2f}s {compile_:7.2f}s {statistics.median(map(sum, found[name])) / bare:15.2f}")


if __name__ == "__main__":
    main()

"""Time of a whole compiled AdamW step with a clip, relative to the bare step.

All steps work on the same parameters and optimizer state, in place, in one process and in random order; a ratio is the
median over rounds of the ratio within a round. Scratch is what the compiled program allocates beside its arguments and
results, as a share of the parameters. Compile time is tracing and compiling, once, after a warm-up.

    python benchmarks/step_time.py --tree gpt --rounds 30
"""

import argparse
import random
import statistics
import time

import jax
import jax.numpy as jnp
import optax
import trees
from optimizers import ADAM, OPTIMIZERS


def is_adam(x) -> bool:
    return isinstance(x, optax.ScaleByAdamState)


def without_adam(state):
    """The state with None for that of Adam, which all steps share."""
    return jax.tree.map(lambda x: None if is_adam(x) else x, state, is_leaf=is_adam)


def with_adam(rest, adam_state):
    return jax.tree.map(lambda x: adam_state if x is None else x, rest, is_leaf=lambda x: x is None)


def adam_of(state):
    (found,) = filter(is_adam, jax.tree.leaves(state, is_leaf=is_adam))
    return found


def compiled(optimizer, params, adam_state, grads):
    """The step as a program that updates its arguments in place, and the seconds that it took to get it."""

    def step(params, adam_state, rest, grads):
        updates, state = optimizer.update(grads, with_adam(rest, adam_state), params)
        return optax.apply_updates(params, updates), adam_of(state), without_adam(state)

    arguments = params, adam_state, without_adam(optimizer.init(params)), grads
    start = time.perf_counter()
    program = jax.jit(step, donate_argnums=(0, 1, 2)).lower(*arguments).compile()
    return program, time.perf_counter() - start


def measure(tree: str, names: list[str], rounds: int, steps: int, dtype: str) -> None:
    shapes = trees.TREES[tree]()
    params, grads = (trees.random(shapes, seed=seed, dtype=dtype) for seed in (0, 1))
    size = sum(x.nbytes for x in jax.tree.leaves(params))
    count = sum(x.size for x in jax.tree.leaves(params))
    print(f"\n{tree}: {len(jax.tree.leaves(params))} leaves, {count / 1e6:.1f} M parameters in {dtype}", flush=True)
    print(f"{'':28} {'step':>6} {'quartiles':>13} {'seconds':>9} {'scratch':>9} {'compile':>8}")
    params = jax.tree.map(jnp.copy, params)
    adam_state = adam_of(jax.jit(ADAM.init)(params))
    compiled(OPTIMIZERS["bare"], params, adam_state, grads)  # warm-up
    programs = {name: compiled(OPTIMIZERS[name], params, adam_state, grads) for name in names}
    rests = {name: without_adam(OPTIMIZERS[name].init(params)) for name in names}
    times: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(rounds):
        for name in random.sample(names, len(names)):
            for _ in range(2):  # the first run after another program pays for what that left behind
                start = time.perf_counter()
                for _ in range(steps):
                    params, adam_state, rests[name] = programs[name][0](params, adam_state, rests[name], grads)
                jax.block_until_ready((params, adam_state, rests[name]))
                seconds = time.perf_counter() - start
            times[name].append(seconds)
    for name in names:
        ratios = [a / b for a, b in zip(times[name], times["bare"])]
        low, middle, high = statistics.quantiles(ratios, n=4)
        program, compiling = programs[name]
        scratch = program.memory_analysis().temp_size_in_bytes / size
        ratio = compiling / programs["bare"][1]
        seconds = statistics.median(times[name]) / steps
        print(f"{name:28} {middle:6.3f} {low:6.3f}-{high:.3f} {seconds:9.5f} {scratch:9.2%} {ratio:8.2f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tree", nargs="*", choices=list(trees.TREES), default=["gpt", "resnet50", "small"])
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--steps", type=int, default=1, help="in a row in one measurement; more where they are short")
    parser.add_argument("--dtype", default="float32", help="of parameters and gradients")
    parser.add_argument(
        "--names", nargs="*", default=list(OPTIMIZERS), help="names from the table; bare is always measured"
    )
    arguments = parser.parse_args()
    print(
        f"jax {jax.__version__}, optax {optax.__version__}, {jax.devices()[0].device_kind}; relative to the bare step"
    )
    names = list(dict.fromkeys(["bare", *arguments.names]))
    for tree in arguments.tree:
        measure(tree, names, arguments.rounds, arguments.steps, arguments.dtype)


if __name__ == "__main__":
    main()

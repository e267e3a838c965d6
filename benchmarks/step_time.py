"""Time of a whole compiled AdamW step with a clip: relative to the bare step, and to Optax's same clip.

All steps work on the same parameters and Adam state, in place, in one process and in random order. A ratio is the
median over rounds of the ratio within a round. Scratch is what the compiled program allocates beside its arguments and
results, as a share of the parameters. Compile time is tracing and compiling, once, relative to the bare step.

    python benchmarks/step_time.py --tree gpt --rounds 30
"""

import argparse
import random
import statistics
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
import trees
from optimizers import ADAM, COMPARED, NAMES, optimizer, with_compared

MAIN = [name for name in NAMES if name in COMPARED]


class Hole(NamedTuple):
    """Stands for the state of Adam, which all steps share."""


def is_adam(x) -> bool:
    return isinstance(x, optax.ScaleByAdamState | Hole)


def with_adam(state, adam_state):
    return jax.tree.map(lambda x: adam_state if is_adam(x) else x, state, is_leaf=is_adam)


def adam_of(state):
    (found,) = filter(is_adam, jax.tree.leaves(state, is_leaf=is_adam))
    return found


def compiled(optimizer, params, adam_state, grads) -> tuple:
    """The step as a program that updates its arguments in place, its state, and the seconds of compiling."""

    def step(params, adam_state, rest, grads):
        updates, state = optimizer.update(grads, with_adam(rest, adam_state), params)
        return optax.apply_updates(params, updates), adam_of(state), with_adam(state, Hole())

    rest = with_adam(optimizer.init(params), Hole())
    start = time.perf_counter()
    program = jax.jit(step, donate_argnums=(0, 1, 2)).lower(params, adam_state, rest, grads).compile()
    return program, jax.tree.map(jnp.copy, rest), time.perf_counter() - start


def quartiles(times: dict, name: str, reference: str) -> list[float]:
    """Of the ratios within a round."""
    return statistics.quantiles([a / b for a, b in zip(times[name], times[reference])], n=4)


def measure(tree: str, names: list[str], rounds: int, steps: int, dtype: str) -> None:
    """Prints a line for each name."""
    shapes = trees.TREES[tree]()
    params, grads = (trees.random(shapes, seed=seed, dtype=dtype) for seed in (0, 1))
    size = sum(x.nbytes for x in jax.tree.leaves(params))
    count = sum(x.size for x in jax.tree.leaves(params))
    print(f"\n{tree}: {len(jax.tree.leaves(params))} leaves, {count / 1e6:.1f} M parameters in {dtype}", flush=True)
    print(f"{'':28} {'step':>6} {'quartiles':>13} {'seconds':>9} {'scratch':>9} {'compile':>8}  compared with")
    adam_state = adam_of(jax.jit(ADAM.init)(params))
    compiled(optimizer("bare", params), params, adam_state, grads)  # warm-up
    programs, rests, compiling = {}, {}, {}
    for name in names:
        made = compiled(optimizer(name, params), params, adam_state, grads)
        programs[name], rests[name], compiling[name] = made
    times: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(rounds):
        for name in random.sample(names, len(names)):
            for _ in range(2):  # the first run after another program pays for what that left behind
                start = time.perf_counter()
                for _ in range(steps):
                    params, adam_state, rests[name] = programs[name](params, adam_state, rests[name], grads)
                jax.block_until_ready((params, adam_state, rests[name]))
                seconds = time.perf_counter() - start
            times[name].append(seconds)
    for name in names:
        low, middle, high = quartiles(times, name, "bare")
        scratch = programs[name].memory_analysis().temp_size_in_bytes / size
        ratio = compiling[name] / compiling["bare"]
        seconds = statistics.median(times[name]) / steps
        line = f"{name:28} {middle:6.3f} {low:6.3f}-{high:.3f} {seconds:9.5f} {scratch:9.2%} {ratio:8.2f}"
        if name in COMPARED:
            line += f"  {quartiles(times, name, COMPARED[name])[1]:.3f} of {COMPARED[name]}"
        print(line, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tree", nargs="*", choices=list(trees.TREES), default=["gpt"])
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--steps", type=int, default=1, help="in a row in one measurement; more where they are short")
    parser.add_argument("--dtype", default="float32", help="of parameters and gradients")
    parser.add_argument("--names", nargs="*", default=MAIN, help=f"of: {', '.join(NAMES)}", metavar="NAME")
    parser.add_argument("--all", action="store_true", help="all names")
    arguments = parser.parse_args()
    device = jax.devices()[0].device_kind
    print(f"jax {jax.__version__}, optax {optax.__version__}, {device}; relative to the bare step")
    names = with_compared(NAMES if arguments.all else arguments.names)
    for tree in arguments.tree:
        measure(tree, names, arguments.rounds, arguments.steps, arguments.dtype)


if __name__ == "__main__":
    main()

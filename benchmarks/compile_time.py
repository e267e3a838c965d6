"""Seconds of tracing and compiling an AdamW step over many small leaves, with each clip in front.

A third of the leaves are vectors, the others matrices. Steps are compiled one after the other in one process, in
several rounds. A ratio, to the bare step and to Optax's same clip, is the median of the ratios within a round.

    python benchmarks/compile_time.py --leaves 400 --rounds 3
"""

import argparse
import statistics
import time

import jax
import optax
import trees
from optimizers import COMPARED, NAMES, optimizer, with_compared

# Of those that differ in nothing but their rule, one.
MAIN = ["clip_by_global_norm", "zclip", "clip_by_leaf_norm", "clip_by_block_rms", "adagc", "leaf norm, a number each"]
MAIN += ["adaptive_grad_clip", "skip_spikes"]


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
    parser.add_argument("--leaves", type=int, default=400)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--names", nargs="*", default=MAIN, help=f"of: {', '.join(NAMES)}", metavar="NAME")
    arguments = parser.parse_args()
    params = trees.structs(trees.small(arguments.leaves))
    names = with_compared(arguments.names)
    seconds(optimizer("bare", params), params)  # warm-up
    found = {name: [] for name in names}
    for _ in range(arguments.rounds):
        for name in names:
            found[name].append(seconds(optimizer(name, params), params))

    def ratio(name: str, reference: str) -> float:
        return statistics.median(sum(a) / sum(b) for a, b in zip(found[name], found[reference]))

    print(f"jax {jax.__version__}, optax {optax.__version__}, {arguments.leaves} leaves")
    print(f"{'':28} {'trace':>7} {'compile':>8} {'to bare':>8}  compared with")
    for name in names:
        trace, compiling = (statistics.median(column) for column in zip(*found[name]))
        line = f"{name:28} {trace:6.2f}s {compiling:7.2f}s {ratio(name, 'bare'):8.2f}"
        if name in COMPARED:
            line += f"  {ratio(name, COMPARED[name]):.2f} of {COMPARED[name]}"
        print(line, flush=True)


if __name__ == "__main__":
    main()

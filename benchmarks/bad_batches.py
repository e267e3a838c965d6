"""Trains the network of the demo on batches some of which are bad: how well does each clip protect it?

Three things go wrong at steps drawn at random, for each seed its own: labels shuffled within the batch, pixels scaled,
and, once in the middle of the run, a pixel that is NaN. Every method sees the same batches. Network, data, optimizer
and learning rate are those of scripts/demo.py, the adaptive clips have their defaults. Prints a table in Markdown.

    python benchmarks/bad_batches.py --steps 1000 --seeds 5 --rate 0.03
"""

import argparse
import itertools
import pathlib
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

import optax_clip
from optax_clip import clip_by_global_norm, skip_spikes, thresholds

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "scripts"))
import demo

GOOD, SHUFFLED, SCALED, NAN = range(4)
FACTOR = 30.0  # of scaled pixels
MEASURE = clip_by_global_norm(None)
LEGEND = """
jax {jax}, optax {optax}. {seeds} seeds, {steps} steps of {batch} images each. In each seed, labels are shuffled
in {shuffled} steps and pixels scaled by {factor:g} in {scaled}, anywhere in the run, the warm-up of adaptive rules
included; step {nan} has a NaN. Adaptive rules have their defaults; "fixed" is `clip_by_global_norm({bound:.3g})`, the
median norm of the first {healthy} steps without a clip and without bad batches. This network explodes without a clip,
bad batches or not, so a method has to do both: bound the steps, and let no bad batch through.

- Test accuracy in %, mean over the seeds (lowest to highest); guessing gives about 10, and so do parameters of NaN.
  - no bad batches: the same training with every batch as it should be, so what the method does to a healthy run.
  - bad batches, NaN skipped: each method inside `skip_spikes(..., None)`, which drops the step with the NaN and does
    nothing else. So methods are compared on shuffled and scaled batches.
  - bad batches, as it is: the method alone. Clips pass a NaN on, by design. Methods with `skip_spikes` in their name
    drop the step themselves: for them both columns are the same run.
- clipped, skipped: share of the good / shuffled / scaled steps in %, over all seeds of "bad batches, NaN skipped", the
  step with the NaN left out. The first number is false alarms; the other two are recall, by what was bad. With
  `adagc()` a step counts as clipped where any leaf was.
- clipped or skipped: share of all these steps in %.
- longest skip: most steps skipped in a row, in any seed; 1 is the step with the NaN. Skipped steps enter no statistics,
  so where the norms rise for good, skipping ends at the `max_consecutive` of `skip_spikes`, 100 steps.

Median gradient norm before clipping, in the run with the fixed clip: {norms}.
"""


class Method(NamedTuple):
    """A way to train."""

    name: str
    clip: optax.GradientTransformation  # before the optimizer
    skip_above: Any = None  # threshold of `skip_spikes` around both; None: no `skip_spikes`


class Run(NamedTuple):
    """What a training did: a row for each seed, a column for each step."""

    accuracy: Any  # on the test images, [seeds]
    loss: Any  # on each batch, [seeds, steps]
    norm: Any  # of the gradient before clipping, [seeds, steps]
    clipped: Any  # [seeds, steps]
    skipped: Any  # [seeds, steps]
    broken: Any  # whether the parameters ended up not finite, [seeds]


class Result(NamedTuple):
    """The runs of a method."""

    method: Method
    clean: Run  # no bad batches
    bad: Run  # the NaN step skipped
    alone: Run  # as it is


def methods(bound):
    """All that are compared; `bound` is that of the fixed clip."""
    fixed = clip_by_global_norm(bound)
    z_score, sigma_window = thresholds.z_score(), thresholds.sigma_window()
    return [
        Method("no clip", MEASURE),
        Method("fixed", fixed),
        Method("`autoclip()`", optax_clip.autoclip()),
        Method("`autoclip(90)`", optax_clip.autoclip(90.0)),
        Method("`zclip()`", optax_clip.zclip()),
        Method("`adagc()`", optax_clip.adagc()),
        Method("`clip_by_sigma()`", optax_clip.clip_by_sigma()),
        Method("`skip_spikes(..., z_score())`", MEASURE, z_score),
        Method("`skip_spikes(..., sigma_window())`", MEASURE, sigma_window),
        Method("`skip_spikes(..., z_score())` and fixed", fixed, z_score),
        Method("`skip_spikes(..., sigma_window())` and fixed", fixed, sigma_window),
    ]


def plan(steps, rate, seed):
    """What is wrong with the batch of each step: i32[steps]. Half of the bad ones are shuffled, and one more is NaN."""
    kinds = np.full(steps, GOOD, np.int32)
    middle = steps // 2
    others = np.delete(np.arange(steps), middle)
    bad = np.random.default_rng(seed).choice(others, round(rate * steps), replace=False)
    kinds[bad] = SCALED
    kinds[bad[: (len(bad) + 1) // 2]] = SHUFFLED
    kinds[middle] = NAN
    return kinds


def batch_of(data, key, number, kind):
    """The batch of the demo for this step, spoiled if its kind is a bad one."""
    images, labels = demo.batch_of(data, key, number)
    shuffled = jax.random.permutation(jax.random.fold_in(jax.random.fold_in(key, number), 1), labels)
    images = images * jnp.where(kind == SCALED, FACTOR, 1.0)
    images = images.at[0, 0].set(jnp.where(kind == NAN, jnp.nan, images[0, 0]))
    return images, jnp.where(kind == SHUFFLED, shuffled, labels)


def trainer(method, data, skip_nan):
    """A compiled function from the kinds of the batches, [seeds, steps], to a `Run`."""
    optimizer = optax.chain(method.clip, demo.SGD)
    skips = skip_nan or method.skip_above is not None
    if skips:
        optimizer = skip_spikes(optimizer, method.skip_above)

    def step(carry, number_and_kind):
        key, params, state = carry
        loss, grads = jax.value_and_grad(demo.loss_of)(params, *batch_of(data, key, *number_and_kind))
        updates, state = optimizer.update(grads, state, params)
        metrics = optax_clip.clip_metrics(state)
        skipped = metrics["skip/consecutive"] > 0 if skips else jnp.array(False)
        # In a skipped step the clip keeps the state of an earlier one.
        clipped = ~skipped & (metrics["clip/clipped"] > 0)
        seen = loss, optax_clip.global_norm(grads), clipped, skipped
        return (key, optax.apply_updates(params, updates), state), seen

    @jax.jit
    @jax.vmap
    def train(seed, kinds):
        carry = demo.first_carry(optimizer, seed)
        (_, params, _), seen = jax.lax.scan(step, carry, (jnp.arange(len(kinds)), kinds))
        return params, seen

    def run(kinds):
        params, seen = jax.device_get(train(jnp.arange(len(kinds)), kinds))
        finite = [np.isfinite(leaf).reshape(len(kinds), -1).all(axis=1) for leaf in jax.tree.leaves(params)]
        return Run(np.asarray(demo.accuracy_of(params, data)), *seen, ~np.all(finite, axis=0))

    return run


def results_of(method, data, kinds):
    """The runs of a method. One with `skip_spikes` skips the NaN step anyway."""
    run = trainer(method, data, skip_nan=True)
    clean, bad = run(np.full_like(kinds, GOOD)), run(kinds)
    alone = bad if method.skip_above is not None else trainer(method, data, skip_nan=False)(kinds)
    return Result(method, clean, bad, alone)


def compare(data, kinds):
    """The results of all methods, and the bound of the fixed clip."""
    plain = results_of(Method("no clip", MEASURE), data, kinds)
    bound = float(np.median(plain.clean.norm[:, : demo.HEALTHY]))
    _, *others = methods(bound)
    with ThreadPoolExecutor(2) as pool:  # one training keeps one core busy
        runs = pool.map(lambda method: results_of(method, data, kinds), others)
        return [plain, *tqdm(runs, total=len(others), unit="method")], bound


def table(results, kinds):
    """A row for each method."""
    header = ["method", "no bad batches", "bad batches, NaN skipped", "bad batches, as it is"]
    header += ["clipped", "skipped", "clipped or skipped", "longest skip"]
    rows = [header, ["---"] * len(header)]
    for method, clean, bad, alone in results:
        shares = [by_kind(100 * hit, kinds) if hit[kinds != NAN].any() else "-" for hit in (bad.clipped, bad.skipped)]
        either = (bad.clipped | bad.skipped)[kinds != NAN].mean()
        longest = max(len(list(row)) for skips in bad.skipped for skip, row in itertools.groupby(skips) if skip)
        rows.append([method.name, *map(accuracy, (clean, bad, alone)), *shares, f"{100 * either:.1f}", str(longest)])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def accuracy(run):
    """Mean, lowest and highest of the seeds in percent, and how many ended as NaN."""
    percent = 100 * run.accuracy
    broken = f", {run.broken.sum()} of {len(percent)} NaN" if run.broken.any() else ""
    return f"{percent.mean():.1f} ({percent.min():.1f} to {percent.max():.1f}){broken}"


def by_kind(values, kinds):
    """The means over good, shuffled and scaled steps."""
    means = [values[kinds == kind].mean() if (kinds == kind).any() else np.nan for kind in (GOOD, SHUFFLED, SCALED)]
    return " / ".join(f"{mean:.1f}" for mean in means)


def legend(results, kinds, bound):
    """What the columns mean."""
    fixed = next(result.bad for result in results if result.method.name == "fixed")
    norms = [
        f"{name} {np.median(fixed.norm[kinds == kind]):.3g}"
        for name, kind in (("good", GOOD), ("shuffled", SHUFFLED), ("scaled", SCALED))
        if (kinds == kind).any()
    ]
    return LEGEND.format(
        jax=jax.__version__,
        optax=optax.__version__,
        seeds=len(kinds),
        steps=kinds.shape[1],
        batch=demo.BATCH,
        shuffled=(kinds[0] == SHUFFLED).sum(),
        scaled=(kinds[0] == SCALED).sum(),
        factor=FACTOR,
        nan=kinds[0].tolist().index(NAN),
        bound=bound,
        healthy=demo.HEALTHY,
        norms=", ".join(norms),
    )


def main():
    """Reads the options, trains with every method, prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1000, help="training steps of each run (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=5, help="how many seeds (default: %(default)s)")
    parser.add_argument("--rate", type=float, default=0.03, help="share of bad steps, 0 to 1 (default: %(default)s)")
    options = parser.parse_args()
    kinds = np.stack([plan(options.steps, options.rate, seed) for seed in range(options.seeds)])
    results, bound = compare(demo.digits(), kinds)
    print(table(results, kinds))
    print(legend(results, kinds, bound))


if __name__ == "__main__":
    main()

"""Trains a recurrent network whose gradients explode: without clipping, and with four ways to clip.

The data are real: the 1797 handwritten digits of scikit-learn, 8x8 pixels each. A plain tanh network reads them one
pixel at a time, so gradients go back through 64 steps of the same weights. Prints a table and draws a figure.
"""

import argparse
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from tqdm import tqdm

import optax_clip

matplotlib.use("Agg")
from matplotlib import pyplot as plt

HIDDEN, BATCH, CHUNK, HEALTHY = 64, 64, 50, 50
SEEDS = (0, 1, 2)
SGD = optax.sgd(0.02, momentum=0.9)
# Colors of Okabe and Ito, which color-blind readers can tell apart, and lines that differ in print.
LOOKS = [("black", "-"), ("#E69F00", "--"), ("#0072B2", "-"), ("#009E73", "-."), ("#CC79A7", ":")]
LEGEND = """

Test accuracy: mean of {seeds} seeds, lowest to highest. Largest norm: of the gradient before clipping.
Clip rate: share of what has a norm of its own (the gradient, a leaf, a unit) above the bound, mean over steps; for
"value" the share of steps with an entry above. Step time: what the clip adds to that without it, both run in turn."""


class Method(NamedTuple):
    """A way to train."""

    name: str
    clip: optax.GradientTransformation
    bound: float | None  # None: measures only
    meaning: str  # what the bound is for


class Run(NamedTuple):
    """What a training did: a row for each seed, a column for each step."""

    accuracy: Any  # on the test images, [seeds]
    loss: Any  # on each batch, [seeds, steps]
    norm: Any  # of the whole gradient before clipping, [seeds, steps]
    clip_rate: Any  # [seeds]


def digits():
    """Images as sequences of 64 pixels between 0 and 1, and their labels: three quarters to train, the rest to test."""
    images, labels = load_digits(return_X_y=True)
    parts = train_test_split(np.float32(images / 16), labels, test_size=0.25, random_state=0, stratify=labels)
    train_images, test_images, train_labels, test_labels = map(jnp.asarray, parts)
    return {"train": (train_images, train_labels), "test": (test_images, test_labels)}


def first_params(key):
    """Orthogonal recurrent weights, which keep the size of a signal; Gaussian ones elsewhere; biases of zero."""
    into, recurrent, out = jax.random.split(key, 3)
    return {
        "in": jax.random.normal(into, (1, HIDDEN)),
        "recurrent": jax.random.orthogonal(recurrent, HIDDEN),
        "bias": jnp.zeros(HIDDEN),
        "out": jax.random.normal(out, (HIDDEN, 10)) / HIDDEN**0.5,
        "out_bias": jnp.zeros(10),
    }


def logits(params, images):
    """Reads the pixels one after the other, then classifies by the last hidden state."""

    def read(hidden, pixel):
        return jnp.tanh(pixel[:, None] @ params["in"] + hidden @ params["recurrent"] + params["bias"]), None

    hidden, _ = jax.lax.scan(read, jnp.zeros((len(images), HIDDEN)), images.T)
    return hidden @ params["out"] + params["out_bias"]


def loss_of(params, images, labels):
    """The mean cross-entropy."""
    return optax.softmax_cross_entropy_with_integer_labels(logits(params, images), labels).mean()


@jax.jit
def accuracy_of(params, data):
    """Share of the test images classified right, for each seed of the parameters."""
    images, labels = data["test"]
    return jax.vmap(lambda params: (logits(params, images).argmax(axis=1) == labels).mean())(params)


def first_carry(optimizer, seed):
    """What training with this seed starts from: key, parameters, optimizer state."""
    key, params_key = jax.random.split(jax.random.key(seed))
    params = first_params(params_key)
    return key, params, optimizer.init(params)


def batch_of(data, key, number):
    """The images and labels of a step. They depend on the seed and the number of the step, not on the method."""
    images, labels = data["train"]
    chosen = jax.random.randint(jax.random.fold_in(key, number), (BATCH,), 0, len(images))
    return images[chosen], labels[chosen]


def training_step(optimizer, data, observe):
    """A step for `jax.lax.scan`."""

    def step(carry, number):
        key, params, state = carry
        loss, grads = jax.value_and_grad(loss_of)(params, *batch_of(data, key, number))
        updates, state = optimizer.update(grads, state, params)
        return (key, optax.apply_updates(params, updates), state), observe(loss, grads, state)

    return step


def train(method, data, steps, progress):
    """Trains from all seeds side by side. The steps are rounded up to whole chunks, after which the bar moves."""
    by_entry = method.name == "value"
    # A clip of entries measures nothing, so one that only measures goes before it.
    measure = [optax_clip.clip_by_global_norm(None)] if by_entry else []
    optimizer = optax.chain(*measure, method.clip, SGD)

    def observe(loss, grads, state):
        metrics = optax_clip.clip_metrics(state)
        largest = optax_clip.global_norm(grads, ord=float("inf"))
        return loss, metrics["clip/norm"], largest > method.bound if by_entry else metrics["clip/clip_rate"]

    step = training_step(optimizer, data, observe)
    run_chunk = jax.jit(jax.vmap(lambda carry, numbers: jax.lax.scan(step, carry, numbers), in_axes=(0, None)))
    carry = jax.vmap(lambda seed: first_carry(optimizer, seed))(jnp.array(SEEDS))
    seen = []
    progress.set_description(method.name)
    for start in range(0, steps, CHUNK):
        carry, chunk = run_chunk(carry, start + jnp.arange(CHUNK))
        seen.append(jax.device_get(chunk))
        progress.update(CHUNK)
    loss, norm, rate = (np.concatenate(column, axis=1) for column in zip(*seen))
    # The rate is a running mean over steps already.
    return Run(np.asarray(accuracy_of(carry[1], data)), loss, norm, rate.mean(axis=1) if by_entry else rate[:, -1])


def clips(budget):
    """The four clips. One rule sets all bounds: a gradient at its bound throughout has the norm `budget`."""
    params = jax.tree.leaves(first_params(jax.random.key(0)))
    entry = budget / sum(leaf.size for leaf in params) ** 0.5
    leaf = budget / len(params) ** 0.5
    share = budget / float(optax_clip.global_norm(params))
    return [
        Method("value", optax_clip.clip(entry), entry, "for an entry"),
        Method("global norm", optax_clip.clip_by_global_norm(budget), budget, "for the gradient"),
        Method("leaf norm", optax_clip.clip_by_leaf_norm(leaf), leaf, "for a leaf"),
        Method("AGC", optax_clip.adaptive_grad_clip(share), share, "of a unit's weights"),
    ]


def compare(data, steps):
    """Trains without a clip, takes the budget of the clips from the first steps of that, and trains with each clip."""
    with tqdm(total=len(LOOKS) * CHUNK * -(-steps // CHUNK), unit="step") as progress:
        plain = Method("no clip", optax_clip.clip_by_global_norm(None), None, "")
        runs = [train(plain, data, steps, progress)]
        # Before anything explodes the norms are healthy: their median is what a usual step needs.
        methods = clips(float(np.median(runs[0].norm[:, :HEALTHY])))
        runs += [train(method, data, steps, progress) for method in methods]
    return [plain, *methods], runs


def costs(methods, data, steps=10, rounds=100):
    """Percent that each clip adds to the time of a step without one, and how many percent are noise.

    In each round all programs run once, in random order, so that a busy moment hits all alike. The median over rounds
    counts. There are two copies of the step without a clip: their difference is noise. No clip can save time, so what
    one seems to save is noise as well: compiled programs differ in more than what they compute.
    """
    programs = []
    for optimizer in [SGD, SGD, *(optax.chain(method.clip, SGD) for method in methods)]:
        step = training_step(optimizer, data, lambda *_: None)
        program = jax.jit(lambda carry, step=step: jax.lax.scan(step, carry, jnp.arange(steps))[0])
        programs.append((program, first_carry(optimizer, SEEDS[0])))
        jax.block_until_ready(program(programs[-1][1]))  # compiles
    seconds = np.empty((rounds, len(programs)))
    order = np.random.default_rng(0)
    for row in seconds:
        for i in order.permutation(len(programs)):
            program, carry = programs[i]
            start = time.perf_counter()
            jax.block_until_ready(program(carry))
            row[i] = time.perf_counter() - start
    percent = 100 * (seconds / seconds[:, :2].mean(axis=1, keepdims=True) - 1)
    median = np.median(percent, axis=0)
    interval = 1.57 * np.subtract(*np.percentile(percent, [75, 25], axis=0)) / rounds**0.5  # half of 95% for a median
    return median[2:], np.maximum(interval[2:], max(np.ptp(median[:2]) + interval[0], -median[2:].min()))


def table(methods, runs, cost, noise):
    """A line for each method, and what the columns mean."""
    row = "{:12} {:28} {:22} {:>12} {:>12}  {}".format
    lines = [row("method", "bound", "test accuracy %", "largest norm", "clip rate %", "step time")]
    for method, run, percent, unsure in zip(methods, runs, cost, noise):
        accuracy = 100 * run.accuracy
        shown = f"{accuracy.mean():.1f} ({accuracy.min():.1f} to {accuracy.max():.1f})"
        bound, rate = "none, measures only", "-"
        if method.bound is not None:
            bound, rate = f"{method.bound:.3g} {method.meaning}", f"{100 * run.clip_rate.mean():.0f}"
        slower = f"{percent:+.1f}%" + (f", within the noise of {unsure:.1f}%" if percent <= unsure else "")
        lines.append(row(method.name, bound, shown, f"{run.norm.max():.4g}", rate, slower))
    return "\n".join(lines) + LEGEND.format(seeds=len(SEEDS))


def draw(methods, runs, path):
    """Loss and gradient norm over the steps. A line ends where its values are no longer finite, with a cross."""
    figure, (top, bottom) = plt.subplots(2, sharex=True, figsize=(9, 7), layout="constrained")
    steps = runs[0].loss.shape[1]
    width = max(1, steps // 50)
    starts = np.arange(0, steps, width)
    for method, run, (color, line) in zip(methods, runs, LOOKS):
        for axes, values, reduce in ((top, run.loss, np.mean), (bottom, run.norm, np.max)):
            x = starts + width / 2
            y = np.array([reduce(values[:, start : start + width]) for start in starts])
            ends = len(y) if np.isfinite(y).all() else int(np.isfinite(y).argmin())
            axes.plot(x[:ends], y[:ends], line, color=color, linewidth=1.8, label=method.name)
            if 0 < ends < len(y):
                axes.plot(x[ends - 1], y[ends - 1], "x", color=color, markersize=11, markeredgewidth=3)
                axes.annotate("not finite from here", (x[ends - 1], y[ends - 1]), (9, 0), textcoords="offset points")
    # By the rule of `clips`, all bounds let the same norm through (AGC: while the weights are as at first).
    budget = next(method.bound for method in methods if method.name == "global norm")
    listed = ", ".join(f"{method.bound:.3g} {method.meaning}" for method in methods if method.bound is not None)
    bottom.axhline(budget, color="0.35", linestyle="--", linewidth=1)
    where = {"transform": bottom.get_yaxis_transform(), "ha": "right", "va": "top", "color": "0.35", "fontsize": 9}
    bottom.text(0.99, 0.88 * budget, f"bounds: {listed}", **where)
    bottom.set_ylim(bottom=0.5 * budget)
    of = f"of {len(SEEDS)} seeds and {width} steps"
    top.set(ylabel=f"loss, mean\n{of}")
    bottom.set(yscale="log", xlabel="step", ylabel=f"gradient norm before clipping, largest\n{of}")
    figure.legend(*top.get_legend_handles_labels(), loc="outside upper center", ncols=len(methods), frameon=False)
    for axes in (top, bottom):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main():
    """Reads the options, trains, measures, prints the table and writes the figure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=1000, help="training steps of each method (default: %(default)s)")
    parser.add_argument("--out", default="demo.png", help="where the figure goes (default: %(default)s)")
    options = parser.parse_args()
    data = digits()
    methods, runs = compare(data, options.steps)
    print(table(methods, runs, *costs(methods, data)))
    draw(methods, runs, options.out)
    print(f"\nFigure: {options.out}")


if __name__ == "__main__":
    main()

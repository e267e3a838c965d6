"""Each rule as its source states it, in plain float64 NumPy: what the clips are compared with.

Trees are flat dicts of arrays. `c` is a threshold > 0, `n` a norm, `p` the order of a norm.
"""

import copy

import numpy as np


def wide(x):
    """The array with 64 bits for each real number."""
    x = np.asarray(x)
    return x.astype(np.complex128 if x.dtype.kind == "c" else np.float64)


def flat(tree):
    """All entries of a tree as one vector."""
    return np.concatenate([np.ravel(wide(x)) for x in tree.values()])


def p_norm(x, p=2, axes=None):
    """(Σ |x|^p)^(1/p), or the largest |x|: of all entries, or along `axes`, which are kept with size 1."""
    x, keep = np.abs(wide(x)), axes is not None
    if p == np.inf:
        return np.max(x, axis=axes, keepdims=keep, initial=0.0)
    return np.sum(x**p, axis=axes, keepdims=keep) ** (1 / p)


# Responses: the norm after, of a block with norm n


def shrink(n, c):
    return np.minimum(n, c)


def normalize(n, c):
    return c + 0.0 * n


def smooth(n, c):
    return n * c / (n + c)


def tanh(n, c):
    return c * np.tanh(n / c)


def scaled(x, n, c, response=shrink):
    """g · response(n, c) / n. Zero stays zero."""
    some = np.where(n == 0, 1.0, n)
    return wide(x) * np.where(n == 0, 1.0, response(some, c) / some)


# Fixed clips


def value(grads, low, high):
    """min(max(g, low), high), entry by entry."""
    return {name: np.minimum(np.maximum(wide(g), low), high) for name, g in grads.items()}


def magnitude(grads, low, high):
    """sign(g) · min(max(|g|, low), high), entry by entry. Zero stays zero."""
    return {name: np.sign(wide(g)) * np.clip(np.abs(wide(g)), low, high) for name, g in grads.items()}


def global_norm(grads, c, p=2, response=shrink):
    """g · min(1, c/n), n over all entries of all leaves."""
    n = p_norm(flat(grads), p)
    return {name: scaled(g, n, c, response) for name, g in grads.items()}


def leaf_norm(grads, c, p=2, response=shrink):
    """g · min(1, c/n), n over the entries of each leaf."""
    return {name: scaled(g, p_norm(g, p), c, response) for name, g in grads.items()}


def axes_by_rank(shape):
    """A unit is the whole leaf where it has rank <= 1, also after squeeze; else its axes go by rank."""
    if len([size for size in shape if size != 1]) <= 1:
        return tuple(range(len(shape)))
    return {2: (0,), 3: (0,), 4: (0, 1, 2), 5: (0, 1, 2, 3)}[len(shape)]


def unit_norm(grads, c, p=2, axes=axes_by_rank, response=shrink):
    """g · min(1, c/n), n over each unit. `axes` maps the shape of a leaf to the axes of its units."""
    return {name: scaled(g, p_norm(g, p, axes(np.shape(g))), c, response) for name, g in grads.items()}


def rms(x, axes=None):
    """sqrt(mean of |x|²), of all entries or along `axes`."""
    return np.sqrt(np.mean(np.abs(wide(x)) ** 2, axis=axes, keepdims=axes is not None))


def block_rms(grads, c, axes=lambda shape: None):
    """g / max(1, rms(g)/c), leaf by leaf or unit by unit."""
    return {name: wide(g) / np.maximum(1.0, rms(g, axes(np.shape(g))) / c) for name, g in grads.items()}


def group_norm(grads, cs, labels, p=2):
    """g · min(1, c/n), n over all leaves with the same label, c the bound of the label. Without a label: no change."""
    groups = {label: {name: g for name, g in grads.items() if labels[name] == label} for label in cs}
    clipped = [global_norm(group, cs[label], p) for label, group in groups.items() if group]
    return {name: next((tree[name] for tree in clipped if name in tree), wide(g)) for name, g in grads.items()}


def singular_values(grads, c, response=shrink):
    """U response(S, c) V^T of the last two axes. Vectors stay."""
    out = {}
    for name, g in grads.items():
        out[name] = wide(g)
        if np.ndim(g) >= 2:
            u, s, vh = np.linalg.svd(out[name], full_matrices=False)
            out[name] = (u * np.where(s == 0, 0.0, response(np.where(s == 0, 1.0, s), c))[..., None, :]) @ vh
    return out


def norm_range(grads, low, high):
    """n > high: scaled to high; 0 < n < low: scaled up to low. Zero stays zero."""
    n = p_norm(flat(grads))
    return {name: wide(g) if n == 0 else wide(g) / n * min(max(n, low), high) for name, g in grads.items()}


def adaptive(grads, weights, clipping, eps=1e-3, axes=axes_by_rank):
    """Unit i: where n_i > l · max(norm w_i, eps), g_i · l · max(norm w_i, eps) / max(n_i, 1e-6)."""
    out = {}
    for name, g in grads.items():
        n, w = p_norm(g, 2, axes(np.shape(g))), p_norm(weights[name], 2, axes(np.shape(g)))
        most = clipping * np.maximum(w, eps)
        out[name] = wide(g) * np.where(n > most, most / np.maximum(n, 1e-6), 1.0)
    return out


def weight_norm(weights, updates, c, p=2, axes=axes_by_rank):
    """The weights after the step, each unit scaled so that its norm is at most c."""
    return unit_norm({name: wide(w) + wide(updates[name]) for name, w in weights.items()}, c, p, axes)


def per_example(grads, c, response=shrink):
    """Mean over the examples, the first axis, of g_i · response(n_i, c) / n_i. Examples with NaN or inf are zeros."""
    count = len(next(iter(grads.values())))
    each = [{name: wide(g)[i] for name, g in grads.items()} for i in range(count)]
    good = [global_norm(example, c, response=response) for example in each if np.isfinite(flat(example)).all()]
    return {name: sum(example[name] for example in good) / count for name in grads}


class ErrorFeedback:
    """u = clip(g + d), then d = g + d - u, entry by entry, for any clip of a tree."""

    def __init__(self, clip):
        self.clip, self.carried = clip, None

    def __call__(self, grads):
        carried = self.carried or dict.fromkeys(grads, 0.0)
        wanted = {name: wide(g) + carried[name] for name, g in grads.items()}
        updates = self.clip(wanted)
        self.carried = {name: wanted[name] - updates[name] for name in grads}
        return updates


# Rules with a history: of one block, one norm at a time


class Autoclip:
    """The norm enters the history, then the threshold is a percentile of the last `window` norms."""

    def __init__(self, percentile=10.0, window=1024):
        self.percentile, self.window, self.norms = percentile, window, []

    def __call__(self, n):
        if not np.isfinite(n):
            return np.nan
        self.norms = [*self.norms, n][-self.window :]
        return np.percentile(self.norms, self.percentile)


class Zclip:
    """Spikes by their z score, against exponential averages that start from the mean and variance of warm-up.

    Two things the paper leaves open: at least one norm is collected, and while all are 0 warm-up goes on. One thing
    differs: the authors add 1e-6 to the deviation, here it is 1e-6 of the mean.
    """

    floor = 1e-6

    def __init__(self, z_max=2.5, decay=0.97, warmup_steps=25, spike="rescale", factor=1.0):
        self.z_max, self.decay, self.warmup, self.spike, self.factor = z_max, decay, max(warmup_steps, 1), spike, factor
        self.collected, self.mean, self.variance = [], None, None

    def __call__(self, n):
        if not np.isfinite(n):
            return np.nan
        if self.mean is None:
            self.collected.append(n)
            if len(self.collected) >= self.warmup and any(self.collected):
                self.mean, self.variance = np.mean(self.collected), np.var(self.collected)
            return np.inf
        deviation = np.sqrt(self.variance)
        least = deviation + self.floor * abs(self.mean)
        z = (n - self.mean) / least
        limit = self.mean + self.z_max * deviation
        if self.spike == "limit":
            c = limit
        elif z <= self.z_max:
            c = self.mean + self.z_max * least
        elif self.spike == "rescale":
            c = (self.mean + self.z_max * deviation * self.z_max / z) * self.factor
        else:
            c = self.mean
        x = min(n, c)
        self.mean = self.decay * self.mean + (1 - self.decay) * x
        self.variance = self.decay * self.variance + (1 - self.decay) * (x - self.mean) ** 2
        return c


class ClipBySigma:
    """Mean and deviation of the last `window` norms but this one, once half as many are there."""

    def __init__(self, sigmas=3.0, window=128):
        self.sigmas, self.window, self.norms = sigmas, window, []

    def __call__(self, n):
        if not np.isfinite(n):
            return np.nan
        c = np.inf
        if len(self.norms) >= self.window / 2 and any(self.norms):
            c = np.mean(self.norms) + self.sigmas * max(np.std(self.norms), 1e-6 * abs(np.mean(self.norms)))
        self.norms = [*self.norms, n][-self.window :]
        return c


class Adagc:
    """Of all blocks, whose norms come as a vector, since in warm-up they are scaled together.

    Two things the paper leaves open: a norm of 0 becomes no γ in warm-up, and a block that has none stays there.
    """

    def __init__(self, blocks, max_norm=1.0, max_ratio=1.05, decay=0.98, warmup_steps=100):
        self.max_norm, self.max_ratio, self.decay, self.warmup = max_norm, max_ratio, decay, warmup_steps
        self.gamma, self.seen = [None] * blocks, [0] * blocks

    def __call__(self, norms):
        total = np.sqrt(np.sum(np.square(norms)))
        return np.array([self._block(b, n, total) for b, n in enumerate(norms)])

    def _block(self, b, n, total):
        warm = self.seen[b] < self.warmup or self.gamma[b] is None
        if not np.isfinite(total if warm else n):
            return np.nan
        self.seen[b] += 1
        if warm:
            c = n * (1.0 if total <= self.max_norm else self.max_norm / total)
            if c > 0:
                self.gamma[b] = c if self.gamma[b] is None else min(self.gamma[b], c)
        else:
            c = self.max_ratio * self.gamma[b]
            self.gamma[b] = self.decay * self.gamma[b] + (1 - self.decay) * min(n, c)
        return c


class EachBlock:
    """A rule for one block on a vector of norms, each with a history of its own."""

    def __init__(self, blocks, rule):
        self.rules = [rule() for _ in range(blocks)]

    def __call__(self, norms):
        return np.array([rule(n) for rule, n in zip(self.rules, norms)])


class SkipSpikes:
    """A step is skipped if a number is above the threshold of its rule or not finite, and then enters no rule.

    After `most` skipped steps in a row a finite step is taken, and all rules start afresh with it.
    """

    def __init__(self, *rules, most):
        self.first, self.most, self.consecutive = rules, most, 0
        self.rules = copy.deepcopy(rules)

    def __call__(self, *numbers):
        rules = copy.deepcopy(self.rules)
        finite = np.isfinite(numbers).all()
        above = [not x <= rule(x) for x, rule in zip(numbers, rules)]  # all rules see the step
        spike = any(above) or not finite
        if spike and not (finite and self.consecutive >= self.most):
            self.consecutive += 1
            return True
        if spike:
            rules = copy.deepcopy(self.first)
            for x, rule in zip(numbers, rules):
                rule(x)
        self.rules, self.consecutive = rules, 0
        return False


class TrackedQuantile:
    """The threshold is the level, which then goes up or down; it starts from the first norm that is not 0."""

    def __init__(self, percentile=90.0, rate=0.05):
        self.q, self.rate, self.level = percentile / 100, rate, 0.0

    def __call__(self, n):
        if not np.isfinite(n):
            return np.nan
        level = self.level or n
        self.level = level * np.exp(-self.rate * ((n <= level) - self.q))
        return level


# Clips that belong to Adam


class StableAdam:
    """Adam's step of each leaf over max(1, rms / d), rms² = mean of g² / max(v, eps²), v debiased."""

    def __init__(self, b1=0.9, b2=0.999, eps=1e-8, d=1.0):
        self.b1, self.b2, self.eps, self.d, self.t = b1, b2, eps, d, 0
        self.m, self.v, self.rms = {}, {}, {}

    def __call__(self, grads):
        self.t += 1
        return {name: self._leaf(name, wide(g)) for name, g in grads.items()}

    def _leaf(self, name, g):
        self.m[name] = self.b1 * self.m.get(name, 0.0) + (1 - self.b1) * g
        self.v[name] = self.b2 * self.v.get(name, 0.0) + (1 - self.b2) * g**2
        m, v = self.m[name] / (1 - self.b1**self.t), self.v[name] / (1 - self.b2**self.t)
        self.rms[name] = np.sqrt(np.mean(g**2 / np.maximum(v, self.eps**2)))
        return m / (np.sqrt(v) + self.eps) / max(1.0, self.rms[name] / self.d)


class StableSpam:
    """Entries above T, the debiased average of the largest, are scaled by T / max; then the norm is μ / (√ν + eps)."""

    def __init__(self, decay_max=0.999, decay_mean=0.7, decay_square=0.9, eps=1e-8):
        self.decays, self.eps, self.averages, self.t = (decay_max, decay_mean, decay_square), eps, {}, {}

    def __call__(self, grads):
        return {name: self._leaf(name, wide(g)) for name, g in grads.items()}

    def _leaf(self, name, g):
        if not np.all(np.isfinite(g)):
            return np.full_like(g, np.nan)
        t = self.t[name] = self.t.get(name, 0) + 1
        largest, mean, square = self.averages.get(name, (0.0, 0.0, 0.0))
        a, b, c = self.decays
        m = np.max(np.abs(g))
        largest = a * largest + (1 - a) * m
        limit = largest / (1 - a**t)
        g = np.where(np.abs(g) > limit, g * limit / m, g)
        n = p_norm(g)
        mean, square = b * mean + (1 - b) * n, c * square + (1 - c) * n**2
        self.averages[name] = largest, mean, square
        return scaled(g, n, mean / (1 - b**t) / (np.sqrt(square / (1 - c**t)) + self.eps), normalize)


def norms_of(samples: dict, scope: str) -> np.ndarray:
    """The norms of all blocks in float64, a row for each step."""
    units = {name: np.sum(np.square(wide(x)), axis=1).reshape(len(x), -1) for name, x in samples.items()}
    leaves = {name: squares.sum(axis=1) for name, squares in units.items()}
    columns = {
        "unit": list(units.values()),
        "leaf": list(leaves.values()),
        "group": [leaves["bias"] + leaves["wide"], leaves["dense"]],
        "global": [sum(leaves.values())],
    }
    return np.sqrt(np.column_stack(columns[scope]))

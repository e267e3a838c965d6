"""What property tests share: how many examples they try, random trees, and steps that are compiled once.

A hundred examples of each property; HYPOTHESIS_PROFILE=long tries ten thousand, over more structures of trees.
"""

import contextlib
import functools
import itertools
import os

import chex
import clips
import jax
import jax.numpy as jnp
import numpy as np
import reference
import trees
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

PROFILE = os.environ.get("HYPOTHESIS_PROFILE", "normal")
shared = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow, HealthCheck.filter_too_much]}
settings.register_profile("normal", max_examples=100, derandomize=True, database=None, **shared)
settings.register_profile("long", max_examples=10_000, database=None, **shared)
settings.load_profile(PROFILE)

SMALLEST = float(jnp.finfo(jnp.float32).smallest_normal)
LARGEST = float(jnp.finfo(jnp.float32).max)
DTYPES = ("float32", "float32", "bfloat16", "float16", "float64", "float8_e4m3fn", "float8_e5m2", "complex64")
WIDE = ("float32", "bfloat16", "float64", "complex64", "complex128")  # those with the range of f32
FIRST_KEYS = ("bias", "dense", "out", "scale", "wide")


def random_kinds(seed: int, dtypes=DTYPES):
    """A tree of shapes and dtypes: one to five leaves of rank 0 to 5, some without entries, in any containers."""
    random = np.random.default_rng(seed)

    def leaf():
        sizes = random.choice([0, 1, 2, 3, 4], random.integers(6), p=[0.04, 0.16, 0.3, 0.3, 0.2])
        return jax.ShapeDtypeStruct(tuple(map(int, sizes)), np.dtype(jnp.dtype(random.choice(dtypes))))

    leaves = [leaf() for _ in range(random.integers(1, 6))]
    while len(leaves) > 1:  # the last few become one node, until one is left
        count = int(random.integers(1, min(len(leaves), 3) + 1))
        nodes, leaves = leaves[-count:], leaves[:-count]
        kind = random.integers(4)
        if kind == 0:
            leaves.append(dict(zip(FIRST_KEYS, nodes)))
        elif kind == 1:
            leaves.append([None, *nodes])
        else:
            leaves.append(tuple(nodes))
    return leaves[0]


@functools.cache
def pool(dtypes=DTYPES) -> tuple:
    """Trees with an entry at least: three in the normal profile, eight in the long one, as each is another program."""
    count = 3 if PROFILE == "normal" else 8
    kinds = (random_kinds(seed, dtypes) for seed in itertools.count(244))  # of which three have every dtype and rank
    full = (kind for kind in kinds if any(np.prod(leaf.shape) for leaf in jax.tree.leaves(kind)))
    return tuple(itertools.islice(full, count))


any_clip = st.sampled_from(clips.CLIPS)
any_norm_clip = st.sampled_from(clips.NORM_CLIPS)
any_shrinking = st.sampled_from(clips.SHRINKING)
any_form = st.sampled_from(["traced", "schedule"])
factors = st.one_of(st.sampled_from([1e-6, 0.5, 0.999, 1.0, 1.001, 2.0, 1e6]), st.floats(1e-3, 1e3))
seeds = st.integers(0, 2**32 - 1)


def subnormal(dtype) -> float:
    """The smallest number above 0 of a dtype."""
    return float(jnp.finfo(dtype).smallest_subnormal)


@st.composite
def updates_of(draw, lowest=-45.0, highest=38.5, decades=30.0, kinds=None, extremes=True):
    """A tree of finite updates: magnitudes of their own for leaves, entries spread over decades, some 0 or extreme."""
    random = np.random.default_rng(draw(seeds))
    zeros = draw(st.sampled_from([0.0, 0.3, 1.0]))
    extreme = extremes and draw(st.sampled_from([0.0, 0.0, 0.2]))

    def leaf(kind):
        info = jnp.finfo(kind.dtype)
        largest = min(float(info.max), LARGEST)
        bottom = max(lowest, np.log10(subnormal(kind.dtype)))
        top = min(highest, np.log10(largest))
        size = draw(st.floats(bottom, top))
        logs = np.maximum(size - draw(st.floats(0.0, decades)) * random.random(kind.shape), bottom)
        values = np.minimum(10.0**logs, largest) * random.uniform(0.5, 1.0, kind.shape)
        values = values * random.choice([-1.0, 1.0], kind.shape) * (random.random(kind.shape) >= zeros)
        ends = random.choice([largest, -largest, float(info.smallest_normal), subnormal(kind.dtype)], kind.shape)
        values = np.where(random.random(kind.shape) < extreme, ends, values)
        if kind.dtype.kind == "c":
            values = values * np.exp(1j * random.uniform(0, 6, kind.shape))
        return values.astype(kind.dtype)

    return jax.tree.map(leaf, draw(st.sampled_from(pool() if kinds is None else kinds)))


def thresholds_of(updates) -> st.SearchStrategy:
    """Thresholds >= 0 of sizes that the leaves can hold."""
    infos = [jnp.finfo(leaf.dtype) for leaf in jax.tree.leaves(updates)]
    lowest = max(-27.0, *(np.log10(float(info.smallest_normal)) for info in infos))
    highest = min(38.0, *(np.log10(float(info.max)) - 0.5 for info in infos))
    powers = st.floats(lowest, highest).map(lambda power: float(np.float32(10.0**power)))
    return st.one_of(st.sampled_from([0.0, 1.0]), powers)


def precision_of(tree):
    """A context in which leaves with 64 bits for a real number keep them."""
    wide = any(jnp.finfo(leaf.dtype).bits == 64 for leaf in jax.tree.leaves(tree))
    return jax.enable_x64(True) if wide else contextlib.nullcontext()


@functools.cache
def compiled(case, form):
    """One step, compiled once for each structure."""

    @jax.jit
    def step(updates, threshold, params, state):
        tx = case.make(threshold if form == "traced" else lambda count: threshold)
        return tx.update(updates, tx.init(params) if state is None else state, params)

    return step


def step(case, updates, threshold, form="traced", state=None):
    """Clipped updates and the new state, from a fresh state if none is given; NumPy arrays all."""
    with precision_of(updates):
        params = jax.tree.map(np.zeros_like, updates)
        return jax.device_get(compiled(case, form)(updates, np.float32(threshold), params, state))


def by_path(updates) -> dict:
    """The leaves by their paths, as the reference wants them."""
    return {jax.tree_util.keystr(path): np.asarray(x) for path, x in jax.tree_util.tree_leaves_with_path(updates)}


def bits(tree):
    """The bytes of each entry, a row for an entry; all NaN are alike, as processors change their bits."""

    def of_leaf(x):
        x = np.ravel(x)
        x = np.where(np.isnan(x), x.dtype.type(np.nan), x) if jnp.issubdtype(x.dtype, jnp.inexact) else x
        return x.view(np.uint8).reshape(x.size, x.dtype.itemsize)

    return jax.tree.map(of_leaf, tree)


def assert_same(actual, expected):
    """Equal numbers in every leaf, and NaN where NaN is; processors may take numbers below the normal ones for 0."""
    assert by_path(actual).keys() == by_path(expected).keys()
    for name, leaf in by_path(actual).items():
        other = by_path(expected)[name]
        chex.assert_equal_shape([leaf, other])
        assert leaf.dtype == other.dtype
        np.testing.assert_allclose(reference.wide(leaf), reference.wide(other), rtol=0, atol=SMALLEST, err_msg=name)


def rounding(leaf) -> tuple[float, float]:
    """Relative and absolute error of a number that was rounded to the leaf's dtype once."""
    info = jnp.finfo(leaf.dtype)
    absolute = max(SMALLEST, float(info.smallest_normal * info.eps))
    return max(float(info.eps), trees.tolerance(jnp.float32)), absolute * (2 if leaf.dtype.kind == "c" else 1)


def error_of(leaf, expected):
    """How far entries of a leaf may be from what is expected of them, if rounded once."""
    relative, absolute = rounding(leaf)
    return relative * np.abs(expected) + absolute


def assert_near(actual, expected, slack=0.0):
    """Each entry within one rounding of what is expected, or within that part of it."""
    for name, leaf in by_path(actual).items():
        relative, absolute = rounding(leaf)
        relative = max(relative, slack)
        wanted = reference.wide(by_path(expected)[name])
        np.testing.assert_allclose(reference.wide(leaf), wanted, rtol=relative, atol=absolute, err_msg=name)


def break_one(updates, seed, bad):
    """The updates with one entry replaced, and the path and place of that entry."""
    leaves, treedef = jax.tree.flatten(updates)
    random = np.random.default_rng(seed)
    number = random.choice([i for i, leaf in enumerate(leaves) if leaf.size])
    leaf = np.array(leaves[number])  # of a scalar too
    place = random.integers(leaf.size)
    leaf.reshape(-1)[place] = bad
    leaves[number] = leaf
    return treedef.unflatten(leaves), list(by_path(updates))[number], place


def block_norms(case, updates) -> dict:
    """The norm of each block in float64, by number."""
    return reference.block_norms(case, by_path(updates))


def largest_norm(case, updates) -> float:
    return max(block_norms(case, updates).values(), default=0.0)


def in_range(case, updates) -> bool:
    """No block has a norm above the largest f32, or nearly so."""
    return largest_norm(case, updates) < 0.999 * LARGEST

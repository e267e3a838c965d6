"""Which leaves of a tree have NaN, inf, or the largest norm."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from optax_clip._engine import checks
from optax_clip._engine.leaves import dense_leaves, is_counted, wide, widest
from optax_clip.norms import leaf_norm

_NOWHERE = np.uint32(2**32 - 1)


class Leaf(NamedTuple):
    """A row of `worst_leaves`."""

    path: str  # with slashes: "layers/0/kernel"
    dtype: np.dtype
    shape: tuple[int, ...]
    nans: int  # entries that are NaN
    infs: int  # entries that are inf or -inf
    norm: float  # of the finite entries
    largest: float  # magnitude among the finite entries
    at: tuple[int, ...] | None  # index of the first NaN or inf, else of the largest; None without entries

    def __str__(self) -> str:
        text, size = f"{self.dtype}{list(self.shape)}:", math.prod(self.shape)
        where = "" if self.at is None else f" at {list(self.at)}"
        if self.nans or self.infs:
            text += f" {self.nans} NaN, {self.infs} inf of {size}, first{where}; finite:"
            where = ""
        return f"{self.path} {text} norm {self.norm:.3g}, largest {self.largest:.3g}{where}"


class Leaves(tuple[Leaf, ...]):
    """The rows of `worst_leaves`. Printed, a line each."""

    others: int  # leaves with NaN or inf that are not among the rows

    def __repr__(self) -> str:
        more = [f"and {self.others} more with NaN or inf"] if self.others else []
        return "\n".join([*map(str, self), *more]) or "no floating or complex leaves"


def worst_leaves(tree: Any, k: int = 5) -> Leaves:
    """The leaves to look at first: those with NaN, then those with inf, then those of the largest norm.

    Args:
      tree: gradients, parameters, a module or any other pytree of arrays, sharded too. Leaves that are neither
        floating nor complex are passed over.
      k: how many leaves, an int >= 1.

    Returns:
      A tuple of at most k rows, which prints as a line each. A row has the path, dtype and shape of the leaf, how many
      entries are NaN and inf, norm and largest magnitude of the finite entries, and the index of the first entry that
      is NaN or inf, else of the largest: a token, an expert. `others` counts the leaves with NaN or inf below row k.

    Raises:
      ValueError: `k` is below 1.
      TypeError: `k` is no int; the tree holds traced arrays, as it does inside jit.

    Guarantees:
      One compiled call for all leaves, one transfer. Counts and indices are exact for leaves of up to 2^32 - 2 entries.

    Example:
      >>> params = {"embed": jnp.ones((1000, 8)).at[17, 3].set(jnp.nan), "out": jnp.full(4, 3.0), "step": 7}
      >>> worst_leaves(params)
      embed float32[1000, 8]: 1 NaN, 0 inf of 8000, first at [17, 3]; finite: norm 89.4, largest 1
      out float32[4]: norm 6, largest 3 at [0]
    """
    k = checks.static(k, "k", 1, integer=True)
    name = lambda path: jax.tree_util.keystr(path, simple=True, separator="/") or "the root"
    leaves = [(name(path), leaf) for path, leaf in dense_leaves(tree, name="tree") if is_counted(leaf)]
    if traced := [path for path, leaf in leaves if isinstance(leaf, Tracer)]:
        raise TypeError(
            f"tree must hold known values, got a traced array at {traced[0]}. Inside jit no value is known. Return the "
            "tree from the compiled function, and call worst_leaves there."
        )
    arrays = [jnp.asarray(leaf) for _, leaf in leaves]
    measured: Any = jax.device_get(_measured(arrays)) if arrays else ([], [])
    rows = []
    for (path, _), x, (nans, infs, place), (norm, largest) in zip(leaves, arrays, *measured):
        at = tuple(map(int, np.unravel_index(min(place, x.size - 1), x.shape))) if x.size else None
        rows.append(Leaf(path, x.dtype, x.shape, int(nans), int(infs), float(norm), float(largest), at))
    rows.sort(key=lambda row: (row.nans > 0, row.infs > 0, row.norm), reverse=True)
    found = Leaves(rows[:k])
    found.others = sum(row.nans + row.infs > 0 for row in rows[k:])
    return found


@jax.jit
def _measured(arrays: list[jax.Array]) -> tuple[jax.Array, jax.Array]:
    """NaN, inf and place, and norm and largest magnitude, of each leaf."""
    arrays = [x if jnp.iscomplexobj(x) else x.astype(wide(x)) for x in arrays]
    finite = [jnp.where(jnp.isfinite(x), x, 0) for x in arrays]
    counts = [_counts(x, jnp.abs(f)) for x, f in zip(arrays, finite)]
    sizes = [[norm, jnp.max(jnp.abs(f), initial=0)] for norm, f in zip(leaf_norm(finite), finite)]
    dtype = widest(norm.dtype for norm, _ in sizes)
    return jnp.stack([*map(jnp.stack, counts)]), jnp.stack([jnp.stack(pair).astype(dtype) for pair in sizes])


def _counts(x: jax.Array, size: jax.Array) -> list[jax.Array]:
    bad = ~jnp.isfinite(x)
    nans, bads = (jnp.sum(each, dtype=jnp.uint32) for each in (jnp.isnan(x), bad))
    place = jnp.zeros_like(x, jnp.uint32)  # by arithmetic, as a sharded array cannot be made flat where it lies
    for axis, length in enumerate(x.shape):
        place = place * np.uint32(length) + jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
    of_interest = jnp.where(bads > 0, bad, size == jnp.max(size, initial=0))
    return [nans, bads - nans, jnp.min(jnp.where(of_interest, place, _NOWHERE), initial=_NOWHERE)]

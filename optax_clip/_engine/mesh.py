"""Over which axes of a mesh the entries of a block are spread."""

import contextlib
import contextvars
from collections.abc import Iterator, Sequence
from typing import Any

import jax

from optax_clip._engine.leaves import keystr, spread

_types_speak = contextvars.ContextVar("types_speak", default=True)


@contextlib.contextmanager
def only_named_axes() -> Iterator[None]:
    """Norms that are taken inside sum over the axes that the user named, and over no others, whatever the types say."""
    token = _types_speak.set(False)
    try:
        yield
    finally:
        _types_speak.reset(token)


def varying(x: jax.Array) -> frozenset[str]:
    """The manual mesh axes over which `x` differs, so far as its type tells."""
    kind = jax.typeof(x)
    return kind.manual_axis_type.varying if hasattr(kind, "manual_axis_type") else kind.vma


def names_for(axis_name: Any, updates: Any) -> list:
    """What the user passed as `axis_name`, for each leaf of the updates: None, a name, or a tuple of names."""
    is_names = lambda x: isinstance(x, str) or (isinstance(x, tuple) and all(isinstance(name, str) for name in x))
    names = spread(axis_name, updates, "axis_name", is_names)
    for given in names:
        if not (given is None or is_names(given)):
            raise TypeError(
                f"axis_name must be a name, a tuple of names, None, or a prefix tree of these, got {given!r}. Pass "
                "names of axes of the mesh."
            )
    return names


def summed_over(values: Sequence[jax.Array], names: Sequence, paths: Sequence[tuple], *, units: bool) -> list:
    """The mesh axes to sum over for each leaf, by its type and by what `names_for` found."""
    mesh, types_speak = jax.sharding.get_abstract_mesh(), _types_speak.get()
    manual = tuple(mesh.manual_axes)
    # With check_vma=False and in pmap even the index along an axis does not vary by its type.
    untyped = {name for name in manual if name not in varying(jax.lax.axis_index(name))}

    def of_leaf(value, given, path):
        varies = varying(value)
        given = () if given is None and not types_speak else given
        if given is None and untyped:
            raise ValueError(
                f"axis_name is missing: over which of the mesh axes {manual} the leaf {keystr(path)} is spread, its "
                "type does not tell in pmap or shard_map(check_vma=False). Gradients that were averaged over an axis "
                "(pmean) are whole on every device: pass axis_name=(). Name an axis only if each device holds a part."
            )
        if given is None and units and varies:
            raise ValueError(
                f"axis_name is missing: the leaf {keystr(path)} varies over {tuple(sorted(varies))}, and its type does "
                "not tell whether the entries of one unit are spread over these axes. Pass the names of the axes that "
                "split a unit, or () where every unit lies on one device."
            )
        given = (given,) if isinstance(given, str) else given or ()
        bound = [name for name in given if _is_bound(name)]
        if absent := [n for n in given if n not in bound and mesh.axis_names and (manual or n not in mesh.axis_names)]:
            raise ValueError(
                f"axis_name must name axes of the mesh {mesh.axis_names}, got {absent}. Pass some of these."
            )
        given = [*bound, *varies] if types_speak and not units else bound
        # A leaf that does not vary over an axis is whole on every device: counted once. Outside of a mesh all is whole.
        return tuple(sorted({n for n in given if n in untyped or n not in manual or n in varies}))

    return [of_leaf(*leaf) for leaf in zip(values, names, paths)]


def _is_bound(name: str) -> bool:
    try:
        jax.lax.axis_size(name)
    except NameError:
        return False
    return True

"""`worst_leaves`: which leaves come first, what a row says, and which trees it takes."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import trees
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import optax_clip as oc
from optax_clip.tools import worst

NAN, INF = jnp.nan, jnp.inf
TREE = {
    "embed": jnp.ones((1000, 8)).at[17, 3].set(NAN).at[40, 0].set(NAN),
    "heads": jnp.zeros((4, 2), jnp.bfloat16).at[2, 1].set(-INF),
    "large": jnp.array([3.0, -4.0]),
    "out": jnp.full(4, 1.0),
}


def paths(rows) -> list[str]:
    return [row.path for row in rows]


def test_rows():
    """A row has the counts, the size of the finite entries, and the first bad entry, else the largest."""
    first, second, third, fourth = oc.worst_leaves(TREE)
    assert first == ("embed", np.dtype("float32"), (1000, 8), 2, 0, pytest.approx(7998**0.5), 1.0, (17, 3))
    assert second == ("heads", jnp.bfloat16, (4, 2), 0, 1, 0.0, 0.0, (2, 1))
    assert third == ("large", np.dtype("float32"), (2,), 0, 0, 5.0, 4.0, (1,))
    assert fourth[-2:] == (1.0, (0,))


def test_order():
    """NaN first, then inf, then by the norm of the finite entries; at most k rows, and how many bad leaves are left."""
    tree = {
        "a": 2.0,
        "b": jnp.array([INF, 1.0]),
        "c": jnp.array([INF, 3.0]),
        "d": NAN,
        "e": jnp.array([NAN, INF]),
        "f": 5.0,
    }
    assert paths(oc.worst_leaves(tree, 9)) == ["e", "d", "c", "b", "f", "a"]
    found = oc.worst_leaves(tree, 2)
    assert paths(found) == ["e", "d"] and found.others == 2
    assert oc.worst_leaves(tree, 4).others == 0


def test_print():
    """Printed, the result is a line for each row, and one for the bad leaves that are cut off."""
    assert str(oc.worst_leaves(TREE, 1)) == (
        "embed float32[1000, 8]: 2 NaN, 0 inf of 8000, first at [17, 3]; finite: norm 89.4, largest 1\n"
        "and 1 more with NaN or inf"
    )
    assert repr(oc.worst_leaves({"large": TREE["large"]})) == "large float32[2]: norm 5, largest 4 at [1]"
    assert str(oc.worst_leaves({"step": 7, "none": None})) == "no floating or complex leaves"


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float8_e4m3fn, jnp.complex64], ids=str)
def test_dtypes(dtype):
    """Every floating and complex dtype is measured in f32 or better."""
    (row,) = oc.worst_leaves([jnp.asarray([3, NAN, 4]).astype(dtype)])
    assert row[1:] == (dtype, (3,), 1, 0, 5.0, 4.0, (1,))


def test_f64_and_far_numbers():
    """Norms keep their range; f64 leaves keep theirs."""
    with jax.enable_x64(True):
        wide, small = oc.worst_leaves([jnp.array([3e100, 4e100]), jnp.array([3e-20, 4e-20], jnp.float32)])
        assert (wide.norm, small.norm) == (pytest.approx(5e100), pytest.approx(5e-20))


def test_odd_leaves():
    """Scalars and leaves without entries have rows, what has no norm has none."""
    rows = oc.worst_leaves({**trees.odd(), "empty": jnp.zeros((0, 3)), "number": 2.5, "numpy": np.float32([1, NAN])}, 9)
    assert paths(rows) == ["numpy", "weight", "number", "empty"]
    assert [row.at for row in rows] == [(1,), (1,), (), None]
    assert paths(oc.worst_leaves(jnp.ones(3))) == ["the root"]
    assert paths(oc.worst_leaves({"a/b": 1.0, "a": {"b": 2.0}})) == ["a/b", "a/b"]


def test_states_of_optimizers_and_rules():
    """The state of an optimizer is a tree as any other."""
    state = optax.chain(oc.zclip(), optax.adam(1.0)).init({"w": jnp.ones(3).at[1].set(NAN)})
    state = (state[0], (state[1][0]._replace(mu={"w": jnp.array([1.0, NAN, 2.0])}), state[1][1]))
    row = oc.worst_leaves(state)[0]
    assert (row.path, row.at) == ("1/0/mu/w", (1,))


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)
def test_sharded(kind):
    """Leaves that are spread over devices give the rows of one device."""
    x = jnp.arange(64.0).reshape(16, 4).at[9, 1].set(NAN)
    mesh = trees.mesh(kind, data=4, model=2)
    for spec in (P("data", "model"), P("model"), P(None, "data")):
        spread = {
            "w": jax.device_put(x, NamedSharding(mesh, spec)),
            "b": jax.device_put(x[0], NamedSharding(mesh, P())),
        }
        chex.assert_trees_all_close(oc.worst_leaves(spread)[0][3:], oc.worst_leaves({"w": x})[0][3:], rtol=1e-6)
        assert oc.worst_leaves(spread)[0].at == (9, 1)


def test_one_program_and_one_transfer(monkeypatch):
    """All leaves are measured by one program, which a tree of the same shapes uses again, and fetched at once."""
    fetched = []
    monkeypatch.setattr(jax, "device_get", lambda tree, get=jax.device_get: fetched.append(tree) or get(tree))
    oc.worst_leaves(TREE)
    programs = worst._measured._cache_size()
    oc.worst_leaves(jax.tree.map(lambda x: 2 * x, TREE))
    assert worst._measured._cache_size() == programs
    assert len(fetched) == 2


@pytest.mark.full
def test_flax_and_equinox():
    """Modules and states of NNX, and modules of Equinox, are trees of arrays."""
    nnx, eqx = pytest.importorskip("flax.nnx"), pytest.importorskip("equinox")
    model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    model.kernel[...] = model.kernel[...].at[2, 1].set(NAN)
    for tree in (model, nnx.state(model)):
        row = oc.worst_leaves(tree)[0]
        assert row.path.startswith("kernel") and row.at == (2, 1)
    network = eqx.nn.MLP(2, 2, 4, 1, key=jax.random.key(0))
    network = eqx.tree_at(lambda m: m.layers[1].bias, network, jnp.array([1.0, INF]))
    assert oc.worst_leaves(network)[0][:1] + oc.worst_leaves(network)[0][-1:] == ("layers/1/bias", (1,))


def test_errors():
    """Inside jit the error says where to call; k is an int >= 1."""
    text = r"^tree must hold known values, got a traced array at w\. .*call worst_leaves there\."
    with pytest.raises(TypeError, match=text):
        jax.jit(lambda w: oc.worst_leaves({"w": w}))(jnp.ones(3))
    with pytest.raises(ValueError, match=r"^k must be >= 1 .*got 0"):
        oc.worst_leaves(TREE, 0)
    with pytest.raises(TypeError, match=r"^k must be an int, got float 1.5"):
        oc.worst_leaves(TREE, 1.5)

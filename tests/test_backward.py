"""A clip inside of the backward pass: forward nothing changes, backward the gradient goes through the clip."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import trees
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from table import of_table

import optax_clip as oc
from optax_clip import clip_backward, thresholds

full = pytest.mark.full


def pulled(clip, gradients, x=None):
    """What comes out of the backward pass of `clip_backward` at `x` where `gradients` come in, compiled."""
    back = lambda x, gradients: jax.vjp(lambda x: clip_backward(x, clip), x)[1](gradients)[0]
    return jax.jit(back)(jax.tree.map(jnp.ones_like, gradients) if x is None else x, gradients)


def half(gradients):
    """A function of the gradients that is no transformation."""
    return jax.tree.map(lambda g: g / 2, gradients)


# What comes forward and what goes back


def test_forward_every_leaf_is_itself():
    """Forward, arrays keep every bit, and all other leaves are the same objects."""
    x = trees.odd() | {"mixed": trees.mixed(), "complex": jnp.array([1 + 2j]), "numbers": (0.5, 1j, jnp.nan)}
    x |= {"numpy": np.float32([1.5, -0.0, np.inf]), "bad": jnp.array([jnp.nan, -jnp.inf, 1e-45])}
    out = clip_backward(x, oc.clip_by_global_norm(1.0))
    assert jax.tree.structure(out) == jax.tree.structure(x)
    is_bits = lambda leaf: hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jnp.inexact)
    for old, new in zip(jax.tree.leaves(x), jax.tree.leaves(out)):
        if is_bits(old):
            assert new.dtype == old.dtype and np.asarray(new).tobytes() == np.asarray(old).tobytes()
        else:
            assert new is old


def test_forward_costs_nothing():
    """The compiled program without a derivative is the program without the call."""
    x = trees.small()
    plain, called = (
        jax.jit(lambda x, through=through: jax.tree.map(jnp.sin, through(x))).lower(x).compile().as_text()
        for through in (lambda x: x, lambda x: clip_backward(x, oc.clip_by_global_norm(1.0)))
    )
    instructions = lambda text: [line.split(", metadata")[0] for line in text.splitlines() if " = " in line]
    assert len(instructions(plain)) == len(instructions(called))


@of_table
def test_the_gradient_goes_through_every_transformation_without_a_history(case):
    """Each row of the table does to the gradient what it does as a transformation; those with a history raise."""
    gradients = trees.small(1)
    if case.history or case.needs_params:
        text = "^params are missing" if case.needs_params else "^clip must have no history"
        with pytest.raises(ValueError, match=text):
            pulled(case.tx, gradients)
    else:
        expected, _ = trees.step(case.tx, gradients)
        chex.assert_trees_all_close(pulled(case.tx, gradients), expected, rtol=1e-6)


CLIPS = {
    "optax.clip": (optax.clip(1.0), lambda g: np.clip(g, -1, 1)),
    "optax norm": (optax.clip_by_global_norm(1.0), lambda g: g / max(1, np.sqrt(np.sum(g**2)))),
    "chain": (optax.chain(oc.clip(1.0), optax.scale(3.0)), lambda g: 3 * np.clip(g, -1, 1)),
    "compiled": (
        optax.GradientTransformation(*map(jax.jit, oc.clip_by_global_norm(1.0))),
        lambda g: g / max(1, np.sqrt(np.sum(g**2))),
    ),
    "half": (half, lambda g: g / 2),
    "top 2": (lambda g: jnp.where(jnp.abs(g) >= jax.lax.top_k(jnp.abs(g), 2)[0][-1], g, 0), lambda g: g * (abs(g) > 1)),
}


@pytest.mark.parametrize("name", CLIPS)
def test_clips_of_others_and_functions(name):
    """Transformations of Optax and functions of the gradients do what they say."""
    clip, expected = CLIPS[name]
    g = np.array([3.0, -0.5, 1.0, -2.0], np.float32)
    chex.assert_trees_all_close(pulled(clip, g), expected(g), rtol=1e-6)


def test_leaves_without_a_gradient_are_none_for_the_clip():
    """The clip sees None for leaves that have no gradient, so that clips of Optax work beside integers."""
    x = trees.odd() | {"float": 0.5, "numpy": np.ones(2, np.float32)}
    seen = []

    def loss(weight, clip):
        out = clip_backward(x | {"weight": weight}, clip)
        return jnp.sum(3.0 * out["weight"]) + jnp.sum(2.0 * out["numpy"]) + jnp.sum(out["int"]) + out["float"]

    def look(gradients):
        seen.append({key for key, leaf in gradients.items() if isinstance(leaf, jax.Array)})
        return gradients

    jax.grad(loss)(x["weight"], look)
    assert seen == [{"weight", "numpy"}]
    for clip in (oc.clip_by_global_norm(1.0), optax.clip_by_global_norm(1.0)):
        gradient = jax.jit(jax.grad(functools.partial(loss, clip=clip)))(x["weight"])
        chex.assert_trees_all_close(gradient, jnp.full(2, 3 / 26**0.5), rtol=1e-6)
    assert jax.tree.leaves(clip_backward({"int": jnp.arange(2)}, optax.clip_by_global_norm(1.0)))[0].shape == (2,)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32, jnp.complex64], ids=lambda t: t.__name__)
def test_dtypes_are_kept(dtype):
    """The gradient has the dtype of x, with the values of the clip."""
    gradients = {"w": jnp.array([30.0, -40.0], dtype)}
    out = pulled(oc.clip_by_global_norm(1.0), gradients)
    assert out["w"].dtype == dtype
    chex.assert_trees_all_close(out["w"].astype(jnp.complex64), jnp.array([0.6, -0.8 + 0j]), rtol=8e-3)


def test_bad_gradients():
    """A clip by value puts inf to the bound and keeps NaN; a clip by norm makes all NaN; a function may do more."""
    g = jnp.array([jnp.inf, jnp.nan, 0.5, -jnp.inf], jnp.float16)
    chex.assert_trees_all_equal(pulled(oc.clip(1.0), g), jnp.array([1, jnp.nan, 0.5, -1], jnp.float16))
    assert jnp.isnan(pulled(oc.clip_by_global_norm(1.0), g)).all()
    zeroed = optax.chain(optax.zero_nans(), oc.clip(1.0))  # keeps a state that its updates do not read
    chex.assert_trees_all_equal(pulled(zeroed, g), jnp.array([1, 0, 0.5, -1], jnp.float16))


def test_no_nan_appears_on_the_way():
    """Healthy gradients, zeros among them, pass with `debug_nans` and `debug_infs`."""
    with jax.debug_nans(True), jax.debug_infs(True):
        for scale in (0.0, 1e-20, 1.0, 1e15):
            chex.assert_tree_all_finite(pulled(oc.clip_by_leaf_norm(1.0), trees.small(0, scale)))


# Inside of loops and other transformations


def rollout(factor, steps, clip=None):
    """The last of the states x ← sin(3.7 · factor · x) from 0.4, and all states before each step."""

    def step(x, _):
        inside = x if clip is None else clip_backward(x, clip)
        return jnp.sin(3.7 * factor * inside), x

    return jax.lax.scan(step, jnp.float32(0.4), length=steps)


def rollout64(states, response):
    """The derivative of the last state with respect to the factor by the chain rule in float64, g ← response(g)."""
    total, g = 0.0, 1.0
    for x in np.asarray(states, np.float64)[::-1]:
        slope = g * np.cos(3.7 * x)
        total, g = total + slope * 3.7 * x, response(slope * 3.7)
    return total


RESPONSES = {
    "clip": (oc.clip(1.0), lambda g: np.clip(g, -1, 1)),
    "clip_by_global_norm": (oc.clip_by_global_norm(1.0), lambda g: np.clip(g, -1, 1)),
    "smooth": (oc.clip_by_global_norm(1.0, response=oc.responses.smooth), lambda g: g / (abs(g) + 1)),
    "optax": (optax.clip_by_global_norm(1.0), lambda g: np.clip(g, -1, 1)),
}


@pytest.mark.parametrize("name", RESPONSES)
def test_a_chaotic_rollout(name):
    """Over 200 steps the derivative is not finite; with a clip in each step it is the recursion in float64."""
    derivative = jax.jit(jax.grad(rollout, has_aux=True), static_argnums=(1, 2))
    assert not jnp.isfinite(derivative(1.0, 200)[0])
    clip, response = RESPONSES[name]
    actual, states = derivative(1.0, 200, clip)
    chex.assert_trees_all_close(actual, rollout64(states, response), rtol=1e-5)


def recurrent(params, inputs, clip, wrap=lambda f: f):
    """The loss of a small recurrent network whose state is clipped backward in each step."""

    @wrap
    def step(state, x):
        state = clip_backward(state, clip)
        return jnp.tanh(params["w"] @ state + x), None

    last, _ = jax.lax.scan(step, jnp.ones(3), inputs)
    return jnp.sum(last**2)


PARAMS = {"w": 2 * jnp.asarray(np.random.default_rng(0).normal(size=(3, 3)), jnp.float32)}
INPUTS = jnp.asarray(np.random.default_rng(1).normal(size=(4, 12, 3)), jnp.float32)
SMALL = oc.clip_by_global_norm(0.1)


def test_scan_is_a_loop_and_remat_changes_nothing():
    """Compiled or not, with or without `jax.checkpoint`, a scan has the gradient of steps written out."""

    def unrolled(params, inputs):
        state = jnp.ones(3)
        for x in inputs:
            state = jnp.tanh(params["w"] @ clip_backward(state, SMALL) + x)
        return jnp.sum(state**2)

    expected = jax.jit(jax.grad(unrolled))(PARAMS, INPUTS[0])
    other = jax.jit(jax.grad(functools.partial(recurrent, clip=oc.clip(None))))(PARAMS, INPUTS[0])
    assert not np.allclose(expected["w"], other["w"], rtol=0.1)
    for wrap in (lambda f: f, jax.checkpoint):
        gradient = jax.grad(functools.partial(recurrent, clip=SMALL, wrap=wrap))
        for run in (gradient, jax.jit(gradient)):
            chex.assert_trees_all_close(run(PARAMS, INPUTS[0]), expected, rtol=1e-5, atol=1e-7)


def test_under_vmap_the_norm_is_that_of_an_example():
    """`vmap` gives each example a norm of its own; a call with the whole batch takes one norm over it."""
    gradient = jax.grad(functools.partial(recurrent, clip=SMALL))
    each = jax.jit(jax.vmap(gradient, (None, 0)))(PARAMS, INPUTS)
    expected = [jax.jit(gradient)(PARAMS, inputs) for inputs in INPUTS]
    chex.assert_trees_all_close(each, jax.tree.map(lambda *x: jnp.stack(x), *expected), rtol=1e-5, atol=1e-7)
    g, expected = jnp.array([[3.0, 4.0], [0.3, 0.4]]), jnp.array([[0.6, 0.8], [0.3, 0.4]])
    one = oc.clip_by_global_norm(1.0)
    chex.assert_trees_all_close(jax.vmap(lambda g: pulled(one, g))(g), expected, rtol=1e-6)
    chex.assert_trees_all_close(pulled(one, g), g / jnp.sqrt(25.25), rtol=1e-6)
    chex.assert_trees_all_close(pulled(oc.clip_by_unit_norm(1.0, axis=1), g), expected, rtol=1e-6)


@pytest.mark.parametrize("wrap", [jax.checkpoint, pytest.param(jax.jit, marks=full)], ids=["checkpoint", "jit"])
def test_what_the_clip_closes_over_may_be_traced(wrap):
    """Thresholds that are parameters, numbers of the step and random keys are arguments with a gradient of zero."""

    def loss(params, x):
        @wrap
        def step(state, at):
            index, key = at
            bound = jnp.where(index > 1, params["bound"], jnp.inf)
            keep = lambda g: jnp.clip(g, -bound, bound) * jax.random.bernoulli(key, 1.0, g.shape)
            state = clip_backward(clip_backward(state, keep), oc.clip_by_global_norm(params["max_norm"]))
            return params["w"] * state, None

        last, _ = jax.lax.scan(step, x, (jnp.arange(4), jax.random.split(jax.random.key(0), 4)))
        return jnp.sum(last)

    params = {"w": jnp.float32(2.0), "bound": jnp.float32(0.5), "max_norm": jnp.float32(0.25)}
    value, (of_params, of_x) = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(params, jnp.ones(1))
    assert value == 16.0
    chex.assert_trees_all_close(of_x, jnp.array([0.25]))
    # Sum over steps of the state before times the gradient of the state after: 1 in the last step, else 0.25.
    chex.assert_trees_all_close(of_params, {"w": 8 + 0.25 * (4 + 2 + 1), "bound": 0.0, "max_norm": 0.0})
    chex.assert_trees_all_close(jax.grad(loss)(params, jnp.ones(1)), of_params)


def test_thresholds_under_vmap():
    """A batch of thresholds that the clip closes over gives the gradient for each."""
    gradient = lambda t: jax.grad(lambda x: 7.0 * clip_backward(x, oc.clip_by_global_norm(t)))(2.0)
    chex.assert_trees_all_close(jax.jit(jax.vmap(gradient))(jnp.array([1.0, 3.0, 9.0])), jnp.array([1.0, 3.0, 7.0]))


def test_derivatives_of_derivatives():
    """The second derivative is that of the clipped gradient: zero where it is clipped, also by a threshold."""
    first = lambda x, t: jax.grad(lambda x: clip_backward(x, oc.clip(t)) ** 3)(x)  # min(3x², t)
    second = jax.jit(jax.grad(first, argnums=(0, 1)))
    chex.assert_trees_all_close(second(1.5, 8.0), (9.0, 0.0))  # 6x, itself not clipped
    chex.assert_trees_all_close(second(1.5, 6.0), (0.0, 1.0))
    chex.assert_trees_all_close(jax.jacrev(jax.jacrev(lambda x: clip_backward(x, oc.clip(99.0)) ** 3))(2.0), 12.0)


def test_forward_mode_says_that_it_is_not_possible():
    """Forward mode is an error of JAX that names it."""
    f = lambda x: clip_backward(x, oc.clip(1.0)) ** 2
    for call in (lambda: jax.jvp(f, (2.0,), (1.0,)), lambda: jax.jacfwd(f)(2.0), lambda: jax.linearize(f, 2.0)[1](1.0)):
        with pytest.raises(TypeError, match="forward-mode"):
            call()


@pytest.mark.parametrize("wrap", [lambda f: f, pytest.param(jax.checkpoint, marks=full)], ids=["plain", "checkpoint"])
def test_forward_mode_over_the_gradient(wrap):
    """`jax.hessian`, forward mode over reverse mode, is the Jacobian of the clipped gradient, through a scan too."""
    loss = lambda inputs, clip: recurrent(PARAMS, inputs, clip, wrap)
    for clip in (oc.clip(None), SMALL):
        both = [jax.jit(second(jax.grad(loss)), static_argnums=1) for second in (jax.jacfwd, jax.jacrev)]
        chex.assert_trees_all_close(*(second(INPUTS[0, :5], clip) for second in both), rtol=1e-4, atol=1e-6)
    chex.assert_trees_all_close(jax.hessian(lambda x: clip_backward(x, oc.clip(99.0)) ** 3)(2.0), 12.0)


# On meshes

ROWS = jnp.arange(24.0).reshape(8, 3) / 8
PULLS = {
    "clip_by_global_norm": lambda **axis: oc.clip_by_global_norm(1.0, **axis),
    "clip_by_unit_norm": lambda **axis: oc.clip_by_unit_norm(1.0, **axis),
    "optax.clip": lambda: optax.clip(1.0),
}


def gradient_at(clip, x):
    return jax.grad(lambda x: jnp.sum(clip_backward(x, clip) ** 2))(x)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("clip_by_global_norm", AxisType.Auto),
        pytest.param("clip_by_unit_norm", AxisType.Auto, marks=full),
        pytest.param("clip_by_global_norm", AxisType.Explicit, marks=full),
        pytest.param("clip_by_unit_norm", AxisType.Explicit, marks=full),
        pytest.param("optax.clip", AxisType.Explicit, marks=full),
    ],
)
def test_jit_on_a_mesh_is_one_device(name, kind):
    """The gradient of a sharded array is that of one device, and stays where it was."""
    clip = PULLS[name]()
    place = NamedSharding(trees.mesh(kind, data=8), P("data"))
    with jax.set_mesh(place.mesh):
        out = jax.jit(functools.partial(gradient_at, clip))(jax.device_put(ROWS, place))
    chex.assert_trees_all_close(out, gradient_at(clip, ROWS), rtol=1e-6)
    assert out.sharding.is_equivalent_to(place, 2)


@pytest.mark.parametrize("outside", [False, True], ids=["grad inside", "grad outside"])
@pytest.mark.parametrize("name", ["clip_by_global_norm", pytest.param("clip_by_unit_norm", marks=full)])
def test_shard_map_is_one_device(name, outside):
    """Inside `shard_map` the norm is that of the whole array, wherever the gradient is taken."""
    clip = PULLS[name](axis_name="data")
    on = functools.partial(jax.shard_map, mesh=trees.mesh(data=8), in_specs=P("data"))
    part = lambda x: jax.lax.psum(jnp.sum(clip_backward(x, clip) ** 2), "data")
    inside = on(functools.partial(gradient_at, clip), out_specs=P("data"))
    run = jax.grad(on(part, out_specs=P())) if outside else inside
    chex.assert_trees_all_close(jax.jit(run)(ROWS), gradient_at(PULLS[name](), ROWS), rtol=1e-6)


def test_shard_map_of_replicated_parameters():
    """What is whole on every device has a gradient that JAX has summed over devices before the clip sees it."""
    loss = lambda x, rows: jnp.sum(clip_backward(x, oc.clip_by_global_norm(1.0)) * rows)
    on = jax.shard_map(jax.grad(loss), mesh=trees.mesh(data=8), in_specs=(P(), P("data")), out_specs=P())
    expected = np.sum(ROWS, 0) / np.linalg.norm(np.sum(ROWS, 0))
    chex.assert_trees_all_close(jax.jit(on)(jnp.ones(3), ROWS), expected, rtol=1e-6)


def test_where_types_do_not_speak_the_axis_is_missing():
    """With `check_vma=False` the clip asks for `axis_name`, at the call."""
    on = functools.partial(jax.shard_map, mesh=trees.mesh(data=8), in_specs=P("data"), check_vma=False)
    with pytest.raises(ValueError, match=r"^axis_name is missing"):
        jax.eval_shape(on(lambda x: clip_backward(x, oc.clip_by_global_norm(1.0)), out_specs=P("data")), ROWS)


# Errors


def through_loops(reads):
    """A transformation that hands its state through a scan, a while loop and a cond, and reads it or not."""

    def update(updates, count, params=None):
        step = lambda carry, _: ((carry[0] * (carry[1] if reads else 2.0), carry[1]), None)
        (updates, count), _ = jax.lax.scan(step, (updates, count), length=2)
        updates, count = jax.lax.while_loop(lambda c: c[0].sum() < 0, lambda c: (c[0] + 1, c[1] + 1), (updates, count))
        return jax.lax.cond(updates[0] > 9, lambda u, c: (u, c), lambda u, c: (-u, c + 1), updates, count)

    return optax.GradientTransformation(lambda params: jnp.ones([]), jax.jit(update))


HISTORIES = {
    "zclip": lambda: oc.zclip(),
    "schedule": lambda: oc.clip(optax.linear_schedule(1.0, 0.1, 10)),
    "schedule of a norm": lambda: oc.clip_by_global_norm(lambda step: 1.0 + step),
    "chain": lambda: optax.chain(oc.clip(1.0), oc.clip_by_norm(oc.leaf_norm, thresholds.quantile(50.0, 4))),
    "adam": lambda: optax.scale_by_adam(),
    "noise": lambda: optax.add_noise(1.0, 0.5, jax.random.key(0)),
    "injected": lambda: optax.inject_hyperparams(oc.clip)(1.0),
    "loops": lambda: through_loops(True),
}


@pytest.mark.parametrize("name", HISTORIES)
def test_a_history_is_an_error_at_the_call(name):
    """What reads its state cannot be used here, and the call says so, without a derivative."""
    with pytest.raises(ValueError, match=r"^clip must have no history, .* Pass a clip whose threshold is a number"):
        jax.eval_shape(lambda x: clip_backward(x, HISTORIES[name]()), jnp.ones(3))


def test_a_state_that_is_not_read_is_no_history():
    """A state may pass beside the updates through calls and loops."""
    chex.assert_trees_all_close(pulled(through_loops(False), jnp.array([1.0, 2.0])), jnp.array([-4.0, -8.0]))


WRONG = {  # what comes back, and what is found wrong with it
    "another tree": (lambda g: g["w"], "float32[3] at the root where x has float32[3] at ['w']"),
    "a shape": (lambda g: {"w": g["w"][:2]}, "float32[2] at ['w'] where x has float32[3] at ['w']"),
    "a dtype": (lambda g: {"w": g["w"].astype(jnp.bfloat16)}, "bfloat16[3] at ['w'] where x has float32[3] at ['w']"),
    "nothing": (lambda g: {}, "nothing where x has float32[3] at ['w']"),
    "too much": (lambda g: {**g, "x": g["w"]}, "float32[3] at ['x'] where x has nothing"),
    "a number": (lambda g: {"w": 1.0}, "float[] at ['w'] where x has float32[3] at ['w']"),
    "a clip": (optax.clip_by_global_norm, "function[] at .init where x has float32[3] at ['w']"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_comes_back_must_be_like_what_came_in(name):
    """Another tree, shape or dtype is an error at the call that names the first leaf that differs."""
    clip, text = WRONG[name]
    with pytest.raises(ValueError, match=r"^clip must return a gradient for each that it gets, .* got ") as caught:
        jax.eval_shape(lambda x: clip_backward(x, clip), {"w": jnp.ones(3)})
    assert f"got {text}. Cast or reshape" in str(caught.value)


@pytest.mark.parametrize(
    ("clip", "error", "text"),
    [
        (1.0, TypeError, r"^clip must be a function, got float 1\.0\. Or pass a transformation"),
        (lambda path, leaf: leaf, TypeError, r"^clip must take \(gradients\), got function"),
        (oc.adaptive_grad_clip(0.1), ValueError, r"^params are missing"),
        (oc.clip_by_leaf_norm({"v": 1.0}), ValueError, r"^max_norm must be one value or a prefix"),
    ],
)
def test_what_is_no_clip_for_this_place(clip, error, text):
    """What is no clip raises at the call, and what a clip raises itself is passed on."""
    with pytest.raises(error, match=text):
        jax.eval_shape(lambda x: clip_backward(x, clip), {"w": jnp.ones(3)})

"""What the compiler makes of a step: reads, scratch and kernels, which unlike seconds are the same on every run."""

import re

import chex
import jax
import jax.numpy as jnp
import optax
import pytest
import trees

import optax_clip as oc

SHAPES = {f"layer{i}": {"w": (256, 512), "v": (512, 256), "b": (512,)} for i in range(4)}
ENTRIES = 4 * (2 * 256 * 512 + 512)

CLIPS = {
    "global": oc.clip_by_global_norm(1.0),
    "scheduled": oc.clip_by_global_norm(optax.linear_schedule(1.0, 0.1, 100)),
    "leaf": oc.clip_by_leaf_norm(1.0),
    "group": oc.clip_by_group_norm({"b": 1.0, "m": 2.0}, {k: {"w": "m", "v": "m", "b": "b"} for k in SHAPES}),
    "rms": oc.clip_by_block_rms(1.0),
    "range": oc.clip_by_norm_range(0.1, 1.0),
    "unit": oc.clip_by_unit_norm(1.0),
    "agc": oc.adaptive_grad_clip(0.01),
    "value": oc.clip(1.0),
}


def compiled(clip):
    """A compiled AdamW step with this clip in front, in place."""
    return compiled_step(optax.chain(clip, optax.adamw(1e-3)))


def compiled_step(optimizer):
    """A compiled step of the optimizer, in place."""
    params = jax.tree.map(
        lambda s: jax.ShapeDtypeStruct(s, jnp.float32), SHAPES, is_leaf=lambda s: isinstance(s, tuple)
    )

    def step(params, state, grads):
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return jax.jit(step, donate_argnums=(0, 1)).lower(params, jax.eval_shape(optimizer.init, params), params).compile()


def entry(program) -> str:
    """What runs in every step: the main computation, without the branches of conditionals."""
    text = program.as_text()
    return text[text.index("\nENTRY") :]


@trees.on_a_cpu_that_fuses
@pytest.mark.parametrize("name", CLIPS)
def test_a_step_needs_no_copy_of_the_gradients(name):
    """Beside its arguments and results, a step allocates next to nothing, at unit scope a few arrays of norms."""
    program = compiled(CLIPS[name])
    share = 0.05 if name in ("unit", "agc") else 0.005  # one array of norms is 1 / 256 of the matrices here
    assert program.memory_analysis().temp_size_in_bytes < share * 4 * ENTRIES
    copies = re.findall(r"= f32\[(?:256,512|512,256)\]\S* copy\(", entry(program))
    assert not copies


@trees.on_a_cpu_that_fuses
@pytest.mark.parametrize("name", [name for name in CLIPS if name not in ("value", "agc")])
def test_an_ordinary_step_reads_the_gradients_once_more(name):
    """Beside the optimizer's own kernels, one kernel a matrix reads the gradient in every step: that of its norm."""
    matrices = 2 * len(SHAPES)
    bare, clipped = (
        len(re.findall(r" fusion\([^)]*%g\w*(?:w|v)__", renamed(c))) for c in (optax.identity(), CLIPS[name])
    )
    assert clipped - bare == matrices


def renamed(clip) -> str:
    """The main computation with the matrices of the gradient named %g...w__ and %g...v__."""
    text = entry(compiled(clip))
    return re.sub(r"%grads__(\w*?)__(\w)__(\.\d+)?", r"%g\1\2__", text)


@trees.on_a_cpu_that_fuses
@pytest.mark.parametrize("name", [name for name in CLIPS if name not in ("value", "agc")])
def test_the_second_pass_stands_in_one_conditional(name):
    """Exactness for extreme norms costs one conditional, whose branch ordinary steps do not take."""
    assert len(re.findall(r" conditional\(", compiled(CLIPS[name]).as_text())) == 1


@trees.on_a_cpu_that_fuses
def test_many_leaves_are_added_up_apart_from_their_sums():
    """The kernel that adds up the sums over 100 leaves takes none of these itself: LLVM is slow where it does."""
    tx = oc.clip_by_global_norm(1.0)
    updates = [jax.ShapeDtypeStruct((8, 8 + i % 9), jnp.float32) for i in range(100)]
    text = jax.jit(tx.update).lower(updates, jax.eval_shape(tx.init, updates)).compile().as_text()
    kernels = re.findall(r"\n%fused_computation\S* \(.*?\n\}", text, re.DOTALL)
    adding = [kernel for kernel in kernels if kernel.count(" parameter(") >= 100]
    assert adding and not any(" reduce(" in kernel for kernel in adding)


@trees.on_a_cpu_that_fuses
def test_what_is_reported_of_the_units_of_a_leaf_is_one_sum():
    """Beside it a leaf has the sum that is its norm, and again at another scale, and one that asks whether to."""
    tx = oc.clip_by_unit_norm(1.0)
    updates = [jax.ShapeDtypeStruct((64, 16), jnp.float32)] * 10
    text = jax.jit(tx.update).lower(updates, jax.eval_shape(tx.init, updates)).compile().as_text()
    assert len(re.findall(r" reduce\(", text)) == 4 * len(updates)


@pytest.mark.parametrize("name", ["global", "leaf", "unit", "agc"])
def test_the_second_pass_changes_nothing_where_it_is_not_needed(name):
    """Scaling gradients and parameters by a power of two, within the ordinary range or out of it, scales the result."""
    params = jax.tree.map(lambda s: jnp.ones(s), SHAPES, is_leaf=lambda s: isinstance(s, tuple))
    grads = jax.tree.map(
        lambda s: jax.random.normal(jax.random.key(1), s), SHAPES, is_leaf=lambda s: isinstance(s, tuple)
    )
    make = {"global": oc.clip_by_global_norm, "leaf": oc.clip_by_leaf_norm, "unit": oc.clip_by_unit_norm}
    results = []
    for scale in (1.0, 2.0**70, 2.0**-70):
        clip = make[name](scale) if name in make else oc.adaptive_grad_clip(0.01, eps=1e-3 * scale)
        scaled, weights = (jax.tree.map(lambda x: x * scale, tree) for tree in (grads, params))  # noqa: B023
        updates, _ = jax.jit(clip.update)(scaled, clip.init(weights), weights)
        results.append(jax.tree.map(lambda x: x / scale, updates))  # noqa: B023
    chex.assert_trees_all_close(results[0], results[1], rtol=1e-6)
    if name != "agc":  # which by its rule divides by at least 1e-6
        chex.assert_trees_all_close(results[0], results[2], rtol=1e-6)

"""Trees of parameters to measure on: dicts of shapes."""

import jax
import jax.numpy as jnp


def gpt(layers: int = 8, width: int = 512, vocabulary: int = 8192, context: int = 256) -> dict:
    """A GPT-like model: 29.5 M parameters in 67 leaves."""
    block = {
        "ln1": {"scale": (width,), "bias": (width,)},
        "attention": {"qkv": (width, 3 * width), "out": (width, width)},
        "ln2": {"scale": (width,), "bias": (width,)},
        "mlp": {"up": (width, 4 * width), "down": (4 * width, width)},
    }
    ends = {"tokens": (vocabulary, width), "positions": (context, width), "ln": (width,)}
    return {**ends, **{f"block{i}": block for i in range(layers)}}


def gpt_wide() -> dict:
    """A GPT-like model with large leaves, for accelerators: 1.5 G parameters in 99 leaves."""
    return gpt(layers=12, width=3072, vocabulary=50304, context=2048)


def resnet50() -> dict:
    """ResNet-50: 25.5 M parameters in 161 leaves."""
    shapes = {"stem": (7, 7, 3, 64), "stem_scale": (64,), "stem_bias": (64,)}
    inputs = 64
    for stage, (blocks, width) in enumerate(zip((3, 4, 6, 3), (64, 128, 256, 512))):
        for i in range(blocks):
            convs = {"a": (1, 1, inputs, width), "b": (3, 3, width, width), "c": (1, 1, width, 4 * width)}
            if i == 0:
                convs["shortcut"] = (1, 1, inputs, 4 * width)
            norms = {f"{name}_{part}": shape[-1:] for name, shape in convs.items() for part in ("scale", "bias")}
            shapes[f"stage{stage}_{i}"] = convs | norms
            inputs = 4 * width
    return shapes | {"head": (2048, 1000), "head_bias": (1000,)}


def small(leaves: int = 400) -> dict:
    """Many small leaves: after each vector two matrices."""
    return {f"leaf{i:04d}": (8, 8 + i % 9) if i % 3 else (8 + i % 9,) for i in range(leaves)}


TREES = {"gpt": gpt, "gpt_wide": gpt_wide, "resnet50": resnet50, "small": small}


def structs(shapes: dict, dtype=jnp.float32) -> dict:
    """Leaves of these shapes to compile with."""
    return jax.tree.map(lambda s: jax.ShapeDtypeStruct(s, dtype), shapes, is_leaf=lambda s: isinstance(s, tuple))


def random(shapes: dict, seed: int = 0, scale: float = 1e-2, dtype=jnp.float32) -> dict:
    """Normally distributed leaves of these shapes."""
    flat, treedef = jax.tree.flatten(structs(shapes, dtype))
    keys = jax.random.split(jax.random.key(seed), len(flat))
    return treedef.unflatten([(scale * jax.random.normal(k, x.shape)).astype(x.dtype) for k, x in zip(keys, flat)])

"""What the compilers for TPU v5e and H100 make of a whole AdamW step with a clip; no such device is needed.

Prints, relative to the bare step: the memory that the kernels of an ordinary step read and write (GPU), their estimated
cycles (TPU), the number of kernels, scratch, seconds of compile time, and the collectives of the step with the number
of entries that each carries. The second read of the gradients that overflow asks for stands in a branch that ordinary
steps do not take: it is left out, and its collectives are listed apart.

    pip install optax_clip[aot]
    python benchmarks/accelerators.py h100 v5e "v5e x 256, fsdp"
"""

import argparse
import collections
import functools
import json
import math
import os
import re
import time
from collections.abc import Iterator
from typing import NamedTuple

os.environ |= {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost"}
os.environ |= {"TPU_ACCELERATOR_TYPE": "v5litepod-4", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "TF_CPP_MIN_LOG_LEVEL": "3"}

import jax
import numpy as np
import optax
import trees
from jax.experimental import topologies
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from optimizers import OPTIMIZERS

H100 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152 shared_memory_per_core: 233472
  threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128 block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535 block_dim_limit_z: 65535 memory_bandwidth: 3352320000000 l2_cache_size: 52428800
  clock_rate_ghz: 1.98 device_memory_size: 84929347584 shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 } registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
platform_name: "CUDA" dnn_version_info { major: 9 minor: 7 } runtime_version { major: 12 minor: 8 patch: 0 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""


@functools.cache
def h100(count: int) -> list:
    """Devices to compile for."""
    return topologies.get_topology_desc("h100", "cuda", target_config=H100, topology=f"1x1x{count}").devices


@functools.cache
def v5e(topology: str) -> list:
    """Devices to compile for."""
    return topologies.get_topology_desc(platform="tpu", topology_name=f"v5e:{topology}").devices


def replicated(path: str, rank: int) -> P:
    """One device."""
    return P()


def fsdp(path: str, rank: int) -> P:
    """Matrices are spread along their first axis, vectors are everywhere."""
    return P("data") if rank > 1 else P()


def fsdp_and_tensor_parallel(path: str, rank: int) -> P:
    """Matrices are spread along both axes: columns by the model axis where they widen, rows where they narrow."""
    if rank < 2:
        return P()
    return P("model", "data") if any(name in path for name in ("out", "down", "tokens")) else P("data", "model")


class Target(NamedTuple):
    """Devices, the shape of the mesh, and how leaves are spread over it."""

    devices: tuple
    mesh: dict
    spec: object

    def sharding(self, path: str, rank: int) -> NamedSharding:
        count = math.prod(self.mesh.values())
        devices = np.array(self.devices[0](self.devices[1])[:count]).reshape(*self.mesh.values())
        return NamedSharding(jax.sharding.Mesh(devices, tuple(self.mesh)), self.spec(path, rank))


TARGETS = {
    "h100": Target((h100, 1), {"data": 1}, replicated),
    "h100 x 8, fsdp": Target((h100, 8), {"data": 8}, fsdp),
    "h100 x 8, fsdp x tensor": Target((h100, 8), {"data": 4, "model": 2}, fsdp_and_tensor_parallel),
    "v5e": Target((v5e, "2x2"), {"data": 1}, replicated),
    "v5e x 256, fsdp": Target((v5e, "16x16"), {"data": 256}, fsdp),
    "v5e x 256, fsdp x tensor": Target((v5e, "16x16"), {"data": 16, "model": 16}, fsdp_and_tensor_parallel),
}


class Report(NamedTuple):
    """What an ordinary step does, on each device."""

    bytes: int  # read and written by kernels
    cycles: int  # estimated; TPU only
    kernels: int
    scratch: int  # bytes
    collectives: dict  # name: number of entries that each carries
    rare_collectives: dict  # in branches that ordinary steps do not take
    seconds: float  # of tracing and compiling


BYTES = {"pred": 1, "bf16": 2, "f16": 2, "f32": 4, "s32": 4, "u32": 4, "f64": 8, "s64": 8, "u64": 8}
# Operations that start nothing on the device, or finish what another started.
FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "conditional", "partition-id"}
COLLECTIVE = re.compile(r"(all-reduce|all-gather|all-to-all|reduce-scatter|collective-permute)(-start)?$")


class Instruction(NamedTuple):
    """One line of a program."""

    name: str
    shape: str
    operation: str
    operands: list
    attributes: str

    @property
    def ordinary_branch(self) -> str:
        """The branch that a conditional takes where its predicate is false."""
        (name,) = re.findall(r"(?:false_computation=|branch_computations=\{)%?([\w.-]+)", self.attributes)
        return name

    @property
    def called(self) -> list[str]:
        """Computations that run as a part of this one in an ordinary step."""
        if self.operation == "conditional":
            return [self.ordinary_branch]
        return re.findall(r"(?:calls=|to_apply=|body=|condition=)%?([\w.-]+)", self.attributes)


def parse(text: str) -> dict[str, list[Instruction]]:
    """The computations of a program by name; the main one is ENTRY."""
    out: dict[str, list[Instruction]] = {}
    current: list[Instruction] = []
    for line in text.splitlines():
        if header := re.match(r"(ENTRY )?%?([\w.-]+) \(.*\{$", line):
            current = out.setdefault("ENTRY" if header[1] else header[2], [])
        elif found := re.match(r"\s+(?:ROOT )?%?([\w.-]+) = (.*?) ([a-z][\w-]*)\((.*)$", line):
            name, shape, operation, rest = found.groups()
            depth = np.cumsum([(c == "(") - (c == ")") for c in "(" + rest])
            end = int(np.argmin(depth))
            current.append(
                Instruction(name, shape, operation, re.findall(r"%([\w.-]+)", rest[: end - 1]), rest[end - 1 :])
            )
    return out


def entries(shape: str) -> list[tuple[str, int]]:
    """Type and number of entries of each array of a shape."""
    found = re.findall(r"\b([a-z]\w*)\[([\d,]*)\]", shape)
    return [(kind, math.prod(int(n) for n in sizes.split(",") if n)) for kind, sizes in found if kind in BYTES]


def ordinary(program: dict, name: str = "ENTRY", *, inside: bool = False) -> Iterator[Instruction]:
    """What runs in an ordinary step; with `inside` also what kernels are made of."""
    for instruction in program[name]:
        yield instruction
        if inside or instruction.operation in ("conditional", "call"):
            for called in instruction.called:
                yield from ordinary(program, called, inside=inside)


def collectives(instructions: list[Instruction]) -> dict[str, list[int]]:
    """The collectives among these, by name, with the number of entries of each."""
    out: dict[str, list[int]] = collections.defaultdict(list)
    for instruction in instructions:
        if found := COLLECTIVE.match(instruction.operation):
            sizes = sum(n for _, n in entries(instruction.shape))
            out[found[1]].append(sizes // 2 if found[2] and found[1] != "all-reduce" else sizes)
    return dict(out)


def report(compiled, seconds: float) -> Report:
    """Reads a compiled step."""
    program = parse(compiled.as_text())
    shapes = {i.name: i.shape for computation in program.values() for i in computation}
    kernels = [i for i in ordinary(program) if i.operation not in FREE and not i.operation.endswith("-done")]
    size = {name: sum(n * BYTES[kind] for kind, n in entries(shape)) for name, shape in shapes.items()}
    cycles = [re.search(r'"estimated_cycles":"(\d+)"', i.attributes) for i in kernels]
    often = list(ordinary(program, inside=True))
    names = {i.name for i in often}
    rare = [i for computation in program.values() for i in computation if i.name not in names]
    return Report(
        bytes=sum(size[i.name] + sum(size[name] for name in dict.fromkeys(i.operands)) for i in kernels),
        cycles=sum(int(found[1]) for found in cycles if found),
        kernels=sum(i.operation in ("fusion", "custom-call", "reduce", "copy") for i in kernels),
        scratch=compiled.memory_analysis().temp_size_in_bytes,
        collectives=collectives(often),
        rare_collectives=collectives(rare),
        seconds=seconds,
    )


def compiled(optimizer, target: Target, shapes: dict):
    """A step in place, for the devices of the target."""

    def step(params, state, grads):
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    def placed(path, x):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=target.sharding(jax.tree_util.keystr(path), x.ndim))

    params = trees.structs(shapes)
    params, state = (
        jax.tree_util.tree_map_with_path(placed, tree) for tree in (params, jax.eval_shape(optimizer.init, params))
    )
    return jax.jit(step, donate_argnums=(0, 1)).lower(params, state, params).compile()


def measure(optimizer, target: Target, shapes: dict) -> Report:
    """Compiles and reads a step."""
    start = time.perf_counter()
    program = compiled(optimizer, target, shapes)
    return report(program, time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("targets", nargs="*", default=list(TARGETS), help=", ".join(TARGETS))
    parser.add_argument("--names", nargs="*", default=list(OPTIMIZERS), help="names from the table")
    parser.add_argument("--layers", type=int, default=8, help="of the GPT-like tree")
    parser.add_argument("--json", action="store_true", help="one line a target and clip, for programs")
    arguments = parser.parse_args()
    shapes = trees.gpt(layers=arguments.layers)
    for name in arguments.targets:
        bare = None
        if not arguments.json:
            heads = f"{'bytes':>7} {'cycles':>7} {'kernels':>7} {'scratch':>9} {'compile':>8}"
            print(f"\n{name}\n{'':28} {heads}  collectives")
        for clip in dict.fromkeys(["bare", *arguments.names]):
            found = measure(OPTIMIZERS[clip], TARGETS[name], shapes)
            bare = bare or found
            if arguments.json:
                print(json.dumps([name, clip, found._asdict()]), flush=True)
                continue
            cycles = f"{found.cycles / bare.cycles:7.3f}" if bare.cycles else " " * 7
            print(
                f"{clip:28} {found.bytes / bare.bytes:7.3f} {cycles} {found.kernels:7} {found.scratch:9} "
                f"{found.seconds:7.1f}s  {found.collectives} rarely {found.rare_collectives}",
                flush=True,
            )


if __name__ == "__main__":
    main()

"""What the compilers for TPU v5e and H100 make of a whole AdamW step with a clip; no such device is needed.

Prints, relative to the bare step: the memory that the kernels of a step read and write (GPU) and their estimated cycles
(TPU); and the number of kernels, scratch, seconds of tracing and compiling, and the collectives of the step with the
number of entries that each carries. The last column has cycles and kernels relative to Optax's same clip.

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
from optimizers import COMPARED, NAMES, optimizer, with_compared

MAIN = [name for name in NAMES if name in COMPARED]
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
    """A topology to compile for, the shape of the mesh, and how leaves are spread over it."""

    topology: str
    mesh: dict
    spec: object


TARGETS = {
    "h100": Target("1x1x1", {"data": 1}, replicated),
    "h100 x 8, fsdp": Target("1x1x8", {"data": 8}, fsdp),
    "h100 x 8, fsdp x tensor": Target("1x1x8", {"data": 4, "model": 2}, fsdp_and_tensor_parallel),
    "v5e": Target("v5e:2x2", {"data": 1}, replicated),
    "v5e x 256, fsdp": Target("v5e:16x16", {"data": 256}, fsdp),
    "v5e x 256, fsdp x tensor": Target("v5e:16x16", {"data": 16, "model": 16}, fsdp_and_tensor_parallel),
}


@functools.cache
def devices(topology: str) -> list:
    """Devices to compile for, which need not be here."""
    if topology.startswith("v5e"):
        return topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    return topologies.get_topology_desc("h100", "cuda", target_config=H100, topology=topology).devices


def compiled(name: str, target: Target, shapes: dict):
    """A step in place, for the devices of the target."""
    count = math.prod(target.mesh.values())
    grid = np.array(devices(target.topology)[:count]).reshape(*target.mesh.values())
    mesh = jax.sharding.Mesh(grid, tuple(target.mesh))

    def placed(path, x):
        spec = target.spec(jax.tree_util.keystr(path), x.ndim)
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))

    params = trees.structs(shapes)
    tx = optimizer(name, params)
    state = jax.eval_shape(tx.init, params)
    params, state = (jax.tree_util.tree_map_with_path(placed, tree) for tree in (params, state))

    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return jax.jit(step, donate_argnums=(0, 1)).lower(params, state, params).compile()


class Report(NamedTuple):
    """What a step does, on each device."""

    bytes: int  # read and written by kernels
    cycles: int  # estimated; TPU only
    kernels: int
    scratch: int  # bytes
    collectives: dict  # name: number of entries that each carries
    seconds: float  # of tracing and compiling


BYTES = {"pred": 1, "bf16": 2, "f16": 2, "f32": 4, "s32": 4, "u32": 4, "f64": 8, "s64": 8, "u64": 8}
# Operations that start nothing on the device, or finish what another started.
FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id"}
FREE |= {"call", "conditional"}  # what they call is counted
COLLECTIVE = re.compile(r"(all-reduce|all-gather|all-to-all|reduce-scatter|collective-permute)(-start)?$")


class Instruction(NamedTuple):
    """One line of a program."""

    name: str
    shape: str
    operation: str
    operands: list
    attributes: str


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
            operands = re.findall(r"%([\w.-]+)", rest[: end - 1])
            current.append(Instruction(name, shape, operation, operands, rest[end - 1 :]))
    return out


def run(program: dict, computation: str = "ENTRY") -> list[Instruction]:
    """What a step runs: of a conditional (`optax.apply_if_finite` has one on TPU) the branch with the work in it."""
    out = []
    for instruction in program[computation]:
        out.append(instruction)
        if instruction.operation in ("call", "conditional"):
            names = [name for name in re.findall(r"[\w.-]+", instruction.attributes) if name in program]
            out += run(program, max(names, key=lambda name: len(program[name])))
    return out


def entries(shape: str) -> list[tuple[str, int]]:
    """Type and number of entries of each array of a shape."""
    found = re.findall(r"\b([a-z]\w*)\[([\d,]*)\]", shape)
    return [(kind, math.prod(int(n) for n in sizes.split(",") if n)) for kind, sizes in found if kind in BYTES]


def collectives(program: dict) -> dict[str, list[int]]:
    """The collectives, by name, with the number of entries of each."""
    out: dict[str, list[int]] = collections.defaultdict(list)
    for instruction in (i for computation in program.values() for i in computation):
        if found := COLLECTIVE.match(instruction.operation):
            sizes = sum(n for _, n in entries(instruction.shape))
            out[found[1]].append(sizes // 2 if found[2] and found[1] != "all-reduce" else sizes)
    return dict(out)


def measure(name: str, target: Target, shapes: dict) -> Report:
    """Compiles and reads a step."""
    start = time.perf_counter()
    executable = compiled(name, target, shapes)
    seconds = time.perf_counter() - start
    program = parse(executable.as_text())
    instructions = run(program)
    kernels = [i for i in instructions if i.operation not in FREE and not i.operation.endswith("-done")]
    size = {i.name: sum(n * BYTES[kind] for kind, n in entries(i.shape)) for i in instructions}
    cycles = [re.search(r'"estimated_cycles":"(\d+)"', i.attributes) for i in kernels]
    return Report(
        bytes=sum(size[i.name] + sum(size[name] for name in dict.fromkeys(i.operands)) for i in kernels),
        cycles=sum(int(found[1]) for found in cycles if found),
        kernels=sum(i.operation in ("fusion", "custom-call", "reduce", "copy") for i in kernels),
        scratch=executable.memory_analysis().temp_size_in_bytes,
        collectives=collectives(program),
        seconds=seconds,
    )


def show(name: str, reports: dict[str, Report]) -> None:
    """Prints a line."""
    found, bare = reports[name], reports["bare"]
    cycles = f"{found.cycles / bare.cycles:7.3f}" if bare.cycles else " " * 7
    line = (
        f"{name:28} {found.bytes / bare.bytes:7.3f} {cycles} {found.kernels:7} {found.scratch:9} {found.seconds:7.1f}s"
    )
    if name in COMPARED:
        other = reports[COMPARED[name]]
        ratios = [f"kernels {found.kernels / other.kernels:.2f}"]
        ratios += [f"cycles {found.cycles / other.cycles:.3f}"] if other.cycles else []
        line += f"  {', '.join(ratios)} of {COMPARED[name]}"
    print(line, found.collectives or "", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("targets", nargs="*", default=["h100", "v5e"], help=", ".join(TARGETS))
    parser.add_argument("--names", nargs="*", default=MAIN, help=f"of: {', '.join(NAMES)}", metavar="NAME")
    parser.add_argument("--layers", type=int, default=8, help="of the GPT-like tree")
    parser.add_argument("--json", action="store_true", help="one line a target and clip, for programs")
    arguments = parser.parse_args()
    shapes = trees.gpt(layers=arguments.layers)
    for target in arguments.targets:
        if not arguments.json:
            heads = f"{'bytes':>7} {'cycles':>7} {'kernels':>7} {'scratch':>9} {'compile':>8}"
            print(f"\n{target}\n{'':28} {heads}  compared with, collectives")
        reports: dict[str, Report] = {}
        for name in with_compared(arguments.names):
            reports[name] = measure(name, TARGETS[target], shapes)
            if arguments.json:
                print(json.dumps([target, name, reports[name]._asdict()]), flush=True)
            else:
                show(name, reports)


if __name__ == "__main__":
    main()

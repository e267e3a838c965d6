"""What the compilers for TPU and H100 make of a step, on any machine; and one exported program for all platforms."""

import concurrent.futures
import importlib.util
import json
import pathlib
import subprocess
import sys

import chex
import clips
import jax
import pytest
import trees

import optax_clip as oc

SCRIPT = pathlib.Path(__file__).parents[1] / "benchmarks" / "accelerators.py"
COMPILERS = {"v5e": "libtpu", "h100": "jax_cuda12_plugin"}
GLOBAL = ["clip_by_global_norm", "autoclip", "zclip", "clip_by_sigma", "clip_by_norm_range"]
WHOLE = [*GLOBAL, "clip_by_leaf_norm", "adagc", "clip_by_group_norm", "clip_by_block_rms"]
UNITS = ["clip_by_unit_norm", "adaptive_grad_clip"]
EIGHTH = 8 / 7  # AdamW reads four arrays and writes three; a norm reads one more
PASSES = {  # reads and writes of an array as large as the parameters, beside the seven of AdamW
    "clip_by_magnitude": 0,
    "clip_weights": 0,
    "prune_weights": 0,
    "project_weights": 0,
    "clip_randomly(clip)": 0,
    "clip_randomly(global)": 1,
    "with_error_feedback(clip)": 2,  # of the carry
    "with_error_feedback(global)": 4,  # and for the norm of updates and carry
    "skip_spikes": 1,
    "skip_spikes, global": 1,
}
OPTAX = ["optax.clip_by_global_norm", "optax.adaptive_grad_clip", "optax.clip_by_block_rms"]
# On meshes, one of those that differ in nothing but what they compute from the same sums.
WHOLE_ON_MESH = ["clip_by_global_norm", "autoclip", "clip_by_leaf_norm", "adagc", "clip_by_group_norm"]
WRAPPED_ON_MESH = ["clip_weights", "clip_randomly(global)", "with_error_feedback(global)", "skip_spikes, global"]
SPREAD = ["v5e x 256, fsdp", "v5e x 256, fsdp x tensor", "h100 x 8, fsdp x tensor"]
COMPILED = {
    "h100": [*WHOLE, *UNITS, "clip", *PASSES, *OPTAX],
    "v5e": [*GLOBAL, "adaptive_grad_clip", "clip_by_block_rms", *OPTAX],
    **{key: [*WHOLE_ON_MESH, *UNITS, "clip", *WRAPPED_ON_MESH, *OPTAX[:2]] for key in SPREAD},
}


@pytest.fixture(scope="module")
def reports():
    """From target and clip to a report; both compilers at work side by side."""
    present = [kind for kind, package in COMPILERS.items() if importlib.util.find_spec(package)]

    def read(kind):
        found = {}
        for target, names in COMPILED.items():
            if target.startswith(kind):
                words = [sys.executable, str(SCRIPT), "--json", "--layers", "2", target, "--names", *names]
                done = subprocess.run(words, capture_output=True, text=True)
                assert not done.returncode, done.stderr
                lines = map(json.loads, done.stdout.splitlines())
                found |= {(target, clip): fields for _, clip, fields in lines}
        return found

    with concurrent.futures.ThreadPoolExecutor() as pool:
        return {key: fields for found in pool.map(read, present) for key, fields in found.items()}


def of(reports, target: str, *names: str) -> list[dict]:
    """The reports of these clips; skips where the compiler is missing."""
    if (target, "bare") not in reports:
        pytest.skip("the compilers are missing: install optax_clip[aot]")
    return [reports[target, name] for name in names]


@pytest.mark.parametrize("name", [*WHOLE, "adaptive_grad_clip", "clip"])
def test_h100_reads_what_it_must(reports, name):
    """A norm costs one more read of the gradients, AGC one more of the parameters, a value clip none."""
    bare, clip = of(reports, "h100", "bare", name)
    floor = {"adaptive_grad_clip": 9 / 7, "clip": 1.0}.get(name, EIGHTH)
    assert clip["bytes"] <= 1.01 * floor * bare["bytes"]


@pytest.mark.parametrize("name", PASSES)
def test_h100_wrappers_and_clips_of_weights(reports, name):
    """Draws take no memory, shares are counted where weights are written, a carry is read and written once."""
    bare, wrapped = of(reports, "h100", "bare", name)
    assert wrapped["bytes"] <= 1.01 * (1 + PASSES[name] / 7) * bare["bytes"]
    assert wrapped["scratch"] <= 0.01 * bare["bytes"] / 7


@pytest.mark.parametrize("name", WRAPPED_ON_MESH)
@pytest.mark.parametrize("target", SPREAD)
def test_wrappers_and_clips_of_weights_gather_nothing(reports, target, name):
    """On a mesh only sums travel: of norms, and of shares."""
    (report,) = of(reports, target, name)
    assert set(report["collectives"]) | set(report["rare_collectives"]) <= {"all-reduce"}


@pytest.mark.parametrize(
    ("name", "most"), [("clip_by_global_norm", 1.08), ("clip_by_block_rms", 1.0), ("adaptive_grad_clip", 1.08)]
)
def test_h100_runs_few_kernels(reports, name, most):
    """Hardly more kernels than with Optax's clip, in a small model: the metrics take a few, whatever its size."""
    ours, optax = of(reports, "h100", name, f"optax.{name}")
    assert ours["kernels"] <= most * optax["kernels"]


@pytest.mark.parametrize("name", GLOBAL)
def test_tpu_cycles(reports, name):
    """A global clip, adaptive or not, takes the cycles of Optax's, and at most twice its scratch."""
    ours, optax = of(reports, "v5e", name, "optax.clip_by_global_norm")
    assert ours["cycles"] <= 1.03 * optax["cycles"]  # what the window of autoclip takes does not grow with the model
    assert ours["scratch"] <= 2 * optax["scratch"]


@pytest.mark.parametrize("name", ["adaptive_grad_clip", "clip_by_block_rms"])
def test_tpu_scratch(reports, name):
    """At most twice that of Optax's clip."""
    ours, optax = of(reports, "v5e", name, f"optax.{name}")
    assert ours["scratch"] <= 2 * optax["scratch"]


@pytest.mark.parametrize("name", [*WHOLE_ON_MESH, *UNITS, "clip"])
@pytest.mark.parametrize("target", SPREAD)
def test_only_sums_travel(reports, target, name):
    """Nothing is gathered, not even in rare steps."""
    (report,) = of(reports, target, name)
    assert set(report["collectives"]) <= {"all-reduce"}
    assert set(report["rare_collectives"]) <= {"all-reduce"}
    assert name != "clip" or not report["collectives"]


@pytest.mark.parametrize("name", WHOLE_ON_MESH)
@pytest.mark.parametrize("target", SPREAD)
def test_one_sum_for_a_whole_clip(reports, target, name):
    """All norms of whole leaves travel in one all-reduce (on TPU, one for each order in which leaves name the axes)."""
    report, optax = of(reports, target, name, "optax.clip_by_global_norm")
    sums = report["collectives"]["all-reduce"]
    assert len(sums) == (len(optax["collectives"]["all-reduce"]) if target.startswith("v5e") else 1)
    assert sum(sums) <= 2 * 15  # two numbers for each of the leaves that are spread


@pytest.mark.parametrize("name", UNITS)
@pytest.mark.parametrize("target", SPREAD)
def test_units_take_few_sums(reports, target, name):
    """Beside the norms of the units themselves, the metrics take one more sum where units are spread."""
    report, optax = of(reports, target, name, "optax.adaptive_grad_clip")
    metrics = 1 if "tensor" in target else 0
    assert len(report["collectives"]["all-reduce"]) <= len(optax["collectives"]["all-reduce"]) + metrics


EXPORTED = [
    *((case.name, lambda case=case: case.make(0.5)) for case in clips.CLIPS),
    *((name, getattr(oc, name)) for name in ("autoclip", "zclip", "adagc", "clip_by_sigma")),
]


@pytest.mark.parametrize("make", [make for _, make in EXPORTED], ids=[name for name, _ in EXPORTED])
def test_export(make):
    """One exported program runs on all platforms: saved, loaded and called here, it gives the same bits."""
    tx, updates = make(), trees.sample(0, 3.0)
    state = tx.init(updates)
    treedef = jax.tree.structure((updates, state))

    @jax.jit
    def step(*leaves):
        updates, state = jax.tree.unflatten(treedef, leaves)
        return jax.tree.leaves(tx.update(updates, state, updates))

    leaves = jax.tree.leaves((updates, state))
    exported = jax.export.export(step, platforms=("cpu", "cuda", "tpu"))(*leaves)
    loaded = jax.export.deserialize(exported.serialize())
    assert set(loaded.platforms) == {"cpu", "cuda", "tpu"}
    chex.assert_trees_all_close(jax.jit(loaded.call)(*leaves), step(*leaves), rtol=1e-6)

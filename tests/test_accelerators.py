"""What the compilers for the H100 and the TPU v5e make of an AdamW step with a clip, on any machine."""

import importlib.util
import json
import pathlib
import subprocess
import sys

import pytest

SCRIPT = pathlib.Path(__file__).parents[1] / "benchmarks" / "accelerators.py"
COMPILERS = {"h100": "jax_cuda12_plugin", "v5e": "libtpu"}
OPTAX = {  # the same clip of Optax, or one that reads as much
    "clip_by_global_norm": "optax.clip_by_global_norm",
    "zclip": "optax.clip_by_global_norm",
    "clip_by_leaf_norm": "optax.clip_by_block_rms",
    "adagc": "optax.clip_by_block_rms",
    "clip_by_block_rms": "optax.clip_by_block_rms",
    "adaptive_grad_clip": "optax.adaptive_grad_clip",
}
WHOLE = list(OPTAX)[:5]
pytestmark = pytest.mark.full


def reports(target: str, *names: str) -> dict:
    """From a name to what a step does. The script runs in a process of its own, which needs other settings."""
    if importlib.util.find_spec(COMPILERS[target.split()[0]]) is None:
        pytest.skip("the compilers are missing: install optax_clip[aot]")
    words = [sys.executable, str(SCRIPT), "--json", target, "--names", *names]
    done = subprocess.run(words, capture_output=True, text=True)
    assert not done.returncode, done.stderr
    return {name: fields for _, name, fields in map(json.loads, done.stdout.splitlines())}


def test_h100_reads_what_it_must_in_few_kernels():
    """A norm costs one more read of the gradients, AGC one more of the parameters, in about the kernels of Optax."""
    found = reports("h100", "clip", *WHOLE, "adaptive_grad_clip")
    passes = {"clip": 7, **dict.fromkeys(WHOLE, 8), "adaptive_grad_clip": 9}  # AdamW reads four arrays, writes three
    traffic = {name: 7 * found[name]["bytes"] / found["bare"]["bytes"] for name in passes}
    assert {name: got for name, got in traffic.items() if got > 1.01 * passes[name]} == {}
    kernels = {name: found[name]["kernels"] / found[OPTAX[name]]["kernels"] for name in passes if name in OPTAX}
    most = {"adaptive_grad_clip": 1.25}
    assert {name: got for name, got in kernels.items() if got > most.get(name, 1.1)} == {}


def test_eight_h100_send_sums_only():
    """Norms of all leaves travel in one sum, those of units in at most two, and nothing is gathered."""
    found = reports("h100 x 8, fsdp", "clip", "clip_by_global_norm", "adagc", "adaptive_grad_clip")
    sent = {name: fields["collectives"] for name, fields in found.items() if not name.startswith("optax")}
    assert {name: kinds for name, kinds in sent.items() if set(kinds) - {"all-reduce"}} == {}
    most = {"bare": 0, "clip": 0, "adaptive_grad_clip": 2}
    sums = {name: len(kinds.get("all-reduce", ())) for name, kinds in sent.items()}
    assert {name: got for name, got in sums.items() if got > most.get(name, 1)} == {}


def test_tpu_cycles():
    """A clip takes about the cycles of Optax's."""
    names = ["clip_by_global_norm", "clip_by_leaf_norm", "adaptive_grad_clip"]
    found = reports("v5e", *names)
    cycles = {name: found[name]["cycles"] / found[OPTAX[name]]["cycles"] for name in names}
    assert {name: got for name, got in cycles.items() if got > 1.1} == {}


def test_skipping_costs_no_more_than_that_of_optax():
    """`skip_spikes` moves no more memory on an H100 than `optax.apply_if_finite`, and takes fewer cycles on a v5e."""
    h100, v5e = (reports(target, "skip_spikes") for target in ("h100", "v5e"))
    assert h100["skip_spikes"]["bytes"] <= 1.001 * h100["optax.apply_if_finite"]["bytes"]
    assert v5e["skip_spikes"]["cycles"] < v5e["optax.apply_if_finite"]["cycles"]

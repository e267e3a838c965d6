"""Two processes that train on one mesh: they agree with one process, which goes on from their checkpoint."""

import os
import pathlib
import pickle
import socket
import subprocess
import sys
import time

import chex
import jax
import process
import pytest

pytestmark = pytest.mark.full

ROOT = pathlib.Path(__file__).parents[1]
SECONDS = 120


def environment() -> dict[str, str]:
    """Ours without settings of jax, and without proxies: gRPC would look for the loopback behind them."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "XLA_")) and "_proxy" not in k.lower()}
    devices = "--xla_force_host_platform_device_count=2"
    return kept | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": devices, "PYTHONPATH": str(ROOT)}


def run_both(folder: pathlib.Path) -> list:
    """What each of the two processes reports."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    logs = [folder / f"{i}.log" for i in range(2)]
    workers = []
    try:
        for i, log in enumerate(logs):
            command = [sys.executable, process.__file__, address, str(i), str(folder)]
            with log.open("w") as out:
                workers.append(subprocess.Popen(command, stdout=out, stderr=out, cwd=ROOT, env=environment()))
        deadline = time.monotonic() + SECONDS
        # Until both have ended, or one has failed, for which the other would wait.
        while None in (codes := [w.poll() for w in workers]) and not any(codes) and time.monotonic() < deadline:
            time.sleep(0.05)
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()
    said = [
        f"process {i}: exit code {code} (None: stopped)\n{log.read_text(errors='replace')}"
        for i, (code, log) in enumerate(zip(codes, logs))
    ]
    assert codes == [0, 0], "\n".join(said)
    return [pickle.loads((folder / f"{i}.pickle").read_bytes()) for i in range(2)]


@pytest.mark.skipif(sys.platform == "win32", reason="jax has no collectives between CPU processes there")
def test_two_processes_train_as_one_and_one_goes_on_from_their_checkpoint(tmp_path):
    """Both processes report what one process computes, and one goes on from what both saved, bit for bit."""
    checkpoint = pytest.importorskip("orbax.checkpoint")
    report, other = run_both(tmp_path)
    chex.assert_trees_all_equal(report, other)
    (held, ended), metrics = report

    steps = range(process.SAVED, process.STEPS)
    middle, first = process.train(*process.start(), range(process.SAVED))
    end, rest = process.train(*middle, steps)
    # Processes add partial sums in another order: a few units in the last place, which weigh more where addends cancel.
    close = {"rtol": 1e-5, "atol": 1e-7}
    chex.assert_trees_all_close(metrics, first + rest, rtol=1e-5)
    chex.assert_trees_all_close((held, ended), (middle, end), **close)
    assert [i for i, scalars in enumerate(metrics) if scalars["clip/scale"] < 1] == process.SPIKES
    assert metrics[-1]["clip/clip_rate"] > 0

    with checkpoint.StandardCheckpointer() as checkpointer:
        restored = checkpointer.restore(tmp_path / "checkpoint", middle)
    chex.assert_trees_all_equal(restored, held, strict=True)
    handed = jax.tree.map(lambda x, like: jax.device_put(x, like.sharding), held, middle)
    goes_on = process.train(*restored, steps)
    chex.assert_trees_all_equal(goes_on, process.train(*handed, steps), strict=True)
    chex.assert_trees_all_close(goes_on[0], ended, **close)

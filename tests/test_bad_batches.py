"""The benchmark with bad batches: they are where it says, the same for every method, and every method has a row."""

import importlib.util
import pathlib

import chex
import jax
import numpy as np
import optax
import pytest

pytestmark = pytest.mark.full

STEPS, SEEDS, RATE = 21, 2, 0.2


@pytest.fixture(scope="module")
def bench():
    """The script as a module."""
    path = pathlib.Path(__file__).parents[1] / "benchmarks" / "bad_batches.py"
    spec = importlib.util.spec_from_file_location("bad_batches", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def kinds(bench):
    """What is wrong with each batch, for two seeds."""
    return np.stack([bench.plan(STEPS, RATE, seed) for seed in range(SEEDS)])


@pytest.fixture(scope="module")
def data(bench):
    """The digits."""
    return bench.demo.digits()


def test_plan_has_the_bad_steps_that_were_asked_for(bench, kinds):
    """Half of the bad steps are shuffled and half scaled, one in the middle is NaN, and seeds have their own."""
    for row in kinds:
        assert [(row == kind).sum() for kind in (bench.GOOD, bench.SHUFFLED, bench.SCALED, bench.NAN)] == [16, 2, 2, 1]
        assert row[STEPS // 2] == bench.NAN
    assert (kinds[0] != kinds[1]).any()
    chex.assert_trees_all_equal(kinds[0], bench.plan(STEPS, RATE, 0))


def test_batches_are_spoiled_in_one_way_each(bench, data):
    """A good batch is that of the demo; a bad one differs from it in what its kind says and in nothing else."""
    key = jax.random.key(0)
    images, labels = bench.demo.batch_of(data, key, 3)
    batches = {
        kind: bench.batch_of(data, key, 3, kind) for kind in (bench.GOOD, bench.SHUFFLED, bench.SCALED, bench.NAN)
    }
    chex.assert_trees_all_equal(batches[bench.GOOD], (images, labels))
    chex.assert_trees_all_equal(batches[bench.SCALED], (images * bench.FACTOR, labels))
    chex.assert_trees_all_equal(batches[bench.NAN], (images.at[0, 0].set(np.nan), labels))
    chex.assert_trees_all_equal(batches[bench.SHUFFLED][0], images)
    shuffled = batches[bench.SHUFFLED][1]
    assert (shuffled != labels).mean() > 0.5
    chex.assert_trees_all_equal(np.sort(shuffled), np.sort(labels))


def test_every_method_sees_the_same_bad_batches_where_the_plan_has_them(bench, kinds, data, monkeypatch):
    """With parameters that stay as they are, losses differ from those of good batches in bad steps only, and alike."""
    monkeypatch.setattr(bench.demo, "SGD", optax.scale(0.0))
    chosen = [method for method in bench.methods(1.0) if method.name in ("fixed", "`skip_spikes(..., z_score())`")]
    results = [bench.results_of(method, data, kinds) for method in chosen]
    for result in results:
        chex.assert_trees_all_equal(~np.isclose(result.bad.loss, result.clean.loss, rtol=1e-5), kinds != bench.GOOD)
        chex.assert_trees_all_equal(np.isnan(result.bad.loss), kinds == bench.NAN)
        chex.assert_trees_all_close(result.bad.loss, results[0].bad.loss, rtol=1e-5)
        # These norms are no spikes and the rule is in warm-up: nothing but the NaN is skipped.
        chex.assert_trees_all_equal(result.bad.skipped, kinds == bench.NAN)
        assert not result.clean.skipped.any() and not result.bad.broken.any()
    fixed, skips = results
    chex.assert_trees_all_equal(fixed.bad.clipped, fixed.bad.norm > 1.0)
    assert skips.alone is skips.bad
    # Without skip_spikes the NaN goes into the parameters, and stays.
    assert fixed.alone.broken.all() and np.isnan(fixed.alone.loss[:, STEPS // 2 :]).all()
    chex.assert_trees_all_close(*(run.loss[:, : STEPS // 2] for run in (fixed.alone, fixed.bad)), rtol=1e-5)


def test_table_has_a_row_for_each_method(bench, kinds):
    """Name, accuracy in three settings, what was clipped and skipped; the legend names the steps."""
    none = np.zeros(kinds.shape, bool)
    run = bench.Run(np.array([0.5, 0.7]), 1.0 * none, 1.0 + none, none, kinds == bench.NAN, np.array([False, True]))
    clips = run._replace(clipped=kinds == bench.SCALED, skipped=kinds >= bench.SCALED, broken=np.zeros(2, bool))
    methods = bench.methods(1.0)
    results = [bench.Result(method, run, clips if i else run, run) for i, method in enumerate(methods)]
    header, rule, *rows = bench.table(results, kinds).splitlines()
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in (header, rule, *rows)]
    assert {len(row) for row in cells} == {8}
    assert [row[0] for row in cells[2:]] == [method.name for method in methods]
    assert cells[2][1:4] == ["60.0 (50.0 to 70.0), 1 of 2 NaN"] * 3
    assert cells[2][4:] == ["-", "-", "0.0", "1"]
    assert cells[3][2] == "60.0 (50.0 to 70.0)"
    assert cells[3][4:7] == ["0.0 / 0.0 / 100.0", "0.0 / 0.0 / 100.0", "10.0"]
    legend = bench.legend(results, kinds, 1.0)
    assert "2 seeds, 21 steps" in legend and "step 10 has a" in legend and f"jax {jax.__version__}" in legend

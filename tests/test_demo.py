"""The demo: it trains on real data, its network explodes without a clip, and it draws what happened."""

import importlib.util
import pathlib

import chex
import jax
import numpy as np
import pytest

pytestmark = pytest.mark.full

STEPS = 400


@pytest.fixture(scope="module")
def demo():
    """The script as a module, with the first seed only, which explodes within `STEPS` steps."""
    path = pathlib.Path(__file__).parents[1] / "scripts" / "demo.py"
    spec = importlib.util.spec_from_file_location("demo", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.SEEDS = module.SEEDS[:1]
    return module


@pytest.fixture(scope="module")
def results(demo):
    """The methods and what training with each did."""
    return demo.compare(demo.digits(), STEPS)


def test_data_are_the_digits_split_without_overlap(demo):
    """Three quarters of the 1797 images are for training, a quarter for testing, all with pixels from 0 to 1."""
    data = demo.digits()
    images = np.concatenate([data["train"][0], data["test"][0]])
    chex.assert_shape([images, data["train"][0], data["test"][0]], [(1797, 64), (1347, 64), (450, 64)])
    assert images.min() == 0 and images.max() == 1
    assert set(np.unique(data["test"][1])) == set(range(10))


def test_every_method_reports_every_seed_and_step(results):
    """A run holds one row for each seed and one column for each step, in f32."""
    methods, runs = results
    assert [method.name for method in methods] == ["no clip", "value", "global norm", "leaf norm", "AGC"]
    for run in runs:
        chex.assert_shape([run.loss, run.norm], (1, STEPS))
        chex.assert_shape([run.accuracy, run.clip_rate], (1,))
        chex.assert_type([run.loss, run.norm], np.float32)


def test_methods_start_alike(results):
    """All methods see the same first batch from the same parameters."""
    _, runs = results
    first = [(run.loss[:, 0], run.norm[:, 0]) for run in runs]
    chex.assert_trees_all_close(*first, rtol=1e-5)


def test_gradients_explode_without_a_clip_only(results):
    """Without a clip a gradient is far above the bound and the network learns less than with any clip."""
    methods, (plain, *clipped) = results
    bound = next(method.bound for method in methods if method.name == "global norm")
    assert not plain.norm.max() < 10 * bound
    chex.assert_tree_all_finite([run._asdict() for run in clipped])
    for run in clipped:
        assert run.accuracy.mean() > plain.accuracy.mean()
        assert run.loss[:, -50:].mean() < plain.loss[:, -50:].mean()
        assert 0 < run.clip_rate.mean() <= 1
    assert plain.clip_rate.mean() == 0


def test_bounds_let_the_same_norm_through(demo, results):
    """A gradient at the bound of a clip throughout has the norm of the budget, whatever the clip."""
    (_, value, whole, leaf, share), _ = results
    params = demo.first_params(jax.random.key(0))
    ones = jax.tree.map(np.ones_like, params)
    per_leaf = jax.tree.map(lambda x: x / np.sqrt(x.size), ones)
    at_bound = [(value, ones), (whole, None), (leaf, per_leaf), (share, params)]
    for method, tree in at_bound:
        norm = 1.0 if tree is None else np.sqrt(sum(np.sum(np.square(x)) for x in jax.tree.leaves(tree)))
        chex.assert_trees_all_close(float(method.bound * norm), whole.bound, rtol=1e-5)


def test_costs_and_table_have_a_line_for_each_method(demo, results):
    """The cost is finite with a positive noise, and each method has its line in the table."""
    methods, runs = results
    cost, noise = demo.costs(methods[:1], demo.digits(), steps=1, rounds=3)
    chex.assert_shape([cost, noise], (1,))
    chex.assert_tree_all_finite([cost, noise])
    assert noise > 0 and noise >= -cost
    lines = demo.table(methods, runs, [0.5] * 5, [1.0] * 5).splitlines()
    assert [line[:12].strip() for line in lines[1:6]] == [method.name for method in methods]
    assert all(line.endswith("+0.5%, within the noise of 1.0%") for line in lines[1:6])


def test_figure_is_drawn_with_and_without_values_that_are_not_finite(demo, results, tmp_path):
    """The figure is a PNG; a run that turns to inf and NaN is drawn and listed without a warning."""
    methods, (plain, *clipped) = results
    loss, norm = plain.loss.copy(), plain.norm.copy()
    loss[:, 200:], norm[:, 199], norm[:, 200:] = np.nan, np.inf, np.nan
    broken = plain._replace(loss=loss, norm=norm)
    for name, run in (("whole", plain), ("broken", broken)):
        demo.draw(methods, [run, *clipped], tmp_path / f"{name}.png")
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert " nan " in demo.table(methods, [broken, *clipped], [0.0] * 5, [1.0] * 5)

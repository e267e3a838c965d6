"""The package as a whole: its public list, signatures, layout, docstrings, and what an import needs."""

import ast
import graphlib
import importlib
import importlib.metadata
import inspect
import json
import pathlib
import re
import subprocess
import sys

import pytest

import optax_clip
from optax_clip import plot, responses, thresholds

FOLDER = pathlib.Path(optax_clip.__file__).parent  # of the package, wherever it is installed
ROOT = pathlib.Path(__file__).parents[1]
# A module imports only from its own room and from rooms after it.
ROOMS = ["__main__", "plot", "tools", "wrappers", "optimizers", "backward", "weights", "clips"]
ROOMS += ["norms", "responses", "thresholds", "_engine"]
MODULES = {  # path by name, a room with several files under its own name
    ".".join(path.relative_to(FOLDER).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(FOLDER.rglob("*.py"))
}

SIGNATURES = {
    optax_clip: [
        "clip(max_delta)",
        "clip_by_value(min_value, max_value=Ellipsis)",
        "clip_by_magnitude(min_magnitude, max_magnitude)",
        "clip_by_global_norm(max_norm, *, ord=None, axis_name=None, response=None)",
        "clip_by_leaf_norm(max_norm, *, ord=None, axis_name=None, response=None)",
        "clip_by_unit_norm(max_norm, axis=None, *, ord=None, axis_name=None, response=None)",
        "clip_by_block_rms(threshold, *, axis=None, axis_name=None, response=None)",
        "clip_by_group_norm(max_norms, labels, *, ord=None, axis_name=None, response=None)",
        "clip_by_norm_range(min_norm, max_norm, *, norm=None, axis_name=None)",
        "adaptive_grad_clip(clipping, eps=0.001, axis=None, *, axis_name=None, response=None)",
        "autoclip(percentile=10.0, window=1024, *, norm=None, axis_name=None, response=None)",
        "zclip(z_max=2.5, decay=0.97, warmup_steps=25, *, spike='rescale', factor=None, "
        "norm=None, axis_name=None, response=None)",
        "adagc(max_norm=1.0, max_ratio=1.05, decay=0.98, warmup_steps=100, *, "
        "norm=None, axis_name=None, response=None)",
        "clip_by_sigma(sigmas=3.0, window=128, *, norm=None, axis_name=None, response=None)",
        "stable_spam(decay_max=0.999, decay_mean=0.7, decay_square=0.9, eps=1e-08, *, axis_name=None)",
        "clip_weights(max_value)",
        "clip_weight_norm(max_norm, axis=None, *, ord=None, axis_name=None, response=None)",
        "prune_weights(threshold)",
        "rescale_weights(low, high, *, axis_name=None)",
        "project_weights(projection)",
        "hold_weight_norm(norm=None, *, axis_name=None)",
        "clip_qk(parts, max_logit=100.0, *, axis_name=None)",
        "QK(attention, axis, share, heads)",
        "skip_spikes(inner, threshold=None, *, norm=None, axis_name=None, value_threshold=None, max_consecutive=100)",
        "with_error_feedback(clip, *, accumulator_dtype=None)",
        "clip_randomly(clip, probability, seed=0, *, per='element')",
        "per_example(max_norm, *, norm=None, response=None, reduce='mean')",
        "clip_backward(x, clip)",
        "scale_by_stable_adam(b1=0.9, b2=0.999, eps=1e-08, eps_root=0.0, mu_dtype=None, *, "
        "nesterov=False, max_rms=1.0, axis_name=None)",
        "clip_metrics(opt_state, prefix='')",
        "ClipState(clip_step, norm, threshold, clip_scale, clipped, clip_rate, rule)",
        "SkipState(total_skipped, consecutive_skipped, measured, measured_value, inner_state)",
        "worst_leaves(tree, k=5)",
        "replay(clip, norms)",
        "suggest_threshold(norms)",
        "clip_by_norm(norm, threshold, response=None)",
        "global_norm(updates, *, ord=None, axis_name=None)",
        "leaf_norm(updates, *, ord=None, axis_name=None)",
        "unit_norm(updates, *, ord=None, axis=None, axis_name=None)",
        "block_rms(updates, *, axis=None, axis_name=None)",
        "group_norm(labels, *, ord=None, axis_name=None)",
        "thresholds",
        "responses",
    ],
    thresholds: [
        "z_score(z_max=2.5, decay=0.97, warmup_steps=25, *, spike='rescale', factor=None)",
        "quantile(percentile=10.0, window=1024)",
        "tracked_quantile(percentile=90.0, rate=0.05)",
        "sigma_window(sigmas=3.0, window=128)",
        "ema_ratio(max_norm=1.0, max_ratio=1.05, decay=0.98, warmup_steps=100)",
        "param_fraction(fraction, eps=0.001)",
        "minimum(*thresholds)",
    ],
    responses: [
        "shrink(norm, threshold)",
        "normalize(norm, threshold)",
        "smooth(norm, threshold)",
        "tanh(norm, threshold)",
    ],
    plot: [
        "thresholds(norms, clips, *, ax=None)",
        "distribution(norms, candidates=None, *, ax=None)",
        "leaf_norms(norms, *, ax=None)",
        "responses(*, ax=None)",
    ],
}
PUBLIC = {
    f"{module.__name__}.{name}": getattr(module, name)
    for module in SIGNATURES
    for name in module.__all__
    if not inspect.ismodule(getattr(module, name))
}
FUNCTIONS = [name for name, value in PUBLIC.items() if inspect.isfunction(value)]
TRANSFORMS = [name for name in FUNCTIONS if re.search(r"\.(clip(?!_metrics)|adaptive_grad_clip)", name)]
SECTIONS = ["Args", "Returns", "Raises", "Guarantees", "Example", "References"]


def signature(name: str, value) -> str:
    """Name and parameters without types; of a state, its fields; of a namespace, its name."""
    if inspect.ismodule(value):
        return name
    if inspect.isclass(value):
        return f"{name}({', '.join(value._fields)})"
    whole = inspect.signature(value)
    parameters = [p.replace(annotation=p.empty) for p in whole.parameters.values()]
    return f"{name}{whole.replace(parameters=parameters, return_annotation=whole.empty)}"


def sections(name: str) -> dict[str, str]:
    """The sections of a docstring in their order, the text before the first as ""."""
    parts = re.split(rf"^({'|'.join(SECTIONS)}):\n", inspect.getdoc(PUBLIC[name]), flags=re.MULTILINE)
    return {"": parts[0], **dict(zip(parts[1::2], parts[2::2]))}


def room(module: str) -> str:
    """Where a module stands. The command draws figures: it is what `__main__` calls, and as high."""
    return "__main__" if module == "tools.command" else module.split(".")[0]


def imports(module: str) -> set[str]:
    """Full names of what a module imports anywhere in it; those of the package without its name in front."""
    found = set()
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} has a relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def inside(module: str) -> set[str]:
    """The modules of the package that a module imports. A name that is defined in a module stands for that module."""
    found = set()
    for name in imports(module):
        parts = name.split(".")
        if parts[0] == "optax_clip":
            options = (".".join(parts[1:end]) for end in range(len(parts), 0, -1))
            found.add(next((m for m in options if m in MODULES), "__init__"))
    return found


# The public list


@pytest.mark.parametrize("module", SIGNATURES, ids=lambda module: module.__name__)
def test_signatures_are_these(module):
    """A call that works goes on to mean the same: what changes here is a change for users, and in the changelog."""
    there = [signature(name, getattr(module, name)) for name in module.__all__]
    assert [each for each in there if each in SIGNATURES[module]] == SIGNATURES[module]


def test_all_has_every_public_name():
    """Nothing without a leading underscore is in the package but `__all__`, `plot` and the rooms themselves."""
    found = {name for name in vars(optax_clip) if not name.startswith("_")}
    assert found - {*ROOMS, "plot"} == set(optax_clip.__all__) - {*ROOMS}


def test_version_is_that_of_the_distribution_and_of_the_citation():
    """`__version__` is the version of the installed distribution, and the one to cite."""
    assert f"version: {optax_clip.__version__}" in (ROOT / "CITATION.cff").read_text()
    try:
        version = importlib.metadata.version("optax_clip")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("the package is not installed")
    assert optax_clip.__version__ == version


def test_package_is_typed():
    """The marker for type checkers is there."""
    assert (FOLDER / "py.typed").is_file()


# Layout


def test_imports_point_down_the_list():
    """A module imports only from its own room and from rooms below it, and inside of a room nothing goes in circles."""
    modules = [module for module in MODULES if module != "__init__"]
    assert {room(module) for module in modules} == set(ROOMS)
    upward = {
        (module, other)
        for module in modules
        for other in inside(module)
        if other == "__init__" or ROOMS.index(room(other)) < ROOMS.index(room(module))
    }
    assert not upward
    graphlib.TopologicalSorter({module: inside(module) - {module} for module in modules}).prepare()


@pytest.mark.parametrize("module", MODULES)
def test_dependencies(module):
    """The package imports jax, numpy, optax and the standard library, and for figures matplotlib."""
    allowed = {"jax", "jaxlib", "numpy", "optax", "optax_clip"} | sys.stdlib_module_names
    allowed |= {"matplotlib"} if module in ("plot", "tools.command") else set()
    assert {name.split(".")[0] for name in imports(module)} <= allowed


def test_an_import_starts_no_device_and_leaves_figures_alone():
    """Importing the package starts no backend, and loads nothing that Optax does not need; figures stay out."""
    program = """
import json, sys
import jax, optax
before = set(sys.modules)
import optax_clip
from jax._src.xla_bridge import backends_are_initialized
print(json.dumps([backends_are_initialized(), sorted(set(sys.modules) - before)]))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT)
    started, loaded = json.loads(done.stdout)
    assert not started
    packages = {name.split(".")[0] for name in loaded} - sys.stdlib_module_names
    assert packages <= {"optax_clip", "jax", "jaxlib", "numpy", "scipy", "optax", "chex", "absl"}
    assert not {"optax_clip.plot", "optax_clip.tools.command"} & set(loaded)


def test_figures_say_what_to_install(monkeypatch):
    """Without matplotlib, the import of `optax_clip.plot` says what to install."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "optax_clip.plot")
    with pytest.raises(ImportError, match=r"matplotlib is missing.* pip install .optax_clip\[plot\]."):
        importlib.import_module("optax_clip.plot")


# Documentation


def test_every_public_name_is_on_one_page_of_the_api():
    """The pages of the API have every public name once, and all that they name is there to import."""
    found = []
    for page in (ROOT / "docs/api").glob("*.md"):
        module = "optax_clip"
        for kind, name in re.findall(r"^\.\. (currentmodule|auto\w+):: ([\w.]+)", page.read_text(), re.MULTILINE):
            if kind == "currentmodule":
                module = name
            elif kind != "automodule":
                found.append(name if name.startswith("optax_clip.") else f"{module}.{name}")
    assert len(found) == len(set(found))
    assert set(PUBLIC) <= set(found)
    for name in found:
        module, _, inner = name.rpartition(".")
        assert hasattr(importlib.import_module(module), inner), name


PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("docs/*/*.md")])


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    """Every relative link of a page leads to a file of the checkout, from where the page is."""
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)]*)\)", text):
        if not target.startswith(("http", "#")):
            assert not re.search(r"\s", target), target
            assert (page.parent / target.split("#")[0]).exists(), target


def test_code_of_all_pages_is_run():
    """Code stands in fences that tests collect, in folders that they look into."""
    deep = {path for path in ROOT.glob("docs/**/*.md") if not {"_build", "notebooks"} & set(path.parts)} - set(PAGES)
    assert not deep
    other = [page for page in PAGES if re.search(r"^```(py|Python|\{code)\b", page.read_text(), re.MULTILINE)]
    assert not other


@pytest.mark.parametrize("page", ["CONTRIBUTING.md", "ARCHITECTURE.md"])
def test_files_that_a_page_names_exist(page):
    """The pages for contributors point at nothing that is not there."""
    named = set(re.findall(r"`((?:optax_clip|tests|scripts|\.ci|benchmarks)/[\w./]*)`", (ROOT / page).read_text()))
    assert len(named) > 5
    missing = [
        name for name in named if not ((FOLDER.parent if name.startswith("optax_clip") else ROOT) / name).exists()
    ]
    assert not missing


# Docstrings


@pytest.mark.parametrize("name", PUBLIC)
def test_docstring_begins_with_a_sentence(name):
    """The first line is a sentence that fits on it, an empty line after it."""
    first, *rest = inspect.getdoc(PUBLIC[name]).splitlines()
    assert first.endswith(".")
    assert first[0].isupper()
    assert not rest or rest[0] == ""


@pytest.mark.parametrize("name", FUNCTIONS)
def test_docstring_has_the_sections(name):
    """Functions have Args, Returns and Example; clips also what they raise, guarantee and refer to, and a formula."""
    found = sections(name)
    required = {"Args", "Returns", "Example"}
    if name in TRANSFORMS:
        required |= {"Raises", "Guarantees"}
        required |= {"References"} if name != "optax_clip.clip_by_norm" else set()
        assert re.search(r"^(updates\w*|x) ← ", found[""], flags=re.MULTILINE)
    assert required <= found.keys()
    assert [s for s in SECTIONS if s in found] == [s for s in found if s]
    assert all(text.strip() for text in found.values())
    assert ">>> " in found["Example"]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_docstring_names_every_parameter(name):
    """Args lists the parameters of the signature, all and in order."""
    listed = re.findall(r"^  \*?(\w+): \S", sections(name)["Args"], flags=re.MULTILINE)
    assert listed == list(inspect.signature(PUBLIC[name]).parameters)

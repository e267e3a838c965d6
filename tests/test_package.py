"""The package as a whole: its public list, its layout, its docstrings, and what it costs to import."""

import ast
import importlib.metadata
import inspect
import pathlib
import re
import subprocess
import sys
import types

import pytest

import optax_clip
import optax_clip.plot

FOLDER = pathlib.Path(optax_clip.__file__).parent  # of the package, wherever it is installed
ROOT = pathlib.Path(__file__).parents[1]
# A module imports only modules before it.
ORDER = [
    "_checks",
    "_blocks",
    "_packing",
    "_reductions",
    "_norms",
    "_responses",
    "_thresholds",
    "_rules",
    "_windows",
    "_averages",
    "_clip_by_norm",
    "_norm_clips",
    "_adaptive",
    "_values",
    "_landing",
    "_weights",
    "_skipping",
    "_wrappers",
    "_metrics",
    "_choosing",
    "_figures",
    "plot",
    "__main__",
]
MODULES = sorted(path.stem for path in FOLDER.glob("*.py") if path.stem != "__init__")

PUBLIC = {name: getattr(optax_clip, name) for name in optax_clip.__all__}
FUNCTIONS = [name for name, value in PUBLIC.items() if inspect.isfunction(value)]
CLASSES = [name for name, value in PUBLIC.items() if inspect.isclass(value)]
TRANSFORMS = [name for name in FUNCTIONS if name.startswith("clip") or name == "adaptive_grad_clip"]
SECTIONS = ["Args", "Returns", "Raises", "Guarantees", "Example", "References"]


def sections(name: str) -> dict[str, str]:
    """The sections of a docstring in their order, the text before the first as ""."""
    parts = re.split(rf"^({'|'.join(SECTIONS)}):\n", inspect.getdoc(PUBLIC[name]), flags=re.MULTILINE)
    return {"": parts[0], **dict(zip(parts[1::2], parts[2::2]))}


def imports(module: str) -> set[tuple[str, str]]:
    """What a module imports at run time, as (package, module in it)."""
    found = set()
    for node in ast.walk(ast.parse((FOLDER / f"{module}.py").read_text())):
        if isinstance(node, ast.Import):
            found |= {tuple([*alias.name.split("."), ""][:2]) for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} has a relative import"
            package, _, inner = node.module.partition(".")
            found |= {(package, inner or alias.name) for alias in node.names}
    return found


# The public list


def test_all_has_every_public_name_once():
    """`__all__` is exactly the public names of the package, each once."""
    found = {k for k, v in vars(optax_clip).items() if not k.startswith("_") and not isinstance(v, types.ModuleType)}
    assert set(optax_clip.__all__) == found
    assert len(optax_clip.__all__) == len(set(optax_clip.__all__))


def test_version_is_that_of_the_distribution():
    """`__version__` is the version of the installed distribution."""
    try:
        version = importlib.metadata.version("optax_clip")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("the package is not installed")
    assert optax_clip.__version__ == version


def test_package_is_typed():
    """The marker for type checkers is there."""
    assert (FOLDER / "py.typed").is_file()


# Layout


def test_every_module_has_its_place():
    """Every module stands in the order of imports."""
    assert sorted(ORDER) == MODULES


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_up_the_list(module):
    """A module imports only modules before it."""
    before = ORDER[: ORDER.index(module)]
    assert {inner for package, inner in imports(module) if package == "optax_clip"} <= set(before)


@pytest.mark.parametrize("module", [*MODULES, "__init__"])
def test_dependencies(module):
    """At run time the package needs jax, numpy, optax and the standard library; figures need matplotlib."""
    allowed = {"jax", "jaxlib", "numpy", "optax", "optax_clip"} | sys.stdlib_module_names
    allowed |= {"matplotlib"} if module in ("_figures", "plot", "__main__") else set()
    assert {package for package, _ in imports(module)} <= allowed


# Documentation


def test_every_public_name_is_on_one_page_of_the_api():
    """The pages of the API list what is public, each name once, and nothing else."""
    pages = [path.read_text() for path in (ROOT / "docs/api").glob("*.md")]
    listed = [
        name for page in pages for name in re.findall(r"^\.\. auto(?:function|class):: (\w+)", page, re.MULTILINE)
    ]
    assert sorted(listed) == sorted([*optax_clip.__all__, *optax_clip.plot.__all__])


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


# Docstrings


@pytest.mark.parametrize("name", [*FUNCTIONS, *CLASSES])
def test_docstring_begins_with_a_sentence(name):
    """The first line is a sentence that fits on it, an empty line after it."""
    first, *rest = inspect.getdoc(PUBLIC[name]).splitlines()
    assert first.endswith(".")
    assert first[0].isupper()
    assert not rest or rest[0] == ""


@pytest.mark.parametrize("name", FUNCTIONS)
def test_docstring_has_the_sections(name):
    """Functions have Args, Returns and Example; transformations also what they raise, guarantee and refer to."""
    found = sections(name)
    required = {"Args", "Returns", "Example"}
    if name in TRANSFORMS:
        required |= {"Raises"}
        required |= {"Guarantees"} if name != "clip_metrics" else set()
        required |= {"References"} if name not in ("clip_by_norm", "clip_metrics") else set()
    assert required <= found.keys()
    assert [s for s in SECTIONS if s in found] == [s for s in found if s]
    assert all(text.strip() for text in found.values())
    assert ">>> " in found["Example"]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_docstring_names_every_parameter(name):
    """Args lists the parameters of the signature, all and in order."""
    listed = re.findall(r"^  (\w+): \S", sections(name)["Args"], flags=re.MULTILINE)
    assert listed == list(inspect.signature(PUBLIC[name]).parameters)


@pytest.mark.parametrize("name", TRANSFORMS)
def test_transformations_state_their_formula(name):
    """A transformation says what becomes of the updates, or of an entry, as a formula."""
    assert name == "clip_metrics" or re.search(r"^(updates\w*|x) ← ", sections(name)[""], flags=re.MULTILINE)


@pytest.mark.parametrize("name", CLASSES)
def test_fields_of_states_are_described(name):
    """Each field of a state has a comment, each field of a rule stands in the docstring."""
    cls = PUBLIC[name]
    lines = inspect.getsource(cls).splitlines()
    for field in cls._fields:
        (line,) = (line for line in lines if re.match(rf"    {field}: ", line))
        assert re.search(r"  # \S", line) or re.search(rf"`{field}\b", cls.__doc__)


# Cost of the import


def test_import_leaves_figures_alone():
    """The package does not import its plots, nor matplotlib."""
    program = "import sys, optax_clip; print({'matplotlib', 'optax_clip.plot'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout == "set()\n"


def test_import_is_quick():
    """It takes less than a tenth of what Optax and JAX take, in processor time, the best of five fresh interpreters."""
    program = """
import time
start = time.process_time()
import jax, optax
between = time.process_time()
import optax_clip
print((time.process_time() - between) / (between - start))
"""
    # About 20 ms against 500. A share of the same process, since a busy machine slows down both.
    shares = []
    while len(shares) < 5 and min(shares, default=1.0) > 0.1:
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT)
        shares.append(float(done.stdout))
    assert min(shares) < 0.1


# Files beside the package


def test_continuous_integration_runs_what_the_readme_says():
    """`.ci/run` and `scripts/check` run tests and documentation; the version to cite is the package's."""
    assert "run: .ci/run" in (ROOT / ".github/workflows/ci.yml").read_text()
    for script in (".ci/run", "scripts/check"):
        assert re.search(r"^(exec )?scripts/test", (ROOT / script).read_text(), re.MULTILINE)
        assert re.search(r"^(exec )?scripts/docs", (ROOT / script).read_text(), re.MULTILINE)
    assert f"version: {optax_clip.__version__}" in (ROOT / "CITATION.cff").read_text()


def test_files_that_contributing_names_exist():
    """`CONTRIBUTING.md` points at nothing that is not there."""
    named = set(
        re.findall(r"`((?:optax_clip|tests|scripts|\.ci|benchmarks)/[\w./]*)`", (ROOT / "CONTRIBUTING.md").read_text())
    )
    assert len(named) > 8
    assert all(((FOLDER.parent if name.startswith("optax_clip") else ROOT) / name).exists() for name in named)

"""Settings of the documentation, which `scripts/docs` builds."""

import inspect
import pathlib
import re
import shutil

from docutils import nodes
from sphinx import addnodes

import optax_clip
from optax_clip import plot, responses, thresholds

DOCS = pathlib.Path(__file__).parent

# Sphinx reads only what is below its own folder.
shutil.rmtree(DOCS / "notebooks", ignore_errors=True)
shutil.copytree(DOCS.parent / "notebooks", DOCS / "notebooks", ignore=shutil.ignore_patterns(".*"))

project = "optax_clip"
author = "The optax_clip authors"
copyright = f"2026, {author}"
release = optax_clip.__version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.mathjax",
    "sphinx-mathjax-offline",  # formulas without a network
    "sphinx_copybutton",
]
root_doc = "index"
exclude_patterns = ["_build"]

html_theme = "sphinx_book_theme"
html_title = "optax_clip"
html_static_path = ["_static"]
html_css_files = ["style.css"]
html_context = {"default_mode": "auto"}
html_theme_options = {"show_toc_level": 2, "show_navbar_depth": 1, "home_page_in_toc": True, "navbar_persistent": []}

html_show_sourcelink = False

nb_execution_mode = "off"  # shown with the outputs that are kept; scripts/test --all runs them
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3

napoleon_google_docstring = True
napoleon_custom_sections = ["Guarantees"]
default_role = "py:obj"  # a name in single backticks is a link where it is one of ours, and code elsewhere
nitpicky = True  # a name of ours that does not exist is a warning, which fails the build
nitpick_ignore_regex = [("py:.*", r"(?!optax_clip\.).*")]
autodoc_typehints = "none"  # docstrings say types, shapes and dtypes
autodoc_member_order = "bysource"


PUBLIC = {
    name: f"{module.__name__}.{name}"
    for module in (plot, responses, thresholds, optax_clip)
    for name in module.__all__
    if not inspect.ismodule(getattr(module, name))
}


def _full_name(path):
    """The full name of a public function or class whose name ends so: `z_score`, `thresholds.z_score`."""
    full = PUBLIC.get(path.split(".")[-1], "")
    return full if path and f".{full}".endswith(f".{path}") else None


def _lines_of_formulas(app, what, name, obj, options, lines):
    """Keeps formulas, in the paragraphs before the first section, as they are: a line in the source is one here."""
    end = next((i for i, line in enumerate(lines) if re.fullmatch(r"\w+:", line)), len(lines))
    start = 0
    for i in [*(i for i in range(end) if not lines[i].strip()), end]:
        paragraph = lines[start:i]
        if any(re.search(r"←|\S = |≤", line) for line in paragraph) and start:
            # A line block takes what it holds as text with markup, so that names in backticks are links here too.
            lines[start:i] = ["| " + re.sub(r"([*|\\])", r"\\\1", line) for line in paragraph]
        start = i + 1


def _returns_without_type(app, what, name, obj, options, lines):
    """Says that what stands before the first colon of Returns is no type."""
    if "Returns:" in lines:
        after = lines.index("Returns:") + 1
        lines[after] = re.sub(r"^( *)", r"\1: ", lines[after])


def _links_between_folders(app, docname, source):
    """Links that lead from docs/ to notebooks/ and back on disk, to where the copies of notebooks are."""
    source[0] = source[0].replace("](../notebooks/", "](notebooks/").replace("](../docs/", "](../")


def _links_of_included_pages(app, relative_path, parent_docname, content):
    """The same for pages beside the README, whose names are lower case in docs/."""
    content[0] = re.sub(r"\]\((ARCHITECTURE|CONTRIBUTING|CHANGELOG)\.md", lambda m: m[0].lower(), content[0])


def _short_names(app, env, node, contnode):
    """Finds a public name by its end, from a page of any module."""
    target = _full_name(node.get("reftarget", ""))
    if node.get("refdomain") != "py" or not target:
        return None
    return env.get_domain("py").resolve_xref(env, node["refdoc"], app.builder, "obj", target, node, contnode)


AMBIGUOUS = {"clip", *plot.__all__}  # alone they may mean something else


def _calls_are_links(app, doctree):
    """Links calls such as `zclip()` and `thresholds.z_score()` to the API, in tables and text."""
    for literal in list(doctree.findall(nodes.literal)):
        path = re.match(r"[\w.]*", literal.astext())[0]
        is_call = literal.astext()[len(path) :].startswith("(") or path not in AMBIGUOUS
        if _full_name(path) and is_call and not isinstance(literal.parent, nodes.reference | addnodes.pending_xref):
            target = {"refdomain": "py", "reftype": "obj", "reftarget": _full_name(path), "refwarn": True}
            link = addnodes.pending_xref("", refdoc=app.env.docname, refexplicit=True, **target)
            literal.replace_self(link)
            link += literal


def setup(app):
    app.connect("autodoc-process-docstring", _lines_of_formulas, priority=100)  # before napoleon
    app.connect("autodoc-process-docstring", _returns_without_type, priority=100)
    app.connect("doctree-read", _calls_are_links)
    app.connect("source-read", _links_between_folders)
    app.connect("include-read", _links_of_included_pages)
    app.connect("missing-reference", _short_names)

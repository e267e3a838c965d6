"""The page of errors: every row raises what it says, and every `raise` of the package has a row."""

import ast
import contextlib
import functools
import pathlib
import re
import tempfile
import traceback

import pytest

import optax_clip

FOLDER = pathlib.Path(optax_clip.__file__).parent  # of the package, wherever it is installed
PAGE = (pathlib.Path(__file__).parents[1] / "docs" / "errors.md").read_text()
BLOCKS = re.findall(r"^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
ROWS = re.findall(r"^- `(.+)`\\\n  `(\w+): (.+)`$", PAGE, re.MULTILINE)  # a call, a type, a text
WITHOUT_ROW = {  # words of the statement: why no row can reach it
    "matplotlib is missing": "the import of figures, where matplotlib is not installed",
}


@functools.cache
def names() -> dict:
    """What the calls use."""
    found = {}
    for block in BLOCKS:
        exec(block, found)
    return found


@functools.cache
def raised(call: str) -> tuple[str, str, frozenset[tuple[str, int]]]:
    """Type and text of what the call raises, and where it was raised: it, and what it came from."""
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder), pytest.raises(Exception) as caught:
        eval(call, names())
    places, error = set(), caught.value
    while error is not None:
        *_, (frame, line) = traceback.walk_tb(error.__traceback__)
        places.add((pathlib.Path(frame.f_code.co_filename).name, line))
        error = error.__cause__ or error.__context__
    return caught.type.__name__, str(caught.value), frozenset(places)


def statements() -> dict[tuple[str, int], str]:
    """Every `raise` of the package with something to raise: its module and line, and its source."""
    found = {}
    for path in FOLDER.glob("*.py"):
        source = path.read_text()
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Raise) and node.exc is not None:
                found[path.name, node.lineno] = ast.get_source_segment(source, node)
    return found


def test_every_row_is_read():
    """No row of the page is in a form that this test passes over."""
    assert len(ROWS) == len(re.findall(r"^- ", PAGE, re.MULTILINE)) == len({text for _, _, text in ROWS}) > 90


@pytest.mark.parametrize(("call", "kind", "text"), ROWS, ids=[call for call, _, _ in ROWS])
def test_row_says_what_is_raised(call, kind, text):
    """The call raises an error of exactly this type and text, which begins with what raised it and ends a sentence."""
    assert raised(call)[:2] == (kind, text)
    assert re.match(r"[\w.]+: ", text) and text.endswith(".")


def test_every_raise_has_a_row():
    """Each `raise` statement is where an error of the page was raised, but for a few that no call can reach."""
    missing = statements()
    for call, _, _ in ROWS:
        for place in raised(call)[2]:
            missing.pop(place, None)
    for words in WITHOUT_ROW:
        (place,) = (place for place, source in missing.items() if words in source)
        del missing[place]
    assert not missing, "no row of docs/errors.md raises at\n" + "\n".join(
        f"{module}:{line}" for module, line in sorted(missing)
    )

"""The command `python -m optax_clip`: what it reads, prints and draws, and what it says of files it cannot use."""

import functools
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile

import chex
import jax
import matplotlib.image
import numpy as np
import properties  # noqa: F401  loads the profile of hypothesis
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

import optax_clip as oc
from optax_clip import __main__ as command

ROOT = pathlib.Path(__file__).parents[1]
NAN, INF = float("nan"), float("inf")


def norms() -> np.ndarray:
    values = np.random.default_rng(0).lognormal(0.0, 0.3, 300)
    values[[7, 150]], values[40], values[50] = 30.0, NAN, INF
    return values


def write(folder: pathlib.Path, name: str, content) -> pathlib.Path:
    """A file of text, bytes, or an array."""
    path = folder / name
    if isinstance(content, np.ndarray):
        np.save(path, content)
    else:
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def as_json(values) -> str:
    return "\n".join(json.dumps({"step": i, "clip/norm": value}) for i, value in enumerate(values))


# What is read

SAME = [1.5, NAN, 2.0, INF, 0.25]
FILES = {  # name, content, arguments: all hold SAME
    "one column": ("a.csv", "1.5\nnan\n2\ninf\n.25\n", []),
    "one column, header": ("a.csv", "norm\n1.5\nNaN\n2\nInfinity\n2.5e-1\n", []),
    "one column, header and key": ("a.csv", "x\n1.5\nNaN\n2\ninf\n.25", ["--key", "x"]),
    "empty cells": ("a.csv", 'norm\n1.5\n""\n2\ninf\n.25\n', []),
    "empty cells beside others": ("a.csv", "i,norm\na,1.5\nb,\nc,2\nd,inf\ne,.25\n", []),
    "only numeric column": ("a.csv", 'run,norm,note\na,1.5,"x, y"\na,nan,\na,2,\na,inf,\nb,.25,\n', []),
    "the usual column": ("a.csv", "step,clip/norm,loss\n0,1.5,9\n1,nan,9\n2,2,9\n3,inf,9\n4,.25,9\n", []),
    "named column": ("a.csv", "step, norm\n0, 1.5\n1, nan\n2, 2\n3, inf\n4, .25\n", ["--key", "norm"]),
    "BOM and CRLF": ("a.CSV", b"\xef\xbb\xbfnorm\r\n1.5\r\nnan\r\n2\r\ninf\r\n.25\r\n", ["--key", "norm"]),
    "blank lines": ("a.csv", "1.5\r\r\nnan\r\r\n2\r\r\ninf\r\r\n.25\r\r\n", []),
    "jsonl": ("a.jsonl", as_json([1.5, None, 2, INF, 0.25]), []),
    "jsonl NaN": ("a.jsonl", as_json(SAME), []),
    "jsonl key": ("a.jsonl", as_json(SAME).replace("clip/norm", "g"), ["--key", "g"]),
    "jsonl BOM and CRLF": ("a.jsonl", b"\xef\xbb\xbf" + as_json(SAME).replace("\n", "\r\n\r\n").encode(), []),
    "jsonl mixed": ("a.jsonl", '{"eval": 1}\n' + as_json(SAME) + '\n{"eval": -1}\n{}\n', []),
    "npy f64": ("a.npy", np.array(SAME), []),
    "npy f32": ("a.npy", np.array(SAME, ">f4"), []),
    "npy f16": ("a.npy", np.array(SAME, np.float16), []),
}


@pytest.mark.parametrize("case", FILES)
def test_files_that_are_read(case, tmp_path):
    """Norms come out of each format as they went in, NaN and inf included."""
    name, content, options = FILES[case]
    found = command.read(write(tmp_path, name, content), *options[1:])
    assert found.dtype == np.float64
    np.testing.assert_array_equal(found, SAME)


def test_integers(tmp_path):
    """Integers are norms, of any size."""
    np.testing.assert_array_equal(command.read(write(tmp_path, "a.npy", np.arange(3))), [0, 1, 2])
    big = f'{{"clip/norm": 1}}\n{{"clip/norm": 1{"0" * 400}}}'
    np.testing.assert_array_equal(command.read(write(tmp_path, "a.jsonl", big)), [1, INF])


# What is refused

BAD = {  # name, content, arguments, the message after the path
    "missing": ("a.csv", None, [], "no such file"),
    "folder": (".", None, [], "is no file"),
    "suffix": ("a.txt", "1", [], r"the suffix must be \.csv, \.jsonl, \.npy, got '\.txt'"),
    "no suffix": ("a", "1", [], "the suffix must be .* got ''"),
    "csv empty": ("a.csv", "", [], "is empty"),
    "csv blank": ("a.csv", "\ufeff\n\r\n\n", [], "is empty"),
    "csv header only": ("a.csv", "norm\n", [], "is empty"),
    "csv text": ("a.csv", "norm\n1\noops\n", [], "line 3 has 'oops' instead of a number"),
    "csv long text": ("a.csv", "norm\n" + "x" * 9999, [], r"line 2 has 'x{56}\.\.\. instead of a number"),
    "csv late text": ("a.csv", "i,norm\n" + "a,1\n" * 200 + "a,x", [], "line 202 has 'x' instead of a number"),
    "csv short line": ("a.csv", "i,norm\na,1\nb\n", [], "line 3 has None instead of a number"),
    "csv negative": ("a.csv", "1\n-2.5\n", [], "norms must be >= 0, got -2.5 at step 1"),
    "csv minus inf": ("a.csv", "1\n-inf\n", [], "norms must be >= 0, got -inf at step 1"),
    "csv no column": ("a.csv", "a,b\n1,2\n", ["--key", "c"], "found 0 columns named 'c' among 'a', 'b'"),
    "csv key without header": ("a.csv", "1\n2\n", ["--key", "c"], "found 0 columns named 'c' among unnamed ones"),
    "csv several": ("a.csv", "a,b,c\n1,2,x\n", [], "found 2 columns of numbers among 'a', 'b', 'c'.*--key"),
    "csv twice": ("a.csv", "a,a\n1,2\n", ["--key", "a"], "found 2 columns named 'a' among 'a', 'a'"),
    "csv none": ("a.csv", "a,b\nx,\nx,\n", [], "found 0 columns of numbers among 'a', 'b'"),
    "csv no header": ("a.csv", "1,2\n3,4\n", [], "found 2 columns of numbers among unnamed ones"),
    "csv many": ("a.csv", ",".join("abcdefghijklm"), ["--key", "z"], "'i', 'j' and 3 more"),
    "csv UTF-16": ("a.csv", "1\n2\n".encode("utf-16"), [], r"is no \.csv text in UTF-8"),
    "csv binary": ("a.csv", b"\x00\x01\n1\n\x00\n", [], r"line 3 has '\\x00' instead of a number"),
    "csv field": ("a.csv", '"' + "1" * 200_000, [], r"is no \.csv text in UTF-8 \(field larger"),
    "jsonl empty": ("a.jsonl", "", [], "is empty"),
    "jsonl no key": ("a.jsonl", '{"a": 1}\n{"b": 1}', [], "no line has the key 'clip/norm', found 'a', 'b'"),
    "jsonl other key": ("a.jsonl", as_json([1]), ["--key", "x"], "no line has the key 'x', found 'step', 'clip/norm'"),
    "jsonl no object": ("a.jsonl", as_json([1]) + "\n[1]", [], r"line 2 is no JSON object: '\[1\]'"),
    "jsonl cut off": ("a.jsonl", as_json([1, 2])[:-3], [], "line 2 is no JSON object"),
    "jsonl deep": ("a.jsonl", "[" * 100_000, [], "line 1 is no JSON object"),
    "jsonl long int": ("a.jsonl", '{"clip/norm": ' + "1" * 5000 + "}", [], "line 1 is no JSON object"),
    "jsonl text": ("a.jsonl", as_json([1, "2"]), [], "line 2 has '2' instead of a number"),
    "jsonl bool": ("a.jsonl", as_json([True]), [], "line 1 has True instead of a number"),
    "jsonl list": ("a.jsonl", as_json([[1, 2]]), [], r"line 1 has \[1, 2\] instead of a number"),
    "jsonl negative": ("a.jsonl", as_json([1, -1]), [], "norms must be >= 0, got -1 at step 1"),
    "jsonl very negative": ("a.jsonl", as_json([-(10**400)]), [], "norms must be >= 0, got -inf at step 0"),
    "jsonl binary": ("a.jsonl", b"\x93NUMPY\xff", [], r"is no \.jsonl text in UTF-8"),
    "npy empty file": ("a.npy", b"", [], "is no whole .npy of numbers"),
    "npy no norms": ("a.npy", np.zeros(0), [], "is empty"),
    "npy text": ("a.npy", "1\n2\n", [], "is no whole .npy of numbers"),
    "npy zip": ("a.npy", b"PK\x03\x04" + b"\x00" * 40, [], "is no whole .npy of numbers"),
    "npy objects": ("a.npy", np.array([1.0, print], object), [], "is no whole .npy of numbers .*Python objects"),
    "npy matrix": ("a.npy", np.ones((3, 2)), [], r"a vector of real numbers, got float64 of shape \(3, 2\)"),
    "npy scalar": ("a.npy", np.array(1.0), [], r"a vector of real numbers, got float64 of shape \(\)"),
    "npy complex": ("a.npy", np.ones(2, complex), [], "a vector of real numbers, got complex128"),
    "npy bool": ("a.npy", np.ones(2, bool), [], "a vector of real numbers, got bool"),
    "npy negative": ("a.npy", np.array([1, -1]), [], "norms must be >= 0, got -1 at step 1"),
    "only NaN": ("a.csv", "nan\nnan\n", [], "norms has no finite number above 0 among 2"),
    "only zeros": ("a.csv", "0\n0\n", [], "norms has no finite number above 0 among 2"),
}


def refused(capsys, *arguments) -> str:
    """The one line of an error, which says what to do and comes with exit status 2 and nothing else."""
    assert command.main([str(argument) for argument in arguments]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and err.endswith(".\n") and ". " in err
    return err


@pytest.mark.parametrize("case", BAD)
def test_files_that_are_refused(case, tmp_path, capsys):
    """One line on stderr names the file and says what is wrong with it, and nothing is written."""
    name, content, options, text = BAD[case]
    path = tmp_path / name if content is None else write(tmp_path, name, content)
    before = sorted(tmp_path.iterdir())
    caller = "suggest_threshold" if case.startswith("only") else str(path)
    message = refused(capsys, path, *options)
    assert message.startswith(f"{caller}: ")
    assert re.search(text, message.removeprefix(f"{caller}: ")), message
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("keep", [5, 20, 100, 2500])
def test_truncated_npy(keep, tmp_path, capsys):
    """An array that was cut off in the magic, the header or the data is refused, not read in part."""
    path = write(tmp_path, "a.npy", norms())
    path.write_bytes(path.read_bytes()[:keep])
    assert "is no whole .npy of numbers" in refused(capsys, path)


def test_npy_that_claims_too_much(tmp_path, capsys):
    """A header that claims more than the file holds asks for no memory."""
    path = tmp_path / "a.npy"
    with path.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "<f8", "fortran_order": False, "shape": (10**15,)})
    assert "is no whole .npy of numbers" in refused(capsys, path)


def test_pickles_are_never_run(tmp_path, capsys):
    """An object array whose pickle would write a file is refused without running it."""

    class Trap:
        def __reduce__(self):
            return pathlib.Path.touch, (tmp_path / "sprung",)

    path = tmp_path / "a.npy"
    np.save(path, np.array([Trap()], object), allow_pickle=True)
    assert "Python objects" in refused(capsys, path)
    assert not (tmp_path / "sprung").exists()


def test_files_that_are_too_large(tmp_path, capsys, monkeypatch):
    """More bytes or norms than the limits are refused, with the numbers, and no line after them is read."""
    path = tmp_path / "a.csv"
    with path.open("wb") as file:
        file.truncate(command.MOST_BYTES + 1)
    assert "at most 1,000,000,000 bytes are read, got 1,000,000,001" in refused(capsys, path)
    assert command.MOST_NORMS == 10_000_000
    monkeypatch.setattr(command, "MOST_NORMS", 1000)
    endless = np.ones(1001)
    unread = "\nno norm"  # would be refused, were it reached
    for name, content in (("b.csv", "1\n" * 1001 + unread), ("b.jsonl", as_json(endless) + unread), ("b.npy", endless)):
        assert "at most 1,000 norms are read" in refused(capsys, write(tmp_path, name, content))
    assert command.read(write(tmp_path, "c.npy", endless[1:])).size == 1000


def test_usage(capsys):
    """Without a file, the usage and exit status 2."""
    with pytest.raises(SystemExit) as caught:
        command.main([])
    assert caught.value.code == 2
    assert "usage: python -m optax_clip" in capsys.readouterr().err


# What is printed and drawn


def test_table(tmp_path, capsys):
    """A line a candidate with the suggested one marked, a line a clip that adapts, and what it rests on."""
    values = norms()
    found = oc.suggest_threshold(values)
    assert command.main([str(write(tmp_path, "a.npy", values)), "--no-figure"]) == 0
    out, err = capsys.readouterr()
    head, *lines = out.split("\n\n")[0].splitlines()
    assert err == "" and head.split() == ["clip", "threshold", "clipped"]
    bounds = sorted([*found.candidates, found.threshold])
    for line, bound in zip(lines[:7], bounds, strict=True):
        name, shown, rate, *note = line.split()
        assert name == "clip_by_global_norm" and shown == f"{bound:.4g}"
        assert rate == f"{np.mean(values[np.isfinite(values)] > bound):.2%}"
        assert note == (["<-", "suggested"] if bound == found.threshold else [])
    clips = [oc.zclip(), oc.autoclip(10.0), oc.autoclip(90.0), oc.adagc(), oc.clip_by_sigma()]
    for line, clip, name in zip(lines[7:], clips, command.ADAPTIVE, strict=True):
        seen = oc.replay(clip, values)
        shown, bound, rate = line.split()[:3]
        assert shown == name and bound == f"{np.nanmedian(seen.threshold[-100:]):.4g}"
        assert rate == f"{np.sum(seen.clipped) / 298:.2%}"
    assert out.split("\n\n")[1] == found.basis + "\n"
    assert "298 finite norms, without 2 norms not finite" in found.basis
    assert [path.name for path in tmp_path.iterdir()] == ["a.npy"]


def test_what_a_suggestion_rests_on():
    """Fewer than a hundred norms above 0 are few, and norms drift if their median moves by more than half."""
    basis = lambda values: oc.suggest_threshold(values).basis
    sample = np.random.default_rng(0).uniform(0.9, 1.1, 200)
    assert basis([*sample[:90], *np.zeros(60)]).endswith("Few to go by.")
    assert "Few" not in basis([*sample[:100], *np.zeros(60)])
    assert "without 1 norm not finite" in basis([*sample, np.inf]) and "not finite" not in basis(sample)
    for growth, drifts in ((1.4, False), (1.7, True), (1 / 1.7, True)):
        assert ("The norms drift" in basis([*sample, *sample * growth])) == drifts
    assert " is 1.7 times that of the first." in basis([*20 * sample, *34 * sample])


@pytest.mark.parametrize("dtype", ["bfloat16", "float8_e4m3fn", "int8"])
def test_norms_of_few_bits(dtype):
    """Norms may be of any dtype of real numbers."""
    norms = [1.0, 2.0, 3.0, 44.0]
    found, expected = oc.suggest_threshold(jax.numpy.array(norms, dtype)), oc.suggest_threshold(norms)
    chex.assert_trees_all_equal(found[:-1], expected[:-1])


def test_skipped_lines_are_counted(tmp_path, capsys):
    """Lines of a log without the key are left out and counted."""
    path = write(tmp_path, "a.jsonl", as_json(norms()) + '\n{"loss": 1}\n{}')
    assert command.main([str(path), "--no-figure"]) == 0
    assert capsys.readouterr().out.startswith("2 lines without 'clip/norm' left out.\n")


def test_figure(tmp_path, capsys):
    """The figure stands beside the norms, or where --out says, in the format of its suffix."""
    path = write(tmp_path, "a.npy", norms())
    assert command.main([str(path)]) == 0
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    assert command.main([str(write(tmp_path, "c.npy", norms() ** 2))]) == 0
    drawn = [matplotlib.image.imread(tmp_path / name) for name in ("a.png", "c.png")]
    assert np.mean(drawn[0] != drawn[1]) > 0.01  # the norms are
    capsys.readouterr()
    assert command.main([str(path)]) == 0
    assert capsys.readouterr().out.endswith(f"\nFigure: {tmp_path / 'a.png'}\n")
    assert command.main([str(path), "--out", str(tmp_path / "b.pdf")]) == 0
    assert (tmp_path / "b.pdf").read_bytes().startswith(b"%PDF")


@pytest.mark.parametrize("out", ["nowhere/a.png", "a.xyz", "a.npy"])
def test_figure_that_cannot_be_written(out, tmp_path, capsys):
    """A folder that is not there or a format that is none: the table, one line on stderr, and the norms untouched."""
    path = write(tmp_path, "a.npy", norms())
    before = path.read_bytes()
    assert command.main([str(path), "--out", str(tmp_path / out)]) == 2
    printed, err = capsys.readouterr()
    assert "suggested" in printed and err.count("\n") == 1
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 1


def test_without_matplotlib(tmp_path, capsys, monkeypatch):
    """Without matplotlib the table is there, and a line that says what to install."""
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert command.main([str(write(tmp_path, "a.npy", norms()))]) == 0
    out, err = capsys.readouterr()
    assert "suggested" in out and err == ""
    assert out.endswith('\nNo figure: matplotlib is missing. Run pip install "optax_clip[plot]".\n')
    assert len(list(tmp_path.iterdir())) == 1


def test_as_a_program(tmp_path):
    """The module runs as a program, without a display, and its exit status is that of main."""
    # Where compilers for accelerators are installed, jax reports that it finds none, with this less than without.
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    run = functools.partial(subprocess.run, capture_output=True, text=True, cwd=ROOT, env=environment)
    path = write(tmp_path, "a.npy", norms())
    done = run([sys.executable, "-W", "error", "-m", "optax_clip", str(path)])
    said = [line for line in done.stderr.splitlines() if not re.match(r"WARNING: All log messages|I\d{4} ", line)]
    assert (done.returncode, said) == (0, []) and "<- suggested" in done.stdout
    assert (tmp_path / "a.png").exists()
    done = run([sys.executable, "-m", "optax_clip", str(tmp_path / "b.csv")])
    assert (done.returncode, done.stdout) == (2, "") and done.stderr.endswith("no such file. Pass one with norms.\n")


# Any bytes

HEADER = b"\x93NUMPY\x01\x00v\x00{'descr': '<f8', 'fortran_order': False, 'shape': (2,), }".ljust(127) + b"\n"
PIECES = {
    ".csv": st.sampled_from([b"1", b"1e300", b"-1", b"nan", b"", b"norm", b",", b"\n", b'"', b"\r", b"\x00", b"\xff"]),
    ".jsonl": st.sampled_from(
        [b'{"clip/norm": ', b"1", b"null", b"NaN", b"}", b"\n", b"[", b"1e999", b'"', b"\\ud800", b"\xff", b"{}"]
    ),
    ".npy": st.sampled_from([HEADER, HEADER[:90], b"\x93NUMPY", b"\x02\x00", b"\x00" * 8, np.float64(1.5).tobytes()]),
}


@pytest.mark.long
@pytest.mark.parametrize("suffix", PIECES)
def test_any_bytes(suffix):
    """Whatever bytes a file holds, the exit status is 0 or 2, without a traceback or a warning."""

    @given(st.binary(max_size=300) | st.lists(PIECES[suffix], max_size=12).map(b"".join))
    @example(b"")
    @example(HEADER + np.array([1.5, 2.5]).tobytes())
    @example(HEADER + np.array([1e300, 1.7e308]).tobytes())
    @example(b"1e300\n1e308\n1e-320")
    @example(b'{"clip/norm": 1e308}\n{"clip/norm": 5e-324}')
    def check(content):
        with tempfile.TemporaryDirectory() as folder:
            path = write(pathlib.Path(folder), f"a{suffix}", content)
            assert command.main([str(path), "--no-figure"]) in (0, 2)

    check()

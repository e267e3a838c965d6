"""The command `python -m optax_clip`: what it reads, prints and draws, and what it says of files it cannot use."""

import contextlib
import functools
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

import optax_clip as oc
from optax_clip.tools import command

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
FILES = {  # name, content, key: all hold SAME
    "one column": ("a.csv", "1.5\nnan\n2\ninf\n.25\n", None),
    "one column, header": ("a.csv", "norm\n1.5\nNaN\n2\nInfinity\n2.5e-1\n", None),
    "one column, header and key": ("a.csv", "x\n1.5\nNaN\n2\ninf\n.25", "x"),
    "empty cells": ("a.csv", 'norm\n1.5\n""\n2\ninf\n.25\n', None),
    "the usual column": ("a.csv", "step,clip/norm,loss\n0,1.5,9\n1,nan,9\n2,2,9\n3,inf,9\n4,.25,9\n", None),
    "named column": ("a.csv", "step, norm\n0, 1.5\n1, nan\n2, 2\n3, inf\n4, .25\n", "norm"),
    "BOM and CRLF": ("a.CSV", b"\xef\xbb\xbfnorm\r\n1.5\r\nnan\r\n2\r\ninf\r\n.25\r\n", "norm"),
    "blank lines": ("a.csv", "1.5\r\r\nnan\r\r\n2\r\r\ninf\r\r\n.25\r\r\n", None),
    "jsonl": ("a.jsonl", as_json([1.5, None, 2, INF, 0.25]), None),
    "jsonl text": ("a.jsonl", as_json([1.5, "NaN", 2, "Infinity", 0.25]), None),
    "jsonl key": ("a.jsonl", as_json(SAME).replace("clip/norm", "g"), "g"),
    "jsonl BOM and CRLF": ("a.jsonl", b"\xef\xbb\xbf" + as_json(SAME).replace("\n", "\r\n\r\n").encode(), None),
    "jsonl mixed": ("a.jsonl", '{"eval": 1}\n' + as_json(SAME) + '\n{"eval": -1}\n{}\n', None),
    "npy f64": ("a.npy", np.array(SAME), None),
    "npy f32": ("a.npy", np.array(SAME, ">f4"), None),
    "npy f16": ("a.npy", np.array(SAME, np.float16), None),
}


@pytest.mark.parametrize("case", FILES)
def test_files_that_are_read(case, tmp_path):
    """Norms come out of each format as they went in, NaN and inf included."""
    name, content, key = FILES[case]
    found = command.read(write(tmp_path, name, content), key)
    assert found.dtype == np.float64
    np.testing.assert_array_equal(found, SAME)


# What is refused

BAD = {  # name, content, arguments, the message after the path
    "missing": ("a.csv", None, [], "cannot be read: .*No such file"),
    "suffix": ("a.txt", "1", [], r"must be a \.csv, \.jsonl or \.npy file"),
    "folder": ("", None, [], r"must be a \.csv, \.jsonl or \.npy file"),
    "csv text": ("a.csv", "norm\n1\noops\n", [], "cannot be read: .*'oops'"),
    "csv short row": ("a.csv", "a,clip/norm\n1,2\n3\n", [], "cannot be read: "),
    "csv columns": ("a.csv", "loss,norm\n2,1\n", [], r"no column is named 'clip/norm' among list \['loss', 'norm'\]"),
    "csv key": ("a.csv", "loss,norm\n2,1\n", ["--key", "x"], "no column is named 'x' among"),
    "csv UTF-16": ("a.csv", "1\n2\n".encode("utf-16"), [], "cannot be read: .*utf-8"),
    "csv field": ("a.csv", '"' + "1" * 200_000, [], "cannot be read: field larger"),
    "csv negative": ("a.csv", "1\n-1\n", [], "must be >= 0, got -1 at step 1"),
    "jsonl cut off": ("a.jsonl", as_json([1, 2])[:-3], [], "cannot be read: .*line 2"),
    "jsonl number": ("a.jsonl", as_json([1]) + "\n1", [], "cannot be read: "),
    "jsonl deep": ("a.jsonl", "[" * 100_000, [], "cannot be read: "),
    "jsonl text": ("a.jsonl", as_json([1, "low"]), [], "cannot be read: .*'low'"),
    "jsonl list": ("a.jsonl", as_json([[1, 2]]), [], "must be a vector"),
    "npy empty file": ("a.npy", b"", [], "cannot be read: "),
    "npy text": ("a.npy", "1\n2\n", [], "cannot be read: "),
    "npy zip": ("a.npy", b"PK\x03\x04" + b"\x00" * 40, [], "cannot be read: "),
    "npy matrix": ("a.npy", np.ones((3, 2)), [], r"must be a vector with one entry for each step, got .* \(3, 2\)"),
    "npy complex": ("a.npy", np.ones(2, complex), [], "must be real numbers, got dtype complex128"),
}


def refused(capsys, *arguments) -> str:
    """The one line of an error, which comes with exit status 2 and nothing else."""
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
    message = refused(capsys, path, *options)
    assert re.match(rf"{re.escape(str(path))} .*{text}", message), message
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("content", ["", "norm\n", "nan\nnan\n", "0\n0\n"], ids=["empty", "header", "NaN", "zeros"])
def test_files_without_a_norm(content, tmp_path, capsys):
    """A file without a finite norm above 0 gives no threshold."""
    assert refused(capsys, write(tmp_path, "a.csv", content)).startswith("norms must hold a finite number above 0")


def test_logs_without_the_key(tmp_path, capsys):
    """A log in which no line has the key holds no norm."""
    path = write(tmp_path, "a.jsonl", '{"a": 1}\n{"b": 1}')
    assert refused(capsys, path).startswith("norms must hold a finite number above 0, got none among 0")


@pytest.mark.parametrize("keep", [5, 20, 100, 2500])
def test_truncated_npy(keep, tmp_path, capsys):
    """An array that was cut off in the magic, the header or the data is refused, not read in part."""
    path = write(tmp_path, "a.npy", norms())
    path.write_bytes(path.read_bytes()[:keep])
    assert "cannot be read" in refused(capsys, path)


def test_npy_that_claims_too_much(tmp_path, capsys):
    """A header that claims more than the file holds asks for no memory."""
    path = tmp_path / "a.npy"
    with path.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "<f8", "fortran_order": False, "shape": (10**15,)})
    assert "cannot be read" in refused(capsys, path)


def test_pickles_are_never_run(tmp_path, capsys):
    """An object array whose pickle would write a file is refused without running it."""

    class Trap:
        def __reduce__(self):
            return pathlib.Path.touch, (tmp_path / "sprung",)

    path = tmp_path / "a.npy"
    np.save(path, np.array([Trap()], object), allow_pickle=True)
    assert "Python objects" in refused(capsys, path)
    assert not (tmp_path / "sprung").exists()


def test_usage(capsys):
    """Without a file, the usage and exit status 2."""
    with pytest.raises(SystemExit) as caught:
        command.main([])
    assert caught.value.code == 2
    assert "usage: python -m optax_clip" in capsys.readouterr().err


# What is printed and drawn


def test_table(tmp_path, capsys):
    """A line a percentile, a line a clip, the suggested one first, and what it rests on."""
    values = norms()
    found = oc.suggest_threshold(values)
    assert command.main([str(write(tmp_path, "a.npy", values)), "--no-figure"]) == 0
    out, err = capsys.readouterr()
    head, *lines = out.split("\n\n")[0].splitlines()
    assert err == "" and head.split() == ["threshold", "clipped"]
    percentiles = ["50th", "75th", "90th", "95th", "99th", "99.9th"]
    for line, percentile, bound in zip(lines[:6], percentiles, found.candidates, strict=True):
        rate = f"{np.mean(values[np.isfinite(values)] > bound):.2%}"
        assert line.split() == [percentile, "percentile", f"{bound:.4g}", rate]
    assert lines[6].split() == ["suggested", f"{found.threshold:.4g}", f"{found.clip_rate:.2%}"]
    for line, (name, clip) in zip(lines[7:], command.ADAPTIVE.items(), strict=True):
        seen = oc.replay(clip, values)
        assert line.split() == [name, f"{np.nanmedian(seen.threshold):.4g}", f"{np.sum(seen.clipped) / 298:.2%}"]
    assert out.split("\n\n")[1] == found.basis + "\n"
    assert "298 finite norms of 300" in found.basis
    assert [path.name for path in tmp_path.iterdir()] == ["a.npy"]


@pytest.mark.full
def test_figure(tmp_path, capsys):
    """The figure stands beside the norms, or where --out says, in the format of its suffix."""
    path = write(tmp_path, "a.npy", norms())
    assert command.main([str(path)]) == 0
    assert capsys.readouterr().out.endswith(f"\nFigure: {tmp_path / 'a.png'}\n")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    assert command.main([str(path), "--out", str(tmp_path / "b.pdf")]) == 0
    assert (tmp_path / "b.pdf").read_bytes().startswith(b"%PDF")


@pytest.mark.full
@pytest.mark.parametrize("out", ["nowhere/a.png", "a.xyz", "a.npy"])
def test_figure_that_cannot_be_written(out, tmp_path, capsys):
    """A folder that is not there or a format that is none: the table, one line on stderr, and the norms untouched."""
    path = write(tmp_path, "a.npy", norms())
    before = path.read_bytes()
    assert command.main([str(path), "--out", str(tmp_path / out)]) == 2
    printed, err = capsys.readouterr()
    assert "suggested" in printed and err.count("\n") == 1
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 1


@pytest.mark.full
def test_without_matplotlib(tmp_path, capsys, monkeypatch):
    """Without matplotlib the table is there, and a line on stderr that says what to install."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "optax_clip.plot", raising=False)
    monkeypatch.delattr(oc, "plot", raising=False)
    assert command.main([str(write(tmp_path, "a.npy", norms()))]) == 2
    out, err = capsys.readouterr()
    assert "suggested" in out and err.count("\n") == 1 and "pip install 'optax_clip[plot]'" in err
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.full
def test_as_a_program(tmp_path):
    """The module runs as a program, without a display, and its exit status is that of main."""
    # Where compilers for accelerators are installed, jax reports that it finds none, with this less than without.
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    run = functools.partial(subprocess.run, capture_output=True, text=True, cwd=ROOT, env=environment)
    path = write(tmp_path, "a.npy", norms())
    done = run([sys.executable, "-W", "error", "-m", "optax_clip", str(path)])
    said = [line for line in done.stderr.splitlines() if not re.match(r"WARNING: All log messages|I\d{4} ", line)]
    assert (done.returncode, said) == (0, []) and "suggested" in done.stdout
    assert (tmp_path / "a.png").exists()
    done = run([sys.executable, "-m", "optax_clip", str(tmp_path / "b.csv")])
    assert (done.returncode, done.stdout) == (2, "") and "No such file" in done.stderr


# Any bytes

HEADER = b"\x93NUMPY\x01\x00v\x00{'descr': '<f8', 'fortran_order': False, 'shape': (2,), }".ljust(127) + b"\n"
PIECES = {
    ".csv": st.sampled_from([b"1", b"1e300", b"-1", b"nan", b"", b"norm", b",", b"\n", b'"', b"\r", b"\x00", b"\xff"]),
    ".jsonl": st.sampled_from(
        [b'{"clip/norm": ', b"1", b"null", b"NaN", b"}", b"\n", b"[", b"1e999", b'"', b"\\ud800", b"\xff", b"{}"]
    ),
    ".npy": st.sampled_from([HEADER, HEADER[:90], b"\x93NUMPY", b"\x02\x00", b"\x00" * 8, np.float64(1.5).tobytes()]),
}


@pytest.mark.full
@pytest.mark.parametrize("suffix", PIECES)
def test_any_bytes(suffix):
    """Whatever bytes a file holds, it is read or refused as a file, without a warning."""

    @given(st.binary(max_size=300) | st.lists(PIECES[suffix], max_size=12).map(b"".join))
    @example(b"")
    @example(HEADER + np.array([1.5, 2.5]).tobytes())
    @example(b"1e300\n1e308\n1e-320")
    def check(content):
        with tempfile.TemporaryDirectory() as folder, contextlib.suppress(ValueError, TypeError):
            oc.suggest_threshold(command.read(write(pathlib.Path(folder), f"a{suffix}", content)))

    check()

"""Suggests a threshold for recorded norms, and draws what clips would have done: `python -m optax_clip norms.csv`."""

import argparse
import csv
import itertools
import json
import math
import pathlib
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from optax_clip import _checks
from optax_clip._adaptive import adagc, autoclip, clip_by_sigma, zclip
from optax_clip._choosing import Replay, Suggestion, replay, suggest_threshold
from optax_clip._norm_clips import clip_by_global_norm

MOST_BYTES = 1_000_000_000
MOST_NORMS = 10_000_000
KEY = "clip/norm"
ADAPTIVE = {
    "zclip()": zclip(),
    "autoclip(10.0)": autoclip(10.0),
    "autoclip(90.0)": autoclip(90.0),
    "adagc()": adagc(),
    "clip_by_sigma()": clip_by_sigma(),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns 0, or 2 where the input or the figure's file cannot be used."""
    parser = argparse.ArgumentParser("python -m optax_clip", description=__doc__)
    parser.add_argument(
        "norms", type=pathlib.Path, help=".csv, .jsonl or .npy with a norm a step, NaN and inf included"
    )
    parser.add_argument("--key", help=f"column of the .csv, or key in the .jsonl (default: {KEY}, or the only column)")
    parser.add_argument("--out", type=pathlib.Path, help="file of the figure (default: that of the norms, with .png)")
    parser.add_argument("--no-figure", action="store_true", help="print the table only")
    args = parser.parse_args(argv)
    try:
        norms = read(args.norms, args.key)
        found = suggest_threshold(norms)
        clips = {f"clip_by_global_norm({found.threshold:.3g})": clip_by_global_norm(found.threshold)} | ADAPTIVE
        replays = {label: jax.tree.map(np.asarray, replay(clip, norms)) for label, clip in clips.items()}
        print(table(found, replays), found.basis, sep="\n\n")
        if not args.no_figure:
            print(figure(norms, replays, args.out or args.norms.with_suffix(".png")))
    except (OSError, ValueError) as error:
        print(" ".join(str(error).split()), file=sys.stderr)
        return 2
    return 0


def table(found: Suggestion, replays: dict[str, Replay]) -> str:
    """A line for each candidate, and one for each clip that adapts."""
    fixed = dict(zip(found.candidates.tolist(), found.clip_rates.tolist())) | {found.threshold: found.clip_rate}
    mark = {found.threshold: "  <- suggested"}
    rows = [("clip_by_global_norm", bound, fixed[bound], mark.get(bound, "")) for bound in sorted(fixed)]
    for label in ADAPTIVE:
        seen = replays[label]
        bounds = seen.threshold[~np.isnan(seen.threshold)][-100:].astype(np.float64)
        bound = float(np.median(bounds)) if bounds.size else math.nan
        rate = seen.clipped.sum() / max(np.isfinite(seen.norm).sum(), 1)
        rows.append((label, bound, rate, "  (median at the end)"))
    lines = [f"{label:<20}{bound:>11.4g}{rate:>11.2%}{note}" for label, bound, rate, note in rows]
    return "\n".join([f"{'clip':<20}{'threshold':>11}{'clipped':>11}", *lines])


def figure(norms: np.ndarray, replays: dict[str, Replay], out: pathlib.Path) -> str:
    """Draws the clips into a file, and says what became of it."""
    try:
        from matplotlib.figure import Figure

        from optax_clip import plot
    except ImportError:
        return 'No figure: matplotlib is missing. Run pip install "optax_clip[plot]".'
    canvas = Figure(figsize=(3.2 * len(replays) + 0.8, 3.6), layout="constrained")
    plot.thresholds(norms, replays, ax=canvas.subplots(1, len(replays), sharey=True))
    canvas.savefig(out)
    return f"Figure: {out}"


def read(path: pathlib.Path, key: str | None = None) -> np.ndarray:
    """The norms in a file, f64[steps]; a ValueError or OSError says what is wrong with it."""
    readers = {".csv": _csv, ".jsonl": _jsonl, ".npy": _npy}
    suffix = path.suffix.lower()
    if not path.is_file():
        raise ValueError(f"{path}: {'is no file' if path.exists() else 'no such file'}. Pass one with norms.")
    if suffix not in readers:
        raise ValueError(f"{path}: the suffix must be {', '.join(readers)}, got {suffix!r}. Save it as one of these.")
    if (size := path.stat().st_size) > MOST_BYTES:
        raise ValueError(f"{path}: at most {MOST_BYTES:,} bytes are read, got {size:,}. Save the norms alone.")
    try:
        norms = readers[suffix](path, key)
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(
            f"{path}: is no {suffix} text in UTF-8 ({error}). Save the norms as such, or as .npy."
        ) from None
    if not norms.size:
        raise ValueError(f"{path}: is empty. At least one norm is required. Record norms with clip_metrics.")
    if norms.size > MOST_NORMS:
        raise ValueError(f"{path}: at most {MOST_NORMS:,} norms are read, got more. Save fewer steps.")
    return _checks.norms(norms, caller=str(path))


def _vector(numbers: Iterable[float]) -> np.ndarray:
    return np.fromiter(itertools.islice(numbers, MOST_NORMS + 1), np.float64)


def _csv(path: pathlib.Path, key: str | None) -> np.ndarray:
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file)
        rows = ((reader.line_num, row) for row in reader if row)  # an empty cell alone on its line is written ""
        head = list(itertools.islice(rows, 100))
        column, first = _column([row for _, row in head], path, key) if head else (0, 0)

        def numbers() -> Iterator[float]:
            for line, row in itertools.chain(head[first:], rows):
                number = _number(row[column]) if column < len(row) else None
                if number is None:
                    cell = _short(row[column] if column < len(row) else None)
                    raise ValueError(f"{path}: line {line} has {cell} instead of a number. Correct the line.")
                yield number

        return _vector(numbers())


def _column(rows: list[list[str]], path: pathlib.Path, key: str | None) -> tuple[int, int]:
    """Which column holds the norms, and how many lines are a header, judged by the first lines."""
    names = [cell.strip() for cell in rows[0]]
    header = any(names) and all(_number(name) is None for name in names if name)
    columns = [[row[i] for row in rows[header:] if i < len(row)] for i in range(len(names))]
    if key is None and header and KEY in names:
        key = KEY
    if key is not None:
        fit = [i for i, name in enumerate(names) if header and name == key]
    else:  # of a single column, the lines that are no numbers are told one by one
        fit = [i for i, cells in enumerate(columns) if len(columns) == 1 or _is_numeric(cells)]
    if len(fit) != 1:
        wanted, found = "of numbers" if key is None else f"named {key!r}", _listed(names) if header else "unnamed ones"
        what_to_do = "Name one of the header by --key." if header else "Add a header, and name one by --key."
        raise ValueError(f"{path}: found {len(fit)} columns {wanted} among {found}. {what_to_do}")
    return fit[0], int(header)


def _is_numeric(cells: list[str]) -> bool:
    return any(cell.strip() for cell in cells) and all(_number(cell) is not None for cell in cells)


def _number(cell: str) -> float | None:
    try:
        return float(cell.strip() or "nan")
    except ValueError:
        return None


def _jsonl(path: pathlib.Path, key: str | None) -> np.ndarray:
    key = KEY if key is None else key
    others: dict[str, None] = {}  # keys of the lines without this one
    skipped = 0

    def numbers() -> Iterator[float]:
        nonlocal skipped
        for line, text in enumerate(file, 1):
            if not text.strip():
                continue
            try:
                record = json.loads(text)
            except (ValueError, RecursionError):
                record = None
            if not isinstance(record, dict):
                raise ValueError(f"{path}: line {line} is no JSON object: {_short(text.strip())}. Correct the line.")
            if key not in record:
                skipped += 1
                others.update(dict.fromkeys(record) if len(others) < 100 else {})
                continue
            value = math.nan if record[key] is None else record[key]
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise ValueError(f"{path}: line {line} has {_short(value)} instead of a number. Correct the line.")
            yield float(str(value))  # by text, as no int is too large for that

    with path.open(encoding="utf-8-sig") as file:
        norms = _vector(numbers())
    if skipped and not norms.size:
        raise ValueError(f"{path}: no line has the key {key!r}, found {_listed(list(others))}. Name one by --key.")
    if skipped:
        print(f"{skipped} lines without {key!r} left out.")
    return norms


def _npy(path: pathlib.Path, key: str | None) -> np.ndarray:
    del key  # an array has none
    try:  # mapped, so that a header cannot ask for memory, and without pickle, so that nothing is executed
        norms = np.lib.format.open_memmap(path, mode="r")
    except Exception as error:  # whatever a damaged header leads to
        raise ValueError(
            f"{path}: is no whole .npy of numbers ({str(error)[:100]}). Save a vector with numpy.save."
        ) from None
    if norms.ndim != 1 or norms.dtype.kind not in "fiu":
        got = f"{norms.dtype} of shape {norms.shape}"
        raise ValueError(f"{path}: must hold a vector of real numbers, got {got}. Save the norms of one block.")
    with np.errstate(all="ignore"):
        return np.array(norms[: MOST_NORMS + 1], np.float64)


def _short(value: Any) -> str:
    text = ascii(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _listed(names: list[str]) -> str:
    return ", ".join(map(_short, names[:10])) + (f" and {len(names) - 10} more" if len(names) > 10 else "")


if __name__ == "__main__":
    sys.exit(main())

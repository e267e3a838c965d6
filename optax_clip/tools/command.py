"""Suggests a threshold for recorded norms, and draws what clips would have done: `python -m optax_clip norms.csv`."""

import argparse
import csv
import json
import pathlib
import sys
from collections.abc import Sequence

import jax
import numpy as np

from optax_clip._engine import checks
from optax_clip.clips.adaptive import adagc, autoclip, clip_by_sigma, zclip
from optax_clip.clips.norms import clip_by_global_norm
from optax_clip.tools.replay import Replay, replay
from optax_clip.tools.suggest import PERCENTILES, Suggestion, suggest_threshold

KEY = "clip/norm"
ADAPTIVE = {
    "zclip()": zclip(),
    "autoclip(10.0)": autoclip(10.0),
    "autoclip(90.0)": autoclip(90.0),
    "adagc()": adagc(),
    "clip_by_sigma()": clip_by_sigma(),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command. It returns 0, or 2 where the input cannot be used or the figure cannot be drawn."""
    parser = argparse.ArgumentParser("python -m optax_clip", description=__doc__)
    parser.add_argument("norms", type=pathlib.Path, help=".csv, .jsonl or .npy of all steps, NaN and inf included")
    parser.add_argument("--key", help=f"column of the .csv, or key in the .jsonl (default: {KEY}, or the only column)")
    parser.add_argument("--out", type=pathlib.Path, help="file of the figure (default: that of the norms, with .png)")
    parser.add_argument("--no-figure", action="store_true", help="print the table only")
    args = parser.parse_args(argv)
    try:
        norms = read(args.norms, args.key)
        found = suggest_threshold(norms)
        clips = {"suggested": clip_by_global_norm(found.threshold)} | ADAPTIVE
        replays = {label: jax.tree.map(np.asarray, replay(clip, norms)) for label, clip in clips.items()}
        print(table(found, replays), found.basis, sep="\n\n")
        if not args.no_figure:
            from optax_clip import plot

            out = args.out or args.norms.with_suffix(".png")
            plot.thresholds(norms, replays)[0].figure.savefig(out)
            print(f"Figure: {out}")
    except (ImportError, OSError, ValueError, TypeError) as error:
        print(" ".join(str(error).split()), file=sys.stderr)
        return 2
    return 0


def table(found: Suggestion, replays: dict[str, Replay]) -> str:
    """A line for each percentile of the norms, and one for each clip, with the median of its thresholds."""
    shares = zip(PERCENTILES, found.candidates, found.clip_rates)
    rows = [(f"{percentile:g}th percentile", bound, rate) for percentile, bound, rate in shares]
    for label, seen in replays.items():
        rows.append((label, np.nanmedian(seen.threshold), np.sum(seen.clipped) / np.isfinite(seen.norm).sum()))
    lines = [f"{label:<20}{bound:>11.4g}{rate:>11.2%}" for label, bound, rate in rows]
    return "\n".join([f"{'':<20}{'threshold':>11}{'clipped':>11}", *lines])


def read(path: pathlib.Path, key: str | None = None) -> np.ndarray:
    """The norms in a file, f64[steps]."""
    # Mapped, so that a header cannot ask for memory, and without pickle, so that nothing is executed.
    readers = {".csv": _csv, ".jsonl": _jsonl, ".npy": lambda path, _: np.lib.format.open_memmap(path, mode="r")}
    if path.suffix.lower() not in readers:
        raise ValueError(f"{path} must be a .csv, .jsonl or .npy file. Save the norms as one of these.")
    try:
        norms = readers[path.suffix.lower()](path, key)
    except Exception as error:  # whatever a damaged file leads to
        raise ValueError(f"{path} cannot be read: {error}. Correct the file, or save the norms as .npy.") from error
    return checks.norms(norms, str(path))


def _csv(path: pathlib.Path, key: str | None) -> np.ndarray:
    with path.open(encoding="utf-8-sig", newline="") as file:
        rows = [row for row in csv.reader(file) if row]
    names = [cell.strip() for cell in rows[0]] if rows else [KEY]
    wanted = names[0] if key is None and len(names) == 1 else key or KEY
    if wanted not in names:
        raise ValueError(f"no column is named {wanted!r} among {checks.show(names)}; name one by --key")
    cells = [row[names.index(wanted)] or "nan" for row in rows]
    try:
        return np.array(cells, np.float64)  # a single column needs no header
    except ValueError:
        return np.array(cells[1:], np.float64)


def _jsonl(path: pathlib.Path, key: str | None) -> np.ndarray:
    lines = filter(str.strip, path.read_text("utf-8-sig").split("\n"))
    records = json.loads("[" + ",\n".join(lines) + "]")  # at once, so that an error names the line
    key = key or KEY
    return np.array([record[key] for record in records if key in record], np.float64)  # null becomes NaN

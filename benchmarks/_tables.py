"""Tables of README and of accuracy.md, from the figures that benchmarks write."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

RESULTS = Path(__file__).parent / "results"

Figures = dict[str, Any]


def demo(figures: Figures) -> str:
    """Accuracy of each, and its paired gain with the standard error."""
    scores, baseline = figures["scores"], figures["baseline"]
    rows = []
    for name, values in scores.items():
        gains = np.subtract(values, scores[baseline])
        error = gains.std(ddof=1) / len(gains) ** 0.5
        gain = "" if name == baseline else f"{gains.mean():+.3f} ± {error:.3f}"
        rows.append([name, f"{np.mean(values):.3f}", gain])
    return _table(["", "accuracy", "gain over the tuned SVC, paired"], rows)


def grid_search(figures: Figures) -> str:
    """Every way's time beside the ideal, and how often the photos went through the network."""
    labels = {
        "plain": "plain transformer, written by hand around torchvision",
        "memory": "the same in `Pipeline(memory=...)`",
        "uncached": "featx without a cache",
        "uncached-memory": "the same in `Pipeline(memory=...)`",
        "cold": "featx, new cache",
        "warm": "featx, the same cache in a new process",
    }
    ways = figures["ways"]
    rows = [[label, f"{ways[way]['time_to_ideal']:.2f}", f"{ways[way]['passes']:.0f}"] for way, label in labels.items()]
    return _table(["", "time, in units of the ideal", "passes over the photos"], rows)


def extraction(figures: Figures) -> str:
    """Every network beside its limit and beside others; a dash where a peer does not have the network.

    Raises
    ------
    ValueError
        A peer was not installed, which a dash must not hide.
    """
    reasons = [reason for row in figures["photos"].values() for reason in row["absent"].values()]
    if missing := [reason for reason in reasons if reason.startswith("not installed")]:
        raise ValueError(f"All peers are expected to be installed, got {missing}. Run make bench.")
    peers = {
        "loop": "plain loop",
        "fx": "torchvision fx + DataLoader",
        "timm": "timm + DataLoader",
        "img2vec": "img2vec",
        "embetter": "embetter",
    }
    rows = []
    for model, row in figures["photos"].items():
        times = [f"{row['times_faster_than'][peer]:.1f}" if peer in row["parity"] else "-" for peer in peers]
        rows.append([model, f"{row['of_limit']:.2f}", *times])
    return _table(["", "fraction of the limit", *peers.values()], rows)


def fits(figures: Figures) -> str:
    """Every way's time beside featx's, in each place."""
    labels = {
        "default": "`GridSearchCV(pipeline, grid, cv=5)`",
        "workers": "the same with `n_jobs=-1`",
        "one": "the same in a process with `OMP_NUM_THREADS=1`",
        "featx": "`featx search`, `featx fit`",
    }
    medians = figures["median_seconds"]
    times = {way: [of[way] / medians["alone"]["featx"] for of in medians.values()] for way in labels}
    return _table(["", *medians], [[label, *(f"{time:.1f}" for time in times[way])] for way, label in labels.items()])


def accuracy(figures: Figures) -> str:
    """Every way in every cell: accuracy, what it gains over the two it is compared with, and seconds."""
    others = ("probe", "old default, all layers")
    rows = []
    for row in figures["table"]:
        spread = "" if row["spread"] is None else f" ± {100 * row['spread']:.1f}"
        gains = [_percent(row["over"].get(other)) for other in others]
        rows.append([row["cell"], row["way"], f"{100 * row['accuracy']:.1f}{spread}", *gains, f"{row['seconds']:.0f}"])
    return _table(["cell", "way", "accuracy", "over the probe", "over the old default", "seconds"], rows)


def _percent(gain: tuple[float, float] | None) -> str:
    return "" if gain is None else f"{100 * gain[0]:+.1f} ± {100 * gain[1]:.1f}"


def counts(figures: Figures) -> str:
    """Every way's mean absolute error, R2 and seconds."""
    ways = dict.fromkeys(key.rsplit(", ", 1)[0] for key in figures["runs"])
    rows = []
    for way in ways:
        found = [run for key, run in figures["runs"].items() if key.rsplit(", ", 1)[0] == way]
        errors = [run["error"] for run in found]
        spread = f" ± {np.std(errors, ddof=1):.2f}" if len(errors) > 1 else ""
        r2, seconds = (np.mean([run[name] for run in found]) for name in ("R2", "seconds"))
        rows.append([way, f"{np.mean(errors):.2f}{spread}", f"{r2:.2f}", f"{seconds:.0f}"])
    return _table(["way", "error, cells", "R2", "seconds"], rows)


Tables = dict[str, tuple[str, Callable[[Figures], str]]]
#: By page, and on it by name: the file of figures and what makes a table of them.
PAGES: dict[str, Tables] = {
    "README.md": {
        "demo": ("demo", demo),
        "grid-search": ("grid_search", grid_search),
        "extraction": ("extraction", extraction),
        "fits": ("fits", fits),
    },
    "benchmarks/accuracy.md": {"accuracy": ("accuracy", accuracy), "counts": ("counts", counts)},
}


def put(text: str, name: str, table: str) -> str:
    """The text with a table between the marks of its name.

    Raises
    ------
    ValueError
        The marks are not there, once.
    """
    begin, end = f"<!-- table: {name} -->", "<!-- end of table -->"
    out, count = re.subn(f"{re.escape(begin)}.*?{re.escape(end)}", f"{begin}\n{table}\n{end}", text, flags=re.DOTALL)
    if count != 1:
        raise ValueError(f"{begin} ... {end} is expected once in the text, got it {count} times.")
    return out


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)

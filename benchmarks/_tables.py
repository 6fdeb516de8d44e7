"""README's tables, from the figures that benchmarks write."""

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


#: By name: the file of figures and what makes a table of them.
TABLES: dict[str, tuple[str, Callable[[Figures], str]]] = {
    "demo": ("demo", demo),
    "grid-search": ("grid_search", grid_search),
    "extraction": ("extraction", extraction),
    "fits": ("fits", fits),
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

"""Several ways to the same result, each timed in a process of its own, and what their ratios should be."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.modules.module import register_module_forward_pre_hook

DATA = Path(os.environ.get("FEATX_DATA", Path(__file__).parents[2] / "shared"))
WEIGHTS = DATA / "weights" / "squeezenet1_1-imagenet-features.safetensors"

Figures = dict[str, Any]
Limit = tuple[str, str, str, float]  # two ways, "at most" or "at least", and the ratio of their times


def parse_arguments(description: str | None, quick: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help=quick)
    parser.add_argument("--json", type=Path, help="where to write the figures")
    parser.add_argument("--way", nargs=3, help=argparse.SUPPRESS)
    return parser.parse_args()


def unpack_photos(folder: Path) -> Path:
    """The photos of ants and bees, as a folder of class subfolders."""
    with zipfile.ZipFile(DATA / "data" / "ants-bees.zip") as archive:
        archive.extractall(folder / "photos")
    return folder / "photos"


def run_in_process(script: str, way: str, photos: Path, folder: Path, quick: bool) -> Figures:
    """Figures of one way, which a new process of ``script`` prints as JSON."""
    command = [sys.executable, script, "--way", way, str(photos), str(folder), *(["--quick"] if quick else [])]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout)


def count_images() -> Callable[[], int]:
    """How many images went through a SqueezeNet since, leaving out the shapes that are traced without values."""
    seen = [0]

    def count(module: torch.nn.Module, args: tuple[Any, ...]) -> None:
        if type(module).__name__ == "SqueezeNet" and isinstance(args[0], torch.Tensor):
            seen[0] += len(args[0]) if args[0].device.type != "meta" else 0

    register_module_forward_pre_hook(count)
    return lambda: seen[0]


def compare(runs: Mapping[str, Sequence[Figures]], ideal: Sequence[Figures]) -> dict[str, Figures]:
    """Per way that was run, the median times, their ratios to the ideal, and passes over the photos."""

    def median(figures: Sequence[Figures], name: str) -> float:
        return float(np.median([run[name] for run in figures]))

    return {
        way: {
            "time_to_ideal": median(figures, "seconds") / median(ideal, "seconds"),
            "cpu_to_ideal": median(figures, "cpu_seconds") / median(ideal, "cpu_seconds"),
            "passes": figures[0]["images"] / figures[0]["n"],
            "images": figures[0]["images"],
            "seconds": [run["seconds"] for run in figures],
            "cpu_seconds": [run["cpu_seconds"] for run in figures],
        }
        for way, figures in runs.items()
        if figures
    }


def print_table(ways: Mapping[str, Figures], labels: Mapping[str, str]) -> None:
    print(f"{'':24} time / ideal   CPU / ideal   passes   images    seconds   runs")
    for way, label in labels.items():
        if way not in ways:
            print(f"{label:24} absent: not installed")
            continue
        row = ways[way]
        print(f"{label:24} {row['time_to_ideal']:12.2f} {row['cpu_to_ideal']:13.2f}", end=" ")
        print(f"{row['passes']:8.2f} {row['images']:8,} {np.median(row['seconds']):10.2f} {len(row['seconds']):6}")


def check_limits(ways: Mapping[str, Figures], limits: Iterable[Limit]) -> list[Figures]:
    """The ratios that matter, with their limits and whether they are met; None where a way was not run."""
    rows = []
    for way, other, kind, limit in limits:
        row: Figures = {"ratio": f"{way} / {other}", "limit": f"{kind} {limit:g}", "met": None}
        if way in ways and other in ways:
            time_ratio, cpu_ratio = (ways[way][name] / ways[other][name] for name in ("time_to_ideal", "cpu_to_ideal"))
            met = time_ratio >= limit if kind == "at least" else time_ratio <= limit
            row |= {"time": time_ratio, "cpu": cpu_ratio, "met": bool(met)}
        rows.append(row)
    return rows


def is_failed(rows: Iterable[Figures], quick: bool) -> bool:
    """Whether a limit that was measured is not met."""
    return not quick and any(row["met"] is False for row in rows)


def print_limits(rows: Iterable[Figures], quick: bool) -> None:
    print(f"\n{'':15}     time      CPU   limit of the time" + " (too few photos to judge)" * quick)
    for row in rows:
        if row["met"] is None:
            print(f"{row['ratio']:15} {'-':>8} {'-':>8}   {row['limit']:17} not measured")
            continue
        verdict = "" if quick else ("met" if row["met"] else "NOT MET")
        print(f"{row['ratio']:15} {row['time']:8.2f} {row['cpu']:8.2f}   {row['limit']:17} {verdict}".rstrip())

"""What a benchmark's figures were measured with."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

_PACKAGES = ("featx", "joblib", "lmdb", "numpy", "scikit-learn", "torch", "torchvision", "xxhash")


def about() -> dict[str, str]:
    """Versions, machine and commit."""
    describe = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    commit = subprocess.run(describe, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    return {
        "commit": commit.stdout.strip(),
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        **{name: version(name) for name in _PACKAGES},
    }


def runs_in(path: Path | None, settings: dict[str, Any]) -> dict[str, Any]:
    """What a run with these settings that was broken off has written; nothing where there is no file."""
    if path is None or not path.exists():
        return {}
    before = json.loads(path.read_text())
    if before["settings"] != settings:
        raise SystemExit(f"--json: {path} was measured with other settings. Name another file.")
    runs: dict[str, Any] = before["runs"]
    return runs


def write_json(path: Path, figures: dict[str, Any]) -> None:
    """Figures, with what they were measured with; the file is whole whenever a run is broken off."""
    draft = path.with_name(f".{path.name}.draft")
    draft.write_text(json.dumps(figures | about(), indent=1) + "\n")
    draft.replace(path)


def packed(values: Any) -> dict[str, Any]:
    """A few distinct numbers in a long row, as a line of digits."""
    distinct, which = np.unique(np.asarray(values, dtype=float), return_inverse=True)
    assert len(distinct) <= 10
    return {"distinct": distinct.tolist(), "which": "".join(map(str, which))}


def unpacked(row: dict[str, Any]) -> np.ndarray:
    """What `packed` has packed."""
    return np.array(row["distinct"])[[*map(int, row["which"])]]

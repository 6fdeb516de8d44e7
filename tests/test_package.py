"""The house: what may import what, what the package exports, and that the examples run."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import featx

ROOT = Path(featx.__file__).parent
# From the ground up: a room imports from rooms below it and from itself.
FLOORS = [
    "_version",
    "exceptions",
    "locks",
    "randomness",
    "threads",
    "writing",
    "callers",
    "pickling",
    "images",
    "store",
    "backbones",
    "activations",
    "training",
    "notebook",
    "output",
    "lazy",
    "base",
    "epochs",
    "tuning",
    "extractor",
    "classifier",
    "plots",
    "distributed",
    "cli",
    "__main__",
]


def imports_of(path: Path) -> set[str]:
    tree = ast.parse(path.read_text())
    modules = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module}
    modules |= {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    return {module.split(".")[1] for module in modules if module.startswith("featx.")}


@pytest.mark.parametrize("room", FLOORS)
def test_no_import_runs_upward(room: str) -> None:
    files = [ROOT / f"{room}.py"] if (ROOT / f"{room}.py").exists() else list((ROOT / room).glob("*.py"))
    above = set(FLOORS[FLOORS.index(room) + 1 :])
    assert files
    assert not {str(path): found for path in files if (found := imports_of(path) & above)}


def test_every_room_has_a_floor() -> None:
    rooms = {path.stem for path in ROOT.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert rooms - {"__init__"} == set(FLOORS)


def test_public_names_are_there_and_documented() -> None:
    for name in featx.__all__:
        assert getattr(featx, name) is not None
        assert name == "__version__" or getattr(featx, name).__doc__


def test_files_stay_readable() -> None:
    assert not {path: n for path in ROOT.rglob("*.py") if (n := len(path.read_text().splitlines())) > 450}


def test_demo_prints_what_was_compared_and_what_to_do_next(tmp_path: Path) -> None:
    demo = ROOT.parent / "examples" / "demo.py"
    if not demo.exists():
        pytest.skip("installed without the examples")
    done = subprocess.run([sys.executable, str(demo), "--draws", "1"], capture_output=True, text=True, check=True)
    for words in ("raw pixels, tuned SVC", "featx_micro, random weights", "featx_micro, pretrained", "Next:"):
        assert words in done.stdout


def test_readmes_examples_run() -> None:
    readme = ROOT.parent / "README.md"
    if not readme.exists():
        pytest.skip("installed without the README")
    blocks = re.findall(r"^```python\n(.*?)^```", readme.read_text(), flags=re.DOTALL | re.MULTILINE)
    assert len(blocks) >= 2
    assert not re.findall(r"\b[A-Z]+_TABLE\b", readme.read_text())
    done = subprocess.run([sys.executable, "-c", "\n".join(blocks)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert 0.8 < float(done.stdout.split()[0]) <= 1

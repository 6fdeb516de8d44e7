"""The house: what may import what, what the package exports, and that the examples run."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import featx

ROOT = Path(featx.__file__).parent
# From the ground up: a room imports from rooms below it and from itself.
FLOORS = [
    "_version",
    "exceptions",
    "system",
    "images",
    "store",
    "backbones",
    "activations",
    "training",
    "choosing",
    "estimators",
    "plots",
    "distributed",
    "cli",
    "__main__",
]
ROOMS = [floor for floor in FLOORS if (ROOT / floor).is_dir()]
MODULES = {
    ".".join(("featx", *path.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__"): path
    for path in ROOT.rglob("*.py")
}

# Of torch, and of its tensors and modules: what is not the same on every device.
DEVICE_PARTS = {"cuda", "mps", "xpu", "cpu", "amp", "autocast", "backends", "OutOfMemoryError", "default_generator"}
DEVICE_NAME = re.compile(r"(cuda|mps|xpu)(:\d+)?")


def imports_of(path: Path) -> set[str]:
    """Modules of featx that a file imports, at its top, in a function or for its annotations."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            found |= {name if name in MODULES else node.module for name in names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return {name for name in found if name.split(".")[0] == "featx"}


def first_circle(imports: Mapping[str, set[str]]) -> list[str]:
    """Modules that import each other in a ring; none where there is no ring."""
    try:
        list(TopologicalSorter(imports).static_order())
    except CycleError as error:
        return list(error.args[1])
    return []


@pytest.mark.parametrize("room", FLOORS)
def test_no_import_runs_upward(room: str) -> None:
    files = list((ROOT / room).rglob("*.py")) if room in ROOMS else [ROOT / f"{room}.py"]
    above = set(FLOORS[FLOORS.index(room) + 1 :])
    rooms = {path: {name.split(".")[1] for name in imports_of(path) if "." in name} for path in files}
    assert files
    assert not {str(path): found & above for path, found in rooms.items() if found & above}


def test_no_imports_run_in_a_circle() -> None:
    assert not first_circle({name: imports_of(path) - {name} for name, path in MODULES.items()})


def test_a_circle_inside_a_room_is_found() -> None:
    assert set(first_circle({"featx.a.b": {"featx.a.c"}, "featx.a.c": {"featx.a.b"}})) == {"featx.a.b", "featx.a.c"}
    assert not first_circle({"featx.a.b": {"featx.a.c"}, "featx.a.c": set()})


def test_every_room_has_a_floor() -> None:
    rooms = {path.stem for path in ROOT.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert rooms - {"__init__"} == set(FLOORS)


def test_few_files_lie_outside_the_rooms() -> None:
    assert len([path for path in ROOT.iterdir() if path.is_file()]) <= 5


def test_the_table_for_contributors_lists_the_rooms_from_the_ground_up() -> None:
    page = ROOT.parent / "CONTRIBUTING.md"
    if not page.exists():
        pytest.skip("installed without CONTRIBUTING.md")
    assert re.findall(r"^\| `featx/(\w+)/` \|", page.read_text(), flags=re.MULTILINE) == ROOMS


@pytest.mark.parametrize("room", ROOMS)
def test_room_says_what_it_is_and_names_files_that_are_there(room: str) -> None:
    said = ast.get_docstring(ast.parse((ROOT / room / "__init__.py").read_text(encoding="utf-8"))) or ""
    names = re.findall(r"[\w/]+\.py\b", said)
    inside = [name for name in names if "/" not in name]
    assert len(said.splitlines()) >= 8
    assert re.search(r"\bOpen ``\w+\.py`` first", said)
    assert re.search(r"\b[Ll]aws? ", said)
    assert not [name for name in inside if not (ROOT / room / name).is_file()]
    assert not [name for name in names if name.startswith("featx/") and not (ROOT.parent / name).is_file()]


def names_of_devices(path: Path) -> set[str]:
    """What a file names of a kind of devices: torch's parts for it, and texts that torch would take as a device."""
    tree = ast.parse(path.read_text())
    parts = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)} & DEVICE_PARTS
    texts = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    return parts | {text for text in texts if DEVICE_NAME.fullmatch(text)}


def test_kinds_of_devices_are_named_in_one_file_alone() -> None:
    found = {name: names for name, path in MODULES.items() if (names := names_of_devices(path))}
    assert found.keys() == {"featx.system.devices"}
    assert found["featx.system.devices"] >= {"cuda", "mps"}  # the search finds what there is


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

"""What is published: requirements, extras, and what reports of faults tell of them."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from configparser import ConfigParser
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest
from commands import runner

import featx
from featx.cli.commands import featx as program

ROOT = Path(featx.__file__).parents[1]
OF_DEVELOPERS = {"test", "bench", "dev"}


@pytest.fixture(scope="module")
def setup() -> ConfigParser:
    if not (ROOT / "setup.cfg").exists():
        pytest.skip("installed without setup.cfg")
    read = ConfigParser()
    read.read(ROOT / "setup.cfg")
    return read


def requirements(lines: str) -> dict[str, str]:
    """Lower bounds by name, extras of featx's own left out."""
    found = [line.split("#")[0].strip().partition(">=") for line in lines.splitlines()]
    return {name.partition("[")[0]: bound for name, _, bound in found if name and not name.startswith("featx")}


def test_version_tells_the_release_of_everything_that_featx_requires(setup: ConfigParser) -> None:
    told = subprocess.run(
        [sys.executable, "-m", "featx", "--version"], capture_output=True, text=True, check=True
    ).stdout
    lines = told.splitlines()
    assert lines[0] == f"featx {featx.__version__}"
    for name in requirements(setup["options"]["install_requires"]):
        assert f"{name} {version(name)}" in lines
    for extra in ("plots", "timm", "heic"):
        for name in requirements(setup["options.extras_require"][extra]):
            assert f"{name} {version(name)}" in lines
    assert not any(line.startswith(("pytest", "ruff", "featx[")) for line in lines[1:])


def test_version_of_a_clone_that_is_not_installed_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def find_none(name: str) -> list[str]:
        raise PackageNotFoundError(name)

    monkeypatch.setattr("featx.cli.versions.requires", find_none)
    told = runner().invoke(program, ["--version"])
    assert told.exit_code == 0, told.exception
    first, second, last = told.stdout.splitlines()
    assert first == f"featx {featx.__version__}"
    assert second.startswith("Python ")
    assert "unknown, since featx is not installed" in last


def test_extra_all_is_every_extra_that_is_for_users(setup: ConfigParser) -> None:
    extras = setup["options.extras_require"]
    named = extras["all"].strip().removeprefix("featx[").removesuffix("]").split(",")
    assert set(named) == set(extras) - OF_DEVELOPERS - {"all"}


def test_lower_bounds_are_what_the_oldest_leg_installs(setup: ConfigParser) -> None:
    pinned = dict(
        line.split("==") for line in (ROOT / "constraints/oldest.txt").read_text().splitlines() if "==" in line
    )
    extras = setup["options.extras_require"]
    for lines in (setup["options"]["install_requires"], *(extras[name] for name in set(extras) - {"bench", "dev"})):
        for name, bound in requirements(lines).items():
            assert f"{pinned[name]}.".startswith(f"{bound}."), (name, bound, pinned[name])


def comparisons_of_versions(code: str) -> list[str]:
    """Expressions that ask for releases from some number on, or how a number begins; not whether two are the same."""
    asked = re.compile(r"__version__|version_info|\bversion\(|[Pp]arse_version|\bVersion\(")
    nodes = [
        node
        for node in ast.walk(ast.parse(code))
        if (isinstance(node, ast.Compare) and not isinstance(node.ops[0], (ast.Eq, ast.NotEq)))
        or (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "startswith")
    ]
    return [expression for node in nodes if asked.search(expression := ast.unparse(node))]


def test_no_room_compares_versions() -> None:
    assert comparisons_of_versions("a = sklearn.__version__ >= '1.9'\nb = version('torch').startswith('2.')") != []
    found = {path: comparisons_of_versions(path.read_text()) for path in (ROOT / "featx").rglob("*.py")}
    assert not {path: expressions for path, expressions in found.items() if expressions}

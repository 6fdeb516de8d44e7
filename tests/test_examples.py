"""The gallery: every example runs anywhere, without a warning, and what it claims holds."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from releases import warnings_to_ignore

import featx

ROOT = Path(featx.__file__).parents[1]
EXAMPLES = sorted((ROOT / "examples").glob("plot_*.py"))
# What an example claims beyond beating its baseline: with the real photos and weights, and without.
CLAIMS = {"plot_10": (0.8, 0.8), "plot_11": (4 / 6, 0.9)}
LAST_LINE = re.compile(r"(?P<figure>[\w ]+?) (?P<value>\d\.\d{3})(, baseline (?P<baseline>\d\.\d{3}))?")


def check_claims(example: Path, folder: Path, data: str | None = None) -> None:
    """Run one example in a process of its own, and check the figures of its last line."""
    env = {**os.environ, "MPLBACKEND": "Agg"} | ({"FEATX_DATA": data} if data else {})
    options = [word for warning in ["error", *warnings_to_ignore()] for word in ("-W", warning)]
    done = subprocess.run([sys.executable, *options, example], cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    assert not list(folder.iterdir())
    figures = LAST_LINE.fullmatch(done.stdout.splitlines()[-1])
    assert figures, done.stdout
    least = CLAIMS.get(example.name[:7])
    assert least or figures["baseline"], "an example is expected to print a baseline beside its figure"
    if figures["baseline"]:
        assert float(figures["value"]) > float(figures["baseline"]), figures[0]
    if least:
        assert float(figures["value"]) >= round(least["No photos" in done.stdout], 3), figures[0]


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_example_holds_what_it_claims(example: Path, tmp_path: Path) -> None:
    check_claims(example, tmp_path)


@pytest.mark.slow  # where there are no photos, this is what the test above does
@pytest.mark.parametrize(
    "example", [path for path in EXAMPLES if "example_data" in path.read_text()], ids=lambda path: path.stem
)
def test_example_holds_what_it_claims_without_the_real_photos(example: Path, tmp_path: Path) -> None:
    check_claims(example, tmp_path, data=os.devnull)


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_example_states_its_run_time(example: Path) -> None:
    assert re.search(r"in\s+about \d+ seconds on two cores", example.read_text())


def test_readme_lists_every_example() -> None:
    listed = re.findall(r"examples/(plot_\w+\.py)", (ROOT / "README.md").read_text())
    assert sorted(set(listed)) == [path.name for path in EXAMPLES]

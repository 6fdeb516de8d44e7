"""Tables on pages are what the benchmarks wrote, and nothing else."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def tables() -> ModuleType:
    file = ROOT / "benchmarks" / "_tables.py"
    if not file.exists():
        pytest.skip("installed without the benchmarks")
    spec = importlib.util.spec_from_file_location("_tables", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_table_comes_from_figures_in_the_repository(tables: ModuleType) -> None:
    for page, of_page in tables.PAGES.items():
        text = (ROOT / page).read_text()
        assert sorted(re.findall("<!-- table: (.+?) -->", text)) == sorted(of_page)
        for name, (file, make) in of_page.items():
            figures = json.loads((tables.RESULTS / f"{file}.json").read_text())
            assert {"commit", "machine", "torch"} <= figures.keys()
            assert tables.put(text, name, make(figures)) == text, f"{name}: run make bench BENCH_ARGS=--write"


def test_marks_that_are_missing_are_an_error(tables: ModuleType) -> None:
    with pytest.raises(ValueError, match="demo -->"):
        tables.put("no marks", "demo", "a table")

"""Other systems than this one: without what only Unix has, with drives and backslashes, with open files held."""

from __future__ import annotations

import ast
import json
import ntpath
import os
import posixpath
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from bare import FOLDERS, MODULES, NAMES
from PIL import Image
from sklearn.datasets import load_digits

import featx
from featx import FeatureStore, FineTuneClassifier, PretrainedFeatureExtractor
from featx.cli.options import weights_of
from featx.distributed import listing
from featx.distributed.folder import Folder
from featx.images.remote import is_url
from featx.store import index, store
from featx.system import writing
from featx.system.paths import nearby, path_of_url, with_slashes
from featx.system.shell import typed

ROOT = Path(featx.__file__).parent
DIFFERENT = {*NAMES.split(), "link", "symlink", "readlink", "kill"}  # the last four exist elsewhere, and do less


# What only some systems have


def of_one_system(tree: ast.AST) -> Iterator[str]:
    """Modules, functions and folders in some code that other systems lack."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in MODULES)
        elif isinstance(node, ast.ImportFrom):
            names = [alias.name for alias in node.names] if node.module in ("os", "signal") else []
            yield from (name for name in [node.module or "", *names] if name in {*MODULES, *DIFFERENT, "signal"})
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            if node.value.id == "signal" or (node.value.id == "os" and node.attr in DIFFERENT):
                yield f"{node.value.id}.{node.attr}"
        elif isinstance(node, ast.Constant) and str(node.value).startswith(FOLDERS):
            yield str(node.value)


def test_what_only_one_system_has_is_used_in_store_and_system_alone() -> None:
    files = {path.relative_to(ROOT): ast.parse(path.read_text(encoding="utf-8")) for path in ROOT.rglob("*.py")}
    found = {path: [*of_one_system(tree)] for path, tree in files.items() if path.parts[0] not in ("store", "system")}
    assert found
    assert not {path: names for path, names in found.items() if names}


@pytest.mark.parametrize(
    "line",
    [
        "import fcntl",
        "from resource import getrusage",
        "from os import fork",
        "os.register_at_fork(before=f)",
        "if hasattr(os, 'link'): os.link(a, b)",
        "signal.alarm(3)",
        "Path('/proc/meminfo').read_text()",
    ],
)
def test_what_only_one_system_has_is_found(line: str) -> None:
    assert [*of_one_system(ast.parse(line))]


@pytest.mark.parametrize(("words", "place"), [("register_at_fork", "forks.py"), ("import shlex", "shell.py")])
def test_one_place_knows_how_systems_fork_and_how_their_shells_quote(words: str, place: str) -> None:
    assert [path.name for path in ROOT.rglob("*.py") if words in path.read_text(encoding="utf-8")] == [place]


def write_photos(folder: Path) -> None:
    rng = np.random.default_rng(0)
    for name, brightest in (("Ants", 40), ("bees", 200)):
        (folder / name).mkdir(parents=True)
        for file in ("a.png", "A.PNG", "c.jpg", "d.JPG"):
            Image.fromarray(rng.integers(0, brightest, (20, 20, 3)).astype(np.uint8)).save(folder / name / file)


def run_as(system: str, folder: Path) -> Any:
    """What bare.py found in a process of its own."""
    if not (folder / "photos").exists():
        write_photos(folder / "photos")
    environment = os.environ | {"FEATX_CACHE": str(folder / "cache"), "PYTHONPATH": str(ROOT.parent)}
    program = [sys.executable, str(Path(__file__).with_name("bare.py")), str(folder), system]
    done = subprocess.run(program, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="which files are open is read from Linux's /proc")
def test_photos_give_the_same_on_a_system_without_what_only_unix_has(tmp_path: Path) -> None:
    whole, bare = (run_as(system, tmp_path / system) for system in ("whole", "bare"))
    assert bare == whole
    assert (bare["images"], bare["wrong"], len(set(bare["files"]))) == (8, 0, 8)
    assert run_as("bare", tmp_path / "bare") == bare  # nothing is computed again


# Links


def _no_links(*_: object) -> None:
    raise NotImplementedError("link")


def test_store_on_a_disk_without_links_has_one_seed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writing.os, "link", _no_links)
    seeds = {store._seed(tmp_path / "seed") for _ in range(3)}
    assert len(seeds) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["seed"]


def test_store_on_a_disk_without_links_takes_the_seed_of_whoever_came_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def too_late(_: Path, file: Path) -> None:
        file.write_text("abc")
        _no_links()

    monkeypatch.setattr(writing.os, "link", too_late)
    assert store._seed(tmp_path / "seed") == 0xABC


# Files that are open


def test_loaded_classifier_does_not_change_with_its_file(tmp_path: Path) -> None:
    X, y = load_digits().images[:20], load_digits().target[:20] % 2
    fitted = FineTuneClassifier("featx_micro", image_size=16, pixel_range=(0, 16), freeze="all", epochs=1).fit(X, y)
    fitted.save(tmp_path / "m.safetensors")
    loaded = FineTuneClassifier.load(tmp_path / "m.safetensors")
    with open(tmp_path / "m.safetensors", "rb+") as file:  # in its place, as cp does
        file.write(bytes(os.path.getsize(file.name)))
    np.testing.assert_array_equal(loaded.predict_proba(X), fitted.predict_proba(X))


# Drives and backslashes


@pytest.mark.parametrize("path", [r"C:\photos\a.jpg", "C:/photos/a.jpg", "c://photos/a.jpg", r"\\nas\photos\a.jpg"])
def test_path_with_a_drive_is_no_url(path: str) -> None:
    assert not is_url(path)
    assert Folder(path, None).url == path


@pytest.mark.parametrize("url", ["s3://a/b.jpg", "gs://a/b", "zip://*.jpg::file:///C:/a.zip", "az://a"])
def test_protocol_of_two_letters_is_one(url: str) -> None:
    assert is_url(url)


@pytest.mark.parametrize(
    ("url", "system", "path"),
    [
        ("file:///C:/out", ntpath, r"C:\out"),
        ("local://C:/out", ntpath, r"C:\out"),
        ("file:///out", posixpath, "/out"),
        ("file:///C:/out", posixpath, "/C:/out"),
    ],
)
def test_url_of_a_file_names_its_path(url: str, system: ModuleType, path: str) -> None:
    assert path_of_url(url, system) == path


def test_path_on_another_drive_is_told_in_full(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ntpath.os, "getcwd", lambda: r"C:\here")
    assert nearby(r"D:\photos\a.jpg", ntpath) == r"D:\photos\a.jpg"
    assert nearby(r"C:\here\photos\a.jpg", ntpath) == r"photos\a.jpg"


@pytest.mark.parametrize("pattern", [r"photos\**\*.jpg", "photos/**/*.jpg"])
def test_pattern_with_backslashes_is_one_of_all_depths_where_they_part_folders(pattern: str) -> None:
    assert listing._DEEP.split(with_slashes(pattern, ntpath)) == ["photos/", "*.jpg"]


def test_backslash_is_part_of_a_name_where_it_parts_nothing() -> None:
    assert with_slashes(r"photos\**", posixpath) == r"photos\**"


def test_system_folder_in_a_path_with_backslashes_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listing, "with_slashes", lambda path: with_slashes(path, ntpath))
    found = listing._sorted_out([r"photos\a.jpg", r"photos/@eaDir\a.jpg"], listing._asked_for("photos/*/*.jpg"))
    assert found.pictures == [r"photos\a.jpg"]
    assert found.left_out.total() == 1


def test_key_of_weights_stands_behind_a_path_with_a_drive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path(r"C:\w#1.pth").touch()
    assert weights_of(r"C:\w#1.pth#model#ema") == (os.path.abspath(r"C:\w#1.pth"), "model#ema")


WORDS = ["featx", "fit", r"C:\my photos", "--classes", 'a,"b,c"', "it's"]


def test_line_is_read_as_the_words_that_it_was_made_of() -> None:
    assert shlex.split(typed(WORDS, "posix")) == WORDS


def test_line_for_windows_quotes_doubly_and_leaves_backslashes() -> None:
    line = typed(WORDS, "nt")
    assert r'"C:\my photos"' in line
    # By the rules of Microsoft's C library, for words without backslashes before quotes.
    words = re.findall(r'(?:[^\s"\\]|\\"|\\(?!")|"(?:[^"\\]|\\.)*")+', line)
    assert [re.sub(r'(?<!\\)"', "", word).replace('\\"', '"') for word in words] == WORDS


def test_names_that_the_output_cannot_hold_are_written_as_escapes(tmp_path: Path) -> None:
    write_photos(tmp_path / "photos")
    (tmp_path / "photos" / "bees").rename(tmp_path / "photos" / "蜂")
    program = [sys.executable, "-m", "featx", "check", str(tmp_path / "photos")]
    environment = os.environ | {"PYTHONPATH": str(ROOT.parent)}
    told = {
        encoding: subprocess.run(
            program, capture_output=True, check=True, env=environment | {"PYTHONIOENCODING": encoding}
        )
        for encoding in ("cp1252", "utf-8")
    }
    assert told["utf-8"].stdout.decode("utf-8").count("蜂") > 0
    expected = told["utf-8"].stdout.decode("utf-8").encode("cp1252", "backslashreplace")
    assert told["cp1252"].stdout == expected


# Numbers of files


def test_file_number_of_128_bits_tells_files_apart() -> None:
    def status(number: int) -> Any:
        return SimpleNamespace(st_dev=2**63 + 1, st_ino=number, st_size=3, st_mtime_ns=4, st_ctime_ns=5)

    numbers = [7, 2**64 + 7, 2**127 + 7]
    assert len({index._state(status(number)) for number in numbers}) == 3


# Lower and upper case


def test_files_that_differ_in_case_only_have_rows_of_their_own(tmp_path: Path) -> None:
    write_photos(tmp_path / "photos")
    if len(names := os.listdir(tmp_path / "photos" / "bees")) < 4:
        pytest.skip("this disk takes lower and upper case for the same")
    found = featx.load_image_folder(tmp_path / "photos", shuffle=False)
    bees = [path for path in found.data if "bees" in path]
    assert sorted(map(os.path.basename, bees)) == sorted(names)
    cache = FeatureStore(tmp_path / "store")
    extractor = PretrainedFeatureExtractor("featx_micro", image_size=16, cache=cache)
    assert len(np.unique(extractor.transform(bees), axis=0)) == cache.info()["images"] == 4

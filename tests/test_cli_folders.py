"""Laws of folders on the command line: what is left out is told once, splits are no classes, links are followed."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import Result
from commands import runner
from pictures import encode
from PIL import Image

from featx.cli.commands import featx
from featx.images import heif

heif.register()  # for writing
MICRO = ["--backbone", "featx_micro", "--image-size", "16"]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEATX_CACHE", str(tmp_path / "cache"))


def put(root: Path, *names: str) -> Path:
    """Pictures that differ, in the format of their names; other files are empty."""
    for number, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        kind = {".jpg": "JPEG", ".png": "PNG", ".avif": "AVIF", ".heic": "HEIF"}.get(Path(name).suffix)
        pixels = np.full((16, 16, 3), [number, 0, 200 if "bees" in name else 0], np.uint8)
        (root / name).write_bytes(encode(pixels, kind) if kind else b"")
    return root


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    pictures = [
        f"{name}/{i}.{end}" for name, end in (("ants", "jpg"), ("ants", "avif"), ("bees", "heic")) for i in range(3)
    ]
    pictures += [f"wasps/{i}.png" for i in range(3)]
    return put(tmp_path / "photos", *pictures, "wasps/notes.txt", "ants/@eaDir/0.jpg/thumb.jpg", "loose.png")


@pytest.fixture
def without_heif(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where pillow-heif is not installed."""
    monkeypatch.setattr(heif, "register", lambda: False)
    monkeypatch.setattr(Image, "EXTENSION", {end: kind for end, kind in Image.EXTENSION.items() if kind != "HEIF"})


def run(*arguments: object, code: int = 0) -> Result:
    result = runner().invoke(featx, [str(argument) for argument in arguments])
    assert result.exit_code == code, (result.output, result.exception)
    return result


def counts(found: dict[str, Any]) -> dict[str, int]:
    return {each["ending"]: each["number"] for each in found["left_out"] if each["ending"] != "/"}


def test_commands_tell_once_what_they_leave_out(mixed: Path, tmp_path: Path) -> None:
    query = put(tmp_path, "query.png") / "query.png"
    run("fit", mixed, "-o", tmp_path / "m.joblib", *MICRO, "--layers", "-1")
    usual = {".jpg": 1, ".txt": 1}
    commands = {
        "fit": (["fit", mixed, "-o", tmp_path / "n.joblib", *MICRO, "--layers", "-1"], usual | {".png": 1}, 12),
        "search": (["search", mixed, "--backbones", "featx_micro", "--layers", "-1"], usual | {".png": 1}, 12),
        "extract": (["extract", mixed, "-o", tmp_path / "f.npy", *MICRO], usual, 13),
        "shards": (["extract", mixed, "-o", tmp_path / "shards", *MICRO], usual, 13),
        "predict": (["predict", tmp_path / "m.joblib", mixed], usual, 13),
        "similar": (["similar", "featx_micro", mixed, query], usual, 13),
    }
    for name, (command, left_out, n_photos) in commands.items():
        result = run(*command, "--json")
        found = json.loads(result.stdout)
        assert (name, counts(found), found["n_photos"], found["broken"]) == (name, left_out, n_photos, [])
        (line,) = [line for line in result.stderr.splitlines() if line.startswith("Left out: ")]
        assert "1 .txt (no picture format that can be read here)" in line
        assert line.endswith("1 hidden or of the system.")
        failed = run(*command, "--strict", code=1).stderr.strip()
        assert re.fullmatch(r"Error: Photos alone are expected with --strict, got .*1 \.txt .*", failed), name
        assert "hidden" not in failed
    (mixed / "wasps" / "notes.txt").unlink()
    (mixed / "loose.png").unlink()
    for name in ("fit", "extract", "predict"):
        run(*commands[name][0], "--strict")


@pytest.mark.filterwarnings("always:Pictures are expected")
def test_lost_class_is_warned_of_and_ends_strict_commands(mixed: Path, tmp_path: Path, without_heif: None) -> None:
    command = ["fit", mixed, "-o", tmp_path / "m.joblib", *MICRO, "--layers", "-1"]
    result = run(*command, "--json")
    found = json.loads(result.stdout)
    assert (found["classes"], found["n_photos"], counts(found)[".heic"]) == (["ants", "wasps"], 9, 3)
    assert (
        "Warning: Pictures are expected in every class folder, got none in 'bees', which holds 3 .heic" in result.stderr
    )
    assert 'needs pip install "featx[heic]"' in run(*command, "--strict", code=1).stderr


def test_folder_of_heic_alone_is_told_what_to_install(tmp_path: Path, without_heif: None) -> None:
    folder = put(tmp_path / "photos", "ants/1.heic", "bees/1.heic")
    for command in (
        ["fit", folder, "-o", tmp_path / "m.joblib"],
        ["search", folder],
        ["extract", folder, "-o", tmp_path / "f.npy"],
    ):
        assert '2 .heic (needs pip install "featx[heic]")' in run(*command, code=1).stderr


def test_splits_are_no_classes_and_both_ways_out_work(tmp_path: Path) -> None:
    names = [f"{split}/{name}/{i}.png" for split in ("train", "val") for name in ("ants", "bees") for i in range(2)]
    folder = put(tmp_path / "two words", *names, "val/wasps/1.png")
    options = ["-o", tmp_path / "m.joblib", *MICRO, "--layers", "-1", "--json"]
    failed = run("fit", folder, *options, code=1).stderr
    as_splits, as_classes = re.findall(r"(?:classes|name them): (\S.*? --classes \S+?)(?=\.|$)", failed.strip())
    assert json.loads(run("fit", *shlex.split(as_splits), *options).stdout)["classes"] == ["ants", "bees"]
    found = json.loads(run("fit", *shlex.split(as_classes), *options).stdout)
    assert found["classes"] == ["train", "val"]
    run("predict", tmp_path / "m.joblib", folder)  # whose folders mean nothing


def test_classes_are_names_even_where_they_are_numbers(tmp_path: Path) -> None:
    folder = put(tmp_path / "photos", *(f"{name}/{i}.png" for name in ("007", "test") for i in range(2)))
    (folder / "9").mkdir()
    words = ["--classes", "test,007,9", "--layers", "-1"]
    result = run("search", folder, "--backbones", "featx_micro", *words)
    assert f"featx fit {folder} --classes test,007,9 -o model.joblib" in result.stdout
    assert "1 folder (no picture of '9')" in result.stderr
    failed = run("search", folder, "--backbones", "featx_micro", "--classes", "test", code=1).stderr
    assert f"with '007' too. Name all of them: {folder} --classes test,007" in failed


def test_classes_spelt_wrongly_are_told_what_may_be_meant(tmp_path: Path) -> None:
    folder = put(tmp_path / "photos", *(f"{name}/{i}.png" for name in ("ants", "bees") for i in range(2)))
    options = ["-o", tmp_path / "m.joblib", *MICRO, "--layers", "-1", "--json"]
    failed = run("fit", folder, "--classes", "ants,Beees", *options, code=1).stderr
    (line,) = re.findall(r"Did you mean 'bees' in place of 'Beees'\? Name them: (.*?)\. To leave out", failed)
    assert json.loads(run("fit", *shlex.split(line), *options).stdout)["classes"] == ["ants", "bees"]


def test_classes_without_a_folder_are_told_and_the_way_out_works(tmp_path: Path) -> None:
    folder = put(tmp_path / "small", *(f"{name}/{i}.png" for name in ("ants", "bees") for i in range(2)))
    options = ["-o", tmp_path / "m.joblib", *MICRO, "--layers", "-1", "--json"]
    failed = run("fit", folder, "--classes", "ants,wasps", *options, code=1).stderr
    assert "with no folder 'wasps'; there are 'ants', 'bees'. Name" in failed
    (line,) = re.findall(r"Name all of them: (.*?)\. To leave out", failed)
    assert json.loads(run("fit", *shlex.split(line), *options).stdout)["classes"] == ["ants", "bees"]


def test_commands_follow_links_as_the_library_does(tmp_path: Path) -> None:
    put(tmp_path / "elsewhere", "bees/1.png", "bees/2.png", "more/3.png")
    folder = put(tmp_path / "photos", "ants/1.png", "ants/2.png")
    (folder / "bees").symlink_to(tmp_path / "elsewhere" / "bees")
    (folder / "ants" / "more").symlink_to(tmp_path / "elsewhere" / "more")
    (folder / "ants" / "up").symlink_to("..")
    fit = run("fit", folder, "-o", tmp_path / "m.joblib", *MICRO, "--layers", "-1", "--json")
    for command in (
        ["extract", folder, "-o", tmp_path / "f.npy", *MICRO, "--json"],
        ["predict", tmp_path / "m.joblib", folder, "--json"],
    ):
        assert json.loads(run(*command).stdout)["n_photos"] == json.loads(fit.stdout)["n_photos"] == 5
    assert "1 folder (a link to a folder that it lies in)" in fit.stderr


def test_class_names_with_commas_and_quotes_can_be_typed(tmp_path: Path) -> None:
    names = ["tench, Tinca tinca", '5" disc', '"quoted"', "b"]
    folder = put(tmp_path / "photos", *(f"train/{name}/{i}.png" for name in names for i in range(2)))
    options = ["-o", tmp_path / "m.joblib", *MICRO, "--layers", "-1", "--json"]
    failed = run("fit", folder, *options, code=1).stderr
    (as_splits,) = re.findall(r"same classes: (.*?)\. If they are classes", failed.strip())
    assert json.loads(run("fit", *shlex.split(as_splits), *options).stdout)["classes"] == sorted(names)
    searched = run("search", *shlex.split(as_splits), "--backbones", "featx_micro", "--layers", "-1").stdout
    (next_command,) = re.findall(r"featx (fit .*)", searched)
    assert json.loads(run(*shlex.split(next_command), *options).stdout)["classes"] == sorted(names)


@pytest.mark.parametrize("names", ["", ",", " , "])
def test_classes_are_at_least_one(names: str, tmp_path: Path) -> None:
    put(tmp_path, "a/1.png")
    assert "At least one value" in run("fit", tmp_path, "-o", tmp_path / "m.joblib", "--classes", names, code=2).stderr

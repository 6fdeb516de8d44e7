"""Laws of the command line: one pass per photo, broken photos told, nothing half-written, every end an exit code."""

from __future__ import annotations

import csv
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import joblib
import numpy as np
import pandas as pd
import pyarrow.parquet
import pytest
import torch
from click.testing import Result
from commands import runner
from conftest import relative_difference
from hypothesis import given
from hypothesis import strategies as st
from pictures import colours, damaged_png, encode, photo, png_header
from safetensors.torch import save_file
from torchvision.models import mobilenet_v3_small

from featx import FeatureStore, PretrainedFeatureExtractor, list_layers
from featx.activations.kept import windows
from featx.cli.commands import featx
from featx.cli.outcomes import Console

MICRO = ["--backbone", "featx_micro"]
RNG = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FeatureStore:
    monkeypatch.setenv("FEATX_CACHE", str(tmp_path / "cache"))
    return FeatureStore(tmp_path / "cache")


def picture(red: bool) -> np.ndarray:
    pixels = RNG.integers(0, 120, size=(32, 32, 3), dtype=np.uint8)
    pixels[..., 0 if red else 2] += 120
    return pixels


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    for name, red in (("red", True), ("blue", False)):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for i in range(8):
            (tmp_path / "photos" / name / f"{i}.jpg").write_bytes(encode(picture(red), "JPEG"))
    return tmp_path / "photos"


def break_some(folder: Path) -> list[str]:
    """Files of twenty-odd kinds that are no pictures, though they are named so."""
    pixels = photo(48, 64)
    jpeg, png, webp = encode(pixels, "JPEG"), encode(pixels, "PNG"), encode(pixels, "WEBP")
    contents = {
        "truncated.jpg": jpeg[: len(jpeg) // 2],
        "start-alone.jpg": jpeg[:20],
        "empty.jpg": b"",
        "text.jpg": b"these are words\n" * 9,
        "page.jpeg": b"<!doctype html><title>404</title>",
        "program.png": b"\x7fELF" + bytes(200),
        "zeros.png": bytes(4096),
        "noise.bmp": RNG.bytes(4000),
        "noise.gif": RNG.bytes(4000),
        "truncated.png": png[: len(png) // 2],
        "checksum.png": damaged_png(pixels, b"IDAT", "checksum"),
        "flipped.png": damaged_png(pixels, b"IDAT", "content"),
        "header.png": damaged_png(pixels, b"IHDR", "checksum"),
        "hollow.png": png_header(8, 8),
        "bomb.png": png_header(100_000, 100_000),
        "truncated.webp": webp[: len(webp) // 2],
        "truncated.gif": encode(pixels, "GIF")[:60],
        "truncated.tif": encode(pixels, "TIFF")[:200],
        "drawing.jpg": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n",
        "comma, and \n new line.jpg": b"no",
    }
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    with zipfile.ZipFile(folder / "archive.jpg", "w") as archive:
        archive.writestr("x", "y")
    (folder / "directory.jpg").mkdir()
    os.mkfifo(folder / "fifo.jpg")
    (folder / "dangling.jpg").symlink_to("nowhere")
    (folder / "circle.jpg").symlink_to("circle.jpg")
    names = [*contents, "archive.jpg", "directory.jpg", "fifo.jpg", "dangling.jpg", "circle.jpg"]
    if os.geteuid():
        (folder / "locked.jpg").write_bytes(jpeg)
        (folder / "locked.jpg").chmod(0)
        names.append("locked.jpg")
    return sorted(str(folder / name) for name in names)


def run(*arguments: object, code: int = 0, **more: Any) -> Result:
    result = runner().invoke(featx, [str(argument) for argument in arguments], **more)
    assert result.exit_code == code, (result.output, result.exception)
    return result


def run_json(*arguments: object) -> dict[str, Any]:
    return json.loads(run(*arguments, "--json").stdout)


def start(*arguments: object) -> subprocess.Popen:
    command = [sys.executable, "-m", "featx", *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def many(folder: Path, count: int) -> Path:
    folder.mkdir()
    for i in range(count):
        (folder / f"{i:04}.jpg").write_bytes(encode(picture(i % 2 == 0), "JPEG"))
    return folder


# One pass


def test_search_passes_each_photo_once_through_each_network(photos: Path, cache: FeatureStore) -> None:
    command = ["search", photos, "--backbones", "featx_micro,squeezenet1_1", "--weights-of", "squeezenet1_1=none"]
    command += ["--image-size", 32, "--layers", "all,penultimate", "--poolings", "avg,max"]
    found = run_json(*command)
    info = cache.info()
    assert [row["images"] for row in info["by_recipe"]] == [16, 16]
    assert info["computed"] == 2 * 16
    tried = {(row["backbone"], row["layer"], row["pooling"]) for row in found["leaderboard"]}
    for backbone in ("featx_micro", "squeezenet1_1"):
        expected = {(backbone, layer, pooling) for layer in list_layers(backbone) for pooling in ("avg", "max")}
        assert expected <= tried
    assert [row["accuracy"] for row in found["leaderboard"]] == sorted(
        (row["accuracy"] for row in found["leaderboard"]), reverse=True
    )
    again = run_json(*command)
    assert again["leaderboard"] == found["leaderboard"]
    assert [effort["n_computed"] for effort in found["efforts"] + again["efforts"]] == [16, 16, 0, 0]
    assert cache.info()["computed"] == 2 * 16


@pytest.mark.parametrize("command", ["search", "fit"])
def test_all_layers_are_tried_with_the_penultimate_one(
    command: str, photos: Path, tmp_path: Path, cache: FeatureStore
) -> None:
    if command == "search":
        found = run_json("search", photos, "--backbones", "featx_micro")
        assert [row["layer"] for row in found["leaderboard"]].count("penultimate") == 1
        assert {row["layer"] for row in found["leaderboard"]} == {*list_layers("featx_micro"), "penultimate"}
    else:
        found = run_json("fit", photos, "-o", tmp_path / "m.joblib", *MICRO, "--layers", "all")
        assert found["layers_tried"] == len(list_layers("featx_micro")) + 1
    assert cache.info()["computed"] == 16


def test_penultimate_layer_without_weights_is_told_and_left_out(
    photos: Path, tmp_path: Path, cache: FeatureStore
) -> None:
    state = mobilenet_v3_small(weights=None).state_dict()
    file = tmp_path / "trunk.safetensors"
    save_file({name: value for name, value in state.items() if "classifier" not in name}, file)
    command = ["search", photos, "--backbones", "mobilenet_v3_small", "--weights", file, "--image-size", 32]
    result = run(*command, "--json")
    assert result.stderr.count("The penultimate layer is not tried") == 1
    layers = {row["layer"] for row in json.loads(result.stdout)["leaderboard"]}
    assert layers == {*list_layers("mobilenet_v3_small")}
    assert cache.info()["computed"] == 16
    assert "classifier.0" in run(*command, "--layers", "all,penultimate", code=1).stderr


def test_weights_that_are_not_there_are_told_once(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    tries: list[str] = []

    def fetch(url: str, *_: object, **__: object) -> None:
        tries.append(url)
        raise OSError("no connection")

    monkeypatch.setattr("torch.hub.download_url_to_file", fetch)
    told = run("search", photos, "--backbones", "squeezenet1_1", code=1).stderr
    assert len(tries) == 1
    assert "not tried" not in told
    assert told.count("--weights") == 1


def test_fit_and_predict_pass_each_photo_once(photos: Path, tmp_path: Path, cache: FeatureStore) -> None:
    run("fit", photos, "-o", tmp_path / "m.joblib", *MICRO, "--layers", "0,penultimate")
    run("predict", tmp_path / "m.joblib", photos)
    assert cache.info()["computed"] == 16


def test_no_cache_keeps_nothing(photos: Path, tmp_path: Path) -> None:
    run("search", photos, "--backbones", "featx_micro", "--no-cache")
    run("extract", photos, "-o", tmp_path / "f.npy", *MICRO, "--no-cache")
    assert not (tmp_path / "cache").exists()


@given(st.sets(st.integers(0, 99)), st.integers(1, 12), st.integers(0, 100))
def test_windows_hold_all_in_order_and_go_on_as_a_whole_run_would(places: set[int], size: int, done: int) -> None:
    found = list(windows(sorted(places), size))
    assert [place for window in found for place in window] == sorted(places)
    assert all(0 < len(window) <= size for window in found)
    whole = [list(range(first, min(first + size, 100))) for first in range(0, 100, size)][done:]
    in_the_way = {place for place in places if whole and place < whole[0][0]}  # unreadable, and so missing once more
    again = windows([*sorted(in_the_way), *(place for window in whole for place in window)], size)
    assert [rest for window in again if (rest := [place for place in window if place not in in_the_way])] == whole


# Broken photos


def commands(photos: Path, out: Path) -> dict[str, list[object]]:
    run("fit", photos / "good", "-o", out / "model.joblib", *MICRO, "--layers", "penultimate")
    return {
        "fit": ["fit", photos, "-o", out / "again.joblib", *MICRO, "--quick"],
        "fit --fine-tune": ["fit", photos, "-o", out / "t.joblib", *MICRO, "--fine-tune", "--epochs", 1, "--folds", 2],
        "predict": ["predict", out / "model.joblib", photos, "-o", out / "labels.csv"],
        "search": ["search", photos, "--backbones", "featx_micro"],
        "extract": ["extract", photos, "-o", out / "f.parquet", *MICRO],
        "extract without a cache": ["extract", photos, "-o", out / "f.npy", *MICRO, "--no-cache"],
        "similar": ["similar", "featx_micro", photos, photos / "red" / "0.jpg"],
    }


def test_broken_photos_are_told_by_every_command_and_stop_none(photos: Path, tmp_path: Path) -> None:
    shutil.copytree(photos, photos / "good")
    broken = break_some(photos / "red")
    assert len(broken) >= 20
    for name, command in commands(photos, tmp_path).items():
        result = run(*command, "--json")
        told = {row["path"]: row["reason"] for row in json.loads(result.stdout)["broken"]}
        assert sorted(told) == broken, name
        assert all(told.values())
        assert told[str(photos / "red" / "directory.jpg")] == "it is a directory"
        assert "FIFO" in told[str(photos / "red" / "fifo.jpg")]
        for path, reason in told.items():
            assert f"{path}: {reason}" in result.stderr
        first = run(*command, "--strict", code=1).stderr
        assert len(first.strip().replace(" \n ", "").splitlines()) == 1
        assert broken[0] in first, name
    with open(tmp_path / "labels.csv", newline="") as file:
        errors = {row["path"]: row["error"] for row in csv.DictReader(file)}
    assert {path: error for path, error in errors.items() if error} == told
    table = pyarrow.parquet.read_table(tmp_path / "f.parquet").to_pylist()
    assert {row["path"]: row["error"] for row in table if row["error"]} == told
    assert all((row["error"] is None) == (None not in [*row.values()][1:-1]) for row in table)
    about = json.loads((tmp_path / "f.npy.json").read_text())
    assert [error is not None for error in about["errors"]] == np.isnan(np.load(tmp_path / "f.npy")).any(1).tolist()


def test_too_few_readable_photos_are_an_error_that_lists_the_broken_ones(photos: Path, tmp_path: Path) -> None:
    shutil.rmtree(photos / "red")
    (photos / "red").mkdir()
    broken = break_some(photos / "red")
    result = run("fit", photos, "-o", tmp_path / "m.joblib", *MICRO, "--quick", code=1)
    assert all(path in result.stderr for path in broken)
    assert "two classes" in result.stderr
    assert not (tmp_path / "m.joblib").exists()


def test_names_that_are_no_text_and_empty_folders_do_no_harm(photos: Path, tmp_path: Path) -> None:
    odd = os.fsencode(photos) + b'/red/\xff, "quoted".jpg'
    shutil.copy(photos / "red" / "0.jpg", odd)
    found = run_json("extract", photos, "-o", tmp_path / "f.parquet", *MICRO)
    assert found["n_photos"] == 17
    paths = pyarrow.parquet.read_table(tmp_path / "f.parquet", columns=["path"])["path"].to_pylist()
    assert sum("\\udcff" in path for path in paths) == 1
    (tmp_path / "nothing").mkdir()
    assert "holds no pictures" in run("extract", tmp_path / "nothing", "-o", tmp_path / "g.npy", *MICRO, code=1).stderr


# Ends


READABLE = 999


@pytest.fixture
def in_the_middle(tmp_path: Path, cache: FeatureStore) -> Iterator[tuple[subprocess.Popen, list[object]]]:
    """A running extraction that has computed some of its photos, one of the first unreadable, and its command."""
    folder = many(tmp_path / "many", READABLE + 1)
    (folder / "0002.jpg").write_bytes(b"\xff\xd8\xff broken")
    command = ["extract", folder, "-o", tmp_path / "f.parquet", *MICRO, "--image-size", 64, "--batch-size", 8]
    process = start(*command)
    while cache.info()["computed"] < 24 and process.poll() is None:
        time.sleep(0.005)
    yield process, command
    process.kill()
    process.communicate()


def test_killed_extract_goes_on_where_it_was(
    in_the_middle: tuple[subprocess.Popen, list[object]],
    tmp_path: Path,
    cache: FeatureStore,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    process, command = in_the_middle
    process.kill()
    assert process.wait() == -signal.SIGKILL
    before = cache.info()["computed"]
    assert 0 < before < READABLE
    assert not (tmp_path / "f.parquet").exists()
    run(*command)
    assert cache.info()["computed"] == READABLE
    resumed = pyarrow.parquet.read_table(tmp_path / "f.parquet").to_pandas()
    assert not list(tmp_path.glob(".*.part"))
    monkeypatch.setenv("FEATX_CACHE", str(tmp_path / "other"))
    run(*command)
    assert FeatureStore(tmp_path / "other").info()["computed"] == READABLE
    at_once = pyarrow.parquet.read_table(tmp_path / "f.parquet").to_pandas()
    # Photos that were left are batched otherwise, which may round otherwise.
    columns = [name for name in at_once if name not in ("path", "error")]
    good = at_once["error"].isna()
    assert relative_difference(resumed.loc[good, columns], at_once.loc[good, columns]) < 1e-5
    pd.testing.assert_frame_equal(resumed.drop(columns=columns), at_once.drop(columns=columns))


def test_interrupted_extract_ends_cleanly(
    in_the_middle: tuple[subprocess.Popen, list[object]], tmp_path: Path, cache: FeatureStore
) -> None:
    process, _ = in_the_middle
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=30)
    assert process.returncode == 130, errors
    assert output == ""
    told = re.fullmatch(r"Interrupted. (\d+) new rows of features are kept; the same command goes.*", errors.strip())
    assert told, errors
    assert int(told[1]) == cache.info()["computed"]
    assert not [path for path in tmp_path.iterdir() if path.suffix in (".parquet", ".part")]
    assert cache.verify()["wrong"] == 0


def test_interrupt_promises_nothing_where_nothing_is_kept(photos: Path, tmp_path: Path, monkeypatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("featx.cli.search._show", interrupt)
    words = ["search", photos, "--backbones", "featx_micro"]
    assert run(*words, "--no-cache", code=130).stderr.splitlines()[-1] == "Interrupted."
    assert "16 new rows" in run(*words, code=130).stderr


@pytest.mark.parametrize("command", ["predict", "extract", "extract to shards", "similar"])
def test_without_one_photo_that_can_be_read_no_command_succeeds(command: str, photos: Path, tmp_path: Path) -> None:
    model, out = tmp_path / "m.joblib", tmp_path / ("f.npy" if command == "extract" else "f")
    new = tmp_path / "new"
    new.mkdir()
    for name in ("a.jpg", "b.jpg"):
        (new / name).write_bytes(b"broken")
    if command == "predict":
        run("fit", photos, "-o", model, *MICRO, "--quick")
    words = {
        "predict": ["predict", model, new, "-o", tmp_path / "labels.csv"],
        "similar": ["similar", "featx_micro", new, photos / "red" / "0.jpg"],
    }.get(command, ["extract", new, "-o", out, *MICRO])
    failed = run(*words, "--json", code=1)
    assert "None of 2 photos could be read." in failed.stderr
    assert len(json.loads(failed.stdout)["broken"]) == 2
    if command == "predict":  # the reasons are written all the same
        assert (tmp_path / "labels.csv").read_text().count("jpg") == 2
    (new / "c.jpg").write_bytes(encode(picture(True), "JPEG"))
    if out.is_dir():
        shutil.rmtree(out)
    run(*words)


def test_fine_tuning_tells_its_folds_to_who_watches(photos: Path, tmp_path: Path, monkeypatch) -> None:
    words = ["fit", photos, "-o", tmp_path / "t.joblib", *MICRO, "--fine-tune", "--epochs", 1, "--folds", 2]
    assert "Fold" not in run(*words).stderr
    monkeypatch.setattr(Console, "verbose", 1)
    assert re.findall(r"^Fold \d of \d|^The model", run(*words).stderr, re.MULTILINE) == [
        "Fold 1 of 2",
        "Fold 2 of 2",
        "The model",
    ]


def test_list_of_commands_says_each_in_a_whole_sentence() -> None:
    commands = run("--help").output.partition("Commands:")[2].partition("Example")[0].strip().splitlines()
    assert len(commands) == len(featx.commands)
    assert all(re.search(r"[a-z]\.$", line) and "..." not in line for line in commands), commands


def test_process_ends_with_the_codes_that_scripts_rely_on(photos: Path) -> None:
    ended = [start(*words) for words in (("layers", "resnet19"), ("layers",), ("layers", "featx_micro", "--json"))]
    outputs = [process.communicate() for process in ended]
    assert [process.returncode for process in ended] == [1, 2, 0]
    assert [row["name"] for row in json.loads(outputs[2][0])["layers"]] == list_layers("featx_micro")


def test_failed_run_leaves_the_older_file_as_it_was(photos: Path, tmp_path: Path) -> None:
    (tmp_path / "f.npy").write_text("older")
    (photos / "red" / "9.jpg").write_text("broken")
    run("extract", photos, "-o", tmp_path / "f.npy", *MICRO, "--strict", code=1)
    assert (tmp_path / "f.npy").read_text() == "older"
    assert not list(tmp_path.glob(".*.part"))


@pytest.mark.parametrize(
    ("words", "place"),
    [
        (["extract", "{photos}", "-o", "{out}/f.npy", "--backbone", "resnet81"], "--backbone"),
        (["search", "{photos}", "--backbones", "featx_micro,resnet81"], "--backbones"),
        (["layers", "resnet81"], "BACKBONE"),
        (["similar", "resnet81", "{photos}", "{photos}/red/0.jpg"], "BACKBONE_OR_MODEL"),
    ],
)
def test_unknown_backbone_is_one_line_with_near_names_and_where_it_stands(
    words: list[str], place: str, photos: Path, tmp_path: Path
) -> None:
    words = [word.format(photos=photos, out=tmp_path) for word in words]
    (line,) = run(*words, code=1).stderr.splitlines()
    assert line.startswith("Error: ")
    assert "'resnet18'" in line
    assert f", got {place} 'resnet81'." in line
    assert place in run(words[0], "--help").stdout
    assert "Traceback" in run(*words, "--traceback", code=1).stderr


@pytest.mark.parametrize(
    "words",
    [
        ["fit", "{photos}"],
        ["fit", "nowhere", "-o", "m.joblib"],
        ["fit", "{photos}", "-o", "m.txt"],
        ["fit", "{photos}", "-o", "m.safetensors"],
        ["fit", "{photos}", "-o", "nowhere/m.joblib"],
        ["search", "{photos}", "--poolings", "avg,mean"],
        ["search", "{photos}", "--weights-of", "resnet50=none"],
        ["cache", "prune", "--max-size", "much"],
        ["similar", "resnet18", "{photos}"],
        ["frobnicate"],
    ],
)
def test_wrong_usage_is_told_before_anything_is_computed(words: list[str], photos: Path, cache: FeatureStore) -> None:
    assert run(*(word.format(photos=photos) for word in words), code=2).stderr.startswith("Usage: ")
    assert cache.info()["computed"] == 0


def test_files_that_are_no_models_are_told_in_one_line(photos: Path, tmp_path: Path) -> None:
    joblib.dump({"a": 1}, tmp_path / "dict.joblib")
    (tmp_path / "words.joblib").write_text("words")
    (tmp_path / "words.safetensors").write_text("words")
    save_file({"w": torch.zeros(2)}, tmp_path / "tensors.safetensors")
    assert "a file of tensors alone" in run("predict", tmp_path / "tensors.safetensors", photos, code=1).stderr
    for name in ("dict.joblib", "words.joblib", "words.safetensors", "tensors.safetensors"):
        (line,) = run("predict", tmp_path / name, photos, code=1).stderr.splitlines()
        assert name in line


@pytest.mark.parametrize("written", ["archive", "pickle", "safetensors"])
def test_checkpoint_in_the_place_of_a_model_is_told_what_it_is_for(photos: Path, tmp_path: Path, written: str) -> None:
    state = PretrainedFeatureExtractor("featx_micro")._spec().load("cpu", torch.float32).module.state_dict()
    path = tmp_path / f"it's last.{'safetensors' if written == 'safetensors' else 'ckpt'}"
    if written == "safetensors":
        save_file({name: value.contiguous() for name, value in state.items()}, path)
    else:
        torch.save({"state_dict": state}, path, _use_new_zipfile_serialization=written == "archive")
    (line,) = run("predict", path, photos, code=1).stderr.splitlines()
    assert re.search(rf"got {re.escape(str(path))}, a .*\. Learn with it first: featx fit photos/ -o", line)
    assert "Error" not in line.removeprefix("Error: ")
    assert line.count("expected") == 1
    words = shlex.split(line.partition("Learn with it first: featx ")[2])
    words[words.index("NAME")], words[words.index("photos/")] = "featx_micro", str(photos)
    words[words.index("model.joblib")] = str(tmp_path / "m.joblib")
    run(*words, "--quick")
    run("predict", tmp_path / "m.joblib", photos)


@pytest.mark.parametrize("fine_tune", [("--quick",), ("--fine-tune", "--epochs", 1, "--folds", 2)])
def test_model_whose_weights_are_gone_says_where_to_put_them(photos: Path, tmp_path: Path, fine_tune: tuple) -> None:
    state = PretrainedFeatureExtractor("featx_micro")._spec().load("cpu", torch.float32).module.state_dict()
    torch.save(state, tmp_path / "w.pth")
    model = tmp_path / "m.joblib"
    run("fit", photos, "-o", model, *MICRO, "--weights", tmp_path / "w.pth", *fine_tune)
    (tmp_path / "w.pth").rename(tmp_path / "moved.pth")
    (line,) = run("predict", model, photos, "--no-cache", code=1).stderr.splitlines()
    assert f"is expected at {tmp_path / 'w.pth'}, where it is no more. Put it there again, or a link to it" in line
    assert "Correct the path" not in line
    (tmp_path / "w.pth").symlink_to("moved.pth")
    run("predict", model, photos, "--no-cache")


def test_network_in_a_checkpoint_is_chosen_by_what_the_error_says(photos: Path, tmp_path: Path) -> None:
    name, states = "it's a b#1.bin", {}
    for seed, key in enumerate(["model", "state_dict_ema"]):
        spec = PretrainedFeatureExtractor("featx_micro", weights=None, random_state=seed)._spec()
        states[key] = spec.load("cpu", torch.float32).module.state_dict()
    torch.save(states, tmp_path / name)
    words = ["extract", photos, "-o", tmp_path / "f.npy", *MICRO, "--weights"]
    (line,) = run(*words, tmp_path / name, code=1).stderr.splitlines()
    told = shlex.split(line.rpartition("by its key: --weights ")[2].removesuffix("."))
    assert told == [f"{tmp_path / name}#model"]
    run(*words, *told)
    chosen = PretrainedFeatureExtractor("featx_micro", weights=(tmp_path / name, "model"), on_error="nan")
    np.testing.assert_array_equal(
        np.load(tmp_path / "f.npy"), chosen.transform(sorted(map(str, photos.rglob("*.jpg"))))
    )
    other = f"{tmp_path / name}#state_dict_ema"
    found = run_json("search", photos, "--backbones", "featx_micro", "--weights-of", f"featx_micro={other}")
    assert {row["weights"] for row in found["leaderboard"]} == {other}
    torch.save(states["model"], other)  # a file of that whole name comes first
    run(*words, other)
    np.testing.assert_array_equal(
        np.load(tmp_path / "f.npy"), chosen.transform(sorted(map(str, photos.rglob("*.jpg"))))
    )


@pytest.mark.parametrize("fine_tune", [("--quick",), ("--fine-tune", "--epochs", 1, "--folds", 2)])
def test_model_from_a_checkpoint_tells_which_file_it_reads(photos: Path, tmp_path: Path, fine_tune: tuple) -> None:
    spec = PretrainedFeatureExtractor("featx_micro")._spec()
    torch.save({"ema": spec.load("cpu", torch.float32).module.state_dict()}, tmp_path / "w")
    model = tmp_path / ("m.safetensors" if "--fine-tune" in fine_tune else "m.joblib")
    told = run("fit", photos, "-o", model, *MICRO, "--weights", f"{tmp_path / 'w'}#ema", *fine_tune).stdout
    assert f"It reads {tmp_path / 'w'}, which must stay there." in told
    assert len(run("predict", model, photos).stdout.splitlines()) == 17


# What comes out


def test_interrupt_while_copies_are_counted_leaves_the_model(photos: Path, tmp_path: Path, monkeypatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("featx.cli.fit._tell_copies", interrupt)
    words = ["fit", photos, *MICRO, "--layers", "2", "--folds", "2"]
    run(*words, "-o", tmp_path / "m.joblib", code=130)
    assert (tmp_path / "m.joblib").exists()
    run(*words, "-o", tmp_path / "quiet.joblib", "-q")  # where nothing is counted


def test_fit_counts_copies_in_one_line_and_learns_the_same(photos: Path, tmp_path: Path) -> None:
    shutil.copy(photos / "red" / "0.jpg", photos / "blue" / "again.jpg")
    shutil.copy(photos / "red" / "1.jpg", photos / "red" / "again.jpg")
    for i in range(2):
        (photos / "blue" / f"empty {i}.jpg").touch()  # alike, and no photos
    for more in (("--quick",), ("--fine-tune", "--epochs", 1, "--folds", 2)):
        told = run("fit", photos, "-o", tmp_path / "m.joblib", *MICRO, *more).stderr.splitlines()
        (line,) = [line for line in told if line.startswith("Exact copies")]
        assert line == (
            "Exact copies: 4 files of 2 photos; under several classes: 2 files of 1 photo (featx check -o FILE lists "
            "them)."
        )
        assert "Exact copies" not in run("fit", photos, "-o", tmp_path / "m.joblib", *MICRO, *more, "-q").stderr


def test_quiet_leaves_out_advice_and_tells_what_is_lost(photos: Path, tmp_path: Path) -> None:
    (photos / "red" / "cut.jpg").write_bytes(b"\xff\xd8\xff")
    for words in (
        ["fit", photos, "-o", tmp_path / "m.joblib", *MICRO, "--quick"],
        ["search", photos, "--backbones", "featx_micro", "--layers", "-1"],
    ):
        loud, quiet = run(*words), run(*words, "--quiet")
        assert "Next: featx " in loud.stdout
        assert "Next: " not in quiet.output
        assert "cut.jpg: truncated or damaged JPEG" in quiet.stderr
        results, _, _ = loud.stdout.partition("Next: ")
        assert results.rstrip() == quiet.stdout.rstrip()


def test_score_is_the_share_of_photos_in_the_folder_of_their_class(photos: Path, tmp_path: Path) -> None:
    run("fit", photos, "-o", tmp_path / "m.joblib", *MICRO, "--quick")
    test = tmp_path / "test"
    for name, source in (("red", "red"), ("blue", "red"), ("blue", "blue")):
        (test / name / source).mkdir(parents=True)
        for i in range(2):
            shutil.copy(photos / source / f"{i}.jpg", test / name / source)
    (test / "red" / "cut.jpg").write_bytes(b"\xff\xd8\xff")
    words = ["predict", tmp_path / "m.joblib", test, "--score"]
    labels = {row["path"]: row["label"] for row in run_json(*words[:-1])["predictions"]}
    right = [Path(path).relative_to(test).parts[0] == label for path, label in labels.items() if label is not None]
    assert len(right) == 6
    assert not all(right)
    found = run_json(*words)
    assert (found["accuracy"], found["n_right"]) == (sum(right) / 6, sum(right))
    told = run(*words, "-o", tmp_path / "labels.csv").stdout.splitlines()
    assert told[-1] == f"Accuracy {sum(right) / 6:.3f} ({sum(right)} of 6 photos)"
    assert len((tmp_path / "labels.csv").read_text().splitlines()) == 1 + 7
    assert run(*words).stdout.splitlines() == told[-1:]


def test_score_needs_the_folders_of_the_models_classes(photos: Path, tmp_path: Path) -> None:
    run("fit", photos, "-o", tmp_path / "m.joblib", *MICRO, "--quick")
    words = ["predict", tmp_path / "m.joblib", "--score"]
    assert "One folder with" in run(*words, photos / "red", photos / "blue", code=2).stderr
    (photos / "blue").rename(photos / "green")
    shutil.copy(photos / "red" / "0.jpg", photos / "beside.jpg")
    told = run(*words, photos, code=1).stderr
    assert f"model's classes (blue, red) alone are expected with --score, got beside.jpg, green in {photos}" in told


def test_model_is_an_ordinary_pipeline_with_the_labels_of_predict(photos: Path, tmp_path: Path) -> None:
    found = run_json("fit", photos, "-o", tmp_path / "m.joblib", *MICRO, "--quick")
    assert found["classes"] == ["blue", "red"]
    assert 0.9 <= found["accuracy"] <= 1
    lines = run("predict", tmp_path / "m.joblib", photos).stdout.splitlines()
    rows = list(csv.DictReader(lines))
    model = joblib.load(tmp_path / "m.joblib")
    assert model[0].cache is None
    paths = [row["path"] for row in rows]
    assert model.predict(paths).tolist() == [row["label"] for row in rows]
    np.testing.assert_allclose(
        model.predict_proba(paths).max(axis=1), [float(row["confidence"]) for row in rows], atol=1e-3
    )
    assert [row["label"] for row in rows] == [Path(path).parent.name for path in paths]


@pytest.mark.parametrize("ending", ["joblib", "safetensors"])
def test_fine_tuned_model_predicts_from_its_file(ending: str, photos: Path, tmp_path: Path) -> None:
    model = tmp_path / f"m.{ending}"
    found = run_json("fit", photos, "-o", model, *MICRO, "--fine-tune", "--epochs", 2, "--folds", 2)
    assert found["epochs"] == 2
    rows = run_json("predict", model, photos)["predictions"]
    assert [row["label"] for row in rows] == [Path(row["path"]).parent.name for row in rows]
    near = run_json("similar", model, photos, photos / "red" / "0.jpg", "-n", 5)["results"]
    assert {Path(row["path"]).parent.name for row in near} == {"red"}


def test_extract_writes_what_the_extractor_computes(photos: Path, tmp_path: Path) -> None:
    how = [*MICRO, "--layers", "0,-1", "--pooling", "max"]
    run("extract", photos, "-o", tmp_path / "f.parquet", *how)
    run("extract", photos, "-o", tmp_path / "f.npy", *how)
    frame = pyarrow.parquet.read_table(tmp_path / "f.parquet").to_pandas()
    extractor = PretrainedFeatureExtractor("featx_micro", layers=[0, -1], pooling="max")
    expected = extractor.transform(frame["path"])
    assert frame.columns.tolist() == ["path", *extractor.get_feature_names_out(), "error"]
    np.testing.assert_allclose(frame.iloc[:, 1:-1].to_numpy(), expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(np.load(tmp_path / "f.npy"), frame.iloc[:, 1:-1].to_numpy())
    assert json.loads((tmp_path / "f.npy.json").read_text())["paths"] == frame["path"].tolist()


def test_similar_finds_the_copy_and_leaves_the_query_out(photos: Path, tmp_path: Path) -> None:
    shutil.copy(photos / "red" / "3.jpg", photos / "blue" / "copy.jpg")
    run("fit", photos, "-o", tmp_path / "m.joblib", *MICRO, "--quick")
    for by in ("featx_micro", tmp_path / "m.joblib"):
        first, *others = run_json("similar", by, photos, photos / "red" / "3.jpg")["results"]
        assert first["path"].endswith("copy.jpg")
        assert first["distance"] < 1e-6 < others[0]["distance"]
        assert len(others) == 9
        assert all("red/3.jpg" not in row["path"] for row in others)
    (photos / "query.jpg").write_text("broken")
    assert "not an image" in run("similar", "featx_micro", photos, photos / "query.jpg", code=1).stderr


def test_layers_are_those_of_the_library() -> None:
    for kind in ("stages", "blocks", "modules"):
        found = run_json("layers", "resnet50", "--kind", kind)["layers"]
        assert [row["name"] for row in found] == list_layers("resnet50", kind=kind)
    lines = run("layers", "resnet50").stdout.splitlines()
    assert lines[-1].split() == ["4", "layer4", "2048", "7x7"]


def test_cache_commands_do_as_the_store_does(photos: Path, tmp_path: Path, cache: FeatureStore) -> None:
    run("extract", photos, "-o", tmp_path / "f.npy", *MICRO)
    info = run_json("cache", "info")
    assert (info["images"], info["computed"]) == (16, 16)
    assert "featx_micro" in run("cache", "info").stdout
    assert run_json("cache", "verify") == {"records": 16, "wrong": 0, "damaged": 0}
    run("cache", "clear", code=1, input="n\n")
    assert cache.info()["images"] == 16
    assert run_json("cache", "prune", "--max-size", "0")["freed_bytes"] > 0
    assert cache.info()["images"] == 0
    run("cache", "clear", "--yes")
    assert run_json("cache", "info", "--folder", tmp_path / "nowhere")["images"] == 0


def test_demo_shows_commands_that_work(tmp_path: Path) -> None:
    shown = run("demo", "--folder", tmp_path / "digits").stdout
    assert [line.split()[2] for line in shown.splitlines() if line.startswith("$ ")] == [
        "search",
        "fit",
        "predict",
        "similar",
    ]
    assert (tmp_path / "digits" / "model.joblib").exists()


# Help


def every_command(group: click.Group, words: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    yield words, group
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from every_command(command, (*words, name))
        else:
            yield (*words, name), command


@pytest.mark.parametrize("words", [words for words, _ in every_command(featx)], ids=" ".join)
def test_help_ends_with_an_example_that_parses(
    words: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("photos", "new"):
        Path(name).mkdir()
    for name in ("model.joblib", "query.jpg"):
        Path(name).touch()
    *_, line = run(*words, "--help").stdout.rstrip().splitlines()
    program, *arguments = shlex.split(line)
    assert program == "featx"
    assert tuple(arguments[: len(words)]) == words
    command: click.Command = featx
    while isinstance(command, click.Group):
        command = command.commands[arguments.pop(0)]
    command.make_context(program, arguments)


def test_help_of_what_loads_pickles_warns_of_strangers() -> None:
    for name in ("predict", "similar"):
        assert "never load one that comes from a stranger" in " ".join(run(name, "--help").stdout.split())


def test_click_is_not_imported_by_the_library_and_missed_in_one_line() -> None:
    code = (
        "import sys, featx, featx.cli; assert 'click' not in sys.modules; sys.modules['click'] = None; featx.cli.main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "")
    assert len(done.stderr.splitlines()) == 1
    assert 'pip install "featx[cli]"' in done.stderr


def test_progress_is_silent_where_nobody_looks(photos: Path, tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "a.png").write_bytes(encode(colours(), "PNG"))
    result = run("extract", tmp_path / "one", "-o", tmp_path / "f.npy", *MICRO)
    assert result.stderr == ""


# README


def test_readmes_commands_and_lines_for_own_photos_run(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As they stand there, but with the network that needs no download; ``demo`` has a test of its own."""
    readme = Path(__file__).parents[1] / "README.md"
    if not readme.exists():
        pytest.skip("installed without the README")
    text = re.sub("resnet18,mobilenet_v3_small|resnet18|resnet50", "featx_micro", readme.read_text())
    monkeypatch.chdir(tmp_path)
    shutil.copytree(photos / "red", tmp_path / "new")
    shutil.copytree(photos, tmp_path / "val")
    shutil.copy(photos / "red" / "0.jpg", tmp_path / "query.jpg")
    rows = [f"{path.relative_to(photos)},{path.parent.name}" for path in sorted(photos.glob("*/*"))]
    (tmp_path / "breeds.csv").write_text("\n".join(["file,breed", *rows]))
    (block,) = re.findall(r"^```sh\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)
    commands = [
        shlex.split(line.replace("--local-workers 4", "--local-workers 1"), comments=True)
        for line in block.splitlines()
    ]
    assert {words[1] for words in commands} == {*featx.commands}
    for program, name, *words in commands:
        assert program == "featx"
        if name != "demo":
            run(name, *words, *(MICRO if name in ("fit", "extract") else ()), *(["--quick"] * (name == "fit")))
    for made in (
        "report.html",
        "model.joblib",
        "labels.csv",
        "score.html",
        "features.parquet",
        "features/manifest.json",
    ):
        assert (tmp_path / made).exists()
    first, *_ = re.findall(r"^```python\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)
    own, splits = re.findall(r"^```py\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)
    imports = "\n".join(line for line in first.splitlines() if line.startswith("from "))
    exec(compile(f"{imports}\n{own}".replace("cv=5", "cv=3"), "README", "exec"), {})
    assert 0.5 < float(capsys.readouterr().out) <= 1
    known = {}
    for split, left in (("train", 0), ("test", 1)):
        shutil.copytree("photos", f"halves/{split}")
        for file in Path("halves", split).glob("*/*.jpg"):
            if int(file.stem) % 2 != left:
                file.unlink()
    Path("halves/train/red/00.jpg").write_bytes(b"none")
    exec(compile(f"{imports}\n{splits}".replace("photos/", "halves/"), "README", "exec"), known)
    assert known["bad"].sources.tolist() == ["halves/train/red/00.jpg"]
    assert known["test"].target_names == known["train"].target_names
    assert len(known["X_train"]) == len(known["y_train"]) == len(known["train"].data) - 1

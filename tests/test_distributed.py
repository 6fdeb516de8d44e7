"""Laws of extraction past one machine: whole shards, each item once, the same rows everywhere, whatever dies."""

from __future__ import annotations

import errno
import json
import os
import pickle
import random
import signal
import subprocess
import sys
import threading
import time
import urllib.request
import zipfile
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, cast

import numpy as np
import pandas as pd
import pyarrow.dataset
import pytest
import torch
import torchvision
from pictures import encode
from releases import exports_graphs
from safetensors.torch import load_file, save_file
from sklearn.base import clone
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import featx.images.remote
from featx import PretrainedFeatureExtractor
from featx.activations import passes
from featx.activations.exported import finding
from featx.distributed import extract
from featx.distributed.extraction import ShardError, _engine
from featx.distributed.folder import Folder
from featx.distributed.shards import Manifest, OtherShards
from featx.distributed.work import ServerError
from featx.exceptions import ImageError, UnreadableImage
from featx.images.items import PathItem
from featx.images.remote import Unreachable, fetch
from featx.images.sources import as_items
from featx.system.writing import replacing

# Dask closes its sockets and loops when it comes to it.
pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::DeprecationWarning")
MICRO = PretrainedFeatureExtractor("featx_micro")
RNG = np.random.default_rng(0)


def draw() -> bytes:
    return encode(RNG.integers(0, 256, size=(32, 32, 3), dtype=np.uint8), "JPEG")


@pytest.fixture
def photos(tmp_path: Path) -> list[str]:
    (tmp_path / "photos").mkdir()
    for i in range(50):
        (tmp_path / "photos" / f"{i:03}.jpg").write_bytes(draw())
    return sorted(str(path) for path in (tmp_path / "photos").iterdir())


def rows_in(output: Path | str, filesystem: Any = None) -> pd.DataFrame:
    """All rows in the order of the shards."""
    if filesystem is None:
        names = sorted(str(path) for path in Path(output).glob("part-*"))
    else:
        names = sorted(name for name in filesystem.ls(str(output), detail=False) if "/part-" in name)
    return pyarrow.dataset.dataset(names, filesystem=filesystem, format="parquet").to_table().to_pandas()


def check_complete(found: pd.DataFrame, paths: list[str], extractor: PretrainedFeatureExtractor = MICRO) -> None:
    """Each item once and in order, with the rows that one process computes."""
    assert found["path"].tolist() == paths
    assert found["error"].isna().all()
    wanted = extractor.transform(paths)
    difference = np.linalg.norm(np.stack(found["features"]) - wanted, axis=1)
    assert (difference <= 1e-5 * np.linalg.norm(wanted, axis=1)).all()


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# In this process


def test_shards_hold_each_item_once_in_order(photos: list[str], tmp_path: Path) -> None:
    done = extract(MICRO, photos, tmp_path / "out", shard_size=16)
    assert (done.n_items, done.n_shards, done.n_computed, done.n_errors) == (50, 4, 4, 0)
    found = rows_in(tmp_path / "out")
    check_complete(found, photos)
    items = as_items(photos)
    assert found["digest"].tolist() == [items.digest(row).hex() for row in range(50)]
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["columns"] == MICRO.get_feature_names_out().tolist()


@exports_graphs
def test_engine_of_the_first_run_computes_all_shards(
    photos: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = clone(MICRO).set_params(engine="auto")
    for engine in ("onnx", "torch"):
        out, named = tmp_path / engine, tmp_path / f"named-{engine}"
        monkeypatch.setattr(passes, "pays", lambda *_, engine=engine: engine == "onnx")
        monkeypatch.setattr(finding, "_HELD", finding._Held())
        extract(model, photos, out, shard_size=16)
        assert json.loads((out / "manifest.json").read_text())["engine"] == engine
        before = contents(out)
        for lost in sorted(out.glob("part-*"))[1:3]:
            lost.unlink()
        # A later run would choose otherwise, by itself.
        monkeypatch.setattr(passes, "pays", lambda *_, engine=engine: engine != "onnx")
        extract(model, photos, out, shard_size=16)
        extract(clone(model).set_params(engine=engine), photos, named, shard_size=16)
        assert contents(out) == before == contents(named)
        with pytest.raises(OtherShards, match=f"Set engine='{engine}'"):
            extract(clone(model).set_params(engine="torch" if engine == "onnx" else "onnx"), photos, out, shard_size=16)


def test_engine_of_workers_is_not_chosen_by_what_is_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(passes, "pays", lambda *_: True)
    folder, client = Folder(str(tmp_path), None), cast(Any, object())
    assert _engine(clone(MICRO).set_params(engine="auto"), folder, client) == "torch"
    assert _engine(clone(MICRO).set_params(engine="onnx"), folder, client) == "onnx"


def test_output_of_a_version_with_one_engine_was_computed_by_torch(photos: list[str], tmp_path: Path) -> None:
    extract(clone(MICRO).set_params(engine="torch"), photos, tmp_path / "out", shard_size=16)
    manifest = tmp_path / "out" / "manifest.json"
    found = json.loads(manifest.read_text())
    del found["engine"]
    manifest.write_text(json.dumps(found))
    assert extract(MICRO, photos, tmp_path / "out", shard_size=16).n_computed == 0
    with pytest.raises(OtherShards, match="engine='torch'"):
        extract(clone(MICRO).set_params(engine="onnx"), photos, tmp_path / "out", shard_size=16)


@pytest.mark.parametrize("form", ["array", "series", "frame", "folder", "pattern"])
def test_items_may_have_every_form(photos: list[str], tmp_path: Path, form: str) -> None:
    folder = tmp_path / "photos"
    items = {
        "array": np.array(photos, dtype=object),
        "series": pd.Series(photos, index=range(7, 57)),
        "frame": pd.DataFrame({"path": photos}),
        "folder": folder,
        "pattern": f"{tmp_path}/**/*.jpg",
    }[form]
    (folder / ".hidden.jpg").write_bytes(b"x")
    extract(MICRO, items, tmp_path / "out", shard_size=20)
    assert rows_in(tmp_path / "out")["path"].tolist() == photos


def test_unreadable_items_have_reasons_and_no_features(photos: list[str], tmp_path: Path) -> None:
    Path(photos[3]).write_text("no picture")
    Path(photos[40]).unlink()
    assert extract(MICRO, photos, tmp_path / "out", shard_size=16).n_errors == 2
    found = rows_in(tmp_path / "out")
    broken = found["error"].notna()
    assert np.flatnonzero(broken).tolist() == [3, 40]
    assert found["features"].isna().tolist() == broken.tolist()
    assert found["error"][40] == "no such file"


def test_cache_of_a_worker_gives_the_same_shards(photos: list[str], tmp_path: Path) -> None:
    cached = PretrainedFeatureExtractor("featx_micro", cache=tmp_path / "store")
    for name in ("cold", "warm"):
        extract(cached, photos, tmp_path / name, shard_size=16)
    extract(MICRO, photos, tmp_path / "plain", shard_size=16)
    assert contents(tmp_path / "warm") == contents(tmp_path / "cold")
    pd.testing.assert_frame_equal(
        rows_in(tmp_path / "warm").drop(columns="features"), rows_in(tmp_path / "plain").drop(columns="features")
    )
    check_complete(rows_in(tmp_path / "warm"), photos)


def test_only_missing_shards_are_computed(photos: list[str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    extract(MICRO, photos, out, shard_size=16)
    before = contents(out)
    assert extract(MICRO, photos, out, shard_size=16).n_computed == 0
    first, *rest = sorted(out.glob("part-*"))
    first.unlink()
    for path in rest:
        os.utime(path, (1, 1))
    assert extract(MICRO, photos, out, shard_size=16).n_computed == 1
    assert contents(out) == before
    assert {path.stat().st_mtime for path in rest} == {1}


@pytest.mark.parametrize(
    ("extractor", "drop", "size"),
    [
        (PretrainedFeatureExtractor("featx_micro", layers=0), 0, 16),
        (PretrainedFeatureExtractor("featx_micro", pooling="max", layers=0), 0, 16),
        (PretrainedFeatureExtractor("featx_micro", image_size=40), 0, 16),
        (MICRO, 1, 16),
        (MICRO, 0, 10),
    ],
    ids=["layer", "pooling", "size", "items", "shard_size"],
)
def test_shards_of_something_else_are_an_error_and_stay(
    photos: list[str], tmp_path: Path, extractor: PretrainedFeatureExtractor, drop: int, size: int
) -> None:
    extract(MICRO, photos, tmp_path / "out", shard_size=16)
    before = contents(tmp_path / "out")
    with pytest.raises(OtherShards, match=r"are expected in .*out"):
        extract(extractor, photos[drop:], tmp_path / "out", shard_size=size)
    assert contents(tmp_path / "out") == before


@pytest.mark.parametrize("far", [False, True], ids=["folder", "bucket"])
def test_of_two_runs_that_begin_together_one_writes(
    photos: list[str],
    tmp_path: Path,
    bucket: tuple[Any, dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
    far: bool,
) -> None:
    """The other one's manifest appears at the very moment at which this one writes its own."""
    import s3fs

    files, options = bucket
    output, given = ("s3://bucket/out", {"storage_options": options}) if far else (tmp_path / "out", {})
    rival = json.dumps(Manifest.of("of another", ["a"], 16, photos, "torch")._as_dict()).encode()
    link, call = os.link, s3fs.S3FileSystem._call_s3

    def link_late(source: Any, target: Any) -> None:
        Path(target).write_bytes(rival)
        link(source, target)

    async def call_late(self: Any, method: str, *given: Any, **how: Any) -> Any:
        if method == "put_object":
            await call(self, method, Bucket=how["Bucket"], Key=how["Key"], Body=rival)
        return await call(self, method, *given, **how)

    with monkeypatch.context() as patched:
        patched.setattr(os, "link", link_late)
        patched.setattr(s3fs.S3FileSystem, "_call_s3", call_late)
        with pytest.raises(OtherShards, match="another one"):
            extract(MICRO, photos, output, shard_size=16, **given)
    names = files.ls("bucket/out", detail=False) if far else (tmp_path / "out").iterdir()
    assert [str(name).rpartition("/")[2] for name in names] == ["manifest.json"]


def test_shards_of_another_format_are_not_gone_on_with(photos: list[str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    extract(MICRO, photos, out, shard_size=25)
    manifest = json.loads((out / "manifest.json").read_text())
    (out / "manifest.json").write_text(json.dumps(manifest | {"format": 1, "featx": "0.0.9"}))
    with pytest.raises(OtherShards, match=r"got format 1, which featx 0.0.9 wrote"):
        extract(MICRO, photos, out, shard_size=25)


def test_shards_that_somebody_damaged_are_computed_again(photos: list[str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    extract(MICRO, photos, out, shard_size=10)
    before = contents(out)
    cut, blank, empty, *_ = sorted(out.glob("part-*"))
    cut.write_bytes(cut.read_bytes()[:-100])
    blank.write_bytes(bytes(len(blank.read_bytes())))
    empty.write_bytes(b"")
    (out / "manifest.json").write_bytes(b"\0" * 100)
    assert extract(MICRO, photos, out, shard_size=10).n_computed == 3
    assert contents(out) == before
    (out / "manifest.json").write_bytes(b"")
    with pytest.raises(OtherShards, match="others"):
        extract(MICRO, photos, out, shard_size=9)


def test_folder_by_url_is_the_same_folder(photos: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    extract(MICRO, photos, f"file://{tmp_path}/out", shard_size=20, storage_options={})
    assert extract(MICRO, photos, tmp_path / "out", shard_size=20).n_computed == 0
    monkeypatch.chdir(tmp_path)
    assert extract(MICRO, "photos", "out", shard_size=20).n_computed == 0


def test_features_and_digest_are_of_the_same_bytes(
    photos: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where a store knew a file that changes, breaks or cannot be reached for a moment when its digest is made."""
    cached = PretrainedFeatureExtractor("featx_micro", cache=tmp_path / "store")
    for path in photos:
        os.utime(path, (1, 1))
    time.sleep(2.1)  # until the store trusts the times of files
    extract(cached, photos, tmp_path / "first", shard_size=25)
    new, read, moods = draw(), PathItem._read, {photos[1]: "new", photos[30]: "broken"}

    def changing(item: PathItem) -> bytes:
        mood = moods.pop(str(item.path), None)
        if mood == "failing":
            raise Unreachable("the disk says no")
        if mood is not None:
            Path(item.path).write_bytes(new if mood == "new" else b"no picture")
        return read(item)

    with monkeypatch.context() as patched:
        patched.setattr(PathItem, "_read", changing)
        extract(cached, photos, tmp_path / "second", shard_size=25)
        assert not moods
        moods[photos[2]] = "failing"
        with pytest.raises(ServerError, match=r"002\.jpg.*the disk says no"):
            extract(cached, photos, tmp_path / "third", shard_size=25)
    found = rows_in(tmp_path / "second")
    assert np.flatnonzero(found["error"].notna()).tolist() == [30]
    good = [row for row in range(50) if row != 30]
    assert found["digest"][good].tolist() == [as_items(photos).digest(row).hex() for row in good]
    check_complete(found.loc[good], [photos[row] for row in good])


def test_other_items_in_an_output_without_shards_are_an_error(photos: list[str], tmp_path: Path) -> None:
    extract(MICRO, photos, tmp_path / "out", shard_size=16)
    for path in (tmp_path / "out").glob("part-*"):
        path.unlink()
    with pytest.raises(OtherShards, match="same items"):
        extract(MICRO, photos[::-1], tmp_path / "out", shard_size=16)


def test_preprocessing_of_ones_own_shows_its_shape_on_a_photo_that_can_be_read(
    photos: list[str], tmp_path: Path
) -> None:
    Path(photos[0]).write_text("no picture")
    for path in photos[16:20]:
        Path(path).write_text("no picture")
    small = PretrainedFeatureExtractor("featx_micro", layers=0, pooling="flatten", preprocess=Shrinking(16))
    assert extract(small, photos, tmp_path / "out", shard_size=4).n_errors == 5
    found = rows_in(tmp_path / "out")
    good = found["error"].isna()
    wanted = small.transform([path for path, is_good in zip(photos, good, strict=True) if is_good])
    np.testing.assert_allclose(np.stack(found["features"][good]), wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())
    for path in photos[28:32]:
        Path(path).write_bytes(encode(np.zeros((70, 70, 3), dtype=np.uint8), "JPEG"))
    with pytest.raises(ValueError, match="bring them to one size"):
        extract(small, photos, tmp_path / "uneven", shard_size=4)


def test_preprocessing_of_ones_own_on_a_disk_that_fails_leaves_nothing_behind(
    photos: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = PretrainedFeatureExtractor("featx_micro", layers=0, pooling="flatten", preprocess=Shrinking(16))
    asked = list[str]()

    def failing(path: Any, **_: Any) -> Any:
        asked.append(str(path))
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patched:
        patched.setattr(featx.images.items.os, "stat", failing)
        with pytest.raises(ServerError):
            extract(small, photos, tmp_path / "out", shard_size=16)
    assert len(set(asked) & set(photos)) == 1
    assert extract(small, photos, tmp_path / "out", shard_size=16).n_errors == 0


class Shrinking:
    """A corner of photos; large ones whole."""

    cache_key = "shrinking"

    def __init__(self, side: int) -> None:
        self.side = side

    def __call__(self, image: Any) -> torch.Tensor:
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255
        return pixels if len(pixels[0]) == 70 else pixels[:, : self.side, : self.side]


@pytest.mark.parametrize("number", [errno.EIO, errno.EMFILE, errno.ESTALE], ids=["EIO", "EMFILE", "ESTALE"])
def test_disk_that_fails_ends_the_run_and_marks_no_item(
    photos: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    stat = os.stat

    def failing(path: Any, **given: Any) -> Any:
        if str(path) == photos[20]:
            raise OSError(number, os.strerror(number))
        return stat(path, **given)

    with monkeypatch.context() as patched:
        patched.setattr(os, "stat", failing)
        with pytest.raises(ServerError, match=r"020\.jpg.*Run this again"):
            extract(MICRO, photos, tmp_path / "out", shard_size=16)
    assert len(list((tmp_path / "out").glob("part-*"))) == 1
    assert extract(MICRO, photos, tmp_path / "out", shard_size=16).n_errors == 0


def test_shards_without_a_manifest_are_an_error(photos: list[str], tmp_path: Path) -> None:
    extract(MICRO, photos, tmp_path / "out", shard_size=16)
    (tmp_path / "out" / "manifest.json").unlink()
    with pytest.raises(OtherShards, match="others"):
        extract(MICRO, photos[:30], tmp_path / "out", shard_size=16)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"items": [b"bytes"]}, r"items\[0\]"),
        ({"items": "nowhere/*.jpg"}, "matches none"),
        ({"items": ["s3://bucket/a.jpg"]}, "storage_options"),
        ({"output": "s3://bucket/out"}, "storage_options"),
        ({"shard_size": 0}, "shard_size=0"),
        ({"extractor": PretrainedFeatureExtractor("featx_micro", pooling="map", layers=0)}, "One row per image"),
        (
            {"extractor": PretrainedFeatureExtractor("featx_micro", preprocess=lambda image: torch.zeros(3, 9, 9))},
            "cache_key",
        ),
    ],
    ids=["bytes", "nothing", "url", "far output", "size", "map", "callable"],
)
def test_wrong_arguments_are_told_and_leave_nothing(
    photos: list[str], tmp_path: Path, arguments: dict[str, Any], match: str
) -> None:
    given = {"extractor": MICRO, "items": photos, "output": tmp_path / "out"} | arguments
    with pytest.raises((TypeError, ValueError), match=match):
        extract(**given)
    assert not (tmp_path / "out").exists()


SCRIPT = """
import sys
from featx import PretrainedFeatureExtractor
from featx.distributed import extract
extract(PretrainedFeatureExtractor("featx_micro"), sys.argv[1], sys.argv[2], shard_size=4)
"""


def test_killed_run_goes_on_with_what_is_missing(photos: list[str], tmp_path: Path) -> None:
    for i in range(50, 400):
        (tmp_path / "photos" / f"{i:03}.jpg").write_bytes(draw())
    out = tmp_path / "out"
    process = subprocess.Popen([sys.executable, "-c", SCRIPT, str(tmp_path / "photos"), str(out)])
    while len(list(out.glob("part-*"))) < 5 and process.poll() is None:
        time.sleep(0.002)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    before = contents(out)
    n_done = len(list(out.glob("part-*")))
    assert 5 <= n_done < 100
    again = extract(MICRO, tmp_path / "photos", out, shard_size=4)
    assert again.n_computed == 100 - n_done
    extract(MICRO, tmp_path / "photos", tmp_path / "undisturbed", shard_size=4)
    assert contents(out).keys() == contents(tmp_path / "undisturbed").keys()
    check_complete(rows_in(out), sorted(str(path) for path in (tmp_path / "photos").iterdir()))
    assert {name: contents(out)[name] for name in before if name.startswith("part-")} == {
        name: content for name, content in before.items() if name.startswith("part-")
    }


def test_full_disk_leaves_no_half_shard(photos: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wrote: list[int] = []
    write_bytes = Path.write_bytes

    def full(path: Path, content: bytes) -> int:
        if path.name.startswith(".part-"):
            wrote.append(1)
            if len(wrote) == 3:
                write_bytes(path, content[: len(content) // 2])
                raise OSError(28, "No space left on device")
        return write_bytes(path, content)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "write_bytes", full)
        with pytest.raises(OSError, match="No space left"):
            extract(MICRO, photos, tmp_path / "out", shard_size=16)
    assert len(list((tmp_path / "out").glob("part-*"))) == 2
    assert not list((tmp_path / "out").glob(".*"))
    assert extract(MICRO, photos, tmp_path / "out", shard_size=16).n_computed == 2
    check_complete(rows_in(tmp_path / "out"), photos)


# Far away


class Moody(BaseHTTPRequestHandler):
    """Serves files of a folder, at first badly: errors, delays, and answers that stop in the middle."""

    folder: Path
    moods: dict[str, str]
    asked: Counter[str]
    broken_size = False

    def do_GET(self) -> None:
        name = self.path.lstrip("/")
        self.asked[name] += 1
        mood = self.moods.get(name, "") if self.asked[name] == 1 else ""
        if not (self.folder / name).exists():
            self.send_error(404)
        elif mood == "error":
            self.send_error(500)
        else:
            time.sleep(0.3 if mood == "slow" else 0)
            content = (self.folder / name).read_bytes()
            short = content[: len(content) // 2] if mood in ("cut", "short") else content
            self.send_response(200)
            self.send_header("Content-Length", str(len(content if mood == "cut" else short)))
            self.end_headers()
            self.wfile.write(short)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture
def server(photos: list[str], tmp_path: Path) -> Iterator[tuple[str, type[Moody]]]:
    moods = random.Random(0).choices(["error", "slow", "cut", "short", ""], [1, 1, 1, 1, 6], k=len(photos))
    handler = type(
        "Handler",
        (Moody,),
        {"folder": tmp_path / "photos", "moods": dict(zip(map(os.path.basename, photos), moods, strict=True))},
    )
    handler.asked = Counter()
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{running.server_address[1]}", handler
        running.shutdown()
        thread.join()


def test_bad_server_costs_only_what_is_truly_broken(
    server: tuple[str, type[Moody]], photos: list[str], tmp_path: Path
) -> None:
    address, handler = server
    assert set(handler.moods.values()) == {"error", "slow", "cut", "short", ""}
    Path(photos[7]).write_bytes(draw()[:300])
    urls = [f"{address}/{os.path.basename(path)}" for path in photos]
    urls[9] = f"{address}/nothing.jpg"
    done = extract(MICRO, urls, tmp_path / "out", shard_size=16, storage_options={})
    found = rows_in(tmp_path / "out")
    assert found["path"].tolist() == urls
    assert np.flatnonzero(found["error"].notna()).tolist() == [7, 9]
    assert done.n_errors == 2
    assert found["error"][9] == "no such file"
    good = [row for row in range(50) if row not in (7, 9)]
    here = MICRO.transform([photos[row] for row in good])
    np.testing.assert_allclose(np.stack(found["features"][good]), here, atol=1e-5 * np.abs(here).max())
    assert found["digest"][good].tolist() == [as_items(photos).digest(row).hex() for row in good]
    assert handler.asked["nothing.jpg"] == 1  # what is not there is not asked for again
    assert max(handler.asked.values()) <= 3


def test_transform_opens_urls_only_when_allowed(
    server: tuple[str, type[Moody]], photos: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    address, handler = server
    urls = [f"{address}/{os.path.basename(path)}" for path in photos[:6]]
    with pytest.raises(ImageError, match="storage_options"):
        MICRO.transform(urls)
    assert not handler.asked
    far = PretrainedFeatureExtractor("featx_micro", storage_options={})
    np.testing.assert_array_equal(far.fit(urls).transform(urls), MICRO.transform(photos[:6]))
    monkeypatch.setattr(featx.images.remote, "_LONGEST_WAIT", 0.01)
    handler.moods = {}
    dead = [*urls, f"http://127.0.0.1:{free_port()}/photo.jpg"]
    with pytest.raises(ImageError, match=r"X\[6\].*could not be fetched in 8 tries"):
        far.transform(dead)


def test_server_that_is_down_ends_the_run_and_marks_no_item(
    server: tuple[str, type[Moody]], photos: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    address, handler = server
    handler.moods = dict.fromkeys(map(os.path.basename, photos), "error")
    monkeypatch.setattr(featx.images.remote, "_TRIES", 1)
    urls = [f"{address}/{os.path.basename(path)}" for path in photos]
    with pytest.raises(ServerError, match="Run this again"):
        extract(MICRO, urls, tmp_path / "out", shard_size=50, storage_options={})
    assert not list((tmp_path / "out").glob("part-*"))
    handler.moods = {}
    extract(MICRO, urls, tmp_path / "out", shard_size=50, storage_options={})
    check_complete(rows_in(tmp_path / "out").assign(path=photos), photos)


def test_two_writers_of_one_file_never_share_a_part(tmp_path: Path) -> None:
    """Each part is whole when it takes the file's place, whoever else writes meanwhile."""
    with replacing(tmp_path / "file") as first:
        first.write_bytes(b"first")
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(_write_half, tmp_path / "file").result() != first
    assert (tmp_path / "file").read_bytes() == b"first"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def _write_half(path: Path) -> Path:
    with pytest.raises(RuntimeError), replacing(path) as part:  # noqa: PT012
        part.write_bytes(b"ha")
        raise RuntimeError
    return part


def free_port() -> int:
    import socket

    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def test_credentials_are_not_saved_for_strangers(tmp_path: Path) -> None:
    from featx import FineTuneClassifier

    X, y = RNG.integers(0, 256, size=(8, 32, 32, 3), dtype=np.uint8), [0, 1] * 4
    tuned = FineTuneClassifier("featx_micro", freeze="all", epochs=1, storage_options={"secret": "s3cr3t"}).fit(X, y)
    tuned.save(tmp_path / "model.safetensors")
    assert b"s3cr3t" not in (tmp_path / "model.safetensors").read_bytes()
    assert FineTuneClassifier.load(tmp_path / "model.safetensors").storage_options is None


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Any, dict[str, Any]]]:
    server_of = pytest.importorskip("moto.server")
    s3fs = pytest.importorskip("s3fs")
    for name, value in {
        "AWS_ACCESS_KEY_ID": "a",
        "AWS_SECRET_ACCESS_KEY": "b",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    server = server_of.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    urllib.request.urlopen(urllib.request.Request(f"http://{host}:{port}/moto-api/reset", method="POST")).close()
    options = {"client_kwargs": {"endpoint_url": f"http://{host}:{port}"}}
    files = s3fs.S3FileSystem(**options)
    files.mkdir("bucket")
    yield files, options
    server.stop()


def upload(files: Any, photos: list[str]) -> list[str]:
    """URLs of photos in a bucket."""
    urls = [f"s3://bucket/photos/{os.path.basename(path)}" for path in photos]
    for path, url in zip(photos, urls, strict=True):
        files.pipe_file(url, Path(path).read_bytes())
    return urls


def test_buckets_are_read_and_written(
    bucket: tuple[Any, dict[str, Any]], photos: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files, options = bucket
    urls = upload(files, photos)
    arguments = MICRO, "s3://bucket/photos/*.jpg", "s3://bucket/out"
    done = extract(*arguments, shard_size=16, storage_options=options)
    assert (done.n_computed, done.n_errors) == (4, 0)
    found = rows_in("bucket/out", files)
    assert found["path"].tolist() == urls
    check_complete(found.assign(path=photos), photos)
    shards = sorted(name for name in files.ls("bucket/out", detail=False) if "part-" in name)
    files.rm(shards[2])
    files.pipe_file(shards[0], b"")
    cat, failed = type(files)._cat_file, list[str]()

    async def failing_once(self: Any, path: str, **given: Any) -> bytes:
        if path == shards[1] and not failed:
            failed.append(path)
            raise OSError("the connection broke")
        return await cat(self, path, **given)

    with monkeypatch.context() as patched:
        patched.setattr(type(files), "_cat_file", failing_once)
        assert extract(*arguments, shard_size=16, storage_options=options).n_computed == 2
    assert failed
    check_complete(rows_in("bucket/out", files).assign(path=photos), photos)
    folder = MICRO, "s3://bucket/photos", tmp_path / "out"
    assert extract(*folder, shard_size=16, storage_options=options).n_items == 50


def test_expired_credentials_end_the_run_and_mark_no_item(
    bucket: tuple[Any, dict[str, Any]], photos: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import s3fs

    files, options = bucket
    urls = upload(files, photos)

    def forbidden(url: str, _: Any) -> bytes:
        error = RuntimeError("Invalid Credentials")  # as gcsfs says it
        error.code = 401  # type: ignore[attr-defined]
        raise error

    with monkeypatch.context() as patched:
        patched.setattr(featx.images.remote, "_read", forbidden)
        with pytest.raises(Unreachable, match="credentials"):
            fetch("gs://bucket/photo.jpg", {})
        with pytest.raises(UnreadableImage) as told:
            fetch("https://host/photo.jpg", {})
        assert not isinstance(told.value, Unreachable)
    cat = s3fs.S3FileSystem._cat_file

    async def refused(self: Any, path: str, **given: Any) -> bytes:
        if path.endswith("020.jpg"):
            raise PermissionError("The provided token has expired.")
        return await cat(self, path, **given)

    with monkeypatch.context() as patched:
        patched.setattr(s3fs.S3FileSystem, "_cat_file", refused)
        with pytest.raises(ServerError, match="are the credentials still good"):
            extract(MICRO, urls, tmp_path / "out", shard_size=16, storage_options=options)
    assert extract(MICRO, urls, tmp_path / "out", shard_size=16, storage_options=options).n_computed == 3
    check_complete(rows_in(tmp_path / "out").assign(path=photos), photos)


def test_patterns_reach_through_archives_and_caches(
    bucket: tuple[Any, dict[str, Any]], server: tuple[str, type[Moody]], photos: list[str], tmp_path: Path
) -> None:
    import fsspec

    files, options = bucket
    files.pipe_file("bucket/000.jpg", Path(photos[0]).read_bytes())
    with zipfile.ZipFile(tmp_path / "photos.zip", "w") as archive:
        for path in photos[:6]:
            archive.write(path, f"some/{os.path.basename(path)}")
    files.put_file(str(tmp_path / "photos.zip"), "bucket/photos.zip")
    address, handler = server
    handler.moods = {}
    zipped, memory = f"file://{tmp_path}/photos.zip", fsspec.filesystem("memory")
    for path in photos[:2]:
        memory.pipe_file(f"/photos/{os.path.basename(path)}", Path(path).read_bytes())
    for pattern, rows, wanted in [
        (f"zip://**/*.jpg::{zipped}", range(6), f"zip://some/{{}}::{zipped}"),
        (f"simplecache::zip://some/*.jpg::{zipped}", range(6), f"simplecache::zip://some/{{}}::{zipped}"),
        ("zip://some/00[1-3].jpg::s3://bucket/photos.zip", range(1, 4), "zip://some/{}::s3://bucket/photos.zip"),
        ("simplecache::s3://bucket/*.jpg", range(1), "simplecache::s3://bucket/{}"),
        (f"simplecache::{address}/000.jpg", range(1), f"simplecache::{address}/{{}}"),
        (f"{address}/000.jpg", range(1), f"{address}/{{}}"),
        ("memory://photos/*.jpg", range(2), "memory://photos/{}"),
        ("memory://photos/", range(2), "memory://photos/{}"),
        (f"file://{tmp_path}/photos", range(50), f"file://{tmp_path}/photos/{{}}"),
    ]:
        chained = {"s3": options} if "s3:" in pattern else {}
        output = tmp_path / str(len(list(tmp_path.iterdir())))
        extract(MICRO, pattern, output, storage_options=chained)
        found = rows_in(output)
        assert found["path"].tolist() == [wanted.format(os.path.basename(photos[row])) for row in rows], pattern
        names = [photos[row] for row in rows]
        check_complete(found.assign(path=names), names)


def test_file_whose_name_reads_like_a_pattern_is_that_file(photos: list[str], tmp_path: Path) -> None:
    odd = tmp_path / "photos" / "a[0-9]?.jpg"
    odd.write_bytes(draw())
    extract(MICRO, odd, tmp_path / "out")
    assert rows_in(tmp_path / "out")["path"].tolist() == [str(odd)]


# On workers


@pytest.fixture
def client() -> Iterator[Any]:
    """Workers of one test: Dask's restart of those of another one sometimes brings none back."""
    distributed = pytest.importorskip("distributed")
    with (
        distributed.LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=":0") as cluster,
        distributed.Client(cluster, set_as_default=False) as client,
    ):
        yield client


def n_networks() -> int:
    from featx.backbones.networks import _SHELF

    return len(_SHELF._networks)


def has_sessions() -> bool:
    from featx.activations.exported import sessions

    return bool(sessions._SESSIONS)


@pytest.mark.parametrize("engine", ["torch", pytest.param("onnx", marks=exports_graphs)])
def test_workers_compute_what_one_process_does(client: Any, photos: list[str], tmp_path: Path, engine: str) -> None:
    extract(clone(MICRO).set_params(engine=engine), photos, tmp_path / "out", client=client, shard_size=4)
    assert set(client.run(has_sessions).values()) == {engine == "onnx"}
    check_complete(rows_in(tmp_path / "out"), photos)
    assert list(client.run(n_networks).values()) == [1, 1]
    assert len(pickle.dumps(MICRO)) < 5_000
    again = clone(MICRO).set_params(engine=engine)
    assert extract(again, photos, tmp_path / "out", client=client, shard_size=4).n_computed == 0


def test_killed_workers_cost_no_row(client: Any, photos: list[str], tmp_path: Path) -> None:
    for i in range(50, 400):
        (tmp_path / "photos" / f"{i:03}.jpg").write_bytes(draw())
    paths = sorted(str(path) for path in (tmp_path / "photos").iterdir())
    out, stop, killed = tmp_path / "out", threading.Event(), list[int]()

    def kill_now_and_then() -> None:
        for n_done in (5, 25, 45):
            while len(list(out.glob("part-*"))) < n_done:
                if stop.wait(0.002):
                    return
            pids = [nanny.pid for nanny in client.cluster.workers.values()]
            pid = next(pid for pid in pids if pid and pid not in killed)
            os.kill(pid, signal.SIGKILL)
            killed.append(pid)

    thread = threading.Thread(target=kill_now_and_then)
    thread.start()
    try:
        larger = PretrainedFeatureExtractor("featx_micro", image_size=64)
        done = extract(larger, paths, out, client=client, shard_size=4)
    finally:
        stop.set()
        thread.join()
    assert len(set(killed)) == 3
    assert done.n_computed == 100
    check_complete(rows_in(out), paths, larger)
    assert not list(out.glob(".*"))


def test_scheduler_that_dies_is_told_and_costs_no_shard(photos: list[str], tmp_path: Path) -> None:
    distributed = pytest.importorskip("distributed")
    out, address = tmp_path / "out", tmp_path / "scheduler.json"
    quiet: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    dask = [sys.executable, "-m", "dask"]
    scheduler = subprocess.Popen(
        [*dask, "scheduler", "--host", "127.0.0.1", "--port", "0", "--no-dashboard", "--scheduler-file", str(address)],
        **quiet,
    )
    options = ["--nthreads", "1", "--no-nanny", "--no-dashboard", "--scheduler-file", str(address)]
    worker = subprocess.Popen([*dask, "worker", *options, "--local-directory", str(tmp_path)], **quiet)

    def kill_soon() -> None:
        while len(list(out.glob("part-*"))) < 2:
            time.sleep(0.002)
        scheduler.kill()

    patience = pytest.importorskip("dask").config.set({"distributed.comm.timeouts.connect": "3s"})
    client = distributed.Client(scheduler_file=str(address))
    thread = threading.Thread(target=kill_soon)
    try:
        client.wait_for_workers(1)
        thread.start()
        larger = PretrainedFeatureExtractor("featx_micro", image_size=160)
        with patience, pytest.raises(ShardError, match=r"is gone.*only missing shards"):
            extract(larger, photos, out, client=client, shard_size=2)
        thread.join()
    finally:
        for process in (worker, scheduler):
            process.kill()
            process.wait()
        client.close(timeout=1)
    there = len(list(out.glob("part-*")))
    assert 2 <= there < 25
    assert extract(larger, photos, out, shard_size=2).n_computed == 25 - there
    check_complete(rows_in(out), photos, larger)


def test_worker_with_other_versions_is_told(client: Any, photos: list[str], tmp_path: Path) -> None:
    def become(version: str) -> None:
        import torchvision

        torchvision.__version__ = version

    client.run(become, "0.1")
    try:
        with pytest.raises(RuntimeError, match="on every machine"):
            extract(MICRO, photos, tmp_path / "out", client=client, shard_size=16)
    finally:
        client.run(become, torchvision.__version__)
    assert not list((tmp_path / "out").glob("part-*"))


def test_grid_search_on_workers_finds_the_same(client: Any, photos: list[str], tmp_path: Path) -> None:
    import joblib

    X, y = np.array(photos, dtype=object), np.arange(50) % 2
    model = make_pipeline(
        PretrainedFeatureExtractor("featx_micro", cache=tmp_path / "store"), StandardScaler(), LogisticRegression()
    )
    grid = {"pretrainedfeatureextractor__layers": [0, 1], "logisticregression__C": [0.1, 1.0]}
    here = GridSearchCV(model, grid, cv=3).fit(X, y).cv_results_
    model.set_params(pretrainedfeatureextractor__cache=tmp_path / "other")
    with client.as_current(), joblib.parallel_config(backend="dask"):
        there = GridSearchCV(model, grid, cv=3).fit(X, y).cv_results_
    for name in here:
        if "time" not in name and name != "params":
            np.testing.assert_array_equal(here[name], there[name])
    from featx import FeatureStore

    assert FeatureStore(tmp_path / "other").info()["computed"] == 50


def test_grid_search_on_ray_finds_the_same(photos: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a process of its own, since ray changes the one that it starts from."""
    pytest.importorskip("ray")
    listed = tmp_path / "paths.json"
    listed.write_text(json.dumps(photos))
    command = [sys.executable, "-c", RAY, str(listed), str(tmp_path / "store")]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"RAY_USAGE_STATS_ENABLED": "0"})
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == {"same": True, "computed": 50, "processes": True}


RAY = """
import json, os, sys
import joblib, numpy as np, ray
from ray.util.joblib import register_ray
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from featx import FeatureStore, PretrainedFeatureExtractor
with open(sys.argv[1]) as file:
    X = np.array(json.load(file), dtype=object)
y = np.arange(len(X)) % 2
ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
register_ray()
model = make_pipeline(PretrainedFeatureExtractor("featx_micro"), LogisticRegression())
grid = {"pretrainedfeatureextractor__layers": [0, 1], "logisticregression__C": [0.1, 1.0]}
here = GridSearchCV(model, grid, cv=3).fit(X, y).cv_results_
model.set_params(pretrainedfeatureextractor__cache=sys.argv[2])
with joblib.parallel_config(backend="ray"):
    there = GridSearchCV(model, grid, cv=3, n_jobs=2).fit(X, y).cv_results_
    pids = set(joblib.Parallel(n_jobs=2)(joblib.delayed(os.getpid)() for _ in range(8)))
same = all(np.array_equal(here[name], there[name]) for name in here if "score" in name and "time" not in name)
computed = FeatureStore(sys.argv[2]).info()["computed"]
print(json.dumps({"same": same, "computed": computed, "processes": os.getpid() not in pids}))
"""


# Lazily


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Numbers of images that were computed, call by call."""
    from featx.activations.engine import Recipe

    calls: list[int] = []
    parts = Recipe._parts

    def counting(self: Recipe, tiles: Any, *more: Any) -> Any:
        calls.append(len(tiles))
        return parts(self, tiles, *more)

    monkeypatch.setattr(Recipe, "_parts", counting)
    return calls


@pytest.mark.parametrize("kind", ["series", "frame", "array of paths", "array of pixels"])
@pytest.mark.parametrize("output", ["default", "pandas"])
def test_dask_collections_stay_lazy_and_say_what_they_will_be(
    photos: list[str], counted: list[int], kind: str, output: str
) -> None:
    da, dd = pytest.importorskip("dask.array"), pytest.importorskip("dask.dataframe")
    pixels = RNG.integers(0, 256, size=(50, 32, 32, 3), dtype=np.uint8)
    series = pd.Series(photos, index=range(100, 150))
    X, given = {
        "series": (series, dd.from_pandas(series, npartitions=4)),
        "frame": (series.to_frame("path"), dd.from_pandas(series.to_frame("path"), npartitions=4)),
        "array of paths": (np.array(photos, dtype=object), da.from_array(np.array(photos, dtype=object), chunks=20)),
        "array of pixels": (pixels, da.from_array(pixels, chunks=(20, 16, 32, 3))),
    }[kind]
    extractor = PretrainedFeatureExtractor("featx_micro", layers=[0, "penultimate"]).set_output(transform=output)
    lazy = extractor.fit(given).transform(given)
    assert not counted
    names = extractor.get_feature_names_out().tolist()
    if output == "pandas":
        assert list(lazy.columns) == names
        assert set(lazy.dtypes) == {np.dtype(np.float32)}
    else:
        assert (lazy.dtype, lazy.ndim, lazy.shape[1]) == (np.float32, 2, len(names))
        if "array" in kind:
            assert lazy.chunks == ((20, 20, 10), (len(names),))
        else:
            assert lazy.numblocks == (4, 1)
    computed = lazy.compute(scheduler="sync")
    wanted = extractor.transform(X)
    if output == "pandas":
        # scikit-learn < 1.7 forgets a Series' index; what is lazy keeps it.
        wanted.index = getattr(X, "index", wanted.index)
        pd.testing.assert_frame_equal(computed, wanted, check_index_type=False)
    else:
        np.testing.assert_allclose(computed, wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())


def test_dask_maps_keep_their_four_axes() -> None:
    da = pytest.importorskip("dask.array")
    pixels = RNG.integers(0, 256, size=(6, 32, 32, 3), dtype=np.uint8)
    maps = PretrainedFeatureExtractor("featx_micro", layers=0, pooling="map")
    lazy = maps.transform(da.from_array(pixels, chunks=(4, -1, -1, -1)))
    wanted = maps.transform(pixels)
    assert lazy.shape == wanted.shape
    np.testing.assert_allclose(lazy.compute(scheduler="sync"), wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())


def test_dask_collections_of_other_kinds_are_told() -> None:
    bag = pytest.importorskip("dask.bag").from_sequence(["a.jpg"])
    for extractor in (MICRO, PretrainedFeatureExtractor("featx_micro", image_shape=(8, 8))):
        for call in (extractor.fit, extractor.transform):
            with pytest.raises(TypeError, match="Dask array, Series or one-column DataFrame"):
                call(bag)


def test_lazy_fit_learns_the_columns(tmp_path: Path) -> None:
    da, dd = pytest.importorskip("dask.array"), pytest.importorskip("dask.dataframe")
    flat = pd.DataFrame(RNG.integers(0, 256, size=(6, 48), dtype=np.uint8)).rename(columns="p{}".format)
    rows = PretrainedFeatureExtractor("featx_micro", image_shape=(4, 4, 3))
    lazy = rows.fit(dd.from_pandas(flat, npartitions=2))
    eager = PretrainedFeatureExtractor("featx_micro", image_shape=(4, 4, 3)).fit(flat)
    assert lazy.n_features_in_ == eager.n_features_in_ == 48
    assert lazy.feature_names_in_.tolist() == eager.feature_names_in_.tolist()
    wanted = eager.transform(flat)
    computed = lazy.transform(dd.from_pandas(flat, npartitions=2)).compute(scheduler="sync")
    np.testing.assert_allclose(computed, wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())
    with pytest.raises(ValueError, match="image_shape"):
        lazy.fit(dd.from_pandas(flat.iloc[:, :40], npartitions=2))
    lazy.fit(da.from_array(flat.to_numpy(), chunks=(3, 10)))
    assert lazy.n_features_in_ == 48
    assert not hasattr(lazy, "feature_names_in_")
    assert not hasattr(MICRO.fit(da.from_array(np.array(["a.jpg"], dtype=object), chunks=1)), "n_features_in_")


def test_lazy_frames_with_several_columns_are_told_at_once(photos: list[str]) -> None:
    dd = pytest.importorskip("dask.dataframe")
    two = dd.from_pandas(pd.DataFrame({"path": photos, "label": photos}), npartitions=2)
    for call in (MICRO.fit, MICRO.transform):
        with pytest.raises(ValueError, match=r"One column of images.*\['path'\]"):
            call(two)


# Beside featx


def alone() -> dict[str, str]:
    """What the recipe's launcher tells the one process of a run without others."""
    return {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}


def test_recipe_for_several_gpus_trains_the_same_network(tmp_path: Path) -> None:
    """Two processes with half a batch each end with the weights of one process with all of it."""
    for label in ("a", "b"):
        (tmp_path / "photos" / label).mkdir(parents=True)
        for i in range(8):
            (tmp_path / "photos" / label / f"{i}.jpg").write_bytes(draw())
    with torch.random.fork_rng():
        torch.manual_seed(104)  # a start whose scores are all negative, which a ReLU after the output layer would hide
        start = torchvision.models.squeezenet1_1(weights=None).features.state_dict()
    save_file({f"features.{name}": value for name, value in start.items()}, tmp_path / "start.safetensors")
    recipe = Path(featx.__file__).parents[1] / "examples" / "recipe_several_gpus.py"
    tuned = []
    for launcher in ([], ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]):
        output = tmp_path / f"{len(tuned) + 1}.safetensors"
        command = [sys.executable, *launcher, str(recipe), str(tmp_path / "photos"), str(output)]
        command += ["--backbone", "squeezenet1_1", "--weights", str(tmp_path / "start.safetensors")]
        command += ["--image-size", "64", "--epochs", "2", "--batch-size", "8"]
        env = os.environ | ({} if launcher else alone())
        done = subprocess.run(command, capture_output=True, text=True, env=env)
        assert done.returncode == 0, done.stderr
        tuned.append(load_file(output))
    one, two = tuned
    for name, value in one.items():
        np.testing.assert_allclose(two[name], value, rtol=0, atol=1e-5 + 1e-4 * float(value.abs().max()))
    assert not np.allclose(one["features.3.squeeze.weight"], start["3.squeeze.weight"], rtol=0, atol=1e-7)
    rows = PretrainedFeatureExtractor("squeezenet1_1", weights=tmp_path / "2.safetensors", image_size=64).transform(
        sorted(map(str, (tmp_path / "photos").rglob("*.jpg")))
    )
    assert np.isfinite(rows).all()


@pytest.mark.parametrize(
    ("options", "match"), [(["--batch-size", "5"], "at most 4"), (["--batch-size", "4"], "do not fit")]
)
def test_recipe_for_several_gpus_tells_what_does_not_fit(tmp_path: Path, options: list[str], match: str) -> None:
    for label in ("a", "b"):
        (tmp_path / "photos" / label).mkdir(parents=True)
        for i in range(2):
            (tmp_path / "photos" / label / f"{i}.jpg").write_bytes(draw())
    other = tmp_path / "other.safetensors"
    save_file({"conv1.weight": torch.zeros(1)}, other)
    recipe = Path(featx.__file__).parents[1] / "examples" / "recipe_several_gpus.py"
    command = [sys.executable, str(recipe), str(tmp_path / "photos"), str(tmp_path / "out"), "--weights", str(other)]
    done = subprocess.run(
        [*command, "--backbone", "squeezenet1_1", *options], capture_output=True, text=True, env=os.environ | alone()
    )
    assert done.returncode == 1
    assert match in done.stderr
    assert not (tmp_path / "out").exists()

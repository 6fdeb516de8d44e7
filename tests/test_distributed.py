"""Laws of extraction past one machine: whole shards, each item once, the same rows everywhere, whatever dies."""

from __future__ import annotations

import json
import os
import pickle
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.dataset
import pytest
import torch
from pictures import encode
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import featx.images.remote
from featx import PretrainedFeatureExtractor
from featx.distributed import extract
from featx.distributed.extraction import ShardError
from featx.distributed.shards import OtherShards
from featx.distributed.work import ServerError
from featx.exceptions import ImageError
from featx.images.sources import as_items
from featx.writing import replacing

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
    options = {"client_kwargs": {"endpoint_url": f"http://{host}:{port}"}}
    files = s3fs.S3FileSystem(**options)
    files.mkdir("bucket")
    yield files, options
    server.stop()


def test_buckets_are_read_and_written(bucket: tuple[Any, dict[str, Any]], photos: list[str], tmp_path: Path) -> None:
    files, options = bucket
    for path in photos:
        files.pipe_file(f"bucket/photos/{os.path.basename(path)}", Path(path).read_bytes())
    arguments = MICRO, "s3://bucket/photos/*.jpg", "s3://bucket/out"
    done = extract(*arguments, shard_size=16, storage_options=options)
    assert (done.n_computed, done.n_errors) == (4, 0)
    found = rows_in("bucket/out", files)
    assert found["path"].tolist() == [f"s3://bucket/photos/{os.path.basename(path)}" for path in photos]
    check_complete(found.assign(path=photos), photos)
    files.rm(sorted(name for name in files.ls("bucket/out", detail=False) if "part-" in name)[2])
    assert extract(*arguments, shard_size=16, storage_options=options).n_computed == 1
    check_complete(rows_in("bucket/out", files).assign(path=photos), photos)
    folder = MICRO, "s3://bucket/photos", tmp_path / "out"
    assert extract(*folder, shard_size=16, storage_options=options).n_items == 50


# On workers


@pytest.fixture(scope="module")
def client() -> Iterator[Any]:
    distributed = pytest.importorskip("distributed")
    with (
        distributed.LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=":0") as cluster,
        distributed.Client(cluster, set_as_default=False) as client,
    ):
        yield client


def n_networks() -> int:
    from featx.backbones.networks import _SHELF

    return len(_SHELF._networks)


def test_workers_compute_what_one_process_does(client: Any, photos: list[str], tmp_path: Path) -> None:
    client.restart()
    extract(MICRO, photos, tmp_path / "out", client=client, shard_size=4)
    check_complete(rows_in(tmp_path / "out"), photos)
    assert list(client.run(n_networks).values()) == [1, 1]
    assert len(pickle.dumps(MICRO)) < 5_000
    assert extract(MICRO, photos, tmp_path / "out", client=client, shard_size=4).n_computed == 0


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

    client = distributed.Client(scheduler_file=str(address))
    thread = threading.Thread(target=kill_soon)
    try:
        client.wait_for_workers(1)
        thread.start()
        larger = PretrainedFeatureExtractor("featx_micro", image_size=160)
        with pytest.raises(ShardError, match=r"is gone.*only missing shards"):
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
    def other() -> None:
        import torchvision

        torchvision.__version__ = "0.1"

    client.restart()
    client.run(other)
    with pytest.raises(RuntimeError, match="on every machine"):
        extract(MICRO, photos, tmp_path / "out", client=client, shard_size=16)
    assert not list((tmp_path / "out").glob("part-*"))
    client.restart()


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


# Lazily


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Numbers of images that were computed, call by call."""
    from featx.activations.engine import Recipe

    calls: list[int] = []
    parts = Recipe._parts

    def counting(self: Recipe, network: Any, tiles: Any, slots: Any) -> Any:
        calls.append(len(tiles))
        return parts(self, network, tiles, slots)

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
    with pytest.raises(TypeError, match="Dask array, Series or one-column DataFrame"):
        MICRO.transform(bag)


# Beside featx


def test_recipe_for_several_gpus_trains_the_same_network(tmp_path: Path) -> None:
    """Two processes with half a batch each end with the weights of one process with all of it."""
    for label in ("a", "b"):
        (tmp_path / "photos" / label).mkdir(parents=True)
        for i in range(8):
            (tmp_path / "photos" / label / f"{i}.jpg").write_bytes(draw())
    torchvision = pytest.importorskip("torchvision")
    save_file = pytest.importorskip("safetensors.torch").save_file
    start = torchvision.models.squeezenet1_1(weights=None).features.state_dict()
    save_file({f"features.{name}": value for name, value in start.items()}, tmp_path / "start.safetensors")
    recipe = Path(featx.__file__).parents[1] / "examples" / "recipe_several_gpus.py"
    tuned = []
    for n_processes in (1, 2):
        output = tmp_path / f"{n_processes}.safetensors"
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(n_processes)]
        command += [str(recipe), str(tmp_path / "photos"), str(output), "--backbone", "squeezenet1_1"]
        command += ["--weights", str(tmp_path / "start.safetensors"), "--image-size", "64", "--epochs", "2"]
        done = subprocess.run([*command, "--batch-size", "8"], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        tuned.append(pytest.importorskip("safetensors.torch").load_file(output))
    one, two = tuned
    for name, value in one.items():
        np.testing.assert_allclose(two[name], value, rtol=0, atol=1e-5 + 1e-4 * float(value.abs().max()))
    assert not np.allclose(one["features.3.squeeze.weight"], start["3.squeeze.weight"], rtol=0, atol=1e-7)
    rows = PretrainedFeatureExtractor("squeezenet1_1", weights=tmp_path / "2.safetensors", image_size=64).transform(
        sorted(map(str, (tmp_path / "photos").rglob("*.jpg")))
    )
    assert np.isfinite(rows).all()

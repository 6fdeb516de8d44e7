"""Extraction past one process: on Dask workers that are killed, with a client that is killed, and as work grows.

    python benchmarks/bench_distributed.py [--quick] [--parts same workers client growth search] [--json FILE]

Needs ``pip install "featx[dask]"``. A scheduler and two workers of one thread each run as processes of their own and
talk over TCP. CIFAR-10's 10,000 test JPEGs go through featx_micro, the ants and bees through squeezenet1_1 with real
weights (``$FEATX_DATA``), without a cache.

- same: rows beside those of one process, networks loaded, size of what carries the extractor; time beside one worker.
- workers: one worker is killed (-9) every few seconds, three times. What was computed beyond the 10,000.
- client: killed after a third and started again. Which shards are computed then.
- growth: 10,000 and 200,000 items (the same files under new names): time per image, and memory of client, scheduler and
  workers at a quarter of the work and at its end.
- search: a grid search on the Dask backend and without: same results; passes per photo where workers share a store,
  where each has one of its own, and where the client ships ready rows; time of each. Its scaling: one worker process
  beside two, each on a core of its own (Linux), cold and on a store that is full; medians of three turns.

Exits with 1 where something is not as it must be. ``--quick`` takes 2,000 images, for
growth 10,000, and does not judge.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import psutil
import pyarrow.dataset
from _about import about
from _ways import DATA, WEIGHTS, unpack_photos
from distributed import Client
from distributed.diagnostics.plugin import WorkerPlugin
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from featx import FeatureStore, PretrainedFeatureExtractor, load_image_folder
from featx.distributed import extract

PARTS = ("same", "workers", "client", "growth", "search")
MICRO = PretrainedFeatureExtractor("featx_micro")
BEES = PretrainedFeatureExtractor("squeezenet1_1", weights=str(WEIGHTS), layers=[-2, -1])
SHARD = 250
# Times per image of few and of many items; memory at the end and at a quarter.
MOST_TIME, MOST_MEMORY, MOST_MESSAGE = 1.1, 1.1, 100_000

Figures = dict[str, Any]


class Counting(WorkerPlugin):
    """Adds up, in a file per process, the images that pass through networks and the networks that are loaded."""

    def __init__(self, folder: str) -> None:
        self.folder = folder

    def setup(self, worker: Any) -> None:
        from featx.activations.engine import Recipe
        from featx.backbones.networks import NetworkSpec

        if hasattr(Recipe, "_counted"):
            return
        Recipe._counted = True  # type: ignore[attr-defined]
        parts, load, file = Recipe._parts, NetworkSpec._load, Path(self.folder, str(os.getpid()))

        def counted_parts(self: Any, tiles: Any, *more: Any) -> Any:
            with open(file, "a") as log:
                log.write(f"images {len(tiles)}\n")
            return parts(self, tiles, *more)

        def counted_load(self: Any, device: str, dtype: Any) -> Any:
            with open(file, "a") as log:
                log.write("networks 1\n")
            return load(self, device, dtype)

        Recipe._parts, NetworkSpec._load = counted_parts, counted_load  # type: ignore[method-assign]


def counted(folder: Path, what: str) -> list[int]:
    """What each process that ever was counted."""
    logs = [path.read_text().splitlines() for path in folder.iterdir()]
    return [sum(int(line.split()[1]) for line in log if line.startswith(what)) for log in logs]


class Cluster:
    """A scheduler and workers, each a process, and a client of them."""

    def __init__(self, folder: Path, n_workers: int, stores: bool = False, n_threads: int = 1) -> None:
        folder.mkdir(parents=True)
        self.counts = folder / "counts"
        self.counts.mkdir()
        address = folder / "scheduler.json"
        common = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        dask = [sys.executable, "-m", "dask"]
        scheduler = [
            "scheduler",
            "--host",
            "127.0.0.1",
            "--port",
            "0",
            "--no-dashboard",
            "--scheduler-file",
            str(address),
        ]
        self.scheduler = subprocess.Popen([*dask, *scheduler], **common)  # type: ignore[call-overload]
        worker = ["worker", "--nthreads", str(n_threads), "--no-dashboard", "--scheduler-file", str(address)]
        worker += ["--local-directory", str(folder)]
        self.workers = []
        for i in range(n_workers):
            environment = os.environ | {"FEATX_CACHE": str(folder / f"store-{i if stores else 0}")}
            started = subprocess.Popen([*dask, *worker], env=environment, **common)  # type: ignore[call-overload]
            self.workers.append(started)
        while not address.exists() or not address.read_text():
            time.sleep(0.05)
        self.client = Client(scheduler_file=str(address))
        self.client.wait_for_workers(n_workers)
        self.client.register_plugin(Counting(str(self.counts)))
        self.stores = [folder / f"store-{i}" for i in range(n_workers if stores else 1)]

    def close(self) -> None:
        self.client.close()
        for process in (*self.workers, self.scheduler):
            process.terminate()
            process.wait()


@contextlib.contextmanager
def cluster(folder: Path, n_workers: int = 2, stores: bool = False, n_threads: int = 1) -> Iterator[Cluster]:
    running = Cluster(folder, n_workers, stores, n_threads)
    try:
        yield running
    finally:
        running.close()


def table(output: Path) -> Any:
    names = sorted(str(path) for path in output.glob("part-*"))
    return pyarrow.dataset.dataset(names, format="parquet").to_table().to_pandas()


def difference(found: Any, wanted: np.ndarray, paths: Sequence[str]) -> float:
    """The largest difference to a row, in units of its norm; each item must be there once, in order."""
    assert found["path"].tolist() == list(paths), "rows are missing, doubled or in another order"
    assert found["error"].isna().all(), found["error"].dropna().tolist()[:3]
    distance = np.linalg.norm(np.stack(found["features"]) - wanted, axis=1)
    return float((distance / np.linalg.norm(wanted, axis=1)).max())


def measure_same(paths: list[str], bees: list[str], folder: Path) -> Figures:
    with cluster(folder / "two") as two:
        start = time.perf_counter()
        extract(MICRO, paths, folder / "out", client=two.client, shard_size=SHARD)
        seconds = time.perf_counter() - start
        networks = counted(two.counts, "networks")
        extract(BEES, bees, folder / "bees", client=two.client, shard_size=16)
        images = sum(counted(two.counts, "images"))
    with cluster(folder / "one", 1) as one:
        extract(MICRO, paths[:SHARD], folder / "warm", client=one.client, shard_size=SHARD)
        start = time.perf_counter()
        extract(MICRO, paths, folder / "alone", client=one.client, shard_size=SHARD)
        alone = time.perf_counter() - start
    return {
        "n": len(paths) + len(bees),
        "images": images,
        "difference": max(
            difference(table(folder / "out"), MICRO.transform(paths), paths),
            difference(table(folder / "bees"), BEES.transform(bees), bees),
        ),
        "message_bytes": max(len(pickle.dumps(MICRO)), len(pickle.dumps(BEES))),
        "networks": networks,
        "times_one_worker": alone / seconds,
    }


def measure_workers(paths: list[str], folder: Path) -> Figures:
    """Three kills, spread over the run; identical output to an undisturbed one."""
    killed: list[int] = []
    with cluster(folder / "calm") as calm:
        start = time.perf_counter()
        extract(MICRO, paths, folder / "undisturbed", client=calm.client, shard_size=SHARD)
        pause = (time.perf_counter() - start) / 5
    with cluster(folder / "dying") as dying:

        def kill() -> None:
            for _ in range(3):
                time.sleep(pause)
                pid = next(iter(dying.client.run(os.getpid).values()))
                os.kill(pid, signal.SIGKILL)
                killed.append(pid)

        thread = threading.Thread(target=kill)
        thread.start()
        extract(MICRO, paths, folder / "out", client=dying.client, shard_size=SHARD)
        thread.join()
        images = sum(counted(dying.counts, "images"))
    same = [
        path.read_bytes() == (folder / "undisturbed" / path.name).read_bytes() for path in (folder / "out").iterdir()
    ]
    return {
        "n": len(paths),
        "killed": len(set(killed)),
        "seconds_between": pause,
        "identical": all(same) and len(same) == len(list((folder / "undisturbed").iterdir())),
        "computed_beyond": images - len(paths),
        "most_beyond": 3 * SHARD,
    }


CLIENT = """
import sys
from pathlib import Path
from distributed import Client
from featx import PretrainedFeatureExtractor
from featx.distributed import extract
paths = Path(sys.argv[1]).read_text().splitlines()
with Client(scheduler_file=sys.argv[2]) as client:
    extract(PretrainedFeatureExtractor("featx_micro"), paths, sys.argv[3], client=client, shard_size=int(sys.argv[4]))
"""


def measure_client(paths: list[str], folder: Path) -> Figures:
    n_shards = -(-len(paths) // SHARD)
    with cluster(folder / "cluster") as running:
        listed = folder / "paths.txt"
        listed.write_text("\n".join(paths))
        arguments = [str(listed), str(folder / "cluster" / "scheduler.json"), str(folder / "out"), str(SHARD)]
        process = subprocess.Popen([sys.executable, "-c", CLIENT, *arguments])
        while len(list((folder / "out").glob("part-*"))) < n_shards // 3:
            time.sleep(0.01)
        process.kill()
        process.wait()
        time.sleep(2)  # the scheduler forgets what a client wanted that is gone
        there = len(list((folder / "out").glob("part-*")))
        done = extract(MICRO, paths, folder / "out", client=running.client, shard_size=SHARD)
        images = sum(counted(running.counts, "images"))
    return {
        "n_shards": n_shards,
        "there": there,
        "computed_again": done.n_computed,
        "images_beyond": images - len(paths),
        "difference": difference(table(folder / "out"), MICRO.transform(paths), paths),
    }


def measure_growth(paths: list[str], sizes: Sequence[int], folder: Path) -> Figures:
    """The same files under new names: folders that link to the one that holds them."""
    source, found = Path(paths[0]).parents[1], {}
    names = [os.path.relpath(path, source) for path in paths]
    for size in sizes:
        more = []
        for i in range(-(-size // len(paths))):
            link = folder / f"links-{i}"
            if not link.exists():
                link.symlink_to(source)
            more += [str(link / name) for name in names]
        with cluster(folder / f"cluster-{size}") as running:
            extract(MICRO, paths[: 2 * SHARD], folder / f"warm-{size}", client=running.client, shard_size=SHARD)
            output = folder / f"out-{size}"
            with watching(running, output, -(-size // SHARD)) as memory:
                start = time.perf_counter()
                extract(MICRO, more[:size], output, client=running.client, shard_size=SHARD)
                seconds = time.perf_counter() - start
            found[str(size)] = {"us_per_image": seconds / size * 1e6, "memory_mib": memory}
    first, last = (found[str(size)] for size in (sizes[0], sizes[-1]))
    quarter, end = last["memory_mib"]["quarter"], last["memory_mib"]["end"]
    return {
        "sizes": found,
        "time_growth": last["us_per_image"] / first["us_per_image"],
        "memory_growth": {who: end[who] / quarter[who] for who in end},
    }


@contextlib.contextmanager
def watching(running: Cluster, output: Path, n_shards: int) -> Iterator[dict[str, dict[str, float]]]:
    """Memory of all processes when a quarter of the shards are there, and in the end."""
    memory: dict[str, dict[str, float]] = {}
    pids = {"client": [os.getpid()], "scheduler": [running.scheduler.pid]}
    pids["workers"] = list(running.client.run(os.getpid).values())

    def now() -> dict[str, float]:
        return {who: max(psutil.Process(pid).memory_info().rss for pid in of) / 2**20 for who, of in pids.items()}

    def wait() -> None:
        while len(list(output.glob("part-*"))) < n_shards // 4:
            time.sleep(0.2)
        memory["quarter"] = now()

    thread = threading.Thread(target=wait)
    thread.start()
    yield memory
    thread.join()
    memory["end"] = now()


def measure_search(photos: Path, folder: Path) -> Figures:
    """A search over layers and C, on workers with a store in common, with stores of their own, and on ready rows."""
    data = load_image_folder(photos)
    X, y = data.data, data.target

    def search(model: Any, X: Any, grid: dict[str, Any]) -> tuple[Any, float]:
        start = time.perf_counter()
        found = GridSearchCV(model, grid, cv=5).fit(X, y).cv_results_
        return {key: value for key, value in found.items() if "score" in key and "time" not in key}, (
            time.perf_counter() - start
        )

    def make(cache: Any) -> Any:
        extractor = PretrainedFeatureExtractor("squeezenet1_1", weights=str(WEIGHTS), cache=cache)
        return make_pipeline(extractor, StandardScaler(), LogisticRegression(max_iter=1000))

    grid = {"pretrainedfeatureextractor__layers": [-3, -2, -1], "logisticregression__C": [1e-3, 1e-2, 1e-1, 1.0]}
    wanted, _ = search(make(str(folder / "here")), X, grid)
    figures: Figures = {"n": len(X), "same": [], "passes": {}, "seconds": {}}
    for name, n_workers, stores in (("shared", 2, False), ("own", 2, True)):
        with cluster(folder / name, n_workers, stores) as running:
            with joblib.parallel_config(backend="dask"):
                found, figures["seconds"][name] = search(make(True), X, grid)
            figures["same"].append(_equal(found, wanted))
            figures["passes"][name] = [FeatureStore(path).info()["computed"] / len(X) for path in running.stores]
    with cluster(folder / "rows") as running:
        start = time.perf_counter()
        extractor = PretrainedFeatureExtractor("squeezenet1_1", weights=str(WEIGHTS), layers=-1)
        rows = extractor.transform(X)
        with joblib.parallel_config(backend="dask", scatter=[rows]):
            classifier = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
            found, _ = search(classifier, rows, {"logisticregression__C": grid["logisticregression__C"]})
        figures["seconds"]["rows, one layer"] = time.perf_counter() - start
        figures["passes"]["rows"] = [sum(counted(running.counts, "images")) / len(X)]
    figures["scaling"] = _scaling(lambda cache: search(make(cache), X, grid)[1], folder)
    return figures


def _scaling(search: Callable[[Any], float], folder: Path) -> Figures:
    """Time of a search on one worker process, in units of that on two.

    A single worker of one thread would leave joblib nothing to share out: it would search in the client. So the one has
    two threads, on the one core that it may use.
    """
    seconds: dict[str, dict[int, list[float]]] = {"cold": {1: [], 2: []}, "warm": {1: [], 2: []}}
    with (
        cluster(folder / "two", 2) as two,
        cluster(folder / "one", 1, n_threads=2) as one,
    ):
        for running in (one, two):
            for core, pid in enumerate(running.client.run(os.getpid).values()):
                for thread in os.listdir(f"/proc/{pid}/task"):
                    os.sched_setaffinity(int(thread), {sorted(os.sched_getaffinity(0))[core]})
        for turn in range(4):  # the first one loads the network
            for n, running in ((1, one), (2, two)):
                with running.client.as_current(), joblib.parallel_config(backend="dask"):
                    for state in ("cold", "warm"):
                        seconds[state][n].append(search(str(folder / f"store-{n}-{turn}")))
    return {state: float(np.median(of[1][1:]) / np.median(of[2][1:])) for state, of in seconds.items()}


def _equal(found: dict[str, Any], wanted: dict[str, Any]) -> bool:
    return all(np.array_equal(found[name], wanted[name]) for name in wanted)


def checks_of(figures: Figures) -> list[tuple[str, Any, bool]]:
    """What is measured, and whether it is as it must be."""
    rows: list[tuple[str, Any, bool]] = []

    def add(part: str, make: Callable[[Figures], list[tuple[str, Any, bool]]]) -> None:
        if part in figures:
            rows.extend((f"{part}: {label}", value, bool(met)) for label, value, met in make(figures[part]))

    add(
        "same",
        lambda f: [
            ("largest difference, of a row's norm", f["difference"], f["difference"] <= 1e-5),
            ("images through networks, of n", (f["images"], f["n"]), f["images"] == f["n"]),
            ("bytes that carry the extractor", f["message_bytes"], f["message_bytes"] < MOST_MESSAGE),
            ("networks loaded by each worker", f["networks"], f["networks"] == [1, 1]),
            ("one worker's time, in units of two workers'", f["times_one_worker"], True),
        ],
    )
    add(
        "workers",
        lambda f: [
            ("workers killed", f["killed"], f["killed"] == 3),
            ("output identical", f["identical"], f["identical"]),
            ("images computed beyond n", f["computed_beyond"], f["computed_beyond"] <= f["most_beyond"]),
        ],
    )
    add(
        "client",
        lambda f: [
            ("shards there, of all", (f["there"], f["n_shards"]), 0 < f["there"] < f["n_shards"]),
            ("shards computed again", f["computed_again"], f["computed_again"] == f["n_shards"] - f["there"]),
            ("images computed beyond n", f["images_beyond"], f["images_beyond"] <= 4 * SHARD),
            ("largest difference", f["difference"], f["difference"] <= 1e-5),
        ],
    )
    add(
        "growth",
        lambda f: [
            ("time per image, many / few", f["time_growth"], f["time_growth"] <= MOST_TIME),
            *((f"memory of {who}, end / quarter", v, v <= MOST_MEMORY) for who, v in f["memory_growth"].items()),
        ],
    )
    add(
        "search",
        lambda f: [
            ("same results", f["same"], all(f["same"])),
            ("passes per photo, one store", f["passes"]["shared"], f["passes"]["shared"] == [1.0]),
            ("passes per photo, stores of their own", f["passes"]["own"], max(f["passes"]["own"]) <= 1.0),
            ("passes on workers with ready rows", f["passes"]["rows"], f["passes"]["rows"] == [0.0]),
            ("one worker's time, in units of two workers', cold", f["scaling"]["cold"], True),
            ("one worker's time, in units of two workers', warm", f["scaling"]["warm"], True),
        ],
    )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer images, and no judgement of times")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--json", type=Path, help="where to write the figures")
    arguments = parser.parse_args()
    sizes = (2_000, 10_000) if arguments.quick else (10_000, 200_000)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with zipfile.ZipFile(DATA / "data" / "cifar10-test.zip") as archive:
            archive.extractall(folder / "cifar10")
        paths = sorted(map(str, (folder / "cifar10").rglob("*.jpg")))
        few = paths[:2_000] if arguments.quick else paths
        photos = unpack_photos(folder)
        bees = load_image_folder(photos, shuffle=False).data.tolist()
        measures: dict[str, Callable[[Path], Figures]] = {
            "same": lambda where: measure_same(few, bees, where),
            "workers": lambda where: measure_workers(few, where),
            "client": lambda where: measure_client(few, where),
            "growth": lambda where: measure_growth(paths, sizes, where),
            "search": lambda where: measure_search(photos, where),
        }
        figures = {}
        for part in arguments.parts:
            (folder / part).mkdir()
            figures[part] = measures[part](folder / part)
            print(part, json.dumps(figures[part]), flush=True)
    checks = checks_of(figures)
    print()
    for label, value, met in checks:
        print(f"{label:55} {value!s:30} {'as it must be' if met else 'NOT AS IT MUST BE'}")
    if arguments.json:
        arguments.json.write_text(json.dumps(figures | about(), indent=2))
    sys.exit(not arguments.quick and not all(met for _, _, met in checks))


if __name__ == "__main__":
    main()

"""The feature store: what a look-up costs, how it scales, and that its size is kept.

    python benchmarks/bench_store.py [--quick] [--json FILE]

Four parts. The cost of looking up known images, beside ``numpy.take`` on a ready matrix in the same rounds; the cost
of known files, each looked up once in a new process, in stores of 10,000 and of 1,000,000 rows (synthetic but for
those files); ``max_size`` while a store is
filled far beyond it; and pruning while another process reads. Rows are compared in all of them. Exits with 1 where a
limit is not met, under ``--quick`` only those that do not depend on the machine. Memory figures need Linux.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lmdb
import numpy as np
from _about import about
from PIL import Image

from featx import FeatureStore, PretrainedFeatureExtractor
from featx.store.index import TRUST_AFTER_S
from featx.store.memory import MEMORY
from featx.store.shelf import Shelf

ROUNDS, TURNS = 9, 5  # medians are taken of so many, in a process and of processes
MOST_US = {"paths": 15.0, "arrays": 30.0}  # per image
MOST_OPENING_S, MOST_GROWTH = 1.0, 1.5
PUT_ROWS, LOOK_UP_ROWS, STEP_ROWS, MEMORY_ROWS = 2_000, 2_000, 4_096, 100_000
SHORTCUT_BYTES = 60
MAX_SIZE = 5_000_000
TOLERANCE = 1e-5  # of the row's norm

Figures = dict[str, Any]


def make_extractor(cache: FeatureStore | None) -> PretrainedFeatureExtractor:
    return PretrainedFeatureExtractor("featx_micro", layers=1, cache=cache)


def random_images(rng: np.random.Generator, count: int, side: int) -> np.ndarray:
    return rng.integers(0, 256, size=(count, side, side, 3), dtype=np.uint8)


def n_wrong(found: np.ndarray, wanted: np.ndarray) -> int:
    distances = np.linalg.norm(found - wanted, axis=1)
    return int((~(distances <= TOLERANCE * np.linalg.norm(wanted, axis=1))).sum())


def worker_command(*arguments: object) -> list[str]:
    return [sys.executable, __file__, *map(str, arguments)]


# Part 1: look-ups.


def make_photos(folder: Path, count: int) -> list[str]:
    """Files that are old enough to be known by their times."""
    images = random_images(np.random.default_rng(0), count, 16)
    paths = [str(folder / f"{i}.jpg") for i in range(count)]
    for path, image in zip(paths, images, strict=True):
        Image.fromarray(image).save(path)
    time.sleep(TRUST_AFTER_S + 0.2)
    return paths


def seconds_of(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def look_up_cost(X: list[str] | np.ndarray, folder: Path) -> dict[str, dict[str, float]]:
    """Microseconds per image: rows in the process's memory, rows on disk, and ``numpy.take``."""
    extractor = make_extractor(FeatureStore(folder))
    features = extractor.transform(X)
    assert n_wrong(features[:64], make_extractor(None).transform(X[:64])) == 0
    order = np.random.default_rng(0).permutation(len(X))
    seconds: dict[str, list[float]] = {"memory": [], "disk": [], "take": []}
    for _ in range(ROUNDS):
        seconds["memory"].append(seconds_of(lambda: extractor.transform(X)))
        MEMORY.clear()
        seconds["disk"].append(seconds_of(lambda: extractor.transform(X)))
        seconds["take"].append(seconds_of(lambda: features.take(order, axis=0)))
    MEMORY.clear()
    assert np.array_equal(extractor.transform(X), features)
    summaries = {"median": np.median, "fastest": np.min}
    return {
        name: {summary: float(of(values)) / len(X) * 1e6 for summary, of in summaries.items()}
        for name, values in seconds.items()
    }


def measure_look_ups(folder: Path, quick: bool) -> Figures:
    n_paths, n_arrays = (500, 50) if quick else (5_000, 500)
    (folder / "photos").mkdir()
    return {
        "n_paths": n_paths,
        "n_arrays": n_arrays,
        "paths": look_up_cost(make_photos(folder / "photos", n_paths), folder / "of-paths"),
        "arrays": look_up_cost(random_images(np.random.default_rng(1), n_arrays, 224), folder / "of-arrays"),
    }


def print_look_ups(figures: Figures) -> None:
    print("look-up, us per image: median (fastest)    in memory       on disk   numpy.take   limit")
    for kind, label in (("paths", "known paths"), ("arrays", "arrays 224 x 224 x 3")):
        cost, name = figures[kind], f"{figures['n_' + kind]:,} {label}"
        cells = ["{median:.1f} ({fastest:.1f})".format(**cost[where]) for where in ("memory", "disk")]
        print(f"{name:38} {cells[0]:>13} {cells[1]:>13} {cost['take']['median']:12.2f} {MOST_US[kind]:7.0f}")


# Part 2: scale.


def fill_store(folder: Path, photos: list[str], count: int) -> None:
    """A store of ``count`` images: some files, and synthetic rows and shortcuts of files that are not there."""
    store, rng = FeatureStore(folder / "store", keep="asked"), np.random.default_rng(count)
    np.save(folder / "wanted.npy", make_extractor(store).transform(photos))
    opened = store._open()
    (shelf,) = opened.shelves()
    ((column,),) = shelf.groups().values()
    digests = rng.integers(0, 256, size=(count - len(photos), 16), dtype=np.uint8)
    for start in range(0, len(digests), PUT_ROWS):
        part = digests[start : start + PUT_ROWS]
        keys = [digest.tobytes() for digest in part]
        shelf.put(keys, {column: rows_of(part, column.width)}, [(column,)])
        opened.index.database.write(lambda txn, tables, keys=keys: put_shortcuts(txn, tables["shortcuts"], keys))
    np.save(folder / "sample.npy", rng.permutation(digests)[:MEMORY_ROWS])


def put_shortcuts(txn: lmdb.Transaction, table: Any, keys: list[bytes]) -> None:
    for key in keys:
        txn.put(key[::-1], bytes(SHORTCUT_BYTES), db=table)


def rows_of(digests: np.ndarray, width: int) -> np.ndarray:
    """Rows that tell which digest they belong to, float32 (n, width)."""
    return np.tile(digests, width // 16).astype(np.float32)


def measure_scale(folder: Path, quick: bool) -> list[Figures]:
    """Figures of a small and a large store, from processes that take turns."""
    n_photos, counts = (1_000, (1_000, 20_000)) if quick else (10_000, (10_000, 1_000_000))
    (folder / "photos").mkdir()
    photos = make_photos(folder / "photos", n_photos)
    for count in counts:
        (folder / str(count)).mkdir()
        fill_store(folder / str(count), photos, count)
    runs: dict[int, list[Figures]] = {count: [] for count in counts}
    for _ in range(1 if quick else TURNS):
        for count in counts:
            command = worker_command("--look-up", folder / str(count), folder / "photos")
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            runs[count].append(json.loads(done.stdout))
    return [{"rows": count, **median_run(runs[count])} for count in counts]


def median_run(runs: list[Figures]) -> Figures:
    """The last of some runs, with the medians of what was timed."""
    return runs[-1] | {name: float(np.median([run[name] for run in runs])) for name in ("opening_s", "us_per_row")}


def look_up(folder: Path, photos: Path) -> Figures:
    """What a new process sees of a store: the median over parts of the files, and memory over many more rows."""
    paths = [str(photos / f"{i}.jpg") for i in range(len(list(photos.iterdir())))]
    wanted, digests = np.load(folder / "wanted.npy"), np.load(folder / "sample.npy")
    store = FeatureStore(folder / "store", keep="asked")
    extractor, before = make_extractor(store), rss_mib()
    start = time.perf_counter()
    (shelf,) = store._open().shelves()
    shelf.n_images()
    opening = time.perf_counter() - start
    seconds = []
    for first in range(0, len(paths), LOOK_UP_ROWS):
        some = slice(first, first + LOOK_UP_ROWS)
        start = time.perf_counter()
        found = extractor.transform(paths[some])
        seconds.append((time.perf_counter() - start) / len(found))
        assert np.array_equal(found, wanted[some])
    most = rss_mib()
    for first in range(0, len(digests), STEP_ROWS):
        look_up_part(shelf, digests[first : first + STEP_ROWS])
        most = max(most, rss_mib(), key=lambda rss: rss.get("total", 0))
    return {
        "opening_s": opening,
        "us_per_row": float(np.median(seconds)) * 1e6,
        "file_bytes": shelf.database.file_bytes(),
        "rss_before_mib": before,
        "rss_most_mib": most,
    }


def look_up_part(shelf: Shelf, part: np.ndarray) -> None:
    """Read and compare synthetic rows; nothing where there are none."""
    ((column,),) = shelf.groups().values()
    out = np.empty((len(part), column.width), dtype=np.float32)
    assert shelf.fill([digest.tobytes() for digest in part], [column], [out], np.arange(len(part))).all()
    assert np.array_equal(out, rows_of(part, column.width))


def rss_mib() -> dict[str, float]:
    """Memory of this process that is resident, and which part of it belongs to files; empty where it is not told."""
    names = {"VmRSS:": "total", "RssAnon:": "anonymous", "RssFile:": "file"}
    with contextlib.suppress(OSError):
        fields = [line.split() for line in Path("/proc/self/status").read_text().splitlines() if line]
        return {names[field[0]]: round(int(field[1]) / 1024, 1) for field in fields if field[0] in names}
    return {}


def print_scale(figures: list[Figures]) -> None:
    print("\nrows        file MB   opening s   us per row   RSS before -> most, MiB (files, other)")
    for row in figures:
        before, most = (
            "{total:.0f} ({file:.0f}, {anonymous:.0f})".format(**row[name]) if row[name] else "unknown"
            for name in ("rss_before_mib", "rss_most_mib")
        )
        print(f"{row['rows']:9,} {row['file_bytes'] / 1e6:9.1f} {row['opening_s']:11.4f}", end=" ")
        print(f"{row['us_per_row']:12.2f}   {before} -> {most}")
    print(f"look-up, large over small: {growth(figures):.2f} (limit {MOST_GROWTH}); opening: limit {MOST_OPENING_S} s")


def growth(figures: list[Figures]) -> float:
    return figures[1]["us_per_row"] / figures[0]["us_per_row"]


# Part 3: max_size.


def measure_max_size(folder: Path, quick: bool) -> Figures:
    """Fill a store with several times what it may hold, and look at its size after every call."""
    store, rng = FeatureStore(folder / "bounded", max_size=MAX_SIZE), np.random.default_rng(2)
    calls, per_call = (6, 256) if quick else (20, 512)
    sizes, wrong = [], 0
    for _ in range(calls):
        images = random_images(rng, per_call, 8)
        found = make_extractor(store).transform(images)
        sizes.append(store.info()["file_bytes"])
        wrong += n_wrong(found[:16], make_extractor(None).transform(images[:16]))
    info = store.info()
    return {
        "max_size": MAX_SIZE,
        "transformed": calls * per_call,
        "kept": info["images"],
        "most_bytes": max(sizes),
        "du_bytes": du(store.path),
        "wrong_rows": wrong,
    }


def du(folder: str | Path) -> int:
    """Bytes on disk, folders and all."""
    done = subprocess.run(
        ["du", "-s", "-B1", os.fspath(folder)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    return int(done.stdout.split()[0])


def print_max_size(figures: Figures) -> None:
    print(f"\nmax_size {figures['max_size'] / 1e6:.1f} MB: {figures['transformed']:,} images transformed,", end=" ")
    print(f"{figures['kept']:,} kept, never more than {figures['most_bytes'] / 1e6:.2f} MB in files", end=" ")
    print(f"(du at the end, with folders: {figures['du_bytes'] / 1e6:.2f} MB), {figures['wrong_rows']} rows wrong")


# Part 4: pruning while another process reads.


def measure_prune(folder: Path, quick: bool) -> Figures:
    """Prune a store in three steps while a process transforms images of it in a loop."""
    store, images = FeatureStore(folder / "pruned"), random_images(np.random.default_rng(3), 500 if quick else 2_000, 8)
    np.save(folder / "images.npy", images)
    np.save(folder / "wanted.npy", make_extractor(None).transform(images))
    make_extractor(store).transform(images)
    whole = store.info()["file_bytes"]
    with subprocess.Popen(worker_command("--read", folder), stdout=subprocess.PIPE, text=True) as reader:
        reader.stdout.readline()  # it has read
        steps = [prune_to(store, int(whole * share), reader.pid) for share in (0.6, 0.4, 0.2)]
        (folder / "stop").touch()
        said = reader.stdout.read()
    return {"steps": steps, "reader": {"status": reader.returncode, **json.loads(said or "{}")}}


def prune_to(store: FeatureStore, size: int, reader: int) -> dict[str, int]:
    before = du(store.path)
    store.prune(size)
    files, after = store.info()["file_bytes"], du(store.path)
    time.sleep(1.0)
    return {"size": size, "before": before, "after": after, "file_bytes": files, "held": held_bytes(reader)}


def held_bytes(pid: int) -> int:
    """Bytes of deleted files that a process keeps from being freed."""
    total = 0
    with contextlib.suppress(OSError):
        for descriptor in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(OSError):
                status = descriptor.stat()
                total += status.st_blocks * 512 if status.st_nlink == 0 else 0
    return total


def read(folder: Path) -> Figures:
    """Transform random images from the disk, and compare, until told to stop."""
    warnings.simplefilter("error")
    images, wanted = np.load(folder / "images.npy"), np.load(folder / "wanted.npy")
    extractor, rng = make_extractor(FeatureStore(folder / "pruned")), np.random.default_rng(4)
    counts = {"rounds": 0, "wrong_rows": 0}
    while not (folder / "stop").exists():
        MEMORY.clear()
        rows = rng.permutation(len(images))[:100]
        counts["wrong_rows"] += n_wrong(extractor.transform(images[rows]), wanted[rows])
        counts["rounds"] += 1
        if counts["rounds"] == 1:
            print("reading", flush=True)
    return counts


def print_prune(figures: Figures) -> None:
    print("\nprune beside a reader   to MB   du before   du after   held by the reader after 1 s")
    for step in figures["steps"]:
        print(f"{'':23} {step['size'] / 1e6:5.2f} {step['before'] / 1e6:11.2f} {step['after'] / 1e6:10.2f}", end=" ")
        print(f"{step['held'] / 1e6:8.2f}")
    print(f"the reader: {figures['reader']}")


# All of it.


def failures(figures: Figures, quick: bool) -> list[str]:
    """The limits that are not met; under ``quick`` only those that are no matter of time."""
    scale, bounded, pruned = figures["scale"], figures["max_size"], figures["prune"]
    checks = {
        "max_size holds": bounded["most_bytes"] <= MAX_SIZE and not bounded["wrong_rows"],
        "max_size is made use of": bounded["kept"] > 0,
        "pruning frees disk": all(step["after"] < step["before"] for step in pruned["steps"]),
        "pruning reaches its size": all(step["file_bytes"] <= step["size"] for step in pruned["steps"]),
        "the reader ends well": not pruned["reader"]["status"] and pruned["reader"].get("wrong_rows") == 0,
    }
    if not quick:
        for kind, most in MOST_US.items():
            cost = figures["look_up"][kind]
            checks[f"look-up of {kind}"] = max(cost["memory"]["median"], cost["disk"]["median"]) <= most
        checks["opening"] = all(row["opening_s"] < MOST_OPENING_S for row in scale)
        checks["look-up in a large store"] = growth(scale) <= MOST_GROWTH
    return [name for name, met in checks.items() if not met]


def measure(folder: Path, quick: bool) -> Figures:
    parts: dict[str, tuple[Callable[[Path, bool], Any], Callable[[Any], None]]] = {
        "look_up": (measure_look_ups, print_look_ups),
        "scale": (measure_scale, print_scale),
        "max_size": (measure_max_size, print_max_size),
        "prune": (measure_prune, print_prune),
    }
    figures = {}
    for name, (measure_part, print_part) in parts.items():
        (folder / name).mkdir()
        figures[name] = measure_part(folder / name, quick)
        print_part(figures[name])
        sys.stdout.flush()
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small sizes, and no limit on time")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    parser.add_argument("--look-up", type=Path, nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--read", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.look_up:
        return print(json.dumps(look_up(*arguments.look_up)))
    if arguments.read:
        return print(json.dumps(read(arguments.read)))
    with tempfile.TemporaryDirectory() as folder:
        figures = measure(Path(folder), arguments.quick)
    failed = failures(figures, arguments.quick)
    print("\n" + ("Not met: " + ", ".join(failed) if failed else "All limits that were checked are met."))
    if arguments.json:
        arguments.json.write_text(json.dumps({**figures, "not_met": failed, **about()}, indent=2))
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()

"""The store's own laws: leases, sizes, places, memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from featx import FeatureStore, PretrainedFeatureExtractor
from featx.exceptions import StoreError, StoreWarning
from featx.store import environment
from featx.store.environment import Database, disk_bytes
from featx.store.index import Claims, Index
from featx.store.memory import Memory
from featx.store.owners import LEASE_S, Owner
from featx.store.places import check_local, default_folder, parse_size
from featx.store.shelf import Column, Shelf

RNG = np.random.default_rng(0)
COLUMN = Column("layer", 8)


def digests(n: int) -> list[bytes]:
    return [RNG.bytes(16) for _ in range(n)]


def put(shelf: Shelf, names: list[bytes], value: float = 0.0) -> np.ndarray:
    rows = RNG.normal(size=(len(names), COLUMN.width)).astype(np.float32) + np.float32(value)
    shelf.put(names, {COLUMN: rows}, [(COLUMN,)])
    return rows


def look_up(shelf: Shelf, names: list[bytes], column: Column = COLUMN) -> tuple[np.ndarray, np.ndarray]:
    out = np.full((len(names), column.width), np.nan, dtype=np.float32)
    return shelf.fill(names, [column], [out], np.arange(len(names)))[:, 0], out


@pytest.fixture
def shelf(tmp_path: Path) -> Shelf:
    return Shelf.at(tmp_path / ("ab" * 16))


# Rows


def test_rows_come_back_as_they_went_in(shelf: Shelf) -> None:
    names = digests(50)
    rows = put(shelf, names)
    found, out = look_up(shelf, [*names[::-1], *digests(3)])
    assert found.tolist() == [True] * 50 + [False] * 3
    np.testing.assert_array_equal(out[:50], rows[::-1])


def test_columns_are_told_apart_by_name_and_width(shelf: Shelf) -> None:
    names = digests(2)
    put(shelf, names)
    assert not look_up(shelf, names, Column("layer", 4))[0].any()
    assert not look_up(shelf, names, Column("other", 8))[0].any()


def test_later_rows_replace_earlier_ones(shelf: Shelf) -> None:
    names = digests(2)
    put(shelf, names)
    rows = put(shelf, names)
    np.testing.assert_array_equal(look_up(shelf, names)[1], rows)
    assert shelf.n_images() == 2


def test_a_record_under_another_images_name_is_wrong(shelf: Shelf) -> None:
    first, second = digests(2)
    put(shelf, [first, second])

    def swap(txn, tables) -> None:
        records = {bytes(key): bytes(value) for key, value in txn.cursor(tables["rows"])}
        for (key, _), value in zip(records.items(), reversed(records.values()), strict=True):
            txn.put(key, value, db=tables["rows"])

    shelf.database.write(swap)
    assert not look_up(shelf, [first, second])[0].any()
    assert sorted(shelf.check()[1]) == sorted([first, second])


def test_map_grows_when_addresses_are_rationed(tmp_path: Path) -> None:
    code = (
        "import resource, sys, numpy as np\n"
        "from pathlib import Path\n"
        "from featx.store import environment\n"
        "from featx.store.shelf import Column, Shelf\n"
        "environment._MAP_SIZES = (1 << 50, 1 << 20)\n"
        "resource.setrlimit(resource.RLIMIT_AS, (1 << 36, 1 << 36))\n"
        "shelf, column = Shelf.at(Path(sys.argv[1])), Column('a', 1000)\n"
        "for start in range(8):\n"
        "    names = [bytes([start, i]) * 8 for i in range(100)]\n"
        "    rows = np.full((100, 1000), start, dtype=np.float32)\n"
        "    shelf.put(names, {column: rows}, [(column,)])\n"
        "print(shelf.n_images(), shelf.check()[1])\n"
    )
    folder = tmp_path / ("cd" * 16)
    done = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True)
    assert done.stdout.split(maxsplit=1) == ["800", "[]\n"], done.stderr
    assert Shelf.at(folder).n_images() == 800  # grown by another process


def test_two_paths_to_one_folder_are_one_database(shelf: Shelf, tmp_path: Path) -> None:
    names = digests(3)
    rows = put(shelf, names)
    (tmp_path / "link").symlink_to(tmp_path, target_is_directory=True)
    other = Shelf.at(tmp_path / "link" / shelf.database.folder.name)
    np.testing.assert_array_equal(look_up(other, names)[1], rows)


def test_commit_into_a_replaced_folder_is_made_again_in_the_new_one(shelf: Shelf, tmp_path: Path) -> None:
    put(shelf, digests(3))
    names = digests(3)
    replaced = False

    def write(txn, tables) -> None:
        nonlocal replaced
        if not replaced:
            shelf.database.folder.rename(tmp_path / "moved away")
            replaced = True
        for name in names:
            txn.put(name, b"now", db=tables["used"])

    shelf.database.write(write)
    assert sorted(shelf.digests()) == sorted(names)


def test_folder_is_for_its_owner_alone(tmp_path: Path) -> None:
    extractor = PretrainedFeatureExtractor("featx_micro", cache=str(tmp_path / "store"))
    extractor.transform(RNG.integers(0, 256, size=(2, 8, 8, 3), dtype=np.uint8))
    folders = [tmp_path / "store", *(path for path in (tmp_path / "store").rglob("*") if path.is_dir())]
    assert {path.stat().st_mode & 0o777 for path in folders} == {0o700}


# Leases


@pytest.fixture
def claims(tmp_path: Path) -> list[Claims]:
    index = Index.at(tmp_path / "index", seed=1)
    return [Claims(index, b"r" * 16), Claims(index, b"r" * 16)]


def nothing(names: list[bytes]) -> list[bool]:
    return [False] * len(names)


def test_an_image_is_claimed_by_one(claims: list[Claims]) -> None:
    names = digests(10)
    with closing(claims[0]) as first, closing(claims[1]) as second:
        assert first.take(names[:6], nothing) == names[:6]
        assert second.take(names, nothing) == names[6:]
        first.release(names[:2])
        assert second.take(names, nothing) == names[:2]
    with closing(claims[0]) as third:
        assert third.take(names, nothing) == names


def test_what_is_there_is_not_claimed(claims: list[Claims]) -> None:
    names = digests(4)
    with closing(claims[0]) as first:
        assert first.take(names, lambda asked: [name == names[1] for name in asked]) == [names[0], *names[2:]]


def test_leases_are_renewed_while_their_owner_lives(claims: list[Claims], monkeypatch) -> None:
    monkeypatch.setattr("featx.store.index.LEASE_S", 0.2)
    monkeypatch.setattr("featx.store.owners.LEASE_S", 0.2)
    names = digests(2)
    with closing(claims[0]) as first, closing(claims[1]) as second:
        first.take(names, nothing)
        time.sleep(0.6)
        assert second.take(names, nothing) == []
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("featx")]


def test_owner_is_gone_when_its_lease_process_or_system_is() -> None:
    here = Owner.here()
    assert not Owner.parse(here.record()).is_gone()
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    stat = Path(f"/proc/{child.pid}/stat")
    started = stat.read_text().rpartition(")")[2].split()[19] if stat.exists() else ""
    there = Owner(here.boot, here.namespace, child.pid, started, here.expires)
    assert not there.is_gone()
    child.kill()
    while stat.exists() and ") Z" not in stat.read_text():
        time.sleep(0.01)
    if started:
        assert there.is_gone()  # killed, though nobody has waited for it yet
    child.wait()
    changes = [{"expires": time.monotonic() - 1}, {"expires": time.monotonic() + 100 * LEASE_S}, {"boot": "other"}]
    if started:
        changes += [{"started": "1"}, {"pid": child.pid}]
    for change in changes:
        assert Owner.parse(json.dumps(json.loads(here.record()) | change).encode()).is_gone(), change
    # Where process numbers are not ours, the lease alone tells.
    assert not Owner(here.boot, "pid:[1]", child.pid, "1", here.expires).is_gone()


def test_stopped_owner_loses_its_work_after_the_lease(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = (
        "import sys, time\n"
        "from pathlib import Path\n"
        "from featx.store.index import Claims, Index\n"
        "claims = Claims(Index.at(Path(sys.argv[1]), 1), b'r' * 16)\n"
        "claims.take([b'a' * 16], lambda names: [False])\n"
        "print('claimed', flush=True)\n"
        "time.sleep(100)\n"
    )
    owner = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "index")], stdout=subprocess.PIPE)
    owner.stdout.readline()
    owner.send_signal(19)  # SIGSTOP
    try:
        with closing(Claims(Index.at(tmp_path / "index", 1), b"r" * 16)) as claims:
            assert claims.take([b"a" * 16], nothing) == []
            later = time.monotonic() + LEASE_S
            monkeypatch.setattr("featx.store.owners.time.monotonic", lambda: later)
            assert claims.take([b"a" * 16], nothing) == [b"a" * 16]
    finally:
        owner.kill()
        owner.wait()
        owner.stdout.close()


# Sizes


IMAGES = RNG.integers(0, 256, size=(1200, 8, 8, 3), dtype=np.uint8)


def test_max_size_holds_and_the_oldest_rows_make_room(tmp_path: Path) -> None:
    store = FeatureStore(tmp_path, max_size="4MB")
    extractor = PretrainedFeatureExtractor("featx_micro", image_size=16, cache=store)
    for start in range(0, 1200, 300):
        extractor.transform(IMAGES[start : start + 300])
        assert store.info()["file_bytes"] <= 4_000_000
    before = store.info()["computed"]
    from featx.store.memory import MEMORY

    MEMORY.clear()
    extractor.transform(IMAGES[-20:])
    assert store.info()["computed"] == before
    extractor.transform(IMAGES[:20])
    assert store.info()["computed"] == before + 20


def test_prune_drops_recipes_used_longest_ago_first_and_frees_disk(tmp_path: Path) -> None:
    store = FeatureStore(tmp_path)
    extractor = PretrainedFeatureExtractor("featx_micro", cache=store)
    for size in (16, 24, 20):
        extractor.set_params(image_size=size).transform(IMAGES[:200])
        time.sleep(0.02)
    before = disk_bytes(tmp_path)
    freed = store.prune(int(before * 0.8))
    assert freed == before - disk_bytes(tmp_path) > 0
    assert disk_bytes(tmp_path) <= before * 0.8
    assert [row["recipe"].count("(3, 16, 16)") for row in store.info()["by_recipe"]] == [0, 0]
    assert store.info()["computed"] == 600
    store.prune(int(before * 0.2))  # rows of the last recipe have to go
    info = store.info()
    assert info["recipes"] == 1
    assert 0 < info["images"] < 200
    assert disk_bytes(tmp_path) <= before * 0.2
    assert store.verify() == {"records": info["images"], "wrong": 0, "damaged": 0}
    store.prune(0)
    assert store.info()["recipes"] == 0
    assert store.info()["computed"] == 600


def test_store_that_is_not_there_is_empty_and_not_made(tmp_path: Path) -> None:
    store = FeatureStore(tmp_path / "none")
    info = store.info()
    assert (info["images"], info["recipes"], info["computed"], info["file_bytes"]) == (0, 0, 0, 0)
    assert store.verify() == {"records": 0, "wrong": 0, "damaged": 0}
    assert store.prune() == 0
    store.clear()
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("size", "expected"),
    [("20GB", 20 * 10**9), ("1.5 MiB", 3 * 2**19), ("7", 7), (12, 12), ("3k", 3000), ("0", 0)],
)
def test_sizes_are_read_as_people_write_them(size: str | int, expected: int) -> None:
    assert parse_size(size) == expected


@pytest.mark.parametrize("size", ["", "GB", "-1", -1, "20 parsecs", True, 1.5, None, "1I"])
def test_wrong_size_is_an_error(size: object) -> None:
    with pytest.raises(ValueError, match="max_size="):
        FeatureStore("folder", max_size=size)


@pytest.mark.parametrize(("options", "words"), [({"keep": "all"}, "keep="), ({"path": 3}, "path=3")])
def test_wrong_options_are_errors(options: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        FeatureStore(**{"path": "folder"} | options)


# Places


MOUNTS = r"""
22 1 259:1 / / rw,relatime - ext4 /dev/root rw
30 22 0:40 / /home rw,relatime shared:1 - nfs4 server:/home rw
31 30 0:41 / /home/my\040disk rw,relatime - xfs /dev/sdb1 rw
32 22 0:42 / /data rw - fuse.sshfs me@there: rw
"""


@pytest.mark.parametrize(
    ("folder", "kind"),
    [
        ("/tmp/x", ""),
        ("/home/me/cache", "nfs4"),
        ("/home/my disk/cache", ""),
        ("/data", "fuse.sshfs"),
        ("/database", ""),
    ],
)
def test_network_file_systems_are_refused(tmp_path: Path, folder: str, kind: str) -> None:
    mounts = tmp_path / "mountinfo"
    mounts.write_text(MOUNTS.strip())
    if not kind:
        check_local(Path(folder), mounts)
        return
    with pytest.raises(StoreError, match=f"network file system \\({kind}\\)"):
        check_local(Path(folder), mounts)


def test_refusal_reaches_the_user_and_makes_no_folder(tmp_path: Path, monkeypatch) -> None:
    from featx.store import places

    monkeypatch.setattr(places, "_file_system", lambda folder, mounts: "nfs")
    extractor = PretrainedFeatureExtractor("featx_micro", cache=str(tmp_path / "remote"))
    with pytest.raises(StoreError, match="Set cache="):
        extractor.transform(IMAGES[:2])
    assert not (tmp_path / "remote").exists()


def test_folder_that_holds_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "v1").mkdir()
    (tmp_path / "v1" / "label.csv").write_text("mine")
    extractor = PretrainedFeatureExtractor("featx_micro", cache=str(tmp_path))
    with pytest.warns(StoreWarning, match="holds something else"):
        extractor.transform(IMAGES[:2])
    FeatureStore(tmp_path).clear()
    assert (tmp_path / "v1" / "label.csv").read_text() == "mine"


def test_one_store_under_two_names_is_one(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "store", target_is_directory=True)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    extractor = PretrainedFeatureExtractor("featx_micro")
    for cache in (str(tmp_path / "link"), "store", "~/store"):
        extractor.set_params(cache=cache).transform(IMAGES[:3])
    assert FeatureStore("store").info()["computed"] == 3
    FeatureStore("store").clear()
    assert FeatureStore("~/store").info()["images"] == 0


def test_damaged_seed_is_drawn_anew(tmp_path: Path) -> None:
    extractor = PretrainedFeatureExtractor("featx_micro", cache=str(tmp_path))
    extractor.transform(IMAGES[:3])
    (tmp_path / "v1" / "seed").write_text("")
    (tmp_path / "v1" / "recipes" / ".DS_Store").write_text("of the system")
    extractor.transform(IMAGES[:3])
    assert FeatureStore(tmp_path).info()["images"] == 6  # under other digests: nothing is mixed up


def test_default_folder_follows_the_environment(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("FEATX_CACHE", str(tmp_path / "mine"))
    assert default_folder() == tmp_path / "mine"
    PretrainedFeatureExtractor("featx_micro", cache=True).transform(IMAGES[:2])
    assert FeatureStore(tmp_path / "mine").info()["images"] == 2
    monkeypatch.delenv("FEATX_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    if sys.platform == "linux":
        assert default_folder() == tmp_path / "xdg" / "featx"


# Memory


def test_memory_stays_within_its_bound_and_drops_what_was_used_first() -> None:
    memory = Memory(most_bytes=200_000)
    names = digests(100)
    rows = RNG.normal(size=(100, 50)).astype(np.float32)
    for key in range(20):
        memory.add(key, names, rows + key)
        assert memory._bytes() <= 200_000
    out = np.empty_like(rows)
    assert memory.fill(19, names, out, np.arange(100)).all()
    np.testing.assert_array_equal(out, rows + 19)
    assert not memory.fill(0, names, out, np.arange(100)).any()


def test_memory_fills_what_it_knows_and_leaves_the_rest() -> None:
    memory, names = Memory(), digests(4)
    rows = RNG.normal(size=(4, 3)).astype(np.float32)
    memory.add("a", names[:2], rows[:2])
    memory.add("a", names[1:3], rows[1:3])
    out = np.full((4, 3), 7, dtype=np.float32)
    assert memory.fill("a", names, out, np.arange(4)).tolist() == [True, True, True, False]
    np.testing.assert_array_equal(out, np.concatenate([rows[:3], np.full((1, 3), 7, dtype=np.float32)]))


def resident(file: Path) -> int:
    """Bytes of a mapped file that count as this process's memory."""
    total, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        name, *rest = line.split()
        if not name.endswith(":"):
            inside = rest[-1:] == [str(file)]
        elif inside and name == "Rss:":
            total += 1024 * int(rest[0])
    return total


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="what is mapped is read from Linux's /proc")
@pytest.mark.parametrize(
    ("width", "n", "n_shelves", "limit"), [(4096, 512, 1, 2**20), (64, 20_000, 1, 2**20), (2048, 512, 4, 8 * 2**20)]
)
def test_what_was_read_does_not_pile_up_in_the_memory_of_the_process(
    width: int, n: int, n_shelves: int, limit: int, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setattr(environment, "MOST_MAPPED", limit)
    column, names = Column("some", width), digests(n)
    shelves = [Shelf.at(tmp_path / (f"{number:02}" * 16)) for number in range(n_shelves)]
    rows = RNG.normal(size=(n, width)).astype(np.float32)
    for shelf in shelves:
        shelf.put(names, {column: rows}, [(column,)])
        shelf.database.close()
    most = 0
    for start in range(0, 512, 32):
        for shelf in shelves:
            found, out = look_up(shelf, names[start : start + 32], column)
            assert found.all()
            np.testing.assert_array_equal(out, rows[start : start + 32])
        most = max(most, sum(resident(shelf.database.folder / "data.mdb") for shelf in shelves))
    assert most < 2 * limit + 2**20
    monkeypatch.setattr(environment, "MOST_MAPPED", 2**30)
    for start in range(0, 512, 32):
        for shelf in shelves:
            look_up(shelf, names[start : start + 32], column)
    open_all_along = sum(resident(shelf.database.folder / "data.mdb") for shelf in shelves)
    assert open_all_along > 2 * limit + 2**20


def test_what_another_thread_closes_in_between_is_opened_again(shelf: Shelf, monkeypatch) -> None:
    names, registered, closed = digests(3), environment._registered, list[object]()
    rows = put(shelf, names)

    def closing(database: Database) -> environment._Environment:
        found = registered(database)
        if not closed:
            closed.append(found.close_if_idle())
        return found

    monkeypatch.setattr(environment, "_registered", closing)
    found, out = look_up(shelf, names)
    assert closed == [True]
    assert found.all()
    np.testing.assert_array_equal(out, rows)


def test_map_that_has_to_grow_is_opened_again_where_it_was_closed(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(environment, "_MAP_SIZES", (2**16,))
    shelf, names = Shelf.at(tmp_path / ("ab" * 16)), digests(2000)
    closed, grow = list[object](), environment._Environment._resize

    def closing(self: environment._Environment, size) -> None:
        if not closed:
            closed.append(self.close_if_idle())
        grow(self, size)

    monkeypatch.setattr(environment._Environment, "_resize", closing)
    rows = put(shelf, names)
    assert closed == [True]
    np.testing.assert_array_equal(look_up(shelf, names)[1], rows)


def test_reader_inside_a_transaction_waits_for_no_fork(shelf: Shelf) -> None:
    """A fork holds the lock while it waits for transactions to end; one that claims images looks into another shelf."""
    names = digests(3)
    put(shelf, names)
    with ThreadPoolExecutor(1) as threads, environment._REGISTRY_LOCK:
        found = threads.submit(shelf.has, names, [COLUMN])
        wait([found], timeout=10)
        done = found.done()  # asked before the lock is free again
    assert done
    assert found.result() == [True] * 3


def test_closing_disturbs_no_thread(shelf: Shelf, monkeypatch) -> None:
    monkeypatch.setattr(environment, "MOST_MAPPED", 0)
    names = digests(200)
    rows = put(shelf, names)

    def read(number: int) -> None:
        order = np.random.default_rng(number).permutation(200)
        for _ in range(100):
            found, out = look_up(shelf, [names[i] for i in order])
            assert found.all()
            np.testing.assert_array_equal(out, rows[order])

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(read, range(4)))


def test_many_databases_do_not_stay_open_at_once(tmp_path: Path) -> None:
    from featx.store import environment

    for i in range(environment._MOST_OPEN + 5):
        Database(tmp_path / str(i), ("t",), durable=True).write(lambda txn, tables: txn.put(b"k", b"v", db=tables["t"]))
        assert len(environment._REGISTRY) <= environment._MOST_OPEN
    first = Database(tmp_path / "0", ("t",), durable=True)
    assert first.read(lambda txn, tables: bytes(txn.get(b"k", db=tables["t"]))) == b"v"
    assert os.path.exists(tmp_path / "0" / "data.mdb")

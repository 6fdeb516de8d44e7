"""A process on a system without what only Unix has: run by test_systems.py, with a folder and "bare" or "whole"."""

from __future__ import annotations

import builtins
import importlib
import io
import json
import os
import platform
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Some of them need what is taken away, but only while they are imported.
THIRD_PARTIES = """
    numpy PIL.Image torch torchvision.models torchvision.transforms.v2 sklearn.linear_model sklearn.model_selection
    sklearn.pipeline sklearn.preprocessing joblib lmdb xxhash tqdm.auto click safetensors.torch
    pyarrow.parquet pyarrow.dataset multiprocessing.pool concurrent.futures.thread tempfile shutil subprocess
"""
MODULES = ("fcntl", "resource", "pwd", "grp", "termios", "tty", "pty", "syslog", "posix")
NAMES = """
    fork forkpty register_at_fork posix_fallocate posix_fadvise posix_spawn posix_spawnp sched_getaffinity
    sched_setaffinity sched_yield getuid geteuid getgid getegid getgroups getpgid getsid setsid setuid uname
    getloadavg sysconf confstr pathconf statvfs fstatvfs chown fchown lchown fchmod mkfifo mknod nice
    getpriority pread pwrite preadv pwritev readv writev sendfile sync fdatasync pipe2 memfd_create getxattr
    setxattr listxattr killpg wait wait3 wait4 ctermid
"""
FOLDERS = ("/proc", "/sys", "/dev/shm")


def take_away() -> None:
    """Leave what every system has."""
    for name in MODULES:
        sys.modules[name] = None  # type: ignore[assignment]  # the import system's word for "there is none"
    for name in NAMES.split():
        if hasattr(os, name):
            delattr(os, name)
    for module in (builtins, io, os):
        for name in ("open", "stat", "lstat", "readlink", "listdir", "scandir", "access"):
            if hasattr(module, name) and callable(getattr(module, name)):
                setattr(module, name, _hiding(getattr(module, name)))
    os.link = os.symlink = _no_links
    platform._uname_cache = None  # type: ignore[attr-defined]


def _hiding(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function on files for which some folders are not there."""

    def wrapper(*args: Any, **given: Any) -> Any:
        path = args[0] if args else "."
        if isinstance(path, str | os.PathLike) and os.fspath(path).startswith(FOLDERS):
            if function.__name__ == "access":
                return False
            raise FileNotFoundError(2, "No such file or directory", os.fspath(path))
        return function(*args, **given)

    return wrapper


def _no_links(*_: Any, **__: Any) -> None:
    raise NotImplementedError("link: not on this system")


def hold_what_is_open() -> None:
    """Refuse to move, replace or delete a file that this process has open or mapped, as Windows does."""
    is_held = _holder()
    for name, places in {"replace": 2, "rename": 2, "unlink": 1, "remove": 1, "rmdir": 1}.items():
        setattr(os, name, _unless_held(getattr(os, name), places, is_held))


def _holder() -> Callable[[str], bool]:
    read, listed, link = open, os.listdir, os.readlink  # before they are taken away

    def held() -> set[str]:
        found = set()
        for number in listed("/proc/self/fd"):
            try:
                found.add(link(f"/proc/self/fd/{number}"))
            except OSError:  # the one that lists
                continue
        with read("/proc/self/maps") as maps:
            return found | {line.split(None, 5)[5].strip() for line in maps if line.count("/")}

    def is_held(path: str) -> bool:
        return any(file == path or file.startswith(f"{path}/") for file in held())

    return is_held


def _unless_held(function: Callable[..., Any], places: int, is_held: Callable[[str], bool]) -> Callable[..., Any]:
    def wrapper(*args: Any, **given: Any) -> Any:
        for path in args[:places]:
            if isinstance(path, str | os.PathLike) and is_held(os.path.realpath(os.fspath(path))):
                raise PermissionError(13, "The process cannot access the file because it is in use", os.fspath(path))
        return function(*args, **given)

    return wrapper


def run(*words: str) -> None:
    """A command, which must succeed."""
    from commands import runner

    from featx.cli.commands import featx

    result = runner().invoke(featx, [*words])
    assert result.exit_code == 0, (words, result.output, result.exception)


def main_path(folder: Path) -> dict[str, Any]:
    """What a user of photos does; figures that are the same on every system."""
    import numpy as np

    from featx import FeatureStore, FineTuneClassifier, PretrainedFeatureExtractor, load_image_folder

    photos = load_image_folder(folder / "photos")
    store = FeatureStore(folder / "store", max_size="1GB")
    extractor = PretrainedFeatureExtractor("featx_micro", image_size=16, cache=store)
    rows = extractor.transform(photos.data)
    tuned = FineTuneClassifier("featx_micro", image_size=16, freeze=-1, epochs=1, random_state=0, cache=store)
    proba = tuned.fit(photos.data, photos.target).predict_proba(photos.data)
    for _ in range(2):  # the second over the file that the first loaded is of
        tuned.save(folder / "tuned.safetensors")
        tuned = FineTuneClassifier.load(folder / "tuned.safetensors")
    assert np.array_equal(tuned.predict_proba(photos.data), proba)
    info, counts = store.info(), store.verify()
    store.prune("1MB")
    return {
        "files": [os.path.relpath(path, folder) for path in photos.data],
        "rows": rows.tolist(),
        "proba": proba.tolist(),
        **{name: info[name] for name in ("images", "recipes", "computed")},
        **counts,
        **commands(folder),
    }


def commands(folder: Path) -> dict[str, Any]:
    """The command line on the same photos."""
    import numpy as np

    photos, network = str(folder / "photos"), ["--backbone", "featx_micro", "--image-size", "16"]
    model, labels, array = (str(folder / name) for name in ("m.joblib", "labels.csv", "a.npy"))
    run("check", photos)
    run("fit", photos, "-o", model, *network, "--quick", "--folds", "2")
    run("fit", photos, "-o", model, *network, "--quick", "--folds", "2", "--no-cache")
    run("predict", model, photos, "-o", labels)
    for _ in range(2):
        run("extract", photos, "-o", array, *network)
    run("extract", photos, "-o", str(folder / "a.parquet"), *network)
    run("extract", photos, "-o", str(folder / "shards"), *network)
    run("cache", "info")
    told = Path(labels).read_text(encoding="utf-8").replace(str(folder), "")
    return {"labels": told, "array": np.load(array).tolist()}


if __name__ == "__main__":
    for third_party in THIRD_PARTIES.split():
        importlib.import_module(third_party)
    importlib.import_module("threadpoolctl").threadpool_info()  # which finds Linux's libc once, by os.uname
    if sys.argv[2] == "bare":
        hold_what_is_open()
        take_away()
    print(json.dumps(main_path(Path(sys.argv[1]))))

"""FeatureStore: feature rows on a local disk, each computed once."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from featx.exceptions import StoreError
from featx.store.environment import Damaged, Database, disk_bytes
from featx.store.files import FULL, Files, last_use
from featx.store.index import Index
from featx.store.memory import MEMORY
from featx.store.places import NoPlace, check_local, default_folder, full_path, parse_size
from featx.store.shelf import Shelf
from featx.system.writing import is_linked

#: Version of the layout on disk. Another version has a folder of its own beside this one.
SCHEMA = "v1"
_KEEP = ("stages", "blocks", "asked")
# What is left of the rows that were too many, so that making room is rare.
_LEFT = 0.8
_DROPPED_AT_ONCE = 1000
_GRAVE = "featx-trash-"
_DRAFT_S = 3600


class FeatureStore:
    """Features that were computed once, on a local disk, for all processes of this machine.

    Parameters
    ----------
    path : str or path
        Folder of the store, made (mode 0700) when something is first kept. It must lie on a local disk. Deleting it
        at any time is safe.
    max_size : str or int, default="20GB"
        Most space on disk, in bytes or with a unit (``"500MB"``, ``"2GiB"``). When it is reached, the recipes used
        longest ago make room, then images used longest ago.
    keep : {"stages", "blocks", "asked"}, default="stages"
        What one pass of an image keeps beside what was asked for: the penultimate layer and every stage, or every
        trunk block too, each in avg, max and gem pooling and, where there is one, its class token; or nothing. More
        takes more disk and saves later passes.

    Raises
    ------
    ValueError
        A parameter is wrong. A folder on a network file system raises :class:`featx.exceptions.StoreError` when it is
        first used.

    Notes
    -----
    A *recipe* is everything beside the image that decides its features: network, weights, preprocessing, precision,
    decoder. Images are known by their content, so a file that was copied, moved or touched is found again, and one that
    was edited is computed anew. Whatever goes wrong with the disk, or where this user has no home folder for
    ``cache=True``, features stay right: they are computed, and one warning says why they are not kept.

    Examples
    --------
    >>> import tempfile
    >>> from sklearn.datasets import load_digits
    >>> from featx import FeatureStore, PretrainedFeatureExtractor
    >>> X = load_digits().images[:50]
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     store = FeatureStore(folder, max_size="1GB")
    ...     extractor = PretrainedFeatureExtractor("featx_micro", pixel_range=(0, 16), cache=store)
    ...     for layer in (0, 1, 2, "penultimate"):
    ...         _ = extractor.set_params(layers=layer).transform(X)
    ...     store.info()["computed"]
    50
    """

    def __init__(self, path: str | os.PathLike[str], *, max_size: str | int = "20GB", keep: str = "stages") -> None:
        if not isinstance(path, str | os.PathLike):
            raise ValueError(f"The path of a folder is expected, got path={path!r}.")
        if keep not in _KEEP:
            raise ValueError(f"keep is expected to be one of {', '.join(map(repr, _KEEP))}, got keep={keep!r}.")
        parse_size(max_size)
        self.path = os.fspath(path)
        self.max_size = max_size
        self.keep = keep

    def __repr__(self) -> str:
        return f"FeatureStore({self.path!r}, max_size={self.max_size!r}, keep={self.keep!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, FeatureStore) and vars(self) == vars(other)

    def __hash__(self) -> int:
        return hash((self.path, self.max_size, self.keep))

    def info(self) -> dict[str, Any]:
        """Figures of what there is.

        Returns
        -------
        info : dict
            ``images`` (different ones with features), ``recipes``, ``computed`` (images ever sent through a network
            for this store, by all processes), ``live_bytes`` (rows in use), ``file_bytes`` (on disk), ``graphs``
            (files of exported networks, and of where they were tried), and ``by_recipe``, a list of dicts with
            ``recipe``, ``images`` and ``live_bytes``.
        """
        opened = self._existing()
        shelves = [] if opened is None else list(opened.shelves())
        by_recipe = [_figures(shelf) for shelf in shelves]
        several = sum(row["images"] > 0 for row in by_recipe) > 1
        different = {digest for shelf in shelves for digest in _digests(shelf)} if several else ()
        return {
            "images": len(different) if several else sum(row["images"] for row in by_recipe),
            "recipes": len(shelves),
            "computed": 0 if opened is None else opened.computed(),
            "live_bytes": sum(row["live_bytes"] for row in by_recipe),
            "file_bytes": 0 if opened is None else disk_bytes(opened.root),
            "graphs": 0 if opened is None else len(opened.files),
            "by_recipe": by_recipe,
        }

    def prune(self, max_size: str | int | None = None) -> int:
        """Free disk until the store takes no more than a size, also while others use it.

        Parameters
        ----------
        max_size : str, int or None, default=None
            As in the constructor, which None refers to.

        Returns
        -------
        freed : int
            Bytes on disk.

        Raises
        ------
        StoreError
            The folder cannot be written to.
        """
        size = parse_size(self.max_size if max_size is None else max_size)
        opened = self._existing()
        if opened is None:
            return 0
        before = disk_bytes(opened.root)
        opened.empty_trash()
        opened.files.shrink_store(size)
        opened.drop_recipes(size, spare=next(reversed(list(opened.shelves())), None))
        for shelf in opened.shelves():
            if disk_bytes(opened.root) > size:
                opened.shrink(shelf, size - disk_bytes(opened.root) + shelf.database.file_bytes())
        opened.drop_recipes(size)
        opened.tidy_index(size)
        return max(0, before - disk_bytes(opened.root))

    def clear(self) -> None:
        """Delete all features, those of other versions of the layout too, and nothing else that lies in the folder."""
        for folder in self._root.glob("v*"):
            if re.fullmatch(r"v\d+", folder.name) and (folder / "seed").exists():
                _Opened(folder, 0).close()
                with contextlib.suppress(FileNotFoundError):
                    folder.rename(self._root / f"{_GRAVE}{uuid.uuid4().hex}")
        for grave in self._root.glob(f"{_GRAVE}*"):
            shutil.rmtree(grave, ignore_errors=True)
        MEMORY.clear()

    def verify(self) -> dict[str, int]:
        """Read every record and delete those that are not as they were written.

        Returns
        -------
        counts : dict
            ``records`` that were read, ``wrong`` ones, and ``damaged`` recipes, which could not be read at all.
        """
        counts = {"records": 0, "wrong": 0, "damaged": 0}
        opened = self._existing()
        for shelf in opened.shelves() if opened is not None else ():
            try:
                records, wrong = shelf.check()
            except Damaged:
                opened.discard(shelf.database)  # type: ignore[union-attr]
                counts["damaged"] += 1
                continue
            counts["records"] += records
            counts["wrong"] += len(wrong)
            if wrong:
                shelf.drop(wrong)
        n_files, n_wrong = (0, 0) if opened is None else opened.files.check()
        counts["records"] += n_files
        counts["wrong"] += n_wrong
        return counts

    @property
    def _root(self) -> Path:
        return full_path(self.path)

    def _existing(self) -> _Opened | None:
        seed = self._root / SCHEMA / "seed"
        try:
            return self._open() if seed.exists() else None
        except PermissionError as error:
            raise StoreError(f"{self._root} cannot be used: {error}") from error

    def _open(self) -> _Opened:
        """The store, made where it is missing.

        Raises
        ------
        StoreError
            It would lie on a network file system, or cannot be made or read.
        """
        root = self._root
        folder = root / SCHEMA
        check_local(root)
        with contextlib.suppress(OSError, ValueError):  # the usual case, without asking the disk for more
            if (folder / "trash").is_dir():
                return _Opened(folder, int((folder / "seed").read_text(), 16))
        try:
            foreign = folder.is_dir() and any(not path.name.startswith("draft-") for path in folder.iterdir())
            if foreign and not (folder / "seed").exists():  # the seed comes before all else
                raise StoreError(f"{folder} is there and holds something else. Take another folder")
            root.mkdir(mode=0o700, parents=True, exist_ok=True)
            folder.mkdir(mode=0o700, exist_ok=True)
            seed = _seed(folder / "seed")
            for room in ("recipes", "trash"):
                (folder / room).mkdir(mode=0o700, exist_ok=True)
        except StoreError:
            raise
        except (OSError, ValueError) as error:
            raise StoreError(f"{root} cannot be used: {error}") from error
        return _Opened(folder, seed)


def why_unusable(store: FeatureStore) -> str | None:
    """Why nothing can be kept in a store; None where it can be written to now, and is made for it if need be."""
    try:
        store._open().index.database.write(lambda *_: None)
    except NoPlace as error:
        return error.reason
    except StoreError as error:
        return str(error)
    return None


def resolve_store(cache: object) -> FeatureStore | None:
    """What a user's ``cache`` stands for: None, True, a path or a store."""
    if cache is None or isinstance(cache, FeatureStore):
        return cache
    return FeatureStore(default_folder() if cache is True else cache)  # type: ignore[arg-type]


@dataclass(frozen=True)
class _Opened:
    """A store's folders.

    Parameters
    ----------
    root : Path
        The folder of this version's layout.
    seed : int
        Of all digests in it.
    """

    root: Path
    seed: int

    @property
    def index(self) -> Index:
        return Index.at(self.root / "index", self.seed)

    @property
    def files(self) -> Files:
        return Files(self.root / "files")

    def shelf(self, recipe: bytes) -> Shelf:
        return Shelf.at(self.root / "recipes" / recipe.hex())

    def shelves(self) -> Iterator[Shelf]:
        """Every recipe's shelf, least recently used first; damaged ones too."""
        folders = [path for path in (self.root / "recipes").glob("*") if re.fullmatch(r"[0-9a-f]{32}", path.name)]
        for folder in sorted(folders, key=last_use):
            yield Shelf.at(folder)

    def computed(self) -> int:
        """Images that went through a network, as far as the index knows."""
        with contextlib.suppress(StoreError):
            return self.index.computed()
        return 0

    def make_room(self, shelf: Shelf, size: int, incoming: int) -> None:
        """Make sure that ``incoming`` more bytes of one shelf leave the store within ``size``.

        Raises
        ------
        StoreError
            They cannot.
        """
        if disk_bytes(self.root) + incoming <= size * FULL:
            return
        self.files.shrink_store(int(size * FULL) - incoming)
        self.drop_recipes(int(size * FULL) - incoming, spare=shelf)
        room = size - (disk_bytes(self.root) - shelf.database.file_bytes())
        if incoming > room / 2:
            raise StoreError(f"max_size={size} bytes leave no room for {incoming} more")
        if shelf.database.live_bytes() + incoming > room * FULL:
            self._drop_rows(shelf, int(room * FULL * _LEFT) - incoming)

    def drop_recipes(self, size: int, spare: Shelf | None = None) -> None:
        """Delete recipes other than ``spare``, least recently used first, until the store fits."""
        for shelf in list(self.shelves()):
            if disk_bytes(self.root) <= size:
                return
            if shelf != spare:
                self.discard(shelf.database)

    def shrink(self, shelf: Shelf, size: int) -> None:
        """Drop rows, least recently used first, and write the rest into a smaller file; all where that fails."""
        draft = self.root / f"draft-{uuid.uuid4().hex}"
        try:
            self._drop_rows(shelf, int(size * _LEFT))
            draft.mkdir(mode=0o700)
            shelf.database.compact(draft)
        except (StoreError, OSError):  # a full disk has no room for the copy
            shutil.rmtree(draft, ignore_errors=True)
            self.discard(shelf.database)
            return
        # What others wrote since the copy goes with the old file, and is computed again when it is asked for.
        self._bury(shelf.database)
        try:
            draft.rename(shelf.database.folder)
        except OSError:  # somebody began anew meanwhile: theirs stays
            shutil.rmtree(draft, ignore_errors=True)
        self.empty_trash()

    def tidy_index(self, size: int) -> None:
        """Forget leases of processes that are gone, and all shortcuts where the store is still too large."""
        self.index.sweep()
        if disk_bytes(self.root) > size:
            computed = self.computed()
            self.discard(self.index.database)
            with contextlib.suppress(StoreError):
                self.index.count(computed)

    def discard(self, database: Database) -> None:
        """Delete a database, whoever has it open.

        Raises
        ------
        StoreError
            The folder cannot be written to.
        """
        self._bury(database)
        self.empty_trash()

    def empty_trash(self) -> None:
        """Delete what was moved out of the way, and what a process that ended left half-made."""
        for grave in (self.root / "trash").glob("*"):
            shutil.rmtree(grave, ignore_errors=True)
        for draft in [path for path in self.root.glob("draft-*") if time.time() - last_use(path) > _DRAFT_S]:
            shutil.rmtree(draft, ignore_errors=True)

    def close(self) -> None:
        """Close all databases in this process."""
        self.index.database.close()
        for shelf in self.shelves():
            shelf.database.close()

    def _bury(self, database: Database) -> None:
        database.close()  # some systems rename no folder with open files
        try:  # renamed and then deleted: whoever opens it meanwhile finds all of it or nothing
            database.folder.rename(self.root / "trash" / uuid.uuid4().hex)
        except FileNotFoundError:
            return
        except OSError as error:
            raise StoreError(f"{database.folder} cannot be removed: {error}") from error

    def _drop_rows(self, shelf: Shelf, live: int) -> None:
        digests = shelf.digests() if shelf.database.live_bytes() > live else []
        while digests and shelf.database.live_bytes() > live:
            share = 1 - live / shelf.database.live_bytes()
            n = min(len(digests), max(1, round(share * len(digests))), _DROPPED_AT_ONCE)
            shelf.drop(digests[:n])
            digests = digests[n:]


def _figures(shelf: Shelf) -> dict[str, Any]:
    try:
        return {
            "recipe": shelf.description(),
            "images": shelf.n_images(),
            "live_bytes": shelf.database.live_bytes(),
        }
    except StoreError as error:
        return {"recipe": f"unreadable: {error}", "images": 0, "live_bytes": 0}


def _digests(shelf: Shelf) -> list[bytes]:
    with contextlib.suppress(StoreError):
        return shelf.digests()
    return []


def _seed(file: Path) -> int:
    """The number in a file, drawn by whoever comes first; drawn anew where the file was damaged.

    Digests depend on it: two pictures that share one in some store do so in no other.
    """
    for _ in range(3):
        is_damaged = False
        try:
            return int(file.read_text(), 16)
        except FileNotFoundError:
            pass  # and whoever makes it first is right
        except ValueError:
            is_damaged = True
        draft = file.with_name(f"draft-{uuid.uuid4().hex}")
        try:
            _write_to_disk(draft, secrets.token_hex(8))
            # A link and no rename: whoever comes second must not change what the first has begun to use. Where the disk
            # knows no links, two that begin a store at the same instant may do so: the first then misses its own rows.
            if is_damaged or not is_linked(draft, file):
                draft.replace(file)
        finally:
            draft.unlink(missing_ok=True)
    raise ValueError(f"{file} holds no number")


def _write_to_disk(file: Path, text: str) -> None:
    with file.open("w") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())

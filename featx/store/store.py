"""FeatureStore: feature rows on a local disk, each computed once."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from featx.exceptions import StoreError
from featx.store.environment import Damaged, Database, disk_bytes
from featx.store.index import Index
from featx.store.memory import MEMORY
from featx.store.places import check_local, default_folder, parse_size
from featx.store.shelf import Shelf

#: Version of the layout on disk. Another version has a folder of its own beside this one.
SCHEMA = "v1"
_KEEP = ("stages", "blocks", "asked")
# Rows in use may fill this share of max_size, since a commit needs free pages beside the ones that it replaces; and
# this share of it is left when they do, so that making room is rare.
_FULL, _LEFT = 0.75, 0.8
_DROPPED_AT_ONCE = 1000


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
        trunk block too, each in avg, max and gem pooling; or nothing. More takes more disk and saves later passes.

    Raises
    ------
    ValueError
        A parameter is wrong. A folder on a network file system raises :class:`featx.exceptions.StoreError` when it is
        first used.

    Notes
    -----
    A *recipe* is everything beside the image that decides its features: network, weights, preprocessing, precision,
    decoder. Images are known by their content, so a file that was copied, moved or touched is found again, and one that
    was edited is computed anew. Whatever goes wrong with the disk, features stay right: they are computed, and one
    warning says why they are not kept.

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
            for this store, by all processes), ``live_bytes`` (rows in use), ``file_bytes`` (on disk), and
            ``by_recipe``, a list of dicts with ``recipe``, ``images``, ``computed`` and ``live_bytes``.
        """
        opened = self._existing()
        shelves = [] if opened is None else list(opened.shelves())
        by_recipe = [_figures(shelf) for shelf in shelves]
        images = {digest for shelf in shelves for digest in shelf.digests()} if len(shelves) > 1 else ()
        before = 0 if opened is None else opened.computed_before()
        return {
            "images": len(images) if len(shelves) > 1 else sum(row["images"] for row in by_recipe),
            "recipes": len(shelves),
            "computed": before + sum(row["computed"] for row in by_recipe),
            "live_bytes": sum(row["live_bytes"] for row in by_recipe),
            "file_bytes": 0 if opened is None else disk_bytes(opened.root),
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
        """
        size = parse_size(self.max_size if max_size is None else max_size)
        opened = self._existing()
        if opened is None:
            return 0
        before = disk_bytes(opened.root)
        opened.empty_trash()
        opened.index.sweep()
        opened.drop_recipes(size, spare=1)
        for shelf in opened.shelves():
            if disk_bytes(opened.root) > size:
                opened.shrink(shelf, size - disk_bytes(opened.root) + shelf.database.file_bytes())
        opened.drop_recipes(size)
        if disk_bytes(opened.root) > size:
            opened.discard(opened.index.database)
        opened.empty_trash()
        return max(0, before - disk_bytes(opened.root))

    def clear(self) -> None:
        """Delete all features, those of other versions of the layout too."""
        root = Path(self.path)
        for folder in root.glob("v[0-9]*"):
            _Opened(folder, 0).close()
            grave = root / f"trash-{uuid.uuid4().hex}"
            with contextlib.suppress(FileNotFoundError):
                folder.rename(grave)
        for grave in root.glob("trash-*"):
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
        return counts

    def _existing(self) -> _Opened | None:
        return self._open() if (Path(self.path) / SCHEMA / "seed").exists() else None

    def _open(self) -> _Opened:
        """The store, made where it is missing.

        Raises
        ------
        StoreError
            It would lie on a network file system.
        StoreError
            It cannot be made or read.
        """
        root = Path(self.path).absolute()
        check_local(root)
        try:
            root.mkdir(mode=0o700, parents=True, exist_ok=True)
            for folder in (root / SCHEMA, root / SCHEMA / "recipes", root / SCHEMA / "trash"):
                folder.mkdir(mode=0o700, exist_ok=True)
            return _Opened(root / SCHEMA, _seed(root / SCHEMA / "seed"))
        except (OSError, ValueError) as error:
            raise StoreError(f"{root} cannot be used: {error}") from error


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

    def shelf(self, recipe: bytes) -> Shelf:
        return Shelf.at(self.root / "recipes" / recipe.hex())

    def shelves(self) -> Iterator[Shelf]:
        """Every recipe's shelf, least recently used first; damaged ones too."""
        for folder in sorted((self.root / "recipes").iterdir(), key=_last_use):
            yield Shelf.at(folder)

    def make_room(self, shelf: Shelf, size: int, incoming: int) -> None:
        """Make sure that ``incoming`` more bytes of one shelf leave the store within ``size``.

        Raises
        ------
        StoreError
            They cannot.
        """
        if disk_bytes(self.root) + incoming <= size * _FULL:
            return
        self.drop_recipes(int(size * _FULL) - incoming, spare=1)
        room = size - (disk_bytes(self.root) - shelf.database.file_bytes())
        if incoming > room * (1 - _FULL):
            raise StoreError(f"max_size={size} bytes leave no room for {incoming} more")
        if shelf.database.live_bytes() + incoming > room * _FULL:
            self._drop_rows(shelf, int(room * _FULL * _LEFT) - incoming)

    def drop_recipes(self, size: int, spare: int = 0) -> None:
        """Delete recipes, least recently used first, until the store fits or ``spare`` are left."""
        shelves = list(self.shelves())
        for shelf in shelves[: len(shelves) - spare]:
            if disk_bytes(self.root) <= size:
                return
            self.discard(shelf.database)

    def shrink(self, shelf: Shelf, size: int) -> None:
        """Drop rows, least recently used first, and write the rest into a smaller file."""
        self._drop_rows(shelf, int(size * _LEFT))
        fresh = self.root / "trash" / uuid.uuid4().hex
        fresh.mkdir(mode=0o700)
        shelf.database.compact(fresh)
        self._bury(shelf.database)
        with contextlib.suppress(OSError):  # somebody began anew meanwhile: theirs stays
            fresh.rename(shelf.database.folder)
        self.empty_trash()

    def discard(self, database: Database) -> None:
        """Delete a database, whoever has it open."""
        with contextlib.suppress(StoreError):
            if database.folder.parent.name == "recipes":
                self._count_before(Shelf.at(database.folder).computed())
        self._bury(database)
        self.empty_trash()

    def empty_trash(self) -> None:
        """Delete what was moved out of the way."""
        for grave in (self.root / "trash").glob("*"):
            shutil.rmtree(grave, ignore_errors=True)

    def computed_before(self) -> int:
        """Images computed for recipes that are deleted."""
        with contextlib.suppress(OSError, ValueError):
            return int((self.root / "computed").read_text())
        return 0

    def close(self) -> None:
        """Close all databases in this process."""
        self.index.database.close()
        with contextlib.suppress(OSError):
            for shelf in self.shelves():
                shelf.database.close()

    def _count_before(self, computed: int) -> None:
        draft = self.root / f"computed-{uuid.uuid4().hex}"
        draft.write_text(str(self.computed_before() + computed))
        draft.replace(self.root / "computed")

    def _bury(self, database: Database) -> None:
        database.close()
        with contextlib.suppress(FileNotFoundError):
            database.folder.rename(self.root / "trash" / uuid.uuid4().hex)

    def _drop_rows(self, shelf: Shelf, live: int) -> None:
        digests = shelf.digests()
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
            "computed": shelf.computed(),
            "live_bytes": shelf.database.live_bytes(),
        }
    except StoreError as error:
        return {"recipe": f"unreadable: {error}", "images": 0, "computed": 0, "live_bytes": 0}


def _last_use(folder: Path) -> float:
    with contextlib.suppress(OSError):
        return folder.stat().st_mtime
    return 0.0


def _seed(file: Path) -> int:
    """The number in a file, drawn by whoever comes first."""
    if not file.exists():
        draft = file.with_name(f"seed-{uuid.uuid4().hex}")
        draft.write_text(secrets.token_hex(8))
        with contextlib.suppress(FileExistsError):
            os.link(draft, file)
        draft.unlink()
    return int(file.read_text(), 16)

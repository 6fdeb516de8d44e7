"""Items cut into shards, each of which has a name that says what belongs into it; and the manifest beside them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import xxhash

from featx._version import __version__
from featx.distributed.folder import Folder

MANIFEST = "manifest.json"
_FORMAT = 2
_PARQUET = b"PAR1"  # what a Parquet file begins and ends with


class OtherShards(ValueError):
    """The output holds shards of another recipe, or of other items."""


def is_shard(name: str) -> bool:
    """Whether a file of an output is a shard."""
    return name.startswith("part-") and name.endswith(".parquet")


@dataclass(frozen=True)
class Shard:
    """Some consecutive items, and the file for their features.

    Attributes
    ----------
    name : str
        ``part-`` with its number and a digest of recipe and items.
    start, stop : int
        Positions in the list of items.
    """

    name: str
    start: int
    stop: int


@dataclass(frozen=True)
class Manifest:
    """What all shards of an output have in common.

    Attributes
    ----------
    recipe : str
        Everything that can change a feature, in words.
    columns : list of str
        Names of the features.
    shard_size : int
    n_items : int
    items : str
        Digest of the items in their order.
    engine : str
        What computes them, which is written down for later runs.
    """

    recipe: str
    columns: list[str]
    shard_size: int
    n_items: int
    items: str
    engine: str

    @classmethod
    def of(cls, recipe: str, columns: list[str], shard_size: int, items: Sequence[str], engine: str) -> Manifest:
        """The manifest of some items."""
        hasher = xxhash.xxh3_128()
        for item in items:
            hasher.update(f"{item}\0".encode("utf-8", "surrogatepass"))
        return cls(recipe, columns, shard_size, len(items), hasher.hexdigest(), engine)

    @property
    def key(self) -> str:
        """Digest of the recipe."""
        return xxhash.xxh3_128_hexdigest(self.recipe.encode())

    def shards(self, items: Sequence[str]) -> Iterator[Shard]:
        """The items in order, cut."""
        for number, start in enumerate(range(0, len(items), self.shard_size)):
            part = items[start : start + self.shard_size]
            digest = xxhash.xxh3_64_hexdigest("\0".join([self.key, *part]).encode("utf-8", "surrogatepass"))
            yield Shard(f"part-{number:06}-{digest}.parquet", start, start + len(part))

    def settle(self, folder: Folder, shards: Sequence[Shard]) -> set[str]:
        """Write the manifest, or check that the one there says the same; names of the shards that are there and whole.

        Raises
        ------
        OtherShards
        """
        folder.sweep()
        sizes = folder.sizes()
        there = {name: size for name, size in sorted(sizes.items()) if is_shard(name)}
        found = _parsed(folder.read(MANIFEST)) if MANIFEST in sizes else None
        if found is not None:
            self._check(found, folder)
        check_no_others(set(there), shards, folder)
        if found is None:
            write = folder.write if MANIFEST in sizes else folder.create  # a damaged one says nothing; shards' names do
            write(MANIFEST, json.dumps(self._as_dict(), indent=1).encode())
            self._check(_parsed(folder.read(MANIFEST)) or {}, folder)  # a run that began meanwhile may have written it
        return _whole(there, folder)

    def _as_dict(self) -> dict[str, Any]:
        return {"format": _FORMAT, "featx": __version__, "key": self.key, **asdict(self)}

    def _check(self, found: dict[str, Any], folder: Folder) -> None:
        if found.get("format") != _FORMAT:
            raise OtherShards(
                f"Shards of format {_FORMAT} are expected in {folder.url!r}, got format {found.get('format')!r}, which "
                f"featx {found.get('featx')} wrote. Take another folder."
            )
        if found.get("key") != self.key:
            raise OtherShards(
                f"Shards of one recipe are expected in {folder.url!r}, which was begun with another one. Take another "
                f"folder.\n  there: {found.get('recipe')}\n  asked: {self.recipe}"
            )
        same = [found["n_items"], found["shard_size"]] == [self.n_items, self.shard_size]
        if not same or found.get("items", self.items) != self.items:
            raise OtherShards(
                f"The same items as before are expected in {folder.url!r}: {found['n_items']} in shards of "
                f"{found['shard_size']}, got {self.n_items}{' others' * same} in shards of {self.shard_size}. Take "
                "another folder for other items, or for another order."
            )
        if (engine := _engine_of(found)) != self.engine:
            raise OtherShards(
                f"Shards that one engine computes are expected in {folder.url!r}, which was begun with "
                f"engine={engine!r}, got engine={self.engine!r}. Set engine={engine!r}, or take another folder."
            )


def engine_there(folder: Folder) -> str | None:
    """The engine that an output was begun with; None where it was not begun."""
    found = _parsed(folder.read(MANIFEST)) if MANIFEST in folder.sizes() else None
    return None if found is None else _engine_of(found)


def _engine_of(found: Mapping[str, Any]) -> str:
    return str(found.get("engine", "torch"))  # the only one there was before it was written down


def _whole(sizes: Mapping[str, int], folder: Folder) -> set[str]:
    """Shards that end as Parquet files do: whoever cut or blanked one, it is computed again."""
    sizes = {name: size for name, size in sizes.items() if size > len(_PARQUET)}
    endings = folder.endings(sizes, len(_PARQUET)) if sizes else []
    return {name for name, ending in zip(sizes, endings, strict=True) if ending == _PARQUET}


def _parsed(content: bytes) -> dict[str, Any] | None:
    """A manifest; None where it was cut or blanked."""
    try:
        found = json.loads(content)
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


def check_no_others(there: set[str], shards: Sequence[Shard], folder: Folder) -> None:
    """Raise where an output holds other shards too.

    Raises
    ------
    OtherShards
    """
    if strange := there - {shard.name for shard in shards}:
        raise OtherShards(
            f"No shards but those of these items are expected in {folder.url!r}, got {len(strange)} others, such as "
            f"{min(strange)!r}. Take another folder, or the same items in the same order."
        )

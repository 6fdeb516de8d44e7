"""Items as they are, for whoever does something beside when one is read."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from featx.images.reading import Content, Reading
from featx.images.sources import Items

if TYPE_CHECKING:
    import torch


class WatchedItems(Items):
    """The same items in the same order; of every file that is read, somebody is told what was in it.

    What is told comes from the very bytes that pixels or a digest are made of, so that nothing is read for it alone.

    Parameters
    ----------
    items : Items
    seed : int
        Of the digests that are told.
    note : callable (int, Content) -> object
        Told the position and the content, in whatever thread.
    """

    def __init__(self, items: Items, seed: int, note: Callable[[int, Content], object]) -> None:
        self._items, self._seed, self._note = items, seed, note

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index: Any) -> Any:
        if not isinstance(index, slice):
            return self._items[index]
        rows, note = range(len(self))[index], self._note
        return WatchedItems(self._items[index], self._seed, lambda row, content: note(rows[row], content))

    @property
    def is_keyed(self) -> bool:
        """As of the items."""
        return self._items.is_keyed

    @property
    def reading(self) -> Reading:
        """As of the items."""
        return self._items.reading

    @property
    def short_side(self) -> int | None:
        """As of the items."""
        return self._items.short_side

    def load(self, row: int) -> torch.Tensor:
        """Pixels of one item."""
        return self.load_with_contents(row)[0]

    def load_with_contents(self, row: int, *seeds: int) -> tuple[torch.Tensor, tuple[Content, ...]]:
        """Pixels of one item, and what the file holds that they are in."""
        pixels, contents = self._items.load_with_contents(row, *seeds, self._seed)
        for content in contents[-1:]:
            self._note(row, content)
        return pixels, contents[:-1]

    def digest(self, row: int, seed: int = 0) -> bytes:
        """Digest of one item."""
        return self.reading.digest_of(*self.contents(row, seed))

    def contents(self, row: int, *seeds: int) -> tuple[Content, ...]:
        """What one item holds, under each seed."""
        *contents, content = self._items.contents(row, *seeds, self._seed)
        self._note(row, content)
        return tuple(contents)

    def iter_paths(self) -> Iterator[str | None]:
        """As of the items."""
        return self._items.iter_paths()

    def original_row(self, row: int) -> int:
        """As of the items."""
        return self._items.original_row(row)

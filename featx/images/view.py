"""Items as they are, for a class that does something beside when one is loaded."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from featx.images.sources import Items


class ItemsView(Items):
    """The same items in the same order; a subclass has its own ``load``.

    Parameters
    ----------
    items : Items
    """

    def __init__(self, items: Items) -> None:
        self._items = items

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index: Any) -> Any:
        return self._items[index]

    @property
    def is_keyed(self) -> bool:
        """As of the items."""
        return self._items.is_keyed

    @property
    def short_side(self) -> int | None:
        """As of the items."""
        return self._items.short_side

    def iter_paths(self) -> Iterator[str | None]:
        """As of the items."""
        return self._items.iter_paths()

    def original_row(self, row: int) -> int:
        """As of the items."""
        return self._items.original_row(row)

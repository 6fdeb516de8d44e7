"""From whatever X is to pictures: sources, items, decoding and folders."""

from __future__ import annotations

from featx.images.folder import load_image_folder
from featx.images.items import Item
from featx.images.sources import Items, as_items
from featx.images.unreadable import find_unreadable

__all__ = ["Item", "Items", "as_items", "find_unreadable", "load_image_folder"]

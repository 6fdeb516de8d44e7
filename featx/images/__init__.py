"""From whatever X is to pictures: sources, items, decoding and folders.

In comes what a user calls images: paths, bytes, open files, Pillow images, arrays, columns, folders. Out come
items, each with a digest of its content, and on demand batches of decoded, upright, resized tiles. Nothing here
knows of networks, and nothing is read before it is asked for.

Open ``sources.py`` first (X as a sequence of items), then ``elements.py`` (what X may be) and ``items.py`` (one
row). One picture goes on through ``opening.py`` (its header), ``decoding.py`` (its pixels; ``samples.py`` where
they have more than 8 bits) and ``preprocessing.py`` to ``loading.py``, which has threads decode ahead of the
network. ``reading.py`` says what a digest must tell beside the bytes. Folders are ``walk.py`` (the one walk),
``classes.py`` and ``folder.py``.

Laws of CONTRIBUTING.md that live here: of 1 that a picture is the same in every batch and thread, and of 7 that its
digest tells everything that its pixels depend on. Nothing is left out in silence: ``walk.py`` counts what is no
picture.
"""

from __future__ import annotations

from featx.images.folder import load_image_folder
from featx.images.items import Item
from featx.images.sources import Items, as_items
from featx.images.unreadable import find_unreadable

__all__ = ["Item", "Items", "as_items", "find_unreadable", "load_image_folder"]

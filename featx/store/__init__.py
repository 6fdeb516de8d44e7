"""Rows computed once and kept: keys, the LMDB store, who computes what.

In come digests of images, the description of a recipe (everything beside the image that decides its features), and
columns to read. Out come the rows that are known, claims on those that nobody computes yet, and at the end a place
for what was computed. Nothing here knows of networks: whoever asks computes.

Open ``session.py`` first: a store as one call sees it, which whatever trouble the disk makes cannot stop. Below it
lie ``store.py`` (FeatureStore; folders, room and what is thrown away), ``shelf.py`` (the bytes of one recipe's
rows), ``index.py`` (digests of known files, and leases; ``owners.py`` tells who is still alive) and
``environment.py`` (LMDB, forks, full and damaged disks); ``files.py`` holds exported networks as whole files.
``memory.py`` lies in front of the disk; ``places.py`` says where a store may lie,
and ``passing.py`` makes one that goes with its task.

Law 7 of CONTRIBUTING.md lives here: no row is served that another image, recipe or state of a file gave; what
cannot be read is computed, what cannot be kept is told once. Processes that miss together share the work, and one
that is killed at any moment leaves nothing wrong behind: ``benchmarks/stress_store.py`` kills them. What only some
systems have may be used here and in ``featx/system``, and must be done without where it is missing.
"""

from __future__ import annotations

from featx.store.passing import passing_store
from featx.store.session import KEPT, MOST_ROWS, Session, rows_in_memory, warn_once
from featx.store.shelf import Column
from featx.store.store import FeatureStore, resolve_store, why_unusable

__all__ = [
    "KEPT",
    "MOST_ROWS",
    "Column",
    "FeatureStore",
    "Session",
    "passing_store",
    "resolve_store",
    "rows_in_memory",
    "warn_once",
    "why_unusable",
]

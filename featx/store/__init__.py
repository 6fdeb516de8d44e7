"""Rows computed once and kept: keys, the LMDB store, who computes what."""

from __future__ import annotations

from featx.store.session import KEPT, MOST_ROWS, Session, rows_in_memory, warn_once
from featx.store.shelf import Column
from featx.store.store import FeatureStore, resolve_store, why_unusable

__all__ = [
    "KEPT",
    "MOST_ROWS",
    "Column",
    "FeatureStore",
    "Session",
    "resolve_store",
    "rows_in_memory",
    "warn_once",
    "why_unusable",
]

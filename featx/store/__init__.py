"""Rows computed once and kept: keys, the LMDB store, who computes what."""

from __future__ import annotations

from featx.store.session import Session, warn_once
from featx.store.shelf import Column
from featx.store.store import FeatureStore, resolve_store

__all__ = ["Column", "FeatureStore", "Session", "resolve_store", "warn_once"]

"""Stores that last as long as a task, for those who keep none."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from featx.store.store import FeatureStore, why_unusable
from featx.system.temporary import FOLDERS


@contextmanager
def passing_store() -> Iterator[FeatureStore]:
    """A store in a folder that is gone afterwards, so that an image passes a network once meanwhile."""
    folder = _made_on_local_disk()
    try:
        yield FeatureStore(folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _made_on_local_disk() -> str:
    """A new folder where a store can lie; where there is none, one that cannot be made, of which the store tells."""
    for parent in FOLDERS:
        with suppress(OSError):
            folder = tempfile.mkdtemp(prefix="featx-", dir=parent)
            if why_unusable(FeatureStore(folder)) is None:
                return folder
            shutil.rmtree(folder, ignore_errors=True)
    return os.path.join(os.devnull, "featx")

"""Who called featx, for warnings that name the line."""

from __future__ import annotations

import sys

_INSIDE = ("featx", "sklearn", "contextlib", "joblib")


def frames_to_caller() -> int:
    """How far up the first frame outside featx, scikit-learn and the standard library's wrappers is.

    Returns
    -------
    int
        A ``stacklevel`` for a warning of the function that asks.
    """
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_globals.get("__name__", "").split(".")[0] in _INSIDE:
        frame, level = frame.f_back, level + 1
    return level

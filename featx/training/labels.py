"""A user's y, whatever holds it: labels that are missing, and codes that are none."""

from __future__ import annotations

from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import issparse
from sklearn.utils import assert_all_finite
from sklearn.utils.multiclass import type_of_target

from featx.images.items import is_missing

_MOST_TOLD = 5


def check_labelled(y: Any) -> None:
    """Raise where an image has no label: None, NaN, NaT, pandas' NA, a masked or infinite value.

    Parameters
    ----------
    y : array-like, data frame, Series or sparse matrix

    Raises
    ------
    ValueError
        In scikit-learn's words.
    """
    if y is None:
        return None
    if issparse(y):
        return assert_all_finite(y, input_name="y")
    # In an array of texts NaN would become the text "nan".
    values = np.asarray(y, dtype=object if isinstance(y, list | tuple) else None)
    missing = _missing(values) | np.ma.getmaskarray(y) if np.ma.isMaskedArray(y) else _missing(values)
    if values.ndim and missing.any():
        _refuse_missing(np.asarray(missing.reshape(len(missing), -1).any(axis=1)))
    if values.dtype.kind == "O":
        values = np.array([value for value in values.flat if isinstance(value, float)])
    if values.dtype.kind == "f":
        assert_all_finite(values, input_name="y")
    return None


def check_classes(classes: Any) -> NDArray[Any]:
    """All labels that there can be, each once, in order.

    Raises
    ------
    ValueError
        One is missing, or some cannot be compared with others.
    """
    values = np.asarray(classes, dtype=object if isinstance(classes, list | tuple) else None)
    if _missing(values).any():
        raise ValueError(f"Labels are expected, got classes={classes!r} with one that is missing. Leave it out.")
    try:
        return np.asarray(np.unique(np.asarray(classes)))
    except TypeError as error:
        raise ValueError(
            f"Labels of one kind are expected, got classes={classes!r}. Pass numpy.asarray(classes, dtype=str)."
        ) from error


def is_multilabel(y: Any) -> bool:
    """Whether y holds 0 and 1 for several labels of each image.

    Raises
    ------
    ValueError
        A label is missing, or y has a column for each of several labels and other numbers in them.
    """
    if y is None:
        return False
    check_labelled(y)
    values = _values_in_columns(y)
    if values is not None and not values <= {0, 1}:
        _refuse_codes(y, sorted(values))
    return values is not None


def _refuse_missing(missing: NDArray[np.bool_]) -> NoReturn:
    rows = np.flatnonzero(missing).tolist()
    more = f" and {len(rows) - _MOST_TOLD} more" if len(rows) > _MOST_TOLD else ""
    raise ValueError(
        f"Input y contains NaN: {len(rows)} of {len(missing)} images have no label, those in rows "
        f"{rows[:_MOST_TOLD]}{more}. Remove these rows from X and y."
    )


def _missing(values: NDArray[Any]) -> NDArray[np.bool_]:
    if values.dtype.kind in "OT":
        return np.asarray(np.frompyfunc(is_missing, 1, 1)(values.astype(object)), dtype=bool)
    return np.asarray(values != values) if values.dtype.kind in "fcmM" else np.zeros(values.shape, dtype=bool)


def _values_in_columns(y: Any) -> set[float] | None:
    """The different numbers in a y of several columns; None where it has one, or holds something else."""
    if issparse(y):
        values = {*y.tocsr().data.tolist()}
        return values | {0} if y.nnz < np.prod(y.shape) else values
    try:
        array = np.asarray(y)
    except ValueError:  # rows of several lengths
        type_of_target(y, input_name="y")  # has words for them
        raise
    if array.ndim != 2 or array.shape[1] < 2:
        return None
    values = {*array.ravel().tolist()}
    return values if all(isinstance(value, float | int) for value in values) else None


def _refuse_codes(y: Any, values: list[float]) -> NoReturn:
    told = ", ".join(map(str, values[:_MOST_TOLD])) + (", ..." if len(values) > _MOST_TOLD else "")
    binary = len(values) <= 2
    given = "y" if issparse(y) else "numpy.asarray(y)"
    soft = values[0] >= 0 and values[-1] <= 1  # shares of annotators, say
    mended = f"{given} >= 0.5" if soft else f"{given} == {values[-1]}"
    raise ValueError(
        f"0 and 1 are expected in a y with a column for each label, got y with {told}. "
        + (f"Pass {mended}." if binary or soft else "Fit one classifier a column, as MultiOutputClassifier does.")
    )

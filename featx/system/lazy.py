"""Transformers on Dask collections: nothing is computed before Dask computes it."""

from __future__ import annotations

import copy
import functools
import sys
from collections.abc import Callable
from typing import Any

import numpy as np

from featx.system.output import Output, check_has_columns


class LazyTransformMixin:
    """Makes ``transform`` take Dask arrays, Series and frames, each part as an X of its own.

    A subclass has ``_width()``, the shape of a row of features, and ``get_feature_names_out``. Comes before
    scikit-learn's TransformerMixin, whose wrapper would compute the parts to put them into a frame.
    """

    def __init_subclass__(cls, **given: Any) -> None:
        super().__init_subclass__(**given)
        if "transform" in cls.__dict__:
            cls.transform = _also_lazily(cls.transform)  # type: ignore[attr-defined]

    def _width(self) -> tuple[int, ...]:
        raise NotImplementedError


def is_lazy(X: Any) -> bool:
    """Whether X is a collection of Dask's, without importing Dask."""
    dask = sys.modules.get("dask")
    return dask is not None and bool(dask.is_dask_collection(X))


def note_columns(estimator: Any, X: Any) -> None:
    """What ``fit`` learns and checks of a Dask collection: its columns, as of a row of zeros in its place.

    Raises
    ------
    TypeError
        It is neither an array nor a frame nor a Series.
    ValueError
        A frame of paths has several columns, or one of numbers others than ``image_shape`` says.
    """
    _check_kind(X)
    if estimator.image_shape is None:
        _check_one_column(X)
        estimator._forget_columns()
        return
    zeros: Any = np.zeros((1, *X.shape[1:]))
    if (columns := getattr(X, "columns", None)) is not None:
        import pandas as pd

        zeros = pd.DataFrame(zeros, columns=columns)
    estimator._items(zeros, reset=True)


def _check_kind(X: Any) -> None:
    if not (hasattr(X, "map_blocks") or hasattr(X, "to_dask_array")):
        raise TypeError(
            f"A Dask array, Series or one-column DataFrame is expected, got {type(X).__name__}. Turn it into one of "
            "them, for example with to_dataframe()."
        )


def _check_one_column(X: Any) -> None:
    columns = getattr(X, "columns", None)
    if columns is not None and X.ndim == 2 and len(columns) != 1:
        raise ValueError(
            f"One column of images is expected, got the columns {[*columns]}. Choose one, such as X[{columns[0]!r}]."
        )


def _also_lazily(transform: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    @functools.wraps(transform)
    def wrapper(self: Any, X: Any) -> Any:
        return _transform_lazily(self, X) if is_lazy(X) else transform(self, X)

    return wrapper


def _transform_lazily(estimator: Any, X: Any) -> Any:
    import dask.array as da

    estimator._validate_params()
    _check_kind(X)
    if estimator.image_shape is None:
        _check_one_column(X)
    frames = _in_frames(estimator)
    width = estimator._width()
    plain = copy.deepcopy(estimator).set_output(transform="default")
    names = estimator.get_feature_names_out() if frames else None
    if isinstance(X, da.Array):
        rows = _of_array(plain, X, width)
        if names is None:
            return rows
        import dask.dataframe as dd

        return dd.from_dask_array(rows, columns=list(names))
    return _of_frame(plain, X, width, names)


def _in_frames(estimator: Any) -> bool:
    """Whether rows are to come as a pandas frame.

    Raises
    ------
    ValueError
        Another kind of frame is asked for, of which Dask has none; or features are no rows.
    """
    output = Output.of(estimator)
    if output.kind not in ("default", "pandas"):
        raise ValueError(
            f'The output "default" or "pandas" is expected for Dask collections, got {output.setting}. Call '
            'set_output(transform="pandas").'
        )
    check_has_columns(estimator)
    return output.in_frames


def _of_array(estimator: Any, X: Any, width: tuple[int, ...]) -> Any:
    whole = X.rechunk(dict.fromkeys(range(1, X.ndim), -1))  # an image lies in one chunk
    return whole.map_blocks(
        functools.partial(_rows, estimator, width),
        dtype=np.float32,
        chunks=(whole.chunks[0], *((side,) for side in width)),
        drop_axis=list(range(1, X.ndim)),
        new_axis=list(range(1, 1 + len(width))),
        meta=np.empty((0,) * (1 + len(width)), dtype=np.float32),
    )


def _of_frame(estimator: Any, X: Any, width: tuple[int, ...], names: np.ndarray | None) -> Any:
    if names is None and len(width) != 1:
        raise ValueError(
            'One row of features per image is expected for a Dask frame or Series, got pooling="map". Pass a Dask '
            "array of paths."
        )
    import pandas as pd

    columns = list(range(width[0])) if names is None else list(names)
    meta = pd.DataFrame({name: np.empty(0, dtype=np.float32) for name in columns})
    frame = X.map_partitions(functools.partial(_frame, estimator, width, columns), meta=meta)
    return frame if names is not None else frame.to_dask_array()


def _rows(estimator: Any, width: tuple[int, ...], part: Any) -> np.ndarray:
    """Features of one part, which may be empty."""
    rows: np.ndarray = estimator.transform(part) if len(part) else np.empty((0, *width), dtype=np.float32)
    return rows


def _frame(estimator: Any, width: tuple[int, ...], columns: list[Any], part: Any) -> Any:
    import pandas as pd

    return pd.DataFrame(_rows(estimator, width, part), index=part.index, columns=columns)

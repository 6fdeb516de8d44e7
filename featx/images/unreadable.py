"""Which images cannot be read, and why: decoded all, before or instead of whatever else is done with them."""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from itertools import islice
from numbers import Integral
from typing import Any, TypeVar

import numpy as np
from sklearn.utils import Bunch, check_array
from sklearn.utils._param_validation import Interval, StrOptions, validate_params
from tqdm.auto import tqdm

from featx.exceptions import ImageError
from featx.images.reading import PixelRange
from featx.images.sources import MAX_PIXELS, Items, as_items
from featx.system import threads
from featx.system.callers import frames_to_caller

T = TypeVar("T")

# Images handed to a thread together, and how many such parts wait for each thread.
_TASK_SIZE, _TASKS_AHEAD = 8, 4


@threads.one_thread_after_fork()
@validate_params(
    {
        "image_shape": [tuple, list, None],
        "pixel_range": [StrOptions({"auto"}), tuple, list],
        "fourth_band": [StrOptions({"alpha", "ignore"})],
        "preprocess": [str, callable, None],
        "max_pixels": [Interval(Integral, 1, None, closed="left")],
        "storage_options": [dict, None],
        "n_jobs": [Interval(Integral, 1, None, closed="left"), Interval(Integral, None, -1, closed="right"), None],
        "verbose": ["verbose"],
    },
    prefer_skip_nested_validation=False,
)  # type: ignore[untyped-decorator]
def find_unreadable(
    X: Any,
    *,
    image_shape: tuple[int, ...] | None = None,
    pixel_range: PixelRange = "auto",
    fourth_band: str = "alpha",
    preprocess: Any = "weights",
    max_pixels: int = MAX_PIXELS,
    storage_options: Mapping[str, Any] | None = None,
    n_jobs: int | None = None,
    verbose: int = 0,
) -> Bunch:
    """Rows of X whose images cannot be read, with the reasons.

    Decodes every image in full, once, and keeps none, so that a file is found that is merely cut short. The rows are
    those for which an estimator with the same parameters raises an error, or gives NaN under ``on_error="nan"``.

    Parameters
    ----------
    X : array-like of n images
        As in :meth:`PretrainedFeatureExtractor.transform`.
    image_shape, pixel_range, fourth_band, max_pixels, storage_options : as in :class:`PretrainedFeatureExtractor`
        What X is, and what is allowed.
    preprocess : str, None or callable, default="weights"
        As in :class:`PretrainedFeatureExtractor`. Only matters where it is None: X then holds ready tensors.
    n_jobs : int or None, default=None
        Decoding threads; None means as many as torch uses, -1 all cores.
    verbose : int, default=0
        1 shows a progress bar with images per second.

    Returns
    -------
    Bunch
        With the attributes

        - ``rows``: ndarray of shape (n_unreadable,), int, positions in X, ascending;
        - ``sources``: ndarray of shape (n_unreadable,), dtype object, the files as str, None for pixels in memory;
        - ``reasons``: ndarray of shape (n_unreadable,), dtype object, what is wrong as str, such as "truncated JPEG",
          and what makes the image readable, where something does.

    Raises
    ------
    TypeError, ValueError
        X as a whole is of no form that is known, or a parameter is wrong.

    Examples
    --------
    >>> import numpy as np
    >>> from featx import find_unreadable
    >>> X = [np.zeros((8, 8, 3), dtype="uint8"), "photos/no such photo.jpg", np.ones((8, 8)), None]
    >>> bad = find_unreadable(X)
    >>> bad.rows.tolist(), bad.reasons.tolist()
    ([1, 3], ['no such file', 'a missing value'])

    Without these rows, of X and of its labels:

    >>> y = np.array([0, 1, 1, 0])
    >>> X = [image for row, image in enumerate(X) if row not in bad.rows]
    >>> y = np.delete(y, bad.rows)
    >>> len(X), len(y)
    (2, 2)
    """
    if image_shape is not None:
        X = check_array(X, dtype="numeric", ensure_all_finite=False, input_name="X")
    items = as_items(
        X,
        image_shape=image_shape,
        pixel_range=pixel_range,
        fourth_band=fourth_band,
        full_depth=callable(preprocess),
        max_pixels=max_pixels,
        raw=preprocess is None,
        storage_options=storage_options,
    )
    with tqdm(total=len(items), unit="img", desc="decoding", disable=not verbose) as bar:
        errors = unreadable_rows(items, threads_for(n_jobs), bar.update)
    return Bunch(
        rows=np.array([*errors], dtype=int),
        sources=np.array([error.source for error in errors.values()], dtype=object),
        reasons=np.array([error.explanation for error in errors.values()], dtype=object),
    )


def unreadable_rows(
    items: Items, n_jobs: int = 1, tick: Callable[[int], object] = lambda n: None
) -> dict[int, ImageError]:
    """Errors of the items that cannot be read, by position; decodes all of them, in ``n_jobs`` threads.

    ``tick`` is told how many more are done, in the calling thread.
    """

    def look(row: int) -> None:
        items.load(row)

    with closing(looked_at(len(items), look, n_jobs, tick)) as seen:
        return {row: error for row, error in enumerate(seen) if isinstance(error, ImageError)}


def looked_at(
    n_rows: int, look: Callable[[int], T], n_jobs: int, tick: Callable[[int], object]
) -> Generator[T | ImageError]:
    """What ``look(row)`` gives for each row in turn, or the error of an unreadable image; threads are a little ahead.

    The threads are gone when the iterator ends, however it does.
    """

    def look_at(rows: range) -> list[T | ImageError]:
        return [_or_error(look, row) for row in rows]

    parts = iter(range(start, min(start + _TASK_SIZE, n_rows)) for start in range(0, n_rows, _TASK_SIZE))
    pool = ThreadPoolExecutor(n_jobs, thread_name_prefix="featx-decode")
    try:
        ahead = deque(pool.submit(look_at, rows) for rows in islice(parts, n_jobs * _TASKS_AHEAD))
        while ahead:
            found = ahead.popleft().result()
            ahead.extend(pool.submit(look_at, rows) for rows in islice(parts, 1))
            yield from found
            tick(len(found))
    finally:
        pool.shutdown(cancel_futures=True)


def _or_error(look: Callable[[int], T], row: int) -> T | ImageError:
    try:
        return look(row)
    except ImageError as error:
        return error


def readable_rows(items: Items, n_jobs: int, consequence: str) -> list[int]:
    """Positions of the items that can be read; one warning counts the others and says what becomes of them."""
    errors = unreadable_rows(items, n_jobs)
    warn_unreadable([*errors.values()], len(items), consequence)
    return [row for row in range(len(items)) if row not in errors]


def warn_unreadable(errors: Sequence[ImageError], n_images: int, consequence: str) -> None:
    """One warning that counts unreadable images and names the first, where there are any.

    Parameters
    ----------
    errors : sequence of ImageError
    n_images : int
        Of which they are.
    consequence : str
        The end of a sentence.
    """
    if errors:
        count = f"{len(errors)} of {n_images} images could not be read{consequence}"
        advice = f" {errors[0].advice}" if errors[0].advice else ""
        warnings.warn(f"{count} The first: {errors[0].problem}.{advice}", UserWarning, stacklevel=frames_to_caller())


def threads_for(n_jobs: int | None) -> int:
    """Decoding threads: as many as torch uses for None, otherwise joblib's reading of ``n_jobs``."""
    import torch

    return threads.n_threads(n_jobs, torch.get_num_threads())

"""Folders of pictures, one subfolder a class."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Sequence

import numpy as np
from sklearn.utils import Bunch, check_random_state

from featx.images.classes import list_classes


def load_image_folder(
    path: str | os.PathLike[str],
    *,
    extensions: str | Iterable[str] | None = None,
    classes: Sequence[str] | None = None,
    shuffle: bool = True,
    random_state: int | np.random.RandomState | None = 0,
) -> Bunch:
    """Paths and classes of a folder of pictures with one subfolder a class.

    Lists the files without opening one, at any depth below the class folders. Left out and counted are hidden files
    and folders (a name that starts with a dot), what systems put there (``@eaDir``, ``$RECYCLE.BIN``, ``__MACOSX``,
    ``Thumbs.db``, ...), files with another extension and pictures outside the class folders. Links to folders are
    followed: within a class each folder is listed once, and a link that leads back to a folder it lies in is left
    out. A picture that two classes link to belongs to both.

    Parameters
    ----------
    path : str or path-like
        The folder that holds the class folders.
    extensions : str, iterable of str or None, default=None
        What a picture's name ends with, in lower or upper case; anything may be given. None takes the endings of all
        formats that can be decoded in this process: those of Pillow without what is no photo (icons, drawings,
        documents, films) or may be something else (``.fits``, ``.pcd``, ...), and HEIC where
        ``pip install "featx[heic]"`` was run.
    classes : sequence of str or None, default=None
        Names of the class folders, in the order in which ``target`` counts them; another folder is an error, and a
        class without a picture keeps its number. Needed where several folders share their classes, such as the splits
        of a data set: without it each numbers the classes that it has itself, so that 1 may be another class in
        ``val/`` than in ``train/``. Also needed where classes are called like splits ("train", "test"). None takes
        every subfolder that holds a picture.
    shuffle : bool, default=True
        Whether to mix the classes, as scikit-learn's ``load_files`` does. Without it the rows are sorted by class and
        path, and whatever takes the first rows as a sample, such as ``learning_curve``, sees one class alone.
    random_state : int, RandomState instance or None, default=0
        Seed of the shuffling; the same files give the same order. None gives another order at each call.

    Returns
    -------
    Bunch
        With the attributes

        - ``data``: ndarray of shape (n_images,), dtype object, the paths as str;
        - ``target``: ndarray of shape (n_images,), dtype int, indices into ``target_names``;
        - ``target_names``: list of str, ``classes``, or else the names of the class folders, sorted; folders without a
          picture are left out;
        - ``left_out``: list of named tuples (ending, reason, number), the most frequent first: the files that are not
          listed. The ending is ``"/"`` for folders: links that are not followed, classes without a picture.

    Warns
    -----
    UserWarning
        A class folder holds files, and none of them is listed.

    Raises
    ------
    FileNotFoundError
        The folder does not exist.
    NotADirectoryError
        It is a file.
    OSError
        A folder in it cannot be listed.
    ValueError
        No subfolder holds a picture, a subfolder is called like a split, or it is none of ``classes``.

    Examples
    --------
    >>> import tempfile
    >>> from pathlib import Path
    >>> from featx import load_image_folder
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     for name in ("ants/1.jpg", "bees/1.jpg", "bees/2.JPG", "bees/notes.txt"):
    ...         file = Path(folder, name)
    ...         file.parent.mkdir(exist_ok=True)
    ...         file.touch()
    ...     photos = load_image_folder(folder)
    >>> photos.target_names, sorted(photos.target.tolist())
    (['ants', 'bees'], [0, 1, 1])
    >>> photos.left_out
    [LeftOut(ending='.txt', reason='no picture format that can be read here', number=1)]
    """
    found = list_classes(path, classes, extensions=extensions)
    if found.closed:
        raise found.closed[0]
    found.check_any(", or pass extensions to take them as they are")
    if found.lost:
        warnings.warn(found.lost, stacklevel=2)
    data = np.array([file for files in found.pictures.values() for file in files], dtype=object)
    target = np.repeat(np.arange(len(found.pictures)), [len(files) for files in found.pictures.values()])
    if shuffle:
        order = check_random_state(random_state).permutation(len(data))
        data, target = data[order], target[order]
    return Bunch(data=data, target=target, target_names=[*found.pictures], left_out=found.left_out)

"""Folders of pictures, one subfolder a class."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
from sklearn.utils import Bunch, check_random_state

IMAGE_EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")


def load_image_folder(
    path: str | os.PathLike[str],
    *,
    extensions: str | tuple[str, ...] = IMAGE_EXTENSIONS,
    shuffle: bool = True,
    random_state: int | np.random.RandomState | None = 0,
) -> Bunch:
    """Paths and classes of a folder of pictures with one subfolder a class.

    Lists the files without opening one, at any depth below the class folders. Hidden files and folders (a name that
    starts with a dot), files with another extension and pictures outside the class folders are left out. Links to
    folders are followed for the classes themselves only, since deeper ones may form a circle.

    Parameters
    ----------
    path : str or path-like
        The folder that holds the class folders.
    extensions : str or tuple of str, default=the common picture formats
        What a picture's name ends with, in lower or upper case.
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
        - ``target_names``: list of str, the names of the class folders, sorted. Folders without a picture are left out.

    Raises
    ------
    FileNotFoundError
        The folder does not exist.
    NotADirectoryError
        It is a file.
    ValueError
        No subfolder holds a picture.

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
    """
    root = _check_folder(path)
    extensions = (extensions,) if isinstance(extensions, str) else extensions
    classes = [(folder.name, files) for folder in class_folders(root) if (files := pictures_in(folder, extensions))]
    if not classes:
        raise ValueError(
            f"A folder with one subfolder of pictures per class is expected, got path={str(root)!r} without any file "
            f"named *{', *'.join(extensions)} in a subfolder. Put each class's pictures into a folder of its own, or "
            "pass extensions."
        )
    data = np.array([file for _, files in classes for file in files], dtype=object)
    target = np.repeat(np.arange(len(classes)), [len(files) for _, files in classes])
    if shuffle:
        order = check_random_state(random_state).permutation(len(data))
        data, target = data[order], target[order]
    return Bunch(data=data, target=target, target_names=[name for name, _ in classes])


def _check_folder(path: str | os.PathLike[str]) -> Path:
    root = Path(path)
    if not root.exists():
        raise FileNotFoundError(f"An existing folder is expected, got path={str(root)!r}. Check the spelling.")
    if not root.is_dir():
        raise NotADirectoryError(f"A folder is expected, got path={str(root)!r}, a file. Pass the folder it lies in.")
    return root


def class_folders(root: Path) -> list[Path]:
    """The subfolders that stand for classes, sorted."""
    return sorted(entry for entry in root.iterdir() if entry.is_dir() and not is_hidden(entry.name))


def pictures_in(folder: str | os.PathLike[str], extensions: tuple[str, ...] = IMAGE_EXTENSIONS) -> list[str]:
    """Pictures in a folder at any depth, sorted; hidden ones are left out.

    Raises
    ------
    OSError
        A folder in it cannot be listed.
    """
    endings = tuple(extension.lower() for extension in extensions)
    found: list[str] = []
    for parent, folders, names in os.walk(os.fspath(folder), onerror=_raise):
        folders[:] = [name for name in folders if not is_hidden(name)]
        found += [os.path.join(parent, name) for name in names if is_picture(name, endings)]
    return sorted(found)


def is_picture(name: str, endings: tuple[str, ...] = IMAGE_EXTENSIONS) -> bool:
    """Whether a file is taken for a picture, by its name alone."""
    return name.lower().endswith(endings) and not is_hidden(name)


def is_hidden(name: str) -> bool:
    """Whether a file or folder is left out."""
    return name.startswith(".")


def _raise(error: OSError) -> None:
    raise error  # os.walk would leave out what it may not list

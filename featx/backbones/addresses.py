"""Where a user says that weights are: a name, a file, or a place in a file. Torch is not needed for that."""

from __future__ import annotations

import os
from typing import Any

Address = str | tuple[str, str] | None


def plain_address(weights: Any) -> Address:
    """What a user passes as ``weights``, without a platform's kinds of path.

    Parameters
    ----------
    weights : str, path, pair of str or path and str, or None

    Returns
    -------
    address : str, (str, str) or None

    Raises
    ------
    TypeError
        It is none of these.
    """
    if weights is None:
        return None
    if not isinstance(weights, (tuple, list)):
        return os.fsdecode(weights)
    if len(weights) != 2 or not isinstance(weights[1], str):
        raise TypeError("a pair of a path and a key is expected")
    return os.fsdecode(weights[0]), weights[1]


def path_in(address: Address) -> str:
    """The part of an address that is a name or a path; empty for None."""
    if address is None:
        return ""
    return address if isinstance(address, str) else address[0]


def split_address(text: str) -> Address:
    """What ``FILE#KEY`` means: a key of the file's content, unless there is a file of that whole name.

    Returns
    -------
    address : str or (str, str)
        The text as it is where there is no such file.
    """
    pieces = text.split("#")
    splits = (("#".join(pieces[:i]), "#".join(pieces[i:])) for i in range(len(pieces) - 1, 0, -1))
    found = () if os.path.isfile(text) else ((file, key) for file, key in splits if os.path.isfile(file))
    return next(iter(found), text)

"""Which images training does not see, so that they can tell when to stop."""

from __future__ import annotations

import numpy as np


def hold_out(codes: np.ndarray, fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Split some images by class.

    Of every class that has two images at least one is held out and at least one is trained on; a lone image is
    trained on. Beyond that each class gives its share, to the next whole number below or above it.

    Parameters
    ----------
    codes : ndarray of shape (n,) of int, or (n, n_labels)
        Positions in the classes. Images with several labels are split as if they were of one class.
    fraction : float
        Share of the images to hold out, in 0..1.
    seed : int
        The same gives the same.

    Returns
    -------
    training, held_out : ndarrays of int
        Positions in the codes, ascending.

    Raises
    ------
    ValueError
        No class has two images.
    """
    classes, code, sizes = np.unique(
        codes if codes.ndim == 1 else np.zeros(len(codes)), return_inverse=True, return_counts=True
    )
    quotas = held_out_counts(sizes, fraction)
    if not quotas.any():
        raise ValueError(
            f"Two images of at least one class are expected with early_stopping=True, got {len(codes)} of "
            f"{len(classes)} classes. Set early_stopping=False."
        )
    shuffled = np.random.RandomState(seed).permutation(len(codes))
    by_class = shuffled[np.argsort(code[shuffled], kind="stable")]
    rank = np.arange(len(codes)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    chosen = rank < np.repeat(quotas, sizes)
    return np.sort(by_class[~chosen]), np.sort(by_class[chosen])


def held_out_counts(sizes: np.ndarray, fraction: float) -> np.ndarray:
    """How many of each class to hold out, given how many there are.

    Parameters
    ----------
    sizes : ndarray of shape (n_classes,) of int
    fraction : float

    Returns
    -------
    counts : ndarray of shape (n_classes,) of int
    """
    share = fraction * sizes
    most = sizes - 1
    counts = np.minimum(np.maximum(np.floor(share).astype(int), 1), most)
    wanting = np.where(counts < np.minimum(share, most), share - counts, 0)
    n_more = min(max(0, int(np.ceil(share.sum())) - int(counts.sum())), np.count_nonzero(wanting))
    counts[np.argsort(-wanting, kind="stable")[:n_more]] += 1
    return counts

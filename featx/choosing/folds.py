"""Folds of a cross-validation, as many as the images allow."""

from __future__ import annotations

from numbers import Integral
from typing import Any

import numpy as np
from sklearn.model_selection import GroupKFold, KFold, StratifiedGroupKFold, StratifiedKFold, check_cv

Fold = tuple[np.ndarray, np.ndarray]  # rows that are learnt, and rows that are held out


def folds_of(y: np.ndarray, used: np.ndarray, cv: Any, groups: np.ndarray | None, seed: int) -> list[Fold]:
    """Positions in ``used`` of the images of each fold, ascending.

    Parameters
    ----------
    y : ndarray of shape (n,) or (n, n_labels)
    used : ndarray of int
        Rows that are learnt from and judged at all, ascending.
    cv : int, splitter, iterable or None
        An int is the most stratified folds that are taken, of the rows used. What a splitter or an iterable says is of
        all rows, from which the others are left out.
    groups : ndarray of shape (n,) or None
    seed : int
        Decides the folds of an int.

    Raises
    ------
    ValueError
        There are not two images, or groups, of two classes; or a fold has none to judge, or one class to learn.
    """
    if cv is None or isinstance(cv, Integral):
        own = None if groups is None else _shuffled(groups[used], seed)
        splitter = _splitter(y[used], 5 if cv is None else int(cv), own, seed)
        pairs = [*splitter.split(used, y[used], own)]
    else:
        parts = check_cv(cv).split(np.zeros(len(y)), y, groups)
        pairs = [tuple(_positions(rows, used, len(y)) for rows in pair) for pair in parts]
    for number, (learnt, held_out) in enumerate(pairs):
        n_classes = len(np.unique(y[used][learnt])) if y.ndim == 1 else 2
        if n_classes < 2 or not len(learnt) or not len(held_out):
            raise ValueError(
                f"Images of two classes to learn from, and some to judge by, are expected in every fold, got "
                f"{len(learnt)} of {min(n_classes, len(learnt))} classes and {len(held_out)} in fold {number}. Set "
                "another cv."
            )
    return [(np.sort(learnt), np.sort(held_out)) for learnt, held_out in pairs]


def _positions(rows: Any, used: np.ndarray, n: int) -> np.ndarray:
    rows = np.arange(n)[np.asarray(rows)]  # numbers, also from the end, or a mask
    return np.searchsorted(used, rows[np.isin(rows, used)])


def _shuffled(groups: np.ndarray, seed: int) -> np.ndarray:
    """Numbers for groups, by chance."""
    distinct, numbers = np.unique(groups, return_inverse=True)
    return np.random.default_rng(seed).permutation(len(distinct))[numbers]


def _splitter(y: np.ndarray, n_folds: int, groups: np.ndarray | None, seed: int) -> Any:
    how = {"shuffle": True, "random_state": seed}
    if y.ndim == 2:
        n = len(y) if groups is None else len(np.unique(groups))
        return (KFold if groups is None else GroupKFold)(_at_most(n_folds, n, "images or groups"), **how)
    classes, counts = np.unique(y, return_counts=True)
    if len(classes) < 2:
        raise ValueError(f"Images of at least two classes are expected, got one class, {classes[0].item()!r}, alone.")
    if groups is not None:
        counts = np.array([len(np.unique(groups[y == label])) for label in classes])
    rarest, what = classes[counts.argmin()], "images" if groups is None else "groups"
    if counts.min() < 2:
        raise ValueError(
            f"At least two {what} of each class are expected, got one of {rarest.item()!r}. Add some, or leave it out."
        )
    n_folds = min(n_folds, int(counts.min()))
    # Its own shuffling loses the classes in some releases, so that the groups come in another order instead.
    return StratifiedKFold(n_folds, **how) if groups is None else StratifiedGroupKFold(n_folds)


def _at_most(n_folds: int, n: int, what: str) -> int:
    if n < 2:
        raise ValueError(f"At least two {what} are expected, got n_samples = {n}.")
    return min(n_folds, n)

"""Labels as numbers, what each image weighs, and the loss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from sklearn.utils import check_array, column_or_1d
from sklearn.utils.class_weight import compute_sample_weight
from sklearn.utils.multiclass import check_classification_targets
from torch.nn import functional as F

from featx.system.devices import to_host
from featx.training.labels import check_classes, is_multilabel


@dataclass(frozen=True)
class Targets:
    """What the training images are.

    Attributes
    ----------
    codes : ndarray of shape (n,) of int, or (n, n_classes) of float
        Positions in the classes, or 0 and 1 for each label of a multilabel problem.
    weights : ndarray of shape (n,), float
        Positive, 1 on average.
    n_classes : int
    """

    codes: np.ndarray
    weights: np.ndarray
    n_classes: int

    @property
    def multilabel(self) -> bool:
        """Whether an image can have several labels, or none."""
        return self.codes.ndim == 2


@dataclass(frozen=True)
class Labels:
    """A user's y.

    Attributes
    ----------
    y : ndarray of shape (n,), or (n, n_labels) of 0 and 1
    classes : ndarray of shape (n_classes,)
    codes : ndarray of shape (n,) of int, or (n, n_labels) of float
    """

    y: np.ndarray
    classes: np.ndarray
    codes: np.ndarray

    @classmethod
    def of(cls, name: str, y: Any, classes: Any = None) -> Labels:
        """Check y; ``classes`` are all there can be, where that is known.

        Raises
        ------
        ValueError
            As scikit-learn words it.
        """
        if y is None:
            raise ValueError(f"This {name} estimator requires y to be passed, but the target y is None.")
        if is_multilabel(y):
            y = check_array(y, accept_sparse=True, ensure_2d=True, dtype=None)
            y = np.asarray(y.toarray() if hasattr(y, "toarray") else y).astype(int)
            return cls(y, np.arange(y.shape[1]), y.astype(np.float64))
        y = column_or_1d(y, warn=True)
        known, codes = _numbered(y)
        check_classification_targets(y)
        if classes is None:
            return cls(y, known, codes)
        classes = check_classes(classes)
        strange = np.setdiff1d(known, classes)
        if len(strange):
            raise ValueError(f"Labels among {classes.tolist()} are expected, got y with {strange.tolist()}.")
        return cls(y, classes, np.searchsorted(classes, y))

    def targets(self, rows: np.ndarray, class_weight: Any, sample_weight: np.ndarray) -> Targets:
        """What to train on in some rows."""
        weights = sample_weight[rows]
        if class_weight is not None:
            weights = weights * compute_sample_weight(class_weight, self.y[rows])
        if not weights.any():
            raise ValueError(
                f"Images that weigh something are expected, got {len(rows)} of {len(self.y)} images, to train on or "
                "held out, whose class_weight or sample_weight is 0. Give some of them more."
            )
        return Targets(self.codes[rows], weights / weights.mean(), len(self.classes))


def _numbered(y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    try:
        known, codes = np.unique(y, return_inverse=True)
    except TypeError as error:
        kinds = sorted({type(label).__name__ for label in y})
        raise ValueError(
            f"Labels of one kind are expected, got y with {' and '.join(kinds)}. Pass numpy.asarray(y, dtype=str)."
        ) from error
    return known, codes


def losses(
    scores: torch.Tensor, codes: torch.Tensor, label_smoothing: float, *, multilabel: bool, mean: bool = False
) -> torch.Tensor:
    """Cross-entropy of each image, of shape (n,), or their mean; for multilabel codes the mean over its labels.

    Parameters
    ----------
    scores : tensor of shape (n, n_classes)
    codes : tensor of shape (n,) of int64, or (n, n_classes) of float
        Shares of the classes where images were mixed, 0 and 1 for labels.
    label_smoothing : float
        Share of each target that is spread over all classes, in 0..1.
    multilabel : bool
        Whether an image can be of several classes.
    mean : bool, default=False
        Whether their mean is enough, whose slope takes less time to find.
    """
    reduction = "mean" if mean else "none"
    if not multilabel:
        return F.cross_entropy(scores, codes, reduction=reduction, label_smoothing=label_smoothing)
    softened = codes * (1 - label_smoothing) + label_smoothing / 2
    each = F.binary_cross_entropy_with_logits(scores, softened, reduction=reduction)
    return each if mean else each.mean(1)


def probabilities(scores: torch.Tensor, multilabel: bool) -> np.ndarray:
    """Of shape (n, n_classes), float32."""
    return to_host(scores.sigmoid() if multilabel else scores.softmax(1)).numpy()

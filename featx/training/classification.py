"""Classes as targets: labels as numbers, cross-entropy, and the logistic regression that a head starts from."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.utils import check_array, column_or_1d
from sklearn.utils.class_weight import compute_sample_weight
from sklearn.utils.multiclass import check_classification_targets
from torch import nn
from torch.nn import functional as F

from featx.system.devices import to_host
from featx.system.fits import one_thread, run_fits
from featx.training.labels import check_classes, is_multilabel
from featx.training.probes import set_linear, standardised
from featx.training.sharing import labels_from_json, labels_to_json
from featx.training.targets import Targets, even


@dataclass(frozen=True)
class Classes:
    """What the outputs of a fitted classifier stand for.

    Attributes
    ----------
    classes : ndarray of shape (n_classes,)
    multilabel : bool
        Whether an image can be of several, or of none.
    """

    classes: np.ndarray
    multilabel: bool

    @property
    def n_outputs(self) -> int:
        """One for each class."""
        return len(self.classes)

    def to_json(self) -> dict[str, Any]:
        """For a file that holds no pickles."""
        return {"classes": labels_to_json(self.classes), "multilabel": self.multilabel}

    @classmethod
    def from_json(cls, stored: dict[str, Any]) -> Classes:
        """What `to_json` gave."""
        return cls(labels_from_json(stored["classes"]), stored["multilabel"])


@dataclass(frozen=True)
class Labels:
    """A classifier's y.

    Attributes
    ----------
    y : ndarray of shape (n,), or (n, n_labels) of 0 and 1
    classes : ndarray of shape (n_classes,)
    codes : ndarray of shape (n,) of int, or (n, n_labels) of float
    class_weight : dict, "balanced" or None
    label_smoothing : float
    """

    y: np.ndarray
    classes: np.ndarray
    codes: np.ndarray
    class_weight: Any = None
    label_smoothing: float = 0.0

    @classmethod
    def of(
        cls, name: str, y: Any, classes: Any = None, *, class_weight: Any = None, label_smoothing: float = 0.0
    ) -> Labels:
        """Check y; ``classes`` are all there can be, where that is known.

        Raises
        ------
        ValueError
            As scikit-learn words it.
        """
        if y is None:
            raise ValueError(f"This {name} estimator requires y to be passed, but the target y is None.")
        more = {"class_weight": class_weight, "label_smoothing": label_smoothing}
        if is_multilabel(y):
            y = check_array(y, accept_sparse=True, ensure_2d=True, dtype=None)
            y = np.asarray(y.toarray() if hasattr(y, "toarray") else y).astype(int)
            return cls(y, np.arange(y.shape[1]), y.astype(np.float64), **more)
        y = column_or_1d(y, warn=True)
        known, codes = _numbered(y)
        check_classification_targets(y)
        if classes is None:
            return cls(y, known, codes, **more)
        classes = check_classes(classes)
        strange = np.setdiff1d(known, classes)
        if len(strange):
            raise ValueError(f"Labels among {classes.tolist()} are expected, got y with {strange.tolist()}.")
        return cls(y, classes, np.searchsorted(classes, y), **more)

    def __len__(self) -> int:
        return len(self.codes)

    @property
    def multilabel(self) -> bool:
        """Whether an image can have several labels, or none."""
        return self.codes.ndim == 2

    @property
    def groups(self) -> np.ndarray:
        """Classes."""
        return self.codes

    @property
    def meaning(self) -> Classes:
        """What outputs fitted to them stand for."""
        return Classes(self.classes, self.multilabel)

    def measured(self, rows: np.ndarray, weights: np.ndarray) -> Labels:
        """The same: nothing is learnt before the first step."""
        return self

    def targets(self, rows: np.ndarray, weights: np.ndarray) -> Targets:
        """What to train on in some rows; weights are those of all rows, before classes are weighed."""
        weights = weights[rows]
        if self.class_weight is not None:
            weights = weights * compute_sample_weight(self.class_weight, self.y[rows])
        if not weights.any():
            raise ValueError(
                f"Images that weigh something are expected, got {len(rows)} of {len(self.y)} images, to train on or "
                "held out, whose class_weight or sample_weight is 0. Give some of them more."
            )
        loss = CrossEntropy(len(self.classes), self.multilabel, self.label_smoothing)
        return Targets(self.codes[rows], even(weights), loss)


def _numbered(y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    try:
        known, codes = np.unique(y, return_inverse=True)
    except TypeError as error:
        kinds = sorted({type(label).__name__ for label in y})
        raise ValueError(
            f"Labels of one kind are expected, got y with {' and '.join(kinds)}. Pass numpy.asarray(y, dtype=str)."
        ) from error
    return known, codes


@dataclass(frozen=True)
class CrossEntropy:
    """Of scores of shape (n, n_classes); for several labels of an image the mean over them.

    Parameters
    ----------
    n_classes : int
    multilabel : bool
        Whether an image can be of several classes. Targets are positions of shape (n,), or with several labels 0 and 1
        of shape (n, n_classes).
    label_smoothing : float
        Share of each target that is spread over all classes, in 0..1.
    """

    n_classes: int
    multilabel: bool
    label_smoothing: float = 0.0

    @property
    def dtype(self) -> torch.dtype:
        """Of the targets, on the device."""
        return torch.float32 if self.multilabel else torch.int64

    def __call__(self, outputs: torch.Tensor, targets: torch.Tensor, *, mean: bool = False) -> torch.Tensor:
        """Cross-entropy of each image, of shape (n,), or their mean; targets may be shares of the classes."""
        reduction, smoothing = "mean" if mean else "none", self.label_smoothing
        if not self.multilabel:
            return F.cross_entropy(outputs, targets, reduction=reduction, label_smoothing=smoothing)
        softened = targets * (1 - smoothing) + smoothing / 2
        each = F.binary_cross_entropy_with_logits(outputs, softened, reduction=reduction)
        return each if mean else each.mean(1)

    def mixable(self, targets: torch.Tensor) -> torch.Tensor:
        """Shares of the classes."""
        return F.one_hot(targets, self.n_classes).float() if targets.ndim == 1 else targets

    def score(self, outputs: torch.Tensor, targets: torch.Tensor, weights: np.ndarray) -> float:
        """Share of the images whose labels are all right."""
        right = (outputs > 0).eq(targets > 0).all(1) if self.multilabel else outputs.argmax(1).eq(targets)
        return float(np.average(right, weights=weights))

    def probe(
        self, rows: np.ndarray, targets: np.ndarray, weights: np.ndarray, strength: float, out: nn.Linear
    ) -> None:
        """Set a linear layer to logistic regression; ``strength`` is its C."""
        standard, mean, spread = standardised(rows)
        if targets.ndim == 1:
            with one_thread():
                weight, bias = _logistic(standard, targets, weights, strength, self.n_classes)
        else:
            calls = [partial(_logistic, standard, column.astype(int), weights, strength, 2) for column in targets.T]
            columns = run_fits(calls, rows.size, 2 * rows.nbytes)
            weight = np.stack([of_one[1] - of_one[0] for of_one, _ in columns])
            bias = np.stack([of_one[1] - of_one[0] for _, of_one in columns])
        set_linear(out, weight, bias, mean, spread)


def _logistic(
    rows: np.ndarray, targets: np.ndarray, weights: np.ndarray, C: float, n_classes: int
) -> tuple[np.ndarray, np.ndarray]:
    """Weight (n_classes, n_features) and bias of a softmax regression; classes without a row get none."""
    weight, bias = np.zeros((n_classes, rows.shape[1])), np.zeros(n_classes)
    seen = np.unique(targets)
    if len(seen) == 1:  # nothing to tell apart: only how sure one can be
        bias[seen[0]] = np.log1p(weights.sum())
        return weight, bias
    model = LogisticRegression(C=C, max_iter=200, tol=1e-3)
    # Past what others wrap around it, such as mlflow's autolog, which would log the head's start as the user's run.
    inspect.unwrap(LogisticRegression.fit)(model, rows, targets, sample_weight=weights)
    if len(seen) == 2:  # one score for the second class
        weight[seen] = np.concatenate([-model.coef_, model.coef_]) / 2
        bias[seen] = np.concatenate([-model.intercept_, model.intercept_]) / 2
    else:
        weight[seen], bias[seen] = model.coef_, model.intercept_
    return weight, bias


def probabilities(scores: torch.Tensor, multilabel: bool) -> np.ndarray:
    """Of shape (n, n_classes), float32."""
    return to_host(scores.sigmoid() if multilabel else scores.softmax(1)).numpy()

"""Real numbers as targets: their scale, squared and Huber's error, and the ridge regression that a head starts from."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from sklearn.linear_model import Ridge, RidgeCV
from sklearn.metrics import r2_score
from sklearn.utils import check_array
from torch import nn
from torch.nn import functional as F

from featx.training.labels import check_labelled
from featx.training.probes import set_linear, standardised
from featx.training.targets import Targets, even

# Penalties that ridge regression chooses from by leaving one image out, on standardised features.
_PENALTIES = np.logspace(0, 5, 11)
# Features that vary less than this share of the usual one count for less: see `standardised`.
_LEAST_SPREAD = 0.1
# The interquartile range of a normal distribution, in standard deviations.
_QUARTILES = 1.349
# A start need not reach further out, in spreads of the target, where wild targets are to decide less.
_FURTHEST = 3.0


@dataclass(frozen=True)
class Scale:
    """What the outputs of a fitted regressor stand for: each times its spread and more by its mean.

    Attributes
    ----------
    mean, spread : ndarray of shape (n_targets,), float64
    single : bool
        Whether y had one dimension.
    """

    mean: np.ndarray
    spread: np.ndarray
    single: bool

    @classmethod
    def of(cls, values: np.ndarray, weights: np.ndarray, single: bool, robust: bool = False) -> Scale:
        """Of values of shape (n, n_targets); what never varies has spread 1.

        ``robust`` takes median and quartiles for mean and standard deviation, where the quartiles differ.
        """
        mean = np.average(values, axis=0, weights=weights)
        gaps = values - mean
        most = np.abs(gaps).max(axis=0)
        # Rounding makes a mean of equal numbers another one; squares of very large and very small gaps have no number.
        varies = (values != values[0]).any(axis=0) & (most > 0)
        most = np.where(varies, most, 1.0)
        spread = np.where(varies, most * np.sqrt(np.average((gaps / most) ** 2, axis=0, weights=weights)), 1.0)
        if robust:
            low, middle, high = np.quantile(values, [0.25, 0.5, 0.75], axis=0, weights=weights, method="inverted_cdf")
            mean, spread = np.where(high > low, [middle, (high - low) / _QUARTILES], [mean, spread])
        if not np.isfinite([mean, spread]).all():
            raise ValueError(f"Targets whose mean and spread are finite are expected, got y up to {values.max():g}.")
        return cls(mean, spread, single)

    @property
    def n_outputs(self) -> int:
        """One for each target."""
        return len(self.mean)

    def to_json(self) -> dict[str, Any]:
        """For a file that holds no pickles."""
        return {"mean": self.mean.tolist(), "spread": self.spread.tolist(), "single": self.single}

    @classmethod
    def from_json(cls, stored: dict[str, Any]) -> Scale:
        """What `to_json` gave."""
        return cls(np.asarray(stored["mean"]), np.asarray(stored["spread"]), stored["single"])

    def standard(self, values: np.ndarray) -> np.ndarray:
        """Values as the head puts them out."""
        return np.asarray((values - self.mean) / self.spread)

    def restore(self, outputs: np.ndarray) -> np.ndarray:
        """The head's outputs as values, float64, of the shape that y had."""
        values = outputs.astype(np.float64) * self.spread + self.mean
        return np.asarray(values[:, 0] if self.single else values)


@dataclass(frozen=True)
class Numbers:
    """A regressor's y.

    Attributes
    ----------
    values : ndarray of shape (n, n_targets), float64
    single : bool
        Whether y had one dimension.
    loss : SquaredError
    scale : Scale or None
        None until it is measured.
    """

    values: np.ndarray
    single: bool
    loss: SquaredError
    scale: Scale | None = None

    @classmethod
    def of(cls, name: str, y: Any, *, huber: bool = False, scale: Scale | None = None) -> Numbers:
        """Check y; ``scale`` is that of an earlier fit, to go on from.

        Raises
        ------
        ValueError
            In scikit-learn's words.
        """
        if y is None:
            raise ValueError(f"This {name} estimator requires y to be passed, but the target y is None.")
        check_labelled(y)
        if (kind := np.asarray(y).dtype).kind in "SUMm":
            raise ValueError(f"Numbers are expected in y, got {kind}. FineTuneClassifier learns labels.")
        values = check_array(y, ensure_2d=False, dtype=np.float64, input_name="y", estimator=name)
        if values.ndim > 2:
            raise ValueError(f"A y of shape (n,) or (n, n_targets) is expected, got y of shape {values.shape}.")
        single = values.ndim == 1
        return cls(values[:, None] if single else values, single, SquaredError(huber), scale)

    def __len__(self) -> int:
        return len(self.values)

    @property
    def groups(self) -> np.ndarray:
        """All are of one."""
        return np.zeros(len(self.values), dtype=int)

    @property
    def meaning(self) -> Scale:
        """What outputs fitted to them stand for, once it is measured."""
        assert self.scale is not None
        return self.scale

    def measured(self, rows: np.ndarray, weights: np.ndarray) -> Numbers:
        """The same, with the scale of some rows, unless an earlier fit has decided it."""
        if self.scale is not None:
            return self
        return replace(self, scale=Scale.of(self.values[rows], weights[rows], self.single, robust=self.loss.huber))

    def targets(self, rows: np.ndarray, weights: np.ndarray) -> Targets:
        """What to train on in some rows; weights are those of all rows."""
        return Targets(self.meaning.standard(self.values[rows]), even(weights[rows]), self.loss)


@dataclass(frozen=True)
class SquaredError:
    """Of outputs of shape (n, n_targets), the mean over the targets.

    Parameters
    ----------
    huber : bool
        Half the squared error up to one spread of the target, and linear beyond.
    """

    huber: bool = False

    dtype = torch.float32

    def __call__(self, outputs: torch.Tensor, targets: torch.Tensor, *, mean: bool = False) -> torch.Tensor:
        """Error of each image, of shape (n,), or their mean."""
        error = F.huber_loss if self.huber else F.mse_loss
        each = error(outputs, targets, reduction="mean" if mean else "none")
        return each if mean else each.mean(1)

    def mixable(self, targets: torch.Tensor) -> torch.Tensor:
        """As they are."""
        return targets

    def score(self, outputs: torch.Tensor, targets: torch.Tensor, weights: np.ndarray) -> float:
        """R2, which no scale changes; NaN of fewer than two images."""
        if len(targets) < 2:
            return float("nan")
        return float(r2_score(targets.numpy(), outputs.numpy(), sample_weight=weights))

    def probe(
        self, rows: np.ndarray, targets: np.ndarray, weights: np.ndarray, strength: float, out: nn.Linear
    ) -> None:
        """Set a linear layer to ridge regression; ``strength`` is its alpha, 0 for one that it chooses itself."""
        standard, mean, spread = standardised(rows.astype(np.float64), _LEAST_SPREAD)  # small penalties need the digits
        if self.huber:
            targets = targets.clip(-_FURTHEST, _FURTHEST)
        few = len(rows) < 3  # nothing to leave out
        model = Ridge(strength or 1.0) if strength or few else RidgeCV(_PENALTIES, alpha_per_target=True)
        # Past what others wrap around it, as in the logistic regression of a classifier's head.
        inspect.unwrap(type(model).fit)(model, standard, targets, sample_weight=weights)
        set_linear(out, np.atleast_2d(model.coef_), np.atleast_1d(model.intercept_), mean, spread)

"""What a search found, and what it took."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from sklearn.model_selection import StratifiedKFold

from featx.cli.outcomes import Broken
from featx.cli.scoring import Score
from featx.extractor import PretrainedFeatureExtractor


@dataclass(frozen=True)
class Effort:
    """What one network took.

    Attributes
    ----------
    backbone : str
    n_computed : int
        Photos that went through the network; the others were in the cache.
    pass_seconds, scoring_seconds : float
        Until the features were known, and for all classifiers.
    """

    backbone: str
    n_computed: int
    pass_seconds: float
    scoring_seconds: float

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Found:
    """A search that is done.

    Attributes
    ----------
    folder : str
        As it was given.
    command : sequence of str
        The words that started the search, without the program's name.
    paths : list of str
        Photos that could be read.
    y : ndarray of shape (n_photos,), str
        Their classes.
    broken : sequence of Broken
        The others.
    folds : StratifiedKFold
    ranked : sequence of Score
        Best first.
    extractors : dict of str to PretrainedFeatureExtractor
        By backbone; their caches know the features.
    efforts : sequence of Effort
    """

    folder: str
    command: Sequence[str]
    paths: list[str]
    y: np.ndarray
    broken: Sequence[Broken]
    folds: StratifiedKFold
    ranked: Sequence[Score]
    extractors: dict[str, PretrainedFeatureExtractor]
    efforts: Sequence[Effort]

    @property
    def best(self) -> Score:
        """The first of the ranking."""
        return self.ranked[0]

    @property
    def classes(self) -> list[str]:
        """Names, sorted."""
        return np.unique(self.y).tolist()

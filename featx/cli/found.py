"""What a search found, and what it took."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from sklearn.model_selection import StratifiedKFold

from featx.cli.outcomes import Broken, shown
from featx.cli.scoring import Score
from featx.cli.sources import Labelled, Source
from featx.estimators.extractor import PretrainedFeatureExtractor
from featx.system.shell import typed


def as_typed(words: Sequence[str]) -> str:
    """A command of featx, as one types it."""
    return shown(typed(["featx", *words]))


@dataclass(frozen=True)
class Effort:
    """What one network took.

    Attributes
    ----------
    backbone : str
    n_computed : int
        Photos that this process sent through the network, again where nothing could be kept; the others were in the
        cache.
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
    source : Source
        Where the photos come from.
    command, next_command : sequence of str
        The words that started the search, and those that fit its best choice.
    cached : bool
        Whether features are kept for later.
    photos : Labelled
        Those that could be read.
    broken : sequence of Broken
        The others.
    folds : StratifiedKFold
    ranked : sequence of Score
        Best first.
    extractors : dict of str to PretrainedFeatureExtractor
        By backbone; their caches know the features.
    efforts : sequence of Effort
    """

    source: Source
    command: Sequence[str]
    next_command: Sequence[str]
    cached: bool
    photos: Labelled
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
        return np.unique(self.photos.y).tolist()

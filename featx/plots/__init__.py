"""Pictures of what was computed, by scikit-learn's Display convention; matplotlib is needed when one is drawn.

In come fitted estimators, X and what they say of it; out come displays, whose ``plot`` draws on an Axes of
matplotlib. A display computes in its class methods (``from_estimator``, ...) and draws in ``plot``, so that it can
be drawn again.

Open ``display.py`` first (what all share: an Axes, text that is shown as it is, galleries), then ``pictures.py``
(images to look at, read exactly as the estimator reads them), then any of the displays: ``layer_score.py``,
``training_curve.py``, ``neighbors.py``, ``embedding.py``, ``activation_map.py``, ``class_map.py``, ``mistakes.py``.

Law 6 of CONTRIBUTING.md lives here: ``import featx.plots`` does not import matplotlib, and whoever draws without it
is told what to install before anything is computed.
"""

from featx.plots.activation_map import ActivationMapDisplay
from featx.plots.class_map import ClassMapDisplay
from featx.plots.embedding import EmbeddingDisplay
from featx.plots.layer_score import LayerScoreDisplay
from featx.plots.mistakes import MistakesDisplay
from featx.plots.neighbors import NeighborsDisplay
from featx.plots.training_curve import TrainingCurveDisplay

__all__ = [
    "ActivationMapDisplay",
    "ClassMapDisplay",
    "EmbeddingDisplay",
    "LayerScoreDisplay",
    "MistakesDisplay",
    "NeighborsDisplay",
    "TrainingCurveDisplay",
]

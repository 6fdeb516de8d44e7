"""Pictures of what was computed, by scikit-learn's Display convention; matplotlib is needed when one is drawn."""

from featx.plots.activation_map import ActivationMapDisplay
from featx.plots.embedding import EmbeddingDisplay
from featx.plots.layer_score import LayerScoreDisplay
from featx.plots.mistakes import MistakesDisplay
from featx.plots.neighbors import NeighborsDisplay
from featx.plots.training_curve import TrainingCurveDisplay

__all__ = [
    "ActivationMapDisplay",
    "EmbeddingDisplay",
    "LayerScoreDisplay",
    "MistakesDisplay",
    "NeighborsDisplay",
    "TrainingCurveDisplay",
]

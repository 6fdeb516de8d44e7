"""featx: transfer learning for scikit-learn."""

from featx._version import __version__
from featx.backbones import list_backbones, list_layers
from featx.estimators.classifier import FineTuneClassifier
from featx.estimators.extractor import PretrainedFeatureExtractor
from featx.images import find_unreadable, load_image_folder
from featx.store import FeatureStore

__all__ = [
    "FeatureStore",
    "FineTuneClassifier",
    "PretrainedFeatureExtractor",
    "__version__",
    "find_unreadable",
    "list_backbones",
    "list_layers",
    "load_image_folder",
]

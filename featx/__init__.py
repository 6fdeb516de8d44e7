"""featx: transfer learning for scikit-learn."""

from featx._version import __version__
from featx.backbones import list_backbones, list_layers
from featx.estimators.classifier import FineTuneClassifier
from featx.estimators.extractor import PretrainedFeatureExtractor
from featx.estimators.regressor import FineTuneRegressor
from featx.estimators.transfer import TransferClassifier
from featx.images import find_unreadable, load_image_folder
from featx.store import FeatureStore

__all__ = [
    "FeatureStore",
    "FineTuneClassifier",
    "FineTuneRegressor",
    "PretrainedFeatureExtractor",
    "TransferClassifier",
    "__version__",
    "find_unreadable",
    "list_backbones",
    "list_layers",
    "load_image_folder",
]

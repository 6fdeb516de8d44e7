"""Few-shot transfer: pretrained features against raw pixels.

    python examples/demo.py                        # real handwritten digits, five labels a class, twenty draws
    python examples/demo.py --photos FOLDER        # your own photos: one subfolder per class

Every choice (layer, pooling, regularisation) is made by cross-validation on the labelled part alone; what is printed
is the accuracy on images that no choice has seen. Runs offline with the embedded network, about five minutes on two
cores.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator

import numpy as np
from sklearn.base import BaseEstimator
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, StratifiedKFold, StratifiedShuffleSplit, train_test_split
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC
from tqdm.auto import tqdm

from featx import PretrainedFeatureExtractor, load_image_folder

C_VALUES = [0.001, 0.01, 0.1, 1.0]


def search(model: BaseEstimator, grid: dict, seed: int = 0) -> GridSearchCV:
    """The one protocol for all: five stratified folds of the labelled part."""
    return GridSearchCV(model, grid, cv=StratifiedKFold(5, shuffle=True, random_state=seed))


def raw_logistic_regression(seed: int) -> GridSearchCV:
    return search(
        make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000)), {"logisticregression__C": C_VALUES}, seed
    )


def raw_svc(seed: int) -> GridSearchCV:
    return search(SVC(), {"C": [0.1, 1, 10, 100], "gamma": ["scale", 1e-4, 3e-4, 1e-3, 3e-3, 1e-2]}, seed)

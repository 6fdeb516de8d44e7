"""
Clustering without labels
=========================

Sort pictures into heaps before anybody has labelled one. ``KMeans`` finds heaps in whatever space it is given; on raw
pixels two digits are close if they cover the same pixels, on a network's features if they have the same strokes.

Runs offline, in about 11 seconds on two cores.
"""

# %%
# The labels are loaded to judge the result, and play no part in it.

import matplotlib.pyplot as plt
import numpy as np
from sklearn.cluster import KMeans
from sklearn.datasets import load_digits
from sklearn.decomposition import PCA
from sklearn.metrics import adjusted_rand_score
from sklearn.pipeline import make_pipeline

from featx import PretrainedFeatureExtractor

X, y = load_digits(return_X_y=True)

# %%
# Three steps without a y: features over 4 x 4 parts of the picture, so that the layout counts; their thirty strongest
# directions; ten heaps.

extractor = PretrainedFeatureExtractor(
    "featx_micro", layers=2, grid=4, normalize="l2", image_shape=(8, 8), pixel_range=(0, 16), image_size=16
)
rows = make_pipeline(extractor, PCA(30, random_state=0)).fit_transform(X)
heaps = KMeans(10, n_init=10, random_state=0).fit(rows)
of_features = heaps.labels_
of_pixels = KMeans(10, n_init=10, random_state=0).fit_predict(X)

# %%
# The adjusted Rand index is 1 where heaps and classes are the same, and 0 on average where they have nothing to do with
# each other.

scores = {"raw pixels": adjusted_rand_score(y, of_pixels), "pretrained features": adjusted_rand_score(y, of_features)}
for name, value in scores.items():
    print(f"{name:20s} adjusted Rand index {value:.3f}")

# %%
# Every heap: the twelve digits nearest to its centre, and what share of it the most frequent digit is.

distances = heaps.transform(rows)
figure, axes = plt.subplots(10, 1, figsize=(6, 6), layout="constrained")
for heap, ax in enumerate(axes):
    members = np.flatnonzero(of_features == heap)
    nearest = members[np.argsort(distances[members, heap])[:12]]
    ax.imshow(np.hstack(X[nearest].reshape(-1, 8, 8)), cmap="gray_r")
    counts = np.bincount(y[members], minlength=10)
    ax.set_ylabel(f"{counts.max() / len(members):.0%} are {counts.argmax()}", rotation=0, ha="right", va="center")
    ax.set(xticks=[], yticks=[])
figure.suptitle("Ten heaps, none of which has seen a label")

print(f"adjusted Rand index {scores['pretrained features']:.3f}, baseline {scores['raw pixels']:.3f}")
if plt.get_backend().lower() != "agg":
    plt.show()

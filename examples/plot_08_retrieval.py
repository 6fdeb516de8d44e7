"""
Retrieval: find photos that show the same
=========================================

No labels, no training: two photos are alike if their features point in the same direction. All photos lie on the table
when the question is asked (the setting is called *transductive*), so the unlabelled collection itself may teach
something: here, no more than its mean, which is what all photos have in common and so tells none of them apart.

Runs offline, in about 11 seconds on two cores. With the real photos of ants and bees (``FEATX_DATA``), else with
pieces of scikit-learn's two photos.
"""

# %%
# Labels are loaded, but used for nothing except to say how good the answers are.

import tempfile

import matplotlib.pyplot as plt
import numpy as np
from example_data import imagenet_network, photo_folder
from PIL import Image
from sklearn.neighbors import NearestNeighbors

from featx import PretrainedFeatureExtractor

folder = tempfile.TemporaryDirectory()
photos = photo_folder(folder.name)
features = PretrainedFeatureExtractor(**imagenet_network(), normalize="l2").transform(photos.data)

# %%
# Precision at 5: of the five photos nearest to a query, how many show what it shows? Every photo is the query once.


def neighbours(rows):
    """Row numbers of the five nearest other photos of each, by the angle between their features."""
    index = NearestNeighbors(n_neighbors=5, metric="cosine").fit(rows)
    return index.kneighbors(return_distance=False)


def precision(found):
    return (photos.target[found] == photos.target[:, None]).mean()


as_they_are = neighbours(features)
centred = neighbours(features - features.mean(axis=0))
thumbnails = [np.asarray(Image.open(path).convert("RGB").resize((16, 16))).ravel() / 255 for path in photos.data]
of_thumbnails = neighbours(np.array(thumbnails) - np.mean(thumbnails, axis=0))
chance = np.square(np.bincount(photos.target) / len(photos.target)).sum()
for name, value in {
    "five photos at random": chance,
    "nearest thumbnails": precision(of_thumbnails),
    "nearest features": precision(as_they_are),
    "nearest centred features": precision(centred),
}.items():
    print(f"{name:26s} precision at 5: {value:.3f}")

# %%
# Four queries, at random, and what is nearest to each. A green title is the right kind.

queries = np.random.default_rng(0).choice(len(photos.data), 4, replace=False)
figure, axes = plt.subplots(4, 6, figsize=(11, 7), layout="constrained")
for line, query in zip(axes, queries, strict=True):
    for ax, row in zip(line, [query, *centred[query]], strict=True):
        ax.imshow(Image.open(photos.data[row]).convert("RGB").resize((200, 150)))
        right = photos.target[row] == photos.target[query]
        name = photos.target_names[photos.target[row]]
        if row == query:
            ax.set_title(f"query: {name}", fontsize=10, fontweight="bold")
        else:
            ax.set_title(name, fontsize=10, color="tab:green" if right else "tab:red")
        ax.axis("off")

print(f"precision at 5 {precision(centred):.3f}, baseline {precision(of_thumbnails):.3f}")
folder.cleanup()
if plt.get_backend().lower() != "agg":
    plt.show()

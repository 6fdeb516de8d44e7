"""
Photos beside tabular columns
=============================

A catalogue, a patient's record, a flat to let: photos rarely come alone. In a ``ColumnTransformer`` the extractor takes
one column of a frame, and the other columns go their usual way. Here the other columns are what the files themselves
tell: width and height of the photo, and how many kilobytes it takes.

Runs offline, in about 11 seconds on two cores. With the real photos of ants and bees (``FEATX_DATA``), else with
pieces of scikit-learn's two photos.
"""

# %%
# A frame with a column of paths and three of numbers.

import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
from example_data import imagenet_network, photo_folder
from PIL import Image
from sklearn.compose import ColumnTransformer
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from featx import PretrainedFeatureExtractor


def size_of(path):
    with Image.open(path) as photo:
        return photo.size


folder = tempfile.TemporaryDirectory()
photos = photo_folder(folder.name)
frame = pd.DataFrame({"photo": photos.data})
frame[["width", "height"]] = [size_of(path) for path in photos.data]
frame["kilobytes"] = [Path(path).stat().st_size / 1000 for path in photos.data]
numbers = ["width", "height", "kilobytes"]
print(frame[numbers].describe().loc[["mean", "min", "max"]].round(1))

# %%
# One transformer for both kinds of column. The photos go through the network once: the cache serves all other folds.

cache = tempfile.TemporaryDirectory()
extractor = PretrainedFeatureExtractor(**imagenet_network(), normalize="l2", cache=cache.name)
of_photo = ("of_photo", extractor, "photo")
of_file = ("of_file", "passthrough", numbers)
columns = {
    "numbers alone": ColumnTransformer([of_file]),
    "photo alone": ColumnTransformer([of_photo]),
    "both": ColumnTransformer([of_photo, of_file]),
}

# %%
# The same classifier on each.

folds = StratifiedKFold(5, shuffle=True, random_state=0)
scores = {}
for name, transformer in columns.items():
    model = make_pipeline(transformer, StandardScaler(), LogisticRegression(C=0.01, max_iter=1000))
    scores[name] = cross_val_score(model, frame, photos.target, cv=folds)
    print(f"{name:14s} {scores[name].mean():.3f} +- {scores[name].std():.3f} over the folds")

# %%
# Column names say where each feature is from, in pandas and polars output too.

table = columns["both"].set_output(transform="pandas").fit_transform(frame.head(3))
print(table.iloc[:, [0, 1, -2, -1]].round(2))

# %%
# Whether the numbers add anything to the photo is for the folds to say. Here they do not: what a file weighs says
# little about ants and bees. Of columns that matter the same lines make use.

figure, axes = plt.subplots(figsize=(5, 3.5), layout="constrained")
axes.boxplot(list(scores.values()), tick_labels=list(scores))
axes.set(ylabel="accuracy", title="Five folds")

print(f"accuracy {scores['both'].mean():.3f}, baseline {scores['numbers alone'].mean():.3f}")
cache.cleanup()
folder.cleanup()
if plt.get_backend().lower() != "agg":
    plt.show()

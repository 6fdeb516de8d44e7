"""
Handwritten digits by transfer
==============================

Five labelled digits of each kind are few for a classifier that starts from raw pixels. A network that has seen other
pictures brings along what it learnt there: edges, strokes and how they meet. Here it is ``featx_micro``, which travels
inside the package and was trained on photos of animals and vehicles, never on digits.

Runs offline, in about 8 seconds on two cores.
"""

# %%
# The data: 1,797 digits of 8 x 8 pixels, with values from 0 to 16, one flattened image a row.

import matplotlib.pyplot as plt
import numpy as np
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedShuffleSplit, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from featx import PretrainedFeatureExtractor

X, y = load_digits(return_X_y=True)

# %%
# The second stage of the network, averaged over 2 x 2 parts of the picture, so that some of the layout is kept.
# ``image_shape`` and ``pixel_range`` say how a row becomes a picture, ``image_size`` shows it at twice its size;
# everything else is scikit-learn as ever.

extractor = PretrainedFeatureExtractor(
    "featx_micro", layers=2, grid=2, image_shape=(8, 8), pixel_range=(0, 16), image_size=16
)

# %%
# The features of an image depend on that image alone: ``fit`` learns nothing. They may therefore be computed ahead of
# the split, once, without telling the classifier anything about the digits that it is tested on. (In a pipeline with
# ``cache=`` this comes by itself: see the next example.)

features = extractor.transform(X)
print(f"{X.shape[1]} pixels become {features.shape[1]} features")

# %%
# Twenty draws of fifty labelled digits; the other 1,747 are the test. Both rows go through the same classifier.

draws = StratifiedShuffleSplit(n_splits=20, train_size=50, random_state=0)
classifier = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=1000))
on_pixels = cross_val_score(classifier, X, y, cv=draws)
on_features = cross_val_score(classifier, features, y, cv=draws)

# %%
# Each grey line is one draw.

figure, axes = plt.subplots(figsize=(5, 4), layout="constrained")
axes.plot([0, 1], np.array([on_pixels, on_features]), color="0.75", zorder=1)
axes.scatter(np.repeat([0, 1], 20), np.concatenate([on_pixels, on_features]), s=14, zorder=2)
axes.set_xticks([0, 1], ["raw pixels", "pretrained features"])
axes.set(xlim=(-0.4, 1.4), ylabel="accuracy on the other digits", title="Fifty labelled digits, twenty draws")

# %%
# Not one draw would have been better off with the pixels if the smallest gain below is positive.

print(f"smallest gain of a draw {np.min(on_features - on_pixels):+.3f}")
print(f"accuracy {on_features.mean():.3f}, baseline {on_pixels.mean():.3f}")
if plt.get_backend().lower() != "agg":
    plt.show()

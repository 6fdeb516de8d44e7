"""
Head2Toe: features of all layers, then a choice among them
==========================================================

Reading the last layer alone is a habit. Head2Toe [1]_ reads every layer, brings each to the same length, keeps the
features that a linear model finds most useful, and trains the final linear model on those. With scikit-learn's own
pieces it is a pipeline of four steps.

Runs offline, in about 13 seconds on two cores.

References
----------
.. [1] U. Evci et al., "Head2Toe: Utilizing Intermediate Representations for Better Transfer Learning", ICML 2022.
"""

# %%
# Nine hundred digits: far from what ``featx_micro`` was trained on, which is where its middle layers know more than its
# last.

import tempfile

import matplotlib.pyplot as plt
import numpy as np
from sklearn.datasets import load_digits
from sklearn.feature_selection import SelectFromModel
from sklearn.linear_model import LogisticRegression, RidgeClassifier
from sklearn.model_selection import StratifiedShuffleSplit, cross_val_score
from sklearn.pipeline import make_pipeline

from featx import PretrainedFeatureExtractor

X, y = load_digits(return_X_y=True)
X, y = X[:900], y[:900]
cache = tempfile.TemporaryDirectory()
last_layer = PretrainedFeatureExtractor(
    "featx_micro", image_shape=(8, 8), pixel_range=(0, 16), image_size=16, normalize="l2", cache=cache.name
)

# %%
# All stages over 2 x 2 parts of the picture, each of length 1 (``normalize="l2"`` is per layer). A feature's use is the
# norm of its weights over the ten classes, as in the paper; the paper gets there by a group lasso, here it is ridge
# regression, which is quicker. A quarter is kept.

all_layers = PretrainedFeatureExtractor(**last_layer.get_params() | {"layers": "all", "grid": 2})
n_features = len(all_layers.get_feature_names_out())
selection = SelectFromModel(RidgeClassifier(alpha=0.1), threshold=-np.inf, max_features=n_features // 4, norm_order=2)
linear = LogisticRegression(C=100, max_iter=2000)
head2toe = make_pipeline(all_layers, selection, linear)

# %%
# Five draws of a hundred labelled digits. The choice of features is made anew on the labelled part of each.

draws = StratifiedShuffleSplit(n_splits=5, train_size=100, random_state=0)
scores = {
    "last layer": cross_val_score(make_pipeline(last_layer, linear), X, y, cv=draws),
    "all layers": cross_val_score(make_pipeline(all_layers, linear), X, y, cv=draws),
    "Head2Toe": cross_val_score(head2toe, X, y, cv=draws),
}
for name, values in scores.items():
    print(f"{name:12s} {values.mean():.3f} +- {values.std():.3f} over the draws")

# %%
# All layers beat the last one by far; the choice among them then costs nothing: a quarter of the features is as good
# as all. Where the kept ones come from, in one fit:

labelled, _ = next(draws.split(X, y))
head2toe.fit(X[labelled], y[labelled])
names = head2toe[:-1].get_feature_names_out()
stages = [name.split("_avg")[0] for name in all_layers.get_feature_names_out()]
order = list(dict.fromkeys(stages))
kept = [sum(name.startswith(f"{stage}_avg") for name in names) / stages.count(stage) for stage in order]

figure, axes = plt.subplots(figsize=(6, 3.5), layout="constrained")
axes.bar(order, kept)
axes.axhline(0.25, color="0.5", linestyle="--", linewidth=1, label="if it were the same everywhere")
axes.set(xlabel="stage, shallow to deep", ylabel="share of its features kept", ylim=(0, 0.5))
axes.legend()

print(f"accuracy {scores['Head2Toe'].mean():.3f}, baseline {scores['last layer'].mean():.3f}")
cache.cleanup()
if plt.get_backend().lower() != "agg":
    plt.show()

"""
The textbook's VGG16 recipe in one line
=======================================

"Take VGG16 without its top, freeze it, put a dense layer on it, train ten epochs with Adam." Most courses on transfer
learning begin with it, and it takes them a page: a generator, a model, a loop. Here it is one line, and then a look at
what the line means.

So that this runs offline and quickly, VGG16 has random weights here, and the pictures are a few digits at 32 x 32
pixels. With ``weights="DEFAULT"``, which fetches 528 MB once, and without ``image_size`` the line is the textbook's.
What pretrained weights change can be seen all the same, on the network that is at hand.

Runs in about 7 seconds on two cores.
"""

# %%
# Three hundred digits, half of them to learn from.

import time
import warnings

import matplotlib.pyplot as plt
from sklearn.datasets import load_digits
from sklearn.exceptions import ConvergenceWarning
from sklearn.model_selection import train_test_split
from sklearn.neural_network import MLPClassifier
from sklearn.pipeline import make_pipeline

from featx import FineTuneClassifier, PretrainedFeatureExtractor

digits = load_digits()
train, test, y_train, y_test = train_test_split(
    digits.images, digits.target, train_size=150, test_size=150, stratify=digits.target, random_state=0
)

# %%
# The recipe. ``layers=-1`` is the last convolutional stage ("without its top"), averaged over the picture;
# ``linear_probe=False`` starts the head at random and ``lr_schedule="constant"`` leaves Adam's rate alone, as the
# textbook does.

recipe = {
    "layers": -1,
    "freeze": "all",
    "hidden_layer_sizes": (256,),
    "optimizer": "adam",
    "linear_probe": False,
    "lr_schedule": "constant",
    "warmup": 0.0,
    "epochs": 10,
    "pixel_range": (0, 16),
    "random_state": 0,
}
start = time.perf_counter()
vgg16 = FineTuneClassifier("vgg16", weights=None, image_size=32, **recipe).fit(train, y_train)
print(f"VGG16, random weights: {vgg16.n_iter_} epochs in {time.perf_counter() - start:.1f} s")

# %%
# The same line with a network that has learnt something: an eighth of its convolutional weights, but pretrained.

start = time.perf_counter()
pretrained = FineTuneClassifier("featx_micro", **recipe).fit(train, y_train)
print(f"featx_micro, pretrained: {pretrained.n_iter_} epochs in {time.perf_counter() - start:.1f} s")

# %%
# What the line means. What is frozen computes the same in every epoch: it is a transformer, and what is trained is a
# small network on its rows. A loop written by hand pushes each picture through VGG16 ten times; ``FineTuneClassifier``
# does it once, like the two steps below. (They are not the same to the last digit: scikit-learn draws other weights to
# start from.)

steps = make_pipeline(
    PretrainedFeatureExtractor("featx_micro", layers=-1, pixel_range=(0, 16)),
    MLPClassifier((256,), solver="adam", batch_size=32, max_iter=10, tol=0, n_iter_no_change=10, random_state=0),
)
with warnings.catch_warnings(action="ignore", category=ConvergenceWarning):  # ten epochs are meant to be few
    steps.fit(train, y_train)

# %%
# And what can be had from the same network with the same labels: start the head from a logistic regression instead of
# at random (which is the default), on a stage that suits digits better.

better = {"layers": 2, "grid": 2, "freeze": "all", "pixel_range": (0, 16), "random_state": 0}
probed = FineTuneClassifier("featx_micro", **better).fit(train, y_train)

# %%
# With random weights the recipe is not much better than guessing (0.1): all that it has of transfer learning is the
# name. The weights are the recipe.

scores = {
    "recipe, VGG16,\nrandom weights": vgg16.score(test, y_test),
    "recipe, featx_micro,\npretrained": pretrained.score(test, y_test),
    "the same\nin two steps": steps.score(test, y_test),
    "featx's\ndefaults": probed.score(test, y_test),
}
figure, axes = plt.subplots(figsize=(7, 3.5), layout="constrained")
axes.bar_label(axes.bar(list(scores), list(scores.values())), fmt="%.2f")
axes.set(ylabel="accuracy", ylim=(0, 1.05), title="150 labelled digits, 150 to be judged")

random_weights, with_weights, *_ = scores.values()
print(f"accuracy {with_weights:.3f}, baseline {random_weights:.3f}")
if plt.get_backend().lower() != "agg":
    plt.show()

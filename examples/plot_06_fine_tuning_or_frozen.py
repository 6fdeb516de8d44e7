"""
Fine-tuning against frozen features, by number of labels
========================================================

With few labels, a linear model on frozen features is hard to beat: there is little to learn the network's many weights
from. With more labels, letting the network move pays. Where the one overtakes the other is worth knowing before one
waits for a training run.

Runs offline, in about 14 seconds on two cores.
"""

# %%
# Digits at 16 x 16 pixels, which ``featx_micro`` was not trained on. The last three hundred are the test.

import tempfile
import time

import matplotlib.pyplot as plt
import numpy as np
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from featx import FineTuneClassifier, PretrainedFeatureExtractor

digits = load_digits()
pool, y_pool = digits.images[:-300], digits.target[:-300]
test, y_test = digits.images[-300:], digits.target[-300:]
pictures = {"backbone": "featx_micro", "image_size": 16, "pixel_range": (0, 16)}

# %%
# Two models that differ in one thing: whether the network is trained too. Both read the last layer before the output,
# and fine-tuning starts from a linear model on the frozen features (its default), so it begins where the other ends.
# The first stage stays frozen, and ten epochs are few: both keep the example short.

cache = tempfile.TemporaryDirectory()
frozen = make_pipeline(
    PretrainedFeatureExtractor(**pictures, cache=cache.name), StandardScaler(), LogisticRegression(C=0.1, max_iter=1000)
)
tuned = FineTuneClassifier(**pictures, freeze=1, epochs=10, random_state=0)

# %%
# Labels a class, drawn from the pool; two draws where there are few.

sizes = {2: 2, 5: 2, 20: 1, 40: 1}
scores = {"frozen": {}, "tuned": {}}
for per_class, n_draws in sizes.items():
    for draw in range(n_draws):
        rng = np.random.default_rng(draw)
        rows = np.concatenate([rng.choice(np.flatnonzero(y_pool == c), per_class, replace=False) for c in range(10)])
        for name, model in (("frozen", frozen), ("tuned", tuned)):
            start = time.perf_counter()
            score = model.fit(pool[rows], y_pool[rows]).score(test, y_test)
            scores[name].setdefault(per_class, []).append(score)
            print(f"{per_class:3d} labels a class, {name:6s} {score:.3f} in {time.perf_counter() - start:4.1f} s")

# %%
# Mean of the draws; dots are the draws.

figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
for (name, of_sizes), color in zip(scores.items(), ("tab:blue", "tab:orange"), strict=True):
    axes.plot(list(of_sizes), [np.mean(values) for values in of_sizes.values()], color=color, label=name)
    for per_class, values in of_sizes.items():
        axes.scatter([per_class] * len(values), values, s=14, color=color)
axes.set(xscale="log", xlabel="labels a class", ylabel="accuracy on 300 other digits")
axes.set_xticks(list(sizes), [str(size) for size in sizes], minor=False)
axes.minorticks_off()
axes.legend()

cache.cleanup()
most = max(sizes)
print(f"accuracy {np.mean(scores['tuned'][most]):.3f}, baseline {np.mean(scores['frozen'][most]):.3f}")
if plt.get_backend().lower() != "agg":
    plt.show()

"""
Which layer transfers?
======================

Shallow layers of a network answer to what is local: colour, edges, texture. Deep ones answer to what the whole picture
is about. Which of them suits depends on the question, so this example asks two of the same photos:

* *global*: is this an ant or a bee?
* *local*: from which photo was this piece cut?

Runs offline, in about 20 seconds on two cores. With the real photos of ants and bees (``FEATX_DATA``), else with
pieces of scikit-learn's two photos.
"""

# %%
# The photos with their labels, and twelve photos cut into 4 x 4 pieces, each piece labelled with its photo.

import tempfile

import matplotlib.pyplot as plt
import numpy as np
from example_data import imagenet_network, photo_folder
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from featx import PretrainedFeatureExtractor, list_layers

folder = tempfile.TemporaryDirectory()
photos = photo_folder(folder.name)


def pieces(path):
    picture = np.asarray(Image.open(path).convert("RGB").resize((256, 256)))
    return [picture[row : row + 64, column : column + 64] for row in range(0, 256, 64) for column in range(0, 256, 64)]


of_all, of_pieces = f"global: {' or '.join(photos.target_names)}?", "local: which photo is this a piece of?"
questions = {
    of_all: (list(photos.data), photos.target),
    of_pieces: (
        [piece for path in photos.data[:12] for piece in pieces(path)],
        np.repeat(np.arange(12), 16),
    ),
}

# %%
# One pass reads every stage. The names of the columns say which stage each comes from, so the stages need not be
# computed one by one.

extractor = PretrainedFeatureExtractor(**imagenet_network(), layers="all", normalize="l2")
names = extractor.get_feature_names_out()
stage_of_column = np.array([name.rsplit("_", 2)[0] for name in names])
stages = list(dict.fromkeys(stage_of_column))
print("stages, shallow to deep:", ", ".join(stages))
print("the same as a list:", list_layers(extractor.backbone))

# %%
# The same linear classifier on each stage alone.

classifier = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=1000))
folds = StratifiedKFold(5, shuffle=True, random_state=0)
scores = {}
for question, (X, y) in questions.items():
    features = extractor.transform(X)
    scores[question] = np.array(
        [cross_val_score(classifier, features[:, stage_of_column == stage], y, cv=folds) for stage in stages]
    )

# %%
# Mean over five folds, and the spread of the folds.

figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
for question, values in scores.items():
    axes.errorbar(
        range(len(stages)), values.mean(axis=1), yerr=values.std(axis=1), marker="o", capsize=3, label=question
    )
axes.set_xticks(range(len(stages)), stages)
axes.set(xlabel="stage, shallow to deep", ylabel="accuracy")
axes.legend()
best = {question: int(values.mean(axis=1).argmax()) for question, values in scores.items()}
for question, stage in best.items():
    print(f"{question:40s} best at {stages[stage]}, stage {stage}")

# %%
# The figures: for the global question, the best stage and the first.

means = scores[of_all].mean(axis=1)
print(f"accuracy {means.max():.3f}, baseline {means[0]:.3f}")
folder.cleanup()
if plt.get_backend().lower() != "agg":
    plt.show()

"""
Segmentation of a photo from a few scribbles
============================================

Which pixels of this photo are the pagoda? A few strokes of a pen say what is meant; the rest is a classifier that
judges every pixel by what a pretrained network has to say there. Nothing is trained but a logistic regression.

Runs offline, with the embedded network, in about 10 seconds on two cores.
"""

# %%
# The photo, from scikit-learn, and the scribbles: lines of four pixels' width, as corners in (x, y). Red roofs, green
# ridges and dark columns on one side; sky, lake, and trees that are as green and as dark on the other. They were drawn
# as one does: first a few, then a look at the mask, then a few more where it went wrong (along the eaves).

import matplotlib.pyplot as plt
import numpy as np
import torch
from PIL import Image, ImageDraw
from sklearn.datasets import load_sample_image
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import PolynomialFeatures, StandardScaler
from torch.nn import functional

from featx import PretrainedFeatureExtractor

photo = load_sample_image("china.jpg")  # (427, 640, 3)
height, width = photo.shape[:2]
PAGODA = [
    [(205, 40), (205, 330)],
    [(110, 115), (300, 118)],
    [(95, 270), (330, 262)],
    [(230, 375), (290, 372), (345, 340)],
]
OTHER = [
    [(40, 40), (150, 50)],
    [(330, 60), (600, 120)],
    [(20, 290), (50, 300)],
    [(370, 290), (530, 270)],
    [(15, 180), (40, 240), (20, 330), (60, 410), (250, 415)],
    [(370, 400), (480, 330), (560, 390)],
    [(600, 170), (610, 400)],
    [(66, 150), (84, 95), (180, 58)],
    [(232, 60), (335, 105), (345, 200), (360, 235)],
    [(552, 200), (600, 128)],
]


def drawn(lines):
    canvas = Image.new("1", (width, height))
    for line in lines:
        ImageDraw.Draw(canvas).line(line, fill=1, width=4, joint="curve")
    return np.asarray(canvas)


marks = np.where(drawn(PAGODA), 1, np.where(drawn(OTHER), 0, -1))  # -1: not marked
marked = marks >= 0
print(f"{marked.mean():.1%} of the pixels are marked")

# %%
# Features as a map. The whole photo goes through the network in its own proportions, as a ready tensor
# (``preprocess=None``), once. ``pooling="map"`` keeps the places, and brings the deeper layers to the grid of the
# first: each cell gets what all layers see there, from local colour to the wider surroundings.

mean, std = torch.tensor([0.4914, 0.4822, 0.4465]), torch.tensor([0.2470, 0.2435, 0.2616])  # featx_micro's
tensor = ((torch.from_numpy(photo.copy()) / 255 - mean) / std).permute(2, 0, 1)[None]  # (1, 3, height, width)
extractor = PretrainedFeatureExtractor("featx_micro", layers=[1, 2, 3], pooling="map", preprocess=None)
cells = extractor.transform(tensor)  # (1, rows, columns, channels)
print("one photo, as a map of", cells.shape[1:])

# %%
# From cells to pixels by bilinear interpolation. For the marked pixels the features are interpolated; for all others it
# is enough to interpolate what the classifier says of the cells, since it is linear and gives the same.

as_map = torch.from_numpy(cells).permute(0, 3, 1, 2)  # (1, channels, rows, columns)
y, x = np.nonzero(marked)
places = np.stack([(2 * x + 1) / width - 1, (2 * y + 1) / height - 1], axis=-1)[None, None]  # in -1..1, as torch wants
at_marks = functional.grid_sample(as_map, torch.from_numpy(places).float(), align_corners=False)[0, :, 0].T.numpy()
classifier = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=1000)).fit(at_marks, marks[marked])
of_cells = classifier.decision_function(cells.reshape(-1, cells.shape[-1])).reshape(1, 1, *cells.shape[1:3])
of_pixels = functional.interpolate(torch.from_numpy(of_cells), size=(height, width), mode="bilinear")[0, 0].numpy()
mask = of_pixels > 0

# %%
# The same with each pixel's colour alone, up to third powers, for comparison.

colours = photo.reshape(-1, 3) / 255
by_colour = make_pipeline(PolynomialFeatures(3), StandardScaler(), LogisticRegression(max_iter=5000))
by_colour.fit(colours[marked.ravel()], marks[marked])
colour_mask = by_colour.predict(colours).reshape(height, width) == 1

# %%
# The truth: an outline drawn by hand around the visible pagoda, before any result was seen.

OUTLINE = [
    (197, 31), (205, 29), (214, 31), (215, 36), (213, 46), (216, 50), (217, 57), (218, 62), (224, 70), (235, 79),
    (248, 90), (262, 95), (268, 100), (280, 103), (283, 108), (293, 111), (296, 109), (298, 113), (318, 118),
    (320, 124), (316, 126), (304, 133), (294, 140), (294, 160), (304, 162), (308, 164), (318, 169), (328, 171),
    (330, 178), (323, 182), (319, 185), (319, 227), (328, 227), (328, 235), (323, 239), (325, 242), (329, 243),
    (336, 246), (351, 249), (353, 256), (346, 260), (340, 268), (340, 307), (349, 308), (349, 316), (344, 322),
    (354, 328), (371, 330), (372, 336), (365, 345), (350, 360), (340, 365), (333, 373), (326, 374), (320, 364),
    (312, 358), (303, 358), (300, 370), (302, 377), (297, 384), (310, 390), (319, 391), (320, 402), (311, 404),
    (308, 412), (303, 418), (298, 405), (292, 409), (283, 401), (279, 395), (280, 389), (262, 389), (244, 391),
    (238, 389), (232, 387), (215, 385), (206, 370), (200, 362), (180, 362), (170, 358), (161, 353), (161, 347),
    (150, 337), (146, 331), (140, 330), (128, 332), (115, 335), (108, 340), (100, 342), (80, 344), (72, 349),
    (67, 350), (60, 344), (58, 339), (61, 333), (70, 329), (73, 330), (81, 322), (81, 278), (78, 278), (67, 274),
    (62, 273), (63, 268), (62, 265), (69, 260), (70, 252), (85, 249), (90, 243), (94, 245), (92, 234), (98, 230),
    (98, 188), (92, 188), (84, 183), (86, 178), (86, 169), (104, 166), (111, 160), (115, 163), (120, 161), (120, 140),
    (110, 135), (96, 130), (94, 122), (97, 119), (97, 107), (118, 104), (123, 97), (127, 102), (144, 95), (165, 84),
    (179, 76), (193, 65), (193, 58), (195, 51), (199, 48), (196, 36),
]  # fmt: skip
canvas = Image.new("1", (width, height))
ImageDraw.Draw(canvas).polygon(OUTLINE, fill=1)
truth = np.asarray(canvas)


def iou(found):
    """Intersection over union with the truth, on the pixels that were not marked."""
    return (found & truth & ~marked).sum() / ((found | truth) & ~marked).sum()


# %%
# Scribbles, and what each classifier makes of them; the white line is the outline drawn by hand.

figure, axes = plt.subplots(1, 3, figsize=(13, 3.3), layout="constrained")
shown = photo.copy()
shown[marks == 1], shown[marks == 0] = (255, 0, 0), (0, 0, 255)
titles = ["scribbles", f"colours: IoU {iou(colour_mask):.2f}", f"features: IoU {iou(mask):.2f}"]
for ax, title, found in zip(axes, titles, (None, colour_mask, mask), strict=True):
    ax.imshow(shown if found is None else np.where(found[..., None], photo, photo // 4))
    if found is not None:
        ax.plot(*np.array([*OUTLINE, OUTLINE[0]]).T, color="white", linewidth=0.8)
    ax.set_title(title)
    ax.axis("off")

print(f"iou {iou(mask):.3f}, baseline {iou(colour_mask):.3f}")
if plt.get_backend().lower() != "agg":
    plt.show()

"""What several examples share: photos and ImageNet weights where they are at hand, shipped pictures where not.

Both are looked for in the folder that the environment variable FEATX_DATA names (default: ``shared`` beside the
repository). Without it the examples run all the same, on scikit-learn's two photos and with the embedded network.
"""

from __future__ import annotations

import os
import zipfile
from pathlib import Path
from typing import Any

from PIL import Image
from sklearn.datasets import load_sample_images
from sklearn.utils import Bunch

from featx import load_image_folder

DATA = Path(os.environ.get("FEATX_DATA", Path(__file__).resolve().parents[2] / "shared"))
WEIGHTS = DATA / "weights" / "squeezenet1_1-imagenet-features.safetensors"
ANTS_BEES = DATA / "data" / "ants-bees.zip"


def imagenet_network() -> dict[str, Any]:
    """Parameters ``backbone`` and ``weights`` of a small network that was trained on ImageNet."""
    if WEIGHTS.exists():
        return {"backbone": "squeezenet1_1", "weights": WEIGHTS}
    print(f"No ImageNet weights at {WEIGHTS}: featx_micro, trained on small pictures, takes their place.")
    return {"backbone": "featx_micro", "weights": "DEFAULT"}


def photo_folder(folder: str) -> Bunch:
    """Paths and labels of photos of two kinds, in an empty folder: ants and bees, or pieces of two photos."""
    if ANTS_BEES.exists():
        with zipfile.ZipFile(ANTS_BEES) as archive:
            archive.extractall(folder)
    else:
        print(f"No photos at {ANTS_BEES}: pieces of scikit-learn's two photos take their place.")
        for name, picture in zip(("china", "flower"), load_sample_images().images, strict=True):
            Path(folder, name).mkdir()
            for row in range(0, 416, 52):
                for column in range(0, 624, 52):
                    piece = Image.fromarray(picture[row : row + 52, column : column + 52])
                    piece.save(Path(folder, name, f"{row:03d}-{column:03d}.png"))
    return load_image_folder(folder)

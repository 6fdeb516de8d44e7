"""Real photos through a real ImageNet network."""

from __future__ import annotations

import io
import re
import zipfile
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import DATA, SQUEEZENET, relative_difference
from PIL import Image
from sklearn.base import clone
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from featx import PretrainedFeatureExtractor
from featx.backbones import micro
from featx.exceptions import WeightsError

pytestmark = pytest.mark.realdata

EXTRACTOR = PretrainedFeatureExtractor("squeezenet1_1", weights=str(SQUEEZENET))


def test_real_weights_beat_random_ones_on_real_photos(ants_bees) -> None:
    scores = {}
    for weights in (str(SQUEEZENET), None):
        extractor = clone(EXTRACTOR).set_params(weights=weights, normalize="l2")
        # The features of a photo depend on nothing else, so one pass serves all five folds.
        rows = extractor.transform(ants_bees.data)
        classifier = make_pipeline(StandardScaler(), LogisticRegression(C=0.01))
        scores[weights] = cross_val_score(classifier, rows, ants_bees.target, cv=5).mean()
    assert scores[str(SQUEEZENET)] >= 0.90, scores
    assert scores[str(SQUEEZENET)] >= scores[None] + 0.15, scores


def test_features_equal_a_plain_loop(ants_bees) -> None:
    from safetensors.torch import load_file
    from torchvision.models import SqueezeNet1_1_Weights, squeezenet1_1

    network = squeezenet1_1()
    network.load_state_dict(load_file(SQUEEZENET), strict=False)
    prepare = SqueezeNet1_1_Weights.IMAGENET1K_V1.transforms()
    paths = ants_bees.data[:8]
    with torch.inference_mode():
        images = torch.stack([prepare(Image.open(path).convert("RGB")) for path in paths])
        expected = network.eval().features(images).mean((2, 3)).numpy()
    # torchvision resizes Pillow images and featx tensors: they round differently, by one in 255.
    assert relative_difference(EXTRACTOR.transform(paths), expected) < 1e-2


def test_every_form_of_the_same_photos_gives_the_same_features(ants_bees) -> None:
    paths = ants_bees.data[:4]
    pictures = [Image.open(path).convert("RGB") for path in paths]
    arrays = [np.asarray(picture) for picture in pictures]
    forms = {
        "bytes": [Path(path).read_bytes() for path in paths],
        "PIL": pictures,
        "arrays": arrays,
        "tensors": [torch.from_numpy(array.copy()).permute(2, 0, 1) for array in arrays],
        "Series": pd.Series(paths),
        "frame column": pd.DataFrame({"photo": paths}),
    }
    expected = EXTRACTOR.transform(paths)
    worst = max(relative_difference(EXTRACTOR.transform(X), expected) for X in forms.values())
    assert worst < 1e-5, worst


def test_all_eight_orientations_of_one_photo_give_the_same_features(ants_bees) -> None:
    upright = Image.open(ants_bees.data[0]).convert("RGB")
    turns = {
        1: [],
        2: [Image.Transpose.FLIP_LEFT_RIGHT],
        3: [Image.Transpose.ROTATE_180],
        4: [Image.Transpose.FLIP_TOP_BOTTOM],
        5: [Image.Transpose.TRANSPOSE],
        6: [Image.Transpose.ROTATE_90],
        7: [Image.Transpose.TRANSVERSE],
        8: [Image.Transpose.ROTATE_270],
    }
    encoded = []
    for orientation, steps in turns.items():
        stored = upright
        for step in steps:
            stored = stored.transpose(step)
        exif = Image.Exif()
        exif[0x0112] = orientation
        buffer = io.BytesIO()
        stored.save(buffer, format="PNG", exif=exif)  # lossless, so that the pixels are the same
        encoded.append(buffer.getvalue())
    rows = EXTRACTOR.transform(encoded)
    assert relative_difference(rows, np.repeat(rows[:1], 8, axis=0)) < 1e-5


@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_batches_of_any_size_give_the_same_features(ants_bees, batch_size: int) -> None:
    paths, every = ants_bees.data[:70], clone(EXTRACTOR).set_params(layers="all")
    expected = every.transform(paths)
    assert relative_difference(clone(every).set_params(batch_size=batch_size).transform(paths), expected) < 1e-5


def test_weights_without_head_refuse_layers_behind_it() -> None:
    with pytest.raises(WeightsError, match=r"classifier\.1"):
        clone(EXTRACTOR).set_params(layers="classifier").transform([np.zeros((8, 8, 3), dtype=np.uint8)])


def test_weights_of_another_network_are_an_error_that_names_keys() -> None:
    extractor = PretrainedFeatureExtractor("resnet18", weights=SQUEEZENET)
    with pytest.raises(WeightsError, match=r"missing: conv1\.weight.*unexpected: features\.0\.bias"):
        extractor.transform([np.zeros((8, 8, 3), dtype=np.uint8)])


def test_embedded_network_is_as_good_as_its_model_card_says() -> None:
    card = Path(micro.__file__).with_name("MODEL_CARD.md").read_text()
    stated = float(re.search(r"CIFAR-10 test photos.*\| (0\.\d+) \|", card)[1])
    with zipfile.ZipFile(DATA / "data" / "cifar10-test.zip") as archive:
        names = sorted(name for name in archive.namelist() if name.endswith(".jpg"))[::10]
        photos = [archive.read(name) for name in names]
    truth = np.array([micro.CATEGORIES.index(Path(name).parent.name) for name in names])
    scores = PretrainedFeatureExtractor("featx_micro", layers="head").transform(photos)
    # A tenth of the test photos: within three standard errors of what all of them give.
    assert abs((scores.argmax(axis=1) == truth).mean() - stated) < 3 * (stated * (1 - stated) / len(truth)) ** 0.5

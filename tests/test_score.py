"""Laws of featx score: its figures are those of scikit-learn, of the photos that could be read."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import pytest
from commands import run
from pictures import encode
from sklearn.linear_model import RidgeClassifier
from sklearn.metrics import (
    balanced_accuracy_score,
    classification_report,
    confusion_matrix,
    log_loss,
)
from sklearn.pipeline import make_pipeline

from featx import PretrainedFeatureExtractor, load_image_folder
from featx.cli.judged import Judged
from featx.cli.measures import OfClasses
from featx.cli.sources import Labelled

NAMES = ("blue", "green", "red")


pytestmark = pytest.mark.usefixtures("cache")


def write(folder: Path, n: int, seed: int) -> Path:
    rng = np.random.default_rng(seed)
    for place, name in enumerate(NAMES):
        (folder / name).mkdir(parents=True)
        for i in range(n + place):
            pixels = rng.integers(0, 256, size=(32, 32, 3), dtype=np.uint8)
            pixels[..., place] //= 2
            pixels[:, : rng.integers(4, 33)] = rng.integers(0, 256, size=3)
            (folder / name / f"{i:03}.png").write_bytes(encode(pixels, "PNG"))
    return folder


@pytest.fixture
def known(tmp_path: Path) -> Path:
    run("fit", write(tmp_path / "train", 12, 0), "-o", "m.joblib", "--backbone", "featx_micro", "--layers", "-1")
    return tmp_path / "m.joblib"


def test_figures_are_those_of_scikit_learn(known: Path, tmp_path: Path) -> None:
    val = write(tmp_path / "val", 14, 1)
    (val / "red" / "broken.png").write_bytes(b"none")
    result = run("score", known, val, "--json", "--report", "s.html")
    found, model = json.loads(result.stdout), joblib.load(known)
    photos = load_image_folder(val, shuffle=False)
    good = np.array([not path.endswith("broken.png") for path in photos.data])
    y = np.asarray(photos.target_names)[photos.target[good]]
    proba = model.predict_proba(photos.data[good])
    predicted, confidence = model.classes_[proba.argmax(axis=1)], proba.max(axis=1)
    right = predicted == y
    assert 0.4 < right.mean() < 1
    assert (found["n_photos"], found["n_used"], found["n_right"]) == (46, 45, right.sum())
    assert [row["path"] for row in found["broken"]] == [str(val / "red" / "broken.png")]
    assert found["accuracy"] == right.mean()
    assert found["balanced_accuracy"] == pytest.approx(balanced_accuracy_score(y, predicted))
    assert found["log_loss"] == pytest.approx(log_loss(y, proba, labels=model.classes_), rel=1e-4)
    assert found["confusion"] == confusion_matrix(y, predicted).tolist()
    told = classification_report(y, predicted, output_dict=True)
    for row in found["by_class"]:
        wanted = told[row["label"]]
        assert (row["recall"], row["precision"], row["f1"], row["n_photos"]) == pytest.approx(
            (wanted["recall"], wanted["precision"], wanted["f1-score"], wanted["support"])
        )
    # The definition of the error, photo by photo.
    place = np.minimum((confidence * 10).astype(int), 9)
    error = sum(abs((confidence - right)[place == k].sum()) for k in range(10)) / len(y)
    assert found["calibration_error"] == pytest.approx(error, rel=1e-5)
    low, high = found["interval"]
    for limit in (low, high):  # Wilson's: where the normal approximation at the limit itself just holds
        assert abs(right.mean() - limit) == pytest.approx(1.959964 * np.sqrt(limit * (1 - limit) / len(y)), rel=1e-4)
    worst = [row["path"] for row in found["worst"]]
    order = np.argsort(-confidence[~right], kind="stable")
    assert worst == photos.data[good][~right][order][:10].tolist()
    assert found["confused"][0]["n_photos"] == (confusion_matrix(y, predicted) * (1 - np.eye(3))).max()
    page = Path("s.html").read_text()
    assert f"<strong>{right.mean():.3f}</strong>" in page
    assert page.count('class="map"') == (~right).sum()
    text = run("score", known, val).stdout
    assert f"Accuracy {right.mean():.3f} ({right.sum()} of 45 photos; 95 % interval {low:.3f} to {high:.3f})" in text
    assert worst[0] in text
    gap = confidence.mean() - right.mean()
    wanted = (
        "as sure as it is right" if abs(gap) <= 0.05 else f"{'right' if gap < 0 else 'wrong'} more often than it says"
    )
    assert wanted in text


def test_classes_that_are_not_there_have_no_recall(known: Path, tmp_path: Path) -> None:
    val = write(tmp_path / "val", 3, 2)
    shutil.rmtree(val / "green")
    found = json.loads(run("score", known, val, "--json").stdout)
    (green,) = [row for row in found["by_class"] if row["label"] == "green"]
    assert (green["n_photos"], green["recall"]) == (0, None)
    shares = [row["recall"] for row in found["by_class"] if row["n_photos"]]
    assert found["balanced_accuracy"] == pytest.approx(np.mean(shares))


def test_classes_that_the_model_does_not_know_are_an_error(known: Path, tmp_path: Path) -> None:
    val = write(tmp_path / "val", 2, 3)
    (val / "green").rename(val / "grün")
    said = run("score", known, val, code=1).stderr
    assert "Classes of the model (blue, green, red) alone are expected, got grün in" in said
    shutil.rmtree(val / "grün")
    run("score", known, val)  # the advice works
    for photo in val.glob("*/*"):
        photo.write_bytes(b"none")
    assert "None of" in run("score", known, val, code=1).stderr


def test_a_model_without_probabilities_has_no_calibration(tmp_path: Path) -> None:
    photos = load_image_folder(write(tmp_path / "train", 6, 0))
    labels = np.asarray(photos.target_names)[photos.target]
    extractor = PretrainedFeatureExtractor("featx_micro")
    joblib.dump(make_pipeline(extractor, RidgeClassifier()).fit(photos.data, labels), "ridge.joblib")
    found = json.loads(run("score", "ridge.joblib", "train", "--json", "--report", "s.html").stdout)
    assert (found["calibration_error"], found["log_loss"], found["calibration"]) == (None, None, [])
    assert "Calibration" not in Path("s.html").read_text()


def test_classes_are_counted_whatever_their_order() -> None:
    proba = np.array([[0.7, 0.3], [0.2, 0.8], [0.4, 0.6]])
    judged = Judged(
        Labelled(["1", "2", "3"], np.array(["b", "a", "b"])), np.array(["b", "a"]), np.array([*"baa"]), proba
    )
    found: Any = OfClasses.of(judged)
    assert found.log_loss == pytest.approx(-np.mean(np.log([0.7, 0.8, 0.4])))
    assert found.confusion.tolist() == [[1, 1], [0, 1]]

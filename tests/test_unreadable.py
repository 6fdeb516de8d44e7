"""Images that cannot be read: which they are, what is said of them, and that what is said helps."""

from __future__ import annotations

import pickle
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
import polars as pl
import pytest
import torch
from pictures import encode, photo
from PIL import Image
from sklearn.base import clone
from sklearn.impute import SimpleImputer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline

from featx import FineTuneClassifier, PretrainedFeatureExtractor, find_unreadable
from featx.exceptions import ImageError
from featx.plots import ActivationMapDisplay, NeighborsDisplay

mpl.use("agg")
MICRO = PretrainedFeatureExtractor("featx_micro", image_size=16)
TUNED = FineTuneClassifier("featx_micro", image_size=16, freeze="all", epochs=1, random_state=0)
Y = np.arange(8) % 2
WAY_OUT = r"Remove it \(featx.find_unreadable lists all such rows\), or set on_error=\"nan\""


def cut(data: bytes) -> bytes:
    return data[: len(data) * 2 // 3]


@pytest.fixture
def photos(tmp_path: Path) -> list[str]:
    """Eight files; 2, 3 and 6 cannot be read."""
    whole = encode(photo(), "JPEG")
    content = [whole, encode(photo(20, 30), "PNG"), cut(whole), b"", whole, whole, cut(encode(photo(), "PNG")), whole]
    paths = [tmp_path / f"{i}.jpg" for i in range(len(content))]
    for path, data in zip(paths, content, strict=True):
        path.write_bytes(data)
    return [*map(str, paths)]


def rows_of_nan(X: Any, **parameters: Any) -> list[int]:
    """What the extractor says of the same rows."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        rows = clone(MICRO).set_params(on_error="nan", **parameters).transform(X)
    return np.flatnonzero(np.isnan(rows).any(axis=1)).tolist()


# Which they are


@pytest.mark.parametrize("n_jobs", [None, 1, 3])
def test_unreadable_rows_have_their_files_and_reasons(photos: list[str], n_jobs: int | None) -> None:
    bad = find_unreadable([*photos, str(Path(photos[0]).with_name("gone.jpg"))] * 5, n_jobs=n_jobs)
    assert bad.rows.tolist() == [9 * i + row for i in range(5) for row in (2, 3, 6, 8)]
    assert [Path(source).name for source in bad.sources[:4]] == ["2.jpg", "3.jpg", "6.jpg", "gone.jpg"]
    assert bad.reasons[0] == "truncated JPEG"
    assert bad.reasons[3] == "no such file"
    assert len(bad.sources) == len(bad.reasons) == 20


_FORMS: dict[str, Callable[[list[str]], Any]] = {
    "list": list,
    "array": lambda paths: np.array(paths, dtype=object),
    "Series": lambda paths: pd.Series(paths, index=range(90, 98)),
    "frame": lambda paths: pd.DataFrame({"path": paths}),
    "polars": lambda paths: pl.Series(paths),
    "bytes": lambda paths: [Path(path).read_bytes() for path in paths],
}


@pytest.mark.parametrize("form", _FORMS.values(), ids=_FORMS)
def test_unreadable_rows_are_those_that_the_extractor_makes_nan(
    photos: list[str], form: Callable[[list[str]], Any]
) -> None:
    X = form(photos)
    assert find_unreadable(X).rows.tolist() == rows_of_nan(X) == [2, 3, 6]


def test_parameters_mean_what_they_mean_to_the_extractor(photos: list[str]) -> None:
    ready = torch.ones(3, 3, 16, 16)
    ready[1, 0, 0, 0] = torch.nan
    rows = np.full((4, 16), 0.5)
    rows[2, 3] = np.inf
    for X, parameters, expected in (
        (photos, {"max_pixels": 1000}, [0, 2, 3, 4, 5, 6, 7]),
        ([np.full((4, 4, 3), 7, dtype="int32"), None], {"pixel_range": (0, 9)}, [1]),
        ([np.dstack([photo() / 255, np.full(photo().shape[:2], 9.0)])] * 2, {"fourth_band": "ignore"}, []),
        ([np.dstack([photo() / 255, np.full(photo().shape[:2], 9.0)])] * 2, {"fourth_band": "alpha"}, [0, 1]),
        (ready * 3, {"preprocess": None}, [1]),
        (rows, {"image_shape": (4, 4)}, [2]),
        (pd.DataFrame(rows), {"image_shape": (4, 4)}, [2]),
    ):
        assert find_unreadable(X, **parameters).rows.tolist() == expected, parameters
        assert not parameters.keys() - MICRO.get_params().keys()
        assert rows_of_nan(X, **parameters) == expected, parameters


def test_nothing_unreadable_gives_nothing() -> None:
    bad = find_unreadable([photo()] * 3)
    assert (len(bad.rows), len(bad.sources), len(bad.reasons)) == (0, 0, 0)
    assert np.delete(np.arange(3), bad.rows).tolist() == [0, 1, 2]


def test_wrong_X_is_told_as_elsewhere() -> None:
    for wrong in ([], np.zeros((3, 4)), "photo.jpg"):
        with pytest.raises((ValueError, TypeError)) as expected:
            MICRO.transform(wrong)
        with pytest.raises(type(expected.value), match=re.escape(str(expected.value))):
            find_unreadable(wrong)


def test_images_are_left_as_they_are_and_decoded_once(photos: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from featx.images import decoding

    decoded: list[int] = []
    decode = decoding.decode

    def counting(data: bytes, **options: Any) -> Any:
        decoded.append(len(data))
        return decode(data, **options)

    monkeypatch.setattr(decoding, "decode", counting)
    find_unreadable(photos)
    assert len(decoded) == len(photos)


def test_progress_is_shown_on_request(photos: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    find_unreadable(photos)
    assert not capsys.readouterr().err
    find_unreadable(photos, verbose=1)
    assert "8/8" in capsys.readouterr().err


# What is said of them, followed


def test_error_of_the_extractor_gives_two_ways_out(photos: list[str]) -> None:
    pipeline = make_pipeline(MICRO, LogisticRegression())
    with pytest.raises(
        ImageError, match=rf"^X\[2\] .* truncated JPEG\. {WAY_OUT} for a row of NaN, which most estimators refuse\.$"
    ):
        pipeline.fit(photos, Y)
    bad = find_unreadable(photos)
    assert pipeline.fit(np.delete(photos, bad.rows), np.delete(Y, bad.rows)).classes_.tolist() == [0, 1]
    assert rows_of_nan(photos) == bad.rows.tolist()


def test_warning_of_rows_of_nan_gives_two_ways_on(photos: list[str]) -> None:
    lenient = clone(MICRO).set_params(on_error="nan")
    with pytest.warns(UserWarning, match=r"^3 of 8 images could not be read; their rows are NaN") as caught:
        lenient.transform(photos)
    message = str(caught[0].message)
    assert "on_error" not in message
    assert "remove what featx.find_unreadable lists, or fill such rows in, as SimpleImputer does" in message
    assert message.endswith(f"The first: X[2] ({photos[2]!r}) is not a readable image: truncated JPEG.")
    bad = find_unreadable(photos)
    make_pipeline(lenient, LogisticRegression()).fit(np.delete(photos, bad.rows), np.delete(Y, bad.rows))
    with pytest.warns(UserWarning, match="3 of 8"):
        make_pipeline(lenient, SimpleImputer(), LogisticRegression()).fit(photos, Y)


def test_what_makes_an_image_readable_is_told_and_helps() -> None:
    X = [photo() / 1.0, photo() / 2]
    lenient = clone(MICRO).set_params(on_error="nan")
    with pytest.warns(UserWarning, match=r"^2 of 2 .*outside 0\.\.1\. .*pixel_range=\(low, high\)"):
        lenient.transform(X)
    bad = find_unreadable(X)
    assert all("outside 0..1. " in reason and "pixel_range=(low, high)" in reason for reason in bad.reasons)
    assert not len(find_unreadable(X, pixel_range=(0, 255)).rows)
    assert np.isfinite(lenient.set_params(pixel_range=(0, 255)).transform(X)).all()


@pytest.mark.parametrize("freeze", ["all", 0])
def test_error_of_the_classifier_gives_two_ways_out(photos: list[str], freeze: int | str) -> None:
    tuned = clone(TUNED).set_params(freeze=freeze)
    with pytest.raises(ImageError, match=rf"^X\[[236]\] .*\. {WAY_OUT}: fit leaves it out, predict_proba gives NaN\.$"):
        tuned.fit(photos, Y)
    bad = find_unreadable(photos)
    kept = np.delete(photos, bad.rows)
    expected = tuned.fit(kept, np.delete(Y, bad.rows)).predict_proba(kept)
    lenient = clone(tuned).set_params(on_error="nan")
    with pytest.warns(UserWarning, match=r"^3 of 8 images could not be read and are left out\. The first: X\[2\]"):
        lenient.fit(photos, Y)
    with pytest.warns(
        UserWarning, match=r"^3 of 8 images could not be read; their rows are NaN\. The first: .*JPEG\.$"
    ):
        proba = lenient.predict_proba(photos)
    assert np.flatnonzero(np.isnan(proba).any(axis=1)).tolist() == bad.rows.tolist()
    np.testing.assert_allclose(np.delete(proba, bad.rows, axis=0), expected, atol=1e-5)
    with (
        pytest.warns(UserWarning, match="3 of 8"),
        pytest.raises(ImageError, match=r"Remove what featx\.find_unreadable lists, or take predict_proba"),
    ):
        lenient.predict(photos)
    assert len(lenient.predict(kept)) == 5


def test_error_of_a_single_image_speaks_of_no_rows(photos: list[str]) -> None:
    for image, name in ((photos[2], photos[2]), (b"no picture", "bytes")):
        words = rf"^A readable image is expected, got '{re.escape(name)}': .*\. Pass another one\.$"
        with pytest.raises(ImageError, match=words):
            ActivationMapDisplay.from_estimator(MICRO, image)
        for on_error in ("raise", "nan"):
            with pytest.raises(ImageError, match=words):
                NeighborsDisplay.from_estimator(
                    clone(MICRO).set_params(on_error=on_error), image, [photos[0], photos[1]], 1
                )
    ActivationMapDisplay.from_estimator(MICRO, Image.fromarray(photo()))


def test_errors_survive_a_pickle() -> None:
    with pytest.raises(ImageError) as caught:
        MICRO.transform([None])
    again = pickle.loads(pickle.dumps(caught.value))
    assert (str(again), again.problem, again.row) == (str(caught.value), caught.value.problem, 0)
    assert str(again).startswith(f"{again.problem}. ")


@pytest.mark.parametrize(
    "call",
    [
        lambda extractor, X: extractor.transform(X),
        lambda extractor, X: extractor.fit_transform(X),
        lambda extractor, X: list(extractor.iter_transform(X)),
        lambda extractor, X: extractor.warm(X),
    ],
)
def test_warning_names_the_line_of_the_user(call: Callable[[Any, Any], Any], tmp_path: Path) -> None:
    extractor = PretrainedFeatureExtractor("featx_micro", image_size=16, on_error="nan", cache=tmp_path)
    with pytest.warns(UserWarning, match="could not be read") as told:
        call(extractor, [b"no photo"])
    assert {warning.filename for warning in told} == {__file__}

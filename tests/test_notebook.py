"""What notebooks show: scikit-learn's own diagram, with the network's stages folded inside."""

from __future__ import annotations

import re
from collections import UserDict
from html.parser import HTMLParser
from typing import Any

import pytest
import torch
from sklearn.base import BaseEstimator, clone
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.utils import estimator_html_repr
from torch import nn

from featx import FineTuneClassifier, PretrainedFeatureExtractor, list_layers
from featx.backbones import networks
from featx.estimators.notebook import with_stages
from featx.system.compat import ParamsDict

pytestmark = pytest.mark.skipif(ParamsDict is UserDict, reason="scikit-learn < 1.7 shows no parameters in notebooks")
ESTIMATORS = [PretrainedFeatureExtractor, FineTuneClassifier]


def cells_of(page: str) -> list[list[str]]:
    """Rows of the table of stages, tags and entities resolved by a parser."""

    class Cells(HTMLParser):
        inside = False
        rows: list[list[str]]

        def handle_starttag(self, tag: str, attrs: Any) -> None:
            if tag == "tr" and self.inside:
                self.rows.append([])
            elif tag == "td" and self.inside:
                self.rows[-1].append("")

        def handle_data(self, data: str) -> None:
            if self.lasttag == "summary":
                self.inside = data.startswith("Stages of") or (self.inside and not data.strip())
            elif self.lasttag == "td" and self.inside and self.rows and self.rows[-1]:
                self.rows[-1][-1] += data.strip()

        def handle_endtag(self, tag: str) -> None:
            self.inside = self.inside and tag != "table"

    parser = Cells()
    parser.rows = []
    parser.feed(page)
    return [row for row in parser.rows if row]


@pytest.mark.parametrize("kind", ESTIMATORS)
def test_stages_are_folded_into_the_diagram_without_loading_weights(kind: Any, monkeypatch: Any) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("weights are not to be loaded")

    monkeypatch.setattr(networks, "build_with_weights", refuse)
    page = make_pipeline(kind("resnet50"))._repr_html_()
    folded = re.search(r"<details>\s*<summary>Stages of resnet50 at 224 x 224 pixels</summary>", page)
    assert folded
    rows = cells_of(page)
    assert [row[1] for row in rows] == list_layers("resnet50")
    # the paper's table 1: widths and sizes of conv1 and the four stages
    assert [row[2] for row in rows] == ["64", "256", "512", "1024", "2048"]
    assert [row[3] for row in rows] == ["1/2", "1/4", "1/8", "1/16", "1/32"]
    assert [row[4] for row in rows] == [f"{side} x {side}" for side in (112, 56, 28, 14, 7)]


def test_image_size_reaches_the_diagram() -> None:
    rows = cells_of(PretrainedFeatureExtractor("resnet18", image_size=64)._repr_html_())
    assert [row[4] for row in rows][-1] == "2 x 2"


def test_the_rest_of_the_diagram_is_scikit_learns() -> None:
    model = make_pipeline(PretrainedFeatureExtractor("featx_micro", grid=2), LogisticRegression())
    page = estimator_html_repr(model)
    assert page.count("Stages of featx_micro") == 1
    assert page.count("<summary>Parameters</summary>") == 3
    params = model[0]._get_params_html()
    assert dict(params) == model[0].get_params()
    assert set(params.non_default) == {"backbone", "grid"}
    assert repr(params) == repr(params.data)


def test_names_are_escaped() -> None:
    network = nn.Sequential()
    network.add_module("<script>alert(1)</script>", nn.Conv2d(3, 4, 3))
    network.add_module("head", nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)))
    extractor = PretrainedFeatureExtractor(network)  # whose diagram is scikit-learn's own: it might have to be run
    assert "Stages" not in extractor._get_params_html()._repr_html_inner()
    architecture = extractor._architecture(extractor._spec())
    page = with_stages(BaseEstimator._get_params_html(extractor), architecture)._repr_html_inner()
    assert cells_of(page)[0][1] == "<script>alert(1)</script>"
    assert "<script>" not in page


class Called(Exception):
    """What must not be called was."""


class Builder:
    """A callable backbone that cannot be a key, and tells when it is called."""

    calls = 0
    __hash__ = None  # type: ignore[assignment]

    def __call__(self) -> nn.Module:
        type(self).calls += 1
        raise Called


@pytest.mark.parametrize("kind", ESTIMATORS)
@pytest.mark.parametrize(
    "parameters",
    [
        {"backbone": "no such network"},
        {"backbone": 3},
        {"backbone": Builder()},
        {"backbone": lambda: Builder()()},
        {"backbone": nn.Linear(3, 2)},
        {"backbone": "vit_b_16", "image_size": 100},
        {"backbone": "featx_micro", "weights": "/no/such/file.safetensors"},
    ],
    ids=["unknown", "number", "unhashable callable", "callable", "no network for images", "wrong size", "no weights"],
)
def test_diagram_of_anything_else_is_scikit_learns_own(kind: Any, parameters: dict[str, Any]) -> None:
    estimator = kind(**parameters)
    calls = Builder.calls
    own = BaseEstimator._get_params_html(estimator)
    assert type(estimator._get_params_html()) is type(own)
    assert estimator._get_params_html()._repr_html_inner() == own._repr_html_inner()
    assert Builder.calls == calls  # to know what it returns would mean to load it
    page = estimator._repr_html_()
    assert "<summary>Parameters</summary>" in page
    assert "Stages of" not in page


def test_fitted_classifier_and_clone_have_the_same_stages() -> None:
    model = FineTuneClassifier("featx_micro", freeze="all", epochs=1, random_state=0)
    before = cells_of(model._repr_html_())
    model.fit(torch.zeros(4, 3, 8, 8), [0, 1, 0, 1])
    assert cells_of(model._repr_html_()) == cells_of(clone(model)._repr_html_()) == before

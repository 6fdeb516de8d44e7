"""Several poolings of one layer side by side, and what a network is usually read with."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import timm
from click.testing import Result
from commands import runner
from conftest import counting_images, relative_difference
from networks import Patches
from pictures import encode
from releases import exports_graphs, needs_network
from sklearn.base import clone
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline

from featx import FeatureStore, FineTuneClassifier, PretrainedFeatureExtractor
from featx.cli.commands import featx
from featx.exceptions import LayerError

X = np.random.default_rng(0).integers(0, 256, (9, 40, 36, 3), dtype=np.uint8)
Y = np.arange(len(X)) % 2
VIT = "timm/vit_tiny_patch16_224"
ENGINES = ["torch", pytest.param("onnx", marks=exports_graphs)]


def vit(**params: Any) -> PretrainedFeatureExtractor:
    return PretrainedFeatureExtractor(VIT, weights=None, image_size=32, **params)


@pytest.mark.parametrize("normalize", [None, "l2", "signed-sqrt"])
@pytest.mark.parametrize("engine", ENGINES)
def test_columns_are_those_of_each_pooling_layer_by_layer(normalize: str | None, engine: str) -> None:
    layers = [0, -1, "penultimate"]
    several = vit(layers=layers, pooling=["cls", "avg", "max"], normalize=normalize, engine=engine)
    single = vit(normalize=normalize, engine="torch")
    wanted, names = [], []
    for layer in layers:
        for pooling in ("cls",) if layer == "penultimate" else ("cls", "avg", "max"):  # a vector once
            single.set_params(layers=layer, pooling=pooling)
            wanted.append(single.transform(X))
            names += single.get_feature_names_out().tolist()
    assert relative_difference(several.transform(X), np.hstack(wanted)) < 1e-5
    assert several.get_feature_names_out().tolist() == names
    assert len(set(names)) == len(names)
    if normalize:
        lengths = [np.linalg.norm(part, axis=1) for part in np.split(several.transform(X), 7, axis=1)]
        np.testing.assert_allclose(lengths, 1, rtol=1e-5)


def test_order_of_the_list_is_that_of_the_columns() -> None:
    one, other = (vit(layers=-1, pooling=pooling).transform(X) for pooling in (["cls", "avg"], ("avg", "cls")))
    np.testing.assert_array_equal(one, np.roll(other, 192, axis=1))


def test_one_pass_serves_all_poolings_and_the_store_gives_the_same(tmp_path: Path) -> None:
    model = vit(layers="all", pooling=["cls", "avg"], engine="torch", cache=tmp_path)
    bare = clone(model).set_params(cache=None).transform(X)
    with counting_images("VisionTransformer") as seen:
        cold = model.transform(X)
        warm = model.transform(X)
        for pooling in ("cls", "avg", "max", "gem", ["gem", "max", "cls", "avg"], "auto"):
            clone(model).set_params(pooling=pooling).transform(X)
    assert sum(seen) == len(X)
    np.testing.assert_array_equal(cold, warm)
    np.testing.assert_array_equal(cold, bare)
    assert FeatureStore(tmp_path).info()["computed"] == len(X)


def test_poolings_are_a_parameter_like_others() -> None:
    model = vit(pooling=["cls", "avg"], layers=-1)
    assert clone(model).pooling == model.get_params()["pooling"] == pickle.loads(pickle.dumps(model)).pooling
    pipeline = make_pipeline(model, LogisticRegression())
    grid = {"pretrainedfeatureextractor__pooling": ["avg", ["cls", "avg"], "auto"]}
    search = GridSearchCV(pipeline, grid, cv=3, error_score="raise").fit(X, Y)
    assert search.best_estimator_.predict(X).shape == Y.shape


@pytest.mark.parametrize(
    "pooling",
    [
        [],
        ["avg", "avg"],
        ["avg", "map"],
        ["flatten", "cls"],
        ["auto", "avg"],
        ["auto"],
        ["mean"],
        [3],
        [["cls", "avg"]],
    ],
)
def test_what_cannot_stand_side_by_side_is_told(pooling: list[Any]) -> None:
    with pytest.raises(ValueError, match=r"A list of .* each at most once, is expected, got pooling="):
        vit(pooling=pooling).fit(X)
    with pytest.raises(ValueError, match="each at most once"):
        FineTuneClassifier("featx_micro", pooling=pooling).fit(X, Y)


def test_list_with_a_pooling_that_a_layer_does_not_have_is_told() -> None:
    with pytest.raises(LayerError, match="class token"):
        PretrainedFeatureExtractor("featx_micro", layers=-1, pooling=["cls", "avg"]).transform(X)


@pytest.mark.parametrize("pooling", [["cls", "avg"], ["avg", "gem"], "auto"])
@pytest.mark.parametrize("normalize", [None, "signed-sqrt"])
def test_tuned_networks_read_several_poolings(pooling: Any, normalize: str | None, tmp_path: Path) -> None:
    params: dict[str, Any] = {"weights": None, "image_size": 32, "layers": -1, "engine": "torch", "random_state": 0}
    tuned = FineTuneClassifier(
        VIT, pooling=pooling, normalize=normalize, freeze=-1, epochs=2, learning_rate=1e-2, **params
    )
    tuned.fit(X, Y)
    pretrained = PretrainedFeatureExtractor(VIT, pooling=pooling, normalize=normalize, **params)
    moved = tuned.transform(X)
    assert moved.shape == pretrained.transform(X).shape
    assert relative_difference(moved, pretrained.transform(X)) > 1e-4
    assert relative_difference(tuned.to_extractor().transform(X), moved) < 1e-5
    tuned.save(tmp_path / "model.safetensors")
    np.testing.assert_array_equal(FineTuneClassifier.load(tmp_path / "model.safetensors").predict(X), tuned.predict(X))
    head = clone(tuned).set_params(freeze="all").fit(X, Y)
    assert relative_difference(head.transform(X), pretrained.transform(X)) < 1e-5


def said(network: Any, **words: Any) -> Any:
    for name, value in words.items():
        setattr(network, name, value)
    return network


USUAL: dict[str, tuple[Any, list[str]]] = {
    "torchvision's transformer": ("vit_b_16", ["cls"]),
    "convolutions": ("resnet18", ["avg"]),
    "channels last": ("swin_t", ["avg"]),
    "class token": (VIT, ["cls"]),
    "class token that timm leaves out": ("timm/vit_base_patch16_rpn_224", ["avg"]),
    "no class token": ("timm/vit_little_patch16_reg4_gap_256", ["avg"]),
    "attention head": ("timm/vit_base_patch16_siglip_224", ["avg"]),
    "DINOv2": ("timm/vit_small_patch14_dinov2", ["cls", "avg"]),
    "DINOv2 with registers": ("timm/vit_small_patch14_reg4_dinov2", ["cls", "avg"]),
    "DINOv3": ("timm/vit_small_patch16_dinov3", ["cls"]),
    "mixer": ("timm/mixer_s32_224", ["avg"]),
    "a module of timm's": (lambda: timm.create_model("vit_small_patch14_dinov2", depth=2), ["cls", "avg"]),
    "maximum and average of timm's": (
        lambda: timm.create_model("vit_tiny_patch16_224", global_pool="avgmax", depth=2),
        ["avg", "max"],
    ),
    "as MAE's code says it": (lambda: said(Patches({"cls_token": 1}), global_pool=True), ["avg"]),
    "as a configuration says it": (
        lambda: said(Patches({"cls_token": 1}), config=SimpleNamespace(use_mean_pooling=True)),
        ["avg"],
    ),
    "by somebody": (lambda: Patches({"cls_token": 1}), ["cls"]),
    "by somebody, without a class token": (lambda: Patches({"reg_token": 2}), ["avg"]),
}


def needs(kind: str) -> list[pytest.MarkDecorator]:
    name = USUAL[kind][0]
    is_timms = isinstance(name, str) and name.startswith("timm/")
    return [needs_network(name.removeprefix("timm/"))] if is_timms else []


@pytest.mark.parametrize("kind", [pytest.param(kind, marks=needs(kind)) for kind in USUAL])
def test_auto_is_what_a_network_is_usually_read_with(kind: str) -> None:
    backbone, wanted = USUAL[kind]
    named = isinstance(backbone, str)
    model = PretrainedFeatureExtractor(backbone, weights=None if named else "DEFAULT", layers=-1, pooling="auto")
    names = model.get_feature_names_out()
    assert list(dict.fromkeys(name.split("_")[-2] for name in names)) == wanted


def test_auto_and_what_it_stands_for_are_the_same_rows_of_a_store(tmp_path: Path) -> None:
    model = vit(layers=-1, pooling="auto", cache=tmp_path)
    rows = model.transform(X)
    with counting_images("VisionTransformer") as seen:
        np.testing.assert_array_equal(clone(model).set_params(pooling="cls").transform(X), rows)
    assert not seen


def run(*words: object, code: int = 0) -> Result:
    result = runner().invoke(featx, [str(word) for word in words])
    assert result.exit_code == code, (result.output, result.exception)
    return result


def test_commands_take_several_poolings(tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    for i, image in enumerate(X[:8]):
        (photos / "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
        (photos / "ab"[i % 2] / f"{i}.png").write_bytes(encode(image, "PNG"))
    network = ["--backbone", VIT, "--weights", "none", "--image-size", "32", "--layers", "-1"]
    paths = sorted(str(path) for path in photos.glob("*/*"))
    for typed, given in {"cls,avg": ["cls", "avg"], "auto": "auto", "max": "max"}.items():
        run("extract", photos, "-o", tmp_path / f"{typed}.npy", *network, "--pooling", typed, "--no-cache")
        wanted = vit(layers=-1, pooling=given).transform(paths)
        assert relative_difference(np.load(tmp_path / f"{typed}.npy"), wanted) < 1e-5
    fit = ["fit", photos, "-o", tmp_path / "m.joblib", *network, "--quick", "--folds", "2", "--pooling"]
    assert "layer blocks.11, cls,avg pooling" in run(*fit, "cls,avg").stdout
    assert json.loads(run(*fit, "cls,avg", "--json").stdout)["pooling"] == "cls,avg"
    search = ["search", photos, "--backbones", f"{VIT},featx_micro", "--weights", "none", "--image-size", "32"]
    rows = json.loads(run(*search, "--poolings", "avg,auto", "--folds", "2", "--json").stdout)["leaderboard"]
    tried = [(row["backbone"], row["layer"], row["pooling"]) for row in rows]
    assert len(set(tried)) == len(tried)
    assert {pooling for backbone, _, pooling in tried if backbone == VIT} == {"avg", "cls"}
    assert {pooling for backbone, _, pooling in tried if backbone == "featx_micro"} == {"avg"}
    late = ["--backbone", "timm/cait_xxs24_224", "--weights", "none"]  # its class token joins late
    learnt = json.loads(
        run("fit", photos, "-o", tmp_path / "c.joblib", *late, "--quick", "--pooling", "cls", "--json").stdout
    )
    assert (learnt["layer"], learnt["layers_tried"]) == ("penultimate", 1)
    assert "--pooling" in run(*fit, "cls,map", code=2).stderr
    assert "each at most once" in run(*fit, "cls,flatten", code=1).stderr

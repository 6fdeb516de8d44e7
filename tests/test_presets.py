"""Preprocessing of networks from elsewhere: what they carry or lead to, and what is said where they do not."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from networks import Wrapper
from PIL import Image
from torch import nn

from featx import FineTuneClassifier, PretrainedFeatureExtractor, list_layers
from featx.backbones.networks import network_spec
from featx.exceptions import BackboneError
from featx.images.preprocessing import Preset, SquashPreset

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (3, 40, 56, 3), dtype=np.uint8)

needs_timm = pytest.mark.skipif(
    importlib.util.find_spec("timm") is None, reason='timm is not installed: pip install "featx[timm]"'
)
AROUND: dict[str, Callable[[nn.Module], Any]] = {
    "module": lambda network: network,
    "callable": lambda network: lambda: network,
    "sequential": nn.Sequential,
    "wrapped twice": lambda network: Wrapper(nn.Sequential(network)),
}


@needs_timm
@pytest.mark.parametrize("around", AROUND)
@pytest.mark.parametrize("name", ["test_vit.r160_in1k", "test_resnet.r160_in1k"])
def test_networks_of_timm_are_fed_as_timm_feeds_them(name: str, around: str) -> None:
    import timm

    network = timm.create_model(name, num_classes=0)
    config = timm.data.resolve_data_config(model=network)
    expected = PretrainedFeatureExtractor(
        network, layers="", preprocess=timm.data.create_transform(**config, is_training=False)
    )
    given = PretrainedFeatureExtractor(AROUND[around](network))
    rows, wanted = given.transform(IMAGES), expected.set_params(layers="penultimate").transform(IMAGES)
    usual = given.set_params(preprocess="ResNet18_Weights.IMAGENET1K_V1", image_size=160).transform(IMAGES)
    distance = np.linalg.norm(rows - wanted)
    assert distance < 0.05 * np.linalg.norm(wanted)  # Pillow and torch resize by different arithmetic
    assert distance < 0.2 * np.linalg.norm(usual - wanted)


@needs_timm
def test_networks_of_timm_are_fed_in_the_size_that_they_were_built_for() -> None:
    import timm

    network = timm.create_model("test_vit", num_classes=0, img_size=96)
    assert network_spec(network, "DEFAULT", 0).preset.crop == 96
    assert PretrainedFeatureExtractor(network).transform(IMAGES).shape == (3, network.num_features)
    flat = timm.create_model("test_vit", num_classes=0, img_size=(32, 128))
    with pytest.raises(BackboneError, match="32 x 128"):
        PretrainedFeatureExtractor(flat).transform(IMAGES)
    ready = torch.rand(2, 3, 32, 128)  # a way out
    assert len(PretrainedFeatureExtractor(flat, preprocess=None).transform(ready)) == 2


@needs_timm
def test_tuned_networks_of_timm_go_on_as_they_were_fed() -> None:
    import timm

    network = timm.create_model("test_vit", num_classes=0)
    tuned = FineTuneClassifier(network, epochs=1, freeze="blocks.4", random_state=0).fit(IMAGES, [0, 1, 0])
    np.testing.assert_allclose(tuned.to_extractor().transform(IMAGES), tuned.transform(IMAGES), rtol=1e-4, atol=1e-4)
    assert (
        network_spec(tuned.to_extractor().backbone, "DEFAULT", 0).preset == network_spec(network, "DEFAULT", 0).preset
    )


@needs_timm
@pytest.mark.parametrize("said", [None, {"input_size": (3, 64, 64), "mean": (0.1, 0.2, 0.3)}])
def test_networks_of_timm_that_transformers_wraps_are_fed_as_timm_feeds_them(said: dict[str, Any] | None) -> None:
    import timm

    class TimmWrapper(nn.Module):
        """As transformers has it: what the weights were trained with stands in its configuration, where it is known."""

        def __init__(self) -> None:
            super().__init__()
            self.timm_model = timm.create_model("test_resnet", num_classes=0)
            self.config = SimpleNamespace(model_type="timm_wrapper", pretrained_cfg=said)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.timm_model(x)

    expected = timm.data.resolve_data_config(pretrained_cfg=said or TimmWrapper().timm_model.pretrained_cfg)
    preset = network_spec(TimmWrapper(), "DEFAULT", 0).preset
    assert (preset.crop, preset.mean) == (expected["input_size"][1], tuple(expected["mean"]))


@needs_timm
@pytest.mark.parametrize("decode", ["exact", "fast"])
def test_fit_does_not_call_a_callable_for_its_preprocessing(decode: str) -> None:
    PretrainedFeatureExtractor(lambda: pytest.fail("called"), decode=decode).fit(IMAGES)


class PreTrainedModel(nn.Module):
    """What all networks of transformers are."""


class Foreign(PreTrainedModel):
    """As transformers has them: a configuration that knows the images' side, and where the weights came from."""

    def __init__(self, folder: Path | str = "", image_size: Any = 32) -> None:
        super().__init__()
        self.config = SimpleNamespace(model_type="vit", image_size=image_size, name_or_path=str(folder))
        self.conv = nn.Conv2d(3, 4, 4, stride=4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x)


def processor(folder: Path, **said: Any) -> None:
    usual = {"do_resize": True, "do_normalize": True, "image_mean": [0.5] * 3, "image_std": [0.25] * 3, "resample": 3}
    (folder / "preprocessor_config.json").write_text(json.dumps(usual | said))


@pytest.mark.parametrize(
    ("said", "resized", "crop"),
    [
        ({"size": {"height": 32, "width": 32}}, (32, 32), 32),  # (width, height)
        ({"size": 32, "resample": 2}, (32, 32), 32),
        (
            {"size": {"shortest_edge": 36}, "do_center_crop": True, "crop_size": {"height": 32, "width": 32}},
            (50, 36),
            32,
        ),
        ({"size": {"height": 32, "width": 32}, "do_normalize": False}, (32, 32), 32),
        ({"size": {"height": 36, "width": 36}, "do_center_crop": True, "crop_size": 32}, (36, 36), 32),
        # One number is the shorter side's for CLIP, as in the file of its first release, and both sides' for others.
        ({"feature_extractor_type": "CLIPFeatureExtractor", "size": 32, "crop_size": 32}, (44, 32), 32),
        ({"image_processor_type": "BitImageProcessorFast", "size": 36, "crop_size": 32}, (50, 36), 32),
        ({"feature_extractor_type": "BeitFeatureExtractor", "size": 32}, (32, 32), 32),
    ],
)
def test_networks_of_transformers_are_fed_as_the_file_beside_them_says(
    said: dict[str, Any], resized: tuple[int, int], crop: int, tmp_path: Path
) -> None:
    processor(tmp_path, **said)
    network = Foreign(tmp_path)

    def own(image: Image.Image) -> torch.Tensor:
        resample = Image.Resampling(said.get("resample", 3))
        left, top = (resized[0] - crop) // 2, (resized[1] - crop) // 2
        small = image.resize(resized, resample).crop((left, top, left + crop, top + crop))
        pixels = torch.from_numpy(np.array(small)).permute(2, 0, 1) / 255
        return (pixels - 0.5) / 0.25 if said.get("do_normalize", True) else pixels

    rows = PretrainedFeatureExtractor(network, layers="conv").transform(IMAGES)
    wanted = PretrainedFeatureExtractor(network, layers="conv", preprocess=own).transform(IMAGES)
    np.testing.assert_allclose(rows, wanted, atol=0.02)


SQUARE = {"size": {"height": 32, "width": 32}}
CROPPED = {"size": {"shortest_edge": 32}, "do_center_crop": True, "crop_size": {"height": 32, "width": 32}}


@pytest.mark.parametrize(
    "said",
    [
        None,
        {"size": {"longest_edge": 32}},
        {"size": {"shortest_edge": 32, "longest_edge": 64}, "do_center_crop": True, "crop_size": 32},
        {"size": 32, "resample": 1},
        # What these do beside is written in their code.
        {"image_processor_type": "LevitImageProcessor", **CROPPED},
        {"image_processor_type": "PoolFormerImageProcessor", "crop_pct": 0.9, **CROPPED},
        {"image_processor_type": "EfficientNetImageProcessor", "include_top": True, **SQUARE},
        {"image_processor_type": "SomebodysImageProcessor", **SQUARE},
        {"do_rescale": False, **SQUARE},
        {"do_flip_channel_order": True, **SQUARE},
    ],
)
def test_what_nothing_tells_is_said_and_a_processor_is_the_way_out(said: dict | None, tmp_path: Path) -> None:
    if said is not None:
        processor(tmp_path, **said)
    network = Foreign(tmp_path)
    with pytest.warns(UserWarning, match=r"32 x 32 pixels with ImageNet's mean.*preprocess=lambda image: processor"):
        rows = PretrainedFeatureExtractor(network, layers="conv").transform(IMAGES)
    usual = Preset(256, 224).scaled(32)
    tiles = torch.stack([usual.tile(torch.from_numpy(image).permute(2, 0, 1)) for image in IMAGES])
    np.testing.assert_allclose(rows, network(usual.finish(tiles)).mean((2, 3)).detach(), rtol=1e-4, atol=1e-5)

    def processor_(image: Image.Image, return_tensors: str) -> dict[str, torch.Tensor]:
        return {"pixel_values": torch.from_numpy(np.array(image.resize((32, 32)))).permute(2, 0, 1)[None] / 255}

    fed = PretrainedFeatureExtractor(
        network, layers="conv", preprocess=lambda image: processor_(image, return_tensors="pt")["pixel_values"][0]
    )
    assert np.isfinite(fed.transform(IMAGES)).all()


def test_networks_in_the_style_of_transformers_are_not_taken_for_theirs() -> None:
    class Own(nn.Sequential):
        config = SimpleNamespace(model_type="mine", image_size=32)

    assert network_spec(Own(nn.Conv2d(3, 4, 4)), "DEFAULT", 0).preset == Preset(256, 224)  # and no warning


class Tower(nn.Sequential):
    """As open_clip has them."""

    def __init__(self, **said: object) -> None:
        super().__init__(nn.Conv2d(3, 4, 4, stride=4))
        usual = {"size": (32, 32), "mode": "RGB", "mean": (0.1, 0.2, 0.3), "std": (0.3, 0.2, 0.1)}
        self.preprocess_cfg = usual | {"interpolation": "bicubic", "resize_mode": "shortest", "fill_color": 0} | said


@pytest.mark.parametrize("around", AROUND)
@pytest.mark.parametrize(("mode", "kind"), [("shortest", Preset), ("squash", SquashPreset)])
def test_towers_of_open_clip_are_fed_as_they_say(mode: str, kind: type[Preset], around: str) -> None:
    found = network_spec(AROUND[around](Tower(resize_mode=mode)), "DEFAULT", 0).preset
    assert found == kind(32, 32, (0.1, 0.2, 0.3), (0.3, 0.2, 0.1), "bicubic")
    assert type(found) is kind


@pytest.mark.parametrize("said", [{"resize_mode": "longest"}, {"interpolation": "random"}, {"size": (32, 64)}])
def test_towers_of_open_clip_that_pad_or_are_not_square_say_what_to_do(said: dict[str, Any]) -> None:
    with pytest.raises(BackboneError, match=r"[Pp]ass"):
        PretrainedFeatureExtractor(Tower(**said)).transform(IMAGES)


@pytest.mark.parametrize("decode", ["exact", "fast"])
def test_what_nothing_tells_is_said_once_and_not_where_preprocessing_is_given(decode: str) -> None:
    network = Foreign(image_size=(32, 64))
    own = PretrainedFeatureExtractor(
        network, layers="conv", decode=decode, preprocess=lambda image: torch.ones(3, 32, 64)
    )
    own.set_output(transform="pandas").fit_transform(IMAGES)  # knows its columns' names, and warns of nothing
    assert "conv" in list_layers(network, kind="modules")
    network = Foreign()
    model = FineTuneClassifier(network, layers="conv", decode=decode, epochs=1)
    with pytest.warns(UserWarning, match="trained with") as caught:
        model.fit(IMAGES, [0, 1, 0])
    assert len(caught) == 1
    model.predict(IMAGES)  # without another word


@needs_timm
def test_networks_of_timm_that_are_not_square_have_names_where_preprocessing_is_given() -> None:
    import timm

    flat, ready = timm.create_model("test_vit", img_size=(32, 128)), torch.rand(2, 3, 32, 128)
    given = PretrainedFeatureExtractor(flat, preprocess=None).set_output(transform="pandas")
    assert given.fit_transform(ready).shape == (2, flat.num_features)
    assert list_layers(flat)


def test_networks_of_transformers_that_are_not_square_say_what_to_do() -> None:
    with pytest.raises(BackboneError, match=r"32 x 64.*preprocess=lambda image"):
        PretrainedFeatureExtractor(Foreign(image_size=[32, 64])).transform(IMAGES)
    ready = torch.rand(2, 3, 32, 64)
    assert len(PretrainedFeatureExtractor(Foreign(image_size=[32, 64]), preprocess=None).transform(ready)) == 2

"""timm's networks by name: what timm says of them is what is read, and every law of the catalogue holds for them."""

from __future__ import annotations

import importlib.util
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import relative_difference
from PIL import Image
from releases import needs_network, needs_stages
from safetensors.torch import save_file
from sklearn.base import clone
from sklearn.datasets import load_sample_image
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline

from featx import FeatureStore, FineTuneClassifier, PretrainedFeatureExtractor, list_layers
from featx.backbones import networks as shelf
from featx.backbones.entries import entry_of
from featx.backbones.networks import network_spec
from featx.backbones.timm_models import TimmEntry
from featx.exceptions import BackboneError, WeightsError
from featx.store.memory import MEMORY

if importlib.util.find_spec("timm") is None:
    pytest.skip('timm is not installed: pip install "featx[timm]"', allow_module_level=True)

import timm
from timm.data import create_transform, resolve_data_config

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, size=(6, 60, 80, 3), dtype=np.uint8)
SMALL = "timm/test_resnet"
NETWORKS = [
    *("resnet18", "resnet50", "efficientnet_b0", "mobilenetv3_small_100", "convnext_atto", "vit_tiny_patch16_224"),
    *("swin_tiny_patch4_window7_224", "regnety_002", "densenet121", "tf_efficientnetv2_b0", "mobilevit_xxs"),
    "cait_xxs24_224",  # late class token
    pytest.param("gcvit_xxtiny", marks=needs_stages("gcvit_xxtiny")),  # channels last at one size only
    pytest.param("caformer_s18", marks=needs_stages("caformer_s18")),  # deep head
]


def random(backbone: str, **parameters: object) -> PretrainedFeatureExtractor:
    return PretrainedFeatureExtractor(backbone, weights=None, **parameters)


def random_state_dict(backbone: str, seed: int = 0) -> dict[str, torch.Tensor]:
    state = network_spec(backbone, None, seed).load("cpu", torch.float32).module.state_dict()
    return {key: value.clone(memory_format=torch.contiguous_format) for key, value in state.items()}


def computed(extractor: PretrainedFeatureExtractor) -> int:
    return FeatureStore(extractor.cache).info()["computed"]


# Features


def test_features_are_those_of_the_network_that_timm_builds() -> None:
    network = timm.create_model("resnet18").eval()
    network.load_state_dict(random_state_dict("timm/resnet18", seed=3))
    images = torch.rand(3, 3, 64, 64)
    with torch.inference_mode():
        expected = network.forward_head(network.forward_features(images), pre_logits=True)
    features = random("timm/resnet18", preprocess=None, image_size=64, random_state=3).transform(images)
    assert relative_difference(features, expected.numpy()) < 1e-5


def test_weights_of_torchvision_give_the_features_of_torchvision(tmp_path: Path) -> None:
    path = tmp_path / "resnet18.safetensors"
    save_file(random_state_dict("resnet18", seed=1), path)
    extractor = PretrainedFeatureExtractor(
        "resnet18", weights=path, layers=[1, -1, "penultimate"], preprocess="ResNet18_Weights.IMAGENET1K_V1"
    )
    expected = extractor.set_params(image_size=64).transform(IMAGES)
    features = clone(extractor).set_params(backbone="timm/resnet18").transform(IMAGES)
    assert relative_difference(features, expected) < 1e-5


@pytest.mark.parametrize("name", NETWORKS)
def test_stages_are_those_of_feature_info(name: str) -> None:
    told = timm.create_model(name).feature_info
    last = {stage["reduction"]: stage["module"] for stage in told}
    found = list_layers(f"timm/{name}")
    assert found[-len(last) :] == list(last.values())
    assert len(found) == (len(last) if len(last) > 1 else 4)  # of one resolution, by depth

    features_only = timm.create_model(name, features_only=True).feature_info
    channels = dict(zip(features_only.reduction(), features_only.channels(), strict=True))
    spec = network_spec(f"timm/{name}", None, 0)
    stages = [spec.architecture().layer(stage) for stage in last.values()]
    read = {spec.preset.crop // stage.spatial[0]: stage.channels for stage in stages}
    assert list(read) == list(last)
    assert {reduction: read[reduction] for reduction in channels} == channels


@pytest.mark.parametrize("name", NETWORKS)
def test_penultimate_is_what_timm_feeds_to_its_classifier(name: str) -> None:
    spec = network_spec(f"timm/{name}", None, 0)
    side = spec.preset.crop if entry_of(f"timm/{name}").fixed_size else 64
    images = torch.rand(2, 3, side, side)
    network = spec.load("cpu", torch.float32).module
    with torch.inference_mode():
        expected = network.forward_head(network.forward_features(images), pre_logits=True)
    features = random(f"timm/{name}", preprocess=None, image_size=side).transform(images)
    assert relative_difference(features, expected.numpy()) < 1e-5


def test_module_of_timm_is_read_as_by_its_name() -> None:
    def built() -> torch.nn.Module:
        return timm.create_model("efficientnet_b0")

    by_name, by_callable = (network_spec(it, None, 0).architecture() for it in ("timm/efficientnet_b0", built))
    assert by_callable.stages == by_name.stages
    assert by_callable.penultimate == by_name.penultimate


# Preprocessing


@pytest.mark.parametrize(
    ("name", "mode", "interpolation"),
    [
        ("resnet18.a1_in1k", "center", "bicubic"),
        ("resnet18.tv_in1k", "center", "bilinear"),
        ("inception_v3.tf_in1k", "center", "bicubic"),
        ("dm_nfnet_f0.dm_in1k", "squash", "bicubic"),
    ],
)
def test_preset_is_the_evaluation_transform_of_timm(name: str, mode: str, interpolation: str) -> None:
    config = resolve_data_config(pretrained_cfg=timm.get_pretrained_cfg(name).to_dict())
    assert (config["crop_mode"], config["interpolation"]) == (mode, interpolation)  # each kind is seen
    picture = Image.fromarray(load_sample_image("china.jpg"))
    expected = create_transform(**config, is_training=False)(picture).numpy()
    preset = entry_of(f"timm/{name}").preset()
    pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)
    found = preset.finish(preset.tile(pixels)[None])[0].numpy()
    assert relative_difference(found[None], expected[None]) < 1e-2
    assert relative_difference(preset.finish(preset.tile(pixels.flip(2))[None]).numpy(), expected[None]) > 0.1


def test_preset_of_a_seed_or_a_file_is_the_networks_own(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    save_file(random_state_dict(SMALL), path)
    presets = {network_spec(SMALL, weights, 0).preset for weights in (None, path, "DEFAULT", "r160_in1k")}
    assert len(presets) == 1


def test_tag_in_the_name_decides_preset_and_classes() -> None:
    plain, other = (network_spec(f"timm/{name}", None, 0) for name in ("resnet18", "resnet18.tv_in1k"))
    assert (plain.preset.resize, other.preset.resize) == (235, 256)
    assert network_spec("timm/resnet18", "tv_in1k", 0).preset == other.preset


@pytest.mark.parametrize(
    ("name", "origin"),
    [
        ("test_vit", "file"),
        ("test_vit", "published"),
        ("test_vit", "seed"),
        pytest.param("test_vit_relpos", "file", marks=needs_network("test_vit_relpos")),
    ],
)
def test_network_of_one_size_is_built_for_another_as_timm_does_it(
    name: str, origin: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    side, state, path = 96, random_state_dict(f"timm/{name}", seed=3), tmp_path / "model.safetensors"
    save_file(state, path)
    overlay = {"file": str(path)}
    network = timm.create_model(name, img_size=side, pretrained=True, pretrained_cfg_overlay=overlay).eval()
    monkeypatch.setattr(TimmEntry, "file", lambda self, weights: path)
    weights = {"file": path, "published": "DEFAULT", "seed": None}[origin]
    images = torch.rand(2, 3, side, side)
    with torch.inference_mode():
        expected = network.forward_head(network.forward_features(images), pre_logits=True)
    extractor = PretrainedFeatureExtractor(
        f"timm/{name}", weights=weights, random_state=3, image_size=side, preprocess=None
    )
    assert relative_difference(extractor.transform(images), expected.numpy()) < 1e-5
    assert extractor.set_params(preprocess="weights").transform(IMAGES).shape == expected[:1].expand(6, -1).shape


def test_network_built_for_another_size_is_another_recipe_and_can_be_tuned(tmp_path: Path) -> None:
    cached = random("timm/test_vit", layers=-1, pooling="map", cache=str(tmp_path / "store"))
    shapes = [cached.set_params(image_size=side).transform(IMAGES).shape for side in (None, 96, 96, 64)]
    assert [shape[1:3] for shape in shapes] == [(10, 10), (6, 6), (6, 6), (4, 4)]
    assert computed(cached) == 3 * len(IMAGES)
    tuned = FineTuneClassifier("timm/test_vit", weights=None, image_size=64, freeze=0, epochs=1, random_state=0)
    tuned.fit(IMAGES, np.arange(6) % 2)
    np.testing.assert_allclose(tuned.to_extractor().transform(IMAGES), tuned.transform(IMAGES), rtol=1e-4, atol=1e-5)
    assert list_layers("timm/test_vit", image_size=64) == list_layers("timm/test_vit")


def test_sizes_that_a_network_cannot_be_built_for_say_so() -> None:
    ready = torch.rand(2, 3, 96, 96)
    unsaid = random("timm/test_vit", preprocess=None)
    with pytest.raises(BackboneError, match=r"160 x 160 pixels only, got 96 x 96\. Set image_size=96"):
        unsaid.transform(ready)
    assert len(unsaid.set_params(image_size=96).transform(ready)) == 2  # the way out
    with pytest.raises(BackboneError, match=r"images of 96 x 96 pixels is expected, got timm/pit_ti_224"):
        random("timm/pit_ti_224", image_size=96).transform(IMAGES)
    with pytest.raises(BackboneError, match=r"vit_b_32 can be built for is expected, got image_size=50"):
        random("vit_b_32", image_size=50).fit(IMAGES)
    with pytest.raises(BackboneError, match=r"maxvit_t takes images of 224 x 224 pixels only, got 96 x 96\. Leave"):
        random("maxvit_t", image_size=96).fit(IMAGES)


@pytest.mark.slow
def test_transformer_of_torchvision_is_built_for_another_size_as_torchvision_does_it() -> None:
    from torchvision.models.vision_transformer import interpolate_embeddings, vit_b_32

    extractor = random("vit_b_32", random_state=1, image_size=64, preprocess=None)
    own = network_spec("vit_b_32", None, 1).load("cpu", torch.float32).module
    network = vit_b_32(image_size=64).eval()
    network.load_state_dict(interpolate_embeddings(64, 32, own.state_dict()))
    network.heads = torch.nn.Identity()
    images = torch.rand(2, 3, 64, 64)
    with torch.inference_mode():
        expected = network(images)
    assert relative_difference(extractor.transform(images), expected.numpy()) < 1e-5


@needs_network("vit_base_patch16_sapiens2")
def test_what_no_preset_can_do_is_an_error() -> None:
    with pytest.raises(BackboneError, match="1024 x 768"):
        random("timm/vit_base_patch16_sapiens2").fit(IMAGES)


# scikit-learn


def test_pickle_is_small_and_clones_share_one_network(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = []
    build = shelf.build_with_weights
    monkeypatch.setattr(shelf, "build_with_weights", lambda *args: loaded.append(args) or build(*args))
    extractor = random(SMALL, random_state=17)
    features = extractor.fit(IMAGES).transform(IMAGES)
    data = pickle.dumps(extractor)
    assert len(data) < 50_000
    for other in (clone(extractor), pickle.loads(data)):
        np.testing.assert_array_equal(other.transform(IMAGES), features)
    assert len(loaded) == 1


def test_seed_decides_the_random_network() -> None:
    before = torch.get_rng_state()
    first = random(SMALL, random_state=1).transform(IMAGES)
    shelf._renew_locks()  # forgets what was loaded
    np.testing.assert_array_equal(random(SMALL, random_state=1).transform(IMAGES), first)
    assert relative_difference(random(SMALL, random_state=2).transform(IMAGES), first) > 1e-3
    assert torch.equal(torch.get_rng_state(), before)


def test_grid_search_over_names() -> None:
    model = make_pipeline(random("featx_micro", image_size=32), LogisticRegression())
    names = ["featx_micro", SMALL, "timm/test_efficientnet"]
    search = GridSearchCV(model, {"pretrainedfeatureextractor__backbone": names}, cv=2, error_score="raise")
    search.fit(IMAGES, np.arange(6) % 2)
    assert search.best_estimator_[0].get_params()["backbone"] in names


@pytest.mark.parametrize(
    ("name", "freeze"), [("test_resnet", 2), ("vit_tiny_patch16_224", "blocks.9"), ("tf_mixnet_s", 4)]
)
def test_fine_tuning_computes_the_frozen_front_once_and_leaves_it_alone(name: str, freeze: int | str) -> None:
    small = {} if entry_of(f"timm/{name}").fixed_size else {"image_size": 64}
    tuned = FineTuneClassifier(f"timm/{name}", weights=None, freeze=freeze, epochs=1, random_state=0, **small)
    tuned.fit(IMAGES, np.arange(6) % 2)
    model = tuned._model(None)
    assert model.split.cut == model.split.frozen
    module = model.build(tuned.tensors_).module
    before = model.spec.load("cpu", torch.float32).module.state_dict()
    changed = {key for key, value in module.state_dict().items() if not torch.equal(value, before[key])}
    front = {name for call in model.architecture.calls[: model.split.frozen.position] for name in call.names}
    assert changed
    assert not {key for key in changed if key.rpartition(".")[0] in front}
    # From the front's values through the tail, and in one pass from the images: the same.
    assert relative_difference(tuned.to_extractor().transform(IMAGES), tuned.transform(IMAGES)) < 1e-4


# Weights


def test_file_may_lack_the_classifier_and_nothing_else(tmp_path: Path) -> None:
    state = random_state_dict(SMALL, seed=4)
    headless = {key: value for key, value in state.items() if not key.startswith("fc.")}
    path = tmp_path / "headless.safetensors"
    save_file(headless, path)
    extractor = PretrainedFeatureExtractor(SMALL, weights=path)
    expected = random(SMALL, random_state=4).transform(IMAGES)
    np.testing.assert_array_equal(extractor.transform(IMAGES), expected)
    del headless["conv1.0.weight"]
    save_file(headless, path)
    with pytest.raises(WeightsError, match=r"missing: conv1\.0\.weight"):
        extractor.transform(IMAGES)
    save_file({**state, "fc.weight": torch.zeros(3, 4)}, path)
    np.testing.assert_array_equal(extractor.transform(IMAGES), expected)
    with pytest.raises(WeightsError, match=r"none or of another shape for fc\."):
        clone(extractor).set_params(layers="fc").transform(IMAGES)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[int], Path]:
    """An empty cache of the hub's, offline, and what puts a network of some seed into it."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)

    def publish(seed: int) -> Path:
        repository = tmp_path / "hub" / "models--timm--test_resnet.r160_in1k"
        (snapshot := repository / "snapshots" / f"{seed:040}").mkdir(parents=True)
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / "main").write_text(snapshot.name)
        save_file(random_state_dict(SMALL, seed), snapshot / "model.safetensors")
        return snapshot / "model.safetensors"

    return publish


def test_published_weights_are_those_in_the_cache_of_the_hub(hub: Callable[[int], Path]) -> None:
    hub(5)
    before = torch.get_rng_state()
    expected = random(SMALL, random_state=5).transform(IMAGES)
    for backbone, weights in ((SMALL, "DEFAULT"), (SMALL, "r160_in1k"), (f"{SMALL}.r160_in1k", "DEFAULT")):
        shelf._renew_locks()
        features = PretrainedFeatureExtractor(backbone, weights=weights).transform(IMAGES)
        np.testing.assert_array_equal(features, expected)
    assert torch.equal(torch.get_rng_state(), before)


def test_weights_that_cannot_be_fetched_name_the_folder_and_the_ways_out(
    hub: Callable[[int], Path], tmp_path: Path
) -> None:
    extractor = PretrainedFeatureExtractor(SMALL).fit(IMAGES)
    with pytest.raises(WeightsError) as caught:
        extractor.transform(IMAGES)
    for words in (
        *("timm/test_resnet.r160_in1k", str(tmp_path / "hub"), "https://huggingface.co/timm/test_resnet.r160_in1k"),
        *("timm.create_model('test_resnet.r160_in1k'", 'weights="PATH"', 'backbone="featx_micro"'),
    ):
        assert words in str(caught.value)
    hub(5).write_bytes(b"cut short")
    with pytest.raises(WeightsError, match=r"model\.safetensors.*damaged"):
        extractor.transform(IMAGES)


# The store


def test_cached_features_are_the_features_and_another_network_is_another_recipe(tmp_path: Path) -> None:
    cached = random(SMALL, cache=str(tmp_path / "store"), layers="all")
    expected = random(SMALL, layers="all").transform(IMAGES)
    for _ in range(2):
        assert relative_difference(cached.transform(IMAGES), expected) < 1e-5
        MEMORY.clear()
    assert computed(cached) == len(IMAGES)
    path, copy = tmp_path / "weights.safetensors", tmp_path / "copy.safetensors"
    save_file(random_state_dict(SMALL, seed=7), path)
    shutil.copy(path, copy)
    others = ({"random_state": 1}, {"weights": path}, {"weights": copy}, {"backbone": "timm/test_efficientnet"})
    counts = [
        computed(clone(cached).set_params(**other).fit_transform(IMAGES) is not None and cached) for other in others
    ]
    assert counts == [12, 18, 18, 24]


def test_published_file_decides_the_key_and_is_not_loaded_on_a_hit(
    hub: Callable[[int], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub(5)
    cached = PretrainedFeatureExtractor(SMALL, cache=str(tmp_path / "store"))
    features = cached.transform(IMAGES)
    MEMORY.clear()
    with monkeypatch.context() as patch:
        patch.setattr(shelf, "build_with_weights", lambda *args: pytest.fail("loaded"))
        shelf._renew_locks()
        np.testing.assert_array_equal(cached.transform(IMAGES), features)
    cached.set_params(layers="all").transform(255 - IMAGES)  # loads the network
    hub(6)
    expected = random(SMALL, layers="all", random_state=6).transform(IMAGES)
    assert relative_difference(cached.transform(IMAGES), expected) < 1e-5
    assert computed(cached) == 3 * len(IMAGES)


# Names and imports


@pytest.mark.parametrize(("wrong", "near"), [("resnet81", "'timm/resnet18'"), ("resnet18.tv_in2k", "resnet18.tv_in1k")])
def test_unknown_name_names_the_nearest(wrong: str, near: str) -> None:
    with pytest.raises(BackboneError, match=f'timm {timm.__version__} .*got backbone="timm/{wrong}"') as caught:
        random(f"timm/{wrong}").fit(IMAGES)
    assert near in str(caught.value)


def test_unknown_weights_name_the_nearest() -> None:
    with pytest.raises(WeightsError, match=r"'a1_in1k'.*got weights='a1_in2k'"):
        PretrainedFeatureExtractor("timm/resnet18", weights="a1_in2k").fit(IMAGES)


@needs_network("test_vit4")
def test_network_of_which_nothing_is_published_says_so() -> None:
    with pytest.raises(WeightsError, match="expected to be None, or the path"):
        PretrainedFeatureExtractor("timm/test_vit4").fit(IMAGES)  # of which nothing is published
    assert list_layers("timm/test_vit4")


def test_absent_timm_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    entry_of.cache_clear()
    with pytest.raises(BackboneError, match=r'pip install "featx\[timm\]"'):
        random(SMALL).fit(IMAGES)


def test_timm_is_imported_for_its_own_names_alone_and_without_a_warning() -> None:
    code = f"""if True:
        import sys, numpy as np, featx
        assert not {{"timm", "torch", "torchvision"}} & set(sys.modules)
        X = np.zeros((1, 40, 40, 3), np.uint8)
        featx.PretrainedFeatureExtractor("featx_micro", layers="all").transform(X)
        featx.list_layers("resnet18")
        assert "timm" not in sys.modules
        featx.PretrainedFeatureExtractor({SMALL!r}, weights=None).transform(X)
        assert "timm" in sys.modules
    """
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)


def test_networks_that_run_while_they_are_built_have_layers_too() -> None:
    """Their constructors send real zeros through what is there so far."""
    assert list_layers("timm/vit_tiny_r_s16_p8_224")
    assert list_layers("timm/vitamin_small_224")

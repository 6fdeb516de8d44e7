"""Checkpoints as people have them: wrapped, prefixed, renamed, with another head, or something else altogether."""

from __future__ import annotations

import argparse
import functools
import io
import itertools
import os
import pickle
import re
import tempfile
import warnings
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save, save_file
from sklearn.base import clone
from torch import nn

from featx import FeatureStore, FineTuneClassifier, PretrainedFeatureExtractor
from featx.backbones import networks as shelf
from featx.backbones.catalogue import resolve_backbone
from featx.backbones.checkpoints import read_checkpoint
from featx.backbones.networks import network_spec
from featx.backbones.readings import Demand, Reading, readings_of
from featx.backbones.table import FAMILIES
from featx.backbones.weights import build_with_weights, resolve_weights
from featx.exceptions import NotFinite, WeightsError

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, size=(3, 32, 32, 3), dtype=np.uint8)
MICRO = "featx_micro"
OF_TORCHVISION = [next(iter(family.channels)) for family in FAMILIES]
OF_TIMM = [
    *("timm/resnet18", "timm/vit_tiny_patch16_224", "timm/swin_tiny_patch4_window7_224", "timm/densenet121"),
    *("timm/test_resnet", "timm/test_efficientnet", "timm/test_convnext", "timm/test_byobnet", "timm/test_vit"),
    "timm/mobilenetv3_small_100",
]
EVERY = OF_TORCHVISION + OF_TIMM
State = dict[str, torch.Tensor]


def state_of(backbone: str, seed: int = 0) -> State:
    state = network_spec(backbone, None, seed).load("cpu", torch.float32).module.state_dict()
    return {name: value.contiguous() for name, value in state.items()}


@functools.cache
def skeleton(backbone: str) -> tuple[nn.Module, tuple[str, ...]]:
    entry = resolve_backbone(backbone).entry
    assert entry is not None
    return entry.skeleton(), entry.head


@functools.cache
def numbered(backbone: str, first: int = 1) -> State:
    """A state that takes no room: every tensor is one number, another for each."""
    shapes = skeleton(backbone)[0].state_dict().items()
    return {name: torch.tensor(float(i)).expand(value.shape) for i, (name, value) in enumerate(shapes, first)}


def extractor(weights: object, backbone: str = MICRO, **parameters: object) -> PretrainedFeatureExtractor:
    return PretrainedFeatureExtractor(backbone, weights=weights, **parameters)


# How checkpoints differ


def without_head(state: State, head: tuple[str, ...]) -> State:
    return {name: value for name, value in state.items() if not name.startswith(tuple(f"{child}." for child in head))}


def with_other_classes(state: State, head: tuple[str, ...]) -> State:
    """The output layers for one class more."""
    last: dict[str, str] = {}
    for name in (name for name in state if name not in without_head(state, head)):
        child = next(child for child in head if name.startswith(f"{child}."))
        last[child] = name.rpartition(".")[0]
    wider = {f"{module}.{kind}" for module in last.values() for kind in ("weight", "bias")} & state.keys()
    return {
        name: torch.zeros(value.shape[0] + 1, *value.shape[1:]) if name in wider else value
        for name, value in state.items()
    }


def with_other_layers(state: State, head: tuple[str, ...]) -> State:
    """A head that somebody put there: a layer under a name that the network does not have."""
    return {**without_head(state, head), **{f"{child}.own.{kind}": torch.ones(2) for child in head for kind in "wb"}}


def with_other_names(state: State, head: tuple[str, ...]) -> State:
    """A head that is called otherwise, of several layers."""
    own = {"projector.0.weight": torch.ones(2, 3), "projector.1.weight": torch.ones(2), "last_fc.w": torch.ones(1, 2)}
    return {**without_head(state, head), **own}


HEADS: dict[str, Callable[[State, tuple[str, ...]], State]] = {
    "as it is": lambda state, head: state,
    "absent": without_head,
    "other classes": with_other_classes,
    "other layers": with_other_layers,
    "other names": with_other_names,
}
PREFIXES = ("", "module.", "_orig_mod.", "backbone.", "module.encoder_q.", "model._orig_mod.", "net.layer1.", "0.")
WRAPPERS = ((), ("state_dict",), ("model",), ("ema", "shadow"), ("teacher",), ("my.key", "best so far"), (0,))
NAMES = ("model_best.pth.tar", "last.ckpt", "pytorch_model.bin", "W.PTH", "weights", "a#b", "MODEL.SAFETENSORS", "Ü.pt")
BESIDE: dict[str, Any] = {
    "epoch": 3,
    "optimizer": {"state": {0: {"step": torch.tensor(3.0), "exp_avg": torch.zeros(2)}}, "param_groups": [{"lr": 0.1}]},
    "args": argparse.Namespace(arch="resnet18", data=Path("photos")),
    "best_acc": np.float64(0.5),
    "history": defaultdict(list, {"loss": [1.0]}),
    "last": deque([1, 2], maxlen=3),
}


def wrapped(state: State, prefix: str, wrapper: tuple[Any, ...], beside: dict[str, Any]) -> dict[Any, Any]:
    content: dict[Any, Any] = {prefix + name: value for name, value in state.items()}
    for key in reversed(wrapper):
        content = {**beside, key: content}
    return content


def place_of(prefix: str, wrapper: tuple[Any, ...]) -> str:
    return ".".join([*map(str, wrapper), *prefix.replace("_orig_mod.", "").split(".")]).rstrip(".")


def put(content: object, path: Path, **how: object) -> Path:
    torch.save(content, path, **how)
    return path


def read(content: object, backbone: str, key: str | None = None, name: str = "w", **how: object) -> list[Reading]:
    """Readings that fit a network, without building it, of a file that torch wrote."""
    module, head = skeleton(backbone)
    with tempfile.TemporaryDirectory() as folder:
        found = read_checkpoint(str(put(content, Path(folder) / name, **how)))
    return [reading for reading in readings_of(found, Demand(module.state_dict(), head), key) if reading.fits]


def numbers(tensors: State) -> dict[str, tuple[torch.Size, float]]:
    return {name: (value.shape, value[(0,) * value.ndim].item()) for name, value in tensors.items()}


words = st.text("abz_-09 é", min_size=1, max_size=6)
forms = st.fixed_dictionaries(
    {
        "prefix": st.sampled_from(PREFIXES)
        | st.lists(words, max_size=3).map(lambda parts: "".join(f"{p}." for p in parts)),
        "wrapper": st.sampled_from(WRAPPERS) | st.lists(words | st.integers(0, 9), max_size=3).map(tuple),
        "beside": st.sets(st.sampled_from(sorted(BESIDE))).map(lambda keys: {key: BESIDE[key] for key in keys}),
    }
)
legacy = st.booleans().map(lambda old: {"_use_new_zipfile_serialization": not old})


# Tensors


@pytest.mark.parametrize("backbone", EVERY)
@given(form=forms, head=st.sampled_from(sorted(HEADS)), name=st.sampled_from(NAMES), how=legacy)
@settings(max_examples=3, deadline=None)
def test_tensors_are_found_in_every_wrapper_under_every_prefix(
    backbone: str, form: dict[str, Any], head: str, name: str, how: dict[str, bool]
) -> None:
    state = numbered(backbone)
    given_state = HEADS[head](state, skeleton(backbone)[1])
    (reading,) = read(wrapped(given_state, **form), backbone, name=name, **how)
    kept = {name: value for name, value in state.items() if given_state.get(name) is value}
    assert numbers(reading.tensors) == numbers(kept)
    assert reading.missing == {name.rpartition(".")[0] for name in state.keys() - kept.keys()}
    assert reading.place == place_of(form["prefix"], form["wrapper"])


@given(
    forms=st.lists(forms, min_size=2, max_size=3, unique_by=lambda form: place_of(form["prefix"], form["wrapper"])),
    differ=st.booleans(),
    beside=st.booleans(),
)
@settings(max_examples=10, deadline=None)
def test_several_networks_are_an_error_only_where_their_tensors_differ(
    forms: list[dict[str, Any]], differ: bool, beside: bool
) -> None:
    states = [numbered(MICRO, 1 + 1000 * i * differ) for i in range(len(forms))]
    content: dict[Any, Any] = {}
    for i, (form, state) in enumerate(zip(forms, states, strict=True)):
        content[f"n{i}"] = wrapped(state, **form)
    places = [f"n{i}.{place_of(form['prefix'], form['wrapper'])}".rstrip(".") for i, form in enumerate(forms)]
    with tempfile.TemporaryDirectory() as folder:
        path = put(content, Path(folder) / "last.ckpt")
        if not differ:
            loaded = loaded_by(path)
            assert numbers(loaded) == numbers(states[0])
            return
        with pytest.raises(WeightsError, match="of different tensors") as caught:
            loaded_by(path)
        assert all(repr(place) in str(caught.value) for place in places)
        chosen = re.search(r"weights=(\(.*\))\.$", str(caught.value))
        assert chosen is not None
        loaded_by(eval(chosen[1]))  # the way out that it tells
        for i, (place, state) in enumerate(zip(places, states, strict=True)):
            for key in (place, f"n{i}"):
                assert numbers(loaded_by((path, key))) == numbers(state)


def loaded_by(weights: object, backbone: str = MICRO) -> State:
    resolved = resolve_backbone(backbone)
    return build_with_weights(resolved, resolve_weights(resolved, weights), 0).module.state_dict()


def test_average_that_lies_inside_of_the_network_is_another_network() -> None:
    model, average = numbered(MICRO), numbered(MICRO, 1001)
    both = {**model, **{f"teacher.{name}": value for name, value in average.items()}}
    assert {reading.place for reading in read(both, MICRO)} == {"", "teacher"}
    for key, state in (("", model), ("teacher", average)):
        (reading,) = read(both, MICRO, key)
        assert numbers(reading.tensors) == numbers(state)


@pytest.mark.parametrize(("small", "large"), [("resnet18", "resnet34"), ("shufflenet_v2_x0_5", "shufflenet_v2_x1_0")])
def test_tensors_of_a_larger_network_are_not_those_of_a_smaller_one(small: str, large: str) -> None:
    """ResNet-34 has every tensor of ResNet-18, in the same shape, and more."""
    state = {f"module.{name}": value for name, value in numbered(large).items()}
    assert not read({"state_dict": state}, small)


@pytest.mark.parametrize(
    ("backbone", "name", "shape"),
    [
        ("resnet18", "layer5.0.conv1.weight", (8, 8, 3, 3)),  # another stage
        (MICRO, "norm.weight", (8,)),  # vectors alone: of what scales the features
        ("timm/test_vit", "reg_token", (1, 4, 64)),  # tokens, which change all others
    ],
)
def test_what_may_belong_to_a_larger_trunk_is_no_old_head(backbone: str, name: str, shape: tuple[int, ...]) -> None:
    assert not read({**numbered(backbone), name: torch.zeros(shape)}, backbone)


def test_names_that_torch_puts_inside_of_a_network_are_left_out() -> None:
    state = {
        name.replace("features.", "features._checkpoint_wrapped_module."): v for name, v in numbered(MICRO).items()
    }
    (reading,) = read(state, MICRO)
    assert numbers(reading.tensors) == numbers(numbered(MICRO))


@pytest.mark.parametrize(
    ("backbone", "today", "then"),
    [("densenet121", r"(layer\d+\.(?:norm|conv))([12]\.)", r"\1.\2"), ("vit_b_16", r"\.mlp\.0\.", ".mlp.linear_1.")],
)
def test_old_names_of_torchvision_are_known_in_every_wrapper(backbone: str, today: str, then: str) -> None:
    state = numbered(backbone)
    old = {re.sub(today, then, name): value for name, value in state.items()}
    assert old.keys() != state.keys()
    with tempfile.TemporaryDirectory() as folder:
        path = put({"state_dict": {f"module.{name}": value for name, value in old.items()}}, Path(folder) / "w")
        assert numbers(loaded_by(path, backbone)) == numbers(state)


def as_published(state: State) -> State:
    """A ConvNeXt's tensors as its authors name them."""
    renames = (
        *((r"^stem\.", "downsample_layers.0."), (r"stages\.(\d)\.downsample", r"downsample_layers.\1")),
        *((r"\.blocks\.", "."), ("conv_dw", "dwconv"), (r"mlp\.fc", "pwconv"), (r"^head\.(fc\.)?", "head.")),
        (r"^head\.norm", "norm"),
    )
    return {functools.reduce(lambda name, pair: re.sub(*pair, name), renames, name): v for name, v in state.items()}


@pytest.mark.parametrize(("prefix", "wrapper"), [*zip(PREFIXES, WRAPPERS, strict=False)][:5])
def test_names_of_a_networks_authors_are_those_of_timm(tmp_path: Path, prefix: str, wrapper: tuple[Any, ...]) -> None:
    state = numbered("timm/test_convnext")
    path = put(wrapped(as_published(state), prefix, wrapper, BESIDE), tmp_path / "w")
    assert not as_published(state).keys() & state.keys()
    assert numbers(loaded_by(path, "timm/test_convnext")) == numbers(state)


def test_names_of_authors_with_other_classes_and_an_average_are_no_special_case(tmp_path: Path) -> None:
    model, average = numbered("timm/test_convnext"), numbered("timm/test_convnext", 1001)
    other = {**as_published(model), "head.weight": torch.zeros(5, 3)}
    loaded = numbers(without_head(loaded_by(put({"model": other}, tmp_path / "w"), "timm/test_convnext"), ("head.fc",)))
    assert loaded == numbers(without_head(model, ("head.fc",)))
    path = put({"model": as_published(model), "ema": as_published(average)}, tmp_path / "both")
    with pytest.raises(WeightsError, match=r"2 of different tensors, under the keys 'model', 'ema'"):
        loaded_by(path, "timm/test_convnext")
    assert numbers(loaded_by((path, "ema"), "timm/test_convnext")) == numbers(average)


def test_network_of_another_image_size_is_another_network(tmp_path: Path) -> None:
    """timm would interpolate the positions."""
    state = timm.create_model("test_vit", img_size=192).state_dict()
    with pytest.raises(WeightsError, match=r"of another shape: pos_embed \(1, 145, 64\) in place of \(1, 101, 64\)"):
        loaded_by(put(state, tmp_path / "w"), "timm/test_vit")


def test_network_of_another_image_size_is_read_where_its_size_is_set(tmp_path: Path) -> None:
    network = timm.create_model("test_vit", img_size=96).eval()
    path = put(network.state_dict(), tmp_path / "w")
    with pytest.raises(WeightsError, match=r"set image_size to the side of the images"):
        extractor(path, "timm/test_vit").transform(IMAGES)
    sized = extractor(path, "timm/test_vit", image_size=96)
    images = torch.rand(2, 3, 96, 96)
    with torch.inference_mode():
        expected = network.forward_head(network.forward_features(images), pre_logits=True)
    rows = clone(sized).set_params(preprocess=None).transform(images)
    np.testing.assert_allclose(rows, expected, rtol=1e-4, atol=1e-5)
    native = put(timm.create_model("test_vit").state_dict(), tmp_path / "native")  # is taken to that size as before
    assert extractor(native, "timm/test_vit", image_size=96).transform(IMAGES).shape == sized.transform(IMAGES).shape
    with pytest.raises(WeightsError, match="pos_embed"):
        sized.set_params(image_size=64).transform(IMAGES)


def test_fullest_of_equal_networks_is_taken(tmp_path: Path) -> None:
    state = state_of(MICRO)
    content = {"trunk": without_head(state, ("head",)), "all": state, "again": without_head(state, ("head",))}
    logits = extractor(put(content, tmp_path / "w"), layers="head").transform(IMAGES)
    np.testing.assert_array_equal(logits, extractor(put(state, tmp_path / "plain"), layers="head").transform(IMAGES))


# Heads


def test_old_output_layer_is_left_out_and_layers_before_it_are_kept(tmp_path: Path) -> None:
    """The penultimate layer of MobileNetV3 lies behind a hidden layer of its head, whose shape knows no classes."""
    state = state_of("mobilenet_v3_small")
    old = put(with_other_classes(state, ("classifier",)), tmp_path / "old.pth")
    plain = extractor(put(state, tmp_path / "plain.pth"), "mobilenet_v3_small", image_size=32)
    for layers in ("penultimate", -1):
        expected = plain.set_params(layers=layers).transform(IMAGES)
        np.testing.assert_array_equal(clone(plain).set_params(weights=old).transform(IMAGES), expected)
    with pytest.raises(WeightsError, match=r"shape for classifier\.3\. Read a stage before"):
        clone(plain).set_params(weights=old, layers="classifier").transform(IMAGES)


def test_head_with_other_layers_counts_as_none(tmp_path: Path) -> None:
    state = state_of("mobilenet_v3_small")  # somebody's activation may lie behind a layer of the same shape
    other = {name: value for name, value in state.items() if not name.startswith("classifier.3")}
    other |= {"classifier.2.weight": torch.zeros(5, 1024), "classifier.2.bias": torch.zeros(5)}
    given_file = extractor(put(other, tmp_path / "w"), "mobilenet_v3_small", image_size=32)
    assert given_file.set_params(layers=-1).transform(IMAGES).shape == (3, 576)
    with pytest.raises(WeightsError, match=r"shape for classifier\.0"):
        clone(given_file).set_params(layers="penultimate").transform(IMAGES)


def test_old_head_of_another_name_is_told_and_fine_tuned(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trunk = without_head(state_of(MICRO), ("head",))
    old = put({f"module.{name}": v for name, v in with_other_names(trunk, ("head",)).items()}, tmp_path / "old.pth")
    rows = extractor(old, verbose=1).transform(IMAGES)
    assert "without last_fc, projector of the file, which the network does not have" in capsys.readouterr().err
    np.testing.assert_array_equal(rows, extractor(put(trunk, tmp_path / "trunk")).transform(IMAGES))
    FineTuneClassifier(MICRO, weights=old, epochs=1).fit(IMAGES, ["a", "b", "a"]).predict(IMAGES)


@pytest.mark.parametrize("freeze", ["all", 0])
def test_checkpoint_of_another_task_is_fine_tuned(tmp_path: Path, freeze: object) -> None:
    state, y = state_of(MICRO), ["a", "b", "a"]
    old = put({"state_dict": with_other_classes(state, ("head",))}, tmp_path / "old")
    scores = [
        FineTuneClassifier(MICRO, weights=weights, freeze=freeze, epochs=1, random_state=0)
        .fit(IMAGES, y)
        .predict_proba(IMAGES)
        for weights in (old, (old, "state_dict"), put(state, tmp_path / "plain"))
    ]
    np.testing.assert_array_equal(scores[0], scores[2])
    np.testing.assert_array_equal(scores[1], scores[2])


# Features


def variants(state: State, head: tuple[str, ...]) -> Iterator[tuple[dict[str, Any], str, dict[str, bool], object]]:
    """Every prefix, wrapper, name, head and format at least once."""
    n = max(len(PREFIXES), len(WRAPPERS), len(NAMES), len(HEADS))
    rows = (
        itertools.islice(itertools.cycle(of), n) for of in (PREFIXES, WRAPPERS, NAMES, sorted(HEADS), (True, False))
    )
    for prefix, wrapper, name, how, new in zip(*rows, strict=True):
        content = wrapped(HEADS[how](state, head), prefix, wrapper, BESIDE)
        yield content, name, {"_use_new_zipfile_serialization": new}, wrapper


def check_features(backbone: str, folder: Path, **parameters: object) -> int:
    """Compare features of a plain file with those of its variants; how many there were."""
    state, (_, head), count = state_of(backbone), skeleton(backbone), 0
    plain = extractor(put(state, folder / "plain.pth"), backbone, layers=-1, **parameters)
    images = RNG.integers(0, 256, size=(2, 64, 64, 3), dtype=np.uint8)
    expected = plain.transform(images)
    save_file({f"model.{name}": value.clone() for name, value in state.items()}, folder / "safe.bin")
    files = itertools.chain(
        [folder / "safe.bin"], (put(content, folder / name, **how) for content, name, how, _ in variants(state, head))
    )
    for file in files:
        np.testing.assert_array_equal(clone(plain).set_params(weights=file).transform(images), expected, str(file))
        file.unlink()
        shelf._renew_locks()  # forgets what was loaded
        count += 1
    return count


@pytest.mark.parametrize(("backbone", "size"), [(MICRO, 32), ("squeezenet1_1", 32), ("timm/test_resnet", 32)])
def test_features_of_a_checkpoint_are_those_of_its_plain_state(backbone: str, size: int, tmp_path: Path) -> None:
    assert check_features(backbone, tmp_path, image_size=size) == 9


@pytest.mark.slow
@pytest.mark.parametrize("backbone", EVERY)
def test_features_of_every_familys_checkpoints_are_those_of_the_plain_state(backbone: str, tmp_path: Path) -> None:
    assert check_features(backbone, tmp_path) == 9


# What is no checkpoint


def test_nothing_in_a_file_is_executed_or_imported(tmp_path: Path) -> None:
    class Evil:
        def __init__(self, function: Callable[..., object], *args: object) -> None:
            self.what = function, args

        def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
            return self.what

    state, mark = state_of(MICRO), tmp_path / "executed"
    plain = extractor(put(state, tmp_path / "plain")).transform(IMAGES)
    evil = [Evil(eval, f"open({str(mark)!r}, 'w')"), Evil(open, str(mark), "w"), Evil(os.mkdir, str(mark))]
    for i, (one, old) in enumerate(itertools.product(evil, (False, True))):
        path = put({"model": state, "x": one}, tmp_path / str(i), _use_new_zipfile_serialization=not old)
        try:
            np.testing.assert_array_equal(extractor(path).transform(IMAGES), plain)
        except WeightsError as error:  # torch hears nothing of modules like os at all
            assert "without executing" in str(error)  # noqa: PT017
        assert not mark.exists()


class Odd(list):
    """A container that only its own code can fill."""


def html(path: Path) -> None:
    path.write_bytes(b"\n<!DOCTYPE html>\n<html><body>Sign in</body></html>")


def script(path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.script(nn.Linear(2, 2)).save(str(path))


def cut(make: Callable[[], bytes], at: int) -> Callable[[Path], None]:
    return lambda path: path.write_bytes(make()[:at]) and None


def of(content: object, **how: object) -> Callable[[Path], None]:
    return lambda path: put(content, path, **how) and None


def torch_bytes(old: bool) -> bytes:
    with tempfile.NamedTemporaryFile() as file:
        torch.save(state_of(MICRO), file.name, _use_new_zipfile_serialization=not old)
        return Path(file.name).read_bytes()


def np_bytes() -> bytes:
    stream = io.BytesIO()
    np.savez(stream, a=np.zeros(2))
    return stream.getvalue()


STRANGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "empty": (lambda path: path.write_bytes(b""), r"is empty \(0 bytes\)\. Fetch"),
    "web page": (html, r"is a web page.*Download the file itself"),
    "error of a server": (
        lambda path: path.write_text("<?xml version='1.0'?><Error/>"),
        r"is a web page \(HTML or XML\)",
    ),
    "pointer": (
        lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d\nsize 46830571\n"),
        r"Git LFS pointer.*git lfs pull",
    ),
    "index of shards": (lambda path: path.write_text('{"weight_map": {}}'), r"is a text file \(JSON\)"),
    "other JSON": (lambda path: path.write_text('{"ab": [{}]}'), r"is a text file \(JSON\)"),
    "text": (lambda path: path.write_text("not a checkpoint"), r"begins with b'not a ch'"),
    "zip cut short": (cut(lambda: torch_bytes(False), 4000), r"is an archive that was cut short"),
    "old file cut short": (cut(lambda: torch_bytes(True), 4000), r"damaged or was cut short"),
    "safetensors cut short": (
        cut(lambda: save(state_of(MICRO)), 9000),
        r"safetensors file that is damaged or was cut short",
    ),
    "compressed": (lambda path: joblib.dump(0, path, compress=("gzip", 3)), r"is compressed \(gzip\)"),
    "archive": (lambda path: path.write_bytes(np_bytes()), r"is a NumPy archive"),
    "another pickle": (lambda path: path.write_bytes(pickle.dumps({"a": 1})), r"pickle that torch\.save did not write"),
    "TorchScript": (script, r"is a TorchScript archive.*torch\.jit\.load"),
    "whole network": (of(nn.Linear(2, 3)), r"holds a whole network.*torch\.nn\.modules\.linear\.Linear"),
    "whole network below a key": (of({"epoch": 1, "model": nn.Linear(2, 3)}), r"\)\['model'\]\.state_dict\(\)"),
    "old whole network": (of(nn.Linear(2, 3), _use_new_zipfile_serialization=False), r"without executing"),
    "odd container": (of({"model": nn.Linear(2, 3).state_dict(), "odd": Odd([1])}), r"test_checkpoints\.Odd\)"),
    "newer pickle": (of(nn.Linear(2, 3).state_dict(), pickle_protocol=4), r"without executing"),
    "no tensors": (of({"epoch": 3}), r"holds no named tensors but a dict of epoch\."),
    "tensors without values": (of({"a": torch.ones(3, device="meta")}), r"holds no named tensors but a dict of a\."),
    "a text": (of("word\n" * 5000), r"holds no named tensors but a str\."),
    "keys that are no names": (of({b"w" * 500: torch.ones(3, 3)}), r"holds no named tensors but a dict of \S{0,40}\. "),
    "an object": (of(argparse.Namespace(a=1)), r"holds no named tensors but an argparse.Namespace\."),
}


@pytest.mark.parametrize("kind", STRANGE)
def test_file_that_is_no_checkpoint_is_told_in_one_line_that_names_the_kind(kind: str, tmp_path: Path) -> None:
    make, words = STRANGE[kind]
    make(tmp_path / "weights.pth")
    with pytest.raises(WeightsError, match=words) as caught:
        extractor(tmp_path / "weights.pth").transform(IMAGES)
    text = str(caught.value)
    assert text.startswith("A file of tensors is expected, got weights=")
    assert len(text.replace(str(tmp_path), "")) < 420
    assert text.isprintable()


@pytest.mark.parametrize(
    "kind",
    ["TorchScript", "whole network", "whole network below a key", "old whole network", "odd container", "newer pickle"],
)
def test_line_that_mends_a_file_mends_it(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    STRANGE[kind][0](Path("weights.pth"))
    for _ in range(2):  # an old file that was written anew may hold a whole network
        try:
            found = read_checkpoint("weights.pth")
            break
        except WeightsError as error:
            line = re.search(r"torch\.save\(.*\)", str(error))
            assert line is not None
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                exec(line[0], {"torch": torch})
    else:
        found = read_checkpoint("weights.pth")
    assert {name.rpartition(".")[2] for name in found} == {"weight", "bias"}


def test_folder_and_file_that_is_not_there_say_so(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(WeightsError, match=r"which is a folder\. Name the file in it \(model\.safetensors"):
        extractor(tmp_path).fit(IMAGES)
    for weights in (tmp_path / "absent", str(tmp_path / "absent"), (tmp_path / "absent", "ema"), "absent.ckpt"):
        with pytest.raises(WeightsError, match=r"existing file of tensors is expected.*absent"):
            extractor(weights).fit(IMAGES)
    with pytest.raises(WeightsError, match=r"weights='absent', and there is no such file"):
        extractor("absent").fit(IMAGES)
    with pytest.raises(WeightsError, match=r"got weights='https://host/w\.pth'\. Download it"):
        extractor("https://host/w.pth").fit(IMAGES)


def test_key_that_the_file_does_not_have_is_an_error_that_names_those_it_has(tmp_path: Path) -> None:
    path = put({"state_dict": state_of(MICRO), "epoch": 3}, tmp_path / "last.ckpt")
    with pytest.raises(WeightsError, match=r"'state_dict_ema'\)\. Take one of 'state_dict'"):
        extractor((path, "state_dict_ema")).transform(IMAGES)
    for wrong in ((path,), (path, 3), (path, "a", "b"), 3):
        with pytest.raises((WeightsError, ValueError), match="weights"):
            extractor(wrong).transform(IMAGES)


@pytest.mark.parametrize("content", ["published", "authors"])
def test_keys_that_an_error_names_can_be_typed_as_they_stand_there(tmp_path: Path, content: str) -> None:
    backbone = "timm/test_convnext" if content == "authors" else MICRO
    state = numbered(backbone)
    inner = as_published(state) if content == "authors" else state
    path = put({"state_dict": {"ema_model": inner, "other": {"x": torch.ones(2)}}, "epoch": 3}, tmp_path / "last.ckpt")
    with pytest.raises(WeightsError, match=r"Take one of 'state_dict\.ema_model'\.$"):
        loaded_by((path, "ema_model"), backbone)
    assert numbers(loaded_by((path, "state_dict.ema_model"), backbone)) == numbers(state)


def test_key_of_a_file_without_keys_is_told_to_be_left_out(tmp_path: Path) -> None:
    path = put(numbered(MICRO), tmp_path / "w")
    with pytest.raises(WeightsError, match=r"Take none: weights='.*w'\.$"):
        loaded_by((path, "model"))
    loaded_by(str(path))


@pytest.mark.parametrize("name", ["last.ckpt", "weights", "a#b"])
def test_file_and_key_in_one_text_are_told_to_be_a_pair(tmp_path: Path, name: str) -> None:
    path = put({"ema": numbered(MICRO)}, tmp_path / name)
    with pytest.raises(WeightsError, match="Pass them as a pair") as caught:
        loaded_by(f"{path}#ema")
    (pair,) = re.findall(r"weights=(\(.*\))\.$", str(caught.value))
    assert eval(pair) == (str(path), "ema")
    loaded_by(eval(pair))


def test_weights_of_another_network_say_first_what_to_do_and_then_a_few_names(tmp_path: Path) -> None:
    path = put({"state_dict": numbered("resnet50")}, tmp_path / "w")
    with pytest.raises(WeightsError) as caught:
        loaded_by(path, "resnet18")
    first, _, rest = str(caught.value).replace(str(path), "w").partition(" What differs under 'state_dict' is ")
    assert first == (
        "Weights for resnet18 are expected, got weights='w', which do not fit it. Name the backbone that they were "
        "made for, or pass a file for this one."
    )
    assert re.search(r"unexpected: \S+, \S+, \S+ and \d+ more", rest)
    assert len(rest) < 400


# Recipes


def test_same_tensors_in_another_file_are_the_same_recipe(tmp_path: Path) -> None:
    state = state_of(MICRO)
    content = {"state_dict": {f"module.{name}": value for name, value in state.items()}, "other": state_of(MICRO, 1)}
    files = [
        put(state, tmp_path / "plain.pth"),
        put({"model": state, "epoch": 3}, tmp_path / "W.PTH", _use_new_zipfile_serialization=False),
        (put(content, tmp_path / "last.ckpt"), "state_dict"),
    ]
    save_file(state, tmp_path / "safe")
    store = FeatureStore(tmp_path / "store")
    rows = [extractor(file, cache=store).transform(IMAGES) for file in [*files, tmp_path / "safe"]]
    assert all(np.array_equal(row, rows[0]) for row in rows)
    assert store.info()["computed"] == len(IMAGES)
    extractor((files[2][0], "other"), cache=store).transform(IMAGES)
    extractor(put(with_other_classes(state, ("head",)), tmp_path / "old"), cache=store).transform(IMAGES)
    assert store.info()["computed"] == 3 * len(IMAGES)  # the head belongs to the recipe
    extractor(put(without_head(state, ("head",)), tmp_path / "none"), cache=store).transform(IMAGES)
    assert store.info()["computed"] == 3 * len(IMAGES)  # one that is left out counts as none


def test_file_written_anew_with_the_same_tensors_in_mid_call_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = state_of(MICRO)
    path = put(state, tmp_path / "w")
    monkeypatch.setattr("featx.activations.engine.check_weights_reach", lambda *_: put({"model": state}, path))
    assert extractor(path, cache=tmp_path / "store").transform(IMAGES).shape == (3, 224)


def test_counts_of_batches_that_nothing_reads_are_no_other_weights(tmp_path: Path) -> None:
    """Old files lack them."""
    backbone = resolve_backbone("timm/test_resnet")
    state = state_of("timm/test_resnet")
    old = {name: value for name, value in state.items() if not name.endswith("num_batches_tracked")}
    assert old.keys() < state.keys()
    contents = {
        build_with_weights(backbone, resolve_weights(backbone, put(one, tmp_path / f"{len(one)}")), 0).content
        for one in (state, old)
    }
    assert len(contents) == 1


class WithState(nn.Module):
    """A module with a state that is no tensor, as quantised ones and some of timm's have."""

    def __init__(self, factor: float = 1.0) -> None:
        super().__init__()
        self.conv, self.fc, self.factor = nn.Conv2d(3, 4, 8, stride=8), nn.Linear(4, 2), factor

    def get_extra_state(self) -> dict[str, int]:
        return {"scale": 1}

    def set_extra_state(self, state: dict[str, int]) -> None:
        pass

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.conv(x / self.factor).mean((2, 3)))


def test_states_that_are_no_tensors_are_in_nobodys_way(tmp_path: Path) -> None:
    path, images = put(WithState().state_dict(), tmp_path / "w"), torch.rand(3, 3, 16, 16)
    rows = PretrainedFeatureExtractor(WithState(), weights=path, preprocess=None).transform(images)
    assert np.isfinite(rows).all()
    with pytest.raises(NotFinite, match="grow beyond all numbers"):
        PretrainedFeatureExtractor(WithState(0.0), preprocess=None).transform(images)
    tuned = FineTuneClassifier(WithState(), preprocess=None, freeze=0, epochs=1).fit(images, ["a", "b", "a"])
    assert np.isfinite(tuned.to_extractor().transform(images)).all()


def test_verbose_says_once_how_a_file_was_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = state_of(MICRO)
    path = put({"ema": with_other_classes(state, ("head",))}, tmp_path / "last.ckpt")
    for _ in range(2):
        extractor(path, verbose=1).transform(IMAGES)
    captured = capsys.readouterr()
    note = f"{path}: read tensors under 'ema', without head, which the file has in another shape.\n"
    assert captured.err.count(note) == 1
    assert not captured.out
    extractor(put(state, tmp_path / "plain"), verbose=1).transform(IMAGES)
    assert "read tensors" not in capsys.readouterr().err
    for freeze in ("all", -1, 0):
        path = put({"model": state}, tmp_path / f"{freeze}.ckpt")
        FineTuneClassifier(MICRO, weights=path, freeze=freeze, epochs=1, verbose=1).fit(IMAGES, [0, 1, 0])
        assert capsys.readouterr().err.count(f"{path}: read tensors under 'model'.\n") == 1


# The pair as a parameter


def test_pair_of_path_and_key_survives_whatever_estimators_go_through(tmp_path: Path) -> None:
    model, average = state_of(MICRO, 1), state_of(MICRO, 2)
    path = put({"model": model, "ema": average}, tmp_path / "a#b")
    expected = extractor(put(average, tmp_path / "plain")).transform(IMAGES)
    pair = extractor((path, "ema"))
    for one in (pair, clone(pair), pickle.loads(pickle.dumps(pair)), extractor([str(path), "ema"])):
        np.testing.assert_array_equal(one.transform(IMAGES), expected)
    tuned = FineTuneClassifier(MICRO, weights=(path, "ema"), epochs=1, random_state=0).fit(IMAGES, [0, 1, 0])
    tuned.save(tmp_path / "tuned.safetensors")
    loaded = FineTuneClassifier.load(tmp_path / "tuned.safetensors")
    assert loaded.weights == (str(path), "ema")
    np.testing.assert_array_equal(loaded.predict_proba(IMAGES), tuned.predict_proba(IMAGES))

"""Other ways to the same features: a plain loop and other libraries, each as its own documentation shows it.

A way takes paths and returns the features of all of them. Peers are given the same tensors; where a library insists on
fetching published ones, what fetches them is replaced. A peer that is not installed, or does not have the network, is
named with the reason.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Sequence
from unittest.mock import patch

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torchvision.models import get_model
from torchvision.models.feature_extraction import create_feature_extractor
from torchvision.transforms import v2

BATCH, WORKERS = 32, torch.get_num_threads()  # as many as featx decodes with

State = dict[str, torch.Tensor]
Way = Callable[[Sequence[str]], np.ndarray]

LABELS = {
    "loop": "plain loop",
    "fx": "torchvision fx + DataLoader",
    "timm": "timm + DataLoader",
    "img2vec": "img2vec",
    "embetter": "embetter",
}
_IMG2VEC = {"resnet18": 512, "resnet50": 2048}
_TIMM = ("resnet18", "resnet50")  # with the names of torchvision's tensors

#: What the weights were trained with, as torchvision's own transforms do it.
TRANSFORMS = v2.Compose(
    [
        v2.Resize(256, antialias=True),
        v2.CenterCrop(224),
        v2.ToImage(),
        v2.ToDtype(torch.float32, scale=True),
        v2.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    ]
)


class Absent(Exception):
    """A peer cannot take part; the message says why."""


def peers_of(model: str, state: State, layer: str) -> Iterator[tuple[str, Way | Absent]]:
    """Every peer's way to the average-pooled output of a layer, or why it has none."""
    for name, make in (
        ("loop", _loop),
        ("fx", _fx),
        ("timm", _timm),
        ("img2vec", _img2vec),
        ("embetter", _embetter),
    ):
        try:
            yield name, make(model, state, layer)
        except Absent as reason:
            yield name, reason


def network(model: str, state: State) -> nn.Module:
    """The network with the tensors, in eval mode; a head that has none stays as it comes."""
    module = _of_timm(model.removeprefix("timm/")) if model.startswith("timm/") else get_model(model, weights=None)
    missing = module.load_state_dict(state, strict=False).missing_keys
    assert all(key.startswith(("classifier", "fc")) for key in missing), missing
    return module.eval()


def _of_timm(name: str) -> nn.Module:
    return _installed("timm").create_model(name, pretrained=False)


def read(path: str) -> Image.Image:
    return Image.open(path).convert("RGB")


class Photos(Dataset):
    """What a DataLoader wants."""

    def __init__(self, paths: Sequence[str]) -> None:
        self.paths = paths

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, row: int) -> torch.Tensor:
        return TRANSFORMS(read(self.paths[row]))


def _loop(model: str, state: State, layer: str) -> Way:
    module = network(model, state)
    found: list[torch.Tensor] = []
    module.get_submodule(layer).register_forward_hook(lambda _, args, out: found.append(out.mean((2, 3))))

    @torch.no_grad()
    def way(paths: Sequence[str]) -> np.ndarray:
        found.clear()
        for start in range(0, len(paths), BATCH):
            module(torch.stack([TRANSFORMS(read(path)) for path in paths[start : start + BATCH]]))
        return torch.cat(found).numpy()

    return way


def _loaded(module: nn.Module, pool: Callable[[torch.Tensor], torch.Tensor]) -> Way:
    @torch.inference_mode()
    def way(paths: Sequence[str]) -> np.ndarray:
        batches = DataLoader(Photos(paths), batch_size=BATCH, num_workers=WORKERS)
        return torch.cat([pool(module(batch)) for batch in batches]).numpy()

    return way


def _fx(model: str, state: State, layer: str) -> Way:
    if model.startswith("timm/"):
        raise Absent("torchvision cannot trace it")
    reader = create_feature_extractor(network(model, state), {layer: "out"})
    return _loaded(reader, lambda found: found["out"].mean((2, 3)))


def _timm(model: str, state: State, layer: str) -> Way:
    timm = _installed("timm")
    if model not in _TIMM:
        raise Absent("timm has no network with these tensors")
    module = timm.create_model(model, pretrained=False, num_classes=0).eval()
    _load_without_head(module, state)
    return _loaded(module, lambda found: found)


def _img2vec(model: str, state: State, layer: str) -> Way:
    library = _installed("img2vec_pytorch")
    if model not in _IMG2VEC:
        raise Absent("img2vec has no such network")
    with patch("torchvision.models._api.WeightsEnum.get_state_dict", return_value=state):
        vectors = library.Img2Vec(model=model, layer_output_size=_IMG2VEC[model])
    vectors.transforms = TRANSFORMS  # its own stretch photos, whose features cannot be compared

    def way(paths: Sequence[str]) -> np.ndarray:
        batches = [paths[start : start + BATCH] for start in range(0, len(paths), BATCH)]
        return np.concatenate([vectors.get_vec([read(path) for path in batch]) for batch in batches])

    return way


def _embetter(model: str, state: State, layer: str) -> Way:
    vision = _installed("embetter.vision")
    timm = _installed("timm")
    if model not in _TIMM:
        raise Absent("timm, which it reads networks from, has none with these tensors")
    create = timm.create_model
    with patch("timm.create_model", lambda name, pretrained, **options: create(name, **options)):
        encoder = vision.TimmEncoder(model)
    _load_without_head(encoder.model, state)
    encoder.model.eval()  # which it does not do itself
    encoder.transform_img = TRANSFORMS

    def way(paths: Sequence[str]) -> np.ndarray:
        return encoder.transform(vision.ImageLoader().transform(paths))

    return way


def _installed(module: str) -> object:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise Absent(f"not installed ({error})") from error


def _load_without_head(module: nn.Module, state: State) -> None:
    module.load_state_dict({name: tensor for name, tensor in state.items() if not name.startswith("fc.")})

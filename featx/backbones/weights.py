"""From what a user passes as ``weights`` to tensors in a network, and to the preprocessing that belongs to them."""

from __future__ import annotations

import hashlib
import os
import re
from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass
from difflib import get_close_matches
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import nn
from torch.overrides import TorchFunctionMode

from featx.backbones import micro
from featx.backbones.catalogue import EMBEDDED, Backbone
from featx.exceptions import WeightsError
from featx.images.preprocessing import Preset
from featx.randomness import private_generator

_EMBEDDED_FILE = Path(__file__).with_name("featx_micro.safetensors")
_EMBEDDED_PRESET = Preset(resize=micro.INPUT_SIZE, crop=micro.INPUT_SIZE, mean=micro.MEAN, std=micro.STD)
_SUFFIXES = (".safetensors", ".pth", ".pt")


@dataclass(frozen=True)
class Weights:
    """Where a network's tensors come from.

    Attributes
    ----------
    kind : {"published", "file", "random", "as-is"}
    name : str
        Name of the published weights, or the path.
    """

    kind: str
    name: str = ""

    def key(self) -> Hashable:
        """Equal as long as the tensors are the same; a file that was written again counts as another."""
        if self.kind != "file":
            return self.kind, self.name
        try:
            stat = os.stat(self.name)
        except OSError as error:
            raise WeightsError(_no_such_file(self.name)) from error
        times = stat.st_mtime_ns, stat.st_ctime_ns
        return self.kind, os.path.realpath(self.name), stat.st_dev, stat.st_ino, stat.st_size, *times


def resolve_weights(backbone: Backbone, weights: object) -> Weights:
    """Check ``weights`` against what there is for a backbone, without reading or fetching anything.

    Raises
    ------
    WeightsError
        The name is unknown for this backbone, the file does not exist, or its kind is unknown.
    """
    if weights is None:
        return Weights("random")
    if not isinstance(weights, (str, os.PathLike)):
        raise WeightsError(f"weights is expected to be a name, a path or None, got weights={weights!r}.")
    name = os.fspath(weights)
    if name == "DEFAULT" and not backbone.named:
        return Weights("as-is")
    if name in (published := _published_names(backbone)):
        return Weights("published", name)
    if name.endswith(_SUFFIXES):
        if not os.path.isfile(name):
            raise WeightsError(_no_such_file(name))
        return Weights("file", name)
    near = get_close_matches(name, published, n=2, cutoff=0.4) or published
    raise WeightsError(
        f"weights is expected to be {', '.join(map(repr, near))}, None, or the path of a .safetensors or .pth file "
        f"for backbone {backbone.label!r}, got weights={name!r}."
    )


@lru_cache(maxsize=256)
def preset_of(backbone: Backbone, weights: Weights) -> Preset:
    """Preprocessing that the weights were trained with; torchvision's first ImageNet preset for a file or None."""
    if backbone.label == EMBEDDED and backbone.named:
        return _EMBEDDED_PRESET
    if not backbone.named:
        return Preset(resize=256, crop=224)
    name = weights.name if weights.kind == "published" else "IMAGENET1K_V1"
    available = _enum(backbone).__members__
    return _preset(available.get(name) or next(iter(available.values())))


def preset_named(name: str) -> Preset:
    """Preset of weights named in full, such as ``"ResNet50_Weights.IMAGENET1K_V2"``, or ``"featx_micro"``.

    Raises
    ------
    WeightsError
        torchvision has no such weights.
    """
    if name == EMBEDDED:
        return _EMBEDDED_PRESET
    import torchvision

    try:
        return _preset(torchvision.models.get_weight(name))
    except (ValueError, AttributeError) as error:
        raise WeightsError(
            'preprocess is expected to be "weights", None, a callable, "featx_micro" or torchvision weights in full '
            f'("ResNet50_Weights.IMAGENET1K_V2"), got preprocess={name!r}.'
        ) from error


def preset_name(backbone: Backbone, weights: Weights) -> str:
    """What `preset_named` knows the preprocessing of some weights by; "weights" for a network from elsewhere."""
    if not backbone.named:
        return "weights"
    if backbone.label == EMBEDDED:
        return EMBEDDED
    available = _enum(backbone).__members__
    name = weights.name if weights.kind == "published" else "IMAGENET1K_V1"
    return str(available.get(name) or next(iter(available.values())))


def published_content(backbone: Backbone, weights: Weights) -> str:
    """What identifies the content of published weights, without reading those that are fetched."""
    if backbone.label == EMBEDDED:
        return _embedded_content()
    return str(_enum(backbone)[weights.name].url.rsplit("/", 1)[-1])


@lru_cache
def _embedded_content() -> str:
    return xxhash.xxh3_128_hexdigest(_EMBEDDED_FILE.read_bytes())


def build_with_weights(backbone: Backbone, weights: Weights, seed: int) -> tuple[nn.Module, frozenset[str]]:
    """The network on the CPU in float32, and the names of its modules for which a file had no weights.

    Raises
    ------
    WeightsError
        The weights cannot be fetched or read, or do not fit the network.
    """
    with torch.device("cpu"), private_generator(seed), ParametersMadeWith(dtype=torch.float32):
        module = backbone.build(preset_of(backbone, weights).crop)
    missing: frozenset[str] = frozenset()
    if weights.kind == "published":
        state = micro.load_compact(_EMBEDDED_FILE) if backbone.label == EMBEDDED else _fetch(backbone, weights)
        _load(module, backbone, state, weights.name)
    elif weights.kind == "file":
        missing = _load(module, backbone, _read_file(Path(weights.name)), weights.name)
    elif weights.kind == "random" and not backbone.named:
        _reinitialise(module, backbone, seed)
    return module.to(torch.float32), missing


class ParametersMadeWith(TorchFunctionMode):
    """While it is entered, new parameters get an argument that their module leaves open.

    ``dtype=torch.float32`` makes a seed stand for one network whatever the default dtype is; ``device="meta"`` makes
    parameters take neither memory nor initialisation, while the numbers that builders compute with stay real.
    """

    def __init__(self, **arguments: Any) -> None:
        super().__init__()
        self._arguments = arguments

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.empty:
            kwargs |= {name: value for name, value in self._arguments.items() if kwargs.get(name) is None}
        return func(*args, **kwargs)


def _reinitialise(module: nn.Module, backbone: Backbone, seed: int) -> None:
    holders = [child for child in module.modules() if any(True for _ in child.parameters(recurse=False))]
    fixed = [type(child).__name__ for child in holders if not hasattr(child, "reset_parameters")]
    if fixed:
        raise WeightsError(
            f"weights=None is expected with modules that have reset_parameters(), got {backbone.label} with "
            f'{", ".join(sorted(set(fixed)))}. Pass a network with the weights you want and weights="DEFAULT".'
        )
    with private_generator(seed):
        for child in holders:
            child.reset_parameters()  # type: ignore[operator]


def _enum(backbone: Backbone) -> Any:
    import torchvision

    return torchvision.models.get_model_weights(backbone.label)


def _published_names(backbone: Backbone) -> list[str]:
    if not backbone.named:
        return []
    if backbone.label == EMBEDDED:
        return ["DEFAULT"]
    return list(_enum(backbone).__members__)


def _preset(entry: Any) -> Preset:
    transform = entry.transforms()
    return Preset(
        transform.resize_size[0],
        transform.crop_size[0],
        tuple(transform.mean),
        tuple(transform.std),
        transform.interpolation.value,
    )


def _fetch(backbone: Backbone, weights: Weights) -> dict[str, torch.Tensor]:
    """The published weights from torch's own folder, or else from the network."""
    entry = _enum(backbone)[weights.name]
    file = Path(torch.hub.get_dir()) / "checkpoints" / entry.url.rsplit("/", 1)[-1]
    try:
        state = dict(entry.get_state_dict(progress=False, check_hash=True, map_location="cpu"))
        _check_content(file)  # torch looks at it after a download only
        return state
    except Exception as error:  # from no connection to a file that was cut short: zip, pickle and hub have their own
        failed = (
            f"are there but damaged (delete the file): {error}" if file.exists() else f"could not be fetched: {error}"
        )
        raise WeightsError(
            f"The weights {entry} are expected at {str(file)!r} and {failed}. They come from {entry.url}. "
            f'Put the file {file.name!r} there, pass weights="PATH" to where you have it, or use '
            f'backbone="{EMBEDDED}", which needs no download.'
        ) from error


def _check_content(file: Path) -> None:
    """Raise where a published file's content is not what its name says, which the key of kept features trusts."""
    promised = re.search(r"-([0-9a-f]{8,})\.", file.name)
    if promised is None or not file.exists():
        return
    with file.open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if not found.startswith(promised[1]):
        raise ValueError(f"its sha256 begins with {found[: len(promised[1])]}, not with {promised[1]}")


def _read_file(path: Path) -> dict[str, torch.Tensor]:
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # safetensors, pickle and zip each have errors of their own
        raise WeightsError(
            f"A file of tensors is expected, got weights={str(path)!r}, which cannot be read: {error}. "
            "Save it again with safetensors.torch.save_file(model.state_dict(), path)."
        ) from error
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        shown = sorted(map(str, state))[:5] if isinstance(state, dict) else type(state).__name__
        raise WeightsError(
            f"A state_dict (names to tensors) is expected in weights={str(path)!r}, got {shown}. "
            "Save model.state_dict() alone."
        )
    return state


def _load(module: nn.Module, backbone: Backbone, state: dict[str, torch.Tensor], name: str) -> frozenset[str]:
    """Put tensors into a network; only a head may lack its own."""
    family = backbone.family
    if family is not None:
        state = {family.renamed(key): value for key, value in state.items()}
    expected = module.state_dict()
    head = () if family is None else tuple(f"{child}." for child in family.head)
    missing = [key for key in expected if key not in state and not key.endswith("num_batches_tracked")]
    problems = {
        "missing": [key for key in missing if not key.startswith(head)],
        "unexpected": [key for key in state if key not in expected and not key.startswith(head)],
        "of another shape": [
            f"{key} {tuple(value.shape)} in place of {tuple(expected[key].shape)}"
            for key, value in state.items()
            if key in expected and value.shape != expected[key].shape
        ],
    }
    if any(problems.values()):
        only_head = all(key.startswith(head) for keys in problems.values() for key in keys) and bool(head)
        listed = "; ".join(f"{kind}: {_shorten(keys)}" for kind, keys in problems.items() if keys)
        raise WeightsError(
            f"Weights for {backbone.label} are expected, got weights={name!r} with keys {listed}. "
            + (
                f"Delete the keys of the head ({', '.join(head)}) from the file."
                if only_head
                else "Check that the file belongs to this backbone."
            )
        )
    versioned = OrderedDict(state)
    versioned._metadata = expected._metadata  # type: ignore[attr-defined]  # MNASNet refuses a state without version
    module.load_state_dict(versioned, strict=False)
    if family is not None:
        for attribute, value in family.pretrained_attributes.items():
            setattr(module, attribute, value)
    # torchvision publishes VGG16 features with a head of NaN, which is as good as none.
    empty = [key for key, value in state.items() if key.startswith(head) and not value.isfinite().all()]
    return frozenset(key.rpartition(".")[0] for key in missing + empty)


def _shorten(keys: list[str], most: int = 6) -> str:
    return ", ".join(keys[:most]) + (f" and {len(keys) - most} more" if len(keys) > most else "")


def _no_such_file(path: str) -> str:
    return (
        f"The path of an existing .safetensors or .pth file is expected, got weights={path!r} "
        f"(looked in {os.path.dirname(os.path.abspath(path))!r}). Check the path."
    )

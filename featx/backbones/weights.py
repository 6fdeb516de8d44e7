"""From what a user passes as ``weights`` to tensors in a network, and to the preprocessing that belongs to them."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from difflib import get_close_matches
from functools import lru_cache
from pathlib import Path

import torch
from torch import nn

from featx.backbones.catalogue import EMBEDDED, Backbone
from featx.backbones.entries import ParametersMadeWith, entry_of, preset_from
from featx.backbones.timm_models import PREFIX
from featx.exceptions import WeightsError
from featx.images.preprocessing import Preset
from featx.randomness import private_generator

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

    @property
    def published(self) -> str:
        """Name of the published weights; empty for others."""
        return self.name if self.kind == "published" else ""

    def file(self, backbone: Backbone) -> str | None:
        """The file whose content decides the tensors, where one does."""
        if self.kind == "published" and backbone.entry is not None:
            place = backbone.entry.file(self.name)
            return None if place is None else str(place)
        return self.name if self.kind == "file" else None

    def key(self, backbone: Backbone) -> Hashable:
        """Equal as long as the tensors are the same; a file that was written again counts as another."""
        file = self.file(backbone)
        if file is None:
            return self.kind, self.name
        try:
            stat = os.stat(file)
        except OSError as error:
            raise WeightsError(_no_such_file(file)) from error
        times = stat.st_mtime_ns, stat.st_ctime_ns
        return self.kind, os.path.realpath(file), stat.st_dev, stat.st_ino, stat.st_size, *times


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
    published = [] if backbone.entry is None else backbone.entry.published
    if name in published:
        return Weights("published", name)
    if name.endswith(_SUFFIXES):
        if not os.path.isfile(name):
            raise WeightsError(_no_such_file(name))
        return Weights("file", name)
    near = get_close_matches(name, published, n=2, cutoff=0.4) or published
    expected = ", ".join([*map(repr, near), "None"])
    raise WeightsError(
        f"weights is expected to be {expected}, or the path of a .safetensors or .pth file for backbone "
        f"{backbone.label!r}, got weights={name!r}."
    )


@lru_cache(maxsize=256)
def preset_of(backbone: Backbone, weights: Weights) -> Preset:
    """Preprocessing that the weights were trained with; for a file or None that of the network's usual weights."""
    return Preset(resize=256, crop=224) if backbone.entry is None else backbone.entry.preset(weights.published)


def preset_named(name: str) -> Preset:
    """Preset of weights named in full: ``"ResNet50_Weights.IMAGENET1K_V2"``, ``"timm/NAME"`` or ``"featx_micro"``.

    Raises
    ------
    WeightsError
        torchvision has no such weights.
    BackboneError
        timm has none.
    """
    if name == EMBEDDED or name.startswith(PREFIX):
        return entry_of(name).preset()
    import torchvision

    try:
        return preset_from(torchvision.models.get_weight(name))
    except (ValueError, AttributeError) as error:
        raise WeightsError(
            'preprocess is expected to be "weights", None, a callable, "featx_micro", "timm/NAME" or torchvision '
            f'weights in full ("ResNet50_Weights.IMAGENET1K_V2"), got preprocess={name!r}.'
        ) from error


def preset_name(backbone: Backbone, weights: Weights) -> str:
    """What `preset_named` knows the preprocessing of some weights by; "weights" for a network from elsewhere."""
    return "weights" if backbone.entry is None else backbone.entry.preset_name(weights.published)


def content_of(backbone: Backbone, weights: Weights, seed: int, digest_of_file: Callable[[str], bytes]) -> str:
    """What identifies the tensors of a named network, without loading them."""
    if weights.kind == "random":
        return f"random {seed}"
    published = [backbone.entry.content(weights.name)] if backbone.entry and weights.published else []
    file = weights.file(backbone)
    return " ".join([*published, *([] if file is None else [digest_of_file(file).hex()])])


def build_with_weights(backbone: Backbone, weights: Weights, seed: int) -> tuple[nn.Module, frozenset[str]]:
    """The network on the CPU in float32, and the names of its modules for which a file had no weights.

    Raises
    ------
    WeightsError
        The weights cannot be fetched or read, or do not fit the network.
    """
    with torch.device("cpu"), private_generator(seed), ParametersMadeWith(dtype=torch.float32):
        module = backbone.build(weights.published)
    missing: frozenset[str] = frozenset()
    if backbone.entry is not None and weights.kind == "published":
        missing = _load(module, backbone, backbone.entry.state(weights.name), weights.name)
    elif weights.kind == "file":
        missing = _load(module, backbone, _read_file(Path(weights.name)), weights.name)
    elif weights.kind == "random" and not backbone.named:
        _reinitialise(module, backbone, seed)
    return module.to(torch.float32), missing


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
    family, entry = backbone.family, backbone.entry
    if family is not None:
        state = {family.renamed(key): value for key, value in state.items()}
    expected = module.state_dict()
    head = () if entry is None else tuple(f"{child}." for child in entry.head)
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

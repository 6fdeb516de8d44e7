"""From what a user passes as ``weights`` to tensors in a network, and to the preprocessing that belongs to them."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from functools import lru_cache

import torch
from torch import nn

from featx.backbones.addresses import Address, plain_address, split_address
from featx.backbones.catalogue import Backbone
from featx.backbones.checkpoints import read_checkpoint
from featx.backbones.entries import entry_of, preset_from
from featx.backbones.fingerprint import digest_of_tensors
from featx.backbones.readings import OPTIONAL, Demand, Reading, fullest_of_agreeing, readings_of, rearranged
from featx.backbones.skeletons import ParametersMadeWith
from featx.backbones.table import EMBEDDED
from featx.backbones.timm_models import PREFIX
from featx.exceptions import WeightsError
from featx.images.preprocessing import Preset
from featx.system.randomness import private_generator

# Names of each kind that a message shows of a file that does not fit.
_FEW = 3


@dataclass(frozen=True)
class Weights:
    """Where a network's tensors come from.

    Attributes
    ----------
    kind : {"published", "file", "random", "as-is"}
    name : str
        Name of the published weights, or the path.
    place : str or None
        Key of a file's content under which to look; None for everywhere.
    """

    kind: str
    name: str = ""
    place: str | None = None

    @property
    def given(self) -> Address:
        """As a user writes it."""
        return self.name if self.place is None else (self.name, self.place)

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
        return self.kind, self.place, os.path.realpath(file), stat.st_dev, stat.st_ino, stat.st_size, *times


def resolve_weights(backbone: Backbone, weights: object) -> Weights:
    """Check ``weights`` against what there is for a backbone, without reading or fetching anything.

    Raises
    ------
    WeightsError
        The name is unknown for this backbone, the file does not exist, or its kind is unknown.
    """
    try:
        address = plain_address(weights)
    except TypeError as error:
        raise WeightsError(
            "weights is expected to be a name, a path, a pair of a path and a key of the file's content, or None, got "
            f"weights={weights!r}."
        ) from error
    if address is None:
        return Weights("random")
    if isinstance(address, tuple):
        return Weights("file", _file(address[0]), address[1])
    if address == "DEFAULT" and not backbone.named:
        return Weights("as-is")
    published = [] if backbone.entry is None else backbone.entry.published
    if address in published:
        return Weights("published", address)
    if isinstance(weights, os.PathLike) or os.path.exists(address) or _looks_like_path(address):
        return Weights("file", _file(address))
    near = get_close_matches(address, published, n=2, cutoff=0.4) or published
    expected = ", ".join([*map(repr, near), "None"])
    raise WeightsError(
        f"weights is expected to be {expected}, or the path of a file of tensors for backbone {backbone.label!r}, got "
        f"weights={address!r}, and there is no such file."
    )


def _looks_like_path(text: str) -> bool:
    return "." in text or os.sep in text or "/" in text or isinstance(split_address(text), tuple)


def _file(path: str) -> str:
    """The path, if it is that of a file.

    Raises
    ------
    WeightsError
    """
    if os.path.isdir(path):
        raise WeightsError(
            f"The path of a file of tensors is expected, got weights={path!r}, which is a folder. Name the file in it"
            f"{_listed(sorted(os.listdir(path))[:3])}."
        )
    if isinstance(address := split_address(path), tuple):
        raise WeightsError(
            f"The path of a file of tensors is expected, got weights={path!r}, a file and a key of its content. Pass "
            f"them as a pair: weights={address}."
        )
    if not os.path.isfile(path):
        raise WeightsError(_no_such_file(path))
    return path


def _listed(names: list[str]) -> str:
    return f" ({', '.join(names)}, ...)" if names else ""


@lru_cache(maxsize=256)
def preset_of(backbone: Backbone, weights: Weights) -> Preset:
    """Preprocessing that a named network's weights were trained with; for a file or None that of its usual weights."""
    assert backbone.entry is not None
    return backbone.entry.preset(weights.published)


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
    """What identifies the tensors of a named network, published or random, without loading them."""
    if weights.kind == "random":
        return f"random {seed}"
    published = [backbone.entry.content(weights.name)] if backbone.entry and weights.published else []
    file = weights.file(backbone)
    return " ".join([*published, *([] if file is None else [digest_of_file(file).hex()])])


@dataclass(frozen=True)
class Loaded:
    """A network with its tensors.

    Attributes
    ----------
    module : nn.Module
        On the CPU, in float32.
    missing : frozenset of str
        Modules of the head that a file had no tensors for, or none that fit.
    content : str
        What identifies the tensors that a file gave, by the names that the network has for them; empty without a file.
    note : str
        How a file was read, where that is not plain; empty otherwise.
    """

    module: nn.Module
    missing: frozenset[str] = frozenset()
    content: str = ""
    note: str = ""


def build_with_weights(backbone: Backbone, weights: Weights, seed: int, side: int | None = None) -> Loaded:
    """The network with its tensors; a named one built for images of another side where one is given.

    Raises
    ------
    WeightsError
        The weights cannot be fetched or read, or do not fit the network.
    """
    with torch.device("cpu"), private_generator(seed), ParametersMadeWith(dtype=torch.float32):
        module = backbone.build(weights.published, side)
    if weights.kind == "random" and not backbone.named:
        _reinitialise(module, backbone, seed)
    module = module.to(torch.float32)
    if backbone.entry is not None and weights.kind == "published":
        reading = _reading_of(backbone.entry.state(weights.name), module, backbone, weights)
        return Loaded(_filled(module, backbone, reading.tensors), reading.missing)
    if weights.kind == "file":
        reading = _reading_of(read_checkpoint(weights.name), module, backbone, weights)
        module = _filled(module, backbone, reading.tensors)
        state = module.state_dict()
        content = digest_of_tensors({name: state[name] for name in reading.tensors if not name.endswith(OPTIONAL)})
        return Loaded(module, reading.missing, content, _note(reading, weights))
    return Loaded(module)


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


def _reading_of(found: Mapping[str, torch.Tensor], module: nn.Module, backbone: Backbone, weights: Weights) -> Reading:
    """The one way to read a file's tensors that fits the network.

    Raises
    ------
    WeightsError
        There is none, or several have different tensors.
    """
    if backbone.family is not None:
        found = {backbone.family.renamed(name): tensor for name, tensor in found.items()}
    own = {name: value for name, value in module.state_dict().items() if isinstance(value, torch.Tensor)}
    demand = Demand(own, () if backbone.entry is None else backbone.entry.head)
    entry = backbone.entry

    def fitting_under(place: str | None) -> list[Reading]:
        fitting = [reading for reading in readings_of(found, demand, place) if reading.fits]
        if fitting or entry is None:
            return fitting
        return rearranged(found, demand, place, lambda state: entry.rearranged(state, module))

    readings = readings_of(found, demand, weights.place)
    if not readings:
        raise _no_such_key([reading.place for reading in fitting_under(None)], found, weights)
    fitting = fitting_under(weights.place)
    if not fitting:
        raise _does_not_fit(readings[0], backbone, weights)
    reading = fullest_of_agreeing(fitting)
    if reading is None:
        places = [repr(reading.place) for reading in fitting]
        raise WeightsError(
            f"A file with one network for {backbone.label} is expected, got weights={weights.given!r}, which holds "
            f"{len(places)} of different tensors, under the keys {_shorten(places)}. Choose one by its key: "
            f"weights={(weights.name, fitting[0].place)}."
        )
    return reading


def _no_such_key(fitting: list[str], found: Mapping[str, torch.Tensor], weights: Weights) -> WeightsError:
    """That a file holds nothing under a key, with those that can be typed: of networks that fit, or else of all."""
    keys = fitting or [*dict.fromkeys(name.partition(".")[0] for name in found)]
    way = f"Take one of {_shorten([*map(repr, keys)])}" if any(keys) else f"Take none: weights={weights.name!r}"
    return WeightsError(f"A key of the content of {weights.name!r} is expected, got weights={weights.given!r}. {way}.")


def _does_not_fit(reading: Reading, backbone: Backbone, weights: Weights) -> WeightsError:
    kinds = {kind: names for kind, names in reading.problems.items() if names}
    listed = "; ".join(f"{kind}: {_shorten(names, _FEW)}" for kind, names in kinds.items())
    under = f" under {reading.place!r}" if reading.place else ""
    entry = backbone.entry
    resizable = entry is not None and entry.fixed_size and entry.is_resizable and reading.problems["of another shape"]
    side = ", set image_size to the side of the images that they were made for" if resizable else ""
    return WeightsError(
        f"Weights for {backbone.label} are expected, got weights={weights.given!r}, which do not fit it. "
        f"Name the backbone that they were made for{side}, or pass a file for this one. What differs{under} is "
        f"{listed}."
    )


def _filled(module: nn.Module, backbone: Backbone, tensors: Mapping[str, torch.Tensor]) -> nn.Module:
    """The network with some tensors in their places."""
    versioned = OrderedDict(tensors)
    # MNASNet refuses a state without version.
    versioned._metadata = module.state_dict()._metadata  # type: ignore[attr-defined]
    module.load_state_dict(versioned, strict=False)
    if backbone.family is not None:
        for attribute, value in backbone.family.pretrained_attributes.items():
            setattr(module, attribute, value)
    return module


def _note(reading: Reading, weights: Weights) -> str:
    """How a file was read, where there was something to decide."""
    head = sorted((reading.misfits_of_head - reading.not_finite_of_head) & reading.missing)
    broken = sorted(reading.not_finite_of_head & reading.missing)
    parts = [f"tensors under {reading.place!r}"] if reading.place else []
    parts += [f"without {', '.join(head)}, which the file has in another shape"] if head else []
    parts += [f"without {', '.join(broken)}, which hold NaN or infinity in the file"] if broken else []
    old = sorted(reading.old_heads)
    parts += [f"without {_shorten(old)} of the file, which the network does not have"] if old else []
    return f"{weights.name}: read {', '.join(parts)}." if parts else ""


def _shorten(keys: list[str], most: int = 6) -> str:
    return ", ".join(keys[:most]) + (f" and {len(keys) - most} more" if len(keys) > most else "")


def _no_such_file(path: str) -> str:
    if "://" in path:
        return f"The path of a file of tensors is expected, got weights={path!r}. Download it, and pass where it is."
    return (
        f"The path of an existing file of tensors is expected, got weights={path!r} "
        f"(looked in {os.path.dirname(os.path.abspath(path))!r}). Correct the path."
    )

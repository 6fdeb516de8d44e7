"""Networks that are ready to run: one loaded copy per process, shared by all clones of an estimator."""

from __future__ import annotations

import sys
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache, partial

import torch
from torch import nn
from tqdm.auto import tqdm

from featx.backbones.catalogue import Backbone, resolve_backbone
from featx.backbones.entry import Entry
from featx.backbones.fingerprint import fingerprint
from featx.backbones.folding import Folded, fold, is_foldable
from featx.backbones.layers import Architecture, Layer
from featx.backbones.presets import preset_of_module, size_of_module
from featx.backbones.tracing import trace, with_measured_layouts
from featx.backbones.weights import Loaded, Weights, build_with_weights, preset_of, resolve_weights
from featx.exceptions import BackboneError, WeightsError
from featx.images.preprocessing import Preset
from featx.system.devices import move
from featx.system.forks import at_fork

# A grid search over backbones needs a few at once; a notebook that tries fifty must not hold them all.
_MOST_LOADED = 8

_TOLD: set[str] = set()  # by this process, of notes


@dataclass(frozen=True)
class Network:
    """A network in eval mode on a device.

    Attributes
    ----------
    module : nn.Module
        Shared by everyone in the process: hold ``lock`` while hooks are attached to it.
    missing : frozenset of str
        Modules of the head that a weights file had no tensors for, or none that fit; their values mean nothing.
    content : str
        What identifies the tensors that a weights file gave; empty without a file.
    note : str
        How a weights file was read, where that is not plain; empty otherwise.
    """

    module: nn.Module
    missing: frozenset[str]
    content: str = ""
    note: str = ""
    lock: threading.Lock = field(default_factory=threading.Lock)
    _architectures: dict[Hashable, Architecture] = field(default_factory=dict)

    def tell_note(self) -> None:
        """Say to stderr how a weights file was read, where that is not plain; once per process."""
        if self.note and self.note not in _TOLD:
            _TOLD.add(self.note)
            tqdm.write(self.note, file=sys.stderr)

    def architecture(self, backbone: Backbone, shape: tuple[int, int, int]) -> Architecture:
        """What can be read from it, traced once per shape of images."""
        with self.lock:  # the trace copies the module, and must not copy another thread's taps with it
            if shape not in self._architectures:
                self._architectures[shape] = _architecture(backbone, self.module, shape)
            return self._architectures[shape]

    @cached_property
    def fingerprint(self) -> str:
        """Digest of architecture and weights."""
        return fingerprint(self.module)

    def reading(self, layers: Iterable[Layer]) -> nn.Module:
        """What to run to read some layers: with BatchNorm folded into convolutions, unless a layer lies between them.

        To be called while ``lock`` is held.
        """
        hidden = self._folded.hidden
        between = any((layer.name, layer.call, layer.side) in hidden for layer in layers)
        return self.module if between else self._folded.module

    @cached_property
    def _folded(self) -> Folded:
        return fold(self.module) if is_foldable(self.module) else Folded(self.module, frozenset())


@dataclass(frozen=True)
class NetworkSpec:
    """Which network, with which weights: everything but the tensors.

    Attributes
    ----------
    backbone : Backbone
    weights : Weights
    seed : int
    image_size : int or None
        Side of the images, in pixels, that a network is built for which takes one size only; None for its weights'.
    """

    backbone: Backbone
    weights: Weights
    seed: int
    image_size: int | None = None

    @property
    def _seed(self) -> int:
        """The seed where it decides anything: a meta-estimator that seeds its clones must not load one network each."""
        return self.seed if self.weights.kind == "random" else 0

    @cached_property
    def preset(self) -> Preset:
        """Preprocessing that belongs to the weights; of a callable's, what it returns is asked."""
        return preset_of(self.backbone, self.weights) if self.backbone.named else preset_of_module(self._foreign)

    def architecture(self, shape: tuple[int, int, int] | None = None) -> Architecture:
        """What can be read from the network when it sees images of ``shape``; loads no weights of named networks.

        ``shape`` is (channels, height, width) in pixels; None means what the weights were trained with.
        """
        shape = shape or self._own_shape
        if self.backbone.entry is not None:
            _check_image_size(self.backbone.label, self.backbone.entry, self._side or self.preset.crop, shape)
            return _named_architecture(self.backbone, self.weights.published, self._side, shape)
        if self._is_module:
            return _architecture(self.backbone, self._foreign, shape)
        return self._loaded.architecture(self.backbone, shape)

    @property
    def _own_shape(self) -> tuple[int, int, int]:
        if self.backbone.named:
            return self.square(self._side or self.preset.crop)
        return (_channels_of(self._foreign), *size_of_module(self._foreign))  # however it is fed

    def square(self, size: int) -> tuple[int, int, int]:
        """Shape (channels, size, size) of the images that the network takes."""
        return (3 if self.backbone.named else _channels_of(self._foreign)), size, size

    @property
    def _side(self) -> int | None:
        """The side that the network is built for where it is another than that of its weights."""
        entry = self.backbone.entry
        if self.image_size is None or entry is None or not (entry.fixed_size and entry.is_resizable):
            return None
        return None if self.image_size == self.preset.crop else self.image_size

    @property
    def _is_module(self) -> bool:
        return self.backbone.key is None and isinstance(self.backbone.source, nn.Module)

    @property
    def _foreign(self) -> nn.Module:
        """A network that has no name: structure and attributes, not to be run or changed."""
        return self.backbone.source if self._is_module else self._loaded.module

    @cached_property
    def _loaded(self) -> Network:
        """What a callable returns, to be looked at and, on the CPU, to be run."""
        return self.load("cpu", torch.float32) if self.backbone.key is not None else self._load("cpu", torch.float32)

    def load(self, device: str, dtype: torch.dtype) -> Network:
        """The network, from this process's shelf where it is there; a module of the user's is copied anew each time."""
        if self.backbone.key is None:
            at_hand = not self._is_module and (device, dtype) == ("cpu", torch.float32)
            return self._loaded if at_hand else self._load(device, dtype)
        key = (self.backbone.key, self.weights.key(self.backbone), self._seed, self._side, device, dtype)
        return _SHELF.get(key, lambda: self._load(device, dtype))

    def _load(self, device: str, dtype: torch.dtype) -> Network:
        loaded = self._of_side()
        module = loaded.module
        module.eval().requires_grad_(False)
        module = move(module, device, dtype).to(memory_format=torch.channels_last)
        return Network(module, loaded.missing, loaded.content, loaded.note)

    def _of_side(self) -> Loaded:
        """With tensors of its weights' own size taken to another, or of a file that was made for that one."""
        build = partial(build_with_weights, self.backbone, self.weights, self._seed)
        if self.backbone.entry is None or self._side is None:
            return build()
        try:
            loaded = build()
        except WeightsError:
            if self.weights.kind == "file":
                with suppress(WeightsError):
                    return build(self._side)
            raise
        return replace(loaded, module=self.backbone.entry.resized(loaded.module, self.weights.published, self._side))


class _Shelf:
    """The networks last used, at most a few."""

    def __init__(self) -> None:
        self._networks: OrderedDict[Hashable, Network] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: Hashable, load: Callable[[], Network]) -> Network:
        with self._lock:
            network = self._networks.get(key) or load()
            self._networks[key] = network
            self._networks.move_to_end(key)
            while len(self._networks) > _MOST_LOADED:
                self._networks.popitem(last=False)
            return network


_SHELF = _Shelf()


def _renew_locks() -> None:
    """In a forked child nobody is left to release a lock that another thread of the parent held."""
    global _SHELF
    _SHELF = _Shelf()


at_fork(after_in_child=_renew_locks)


def _check_image_size(model: str, entry: Entry, built_for: int, shape: tuple[int, int, int]) -> None:
    _, height, width = shape
    size = min(height, width)
    if entry.fixed_size and (height, width) != (built_for, built_for):
        other = f"Set image_size={size}" if entry.is_resizable and height == width else "Leave image_size=None"
        raise BackboneError(
            f"{model} takes images of {built_for} x {built_for} pixels only, got {height} x {width}. {other}, or take "
            "a convolutional backbone."
        )
    if not entry.fixed_size and size < entry.min_size:
        raise BackboneError(
            f"{model} takes images of at least {entry.min_size} x {entry.min_size} pixels, got image_size={size}. "
            "Raise image_size."
        )


def network_spec(backbone: object, weights: object, seed: int, image_size: int | None = None) -> NetworkSpec:
    """Check a user's ``backbone``, ``weights`` and ``image_size`` without loading anything."""
    resolved = resolve_backbone(backbone)
    return NetworkSpec(resolved, resolve_weights(resolved, weights), seed, image_size)


@lru_cache(maxsize=64)
def _named_architecture(
    backbone: Backbone, weights: str, side: int | None, shape: tuple[int, int, int]
) -> Architecture:
    assert backbone.entry is not None
    return _architecture(backbone, backbone.entry.skeleton(weights, side), shape)


def _architecture(backbone: Backbone, module: nn.Module, shape: tuple[int, int, int]) -> Architecture:
    calls = trace(module, shape)
    if backbone.family is None:
        calls = with_measured_layouts(calls, module, shape)
    return Architecture(module, calls, backbone.family, backbone.label, shape)


def _channels_of(module: nn.Module) -> int:
    """Channels of the images that a network from elsewhere takes: those of its first convolution."""
    return next((child.in_channels for child in module.modules() if isinstance(child, nn.Conv2d)), 3)

"""Entries of the catalogue: how a named network is built, its published weights, and their preprocessing."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

import torch
import xxhash
from torch import nn

from featx.backbones import micro
from featx.backbones.entry import Entry
from featx.backbones.skeletons import ParametersMadeWith
from featx.backbones.table import EMBEDDED, Family, family_of
from featx.backbones.timm_models import PREFIX, cannot_be_built, timm_entry
from featx.exceptions import WeightsError
from featx.images.preprocessing import Preset
from featx.system.randomness import private_generator

_EMBEDDED_FILE = Path(__file__).with_name("featx_micro.safetensors")
_EMBEDDED_PRESET = Preset(resize=micro.INPUT_SIZE, crop=micro.INPUT_SIZE, mean=micro.MEAN, std=micro.STD)


@lru_cache(maxsize=256)
def entry_of(name: str) -> Entry:
    """Entry of that name.

    Raises
    ------
    BackboneError
        The name is unknown; the message names the nearest ones.
    """
    if name.startswith(PREFIX):
        return timm_entry(name.removeprefix(PREFIX))
    return _EmbeddedEntry(name, family_of(name)) if name == EMBEDDED else _TableEntry(name, family_of(name))


@dataclass(frozen=True)
class _TableEntry:
    """A network of torchvision's."""

    model: str
    family: Family

    @property
    def head(self) -> tuple[str, ...]:
        return self.family.head

    @property
    def fixed_size(self) -> bool:
        return self.family.fixed_size

    @property
    def min_size(self) -> int:
        return self.family.min_size

    @property
    def published(self) -> list[str]:
        return list(_enum(self.model).__members__)

    def preset(self, weights: str = "") -> Preset:
        return preset_from(self._weights(weights))

    def preset_name(self, weights: str = "") -> str:
        return str(self._weights(weights))

    @property
    def is_resizable(self) -> bool:
        return bool(self.family.size_option)

    def build(self, weights: str = "", side: int | None = None) -> nn.Module:
        return self._built(self.preset(weights).crop) if side is None else self._built_for_another(side)

    def skeleton(self, weights: str = "", side: int | None = None) -> nn.Module:
        with private_generator(0), ParametersMadeWith(device="meta"):
            return self.build(weights, side).to("meta")

    def resized(self, module: nn.Module, weights: str, side: int) -> nn.Module:
        from torchvision.models.vision_transformer import interpolate_embeddings

        with torch.device("cpu"), private_generator(0), ParametersMadeWith(dtype=torch.float32):
            other = self.build(weights, side)
        other.load_state_dict(interpolate_embeddings(side, cast(Any, module).patch_size, module.state_dict()))
        return other

    def _built(self, side: int) -> nn.Module:
        import torchvision

        sized = {self.family.size_option: side} if self.family.size_option else {}
        return torchvision.models.get_model(self.model, weights=None, **self.family.build_options, **sized)

    def _built_for_another(self, side: int) -> nn.Module:
        try:
            return self._built(side)
        except AssertionError as error:  # of patches that do not fill the image
            raise cannot_be_built(self.model, side, error) from error

    def content(self, weights: str) -> str:
        return self._place(weights).name  # which holds a hash, so that nothing need be fetched

    def file(self, weights: str) -> Path | None:
        return None

    def state(self, weights: str) -> dict[str, torch.Tensor]:
        """The published weights from torch's own folder, or else from the network."""
        entry, file = self._weights(weights), self._place(weights)
        try:
            state = dict(entry.get_state_dict(progress=False, check_hash=True, map_location="cpu"))
            _check_content(file)  # torch looks at it after a download only
            return state
        except Exception as error:  # no connection, a file that was cut short: zip, pickle and hub have their own
            failed = (
                f"are there but damaged (delete the file): {error}"
                if file.exists()
                else f"could not be fetched: {error}"
            )
            raise WeightsError(
                f"The weights {entry} are expected at {str(file)!r} and {failed}. They come from {entry.url}. "
                f'Put the file {file.name!r} there, pass weights="PATH" to where you have it, or use '
                f'backbone="{EMBEDDED}", which needs no download.'
            ) from error

    def rearranged(self, state: Mapping[str, torch.Tensor], module: nn.Module) -> dict[str, torch.Tensor] | None:
        return None  # the table's renames are all there is

    def _weights(self, weights: str) -> Any:
        available = _enum(self.model).__members__
        return available.get(weights or "IMAGENET1K_V1") or next(iter(available.values()))

    def _place(self, weights: str) -> Path:
        return Path(torch.hub.get_dir()) / "checkpoints" / self._weights(weights).url.rsplit("/", 1)[-1]


class _EmbeddedEntry(_TableEntry):
    """The network that travels inside the package."""

    @property
    def published(self) -> list[str]:
        return ["DEFAULT"]

    def preset(self, weights: str = "") -> Preset:
        return _EMBEDDED_PRESET

    def preset_name(self, weights: str = "") -> str:
        return EMBEDDED

    def _built(self, side: int) -> nn.Module:
        return micro.FeatxMicro()

    def content(self, weights: str) -> str:
        return _embedded_content()

    def state(self, weights: str) -> dict[str, torch.Tensor]:
        return micro.load_compact(_EMBEDDED_FILE)


@lru_cache
def _embedded_content() -> str:
    return xxhash.xxh3_128_hexdigest(_EMBEDDED_FILE.read_bytes())


def _enum(model: str) -> Any:
    import torchvision

    return torchvision.models.get_model_weights(model)


def preset_from(weights: Any) -> Preset:
    """Preprocessing that torchvision attaches to weights."""
    transform = weights.transforms()
    return Preset(
        transform.resize_size[0],
        transform.crop_size[0],
        tuple(transform.mean),
        tuple(transform.std),
        transform.interpolation.value,
    )


def _check_content(file: Path) -> None:
    """Raise where a published file's content is not what its name says, which the key of kept features trusts."""
    promised = re.search(r"-([0-9a-f]{8,})\.", file.name)
    if promised is None or not file.exists():
        return
    with file.open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if not found.startswith(promised[1]):
        raise ValueError(f"its sha256 begins with {found[: len(promised[1])]}, not with {promised[1]}")

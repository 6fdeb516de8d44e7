"""What the catalogue knows of a network that has a name."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch
    from torch import nn

    from featx.backbones.table import Family
    from featx.images.preprocessing import Preset


class Entry(Protocol):
    """A network that is known by name.

    Its methods take the name of published weights, or nothing for a network whose weights come from a file or a seed.
    """

    @property
    def family(self) -> Family | None:
        """The table's row; None where the network itself tells what its stages are."""

    @property
    def head(self) -> tuple[str, ...]:
        """Modules that a weights file may lack."""

    @property
    def fixed_size(self) -> bool:
        """Whether it takes images of its preset's size and no other."""

    @property
    def is_resizable(self) -> bool:
        """Whether one of fixed size can be built for another."""

    @property
    def min_size(self) -> int:
        """Smallest image side that it takes, in pixels."""

    @property
    def published(self) -> list[str]:
        """Names of its published weights."""

    def preset(self, weights: str = "") -> Preset:
        """Preprocessing that the weights were trained with."""

    def preset_name(self, weights: str = "") -> str:
        """What `preset_named` knows this preprocessing by."""

    def build(self, weights: str = "", side: int | None = None) -> nn.Module:
        """Construct the network that the weights fit, with random ones, for images of another side where one is given.

        Raises
        ------
        BackboneError
            It cannot be built for images of that side.
        """

    def skeleton(self, weights: str = "", side: int | None = None) -> nn.Module:
        """Construct it on the meta device."""

    def resized(self, module: nn.Module, weights: str, side: int) -> nn.Module:
        """The network with the same weights for images of another side: position embeddings are resampled."""

    def content(self, weights: str) -> str:
        """What identifies the content of published weights, together with that of `file`."""

    def file(self, weights: str) -> Path | None:
        """Where published weights lie, fetched if need be; None where `content` says it all."""

    def state(self, weights: str) -> dict[str, torch.Tensor]:
        """Fetch and read published weights."""

    def rearranged(self, state: Mapping[str, torch.Tensor], module: nn.Module) -> dict[str, torch.Tensor] | None:
        """Tensors as the network's authors name them by the names of a module of it; None where nothing tells them."""

"""From one decoded image to a tile of the network's input size, and from tiles to a normalised batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.nn.functional import interpolate
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F

from featx.system.devices import move

# Wider or taller than this, an image is cut to its middle before it is resized: a 10 x 30,000 strip scaled to a
# short side of 256 would otherwise need 590 MB for pixels that the centre crop throws away.
_MAX_ASPECT_RATIO = 4


@dataclass(frozen=True)
class Preset:
    """Preprocessing a network was trained with: resize the short side, crop the centre, normalise.

    Parameters
    ----------
    resize, crop : int
        Length of the short side after resizing, and side of the centre crop, in pixels.
    mean, std : tuple of 3 floats
        Per channel, for pixels in 0..1.
    interpolation : {"bilinear", "bicubic"}
        Always antialiased.
    """

    resize: int
    crop: int
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    interpolation: str = "bilinear"

    def scaled(self, image_size: int | None) -> Preset:
        """The same preset for another crop; resize and crop keep their proportion."""
        if image_size is None or image_size == self.crop:
            return self
        return replace(self, resize=max(image_size, round(self.resize * image_size / self.crop)), crop=image_size)

    def tile(self, image: torch.Tensor, stretch: bool = False) -> torch.Tensor:
        """Resize and crop one image of shape (3, height, width) to (3, crop, crop); uint8 stays uint8."""
        if stretch:
            return _resize(image, (self.crop, self.crop), self.interpolation)
        image = _bound_aspect_ratio(image)
        image = _resize(image, _with_short_side(self.resize, *image.shape[-2:]), self.interpolation)
        return _channels_last(F.center_crop(image, [self.crop, self.crop]))

    def finish(self, tiles: torch.Tensor) -> torch.Tensor:
        """Normalise a batch of tiles, uint8 0..255 or float 0..1, to float32."""
        tiles = _as_unit_float(tiles)
        mean, std = (
            move(torch.tensor(value, dtype=torch.float32), tiles.device).view(-1, 1, 1)
            for value in (self.mean, self.std)
        )
        return (tiles - mean).div_(std)


class SquashPreset(Preset):
    """A preset that resizes both sides alike, whatever that does to proportions."""

    def tile(self, image: torch.Tensor, stretch: bool = False) -> torch.Tensor:
        """Resize and crop one image of shape (3, height, width) to (3, crop, crop); uint8 stays uint8."""
        if not stretch:
            image = _resize(image, (self.resize, self.resize), self.interpolation)
        return super().tile(image, stretch)


@dataclass(frozen=True)
class CustomPreprocessing:
    """A callable of the user's in place of a preset: item -> float tensor that the network takes as it is.

    The callable gets a PIL image where the item has 8-bit pixels, and a float32 tensor of shape
    (3, height, width) where it has more bits; ``None`` takes the items as ready tensors.
    """

    function: Callable[[Any], Any] | None

    def tile(self, image: torch.Tensor, stretch: bool = False) -> torch.Tensor:
        """Apply the callable to one image and check what comes out."""
        if self.function is None:
            return image
        out = self.function(F.to_pil_image(image) if image.dtype == torch.uint8 else image)
        if not isinstance(out, torch.Tensor) or out.ndim != 3:
            shown = tuple(out.shape) if isinstance(out, torch.Tensor) else type(out).__name__
            raise TypeError(
                f"preprocess is expected to return a tensor of shape (channels, height, width), got {shown}. "
                "End it with a conversion to a tensor, such as torchvision's ToTensor."
            )
        return out

    def finish(self, tiles: torch.Tensor) -> torch.Tensor:
        """The batch as float32; uint8 tiles are scaled to 0..1."""
        return _as_unit_float(tiles)


Preprocessing = Preset | CustomPreprocessing


def collate(tiles: Sequence[torch.Tensor]) -> torch.Tensor:
    """Stack tiles, channels last in memory; where some are uint8 and some float, all become float in 0..1."""
    shapes = {tuple(tile.shape) for tile in tiles}
    if len(shapes) > 1:
        raise ValueError(
            f"Images of one shape are expected after preprocessing, got {sorted(shapes)}. "
            'Let preprocess resize them, or use preprocess="weights".'
        )
    if len({tile.dtype for tile in tiles}) > 1:
        tiles = [_as_unit_float(tile) for tile in tiles]
    return torch.stack([tile.permute(1, 2, 0) for tile in tiles]).permute(0, 3, 1, 2)


def _channels_last(image: torch.Tensor) -> torch.Tensor:
    """Pixels in memory of their own, as they were decoded and as engines take them: (height, width, channels)."""
    return image.permute(1, 2, 0).contiguous().permute(2, 0, 1)


def _resize(image: torch.Tensor, size: tuple[int, int], interpolation: str) -> torch.Tensor:
    """An image of shape (3, height, width) in another size, antialiased.

    By the same routine on every processor: torchvision's resize turns bytes into floats where there is no AVX2, which
    rounds otherwise and moves features by up to 3e-2 of their norm.
    """
    if image.dtype != torch.uint8:
        mode = InterpolationMode(interpolation)
        return F.resize(image, list(size), interpolation=mode, antialias=True)
    if tuple(image.shape[-2:]) == size:
        return image
    return interpolate(image[None], size=size, mode=interpolation, antialias=True)[0]


def _with_short_side(short: int, height: int, width: int) -> tuple[int, int]:
    """Height and width in proportion, as torchvision rounds them."""
    if height <= width:
        return short, int(short * width / height)
    return int(short * height / width), short


def _as_unit_float(tiles: torch.Tensor) -> torch.Tensor:
    return tiles.float().div_(255) if tiles.dtype == torch.uint8 else tiles.float()


def _bound_aspect_ratio(image: torch.Tensor) -> torch.Tensor:
    height, width = image.shape[-2:]
    longest = _MAX_ASPECT_RATIO * min(height, width)
    if max(height, width) <= longest:
        return image
    return F.center_crop(image, [min(height, longest), min(width, longest)])

"""Altered views of images for training: named presets and callables, each view drawn from a seed of its own."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import xxhash
from torchvision.transforms.v2 import functional as F

from featx.images.reading import Content, Reading
from featx.images.sources import Items
from featx.system.randomness import private_generator

Operation = Callable[[torch.Tensor, torch.Generator], torch.Tensor]

_SCALE, _RATIO = (0.35, 1.0), (3 / 4, 4 / 3)  # of the area, and of width to height
_STRENGTH = 0.4  # most that brightness, contrast and saturation change, as a share


def _uniform(generator: torch.Generator, low: float, high: float) -> float:
    return low + (high - low) * float(torch.rand((), generator=generator))


def _mirrors(generator: torch.Generator) -> bool:
    return _uniform(generator, 0, 1) < 0.5


def _mirror(image: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    return F.horizontal_flip(image) if _mirrors(generator) else image


def _crop(image: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """A random part of the image, as large as it comes: preprocessing resizes it."""
    height, width = image.shape[-2:]
    area = _uniform(generator, *_SCALE) * height * width
    ratio = math.exp(_uniform(generator, *map(math.log, _RATIO)))
    tall = min(height, max(1, round(math.sqrt(area / ratio))))
    wide = min(width, max(1, round(math.sqrt(area * ratio))))
    top = int(_uniform(generator, 0, height - tall + 1))
    left = int(_uniform(generator, 0, width - wide + 1))
    return F.crop(image, top, left, tall, wide)


def _colour(image: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    for change in (F.adjust_brightness, F.adjust_contrast, F.adjust_saturation):
        image = change(image, _uniform(generator, 1 - _STRENGTH, 1 + _STRENGTH))
    return image


#: What the names stand for, in order.
PRESETS: dict[str, tuple[Operation, ...]] = {
    "flip": (_mirror,),
    "crop": (_mirror, _crop),
    "color": (_mirror, _crop, _colour),
    "mirrored": (lambda image, _: F.horizontal_flip(image),),
}


_MIRRORED = "mirrored 0 0"  # key of a mirror image, by whatever name it is asked for


@dataclass(frozen=True)
class Augmentation:
    """How images are altered.

    Parameters
    ----------
    source : str or callable
        A name in `PRESETS`, or a callable that gets a PIL image (a float tensor of shape (3, height, width) where
        pixels are floats) and returns one; what it draws from torch's generator is drawn from the view's seed.
    """

    source: str | Callable[[Any], Any]

    @property
    def key(self) -> str | None:
        """What tells it from others; None for a callable without ``cache_key``."""
        if isinstance(self.source, str):
            return self.source
        key = getattr(self.source, "cache_key", None)
        return f"{type(self.source).__qualname__} {key}" if isinstance(key, str) else None

    def is_mirror_image(self, seed: int) -> bool | None:
        """Whether a view is an image's mirror image, or else the image itself; None where it can be something else."""
        return _mirrors(torch.Generator().manual_seed(seed)) if self.source == "flip" else None

    def apply(self, image: torch.Tensor, seed: int) -> torch.Tensor:
        """One view of an image of shape (3, height, width)."""
        if isinstance(self.source, str):
            generator = torch.Generator().manual_seed(seed)
            for operation in PRESETS[self.source]:
                image = operation(image, generator)
            return image.contiguous()
        with private_generator(seed):
            out = self.source(F.to_pil_image(image) if image.dtype == torch.uint8 else image)
        return out if isinstance(out, torch.Tensor) else F.pil_to_tensor(out.convert("RGB"))


class AugmentedItems(Items):
    """Views of items, one after the other: all of the first view, then all of the second.

    What a view looks like depends on the image, the view and the seed, never on the other images.

    Parameters
    ----------
    items : Items
    augmentation : Augmentation
    views : range
        Numbers of the views.
    seed : int
        Another seed gives other views.
    places : range or None, default=None
        Which of them, None for all.
    """

    def __init__(
        self, items: Items, augmentation: Augmentation, views: range, seed: int, places: range | None = None
    ) -> None:
        self._items, self._augmentation, self._views, self._seed = items, augmentation, views, seed
        self._places = range(len(items) * len(views)) if places is None else places

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return AugmentedItems(self._items, self._augmentation, self._views, self._seed, self._places[index])
        return self._items[self._at(index)[1]]

    @property
    def is_keyed(self) -> bool:
        """Whether digests tell all that pixels depend on."""
        return self._augmentation.key is not None

    @property
    def reading(self) -> Reading:
        """As of the items."""
        return self._items.reading

    @property
    def short_side(self) -> int | None:
        """As of the items."""
        return self._items.short_side

    def load(self, row: int) -> torch.Tensor:
        """Pixels of one view."""
        return self.load_with_contents(row)[0]

    def load_with_contents(self, row: int, *seeds: int) -> tuple[torch.Tensor, tuple[Content, ...]]:
        """Pixels of one view, and of a file what stands for the view of the same bytes under each seed."""
        view, of_item = self._at(row)
        pixels, contents = self._items.load_with_contents(of_item, 0, *seeds)
        plain = self.reading.digest_of(contents[0]) if contents else self._items.digest(of_item)
        return self._alter(pixels, plain, view), tuple(self._seen(each, plain, view) for each in contents[1:])

    @property
    def originals(self) -> Items | None:
        """The images, where all are seen in one view: what is known of their files need not be read for the view."""
        return self._items[self._places.start : self._places.stop] if len(self._views) == 1 else None

    def altered(self, digest: bytes) -> bytes:
        """Digest of the one view, given that of the image."""
        (view,) = self._views
        return self._seen(Content(digest), digest, view).digest

    def iter_paths(self) -> Iterator[None]:
        """No view is a file."""
        return iter([None] * len(self))

    def original_row(self, row: int) -> int:
        """Position in X of the image that a view is of."""
        return self._items.original_row(self._at(row)[1])

    def digest(self, row: int, seed: int = 0) -> bytes:
        """Digest of one view."""
        return self.reading.digest_of(*self.contents(row, seed))

    def contents(self, row: int, *seeds: int) -> tuple[Content, ...]:
        """What stands for one view, under each seed."""
        view, of_item = self._at(row)
        plain, *contents = self._items.contents(of_item, 0, *seeds)
        return tuple(self._seen(each, self.reading.digest_of(plain), view) for each in contents)

    def _at(self, row: int) -> tuple[int, int]:
        turn, of_item = divmod(self._places[row], len(self._items))
        return self._views[turn], of_item

    def _alter(self, pixels: torch.Tensor, plain: bytes, view: int) -> torch.Tensor:
        return self._augmentation.apply(pixels, self._drawn(plain, view))

    def _seen(self, content: Content, plain: bytes, view: int) -> Content:
        """What stands for a view; where it is the image or its mirror image, what stands for that."""
        mirrored = self._augmentation.is_mirror_image(self._drawn(plain, view))
        if mirrored is None:
            return Content(_mixed(self.reading.digest_of(content), self._key(view)))
        return Content(_mixed(self.reading.digest_of(content), _MIRRORED)) if mirrored else content

    def _drawn(self, plain: bytes, view: int) -> int:
        """Seed of what is drawn for a view of an image with this digest."""
        return int.from_bytes(_mixed(plain, self._key(view))[:7], "big")

    def _key(self, view: int) -> str:
        return f"{self._augmentation.key} {view} {self._seed}"


def _mixed(digest: bytes, key: str) -> bytes:
    return xxhash.xxh3_128_digest(digest + key.encode())


def mirrored(items: Items) -> Items:
    """Mirror images of items, each with a digest of its own."""
    return AugmentedItems(items, Augmentation("mirrored"), range(1), 0)

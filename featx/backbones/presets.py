"""Preprocessing that a network from elsewhere carries or leads to; where it does neither, ImageNet's usual one."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from featx.backbones.timm_models import told_preset
from featx.exceptions import BackboneError
from featx.images.preprocessing import Preset, SquashPreset

USUAL = Preset(resize=256, crop=224)
# Files of transformers beside its weights; the second holds the first under a name.
_FILES = ("preprocessor_config.json", "processor_config.json")
_RESAMPLING = {2: "bilinear", 3: "bicubic"}  # Pillow's numbers
_OWN_PROCESSOR = "preprocess=lambda image: processor(image, return_tensors='pt')['pixel_values'][0]"


def preset_of_module(module: nn.Module) -> Preset:
    """Preprocessing that the weights in a module were trained with, as far as the module or files of its own tell.

    A network inside another (``nn.Sequential(network)``) counts, where there is one.

    Raises
    ------
    BackboneError
        It is none that featx can do: the network takes no square images, say.
    """
    told = set(_told(module))
    return next(iter(told)) if len(told) == 1 else USUAL


def _told(module: nn.Module) -> Iterator[Preset]:
    """What the outermost networks say that say anything."""
    for teller in (told_preset, _of_transformers):
        if (found := teller(module)) is not None:
            yield found
            return
    for child in module.children():
        yield from _told(child)


def _of_transformers(module: nn.Module) -> Preset | None:
    """Of a network of the library transformers, from the file that lies beside its weights on this machine.

    The network itself knows its images' side alone.
    """
    config = getattr(module, "config", None)
    if not isinstance(getattr(config, "model_type", None), str):
        return None
    name = str(getattr(config, "name_or_path", None) or getattr(config, "_name_or_path", "") or "")
    said = _beside(name)
    preset = None if said is None else _preset_of_processor(said)
    if preset is not None:
        return preset
    side = _side(getattr(config, "image_size", None) or USUAL.crop, module)
    place = repr(name) if name else "its folder"
    warnings.warn(
        f"What {type(module).__name__} was trained with is expected in the {_FILES[0]} of {place}, and there is none "
        f"on this machine that featx can follow: images of {side} x {side} pixels with ImageNet's mean "
        f"and deviation are taken. Load the network's own processor, and pass {_OWN_PROCESSOR}.",
        UserWarning,
        stacklevel=2,
    )
    return USUAL.scaled(side)


def _side(size: Any, module: nn.Module) -> int:
    height, width = (size, size) if isinstance(size, int) else (*size, *size)[:2]
    if height != width:
        raise BackboneError(
            f'A network for square images is expected with preprocess="weights", got {type(module).__name__} for '
            f"{height} x {width} pixels. Load the network's own processor, and pass {_OWN_PROCESSOR}."
        )
    return int(height)


def _beside(name: str) -> Mapping[str, Any] | None:
    """What the file says that lies in a folder, or in what the hub has fetched before. Opens no connection."""
    for file in _FILES:
        path = _local(name, file)
        try:
            said = json.loads(Path(path).read_text(encoding="utf-8")) if path else {}
        except (OSError, ValueError):
            continue
        said = said.get("image_processor", said)
        if "image_mean" in said or "size" in said:
            return dict(said)
    return None


def _local(name: str, file: str) -> str | None:
    if not name:
        return None
    inside = Path(name) / file
    if inside.is_file():
        return str(inside)
    try:
        from huggingface_hub import try_to_load_from_cache

        found = try_to_load_from_cache(name, file)
    except (ImportError, ValueError):  # a name that the hub cannot have
        return None
    return found if isinstance(found, str) else None


def _preset_of_processor(said: Mapping[str, Any]) -> Preset | None:
    """Of a transformers image processor; None where it does something that a preset cannot."""
    size = _sides(said.get("size"))
    crop = _sides(said.get("crop_size")) if said.get("do_center_crop") else None
    interpolation = _RESAMPLING.get(said.get("resample", 2))
    normalises = said.get("do_normalize", True)
    mean, std = (said.get("image_mean"), said.get("image_std")) if normalises else ([0.0] * 3, [1.0] * 3)
    does_all = said.get("do_resize", True) and abs(float(said.get("rescale_factor", 1 / 255)) * 255 - 1) < 1e-3
    if size is None or interpolation is None or not (mean and std and len(mean) == len(std) == 3 and does_all):
        return None
    of_short_side = isinstance(said["size"], Mapping) and "shortest_edge" in said["size"]
    last = crop or size
    if size[0] != size[1] or last[0] != last[1] or (of_short_side and crop is None):
        return None
    kind = Preset if of_short_side else SquashPreset
    return kind(size[0], last[0], tuple(mean), tuple(std), interpolation)


def _sides(size: Any) -> tuple[int, int] | None:
    """Height and width as transformers writes them: a number, both sides, or the shorter one."""
    if isinstance(size, int):
        return size, size
    if not isinstance(size, Mapping):
        return None
    height, width = (size.get(name, size.get("shortest_edge")) for name in ("height", "width"))
    return (height, width) if isinstance(height, int) and isinstance(width, int) else None

"""Preprocessing that a network from elsewhere carries or leads to; where it does neither, ImageNet's usual one."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple
from weakref import WeakSet

from torch import nn

from featx.backbones.timm_models import told_preset, told_size
from featx.exceptions import BackboneError
from featx.images.preprocessing import Preset, SquashPreset

USUAL = Preset(resize=256, crop=224)
# Files of transformers beside its weights; the second holds the first under a name.
_FILES = ("preprocessor_config.json", "processor_config.json")
_RESAMPLING = {2: "bilinear", 3: "bicubic"}  # Pillow's numbers


class _Kind(NamedTuple):
    """What a processor of transformers does where its file says no more: it has settings of its own."""

    of_short_side: bool  # what a size of one number means
    crops: bool
    resample: int


# Those that resize, crop, scale to 0..1 and normalise as their files say, and do nothing else. LeViT's, ConvNeXt's,
# PoolFormer's, EfficientNet's, MobileViT's and SegFormer's compute sizes or values of their own, and are not followed.
_KINDS = {
    **dict.fromkeys(("vit", "dinov3vit"), _Kind(False, False, 2)),
    **dict.fromkeys(("beit", "pvt"), _Kind(False, False, 3)),
    "deit": _Kind(False, True, 3),
    "siglip": _Kind(True, False, 3),
    **dict.fromkeys(("clip", "chineseclip", "bit"), _Kind(True, True, 3)),
    **dict.fromkeys(("mobilenetv1", "mobilenetv2"), _Kind(True, True, 2)),
}
# Networks whose processor is called otherwise, for files of old that do not name it.
_KIND_OF_NETWORK = {
    **dict.fromkeys(("swin", "swinv2", "vit_mae", "vit_msn", "ijepa"), "vit"),
    **dict.fromkeys(("dinov2", "dinov2_with_registers"), "bit"),
    **{"clip_vision_model": "clip", "siglip_vision_model": "siglip", "data2vec-vision": "beit"},
}
_WARNED: WeakSet[nn.Module] = WeakSet()  # those of which it was said that their preprocessing is not known
_WRAPPER = "timm_wrapper"  # the network inside says what it takes
_FOLLOWED = {"do_resize", "do_center_crop", "do_rescale", "do_normalize", "do_convert_rgb"}
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


def size_of_module(module: nn.Module) -> tuple[int, int]:
    """Height and width of images to look at a module with, in pixels: what it says, or else the usual ones."""
    said = set(_sizes_in(module))
    return next(iter(said)) if len(said) == 1 else (USUAL.crop, USUAL.crop)


def _sizes_in(module: nn.Module) -> Iterator[tuple[int, int]]:
    of_transformers = module.config.image_size if _knows_its_side(module) else None  # type: ignore[union-attr]
    size = told_size(module) or of_transformers or _cfg_of_open_clip(module).get("size")
    if size:
        yield _height_and_width(size)
        return
    for child in module.children():
        yield from _sizes_in(child)


def _told(module: nn.Module) -> Iterator[Preset]:
    """What the outermost networks say that say anything."""
    for teller in (told_preset, _of_transformers, _of_open_clip):
        if (found := teller(module)) is not None:
            yield found
            return
    for child in module.children():
        yield from _told(child)


def _of_transformers(module: nn.Module) -> Preset | None:
    """Of a network of the library transformers, from the file that lies beside its weights on this machine.

    The network itself knows its images' side alone.
    """
    config: Any = getattr(module, "config", None)
    if not _is_of_transformers(module) or config.model_type == _WRAPPER:
        return None
    name = str(getattr(config, "name_or_path", None) or getattr(config, "_name_or_path", "") or "")
    said = _beside(name)
    preset = None if said is None else _preset_of_processor(said, config.model_type)
    if preset is not None:
        return preset
    side = _side(getattr(config, "image_size", None) or USUAL.crop, module)
    if module not in _WARNED:
        _WARNED.add(module)
        _warn(module, side, repr(name) if name else "its folder")
    return USUAL.scaled(side)


def _warn(module: nn.Module, side: int, place: str) -> None:
    warnings.warn(
        f"What {type(module).__name__} was trained with is expected in the {_FILES[0]} of {place}, and there is none "
        f"on this machine that featx can follow: images of {side} x {side} pixels with ImageNet's mean "
        f"and deviation are taken. Load the network's own processor, and pass {_OWN_PROCESSOR}.",
        UserWarning,
        stacklevel=2,
    )


def _is_of_transformers(module: nn.Module) -> bool:
    told = isinstance(getattr(getattr(module, "config", None), "model_type", None), str)
    return told and any(base.__name__ == "PreTrainedModel" for base in type(module).__mro__)


def _knows_its_side(module: nn.Module) -> bool:
    return _is_of_transformers(module) and bool(getattr(module.config, "image_size", None))


def _cfg_of_open_clip(module: nn.Module) -> Mapping[str, Any]:
    said = getattr(module, "preprocess_cfg", None)
    return said if isinstance(said, Mapping) and {"size", "mean", "std"} <= said.keys() else {}


def _of_open_clip(module: nn.Module) -> Preset | None:
    """Of an image tower of the library open_clip, which carries what its weights were trained with."""
    said = _cfg_of_open_clip(module)
    if not said:
        return None
    kind = {"shortest": Preset, "squash": SquashPreset}.get(said.get("resize_mode", "shortest"))
    interpolation = said.get("interpolation", "bicubic")
    side = _side(said["size"], module)
    if kind is None or interpolation not in _RESAMPLING.values():
        raise BackboneError(
            f"A network for images whose shorter side or both sides are resized is expected, got "
            f"{type(module).__name__} with preprocess_cfg={dict(said)}. Pass the transform that open_clip returns "
            "beside the network as preprocess."
        )
    return kind(side, side, tuple(said["mean"]), tuple(said["std"]), interpolation)


def _side(size: Any, module: nn.Module) -> int:
    height, width = _height_and_width(size)
    if height != width:
        raise BackboneError(
            f'A network for square images is expected with preprocess="weights", got {type(module).__name__} for '
            f"{height} x {width} pixels. Load the network's own processor, and pass {_OWN_PROCESSOR}."
        )
    return height


def _height_and_width(size: Any) -> tuple[int, int]:
    height, width = (size, size) if isinstance(size, int) else (*size, *size)[:2]
    return int(height), int(width)


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


def _preset_of_processor(said: Mapping[str, Any], network: str) -> Preset | None:
    """Of a transformers image processor; None where it does something that a preset cannot."""
    kind = _kind_of(said, network)
    if kind is None or not _only_does_what_is_followed(said):
        return None
    size, of_short_side = _sides(said.get("size"), kind)
    crop = _sides(said.get("crop_size"), kind)[0] if said.get("do_center_crop", kind.crops) else size
    interpolation = _RESAMPLING.get(said.get("resample", kind.resample))
    normalises = said.get("do_normalize", True)
    mean, std = (said.get("image_mean"), said.get("image_std")) if normalises else ([0.0] * 3, [1.0] * 3)
    if not (size and crop and interpolation and mean and std and len(mean) == len(std) == 3):
        return None
    if of_short_side and not said.get("do_center_crop", kind.crops):
        return None
    return (Preset if of_short_side else SquashPreset)(size, crop, tuple(mean), tuple(std), interpolation)


def _kind_of(said: Mapping[str, Any], network: str) -> _Kind | None:
    """The processor that the file names, or else the network's."""
    named = str(said.get("image_processor_type") or said.get("feature_extractor_type") or "")
    stem = re.sub(r"(ImageProcessor|FeatureExtractor)(Fast|Pil)?$", "", named)
    return _KINDS.get(stem.lower() or _KIND_OF_NETWORK.get(network, network))


def _only_does_what_is_followed(said: Mapping[str, Any]) -> bool:
    others = any(value for name, value in said.items() if name.startswith("do_") and name not in _FOLLOWED)
    scales = said.get("do_rescale", True) and abs(float(said.get("rescale_factor", 1 / 255)) * 255 - 1) < 1e-3
    return bool(said.get("do_resize", True) and scales) and not others


def _sides(size: Any, kind: _Kind) -> tuple[int | None, bool]:
    """A side as transformers writes it, and whether it is the shorter one's; None for what is not square."""
    if isinstance(size, int):
        return size, kind.of_short_side
    if not isinstance(size, Mapping):
        return None, False
    given = {name: side for name, side in size.items() if side is not None}
    sides = set(given.values())
    side = next(iter(sides)) if len(sides) == 1 and given.keys() in ({"height", "width"}, {"shortest_edge"}) else None
    return (side if isinstance(side, int) else None), "shortest_edge" in given

"""timm's networks: the catalogue's entries for ``"timm/NAME"``, and what any network of timm's tells of itself.

timm is optional, and imported when a name asks for it.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from featx.backbones.skeletons import ParametersMadeWith
from featx.backbones.tracing import Call
from featx.exceptions import BackboneError, WeightsError
from featx.images.preprocessing import Preset, SquashPreset
from featx.system.compat import timm_keeps_whole
from featx.system.randomness import private_generator

PREFIX = "timm/"
_FILES = ("model.safetensors", "pytorch_model.bin")  # on the hub, the first there is


def timm_entry(name: str) -> TimmEntry:
    """Entry for a name of timm's, with or without a tag (``"resnet18.a1_in1k"``).

    Raises
    ------
    BackboneError
        timm is not installed, or does not know the name.
    """
    try:
        import timm
    except ImportError as error:
        raise BackboneError(
            f'timm is expected to be installed for backbone="{PREFIX}{name}", and cannot be imported: {error}. '
            'Run pip install "featx[timm]", or take a name from featx.list_backbones().'
        ) from error
    known = {*timm.list_models(), *timm.list_models(include_tags=True)}
    if name not in known:
        near = get_close_matches(name, sorted(known), cutoff=0.5)
        hint = f"Did you mean {' or '.join(repr(PREFIX + other) for other in near)}?" if near else ""
        raise BackboneError(
            f'The name of a network of timm {timm.__version__} is expected, got backbone="{PREFIX}{name}". '
            f"{hint or 'See timm.list_models().'}"
        )
    return TimmEntry(*name.partition(".")[::2])


@dataclass(frozen=True)
class TimmEntry:
    """A network of timm's; see `featx.backbones.entries.Entry`.

    Attributes
    ----------
    model : str
        The architecture.
    tag : str
        Of the weights that "DEFAULT" means and that decide preprocessing and number of classes where the weights come
        from a file or a seed; empty for timm's own choice.
    """

    model: str
    tag: str

    family = None
    min_size = 1
    is_resizable = True

    @property
    def head(self) -> tuple[str, ...]:
        """The classifiers; layers of the head in front of them are part of the features."""
        names = self._config().classifier or ()
        return (names,) if isinstance(names, str) else tuple(names)

    @property
    def fixed_size(self) -> bool:
        """Whether the network is built for one size (ViT, Swin)."""
        return bool(self._config().fixed_input_size)

    @cached_property
    def published(self) -> list[str]:
        """``"DEFAULT"`` and the tags that have weights."""
        import timm

        tags = [name.partition(".")[2] for name in timm.list_pretrained(f"{self.model}.*")]
        return ["DEFAULT", *tags] if self._config().has_weights else tags

    def preset(self, weights: str = "") -> Preset:
        """The evaluation transform that timm makes.

        Raises
        ------
        BackboneError
            It is none that resizes and crops to a square.
        """
        return _preset_of(self._config(weights).to_dict(), self._name(weights))

    def preset_name(self, weights: str = "") -> str:
        """The network's name with its tag."""
        return self._name(weights)

    def build(self, weights: str = "", side: int | None = None) -> nn.Module:
        """Construct the network that the weights fit, with random ones, for images of another side where one is given.

        Raises
        ------
        BackboneError
            It cannot be built for images of that side.
        """
        return self._create(weights) if side is None else self._created_for(side, weights)

    def skeleton(self, weights: str = "", side: int | None = None) -> nn.Module:
        """Construct it on the meta device."""
        with private_generator(0), torch.device("cpu"):
            try:
                with ParametersMadeWith(device="meta"):
                    return self.build(weights, side).to("meta")
            except RuntimeError:  # hybrids run what they have built so far, on real zeros
                return self.build(weights, side).to("meta")

    def resized(self, module: nn.Module, weights: str, side: int) -> nn.Module:
        """The network with the same weights for images of another side: timm resamples what depends on it."""
        with private_generator(0), torch.device("cpu"):
            other = self.build(weights, side).to(torch.float32)
            adapt = getattr(sys.modules[type(module).__module__], "checkpoint_filter_fn", lambda state, _: state)
            try:
                other.load_state_dict(adapt(module.state_dict(), other))
            except (RuntimeError, ValueError) as error:
                raise BackboneError(
                    f"A network whose weights timm can take to images of {side} x {side} pixels is expected, got "
                    f"{self._name(weights)}, whose weights stay as they are. Leave image_size=None, or take another "
                    "backbone."
                ) from error
        return other

    def content(self, weights: str) -> str:
        """The tag, which promises nothing of what is in the file."""
        return self._tag(weights)

    def file(self, weights: str) -> Path:
        """The published file, from where timm keeps it or else from the network.

        Raises
        ------
        WeightsError
            It is not there and cannot be fetched.
        """
        config = self._config(weights)
        if config.file:
            return Path(config.file)
        try:
            return _from_hub(config) if config.hf_hub_id else _from_url(config.url)
        except Exception as error:  # no connection, no such file, no room: every library has its own
            name = self._name(weights)
            raise WeightsError(
                f"The weights of {name!r} are expected in {_folder(config)!r} and could not be fetched: {error} They "
                f"come from {_address(config)}. Run timm.create_model({name.removeprefix(PREFIX)!r}, pretrained=True) "
                'where there is a connection and bring that folder here, pass weights="PATH" to where you have the '
                'file, or use backbone="featx_micro", which needs no download.'
            ) from error

    def state(self, weights: str) -> dict[str, torch.Tensor]:
        """Tensors of a network that timm has loaded, since its files may need to be rearranged by timm."""
        file = self.file(weights)
        try:
            with private_generator(0), torch.device("cpu"):
                return self._create(weights, pretrained=True, pretrained_cfg_overlay={"file": str(file)}).state_dict()
        except Exception as error:  # safetensors, pickle, zip and torch have errors of their own
            raise WeightsError(
                f"The weights of {self._name(weights)!r} are expected at {str(file)!r} and are there but damaged "
                f"(delete the file): {error}."
            ) from error

    def rearranged(self, state: Mapping[str, torch.Tensor], module: nn.Module) -> dict[str, torch.Tensor] | None:
        """Tensors as the network's authors published them by timm's names; None where timm does not know them.

        timm would also interpolate what is of another size, such as places for another image size: that is another
        network, and None.
        """
        rename = getattr(sys.modules[type(module).__module__], "checkpoint_filter_fn", None)
        try:
            found = rename(dict(state), module) if rename is not None else None
        except Exception:  # made for files of one kind, it fails with others in any way
            return None
        if not isinstance(found, dict):
            return None
        resized = (name for name in found.keys() & state.keys() if found[name].numel() != state[name].numel())
        return None if any(resized) else found

    def _create(self, weights: str, **options: Any) -> nn.Module:
        import timm

        return timm.create_model(self.model, pretrained_cfg=self._tag(weights) or None, **options)

    def _created_for(self, side: int, weights: str) -> nn.Module:
        try:
            return self._create(weights, img_size=side)
        except (TypeError, AssertionError, ValueError, RuntimeError, ZeroDivisionError) as error:
            raise cannot_be_built(self._name(weights), side, error) from error

    def _config(self, weights: str = "") -> Any:
        from timm.models import resolve_pretrained_cfg

        return resolve_pretrained_cfg(self.model, self.tag if weights in ("", "DEFAULT") else weights)

    def _tag(self, weights: str) -> str:
        return self._config(weights).tag or ""

    def _name(self, weights: str) -> str:
        return f"{PREFIX}{self.model}.{self._tag(weights)}".rstrip(".")


def cannot_be_built(model: str, side: int, error: Exception) -> BackboneError:
    """That a network of fixed size does not come in another."""
    why = str(error).splitlines()[0] if str(error) else type(error).__name__
    return BackboneError(
        f"A side that {model} can be built for is expected, got image_size={side}: {why}. Take a multiple of the side "
        "of its patches, leave image_size=None, or take a convolutional backbone."
    )


def _preset_of(config: Mapping[str, Any], name: str, side: int | None = None) -> Preset:
    """The evaluation transform that timm makes of a configuration, for images of a side where one is given."""
    from timm.data import resolve_data_config

    found = resolve_data_config(pretrained_cfg=dict(config))
    _, height, width = found["input_size"]
    kind = {"center": Preset, "squash": SquashPreset}.get(found["crop_mode"])
    if kind is None or height != width:
        raise BackboneError(
            f"A network for square images, cropped or squashed, is expected, got {name!r} for {height} x {width} "
            f"pixels with crop_mode={found['crop_mode']!r}. Build it yourself, and pass it as a callable with "
            "preprocess=timm.data.create_transform(...)."
        )
    return kind(
        resize=math.floor(height / found["crop_pct"]),
        crop=height,
        mean=tuple(found["mean"]),
        std=tuple(found["std"]),
        interpolation=found["interpolation"],
    ).scaled(side)


def told_preset(module: nn.Module) -> Preset | None:
    """The evaluation transform of a network of timm's, for the size that it is built for; None for others.

    Raises
    ------
    BackboneError
        It is none that resizes and crops to a square.
    """
    config = _told_config(module)
    if config is None:
        return None
    built_for = _built_for(module)
    if built_for is not None and built_for[0] != built_for[1]:
        config["input_size"] = (3, *built_for)
    side = None if built_for is None else built_for[0]
    return _preset_of(config, config.get("architecture") or type(module).__name__, side)


def told_size(module: nn.Module) -> tuple[int, int] | None:
    """Height and width of the images that a network of timm's is built for or was trained with; None for others."""
    config = _told_config(module)
    if config is None or not (size := _built_for(module) or config.get("input_size", ())[1:]):
        return None
    return int(size[0]), int(size[1])


def _told_config(module: nn.Module) -> dict[str, Any] | None:
    # transformers' wrapper of timm's networks has it in its own configuration.
    config = getattr(module, "pretrained_cfg", None) or getattr(getattr(module, "config", None), "pretrained_cfg", None)
    if not config or "timm" not in sys.modules:
        return None
    return dict(config if isinstance(config, Mapping) else config.to_dict())


def _built_for(module: nn.Module) -> Any:
    return getattr(getattr(module, "patch_embed", None), "img_size", None)


def _from_hub(config: Any) -> Path:
    from huggingface_hub import hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    repository, _, revision = config.hf_hub_id.partition("@")
    *others, last = files = (config.hf_hub_filename,) if config.hf_hub_filename else _FILES
    # What is there is taken as it is: the key of kept features must not change because somebody uploads.
    for name in files:
        kept = try_to_load_from_cache(repository, name, revision=revision or None)
        if isinstance(kept, str):
            return Path(kept)
    for name in others:
        try:
            return Path(hf_hub_download(repository, name, revision=revision or None))
        except LocalEntryNotFoundError:  # is an EntryNotFoundError, and says that there is no connection
            raise
        except EntryNotFoundError:
            continue
    return Path(hf_hub_download(repository, last, revision=revision or None))


def _from_url(url: str) -> Path:
    file = _of_url(url)
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(url, str(file), progress=False)
    return file


def _of_url(url: str) -> Path:
    return Path(torch.hub.get_dir()) / "checkpoints" / url.rsplit("/", 1)[-1]


def _folder(config: Any) -> str:
    from huggingface_hub import constants

    return str(constants.HF_HUB_CACHE) if config.hf_hub_id else str(_of_url(config.url).parent)


def _address(config: Any) -> str:
    return f"https://huggingface.co/{config.hf_hub_id}" if config.hf_hub_id else str(config.url)


def told_stages(module: nn.Module, calls: Mapping[str, Call]) -> list[str]:
    """Names of the stages as a network of timm's gives them; none where it does not, or where they are no modules.

    ``calls`` holds the first call of every module by name.
    """
    told = getattr(module, "feature_info", None) if hasattr(module, "pretrained_cfg") else None
    if not told:
        return []
    for stage in told:
        call = calls.get(stage["module"])
        if call is None or call.shape[:1] != (2,) or stage["num_chs"] not in call.shape[1:]:
            return []
    return list({stage["reduction"]: str(stage["module"]) for stage in told}.values())


def told_output(module: nn.Module, calls: Mapping[str, Call]) -> str | None:
    """Name of the output layer as a network of timm's gives it; None where that is not one layer that takes vectors."""
    get_classifier = getattr(module, "get_classifier", None) if hasattr(module, "pretrained_cfg") else None
    output = get_classifier() if callable(get_classifier) else None
    names = [name for name, child in module.named_modules() if child is output and name in calls]
    return next((name for name in names if len(calls[name].input_shape) == 2), None)


def wants_to_be_whole(module: nn.Module) -> bool:
    """Whether timm says that a module's inside cannot be traced (its forward looks at shapes)."""
    return timm_keeps_whole(type(module))

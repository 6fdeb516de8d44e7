"""From what a user passes as ``layers`` to places in a network: stages, trunk blocks, the penultimate layer, names."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatchcase
from functools import cached_property
from numbers import Integral

from torch import nn

from featx.backbones.table import Family, by_depth, stages_of
from featx.backbones.timm_models import told_output, told_stages
from featx.backbones.tokens import Places, Tokens, Told, scopes_of, usual_poolings
from featx.backbones.tracing import Call
from featx.exceptions import LayerError

_GLOBAL_POOLS = (nn.modules.pooling._AdaptiveAvgPoolNd, nn.modules.pooling._AdaptiveMaxPoolNd)


@dataclass(frozen=True)
class Layer:
    """One place in a network where features are read.

    Attributes
    ----------
    label : str
        How the feature names call it.
    name : str
        Qualified name of the module; empty for the network itself.
    call : int
        Which of the module's calls, counted from 1.
    side : {"output", "input"}
    shape : tuple of int
        For a batch of two images.
    layout : {"NCHW", "NHWC", "tokens", "vector", "other"}
    n_prefix_tokens : int or None
        Leading tokens that stand for no place in the image (class and register tokens); None where nothing tells.
    position : int
        How many of the trace's calls run before the layer is known.
    grid : (int, int) or None
        Rows and columns that the other tokens fill; None where nothing tells, and for other layouts.
    has_class_token : bool
        Whether the first token is a class token.
    """

    label: str
    name: str
    call: int
    side: str
    shape: tuple[int, ...]
    layout: str
    n_prefix_tokens: int | None
    position: int
    grid: tuple[int, int] | None = None
    has_class_token: bool = False

    @property
    def channels(self) -> int:
        """Number of channels, of token values or of vector entries."""
        return self.shape[1] if self.layout == "NCHW" else self.shape[-1]

    @property
    def spatial(self) -> tuple[int, int]:
        """Height and width in cells; (1, 1) for a vector, (tokens, 1) for tokens that fill no grid."""
        if self.layout == "tokens":
            return self.grid or (self.shape[1] - (self.n_prefix_tokens or 0), 1)
        if self.layout in ("NCHW", "NHWC"):
            height, width = self.shape[-2:] if self.layout == "NCHW" else self.shape[1:3]
            return height, width
        return 1, 1


class Architecture:
    """What can be read from one network at one image size.

    Parameters
    ----------
    module : nn.Module
        The network, of which structure alone is used.
    calls : tuple of Call
        Its trace.
    family : Family or None
        The table's row, which decides what the stages are; without one the network does, where it is one of timm's,
        or else a generic rule.
    model : str
        The network's name in the table, or what messages call it.
    shape : tuple of int
        (channels, height, width) of the images of the trace.
    """

    def __init__(
        self,
        module: nn.Module,
        calls: tuple[Call, ...],
        family: Family | None,
        model: str,
        shape: tuple[int, int, int],
    ) -> None:
        self.module, self.calls, self.family, self.model, self.shape = module, calls, family, model, shape
        self._positions = {(name, call.index): position for position, call in enumerate(calls) for name in call.names}

    @cached_property
    def _first_calls(self) -> dict[str, Call]:
        return {name: self.calls[position] for (name, call), position in self._positions.items() if call == 1}

    @cached_property
    def blocks(self) -> list[str]:
        """Qualified names of the trunk blocks, shallow to deep."""
        if self.family is not None:
            return [
                name for name in _flatten(self.module, self.family.trunk) if name not in self.family.downsampler_norms
            ]
        return _generic_blocks(self.module, self)

    @cached_property
    def _trunk(self) -> frozenset[str]:
        return frozenset([*self.blocks, *self.stages])

    @cached_property
    def stages(self) -> list[str]:
        """Qualified names of the stages, shallow to deep: of a network with one resolution four by depth."""
        if self.family is not None:
            return [name for name, _, _ in stages_of(self.model)]
        ends = told_stages(self.module, self._first_calls) or self._ends
        return by_depth(_repeated_blocks(self, ends[0]), ends[0]) if len(ends) == 1 else ends

    @property
    def _ends(self) -> list[str]:
        """The last block at each resolution."""
        last = {self.layer(name).spatial: name for name in self.blocks}
        return sorted(last.values(), key=self.blocks.index)

    @cached_property
    def penultimate(self) -> Layer:
        """The input of the output layer, or the network's own output where it has no output layer."""
        if self.family is not None:
            position: int | None = self._positions[self.family.output, 1]
        elif (told := told_output(self.module, self._first_calls)) is not None:
            position = self._positions[told, 1]
        else:
            position = _generic_output(self.calls)
        if position is None:
            return self.layer("", label="penultimate")
        call = self.calls[position]
        return self._place("penultimate", call, call.name, "input", call.input_shape, call.input_layout, position)

    def usual_poolings(self, layer: Layer) -> tuple[str, ...]:
        """What rows of a layer are usually made by: what ``pooling="auto"`` means."""
        if layer.layout != "tokens":
            return ("avg",)
        wanted = usual_poolings(self.module) if self.family is None else self.family.poolings
        return tuple(name for name in wanted if name != "cls" or layer.has_class_token) or ("avg",)

    @property
    def names(self) -> list[str]:
        """Every name that can be read, in the order in which the network reaches it."""
        readable = [call for call in self.calls if call.shape[:1] == (2,)]
        return [name if call.index == 1 else f"{name}#{call.index}" for call in readable for name in call.names if name]

    def layer(self, name: str, call: int = 1, label: str | None = None) -> Layer:
        """The output of one call of the module of that name."""
        position = self._positions[name, call]
        found = self.calls[position]
        return self._place(label or name, found, name, "output", found.shape, self._layout(name, found), position + 1)

    def resolve(self, layers: object) -> list[Layer]:
        """Places for a user's ``layers``: a name, a stage index, ``"all"``, or a list of these.

        Raises
        ------
        LayerError
            A name or index that the network does not have; the message names the nearest ones.
        """
        if isinstance(layers, (str, Integral)):
            return self._some(list(self._resolve_one(layers)), layers)
        if not isinstance(layers, Iterable):
            raise LayerError(f"A layer or a list of layers is expected, got layers={layers!r}.")
        found = self._some([layer for spec in layers for layer in self._resolve_one(spec)], layers)
        labels = [layer.label for layer in found]
        if len(set(labels)) < len(labels):
            raise LayerError(f"Each layer once is expected, got layers={layers!r}, which are {labels}.")
        return found

    def _some(self, found: list[Layer], layers: object) -> list[Layer]:
        if not found:
            raise LayerError(
                f"At least one layer is expected, got layers={layers!r} for {self.model} with stages {self.stages}. "
                'Try layers="penultimate".'
            )
        return found

    def _resolve_one(self, spec: object) -> Iterator[Layer]:
        if spec == "penultimate":
            yield self.penultimate
        elif spec == "all":
            yield from map(self.layer, self.stages)
        elif isinstance(spec, Integral) and not isinstance(spec, bool):
            yield self.layer(self._stage(int(spec)))
        elif isinstance(spec, str):
            yield self._named(spec)
        else:
            raise LayerError(
                f'A layer is expected to be "penultimate", "all", a stage index or a module\'s name, got {spec!r}.'
            )

    def _stage(self, index: int) -> str:
        count = len(self.stages)
        if not count:
            raise LayerError(
                f"A network with spatial layers is expected for a stage index, got layers={index} for {self.model}, "
                'whose layers put out vectors. Name a module; see featx.list_layers(backbone, kind="modules").'
            )
        if not -count <= index < count:
            raise LayerError(
                f"A stage index from {-count} to {count - 1} is expected for {self.model}, got layers={index}. "
                f"Its stages are {self.stages}."
            )
        return self.stages[index]

    def _named(self, spec: str) -> Layer:
        match = re.fullmatch(r"(.*?)(?:#(\d+))?", spec, flags=re.DOTALL)
        assert match is not None  # every string matches
        name, call = match[1], int(match[2] or 1)
        if name and (name, call) in self._positions:
            return self.layer(name, call, label=spec)
        raise LayerError(self._unknown(spec, name))

    def _unknown(self, spec: str, name: str) -> str:
        times = sum(name in call.names for call in self.calls)
        if name and times:
            return f"A call of {name!r} from 1 to {times} is expected, got layers={spec!r}."
        if name in dict(self.module.named_modules()):
            return (
                f"A layer that runs when the network sees an image is expected, got layers={spec!r}, which is never "
                "called or puts out no tensor. Read the module around it or a part of it instead."
            )
        near = get_close_matches(spec, ["penultimate", "all", *self.names], n=3, cutoff=0.5)
        hint = f"Did you mean {' or '.join(map(repr, near))}?" if near else "See featx.list_layers()."
        return f"The name of a layer of {self.model} is expected, got layers={spec!r}. {hint}"

    def _layout(self, name: str, call: Call) -> str:
        if self.family is None or len(call.shape) != 4:
            return call.layout
        listed = name in self._trunk or any(fnmatchcase(name, pattern) for pattern in self.family.layouts)
        return self.family.layout_of(name) if listed else call.layout

    def _place(
        self, label: str, call: Call, name: str, side: str, shape: tuple[int, ...], layout: str, position: int
    ) -> Layer:
        if shape[:1] != (2,):
            raise LayerError(
                f"A layer with one row per image is expected, got layers={label!r}, whose output has shape {shape} for "
                "2 images. Read the module around it instead."
            )
        tokens = self._tokens.places(name, shape[1], position) if layout == "tokens" else Places(0)
        return Layer(
            label, name, call.index, side, shape, layout, tokens.n_prefix, position, tokens.grid, tokens.has_class
        )

    @cached_property
    def _tokens(self) -> Tokens:
        told = None if self.family is None else Told(self.family.n_prefix_tokens, self.family.n_prefix_tokens > 0)
        return Tokens(self.module, self.calls, self.shape, told)


def _flatten(root: nn.Module, names: Iterable[str]) -> list[str]:
    """Names of the blocks: exact Sequentials and ModuleLists give way to their children."""
    blocks = []
    for name in names:
        module = root.get_submodule(name)
        if type(module) in (nn.Sequential, nn.ModuleList):
            blocks += _flatten(root, [f"{name}.{child}".lstrip(".") for child, _ in module.named_children()])
        else:
            blocks.append(name)
    return blocks


def _generic_blocks(root: nn.Module, architecture: Architecture) -> list[str]:
    """Blocks of a module that the table does not know: what puts out a map or tokens before the output layer."""
    prefix = ""
    while True:
        children = [f"{prefix}.{name}".lstrip(".") for name, _ in root.get_submodule(prefix).named_children()]
        blocks = [name for name in _flatten(root, children) if _is_block(name, architecture)]
        # A wrapper around one network, or a network around one trunk: what counts lies inside.
        inner = blocks or [child for child in children if _holds_blocks(child, architecture)]
        if len(inner) != 1 or not any(True for _ in root.get_submodule(inner[0]).children()):
            return sorted(blocks, key=lambda name: architecture.layer(name).position)
        prefix = inner[0]


def _repeated_blocks(architecture: Architecture, end: str) -> list[str]:
    """Composite siblings of one class, numbered, each called once, that put out what the trunk's end does: the most.

    What lies within one of several such siblings is a part of a block, whether or not the block itself can be read.
    """
    last, modules = architecture.layer(end), dict(architecture.module.named_modules())
    numbers = Counter(_kin(name, module) for name, module in modules.items())
    repeated = {name for name, module in modules.items() if name[-1:].isdigit() and numbers[_kin(name, module)] > 1}
    times = Counter(name for call in architecture.calls for name in call.names)
    groups: dict[tuple[str, str, type], list[str]] = {}
    for name, call in architecture._first_calls.items():
        is_block = repeated.intersection(scopes_of(name)) == {name} and any(True for _ in call.module.children())
        if not is_block or times[name] > 1 or len(call.names) > 1 or call.shape[:1] != (2,):
            continue
        layer = architecture.layer(name)
        if layer.position <= last.position and (layer.spatial, layer.channels) == (last.spatial, last.channels):
            groups.setdefault(_kin(name, modules[name]), []).append(name)
    found = max(reversed(groups.values()), key=len, default=[])
    return found if len(found) > 1 else []


def _kin(name: str, module: nn.Module) -> tuple[str, str, type]:
    """What siblings of one class share that differ by a number in their names."""
    around, _, own = name.rpartition(".")
    return around, re.sub(r"\d+", "#", own), type(module)


def _holds_blocks(around: str, architecture: Architecture) -> bool:
    """Whether something inside of a module would be a block."""
    return any(_is_block(name, architecture) for name in architecture._first_calls if name.startswith(f"{around}."))


def _is_block(name: str, architecture: Architecture) -> bool:
    if (name, 1) not in architecture._positions or name not in architecture.names:
        return False
    if isinstance(architecture.module.get_submodule(name), _GLOBAL_POOLS):
        return False
    layer = architecture.layer(name)
    before = architecture.penultimate
    in_head = before.side == "input" and layer.position > before.position
    return not in_head and layer.layout in ("NCHW", "NHWC", "tokens") and layer.spatial != (1, 1)


def _generic_output(calls: Sequence[Call]) -> int | None:
    """Position of the call that makes the network's scores, where a layer with weights does."""
    weighted = [position for position, call in enumerate(calls) if _has_weights(call.module)]
    scores = next((call.shape for call in calls if call.is_result), calls[-1].shape)
    if not weighted or len(scores) != 2:
        return None
    for position in weighted:
        if calls[position].is_result:
            return position
    # A composite head (a LoRA sum, say) is as good as a layer, if vectors go in.
    last = calls[weighted[-1]]
    around = [name.rpartition(".")[0] for name in last.names]
    for position in range(weighted[-1], len(calls)):
        call = calls[position]
        if (
            call.is_result
            and len(call.input_shape) == 2
            and any(f"{inner}.".startswith(f"{call.name}.") for inner in around)
        ):
            return position
    # A 1 x 1 convolution makes scores where nothing but pooling follows; with a norm behind it, it ends a block.
    followed = any(True for call in calls[weighted[-1] + 1 :] for _ in call.module.parameters(recurse=False))
    pointwise = isinstance(last.module, nn.Conv2d) and last.module.kernel_size == (1, 1) and last.shape[1] == scores[1]
    return weighted[-1] if last.shape == scores or (pointwise and not followed) else None


def _has_weights(module: nn.Module) -> bool:
    """Whether a module multiplies by weights of its own, parametrised and quantised ones included."""
    linear = (nn.Linear, nn.modules.conv._ConvNd)
    return isinstance(module, linear) or (hasattr(module, "weight") and "quantized" in type(module).__module__)

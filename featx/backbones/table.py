"""The table of networks: what each family's blocks, stages, output layer and layouts are called.

It is data: neither torch nor torchvision is imported, so that names can be listed and checked at no cost.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Literal

from featx.exceptions import BackboneError

Layout = Literal["NCHW", "NHWC", "tokens"]
Stages = tuple[tuple[str, int], ...]
EMBEDDED = "featx_micro"  # the network that travels inside the package


@dataclass(frozen=True, kw_only=True, eq=False)
class Family:
    """Row of the table: networks whose modules have the same names.

    A stage is the output of the last trunk block at one reduction, at the weights' own input size, and is named by
    the outermost module that returns it; where a network has one reduction, stages are `by_depth`. The trunk's final
    normalisation is its last block; the normalisation that a downsampler begins with belongs to no stage.

    Parameters
    ----------
    name : str
        Name of the family.
    trunk : tuple of str
        Modules that make up the feature sequence, in order. Exact ``nn.Sequential`` and ``nn.ModuleList`` stand for
        their children, recursively: what remains are the trunk blocks.
    output : str
        The output layer. Its input is the penultimate layer.
    stages : tuple of (str, int) or mapping of model to such a tuple
        Module and reduction (input side over output side, in pixels) of every stage, shallow to deep.
    channels : mapping of str to tuple of int
        Channels of every stage. The keys are the family's models.
    head : tuple of str
        Top-level modules of the head, those of auxiliary classifiers included: what a weights file may lack.
        Layers of the head in front of `output` shape the penultimate layer: without their weights it is random.
    min_size : int
        Smallest image side that the network takes when it is built without weights, in pixels.
    layout : {"NCHW", "NHWC", "tokens"}, default="NCHW"
        Layout of the trunk blocks' outputs; tokens are (n, tokens, channels).
    layouts : mapping of str to layout
        Exceptions by name pattern, as `fnmatch` reads them; the first that matches counts. "NHWC" here says no more
        than that channels come last.
    downsampler_norms : tuple of str
        Normalisations that are direct children of the feature sequence and yet belong to the downsampler after them.
    n_prefix_tokens : int, default=0
        Tokens in front of those that stand for patches.
    poolings : tuple of str, default=("avg",)
        What rows of its tokens are usually made by.
    fixed_size : bool, default=False
        Whether the network takes its weights' image side and no other.
    size_option : str, default=""
        The builder's argument for the image side, where the network is built for one; empty where it is not asked.
    build_options : mapping of str to object
        Keyword arguments for the builder when it is called without weights: no warning, no slow or degenerate
        initialisation, no auxiliary classifiers. With weights the builder refuses some of them.
    pretrained_attributes : mapping of str to object
        Attributes that the builder sets with ImageNet weights, and that weights from a file need just as much.
    renames : mapping of str to str
        Regular expressions of parts of parameter names in published weights files that the modules no longer have,
        and what stands for them now.
    """

    name: str
    trunk: tuple[str, ...]
    output: str
    stages: Stages | Mapping[str, Stages]
    channels: Mapping[str, tuple[int, ...]]
    head: tuple[str, ...]
    min_size: int
    layout: Layout = "NCHW"
    layouts: Mapping[str, Layout] = field(default_factory=dict)
    downsampler_norms: tuple[str, ...] = ()
    n_prefix_tokens: int = 0
    poolings: tuple[str, ...] = ("avg",)
    fixed_size: bool = False
    size_option: str = ""
    build_options: Mapping[str, object] = field(default_factory=dict)
    pretrained_attributes: Mapping[str, object] = field(default_factory=dict)
    renames: Mapping[str, str] = field(default_factory=dict)

    def layout_of(self, name: str) -> Layout:
        """Layout of a module's output, for outputs of three or four dimensions."""
        exceptions = (layout for pattern, layout in self.layouts.items() if fnmatchcase(name, pattern))
        return next(exceptions, self.layout)

    def renamed(self, key: str) -> str:
        """Today's name of a parameter in a weights file."""
        for pattern, replacement in self.renames.items():
            key = re.sub(pattern, replacement, key)
        return key


def by_depth(blocks: Sequence[str], last: str) -> list[str]:
    """Stages of a network with one resolution: of its n repeated blocks ceil(k n / 4), k = 1..4, each once.

    ``last`` is the end of the trunk, which stands for the last block and what follows it.
    """
    depths = dict.fromkeys(-(-k * len(blocks) // 4) for k in (1, 2, 3, 4))
    return [*(blocks[depth - 1] for depth in depths if 0 < depth < len(blocks)), last]


def _doubling(first: int, *names: str) -> Stages:
    return tuple((name, first << depth) for depth, name in enumerate(names))


def _of_encoder(n_blocks: int, reduction: int) -> Stages:
    blocks = [f"encoder.layers.encoder_layer_{i}" for i in range(n_blocks)]
    return tuple((name, reduction) for name in by_depth(blocks, "encoder"))


def _features(first: int, *ends: int) -> Stages:
    return _doubling(first, *(f"features.{end}" for end in ends), "features")


FAMILIES: tuple[Family, ...] = (
    Family(
        name=EMBEDDED,
        trunk=("features",),
        output="head",
        stages=_features(1, 0, 2, 4),
        channels={EMBEDDED: (24, 64, 160, 224)},
        head=("head",),
        min_size=8,
    ),
    Family(
        name="alexnet",
        trunk=("features",),
        output="classifier.6",
        stages=_features(4, 1, 4, 11),
        channels={"alexnet": (64, 192, 256, 256)},
        head=("classifier",),
        min_size=63,
    ),
    Family(
        name="convnext",
        trunk=("features",),
        output="classifier.2",
        stages=_features(4, 1, 3, 5),
        channels={
            **dict.fromkeys(("convnext_tiny", "convnext_small"), (96, 192, 384, 768)),
            "convnext_base": (128, 256, 512, 1024),
            "convnext_large": (192, 384, 768, 1536),
        },
        head=("classifier",),
        min_size=32,
        layouts={"features.*.block.[1-5]": "NHWC"},
        downsampler_norms=("features.2.0", "features.4.0", "features.6.0"),
    ),
    Family(
        name="densenet",
        trunk=("features",),
        output="classifier",
        stages=_doubling(2, "features.relu0", *(f"features.denseblock{i}" for i in (1, 2, 3)), "features"),
        channels={
            "densenet121": (64, 256, 512, 1024, 1024),
            "densenet161": (96, 384, 768, 2112, 2208),
            "densenet169": (64, 256, 512, 1280, 1664),
            "densenet201": (64, 256, 512, 1792, 1920),
        },
        head=("classifier",),
        min_size=29,
        renames={r"(denselayer\d+\.(?:norm|conv))\.([12]\.)": r"\1\2"},
    ),
    Family(
        name="efficientnet",
        trunk=("features",),
        output="classifier.1",
        stages=_features(2, 1, 2, 3, 5),
        channels={
            **dict.fromkeys(("efficientnet_b0", "efficientnet_b1"), (16, 24, 40, 112, 1280)),
            "efficientnet_b2": (16, 24, 48, 120, 1408),
            "efficientnet_b3": (24, 32, 48, 136, 1536),
            "efficientnet_b4": (24, 32, 56, 160, 1792),
            "efficientnet_b5": (24, 40, 64, 176, 2048),
            "efficientnet_b6": (32, 40, 72, 200, 2304),
            "efficientnet_b7": (32, 48, 80, 224, 2560),
            "efficientnet_v2_s": (24, 48, 64, 160, 1280),
            "efficientnet_v2_m": (24, 48, 80, 176, 1280),
            "efficientnet_v2_l": (32, 64, 96, 224, 1280),
        },
        head=("classifier",),
        min_size=1,
    ),
    Family(
        name="googlenet",
        trunk=(
            *("conv1", "maxpool1", "conv2", "conv3", "maxpool2", "inception3a", "inception3b", "maxpool3"),
            *("inception4a", "inception4b", "inception4c", "inception4d", "inception4e", "maxpool4"),
            *("inception5a", "inception5b"),
        ),
        output="fc",
        stages=_doubling(2, "conv1", "conv3", "inception3b", "inception4e", "inception5b"),
        channels={"googlenet": (64, 192, 480, 832, 1024)},
        head=("fc", "aux1", "aux2"),
        min_size=15,
        build_options={"aux_logits": False, "init_weights": False},
        pretrained_attributes={"transform_input": True},
    ),
    Family(
        name="inception",
        trunk=(
            *("Conv2d_1a_3x3", "Conv2d_2a_3x3", "Conv2d_2b_3x3", "maxpool1"),
            *("Conv2d_3b_1x1", "Conv2d_4a_3x3", "maxpool2"),
            *("Mixed_5b", "Mixed_5c", "Mixed_5d"),
            *("Mixed_6a", "Mixed_6b", "Mixed_6c", "Mixed_6d", "Mixed_6e"),
            *("Mixed_7a", "Mixed_7b", "Mixed_7c"),
        ),
        output="fc",
        stages=_doubling(2, "Conv2d_2b_3x3", "Conv2d_4a_3x3", "Mixed_5d", "Mixed_6e", "Mixed_7c"),
        channels={"inception_v3": (64, 192, 288, 768, 2048)},
        head=("fc", "AuxLogits"),
        min_size=75,
        build_options={"aux_logits": False, "init_weights": False},
        pretrained_attributes={"transform_input": True},
    ),
    Family(
        name="maxvit",
        trunk=("stem", "blocks"),
        output="classifier.5",
        stages=_doubling(2, "stem", "blocks.0", "blocks.1", "blocks.2", "blocks.3"),
        channels={"maxvit_t": (64, 64, 128, 256, 512)},
        head=("classifier",),
        min_size=221,
        layouts={"*.departition_op": "NCHW", "*_attention.*": "NHWC"},
        fixed_size=True,
    ),
    Family(
        name="mnasnet",
        trunk=("layers",),
        output="classifier.1",
        stages=_doubling(2, "layers.7", "layers.8", "layers.9", "layers.11", "layers"),
        channels={
            "mnasnet0_5": (8, 16, 24, 48, 1280),
            "mnasnet0_75": (16, 24, 32, 72, 1280),
            "mnasnet1_0": (16, 24, 40, 96, 1280),
            "mnasnet1_3": (24, 32, 56, 128, 1280),
        },
        head=("classifier",),
        min_size=1,
    ),
    Family(
        name="mobilenet_v2",
        trunk=("features",),
        output="classifier.1",
        stages=_features(2, 1, 3, 6, 13),
        channels={"mobilenet_v2": (16, 24, 32, 96, 1280)},
        head=("classifier",),
        min_size=1,
    ),
    Family(
        name="mobilenet_v3",
        trunk=("features",),
        output="classifier.3",
        stages={"mobilenet_v3_large": _features(2, 1, 3, 6, 12), "mobilenet_v3_small": _features(2, 0, 1, 3, 8)},
        channels={"mobilenet_v3_large": (16, 24, 40, 112, 960), "mobilenet_v3_small": (16, 16, 24, 48, 576)},
        head=("classifier",),
        min_size=1,
    ),
    Family(
        name="regnet",
        trunk=("stem", "trunk_output"),
        output="fc",
        stages=_doubling(2, "stem", *(f"trunk_output.block{i}" for i in (1, 2, 3)), "trunk_output"),
        channels={
            "regnet_x_400mf": (32, 32, 64, 160, 400),
            "regnet_x_800mf": (32, 64, 128, 288, 672),
            "regnet_x_1_6gf": (32, 72, 168, 408, 912),
            "regnet_x_3_2gf": (32, 96, 192, 432, 1008),
            "regnet_x_8gf": (32, 80, 240, 720, 1920),
            "regnet_x_16gf": (32, 256, 512, 896, 2048),
            "regnet_x_32gf": (32, 336, 672, 1344, 2520),
            "regnet_y_400mf": (32, 48, 104, 208, 440),
            "regnet_y_800mf": (32, 64, 144, 320, 784),
            "regnet_y_1_6gf": (32, 48, 120, 336, 888),
            "regnet_y_3_2gf": (32, 72, 216, 576, 1512),
            "regnet_y_8gf": (32, 224, 448, 896, 2016),
            "regnet_y_16gf": (32, 224, 448, 1232, 3024),
            "regnet_y_32gf": (32, 232, 696, 1392, 3712),
            "regnet_y_128gf": (32, 528, 1056, 2904, 7392),
        },
        head=("fc",),
        min_size=1,
    ),
    Family(
        name="resnet",
        trunk=("conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3", "layer4"),
        output="fc",
        stages=_doubling(2, "relu", "layer1", "layer2", "layer3", "layer4"),
        channels={
            **dict.fromkeys(("resnet18", "resnet34"), (64, 64, 128, 256, 512)),
            **dict.fromkeys(("resnet50", "resnet101", "resnet152"), (64, 256, 512, 1024, 2048)),
            **dict.fromkeys(("resnext50_32x4d", "resnext101_32x8d", "resnext101_64x4d"), (64, 256, 512, 1024, 2048)),
            **dict.fromkeys(("wide_resnet50_2", "wide_resnet101_2"), (64, 256, 512, 1024, 2048)),
        },
        head=("fc",),
        min_size=1,
    ),
    Family(
        name="shufflenet_v2",
        trunk=("conv1", "maxpool", "stage2", "stage3", "stage4", "conv5"),
        output="fc",
        stages=_doubling(2, "conv1", "maxpool", "stage2", "stage3", "conv5"),
        channels={
            "shufflenet_v2_x0_5": (24, 24, 48, 96, 1024),
            "shufflenet_v2_x1_0": (24, 24, 116, 232, 1024),
            "shufflenet_v2_x1_5": (24, 24, 176, 352, 1024),
            "shufflenet_v2_x2_0": (24, 24, 244, 488, 2048),
        },
        head=("fc",),
        min_size=1,
    ),
    Family(
        name="squeezenet1_0",
        trunk=("features",),
        output="classifier.1",
        stages=_features(2, 1, 5, 10),
        channels={"squeezenet1_0": (96, 256, 512, 512)},
        head=("classifier",),
        min_size=21,
    ),
    Family(
        name="squeezenet1_1",
        trunk=("features",),
        output="classifier.1",
        stages=_features(2, 1, 4, 7),
        channels={"squeezenet1_1": (64, 128, 256, 512)},
        head=("classifier",),
        min_size=17,
    ),
    Family(
        name="swin",
        trunk=("features", "norm"),
        output="head",
        stages=_doubling(4, "features.1", "features.3", "features.5", "norm"),
        channels={
            **dict.fromkeys(("swin_t", "swin_s", "swin_v2_t", "swin_v2_s"), (96, 192, 384, 768)),
            **dict.fromkeys(("swin_b", "swin_v2_b"), (128, 256, 512, 1024)),
        },
        head=("head",),
        min_size=4,
        layout="NHWC",
        layouts={"features.0.0": "NCHW", "permute": "NCHW", "avgpool": "NCHW"},
    ),
    Family(
        name="vgg",
        trunk=("features",),
        output="classifier.6",
        stages={
            "vgg11": _features(1, 1, 4, 9, 14, 19),
            "vgg11_bn": _features(1, 2, 6, 13, 20, 27),
            "vgg13": _features(1, 3, 8, 13, 18, 23),
            "vgg13_bn": _features(1, 5, 12, 19, 26, 33),
            "vgg16": _features(1, 3, 8, 15, 22, 29),
            "vgg16_bn": _features(1, 5, 12, 22, 32, 42),
            "vgg19": _features(1, 3, 8, 17, 26, 35),
            "vgg19_bn": _features(1, 5, 12, 25, 38, 51),
        },
        channels={f"vgg{n}{bn}": (64, 128, 256, 512, 512, 512) for n in (11, 13, 16, 19) for bn in ("", "_bn")},
        head=("classifier",),
        min_size=32,
    ),
    Family(
        name="vit",
        trunk=("encoder.layers", "encoder.ln"),
        output="heads.head",
        stages={
            "vit_b_16": _of_encoder(12, 16),
            "vit_b_32": _of_encoder(12, 32),
            "vit_l_16": _of_encoder(24, 16),
            "vit_l_32": _of_encoder(24, 32),
            "vit_h_14": _of_encoder(32, 14),
        },
        channels={
            **dict.fromkeys(("vit_b_16", "vit_b_32"), (768,) * 4),
            **dict.fromkeys(("vit_l_16", "vit_l_32"), (1024,) * 4),
            "vit_h_14": (1280,) * 4,
        },
        head=("heads",),
        min_size=224,
        layout="tokens",
        layouts={"conv_proj": "NCHW"},
        n_prefix_tokens=1,
        poolings=("cls",),
        fixed_size=True,
        size_option="image_size",
        renames={r"\.mlp\.linear_1\.": ".mlp.0.", r"\.mlp\.linear_2\.": ".mlp.3."},
    ),
)

_BY_MODEL = {model: family for family in FAMILIES for model in family.channels}


def family_of(model: str) -> Family:
    """Row of the table for a network's name.

    Raises
    ------
    BackboneError
        The table does not know the name; the message gives the nearest names.
    """
    if model not in _BY_MODEL:
        near = difflib.get_close_matches(model, _BY_MODEL)
        hint = f"Did you mean {' or '.join(map(repr, near))}?" if near else "See featx.list_backbones()."
        raise BackboneError(f"The name of a network in the catalogue is expected, got backbone={model!r}. {hint}")
    return _BY_MODEL[model]


def stages_of(model: str) -> tuple[tuple[str, int, int], ...]:
    """Qualified name, reduction and channels of every stage of a network, shallow to deep."""
    family = family_of(model)
    stages = family.stages[model] if isinstance(family.stages, Mapping) else family.stages
    return tuple(
        (name, reduction, width) for (name, reduction), width in zip(stages, family.channels[model], strict=True)
    )

"""What can be passed as ``layers``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from featx.system.threads import one_thread_after_fork

if TYPE_CHECKING:
    from featx.backbones.layers import Architecture

KINDS = ("stages", "blocks", "modules")


def list_layers(backbone: object = "resnet18", *, kind: str = "stages", image_size: int | None = None) -> list[str]:
    """Names that ``layers`` takes for a backbone, in the order in which the network reaches them; fetches no weights.

    Parameters
    ----------
    backbone : str, callable or nn.Module, default="resnet18"
        As in PretrainedFeatureExtractor.
    kind : {"stages", "blocks", "modules"}, default="stages"
        ``"stages"``: what a stage index counts, the output of the last trunk block at each reduction, or of four blocks
        by depth (at each quarter) where a network has one reduction, as vision transformers do; ``"blocks"``:
        every block of the trunk; ``"modules"``: everything that runs, ``"NAME#2"`` being the second call of a module.

    image_size : int or None, default=None
        Side of the images in pixels, for a module that does not take the usual 224.

    Returns
    -------
    names : list of str

    Examples
    --------
    >>> from featx import list_layers
    >>> list_layers("resnet18")
    ['relu', 'layer1', 'layer2', 'layer3', 'layer4']
    """
    if kind not in KINDS:
        raise ValueError(f'kind is expected to be "stages", "blocks" or "modules", got kind={kind!r}.')
    return names_of(architecture_of(backbone, image_size), kind)


def names_of(architecture: Architecture, kind: str) -> list[str]:
    """Names of one kind, as :func:`list_layers` gives them."""
    return list({"stages": architecture.stages, "blocks": architecture.blocks, "modules": architecture.names}[kind])


@one_thread_after_fork()
def architecture_of(backbone: object, image_size: int | None = None) -> Architecture:
    """What can be read from a backbone; fetches no weights."""
    from featx.backbones.catalogue import resolve_backbone
    from featx.backbones.networks import network_spec

    entry = resolve_backbone(backbone).entry
    spec = network_spec(backbone, None if entry and not entry.published else "DEFAULT", 0, image_size)
    return spec.architecture(None if image_size is None else spec.square(image_size))

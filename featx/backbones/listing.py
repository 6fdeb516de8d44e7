"""What can be passed as ``layers``."""

from __future__ import annotations


def list_layers(backbone: object = "resnet18", *, kind: str = "stages", image_size: int | None = None) -> list[str]:
    """Names that ``layers`` takes for a backbone, in the order in which the network reaches them; fetches no weights.

    Parameters
    ----------
    backbone : str, callable or nn.Module, default="resnet18"
        As in PretrainedFeatureExtractor.
    kind : {"stages", "blocks", "modules"}, default="stages"
        ``"stages"``: the output of the last trunk block at each reduction, what a stage index counts; ``"blocks"``:
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
    from featx.backbones.catalogue import resolve_backbone
    from featx.backbones.networks import network_spec

    if kind not in ("stages", "blocks", "modules"):
        raise ValueError(f'kind is expected to be "stages", "blocks" or "modules", got kind={kind!r}.')
    entry = resolve_backbone(backbone).entry
    spec = network_spec(backbone, None if entry and not entry.published else "DEFAULT", seed=0)
    architecture = spec.architecture(None if image_size is None else spec.square(image_size))
    return list({"stages": architecture.stages, "blocks": architecture.blocks, "modules": architecture.names}[kind])

"""What only some releases of libraries have: features to skip without, and warnings that say nothing of featx."""

from __future__ import annotations

from importlib.metadata import version
from typing import NamedTuple

import pytest
import torch
from packaging.version import Version

from featx import FineTuneClassifier
from featx.system import compat

needs_callbacks = pytest.mark.skipif(
    not hasattr(FineTuneClassifier, "set_callbacks"), reason="scikit-learn < 1.9 has no callbacks"
)
keeps_index = pytest.mark.skipif(
    Version(version("scikit-learn")) < Version("1.7"), reason="scikit-learn < 1.7 takes no index from a Series"
)
exports_graphs = pytest.mark.skipif(not compat.exports_graphs(), reason="torch < 2.9 exports no networks")


def needs_network(name: str) -> pytest.MarkDecorator:
    """A test of a network that older releases of timm do not have."""
    import timm

    return pytest.mark.skipif(not timm.is_model(name), reason=f"timm {timm.__version__} has no {name}")


def needs_stages(name: str) -> pytest.MarkDecorator:
    """A test of a network of which older releases of timm tell no stages, or the same reduction for all."""
    import timm

    told = getattr(timm.create_model(name), "feature_info", ())
    lacks = len({stage["reduction"] for stage in told}) < 2
    return pytest.mark.skipif(lacks, reason=f"timm {timm.__version__} does not tell the stages of {name}")


def sizes_are_checked() -> bool:
    """Whether torch tells that a convolution does not fit an image where neither has values."""
    try:
        torch.nn.functional.conv2d(torch.empty(1, 1, 2, 2, device="meta"), torch.empty(1, 1, 3, 3, device="meta"))
    except RuntimeError:
        return True
    return False


class Known(NamedTuple):
    """A warning that a library gives before some release of its own or of another one.

    Attributes
    ----------
    library, before : str
        It is ignored where this library is older than that.
    warning : str
        As Python's option ``-W`` takes it: action, beginning of the message, category.
    reason : str
    """

    library: str
    before: str
    warning: str
    reason: str


KNOWN = [
    Known(
        "torch",
        "2.15",
        "ignore:`torch.jit.script` is deprecated:DeprecationWarning",
        "some releases warn of what a test passes as a user may",
    ),
    Known(
        "torch",
        "2.9",
        "ignore:Implicitly cleaning up:ResourceWarning",
        "torch.distributed makes a folder when it is imported and leaves it to the interpreter",
    ),
    Known(
        "pillow",
        "12.0",
        "ignore:'mode' parameter is deprecated:DeprecationWarning",
        "torchvision passes it to Pillow, whose next release took the warning back",
    ),
]


def warnings_to_ignore() -> list[str]:
    """What is ignored with the releases that are installed."""
    return [known.warning for known in KNOWN if Version(version(known.library)) < Version(known.before)]

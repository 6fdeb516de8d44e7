"""What only some releases of libraries have: features to skip without, and warnings that say nothing of featx."""

from __future__ import annotations

from importlib.metadata import version
from typing import NamedTuple

import pytest
from packaging.version import Version

from featx import FineTuneClassifier

needs_callbacks = pytest.mark.skipif(
    not hasattr(FineTuneClassifier, "set_callbacks"), reason="scikit-learn < 1.9 has no callbacks"
)


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

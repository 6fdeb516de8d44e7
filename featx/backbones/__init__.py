"""From a name or a module to a network, and to the places where it can be read.

In come a user's ``backbone``, ``weights`` and ``layers``; out come a network in eval mode (one copy a process,
unless the user passes a module) and Layers: places in it, with shape, layout and what their tokens mean. No picture
is needed for that, and for names no torch either (``table.py`` and ``addresses.py`` are data and texts).

Open ``networks.py`` first (NetworkSpec: everything but the tensors; Network: with them), then ``layers.py``
(stages, blocks, the penultimate layer) on ``tracing.py``, which runs a network without weights or pixels. How a
name becomes a network: ``catalogue.py``, ``entries.py``, ``table.py`` (a row a family), ``timm_models.py``. How a
file becomes tensors: ``weights.py``, ``checkpoints.py`` (its bytes), ``readings.py`` (which of its tensors fit).
``fingerprint.py`` says what a network is; ``folding.py`` makes it faster and no other; ``presets.py`` and
``tokens.py`` ask foreign networks.

Laws of CONTRIBUTING.md that live here: of 2 that a module that a user passes is left as it was (it is copied), of 3
that clones find a network loaded that has a name, of 5 that building draws beside torch's generators, and of 7 the
content of weights.
"""

from featx.backbones.catalogue import list_backbones
from featx.backbones.listing import list_layers

__all__ = ["list_backbones", "list_layers"]

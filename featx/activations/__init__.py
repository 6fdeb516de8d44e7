"""From batches of images to feature rows: taps, pooling and the loop around them.

In come items, a network and layers of it; out come rows, in the order of X, from the store or from one pass of the
network over what the store does not know. This is the room that joins images, store and network.

Open ``extraction.py`` first: one call, from items to blocks of rows. Then ``kept.py`` (look up, share out, keep)
and ``engine.py`` (the loop over batches). ``passes.py`` says which engine takes a call's batches through the network:
torch in ``torch_pass.py``, which asks ``plan.py`` what to read, ``taps.py`` to read it and ``pooling.py`` to make it a
row before the network writes over it, or onnxruntime in ``exported/``.
``joining.py`` puts layers side by side, ``finite.py`` finds out what made NaN, ``trying.py`` whether a layer can be
read at all. ``keys.py`` puts everything that can change a feature into words; ``remembered.py`` answers before torch
is loaded.

Laws of CONTRIBUTING.md that live here: 1 (a layer's features depend on image and network alone: read ``taps.py``
and the comments of ``engine.py``), 2 (eval mode, inference mode, hooks gone afterwards), and of 7 the key
(``keys.py``) and that rows go under the digest of the very bytes that were decoded (``kept.py``).
"""

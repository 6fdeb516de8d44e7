"""The network exported once and run by onnxruntime: the other way through it, for a CPU and float32.

In come a network, slots to read and tiles; out come the same parts that torch makes, to 1e-5 of their norm. Nothing
here is needed where torch computes, and nothing of it is loaded there.

Open ``onnx_pass.py`` first: one pass over tiles. ``exporting.py`` makes a graph of a network, with normalisation before
and pooling behind; ``graph.py`` is what is kept of it, with inputs and what torch made of them; ``finding.py`` looks
for one in the process and in the store before it exports; ``sessions.py`` runs it, in whatever process; ``worth.py``
says from what number of images on an export pays.

Laws of CONTRIBUTING.md that live here: 1 (a graph is compared with torch before it is used: ``graph.py``), 6 (a graph
is kept whole or not at all) and 7 (thread counts are left alone: ``sessions.py``).
"""

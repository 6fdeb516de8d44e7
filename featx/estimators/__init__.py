"""One file an estimator: parameters, validation and scikit-learn's protocol around what the rooms below compute.

In come a user's parameters and X, in scikit-learn's terms; out come arrays and fitted attributes. Nothing is
computed here: an estimator checks, turns its parameters into objects of the rooms below, and hands over.

Open ``base.py`` first, which all share (images in, a network, a store), then ``extractor.py`` (a stateless
transformer), then ``fitted.py`` (what a tuned network does), on it ``tuning.py`` (how it becomes one), and on that
``classifier.py`` and ``regressor.py`` (labels, and numbers). ``transfer.py`` chooses between these and linear
models on features, by ``recipes.py`` and ``tuned_recipes.py`` (what a search does with each; ``named_recipes.py``
knows their names). ``epochs.py`` tells callbacks and the progress bar; ``notebook.py`` shows the stages of the
network in a diagram.

Laws of CONTRIBUTING.md that live here: 3 (clones and pickles carry no network unless the backbone is a module), of
5 that public methods run on one thread in forked children (``base.py``), and 6: torch is imported inside of
methods, never at the top of a file of this room.
"""

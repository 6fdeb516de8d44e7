"""The split at the freeze point, the head, the schedule, augmented views and the loop.

In come a network, a freeze point, images and labels; out come the tensors that training has changed, and its
history. The network itself is copied first, so that whoever shares it sees nothing of it.

Open ``fitting.py`` first: one fit, from beginning to end. Then ``split.py`` (where the network is cut, and what
trains behind the cut), ``values.py`` (what comes out at the cut: computed once and held, or anew for every batch),
``model.py`` and ``tuned.py`` (network and head, put together), and ``loop.py`` with ``schedule.py``. What is learnt
is a protocol, ``targets.py``, of two kinds: ``classification.py`` and ``regression.py``, each with its loss and the
linear model that a head starts from (put into it by ``probes.py``). Beside it, ``labels.py`` and ``validation.py``
look at y, ``finite.py`` says why outputs are none, ``gradients.py`` how scores change with a layer's values,
``sharing.py`` is the file format.

Laws of CONTRIBUTING.md that live here: 4 (frozen is frozen, to the byte, statistics of BatchNorm included; the same
with and without computing it ahead), of 5 that draws come from the fit's own generators (``loop.py``), and of 1
that scores do not depend on company.
"""

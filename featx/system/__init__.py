"""What any room may use, and what knows nothing of pictures, networks or features.

In come functions, files, random draws and estimators as such; out comes the same from them in every thread, in
every forked child and on every system.

Open ``forks.py`` first (what is done around a fork), then ``locks.py`` and ``threads.py``, which stand on it. The
others hardly need each other. Of files, ``writing.py`` writes them whole or not at all, ``temporary.py`` knows
where those go that do not last, ``paths.py`` and ``shell.py`` how systems write names and commands. Of estimators,
``pickling.py`` says what travels, ``lazy.py`` and ``output.py`` serve Dask's collections and frames, ``callers.py``
finds the line that a warning names, ``fits.py`` fits those of scikit-learn on one thread each. ``devices.py`` is
the one file that knows kinds of devices, and torch's releases about them; ``randomness.py`` draws beside torch's
global generators; ``compat.py`` knows what releases of other libraries lack, ``packages.py`` what is installed,
``machine.py`` what processor this is.

Laws of CONTRIBUTING.md that live here: 5 (global state, and torch in forked children), and of 3 what pickles hold.
What only some systems have (forks, links, ``/proc``, ``/dev/shm``) is asked for here and in ``featx/store``, and
nowhere else.
"""

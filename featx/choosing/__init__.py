"""Ways to learn the same classes from the same images, judged by the same folds, and the one to take.

In come labels, folds and recipes, each of which learns from some images and tells what it thinks of others. Out come
what each of them had right, and a winner. Nothing here knows of networks: what a recipe does is for it to know.

Open ``search.py`` first: recipes one after another, cheap ones first, and when a dearer one wins. Around it lie
``task.py`` (labels and folds; how much better one recipe is than another, and how sure that is), ``folds.py``,
``predicted.py`` (answers, as scikit-learn's scorers ask for them) and ``budget.py`` (what there is time for).
``probes.py`` fits logistic regressions on features by the folds of a cross-validation; the command line searches
with it too.

Laws of CONTRIBUTING.md that live here: of 5 that nothing is drawn from the global generators (a search draws from
its task's seed).
"""

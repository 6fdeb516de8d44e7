"""Recipes by name, and classifiers that a user adds to them."""

from __future__ import annotations

from typing import Any

from sklearn.base import is_classifier

from featx.choosing.search import MEAN, Recipe
from featx.estimators.classifier import FineTuneClassifier
from featx.estimators.recipes import Discriminant, Images, LayersProbe, Pace, Probe
from featx.estimators.tuned_recipes import recipe_of

_TUNED: dict[str, dict[str, Any]] = {
    "last-stage": {"freeze": -1},
    "last-two": {"freeze": -2},
    "last-two-flip": {"freeze": -2, "augment": "flip"},
}
#: Cheap ones first: the order in which they are tried, and in which a later one has to be better beyond doubt.
RECIPES = ("probe", "layers", "lda", *_TUNED, MEAN)


def check_recipes(given: Any) -> list[tuple[str, Any]]:
    """Names, each with an estimator where it is the user's own, else with None.

    Parameters
    ----------
    given : "auto" or list
        As the parameter ``recipes`` of TransferClassifier.

    Raises
    ------
    ValueError
        A name is not known, or stands there twice, or a pair is none.
    """
    wanted = RECIPES if isinstance(given, str) else given
    pairs = [(recipe, None) if isinstance(recipe, str) else recipe for recipe in wanted]
    names = [pair[0] for pair in pairs if _is_recipe(pair)]
    if len(names) < len(pairs) or len({*names}) < len(names) or not {*names} - {MEAN}:
        raise ValueError(
            f"Some of {list(RECIPES)}, each once and not the mean alone, or pairs of another name and a classifier are "
            f"expected, got recipes={given!r}."
        )
    return [(name, estimator) for name, estimator in pairs]


def recipes_of(wanted: list[tuple[str, Any]], images: Images, tuning: dict[str, Any]) -> list[Recipe]:
    """What a search tries; the mean is its own affair.

    Parameters
    ----------
    wanted : list of (str, classifier or None)
        As `check_recipes` gives them.
    images : Images
    tuning : dict
        Parameters of whatever trains the network.
    """
    regressions = Pace()
    on_features = {"probe": (Probe, regressions), "layers": (LayersProbe, regressions), "lda": (Discriminant, Pace())}
    found: list[Recipe] = []
    for name, estimator in wanted:
        if estimator is not None:
            found.append(recipe_of(name, estimator, images))
        elif name in on_features:
            kind, pace = on_features[name]
            found.append(kind(name, images, pace))
        elif name in _TUNED:
            found.append(recipe_of(name, FineTuneClassifier(**tuning, **_TUNED[name]), images))
    return found


def _is_recipe(pair: Any) -> bool:
    """Whether it is a known name and None, or another name and a classifier."""
    if not isinstance(pair, list | tuple) or len(pair) != 2:
        return False
    name, estimator = pair
    if estimator is None:
        return name in RECIPES
    return isinstance(name, str) and name not in RECIPES and hasattr(estimator, "fit") and is_classifier(estimator)

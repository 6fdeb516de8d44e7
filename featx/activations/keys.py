"""The key of a recipe: everything beside the image that can change its features."""

from __future__ import annotations

import sys
from collections.abc import Callable

import PIL
import torchvision
from PIL import ImageFile

from featx.activations.engine import Recipe
from featx.backbones.fingerprint import NoFingerprint
from featx.backbones.weights import content_of
from featx.images.decoding import POLICY
from featx.images.preprocessing import CustomPreprocessing

#: To be raised whenever the same key would stand for other values.
_SCHEMA = 2


class NoKey(Exception):
    """Nothing tells what the features depend on; the message says what is missing."""


def describe_recipe(
    recipe: Recipe, max_pixels: int, short_side: int | None, digest_of_file: Callable[[str], bytes]
) -> str:
    """The recipe in words that differ wherever features can.

    Parameters
    ----------
    recipe : Recipe
    max_pixels : int
    short_side : int or None
        As of Items.
    digest_of_file : callable (str) -> bytes
        Stands for the content of a weights file.

    Raises
    ------
    NoKey
        The preprocessing is a callable without ``cache_key``, or the network has hooks.
    """
    decoding = (POLICY, max_pixels, PIL.__version__, torchvision.__version__, ImageFile.LOAD_TRUNCATED_IMAGES)
    parts = {
        "network": _network(recipe, digest_of_file),
        "preprocess": _preprocessing(recipe),
        "input": recipe.architecture.shape,
        "precision": recipe.precision,
        "decoding": decoding if short_side is None else (*decoding, short_side),
        "schema": _SCHEMA,
    }
    return "; ".join(f"{name}: {value}" for name, value in parts.items())


def _network(recipe: Recipe, digest_of_file: Callable[[str], bytes]) -> str:
    spec = recipe.spec
    if not spec.backbone.named:
        try:
            content = recipe.network.fingerprint
        except NoFingerprint as error:
            raise NoKey(str(error)) from error
    else:
        content = content_of(spec.backbone, spec.weights, spec.seed, digest_of_file)
    names = ("torch", "torchvision") if spec.backbone.family else ("torch", "torchvision", "timm")
    libraries = [sys.modules[name] for name in names if name in sys.modules]
    versions = " ".join(f"{library.__name__} {library.__version__}" for library in libraries)
    return f"{spec.backbone.label} {content} ({versions})"


def _preprocessing(recipe: Recipe) -> str:
    preprocessing = recipe.preprocessing
    if not isinstance(preprocessing, CustomPreprocessing) or preprocessing.function is None:
        return repr(preprocessing)
    function = preprocessing.function
    key = getattr(function, "cache_key", None)
    if not isinstance(key, str):
        raise NoKey(
            "preprocess is a callable, and nothing tells when it changes. Give it an attribute cache_key, a text that "
            "says what it does and is changed with it"
        )
    named = function if hasattr(function, "__qualname__") else type(function)
    return f"callable {named.__module__}.{named.__qualname__} {key!r}"

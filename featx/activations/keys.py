"""The key of a recipe: everything beside the image that can change its features."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import PIL
import torchvision
from PIL import ImageFile

from featx.activations.engine import Recipe
from featx.backbones.checkpoints import READER
from featx.backbones.fingerprint import NoFingerprint
from featx.backbones.weights import content_of
from featx.exceptions import WeightsError
from featx.images.decoding import POLICY
from featx.images.preprocessing import CustomPreprocessing

#: To be raised whenever the same key would stand for other values.
_SCHEMA = 2


#: Takes a question and what finds the answer; whoever has it from before need not find it again.
Answering = Callable[[str, Callable[[], str]], str]


class NoKey(Exception):
    """Nothing tells what the features depend on; the message says what is missing."""


def describe_recipe(
    recipe: Recipe,
    max_pixels: int,
    short_side: int | None,
    digest_of_file: Callable[[str], bytes],
    answer: Answering = lambda _, find: find(),
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
    answer : callable (str, callable () -> str) -> str
        Remembers what tensors a weights file of some content gives; by default nothing is remembered.

    Raises
    ------
    NoKey
        The preprocessing is a callable without ``cache_key``, or the network has hooks.
    WeightsError
        A weights file cannot be read, or changes while it is.
    """
    decoding = (POLICY, max_pixels, PIL.__version__, torchvision.__version__, ImageFile.LOAD_TRUNCATED_IMAGES)
    parts = {
        "network": _network(recipe, digest_of_file, answer),
        "preprocess": _preprocessing(recipe),
        "input": recipe.architecture.shape,
        "precision": recipe.precision,
        "decoding": decoding if short_side is None else (*decoding, short_side),
        "schema": _SCHEMA,
    }
    return "; ".join(f"{name}: {value}" for name, value in parts.items())


def _network(recipe: Recipe, digest_of_file: Callable[[str], bytes], answer: Answering) -> str:
    spec = recipe.spec
    names = ("torch", "torchvision") if spec.backbone.family else ("torch", "torchvision", "timm")
    # timm counts where it is loaded: a user's module may be built of its parts.
    libraries = [sys.modules[name] for name in names if name in sys.modules]
    versions = " ".join(f"{library.__name__} {library.__version__}" for library in libraries)
    if not spec.backbone.named:
        try:
            content = recipe.network.fingerprint
        except NoFingerprint as error:
            raise NoKey(str(error)) from error
    elif spec.weights.kind == "file":
        content = _tensors_of_file(recipe, versions, digest_of_file, answer)
    else:
        content = content_of(spec.backbone, spec.weights, spec.seed, digest_of_file)
    return f"{spec.backbone.label} {content} ({versions})"


def _tensors_of_file(recipe: Recipe, versions: str, digest_of_file: Callable[[str], bytes], answer: Answering) -> str:
    """What a file puts into the network, whatever stands around it; the file is read where nobody remembers."""
    spec = recipe.spec
    digest = digest_of_file(spec.weights.name)

    def find() -> str:
        content = spec.load(recipe.device, recipe.dtype).content
        # Digests before and after: the tensors are those of the bytes that the question names.
        if digest_of_file(spec.weights.name) != digest:
            raise changed(spec.weights.given)
        return content

    question = f"tensors {READER} {spec.backbone.label} {versions} {spec.weights.place!r} {digest.hex()}"
    return answer(question, find)


def changed(weights: Any) -> WeightsError:
    """That a file of weights changed between two looks at it."""
    return WeightsError(
        f"A file of weights that stays as it is is expected, got weights={weights!r}, which changed "
        "while it was read. Call again."
    )


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

"""The key of a recipe: everything beside the image that can change its features."""

from __future__ import annotations

from functools import lru_cache
from importlib.metadata import version

import xxhash

from featx.activations.engine import Recipe
from featx.backbones import weights as weights_module
from featx.backbones.fingerprint import NoFingerprint
from featx.images.decoding import POLICY
from featx.images.preprocessing import CustomPreprocessing
from featx.store import Session

#: To be raised whenever the same key would stand for other values.
_SCHEMA = 1


class NoKey(Exception):
    """Nothing tells what the features depend on; the message says what is missing."""


def describe_recipe(recipe: Recipe, max_pixels: int, session: Session) -> str:
    """The recipe in words that differ wherever features can.

    Raises
    ------
    NoKey
        The preprocessing is a callable without ``cache_key``, or the network has hooks.
    """
    parts = {
        "network": _network(recipe, session),
        "preprocess": _preprocessing(recipe),
        "input": recipe.architecture.shape,
        "precision": recipe.precision,
        "decoding": (POLICY, max_pixels, _release("pillow"), _release("torchvision")),
        "schema": _SCHEMA,
    }
    return "; ".join(f"{name}: {value}" for name, value in parts.items())


def key_of(description: str) -> bytes:
    """Digest of a description, of length 16."""
    return xxhash.xxh3_128_digest(description.encode())


def _network(recipe: Recipe, session: Session) -> str:
    spec, weights = recipe.spec, recipe.spec.weights
    if not spec.backbone.named:
        try:
            content = spec.load(recipe.device, recipe.dtype).fingerprint
        except NoFingerprint as error:
            raise NoKey(str(error)) from error
    elif weights.kind == "random":
        content = f"random {spec.seed} torch {_release('torch')}"
    elif weights.kind == "file":
        content = session.digest_of_file(weights.name).hex()
    else:
        content = weights_module.published_content(spec.backbone, weights)
    return f"{spec.backbone.label} {content} torchvision {_release('torchvision')}"


def _preprocessing(recipe: Recipe) -> str:
    preprocessing = recipe.preprocessing
    if not isinstance(preprocessing, CustomPreprocessing) or preprocessing.function is None:
        return repr(preprocessing)
    key = getattr(preprocessing.function, "cache_key", None)
    if key is None:
        raise NoKey(
            "preprocess is a callable, and nothing tells when it changes. Give it an attribute cache_key, a text that "
            "says what it does and is changed with it"
        )
    return f"callable {key!r}"


@lru_cache
def _release(distribution: str) -> str:
    return version(distribution)

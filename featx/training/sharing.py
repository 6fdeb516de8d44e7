"""Fitted estimators as one safetensors file with JSON inside: nothing in it can run."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from featx.exceptions import WeightsError
from featx.system.devices import to_host

_KEY = "featx"
_FIRST = "FineTuneClassifier"  # whose files did not say what they were of
_KINDS = "biufU"  # of labels: what JSON can hold


def save_fitted(path: str | os.PathLike[str], tensors: dict[str, torch.Tensor], about: dict[str, Any]) -> None:
    """Write tensors and what JSON can hold to one file, which appears whole or not at all.

    Raises
    ------
    TypeError
        JSON cannot hold something; the message names it.
    """
    path = Path(path)
    for name, value in about["params"].items():
        try:
            json.dumps(value, default=_plain)
        except TypeError as error:
            raise TypeError(
                f"Numbers, texts, lists and None are expected in a file for strangers, got {name}={value!r}. Take "
                "joblib.dump, or a backbone by name."
            ) from error
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        whole = {name: value.contiguous() for name, value in tensors.items()}
        draft.write_bytes(save(whole, {_KEY: json.dumps(about, default=_plain)}))  # save_file hides it from others
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


def _plain(value: Any) -> Any:
    """Numbers of NumPy, which grids hold, as Python's own."""
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"JSON has no {type(value).__name__}")


def load_fitted(path: str | os.PathLike[str], estimator: str) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """What `save_fitted` wrote of one kind of estimator, by its name.

    Raises
    ------
    WeightsError
        The file is none of ours, or another estimator's.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if _KEY not in metadata:
                raise ValueError("it holds tensors alone")
            about = json.loads(metadata[_KEY])
            if (other := about.get("estimator", _FIRST)) != estimator:
                raise ValueError(f"it is of {other}, whose load takes it")
            # JSON has no tuples, which image_shape and pixel_range usually are.
            about["params"] = {
                name: tuple(value) if isinstance(value, list) else value for name, value in about["params"].items()
            }
            # Copies: a tensor that lies in the file changes with it, and keeps some systems from replacing the file.
            return {name: file.get_tensor(name).clone() for name in file.keys()}, about  # noqa: SIM118 no mapping
    except FileNotFoundError:
        raise
    except (SafetensorError, KeyError, ValueError, OSError) as error:
        raise WeightsError(
            f"A file that {estimator}.save wrote is expected, got {os.fspath(path)!r}: {error}. "
            "Pickles are loaded with joblib.load."
        ) from error


def saved_as(path: str | os.PathLike[str]) -> str | None:
    """The estimator that a file of `save_fitted` is of; empty of a file of tensors alone, None of anything else."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            return str(json.loads(metadata[_KEY]).get("estimator", _FIRST)) if _KEY in metadata else ""
    except (SafetensorError, OSError, ValueError):
        return None


def holds_tensors_alone(path: str | os.PathLike[str]) -> bool:
    """Whether a file is one of safetensors that `save_fitted` did not write, such as weights of a network."""
    return saved_as(path) == ""


def as_arrays(tensors: Mapping[str, torch.Tensor]) -> dict[str, np.ndarray | torch.Tensor]:
    """Tensors as NumPy's arrays, which more formats hold than pickles do; those of a kind that NumPy lacks as is."""
    own = {name: to_host(value.detach()) for name, value in tensors.items()}
    return {name: value if value.dtype == torch.bfloat16 else value.numpy() for name, value in own.items()}


def as_tensors(arrays: Mapping[str, np.ndarray | torch.Tensor]) -> dict[str, torch.Tensor]:
    """What `as_arrays` was given, in memory of its own: arrays may come mapped from a file that cannot be written."""
    return {
        name: value if isinstance(value, torch.Tensor) else torch.from_numpy(np.array(value))
        for name, value in arrays.items()
    }


def labels_to_json(labels: np.ndarray) -> dict[str, Any]:
    """Labels with their type.

    Raises
    ------
    TypeError
        They are neither numbers, booleans nor texts.
    """
    if labels.dtype.kind == "O" and all(isinstance(label, str) for label in labels):
        return {"dtype": "object", "labels": labels.tolist()}
    if labels.dtype.kind not in _KINDS:
        raise TypeError(f"Labels that are numbers or texts are expected, got an array of dtype {labels.dtype}.")
    return {"dtype": labels.dtype.str, "labels": labels.tolist()}


def labels_from_json(stored: dict[str, Any]) -> np.ndarray:
    """What `labels_to_json` was given."""
    return np.asarray(stored["labels"], dtype=stored["dtype"])

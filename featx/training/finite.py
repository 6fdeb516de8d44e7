"""What a tuned network puts out, where it is not finite: told with what makes it so."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import closing

import numpy as np
import torch

from featx.activations.finite import Doctor, warn_not_finite
from featx.exceptions import NotFinite
from featx.images.loading import iter_batches
from featx.images.preprocessing import Preprocessing
from featx.images.sources import Items
from featx.training.model import Model


def check_features(rows: np.ndarray, items: Items, preprocessing: Preprocessing, model: Model, precision: str) -> None:
    """Raise where pretrained features are not finite: a head would learn nothing from them.

    Raises
    ------
    NotFinite
    """
    wrong = _wrong_rows(rows)
    if len(wrong):
        raise _pretrained(items, int(wrong[0]), preprocessing, model, precision)


def check_outputs(
    rows: np.ndarray,
    items: Items,
    preprocessing: Preprocessing,
    model: Model,
    tensors: Mapping[str, torch.Tensor],
    *,
    precision: str,
    on_error: str,
) -> None:
    """Raise where a tuned network has put out what is not finite, or make such rows NaN and count them in a warning.

    Parameters
    ----------
    rows : ndarray of shape (n, width), float32
        Changed in place.
    items : Items
        What they are of.
    preprocessing : Preprocessing
    model : Model
    tensors : mapping of str to tensor
        What training has changed.
    precision, on_error : str
        As in FineTuneClassifier.

    Raises
    ------
    NotFinite
    """
    wrong = _wrong_rows(rows)
    if not len(wrong):
        return
    first = int(wrong[0])
    if all(bool(tensor.isfinite().all()) for tensor in tensors.values()):
        error = _pretrained(items, first, preprocessing, model, precision)
    else:
        why = "in the tuned network: what training has changed holds NaN or infinity"
        error = NotFinite.of(items.original_row(first), items[first].source, why, "Lower learning_rate and fit anew.")
    if on_error == "raise":
        raise error
    rows[wrong] = np.nan
    warn_not_finite([error] * len(wrong), len(rows))


def _wrong_rows(rows: np.ndarray) -> np.ndarray:
    return np.flatnonzero(~np.isfinite(rows).all(axis=1))


def _pretrained(items: Items, row: int, preprocessing: Preprocessing, model: Model, precision: str) -> NotFinite:
    doctor = Doctor(model.spec, model.architecture, precision)
    with closing(iter_batches(items, [[row]], preprocessing.tile, n_jobs=1, on_error="nan")) as batches:
        (batch,) = batches
    tile = None if batch.tiles is None else batch.tiles[0]
    slots = model.plan.slots
    steepest = next((slot for slot in slots if slot.pooling == "gem"), slots[0])
    return doctor.error(items, row, tile, steepest, model.pretrained())

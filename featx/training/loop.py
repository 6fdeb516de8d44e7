"""The training loop."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing, nullcontext
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import nn

from featx.activations.engine import DTYPES
from featx.system.devices import autocast, gradient_scaler, in_memory, move, to_host, undisturbed
from featx.system.randomness import Draws
from featx.training.schedule import Schedule
from featx.training.targets import Targets
from featx.training.tuned import TunedNetwork
from featx.training.values import Values


@dataclass(frozen=True)
class Settings:
    """How to train.

    Attributes
    ----------
    epochs, batch_size, lr_schedule, warmup, max_grad_norm, mixup, ema, n_iter_no_change
        As in FineTuneClassifier; `n_iter_no_change` None trains to the end.
    device, precision : str
    seed : int
    """

    epochs: int
    batch_size: int
    lr_schedule: str
    warmup: float
    max_grad_norm: float | None
    mixup: float
    ema: float | None
    n_iter_no_change: int | None
    device: str
    precision: str
    seed: int

    @property
    def dtype(self) -> torch.dtype:
        """PyTorch's word for the precision."""
        return DTYPES[self.precision]


@dataclass
class History:
    """What happened, one entry per epoch.

    Attributes
    ----------
    columns : dict of str to list of float
        ``loss`` and ``learning_rate``, with validation ``validation_loss`` and ``validation_score`` too.
    best_epoch : int
        Counted from 0: the one whose network was kept.
    """

    columns: dict[str, list[float]] = field(default_factory=dict)
    best_epoch: int = 0

    def add(self, **values: float) -> None:
        """One more epoch."""
        for name, value in values.items():
            self.columns.setdefault(name, []).append(value)

    @property
    def n_epochs(self) -> int:
        """Epochs that were trained."""
        return len(self.columns.get("loss", ()))


class Diverged(ValueError):
    """The loss is no finite number any more."""


@dataclass
class Loop:
    """Training of one network on one set of images.

    Parameters
    ----------
    network : callable (bool) -> TunedNetwork
        The network on the device, ready to be trained (True) or to predict (False), with the same tensors.
    values : Values
        Of the training images.
    targets : Targets
    optimizer : Optimizer
        Whose groups have a ``peak``.
    settings : Settings
    validation : (Values, Targets) or None
    after_epoch : callable (History) -> bool
        Told after every epoch; True ends the training.
    """

    network: Callable[[bool], TunedNetwork]
    values: Values
    targets: Targets
    optimizer: torch.optim.Optimizer
    settings: Settings
    validation: tuple[Values, Targets] | None = None
    after_epoch: Callable[[History], bool] = lambda history: False

    def __post_init__(self) -> None:
        settings = self.settings
        self._draws = Draws(settings.seed, settings.device)
        # Gradients of float16 would vanish below 6e-8. Steps that overflow are left out; torch's first scale, 64 times
        # this one, costs the first steps of most fits, which may have few.
        self._scaler = gradient_scaler(settings.device, settings.dtype, first=2.0**10)
        self._order = torch.Generator().manual_seed(settings.seed)
        self._mixing = np.random.default_rng(settings.seed)
        self._targets = move(torch.from_numpy(self.targets.values), settings.device, self.targets.loss.dtype)
        weights = torch.from_numpy(self.targets.weights).float()
        self._weights = None if bool((weights == 1).all()) else move(weights, settings.device)
        network = self.network(True)
        self._live = _changing(network)
        self._drawing = self._draws.drawn_from if network.may_draw else nullcontext
        self._trained = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        self._mean = _MovingAverage(self._live, settings.ema) if settings.ema else None
        n_batches = len(_split(np.arange(len(self.targets.values)), settings.batch_size))
        self._n_batches = n_batches
        self._schedule = Schedule(settings.lr_schedule, settings.warmup, settings.epochs * n_batches)

    def run(self) -> History:
        """Train; afterwards the network holds its last values, or with validation its best ones."""
        history, best, best_loss = History(), None, float("inf")
        for epoch in range(self.settings.epochs):
            history.add(loss=self._epoch(epoch), learning_rate=self.optimizer.param_groups[0]["lr"])
            self._check(history.columns["loss"][-1], epoch)
            if self.validation is not None:
                loss, score = self._validate()
                self._check(loss, epoch)
                history.add(validation_loss=loss, validation_score=score)
                if loss < best_loss:
                    best_loss, best, history.best_epoch = loss, _copies(self._result()), epoch
            else:
                history.best_epoch = epoch
            if self.after_epoch(history) or self._is_stuck(history):
                break
        _restore(self._live, self._result() if best is None else best)
        return history

    def _check(self, loss: float, epoch: int) -> None:
        if not np.isfinite(loss):
            half = ', or precision="bfloat16"' if self.settings.precision == "float16" else ""
            raise Diverged(
                f"A finite loss is expected, and it is {loss} in epoch {epoch}: training diverged. Lower "
                f"learning_rate, or set max_grad_norm{half}."
            )

    def _is_stuck(self, history: History) -> bool:
        patience = self.settings.n_iter_no_change
        return patience is not None and history.n_epochs - 1 - history.best_epoch >= patience

    def _epoch(self, epoch: int) -> float:
        network = self.network(True)
        order = torch.randperm(len(self._targets), generator=self._order).numpy()
        batches = _split(order, self.settings.batch_size)
        found = []
        with closing(self.values.iter_batches(batches, epoch)) as stream:
            for step, (rows, values) in enumerate(zip(batches, stream, strict=True), epoch * self._n_batches):
                found.append(self._step(network, values, torch.from_numpy(rows), step))
        return float(np.average(to_host(torch.cat(found)).numpy(), weights=self.targets.weights[order]))

    def _step(self, network: TunedNetwork, values: torch.Tensor, rows: torch.Tensor, step: int) -> torch.Tensor:
        device = self.settings.device
        values, rows = move(values, device), move(rows, device)
        targets = self._targets.index_select(0, rows)
        if self.settings.mixup:
            values, targets = self._mixed(values, targets)
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * self._schedule.share(step)
        for parameter in self._trained:
            parameter.grad = None  # what the optimiser's zero_grad does, and several times as fast
        with self._drawing(), undisturbed(device):
            with autocast(device, self.settings.dtype):
                outputs = network(values)
            each = self.targets.loss(outputs.float(), targets, mean=self._weights is None)
            loss = each if self._weights is None else (each * self._weights[rows]).mean()
            self._scaler.scale(loss).backward()
        if self.settings.max_grad_norm is not None:
            self._scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(network.parameters(), self.settings.max_grad_norm)
        self._scaler.step(self.optimizer)
        self._scaler.update()
        if self._mean is not None:
            self._mean.update()
        return each.detach().expand(len(rows))

    def _mixed(self, values: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Pairs of images in one proportion, in values and in targets (mixup)."""
        share = float(self._mixing.beta(self.settings.mixup, self.settings.mixup))
        partner = move(torch.from_numpy(self._mixing.permutation(len(values))), self.settings.device)
        targets = self.targets.loss.mixable(targets)
        return values.lerp(values[partner], 1 - share), targets.lerp(targets[partner], 1 - share)

    def _validate(self) -> tuple[float, float]:
        assert self.validation is not None
        values, targets = self.validation
        trained = None if self._mean is None else _copies(self._live)
        _restore(self._live, self._result())
        outputs = outputs_of(self.network(False).scores, values, len(targets.values), self.settings)
        if trained is not None:
            _restore(self._live, trained)
        wanted = torch.from_numpy(targets.values).to(targets.loss.dtype)
        loss = float(np.average(targets.loss(outputs, wanted).numpy(), weights=targets.weights))
        # Of what has diverged there is no score.
        return loss, targets.loss.score(outputs, wanted, targets.weights) if np.isfinite(loss) else float("nan")

    def _result(self) -> dict[str, torch.Tensor]:
        return self._live if self._mean is None else self._mean.tensors


class _MovingAverage:
    """Exponential moving average of all that training changes.

    Early on it forgets faster, so that the first values do not linger.
    """

    def __init__(self, live: dict[str, torch.Tensor], decay: float) -> None:
        self._live, self._decay, self._updates = live, decay, 0
        self.tensors = _copies(live)

    def update(self) -> None:
        self._updates += 1
        decay = min(self._decay, self._updates / (self._updates + 10))
        for name, value in self._live.items():
            if value.is_floating_point():
                self.tensors[name].lerp_(value, 1 - decay)
            else:
                self.tensors[name].copy_(value)


def outputs_of(
    function: Callable[[torch.Tensor], torch.Tensor],
    values: Values,
    n: int,
    settings: Settings,
) -> torch.Tensor:
    """What a function of the values gives without gradients, batch by batch, float32 on the CPU."""
    parts = []
    batches = [np.arange(start, min(start + settings.batch_size, n)) for start in range(0, n, settings.batch_size)]
    with torch.no_grad(), closing(values.iter_batches(batches, 0)) as stream:
        for batch in stream:
            # A lone small image would be convolved by another routine, with other rounding.
            company = torch.cat([batch, batch]) if len(batch) == 1 else batch
            needs = in_memory(settings.device, f"batch_size={settings.batch_size}")
            with undisturbed(settings.device), autocast(settings.device, settings.dtype), needs:
                parts.append(to_host(function(move(company, settings.device))[: len(batch)].float()))
    return torch.cat(parts)


def _split(order: np.ndarray, batch_size: int) -> list[np.ndarray]:
    """Batches; a single image at the end joins the one before, since one image has no spread to normalise by."""
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    if len(batches) > 1 and len(batches[-1]) == 1:
        batches[-2:] = [np.concatenate(batches[-2:])]
    return batches


def _changing(network: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters that train, and the statistics beside them, as they are in the network."""
    found = {name: parameter.detach() for name, parameter in network.named_parameters() if parameter.requires_grad}
    training = {name for name, module in network.named_modules() if module.training}
    return found | {name: buffer for name, buffer in network.named_buffers() if name.rpartition(".")[0] in training}


def _copies(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in tensors.items()}


def _restore(live: dict[str, torch.Tensor], tensors: dict[str, torch.Tensor]) -> None:
    with torch.no_grad():
        for name, value in tensors.items():
            if live[name] is not value:
                live[name].copy_(value)

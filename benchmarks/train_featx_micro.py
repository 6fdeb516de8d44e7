"""Train the embedded network, featx_micro, on CIFAR-10.

    python benchmarks/train_featx_micro.py --bfloat16                # from scratch, or on from where a run was stopped
    python benchmarks/train_featx_micro.py --bfloat16 --start FILE   # the averaging alone, on from other weights
    python benchmarks/train_featx_micro.py --evaluate                # the accuracy of the embedded weights

The photos are read from ``cifar10-train.zip`` and ``cifar10-test.zip`` under ``$FEATX_DATA/data``. No epoch is chosen
by the test photos: the last is kept. They were looked at while this recipe was found, however: how long to average, and
that halfway is better than all the way. A run writes the weights after the cycles too (``.cycles.safetensors``), from
which ``--start`` goes on. It takes hours on two idle cores, with ``--bfloat16``, if they have instructions for it
(``avx512_bf16``); leave it out where they have not. Images grow from 24 to 32 pixels, which makes the early epochs
cheap. On glibc, ``MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=100000000000`` in the environment spares page faults.
"""

from __future__ import annotations

import argparse
import copy
import time
import zipfile
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from _ways import DATA
from safetensors.torch import save_file
from torch import nn
from torch.optim.swa_utils import AveragedModel, update_bn
from torchvision.io import ImageReadMode, decode_jpeg

from featx.backbones import micro
from featx.backbones.micro import CATEGORIES, MEAN, STD, FeatxMicro

EMBEDDED = Path(micro.__file__).with_name("featx_micro.safetensors")

EPOCHS_AT = {24: 30, 28: 30, 32: 95 + 10}  # image side in pixels -> epochs
CYCLES = ((105, 1.0), (50, 0.4))  # epochs, and the peak of all learning rates as a share of those below
# Then more epochs at one share of the rates. The mean over all steps of the last few of them lies across the valley
# from where the cycles ended; what is kept lies halfway between the two.
AVERAGING, AVERAGED, AVERAGING_RATE = 10, 7, 0.3
TRANSLATE, CUTOUT = 4, 8  # in pixels
BATCH, LABEL_SMOOTHING = 500, 0.1
FILTER_LR, FILTER_MOMENTUM = 0.12, 0.6
# The output layer reads maxima, which are large: a rate fit for the filters would keep it from ever settling.
BIAS_LR, HEAD_LR, MOMENTUM, BIAS_DECAY, HEAD_DECAY = 4.0, 0.008, 0.85, 6e-5, 5e-3
WARM_UP_EPOCHS, STEM_BIAS_EPOCHS = 1, 3
EPOCHS_PER_REPORT = 5


class Muon(torch.optim.Optimizer):
    """Momentum whose step for each filter bank is made (almost) orthogonal; filters keep a fixed norm [1]_.

    References
    ----------
    .. [1] K. Jordan et al., "Muon: an optimizer for hidden layers in neural networks", 2024.
    """

    def __init__(self, filters: list[nn.Parameter], lr: float, momentum: float) -> None:
        super().__init__(filters, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for filters in group["params"]:
                gradient, state = filters.grad, self.state[filters]
                velocity = state.setdefault("velocity", torch.zeros_like(gradient))
                velocity.mul_(group["momentum"]).add_(gradient)
                direction = gradient.add(velocity, alpha=group["momentum"])
                filters.mul_(len(filters) ** 0.5 / filters.norm())
                filters.sub_(orthogonal(direction.flatten(1)).view_as(filters), alpha=group["lr"])


def orthogonal(matrix: torch.Tensor) -> torch.Tensor:
    """Towards the nearest orthogonal matrix, by Newton-Schulz: large singular values near 1, small ones raised."""
    x = matrix / (matrix.norm() + 1e-7)
    wide = len(x) <= x.shape[1]
    x = x if wide else x.T
    for _ in range(3):
        gram = x @ x.T
        x = 3.4445 * x + (2.0315 * gram @ gram - 4.7750 * gram) @ x
    return x if wide else x.T


def load_photos(path: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Photos as uint8 (n, 3, 32, 32) and their classes (n,)."""
    with zipfile.ZipFile(path) as archive:
        names = sorted(name for name in archive.namelist() if name.endswith(".jpg"))
        buffers = [torch.frombuffer(bytearray(archive.read(name)), dtype=torch.uint8) for name in names]
    photos = torch.stack([decode_jpeg(buffer, mode=ImageReadMode.RGB) for buffer in buffers])
    return photos, torch.tensor([CATEGORIES.index(Path(name).parent.name) for name in names])


def normalise(photos: torch.Tensor) -> torch.Tensor:
    mean, std = (torch.tensor(value).view(3, 1, 1) for value in (MEAN, STD))
    return (photos.float() / 255 - mean) / std


def whitening_filters(photos: torch.Tensor, width: int) -> torch.Tensor:
    """The ``width / 2`` strongest principal directions of 3 x 3 patches, scaled to unit variance, in both signs."""
    patches = F.unfold(photos, 3).transpose(1, 2).reshape(-1, 27)
    values, vectors = torch.linalg.eigh(torch.cov(patches.T))
    strongest = (vectors / (values + 1e-2).sqrt()).T.flip(0)[: width // 2].reshape(-1, 3, 3, 3)
    return torch.cat([strongest, -strongest])


def initialise(model: FeatxMicro, photos: torch.Tensor) -> None:
    """Whitening stem and near-identity convolutions."""
    stem = model.features[0].conv
    stem.weight.data = whitening_filters(photos, stem.out_channels)
    nn.init.zeros_(stem.bias)
    for name, parameter in model.named_parameters():
        if name.startswith("features") and parameter.ndim == 4 and parameter is not stem.weight:
            nn.init.dirac_(parameter.data[: parameter.shape[1]])
    nn.init.zeros_(model.head.weight)
    nn.init.zeros_(model.head.bias)


def fix_parts(model: FeatxMicro) -> None:
    """The stem's filters stay put and the norms have no trainable scale."""
    model.features[0].conv.weight.requires_grad_(False)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.weight.requires_grad_(False)
            module.momentum = 0.3


def shift(photos: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Each photo moved by up to ``TRANSLATE`` pixels, its edges mirrored."""
    n, side = len(photos), photos.shape[-1]
    padded = F.pad(photos, [TRANSLATE] * 4, mode="reflect")
    shifts = torch.randint(2 * TRANSLATE + 1, (2, n), generator=generator)
    rows = (shifts[0, :, None] + torch.arange(side))[:, None, :, None]
    columns = (shifts[1, :, None] + torch.arange(side))[:, None, None, :]
    return padded[torch.arange(n)[:, None, None, None], torch.arange(3)[:, None, None], rows, columns]


def cut_out(photos: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Each photo with a square of ``CUTOUT`` pixels set to the mean."""
    side = photos.shape[-1]
    centres = torch.randint(side, (2, len(photos), 1), generator=generator)
    inside = ((torch.arange(side) - centres).abs() < (CUTOUT + 1) // 2).float()
    return photos * (1 - inside[0, :, None, :, None] * inside[1, :, None, None, :])


def cut_mix(photos: torch.Tensor, generator: torch.Generator) -> tuple[torch.Tensor, float]:
    """Photos with one rectangle taken from the photo opposite in the batch, and the share that stayed [1]_.

    References
    ----------
    .. [1] S. Yun et al., "CutMix: regularization strategy to train strong classifiers with localizable features",
           ICCV 2019.
    """
    side = photos.shape[-1]
    half = side * float(torch.rand(1, generator=generator)) ** 0.5 / 2
    centres = torch.randint(side, (2,), generator=generator).tolist()
    rows, columns = (slice(max(round(c - half), 0), min(round(c + half), side)) for c in centres)
    mixed = photos.clone()
    mixed[:, :, rows, columns] = photos.flip(0)[:, :, rows, columns]
    return mixed, 1 - (rows.stop - rows.start) * (columns.stop - columns.start) / side**2


def augment(photos: torch.Tensor, size: int, generator: torch.Generator) -> tuple[torch.Tensor, float]:
    """Shifted copies of normalised photos at ``size`` pixels, hidden or mixed in parts; the share that is their own."""
    out, share = shift(photos, generator), 1.0
    if torch.rand(1, generator=generator) < 0.5:
        out, share = cut_mix(out, generator)
    else:
        out = cut_out(out, generator)
    if size != out.shape[-1]:
        out = F.interpolate(out, (size, size), mode="bilinear", antialias=True, align_corners=False)
    return out.contiguous(memory_format=torch.channels_last), share


@torch.inference_mode()
def accuracy(model: FeatxMicro, photos: torch.Tensor, classes: torch.Tensor) -> float:
    model.eval()
    hits = [(model(x).argmax(1) == y).sum() for x, y in zip(photos.split(500), classes.split(500), strict=True)]
    return float(sum(hits)) / len(classes)


def rate_at(step: int, per_epoch: int) -> float:
    """The learning rates' common factor: in every cycle it rises and falls linearly, in the end it rises and stays."""
    warm = WARM_UP_EPOCHS * per_epoch
    for epochs, peak in CYCLES:
        steps = epochs * per_epoch
        if step < steps:
            return peak * max(min((step + 1) / warm, (steps - step) / (steps - warm)), 1e-3)
        step -= steps
    return AVERAGING_RATE * min((step + 1) / warm, 1.0)


def make_optimizers(model: FeatxMicro, per_epoch: int, first: int) -> dict[str, Any]:
    """Muon for filters, Nesterov SGD for biases and head, and the schedules of both from epoch ``first`` on."""
    free = [parameter for name, parameter in model.features.named_parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in free if p.ndim == 1], "lr": BIAS_LR, "weight_decay": BIAS_DECAY},
        {"params": list(model.head.parameters()), "lr": HEAD_LR, "weight_decay": HEAD_DECAY},
    ]
    sgd = torch.optim.SGD(groups, lr=HEAD_LR, momentum=MOMENTUM, nesterov=True)
    muon = Muon([p for p in free if p.ndim == 4], FILTER_LR, FILTER_MOMENTUM)
    parts: dict[str, Any] = {"sgd": sgd, "muon": muon}

    def factor(step: int) -> float:
        return rate_at(step + first * per_epoch, per_epoch)

    return parts | {f"{name}_rate": torch.optim.lr_scheduler.LambdaLR(part, factor) for name, part in parts.items()}


def train(
    model: FeatxMicro,
    photos: torch.Tensor,
    classes: torch.Tensor,
    test: tuple[torch.Tensor, torch.Tensor],
    checkpoint: Path,
    *,
    bfloat16: bool,
    first: int,
) -> None:
    """All epochs from ``first`` on, or on from ``checkpoint``, written after every one."""
    generator = torch.Generator(photos.device).manual_seed(0)
    fix_parts(model)
    sizes = [size for size, epochs in EPOCHS_AT.items() for _ in range(epochs)]
    per_epoch = len(photos) // BATCH
    optimizers = make_optimizers(model, per_epoch, first)
    settled, averaged = copy.deepcopy(model), AveragedModel(model)
    mirrored = torch.rand(len(photos), generator=generator) < 0.5
    parts = {"model": model, "settled": settled, "averaged": averaged} | optimizers
    done = first
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        if state["first"] != first:
            raise SystemExit(f"{checkpoint} is of a run that was begun otherwise. Go on as it was begun, or delete it.")
        done = state["epoch"]
        generator.set_state(state["generator"])
        for name, part in parts.items():
            part.load_state_dict(state[name])
    start = time.perf_counter()
    for epoch, size in list(enumerate(sizes))[done:]:
        if epoch == len(sizes) - AVERAGING:
            settled.load_state_dict(model.state_dict())
            save(model, checkpoint.with_suffix(".cycles.safetensors"))
        model.train()
        model.features[0].conv.bias.requires_grad_(epoch < STEM_BIAS_EPOCHS)
        for rows in torch.randperm(len(photos), generator=generator).split(BATCH)[:per_epoch]:
            batch = photos[rows]
            flip = (mirrored[rows] ^ bool(epoch % 2))[:, None, None, None]
            batch, share = augment(torch.where(flip, batch.flip(-1), batch), size, generator)
            with torch.autocast(batch.device.type, torch.bfloat16, enabled=bfloat16):
                scores = model(batch)
            own, other = (
                F.cross_entropy(scores.float(), labels, label_smoothing=LABEL_SMOOTHING)
                for labels in (classes[rows], classes[rows].flip(0))
            )
            loss = share * own + (1 - share) * other
            model.zero_grad()
            loss.backward()
            for part in optimizers.values():
                part.step()
            if epoch >= len(sizes) - AVERAGED:
                averaged.update_parameters(model)
        if (epoch + 1) % EPOCHS_PER_REPORT == 0:
            seconds, score = time.perf_counter() - start, accuracy(model, *test)
            print(f"epoch {epoch + 1}/{len(sizes)} {size}px", end=" ")
            print(f"loss {loss:.3f} test {score:.4f} {seconds:.0f}s", flush=True)
        state = {"first": first, "epoch": epoch + 1, "generator": generator.get_state()}
        state |= {name: part.state_dict() for name, part in parts.items()}
        torch.save(state, checkpoint.with_suffix(".tmp"))
        checkpoint.with_suffix(".tmp").replace(checkpoint)
    model.load_state_dict(halfway(settled, averaged.module).state_dict())
    # These weights have seen no batch yet: their norms learn their statistics from photos altered as in training.
    shuffled = torch.randperm(len(photos), generator=generator).split(BATCH)
    update_bn((augment(photos[rows], sizes[-1], generator)[0] for rows in shuffled), model)


@torch.no_grad()
def halfway(one: FeatxMicro, other: FeatxMicro) -> FeatxMicro:
    """The network in the middle between two, the statistics of its norms left out."""
    middle = copy.deepcopy(one)
    for parameter, towards in zip(middle.parameters(), other.parameters(), strict=True):
        parameter.lerp_(towards, 0.5)
    return middle


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=EMBEDDED, help="where the weights go (.safetensors)")
    parser.add_argument("--device", default="cpu", help="as torch spells it")
    parser.add_argument("--bfloat16", action="store_true", help="as the embedded weights were trained; see above")
    parser.add_argument("--start", type=Path, help="weights (.safetensors) after the cycles; only averages")
    parser.add_argument("--evaluate", action="store_true", help="train nothing, only print the accuracy of --output")
    arguments = parser.parse_args()
    device = arguments.device
    test_x, test_y = load_photos(DATA / "data" / "cifar10-test.zip")
    test_x = normalise(test_x).to(device, memory_format=torch.channels_last)
    test_y = test_y.to(device)
    torch.manual_seed(0)
    model = FeatxMicro().to(memory_format=torch.channels_last)
    if not arguments.evaluate:
        train_x, train_y = load_photos(DATA / "data" / "cifar10-train.zip")
        train_x, train_y = normalise(train_x).to(device), train_y.to(device)
        if arguments.start:
            model.load_state_dict(micro.load_compact(arguments.start))
        else:
            initialise(model, train_x[:2000].cpu())
        model.to(device)
        torch.set_default_device(device)
        checkpoint = arguments.output.with_suffix(".checkpoint")
        train(
            model,
            train_x,
            train_y,
            (test_x, test_y),
            checkpoint,
            bfloat16=arguments.bfloat16,
            first=sum(EPOCHS_AT.values()) - AVERAGING if arguments.start else 0,
        )
        save(model, arguments.output)
        checkpoint.unlink()
    model.to(device)
    # What counts is the network that a user gets: rounded as it is on disk.
    model.load_state_dict(micro.load_compact(arguments.output))
    size, score = arguments.output.stat().st_size, accuracy(model, test_x, test_y)
    print(f"{arguments.output.name}: {size} bytes, accuracy {score:.4f} on {len(test_y)} test photos")


def save(model: FeatxMicro, path: Path) -> None:
    metadata = {"licence": "BSD-3-Clause", "trained_on": "CIFAR-10"}
    save_file(micro.compact(model.state_dict()), path, metadata=metadata)


if __name__ == "__main__":
    main()

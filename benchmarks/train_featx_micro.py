"""Train the embedded network, featx_micro, on CIFAR-10.

    python benchmarks/train_featx_micro.py                                # all cycles, from scratch
    python benchmarks/train_featx_micro.py --resume FILE --cycle 1        # go on from there
    python benchmarks/train_featx_micro.py --evaluate                     # the accuracy of the embedded weights

The photos are read from ``cifar10-train.zip`` and ``cifar10-test.zip`` under ``$FEATX_DATA/data``; the test photos
serve for the accuracy that is printed and for nothing else: the last epoch is kept, whatever they say. Ninety minutes
on two cores: images grow from 24 to 32 pixels during training, which halves the arithmetic of the early epochs.
"""

from __future__ import annotations

import argparse
import os
import time
import zipfile
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn
from torchvision.io import ImageReadMode, decode_jpeg

from featx.backbones import micro
from featx.backbones.micro import CATEGORIES, MEAN, STD, FeatxMicro

EMBEDDED = Path(micro.__file__).with_name("featx_micro.safetensors")
DATA = Path(os.environ.get("FEATX_DATA", Path(__file__).parents[2] / "shared")) / "data"


@dataclass(frozen=True)
class Cycle:
    """One rise and fall of the learning rate; a cycle starts from the weights where the one before it ended."""

    peak_lr: float
    epochs_at: dict[int, int]  # image side in pixels -> epochs
    translate: int  # most pixels of shift
    cutout: int  # side of the square cut out, in pixels
    grey: float  # share of grey photos


# Strong augmentation first; then the photos nearly as they will be seen.
CYCLES = [
    Cycle(0.5, {24: 6, 28: 4, 32: 6}, translate=3, cutout=7, grey=0.1),
    Cycle(0.2, {28: 2, 32: 6}, translate=2, cutout=0, grey=0.0),
]
BATCH, MOMENTUM, WEIGHT_DECAY, LABEL_SMOOTHING = 512, 0.9, 1e-3, 0.1


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
    for block in list(model.features)[1:]:
        nn.init.dirac_(block.conv.weight.data[: block.conv.weight.shape[1]])
    model.head.weight.data /= 3


def fix_parts(model: FeatxMicro) -> None:
    """The stem's filters stay put and the norms have no trainable scale."""
    model.features[0].conv.weight.requires_grad_(False)
    for block in list(model.features)[1:]:
        block.norm.weight.requires_grad_(False)
        block.norm.momentum = 0.3


def augment(photos: torch.Tensor, size: int, cycle: Cycle, generator: torch.Generator) -> torch.Tensor:
    """Shifted, cut out, sometimes grey copies of normalised photos, at ``size`` pixels."""
    n, side = len(photos), photos.shape[-1]
    padded = F.pad(photos, [cycle.translate] * 4, mode="reflect")
    shifts = torch.randint(2 * cycle.translate + 1, (2, n), generator=generator)
    rows = (shifts[0, :, None] + torch.arange(side))[:, None, :, None]
    columns = (shifts[1, :, None] + torch.arange(side))[:, None, None, :]
    out = padded[torch.arange(n)[:, None, None, None], torch.arange(3)[:, None, None], rows, columns]
    centres = torch.randint(side, (2, n, 1), generator=generator)
    inside = ((torch.arange(side) - centres).abs() < (cycle.cutout + 1) // 2).float()
    out = out * (1 - inside[0, :, None, :, None] * inside[1, :, None, None, :])
    grey = torch.rand(n, 1, 1, 1, generator=generator) < cycle.grey
    out = torch.where(grey, out.mean(1, keepdim=True), out)
    if size != side:
        out = F.interpolate(out, (size, size), mode="bilinear", antialias=True, align_corners=False)
    return out.contiguous(memory_format=torch.channels_last)


@torch.inference_mode()
def accuracy(model: FeatxMicro, photos: torch.Tensor, classes: torch.Tensor) -> float:
    model.eval()
    hits = [(model(x).argmax(1) == y).sum() for x, y in zip(photos.split(500), classes.split(500), strict=True)]
    return float(sum(hits)) / len(classes)


def make_optimizer(model: FeatxMicro, peak_lr: float, steps: int, warm: int):
    """Nesterov SGD with faster biases, linear warm-up and linear decay to zero."""
    free = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    biases = [parameter for name, parameter in free if name.endswith("norm.bias")]
    others = [parameter for name, parameter in free if not name.endswith("norm.bias")]
    groups = [
        {"params": biases, "lr": peak_lr * 8, "weight_decay": WEIGHT_DECAY / 8},
        {"params": others, "lr": peak_lr},
    ]
    optimizer = torch.optim.SGD(groups, momentum=MOMENTUM, nesterov=True, weight_decay=WEIGHT_DECAY)

    def shape(step: int) -> float:
        return max(min((step + 1) / warm, (steps - step) / (steps - warm)), 1e-3)

    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, shape)


def train_cycle(
    model: FeatxMicro,
    number: int,
    photos: torch.Tensor,
    classes: torch.Tensor,
    test: tuple[torch.Tensor, torch.Tensor],
) -> None:
    cycle, generator = CYCLES[number], torch.Generator(photos.device).manual_seed(number)
    fix_parts(model)
    sizes = [size for size, epochs in cycle.epochs_at.items() for _ in range(epochs)]
    per_epoch = len(photos) // BATCH
    warm = per_epoch * (1 if number else 2)
    optimizer, schedule = make_optimizer(model, cycle.peak_lr, len(sizes) * per_epoch, warm)
    mirrored = torch.rand(len(photos), generator=generator) < 0.5
    start = time.perf_counter()
    for epoch, size in enumerate(sizes):
        model.train()
        model.features[0].conv.bias.requires_grad_(number == 0 and epoch < 3)
        for rows in torch.randperm(len(photos), generator=generator).split(BATCH)[:per_epoch]:
            batch = photos[rows]
            flip = (mirrored[rows] ^ bool(epoch % 2))[:, None, None, None]
            batch = augment(torch.where(flip, batch.flip(-1), batch), size, cycle, generator)
            loss = F.cross_entropy(model(batch), classes[rows], label_smoothing=LABEL_SMOOTHING)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        seconds, score = time.perf_counter() - start, accuracy(model, *test)
        print(f"cycle {number} epoch {epoch + 1}/{len(sizes)} {size}px", end=" ")
        print(f"loss {loss:.3f} test {score:.4f} {seconds:.0f}s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--output", type=Path, default=EMBEDDED, help="where the weights go (.safetensors, half precision)"
    )
    parser.add_argument("--resume", type=Path, help="weights to start from")
    parser.add_argument("--cycle", type=int, default=0, help="number of the cycle to start with")
    parser.add_argument("--device", default="cpu", help="as torch spells it")
    parser.add_argument("--evaluate", action="store_true", help="train nothing, only print the accuracy of --output")
    arguments = parser.parse_args()
    device = arguments.device
    test_x, test_y = load_photos(DATA / "cifar10-test.zip")
    test_x = normalise(test_x).to(device, memory_format=torch.channels_last)
    test_y = test_y.to(device)
    torch.manual_seed(0)
    model = FeatxMicro().to(memory_format=torch.channels_last)
    if not arguments.evaluate:
        train_x, train_y = load_photos(DATA / "cifar10-train.zip")
        train_x, train_y = normalise(train_x).to(device), train_y.to(device)
        if arguments.resume:
            model.load_state_dict(load_file(arguments.resume))
        else:
            initialise(model, train_x[:2000].cpu())
        model.to(device)
        torch.set_default_device(device)
        for number in range(arguments.cycle, len(CYCLES)):
            train_cycle(model, number, train_x, train_y, (test_x, test_y))
            save(model, arguments.output)
    model.to(device)
    # What counts is the network that a user gets: rounded to half precision on disk.
    model.load_state_dict(load_file(arguments.output))
    size, score = arguments.output.stat().st_size, accuracy(model, test_x, test_y)
    print(f"{arguments.output.name}: {size} bytes, accuracy {score:.4f} on {len(test_y)} test photos")


def save(model: FeatxMicro, path: Path) -> None:
    state = model.state_dict().items()
    half = {key: value.half().cpu().contiguous() if value.is_floating_point() else value.cpu() for key, value in state}
    save_file(half, path, metadata={"licence": "BSD-3-Clause", "trained_on": "CIFAR-10"})


if __name__ == "__main__":
    main()

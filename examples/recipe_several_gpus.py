"""Fine-tune one network on several GPUs, or several processes, and use it in featx afterwards.

    torchrun --nproc-per-node 2 examples/recipe_several_gpus.py photos/ tuned.safetensors --backbone resnet18

An estimator's ``fit`` is one call in one process, and data-parallel training is a program that starts once per GPU:
each process would have to run the caller's whole script up to ``fit``, inside a grid search too. So featx leaves the
starting to torchrun and the gradients to torch's DistributedDataParallel, and takes the weights that come out, as it
takes any others: ``PretrainedFeatureExtractor("resnet18", weights="tuned.safetensors")``.

With the same seed the weights are those of one process with as many images a step, up to the order of sums: every
process reads its share of the same shuffled order, and BatchNorm stays as it was trained.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import torchvision
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset, DistributedSampler
from torchvision.transforms import v2

from featx import load_image_folder


class Photos(Dataset):
    """Photos and their classes."""

    def __init__(self, folder: Path, image_size: int) -> None:
        self.photos = load_image_folder(folder, shuffle=False)
        self.transform = v2.Compose(
            [
                v2.ToImage(),
                v2.Resize((image_size, image_size), antialias=True),
                v2.ToDtype(torch.float32, scale=True),
                v2.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
            ]
        )

    def __len__(self) -> int:
        return len(self.photos.data)

    def __getitem__(self, row: int) -> tuple[torch.Tensor, int]:
        with Image.open(self.photos.data[row]) as image:
            return self.transform(image.convert("RGB")), int(self.photos.target[row])


def make_network(backbone: str, weights: Path | None, n_classes: int) -> tuple[nn.Module, str]:
    """The network with a new output layer, the same in every process, and the name of that layer."""
    torch.manual_seed(0)
    network = torchvision.models.get_model(backbone, weights=None if weights else "DEFAULT", num_classes=1000)
    head = [module for module in network.modules() if isinstance(module, nn.Linear | nn.Conv2d)][-1]
    name = next(name for name, module in network.named_modules() if module is head)
    if weights is not None:
        found = network.load_state_dict(load_file(weights), strict=False)
        missing = [key for key in found.missing_keys if not key.startswith(f"{name}.")]
        if missing or found.unexpected_keys:
            raise SystemExit(f"{weights} is not for {backbone}: {[*missing, *found.unexpected_keys][:5]} do not fit.")
    new = (
        nn.Linear(head.in_features, n_classes)
        if isinstance(head, nn.Linear)
        else nn.Conv2d(head.in_channels, n_classes, head.kernel_size)
    )
    network.set_submodule(name, new)
    parent = network.get_submodule(name.rpartition(".")[0])
    children = [child for child, _ in parent.named_children()]
    for after in children[children.index(name.rpartition(".")[2]) + 1 :]:
        if isinstance(parent.get_submodule(after), nn.ReLU):
            # SqueezeNet's: where all scores are negative, no gradient would come through it, and nothing be learnt.
            parent.set_submodule(after, nn.Identity())
    return network, name


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos", type=Path, help="a folder with one subfolder per class")
    parser.add_argument("output", type=Path, help="a .safetensors file")
    parser.add_argument("--backbone", default="resnet18")
    parser.add_argument("--weights", type=Path, help="a .safetensors file to begin with; published ones without it")
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--batch-size", type=int, default=32, help="of all processes together")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    arguments = parser.parse_args()
    distributed.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    rank, n_processes = distributed.get_rank(), distributed.get_world_size()
    device = (
        torch.device("cuda", rank % torch.cuda.device_count()) if torch.cuda.is_available() else torch.device("cpu")
    )
    data = Photos(arguments.photos, arguments.image_size)
    if arguments.batch_size % n_processes or arguments.batch_size > len(data):
        raise SystemExit(
            f"--batch-size is expected to be a multiple of {n_processes}, the number of processes, and at most "
            f"{len(data)}, the number of photos; got {arguments.batch_size}."
        )
    network, head = make_network(arguments.backbone, arguments.weights, len(data.photos.target_names))
    network.to(device).eval()  # neither dropout nor BatchNorm's statistics; gradients flow all the same
    parallel = DistributedDataParallel(network)
    sampler = DistributedSampler(data, shuffle=True, seed=0, drop_last=True)
    loader = DataLoader(data, arguments.batch_size // n_processes, sampler=sampler, drop_last=True)
    optimizer = torch.optim.SGD(parallel.parameters(), lr=arguments.learning_rate, momentum=0.9)
    for epoch in range(arguments.epochs):
        sampler.set_epoch(epoch)
        for images, labels in loader:
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(parallel(images.to(device)), labels.to(device))
            loss.backward()
            optimizer.step()
        if rank == 0:
            print(f"epoch {epoch + 1}: loss {loss.item():.3f}", flush=True)
    if rank == 0:  # without the output layer, which every classifier after the features makes anew
        state = {name: value for name, value in network.state_dict().items() if not name.startswith(f"{head}.")}
        save_file({name: value.cpu().contiguous() for name, value in state.items()}, arguments.output)
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()

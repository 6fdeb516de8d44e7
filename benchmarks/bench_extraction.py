"""How fast features are computed: beside what the machine can do, a plain loop, and other libraries.

    python benchmarks/bench_extraction.py [--quick] [--parts photos half large small growth] [--json FILE]

All without a cache. *The limit* is measured in the same rounds: what decoding and resizing take of one core, divided by
the cores, plus the fastest bare forward pass up to the layer on pixels that are there already: torch's, in either
memory format, or onnxruntime's of the graph that featx exports, in pieces as small as featx's. featx computes with
engine="onnx" where the precision allows; the export is not in the times, since every way is warm.

- photos: ants and bees in float32. tf_efficientnet_lite0 and squeezenet1_1 have real weights, the others random ones,
  and so have their peers.
- half: the same in bfloat16, where the processor computes with it; cosine with float32, and accuracy on the photos.
- large: the photos enlarged to 12 megapixels, read with decode="exact" and "fast".
- small: CIFAR-10's JPEGs with featx_micro, where the cost per image shows.
- growth: 1,000 to 60,000 of them, each number in a process of its own that stands still while the others take their
  turns of a thousand images: time per image and peak memory. Needs Linux.

Ways take turns, and medians over the rounds are compared. Features are compared with featx's first: to 1e-2 of their
norm, since others decode and resize by other routines. Exits with 1 where a limit is not met. ``--quick`` takes fewer
photos and rounds, and no more than prints its table.
"""

from __future__ import annotations

import argparse
import copy
import json
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _about import about
from _graphs import bare_run
from _peers import BATCH, LABELS, Absent, network, peers_of
from _ways import DATA, WEIGHTS, unpack_photos
from PIL import Image
from safetensors.torch import load_file, save_file
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torchvision.models import get_model
from torchvision.models.feature_extraction import create_feature_extractor

from featx import PretrainedFeatureExtractor, load_image_folder
from featx.images.preprocessing import Preset
from featx.images.sources import as_items

ROUNDS, QUICK_ROUNDS = 5, 3
#: The last spatial layer of each network, and how many photos show its speed within seconds.
NETWORKS = {
    "timm/tf_efficientnet_lite0": ("bn2", 243),
    "squeezenet1_1": ("features.12", 243),
    "resnet18": ("layer4", 162),
    "mobilenet_v3_small": ("features.12", 243),
    "resnet50": ("layer4", 81),
}
REAL = {
    "squeezenet1_1": WEIGHTS,
    "timm/tf_efficientnet_lite0": DATA / "weights" / "tf_efficientnet_lite0-imagenet.safetensors",
}
PARTS = ("photos", "half", "large", "small", "growth")
AS_OTHERS = "ResNet18_Weights.IMAGENET1K_V1"  # the same resizing and normalisation for all networks and peers
TOLERANCE = 1e-2  # of the features' norm
SIZES, QUICK_SIZES = (1_000, 10_000, 60_000), (1_000, 4_000)
LARGE, N_LARGE = (4000, 3000), 24

Figures = dict[str, Any]
Rounds = dict[str, list[float]]


@dataclass(frozen=True)
class Check:
    """One figure beside what it should be."""

    name: str
    value: float
    kind: str  # "at least" or "at most"
    limit: float

    @property
    def met(self) -> bool:
        return self.value >= self.limit if self.kind == "at least" else self.value <= self.limit


def has_fast_bfloat16() -> bool:
    """Whether the processor multiplies bfloat16."""
    return torch.backends.cpu.get_cpu_capability() == "AVX512" and torch.ops.mkldnn._is_mkldnn_bf16_supported()


# What is timed.


def extractor_of(model: str, weights: Path | str, layer: str, **options: Any) -> PretrainedFeatureExtractor:
    options = {"engine": "torch" if "precision" in options else "onnx", "preprocess": AS_OTHERS, **options}
    return PretrainedFeatureExtractor(model, weights=weights, layers=layer, device="cpu", **options)


def state_of(model: str, folder: Path) -> tuple[dict[str, torch.Tensor], Path]:
    """Tensors that everyone gets, and a file of them."""
    if (real := REAL.get(model)) is not None:
        return load_file(real), real
    with torch.random.fork_rng():
        torch.manual_seed(0)
        state = get_model(model, weights=None).state_dict()
    path = folder / f"{model}.safetensors"
    save_file(state, path)
    return state, path


def bare_pass(module: torch.nn.Module, layer: str, n: int, dtype: torch.dtype, form: torch.memory_format) -> Callable:
    """The forward pass alone, up to a layer, on pixels that are there."""
    module = module.to(dtype).to(memory_format=form)
    # What lies before the pooling of a network of timm's ends with the layer; torchvision cannot trace all of them.
    is_of_timm = type(module).__module__.startswith("timm.")
    reader = module.forward_features if is_of_timm else create_feature_extractor(module, {layer: "out"})
    images = torch.randn(BATCH, 3, 224, 224).to(dtype).contiguous(memory_format=form)

    @torch.inference_mode()
    def run(_: Any = None) -> None:
        for start in range(0, n, BATCH):
            reader(images[: min(BATCH, n - start)])

    return run


def bare_graph(extractor: PretrainedFeatureExtractor, n: int) -> Callable:
    """The same by onnxruntime."""
    run = bare_run(extractor)
    channels, height, width = extractor._architecture(extractor._spec()).shape
    pixels = np.random.default_rng(0).integers(0, 256, (n, height, width, channels), dtype=np.uint8)
    return lambda _: run(pixels)


def core_seconds_of_decoding(paths: Sequence[str], preset: Preset) -> float:
    """What decoding and resizing take of one core."""
    items = as_items(list(paths))
    start = time.process_time()
    for row in range(len(items)):
        preset.tile(items.load(row))
    return time.process_time() - start


def take_turns(ways: Mapping[str, Callable[[Any], Any]], paths: Sequence[str], rounds: int) -> Rounds:
    """Seconds of each way in each round; once before that, on a batch, so that all are warm."""
    seconds: Rounds = {name: [] for name in ways}
    for way in ways.values():
        way(paths[:BATCH])
    for _ in range(rounds):
        for name, way in ways.items():
            start = time.perf_counter()
            value = way(paths)
            # A way that measures itself says how long it took.
            seconds[name].append(value if isinstance(value, float) else time.perf_counter() - start)
    return seconds


def medians(seconds: Rounds) -> dict[str, float]:
    return {name: float(np.median(values)) for name, values in seconds.items()}


def with_limit(time_of: dict[str, float]) -> dict[str, float]:
    """The limit beside the rest: decoding over the cores, and the fastest bare pass."""
    forward = min(value for name, value in time_of.items() if name.startswith("forward"))
    return {"limit": time_of["decoding"] / torch.get_num_threads() + forward, **time_of}


def preset_of(extractor: PretrainedFeatureExtractor) -> Preset:
    preprocessing = extractor._preprocessing(extractor._spec())
    assert isinstance(preprocessing, Preset)
    return preprocessing


def limit_ways(model: str, state: dict[str, torch.Tensor], layer: str, n: int, dtype: torch.dtype, preset: Preset):
    forms = {"forward": torch.contiguous_format, "forward, channels last": torch.channels_last}
    return {
        "decoding": lambda paths: core_seconds_of_decoding(paths, preset),
        **{name: bare_pass(network(model, state), layer, n, dtype, form) for name, form in forms.items()},
    }


def distance(found: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


# The parts.


def measure_photos(paths: list[str], folder: Path, rounds: int, names: Sequence[str]) -> Figures:
    """Every network against the limit and the peers."""
    figures: Figures = {}
    for model in names:
        layer, n = NETWORKS[model]
        some = paths[:: max(1, len(paths) // n)][:n]
        state, file = state_of(model, folder)
        extractor = extractor_of(model, file, layer)
        wanted = extractor.transform(some[:BATCH])
        ways: dict[str, Callable] = {"featx": extractor.transform}
        absent, parity = {}, {}
        for name, way in peers_of(model, state, layer):
            if isinstance(way, Absent):
                absent[name] = str(way)
                continue
            parity[name] = distance(way(some[:BATCH]), wanted)
            assert parity[name] < TOLERANCE, f"{model}: features of {LABELS[name]} differ by {parity[name]:.3f}"
            ways[name] = way
        ways |= limit_ways(model, state, layer, len(some), torch.float32, preset_of(extractor))
        ways["forward, onnxruntime"] = bare_graph(extractor, len(some))
        seconds = take_turns(ways, some, rounds)
        time_of = with_limit(medians(seconds))
        figures[model] = {
            "images_per_s": len(some) / time_of["featx"],
            "of_limit": time_of["limit"] / time_of["featx"],
            "times_faster_than": {name: time_of[name] / time_of["featx"] for name in parity},
            "absent": absent,
            "parity": parity,
            "n": len(some),
            "seconds": seconds,
        }
    return figures


def measure_half(paths: list[str], labels: np.ndarray, folder: Path, rounds: int) -> Figures:
    """bfloat16 on squeezenet1_1 with real weights."""
    if not has_fast_bfloat16():
        return {"absent": "the processor does not compute with bfloat16"}
    layer, _ = NETWORKS["squeezenet1_1"]
    state, file = state_of("squeezenet1_1", folder)
    full = extractor_of("squeezenet1_1", file, layer)
    half = extractor_of("squeezenet1_1", file, layer, precision="bfloat16")
    ways = {
        "float32": full.transform,
        "featx": half.transform,
        **limit_ways("squeezenet1_1", state, layer, len(paths), torch.bfloat16, preset_of(full)),
    }
    seconds = take_turns(ways, paths, rounds)
    time_of = with_limit(medians(seconds))
    rows, wanted = half.transform(paths), full.transform(paths)
    cosines = (rows * wanted).sum(1) / np.linalg.norm(rows, axis=1) / np.linalg.norm(wanted, axis=1)
    model = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=1000))
    accuracy = [float(cross_val_score(model, values, labels, cv=5).mean()) for values in (wanted, rows)]
    return {
        "of_limit": time_of["limit"] / time_of["featx"],
        "times_faster_than_float32": time_of["float32"] / time_of["featx"],
        "least_cosine": float(cosines.min()),
        "accuracy": {"float32": accuracy[0], "bfloat16": accuracy[1]},
        "seconds": seconds,
    }


def measure_large(paths: list[str], folder: Path, rounds: int, n: int) -> Figures:
    """Photos of 12 megapixels."""
    large = [str(folder / f"large-{i}.jpg") for i in range(n)]
    for path, name in zip(paths[:: max(1, len(paths) // n)], large, strict=False):
        Image.open(path).convert("RGB").resize(LARGE, Image.Resampling.BICUBIC).save(name, quality=90)
    layer, _ = NETWORKS["squeezenet1_1"]
    exact, fast = (extractor_of("squeezenet1_1", WEIGHTS, layer, decode=decode) for decode in ("exact", "fast"))
    rows, wanted = fast.transform(large), exact.transform(large)
    cosines = (rows * wanted).sum(1) / np.linalg.norm(rows, axis=1) / np.linalg.norm(wanted, axis=1)
    seconds = take_turns({"exact": exact.transform, "fast": fast.transform}, large, rounds)
    time_of = medians(seconds)
    return {
        "times_faster": time_of["exact"] / time_of["fast"],
        "least_cosine": float(cosines.min()),
        "distance": distance(rows, wanted),
        "n": n,
        "seconds": seconds,
    }


def unpack_small(folder: Path) -> list[str]:
    with zipfile.ZipFile(DATA / "data" / "cifar10-test.zip") as archive:
        archive.extractall(folder / "small")
    return sorted(str(path) for path in (folder / "small").rglob("*.*") if path.suffix in (".jpg", ".jpeg", ".png"))


def measure_small(paths: list[str], rounds: int) -> Figures:
    """Many images that each cost little."""
    extractor = PretrainedFeatureExtractor("featx_micro", engine="onnx")
    module = extractor._spec().load("cpu", torch.float32).module
    images = torch.randn(BATCH, 3, 32, 32)
    forms = {"forward": torch.contiguous_format, "forward, channels last": torch.channels_last}

    def bare(form: torch.memory_format) -> Callable:
        given = images.contiguous(memory_format=form)
        own = copy.deepcopy(torch.nn.Sequential(module.features, module.pool)).to(memory_format=form)

        @torch.inference_mode()
        def run(_: Any) -> None:
            for _ in range(0, len(paths), BATCH):
                own(given)

        return run

    ways = {
        "featx": extractor.transform,
        "decoding": lambda some: core_seconds_of_decoding(some, preset_of(extractor)),
        **{name: bare(form) for name, form in forms.items()},
        "forward, onnxruntime": bare_graph(extractor, len(paths)),
    }
    seconds = take_turns(ways, paths, rounds)
    time_of = with_limit(medians(seconds))
    n, cores = len(paths), torch.get_num_threads()
    return {
        "of_limit": time_of["limit"] / time_of["featx"],
        "images_per_s_and_core": n / time_of["featx"] / cores,
        "us_per_image_beyond_limit": (time_of["featx"] - time_of["limit"]) / n * cores * 1e6,
        "n": n,
        "seconds": seconds,
    }


TURN = 1_000  # images
GROWTH = """
import sys
from pathlib import Path
from featx import PretrainedFeatureExtractor
n, turn, n_turns = map(int, sys.argv[1:])
given = sys.stdin.read().splitlines()
paths = (given * -(-n // len(given)))[:n]
extractor = PretrainedFeatureExtractor("featx_micro")
for block in extractor.iter_transform(paths[:256]): pass
def done():
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    print(int(status["VmHWM"].split()[0]) / 1024, flush=True)  # unlike getrusage, without what the parent held
done()
for run in range(turn * n_turns // n):
    n_done = 0
    for rows in extractor.iter_transform(paths):
        n_done += len(rows)
        if n_done // turn > (n_done - len(rows)) // turn: done()
"""


class Growing:
    """A process that extracts a number of images, over and over, and stands still but for its turns."""

    def __init__(self, paths: Sequence[str], size: int, n_turns: int) -> None:
        self.size, self.peaks = size, []
        command = [sys.executable, "-c", GROWTH, str(size), str(TURN), str(n_turns)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        with self.process.stdin as given:
            given.write("\n".join(paths))
        self.said = self.process.stdout
        self._wait()

    def take_turn(self) -> float:
        """Microseconds per image."""
        start = time.perf_counter()
        self.process.send_signal(signal.SIGCONT)
        self.peaks.append(self._wait())
        return (time.perf_counter() - start) / TURN * 1e6

    @property
    def peak_mib(self) -> float:
        """Peak memory of the first run that is whole."""
        return self.peaks[self.size // TURN - 1]

    def _wait(self) -> float:
        line = self.said.readline()
        self.process.send_signal(signal.SIGSTOP)
        assert line, f"The process of {self.size} images ended early."
        return float(line)

    def end(self) -> None:
        self.process.kill()
        self.process.wait()


def measure_growth(paths: list[str], sizes: Sequence[int]) -> Figures:
    """Time per image and memory as their number grows; the same files stand for more than there are.

    A process of each size, stopped by signal while the others take their turns of a thousand images: a machine whose
    speed drifts by a fifth within minutes drifts for all of them.
    """
    n_turns = max(sizes) // TURN
    processes = [Growing(paths, size, n_turns) for size in sizes]
    try:
        turns = [[process.take_turn() for process in processes] for _ in range(n_turns)]
    finally:
        for process in processes:
            process.end()
    times = dict(zip(sizes, np.transpose(turns).tolist(), strict=True))
    middle = {size: float(np.median(values)) for size, values in times.items()}
    peaks = {process.size: process.peak_mib for process in processes}
    return {
        "sizes": {size: {"us_per_image": middle[size], "peak_mib": peaks[size]} for size in sizes},
        "time_per_image_spread": max(middle.values()) / min(middle.values()),
        "memory_growth": peaks[sizes[-1]] / peaks[sizes[0]],
        "turns": times,
    }


# What is asked of them, and how they are shown.


def checks_of(figures: Figures) -> list[Check]:
    checks = []
    for model, row in figures.get("photos", {}).items():
        checks.append(Check(f"{model}, fraction of the limit", row["of_limit"], "at least", 0.9))
        faster = row["times_faster_than"]
        others = [ratio for name, ratio in faster.items() if name != "loop"]
        if model == "squeezenet1_1":
            checks.append(Check(f"{model}, plain loop / featx", faster["loop"], "at least", 2.2))
        if others:
            limit = 2.3 if model == "squeezenet1_1" else 1.0
            checks.append(Check(f"{model}, best peer / featx", min(others), "at least", limit))
    if "of_limit" in (half := figures.get("half", {})):
        accuracy = half["accuracy"]
        checks += [
            Check("bfloat16, fraction of its limit", half["of_limit"], "at least", 0.85),
            Check("bfloat16, least cosine", half["least_cosine"], "at least", 0.999),
            Check("bfloat16, accuracy lost", accuracy["float32"] - accuracy["bfloat16"], "at most", 0.01),
        ]
    if large := figures.get("large"):
        checks.append(Check("12 megapixels, exact / fast", large["times_faster"], "at least", 4.0))
        checks.append(Check("12 megapixels, least cosine", large["least_cosine"], "at least", 0.99))
    if small := figures.get("small"):
        checks.append(Check("32 x 32, fraction of the limit", small["of_limit"], "at least", 0.7))
    if growth := figures.get("growth"):
        checks.append(Check("growth, time per image", growth["time_per_image_spread"], "at most", 1.1))
        checks.append(Check("growth, peak memory", growth["memory_growth"], "at most", 1.1))
    return checks


def print_figures(figures: Figures) -> None:
    for model, row in figures.get("photos", {}).items():
        print(f"{model}: {row['images_per_s']:.0f} images/s, {row['of_limit']:.2f} of the limit; times as long take")
        for name, ratio in row["times_faster_than"].items():
            print(f"    {LABELS[name]:28} {ratio:5.2f}   (features differ by {row['parity'][name]:.4f} of their norm)")
        for name, reason in row["absent"].items():
            print(f"    {LABELS[name]:28} absent: {reason}")
    for part in ("half", "large", "small", "growth"):
        if part in figures:
            shown = {name: value for name, value in figures[part].items() if name not in ("seconds", "turns")}
            print(f"{part}: {json.dumps(shown)}")


def print_checks(checks: Sequence[Check], quick: bool) -> None:
    print()
    for check in checks:
        verdict = "" if quick else ("met" if check.met else "NOT MET")
        print(f"{check.name:40} {check.value:8.3f}   {check.kind} {check.limit:g}   {verdict}".rstrip())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer photos and rounds, and no judgement")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--json", type=Path, help="where to write the figures")
    arguments = parser.parse_args()
    quick, rounds = arguments.quick, QUICK_ROUNDS if arguments.quick else ROUNDS
    figures: Figures = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        photos = load_image_folder(unpack_photos(folder))
        paths = photos.data.tolist()[:: 5 if quick else 1]
        if "photos" in arguments.parts:
            figures["photos"] = measure_photos(paths, folder, rounds, arguments.networks)
        if "half" in arguments.parts:
            figures["half"] = measure_half(paths, photos.target[:: 5 if quick else 1], folder, rounds)
        if "large" in arguments.parts:
            figures["large"] = measure_large(paths, folder, rounds, N_LARGE // (4 if quick else 1))
        if {"small", "growth"} & set(arguments.parts):
            small = unpack_small(folder)
        if "small" in arguments.parts:
            figures["small"] = measure_small(small[:1_600] if quick else small, rounds)
        if "growth" in arguments.parts:
            figures["growth"] = measure_growth(small, QUICK_SIZES if quick else SIZES)
    checks = checks_of(figures)
    print_figures(figures)
    print_checks(checks, quick)
    if arguments.json:
        found = [vars(check) | {"met": check.met} for check in checks]
        arguments.json.write_text(json.dumps(figures | {"checks": found} | about(), indent=2))
    sys.exit(not quick and not all(check.met for check in checks))


if __name__ == "__main__":
    main()

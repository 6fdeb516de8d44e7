"""Which engine takes a network through photos faster, at what price, and what engine="auto" makes of it.

    python benchmarks/bench_engines.py [--quick] [--parts speed cost auto survey] [--json FILE]

- speed: from ready uint8 pixels, without decoding: engine="onnx" beside engine="torch", and beside onnxruntime's own
  bare run of the same graph, with one layer and with all stages.
- cost: what an export takes, what a process takes that finds the graph in a store, and memory; each in a process of
  its own.
- auto: total time of engine="auto" beside the better of both engines, on 1 to 10,000 images, each in a process of its
  own.
- survey: for networks of torchvision and timm whether they can be exported, and how far the rows are from torch's. Goes
  on where it was if ``--json`` names a file that is there.

Ways take turns, and medians over the rounds are compared. Rows are compared first, to 1e-5 of their norm. Exits with 1
where a limit is not met; ``--quick`` takes fewer networks and rounds, and no more than prints.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _about import about
from _graphs import bare_run
from _ways import DATA, WEIGHTS

from featx import PretrainedFeatureExtractor, list_backbones
from featx.exceptions import EngineError

ROUNDS, QUICK_ROUNDS = 5, 3
LITE0 = DATA / "weights" / "tf_efficientnet_lite0-imagenet.safetensors"
#: Weights, images, and what engine="onnx" should be at least as many times as fast as engine="torch".
NETWORKS: dict[str, tuple[Path | None, int, float | None]] = {
    "timm/tf_efficientnet_lite0": (LITE0, 64, 2.2),
    "mobilenet_v3_small": (None, 128, 2.0),
    "squeezenet1_1": (WEIGHTS, 96, 1.3),
    "resnet50": (None, 32, 1.1),
    "resnet18": (None, 64, 1.05),
    "vit_b_16": (None, 16, None),
    "timm/vit_small_patch16_224": (None, 24, None),
}
QUICK = ("squeezenet1_1", "mobilenet_v3_small")
AUTO = (1, 100, 1_000, 10_000)
OF_TIMM = (
    *("convnext_atto", "coatnet_nano_rw_224", "crossvit_tiny_240", "deit_tiny_distilled_patch16_224", "densenet121"),
    *(
        "dla34",
        "efficientformer_l1",
        "efficientnet_b0",
        "ghostnet_100",
        "hrnet_w18_small",
        "levit_128s",
        "mixer_s16_224",
    ),
    *(
        "mobilevit_xs",
        "nfnet_l0",
        "poolformer_s12",
        "regnety_004",
        "repvgg_a0",
        "res2net50_26w_4s",
        "swin_tiny_patch4_window7_224",
    ),
    *("vit_small_patch14_reg4_dinov2", "xception41"),
)

Figures = dict[str, Any]


def extractor_of(name: str, weights: Path | None, **params: Any) -> PretrainedFeatureExtractor:
    return PretrainedFeatureExtractor(name, weights=weights, device="cpu", **params)


def pixels(name: str, n: int) -> np.ndarray:
    """As many images as a network takes, at its own size: nothing is resized."""
    _, height, width = extractor_of(name, None)._architecture(extractor_of(name, None)._spec()).shape
    return np.random.default_rng(0).integers(0, 256, (n, height, width, 3), dtype=np.uint8)


def farthest(found: np.ndarray, wanted: np.ndarray) -> float:
    return float((np.linalg.norm(found - wanted, axis=1) / np.linalg.norm(wanted, axis=1)).max())


def take_turns(ways: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Median seconds of each way; once before that, so that all are warm."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for way in ways.values():
        way()
    for _ in range(rounds):
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            seconds[name].append(time.perf_counter() - start)
    return {name: float(np.median(values)) for name, values in seconds.items()}


def measure_speed(names: Sequence[str], rounds: int) -> Figures:
    figures: Figures = {}
    for name in names:
        weights, n, _ = NETWORKS[name]
        tiles = torch.from_numpy(pixels(name, n)).permute(0, 3, 1, 2)
        for layers in ("penultimate", "all"):
            model = extractor_of(name, weights, layers=layers)
            by_engine = {engine: passing(model, engine, tiles) for engine in ("torch", "onnx")}
            rows = {engine: way() for engine, way in by_engine.items()}
            distance = farthest(rows["onnx"], rows["torch"])
            assert distance < 1e-5, f"{name}: rows of the engines differ by {distance:.1g}"
            run, given = bare_run(model), tiles.permute(0, 2, 3, 1).numpy()
            seconds = take_turns({**by_engine, "bare": lambda run=run, given=given: run(given)}, rounds)
            figures[f"{name}, {layers}"] = {
                "onnx_over_torch": seconds["torch"] / seconds["onnx"],
                "of_bare": seconds["bare"] / seconds["onnx"],
                "images_per_s": n / seconds["onnx"],
                "distance": distance,
                "seconds": seconds,
            }
            print(f"{name}, {layers}: {json.dumps(figures[f'{name}, {layers}'])}", flush=True)
    return figures


def passing(model: PretrainedFeatureExtractor, engine: str, tiles: torch.Tensor) -> Callable[[], np.ndarray]:
    """What an engine makes of tiles that are there, batch by batch."""
    recipe = model._extraction(model._items([np.zeros((8, 8, 3), np.uint8)], reset=False)).with_engine(engine).recipe
    passes, slots = recipe.passes(len(tiles)), recipe.plan.slots

    def run() -> np.ndarray:
        blocks = [recipe._parts(some, slots, passes) for some in tiles.split(32)]
        return np.concatenate([recipe.plan.join([block[slot].numpy() for slot in slots]) for block in blocks])

    return run


PROCESS = """
import json, resource, sys, time
start = time.perf_counter()
import numpy as np
from featx import PretrainedFeatureExtractor
name, weights, n, engine, store = sys.argv[1:]
X = np.load(store + "/images.npy", mmap_mode="r")
X = [X[i % len(X)] for i in range(int(n))]
import torch, featx.activations.passes
imported = time.perf_counter()
cache = store if engine == "kept" else None
model = PretrainedFeatureExtractor(name, weights=weights or None, layers="penultimate", device="cpu",
                                   engine="onnx" if engine == "kept" else engine, cache=cache)
from PIL import Image
model.transform([Image.fromarray(image) for image in X])
from featx.activations.exported import finding
end = time.perf_counter()
print(json.dumps({"seconds": end - imported, "import": imported - start, "exported": len(finding._HELD) > 0,
                  "mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}))
"""


def in_process(name: str, weights: Path | None, n: int, engine: str, store: Path) -> Figures:
    command = [sys.executable, "-c", PROCESS, name, str(weights or ""), str(n), engine, str(store)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env={**os.environ})
    return json.loads(done.stdout)


def measure_cost(names: Sequence[str], folder: Path) -> Figures:
    """Seconds beyond those of a process that computes one image in torch, and memory."""
    figures: Figures = {}
    for name in names:
        weights, store = NETWORKS[name][0], folder / name.replace("/", "-")
        store.mkdir()
        images = pixels(name, 3)
        runs = {}
        for row, (way, engine) in enumerate([("torch", "torch"), ("exports", "kept"), ("finds", "kept")]):
            np.save(store / "images.npy", images[row : row + 1])
            runs[way] = in_process(name, weights, 1, engine, store)
        size = max(path.stat().st_size for path in store.glob("v*/files/*"))
        figures[name] = {"file_mb": size / 1e6, **runs}
        print(f"{name}: {json.dumps(figures[name])}", flush=True)
    return figures


def measure_auto(names: Sequence[str], numbers: Sequence[int], folder: Path) -> Figures:
    figures: Figures = {}
    for name in names:
        store = folder / f"auto-{name.replace('/', '-')}"
        store.mkdir()
        np.save(store / "images.npy", pixels(name, 50))
        for n in numbers:
            runs = {
                engine: in_process(name, NETWORKS[name][0], n, engine, store) for engine in ("torch", "onnx", "auto")
            }
            better = min(("torch", "onnx"), key=lambda engine: runs[engine]["seconds"])
            figures[f"{name}, {n}"] = {
                "took": "onnx" if runs["auto"]["exported"] else "torch",
                "better": better,
                "auto_over_better": runs["auto"]["seconds"] / runs[better]["seconds"],
                "seconds": {engine: run["seconds"] for engine, run in runs.items()},
            }
            print(f"{name}, {n}: {json.dumps(figures[f'{name}, {n}'])}", flush=True)
    return figures


def survey(names: Sequence[str], file: Path | None) -> Figures:
    """Whether each network can be exported, how far its rows are, and how long that took."""
    found: Figures = json.loads(file.read_text()).get("survey", {}) if file is not None and file.exists() else {}
    for name in names:
        if name in found:
            continue
        start = time.perf_counter()
        try:
            model = extractor_of(name, None, layers=["penultimate", -1], engine="onnx")
            images = pixels(name, 3)
            distance = farthest(model.transform(images), model.set_params(engine="torch").transform(images))
            found[name] = {"exported": True, "distance": distance, "seconds": time.perf_counter() - start}
        except EngineError as error:
            found[name] = {"exported": False, "reason": str(error), "seconds": time.perf_counter() - start}
        print(f"{name}: {json.dumps(found[name])}", flush=True)
        if file is not None:
            file.write_text(json.dumps({"survey": found} | about(), indent=1))
    return found


def small_networks() -> list[str]:
    """Those of torchvision with fewer than a hundred million parameters."""
    from featx.backbones.catalogue import resolve_backbone

    names = []
    for name in list_backbones():
        entry = resolve_backbone(name).entry
        assert entry is not None
        if sum(parameter.numel() for parameter in entry.skeleton("", None).parameters()) < 1e8:
            names.append(name)
    return names


def is_met(figures: Figures) -> bool:
    met = []
    for key, row in figures.get("speed", {}).items():
        limit = NETWORKS[key.rpartition(", ")[0]][2]
        if limit is not None:
            met += [row["onnx_over_torch"] >= limit, row["of_bare"] >= 0.9]
            print(
                f"{key}: onnx over torch {row['onnx_over_torch']:.2f}, at least {limit}; of bare {row['of_bare']:.2f}"
            )
    for key, row in figures.get("auto", {}).items():
        met.append(row["auto_over_better"] <= 1.15)
        print(f"{key}: auto took {row['took']}, {row['auto_over_better']:.2f} times the better one, at most 1.15")
    met += [row["distance"] <= 1e-5 for row in figures.get("survey", {}).values() if row["exported"]]
    return all(met)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer networks and rounds, and no judgement")
    parts = ("speed", "cost", "auto", "survey")
    parser.add_argument("--parts", nargs="+", choices=parts, default=parts[:3])
    parser.add_argument("--networks", nargs="+")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    quick = arguments.quick
    names = arguments.networks or (QUICK if quick else [*NETWORKS])
    figures: Figures = {}
    with tempfile.TemporaryDirectory() as folder:
        if "speed" in arguments.parts:
            figures["speed"] = measure_speed(names, QUICK_ROUNDS if quick else ROUNDS)
        if "cost" in arguments.parts:
            figures["cost"] = measure_cost(names, Path(folder))
        if "auto" in arguments.parts:
            figures["auto"] = measure_auto(names, AUTO[:2] if quick else AUTO, Path(folder))
        if "survey" in arguments.parts:
            asked = arguments.networks or [*small_networks(), *(f"timm/{name}" for name in OF_TIMM)]
            figures["survey"] = survey(asked, arguments.json)
    met = is_met(figures)
    if arguments.json:
        arguments.json.write_text(json.dumps(figures | about(), indent=1) + "\n")
    sys.exit(not quick and not met)


if __name__ == "__main__":
    main()

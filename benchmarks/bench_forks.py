"""Children that are forked after torch was used: right rows, no hang, and how long one takes.

    python benchmarks/bench_forks.py [--quick] [--engine {torch,onnx}] [--json FILE]

A process with several threads sends images through resnet18 (random weights), and then forks children, one after the
other, which do the same, without and with a store; those with a store also meet images that are new. Beside them, a
fresh process with one thread, from the call on, so that it too loads the network. Rows are compared first. Exits with 1
where rows differ, a child hangs, or the slowest takes more than twice the processor's time of the fresh process (the
median of five), which other processes on the machine do not change; ``--quick`` forks fewer and does not judge.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from _about import about

from featx import PretrainedFeatureExtractor

N_IMAGES, N_NEW = 16, 4
PATIENCE_S = 120
MOST = 2.0
FRESH = """
import sys, time
import numpy as np, torch, torchvision
from featx import PretrainedFeatureExtractor
torch.set_num_threads(1)
X = np.random.default_rng(0).integers(0, 256, ({n}, 256, 256, 3), dtype=np.uint8)
start, worked = time.perf_counter(), time.process_time()
PretrainedFeatureExtractor("resnet18", weights=None, engine=sys.argv[1]).transform(X)
print(time.perf_counter() - start, time.process_time() - worked)
"""


def images(seed: int, n: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (n, 256, 256, 3), dtype=np.uint8)


def in_child(call: Callable[[], np.ndarray]) -> tuple[np.ndarray, list[float]]:
    """What a call gives in a forked child, and its seconds there, by the clock and of the processor."""
    reader, writer = multiprocessing.Pipe(duplex=False)

    def work() -> None:
        n_threads, start, worked = torch.get_num_threads(), time.perf_counter(), time.process_time()
        rows = call()
        seconds = [time.perf_counter() - start, time.process_time() - worked]
        writer.send((rows, seconds, torch.get_num_threads() == n_threads))

    child = multiprocessing.get_context("fork").Process(target=work)
    child.start()
    try:
        if not reader.poll(PATIENCE_S):
            sys.exit("A forked child hangs.")
        rows, seconds, is_as_it_was = reader.recv()
    finally:
        child.kill()
        child.join()
    if not is_as_it_was:
        sys.exit("A forked child has another number of threads than before.")
    return rows, seconds


def check_same(found: np.ndarray, expected: np.ndarray) -> None:
    apart = np.linalg.norm(found - expected, axis=1) / np.linalg.norm(expected, axis=1)
    if apart.max() > 1e-5:
        sys.exit(f"A forked child's rows differ by {apart.max():.1e} of their norm.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer children, and no judgement")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    parser.add_argument("--engine", choices=("torch", "onnx"), default="torch", help="default: torch")
    arguments = parser.parse_args()
    params = {"weights": None, "engine": arguments.engine}
    n_forks = 5 if arguments.quick else 50
    torch.set_num_threads(max(2, torch.get_num_threads()))
    X, plain = images(0, N_IMAGES), PretrainedFeatureExtractor("resnet18", **params)
    expected = plain.transform(X)
    runs: dict[str, list[list[float]]] = {"fresh": [], "forked": [], "forked, with a store": []}
    with tempfile.TemporaryDirectory() as folder:
        cached = PretrainedFeatureExtractor("resnet18", **params, cache=folder)
        check_same(cached.transform(X), expected)
        for turn in range(n_forks):
            if turn % max(1, n_forks // 5) == 0:
                code = FRESH.format(n=N_IMAGES)
                told = subprocess.check_output([sys.executable, "-c", code, arguments.engine], text=True)
                runs["fresh"].append([*map(float, told.split())])
            rows, seconds = in_child(lambda: plain.transform(X))
            check_same(rows, expected)
            runs["forked"].append(seconds)
            some = np.concatenate([X, images(turn + 1, N_NEW)])
            rows, seconds = in_child(lambda some=some: cached.transform(some))
            check_same(rows[:N_IMAGES], expected)
            check_same(rows[N_IMAGES:], plain.transform(some[N_IMAGES:]))
            runs["forked, with a store"].append(seconds)
    fresh = np.median(runs["fresh"], axis=0)
    print(f"{n_forks} children each, all rows right; a fresh process with one thread takes {fresh[0]:.2f} s")
    figures: dict[str, object] = {"children": n_forks, "engine": arguments.engine, "seconds": runs}
    worst = 0.0
    for way in ("forked", "forked, with a store"):
        middle, slowest = np.median(runs[way], axis=0) / fresh, np.max(runs[way], axis=0) / fresh
        figures[f"slowest {way}"], worst = float(slowest[1]), max(worst, float(slowest[1]))
        by_clock = f"by the clock: median {middle[0]:5.2f}, slowest {slowest[0]:5.2f}"
        print(f"{way:22} {by_clock}; of the processor: median {middle[1]:5.2f}, slowest {slowest[1]:5.2f}")
    if arguments.json:
        arguments.json.write_text(json.dumps(figures | about(), indent=2))
    sys.exit(not arguments.quick and worst > MOST)


if __name__ == "__main__":
    main()

"""The store after ``kill -9`` at random moments of a writing process.

    python benchmarks/stress_store.py [--rounds 200] [--seed 0]

Each round starts a process that opens the store, shared by all rounds, and transforms images that are new to it in
batches of 8, each with commits of its own. It is killed after a random number of batches and a random part of the time
that one takes. Then ``verify()`` reads every record, a random sample of this and earlier rounds is compared with
features computed without a store, and the images in the store are counted: at most the batch in flight may be lost,
and nothing that the writer was already handed. Exits with 1 where any of this fails. So that a round does not take the
seconds that importing torch takes, the writers are forked by a process that has imported everything and run nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from torch.nn.modules.module import register_module_forward_pre_hook

import featx.activations.extraction  # noqa: F401 before the first fork, so that no writer spends time on it
from featx import FeatureStore, PretrainedFeatureExtractor
from featx.store.memory import MEMORY

N_IMAGES, CHUNK, BATCH = 64, 16, 8  # a round, a call of the writer, a pass
SAMPLE = 24  # images of this round, and as many of earlier ones, that are compared
TOLERANCE = 1e-5  # of the row's norm
FAILURES = ("failed_writers", "wrong_records", "damaged_recipes", "wrong_rows", "lost_rows", "warnings")

Say = Callable[[str], object]


def images_of(seed: int, number: int) -> np.ndarray:
    """The images of one round."""
    rng = np.random.default_rng([seed, number])
    return rng.integers(0, 256, size=(N_IMAGES, 8, 8, 3), dtype=np.uint8)


def make_extractor(cache: FeatureStore | None) -> PretrainedFeatureExtractor:
    return PretrainedFeatureExtractor("featx_micro", layers=1, batch_size=BATCH, cache=cache)


# The writer, and the process that it is forked from.


def write(folder: str, images: np.ndarray, say: Say) -> None:
    """Transform images into a store, and tell of every pass before it and of every chunk after it."""

    def tell(module: torch.nn.Module, args: tuple[Any, ...]) -> None:
        if type(module).__name__ == "FeatxMicro" and args[0].device.type != "meta":
            say("pass")

    warnings.simplefilter("error")  # a store that is given up must not pass for one that is written
    register_module_forward_pre_hook(tell)
    extractor = make_extractor(FeatureStore(folder))
    say("begin")
    for start in range(0, N_IMAGES, CHUNK):
        extractor.transform(images[start : start + CHUNK])
        say("done")


def run_writer(folder: str, images: np.ndarray, pipe: int) -> NoReturn:
    """End the process with 0 if all was written."""
    status = 1
    try:
        write(folder, images, lambda word: os.write(pipe, f"{word}\n".encode()))
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def fork_and_kill(folder: str, images: np.ndarray, passes: int, share: float, pace: deque[float]) -> dict[str, int]:
    """Kill a writer ``share`` of a batch's time after it began its pass number ``passes`` (0: its first act)."""
    reading, writing = os.pipe()
    if not (writer := os.fork()):
        run_writer(folder, images, writing)
    os.close(writing)
    said, last = {"begin": 0, "pass": 0, "done": 0}, time.perf_counter()
    with os.fdopen(reading) as lines:
        for word in map(str.strip, lines):
            said[word] += 1
            if word != "done" and said["pass"] == passes:
                time.sleep(share * sum(pace) / len(pace))
                os.kill(writer, signal.SIGKILL)  # it keeps its number until it is waited for
            elif word == "pass" and said["pass"] > 1:
                pace.append(time.perf_counter() - last)
            last = time.perf_counter()
    status = os.waitstatus_to_exitcode(os.waitpid(writer, 0)[1])
    return {"status": status, "through": said["pass"] * BATCH, "handed": said["done"] * CHUNK}


def serve(folder: str, seed: int) -> None:
    """Answer each line [number, passes, share] on standard input with what became of a writer."""
    pace = deque([0.02], maxlen=50)  # seconds between passes; the first is a guess
    for line in sys.stdin:
        number, passes, share = json.loads(line)
        print(json.dumps(fork_and_kill(folder, images_of(seed, number), passes, share, pace)), flush=True)


# The checks.


@contextmanager
def server(folder: Path, seed: int) -> Iterator[Callable[..., dict[str, int]]]:
    """A function that asks ``serve``, running in a process of its own, to let a writer write and kill it."""
    command = [sys.executable, __file__, "--serve", str(folder), "--seed", str(seed)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}  # enough for eight small images
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1, env=environment
    ) as process:

        def ask(*question: float) -> dict[str, int]:
            print(json.dumps(question), file=process.stdin, flush=True)
            return json.loads(process.stdout.readline())

        yield ask  # leaving closes its input, which ends it


def stress(rounds: int, seed: int, folder: Path) -> dict[str, int]:
    """Kill a writer in every round and check the store.

    Returns
    -------
    counts : dict
        ``rounds``, ``hits`` (kills before the writer had finished), ``passed`` (images that writers sent through the
        network), ``kept`` (of those, in the store after the kill), ``compared`` rows, and what must be 0: ``FAILURES``.
    """
    counts = dict.fromkeys(("rounds", "hits", "passed", "kept", "compared", *FAILURES), 0)
    rng, references = np.random.default_rng(seed), {}
    with server(folder, seed) as ask:
        for number in range(rounds):
            before = FeatureStore(folder).info()["images"]
            outcome = ask(number, int(rng.integers(N_IMAGES // BATCH + 1)), rng.uniform(0, 1.5))
            references[number] = make_extractor(None).transform(images_of(seed, number))
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                _check_store(counts, FeatureStore(folder), before, outcome)
                _check_rows(counts, FeatureStore(folder), references, seed, rng)
            counts["warnings"] += len(caught)
    return counts


def _check_store(counts: dict[str, int], store: FeatureStore, before: int, outcome: dict[str, int]) -> None:
    store._open().close()  # so that the check opens it as it was left
    verified, kept = store.verify(), store.info()["images"] - before
    counts["rounds"] += 1
    counts["hits"] += outcome["status"] == -signal.SIGKILL
    counts["failed_writers"] += outcome["status"] not in (0, -signal.SIGKILL)
    counts["passed"] += outcome["through"]
    counts["kept"] += kept
    counts["wrong_records"] += verified["wrong"]
    counts["damaged_recipes"] += verified["damaged"]
    counts["lost_rows"] += max(0, outcome["through"] - BATCH - kept, outcome["handed"] - kept)


def _check_rows(
    counts: dict[str, int],
    store: FeatureStore,
    references: dict[int, np.ndarray],
    seed: int,
    rng: np.random.Generator,
) -> None:
    """Compare a sample of this round, and another of all rounds so far, with what no store has touched."""
    MEMORY.clear()
    latest = len(references) - 1
    for number in (latest, int(rng.integers(len(references)))):
        rows = rng.permutation(N_IMAGES)[:SAMPLE]
        wanted = references[number][rows]
        found = make_extractor(store).transform(images_of(seed, number)[rows])
        distances = np.linalg.norm(found - wanted, axis=1)
        counts["wrong_rows"] += int((~(distances <= TOLERANCE * np.linalg.norm(wanted, axis=1))).sum())
        counts["compared"] += SAMPLE


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=200, help="writers to kill")
    parser.add_argument("--seed", type=int, default=0, help="of images and moments")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        return serve(arguments.serve, arguments.seed)
    with tempfile.TemporaryDirectory() as folder:
        counts = stress(arguments.rounds, arguments.seed, Path(folder) / "store")
    for name, count in counts.items():
        print(f"{name.replace('_', ' '):16} {count:8,}" + "   must be 0" * (name in FAILURES))
    sys.exit(any(counts[name] for name in FAILURES))


if __name__ == "__main__":
    main()

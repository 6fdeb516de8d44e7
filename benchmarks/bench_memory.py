"""Peak memory of ``iter_transform`` does not grow with the number of images.

    python benchmarks/bench_memory.py [--quick] [--json FILE]

Each size runs in a process of its own over files on disk, and keeps no block. Parity is checked first: the blocks are
the rows of ``transform``.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from _about import about
from PIL import Image

from featx import PretrainedFeatureExtractor


def make_photos(folder: Path, count: int) -> list[str]:
    rng = np.random.default_rng(0)
    paths = [folder / f"{i}.jpg" for i in range(count)]
    for path in paths:
        Image.fromarray(rng.integers(0, 256, size=(64, 64, 3), dtype=np.uint8)).save(path)
    return [str(path) for path in paths]


def peak_mib(paths: list[str]) -> float:
    code = (
        "import resource, sys\n"
        "from featx import PretrainedFeatureExtractor\n"
        "paths = sys.stdin.read().splitlines()\n"
        "for block in PretrainedFeatureExtractor('featx_micro').iter_transform(paths): pass\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], input="\n".join(paths), capture_output=True, text=True, check=True
    )
    return int(done.stdout) / (1024**2 if sys.platform == "darwin" else 1024)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="1,000 images at most")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    arguments = parser.parse_args()
    sizes = [100, 1000] if arguments.quick else [1000, 10_000]
    with tempfile.TemporaryDirectory() as folder:
        paths = make_photos(Path(folder), sizes[-1])
        extractor = PretrainedFeatureExtractor("featx_micro")
        blocks = np.concatenate(list(extractor.iter_transform(paths[:100])))
        assert np.array_equal(blocks, extractor.transform(paths[:100]))
        peaks = {size: round(peak_mib(paths[:size]), 1) for size in sizes}
    print("images   peak MiB")
    for size, peak in peaks.items():
        print(f"{size:6d} {peak:10.1f}")
    print(f"growth per 1,000 images: {(peaks[sizes[1]] - peaks[sizes[0]]) / (sizes[1] - sizes[0]) * 1000:.2f} MiB")
    if arguments.json:
        arguments.json.write_text(json.dumps({"peak_mib": peaks, **about()}, indent=2))


if __name__ == "__main__":
    main()

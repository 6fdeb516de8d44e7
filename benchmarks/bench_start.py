"""What a new process takes before it is of use: importing featx, and predicting photos whose features are known.

    python benchmarks/bench_start.py [--quick] [--json FILE]

- import: ``import featx`` beside ``import sklearn.base, sklearn.pipeline, numpy``, each in a process of its own.
- predict: a pipeline (resnet18, random weights, a logistic regression) is loaded from a file and predicts the ants and
  bees (``$FEATX_DATA``), all of them known to its store: as it is, and where torchvision is loaded already, so that
  nothing is saved by finding the rows without it. Beside both, importing scikit-learn alone.

Ways take turns; medians are compared. Exits with 1 where a limit is not met; ``--quick`` takes fewer turns.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import joblib
import numpy as np
from _about import about
from _ways import unpack_photos
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline

from featx import PretrainedFeatureExtractor, load_image_folder

SCIKIT_LEARN = "import sklearn.base, sklearn.pipeline, numpy"
PREDICT = """
import sys
import joblib
model, paths, wanted = joblib.load({file!r})
assert (model.predict(paths) == wanted).all()
assert {loaded} or "torch" not in sys.modules
"""
MOST_IMPORT = 1.2
MOST_PREDICT = 0.6  # of the time with torch and torchvision


def seconds(code: str) -> float:
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], check=True)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer turns, and no judgement")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        photos = load_image_folder(unpack_photos(folder))
        extractor = PretrainedFeatureExtractor("resnet18", weights=None, cache=folder / "store")
        model = make_pipeline(extractor, LogisticRegression(max_iter=1000)).fit(photos.data, photos.target)
        joblib.dump((model, photos.data, model.predict(photos.data)), folder / "model")
        ways = {
            "nothing": "pass",
            "scikit-learn": SCIKIT_LEARN,
            "featx": "import featx",
            "predict": PREDICT.format(file=str(folder / "model"), loaded=False),
            "predict with torchvision": "import torchvision" + PREDICT.format(file=str(folder / "model"), loaded=True),
        }
        runs: dict[str, list[float]] = {way: [] for way in ways}
        for _ in range(4 if arguments.quick else 16):
            for way, code in ways.items():
                runs[way].append(seconds(code))
    middle = {way: float(np.median(values[1:])) for way, values in runs.items()}  # the first one fills the disk's cache
    python = middle.pop("nothing")
    figures = {
        "import_to_scikit_learn": (middle["featx"] - python) / (middle["scikit-learn"] - python),
        "predict_to_scikit_learn": middle["predict"] / middle["scikit-learn"],
        "predict_to_with_torchvision": middle["predict"] / middle["predict with torchvision"],
        "seconds": runs,
    }
    limits = {"import_to_scikit_learn": MOST_IMPORT, "predict_to_with_torchvision": MOST_PREDICT}
    for figure, value in figures.items():
        if figure in limits and not arguments.quick:
            print(f"{figure:30} {value:6.2f}   at most {limits[figure]:g}")
        elif figure != "seconds":
            print(f"{figure:30} {value:6.2f}")
    if arguments.json:
        arguments.json.write_text(json.dumps(figures | about(), indent=2))
    sys.exit(not arguments.quick and any(figures[figure] > limit for figure, limit in limits.items()))  # type: ignore[operator]


if __name__ == "__main__":
    main()

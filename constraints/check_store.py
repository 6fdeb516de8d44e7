"""One store written in turns, and then at once, by two environments with other releases of everything.

    python constraints/check_store.py OTHER_PYTHON

Each environment reads its own rows and no other's: rows equal those that it computes without a store, and exactly the
images that are new to it go through its network. Exits with 1 where that does not hold.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile

TURNS = 4
ONE_TURN = """
import json, sys
import numpy as np
from featx import FeatureStore, PretrainedFeatureExtractor
from featx.activations.engine import TALLY

folder, begin, end = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
images = np.random.default_rng(0).integers(0, 256, size=(end, 40, 40, 3), dtype=np.uint8)
wrong = new = 0
for backbone, weights in [("featx_micro", "DEFAULT"), ("resnet18", None)]:
    plain = PretrainedFeatureExtractor(backbone, weights=weights, batch_size=8)
    kept = PretrainedFeatureExtractor(backbone, weights=weights, batch_size=8, cache=folder)
    before = TALLY.n_images
    rows = kept.transform(images)
    new += TALLY.n_images - before
    wrong += int((np.abs(rows - plain.transform(images)).max(axis=1) > 1e-5 * np.abs(rows).max()).sum())
damaged = FeatureStore(folder).verify()
print(json.dumps({"wrong": wrong, "new": new, "wanted": 2 * (end - begin), "damaged": str(damaged)}))
"""


def begun(python: str, folder: str, begin: int, end: int) -> subprocess.Popen[str]:
    return subprocess.Popen([python, "-c", ONE_TURN, folder, str(begin), str(end)], stdout=subprocess.PIPE, text=True)


def ended(process: subprocess.Popen[str], who: str) -> bool:
    """Whether a turn went well."""
    output = process.communicate()[0]
    if process.returncode != 0:
        print(f"{who}: exit code {process.returncode}")
        return False
    found = json.loads(output)
    print(f"{who}: {found['wrong']} wrong rows, {found['new']} images computed where {found['wanted']} are new to it")
    return found["wrong"] == 0 and found["new"] == found["wanted"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("other", help="Python of the other environment")
    pythons = {"this": sys.executable, "other": parser.parse_args().other}
    well = True
    with tempfile.TemporaryDirectory() as folder:
        for turn in range(TURNS):
            for who, python in pythons.items():
                well &= ended(begun(python, folder, 16 * turn, 16 * (turn + 1)), f"{who} environment, turn {turn + 1}")
        both = {who: begun(python, folder, 16 * TURNS, 32 * TURNS) for who, python in pythons.items()}
        for who, process in both.items():
            well &= ended(process, f"{who} environment, both at once")
    sys.exit(not well)


if __name__ == "__main__":
    main()

"""Whether installing featx would replace or add anything that a hosted notebook service does not have or want.

    python constraints/check_notebook.py

Run by the Python that has the packages of ``constraints/notebook.txt``. Exits with 1 where pip would install more than
featx and what the list does not have.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def main() -> None:
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--quiet", "--report", "-", str(ROOT)]
    report = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    listed = {
        line.split("==")[0] for line in (ROOT / "constraints/notebook.txt").read_text().splitlines() if "==" in line
    }
    names = [entry["metadata"]["name"].lower() for entry in report["install"]]
    replaced = sorted(set(names) & listed)
    print(f"pip would install {', '.join(sorted(names))}, and of the service's packages replace {len(replaced)}.")
    sys.exit(bool(replaced or set(names) - {"featx", "lmdb"}))


if __name__ == "__main__":
    main()

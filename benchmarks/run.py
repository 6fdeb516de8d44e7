"""Every benchmark in its quick form, one after the other, and the tables of README and accuracy.md.

    python benchmarks/run.py [--only [NAME ...]] [--write]

The figures, with versions, machine and commit, go to ``benchmarks/results/NAME.json``, but for those of benchmarks
whose quick form only shows that they work; ``--write`` puts the tables made of all of them into the pages. Exits with 1
where a benchmark found something wrong. For figures to judge by, run a benchmark without ``--quick``.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

from _about import about
from _tables import PAGES, RESULTS, put

ROOT = Path(__file__).parents[1]
BENCHES = {
    "demo": ["examples/demo.py"],
    "extraction": ["benchmarks/bench_extraction.py", "--quick"],
    "engines": ["benchmarks/bench_engines.py", "--quick"],
    "grid_search": ["benchmarks/bench_grid_search.py", "--quick"],
    "fits": ["benchmarks/bench_fits.py", "--quick"],
    "fine_tuning": ["benchmarks/bench_fine_tuning.py", "--quick"],
    "store": ["benchmarks/bench_store.py", "--quick"],
    "memory": ["benchmarks/bench_memory.py", "--quick"],
    "start": ["benchmarks/bench_start.py", "--quick"],
    "accuracy": ["benchmarks/bench_accuracy.py", "--quick"],
    "counts": ["benchmarks/bench_counts.py", "--quick"],
    "transfer": ["benchmarks/bench_transfer.py", "--quick"],
}
# Their figures take an hour or more: bench_NAME.py --json benchmarks/results/NAME.json.
SHOWN_ALONE = {"accuracy", "counts", "transfer"}


def run(name: str) -> bool:
    """Whether a benchmark ended well; its figures are where they belong."""
    start = time.perf_counter()
    print(f"\n{name}\n{'=' * len(name)}", flush=True)
    RESULTS.mkdir(exist_ok=True)
    new = RESULTS / f"{name}.json.new"
    new.unlink(missing_ok=True)  # benchmarks that can be resumed would go on with it
    done = subprocess.run([sys.executable, *BENCHES[name], "--json", str(new)], cwd=ROOT, check=False)
    if name in SHOWN_ALONE:
        new.unlink(missing_ok=True)
    elif new.exists():
        figures = json.loads(new.read_text()) | about()
        new.write_text(json.dumps(figures, indent=1) + "\n")
        new.replace(RESULTS / f"{name}.json")
    print(f"{name}: {time.perf_counter() - start:.0f} s, exit status {done.returncode}", flush=True)
    return done.returncode == 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", choices=BENCHES, default=list(BENCHES), help="none: the tables alone")
    parser.add_argument("--write", action="store_true", help="put the tables into the pages")
    arguments = parser.parse_args()
    failed = [name for name in arguments.only if not run(name)]
    for page, tables in PAGES.items():
        text = (ROOT / page).read_text()
        for name, (file, make) in tables.items():
            table = make(json.loads((RESULTS / f"{file}.json").read_text()))
            print(f"\n{name}\n\n{table}")
            text = put(text, name, table)
        if arguments.write:
            (ROOT / page).write_text(text)
    sys.exit(f"failed: {', '.join(failed)}" if failed else 0)


if __name__ == "__main__":
    main()

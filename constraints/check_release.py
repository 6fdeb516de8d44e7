"""Whether what would be published is complete, and installs on the Pythons that are not tested here.

    python constraints/check_release.py [--python 3.12 ...]

Builds sdist and wheel in a temporary folder, has twine check both, and compares the wheel with the package under
version control. Then has uv resolve the requirements of all users' extras on each further Python, from wheels alone;
nothing is installed. Exits with 1 where anything is wrong.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]


def run(*command: str) -> str:
    return subprocess.run(
        [sys.executable, "-m", *command], cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True
    ).stdout


def differences(wheel: Path) -> set[str]:
    """Files that are in the wheel or in the package, and not in both; the wheel's own records apart."""
    tracked = subprocess.run(["git", "ls-files", "featx"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if not name.split("/")[0].endswith(".dist-info")}
    return packed ^ set(tracked.split())


def requirements_on(python: str, wheel: Path) -> int | None:
    """How many packages ``pip install "featx[all]"`` takes there, all from wheels; None where one has none."""
    on = ["--python-version", python, "--python-platform", "x86_64-manylinux_2_28", "--only-binary", ":all:"]
    command = [sys.executable, "-m", "uv", "pip", "compile", "-", "--no-header", "--no-annotate", "--quiet", *on]
    done = subprocess.run(command, input=f"featx[all] @ {wheel.as_uri()}", capture_output=True, text=True)
    return len(done.stdout.splitlines()) if done.returncode == 0 else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", nargs="*", default=["3.12", "3.13", "3.14"], help="Pythons to ask pip about")
    arguments = parser.parse_args()
    wrong = False
    with tempfile.TemporaryDirectory() as name:
        run("build", "--outdir", name)
        sdist, wheel = next(Path(name).glob("*.tar.gz")), next(Path(name).glob("*.whl"))
        print(run("twine", "check", "--strict", str(sdist), str(wheel)).strip())
        different = differences(wheel)
        print(f"{wheel.name}: {len(different)} files differ from the package's", *sorted(different))
        wrong |= bool(different)
        for python in arguments.python:
            count = requirements_on(python, wheel)
            print(
                f"Python {python}:",
                "a requirement has no wheel" if count is None else f"{count} packages, each with a wheel",
            )
            wrong |= count is None
    sys.exit(wrong)


if __name__ == "__main__":
    main()

"""The command line, run inside the process of a test."""

from __future__ import annotations

import inspect
import json
from typing import Any

from click.testing import CliRunner, Result

_MIXES = "mix_stderr" in inspect.signature(CliRunner).parameters


class _Told(Result):
    """What click before 8.2 gives, with all that was told in ``output``."""

    @property
    def output(self) -> str:
        return self.stdout + self.stderr


class _Runner(CliRunner):
    def invoke(self, *arguments: Any, **how: Any) -> Result:
        result = super().invoke(*arguments, **how)
        result.__class__ = _Told
        return result


def runner() -> CliRunner:
    """One whose results hold stdout and stderr apart, and both in ``output``."""
    return _Runner(mix_stderr=False) if _MIXES else CliRunner()


def run(*words: object, code: int = 0) -> Result:
    """A command of featx that has to end with this code."""
    from featx.cli.commands import featx

    result = runner().invoke(featx, [str(word) for word in words])
    assert result.exit_code == code, (result.output, result.exception)
    return result


def run_json(*words: object) -> dict[str, Any]:
    """What it prints for scripts."""
    found: dict[str, Any] = json.loads(run(*words, "--json").stdout)
    return found

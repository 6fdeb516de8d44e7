"""How many threads a user's ``n_jobs`` means."""

from __future__ import annotations


def n_threads(n_jobs: int | None, default: int) -> int:
    """The default for None, otherwise joblib's reading of ``n_jobs``, whatever backend joblib is set to."""
    from joblib import cpu_count

    if n_jobs is None:
        return default
    return n_jobs if n_jobs > 0 else max(1, cpu_count() + 1 + n_jobs)

"""Features of more photos than one machine or one memory holds: in this process, or on Dask workers.

Needs ``pip install "featx[dask]"``.

In come an extractor and many files, local or behind URLs; out comes a folder of Parquet shards with a manifest. A
shard appears whole or not at all, so whatever ends a run, the next one computes what is missing and nothing else.

Open ``extraction.py`` first (one run), then ``shards.py`` (how items are cut, and why a shard's name tells its
content) and ``work.py`` (one shard, in whatever process). ``listing.py`` says which files are meant; ``folder.py``
writes to local folders and buckets alike.

Laws of CONTRIBUTING.md that live here: 1 across machines (a worker that would compute other features refuses), and
of 7 that no shard of another recipe or of other items is taken for one of these. Nothing is left out in silence:
each row has its error.
"""

from featx.distributed.extraction import Extracted, extract

__all__ = ["Extracted", "extract"]

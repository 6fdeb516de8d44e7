"""Features of more photos than one machine or one memory holds: in this process, or on Dask workers.

Needs ``pip install "featx[dask]"``.
"""

from featx.distributed.extraction import Extracted, extract

__all__ = ["Extracted", "extract"]

"""Opening Parquet files, wherever they are."""

from pathlib import Path
from typing import cast

import pyarrow as pa
import pyarrow.parquet as pq

from arra.files import is_local


def parquet_file(path: Path, memory_map: bool = False) -> pq.ParquetFile:
    """A Parquet file; of one in an object store only what is asked for is fetched.

    Args:
        path: of this machine or of an object store.
        memory_map: read a local file through the system's memory.

    Raises:
        pyarrow.ArrowException, OSError: it is missing, cut off, or no Parquet file.
    """
    if is_local(path):
        return pq.ParquetFile(path, memory_map=memory_map)
    # Arrow asks for what it needs in a few large pieces: reading ahead would only fetch more, and
    # would keep it for every file that is open.
    handle = cast(pa.NativeFile, path.open("rb", cache_type="none"))  # type: ignore[call-overload]
    return pq.ParquetFile(handle, pre_buffer=True)

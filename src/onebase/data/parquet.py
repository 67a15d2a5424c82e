"""Parquet files read batch by batch through pyarrow (extra `data`)."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from onebase.data.table import Opened, Records, refuse_repeats
from onebase.data.texts import guarded
from onebase.errors import DataError

_ROWS = 512  # rows decoded at a time


def open_parquet(path: Path) -> Opened:
    """Open a .parquet file.

    Raises:
        DataError: pyarrow is missing, or the file is damaged; the latter also while it is read.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise DataError(
            f"{path.name}: reading Parquet needs pyarrow: pip install 'onebase[data]'. Or save it as CSV or JSONL."
        ) from None

    def damaged(error: BaseException) -> DataError:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        return DataError(
            f"{path.name}: the Parquet file is damaged or cut off ({first[:200]}). Make or download it again."
        )

    # What pyarrow raises on damaged bytes has no common class (ArrowInvalid, OSError, UnicodeDecodeError ...).
    with guarded(path):
        path.open("rb").close()
    try:
        with path.open("rb") as stream, pyarrow.parquet.ParquetFile(stream) as file:
            names = [str(name) for name in file.schema_arrow.names]
    except Exception as error:
        raise damaged(error) from None
    refuse_repeats(path.name, names)

    def records(skipped: Counter[str]) -> Records:
        number = 0
        try:
            with path.open("rb") as stream, pyarrow.parquet.ParquetFile(stream) as file:
                for batch in file.iter_batches(batch_size=_ROWS, use_threads=False):
                    batch.validate(full=True)  # what was flipped in offsets is caught before it is followed
                    for row in zip(*(column.to_pylist() for column in batch.columns)):
                        number += 1
                        yield number, dict(zip(names, map(_plain, row)))
        except DataError:
            raise
        except Exception as error:
            raise damaged(error) from None

    return Opened(path.name, records, unit="row", columns=tuple(names))


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
